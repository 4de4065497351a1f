"""Fine-tuning of a sparse causal language model that keeps every zero: all weights, or LoRA, in one process or many.

    python finetune_dense.py --fast                                   the tiny LM, pruned by 16x16 blocks first: minutes
    python finetune_dense.py --model DIR --save DIR                   a model that main_block.py pruned
    bash run_dense_finetune_block_20sparsity.sh --num_gpus 2          the same under torchrun, with memory checked before

"Dense" is the training: every weight that is not zero learns. Masks are taken once, from the model as it is (blocks as their
indices, else a bit a weight); gradients are masked where they arise, and weights too where an optimizer could move them
(common/sparse_trainer.py). LoRA's adapters are trained through the mask, so that the merged model is the trained one.
--distill_from adds the predictions of the dense model. One process or many: the same batch gives the same curve.

Reads a sparse model and text (1_prepare_data.py; prepares what is missing). Writes the best model by validation loss where
--save says (default: out/finetune/<run>/model), run.json, history.csv. Killed? The same command goes on from the last
checkpoint. Ends with a table: perplexity of dense, pruned, LoRA, full. The manual: docs/finetune_dense.md.
"""

from __future__ import annotations

import shutil
import subprocess
import sys
from contextlib import nullcontext
from pathlib import Path

import torch
from accelerate import PartialState
from transformers import AutoModelForCausalLM

from common import assets, checkpoint, data, eval_utils, finetuning, lora, memory_plan, runs, sparse_trainer, text, train_utils
from common.checkpoint import load_causal_lm
from common.optimizers import OPTIMIZERS, WHOLE_ONLY, check_optimizer, for_trainer, trainers_own
from common.runs import Run, UserError, table
from common.sharding import shard_
from common.sparse_trainer import SparseTrainer

PRESETS = [
    # flag, full, fast, meaning, limits
    ("num_epochs", 3.0, 1.0, "passes over the training windows", (1e-6, 10**4)),
    ("learning_rate", 5e-5, 5e-4, "its peak", (0, 1)),
    ("batch_size", 1, 8, "windows a device and forward", (1, 10**5)),
    ("effective_batch_size", 8, 8, "windows an optimizer step, over all devices and accumulated forwards", (1, 10**6)),
    ("block_size", 1024, 256, "tokens of a window", (2, 10**6)),
    ("max_train_samples", 30000, 1200, "training windows at most, evenly from the text; 0: all", (0, 10**9)),
    ("max_eval_samples", 1000, 64, "validation windows at most; 0: all", (0, 10**9)),
    ("n_evaluations", 6, 4, "times that the validation windows are scored, evenly", (1, 10**4)),
    ("patience", 3, 3, "evaluations without a better loss before training stops", (1, 10**4)),
    ("min_delta", 0.0, 0.0, "nats a token that count as better", (0, 100)),
    ("scheduler", "cosine", "cosine", "of the learning rate", ("linear", "cosine", "constant_with_warmup")),
    ("warmup", 0.03, 0.03, "share of the steps in which the learning rate rises", (0, 1)),
    ("weight_decay", 0.0, 0.0, "of the optimizer, on matrices", (0, 10)),
    ("optim", "adamw", "adamw", "optimizer; adamw_stochastic (for bf16 weights), adamw_8bit need torchao", OPTIMIZERS),
    ("freeze_embeddings", False, True, "of --method full: embeddings and output head stay as they are"),
    ("gradient_checkpointing", True, False, "compute a block's inside again in the backward, to save memory"),
    ("lora_r", 8, 8, "rank of the adapters", (1, 10**4)),
    ("lora_alpha", 16.0, 16.0, "their scale is lora_alpha / lora_r", (1e-6, 10**6)),
    ("lora_dropout", 0.05, 0.05, "before the adapters", (0, 0.9)),
    ("distill_from", "none", "dense", "model to learn from as well: a directory, or dense: the one the pruning's record names"),
    ("distill_weight", 0.5, 1.0, "share of --distill_from in the loss", (0, 1)),
    ("hidden_weight", 0.0, 10.0, "of matching what each of its blocks gives, added", (0, 10**4)),
    ("temperature", 1.0, 1.0, "of distillation", (0.01, 1000)),
]
SHARED = ("model", "source", "local_dir", "data_dir", "out_dir", "run_name", "resume", "save_every", "seed", "device",
          "compile", "dry_run")  # fmt: skip
