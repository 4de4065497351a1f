"""Masks against brute force, and training under them against a loop written out by hand."""

import copy
import importlib.util
import math
import os
import shutil
import sys
import types
from collections import Counter

import numpy as np
import pytest
import torch
import torch.distributed as dist
import transformers
from torch.distributed.tensor import Replicate, Shard, distribute_tensor
from torch.nn import functional
from torch.testing._internal.distributed.fake_pg import FakeStore
from transformers import Trainer, TrainerCallback, TrainingArguments

from common import sparse_trainer
from common.blocks import blocks_of
from common.sparse_trainer import (
    BLOCKS,
    WHOLE,
    Mask,
    SparseTrainer,
    check_sparsity,
    last_checkpoint,
    layer_sparsity,
    local_mask,
    lost_zeros,
    masks_of,
    plain_name,
    prunable_weights,
)
from tests.test_streaming import one_thread, random_lm  # noqa: F401

FAMILIES = ["opt", "opt-350m", "llama", "mistral", "qwen2", "qwen3"]
KINDS = ["blocks", "2:4", "unstructured"]


def drawn(*shape, seed=0):
    """No value of it is zero."""
    values = torch.randn(shape, generator=torch.Generator().manual_seed(seed))
    return values.sign() * (values.abs() + 0.01)


