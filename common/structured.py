"""Structured pruning of causal language models, a block in memory at a time: scores of groups, shares of layers, cut and refit.

Scores come from one forward and one backward of the dense model over a `StreamedLM`: the inputs of all blocks are kept (in
memory or on disk), then each block is loaded, run again and left behind by the gradient. What is cut is refitted block by
block, each one seeing what the smaller blocks before it give.
"""

from __future__ import annotations

import json
import math
from collections.abc import Callable
from contextlib import contextmanager
from pathlib import Path

import torch
from torch.nn import functional

from common.blocks import KINDS, Block, group_costs, group_counts
from common.checkpoint import load_causal_lm, load_tensors, save_tensors
from common.curvature import forward_states, head_gradients, input_moments, output_gradients
from common.importance import GateRecorder, Scores, l2_scores, random_scores
from common.one_shot import FISHER_DAMPING, check_finite, damped, inverse_of, quadratic_forms
from common.pruning import Keep, refit_toward_, select, shrink_, zero_groups_
from common.runs import read_json, write_atomic
from common.streaming import Activations, StreamedLM

SCORERS = ("obs", "kd_gradient", "fisher", "taylor", "activation", "l2", "random")
BACKWARD = {"taylor": "labels", "fisher": "labels", "obs": "curvature", "kd_gradient": "curvature"}  # what it starts from
RECORDED = {"taylor": "taylor", "fisher": "fisher", "activation": "activation", "kd_gradient": "fisher"}  # by GateRecorder
FURTHER = 1.5  # what a layer may lose, of what all lose on average
POWERS = (1.5, 8.0)  # of its share, with which a layer's damage grows at least and at most
ROUNDS = 12  # in which obs takes all groups of a projection away
ALLOCATIONS = ("global", "sensitivity", "uniform")


# ----------------------------------------------------------------------------------------------------------------- scores


def group_scores(lm: StreamedLM, blocks: list[Block], samples: torch.Tensor, batch_size: int, scorers: tuple[str, ...],
                 seed: int, directory: Path, on_disk: bool = False, done: Callable[[str], None] = lambda _: None
                 ) -> dict[str, Scores]:  # fmt: skip
    """Scores of every group of every block by each of `scorers`, from samples (n, length).

    blocks: of `lm`'s model, as `blocks_of` gives them. l2, random, taylor, fisher, activation as in common/importance.py, a
    sample being an example with the mean loss of its tokens. kd_gradient: fisher with gradients that start from
    `curvature_seed`. obs: what a group costs the loss, in nats a token, when all that is left makes up for it
    (`removal_costs`). done: called after each block, as often as `n_sweeps` says.
    """
    generator, found = torch.Generator().manual_seed(seed), {}
    for name, score in (("l2", l2_scores), ("random", random_scores)):
        if name in scorers:
            found[name] = _joined([_of_weights(lm, i, blocks[i], score, generator) for i in range(len(lm))])
    sweeps = sweeps_of(scorers)
    inputs = forward_states(lm, samples, batch_size, directory, on_disk, done) if sweeps else []
    for start, wanted in sweeps.items():
        grads = head_gradients(lm, samples, batch_size, inputs[-1], start, generator, directory, on_disk) if start else None
        of_blocks = []
        for i in reversed(range(len(lm))):
            with lm.loaded(i):
                of_blocks.append(_of_block(lm, i, blocks[i], inputs[i], grads, wanted))
            done("backward")
        found |= {name: _joined([of_block[name] for of_block in reversed(of_blocks)]) for name in wanted}
        if grads is not None:
            grads.drop()
    for states in inputs:
        states.drop()
    return found


def sweeps_of(scorers: tuple[str, ...]) -> dict[str | None, list[str]]:
    """The scorers that need data, by what their backward starts from; activation, which needs none, goes with any."""
    sweeps: dict[str | None, list[str]] = {}
    for name in (name for name in SCORERS if name in scorers and name in BACKWARD):
        sweeps.setdefault(BACKWARD[name], []).append(name)
    if "activation" in scorers:
        sweeps.setdefault(next(iter(sweeps), None), []).append("activation")
    return sweeps


