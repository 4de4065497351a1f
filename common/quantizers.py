"""Integer quantisers: scales, fake quantisation with straight-through gradients, learned steps, and packing.

A weight of `bits` bits is an integer q in [-2^(bits-1), 2^(bits-1) - 1] and stands for (q - zero) * scale; a scale (fp32) is
shared by `group_size` neighbours of a row, or by the row (-1). Training, export and tests use the functions here and no others,
and they agree with the `compressed-tensors` library that executes the exported model.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import nn
from torch.nn import functional

from common.runs import UserError

TINY = torch.finfo(torch.float32).tiny  # the scale of a group of zeros
EPS = torch.finfo(torch.float32).eps  # the least scale that is learned
FEW_ROWS = 32  # an embedding of fewer (token types) weighs nothing, and each row of it is in every sentence: it stays


class WeightScheme(NamedTuple):
    """How a weight is quantised. method: where scales come from. minmax follows the weight at every step, mse is searched for
    once and stays, lsq starts there and learns."""

    bits: int = 4
    group_size: int = 32
    symmetric: bool = True
    method: str = "lsq"


def integer_range(bits: int) -> tuple[int, int]:
    return -(2 ** (bits - 1)), 2 ** (bits - 1) - 1


def grouped(weight: torch.Tensor, group_size: int) -> torch.Tensor:
    """(rows, columns) -> (rows, groups, group_size), a view. The group size has to divide the columns."""
    return weight.unflatten(-1, (-1, weight.shape[-1] if group_size == -1 else group_size))


# ---------------------------------------------------------------------------------------------------------------- scales


def minmax_scale(groups: torch.Tensor, bits: int, symmetric: bool) -> tuple[torch.Tensor, torch.Tensor | None]:
    """Scale and zero point that reach the largest magnitude (symmetric), or both ends, of each group.

    groups: (..., group_size). Returns (...,) each; the zero point is an integer, in fp32, and None where it is zero for all.
    Zero itself is always representable.
    """
    low, high = integer_range(bits)
    if symmetric:
        return (groups.abs().amax(-1) / ((high - low) / 2)).clamp_min_(TINY), None
    least, most = groups.amin(-1).clamp_max(0), groups.amax(-1).clamp_min(0)
    scale = ((most - least) / (high - low)).clamp_min_(TINY)
    return scale, (low - least / scale).round().clamp(low, high)


def mse_scale(groups: torch.Tensor, bits: int, symmetric: bool,
              n_steps: int = 40) -> tuple[torch.Tensor, torch.Tensor | None]:  # fmt: skip
    """Of `n_steps` shrunken min-max ranges (from 1 down to 0.2), for each group the one with the least squared error."""
    least_error = best_scale = best_zero = None
    for factor in torch.linspace(1.0, 0.2, n_steps).tolist():  # over candidates, all groups at once
        scale, zero = minmax_scale(groups * factor, bits, symmetric)
        error = (dequantize_(to_integers(groups, scale, zero, bits), scale, zero) - groups).square().sum(-1)
        if least_error is None:
            least_error, best_scale, best_zero = error, scale, zero
            continue
        better = error < least_error
        least_error, best_scale = torch.where(better, error, least_error), torch.where(better, scale, best_scale)
        best_zero = None if zero is None else torch.where(better, zero, best_zero)
    return best_scale, best_zero


SCALES = {"minmax": minmax_scale, "mse": mse_scale, "lsq": mse_scale}  # lsq: where learning starts


def to_integers(groups: torch.Tensor, scale: torch.Tensor, zero: torch.Tensor | None, bits: int,
                out: torch.Tensor | None = None) -> torch.Tensor:  # fmt: skip
    """(..., group_size) values to integers in the range of `bits`, still as floats."""
    scaled = torch.div(groups, scale.unsqueeze(-1), out=out)
    if zero is not None:
        scaled += zero.unsqueeze(-1)
    return scaled.clamp_(*integer_range(bits)).round_()


def dequantize_(integers: torch.Tensor, scale: torch.Tensor, zero: torch.Tensor | None) -> torch.Tensor:
    """The values that integers (..., group_size) stand for, in their place."""
    if zero is not None:
        integers -= zero.unsqueeze(-1)
    return integers.mul_(scale.unsqueeze(-1))


# ---------------------------------------------------------------------------------------------------- fake quantisation

_scratch: dict[tuple, torch.Tensor] = {}


def _scratch_like(x: torch.Tensor, name: str) -> torch.Tensor:
    """A tensor to work in that is used again and again, so that it stays in the processor's cache."""
    key = (name, x.device, x.dtype)
    if key not in _scratch or _scratch[key].numel() < x.numel():
        with torch.inference_mode(False):  # training shall be able to write to it too
            _scratch[key] = torch.empty(x.numel(), dtype=x.dtype, device=x.device)
    return _scratch[key][: x.numel()].view(x.shape)


