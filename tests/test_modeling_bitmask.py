"""The bitmask format: bit for bit, small, and loaded by a process that cannot see this repository."""

import json
import subprocess
import sys

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, AutoTokenizer

from common import assets, checkpoint
from common.modeling_bitmask import pack, state_of, unpack
from common.pruning import shrink_
from common.runs import UserError
from common.sparse_trainer import prunable_weights
from common.streaming import measured_sparsity
from tests.test_families import random_model


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
@pytest.mark.parametrize("shape", [(16, 24), (5, 7), (1, 1), (3, 1000), (0, 4)])
def test_packed_as_numpy_packs_it(dtype, shape):
    generator = torch.Generator().manual_seed(0)
    weight = torch.randn(shape, generator=generator).to(dtype) * (torch.rand(shape, generator=generator) < 0.3)
    bitmask, values = pack(weight)
    raw = weight.numpy() if dtype == torch.float32 else weight.view(torch.int16).numpy()
    stored = raw.view(np.uint32 if dtype == torch.float32 else np.uint16) != 0
    assert np.array_equal(bitmask.numpy(), np.packbits(stored.flatten(), bitorder="little"))
    assert torch.equal(values, weight.flatten()[torch.from_numpy(stored.flatten())])
    back = unpack(bitmask, values, list(shape))
    assert back.dtype == dtype and torch.equal(back.view(torch.uint8), weight.view(torch.uint8))


def test_numbers_that_equality_does_not_tell_apart():
    """A negative zero, NaN and a subnormal come back as they were."""
    weight = torch.tensor([[0.0, -0.0, float("nan"), 1e-40], [float("inf"), 0.0, -1.0, 0.0]])
    back = unpack(*pack(weight), [2, 4])
    assert torch.equal(back.view(torch.int32), weight.view(torch.int32))


LOADED = """
import sys, torch
from safetensors.torch import save_file
from transformers import AutoModelForCausalLM
model = AutoModelForCausalLM.from_pretrained(sys.argv[1], trust_remote_code=True).eval()
state, logits = model.state_dict(), model(input_ids=torch.arange(3, 30)[None]).logits
save_file({"logits": logits.detach().float()} | {name: value.clone() for name, value in state.items()}, sys.argv[2])
model.save_pretrained(sys.argv[3])
again = AutoModelForCausalLM.from_pretrained(sys.argv[3], trust_remote_code=True)
print(model.dtype, all(torch.equal(a, b) for a, b in zip(state.values(), again.state_dict().values())))
"""


def saved(model, folder, dtype):
    with torch.no_grad():
        for weight in prunable_weights(model).values():
            weight[torch.rand(weight.shape, generator=torch.Generator().manual_seed(0)) > 0.1] = 0
    checkpoint.save_model(folder, model.to(dtype), AutoTokenizer.from_pretrained(assets.TINY_LLAMA))
    return list(prunable_weights(model))


@pytest.mark.parametrize("family", ["llama", "opt-350m", "qwen2", "qwen3", "mistral"])
def test_a_bare_process_loads_it(family, tmp_path):
    model, _ = random_model(family)
    names = saved(model, tmp_path / "dense", torch.bfloat16)
    found = checkpoint.save_bitmask(tmp_path / "dense", tmp_path / "sparse", names)
    assert found["sparse_bytes"] <= 0.25 * found["dense_bytes"]
    assert found["dense_bytes"] == 2 * sum(weight.numel() for weight in prunable_weights(model).values())
    done = subprocess.run([sys.executable, "-c", LOADED, tmp_path / "sparse", tmp_path / "seen", tmp_path / "again"],
                          cwd=tmp_path, capture_output=True, text=True, check=False)  # fmt: skip
    assert done.returncode == 0 and done.stdout.split() == ["torch.bfloat16", "True"], done.stderr
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "dense").eval()
    seen, wanted = load_file(tmp_path / "seen"), model.state_dict()
    logits = seen.pop("logits")
    assert seen.keys() == wanted.keys()
    for name, tensor in wanted.items():
        assert torch.equal(seen[name].view(torch.uint8), tensor.view(torch.uint8)), name
    with torch.inference_mode():
        assert torch.equal(logits, model(input_ids=torch.arange(3, 30)[None]).logits.float())
    again = json.loads((tmp_path / "again" / "config.json").read_text())
    assert "bitmask_weights" not in again


