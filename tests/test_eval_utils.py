"""What is measured of a model, against counts and values by hand."""

import copy
import math

import numpy as np
import pytest
import torch
import transformers

from common import eval_utils
from common.blocks import blocks_of, total_cost
from common.data import Split
from common.eval_utils import (
    classification_metrics,
    comparison,
    evaluate_perplexity,
    evaluating,
    latency,
    macs_per_example,
    predict,
)
from common.pruning import shrink_
from common.runs import UserError
from tests.test_families import FAMILY_CASES, random_model, uneven_keep

CPU = torch.device("cpu")


def split_of(lengths, labels=None):
    ids = np.random.default_rng(0).integers(3, 50, sum(lengths)).astype(np.int32)
    labels = np.zeros(len(lengths), np.int64) if labels is None else np.asarray(labels)
    return Split(ids, np.concatenate([[0], np.cumsum(lengths)]), labels, 0, 0)


# --------------------------------------------------------------------------------------------------------- predictions


def test_evaluating_puts_the_mode_back():
    model = torch.nn.Dropout()
    for training in (True, False):
        model.train(training)
        with evaluating(model) as inside:
            assert inside is model and not model.training and torch.is_inference_mode_enabled()
        assert model.training is training
        with pytest.raises(ZeroDivisionError), evaluating(model):
            _ = 1 / 0
        assert model.training is training and not torch.is_inference_mode_enabled()


@pytest.mark.parametrize("family", ["bert", "distilbert", "roberta"])
def test_predict_is_each_example_alone_in_the_order_of_the_split(family):
    model, _ = random_model(family)
    model.train()  # predictions are made without dropout
    split = split_of([5, 2, 9, 3, 3, 7, 1])
    logits, features = predict(model, split, CPU, batch_size=3, features=True)
    assert model.training and torch.equal(predict(model, split, CPU, batch_size=3), logits)
    model.eval()
    for i, (start, end) in enumerate(zip(split.offsets[:-1], split.offsets[1:], strict=True)):
        with torch.no_grad():
            one = torch.from_numpy(split.ids[None, start:end].astype(np.int64))
            output = model(input_ids=one, attention_mask=torch.ones_like(one), output_hidden_states=True)
        torch.testing.assert_close(logits[[i]], output.logits, rtol=1e-4, atol=1e-4)
        torch.testing.assert_close(features[[i]], output.hidden_states[-1][:, 0], rtol=1e-4, atol=1e-4)


def test_what_predict_returns_can_be_trained_against():
    model, _ = random_model("bert")
    for tensor in predict(model, split_of([4, 4]), CPU, precision="bf16-mixed", features=True):
        assert tensor.dtype == torch.float32 and not tensor.requires_grad and not tensor.is_inference()


def test_classification_metrics_by_hand():
    """Predicted 1 1 1 0 0, true 1 0 1 1 0: three right; class 1: 2 found of 3, 2 right of 3."""
    logits = torch.tensor([[0.0, 1], [0, 1], [0, 1], [1, 0], [1, 0]])
    found = classification_metrics(logits, np.array([1, 0, 1, 1, 0]))
    assert found == {"accuracy": pytest.approx(3 / 5), "f1": pytest.approx(2 / 3), "n": 5}
    assert classification_metrics(logits[3:], np.array([1, 1]))["f1"] == 0  # never predicted: zero, and no warning


def test_macro_f1_by_hand():
    """Class 0: precision 1, recall 1/2; class 1: 1/2 and 1; class 2: 1 and 1."""
    logits = torch.eye(3)[[0, 1, 1, 2]]
    found = classification_metrics(logits, np.array([0, 0, 1, 2]))
    assert found == {"accuracy": 0.75, "f1": pytest.approx((2 / 3 + 2 / 3 + 1) / 3), "n": 4}


# ----------------------------------------------------------------------------------------------------------- perplexity

CAUSAL = [family for family, (_, head, _) in FAMILY_CASES.items() if head == "CausalLM"]


def stream(n, seed=0):
    return np.random.default_rng(seed).integers(0, 50, n).astype(np.int32)


def log_probabilities(model, window):
    """(T, V) float64 of one window, from the logits of the whole model."""
    with torch.no_grad():
        return model(input_ids=torch.as_tensor(window, dtype=torch.int64)[None]).logits[0].double().log_softmax(1)


