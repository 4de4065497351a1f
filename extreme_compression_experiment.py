"""A causal language model on a tenth of its weights: pruned, trained back with the zeros kept, perplexity followed throughout.

    python extreme_compression_experiment.py --fast                        the tiny LM: minutes, offline
    python extreme_compression_experiment.py --sparsity 0.1                keep 10 % of the weights
    python extreme_compression_experiment.py --sparsity 0.1 --batch-size 4
    python extreme_compression_experiment.py --sparsity 0.1 --model opt-350m --batch-size 8
    torchrun --nproc_per_node 4 extreme_compression_experiment.py --sparsity 0.1 --model llama-2-7b --batch_size 8

--sparsity is the share of weights that is KEPT (--density is the same flag by its clear name): 0.05 is harder than 0.1. An
epoch is of 10000 windows of text: 10000 / batch_size steps, at a learning rate of 5e-6 * sqrt(batch_size), so that the batch
size changes the speed and not the data. Pruned is at once by main_block.py, by default with its kfac and uneven allocation;
or, with --schedule cubic (arXiv 1710.01878), bit by bit while the model trains. The dense model teaches: its predictions and
what its blocks give (--no_distill: the text alone). Several processes of torchrun share the model by FSDP2: same results.

Reads a model and text (1_prepare_data.py; prepares what is missing). Writes out/extreme/<run>/: model/ (the best by validation
loss, which stock transformers loads), with --format sparse also sparse/ (a bit a weight and the values), run.json,
history.csv. Killed? The same command goes on. The manual: docs/extreme_compression_experiment.md.
"""

from __future__ import annotations

import shutil
from contextlib import nullcontext
from pathlib import Path

import torch
from accelerate import PartialState
from transformers import AutoModelForCausalLM

from common import assets, checkpoint, data, eval_utils, finetuning, following, generation, one_shot, runs, sparse_trainer, text
from common.checkpoint import load_causal_lm
from common.gradual import Cubic, GradualTrainer
from common.optimizers import OPTIMIZERS, WHOLE_ONLY, check_optimizer, for_trainer, trainers_own
from common.runs import Run, UserError, table
from common.sharding import shard_
from common.streaming import StreamedLM, measured_sparsity
from common.train_utils import PRECISIONS, check_compiler

PRESETS = [
    # flag, full, fast, meaning, limits
    ("base_samples", 10000, 1000, "windows of an epoch; its steps are base_samples / batch_size", (1, 10**9)),
    ("num_epochs", 5, 2, "epochs", (1, 10**4)),
    ("batch_size", 1, 8, "windows an optimizer step, over all processes", (1, 10**5)),
    ("base_lr", 5e-6, 1e-3, "the peak learning rate is base_lr * sqrt(batch_size)", (0, 1)),
    ("block_size", 512, 256, "tokens of a window", (2, 10**6)),
    ("max_eval_samples", 200, 64, "validation windows, which choose the best epoch; 0: all", (0, 10**9)),
    ("patience", 0, 0, "epochs without a better validation perplexity before training stops; 0: never", (0, 10**4)),
    ("prune_method", "kfac", "kfac", "of main_block.py; none: the model is pruned already", (*one_shot.METHODS, "none")),
    ("sparsity_type", "unstructured", "unstructured", "unstructured, block, or N:M such as 1:8"),
    ("pattern_block", "16", "16", "of --sparsity_type block: 16, or rows x columns such as 32x8"),
    ("allocation", "auto", "auto", "of sparsity to projections", ("auto", "uniform", "owl", "sensitivity")),
    ("allocation_limit", 0.0, 0.0, "no projection's sparsity is further from the model's; 0: main_block.py's own", (0, 1)),
    ("nsamples", 128, 32, "pieces of calibration text", (1, 10**6)),
    ("schedule", "one_shot", "one_shot", "pruned at once, or while the model trains", ("one_shot", "cubic")),
    ("initial_density", 0.5, 0.5, "of cubic: what the pruning before training leaves; 1: nothing is pruned before", (1e-3, 1)),
    ("schedule_share", 0.5, 0.5, "of cubic: the share of all steps in which the sparsity rises", (1e-3, 1)),
    ("prune_every", 10, 10, "of cubic: steps between two prunings", (1, 10**6)),
    ("scheduler", "cosine", "cosine", "of the learning rate", ("linear", "cosine", "constant_with_warmup")),
    ("warmup", 0.03, 0.03, "share of the steps in which the learning rate rises", (0, 1)),
    ("weight_decay", 0.0, 0.0, "of the optimizer, on matrices", (0, 10)),
    ("optim", "adamw", "adamw", "optimizer; adamw_stochastic (for bf16 weights), adamw_8bit need torchao", OPTIMIZERS),
    ("freeze_embeddings", False, False, "embeddings and output head stay as they are"),
    ("gradient_checkpointing", True, False, "compute a block's inside again in the backward, to save memory"),
    ("distill", True, True, "learn from the dense model"),
    ("distill_weight", 1.0, 1.0, "its predictions' share in the loss", (0, 1)),
    ("hidden_weight", 10.0, 10.0, "of matching what each of its blocks gives, added", (0, 10**4)),
    ("temperature", 1.0, 1.0, "of distillation", (0.01, 1000)),
]
SHARED = ("model", "source", "local_dir", "data_dir", "out_dir", "run_name", "resume", "save_every", "seed", "device",
          "compile", "dry_run")  # fmt: skip
