"""What a step of quantisation-aware training costs beside the same step in full precision, and beside torchao's.

    python benchmarks/qat_overhead.py --task sst2 --model minilm
    python benchmarks/qat_overhead.py --n_batches 4 --n_repeats 1

One process, the same batches, the same optimizer and losses' shape; the sides take turns on each batch, so that a drift of the
machine's speed falls on all of them. Sides: full precision; script 10's quantisers (4-bit weights in groups of 32, 8-bit inputs
for each token, 4-bit embeddings) with scales learned, fixed and following; and torchao's `QATConfig` with the same bits and
groups (weights and inputs; its embeddings stay in full precision), if `pip install torchao==0.18.0` was done.

Writes benchmarks/results/qat_overhead.json and .md.
"""

from __future__ import annotations

import json
import shlex
import statistics
import sys
import time
from pathlib import Path

import numpy as np
import torch
from torch.nn import functional
from tqdm import tqdm

REPOSITORY = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(REPOSITORY))

from common import assets, checkpoint, data, quantizers, runs, train_utils  # noqa: E402
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
TARGET = 1.25  # a step against full precision
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
    where = (f"{base.record['name']} on {task.record['name']}, batches of {args.batch_size}; {device}, "
             f"{torch.get_num_threads()} threads; {precision}. Ratios are of steps on the same batch.")  # fmt: skip
    whole = {"command": shlex.join(["python", "benchmarks/qat_overhead.py", *map(str, sys.argv[1:] if argv is None else argv)]),
             "environment": runs.environment() | {"device": str(device)}, "sides": record}  # fmt: skip
    path = args.results / "qat_overhead.json"
    runs.write_atomic(path, json.dumps(whole, indent=1, default=float) + "\n")
    runs.write_atomic(path.with_suffix(".md"), f"{runs.table(rows, markdown=True)}\n\n{where}\n")
    print(f"{runs.table(rows)}\n\n{where}\nrecord  {path}")


if __name__ == "__main__":
    runs.run_script(main)
