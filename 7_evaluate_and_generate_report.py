"""Every run under out/ in one report: final models measured again, compared with their records, drawn and listed.

    python 7_evaluate_and_generate_report.py                         all runs under out/
    python 7_evaluate_and_generate_report.py --fast                  on a part of the validation set, and marked so
    python 7_evaluate_and_generate_report.py --runs out/qat/0a4e1d05 out/prune/1c505b2d

Reads records, histories and models, and changes none of them. Each model is measured in a fresh process: accuracy, F1,
confusion matrix, calibration error (arXiv 1706.04599, eq. 3); of causal LMs perplexity, as their record says it was measured;
of text VAEs the ELBO; size, MACs, latency. A figure that differs from the run's record is flagged. Runs that failed or were
interrupted are listed as such; what cannot be read is skipped, and that is said.

Writes report/index.html (one file, no network), report/report.md and report/summary.csv. What they show, flags, metrics:
docs/7_evaluate_and_generate_report.md.
"""

from __future__ import annotations

import csv
import html
import io
import os
import subprocess
import sys
from concurrent.futures import ProcessPoolExecutor
from multiprocessing import get_context
from pathlib import Path
from typing import Any

import numpy as np
import torch
from tqdm import tqdm

from common import eval_utils, fetch, report, runs, vae_eval
from common.remeasure import CALIBRATION_BINS, remeasure, remeasure_lm, remeasure_vae
from common.report import Cell
from common.runs import UserError, read_json, write_atomic

PRESETS = [
    # flag, full, fast, meaning, limits
    ("validation_fraction", 1.0, 0.25, "share of the validation set, or text, that models are measured on", (1e-6, 1)),
    ("latency_seconds", 3.0, 0.5, "seconds of timing for each model and batch size", (0, 3600)),
    ("latency_batch", 32, 32, "examples of the batch that is timed, beside one alone", (1, 10**6)),
    ("latency_length", 64, 64, "tokens of each", (3, 10**6)),
    ("latency_tolerance", 1.5, 1.5, "factor by which a latency may differ from the record's before it is flagged", (1, 10**6)),
]
COLUMNS = [  # key of a measurement, label, text of a value
    ("accuracy", "accuracy", lambda v: f"{v:.4f}"),
    ("f1", "F1", lambda v: f"{v:.4f}"),
    ("calibration_error", "calibration error", lambda v: f"{v:.4f}"),
    ("perplexity", "perplexity", lambda v: f"{v:.2f}"),
    ("negative_elbo", "negative ELBO", lambda v: f"{v:.2f}"),
    ("n", "n", str),
    ("parameters", "parameters", lambda v: f"{v / 1e6:.2f} M"),
    ("bytes", "bytes", lambda v: f"{v / 1e6:.1f} MB"),
    ("macs_per_example", "MACs", lambda v: f"{v / 1e6:,.0f} M"),
    ("latency_ms", "latency", lambda v: f"{v:.1f} ms"),
    ("single_latency_ms", "one example", lambda v: f"{v:.2f} ms"),
]
EXACT = ("accuracy", "f1", "perplexity", "negative_elbo", "parameters", "bytes", "macs_per_example")  # have to be as recorded
OF_DATA = ("accuracy", "f1", "perplexity", "negative_elbo")  # of these, what part of the data would change
ROUNDED = ("perplexity", "negative_elbo")  # sums of many products: equal to one part in ten thousand


# ------------------------------------------------------------------------------------------------------------ what is there


