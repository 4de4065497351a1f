"""What train_optimized.py gains by its measures, what its monitor costs and sees, and what collapse is kept off by.

    python benchmarks/train_optimized.py                            all parts: hours on two cores
    python benchmarks/train_optimized.py --parts detection          one of them, beside what is there
    python benchmarks/train_optimized.py --fast --results trial     a size at which the numbers mean nothing

Every side is a run of the script; numbers are those of the records and histories. Runs that are finished are not repeated
(another --out_dir measures them again). Parts:

- whole: the fast preset as it is against itself with --baseline, on the same texts; texts a second of the whole training
  (validation, monitor, checkpoints included), for each seed.
- quality: the same two sides for longer, by held-out ELBO after as many texts. Where a text is padded to changes what a step
  takes and not what it learns, so here both have a limit that no text reaches: the baseline would take hours otherwise.
- measures: --baseline with one of its values changed, in turns; speed of all of the training and of warm steps (the later half
  of the history), and the peak memory of the process, beside what the guide expects.
- monitoring: the full preset for an epoch; the shares of the training that the monitor and waiting for data take.
- detection: runs that collapse (no annealing, nothing free) and runs that should not (the defaults), looked at every 10 steps.
  It happened where mutual information stays under 0.2 nats from then on; it is told when the monitor's rules say collapsed of
  every fifth or tenth look.
- routes: KL, active units, mutual information and perplexity by importance weighting of ways against collapse, with times.

Writes benchmarks/results/train_optimized.json (every run: command, numbers) and .md.
"""

from __future__ import annotations

import csv
import json
import shlex
import statistics
import sys
from pathlib import Path

import pandas

REPOSITORY = Path(__file__).resolve().parent.parent
sys.path[:0] = [str(REPOSITORY), str(REPOSITORY / "benchmarks")]

from pruning_frontier import execute, met  # noqa: E402
from recovery import ran_on, where  # noqa: E402

from common import assets, posterior  # noqa: E402
from common.runs import Parser, environment, read_json, run_script, table, write_atomic  # noqa: E402

PRESETS = [
    # flag, full, fast, meaning, limits
    ("n_whole", 600, 60, "training texts of the part whole; 0: all reviews", (0, 10**9)),
    ("n_quality", 4000, 60, "training texts of the part quality; 0: all reviews", (0, 10**9)),
    ("quality_epochs", 2, 1, "epochs of it", (1, 1000)),
    ("quality_length", 128, 128, "tokens that its texts are padded to in the baseline", (1, 10**5)),
    ("n_measured", 300, 40, "training texts of the part measures", (1, 10**9)),
    ("n_repeats", 2, 1, "times that its sides take turns", (1, 1000)),
    ("n_watched", 0, 60, "training texts of the other parts; 0: all reviews", (0, 10**9)),
    ("routes_epochs", 5, 1, "epochs of the part routes", (1, 1000)),
    ("length", 1000, 64, "tokens that texts are cut and padded to without dynamic padding", (1, 10**5)),
]
SMALL = ["--width", "16", "--n_layers", "1", "--n_heads", "2", "--latent_dim", "4", "--n_evaluated", "8", "--iw_samples", "1"]
MEASURES = {  # flags on top of --baseline, the guide's speed-up, its change of memory
    "batch of 4": (["--batch_size", "4"], "30-50 %", "+50 %"),
    "8 loading processes": (["--num_workers", "8"], "20-30 %", "+10 %"),
    "mixed precision": (["--precision", "16-mixed"], "20-40 %", "-30 %"),
    "accumulation of 2": (["--gradient_accumulation_steps", "2"], "10-20 %", "none"),
    "torch.compile": (["--compile_model"], "10-25 %", "none"),
    "monitoring less often": (["--fast_detection"], "5-15 %", "-10 %"),
    "half the length": (["--max_sequence_length", "{half}"], "20-40 %", "-40 %"),
    "dynamic padding": (["--use_dynamic_padding"], "", ""),
    "fewer validations": (["--val_check_interval", "0.1", "--limit_val_batches", "0.1"], "", ""),
    "pinned memory": (["--pin_memory"], "", ""),
}
ROUTES = {
    "nothing": ["--kl_annealing", "none", "--free_bits", "0"],
    "annealing": ["--free_bits", "0"],
    "annealing, free bits": [],
    "lagging encoder": ["--aggressive", "--free_bits", "0"],
}
WATCHED = {"default": [], "fast_detection": ["--fast_detection"]}
SPEED_UP, ELBO_WITHIN, WAITING, COST, DELAY, PAYS = 3.0, 0.01, 0.02, {"default": 0.03, "fast_detection": 0.01}, 300, 1.02


