"""Structured pruning of a text classifier while it trains: heads and FFN neurons go, the rest is distilled and recovers.

    python 8_pruning_with_finetuning.py --fast                       a small real run, minutes on two cores
    python 8_pruning_with_finetuning.py                              the full preset
    python 8_pruning_with_finetuning.py --fast --num_epochs 0        prune once, without any training

Method: the score of a group (a head, a neuron) is what its gate does to the loss, for all groups at once and each example
apart (Fisher: arXiv 2204.09656; here also the curvature of the distillation loss, which needs no label). In the first half of
training sparsity rises on a cubic schedule (arXiv 1710.01878) under one global budget; groups are zeroed and stay zero. Then
the model is cut: smaller matrices, not masks. The second half trains it against the dense model's cached outputs. The dense
model is the given one or, if that is no classifier of the task yet, a baseline fine-tuned first and kept under out/dense.

Reads a prepared task and model (1_prepare_data.py; prepares what is missing). Writes out/prune/<run>/: model/, which stock
transformers loads, run.json, history.csv. Killed? The same command goes on. The manual: docs/8_pruning_with_finetuning.md.
"""

from __future__ import annotations

import time
from contextlib import nullcontext
from functools import partial
from pathlib import Path

import numpy as np
import torch
from torch.nn import functional
from tqdm import tqdm

from common import assets, checkpoint, data, distill, eval_utils, importance, pruning, runs, train_utils
from common.blocks import blocks_of, group_costs, group_counts, total_cost
from common.checkpoint import load_classifier, outline
from common.runs import Run, table

# The guide's fast mode gives up distillation scores, and heads and neurons together: they cost it 2x and 5x of a step. Here
# they are almost free (benchmarks/pruning_overhead.py), so fast keeps them; it leaves the norms, which blur the score, out.
PRESETS = [
    # flag, full, fast, meaning, limits
    ("num_epochs", 8, 4, "passes over the training data, half to prune, half to recover; 0: prune once, untouched", (0, 10**4)),
    ("batch_size", 32, 64, "examples per optimizer step", (1, 10**6)),
    ("train_fraction", 1.0, 0.3, "share of the training data in an epoch; the next one takes other examples", (1e-6, 1)),
    ("validation_fraction", 1.0, 0.5, "share of the held-out slice of the training data scored at each epoch", (1e-6, 1)),
    ("max_length", 128, 64, "tokens that an example is cut to"),
    ("prune_every", 40, 100, "steps between two prunings", (1, 10**9)),
    ("gradient_window", 50, 20, "latest steps whose scores a pruning averages", (1, 10**6)),
    ("score_every", 5, 1, "of these, every n-th is scored", (1, 10**6)),
    ("importance", "l2+kd_gradient", "kd_gradient", "l2, taylor, fisher, kd_gradient, activation, random; joined by +"),
    ("granularity", "multi", "multi", "groups that may go", ("multi", "heads", "neurons")),
    ("precision", "32", "auto", "auto: fp16 on CUDA, bf16 on CPUs that have it, else 32", train_utils.PRECISIONS),
    ("patience", 5, 2, "epochs of recovery without improvement before stopping", (1, 10**6)),
    ("min_delta", 0.0005, 0.002, "gain in accuracy that counts as an improvement", (0, 1)),
    ("target_sparsity", 0.20, 0.20, "share of the attention and FFN budget to remove", (0, 0.95)),
    ("schedule", "cubic", "cubic", "how sparsity rises", ("cubic", "linear")),
    ("allocation", "global", "global", "one budget for all layers, or the same share of each", ("global", "uniform")),
    ("budget", "parameters", "parameters", "what a group costs", ("parameters", "macs")),
    ("floor", 0.02, 0.02, "share of every layer's heads and neurons that stays, at least one", (0, 1)),
    ("width_multiple", 8, 8, "every layer ends with a multiple of so many neurons, which runs faster; 1: any", (1, 512)),
    ("refit", False, True, "re-solve the output projections by least squares at each pruning"),
    ("learning_rate", 0.0, 0.0, "peak learning rate of pruning and recovery; 0: 0.06 / width of the model", (0, 10)),
    ("dense_epochs", 3, 2, "passes of the dense baseline, if one has to be made", (1, 10**4)),
    ("dense_fraction", 1.0, 0.5, "share of the training data in each of them", (1e-6, 1)),
    ("dense_learning_rate", 0.0, 0.0, "its peak learning rate; 0: 0.04 / width of the model", (0, 10)),
    ("dropout", 0.1, 0.0, "while training", (0, 0.99)),
    ("weight_decay", 0.01, 0.01, "of AdamW, on matrices", (0, 10)),
    ("warmup", 0.1, 0.1, "share of the steps in which the learning rate rises", (0, 1)),
    ("distill_weight", 1.0, 1.0, "of distillation, the rest cross-entropy", (0, 1)),
    ("feature_weight", 1.0, 1.0, "of matching the teacher's classification token", (0, 1000)),
    ("temperature", 2.0, 2.0, "of distillation", (0.01, 1000)),
    ("n_selection", 2000, 2000, "training examples held out for selection, at most a tenth", (1, 10**9)),
]
N_CALIBRATION = 2048  # examples that the refit looks at where nothing is trained, half of them where training follows
WEIGHT_SCORERS = {"l2": importance.l2_scores, "random": importance.random_scores}  # name -> function(blocks, generator)


