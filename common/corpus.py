"""Texts from files as documents: read, drop what repeats (never in silence), hold some out, write; WikiText's articles."""

from __future__ import annotations

import itertools
import re
from pathlib import Path
from typing import Any

import numpy as np

from common import fetch, tables
from common.runs import UserError

PLAIN = (".txt", ".raw", ".tokens")
FORMATS = (*PLAIN, *tables.FORMATS)
HELD_OUT = 0.05  # of the documents, for validation and again for test
TITLE = re.compile(r" = (?!= ).* = \n")  # of a WikiText article; sections have two equals signs or more
RUN, RETOLD = 8, 0.5  # a document tells nothing new if half of its runs of eight words came before


def holds_texts(path: Path, text_column: str | None = None) -> bool:
    """Whether a path is text for a language model: plain text, or a table with a column of texts and none of labels."""
    if (path / "manifest.json").is_file():
        return fetch.noted(path, "kind") == "text"
    first = next(iter(find_texts(path).values()))[0]
    if first.suffix.lower() in PLAIN:
        return True
    names = [str(name).strip() for name in tables.read_table(first).columns]
    return bool(tables.fitting(names, "text_column", text_column)) and not tables.fitting(names, "label_column")


def find_texts(path: Path) -> dict[str, list[Path]]:
    """The files of each split, at least one of them: a single file is train, in a folder the names say it."""
    return tables.find_splits(path, FORMATS, ("train", "validation", "test"))


def read_documents(files: dict[str, list[Path]], text_column: str | None, notes: list[str]) -> dict[str, list[str]]:
    """The documents of each split: the rows of a table, or what blank lines set apart in plain text."""
    splits = {}
    for split, paths in files.items():
        found = [document for path in paths for document in _documents(path, text_column)]
        splits[split] = [document for document in found if document]
        if n_empty := len(found) - len(splits[split]):
            notes.append(f"{split}: {n_empty:,} rows without a text dropped")
        if not splits[split]:
            raise UserError(f"{paths[0]}: no documents in it")
    return splits


def _documents(path: Path, text_column: str | None) -> list[str]:
    if path.suffix.lower() in PLAIN:
        return [block.strip("\n") for block in re.split(r"\n\s*\n", _plain(path)) if block.strip()]
    frame = tables.read_table(path)
    frame.columns = names = [str(name).strip() for name in frame.columns]
    return frame[tables.the_column(names, "text_column", text_column, path)].map(tables.as_text).tolist()


def _plain(path: Path) -> str:
    try:
        return path.read_text(encoding="utf-8-sig")
    except UnicodeDecodeError as error:
        raise UserError(f"{path}: is not UTF-8 ({error.reason} at byte {error.start:,})") from None


def read_texts(text_dir: Path, split: str) -> list[str]:
    """The documents of one split of a prepared text."""
    import pyarrow.parquet as parquet

    return parquet.read_table(text_dir / f"{split}.parquet", columns=["text"])["text"].to_pylist()


def wikitext_lines(paths: list[Path]) -> list[str]:
    """WikiText's lines as the Hugging Face dataset has them: "" where there is nothing, else with their "\\n"."""
    lines = []
    for path in paths:
        rows = [_plain(path)] if path.suffix.lower() in PLAIN else tables.read_table(path)["text"]
        lines += [line for row in rows for line in row.removesuffix("\n").split("\n")]
    return [f"{line}\n" if line.strip() else "" for line in lines]


def join_articles(lines: list[str]) -> list[str]:
    """The articles of WikiText, blank lines kept: each begins at a line ` = Title = ` that stands alone."""
    around = ["", *lines, ""]
    starts = [i for i, line in enumerate(lines) if TITLE.fullmatch(line) and not around[i] and not around[i + 2]]
    bounds = [0, *starts[1:], len(lines)] if starts else [0, len(lines)]
    return ["".join(line or "\n" for line in lines[start:end]) for start, end in itertools.pairwise(bounds)]


def split_lines(articles: list[str]) -> list[str]:
    """The lines that `join_articles` joined."""
    lines = [line for article in articles for line in article.removesuffix("\n").split("\n")]
    return [f"{line}\n" if line else "" for line in lines]


def drop_repeats(documents: list[str], notes: list[str]) -> list[str]:
    """The documents that have not come before."""
    first: dict[str, str] = {}
    for document in documents:
        first.setdefault(tables.text_key(document), document)
    if repeated := len(documents) - len(first):
        notes.append(f"{repeated:,} documents that repeat an earlier one dropped")
    return [*first.values()]


def first_tellings(documents: list[str]) -> list[int]:
    """The documents to keep: those of which less than half, by runs of eight words, is in documents before."""
    kept, seen = [], set()
    for i, document in enumerate(documents):
        words = tables.text_key(document).split()
        runs = {hash(tuple(words[j : j + RUN])) for j in range(max(1, len(words) - RUN + 1))}
        if len(runs & seen) < RETOLD * len(runs):
            kept.append(i)
        seen |= runs
    return kept


def hold_out(documents: list[str], seed: int, names: tuple[str, ...] = ("validation", "test")) -> dict[str, list[str]]:
    """Train and, for each of `names`, one document in twenty (at least one), drawn with `seed`; the order is kept."""
    n = max(1, round(HELD_OUT * len(documents)))
    if len(documents) <= n * len(names):
        raise UserError(f"{len(documents)} documents are too few to hold some out. In plain text a blank line ends a document")
    order = np.random.default_rng(seed).permutation(len(documents))
    held_out = {name: order[i * n : (i + 1) * n] for i, name in enumerate(names)}
    parts = {"train": order[n * len(names) :]} | held_out
    return {name: [documents[i] for i in sorted(part)] for name, part in parts.items()}


def write_texts(folder: Path, splits: dict[str, list[str]], notes: list[str], unit: str = "document") -> dict[str, Any]:
    """Write `<split>.parquet`, column `text`, a document a row. What to record: counts, hashes, and the form of the text.

    unit: what a "\\n\\n" stands between in the token stream with blank joiners, "document" or "line"."""
    import pyarrow
    from pyarrow import parquet

    entries, seen = {}, {tables.text_key(text) for text in splits.get("train", [])}
    for split, texts in splits.items():
        file = folder / f"{split}.parquet"
        parquet.write_table(pyarrow.table({"text": pyarrow.array(texts, pyarrow.string())}), file)
        entries[split] = {"rows": len(texts), "characters": sum(map(len, texts)), "sha256": fetch.sha256_of(file)}
        if split != "train" and (leaked := sum(tables.text_key(text) in seen for text in texts)):
            notes.append(f"{split}: {leaked:,} of its {len(texts):,} documents are also in train")
    tokenised = any("<unk>" in text for texts in splits.values() for text in texts)
    notes += ["tokenised form with <unk>: perplexities do not compare with those on the raw form"] if tokenised else []
    return {"kind": "text", "form": "tokenised" if tokenised else "raw", "unit": unit, "notes": notes, "splits": entries,
            "sha256": fetch.digest(entries)}  # fmt: skip