#  where and how it runs; the batch of a step is in the configuration, so a run may go on with another number of processes
NO_RESULT = (*runs.NO_RESULT, "dataset", "save", "dense_model", "eval_text", "token_length", "stride", "report_to", "fsdp",
             "batch_size", "gradient_accumulation_steps", "gradient_checkpointing", "compile", "gpu_memory", "num_processes",
             "device", "fast")  # fmt: skip


def find_model(args) -> assets.Asset:
    """The model to train: the given one, or the latest of main_block.py; --fast makes one if there is none."""
    if args.model != "auto":
        return assets.resolve_model(args.model, args.data_dir, args.source)

    def pruned() -> list[Path]:
        return [Path(record["model_dir"]) for _, record in runs.finished_runs(args.out_dir, "one_shot")
                if (Path(record["model_dir"]) / "config.json").exists()]  # fmt: skip

    if not pruned():
        command = ["main_block.py", "--fast", "--prune_method", "kfac", "--sparsity_type", "block", "--sparsity_ratio", "0.2",
                   "--data_dir", str(args.data_dir), "--out_dir", str(args.out_dir)]  # fmt: skip
        if not args.fast or args.dry_run:
            raise UserError(f"{args.out_dir / 'one_shot'}: no pruned model. Name one with --model, or run: python "
                            f"{' '.join(command)}")  # fmt: skip
        print(f"no pruned model under {args.out_dir}; making one: python {' '.join(command)}", flush=True)
        if code := subprocess.run([sys.executable, runs.REPOSITORY / command[0], *command[1:]], check=False).returncode:
            raise UserError(f"main_block.py ended with exit status {code}: no model to train")
    return assets.resolve_model(str(pruned()[0]), args.data_dir, args.source)


def accumulation(args, n_processes: int) -> int:
    """Forwards a step, so that a step is of --effective_batch_size windows. UserError where that does not come out even."""
    of_forward = args.batch_size * n_processes
    args.effective_batch_size = of_forward * args.gradient_accumulation_steps or args.effective_batch_size
    if args.effective_batch_size % of_forward:
        fitting = [n for n in range(1, args.effective_batch_size + 1) if not args.effective_batch_size % (args.batch_size * n)]
        raise UserError(f"--effective_batch_size {args.effective_batch_size}: {n_processes} processes with {args.batch_size} "
                        f"windows each do not divide it; at this --batch_size {', '.join(map(str, fitting)) or 'none'} do")
    return args.effective_batch_size // of_forward


def memory(args, outline, teacher, n_processes: int) -> None:
    """Print what a device needs, and exit with status 3 where it has less."""
    chosen = {key: getattr(args, key) for key in ("method", "precision", "optim", "batch_size", "block_size", "fsdp", "lora_r")}
    chosen |= {"n_processes": n_processes, "checkpointing": args.gradient_checkpointing, "teacher": teacher,
               "freeze_embeddings": args.freeze_embeddings}  # fmt: skip
    plan, given = memory_plan.plan(outline, **chosen), args.gpu_memory * 2**20 if args.gpu_memory else None
    print("", table(memory_plan.rows(plan, given)), sep="\n")
    if given is not None and sum(plan.values()) > given:
        print(*memory_plan.advice(outline, **chosen, gpu_bytes=given), sep="\n")
        sys.exit(3)


