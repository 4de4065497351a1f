"""FSDP2: weights, gradients and optimizer states cut over the processes, and checkpoints that any number of them can read.

`fully_shard` is called here, on the CPU as on GPUs; accelerate shards on GPUs only, and checkpoints with pickles. Here they
are safetensors, a file a process, by torch.distributed.checkpoint.
"""

from __future__ import annotations

import json
from pathlib import Path

import torch
import torch.distributed.checkpoint as dcp
from torch import nn
from torch.distributed.checkpoint import HuggingFaceStorageReader, HuggingFaceStorageWriter
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import FSDPModule, MixedPrecisionPolicy, fully_shard
from torch.distributed.tensor import DTensor

from common.blocks import layers_of

SETTINGS = "settings.json"


def shard_(model: nn.Module, device: str, half: torch.dtype | None = None) -> nn.Module:
    """Cut every parameter of a causal language model by rows over all processes, in place; whole are only those of the block
    that is at work. Every process has to call it with the same weights.

    device: cpu or cuda; the pieces go there. half: the dtype in which weights are gathered and multiplied, where it is not
    their own; gradients are summed in fp32.
    """
    mesh = init_device_mesh(device, (torch.distributed.get_world_size(),))
    how = {"mesh": mesh, "mp_policy": MixedPrecisionPolicy(param_dtype=half, reduce_dtype=torch.float32)}
    for layer in layers_of(model.get_base_model() if hasattr(model, "get_base_model") else model):  # peft's models have one
        fully_shard(layer, **how)
    embeddings, head = model.get_input_embeddings(), model.get_output_embeddings()
    if head is None or head.weight is not embeddings.weight:
        fully_shard(embeddings, **how)  # tied ones are needed at both ends, and belong to the whole
    fully_shard(model, **how)
    model._is_fsdp_managed_module = True  # what transformers looks at
    return model


def is_sharded(model: nn.Module) -> bool:
    return any(isinstance(module, FSDPModule) for module in model.modules())


def reshard_(model: nn.Module) -> None:
    """Give back what a forward has gathered and no backward has freed: parameters are pieces again."""
    for module in model.modules():
        if isinstance(module, FSDPModule):
            module.reshard()


def whole(tensor: torch.Tensor) -> torch.Tensor:
    """A tensor with the pieces of all processes. All of them have to call it."""
    return tensor.detach().full_tensor() if isinstance(tensor, DTensor) else tensor.detach()


def local(tensor: torch.Tensor) -> torch.Tensor:
    """The part of a tensor that this process holds."""
    return tensor.to_local() if isinstance(tensor, DTensor) else tensor


def save(folder: Path, tensors: dict[str, torch.Tensor]) -> None:
    """Write each process's pieces. All of them have to call it."""
    folder.mkdir(parents=True, exist_ok=True)
    dcp.save({name: _with_a_row(tensor) for name, tensor in tensors.items()},
             storage_writer=HuggingFaceStorageWriter(str(folder), save_distributed=True))  # fmt: skip


@torch.no_grad()
def load_(folder: Path, tensors: dict[str, torch.Tensor]) -> None:
    """Read what `save` wrote into these tensors, however many processes there were. All of them have to call it."""
    dcp.load({name: _with_a_row(tensor) for name, tensor in tensors.items()},
             storage_reader=HuggingFaceStorageReader(str(folder)))  # fmt: skip


def _with_a_row(tensor: torch.Tensor) -> torch.Tensor:
    """The same memory with one dimension at least, as files of pieces need it."""
    return tensor.detach().view(1) if tensor.ndim == 0 else tensor.detach()


def trained(model: nn.Module) -> dict[str, nn.Parameter]:
    return {name: parameter for name, parameter in model.named_parameters() if parameter.requires_grad}


def save_optimizer(folder: Path, model: nn.Module, optimizer: torch.optim.Optimizer) -> None:
    """Write an optimizer's tensors and settings. All processes have to call it."""
    save(folder, _states(model, optimizer))
    groups = [{key: value.item() if isinstance(value, torch.Tensor) else value for key, value in group.items()
               if key != "params"} for group in optimizer.param_groups]  # fmt: skip
    if torch.distributed.get_rank() == 0:
        (folder / SETTINGS).write_text(json.dumps(groups))


def load_optimizer_(folder: Path, model: nn.Module, optimizer: torch.optim.Optimizer) -> None:
    """Read what `save_optimizer` wrote into an optimizer of the same parameters that has not stepped. All processes have to
    call it.
    """
    rates = [group["lr"] for group in optimizer.param_groups]
    for group in optimizer.param_groups:  # a step that moves nothing makes the states
        group["lr"] = torch.zeros_like(group["lr"]) if isinstance(group["lr"], torch.Tensor) else 0.0
    for parameter in trained(model).values():
        parameter.grad = torch.zeros_like(parameter)
    optimizer.step()
    optimizer.zero_grad()
    load_(folder, _states(model, optimizer))
    for group, rate, stored in zip(optimizer.param_groups, rates, json.loads((folder / SETTINGS).read_text()), strict=True):
        group.update(stored)
        if isinstance(rate, torch.Tensor):
            group["lr"] = rate.fill_(stored["lr"])


def _states(model: nn.Module, optimizer: torch.optim.Optimizer) -> dict[str, torch.Tensor]:
    """An optimizer's tensors, by the names of their parameters and their own."""
    named = {parameter: name for name, parameter in trained(model).items()}
    return {f"{named[parameter]}/{key}": value for parameter, states in optimizer.state.items() for key, value in states.items()
            if value is not None}  # fmt: skip
