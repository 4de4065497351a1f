"""Block reconstruction: a pruned block is trained, alone, to give the dense model's hidden states for what it is given.

What least squares cannot do, moving what is left inside a block, gradients do: a block at a time, on calibration text, with no
labels and no other block in memory (BRECQ, arXiv 2102.05426, does so for quantisation; EBFT, arXiv 2402.12419, for pruning).
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

import torch

from common import train_utils
from common.runs import UserError
from common.streaming import Activations, StreamedLM

RATE = 0.05  # the largest step of a tensor, as a share of its root mean square: no model needs a rate of its own
RISING = 10  # steps in which the rate rises
HELD_OUT = 8  # of so many batches one is not trained on


def n_held_out(n_batches: int) -> int:
    """How many batches of calibration text judge what the others train. UserError where there is nothing to train on."""
    if n_batches < 2:
        raise UserError("--reconstruct_passes: the calibration text is one batch, and another is needed to judge what it "
                        "trains. Raise --importance_samples")  # fmt: skip
    return max(1, n_batches // HELD_OUT)


def in_passes(passes: int, seed: int) -> Callable[..., tuple[float, float]] | None:
    """What `structured.refit_blocks` takes to reconstruct in so many passes; None for none."""
    return partial(reconstruct_, passes=passes, seed=seed) if passes else None


def reconstruct_(lm: StreamedLM, i: int, hidden: Activations, aims: Activations, passes: int, seed: int) -> tuple[float, float]:
    """Train block `i`, which is loaded, to give `aims` for `hidden`; its relative error before and after, on held-out batches.

    hidden, aims: batches (B, T, hidden). The loss is a token's squared error over its aim's squared norm, so that no token with
    huge states rules it. Groups whose weights are zero have no gradient and stay (pruning.zero_groups_). AdamW, a batch a step,
    the rate relative to each tensor and falling to nothing; after each pass the held-out batches, the last ones, are
    judged, and the best state stays: a block is never worse on them than it was.
    """
    generator, n = torch.Generator().manual_seed(seed * 1009 + i), len(hidden) - n_held_out(len(hidden))
    parameters = [p for p in lm.layers[i].parameters() if p.is_floating_point()]
    scales = torch.stack([p.square().mean().sqrt() for p in parameters]).tolist()
    groups = [{"params": [p], "scale": scale} for p, scale in zip(parameters, scales, strict=True)]
    optimizer = torch.optim.AdamW(groups, betas=(0.9, 0.95), eps=1e-12, weight_decay=0.0, fused=lm.device.type == "cuda")
    scaler = train_utils.grad_scaler(lm.device, lm.precision)
    before = least = _error(lm, i, hidden, aims, n)
    best, step = [p.clone() for p in parameters], 0
    for _ in range(passes):
        lm.layers[i].requires_grad_(True)
        with torch.enable_grad():
            for b in torch.randperm(n, generator=generator).tolist():
                step += 1
                share = min(1.0, step / RISING) * (1 - (step - 1) / (passes * n))
                for group in optimizer.param_groups:
                    group["lr"] = RATE * share * group["scale"]
                scaler.scale(_loss(lm, i, hidden[b], aims[b])).backward()
                scaler.step(optimizer)
                scaler.update()
                optimizer.zero_grad()
        lm.layers[i].requires_grad_(False)
        if (error := _error(lm, i, hidden, aims, n)) < least:  # never true of NaN
            least, best = error, [p.clone() for p in parameters]
    for parameter, value in zip(parameters, best, strict=True):
        parameter.copy_(value)
    return before, least


def _loss(lm: StreamedLM, i: int, given: torch.Tensor, aim: torch.Tensor) -> torch.Tensor:
    aim = aim.to(lm.device)
    missed = (lm.run(i, given.to(lm.device)) - aim).square().sum(-1)
    return (missed / aim.square().sum(-1).clamp_min(1e-12)).mean()


@torch.no_grad()
def _error(lm: StreamedLM, i: int, hidden: Activations, aims: Activations, first: int) -> float:
    """The mean loss of the batches from `first` on."""
    return float(torch.stack([_loss(lm, i, hidden[b], aims[b]) for b in range(first, len(hidden))]).mean())
