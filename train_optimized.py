"""A variational autoencoder of texts, trained fast, and watched for the collapse of its posterior.

    python train_optimized.py --fast                        a small real run on movie reviews: minutes on two cores
    python train_optimized.py --fast_detection              the guide's recommended configuration
    python train_optimized.py --fast --baseline             nothing optimised, to compare with

Model: a bidirectional Transformer encoder, the mean of its states gives a Gaussian posterior (arXiv 1312.6114); a causal
decoder, to whose states z is added before every layer, by a matrix of the layer's own. The objective is reconstruction + beta x
KL in nats a text. Against collapse: a beta that rises (--kl_annealing), --free_bits, --word_dropout, an encoder trained ahead
of the decoder (--aggressive, arXiv 1901.05534). Fast: texts tokenised once, batches of like lengths, mixed precision.

Reads texts (reviews, news, or a path; prepares what is missing). Writes out/vae/<run>/: model/, weights/, texts/, dashboards/,
posterior.csv, run.json, history.csv. Killed? The same command goes on. The manual: docs/train_optimized.md.
"""

from __future__ import annotations

import math
import os
import sys
import time
from contextlib import nullcontext
from pathlib import Path

import numpy as np
import torch
from torch import nn
from torch.nn import functional
from tqdm import tqdm
from transformers import AutoConfig

from common import assets, checkpoint, data, eval_utils, loading, posterior, processes, runs, train_utils, vae_eval
from common.loading import Documents
from common.runs import Run, UserError, table
from common.train_utils import linear_schedule

PRESETS = [
    # flag, full, fast, meaning, limits
    ("data", "reviews", "reviews", "texts: reviews, news, or the path of Parquet, CSV, TSV, JSONL or plain text"),
    ("num_epochs", 10, 2, "passes over the training texts", (1, 10**4)),
    ("batch_size", 4, 4, "texts a forward and process", (1, 10**5)),
    ("gradient_accumulation_steps", 2, 2, "forwards an optimizer step and process", (1, 10**5)),
    ("devices", 1, 1, "processes, each with a GPU if there are GPUs; started by the script itself", (1, 1024)),
    ("num_workers", 8, 8, "processes that load data; lowered to the cores that there are", (0, 1024)),
    ("pin_memory", True, True, "batches go to a GPU through pinned memory"),
    ("max_sequence_length", 1000, 1000, "tokens that a text is cut to", (1, 10**5)),
    ("use_dynamic_padding", True, True, "batches of like lengths, padded to their longest; off: random, padded to the limit"),
    ("precision", "16-mixed", "16-mixed", "fp16 is for CUDA; else bf16 where a CPU has it, or 32", train_utils.PRECISIONS),
    ("compile_model", False, False, "torch.compile the training forward"),
    ("val_check_interval", 0.1, 0.1, "share of an epoch between two validations", (1e-6, 1)),
    ("limit_val_batches", 0.1, 0.1, "share of the selection texts that a validation looks at", (1e-6, 1)),
    ("save_top_k", 2, 2, "best checkpoints that are kept, beside the last", (1, 100)),
    ("fast_detection", False, False, "look at the posterior less often, and say only what changes"),
    ("disable_metrics_monitoring", False, False, "do not look at the posterior while training"),
    ("update_frequency", 50, 50, "steps between two looks at the posterior", (1, 10**9)),
    ("plot_frequency", 500, 500, "steps between two dashboards", (1, 10**9)),
    ("window_size", 100, 100, "looks that trends and dashboards go back", (2, 10**6)),
    ("on_collapse", "warn", "warn", "what a collapsed posterior does to the training", ("warn", "stop")),
    ("width", 256, 128, "of the states", (8, 10**5)),
    ("n_layers", 4, 2, "of the encoder, and of the decoder", (1, 1000)),
    ("n_heads", 4, 4, "of attention; divides the width", (1, 1000)),
    ("latent_dim", 32, 32, "of z", (1, 10**5)),
    ("dropout", 0.1, 0.0, "while training, of what a layer adds", (0, 0.9)),
    ("word_dropout", 0.0, 0.0, "share of the words that the decoder does not see (arXiv 1511.06349)", (0, 1)),
    ("kl_annealing", "linear", "linear", "how beta rises to 1; cyclical: four times", ("none", "linear", "cyclical")),
    ("kl_rise", 0.5, 0.5, "share of the training, or of each of the four cycles, in which it does", (1e-6, 1)),
    ("free_bits", 0.1, 0.1, "nats of a text and dimension that cost nothing (arXiv 1909.00868)", (0, 100)),
    ("aggressive", False, False, "train the encoder ahead of the decoder while mutual information rises (arXiv 1901.05534)"),
    ("learning_rate", 0.0, 0.0, "its peak; 0: 0.0005 x the root of the texts a step", (0, 1)),
    ("iw_samples", 20, 10, "samples of z that the final likelihood of a text is estimated from", (1, 10**5)),
    ("n_evaluated", 0, 256, "texts that are judged at the end; 0: all", (0, 10**9)),
]
#  what these two flags change in both columns; a flag that is given beats them
BASELINE = {"batch_size": 1, "gradient_accumulation_steps": 1, "num_workers": 2, "pin_memory": False, "precision": "32",
            "use_dynamic_padding": False, "val_check_interval": 0.05, "limit_val_batches": 0.2, "save_top_k": 3,
            "update_frequency": 20, "plot_frequency": 200}  # fmt: skip
