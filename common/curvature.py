"""What calibration text says of a causal LM's projections: second moments of inputs, Fisher matrices of outputs, allocation.

Every pass is over a `StreamedLM`, one block in memory at a time.
"""

from __future__ import annotations

from collections.abc import Callable
from contextlib import contextmanager
from pathlib import Path

import torch
from torch import nn
from torch.nn import functional

from common import train_utils
from common.blocks import Block
from common.checkpoint import save_tensors
from common.importance import curvature_seed
from common.one_shot import FISHER_DAMPING, Pattern, inverse_of, obs_scores, wanda_scores
from common.streaming import Activations, StreamedLM

FULL_FISHER = 8192  # projections of more outputs than this get the diagonal of their Fisher matrix only
LIMIT = 0.08  # how far a sparsity is from the mean at most: the lambda of OWL
LOGITS_AT_ONCE = 2**26  # numbers, of which there are several copies; of 128k words that is 512 tokens
PIECE, STRIPE = 2048, 512  # of a product of second moments: tokens whose sum is rounded, rows at a time
QUANTILES = 1024  # of a projection's scores, kept to choose its sparsity by


def _add_product_(total: torch.Tensor, x: torch.Tensor, rounded: bool) -> None:
    """Add X^T X, of x (tokens, n), to the upper triangle of `total`, (n, n) fp32.

    CUDA sums products of 16-bit numbers in fp32. CPUs that have bf16 round what they sum: with `rounded` such numbers are
    multiplied as they are, which is four times as fast, and each sum over PIECE tokens is off by a relative 2^-9 at most.
    """
    with torch.autocast(x.device.type, enabled=False):
        if x.device.type == "cuda" and x.dtype in (torch.float16, torch.bfloat16):
            total += torch.mm(x.T, x, out_dtype=torch.float32)
            return
        rounded = rounded and x.device.type == "cpu" and x.dtype == torch.bfloat16 and train_utils.cpu_has_bf16()
        for piece in x.split(PIECE) if rounded else [x.float()]:
            for start in range(0, x.shape[1], STRIPE):  # the triangle alone
                of_stripe, stripe = total[start : start + STRIPE, start:], piece[:, start : start + STRIPE].T
                if rounded:
                    of_stripe += stripe @ piece[:, start:]
                else:
                    of_stripe.addmm_(stripe, piece[:, start:])


def _mirror_(total: torch.Tensor) -> None:
    """Give a matrix, of which the upper triangle is there, the lower one, in stripes."""
    for start in range(0, len(total), STRIPE):
        end = start + STRIPE
        inside = total[start:end, start:end]
        inside.copy_(inside.triu() + inside.triu(1).T)
        total[end:, start:end] = total[start:end, end:].T


@contextmanager
def input_moments(block: Block, full: bool = True, only: tuple[nn.Linear, ...] | None = None, rounded: bool = False):
    """Inside, every forward of the block adds up X^T X of what its projections read; `full` False: only its diagonal.
    only: of the inputs of these projections [all]. rounded: products of bf16 may be rounded (`_add_product_`).

    Yields {projection: (in, in) or (in,) fp32}; projections that share an input share the tensor. After it they are means
    over the tokens.
    """
    moments, n_tokens, handles = {}, 0, []
    inputs = [linears for linears in block.inputs if only is None or set(only) & set(linears)]

    def note(first, count):
        def hook(module, args):
            nonlocal n_tokens
            x = args[0].detach().flatten(0, -2)  # (tokens, in)
            n_tokens += len(x) if count else 0
            _add_product_(moments[first], x, rounded) if full else moments[first].add_(x.float().square().sum(0))

        return hook

    for i, linears in enumerate(inputs):
        n = linears[0].in_features
        moments |= dict.fromkeys(linears, torch.zeros((n, n) if full else (n,), device=linears[0].weight.device))
        handles.append(linears[0].register_forward_pre_hook(note(linears[0], i == 0)))
    try:
        yield moments
    finally:
        for handle in handles:
            handle.remove()
    for linears in inputs:
        if full:
            _mirror_(moments[linears[0]])
        moments[linears[0]] /= max(1, n_tokens)