def texts(n: int, args) -> Path | str:
    """The reviews, or a folder with the first n of their training texts and all to judge."""
    task = assets.prepare_task("reviews", args.data_dir).path
    folder = args.out_dir / "train_optimized" / f"reviews-{n}"
    if n and not (folder / "validation.parquet").exists():
        folder.mkdir(parents=True, exist_ok=True)
        for split in ("train", "validation"):
            frame = pandas.read_parquet(task / f"{split}.parquet")[["text"]]
            frame[: n if split == "train" else None].to_parquet(folder / f"{split}.parquet")
    return folder if n else "reviews"


def run(name: str, flags: list[str], n: int, args) -> dict:
    """One run of the script, as a row."""
    command = ["train_optimized.py", "--device", args.device, *flags, *(SMALL if args.fast else [])]
    name = f"bench-{name}-{n or 'all'}".replace(" ", "_").replace(",", "")
    print(f"$ python {shlex.join(command)}", flush=True)
    places = {"data": texts(n, args), "data_dir": args.data_dir, "out_dir": args.out_dir, "run_name": name}
    execute([*command, *(str(word) for flag, value in places.items() for word in (f"--{flag}", value))])
    folder = args.out_dir / "vae" / name
    record = read_json(folder / "run.json")
    with open(folder / "history.csv", newline="", encoding="utf-8") as file:
        history = list(csv.DictReader(file))
    speeds = [float(row["value"]) for row in history if row["metric"] == "examples_per_second"]
    seconds, parts = record["timings"]["training"], record["timings_of_training"]
    epochs, steps = record["config"]["num_epochs"], record["config"]["steps"]
    step_texts = record["config"]["batch_size"] * record["config"]["gradient_accumulation_steps"]
    found = {key: value for key, value in record["metrics"]["vae"].items() if key != "kl_of"}
    return {"command": f"python {shlex.join(command)}", "n_texts": n, "run": name, "seconds": seconds,
            "texts_per_second": steps * step_texts / seconds,
            "warm_texts_per_second": statistics.median(speeds[len(speeds) // 2 :]),
            "monitoring": parts.get("monitoring", 0.0) / seconds, "waiting": parts["waiting for data"] / seconds,
            "validation": parts["validation"] / seconds, "epochs": epochs, "steps": steps, "peak_memory": record["peak_memory"],
            "precision": record["config"]["precision"], "verdict": record["verdict"], "ran_on": ran_on(record["environment"]),
            **found}  # fmt: skip


SIDES = {"baseline": ["--baseline"], "optimised": []}


def whole(args) -> list[dict]:
    base, rows = ["--fast", "--num_epochs", "1", "--n_evaluated", "8", "--iw_samples", "1"], []
    for seed in args.seeds:
        for side, flags in SIDES.items():
            flags = [*base, *flags, "--max_sequence_length", str(args.length), "--seed", str(seed)]
            rows.append({"side": side, "seed": seed} | run(f"whole-{side}-{seed}", flags, args.n_whole, args))
    return rows


def quality(args) -> list[dict]:
    base, rows = ["--fast", "--num_epochs", str(args.quality_epochs), "--n_evaluated", "0"], []
    for seed in args.seeds:
        for side, flags in SIDES.items():
            flags = [*base, *flags, "--max_sequence_length", str(args.quality_length), "--seed", str(seed)]
            rows.append({"side": side, "seed": seed} | run(f"quality-{side}-{seed}", flags, args.n_quality, args))
    return rows


def measures(args) -> list[dict]:
    base = ["--fast", "--baseline", "--num_epochs", "1", "--n_evaluated", "8", "--iw_samples", "1"]
    sides = {"baseline": []} | {name: flags for name, (flags, _, _) in MEASURES.items()}
    rows = []
    for repeat in range(args.n_repeats):
        for side, flags in sides.items():
            flags = [*base, "--max_sequence_length", str(args.length), *(flag.format(half=args.length // 2) for flag in flags)]
            rows.append({"side": side, "repeat": repeat} | run(f"measure-{side}-{repeat}", flags, args.n_measured, args))
    return rows


def monitoring(args) -> list[dict]:
    base = ["--num_epochs", "1", "--n_evaluated", "64", "--iw_samples", "1"]
    return [{"side": side} | run(f"watched-{side}", [*base, *flags], args.n_watched, args) for side, flags in WATCHED.items()]


def told_at(looks: list[dict], every: int) -> int | None:
    """The step at which the monitor's rules say collapsed where only every so many steps are looked at."""
    seen: list[dict] = []
    for look in looks:
        if look["step"] % every == 0:
            seen.append(look)
            if posterior.judge(seen[-max(2, 100 // posterior.TREND) :])[0] == "collapsed":
                return look["step"]
    return None


def happened_at(looks: list[dict]) -> int | None:
    """The first look from which on there is too little mutual information."""
    dead = None
    for look in looks:
        dead = (look["step"] if dead is None else dead) if look["mutual_information"] < posterior.LITTLE else None
    return dead


def looks_of(path: Path) -> list[dict]:
    """What posterior.csv says of each look; nothing where a run was too short for one."""
    if not path.exists():
        return []
    with open(path, newline="", encoding="utf-8") as file:
        return [{"step": int(line["step"]), "kl": float(line["kl"]), "active_units": int(line["active_units"]),
                 "mutual_information": float(line["mutual_information"]),
                 "kl_of": [value for key, value in line.items() if key.removeprefix("kl_").isdigit()]}
                for line in csv.DictReader(file)]  # fmt: skip


def detection(args) -> list[dict]:
    rows = []
    for kind, flags in (("collapses", ROUTES["nothing"]), ("healthy", [])):
        for seed in args.detection_seeds:
            flags_of = ["--fast", "--num_epochs", "1", "--update_frequency", "10", "--seed", str(seed), *flags]
            row = run(f"detection-{kind}-{seed}", [*flags_of, "--n_evaluated", "64", "--iw_samples", "1"], args.n_watched, args)
            looks = looks_of(args.out_dir / "vae" / row["run"] / "posterior.csv")
            told = {str(every): told_at(looks, every) for every in (10, 50, 100)}
            rows.append({"kind": kind, "seed": seed, "happened": happened_at(looks), "told": told} | row)
    return rows


def routes(args) -> list[dict]:
    base = ["--fast", "--num_epochs", str(args.routes_epochs), "--n_evaluated", "256", "--iw_samples", "50"]
    return [{"route": name} | run(f"route-{name}", [*base, *flags], args.n_watched, args) for name, flags in ROUTES.items()]


PARTS = {"whole": whole, "quality": quality, "measures": measures, "monitoring": monitoring, "detection": detection,
         "routes": routes}  # fmt: skip


# --------------------------------------------------------------------------------------------------------------- tables


def spread(values: list[float], form: str = ".2f") -> str:
    return f"{statistics.mean(values):{form}}" + (f" ± {statistics.stdev(values):{form}}" if len(values) > 1 else "")


def of_sides(rows: list[dict], key: str) -> dict[str, list[float]]:
    return {side: [row[key] for row in rows if row["side"] == side] for side in SIDES}


def n_texts(rows: list[dict]) -> str:
    """Those that either side trained on: the baseline's steps are of one text."""
    return f"{next(row['steps'] for row in rows if row['side'] == 'baseline'):,}"


def table_whole(rows: list[dict]) -> list[list]:
    speeds, memory = of_sides(rows, "texts_per_second"), of_sides(rows, "peak_memory")
    ratio = statistics.mean(speeds["optimised"]) / statistics.mean(speeds["baseline"])
    lines = [["fast preset", "seeds", "texts", "texts a second", "speed-up", "wanted", "met", "peak memory"]]
    for side in SIDES:
        judged = [f"{ratio:.2f}x", f"{SPEED_UP:g}x", met(ratio >= SPEED_UP)] if side == "optimised" else ["", "", ""]
        lines.append([side, len(speeds[side]), n_texts(rows), spread(speeds[side]), *judged,
                      f"{statistics.mean(memory[side]) / 2**20:,.0f} MiB"])  # fmt: skip
    return lines


def table_quality(rows: list[dict]) -> list[list]:
    losses = of_sides(rows, "negative_elbo")
    worse = statistics.mean(losses["optimised"]) / statistics.mean(losses["baseline"]) - 1
    lines = [["fast preset", "seeds", "texts", "negative ELBO", "against", "wanted", "met"]]
    for side in SIDES:
        judged = [f"{worse:+.2%}", f"{ELBO_WITHIN:+.0%}", met(worse <= ELBO_WITHIN)] if side == "optimised" else ["", "", ""]
        lines.append([side, len(losses[side]), n_texts(rows), spread(losses[side]), *judged])
    return lines


def table_measures(rows: list[dict]) -> list[list]:
    lines = [["one measure, on the baseline", "texts a second", "of it", "warm steps, of it", "memory, of it", "guide: speed",
              "guide: memory", "pays here"]]  # fmt: skip
    base = {row["repeat"]: row for row in rows if row["side"] == "baseline"}
    for side in dict.fromkeys(row["side"] for row in rows):
        some = [row for row in rows if row["side"] == side]

        def ratio(key: str, some=some) -> float:
            return statistics.median(row[key] / base[row["repeat"]][key] for row in some)

        speed = statistics.median(row["texts_per_second"] for row in some)
        gains = max(ratio("texts_per_second"), ratio("warm_texts_per_second") if side == "torch.compile" else 0.0)
        judged = [*MEASURES[side][1:], "yes" if gains >= PAYS else "no"] if side in MEASURES else ["", "", ""]
        lines.append([side, f"{speed:.2f}", f"{ratio('texts_per_second'):.2f}x", f"{ratio('warm_texts_per_second'):.2f}x",
                      f"{ratio('peak_memory'):.2f}x", *judged])  # fmt: skip
    return lines


def table_monitoring(rows: list[dict]) -> list[list]:
    lines = [["full preset", "steps", "monitor, of training", "wanted", "met", "waiting for data", "wanted", "met"]]
    for row in rows:
        cost = COST[row["side"]]
        lines.append([row["side"], f"{row['steps']:,}", f"{row['monitoring']:.2%}", f"{cost:.0%}",
                      met(row["monitoring"] <= cost), f"{row['waiting']:.2%}", f"{WAITING:.0%}",
                      met(row["waiting"] <= WAITING)])  # fmt: skip
    return lines


def table_detection(rows: list[dict]) -> list[list]:
    lines = [["run", "seed", "steps", "happened at", "told at, looks every 50", "every 100", "wanted", "met"]]
    for row in rows:
        told, happened = row["told"], row["happened"]
        if row["kind"] == "collapses":
            reached = None not in (happened, told["50"]) and told["50"] <= min(happened + DELAY, row["steps"])
            wanted = f"within {DELAY} steps"
        else:
            reached, wanted = not any(told.values()), "never"
        shown = ["" if value is None else value for value in (happened, told["50"], told.get("100"))]
        lines.append([row["kind"], row["seed"], row["steps"], *shown, wanted, met(reached)])
    return lines


def table_routes(rows: list[dict]) -> list[list]:
    head = ["against collapse", "KL", "active units", "mutual information", "negative ELBO", "NLL, importance weighted",
            "perplexity", "minutes", "verdict"]  # fmt: skip
    return [head, *([row["route"], f"{row['kl']:.2f}", row["active_units"], f"{row['mutual_information']:.2f}",
                     f"{row['negative_elbo']:.2f}", f"{row['importance_weighted_nll']:.2f}", f"{row['perplexity']:.2f}",
                     f"{row['seconds'] / 60:.1f}", row["verdict"][0]] for row in rows)]  # fmt: skip


TABLES = {"whole": table_whole, "quality": table_quality, "measures": table_measures, "monitoring": table_monitoring,
          "detection": table_detection, "routes": table_routes}  # fmt: skip


def tables(record: dict) -> str:
    parts = [table(TABLES[part](record["parts"][part]), markdown=True) for part in TABLES if part in record["parts"]]
    of = {part: rows for part, rows in record["parts"].items() if rows}
    used = sorted({row["precision"] for rows in of.values() for row in rows})
    note = (f"Movie reviews; speeds are of the whole training; precision {', '.join(used)}. A measure pays where it gains "
            f"{PAYS - 1:.0%} or more. " + " ".join(f"{part}: {where(rows)}." for part, rows in of.items()))  # fmt: skip
    return "\n\n".join([*parts, note]) + "\n"


def main(argv=None) -> None:
    parser = Parser(__doc__, PRESETS, ("data_dir", "out_dir", "device"))
    parser.add_argument("--parts", nargs="+", default=list(PARTS), choices=PARTS, help="[all]")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2], help="of the parts whole and quality [0 1 2]")
    parser.add_argument("--detection_seeds", type=int, nargs="+", default=[0, 1, 2, 3, 4], help="[0 1 2 3 4]")
    parser.add_argument("--results", type=Path, default=REPOSITORY / "benchmarks" / "results",
                        help="folder of the record and the tables [benchmarks/results]")  # fmt: skip
    args = parser.parse_args(argv)
    path = args.results / "train_optimized.json"
    record = read_json(path) if path.exists() else {"parts": {}}
    record |= {"command": "python benchmarks/train_optimized.py", "environment": environment()}
    for part in args.parts:
        record["parts"][part] = PARTS[part](args)
        record.setdefault("settings", {})[part] = {row[0]: getattr(args, row[0]) for row in PRESETS}
        write_atomic(path, json.dumps(record, indent=1) + "\n")
        write_atomic(path.with_suffix(".md"), tables(record))
    print(tables(record))


if __name__ == "__main__":
    run_script(main)
