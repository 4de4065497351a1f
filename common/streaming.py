"""Causal language models larger than memory: blocks come from safetensors one at a time, run, and go again.

What is held at once is one block, the embeddings, and the activations of the calibration text between two blocks (in memory,
or on disk). The blocks are called with the arguments that the model's own forward hands them.
"""

from __future__ import annotations

import ctypes
import json
import math
import os
import shutil
import sys
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

import torch
from accelerate import init_empty_weights
from safetensors import SafetensorError, safe_open
from torch import nn
from transformers import AutoConfig, AutoModelForCausalLM

from common import modeling_pruned, train_utils
from common.blocks import Block, blocks_of, family_of, layers_of
from common.checkpoint import save_tensors
from common.fetch import MODEL_FILES, matches
from common.runs import UserError, read_json, write_atomic

SHARD_BYTES = 2 * 2**30  # a model of at most so many bytes is written as one file
PORTION = 2**25  # numbers of what is no block that are copied at once


class Activations:
    """Hidden states between two blocks, one tensor a batch, on the CPU or, with `directory`, in a file there."""

    def __init__(self, directory: Path | None = None):
        self.directory, self.tensors = directory, []

    def append(self, hidden: torch.Tensor) -> None:
        self.tensors.append(self._stored(hidden, len(self.tensors)))

    def __len__(self) -> int:
        return len(self.tensors)

    def __getitem__(self, i: int) -> torch.Tensor:
        return self.tensors[i]

    def __setitem__(self, i: int, hidden: torch.Tensor) -> None:
        self.tensors[i].copy_(hidden)

    def _stored(self, hidden: torch.Tensor, i: int) -> torch.Tensor:
        if self.directory is None:
            return hidden.detach().float().cpu().clone()
        self.directory.mkdir(parents=True, exist_ok=True)
        shared = torch.from_file(str(self.directory / f"{i:05d}.bin"), shared=True, size=hidden.numel()).view(hidden.shape)
        return shared.copy_(hidden.detach())

    def drop(self) -> None:
        self.tensors = []
        if self.directory is not None:
            shutil.rmtree(self.directory, ignore_errors=True)


