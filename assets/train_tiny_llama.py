"""Train the tiny causal LM that every language-model script falls back on where there is no hub: `assets/tiny_llama`.

    python assets/train_tiny_llama.py --compile --install      the model of this repository, within ninety minutes on two cores
    python assets/train_tiny_llama.py --fast                   a few steps of a smaller one, to see that everything works

A Llama of 6.6 M parameters with grouped-query attention (8 heads on 2 KV heads), RMSNorm, SwiGLU and tied embeddings, over a
byte-level BPE of 8,192 tokens that is learnt first; both from the training split of the news articles (1_prepare_data.py
--task news). AdamW, cosine to zero, several epochs: the model is converged, so that what pruning takes from it shows.

Writes out/tiny_llama/<run>/: model/ (bf16 safetensors, tokenizer, README.md as its card, training.json), run.json,
history.csv. Killed? The same command goes on. --install copies model/ to assets/tiny_llama.
"""

from __future__ import annotations

import json
import math
import shutil
import sys
import time
from pathlib import Path

import numpy as np
import torch
from torch.nn import functional
from tqdm import tqdm

REPOSITORY = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(REPOSITORY))

from common import checkpoint, corpus, eval_utils, runs, text, train_utils  # noqa: E402

PRESETS = [
    # flag, full, fast, meaning, limits
    ("num_epochs", 6.0, 0.02, "passes over the training split", (1e-6, 1000)),
    ("batch_size", 16, 4, "windows per optimizer step", (1, 10**5)),
    ("token_length", 512, 128, "tokens of a window, and the positions of the model", (8, 10**5)),
    ("hidden_size", 256, 64, "width", (16, 10**5)),
    ("intermediate_size", 768, 128, "FFN neurons of a layer", (16, 10**6)),
    ("num_layers", 6, 2, "layers", (1, 1000)),
    ("num_heads", 8, 4, "query heads of a layer", (1, 1000)),
    ("num_kv_heads", 2, 2, "KV heads of a layer", (1, 1000)),
    ("vocab_size", 8192, 1024, "tokens of the vocabulary", (300, 10**6)),
    ("learning_rate", 3e-3, 3e-3, "its peak", (0, 1)),
    ("weight_decay", 0.1, 0.1, "of AdamW, on matrices", (0, 10)),
    ("warmup", 0.05, 0.05, "share of the steps in which the learning rate rises", (0, 1)),
    ("precision", "auto", "auto", "auto: fp16 on CUDA, bf16 on CPUs that have it, else 32", train_utils.PRECISIONS),
    ("n_evaluations", 20, 2, "times that the validation split is scored, evenly", (1, 10**4)),
]
SHARED = ("data_dir", "out_dir", "source", "run_name", "resume", "save_every", "seed", "device", "compile", "dry_run")
END = "<|endoftext|>"
INSTALLED = REPOSITORY / "assets" / "tiny_llama"


