"""Optimizer groups, learning rates, precision and early stopping, by hand."""

import pytest
import torch
from torch import nn
from transformers import get_linear_schedule_with_warmup

from common import train_utils
from common.runs import UserError
from common.train_utils import EarlyStopping, OneDNNLinear, adamw, linear_schedule
from tests.test_families import random_model

CPU = torch.device("cpu")


def test_linear_schedule_by_hand():
    assert [linear_schedule(step, 8, 0.5) for step in range(9)] == [0.25, 0.5, 0.75, 1, 1, 0.75, 0.5, 0.25, 0]
    assert [linear_schedule(step, 4, 0.0) for step in range(5)] == pytest.approx([1, 1, 2 / 3, 1 / 3, 0])
    assert [linear_schedule(step, 2, 1.0) for step in range(3)] == [0.5, 1, 0]
    assert linear_schedule(0, 1, 0.1) == 1
    assert linear_schedule(50, 8, 0.5) == 0


def test_linear_schedule_is_that_of_transformers_behind_the_warmup():
    """transformers begins at zero, where a step does nothing; here every step counts, and both end alike."""
    optimizer = torch.optim.SGD([nn.Parameter(torch.zeros(1))], lr=1.0)
    theirs = get_linear_schedule_with_warmup(optimizer, 20, 100).lr_lambdas[0]
    for step in range(101):
        assert linear_schedule(step, 100, 0.2) == theirs(step if step >= 20 else step + 1)


def test_adamw_decays_matrices_only():
    model = nn.Sequential(nn.Embedding(3, 4), nn.Linear(4, 5), nn.LayerNorm(5), nn.Linear(5, 2))
    model[3].bias.requires_grad_(False)
    optimizer = adamw(model, 0.1, 0.03)
    decayed, plain = optimizer.param_groups
    assert [p.shape for p in decayed["params"]] == [(3, 4), (5, 4), (2, 5)] and decayed["weight_decay"] == 0.03
    assert [p.shape for p in plain["params"]] == [(5,), (5,), (5,)] and plain["weight_decay"] == 0
    assert decayed["lr"] == plain["lr"] == 0.1


def test_a_step_clips_and_clears_the_gradients():
    model = nn.Linear(2, 1, bias=False)
    before = model.weight.detach().clone()
    optimizer = torch.optim.SGD(model.parameters(), lr=5.0)
    model.weight.grad = torch.tensor([[3.0, -4.0]])  # a norm of five
    train_utils.step_(model, optimizer, train_utils.grad_scaler(torch.device("cpu"), "32"), 0.5)
    torch.testing.assert_close(before - model.weight.detach(), torch.tensor([[0.3, -0.4]]), rtol=1e-5, atol=1e-6)
    assert model.weight.grad is None and optimizer.param_groups[0]["lr"] == 0.5


def test_a_step_of_adamw_by_hand():
    """The first step is the sign of the gradient times the rate, after the decay."""
    model = nn.Linear(2, 1)
    with torch.no_grad():
        model.weight.copy_(torch.tensor([[2.0, -4.0]]))
        model.bias.fill_(1.0)
    optimizer = adamw(model, 0.1, 0.5)
    (model(torch.tensor([1.0, -3.0])) * 5).sum().backward()
    optimizer.step()
    torch.testing.assert_close(model.weight.detach(), torch.tensor([[2 * 0.95 - 0.1, -4 * 0.95 + 0.1]]))
    torch.testing.assert_close(model.bias.detach(), torch.tensor([0.9]))


@pytest.mark.parametrize(
    "patience, min_delta, values, bests, stops",
    [
        (2, 0.0, [0.5, 0.6, 0.6, 0.55], [1, 1, 0, 0], [0, 0, 0, 1]),  # no gain is no improvement
        (1, 0.0, [0.5, 0.4], [1, 0], [0, 1]),
        (2, 0.1, [0.5, 0.55, 0.58, 0.7], [1, 1, 1, 1], [0, 0, 1, 0]),  # small gains are the best, and no reason to go on
        (2, 0.1, [0.5, 0.55, 0.61, 0.6], [1, 1, 1, 0], [0, 0, 0, 0]),  # small gains add up
        (3, 0.0, [0.5, float("nan"), 0.4, 0.45], [1, 0, 0, 0], [0, 0, 0, 1]),
    ],
)
def test_early_stopping(patience, min_delta, values, bests, stops):
    stopping = EarlyStopping(patience, min_delta)
    for value, best, stop in zip(values, bests, stops, strict=True):
        resumed = EarlyStopping(patience, min_delta)
        resumed.load_state_dict(stopping.state_dict())
        for one in (stopping, resumed):
            assert (one.update(value), one.stop) == (best, stop)
    assert stopping.best == max(value for value in values if value == value)


