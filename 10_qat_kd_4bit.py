"""4-bit quantisation-aware training of a text classifier, dense or pruned, with distillation from the dense model.

    python 10_qat_kd_4bit.py --fast                              the latest pruned model under out/, minutes on two cores
    python 10_qat_kd_4bit.py --fast --pruned_model_path DIR      any classifier directory
    python 10_qat_kd_4bit.py                                     the full preset

Method: every weight is looked at through its integers while it trains, gradients pass straight through the rounding, and the
scales learn (LSQ: arXiv 1902.08153). Activations are rounded to 8 bits, with a scale found for each token. The student starts
from post-training quantisation (PTQ, by GPTQ: arXiv 2210.17323), which is measured too, and learns from the dense model: its
cached outputs and, if asked for, hidden states, attention outputs, embeddings (arXiv 1909.10351), computed in every step.

Reads a classifier, the dense model it came from and a prepared task; makes what is missing. Writes out/qat/<run>/: model/, in
the pack-quantized format of compressed-tensors, which stock transformers loads, ptq/, run.json, history.csv. Killed? The same
command goes on. What to expect, flags, metrics: docs/10_qat_kd_4bit.md.
"""

from __future__ import annotations

import subprocess
import sys
import time
from contextlib import nullcontext
from functools import partial
from pathlib import Path

import numpy as np
import torch
from torch.nn import functional
from tqdm import tqdm

from common import assets, checkpoint, data, distill, eval_utils, export_onnx, pruning, quantizers, rounding, runs, train_utils
from common.blocks import blocks_of
from common.checkpoint import load_classifier, outline
from common.quantizers import WeightScheme
from common.runs import Run, UserError, table

# The guide's fast mode gives up hidden states, which cost it 1.8x of a step. Here the running teacher costs little
# (benchmarks/qat_overhead.py), and one epoch gains little from it; its token of classification is cached, so fast keeps that.
PRESETS = [
    # flag, full, fast, meaning, limits
    ("num_epochs", 2, 1, "passes over the training data; 0: quantise without training", (0, 10**4)),
    ("batch_size", 16, 32, "examples per optimizer step", (1, 10**6)),
    ("train_fraction", 1.0, 0.3, "share of the training data in an epoch; the next one takes other examples", (1e-6, 1)),
    ("validation_fraction", 1.0, 1.0, "share of the held-out slice of the training data scored at each epoch", (1e-6, 1)),
    ("max_length", 128, 64, "tokens that an example is cut to"),
    ("hidden_weight", 1.0, 0.0, "of matching the teacher's hidden states, all layers", (0, 1000)),
    ("attention_weight", 1.0, 0.0, "of matching what the teacher's attention adds, all layers", (0, 1000)),
    ("embedding_weight", 1.0, 0.0, "of matching the teacher's embeddings", (0, 1000)),
    ("feature_weight", 1.0, 1.0, "of matching the teacher's classification token", (0, 1000)),
    ("distill_weight", 1.0, 1.0, "of distillation of the outputs, the rest cross-entropy", (0, 1)),
    ("temperature", 2.0, 2.0, "of distillation", (0.01, 1000)),
    ("weight_bits", 4, 4, "of the attention and FFN weights", (2, 8)),
    ("group_size", 32, 32, "neighbours in a row that share a scale: 32, 64, 128, or -1 for the row", (-1, 128)),
    ("symmetric", True, True, "integers without a zero point"),
    ("scale_method", "lsq", "lsq", "scales follow the weight, are searched for once, or learn", ("minmax", "mse", "lsq")),
    ("rounding", "gptq", "gptq", "before training: errors cancel, or each weight to the nearest integer", ("gptq", "nearest")),
    ("activation_bits", 8, 8, "of what goes into these weights: 8, 16, or 32 for none", (8, 32)),
    ("activations", "dynamic", "dynamic", "a scale for each token, or one learned for all", ("dynamic", "static")),
    ("embedding_bits", 4, 4, "of the embeddings: 4, 8, or 32 for none", (4, 32)),
    ("embedding_group_size", -1, -1, "as group_size, of the embeddings", (-1, 128)),
    ("learning_rate", 0.0, 0.0, "peak learning rate; 0: 0.2 / width of the model / 2^weight_bits", (0, 10)),
    ("scale_rate", 0.1, 0.1, "learning rate of the scales, as a share of it", (0, 10)),
    ("weight_decay", 0.0, 0.0, "of AdamW, on matrices", (0, 10)),
    ("warmup", 0.1, 0.1, "share of the steps in which the learning rate rises", (0, 1)),
    ("dropout", 0.0, 0.0, "while training", (0, 0.99)),
    ("precision", "32", "auto", "auto: fp16 on CUDA, bf16 on CPUs that have it, else 32", train_utils.PRECISIONS),
    ("patience", 2, 2, "epochs without improvement before stopping", (1, 10**6)),
    ("min_delta", 0.0005, 0.002, "gain in accuracy that counts as an improvement", (0, 1)),
    ("n_selection", 2000, 2000, "training examples held out for selection, at most a tenth", (1, 10**9)),
]
N_CALIBRATION = 1024  # examples that GPTQ looks at, and that static input scales start from


