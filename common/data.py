"""Tokenised data and batches: one flat array in memory; the order of an epoch is a function of seed and epoch."""

from __future__ import annotations

from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch

from common.runs import UserError, read_json


class Split(NamedTuple):
    """Tokenised examples: example i is ids[offsets[i]:offsets[i + 1]]."""

    ids: np.ndarray  # (total tokens,) int32
    offsets: np.ndarray  # (n + 1,) int64
    labels: np.ndarray  # (n,) int64
    pad_id: int
    n_truncated: int

    def __len__(self) -> int:
        return len(self.labels)

    @property
    def lengths(self) -> np.ndarray:
        return np.diff(self.offsets)

    def subset(self, index: np.ndarray) -> Split:
        """The examples `index`, in that order."""
        lengths = self.lengths[index]
        offsets = np.concatenate([[0], lengths.cumsum()])
        source = np.repeat(self.offsets[:-1][index] - offsets[:-1], lengths) + np.arange(offsets[-1])
        return Split(self.ids[source], offsets, self.labels[index], self.pad_id, self.n_truncated)


def read_texts(task_dir: Path, split: str) -> tuple[list[str], np.ndarray]:
    """Texts and labels of one split of a prepared task (common/assets.py)."""
    import pyarrow.parquet as parquet

    path = Path(task_dir) / f"{split}.parquet"
    try:
        columns = parquet.read_table(path, columns=["text", "label"])
    except (OSError, ValueError) as error:
        raise UserError(f"{path}: not readable ({str(error).splitlines()[0]}). Run: python 1_prepare_data.py --force") from None
    return columns["text"].to_pylist(), columns["label"].to_numpy().astype(np.int64)


def label_names(task_dir: Path) -> list[str]:
    return read_json(Path(task_dir) / "manifest.json")["label_names"]


def load_tokenizer(directory: Path, config):
    """The tokenizer in a model directory. UserError where there is none, or one that the model has no embeddings for."""
    from transformers import AutoTokenizer

    try:
        tokenizer = AutoTokenizer.from_pretrained(directory)
    except (OSError, ValueError) as error:
        raise UserError(f"{directory}: no tokenizer that can be read ({str(error).splitlines()[0]})") from None
    if len(tokenizer) <= len(set(tokenizer.all_special_ids)):  # transformers makes up an empty one where there is no file
        raise UserError(f"{directory}: no tokenizer in it. Save the model's own there: tokenizer.save_pretrained(...)")
    if len(tokenizer) > config.vocab_size:
        raise UserError(f"{directory}: its tokenizer has {len(tokenizer):,} tokens, its model embeds {config.vocab_size:,}")
    return tokenizer


def tokenize(texts: list[str], labels: np.ndarray, tokenizer, max_length: int) -> Split:
    """Tokenise with special tokens; longer texts are cut at `max_length`, their closing token kept, and counted."""
    ids, lengths, truncated, closing = [], [], 0, (tokenizer.sep_token_id, tokenizer.eos_token_id)
    for start in range(0, len(texts), 10_000):
        batch = tokenizer(texts[start : start + 10_000], truncation=True, max_length=max_length + 1,
                          return_attention_mask=False)["input_ids"]  # fmt: skip
        for row in batch:
            if len(row) > max_length:
                truncated += 1
                row = [*row[: max_length - 1], row[-1]] if row[-1] in closing else row[:max_length]
            ids.extend(row)
            lengths.append(len(row))
    pad = tokenizer.pad_token_id if tokenizer.pad_token_id is not None else tokenizer.eos_token_id
    offsets = np.concatenate([[0], np.cumsum(lengths, dtype=np.int64)])
    return Split(np.asarray(ids, np.int32), offsets, np.asarray(labels, np.int64), int(pad), truncated)


def bucketed(lengths: np.ndarray, batch_size: int, rng: np.random.Generator, pool: int = 50) -> list[np.ndarray]:
    """One epoch of batches of similar lengths: random pools of `pool` batches, each sorted by length, batches shuffled.

    Every example comes once; only the last batch of the epoch's last pool can be short.
    """
    order = rng.permutation(len(lengths))
    batches = []
    for start in range(0, len(order), pool * batch_size):
        part = order[start : start + pool * batch_size]
        part = part[np.argsort(lengths[part], kind="stable")]
        batches += [part[i : i + batch_size] for i in range(0, len(part), batch_size)]
    return [batches[i] for i in rng.permutation(len(batches))]


