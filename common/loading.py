"""Documents of any length in batches: ids mapped from the disk, buckets of like lengths, padding by processes that stay.

The order of an epoch is a function of seed and epoch, so a run goes on at any batch without reading those before it.
"""

from __future__ import annotations

import copy
import signal
import time
from contextlib import contextmanager
from pathlib import Path

import numpy as np
import torch
from torch.utils.data import DataLoader, Dataset

from common import assets, data, fetch, text
from common.runs import UserError

AHEAD = 4  # batches that each worker process holds ready
N_SELECTION = 2000


class Documents(Dataset):
    """One split of a prepared text (common/text.py) by document: tokens, closed by the end-of-sequence id, cut at max_length.

    Tokenised once, when it is first asked for; ids stay on the disk. Worker processes get the path, and map the file too.
    lengths: (n,) int64, after the cut. n_cut, cut_tokens: how many documents were cut, and by how many tokens in all.
    """

    def __init__(self, text_dir: Path, split: str, tokenizer, max_length: int):
        self.path = Path(text.token_stream(text_dir, split, tokenizer).filename)
        offsets = np.load(self.path.with_name(f"{split}.offsets.npy"))
        whole = np.diff(offsets)
        if offsets[-1] != len(self.ids):
            raise UserError(f"{self.path.parent}: holds the documents of another stream. Remove it and run again")
        self.starts, self.lengths, self.pad_id = offsets[:-1], np.minimum(whole, max_length), tokenizer.eos_token_id
        self.n_cut, self.cut_tokens = int((whole > max_length).sum()), int((whole - self.lengths).sum())

    @property
    def ids(self) -> np.ndarray:
        if self.__dict__.get("_ids") is None:
            self._ids = np.load(self.path, mmap_mode="r")
        return self._ids

    def __getstate__(self) -> dict:
        return self.__dict__ | {"_ids": None}

    def __len__(self) -> int:
        return len(self.lengths)

    def subset(self, index: np.ndarray) -> Documents:
        """The documents `index`, in that order; what was cut is counted of the whole split."""
        part = copy.copy(self)
        part.starts, part.lengths = self.starts[index], self.lengths[index]
        return part

    def tokens(self, i: int) -> np.ndarray:
        """The ids of one document, (length,) int32."""
        return np.asarray(self.ids[self.starts[i] : self.starts[i] + self.lengths[i]])

    def batch(self, index: np.ndarray, length: int | None = None) -> dict[str, np.ndarray]:
        """ids (B, T), padded at the end, and lengths (B,), int64. T: `length`, else that of the longest."""
        lengths = self.lengths[index]
        ids = np.full((len(index), length or lengths.max()), self.pad_id, np.int64)
        for row, i in zip(ids, index, strict=True):
            row[: self.lengths[i]] = self.tokens(i)
        return {"ids": ids, "lengths": lengths}


def prepare(name: str, data_dir: Path, text_column: str | None = None) -> assets.Asset:
    """A prepared text (common/text.py): "news", the texts of the "reviews" without their labels, or those of a path."""
    if name != "news" and name != "reviews" and not Path(name).expanduser().exists():
        raise UserError(f"--data {name}: not reviews or news, and no such file or folder")
    if name in ("news", "reviews") and text_column:
        raise UserError(f"--data {name}: --text_column is for a path")
    path = str(assets.prepare_task(name, data_dir).path) if name == "reviews" else name
    return text.prepare_text(path, data_dir, text_column=text_column)


