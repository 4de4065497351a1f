"""Structured pruning: what groups cost, which to keep, when, and how a model is cut to them.

Score (common/importance.py), select (here, pure) and apply (here, in place, names end in `_`) are apart: any score works
with any selection. `keep` is {"heads": [bool (n,) a layer], "neurons": [...]}.
"""

from __future__ import annotations

from contextlib import contextmanager

import torch
from torch import nn

from common.blocks import KINDS, Block, blocks_of, group_costs, group_counts, set_shapes_, total_cost
from common.importance import Scores
from common.runs import UserError

Keep = dict[str, list[torch.Tensor]]


# ---------------------------------------------------------------------------------------------------------------- budget


def keep_all(blocks: list[Block]) -> Keep:
    device = blocks[0].ffn.out.weight.device
    counts = group_counts(blocks)
    return {kind: [torch.ones(n, dtype=torch.bool, device=device) for n in counts[kind]] for kind in KINDS}


def sparsity_of(keep: Keep, costs: dict[str, list[float]], total: float) -> float:
    """Fraction of the cost `total` that `keep` removes; `costs` and `total` as from group_costs and total_cost."""
    removed = sum(cost * float((~kept).sum()) for kind in KINDS for cost, kept in zip(costs[kind], keep[kind], strict=True))
    return removed / total


def scheduled_sparsity(target: float, progress: float, schedule: str = "cubic") -> float:
    """Sparsity after a fraction `progress` of the pruning phase.

    cubic: target * (1 - (1 - progress)^3), fast at first, when there is most to spare (Zhu and Gupta 2017,
    arXiv 1710.01878, eq. 1, from zero); linear: target * progress.
    """
    progress = min(max(progress, 0.0), 1.0)
    return target * (1 - (1 - progress) ** 3) if schedule == "cubic" else target * progress


# ------------------------------------------------------------------------------------------------------------- selection


def select(scores: Scores, costs: dict[str, list[float]], remove: float, alive: Keep, allocation: str = "global",
           granularity: str = "multi", floor: float = 0.05, limit: float | None = None, multiple: int = 1
           ) -> Keep:  # fmt: skip
    """Which groups to keep so that at least `remove` of cost is gone, and the least score with it. Pure.

    The knapsack is solved greedily: groups go in ascending order of score per cost. Neurons, being small, fill exactly up
    to the budget after the last head that still fits.

    scores, alive: (n,) a layer and kind; a group that is not alive stays removed and counts as removed.
    allocation: "global" ranks all layers together, "uniform" removes the same share of every layer (and of its heads, as
    near as whole heads come to it; neurons make up the rest).
    granularity: "multi" removes heads and neurons, "heads" or "neurons" only one kind.
    floor: the share of every layer's groups of a kind that is kept whatever the scores say, and never less than one.
    limit: the cost that may be gone with the last head [`remove`]. On the way to a target give the target: a schedule that
    rises by less than a head at a time would else never afford one.
    multiple: every layer keeps a multiple of so many neurons, for kernels that run such widths faster (`rounded`).

    Returns fewer removals than asked for where the floor or the granularity does not allow them.
    """
    kinds = KINDS if granularity == "multi" else (granularity,)
    choose = _select_uniform if allocation == "uniform" else _select_global
    keep = choose(scores, costs, remove, alive, kinds, floor, max(remove, limit or 0.0))
    return rounded(keep, scores, alive, multiple) if multiple > 1 and "neurons" in kinds else keep


