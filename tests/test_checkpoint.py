"""Checkpoints that survive anything, and model directories that are replaced whole."""

import errno
import json
import os
import random

import numpy as np
import pytest
import torch
import transformers

from common import checkpoint
from common.blocks import blocks_of
from common.checkpoint import (
    is_classifier_of,
    load_causal_lm,
    load_checkpoint,
    load_classifier,
    load_model,
    outline,
    save_checkpoint,
    save_model,
)
from common.pruning import shrink_
from common.runs import UserError
from tests.test_families import Tokenizer, batch, random_model, uneven_keep

# ------------------------------------------------------------------------------------------------------------ checkpoints


class Killed(BaseException):
    """The process ends here, as far as a test can play it."""


def draws():
    """Numbers from every global generator, in the odd middle of their buffers."""
    from_torch = [torch.rand(3).tolist(), torch.randn(1).item()]
    return [random.random(), random.gauss(0, 1), np.random.rand(), np.random.randn(), *from_torch]


def test_everything_random_goes_on_where_it_was(tmp_path):
    random.seed(1)
    np.random.seed(2)
    torch.manual_seed(3)
    draws()  # also half of a pair of normal numbers is kept
    save_checkpoint(tmp_path, {}, step=7)
    expected = [draws() for _ in range(3)]
    random.seed(4)
    np.random.seed(5)
    torch.manual_seed(6)
    state, warning = load_checkpoint(tmp_path)
    assert draws() != expected[0]  # loading alone changes nothing
    checkpoint.restore_(state, {})
    assert [draws() for _ in range(3)] == expected
    assert state["step"] == 7 and warning is None


def trained(steps):
    """A model after some steps with momentum and a schedule, on numbers from torch's generator."""
    torch.manual_seed(0)
    model = torch.nn.Linear(3, 2)
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.1)
    scheduler = torch.optim.lr_scheduler.ExponentialLR(optimizer, 0.9)
    parts = {"model": model, "optimizer": optimizer, "scheduler": scheduler}
    train(parts, steps)
    return parts


def train(parts, steps):
    for _ in range(steps):
        parts["optimizer"].zero_grad()
        parts["model"](torch.randn(4, 3)).square().sum().backward()
        parts["optimizer"].step()
        parts["scheduler"].step()


def test_saved_and_restored_is_never_stopped(tmp_path):
    expected = trained(5)["model"].state_dict()
    save_checkpoint(tmp_path, trained(2), masks=[torch.tensor([True, False])], name="x")
    torch.manual_seed(99)
    parts = trained(0)
    state, _ = load_checkpoint(tmp_path)
    checkpoint.restore_(state, parts)
    train(parts, 3)
    assert all(torch.equal(tensor, expected[name]) for name, tensor in parts["model"].state_dict().items())
    assert state["masks"][0].tolist() == [True, False] and state["name"] == "x"


def test_the_last_two_are_kept(tmp_path):
    assert load_checkpoint(tmp_path / "none") == (None, None)
    for step in (1, 2, 3):
        save_checkpoint(tmp_path, {}, step=step)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["last.pt", "previous.pt"]
    (tmp_path / "last.pt").unlink()
    assert load_checkpoint(tmp_path)[0]["step"] == 2


@pytest.mark.parametrize("moment", ["writing", "syncing", "first rename", "second rename"])
def test_a_kill_leaves_a_whole_checkpoint(tmp_path, monkeypatch, moment):
    save_checkpoint(tmp_path, {}, step=1)
    save_checkpoint(tmp_path, {}, step=2)

    def die(*args, **kwargs):
        if moment == "writing":
            args[1].write(b"the first bytes")
        raise Killed

    with monkeypatch.context() as patch:
        if moment == "writing":
            patch.setattr(torch, "save", die)
        elif moment == "syncing":
            patch.setattr(os, "fsync", die)
        else:
            rename, calls = os.replace, []
            patch.setattr(os, "replace", lambda *a: die() if calls or moment == "first rename" else calls.append(rename(*a)))
        with pytest.raises(Killed):
            save_checkpoint(tmp_path, {}, step=3)
    state, warning = load_checkpoint(tmp_path)
    assert state["step"] == 2 and warning is None
    save_checkpoint(tmp_path, {}, step=4)  # what lies about is no obstacle
    assert load_checkpoint(tmp_path)[0]["step"] == 4


def cut(path):
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])


