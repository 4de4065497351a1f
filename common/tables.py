"""Labelled texts from files: read, drop what cannot be used (never in silence), split, number the labels, write."""

from __future__ import annotations

import csv
import re
import unicodedata
import warnings
from collections import defaultdict
from pathlib import Path
from typing import Any

import pandas

from common.runs import UserError

FORMATS = (".csv", ".tsv", ".jsonl", ".parquet")
SPLITS = {"train": "train", "validation": "validation", "valid": "validation", "val": "validation", "dev": "validation",
          "test": "test"}  # fmt: skip
COLUMNS = {"text_column": ("text", "sentence"), "label_column": ("label", "labels", "class")}
FOLDS = 7  # data without a validation split: one row in seven is held out


def find_splits(path: Path, formats: tuple[str, ...] = FORMATS, needed: tuple[str, ...] = ("train",)) -> dict[str, list[Path]]:
    """The files of each split, train first. A single file is `train`; in a folder the names say it: train.csv, dev.tsv,
    test-00000-of-00002.parquet, wiki.test.raw. UserError where there is none of the `needed` splits."""
    if path.is_file():
        return {"train": [path]}
    if not path.is_dir():
        raise UserError(f"{path}: no such file or folder")
    found, shards = defaultdict(list), {}
    for file in sorted(path.iterdir()):
        name = re.fullmatch(rf"(?:wiki\.)?({'|'.join(SPLITS)})(?:-\d+-of-0*(\d+))?", file.stem.lower())
        if name and file.suffix.lower() in formats:
            split = SPLITS[name[1]]
            found[split].append(file)
            shards[split] = int(name[2] or 1)
    if not found.keys() & set(needed):
        there = ", ".join(sorted(file.name for file in path.iterdir())[:8]) or "nothing"
        raise UserError(f"{path}: no {' or '.join(needed)} file ({', '.join(formats)}). Found: {there}")
    for split, files in found.items():
        if len(files) != shards[split]:
            names = ", ".join(file.name for file in files)
            raise UserError(f"{path}: {len(files)} files for {split}, expected {shards[split]} ({names})")
    return {split: found[split] for split in ("train", "validation", "test") if split in found}


def read_table(path: Path) -> pandas.DataFrame:
    """A CSV, TSV, JSONL or Parquet file. In CSV and TSV every field is text, and a quote in a TSV file is a character like
    any other (GLUE's files are written so)."""
    kind, text = path.suffix.lower(), {"dtype": str, "keep_default_na": False, "encoding": "utf-8-sig"}
    try:
        if path.stat().st_size == 0:
            raise UserError(f"{path}: the file is empty")
        if kind == ".csv":
            frame = pandas.read_csv(path, **text)
        elif kind == ".tsv":
            frame = pandas.read_csv(path, sep="\t", quoting=csv.QUOTE_NONE, **text)
        elif kind == ".jsonl":
            frame = pandas.read_json(path, lines=True, dtype=False, encoding="utf-8-sig")
        elif kind == ".parquet":
            frame = pandas.read_parquet(path)
        else:
            raise UserError(f"{path}: expected a file that ends in {', '.join(FORMATS)}")
    except (ValueError, OSError) as error:
        raise UserError(f"{path}: cannot be read as {kind[1:]} ({str(error).splitlines()[0]})") from None
    if kind in (".csv", ".tsv") and not isinstance(frame.index, pandas.RangeIndex):
        raise UserError(f"{path}: its rows have more fields than its header ({', '.join(frame.columns)})")
    if frame.empty:
        raise UserError(f"{path}: no rows")
    return frame


