"""What is said of perplexities that are out of bounds, and the small parts of the console."""

import math

import pytest
import torch
from safetensors.torch import load_file, save_file

from common import eval_utils, following
from tests.test_finetune_dense import random_llama, tiny  # noqa: F401


def saved(folder, change=None):
    model = random_llama()
    if change is not None:
        with torch.no_grad():
            change(model)
    model.save_pretrained(folder)
    return folder


def test_a_perplexity_within_bounds_is_not_explained(tmp_path):
    start = saved(tmp_path / "m")
    assert following.explain(100.0, 80.0, start, start, 0.1, 8192) == ""
    assert following.explain(1599.0, 80.0, start, start, 0.1, 8192) == ""
    assert following.explain(1600.0, 80.0, start, start, 0.1, 8192) != ""  # twenty times
    assert following.explain(8192.0, 5000.0, start, start, 0.1, 8192) != ""  # guessing


def empty_one(model):
    for projection in (model.model.layers[0].self_attn.q_proj, model.model.layers[0].mlp.up_proj):
        projection.weight.zero_()


def test_pruning_is_the_cause(tmp_path):
    base, start = saved(tmp_path / "base"), saved(tmp_path / "start", empty_one)
    said = following.explain(5000.0, 80.0, start, base, 0.1, 8192)
    assert said.startswith("⚠️ a perplexity of 5000.00 is absurd for this model.")
    loaded, density, architecture = said.splitlines()[1:]
    n = len(load_file(start / "model.safetensors"))
    assert loaded == f"  ✅ weights loaded: missing 0, not finite 0 of {n} tensors"
    zeros, total = (64 * 64 + 96 * 64), 2 * (2 * 64 * 64 + 2 * 32 * 64 + 3 * 96 * 64)
    assert f"  ❌ density: asked 0.1, measured {1 - zeros / total:.4f}; projections with no weight left: 2. " in density
    assert "from 80.00 to 5000.00" in density and "--sparsity" in density
    assert architecture == "  ✅ architecture: llama; the dense model's perplexity is 80.00, that of guessing 8,192"


def test_weights_that_are_not_there_are_the_cause(tmp_path):
    base = saved(tmp_path / "base")
    tensors = load_file(base / "model.safetensors")
    lost = tensors.pop("model.layers.1.mlp.down_proj.weight")
    assert lost.numel()
    save_file(tensors, base / "model.safetensors", metadata={"format": "pt"})
    start = saved(tmp_path / "start", lambda model: model.model.norm.weight.fill_(math.nan))
    said = following.explain(math.inf, 80.0, start, base, 0.1, 8192)
    assert "❌ weights loaded: missing 1, not finite 1 of" in said
    assert "model.layers.1.mlp.down_proj.weight, model.norm.weight" in said


def test_weights_that_the_pruned_model_lacks_are_the_cause(tmp_path):
    base, start = saved(tmp_path / "base"), saved(tmp_path / "start")
    tensors = load_file(start / "model.safetensors")
    kept = {name: value for name, value in tensors.items() if ".mlp." not in name}
    save_file(kept, start / "model.safetensors", metadata={"format": "pt"})
    said = following.explain(9000.0, 80.0, start, base, 0.1, 8192)
    assert f"❌ weights loaded: missing {len(tensors) - len(kept)}, " in said and "✅ density" in said


@pytest.mark.parametrize(("share", "text"), [(0.1, "0.10"), (0.05, "0.05"), (0.004, "0.004"), (0.996, "0.996"), (1.0, "1.00")])
def test_shares(share, text):
    assert following.shown(share) == text


def test_a_dense_model_that_only_guesses_is_the_cause(tmp_path):
    base = saved(tmp_path / "base")
    said = following.explain(9000.0, 8500.0, base, base, 0.1, 8192)
    assert "✅ weights loaded" in said and "✅ density" in said
    assert "❌ architecture: llama; the dense model's perplexity is 8500.00, that of guessing 8,192: config, tokenizer" in said


@pytest.mark.parametrize(("before", "now", "shown"), [(27.45, 25.82, "↓5.9%"), (20.0, 25.0, "↑25.0%"), (3.0, 3.0, "↓0.0%")])
def test_arrows(before, now, shown):
    assert following.change(before, now) == shown


def test_the_summary_of_the_guide():
    epochs = {"3": {"perplexity": 23.9}, "4": {"perplexity": 23.51}, "5": {"perplexity": 23.67}, "10": {"perplexity": 23.8}}
    record = {"perplexity": {"dense": 20.0, "baseline": 27.45}, "epochs": epochs, "best_epoch": 4}
    assert following.summary(record).splitlines()[4:] == [
        "  Dense: 20.00", "  Baseline: 27.45", "  Final (Epoch 10): 23.80", "  Best (Epoch 4, by validation): 23.51",
        "  Total Improvement: +13.3%", "=" * 70]  # fmt: skip


def test_memory_in_use_sees_what_is_allocated():
    device = torch.device("cpu")
    eval_utils.reset_peak(device)
    before, _ = eval_utils.memory_in_use(device)
    held = torch.ones(32 * 2**20)  # 128 MiB
    now, peak = eval_utils.memory_in_use(device)
    assert 120 * 2**20 < now - before < 160 * 2**20 and peak >= now
    del held
    after, peak = eval_utils.memory_in_use(device)
    assert after - before < 40 * 2**20 < peak - before
