"""Moments, Fisher matrices and allocations against plain hooks, autograd through the whole model, and sums over all labels."""

import random

import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM

from common import curvature, one_shot, train_utils
from common.blocks import blocks_of
from common.curvature import QUANTILES, owl_allocation, score_quantiles, sensitivity_allocation
from common.importance import curvature_seed
from common.one_shot import Pattern
from common.streaming import StreamedLM
from tests.test_streaming import CASES, CPU, GQA, IDS, one_thread, random_lm, save_random  # noqa: F401

PLAIN = Pattern("unstructured")
FAMILIES = ["opt", "opt-350m", "llama", "mistral", "qwen2", "qwen3"]


def double(folder):
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float64).eval()
    return model, dict(model.named_modules())


def sweep(lm, folder, ids=IDS, batch=2, seed=0, pattern=PLAIN, on_disk=False, done=lambda _: None):
    curves = curvature.fisher_sweep(lm, ids, batch, seed, folder, on_disk, pattern, done)
    fishers = {}
    for i in range(len(lm)):
        fishers |= load_file(folder / f"fisher-{i}.safetensors")
    return curves, fishers


# ----------------------------------------------------------------------------------------------------------------- moments


@pytest.mark.parametrize("full", [True, False])
@pytest.mark.parametrize("case", FAMILIES)
def test_input_moments_are_those_of_plain_hooks(case, full, tmp_path):
    lm, wanted = StreamedLM(save_random(tmp_path, case), CPU), {}
    model, modules = double(tmp_path)
    for name in lm.names.values():
        wanted[name] = []
        modules[name].register_forward_pre_hook(lambda module, args, name=name: wanted[name].append(args[0].flatten(0, -2)))
    with torch.no_grad():
        for part in IDS.split(2):
            model(part)
    hidden = lm.embed(IDS, 2)
    for i in range(len(lm)):
        with lm.loaded(i) as block:
            with curvature.input_moments(block, full) as moments:
                lm.advance(i, hidden)
            lm.run(i, hidden[0])  # is not counted any more
            assert moments[block.attention.q] is moments[block.attention.v] and len(moments) == len(block.projections)
            for linear in block.projections:
                x = torch.cat(wanted[lm.names[linear]])  # (tokens, in)
                assert len(x) == IDS.numel()
                gram = x.T @ x / len(x)
                found = moments[linear].double()
                torch.testing.assert_close(found, gram if full else gram.diagonal(), rtol=1e-5, atol=1e-5 * float(gram.max()))


