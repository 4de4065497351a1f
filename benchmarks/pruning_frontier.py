"""Accuracy against latency of script 8: sparsities, seeds and scorers, from its own records.

    python benchmarks/pruning_frontier.py --local_dir PATH/SST-2          the whole of it: hours on two cores
    python benchmarks/pruning_frontier.py --sparsities 0.5 --seeds 0      a part of it
    python benchmarks/pruning_frontier.py --collect                       run nothing: the runs that are finished
    python benchmarks/pruning_frontier.py --draw                          table and picture from the JSON that is there

Runs `8_pruning_with_finetuning.py --fast` once for each sparsity and seed, trained and untouched (`--num_epochs 0`), and,
untouched, once for each scorer with `random` as the control. The numbers are those of the runs' records: accuracy on the
official validation set, which no choice has seen, and the latency of dense and pruned model taken in turns in one process.
Runs that are finished are not repeated.

Writes benchmarks/results/pruning_frontier.json (every run: command, metrics), .md (the tables) and .png (the picture), from
which `python benchmarks/update_readme.py` takes what the README shows.
"""

from __future__ import annotations

import json
import shlex
import statistics
import subprocess
import sys
from pathlib import Path

REPOSITORY = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(REPOSITORY))

from common.runs import Parser, UserError, environment, read_json, run_script, table, write_atomic  # noqa: E402

SCRIPT = "8_pruning_with_finetuning.py"
RESULTS = REPOSITORY / "benchmarks" / "results" / "pruning_frontier"
# sparsity: loss of accuracy in points that is allowed (trained), the same untouched, speed-up in latency
TARGETS = {0.2: (0.1, None, 1.2), 0.5: (0.3, 0.8, 1.7), 0.7: (0.7, None, 2.7), 0.9: (3.0, None, 5.0)}
DENSE_ACCURACY = 0.885
SCORERS = ("kd_gradient", "fisher", "taylor", "l2", "activation", "random")


def run(sparsity: float, seed: int, epochs: int | None, scorer: str, args) -> dict | None:
    """One run of the script (or the record of the one there is), as a row: what was asked and what was measured.

    None with `--collect`, where there is no finished one.
    """
    name = f"frontier-{args.task}-{scorer}-{sparsity}-{'fast' if epochs is None else epochs}-seed{seed}"
    command = [SCRIPT, "--fast", "--task", args.task, "--model", args.model, "--target_sparsity", str(sparsity),
               "--seed", str(seed), "--importance", scorer]  # fmt: skip
    command += [] if epochs is None else ["--num_epochs", str(epochs)]
    places = ["--data_dir", str(args.data_dir), "--out_dir", str(args.out_dir), "--run_name", name]
    if args.local_dir:
        places += ["--local_dir", str(args.local_dir)]
    record_path = args.out_dir / "prune" / name / "run.json"
    if args.collect and not (record_path.exists() and read_json(record_path)["status"] == "finished"):
        return None
    print(f"$ python {shlex.join(command)}", flush=True)
    if not args.collect:
        execute(command + places)
    record = read_json(record_path)
    metrics, dense = record["metrics"]["pruned"], record["metrics"]["dense"]
    row = {
        "command": f"python {shlex.join(command)}",
        "scorer": scorer,
        "seed": seed,
        "trained": epochs is None,
        "asked": sparsity,
        "sparsity": metrics["sparsity"],
        "accuracy": metrics["accuracy"],
        "dense_accuracy": dense["accuracy"],
        "n": metrics["n"],
        "speedup": dense["latency_ms"] / metrics["latency_ms"],
        "latency_ms": metrics["latency_ms"],
        "dense_latency_ms": dense["latency_ms"],
        "bytes_ratio": metrics["bytes"] / dense["bytes"],
        "seconds": sum(record["timings"].values()),
        "reload_difference": record["reload_difference"],
        "environment": record["environment"],
    }
    print(f"  accuracy {row['accuracy']:.4f}, dense {row['dense_accuracy']:.4f}, {row['speedup']:.2f}x", flush=True)
    return row


def execute(command: list[str]) -> None:
    done = subprocess.run([sys.executable, REPOSITORY / command[0], *command[1:]], stdout=subprocess.DEVNULL, check=False)
    if done.returncode:
        raise UserError(f"python {shlex.join(command)}: exit status {done.returncode}")


def spread(values: list[float]) -> str:
    """Mean, and the standard deviation over seeds where there are several."""
    return f"{statistics.mean(values):.4f}" + (f" ± {statistics.stdev(values):.4f}" if len(values) > 1 else "")


