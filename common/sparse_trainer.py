"""Training that keeps zeros: masks that are taken once and stored small, and the `transformers.Trainer` that holds to them.

A mask is of the weights as they are when it is taken. A weight that becomes zero later is trained on like any other; one that
was zero then stays zero, whatever the optimizer does.
"""

from __future__ import annotations

import math
import re
from collections.abc import Callable
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cache, cached_property
from importlib.util import find_spec
from pathlib import Path

import torch
from torch import nn
from torch.distributed.tensor import DTensor, Shard
from torch.nn import functional
from transformers import Trainer
from transformers.trainer import SCHEDULER_NAME

from common import distill, sharding
from common.blocks import FAMILIES, blocks_of
from common.runs import UserError

BLOCKS = ((64, 64), (32, 32), (16, 16), (8, 8), (4, 4))  # sizes that are looked for, beside those that are named
AT_ONCE, AT_ONCE_ON_GPU = 2**16, 2**26  # weights whose bits are unpacked together; what fits a CPU's cache is fastest
PLACE = 20  # bytes of a block on a GPU: index, row, column
KEEPS_ZEROS = (torch.optim.AdamW, torch.optim.Adam, torch.optim.SGD)  # a weight, gradient and state of zero stay zero
WHOLE, SHARDS = "whole", "shards"  # in a checkpoint: says that nothing is missing; the pieces of FSDP
WRAPPERS = re.compile(r"(^|\.)(module|_orig_mod|_checkpoint_wrapped_module|_fsdp_wrapped_module)(?=\.)")


# ------------------------------------------------------------------------------------------------------------------ masks