def find_student(args, task) -> Path:
    """The directory to quantise: the given one, or the latest of script 8 on this task; if there is none, it is run."""

    def finished() -> list[Path]:
        return [folder / "model" for folder, record in runs.finished_runs(args.out_dir, "prune")
                if task.record["sha256"] in [asset["sha256"] for asset in record["config"].get("assets", [])]]  # fmt: skip

    if args.pruned_model_path is not None:
        return args.pruned_model_path
    if not (found := finished()):
        if args.dry_run:
            raise UserError(f"{args.out_dir / 'prune'}: no finished run on {task.record['name']}. "
                            "Run: python 8_pruning_with_finetuning.py --fast")  # fmt: skip
        named = ("model", "task", "source", "local_dir", "text_column", "label_column", "data_dir", "out_dir", "seed", "device")
        given = [part for n in named if (value := getattr(args, n)) is not None for part in (f"--{n}", str(value))]
        command = ["8_pruning_with_finetuning.py", *(["--fast"] if args.fast else []), *given]
        print(f"no pruned model of this task under {args.out_dir}; making one: python {' '.join(command)}", flush=True)
        done = subprocess.run([sys.executable, runs.REPOSITORY / command[0], *command[1:]], check=False)
        if done.returncode:
            raise UserError(f"{command[0]} ended with exit status {done.returncode}: no model to quantise")
        found = finished()
    return found[0]


def find_teacher(args, student: Path) -> Path:
    """The dense model: the given one, the one that the student's run names, or the student itself if it is dense."""
    if args.teacher_path is not None:
        return args.teacher_path
    record = student.parent / "run.json"
    if record.exists() and (dense := runs.read_json(record).get("dense_dir")):
        return Path(dense)
    if checkpoint.compression_stages(student):
        raise UserError(f"{student}: which dense model it came from is not recorded. Name it with --teacher_path")
    return student


