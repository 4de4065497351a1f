"""Structured pruning of a text classifier while it trains: heads and FFN neurons go, the rest is distilled and recovers.

    python 8_pruning_with_finetuning.py --fast                       a small real run, minutes on two cores
    python 8_pruning_with_finetuning.py                              the full preset
    python 8_pruning_with_finetuning.py --fast --target_sparsity 0.5 --seed 1
    python 8_pruning_with_finetuning.py --fast --num_epochs 0        prune once, without any training
    python 8_pruning_with_finetuning.py --fast --dry_run             print the plan and stop

Method: the score of a group (a head, a neuron) is what its gate does to the loss, for all groups at once and for each
example apart (Fisher: arXiv 2204.09656; here also the curvature of the distillation loss, which needs no label). In the
first half of training the sparsity rises to its target on a cubic schedule (arXiv 1710.01878) under one global budget;
groups are zeroed and stay zero. Then the model is cut: smaller matrices, not masks. The second half trains the small model
against the dense one's cached outputs. The dense model is the given one or, if that is no classifier of the task yet, a
baseline fine-tuned first and kept under out/dense.

Reads a prepared task and model (see 1_prepare_data.py; prepares what is missing). Writes out/prune/<run>/: model/ (loads
with stock transformers), run.json, history.csv; checkpoint/ and best/ while it runs. Killed? The same command goes on.
What to expect: docs/8_pruning_with_finetuning.md, every number with its command.
"""

from __future__ import annotations

import time
from contextlib import nullcontext
from pathlib import Path

import numpy as np
import torch
from torch.nn import functional
from tqdm import tqdm
from transformers import AutoConfig, AutoTokenizer
from transformers.utils import logging as transformers_logging

from common.assets import prepare_task, resolve_model
from common.blocks import blocks_of, family_of, group_costs, group_counts, total_cost
from common.checkpoint import (
    drop,
    is_classifier_of,
    load_checkpoint,
    load_classifier,
    outline,
    restore_rng,
    save_checkpoint,
    save_model,
)
from common.data import bucketed, check_length, in_order, inputs_of, load_classification, loader, padding_share
from common.distill import cached_logits, kd_loss
from common.eval_utils import classification_metrics, comparison, measure_classifiers, predict
from common.importance import RECORDED, GateRecorder, combine, l2_scores, parse_importance, random_scores, split_groups
from common.pruning import (
    gram_matrices,
    keep_all,
    largest_removal,
    refit_,
    scheduled_sparsity,
    select,
    shrink_,
    sparsity_of,
    zero_groups_,
)
from common.runs import (
    Interrupted,
    Parser,
    Run,
    UserError,
    fingerprint,
    resolve_device,
    run_script,
    seed_everything,
    stop_requests,
    table,
)
from common.train_utils import (
    PRECISIONS,
    EarlyStopping,
    adamw,
    autocast,
    grad_scaler,
    linear_schedule,
    resolve_precision,
    set_learning_rate,
    training_memory,
)

