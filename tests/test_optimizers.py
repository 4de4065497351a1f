"""Muon with AdamW against the optimizers it is made of, a singular value decomposition, and itself after loading."""

import copy

import pytest
import torch
from torch import nn
from transformers import AutoModelForCausalLM, LlamaConfig

from common import optimizers
from common.optimizers import MuonWithAdamW, for_trainer, matrices_of

GENERATOR = torch.Generator().manual_seed(0)


def parameters():
    shapes = (24, 8), (8, 24), (8, 8), (8,), (50, 8)
    return [nn.Parameter(torch.randn(shape, generator=torch.Generator().manual_seed(i))) for i, shape in enumerate(shapes)]


def gradients(step: int, found: list[nn.Parameter]) -> None:
    for i, parameter in enumerate(found):
        parameter.grad = torch.randn(parameter.shape, generator=torch.Generator().manual_seed(100 * step + i))


def groups(found: list[nn.Parameter]):
    """As a Trainer makes them: vectors do not decay."""
    return [{"params": [p for p in found if p.ndim == 2], "weight_decay": 0.1}, {"params": [found[3]], "weight_decay": 0.0}]


def equal(one, other) -> bool:
    return all(torch.equal(a, b) for a, b in zip(one, other, strict=True))


def test_it_steps_as_the_two_that_it_is_made_of():
    ours, theirs = parameters(), parameters()
    both = MuonWithAdamW(groups(ours), 0.01, ours[:3])
    muon = torch.optim.Muon(theirs[:3], 0.01, weight_decay=0.1, adjust_lr_fn="match_rms_adamw")
    adamw = torch.optim.AdamW([{"params": theirs[4:], "weight_decay": 0.1}, {"params": [theirs[3]], "weight_decay": 0.0}],
                              0.01, fused=True)  # fmt: skip
    schedulers = [torch.optim.lr_scheduler.LambdaLR(each, lambda step: 1 / (1 + step)) for each in (both, muon, adamw)]
    for step in range(4):
        for found in (ours, theirs):
            gradients(step, found)
        for each in (both, muon, adamw, *schedulers):
            each.step()
    assert equal(ours, theirs) and not equal(ours[:1], parameters()[:1])
    both.zero_grad()
    assert all(parameter.grad is None for parameter in ours)


def test_the_first_step_is_orthogonal_and_as_large_as_adamws():
    """Along every singular direction of the gradient nearly the same, by float64's SVD."""
    (matrix, *_), = [parameters()]
    before, gradient = matrix.detach().clone(), torch.randn(24, 8, generator=GENERATOR)
    matrix.grad = gradient.clone()
    MuonWithAdamW([{"params": [matrix], "weight_decay": 0.0}], 0.01, [matrix]).step()
    update = (before - matrix.detach()).double()
    u, _, vh = torch.linalg.svd(gradient.double(), full_matrices=False)
    inside = u.T @ update @ vh.T / (0.01 * 0.2 * 24**0.5)  # (8, 8): the identity, had Newton-Schulz converged
    assert torch.allclose(inside.diagonal(), torch.ones(8, dtype=torch.double), atol=0.4)
    assert (inside - inside.diagonal().diag()).abs().max() < 0.05
    assert 0.1 * 0.01 < update.square().mean().sqrt() < 0.3 * 0.01  # the size of AdamW's is about 0.2 of its rate


def test_it_goes_on_from_its_state():
    alone = parameters()
    whole = MuonWithAdamW(groups(alone), 0.01, alone[:3])
    for step in range(6):
        gradients(step, alone)
        whole.step()
        if step == 2:
            stored, weights = copy.deepcopy(whole.state_dict()), [parameter.detach().clone() for parameter in alone]
    resumed = [nn.Parameter(weight) for weight in weights]
    again = MuonWithAdamW(groups(resumed), 0.01, resumed[:3])
    again.load_state_dict(stored)
    for step in range(3, 6):
        gradients(step, resumed)
        again.step()
    assert equal(alone, resumed)


@pytest.mark.parametrize("tied", [True, False])
def test_matrices_are_those_of_the_blocks(tied):
    shape = {"vocab_size": 64, "hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2}
    model = AutoModelForCausalLM.from_config(LlamaConfig(**shape, tie_word_embeddings=tied))
    found = {id(parameter) for parameter in matrices_of(model)}
    named = [name for name, parameter in model.named_parameters() if id(parameter) in found]
    assert len(named) == 2 * 7 and all(name.endswith("_proj.weight") for name in named)
    made, settings = for_trainer("muon", 0.1, model)
    assert made is MuonWithAdamW and settings["lr"] == 0.1 and len(settings["matrices"]) == 14
    assert for_trainer("adamw", 0.1, model) is None and set(optimizers.TORCHAO).isdisjoint({"adamw", "muon"})