def check(args, student, teacher, names: list[str]) -> None:
    """Everything that can be refused: a student or teacher of another task or shape, and values that do not go together."""
    for path, config in ((args.student, student.config), (args.teacher, teacher.config)):
        if not checkpoint.is_classifier_of(config, names):
            shown = ", ".join(map(str, config.id2label.values()))
            raise UserError(f"{path}: a classifier of {config.num_labels} labels ({shown}); the task has {len(names)} "
                            f"({', '.join(names)}). Name another --task, or a model of this one")  # fmt: skip
        if getattr(config, "quantization_config", None):
            raise UserError(f"{path}: is quantised already. Start from the dense or pruned model that it came from")
        data.check_length(config, args.max_length)
    for flag, allowed in (("group_size", (32, 64, 128, -1)), ("embedding_group_size", (32, 64, 128, -1)),
                          ("activation_bits", (8, 16, 32)), ("embedding_bits", (4, 8, 32))):  # fmt: skip
        if getattr(args, flag) not in allowed:
            raise UserError(f"--{flag} {getattr(args, flag)}: expected one of {', '.join(map(str, allowed))}")
    if args.export != "none":
        export_onnx.check_scheme(args.weight_bits, args.symmetric, args.embedding_bits)
    ours, theirs = ((c.hidden_size, len(blocks_of(m))) for m in (student, teacher) for c in (m.config,))
    matching = [f"--{n}_weight 0" for n in ("hidden", "attention", "embedding", "feature") if getattr(args, f"{n}_weight")]
    if ours != theirs and matching:
        raise UserError(f"student and teacher differ in width and layers ({ours} and {theirs}), so their states cannot be "
                        f"matched. Use {' '.join(matching)}, or another --teacher_path")  # fmt: skip


def quantize_(model, args, batches: list | None = None) -> int:
    """Put the quantisers in, which is PTQ, and round by GPTQ where there are `batches`. FFN widths are filled with zeros up to
    what the group size divides: how many."""
    n_padded = pruning.pad_neurons_(model, args.group_size) if args.group_size > 0 else 0
    scheme = WeightScheme(args.weight_bits, args.group_size, args.symmetric, args.scale_method)
    tables = scheme._replace(bits=args.embedding_bits, group_size=args.embedding_group_size)
    linears = [linear for block in blocks_of(model) for linear in block.projections]
    head = [module for module in model.modules() if isinstance(module, torch.nn.Linear) and module not in linears
            and module.out_features != model.config.num_labels]  # fmt: skip
    moments = rounding.second_moments(model, head + linears, batches, args.precision, args.seed) if batches else {}
    quantizers.quantize_(model, head, scheme)  # a pooler: its weights alone, it sees one token an example
    quantizers.quantize_(model, linears, scheme, args.activation_bits, args.activations,
                         tables if args.embedding_bits < 32 else None)  # fmt: skip
    rounding.compensate_(model, moments)
    return n_padded


def save(directory: Path, model, tokenizer, args, kind: str) -> float:
    """Write the packed model; the bits that a quantised weight takes in it."""
    tensors = quantizers.packed_tensors(model)
    stage = {"asked": {"script": Path(__file__).name, "kind": kind} | args.settings}
    packed = (tensors, quantizers.packed_config(model))
    checkpoint.save_model(directory, model, tokenizer, stage, earlier=args.student, packed=packed)
    return quantizers.bits_per_weight(model, tensors)


def objective(output, attention, batch, teacher, states, args):
    """Distillation from cached outputs, mixed with cross-entropy, and from the states of the running teacher; in fp32."""
    index, mask = batch["index"], batch["attention_mask"]
    loss = args.distill_weight * distill.kd_loss(output.logits, teacher.logits[index], args.temperature)
    if args.distill_weight < 1:
        loss += (1 - args.distill_weight) * functional.cross_entropy(output.logits.float(), batch["labels"])
    if args.feature_weight:
        ours = output.hidden_states[-1][:, 0]
        loss += args.feature_weight * distill.feature_loss(ours, teacher.features[index], teacher.scale)
    if states is not None:
        hidden, of_attention = states
        ours = output.hidden_states
        for weight, a, b in ((args.hidden_weight, ours[1:], hidden[1:]), (args.embedding_weight, ours[:1], hidden[:1]),
                             (args.attention_weight, attention, of_attention)):  # fmt: skip
            if weight:
                loss += weight * distill.states_loss(a, b, mask)
    return loss


