"""The script that trains the tiny language model, and the model that it made."""

import json

import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, AutoTokenizer

from common import assets, eval_utils, text, train_utils
from common.runs import REPOSITORY, read_json
from tests.test_8_pruning_with_finetuning import load_script
from tests.test_main_block import sentences

SMALL = ["--num_epochs", 2, "--batch_size", 4, "--token_length", 32, "--vocab_size", 300, "--hidden_size", 32,
         "--num_layers", 1, "--intermediate_size", 48, "--num_heads", 4, "--num_kv_heads", 2, "--n_evaluations", 4,
         "--save_every", 3, "--precision", "32", "--device", "cpu"]  # fmt: skip


@pytest.fixture
def script(tmp_path, monkeypatch):
    module = load_script(REPOSITORY / "assets" / "train_tiny_llama.py", "train_tiny_llama")
    (tmp_path / "text.txt").write_text("\n\n".join(sentences(300)))
    prepared = text.prepare_text(str(tmp_path / "text.txt"), tmp_path / "data")
    monkeypatch.setattr(module.text, "prepare_text", lambda *_: prepared)
    monkeypatch.setattr(module, "INSTALLED", REPOSITORY / "assets" / "nowhere")
    return module


def run(script, out, *more):
    script.main([*SMALL, "--out_dir", out, *more])
    (record,) = (out / "tiny_llama").glob("[!.]*/run.json")
    return record.parent, read_json(record)


def test_it_trains_a_model_that_stock_transformers_loads(script, tmp_path):
    folder, record = run(script, tmp_path / "out")
    model = AutoModelForCausalLM.from_pretrained(folder / "model")
    tokenizer = AutoTokenizer.from_pretrained(folder / "model")
    assert model.dtype == torch.bfloat16 and "lm_head.weight" not in load_file(folder / "model" / "model.safetensors")
    assert (model.config.num_attention_heads, model.config.num_key_value_heads) == (4, 2)
    assert tokenizer.decode(tokenizer("Zoë — 北京\n")["input_ids"]) == "Zoë — 北京\n"  # bytes, so nothing is unknown
    stream = text.token_stream(script.text.prepare_text().path, "test", tokenizer)
    found = eval_utils.evaluate_perplexity(model.float(), stream, 32)["perplexity"]
    metrics = record["metrics"]
    assert metrics["test_perplexity"] == pytest.approx(found, rel=1e-6)
    looks = [float(line.split(",")[3]) for line in (folder / "history.csv").read_text().splitlines() if "validation" in line]
    assert len(looks) == 4 and looks[-1] < 0.5 * looks[0] and metrics["last_tenth"] == pytest.approx(looks[-1] / looks[-2] - 1)
    card = (folder / "model" / "README.md").read_text(encoding="utf-8")
    assert f"{metrics['parameters']:,} parameters" in card and f"{metrics['test_perplexity']:.2f}" in card
    assert metrics["parameters"] == sum(p.numel() for p in model.parameters())
    assert read_json(folder / "model" / "training.json")["metrics"] == metrics


@pytest.mark.parametrize("at", [1, 5, 11])
def test_a_killed_run_goes_on_exactly(script, tmp_path, monkeypatch, at):
    whole, _ = run(script, tmp_path / "whole")
    step, calls = train_utils.step_, []

    def dies(*args):
        calls.append(None)
        if len(calls) == at:
            raise KeyboardInterrupt
        step(*args)

    monkeypatch.setattr(train_utils, "step_", dies)
    with pytest.raises(KeyboardInterrupt):
        run(script, tmp_path / "killed")
    monkeypatch.setattr(train_utils, "step_", step)
    folder, _ = run(script, tmp_path / "killed")
    assert (folder / "model" / "model.safetensors").read_bytes() == (whole / "model" / "model.safetensors").read_bytes()
    curves = [(path / "history.csv").read_text().splitlines() for path in (whole, folder)]
    losses = [[line for line in curve if "tokens_per_second" not in line] for curve in curves]
    assert losses[0] == losses[1]


def test_install_copies_the_model(script, tmp_path, monkeypatch):
    monkeypatch.setattr(script, "REPOSITORY", tmp_path)
    monkeypatch.setattr(script, "INSTALLED", tmp_path / "assets" / "tiny_llama")
    folder, _ = run(script, tmp_path / "out", "--num_epochs", 0.2, "--install")
    files = {path.name for path in (tmp_path / "assets" / "tiny_llama").iterdir()}
    assert files == {path.name for path in (folder / "model").iterdir()} >= {"README.md", "training.json", "tokenizer.json"}


def test_epochs_take_all_of_the_stream_each_window_once(script):
    stream = torch.arange(1000).numpy()
    starts = script.epoch_windows(stream, 32, 0, 0)
    assert sorted(starts)[0] < 32 and sorted(starts)[-1] > 1000 - 64
    assert {int(b - a) for a, b in zip(sorted(starts), sorted(starts)[1:], strict=False)} == {32}
    assert script.epoch_windows(stream, 32, 0, 0).tolist() == starts.tolist() != script.epoch_windows(stream, 32, 0, 1).tolist()
    assert (script.windows_of(stream, starts[:3], 32, "cpu") == torch.tensor(starts[:3])[:, None] + torch.arange(32)).all()


def test_heads_that_do_not_divide_are_refused(script, capsys):
    with pytest.raises(SystemExit) as stop:
        script.main([*SMALL, "--num_kv_heads", 3])
    assert stop.value.code == 2 and "each has to divide" in capsys.readouterr().err


# ------------------------------------------------------------------------------------------------------------ what it made


def test_the_installed_model_is_what_its_card_says():
    folder = assets.TINY_LLAMA
    training, card = read_json(folder / "training.json"), (folder / "README.md").read_text(encoding="utf-8")
    assert sum(path.stat().st_size for path in folder.iterdir()) <= 16e6
    tensors = load_file(folder / "model.safetensors")
    assert {tensor.dtype for tensor in tensors.values()} == {torch.bfloat16}
    metrics = training["metrics"]
    assert sum(tensor.numel() for tensor in tensors.values()) == metrics["parameters"]
    for shown in (f"{metrics['parameters']:,} parameters", f"{metrics['test_perplexity']:.2f}", f"{metrics['last_tenth']:+.2%}",
                  f"{metrics['train_tokens']:,} tokens"):  # fmt: skip
        assert shown in card, shown
    looks = [value for _, _, metric, value in training["history"] if metric == "validation_perplexity"]
    assert looks[-1] == min(looks) and -0.01 < metrics["last_tenth"] < 0  # it has converged
    assert sum(training["timings"].values()) < 90 * 60
    config = json.loads((folder / "config.json").read_text())
    assert config["num_key_value_heads"] < config["num_attention_heads"] and config["tie_word_embeddings"]


def test_the_installed_model_predicts():
    tokenizer = AutoTokenizer.from_pretrained(assets.TINY_LLAMA)
    model = AutoModelForCausalLM.from_pretrained(assets.TINY_LLAMA, dtype=torch.float32).eval()
    ids = torch.tensor([tokenizer("The prime minister said on Monday that the government would")["input_ids"]])
    with torch.no_grad():
        loss = model(input_ids=ids, labels=ids).loss
    assert float(loss) < 4.5  # an even guess: 9.01
    assert len(tokenizer) == model.config.vocab_size
