"""Optimizer, learning rate, precision and early stopping: the parts of a training loop that should not differ by script."""

from __future__ import annotations

import math
import os
import shutil
from contextlib import contextmanager, nullcontext

import torch
from torch.nn import functional
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.overrides import TorchFunctionMode

from common.runs import UserError

PRECISIONS = ("auto", "32", "16-mixed", "bf16-mixed")


def cpu_has_bf16() -> bool:
    """Whether this CPU multiplies bf16 matrices in hardware (AVX512-BF16 or AMX); without it bf16 is slower than fp32."""
    return bool(torch.cpu._is_avx512_bf16_supported() or torch.cpu._is_amx_tile_supported())


def resolve_precision(precision: str, device: torch.device) -> str:
    """`auto` is fp16 with loss scaling on CUDA, bf16 on CPUs that have it, else fp32. UserError for what cannot work."""
    if precision == "auto":
        if device.type == "cuda":
            return "16-mixed"
        return "bf16-mixed" if device.type == "cpu" and cpu_has_bf16() else "32"
    if precision == "16-mixed" and device.type != "cuda":
        raise UserError(f"--precision 16-mixed: needs CUDA, the device is {device.type}. Use --precision auto")
    return precision


def nearest_precision(precision: str, device: torch.device) -> str:
    """What a device can do that is nearest to it: fp16 is for CUDA, elsewhere it is as `auto`."""
    return resolve_precision("auto" if precision == "16-mixed" and device.type != "cuda" else precision, device)


@contextmanager
def autocast(device: torch.device, precision: str):
    """The context in which forwards run; losses are computed outside of it, in fp32."""
    if precision == "32":
        yield
        return
    # On CPUs the bf16 backward of fused attention takes 15 times as long as that of plain attention (torch 2.13, batches of
    # 64 x 9 to 32 tokens), which is half of a training step. The fused forward is the faster one where nothing is trained.
    plain = device.type == "cpu" and precision == "bf16-mixed" and torch.is_grad_enabled()
    dtype = torch.float16 if precision == "16-mixed" else torch.bfloat16
    with torch.autocast(device.type, dtype), sdpa_kernel(SDPBackend.MATH) if plain else nullcontext():
        yield


class OneDNNLinear(TorchFunctionMode):
    """Inside, linear layers in fp32 on a CPU are computed by oneDNN where no gradients are; all else is as it was.

    MKL, which they go to otherwise, leaves AVX512 unused on AMD's processors: of 4096 x 256 states and 32,000 outputs oneDNN
    computes 240 GFLOP/s on one core of an EPYC, MKL 100.
    """

    def __torch_function__(self, func, types, args=(), kwargs=None):
        if func is functional.linear and not kwargs and not torch.is_grad_enabled() and torch.backends.mkldnn.is_available():
            states, weight, bias = (*args, None)[:3]
            plain = states.device.type == "cpu" and states.dtype == weight.dtype == torch.float32 and states.ndim > 1
            if plain and states.numel() and not torch.is_autocast_enabled("cpu"):
                return torch.ops.mkldnn._linear_pointwise(states, weight, bias, "none", [], "")
        return func(*args, **(kwargs or {}))


def choose_attention_(model) -> torch.device:
    """Plain matrix products on CPUs, SDPA elsewhere: SDPA's CPU kernel is the slower one on short sequences. The device.

    What is gained is in benchmarks/pruning_overhead.py. Nothing of it is saved with the model.
    """
    model.set_attn_implementation("eager" if model.device.type == "cpu" else "sdpa")
    return model.device


def check_compiler(device: torch.device, flag: str, wanted: bool = True) -> None:
    """UserError where torch.compile is wanted and cannot work: on a CPU without a C++ compiler."""
    compilers = [os.environ.get("CXX", "g++"), "g++", "clang++", "cl"]
    if wanted and device.type == "cpu" and not any(map(shutil.which, compilers)):
        raise UserError(f"{flag}: on a CPU it needs a C++ compiler, and there is none. Install g++, or leave it out")


def grad_scaler(device: torch.device, precision: str) -> torch.amp.GradScaler:
    """Loss scaling for fp16; does nothing otherwise."""
    return torch.amp.GradScaler(device.type, enabled=precision == "16-mixed")


