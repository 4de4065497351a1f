"""What a step of quantisation-aware training costs beside the same step in full precision, and beside torchao's; fast and full.

    python benchmarks/qat_overhead.py --task sst2 --model minilm
    python benchmarks/qat_overhead.py --n_batches 4 --n_repeats 1

One process, the same batches, the same optimizer and losses' shape; the sides take turns on each batch, so that a drift of the
machine's speed falls on all of them. Sides: full precision; script 10's quantisers (4-bit weights in groups of 32, 8-bit inputs
for each token, 4-bit embeddings) with scales learned, fixed and following; and torchao's `QATConfig` with the same bits and
groups (weights and inputs; its embeddings stay in full precision), if `pip install torchao==0.18.0` was done.

Then the training loop of script 10 itself, on as many batches: the fast preset, the same with the teacher's states matched too,
and the full preset; the examples of the preset over the examples a second are its time.

Writes benchmarks/results/qat_overhead.json and .md.
"""

from __future__ import annotations

import json
import shlex
import statistics
import sys
import tempfile
import time
from pathlib import Path

import numpy as np
import torch
from torch.nn import functional
from tqdm import tqdm

REPOSITORY = Path(__file__).resolve().parent.parent
sys.path[:0] = [str(REPOSITORY), str(REPOSITORY / "benchmarks")]

from update_readme import load_script  # noqa: E402

from common import assets, checkpoint, data, distill, quantizers, runs, train_utils  # noqa: E402
from common.blocks import blocks_of  # noqa: E402
from common.quantizers import WeightScheme  # noqa: E402

PRESETS = [
    # flag, full, fast, meaning, limits
    ("batch_size", 32, 32, "examples a step", (1, 10**6)),
    ("max_length", 64, 64, "tokens that an example is cut to"),
    ("n_batches", 30, 6, "batches, of lengths as they come", (1, 10**6)),
    ("n_repeats", 3, 1, "times that each is used", (1, 10**6)),
    ("precision", "auto", "auto", "of the steps", train_utils.PRECISIONS),
]
TARGET, FAST_OF_FULL = 1.25, 1 / 8  # a step against full precision; the time of the presets
STATES = ["--hidden_weight", "1", "--attention_weight", "1", "--embedding_weight", "1"]
OURS = {"lsq": "learned scales", "mse": "fixed scales", "minmax": "following scales"}


def torchao_(model) -> None:
    """The same bits and groups by torchao."""
    from torchao.quantization import quantize_
    from torchao.quantization.qat import IntxFakeQuantizeConfig, QATConfig

    inputs = IntxFakeQuantizeConfig(torch.int8, "per_token", is_symmetric=False)  # it has no other
    weights = IntxFakeQuantizeConfig(torch.int4, group_size=32, is_symmetric=True)
    linears = {id(linear) for block in blocks_of(model) for linear in block.projections}
    quantize_(model, QATConfig(activation_config=inputs, weight_config=weights, step="prepare"),
              filter_fn=lambda module, name: id(module) in linears)  # fmt: skip


def sides(base: Path, names: list[str], device: torch.device) -> dict[str, torch.nn.Module]:
    """A model for each way to train it."""

    def fresh():
        runs.seed_everything(0)
        return checkpoint.load_classifier(base, names, 0.0).to(device).train()

    made = {"full precision": fresh()}
    for method, label in OURS.items():
        made[label] = fresh()
        linears = [linear for block in blocks_of(made[label]) for linear in block.projections]
        scheme = WeightScheme(4, 32, True, method)
        quantizers.quantize_(made[label], linears, scheme, 8, embeddings=scheme._replace(group_size=-1))
    try:
        model = fresh()
        torchao_(model)
        made["torchao"] = model
    except ImportError:
        print("torchao is not installed: left out")
    for model in made.values():
        train_utils.choose_attention_(model)
    return made


def preset_seconds(words: list[str], base: Path, task: Path, tokenizer, n_batches: int, device) -> dict[str, float]:
    """Examples a second of script 10's training loop with these flags, once it is warm, and the time of its whole training."""
    script = load_script(REPOSITORY / "10_qat_kd_4bit.py")
    args = runs.Parser("", script.PRESETS, tuple(runs.SHARED_FLAGS)).parse_args(words)
    args.precision, args.learning_rate = train_utils.resolve_precision(args.precision, device), 1e-5
    split = data.load_classification(task, tokenizer, args.max_length, args.n_selection, 1.0, 0)
    n = args.num_epochs * data.n_in_epoch(split.train, args.train_fraction)
    some = np.concatenate(data.epoch_batches(split.train, args.batch_size, 1.0, 0, 0)[:n_batches])
    split = split._replace(train=split.train.subset(some), selection=split.selection.subset(np.arange(2)))
    args.num_epochs, args.train_fraction, args.patience = 2, 1.0, 2  # the second epoch is the warm one
    dense, model = (checkpoint.load_classifier(base, split.label_names, args.dropout).to(device) for _ in range(2))
    script.quantize_(model, args)
    running = dense.eval() if args.hidden_weight or args.attention_weight or args.embedding_weight else None
    sizes = (len(some), len(split.label_names)), (len(some), model.config.hidden_size)
    teacher = distill.Teacher(*(torch.randn(size) for size in sizes), device)
    with tempfile.TemporaryDirectory() as folder, runs.Run(Path(folder), "timing", {}) as run:
        script.fit(model, running, split, args, run, teacher)
        rate = [value for _, _, metric, value in run.history() if metric == "examples_per_second"][-1]
    return {"examples_per_second": rate, "examples": n, "seconds": n / rate}


