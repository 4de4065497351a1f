"""Integers against brute force, learned steps against float64 autograd, packed models against stock transformers."""

import copy
import subprocess
import sys

import pytest
import torch
import transformers
from torch import nn

from common import checkpoint, quantizers
from common.blocks import blocks_of
from common.pruning import pad_neurons_, shrink_
from common.quantizers import WeightScheme, fake_quantize, grouped, integer_range, minmax_scale, mse_scale, to_integers
from common.runs import UserError
from tests.test_families import FAMILY_CASES, batch, random_model, uneven_keep
from tests.test_importance import classifier

# ---------------------------------------------------------------------------------------------------------------- scales


def brute_force(group, scale, zero, bits):
    """Each value by the integer, of all there are, that stands nearest to it."""
    low, high = integer_range(bits)
    codes = [(q - zero) * scale for q in range(low, high + 1)]
    return [min(codes, key=lambda code: abs(code - value)) for value in group]


@pytest.mark.parametrize("bits", [2, 3, 4, 8])
@pytest.mark.parametrize("symmetric", [True, False])
def test_fake_quantisation_takes_the_nearest_code(bits, symmetric):
    weight = torch.randn(3, 64, generator=torch.Generator().manual_seed(bits), dtype=torch.float64) + 0.3
    for method in ("minmax", "mse"):
        groups = grouped(weight, 32)
        scale, zero = quantizers.SCALES[method](groups, bits, symmetric)
        found = fake_quantize(weight, WeightScheme(bits, 32, symmetric, method), scale, zero)
        for row in range(3):
            for i in range(2):
                z = 0.0 if zero is None else float(zero[row, i])
                expected = brute_force(groups[row, i].tolist(), float(scale[row, i]), z, bits)
                torch.testing.assert_close(found[row, 32 * i : 32 * i + 32], torch.tensor(expected, dtype=torch.float64))


def test_minmax_by_hand():
    groups = torch.tensor([[-1.0, 3.0, 0.5], [0.0, 0.0, 0.0], [1.0, 2.0, 3.0]])
    scale, zero = minmax_scale(groups, 4, symmetric=True)
    assert zero is None and scale.tolist() == pytest.approx([3 / 7.5, quantizers.TINY, 3 / 7.5])
    scale, zero = minmax_scale(groups, 4, symmetric=False)
    assert scale.tolist() == pytest.approx([4 / 15, quantizers.TINY, 3 / 15])  # zero belongs to every range
    assert zero.tolist() == [round(-8 + 1 / (4 / 15)), -8, -8]


@pytest.mark.parametrize("symmetric", [True, False])
def test_mse_search_is_never_worse_than_minmax_and_finds_the_best_candidate(symmetric):
    groups = torch.randn(50, 32, generator=torch.Generator().manual_seed(0))
    errors = {}
    for name, (scale, zero) in (("minmax", minmax_scale(groups, 3, symmetric)), ("mse", mse_scale(groups, 3, symmetric))):
        errors[name] = (quantizers.dequantize_(to_integers(groups, scale, zero, 3), scale, zero) - groups).square().sum(1)
    assert (errors["mse"] <= errors["minmax"]).all() and errors["mse"].mean() < 0.9 * errors["minmax"].mean()
    for group, error in zip(groups[:5], errors["mse"], strict=False):  # one candidate after the other
        tried = []
        for factor in torch.linspace(1.0, 0.2, 40):
            scale, zero = minmax_scale(group[None] * factor, 3, symmetric)
            whole = (group / scale + (0 if zero is None else zero)).clamp(-4, 3).round()
            tried.append((((whole - (0 if zero is None else zero)) * scale - group) ** 2).sum())
        assert float(error) == pytest.approx(float(min(tried)), rel=1e-5)


# ---------------------------------------------------------------------------------------------------- learned and fixed