def train_tokenizer(texts, vocab_size: int, directory: Path):
    """A byte-level BPE learnt from `texts`; every text of bytes comes back as it was."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
    from transformers import PreTrainedTokenizerFast

    bpe = Tokenizer(models.BPE())
    bpe.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    bpe.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(vocab_size=vocab_size, special_tokens=[END], show_progress=False,
                                  initial_alphabet=pre_tokenizers.ByteLevel.alphabet())  # fmt: skip
    bpe.train_from_iterator(texts, trainer)
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=bpe, bos_token=END, eos_token=END, pad_token=END,
                                        clean_up_tokenization_spaces=False)  # fmt: skip
    tokenizer.save_pretrained(directory)
    return tokenizer


def new_model(args, tokenizer):
    from transformers import LlamaConfig, LlamaForCausalLM

    end = tokenizer.eos_token_id
    config = LlamaConfig(vocab_size=args.vocab_size, hidden_size=args.hidden_size, intermediate_size=args.intermediate_size,
                         num_hidden_layers=args.num_layers, num_attention_heads=args.num_heads,
                         num_key_value_heads=args.num_kv_heads, max_position_embeddings=args.token_length,
                         tie_word_embeddings=True, bos_token_id=end, eos_token_id=end, pad_token_id=end)  # fmt: skip
    return LlamaForCausalLM(config)


def epoch_windows(stream: np.ndarray, length: int, seed: int, epoch: int) -> np.ndarray:
    """Starts of the windows of one epoch, shuffled: all of the stream but less than a window at either end, cut elsewhere
    each time."""
    rng = np.random.default_rng([seed, epoch])
    starts = np.arange(rng.integers(length), len(stream) - length + 1, length)
    return rng.permutation(starts)


def windows_of(stream: np.ndarray, starts: np.ndarray, length: int, device) -> torch.Tensor:
    ids = stream[starts[:, None] + np.arange(length)].astype(np.int64)  # (B, T)
    return torch.from_numpy(ids).to(device)


def learning_rate_at(step: int, total: int, args) -> float:
    """Up over the share `warmup`, then down to zero on a cosine."""
    n_warmup = max(1, round(total * args.warmup))
    if step < n_warmup:
        return args.learning_rate * (step + 1) / n_warmup
    return args.learning_rate * 0.5 * (1 + math.cos(math.pi * (step - n_warmup) / max(1, total - n_warmup)))


def mean_nll(model, ids: torch.Tensor, precision: str) -> torch.Tensor:
    """Mean loss of the tokens ids (B, T) but the first; one function, so that a compiler sees model and loss together."""
    dtype = torch.float16 if precision == "16-mixed" else torch.bfloat16
    with torch.autocast(ids.device.type, dtype, enabled=precision != "32"):
        logits = model(input_ids=ids, use_cache=False).logits  # (B, T, V)
    return functional.cross_entropy(logits[:, :-1].flatten(0, 1).float(), ids[:, 1:].flatten())


def fit(model, streams, args, run, total: int, per_epoch: int) -> None:
    """The training loop; goes on from the run's checkpoint."""
    device, step, losses = model.device, 0, []
    optimizer = torch.optim.AdamW(
        [{"params": [p for p in model.parameters() if p.ndim >= 2], "weight_decay": args.weight_decay},
         {"params": [p for p in model.parameters() if p.ndim < 2], "weight_decay": 0.0}],
        lr=args.learning_rate, betas=(0.9, 0.95), fused=device.type in ("cpu", "cuda"))  # fmt: skip
    scaler = train_utils.grad_scaler(device, args.precision)
    parts = {"model": model, "optimizer": optimizer, "scaler": scaler}
    state, warning = checkpoint.load_checkpoint(run.checkpoint_dir)
    if state:
        step, losses = state["step"], [*state["losses"].to(device)]
        checkpoint.restore_(state, parts)
        print(f"{f'warning: {warning}; ' if warning else ''}resumed at step {step:,} of {total:,}")
    run.rewind(step)
    loss_of = torch.compile(mean_nll) if args.compile else mean_nll
    looks = {round(total * (i + 1) / args.n_evaluations) for i in range(args.n_evaluations)}
    start, n_seen, starts, epoch = time.perf_counter(), 0, None, -1

    with runs.stop_requests() as stop_requested:
        for step in tqdm(range(step + 1, total + 1), "training", total, initial=step, leave=False, mininterval=1):  # noqa: B020
            model.train()
            if (step - 1) // per_epoch != epoch:
                epoch = (step - 1) // per_epoch
                starts = epoch_windows(streams["train"], args.token_length, args.seed, epoch)
            at = (step - 1) % per_epoch * args.batch_size
            ids = windows_of(streams["train"], starts[at : at + args.batch_size], args.token_length, device)
            loss = loss_of(model, ids, args.precision)
            scaler.scale(loss).backward()
            train_utils.step_(model, optimizer, scaler, learning_rate_at(step - 1, total, args))
            losses.append(loss.detach())
            n_seen += ids.numel()
            if step in looks:
                mean = train_utils.mean_loss(losses, model, step)
                rate = n_seen / (time.perf_counter() - start)
                found = eval_utils.evaluate_perplexity(model, streams["validation"], args.token_length,
                                                       precision=args.precision)["perplexity"]  # fmt: skip
                run.log(step, "training", loss=mean, validation_perplexity=found, tokens_per_second=rate)
                print(f"step {step:,}/{total:,}  loss {mean:.4f}  validation perplexity {found:.2f}  {rate:,.0f} tokens/s",
                      flush=True)  # fmt: skip
                losses, n_seen, start = [], 0, time.perf_counter()
            if step % args.save_every == 0 or step in looks or stop_requested():
                kept = torch.stack(losses) if losses else torch.empty(0)
                checkpoint.save_checkpoint(run.checkpoint_dir, parts, step=step, losses=kept)
            if stop_requested():
                raise runs.Interrupted(f"The same command goes on from step {step:,} of {total:,} ({run.dir})")


