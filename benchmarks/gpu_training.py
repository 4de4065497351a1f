"""What a step of sparse fine-tuning takes on a GPU: tokens a second, memory, and how much of the card is used.

    python benchmarks/gpu_training.py            minutes on one GPU of 80 GB
    python benchmarks/gpu_training.py --fast     small models and few steps, on any device: the numbers mean nothing

Models: Llamas of 100 M and 1 B random parameters, 20 % of whose 16x16 blocks (or half of whose weights) are zero. fp32 weights
under bf16 autocast, fused AdamW, clipping: what finetune_dense.py runs by default. The plain Trainer, under which zeros fill
up, SparseTrainer, also with activation checkpointing, and both with torch.compile. The first steps, in which compilation
happens, are not counted. MFU (arXiv 2204.02311, appendix B): 6 floating-point operations for each parameter and token, and 12
x layers x width x length for attention, over what the card does at most: by its data sheet, and in the largest matrix product
measured here.

Writes benchmarks/results/gpu_training.json (every measured step) and .md.
"""

from __future__ import annotations

import gc
import json
import statistics
import sys
import tempfile
from pathlib import Path

import torch

REPOSITORY = Path(__file__).resolve().parent.parent
sys.path[:0] = [str(REPOSITORY), str(REPOSITORY / "benchmarks")]

import sparse_trainer as steps  # noqa: E402

from common import eval_utils, finetuning, runs, sparse_trainer  # noqa: E402
from common.runs import table  # noqa: E402

