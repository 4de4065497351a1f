"""A model directory, measured from what is on the disk; what script 7 has a fresh process do for each."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import torch
from transformers import AutoTokenizer

from common import checkpoint, data, eval_utils, loading, runs, text, vae_eval
from common.blocks import blocks_of

CALIBRATION_BINS = 15


def remeasure(model_dir: Path, task_dir: Path, max_length: int, student: Path | None, settings: dict) -> dict[str, Any]:
    """Everything the report says of a classifier; runs in a process of its own."""
    from sklearn.metrics import confusion_matrix

    device = _start(settings)
    model = checkpoint.load_classifier(model_dir).to(device)
    tokenizer = data.load_tokenizer(model_dir, model.config)
    texts, labels = data.read_texts(task_dir, "validation")
    n = max(1, round(len(texts) * settings["fraction"]))
    split = data.tokenize(texts[:n], labels[:n], tokenizer, max_length)
    timing = (settings["batch"], settings["length"], None, settings["seconds"])
    measured, logits = eval_utils.measure_classifiers({"model": model_dir}, split, device, *timing, memory=False)
    return measured["model"] | {
        "calibration_error": eval_utils.calibration_error(logits["model"], split.labels, CALIBRATION_BINS),
        "confusion": confusion_matrix(split.labels, logits["model"].argmax(1).numpy(),
                                      labels=range(logits["model"].shape[1])).tolist(),
        "label_names": data.label_names(task_dir),
    } | of_weights(model_dir, model, checkpoint.load_classifier(student) if student else None)


def remeasure_lm(model_dir: Path, text_dir: Path | None, how: dict | None, dense: Path | None,
                 settings: dict) -> dict[str, Any]:  # fmt: skip
    """Everything the report says of a causal LM; runs in a process of its own. how: a record's `evaluation`, if it has one."""
    device = _start(settings)
    model = checkpoint.load_causal_lm(model_dir, eval_utils.scoring_dtype(device)).to(device)
    length = min(settings["length"], data.n_positions(model.config) or settings["length"])
    timed, single = (eval_utils.latency({"model": model}, n, length, device, seconds=settings["seconds"])["model"]
                     for n in (settings["batch"], 1))  # fmt: skip
    measured = timed | {
        "parameters": sum(p.numel() for p in model.parameters()),
        "bytes": eval_utils.directory_bytes(model_dir),
        "macs_per_example": eval_utils.macs_per_example(model, length),
        "single_latency_ms": single["latency_ms"],
    }
    if how:
        tokenizer = data.load_tokenizer(model_dir, model.config)
        stream = text.token_stream(text_dir, how["split"], tokenizer, "blank" if how["protocol"] == "wanda" else "eos")
        stream = stream[: max(how["token_length"], round(len(stream) * settings["fraction"]))]
        found = eval_utils.evaluate_perplexity(model, stream, how["token_length"], how["stride"], protocol=how["protocol"])
        measured |= {"perplexity": found["perplexity"], "n": found["n_tokens"]}
    return measured | of_weights(model_dir, model, checkpoint.load_causal_lm(dense) if dense else None)


def remeasure_vae(model_dir: Path, text_dir: Path, config: dict, settings: dict) -> dict[str, Any]:
    """What the report says of a text VAE, judged as its run was, whose record has `config`; runs in a process of its own."""
    from train_optimized import TextVAE  # the model is that script's own

    device = _start(settings)
    model = checkpoint.load_own(model_dir, TextVAE).to(device)
    tokenizer = AutoTokenizer.from_pretrained(model_dir)
    *_, judged = loading.splits(text_dir, tokenizer, config["max_sequence_length"], config["seed"], config["n_evaluated"])
    judged = judged.subset(np.arange(max(1, round(len(judged) * settings["fraction"]))))
    found = vae_eval.evaluate(model, judged, str(device), config["iw_samples"], config["seed"])
    return {key: found[key] for key in ("negative_elbo", "n", "parameters")} | {"bytes": eval_utils.directory_bytes(model_dir)}


def _start(settings: dict) -> torch.device:
    runs.quiet_transformers()
    torch.set_num_threads(settings["threads"])
    return runs.resolve_device(settings["device"])


def of_weights(model_dir: Path, model, before) -> dict[str, Any]:
    """Shapes, zeros, bits and histograms of a model's projections; `before` is the model that it was made from, if known."""
    blocks, names = blocks_of(model), {module: name for name, module in model.named_modules()}
    zeros = [[float((part.weight == 0).float().mean()) for part in block.projections] for block in blocks]
    return {
        "layers": [block.shape for block in blocks],
        "zeros": zeros,
        "projections": [names[part].rpartition(".")[2] for part in blocks[0].projections],
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