def epoch_batches(split: Split, batch_size: int, fraction: float, seed: int, epoch: int) -> list[np.ndarray]:
    """The batches of one epoch, which passes over a share `fraction` of the examples.

    The first epoch takes the first share, the next one goes on where it ended, from the end on to the start: no example
    comes again before all have come. A fraction of 0.3 costs what three tenths of the data cost, and four epochs see all.
    """
    n = n_in_epoch(split, fraction)
    share = (epoch * n + np.arange(n)) % len(split)
    rng = np.random.default_rng([seed, epoch])
    return [share[batch] for batch in bucketed(split.lengths[share], batch_size, rng)]


def n_in_epoch(split: Split, fraction: float) -> int:
    return max(1, round(len(split) * fraction))


def n_batches(split: Split, batch_size: int, fraction: float) -> int:
    """How many `epoch_batches` there are."""
    return -(-n_in_epoch(split, fraction) // batch_size)


def in_order(lengths: np.ndarray, batch_size: int) -> list[np.ndarray]:
    """Batches for evaluation: sorted by length, nothing random, nothing dropped."""
    order = np.argsort(lengths, kind="stable")
    return [order[i : i + batch_size] for i in range(0, len(order), batch_size)]


def collate(split: Split, index: np.ndarray) -> dict[str, torch.Tensor]:
    """A batch padded to its longest example: input_ids, attention_mask (B, T), labels (B,), index (B,)."""
    lengths = split.lengths[index]
    columns = np.arange(lengths.max())
    mask = columns < lengths[:, None]  # (B, T)
    source = np.minimum(split.offsets[:-1][index][:, None] + columns, len(split.ids) - 1)
    ids = np.where(mask, split.ids[source], split.pad_id)
    batch = {"input_ids": ids.astype(np.int64), "attention_mask": mask.astype(np.int64), "labels": split.labels[index],
             "index": index}  # fmt: skip
    return {name: torch.from_numpy(np.ascontiguousarray(array)) for name, array in batch.items()}


def inputs_of(batch: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """What a model takes of a batch."""
    return {"input_ids": batch["input_ids"], "attention_mask": batch["attention_mask"]}


def loader(split: Split, batches: list[np.ndarray], device: torch.device):
    """Collated batches on `device`. On CUDA one batch is on its way, from pinned memory, while another is used."""
    if device.type != "cuda":
        for index in batches:
            yield {name: tensor.to(device) for name, tensor in collate(split, index).items()}
        return
    ahead = None
    for index in batches:
        following = {n: t.pin_memory().to(device, non_blocking=True) for n, t in collate(split, index).items()}
        if ahead is not None:
            yield ahead
        ahead = following
    if ahead is not None:
        yield ahead


def padding_share(split: Split, batches: list[np.ndarray]) -> float:
    """Fraction of all tokens in the batches that is padding."""
    lengths = split.lengths
    padded = sum(len(index) * int(lengths[index].max()) for index in batches)
    return 1 - sum(int(lengths[index].sum()) for index in batches) / padded


class ClassificationData(NamedTuple):
    """What a classification script trains on, selects on and is judged on."""

    train: Split
    selection: Split  # held out of the training data: early stopping and every choice look here
    validation: Split  # the official one: scored once, at the end
    label_names: list[str]


def load_classification(task_dir: Path, tokenizer, max_length: int, n_selection: int, selection_fraction: float,
                        seed: int) -> ClassificationData:  # fmt: skip
    """A prepared task, tokenised; the training data in an order that `seed` decides.

    n_selection: examples to hold out, at most a tenth of the training data; `selection_fraction` of them are scored.
    """
    texts, labels = read_texts(task_dir, "train")
    order = np.random.default_rng(seed).permutation(len(texts))
    n_selection = min(n_selection, max(1, len(texts) // 10))
    held_out, rest = order[:n_selection], order[n_selection:]
    held_out = held_out[: max(1, round(n_selection * selection_fraction))]
    train, selection = (tokenize([texts[i] for i in part], labels[part], tokenizer, max_length) for part in (rest, held_out))
    validation = tokenize(*read_texts(task_dir, "validation"), tokenizer, max_length)
    return ClassificationData(train, selection, validation, label_names(task_dir))


def n_positions(config) -> int | None:
    """The longest sequence that a model's position embeddings reach; None where the config names no end."""
    positions = getattr(config, "max_position_embeddings", None)
    if positions and config.model_type in ("roberta", "xlm-roberta"):
        positions -= config.pad_token_id + 1  # RoBERTa counts positions from behind the padding index
    return positions


def check_length(config, max_length: int) -> None:
    """UserError when a model's position embeddings do not reach `max_length`."""
    positions = n_positions(config)
    if not 3 <= max_length <= (positions or max_length):
        raise UserError(f"--max_length {max_length}: this {config.model_type} model has {positions} positions; "
                        f"expected 3 to {positions}")  # fmt: skip
