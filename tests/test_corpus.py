import itertools

import pandas
import pyarrow.parquet as parquet
import pytest

from common import corpus, tables
from common.runs import UserError

WIKI = ["", " = One = \n", "", " text of one \n", "", " = = Part = = \n", "", " = 1 kg = \n", " more \n", "", "",
        " = Two , a = b = \n", "", " text of two \n", ""]  # fmt: skip
TITLE = " = A = \n"


def test_articles_begin_at_titles_that_stand_alone():
    articles = corpus.join_articles(WIKI)
    assert articles == ["\n = One = \n\n text of one \n\n = = Part = = \n\n = 1 kg = \n more \n\n\n",
                        " = Two , a = b = \n\n text of two \n\n"]  # fmt: skip
    assert corpus.split_lines(articles) == WIKI


@pytest.mark.parametrize("lines", [[""], ["", ""], [" x \n"], [TITLE], ["", "", TITLE, ""], [" x \n", "", TITLE]])
def test_lines_are_had_again(lines):
    assert corpus.split_lines(corpus.join_articles(lines)) == lines


def test_lines_of_text_and_of_parquet_are_the_same(tmp_path):
    (tmp_path / "wiki.test.raw").write_text(" \n = One = \n \n a\u2028b\x85c \n", encoding="utf-8")
    lines = corpus.wikitext_lines([tmp_path / "wiki.test.raw"])
    assert lines == ["", " = One = \n", "", " a\u2028b\x85c \n"]  # no line ends but at a line feed
    pandas.DataFrame({"text": lines}).to_parquet(tmp_path / "test.parquet")
    assert corpus.wikitext_lines([tmp_path / "test.parquet"]) == lines


@pytest.mark.parametrize(
    "name, text, expected",
    [
        ("a.txt", "plain", True),
        ("a.csv", "text\na\n", True),
        ("a.csv", "text,label\na,1\n", False),
        ("a.csv", "text,Class\na,1\n", False),
        ("a.csv", "body,other\na,1\n", False),
        ("a.jsonl", '{"sentence": "a", "id": 1}\n', True),
        ("folder/valid.txt", "plain", True),
        ("folder/wiki.test.tokens", "plain", True),
        ("folder/train.tsv", "text\tlabel\na\t1\n", False),
        ("folder/manifest.json", '{"kind": "text"}', True),
        ("folder/manifest.json", '{"splits": {}}', False),
        ("folder/manifest.json", "[", False),
    ],
)
def test_what_is_text_and_what_has_labels(tmp_path, name, text, expected):
    file = tmp_path / name
    file.parent.mkdir(exist_ok=True)
    file.write_text(text, encoding="utf-8")
    assert corpus.holds_texts(file.parent if "/" in name else file) is expected


def test_a_column_that_is_named_is_text(tmp_path):
    (tmp_path / "a.csv").write_text("body,other\na,1\n", encoding="utf-8")
    assert corpus.holds_texts(tmp_path / "a.csv", "body")


def test_documents_of_every_kind_of_file(tmp_path):
    (tmp_path / "a.txt").write_bytes("\ufeffone\r\nstill one\r\n \r\n\r\n  two\n\n\n\n".encode())
    (tmp_path / "a.csv").write_text('text,id\n"one\n\nstill one",1\n ,2\ntwo,3\n', encoding="utf-8")
    (tmp_path / "a.jsonl").write_text('{"body": "one"}\n{"body": null}\n{"body": " two "}\n', encoding="utf-8")
    found, notes = {}, []
    for name, column in (("a.txt", None), ("a.csv", None), ("a.jsonl", "body")):
        found[name] = corpus.read_documents({"train": [tmp_path / name]}, column, notes)["train"]
    assert found == {"a.txt": ["one\nstill one", "  two"], "a.csv": ["one\n\nstill one", "two"], "a.jsonl": ["one", "two"]}
    assert notes == ["train: 1 rows without a text dropped"] * 2