def splits(text_dir: Path, tokenizer, max_length: int, seed: int, n_judged: int = 0) -> tuple[Documents, ...]:
    """Documents to train on; to select by (a tenth of the training split, N_SELECTION at most, drawn with `seed`); to judge in
    the end (the test split, else the validation split; n_judged of it, or 0: all)."""
    splits = fetch.verify_text(text_dir)["splits"]
    whole = Documents(text_dir, "train", tokenizer, max_length)
    if len(whole) < 2:
        raise UserError(f"{text_dir}: {len(whole)} text to train on, expected two at least: one is held out for selection")
    order = np.random.default_rng(seed).permutation(len(whole))
    n = min(N_SELECTION, max(1, len(whole) // 10))
    judged = Documents(text_dir, "test" if "test" in splits else "validation", tokenizer, max_length)
    index = np.random.default_rng(seed).permutation(len(judged))
    return whole.subset(order[n:]), whole.subset(order[:n]), judged.subset(index[: n_judged or None])


def epoch_order(lengths: np.ndarray, batch_size: int, seed: int, epoch: int, by_length: bool = True) -> list[np.ndarray]:
    """The batches of one epoch; every document comes once. by_length: batches are of like lengths (data.bucketed)."""
    rng = np.random.default_rng([seed, epoch])
    return data.bucketed(lengths if by_length else np.zeros_like(lengths), batch_size, rng)


def within(lengths: np.ndarray, n_tokens: int, padded: int | None = None) -> list[np.ndarray]:
    """Batches for evaluation, sorted by length: as many documents as fit in `n_tokens` with their padding, at least one.

    padded: what every batch is padded to; None: to its longest."""
    batches, order = [], np.argsort(lengths, kind="stable")
    lengths = lengths if padded is None else np.full_like(lengths, padded)
    while len(order):
        some = lengths[order[:n_tokens]]
        n = max(1, int((some * np.arange(1, len(some) + 1) <= n_tokens).sum()))
        batches.append(order[:n])
        order = order[n:]
    return batches


def padding_share(lengths: np.ndarray, batch_size: int, padded: int | None = None) -> float:
    """Fraction of all tokens in the batches of an epoch that is padding, where they are padded to `padded`, or sorted by length
    and padded to their longest (None)."""
    batches = epoch_order(lengths, batch_size, 0, 0)
    return 1 - lengths.sum() / sum(len(index) * int(padded or lengths[index].max()) for index in batches)


def on(device: torch.device | str, batch: dict[str, np.ndarray], pin: bool = False) -> dict[str, torch.Tensor]:
    """The batch as tensors on a device; pin: through pinned memory, without waiting for it."""
    tensors = {name: torch.from_numpy(array) for name, array in batch.items()}
    return {name: (tensor.pin_memory() if pin else tensor).to(device, non_blocking=pin) for name, tensor in tensors.items()}


class _Padded(Dataset):
    """What a worker process does: an index is a batch."""

    def __init__(self, documents: Documents, length: int | None):
        self.documents, self.length = documents, length

    def __getitem__(self, index: np.ndarray) -> dict[str, np.ndarray]:
        return self.documents.batch(index, self.length)


def _as_it_is(batch: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
    """Arrays go through a pipe, which for batches as small as these is faster than tensors in shared memory."""
    return batch


def _deaf(worker: int) -> None:
    """A process that loads hears no Ctrl+C: the one that trains does, and still needs batches to end its step."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)


class _Order:
    """A sampler whose batches are set anew for each epoch, while the worker processes stay."""

    def __init__(self):
        self.batches: list[np.ndarray] = []

    def __iter__(self):
        return iter(self.batches)

    def __len__(self) -> int:
        return len(self.batches)


class Loader:
    """Batches of documents on a device, in the order that a call gives; padded ahead by `n_workers` processes that stay.

    length: pad every batch to it; None: to its longest. pin: through pinned memory (on CUDA; elsewhere there is nothing to pin
    for). timings["waiting for data"] counts the seconds in which a batch was asked for and not there yet. Nothing of it draws
    from torch's global random numbers.
    """

    def __init__(self, documents: Documents, device: torch.device | str, n_workers: int, pin: bool, length: int | None,
                 timings: dict[str, float]):  # fmt: skip
        self.device, self.timings, self.order = torch.device(device), timings, _Order()
        self.pin = pin and self.device.type == "cuda"
        several = {"persistent_workers": True, "prefetch_factor": AHEAD} if n_workers else {}
        self.loader = DataLoader(_Padded(documents, length), batch_size=None, sampler=self.order, num_workers=n_workers,
                                 collate_fn=_as_it_is, worker_init_fn=_deaf, generator=torch.Generator(), **several)

    def __call__(self, batches: list[np.ndarray]):
        start = time.perf_counter()
        self.order.batches = batches
        ahead = iter(self.loader)
        for _ in batches:
            batch = on(self.device, next(ahead), self.pin)
            self.timings["waiting for data"] = self.timings.get("waiting for data", 0.0) + time.perf_counter() - start
            yield batch
            start = time.perf_counter()


@contextmanager
def deaths_told():
    """Inside, a worker process that dies (killed, out of memory) is a UserError with the way out. It can be told at any moment,
    also in the middle of a step: what goes on does so from a checkpoint."""
    try:
        yield
    except RuntimeError as error:
        if "DataLoader worker" not in str(error):
            raise
        raise UserError(f"a process that loads data died ({str(error).splitlines()[0]}). The last checkpoint is intact: the "
                        "same command goes on, with --num_workers 0 without such processes") from None  # fmt: skip