NO_RESULT = (*runs.NO_RESULT, "dataset", "eval_text", "token_length", "stride", "with_tracking", "generation_metrics", "format",
             "gradient_accumulation_steps", "gradient_checkpointing", "compile", "device", "fast", "dense_model")  # fmt: skip
#  what changes nothing with these settings, and so is no part of the configuration
IDLE = {lambda args: not args.distill: ("distill_weight", "hidden_weight", "temperature"),
        lambda args: args.schedule == "one_shot": ("initial_density", "schedule_share", "prune_every"),
        lambda args: args.sparsity_type != "block": ("pattern_block",),
        lambda args: args.prune_method == "none": ("allocation", "allocation_limit", "nsamples")}  # fmt: skip


def prune(args, base: assets.Asset, source: assets.Asset, density: float) -> Path:
    """`base` pruned by main_block.py to a density; done once. Its directory."""
    flags = {"model": base.path, "prune_method": args.prune_method, "sparsity_ratio": f"{1 - density:.6g}",
             "sparsity_type": args.sparsity_type, "block_size": args.pattern_block, "allocation": args.allocation,
             "allocation_limit": args.allocation_limit, "nsamples": args.nsamples, "calibration": args.dataset,
             "seed": args.seed, "source": args.source, "data_dir": args.data_dir, "out_dir": args.out_dir,
             "device": args.device}  # fmt: skip
    flags |= {"local_dir": args.local_dir} if args.local_dir else {}
    of_content = flags | {"model": base.record["sha256"], "calibration": source.record["sha256"], "out_dir": "", "data_dir": ""}
    made = args.out_dir / "one_shot" / f"extreme-{runs.fingerprint(of_content)}"
    if not ((made / "run.json").exists() and runs.read_json(made / "run.json").get("status") == "finished"):
        words = [str(word) for flag, value in flags.items() for word in (f"--{flag}", value)]
        if code := finetuning.run_main_block([*words, "--run_name", made.name]):
            raise UserError(f"main_block.py ended with exit status {code}: there is no pruned model to train")
    return Path(runs.read_json(made / "run.json")["model_dir"])


