"""One-shot sparsity of single projections: which weights go, in what pattern, and what becomes of the ones that stay.

All functions are of one weight matrix (out, in) and of what calibration saw of it: `gram` (in, in), the second moments of its
inputs, and perhaps `fisher` (out, out), those of the loss's gradients at its outputs. The squared error of the outputs is
tr(D gram D^T) for a change D of the weights; with the Fisher, tr(fisher D gram D^T) / 2 is, to second order and with inputs
and gradients taken as independent, what the change costs in nats a token (K-FAC, arXiv 1503.05671; for pruning LLMs,
arXiv 2312.17244). Score, select, update are apart: any mask goes with any update.
"""

from __future__ import annotations

import re
from typing import NamedTuple

import torch
from torch.nn.functional import linear  # of what is symmetric: linear(a, b) = a b, by the faster of the CPU's libraries

from common.runs import UserError
from common.train_utils import OneDNNLinear

METHODS = {"magnitude": "none", "wanda": "none", "sparsegpt": "obs", "admm": "refit", "kfac": "refit"}  # and their updates
DAMPING = 0.01  # of the mean of the diagonal of a gram, added to it: SparseGPT's
FISHER_DAMPING = 0.1  # the same of a Fisher matrix, which is seen through fewer tokens


# --------------------------------------------------------------------------------------------------------------- patterns


class Pattern(NamedTuple):
    """`kind`: "unstructured", "n:m" (at most n of m neighbours in a row stay) or "block" (whole n x m blocks go)."""

    kind: str
    n: int = 1
    m: int = 1

    @property
    def sparsity(self) -> float | None:
        """The sparsity that the pattern fixes, if it does."""
        return 1 - self.n / self.m if self.kind == "n:m" else None

    def __str__(self) -> str:
        return {"unstructured": "unstructured", "n:m": f"{self.n}:{self.m}", "block": f"block {self.n}x{self.m}"}[self.kind]


def parse_pattern(sparsity_type: str, block_size: str = "16") -> Pattern:
    """`unstructured`, `N:M` (N of M stay: 2:4, 4:8), or `block` of a size such as 16 or 32x8 (rows x columns)."""
    if sparsity_type == "unstructured":
        return Pattern("unstructured")
    if sparsity_type == "block":
        size = re.fullmatch(r"(\d+)(?:x(\d+))?", str(block_size))
        if not size or not int(size[1]) or not int(size[2] or 1):
            raise UserError(f"--block_size {block_size}: expected a number such as 16, or rows x columns such as 32x8")
        return Pattern("block", int(size[1]), int(size[2] or size[1]))
    found = re.fullmatch(r"(\d+):(\d+)", sparsity_type)
    if not found:
        raise UserError(f"--sparsity_type {sparsity_type}: expected unstructured, block, or N:M such as 2:4")
    n, m = int(found[1]), int(found[2])
    if not 0 < n < m:
        raise UserError(f"--sparsity_type {sparsity_type}: N of M weights stay, so expected 0 < N < M")
    return Pattern("n:m", n, m)


def check_shape(pattern: Pattern, shape: tuple[int, int], name: str) -> None:
    """UserError where a projection of this shape cannot have the pattern."""
    rows, columns = shape
    if pattern.kind == "n:m" and columns % pattern.m:
        raise UserError(f"--sparsity_type {pattern}: {name} has {columns} columns, which {pattern.m} does not divide")
    if pattern.kind == "block" and (rows % pattern.n or columns % pattern.m):
        raise UserError(f"--block_size {pattern.n}x{pattern.m}: {name} is {rows} x {columns}, which it does not divide")