def fit(model, dense, split, args, run, teacher) -> None:
    """Quantisation-aware training; goes on from the run's checkpoint. The best weights, of an epoch or those it started from,
    are kept in best.safetensors. dense: the teacher itself where its states are to be matched, else None."""
    device, per_epoch = train_utils.choose_attention_(model), data.n_batches(split.train, args.batch_size, args.train_fraction)
    step, total, finished, losses = 0, args.num_epochs * per_epoch, False, []
    optimizer = train_utils.adamw(model, args.learning_rate, args.weight_decay, args.scale_rate)
    scaler = train_utils.grad_scaler(device, args.precision)
    stopping = train_utils.EarlyStopping(args.patience, args.min_delta)
    parts = {"model": model, "optimizer": optimizer, "scaler": scaler, "stopping": stopping}
    state, warning = checkpoint.load_checkpoint(run.checkpoint_dir)
    if state:
        step, finished, losses = state["step"], state["finished"], [*state["losses"].to(device)]
        checkpoint.restore_(state, parts)
        print(f"{f'warning: {warning}; ' if warning else ''}resumed at step {step:,} of {total:,}")
    run.rewind(step if state else -1)
    if not state:  # without training is a candidate too, where training loses more than noise
        accuracy = selection_accuracy(model, split, args)
        stopping.update(accuracy - args.min_delta)
        checkpoint.save_tensors(run.dir / "best.safetensors", model.state_dict())
        run.log(0, "ptq", selection_accuracy=accuracy)
        print(f"PTQ  selection accuracy {accuracy:.4f}", flush=True)
    forward = torch.compile(model, dynamic=True) if args.compile else model
    if dense is not None:
        train_utils.choose_attention_(dense)

    def keep():
        checkpoint.save_checkpoint(run.checkpoint_dir, parts, step=step, finished=finished, losses=torch.stack(losses))
        if stop_requested():
            raise runs.Interrupted(f"The same command goes on from step {step:,} of {total:,} ({run.dir})")

    taps = [distill.attention_outputs(blocks_of(m)) if dense is not None else nullcontext() for m in (model, dense)]
    with runs.stop_requests() as stop_requested, taps[0] as attention, taps[1] as of_attention:
        while step < total and not finished:
            epoch, done = divmod(step, per_epoch)
            batches = data.epoch_batches(split.train, args.batch_size, args.train_fraction, args.seed, epoch)[done:]
            losses, start = losses if done else [], time.perf_counter()
            model.train()
            ahead = data.loader(split.train, batches, device)
            for batch in tqdm(ahead, f"qat {epoch + 1}/{args.num_epochs}", per_epoch, initial=done, leave=False, mininterval=1):
                step += 1
                states = None
                with train_utils.autocast(device, args.precision):
                    if dense is not None:
                        with torch.no_grad():
                            states = dense(**data.inputs_of(batch), output_hidden_states=True).hidden_states, of_attention
                    output = forward(**data.inputs_of(batch), output_hidden_states=True)
                loss = objective(output, attention, batch, teacher, states, args)
                scaler.scale(loss).backward()
                factor = train_utils.linear_schedule(step - 1, total, args.warmup)
                train_utils.step_(model, optimizer, scaler, args.learning_rate * factor)
                losses.append(loss.detach())
                if step % per_epoch and (step % args.save_every == 0 or stop_requested()):
                    train_utils.mean_loss(losses, model, step)
                    keep()
            loss = train_utils.mean_loss(losses, model, step)
            rate = sum(map(len, batches)) / (time.perf_counter() - start)
            accuracy = selection_accuracy(model, split, args)
            run.log(step, "qat", loss=loss, selection_accuracy=accuracy, examples_per_second=rate)
            if stopping.update(accuracy):
                checkpoint.save_tensors(run.dir / "best.safetensors", model.state_dict())
            finished = stopping.stop
            print(f"epoch {epoch + 1}/{args.num_epochs}  loss {loss:.4f}  selection accuracy {accuracy:.4f}  "
                  f"{rate:,.0f} examples/s", flush=True)  # fmt: skip
            keep()