class StreamedLM:
    """A causal LM's directory, read block by block; its embeddings and norms are loaded, its blocks are on the meta device.

    precision: as train_utils.autocast takes it; weights are held in fp32 while they are here.
    """

    def __init__(self, directory: Path, device: torch.device, precision: str = "32"):
        self.directory, self.device, self.precision = Path(directory), device, precision
        self.model, self.files = causal_outline(directory), tensor_files(directory)
        self.model.config.use_cache = False
        self.layers, self.blocks = layers_of(self.model), blocks_of(self.model)
        names = {module: name for name, module in self.model.named_modules()}
        self.names = {linear: names[linear] for block in self.blocks for linear in block.projections}
        self.prefixes = [names[layer] + "." for layer in self.layers]
        self.arguments: list[dict[tuple, tuple]] = [{} for _ in self.layers]  # by the shape of the batch
        self.rest = [name for name, _ in self.model.named_parameters() if not name.startswith(tuple(self.prefixes))]
        self.head_loaded = False
        self._check()

    def __len__(self) -> int:
        return len(self.layers)

    def _check(self) -> None:
        """UserError where a parameter is missing, has another shape than the config says, or is in a damaged file."""
        of_files: dict[Path, list[tuple]] = {}
        for name, parameter in self.model.named_parameters():
            stored = stored_name(name, self.files)
            if stored is None:
                raise UserError(f"{self.directory}: has no tensor {name}. Expected a causal LM saved by transformers")
            of_files.setdefault(self.files[stored], []).append((stored, list(parameter.shape)))
        for path, tensors in of_files.items():
            with opened(path) as file:
                for stored, shape in tensors:
                    if (found := list(file.get_slice(stored).get_shape())) != shape:
                        raise UserError(f"{path}: {stored} is {found}, expected {shape} by config.json")

    def read(self, names: list[str]) -> dict[str, torch.Tensor]:
        """Tensors of the directory, as they are stored. Files are closed again, so that their pages do not stay mapped."""
        found = {}
        for name in names:
            stored = stored_name(name, self.files)
            with opened(self.files[stored]) as file:
                found[name] = file.get_tensor(stored).clone()
        return found

    def _load_rest(self, head: bool) -> None:
        """Embeddings, and with `head` also what follows the last block."""
        wanted = set(self.rest)
        if not head and (output := self.model.get_output_embeddings()) is not None and not self._tied():
            wanted -= {name for name, p in self.model.named_parameters() if p is output.weight}
        on_meta = [name for name in self.rest if name in wanted and self.model.get_parameter(name).is_meta]
        for name in on_meta:
            owner, _, last = name.rpartition(".")
            value = self.read([name])[name].to(self.device, torch.float32)
            setattr(self.model.get_submodule(owner), last, nn.Parameter(value, requires_grad=False))
        for name, buffer in self.model.named_buffers():
            if not name.startswith(tuple(self.prefixes)) and buffer.device != self.device:
                owner, _, last = name.rpartition(".")
                self.model.get_submodule(owner).register_buffer(last, buffer.to(self.device), persistent=False)
        self.model.tie_weights()

    def _tied(self) -> bool:
        return bool(getattr(self.model.config, "tie_word_embeddings", False))

    @contextmanager
    def loaded(self, i: int, tensors: dict[str, torch.Tensor] | None = None) -> Iterator[Block]:
        """Inside, block `i` has its weights (or `tensors`, by their full names), in fp32 on the device."""
        layer, prefix = self.layers[i], self.prefixes[i]
        names = [prefix + name for name, _ in layer.named_parameters()]
        tensors = self.read(names) if tensors is None else tensors
        try:
            values = {name.removeprefix(prefix): tensors[name].to(self.device, torch.float32) for name in names}
            layer.load_state_dict(values, assign=True, strict=False)
            del tensors, values  # else what is replaced inside would stay
            layer.requires_grad_(False).eval()
            yield self.blocks[i]
        finally:
            layer.to("meta")
            _trim()

    def release(self) -> None:
        """Let go of the embeddings and all else that was loaded. Nothing runs after that."""
        self.model.to("meta")

    def tensors(self, i: int) -> dict[str, torch.Tensor]:
        """The parameters of block `i`, which is loaded, by their full names."""
        return {self.prefixes[i] + name: parameter.data for name, parameter in self.layers[i].named_parameters()}

    def stored(self, i: int) -> dict[str, torch.dtype]:
        """How the directory stores the parameters of block `i`, by their full names."""
        found = {}
        for name, _ in self.layers[i].named_parameters():
            name = self.prefixes[i] + name
            stored = stored_name(name, self.files)
            with opened(self.files[stored]) as file:
                found[name] = file.get_slice(stored)[:0].dtype
        return found

    @contextmanager
    def _stubs(self, stub_of):
        """Blocks replaced by `stub_of(i)`, a function of their arguments, while the model's own forward runs."""
        for i, layer in enumerate(self.layers):
            layer.forward = stub_of(i)
        try:
            yield
        finally:
            for layer in self.layers:
                del layer.forward

    @torch.no_grad()
    def embed(self, samples: torch.Tensor, batch_size: int, directory: Path | None = None) -> Activations:
        """What the first block is given for samples (n, length), and for each block the arguments that come with it."""
        self._load_rest(head=False)
        hidden = Activations(directory)

        class Done(Exception):
            pass

        def stub_of(i):
            def stub(states, *args, **kwargs):
                if i == 0:
                    hidden.append(states)
                self.arguments[i][tuple(states.shape[:2])] = args, kwargs
                if i == len(self) - 1:
                    raise Done  # what follows the blocks is not needed, and perhaps not loaded
                return states

            return stub

        with self._stubs(stub_of):
            for start in range(0, len(samples), batch_size):
                with suppress(Done):
                    self.model.base_model(input_ids=samples[start : start + batch_size].to(self.device), use_cache=False)
        return hidden

    def run(self, i: int, states: torch.Tensor) -> torch.Tensor:
        """The output of block `i`, which is loaded, for hidden states (B, T, hidden) on the device."""
        args, kwargs = self.arguments[i][tuple(states.shape[:2])]
        with train_utils.autocast(self.device, self.precision):
            output = self.layers[i](states, *args, **kwargs)
        return (output[0] if isinstance(output, tuple) else output).float()

    @torch.no_grad()
    def advance(self, i: int, hidden: Activations) -> None:
        """Take all hidden states through block `i`, which is loaded."""
        for b in range(len(hidden)):
            hidden[b] = self.run(i, hidden[b].to(self.device))

    def logits(self, samples: torch.Tensor, states: torch.Tensor) -> torch.Tensor:
        """What the model makes of hidden states (B, T, hidden) behind its last block: (B, T, V) fp32."""
        if not self.head_loaded:
            self._load_rest(head=True)
            self.head_loaded = True

        def stub_of(i):
            return lambda given, *args, **kwargs: states if i == len(self) - 1 else given

        with self._stubs(stub_of), train_utils.autocast(self.device, self.precision):
            return self.model(input_ids=samples.to(self.device), use_cache=False).logits.float()


