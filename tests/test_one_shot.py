"""One-shot pruning of a projection against float64 transcriptions and brute force."""

import itertools

import numpy as np
import pytest
import torch

from common import one_shot
from common.one_shot import Pattern, Problem, keep_mask, obs_scores, parse_pattern, sparsegpt
from common.runs import UserError

PATTERNS = [Pattern("unstructured"), Pattern("n:m", 2, 4), Pattern("n:m", 1, 4), Pattern("block", 4, 4), Pattern("block", 2, 8)]


def layer(rows=16, columns=32, seed=0, tokens=200, dtype=torch.float32):
    generator = torch.Generator().manual_seed(seed)
    mixing = torch.randn(columns, columns, generator=generator)
    x = torch.randn(tokens, columns, generator=generator) @ (torch.eye(columns) + 0.3 * mixing)
    weight = torch.randn(rows, columns, generator=generator)
    gradients = torch.randn(tokens, rows, generator=generator) @ torch.randn(rows, rows, generator=generator)
    return weight.to(dtype), (x.T @ x / tokens).to(dtype), (gradients.T @ gradients / tokens).to(dtype)


def wanted_count(pattern, sparsity, shape):
    n = shape[0] * shape[1]
    if pattern.kind == "n:m":
        return n * pattern.n // pattern.m
    size = pattern.n * pattern.m
    return (n // size - round(n // size * sparsity)) * size


def keep_of(scores, pattern, sparsity):
    return keep_mask(one_shot.block_sums(scores, pattern) if pattern.kind == "block" else scores, pattern, sparsity)


@pytest.mark.parametrize("pattern", PATTERNS, ids=str)
@pytest.mark.parametrize("sparsity", [0.0, 0.2, 0.5, 0.9])
def test_counts_are_exact_even_with_ties(pattern, sparsity):
    keep = keep_of(torch.ones(16, 32), pattern, sparsity)
    assert int(keep.sum()) == wanted_count(pattern, sparsity, (16, 32))


def test_masks_keep_the_best_of_each_group():
    scores = torch.rand(8, 16, generator=torch.Generator().manual_seed(0))
    keep = keep_mask(scores, Pattern("n:m", 2, 4), 0.5).view(8, 4, 4)
    for row, group in itertools.product(range(8), range(4)):
        best = scores.view(8, 4, 4)[row, group].argsort(descending=True)[:2]
        assert set(keep[row, group].nonzero().flatten().tolist()) == set(best.tolist())
    keep = keep_mask(scores, Pattern("unstructured"), 0.5, per_row=True)
    assert (keep.sum(1) == 8).all()
    assert torch.equal(keep, scores > scores.median(1, keepdim=True).values)
    of_blocks = one_shot.block_sums(scores, Pattern("block", 4, 8))
    assert of_blocks.shape == (2, 2)
    assert of_blocks[1, 0] == pytest.approx(float(scores[4:, :8].sum()))
    keep = keep_mask(of_blocks, Pattern("block", 4, 8), 0.5)
    assert keep.shape == (8, 16)
    assert one_shot.block_sums(keep.float(), Pattern("block", 4, 8)).unique().tolist() == [0, 32]


@pytest.mark.parametrize(("kind", "block", "pattern"), [
    ("unstructured", "16", Pattern("unstructured")), ("2:4", "16", Pattern("n:m", 2, 4)),
    ("block", "16", Pattern("block", 16, 16)), ("block", "32x8", Pattern("block", 32, 8)),
])  # fmt: skip
def test_patterns_are_parsed(kind, block, pattern):
    assert parse_pattern(kind, block) == pattern


@pytest.mark.parametrize(("kind", "block"), [("4:2", "16"), ("4:4", "16"), ("0:4", "16"), ("half", "16"), ("block", "x"),
                                             ("block", "0"), ("block", "16x0")])  # fmt: skip
def test_patterns_that_are_none(kind, block):
    with pytest.raises(UserError):
        parse_pattern(kind, block)


def test_shapes_that_do_not_divide():
    with pytest.raises(UserError, match="30 columns"):
        one_shot.check_shape(Pattern("n:m", 2, 4), (16, 30), "q")
    with pytest.raises(UserError, match="16 x 30"):
        one_shot.check_shape(Pattern("block", 16, 16), (16, 30), "q")
    one_shot.check_shape(Pattern("unstructured"), (7, 13), "q")


# ----------------------------------------------------------------------------------------------------------------- scores


def test_obs_scores_are_what_removing_one_weight_costs():
    """By brute force: the least of tr(F D H D^T) / 2 over all D that remove one weight."""
    weight, gram, fisher = layer(3, 5, dtype=torch.float64)
    scores = obs_scores(weight, torch.linalg.inv(gram), torch.linalg.inv(fisher).diagonal())
    hessian = torch.kron(fisher, gram)  # of the weights, row by row
    for i, j in itertools.product(range(3), range(5)):
        k = i * 5 + j
        others = [x for x in range(15) if x != k]
        fixed = -weight[i, j]
        best = torch.linalg.solve(hessian[others][:, others], -hessian[others][:, k] * fixed)
        change = torch.zeros(15, dtype=torch.float64)
        change[others], change[k] = best, fixed
        assert float(scores[i, j]) == pytest.approx(float(change @ hessian @ change) / 2, rel=1e-9)


def test_obs_scores_of_blocks_are_what_removing_a_block_costs():
    weight, gram, _ = layer(4, 8, dtype=torch.float64)
    pattern = Pattern("block", 2, 4)
    scores = obs_scores(weight, torch.linalg.inv(gram), pattern=pattern)
    assert scores.shape == (2, 2)
    for i, j in itertools.product(range(2), range(2)):
        gone, left = list(range(4 * j, 4 * j + 4)), [x for x in range(8) if x // 4 != j]
        total = 0.0
        for row in (2 * i, 2 * i + 1):
            change = torch.zeros(8, dtype=torch.float64)
            change[gone] = -weight[row, gone]
            change[left] = torch.linalg.solve(gram[left][:, left], -gram[left][:, gone] @ change[gone])
            total += float(change @ gram @ change) / 2
        assert float(scores[i, j]) == pytest.approx(total, rel=1e-9)


@pytest.mark.parametrize("width", [1, 16, 200])  # groups of eight billion parameters' models are wider than 160
def test_quadratic_forms(width):
    generator = torch.Generator().manual_seed(width)
    half = torch.randn(3, width, width + 8, generator=generator, dtype=torch.float64)
    matrices, vectors = half @ half.mT / width, torch.randn(3, width, 5, generator=generator, dtype=torch.float64)
    found = one_shot.quadratic_forms(matrices.float(), vectors.float())
    for matrix, those, forms in zip(matrices.numpy(), vectors.numpy(), found.numpy(), strict=True):
        np.testing.assert_allclose(forms, (those * np.linalg.solve(matrix, those)).sum(0), rtol=1e-2 if width > 1 else 1e-5)


def test_quadratic_forms_of_what_rounding_left_indefinite():
    """It alone is damped."""
    matrices = torch.diag_embed(torch.tensor([[1.0, 2.0, -1e-9], [1.0, 2.0, 4.0]]))
    found = one_shot.quadratic_forms(matrices, torch.eye(3).expand(2, 3, 3))
    assert found[1].tolist() == pytest.approx([1, 0.5, 0.25], rel=1e-6)
    assert found[0, :2].tolist() == pytest.approx([1, 0.5], rel=1e-5) and found[0, 2] > 1e5 and found.isfinite().all()
    matrices[0, 0, 0] = float("nan")
    with pytest.raises(UserError, match="are not finite"):  # and not damped for ever
        one_shot.quadratic_forms(matrices, torch.eye(3).expand(2, 3, 3))


# ---------------------------------------------------------------------------------------------------------------- updates


def paper_sparsegpt(weight, gram, sparsity, n_m, blocksize, damping=0.01):
    """Algorithm 1 of arXiv 2301.00774 as it stands there, in float64, with loops."""
    w, h = weight.double().clone(), gram.double().clone()
    rows, columns = w.shape
    h += damping * h.diagonal().mean() * torch.eye(columns, dtype=torch.float64)
    hinv = torch.linalg.cholesky(torch.linalg.inv(h)).T
    mask = torch.ones_like(w, dtype=torch.bool)
    errors = torch.zeros(rows, blocksize, dtype=torch.float64)
    for i in range(0, columns, blocksize):
        for j in range(i, min(i + blocksize, columns)):
            if n_m is None and j % blocksize == 0:
                some = (w[:, j : j + blocksize] / hinv.diagonal()[j : j + blocksize]).square()
                gone = some.flatten().argsort()[: round(some.numel() * sparsity)]
                for k in gone.tolist():
                    mask[k // some.shape[1], j + k % some.shape[1]] = False
            if n_m is not None and j % n_m[1] == 0:
                some = (w[:, j : j + n_m[1]] / hinv.diagonal()[j : j + n_m[1]]).square()
                for r in range(rows):
                    for k in some[r].argsort()[: n_m[1] - n_m[0]].tolist():
                        mask[r, j + k] = False
            errors[:, j - i] = w[:, j] / hinv[j, j] * (~mask[:, j])
            for k in range(j, min(i + blocksize, columns)):
                w[:, k] -= errors[:, j - i] * hinv[j, k]
        end = min(i + blocksize, columns)
        w[:, end:] -= errors[:, : end - i] @ hinv[i:end, end:]
    return w * mask, mask


@pytest.mark.parametrize(("pattern", "n_m"), [(Pattern("unstructured"), None), (Pattern("n:m", 2, 4), (2, 4)),
                                              (Pattern("n:m", 1, 4), (1, 4))])  # fmt: skip
@pytest.mark.parametrize("block", [8, 32])
def test_sparsegpt_is_the_papers(pattern, n_m, block):
    weight, gram, _ = layer()
    pruned, keep = sparsegpt(weight.double(), gram.double(), pattern, 0.5, block=block)
    wanted, mask = paper_sparsegpt(weight, gram, 0.5, n_m, block)
    assert torch.equal(keep, mask)
    torch.testing.assert_close(pruned, wanted, rtol=1e-9, atol=1e-12)
    single, _ = sparsegpt(weight, gram, pattern, 0.5, block=block)
    torch.testing.assert_close(single.double(), wanted, rtol=1e-3, atol=1e-3)


@pytest.mark.parametrize("pattern", PATTERNS, ids=str)
@pytest.mark.parametrize("fisher", ["none", "diagonal", "full"])
def test_refit_is_the_least_squares_solution(pattern, fisher):
    weight, gram, full = layer(dtype=torch.float64)
    given = {"none": None, "diagonal": full.diagonal(), "full": full}[fisher]
    problem = Problem(weight, gram, given)
    keep = keep_of(weight.abs(), pattern, 0.5)
    new = problem.refit(keep, iterations=2000)
    assert (new[~keep] == 0).all()
    h = one_shot.damped(gram)
    f = {"none": torch.eye(16, dtype=torch.float64), "full": one_shot.damped(full, one_shot.FISHER_DAMPING),
         "diagonal": torch.eye(16, dtype=torch.float64)}[fisher]  # rows that are not coupled do not care for their weight
    hessian, kept = torch.kron(f, h), keep.flatten()
    change = -weight.flatten().clone()
    change[kept] = torch.linalg.solve(hessian[kept][:, kept], hessian[kept][:, ~kept] @ weight.flatten()[~kept])
    torch.testing.assert_close(new.flatten(), torch.where(kept, weight.flatten() + change, 0.0), rtol=1e-6, atol=1e-8)


@pytest.mark.parametrize("pattern", PATTERNS, ids=str)
def test_few_iterations_come_near_the_solution(pattern):
    weight, gram, fisher = layer(64, 64)
    problem, keep = Problem(weight, gram, fisher), keep_of(weight.abs(), pattern, 0.5)
    objective = lambda new: float((problem.apply(d := problem.rows[:, None] * (new - weight) * problem.columns) * d).sum())  # noqa: E731
    exact = objective(Problem(weight.double(), gram.double(), fisher.double()).refit(keep, 3000).float())
    assert objective(problem.refit(keep)) <= 1.01 * exact
    assert exact < 0.8 * objective(weight * keep)


@pytest.mark.parametrize("pattern", PATTERNS, ids=str)
@pytest.mark.parametrize("fisher", [False, True])
def test_masks_of_admm_are_better_than_wandas(pattern, fisher):
    sums = {"admm": 0.0, "wanda": 0.0}
    for seed in range(4):
        weight, gram, full = layer(32, 64, seed)
        problem = Problem(weight, gram, full if fisher else None)
        squares = problem.weight.square()
        for name, keep in (("admm", problem.masks(pattern, 0.6)), ("wanda", keep_of(squares, pattern, 0.6))):
            assert int(keep.sum()) == wanted_count(pattern, 0.6, (32, 64))
            change = problem.rows[:, None] * (problem.refit(keep, 500) - weight) * problem.columns
            sums[name] += float((problem.apply(change) * change).sum())
    assert sums["admm"] < 0.97 * sums["wanda"]


def test_dead_inputs_and_a_gram_without_rank():
    weight, gram, _ = layer()
    gram[:, 3] = gram[3] = 0
    pruned, _ = sparsegpt(weight, gram, Pattern("unstructured"), 0.5)
    assert pruned.isfinite().all()
    assert (pruned[:, 3] == 0).all()
    flat = torch.ones(32, 32)  # rank one: the factorisation needs its damping
    for pattern in PATTERNS:
        assert sparsegpt(weight, flat, pattern, 0.5)[0].isfinite().all()
        problem = Problem(weight, flat, None)
        assert problem.refit(problem.masks(pattern, 0.5)).isfinite().all()
    assert one_shot.inverse_of(-torch.eye(4), 1e-3).isfinite().all()


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_moments_that_are_not_finite_are_refused(value):
    matrix = torch.eye(3)
    matrix[1, 1] = value
    with pytest.raises(UserError, match="not finite"):
        one_shot.inverse_of(matrix)
