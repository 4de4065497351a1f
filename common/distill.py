"""Distillation: losses against a teacher, and teachers whose outputs are computed once."""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path

import torch
from torch.nn import functional


def kd_loss(logits: torch.Tensor, teacher_logits: torch.Tensor, temperature: float = 2.0) -> torch.Tensor:
    """T^2 KL(teacher || student) of softened outputs, in nats a example, computed in fp32.

    logits, teacher_logits: (B, C). Hinton et al. 2015 (arXiv 1503.02531), section 2. The mean is over examples alone
    (`batchmean`): a mean over elements would divide by C as well.
    """
    student = functional.log_softmax(logits.float() / temperature, -1)
    teacher = functional.log_softmax(teacher_logits.float() / temperature, -1)
    return functional.kl_div(student, teacher, reduction="batchmean", log_target=True) * temperature**2


def cached_logits(path: Path, key: str, compute: Callable[[], torch.Tensor]) -> torch.Tensor:
    """Logits of a teacher on a training set, (n, C) fp32: read from `path` if it holds those of `key`, else computed, kept.

    key: a fingerprint of teacher and data; a file of another key, or a damaged one, is replaced.
    """
    from safetensors import SafetensorError, safe_open
    from safetensors.torch import save_file

    try:
        with safe_open(path, "pt") as file:
            if (file.metadata() or {}).get("key") == key:
                return file.get_tensor("logits")
    except (OSError, SafetensorError):  # not there yet, or damaged: computed again below
        pass
    logits = compute()
    beside = path.with_name(f".{path.name}.{os.getpid()}")
    save_file({"logits": logits.contiguous()}, beside, metadata={"key": key})
    os.replace(beside, path)
    return logits
