"""Perplexity followed through a training run: what is printed and kept after each epoch, and what to say of numbers and memory
that are out of bounds."""

from __future__ import annotations

import time
from contextlib import contextmanager
from pathlib import Path

import torch
from tqdm import tqdm

from common import eval_utils, generation, streaming
from common.checkpoint import load_causal_lm
from common.finetuning import Epochs
from common.runs import OUT_OF_MEMORY, Run, UserError
from common.sparse_trainer import check_sparsity, last_checkpoint, layer_sparsity
from common.train_utils import PRECISIONS

RULE = "=" * 70
ABSURD = 20  # times the dense model's perplexity


def titled(title: str) -> str:
    return f"\n{RULE}\n{title}\n{RULE}"


def change(before: float, now: float) -> str:
    """In percent of `before`, with an arrow; down is better."""
    return f"{'↓' if now <= before else '↑'}{abs(now / before - 1):.1%}"


def shown(share: float) -> str:
    """With two digits, or as many as it has, up to four that count."""
    return max(f"{share:.2f}", f"{share:.4g}", key=len)


class Perplexity:
    """Perplexity of models on one token stream, each time printed as a block of its own.

    text: how the stream is called. length, stride: of its windows (0: length). precision: of the forwards, as training has it,
    so that what is compared is alike; "bf16", of weights, is none of them.
    """

    def __init__(self, text: str, stream, length: int, stride: int, device: torch.device, precision: str):
        self.text, self.stream, self.length, self.stride, self.device = text, stream, length, stride or length, device
        self.precision = precision if precision in PRECISIONS else "32"

    def __call__(self, model, title: str, label: str, *lines: str) -> float:
        print(f"{titled(f'📊 {title}')}\n  📖 Loading {self.text} set...\n  📏 Sequence length: {len(self.stream)}")
        try:
            found = eval_utils.evaluate_perplexity(model, self.stream, self.length, self.stride, precision=self.precision,
                                                   progress="  🧮 Computing perplexity")["perplexity"]  # fmt: skip
        except RuntimeError as error:
            if not OUT_OF_MEMORY.search(str(error)):
                raise
            raise UserError(f"out of memory while perplexity is measured with windows of {self.length} tokens. Use a shorter "
                            "--token_length (with --resume never, where a run has begun with this one)") from None  # fmt: skip
        print("\n".join([f"  ✅ {label}: {found:.2f}", *(f"  {line}" for line in lines), RULE]), flush=True)
        return found

    def of(self, directory: Path, *shown: str) -> float:
        return self(load_causal_lm(directory, eval_utils.scoring_dtype(self.device)).to(self.device), *shown)


