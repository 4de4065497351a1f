"""One-shot sparsity for causal language models: one pass over a little calibration text, any pattern, no training.

    python main_block.py --prune_method kfac --sparsity_type block --block_size 16 --sparsity_ratio 0.2 --eval
    python main_block.py --model M --prune_method wanda --sparsity_type 2:4 --save out/m/pruned_model
    python main_block.py --model out/m/pruned_model --eval --eval_zero_shot --kernel
    python main_block.py --fast --prune_method kfac                      a quarter of the calibration text

Methods: magnitude; wanda (arXiv 2306.11695); sparsegpt (arXiv 2301.00774); admm (as ALPS, arXiv 2406.07831: masks by ADMM, the
kept weights refitted by conjugate gradients); kfac, this repository's own. kfac does what admm does, and weighs an error by
what it does to the model's predictions instead of to a projection's outputs: with the second moments of inputs and of the
loss's gradients (one backward of the dense model), and every projection as sparse as one threshold on all costs makes it.
Blocks are loaded, pruned and written one at a time, each seeing what the pruned ones before it give: a model larger than memory
is pruned. N:M means N of M weights stay.

Reads a model directory (default: assets/tiny_llama) and text (1_prepare_data.py; prepares what is missing). Writes the model
where --save says (default: out/one_shot/<run>/model), which stock transformers loads, and run.json. Killed? The same command
goes on at the block where it was. The manual: docs/main_block.md.
"""

from __future__ import annotations

import json
import time
from pathlib import Path

import torch
from tqdm import tqdm
from transformers import AutoModelForCausalLM

from common import (
    assets,
    checkpoint,
    curvature,
    data,
    eval_utils,
    kernels,
    one_shot,
    runs,
    streaming,
    text,
    train_utils,
    zero_shot,
)
from common.one_shot import METHODS, Problem
from common.runs import Run, UserError, table

PRESETS = [
    # flag, full, fast, meaning, limits
    ("nsamples", 128, 32, "pieces of calibration text", (1, 10**6)),
    ("seqlen", 0, 0, "tokens of each; 0: the model's positions, at most 2048", (0, 10**6)),
    ("fisher_samples", 32, 16, "of these, so many are also taken backward, for kfac and --allocation sensitivity", (1, 10**6)),
    ("sparsity_ratio", 0.5, 0.5, "share of the projections' weights to remove; N:M says it itself", (0, 0.999)),
    ("sparsity_type", "unstructured", "unstructured", "unstructured, block, or N:M such as 2:4"),
    ("block_size", "16", "16", "of --sparsity_type block: 16, or rows x columns such as 32x8"),
    ("allocation", "auto", "auto", "of sparsity to projections; auto: sensitivity for kfac, else uniform",
     ("auto", "uniform", "owl", "sensitivity")),
    ("update", "auto", "auto", "of the kept weights; auto: the method's own", ("auto", "none", "obs", "refit")),
    ("allocation_limit", 0.0, 0.0, "no projection's sparsity is further from --sparsity_ratio; 0: 0.08, and for sensitivity no "
     "more than a fifth of the density", (0, 1)),
    ("precision", "auto", "auto", "of the forwards; auto: fp16 on CUDA, bf16 on CPUs that have it, else 32",
     train_utils.PRECISIONS),
]
SHARED = ("model", "source", "local_dir", "data_dir", "out_dir", "run_name", "resume", "seed", "device", "dry_run")
NO_RESULT = (*runs.NO_RESULT, "calibration", "save", "eval", "eval_text", "token_length", "stride", "ppl_protocol",
             "eval_zero_shot", "tasks", "include", "include_path", "limit", "kernel")  # fmt: skip
TOKENS_A_BATCH = 4096