class _FixedOrLearned(torch.autograd.Function):
    """Fake quantisation of (rows, columns) whose scales (rows, groups) are given: learned by Esser et al. 2020
    (arXiv 1902.08153), eq. 1 to 5.

    The gradient passes to what lies inside the range. The scale's is (rounded - exact) inside and the end of the range
    outside, times the gradient, summed over the group, times 1 / sqrt(group_size * largest integer).
    """

    @staticmethod
    def forward(ctx, weight, scale, zero, bits, dtype):
        scale = scale.clamp_min(EPS)
        ctx.save_for_backward(weight, scale, zero)
        ctx.bits, groups = bits, weight.view(*scale.shape, -1)
        out = None if dtype == weight.dtype else _scratch_like(groups, "rounded")
        return dequantize_(to_integers(groups, scale, zero, bits, out), scale, zero).to(dtype).view_as(weight)

    @staticmethod
    def backward(ctx, grad):
        weight, scale, zero = ctx.saved_tensors
        groups, grad = weight.view(*scale.shape, -1), grad.reshape(*scale.shape, -1)
        low, high = integer_range(ctx.bits)
        if grad.dtype != groups.dtype:
            grad = _scratch_like(groups, "grad").copy_(grad)
        exact = torch.div(groups, scale.unsqueeze(-1), out=_scratch_like(groups, "exact"))
        if zero is not None:
            exact += zero.unsqueeze(-1)
        # grad where low <= exact <= high, else 0, in one pass: masks of bools are slow on CPUs
        passed, of_scale = torch.ops.aten.hardtanh_backward(grad, exact, low - 1e-6, high + 1e-6), None
        if ctx.needs_input_grad[1]:
            rounded = torch.round(exact, out=_scratch_like(groups, "rounded")).clamp_(low, high)
            if zero is not None:
                rounded -= zero.unsqueeze(-1)
                exact -= zero.unsqueeze(-1)
            of_scale = rounded.mul_(grad).addcmul_(exact, passed, value=-1).sum(-1)
            of_scale *= (groups.shape[-1] * max(high, 1)) ** -0.5
        return passed.view_as(weight), of_scale, None, None, None


class _Following(torch.autograd.Function):
    """Fake quantisation with min-max scales: no value lies outside, so the gradient passes as if nothing were rounded."""

    @staticmethod
    def forward(ctx, groups, bits, symmetric, dtype):
        ctx.dtype = groups.dtype
        scale, zero = minmax_scale(groups, bits, symmetric)
        out = None if dtype == groups.dtype else _scratch_like(groups, "rounded")
        return dequantize_(to_integers(groups, scale, zero, bits, out), scale, zero).to(dtype)

    @staticmethod
    def backward(ctx, grad):
        return grad.to(ctx.dtype), None, None, None


def _as_if(value: torch.Tensor, x: torch.Tensor, share: float = 1.0) -> torch.Tensor:
    """`value`, bit for bit, with the gradient of `share` * x."""
    return value.detach() + (x - x.detach()) * share


