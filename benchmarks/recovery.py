"""What fine-tuning that keeps the zeros gives back: the block-pruned tiny LM against the dense one, trained as long.

    python benchmarks/recovery.py                             the table: two sparsities, three seeds
    python benchmarks/recovery.py --seeds 0 --sparsities 0.5  a part of it
    python benchmarks/recovery.py --collect                   run nothing: the runs that are finished

For each seed (of calibration text, order of the data, adapters): `main_block.py` prunes assets/tiny_llama by 16x16 blocks, and
`finetune_dense.py` trains the pruned models and the dense one on the same windows for the same steps at the same settings; each
keeps its best weights by validation loss. Perplexities are of the test split of the news, from the records. Runs that are
finished are not repeated.

Writes benchmarks/results/recovery.json (every run: command, metrics) and .md.
"""

from __future__ import annotations

import json
import shlex
import statistics
import sys
from pathlib import Path

REPOSITORY = Path(__file__).resolve().parent.parent
sys.path[:0] = [str(REPOSITORY), str(REPOSITORY / "benchmarks")]

from pruning_frontier import execute, met  # noqa: E402

from common.runs import Parser, environment, read_json, run_script, table, write_atomic  # noqa: E402

RESULTS = REPOSITORY / "benchmarks" / "results" / "recovery"
# the model in the rows: flags of finetune_dense.py
METHODS = {
    "full": [],
    "full, distilled": ["--distill_from", "{dense}", "--distill_weight", "1"],
    "LoRA": ["--method", "lora"],
}
RATES = {"full": "5e-4", "full, distilled": "5e-4", "LoRA": "3e-3", "dense": "5e-4"}
SETTINGS = ["--num_epochs", "1", "--batch_size", "4", "--effective_batch_size", "4", "--block_size", "512",
            "--max_train_samples", "1600", "--max_eval_samples", "100", "--no_gradient_checkpointing"]  # fmt: skip
WITHIN = {0.2: 0.01, 0.5: 0.05}  # of the perplexity of the dense model trained as long


def run(name: str, command: list[str], experiment: str, args) -> dict | None:
    """The record of one finished run, which is made if it is not there; None with --collect."""
    path = args.out_dir / experiment / name / "run.json"
    shown = f"python {shlex.join(command)}"
    if args.collect and not (path.exists() and read_json(path)["status"] == "finished"):
        return None
    print(f"$ {shown}", flush=True)
    if not args.collect:
        execute([*command, "--data_dir", str(args.data_dir), "--out_dir", str(args.out_dir), "--run_name", name])
    return read_json(path) | {"shown": shown}


def train(name: str, model: Path | str, method: str, seed: int, dense: Path, args) -> dict | None:
    flags = [flag.format(dense=dense) for flag in METHODS.get(method, [])]
    command = ["finetune_dense.py", "--model", str(model), "--dataset", "news", "--eval_text", "news", "--learning_rate",
               RATES[method], "--seed", str(seed), *SETTINGS, *flags]  # fmt: skip
    record = run(name, command, "finetune", args)
    if record is None:
        return None
    trained = record["metrics"][record["config"]["method"]]
    print(f"  perplexity {trained['perplexity']:.2f}, sparsity {trained['sparsity']:.4f}", flush=True)
    return {"command": record["shown"], "perplexity": trained["perplexity"], "sparsity": trained["sparsity"],
            "before": record["metrics"]["pruned"]["perplexity"], "seconds": record["timings"]["training"]}  # fmt: skip