FAST_DETECTION = {"update_frequency": 100, "plot_frequency": 1000, "window_size": 50}
SHARED = ("text_column", "data_dir", "out_dir", "run_name", "resume", "save_every", "seed", "device", "tensorboard", "dry_run")
NO_RESULT = (*runs.NO_RESULT, "data", "num_workers", "pin_memory", "on_collapse", "compile_model", "fast", "baseline", "rank")
LOG_EVERY, WARMUP, INNER, MOST_INNER = 10, 0.05, 10, 100  # INNER: steps of --aggressive that are compared


class Block(nn.Module):
    """Attention and FFN behind a norm each. With `latent_dim`, z is projected and added to all states first."""

    def __init__(self, width: int, n_heads: int, dropout: float, latent_dim: int = 0):
        super().__init__()
        self.n_heads, self.drop = n_heads, nn.Dropout(dropout)
        self.norms = nn.ModuleList([nn.LayerNorm(width), nn.LayerNorm(width)])
        self.qkv, self.out = nn.Linear(width, 3 * width), nn.Linear(width, width)
        self.ffn = nn.Sequential(nn.Linear(width, 4 * width), nn.GELU(), nn.Linear(4 * width, width))
        self.latent = nn.Linear(latent_dim, width, bias=False) if latent_dim else None

    def forward(self, states, mask=None, z=None):  # (B, T, W), (B, 1, 1, T) or None: causal, (B, D)
        if self.latent is not None:
            states = states + self.latent(z)[:, None]
        q, k, v = self.qkv(self.norms[0](states)).unflatten(2, (3, self.n_heads, -1)).permute(2, 0, 3, 1, 4)  # (B, H, T, W/H)
        mixed = functional.scaled_dot_product_attention(q, k, v, attn_mask=mask, is_causal=mask is None)
        states = states + self.drop(self.out(mixed.transpose(1, 2).flatten(2)))  # (B, T, W)
        return states + self.drop(self.ffn(self.norms[1](states)))


