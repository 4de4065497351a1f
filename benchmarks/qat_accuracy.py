"""Accuracy, size and speed of script 10: bits, students, how scales are found, seeds; from its own records.

    python benchmarks/qat_accuracy.py --local_dir PATH/SST-2        the whole of it: hours on two cores
    python benchmarks/qat_accuracy.py --seeds 0 --cases W4 W2       a part of it
    python benchmarks/qat_accuracy.py --collect                     run nothing: the runs that are finished

Runs `8_pruning_with_finetuning.py --fast` at a sparsity of one half for each seed (the runs of pruning_frontier.py), then
`10_qat_kd_4bit.py --fast` on its dense model and on the pruned one. The numbers are those of the runs' records: accuracy on the
official validation set, which no choice has seen; bytes of the whole directory; latency in turns in one process. Runs that are
finished are not repeated.

Writes benchmarks/results/qat_accuracy.json and .md, from which `python benchmarks/update_readme.py` takes the README's tables.
"""

from __future__ import annotations

import json
import shlex
import statistics
import sys
from pathlib import Path

REPOSITORY = Path(__file__).resolve().parent.parent
sys.path[:0] = [str(REPOSITORY), str(REPOSITORY / "benchmarks")]

from pruning_frontier import execute, met, spread  # noqa: E402

from common.runs import Parser, environment, read_json, run_script, table, write_atomic  # noqa: E402

RESULTS = REPOSITORY / "benchmarks" / "results" / "qat_accuracy"
# name: student, flags, points that may be lost against the dense model, and against the student
CASES = {
    "W4": ("dense", [], 0.2, None),
    "W4 pruned": ("pruned", ["--export", "onnx"], 0.5, 0.2),
    "W3": ("dense", ["--weight_bits", "3"], 0.7, None),
    "W2": ("dense", ["--weight_bits", "2"], 3.0, None),
    "W3 minmax": ("dense", ["--weight_bits", "3", "--scale_method", "minmax"], None, None),
    "W2 minmax": ("dense", ["--weight_bits", "2", "--scale_method", "minmax"], None, None),
}
SMALLER, FASTER = 1 / 9, 3.0  # bytes of the pruned W4 model and the speed of its ONNX file, against the dense fp32 model


def pruned_run(seed: int, args) -> Path:
    """The directory of script 8's run at half the sparsity; it is made if it is not there."""
    name = f"frontier-{args.task}-kd_gradient-0.5-fast-seed{seed}"
    folder = args.out_dir / "prune" / name
    if not args.collect:
        chosen = ["--target_sparsity", "0.5", "--seed", str(seed), "--importance", "kd_gradient"]
        execute(["8_pruning_with_finetuning.py", "--fast", "--task", args.task, "--model", args.model, *chosen,
                 *places(args, name)])  # fmt: skip
    return folder


def places(args, name: str) -> list[str]:
    local = ["--local_dir", str(args.local_dir)] if args.local_dir else []
    return ["--data_dir", str(args.data_dir), "--out_dir", str(args.out_dir), "--run_name", name, *local]


def run(case: str, seed: int, args) -> dict | None:
    """One run of script 10 (or the record of the one there is) as a row; None with `--collect` where there is none."""
    student, flags, _, _ = CASES[case]
    name = f"qat-{args.task}-{case.replace(' ', '-')}-seed{seed}"
    record_path = args.out_dir / "qat" / name / "run.json"
    if args.collect and not (record_path.exists() and read_json(record_path)["status"] == "finished"):
        return None
    command = ["10_qat_kd_4bit.py", "--fast", "--task", args.task, "--seed", str(seed), *flags]
    shown = f"python {shlex.join(command)}   # the {student} model of seed {seed}"
    print(f"$ {shown}", flush=True)
    if not args.collect:
        folder = pruned_run(seed, args)
        dense = read_json(folder / "run.json")["dense_dir"]
        which = dense if student == "dense" else str(folder / "model")
        execute([*command, "--pruned_model_path", which, "--teacher_path", dense, *places(args, name)])
    record = read_json(record_path)
    row = {"case": case, "seed": seed, "command": shown, "metrics": record["metrics"], "environment": record["environment"],
           "reload_difference": record["reload_difference"], "reload_agreement": record["reload_agreement"],
           "seconds": sum(record["timings"].values())}  # fmt: skip
    print("  " + ", ".join(f"{key} {values['accuracy']:.4f}" for key, values in record["metrics"].items()), flush=True)
    return row


