"""Selection against brute force, costs by hand, refitting against numpy's least squares."""

import itertools

import numpy as np
import pytest
import torch

from common.blocks import KINDS, blocks_of, group_costs, group_counts, total_cost
from common.pruning import (
    check_target,
    gram_matrices,
    keep_all,
    refit_,
    refit_linear_,
    refit_toward_,
    rounded,
    scheduled_sparsity,
    select,
    sparsity_of,
    zero_groups_,
)
from common.runs import UserError
from tests.test_families import FAMILY_CASES, batch, random_model, uneven_keep
from tests.test_importance import examples_of

# ---------------------------------------------------------------------------------------------------------------- budget


def test_schedule_by_hand():
    assert [scheduled_sparsity(0.8, p) for p in (-1, 0, 0.5, 1, 2)] == pytest.approx([0, 0, 0.7, 0.8, 0.8])
    assert [scheduled_sparsity(0.2, p, "linear") for p in (0, 0.25, 1, 3)] == pytest.approx([0, 0.05, 0.2, 0.2])


@pytest.mark.parametrize(
    "family, head, head_macs, neuron, neuron_macs",
    [  # 32 wide everywhere; MACs for one token of 10
        ("bert", 4 * 8 * 32 + 3 * 8, 4 * 8 * 32 + 2 * 10 * 8, 32 + 32 + 1, 64),
        # KV heads of 16 with two query heads each: 32 rows of q, 16 of k and of v, 32 columns of o; no biases
        ("llama", (32 + 16 + 16 + 32) * 32, (32 + 16 + 16 + 32) * 32 + 2 * 10 * 2 * 16, 3 * 32, 96),
        # KV heads of 8 with two query heads each, biases on q, k and v
        ("qwen2", (16 + 8 + 8 + 16) * 32 + 16 + 8 + 8, (16 + 8 + 8 + 16) * 32 + 2 * 10 * 2 * 8, 3 * 32, 96),
    ],
)
def test_costs_by_hand(family, head, head_macs, neuron, neuron_macs):
    blocks = blocks_of(random_model(family)[0])
    assert group_costs(blocks) == {"heads": [head] * 3, "neurons": [neuron] * 3}
    assert group_costs(blocks, "macs", length=10) == {"heads": [head_macs] * 3, "neurons": [neuron_macs] * 3}
    n_heads = {"bert": 4}.get(family, 2)
    assert group_counts(blocks) == {"heads": [n_heads] * 3, "neurons": [48] * 3}
    assert total_cost(blocks, "macs", length=10) == 3 * (n_heads * head_macs + 48 * neuron_macs)


@pytest.mark.parametrize("family", FAMILY_CASES)
def test_total_cost_is_every_parameter_of_the_projections(family):
    blocks = blocks_of(random_model(family)[0])
    parameters = {id(p): p.numel() for b in blocks for linear in b.projections for p in linear.parameters()}
    assert total_cost(blocks) == sum(parameters.values())


# ------------------------------------------------------------------------------------------------------------- selection

HEAD, NEURON = 40.5, 7.0


def problem(seed=0, layers=4, heads=12, neurons=100):
    """Random scores, costs and nothing removed yet."""
    generator = torch.Generator().manual_seed(seed)
    scores = {"heads": [torch.rand(heads, generator=generator) * HEAD for _ in range(layers)],
              "neurons": [torch.rand(neurons, generator=generator) * NEURON for _ in range(layers)]}  # fmt: skip
    alive = {kind: [torch.ones(len(part), dtype=torch.bool) for part in scores[kind]] for kind in KINDS}
    return scores, {"heads": [HEAD] * layers, "neurons": [NEURON] * layers}, alive


def flat(parts):
    return torch.cat([part for kind in KINDS for part in parts[kind]])


def removed_cost(keep, costs):
    return sparsity_of(keep, costs, 1.0)


def whole_cost(costs, alive):
    return removed_cost({kind: [~mask for mask in alive[kind]] for kind in KINDS}, costs)