def test_a_damaged_checkpoint_is_passed_over_with_a_warning(tmp_path):
    for step in (1, 2):
        save_checkpoint(tmp_path, {}, step=step)
    cut(tmp_path / "last.pt")
    state, warning = load_checkpoint(tmp_path)
    assert state["step"] == 1 and "last.pt is damaged" in warning and "continuing from previous.pt" in warning
    (tmp_path / "last.pt").write_bytes(b"")
    assert load_checkpoint(tmp_path)[0]["step"] == 1
    assert (tmp_path / "damaged.pt").exists() and not (tmp_path / "last.pt").exists()  # out of the way of the next one
    (tmp_path / "last.pt").write_bytes(b"")
    cut(tmp_path / "previous.pt")
    with pytest.raises(UserError, match=r"last.pt is damaged.*previous.pt is damaged.*--resume never"):
        load_checkpoint(tmp_path)


class Attack:
    def __reduce__(self):
        return (os.system, ("exit 1",))


def test_a_checkpoint_runs_no_code(tmp_path):
    torch.save({"step": Attack()}, tmp_path / "last.pt")
    with pytest.raises(UserError, match="is damaged"):
        load_checkpoint(tmp_path)


@pytest.mark.parametrize("error", [OSError(errno.ENOSPC, "No space left on device"), RuntimeError("unexpected pos 64 vs 0")])
def test_a_full_disk_leaves_the_checkpoint_before(tmp_path, monkeypatch, error):
    save_checkpoint(tmp_path, {}, step=1)

    def save(state, file):
        file.write(b"as much as there was room for")
        raise error

    with monkeypatch.context() as patch:
        patch.setattr(torch, "save", save)
        with pytest.raises(UserError, match=r"could not write a checkpoint \((.*No space|.*unexpected pos).*Free some space"):
            save_checkpoint(tmp_path, {}, step=2)
    assert [path.name for path in tmp_path.iterdir()] == ["last.pt"] and load_checkpoint(tmp_path)[0]["step"] == 1


def test_drop_takes_what_is_there(tmp_path):
    (tmp_path / "folder" / "inner").mkdir(parents=True)
    (tmp_path / "file").write_text("x")
    checkpoint.drop(tmp_path / "folder", tmp_path / "file", tmp_path / "nothing")
    assert not list(tmp_path.iterdir())


# ----------------------------------------------------------------------------------------------------------------- models


def files(directory):
    return {path.relative_to(directory): path.read_bytes() for path in directory.rglob("*") if path.is_file()}


def pruned_bert():
    model, _ = random_model("bert")
    shrink_(model, uneven_keep(blocks_of(model)))
    return model


class BadTokenizer:
    def save_pretrained(self, path):
        (path / "tokenizer_config.json").write_text("{")
        raise OSError(errno.ENOSPC, "No space left on device")


def test_a_model_that_cannot_be_saved_leaves_the_old_one(tmp_path):
    save_model(tmp_path / "model", random_model("bert")[0], Tokenizer(), {"stage": 1})
    before = files(tmp_path)
    with pytest.raises(OSError, match="No space"):
        save_model(tmp_path / "model", pruned_bert(), BadTokenizer(), {"stage": 2})
    assert files(tmp_path) == before
    with pytest.raises(OSError, match="No space"):
        save_model(tmp_path / "other", pruned_bert(), BadTokenizer())
    assert [path.name for path in tmp_path.iterdir()] == ["model"]


@pytest.mark.parametrize("n_renames", [0, 1])
def test_a_kill_while_a_model_is_replaced_leaves_one_whole(tmp_path, monkeypatch, n_renames):
    save_model(tmp_path / "model", random_model("bert")[0], Tokenizer())
    before, rename, calls = files(tmp_path / "model"), os.replace, []

    def die(*args):
        if args[0].is_dir() and len(calls) == n_renames:
            raise Killed
        calls.append(rename(*args))

    with monkeypatch.context() as patch:
        patch.setattr(os, "replace", die)
        with pytest.raises(Killed):
            save_model(tmp_path / "model", pruned_bert(), Tokenizer())
    assert files(tmp_path / ("model" if n_renames == 0 else ".model.old")) == before
    (tmp_path / ".model.new").mkdir(exist_ok=True)
    (tmp_path / ".model.new" / "half.safetensors").write_text("of a killed process")
    save_model(tmp_path / "model", pruned_bert(), Tokenizer())
    assert [path.name for path in tmp_path.iterdir()] == ["model"] and not (tmp_path / "model" / "half.safetensors").exists()