class Following(Epochs):
    """Epochs that prints and keeps, at the end of each, mean loss, memory, and what `measure` finds.

    In `run.record` are `perplexity` with the `baseline`, and `student_dir`, the model that training began with. `trainer` has
    to be set before training. Under FSDP the first process measures a whole copy of the model.
    """

    def __init__(self, run: Run | None, per_epoch: int, n_epochs: int, measure: Perplexity):
        super().__init__(run, per_epoch)
        self.n_epochs, self.measure, self.trainer = n_epochs, measure, None
        self.before, self.began, self.ended = None, 0.0, 0.0

    def on_train_begin(self, args, state, control, **kwargs):
        super().on_train_begin(args, state, control, **kwargs)
        if self.run is not None:  # what a killed process did after its last checkpoint is done again
            epochs = self.run.record.get("epochs", {})
            self.run.record["epochs"] = {n: e for n, e in epochs.items() if int(n) * self.per_epoch <= state.global_step}

    def begin(self) -> None:
        """Of an epoch, or of what is left of it."""
        eval_utils.reset_peak(self.measure.device)
        self.before, self.began = eval_utils.memory_in_use(self.measure.device)[0], time.perf_counter()

    def on_step_begin(self, args, state, control, **kwargs):
        if self.before is None or state.global_step % self.per_epoch == 0:
            self.begin()

    def on_step_end(self, args, state, control, **kwargs):
        super().on_step_end(args, state, control, **kwargs)
        if state.global_step % self.per_epoch == 0 and self.measure.device.type == "cuda":
            torch.cuda.synchronize(self.measure.device)
        self.ended = time.perf_counter()

    def advice(self, args) -> str:
        found = last_checkpoint(args.output_dir)
        return (f"{f'The last good state is {found}' if found else 'No checkpoint was made before'}. Start anew with a lower "
                "--base_lr, or --precision 32 (--resume never)")  # fmt: skip

    def show(self, args, state, logs: dict) -> None:
        if "loss" in logs:
            tqdm.write(f"Step {state.global_step}: loss={logs['loss']:.4f}")
            kept = {key: float(logs[key]) for key in ("loss", "grad_norm", "learning_rate") if key in logs}
            self.run.log(state.global_step, "training", **kept)
        if "eval_loss" in logs:
            self.run.log(state.global_step, "training", validation_perplexity=logs["eval_perplexity"],
                         sparsity=logs["eval_sparsity"])  # fmt: skip

    def on_evaluate(self, args, state, control, metrics=None, **kwargs):
        epoch, whole = state.global_step // self.per_epoch, self.trainer.full_state() if self.trainer.is_sharded else None
        if self.run is None:
            return
        now, peak = eval_utils.memory_in_use(self.measure.device)
        begin, consumed, above, most = (round(b / 2**20) for b in (self.before, now - self.before, peak - self.before, peak))
        print(f"""{titled(f"✅ Epoch {epoch} Complete")}
  📊 Average Loss: {self.mean_loss(epoch - 1):.4f}
  🔢 Batches Processed: {self.per_epoch}

💾 Memory Stats:
  Memory before entering the train: {begin} MB
  Memory consumed (end-begin): {consumed} MB
  Peak Memory consumed (max-begin): {above} MB
  Total Peak Memory (max): {most} MB

🔍 Evaluating model after Epoch {epoch}...""")
        model = self.trainer.accelerator.unwrap_model(self.trainer.model, keep_torch_compile=False)
        if whole is not None:
            model = load_causal_lm(self.run.record["student_dir"], eval_utils.scoring_dtype(self.measure.device))
            model.load_state_dict(whole)
            model.to(self.measure.device)
        sparsity = metrics["eval_sparsity"]
        found = self.measure(model, f"Evaluation After Epoch {epoch}", "Perplexity", f"📈 Epoch: {epoch}/{self.n_epochs}",
                             f"🎯 Density: {1 - sparsity:.4f} (sparsity {sparsity:.4f})")  # fmt: skip
        epochs = self.run.record.setdefault("epochs", {})
        seconds, evaluating = round(self.ended - self.began, 3), round(time.perf_counter() - self.ended, 3)
        epochs[str(epoch)] = {"perplexity": found, "validation_perplexity": metrics["eval_perplexity"], "sparsity": sparsity,
                              "mean_loss": self.mean_loss(epoch - 1), "batches": self.per_epoch, "seconds": seconds,
                              "evaluation_seconds": evaluating, "memory_before": self.before, "memory_end": now,
                              "memory_peak": peak}  # fmt: skip
        self.run.log(state.global_step, "training", perplexity=found, mean_loss=epochs[str(epoch)]["mean_loss"])
        self.run.save()
        self.trainer.log({"perplexity": found})  # for what else follows the training (wandb)
        baseline = self.run.record["perplexity"]["baseline"]
        print("\n📈 Perplexity Trend:", f"  Baseline: {baseline:.2f}",
              *(f"  Epoch {n}: {e['perplexity']:.2f} ({change(baseline, e['perplexity'])})" for n, e in epochs.items()),
              f"  (evaluation: {evaluating:.1f} s, {evaluating / (seconds + evaluating):.1%} of the epoch)",
              sep="\n", flush=True)  # fmt: skip
        self.before = None


