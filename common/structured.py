"""Structured pruning of causal language models, a block in memory at a time: scores of groups, shares of layers, cut and refit.

Scores come from one forward and one backward of the dense model over a `StreamedLM`: the inputs of all blocks are kept (in
memory or on disk), then each block is loaded, run again and left behind by the gradient. What is cut is refitted block by
block, each one seeing what the smaller blocks before it give.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import torch

from common.blocks import KINDS, Block, group_costs, group_counts
from common.checkpoint import load_causal_lm, load_tensors, save_tensors
from common.curvature import forward_states, head_gradients, input_moments, output_gradients
from common.importance import GateRecorder, Scores, l2_scores, random_scores
from common.one_shot import FISHER_DAMPING, damped, inverse_of, quadratic_forms
from common.pruning import Keep, gram_matrices, refit_, select, shrink_, zero_groups_
from common.runs import read_json, write_atomic
from common.streaming import Activations, StreamedLM

SCORERS = ("obs", "kd_gradient", "fisher", "taylor", "activation", "l2", "random")
BACKWARD = {"taylor": "labels", "fisher": "labels", "obs": "curvature", "kd_gradient": "curvature"}  # what it starts from
RECORDED = {"taylor": "taylor", "fisher": "fisher", "activation": "activation", "kd_gradient": "fisher"}  # by GateRecorder
FURTHER = 1.5  # what a layer may lose, of what it was measured with
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
    with input_moments(block, only=readers) as grams, output_gradients(fishers):
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


def layer_shares(damages: list[float], costs: list[float], ratio: float, most: float | list[float]) -> list[float]:
    """The share of its own cost that each layer loses, `ratio` of all in sum, by what losing `ratio` was measured to do to it.

    Damage is taken to grow with the square of the share: of all that sum to the budget, shares in inverse proportion to the
    damage do least. No layer loses more than `most` (of each, or of all); what it is spared the others lose.
    """
    damage, cost = torch.tensor(damages, dtype=torch.float64).clamp_min(1e-30), torch.tensor(costs, dtype=torch.float64)
    shares, full = torch.zeros_like(cost), torch.zeros(len(cost), dtype=torch.bool)
    most = torch.as_tensor(most, dtype=torch.float64).expand_as(cost)
    for _ in range(len(cost)):
        left = ratio * cost.sum() - (most * cost)[full].sum()
        scale = left / (cost[~full] / damage[~full]).sum()
        shares = torch.where(full, most, scale / damage)
        if not (shares > most + 1e-12).any():
            break
        full |= shares > most
    return shares.minimum(most).tolist()


def layer_damages(lm: StreamedLM, blocks: list[Block], samples: torch.Tensor, batch_size: int, keeps: dict[int, Keep],
                  seed: int, directory: Path, on_disk: bool = False, refit: bool = True) -> dict[int, float]:  # fmt: skip
    """What pruning one block alone does to the model's predictions, for each block of `keeps`: nats a token.

    The block runs with its groups removed (and refitted); the change of its outputs is measured in the curvature that the rest
    of the model has there, 1/2 E[(g . d)^2], g the gradients from `curvature_seed` and d the change, of each token.
    """
    generator, damages = torch.Generator().manual_seed(seed), {}
    inputs = forward_states(lm, samples, batch_size, directory, on_disk)
    grads = head_gradients(lm, samples, batch_size, inputs[-1], "curvature", generator, directory, on_disk)
    for i in reversed(range(min(keeps, default=0), len(lm))):
        with lm.loaded(i):
            block = blocks[i]
            with gram_matrices(None, [block]) as grams, torch.no_grad():
                outputs = [lm.run(i, inputs[i][b].to(lm.device)).cpu() for b in range(len(inputs[i])) if i in keeps]
            arriving = [grads[b].clone() for b in range(len(grads))] if i in keeps else []
            for b in range(len(grads)):
                states = inputs[i][b].to(lm.device).clone().requires_grad_()
                with torch.enable_grad():
                    grads[b] = torch.autograd.grad(lm.run(i, states), states, grads[b].to(lm.device))[0]
            if i in keeps:
                keep = {kind: [keeps[i][kind][i].to(lm.device)] for kind in KINDS}
                if refit:
                    refit_([block], grams, keep)
                zero_groups_([block], keep)
                felt = []
                with torch.no_grad():
                    for b, (output, grad) in enumerate(zip(outputs, arriving, strict=True)):
                        change = lm.run(i, inputs[i][b].to(lm.device)).cpu() - output
                        felt.append((change * grad).sum(-1).square().mean())
                damages[i] = 0.5 * float(torch.stack(felt).mean())
    for states in (*inputs, grads):
        states.drop()
    return damages


def sensitivity_shares(lm: StreamedLM, samples: torch.Tensor, batch_size: int, scores: Scores, ratio: float, floor: float,
                       chosen: dict, seed: int, directory: Path, on_disk: bool = False, refit: bool = True
                       ) -> tuple[list[float], dict[int, float]]:  # fmt: skip
    """What `choose` takes as shares with allocation sensitivity, and the damages that they were made from, by layer.

    chosen: what else `choose` is called with (blocks, layers, kinds). Each layer is measured with as much of it gone as all
    layers are to lose. None loses more than FURTHER times that: damage grows faster than what was measured can tell.
    """
    blocks, layers = chosen["blocks"], chosen["layers"]
    costs, counts = group_costs(blocks), group_counts(blocks)
    of_layers = [sum(costs[kind][i] * counts[kind][i] for kind in chosen["kinds"]) for i in range(len(blocks))]
    whole, able = sum(of_layers), sum(of_layers[i] for i in layers)
    part = ratio * whole / able  # of each of these layers, on average
    keeps = {i: choose(scores, ratio=part * of_layers[i] / whole, allocation="global", floor=floor,
                       **chosen | {"layers": range(i, i + 1)}) for i in layers}  # fmt: skip
    damages = layer_damages(lm, blocks, samples, batch_size, keeps, seed, directory, on_disk, refit)
    most = [most_to_remove(blocks, range(i, i + 1), chosen["kinds"], floor) / of_layers[i] for i in layers]
    near, sizes = [min(FURTHER * part, share) for share in most], [of_layers[i] for i in layers]
    enough = sum(share * size for share, size in zip(near, sizes, strict=True)) >= part * able
    parts = layer_shares([damages[i] for i in layers], sizes, part, near if enough else most)
    return [of_it * of_layers[i] / (ratio * whole) for of_it, i in zip(parts, layers, strict=True)], damages


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


def refit_blocks(lm: StreamedLM, blocks: list[Block], samples: torch.Tensor, batch_size: int, keep: Keep, parts: Path,
                 on_disk: bool = False) -> list[float]:  # fmt: skip
    """Write each block of `keep` with its removed groups at zero to `parts`/block-<i>.safetensors, its output projections
    solved again (pruning.refit_linear_): o, then with it the FFN's. Blocks see what the pruned ones before them give.

    The relative squared errors of the refitted projections' outputs. A block that is there already is not made again.
    """
    hidden = lm.embed(samples, batch_size, parts / "activations" if on_disk else None)
    errors = []
    for i, block in enumerate(blocks):
        path, of_block = parts / f"block-{i}.safetensors", {kind: [keep[kind][i].to(lm.device)] for kind in KINDS}
        if path.exists():
            with lm.loaded(i, load_tensors(path)):
                lm.advance(i, hidden)
            errors += read_json(path.with_suffix(".json"))
            continue
        dtypes, whole = lm.stored(i), {kind: [torch.ones_like(of_block[kind][0])] for kind in KINDS}
        with lm.loaded(i):
            found = []
            for kind in KINDS:
                if not of_block[kind][0].all():
                    with gram_matrices(None, [block]) as grams, torch.no_grad():
                        for b in range(len(hidden)):
                            lm.run(i, hidden[b].to(lm.device))
                    found.append(max(refit_([block], grams, whole | {kind: of_block[kind]})))
                    zero_groups_([block], whole | {kind: of_block[kind]})
            kept = {name: value.to(dtypes[name]) for name, value in lm.tensors(i).items()}
        with lm.loaded(i, kept):  # the next block sees what is stored
            lm.advance(i, hidden)
        write_atomic(path.with_suffix(".json"), json.dumps(found))
        save_tensors(path, kept)
        errors += found
    hidden.drop()
    return errors


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