def test_stages_are_appended(tmp_path):
    model, _ = random_model("bert")
    save_model(tmp_path / "dense", model, Tokenizer())
    assert checkpoint.compression_stages(tmp_path / "dense") == []
    save_model(tmp_path / "one", model, Tokenizer(), {"script": "a", "asked": {"sparsity": 0.5}}, earlier=tmp_path / "dense")
    save_model(tmp_path / "two", model, Tokenizer(), {"script": "b"}, earlier=tmp_path / "one")
    assert checkpoint.compression_stages(tmp_path / "two") == [{"script": "a", "asked": {"sparsity": 0.5}}, {"script": "b"}]
    save_model(tmp_path / "one", model, Tokenizer(), {"script": "c"}, earlier=tmp_path / "one")  # in place
    assert [stage["script"] for stage in checkpoint.compression_stages(tmp_path / "one")] == ["a", "c"]


def test_outline_has_the_shapes_and_no_weights(tmp_path):
    for model in (random_model("bert")[0], pruned_bert()):
        save_model(tmp_path / "model", model, Tokenizer())
        drawn = outline(tmp_path / "model")
        assert [(n, p.shape) for n, p in drawn.named_parameters()] == [(n, p.shape) for n, p in model.named_parameters()]
        assert [b.shape for b in blocks_of(drawn)] == [b.shape for b in blocks_of(model)]
        assert {p.device.type for p in drawn.parameters()} == {"meta"}


def test_outline_of_what_is_no_supported_model(tmp_path):
    with pytest.raises(UserError, match=r"no config.json of a known model"):
        outline(tmp_path)
    for text, message in (('{"model_type": "t5"}', "model type 't5' is not supported"), ("{", "no config.json of a known")):
        (tmp_path / "config.json").write_text(text)
        with pytest.raises(UserError, match=message):
            outline(tmp_path)


def pruned_llama():
    model, _ = random_model("llama")
    shrink_(model, uneven_keep(blocks_of(model)))
    return model


@pytest.mark.parametrize("make", [lambda: random_model("opt-350m")[0], lambda: random_model("qwen2")[0], pruned_llama])
def test_outline_of_a_causal_lm(tmp_path, make):
    model = make()
    save_model(tmp_path / "model", model, Tokenizer())
    drawn = outline(tmp_path / "model", transformers.AutoModelForCausalLM)
    assert [(n, p.shape) for n, p in drawn.named_parameters()] == [(n, p.shape) for n, p in model.named_parameters()]
    assert [b.shape for b in blocks_of(drawn)] == [b.shape for b in blocks_of(model)]
    assert {p.device.type for p in drawn.parameters()} == {"meta"}


def test_outline_of_what_is_no_causal_lm(tmp_path):
    save_model(tmp_path / "model", random_model("distilbert")[0], Tokenizer())
    with pytest.raises(UserError, match="a distilbert model is not loadable as AutoModelForCausalLM"):
        outline(tmp_path / "model", transformers.AutoModelForCausalLM)


@pytest.mark.parametrize("make", [lambda: random_model("opt-350m")[0], lambda: random_model("qwen2")[0], pruned_llama])
def test_load_causal_lm(tmp_path, make):
    model = make()
    save_model(tmp_path / "model", model, Tokenizer())
    same = load_causal_lm(tmp_path / "model")
    assert type(same).__name__.endswith("ForCausalLM") and {p.dtype for p in same.parameters()} == {torch.float32}
    with torch.no_grad():
        assert torch.equal(same.eval()(**batch()).logits, model.eval()(**batch()).logits)
    half = load_causal_lm(tmp_path / "model", torch.bfloat16)
    assert {p.dtype for p in half.parameters()} == {torch.bfloat16}
    save_model(tmp_path / "half", half, Tokenizer())
    assert {p.dtype for p in load_causal_lm(tmp_path / "half").parameters()} == {torch.bfloat16}  # as it was stored
    assert {p.dtype for p in load_causal_lm(tmp_path / "half", torch.float32).parameters()} == {torch.float32}


def test_what_holds_no_causal_lm_is_a_user_error(tmp_path):
    with pytest.raises(UserError, match=r"no config.json of a known model"):
        load_causal_lm(tmp_path / "nothing")
    classifier = transformers.AutoModelForSequenceClassification.from_config(random_model("llama")[0].config)
    for model in (random_model("bert")[0], classifier):
        save_model(tmp_path / "model", model, Tokenizer())
        with pytest.raises(UserError, match=f"holds {type(model).__name__}; expected a causal language model"):
            load_causal_lm(tmp_path / "model")