@pytest.mark.parametrize("with_zero", [False, True])
@pytest.mark.parametrize("bits", [2, 4])
def test_the_learned_steps_gradient_is_the_papers(bits, with_zero):
    """Autograd through round(v) = v + (round(v) - v).detach(), which is how the paper's eq. 1 to 5 come about."""
    generator = torch.Generator().manual_seed(bits)
    groups = torch.randn(4, 2, 16, generator=generator, dtype=torch.float64).requires_grad_()
    scale = (0.1 + torch.rand(4, 2, generator=generator, dtype=torch.float64)).requires_grad_()
    zero = torch.randint(-1, 2, (4, 2), generator=generator).double() if with_zero else None
    grad = torch.randn(4, 2, 16, generator=generator, dtype=torch.float64)
    found = quantizers._FixedOrLearned.apply(groups.flatten(1), scale, zero, bits, torch.float64).view_as(groups)
    of_groups, of_scale = torch.autograd.grad(found, (groups, scale), grad)

    low, high = integer_range(bits)
    shift = 0 if zero is None else zero[..., None]
    exact = (groups / scale[..., None] + shift).clamp(low, high)
    reference = (exact + (exact.round() - exact).detach() - shift) * scale[..., None]
    expected = torch.autograd.grad(reference, (groups, scale), grad)
    torch.testing.assert_close(found, reference)
    torch.testing.assert_close(of_groups, expected[0])
    torch.testing.assert_close(of_scale, expected[1] / (16 * high) ** 0.5)


def test_a_fixed_scale_gets_no_gradient_and_a_following_one_passes_everything():
    weight = torch.randn(2, 32, generator=torch.Generator().manual_seed(0)).requires_grad_()
    fake_quantize(weight, WeightScheme(4, 32, True, "minmax")).sum().backward()
    assert torch.equal(weight.grad, torch.ones(2, 32))
    weight.grad = None
    scale = torch.full((2, 1), 0.1)
    fake_quantize(weight, WeightScheme(4, 32, True, "mse"), scale).sum().backward()
    assert torch.equal(weight.grad, ((weight / 0.1 >= -8) & (weight / 0.1 <= 7)).float())


def test_half_precision_products_get_the_same_weights_and_gradients():
    """With a dtype of the product the quantiser casts inside: the same as casting its output, and its gradient, outside."""
    weight = torch.randn(6, 64, generator=torch.Generator().manual_seed(0)).requires_grad_()
    scale = (torch.rand(6, 2, generator=torch.Generator().manual_seed(1)) * 0.3).requires_grad_()
    grad = torch.randn(6, 64, generator=torch.Generator().manual_seed(2)).bfloat16()
    quantizers._scratch.clear()
    with torch.inference_mode():  # what works in inference first must not be lost to training
        fake_quantize(weight, WeightScheme(4, 32), scale, None, torch.bfloat16)
    for zero in (None, torch.ones(6, 2)):
        outside = fake_quantize(weight, WeightScheme(4, 32), scale, zero).bfloat16()
        inside = fake_quantize(weight, WeightScheme(4, 32), scale, zero, torch.bfloat16)
        assert torch.equal(inside, outside)
        for ours, expected in zip(*(torch.autograd.grad(o, (weight, scale), grad) for o in (inside, outside)), strict=True):
            assert torch.equal(ours, expected) and ours.dtype == torch.float32


@pytest.mark.parametrize("method", ["lsq", "mse", "minmax"])
@pytest.mark.parametrize("with_zero", [False, True])
def test_what_a_compiler_traces_is_the_same(method, with_zero, monkeypatch):
    generator = torch.Generator().manual_seed(0)
    weight = torch.randn(6, 64, generator=generator).requires_grad_()
    scale = (torch.rand(6, 2, generator=generator) * 0.3).requires_grad_(method == "lsq")
    zero, grad = torch.ones(6, 2) if with_zero else None, torch.randn(6, 64, generator=generator)
    token_scale = torch.tensor([0.02], requires_grad=True)
    scheme, found = WeightScheme(4, 32, not with_zero, method), {}
    for traced in (False, True):
        monkeypatch.setattr(torch.compiler, "is_compiling", lambda traced=traced: traced)
        x = weight * 1.0
        values = (fake_quantize(weight, scheme, scale, zero), quantizers.quantize_tokens(x, 8),
                  quantizers.quantize_tensor(x, token_scale, 8))  # fmt: skip
        wanted = [weight, *([scale] if method == "lsq" else []), token_scale]
        found[traced] = values, torch.autograd.grad(values, wanted, (grad, 2 * grad, 3 * grad))
    for ours, expected in zip(found[True][0], found[False][0], strict=True):
        assert torch.equal(ours, expected)
    for ours, expected in zip(found[True][1], found[False][1], strict=True):
        torch.testing.assert_close(ours, expected, rtol=1e-4, atol=1e-5)