def train(args, dense: Path, start: Path, windows, run: Run, processes: PartialState, forward: int, measure):
    """The trainer's state at the end and, on the first process, the trained weights; None where it was stopped before."""
    is_main, per_epoch = processes.is_main_process, len(windows["train"]) // args.batch_size
    total = per_epoch * args.num_epochs
    model = load_causal_lm(start, finetuning.stored_dtype(args.precision, False))
    model.config.use_cache = False
    if args.freeze_embeddings:
        finetuning.freeze_embeddings_(model)
    masks, sparsity = sparse_trainer.masks_of(model), sparse_trainer.check_sparsity(model)
    if args.fsdp:
        shard_(model, args.device, finetuning.HALVES.get(args.precision))
    teacher = load_causal_lm(dense).to(processes.device).requires_grad_(False).eval() if args.distill else None
    arguments = finetuning.arguments(
        run, args.seed, args.device, args.precision, max_steps=total, per_device_train_batch_size=forward,
        per_device_eval_batch_size=forward, gradient_accumulation_steps=args.gradient_accumulation_steps,
        learning_rate=args.base_lr * args.batch_size**0.5, weight_decay=args.weight_decay, lr_scheduler_type=args.scheduler,
        warmup_steps=round(args.warmup * total), max_grad_norm=1.0, optim=trainers_own(args.optim), torch_compile=args.compile,
        activation_checkpointing=args.gradient_checkpointing, logging_steps=max(1, per_epoch // 10), eval_strategy="steps",
        eval_steps=per_epoch, save_strategy="steps", save_steps=per_epoch, load_best_model_at_end=True,
        metric_for_best_model="eval_loss", greater_is_better=False,
        report_to="wandb" if args.with_tracking == "wandb" else "none")  # fmt: skip
    follow = following.Following(run if is_main else None, per_epoch, args.num_epochs, measure)
    kind, more = sparse_trainer.SparseTrainer, {}
    if args.schedule == "cubic":
        kind, n = GradualTrainer, max(1, round(args.schedule_share * total))
        more = {"schedule": Cubic(sparsity, 1 - args.density, n, args.prune_every)}
    with runs.stop_requests() as requested, run.timed("training") if is_main else nullcontext():
        stop = finetuning.StopTogether(requested, args.save_every)
        callbacks = [stop, follow, *([finetuning.Patience(args.patience, 0.0)] if args.patience else [])]
        trainer = follow.trainer = kind(
            model=model, args=arguments, train_dataset=windows["train"], eval_dataset=windows["validation"], masks=masks,
            teacher=teacher, distill_weight=args.distill_weight, hidden_weight=args.hidden_weight, temperature=args.temperature,
            optimizer_cls_and_kwargs=for_trainer(args.optim, arguments.learning_rate, model), callbacks=callbacks,
            **more)  # fmt: skip
        finetuning.quiet_(trainer)
        resumed = sparse_trainer.last_checkpoint(run.checkpoint_dir, drop=shutil.rmtree if is_main else None)
        processes.wait_for_everyone()
        if resumed and (resumed / sparse_trainer.SHARDS).is_dir() != args.fsdp:
            raise UserError(f"{resumed}: was saved by {'one process' if args.fsdp else 'several processes'}, and so it has to "
                            "go on; or start anew with --resume never")  # fmt: skip
        if is_main:
            print(f"\ntraining     {total:,} steps{f', resumed from {resumed}' if resumed else ''}", flush=True)
        with following.memory_told(follow, forward, args.block_size, args.gradient_accumulation_steps):
            trainer.train(resume_from_checkpoint=str(resumed) if resumed else None)
        stopped = stop.stopped and trainer.state.global_step < total
        return trainer.state, None if stopped else trainer.full_state()


def parse_args(argv):
    parser = runs.Parser(__doc__, PRESETS, shared=SHARED)
    kept = parser.add_mutually_exclusive_group()
    for flag, meaning in (("--sparsity", "share of the blocks' weights that is KEPT [0.1]"), ("--density", "the same")):
        kept.add_argument(flag, dest="density", type=float, default=0.1, help=meaning)
    parser.add_argument("--dense_model", type=Path, help="of --prune_method none: teacher and first row [by the record]")
    parser.add_argument("--dataset", default="auto", help="wikitext2, news, c4, a path, or auto: what is prepared [auto]")
    parser.add_argument("--eval_text", default="auto", help="text that perplexity is followed on; also a path [auto]")
    parser.add_argument("--token_length", type=int, default=0, help="of its windows; 0: the model's, at most 2048 [0]")
    parser.add_argument("--stride", type=int, default=0, help="of its windows; 0: --token_length [0]")
    parser.add_argument("--precision", default="auto", choices=(*PRECISIONS, "bf16"), help="bf16: all of it [auto]")
    parser.add_argument("--gradient_accumulation_steps", type=int, default=1, help="forwards that make a batch [1]")
    parser.add_argument("--format", default="dense", choices=("dense", "sparse"), help="sparse: as bits and values too [dense]")
    parser.add_argument("--with_tracking", nargs="?", const="tensorboard", default="none",
                        choices=("none", "tensorboard", "wandb"), help="curves there; alone: tensorboard [none]")  # fmt: skip
    parser.add_argument("--generation_metrics", type=int, default=0, metavar="N", help="BLEU, ROUGE of N continuations [0]")
    args = parser.parse_args(argv)
    if args.dense_model and args.prune_method != "none":
        parser.error("--dense_model: is for --prune_method none; else --model is the dense one")
    if not 0.001 <= args.density <= 1:
        parser.error(f"--sparsity {args.density}: is the share of weights that is kept; expected 0.001 to 1")
    for flag, least in (("gradient_accumulation_steps", 1), ("generation_metrics", 0)):
        if getattr(args, flag) < least:
            parser.error(f"--{flag} {getattr(args, flag)}: expected {least} or more")
    if args.base_samples < args.batch_size:
        parser.error(f"--base_samples {args.base_samples}: is less than one --batch_size {args.batch_size}")
    pattern = one_shot.parse_pattern(args.sparsity_type, args.pattern_block)
    if args.prune_method != "none" and pattern.sparsity and abs(1 - pattern.sparsity - args.density) > 1e-6:
        parser.error(f"--sparsity_type {pattern}: keeps {1 - pattern.sparsity:g} of the weights, and --sparsity asks for "
                     f"{args.density:g}. Give both alike")  # fmt: skip
    if pattern.sparsity and args.allocation not in ("auto", "uniform"):
        parser.error(f"--allocation {args.allocation}: every projection has the density of {pattern}. Use uniform")
    if args.schedule == "cubic":
        if pattern.kind != "unstructured" or args.optim not in ("adamw", "adamw_stochastic"):
            parser.error(f"--schedule cubic: prunes single weights by AdamW's moments, not {pattern} with {args.optim}. "
                         "Expected --sparsity_type unstructured and --optim adamw or adamw_stochastic")  # fmt: skip
        if args.initial_density < args.density:
            parser.error(f"--initial_density {args.initial_density}: is below --sparsity {args.density}, where it is to end")
    if not (args.model in ("auto", "tiny_llama", *assets.CAUSAL_LMS) or "/" in args.model or Path(args.model).exists()):
        parser.error(f"--model {args.model}: no such directory, and no short name that is known: tiny_llama, "
                     f"{', '.join(assets.CAUSAL_LMS)}. Expected one of these, or a hub name as OWNER/NAME")  # fmt: skip
    if args.device.startswith("cuda:"):
        parser.error(f"--device {args.device}: name GPUs by CUDA_VISIBLE_DEVICES, and --device cuda")
    device = runs.resolve_device(args.device)
    args.device = device.type
    args.precision = finetuning.lm_precision(args.precision, device)
    finetuning.check_tracking(args.with_tracking, f"--with_tracking {args.with_tracking}")
    check_optimizer(args.optim, "--optim")
    check_compiler(device, "--compile", args.compile)
    for package in generation.SCORERS if args.generation_metrics else ():
        runs.require(package, "--generation_metrics")
    return args, device


def check(args, base: Path, outline, source, streams, tested_stream, n_processes: int) -> tuple[int, int]:
    """Everything that can be refused before a model is loaded. Windows of a forward, and tokens of an evaluation's window."""
    longest = data.n_positions(outline.config)
    if longest and args.block_size > longest:
        raise UserError(f"--block_size {args.block_size}: this {outline.config.model_type} model has {longest} positions")
    parts = args.gradient_accumulation_steps * n_processes
    if args.batch_size % parts:
        raise UserError(f"--batch_size {args.batch_size}: {n_processes} processes with {args.gradient_accumulation_steps} "
                        "forwards each do not divide it")  # fmt: skip
    args.fsdp = n_processes > 1
    if args.fsdp and args.optim in WHOLE_ONLY:
        raise UserError(f"--optim {args.optim}: cannot step on the pieces of several processes. Expected adamw or "
                        "adamw_stochastic")  # fmt: skip
    names = [*sparse_trainer.prunable_weights(outline)]
    if args.prune_method != "none":
        StreamedLM(base, torch.device("cpu"))  # all tensors are there
        for name in names:
            pattern = one_shot.parse_pattern(args.sparsity_type, args.pattern_block)
            one_shot.check_shape(pattern, tuple(outline.get_parameter(name).shape), name)
    elif args.schedule == "one_shot" and abs((found := 1 - measured_sparsity(base, names)) - args.density) > 0.005:
        raise UserError(f"--prune_method none: {base} has density {found:.4f}, and --sparsity asks for {args.density:g}")
    for split in ("train", "validation"):
        finetuning.Windows(streams[split], args.block_size)
    if args.generation_metrics and (short := min(len(tested_stream), longest or 128)) < 128:
        raise UserError(f"--generation_metrics: needs 128 tokens of text and positions, here are {short}")
    length = args.token_length or min(2048, longest or 2048)
    eval_utils.check_perplexity(outline, tested_stream, length, args.stride or length, None, "tokens")
    return args.batch_size // parts, length


def main(argv=None) -> None:
    runs.quiet_transformers()
    args, device = parse_args(argv)
    processes = finetuning.join(args.device)
    is_main = processes.is_main_process
    with processes.main_process_first():  # what is missing is made once
        base = assets.resolve_model("tiny_llama" if args.model == "auto" else args.model, args.data_dir, args.source)
        outline = checkpoint.outline(base.path, AutoModelForCausalLM)
        tokenizer = data.load_tokenizer(base.path, outline.config)
        source = text.prepare_text(args.dataset, args.data_dir, args.source, args.local_dir)
        streams = {split: text.token_stream(source.path, split, tokenizer) for split in ("train", "validation")}
        tested = text.prepare_text(args.eval_text, args.data_dir, args.source, args.local_dir)
        split = "test" if "test" in tested.record["splits"] else "validation"
        stream = text.token_stream(tested.path, split, tokenizer)
    dense = base.path if args.prune_method != "none" else args.dense_model or finetuning.find_dense(args.out_dir, base.path)
    if dense is None and args.distill:
        raise UserError(f"--prune_method none: no record names the dense model of {base.path}, which teaches. Give it as "
                        "--dense_model DIR, or add --no_distill")  # fmt: skip
    if args.distill and dense != base.path:
        teacher = checkpoint.outline(dense, AutoModelForCausalLM)
        finetuning.check_teacher(outline, teacher, f"--dense_model {dense}", args.hidden_weight)
    forward, length = check(args, base.path, outline, source, streams, stream, processes.num_processes)
    windows = {split: finetuning.Windows(streams[split], args.block_size, n or None, overlap=split == "train")
               for split, n in (("train", args.base_samples), ("validation", args.max_eval_samples))}  # fmt: skip
    windows["train"].drop_rest_(args.batch_size)
    idle = [flag for is_idle, flags in IDLE.items() if is_idle(args) for flag in flags]
    settings = {"script": Path(__file__).name} | {n: v for n, v in vars(args).items() if n not in (*NO_RESULT, "fsdp", *idle)}
    settings |= {"assets": [{key: asset.record.get(key) for key in ("name", "source", "sha256")} for asset in (base, source)]}
    how = "as it is" if args.prune_method == "none" else args.prune_method
    how = how if args.schedule == "one_shot" else f"while training (cubic), before it {how}"
    n = sum(p.numel() for p in outline.parameters())
    if is_main:
        print(f"""model        {base.record["name"]} ({base.record["source"]}), {n / 1e6:,.1f} M parameters
text         {source.record["name"]}, {len(streams["train"]):,} tokens; perplexity on {tested.record["name"]}, {split}
pruning      {how}, to density {following.shown(args.density)} (sparsity {following.shown(1 - args.density)})
training     {args.num_epochs} epochs of max_step={args.base_samples // args.batch_size} (batch_size={args.batch_size}), \
lr={args.base_lr * args.batch_size**0.5:.3g}{", taught by the dense model" * args.distill}
running      {args.precision}, {args.device}, {processes.num_processes} process{"es (FSDP2)" * args.fsdp}""", flush=True)
    if args.dry_run:
        return
    run = Run(args.out_dir, "extreme", settings, args.run_name, args.resume, tensorboard=args.with_tracking == "tensorboard")
    if not run.model_dir.exists():  # three checkpoints, some of which may be there
        there = eval_utils.directory_bytes(run.checkpoint_dir)
        finetuning.check_space(args.out_dir, 3 * (6 if args.precision == "bf16" else 12) * n - there)
    measure = following.Perplexity(f"{tested.record['name']} {split}", stream, length, args.stride, device, args.precision)
    with run if is_main else nullcontext(), finetuning.ends_told(run):
        processes.wait_for_everyone()
        if is_main:
            print(f"run          {run.dir}{' (finished before; --resume never starts anew)' * run.finished}", flush=True)
            prepare(args, base, dense or base.path, outline, run, measure, source, tested)
        processes.wait_for_everyone()
        known = runs.read_json(run.dir / "run.json")
        start, done = Path(known["student_dir"]), "model_dir" in known and checkpoint.is_result_of(run.model_dir, run.config)
        processes.wait_for_everyone()
        ended, weights = (None, {}) if done else train(args, dense, start, windows, run, processes, forward, measure)
        finetuning.part()  # the first process goes on alone
        if weights is None:
            raise runs.Interrupted(f"The same command goes on from step {ended.global_step:,} ({run.dir})")
        if weights:
            with run.timed("writing"):
                if lost := finetuning.write_full(weights, start, run.model_dir, tokenizer, run):
                    checkpoint.drop(run.model_dir)
                    raise RuntimeError(f"{run.model_dir}: {lost:,} weights that were zero are not any more")
            best = ended.best_global_step // (len(windows["train"]) // args.batch_size)
            run.record |= {"best_epoch": best, "model_dir": run.model_dir, "dense_dir": dense or base.path}
            run.save()
        if is_main:
            finish(args, run, dense or base.path, start, tested, tokenizer, stream, outline, device)


def prepare(args, base, dense: Path, outline, run: Run, measure, source, tested) -> None:
    """The model that training begins with, and the perplexities before; what is done is not done again."""
    known, asked = run.record.get("perplexity", {}), [tested.record["sha256"], measure.length, measure.stride]
    if known and run.record["followed"] != asked:
        raise UserError(f"{run.dir}: is followed on another --eval_text, --token_length or --stride. To measure its model "
                        "again: python main_block.py --model DIR --eval. To start anew: --resume never")  # fmt: skip
    if "dense" not in known:
        known["dense"] = measure.of(dense, "Dense Evaluation (Before Pruning)", "Dense Perplexity")
    density = args.initial_density if args.schedule == "cubic" else args.density
    start = base.path
    if args.prune_method != "none" and density < 1:
        with run.timed("pruning"):
            start = prune(args, base, source, density)
    if run.record.get("student_dir") != str(start) or "baseline" not in known:
        known["baseline"] = measure.of(start, "Baseline Evaluation (Before Training)", "Baseline Perplexity")
    run.record |= {"student_dir": str(start), "perplexity": known, "followed": asked}
    if found := following.explain(known["baseline"], known["dense"], start, dense, density, outline.config.vocab_size):
        print(f"\n{found}", flush=True)
        run.record["warning"] = found
    run.save()


def finish(args, run: Run, base: Path, start: Path, tested, tokenizer, stream, outline, device) -> None:
    """The summary, and the table of models as they are on the disk."""
    models = {"dense": base, "pruned": start, "trained": run.model_dir}
    if not eval_utils.is_measure_of(run.record.get("evaluation"), tested, outline.config, args.token_length, args.stride):
        with run.timed("measuring"):
            found = finetuning.perplexities(models, tested, device, args.token_length, args.stride)
        run.record["metrics"], run.record["evaluation"] = found
        run.save()
    if args.generation_metrics:
        following.score_continuations(run.record, models, tokenizer, stream, args.generation_metrics, device)
        run.save()
    if args.format == "sparse" and not ("sparse" in run.record and (run.dir / "sparse").exists()):
        sizes = checkpoint.save_bitmask(run.model_dir, run.dir / "sparse", [*sparse_trainer.prunable_weights(outline)])
        run.record["sparse"] = sizes | {"dir": run.dir / "sparse"}
        run.save()
    checkpoint.drop(run.checkpoint_dir)
    print(f"{following.summary(run.record)}\n")
    print(table(eval_utils.comparison(run.record["metrics"])))
    sparsity = run.record["sparsity"]["after"]
    print(f"\ndensity {1 - sparsity:.4f} (sparsity {sparsity:.4f}), measured on the disk")
    if sparse := run.record.get("sparse"):
        print(f"sparse  {sparse['dir']}: {sparse['sparse_bytes']:,} bytes instead of {sparse['dense_bytes']:,} "
              f"({sparse['ratio']:.3f}), rebuilt bit for bit")  # fmt: skip
    print("   ".join(f"{phase} {seconds:.0f} s" for phase, seconds in run.record["timings"].items()))
    print(f"\nmodel   {run.record['model_dir']}\nrecord  {run.dir / 'run.json'}")


if __name__ == "__main__":
    runs.run_script(main)