def find_runs(args) -> tuple[list[dict[str, Any]], list[str]]:
    """Every run with its record, and one line for each directory that had to be skipped."""
    if args.runs:
        folders = args.runs
    else:
        folders = sorted(path.parent for path in args.out_dir.glob("*/*/run.json"))
        folders += sorted({path.parent for path in args.out_dir.glob("*/*/model")} - set(folders))
    found, skipped = [], []
    for folder in folders:
        try:
            record = read_json(folder / "run.json")
            if not isinstance(record, dict) or not {"status", "config"} <= record.keys():
                raise UserError(f"{folder / 'run.json'}: no run's record (status and config are missing)")
            path = folder / "history.csv"
            lines = path.read_text(encoding="utf-8").splitlines() if path.exists() else []
            history = [row for row in csv.reader(lines) if len(row) == 4 and row[0].isdigit()]
        except (UserError, OSError, UnicodeDecodeError, csv.Error) as error:
            skipped.append(str(error))
            continue
        found.append({"dir": folder, "name": f"{folder.parent.name}/{folder.name}", "record": record, "history": history})
    return found, skipped


def data_of(record: dict, data_dir: Path) -> Path:
    """The prepared task, or text, that a run was judged on, found by its hash. UserError where it is not there any more."""
    wanted = {asset["sha256"] for asset in record["config"].get("assets", [])}
    wanted = {record["evaluation"]["sha256"]} if "evaluation" in record else wanted
    for manifest in sorted(data_dir.glob("*/manifest.json")):
        if fetch.digest(read_json(manifest).get("splits", {})) in wanted:
            return manifest.parent
    names = ", ".join(asset["name"] for asset in record["config"].get("assets", []))
    raise UserError(f"the data it was judged on ({names}) is not under {data_dir}. Run: python 1_prepare_data.py")


def final_metrics(record: dict) -> dict[str, Any]:
    """What a record says of its own model: the last column of its table that is a directory of transformers."""
    columns = [(name, values) for name, values in record.get("metrics", {}).items() if isinstance(values, dict)]
    return next((values for name, values in reversed(columns) if name != "onnx"), {})


# ---------------------------------------------------------------------------------------------------------------- measured


def measure_all(found: list[dict], args, skipped: list[str]) -> None:
    """Put `measured` and `differences` into each run that has a final model."""
    settings = {"threads": torch.get_num_threads(), "device": args.device, "fraction": args.validation_fraction,
                "batch": args.latency_batch, "length": args.latency_length, "seconds": args.latency_seconds}  # fmt: skip
    for run in tqdm([r for r in found if r["record"]["status"] == "finished"], "measuring", leave=False, disable=None):
        record = run["record"]
        try:
            model_dir = Path(record.get("model_dir") or run["dir"] / "model")
            if not (model_dir / "config.json").exists():
                raise UserError(f"{model_dir}: the record says finished, and there is no model")
            before = record.get("student_dir") or record.get("dense_dir", "none there")
            before = Path(before) if "metrics" in record and Path(before).exists() else None
            kind = read_json(model_dir / "config.json")
            if kind.get("class") == "TextVAE":
                what = (remeasure_vae, model_dir, data_of(record, args.data_dir), record["config"], settings)
            elif str(kind.get("architectures")).endswith("ForCausalLM']"):
                how = record.get("evaluation")
                what = (remeasure_lm, model_dir, data_of(record, args.data_dir) if how else None, how, before, settings)
            else:
                before = before if "student_dir" in record else None
                what = (remeasure, model_dir, data_of(record, args.data_dir), record["config"].get("max_length", 128), before,
                        settings)  # fmt: skip
            with ProcessPoolExecutor(1, get_context("spawn")) as fresh:
                run["measured"] = fresh.submit(*what).result()
        except Exception as error:  # one bad model must not cost the report of the others
            skipped.append(f"{run['name']}: {str(error).splitlines()[0] if str(error) else type(error).__name__}")
            continue
        run["differences"] = differences(final_metrics(record), run["measured"], args)


def differences(recorded: dict, measured: dict, args) -> list[str]:
    """Figures of the record that were not measured again, one line each."""
    exact = [key for key in EXACT if key in recorded and key in measured]
    exact = [key for key in exact if args.validation_fraction == 1 or key not in OF_DATA]
    found = [f"{key} {measured[key]:.6g}, recorded {recorded[key]:.6g}" for key in exact
             if abs(measured[key] - recorded[key]) > (1e-4 if key in ROUNDED else 1e-9) * max(1, abs(recorded[key]))]
    if recorded.get("latency_ms") and (args.latency_batch, args.latency_length) == (32, 64):
        ratio = measured["latency_ms"] / recorded["latency_ms"]
        if max(ratio, 1 / ratio) > args.latency_tolerance:
            found.append(f"latency_ms {measured['latency_ms']:.4g}, recorded {recorded['latency_ms']:.4g}")
    return found


