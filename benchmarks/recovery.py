"""What fine-tuning that keeps the zeros gives back: the block-pruned tiny LM against the dense one, trained as long.

    python benchmarks/recovery.py                             the table: two sparsities, three seeds
    python benchmarks/recovery.py --seeds 0 --sparsities 0.5  a part of it, beside what is there
    python benchmarks/recovery.py --collect                   run nothing: the runs that are finished, beside what is there

For each seed (of calibration text, order of the data, adapters): `main_block.py` prunes assets/tiny_llama by 16x16 blocks, and
`finetune_dense.py` trains the pruned models, which learn from the dense one's predictions and hidden states, and the dense one,
by cross-entropy and at a lower rate (it has converged: a higher one makes it worse), on the same windows for the same steps.
At 20 % the embeddings stay as they are: nothing was pruned there. Each keeps its best weights by validation loss. Perplexities
are of the test split of the news, from the records. Runs that are finished are not repeated.

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
DISTILLED = ["--distill_from", "{dense}", "--distill_weight", "1", "--hidden_weight", "10"]
METHODS = {  # the model in the rows: flags of finetune_dense.py
    "dense, trained as long": [],
    "LoRA": ["--method", "lora", "--lora_dropout", "0", *DISTILLED],
    "full": ["--optim", "muon", *DISTILLED],
}
RATES = {"dense, trained as long": {0.2: 3e-5, 0.5: 3e-5}, "LoRA": {0.2: 3e-3, 0.5: 5e-3}, "full": {0.2: 7e-4, 0.5: 2e-3}}
DENSE = Path("assets") / "tiny_llama"
MORE = {("full", 0.2): ["--freeze_embeddings"]}  # flags of one method at one sparsity
SETTINGS = ["--num_epochs", "1", "--batch_size", "4", "--effective_batch_size", "4", "--block_size", "512", "--n_evaluations",
            "4", "--patience", "10", "--max_eval_samples", "100", "--no_gradient_checkpointing"]  # fmt: skip
STEPS = 1200  # of 4 x 512 tokens
WITHIN = {0.2: 0.01, 0.5: 0.05}  # of the perplexity of the dense model trained as long


def ran_on(environment: dict) -> str:
    """The processor of a run: the scripts take a GPU where there is one."""
    return environment["gpus"][0] if environment["gpus"] else f"{environment['threads']} threads, {environment['cpu']}"


def where(rows: list[dict]) -> str:
    """The processors of rows, in words, and how many rows are of each."""
    names = [row["ran_on"] for row in rows]
    return "; ".join(f"{names.count(name)} runs on {name}" for name in sorted(set(names)))


def shown_of(command: list[str]) -> str:
    return f"python {shlex.join(command)}"


def run(name: str, command: list[str], experiment: str, args, flag: str = "--run_name") -> dict | None:
    """The record of one finished run, which is made if it is not there; None with --collect. flag: the script's, for names."""
    path = args.out_dir / experiment / name / "run.json"
    inside = [Path(word).is_relative_to(args.out_dir) for word in command]
    shown = shown_of([("out" / Path(word).relative_to(args.out_dir)).as_posix() if is_inside else word
                      for word, is_inside in zip(command, inside, strict=True)])  # fmt: skip
    if args.collect and not (path.exists() and read_json(path)["status"] == "finished"):
        return None
    print(f"$ {shown}", flush=True)
    if not args.collect:
        execute([*command, "--data_dir", str(args.data_dir), "--out_dir", str(args.out_dir), flag, name])
    return read_json(path) | {"shown": shown}


def training_command(model: Path | str, method: str, sparsity: float, seed: int) -> list[str]:
    flags = ["--learning_rate", f"{RATES[method][sparsity]:g}", *(flag.format(dense=DENSE) for flag in METHODS[method]),
             *MORE.get((method, sparsity), ())]  # fmt: skip
    return ["finetune_dense.py", "--model", str(model), "--dataset", "news", "--eval_text", "news", "--seed", str(seed),
            "--max_train_samples", str(4 * STEPS), *SETTINGS, *flags]  # fmt: skip


def is_current(row: dict) -> bool:
    """Whether a row that is there is of the run that would be made now: its flags have not changed since."""
    model = shlex.split(row["command"])[3]
    return row["command"] == shown_of(training_command(model, row["method"], row["sparsity_asked"], row["seed"]))


def train(name: str, model: Path | str, method: str, sparsity: float, seed: int, args) -> dict | None:
    record = run(name, training_command(model, method, sparsity, seed), "finetune", args)
    if record is None:
        return None
    trained = record["metrics"][record["config"]["method"]]
    print(f"  perplexity {trained['perplexity']:.2f}, sparsity {trained['sparsity']:.4f}", flush=True)
    return {"sparsity_asked": sparsity, "method": method, "seed": seed, "steps": STEPS, "command": record["shown"],
            "perplexity": trained["perplexity"], "sparsity": trained["sparsity"],
            "before": record["metrics"]["pruned"]["perplexity"], "seconds": record["timings"]["training"],
            "ran_on": ran_on(record["environment"])}  # fmt: skip