def adamw(model, learning_rate: float, weight_decay: float, scale_factor: float = 1.0) -> torch.optim.AdamW:
    """Fused AdamW over what requires gradients; biases and norms are not decayed, nor are quantisers' scales, which learn at
    `scale_factor` times the rate.
    """
    named = [(name, p) for name, p in model.named_parameters() if p.requires_grad]
    scales, rest = ([p for name, p in named if name.endswith("scale") == of_scale] for of_scale in (True, False))
    groups = [
        {"params": [p for p in rest if p.ndim >= 2], "weight_decay": weight_decay},
        {"params": [p for p in rest if p.ndim < 2], "weight_decay": 0.0},
    ]
    groups += [{"params": scales, "weight_decay": 0.0, "factor": scale_factor}] if scales else []
    return torch.optim.AdamW(groups, lr=learning_rate, fused=rest[0].device.type in ("cpu", "cuda"))


def linear_schedule(step: int, total: int, warmup: float) -> float:
    """Factor of the peak learning rate at `step` of `total`: up over the first share `warmup`, then down to zero."""
    n_warmup = max(1, round(total * warmup))
    if step < n_warmup:
        return (step + 1) / n_warmup
    return max(0.0, (total - step) / max(1, total - n_warmup))


def step_(model, optimizer: torch.optim.Optimizer, scaler: torch.amp.GradScaler, learning_rate: float) -> None:
    """One optimizer step at `learning_rate` on gradients clipped to a norm of one, which are gone afterwards."""
    scaler.unscale_(optimizer)
    torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
    for group in optimizer.param_groups:
        group["lr"] = learning_rate * group.get("factor", 1.0)
    scaler.step(optimizer)
    scaler.update()
    optimizer.zero_grad(set_to_none=True)


def mean_loss(losses: list[torch.Tensor], model, step: int) -> float:
    """Mean of the losses up to `step`. UserError when it or a weight is not finite: call it before the model is kept."""
    mean = float(torch.stack(losses).mean())
    if not math.isfinite(mean) or not all(parameter.isfinite().all() for parameter in model.parameters()):
        what = "a weight" if math.isfinite(mean) else "the loss"  # a gradient can overflow where the loss does not
        raise UserError(f"{what} is not finite any more before step {step + 1:,}. The last checkpoint is intact; start anew "
                        "with a lower --learning_rate or --precision 32")  # fmt: skip
    return mean


def check_finite(losses: torch.Tensor, scaler: torch.amp.GradScaler, step: int) -> None:
    """UserError where a loss is not finite; under loss scaling, where no scale is small enough for fp16. It overflows now and
    then: the scaler skips such steps and halves its factor."""
    if scaler.is_enabled():
        trouble = "fp16 overflows in every step, however small the loss is scaled," if scaler.get_scale() < 1 else ""
    else:
        trouble = "" if losses.isfinite().all() else "the loss or a weight is not finite any more"
    if trouble:
        raise UserError(f"{trouble} at step {step:,}. The last checkpoint is intact; start anew with a lower --learning_rate "
                        "or --precision bf16-mixed or 32")  # fmt: skip


class EarlyStopping:
    """Says when a metric that should grow has not grown by `min_delta` for `patience` looks, and whether it is the best."""

    def __init__(self, patience: int, min_delta: float):
        self.patience, self.min_delta = patience, min_delta
        self.best, self.reference, self.bad = -float("inf"), -float("inf"), 0

    def update(self, value: float) -> bool:
        """Take a new value; True if it is the best so far."""
        if value > self.reference + self.min_delta:
            self.reference, self.bad = value, 0
        else:
            self.bad += 1
        is_best = value > self.best
        self.best = max(self.best, value)
        return is_best

    @property
    def stop(self) -> bool:
        return self.bad >= self.patience

    def state_dict(self) -> dict:
        return {"best": self.best, "reference": self.reference, "bad": self.bad}

    def load_state_dict(self, state: dict) -> None:
        self.best, self.reference, self.bad = state["best"], state["reference"], state["bad"]


def training_memory(model, batch_size: int, length: int, precision: str) -> int:
    """Bytes that a training step is expected to hold, an estimate: weights, gradients and two moments in fp32, and what a
    block keeps for its backward (about 14 tensors of the width, 4 of the FFN's, and the attention probabilities at worst).

    Works on a model on the meta device.
    """
    from common.blocks import blocks_of

    states = 16 * sum(p.numel() for p in model.parameters())
    tokens, kept = batch_size * length, 0
    for block in blocks_of(model):
        a = block.attention
        kept += 14 * a.o.out_features + 4 * block.ffn.n_neurons + 2 * a.n_heads * length
    return states + tokens * kept * (4 if precision == "32" else 2)