def _joined(of_blocks: list[dict[str, torch.Tensor]]) -> Scores:
    return {kind: [scores[kind] for scores in of_blocks] for kind in KINDS}


def _of_weights(lm: StreamedLM, i: int, block: Block, score, generator: torch.Generator) -> dict[str, torch.Tensor]:
    with lm.loaded(i):
        return {kind: values[0] for kind, values in score([block], generator).items()}


def _of_block(lm: StreamedLM, i: int, block: Block, inputs: Activations, grads: Activations | None, wanted: list[str]
              ) -> dict[str, dict[str, torch.Tensor]]:  # fmt: skip
    """Scores of one loaded block, by scorer and kind; `grads`, at its output, become those at its input."""
    recorded = tuple(dict.fromkeys(RECORDED[name] for name in wanted if name in RECORDED))
    recorder = GateRecorder(None, [block], recorded, len(inputs))
    readers, n_tokens = (block.attention.o, block.ffn.out) if "obs" in wanted else (), 0
    fishers = {linear: torch.zeros(linear.out_features, linear.out_features, device=lm.device) for linear in readers}
    with input_moments(block, only=readers, rounded=True) as grams, output_gradients(fishers, rounded=True):
        for b in range(len(inputs)):
            states = inputs[b].to(lm.device).clone().requires_grad_(grads is not None)
            n_tokens += states.shape[0] * states.shape[1]
            recorder.loss_scale = float(len(states))  # the gradient is of each example's own loss
            with recorder.recording(len(states)), torch.set_grad_enabled(grads is not None):
                output = lm.run(i, states)
                if grads is not None:
                    grads[b] = torch.autograd.grad(output, states, grads[b].to(lm.device))[0]
                if recorded:
                    recorder.keep_statistics()
    averages, scores = dict(zip(recorded, recorder.averages() if recorded else (), strict=True)), {}
    for name in wanted:
        if name in RECORDED:
            scores[name] = {kind: values[0] for kind, values in averages[RECORDED[name]].items()}
        else:
            widths = (block.attention.o.in_features // block.attention.n_groups, 1)
            costs = [removal_costs(linear.weight, grams[linear], fishers[linear] / n_tokens, width)
                     for linear, width in zip(readers, widths, strict=True)]  # fmt: skip
            scores[name] = dict(zip(KINDS, costs, strict=True))
    return scores


@torch.no_grad()
def removal_costs(weight: torch.Tensor, gram: torch.Tensor, fisher: torch.Tensor, width: int, rounds: int = ROUNDS
                  ) -> torch.Tensor:  # fmt: skip
    """What each group of `width` columns of a projection costs the loss, in nats a token, as the next one to go: (n_groups,).

    The loss is taken as quadratic, with the Kronecker product of `gram` (in, in), the inputs' second moments a token, and
    `fisher` (out, out), those of the gradients at the outputs, as its Hessian (K-FAC, arXiv 1503.05671). Removing the columns
    S and refitting the others then costs 1/2 tr(fisher W_S (gram^-1_SS)^-1 W_S^T): optimal brain surgeon for structures (ZipLM,
    arXiv 2302.04089, eq. 3, which has no fisher). It is counted again in each of `rounds`, behind those that went before;
    a cost is never less than that of a group that went earlier, so costs rank groups in the order in which they go.
    """
    root = torch.linalg.cholesky(damped(fisher.float(), FISHER_DAMPING)).T  # (out, out): fisher = root^T root
    inverse = inverse_of(damped(gram.float(), FISHER_DAMPING), 1e-7)  # of the second moments of the columns that are left
    fitted = root @ weight.float()  # (out, columns left): what they are with the others gone
    n = weight.shape[1] // width
    left, costs, least = torch.arange(n, device=weight.device), torch.zeros(n, device=weight.device), 0.0
    for r in range(rounds):
        blocks = inverse.view(len(left), width, len(left), width).diagonal(dim1=0, dim2=2).permute(2, 0, 1)  # (left, w, w)
        parts = fitted.view(len(root), len(left), width).permute(1, 2, 0)  # (left, w, out)
        of_left = (0.5 * quadratic_forms(blocks, parts).sum(1)).clamp_min(least)
        going = of_left.argsort()[: -(-len(left) // (rounds - r))]
        costs[left[going]] = of_left[going]
        least = float(of_left[going].max())
        stays = torch.ones_like(left, dtype=torch.bool).index_fill_(0, going, False)
        left, stay = left[stays], stays.repeat_interleave(width)
        if not len(left):
            break
        others, inverse = inverse[~stay], inverse[stay][:, stay]  # eliminated, block by block: no matrix is inverted again
        shares = inverse_of(others[:, ~stay], 1e-7) @ others[:, stay]  # (columns going, columns left)
        fitted = fitted[:, stay] - fitted[:, ~stay] @ shares
        inverse -= others[:, stay].T @ shares
    return costs


# ------------------------------------------------------------------------------------------------------ which groups stay


def slots(scores: Scores, blocks: list[Block]) -> Scores:
    """Scores of single query heads, (n_heads,), as scores of slots, (n_heads / n_kv_heads,): slot 0 holds the lowest query head
    of each KV head, and so on. A slot goes as a whole, so every KV head keeps as many query heads as the others.
    """
    of_heads = [score.view(block.attention.n_kv_heads, -1).sort(1).values.sum(0)
                for score, block in zip(scores["heads"], blocks, strict=True)]  # fmt: skip
    return {**scores, "heads": of_heads}


def heads_of_slots(keep: Keep, scores: Scores, blocks: list[Block]) -> Keep:
    """The query heads, (n_heads,) bool, that slots stand for. scores: those that `slots` was given."""
    heads = []
    for slot, score, block in zip(keep["heads"], scores["heads"], blocks, strict=True):
        ranks = score.view(block.attention.n_kv_heads, -1).argsort(1).argsort(1)  # (n_kv_heads, query heads each)
        heads.append(slot.to(ranks.device)[ranks].flatten())
    return {**keep, "heads": heads}


def choose(scores: Scores, blocks: list[Block], ratio: float, layers: range, kinds: tuple[str, ...], allocation: str,
           floor: float, shares: list[float] | None = None, multiple: int = 1) -> Keep:  # fmt: skip
    """Which groups to keep, so that `ratio` of the parameters of the `kinds` of groups is gone.

    blocks: by `blocks_of`, with their queries as groups or not. layers: those that may lose groups. The ratio is of all
    layers' groups; what is not to be had from `layers` stays. allocation: global, uniform, or sensitivity with `shares`, one
    for each of `layers`: its part of the budget. Where heads go alone, what a layer lost too much or too little of, whole heads
    being coarse, the next one makes good.
    """
    queries = blocks[0].attention.queries
    costs, counts = group_costs(blocks), group_counts(blocks)
    total = sum(cost * n for kind in kinds for cost, n in zip(costs[kind], counts[kind], strict=True))
    ranked = slots(scores, blocks) if queries else scores
    if queries:
        costs = {**costs, "heads": [cost * b.attention.n_kv_heads for cost, b in zip(costs["heads"], blocks, strict=True)]}
    keep = {kind: [torch.ones(len(score), dtype=torch.bool) for score in ranked[kind]] for kind in KINDS}
    granularity = "multi" if len(kinds) > 1 else kinds[0]

    def part(values, of: range):
        return {kind: [values[kind][i] for i in of] for kind in KINDS}

    pieces, amounts = [layers], [ratio * total]
    if allocation != "global":  # uniform: a layer at a time, so that all are rounded alike
        pieces = [range(i, i + 1) for i in layers]
        of_layers = [sum(costs[kind][i] * len(ranked[kind][i]) for kind in kinds) for i in layers]
        amounts = [(of_it / sum(of_layers) if shares is None else share) * ratio * total
                   for of_it, share in zip(of_layers, shares or of_layers, strict=True)]  # fmt: skip
    carry, coarse = 0.0, allocation == "sensitivity" and kinds == ("heads",)
    for piece, amount in zip(pieces, amounts, strict=True):
        amount += carry
        half = 1e-9 * total + (costs["heads"][piece[0]] / 2 if piece != pieces[-1] else 0.0) if coarse else 0.0
        chosen = select(part(ranked, piece), part(costs, piece), max(0.0, amount - half), part(keep, piece),
                        "uniform" if allocation == "uniform" else "global", granularity, floor, multiple=multiple)  # fmt: skip
        for kind in KINDS:
            for i, mask in zip(piece, chosen[kind], strict=True):
                keep[kind][i] = mask
        if coarse:
            carry = amount - sum(costs["heads"][i] * float((~keep["heads"][i]).sum()) for i in piece)
    return heads_of_slots(keep, scores, blocks) if queries else keep


def layer_shares(damages: list[float], powers: list[float], costs: list[float], ratio: float, most: list[float]) -> list[float]:
    """The share of its own cost that each layer loses, `ratio` of all in sum, at the least damage.

    Damage to a layer that loses the share s is taken as damage * (s / ratio)^power, power > 1. Of all shares that sum to the
    budget those do least at which one parameter more does the same damage in every layer (Lagrange). None loses more than
    `most`; what it is spared the others lose.
    """
    damage, power, cost, most = (torch.tensor(values, dtype=torch.float64) for values in (damages, powers, costs, most))
    slope = power * damage.clamp_min(1e-30) / (ratio * cost)  # damage of a parameter more, at the ratio

    def at(price: float) -> torch.Tensor:
        return (ratio * (math.exp(price) / slope) ** (1 / (power - 1))).minimum(most)

    low, high = float(slope.log().min() - 700), float(slope.log().max() + 700)
    for _ in range(200):
        middle = (low + high) / 2
        low, high = (low, middle) if float((at(middle) * cost).sum()) > ratio * float(cost.sum()) else (middle, high)
    return at(high).tolist()


def layer_damages(lm: StreamedLM, blocks: list[Block], samples: torch.Tensor, batch_size: int, keeps: dict[int, list[Keep]],
                  seed: int, directory: Path, on_disk: bool = False, refit: bool = True) -> dict[int, list[float]]:  # fmt: skip
    """What pruning one block alone does to the model's predictions, for each block of `keeps` in each of these ways: nats a
    token.

    The block runs with its groups removed (and refitted, as `refit_blocks` does); the change of its outputs is measured in the
    curvature that the rest of the model has there, 1/2 E[(g . d)^2], g the gradients from `curvature_seed` and d the change, of
    each token.
    """
    generator, damages = torch.Generator().manual_seed(seed), {}
    inputs = forward_states(lm, samples, batch_size, directory, on_disk)
    grads = head_gradients(lm, samples, batch_size, inputs[-1], "curvature", generator, directory, on_disk)
    for i in reversed(range(min(keeps, default=0), len(lm))):
        with lm.loaded(i):
            if i in keeps:
                whole = {name: value.clone() for name, value in lm.tensors(i).items()}
                middle = _between(lm, i, blocks[i], inputs[i], directory / "middle" if on_disk else None) if refit else None
                for keep in keeps[i]:
                    of_block = {kind: keep[kind][i].to(lm.device) for kind in KINDS}
                    _cut(lm, i, blocks[i], of_block, inputs[i], (middle, inputs[i + 1]) if refit else None)
                    felt = []
                    with torch.no_grad():
                        for b in range(len(grads)):
                            change = lm.run(i, inputs[i][b].to(lm.device)) - inputs[i + 1][b].to(lm.device)
                            felt.append((change * grads[b].to(lm.device)).sum(-1).square().mean())
                    damages.setdefault(i, []).append(0.5 * float(torch.stack(felt).mean()))
                    for name, value in lm.tensors(i).items():
                        value.copy_(whole[name])
                if refit:
                    middle.drop()
            for b in range(len(grads)):
                states = inputs[i][b].to(lm.device).clone().requires_grad_()
                with torch.enable_grad():
                    grads[b] = torch.autograd.grad(lm.run(i, states), states, grads[b].to(lm.device))[0]
    for states in (*inputs, grads):
        states.drop()
    return damages


def sensitivity_shares(lm: StreamedLM, samples: torch.Tensor, batch_size: int, scores: Scores, ratio: float, floor: float,
                       chosen: dict, seed: int, directory: Path, on_disk: bool = False, refit: bool = True
                       ) -> tuple[list[float], dict[int, list[float]]]:  # fmt: skip
    """What `choose` takes as shares with allocation sensitivity, and the damages that they were made from, by layer.

    chosen: what else `choose` is called with (blocks, layers, kinds). Each layer is measured with as much of it gone as all
    layers are to lose, and with FURTHER times that, which no layer's share exceeds unless the budget needs it: from both
    follows how fast damage grows. Kept in `directory`/shares.json, and read from there.
    """
    blocks, layers, path = chosen["blocks"], chosen["layers"], directory / "shares.json"
    if path.exists():
        shares, damages = read_json(path)
        return shares, {int(i): damage for i, damage in damages.items()}
    costs, counts = group_costs(blocks), group_counts(blocks)
    of_layers = [sum(costs[kind][i] * counts[kind][i] for kind in chosen["kinds"]) for i in range(len(blocks))]
    whole, able = sum(of_layers), sum(of_layers[i] for i in layers)
    part = ratio * whole / able  # of each of these layers, on average
    most = [most_to_remove(blocks, range(i, i + 1), chosen["kinds"], floor) / of_layers[i] for i in layers]
    keeps, shares = {}, {}
    for i, share in zip(layers, most, strict=True):
        alone = chosen | {"layers": range(i, i + 1), "allocation": "global", "floor": floor}
        keeps[i] = [choose(scores, ratio=min(far * part, share) * of_layers[i] / whole, **alone) for far in (1, FURTHER)]
        shares[i] = [sum(costs[kind][i] * float((~keep[kind][i]).sum()) for kind in chosen["kinds"]) / of_layers[i]
                     for keep in keeps[i]]  # what went: whole groups  # fmt: skip
    damages = layer_damages(lm, blocks, samples, batch_size, keeps, seed, directory, on_disk, refit)
    powers, at_part = zip(*(_growth(shares[i], damages[i], part) for i in layers), strict=True)
    near, sizes = [min(FURTHER * part, share) for share in most], [of_layers[i] for i in layers]
    enough = sum(share * size for share, size in zip(near, sizes, strict=True)) >= part * able
    parts = layer_shares(list(at_part), list(powers), sizes, part, near if enough else most)
    found = [of_it * of_layers[i] / (ratio * whole) for of_it, i in zip(parts, layers, strict=True)]
    path.parent.mkdir(parents=True, exist_ok=True)
    write_atomic(path, json.dumps([found, damages]))
    return found, damages


def _growth(shares: list[float], damages: list[float], part: float) -> tuple[float, float]:
    """The power of its share by which a layer's damage grows, within POWERS, and the damage at the share `part`: such that
    neither measured damage is taken for less than it is.
    """
    (near, far), (little, much) = shares, (max(damage, 1e-30) for damage in damages)
    power = math.log(much / little) / math.log(far / near) if near and far > near else 2.0
    power = min(max(power, POWERS[0]), POWERS[1])
    return power, max(damage * (part / share) ** power if share else damage for share, damage in ((near, little), (far, much)))


def most_to_remove(blocks: list[Block], layers: range, kinds: tuple[str, ...], floor: float) -> float:
    """The parameters that `choose` can take from these layers."""
    costs, counts, free = group_costs(blocks), group_counts(blocks), 0.0
    for i in layers:
        for kind in kinds:
            a = blocks[i].attention
            size = a.n_kv_heads if kind == "heads" and a.queries else 1  # a slot is of so many query heads
            n = counts[kind][i] // size
            free += costs[kind][i] * size * (n - min(n, max(1, round(n * floor))))
    return free


# ------------------------------------------------------------------------------------------------------------ cut and refit


@torch.no_grad()
def refit_blocks(lm: StreamedLM, blocks: list[Block], samples: torch.Tensor, batch_size: int, keep: Keep, parts: Path,
                 on_disk: bool = False, reconstruct: Callable[..., tuple[float, float]] | None = None
                 ) -> tuple[list[float], list[list[float]]]:  # fmt: skip
    """Write each block of `keep`, from the first one on that loses a group, with its removed groups at zero to
    `parts`/block-<i>.safetensors, its output projections solved again (pruning.refit_toward_): o, then with it the FFN's.

    What is solved for are the hidden states of the dense model behind the projection: it makes up for its own removed groups
    and for what the smaller blocks before it got wrong, so blocks that keep all their groups are refitted too. Where hidden
    states are normalised behind the sum (OPT-350m) the FFN's has its own dense outputs as the goal.

    reconstruct: called as (lm, block's index, hidden states it is given, those of the dense model behind it) when a block is
    refitted; changes it in place and returns its error before and after (reconstruction.reconstruct_).

    The relative squared errors of the refitted projections' outputs, and what `reconstruct` returned for each block. A block
    that is there already is not made again.
    """
    places = {name: parts / name if on_disk else None for name in ("dense", "middle", "activations")}
    dense, errors, reconstructed = lm.embed(samples, batch_size, places["dense"]), [], []
    first = next((i for i in range(len(lm)) if not all(keep[kind][i].all() for kind in KINDS)), len(lm))
    for i in range(first):
        with lm.loaded(i):
            lm.advance(i, dense)
    hidden = Activations(places["activations"])
    for b in range(len(dense)):
        hidden.append(dense[b])
    for i in range(first, len(lm)):
        path = parts / f"block-{i}.safetensors"
        if path.exists():
            with lm.loaded(i):
                lm.advance(i, dense)
            with lm.loaded(i, load_tensors(path)):
                lm.advance(i, hidden)
            found, of_blocks = read_json(path.with_suffix(".json"))
            errors, reconstructed = errors + found, reconstructed + of_blocks
            continue
        dtypes, of_block = lm.stored(i), {kind: keep[kind][i].to(lm.device) for kind in KINDS}
        with lm.loaded(i):
            middle = _between(lm, i, blocks[i], dense, places["middle"], advance=True)
            found = _cut(lm, i, blocks[i], of_block, hidden, (middle, dense), i > first)
            middle.drop()
            of_blocks = [list(reconstruct(lm, i, hidden, dense))] if reconstruct else []
            kept = {name: value.to(dtypes[name]) for name, value in lm.tensors(i).items()}
        with lm.loaded(i, kept):  # the next block sees what is stored
            lm.advance(i, hidden)
        write_atomic(path.with_suffix(".json"), json.dumps([found, of_blocks]))
        save_tensors(path, kept)
        errors, reconstructed = errors + found, reconstructed + of_blocks
    hidden.drop()
    dense.drop()
    return errors, reconstructed


@torch.no_grad()
def _cut(lm: StreamedLM, i: int, block: Block, keep: dict[str, torch.Tensor], hidden: Activations,
         aims: tuple[Activations, Activations] | None, drifted: bool = False) -> list[float]:  # fmt: skip
    """Set the groups of a loaded block that do not stay to zero, and refit both output projections; the relative errors.

    keep: by kind, (n_groups,) bool. hidden: the states that the block is given. aims: those of the dense model between its
    attention and FFN, and behind it; None: nothing is refitted. drifted: whether `hidden` are other states than the dense
    model's; where they are not, a projection has nothing to make up for before a group has gone.
    """
    errors, whole = [], {kind: [torch.ones_like(groups)] for kind, groups in keep.items()}
    for kind in KINDS:
        drifted |= not keep[kind].all()
        if drifted and aims is not None:
            errors.append(_refit(lm, i, block, kind, keep[kind], hidden, aims[KINDS.index(kind)]))
        zero_groups_([block], whole | {kind: [keep[kind]]})
    return errors


@contextmanager
def _seen(block: Block):
    """Inside, what the latest forward gave to a block's o and FFN output projection, and what they gave: (tokens, ·) fp32."""
    seen, readers = {}, (block.attention.o, block.ffn.out)

    def hook(module, args, output):
        seen[module] = args[0].float().flatten(0, -2), output.float().flatten(0, -2)

    handles = [reader.register_forward_hook(hook) for reader in readers]
    try:
        yield seen
    finally:
        for handle in handles:
            handle.remove()


@torch.no_grad()
def _between(lm: StreamedLM, i: int, block: Block, states: Activations, directory: Path | None, advance: bool = False
             ) -> Activations:  # fmt: skip
    """What a loaded block's hidden states are between attention and FFN; with `advance` all states go through it."""
    middle = Activations(directory)
    with _seen(block) as seen:
        for b in range(len(states)):
            given = states[b].to(lm.device)
            output = lm.run(i, given)
            middle.append(given + seen[block.attention.o][1].view(given.shape))
            if advance:
                states[b] = output  # on a CPU in the place of `given`
    return middle


def _refit(lm: StreamedLM, i: int, block: Block, kind: str, groups: torch.Tensor, hidden: Activations, aims: Activations
           ) -> float:  # fmt: skip
    """Solve a block's o (heads) or FFN output projection (neurons) again, toward hidden states `aims`; its relative error.

    groups: which stay. hidden: the states that the block is given.
    """
    linear = block.attention.o if kind == "heads" else block.ffn.out
    gram, cross, energy = _regression(lm, i, block, kind, hidden, aims)
    check_finite(gram)
    return refit_toward_(linear, gram, cross, energy, groups.repeat_interleave(linear.in_features // len(groups)))


def _regression(lm: StreamedLM, i: int, block: Block, kind: str, hidden: Activations, aims: Activations
                ) -> tuple[torch.Tensor, torch.Tensor, float]:  # fmt: skip
    """What `refit_toward_` takes: of what the projection reads and of what it shall give, for hidden states to be `aims`."""
    o, linear = block.attention.o, block.attention.o if kind == "heads" else block.ffn.out
    n = linear.in_features + 1
    gram, cross = (torch.zeros(n, size, device=lm.device) for size in (n, linear.out_features))
    energy = torch.zeros((), dtype=torch.float64, device=lm.device)
    with _seen(block) as seen, torch.autocast(lm.device.type, enabled=False):
        for b in range(len(hidden)):
            given = hidden[b].to(lm.device)
            output, (x, own) = lm.run(i, given).flatten(0, -2), seen[linear]
            given, aim = given.flatten(0, -2), aims[b].to(lm.device).flatten(0, -2)  # (tokens, hidden)
            between = given + seen[o][1]
            if kind == "heads":
                wanted = aim - given
            elif torch.allclose(output - own, between, rtol=1e-3, atol=1e-3 * float(between.abs().max())):
                wanted = aim - between
            else:  # normalised behind the sum
                wanted = own
            x = functional.pad(x, (0, 1), value=1.0)
            gram.addmm_(x.T, x)
            cross.addmm_(x.T, wanted)
            energy += wanted.double().square().sum()
    return gram, cross, float(energy)


def pruned_model(base: Path, keep: Keep, parts: Path | None = None):
    """The model of a directory without the groups that `keep` leaves out, and what is left of each layer. parts: where
    `refit_blocks` wrote its blocks.
    """
    model = load_causal_lm(base)
    if parts is not None:
        for path in sorted(parts.glob("block-*.safetensors")):
            if unknown := model.load_state_dict(load_tensors(path), strict=False).unexpected_keys:
                raise KeyError(f"{path}: {', '.join(unknown)}")
    return model, shrink_(model, keep)
