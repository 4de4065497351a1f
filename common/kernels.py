"""What the zeros of a pruned model gain on this device: dense products against PyTorch's sparse kernels, projection by shape.

Zeros alone make nothing faster: a kernel has to skip them. PyTorch has one for blocks (BSR: MKL's on the CPU, Triton's on
CUDA), and one for 2:4 on CUDA, in 16 bits; for weights that are zero here and there it has none.
"""

from __future__ import annotations

import statistics
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from torch.nn import functional

from common import checkpoint, eval_utils, one_shot, streaming
from common.one_shot import Pattern
from common.runs import UserError

TOLERANCE = {torch.float32: 1e-4}  # of a product, relative to its largest element
HALF_TOLERANCE = 2e-2


def measure(directory: Path, device: torch.device, tokens: int = 4096, seconds: float = 1.0) -> list[dict[str, Any]]:
    """The projections of a pruned model directory, one record a shape: dense and sparse milliseconds for `tokens` tokens.

    Of the projections of one shape the one of median sparsity is measured, in fp32 on the CPU, in 16 bits on CUDA. A sparse
    product is compared with the dense one before it is timed; the two take turns in one process, the device is synchronised
    around every run, and times are medians. Keys: kinds (last parts of the names), n (how many projections), name (the one
    measured), shape, pattern, sparsity, tokens, dtype, dense_ms, sparse_ms, ratio (dense over sparse), why (there is no
    sparse time, else None). seconds: of timing, for each shape. UserError where the directory says no pattern.
    """
    stages = [stage for stage in checkpoint.compression_stages(Path(directory)) if "pattern" in stage]
    if not stages or not stages[-1].get("projections"):
        raise UserError(f"{directory}: its compression.json names no pattern of zeros. Prune it first: "
                        "python main_block.py --prune_method wanda --sparsity_type block")  # fmt: skip
    kind, _, size = stages[-1]["pattern"].partition(" ")
    pattern = one_shot.parse_pattern(kind, size or "16")
    files, by_shape = streaming.tensor_files(directory), {}
    for record in stages[-1]["projections"]:
        name = record["name"]
        if f"{name}.weight" not in files:
            raise UserError(f"{directory}: has no tensor {name}.weight any more; expected the model as it was pruned")
        with safe_open(files[f"{name}.weight"], "pt") as file:
            weight = file.get_tensor(f"{name}.weight")
        sparsity = float((weight == 0).float().mean())
        by_shape.setdefault((tuple(weight.shape), weight.dtype), []).append((sparsity, name))
    measured = []
    for (shape, stored), found in by_shape.items():
        sparsity, name = sorted(found)[(len(found) - 1) // 2]
        with safe_open(files[f"{name}.weight"], "pt") as file:
            weight = file.get_tensor(f"{name}.weight").clone()  # (out, in)
        half = torch.bfloat16 if stored == torch.bfloat16 else torch.float16
        dtype = half if device.type == "cuda" else torch.float32
        kinds = list(dict.fromkeys(other.rpartition(".")[2] for _, other in found))
        record = {"kinds": kinds, "n": len(found), "name": name, "shape": list(shape), "pattern": str(pattern),
                  "sparsity": sparsity, "tokens": tokens, "dtype": str(dtype).removeprefix("torch.")}  # fmt: skip
        measured.append(record | _measure_weight(weight.to(device, dtype), pattern, tokens, seconds))
    return measured


def _measure_weight(weight: torch.Tensor, pattern: Pattern, tokens: int, seconds: float) -> dict[str, Any]:
    generator = torch.Generator().manual_seed(0)
    inputs = torch.randn(tokens, weight.shape[1], generator=generator).to(weight)  # (tokens, in)
    products: dict[str, Callable] = {"dense": lambda: functional.linear(inputs, weight)}
    why = _no_kernel(pattern, weight.device)
    with torch.inference_mode(), warnings.catch_warnings():
        warnings.simplefilter("ignore")  # that sparse tensors are in beta
        if why is None:
            try:
                products["sparse"] = _sparse_product(weight, inputs, pattern)
                why = _mismatch(products["sparse"](), products["dense"]())
            except (RuntimeError, NotImplementedError, ValueError, ImportError, AssertionError) as error:
                why = f"{type(error).__name__}: {(str(error).strip() or 'no message').splitlines()[0]}"
        if why is not None:
            products.pop("sparse", None)
        times = eval_utils.in_turns(products, seconds, weight.device)
        times = {name: statistics.median(t) * 1e3 for name, t in times.items()}
    sparse = times.get("sparse")
    return {"dense_ms": times["dense"], "sparse_ms": sparse, "ratio": times["dense"] / sparse if sparse else None, "why": why}


def _no_kernel(pattern: Pattern, device: torch.device) -> str | None:
    """Why PyTorch has no kernel for a pattern on a device; None where it may have one."""
    if pattern.kind == "unstructured":
        return "PyTorch has no kernel that gains by scattered zeros"
    if device.type not in ("cpu", "cuda"):
        return f"PyTorch has no sparse kernel for {device.type}"
    if pattern.kind == "n:m":
        if device.type == "cpu":
            return "PyTorch has no N:M kernel for the CPU"
        if pattern.m != 4 or pattern.n > 2:
            return f"GPUs have 2:4 in hardware, not {pattern}"
    return None


def _sparse_product(weight: torch.Tensor, inputs: torch.Tensor, pattern: Pattern) -> Callable[[], torch.Tensor]:
    """inputs @ weight.T by the device's sparse kernel: (tokens, in) -> (tokens, out)."""
    if pattern.kind == "n:m":
        sparse = torch.sparse.to_sparse_semi_structured(weight)
    else:
        sparse = weight.to_sparse_bsr((pattern.n, pattern.m))
    return lambda: functional.linear(inputs, sparse)


def _mismatch(found: torch.Tensor, expected: torch.Tensor) -> str | None:
    """What is wrong with a sparse product, if anything is."""
    error = float((found.float() - expected.float()).abs().max() / expected.float().abs().max().clamp_min(1e-30))
    tolerance = TOLERANCE.get(expected.dtype, HALF_TOLERANCE)
    return None if error <= tolerance else f"the kernel's product is wrong by a relative {error:.1e}"  # NaN is wrong too


def rows_of(measured: list[dict[str, Any]]) -> list[list[str]]:
    """What `measure` found as rows of a table, the header first."""
    rows = [["projections", "shape", "pattern", "sparsity", "dense ms", "sparse ms", "ratio"]]
    for record in measured:
        sparse, ratio = record["sparse_ms"], record["ratio"]
        rows.append([f"{', '.join(record['kinds'])} ({record['n']})", "x".join(map(str, record["shape"])), record["pattern"],
                     f"{record['sparsity']:.3f}", f"{record['dense_ms']:.2f}", "none" if sparse is None else f"{sparse:.2f}",
                     "" if ratio is None else f"{ratio:.2f}x: {'faster' if ratio > 1 else 'slower'}"])  # fmt: skip
    return rows


def conclusion(measured: list[dict[str, Any]]) -> str:
    """In a sentence or two, whether anything is gained, and where not, why."""
    pattern, what = measured[0]["pattern"], f"of {len(measured)} shape{'s' if len(measured) > 1 else ''}"
    timed = [record for record in measured if record["ratio"] is not None]
    faster = [record["ratio"] for record in timed if record["ratio"] > 1]
    reasons = "; ".join(dict.fromkeys(record["why"] for record in measured if record["why"]))
    lacking = f" {len(measured) - len(timed)} {what} have no sparse kernel here: {reasons}." if reasons else ""
    if not timed:
        return f"Nothing is gained in time by {pattern} here: {reasons}."
    total = sum(r["n"] * r["dense_ms"] for r in timed) / sum(r["n"] * r["sparse_ms"] for r in timed)
    if not faster:
        return f"Nothing is gained in time by {pattern} here: the kernel is slower for every shape ({total:.2f}x).{lacking}"
    gain = "gains" if total > 1 else "still loses"
    return (f"The sparse kernel is faster for {len(faster)} {what} (up to {max(faster):.2f}x); "
            f"over all projections it has one for, it {gain} ({total:.2f}x).{lacking}")  # fmt: skip
