"""Dense and sparse products of pruned projections: measured where they agree; where there is no kernel, it is said."""

import json
import re

import pytest
import torch

from common import kernels, one_shot, runs, streaming
from common.runs import UserError

CPU = torch.device("cpu")


def pruned_dir(folder, pattern, shapes, sparsity=0.5, dtype=torch.float32):
    """A directory with projections of these shapes in a pattern ({name: (out, in)}), and the record of how they came about."""
    torch.manual_seed(0)
    kind, _, size = pattern.partition(" ")
    parsed = one_shot.parse_pattern(kind, size or "16")
    tensors = {}
    for i, (name, shape) in enumerate(shapes.items()):
        weight = torch.randn(shape)
        squares = weight.square()
        scores = one_shot.block_sums(squares, parsed) if parsed.kind == "block" else squares
        keep = one_shot.keep_mask(scores, parsed, parsed.sparsity or sparsity + 0.1 * i)
        tensors[f"{name}.weight"] = (weight * keep).to(dtype)
    streaming.save_tensors(folder / "model.safetensors", tensors | {"model.norm.weight": torch.ones(8)})
    stages = [{"target_sparsity": 0.1}, {"pattern": pattern, "projections": [{"name": name} for name in shapes]}]
    runs.write_atomic(folder / "compression.json", json.dumps({"stages": stages}))
    return folder


SHAPES = {"model.layers.0.self_attn.q_proj": (64, 64), "model.layers.0.self_attn.k_proj": (32, 64),
          "model.layers.0.mlp.down_proj": (64, 64), "model.layers.1.self_attn.q_proj": (64, 64)}  # fmt: skip


@pytest.fixture
def blocks_dir(tmp_path):
    return pruned_dir(tmp_path / "blocks", "block 16x16", SHAPES, 0.25)


def has_bsr():
    return torch.backends.mkl.is_available()


@pytest.mark.skipif(not has_bsr(), reason="PyTorch without MKL has no BSR kernel for the CPU")
def test_blocks_are_measured_by_shape(blocks_dir):
    measured = kernels.measure(blocks_dir, CPU, tokens=8, seconds=0.01)
    assert [(record["shape"], record["n"], record["kinds"]) for record in measured] == [
        ([64, 64], 3, ["q_proj", "down_proj"]), ([32, 64], 1, ["k_proj"])]  # fmt: skip
    square = measured[0]
    assert square["name"] == "model.layers.0.mlp.down_proj"  # its sparsity is the median of the three
    assert square["sparsity"] == 7 / 16 and square["pattern"] == "block 16x16"
    for record in measured:
        assert record["why"] is None and record["dense_ms"] > 0 and record["sparse_ms"] > 0
        assert record["ratio"] == record["dense_ms"] / record["sparse_ms"]
        assert record["tokens"] == 8 and record["dtype"] == "float32"


@pytest.mark.parametrize("pattern, why", [
    ("unstructured", "PyTorch has no kernel that gains by scattered zeros"),
    ("2:4", "PyTorch has no N:M kernel for the CPU"),
    ("4:8", "PyTorch has no N:M kernel for the CPU"),
    ("block 32x8", "RuntimeError: .*non-square blocks" if has_bsr() else "RuntimeError"),
])  # fmt: skip
def test_where_there_is_no_kernel_it_is_said(tmp_path, pattern, why):
    measured = kernels.measure(pruned_dir(tmp_path, pattern, SHAPES, 0.25, torch.bfloat16), CPU, tokens=8, seconds=0.01)
    for record in measured:
        assert record["sparse_ms"] is None and record["ratio"] is None and record["dense_ms"] > 0
        assert re.match(why, record["why"])
    assert kernels.rows_of(measured)[1][-2:] == ["none", ""]
    assert kernels.conclusion(measured).startswith(f"Nothing is gained in time by {pattern} here: ")