def prune_weight(weight, moment, fisher, method: str, update: str, pattern, sparsity: float) -> torch.Tensor:
    """The pruned weight (out, in). moment: (in, in), or (in,) where only the inputs' norms are needed; fisher: kfac's."""
    problem = Problem(weight, moment, fisher) if method in ("admm", "kfac") or update == "refit" else None
    if method == "sparsegpt":
        pruned, keep = one_shot.sparsegpt(weight, moment, pattern, sparsity)
        if update == "obs":
            return pruned
    elif method in ("admm", "kfac"):
        keep = problem.masks(pattern, sparsity)
    elif method == "wanda":
        squares = moment.diagonal() if moment.ndim == 2 else moment
        keep = one_shot.keep_mask(score_of(one_shot.wanda_scores(weight, squares), pattern), pattern, sparsity, per_row=True)
    else:
        keep = one_shot.keep_mask(score_of(one_shot.magnitude_scores(weight), pattern), pattern, sparsity)
    if update == "refit":
        return problem.refit(keep)
    return one_shot.sparsegpt(weight, moment, pattern, sparsity, keep)[0] if update == "obs" else weight * keep


def score_of(scores, pattern):
    return one_shot.block_sums(scores, pattern) if pattern.kind == "block" else scores


def prune_(lm, hidden, args, pattern, shares: dict[str, float], run) -> list[dict]:
    """Prune block after block; what is done is in the run's directory, and is not done again. A record a projection."""
    work, records = run.dir / "blocks", []
    with runs.stop_requests() as stop_requested:
        for i in tqdm(range(len(lm)), "blocks", leave=False, disable=None):
            path, start = work / f"block-{i}.safetensors", time.perf_counter()
            if path.exists():  # an earlier process pruned it
                with lm.loaded(i, checkpoint.load_tensors(path)):
                    lm.advance(i, hidden)
                records += runs.read_json(path.with_suffix(".json"))
                continue
            dtypes, of_block = lm.stored(i), []
            fisher_path = run.dir / "curvature" / f"fisher-{i}.safetensors"
            fishers = checkpoint.load_tensors(fisher_path) if args.prune_method == "kfac" else {}
            with lm.loaded(i) as block:
                moments = {}
                if args.prune_method != "magnitude" or args.update != "none":
                    timed = run.timed("statistics", "pruning")
                    with timed, curvature.input_moments(block, args.full_moments) as moments, torch.no_grad():
                        for b in range(len(hidden)):
                            lm.run(i, hidden[b].to(lm.device))
                with run.timed("solving", "pruning"):
                    for linear in block.projections:
                        name, moment = lm.names[linear], moments.get(linear)
                        fisher = fishers[name].to(lm.device) if fishers else None
                        old = linear.weight.data
                        new = prune_weight(old, moment, fisher, args.prune_method, args.update, pattern, shares[name])
                        linear.weight.data = new.to(dtypes[name + ".weight"]).float()  # the next block sees what is stored
                        found = {"sparsity": 1 - int(linear.weight.count_nonzero()) / linear.weight.numel(),
                                 "error": relative_error(old, linear.weight.data, moment)}  # fmt: skip
                        of_block.append({"name": name, "sparsity_asked": shares[name]} | found)
                kept = {name: value.to(dtypes[name]) for name, value in lm.tensors(i).items()}
                if i + 1 < len(lm):  # what the last one gives nobody takes
                    with run.timed("forward", "pruning"):
                        lm.advance(i, hidden)
            runs.write_atomic(path.with_suffix(".json"), json.dumps(of_block))
            streaming.save_tensors(path, kept)
            del kept, old, new, moments, moment, fisher, fishers  # a block's worth, beside the next one
            records += of_block
            sparsity, error = (sum(r[key] for r in of_block) / len(of_block) for key in ("sparsity", "error"))
            seconds = time.perf_counter() - start
            print(f"block {i + 1}/{len(lm)}  sparsity {sparsity:.4f}  error {error:.4f}  {seconds:.1f} s", flush=True)
            if stop_requested() and i + 1 < len(lm):
                raise runs.Interrupted(f"The same command goes on at block {i + 2} of {len(lm)} ({run.dir})")
    return records


def relative_error(old, new, moment) -> float:
    """Squared error of a projection's outputs on what calibration showed it, over their squares; of weights without any."""
    if moment is None or moment.ndim == 1:
        scale = 1.0 if moment is None else moment.sqrt()
        lost = (new - old).mul_(scale).square_().sum()
        return float(lost / (old * scale).square_().sum().clamp_min(1e-30))
    return float(one_shot.output_error(new - old, moment) / one_shot.output_error(old, moment).clamp_min(1e-30))


