"""Distillation: losses against a teacher, and teachers whose outputs are computed once."""

from __future__ import annotations

import os
from collections.abc import Callable
from contextlib import contextmanager
from pathlib import Path

import torch
from torch.nn import functional

from common.blocks import Block

TOKENS_AT_ONCE = 256  # of token_kd_loss


def kd_loss(logits: torch.Tensor, teacher_logits: torch.Tensor, temperature: float = 2.0) -> torch.Tensor:
    """T^2 KL(teacher || student) of softened outputs, in nats a example, computed in fp32.

    logits, teacher_logits: (B, C). Hinton et al. 2015 (arXiv 1503.02531), section 2. The mean is over examples alone
    (`batchmean`): a mean over elements would divide by C as well.
    """
    student = functional.log_softmax(logits.float() / temperature, -1)
    teacher = functional.log_softmax(teacher_logits.float() / temperature, -1)
    return functional.kl_div(student, teacher, reduction="batchmean", log_target=True) * temperature**2


class _TokenKD(torch.autograd.Function):
    """`token_kd_loss`; its gradient is made in the forward, where the softmaxes are there, and stored in the logits' dtype."""

    @staticmethod
    def forward(ctx, logits, teacher_logits, temperature):
        grad, total = torch.empty_like(logits), torch.zeros((), device=logits.device)
        for i in range(0, len(logits), TOKENS_AT_ONCE):
            student = (logits[i : i + TOKENS_AT_ONCE].float() / temperature).log_softmax(-1)
            teacher = (teacher_logits[i : i + TOKENS_AT_ONCE].float() / temperature).log_softmax(-1)
            wanted = teacher.exp()
            total += (wanted * (teacher - student)).sum()
            grad[i : i + TOKENS_AT_ONCE] = student.exp_().sub_(wanted).mul_(temperature / len(logits))
        ctx.save_for_backward(grad)
        return total * (temperature**2 / len(logits))

    @staticmethod
    def backward(ctx, upstream):
        (grad,) = ctx.saved_tensors
        return grad * upstream.to(grad.dtype), None, None


def token_kd_loss(logits: torch.Tensor, teacher_logits: torch.Tensor, temperature: float = 1.0) -> torch.Tensor:
    """`kd_loss` of large vocabularies, (tokens, V): in pieces, so that nothing of that size is made in fp32."""
    return _TokenKD.apply(logits, teacher_logits, temperature)


def feature_loss(features: torch.Tensor, teacher_features: torch.Tensor, scale: torch.Tensor) -> torch.Tensor:
    """Mean squared error of the classification token's last hidden state, in units of the teacher's variance; fp32.

    features, teacher_features: (B, H); scale: the teacher's variance over the training set (`Teacher.scale`). A teacher of
    two classes says one number an example by its logits and H by these; Sun et al. 2019 (arXiv 1908.09355), eq. 8, match
    the same token.
    """
    return functional.mse_loss(features.float(), teacher_features.float()) / scale


def states_loss(states: list[torch.Tensor], teacher_states: list[torch.Tensor], mask: torch.Tensor,
                of_each: bool = False) -> torch.Tensor:  # fmt: skip
    """Mean over layers of the squared error of hidden states, in units of the teacher's mean square, padding left out; fp32.

    states, teacher_states: (B, T, H) a layer; mask: (B, T). Jiao et al. 2020 (arXiv 1909.10351), eq. 8, made scale-free.
    of_each: every example in units of its own mean square, so that the loss of a batch is the mean of its parts' losses.
    """
    real, dims = mask.unsqueeze(-1).float(), (1, 2) if of_each else (0, 1, 2)  # (B, T, 1)
    losses = []
    for ours, theirs in zip(states, teacher_states, strict=True):
        theirs = theirs.float()
        ratios = ((ours.float() - theirs).square() * real).sum(dims) / (theirs.square() * real).sum(dims)
        losses.append(ratios.mean())
    return torch.stack(losses).mean()


@contextmanager
def attention_outputs(blocks: list[Block]):
    """Inside, the list that is yielded holds what each block's output projection `o` gave in the last forward: (B, T, H)."""
    outputs: list = [None] * len(blocks)

    def note(i):
        def hook(module, args, output):
            outputs[i] = output

        return hook

    handles = [block.attention.o.register_forward_hook(note(i)) for i, block in enumerate(blocks)]
    try:
        yield outputs
    finally:
        for handle in handles:
            handle.remove()


class Teacher:
    """What a frozen teacher says of each training example, computed once: no forward of the teacher in a step.

    logits: (n, C), features: (n, H), the last hidden state of the first token; both fp32, on the training device.
    """

    def __init__(self, logits: torch.Tensor, features: torch.Tensor, device: torch.device):
        self.logits, self.features = logits.to(device), features.to(device)
        self.scale = self.features.var(0).mean() if len(features) > 1 else torch.ones((), device=device)

    @classmethod
    def cached(cls, path: Path, key: str, compute: Callable[[], tuple[torch.Tensor, torch.Tensor]], device) -> Teacher:
        """Read from `path` if it holds the outputs of `key`, else computed and kept there.

        key: a fingerprint of teacher and data; a file of another key, or a damaged one, is replaced.
        compute: returns logits and features.
        """
        from safetensors import SafetensorError, safe_open
        from safetensors.torch import save_file

        try:
            with safe_open(path, "pt") as file:
                if (file.metadata() or {}).get("key") == key:
                    return cls(file.get_tensor("logits"), file.get_tensor("features"), device)
        except (OSError, SafetensorError):  # not there yet, or damaged: computed again below
            pass
        logits, features = compute()
        beside = path.with_name(f".{path.name}.new")
        save_file({"logits": logits.contiguous(), "features": features.contiguous()}, beside, metadata={"key": key})
        os.replace(beside, path)
        return cls(logits, features, device)
