"""A transformers model whose sparse weights are stored as a bit a weight and the values that are not zero.

This file and `modeling_pruned.py` lie beside the weights, and `trust_remote_code=True` runs them; the model that comes out is
the ordinary, dense one. `BitmaskLlamaForCausalLM` is `LlamaForCausalLM` that unpacks its files, and so for every class of
transformers. Instead of a weight `x` (out, in) `model.safetensors` holds

    x.bitmask   uint8, (ceil(out * in / 8),)   weights row by row, eight to a byte, the first in the lowest place; 1: stored
    x.values    the weights' dtype, (n,)       those that are stored, in that order

and config.json its shape, under `bitmask_weights`. What is not stored has no bit set, so that even a negative zero comes back.
"""

from pathlib import Path

import torch
from safetensors.torch import load_file
from torch.nn import functional
from transformers import AutoConfig

from .modeling_pruned import class_of_transformers, pruned_class


class Damaged(ValueError):
    """The values of a weight are not as many as its bitmask says."""


AS_INTEGERS = {2: torch.int16, 4: torch.int32}  # bytes of a number


def pack(weight: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """The bitmask and the values of a weight of any shape, 16 or 32 bits a number."""
    flat = weight.detach().flatten()
    stored = flat.view(AS_INTEGERS[flat.element_size()]) != 0
    eights = functional.pad(stored, (0, -len(stored) % 8)).view(-1, 8)
    places = torch.tensor([1, 2, 4, 8, 16, 32, 64, 128], dtype=torch.uint8, device=flat.device)
    return (eights * places).sum(1, dtype=torch.uint8), flat[stored]


def unpack(bitmask: torch.Tensor, values: torch.Tensor, shape: list[int]) -> torch.Tensor:
    """The weight that `pack` was given, bit for bit. Damaged where the three do not go together."""
    weight = values.new_zeros(torch.Size(shape))
    stored = ((bitmask[:, None] >> torch.arange(8, device=bitmask.device)) & 1).flatten()[: weight.numel()].bool()
    if len(stored) != weight.numel() or int(stored.sum()) != len(values):
        raise Damaged(f"{len(values)} values, {int(stored.sum())} in a bitmask of {len(stored)} weights, expected {shape}")
    weight.view(-1)[stored] = values
    return weight


def unpacked(tensors: dict[str, torch.Tensor], shapes: dict[str, list[int]]) -> dict[str, torch.Tensor]:
    """The tensors of a file as those of the dense model. shapes: `bitmask_weights` of its config."""
    parts = {f"{name}.{part}" for name in shapes for part in ("bitmask", "values")}
    rest = {name: tensor for name, tensor in tensors.items() if name not in parts}
    return rest | {name: unpack(tensors[f"{name}.bitmask"], tensors[f"{name}.values"], shape) for name, shape in shapes.items()}


def state_of(directory, config) -> dict[str, torch.Tensor]:
    """The dense weights of a directory in this format."""
    tensors = {}
    for path in sorted(Path(directory).glob("*.safetensors")):
        tensors |= load_file(path)
    return unpacked(tensors, config.bitmask_weights)


def bitmask_class(base):
    """The class of transformers `base`, which unpacks the weights of the directory that it is loaded from."""
    dense = pruned_class(base)

    @classmethod
    def from_pretrained(cls, directory, *args, config=None, **kwargs):
        if not Path(directory).is_dir():
            raise OSError(f"{directory}: expected a directory on this machine")
        config = config or AutoConfig.from_pretrained(directory)
        for name in ("use_safetensors", "code_revision", "adapter_kwargs"):  # of files, and there are none for the base class
            kwargs.pop(name, None)
        state = state_of(directory, config)
        if getattr(config, "pruned_linears", None):  # saved again, it takes the code of its shapes along
            dense.register_for_auto_class(next(iter(config.auto_map)))
        del config.bitmask_weights, config.auto_map
        return dense.from_pretrained(None, *args, config=config, state_dict=state, **kwargs)

    return type(base.__name__, (dense,), {"from_pretrained": from_pretrained, "__module__": __name__})


def __getattr__(name):
    return bitmask_class(class_of_transformers(name.removeprefix("Bitmask"), __name__))