def allocate(lm, samples, args, pattern, run) -> dict[str, float]:
    """The sparsity of each projection by its name. With kfac or sensitivity the Fisher matrices are made here, once."""
    folder = run.dir / "curvature"
    sizes = {lm.names[linear]: linear.weight.numel() for block in lm.blocks for linear in block.projections}
    uniform = dict.fromkeys(sizes, args.sparsity_ratio)
    if (folder / "shares.json").exists():
        return runs.read_json(folder / "shares.json")
    shares = uniform
    if args.prune_method == "kfac" or args.allocation == "sensitivity":
        some, scored = samples[: args.fisher_samples], pattern if args.allocation == "sensitivity" else None
        with tqdm(total=2 * len(lm), desc="curvature", leave=False, disable=None) as bar:
            curves = curvature.fisher_sweep(lm, some, args.batch_size, args.seed, folder, args.offload_activations,
                                            scored, lambda _: bar.update())  # fmt: skip
        if args.allocation == "sensitivity":
            shares = curvature.sensitivity_allocation(curves, sizes, args.sparsity_ratio, args.allocation_limit or None)
    if args.allocation == "owl":
        hidden = lm.embed(samples, args.batch_size, run.dir / "activations" if args.offload_activations else None)
        outliers = curvature.outlier_shares(lm, hidden)
        hidden.drop()
        of_blocks = curvature.owl_allocation(outliers, args.sparsity_ratio, min(args.allocation_limit or 1.0, curvature.LIMIT))
        shares = {lm.names[p]: share for block, share in zip(lm.blocks, of_blocks, strict=True) for p in block.projections}
    runs.write_atomic(folder / "shares.json", json.dumps(shares))
    return shares


def prune(args, base, tokenizer, lm, device) -> None:
    """Prune `base` into a model directory, with its record."""
    pattern = one_shot.parse_pattern(args.sparsity_type, args.block_size)
    source = text.prepare_text(args.calibration, args.data_dir, args.source, args.local_dir)
    stream = text.token_stream(source.path, "train" if "train" in source.record["splits"] else "validation", tokenizer)
    samples = text.calibration_samples(stream, args.nsamples, args.seqlen, args.seed)  # (n, seqlen)
    settings = {"script": Path(__file__).name} | {n: v for n, v in vars(args).items() if n not in NO_RESULT}
    settings |= {"assets": [{key: asset.record.get(key) for key in ("name", "source", "sha256")} for asset in (base, source)]}
    n = sum(linear.weight.numel() for block in lm.blocks for linear in block.projections)
    print(f"""model        {base.record["name"]} ({base.record["source"]}), {len(lm)} blocks with {n / 1e6:,.1f} M weights
calibration  {source.record["name"]}: {args.nsamples} x {args.seqlen} of {len(stream):,} tokens
pruning      {args.prune_method}, {pattern}, sparsity {args.sparsity_ratio:g}, {args.allocation}, update {args.update}
running      {args.precision}, {args.device}, activations {"on disk" if args.offload_activations else "in memory"}
""", flush=True)
    if args.dry_run:
        return
    if args.nsamples * args.seqlen > len(stream):
        print(f"warning: {args.nsamples} x {args.seqlen} tokens are drawn from {len(stream):,}: pieces overlap")
    with Run(args.out_dir, "one_shot", settings, args.run_name, args.resume) as run:
        target = args.save or run.model_dir
        print(f"pruning: {run.dir}{' (finished before; --resume never starts anew)' if run.finished else ''}", flush=True)
        if "metrics" not in run.record or not checkpoint.is_result_of(target, run.config):
            run.record["status"] = "running"
            with run.timed("allocation"):
                try:
                    shares = allocate(lm, samples, args, pattern, run)
                except KeyboardInterrupt:
                    raise runs.Interrupted(f"The same command starts again: no block was pruned yet ({run.dir})") from None
            with run.timed("pruning"):
                hidden = lm.embed(samples, args.batch_size, run.dir / "activations" if args.offload_activations else None)
                records = prune_(lm, hidden, args, pattern, shares, run)
                hidden.drop()
                lm.release()
            with run.timed("writing"):
                stage = {"asked": settings, "pattern": str(pattern), "projections": records}
                parts = [run.dir / "blocks" / f"block-{i}.safetensors" for i in range(len(lm))]
                streaming.assemble(base.path, parts, target, [*checkpoint.compression_stages(base.path), stage])
            measured = streaming.measured_sparsity(target, [f"{record['name']}.weight" for record in records])
            found = {"sparsity_asked": args.sparsity_ratio, "sparsity": measured, "bytes": eval_utils.directory_bytes(target)}
            run.record |= {"metrics": {"dense": {"bytes": eval_utils.directory_bytes(base.path)}, "pruned": found},
                           "projections": records, "dense_dir": base.path, "model_dir": target}  # fmt: skip
            run.save()  # an evaluation that is killed does not take the pruning with it
        checkpoint.drop(run.dir / "blocks", run.dir / "curvature", run.dir / "activations")
        if args.eval:
            for name, directory in (("dense", base.path), ("pruned", target)):
                print(f"\n{name}: {directory}")
                found, run.record["evaluation"] = evaluate(directory, args, device)
                run.record["metrics"][name] |= found
            run.save()
        if args.tasks or args.kernel:
            run.record |= beyond_perplexity(target, args, device)
            run.save()
    print("", table(eval_utils.comparison(run.record["metrics"])), sep="\n")
    seconds = "   ".join(f"{phase} {seconds:.1f} s" for phase, seconds in run.record["timings"].items())
    print(f"\n{seconds}\n\nmodel   {target}\nrecord  {run.dir / 'run.json'}")