def rounded(keep: Keep, scores: Scores, alive: Keep, multiple: int) -> Keep:
    """`keep` with a multiple of `multiple` neurons in every layer, and about as many neurons in all: never more, and fewer
    by less than `multiple` where the layers have the room.

    Layers are rounded down; what that frees goes, `multiple` neurons each, to the layers that were furthest above (Hamilton's
    method of largest remainders), as far as they have that many alive. A layer of fewer than `multiple` stays as it is.
    """
    counts = torch.tensor([int(mask.sum()) for mask in keep["neurons"]])
    room = torch.tensor([int(mask.sum()) for mask in alive["neurons"]])
    new = torch.where(counts < multiple, counts, counts // multiple * multiple)
    eligible = (new >= multiple) & (new + multiple <= room)
    furthest = (counts - new).masked_fill(~eligible, -multiple).argsort(descending=True, stable=True)
    n_up = min(int((counts - new).sum()) // multiple, int(eligible.sum()))
    new[furthest[:n_up]] += multiple
    neurons = []
    for score, mask, n in zip(scores["neurons"], alive["neurons"], new.tolist(), strict=True):
        best = score.float().masked_fill(~mask, -torch.inf).topk(n).indices.to(mask.device)
        neurons.append(torch.zeros_like(mask).index_fill_(0, best, True))
    return {**keep, "neurons": neurons}


def _select_global(scores: Scores, costs: dict[str, list[float]], remove: float, alive: Keep, kinds: tuple[str, ...],
                   floor: float, limit: float) -> Keep:  # fmt: skip
    pieces = [(kind, i) for kind in kinds for i in range(len(scores[kind]))]
    density, cost = [], []
    for kind, i in pieces:
        ranked = scores[kind][i].double().cpu() / costs[kind][i]
        protected = ranked.masked_fill(~alive[kind][i].cpu(), -torch.inf).topk(_floor(len(ranked), floor)).indices
        ranked = ranked.masked_fill(~alive[kind][i].cpu(), -torch.inf).index_fill(0, protected, torch.inf)
        density.append(ranked)
        cost.append(torch.full((len(ranked),), costs[kind][i], dtype=torch.float64))
    density, cost = torch.cat(density), torch.cat(cost)
    order = density.sort(stable=True).indices
    order = order[: int((density != torch.inf).sum())]  # protected groups never go
    spent = cost[order].cumsum(0)
    n_removed = int(torch.searchsorted(spent, remove * (1 - 1e-12))) + 1 if remove > 0 else 0
    n_removed = max(min(n_removed, len(order)), int((density == -torch.inf).sum()))
    removed = order[:n_removed]
    over = n_removed > 0 and spent[n_removed - 1] > limit
    if over and n_removed < len(order) and cost[removed[-1]] > cost.min() and density[removed[-1]] > -torch.inf:
        # the last group to go is a large one and overshoots: let small ones go in its place, as long as they suffice
        small = order[n_removed:][cost[order[n_removed:]] == cost.min()]
        short = remove - float(spent[n_removed - 2]) if n_removed > 1 else remove
        n_small = -int(-short // float(cost.min()))
        if n_small <= len(small):
            removed = torch.cat([removed[:-1], small[:n_small]])
    gone = torch.zeros(len(density), dtype=torch.bool).index_fill_(0, removed, True)
    keep = {kind: [mask.clone() for mask in alive[kind]] for kind in KINDS}
    for (kind, i), part in zip(pieces, gone.split([len(scores[k][j]) for k, j in pieces]), strict=True):
        keep[kind][i] &= ~part.to(keep[kind][i].device)
    return keep


def _select_uniform(scores: Scores, costs: dict[str, list[float]], remove: float, alive: Keep, kinds: tuple[str, ...],
                    floor: float, limit: float) -> Keep:  # fmt: skip
    keep = {kind: [mask.clone() for mask in alive[kind]] for kind in KINDS}
    whole = sum(cost * len(s) for kind in kinds for cost, s in zip(costs[kind], scores[kind], strict=True))
    for i in range(len(keep["heads"])):
        cost, n = {kind: costs[kind][i] for kind in kinds}, {kind: len(scores[kind][i]) for kind in kinds}
        gone = {kind: int((~alive[kind][i]).sum()) for kind in kinds}
        most = {kind: max(gone[kind], n[kind] - _floor(n[kind], floor)) for kind in kinds}
        layer = sum(cost[kind] * n[kind] for kind in kinds) / whole  # of what is to go
        for kind in kinds:
            others = [other for other in kinds if other != kind]
            if kind == "heads" and others:
                affordable = (limit * layer - cost["neurons"] * gone["neurons"]) // cost[kind]
                needed = -((cost["neurons"] * most["neurons"] - remove * layer) // cost[kind])
                wanted = max(min(round(n[kind] * remove / whole), affordable), needed)
            else:
                left = remove * layer * (1 - 1e-12) - sum(cost[other] * gone[other] for other in others)
                wanted = -(-left // cost[kind])
            gone[kind] = min(max(gone[kind], int(wanted)), most[kind])
            ranked = scores[kind][i].float().masked_fill(~alive[kind][i], -torch.inf)
            best = ranked.topk(n[kind] - gone[kind]).indices
            keep[kind][i] &= torch.zeros_like(alive[kind][i]).index_fill_(0, best, True)
    return keep


def _floor(n: int, share: float) -> int:
    return min(n, max(1, round(n * share)))


def check_target(blocks: list[Block], sparsity: float, granularity: str, floor: float, budget: str, length: int) -> None:
    """UserError when the granularity and the floor do not let `sparsity` of the budget go. Needs shapes only."""
    costs, counts = group_costs(blocks, budget, length), group_counts(blocks)
    kinds = KINDS if granularity == "multi" else (granularity,)
    free = sum(cost * (n - _floor(n, floor)) for kind in kinds for cost, n in zip(costs[kind], counts[kind], strict=True))
    if sparsity > (most := free / total_cost(blocks, budget, length)):
        raise UserError(f"--target_sparsity {sparsity}: --granularity {granularity} with --floor {floor} allows {most:.3f} at "
                        "most here. Ask for less, or lower the floor")  # fmt: skip


# ---------------------------------------------------------------------------------------------------- masking and cutting


def _members(block: Block, heads: torch.Tensor, neurons: torch.Tensor):
    """Every parameter of a block that groups own: its module and name, the axis and the boolean index of their entries.

    heads: (n_kv_heads,), or (n_heads,) where query heads go alone, and neurons: (n_neurons,), True for the entries asked for.
    """
    a, ffn = block.attention, block.ffn
    queries, keys = heads.repeat_interleave(a.n_heads // len(heads) * a.head_dim), heads.repeat_interleave(a.head_dim)
    ins = [(a.q, queries), *([(a.k, keys), (a.v, keys)] if len(heads) == a.n_kv_heads else [])]
    for linear, index in (*ins, *((linear, neurons) for linear in ffn.ins)):
        yield linear, "weight", 0, index
        if linear.bias is not None:
            yield linear, "bias", 0, index
    yield a.o, "weight", 1, queries
    yield ffn.out, "weight", 1, neurons


def _moments(optimizer, parameter) -> dict[str, torch.Tensor]:
    """The optimizer's tensors of a parameter that have its shape."""
    state = optimizer.state.get(parameter, {}) if optimizer is not None else {}
    return {name: value for name, value in state.items() if torch.is_tensor(value) and value.shape == parameter.shape}


@torch.no_grad()
def zero_groups_(blocks: list[Block], keep: Keep, optimizer=None) -> None:
    """Set every weight of the removed groups to zero, and their moments in `optimizer`.

    With all of a group at zero its gradients are exactly zero too (nothing goes in, nothing comes out, and the activation
    functions of all families map zero to zero), so AdamW leaves it there: masking costs nothing in a step.
    """
    for block, heads, neurons in zip(blocks, keep["heads"], keep["neurons"], strict=True):
        for module, name, axis, index in _members(block, heads, neurons):
            parameter, gone = getattr(module, name), (~index).nonzero().squeeze(1)
            for tensor in (parameter, *_moments(optimizer, parameter).values()):
                tensor.index_fill_(axis, gone, 0)


@torch.no_grad()
def shrink_(model, keep: Keep, optimizer=None) -> list[dict[str, int]]:
    """Cut the removed groups out of `model`. `optimizer` gets the new, smaller parameters, with their moments cut alike.

    Returns what is left of each layer: {"heads", "kv_heads", "neurons"}.
    """
    blocks, replaced = blocks_of(model), {}
    for block, heads, neurons in zip(blocks, keep["heads"], keep["neurons"], strict=True):
        for module, name, axis, index in list(_members(block, heads, neurons)):
            old, kept = getattr(module, name), index.nonzero().squeeze(1)
            new = nn.Parameter(old.index_select(axis, kept), requires_grad=old.requires_grad)
            setattr(module, name, new)
            replaced[old] = new
            if optimizer is not None and old in optimizer.state:
                moments = {key: value.index_select(axis, kept) for key, value in _moments(optimizer, old).items()}
                optimizer.state[new] = {**optimizer.state.pop(old), **moments}
        for linear in block.projections:
            linear.out_features, linear.in_features = linear.weight.shape
    for group in optimizer.param_groups if optimizer is not None else ():
        group["params"] = [replaced.get(parameter, parameter) for parameter in group["params"]]
    set_shapes_(model)
    return [block.shape for block in blocks]


@torch.no_grad()
def pad_neurons_(model, multiple: int) -> int:
    """Fill every layer up to a multiple of `multiple` neurons, with neurons of zeros: the outputs stay what they were.

    What is stored in groups of columns needs widths that the group divides. Returns how many neurons were added.
    """
    added = 0
    for block in blocks_of(model):
        short = -block.ffn.n_neurons % multiple
        for linear in block.ffn.ins:
            linear.weight = nn.Parameter(nn.functional.pad(linear.weight, (0, 0, 0, short)))
            if linear.bias is not None:
                linear.bias = nn.Parameter(nn.functional.pad(linear.bias, (0, short)))
        block.ffn.out.weight = nn.Parameter(nn.functional.pad(block.ffn.out.weight, (0, short)))
        for linear in (*block.ffn.ins, block.ffn.out):
            linear.out_features, linear.in_features = linear.weight.shape
        added += short
    if added:
        set_shapes_(model)
    return added


# ------------------------------------------------------------------------------------------------------------- refitting


@contextmanager
def gram_matrices(model, blocks: list[Block]):
    """Inside, every forward adds X^T X of the inputs X of each o and each FFN output projection, padding left out.

    A forward with gradients adds at its backward, X^T diag(w) X: half of a token's weight w is one, the other half the squared
    gradient at the projection's output, over its mean in the batch. So what is fitted counts most where the loss feels it.

    Yields a list, all o projections first: (in + 1, in + 1) fp32, the last row and column for a constant input of one (the
    bias). Memory: 4 (in + 1)^2 bytes a projection.
    """
    readers = [b.attention.o for b in blocks] + [b.ffn.out for b in blocks]
    device = readers[0].weight.device
    grams = [torch.zeros(r.in_features + 1, r.in_features + 1, device=device) for r in readers]
    mask = None

    def note_mask(module, args, kwargs):
        nonlocal mask
        mask = kwargs.get("attention_mask")

    def add(gram, x, mask, grad=None):
        kept = slice(None) if mask is None else mask.flatten().bool()
        x = torch.nn.functional.pad(x.float().flatten(0, -2)[kept], (0, 1), value=1.0)  # (tokens, in + 1)
        weighted = x
        if grad is not None:
            felt = grad.float().flatten(0, -2)[kept].square().sum(1, keepdim=True)  # (tokens, 1)
            weighted = x * (0.5 + 0.5 * felt / felt.mean().clamp_min(1e-30))
        gram.addmm_(weighted.T, x)

    def note_output(gram):
        def hook(module, args, output):
            x, of_batch = args[0].detach(), mask
            if output.requires_grad:
                output.register_hook(lambda grad: add(gram, x, of_batch, grad))
            else:
                add(gram, x, of_batch)

        return hook

    handles = [model.register_forward_pre_hook(note_mask, with_kwargs=True)]
    handles += [reader.register_forward_hook(note_output(gram)) for reader, gram in zip(readers, grams, strict=True)]
    try:
        yield grams
    finally:
        for handle in handles:
            handle.remove()


@torch.no_grad()
def refit_linear_(linear: nn.Linear, gram: torch.Tensor, kept: torch.Tensor, damping: float = 1e-2) -> float:
    """Re-solve the columns `kept` of a projection, and its bias, so that its outputs stay what all columns gave.

    min over W', b' of sum over tokens of |W x + b - W' x_kept - b'|^2 + damping * mean(diag) |W' - W_kept|^2, the mask
    tuning of Kwon et al. 2022 (arXiv 2204.09656, section 4.3) without its restriction to one factor a group.

    linear.weight: (out, in); gram: (in + 1, in + 1) of `gram_matrices`; kept: (in,) bool. Columns not kept become zero.
    Returns the relative squared error of the outputs on the calibration tokens.
    """
    weight, gram = linear.weight.double(), gram.double()  # (out, in)
    columns = torch.cat([kept, kept.new_tensor([linear.bias is not None])])
    removed = torch.cat([~kept, kept.new_zeros(1)])
    inner = gram[columns][:, columns]
    cross = gram[columns][:, removed]  # (kept, removed)
    ridge = damping * inner.diagonal().mean()
    target = cross @ weight[:, ~kept].T  # (kept, out): the removed groups' outputs, seen by the kept inputs
    factor = torch.linalg.cholesky(inner + ridge * torch.eye(len(inner), dtype=inner.dtype, device=inner.device))
    change = torch.cholesky_solve(target, factor)  # (kept, out)
    full = gram[:-1, :-1]
    energy = ((weight @ full) * weight).sum()
    lost = ((weight[:, ~kept] @ gram[removed][:, removed]) * weight[:, ~kept]).sum()
    error = lost - 2 * (change * target).sum() + (change * (inner @ change)).sum()
    if linear.bias is not None:
        linear.bias += change[-1].to(linear.bias.dtype)
        change = change[:-1]
    linear.weight[:, kept] += change.T.to(linear.weight.dtype)
    linear.weight[:, ~kept] = 0
    return float(error / energy)


def refit_toward_(linear: nn.Linear, gram: torch.Tensor, cross: torch.Tensor, energy: float, kept: torch.Tensor,
                  damping: float = 1e-2) -> float:  # fmt: skip
    """Re-solve the columns `kept` of a projection, and its bias, toward outputs t that it shall give.

    min over W', b' of sum over tokens of |t - W' x_kept - b'|^2 + damping * mean(diag) |[W' - W_kept, b' - b]|^2: as
    `refit_linear_`, which is the case of t = W x + b.

    linear.weight: (out, in); gram: (in + 1, in + 1), sum of [x, 1] [x, 1]^T; cross: (in + 1, out), of [x, 1] t^T; energy: of
    |t|^2; kept: (in,) bool. Columns not kept become zero. Returns the squared error of the outputs, relative to `energy`.
    """
    bias = torch.zeros(linear.out_features, device=gram.device) if linear.bias is None else linear.bias
    columns = torch.cat([kept, kept.new_tensor([linear.bias is not None])])
    rows = torch.cat([linear.weight.T, bias[None]]).double()  # (in + 1, out)
    inner, wanted, fitted = gram[columns][:, columns].double(), cross[columns].double(), rows[columns]
    ridge = damping * inner.diagonal().mean()
    residual = wanted - inner @ fitted
    inner.diagonal().add_(ridge)
    fitted = fitted + torch.cholesky_solve(residual, torch.linalg.cholesky(inner))
    inner.diagonal().sub_(ridge)
    rows[~columns], rows[columns] = 0, fitted
    linear.weight.copy_(rows[:-1].T)
    if linear.bias is not None:
        linear.bias.copy_(rows[-1])
    error = energy - 2 * (fitted * wanted).sum() + (fitted * (inner @ fitted)).sum()
    return max(0.0, float(error)) / max(energy, 1e-30)


def refit_(blocks: list[Block], grams: list[torch.Tensor], keep: Keep) -> list[float]:
    """`refit_linear_` for every o and FFN output projection from which groups were removed; the relative errors."""
    errors = []
    for i, block in enumerate(blocks):
        a = block.attention
        heads = keep["heads"][i].repeat_interleave(a.n_heads // len(keep["heads"][i]) * a.head_dim)
        for linear, gram, kept in ((a.o, grams[i], heads), (block.ffn.out, grams[len(blocks) + i], keep["neurons"][i])):
            errors.append(0.0 if kept.all() else refit_linear_(linear, gram, kept))
    return errors
