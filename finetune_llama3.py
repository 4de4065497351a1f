"""Structured pruning of Llama-3-like models that respects grouped-query attention, and recovery by full fine-tuning or LoRA.

    python finetune_llama3.py --fast                                    the tiny LM, minutes
    python finetune_llama3.py --base_model DIR --prune_mlp --save_model --finetune --distill      a model of your own, taught

Whole groups go: a KV head with all its query heads (or, with --gqa_mode queries, as many query heads of every KV head), an FFN
neuron. A group's score is what its going costs the loss when all that is left makes up for it (--importance obs: ZipLM, arXiv
2302.04089, in the metric of K-FAC), or one of script 8's. One budget for all layers, the ends protected, leaves them uneven.
Then output projections are solved again by least squares, or blocks trained (--reconstruct_passes), and the model is trained.

Reads a model and text (1_prepare_data.py; prepares what is missing). Writes out/llama3/<name>/: model/ (--save_model),
run.json, history.csv, training.log. Killed? The same command goes on. The manual: docs/finetune_llama3.md.
"""

from __future__ import annotations

import shutil
from pathlib import Path

import torch
from tqdm import tqdm

from common import assets, checkpoint, data, eval_utils, finetuning, generation, importance, runs, structured, text, train_utils
from common.blocks import KINDS, blocks_of, group_costs, group_counts, total_cost
from common.checkpoint import load_causal_lm
from common.optimizers import OPTIMIZERS, check_optimizer, for_trainer, trainers_own
from common.pruning import sparsity_of
from common.reconstruction import in_passes, n_held_out
from common.runs import Run, UserError, table
from common.sparse_trainer import SparseTrainer, last_checkpoint
from common.streaming import StreamedLM, causal_outline

PRESETS = [
    # flag, full, fast, meaning, limits
    ("pruning_ratio", 0.25, 0.25, "share of attention (with --prune_mlp also FFN) parameters to remove; 0: none", (0, 0.9)),
    ("importance_samples", 128, 20, "pieces of text that the scores are made from", (1, 10**6)),
    ("importance_seq_len", 512, 512, "their tokens", (2, 10**6)),
    ("importance", "obs", "obs", f"{', '.join(structured.SCORERS)}; joined by +"),
    ("gqa_mode", "groups", "groups", "what goes: a KV head and its query heads, or query heads alone", ("groups", "queries")),
    ("allocation", "global", "global", "one budget for all layers, by measured sensitivity, or alike", structured.ALLOCATIONS),
    ("protected_layers", 1, 1, "layers at each end that stay whole, without --layer_start and --layer_end", (0, 10**4)),
    ("floor", 0.1, 0.1, "share of every layer's groups that stays, at least one", (0, 1)),
    ("width_multiple", 8, 8, "every layer ends with a multiple of so many neurons; 1: any", (1, 512)),
    ("refit", True, True, "re-solve the output projections by least squares after cutting"),
    ("reconstruct_passes", 0, 0, "passes over them in which each refitted block learns the dense one's outputs", (0, 10**4)),
    ("finetune_lr", 1e-5, 1e-5, "peak learning rate (LoRA: 2e-4)", (0, 1)),
    ("finetune_epochs", 1, 1, "passes over the samples", (1, 10**4)),
    ("finetune_samples", 500, 100, "windows of text, evenly from the training split", (1, 10**9)),
    ("finetune_batch_size", 1, 1, "windows a forward", (1, 10**5)),
    ("finetune_seq_len", 512, 512, "tokens of a window", (2, 10**6)),
    ("finetune_grad_accum", 4, 2, "forwards an optimizer step", (1, 10**5)),
    ("finetune_max_grad_norm", 1.0, 1.0, "gradients are clipped to this norm", (1e-6, 10**6)),
    ("finetune_weight_decay", 0.01, 0.01, "of AdamW, on matrices", (0, 10)),
    ("finetune_warmup_steps", 0, 0, "steps in which the learning rate rises", (0, 10**9)),
    ("finetune_optim", "adamw", "adamw", "optimizer; adamw_stochastic (for bf16 weights), adamw_8bit need torchao", OPTIMIZERS),
    ("freeze_embeddings", False, False, "of full fine-tuning: embeddings and output head stay as they are"),
    ("lora_r", 8, 8, "rank of the adapters", (1, 10**4)),
    ("lora_alpha", 16.0, 16.0, "their scale is lora_alpha / lora_r", (1e-6, 10**6)),
    ("lora_dropout", 0.05, 0.05, "before the adapters", (0, 0.9)),
    ("distill_weight", 0.5, 0.5, "share of --distill in the loss", (0, 1)),
    ("hidden_weight", 0.0, 0.0, "of matching what each of its blocks gives, added", (0, 10**4)),
    ("temperature", 1.0, 1.0, "of distillation", (0.01, 1000)),
    ("gradient_checkpointing", True, False, "compute a block's inside again in the backward, to save memory"),
    ("ppl_seqlen", 0, 0, "tokens of the windows that perplexity is measured on; 0: the model's, at most 2048", (0, 10**6)),
]
SHARED = ("source", "local_dir", "data_dir", "out_dir", "resume", "save_every", "seed", "device", "compile", "dry_run")
NO_RESULT = (*runs.NO_RESULT, "base_model", "save_ckpt_log_name", "finetune_dataset", "eval_text", "device", "fast",
             "compile", "gradient_checkpointing", "offload_activations", "ppl_seqlen", "test_after_prune")  # fmt: skip
