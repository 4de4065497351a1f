"""What pruning costs a training step of script 8, and how fast its training is: ratios, all sides in turns in one process.

    python benchmarks/pruning_overhead.py --local_dir PATH/SST-2      about four minutes on two cores
    python benchmarks/pruning_overhead.py --fast                      fewer repetitions

Every side runs the script's own loop (`fit`). Measured, for the fast and the full preset of the script:

- Overhead. Batches are sampled evenly over the lengths of an epoch. On each the sides take turns: a plain distillation step,
  and one scored by each scorer. Scored are only the steps that the gradient window asks for; selecting and masking come once
  a pruning. The overhead is both, spread over the plain steps of the pruning phase. Refitting (`--refit`) is shown apart.
- Training: all steps of the preset (dense baseline, pruning, recovery) times the measured seconds of a step, and what pruning
  adds. The cut model counts as slow as the dense one, and nothing stops early.
- Padding: its share of the tokens of an epoch's batches.
- Fine-tuning: examples a second in an epoch of the dense baseline in fast mode, against `transformers.Trainer` as it comes,
  and against Trainer at the same batch size, precision and dropout; each by its own log, set-up excluded.

The model is the base model with a new head and the teacher is its own outputs: no time depends on how good they are. A target
that is missed is reported as missed, and the exit status stays 0.

Writes benchmarks/results/pruning_overhead.json (settings, measures, median and quartiles of all that was timed) and .md.
"""

from __future__ import annotations

import io
import json
import shlex
import sys
import tempfile
import time
from argparse import Namespace
from collections import defaultdict
from contextlib import contextmanager, nullcontext, redirect_stderr, redirect_stdout
from pathlib import Path
from statistics import mean, median
from unittest.mock import MagicMock, patch

import numpy as np
import torch
from tqdm import tqdm
from transformers import AutoTokenizer, DataCollatorWithPadding, Trainer, TrainingArguments

REPOSITORY = Path(__file__).resolve().parent.parent
sys.path[:0] = [str(REPOSITORY), str(REPOSITORY / "benchmarks")]

from update_readme import load_script  # noqa: E402

from common import assets, checkpoint, data, distill, eval_utils, runs, train_utils  # noqa: E402

SCRIPT = REPOSITORY / "8_pruning_with_finetuning.py"
PRESETS = [
    # flag, full, fast, meaning, limits
    ("n_blocks", 4, 2, "blocks in which the sides take turns", (1, 1000)),
    ("n_batches", 6, 2, "batches of a block of training steps", (1, 10**4)),
    ("n_examples", 1024, 256, "training examples of a block of fine-tuning", (1, 10**6)),
]


def clock(device: torch.device) -> float:
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return time.perf_counter()


def spread(values: list[float]) -> dict[str, float]:
    low, middle, high = np.quantile(values, (0.25, 0.5, 0.75))
    return {"median": float(middle), "p25": float(low), "p75": float(high), "n": len(values)}


@contextmanager
def alone(loader=data.loader):
    """Inside, `fit` takes its batches from `loader`, is silent and writes nothing. Yields a stand-in for its run."""
    with (patch.object(checkpoint, "load_checkpoint", return_value=(None, None)), patch.object(checkpoint, "save_checkpoint"),
          patch.object(checkpoint, "save_model"), patch.object(data, "loader", loader),
          redirect_stdout(io.StringIO()), redirect_stderr(io.StringIO())):  # fmt: skip
        yield MagicMock()