# The guide's fast mode gives up scoring by the distillation loss, and heads and neurons together, because they cost it 2x
# and 5x of a step. Here they are almost free (benchmarks/pruning_overhead.py) and buy accuracy
# (benchmarks/pruning_frontier.py), so fast keeps them on; it leaves the weights' norms out of the score, which only blur it.
PRESETS = [
    # flag, full, fast, meaning, limits
    ("num_epochs", 8, 4, "passes over the training data, half to prune, half to recover; 0: prune once, untouched", (0, 10**4)),
    ("batch_size", 32, 64, "examples per optimizer step", (1, 10**6)),
    ("train_fraction", 1.0, 0.3, "share of the training data used", (1e-6, 1)),
    ("validation_fraction", 1.0, 0.5, "share of the held-out slice of the training data scored at each epoch", (1e-6, 1)),
    ("max_length", 128, 64, "tokens that an example is cut to"),
    ("prune_every", 40, 100, "steps between two prunings", (1, 10**9)),
    ("gradient_window", 50, 20, "latest steps whose scores a pruning averages", (1, 10**6)),
    ("importance", "l2+kd_gradient", "kd_gradient", "l2, taylor, fisher, kd_gradient, activation, random; joined by +"),
    ("granularity", "multi", "multi", "groups that may go", ("multi", "heads", "neurons")),
    ("precision", "32", "auto", "auto: fp16 on CUDA, bf16 on CPUs that have it, else 32", PRECISIONS),
    ("patience", 5, 2, "epochs of recovery without improvement before stopping", (1, 10**6)),
    ("min_delta", 0.0005, 0.002, "gain in accuracy that counts as an improvement", (0, 1)),
    ("target_sparsity", 0.20, 0.20, "share of the attention and FFN budget to remove", (0, 0.95)),
    ("schedule", "cubic", "cubic", "how sparsity rises", ("cubic", "linear")),
    ("allocation", "global", "global", "one budget for all layers, or the same share of each", ("global", "uniform")),
    ("budget", "parameters", "parameters", "what a group costs", ("parameters", "macs")),
    ("floor", 0.02, 0.02, "share of every layer's heads and neurons that stays, at least one", (0, 1)),
    ("refit", True, True, "re-solve the output projections by least squares when groups go"),
    ("learning_rate", 1e-4, 2e-4, "peak learning rate while pruning and recovering", (0, 10)),
    ("dense_epochs", 3, 2, "passes of the dense baseline, if one has to be made", (1, 10**4)),
    ("dense_learning_rate", 5e-5, 1e-4, "its peak learning rate", (0, 10)),
    ("dropout", 0.1, 0.0, "while training", (0, 0.99)),
    ("weight_decay", 0.01, 0.01, "of AdamW, on matrices", (0, 10)),
    ("warmup", 0.1, 0.1, "share of the steps in which the learning rate rises", (0, 1)),
    ("distill_weight", 1.0, 1.0, "of distillation, the rest cross-entropy", (0, 1)),
    ("temperature", 2.0, 2.0, "of distillation", (0.01, 1000)),
    ("n_selection", 2000, 2000, "training examples held out for selection, at most a tenth", (1, 10**9)),
]
WEIGHT_SCORERS = {"l2": l2_scores, "random": random_scores}  # name -> function(blocks, generator) -> Scores


class Pruner:
    """Removes groups from a model in training: scores every step of a window, prunes at its end, up to the target.

    `keep` is what is left so far; scores are kept for each of the last `gradient_window` recorded steps.
    """

    def __init__(self, model, args, steps: int, calibration: list[dict]):
        self.model, self.args, self.steps, self.calibration = model, args, steps, calibration
        self.blocks = blocks_of(model)
        self.costs = group_costs(self.blocks, args.budget, args.max_length)
        self.total = total_cost(self.blocks, args.budget, args.max_length)
        self.keep = keep_all(self.blocks)
        recorded = tuple(name for name in args.importance_names if name in RECORDED)
        self.recorder = GateRecorder(model, self.blocks, recorded)
        n_groups = sum(sum(counts) for counts in group_counts(self.blocks).values())
        self.window = torch.zeros(args.gradient_window, len(recorded), n_groups, device=model.device)
        self.n_recorded = 0
        self.generator = torch.Generator().manual_seed(args.seed)

    def prunes_at(self, step: int) -> bool:
        return step % self.args.prune_every == 0 or step == self.steps

    def records(self, step: int) -> bool:
        """Whether `step` (from 1) is one of the last `gradient_window` steps before a pruning."""
        ahead = min(-step % self.args.prune_every, self.steps - step)
        return bool(self.recorder.wanted) and ahead < self.args.gradient_window

    def note(self) -> None:
        self.window[self.n_recorded % len(self.window)] = self.recorder.statistics()
        self.n_recorded += 1

    def scores(self):
        """One number a group: the chosen scorers, each averaged over the window, joined."""
        recorded = self.window[: self.n_recorded].nan_to_num(0, 0, 0).mean(0)  # (scorers, groups); fp16 steps can overflow
        parts = [split_groups(part, self.blocks) for part in recorded]
        parts += [WEIGHT_SCORERS[n](self.blocks, self.generator) for n in self.args.importance_names if n in WEIGHT_SCORERS]
        return combine(parts)

    def prune_(self, sparsity: float, optimizer=None) -> None:
        """Select under the budget, refit the output projections to do without what goes, and set that to zero."""
        a = self.args
        keep = select(self.scores(), self.costs, sparsity * self.total, self.keep, a.allocation, a.granularity, a.floor)
        if a.refit and any(not torch.equal(new, old) for kind in keep
                           for new, old in zip(keep[kind], self.keep[kind], strict=True)):  # fmt: skip
            with gram_matrices(self.model, self.blocks) as grams, torch.no_grad():
                for batch in self.calibration:
                    self.model(**inputs_of(batch))
            refit_(self.blocks, grams, keep)
        zero_groups_(self.blocks, keep, optimizer)
        self.keep = keep

    def state_dict(self) -> dict:
        return {"keep": self.keep, "window": self.window, "n_recorded": self.n_recorded,
                "generator": self.generator.get_state()}  # fmt: skip

    def load_state_dict(self, state: dict) -> None:
        self.keep = {kind: [mask.to(self.model.device) for mask in masks] for kind, masks in state["keep"].items()}
        self.window, self.n_recorded = state["window"].to(self.model.device), state["n_recorded"]
        self.generator.set_state(state["generator"])