def test_an_input_that_several_take_is_rounded_once_while_training_and_again_when_it_has_changed():
    x = torch.randn(2, 3, 8, generator=torch.Generator().manual_seed(0)).requires_grad_() * 1.0
    first, second = quantizers.quantize_tokens(x, 8), quantizers.quantize_tokens(x, 8)
    assert first is second and quantizers.quantize_tokens(x, 4) is not first
    (first.sum() + 2 * second.sum()).backward()
    with torch.no_grad():
        alone = quantizers.quantize_tokens(x, 8)
        assert alone is not quantizers.quantize_tokens(x, 8) and torch.equal(alone, first)
        x.mul_(2)
    changed = quantizers.quantize_tokens(x, 8)
    torch.testing.assert_close(changed, 2 * first)


def test_the_scale_of_a_token_is_its_own():
    x = torch.tensor([[[1.0, -2.0], [0.0, 0.0], [100.0, 50.0]]])
    found = quantizers.quantize_tokens(x, 8)
    assert (found - x).abs().amax(-1).tolist()[0] <= [2 / 127.5, 0, 100 / 127.5]
    assert torch.equal(found[0, :1], quantizers.quantize_tokens(x[:, :1], 8)[0])
    assert not found[0, 1].any()


# ------------------------------------------------------------------------------------------------------------- modules


@pytest.mark.parametrize("family", FAMILY_CASES)
def test_zero_neurons_change_nothing(family):
    model, _ = random_model(family)
    shrink_(model, uneven_keep(blocks_of(model)))
    model.eval()
    with torch.no_grad():
        before = model(**batch()).logits
        widths = [b.ffn.n_neurons for b in blocks_of(model)]
        added = pad_neurons_(model, 32)
        torch.testing.assert_close(model(**batch()).logits, before, rtol=1e-5, atol=1e-6)
    assert added == sum(-n % 32 for n in widths) > 0
    assert [b.ffn.n_neurons for b in blocks_of(model)] == [n + -n % 32 for n in widths]
    assert pad_neurons_(model, 32) == 0


def quantize_all(model, scheme, *args, embeddings=None):
    linears = [linear for block in blocks_of(model) for linear in block.projections]
    return quantizers.quantize_(model, linears, scheme, *args, embeddings=embeddings)


def test_a_module_is_the_float_module_with_rounded_weights_and_inputs():
    model = classifier(2).float()
    reference = copy.deepcopy(model)
    modules = quantize_all(model, WeightScheme(4, 16, True, "mse"), 8, embeddings=WeightScheme(8, -1, True, "mse"))
    assert len(modules) == 3 * 6 + 2  # the table of token types is too small to be worth it
    for name, module in modules.items():
        whole, scale, _ = module.integers()
        rebuilt = (grouped(whole.float(), module.scheme.group_size) * scale[..., None]).view_as(module.weight)
        plain = reference.get_submodule(name)
        assert whole.int().abs().max() <= 2 ** (module.scheme.bits - 1) and not torch.equal(rebuilt, plain.weight)
        plain.weight = nn.Parameter(rebuilt)
        if isinstance(plain, nn.Linear):
            plain.register_forward_pre_hook(lambda _, args: (quantizers.quantize_tokens(args[0], 8),))
    with torch.no_grad():
        torch.testing.assert_close(model(**batch()).logits, reference(**batch()).logits, rtol=1e-5, atol=1e-6)


def test_group_sizes_that_do_not_divide_are_refused_before_anything_changes():
    model, _ = random_model("bert")  # 32 wide, 48 neurons
    with pytest.raises(UserError, match=r"--group_size 32: .*output.dense has 48 columns.* use -1"):
        quantize_all(model, WeightScheme(4, 32))
    assert not quantizers.quantized_modules(model)


