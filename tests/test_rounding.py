"""GPTQ against the textbook's elimination in float64, and what it is for: less error where the model feels it."""

import copy

import pytest
import torch
from torch import nn

from common import quantizers, rounding
from common.blocks import blocks_of
from common.data import inputs_of
from common.quantizers import WeightScheme, fake_quantize, mse_scale
from tests.test_families import batch
from tests.test_importance import classifier

CPU = torch.device("cpu")


def batches(n=3):
    made = []
    for seed in range(n):
        ids = torch.randint(5, 50, (4, 9), generator=torch.Generator().manual_seed(seed))
        mask = torch.ones_like(ids)
        mask[0, 5:] = 0
        made.append({"input_ids": ids, "attention_mask": mask})
    return made


@pytest.mark.parametrize("symmetric", [True, False])
@pytest.mark.parametrize("block", [3, 128])
def test_gptq_is_optimal_brain_quantisation_in_order(block, symmetric):
    """Reference: after each column, its row and column are eliminated from the inverse (Frantar and Alistarh 2022, eq. 3)."""
    generator = torch.Generator().manual_seed(0)
    weight = torch.randn(5, 16, generator=generator, dtype=torch.float64)
    inputs = torch.randn(40, 16, generator=generator, dtype=torch.float64) @ torch.randn(16, 16, generator=generator).double()
    moments, (scale, zero) = inputs.T @ inputs, mse_scale(weight.view(5, 2, 8), 3, symmetric)
    found = rounding.compensated(weight, scale, zero, 3, moments, damping=0.05, block=block)

    inverse = torch.linalg.inv(moments + 0.05 * moments.diagonal().mean() * torch.eye(16, dtype=torch.float64))
    left, expected = weight.clone(), torch.empty(5, 16, dtype=torch.float64)
    for j in range(16):
        s, z = scale[:, j // 8], 0 if zero is None else zero[:, j // 8]
        expected[:, j] = left[:, j]
        rounded = (((left[:, j] / s + z).round().clamp(-4, 3)) - z) * s
        left[:, j:] -= ((left[:, j] - rounded) / inverse[0, 0]).unsqueeze(1) * inverse[0]
        inverse = (inverse - inverse[:, :1] * inverse[:1] / inverse[0, 0])[1:, 1:]
    torch.testing.assert_close(found, expected)

    def felt(rounded):
        return ((rounded - weight) @ moments * (rounded - weight)).sum()

    scheme = WeightScheme(3, 8, symmetric, "mse")
    assert felt(fake_quantize(found, scheme, scale, zero)) < 0.9 * felt(fake_quantize(weight, scheme, scale, zero))


def test_moments_are_those_of_inputs_and_of_gradients_at_the_embeddings():
    model = classifier(2).float().eval()
    linears = [linear for block in blocks_of(model) for linear in block.projections]
    before = {name: p.requires_grad for name, p in model.named_parameters()}
    moments = rounding.second_moments(model, [*linears, model.bert.pooler.dense], batches(), "32", 0)
    assert {name: p.requires_grad for name, p in model.named_parameters()} == before and not model.training

    expected = {key: torch.zeros(len(m), len(m), dtype=torch.float64) for key, m in moments.items()}
    for one in batches():
        real = one["attention_mask"].bool()
        output = model(**inputs_of(one), output_hidden_states=True)
        x = output.hidden_states[0][real].detach().double()
        expected["bert.encoder.layer.0.attention.self.query"] += x.T @ x
        first = output.hidden_states[-1][:, 0].detach().double()
        expected["bert.pooler.dense"] += first.T @ first
        log_p = output.logits.log_softmax(1)
        for i in range(len(real)):  # of two classes: the expectation over the classes of the squared gradient of log p
            for label in range(2):
                words = model.bert.embeddings.word_embeddings(one["input_ids"]).detach().requires_grad_()
                log_p = model(inputs_embeds=words, attention_mask=one["attention_mask"]).logits.log_softmax(1)
                (grad,) = torch.autograd.grad(log_p[i, label], words)
                g = grad[i][real[i]].double()
                expected[rounding.TABLES] += log_p[i, label].exp().item() * g.T @ g
    for key in ("bert.encoder.layer.0.attention.self.query", "bert.pooler.dense", rounding.TABLES):
        torch.testing.assert_close(moments[key].double(), expected[key], rtol=1e-3, atol=1e-7)


@pytest.mark.parametrize("method", ["lsq", "mse", "minmax"])
def test_a_model_rounded_so_is_nearer_to_what_it_was(method):
    model = classifier(2).float().eval()
    linears = [linear for block in blocks_of(model) for linear in block.projections]
    inputs = {key: torch.cat([one[key] for one in batches(8)]) for key in ("input_ids", "attention_mask")}
    moments = rounding.second_moments(model, linears, batches(8), "32", 0)
    errors = {}
    for name, felt in (("nearest", {}), ("gptq", moments)):
        twin = copy.deepcopy(model)
        scheme = WeightScheme(3, 16, True, method)
        own = [linear for block in blocks_of(twin) for linear in block.projections]
        quantizers.quantize_(twin, own, scheme, embeddings=scheme._replace(group_size=-1))
        rounding.compensate_(twin, felt)
        with torch.no_grad():
            errors[name] = float((twin(**inputs).logits - model(**inputs).logits).square().mean())
    assert errors["gptq"] == errors["nearest"] if method == "minmax" else errors["gptq"] < 0.8 * errors["nearest"]


def test_embeddings_of_a_few_rows_and_of_another_width_are_left_alone():
    model = classifier(2).float()
    quantizers.quantize_(model, [], WeightScheme(), embeddings=WeightScheme(4, -1))
    assert isinstance(model.bert.embeddings.token_type_embeddings, nn.Embedding)
    tables = {f"bert.embeddings.{name}_embeddings" for name in ("word", "position")}
    assert set(quantizers.quantized_modules(model)) == tables
    before = copy.deepcopy(model.state_dict())
    rounding.compensate_(model, {rounding.TABLES: torch.eye(8)})  # not their width
    assert all(torch.equal(before[name], tensor) for name, tensor in model.state_dict().items())
    assert batch()["input_ids"].max() < model.config.vocab_size
