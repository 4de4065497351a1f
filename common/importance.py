"""Scores of groups (heads and neurons): pure numbers, a few small tensors, all groups of a model at once.

A gate is a factor of one on a group's activation, in front of the projection that reads it (o, or the FFN's output). The
gradient of a gate is the inner product of that activation with the gradient that reaches it, so it costs one product where
backward passes anyway, and neither a gate nor a weight gradient is ever stored. It is taken for each example apart.
"""

from __future__ import annotations

from collections.abc import Callable
from contextlib import contextmanager

import torch

from common.blocks import KINDS, Block, group_costs, group_counts
from common.runs import UserError

Scores = dict[str, list[torch.Tensor]]  # kind -> one (n_groups,) tensor a layer


def split_groups(flat: torch.Tensor, blocks: list[Block]) -> Scores:
    """A (n_groups,) vector over all layers, heads first, as Scores."""
    counts = group_counts(blocks)
    parts = flat.split([n for kind in KINDS for n in counts[kind]])
    return {"heads": list(parts[: len(blocks)]), "neurons": list(parts[len(blocks) :])}


# ------------------------------------------------------------------------------------------------------ from the weights


@torch.no_grad()
def l2_scores(blocks: list[Block], generator: torch.Generator | None = None) -> Scores:
    """Squared L2 norm of all weights of a group, its rows in and its columns out. `generator`: as every score takes it."""
    scores: Scores = {kind: [] for kind in KINDS}
    for block in blocks:
        a, groups = block.attention, block.attention.n_groups
        rows = [linear.weight.float().square().sum(1).view(groups, -1).sum(1) for linear in a.ins]
        columns = a.o.weight.float().square().sum(0).view(groups, -1).sum(1)
        scores["heads"].append(sum(rows) + columns)
        rows = [linear.weight.float().square().sum(1) for linear in block.ffn.ins]
        scores["neurons"].append(sum(rows) + block.ffn.out.weight.float().square().sum(0))
    return scores


def random_scores(blocks: list[Block], generator: torch.Generator) -> Scores:
    """The control: uniform in [0, 1) per parameter of a group, so that neither heads nor neurons are favoured."""
    costs, counts, device = group_costs(blocks), group_counts(blocks), blocks[0].ffn.out.weight.device
    return {kind: [torch.rand(n, generator=generator).to(device) * cost
                   for n, cost in zip(counts[kind], costs[kind], strict=True)] for kind in KINDS}  # fmt: skip


# -------------------------------------------------------------------------------------------- from activations and gates


