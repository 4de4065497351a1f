"""Optimizers that `transformers.Trainer` does not have: Muon with AdamW for the rest, and torchao's for bf16 weights."""

from __future__ import annotations

import torch
from torch import nn

from common.runs import require

OPTIMIZERS = ("adamw", "muon", "adamw_stochastic", "adamw_8bit", "adafactor", "sgd")
TORCHAO = ("adamw_8bit", "adamw_stochastic")  # they need that package
WHOLE_ONLY = ("adamw_8bit", "adafactor", "muon")  # they cannot step on the pieces of weights that FSDP2 has


class MuonWithAdamW(torch.optim.Optimizer):
    """Muon for matrices, AdamW for all else: embeddings, norms, biases.

    Muon (Jordan et al., 2024) makes a matrix's momentum orthogonal, so that a step is as large in every direction; its steps
    are scaled to the size of AdamW's (arXiv 2502.16982), so both take the same learning rate. It moves weights whose
    gradients are zero: under masks they have to be masked too, as SparseTrainer does.

    params: groups, as a Trainer makes them. matrices: those of their parameters that Muon is for, all 2-D.
    """

    def __init__(self, params, lr: float, matrices: list[nn.Parameter]):
        chosen, parts = {id(parameter) for parameter in matrices}, {True: [], False: []}
        for group in map(dict, params):
            every = list(group.pop("params"))
            for by_muon, groups in parts.items():
                if picked := [parameter for parameter in every if (id(parameter) in chosen) == by_muon]:
                    groups.append({**group, "params": picked, "by_muon": by_muon})
        made = [torch.optim.Muon(parts[True], lr, adjust_lr_fn="match_rms_adamw")] if parts[True] else []
        made += [torch.optim.AdamW(parts[False], lr, fused=True)] if parts[False] else []
        super().__init__([group for part in made for group in part.param_groups], {"lr": lr})
        self._parts = made
        self._share()

    def _share(self) -> None:
        """Both work on this optimizer's groups and states: they are what is scheduled, saved and loaded."""
        for part in self._parts:
            by_muon = isinstance(part, torch.optim.Muon)
            part.state, part.param_groups = self.state, [g for g in self.param_groups if g["by_muon"] == by_muon]

    def load_state_dict(self, state_dict) -> None:
        super().load_state_dict(state_dict)
        self._share()

    def step(self, closure=None):
        loss = None if closure is None else torch.enable_grad()(closure)()
        for part in self._parts:
            part.step()
        return loss


def matrices_of(model: nn.Module) -> list[nn.Parameter]:
    """The parameters that Muon is for: those with two dimensions that are no embeddings and no output head."""
    tables = [module for module in model.modules() if isinstance(module, nn.Embedding)] + [model.get_output_embeddings()]
    tables = {id(table.weight) for table in tables if table is not None}
    return [parameter for parameter in model.parameters() if parameter.ndim == 2 and id(parameter) not in tables]


def check_optimizer(name: str, flag: str) -> None:
    """UserError where it needs a package that is not installed."""
    if name in TORCHAO:
        require("torchao", f"{flag} {name}")


def trainers_own(name: str) -> str:
    """A Trainer's `optim`: the optimizer where it has it itself; `for_trainer` beats it."""
    return name if name in ("adafactor", "sgd") else "adamw_torch_fused"


def for_trainer(name: str, learning_rate: float, model: nn.Module) -> tuple[type, dict] | None:
    """A Trainer's `optimizer_cls_and_kwargs`; None for an optimizer that it has itself.

    adamw_stochastic and adamw_8bit, with moments of 8 bits, are torchao's AdamW. Both round bf16 weights up or down at random,
    in proportion, so that updates smaller than a bf16 step add up (arXiv 2010.06192); plain AdamW in bf16 rounds them away.
    """
    if name == "muon":
        return MuonWithAdamW, {"lr": learning_rate, "matrices": matrices_of(model)}
    if name not in TORCHAO:
        return None
    from torchao.optim.adam import AdamW8bit, _AdamW

    kinds = {"adamw_stochastic": _AdamW, "adamw_8bit": AdamW8bit}
    return kinds[name], {"lr": learning_rate, "bf16_stochastic_round": True}