@pytest.mark.parametrize("pattern, device, why", [
    ("2:4", "cuda", None), ("1:4", "cuda", None), ("block", "cuda", None),
    ("4:8", "cuda", "GPUs have 2:4 in hardware, not 4:8"),
    ("block", "mps", "PyTorch has no sparse kernel for mps"), ("unstructured", "cuda", "PyTorch has no kernel that gains"),
])  # fmt: skip
def test_which_kernels_there_are_elsewhere(pattern, device, why):
    found = kernels._no_kernel(one_shot.parse_pattern(pattern), torch.device(device))
    assert found is None if why is None else found.startswith(why)


def test_a_wrong_product_is_not_timed(blocks_dir, monkeypatch):
    def wrong(weight, inputs, pattern):
        return lambda: inputs @ (weight * 1.001).T

    monkeypatch.setattr(kernels, "_sparse_product", wrong)
    for record in kernels.measure(blocks_dir, CPU, tokens=8, seconds=0.01):
        assert record["sparse_ms"] is None and record["why"] == "the kernel's product is wrong by a relative 1.0e-03"
    monkeypatch.setattr(kernels, "_sparse_product", lambda *_: lambda: torch.full((8, 64), torch.nan))
    assert "wrong by a relative nan" in kernels.measure(blocks_dir, CPU, tokens=8, seconds=0.01)[0]["why"]


def record_of(ratio, n=1, why=None):
    sparse = None if ratio is None else 2.0 / ratio
    return {"kinds": ["q_proj", "o_proj"], "n": n, "shape": [64, 32], "pattern": "block 16x16", "sparsity": 0.5,
            "dense_ms": 2.0, "sparse_ms": sparse, "ratio": ratio, "why": why}  # fmt: skip


def test_rows_and_conclusion():
    rows = kernels.rows_of([record_of(0.41), record_of(1.5, 3), record_of(None, why="no kernel")])
    assert rows[0] == ["projections", "shape", "pattern", "sparsity", "dense ms", "sparse ms", "ratio"]
    assert rows[1] == ["q_proj, o_proj (1)", "64x32", "block 16x16", "0.500", "2.00", "4.88", "0.41x: slower"]
    assert rows[2][-1] == "1.50x: faster" and rows[3][-2:] == ["none", ""]
    assert runs.table(rows).count("\n") == 4
    said = kernels.conclusion
    nothing = "Nothing is gained in time by block 16x16 here"
    assert said([record_of(0.41)]) == f"{nothing}: the kernel is slower for every shape (0.41x)."
    assert said([record_of(None, why="no kernel")]) == f"{nothing}: no kernel."
    assert said([record_of(2.0, 3), record_of(0.5)]) == (  # 8 ms dense, 3 + 4 ms sparse
        "The sparse kernel is faster for 1 of 2 shapes (up to 2.00x); over all projections it has one for, it gains (1.14x).")
    mixed = said([record_of(2.0), record_of(0.25), record_of(None, why="odd")])
    assert "still loses (0.44x). 1 of 3 shapes have no sparse kernel here: odd." in mixed


def test_what_is_no_pruned_model_is_refused(tmp_path):
    with pytest.raises(UserError, match=r"its compression.json names no pattern of zeros. Prune it first"):
        kernels.measure(tmp_path, CPU)
    runs.write_atomic(tmp_path / "compression.json", json.dumps({"stages": [{"target_sparsity": 0.5}]}))
    with pytest.raises(UserError, match="names no pattern of zeros"):
        kernels.measure(tmp_path, CPU)
    pruned_dir(tmp_path, "2:4", SHAPES)
    streaming.save_tensors(tmp_path / "model.safetensors", {"model.norm.weight": torch.ones(8)})
    with pytest.raises(UserError, match=r"has no tensor model.layers.0.self_attn.q_proj.weight any more"):
        kernels.measure(tmp_path, CPU)


@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")
@pytest.mark.parametrize("pattern", ["2:4", "block 32x32"])
def test_kernels_of_cuda(tmp_path, pattern):
    folder = pruned_dir(tmp_path, pattern, {"q_proj": (512, 512)}, dtype=torch.bfloat16)
    (record,) = kernels.measure(folder, torch.device("cuda"), tokens=256, seconds=0.05)
    assert record["why"] is not None or record["ratio"] > 0
    assert record["dtype"] == "bfloat16"
