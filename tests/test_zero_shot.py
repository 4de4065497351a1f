"""Zero-shot tasks against log-likelihoods computed by hand, without a network; what cannot be had is said."""

import copy
import json
import random
import socket
import time

import pytest
import torch
from datasets import config as datasets_config
from huggingface_hub import constants
from tokenizers import ByteLevelBPETokenizer
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from common import corpus, fetch, text, zero_shot
from common.runs import UserError
from common.zero_shot import evaluate, load_tasks, offline_task, write_choice_task

WORDS = ["the", "a", "court", "of", "river", "price", "minister", "storm", "says", "goal", "second", "team", "north", "water"]


def documents(n, n_words=200, seed=0):
    draw = random.Random(seed)
    return [" ".join(draw.choices([f"{word}{i}" for word in WORDS], k=n_words)) for i in range(n)]


@pytest.fixture(scope="module")
def model_and_tokenizer():
    """A random Llama whose likelihoods differ, and a tokenizer of its own without a padding token."""
    bpe = ByteLevelBPETokenizer()
    bpe.train_from_iterator(documents(10), vocab_size=400, special_tokens=["</s>"], show_progress=False)
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=bpe._tokenizer, eos_token="</s>")
    torch.manual_seed(0)
    config = LlamaConfig(vocab_size=len(tokenizer), hidden_size=32, intermediate_size=64, num_hidden_layers=2,
                         num_attention_heads=4, num_key_value_heads=2, max_position_embeddings=1024,
                         initializer_range=0.3)  # fmt: skip
    return LlamaForCausalLM(config), tokenizer


@pytest.fixture
def no_network(monkeypatch):
    """The hub is not said to be offline, but whoever asks for any host fails the test."""
    monkeypatch.delenv("HF_HUB_OFFLINE")
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    monkeypatch.setattr(datasets_config, "HF_HUB_OFFLINE", False)
    for name in ("connect", "connect_ex"):
        monkeypatch.setattr(socket.socket, name, lambda *_: pytest.fail("asked the network"))
    monkeypatch.setattr(socket, "getaddrinfo", lambda *_, **__: pytest.fail("asked for a host"))


def lm_eval_or_skip():
    pytest.importorskip("lm_eval", reason="lm-eval is not installed (requirements-extra.txt)")


def likelihoods(model, tokenizer, question) -> list[float]:
    """log p of each continuation after its context, token by token, one forward each."""
    found = []
    for choice in question["choices"]:
        whole, start = (tokenizer(part)["input_ids"] for part in (f"{question['context']} {choice}", question["context"]))
        with torch.no_grad():
            logs = model.eval()(input_ids=torch.tensor([whole])).logits[0].double().log_softmax(-1)
        found.append(sum(float(logs[i - 1, whole[i]]) for i in range(len(start), len(whole))))
    return found


def test_accuracy_is_that_of_the_likelihoods(tmp_path, model_and_tokenizer, no_network, monkeypatch, capfd):
    lm_eval_or_skip()
    from lm_eval.models.huggingface import HFLM

    model, tokenizer = model_and_tokenizer
    folder = write_choice_task(tmp_path / "task", "mine", documents(8), seed=0, n=12)
    seen = []
    original = HFLM._loglikelihood_tokens
    monkeypatch.setattr(HFLM, "_loglikelihood_tokens", lambda *args, **kwargs: seen.extend(found := original(*args, **kwargs))
                        or found)  # fmt: skip
    model.train()
    before = {name: parameter for name, parameter in model.named_parameters()}  # noqa: C416
    capfd.readouterr()
    found = evaluate(model, tokenizer, ["mine"], folder, limit=10, batch_size=3)
    assert capfd.readouterr() == ("", "")
    assert model.training and model.config.use_cache and tokenizer.pad_token is None
    assert all(parameter is before[name] and not parameter.is_inference() for name, parameter in model.named_parameters())

    lines = (folder / "mine.jsonl").read_text(encoding="utf-8").splitlines()
    questions = [json.loads(line) for line in lines][:10]
    expected = [likelihoods(model, tokenizer, question) for question in questions]
    assert [value for value, _ in seen] == pytest.approx([value for part in expected for value in part], abs=1e-3)
    right = [max(range(4), key=part.__getitem__) == q["answer"] for part, q in zip(expected, questions, strict=True)]
    per_letter = [[value / len(c) for value, c in zip(part, q["choices"], strict=True)]
                  for part, q in zip(expected, questions, strict=True)]  # fmt: skip
    right_norm = [max(range(4), key=part.__getitem__) == q["answer"] for part, q in zip(per_letter, questions, strict=True)]
    values = found["mine"]
    assert set(found) == {"mine"} and set(values) == {"acc", "acc_stderr", "acc_norm", "acc_norm_stderr", "n"}
    assert values["n"] == 10 and 0 < sum(right) < 10
    assert values["acc"] == pytest.approx(sum(right) / 10) and values["acc_norm"] == pytest.approx(sum(right_norm) / 10)
    p = sum(right) / 10
    assert values["acc_stderr"] == pytest.approx((p * (1 - p) / 9) ** 0.5)
    alone = evaluate(model, tokenizer, ["mine"], folder, limit=1)["mine"]
    assert alone["n"] == 1 and alone["acc"] == right[0] and "acc_stderr" not in alone  # of one question there is none