def training_arguments(args, run: Run, total: int, n_accumulated: int) -> finetuning.TrainingArguments:
    every = max(1, -(-total // args.n_evaluations))
    return finetuning.arguments(
        run, args.seed, args.device, args.precision, max_steps=total, per_device_train_batch_size=args.batch_size,
        per_device_eval_batch_size=args.batch_size, gradient_accumulation_steps=n_accumulated,
        learning_rate=args.learning_rate, weight_decay=args.weight_decay, lr_scheduler_type=args.scheduler,
        warmup_steps=round(args.warmup * total), max_grad_norm=1.0,
        optim=trainers_own(args.optim), torch_compile=args.compile,
        activation_checkpointing=args.gradient_checkpointing, logging_steps=10, eval_strategy="steps", eval_steps=every,
        save_strategy="steps", save_steps=every, load_best_model_at_end=True, metric_for_best_model="eval_loss",
        greater_is_better=False, report_to="wandb" if args.report_to == "wandb" else "none")  # fmt: skip


def load_trained(args, base: Path):
    """The model as it is trained, on the CPU, and its masks. LoRA: fp32 adapters on a frozen model, in half precision."""
    model = load_causal_lm(base, finetuning.stored_dtype(args.precision, args.method == "lora"))
    model.config.use_cache = False
    if args.method == "full":
        if args.freeze_embeddings:
            finetuning.freeze_embeddings_(model)
        return model, sparse_trainer.masks_of(model)
    runs.seed_everything(args.seed)  # the adapters' start is random
    return lora.add_lora(model, args.lora_r, args.lora_alpha, args.lora_dropout, args.merge == "sparse"), {}


def train(args, base: Path, streams, run: Run, processes: PartialState, total: int, target: Path):
    """The trainer's state at the end and, on the first process, the trained weights; None where it was stopped before."""
    is_main = processes.is_main_process
    model, masks = load_trained(args, base)
    sparsity, n = sparse_trainer.check_sparsity(model), sum(p.numel() for p in model.parameters())
    trained = sum(p.numel() for p in model.parameters() if p.requires_grad)
    if args.fsdp:
        shard_(model, args.device, finetuning.HALVES.get(args.precision))
    if teacher := load_causal_lm(args.distill_from) if args.distill_from else None:
        teacher.to(processes.device).requires_grad_(False).eval()
    windows = {split: finetuning.Windows(streams[split], args.block_size, n or None)
               for split, n in (("train", args.max_train_samples), ("validation", args.max_eval_samples))}  # fmt: skip
    windows["train"].drop_rest_(args.effective_batch_size)  # every step is a whole one
    arguments = training_arguments(args, run, total, accumulation(args, processes.num_processes))
    with runs.stop_requests() as requested, run.timed("training") if is_main else nullcontext():
        stop = finetuning.StopTogether(requested, args.save_every)
        trainer = SparseTrainer(
            model=model, args=arguments, train_dataset=windows["train"], eval_dataset=windows["validation"], masks=masks,
            teacher=teacher, distill_weight=args.distill_weight, hidden_weight=args.hidden_weight, temperature=args.temperature,
            optimizer_cls_and_kwargs=for_trainer(args.optim, args.learning_rate, model),
            callbacks=[stop, finetuning.Console(run if is_main else None),
                       finetuning.Patience(args.patience, args.min_delta)])  # fmt: skip
        finetuning.quiet_(trainer)
        resumed = sparse_trainer.last_checkpoint(run.checkpoint_dir, drop=shutil.rmtree if is_main else None)
        processes.wait_for_everyone()
        if is_main:
            run.record |= {"status": "running", "sparsity": {"before": sparsity}, "student_dir": base, "model_dir": target}
            run.record |= {"dense_dir": args.dense_model} if args.dense_model else {}
            run.record.pop("evaluation", None)
            print(f"*** Starting sparse {'full' if args.method == 'full' else 'LoRA'} fine-tuning ***\n"
                  f"Initial model sparsity: {sparsity:.4f}\nTrainable params: {trained:,} || All params: {n:,} || "
                  f"Trainable%: {100 * trained / n:.2f}\n{f'resumed from {resumed}' if resumed else ''}", flush=True)
        trainer.train(resume_from_checkpoint=str(resumed) if resumed else None)
        stopped = stop.stopped and trainer.state.global_step < trainer.state.max_steps
        return trainer.state, None if stopped else trainer.full_state()


def write(args, ended, state: dict, base: Path, target: Path, tokenizer, run: Run) -> None:
    """What train() returned as a model directory, in the dtype of the one it came from; its zeros are counted after reload."""
    if args.method == "full":
        lost = finetuning.write_full(state, base, target, tokenizer, run)
    else:  # onto the weights as they are stored, whatever they were trained in
        stored, model = load_causal_lm(base), load_causal_lm(base, torch.float32)
        model = lora.add_lora(model, args.lora_r, args.lora_alpha, args.lora_dropout, args.merge == "sparse")
        model.load_state_dict({name: value for name, value in state.items() if "lora_" in name}, strict=False)
        checkpoint.save_model(target, lora.merge_(model).to(stored.dtype), tokenizer, {"asked": run.config}, base)
        lost = finetuning.read_back(target, sparse_trainer.layer_sparsity(stored), sparse_trainer.masks_of(stored), run)
    if lost and (args.method, args.merge) != ("lora", "plain"):
        raise RuntimeError(f"{target}: {lost:,} weights that were zero are not any more")
    if lost:
        sparsity = run.record["sparsity"]
        print(f"the plain merge filled {lost:,} zeros: sparsity {sparsity['before']:.4f} -> {sparsity['after']:.4f}")
    ended.save_to_json(str(target / "trainer_state.json"))
    run.record["best"] = {"step": ended.best_global_step, "validation_loss": ended.best_metric}
    run.save()  # an evaluation that is killed does not take the training with it


def sibling(args, base: Path, run: Run) -> dict[str, Path]:
    """The latest model that the other method made of the same pruned model, for the table."""
    for folder, record in runs.finished_runs(args.out_dir, "finetune"):
        target = Path(record["model_dir"])
        same = Path(record["student_dir"]).resolve() == base.resolve() and record["config"]["method"] != args.method
        if same and folder != run.dir and (target / "config.json").exists():
            return {record["config"]["method"]: target}
    return {}


def parse_args(argv):
    parser = runs.Parser(__doc__, PRESETS, shared=SHARED)
    parser.add_argument("--method", default="full", choices=("full", "lora"), help="what trains [full]")
    parser.add_argument("--merge", default="sparse", choices=("sparse", "plain"), help="of LoRA: zeros kept, or not [sparse]")
    parser.add_argument("--dataset", default="auto", help="wikitext2, news, a path, or auto: what is prepared [auto]")
    parser.add_argument("--save", type=Path, help="directory of the trained model [out/finetune/<run>/model]")
    parser.add_argument("--precision", default="auto", choices=(*train_utils.PRECISIONS, "bf16"), help="bf16: all of it [auto]")
    parser.add_argument("--gradient_accumulation_steps", type=int, default=0, help="0: by --effective_batch_size [0]")
    parser.add_argument("--fsdp", action="store_true", help="shard weights, gradients and optimizer over processes (FSDP2)")
    parser.add_argument("--dense_model", type=Path, help="the dense model, for the table [what the pruning's record names]")
    parser.add_argument("--eval_text", default="auto", help="text of the table's perplexities [auto]")
    parser.add_argument("--token_length", type=int, default=0, help="of its windows; 0: the model's, at most 2048 [0]")
    parser.add_argument("--stride", type=int, default=0, help="of its windows; 0: --token_length [0]")
    parser.add_argument("--report_to", default="none", choices=("none", "tensorboard", "wandb"), help="and history.csv [none]")
    parser.add_argument("--gpu_memory", type=int, help="with --dry_run: MiB of a GPU; exit status 3 if they are too few")
    parser.add_argument("--num_processes", type=int, help="with --dry_run: processes to plan for [those of torchrun]")
    args = parser.parse_args(argv)
    if args.device.startswith("cuda:"):
        parser.error(f"--device {args.device}: name GPUs by CUDA_VISIBLE_DEVICES, and --device cuda")
    device = runs.resolve_device(args.device)
    args.device = device.type
    args.precision = finetuning.lm_precision(args.precision, device)
    finetuning.check_tracking(args.report_to, f"--report_to {args.report_to}")
    check_optimizer(args.optim, "--optim")
    train_utils.check_compiler(device, "--compile", args.compile)
    if not args.dry_run and (args.gpu_memory or args.num_processes):
        parser.error("--gpu_memory and --num_processes: plan only, together with --dry_run")
    return args, device


def check(args, outline, source, streams, teacher) -> int:
    """Everything that can be refused before a model is loaded; the number of optimizer steps."""
    longest = data.n_positions(outline.config)
    if longest and args.block_size > longest:
        raise UserError(f"--block_size {args.block_size}: this {outline.config.model_type} model has {longest} positions")
    if teacher is not None:
        finetuning.check_teacher(outline, teacher, f"--distill_from {args.distill_from}", args.hidden_weight)
    n_windows = len(finetuning.Windows(streams["train"], args.block_size, args.max_train_samples or None))
    if n_windows < args.effective_batch_size:
        raise UserError(f"{source.path}: {n_windows} windows of {args.block_size} tokens, less than a step of "
                        f"{args.effective_batch_size}. Lower --block_size or --effective_batch_size")  # fmt: skip
    finetuning.Windows(streams["validation"], args.block_size)
    length = args.token_length or min(2048, longest or 2048)
    eval_utils.check_perplexity(outline, streams["train"], length, args.stride or length, None, "tokens")
    return max(1, round(args.num_epochs * (n_windows // args.effective_batch_size)))


def main(argv=None) -> None:
    runs.quiet_transformers()
    args, device = parse_args(argv)
    processes = finetuning.join(args.device)
    is_main, n_processes = processes.is_main_process, args.num_processes or processes.num_processes
    if args.fsdp and n_processes == 1:
        raise UserError("--fsdp: shards over processes, and there is one. Start several with torchrun, or leave it out")
    if args.fsdp and args.optim in WHOLE_ONLY:
        raise UserError(f"--optim {args.optim}: cannot step on --fsdp's pieces. Expected adamw, adamw_stochastic or sgd")
    n_accumulated = accumulation(args, n_processes)
    with processes.main_process_first():  # what is missing is made once
        base = find_model(args)
        outline = checkpoint.outline(base.path, AutoModelForCausalLM)
        args.dense_model = args.dense_model or finetuning.find_dense(args.out_dir, base.path)
        if is_main and args.distill_from == "dense" and args.dense_model is None:
            print(f"note: no record names the dense model of {base.path}: no distillation (--distill_from DIR)", flush=True)
        args.distill_from = {"none": None, "dense": args.dense_model}.get(args.distill_from, args.distill_from)
        teacher, _ = (path and checkpoint.outline(path, AutoModelForCausalLM) for path in (args.distill_from, args.dense_model))
        tokenizer = data.load_tokenizer(base.path, outline.config)
        source = text.prepare_text(args.dataset, args.data_dir, args.source, args.local_dir)
        streams = {split: text.token_stream(source.path, split, tokenizer) for split in ("train", "validation")}
        tested = text.prepare_text(args.eval_text, args.data_dir, args.source, args.local_dir)
    total = check(args, outline, source, streams, teacher)
    settings = {"script": Path(__file__).name} | {n: v for n, v in vars(args).items() if n not in NO_RESULT}
    settings |= {"assets": [{key: asset.record.get(key) for key in ("name", "source", "sha256")} for asset in (base, source)]}
    if is_main:
        batch = f"{args.batch_size} x {n_processes} processes x {n_accumulated} forwards"
        print(f"""model        {base.path}, {sum(p.numel() for p in outline.parameters()) / 1e6:,.1f} M parameters
text         {source.record["name"]}, {len(streams["train"]):,} tokens in windows of {args.block_size}
training     {args.method}, {total:,} steps of {args.effective_batch_size} windows ({batch})
running      {args.precision}, {args.device}{", FSDP2" * args.fsdp}{", compiled" * args.compile}""", flush=True)
        if (args.precision, args.optim) == ("bf16", "adamw"):
            print("note: bf16 weights round AdamW's small updates away; --optim adamw_stochastic does not", flush=True)
    if args.dry_run:
        return memory(args, outline, teacher, n_processes)
    run = Run(args.out_dir, "finetune", settings, args.run_name, args.resume, tensorboard=args.report_to == "tensorboard")
    target = args.save or run.model_dir
    checkpoint.check_target(target, base.path)
    with run if is_main else nullcontext(), finetuning.ends_told(run):
        if is_main and "best" in run.record and not checkpoint.is_result_of(target, run.config):
            checkpoint.copy_result(Path(run.record["model_dir"]), target, run.config)  # another --save than before
            run.record |= {"model_dir": target}
            run.save()
        processes.wait_for_everyone()  # the run is open; what was there is moved aside where that was asked for
        done = "best" in runs.read_json(run.dir / "run.json") and checkpoint.is_result_of(target, run.config)
        processes.wait_for_everyone()
        if is_main:
            print(f"fine-tuning: {run.dir}{' (trained before; --resume never starts anew)' if done else ''}", flush=True)
        ended, weights = (None, {}) if done else train(args, base.path, streams, run, processes, total, target)
        finetuning.part()  # the first process goes on alone
        if weights is None:
            raise runs.Interrupted(f"The same command goes on from step {ended.global_step:,} ({run.dir})")
        if weights:
            with run.timed("writing"):
                write(args, ended, weights, base.path, target, tokenizer, run)
        windows = outline.config, args.token_length, args.stride
        if is_main and not eval_utils.is_measure_of(run.record.get("evaluation"), tested, *windows):
            dense = run.record.get("dense_dir")
            models = ({"dense": Path(dense)} if dense else {}) | {"pruned": base.path} | sibling(args, base.path, run)
            with run.timed("measuring"):
                found = finetuning.perplexities(models | {args.method: target}, tested, device, args.token_length, args.stride)
            run.record["metrics"], run.record["evaluation"] = found
            run.save()
            checkpoint.drop(run.checkpoint_dir)
    if is_main:
        print("", table(eval_utils.comparison(run.record["metrics"])), sep="\n")
        before, now = (run.record["metrics"][name]["perplexity"] for name in ("pruned", args.method))
        if now > before:
            print("\nnote: training made it worse. Try a lower --learning_rate, or --distill_from dense (the unpruned model)")
        print("\n" + "   ".join(f"{phase} {seconds:.0f} s" for phase, seconds in run.record["timings"].items()))
        print(f"\nmodel   {run.record['model_dir']}\nrecord  {run.dir / 'run.json'}")


if __name__ == "__main__":
    runs.run_script(main)