# ------------------------------------------------------------------------------------------------------------------ drawn


def frontier(found: list[dict], quality: str, key: str, label: str, scale: float) -> str:
    """One chart of `quality` against `key`, of the runs that have it; nothing where none has."""
    found = [r for r in found if quality in r["measured"]]
    if not found:
        return ""
    figure, axes = report.new_figure()
    for i, experiment in enumerate(sorted({r["dir"].parent.name for r in found})):
        some = [r["measured"] for r in found if r["dir"].parent.name == experiment]
        x, y = [m[key] / scale for m in some], [m[quality] for m in some]
        axes.scatter(x, y, label=experiment, color=f"C{i}", s=26, alpha=0.8)
    axes.set(xlabel=label, ylabel=quality, xlim=(0, None))
    axes.margins(y=0.1)
    axes.legend(frameon=False)
    return report.chart(figure, f"frontier-{quality}-{key}", f"{quality.capitalize()} against {label}, one point a model.")


def curves(run: dict) -> str:
    """Every metric of the history but speed, with the pruning phase shaded."""
    metrics = sorted({row[2] for row in run["history"]} - {"examples_per_second"})
    parts = []
    for metric in metrics:
        rows = [(int(row[0]), row[1], float(row[3])) for row in run["history"] if row[2] == metric]
        figure, axes = report.new_figure(4.4, 2.6)
        axes.plot([r[0] for r in rows], [r[2] for r in rows], marker="o", markersize=3)
        pruning = [int(row[0]) for row in run["history"] if row[1] == "pruning"]
        if pruning:
            axes.axvspan(0, max(pruning), color="C1", alpha=0.12, label="pruning phase")
            axes.legend(frameon=False)
        axes.set(xlabel="step", ylabel=metric.replace("_", " "))
        name = f"{run['name']}-{metric}".replace("/", "-")
        parts.append(report.chart(figure, name, f"{metric.replace('_', ' ')} over steps"))
    return "".join(parts)


def heat_map(run: dict) -> str:
    """What is left of each layer, as a share of the dense layer."""
    left, dense = run["measured"]["layers"], run["record"].get("dense_layers")
    if not dense or len(dense) != len(left):
        return ""
    kinds = ("heads", "neurons")
    share = np.array([[now[kind] / before[kind] for now, before in zip(left, dense, strict=True)] for kind in kinds])
    figure, axes = report.new_figure(5.2, 1.9)
    axes.imshow(share, cmap="viridis", vmin=0, vmax=1, aspect="auto")
    axes.grid(False)
    for y, kind in enumerate(kinds):
        for x, layer in enumerate(left):
            ink = "black" if share[y, x] > 0.6 else "white"
            axes.text(x, y, str(layer[kind]), ha="center", va="center", fontsize=8, color=ink)
    axes.set(xticks=range(len(left)), yticks=(0, 1), yticklabels=("heads", "neurons"), xlabel="layer")
    return report.chart(figure, f"{run['name']}-left".replace("/", "-"), "What is left of each layer; brighter is more of it.")


def zeros_map(run: dict) -> str:
    """The share of zeros in each projection of each layer of a causal LM, where there are any."""
    zeros = np.array(run["measured"]["zeros"]).T  # (projections, layers)
    if not zeros.any() or "label_names" in run["measured"]:
        return ""
    figure, axes = report.new_figure(5.2, 2.6)
    axes.imshow(zeros, cmap="viridis", vmin=0, vmax=1, aspect="auto")
    axes.grid(False)
    for y, x in np.ndindex(*zeros.shape) if zeros.shape[1] <= 16 else ():
        ink = "black" if zeros[y, x] > 0.6 else "white"
        axes.text(x, y, f"{zeros[y, x]:.2f}", ha="center", va="center", fontsize=7, color=ink)
    axes.set(xticks=range(zeros.shape[1]), yticks=range(len(zeros)), yticklabels=run["measured"]["projections"], xlabel="layer")
    return report.chart(figure, f"{run['name']}-zeros".replace("/", "-"), "Share of zeros; brighter is more.")