class GateRecorder:
    """Records, for every group of a model, statistics of its gate on the examples of one step.

    Inside `with recorder.recording():`, run a forward; the inputs of the o and FFN output projections are then noted, and
    the statistics of the backward that follows are added to a flat (n_groups,) vector (all heads of all layers, then all
    neurons), one for each name in `wanted`:

    - `taylor`: mean over examples of |g|, g the gradient of the example's loss by the gate (Michel et al. 2019,
      arXiv 1905.10650, eq. 2);
    - `fisher`: mean of g^2, the diagonal of the empirical Fisher information of the gates (Kwon et al. 2022,
      arXiv 2204.09656, eq. 8), with examples kept apart where that code squares the gradient of a batch;
    - `activation`: mean over tokens of the squares of the group's activation columns, each times the squared norm of the
      weight column that reads it: the energy that the group adds to the residual stream, coherence aside.

    `kd_gradient` needs a backward of its own: `curvature(logits, teacher_logits)`.

    `keep_statistics()` keeps those of the last `window` steps, `averages()` is their mean.
    """

    def __init__(self, model, blocks: list[Block], wanted: tuple[str, ...], window: int = 1):
        self.blocks = blocks
        self.wanted = wanted
        self.mask = None
        self._model = model
        # in the order of the flat vector: every o projection (a group is head_dim columns times the heads of its KV head),
        # then every FFN output projection (a group is one column)
        self._readers = [b.attention.o for b in blocks] + [b.ffn.out for b in blocks]
        self._groups = [n for kind in KINDS for n in group_counts(blocks)[kind]]
        self._inputs: list[torch.Tensor | None] = [None] * len(self._readers)
        self._parts: dict[str, list[torch.Tensor | None]] = {}
        self._watch = True
        self.loss_scale: torch.Tensor | float = 1.0  # of fp16; divided out
        self._window = torch.zeros(window, len(wanted), sum(self._groups), device=self._readers[0].weight.device)
        self._n_kept = 0

    @contextmanager
    def recording(self, n_examples: int | None = None):
        """Hooks are on inside and gone outside, whatever happens inside.

        n_examples: of a batch without padding, where blocks are run without their model.
        """
        self._parts = {name: [None] * len(self._readers) for name in self.wanted}
        self._n_examples, handles = n_examples, []
        if n_examples is None:
            handles.append(self._model.register_forward_pre_hook(self._note_batch, with_kwargs=True))
        handles += [reader.register_forward_pre_hook(self._note_input(i)) for i, reader in enumerate(self._readers)]
        try:
            yield self
        finally:
            for handle in handles:
                handle.remove()
            self._inputs = [None] * len(self._readers)

    def statistics(self) -> torch.Tensor:
        """What the step recorded: (len(wanted), n_groups), fp32."""
        if not self.wanted:
            return torch.zeros(0, sum(self._groups))
        return torch.stack([torch.cat(self._parts[name]) for name in self.wanted])

    def keep_statistics(self) -> None:
        """Put what the step recorded into the window, in place of the oldest step once it is full."""
        self._window[self._n_kept % len(self._window)] = self.statistics()
        self._n_kept += 1

    def forget(self) -> None:
        """Empty the window."""
        self._n_kept = 0

    def averages(self) -> list[Scores]:
        """The window's mean, one Scores for each name in `wanted`. A step of fp16 that overflowed counts as zero."""
        mean = self._window[: self._n_kept].nan_to_num(0, 0, 0).mean(0)
        return [split_groups(part, self.blocks) for part in mean]

    def state_dict(self) -> dict:
        return {"window": self._window, "n_kept": self._n_kept}

    def load_state_dict(self, state: dict) -> None:
        self._window, self._n_kept = state["window"].to(self._window.device), state["n_kept"]

    def _note_batch(self, module, args, kwargs):
        self.mask = kwargs.get("attention_mask")
        self._n_examples = kwargs["input_ids"].shape[0]

    def _note_input(self, i: int) -> Callable:
        def hook(module, args):
            x = args[0]
            self._inputs[i] = x
            if "activation" in self.wanted:
                self._parts["activation"][i] = self._energy(i, x.detach())
            if x.requires_grad and {"taylor", "fisher"} & set(self.wanted):
                values = x.detach()  # a hook that held x itself would keep both alive for ever
                x.register_hook(lambda grad: self._note_gradient(i, values, grad))

        return hook

    def _per_example(self, i: int, product: torch.Tensor) -> torch.Tensor:
        """(..., width) elementwise products -> (examples, groups): summed over tokens and over the columns of a group."""
        summed = product.view(self._n_examples, -1, product.shape[-1]).sum(1, dtype=torch.float32)  # (B, width)
        return summed.view(self._n_examples, self._groups[i], -1).sum(2)

    @torch.no_grad()
    def _energy(self, i: int, x: torch.Tensor) -> torch.Tensor:
        square = x.float().square()
        tokens = x.numel() // x.shape[-1]
        if self.mask is not None:
            square = square.view(*self.mask.shape, -1) * self.mask.unsqueeze(-1)
            tokens = self.mask.sum()
        column = self._readers[i].weight.float().square().sum(0)
        return (square.flatten(0, -2).sum(0) / tokens * column).view(self._groups[i], -1).sum(1)

    def _note_gradient(self, i: int, x: torch.Tensor, grad: torch.Tensor) -> None:
        if self._watch:
            # a mean loss over B examples: times B is the gradient of the example's own loss
            gate = self._per_example(i, x * grad) * (self._n_examples / self.loss_scale)
            for name, value in (("taylor", gate.abs), ("fisher", gate.square)):
                if name in self.wanted:
                    self._parts[name][i] = value().mean(0)

    def curvature(self, logits: torch.Tensor, teacher_logits: torch.Tensor, temperature: float,
                  generator: torch.Generator) -> None:  # fmt: skip
        """`kd_gradient`: the diagonal of the Fisher matrix of the gates under the teacher's labels, on this batch.

        The squares of J^T v, v the vectors of `curvature_seed` and J the gates' Jacobian of the logits.
        logits, teacher_logits: (B, C). The graph is kept for the training backward.
        """
        seed = curvature_seed(logits, teacher_logits, temperature, generator)
        self._watch = False
        try:
            grads = torch.autograd.grad(logits, self._inputs, seed, retain_graph=True)
        finally:
            self._watch = True
        for i, (x, grad) in enumerate(zip(self._inputs, grads, strict=True)):
            self._parts["kd_gradient"][i] = self._per_example(i, x.detach() * grad).square().mean(0)