def main(argv=None) -> None:
    parser = runs.Parser(__doc__, PRESETS, ("model", "task", "local_dir", "data_dir", "seed", "device"))
    parser.add_argument("--results", type=Path, default=REPOSITORY / "benchmarks" / "results",
                        help="folder of the record and the table [benchmarks/results]")  # fmt: skip
    args = parser.parse_args(argv)
    runs.quiet_transformers()
    device = runs.resolve_device(args.device)
    precision = train_utils.resolve_precision(args.precision, device)
    base = assets.resolve_model(args.model, args.data_dir)
    task = assets.prepare_task(args.task, args.data_dir, local_dir=args.local_dir)
    names = data.label_names(task.path)
    tokenizer = data.load_tokenizer(base.path, checkpoint.outline(base.path).config)
    split = data.load_classification(task.path, tokenizer, args.max_length, 2000, 1.0, args.seed)
    chosen = data.epoch_batches(split.train, args.batch_size, 1.0, args.seed, 0)[: args.n_batches]
    models = sides(base.path, names, device)
    optimizers = {name: train_utils.adamw(model, 1e-5, 0.0) for name, model in models.items()}
    scaler = train_utils.grad_scaler(device, precision)
    seconds: dict[str, list[float]] = {name: [] for name in models}

    def step(name: str, batch) -> float:
        if device.type == "cuda":
            torch.cuda.synchronize(device)
        start = time.perf_counter()
        with train_utils.autocast(device, precision):
            logits = models[name](**data.inputs_of(batch)).logits
        functional.cross_entropy(logits.float(), batch["labels"]).backward()
        train_utils.step_(models[name], optimizers[name], scaler, 1e-5)
        if device.type == "cuda":
            torch.cuda.synchronize(device)
        return time.perf_counter() - start

    for i, index in enumerate(tqdm(chosen * args.n_repeats, leave=False)):
        batch = {key: tensor.to(device) for key, tensor in data.collate(split.train, index).items()}
        order = [*models][i % len(models) :] + [*models][: i % len(models)]
        for name in order:
            if i == 0:
                step(name, batch)  # the first makes the optimizer's state
            seconds[name].append(step(name, batch))

    rows, record = [["side", "seconds a step", "against full precision", "quartiles", "n", "target", "met"]], {}
    for name, values in seconds.items():
        ratios = [own / plain for own, plain in zip(values, seconds["full precision"], strict=True)]
        low, middle, high = np.quantile(ratios, (0.25, 0.5, 0.75))
        record[name] = {"seconds": statistics.median(values), "ratio": middle, "p25": low, "p75": high, "n": len(values)}
        mine = name in OURS.values()
        rows.append([name, f"{record[name]['seconds']:.4f}", f"{middle:.3f}x", f"{low:.3f}x to {high:.3f}x", len(values),
                     f"at most {TARGET}x" if mine else "", ("yes" if middle <= TARGET else "no") if mine else ""])  # fmt: skip
    presets = {name: preset_seconds(words, base.path, task.path, tokenizer, args.n_batches, device) for name, words in
               (("fast", ["--fast"]), ("fast, with the teacher's states", ["--fast", *STATES]), ("full", []))}  # fmt: skip
    lines = [["training loop of script 10", "examples a second", "examples", "seconds", "against full", "target", "met"]]
    for name, found in presets.items():
        ratio, judged = found["seconds"] / presets["full"]["seconds"], name == "fast"
        lines.append([name, f"{found['examples_per_second']:,.0f}", f"{found['examples']:,}", f"{found['seconds']:,.0f}",
                      f"{ratio:.3f}x", f"at most {FAST_OF_FULL:.3f}x" if judged else "",
                      ("yes" if ratio <= FAST_OF_FULL else "no") if judged else ""])  # fmt: skip
    where = (f"{base.record['name']} on {task.record['name']}, batches of {args.batch_size}; {device}, "
             f"{torch.get_num_threads()} threads; {precision}. Ratios are of steps on the same batch.")  # fmt: skip
    whole = {"command": shlex.join(["python", "benchmarks/qat_overhead.py", *map(str, sys.argv[1:] if argv is None else argv)]),
             "environment": runs.environment() | {"device": str(device)}, "sides": record, "presets": presets}  # fmt: skip
    path = args.results / "qat_overhead.json"
    runs.write_atomic(path, json.dumps(whole, indent=1, default=float) + "\n")
    parts = [runs.table(rows, markdown=True), runs.table(lines, markdown=True), where]
    runs.write_atomic(path.with_suffix(".md"), "\n\n".join(parts) + "\n")
    print(f"{runs.table(rows)}\n\n{runs.table(lines)}\n\n{where}\nrecord  {path}")


if __name__ == "__main__":
    runs.run_script(main)