@pytest.mark.parametrize("seed", range(4))
def test_no_other_choice_removes_as_much_for_less_score(seed):
    """Over all 2^12 subsets, for budgets that a ranking by score per cost meets exactly (it is the optimum there)."""
    scores, costs, alive = problem(seed, layers=2, heads=2, neurons=4)
    each = torch.cat([torch.full((len(p),), costs[kind][0]) for kind in KINDS for p in scores[kind]]).double().numpy()
    score = flat(scores).double().numpy()
    subsets = np.array(list(itertools.product([0, 1], repeat=12)), bool)  # True: removed
    pieces = np.split(np.arange(12), [2, 4, 8])
    allowed = np.all([~subsets[:, piece].all(1) for piece in pieces], 0)  # one group of each kind stays in each layer
    protected = {piece[np.argmax(score[piece])] for piece in pieces}
    ranking = [i for i in np.argsort(score / each) if i not in protected]
    for n in range(1, len(ranking) + 1):
        remove = each[ranking[:n]].sum()
        best = np.where(allowed & (subsets @ each >= remove - 1e-9), subsets @ score, np.inf).min()
        gone = ~flat(select(scores, costs, remove, alive, floor=0)).numpy()
        assert score[gone].sum() == pytest.approx(best)
        assert each[gone].sum() == pytest.approx(remove)


@pytest.mark.parametrize("scores_are", ["random", "equal", "zero", "heads first", "heads last"])
def test_the_budget_is_met_within_one_neuron(scores_are):
    for seed in range(5):
        scores, costs, alive = problem(seed)
        if scores_are in ("equal", "zero"):
            scores = {kind: [torch.full_like(part, scores_are == "equal") for part in scores[kind]] for kind in KINDS}
        elif scores_are != "random":
            scores["heads"] = [part * (1e-3 if scores_are == "heads first" else 1e3) for part in scores["heads"]]
        total = whole_cost(costs, alive)
        for sparsity in (0.001, 0.07, 0.2, 0.333, 0.5, 0.58, 0.9):
            keep = select(scores, costs, sparsity * total, alive)
            at_floor = torch.cat(keep["neurons"]).sum() == 4 * 5  # no neuron is left to take the place of the last head
            assert -1e-9 < removed_cost(keep, costs) - sparsity * total < (HEAD if at_floor else NEURON)


def test_nothing_to_remove_and_everything():
    scores, costs, alive = problem()
    assert flat(select(scores, costs, 0.0, alive)).all()
    assert flat(select(scores, costs, 0.0, alive, "uniform")).all()
    for allocation in ("global", "uniform"):
        keep = select(scores, costs, 1e9, alive, allocation, floor=0.05)
        assert [int(mask.sum()) for mask in keep["heads"] + keep["neurons"]] == [1] * 4 + [5] * 4  # the floor, the best of all
        for kind in KINDS:
            assert all(mask[score.argmax()] for mask, score in zip(keep[kind], scores[kind], strict=True))


@pytest.mark.parametrize("allocation", ["global", "uniform"])
@pytest.mark.parametrize("weight", [1, 0])
def test_what_is_gone_stays_gone_and_counts(allocation, weight):
    """Scores change between prunings; dead groups score best of all here, the others at random or zero."""
    scores, costs, alive = problem()
    total = whole_cost(costs, alive)
    for i, sparsity in enumerate((0.1, 0.2, 0.2, 0.35, 0.6)):
        scores, _, _ = problem(seed=i + 1)
        scores = {kind: [s * weight + 1e3 * ~a for s, a in zip(scores[kind], alive[kind], strict=True)] for kind in KINDS}
        keep = select(scores, costs, sparsity * total, alive, allocation)
        assert not (flat(keep) & ~flat(alive)).any()
        if allocation == "global":
            assert -1e-9 < removed_cost(keep, costs) - sparsity * total < NEURON
        if sparsity == 0.2 and i == 2:
            assert torch.equal(flat(keep), flat(alive))  # asked for no more than what is gone: nothing changes
        alive = keep


