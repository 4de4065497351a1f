"""What fine-tuning of 7B and 8B models holds on each GPU, by the estimate of finetune_dense.py --dry_run. Nothing is run.

    python benchmarks/memory_table.py

Shapes of Llama-2-7B and Llama-3-8B, one window of 1,024 tokens a GPU, gradient checkpointing. Several GPUs: FSDP.
Writes benchmarks/results/memory_table.json and .md.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path

import torch
from transformers import LlamaConfig, LlamaForCausalLM

REPOSITORY = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(REPOSITORY))

from common import memory_plan  # noqa: E402
from common.runs import Parser, environment, run_script, table, write_atomic  # noqa: E402

RESULTS = REPOSITORY / "benchmarks" / "results" / "memory_table"
SHAPES = {
    "Llama-2-7B": {"hidden_size": 4096, "intermediate_size": 11008, "num_hidden_layers": 32, "num_attention_heads": 32,
                   "num_key_value_heads": 32, "vocab_size": 32000, "tie_word_embeddings": False},
    "Llama-3-8B": {"hidden_size": 4096, "intermediate_size": 14336, "num_hidden_layers": 32, "num_attention_heads": 32,
                   "num_key_value_heads": 8, "vocab_size": 128256, "tie_word_embeddings": False},
}  # fmt: skip
GPUS = (1, 2, 4)
CARD = 24  # GiB, of the card that is asked about most
ONE_GPU = ("adamw_8bit", "adafactor")  # cannot step on pieces of matrices
WAYS = {
    "full, bf16-mixed, adamw": ("full", "bf16-mixed", "adamw"),
    "full, bf16-mixed, adamw_8bit": ("full", "bf16-mixed", "adamw_8bit"),
    "full, bf16, adamw_stochastic": ("full", "bf16", "adamw_stochastic"),
    "full, bf16, adamw_8bit": ("full", "bf16", "adamw_8bit"),
    "full, bf16, adafactor": ("full", "bf16", "adafactor"),
    "LoRA, bf16-mixed, adamw": ("lora", "bf16-mixed", "adamw"),
}


def main(argv=None) -> None:
    Parser(__doc__).parse_args(argv)
    head = [f"{n} GPU" + "s" * (n > 1) for n in GPUS]
    found, lines = [], [["model", "method, precision, optimizer", *head, f"fits {CARD} GiB on"]]
    for model, shape in SHAPES.items():
        with torch.device("meta"):
            outline = LlamaForCausalLM(LlamaConfig(**shape, max_position_embeddings=4096))
        for way, (method, precision, optim) in WAYS.items():
            plans = {n: memory_plan.plan(outline, method=method, precision=precision, optim=optim, batch_size=1,
                                         block_size=1024, n_processes=n, fsdp=n > 1, checkpointing=True)
                     for n in GPUS if n == 1 or optim not in ONE_GPU}  # fmt: skip
            sizes = {n: sum(plan.values()) / memory_plan.GIB for n, plan in plans.items()}
            fitting = [str(n) for n, size in sizes.items() if size <= CARD]
            cells = (f"{sizes[n]:.1f}" if n in sizes else "" for n in GPUS)
            lines.append([model, way, *cells, ", ".join(fitting) or "none of these"])
            found.append({"model": model, "way": way, "plans": plans})
    record = {"command": "python benchmarks/memory_table.py", "environment": environment(), "plans": found}
    write_atomic(RESULTS.with_suffix(".json"), json.dumps(record, indent=1) + "\n")
    write_atomic(RESULTS.with_suffix(".md"), table(lines, markdown=True) + "\n")
    print(table(lines))


if __name__ == "__main__":
    run_script(main)