@pytest.mark.parametrize("make", [lambda: random_model("bert")[0], pruned_bert])
def test_load_classifier_with_labels_of_its_own(tmp_path, make):
    model = make()
    save_model(tmp_path / "model", model, Tokenizer())
    same = load_classifier(tmp_path / "model", ["bad", "good"], dropout=0.3)
    with torch.no_grad():
        assert torch.equal(same.eval()(**batch()).logits, model.eval()(**batch()).logits)
    assert same.config.id2label == {0: "bad", 1: "good"} and same.config.label2id == {"bad": 0, "good": 1}
    probabilities = {module.p for module in same.modules() if isinstance(module, torch.nn.Dropout)}
    assert probabilities == {0.3} and same.config.hidden_dropout_prob == model.config.hidden_dropout_prob

    three = load_classifier(tmp_path / "model", ["a", "b", "c"])
    assert three(**batch()).logits.shape == (3, 3)
    body = model.base_model.state_dict()
    assert all(torch.equal(tensor, body[name]) for name, tensor in three.base_model.state_dict().items())


def test_what_cannot_be_loaded_is_a_user_error(tmp_path):
    auto = transformers.AutoModelForSequenceClassification
    with pytest.raises(UserError, match="not loadable as AutoModelForSequenceClassification"):
        load_model(tmp_path / "nothing", auto)
    for make in (lambda: random_model("bert")[0], pruned_bert):
        directory = tmp_path / "model"
        save_model(directory, make(), Tokenizer())
        weights = (directory / "model.safetensors").read_bytes()
        (directory / "model.safetensors").write_bytes(weights[: len(weights) // 2])
        with pytest.raises(UserError, match="not loadable"):
            load_model(directory, auto)
        (directory / "model.safetensors").unlink()
        torch.save(make().state_dict(), directory / "pytorch_model.bin")
        with pytest.raises(UserError, match="not loadable"):  # never a pickle
            load_model(directory, auto)
        (directory / "config.json").write_text(json.dumps({"model_type": "no such type"}))
        with pytest.raises(UserError, match="not loadable"):
            load_model(directory, auto)


@pytest.mark.parametrize(
    "architecture, id2label, names, expected",
    [
        ("BertForSequenceClassification", {0: "bad", 1: "good"}, ["bad", "good"], True),
        ("BertForSequenceClassification", {0: "NEGATIVE", 1: "POSITIVE"}, ["negative", "positive"], True),
        ("BertForSequenceClassification", None, ["bad", "good"], True),  # LABEL_0, LABEL_1: by number
        ("BertForSequenceClassification", {0: "good", 1: "bad"}, ["bad", "good"], False),  # the other way around
        ("BertForSequenceClassification", {0: "a", 1: "b", 2: "c"}, ["a", "b"], False),
        ("BertForSequenceClassification", None, ["a", "b", "c"], False),
        ("BertModel", {0: "bad", 1: "good"}, ["bad", "good"], False),
        ("BertForTokenClassification", {0: "bad", 1: "good"}, ["bad", "good"], False),
        (None, None, ["bad", "good"], False),
    ],
)
def test_is_classifier_of(architecture, id2label, names, expected):
    settings = {"id2label": id2label} if id2label else {}
    config = transformers.BertConfig(architectures=[architecture] if architecture else None, **settings)
    assert is_classifier_of(config, names) is expected


# ------------------------------------------------------------------------------------------------- models of other kinds


class Small(torch.nn.Module):
    def __init__(self, n, bias=True):
        super().__init__()
        self.linear, self.dropout = torch.nn.Linear(n, 1, bias=bias), torch.nn.Dropout(0.5)


def test_the_best_weights_are_kept_and_the_others_go(tmp_path):
    best, model = [], Small(1, bias=False)
    for step, score in enumerate([5.0, 3.0, 4.0, 9.0, 3.5, 1.0], 1):
        torch.nn.init.constant_(model.linear.weight, step)
        checkpoint.keep_best_(tmp_path, best, 2, score, step, model)
    assert best == [[1.0, 6], [3.0, 2]]
    assert sorted(path.name for path in tmp_path.iterdir()) == ["step-000002.safetensors", "step-000006.safetensors"]
    assert checkpoint.load_tensors(tmp_path / "step-000002.safetensors")["linear.weight"].item() == 2


def test_a_model_of_a_class_of_its_own(tmp_path):
    model = Small(3)
    checkpoint.save_own(tmp_path, model, {"n": 3}, Tokenizer())
    again = checkpoint.load_own(tmp_path, Small)
    assert torch.equal(again.linear.weight, model.linear.weight) and not again.training
    with pytest.raises(UserError, match="holds no Linear, but Small"):
        checkpoint.load_own(tmp_path, torch.nn.Linear)
    (tmp_path / "model.safetensors").write_bytes(b"x")
    with pytest.raises(UserError, match="not readable"):
        checkpoint.load_own(tmp_path, Small)