@pytest.mark.parametrize("kind, other", [("heads", "neurons"), ("neurons", "heads")])
def test_granularity_touches_one_kind(kind, other):
    scores, costs, alive = problem()
    remove = 0.15 * whole_cost(costs, alive)
    for allocation in ("global", "uniform"):
        keep = select(scores, costs, remove, alive, allocation, kind)
        assert torch.cat(keep[other]).all()
    keep = select(scores, costs, remove, alive, granularity=kind)
    n_gone = int((~torch.cat(keep[kind])).sum())
    assert n_gone == -int(-remove // costs[kind][0])
    gone = torch.cat(scores[kind])[~torch.cat(keep[kind])]
    assert torch.equal(gone.sort().values, torch.cat(scores[kind]).sort().values[:n_gone])


def test_uniform_takes_the_same_share_of_every_layer():
    scores, costs, alive = problem()
    scores["neurons"][0] *= 1e-6  # a layer that does not matter is not drained
    keep = select(scores, costs, 0.25 * whole_cost(costs, alive), alive, "uniform")
    assert [int(mask.sum()) for mask in keep["heads"] + keep["neurons"]] == [9] * 4 + [75] * 4
    for kind in KINDS:
        for mask, score in zip(keep[kind], scores[kind], strict=True):
            assert score[~mask].max() < score[mask].min()


def test_a_schedule_of_small_steps_can_afford_heads():
    """Each step is smaller than a head. Allowed up to `limit`, a head goes when its turn comes; the end is exact."""
    scores, costs, alive = problem()
    total = whole_cost(costs, alive)
    at_once = select(scores, costs, 0.4 * total, alive)
    for n_steps in (10, 400):
        keep = alive
        for i in range(1, n_steps + 1):
            remove = scheduled_sparsity(0.4, i / n_steps) * total
            keep = select(scores, costs, remove, keep, limit=0.4 * total)
            assert -1e-9 < removed_cost(keep, costs) - remove < HEAD
        assert removed_cost(keep, costs) - 0.4 * total < NEURON
        assert (flat(keep) != flat(at_once)).sum() <= HEAD // NEURON + 2  # the same choice, but for the last head


@pytest.mark.parametrize("granularity", ["multi", "heads", "neurons"])
@pytest.mark.parametrize("budget", ["parameters", "macs"])
def test_the_largest_target_is_what_select_can_do(granularity, budget):
    blocks = blocks_of(random_model("llama")[0])
    costs, total = group_costs(blocks, budget, 10), total_cost(blocks, budget, 10)
    scores = {kind: [torch.rand(n) for n in counts] for kind, counts in group_counts(blocks).items()}
    keep = select(scores, costs, total, keep_all(blocks), "global", granularity, floor=0.1)
    most = sparsity_of(keep, costs, total)
    assert sparsity_of(select(scores, costs, total, keep_all(blocks), "uniform", granularity, 0.1), costs, total) == most
    check_target(blocks, most - 1e-9, granularity, 0.1, budget, 10)
    with pytest.raises(UserError, match=f"allows {most:.3f} at most"):
        check_target(blocks, most + 1e-9, granularity, 0.1, budget, 10)


# ------------------------------------------------------------------------------------------------------------- refitting


def regression(seed, n_tokens=60, n_in=7, n_out=4, bias=True):
    """A projection, inputs that are correlated, and which of them stay; all float64."""
    torch.manual_seed(seed)
    linear = torch.nn.Linear(n_in, n_out, bias=bias).double()
    x = (torch.randn(n_tokens, n_in) @ torch.randn(n_in, n_in) + 0.5).double()  # (tokens, in)
    kept = torch.randperm(n_in) < n_in // 2
    ones = torch.cat([x, torch.ones(n_tokens, 1)], 1)
    return linear, x, ones.T @ ones, kept


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("damping", [0.0, 1e-2])
def test_refitting_is_numpys_least_squares(bias, damping):
    """The change of the kept columns: rows of the inputs, and below them the damping's."""
    for seed in range(5):
        linear, x, gram, kept = regression(seed, bias=bias)
        before, old_bias = linear.weight.detach().clone(), linear.bias.detach().clone() if bias else 0
        inputs = torch.cat([x[:, kept], torch.ones(len(x), int(bias))], 1).numpy()  # (tokens, kept + 1)
        lost = (x[:, ~kept] @ before[:, ~kept].T).numpy()
        ridge = damping * np.square(inputs).sum(0).mean()
        rows = np.concatenate([inputs, np.sqrt(ridge) * np.eye(inputs.shape[1])])
        change = np.linalg.lstsq(rows, np.concatenate([lost, np.zeros((inputs.shape[1], 4))]), rcond=None)[0]

        error = refit_linear_(linear, gram, kept, damping)
        expected = torch.zeros_like(before)
        expected[:, kept] = before[:, kept] + torch.from_numpy(change[: int(kept.sum())]).T
        torch.testing.assert_close(linear.weight.detach(), expected, rtol=1e-7, atol=1e-9)
        if bias:
            torch.testing.assert_close(linear.bias.detach() - old_bias, torch.from_numpy(change[-1]), rtol=1e-7, atol=1e-9)
        with torch.no_grad():
            change = x @ (linear.weight - before).T + (linear.bias - old_bias if bias else 0)
            measured = change.square().sum() / (x @ before.T).square().sum()
        assert error == pytest.approx(float(measured), rel=1e-6)


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("damping", [1e-9, 1e-2])
def test_refitting_toward_given_outputs_is_numpys_least_squares(bias, damping):
    for seed in range(5):
        linear, x, gram, kept = regression(seed, bias=bias)
        wanted = torch.randn(len(x), 4, dtype=torch.float64)
        ones = torch.cat([x, torch.ones(len(x), 1)], 1)
        inputs = torch.cat([x[:, kept], torch.ones(len(x), int(bias))], 1).numpy()  # (tokens, kept + 1)
        before = torch.cat([linear.weight[:, kept].T, linear.bias[None] if bias else torch.zeros(0, 4)]).detach().numpy()
        ridge = damping * np.square(inputs).sum(0).mean()
        rows = np.concatenate([inputs, np.sqrt(ridge) * np.eye(inputs.shape[1])])
        fitted = np.linalg.lstsq(rows, np.concatenate([wanted.numpy(), np.sqrt(ridge) * before]), rcond=None)[0]
        with torch.no_grad():
            error = refit_toward_(linear, gram, ones.T @ wanted, float(wanted.square().sum()), kept, damping)
            measured = (x @ linear.weight.T + (linear.bias if bias else 0) - wanted).square().sum() / wanted.square().sum()
        found = torch.cat([linear.weight[:, kept].T, linear.bias[None] if bias else torch.zeros(0, 4)]).detach()
        torch.testing.assert_close(found, torch.from_numpy(fitted), rtol=1e-6, atol=1e-8)
        assert not linear.weight[:, ~kept].any() and error == pytest.approx(float(measured), rel=1e-6)


def test_refitting_toward_its_own_outputs_is_refitting():
    linear, x, gram, kept = regression(0)
    other = torch.nn.Linear(7, 4).double()
    other.load_state_dict(linear.state_dict())
    wanted = linear(x).detach()
    cross = torch.cat([x, torch.ones(len(x), 1)], 1).T @ wanted
    with torch.no_grad():
        refit_linear_(linear, gram, kept)
        refit_toward_(other, gram, cross, float(wanted.square().sum()), kept)
    torch.testing.assert_close(other.weight, linear.weight, rtol=1e-7, atol=1e-9)
    torch.testing.assert_close(other.bias, linear.bias, rtol=1e-7, atol=1e-9)


@pytest.mark.parametrize("n_tokens", [3, 60])  # fewer tokens than inputs: many solutions without damping
def test_refitting_never_adds_error(n_tokens):
    for seed in range(20):
        linear, x, gram, kept = regression(seed, n_tokens)
        before = linear.weight.detach().clone()
        unfitted = float((x[:, ~kept] @ before[:, ~kept].T).square().sum() / (x @ before.T).square().sum())
        assert 0 <= refit_linear_(linear, gram, kept) < unfitted


def inputs_of_readers(model):
    """What reaches every o and FFN output projection from each example alone, without its padding: (tokens, in) each."""
    blocks = blocks_of(model)
    seen = [[] for _ in range(2 * len(blocks))]
    readers = [b.attention.o for b in blocks] + [b.ffn.out for b in blocks]
    handles = [reader.register_forward_pre_hook(lambda _, args, to=to: to.append(args[0].flatten(0, -2)))
               for reader, to in zip(readers, seen, strict=True)]  # fmt: skip
    with torch.no_grad():
        for example in examples_of(batch()):
            model(**example)
    for handle in handles:
        handle.remove()
    return [torch.cat(parts) for parts in seen]


@pytest.mark.parametrize("family", ["bert", "llama", "opt"])
def test_gram_matrices_leave_padding_out(family):
    model, _ = random_model(family)
    with gram_matrices(model, blocks_of(model)) as grams, torch.no_grad():
        model(**batch())
        model(**batch())  # forwards add up
    for gram, x in zip(grams, inputs_of_readers(model), strict=True):
        assert len(x) == 6 + 9 + 9
        x = torch.cat([x, torch.ones(len(x), 1)], 1)
        torch.testing.assert_close(gram, 2 * x.T @ x, rtol=1e-4, atol=1e-3)
    with pytest.raises(ZeroDivisionError), gram_matrices(model, blocks_of(model)):
        _ = 1 / 0
    assert not any(module._forward_pre_hooks or module._forward_hooks for module in model.modules())


@pytest.mark.parametrize("family", ["bert", "llama"])
def test_gram_matrices_weigh_tokens_by_the_squared_gradient(family):
    """Half evenly, half by the gradient at the projection's output, which autograd is asked for token by token."""
    model, _ = random_model(family)
    blocks, inputs = blocks_of(model), batch()
    readers = [b.attention.o for b in blocks] + [b.ffn.out for b in blocks]
    seen = []
    handles = [reader.register_forward_hook(lambda _, args, output: seen.append((args[0], output))) for reader in readers]
    with gram_matrices(model, blocks) as grams:
        logits = model(**inputs).logits
        seed = torch.randn(logits.shape, generator=torch.Generator().manual_seed(0))
        torch.autograd.grad(logits, model.get_input_embeddings().weight, seed, retain_graph=True)
        grams = [gram.clone() for gram in grams]  # the backwards below would add to them
    for handle in handles:
        handle.remove()
    order = [seen[i] for i in (*range(0, len(seen), 2), *range(1, len(seen), 2))]  # called layer by layer
    real = inputs["attention_mask"].flatten().bool()
    for gram, (x, output) in zip(grams, order, strict=True):
        (grad,) = torch.autograd.grad(logits, output, seed, retain_graph=True)
        felt = grad.flatten(0, -2)[real].square().sum(1)
        x = torch.cat([x.flatten(0, -2)[real], torch.ones(int(real.sum()), 1)], 1).detach()
        expected = sum((0.5 + 0.5 * w / felt.mean()) * torch.outer(row, row) for w, row in zip(felt, x, strict=True))
        torch.testing.assert_close(gram, expected, rtol=1e-4, atol=1e-4)
    assert all(parameter.grad is None for parameter in model.parameters())


@pytest.mark.parametrize("family", ["bert", "llama", "opt"])
def test_refit_reports_the_error_of_each_projection(family):
    model, _ = random_model(family)
    original, _ = random_model(family)
    blocks = blocks_of(model)
    keep = uneven_keep(blocks)  # the last layer keeps all heads
    with gram_matrices(model, blocks) as grams, torch.no_grad():
        model(**batch())
    errors = refit_(blocks, grams, keep)
    zero_groups_(blocks, keep)  # what is refitted reads nothing of the removed groups any more
    xs = inputs_of_readers(original)
    pairs = [[(b.attention.o, b.ffn.out) for b in blocks_of(m)] for m in (model, original)]
    for i, layer in enumerate(zip(*pairs, strict=True)):
        for j, (new, old) in enumerate(zip(*layer, strict=True)):
            x = xs[i + 3 * j]
            with torch.no_grad():
                left = (new(x) - old(x)).square().sum() / (x @ old.weight.T).square().sum()
            assert errors[2 * i + j] == pytest.approx(float(left), rel=1e-2, abs=1e-6)
            assert (left > 0) == ((i, j) != (2, 0))


# ----------------------------------------------------------------------------------------------------------------- widths


@pytest.mark.parametrize("seed", range(20))
def test_widths_come_to_multiples_and_no_more_neurons_are_kept(seed):
    generator = torch.Generator().manual_seed(seed)
    n_layers, n, multiple = 5, 67, 8
    scores = {"heads": [], "neurons": [torch.rand(n, generator=generator) for _ in range(n_layers)]}
    alive = {"heads": [], "neurons": [torch.rand(n, generator=generator) < 0.9 for _ in range(n_layers)]}
    keep = {"heads": [], "neurons": [mask & (torch.rand(n, generator=generator) < 0.1 + 0.2 * i)
                                     for i, mask in enumerate(alive["neurons"])]}  # fmt: skip
    new = rounded(keep, scores, alive, multiple)["neurons"]
    before, after = ([int(mask.sum()) for mask in masks] for masks in (keep["neurons"], new))
    assert all(a % multiple == 0 if b >= multiple else a == b for a, b in zip(after, before, strict=True))
    assert sum(before) - multiple < sum(after) <= sum(before)
    for mask, score, living, count in zip(new, scores["neurons"], alive["neurons"], after, strict=True):
        assert not (mask & ~living).any()
        assert sorted(score[mask].tolist()) == sorted(score[living].tolist())[len(score[living]) - count :]  # the best ones
    counts = list(zip(before, after, strict=True))  # by brute force: nobody rounded up had less above its multiple
    up = [b % multiple for b, a in counts if a > b]
    down = [b % multiple for b, a in counts if multiple <= b and a < b]
    assert not up or not down or min(up) >= max(down)
