import hashlib
import json
import os
import re
import runpy
import subprocess
import sys
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from threading import Thread

import pandas
import pytest
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from tokenizers.pre_tokenizers import Whitespace
from transformers import PreTrainedTokenizerFast

from common.runs import REPOSITORY, UserError

SCRIPT = REPOSITORY / "1_prepare_data.py"


@pytest.fixture(scope="module")
def main():
    return runpy.run_path(str(SCRIPT))["main"]


@pytest.fixture
def stars(tmp_path):
    rows = [f"film {i} is of a kind,{1 + i % 5}" for i in range(70)]
    (tmp_path / "stars.csv").write_text("\n".join(["body,stars", *rows]), encoding="utf-8")
    columns = ["--text_column", "body", "--label_column", "stars"]
    return ["--task", tmp_path / "stars.csv", *columns, "--data_dir", tmp_path / "data"]


def line(text, start):
    return next(found for found in text.splitlines() if found.startswith(start)).split()


def test_a_file_of_five_classes_without_a_model(main, stars, tmp_path, capsys):
    main([*stars, "--model", "none"])
    out = capsys.readouterr().out
    assert "integer labels re-indexed: 1 -> 0, 2 -> 1, 3 -> 2, 4 -> 3, 5 -> 4" in out
    name = next((tmp_path / "data").glob("stars-*")).name
    assert re.search(rf"{name} +train +60 +1 20.0%, 2 20.0%, 3 20.0%, 2 more +local +0.0 MB +yours", out)
    assert re.search(rf"{name} +validation +10 ", out)
    assert f"in {tmp_path / 'data'}" in out and "tokens" not in out
    main([*stars, "--model", "none"])
    assert line(capsys.readouterr().out, "task")[2] == "ready"
    main([*stars, "--model", "none", "--force"])
    assert "made again: asked for anew" in capsys.readouterr().out


def test_token_lengths_with_the_model(main, wheel_data_dir, tmp_path, capsys):
    model = str(wheel_data_dir / "models" / "minilm-l6-h384")
    folder = tmp_path / "mine"
    folder.mkdir()
    texts = ["a", "a " * 8, "a " * 18, "a " * 598]  # with [CLS] and [SEP]: 3, 10, 20 and 600 tokens
    for split in ("train", "dev"):
        lines = [json.dumps({"text": text, "label": i % 2}) for i, text in enumerate(texts)]
        (folder / f"{split}.jsonl").write_text("\n".join(lines), encoding="utf-8")
    main(["--task", folder, "--model", model, "--data_dir", tmp_path / "data", "--max-length", "20"])
    out = capsys.readouterr().out
    assert line(out, "tokens")[1:] == ["median", "p95", "max", "over", "20"]
    assert line(out, "train") == ["train", "15", "513", "600", "25.00%"]
    assert "validation: 4 of its 4 texts are also in train" in out
    with pytest.raises(UserError, match="--max_length 513: minilm-l6-h384 has 512 positions"):
        main(["--task", folder, "--model", model, "--data_dir", tmp_path / "data", "--max_length", "513"])


def test_verify_says_what_is_damaged_and_changes_nothing(main, stars, tmp_path, capsys):
    with pytest.raises(UserError, match="nothing to verify"):
        main(["--data_dir", tmp_path / "data", "--verify"])
    main([*stars, "--model", "none"])
    main(["--data_dir", tmp_path / "data", "--verify"])
    train = next((tmp_path / "data").glob("stars-*")) / "train.parquet"
    train.write_bytes(train.read_bytes()[:-1])
    capsys.readouterr()
    with pytest.raises(UserError, match=r"train.parquet: damaged, its SHA-256 is not the manifest's. It is made again"):
        main(["--data_dir", tmp_path / "data", "--verify"])
    assert line(capsys.readouterr().out, train.parent.name)[1] == "damaged"
    (train.parent / "manifest.json").unlink()
    with pytest.raises(UserError, match=r"manifest.json: not found"):
        main(["--data_dir", tmp_path / "data", "--verify"])
    main([*stars, "--model", "none"])
    assert "made again: " in capsys.readouterr().out
    main(["--data_dir", tmp_path / "data", "--verify"])