def tables(rows: list[dict]) -> str:
    """The frontier against its targets, and the scorers, as Markdown."""
    main = [row for row in rows if row["scorer"] == "kd_gradient"]
    dense = {row["seed"]: row["dense_accuracy"] for row in main}
    head = ["target sparsity", "", "seeds", "measured", "accuracy", "against dense, points", "allowed", "speed-up", "wanted",
            "met"]  # fmt: skip
    enough = met(statistics.mean(dense.values()) >= DENSE_ACCURACY)
    mean = spread(list(dense.values()))
    lines = [head, ["0", "dense", len(dense), "0", mean, "", f">= {DENSE_ACCURACY}", "1.00x", "", enough]]
    for sparsity in sorted({row["asked"] for row in main}):
        for trained in (False, True):
            some = [row for row in main if row["asked"] == sparsity and row["trained"] == trained]
            if not some:
                continue
            allowed, untouched, wanted = TARGETS.get(sparsity, (None, None, None))
            limit = allowed if trained else untouched
            points = statistics.mean(row["accuracy"] - row["dense_accuracy"] for row in some) * 100
            speedup = statistics.mean(row["speedup"] for row in some)
            reached = (limit is None or points >= -limit) and (wanted is None or speedup >= wanted)
            lines.append([f"{sparsity:.2f}", "trained" if trained else "untouched", len(some), f"{some[0]['sparsity']:.3f}",
                          spread([row["accuracy"] for row in some]), f"{points:+.2f}",
                          "" if limit is None else f"{-limit:+.1f}", f"{speedup:.2f}x",
                          "" if wanted is None else f"{wanted:.1f}x", "" if limit is None else met(reached)])  # fmt: skip
    text = table(lines, markdown=True)
    sparsities = sorted({row["asked"] for row in rows if not row["trained"]})
    lines = [["scorer, untouched", *(f"sparsity {s:.2f}" for s in sparsities)]]
    for scorer in SCORERS:
        cells = [[r["accuracy"] for r in rows if (r["scorer"], r["asked"], r["trained"]) == (scorer, s, False)]
                 for s in sparsities]  # fmt: skip
        if any(cells):
            lines.append([scorer, *(spread(values) if values else "" for values in cells)])
    some = rows[0]
    where = (f"n = {some['n']} sentences; mean ± standard deviation over seeds, counted from 0. Speed-up: dense over pruned, "
             "medians of a batch of 32 x 64 tokens in turns in one process, fp32, "
             f"{some['environment']['threads']} threads, {some['environment']['cpu']}.")  # fmt: skip
    return f"{text}\n\n{table(lines, markdown=True)}\n\n{where}\n"


def met(reached: bool) -> str:
    return "yes" if reached else "no"


def draw(rows: list[dict], path: Path) -> None:
    """Accuracy against speed-up, one point a run and one line a scorer."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(figsize=(8, 4.6), layout="constrained")
    dense = statistics.mean({row["seed"]: row["dense_accuracy"] for row in rows}.values())
    axes.axhline(dense, color="0.5", linestyle=":", linewidth=1)
    axes.annotate("dense", (1.0, dense), textcoords="offset points", xytext=(0, 5), color="0.35")
    curves = [("kd_gradient", True, "C0", "pruned while training, --fast"),
              ("kd_gradient", False, "C2", "untouched: kd_gradient"),
              ("activation", False, "C5", "untouched: activation"),
              ("fisher", False, "C1", "untouched: fisher"),
              ("taylor", False, "C9", "untouched: taylor"),
              ("l2", False, "C4", "untouched: l2"),
              ("random", False, "C3", "untouched: random (control)")]  # fmt: skip
    for scorer, trained, color, label in curves:
        some = [row for row in rows if (row["scorer"], row["trained"]) == (scorer, trained)]
        if not some:
            continue
        x, y = ([row[key] for row in some] for key in ("speedup", "accuracy"))
        axes.scatter(x, y, s=14, color=color, alpha=0.45, linewidths=0)
        asked = sorted({row["asked"] for row in some})
        x, y = ([statistics.mean(row[key] for row in some if row["asked"] == s) for s in asked]
                for key in ("speedup", "accuracy"))  # fmt: skip
        axes.plot(x, y, color=color, marker="o", markersize=4, label=label, linewidth=2 if trained else 1.2)
        for at, sparsity in zip(zip(x, y, strict=True), asked if trained else [], strict=False):
            axes.annotate(f"{sparsity:.0%} gone", at, textcoords="offset points", xytext=(4, 7), fontsize=8, color=color)
    axes.set_xscale("log", base=2)
    axes.xaxis.set_major_formatter(lambda value, _: f"{value:g}x")
    axes.set_xlabel("speed-up of a forward over the dense model (same process, CPU, 32 x 64 tokens)")
    axes.set_ylabel("accuracy on the official validation set")
    axes.grid(alpha=0.25)
    axes.spines[["top", "right"]].set_visible(False)
    axes.legend(frameon=False, loc="lower left")
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=150, metadata={"Software": None})
    pyplot.close(figure)


def main(argv=None) -> None:
    parser = Parser(__doc__, shared=("data_dir", "out_dir", "local_dir"))
    parser.add_argument("--task", default="sst2", help="[sst2]")
    parser.add_argument("--model", default="minilm", help="[minilm]")
    parser.add_argument("--sparsities", type=float, nargs="+", default=list(TARGETS), help="[0.2 0.5 0.7 0.9]")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2], help="[0 1 2]")
    parser.add_argument("--scorers", nargs="+", default=list(SCORERS), choices=SCORERS, help="untouched [all]")
    parser.add_argument("--collect", action="store_true", help="run nothing; take the runs that are finished")
    parser.add_argument("--draw", action="store_true", help="run nothing; redo table and picture from the JSON that is there")
    args = parser.parse_args(argv)
    path = RESULTS.with_suffix(".json")
    if args.draw:
        rows = read_json(path)["runs"]
    else:
        plan = [(s, seed, 0, "kd_gradient") for seed in args.seeds for s in args.sparsities]
        plan += [(s, seed, None, "kd_gradient") for seed in args.seeds for s in args.sparsities]
        plan += [(s, seed, 0, scorer) for scorer in args.scorers if scorer != "kd_gradient"
                 for seed in args.seeds for s in args.sparsities]  # fmt: skip
        rows = []
        for sparsity, seed, epochs, scorer in plan:
            row = run(sparsity, seed, epochs, scorer, args)
            rows += [row] if row else []
            record = {"command": "python benchmarks/pruning_frontier.py", "environment": environment(), "runs": rows}
            write_atomic(path, json.dumps(record, indent=1) + "\n")
    write_atomic(RESULTS.with_suffix(".md"), tables(rows))
    draw(rows, RESULTS.with_suffix(".png"))
    print(tables(rows))


if __name__ == "__main__":
    run_script(main)