def brute_force(model, tokens, token_length, stride):
    """Nll, scored tokens and windows that score one, target by target, as Hugging Face's recipe goes."""
    nll, scored, scored_to, n_windows = 0.0, [], 0, 0
    for start in range(0, len(tokens), stride):
        window = tokens[start : start + token_length]
        found = log_probabilities(model, window)
        for t in range(1, len(window)):
            if start + t >= scored_to:
                nll -= float(found[t - 1, window[t]])
                scored.append(start + t)
        scored_to = start + len(window)
        n_windows += bool(scored) and scored[-1] > start
        if scored_to == len(tokens):
            return nll, scored, n_windows


def wanda(model, tokens, seqlen):
    """`eval_ppl_wikitext` of locuslab/wanda, lib/eval.py, for a batch of one."""
    n, nlls = len(tokens) // seqlen, []
    for i in range(n):
        inputs = torch.as_tensor(tokens[i * seqlen : (i + 1) * seqlen], dtype=torch.int64)[None]
        with torch.no_grad():
            logits = model(inputs).logits[:, :-1].double()
        loss = torch.nn.CrossEntropyLoss()(logits.reshape(-1, logits.size(-1)), inputs[:, 1:].reshape(-1))
        nlls.append(loss * seqlen)
    return float(torch.exp(torch.stack(nlls).sum() / (n * seqlen)))


# tail of 5, of 1 (scores nothing), none; overlaps with a tail, with none and where the window before reaches the end; a window
# that is longer than the stream; the shortest
SHAPES = [(53, 12, 12), (49, 12, 12), (48, 12, 12), (53, 12, 5), (52, 12, 5), (45, 12, 11), (51, 12, 11), (40, 16, 1),
          (9, 12, 12), (9, 12, 4), (2, 2, 1), (7, 2, 2), (12, 12, 3), (13, 12, 12)]  # fmt: skip


@pytest.mark.parametrize(("n", "token_length", "stride"), SHAPES)
def test_perplexity_is_that_of_brute_force(n, token_length, stride):
    model, _ = random_model("llama")
    tokens = stream(n)
    for dtype, tolerance in ((torch.float32, 1e-6), (torch.float64, 1e-12)):
        nll, scored, n_windows = brute_force(model.to(dtype), tokens, token_length, stride)
        found = evaluate_perplexity(model, tokens, token_length, stride, batch_size=3)
        assert found["perplexity"] == pytest.approx(math.exp(nll / len(scored)), rel=tolerance)
        assert found["nll"] == pytest.approx(nll, rel=tolerance)
    assert (found["n_tokens"], found["n_windows"]) == (len(scored), n_windows)
    assert scored == [i for i in range(1, n) if i % token_length or stride < token_length]
    assert (found["token_length"], found["stride"]) == (token_length, stride)
    assert (found["protocol"], found["tail"]) == ("tokens", "kept")


@pytest.mark.parametrize("family", CAUSAL)
def test_perplexity_of_every_family(family):
    model, _ = random_model(family)
    tokens = stream(77)
    for token_length, stride in ((16, 16), (16, 15), (20, 7)):
        nll, scored, _ = brute_force(model, tokens, token_length, stride)
        found = evaluate_perplexity(model, tokens, token_length, stride)
        assert found["perplexity"] == pytest.approx(math.exp(nll / len(scored)), rel=1e-6) and found["n_tokens"] == len(scored)
    found = evaluate_perplexity(model, tokens, 16, protocol="wanda")
    assert found["perplexity"] == pytest.approx(wanda(model, tokens, 16), rel=1e-6)


@pytest.mark.parametrize(("n", "token_length"), [(53, 12), (48, 12), (12, 12), (23, 12), (7, 2)])
def test_the_protocol_of_wanda(n, token_length):
    model, _ = random_model("llama")
    found = evaluate_perplexity(model.double(), stream(n), token_length, protocol="wanda", batch_size=2)
    assert found["perplexity"] == pytest.approx(wanda(model, stream(n), token_length), rel=1e-12)
    assert found["n_windows"] == n // token_length and found["n_tokens"] == n // token_length * (token_length - 1)
    assert (found["protocol"], found["tail"], found["stride"]) == ("wanda", "dropped", token_length)