def test_a_model_is_verified_too(main, tmp_path):
    folder = tmp_path / "data" / "models" / "tiny"
    folder.mkdir(parents=True)
    (folder / "config.json").write_text("{}", encoding="utf-8")
    entry = {"config.json": {"sha256": hashlib.sha256(b"{}").hexdigest()}}
    manifest = {"format": 1, "name": "tiny", "source": "hub", "licence": "mit", "files": entry}
    (folder / "manifest.json").write_text(json.dumps(manifest), encoding="utf-8")
    main(["--data_dir", tmp_path / "data", "--verify"])
    (folder / "config.json").write_text("{ }", encoding="utf-8")
    with pytest.raises(UserError, match=r"config.json: damaged"):
        main(["--data_dir", tmp_path / "data", "--verify"])


# ------------------------------------------------------------------------------------------------------------------ texts


@pytest.fixture
def novel(tmp_path):
    (tmp_path / "novel.txt").write_text("\n\n".join(f"chapter {i} is short" for i in range(40)), encoding="utf-8")
    return ["--task", tmp_path / "novel.txt", "--data_dir", tmp_path / "data"]


@pytest.fixture(scope="module")
def language_model(tmp_path_factory):
    """A tokenizer with an end-of-sequence token, and what makes a directory a model's."""
    folder = tmp_path_factory.mktemp("models") / "tiny"
    vocabulary = {"</s>": 0, "chapter": 1, "is": 2, "short": 3, "<unk>": 4}
    backend = Tokenizer(WordLevel(vocabulary, unk_token="<unk>"))
    backend.pre_tokenizer = Whitespace()
    PreTrainedTokenizerFast(tokenizer_object=backend, eos_token="</s>", unk_token="<unk>").save_pretrained(folder)
    (folder / "config.json").write_text('{"model_type": "llama"}', encoding="utf-8")
    (folder / "model.safetensors").write_bytes(b"weights")
    return folder


def test_a_text_without_a_model(main, novel, tmp_path, capsys):
    main([*novel, "--model", "none"])
    out = capsys.readouterr().out
    name = next((tmp_path / "data").glob("novel-*")).name
    assert line(out, "text")[:3] == ["text", f"{name}:", "prepared"]
    assert line(out, "split") == ["split", "documents", "characters"]
    assert line(out, "test") == ["test", "2", f"{sum(len(text) for text in texts_of(tmp_path / 'data' / name, 'test'))}"]
    assert re.search(rf"{name} +train +36 +\d+ +raw +local +0.0 MB +yours", out) and "validation: 2 documents held out" in out
    main([*novel, "--model", "none"])
    assert line(capsys.readouterr().out, "text")[2] == "ready"


def texts_of(path, split):
    return pandas.read_parquet(path / f"{split}.parquet")["text"]


def test_a_text_with_a_model_is_tokenised(main, novel, language_model, tmp_path, capsys):
    main([*novel, "--model", str(language_model)])
    out = capsys.readouterr().out
    assert line(out, "model")[1] == "tiny:"
    assert line(out, "split") == ["split", "documents", "characters", "tokens", "characters", "a", "token"]
    assert line(out, "train")[3] == f"{36 * 5}"  # four words and the end of the document
    assert len(list((tmp_path / "data").glob("novel-*/tokens/*/train.npy"))) == 1
    main([*novel, "--model", "none", "--force"])
    assert "made again: asked for anew" in capsys.readouterr().out
    assert not list((tmp_path / "data").glob("novel-*/tokens"))


@pytest.mark.parametrize("there", [True, False])
def test_the_model_of_a_text_by_default(main, novel, language_model, tmp_path, capsys, monkeypatch, there):
    path = language_model if there else tmp_path / "none"
    monkeypatch.setattr("common.assets.TINY_LLAMA", path)
    monkeypatch.setitem(main.__globals__, "TINY_LLAMA", path)
    main(novel)
    assert ("tokens" in line(capsys.readouterr().out, "split")) is there