class TextVAE(nn.Module):
    """q(z|x): mean and log-variance from the mean of the encoder's states. p(x|z): a causal decoder whose output matrix is the
    embedding of both. Token 0 begins and ends a text; the row behind the vocabulary is a word not seen."""

    def __init__(self, vocab_size, length, width, n_layers, n_heads, latent_dim, dropout=0.0):
        super().__init__()
        self.vocab_size, self.drop = vocab_size, nn.Dropout(dropout)
        self.embedding = nn.Embedding(vocab_size + 1, width)
        self.positions = nn.Parameter(0.3 * torch.randn(length, width))
        head = nn.Sequential(nn.LayerNorm(width), nn.Linear(width, 2 * latent_dim))
        self.encoder = nn.ModuleList([*(Block(width, n_heads, dropout) for _ in range(n_layers)), head])
        self.decoder = nn.ModuleList([Block(width, n_heads, dropout, latent_dim) for _ in range(n_layers)])
        self.norm = nn.LayerNorm(width)
        nn.init.normal_(self.embedding.weight, std=width**-0.5)  # so that logits start with a variance of about one

    def embed(self, ids: torch.Tensor) -> torch.Tensor:  # (B, T) -> (B, T, W)
        return self.drop(self.embedding(ids) * self.embedding.embedding_dim**0.5 + self.positions[: ids.shape[1]])

    def encode(self, ids: torch.Tensor, lengths: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Mean and log-variance of the posterior, (B, D) each, fp32. What is behind `lengths` changes nothing."""
        real = torch.arange(ids.shape[1], device=ids.device) < lengths[:, None]  # (B, T)
        states, (*blocks, head) = self.embed(ids), self.encoder
        for block in blocks:
            states = block(states, real[:, None, None])
        pooled = (states.float() * real[..., None]).sum(1) / lengths[:, None]  # (B, W)
        with torch.autocast(ids.device.type, enabled=False):
            return head(pooled).chunk(2, 1)

    def decode(self, inputs: torch.Tensor, z: torch.Tensor) -> torch.Tensor:
        """Logits of the token behind each of the inputs: (B, T), (B, D) -> (B, T, V)."""
        states = self.embed(inputs)
        for block in self.decoder:
            states = block(states, None, z)
        return functional.linear(self.norm(states), self.embedding.weight[: self.vocab_size])

    def reconstruction(self, ids, lengths, z, dropped=None) -> torch.Tensor:
        """-log p(x|z) in nats, (B,). dropped: (B, T), words that the decoder does not see."""
        inputs = ids if dropped is None else ids.masked_fill(dropped, self.vocab_size)
        logits = self.decode(functional.pad(inputs[:, :-1], (1, 0)), z).flatten(0, 1).float()  # (B x T, V)
        nats = functional.cross_entropy(logits, ids.flatten(), reduction="none").view_as(ids)  # (B, T)
        return nats.masked_fill(torch.arange(ids.shape[1], device=ids.device) >= lengths[:, None], 0).sum(1)

    def forward(self, ids, lengths, noise, dropped=None):
        mean, log_variance = self.encode(ids, lengths)
        return self.reconstruction(ids, lengths, mean + noise * (0.5 * log_variance).exp(), dropped), mean, log_variance


def kl_weight(step: int, total: int, args) -> float:
    """beta of a step, counted from 0."""
    period = total / (4 if args.kl_annealing == "cyclical" else 1)
    return 1.0 if args.kl_annealing == "none" else min(1.0, step % period / (args.kl_rise * period))


class Steps:
    """Backwards and optimizer steps. All that is random in a batch follows from the seed and the batch's number, and gradients
    are sums over the texts of a step: they are the same whatever processes share them."""

    def __init__(self, model: TextVAE, args, mean_length: float):
        self.model, self.args, self.mean_length = model, args, mean_length
        self.forward = torch.compile(model, dynamic=True) if args.compile_model else model
        self.optimizer = train_utils.adamw(model, args.learning_rate, weight_decay=0.01)
        self.scaler = train_utils.grad_scaler(torch.device(args.device), args.precision)

    def backward(self, batch: dict, number: list[int], n_texts: int, beta: float) -> torch.Tensor:
        """Adds the gradients of a batch, a part of n_texts. Its objective, reconstruction, KL, texts, (4,), summed, in nats."""
        args, ids = self.args, batch["ids"]
        torch.manual_seed(int(np.random.SeedSequence([args.seed, *number]).generate_state(1, np.uint64)[0]))
        noise = torch.randn(len(ids), args.latent_dim, device=ids.device)
        dropped = torch.rand(ids.shape, device=ids.device) < args.word_dropout if args.word_dropout else None
        with train_utils.autocast(ids.device, args.precision):
            forward = self.forward if len(ids) == args.batch_size else self.model  # not compiled anew for a last, short batch
            nats, mean, log_variance = forward(**batch, noise=noise, dropped=dropped)
        kl = posterior.kl_per_dimension(mean, log_variance)  # (B, D)
        loss = (nats + beta * kl.clamp(min=args.free_bits).sum(1)).sum()
        self.scaler.scale(loss / (n_texts * self.mean_length)).backward()
        return torch.stack([loss, nats.sum(), kl.sum(), kl.new_tensor(len(ids))]).detach()

    def step_(self, rate: float) -> None:
        processes.sum_gradients_([p for p in self.model.parameters() if p.requires_grad])
        train_utils.step_(self.model, self.optimizer, self.scaler, rate)

    def lag_(self, texts: Documents, step: int, beta: float, rate: float) -> None:
        """Steps of the encoder alone, on random texts, until the objective falls no more (arXiv 1901.05534, algorithm 1)."""
        args, before, sums = self.args, math.inf, torch.zeros(2, device=self.args.device)
        self.model.requires_grad_(False).encoder.requires_grad_(True)
        for i in range(MOST_INNER):
            for j in range(args.rank, args.group, args.devices):
                index = np.random.default_rng([args.seed, step, i, j]).integers(len(texts), size=args.batch_size)
                batch = loading.on(args.device, texts.batch(index, args.padded))
                sums[0] += self.backward(batch, [step, i, j], args.group * args.batch_size, beta)[0]
                sums[1] += batch["lengths"].sum()
            self.step_(rate)
            if (i + 1) % INNER == 0:
                loss, tokens = processes.sum_(sums).tolist()
                if not loss / tokens < before:  # by token: else the lengths of the texts decide
                    break
                before, sums = loss / tokens, torch.zeros_like(sums)
        self.model.requires_grad_(True).encoder.requires_grad_(False)  # the step that follows is the decoder's


def fit(model: TextVAE, texts: Documents, held: vae_eval.HeldOut, args, run: Run) -> None:
    """The training loop; goes on from the run's checkpoint. Leaves best and last weights in weights/, the best in the model."""
    lead, steps, per_epoch = not args.rank, Steps(model.train(), args, texts.lengths.mean()), args.steps // args.num_epochs
    monitor = posterior.PosteriorMetricsMonitor(args.update_frequency, args.plot_frequency, args.window_size,
                                                not args.fast_detection, run.dir if lead else None, args.seed)  # fmt: skip
    parts = {"model": model, "optimizer": steps.optimizer, "scaler": steps.scaler, "monitor": monitor}
    fresh = {"step": 0, "best": [], "lagging": args.aggressive, "information": -math.inf, "sums": torch.zeros(4)}
    with processes.first(args.rank):
        state, warning = checkpoint.load_checkpoint(run.checkpoint_dir)
    step, best, lagging, information, sums = ((state or fresh)[key] for key in fresh)
    if state:
        checkpoint.restore_(state, parts)
        print(f"{f'warning: {warning}; ' if warning else ''}resumed at step {step:,} of {args.steps:,}", flush=True)
    sums = sums.to(args.device) * lead  # of loss, reconstruction, KL and texts since the last line of the history
    if lead:
        run.rewind(step)
        monitor.rewind(step)
    load = loading.Loader(texts, args.device, args.num_workers, args.pin_memory, args.padded,
                          run.record.setdefault("timings_of_training", {}))  # fmt: skip
    parent, clock, silent = os.getppid(), time.perf_counter(), None if lead else True
    with runs.stop_requests() as requested, loading.deaths_told():
        while step < args.steps:
            epoch, done = divmod(step, per_epoch)
            order = loading.epoch_order(texts.lengths, args.batch_size, args.seed, epoch, args.use_dynamic_padding)
            groups = [order[i : i + args.group] for i in range(0, len(order), args.group)][done:]  # a step each
            ahead = load([index for some in groups for index in some[args.rank :: args.devices]])
            for some in tqdm(groups, f"epoch {epoch + 1}", per_epoch, initial=done, leave=False, disable=silent):
                beta, rate = kl_weight(step, args.steps, args), args.learning_rate * linear_schedule(step, args.steps, WARMUP)
                if lagging:
                    steps.lag_(texts, step, beta, rate)
                for number in range(step * args.group + args.rank, step * args.group + len(some), args.devices):
                    sums += steps.backward(next(ahead), [number], sum(map(len, some)), beta)
                steps.step_(rate)
                step += 1
                ends, looks = step % per_epoch == 0, not args.disable_metrics_monitoring and monitor.due(step)
                validates, collapsed = ends or step % per_epoch % max(1, round(args.val_check_interval * per_epoch)) == 0, False
                if logs := looks or validates or step % LOG_EVERY == 0:
                    loss, nats, kl, n = processes.sum_(sums).tolist()
                    train_utils.check_finite(sums, steps.scaler, step)
                    sums, speed = torch.zeros_like(sums), n / (time.perf_counter() - clock)
                if logs and lead:
                    run.log(step, "training", objective=loss / n, reconstruction=nats / n, kl=kl / n, beta=beta,
                            learning_rate=rate, examples_per_second=speed)  # fmt: skip
                if looks and lead:
                    with run.timed("monitoring", "training"):
                        collapsed = held.look(monitor, model, step, nats / n) and args.on_collapse == "stop"
                if lagging and ends:
                    before, information = information, held.information(model)
                    lagging = processes.any_of(information > before, args.device)
                    model.requires_grad_(True)
                if validates:
                    with run.timed("validation", "training"):
                        found = held.negative_elbo(model)
                    print(f"step {step:,}/{args.steps:,}  objective {loss / n:.2f}  KL {kl / n:.2f}  beta {beta:.2f}  held out "
                          f"ELBO {-found['negative_elbo']:.2f}, KL {found['kl']:.2f}  {speed:,.0f} texts/s", flush=True)
                    if lead:
                        run.log(step, "validation", **found)
                        checkpoint.keep_best_(run.dir / "weights", best, args.save_top_k, found["negative_elbo"], step, model)
                collapsed = looks and processes.any_of(collapsed, args.device)
                stops = processes.any_of(requested() or processes.orphaned(parent), args.device)
                if ends or stops or collapsed or step % args.save_every == 0:
                    whole = processes.sum_(sums.clone())
                    train_utils.check_finite(sum(p.detach().sum() for p in model.parameters()), steps.scaler, step)
                    if lead:
                        checkpoint.save_checkpoint(run.checkpoint_dir, parts, step=step, best=best, lagging=lagging,
                                                   information=information, sums=whole)  # fmt: skip
                if collapsed:
                    raise UserError(f"the posterior has collapsed at step {step:,}: {monitor.rule}. {posterior.ADVICE}")
                if stops:
                    raise runs.Interrupted(f"The same command goes on from step {step:,} of {args.steps:,} ({run.dir})")
                clock = time.perf_counter() if logs else clock
    if lead:
        checkpoint.save_tensors(run.dir / "weights" / "last.safetensors", model.state_dict())
        model.load_state_dict(checkpoint.load_tensors(run.dir / "weights" / f"step-{best[0][1]:06d}.safetensors"))
        run.record |= {"best": best, "verdict": [monitor.verdict, monitor.rule], "peak_memory": eval_utils.peak_of(args.device)}


def parse(argv: list[str]):
    """The flags, resolved to what this machine can do, and a line on what was changed for that."""
    words = {word.replace("-", "_") for word in argv}
    changed = {**(BASELINE if "__baseline" in words else {}), **(FAST_DETECTION if "__fast_detection" in words else {})}
    parser = runs.Parser(__doc__, [(row[0], *(changed.get(row[0], v) for v in row[1:3]), *row[3:]) for row in PRESETS], SHARED)
    parser.add_argument("--baseline", action="store_true", help="a text a step, fp32, padded to the limit: to compare with")
    args = parser.parse_args(argv)
    if args.width % args.n_heads:
        parser.error(f"--width {args.width}: --n_heads {args.n_heads} does not divide it")
    device, asked = processes.device_of(args.device, args.devices), vars(args).copy()
    train_utils.check_compiler(device, "--compile_model", args.compile_model)
    args.device, args.rank, args.padded = str(device), 0, None if args.use_dynamic_padding else args.max_sequence_length
    args.group = args.gradient_accumulation_steps * args.devices  # batches of a step
    args.learning_rate = args.learning_rate or 5e-4 * math.sqrt(args.batch_size * args.group)
    args.num_workers = min(args.num_workers, max(1, processes.cores() // args.devices))
    args.precision = train_utils.nearest_precision(args.precision, device)
    args.pin_memory = args.pin_memory and device.type == "cuda"
    return args, [f"--{flag} {asked[flag]} -> {getattr(args, flag)}, as this machine has it" for flag in
                  ("num_workers", "precision", "pin_memory") if asked[flag] != getattr(args, flag)]  # fmt: skip


def main(argv=None) -> None:
    argv = sys.argv[1:] if argv is None else [str(word) for word in argv]
    args, lowered = parse(argv)
    runs.quiet_transformers()
    source = loading.prepare(args.data, args.data_dir, args.text_column)
    tokenizer = data.load_tokenizer(assets.TINY_LLAMA, AutoConfig.from_pretrained(assets.TINY_LLAMA))
    texts, selection, judged = loading.splits(source.path, tokenizer, args.max_sequence_length, args.seed, args.n_evaluated)
    args.steps = args.num_epochs * -(-len(texts) // (args.batch_size * args.group))
    args.assets = [{key: source.record[key] for key in ("name", "source", "sha256")}]
    shape = {"vocab_size": len(tokenizer), "length": args.max_sequence_length}
    shape |= {key: getattr(args, key) for key in ("width", "n_layers", "n_heads", "latent_dim")}
    padding = loading.padding_share(texts.lengths, args.batch_size, args.padded)
    if args.devices > 1 and not processes.started() and not args.dry_run:
        return processes.launch(args.devices, __file__, argv)
    with processes.joined(torch.device(args.device), 1 if args.dry_run else args.devices) as args.rank:
        print(f"""texts    {args.data}: {len(texts):,} to train, {len(selection):,} to select, {len(judged):,} to judge
tokens   {texts.lengths.mean():.1f} a text, {texts.n_cut:,} texts cut at {args.max_sequence_length}; padding {padding:.1%}
steps    {args.steps:,} of {args.batch_size} texts x {args.gradient_accumulation_steps} forwards x {args.devices} processes
running  {args.precision}, {args.device}, {args.num_workers} processes to load{", compiled" * args.compile_model}""",
              *lowered, *source.record["notes"], sep="\nnote     ", flush=True)  # fmt: skip
        if args.dry_run:
            return
        settings = {"script": Path(__file__).name} | {key: value for key, value in vars(args).items() if key not in NO_RESULT}
        run = Run(args.out_dir, "vae", settings, args.run_name, args.resume, tensorboard=args.tensorboard)
        with nullcontext() if args.rank else run:
            with processes.first(args.rank):
                done = runs.read_json(run.dir / "run.json")["status"] == "finished"
            print(f"training: {run.dir}{' (finished before; --resume never starts anew)' if done else ''}", flush=True)
            if not done:
                torch.manual_seed(args.seed)
                model = TextVAE(**shape, dropout=args.dropout).to(args.device)
                held = vae_eval.HeldOut(selection, args.device, args.precision, args.limit_val_batches, args.padded)
                with run.timed("training"):
                    fit(model, texts, held, args, run)
            if not done and not args.rank:
                with run.timed("measuring"):  # what was saved, not what is in memory
                    checkpoint.save_own(run.model_dir, model, shape, tokenizer)
                    model = checkpoint.load_own(run.model_dir, TextVAE).to(args.device)
                    vae_eval.write_texts(run.dir / "texts", model, judged, tokenizer, args.device, args.seed)
                    run.record["metrics"] = {"vae": vae_eval.evaluate(model, judged, args.device, args.iw_samples, args.seed)}
                checkpoint.drop(run.checkpoint_dir)
    if not args.rank:
        print("", table(vae_eval.rows(run.record["metrics"]["vae"])), sep="\n")
        print("\n" + "   ".join(f"{phase} {seconds:.0f} s" for phase, seconds in run.record["timings"].items()))
        print(f"\nmodel   {run.model_dir}\ntexts   {run.dir / 'texts'}\nrecord  {run.dir / 'run.json'}")


if __name__ == "__main__":
    runs.run_script(main)