def test_resolve_precision(monkeypatch):
    for has_bf16, expected in ((True, "bf16-mixed"), (False, "32")):
        monkeypatch.setattr(train_utils, "cpu_has_bf16", lambda answer=has_bf16: answer)
        assert train_utils.resolve_precision("auto", CPU) == expected
    assert train_utils.resolve_precision("auto", torch.device("mps")) == "32"
    for device in ("cuda", "cuda:1"):
        assert train_utils.resolve_precision("auto", torch.device(device)) == "16-mixed"
        assert train_utils.resolve_precision("16-mixed", torch.device(device)) == "16-mixed"
    for precision in ("32", "bf16-mixed"):
        assert train_utils.resolve_precision(precision, CPU) == precision
    for device in ("cpu", "mps"):
        with pytest.raises(UserError, match=f"16-mixed: needs CUDA, the device is {device}"):
            train_utils.resolve_precision("16-mixed", torch.device(device))


def test_autocast_and_loss_scaling():
    linear, x = nn.Linear(3, 2), torch.randn(4, 3)
    for precision, dtype in (("32", torch.float32), ("bf16-mixed", torch.bfloat16)):
        with train_utils.autocast(CPU, precision):
            assert linear(x).dtype == dtype
        assert linear(x).dtype == torch.float32
        assert not train_utils.grad_scaler(CPU, precision).is_enabled()
    assert train_utils.grad_scaler(CPU, "16-mixed").is_enabled()


@pytest.mark.parametrize("precision", ["32", "bf16-mixed"])
def test_attention_under_autocast_trains_as_it_evaluates(precision):
    """The kernels of training and of evaluation may differ; what they compute may not."""
    model, _ = random_model("bert")
    ids = torch.arange(3, 27).view(3, 8)
    with train_utils.autocast(CPU, precision):
        training = model(input_ids=ids).logits
    with torch.no_grad(), train_utils.autocast(CPU, precision):
        evaluating = model(input_ids=ids).logits
    exact = model(input_ids=ids).logits
    tolerance = 1e-5 if precision == "32" else 0.05 * float(exact.detach().std())
    torch.testing.assert_close(training.float(), exact, rtol=0, atol=tolerance)
    torch.testing.assert_close(evaluating.float(), exact, rtol=0, atol=tolerance)


def by_onednn(monkeypatch, layer, states):
    """What the layer returns inside of `OneDNNLinear`, and how often oneDNN was called."""
    calls, original = [], torch.ops.mkldnn._linear_pointwise
    monkeypatch.setattr(torch.ops.mkldnn, "_linear_pointwise", lambda *args: (calls.append(1), original(*args))[1])
    with OneDNNLinear():
        return layer(states), len(calls)


@pytest.mark.parametrize("shape", [(7, 32), (2, 5, 32), (1, 32), (2, 3, 4, 32)])
@pytest.mark.parametrize("bias", [True, False])
def test_linear_layers_by_onednn_are_the_same(shape, bias, monkeypatch):
    layer, states = nn.Linear(32, 1000, bias=bias), torch.randn(shape, generator=torch.Generator().manual_seed(0))
    with torch.inference_mode():
        for some in (states, states.flip(0).transpose(0, -2), states.expand(3, *shape), torch.randn(32, 9).t()):
            found, n_calls = by_onednn(monkeypatch, layer, some)
            assert n_calls == 1 and found.is_contiguous()
            torch.testing.assert_close(found, layer(some), rtol=1e-5, atol=1e-5)
        layer.weight = nn.Parameter(torch.randn(32, 1000).t())  # not contiguous
        torch.testing.assert_close(by_onednn(monkeypatch, layer, states)[0], layer(states), rtol=1e-5, atol=1e-5)