def eval_stream(args, model, tokenizer):
    """What --eval is of: its text and split, the tokens, the length of a window. UserError for what this model cannot take."""
    source = text.prepare_text(args.eval_text, args.data_dir, args.source, args.local_dir)
    split = "test" if "test" in source.record["splits"] else "validation"
    stream = text.token_stream(source.path, split, tokenizer, "blank" if args.ppl_protocol == "wanda" else "eos")
    length = args.token_length or min(2048, data.n_positions(model.config) or 2048)
    eval_utils.check_perplexity(model, stream, length, args.stride or length, None, args.ppl_protocol)
    return source, split, stream, length


def evaluate(directory: Path, args, device) -> tuple[dict, dict]:
    """Perplexity of a model directory on a text's test split, with the console of the guide; and how it was measured."""
    outline = checkpoint.outline(directory, AutoModelForCausalLM)
    tokenizer = data.load_tokenizer(directory, outline.config)
    source, split, stream, length = eval_stream(args, outline, tokenizer)
    print(f"📖 Loading {source.record['name']} {split} set...\n📏 Sequence length: {len(stream)}")
    if args.dry_run:
        return {}, {}
    model = checkpoint.load_causal_lm(directory, eval_utils.scoring_dtype(device)).to(device)
    found, how = eval_utils.perplexity_on(model, tokenizer, source, args.token_length, args.stride, args.ppl_protocol,
                                          "🧮 Computing perplexity")  # fmt: skip
    print(f"✅ Perplexity: {found['perplexity']:.2f}   ({found['n_tokens']:,} tokens in windows of {length})")
    return found, how


def beyond_perplexity(directory: Path, args, device) -> dict:
    """Zero-shot accuracies of a model directory, and what the device's sparse kernels make of its patterns."""
    found = {}
    if args.tasks:
        model = checkpoint.load_causal_lm(directory).to(device)
        tokenizer = data.load_tokenizer(directory, model.config)
        found["zero_shot"] = zero_shot.evaluate(model, tokenizer, args.tasks, args.include, args.limit)
        rows = [[task, *(f"{values[key]:.4f}" for key in ("acc", "acc_stderr")), values["n"]]
                for task, values in found["zero_shot"].items()]  # fmt: skip
        print("", table([["zero-shot", "accuracy", "standard error", "n"], *rows]), sep="\n")
    if args.kernel:
        found["kernels"] = kernels.measure(directory, device)
        print("", table(kernels.rows_of(found["kernels"])), kernels.conclusion(found["kernels"]), sep="\n")
    return found