def read_splits(files: dict[str, list[Path]], text_column: str | None, label_column: str | None,
                notes: list[str]) -> dict[str, pandas.DataFrame]:  # fmt: skip
    """The splits as frames of `text` and `label` (stripped strings); what was dropped is counted in `notes`.

    The columns are the ones asked for, else the only ones of train that have a usual name. A test split without labels is
    left out."""
    splits, wanted = {}, {"text_column": text_column, "label_column": label_column}
    for split, paths in files.items():
        frame = pandas.concat([read_table(path) for path in paths], ignore_index=True)
        frame.columns = names = [str(name).strip() for name in frame.columns]
        for flag in COLUMNS:
            if split == "test" and flag == "label_column" and not fitting(names, flag, wanted[flag]):
                notes.append("test: left out, it has no labels")
                break
            wanted[flag] = the_column(names, flag, wanted[flag], paths[0])
        else:
            splits[split] = _tidy(frame[wanted["text_column"]], frame[wanted["label_column"]], split, notes)
    return splits


def fitting(names: list[str], flag: str, wanted: str | None = None) -> list[str]:
    """The columns called `wanted`, else the ones with a usual name."""
    return [name for name in names if (name == wanted if wanted else name.lower() in COLUMNS[flag])]


def the_column(names: list[str], flag: str, wanted: str | None, path: Path) -> str:
    """The only one that fits. UserError where there is none, or more."""
    fit = fitting(names, flag, wanted)
    if len(fit) != 1:
        what = f"{'more than one' if fit else 'no'} column called {wanted or ' or '.join(COLUMNS[flag])}"
        raise UserError(f"{path}: {what}. Name one with --{flag}; columns found: {', '.join(names)}")
    return fit[0]


def _tidy(texts: pandas.Series, labels: pandas.Series, split: str, notes: list[str]) -> pandas.DataFrame:
    frame = pandas.DataFrame({"text": texts.map(as_text), "label": labels.map(as_text)}).astype(object)
    for column in ("text", "label"):
        lacking = frame[column] == ""
        if lacking.any():
            notes.append(f"{split}: {lacking.sum():,} rows without a {column} dropped")
        frame = frame[~lacking]
    if frame.empty:
        raise UserError(f"{split}: no row has both a text and a label")
    return frame.reset_index(drop=True)


def as_text(value: Any) -> str:
    if not pandas.api.types.is_scalar(value):
        raise UserError(f"expected one text and one label a row, found {value!r:.60}")
    if pandas.isna(value):
        return ""
    if isinstance(value, bytes):
        value = value.decode("utf-8", "replace")
    if isinstance(value, float) and value.is_integer():
        value = int(value)
    return str(value).strip().encode("utf-8", "replace").decode()  # a lone surrogate cannot be stored


def text_key(text: str) -> str:
    """What two texts share that are the same but for case, spacing and a closing mark."""
    key = " ".join(unicodedata.normalize("NFKC", text).casefold().split())
    return key.rstrip(".!? ") or key


def drop_repeats(frame: pandas.DataFrame, notes: list[str]) -> pandas.DataFrame:
    """The rows whose text has not come before."""
    keys = frame["text"].map(text_key)
    repeated = keys.duplicated()
    if repeated.any():
        n_other = (frame["label"] != frame["label"].groupby(keys).transform("first")).sum()
        notes.append(f"{repeated.sum():,} rows that repeat an earlier text dropped, {n_other:,} of them with another label")
    return frame[~repeated].reset_index(drop=True)


def join_groups(frame: pandas.DataFrame, groups: pandas.Series) -> pandas.Series:
    """For each row the number of its group, where groups that have a text in common count as one."""
    from scipy.sparse import coo_array
    from scipy.sparse.csgraph import connected_components

    group, text = pandas.factorize(groups)[0], pandas.factorize(frame["text"].map(text_key))[0]
    n = len(frame)  # nodes 0..n-1 are groups, n..2n-1 are texts
    linked = coo_array(([True] * n, (group, n + text)), shape=(2 * n, 2 * n))
    return pandas.Series(connected_components(linked, directed=False)[1][group], index=frame.index)