def objective(logits, batch, teacher, args):
    """Cross-entropy without a teacher, else its mixture with distillation from the teacher's cached logits; fp32."""
    if teacher is None or args.distill_weight == 0:
        return functional.cross_entropy(logits.float(), batch["labels"])
    distilled = kd_loss(logits, teacher[batch["index"]], args.temperature)
    if args.distill_weight == 1:
        return distilled
    supervised = functional.cross_entropy(logits.float(), batch["labels"])
    return args.distill_weight * distilled + (1 - args.distill_weight) * supervised


def fit(model, tokenizer, data, args, run, n_epochs, learning_rate, teacher=None, pruner=None) -> None:
    """The training loop, of the dense baseline (no pruner) and of the pruned model. The best epoch is kept in best/.

    Continues from the run's checkpoint. Only epochs after the cut count for best/ and for early stopping.
    """
    device, train = model.device, data.train
    per_epoch = len(bucketed(train.lengths, args.batch_size, np.random.default_rng(0)))
    total, step, finished = n_epochs * per_epoch, 0, False
    optimizer = adamw(model, learning_rate, args.weight_decay)
    scaler, stopping = grad_scaler(device, args.precision), EarlyStopping(args.patience, args.min_delta)
    state, warning = load_checkpoint(run.checkpoint_dir)
    if warning:
        print(f"warning: {warning}")
    if state:
        if pruner:
            pruner.load_state_dict(state["pruner"])
            if state["cut"]:
                shrink_(model, pruner.keep)
        model.load_state_dict(state["model"])
        optimizer.load_state_dict(state["optimizer"])
        scaler.load_state_dict(state["scaler"])
        stopping.load_state_dict(state["stopping"])
        step, finished = state["step"], state["finished"]
        run.rewind(step)
        print(f"resumed at step {step:,} of {total:,}")
    cut = state["cut"] if state else pruner is None
    forward = torch.compile(model, dynamic=True) if args.compile else model

    def save():
        save_checkpoint(run.checkpoint_dir, {
            "model": model.state_dict(), "optimizer": optimizer.state_dict(), "scaler": scaler.state_dict(),
            "stopping": stopping.state_dict(), "pruner": pruner.state_dict() if pruner else None, "cut": cut,
            "step": step, "finished": finished})  # fmt: skip

    if state:
        restore_rng(state)
    with stop_requests() as stop_requested:
        while step < total and not finished:
            epoch, done = divmod(step, per_epoch)
            phase = "dense" if pruner is None else "recovery" if cut else "pruning"
            batches = bucketed(train.lengths, args.batch_size, np.random.default_rng([args.seed, epoch]))[done:]
            losses, start = [], time.perf_counter()
            model.train()
            bar = tqdm(loader(train, batches, device), total=per_epoch, initial=done, desc=f"{phase} {epoch + 1}/{n_epochs}",
                       leave=False, mininterval=1)  # fmt: skip
            for batch in bar:
                step += 1
                recording = pruner is not None and not cut and pruner.records(step)
                with pruner.recorder.recording() if recording else nullcontext():
                    with autocast(device, args.precision):
                        logits = (model if recording else forward)(**inputs_of(batch)).logits
                    loss = objective(logits, batch, teacher, args)
                    if recording and "kd_gradient" in pruner.recorder.wanted:
                        pruner.recorder.curvature(logits, teacher[batch["index"]], args.temperature, pruner.generator)
                    if recording:
                        pruner.recorder.loss_scale = scaler.scale(torch.ones((), device=device))
                    scaler.scale(loss).backward()
                    if recording:
                        pruner.note()
                scaler.unscale_(optimizer)
                torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
                set_learning_rate(optimizer, learning_rate * linear_schedule(step - 1, total, args.warmup))
                scaler.step(optimizer)
                scaler.update()
                optimizer.zero_grad(set_to_none=True)
                losses.append(loss.detach())
                if not cut and pruner.prunes_at(step):
                    check_finite(losses, step, run)
                    pruner.prune_(scheduled_sparsity(args.target_sparsity, step / pruner.steps, args.schedule), optimizer)
                    sparsity = sparsity_of(pruner.keep, pruner.blocks, args.budget, args.max_length)
                    run.log(step, phase, sparsity=sparsity)
                    bar.set_postfix(sparsity=f"{sparsity:.3f}")
                    if step == pruner.steps:
                        shrink_(model, pruner.keep, optimizer)
                        cut = True
                if step % per_epoch and (step % args.save_every == 0 or stop_requested()):
                    check_finite(losses, step, run)
                    save()
                    if stop_requested():
                        break
            if step % per_epoch:  # stopped inside the epoch
                raise Interrupted(f"The same command goes on from step {step:,} of {total:,} ({run.dir})")
            mean_loss = check_finite(losses, step, run)
            rate = sum(len(b) for b in batches) / (time.perf_counter() - start)
            logits = predict(model, data.selection, device, args.precision)
            accuracy = classification_metrics(logits, data.selection.labels)["accuracy"]
            run.log(step, phase, loss=mean_loss, selection_accuracy=accuracy, examples_per_second=rate)
            if cut and stopping.update(accuracy):
                save_model(run.dir / "best", model, tokenizer)
            finished = cut and stopping.stop
            sparsity = sparsity_of(pruner.keep, pruner.blocks, args.budget, args.max_length) if pruner and not cut else None
            print(f"epoch {epoch + 1}/{n_epochs}  {phase:8s}  loss {mean_loss:.4f}  selection accuracy {accuracy:.4f}  "
                  f"{'' if sparsity is None else f'sparsity {sparsity:.3f}  '}{rate:,.0f} examples/s"
                  f"{'  (early stop)' if finished and step < total else ''}")  # fmt: skip
            save()
            if stop_requested():
                raise Interrupted(f"The same command goes on from step {step:,} of {total:,} ({run.dir})")