class Pruner:
    """Removes groups from a model in training: scores the steps of a window, prunes at its end, up to the target."""

    def __init__(self, model, args, steps: int, teacher, calibration: list[dict]):
        self.model, self.args, self.steps, self.teacher, self.calibration = model, args, steps, teacher, calibration
        self.blocks, self.sparsity, self.cut = blocks_of(model), 0.0, False
        self.costs = group_costs(self.blocks, args.budget, args.max_length)
        self.total = total_cost(self.blocks, args.budget, args.max_length)
        self.keep = pruning.keep_all(self.blocks)
        recorded = tuple(name for name in args.scorers if name in importance.RECORDED)
        n_scored = -(-args.gradient_window // (args.score_every if args.num_epochs else 1))
        self.recorder = importance.GateRecorder(model, self.blocks, recorded, n_scored)
        self.generator = torch.Generator().manual_seed(args.seed)

    def records(self, step: int) -> bool:
        """Whether `step` (from 1) is one of the last `gradient_window` steps before a pruning, and its turn to be scored."""
        ahead, a = min(-step % self.args.prune_every, self.steps - step), self.args
        return bool(self.recorder.wanted) and not self.cut and ahead < a.gradient_window and ahead % a.score_every == 0

    def record(self, logits, teacher_logits, loss, scaler=None) -> None:
        """The backward of a recorded step, and its scores into the window."""
        if "kd_gradient" in self.recorder.wanted:
            self.recorder.curvature(logits, teacher_logits, self.args.temperature, self.generator)
        self.recorder.loss_scale = scaler.scale(torch.ones((), device=loss.device)) if scaler else 1.0
        (scaler.scale(loss) if scaler else loss).backward()
        self.recorder.keep_statistics()

    def scores(self):
        """One number a group: each scorer averaged over the window, then joined."""
        others = [WEIGHT_SCORERS[name](self.blocks, self.generator) for name in self.args.scorers if name in WEIGHT_SCORERS]
        return importance.combine(self.recorder.averages() + others)

    def prune_(self, sparsity: float, optimizer=None) -> None:
        """Select under the budget, refit the output projections to do without what goes, and set that to zero."""
        a, before, remove, last = self.args, self.sparsity, sparsity * self.total, sparsity == self.args.target_sparsity
        self.keep = pruning.select(self.scores(), self.costs, remove, self.keep, a.allocation, a.granularity, a.floor,
                                   a.target_sparsity * self.total, a.width_multiple if last else 1)  # fmt: skip
        self.sparsity = pruning.sparsity_of(self.keep, self.costs, self.total)
        if a.refit and self.sparsity > before:
            with pruning.gram_matrices(self.model, self.blocks) as grams, eval_utils.evaluating(self.model, gradients=True):
                for batch in self.calibration:
                    with train_utils.autocast(self.model.device, a.precision):
                        logits = self.model(**data.inputs_of(batch)).logits
                    seed = importance.curvature_seed(logits, self.teacher.logits[batch["index"]], a.temperature, self.generator)
                    torch.autograd.grad(logits, self.model.get_input_embeddings().weight, seed)
            pruning.refit_(self.blocks, grams, self.keep)
        pruning.zero_groups_(self.blocks, self.keep, optimizer)

    def due(self, step: int) -> bool:
        return not self.cut and (step % self.args.prune_every == 0 or step == self.steps)

    def step_(self, step: int, optimizer) -> None:
        """Prune to where the schedule is at `step`; at the end of the phase, cut."""
        self.prune_(pruning.scheduled_sparsity(self.args.target_sparsity, step / self.steps, self.args.schedule), optimizer)
        if step == self.steps:
            self.cut_(optimizer)

    def cut_(self, optimizer=None) -> None:
        pruning.shrink_(self.model, self.keep, optimizer)
        self.cut = True

    def state_dict(self) -> dict:
        return {"keep": self.keep, "sparsity": self.sparsity, "recorder": self.recorder.state_dict(),
                "generator": self.generator.get_state()}  # fmt: skip

    def load_state_dict(self, state: dict) -> None:
        self.keep = {kind: [mask.to(self.model.device) for mask in masks] for kind, masks in state["keep"].items()}
        self.sparsity = state["sparsity"]
        self.recorder.load_state_dict(state["recorder"])
        self.generator.set_state(state["generator"])


def fit(model, tokenizer, split, args, run, n_epochs, fraction, learning_rate, teacher=None, pruner=None) -> None:
    """The training loop, of the dense baseline (no pruner) and of the pruned model; goes on from the run's checkpoint.

    The best epoch is kept in best/. Only epochs after the cut count for it and for early stopping.
    """
    device, per_epoch = train_utils.choose_attention_(model), data.n_batches(split.train, args.batch_size, fraction)
    step, total, finished, losses = 0, n_epochs * per_epoch, False, []
    optimizer = train_utils.adamw(model, learning_rate, args.weight_decay)
    scaler = train_utils.grad_scaler(device, args.precision)
    stopping = train_utils.EarlyStopping(args.patience, args.min_delta)
    parts = {"model": model, "optimizer": optimizer, "scaler": scaler, "stopping": stopping}
    parts |= {"pruner": pruner} if pruner else {}
    state, warning = checkpoint.load_checkpoint(run.checkpoint_dir)
    if state:
        step, finished, losses = state["step"], state["finished"], [*state["losses"].to(device)]
        if pruner and step >= pruner.steps:
            pruner.load_state_dict(state["parts"]["pruner"])
            pruner.cut_(optimizer)
        checkpoint.restore_(state, parts)
        print(f"{f'warning: {warning}; ' if warning else ''}resumed at step {step:,} of {total:,}")
    run.rewind(step)
    forward = torch.compile(model, dynamic=True) if args.compile else model

    def save():
        checkpoint.save_checkpoint(run.checkpoint_dir, parts, step=step, finished=finished, losses=torch.stack(losses))
        if stop_requested():
            raise runs.Interrupted(f"The same command goes on from step {step:,} of {total:,} ({run.dir})")

    with runs.stop_requests() as stop_requested:
        while step < total and not finished:
            epoch, done = divmod(step, per_epoch)
            phase = "dense" if pruner is None else "pruning" if epoch * per_epoch < pruner.steps else "recovery"
            batches = data.epoch_batches(split.train, args.batch_size, fraction, args.seed, epoch)[done:]
            losses, start = losses if done else [], time.perf_counter()
            model.train()
            ahead = data.loader(split.train, batches, device)
            for batch in tqdm(ahead, f"{phase} {epoch + 1}/{n_epochs}", per_epoch, initial=done, leave=False, mininterval=1):
                step += 1
                recording = pruner is not None and pruner.records(step)
                with pruner.recorder.recording() if recording else nullcontext():
                    with train_utils.autocast(device, args.precision):
                        output = (model if recording else forward)(**data.inputs_of(batch), output_hidden_states=bool(teacher))
                    loss = objective(output, batch, teacher, args)
                    if recording:
                        pruner.record(output.logits, teacher.logits[batch["index"]], loss, scaler)
                    else:
                        scaler.scale(loss).backward()
                factor = train_utils.linear_schedule(step - 1, total, args.warmup)
                train_utils.step_(model, optimizer, scaler, learning_rate * factor)
                losses.append(loss.detach())
                if pruner and pruner.due(step):
                    train_utils.mean_loss(losses, model, step)
                    pruner.step_(step, optimizer)
                    run.log(step, phase, sparsity=pruner.sparsity)
                if step % per_epoch and (step % args.save_every == 0 or stop_requested()):
                    train_utils.mean_loss(losses, model, step)
                    save()
            loss = train_utils.mean_loss(losses, model, step)
            rate = sum(map(len, batches)) / (time.perf_counter() - start)
            logits = eval_utils.predict(model, split.selection, device, args.precision)
            accuracy = eval_utils.classification_metrics(logits, split.selection.labels)["accuracy"]
            run.log(step, phase, loss=loss, selection_accuracy=accuracy, examples_per_second=rate)
            if (pruner is None or pruner.cut) and stopping.update(accuracy):
                checkpoint.save_model(run.dir / "best", model, tokenizer)
            finished = stopping.stop
            print(f"epoch {epoch + 1}/{n_epochs}  {phase:8s}  loss {loss:.4f}  selection accuracy {accuracy:.4f}  "
                  f"{f'sparsity {pruner.sparsity:.3f}  ' if pruner else ''}{rate:,.0f} examples/s", flush=True)  # fmt: skip
            save()


def objective(output, batch, teacher, args):
    """Cross-entropy without a teacher, else its mixture with distillation from the teacher's cached outputs; in fp32."""
    if teacher is None:
        return functional.cross_entropy(output.logits.float(), batch["labels"])
    loss = args.distill_weight * distill.kd_loss(output.logits, teacher.logits[batch["index"]], args.temperature)
    if args.distill_weight < 1:
        loss += (1 - args.distill_weight) * functional.cross_entropy(output.logits.float(), batch["labels"])
    if args.feature_weight:
        wanted = teacher.features[batch["index"]]
        loss += args.feature_weight * distill.feature_loss(output.hidden_states[-1][:, 0], wanted, teacher.scale)
    return loss


def prune_once_(pruner, split, args, teacher, rounds: int = 4) -> None:
    """`--num_epochs 0`: score on a window of batches, prune a part, score what is left again; a few rounds, then cut."""
    model = pruner.model.eval()
    model.requires_grad_(False)
    model.get_input_embeddings().requires_grad_(True)  # gates need the backward; of all weights, only the first do
    batches = data.in_order(split.train.lengths[: args.gradient_window * args.batch_size], args.batch_size)
    for i in range(rounds):
        pruner.recorder.forget()
        for batch in data.loader(split.train, batches, model.device):
            with pruner.recorder.recording():
                with train_utils.autocast(model.device, args.precision):
                    logits = model(**data.inputs_of(batch)).logits
                pruner.record(logits, teacher.logits[batch["index"]], functional.cross_entropy(logits.float(), batch["labels"]))
            model.zero_grad()
        pruner.prune_(args.target_sparsity * (i + 1) / rounds)
        print(f"round {i + 1}/{rounds}  sparsity {pruner.sparsity:.3f}", flush=True)
    pruner.cut_()


def dense_classifier(args, base, config, tokenizer, split, device) -> Path:
    """The dense model: the given one if it is a classifier of the task, else a baseline, fine-tuned once and kept."""
    if checkpoint.is_classifier_of(config, split.label_names):
        return base.path
    used = ("assets", "seed", "dense_fraction", "validation_fraction", "n_selection", "max_length", "batch_size", "precision",
            "patience", "min_delta", "dense_epochs", "dense_learning_rate", "dropout", "weight_decay", "warmup",
            "device")  # fmt: skip
    with Run(args.out_dir, "dense", {name: getattr(args, name) for name in used}, wait=True) as run:
        print(f"dense baseline: {run.dir}{' (made before)' if run.finished else ''}", flush=True)
        if not run.finished:
            runs.seed_everything(args.seed)
            model = load_classifier(base.path, split.label_names, args.dropout).to(device)
            with run.timed("training"):
                fit(model, tokenizer, split, args, run, args.dense_epochs, args.dense_fraction, args.dense_learning_rate)
            checkpoint.save_model(run.model_dir, load_classifier(run.dir / "best"), tokenizer, earlier=base.path)
            checkpoint.drop(run.checkpoint_dir, run.dir / "best")
    return run.model_dir


def print_plan(args, base, task, split, steps: int, model) -> None:
    heads, neurons = (sum(counts) for counts in group_counts(blocks_of(model)).values())
    first = data.epoch_batches(split.train, args.batch_size, args.train_fraction, args.seed, 0)
    n_first, padding = sum(map(len, first)), data.padding_share(split.train, first)
    memory = train_utils.training_memory(model, args.batch_size, int(split.train.lengths.max()), args.precision)
    prunings = [*range(args.prune_every, steps, args.prune_every), steps] if args.num_epochs else [steps]
    rise = [pruning.scheduled_sparsity(args.target_sparsity, step / steps, args.schedule) for step in prunings]
    print(f"""model     {base.record["name"]} ({base.record["source"]}), {heads} heads, {neurons:,} neurons
task      {task.record["name"]} ({task.record["source"]}): {task.record.get("label_mapping") or ", ".join(split.label_names)}
examples  {n_first:,} of {len(split.train):,} an epoch; {len(split.selection):,} to select, {len(split.validation):,} to judge
tokens    {split.train.lengths.mean():.1f} an example, {split.train.n_truncated} cut at {args.max_length}; padding {padding:.1%}
steps     {steps:,} to prune, of {args.num_epochs} epochs; batch {args.batch_size}, {args.precision}, {args.device}
pruning   {args.importance}, {args.granularity}, {args.allocation}, in {args.budget}
sparsity  {args.schedule}, {len(rise):,} prunings: {" ".join(f"{x:.3f}" for x in rise[:5])}{" ..." * (len(rise) > 5)}
memory    about {memory / 2**20:,.0f} MiB for a step on the longest batch
""", flush=True)


def main(argv=None) -> None:
    args = runs.Parser(__doc__, PRESETS, shared=tuple(runs.SHARED_FLAGS)).parse_args(argv)
    args.scorers = importance.parse_importance(args.importance, (*WEIGHT_SCORERS, *importance.RECORDED))
    runs.quiet_transformers()
    device = runs.resolve_device(args.device)
    train_utils.check_compiler(device, "--compile", args.compile)
    args.device, args.precision = str(device), train_utils.resolve_precision(args.precision, device)
    # Everything that can be refused is refused before a model is loaded
    base = assets.resolve_model(args.model, args.data_dir, args.source)
    task = assets.prepare_task(args.task, args.data_dir, args.source, args.local_dir, args.text_column, args.label_column)
    args.assets = [{key: asset.record[key] for key in ("name", "source", "sha256")} for asset in (base, task)]
    shape = outline(base.path)
    data.check_length(shape.config, args.max_length)
    args.learning_rate = args.learning_rate or 0.06 / shape.config.hidden_size
    args.dense_learning_rate = args.dense_learning_rate or 0.04 / shape.config.hidden_size
    pruning.check_target(blocks_of(shape), args.target_sparsity, args.granularity, args.floor, args.budget, args.max_length)
    tokenizer = data.load_tokenizer(base.path, shape.config)
    split = data.load_classification(task.path, tokenizer, args.max_length, args.n_selection, args.validation_fraction,
                                     args.seed)  # fmt: skip
    steps = max(1, args.num_epochs * data.n_batches(split.train, args.batch_size, args.train_fraction) // 2)  # to prune
    print_plan(args, base, task, split, steps, shape)
    if args.dry_run:
        return

    settings = {"script": Path(__file__).name} | {n: value for n, value in vars(args).items() if n not in runs.NO_RESULT}
    with Run(args.out_dir, "prune", settings, args.run_name, args.resume, tensorboard=args.tensorboard) as run:
        print(f"pruning: {run.dir}{' (finished before; --resume never starts anew)' if run.finished else ''}", flush=True)
        if not run.finished:
            dense_dir = dense_classifier(args, base, shape.config, tokenizer, split, device)  # what to hold; the teacher
            runs.seed_everything(args.seed)
            model = load_classifier(dense_dir, split.label_names, args.dropout).to(device)
            with run.timed("teacher"):
                n_seen = (2 * steps + 1 if args.num_epochs else args.gradient_window) * args.batch_size
                seen = split.train.subset(np.arange(min(max(n_seen, N_CALIBRATION), len(split.train))))
                look = partial(eval_utils.predict, model, seen, device, args.precision, features=True)
                teacher = distill.Teacher.cached(run.dir / "teacher.safetensors", runs.fingerprint(settings), look, device)
            sample = seen.subset(np.arange(min(N_CALIBRATION // (2 if args.num_epochs else 1), len(seen))))
            pruner = Pruner(model, args, steps, teacher, list(data.loader(sample, data.in_order(sample.lengths, 64), device)))
            with run.timed("pruning and recovery"):
                if args.num_epochs:
                    fit(model, tokenizer, split, args, run, args.num_epochs, args.train_fraction, args.learning_rate,
                        teacher, pruner)  # fmt: skip
                    model = load_classifier(run.dir / "best").to(device)
                else:
                    prune_once_(pruner, split, args, teacher)
            with run.timed("measuring"):  # what was saved, not what is in memory
                layers = [block.shape for block in blocks_of(model)]
                checkpoint.save_model(run.model_dir, model, tokenizer, {"asked": settings, "layers": layers}, earlier=dense_dir)
                dirs = {"dense": dense_dir, "pruned": run.model_dir}
                measured, logits = eval_utils.measure_classifiers(dirs, split.validation, device)
                changed = (logits["pruned"] - eval_utils.predict(model, split.validation, device)).abs().max()
            left = total_cost(blocks_of(model), args.budget, args.max_length) / pruner.total
            measured["pruned"] |= {"sparsity_asked": args.target_sparsity, "sparsity": 1 - left}  # of what --budget counts
            run.record |= {"metrics": measured, "reload_difference": float(changed), "dense_dir": dense_dir, "layers": layers,
                           "dense_layers": [b.shape for b in blocks_of(outline(dense_dir))]}  # fmt: skip
            checkpoint.drop(run.checkpoint_dir, run.dir / "best", run.dir / "teacher.safetensors")

    print("", table(eval_utils.layers_left(run.record["dense_layers"], run.record["layers"])),
          table(eval_utils.comparison(run.record["metrics"])), sep="\n\n")  # fmt: skip
    seconds = "   ".join(f"{phase} {seconds:.0f} s" for phase, seconds in run.record["timings"].items())
    curves = [f"curves  {run.dir / 'history.csv'}"] if args.num_epochs else []
    print(f"\n{seconds}\n\nmodel   {run.model_dir}", f"record  {run.dir / 'run.json'}", *curves, sep="\n")


if __name__ == "__main__":
    runs.run_script(main)
