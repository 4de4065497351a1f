import json

import pandas
import pyarrow
import pytest
from pyarrow import parquet

from common import tables
from common.runs import UserError


def write(path, text):
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(text, encoding="utf-8", newline="")
    return path


def frame(rows):
    return pandas.DataFrame(rows, columns=["text", "label"], dtype=object)


def read(path, text_column=None, label_column=None):
    notes = []
    splits = tables.read_splits(tables.find_splits(path), text_column, label_column, notes)
    return {name: list(zip(split["text"], split["label"], strict=True)) for name, split in splits.items()}, notes


# ----------------------------------------------------------------------------------------------------------------- files


@pytest.mark.parametrize(
    "names, expected",
    [
        (["train.csv"], {"train": 1}),
        (["train.tsv", "dev.tsv", "test.tsv"], {"train": 1, "validation": 1, "test": 1}),
        (["Train.jsonl", "val.csv", "README.md", "train.txt"], {"train": 1, "validation": 1}),
        (["train.csv", "valid.csv"], {"train": 1, "validation": 1}),
        (["train-00000-of-00002.parquet", "train-00001-of-00002.parquet"], {"train": 2}),
    ],
)
def test_a_folder_says_which_file_is_which_split(tmp_path, names, expected):
    for name in names:
        write(tmp_path / name, "x")
    assert {split: len(files) for split, files in tables.find_splits(tmp_path).items()} == expected


@pytest.mark.parametrize(
    "names, message",
    [
        (["dev.tsv", "data.csv"], "no train file .* Found: data.csv, dev.tsv"),
        ([], "Found: nothing"),
        (["train.csv", "train.tsv"], "2 files for train, expected 1"),
        (["train.csv", "dev.csv", "validation.csv"], "2 files for validation, expected 1"),
        (["train-00000-of-00002.parquet"], "1 files for train, expected 2"),
    ],
)
def test_a_folder_that_does_not_say_is_refused(tmp_path, names, message):
    for name in names:
        write(tmp_path / name, "x")
    with pytest.raises(UserError, match=message):
        tables.find_splits(tmp_path)


ROWS = [("a, b", "x"), ('say "hi"', "y"), ("two\nlines", "x"), ("naïve 好", "y"), ("NA", "x")]


def test_csv_has_quotes_and_tsv_has_none(tmp_path):
    lines = ["\ufefftext,label", '"a, b",x', '"say ""hi""",y', '"two\nlines",x', "naïve 好,y", "NA,x", ""]
    assert read(write(tmp_path / "a.csv", "\r\n".join(lines)))[0]["train"] == ROWS
    tsv = write(tmp_path / "a.tsv", 'sentence\tlabel\n"open quote \t0\nnext "one" \t1\nlast" \t0\n')
    assert read(tsv)[0]["train"] == [('"open quote', "0"), ('next "one"', "1"), ('last"', "0")]


def test_jsonl_and_parquet(tmp_path):
    lines = [json.dumps({"id": i, "text": text, "label": label}) for i, (text, label) in enumerate(ROWS)]
    assert read(write(tmp_path / "a.jsonl", "\n".join(lines)))[0]["train"] == ROWS
    columns = {"text": [text for text, _ in ROWS], "label": pyarrow.array([label for _, label in ROWS]).dictionary_encode()}
    parquet.write_table(pyarrow.table(columns), tmp_path / "a.parquet")
    assert read(tmp_path / "a.parquet")[0]["train"] == ROWS
    columns = {"text": [text.encode() for text, _ in ROWS], "label": pyarrow.array([True, False, None, True, False])}
    parquet.write_table(pyarrow.table(columns), tmp_path / "b.parquet")
    assert [label for _, label in read(tmp_path / "b.parquet")[0]["train"]] == ["True", "False", "True", "False"]
    assert read(tmp_path / "b.parquet")[0]["train"][2][0] == "naïve 好"


def test_dates_and_numbers_in_jsonl_stay_text(tmp_path):
    path = write(tmp_path / "a.jsonl", '{"text": "2020-01-01", "label": "01"}\n{"text": "1e5", "label": "1"}\n')
    assert read(path)[0]["train"] == [("2020-01-01", "01"), ("1e5", "1")]


@pytest.mark.parametrize(
    "name, content, message",
    [
        ("a.csv", b"", "the file is empty"),
        ("a.csv", b"text,label\n", "no rows"),
        ("a.csv", b"\n\n", "cannot be read as csv"),
        ("a.csv", b"text,label\na,1\nb,c,2\n", "cannot be read as csv .*line 3"),
        ("a.csv", b"text,label\na,b,1\nc,d,2\n", "more fields than its header"),
        ("a.csv", b'text,label\n"never closed,1\n', "cannot be read as csv"),
        ("a.csv", b"text,label\ncaf\xe9,1\n", "cannot be read as csv .*utf-8"),
        ("a.jsonl", b'{"text": "a", "label": 1}\n{"text": \n', "cannot be read as jsonl"),
        ("a.parquet", b"PAR1 this is no such thing", "cannot be read as parquet"),
        ("a.xlsx", b"x", "expected a file that ends in .csv"),
    ],
)
def test_a_broken_file_is_one_clear_line(tmp_path, name, content, message):
    (tmp_path / name).write_bytes(content)
    with pytest.raises(UserError, match=message) as error:
        tables.read_table(tmp_path / name)
    assert str(tmp_path / name) in str(error.value)
    assert "\n" not in str(error.value)