def test_a_model_in_16_bits(tmp_path, model_and_tokenizer):
    lm_eval_or_skip()
    model, tokenizer = model_and_tokenizer
    folder = write_choice_task(tmp_path / "task", "mine", documents(8), seed=0, n=4)
    half = LlamaForCausalLM(copy.deepcopy(model.config)).to(torch.bfloat16)
    assert evaluate(half, tokenizer, ["mine"], folder)["mine"]["n"] == 4
    assert half.dtype == torch.bfloat16
    half.config.max_position_embeddings = 30
    with pytest.raises(UserError, match=r"an answer that is empty, or longer than the model's 30 positions. Leave it out"):
        evaluate(half, tokenizer, ["mine"], folder)
    assert half.config.use_cache


def test_groups_and_several_folders(tmp_path, model_and_tokenizer, no_network):
    lm_eval_or_skip()
    one = write_choice_task(tmp_path / "one", "first", documents(6), seed=0, n=5)
    two = write_choice_task(tmp_path / "two", "second", documents(6), seed=1, n=3)
    group = {"group": "both", "task": ["first", "second"], "aggregate_metric_list": [{"metric": "acc", "weight_by_size": True}]}
    (two / "both.yaml").write_text(json.dumps(group), encoding="utf-8")
    found = evaluate(*model_and_tokenizer, ["both"], [one, two])
    assert set(found) == {"first", "second", "both"} and [found[name]["n"] for name in ("first", "second", "both")] == [5, 3, 8]
    assert found["both"]["acc"] == pytest.approx((5 * found["first"]["acc"] + 3 * found["second"]["acc"]) / 8)
    assert set(evaluate(*model_and_tokenizer, ["first", "second", "first"], [one, two])) == {"first", "second"}


# ---------------------------------------------------------------------------------------------------- what cannot be had


def test_what_cannot_be_had_is_said(tmp_path, model_and_tokenizer, monkeypatch):
    lm_eval_or_skip()
    folder = write_choice_task(tmp_path / "task", "mine", documents(6), seed=0, n=4)
    with pytest.raises(UserError, match=r"helaswag: no such task .* Near: .*hellaswag.* In --include_path: mine"):
        load_tasks(["mine", "helaswag"], folder)
    with pytest.raises(UserError, match=r"boolq: its data cannot be had here. Tried: hub, aps/super_glue: the hub does not "
                       r"answer.*\nWays out: the task news_choice"):  # fmt: skip
        evaluate(*model_and_tokenizer, ["boolq"])
    from lm_eval.tasks import TaskManager

    assert set(zero_shot.DEFAULT_TASKS) <= set(TaskManager().all_tasks)
    with pytest.raises(UserError, match="nothing: no such folder"):
        load_tasks(["mine"], tmp_path / "nothing")
    (tmp_path / "empty").mkdir()
    with pytest.raises(UserError, match=r"empty: no .yaml file in it"):
        load_tasks(["mine"], tmp_path / "empty")
    for options in ({"limit": 0}, {"batch_size": 0}):
        with pytest.raises(UserError, match="0: expected 1 or more"):
            evaluate(*model_and_tokenizer, ["mine"], folder, **options)
    with pytest.raises(UserError, match=r"no task. Expected names such as boolq"):
        load_tasks([], folder)
    task = json.loads((folder / "mine.yaml").read_text(encoding="utf-8"))
    (folder / "mine.yaml").write_text(json.dumps(task | {"unsafe_code": True}), encoding="utf-8")
    with pytest.raises(UserError, match="mine: runs code that the model writes, which is not done here"):
        load_tasks(["mine"], folder)
    (folder / "mine.jsonl").unlink()
    with pytest.raises(UserError, match=r"mine: its files cannot be read \(FileNotFoundError"):
        load_tasks(["mine"], folder)


