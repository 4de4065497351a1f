"""Structured pruning of causal LMs: scores against the dense formulas, which groups go, cutting, refitting, generation."""

import itertools

import numpy as np
import pytest
import torch
from torch.nn import functional
from transformers import (
    AutoModelForCausalLM,
    LlamaConfig,
    LlamaForCausalLM,
    MistralConfig,
    MistralForCausalLM,
    Qwen2Config,
    Qwen2ForCausalLM,
    Qwen3Config,
    Qwen3ForCausalLM,
)

from common import structured
from common.blocks import KINDS, blocks_of, group_costs, group_counts, layers_of, total_cost
from common.checkpoint import load_tensors, save_model
from common.importance import curvature_seed, l2_scores
from common.pruning import sparsity_of, zero_groups_
from common.streaming import StreamedLM
from tests.test_streaming import one_thread, save_random  # noqa: F401

SHAPE = {"vocab_size": 60, "hidden_size": 32, "intermediate_size": 40, "num_hidden_layers": 3, "num_attention_heads": 8,
         "num_key_value_heads": 2, "max_position_embeddings": 64, "bos_token_id": 0, "eos_token_id": 1,
         "pad_token_id": 2}  # fmt: skip
MODELS = {
    "llama": lambda: LlamaForCausalLM(LlamaConfig(**SHAPE, tie_word_embeddings=True)),
    "mistral": lambda: MistralForCausalLM(MistralConfig(**SHAPE, sliding_window=8)),
    "qwen2": lambda: Qwen2ForCausalLM(Qwen2Config(**SHAPE)),
    "qwen3": lambda: Qwen3ForCausalLM(Qwen3Config(**SHAPE, head_dim=6)),
}
CPU, ALL = torch.device("cpu"), range(3)


def made(name: str):
    torch.manual_seed(0)
    model = MODELS[name]().eval()
    for parameter in model.parameters():
        parameter.data += 0.05 * torch.randn_like(parameter)
    return model


@pytest.fixture(scope="module", params=MODELS)
def saved(request, tmp_path_factory):
    folder = tmp_path_factory.mktemp(request.param)
    model = made(request.param)
    model.save_pretrained(folder)
    return model, folder


@pytest.fixture(scope="module")
def samples():
    return torch.randint(3, 60, (6, 16), generator=torch.Generator().manual_seed(1))