class Side:
    """A preset of the script and the seconds of its steps, plain and with each scorer.

    `fit` takes it for its pruner: it passes on to the pruner whose turn it is.
    """

    cut, sparsity = False, 0.0

    def __init__(self, script, flags: list[str], base: Path, task: Path, tokenizer, device, n_blocks: int, n_batches: int):
        a = runs.Parser(script.__doc__, script.PRESETS, ("seed", "compile", "save_every")).parse_args(flags)
        a.precision = train_utils.resolve_precision(a.precision, device)
        self.script, self.args, self.tokenizer, self.device, self.n_blocks = script, a, tokenizer, device, n_blocks
        self.split = data.load_classification(task, tokenizer, a.max_length, a.n_selection, a.validation_fraction, a.seed)
        train, lengths = self.split.train, self.split.train.lengths
        batches = data.epoch_batches(train, a.batch_size, a.train_fraction, a.seed, 0)
        self.padding, self.per_epoch = data.padding_share(train, batches), len(batches)
        self.steps = max(1, a.num_epochs * self.per_epoch // 2)  # of the pruning phase
        whole = sorted((b for b in batches if len(b) == a.batch_size), key=lambda b: lengths[b].max()) or batches
        n = n_blocks * n_batches
        chosen = [whole[i] for i in ((np.arange(n) + 0.5) * len(whole) / n).astype(int)]
        self.sample = self.split._replace(train=train.subset(np.concatenate(chosen)),
                                          selection=self.split.selection.subset(np.arange(1)))  # fmt: skip
        self.batches = np.split(np.arange(len(self.sample.train)), np.cumsum([len(b) for b in chosen])[:-1])

        runs.seed_everything(a.seed)
        self.model = checkpoint.load_classifier(base, self.split.label_names, a.dropout).to(device)
        outputs = eval_utils.predict(self.model, self.sample.train, device, a.precision, features=True)
        self.teacher = distill.Teacher(*outputs, device)
        some = train.subset(np.arange(min(script.N_CALIBRATION // 2, len(train))))  # as the script does
        of_some = eval_utils.predict(self.model, some, device, a.precision, features=True)
        calibration = list(data.loader(some, data.in_order(some.lengths, 64), device))
        calibrator, self.pruners = distill.Teacher(*of_some, device), {}
        for scorer, granularity in [("fisher", "multi"), ("taylor", "multi"), (a.importance, "multi"), (a.importance, "heads")]:
            settings = vars(a) | {"granularity": granularity, "refit": False, "scorers": scorer.split("+")}
            name = scorer if granularity == "multi" else f"{scorer}, {granularity} only"
            self.pruners[name] = script.Pruner(self.model, Namespace(**settings), self.steps, calibrator, calibration)
        self.seconds = defaultdict(list)  # of each side's steps, one a batch, and of its prunings, one a block
        self.turn, self.pruning = "plain", False

    @contextmanager
    def timed(self, what: str):
        start = clock(self.device)
        yield
        self.seconds[f"{what}, {self.turn}"].append(clock(self.device) - start)

    def run_block(self, block: int) -> None:
        """Every `n_blocks`-th batch, once for each side, and one pruning by each pruner."""
        with alone(lambda *_: self._turns(self.batches[block :: self.n_blocks])) as run:
            self.script.fit(self.model, self.tokenizer, self.sample, self.args, run, 1, 1.0, 1e-4, self.teacher, self)

    def _turns(self, batches: list[np.ndarray]):
        names = ["plain", *self.pruners]
        for i, index in enumerate(batches):
            batch = {name: tensor.to(self.device) for name, tensor in data.collate(self.sample.train, index).items()}
            self.turn = "plain"
            yield batch  # not counted: a new length and, in the first step, a new optimizer are slow
            for k in range(len(names)):
                self.turn = names[(i + k) % len(names)]
                with self.timed("step"):
                    yield batch
        self.pruning = True
        for name in self.pruners:
            self.turn = name
            yield batch
        self.pruning = False

    @property
    def recorder(self):
        return self.pruners[self.turn].recorder

    def records(self, step: int) -> bool:
        return self.turn != "plain"

    def record(self, *args) -> None:
        self.pruners[self.turn].record(*args)

    def due(self, step: int) -> bool:
        return self.pruning

    def step_(self, step: int, optimizer) -> None:
        """Prune a little; with the preset's own scorer a little more, and then with refitting."""
        pruner, part = self.pruners[self.turn], self.args.target_sparsity / (2 * self.n_blocks)
        with self.timed("pruning"):
            pruner.prune_(pruner.sparsity + part, optimizer)
        if self.turn == self.args.importance:
            pruner.args.refit = True
            with self.timed("pruning with refitting"):
                pruner.prune_(pruner.sparsity + part, optimizer)
            pruner.args.refit = False

    def measures(self, preset: str) -> list[dict]:
        """Rows of the table; an overhead is a fraction of the plain steps of the pruning phase."""
        a, rows, overheads = self.args, [], {}
        plain, pruned = self.seconds["step, plain"], self.seconds[f"pruning, {a.importance}"]
        n_prunings = sum(self.pruners[a.importance].due(step) for step in range(1, self.steps + 1))
        each_pruning = n_prunings / (self.steps * mean(plain))
        for name, pruner in self.pruners.items():
            ratios = [scored / other for scored, other in zip(self.seconds[f"step, {name}"], plain, strict=True)]
            share = mean(pruner.records(step) for step in range(1, self.steps + 1))
            overheads[name] = share * (median(ratios) - 1) + median(self.seconds[f"pruning, {name}"]) * each_pruning
            target = 0.10 if "kd_gradient" in name else 0.03
            rows.append(measure(f"{preset}: a step scored by {name}", ratios, "x"))
            rows.append(measure(f"{preset}: scoring, selecting, masking, {name}", overheads[name], "%", target))
        refitting = median(self.seconds[f"pruning with refitting, {a.importance}"]) - median(pruned)
        added = self.steps * overheads[a.importance] * mean(plain) + a.refit * refitting * n_prunings
        epochs = a.dense_epochs * a.dense_fraction / a.train_fraction + a.num_epochs  # of the data that pruning sees
        seconds = epochs * self.per_epoch * mean(plain) + added
        return [*rows, measure(f"{preset}: refitting, apart", refitting * each_pruning, "%"),
                measure(f"{preset}: padding", self.padding, "%", 0.10),
                measure(f"{preset}: training, estimated", seconds, "s")]  # fmt: skip


def fine_tuning(side: Side, base: Path, n_blocks: int, n_examples: int) -> dict[str, list[float]]:
    """Examples a second of an epoch, one for each block: the script, itself with SDPA, Trainer, Trainer at its settings."""
    a, names = side.args, side.split.label_names
    rates = {"script": [], "script with SDPA": [], "Trainer": [], "Trainer, same settings": []}
    same = {"per_device_train_batch_size": a.batch_size, "bf16": a.precision == "bf16-mixed", "fp16": a.precision == "16-mixed"}

    def trainer(train: data.Split, dropout: float | None, **settings) -> float:
        rows = [{"input_ids": ids, "attention_mask": np.ones_like(ids), "labels": int(label)}
                for ids, label in zip(np.split(train.ids, train.offsets[1:-1]), train.labels, strict=True)]  # fmt: skip
        with alone(), tempfile.TemporaryDirectory() as folder:
            arguments = TrainingArguments(folder, num_train_epochs=1, seed=a.seed, use_cpu=side.device.type == "cpu",
                                          report_to="none", save_strategy="no", logging_strategy="no", disable_tqdm=True,
                                          **settings)  # fmt: skip
            done = Trainer(checkpoint.load_classifier(base, names, dropout), arguments, train_dataset=rows,
                           data_collator=DataCollatorWithPadding(side.tokenizer)).train()  # fmt: skip
        return done.metrics["train_samples_per_second"]

    n_examples = min(n_examples, len(side.split.train) // n_blocks)
    for block in tqdm(range(n_blocks), "fine-tuning", leave=False):
        train = side.split.train.subset(np.arange(block * n_examples, (block + 1) * n_examples))
        as_is, sdpa = (train_utils.choose_attention_, train_utils.sdpa_kernel), (lambda model: model.device, nullcontext)
        for name, (choose, kernel) in (("script", as_is), ("script with SDPA", sdpa)):
            model = checkpoint.load_classifier(base, names, a.dropout).to(side.device)
            with (alone() as run, patch.object(train_utils, "choose_attention_", choose),
                  patch.object(train_utils, "sdpa_kernel", kernel)):  # fmt: skip
                side.script.fit(model, side.tokenizer, side.sample._replace(train=train), a, run, 1, 1.0, 1e-4)
            rates[name].append(run.log.call_args.kwargs["examples_per_second"])
        rates["Trainer"].append(trainer(train, None))
        rates["Trainer, same settings"].append(trainer(train, a.dropout, **same))
    return rates


def measure(name: str, value: float | list[float], unit: str, target: float | None = None, at: str = "most") -> dict:
    """A row: of several values the median, with quartiles and number. `at`: the target is the "most" or the "least"."""
    row = spread(value) if isinstance(value, list) else {"median": value, "n": 1}
    value = row.pop("median")
    met = None if target is None else value <= target if at == "most" else value >= target
    return {"measure": name, "value": value, **row, "unit": unit, "target": target, "at": target and at, "met": met}


def lines_of(rows: list[dict]) -> list[list[str]]:
    """The rows as a table shows them."""
    lines = [["measure", "value", "quartiles", "n", "target", "met"]]
    for row in rows:
        text = {"%": "{:.1%}", "x": "{:.3f}x"}.get(row["unit"], "{:,.0f} " + row["unit"]).format
        several = [f"{text(row['p25'])} to {text(row['p75'])}", row["n"]] if row["n"] > 1 else [None, None]
        target = row["target"] and f"at {row['at']} {text(row['target'])}"
        lines.append([row["measure"], text(row["value"]), *several, target, {True: "yes", False: "missed"}.get(row["met"])])
    return lines


def main(argv=None) -> None:
    parser = runs.Parser(__doc__, PRESETS, ("model", "task", "local_dir", "data_dir", "seed", "device"))
    parser.add_argument("--results", type=Path, default=REPOSITORY / "benchmarks" / "results",
                        help="folder of the record and the table [benchmarks/results]")  # fmt: skip
    args = parser.parse_args(argv)
    script = load_script(SCRIPT)
    runs.quiet_transformers()
    device = runs.resolve_device(args.device)
    base = assets.resolve_model(args.model, args.data_dir)
    task = assets.prepare_task(args.task, args.data_dir, local_dir=args.local_dir)
    tokenizer, start = AutoTokenizer.from_pretrained(base.path), time.perf_counter()
    sides = {preset: Side(script, ["--seed", args.seed, *flags], base.path, task.path, tokenizer, device, args.n_blocks,
                          args.n_batches) for preset, flags in (("fast", ["--fast"]), ("full", []))}  # fmt: skip
    for block in tqdm(range(args.n_blocks), "training steps", leave=False):
        for side in sides.values():
            side.run_block(block)
    rates = fine_tuning(sides["fast"], base.path, args.n_blocks, args.n_examples)
    fast, full = (side.measures(preset) for preset, side in sides.items())
    rows = [*fast, *full, measure("training: fast / full", fast[-1]["value"] / full[-1]["value"], "x", 0.10)]
    rows += [measure(f"fine-tuning: {name}", values, "examples/s") for name, values in rates.items()]
    for name in list(rates)[1:]:
        ratios = [ours / theirs for ours, theirs in zip(rates["script"], rates[name], strict=True)]
        rows.append(measure(f"fine-tuning: script / {name}", ratios, "x", 1.5 if "Trainer" in name else None, "least"))
    record = {
        "command": shlex.join(["python", "benchmarks/pruning_overhead.py", *map(str, sys.argv[1:] if argv is None else argv)]),
        "environment": runs.environment() | {"device": str(device)},
        "settings": {name: getattr(args, name) for name in ("n_blocks", "n_batches", "n_examples", "seed")},
        "assets": [{key: asset.record[key] for key in ("name", "source", "sha256")} for asset in (base, task)],
        "measures": rows,
        "presets": {preset: {"settings": vars(side.args), "steps_an_epoch": side.per_epoch, "steps_of_pruning": side.steps,
                             "seconds": {name: spread(values) for name, values in side.seconds.items()}}
                    for preset, side in sides.items()},
        "seconds": time.perf_counter() - start,
    }
    where = (f"{base.record['name']} on {task.record['name']}; {device}, {torch.get_num_threads()} threads; precision "
             + ", ".join(f"{side.args.precision} ({preset})" for preset, side in sides.items()))  # fmt: skip
    path = args.results / "pruning_overhead.json"
    runs.write_atomic(path, json.dumps(record, indent=2, default=str) + "\n")
    runs.write_atomic(path.with_suffix(".md"), f"{runs.table(lines_of(rows), markdown=True)}\n\n{where}.\n")
    print(f"{runs.table(lines_of(rows))}\n\n{where}\nrecord  {path}")


if __name__ == "__main__":
    runs.run_script(main)