def hold_out(frame: pandas.DataFrame, seed: int, groups: pandas.Series | None = None) -> dict[str, pandas.DataFrame]:
    """Train and validation with the classes in the same proportions, each group wholly on one side; one row in FOLDS is held
    out, or more where no class has as many rows."""
    from sklearn.model_selection import StratifiedGroupKFold, StratifiedKFold

    largest = frame["label"].value_counts().max()
    if largest < 2:
        raise UserError(f"{len(frame)} rows of as many classes are too few to hold some out for validation")
    fold = StratifiedKFold if groups is None else StratifiedGroupKFold
    with warnings.catch_warnings(action="ignore", category=UserWarning):  # of classes with fewer rows than folds
        folds = fold(min(FOLDS, largest), shuffle=True, random_state=seed)
        train, validation = next(folds.split(frame, frame["label"], groups))
    return {"train": frame.iloc[train], "validation": frame.iloc[validation]}


def write_splits(folder: Path, splits: dict[str, pandas.DataFrame], notes: list[str],
                 shown: list[str] | None = None) -> dict[str, Any]:  # fmt: skip
    """Write `<split>.parquet` with `text` and `label` (0..n-1); return label names, their mapping, notes and counts.
    `shown` renames the labels, in the order of their numbers."""
    import pyarrow
    from pyarrow import parquet

    names, mapping = number_labels(splits, notes)
    shown, entries = shown or names, {}
    seen = set(splits["train"]["text"].map(text_key))
    for split, frame in splits.items():
        labels = frame["label"].map({name: i for i, name in enumerate(names)})
        table = {"text": pyarrow.array(frame["text"], pyarrow.string()), "label": pyarrow.array(labels, pyarrow.int64())}
        parquet.write_table(pyarrow.table(table), folder / f"{split}.parquet")
        counts = {name: int((labels == i).sum()) for i, name in enumerate(shown)}
        entries[split] = {"rows": len(frame), "label_counts": counts}
        if lacking := [name for name, count in counts.items() if not count]:
            notes.append(f"{split}: no rows of {', '.join(lacking[:5])}")
        if split != "train" and (leaked := frame["text"].map(text_key).isin(seen).sum()):
            notes.append(f"{split}: {leaked:,} of its {len(frame):,} texts are also in train")
    return {"label_names": shown, "label_mapping": mapping, "notes": notes, "splits": entries}


def number_labels(splits: dict[str, pandas.DataFrame], notes: list[str]) -> tuple[list[str], str]:
    """The labels of train in the order of their numbers, and a sentence on how they were numbered: integers in numeric
    order, anything else in the order of the text.

    Another split may hold no further labels, but a `test` split of which none is known (they are hidden) is removed."""
    known = set(splits["train"]["label"])
    integers = all(re.fullmatch(r"0|-?[1-9]\d*", label) for label in known)
    names, rows = sorted(known, key=int if integers else str), len(splits["train"])
    if len(names) < 2:
        raise UserError(f"one class only: all {rows:,} training rows are {names[0]!r}, expected at least two classes")
    if len(names) > max(20, rows // 2):
        raise UserError(f"{len(names):,} different labels in {rows:,} rows are not classes. Check --label_column")
    for split in list(splits):
        found = set(splits[split]["label"])
        if split == "test" and not found & known:
            notes.append(f"test: left out, its labels are hidden ({min(found)})")
            del splits[split]
        elif found - known:
            raise UserError(f"{split}: has labels that train has not: {', '.join(sorted(found - known)[:5])}")
    if names == [str(i) for i in range(len(names))]:
        return names, f"integer labels 0 to {len(names) - 1}, as they are"
    shown = [f"{name} -> {i}" for i, name in enumerate(names)]
    shown = shown if len(shown) <= 12 else [*shown[:11], "...", shown[-1]]
    return names, ("integer labels re-indexed: " if integers else "text labels in sorted order: ") + ", ".join(shown)
