"""Pruning while training: a sparsity that rises by a schedule, and the SparseTrainer whose masks grow with it."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import torch
from torch.distributed.tensor import DTensor
from transformers import TrainerCallback

from common import sharding
from common.checkpoint import load_tensors, save_tensors
from common.sparse_trainer import Mask, SparseTrainer, local_mask, plain_name, prunable_weights

FLOOR = 0.1
MASKS = "masks.safetensors"  # in a checkpoint


@dataclass(frozen=True)
class Cubic:
    """Sparsity that rises from `start` to `end` within `n_steps` optimizer steps, fast at first: Zhu and Gupta 2017
    (arXiv 1710.01878), eq. 1. Pruned is at every multiple of `every`, and at `n_steps`.
    """

    start: float
    end: float
    n_steps: int
    every: int

    def sparsity(self, step: int) -> float:
        return self.end + (self.start - self.end) * (1 - min(step, self.n_steps) / self.n_steps) ** 3

    def prunes_at(self, step: int) -> bool:
        return step == self.n_steps or (step < self.n_steps and step % self.every == 0)


def kth_smallest(scores: list[torch.Tensor], k: int | list[int], everywhere: bool = False) -> torch.Tensor:
    """The k-th smallest (from 1) of all numbers in `scores` together, (1,), or with a k for each tensor, of each, (n,).

    scores: fp32, none negative. everywhere: with the parts of all processes, which all have to call it. Nothing waits for the
    device.
    """
    together = isinstance(k, int)
    bits = [score.view(torch.int32) for score in scores]  # of numbers that are not negative, in the same order
    wanted = torch.tensor([k] if together else k, device=scores[0].device)
    low = torch.zeros_like(wanted)  # the answer is low at least and high at most
    high = torch.full_like(wanted, 2**31 - 1)
    for _ in range(31):
        middle = (low + high) // 2
        count = torch.stack([(part <= middle[0 if together else i]).sum() for i, part in enumerate(bits)])
        count = count.sum(0, keepdim=True) if together else count
        if everywhere:
            torch.distributed.all_reduce(count)
        enough = count >= wanted
        low, high = torch.where(enough, low, middle + 1), torch.where(enough, middle, high)
    return high.to(torch.int32).view(torch.float32)


class GradualTrainer(SparseTrainer):
    """A SparseTrainer that prunes at the steps of `schedule`, over all prunable weights together; what went never comes back.

    A weight goes by w^2 v, what that costs the loss by the diagonal of the Hessian (LeCun et al. 1989, Optimal Brain Damage),
    for which v, Adam's average of its squared gradients, stands: the optimizer has to be an AdamW. Every projection keeps FLOOR
    of what it would keep if all were pruned alike: one with no weight left has no gradient either. Checkpoints hold the masks,
    so that a run goes on exactly. While sparsity rises no checkpoint is the best.
    """

    def __init__(self, *args, schedule: Cubic, **kwargs):
        super().__init__(*args, **kwargs)
        self.schedule = schedule
        free = {name: torch.ones(weight.shape, dtype=torch.bool) for name, weight in prunable_weights(self.model).items()}
        self.masks = {name: Mask._packed(one) for name, one in free.items()} | self.masks
        self.add_callback(_Pruning(self))

    @torch.no_grad()
    def prune_(self, sparsity: float) -> None:
        """Grow the masks until this share of all prunable weights is zero. All processes have to call it."""
        states = getattr(self.optimizer, "optimizer", self.optimizer).state
        if not all(states.get(parameter) for parameter, _ in self._masked):
            return  # fp16 has overflowed in every step so far: nothing is known of any weight
        pieces = [(sharding.local(parameter), states[parameter]) for parameter, _ in self._masked]
        scores = [weight.float().abs() * sharding.local(state["exp_avg_sq"]).float().sqrt() for weight, state in pieces]
        sizes = [parameter.numel() for parameter, _ in self._masked]
        most = [max(1, round(n * (1 - FLOOR * (1 - sparsity)))) for n in sizes]
        for score, limit in zip(scores, kth_smallest(scores, most, self.is_sharded), strict=True):
            score.masked_fill_(score > limit, torch.inf)
        limit = kth_smallest(scores, max(1, round(sum(sizes) * sparsity)), self.is_sharded)
        grown = []
        for (parameter, mask), (weight, state), score in zip(self._masked, pieces, scores, strict=True):
            if weight.numel():
                mask = Mask._packed((score > limit) & mask.free())
                for values in (weight, *(sharding.local(state[key]) for key in ("exp_avg", "exp_avg_sq"))):
                    mask.zero_(values)
            grown.append((parameter, mask))
        self._masked = grown

    def _whole_masks(self) -> dict[str, torch.Tensor]:
        """One bit a weight, by name. All processes have to call it."""
        found = {}
        names = {id(parameter): plain_name(name) for name, parameter in self.model.named_parameters()}
        for parameter, mask in self._masked:
            free = mask.free()
            if isinstance(parameter, DTensor):
                free = DTensor.from_local(free.to(torch.uint8), parameter.device_mesh, parameter.placements,
                                          shape=parameter.shape, stride=parameter.stride()).full_tensor().bool()  # fmt: skip
            found[names[id(parameter)]] = Mask._packed(free).data
        return found

    def _save(self, output_dir=None, state_dict=None):
        super()._save(output_dir, state_dict)
        if self._masked is not None:
            masks = self._whole_masks()
            if self.args.should_save:
                save_tensors(Path(output_dir or self.args.output_dir) / MASKS, masks)

    def _load_from_checkpoint(self, resume_from_checkpoint, model=None):
        super()._load_from_checkpoint(resume_from_checkpoint, model)
        stored = load_tensors(Path(resume_from_checkpoint) / MASKS)
        self.masks = {name: Mask(mask.shape, None, stored[name]) for name, mask in self.masks.items()}
        if self._masked is not None:  # the best checkpoint is loaded at the end, and nothing is trained any more
            named = {plain_name(name): parameter for name, parameter in self.model.named_parameters()}
            self._masked = [(named[name], local_mask(mask, named[name])) for name, mask in self.masks.items()]

    def _determine_best_metric(self, metrics, trial):
        return self.state.global_step >= self.schedule.n_steps and super()._determine_best_metric(metrics, trial)


class _Pruning(TrainerCallback):
    def __init__(self, trainer: GradualTrainer):
        self.trainer = trainer

    def on_step_end(self, args, state, control, **kwargs):
        schedule = self.trainer.schedule
        if schedule.prunes_at(state.global_step):
            self.trainer.prune_(schedule.sparsity(state.global_step))
