"""GPTQ: rounding whose errors cancel where the model would feel them (arXiv 2210.17323)."""

from __future__ import annotations

import torch
from torch import nn

from common import train_utils
from common.data import inputs_of
from common.eval_utils import evaluating
from common.importance import curvature_seed
from common.quantizers import EPS, QuantizedEmbedding, dequantize_, quantized_modules, to_integers

TABLES = "embeddings"


def second_moments(model, linears: list[nn.Linear], batches: list[dict], precision: str, seed: int) -> dict[str, torch.Tensor]:
    """How much an error in each column, and in each two together, is felt: (columns, columns) fp32 by a module's name.

    Of a Linear, X^T X of its inputs X, so that e^T (X^T X) e is the squared error of what it puts out (GPTQ). Of embeddings,
    under the key `TABLES`, G^T G of the gradients G at what the input embeddings give, whose squares are the curvature of the
    KL divergence of the model's classes from their own (importance.curvature_seed). Padding is left out.
    """
    names = {module: name for name, module in model.named_modules()}
    columns = {names[linear]: linear.in_features for linear in linears} | {TABLES: model.get_input_embeddings().embedding_dim}
    moments = {name: torch.zeros(n, n, device=model.device) for name, n in columns.items()}
    generator = torch.Generator().manual_seed(seed)
    mask = embedded = None

    def add(name, x):
        x = x.detach().float().flatten(0, -2)
        x = x[mask] if len(x) == len(mask) else x  # a pooler sees one token an example
        moments[name].addmm_(x.T, x)

    def note_embedded(module, args, output):
        nonlocal embedded
        embedded = output.detach().requires_grad_()
        return embedded

    handles = [linear.register_forward_pre_hook(lambda module, args: add(names[module], args[0])) for linear in linears]
    handles.append(model.get_input_embeddings().register_forward_hook(note_embedded))
    try:
        with evaluating(model, gradients=True):
            for batch in batches:
                mask = batch["attention_mask"].flatten().bool()
                with train_utils.autocast(model.device, precision):
                    logits = model(**inputs_of(batch)).logits
                start = curvature_seed(logits, logits.detach(), 1.0, generator)
                add(TABLES, *torch.autograd.grad(logits, embedded, start))
    finally:
        for handle in handles:
            handle.remove()
    return moments


@torch.no_grad()
def compensated(weight: torch.Tensor, scale: torch.Tensor, zero: torch.Tensor | None, bits: int, moments: torch.Tensor,
                damping: float = 0.1, block: int = 128) -> torch.Tensor:  # fmt: skip
    """(rows, columns) weights changed so that rounding them to the nearest integer of their scales (rows, groups) is GPTQ.

    One column after the other, all rows at once: what rounding a column does wrong, the columns that are still to come make
    good as far as the moments (columns, columns) let them (arXiv 2210.17323, algorithm 1). Returned are the weights before they
    are rounded, not after, so that training starts as far from the next integer as they are. damping: share of the mean of the
    moments' diagonal that is added to it.
    """
    columns, size = weight.shape[1], weight.shape[1] // scale.shape[1]
    h = moments.double() + damping * moments.diagonal().double().mean().clamp_min(1e-30) * torch.eye(columns).to(moments)
    inverse = torch.cholesky_inverse(torch.linalg.cholesky(h))
    u = torch.linalg.cholesky(inverse, upper=True).to(weight.dtype)
    u /= u.diagonal().unsqueeze(1).clone()  # a row over its diagonal: what an error of one takes from the columns behind it
    left = weight.clone()
    for start in range(0, columns, block):
        end = min(start + block, columns)
        errors = weight.new_empty(len(weight), end - start)
        for j in range(start, end):
            which = scale[:, j // size], None if zero is None else zero[:, j // size]
            errors[:, j - start, None] = left[:, j : j + 1] - dequantize_(to_integers(left[:, j : j + 1], *which, bits), *which)
            left[:, j + 1 : end] -= errors[:, j - start, None] * u[j, j + 1 : end]
        left[:, end:] -= errors @ u[start:end, end:]
    return left


@torch.no_grad()
def compensate_(model, moments: dict[str, torch.Tensor]) -> None:
    """Round the weights of every quantised module that has moments; what follows its weights (minmax) is left alone."""
    for name, module in quantized_modules(model).items():
        of_module = moments.get(TABLES if isinstance(module, QuantizedEmbedding) else name)
        if module.scheme.method != "minmax" and of_module is not None and len(of_module) == module.weight.shape[1]:
            new = compensated(module.weight, module.scale.clamp_min(EPS), module.zero, module.scheme.bits, of_module)
            module.weight.copy_(new)