def card(record: dict) -> str:
    """The model card, from the run's record."""
    c, m, environment = record["config"], record["metrics"], record["environment"]
    minutes = sum(record["timings"].values()) / 60
    return f"""---
license: other
language: en
library_name: transformers
---
# tiny_llama

A small causal language model that stands in where no hub can be reached. It is for measuring compression methods, not for
generating text.

- shape: Llama, {m["parameters"]:,} parameters; {c["num_layers"]} layers, width {c["hidden_size"]}, {c["num_heads"]} heads on
  {c["num_kv_heads"]} KV heads, {c["intermediate_size"]} FFN neurons, {c["token_length"]} positions, tied embeddings, bf16
- tokenizer: byte-level BPE, {c["vocab_size"]:,} tokens, learnt from the same text
- data: {m["train_tokens"]:,} tokens of news articles, the training split of `1_prepare_data.py --task news`; the source states
  no licence for the articles, and none of them is in this directory
- command: `{record["command"].replace("python ", "python assets/", 1)}`,
  {m["steps"]:,} steps of {c["batch_size"]} x {c["token_length"]} tokens, {c["num_epochs"]:g} epochs
- time: {minutes:.0f} minutes, {environment["threads"]} threads, {environment["cpu"]}, {c["precision"]}
- perplexity on the test split, windows of {c["token_length"]}: {m["test_perplexity"]:.2f}; on the validation split
  {m["validation_perplexity"]:.2f}, which changed by {m["last_tenth"]:+.2%} over the last tenth of the training
- limits: news English of one year and few sources, no dialogue, no other language, {c["token_length"]} positions; it knows no
  facts and is not to be shown to anybody as an assistant

The curve of training is in `training.json`.
"""


def main(argv=None) -> None:
    parser = runs.Parser(__doc__, PRESETS, shared=SHARED)
    parser.add_argument("--install", action="store_true", help="copy the finished model to assets/tiny_llama")
    args = parser.parse_args(argv)
    if args.hidden_size % args.num_heads or args.num_heads % args.num_kv_heads:
        parser.error(f"--hidden_size {args.hidden_size}, --num_heads {args.num_heads}, --num_kv_heads {args.num_kv_heads}: "
                     "each has to divide the one before")  # fmt: skip
    runs.quiet_transformers()
    device = runs.resolve_device(args.device)
    args.device, args.precision = str(device), train_utils.resolve_precision(args.precision, device)
    news = text.prepare_text("news", args.data_dir, args.source)
    settings = {name: value for name, value in vars(args).items() if name not in (*runs.NO_RESULT, "install")}
    settings |= {"data": news.record["sha256"]}

    with runs.Run(args.out_dir, "tiny_llama", settings, args.run_name, args.resume) as run:
        print(f"tiny Llama: {run.dir}{' (finished before)' if run.finished else ''}", flush=True)
        if not run.finished:
            with run.timed("tokenizer"):
                texts = corpus.read_texts(news.path, "train")
                tokenizer = train_tokenizer(texts, args.vocab_size, run.dir / "tokenizer")
                streams = {split: text.token_stream(news.path, split, tokenizer) for split in ("train", "validation", "test")}
            per_epoch = (len(streams["train"]) // args.token_length - 1) // args.batch_size
            total = max(1, round(args.num_epochs * per_epoch))
            runs.seed_everything(args.seed)
            model = new_model(args, tokenizer).to(device)
            n = sum(p.numel() for p in model.parameters())
            print(f"{n:,} parameters, {len(streams['train']):,} training tokens, {total:,} steps of "
                  f"{args.batch_size * args.token_length:,} tokens, {args.precision}, {args.device}", flush=True)  # fmt: skip
            if args.dry_run:
                return
            with run.timed("training"):
                fit(model, streams, args, run, total, per_epoch)
            with run.timed("measuring"):
                model.to(torch.bfloat16)  # as it is stored
                checkpoint.save_model(run.model_dir, model, tokenizer)
                found = {split: eval_utils.evaluate_perplexity(model.float(), streams[split], args.token_length)["perplexity"]
                         for split in ("validation", "test")}  # fmt: skip
            looks = [value for *_, metric, value in run.history() if metric == "validation_perplexity"]
            before = looks[-1 - max(1, args.n_evaluations // 10)] if len(looks) > 1 else looks[-1]
            run.record["metrics"] = {f"{split}_perplexity": value for split, value in found.items()} | {
                "parameters": n, "steps": total, "train_tokens": len(streams["train"]),
                "last_tenth": looks[-1] / before - 1}  # fmt: skip
            runs.write_atomic(run.model_dir / "README.md", card(run.record))
            kept = {key: run.record[key] for key in ("command", "config", "metrics", "timings", "environment")}
            curve = [row for row in run.history() if row[2] != "tokens_per_second"]
            runs.write_atomic(run.model_dir / "training.json", json.dumps(kept | {"history": curve}, indent=1) + "\n")
            checkpoint.drop(run.checkpoint_dir, run.dir / "tokenizer")
    print(f"test perplexity {run.record['metrics']['test_perplexity']:.2f}\nmodel   {run.model_dir}")
    if args.install:
        shutil.copytree(run.model_dir, INSTALLED, dirs_exist_ok=True)
        print(f"installed in {INSTALLED.relative_to(REPOSITORY)}")


if __name__ == "__main__":
    runs.run_script(main)