def gates_of(model, queries=False):
    """A factor of one on every group's activation, at the projections that read them; and the hooks that put them there."""
    gates, handles = [], []
    for block in blocks_of(model, queries):
        a = block.attention
        for reader, n in ((a.o, a.n_groups), (block.ffn.out, block.ffn.n_neurons)):
            gate = torch.ones(n, requires_grad=True)
            gates.append(gate)

            def hook(module, args, gate=gate):
                x = args[0]
                return (x * gate.repeat_interleave(x.shape[-1] // len(gate)),)

            handles.append(reader.register_forward_pre_hook(hook))
    return gates, handles


@pytest.mark.parametrize("queries", [False, True])
def test_gate_scores_are_those_of_autograd(saved, samples, queries, tmp_path):
    model, folder = saved
    lm = StreamedLM(folder, CPU)
    blocks = blocks_of(lm.model, queries)
    found = structured.group_scores(lm, blocks, samples, 4, ("taylor", "fisher", "l2"), 0, tmp_path)
    gates, handles = gates_of(model, queries)
    grads = []
    for sample in samples:
        logits = model(input_ids=sample[None]).logits[0]
        grads.append(torch.autograd.grad(functional.cross_entropy(logits[:-1], sample[1:]), gates))
    for handle in handles:
        handle.remove()
    # batches of 4 and 2 examples: each counts as one step
    for name, of in (("taylor", torch.abs), ("fisher", torch.square)):
        for i, gate in enumerate(zip(*grads, strict=True)):
            each = of(torch.stack(gate))
            expected = (each[:4].mean(0) + each[4:].mean(0)) / 2
            torch.testing.assert_close(found[name][KINDS[i % 2]][i // 2], expected, rtol=2e-4, atol=1e-9)
    plain = l2_scores(blocks_of(model, queries))
    for kind in KINDS:
        torch.testing.assert_close(found["l2"][kind], plain[kind])
        assert [len(score) for score in found["l2"][kind]] == group_counts(blocks)[kind]


def test_scores_do_not_depend_on_where_activations_are(saved, samples, tmp_path):
    _, folder = saved
    names, found = ("obs", "kd_gradient", "activation", "random"), []
    for on_disk in (False, True):
        lm = StreamedLM(folder, CPU)
        found.append(structured.group_scores(lm, blocks_of(lm.model), samples, 3, names, 5, tmp_path / "work", on_disk))
    for name, kind in itertools.product(names, KINDS):
        torch.testing.assert_close(found[0][name][kind], found[1][name][kind], rtol=0, atol=0)
    assert not list((tmp_path / "work").glob("*/*.bin"))


def test_kd_gradient_is_fisher_of_the_seeds(saved, samples, tmp_path):
    model, folder = saved
    lm = StreamedLM(folder, CPU)
    found = structured.group_scores(lm, blocks_of(lm.model), samples, 6, ("kd_gradient",), 7, tmp_path)["kd_gradient"]
    gates, handles = gates_of(model)
    with torch.no_grad():
        seeds = curvature_seed(*[model(input_ids=samples).logits] * 2, 1.0, torch.Generator().manual_seed(7))
    each = []
    for sample, seed in zip(samples, seeds, strict=True):
        each.append(torch.autograd.grad(model(input_ids=sample[None]).logits[0], gates, seed))
    for handle in handles:
        handle.remove()
    for i, gate in enumerate(zip(*each, strict=True)):
        torch.testing.assert_close(found[KINDS[i % 2]][i // 2], torch.stack(gate).square().mean(0), rtol=2e-3, atol=1e-9)


# -------------------------------------------------------------------------------------------------- what a removal costs


def quadratic(weight, new, gram, fisher):
    change = new - weight
    return 0.5 * float((fisher @ change @ gram * change).sum())


@pytest.mark.parametrize("width", [1, 3])
def test_first_removal_cost_is_the_least_loss_of_all_refits(width):
    """Against the least-squares solution in float64, with the damping that the function says it uses."""
    generator = torch.Generator().manual_seed(0)
    weight = torch.randn(5, 12, generator=generator)
    x, g = torch.randn(200, 12, generator=generator), torch.randn(200, 5, generator=generator)
    gram, fisher = x.T @ x / 200, g.T @ g / 200
    costs = structured.removal_costs(weight, gram, fisher, width, rounds=12 // width)  # one at a time
    whole, felt = (structured.damped(matrix, structured.FISHER_DAMPING).double() for matrix in (gram, fisher))
    left, gone, weight = list(range(12 // width)), [], weight.double()
    order, least = costs.argsort(stable=True).tolist(), 0.0
    for group in order:
        options = {}
        for candidate in left:
            removed = [c for other in [*gone, candidate] for c in range(other * width, (other + 1) * width)]
            kept = [c for c in range(12) if c not in removed]
            new = torch.zeros_like(weight)
            new[:, kept] = weight @ whole[:, kept] @ torch.linalg.inv(whole[kept][:, kept]) if kept else new[:, kept]
            options[candidate] = quadratic(weight, new, whole, felt)
        before = min_loss(weight, whole, felt, gone, width)
        assert options[group] == pytest.approx(min(options.values()), rel=1e-3)  # the greedy choice
        least = max(least, options[group] - before)
        assert float(costs[group]) == pytest.approx(least, rel=2e-3)
        gone.append(group)
        left.remove(group)


def min_loss(weight, gram, fisher, gone, width):
    kept = [c for c in range(weight.shape[1]) if c // width not in gone]
    new = torch.zeros_like(weight)
    new[:, kept] = weight @ gram[:, kept] @ torch.linalg.inv(gram[kept][:, kept])
    return quadratic(weight, new, gram, fisher)


# ------------------------------------------------------------------------------------------------------ which groups stay


@pytest.mark.parametrize("allocation", ["global", "uniform", "sensitivity"])
@pytest.mark.parametrize("queries", [False, True])
def test_budgets_are_met(saved, allocation, queries):
    model, _ = saved
    blocks = blocks_of(model, queries)
    scores, layers = l2_scores(blocks), range(0, 3)
    shares = [0.5, 0.2, 0.3] if allocation == "sensitivity" else None
    keep = structured.choose(scores, blocks, 0.3, layers, KINDS, allocation, 0.1, shares)
    costs, total = group_costs(blocks), total_cost(blocks)
    owned = sum(cost * n for kind in KINDS for cost, n in zip(costs[kind], group_counts(blocks)[kind], strict=True))
    gone = sparsity_of(keep, costs, total) * total / owned
    neuron = 3 * max(costs["neurons"]) / owned
    assert 0.3 - 1e-9 <= gone <= 0.3 + 3 * neuron
    if shares:
        for i, share in enumerate(shares):
            of_layer = sum(costs[kind][i] * float((~keep[kind][i]).sum()) for kind in KINDS) / owned
            assert share * 0.3 - 1e-9 <= of_layer <= share * 0.3 + neuron


def test_every_kv_head_keeps_as_many_query_heads(saved):
    model, _ = saved
    blocks = blocks_of(model, queries=True)
    scores = l2_scores(blocks)
    keep = structured.choose(scores, blocks, 0.4, ALL, ("heads",), "global", 0.1)
    for mask, score in zip(keep["heads"], scores["heads"], strict=True):
        of_kv = mask.view(2, 4)
        assert len(set(of_kv.sum(1).tolist())) == 1 and of_kv.sum() >= 2
        for kept, values in zip(of_kv, score.view(2, 4), strict=True):  # and its best ones
            assert not kept.any() or kept.all() or values[kept].min() > values[~kept].max()
    assert all(mask.all() for mask in keep["neurons"])


def test_protected_layers_stay_whole(saved):
    model, _ = saved
    blocks = blocks_of(model)
    keep = structured.choose(l2_scores(blocks), blocks, 0.2, range(1, 2), KINDS, "global", 0.1)
    assert all(keep[kind][i].all() for kind in KINDS for i in (0, 2)) and not keep["neurons"][1].all()


def test_shares_are_in_inverse_proportion_to_damage():
    assert structured.layer_shares([1.0, 2.0], [2.0, 2.0], [10.0, 10.0], 0.3, [0.9] * 2) == pytest.approx([0.4, 0.2])
    spared = structured.layer_shares([1.0, 100.0, 100.0], [2.0] * 3, [1.0] * 3, 0.5, [0.8] * 3)  # what one is, the others lose
    assert spared == pytest.approx([0.8, 0.35, 0.35]) and sum(spared) == pytest.approx(1.5)


def test_shares_do_the_least_damage():
    """Against a grid of all shares of three layers that sum to the budget."""
    damages, powers, costs, ratio, most = [1.0, 3.0, 0.2], [1.5, 2.5, 6.0], [2.0, 1.0, 3.0], 0.4, [0.6, 0.6, 0.45]

    def damage(shares):
        return sum(d * (s / ratio) ** p for d, s, p in zip(damages, shares, powers, strict=True))

    found = structured.layer_shares(damages, powers, costs, ratio, most)
    assert sum(s * c for s, c in zip(found, costs, strict=True)) == pytest.approx(ratio * sum(costs))
    assert all(s <= m + 1e-12 for s, m in zip(found, most, strict=True))
    grid = np.linspace(0, 0.6, 601)
    others = [(a, b, (ratio * sum(costs) - a * costs[0] - b * costs[1]) / costs[2]) for a in grid for b in grid]
    least = min(damage(shares) for shares in others if 0 <= shares[2] <= most[2])
    assert damage(found) <= least * (1 + 1e-9) and least == pytest.approx(damage(found), rel=1e-3)


def test_how_fast_damage_grows():
    power, damage = structured._growth([0.2, 0.3], [0.5 * 0.2**3, 0.5 * 0.3**3], 0.25)
    assert power == pytest.approx(3) and damage == pytest.approx(0.5 * 0.25**3)
    assert structured._growth([0.2, 0.3], [1.0, 1.0], 0.2) == (structured.POWERS[0], 1.0)
    steep, damage = structured._growth([0.2, 0.3], [1e-9, 1.0], 0.2)
    assert steep == structured.POWERS[1] and damage * (0.3 / 0.2) ** steep == pytest.approx(1.0)
    assert structured._growth([0.0, 0.0], [0.0, 0.0], 0.2)[0] == structured._growth([0.2, 0.2], [1.0, 1.0], 0.2)[0] == 2


@pytest.mark.parametrize("ratio", [0.2, 0.6, 0.7])
def test_no_layer_loses_far_more_than_it_was_measured_with(saved, samples, tmp_path, monkeypatch, ratio):
    """Of a layer that seems to be worth nothing as well; and the budget is met."""
    model, folder = saved
    monkeypatch.setattr(structured, "layer_damages", lambda *args: {0: [1e-9, 2e-9], 1: [1.0, 2.3], 2: [2.0, 4.6]})
    lm, chosen = StreamedLM(folder, CPU), {"blocks": blocks_of(model), "layers": ALL, "kinds": KINDS}
    shares, _ = structured.sensitivity_shares(lm, samples, 8, l2_scores(blocks_of(model)), ratio, 0.1, chosen, 0, tmp_path)
    assert sum(shares) == pytest.approx(1) and shares[0] >= shares[1] >= shares[2] - 1e-9
    assert 3 * shares[0] == pytest.approx(1.5) if ratio < 0.6 else 3 * shares[0] <= 1.5 + 1e-9


def test_the_damage_of_a_layer_is_felt_by_the_predictions(saved, samples, tmp_path):
    """KL of the model with one block pruned from the dense one; the estimate is of the same size, and no block is free."""
    model, folder = saved
    lm = StreamedLM(folder, CPU)
    blocks = blocks_of(lm.model)
    scores = l2_scores(blocks_of(model))
    keeps = {i: [structured.choose(scores, blocks, share, range(i, i + 1), ("neurons",), "global", 0.1)
                 for share in (0.08, 0.04)] for i in ALL}  # fmt: skip
    many = torch.randint(3, 60, (64, 16), generator=torch.Generator().manual_seed(3))
    damages = structured.layer_damages(lm, blocks, many, 16, keeps, 0, tmp_path, refit=False)
    with torch.no_grad():
        dense = model(input_ids=many).logits.log_softmax(-1)
    for i in ALL:
        other = made(model.config.model_type)
        zero_groups_(blocks_of(other), keeps[i][1])
        with torch.no_grad():
            pruned = other(input_ids=many).logits.log_softmax(-1)
        kl = float((dense.exp() * (dense - pruned)).sum(-1).mean())
        assert damages[i][1] == pytest.approx(kl, rel=0.5), (i, damages, kl)
        assert damages[i][0] > damages[i][1]


# ------------------------------------------------------------------------------------------------------------ cut and refit


@pytest.mark.parametrize("queries", [False, True])
def test_cut_is_masked(saved, queries, tmp_path):
    """Logits, and what is generated with a cache, for a batch with padding."""
    model, folder = saved
    masked = made(model.config.model_type)
    blocks = blocks_of(masked, queries)
    keep = structured.choose(l2_scores(blocks), blocks, 0.35, ALL, KINDS, "global", 0.1)
    cut, left = structured.pruned_model(folder, keep)
    zero_groups_(blocks, keep)
    assert len({tuple(shape.values()) for shape in left}) > 1
    assert left == [block.shape for block in blocks_of(cut)] and (not queries or all(s["kv_heads"] == 2 for s in left))
    ids = torch.randint(3, 60, (3, 12), generator=torch.Generator().manual_seed(4))
    mask = torch.ones_like(ids)
    ids[1, :5], mask[1, :5] = 2, 0
    with torch.no_grad():
        ours, theirs = (m.eval()(input_ids=ids, attention_mask=mask).logits[mask.bool()] for m in (cut, masked))
    torch.testing.assert_close(ours, theirs, rtol=1e-5, atol=1e-5)
    how = {"attention_mask": mask, "max_new_tokens": 12, "min_new_tokens": 12, "do_sample": False}
    assert torch.equal(cut.generate(ids, **how), masked.generate(ids, **how))


def states_of(model, i, ids):
    """What block `i` is given and gives, and its o and FFN output projection read and give; of all tokens, float64."""
    layer, block, seen = layers_of(model)[i], blocks_of(model)[i], {}

    def hook(name):
        def keep(module, args, output):
            seen[name] = tuple(x.flatten(0, -2) for x in (args[0], output[0] if isinstance(output, tuple) else output))

        return keep

    parts = {"block": layer, "heads": block.attention.o, "neurons": block.ffn.out}
    handles = [module.register_forward_hook(hook(name)) for name, module in parts.items()]
    with torch.no_grad():
        model(input_ids=ids, use_cache=False)
    for handle in handles:
        handle.remove()
    return seen


def ridge(x, wanted, before, damping=1e-2):
    """numpy's least squares for weights (in, out), drawn to `before`."""
    strength = damping * np.square(x).sum(0).mean()
    rows = np.concatenate([x, np.sqrt(strength) * np.eye(x.shape[1])])
    return np.linalg.lstsq(rows, np.concatenate([wanted, np.sqrt(strength) * before]), rcond=None)[0]


@pytest.mark.parametrize("case", ["llama", "llama-biased", "qwen3", "opt", "opt-350m"])
def test_refits_are_the_regression_to_the_dense_states(case, tmp_path):
    """Of every block, one after the other: block 1 loses groups, block 2 makes up for it, block 0 is as it was."""
    lm = StreamedLM(save_random(tmp_path, case), CPU)
    dense, cut = (AutoModelForCausalLM.from_pretrained(tmp_path, dtype=torch.float64).eval() for _ in range(2))
    keep = structured.choose(l2_scores(blocks_of(dense)), lm.blocks, 0.15, range(1, 2), KINDS, "global", 0.1)
    ids = torch.randint(3, 50, (30, 9), generator=torch.Generator().manual_seed(3))
    errors, _ = structured.refit_blocks(lm, lm.blocks, ids, 8, keep, tmp_path / "parts")
    assert all(0 <= error < 1 for error in errors) and not (tmp_path / "parts" / "block-0.safetensors").exists()
    assert len(errors) == 3 + int(not keep["heads"][1].all())  # nothing is made up for before a group has gone
    for i, block in enumerate(blocks_of(cut)):
        if i == 0:
            continue
        of_block = {kind: [keep[kind][i]] for kind in KINDS}
        stored = {name: value.double() for name, value in load_tensors(tmp_path / "parts" / f"block-{i}.safetensors").items()}
        for kind, linear in (("heads", block.attention.o), ("neurons", block.ffn.out)):
            theirs, ours = states_of(dense, i, ids), states_of(cut, i, ids)
            middle, between = (seen["block"][0] + seen["heads"][1] for seen in (theirs, ours))
            if kind == "heads":
                wanted = middle - ours["block"][0]
            elif case == "opt-350m":  # normalised behind the sum
                wanted = ours["neurons"][1]
            else:
                torch.testing.assert_close(theirs["block"][1], middle + theirs["neurons"][1])
                wanted = theirs["block"][1] - between
            kept = keep[kind][i].repeat_interleave(linear.in_features // len(keep[kind][i]))
            biased = linear.bias is not None
            x, old = ours[kind][0][:, kept], linear.weight.detach().T[kept]
            if biased:
                x, old = torch.cat([x, torch.ones(len(x), 1)], 1), torch.cat([old, linear.bias.detach()[None]])
            fitted = torch.from_numpy(ridge(x.numpy(), wanted.numpy(), old.numpy()))
            name = next(name for name, module in cut.named_modules() if module is linear)
            if i == 1 and kind == "heads" and kept.all():
                assert torch.equal(stored[f"{name}.weight"], linear.weight)
                continue
            found = stored[f"{name}.weight"].T[kept]
            found = torch.cat([found, stored[f"{name}.bias"][None]]) if biased else found
            torch.testing.assert_close(found, fitted, rtol=1e-3, atol=1e-4 * float(fitted.abs().max()))
            with torch.no_grad():  # on with what is stored
                linear.weight.copy_(stored[f"{name}.weight"])
                if biased:
                    linear.bias.copy_(stored[f"{name}.bias"])
            zero_groups_([block], {other: [torch.ones_like(of_block[other][0])] for other in KINDS} | {kind: of_block[kind]})
        assert all(torch.equal(value, cut.state_dict()[name]) for name, value in stored.items())


def test_refitted_blocks_are_closer_to_the_dense_model(saved, tmp_path):
    """Hidden states behind the last block, on the text that they were fitted to; a block that is there is not made again."""
    model, folder = saved
    lm = StreamedLM(folder, CPU)
    blocks = blocks_of(lm.model)
    keep = structured.choose(l2_scores(blocks_of(model)), blocks, 0.3, ALL, KINDS, "uniform", 0.1)
    many = torch.randint(3, 60, (40, 16), generator=torch.Generator().manual_seed(3))
    errors, _ = structured.refit_blocks(lm, blocks, many, 8, keep, tmp_path / "parts")
    assert len(errors) == 6 and all(0 < error < 1 for error in errors)
    last, found = states_of(model, 2, many)["block"][1], {}
    for name, parts in (("plain", None), ("refitted", tmp_path / "parts")):
        other, _ = structured.pruned_model(folder, keep, parts)
        found[name] = float((states_of(other.eval(), 2, many)["block"][1] - last).square().mean())
    assert found["refitted"] < 0.95 * found["plain"], found
    again, _ = structured.refit_blocks(StreamedLM(folder, CPU), blocks, many, 8, keep, tmp_path / "parts")  # what is there
    assert again == errors


def test_uneven_models_load_with_their_code(saved, tmp_path):
    model, folder = saved
    blocks = blocks_of(model)
    keep = structured.choose(l2_scores(blocks), blocks, 0.35, ALL, KINDS, "global", 0.1)
    cut, _ = structured.pruned_model(folder, keep)

    class Nothing:
        def save_pretrained(self, directory):
            pass

    save_model(tmp_path / "model", cut, Nothing())
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path / "model", trust_remote_code=True)
    ids = torch.randint(3, 60, (2, 9))
    with torch.no_grad():
        assert torch.equal(loaded.eval()(input_ids=ids).logits, cut.eval()(input_ids=ids).logits)