def _traced(groups: torch.Tensor, scale: torch.Tensor | None, zero: torch.Tensor | None, bits: int,
            symmetric: bool = True) -> torch.Tensor:  # fmt: skip
    """What the Functions above compute, in operations that torch.compile derives the gradients of, and fuses.

    scale: None for the one that follows.
    """
    low, high = integer_range(bits)
    if scale is None:
        scale, zero = minmax_scale(groups.detach(), bits, symmetric)
        return _as_if(dequantize_(to_integers(groups.detach(), scale, zero, bits), scale, zero), groups)
    scale = scale.clamp_min(EPS)
    scale = _as_if(scale, scale, (groups.shape[-1] * max(high, 1)) ** -0.5).unsqueeze(-1)
    shift = 0.0 if zero is None else zero.unsqueeze(-1)
    exact = (groups / scale + shift).clamp(low, high)
    return (_as_if(exact.round(), exact) - shift) * scale


def fake_quantize(weight: torch.Tensor, scheme: WeightScheme, scale: torch.Tensor | None = None,
                  zero: torch.Tensor | None = None, dtype: torch.dtype | None = None) -> torch.Tensor:  # fmt: skip
    """Weights (rows, columns) as their integers give them back, in their own dtype or in `dtype`.

    scale, zero: (rows, groups), for all methods but minmax.
    """
    groups = grouped(weight, scheme.group_size)
    if torch.compiler.is_compiling():
        given = None if scheme.method == "minmax" else scale
        return _traced(groups, given, zero, scheme.bits, scheme.symmetric).flatten(-2).to(dtype or weight.dtype)
    if scheme.method == "minmax":
        return _Following.apply(groups, scheme.bits, scheme.symmetric, dtype or weight.dtype).view_as(weight)
    return _FixedOrLearned.apply(weight, scale, zero, scheme.bits, dtype or weight.dtype)


def quantize_tokens(x: torch.Tensor, bits: int, dtype: torch.dtype | None = None) -> torch.Tensor:
    """Activations (..., width), symmetric, with a scale for each token found from the token itself (dynamic).

    While training, the result is kept with `x`: what query, key and value take is rounded once.
    """
    dtype = dtype or x.dtype
    if torch.compiler.is_compiling():
        return _traced(x, None, None, bits).to(dtype)
    if not torch.is_grad_enabled():
        return _Following.apply(x, bits, True, dtype)
    key = (bits, dtype, x._version)
    if getattr(x, "rounded", (None,))[0] != key:
        x.rounded = key, _Following.apply(x, bits, True, dtype)
    return x.rounded[1]


def quantize_tensor(x: torch.Tensor, scale: torch.Tensor, bits: int) -> torch.Tensor:
    """Activations of any shape, symmetric, with one scale (static); scale: (1,)."""
    if torch.compiler.is_compiling():
        return _traced(x.reshape(1, -1), scale.view(1), None, bits).view_as(x)
    return _FixedOrLearned.apply(x.reshape(1, -1), scale.view(1, 1), None, bits, x.dtype).view_as(x)


def product_dtype(x: torch.Tensor) -> torch.dtype:
    """The dtype that a matrix product of `x` is computed in: autocast's, where there is one."""
    device = x.device.type
    return torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else x.dtype


# --------------------------------------------------------------------------------------------------------------- modules


class _Quantized:
    """What a quantised Linear and a quantised Embedding share: `weight` keeps its name and precision, and is looked at through
    the quantiser. scale, zero: (rows, groups); the scale is a parameter for lsq and a buffer for mse.
    """

    scheme: WeightScheme

    def _set_scheme(self, weight: nn.Parameter, scheme: WeightScheme) -> None:
        self.weight, self.scheme = weight, scheme
        scale, zero = (None, None) if scheme.method == "minmax" else self._found_scales()
        if scheme.method == "lsq":
            self.scale = nn.Parameter(scale)
        else:
            self.register_buffer("scale", scale)
        self.register_buffer("zero", zero)

    @torch.no_grad()
    def _found_scales(self) -> tuple[torch.Tensor, torch.Tensor | None]:
        return SCALES[self.scheme.method](grouped(self.weight, self.scheme.group_size), self.scheme.bits, self.scheme.symmetric)

    @torch.no_grad()
    def integers(self) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor | None]:
        """What is stored: int8 (rows, columns), scales (rows, groups) in fp32, zero points (rows, groups) or None."""
        scheme = self.scheme
        scale, zero = self._found_scales() if scheme.method == "minmax" else (self.scale.detach().clamp_min(EPS), self.zero)
        whole = to_integers(grouped(self.weight, scheme.group_size), scale, zero, scheme.bits)
        return whole.to(torch.int8).view_as(self.weight), scale, zero


