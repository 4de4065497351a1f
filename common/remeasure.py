"""A model directory, measured from what is on the disk; what script 7 has a fresh process do for each."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import torch

from common import checkpoint, data, eval_utils, runs
from common.blocks import blocks_of

CALIBRATION_BINS = 15


def remeasure(model_dir: Path, task_dir: Path, max_length: int, student: Path | None, settings: dict) -> dict[str, Any]:
    """Everything the report says of a model; runs in a process of its own."""
    from sklearn.metrics import confusion_matrix

    runs.quiet_transformers()
    torch.set_num_threads(settings["threads"])
    device = runs.resolve_device(settings["device"])
    model = checkpoint.load_classifier(model_dir).to(device)
    tokenizer = data.load_tokenizer(model_dir, model.config)
    texts, labels = data.read_texts(task_dir, "validation")
    n = max(1, round(len(texts) * settings["fraction"]))
    split = data.tokenize(texts[:n], labels[:n], tokenizer, max_length)
    timing = (settings["batch"], settings["length"], None, settings["seconds"])
    measured, logits = eval_utils.measure_classifiers({"model": model_dir}, split, device, *timing, memory=False)
    before = checkpoint.load_classifier(student) if student else None
    return measured["model"] | {
        "calibration_error": eval_utils.calibration_error(logits["model"], split.labels, CALIBRATION_BINS),
        "confusion": confusion_matrix(split.labels, logits["model"].argmax(1).numpy(),
                                      labels=range(logits["model"].shape[1])).tolist(),
        "label_names": data.label_names(task_dir),
        "layers": [block.shape for block in blocks_of(model)],
        "histograms": {name: histogram(m) for name, m in (("stored", model), ("before", before)) if m is not None},
        "bits": bits_of_layers(model_dir, model),
    }


def histogram(model) -> dict[str, list[float]]:
    """Of all attention and FFN weights, each divided by the root mean square of its matrix: density in 121 bins."""
    parts = [part.weight.detach().float() for block in blocks_of(model) for part in block.projections]
    values = torch.cat([(w / w.square().mean().sqrt().clamp_min(1e-12)).flatten() for w in parts]).cpu().numpy()
    density, edges = np.histogram(values, bins=121, range=(-4, 4), density=True)
    return {"density": density.tolist(), "edges": edges.tolist()}


def bits_of_layers(model_dir: Path, model) -> list[float]:
    """Bits that an attention or FFN weight of each layer takes on disk, scales included."""
    from safetensors import safe_open

    names, stored = {id(module): name for name, module in model.named_modules()}, {}
    for path in Path(model_dir).glob("*.safetensors"):
        with safe_open(path, "pt") as file:
            stored |= {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
    bits = []
    for block in blocks_of(model):
        prefixes = tuple(f"{names[id(part)]}.weight" for part in block.projections)
        n_bytes = sum(t.numel() * t.element_size() for name, t in stored.items() if name.startswith(prefixes))
        bits.append(8 * n_bytes / sum(part.weight.numel() for part in block.projections))
    return bits