@contextmanager
def output_gradients(fishers: dict[nn.Linear, torch.Tensor], rounded: bool = False):
    """Inside, every backward adds up G^T G of the gradients G at these projections' outputs: (out, out), or its diagonal.
    rounded: as in `input_moments`.
    """

    def hook(module, args, output):
        if output.requires_grad:
            output.register_hook(lambda grad: add(fishers[module], grad.flatten(0, -2)))

    def add(total, grad):
        _add_product_(total, grad, rounded) if total.ndim == 2 else total.add_(grad.float().square().sum(0))

    handles = [linear.register_forward_hook(hook) for linear in fishers]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()
    for total in fishers.values():
        if total.ndim == 2:
            _mirror_(total)


def forward_states(lm: StreamedLM, samples: torch.Tensor, batch_size: int, directory: Path, on_disk: bool,
            done: Callable[[str], None] = lambda _: None) -> list[Activations]:  # fmt: skip
    """The inputs of all blocks of the dense model, and the output of the last one."""
    states = [lm.embed(samples, batch_size, directory / "states-0" if on_disk else None)]
    for i in range(len(lm)):
        following = Activations(directory / f"states-{i + 1}" if on_disk else None)
        with lm.loaded(i), torch.no_grad():
            for b in range(len(states[i])):
                following.append(lm.run(i, states[i][b].to(lm.device)))
        states.append(following)
        done("forward")
    return states


