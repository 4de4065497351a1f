"""Masks on GPUs by Triton, in kernels that write the zeros and touch nothing else. Triton comes with PyTorch for CUDA on Linux;
where it is missing or builds nothing, sparse_trainer does the same by PyTorch's own kernels.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl

BITS_AT_ONCE = 4096  # of a program


@triton.jit
def _write_blocks(values, indices, width, N: tl.constexpr, M: tl.constexpr, N_: tl.constexpr, M_: tl.constexpr):
    """One block of N x M a program; width: blocks in a row; N_, M_: the next powers of two."""
    index = tl.load(indices + tl.program_id(0)).to(tl.int64)
    row, column = tl.arange(0, N_)[:, None], tl.arange(0, M_)[None, :]
    first = index // width * N * width * M + index % width * M
    tl.store(values + first + row * width * M + column, 0.0, mask=(row < N) & (column < M))


@triton.jit
def _write_bits(values, packed, n, SIZE: tl.constexpr):
    place = tl.program_id(0).to(tl.int64) * SIZE + tl.arange(0, SIZE)
    inside = place < n
    byte = tl.load(packed + place // 8, mask=inside, other=255).to(tl.int32)
    is_free = (byte >> (place % 8).to(tl.int32)) & 1
    tl.store(values + place, 0.0, mask=inside & (is_free == 0))


def zero_blocks_(values: torch.Tensor, indices: torch.Tensor, block: tuple[int, int]) -> torch.Tensor:
    """Set blocks (n, m) of `values`, (out, in), to zero. indices: which, counted row by row; int32, on the same device."""
    _check_contiguous(values)
    if len(indices):
        n, m = block
        sizes = n, m, triton.next_power_of_2(n), triton.next_power_of_2(m)
        with torch.cuda.device_of(values):
            _write_blocks[(len(indices),)](values, indices, values.shape[1] // m, *sizes)
    return values


def zero_bits_(values: torch.Tensor, packed: torch.Tensor) -> torch.Tensor:
    """Set to zero what has a 0 among the bits of `packed`, uint8, the first of eight in the lowest place."""
    _check_contiguous(values)
    if n := values.numel():
        with torch.cuda.device_of(values):
            _write_bits[(triton.cdiv(n, BITS_AT_ONCE),)](values, packed, n, BITS_AT_ONCE)
    return values


def _check_contiguous(values: torch.Tensor) -> None:
    if not values.is_contiguous():
        raise ValueError(f"a mask of values of strides {values.stride()}: expected contiguous ones")