TOKENS_A_BATCH = 4096


def layers_to_prune(args, n: int) -> range:
    """The layers that may lose groups. UserError for a range that holds none."""
    if args.layer_start is None and args.layer_end is None:
        start, end = args.protected_layers, n - args.protected_layers
    else:
        start, end = args.layer_start or 0, n if args.layer_end is None else args.layer_end
    if not 0 <= start < end <= n:
        raise UserError(f"layers {start} to {end}: expected a range within 0 to {n} that is not empty (--layer_start, "
                        "--layer_end: the first one and the one behind the last; --protected_layers)")  # fmt: skip
    return range(start, end)


def budget(args, blocks, layers: range, kinds) -> float:
    """The share of the whole model's groups of these kinds that goes. UserError where the layers do not have as much to give.

    With --layer_start or --layer_end, --pruning_ratio is of the layers that they name; else of all.
    """
    costs, counts = group_costs(blocks), group_counts(blocks)
    of_layers = [sum(costs[kind][i] * counts[kind][i] for kind in kinds) for i in range(len(blocks))]
    named = sum(of_layers) if (args.layer_start, args.layer_end) == (None, None) else sum(of_layers[i] for i in layers)
    free = structured.most_to_remove(blocks, layers, kinds, args.floor)
    if args.pruning_ratio * named > free * (1 + 1e-9):
        raise UserError(f"--pruning_ratio {args.pruning_ratio}: layers {layers.start} to {layers.stop - 1} have "
                        f"{free / named:.3f} to give{'' if args.prune_mlp else ' without --prune_mlp'}. Ask for less, or for "
                        "more layers (--protected_layers 0), or lower the --floor")  # fmt: skip
    return args.pruning_ratio * named / sum(of_layers)