class QuantizedLinear(_Quantized, nn.Linear):
    """A Linear whose weight, and whose input if `activation_bits` is below 32, pass through quantisers.

    activations: dynamic, a scale for each token, or static, one learned scale (`input_scale`, which `calibrate_` starts).
    """

    def __init__(self, linear: nn.Linear, scheme: WeightScheme, activation_bits: int = 32, activations: str = "dynamic"):
        nn.Module.__init__(self)
        self.in_features, self.out_features, self.bias = linear.in_features, linear.out_features, linear.bias
        self._set_scheme(linear.weight, scheme)
        self.activation_bits = activation_bits
        static = activation_bits < 32 and activations == "static"
        self.input_scale = nn.Parameter(torch.ones(1, device=self.weight.device)) if static else None

    def forward(self, x):
        dtype = product_dtype(x)
        if self.input_scale is not None:
            x = quantize_tensor(x, self.input_scale, self.activation_bits)
        elif self.activation_bits < 32:
            x = quantize_tokens(x, self.activation_bits, dtype)
        return functional.linear(x, fake_quantize(self.weight, self.scheme, self.scale, self.zero, dtype), self.bias)


class QuantizedEmbedding(_Quantized, nn.Embedding):
    """An Embedding whose looked-up rows pass through the quantiser: what a step pays depends on its tokens alone."""

    def __init__(self, embedding: nn.Embedding, scheme: WeightScheme):
        nn.Module.__init__(self)
        for name in ("num_embeddings", "embedding_dim", "padding_idx", "max_norm", "norm_type", "scale_grad_by_freq", "sparse"):
            setattr(self, name, getattr(embedding, name))
        self._set_scheme(embedding.weight, scheme)

    def forward(self, ids):
        scale, zero = (None if table is None else functional.embedding(ids, table) for table in (self.scale, self.zero))
        return fake_quantize(functional.embedding(ids, self.weight, self.padding_idx), self.scheme, scale, zero)


def quantized_modules(model) -> dict[str, QuantizedLinear | QuantizedEmbedding]:
    return {name: module for name, module in model.named_modules() if isinstance(module, _Quantized)}


def quantize_(model, linears: list[nn.Linear], scheme: WeightScheme, activation_bits: int = 32, activations: str = "dynamic",
              embeddings: WeightScheme | None = None) -> dict[str, nn.Module]:  # fmt: skip
    """Put quantisers in the place of the Linear layers `linears` of `model`, and with `embeddings` of every Embedding of
    `FEW_ROWS` or more.

    Returns the new modules by name. UserError where a group size does not divide the columns.
    """
    wanted = {id(linear) for linear in linears}
    found = {name: module for name, module in model.named_modules()
             if id(module) in wanted or (embeddings and isinstance(module, nn.Embedding) and len(module.weight) >= FEW_ROWS)}
    for name, module in found.items():
        columns, size = module.weight.shape[1], (embeddings if isinstance(module, nn.Embedding) else scheme).group_size
        if size != -1 and columns % size:
            flag = "--embedding_group_size" if isinstance(module, nn.Embedding) else "--group_size"
            fitting = [n for n in (32, 64, 128) if columns % n == 0]
            raise UserError(f"{flag} {size}: {name} has {columns} columns, which it does not divide. For this layer use "
                            f"{' or '.join(map(str, [*fitting, -1]))} (-1: a scale for each row)")  # fmt: skip
    for name, module in found.items():
        parent, _, child = name.rpartition(".")
        if isinstance(module, nn.Embedding):
            new = QuantizedEmbedding(module, embeddings)
        else:
            new = QuantizedLinear(module, scheme, activation_bits, activations)
        setattr(model.get_submodule(parent), child, new.train(module.training))
    return quantized_modules(model)