def test_labels_make_a_task_and_none_make_a_text(main, tmp_path, capsys):
    rows = [f"film {i} is of a kind,{i % 2}" for i in range(40)]
    (tmp_path / "films.csv").write_text("\n".join(["body,stars", *rows]), encoding="utf-8")
    flags = ["--task", tmp_path / "films.csv", "--text_column", "body", "--data_dir", tmp_path / "data", "--model", "none"]
    for more, kind, other in (([], "text", "task"), (["--label_column", "stars"], "task", "text")):
        main([*flags, *more])
        out = capsys.readouterr().out
        assert re.search(rf"^{kind} +films", out, re.MULTILINE) and not re.search(rf"^{other} +films", out, re.MULTILINE)
    assert line(out, "task")[1].startswith("films-") and "documents" in out and "labels" in out  # both are listed


def test_a_name_that_is_neither_a_task_nor_a_text(main, tmp_path):
    with pytest.raises(UserError, match="--task wikitex: not one of sst2, reviews, wikitext2, news, c4, and no such file"):
        main(["--task", "wikitex", "--data_dir", tmp_path / "data"])


def test_a_text_is_verified_too(main, novel, tmp_path, capsys):
    main([*novel, "--model", "none"])
    main(["--data_dir", tmp_path / "data", "--verify"])
    test = next((tmp_path / "data").glob("novel-*/test.parquet"))
    test.write_bytes(test.read_bytes()[:-1])
    capsys.readouterr()
    with pytest.raises(UserError, match=r"test.parquet: damaged"):
        main(["--data_dir", tmp_path / "data", "--verify"])
    assert line(capsys.readouterr().out, test.parent.name)[1] == "damaged"


@pytest.mark.parametrize(
    "flags, message",
    [
        (["--task", "news", "--label_column", "x"], "--label_column does not go with --task news"),
        (["--verify", "--force"], "does not go with --force"),
        (["--max_length", "3"], "--max_length 3: expected at least 4"),
        (["--seed", "-1"], "--seed -1"),
        (["--source", "web"], "invalid choice"),
        (["--tasks", "sst2"], "unrecognized arguments"),
    ],
)
def test_flags_that_make_no_sense(main, flags, message, tmp_path, capsys):
    with pytest.raises(SystemExit) as stop:
        main([*flags, "--data_dir", tmp_path / "data"])
    assert stop.value.code == 2 and message in capsys.readouterr().err and not (tmp_path / "data").exists()


# ---------------------------------------------------------------------------------------- the whole way, with a hub of ours


class Hub(BaseHTTPRequestHandler):
    """The part of the hub's protocol that a snapshot needs. `server.files`: {repository: {path: bytes}}."""

    def do_HEAD(self):
        self.answer(head=True)

    def do_GET(self):
        self.answer(head=False)

    def answer(self, head):
        self.server.asked.append(self.path)
        path = self.path.split("?")[0]
        repository = next((name for name in self.server.files if f"/{name}/" in f"{path}/"), None)
        files, body, headers = self.server.files.get(repository, {}), None, {}
        if path == "/":
            body = b"hub"
        elif "/resolve/" in path and path.split("/resolve/main/")[-1].split(f"/{'c' * 40}/")[-1] in files:
            body = files[path.split(f"/{'c' * 40}/")[-1]]
            headers = {"ETag": f'"{hashlib.sha256(body).hexdigest()}"', "X-Repo-Commit": "c" * 40}
        elif "/tree/" in path:
            entries = [{"type": "file", "path": name, "size": len(b), "oid": "0" * 40} for name, b in files.items()]
            body = json.dumps(entries).encode()
        elif repository and "/api/" in path:
            siblings = [{"rfilename": name} for name in files]
            body = json.dumps({"id": repository, "sha": "c" * 40, "siblings": siblings, "tags": [], "private": False}).encode()
        self.send_response(404 if body is None else 200)
        for name, value in {"Content-Length": str(len(body or b"")), **headers}.items():
            self.send_header(name, value)
        self.end_headers()
        if body and not head:
            self.wfile.write(body)

    def log_message(self, *args):
        pass