def test_the_package_may_be_missing(tmp_path, model_and_tokenizer, monkeypatch):
    from importlib import util

    original = util.find_spec
    monkeypatch.setattr(util, "find_spec", lambda name: None if name == "lm_eval" else original(name))
    with pytest.raises(UserError, match=r"lm-eval is not installed; --eval_zero_shot needs it. Run: pip install"):
        evaluate(*model_and_tokenizer, ["boolq"])


# ------------------------------------------------------------------------------------------------------- our own questions


def test_questions_are_pieces_of_documents(tmp_path):
    made = documents(5, n_words=200)
    folder = write_choice_task(tmp_path / "task", "mine", [*made, "too short"], seed=3, n=100)
    questions = [json.loads(line) for line in (folder / "mine.jsonl").read_text(encoding="utf-8").splitlines()]
    assert len(questions) == 5 * 2  # two pieces of 88 words in each document
    for question in questions:
        (own,) = [document for document in made if question["context"] in document]
        assert len(question["context"].split()) == 64 and all(len(choice.split()) == 24 for choice in question["choices"])
        assert f"{question['context']} {question['choices'][question['answer']]}" in own
        homes = [made.index(next(d for d in made if choice in d)) for choice in question["choices"]]
        assert len(set(homes)) == 4
    assert {question["answer"] for question in questions} > {0, 1}
    pieces = {question["context"] for question in questions}
    assert len(pieces) == 10


def test_the_same_questions_stay_as_they_are(tmp_path):
    write_choice_task(tmp_path, "mine", documents(6), seed=0, n=5)
    files = {path.name: (path.stat().st_mtime_ns, path.read_text(encoding="utf-8")) for path in tmp_path.iterdir()}
    assert set(files) == {"mine.yaml", "mine.jsonl"}
    time.sleep(0.01)
    write_choice_task(tmp_path, "mine", documents(6), seed=0, n=5)
    assert files == {path.name: (path.stat().st_mtime_ns, path.read_text(encoding="utf-8")) for path in tmp_path.iterdir()}
    write_choice_task(tmp_path, "mine", documents(6), seed=1, n=5)
    assert (tmp_path / "mine.jsonl").read_text(encoding="utf-8") != files["mine.jsonl"][1]
    with pytest.raises(UserError, match="mine: 3 documents have 88 words or more, expected 4 at least"):
        write_choice_task(tmp_path, "mine", [*documents(3), "short"], seed=0, n=5)
    with pytest.raises(UserError, match="mine: 0 questions"):
        write_choice_task(tmp_path, "mine", documents(6), seed=0, n=0)


def test_news_choice_is_made_of_the_news(tmp_path, model_and_tokenizer, monkeypatch):
    made = documents(6)
    (tmp_path / "news").mkdir()
    manifest = corpus.write_texts(tmp_path / "news", {"train": ["x"], "test": made}, [])
    monkeypatch.setattr(text, "prepare_text", lambda *args: fetch.Asset(tmp_path / "news", manifest))
    assert offline_task("boolq", tmp_path / "data") is None and not (tmp_path / "data").exists()
    folder = offline_task("news_choice", tmp_path / "data")
    assert folder == tmp_path / "data" / "zero_shot" / "news_choice"
    assert offline_task("news_choice", tmp_path / "data", seed=2).name == "news_choice-seed2"
    lm_eval_or_skip()
    found = evaluate(*model_and_tokenizer, ["news_choice"], folder, limit=2)
    assert found["news_choice"]["n"] == 2