def test_repeats_are_dropped_and_counted():
    notes = []
    assert corpus.drop_repeats(["A b.", "c", "a  B", "d", "C!"], notes) == ["A b.", "c", "d"]
    assert notes == ["2 documents that repeat an earlier one dropped"]


def test_what_was_told_before_is_dropped():
    words = [f"w{i}" for i in range(40)]
    story = " ".join(words)
    half = " ".join([*words[:30], *(f"x{i}" for i in range(10))])  # 23 of 33 runs are known
    third = " ".join([*words[:20], *(f"y{i}" for i in range(20))])  # 13 of 33
    assert corpus.first_tellings([story, story.upper() + ".", half, third, "short", "Short!", "short too"]) == [0, 3, 4, 6]


def test_documents_held_out():
    documents = [f"document {i}" for i in range(100)]
    splits = corpus.hold_out(documents, 0)
    assert [(name, len(part)) for name, part in splits.items()] == [("train", 90), ("validation", 5), ("test", 5)]
    assert sorted(itertools.chain(*splits.values())) == sorted(documents)
    assert all(part == sorted(part, key=documents.index) for part in splits.values())
    assert corpus.hold_out(documents, 0) == splits and corpus.hold_out(documents, 1) != splits
    assert {name: len(part) for name, part in corpus.hold_out(documents[:30], 0, ("validation",)).items()} == {
        "train": 28, "validation": 2}  # fmt: skip
    assert [len(part) for part in corpus.hold_out(documents[:3], 0).values()] == [1, 1, 1]


def test_what_is_written(tmp_path):
    notes = ["before"]
    splits = {"train": ["a <unk> b", "c\n\nd "], "test": ["C D", "e", "A <unk>  b!"]}
    record = corpus.write_texts(tmp_path, splits, notes, "line")
    assert parquet.read_table(tmp_path / "train.parquet").to_pydict() == {"text": splits["train"]}
    assert corpus.read_texts(tmp_path, "test") == splits["test"]
    assert (record["kind"], record["form"], record["unit"]) == ("text", "tokenised", "line")
    assert [(found["rows"], found["characters"]) for found in record["splits"].values()] == [(2, 14), (3, 15)]
    assert record["notes"][:2] == ["before", "test: 2 of its 3 documents are also in train"]
    assert "tokenised form with <unk>" in record["notes"][2]
    assert corpus.write_texts(tmp_path, {"test": ["e"]}, [])["form"] == "raw"


@pytest.mark.parametrize(
    "name, content, message",
    [
        ("a.txt", b" \n\n ", "a.txt: no documents in it"),
        ("a.csv", b"text,n\n ,1\n", "a.csv: no documents in it"),
        ("a.txt", b"caf\xe9", "a.txt: is not UTF-8"),
        ("a.csv", b"body\nx\n", "no column called text or sentence. Name one with --text_column"),
        ("a.csv", b"text,sentence\nx,y\n", "more than one column called text or sentence"),
        ("a.doc", b"x", "a.doc: expected a file that ends in"),
    ],
)
def test_files_that_cannot_be_used(tmp_path, name, content, message):
    (tmp_path / name).write_bytes(content)
    with pytest.raises(UserError, match=message):
        corpus.read_documents({"train": [tmp_path / name]}, None, [])


def test_a_folder_without_texts_and_too_few_documents(tmp_path):
    (tmp_path / "notes.txt").write_text("x", encoding="utf-8")
    with pytest.raises(UserError, match=r"no train or validation or test file \(.txt, .*Found: notes.txt"):
        corpus.find_texts(tmp_path)
    for n, names in ((2, ("validation", "test")), (1, ("validation",))):
        with pytest.raises(UserError, match=f"{n} documents are too few to hold some out"):
            corpus.hold_out(["x"] * n, 0, names)


def test_a_task_still_needs_its_training_rows(tmp_path):
    (tmp_path / "test.csv").write_text("text,label\na,1\n", encoding="utf-8")
    with pytest.raises(UserError, match=r"no train file \(.csv, .tsv, .jsonl, .parquet\)"):
        tables.find_splits(tmp_path)
