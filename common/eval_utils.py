"""Measuring models: predictions, accuracy, perplexity, size, work, memory and latency."""

from __future__ import annotations

import math
import multiprocessing
import statistics
import sys
import time
from collections.abc import Callable
from contextlib import contextmanager, suppress
from functools import partial
from pathlib import Path

import numpy as np
import torch
from torch.nn import functional
from torch.nn.attention import SDPBackend, sdpa_kernel
from tqdm import tqdm

from common.blocks import blocks_of, family_of
from common.checkpoint import load_classifier
from common.data import Split, in_order, inputs_of, loader, n_positions
from common.runs import UserError
from common.text import token_stream
from common.train_utils import OneDNNLinear, autocast, resolve_precision


@contextmanager
def evaluating(model, gradients: bool = False):
    """Eval mode, without gradients unless asked for; the mode is put back, whatever happens."""
    was_training = model.training
    model.eval()
    try:
        with torch.inference_mode(not gradients):
            yield model
    finally:
        model.train(was_training)


def predict(model, split: Split, device: torch.device, precision: str = "32", batch_size: int = 128,
            features: bool = False) -> torch.Tensor | tuple[torch.Tensor, torch.Tensor]:  # fmt: skip
    """Logits of every example in the order of the split: (n, n_classes) fp32 on the CPU.

    With `features`, also the last hidden state of the first token: (n, hidden).
    """
    parts, order = [], []
    with evaluating(model):
        for batch in loader(split, in_order(split.lengths, batch_size), device):
            with autocast(device, precision):
                output = model(**inputs_of(batch), output_hidden_states=features)
            tensors = (output.logits, output.hidden_states[-1][:, 0]) if features else (output.logits,)
            parts.append([tensor.float() for tensor in tensors])
            order.append(batch["index"])
    back = torch.cat(order).cpu().argsort()
    results = tuple(torch.cat(part).cpu()[back] for part in zip(*parts, strict=True))
    return results if features else results[0]


def classification_metrics(logits: torch.Tensor, labels: np.ndarray) -> dict[str, float]:
    """Accuracy and F1 (of class 1 for two classes, macro for more), with the number of examples."""
    from sklearn.metrics import accuracy_score, f1_score

    predicted = logits.argmax(1).numpy()
    average = "binary" if logits.shape[1] == 2 else "macro"
    return {
        "accuracy": float(accuracy_score(labels, predicted)),
        "f1": float(f1_score(labels, predicted, average=average, zero_division=0.0)),
        "n": len(labels),
    }


def calibration_error(logits: torch.Tensor, labels: np.ndarray, n_bins: int = 15) -> float:
    """Expected calibration error: |accuracy - confidence| in bins of equal width of confidence, weighted by their examples.

    Guo et al. 2017 (arXiv 1706.04599), eq. 3. logits: (n, C); labels: (n,).
    """
    confidence, predicted = (t.double().numpy() if t.is_floating_point() else t.numpy() for t in logits.softmax(1).max(1))
    which = np.minimum((confidence * n_bins).astype(int), n_bins - 1)
    gaps = [abs((predicted[which == b] == labels[which == b]).mean() - confidence[which == b].mean()) * (which == b).mean()
            for b in range(n_bins) if (which == b).any()]  # fmt: skip
    return float(sum(gaps))


# ----------------------------------------------------------------------------------------------------------- perplexity

PROTOCOLS = ("tokens", "wanda")
TOKENS_A_FORWARD = 4096  # of the windows of a batch
# Numbers. On one core 4096 positions of 32,000 logits took 0.59, 0.46, 0.41, 0.39 and 0.58 s with 2**20, ... 2**24 of them, by
# what its cache holds. A GPU has to be kept busy (not measured).
LOGITS_AT_ONCE = {"cpu": 2**22, "cuda": 2**26}


