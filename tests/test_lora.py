"""Adapters on sparse models against brute force: what they compute, how they learn, what a merge leaves."""

import pytest
import torch
from peft.tuners.lora.layer import Linear
from torch import nn
from torch.nn import functional

from common import lora
from common.blocks import blocks_of
from common.lora import SparseLinear, add_lora, merge_
from common.runs import UserError
from common.sparse_trainer import check_sparsity, masks_of, prunable_weights
from tests.test_sparse_trainer import FAMILIES, drawn, pruned, same_zeros, trainer_of, zero_places
from tests.test_streaming import IDS, one_thread, random_lm  # noqa: F401

R, ALPHA = 4, 12.0  # a scale of 3


def adapted(case="llama", kind="unstructured", sparse=True, dropout=0.0, dtype=torch.float32, effect=True):
    """A pruned model with adapters; with an effect: not at their start, where B is zero."""
    model = add_lora(pruned(case, kind, dtype), R, ALPHA, dropout, sparse)
    if effect:
        with torch.no_grad():
            for i, (name, p) in enumerate(model.named_parameters()):
                if "lora_" in name:
                    p.copy_(0.3 * drawn(*p.shape, seed=i))
    return model.eval()


def layers(model):
    return {name: module for name, module in model.named_modules() if isinstance(module, Linear)}


def parts(layer):
    """Weight, A, B in float64, each a leaf that autograd knows; and the weights that are not zero."""
    weight, a, b = layer.base_layer.weight, layer.lora_A["default"].weight, layer.lora_B["default"].weight
    found = [part.detach().double().requires_grad_() for part in (weight, a, b)]  # (out, in), (r, in), (out, r)
    return *found, (weight != 0).double()


def logits_of(model):
    with torch.no_grad():
        return model(input_ids=IDS, use_cache=False).logits


@pytest.mark.parametrize("case", FAMILIES)
def test_an_adapter_on_every_projection_and_nothing_else(case):
    model, plain = adapted(case, "blocks"), pruned(case, "blocks")
    wanted = {f"base_model.model.{name.removesuffix('.weight')}" for name in prunable_weights(plain)}
    found = layers(model)
    assert set(found) == wanted and all(type(layer) is SparseLinear for layer in found.values())
    trained = {name for name, p in model.named_parameters() if p.requires_grad}
    assert trained == {f"{name}.lora_{part}.default.weight" for name in wanted for part in "AB"}
    assert all(layer.lora_A["default"].weight.shape[0] == R for layer in found.values())
    assert set(prunable_weights(model).values()) == {layer.base_layer.weight for layer in found.values()}
    assert check_sparsity(model) == check_sparsity(plain) > 0.3


@pytest.mark.parametrize("case", ["llama", "qwen2", "opt"])  # the last two have biases
def test_a_layer_by_brute_force(case):
    for i, layer in enumerate(layers(adapted(case)).values()):
        weight, a, b, kept = parts(layer)
        x, upstream = drawn(3, 5, layer.in_features, seed=i), drawn(3, 5, layer.out_features, seed=100 + i)
        bias = layer.base_layer.bias
        wanted = functional.linear(x.double(), weight + kept * (ALPHA / R * b @ a), None if bias is None else bias.double())
        found = layer(x)
        torch.testing.assert_close(found.double(), wanted, rtol=1e-5, atol=1e-5)
        assert (found - functional.linear(x, layer.base_layer.weight, bias)).abs().max() > 0.1
        (wanted * upstream).sum().backward()
        (found * upstream).sum().backward()
        for ours, brute in ((layer.lora_A["default"].weight, a), (layer.lora_B["default"].weight, b)):
            torch.testing.assert_close(ours.grad.double(), brute.grad, rtol=1e-4, atol=1e-4)
            assert brute.grad.abs().min() > 0
        assert layer.base_layer.weight.grad is None