def test_a_truncated_parquet_file_is_refused(tmp_path):
    parquet.write_table(pyarrow.table({"text": ["a"] * 1000, "label": [0] * 1000}), tmp_path / "whole.parquet")
    whole = (tmp_path / "whole.parquet").read_bytes()
    (tmp_path / "a.parquet").write_bytes(whole[: len(whole) // 2])
    with pytest.raises(UserError, match="cannot be read as parquet"):
        tables.read_table(tmp_path / "a.parquet")


# --------------------------------------------------------------------------------------------------------------- columns


@pytest.mark.parametrize(
    "header, asked, message",
    [
        ("body,label", (None, None), "no column called text or sentence. Name one with --text_column; columns found: body,"),
        ("text,stars", (None, None), "no column called label or labels or class. Name one with --label_column"),
        ("text,sentence,label", (None, None), "more than one column called text or sentence"),
        ("text,label", ("body", None), "no column called body"),
        ("text,label", (None, "Label"), "no column called Label"),
    ],
)
def test_a_missing_or_ambiguous_column_names_the_columns(tmp_path, header, asked, message):
    path = write(tmp_path / "a.csv", f"{header}\n" + ",".join("x" for _ in header.split(",")) + "\n")
    with pytest.raises(UserError, match=message):
        read(path, *asked)


def test_columns_are_guessed_in_train_and_the_same_elsewhere(tmp_path):
    write(tmp_path / "train.csv", "Class, Sentence\n1,good\n0,bad\n")
    write(tmp_path / "dev.csv", "Class,text,Sentence\n1,no,fine\n")
    write(tmp_path / "test.csv", "Sentence,id\nunlabelled,1\n")
    splits, notes = read(tmp_path)
    assert splits == {"train": [("good", "1"), ("bad", "0")], "validation": [("fine", "1")]}
    assert notes == ["test: left out, it has no labels"]
    assert read(tmp_path / "dev.csv", "Sentence", "Class")[0] == {"train": [("fine", "1")]}


def test_rows_without_a_text_or_a_label_are_dropped_and_counted(tmp_path):
    rows = [("good", 1), (None, 1), ("  ", 0), ("bad", None), (" ok ", 0), (float("nan"), None)]
    lines = "\n".join(json.dumps({"text": text, "label": label}) for text, label in rows)
    splits, notes = read(write(tmp_path / "a.jsonl", lines))
    assert splits["train"] == [("good", "1"), ("ok", "0")]  # a null among integers makes floats: 1.0 is still 1
    assert notes == ["train: 3 rows without a text dropped", "train: 1 rows without a label dropped"]


def test_a_csv_row_that_ends_early_is_dropped_and_counted(tmp_path):
    splits, notes = read(write(tmp_path / "a.csv", "text,label\na,1\nb\n"))
    assert splits["train"] == [("a", "1")] and notes == ["train: 1 rows without a label dropped"]


def test_nothing_left_is_an_error(tmp_path):
    with pytest.raises(UserError, match="train: no row has both a text and a label"):
        read(write(tmp_path / "a.csv", "text,label\n,1\na,\n"))


def test_lists_are_no_labels(tmp_path):
    with pytest.raises(UserError, match="one text and one label a row"):
        read(write(tmp_path / "a.jsonl", '{"text": "a", "label": [0, 1]}\n'))


# ---------------------------------------------------------------------------------------------------------------- labels


def numbered(*labels, **others):
    splits = {"train": frame([(f"t{i}", label) for i, label in enumerate(labels)])}
    splits |= {name: frame([(f"{name}{i}", label) for i, label in enumerate(found)]) for name, found in others.items()}
    notes = []
    names, how = tables.number_labels(splits, notes)
    return names, how, notes, list(splits)


@pytest.mark.parametrize(
    "labels, names, how",
    [
        ("101", ["0", "1"], "integer labels 0 to 1, as they are"),
        ("2021", ["0", "1", "2"], "integer labels 0 to 2, as they are"),
        (["5", "1", "2"], ["1", "2", "5"], "integer labels re-indexed: 1 -> 0, 2 -> 1, 5 -> 2"),
        (["10", "9", "-1"], ["-1", "9", "10"], "integer labels re-indexed: -1 -> 0, 9 -> 1, 10 -> 2"),
        (["pos", "neg", "pos"], ["neg", "pos"], "text labels in sorted order: neg -> 0, pos -> 1"),
        (["True", "False"], ["False", "True"], "text labels in sorted order: False -> 0, True -> 1"),
        (["01", "1"], ["01", "1"], "text labels in sorted order: 01 -> 0, 1 -> 1"),
        (["0.5", "1", "0.5"], ["0.5", "1"], "text labels in sorted order: 0.5 -> 0, 1 -> 1"),
    ],
)
def test_labels_are_numbered_in_order(labels, names, how):
    assert numbered(*labels)[:2] == (names, how)


def test_a_single_class_and_a_score_are_refused():
    with pytest.raises(UserError, match="one class only: all 3 training rows are 'x'"):
        numbered("x", "x", "x")
    with pytest.raises(UserError, match=r"40 different labels in 40 rows are not classes. Check --label_column"):
        numbered(*[f"{i / 7:.3f}" for i in range(40)])


def test_other_splits_have_the_labels_of_train():
    with pytest.raises(UserError, match="validation: has labels that train has not: c"):
        numbered("a", "b", validation=["a", "c"])
    with pytest.raises(UserError, match="test: has labels that train has not: c"):
        numbered("a", "b", test=["a", "c"])
    _, _, notes, splits = numbered("0", "1", validation=["0"], test=["-1", "-1"])
    assert splits == ["train", "validation"] and notes == ["test: left out, its labels are hidden (-1)"]


# ---------------------------------------------------------------------------------------------------------------- splits


def test_repeats_are_dropped_and_conflicts_counted():
    rows = frame([("Good.", "1"), ("good", "1"), ("GOOD !", "0"), ("bad", "0"), ("good :)", "1"), ("good :(", "0"), ("!", "0")])
    notes = []
    kept = tables.drop_repeats(rows, notes)
    assert list(kept["text"]) == ["Good.", "bad", "good :)", "good :(", "!"]
    assert notes == ["2 rows that repeat an earlier text dropped, 1 of them with another label"]


def test_groups_that_share_a_text_are_one():
    texts = frame([(text, "0") for text in ("one", "two", "ONE", "three", "two.", "four")])
    groups = pandas.Series(["a", "b", "c", "d", "c", "e"])  # a-c share one, b-c share two; d and e share nothing
    joined = list(tables.join_groups(texts, groups))
    assert joined[0] == joined[1] == joined[2] == joined[4]
    assert len({joined[0], joined[3], joined[5]}) == 3


def test_hold_out_keeps_proportions_and_is_seeded():
    rows = frame([(f"t{i}", "abc"[0 if i < 140 else 1 if i < 196 else 2]) for i in range(210)])  # 140 a, 56 b, 14 c
    first, again, other = (tables.hold_out(rows, seed) for seed in (0, 0, 1))
    assert first["validation"]["label"].value_counts().to_dict() == {"a": 20, "b": 8, "c": 2}  # one in seven
    assert sorted([*first["train"]["text"], *first["validation"]["text"]]) == sorted(rows["text"])
    assert first["validation"].equals(again["validation"])
    assert not first["validation"].equals(other["validation"])


def test_hold_out_keeps_groups_together():
    rows = frame([(f"t{i}", "ab"[i % 2]) for i in range(140)])
    groups = pandas.Series([i // 5 for i in range(140)])
    splits = tables.hold_out(rows, 0, groups)
    sides = [set(groups[split.index]) for split in splits.values()]
    assert not sides[0] & sides[1] and len(sides[0] | sides[1]) == 28
    assert 15 <= len(splits["validation"]) <= 25


def test_few_rows():
    splits = tables.hold_out(frame([("a", "x"), ("b", "y"), ("c", "x")]), 0)
    assert len(splits["train"]) + len(splits["validation"]) == 3 and len(splits["validation"]) >= 1
    with pytest.raises(UserError, match="too few"):
        tables.hold_out(frame([("a", "x"), ("b", "y")]), 0)


def test_what_is_written(tmp_path):
    splits = {"train": frame([("a \ud800".encode("utf-8", "replace").decode(), "no"), ("b", "yes"), ("c", "no")]),
              "validation": frame([("B!", "yes"), ("d", "yes")])}  # fmt: skip
    manifest = tables.write_splits(tmp_path, splits, ["first"])
    assert manifest == {
        "label_names": ["no", "yes"],
        "label_mapping": "text labels in sorted order: no -> 0, yes -> 1",
        "notes": ["first", "validation: no rows of no", "validation: 1 of its 2 texts are also in train"],
        "splits": {"train": {"rows": 3, "label_counts": {"no": 2, "yes": 1}},
                   "validation": {"rows": 2, "label_counts": {"no": 0, "yes": 2}}},
    }  # fmt: skip
    table = parquet.read_table(tmp_path / "train.parquet")
    assert table.schema.types == [pyarrow.string(), pyarrow.int64()]
    assert table.to_pydict() == {"text": ["a ?", "b", "c"], "label": [0, 1, 0]}
    assert parquet.read_table(tmp_path / "validation.parquet")["label"].to_pylist() == [1, 1]