def check_finite(losses: list[torch.Tensor], step: int, run) -> float:
    """The mean of the losses since the last look. UserError when it is not a number: nothing is saved past this point."""
    mean = float(torch.stack(losses).mean()) if losses else 0.0
    if not np.isfinite(mean):
        raise UserError(f"the loss became {mean} before step {step:,}. The last checkpoint in {run.dir} is intact; try a lower "
                        "--learning_rate or --precision 32")  # fmt: skip
    return mean


def prune_once_(pruner, data, args, teacher) -> None:
    """`--num_epochs 0`: score on a window of batches, prune a part, score what is left again, and so on, in four rounds."""
    model, rounds = pruner.model, 4
    embeddings = model.get_input_embeddings().weight
    for parameter in model.parameters():
        parameter.requires_grad_(parameter is embeddings)  # gates need the backward, weights do not
    model.eval()
    batches = in_order(data.train.lengths[: args.gradient_window * args.batch_size], args.batch_size)
    for i in range(rounds):
        for batch in loader(data.train, batches, model.device):
            with pruner.recorder.recording(), autocast(model.device, args.precision):
                logits = model(**inputs_of(batch)).logits
                if "kd_gradient" in pruner.recorder.wanted:
                    pruner.recorder.curvature(logits, teacher[batch["index"]], args.temperature, pruner.generator)
                functional.cross_entropy(logits.float(), batch["labels"]).backward()
                pruner.note()
            embeddings.grad = None
        pruner.prune_(args.target_sparsity * (i + 1) / rounds)
        print(f"round {i + 1}/{rounds}  sparsity {sparsity_of(pruner.keep, pruner.blocks, args.budget, args.max_length):.3f}")
    for parameter in model.parameters():
        parameter.requires_grad_(True)