ON_GPU = pytest.param("cuda", marks=pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device"))


@pytest.mark.parametrize("device", ["cpu", ON_GPU])
@pytest.mark.parametrize("rounded", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize(("n_tokens", "n"), [(1, 1), (7, 5), (2049, 513), (300, 1100)])
def test_products_of_second_moments(n_tokens, n, dtype, rounded, device):
    generator = torch.Generator().manual_seed(0)
    x = (torch.randn(n_tokens, n, generator=generator) + 0.3).to(dtype).to(device)
    total = torch.zeros(n, n, device=device)
    for _ in range(2):  # it adds
        curvature._add_product_(total, x, rounded)
    curvature._mirror_(total)
    pieces = [piece.double() for piece in x.split(curvature.PIECE)]
    wanted = 2 * sum(piece.T @ piece for piece in pieces)
    off = 2**-8 * 2 * sum((piece.T @ piece).abs() for piece in pieces) if rounded and dtype == torch.bfloat16 else 0.0
    assert torch.equal(total, total.T)
    assert bool(((total.double() - wanted).abs() <= off + 1e-5 * wanted.diagonal().max()).all())


@pytest.mark.skipif(not train_utils.cpu_has_bf16(), reason="this CPU has no bf16")
def test_only_where_it_is_asked_for_are_products_rounded():
    x = torch.randn(500, 40, generator=torch.Generator().manual_seed(0)).bfloat16()
    exact, rounded = torch.zeros(40, 40), torch.zeros(40, 40)
    curvature._add_product_(exact, x, False)
    curvature._add_product_(rounded, x, True)
    assert not torch.equal(exact, rounded)


def test_moments_leave_no_hook_behind(tmp_path):
    lm = StreamedLM(save_random(tmp_path, "llama"), CPU)
    lm.embed(IDS, 2)
    with lm.loaded(0) as block:
        with pytest.raises(ZeroDivisionError), curvature.input_moments(block), curvature.output_gradients({}):
            raise ZeroDivisionError
        assert not any(linear._forward_pre_hooks or linear._forward_hooks for linear in block.projections)


# ------------------------------------------------------------------------------------------------------------------ Fisher


def brute_fisher(folder, names, ids, batch, seed, at_once=100):
    """Autograd through the whole model in float64 with the same random signs: G^T G / tokens of each projection."""
    model, modules = double(folder)
    outputs, found, generator = {}, dict.fromkeys(names, 0), torch.Generator().manual_seed(seed)
    for name in names:
        modules[name].register_forward_hook(lambda module, args, output, name=name: outputs.update({name: output}))
    for part in ids.split(batch):
        logits = model(part).logits
        parts = logits.detach().split(at_once, 1)
        start = torch.cat([curvature_seed(part, part, 1.0, generator) for part in parts], 1)
        grads = torch.autograd.grad(logits, [outputs[name] for name in names], start)
        for name, grad in zip(names, grads, strict=True):
            grad = grad.flatten(0, -2)
            found[name] = found[name] + grad.T @ grad / ids.numel()
    return found


@pytest.mark.parametrize("case", [*FAMILIES, "opt-untied", "qwen2-mixed"])
def test_the_fisher_matrix_is_that_of_autograd_through_the_whole_model(case, tmp_path):
    lm = StreamedLM(save_random(tmp_path / "model", case), CPU)
    names = [*lm.names.values()]
    told = []
    curves, fishers = sweep(lm, tmp_path, seed=5, done=told.append)
    wanted = brute_fisher(tmp_path / "model", names, IDS, 2, seed=5)
    assert [*curves] == [n for i in (2, 1, 0) for n in names[len(names) // 3 * i :][: len(names) // 3]]
    assert fishers.keys() == wanted.keys() and told == ["forward"] * 3 + ["backward"] * 3
    for name in names:
        assert wanted[name].abs().max() > 0
        torch.testing.assert_close(fishers[name].double(), wanted[name], rtol=1e-3, atol=1e-4 * float(wanted[name].abs().max()))
    another = sweep(lm, tmp_path, seed=6)[1]
    assert not torch.allclose(another[names[0]], fishers[names[0]], rtol=1e-2, atol=0)


@pytest.mark.parametrize("case", FAMILIES)
def test_a_large_vocabulary_is_taken_in_parts(case, tmp_path, monkeypatch):
    lm, seen = StreamedLM(save_random(tmp_path / "model", case), CPU), []
    logits = lm.logits

    def note(ids, states):
        seen.append(ids.shape[1])
        return logits(ids, states)

    monkeypatch.setattr(lm, "logits", note)
    monkeypatch.setattr(curvature, "LOGITS_AT_ONCE", 2 * 50 * 4)
    found, wanted = sweep(lm, tmp_path)[1], brute_fisher(tmp_path / "model", [*lm.names.values()], IDS, 2, 0, at_once=4)
    assert seen == [4, 4, 1] * 3
    for name, fisher in found.items():
        torch.testing.assert_close(fisher.double(), wanted[name], rtol=1e-3, atol=1e-4 * float(wanted[name].abs().max()))


@pytest.mark.parametrize("case", ["llama", "opt-350m"])
def test_on_disk_and_again_the_fisher_matrix_is_the_same(case, tmp_path):
    lm = StreamedLM(save_random(tmp_path / "model", case), CPU)
    (curves, fishers), (again, on_disk) = sweep(lm, tmp_path / "a"), sweep(lm, tmp_path / "b", on_disk=True)
    assert all(torch.equal(curves[name], again[name]) and torch.equal(fishers[name], on_disk[name]) for name in fishers)
    assert sorted(path.name for path in (tmp_path / "b").iterdir()) == [f"fisher-{i}.safetensors" for i in range(3)]


def test_wide_projections_have_the_diagonal_only(tmp_path, monkeypatch):
    lm = StreamedLM(save_random(tmp_path / "model", "llama"), CPU)
    curves, whole = sweep(lm, tmp_path)
    monkeypatch.setattr(curvature, "FULL_FISHER", 40)  # the FFN has 48, q has 64, all others 32
    some, fishers = sweep(lm, tmp_path)
    for name, fisher in fishers.items():
        wide = len(whole[name]) > 40
        assert wide == any(part in name for part in ("gate", "up", "q_proj"))
        torch.testing.assert_close(fisher, whole[name].diagonal() if wide else whole[name], rtol=1e-4, atol=1e-9)
        assert some[name].isfinite().all() and torch.equal(some[name], curves[name]) != wide


@pytest.mark.parametrize("case", ["llama", "opt-350m"])
def test_its_expectation_is_the_sum_over_all_labels(case, tmp_path):
    """Of two tokens and eight words: every label's gradient, times its probability, at both positions."""
    model = random_lm(case, vocab_size=8, num_hidden_layers=1, pad_token_id=0, bos_token_id=1, eos_token_id=2)
    model.save_pretrained(tmp_path / "model")
    lm, ids = StreamedLM(tmp_path / "model", CPU), torch.tensor([[3, 5]])
    names = [*lm.names.values()]
    model, modules = double(tmp_path / "model")
    outputs = {}
    for name in names:
        modules[name].register_forward_hook(lambda module, args, output, name=name: outputs.update({name: output}))
    logs = model(ids).logits[0].log_softmax(-1)  # (2, 8)
    wanted = {name: torch.zeros(len(modules[name].weight), len(modules[name].weight), dtype=torch.float64) for name in names}
    for t in range(2):
        for label in range(8):
            grads = torch.autograd.grad(-logs[t, label], [outputs[name] for name in names], retain_graph=True)
            for name, grad in zip(names, grads, strict=True):
                grad = grad.flatten(0, -2)
                wanted[name] += logs[t, label].exp().detach() * grad.T @ grad / 2
    n = 400  # copies of the two tokens, each with signs of its own
    fishers = sweep(lm, tmp_path, ids.repeat(n, 1), 100)[1]
    for name in names:
        error = (fishers[name].double() - wanted[name]).norm() / wanted[name].norm()
        assert error < 3 / n**0.5, name


# ----------------------------------------------------------------------------------------------------------------- curves


@pytest.mark.parametrize("pattern", [PLAIN, Pattern("block", 4, 4), Pattern("block", 8, 2)], ids=str)
@pytest.mark.parametrize("full", [True, False])
def test_quantiles_are_those_of_the_scores(pattern, full):
    generator = torch.Generator().manual_seed(0)
    weight = torch.randn(16, 24, generator=generator)
    x, g = torch.randn(100, 24, generator=generator), torch.randn(100, 16, generator=generator)
    gram, fisher = x.T @ x / 100, g.T @ g / 100
    curve = score_quantiles(weight, gram, fisher if full else fisher.diagonal(), pattern)
    assert curve.shape == (QUANTILES,) and (curve.diff() >= 0).all()
    damped = fisher + one_shot.FISHER_DAMPING * fisher.diagonal().mean() * torch.eye(16)
    rows = torch.linalg.inv(damped).diagonal() if full else 1 / fisher.diagonal()
    inverse = torch.linalg.inv(gram + one_shot.DAMPING * gram.diagonal().mean() * torch.eye(24))
    scores = one_shot.obs_scores(weight, inverse, rows, pattern).flatten() / (pattern.n * pattern.m)
    assert float(curve[0]) == pytest.approx(float(scores.min()), rel=1e-3)
    assert float(curve[-1]) == pytest.approx(float(scores.max()), rel=1e-3)
    assert float(curve.mean()) == pytest.approx(float(scores.mean()), rel=0.05)


def a_curve(generator, scale):
    return (torch.randn(QUANTILES, generator=generator).abs() * scale).sort().values


@pytest.mark.parametrize("sparsity", [0.0, 0.05, 0.2, 0.5, 0.7, 0.95, 0.999])
@pytest.mark.parametrize("limit", [0.0, 0.1, 0.2, 1.0])
def test_one_threshold_removes_what_was_asked(sparsity, limit):
    pick, generator = random.Random(0), torch.Generator().manual_seed(0)
    curves = {f"p{i}": a_curve(generator, 10 ** pick.uniform(-3, 3)) for i in range(12)}
    sizes = {name: pick.randint(100, 10_000) for name in curves}
    shares = sensitivity_allocation(curves, sizes, sparsity, limit)
    assert shares.keys() == curves.keys()
    total = sum(shares[name] * sizes[name] for name in curves) / sum(sizes.values())
    assert total == pytest.approx(sparsity, abs=1e-9)
    assert all(abs(share - sparsity) <= limit + 1e-9 and 0 <= share <= max(0.99, sparsity) for share in shares.values())
    if 0.05 < sparsity < 0.95 and limit:
        ranked = sorted(curves, key=lambda name: float(curves[name].median()))
        assert shares[ranked[0]] > sparsity > shares[ranked[-1]]


@pytest.mark.parametrize(("sparsity", "limit"), [(0.2, 0.08), (0.5, 0.08), (0.6, 0.08), (0.8, 0.04), (0.9, 0.02), (0.95, 0.01)])
def test_by_itself_the_limit_is_a_fifth_of_the_density_at_most(sparsity, limit):
    curves = {f"p{i}": a_curve(torch.Generator().manual_seed(i), 10.0**i) for i in range(-4, 5)}
    shares = sensitivity_allocation(curves, dict.fromkeys(curves, 100), sparsity)
    assert max(abs(share - sparsity) for share in shares.values()) == pytest.approx(limit)
    assert sum(shares.values()) / len(shares) == pytest.approx(sparsity)


def test_inside_the_limits_the_next_weight_costs_the_same_everywhere():
    generator = torch.Generator().manual_seed(0)
    curves = {name: a_curve(generator, scale) for name, scale in (("a", 1.0), ("b", 1.5), ("c", 2.0))}
    shares = sensitivity_allocation(curves, {"a": 100, "b": 200, "c": 50}, 0.5, 0.4)
    assert shares["a"] > shares["b"] > shares["c"]
    at = [float(curve[int(shares[name] * QUANTILES)]) for name, curve in curves.items()]
    assert max(at) / min(at) < 1.02


def test_equal_curves_get_equal_shares():
    curve = a_curve(torch.Generator().manual_seed(0), 1.0)
    shares = sensitivity_allocation({"a": curve, "b": curve.clone()}, {"a": 10, "b": 1000}, 0.37, 0.2)
    assert shares["a"] == shares["b"] == pytest.approx(0.37, abs=1e-9)


@pytest.mark.parametrize("costs", [(1.0, 1.0), (1.0, 2.0), (0.0, 0.0), (0.0, 1.0)])
def test_scores_that_are_all_equal(costs):
    """Where all weights of a projection cost the same the threshold takes all or none: the limits hold, and so does the sum."""
    curves = {name: torch.full((QUANTILES,), cost) for name, cost in zip("ab", costs, strict=True)}
    sizes = {"a": 300, "b": 100}
    shares = sensitivity_allocation(curves, sizes, 0.5, 0.2)
    assert (shares["a"] * 300 + shares["b"] * 100) / 400 == pytest.approx(0.5, abs=1e-9)
    assert all(0.3 - 1e-9 <= share <= 0.7 + 1e-9 for share in shares.values())
    assert (shares["a"] > shares["b"]) == (costs[0] < costs[1])


# -------------------------------------------------------------------------------------------------------------------- OWL


@pytest.mark.parametrize("outliers", [[0.01, 0.02, 0.05, 0.03], [0.0, 0.0, 0.0, 0.2], [0.3, 0.0], [0.1] * 5, [0.07]])
@pytest.mark.parametrize("sparsity", [0.0, 0.03, 0.5, 0.97])
def test_owl_prunes_blocks_with_outliers_less(outliers, sparsity):
    shares = owl_allocation(outliers, sparsity, 0.08)
    assert sum(shares) / len(shares) == pytest.approx(sparsity, abs=1e-9)
    assert all(abs(share - sparsity) <= 0.08 + 1e-9 and -1e-9 <= share <= 1 + 1e-9 for share in shares)
    if len(set(outliers)) == 1 or sparsity == 0:
        assert shares == pytest.approx([sparsity] * len(outliers), abs=1e-6)
    else:
        order = sorted(range(len(outliers)), key=lambda i: (-outliers[i], i))
        assert order == sorted(range(len(outliers)), key=lambda i: (round(shares[i], 12), i))
        assert max(abs(share - sparsity) for share in shares) == pytest.approx(min(0.08, sparsity, 1 - sparsity))


def test_owl_is_the_papers_where_the_outliers_are_symmetric():
    """arXiv 2310.05175, its code: scaled to a range of twice lambda, then centred."""
    outliers = torch.tensor([0.01, 0.03, 0.04, 0.06], dtype=torch.float64)
    scaled = (outliers - outliers.min()) / (outliers.max() - outliers.min()) * 2 * 0.08
    wanted = 0.7 - (scaled - scaled.mean())
    assert owl_allocation(outliers.tolist(), 0.7) == pytest.approx(wanted.tolist())


@pytest.mark.parametrize("case", ["llama", "opt-350m"])
def test_outliers_are_counted(case, tmp_path):
    model = random_lm(case)
    with torch.no_grad():
        blocks_of(model)[1].ffn.out.weight[:, ::16] *= 30
    model.save_pretrained(tmp_path)
    lm, norms = StreamedLM(tmp_path, CPU), {}
    model, modules = double(tmp_path)
    for name in lm.names.values():
        modules[name].register_forward_pre_hook(
            lambda module, args, name=name: norms.update({name: args[0].flatten(0, -2).norm(dim=0)})
        )
    with torch.no_grad():
        model(IDS)
    wanted = []
    for block in lm.blocks:
        above = [(s > 5 * s.mean()).flatten() for name in map(lm.names.get, block.projections)
                 for s in [modules[name].weight.abs() * norms[name]]]  # fmt: skip
        wanted.append(float(torch.cat(above).double().mean()))
    assert curvature.outlier_shares(lm, lm.embed(IDS, 2)) == pytest.approx(wanted, abs=1e-9)
    assert min(wanted) > 0 and len(set(wanted)) == 3