def causal_outline(directory: Path) -> nn.Module:
    """The causal LM of a directory with its parameters on the meta device and its buffers real.

    UserError for what is no causal LM of a family in common/blocks.py.
    """
    try:
        config = AutoConfig.from_pretrained(directory)
    except (OSError, ValueError, KeyError) as error:
        raise UserError(f"{directory}: no config.json of a known model ({str(error).splitlines()[0]})") from None
    family_of(config)
    architecture = (config.architectures or ["no architecture"])[0]
    if not architecture.endswith("ForCausalLM"):  # BERT's would be loadable as one, with a head made anew
        raise UserError(f"{directory}: holds {architecture}; expected a causal language model (as LlamaForCausalLM)")
    try:
        with init_empty_weights(include_buffers=False):
            model = AutoModelForCausalLM.from_config(config)
            if getattr(config, "pruned_linears", None):
                modeling_pruned.resize_(model, config)
    except ValueError:
        raise UserError(f"{directory}: {config.model_type} is not a causal language model") from None
    model.tie_weights()
    return model.eval()


def tensor_files(directory: Path) -> dict[str, Path]:
    """Which safetensors file of a model directory holds each tensor. UserError where there is none."""
    directory = Path(directory)
    index = directory / "model.safetensors.index.json"
    if index.exists():
        return {name: directory / file for name, file in read_json(index)["weight_map"].items()}
    path = directory / "model.safetensors"
    if not path.is_file():
        raise UserError(f"{directory}: no model.safetensors (pickled weights are never loaded)")
    with opened(path) as file:
        return dict.fromkeys(file.keys(), path)


def stored_name(name: str, stored: dict[str, Path]) -> str | None:
    """The name of a causal LM's parameter in its files: checkpoints of base models leave out its first part (`model.`)."""
    return next((n for n in (name, name.partition(".")[2]) if n in stored), None)


@contextmanager
def opened(path: Path):
    """A safetensors file to read from. UserError where it is missing or damaged."""
    try:
        with safe_open(path, "pt") as file:
            yield file
    except (OSError, SafetensorError) as error:
        raise UserError(f"{path}: not readable ({str(error).splitlines()[0]})") from None