@dataclass(frozen=True)
class Mask:
    """Which weights of a matrix (out, in) stay zero.

    block: rows and columns of the blocks that are zero, or None. data: of blocks their indices, counted row by row, int32;
    else one bit a weight, 1 where it is free, eight to a uint8 and the first in the lowest place. On a GPU without
    Triton, rows and columns of blocks are kept as well, int64: there, starting the kernels that find them takes longest.
    """

    shape: tuple[int, int]
    block: tuple[int, int] | None
    data: torch.Tensor

    @classmethod
    def of(cls, weight: torch.Tensor, blocks: tuple[tuple[int, int], ...] = BLOCKS) -> Mask:
        """The zeros of `weight` as it is now, as blocks of the first of these sizes that all of them are made of."""
        (rows, columns), zero = weight.shape, weight == 0
        n_zeros = int(zero.sum())
        for n, m in blocks:
            if rows % n == 0 and columns % m == 0:
                of_blocks = zero.view(rows // n, n, columns // m, m).all(3).all(1)  # (out / n, in / m)
                n_blocks = int(of_blocks.sum())
                if n_blocks * n * m == n_zeros and 32 * n_blocks <= zero.numel():  # as small as bits are, or smaller
                    return cls((rows, columns), (n, m), of_blocks.flatten().nonzero().flatten().to(torch.int32))
        return cls._packed(~zero)

    @classmethod
    def _packed(cls, free: torch.Tensor) -> Mask:
        flat = functional.pad(free.flatten(), (0, -free.numel() % 8)).view(-1, 8)
        return cls(tuple(free.shape), None, (flat * _powers(free.device)).sum(1, dtype=torch.uint8))

    @property
    def nbytes(self) -> int:
        return self.data.nbytes + (sum(place.nbytes for place in self._places) if self._keeps_places(self.data.device) else 0)

    def _keeps_places(self, device: torch.device) -> bool:
        return self.block is not None and device.type != "cpu" and not has_kernels(device)

    @cached_property
    def _places(self) -> tuple[torch.Tensor, torch.Tensor]:
        """Of each block that is zero, its row and its column among blocks."""
        width = self.shape[1] // self.block[1]
        return (self.data // width).long(), (self.data % width).long()

    def zero_(self, values: torch.Tensor) -> torch.Tensor:
        """Set what the mask says to zero in `values`, (out, in), contiguous, on the mask's device."""
        if has_kernels(values.device):
            return self._zero_by_triton_(values)
        if values.device.type != "cpu":
            return self._zero_on_gpu_(values)
        if self.block is not None:
            n, m = self.block
            width = self.shape[1] // m  # of a row, in pieces of m weights
            first = self.data // width * (n * width) + self.data % width  # the piece at the top left of each block
            pieces = first.long()[:, None] + torch.arange(n, device=values.device) * width  # (blocks, n)
            values.view(-1, m).index_fill_(0, pieces.flatten(), 0)
            return values
        flat, bits_of = values.view(-1), _bits(values.dtype)
        for start in range(0, len(flat), AT_ONCE):
            part = flat[start : start + AT_ONCE]
            packed = self.data[start // 8 : -(-(start + AT_ONCE) // 8)]
            part.mul_(functional.embedding(packed.int(), bits_of).view(-1)[: len(part)])
        return values

    def _zero_by_triton_(self, values: torch.Tensor) -> torch.Tensor:
        """`zero_` in one kernel that writes zeros alone."""
        from common import mask_kernels

        if self.block is None:
            return mask_kernels.zero_bits_(values, self.data)
        return mask_kernels.zero_blocks_(values, self.data, self.block)

    def _zero_on_gpu_(self, values: torch.Tensor) -> torch.Tensor:
        """`zero_` in few kernels: one that writes the blocks, or three that unpack the bits."""
        if self.block is not None:
            (rows, columns), (n, m) = self.shape, self.block
            by_block = values.view(rows // n, n, columns // m, m).transpose(1, 2)  # (out / n, in / m, n, m)
            by_block[self._places] = 0
            return values
        flat = values.view(-1)
        for start in range(0, len(flat), AT_ONCE_ON_GPU):
            part = flat[start : start + AT_ONCE_ON_GPU]
            bits = self.data[start // 8 : -(-(start + len(part)) // 8), None] & _powers(values.device)
            part.masked_fill_(bits.view(-1)[: len(part)] == 0, 0)
        return values

    def free(self) -> torch.Tensor:
        """True where a weight may be anything: (out, in) bool."""
        return self.zero_(torch.ones(self.shape, dtype=torch.uint8, device=self.data.device)).bool()

    def rows(self, start: int, end: int) -> Mask:
        """The mask of the rows from `start` to `end`."""
        if self.block is None or start % self.block[0] or end % self.block[0]:
            return Mask._packed(self.free()[start:end])
        n, m = self.block
        width = self.shape[1] // m
        inside = (self.data >= start // n * width) & (self.data < end // n * width)
        return Mask((end - start, self.shape[1]), self.block, self.data[inside] - start // n * width)

    def to(self, device: torch.device) -> Mask:
        if self._keeps_places(device) and 8 * PLACE * len(self.data) > math.prod(self.shape):
            return Mask._packed(self.free()).to(device)  # with rows and columns bits are smaller
        return Mask(self.shape, self.block, self.data.to(device))


@cache
def has_kernels(device: torch.device) -> bool:
    """Whether masks on a device are Triton's (`mask_kernels`): it is there and builds kernels (it needs a C compiler)."""
    if device.type != "cuda" or find_spec("triton") is None:
        return False
    from common import mask_kernels

    try:
        mask_kernels.zero_bits_(torch.ones(8, device=device), torch.zeros(1, dtype=torch.uint8, device=device))
    except Exception as error:  # of Triton, of a compiler, of a driver
        why = (str(error).strip() or "no message").splitlines()[0]
        print(f"warning: Triton builds no kernels here ({type(error).__name__}: {why}); masks take PyTorch's, which are slower")
        return False
    return True


@cache
def _powers(device: torch.device) -> torch.Tensor:
    """What each place of a byte stands for: (8,)."""
    return torch.tensor([1, 2, 4, 8, 16, 32, 64, 128], dtype=torch.uint8, device=device)


@cache
def _bits(dtype: torch.dtype) -> torch.Tensor:
    """The eight places of every byte, as numbers: (256, 8)."""
    return ((torch.arange(256)[:, None] >> torch.arange(8)) & 1).to(dtype)


def plain_name(name: str) -> str:
    """A parameter's name without what DDP, FSDP, checkpointing and torch.compile put into it."""
    return WRAPPERS.sub("", name).lstrip(".")


def prunable_weights(model: nn.Module) -> dict[str, nn.Parameter]:
    """The weights that pruning is about, by name: of the blocks' projections, in a model of an unknown family of all linear
    layers but the output head. Of a model with adapters: the weights that these are added to.
    """
    model = model.get_base_model() if hasattr(model, "get_base_model") else model
    names = {id(module): plain_name(name) for name, module in model.named_modules()}
    if getattr(getattr(model, "config", None), "model_type", None) in FAMILIES:
        linears = [linear for block in blocks_of(model) for linear in block.projections]
    else:
        head = model.get_output_embeddings() if hasattr(model, "get_output_embeddings") else None
        linears = [module for module in model.modules() if isinstance(module, nn.Linear) and module is not head]
    return {f"{names[id(linear)]}.weight": linear.weight for linear in linears}


def masks_of(model: nn.Module, blocks: tuple[tuple[int, int], ...] = BLOCKS) -> dict[str, Mask]:
    """The masks of all prunable weights that have a zero, by name. Under FSDP all processes have to call it."""
    with torch.no_grad():
        weights = {name: sharding.whole(weight) for name, weight in prunable_weights(model).items()}
        return {name: Mask.of(weight, blocks) for name, weight in weights.items() if not weight.all()}


def layer_sparsity(model: nn.Module) -> dict[str, float]:
    """The share of zeros in each prunable weight, by name. Under FSDP all processes have to call it."""
    names, zeros, sizes = [], [], []
    for name, weight in prunable_weights(model).items():
        local = sharding.local(weight).detach()
        names.append(name)
        sizes.append(weight.numel())
        zeros.append(local.numel() - local.count_nonzero())
    if not names:
        return {}
    counts = torch.stack(zeros).double().cpu()
    if any(isinstance(weight, DTensor) for weight in prunable_weights(model).values()):
        counts = counts.to(local.device)
        torch.distributed.all_reduce(counts)
    return dict(zip(names, (counts.cpu() / torch.tensor(sizes)).tolist(), strict=True))


def check_sparsity(model: nn.Module) -> float:
    """The share of zeros in all prunable weights of a model. Under FSDP all processes have to call it."""
    of_layers, sizes = layer_sparsity(model), {name: weight.numel() for name, weight in prunable_weights(model).items()}
    return sum(share * sizes[name] for name, share in of_layers.items()) / max(1, sum(sizes.values()))


def lost_zeros(model: nn.Module, masks: dict[str, Mask]) -> int:
    """How many of the weights that masks hold at zero are not zero in a model."""
    weights = prunable_weights(model)
    return sum(int(weights[name][~mask.free().to(weights[name].device)].count_nonzero()) for name, mask in masks.items())


def local_mask(mask: Mask, parameter: torch.Tensor) -> Mask:
    """The part of a mask that belongs to this process's part of a parameter, on its device."""
    local = sharding.local(parameter)
    if isinstance(parameter, DTensor):
        for dim, placement in enumerate(parameter.placements):
            if placement == Shard(0):  # as torch.chunk cuts it: all parts alike, the last ones shorter or empty
                size = -(-parameter.shape[0] // parameter.device_mesh.size(dim))
                start = min(parameter.device_mesh.get_local_rank(dim) * size, parameter.shape[0])
                mask = mask.rows(start, min(start + size, parameter.shape[0]))
            elif not placement.is_replicate():
                raise NotImplementedError(f"a weight placed as {placement}: masks know whole rows only")
    if mask.shape != tuple(local.shape):
        raise ValueError(f"a mask of {mask.shape} for a weight of {tuple(local.shape)}")
    return mask.to(local.device)


# ---------------------------------------------------------------------------------------------------------------- trainer


class SparseTrainer(Trainer):
    """A Trainer under which what is zero at the start stays zero: DDP, FSDP2, torch.compile, checkpointing, any precision.

    Gradients are masked once an optimizer step, right behind the backward, so that clipping sees no others. With an optimizer
    that leaves a weight at zero whose gradient is (KEEPS_ZEROS), that is all; behind every other one the weights are masked
    too. Masks are of the model that is given here: it has to be the pruned one, also where a run is resumed.

    masks: by name, those of `masks_of(model)` if not given. teacher: a model on the device, for distillation of its
    predictions: of the loss a share `distill_weight` is kd_loss at `temperature`, and `hidden_weight` times
    distill.states_loss, of what the blocks give, is added.
    """

    def __init__(self, *args, masks: dict[str, Mask] | None = None, teacher: nn.Module | None = None,
                 distill_weight: float = 0.5, temperature: float = 1.0, hidden_weight: float = 0.0, **kwargs):  # fmt: skip
        super().__init__(*args, **kwargs)
        self.masks = masks_of(self.model) if masks is None else masks
        self.teacher, self.distill_weight, self.hidden_weight = teacher, distill_weight, hidden_weight
        self.temperature = temperature
        self.is_sharded = self.is_distributed_loading_by_transformers = sharding.is_sharded(self.model)  # then left as it is
        self._masked: list[tuple[nn.Parameter, Mask]] | None = None

    def _place_masks(self, model: nn.Module) -> list[tuple[nn.Parameter, Mask]]:
        """Each masked parameter as this process holds it, with its part of the mask; and a hook where weights need it."""
        named = {plain_name(name): parameter for name, parameter in model.named_parameters()}
        if missing := [name for name in self.masks if name not in named]:
            raise ValueError(f"masks of weights that the model does not have: {', '.join(missing[:3])}")
        pairs = [(named[name], local_mask(mask, named[name])) for name, mask in self.masks.items()]
        optimizer = getattr(self.optimizer, "optimizer", self.optimizer)  # accelerate's wraps the real one
        if type(optimizer) not in KEEPS_ZEROS:
            optimizer.register_step_post_hook(lambda *_: self._zero_([parameter for parameter, _ in pairs]))
            return pairs
        for parameter, mask in pairs:  # momentum from elsewhere would move a weight
            for value in optimizer.state.get(parameter, {}).values():
                if isinstance(value, torch.Tensor) and value.shape == parameter.shape:
                    mask.zero_(sharding.local(value))
        return pairs

    @torch.no_grad()
    def _zero_(self, tensors: list[torch.Tensor | None]) -> None:
        for tensor, (_, mask) in zip(tensors, self._masked, strict=True):
            if tensor is not None:
                mask.zero_(sharding.local(tensor))

    def training_step(self, model, inputs, num_items_in_batch=None):
        if self._masked is None:
            self._masked = self._place_masks(model)
        loss = super().training_step(model, inputs, num_items_in_batch)
        if self.accelerator.sync_gradients:
            self._zero_([parameter.grad for parameter, _ in self._masked])
        return loss

    def compute_loss(self, model, inputs, return_outputs=False, num_items_in_batch=None):
        if self.teacher is None or not model.training:
            return super().compute_loss(model, inputs, return_outputs, num_items_in_batch)
        given = {**inputs, "output_hidden_states": self.hidden_weight > 0}
        if self.distill_weight < 1:
            loss, outputs = super().compute_loss(model, given, True, num_items_in_batch)
        else:  # no labels
            loss, outputs = 0.0, model(**{name: value for name, value in given.items() if name != "labels"})
        with torch.no_grad():
            theirs = self.teacher(input_ids=inputs["input_ids"], use_cache=False, output_hidden_states=self.hidden_weight > 0)
        logits = outputs.logits[:, :-1].flatten(0, 1), theirs.logits[:, :-1].flatten(0, 1)  # (B * (T - 1), V)
        taught = self.distill_weight * distill.token_kd_loss(*logits, self.temperature)
        if self.hidden_weight:
            states = outputs.hidden_states[1:], theirs.hidden_states[1:]
            taught += self.hidden_weight * distill.states_loss(*states, torch.ones_like(inputs["input_ids"]), of_each=True)
        if self.model_accepts_loss_kwargs and num_items_in_batch is not None:  # then nobody divides by the accumulation
            taught = taught / self.current_gradient_accumulation_steps
        loss = (1 - self.distill_weight) * loss + taught
        return (loss, outputs) if return_outputs else loss

    def evaluation_loop(self, *args, metric_key_prefix="eval", **kwargs):
        output = super().evaluation_loop(*args, metric_key_prefix=metric_key_prefix, **kwargs)
        sharding.reshard_(self.model)
        if (loss := output.metrics.get(f"{metric_key_prefix}_loss")) is not None:
            output.metrics[f"{metric_key_prefix}_perplexity"] = math.exp(min(loss, 700))
        output.metrics[f"{metric_key_prefix}_sparsity"] = check_sparsity(self.accelerator.unwrap_model(self.model))
        return output

    @contextmanager
    def _defer_fsdp_gradient_reduction(self):
        """Of the forwards that a step accumulates only the last sums gradients over the processes."""
        self.model.set_requires_gradient_sync(False)
        try:
            yield
        finally:
            self.model.set_requires_gradient_sync(True)

    # ------------------------------------------------------------------------------------------------------- checkpoints

    def _save(self, output_dir=None, state_dict=None):
        """The model alone; no tokenizer, and no pickle of the arguments, in every checkpoint."""
        folder = Path(output_dir or self.args.output_dir)
        if self.is_sharded:
            sharding.save(folder / SHARDS / "weights", sharding.trained(self.model))
        elif self.args.should_save:
            unwrapped = self.accelerator.unwrap_model(self.model, keep_torch_compile=False)
            unwrapped.save_pretrained(folder, state_dict=state_dict)

    def _save_optimizer_and_scheduler(self, output_dir):
        if not self.is_sharded:
            return super()._save_optimizer_and_scheduler(output_dir)
        sharding.save_optimizer(Path(output_dir) / SHARDS / "optimizer", self.model, self.optimizer.optimizer)
        if self.args.should_save:
            torch.save(self.lr_scheduler.state_dict(), Path(output_dir) / SCHEDULER_NAME)

    def _save_checkpoint(self, model, trial):
        """As the Trainer's, and a file that says that the checkpoint is whole: what is killed on the way has none."""
        folder = Path(self.args.output_dir) / f"checkpoint-{self.state.global_step}"
        (folder / WHOLE).unlink(missing_ok=True)
        super()._save_checkpoint(model, trial)
        self.accelerator.wait_for_everyone()
        if self.args.should_save:
            (folder / WHOLE).touch()

    def _load_from_checkpoint(self, resume_from_checkpoint, model=None):
        shards = Path(resume_from_checkpoint) / SHARDS
        if shards.is_dir() != self.is_sharded:
            was, wanted = ("with", "add it") if shards.is_dir() else ("without", "leave it out")
            raise UserError(f"{resume_from_checkpoint}: was saved {was} --fsdp: {wanted}, or start anew with --resume never")
        if not self.is_sharded:
            return super()._load_from_checkpoint(resume_from_checkpoint, model)
        sharding.load_(shards / "weights", sharding.trained(self.model))

    def _load_best_model(self):
        if not self.is_sharded:
            return super()._load_best_model()
        self._load_from_checkpoint(self.state.best_model_checkpoint)

    def _load_optimizer_and_scheduler(self, checkpoint):
        if not self.is_sharded or checkpoint is None:
            return super()._load_optimizer_and_scheduler(checkpoint)
        sharding.load_optimizer_(Path(checkpoint) / SHARDS / "optimizer", self.model, self.optimizer.optimizer)
        self.lr_scheduler.load_state_dict(torch.load(Path(checkpoint) / SCHEDULER_NAME, weights_only=True))

    def full_state(self) -> dict[str, torch.Tensor]:
        """All weights on the CPU, by plain name, on the first process (elsewhere nothing). All processes have to call it."""
        state = {}
        for name, value in self.accelerator.unwrap_model(self.model, keep_torch_compile=False).state_dict().items():
            value = sharding.whole(value)
            if self.accelerator.is_main_process:
                state[plain_name(name)] = value.cpu()
        return state


def last_checkpoint(directory: Path, drop: Callable[[Path], None] | None = None) -> Path | None:
    """The newest whole checkpoint of a SparseTrainer's output directory; broken ones are handed to `drop`."""
    found = []
    for folder in Path(directory).glob("checkpoint-*"):
        step = folder.name.removeprefix("checkpoint-")
        if step.isdigit() and (folder / WHOLE).exists():
            found.append((int(step), folder))
        elif drop is not None:
            drop(folder)
    return max(found)[1] if found else None