def histograms(run: dict) -> str:
    figure, axes = report.new_figure(4.4, 2.6)
    for name, values in sorted(run["measured"]["histograms"].items()):
        axes.stairs(values["density"], values["edges"], label="before" if name == "before" else "as stored")
    axes.set(xlabel="weight / root mean square of its matrix", ylabel="density")
    axes.legend(frameon=False)
    return report.chart(figure, f"{run['name']}-weights".replace("/", "-"), "Attention and FFN weights.")


# ---------------------------------------------------------------------------------------------------------------- written


def overview(found: list[dict], target: Path) -> list[list[Any]]:
    rows = [["run", "status", *(label for _, label, _ in COLUMNS), "as recorded", "command"]]
    for run in found:
        link = Path(os.path.relpath(run["dir"] / "run.json", target)).as_posix()
        measured, status = run.get("measured", {}), run["record"]["status"]
        cells = [Cell(text(measured[key]), measured[key], link) if key in measured else Cell("") for key, _, text in COLUMNS]
        same = "" if not measured else "differs" if run["differences"] else "yes"
        rows.append([Cell(run["name"], run["name"], link), Cell(status, status, bad=status != "finished"), *cells,
                     Cell(same, same, bad=same == "differs"), Cell(run["record"].get("command", ""))])  # fmt: skip
    return rows


def details(run: dict, target: Path) -> str:
    record, measured = run["record"], run.get("measured")
    link = Path(os.path.relpath(run["dir"] / "run.json", target)).as_posix()
    parts = [f"<p><code>{html.escape(record.get('command', ''))}</code><br><a href='{html.escape(link)}'>record</a>, "
             f"{html.escape(str(record.get('started', '')))}</p>"]  # fmt: skip
    if record.get("error"):
        parts.append(f"<p class='bad'>{html.escape(record['error'])}</p>")
    parts += [f"<p class='bad'>{html.escape(line)}</p>" for line in run.get("differences", [])]
    if record.get("metrics"):
        vae = record["metrics"].get("vae")
        rows = vae_eval.rows(vae) if vae else eval_utils.comparison(record["metrics"])
        parts.append(report.html_table(rows, sorts=False))
    charts = curves(run)
    if measured and "layers" in measured:
        charts += heat_map(run) + zeros_map(run) + histograms(run)
        names, confusion = measured.get("label_names", []), measured.get("confusion", [])
        rows = [["true \\ predicted", *names], *([name, *row] for name, row in zip(names, confusion, strict=True))]
        charts += f"<div><h3>Confusion, n = {measured['n']}</h3>{report.html_table(rows, sorts=False)}</div>" if names else ""
        rows = [["layer", "bits a weight"], *([i, f"{bits:.2f}"] for i, bits in enumerate(measured["bits"]))]
        charts += f"<div><h3>On disk</h3>{report.html_table(rows, sorts=False)}</div>"
    return f"<details open><summary>{html.escape(run['name'])}: {html.escape(record['status'])}</summary>{''.join(parts)}" \
           f"<div class='charts'>{charts}</div></details>"  # fmt: skip