def explain(baseline: float, dense: float, start: Path, base: Path, density: float, vocabulary: int) -> str:
    """What the perplexity of a pruned model may come from that is worse than guessing, or ABSURD times the dense one's: weights
    that were not loaded, too few of them, an architecture that does not fit, each looked at. Empty where it is neither.

    start, base: directories of the pruned and the dense model. density: as asked.
    """
    if baseline < min(vocabulary, ABSURD * dense):
        return ""
    of_layers = layer_sparsity(model := load_causal_lm(start))
    measured, empty = 1 - check_sparsity(model), [name for name, share in of_layers.items() if share == 1]
    outline, missing = streaming.causal_outline(base), []
    for directory in {base, start}:
        files = streaming.tensor_files(directory)
        there = dict.fromkeys(name.removesuffix(".bitmask") for name in files)
        missing += [name for name, _ in outline.named_parameters() if streaming.stored_name(name, there) is None]
    broken = [name for name, p in model.named_parameters() if not bool(p.isfinite().all())]
    loaded, fits = not (missing or broken), dense < vocabulary
    emptied = f"asked {density:g}, measured {measured:.4f}; projections with no weight left: {len(empty)}. "
    if loaded and fits:
        emptied += (f"Pruning took the perplexity from {dense:.2f} to {baseline:.2f}: keep more weights (--sparsity), or prune "
                    "by another --prune_method")  # fmt: skip
    rows = [(loaded, "weights loaded", f"missing {len(missing)}, not finite {len(broken)} of {len(list(model.parameters()))} "
             f"tensors{': ' + ', '.join((missing + broken)[:3]) if missing or broken else ''}"),
            (not (loaded and fits), "density", emptied),
            (fits, "architecture", f"{outline.config.model_type}; the dense model's perplexity is {dense:.2f}, that of "
             f"guessing {vocabulary:,}{'' if fits else ': config, tokenizer and weights do not belong together'}")]  # fmt: skip
    return "\n".join([f"⚠️ a perplexity of {baseline:.2f} is absurd for this model. Possible causes, as checked:",
                      *(f"  {'✅' if fine else '❌'} {what}: {found}" for fine, what, found in rows)])  # fmt: skip


@contextmanager
def memory_told(follow: Following, forward: int, length: int, n_accumulated: int):
    """Inside, what does not fit in memory is a UserError with what was in use, and the accumulation that may help.

    forward: windows of `length` tokens in one, of which a step accumulates `n_accumulated`.
    """
    try:
        yield
    except RuntimeError as error:  # torch.OutOfMemoryError is one
        if not OUT_OF_MEMORY.search(str(error)):
            raise
        begin, peak = follow.before or 0, eval_utils.memory_in_use(follow.measure.device)[1]
        free = torch.cuda.mem_get_info(follow.measure.device)[1] if follow.measure.device.type == "cuda" else None
        fits = int(forward * (0.9 * free - begin) / max(1, peak - begin)) if free else forward // 2
        smaller = next((n for n in range(min(fits, forward - 1), 0, -1) if forward % n == 0), None)
        way = (f"Use --gradient_accumulation_steps {n_accumulated * forward // smaller}: forwards of {smaller}, the same batch "
               "a step and the same results" if smaller else "Lower --block_size, add --gradient_checkpointing, or start more "
               "processes with torchrun")  # fmt: skip
        raise UserError(f"out of memory with forwards of {forward} windows of {length} tokens: {begin / 2**20:,.0f} MB "
                        f"were in use before training, {peak / 2**20:,.0f} MB at the peak. {way}") from None  # fmt: skip


def summary(record: dict) -> str:
    """The end of a followed run, from its record."""
    known, epochs, best = record["perplexity"], record["epochs"], str(record["best_epoch"])
    last = max(epochs, key=int)
    return f"""{titled("📊 Final Perplexity Summary")}
  Dense: {known["dense"]:.2f}
  Baseline: {known["baseline"]:.2f}
  Final (Epoch {last}): {epochs[last]["perplexity"]:.2f}
  Best (Epoch {best}, by validation): {epochs[best]["perplexity"]:.2f}
  Total Improvement: {1 - epochs[last]["perplexity"] / known["baseline"]:+.1%}
{RULE}"""


def score_continuations(record: dict, models: dict[str, Path], tokenizer, stream, n: int, device) -> None:
    """Add generation.continuation_metrics of n continuations to each model's metrics in a run's record, once."""
    for name, directory in models.items():
        if record["metrics"][name].get("n_continuations") != n:
            model = load_causal_lm(directory, eval_utils.scoring_dtype(device)).to(device)
            record["metrics"][name] |= generation.continuation_metrics(model, tokenizer, stream, n)