def measure(sparsity: float, seed: int, args) -> list[dict]:
    """All rows of one sparsity and seed."""
    rows, name = [], f"recovery-{sparsity:g}-seed{seed}"
    command = ["main_block.py", "--prune_method", args.prune_method, "--sparsity_type", "block", "--sparsity_ratio",
               f"{sparsity:g}", "--calibration", "news", "--seed", str(seed)]  # fmt: skip
    pruned = run(name, command, "one_shot", args)
    for method in args.methods if pruned else ():
        if method.startswith("dense"):  # one run for all sparsities
            rows.append(train(f"recovery-dense-seed{seed}", "tiny_llama", method, sparsity, seed, args))
        else:
            rows.append(train(f"{name}-{method}", Path(pruned["model_dir"]), method, sparsity, seed, args))
    return [row for row in rows if row]


def spread(values: list[float]) -> str:
    return f"{statistics.mean(values):.2f}" + (f" ± {statistics.stdev(values):.2f}" if len(values) > 1 else "")


def tables(record: dict) -> str:
    rows = record["runs"]
    lines = [["sparsity", "model", "seeds", "steps", "perplexity", "against dense, as long", "allowed", "met"]]
    orders = []
    for sparsity in sorted({row["sparsity_asked"] for row in rows}):
        of = {method: {row["seed"]: row for row in rows if (row["sparsity_asked"], row["method"]) == (sparsity, method)}
              for method in METHODS}  # fmt: skip
        values = {method: {seed: row["perplexity"] for seed, row in found.items()} for method, found in of.items()}
        before = {method: {seed: row["before"] for seed, row in found.items()} for method, found in of.items()}
        dense, lora, full = values.values()
        shown = {"dense": before["dense, trained as long"], "dense, trained as long": dense,
                 "pruned": before["full"], "LoRA": lora, "full": full}  # fmt: skip
        for method, found in shown.items():
            if not found:
                continue
            mean = statistics.mean(found.values()) / statistics.mean(dense.values()) - 1 if dense else 0.0
            against = "" if method.startswith("dense") or not dense else f"{mean:+.2%}"
            allowed = WITHIN[sparsity] if method == "full" else None
            trained = list(of.get(method, {}).values())
            lines.append([f"{sparsity:g}", method, len(found), trained[0]["steps"] if trained else "",
                          spread(list(found.values())), against, "" if allowed is None else f"{allowed:+.0%}",
                          "" if allowed is None or not dense else met(mean <= allowed + 1e-9)])  # fmt: skip
        shared = sorted(set(full) & set(lora))
        holds = sum(before["full"][seed] > lora[seed] > full[seed] for seed in shared)
        orders.append(f"at {sparsity:g} for {holds} of {len(shared)} seeds")
    return (f"{table(lines, markdown=True)}\n\nPerplexity, mean ± standard deviation over the seeds. The order pruned > LoRA > "
            f"full holds {', '.join(orders)}. {where(rows)}.\n")  # fmt: skip


def main(argv=None) -> None:
    parser = Parser(__doc__, shared=("data_dir", "out_dir"))
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2], help="[0 1 2]")
    parser.add_argument("--sparsities", type=float, nargs="+", default=list(WITHIN), help="[0.2 0.5]")
    parser.add_argument("--methods", nargs="+", default=list(METHODS), choices=METHODS, help="[all]")
    parser.add_argument("--prune_method", default="kfac", help="of main_block.py [kfac]")
    parser.add_argument("--collect", action="store_true", help="run nothing; take the runs that are finished")
    args = parser.parse_args(argv)
    path = RESULTS.with_suffix(".json")
    record = read_json(path) if path.exists() else {"runs": []}
    record |= {"command": "python benchmarks/recovery.py", "environment": environment()}
    rows = {(row["sparsity_asked"], row["method"], row["seed"]): row for row in record["runs"] if is_current(row)}
    for sparsity in args.sparsities:
        for seed in args.seeds:
            rows |= {(row["sparsity_asked"], row["method"], row["seed"]): row for row in measure(sparsity, seed, args)}
            record["runs"] = [rows[key] for key in sorted(rows)]
            if len(rows) > 1:
                write_atomic(path, json.dumps(record, indent=1) + "\n")
                write_atomic(RESULTS.with_suffix(".md"), tables(record))
    print(tables(record))


if __name__ == "__main__":
    run_script(main)
