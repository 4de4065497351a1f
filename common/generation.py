"""What a causal language model costs to run (prefill, decoding with a cache, the cache itself) and what it writes."""

from __future__ import annotations

import copy
import statistics
from functools import partial
from pathlib import Path

import numpy as np
import torch

from common.blocks import blocks_of
from common.checkpoint import load_causal_lm
from common.data import load_tokenizer, n_positions
from common.eval_utils import directory_bytes, evaluating, in_turns, macs_per_example, perplexity_on, scoring_dtype
from common.runs import UserError, require

SCORERS = ("sacrebleu", "rouge_score")  # packages of continuation_metrics
TOGETHER = 10**9  # parameters of a model that is timed in turns with the others; larger ones are in memory, and timed, alone


def cache_bytes_per_token(model, bytes_per_number: int | None = None) -> int:
    """Bytes that the keys and values of one token take in the caches of all layers; by default in the model's own dtype."""
    width = bytes_per_number or model.dtype.itemsize
    return sum(2 * block.attention.k.out_features * width for block in blocks_of(model))


def speeds(models: dict[str, torch.nn.Module], prompt: int, new: int, seconds: float = 3.0) -> dict[str, dict[str, float]]:
    """Prefill and decoding of one sequence by models that take turns (eval_utils.in_turns), on their device and in their dtype.

    prefill_ms: median milliseconds of a forward of `prompt` tokens that fills a cache. decode_tokens_per_second: greedy tokens
    behind that prompt, one a forward, `new` of them, by the median.
    """
    device = next(iter(models.values())).device
    ids = torch.randint(5, 100, (1, prompt), generator=torch.Generator().manual_seed(0)).to(device)

    def prefill(model):
        return model(input_ids=ids, use_cache=True, logits_to_keep=1)

    def decode(model, filled):
        token, cache = filled.logits[:, -1:].argmax(-1), copy.deepcopy(filled.past_key_values)  # a window's cannot be cropped
        for _ in range(new):
            token = model(input_ids=token, past_key_values=cache, use_cache=True).logits[:, -1:].argmax(-1)

    modes = {name: model.training for name, model in models.items()}
    try:
        for model in models.values():
            model.eval()
        with torch.inference_mode():
            filled = {name: prefill(model) for name, model in models.items()}
            first = in_turns({name: partial(prefill, model) for name, model in models.items()}, seconds, device)
            rest = in_turns({name: partial(decode, model, filled[name]) for name, model in models.items()}, seconds, device)
    finally:
        for name, model in models.items():
            model.train(modes[name])
    return {name: {"prefill_ms": statistics.median(first[name]) * 1e3,
                   "decode_tokens_per_second": new / statistics.median(rest[name])} for name in models}  # fmt: skip


def measure_causal_lms(directories: dict[str, Path], source, device: torch.device, token_length: int = 0, prompt: int = 128,
                       new: int = 32, seconds: float = 2.0) -> tuple[dict[str, dict[str, float]], dict]:  # fmt: skip
    """Everything a table of causal language models says, and how their perplexity was measured.

    Perplexity on a prepared text's test split (eval_utils.perplexity_on), parameters (all, and of the blocks), bytes of the
    directory, MACs of `prompt` tokens, bytes of cache a token as stored, prefill and decoding (`speeds`); for all but the first
    sparsity: the share of the first's block parameters that is gone.
    """
    measured, how, models = {}, {}, {}
    for name, directory in directories.items():
        model = load_causal_lm(directory, scoring_dtype(device)).to(device)
        prompt = min(prompt, (n_positions(model.config) or prompt + new) - new)
        tokenizer, stored = load_tokenizer(directory, model.config), getattr(model.config, "dtype", None)
        measured[name], how = perplexity_on(model, tokenizer, source, token_length, progress=f"perplexity, {name}")
        measured[name] |= {
            "parameters": sum(p.numel() for p in model.parameters()),
            "block_parameters": sum(p.numel() for b in blocks_of(model) for part in b.projections for p in part.parameters()),
            "bytes": directory_bytes(directory),
            "macs_of_prompt": macs_per_example(model, prompt),
            "cache_bytes_per_token": cache_bytes_per_token(model, getattr(stored, "itemsize", None)),
        }
        if measured[name]["parameters"] <= TOGETHER:
            models[name] = model
        else:
            measured[name] |= speeds({name: model}, prompt, new, seconds)[name]
        del model
    for name, values in (speeds(models, prompt, new, seconds) if models else {}).items():
        measured[name] |= values
    first, *rest = measured.values()
    for values in rest:
        values["sparsity"] = 1 - values["block_parameters"] / first["block_parameters"]
    return measured, how | {"prompt": prompt, "new_tokens": new}


def greedy(model, tokenizer, prompt: str, n: int = 40) -> str:
    """A prompt continued by its most likely tokens."""
    words = tokenizer(prompt, return_tensors="pt", return_token_type_ids=False).to(model.device)
    with evaluating(model):
        ids = model.generate(**words, max_new_tokens=n, do_sample=False, pad_token_id=tokenizer.eos_token_id)
    return tokenizer.decode(ids[0], skip_special_tokens=True)


def continuation_metrics(model, tokenizer, stream, n: int, prompt: int = 64, new: int = 64, batch_size: int = 16
                         ) -> dict[str, float]:  # fmt: skip
    """How near greedy continuations of a text come to how it goes on: BLEU (0 to 100, sacrebleu) and the F1 of ROUGE-1, 2 and L
    (0 to 1, rouge-score, with stemming), over `n` places, evenly spread, of a token stream.

    prompt, new: tokens that are given, and that are written. UserError where a package is missing or the text too short.
    """
    for package in SCORERS:
        require(package, "--generation_metrics")
    from rouge_score.rouge_scorer import RougeScorer
    from sacrebleu import corpus_bleu

    if len(stream) < prompt + new:
        raise UserError(f"{len(stream)} tokens: too few for a prompt of {prompt} and {new} that follow")
    starts = np.linspace(0, len(stream) - prompt - new, n).round().astype(np.int64)
    pieces = torch.from_numpy(np.stack([np.asarray(stream[start : start + prompt + new], np.int64) for start in starts]))
    written, references = [], tokenizer.batch_decode(pieces[:, prompt:], skip_special_tokens=True)
    with evaluating(model):
        for batch in pieces[:, :prompt].split(batch_size):
            ids = batch.to(model.device)
            made = model.generate(input_ids=ids, attention_mask=torch.ones_like(ids), max_new_tokens=new, min_new_tokens=new,
                                  do_sample=False, pad_token_id=tokenizer.eos_token_id)  # fmt: skip
            written += tokenizer.batch_decode(made[:, prompt:].cpu(), skip_special_tokens=True)
    kinds = ("rouge1", "rouge2", "rougeL")
    scorer = RougeScorer(kinds, use_stemmer=True)
    scores = [scorer.score(reference, text) for reference, text in zip(references, written, strict=True)]
    return {"bleu": corpus_bleu(written, [references]).score,
            **{kind: statistics.mean(score[kind].fmeasure for score in scores) for kind in kinds},
            "n_continuations": n}  # fmt: skip