def tables(rows: list[dict]) -> str:
    """Accuracy against the targets, and size and speed of the pruned 4-bit model, as Markdown."""

    def points(some: list[dict], of: str, against: str) -> float:
        return 100 * statistics.mean(r["metrics"][of]["accuracy"] - r["metrics"][against]["accuracy"] for r in some)

    lines = [["student and weights", "seeds", "dense", "student", "PTQ", "QAT", "against dense, points", "allowed",
              "against student", "allowed", "bits", "met"]]  # fmt: skip
    for case, (_, _, of_dense, of_student) in CASES.items():
        if not (some := [row for row in rows if row["case"] == case]):
            continue
        base = "pruned" if "pruned" in some[0]["metrics"] else "dense"
        mean = {key: spread([row["metrics"][key]["accuracy"] for row in some]) for key in ("dense", base, "ptq", "qat")}
        lost, of_own = points(some, "qat", "dense"), points(some, "qat", base)
        reached = [lost >= -of_dense - 1e-9] if of_dense is not None else []
        reached += [of_own >= -of_student - 1e-9] if of_student is not None else []
        lines.append([case, len(some), mean["dense"], mean[base], mean["ptq"], mean["qat"], f"{lost:+.2f}",
                      "" if of_dense is None else f"{-of_dense:+.1f}", f"{of_own:+.2f}",
                      "" if of_student is None else f"{-of_student:+.1f}",
                      f"{statistics.mean(row['metrics']['qat']['bits_per_weight'] for row in some):.2f}",
                      met(all(reached)) if reached else ""])  # fmt: skip
    text = table(lines, markdown=True)
    some = [row for row in rows if "onnx" in row["metrics"]]
    if some:
        def ratio(key: str, of: str, inverse: bool = False) -> list[float]:
            ratios = [row["metrics"][of][key] / row["metrics"]["dense"][key] for row in some]
            return [1 / value for value in ratios] if inverse else ratios

        lines = [["4 bits, half pruned, against dense fp32", "measured", "wanted", "met"]]
        size = statistics.mean(ratio("bytes", "qat"))
        lines.append(["bytes of the directory", f"1/{1 / size:.2f}", f"1/{1 / SMALLER:.0f}", met(size <= SMALLER)])
        for key, label in (("single_latency_ms", "1 x 64 tokens"), ("latency_ms", "32 x 64 tokens")):
            faster = statistics.mean(ratio(key, "onnx", inverse=True))
            lines.append([f"speed of the ONNX file, {label}", f"{faster:.2f}x", f"{FASTER:.0f}x", met(faster >= FASTER)])
        lines.append(["accuracy of the ONNX file", spread([row["metrics"]["onnx"]["accuracy"] for row in some]), "", ""])
        text += "\n\n" + table(lines, markdown=True)
    where, n = rows[0]["environment"], rows[0]["metrics"]["dense"]["n"]
    return (f"{text}\n\nn = {n} sentences; mean ± standard deviation over seeds. Inputs 8 bits, embeddings 4 bits. Latency: "
            f"medians in turns in one process, {where['threads']} threads, {where['cpu']}.\n")  # fmt: skip


def main(argv=None) -> None:
    parser = Parser(__doc__, shared=("data_dir", "out_dir", "local_dir"))
    parser.add_argument("--task", default="sst2", help="[sst2]")
    parser.add_argument("--model", default="minilm", help="[minilm]")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2], help="[0 1 2]")
    parser.add_argument("--cases", nargs="+", default=list(CASES), choices=CASES, help="[all]")
    parser.add_argument("--collect", action="store_true", help="run nothing; take the runs that are finished")
    args = parser.parse_args(argv)
    rows = []
    for seed in args.seeds:
        for case in args.cases:
            row = run(case, seed, args)
            rows += [row] if row else []
            record = {"command": "python benchmarks/qat_accuracy.py", "environment": environment(), "runs": rows}
            write_atomic(RESULTS.with_suffix(".json"), json.dumps(record, indent=1) + "\n")
    write_atomic(RESULTS.with_suffix(".md"), tables(rows))
    print(tables(rows))


if __name__ == "__main__":
    run_script(main)