def test_ours_loads_it_without_its_code(tmp_path):
    model, _ = random_model("llama")
    names = saved(model, tmp_path / "dense", torch.bfloat16)
    checkpoint.save_bitmask(tmp_path / "dense", tmp_path / "sparse", names)
    (tmp_path / "sparse" / "modeling_bitmask.py").write_text("raise SystemExit('code of a model was run')")
    loaded = checkpoint.load_causal_lm(tmp_path / "sparse")
    wanted = model.state_dict()
    assert all(torch.equal(tensor, wanted[name]) for name, tensor in loaded.state_dict().items())


def test_uneven_layers_too(tmp_path):
    model, _ = random_model("llama")
    keep = {"heads": [torch.tensor([True, False]), torch.ones(2, dtype=torch.bool), torch.ones(2, dtype=torch.bool)],
            "neurons": [torch.arange(48) < n for n in (40, 48, 8)]}  # fmt: skip
    shrink_(model, keep)
    names = saved(model, tmp_path / "dense", torch.bfloat16)
    checkpoint.save_bitmask(tmp_path / "dense", tmp_path / "sparse", names)
    done = subprocess.run([sys.executable, "-c", LOADED, tmp_path / "sparse", tmp_path / "seen", tmp_path / "again"],
                          cwd=tmp_path, capture_output=True, text=True, check=False)  # fmt: skip
    assert done.returncode == 0 and done.stdout.split() == ["torch.bfloat16", "True"], done.stderr


def test_damaged_files_are_told(tmp_path):
    model, _ = random_model("llama")
    names, path = saved(model, tmp_path / "dense", torch.bfloat16), tmp_path / "sparse" / "model.safetensors"
    checkpoint.save_bitmask(tmp_path / "dense", tmp_path / "sparse", names)
    tensors = load_file(path)
    name = next(name for name in tensors if name.endswith(".values"))
    save_file(tensors | {name: tensors[name][:-1].clone()}, path, metadata={"format": "pt"})
    with pytest.raises(UserError, match=r"not loadable as LlamaForCausalLM \(\d+ values, \d+ in a bitmask"):
        checkpoint.load_causal_lm(tmp_path / "sparse")


def test_sparsity_of_the_files(tmp_path):
    model, _ = random_model("llama")
    names = saved(model, tmp_path / "dense", torch.bfloat16)
    checkpoint.save_bitmask(tmp_path / "dense", tmp_path / "sparse", names)
    found = [measured_sparsity(tmp_path / name, names) for name in ("dense", "sparse")]
    assert found[0] == pytest.approx(found[1], abs=1e-9) and found[0] == pytest.approx(0.9, abs=0.02)


def test_written_over_and_refused(tmp_path):
    model, _ = random_model("llama")
    names = saved(model, tmp_path / "dense", torch.float32)
    for _ in range(2):
        checkpoint.save_bitmask(tmp_path / "dense", tmp_path / "sparse", names)
    config = checkpoint._config_of(tmp_path / "sparse")
    rebuilt, stored = state_of(tmp_path / "sparse", config), load_file(tmp_path / "dense" / "model.safetensors")
    assert rebuilt.keys() == stored.keys() and all(torch.equal(rebuilt[name], stored[name]) for name in stored)
    save_file({name: tensor.double() for name, tensor in stored.items()}, tmp_path / "dense" / "model.safetensors",
              metadata={"format": "pt"})  # fmt: skip
    with pytest.raises(UserError, match=r"float64; expected bfloat16"):
        checkpoint.save_bitmask(tmp_path / "dense", tmp_path / "sparse", names)