def assemble(source: Path, parts: list[Path], target: Path, stages: list[dict]) -> None:
    """The model directory `target`: what `source` has besides its weights, the tensors in `parts` (files, which stay), and from
    `source` those that no part has. In one file where it is small, else a shard a part; never half of it.
    """
    beside, old = target.with_name(f".{target.name}.new"), target.with_name(f".{target.name}.old")
    if old.exists() and not target.exists():  # a process was killed between the two renames below
        os.replace(old, target)
    for leftover in (beside, old):
        shutil.rmtree(leftover, ignore_errors=True)
    beside.mkdir(parents=True)
    for file in Path(source).iterdir():
        goes = matches(file.name, (*MODEL_FILES, "modeling_pruned.py", "chat_template*"))
        if file.is_file() and goes and ".safetensors" not in file.name:
            shutil.copyfile(file, beside / file.name)
    files, done = tensor_files(source), set()
    for part in parts:
        with opened(part) as file:
            done |= {stored_name(name, files) for name in file.keys()}  # noqa: SIM118
    rest: dict[Path, list[str]] = {}  # what no part has, by its file
    for name, path in files.items():
        if name not in done:
            rest.setdefault(path, []).append(name)
    sources = [*rest.items(), *((part, None) for part in parts)]

    def tensors_of(path: Path, names: list[str] | None, file) -> dict[str, torch.Tensor]:
        return {stored_name(name, files): file.get_tensor(name) for name in names or file.keys()}

    if sum(path.stat().st_size for path in {*files.values()}) <= SHARD_BYTES:
        whole = {}
        for path, names in sources:
            with opened(path) as file:
                whole |= {name: tensor.clone() for name, tensor in tensors_of(path, names, file).items()}
        save_tensors(beside / "model.safetensors", whole)
    else:  # one at a time, and each large tensor of what is no block on its own: nothing larger than a block is held
        kept = {path: sum(other == path for other in files.values()) == len(names) for path, names in rest.items()}  # as it is
        sources = [(path, part) for path, names in sources
                   for part in (_portions(path, names) if names and not kept[path] else [names])]  # fmt: skip
        total, weights = 0, {}
        for i, (path, names) in enumerate(sources):
            shard = f"model-{i + 1:05d}-of-{len(sources):05d}.safetensors"
            with opened(path) as file:
                tensors = tensors_of(path, names, file)  # mapped, and read only when they are used
                if kept.get(path):
                    shutil.copyfile(path, beside / shard)
                else:
                    save_tensors(beside / shard, tensors)
                weights |= dict.fromkeys(tensors, shard)
                total += sum(tensor.numel() * tensor.element_size() for tensor in tensors.values())
                del tensors
        index = {"metadata": {"total_size": total}, "weight_map": weights}
        write_atomic(beside / "model.safetensors.index.json", json.dumps(index, indent=2) + "\n")
    write_atomic(beside / "compression.json", json.dumps({"stages": stages}, indent=2, default=str) + "\n")
    if target.exists():
        os.replace(target, old)
    os.replace(beside, target)
    shutil.rmtree(old, ignore_errors=True)


def _trim() -> None:
    """Give freed memory back to the system: glibc keeps what a block leaves behind, some 40 MB each at a width of 2,048."""
    if sys.platform == "linux":
        with suppress(OSError, AttributeError):  # another C library
            ctypes.CDLL("libc.so.6").malloc_trim(0)


def _portions(path: Path, names: list[str]) -> list[list[str]]:
    """Names of a file's tensors in lists of at most PORTION numbers each, or of one tensor that is larger."""
    portions, size = [[]], 0
    with opened(path) as file:
        for name in names:
            n = math.prod(file.get_slice(name).get_shape())
            if portions[-1] and size + n > PORTION:
                portions.append([])
                size = 0
            portions[-1].append(name)
            size += n
    return portions


def measured_sparsity(directory: Path, names: list[str]) -> float:
    """Fraction of zeros among the named tensors of a model directory, read one at a time. Of a bitmask (common/
    modeling_bitmask.py) it is the fraction of bits that are not set.
    """
    files, zeros, total = tensor_files(directory), 0, 0
    for name in names:
        stored = stored_name(name, files)
        if stored is None and (bits := stored_name(f"{name}.bitmask", files)):
            with opened(files[bits]) as file:
                n, kept = (file.get_slice(part).get_shape()[0] for part in (bits, bits.removesuffix("bitmask") + "values"))
            zeros, total = zeros + 8 * n - kept, total + 8 * n
            continue
        with opened(files[stored]) as file:
            tensor = file.get_tensor(stored)
            zeros, total = zeros + int((tensor == 0).sum()), total + tensor.numel()
    return zeros / total