def test_perplexity_of_a_model_that_knows_nothing():
    """All logits alike: the vocabulary, whatever the windows."""
    model, _ = random_model("llama")
    torch.nn.init.zeros_(model.lm_head.weight)
    for settings in ({"stride": 3}, {"protocol": "wanda"}, {"precision": "bf16-mixed"}):
        assert evaluate_perplexity(model, stream(40), 8, **settings)["perplexity"] == pytest.approx(50, rel=1e-7)


def test_perplexity_is_the_rolling_log_likelihood_of_lm_eval():
    """Its windows are ours with stride = token_length - 1, where the last one is full; its prefix is our first token."""
    lm_eval = pytest.importorskip("lm_eval.utils", reason="lm-eval is not installed (requirements-extra.txt)")
    model, _ = random_model("llama")
    token_length, prefix, tokens = 12, 7, stream(55).tolist()
    rolling = lm_eval.get_rolling_token_windows(tokens, prefix, max_seq_len=token_length - 1, context_len=1)
    windows = [lm_eval.make_disjoint_window(window) for window in rolling]
    whole = [prefix, *tokens]
    assert [c + t for c, t in windows] == [whole[s : s + token_length] for s in range(0, 55, token_length - 1)]
    nll = 0.0
    for context, targets in windows:  # as `HFLM._loglikelihood_tokens`
        found = log_probabilities(model, (context + targets)[:-1])[-len(targets) :]
        nll -= float(found[range(len(targets)), targets].sum())
    found = evaluate_perplexity(model, whole, token_length, token_length - 1)
    assert found["n_tokens"] == 55 and found["nll"] == pytest.approx(nll, rel=1e-6)


@pytest.mark.parametrize("settings", [{"stride": 12}, {"stride": 5}, {"protocol": "wanda"}])
def test_perplexity_does_not_depend_on_batches_and_chunks(settings, monkeypatch):
    model, _ = random_model("qwen3")
    found = evaluate_perplexity(model, stream(101), 12, **settings)
    for batch_size in (1, 2, 5):
        again = evaluate_perplexity(model, stream(101), 12, batch_size=batch_size, **settings)
        assert again == found | {name: pytest.approx(found[name], rel=1e-6) for name in ("perplexity", "nll")}
    for numbers in (1, 50 * 3, 10**9):
        monkeypatch.setattr(eval_utils, "LOGITS_AT_ONCE", {"cpu": numbers, "cuda": numbers})
        again = evaluate_perplexity(model, stream(101), 12, **settings)
        assert again == found | {name: pytest.approx(found[name], rel=1e-6) for name in ("perplexity", "nll")}


def test_only_scored_positions_reach_the_head_a_few_at_a_time(monkeypatch):
    model, _ = random_model("llama")
    monkeypatch.setattr(eval_utils, "LOGITS_AT_ONCE", {"cpu": 50 * 7, "cuda": 0})
    rows, forwards = [], []
    model.lm_head.register_forward_pre_hook(lambda module, args: rows.append(args[0].shape))
    model.base_model.register_forward_hook(lambda module, args, kwargs, output: forwards.append(
        (tuple(kwargs["input_ids"].shape), output.past_key_values, torch.is_grad_enabled())), with_kwargs=True)  # fmt: skip
    found = evaluate_perplexity(model, stream(53), 12, 5, batch_size=4)
    assert all(shape[0] <= 7 and shape[1:] == (32,) for shape in rows)
    assert sum(shape[0] for shape in rows) == found["n_tokens"] == 52
    assert forwards == [((1, 12), None, False), ((4, 12), None, False), ((4, 12), None, False), ((1, 8), None, False)]
    forwards.clear()
    evaluate_perplexity(model, stream(9001), 1000)
    assert [shape for shape, *_ in forwards] == [(4, 1000), (4, 1000), (1, 1000)]  # and no tail of one


@pytest.mark.parametrize("kind", ["memory map", "list", "tensor", "int64", "uint16"])
def test_tokens_of_any_kind(kind, tmp_path):
    model, _ = random_model("opt")
    tokens = stream(53)
    expected = evaluate_perplexity(model, tokens, 12, 5)
    np.save(tmp_path / "tokens.npy", tokens)
    same = {"memory map": np.load(tmp_path / "tokens.npy", mmap_mode="r"), "list": tokens.tolist(),
            "tensor": torch.from_numpy(tokens)}.get(kind)  # fmt: skip
    assert evaluate_perplexity(model, tokens.astype(kind) if same is None else same, 12, 5) == expected


