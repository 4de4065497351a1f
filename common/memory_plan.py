"""What one device holds while a causal language model is trained: an estimate by shapes, before anything is loaded.

Values are bytes on one device at a step's peak; where families differ, the larger. Attention is SDPA's, whose memory does not
grow with the square of the length. Left out: what the allocator loses to fragments, buffers of NCCL, torch.compile and the
optimizer's step, and other processes on the GPU.
"""

from __future__ import annotations

from math import prod
from typing import Any

from common.blocks import blocks_of, layers_of
from common.optimizers import WHOLE_ONLY

GIB = 2**30
FRAMEWORK = GIB  # CUDA's context, and the workspaces of cuBLAS and cuDNN
MOMENTS = {"adamw": 2, "adamw_stochastic": 2, "adamw_8bit": 2, "adafactor": 0, "sgd": 0}  # states like a weight
MOST_GPUS = 64  # that advice() thinks of

# Tensors of a block's width that its backward needs, beside those of the FFN's, in the precision of the products:
# tests/test_memory_plan.py counts them. Gated blocks are Qwen3's, which normalise queries and keys too (Llama: three quarters).
KEPT = {"gated": {"32": 14.5, "bf16": 18.5, "16-mixed": 24, "bf16-mixed": 24},
        "plain": {"32": 6, "bf16": 6, "16-mixed": 10, "bf16-mixed": 10}}  # fmt: skip


def plan(outline, *, method: str, precision: str, optim: str, batch_size: int, block_size: int, n_processes: int = 1,
         fsdp: bool = False, checkpointing: bool = True, lora_r: int = 8, teacher=None,
         freeze_embeddings: bool = False) -> dict[str, int]:  # fmt: skip
    """Bytes on one device of each part that is there, by its name.

    outline, teacher: models on the meta device, of a family in common/blocks.py. method: full; or lora, whose base is frozen
    and whose adapters are made into weights in every forward (--merge sparse). precision: 32; 16-mixed and bf16-mixed: weights,
    gradients and states in fp32, products in half precision; bf16: all in it. fsdp: weights, gradients, states and masks are
    divided by the processes. batch_size: windows of block_size tokens that a device takes at once.
    """
    full, trained = method == "full", _trained_shapes(outline, method, lora_r, freeze_embeddings)
    n_trained, shards = sum(map(prod, trained)), n_processes if fsdp else 1
    product = 4 if precision == "32" else 2
    base = (2 if precision == "bf16" else 4) if full else product  # of a stored weight
    learnt = base if full else 4  # of a trained one
    n_tokens, n_prunable = batch_size * block_size, sum(linear.weight.numel() for linear in _projections(outline))
    layers = len(blocks_of(outline))
    inside = max(_kept(block, n_tokens, precision, product, full) for block in blocks_of(outline))
    loss = n_tokens * outline.config.vocab_size * (product + 3 * 4)  # logits, and in fp32 they, their log-softmax, its gradient
    parts = {
        "weights": base * _n_parameters(outline) / shards,
        "adapters": 0 if full else learnt * n_trained / shards,
        "weights in half precision": _cast(outline, n_prunable) if full and "mixed" in precision and not fsdp else 0,
        "gradients": learnt * n_trained / shards,
        "gradients in DDP's buckets": learnt * n_trained if n_processes > 1 and not fsdp else 0,
        "optimizer states": _states(trained, optim, learnt, outline.config.vocab_size) / shards,
        "masks": n_prunable / 8 / shards if full else 0,
        "gathered by FSDP": base * _gathered(outline) if fsdp else 0,
        "activations, inputs of blocks": layers * n_tokens * _width(blocks_of(outline)[0]) * base if checkpointing else 0,
        "activations, inside of blocks": inside if checkpointing else inside * layers,
        "logits and loss": loss,
        "teacher": 0 if teacher is None else product * _n_parameters(teacher) + loss,  # whole on every device
        "CUDA and libraries": FRAMEWORK,
    }
    return {name: int(value) for name, value in parts.items() if value}


def rows(parts: dict[str, int], gpu_bytes: int | None = None) -> list[list[Any]]:
    """A plan as rows for `runs.table`, in GiB: the parts, their sum, and what the GPU has."""
    shown = {**parts, "together": sum(parts.values())} | ({} if gpu_bytes is None else {"there is": gpu_bytes})
    return [["memory of one device, estimated", "GiB"], *([name, f"{value / GIB:.2f}"] for name, value in shown.items())]