def test_what_onednn_does_not_take_is_computed_as_ever(monkeypatch):
    layer, states = nn.Linear(8, 4), torch.randn(3, 8)
    found, n_calls = by_onednn(monkeypatch, layer, states)  # with gradients
    assert n_calls == 0 and torch.equal(found, layer(states)) and found.requires_grad
    with torch.no_grad():
        assert by_onednn(monkeypatch, layer, states)[1] == 1
        for other in (states[:0], states[0]):
            assert torch.equal(by_onednn(monkeypatch, layer, other)[0], layer(other))
        for dtype in (torch.float64, torch.bfloat16):
            found, n_calls = by_onednn(monkeypatch, layer.to(dtype), states.to(dtype))
            assert n_calls == 0 and torch.equal(found, layer(states.to(dtype)))
        layer.float()
        with train_utils.autocast(CPU, "bf16-mixed"):
            found, n_calls = by_onednn(monkeypatch, layer, states)
            assert n_calls == 0 and found.dtype == torch.bfloat16
    assert not torch.overrides._get_current_function_mode()


def test_mean_loss_refuses_what_is_not_finite():
    model = nn.Linear(2, 2)
    assert train_utils.mean_loss([torch.tensor(1.0), torch.tensor(4.0)], model, 2) == 2.5
    for bad in (torch.nan, torch.inf):
        with pytest.raises(UserError, match=r"the loss is not finite any more before step 1,201.*intact"):
            train_utils.mean_loss([torch.tensor(1.0), torch.tensor(bad)], model, 1200)
    with torch.no_grad():
        model.bias[1] = torch.nan
    with pytest.raises(UserError, match="a weight is not finite"):
        train_utils.mean_loss([torch.tensor(1.0)], model, 2)


def test_training_memory_by_hand():
    """16 bytes a parameter, and per token 14 widths, 4 FFN widths and two rows of attention in each of 3 blocks."""
    model, _ = random_model("bert")
    states = 16 * sum(p.numel() for p in model.parameters())
    kept = 3 * (14 * 32 + 4 * 48 + 2 * 4 * 10)
    assert train_utils.training_memory(model, 8, 10, "32") == states + 8 * 10 * kept * 4
    assert train_utils.training_memory(model.to("meta"), 8, 10, "bf16-mixed") == states + 8 * 10 * kept * 2


def test_the_nearest_precision(monkeypatch):
    monkeypatch.setattr(train_utils, "cpu_has_bf16", lambda: True)
    found = [train_utils.nearest_precision(asked, CPU) for asked in train_utils.PRECISIONS]
    assert dict(zip(train_utils.PRECISIONS, found, strict=True)) == {"auto": "bf16-mixed", "32": "32", "16-mixed": "bf16-mixed",
                                                                     "bf16-mixed": "bf16-mixed"}  # fmt: skip
    monkeypatch.setattr(train_utils, "cpu_has_bf16", lambda: False)
    assert train_utils.nearest_precision("16-mixed", CPU) == "32"
    assert train_utils.nearest_precision("16-mixed", torch.device("cuda")) == "16-mixed"


def test_check_finite_with_and_without_loss_scaling():
    fine, spoilt = torch.ones(2), torch.tensor([1.0, torch.inf])
    off, on = torch.amp.GradScaler("cpu", enabled=False), torch.amp.GradScaler("cpu", init_scale=1.0)
    train_utils.check_finite(fine, off, 5)
    train_utils.check_finite(spoilt, on, 5)  # the scaler's business
    with pytest.raises(UserError, match=r"is not finite any more at step 1,005\. The last checkpoint is intact"):
        train_utils.check_finite(spoilt, off, 1005)
    with pytest.raises(UserError, match=r"fp16 overflows in every step, however small the loss is scaled, at step 5\."):
        train_utils.check_finite(fine, torch.amp.GradScaler("cpu", init_scale=0.5), 5)


def test_a_compiler_is_looked_for_where_one_is_needed(monkeypatch):
    monkeypatch.setenv("CXX", "my_compiler")
    cases = [(["my_compiler"], "cpu", True), (["clang++"], "cpu", True), ([], "cuda", True), ([], "cpu", False)]
    for found, device, fits in cases:
        monkeypatch.setattr(train_utils.shutil, "which", lambda name, found=found: name if name in found else None)
        if fits:
            train_utils.check_compiler(torch.device(device), "--compile")
        else:
            with pytest.raises(UserError, match=r"--compile: on a CPU it needs a C\+\+ compiler"):
                train_utils.check_compiler(torch.device(device), "--compile")
