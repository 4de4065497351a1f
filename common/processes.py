"""Several processes of one script: started by torchrun's elastic agent, joined by gloo or NCCL, gradients summed by step."""

from __future__ import annotations

import logging
import os
import sys
import uuid
from contextlib import contextmanager, nullcontext, redirect_stdout
from datetime import timedelta

import torch
import torch.distributed as dist

from common.runs import Interrupted, UserError, resolve_device

SAVE_SECONDS = 120  # that processes have to save their state when they are asked to stop


def cores() -> int:
    """The cores that this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def started() -> bool:
    """Whether an agent started this process."""
    return "TORCHELASTIC_RUN_ID" in os.environ


def device_of(device: str, n: int) -> torch.device:
    """--device for one of n processes on this machine: on CUDA each has a GPU of its own. UserError where there are too few."""
    if n > 1 and ":" in device:
        raise UserError(f"--device {device}: is one for {n} processes. Name GPUs by CUDA_VISIBLE_DEVICES, and --device cuda")
    resolved = resolve_device(device)
    if resolved.type != "cuda" or n == 1:
        return resolved
    if n > torch.cuda.device_count():
        raise UserError(f"--devices {n}: there are {torch.cuda.device_count()} GPUs. Use as many, or --device cpu")
    resolved = torch.device("cuda", int(os.environ.get("LOCAL_RANK", 0)))
    torch.cuda.set_device(resolved)
    return resolved


def launch(n: int, script: str, argv: list[str]) -> None:
    """Run `python script argv` as n processes on this machine and wait for them. Ends this program as they ended."""
    from torch.distributed.elastic.multiprocessing.api import SignalException
    from torch.distributed.elastic.multiprocessing.errors import ChildFailedError
    from torch.distributed.launcher.api import LaunchConfig, elastic_launch

    logging.getLogger("torch.distributed.elastic").setLevel(logging.ERROR)  # what it does on Ctrl+C is said by the processes
    os.environ.setdefault("OMP_NUM_THREADS", str(max(1, cores() // n)))
    config = LaunchConfig(min_nodes=1, max_nodes=1, nproc_per_node=n, run_id=uuid.uuid4().hex, rdzv_backend="c10d",
                          rdzv_endpoint="localhost:0", max_restarts=0, shutdown_timeout=SAVE_SECONDS)  # fmt: skip
    try:
        elastic_launch(config, sys.executable)(script, *argv)
    except SignalException:
        raise Interrupted("The same command goes on from the last checkpoint") from None
    except ChildFailedError as error:
        rank, failure = error.get_first_failure()
        if failure.exitcode == 130:
            raise Interrupted("The same command goes on from the last checkpoint") from None
        if failure.exitcode == 2:
            sys.exit(2)  # it has told its error itself
        raise UserError(f"process {rank} of {n} ended with exit status {failure.exitcode}. The same command goes on from the "
                        "last checkpoint") from None  # fmt: skip


@contextmanager
def joined(device: torch.device, n: int):
    """Inside, the n processes that an agent started are one group, by NCCL on CUDA, else gloo; yields the rank. Alone it is 0.

    They wait two hours for each other; what others than the first print is shown nowhere. UserError where they are not n."""
    if (found := int(os.environ.get("WORLD_SIZE", 1)) if started() else 1) != n:
        raise UserError(f"--devices {n}: there are {found} processes. Give --devices {found}, or start it by python alone")
    if not started():
        yield 0
        return
    dist.init_process_group("nccl" if device.type == "cuda" else "gloo", timeout=timedelta(hours=2))
    try:
        with open(os.devnull, "w") as nowhere, redirect_stdout(nowhere) if dist.get_rank() else nullcontext():
            yield dist.get_rank()
    except Interrupted:
        if dist.get_rank():
            sys.exit(130)  # the first one says how to go on
        raise
    except RuntimeError as error:
        if not any(sign in str(error) for sign in ("by peer", "onnection", "NCCL")):
            raise
        raise UserError(f"process {dist.get_rank()} lost another one ({str(error).splitlines()[0]:.100})") from None
    finally:
        dist.destroy_process_group()


@contextmanager
def first(rank: int):
    """Inside, the process of rank 0 goes before the others."""
    if rank and dist.is_initialized():
        dist.barrier()
    yield
    if not rank and dist.is_initialized():
        dist.barrier()


def orphaned(parent: int) -> bool:
    """Whether the agent that was the parent of this process is gone."""
    return started() and os.getppid() != parent


def sum_gradients_(parameters: list[torch.nn.Parameter]) -> None:
    """Give every process the sum of all processes' gradients, in one message; a process that has none counts as zeros."""
    if not dist.is_initialized():
        return
    flat = torch.cat([(torch.zeros_like(p) if p.grad is None else p.grad).flatten() for p in parameters])
    dist.all_reduce(flat)
    for parameter, gradient in zip(parameters, flat.split([p.numel() for p in parameters]), strict=True):
        parameter.grad = gradient.view_as(parameter)


def part_of(things: list) -> list:
    """Those of the things that this process takes; each is taken by one."""
    return things[dist.get_rank() :: dist.get_world_size()] if dist.is_initialized() else things


def sum_(values: torch.Tensor) -> torch.Tensor:
    """The sum of all processes' values, in their place."""
    if dist.is_initialized():
        dist.all_reduce(values)
    return values


def any_of(flag: bool, device: torch.device) -> bool:
    """Whether it is so in any process."""
    return bool(sum_(torch.tensor(int(flag), device=device))) if dist.is_initialized() else flag