def state_of(model):
    config = copy.deepcopy(model.config.to_dict())
    return (model.training, config, model.config._attn_implementation, {p.dtype for p in model.parameters()},
            [(p.requires_grad, p.grad) for p in model.parameters()], torch.is_grad_enabled())  # fmt: skip


@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("attention", ["eager", "sdpa"])
def test_the_model_is_left_as_found(training, dtype, attention):
    model, _ = random_model("opt")  # which has dropout
    model.to(dtype).train(training).set_attn_implementation(attention)
    weights, before = copy.deepcopy(model.state_dict()), state_of(model)
    assert model.config.use_cache
    found = evaluate_perplexity(model, stream(30), 12)
    assert state_of(model) == before and found == evaluate_perplexity(model, stream(30), 12)  # no dropout either
    assert all(torch.equal(tensor, weights[name]) for name, tensor in model.state_dict().items())
    assert found["perplexity"] == pytest.approx(evaluate_perplexity(model.float(), stream(30), 12)["perplexity"], rel=0.05)
    model.to(dtype)
    model(input_ids=torch.arange(8)[None], labels=torch.arange(8)[None]).loss.backward()  # and it can be trained
    model.zero_grad()

    def fail(*_):
        raise ZeroDivisionError

    for module in (model.lm_head, model.base_model):
        hook = module.register_forward_pre_hook(fail)
        with pytest.raises(ZeroDivisionError):
            evaluate_perplexity(model, stream(30), 12)
        hook.remove()
        assert state_of(model) == before


def test_perplexity_in_bf16_is_near():
    model, _ = random_model("llama")
    exact = evaluate_perplexity(model, stream(200), 20)
    near = evaluate_perplexity(model, stream(200), 20, precision="bf16-mixed")
    assert exact["perplexity"] != near["perplexity"] == pytest.approx(exact["perplexity"], rel=0.05)
    assert not torch.is_autocast_enabled("cpu")


def test_the_bar_counts_windows(capsys):
    model, _ = random_model("llama")
    evaluate_perplexity(model, stream(53), 12)
    assert capsys.readouterr().err == ""
    evaluate_perplexity(model, stream(53), 12, progress="🧮 Computing perplexity", batch_size=2)
    shown = capsys.readouterr().err
    assert "🧮 Computing perplexity: 100%" in shown and "5/5" in shown


def test_what_has_no_perplexity_is_refused_before_any_forward():
    model, _ = random_model("opt")  # 32 positions, 50 tokens

    def forward(*_):
        raise AssertionError("a forward")

    model.base_model.register_forward_pre_hook(forward)
    outside = np.concatenate([stream(60), [50]])
    for tokens, settings, message in [
        (stream(60)[:1], {}, "1 tokens: too few, expected 2"),
        ([], {}, "expected integers in one dimension, found float64|0 tokens: too few"),
        (stream(11), {"protocol": "wanda"}, "11 tokens: too few, expected 12"),
        (stream(60), {"token_length": 1}, "--token_length 1: .* expected 2 to 32"),
        (stream(60), {"token_length": 33}, "--token_length 33: this opt model has 32 positions; expected 2 to 32"),
        (stream(60), {"stride": 0}, "--stride 0: expected 1 to 12"),
        (stream(60), {"stride": 13}, "--stride 13: expected 1 to 12"),
        (stream(60), {"stride": 6, "protocol": "wanda"}, "--stride 6: expected 12 "),
        (stream(60), {"batch_size": 0}, "--batch_size 0: expected 1 or more"),
        (stream(60), {"protocol": "words"}, "protocol 'words': expected one of tokens, wanda"),
        (stream(60), {"precision": "16-mixed"}, "--precision 16-mixed: needs CUDA"),
        (outside, {}, "token 50: not in the vocabulary of this model .0 to 49."),
        (-outside, {}, "token -50: not in the vocabulary"),
        (stream(60)[None], {}, r"expected integers in one dimension, found int32 of shape \(1, 60\)"),
        (stream(60) / 2, {}, "expected integers in one dimension, found float64"),
    ]:
        with pytest.raises(UserError, match=message):
            evaluate_perplexity(model, tokens, **{"token_length": 12} | settings)


@pytest.mark.parametrize("name", ["BertForMaskedLM", "BertLMHeadModel", "RobertaForCausalLM", "RobertaForMaskedLM",
                                  "DistilBertForMaskedLM", "LlamaForSequenceClassification", "LlamaModel"])  # fmt: skip