def test_dropout_is_before_the_adapter_alone():
    layer = next(iter(layers(adapted(dropout=0.4)).values())).train()
    weight, a, b, kept = parts(layer)
    x = drawn(50, layer.in_features)
    torch.manual_seed(7)
    found = layer(x)
    torch.manual_seed(7)
    dropped = functional.dropout(x, 0.4).double()
    assert 0.3 < (dropped == 0).double().mean() < 0.5
    delta = kept * (ALPHA / R * b @ a)  # (out, in)
    torch.testing.assert_close(found.double(), x.double() @ weight.T + dropped @ delta.T, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(layer.eval()(x).double(), x.double() @ (weight + delta).T, rtol=1e-5, atol=1e-5)


def test_a_base_in_half_precision():
    layer = next(iter(layers(adapted(dtype=torch.bfloat16)).values()))
    weight, a, b, kept = parts(layer)
    x = drawn(5, layer.in_features).bfloat16()
    found = layer(x)
    assert found.dtype == torch.bfloat16 and {p.dtype for p in (layer.lora_A["default"].weight,)} == {torch.float32}
    torch.testing.assert_close(found.double(), x.double() @ (weight + kept * (ALPHA / R * b @ a)).T, rtol=0.05, atol=0.05)


@pytest.mark.parametrize("sparse", [True, False])
def test_adapters_have_no_effect_at_their_start(sparse):
    model = adapted(sparse=sparse, effect=False)
    assert torch.equal(logits_of(model), logits_of(pruned("llama", "unstructured")))
    with torch.no_grad():
        for layer in layers(model).values():
            layer.lora_B["default"].weight.fill_(0.1)
    with_effect = logits_of(model)
    assert (with_effect - logits_of(pruned("llama", "unstructured"))).abs().max() > 0.1
    with model.disable_adapter():
        assert torch.equal(logits_of(model), logits_of(pruned("llama", "unstructured")))
    assert torch.equal(logits_of(model), with_effect)


@pytest.mark.parametrize("case", FAMILIES)
def test_the_merged_model_is_the_trained_one(case):
    kind = ("blocks", "2:4", "unstructured")[FAMILIES.index(case) % 3]
    model, base = adapted(case, kind, dropout=0.3), pruned(case, kind)
    wanted, by_hand = logits_of(model), {}
    for name, layer in layers(model).items():
        weight, a, b, kept = parts(layer)
        by_hand[f"{name.removeprefix('base_model.model.')}.weight"] = (weight + kept * (ALPHA / R * b @ a)).detach()
    merged = merge_(model)
    assert type(merged) is type(base) and not layers(merged)
    torch.testing.assert_close(logits_of(merged), wanted, rtol=1e-4, atol=1e-4)
    assert (wanted - logits_of(base)).abs().max() > 0.1
    assert same_zeros(zero_places(merged), zero_places(base)) and check_sparsity(merged) == check_sparsity(base)
    for name, weight in prunable_weights(merged).items():
        torch.testing.assert_close(weight.double(), by_hand[name], rtol=1e-5, atol=1e-5)
    assert {name: p.shape for name, p in merged.named_parameters()} == {name: p.shape for name, p in base.named_parameters()}


def test_a_plain_merge_fills_the_zeros():
    model, base = adapted(sparse=False), pruned("llama", "unstructured")
    assert not any(isinstance(layer, SparseLinear) for layer in layers(model).values()) and len(layers(model)) == 21
    wanted, masks = logits_of(model), masks_of(base)
    merged = merge_(model)
    torch.testing.assert_close(logits_of(merged), wanted, rtol=1e-4, atol=1e-4)
    filled = [weight[~masks[name].free()].count_nonzero() / (~masks[name].free()).sum()
              for name, weight in prunable_weights(merged).items()]  # fmt: skip
    assert min(filled) > 0.99 and check_sparsity(merged) < 0.01 < 0.4 < check_sparsity(base)


@pytest.mark.parametrize("checkpointed", [False, True])
def test_training_moves_adapters_and_nothing_else(checkpointed, tmp_path):
    model = adapted(effect=False, dropout=0.1)
    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    how = {"max_steps": 6, "gradient_accumulation_steps": 2, "weight_decay": 0.1, "activation_checkpointing": checkpointed}
    trainer_of(model, tmp_path, masks={}, more=how | {"learning_rate": 0.02}).train()
    for name, p in model.named_parameters():
        assert ("lora_" in name) == bool((p != before[name]).any()), name
    wanted = logits_of(model.eval())
    merged = merge_(model)
    torch.testing.assert_close(logits_of(merged), wanted, rtol=1e-4, atol=1e-4)
    assert same_zeros(zero_places(merged), zero_places(pruned("llama", "unstructured")))


def test_a_projections_name_elsewhere_is_refused():
    model = random_lm("llama")
    model.q_proj = nn.Linear(4, 4)
    with pytest.raises(UserError, match="LoRA: q_proj has the name of a projection, and is none of a block"):
        add_lora(model, R, ALPHA, 0.0, True)


def test_plain_layers_are_pefts_own():
    """The formula of lora.SparseLinear with a mask that is all ones is plain LoRA."""
    dense = random_lm("llama")
    assert not any((linear.weight == 0).any() for block in blocks_of(dense) for linear in block.projections)
    made = []
    for sparse in (True, False):
        model = lora.add_lora(random_lm("llama"), R, ALPHA, 0.0, sparse)
        with torch.no_grad():
            for i, (name, p) in enumerate(model.named_parameters()):
                if "lora_" in name:
                    p.copy_(0.3 * drawn(*p.shape, seed=i))
        made.append(logits_of(model.eval()))
    torch.testing.assert_close(made[0], made[1], rtol=1e-4, atol=1e-4)