def prune(args, base: Path, samples, tokenizer, run: Run, device) -> None:
    """Score, choose, cut and refit; the smaller model in run.dir/pruned. What is done is not done again."""
    lm, work = StreamedLM(base, device, args.precision), run.dir / "work"
    blocks = blocks_of(lm.model, args.gqa_mode == "queries")
    kinds, layers = KINDS if args.prune_mlp else ("heads",), layers_to_prune(args, len(lm))
    share, size = budget(args, blocks, layers, kinds), max(1, TOKENS_A_BATCH // args.importance_seq_len)
    before, costs, total = [block.shape for block in blocks], group_costs(blocks), total_cost(blocks)
    scored, sweeps = work / "scores.safetensors", structured.sweeps_of(args.scorers)
    if not scored.exists():
        n_blocks = len(lm) * (1 + len([*filter(None, sweeps)])) if sweeps else 0
        with run.timed("importance"), tqdm(total=n_blocks, desc="importance", leave=False, disable=None) as bar:
            found = structured.group_scores(lm, blocks, samples, size, args.scorers, args.seed, work, args.offload_activations,
                                            lambda _: bar.update())  # fmt: skip
        scores = importance.combine([found[name] for name in args.scorers])
        checkpoint.save_tensors(scored, {f"{kind}.{i}": score for kind in KINDS for i, score in enumerate(scores[kind])})
    stored = checkpoint.load_tensors(scored)
    scores = {kind: [stored[f"{kind}.{i}"] for i in range(len(lm))] for kind in KINDS}
    chosen, shares = {"blocks": blocks, "layers": layers, "kinds": kinds}, None
    if args.allocation == "sensitivity":
        with run.timed("sensitivity"):
            shares, run.record["sensitivity"] = structured.sensitivity_shares(
                lm, samples, size, scores, share, args.floor, chosen, args.seed, work, args.offload_activations, args.refit)
    keep = structured.choose(scores, ratio=share, allocation=args.allocation, floor=args.floor, shares=shares,
                             multiple=args.width_multiple, **chosen)  # fmt: skip
    with run.timed("cutting"):
        parts = work / "blocks" if args.refit else None
        if parts:
            run.record["refit_errors"], run.record["reconstruction_errors"] = structured.refit_blocks(
                lm, blocks, samples, size, keep, parts, args.offload_activations, in_passes(args.reconstruct_passes, args.seed))
        model, left = structured.pruned_model(base, keep, parts)
        checkpoint.save_model(run.dir / "pruned", model, tokenizer, {"asked": run.config, "layers": left}, base)
    run.record |= {"layers_before": before, "layers": left, "sparsity_asked": args.pruning_ratio,
                   "sparsity": sparsity_of(keep, costs, total)}  # fmt: skip
    run.save()
    checkpoint.drop(work)
    print("", table(eval_utils.layers_left(before, left)), sep="\n", flush=True)


def finetune(args, base: Path, start: Path, stream, tokenizer, run: Run, total: int, device) -> None:
    """Train the model of `start`; the trained one goes to run.dir/model. Goes on from the last checkpoint."""
    lora = args.finetune_method == "lora"
    stored = causal_outline(start).config.dtype or torch.float32
    torch.set_float32_matmul_precision("high" if args.device == "cuda" else "highest")  # TF32 is good enough from here on
    model = load_causal_lm(start, finetuning.stored_dtype(args.precision, lora))
    model.config.use_cache = False
    if lora:
        from common.lora import add_lora

        print(f"configuring LoRA (r={args.lora_r}, alpha={args.lora_alpha:g}, dropout={args.lora_dropout:g})...")
        runs.seed_everything(args.seed)  # the adapters' start is random
        model = add_lora(model, args.lora_r, args.lora_alpha, args.lora_dropout, False, args.lora_target_modules)
    elif args.freeze_embeddings:
        finetuning.freeze_embeddings_(model)
    trained, n = (sum(p.numel() for p in model.parameters() if p.requires_grad or every) for every in (False, True))
    print(f"trainable params: {trained:,} || all params: {n:,} || trainable%: {100 * trained / n:.4f}\n\n" + describe(args))
    teacher = load_causal_lm(base).to(device).requires_grad_(False).eval() if args.distill else None
    windows = finetuning.Windows(stream, args.finetune_seq_len, args.finetune_samples)
    windows.drop_rest_(args.finetune_batch_size * args.finetune_grad_accum)
    per_epoch = total // args.finetune_epochs
    arguments = finetuning.arguments(
        run, args.seed, args.device, args.precision, max_steps=total, per_device_train_batch_size=args.finetune_batch_size,
        gradient_accumulation_steps=args.finetune_grad_accum, learning_rate=args.finetune_lr,
        weight_decay=args.finetune_weight_decay, lr_scheduler_type="linear", warmup_steps=args.finetune_warmup_steps,
        max_grad_norm=args.finetune_max_grad_norm, optim=trainers_own(args.finetune_optim),
        torch_compile=args.compile, activation_checkpointing=args.gradient_checkpointing,
        logging_steps=max(1, per_epoch // 10), save_strategy="no", report_to="none")  # fmt: skip
    with runs.stop_requests() as requested, run.timed("training"):
        stop = finetuning.StopTogether(requested, args.save_every)
        trainer = SparseTrainer(
            model=model, args=arguments, train_dataset=windows, masks={}, teacher=teacher, distill_weight=args.distill_weight,
            hidden_weight=args.hidden_weight, temperature=args.temperature,
            optimizer_cls_and_kwargs=for_trainer(args.finetune_optim, args.finetune_lr, model),
            callbacks=[stop, finetuning.Epochs(run, per_epoch)])  # fmt: skip
        finetuning.quiet_(trainer)
        resumed = last_checkpoint(run.checkpoint_dir, drop=shutil.rmtree)
        print(f"resumed from {resumed}" if resumed else "", flush=True)
        trainer.train(resume_from_checkpoint=str(resumed) if resumed else None)
        if stop.stopped and trainer.state.global_step < total:
            raise runs.Interrupted(f"The same command goes on from step {trainer.state.global_step:,} of {total:,} ({run.dir})")
    print("✅ fine-tuning done!")
    model = trainer.accelerator.unwrap_model(trainer.model, keep_torch_compile=False)
    if lora:
        print("merging LoRA weights into the model...")
        model = model.merge_and_unload()
        print("✅ LoRA weights merged")
    model.config.use_cache = True
    stage = {"asked": run.config, "layers": [block.shape for block in blocks_of(model)]}
    checkpoint.save_model(run.model_dir, model.to(stored), tokenizer, stage, base)  # one stage a run


def describe(args) -> str:
    """The fine-tuning's configuration, as the guide shows it."""
    rows = {"mode": f"{'full' if args.finetune_method == 'full' else 'LoRA'} fine-tuning",
            "learning rate": f"{args.finetune_lr:g}", "epochs": args.finetune_epochs, "samples": args.finetune_samples,
            "batch size": args.finetune_batch_size, "gradient accumulation steps": args.finetune_grad_accum,
            "effective batch size": args.finetune_batch_size * args.finetune_grad_accum,
            "sequence length": args.finetune_seq_len, "gradient clipping": args.finetune_max_grad_norm,
            "weight decay": args.finetune_weight_decay, "learning rate schedule": "linear", "warm-up steps":
            args.finetune_warmup_steps, "precision": args.precision, "optimizer": args.finetune_optim}  # fmt: skip
    return "fine-tuning configuration:\n" + "\n".join(f"  {name}: {value}" for name, value in rows.items())


def parse_args(argv):
    parser = runs.Parser(__doc__, PRESETS, shared=SHARED)
    parser.add_argument("--base_model", "--model", default="auto", help="directory (an earlier stage's too), hub name, auto")
    parser.add_argument("--save_ckpt_log_name", "--run_name", help="name of the run's directory [a hash of its configuration]")
    parser.add_argument("--prune_mlp", action="store_true", help="FFN neurons go too, not attention alone")
    parser.add_argument("--layer_start", type=int, help="the first layer that is pruned [--protected_layers]")
    parser.add_argument("--layer_end", type=int, help="the layer behind the last one that is pruned")
    parser.add_argument("--save_model", action="store_true", help="keep the model; without it the record alone")
    parser.add_argument("--test_after_prune", action="store_true", help="perplexity after pruning, before any training")
    parser.add_argument("--finetune", action="store_true", help="train what was pruned")
    parser.add_argument("--finetune_method", default="full", choices=("full", "lora"), help="what trains [full]")
    parser.add_argument("--finetune_dataset", default="auto", help="wikitext2, news, c4, a path, or auto [auto]")
    parser.add_argument("--lora_target_modules", type=lambda names: tuple(names.split(",")),
                        help="names of the projections that get adapters, joined by commas [all of the blocks]")  # fmt: skip
    parser.add_argument("--allow_full_fallback", action="store_true", help="without peft, train all weights instead of failing")
    parser.add_argument("--distill", action="store_true", help="learn from --base_model's predictions as well")
    parser.add_argument("--eval_text", default="auto", help="text of the perplexities [auto]")
    parser.add_argument("--offload_activations", action="store_true", help="keep activations on disk, not in memory")
    parser.add_argument("--precision", default="auto", choices=(*train_utils.PRECISIONS, "bf16"), help="bf16: all of it [auto]")
    args = parser.parse_args(argv)
    device, note = runs.resolve_device(args.device), ""
    args.device, args.scorers = device.type, importance.parse_importance(args.importance, structured.SCORERS)
    args.precision = finetuning.lm_precision(args.precision, device)
    check_optimizer(args.finetune_optim, "--finetune_optim")
    train_utils.check_compiler(device, "--compile", args.compile)
    if args.finetune and args.finetune_method == "lora":
        try:
            runs.require("peft", "--finetune_method lora")
        except UserError:
            if not args.allow_full_fallback:
                raise
            args.finetune_method, note = "full", "⚠️ peft is not installed: all weights are trained (--allow_full_fallback)\n"
    if not (args.pruning_ratio or args.finetune):
        parser.error("nothing to do: --pruning_ratio 0 and no --finetune")
    for flag, other in (("distill", "finetune"), ("hidden_weight", "distill"), ("reconstruct_passes", "pruning_ratio"),
                        ("reconstruct_passes", "refit")):  # fmt: skip
        if getattr(args, flag) and not getattr(args, other):
            parser.error(f"--{flag} {getattr(args, flag)}: is for --{other}".replace(" True", ""))
    return args, device, note


def check(args, base: Path, outline, source, stream, tested) -> int:
    """Everything that can be refused before the long work starts; the number of optimizer steps. tested: its token stream."""
    longest = data.n_positions(outline.config) or 10**6
    used = {"importance_seq_len": args.pruning_ratio, "finetune_seq_len": args.finetune, "ppl_seqlen": args.ppl_seqlen}
    for flag in (flag for flag, is_used in used.items() if is_used):
        if not 2 <= getattr(args, flag) <= longest:
            raise UserError(f"--{flag} {getattr(args, flag)}: this {outline.config.model_type} model has {longest} positions; "
                            f"expected 2 to {longest}")  # fmt: skip
    name = args.save_ckpt_log_name
    if name and base.resolve().is_relative_to((args.out_dir / "llama3" / name).resolve()):
        raise UserError(f"--base_model {base}: the run {name} would replace it. Use another --save_ckpt_log_name")
    blocks = blocks_of(outline, args.gqa_mode == "queries")
    if args.gqa_mode == "queries" and all(block.attention.n_heads == block.attention.n_kv_heads for block in blocks):
        raise UserError("--gqa_mode queries: every query head of this model has keys of its own. Use --gqa_mode groups")
    if args.pruning_ratio:
        budget(args, blocks, layers_to_prune(args, len(blocks)), KINDS if args.prune_mlp else ("heads",))
        if args.reconstruct_passes:
            n_held_out(-(-args.importance_samples // (TOKENS_A_BATCH // args.importance_seq_len or 1)))
    if args.finetune_method == "lora" and args.lora_target_modules:
        finetuning.check_targets(outline, args.lora_target_modules)
    length = args.ppl_seqlen or min(2048, longest)
    for tokens in (stream, tested):
        eval_utils.check_perplexity(outline, tokens, length, length, None, "tokens")
    if not args.finetune:
        return 0
    size = args.finetune_batch_size * args.finetune_grad_accum
    n_windows = len(finetuning.Windows(stream, args.finetune_seq_len, args.finetune_samples))
    if n_windows < size:
        raise UserError(f"{source.path}: {n_windows} windows of {args.finetune_seq_len} tokens, less than a step of {size}. "
                        "Lower --finetune_grad_accum or --finetune_seq_len, or raise --finetune_samples")  # fmt: skip
    return args.finetune_epochs * (n_windows // size)


def main(argv=None) -> None:
    runs.quiet_transformers()
    args, device, note = parse_args(argv)
    torch.set_float32_matmul_precision("highest")  # second moments and what is solved with them are not for TF32
    base = assets.resolve_model("tiny_llama" if args.base_model == "auto" else args.base_model, args.data_dir, args.source)
    outline = causal_outline(base.path)
    tokenizer = data.load_tokenizer(base.path, outline.config)
    source = text.prepare_text(args.finetune_dataset, args.data_dir, args.source, args.local_dir)
    tested = text.prepare_text(args.eval_text, args.data_dir, args.source, args.local_dir)
    stream = text.token_stream(source.path, "train" if "train" in source.record["splits"] else "validation", tokenizer)
    test_stream = text.token_stream(tested.path, "test" if "test" in tested.record["splits"] else "validation", tokenizer)
    total, samples = check(args, base.path, outline, source, stream, test_stream), None
    if args.pruning_ratio:
        samples = text.calibration_samples(stream, args.importance_samples, args.importance_seq_len, args.seed)
    settings = {"script": Path(__file__).name} | {n: v for n, v in vars(args).items() if n not in NO_RESULT}
    settings |= {"assets": [{key: asset.record.get(key) for key in ("name", "source", "sha256")} for asset in (base, source)]}
    what = f"{args.pruning_ratio:g} of attention{' and FFN' * args.prune_mlp}, {args.importance}, {args.allocation}"
    n = sum(p.numel() for p in outline.parameters())
    plan = f"""{note}model        {base.path}, {n / 1e6:,.1f} M parameters
text         {source.record["name"]}, {len(stream):,} tokens
pruning      {what if args.pruning_ratio else "none"}
fine-tuning  {f"{args.finetune_method}, {total:,} steps" if args.finetune else "none"}
running      {args.precision}, {args.device}{", compiled" * args.compile}"""
    if args.dry_run:
        print(plan)
        return
    states = (6 if args.precision == "bf16" else 12) * n if args.finetune_method == "full" and total >= args.save_every else 0
    size = eval_utils.directory_bytes(base.path) * (bool(args.pruning_ratio) + args.finetune)
    finetuning.check_space(args.out_dir, int((1 - args.pruning_ratio) * (size + states)))
    with Run(args.out_dir, "llama3", settings, args.save_ckpt_log_name, args.resume) as run:
        with runs.logged_to(run.dir / "training.log"), finetuning.ends_told(run):
            print(plan, flush=True)
            print(f"run          {run.dir}{' (finished before; --resume never starts anew)' * run.finished}\n", flush=True)
            if run.finished and not eval_utils.is_measure_of(run.record["evaluation"], tested, outline.config, args.ppl_seqlen):
                raise UserError(f"{run.dir}: was measured with another --eval_text or --ppl_seqlen. To measure its model "
                                "again: python main_block.py --model DIR --eval. To start anew: --resume never")  # fmt: skip
            if "metrics" not in run.record:
                work(args, base.path, samples, stream, tested, tokenizer, run, total, device)
            pruned, others = run.dir / "pruned", [] if args.save_model else [run.model_dir]
            if args.save_model and not args.finetune and pruned.exists():
                checkpoint.drop(run.model_dir)
                pruned.rename(run.model_dir)
            checkpoint.drop(pruned, run.dir / "work", run.checkpoint_dir, *others)
            print("", table(eval_utils.comparison(run.record["metrics"])), sep="\n")
            print("\n" + "   ".join(f"{phase} {seconds:.0f} s" for phase, seconds in run.record["timings"].items()))
            print(f"\nmodel   {run.record.get('model_dir', 'not kept: no --save_model')}\nrecord  {run.dir / 'run.json'}")


def work(args, base: Path, samples, stream, tested, tokenizer, run: Run, total: int, device) -> None:
    """Prune, measure, train, measure."""
    pruned = run.dir / "pruned"
    if args.pruning_ratio and not checkpoint.is_result_of(pruned, run.config):
        prune(args, base, samples, tokenizer, run, device)
    models = {"dense": base} | ({"pruned": pruned} if args.pruning_ratio else {})
    if args.test_after_prune and args.pruning_ratio and "perplexity_after_pruning" not in run.record:
        for name in ("dense", "pruned"):
            model = load_causal_lm(models[name], eval_utils.scoring_dtype(device)).to(device)
            found, _ = eval_utils.perplexity_on(model, tokenizer, tested, args.ppl_seqlen, progress=f"perplexity, {name}")
            print(f"PPL {'before' if name == 'dense' else 'after'} pruning: {found['perplexity']:.2f}", flush=True)
        run.record["perplexity_after_pruning"] = found["perplexity"]
        run.save()
    last = pruned if args.pruning_ratio else base
    if args.finetune:
        if not checkpoint.is_result_of(run.model_dir, run.config):
            finetune(args, base, last, stream, tokenizer, run, total, device)
        models[args.finetune_method] = last = run.model_dir
    with run.timed("measuring"):
        run.record["metrics"], run.record["evaluation"] = generation.measure_causal_lms(models, tested, device, args.ppl_seqlen)
    print(f"\n{generation.greedy(load_causal_lm(last), tokenizer, 'The government said on')!r}")
    run.record |= {"dense_dir": base} | ({"model_dir": run.model_dir} if args.save_model else {})
    run.save()  # from here on only what is not kept goes


if __name__ == "__main__":
    runs.run_script(main)