RESULTS = REPOSITORY / "benchmarks" / "results" / "gpu_training"
PRESETS = [
    # flag, full, fast, meaning, limits
    ("n_warm", 10, 2, "steps that are not counted", (1, 1000)),
    ("n_steps", 19, 2, "counted steps, after one that is not", (1, 1000)),
    ("n_windows", 16, 1, "windows of a step", (1, 1000)),
    ("block_size", 1024, 32, "tokens of a window", (2, 10**5)),
    ("product", 8192, 256, "rows and columns of the largest matrix product", (16, 10**5)),
]
MODELS = {
    "100 M": steps.LARGE,
    "1 B": {"hidden_size": 2048, "intermediate_size": 5632, "num_hidden_layers": 22, "num_attention_heads": 32,
            "num_key_value_heads": 4, "vocab_size": 32000},
}  # fmt: skip
SMALL = {"hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 2, "num_attention_heads": 4, "vocab_size": 200}
COMPILED = {"torch_compile": True}
CHECKPOINTING = {"activation_checkpointing": True, "activation_checkpointing_kwargs": {"use_reentrant": False}}
SIDES = {  # trainer, zeros, and what the arguments say beyond
    "Trainer": ("Trainer", "block", {}),
    "SparseTrainer": ("SparseTrainer", "block", {}),
    "SparseTrainer, half of all weights": ("SparseTrainer", "weights", {}),
    "SparseTrainer, checkpointing": ("SparseTrainer", "block", CHECKPOINTING),
    "Trainer, compiled": ("Trainer", "block", COMPILED),
    "SparseTrainer, compiled": ("SparseTrainer", "block", COMPILED),
}
#  dense bf16, floating-point operations a second: NVIDIA's data sheets
PEAKS = {"H100 80GB HBM3": 989e12, "H200": 989e12, "H100 PCIe": 756e12, "A100": 312e12, "RTX 4090": 165e12, "L40S": 362e12}


def largest_product(size: int, device: torch.device) -> float:
    """Operations a second of a bf16 product of random square matrices."""
    left, right = (torch.randn(size, size, device=device, dtype=torch.bfloat16) for _ in range(2))
    (seconds,) = eval_utils.in_turns({"product": lambda: left @ right}, 1.0, device).values()
    return 2 * size**3 / statistics.median(seconds)


def operations(model, length: int) -> float:
    """Of a forward and a backward, a token: PaLM's count. Looking up an embedding multiplies nothing."""
    config = model.config
    n = sum(p.numel() for p in model.parameters()) - model.get_input_embeddings().weight.numel()
    return 6 * n + 12 * config.num_hidden_layers * config.hidden_size * length


def measure(name: str, side: str, args) -> dict:
    kind, pattern, more = SIDES[side]
    with tempfile.TemporaryDirectory(ignore_cleanup_errors=True) as folder:
        trainer, clock = steps.make_trainer(kind, MODELS[name] if not args.fast else SMALL, pattern, args, folder,
                                            **more | {"max_steps": args.n_warm + args.n_steps + 1})  # fmt: skip
        n = sum(p.numel() for p in trainer.model.parameters())
        needed = operations(trainer.model, args.block_size)
        eval_utils.reset_peak(torch.device(args.device))
        trainer.train()
        kept = sparse_trainer.check_sparsity(trainer.accelerator.unwrap_model(trainer.model))
        peak = eval_utils.peak_of(args.device)
    seconds = [end - start for start, end in zip(clock.marks[args.n_warm :], clock.marks[args.n_warm + 1 :], strict=False)]
    tokens = args.n_windows * args.block_size / statistics.median(seconds)
    del trainer
    gc.collect()
    torch._dynamo.reset()
    if args.device == "cuda":
        torch.cuda.empty_cache()
    row = {"model": name, "side": side, "parameters": n, "seconds": seconds, "tokens_per_second": tokens, "sparsity": kept,
           "peak_memory": peak, "operations_per_second": needed * tokens}  # fmt: skip
    print(f"{name}, {side}: {tokens:,.0f} tokens/s, {peak / 2**30:.1f} GiB, sparsity {kept:.4f}", flush=True)
    return row


def tables(record: dict) -> str:
    card = record["environment"]["gpus"][0] if record["device"] == "cuda" else ""
    peak = next((rate for name, rate in PEAKS.items() if name in card), None)
    lines = [["model", "trainer", "ms a step", "tokens/s", "of Trainer's", "peak memory", "MFU", "of the largest product",
              "sparsity at the end"]]  # fmt: skip
    for row in record["rows"]:
        plain = next(r for r in record["rows"] if (r["model"], r["side"]) == (row["model"], "Trainer"))
        rate = row["operations_per_second"]
        lines.append([f"{row['model']} ({row['parameters'] / 1e6:,.0f} M)", row["side"],
                      f"{1000 * statistics.median(row['seconds']):.1f}", f"{row['tokens_per_second']:,.0f}",
                      f"{row['tokens_per_second'] / plain['tokens_per_second']:.3f}x", f"{row['peak_memory'] / 2**30:.1f} GiB",
                      f"{rate / peak:.1%}" if peak else "", f"{rate / record['largest_product']:.1%}",
                      f"{row['sparsity']:.4f}"])  # fmt: skip
    settings, versions = record["settings"], record["environment"]["versions"]
    return (f"{table(lines, markdown=True)}\n\nMedians of {settings['n_steps']} steps of {settings['n_windows']} x "
            f"{settings['block_size']} tokens; {record['precision']}; {card or record['environment']['cpu']}, largest product "
            f"{record['largest_product'] / 1e12:.0f} TFLOP/s; torch {versions['torch']}.\n")  # fmt: skip


def main(argv=None) -> None:
    parser = runs.Parser(__doc__, PRESETS, shared=("device",))
    parser.add_argument("--models", nargs="+", default=list(MODELS), choices=MODELS, help="[all]")
    args = parser.parse_args(argv)
    runs.quiet_transformers()
    device = runs.resolve_device(args.device)
    args.device = device.type
    if args.device == "cpu" and not args.fast:
        raise runs.UserError("--device cpu: this measures a GPU; expected one, or --fast to see that it runs")
    record = {"command": "python benchmarks/gpu_training.py" + " --fast" * args.fast, "device": args.device,
              "precision": finetuning.lm_precision("auto", device), "environment": runs.environment(),
              "settings": {row[0]: getattr(args, row[0]) for row in PRESETS},
              "largest_product": largest_product(args.product, device), "rows": []}  # fmt: skip
    for name in args.models:
        for side in SIDES:
            record["rows"].append(measure(name, side, args))
            runs.write_atomic(RESULTS.with_suffix(".json"), json.dumps(record, indent=1) + "\n")
            runs.write_atomic(RESULTS.with_suffix(".md"), tables(record))
    print(tables(record))


if __name__ == "__main__":
    runs.run_script(main)
