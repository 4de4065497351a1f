"""A tenth of the weights, and a twentieth: what is lost at once, what training gives back, and which part of it does so.

    python benchmarks/extreme.py                                 the tables: three seeds
    python benchmarks/extreme.py --seeds 0 --names ours          a part of them, beside what is there
    python benchmarks/extreme.py --collect                       run nothing: the runs that are finished, beside what is there

Every run is `extreme_compression_experiment.py --fast` on assets/tiny_llama and the news; its perplexities are of the test
split. What is compared is the excess: log-perplexity over the dense model's. All trained rows have the same windows, steps and
learning rate. "ours" is the script's default: masks, weights and allocation by kfac, distillation from the dense model. Each
of the rows below it has one of these changed. "wide": the sparsities of projections lie within 0.08 of the mean, as is right
for half of the weights, and not within a fifth of the density. The batch sizes are those of "ours": with each the data are the
same, steps and rate follow the script's rule. "magnitude, plain" is what the field does first: the smallest weights of every
projection go, and cross-entropy trains the rest. The share of the time that evaluation takes is of the epochs of "ours". "of
plain's": of the perplexity, and of the excess, of the magnitude route at the same density, same seeds.

Writes benchmarks/results/extreme.json (every run: command, metrics) and .md.
"""

from __future__ import annotations

import json
import math
import statistics
import sys
from pathlib import Path

REPOSITORY = Path(__file__).resolve().parent.parent
sys.path[:0] = [str(REPOSITORY), str(REPOSITORY / "benchmarks")]

from pruning_frontier import met  # noqa: E402
from recovery import ran_on, run, spread, where  # noqa: E402

from common.runs import Parser, environment, read_json, run_script, table, write_atomic  # noqa: E402

RESULTS = REPOSITORY / "benchmarks" / "results" / "extreme"
PLAIN = ["--prune_method", "magnitude", "--no_distill"]
#  name: density, flags
TRAINED = {
    "magnitude, plain": (0.1, PLAIN),
    "ours": (0.1, []),
    "ours, no distillation": (0.1, ["--no_distill"]),
    "ours, uniform allocation": (0.1, ["--allocation", "uniform"]),
    "ours, wide allocation": (0.1, ["--allocation_limit", "0.08"]),
    "ours, magnitude's masks": (0.1, ["--prune_method", "magnitude"]),
    "ours, pruned while training": (0.1, ["--schedule", "cubic"]),
    "magnitude, plain, 0.05": (0.05, PLAIN),
    "ours, 0.05": (0.05, []),
    "batch 1": (0.1, ["--batch_size", "1"]),
    "batch 2": (0.1, ["--batch_size", "2"]),
    "batch 4": (0.1, ["--batch_size", "4"]),
}
AT_ONCE = ("kfac", "sparsegpt", "magnitude")  # untrained: methods of main_block.py
OF_SPARSEGPT, OF_PLAIN = 0.5, 0.6  # wanted, of the excess
ALIKE, EVALUATION = 0.02, 0.05  # wanted: difference of batch sizes, share of an epoch


def prune(name: str, density: float, seed: int, args) -> dict | None:
    """One pruning without training, as a row."""
    command = ["main_block.py", "--prune_method", name, "--sparsity_ratio", f"{1 - density:g}", "--calibration", "news",
               "--eval", "--eval_text", "news", "--seed", str(seed)]  # fmt: skip
    record = run(f"extreme-{name}-{density:g}-seed{seed}", command, "one_shot", args)
    if record is None:
        return None
    found = {name: record["metrics"][name]["perplexity"] for name in ("dense", "pruned")}
    return {"name": name, "density": density, "seed": seed, "command": record["shown"], "dense": found["dense"],
            "perplexity": found["pruned"], "sparsity": record["metrics"]["pruned"]["sparsity"],
            "ran_on": ran_on(record["environment"])}  # fmt: skip


def train(name: str, seed: int, args) -> dict | None:
    """One trained run as a row."""
    density, flags = TRAINED[name]
    command = ["extreme_compression_experiment.py", "--fast", "--sparsity", f"{density:g}", *flags, "--dataset", "news",
               "--eval_text", "news", "--seed", str(seed)]  # fmt: skip
    label = "".join(letter if letter.isalnum() else "-" for letter in name)
    record = run(f"{label}-seed{seed}", command, "extreme", args)
    if record is None:
        return None
    metrics, epochs = record["metrics"], record["epochs"].values()
    evaluation = sum(epoch["evaluation_seconds"] for epoch in epochs)
    print(f"  perplexity {metrics['trained']['perplexity']:.2f}", flush=True)
    return {"name": name, "density": density, "seed": seed, "command": record["shown"],
            "dense": metrics["dense"]["perplexity"], "pruned": metrics["pruned"]["perplexity"],
            "perplexity": metrics["trained"]["perplexity"], "sparsity": metrics["trained"]["sparsity"],
            "steps": sum(epoch["batches"] for epoch in epochs), "seconds": record["timings"]["training"],
            "evaluation_share": evaluation / (evaluation + sum(epoch["seconds"] for epoch in epochs)),
            "ran_on": ran_on(record["environment"]), "untimed": args.untimed}  # fmt: skip