def evaluate_perplexity(model, tokens, token_length: int = 2048, stride: int | None = None, batch_size: int | None = None,
                        protocol: str = "tokens", precision: str = "32", progress: str | None = None) -> dict:  # fmt: skip
    """Perplexity of a causal language model on a stream of tokens: exp(nll / n_tokens), nll in nats, every token alike.

    tokens: (n,) integers, as array, memory map, list or tensor; read a window at a time. Windows begin at 0, stride,
    2 * stride, ... until one reaches the end; each has token_length tokens, the last one what is left. A window sees nothing
    before its start, so its first token is never scored; of the others those that no earlier window scored. So, with
    stride = token_length (the default): all but each window's first token, and a last window of one token scores nothing.
    stride = token_length - 1: every token but the stream's first, once; this is lm-eval's rolling log-likelihood
    (`get_rolling_token_windows` and `make_disjoint_window` with context_len 1, the first token as prefix) where the last window
    is full (it gives a shorter one more context). Smaller strides: the same tokens with more context, as in Hugging Face's
    "Perplexity of fixed-length models".

    protocol: "tokens", or "wanda" for the definition of wanda, SparseGPT and GPTQ (`eval_ppl_wikitext`): windows that do not
    overlap, those of less than token_length tokens dropped, mean over windows of their means over token_length - 1 targets.
    batch_size: windows of a forward, by default about 4096 tokens. precision: that of the forward, the model stays as it is;
    log-likelihoods are computed in fp32 or wider and added up in float64. progress: the label of a bar that counts windows.

    Returns perplexity, nll, n_tokens (scored), n_windows (that score a token), token_length, stride, protocol and tail
    ("kept" or "dropped"). UserError, before any forward, for what cannot be evaluated; and for a result that is not finite.
    """
    stride, device = token_length if stride is None else stride, model.device
    precision = resolve_precision(precision, device)
    tokens = tokens.cpu().numpy() if isinstance(tokens, torch.Tensor) else tokens
    check_perplexity(model, tokens, token_length, stride, batch_size, protocol)
    batch_size = batch_size or max(1, TOKENS_A_FORWARD // token_length)
    runs = _windows(len(tokens), token_length, stride, protocol != "wanda")
    n_windows = sum(len(starts) for starts, _, _ in runs)
    n_tokens = sum(len(starts) * (length - first) for starts, length, first in runs)
    total = torch.zeros((), dtype=torch.float64, device="cpu" if device.type == "mps" else device)  # MPS has no float64
    with (evaluating(model), autocast(device, precision), OneDNNLinear(),
          tqdm(desc=progress, total=n_windows, unit="window", disable=progress is None,
               mininterval=0.1 if sys.stderr.isatty() else 10) as bar):  # fmt: skip
        for starts, length, first in runs:
            for i in range(0, len(starts), batch_size):
                batch = starts[i : i + batch_size]
                ids = torch.from_numpy(np.stack([np.asarray(tokens[start : start + length], np.int64) for start in batch]))
                ids = ids.pin_memory() if device.type == "cuda" else ids
                losses = _token_losses(model, ids.to(device, non_blocking=True), first)
                total += losses.to(total.device).sum(dtype=torch.float64)  # stays on the device: nothing waits for it
                bar.update(len(batch))
    perplexity = float((total / n_tokens).exp())
    if not math.isfinite(perplexity):
        raise UserError(f"perplexity is {perplexity}: the mean loss of {n_tokens:,} tokens is {float(total) / n_tokens}. "
                        "The model is broken, or overflows at this --precision; try --precision 32")  # fmt: skip
    return {"perplexity": perplexity, "nll": float(total), "n_tokens": n_tokens, "n_windows": n_windows,
            "token_length": token_length, "stride": stride, "protocol": protocol,
            "tail": "dropped" if protocol == "wanda" else "kept"}  # fmt: skip


def perplexity_on(model, tokenizer, source, token_length: int = 0, stride: int = 0, protocol: str = "tokens",
                  progress: str | None = None) -> tuple[dict, dict]:  # fmt: skip
    """Perplexity of a causal LM on a prepared text's test split (where there is none: validation), and how it was measured;
    both as records keep them.

    source: what text.prepare_text gave. token_length: 0 for the model's positions, at most 2048; stride: 0 for token_length.
    """
    split = "test" if "test" in source.record["splits"] else "validation"
    stream = token_stream(source.path, split, tokenizer, "blank" if protocol == "wanda" else "eos")
    length = token_length or min(2048, n_positions(model.config) or 2048)
    found = evaluate_perplexity(model, stream, length, stride or None, protocol=protocol, progress=progress)
    how = {"text": source.record["name"], "sha256": source.record["sha256"], "split": split, "dtype": str(model.dtype),
           **{key: found[key] for key in ("token_length", "stride", "protocol", "tail")}}  # fmt: skip
    return {"perplexity": found["perplexity"], "n_tokens": found["n_tokens"]}, how


def is_measure_of(how: dict | None, source, config, token_length: int = 0, stride: int = 0) -> bool:
    """Whether how something was measured, by `perplexity_on`, is how it would be now. how: None where nothing was."""
    length = token_length or min(2048, n_positions(config) or 2048)
    asked = {"sha256": source.record["sha256"], "token_length": length, "stride": stride or length}
    return how is not None and {key: how[key] for key in asked} == asked


def scoring_dtype(device: torch.device) -> torch.dtype | None:
    """In what a model is loaded to be scored: fp32 on CPUs, so that no rounding depends on the processor, else as stored."""
    return torch.float32 if device.type == "cpu" else None


def _windows(n: int, token_length: int, stride: int, keep_tail: bool) -> list[tuple[range, int, int]]:
    """The windows of a stream of n tokens, as runs of equal ones: their starts, length, and first target that counts."""
    starts = range(0, n - token_length + 1, stride)  # of those that are full
    new = max(1, token_length - stride)  # targets before were scored by the window before
    cut = 1 if new > 1 else len(starts)
    tail = range(len(starts) * stride, n, n)  # one start, or none
    runs = [(starts[:cut], token_length, 1), (starts[cut:], token_length, new)]
    runs += [(tail, n - len(starts) * stride, new if starts else 1)] if keep_tail else []
    return [run for run in runs if run[0] and run[1] > run[2]]


def _token_losses(model, ids: torch.Tensor, first: int) -> torch.Tensor:
    """-log p of the targets ids[:, first:], given what is before them in their rows: (B * (T - first),), fp32 or wider.

    The logits of all positions are never there at once: the head takes as many positions as `LOGITS_AT_ONCE` says.
    """
    head = model.get_output_embeddings()
    chunk = max(1, LOGITS_AT_ONCE.get(ids.device.type, LOGITS_AT_ONCE["cuda"]) // model.config.vocab_size)
    states = model.base_model(input_ids=ids, use_cache=False)[0][:, first - 1 : -1].flatten(0, 1)  # (B * (T - first), hidden)
    targets, wide = ids[:, first:].flatten(), torch.promote_types(states.dtype, torch.float32)
    losses = torch.empty(len(targets), dtype=wide, device=ids.device)  # small tensors made between large ones break up the heap
    for i in range(0, len(targets), chunk):
        logits = head(states[i : i + chunk]).to(wide)  # (chunk, V)
        losses[i : i + chunk] = functional.cross_entropy(logits, targets[i : i + chunk], reduction="none")
    return losses


def check_perplexity(model, tokens, token_length: int, stride: int, batch_size: int | None, protocol: str) -> None:
    """UserError for what `evaluate_perplexity` cannot evaluate. The model may be on the meta device."""
    config, n, extremes = model.config, len(tokens), [0]
    family_of(config)  # of others it is not known whether the head alone makes the logits
    head = model.get_output_embeddings()
    if head is None or head is not getattr(model, "lm_head", None):  # heads of masked models have layers of their own
        raise UserError(f"{type(model).__name__}: perplexity needs a causal language model (as LlamaForCausalLM)")
    if protocol not in PROTOCOLS:
        raise UserError(f"protocol {protocol!r}: expected one of {', '.join(PROTOCOLS)}")
    longest = n_positions(config) or token_length
    if not 2 <= token_length <= longest:
        raise UserError(f"--token_length {token_length}: this {config.model_type} model has {n_positions(config)} positions; "
                        f"expected 2 to {longest}")  # fmt: skip
    if not 1 <= stride <= token_length or (protocol == "wanda" and stride != token_length):
        expected = token_length if protocol == "wanda" else f"1 to {token_length}"
        raise UserError(f"--stride {stride}: expected {expected} at --token_length {token_length} and protocol {protocol}")
    if batch_size is not None and batch_size < 1:
        raise UserError(f"--batch_size {batch_size}: expected 1 or more windows")
    for start in range(0, n, 2**20):
        part = np.asarray(tokens[start : start + 2**20])
        if part.ndim != 1 or part.dtype.kind not in "iu":
            raise UserError(f"tokens: expected integers in one dimension, found {part.dtype} of shape {part.shape}")
        extremes += [int(part.min()), int(part.max())]
    least = token_length if protocol == "wanda" else 2
    if n < least:
        raise UserError(f"{n} tokens: too few, expected {least} or more at protocol {protocol}. Use a longer text")
    if min(extremes) < 0 or max(extremes) >= config.vocab_size:
        wrong = min(extremes) if min(extremes) < 0 else max(extremes)
        raise UserError(f"token {wrong}: not in the vocabulary of this model (0 to {config.vocab_size - 1}). "
                        "Tokenise the text with the model's own tokenizer")  # fmt: skip


# ------------------------------------------------------------------------------------------------------- size and work


def directory_bytes(directory: Path) -> int:
    """Bytes of every file below a model directory: all that loading it needs."""
    return sum(path.stat().st_size for path in Path(directory).rglob("*") if path.is_file())


def macs_per_example(model, length: int) -> int:
    """Multiply-accumulates of one forward of one example of `length` tokens: all matrix products, attention included."""
    from torch.utils.flop_counter import FlopCounterMode

    ids = torch.ones(1, length, dtype=torch.int64, device=model.device)
    # the counter does not know the fused attention of CPUs, so attention is computed as plain products
    with evaluating(model), sdpa_kernel(SDPBackend.MATH), FlopCounterMode(display=False) as counter:
        model(input_ids=ids, attention_mask=torch.ones_like(ids))
    return counter.get_total_flops() // 2


# ---------------------------------------------------------------------------------------------------- memory and latency


def _timing_batch(batch_size: int, length: int, device: torch.device) -> dict[str, torch.Tensor]:
    ids = torch.randint(5, 100, (batch_size, length), generator=torch.Generator().manual_seed(0)).to(device)
    return {"input_ids": ids, "attention_mask": torch.ones_like(ids)}


def in_turns(calls: dict[str, Callable[[], object]], seconds: float, device: torch.device) -> dict[str, list[float]]:
    """Seconds of each run of functions that take turns, so that a drift of the machine's speed falls on all of them.

    A turn is one run that is not timed, because the others have left the caches full of theirs, and five that are; the device
    is synchronised around every run. As many turns as the slowest needs for `seconds`, at least two.
    """

    def run(call) -> float:
        if device.type == "cuda":
            torch.cuda.synchronize(device)
        start = time.perf_counter()
        call()
        if device.type == "cuda":
            torch.cuda.synchronize(device)
        return time.perf_counter() - start

    times: dict[str, list[float]] = {name: [] for name in calls}
    for call in calls.values():
        run(call)
    while any(len(t) < 10 for t in times.values()) or max(map(sum, times.values())) < seconds:
        for name, call in calls.items():
            run(call)
            times[name] += [run(call) for _ in range(5)]
    return times


def latency(models: dict[str, torch.nn.Module], batch_size: int, length: int, device: torch.device, precision: str = "32",
            seconds: float = 3.0) -> dict[str, dict[str, float]]:  # fmt: skip
    """Milliseconds of a forward (median, p95) and examples per second, for models on the same full batch.

    The models take turns (`in_turns`).
    """
    batch = _timing_batch(batch_size, length, device)

    def forward(model) -> None:
        with autocast(device, precision):
            model(**batch)

    modes = {name: model.training for name, model in models.items()}
    try:
        for model in models.values():
            model.eval()
        with torch.inference_mode():
            times = in_turns({name: partial(forward, model) for name, model in models.items()}, seconds, device)
    finally:
        for name, model in models.items():
            model.train(modes[name])
    return {
        name: {
            "latency_ms": statistics.median(t) * 1e3,
            "latency_p95_ms": float(np.quantile(t, 0.95)) * 1e3,
            "examples_per_second": batch_size / statistics.median(t),
            "runs": len(t),
        }
        for name, t in times.items()
    }


def peak_memory(model_dir: Path, batch_size: int, length: int, device: torch.device) -> int:
    """Bytes that loading a classifier directory and running a full batch adds to a fresh process, at the peak.

    On CUDA the allocator's peak; on the CPU the growth of the process's resident set.
    """
    context = multiprocessing.get_context("spawn")
    with context.Pool(1) as pool:
        return pool.apply(_peak_memory, (str(model_dir), batch_size, length, str(device), torch.get_num_threads()))


def _peak_memory(model_dir: str, batch_size: int, length: int, device_name: str, threads: int) -> int:
    from transformers.utils import logging

    logging.disable_progress_bar()
    torch.set_num_threads(threads)
    device = torch.device(device_name)
    batch = _timing_batch(batch_size, length, device)
    torch.nn.functional.linear(torch.randn(64, 64), torch.randn(64, 64))  # the math library's own buffers
    before = resident_peak()
    model = load_classifier(Path(model_dir)).to(device).eval()
    with torch.inference_mode():
        model(**batch)
    return torch.cuda.max_memory_allocated(device) if device.type == "cuda" else resident_peak() - before


def memory_in_use(device: torch.device) -> tuple[int, int]:
    """Bytes in use now, and at most since `reset_peak`: allocated on a GPU; else resident, all of the process."""
    import psutil

    if device.type == "cuda":
        return torch.cuda.memory_allocated(device), torch.cuda.max_memory_allocated(device)
    resident = psutil.Process().memory_info().rss
    return resident, max(resident, resident_peak())


def peak_of(device: str) -> int:
    """The most bytes that this process has held so far: of a GPU's memory, or of the machine's."""
    return memory_in_use(torch.device(device))[1]


def reset_peak(device: torch.device) -> None:
    """Begin a new peak of `memory_in_use`. Windows keeps that of the whole process; on macOS it is what is held now."""
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
    elif (counters := Path("/proc/self/clear_refs")).exists():
        with suppress(OSError):  # a container may forbid it
            counters.write_text("5")


def resident_peak() -> int:
    """The most bytes that this process has held in memory so far."""
    status = Path("/proc/self/status")
    if status.exists():  # getrusage would count the parent's pages in a child process
        return int(status.read_text().split("VmHWM:")[1].split()[0]) * 1024
    import psutil

    info = psutil.Process().memory_info()
    return getattr(info, "peak_wset", info.rss)


# ------------------------------------------------------------------------------------------------- classifiers, compared

OF_QUANTISERS = ("_scale", "_zero_point", "_shape")  # how compressed-tensors calls what is no weight


def measure_classifiers(model_dirs: dict[str, Path], validation: Split, device: torch.device, batch_size: int = 32,
                        length: int = 64, others: dict | None = None, seconds: float = 3.0, memory: bool = True
                        ) -> tuple[dict[str, dict[str, float]], dict[str, torch.Tensor]]:  # fmt: skip
    """Everything a table of classifiers says, for models loaded from their directories, in fp32; and their logits.

    Accuracy and F1 on `validation`, parameters (of the whole model and of its blocks), bytes of the directory, MACs an
    example of `length` tokens, latency and throughput on full batches of `batch_size` x `length`, the latency of one example,
    peak memory of a fresh process on such a batch; for all but the first, sparsity: the share of the first's block parameters
    that is gone. others: what is called as a model is and only timed, in turns with the models. seconds: of timing, each.
    memory: whether to measure peak memory.
    """
    models = {name: load_classifier(path).to(device) for name, path in model_dirs.items()}
    length = min([length, *(n_positions(model.config) or length for model in models.values())])
    timed = models | (others or {})
    times, single = (latency(timed, n, length, device, seconds=seconds) for n in (batch_size, 1))
    times = {name: values | {"single_latency_ms": single[name]["latency_ms"]} for name, values in times.items()}
    logits = {name: predict(model, validation, device) for name, model in models.items()}  # (n, n_classes) each
    measured = {
        name: {
            **classification_metrics(logits[name], validation.labels),
            "parameters": sum(p.numel() for name, p in model.named_parameters() if not name.endswith(OF_QUANTISERS)),
            "block_parameters": sum(p.numel() for b in blocks_of(model) for part in b.projections
                                    for name, p in part.named_parameters() if not name.endswith(OF_QUANTISERS)),
            "bytes": directory_bytes(model_dirs[name]),
            "macs_per_example": macs_per_example(model, length),
            **({"peak_memory": peak_memory(model_dirs[name], batch_size, length, device)} if memory else {}),
            **times[name],
        }
        for name, model in models.items()
    }
    first, *rest = measured.values()
    for values in rest:
        values["sparsity"] = 1 - values["block_parameters"] / first["block_parameters"]
    return measured | {name: times[name] for name in others or {}}, logits


# How a table shows what `measure_classifiers` returns: (key, label, text of a value, whether a ratio to the first says more).
ROWS = [
    ("perplexity", "perplexity", lambda v: f"{v:.2f}", True),
    ("bleu", "BLEU of continuations", lambda v: f"{v:.2f}", False),
    ("rouge1", "ROUGE-1", lambda v: f"{v:.4f}", False),
    ("rouge2", "ROUGE-2", lambda v: f"{v:.4f}", False),
    ("rougeL", "ROUGE-L", lambda v: f"{v:.4f}", False),
    ("accuracy", "accuracy", lambda v: f"{v:.4f}", False),
    ("f1", "F1", lambda v: f"{v:.4f}", False),
    ("sparsity_asked", "sparsity asked", lambda v: f"{v:.4f}", False),
    ("sparsity", "sparsity measured", lambda v: f"{v:.4f}", False),
    ("parameters", "parameters", lambda v: f"{v / 1e6:.2f} M", True),
    ("bits_per_weight", "bits a quantised weight", lambda v: f"{v:.2f}", False),
    ("block_parameters", "  in attention and FFN", lambda v: f"{v / 1e6:.2f} M", True),
    ("bytes", "bytes on disk", lambda v: f"{v / 1e6:.1f} MB", True),
    ("macs_per_example", "MACs an example", lambda v: f"{v / 1e6:,.0f} M", True),
    ("peak_memory", "peak memory", lambda v: f"{v / 2**20:,.0f} MiB", True),
    ("latency_ms", "latency, median", lambda v: f"{v:.1f} ms", True),
    ("latency_p95_ms", "latency, p95", lambda v: f"{v:.1f} ms", True),
    ("single_latency_ms", "latency, one example", lambda v: f"{v:.2f} ms", True),
    ("examples_per_second", "throughput", lambda v: f"{v:,.0f} /s", True),
    ("macs_of_prompt", "MACs of a prompt", lambda v: f"{v / 1e6:,.0f} M", True),
    ("cache_bytes_per_token", "cache, a token", lambda v: f"{v:,} bytes", True),
    ("prefill_ms", "prefill", lambda v: f"{v:.1f} ms", True),
    ("decode_tokens_per_second", "decoding", lambda v: f"{v:,.0f} tokens/s", True),
]


def comparison(measured: dict[str, dict[str, float]]) -> list[list[str]]:
    """Measured models as rows of a table, one model a column; every further model with its ratio to the first."""
    first, *others = measured
    rows = [["", first, *(cell for name in others for cell in (name, "ratio"))]]
    for key, label, text, as_ratio in ROWS:
        if not any(key in values for values in measured.values()):
            continue
        of_first, *values = (model.get(key) for model in measured.values())
        row = [label, "" if of_first is None else text(of_first)]
        for value in values:
            both = as_ratio and value is not None and of_first
            row += ["" if value is None else text(value), f"{value / of_first:.2f}" if both else ""]
        rows.append(row)
    return rows


def layers_left(before: list[dict[str, int]], after: list[dict[str, int]]) -> list[list[str]]:
    """What is left of each layer, as rows of a table: heads (with GQA also KV heads) and neurons."""
    kinds = [kind for kind in before[0] if kind != "kv_heads" or before[0]["kv_heads"] != before[0]["heads"]]
    pairs = enumerate(zip(before, after, strict=True))
    return [["layer", *kinds], *([i, *(f"{new[kind]}/{old[kind]}" for kind in kinds)] for i, (old, new) in pairs)]