@pytest.fixture(scope="module")
def hub_files(tmp_path_factory):
    """A small DistilBERT and a stand-in for SST-2 with the right counts."""
    from transformers import BertTokenizer, DistilBertConfig, DistilBertModel

    folder = tmp_path_factory.mktemp("hub")
    words = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", "good", "bad", "film", "##s"]
    (folder / "vocab.txt").write_text("\n".join(words), encoding="utf-8")
    BertTokenizer(str(folder / "vocab.txt")).save_pretrained(folder)
    config = DistilBertConfig(vocab_size=len(words), n_layers=1, n_heads=2, dim=8, hidden_dim=16, max_position_embeddings=64)
    DistilBertModel(config).save_pretrained(folder)
    model = {file.name: file.read_bytes() for file in folder.iterdir()}
    model |= {"pytorch_model.bin": b"pickle", "README.md": b"---\nlicense: apache-2.0\n---\n", "onnx/model.onnx": b"x"}
    data = {"README.md": b"---\nlicense: unknown\n---\n"}
    for split, (negative, positive) in {"train": (29_780, 37_569), "validation": (428, 444)}.items():
        rows = [("bad films", 0)] * negative + [("good film", 1)] * positive
        pandas.DataFrame(rows, columns=["sentence", "label"]).to_parquet(folder / "p")
        data[f"data/{split}-00000-of-00001.parquet"] = (folder / "p").read_bytes()
    return {"stanfordnlp/sst2": data, "distilbert-base-uncased": model}


def test_from_a_hub_then_from_its_cache(hub_files, tmp_path):
    hub = ThreadingHTTPServer(("127.0.0.1", 0), Hub)
    hub.files, hub.asked = hub_files, []
    Thread(target=hub.serve_forever, daemon=True).start()
    environment = {name: value for name, value in os.environ.items() if not name.lower().endswith("_proxy")}
    environment |= {"HF_ENDPOINT": f"http://127.0.0.1:{hub.server_port}", "HF_HOME": str(tmp_path / "cache"),
                    "HF_HUB_OFFLINE": "0", "HF_HUB_DISABLE_XET": "1", "HF_HUB_DISABLE_TELEMETRY": "1"}  # fmt: skip

    def run(data_dir, *flags):
        command = [sys.executable, str(SCRIPT), "--data_dir", str(tmp_path / data_dir), "--max_length", "64", *flags]
        done = subprocess.run(command, env=environment, cwd=REPOSITORY, capture_output=True, text=True, check=False)
        return done.returncode, done.stdout, done.stderr

    code, out, err = run("data")
    assert code == 0, err
    assert f"task   sst2: prepared in {tmp_path / 'data' / 'sst2'} (source: hub, stanfordnlp/sst2)" in out
    assert line(out, "train") == ["train", "4", "5", "5", "0.00%"]  # more often good film than bad film ##s
    assert line(out, "distilbert-base-uncased")[1:] == ["hub", "0.0", "MB", "apache-2.0"]
    model = tmp_path / "data" / "models" / "distilbert-base-uncased"
    assert json.loads((model / "manifest.json").read_text(encoding="utf-8"))["revision"] == "c" * 40
    assert (model / "model.safetensors").read_bytes() == hub_files["distilbert-base-uncased"]["model.safetensors"]
    assert not any("pytorch_model.bin" in path or "onnx" in path for path in hub.asked)
    hub.shutdown()
    hub.server_close()

    code, out, err = run("again")  # the hub has gone, its cache has not
    assert code == 0, err
    assert "distilbert-base-uncased: prepared" in out and "source: hub" in out
    code, out, err = run("data", "--model", "someone/else")
    assert code == 2 and "Traceback" not in err
    assert re.search(r"error: --model someone/else: cannot be had here. Tried: hub, someone/else: .* cannot be reached .*; not "
                     r"in its cache.\nWays out: ", err)  # fmt: skip