def main(argv=None) -> None:
    parser = runs.Parser(__doc__, PRESETS, shared=SHARED)
    parser.add_argument("--prune_method", choices=METHODS, help="[none: only evaluate]")
    parser.add_argument("--calibration", default="auto", help="wikitext2, news, c4, a path, or auto: what is prepared [auto]")
    parser.add_argument("--save", type=Path, help="directory of the pruned model [out/one_shot/<run>/model]")
    parser.add_argument("--offload_activations", action="store_true", help="keep activations on disk, not in memory")
    parser.add_argument("--eval", action="store_true", help="perplexity, of the pruned model or of --model")
    parser.add_argument("--eval_text", default="auto", help="text of --eval: wikitext2, news, a path, or auto [auto]")
    parser.add_argument("--token_length", type=int, default=0, help="of --eval; 0: the model's positions, at most 2048 [0]")
    parser.add_argument("--stride", type=int, default=0, help="of --eval's windows; 0: --token_length [0]")
    parser.add_argument("--ppl_protocol", default="tokens", choices=eval_utils.PROTOCOLS, help="[tokens]")
    parser.add_argument("--eval_zero_shot", nargs="*", metavar="TASK", help="accuracy on tasks of lm-evaluation-harness, "
                        "or news_choice, which needs no hub [the field's seven]")  # fmt: skip
    parser.add_argument("--include_path", type=Path, help="folder with YAML files of tasks of your own")
    parser.add_argument("--limit", type=int, help="questions of each task [all]")
    parser.add_argument("--kernel", action="store_true", help="time the device's sparse kernel, where there is one")
    args = parser.parse_args(argv)
    runs.quiet_transformers()
    device = runs.resolve_device(args.device)
    torch.set_float32_matmul_precision("highest")  # second moments and what is solved with them are not for TF32
    args.device, args.precision = str(device), train_utils.resolve_precision(args.precision, device)
    args.tasks = [] if args.eval_zero_shot is None else args.eval_zero_shot or list(zero_shot.DEFAULT_TASKS)
    if not (args.prune_method or args.eval or args.tasks or args.kernel):
        parser.error("nothing to do: give --prune_method, --eval, --eval_zero_shot or --kernel")
    made = [zero_shot.offline_task(task, args.data_dir, args.source, args.seed) for task in args.tasks]
    args.include = [path for path in (args.include_path, *made) if path]
    if args.tasks:
        zero_shot.load_tasks(args.tasks, args.include)  # refused now, and not when all is pruned
    if args.save and not args.prune_method:
        parser.error("--save: is of --prune_method, and nothing is pruned")
    base = assets.resolve_model("tiny_llama" if args.model == "auto" else args.model, args.data_dir, args.source)
    if args.prune_method:
        pattern = one_shot.parse_pattern(args.sparsity_type, args.block_size)
        args.sparsity_ratio = pattern.sparsity or args.sparsity_ratio
        own = "sensitivity" if args.prune_method == "kfac" and pattern.sparsity is None else "uniform"
        args.allocation = own if args.allocation == "auto" else args.allocation
        if pattern.sparsity and args.allocation != "uniform":
            raise UserError(f"--allocation {args.allocation}: every projection has the sparsity of {pattern}. Use uniform")
        args.update = METHODS[args.prune_method] if args.update == "auto" else args.update
        args.full_moments = args.prune_method in ("sparsegpt", "admm", "kfac") or args.update != "none"
        shape = streaming.StreamedLM(base.path, device, args.precision)
        for linear, name in shape.names.items():
            one_shot.check_shape(pattern, tuple(linear.weight.shape), name)
        longest = data.n_positions(shape.model.config) or 2048
        args.seqlen = args.seqlen or min(2048, longest)
        if not 2 <= args.seqlen <= longest:
            raise UserError(f"--seqlen {args.seqlen}: this {shape.model.config.model_type} model has {longest} positions")
        args.batch_size = max(1, TOKENS_A_BATCH // args.seqlen)
        tokenizer = data.load_tokenizer(base.path, shape.model.config)
        if args.save:
            checkpoint.check_target(args.save, base.path)
        if args.eval:
            eval_stream(args, shape.model, tokenizer)  # refused now, and not when all is pruned
        prune(args, base, tokenizer, shape, device)
    else:
        if args.eval:
            evaluate(base.path, args, device)
        if not args.dry_run:
            beyond_perplexity(base.path, args, device)


if __name__ == "__main__":
    runs.run_script(main)
