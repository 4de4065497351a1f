"""What is measured of a model, against counts and values by hand."""

import numpy as np
import pytest
import torch
import transformers

from common import eval_utils
from common.blocks import blocks_of, total_cost
from common.data import Split
from common.eval_utils import classification_metrics, comparison, evaluating, latency, macs_per_example, predict
from common.pruning import shrink_
from tests.test_families import random_model, uneven_keep

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