def test_calibration_takes_the_largest_input():
    model = classifier(2).float()
    modules = quantize_all(model, WeightScheme(4, 16), 8, "static")
    seen = {}
    for name, module in modules.items():
        module.register_forward_pre_hook(lambda _, args, name=name: seen.update({name: args[0].abs().max()}))
    with torch.no_grad():
        quantizers.calibrate_(model, [batch()])
    for name, module in modules.items():
        assert module.input_scale.item() == pytest.approx(float(seen[name]) / 127.5)


# -------------------------------------------------------------------------------------------------------------- packing

LOAD = """
import sys, torch, transformers
transformers.utils.logging.disable_progress_bar()
model = transformers.AutoModelForSequenceClassification.from_pretrained(sys.argv[1], trust_remote_code=sys.argv[2] == "True")
inputs = torch.load(sys.argv[3], weights_only=True)
with torch.no_grad():
    torch.save(model.eval()(**inputs).logits, sys.argv[4])
assert "common" not in sys.modules
"""
CASES = [
    ("lsq", True, 8, "dynamic", 16, 4, 4, False),
    ("lsq", True, 8, "static", 8, 3, 32, True),
    ("minmax", False, 8, "dynamic", -1, 4, 8, True),
    ("mse", True, 32, "dynamic", 16, 2, 32, False),
    ("mse", False, 16, "dynamic", -1, 8, 4, False),
]


@pytest.mark.parametrize(("method", "symmetric", "inputs", "kind", "size", "bits", "tables", "uneven"), CASES)
def test_a_bare_process_computes_the_same_logits(method, symmetric, inputs, kind, size, bits, tables, uneven, tmp_path,
                                                 capfd):  # fmt: skip
    model = classifier(2).float()
    if uneven:
        shrink_(model, uneven_keep(blocks_of(model)))
        pad_neurons_(model, 8)
    embeddings = WeightScheme(tables, -1, symmetric, method) if tables < 32 else None
    quantize_all(model, WeightScheme(bits, size, symmetric, method), inputs, kind, embeddings=embeddings)
    with torch.no_grad():
        quantizers.calibrate_(model, [batch()])
        expected = model(**batch()).logits
    tensors = quantizers.packed_tensors(model)
    least = bits if symmetric and not embeddings else 2
    assert least < quantizers.bits_per_weight(model, tensors) < 16

    class Tokenizer:
        def save_pretrained(self, folder):
            pass

    checkpoint.save_model(tmp_path / "m", model, Tokenizer(), packed=(tensors, quantizers.packed_config(model)))
    capfd.readouterr()
    here = checkpoint.load_classifier(tmp_path / "m").eval()
    shown = capfd.readouterr().err
    assert not any(bar in shown for bar in ("Applying quantization", "Dispatching", "ecompressing"))  # of compressed-tensors
    with torch.no_grad():
        assert torch.equal(here(**batch()).logits, expected)
    torch.save(batch(), tmp_path / "inputs.pt")
    code = uneven or embeddings is not None
    command = [sys.executable, "-c", LOAD, "m", str(code), "inputs.pt", "logits.pt"]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, check=False,
                          env={"PATH": "", "HF_HOME": str(tmp_path / "hf"), "HF_HUB_OFFLINE": "1"})  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert torch.equal(torch.load(tmp_path / "logits.pt", weights_only=True), expected)


@pytest.mark.parametrize("bits", range(2, 9))
def test_packed_weights_take_their_bits(bits):
    model = classifier(2).float()
    quantize_all(model, WeightScheme(bits, -1, True, "minmax"))
    tensors = quantizers.packed_tensors(model)
    packed = [t for name, t in tensors.items() if name.endswith("weight_packed")]
    n_weights = sum(p.weight.numel() for b in blocks_of(model) for p in b.projections)
    assert n_weights * bits <= sum(t.numel() * 32 for t in packed) < n_weights * bits * 1.34  # a row ends with its word
    assert transformers.AutoConfig.for_model("bert", quantization_config=quantizers.packed_config(model))