def tables(record: dict) -> str:
    rows, parts = record["runs"], []

    def of(name, density):
        return {row["seed"]: row for row in rows if (row["name"], row["density"]) == (name, density)}

    def excess(found):
        return statistics.mean(math.log(row["perplexity"] / row["dense"]) for row in found.values())

    def perplexities(found):
        return spread([row["perplexity"] for row in found.values()])

    lines = [["density", "pruned at once by", "seeds", "perplexity", "excess", "of sparsegpt's", "wanted", "met"]]
    for density in (0.1, 0.05):
        base = of("sparsegpt", density)
        for name in AT_ONCE:
            if found := of(name, density):
                shared = {*found} & {*base} if name == "kfac" else {}
                both = [{seed: rows[seed] for seed in shared} for rows in (found, base)]
                share = excess(both[0]) / excess(both[1]) if shared else None
                wanted = OF_SPARSEGPT if share is not None and (name, density) == ("kfac", 0.1) else None
                lines.append([f"{density:g}", name, len(found), perplexities(found), f"{excess(found):.3f}",
                              "" if share is None else f"{share:.2f}", "" if wanted is None else f"{wanted:g}",
                              "" if wanted is None else met(share <= wanted)])  # fmt: skip
    if len(lines) > 1:
        parts.append(table(lines, markdown=True))
    lines = [["trained", "density", "seeds", "steps", "before", "perplexity", "of plain's", "excess", "of plain's", "wanted",
              "met"]]  # fmt: skip
    for name, (density, _) in TRAINED.items():
        found, plain = of(name, density), of("magnitude, plain" if density == 0.1 else "magnitude, plain, 0.05", density)
        if not found or name.startswith("batch"):
            continue
        if shared := {*found} & {*plain} if "plain" not in name else None:
            both = [{seed: rows[seed] for seed in shared} for rows in (found, plain)]
            share, whole = excess(both[0]) / excess(both[1]), math.exp(excess(both[0]) - excess(both[1]))
        else:
            share = whole = None
        wanted = OF_PLAIN if name == "ours" and share is not None else None
        first = next(iter(found.values()))
        lines.append([name, f"{density:g}", len(found), first["steps"], spread([row["pruned"] for row in found.values()]),
                      perplexities(found), "" if whole is None else f"{whole:.2f}", f"{excess(found):.3f}",
                      "" if share is None else f"{share:.2f}", "" if wanted is None else f"{wanted:g}",
                      "" if wanted is None else met(share <= wanted)])  # fmt: skip
    if len(lines) > 1:
        parts.append(table(lines, markdown=True))
    sizes = {8: of("ours", 0.1)} | {size: of(f"batch {size}", 0.1) for size in (4, 2, 1)}
    if sum(map(bool, sizes.values())) > 1:
        means = {size: statistics.mean(row["perplexity"] for row in found.values()) for size, found in sizes.items() if found}
        lines = [["batch size", "seeds", "steps", "perplexity", "against batch 8", "wanted", "met"]]
        for size, mean in means.items():
            difference = mean / means[8] - 1 if 8 in means else None
            judged = difference is not None and size != 8
            lines.append([size, len(sizes[size]), next(iter(sizes[size].values()))["steps"], perplexities(sizes[size]),
                          f"{difference:+.1%}" if judged else "", f"{ALIKE:.0%}" if judged else "",
                          met(abs(difference) <= ALIKE) if judged else ""])  # fmt: skip
        parts.append(table(lines, markdown=True))
    said = "Mean ± standard deviation over the seeds. Excess: log-perplexity over the dense model's."
    if shares := [row["evaluation_share"] for row in of("ours", 0.1).values() if not row.get("untimed")]:
        share = statistics.mean(shares)
        said += f" Evaluation takes {share:.1%} of the time of an epoch of ours (wanted: {EVALUATION:.0%} at most, or said so)."
    parts.append(f"{said} {where(rows)}.")
    return "\n\n".join(parts) + "\n"


def main(argv=None) -> None:
    parser = Parser(__doc__, shared=("data_dir", "out_dir"))
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2], help="[0 1 2]")
    parser.add_argument("--names", nargs="+", default=["at once", *TRAINED], choices=("at once", *TRAINED),
                        help="only these rows [all]")  # fmt: skip
    parser.add_argument("--at_once", nargs="+", default=AT_ONCE, choices=AT_ONCE, help="of the rows at once [all]")
    parser.add_argument("--untimed", action="store_true", help="the runs were paused or shared a machine: no times of them")
    parser.add_argument("--collect", action="store_true", help="run nothing; take the runs that are finished")
    args = parser.parse_args(argv)
    path = RESULTS.with_suffix(".json")
    record = read_json(path) if path.exists() else {"runs": []}
    record |= {"command": "python benchmarks/extreme.py", "environment": environment()}
    rows = {(row["name"], row["density"], row["seed"]): row for row in record["runs"]}
    for seed in args.seeds:
        for name in args.names:
            if name == "at once":
                found = [prune(pruned, density, seed, args) for density in (0.1, 0.05) for pruned in args.at_once]
            else:
                found = [train(name, seed, args)]
            rows |= {(row["name"], row["density"], row["seed"]): row for row in found if row}
            record["runs"] = list(rows.values())
            if rows:
                write_atomic(path, json.dumps(record, indent=1) + "\n")
                write_atomic(RESULTS.with_suffix(".md"), tables(record))
    print(tables(record))


if __name__ == "__main__":
    run_script(main)