@torch.no_grad()
def calibrate_(model, batches) -> None:
    """Set the static input scales from a forward over `batches` (an iterable of callables' inputs): the largest magnitude."""
    most: dict[str, torch.Tensor] = {}

    def note(name):
        def hook(module, args):
            seen = args[0].abs().amax().float()
            most[name] = torch.maximum(most[name], seen) if name in most else seen

        return hook

    static = {name: m for name, m in quantized_modules(model).items() if getattr(m, "input_scale", None) is not None}
    handles = [module.register_forward_pre_hook(note(name)) for name, module in static.items()]
    try:
        for inputs in batches if static else ():
            model(**inputs)
    finally:
        for handle in handles:
            handle.remove()
    for name, module in static.items():
        low, high = integer_range(module.activation_bits)
        module.input_scale.fill_(float(most[name]) / ((high - low) / 2))


# --------------------------------------------------------------------------------------------------------------- packing


def packed_tensors(model) -> dict[str, torch.Tensor]:
    """The tensors of `model` as compressed-tensors stores them: quantised weights as integers with fp32 scales, the rest as is.

    Symmetric weights take their bits each, packed into int32 ("pack-quantized"). Asymmetric ones take a byte each
    ("int-quantized"): what compressed-tensors 0.20 packs with zero points, transformers 5.23 cannot load.
    """
    from compressed_tensors.compressors.pack_quantized.helpers import pack_to_int32

    tensors = {name: tensor.detach().cpu() for name, tensor in model.state_dict().items()}
    for name, module in quantized_modules(model).items():
        for own in ("weight", "scale", "zero"):
            tensors.pop(f"{name}.{own}", None)
        integers, scale, zero = (None if t is None else t.cpu() for t in module.integers())
        tensors[f"{name}.weight_scale"] = scale
        if zero is None:
            tensors[f"{name}.weight_packed"] = pack_to_int32(integers, module.scheme.bits)
            tensors[f"{name}.weight_shape"] = torch.tensor(module.weight.shape)
        else:
            tensors[f"{name}.weight"], tensors[f"{name}.weight_zero_point"] = integers, zero.to(torch.int8)
    return {name: tensor.contiguous() for name, tensor in tensors.items()}


def bits_per_weight(model, tensors: dict[str, torch.Tensor]) -> float:
    """Bits that a quantised weight of `model` takes in `packed_tensors`, its share of scales and zero points included."""
    modules = quantized_modules(model)
    kinds = ("weight", "weight_packed", "weight_scale", "weight_zero_point", "weight_shape")
    stored = [tensors[key] for name in modules for kind in kinds if (key := f"{name}.{kind}") in tensors]
    return sum(t.numel() * t.element_size() * 8 for t in stored) / sum(m.weight.numel() for m in modules.values())


def packed_config(model) -> dict:
    """The `quantization_config` that goes into config.json beside `packed_tensors`."""
    from compressed_tensors.quantization import QuantizationArgs, QuantizationConfig, QuantizationScheme

    groups: dict[tuple, list[str]] = {}
    for name, module in quantized_modules(model).items():
        static = getattr(module, "input_scale", None) is not None
        groups.setdefault((module.scheme, getattr(module, "activation_bits", 32), static), []).append(name)
    schemes = {}
    for i, ((scheme, activation_bits, static), names) in enumerate(groups.items()):
        per_row = scheme.group_size == -1
        weights = QuantizationArgs(num_bits=scheme.bits, symmetric=scheme.symmetric, strategy="channel" if per_row else "group",
                                   group_size=None if per_row else scheme.group_size)  # fmt: skip
        inputs = None
        if activation_bits < 32:
            inputs = QuantizationArgs(num_bits=activation_bits, strategy="tensor" if static else "token", dynamic=not static)
        stored = "pack-quantized" if scheme.symmetric else "int-quantized"
        schemes[f"group_{i}"] = QuantizationScheme(targets=names, weights=weights, input_activations=inputs, format=stored)
    formats = sorted({scheme.format for scheme in schemes.values()})
    config = QuantizationConfig(config_groups=schemes, format=formats[0] if len(formats) == 1 else "mixed-precision",
                                quantization_status="compressed")  # fmt: skip
    return config.model_dump()