def test_what_is_no_causal_model_is_refused(name):
    made = getattr(transformers, name)
    settings = next(settings for prefix, _, settings in FAMILY_CASES.values() if name.startswith(prefix))
    with pytest.raises(UserError, match=f"{name}: perplexity needs a causal language model"):
        evaluate_perplexity(made(made.config_class(**settings)), stream(60), 12)


def test_a_family_whose_head_is_not_known_is_refused():
    model = transformers.GPT2LMHeadModel(transformers.GPT2Config(n_layer=1, n_head=2, n_embd=8, vocab_size=50))
    with pytest.raises(UserError, match="model type 'gpt2' is not supported"):
        evaluate_perplexity(model, stream(60), 12)


@pytest.mark.parametrize(("weight", "shown"), [(float("nan"), "perplexity is nan"), (1e6, "perplexity is inf")])
def test_a_perplexity_that_is_not_finite_is_a_user_error(weight, shown):
    model, _ = random_model("llama")
    with torch.no_grad():
        model.lm_head.weight[:25] *= weight
    with pytest.raises(UserError, match=shown):
        evaluate_perplexity(model, stream(60), 12)


# ------------------------------------------------------------------------------------------------------- size and work


def test_directory_bytes_counts_what_lies_below(tmp_path):
    (tmp_path / "inner").mkdir()
    (tmp_path / "a").write_bytes(b"x" * 100)
    (tmp_path / "inner" / "b").write_bytes(b"x" * 23)
    assert eval_utils.directory_bytes(tmp_path) == 123


def test_macs_by_hand():
    """BERT, 3 layers: four 32 x 32 products a token, two of 32 x 48, and 2 T^2 x 32 of attention; then pooler and head."""
    model, _ = random_model("bert")
    t = 10
    layer = t * (4 * 32 * 32 + 2 * 32 * 48) + 2 * t * t * 32
    model.train()
    assert macs_per_example(model, t) == 3 * layer + 32 * 32 + 32 * 2
    assert model.training


@pytest.mark.parametrize("family", ["bert", "distilbert", "opt", "llama"])
def test_macs_measured_are_those_that_the_budget_counts(family):
    """Also of a model with layers of different shapes; what is not in the blocks is the same before and after."""
    model, _ = random_model(family)
    outside = []
    for keep in (None, uneven_keep(blocks_of(model))):
        if keep:
            shrink_(model, keep)
        outside.append(macs_per_example(model, 12) - 12 * total_cost(blocks_of(model), "macs", 12))
    assert outside[0] == outside[1] == {"bert": 32 * 32 + 64, "distilbert": 32 * 32 + 64}.get(family, 12 * 32 * 50)


# ---------------------------------------------------------------------------------------------------- memory and latency


def tiny(**settings):
    config = transformers.BertConfig(hidden_size=16, num_hidden_layers=1, num_attention_heads=2, intermediate_size=16,
                                     vocab_size=100, **settings)  # fmt: skip
    return transformers.BertForSequenceClassification(config)


def test_latency_says_what_it_measured_and_puts_modes_back():
    models = {"a": tiny().train(), "b": tiny().eval()}
    turns = []
    for name, model in models.items():
        model.register_forward_pre_hook(lambda module, args, name=name: turns.append((name, module.training)))
    measured = latency(models, batch_size=4, length=8, device=CPU, seconds=0.0)
    assert list(measured) == ["a", "b"] and models["a"].training and not models["b"].training
    for values in measured.values():
        assert set(values) == {"latency_ms", "latency_p95_ms", "examples_per_second", "runs"} and values["runs"] == 10
        assert 0 < values["latency_ms"] <= values["latency_p95_ms"]
        assert values["examples_per_second"] == pytest.approx(4 / values["latency_ms"] * 1e3)
    assert turns == [("a", False), ("b", False)] + 2 * ([("a", False)] * 6 + [("b", False)] * 6)


def test_latency_puts_modes_back_after_an_error():
    models = {"a": tiny().train(), "b": tiny(max_position_embeddings=4).train()}
    with pytest.raises((IndexError, RuntimeError)):
        latency(models, 1, 8, CPU, seconds=0.0)
    assert models["a"].training and models["b"].training