def blockwise(rows, columns, n, m, share, seed=1):
    """True in blocks of n x m that are drawn, but never in two neighbours that would be one larger block."""
    picked = torch.rand(rows // n, columns // m, generator=torch.Generator().manual_seed(seed)) < share
    return picked.repeat_interleave(n, 0).repeat_interleave(m, 1)


def zeros_of(kind, rows, columns, seed=1):
    if kind == "blocks":
        return blockwise(rows, columns, 8, 8, 0.4, seed)
    scores = torch.rand(rows, columns, generator=torch.Generator().manual_seed(seed))
    if kind == "2:4":
        return (scores.view(rows, -1, 4).argsort(2).argsort(2) < 2).view(rows, columns)
    return scores < 0.5


# ------------------------------------------------------------------------------------------------------------------ masks

#  shape, zeros, sizes named, the block that is found
MASKS = {
    "16x16": ((64, 48), blockwise(64, 48, 16, 16, 0.4), (), (16, 16)),
    "32x8, named": ((64, 48), blockwise(64, 48, 32, 8, 0.4), ((32, 8),), (32, 8)),
    "32x8, not named": ((64, 48), blockwise(64, 48, 32, 8, 0.4), (), (8, 8)),
    "32x8, does not divide": ((40, 40), blockwise(40, 40, 8, 8, 0.4), ((32, 8),), (8, 8)),
    "64x64": ((128, 192), blockwise(128, 192, 64, 64, 0.5), (), (64, 64)),
    "32x32": ((64, 96), blockwise(64, 96, 32, 32, 0.3), (), (32, 32)),
    "4x4": ((64, 48), blockwise(64, 48, 4, 4, 0.3), (), (4, 4)),
    "4x4, more than half": ((64, 48), blockwise(64, 48, 4, 4, 0.7), (), None),
    "4x4 of a narrow one": ((12, 20), blockwise(12, 20, 4, 4, 0.3), (), (4, 4)),
    "2:4": ((64, 48), zeros_of("2:4", 64, 48), (), None),
    "unstructured": ((64, 48), zeros_of("unstructured", 64, 48), (), None),
    "one zero": ((64, 64), torch.arange(64 * 64).view(64, 64) == 77, (), None),
    "5x7": ((5, 7), zeros_of("unstructured", 5, 7), (), None),
    "33x17": ((33, 17), zeros_of("unstructured", 33, 17), (), None),
    "1x1": ((1, 1), torch.ones(1, 1, dtype=torch.bool), (), None),
    "more than are unpacked at once": ((300, 257), zeros_of("unstructured", 300, 257), (), None),
    "all": ((64, 48), torch.ones(64, 48, dtype=torch.bool), (), (16, 16)),
    "all of 5x7": ((5, 7), torch.ones(5, 7, dtype=torch.bool), (), None),
    "none": ((64, 48), torch.zeros(64, 48, dtype=torch.bool), (), (16, 16)),
}


def mask_case(name):
    shape, zeros, named, block = MASKS[name]
    weight = drawn(*shape)
    weight[zeros] = 0.0
    weight[zeros & (drawn(*shape, seed=2) > 0)] = -0.0
    return Mask.of(weight, (*named, *BLOCKS)), zeros, block


@pytest.mark.parametrize("name", MASKS)
def test_a_mask_is_of_the_zeros(name):
    mask, zeros, block = mask_case(name)
    assert mask.shape == tuple(zeros.shape) and mask.block == block
    assert mask.free().dtype == torch.bool and torch.equal(mask.free(), ~zeros)
    if block:
        n, m = block
        first = zeros[::n, ::m].flatten()
        assert mask.data.dtype == torch.int32 and mask.data.tolist() == first.nonzero().flatten().tolist()
    else:
        packed = np.packbits((~zeros).flatten().numpy(), bitorder="little")
        assert mask.data.dtype == torch.uint8 and mask.data.tolist() == packed.tolist()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("name", MASKS)
def test_zero_in_place(name, dtype):
    mask, zeros, _ = mask_case(name)
    values = drawn(*zeros.shape, seed=3).to(dtype)
    wanted, given = torch.where(zeros, torch.zeros((), dtype=dtype), values), values.clone()
    made = mask.zero_(given)
    assert made.data_ptr() == given.data_ptr() and made.dtype == dtype and torch.equal(given, wanted)
    assert torch.equal(mask.zero_(values.clone().requires_grad_().detach()), wanted)


ON_GPU = pytest.param("cuda", marks=pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device"))


@pytest.mark.parametrize("device", ["cpu", ON_GPU])  # the CPU does what is for GPUs as well
@pytest.mark.parametrize("name", MASKS)
def test_zero_in_place_as_gpus_do_it(name, device, monkeypatch):
    monkeypatch.setattr(sparse_trainer, "AT_ONCE_ON_GPU", 2**16)
    mask, zeros, _ = mask_case(name)
    values, placed = drawn(*zeros.shape, seed=3), mask.to(torch.device(device))
    values[0, 0] = torch.inf
    for _ in range(2):  # where the blocks are is found once
        given = values.clone().to(device)
        made = placed._zero_on_gpu_(given)
        assert made.data_ptr() == given.data_ptr() and torch.equal(made.cpu(), torch.where(zeros, 0.0, values))
    assert torch.equal(placed.free().cpu(), ~zeros)
    if device == "cuda" and not sparse_trainer.has_kernels(torch.device("cuda")):
        assert placed.nbytes <= values.numel() / 8 + 1  # 1/16 of bf16 weights


@pytest.mark.skipif(importlib.util.find_spec("triton") is None, reason="no Triton: it comes with PyTorch for CUDA on Linux")
@pytest.mark.skipif(not torch.cuda.is_available() and not os.environ.get("TRITON_INTERPRET"),
                    reason="no CUDA device, and TRITON_INTERPRET is not set")  # fmt: skip
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("name", [*MASKS, "24x40"])
def test_zero_in_place_by_triton(name, dtype):
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    if name in MASKS:
        mask, zeros, _ = mask_case(name)
    else:  # sizes that are no powers of two
        zeros = blockwise(96, 120, 24, 40, 0.5)
        mask = Mask.of(drawn(96, 120) * ~zeros, ((24, 40),))
        assert mask.block == (24, 40)
    placed = Mask(mask.shape, mask.block, mask.data.to(device))
    values = drawn(*zeros.shape, seed=3).to(dtype)
    values[0, 0] = torch.inf
    around = torch.ones(values.numel() + 2, dtype=dtype, device=device)  # what lies beside it stays
    given = around[1:-1].view(zeros.shape)
    given.copy_(values)
    assert placed._zero_by_triton_(given).data_ptr() == given.data_ptr()
    assert torch.equal(given.cpu(), torch.where(zeros, torch.zeros((), dtype=dtype), values))
    assert around[0] == 1 and around[-1] == 1
    if values.shape[0] > 1 < values.shape[1]:
        with pytest.raises(ValueError, match="expected contiguous"):
            placed._zero_by_triton_(torch.ones(*zeros.shape[::-1], device=device).T)
    if device.type == "cuda":
        assert torch.equal(placed.zero_(values.to(device)).cpu(), given.cpu()) and placed.nbytes <= values.numel() / 8 + 1


@pytest.mark.parametrize("found", [None, "a Triton that builds nothing"])
def test_without_triton_that_works_masks_are_pytorchs(found, monkeypatch, capsys):
    def no_compiler(*_):
        raise RuntimeError("Failed to find C compiler\nand more")

    monkeypatch.setattr(sparse_trainer, "find_spec", lambda name: found)
    monkeypatch.setitem(sys.modules, "common.mask_kernels", types.SimpleNamespace(zero_bits_=no_compiler))
    assert not sparse_trainer.has_kernels.__wrapped__(torch.device("cuda"))  # where there is no CUDA, of that
    assert ("warning: Triton builds no kernels here" in capsys.readouterr().out) == bool(found)


@pytest.mark.parametrize("name", ["16x16", "32x8, named", "32x32", "2:4", "5x7", "33x17", "all", "none"])
def test_rows(name):
    mask, zeros, block = mask_case(name)
    end = len(zeros)
    cuts = [(0, end), (0, 0), (end, end), (0, end // 2), (end // 2, end), (1, end - 1), (2, 3)]
    step = block[0] if block else 1
    for start, stop in [*cuts, (0, step), (step, min(2 * step, end))]:
        part = mask.rows(start, stop)
        assert part.shape == (stop - start, zeros.shape[1]) and torch.equal(part.free(), ~zeros[start:stop])
        assert part.block == (None if start % step or stop % step else block)
        values = drawn(*part.shape, seed=4)
        assert torch.equal(part.zero_(values.clone()), values * ~zeros[start:stop])


@pytest.mark.parametrize("share", [0.02, 0.2, 0.5, 0.8, 0.98])
@pytest.mark.parametrize("size", [4, 8, 16, 32, 64, None])
def test_a_mask_is_small(size, share):
    zeros = blockwise(256, 512, size, size, share) if size else torch.rand(256, 512) < share
    mask = Mask.of(drawn(256, 512) * ~zeros)
    n, bf16 = zeros.numel(), 2 * zeros.numel()
    assert torch.equal(mask.free(), ~zeros)
    assert mask.nbytes == mask.data.untyped_storage().nbytes() <= bf16 / 16
    if size is None:
        assert mask.nbytes == n / 8
    elif size >= 16:
        assert mask.nbytes == 4 * int(zeros.sum()) / size**2 <= bf16 / 128


def test_masks_of_a_model_are_small():
    for kind, least in (("blocks", 1 / 64), ("2:4", 1 / 16), ("unstructured", 1 / 16)):
        model = pruned("llama", kind)
        masks, n = masks_of(model), sum(weight.numel() for weight in prunable_weights(model).values())
        assert len(masks) == 21 and sum(mask.nbytes for mask in masks.values()) <= 2 * n * least


# ----------------------------------------------------------------------------------------------------------- of a model


def pruned(case="llama", kind="blocks", dtype=torch.float32, **changes):
    model = random_lm(case, dtype, **changes)
    with torch.no_grad():
        for i, linear in enumerate(linear for block in blocks_of(model) for linear in block.projections):
            linear.weight[zeros_of(kind, *linear.weight.shape, seed=i)] = 0
    return model


def zero_places(model):
    return {name: weight.detach() == 0 for name, weight in prunable_weights(model).items()}


def same_zeros(one, other):
    return one.keys() == other.keys() and all(torch.equal(one[name], other[name]) for name in one)


@pytest.mark.parametrize("case", FAMILIES)
def test_the_weights_that_pruning_is_about(case):
    model = pruned(case)
    found = prunable_weights(model)
    parts = ("q_proj", "k_proj", "v_proj", "o_proj", "out_proj", "gate_proj", "up_proj", "down_proj", "fc1", "fc2")
    wanted = {name for name, p in model.named_parameters() if name.endswith(tuple(f"{part}.weight" for part in parts))}
    assert set(found) == wanted and len(wanted) == (18 if "opt" in case else 21)
    assert all(found[name] is model.get_parameter(name) for name in found)
    zeros = sum(int((weight == 0).sum()) for weight in found.values())
    assert check_sparsity(model) == pytest.approx(zeros / sum(w.numel() for w in found.values()), abs=1e-12)
    for name, share in layer_sparsity(model).items():
        assert share == pytest.approx(np.mean(model.get_parameter(name).detach().numpy() == 0), abs=1e-12)


def test_a_model_of_an_unknown_family():
    settings = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4, "intermediate_size": 48, "vocab_size": 50}
    model = transformers.GPTNeoXForCausalLM(transformers.GPTNeoXConfig(**settings))
    assert len(prunable_weights(model)) == 8 and not any("embed" in name for name in prunable_weights(model))
    plain = torch.nn.Sequential(torch.nn.Linear(8, 8), torch.nn.LayerNorm(8), torch.nn.Linear(8, 4))
    with torch.no_grad():
        plain[2].weight[:2] = 0
    assert set(prunable_weights(plain)) == {"0.weight", "2.weight"} and check_sparsity(plain) == pytest.approx(16 / 96)
    assert check_sparsity(torch.nn.LayerNorm(8)) == 0 and layer_sparsity(torch.nn.LayerNorm(8)) == {}


def test_only_weights_with_zeros_have_masks():
    for shape in ({}, {"intermediate_size": 45}):  # which no block divides
        assert masks_of(random_lm("llama", **shape)) == {}
        model = random_lm("llama", **shape)
        with torch.no_grad():
            blocks_of(model)[1].ffn.out.weight[0, 0] = 0
        assert list(masks_of(model)) == ["model.layers.1.mlp.down_proj.weight"]


def test_lost_zeros():
    model = pruned("llama", "unstructured")
    masks, weight = masks_of(model), blocks_of(model)[1].ffn.out.weight
    assert lost_zeros(model, masks) == 0
    with torch.no_grad():
        weight[tuple((weight != 0).nonzero()[:7].T)] = 0  # more zeros are no loss
        assert lost_zeros(model, masks) == 0
        places = (~masks["model.layers.1.mlp.down_proj.weight"].free()).nonzero()
        weight[tuple(places[:5].T)] = 0.1
    assert lost_zeros(model, masks) == 5


def test_names_without_wrappers():
    for wrapped in ("module.a.b.weight", "_orig_mod.a.b.weight", "module._orig_mod.a.b.weight",
                    "a._checkpoint_wrapped_module.b.weight", "_fsdp_wrapped_module.a._fsdp_wrapped_module.b.weight",
                    "_orig_mod.module.a._orig_mod.b.weight"):  # fmt: skip
        assert plain_name(wrapped) == "a.b.weight", wrapped
    for kept in ("a.b.weight", "a.modules.b", "my_module.b", "a.module_list.0"):
        assert plain_name(kept) == kept


@pytest.mark.parametrize("kind", ["blocks", "unstructured"])
@pytest.mark.parametrize("n", [1, 2, 3, 7, 9])
def test_masks_of_shards(n, kind):
    """Every process's rows as FSDP2 cuts them, also where that is in the midst of blocks, and where none are left."""
    weight = drawn(40, 24) * ~zeros_of(kind, 40, 24)
    mask, found = Mask.of(weight), []
    for rank in range(n):
        dist.init_process_group("fake", store=FakeStore(), rank=rank, world_size=n)
        try:
            mesh = dist.init_device_mesh("cpu", (n,))
            shard = distribute_tensor(weight, mesh, [Shard(0)], src_data_rank=None)
            part = local_mask(mask, shard)
            assert part.shape == tuple(shard.to_local().shape) and torch.equal(part.free(), shard.to_local() != 0)
            assert torch.equal(part.zero_(torch.ones(part.shape)), (shard.to_local() != 0).float())
            found.append(part.free())
            whole = local_mask(mask, distribute_tensor(weight, mesh, [Replicate()], src_data_rank=None))
            assert torch.equal(whole.free(), mask.free())
            with pytest.raises(NotImplementedError, match="masks know whole rows only"):
                local_mask(mask, distribute_tensor(weight, mesh, [Shard(1)], src_data_rank=None))
        finally:
            dist.destroy_process_group()
    assert torch.equal(torch.cat(found), mask.free()) and len(found[-1]) == max(0, 40 - (n - 1) * math.ceil(40 / n))


def test_a_mask_of_another_weight_is_refused(tmp_path):
    weight = torch.nn.Parameter(drawn(16, 32))
    with pytest.raises(ValueError, match=r"a mask of \(32, 16\) for a weight of \(16, 32\)"):
        local_mask(Mask.of(drawn(32, 16)), weight)
    trainer = trainer_of(pruned(), tmp_path, masks={"model.layers.9.weight": Mask.of(weight)})
    with pytest.raises(ValueError, match=r"that the model does not have: model.layers.9.weight"):
        trainer.train()


# --------------------------------------------------------------------------------------------------------------- training

LENGTH, VOCABULARY = 12, 50


class Recorded(torch.utils.data.Dataset):
    """Windows of random tokens; `order` says which ones the training took, one after the other."""

    def __init__(self, n=24, seed=0):
        generator = torch.Generator().manual_seed(seed)
        self.ids = torch.randint(3, VOCABULARY, (n, LENGTH), generator=generator)
        self.order = []

    def __len__(self):
        return len(self.ids)

    def __getitem__(self, i):
        self.order.append(i)
        return {"input_ids": self.ids[i], "labels": self.ids[i]}


class History(TrainerCallback):
    def __init__(self):
        self.logs = []

    def on_log(self, args, state, control, logs=None, **kwargs):
        self.logs.append(dict(logs))

    def of(self, key):
        return [found[key] for found in self.logs if key in found]


def arguments(folder, **more):
    settings = {"max_steps": 4, "per_device_train_batch_size": 2, "learning_rate": 0.01, "lr_scheduler_type": "constant",
                "logging_steps": 1, "save_strategy": "no", "optim": "adamw_torch"}  # fmt: skip
    return TrainingArguments(output_dir=str(folder), use_cpu=True, report_to="none", disable_tqdm=True,
                             dataloader_pin_memory=False, remove_unused_columns=False, **settings | more)  # fmt: skip


def trainer_of(model, folder, kind=SparseTrainer, callbacks=(), more=None, **settings):
    history = History()
    trainer = kind(model=model, args=arguments(folder, **more or {}), train_dataset=Recorded(), eval_dataset=Recorded(6, 1),
                   callbacks=[history, *callbacks], **settings)  # fmt: skip
    trainer.remove_callback(transformers.PrinterCallback)
    trainer.history = history
    return trainer


class Restless(torch.optim.AdamW):
    """Moves every weight whatever its gradient, and is an AdamW by its class."""

    @torch.no_grad()
    def step(self, closure=None):
        super().step(closure)
        for group in self.param_groups:
            for parameter in group["params"]:
                parameter.add_(torch.randn(parameter.shape).to(parameter), alpha=group["lr"])


def with_history(make):
    """An optimizer that stepped on the dense model: momentum of weights that were pruned since."""

    def optimizer_of(model):
        dense = {name: p.detach().clone() for name, p in model.named_parameters()}
        optimizer = make(model.parameters())
        with torch.no_grad():
            for parameter in model.parameters():
                parameter.grad = drawn(*parameter.shape).to(parameter)
        optimizer.step()
        optimizer.zero_grad()
        with torch.no_grad():
            for name, p in model.named_parameters():
                p.copy_(dense[name])
        return optimizer

    return optimizer_of


OPTIMIZERS = {
    "adamw": None,
    "adamw with history": with_history(lambda p: torch.optim.AdamW(p, lr=0.01, weight_decay=0.1)),
    "sgd with history": with_history(lambda p: torch.optim.SGD(p, lr=0.01, momentum=0.9, nesterov=True, weight_decay=0.1)),
    "restless": lambda model: Restless(model.parameters(), lr=0.01),
    "rmsprop with history": with_history(lambda p: torch.optim.RMSprop(p, lr=0.001, momentum=0.9)),  # not in KEEPS_ZEROS
    "adafactor": None,
}
HOW = {  # families by optimizers and by how they are trained, all pairs that could differ
    "plain": {},
    "accumulated, decayed": {"gradient_accumulation_steps": 2, "weight_decay": 0.1},
    "checkpointed": {"gradient_accumulation_steps": 2, "activation_checkpointing": True},
    "autocast": {"bf16": True},
}
TRAINED = [(family, kind, optimizer, how, torch.float32)
           for i, family in enumerate(FAMILIES)
           for kind, optimizer, how in (
               (KINDS[i % 3], "adamw", "accumulated, decayed"), (KINDS[(i + 1) % 3], "restless", "checkpointed"),
               (KINDS[(i + 2) % 3], "sgd with history", "plain"))]  # fmt: skip
TRAINED += [("llama", "blocks", optimizer, how, dtype) for optimizer, how, dtype in (
    ("adamw", "plain", torch.bfloat16), ("restless", "accumulated, decayed", torch.bfloat16),
    ("adamw with history", "checkpointed", torch.bfloat16), ("adamw with history", "autocast", torch.float32),
    ("rmsprop with history", "plain", torch.float32), ("adafactor", "autocast", torch.float32),
    ("adafactor", "accumulated, decayed", torch.bfloat16))]  # fmt: skip


def trained(model, folder, optimizer="adamw", how="plain", kind=SparseTrainer, **settings):
    torch.manual_seed(0)
    more = HOW[how] | ({"optim": "adafactor"} if optimizer == "adafactor" else {}) | {"max_steps": 3}
    if OPTIMIZERS[optimizer] is not None:
        settings["optimizers"] = (OPTIMIZERS[optimizer](model), None)
    trainer = trainer_of(model, folder, kind, more=more, **settings)
    trainer.train()
    return trainer


@pytest.mark.parametrize(("family", "kind", "optimizer", "how", "dtype"), TRAINED,
                         ids=lambda value: str(value).removeprefix("torch.").replace(" ", "_"))  # fmt: skip
def test_zeros_stay_and_all_else_learns(family, kind, optimizer, how, dtype, tmp_path):
    model = pruned(family, kind, dtype)
    before, places = {name: p.detach().clone() for name, p in model.named_parameters()}, zero_places(model)
    trainer = trained(model, tmp_path, optimizer, how)
    assert trainer.state.global_step == 3 and len(trainer.history.of("loss")) == 3
    for name, parameter in model.named_parameters():
        assert parameter.isfinite().all()
        if "opt" in family and name.endswith("k_proj.bias"):
            continue  # softmax does not see it
        moved = parameter.detach() != before[name]
        if name in places:
            assert not parameter[places[name]].any(), name  # what was zero is
            moved = moved[~places[name]]
        # of embeddings only the rows that were seen move; bf16 hides small steps
        assert moved.float().mean() > (0.5 if dtype == torch.float32 and "embed" not in name else 0.1), name


@pytest.mark.parametrize("optimizer", ["adamw", "adamw with history", "sgd with history", "restless", "adafactor"])
def test_a_plain_trainer_loses_them(optimizer, tmp_path):
    """So that the test above can fail."""
    model = pruned("llama")
    places = zero_places(model)
    trained(model, tmp_path, optimizer, kind=Trainer)
    for name, weight in prunable_weights(model).items():
        assert weight[places[name]].count_nonzero() > 0.5 * places[name].sum(), name


@pytest.mark.parametrize("backend", ["aot_eager", "inductor"])
def test_compiled(backend, tmp_path):
    if backend == "inductor" and not any(map(shutil.which, ("c++", "g++", "clang++"))):
        pytest.skip("no C++ compiler")
    losses = {}
    for compiled in (False, True):
        model = pruned("llama", num_hidden_layers=1)
        places, before = zero_places(model), copy.deepcopy(model.state_dict())
        how = {"torch_compile": compiled, "torch_compile_backend": backend} if compiled else {}
        trainer = trainer_of(model, tmp_path, more={"max_steps": 2} | how)
        trainer.train()
        assert same_zeros(zero_places(model), places)
        assert all((model.state_dict()[name] != before[name]).any() for name in before)
        losses[compiled] = trainer.history.of("loss")
    torch.compiler.reset()
    assert losses[True] == pytest.approx(losses[False], rel=1e-4)


class ZeroAfterOne(TrainerCallback):
    """A weight becomes zero in training: the first one that is free."""

    def __init__(self, weight, place):
        self.weight, self.place, self.seen = weight, place, []

    def on_step_end(self, args, state, control, **kwargs):
        self.seen.append(self.weight[self.place].item())
        if state.global_step == 1:
            with torch.no_grad():
                self.weight[self.place] = 0


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("optimizer", ["adamw", "restless"])
def test_what_becomes_zero_later_is_not_frozen(kind, optimizer, tmp_path):
    model = pruned("llama", kind)
    weight = blocks_of(model)[0].ffn.out.weight
    place = tuple((weight != 0).nonzero()[0].tolist())
    watch = ZeroAfterOne(weight, place)
    trained(model, tmp_path, optimizer, callbacks=[watch])
    assert len(watch.seen) == 3 and watch.seen[1] != 0 != watch.seen[2] != watch.seen[1]


def test_masks_are_taken_once(tmp_path, monkeypatch):
    counts, of, where = Counter(), Mask.of.__func__, []

    def counted(cls, *args):
        counts["of"] += 1
        return of(cls, *args)

    zero_ = Mask.zero_
    monkeypatch.setattr(Mask, "of", classmethod(counted))
    monkeypatch.setattr(Mask, "zero_", lambda mask, values: (where.append(values.data_ptr()), zero_(mask, values))[1])
    model = pruned("llama")
    trainer = trainer_of(model, tmp_path, more={"max_steps": 5, "gradient_accumulation_steps": 2})
    assert counts["of"] == 21 == len(trainer.masks)
    trainer.train()
    assert counts["of"] == 21 and len(where) == 5 * 21  # once a step, not once a forward; and no weight
    assert not {weight.data_ptr() for weight in prunable_weights(model).values()} & set(where)


def test_given_masks_are_those_that_count(tmp_path):
    model = pruned("llama", "unstructured")
    masks = masks_of(pruned("llama", "blocks"))
    with torch.no_grad():
        for name, weight in prunable_weights(model).items():
            weight[weight == 0] = 0.1
            masks[name].zero_(weight)
    trainer_of(model, tmp_path, masks=masks).train()
    assert same_zeros(zero_places(model), {name: ~mask.free() for name, mask in masks.items()})


# ---------------------------------------------------------------------------------------------------------- by hand


def windows_of(trainer, step, size):
    """The windows of one optimizer step, in the order in which they were taken: (size, LENGTH)."""
    data = trainer.train_dataset
    return data.ids[data.order[step * size : (step + 1) * size]]


def loss_of(model, ids):
    """Mean over all predicted tokens."""
    logits = model(input_ids=ids, use_cache=False).logits[:, :-1].float()
    return functional.cross_entropy(logits.flatten(0, 1), ids[:, 1:].flatten())


def mask_gradients_(model, places):
    for name, place in places.items():
        model.get_parameter(name).grad[place] = 0


def norm_of(model):
    return math.sqrt(sum(float(p.grad.double().square().sum()) for p in model.parameters()))


@pytest.mark.parametrize("accumulated", [1, 3])
def test_the_gradient_norm_is_of_free_weights(accumulated, tmp_path):
    model = pruned("qwen2", "unstructured")
    start, places = copy.deepcopy(model), zero_places(model)
    trainer = trainer_of(model, tmp_path, more={"max_steps": 1, "gradient_accumulation_steps": accumulated})
    trainer.train()
    loss = loss_of(start, windows_of(trainer, 0, 2 * accumulated))
    loss.backward()
    with_masked = norm_of(start)
    mask_gradients_(start, places)
    assert trainer.history.of("loss") == [pytest.approx(loss.item(), rel=1e-5)]
    assert trainer.history.of("grad_norm") == [pytest.approx(norm_of(start), rel=1e-5)]
    assert with_masked > 1.05 * norm_of(start)


@pytest.mark.parametrize(("case", "kind"), [("llama", "blocks"), ("opt", "unstructured"), ("qwen3", "2:4")])
def test_a_loop_by_hand_ends_with_the_same_weights(case, kind, tmp_path):
    """AdamW of torch, gradients masked before they are clipped, weights masked after every step."""
    steps, warmup, rate, decay = 8, 2, 0.005, 0.1
    model = pruned(case, kind, **({"dropout": 0.0} if case == "opt" else {}))
    by_hand, places = copy.deepcopy(model), zero_places(model)
    trainer = trainer_of(model, tmp_path, more={
        "max_steps": steps, "gradient_accumulation_steps": 2, "learning_rate": rate, "weight_decay": decay,
        "lr_scheduler_type": "linear", "warmup_steps": warmup, "max_grad_norm": 0.5})  # fmt: skip
    trainer.train()
    assert min(trainer.history.of("grad_norm")) > 0.5  # it is clipped

    by_hand.train()
    matrices = [p for p in by_hand.parameters() if p.ndim > 1]
    others = [p for p in by_hand.parameters() if p.ndim < 2]
    groups = [{"params": matrices, "weight_decay": decay}, {"params": others, "weight_decay": 0.0}]
    optimizer, losses = torch.optim.AdamW(groups, lr=rate), []
    for step in range(steps):
        for group in optimizer.param_groups:
            group["lr"] = rate * min(step / warmup, (steps - step) / (steps - warmup))
        optimizer.zero_grad()
        micro = windows_of(trainer, step, 4).split(2)
        parts = [loss_of(by_hand, ids) / len(micro) for ids in micro]
        sum(parts).backward()
        losses.append(float(sum(parts).detach()))
        mask_gradients_(by_hand, places)
        torch.nn.utils.clip_grad_norm_(by_hand.parameters(), 0.5)
        optimizer.step()
        with torch.no_grad():
            for name, place in places.items():
                by_hand.get_parameter(name)[place] = 0
    assert trainer.history.of("loss") == pytest.approx(losses, rel=1e-5)
    assert same_zeros(zero_places(model), zero_places(by_hand)) and same_zeros(zero_places(model), places)
    for name, parameter in by_hand.named_parameters():
        if not (case == "opt" and name.endswith("k_proj.bias")):  # softmax does not see it: only rounding gives it a gradient
            torch.testing.assert_close(model.get_parameter(name), parameter, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize(("accumulated", "scaled_by_the_model"), [(1, True), (2, True), (3, True), (3, False)])
def test_distillation_by_hand(accumulated, scaled_by_the_model, tmp_path):
    share, temperature = 0.3, 2.0
    model, teacher = pruned("llama"), random_lm("llama").eval()
    with torch.no_grad():
        for parameter in teacher.parameters():
            parameter.add_(torch.randn_like(parameter) * 0.05)
    start, places = copy.deepcopy(model), zero_places(model)
    trainer = trainer_of(model, tmp_path, teacher=teacher.requires_grad_(False), distill_weight=share, temperature=temperature,
                         more={"max_steps": 1, "gradient_accumulation_steps": accumulated})  # fmt: skip
    trainer.model_accepts_loss_kwargs &= scaled_by_the_model
    trainer.train()
    assert trainer.model_accepts_loss_kwargs == scaled_by_the_model
    ids = windows_of(trainer, 0, 2 * accumulated)
    ours, theirs = (functional.softmax(lm(input_ids=ids).logits[:, :-1].double() / temperature, -1) for lm in (start, teacher))
    divergence = (theirs * (theirs.log() - ours.log())).sum(-1).mean()  # of all tokens that are predicted from
    wanted = (1 - share) * loss_of(start, ids) + share * temperature**2 * divergence
    wanted.backward()
    mask_gradients_(start, places)
    assert divergence.item() > 0.05
    assert trainer.history.of("loss") == [pytest.approx(wanted.item(), rel=1e-5)]
    assert trainer.history.of("grad_norm") == [pytest.approx(norm_of(start), rel=1e-4)]
    assert same_zeros(zero_places(model), places)


def test_a_teacher_is_not_asked_in_evaluation(tmp_path):
    model = pruned("llama")
    trainer = trainer_of(model, tmp_path, teacher=lambda **_: pytest.fail("asked"))
    found, ids = trainer.evaluate(), trainer.eval_dataset.ids
    with torch.no_grad():
        loss = float(loss_of(model, ids))
    assert found["eval_loss"] == pytest.approx(loss, rel=1e-5)
    assert found["eval_perplexity"] == pytest.approx(math.exp(loss), rel=1e-5)
    assert found["eval_sparsity"] == check_sparsity(model) > 0.3


# ------------------------------------------------------------------------------------------------------------ checkpoints

SAVING = {"max_steps": 6, "save_strategy": "steps", "save_steps": 2}


@pytest.mark.parametrize("optimizer", ["adamw", "restless"])
def test_resumed_from_a_whole_checkpoint(optimizer, tmp_path, monkeypatch):
    def made(folder):
        torch.manual_seed(0)
        model = pruned("llama", "unstructured")
        chosen = OPTIMIZERS[optimizer]
        settings = {} if chosen is None else {"optimizers": (chosen(model), None)}
        return model, trainer_of(model, folder, more=SAVING, **settings)

    alone, trainer = made(tmp_path / "alone")
    trainer.train()
    names = {path.name for path in (tmp_path / "alone" / "checkpoint-4").iterdir()}
    assert names >= {"model.safetensors", "optimizer.pt", "scheduler.pt", "rng_state.pth", "trainer_state.json", WHOLE}
    assert not names & {"training_args.bin", "tokenizer.json", "tokenizer_config.json"}
    assert last_checkpoint(tmp_path / "alone").name == "checkpoint-6"

    model, trainer = made(tmp_path / "killed")
    save, calls = trainer._save_optimizer_and_scheduler, []

    def dies(*args, **kwargs):
        save(*args, **kwargs)
        calls.append(None)
        if len(calls) == 2:
            raise KeyboardInterrupt

    monkeypatch.setattr(trainer, "_save_optimizer_and_scheduler", dies)
    with pytest.raises(KeyboardInterrupt):
        trainer.train()
    broken = tmp_path / "killed" / "checkpoint-4"
    assert (broken / "model.safetensors").exists() and not (broken / WHOLE).exists()
    last = last_checkpoint(tmp_path / "killed", drop=shutil.rmtree)
    assert last.name == "checkpoint-2" and not broken.exists()
    model, trainer = made(tmp_path / "killed")
    trainer.train(resume_from_checkpoint=str(last))
    assert all(torch.equal(p, alone.get_parameter(name)) for name, p in model.named_parameters())
    assert same_zeros(zero_places(model), zero_places(pruned("llama", "unstructured")))


def test_a_checkpoint_that_is_written_again_is_not_whole_meanwhile(tmp_path, monkeypatch):
    trainer = trainer_of(pruned(), tmp_path, more=SAVING)
    (tmp_path / "checkpoint-2").mkdir()
    (tmp_path / "checkpoint-2" / WHOLE).touch()

    def fails(*_):
        assert not (tmp_path / "checkpoint-2" / WHOLE).exists()
        raise OSError("no space left")

    monkeypatch.setattr(Trainer, "_save_checkpoint", fails)
    with pytest.raises(OSError, match="no space"):
        trainer.train()
    assert last_checkpoint(tmp_path) is None


def test_the_last_checkpoint(tmp_path):
    assert last_checkpoint(tmp_path / "nowhere") is None and last_checkpoint(tmp_path) is None
    for name in ("checkpoint-9", "checkpoint-10", "checkpoint-100", "checkpoint-x", "other-200"):
        (tmp_path / name).mkdir()
    for name in ("checkpoint-9", "checkpoint-10", "checkpoint-x", "other-200"):
        (tmp_path / name / WHOLE).touch()
    dropped = []
    assert last_checkpoint(tmp_path).name == "checkpoint-10"  # nothing is dropped unless that is asked for
    assert last_checkpoint(tmp_path, drop=dropped.append).name == "checkpoint-10"
    assert {path.name for path in dropped} == {"checkpoint-100", "checkpoint-x"}


def test_the_whole_state_by_plain_names(tmp_path):
    model = pruned()
    trainer = trainer_of(model, tmp_path, more={"max_steps": 1})
    trainer.train()
    state = trainer.full_state()
    assert state.keys() == model.state_dict().keys()
    assert all(torch.equal(value, model.state_dict()[name]) and value.device.type == "cpu" for name, value in state.items())


def test_optimizers_that_are_trusted_keep_zeros():
    """What KEEPS_ZEROS says: with state and gradient zero, a weight of zero stays, decay or not."""
    for kind in sparse_trainer.KEEPS_ZEROS:
        for more in ({}, {"momentum": 0.9, "nesterov": True} if kind is torch.optim.SGD else {"amsgrad": True}):
            weight = torch.nn.Parameter(drawn(8, 8) * ~blockwise(8, 8, 4, 4, 0.5))
            places = weight.detach() == 0
            optimizer = kind([weight], lr=0.1, weight_decay=0.1, **more)
            for step in range(3):
                weight.grad = drawn(8, 8, seed=step) * ~places
                optimizer.step()
            assert torch.equal(weight.detach() == 0, places) and 0 < places.sum() < 64