def dense_classifier(args, base, tokenizer, data, device) -> Path:
    """The dense model: the given one if it is a classifier of the task, else a baseline, fine-tuned once and kept."""
    if is_classifier_of(AutoConfig.from_pretrained(base.path), data.label_names):
        return base.path
    used = ("seed", "train_fraction", "validation_fraction", "n_selection", "max_length", "batch_size", "precision", "patience",
            "min_delta", "dense_epochs", "dense_learning_rate", "dropout", "weight_decay", "warmup", "assets")  # fmt: skip
    with Run(args.out_dir, "dense", {name: getattr(args, name) for name in used}, wait=True) as run:
        print(f"dense baseline: {run.dir}{' (made before)' if run.finished else ''}")
        if not run.finished:
            seed_everything(args.seed)
            model = load_classifier(base.path, data.label_names, args.dropout).to(device)
            with run.timed("training"):
                fit(model, tokenizer, data, args, run, args.dense_epochs, args.dense_learning_rate)
            save_model(run.model_dir, load_classifier(run.dir / "best"), tokenizer)
            drop(run.checkpoint_dir, run.dir / "best")
    return run.model_dir


def print_plan(args, base, task, data, pruner_steps, model) -> None:
    """What is about to happen: sources, data, steps, memory, schedule."""
    blocks, train = blocks_of(model), data.train
    per_epoch = 2 * pruner_steps // max(1, args.num_epochs)
    counts = {kind: sum(n) for kind, n in group_counts(blocks).items()}
    batches = bucketed(train.lengths, args.batch_size, np.random.default_rng(0))
    memory = training_memory(model, args.batch_size, int(train.lengths.max()), args.precision)
    prunings = [*range(args.prune_every, pruner_steps, args.prune_every), pruner_steps]
    shown = [scheduled_sparsity(args.target_sparsity, step / pruner_steps, args.schedule) for step in prunings]
    print(table([["plan", ""],
        ["model", f"{base.record['name']} ({base.record['source']}), {len(blocks)} layers"],
        ["task", f"{task.record['name']} ({task.record['source']}), labels {', '.join(data.label_names)}"],
        ["examples", f"{len(train):,} to train, {len(data.selection):,} to select, {len(data.validation):,} to judge"],
        ["tokens", f"{train.lengths.mean():.1f} an example, {train.n_truncated} examples cut at {args.max_length}, "
                   f"{padding_share(train.lengths, batches):.1%} padding"],
        ["groups", f"{counts['heads']:,} heads, {counts['neurons']:,} neurons ({args.granularity})"],
        ["score", f"{args.importance}, {args.allocation} budget in {args.budget}"],
        ["steps", f"{per_epoch:,} an epoch, {args.num_epochs} epochs, batch {args.batch_size}, precision {args.precision}"],
        ["sparsity", f"{args.schedule} in {len(prunings)} prunings: "
                     f"{', '.join(f'{x:.3f}' for x in shown[:3])} ... {shown[-1]:.3f}" if args.num_epochs else "at once"],
        ["memory", f"about {memory / 2**20:,.0f} MiB at the longest batch"],
    ]))  # fmt: skip


