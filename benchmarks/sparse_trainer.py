"""What keeping zeros costs: a step of SparseTrainer against one of transformers.Trainer, in turns in one process.

    python benchmarks/sparse_trainer.py             about twelve minutes on two cores
    python benchmarks/sparse_trainer.py --fast      fewer and smaller steps

Models: assets/tiny_llama, and a Llama of 100 M random parameters; 20 % of 16x16 blocks are zero, or half of all weights. Three
trainers take turns: the plain one, under which zeros fill up; SparseTrainer; and one that finds the zeros again in every step,
which is what the sparse trainers of the pruning literature do. A step is measured from the end of the one before to its own:
forward, backward, clipping, masking, AdamW; ratios are of the same round, because a machine's speed drifts. Masking is timed
alone as well, ours and theirs in turns: it is a small part of a step, whose time varies by more. Peak memory: of a process of
its own for each, resident, after some steps. The share of the data: seconds that the loader takes for the windows of a step,
mapped from the disk, over those of the step.

Writes benchmarks/results/sparse_trainer.json (every measured step) and .md.
"""

from __future__ import annotations

import json
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from statistics import median

import numpy as np
import torch
from transformers import LlamaConfig, LlamaForCausalLM, Trainer, TrainerCallback, TrainingArguments

REPOSITORY = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(REPOSITORY))

from common import assets, checkpoint, eval_utils, finetuning, runs, sparse_trainer  # noqa: E402
from common.runs import table  # noqa: E402

RESULTS = REPOSITORY / "benchmarks" / "results" / "sparse_trainer"
PRESETS = [
    # flag, full, fast, meaning, limits
    ("n_rounds", 10, 2, "rounds in which the trainers take turns", (1, 1000)),
    ("n_steps", 2, 2, "measured steps of a turn, after one that is not", (1, 1000)),
    ("n_windows", 4, 1, "windows of a step", (1, 1000)),
    ("block_size", 512, 128, "tokens of a window", (2, 10**5)),
]
LARGE = {"hidden_size": 768, "intermediate_size": 2048, "num_hidden_layers": 12, "num_attention_heads": 12,
         "num_key_value_heads": 4, "vocab_size": 16384}  # fmt: skip
CASES = {"tiny LM, 20 % in blocks": ("tiny", "block"), "tiny LM, half of the weights": ("tiny", "weights"),
         "100 M, 20 % in blocks": ("large", "block"), "100 M, half of the weights": ("large", "weights")}  # fmt: skip
STEP, MEMORY = 1.03, 1.05  # of the plain trainer's, at most


class MasksAgain(Trainer):
    """Finds the zeros of the weights in every step, and masks the gradients with them."""

    def training_step(self, model, inputs, num_items_in_batch=None):
        loss = super().training_step(model, inputs, num_items_in_batch)
        with torch.no_grad():
            for weight in sparse_trainer.prunable_weights(model).values():
                weight.grad.mul_(weight != 0)
        return loss


TRAINERS = {"Trainer": Trainer, "SparseTrainer": sparse_trainer.SparseTrainer, "masks made again": MasksAgain}


class Clock(TrainerCallback):
    def __init__(self, device: torch.device):
        self.device, self.marks = device, []

    def on_step_end(self, args, state, control, **kwargs):
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)
        self.marks.append(time.perf_counter())