def test_measure_classifiers(tmp_path, monkeypatch):
    """Of a model and its pruned copy, from their directories; memory in a process of its own, at least the weights."""
    wide = transformers.BertConfig(vocab_size=20_000, hidden_size=256, num_hidden_layers=1, num_attention_heads=4,
                                   intermediate_size=128)  # fmt: skip
    dense = transformers.BertForSequenceClassification(wide)
    dense.save_pretrained(tmp_path / "dense")
    n_parameters, n_block = sum(p.numel() for p in dense.parameters()), 4 * (256 * 256 + 256) + 2 * 256 * 128 + 128 + 256
    keep = {"heads": [torch.tensor([True] * 4)], "neurons": [torch.arange(128) < 96]}
    shrink_(dense, keep)
    dense.save_pretrained(tmp_path / "pruned")

    weights, ask = 4 * n_parameters, eval_utils.peak_memory
    memory = ask(tmp_path / "dense", 2, 8, CPU)
    assert 0.8 * weights < memory < 8 * weights
    monkeypatch.setattr(eval_utils, "peak_memory", lambda *_: memory)
    split = split_of([5, 2, 9], labels=[0, 1, 1])
    paths = {"dense": tmp_path / "dense", "pruned": tmp_path / "pruned"}
    measured, logits = eval_utils.measure_classifiers(paths, split, CPU, batch_size=2, length=8)
    assert measured["dense"]["parameters"] == n_parameters and measured["dense"]["block_parameters"] == n_block
    assert measured["pruned"]["block_parameters"] == n_block - 32 * (2 * 256 + 1)
    assert measured["pruned"]["sparsity"] == pytest.approx(32 * 513 / n_block) and "sparsity" not in measured["dense"]
    for name, values in measured.items():
        assert values["n"] == 3 and values["bytes"] > 4 * values["parameters"]
        expected = predict(eval_utils.load_classifier(paths[name]), split, CPU)
        assert torch.equal(logits[name], expected)
        assert values["accuracy"] == pytest.approx(float((expected.argmax(1).numpy() == split.labels).mean()))


# --------------------------------------------------------------------------------------------------------------- tables


def test_comparison_by_hand():
    measured = {
        "dense": {"accuracy": 0.9, "parameters": 22_000_000, "latency_ms": 50.0, "n": 3},
        "pruned": {"accuracy": 0.85, "parameters": 11_000_000, "latency_ms": 20.0, "sparsity": 0.6, "n": 3},
    }
    assert comparison(measured) == [
        ["", "dense", "pruned", "ratio"],
        ["accuracy", "0.9000", "0.8500", ""],
        ["sparsity measured", "", "0.6000", ""],
        ["parameters", "22.00 M", "11.00 M", "0.50"],
        ["latency, median", "50.0 ms", "20.0 ms", "0.40"],
    ]


def test_comparison_of_three_where_one_has_no_value():
    """As a table of a dense model, one that was pruned, and one from elsewhere."""
    rows = comparison({"dense": {"f1": 0.5}, "other": {"f1": 0.25}, "pruned": {"f1": 0.5, "sparsity": 0.25}})
    assert rows == [["", "dense", "other", "ratio", "pruned", "ratio"], ["F1", "0.5000", "0.2500", "", "0.5000", ""],
                    ["sparsity measured", "", "", "", "0.2500", ""]]  # fmt: skip


def test_layers_left_shows_kv_heads_where_there_are_such():
    before = [{"heads": 4, "kv_heads": 4, "neurons": 48}, {"heads": 4, "kv_heads": 4, "neurons": 48}]
    after = [{"heads": 3, "kv_heads": 3, "neurons": 7}, {"heads": 4, "kv_heads": 4, "neurons": 48}]
    assert eval_utils.layers_left(before, after) == [["layer", "heads", "neurons"], [0, "3/4", "7/48"], [1, "4/4", "48/48"]]
    grouped = [{"heads": 4, "kv_heads": 2, "neurons": 48}], [{"heads": 2, "kv_heads": 1, "neurons": 40}]
    assert eval_utils.layers_left(*grouped) == [["layer", "heads", "kv_heads", "neurons"], [0, "2/4", "1/2", "40/48"]]


def test_the_peak_of_this_process_grows():
    before = eval_utils.peak_of("cpu")
    block = np.ones(before // 8 + 2**24)  # more than was ever held
    assert eval_utils.peak_of("cpu") == eval_utils.resident_peak() >= block.nbytes > before > 2**20