def main(argv=None) -> None:
    parser = Parser(__doc__, PRESETS, shared=("model", "task", "source", "local_dir", "text_column", "label_column", "data_dir",
                    "out_dir", "run_name", "resume", "save_every", "seed", "device", "compile", "tensorboard", "dry_run"))  # fmt: skip
    args = parser.parse_args(argv)
    args.importance_names = parse_importance(args.importance, (*WEIGHT_SCORERS, *RECORDED))
    transformers_logging.set_verbosity_error()
    transformers_logging.disable_progress_bar()
    device = resolve_device(args.device)
    args.precision = resolve_precision(args.precision, device)

    # Everything that can be refused is refused before a model is loaded
    base = resolve_model(args.model, args.data_dir, args.source)
    task = prepare_task(args.task, args.data_dir, args.source, args.local_dir, args.text_column, args.label_column)
    args.assets = {"model": base.record, "task": task.record}
    config = AutoConfig.from_pretrained(base.path)
    family_of(config)
    check_length(config, args.max_length)
    largest = largest_removal(blocks_of(outline(base.path)), args.granularity, args.floor, args.budget, args.max_length)
    if args.target_sparsity > largest:
        raise UserError(f"--target_sparsity {args.target_sparsity}: --granularity {args.granularity} with --floor {args.floor} "
                        f"allows {largest:.3f} at most here. Ask for less, or lower the floor")  # fmt: skip
    tokenizer = AutoTokenizer.from_pretrained(base.path)
    data = load_classification(task.path, tokenizer, args.max_length, args.n_selection, args.train_fraction,
                               args.validation_fraction, args.seed)  # fmt: skip
    per_epoch = len(bucketed(data.train.lengths, args.batch_size, np.random.default_rng(0)))
    pruning_steps = max(1, args.num_epochs * per_epoch // 2)
    print_plan(args, base, task, data, pruning_steps, outline(base.path))
    if args.dry_run:
        return

    # The dense model: the accuracy to hold, and the teacher
    dense_dir = dense_classifier(args, base, tokenizer, data, device)
    hidden = ("out_dir", "data_dir", "run_name", "resume", "save_every", "tensorboard", "dry_run", "source", "local_dir")
    settings = {name: value for name, value in vars(args).items() if name not in hidden}
    with Run(args.out_dir, "prune", settings, args.run_name, args.resume, tensorboard=args.tensorboard) as run:
        print(f"pruning: {run.dir}{' (finished before; --resume never starts anew)' if run.finished else ''}")
        if not run.finished:
            seed_everything(args.seed)
            model = load_classifier(dense_dir, data.label_names, args.dropout).to(device)
            with run.timed("teacher"):
                teacher = cached_logits(run.dir / "teacher_logits.safetensors", fingerprint(settings),
                                        lambda: predict(model, data.train, device, args.precision)).to(device)  # fmt: skip

            # Prune, cut, recover
            sample = data.train.subset(np.arange(min(1024, len(data.train))))
            calibration = list(loader(sample, in_order(sample.lengths, 64), device))
            pruner = Pruner(model, args, pruning_steps, calibration)
            with run.timed("pruning and recovery"):
                if args.num_epochs:
                    fit(model, tokenizer, data, args, run, args.num_epochs, args.learning_rate, teacher, pruner)
                    model = load_classifier(run.dir / "best").to(device)
                else:
                    prune_once_(pruner, data, args, teacher)
                    shrink_(model, pruner.keep)

            # Save, then measure what was saved
            asked = {"sparsity": args.target_sparsity, "importance": args.importance, "budget": args.budget}
            shapes = [block.shape for block in blocks_of(model)]
            before = predict(model, data.validation, device)
            stage = {"script": Path(__file__).name, "asked": asked, "layers": shapes}
            save_model(run.model_dir, model, tokenizer, stage, earlier=dense_dir)
            with run.timed("measuring"):
                measured = measure_classifiers({"dense": dense_dir, "pruned": run.model_dir}, data.validation, device)
            dense_blocks, left = measured["dense"]["block_parameters"], measured["pruned"]["block_parameters"]
            measured["pruned"] |= {"sparsity_asked": args.target_sparsity, "sparsity": 1 - left / dense_blocks}
            after = predict(load_classifier(run.model_dir).to(device), data.validation, device)
            run.record |= {"metrics": measured, "layers": shapes, "dense_layers": [b.shape for b in blocks_of(outline(dense_dir))],
                           "reload_difference": float((after - before).abs().max()), "dense_dir": str(dense_dir)}  # fmt: skip
            drop(run.checkpoint_dir, run.dir / "best", run.dir / "teacher_logits.safetensors")

    layers = zip(run.record["dense_layers"], run.record["layers"], strict=True)
    print("\n" + table([["layer", "heads", "neurons"], *([i, f"{new['heads']}/{old['heads']}", f"{new['neurons']}/{old['neurons']}"]
                                                         for i, (old, new) in enumerate(layers))]))  # fmt: skip
    print("\n" + table(comparison(run.record["metrics"])))
    print("\n" + "   ".join(f"{phase} {seconds:.0f} s" for phase, seconds in run.record["timings"].items()))
    print(f"\nmodel  {run.model_dir}\nrecord {run.dir / 'run.json'}\ncurves {run.dir / 'history.csv'}")


if __name__ == "__main__":
    run_script(main)
