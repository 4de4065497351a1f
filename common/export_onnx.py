"""Quantised models as ONNX graphs whose weights stay 4-bit, and what ONNX Runtime makes of them.

Every quantised Linear becomes a `MatMulNBits`, every quantised Embedding a `GatherBlockQuantized`, every attention a
`MultiHeadAttention` (operators of `com.microsoft`, which ONNX Runtime has on CPUs and GPUs). Inputs stay fp32, so what training
rounded is not rounded here; or (`int8_inputs`) the kernel rounds them to 8 bits, in blocks of the weights' group with a scale
each, where training has one scale for the token. Either is finer than training, so close to it and not bit for bit the same.
"""

from __future__ import annotations

import copy
import logging
import warnings
from contextlib import contextmanager
from pathlib import Path

import numpy as np
import torch
from torch import nn
from transformers import AttentionInterface, AttentionMaskInterface
from transformers.masking_utils import ALL_MASK_ATTENTION_FUNCTIONS

from common.data import Split, collate, in_order
from common.quantizers import QuantizedEmbedding, QuantizedLinear, quantized_modules
from common.runs import UserError

DOMAIN = "com.microsoft"


def _nibbles(integers: torch.Tensor, block: int) -> torch.Tensor:
    """int8 (rows, columns) of 4 bits -> uint8 (rows, blocks, block / 2): offset by 8, two in a byte, the first one low."""
    rows, columns = integers.shape
    padded = nn.functional.pad(integers.to(torch.int16) + 8, (0, -columns % block), value=8).to(torch.uint8)
    pairs = padded.view(rows, -1, block // 2, 2)
    return pairs[..., 0] | (pairs[..., 1] << 4)


class _Linear(nn.Module):
    def __init__(self, module: QuantizedLinear, int8_inputs: bool):
        super().__init__()
        integers, scale, _ = module.integers()
        self.k, self.n = module.in_features, module.out_features
        self.block = 128 if module.scheme.group_size == -1 else module.scheme.group_size  # -1: its blocks share a scale
        self.register_buffer("packed", _nibbles(integers, self.block))
        self.register_buffer("scale", scale.expand(-1, self.packed.shape[1]).flatten())
        self.bias = module.bias
        self.level = 4 if int8_inputs else 1

    def forward(self, x):
        attributes = {"K": self.k, "N": self.n, "bits": 4, "block_size": self.block, "accuracy_level": self.level}
        y = torch.onnx.ops.symbolic(f"{DOMAIN}::MatMulNBits", (x, self.packed, self.scale), attributes, dtype=x.dtype,
                                    shape=(*x.shape[:-1], self.n), version=1)  # fmt: skip
        return y if self.bias is None else y + self.bias


class _Embedding(nn.Module):
    def __init__(self, module: QuantizedEmbedding):
        super().__init__()
        integers, scale, _ = module.integers()
        self.width = module.embedding_dim
        self.block = module.scheme.group_size if module.scheme.group_size != -1 else 1 << (self.width - 1).bit_length()
        self.register_buffer("packed", _nibbles(integers, 2).flatten(1))  # (rows, columns / 2)
        self.register_buffer("scale", scale)
        self.register_buffer("zero", torch.full((len(scale), -(-scale.shape[1] // 2)), 0x88, dtype=torch.uint8))

    def forward(self, ids):
        attributes = {"gather_axis": 0, "quantize_axis": 1, "block_size": self.block, "bits": 4}
        return torch.onnx.ops.symbolic(f"{DOMAIN}::GatherBlockQuantized", (self.packed, ids, self.scale, self.zero), attributes,
                                       dtype=torch.float32, shape=(*ids.shape, self.width), version=1)  # fmt: skip


def _attention(module, query, key, value, attention_mask, scaling=None, **_):
    """Attention as one operator. query, key, value: (B, heads, T, head_dim); attention_mask: (B, 1, T, T), added."""
    (batch, heads, length, width), rest = query.shape, (query, key, value)
    flat = [t.transpose(1, 2).reshape(batch, length, heads * width) for t in rest]
    attributes = {"num_heads": heads, "scale": float(scaling or width**-0.5)}
    bias = [] if attention_mask is None else [None, None, attention_mask]
    mixed = torch.onnx.ops.symbolic(f"{DOMAIN}::MultiHeadAttention", (*flat, *bias), attributes, dtype=query.dtype,
                                    shape=(batch, length, heads * width), version=1)  # fmt: skip
    return mixed.view(batch, length, heads, width), None


class _Logits(nn.Module):
    def __init__(self, model):
        super().__init__()
        self.model = model

    def forward(self, input_ids, attention_mask):
        return self.model(input_ids=input_ids, attention_mask=attention_mask).logits


def check_scheme(bits: int, symmetric: bool, embedding_bits: int) -> None:
    """UserError for a scheme that the operators do not have."""
    if bits != 4 or not symmetric or embedding_bits == 8:
        raise UserError("--export onnx: takes 4-bit symmetric weights, and embeddings of 4 or 32 bits; leave it out, or change "
                        "these")  # fmt: skip


def export(model, path: Path, int8_inputs: bool = False) -> None:
    """Write a model with quantisers in it (symmetric, 4 bits) as an ONNX file; inputs input_ids, attention_mask: (B, T)."""
    twin = copy.deepcopy(model).cpu().eval().requires_grad_(False)
    AttentionInterface.register("onnx_operator", _attention)
    AttentionMaskInterface.register("onnx_operator", ALL_MASK_ATTENTION_FUNCTIONS["eager"])
    twin.set_attn_implementation("onnx_operator")
    for name, module in quantized_modules(twin).items():
        parent, _, child = name.rpartition(".")
        new = _Linear(module, int8_inputs) if isinstance(module, QuantizedLinear) else _Embedding(module)
        setattr(twin.get_submodule(parent), child, new)
    ids, mask = torch.ones(2, 8, dtype=torch.int64), torch.ones(2, 8, dtype=torch.int64)
    free = {0: torch.export.Dim("batch"), 1: torch.export.Dim("length")}
    with quiet():
        program = torch.onnx.export(_Logits(twin).eval(), (ids, mask), dynamo=True, input_names=["input_ids", "attention_mask"],
                                    output_names=["logits"], dynamic_shapes=(free, free), verbose=False)  # fmt: skip
    _drop_reshapes(program.model)
    beside = path.with_name(f".{path.name}.new")
    program.save(beside)
    beside.replace(path)


def _drop_reshapes(graph_model) -> None:
    """Take out chains of Reshapes that end in the shape they began with: what splits heads and joins them again."""
    import onnx_ir
    from onnx_ir.passes.common import RemoveUnusedNodesPass

    for node in graph_model.graph:
        if node.op_type != "Reshape":
            continue
        source = node.inputs[0]
        while (before := source.producer()) is not None and before.op_type == "Reshape":
            source = before.inputs[0]
        if source.shape is not None and source.shape == node.outputs[0].shape:
            onnx_ir.convenience.replace_all_uses_with(node.outputs[0], source)
    RemoveUnusedNodesPass()(graph_model)


def exported(model, path: Path, kind: str) -> dict[str, Session]:
    """For the kind "onnx" or "onnx_int8" `export`, and the file as a session by its name in tables; for "none" nothing."""
    if kind == "none":
        return {}
    export(model, path, kind == "onnx_int8")
    return {"onnx": Session(path)}


@contextmanager
def quiet():
    """The exporter warns of what is missing and unused here."""
    before = logging.root.manager.disable
    logging.disable(logging.WARNING)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        logging.disable(before)


class Session:
    """An ONNX file, run by ONNX Runtime on the CPU with as many threads as torch uses; called as a model is.

    One of its optimizers is off: the fused norm of ONNX Runtime 1.31 takes four times as long as the plain one here.
    """

    def __init__(self, path: Path):
        import onnxruntime

        options = onnxruntime.SessionOptions()
        options.intra_op_num_threads = torch.get_num_threads()
        options.add_session_config_entry("session.force_spinning_stop", "1")  # between runs the threads leave the cores alone
        self._session = onnxruntime.InferenceSession(str(path), options, providers=["CPUExecutionProvider"],
                                                     disabled_optimizers=["SkipLayerNormFusion"])  # fmt: skip
        self.training = False

    def __call__(self, input_ids: torch.Tensor, attention_mask: torch.Tensor) -> np.ndarray:
        return self._session.run(None, {"input_ids": input_ids.numpy(), "attention_mask": attention_mask.numpy()})[0]

    def train(self, mode: bool = True) -> Session:
        """A graph has one mode; here so that it can be timed beside models."""
        return self

    eval = train


def predict(session: Session, split: Split, batch_size: int = 128) -> torch.Tensor:
    """Logits of every example in the order of the split: (n, n_classes) fp32."""
    order = in_order(split.lengths, batch_size)
    parts = []
    for index in order:
        batch = collate(split, index)
        parts.append(torch.from_numpy(session(batch["input_ids"], batch["attention_mask"])))
    return torch.cat(parts)[torch.from_numpy(np.concatenate(order)).argsort()]