def advice(outline, *, gpu_bytes: int, **chosen) -> list[str]:
    """What would fit into `gpu_bytes` by the same estimate, a line each; none where nothing would. chosen: as for `plan`."""
    found = []

    def fits(what: str, **changed) -> bool:
        needed = sum(plan(outline, **chosen | changed).values())
        if needed <= gpu_bytes:
            found.append(f"would fit: {what}, {needed / GIB:.1f} GiB on each device")
        return needed <= gpu_bytes

    least = chosen.get("n_processes", 1) + bool(chosen.get("fsdp"))
    whole = {"optim": "adamw"} if chosen["optim"] in WHOLE_ONLY else {}
    flags = "--fsdp" + " --optim adamw" * bool(whole)
    for n in (2**i for i in range(1, MOST_GPUS.bit_length())):
        if n >= least and fits(f"FSDP over {n} GPUs ({flags})", fsdp=True, n_processes=n, **whole):
            break
    if not chosen.get("checkpointing", True):
        fits("gradient checkpointing (--gradient_checkpointing)", checkpointing=True)
    if chosen["optim"] in ("adamw", "adamw_stochastic") and not chosen.get("fsdp"):
        fits("8-bit AdamW (--optim adamw_8bit)", optim="adamw_8bit")
    if chosen["method"] == "full":
        fits("LoRA (--method lora)", method="lora")
    return found


def _n_parameters(model) -> int:
    return sum(parameter.numel() for parameter in model.parameters())


def _projections(model) -> list:
    return [linear for block in blocks_of(model) for linear in block.projections]


def _trained_shapes(model, method: str, r: int, freeze_embeddings: bool) -> list[tuple[int, ...]]:
    if method == "full":
        tables = (model.get_input_embeddings(), model.get_output_embeddings()) if freeze_embeddings else ()
        frozen = {id(parameter) for table in tables for parameter in table.parameters()}
        return [tuple(parameter.shape) for parameter in model.parameters() if id(parameter) not in frozen]
    return [shape for linear in _projections(model) for shape in ((r, linear.in_features), (linear.out_features, r))]


def _states(shapes: list[tuple[int, ...]], optim: str, width: int, vocabulary: int) -> int:
    """Bytes of the optimizer's states: moments as wide as the weights (muon: one of a matrix), 8 bits each, or (adafactor) sums
    of rows and columns.
    """
    if optim == "muon":
        return width * sum(prod(shape) * (1 if len(shape) == 2 and vocabulary not in shape else 2) for shape in shapes)
    if optim == "adafactor":
        return sum(4 * (sum(shape) if len(shape) > 1 else prod(shape)) for shape in shapes)
    return MOMENTS[optim] * (1 if optim == "adamw_8bit" else width) * sum(map(prod, shapes))


def _cast(model, n_prunable: int) -> int:
    """Bytes of the copies of fp32 weights that autocast keeps through a forward: of the projections and of the head."""
    return 2 * (n_prunable + model.get_output_embeddings().weight.numel())


def _gathered(model) -> int:
    """Weights that FSDP has gathered at once: a block, the next one, and the largest tensor that is in none."""
    layers = layers_of(model)
    inside = {id(parameter) for parameter in layers.parameters()}
    outside = max(parameter.numel() for parameter in model.parameters() if id(parameter) not in inside)
    return 2 * max(map(_n_parameters, layers)) + outside


def _width(block) -> int:
    return max(block.attention.o.in_features, block.attention.o.out_features)


def _kept(block, n_tokens: int, precision: str, product: int, full: bool) -> int:
    """Bytes that one block's backward needs. Of a plain FFN two tensors of its width, of a gated one four.

    LoRA: also every projection's input behind the dropout with its mask, and what each adapter makes of a weight: its product
    and a byte of mask, and three in fp32 while one is made.
    """
    kind = "gated" if len(block.ffn.ins) > 1 else "plain"
    states = KEPT[kind][precision] * _width(block) + 2 * len(block.ffn.ins) * block.ffn.n_neurons
    kept = n_tokens * int(product * states)
    if full:
        return kept
    sizes = [linear.weight.numel() for linear in block.projections]
    inputs = sum(linear.in_features for linear in block.projections)
    return kept + (product + 1) * (n_tokens * inputs + sum(sizes)) + 3 * 4 * max(sizes)