def head_gradients(lm: StreamedLM, samples: torch.Tensor, batch_size: int, states: Activations, start: str,
                   generator: torch.Generator, directory: Path, on_disk: bool) -> Activations:  # fmt: skip
    """Gradients at the last block's output: of each sample's mean loss (labels), or from `curvature_seed`s (curvature)."""
    grads = Activations(directory / f"gradients-{start}" if on_disk else None)
    at_once = max(1, LOGITS_AT_ONCE // (batch_size * lm.model.config.vocab_size))
    for b in range(len(states)):
        ids, parts = samples[b * batch_size : (b + 1) * batch_size].to(lm.device), []
        for part in range(0, ids.shape[1], at_once):  # what follows the last block knows no other token
            of_part = states[b][:, part : part + at_once].to(lm.device).clone().requires_grad_()
            logits = lm.logits(ids[:, part : part + at_once], of_part)  # (B, at_once, V)
            if start == "labels":
                targets = functional.pad(ids, (0, 1), value=-100)[:, part + 1 : part + at_once + 1]
                loss = functional.cross_entropy(logits.flatten(0, 1), targets.flatten(), reduction="sum", ignore_index=-100)
                parts.append(torch.autograd.grad(loss / (ids.shape[1] - 1), of_part)[0])
            else:
                seed = curvature_seed(logits.detach(), logits.detach(), 1.0, generator)
                parts.append(torch.autograd.grad(logits, of_part, seed)[0])
        grads.append(torch.cat(parts, 1))
    return grads


def fisher_sweep(lm: StreamedLM, samples: torch.Tensor, batch_size: int, seed: int, directory: Path, on_disk: bool,
                 pattern: Pattern | None, done: Callable[[str], None]) -> dict[str, torch.Tensor]:  # fmt: skip
    """One forward and one backward of the dense model, block by block: `fisher-<i>.safetensors` in `directory`.

    The Fisher matrix of a projection is the second moment, a token, of the gradients at its outputs of the KL divergence of
    the model's predictions from their own (importance.curvature_seed: no label is used). Returned, by the projection's name,
    are the quantiles (QUANTILES,) of what its weights (or blocks) cost in nats each, by `one_shot.obs_scores`; without a
    `pattern` none.
    """
    generator = torch.Generator().manual_seed(seed)
    inputs = forward_states(lm, samples, batch_size, directory, on_disk, done)
    grads = head_gradients(lm, samples, batch_size, inputs[-1], "curvature", generator, directory, on_disk)
    curves, n_tokens = {}, samples.numel()
    for i in reversed(range(len(lm))):
        with lm.loaded(i) as block:
            fishers = {linear: torch.zeros((n, n) if n <= FULL_FISHER else (n,), device=lm.device)
                       for linear in block.projections for n in [linear.out_features]}  # fmt: skip
            with input_moments(block, pattern is not None) as grams, output_gradients(fishers):
                for b in range(len(grads)):
                    states = inputs[i][b].to(lm.device).clone().requires_grad_()
                    with torch.enable_grad():
                        output = lm.run(i, states)
                    grads[b] = torch.autograd.grad(output, states, grads[b].to(lm.device))[0]
            for linear, fisher in fishers.items():
                fisher /= n_tokens
                if pattern is not None:
                    curves[lm.names[linear]] = score_quantiles(linear.weight, grams[linear], fisher, pattern)
            save_tensors(directory / f"fisher-{i}.safetensors", {lm.names[linear]: f for linear, f in fishers.items()})
        inputs.pop().drop()
        done("backward")
    inputs.pop().drop()
    grads.drop()
    return curves


def score_quantiles(weight: torch.Tensor, gram: torch.Tensor, fisher: torch.Tensor, pattern: Pattern) -> torch.Tensor:
    """Quantiles (QUANTILES,) of the OBS costs of a projection's weights, or blocks, in nats a token and a weight."""
    rows = inverse_of(fisher, FISHER_DAMPING).diagonal() if fisher.ndim == 2 else 1 / fisher.clamp_min(1e-30)
    scores = obs_scores(weight, inverse_of(gram), rows, pattern).flatten()
    if pattern.kind == "block":
        scores = scores / (pattern.n * pattern.m)
    ranked = scores.sort().values
    at = torch.linspace(0, len(ranked) - 1, QUANTILES, device=ranked.device).round().long()
    return ranked[at].cpu()


def sensitivity_allocation(curves: dict[str, torch.Tensor], sizes: dict[str, int], sparsity: float, limit: float | None = None
                           ) -> dict[str, float]:  # fmt: skip
    """A sparsity for each projection: what one threshold of the score would remove of it, so that in all it is `sparsity`.

    curves: quantiles of scores, ascending; sizes: weights. limit: no projection is further than this from the mean. By itself
    it is LIMIT, but a fifth of the density at most: scores are of a weight while all others are there, and where few stay a
    projection that keeps far fewer than the mean is lost.
    """
    limit = min(LIMIT, (1 - sparsity) / 5) if limit is None else limit
    logs = {name: curve.double().clamp_min(1e-30).log() for name, curve in curves.items()}
    low, high = torch.stack([*logs.values()]).aminmax()
    high = high + 1  # above all, so that everything could go
    most = max(sparsity, min(sparsity + limit, 0.99))

    def at(threshold: torch.Tensor) -> dict[str, float]:
        shares = {name: float(torch.searchsorted(curve, threshold)) / len(curve) for name, curve in logs.items()}
        return {name: min(max(share, sparsity - limit, 0.0), most) for name, share in shares.items()}

    def mean(shares: dict[str, float]) -> float:
        return sum(share * sizes[name] for name, share in shares.items()) / sum(sizes.values())

    for _ in range(60):
        middle = (low + high) / 2
        low, high = (middle, high) if mean(at(middle)) < sparsity else (low, middle)
    less, more = at(low), at(high)  # one step of the quantiles apart, or many where scores are equal: between them it is exact
    part = (sparsity - mean(less)) / max(mean(more) - mean(less), 1e-12)
    return {name: less[name] + part * (more[name] - less[name]) for name in curves}


@torch.no_grad()
def outlier_shares(lm: StreamedLM, hidden: Activations) -> list[float]:
    """For each block of the dense model, the share of its Wanda scores above 5 times their projection's mean."""
    shares = []
    for i in range(len(lm)):
        with lm.loaded(i) as block:
            with input_moments(block, full=False) as moments:
                lm.advance(i, hidden)
            above = total = 0
            for linear in block.projections:
                scores = wanda_scores(linear.weight, moments[linear])
                above, total = above + int((scores > 5 * scores.mean()).sum()), total + scores.numel()
            shares.append(above / total)
    return shares


def owl_allocation(outliers: list[float], sparsity: float, limit: float = LIMIT) -> list[float]:
    """OWL (arXiv 2310.05175): blocks with more outliers among their Wanda scores are pruned less, by `limit` at most.

    outliers: the share of scores above 5 times the mean, a block. The mean over blocks is `sparsity`. The paper scales the
    outliers to a range of twice the limit before it centres them, and so leaves the limit where they are skewed; here the
    furthest one is at the limit, or where the least or the greatest sparsity is.
    """
    ratios = torch.tensor(outliers, dtype=torch.float64)
    centred = ratios - ratios.mean()
    scale = min(limit, sparsity, 1 - sparsity) / centred.abs().max().clamp_min(1e-9)
    return (sparsity - scale * centred).tolist()