@torch.no_grad()
def curvature_seed(logits: torch.Tensor, teacher_logits: torch.Tensor, temperature: float,
                   generator: torch.Generator) -> torch.Tensor:  # fmt: skip
    """(B, C) vectors v to start a backward of the logits with, whose squares estimate the curvature of distillation.

    The gradient of KL(teacher || student) vanishes where the student still is the teacher; this does not, and there it is
    that loss's Gauss-Newton matrix. E[v v^T] = sum_c t_c (p - e_c)(p - e_c)^T with t, p the softened outputs of teacher and
    student: the Fisher matrix under the teacher's labels. v = sum_c sqrt(t_c) r_c (p - e_c) with random signs r_c has that
    mean (Hutchinson 1989; Martens 2014, arXiv 1412.1193, section 9.2); of two classes the matrix has rank one and v is its
    root, with nothing random. No label is used.
    """
    teacher = (teacher_logits.float() / temperature).softmax(-1)
    student = (logits.float() / temperature).softmax(-1)
    if teacher.shape[-1] == 2:
        root = (teacher * student.flip(-1).square()).sum(-1, keepdim=True).sqrt()
        return torch.cat([root, -root], -1).to(logits.dtype)
    signs = torch.randint(0, 2, teacher.shape, generator=generator).to(teacher) * 2 - 1
    weights = teacher.sqrt() * signs
    return (weights.sum(-1, keepdim=True) * student - weights).to(logits.dtype)


# ---------------------------------------------------------------------------------------------------------- combinations

RECORDED = ("taylor", "fisher", "activation", "kd_gradient")  # by GateRecorder; l2 and random need no data


def parse_importance(text: str, known: tuple[str, ...]) -> tuple[str, ...]:
    """`l2+kd_gradient` -> its names. UserError for a name that is not known or comes twice."""
    names = tuple(text.split("+"))
    if not set(names) <= set(known) or len(set(names)) != len(names):
        raise UserError(f"--importance {text}: expected one or several of {', '.join(known)}, each once, joined by +")
    return names


def combine(parts: list[Scores]) -> Scores:
    """Sum of several scores, each first divided by its mean over all groups of the model, so that they weigh the same."""
    if len(parts) == 1:
        return parts[0]
    totals: Scores = {kind: [torch.zeros_like(t) for t in parts[0][kind]] for kind in KINDS}
    for scores in parts:
        mean = torch.cat([t for kind in KINDS for t in scores[kind]]).mean().clamp_min(1e-30)
        for kind in KINDS:
            totals[kind] = [total + t / mean for total, t in zip(totals[kind], scores[kind], strict=True)]
    return totals