def build(found: list[dict], skipped: list[str], args) -> tuple[str, str, str]:
    """The report as HTML, Markdown and CSV."""
    measured = [run for run in found if run.get("measured")]
    part = f"Measured on {args.validation_fraction:.0%} of the validation set: a quick look, no result."
    note = "" if args.validation_fraction == 1 else part
    rows = overview(found, args.report_dir)
    where = [["", "value"], *([key, str(value)] for key, value in runs.environment().items() if key != "versions"),
             *([name, number] for name, number in runs.environment()["versions"].items())]  # fmt: skip
    settings = (f"Latency: a batch of {args.latency_batch} and of one example, {args.latency_length} tokens, fp32, median. "
                f"A calibration error is in {CALIBRATION_BINS} bins.")  # fmt: skip
    axes = (("bytes", "megabytes on disk", 1e6), ("latency_ms", "latency in ms", 1.0))
    charts = "".join(frontier(measured, quality, *what) for quality in ("accuracy", "perplexity") for what in axes)
    parts = ["<h1>Compressed models</h1>", f"<p class='bad'>{note}</p>" if note else "",
             f"<p>{len(found)} runs, {len(measured)} models measured again. {settings}</p>",
             report.html_table(rows), f"<div class='charts'>{charts}</div>"]  # fmt: skip
    if skipped:
        parts += ["<h2>Skipped</h2><ul>", *(f"<li class='bad'>{html.escape(line)}</li>" for line in skipped), "</ul>"]
    parts += ["<h2>Runs</h2>", *(details(run, args.report_dir) for run in found)]
    parts += ["<h2>Environment</h2>", report.html_table(where)]
    lines = ["# Compressed models", note, settings, report.markdown_table(rows)]
    lines += ["## Skipped\n\n" + "\n".join(f"- {line}" for line in skipped)] if skipped else []
    lines += ["## Differences\n\n" + "\n".join(f"- {run['name']}: {line}" for run in measured for line in run["differences"])] \
        if any(run["differences"] for run in measured) else []  # fmt: skip
    text = io.StringIO()
    table = csv.writer(text, lineterminator="\n")
    table.writerow(["run", "status", "fast", *(key for key, _, _ in COLUMNS), "differences", "record"])
    for run in found:
        values = [run.get("measured", {}).get(key, "") for key, _, _ in COLUMNS]
        table.writerow([run["name"], run["record"]["status"], args.validation_fraction < 1, *values,
                        "; ".join(run.get("differences", [])), run["dir"] / "run.json"])  # fmt: skip
    return report.page("Compressed models", "\n".join(parts)), "\n\n".join(filter(None, lines)) + "\n", text.getvalue()


def main(argv=None) -> None:
    parser = runs.Parser(__doc__, PRESETS, shared=("data_dir", "out_dir", "device"))
    parser.add_argument("--runs", type=Path, nargs="+", help="directories of runs [all under --out_dir]")
    parser.add_argument("--report_dir", type=Path, default=Path("report"), help="where the report goes [report]")
    parser.add_argument("--update_readme", action="store_true", help="put committed results into README.md and docs/, and stop")
    args = parser.parse_args(argv)
    if args.update_readme:
        if args.fast:
            raise UserError("--update_readme: takes no figures of fast runs. Leave --fast out")
        done = subprocess.run([sys.executable, runs.REPOSITORY / "benchmarks" / "update_readme.py"], check=False)
        if done.returncode:
            raise UserError("benchmarks/update_readme.py failed; see above")
        return
    args.device = str(runs.resolve_device(args.device))
    found, skipped = find_runs(args)
    if not found:
        raise UserError("".join(f"{line}; " for line in skipped) + f"nothing to report under {args.out_dir}. "
                        "Run: python 8_pruning_with_finetuning.py --fast")  # fmt: skip
    measure_all(found, args, skipped)
    page, text, summary = build(found, skipped, args)
    for name, content in (("index.html", page), ("report.md", text), ("summary.csv", summary)):
        write_atomic(args.report_dir / name, content)
    for line in skipped:
        print(f"skipped: {line}")
    for run in found:
        for line in run.get("differences", []):
            print(f"differs: {run['name']}: {line}")
    n_measured = sum("measured" in run for run in found)
    print(f"{len(found)} runs, {n_measured} models measured{'' if args.validation_fraction == 1 else ' in part'}\n")
    print(*(f"report  {args.report_dir / name}" for name in ("index.html", "report.md", "summary.csv")), sep="\n")


if __name__ == "__main__":
    runs.run_script(main)