def _blocks(values: torch.Tensor, pattern: Pattern) -> torch.Tensor:
    """(out, in) as (out / n, in / m, n, m)."""
    rows, columns = values.shape
    return values.view(rows // pattern.n, pattern.n, columns // pattern.m, pattern.m).transpose(1, 2)


def block_sums(values: torch.Tensor, pattern: Pattern) -> torch.Tensor:
    """Sum of each block: (out, in) -> (out / n, in / m)."""
    return _blocks(values, pattern).sum((2, 3))


def keep_mask(scores: torch.Tensor, pattern: Pattern, sparsity: float, per_row: bool = False) -> torch.Tensor:
    """True for what stays, (out, in): the highest scores, as many as the sparsity says, to the weight (or the block).

    scores: (out, in), of a block pattern (out / n, in / m), as `block_sums` gives them. per_row: the same count in every row
    (Wanda), else in the matrix. The counts are exact, whatever ties there are.
    """
    if pattern.kind == "n:m":
        grouped = scores.unflatten(1, (-1, pattern.m))  # (out, in / m, m)
        index = grouped.topk(pattern.n, 2).indices
        return torch.zeros_like(grouped, dtype=torch.bool).scatter_(2, index, True).flatten(1)
    if pattern.kind == "block":
        of_blocks = keep_mask(scores, Pattern("unstructured"), sparsity)
        return of_blocks.repeat_interleave(pattern.n, 0).repeat_interleave(pattern.m, 1)
    ranked = scores if per_row else scores.flatten()[None]
    index = ranked.topk(ranked.shape[1] - round(ranked.shape[1] * sparsity), 1, sorted=False).indices
    return torch.zeros_like(ranked, dtype=torch.bool).scatter_(1, index, True).view_as(scores)


# ----------------------------------------------------------------------------------------------------------------- scores


def magnitude_scores(weight: torch.Tensor) -> torch.Tensor:
    return weight.abs()


def wanda_scores(weight: torch.Tensor, squares: torch.Tensor) -> torch.Tensor:
    """|W| times the norm of each input: (out, in), (in,) mean squares -> (out, in). arXiv 2306.11695, eq. 1."""
    return weight.abs() * squares.sqrt()


def obs_scores(weight: torch.Tensor, inverse: torch.Tensor, rows: torch.Tensor | None = None,
               pattern: Pattern | None = None) -> torch.Tensor:  # fmt: skip
    """What the loss rises by when a weight goes and all others make good for it: w^2 / ([F^-1]_ii [H^-1]_jj) / 2.

    Optimal Brain Surgeon with a Kronecker-factored Hessian (arXiv 2312.17244, eq. 8). inverse: H^-1, (in, in); rows: the
    diagonal of F^-1, (out,), ones if not given, which is the score of SparseGPT. Of a block pattern, of whole blocks: each
    row's share w (H^-1_JJ)^-1 w^T, over its [F^-1]_ii; (out / n, in / m).
    """
    rows = weight.new_ones(len(weight)) if rows is None else rows
    if pattern is None or pattern.kind != "block":
        return weight.square() / (2 * rows[:, None] * inverse.diagonal())
    m = pattern.m
    inner = _blocks(inverse, Pattern("block", m, m)).diagonal(dim1=0, dim2=1).permute(2, 0, 1)  # (in / m, m, m)
    parts = weight.view(len(weight), -1, m)  # (out, in / m, m)
    costs = quadratic_forms(inner, parts.permute(1, 2, 0)).T / (2 * rows[:, None])  # (out, in / m)
    return costs.view(-1, pattern.n, costs.shape[1]).sum(1)


# ---------------------------------------------------------------------------------------------------------------- algebra


def damped(matrix: torch.Tensor, damping: float = DAMPING) -> torch.Tensor:
    """The matrix with `damping` times the mean size of its diagonal added to it; one, where that is zero."""
    mean = matrix.diagonal().abs().mean()
    return matrix + torch.where(mean > 0, damping * mean, 1.0) * torch.eye(len(matrix)).to(matrix)


def check_finite(moments: torch.Tensor) -> None:
    """UserError where second moments hold NaN or infinity."""
    if not moments.isfinite().all():
        raise UserError("the model's activations or gradients on the calibration text are not finite: its weights are "
                        "broken, or --precision overflows. Try --precision 32")  # fmt: skip


def inverse_of(matrix: torch.Tensor, damping: float = DAMPING) -> torch.Tensor:
    """Inverse of a damped matrix of second moments; damped ten times more while its Cholesky factorisation fails.

    UserError where it holds NaN or infinity.
    """
    factor, failed = torch.linalg.cholesky_ex(damped(matrix, damping))
    while failed:
        check_finite(matrix)
        damping *= 10
        factor, failed = torch.linalg.cholesky_ex(damped(matrix, damping))
    return torch.cholesky_inverse(factor)


def quadratic_forms(matrices: torch.Tensor, vectors: torch.Tensor) -> torch.Tensor:
    """v^T A^-1 v of positive definite A, (n, w, w), and some v of each, (n, w, m): (n, m).

    An A that rounding left indefinite is damped, ten times more each time; UserError where one is not finite. By Cholesky:
    torch 2.13's LU of several matrices of 160 rows or more fails on CPUs ("Pivots given to lu_solve must all be greater ...").
    """
    factors, failed = torch.linalg.cholesky_ex(matrices)
    damping, sizes = 1e-7, matrices.diagonal(dim1=1, dim2=2).abs().mean(1)
    while failed.any():
        check_finite(matrices)
        shift = (damping * sizes * (failed > 0)).to(matrices)[:, None, None] * torch.eye(matrices.shape[1]).to(matrices)
        factors, failed = torch.linalg.cholesky_ex(matrices + shift)
        damping *= 10
    return torch.linalg.solve_triangular(factors, vectors, upper=False).square().sum(1)


def output_error(change: torch.Tensor, gram: torch.Tensor) -> torch.Tensor:
    """Squared error of the outputs: tr(D gram D^T), a scalar."""
    return ((change @ gram) * change).sum()


# ---------------------------------------------------------------------------------------------------------------- updates


def sparsegpt(weight: torch.Tensor, gram: torch.Tensor, pattern: Pattern, sparsity: float, mask: torch.Tensor | None = None,
              block: int = 128, damping: float = DAMPING) -> tuple[torch.Tensor, torch.Tensor]:  # fmt: skip
    """SparseGPT (arXiv 2301.00774, algorithm 1): column after column, all rows at once, what is removed is made good by the
    columns still to come. The pruned weight and its mask, both (out, in).

    The mask is chosen on the way, for `block` columns at a time (unstructured: the same sparsity in each) or at each group of
    m columns; blocks are chosen for the whole layer at the start, by `obs_scores`. With `mask` given only the update is made.
    """
    left, gram = weight.clone(), gram.clone()
    dead = gram.diagonal() == 0
    gram.diagonal()[dead] = 1
    left[:, dead] = 0
    inverse = inverse_of(gram, damping)
    if mask is None and pattern.kind == "block":
        mask = keep_mask(obs_scores(left, inverse, pattern=pattern), pattern, sparsity)
    upper = torch.linalg.cholesky(inverse, upper=True)
    chosen = torch.ones_like(left, dtype=torch.bool) if mask is None else mask
    block = block if pattern.kind != "n:m" else -(-block // pattern.m) * pattern.m
    for start in range(0, left.shape[1], block):
        end = min(start + block, left.shape[1])
        u = upper[start:end, start:end]
        if mask is None and pattern.kind == "unstructured":
            chosen[:, start:end] = keep_mask((left[:, start:end] / u.diagonal()).square(), pattern, sparsity)
        errors = left.new_empty(len(left), end - start)
        for j in range(start, end):
            if mask is None and pattern.kind == "n:m" and j % pattern.m == 0:
                group = slice(j, j + pattern.m)
                scores = (left[:, group] / u.diagonal()[j - start : j - start + pattern.m]).square()
                chosen[:, group] = keep_mask(scores, pattern, sparsity)
            column = left[:, j]
            errors[:, j - start] = torch.where(chosen[:, j], 0.0, column) / u[j - start, j - start]
            left[:, j + 1 : end].addr_(errors[:, j - start], u[j - start, j - start + 1 :], alpha=-1)
        left[:, end:] -= errors @ upper[start:end, end:]
    return left * chosen, chosen


class Problem:
    """min over W' with a pattern of tr(F (W' - W) H (W' - W)^T), scaled so that H and F have ones on their diagonals.

    Scaled, the weights are |W| times the norms of inputs and of gradients, so that to cut the smallest is Wanda's choice, and
    conjugate gradients are preconditioned by the diagonal. fisher: (out, out), (out,) for a diagonal one, or None for ones.
    """

    def __init__(self, weight: torch.Tensor, gram: torch.Tensor, fisher: torch.Tensor | None, damping: float = DAMPING,
                 fisher_damping: float = FISHER_DAMPING):  # fmt: skip
        gram = damped(gram, damping)
        self.columns = gram.diagonal().sqrt()
        self.gram = gram / self.columns[:, None] / self.columns  # (in, in)
        full = fisher is not None and fisher.ndim == 2
        self.fisher, self.rows = None, weight.new_ones(len(weight))
        if full:
            fisher = damped(fisher, fisher_damping)
            self.rows = fisher.diagonal().sqrt()
            self.fisher = fisher / self.rows[:, None] / self.rows  # (out, out)
        elif fisher is not None:
            self.rows = (fisher + fisher_damping * fisher.mean().clamp_min(1e-30)).sqrt()
        self.weight = self.rows[:, None] * weight * self.columns

    def apply(self, change: torch.Tensor) -> torch.Tensor:
        """F D H: half the gradient of the objective at W + D."""
        change = linear(change, self.gram)
        return change if self.fisher is None else linear(change.T, self.fisher).T

    def back(self, scaled: torch.Tensor) -> torch.Tensor:
        return scaled / self.rows[:, None] / self.columns

    def masks(self, pattern: Pattern, sparsity: float, iterations: int = 30, penalty: float = 0.03, growth: float = 1.165
              ) -> torch.Tensor:  # fmt: skip
        """The mask that ADMM settles on (ALPS, arXiv 2406.07831, here with both Kronecker factors): (out, in) bool.

        In turns the weights are fitted, drawn towards the pattern (in closed form, by the factors' eigenvectors), and cut to
        the pattern, while the penalty on their difference grows. Every other weight makes good for those that are about to go
        before it is decided which go, and what is cut can come back.
        """
        values, vectors = torch.linalg.eigh(self.gram)
        columns = vectors.T.contiguous()
        if self.fisher is not None:
            of_rows, rows = torch.linalg.eigh(self.fisher)
            values, rows_back = of_rows[:, None] * values, rows.T.contiguous()
        cut, dual, keep = self.weight, torch.zeros_like(self.weight), None
        with OneDNNLinear(), torch.no_grad():
            for _ in range(iterations):
                change = linear(cut - dual - self.weight, columns)
                if self.fisher is not None:
                    change = linear(change.T, rows_back).T
                change = change * (penalty / (values + penalty))
                if self.fisher is not None:
                    change = linear(change.T, rows).T
                target = self.weight + linear(change, vectors) + dual
                squares = target.square()
                keep = keep_mask(block_sums(squares, pattern) if pattern.kind == "block" else squares, pattern, sparsity)
                cut = target * keep
                penalty, dual = penalty * growth, (target - cut) / growth
        return keep

    def refit(self, keep: torch.Tensor, iterations: int = 40) -> torch.Tensor:
        """The best weights (out, in) that are zero where `keep` is not: conjugate gradients on the kept ones.

        Each row is a problem of its own, unless the Fisher couples them. No step waits for the device; an iteration costs two
        products of matrices, so real widths take no cubic solve.
        """
        dims = 1 if self.fisher is None else (0, 1)
        with OneDNNLinear(), torch.no_grad():
            change = torch.where(keep, 0.0, -self.weight)
            residual = torch.where(keep, -self.apply(change), 0.0)
            direction, size = residual, residual.square().sum(dims, keepdim=True)
            for _ in range(iterations):
                product = torch.where(keep, self.apply(direction), 0.0)
                step = size / (direction * product).sum(dims, keepdim=True).clamp_min(1e-30)
                change, residual = change + step * direction, residual - step * product
                before, size = size, residual.square().sum(dims, keepdim=True)
                direction = residual + size / before.clamp_min(1e-30) * direction
        return self.back(torch.where(keep, self.weight + change, 0.0))