def selection_accuracy(model, split, args) -> float:
    logits = eval_utils.predict(model, split.selection, model.device, args.precision)
    return eval_utils.classification_metrics(logits, split.selection.labels)["accuracy"]


def print_plan(args, model, split, n_padded: int) -> None:
    per_epoch = data.n_batches(split.train, args.batch_size, args.train_fraction)
    kind, n = "symmetric" if args.symmetric else "asymmetric", data.n_in_epoch(split.train, args.train_fraction)
    layers = ", ".join(f"{block.attention.n_heads}/{block.ffn.n_neurons}" for block in blocks_of(model))
    memory = train_utils.training_memory(model, args.batch_size, int(split.train.lengths.max()), args.precision)
    print(f"""student   {args.student}; heads/neurons {layers} with {n_padded} of zeros
teacher   {args.teacher}
weights   {args.weight_bits} bits, {kind}, {args.scale_method}, groups of {args.group_size}
others    inputs {args.activation_bits} bits, {args.activations}; embeddings {args.embedding_bits} bits
examples  {n:,} of {len(split.train):,} an epoch; {len(split.selection):,} to select
steps     {args.num_epochs * per_epoch:,} in {args.num_epochs} epochs; batch {args.batch_size}, {args.precision}, {args.device}
memory    about {memory / 2**20:,.0f} MiB for a step on the longest batch
""", flush=True)