def make_model(size: str | dict, pattern: str, length: int, device: str = "cpu"):
    """The tiny LM, or a random Llama (size: "large", or what its config says), with a part of its weights zero."""
    if size == "tiny":
        model = checkpoint.load_causal_lm(assets.resolve_model("tiny_llama", Path("data")).path, torch.float32)
    else:
        with torch.device(device):
            shape = LARGE if size == "large" else size
            model = LlamaForCausalLM(LlamaConfig(**shape, max_position_embeddings=length, use_cache=False))
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for weight in sparse_trainer.prunable_weights(model).values():
            rows, columns = weight.shape
            if pattern == "block":
                keep = torch.rand(rows // 16, columns // 16, generator=generator) >= 0.2
                keep = keep.to(weight.device)
                weight.mul_(keep.repeat_interleave(16, 0).repeat_interleave(16, 1))
            else:
                weight.mul_((torch.rand(rows, columns, generator=generator) >= 0.5).to(weight.device))
    return model


def make_trainer(kind: str, size: str | dict, pattern: str, args, folder: str, **more):
    """A trainer of its own model, and the clock of its steps. more: other arguments of training."""
    runs.seed_everything(0)
    model = make_model(size, pattern, args.block_size, args.device)
    precision = finetuning.lm_precision("auto", torch.device(args.device))
    more = {"max_steps": args.n_steps + 1} | more
    arguments = TrainingArguments(
        output_dir=folder, per_device_train_batch_size=args.n_windows, optim="adamw_torch_fused",
        bf16=precision == "bf16-mixed", fp16=precision == "16-mixed", use_cpu=args.device == "cpu", disable_tqdm=True,
        save_strategy="no", logging_steps=1000, logging_nan_inf_filter=False, report_to="none",
        dataloader_pin_memory=args.device == "cuda", **more)  # fmt: skip
    n, path = args.n_windows * more["max_steps"] * args.block_size, Path(folder) / "stream.npy"
    ids = torch.randint(model.config.vocab_size, (n,), generator=torch.Generator().manual_seed(0), dtype=torch.int32)
    np.save(path, ids.numpy())
    stream = np.load(path, mmap_mode="r")
    clock = Clock(torch.device(args.device))
    trainer = TRAINERS[kind](model=model, args=arguments, train_dataset=finetuning.Windows(stream, args.block_size),
                             callbacks=[clock])  # fmt: skip
    finetuning.quiet_(trainer)
    return trainer, clock


def peak_memory(kind: str, size: str, pattern: str, args) -> int:
    """Bytes resident at most, of a fresh process that takes a few steps."""
    command = [sys.executable, __file__, "--probe", kind, size, pattern, "--device", args.device,
               *(part for row in PRESETS for part in (f"--{row[0]}", str(getattr(args, row[0]))))]  # fmt: skip
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    return int(done.stdout.split()[-1])


def probe(args) -> None:
    with tempfile.TemporaryDirectory() as folder:
        make_trainer(*args.probe, args, folder)[0].train()
    print(torch.cuda.max_memory_allocated() if args.device == "cuda" else eval_utils.resident_peak())


def masking(size: str, pattern: str, args) -> dict[str, float]:
    """Seconds of masking all gradients once: by the masks that were kept, and by zeros that are found again; in turns."""
    model = make_model(size, pattern, args.block_size, args.device).to(args.device)
    weights, masks = sparse_trainer.prunable_weights(model), sparse_trainer.masks_of(model)
    for weight in weights.values():
        weight.grad = torch.randn_like(weight)

    def kept():
        for name, mask in masks.items():
            mask.zero_(weights[name].grad)

    def again():
        for weight in weights.values():
            weight.grad.mul_(weight != 0)

    with torch.no_grad():
        times = eval_utils.in_turns({"kept": kept, "again": again}, 2.0, torch.device(args.device))
    return {name: median(values) for name, values in times.items()}


def measure(case: str, args) -> dict:
    size, pattern = CASES[case]
    seconds: dict[str, list[float]] = {kind: [] for kind in TRAINERS}
    sparsity: dict[str, float] = {}
    for n in range(args.n_rounds):
        for kind in [*TRAINERS, *TRAINERS][n % len(TRAINERS) :][: len(TRAINERS)]:  # nobody is always first
            # each time a new model, because where it lies in memory counts
            with tempfile.TemporaryDirectory(ignore_cleanup_errors=True) as folder:
                trainer, clock = make_trainer(kind, size, pattern, args, folder)
                trainer.train()
                seconds[kind] += [end - start for start, end in zip(clock.marks, clock.marks[1:], strict=False)]
                sparsity[kind] = sparse_trainer.check_sparsity(trainer.model)
                if kind == "SparseTrainer":
                    masks = trainer.masks
                    start = time.perf_counter()
                    n_loaded = sum(1 for _ in trainer.get_train_dataloader())
                    data_seconds = (time.perf_counter() - start) / n_loaded
                    n_weights = sum(weight.numel() for weight in sparse_trainer.prunable_weights(trainer.model).values())
    found = {"case": case, "seconds": seconds, "sparsity": sparsity["SparseTrainer"],
             "sparsity_plain": sparsity["Trainer"], "data_seconds": data_seconds,
             "mask_bytes": sum(mask.nbytes for mask in masks.values()),
             "weight_bytes": 2 * n_weights,
             "masking": masking(size, pattern, args),
             "memory": {kind: peak_memory(kind, size, pattern, args) for kind in TRAINERS}}  # fmt: skip
    print(case, {kind: round(median(times), 4) for kind, times in seconds.items()}, found["memory"], flush=True)
    return found


def ratio(row: dict, kind: str, n_steps: int) -> tuple[float, float, float]:
    """Median and quartiles over the rounds of a trainer's step against the plain trainer's in the same round."""
    rounds = {name: np.reshape(values, (-1, n_steps)).mean(1) for name, values in row["seconds"].items()}
    low, middle, high = np.quantile(rounds[kind] / rounds["Trainer"], [0.25, 0.5, 0.75])
    return float(middle), float(low), float(high)


def shown(found: tuple[float, float, float]) -> str:
    return "{:.3f}x ({:.2f} to {:.2f})".format(*found)


def tables(record: dict) -> str:
    lines = [["case", "Trainer, s a step", "SparseTrainer", "wanted", "met", "masks made again", "masking alone",
              "masks made again", "less", "peak memory", "wanted", "met", "masks, of the bf16 weights", "zeros kept",
              "data, of a step"]]  # fmt: skip
    for row in record["cases"]:
        times = {kind: median(values) for kind, values in row["seconds"].items()}
        step, again = (ratio(row, kind, record["settings"]["n_steps"]) for kind in ("SparseTrainer", "masks made again"))
        memory = row["memory"]["SparseTrainer"] / row["memory"]["Trainer"]
        masking = [f"{1000 * row['masking'][key]:.1f} ms" for key in ("kept", "again")]
        less = "yes" if row["masking"]["kept"] < row["masking"]["again"] else "no"
        lines.append([row["case"], f"{times['Trainer']:.3f}", shown(step), f"{STEP:g}x", "yes" if step[0] <= STEP else "no",
                      shown(again), *masking, less, f"{memory:.3f}x", f"{MEMORY:g}x", "yes" if memory <= MEMORY else "no",
                      f"1/{row['weight_bytes'] / row['mask_bytes']:.0f}", f"{row['sparsity']:.4f}",
                      f"{row['data_seconds'] / times['Trainer']:.1%}"])  # fmt: skip
    where, n = record["environment"], len(record["cases"][0]["seconds"]["Trainer"])
    device = where["gpus"][0] if record["device"] == "cuda" else f"{where['threads']} threads, {where['cpu']}"
    return (f"{table(lines, markdown=True)}\n\nMedians of {n} steps (and quartiles of rounds) of "
            f"{record['settings']['n_windows']} x {record['settings']['block_size']} tokens, in turns; {record['precision']}, "
            f"{device}.\n")  # fmt: skip


def main(argv=None) -> None:
    parser = runs.Parser(__doc__, PRESETS, shared=("device",))
    parser.add_argument("--cases", nargs="+", default=list(CASES), choices=CASES, help="[all]")
    parser.add_argument("--probe", nargs=3, help="used by itself: print the peak memory of one trainer")
    args = parser.parse_args(argv)
    runs.quiet_transformers()
    args.device = runs.resolve_device(args.device).type
    if args.probe:
        probe(args)
        return
    record = {"command": "python benchmarks/sparse_trainer.py" + (" --fast" if args.fast else ""), "device": args.device,
              "precision": finetuning.lm_precision("auto", torch.device(args.device)), "environment": runs.environment(),
              "settings": {row[0]: getattr(args, row[0]) for row in PRESETS}, "cases": []}  # fmt: skip
    for case in args.cases:
        record["cases"].append(measure(case, args))
        runs.write_atomic(RESULTS.with_suffix(".json"), json.dumps(record, indent=1) + "\n")
        runs.write_atomic(RESULTS.with_suffix(".md"), tables(record))
    print(tables(record))


if __name__ == "__main__":
    runs.run_script(main)
