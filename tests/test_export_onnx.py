"""What ONNX Runtime computes from 4-bit files, against the model with its quantisers in torch."""

import numpy as np
import pytest
import torch
import transformers

from common import eval_utils, quantizers
from common.blocks import blocks_of
from common.data import Split
from common.quantizers import WeightScheme

export_onnx = pytest.importorskip("common.export_onnx")
pytest.importorskip("onnxruntime")


def model_of(kind, size, activation_bits, embeddings=True):
    torch.manual_seed(0)
    shape = {"vocab_size": 90, "max_position_embeddings": 40}
    if kind == "distilbert":
        config = transformers.DistilBertConfig(**shape, dim=64, n_layers=2, n_heads=4, hidden_dim=96, initializer_range=0.2)
        model = transformers.DistilBertForSequenceClassification(config)
    else:
        config = transformers.BertConfig(**shape, hidden_size=64, num_hidden_layers=2, num_attention_heads=4,
                                         intermediate_size=96, initializer_range=0.2)  # fmt: skip
        model = transformers.BertForSequenceClassification(config)
    scheme = WeightScheme(4, size, True, "mse")
    linears = [linear for block in blocks_of(model) for linear in block.projections]
    tables = WeightScheme(4, -1, True, "mse") if embeddings else None
    quantizers.quantize_(model, linears, scheme, activation_bits, embeddings=tables)
    return model.eval()


def examples():
    rng = np.random.default_rng(0)
    lengths = rng.integers(3, 30, 20)
    offsets = np.concatenate([[0], lengths.cumsum()])
    return Split(rng.integers(5, 90, offsets[-1]).astype(np.int32), offsets, np.arange(20) % 2, 0, 0)


@pytest.mark.parametrize(("kind", "size"), [("bert", 32), ("bert", -1), ("distilbert", 32)])
def test_fp32_inputs_give_the_same_logits(kind, size, tmp_path):
    """Padding, other lengths and other batch sizes than those of the export included."""
    model = model_of(kind, size, 32)
    export_onnx.export(model, tmp_path / "model.onnx")
    split = examples()
    expected = eval_utils.predict(model, split, torch.device("cpu"), batch_size=7)
    found = export_onnx.predict(export_onnx.Session(tmp_path / "model.onnx"), split, batch_size=7)
    torch.testing.assert_close(found, expected, rtol=1e-3, atol=1e-4 * float(expected.std() + 1))
    assert [path.name for path in tmp_path.iterdir()] == ["model.onnx"]


def test_8_bit_inputs_are_rounded_a_little_otherwise(tmp_path):
    model, split = model_of("bert", 32, 8), examples()
    export_onnx.export(model, tmp_path / "model.onnx", int8_inputs=True)
    expected = eval_utils.predict(model, split, torch.device("cpu"))
    found = export_onnx.predict(export_onnx.Session(tmp_path / "model.onnx"), split)
    distance = (found - expected).square().mean().sqrt() / expected.std()
    assert 0 < distance < 0.1
    assert not model.training and quantizers.quantized_modules(model)  # what was exported is a copy


def test_the_file_holds_four_bits_a_weight(tmp_path):
    import onnx

    model = model_of("bert", 32, 8)
    export_onnx.export(model, tmp_path / "model.onnx")
    graph = onnx.load(tmp_path / "model.onnx").graph
    kinds = [node.op_type for node in graph.node]
    counted = {kind: kinds.count(kind) for kind in ("MultiHeadAttention", "MatMulNBits", "GatherBlockQuantized")}
    assert counted == {"MultiHeadAttention": 2, "MatMulNBits": 12, "GatherBlockQuantized": 2}  # not the token types
    assert "Reshape" not in kinds
    stored = {tensor.name: tensor for tensor in graph.initializer}
    packed = [tensor for name, tensor in stored.items() if name.endswith("packed")]
    n_weights = sum(module.weight.numel() for module in quantizers.quantized_modules(model).values())
    assert sum(len(tensor.raw_data) for tensor in packed) == n_weights / 2
    floats = [tensor for tensor in stored.values() if tensor.data_type == onnx.TensorProto.FLOAT]
    assert max(np.prod(tensor.dims) for tensor in floats) <= 64 * 64  # the pooler


def test_nibbles_by_hand():
    integers = torch.tensor([[-8, 7, 0, 1, -1]], dtype=torch.int8)
    assert export_onnx._nibbles(integers, 4).tolist() == [[[0x0 | 0xF << 4, 0x8 | 0x9 << 4], [0x7 | 0x8 << 4, 0x88]]]