def main(argv=None) -> None:
    parser = runs.Parser(__doc__, PRESETS, shared=tuple(runs.SHARED_FLAGS))
    parser.add_argument("--pruned_model_path", type=Path, help="classifier to quantise [the latest of script 8 under out/]")
    parser.add_argument("--export", default="none", choices=("none", "onnx", "onnx_int8"),
                        help="write model.onnx too, with inputs of fp32 or int8, and run it [none]")  # fmt: skip
    parser.add_argument("--teacher_path", type=Path, help="its dense model [the one that its run names]")
    args = parser.parse_args(argv)
    runs.quiet_transformers()
    for package in ("compressed_tensors", *(("onnx", "onnxruntime", "onnxscript") if args.export != "none" else ())):
        runs.require(package, "--export onnx" if package.startswith("onnx") else "the packed format")
    device = runs.resolve_device(args.device)
    train_utils.check_compiler(device, "--compile", args.compile)
    args.device, args.precision = str(device), train_utils.resolve_precision(args.precision, device)
    # Everything that can be refused is refused before a model is loaded
    task = assets.prepare_task(args.task, args.data_dir, args.source, args.local_dir, args.text_column, args.label_column)
    args.student = find_student(args, task)
    args.teacher = find_teacher(args, args.student)
    shape = outline(args.student)
    check(args, shape, outline(args.teacher), data.label_names(task.path))
    args.learning_rate = args.learning_rate or 0.2 / shape.config.hidden_size / 2**args.weight_bits  # coarse steps, large ones
    tokenizer = data.load_tokenizer(args.student, shape.config)
    split = data.load_classification(task.path, tokenizer, args.max_length, args.n_selection, args.validation_fraction,
                                     args.seed)  # fmt: skip
    n_padded = quantize_(shape, args)
    print_plan(args, shape, split, n_padded)
    if args.dry_run:
        return

    skipped = (*runs.NO_RESULT, "student", "teacher", "pruned_model_path", "teacher_path")
    args.settings = {"script": Path(__file__).name} | {n: v for n, v in vars(args).items() if n not in skipped}
    args.settings["assets"] = [{key: task.record[key] for key in ("name", "source", "sha256")}]
    args.settings |= {name: checkpoint.digest(getattr(args, name)) for name in ("student", "teacher")}
    with Run(args.out_dir, "qat", args.settings, args.run_name, args.resume, tensorboard=args.tensorboard) as run:
        print(f"quantising: {run.dir}{' (finished before; --resume never starts anew)' if run.finished else ''}", flush=True)
        if not run.finished:
            runs.seed_everything(args.seed)
            model = load_classifier(args.student, dropout=args.dropout).to(device)
            sample = split.train.subset(np.arange(min(N_CALIBRATION, len(split.train))))
            batches = list(data.loader(sample, data.in_order(sample.lengths, 64), device))
            with run.timed("quantising"):
                quantize_(model, args, batches if args.rounding == "gptq" and args.scale_method != "minmax" else None)
                with eval_utils.evaluating(model):
                    quantizers.calibrate_(model, map(data.inputs_of, batches))
            bits = {"ptq": save(run.dir / "ptq", model, tokenizer, args, "ptq")}
            if args.num_epochs:
                dense = load_classifier(args.teacher).to(device).eval()
                with run.timed("teacher"):
                    n_seen = args.num_epochs * data.n_in_epoch(split.train, args.train_fraction)
                    seen = split.train.subset(np.arange(min(n_seen, len(split.train))))
                    look = partial(eval_utils.predict, dense, seen, device, args.precision, features=True)
                    key = runs.fingerprint(args.settings)
                    cached = distill.Teacher.cached(run.dir / "teacher.safetensors", key, look, device)
                running = bool(args.hidden_weight or args.attention_weight or args.embedding_weight)
                with run.timed("training"):
                    fit(model, dense if running else None, split, args, run, cached)
                model.load_state_dict(checkpoint.load_tensors(run.dir / "best.safetensors"))
            bits["qat"] = save(run.model_dir, model, tokenizer, args, "qat" if args.num_epochs else "ptq")
            with run.timed("measuring"):  # what was saved, not what is in memory
                dirs = {"dense": args.teacher} | ({} if args.student == args.teacher else {"pruned": args.student})
                dirs |= {"ptq": run.dir / "ptq", **({"qat": run.model_dir} if args.num_epochs else {})}
                onnx = export_onnx.exported(model, run.dir / "model.onnx", args.export)
                measured, logits = eval_utils.measure_classifiers(dirs, split.validation, device, others=onnx)
                for name, session in onnx.items():
                    logits[name] = export_onnx.predict(session, split.validation)
                    measured[name] |= eval_utils.classification_metrics(logits[name], split.validation.labels)
                    measured[name]["bytes"] = (run.dir / "model.onnx").stat().st_size
                model.set_attn_implementation("sdpa")  # as loaded models have it: other kernels round other inputs otherwise
                ours = eval_utils.predict(model, split.validation, device)
            packed = logits["qat" if args.num_epochs else "ptq"]
            for name in bits.keys() & measured.keys():
                measured[name]["bits_per_weight"] = bits[name]
            run.record |= {"metrics": measured, "reload_difference": float((packed - ours).abs().max()),
                           "reload_agreement": float((packed.argmax(1) == ours.argmax(1)).float().mean()),
                           "dense_dir": args.teacher, "student_dir": args.student,
                           "layers": [block.shape for block in blocks_of(model)]}  # fmt: skip
            checkpoint.drop(run.checkpoint_dir, run.dir / "best.safetensors", run.dir / "teacher.safetensors")

    print("", table(eval_utils.comparison(run.record["metrics"])), sep="\n\n")
    print(f"\nlogits after packing and loading: {run.record['reload_difference']:.1e} away, "
          f"{run.record['reload_agreement']:.2%} of the predictions the same")  # fmt: skip
    print("\n" + "   ".join(f"{phase} {seconds:.0f} s" for phase, seconds in run.record["timings"].items()))
    curves = f"\ncurves  {run.dir / 'history.csv'}" if args.num_epochs else ""
    print(f"\nmodel   {run.model_dir}\nrecord  {run.dir / 'run.json'}{curves}")


if __name__ == "__main__":
    runs.run_script(main)