def measure(seed: int, args) -> list[dict]:
    """All rows of one seed."""
    dense_dir = REPOSITORY / "assets" / "tiny_llama"
    rows = []

    def add(sparsity: float, method: str, name: str, model) -> None:
        if row := train(name, model, method, seed, dense_dir.relative_to(REPOSITORY), args):
            rows.append({"sparsity_asked": sparsity, "method": method, "seed": seed} | row)

    add(0.0, "dense", f"recovery-dense-seed{seed}", "tiny_llama")
    for sparsity in args.sparsities:
        name = f"recovery-{sparsity:g}-seed{seed}"
        command = ["main_block.py", "--prune_method", args.prune_method, "--sparsity_type", "block", "--sparsity_ratio",
                   f"{sparsity:g}", "--calibration", "news", "--seed", str(seed)]  # fmt: skip
        pruned = run(name, command, "one_shot", args)
        for method in METHODS if pruned else ():
            add(sparsity, method, f"{name}-{method.replace(', ', '-')}", Path(pruned["model_dir"]))
    return rows


def spread(values: list[float]) -> str:
    return f"{statistics.mean(values):.2f}" + (f" ± {statistics.stdev(values):.2f}" if len(values) > 1 else "")


def tables(record: dict) -> str:
    rows = record["runs"]

    def of(sparsity: float, method: str) -> list[dict]:
        return [row for row in rows if (row["sparsity_asked"], row["method"]) == (sparsity, method)]

    dense = of(0.0, "dense")
    lines = [["sparsity", "model", "perplexity", "against the dense model trained as long", "allowed", "met", "minutes"]]
    lines.append(["0", "dense", spread([row["before"] for row in dense[:1]]), "", "", "", ""])
    lines.append(["0", "dense, trained as long", spread([row["perplexity"] for row in dense]), "", "", "",
                  f"{statistics.mean(row['seconds'] for row in dense) / 60:.1f}"])  # fmt: skip
    orders, as_long = [], statistics.mean(row["perplexity"] for row in dense)
    for sparsity in sorted({row["sparsity_asked"] for row in rows if row["sparsity_asked"]}):
        measured = {"pruned": [row["before"] for row in of(sparsity, "full")]}
        measured |= {m: [row["perplexity"] for row in of(sparsity, m)] for m in ("LoRA", "full", "full, distilled")}
        for method, values in measured.items():
            if not values:
                continue
            some = of(sparsity, method)
            against = statistics.mean(values) / as_long - 1
            allowed = WITHIN.get(sparsity) if method == "full" else None
            lines.append([f"{sparsity:.2f}", method, spread(values), f"{against:+.1%}",
                          "" if allowed is None else f"{allowed:+.0%}",
                          "" if allowed is None else met(against <= allowed + 1e-9),
                          f"{statistics.mean(row['seconds'] for row in some) / 60:.1f}" if some else ""])  # fmt: skip
        holds = all(a > b > c for a, b, c in zip(measured["pruned"], measured["LoRA"], measured["full"], strict=True))
        orders.append(f"at {sparsity:g} it {'holds' if holds else 'does not hold'} for every seed")
    where, n = record["environment"], len({row["seed"] for row in rows})
    return (f"{table(lines, markdown=True)}\n\nThe order pruned > LoRA > full: {'; '.join(orders)}. Mean ± standard deviation "
            f"over {n} seeds; the same windows and steps for all. {where['threads']} threads, {where['cpu']}.\n")  # fmt: skip


def main(argv=None) -> None:
    parser = Parser(__doc__, shared=("data_dir", "out_dir"))
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2], help="[0 1 2]")
    parser.add_argument("--sparsities", type=float, nargs="+", default=list(WITHIN), help="[0.2 0.5]")
    parser.add_argument("--prune_method", default="kfac", help="of main_block.py [kfac]")
    parser.add_argument("--collect", action="store_true", help="run nothing; take the runs that are finished")
    args = parser.parse_args(argv)
    rows = []
    for seed in args.seeds:
        rows += measure(seed, args)
        record = {"command": "python benchmarks/recovery.py", "environment": environment(), "runs": rows}
        write_atomic(RESULTS.with_suffix(".json"), json.dumps(record, indent=1) + "\n")
        write_atomic(RESULTS.with_suffix(".md"), tables(record))
    print(tables(record))


if __name__ == "__main__":
    run_script(main)
