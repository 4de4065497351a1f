"""The memory estimate: parts by hand, what a backward keeps by counting it, the guide's figure for 7B."""

from contextlib import nullcontext

import pytest
import torch
import transformers
from transformers import AutoModelForCausalLM, LlamaConfig

from common import lora
from common.blocks import blocks_of
from common.memory_plan import GIB, advice, plan, rows
from tests.test_families import FAMILY_CASES

CHOSEN = {"method": "full", "precision": "32", "optim": "adamw", "batch_size": 2, "block_size": 8}
SMALL = {"vocab_size": 50, "hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 3, "num_attention_heads": 4}
PROJECTIONS = 4 * 16 * 16 + 3 * 16 * 24  # weights of one block's projections
BLOCK = PROJECTIONS + 2 * 16  # and its two norms
N = 2 * 50 * 16 + 3 * BLOCK + 16


def outline_of(**settings):
    with torch.device("meta"):
        return AutoModelForCausalLM.from_config(LlamaConfig(**settings))


@pytest.fixture(scope="module")
def small():
    return outline_of(**SMALL)


@pytest.fixture(scope="module")
def llama_7b():
    return outline_of(vocab_size=32000, hidden_size=4096, intermediate_size=11008, num_hidden_layers=32, num_attention_heads=32)


@pytest.fixture(scope="module")
def llama_8b():
    return outline_of(vocab_size=128256, hidden_size=4096, intermediate_size=14336, num_hidden_layers=32,
                      num_attention_heads=32, num_key_value_heads=8)  # fmt: skip


# ---------------------------------------------------------------------------------------------------------------- by hand


def test_parts_in_fp32_by_hand(small):
    assert sum(p.numel() for p in small.parameters()) == N
    assert plan(small, **CHOSEN) == {
        "weights": 4 * N,
        "gradients": 4 * N,
        "optimizer states": 8 * N,
        "masks": 3 * PROJECTIONS // 8,
        "activations, inputs of blocks": 3 * 16 * 16 * 4,
        "activations, inside of blocks": int(16 * 4 * (14.5 * 16 + 4 * 24)),
        "logits and loss": 16 * 50 * 16,
        "CUDA and libraries": GIB,
    }


def test_mixed_precision_keeps_copies_and_fp32_states(small):
    parts = plan(small, **CHOSEN | {"precision": "bf16-mixed"})
    assert (parts["weights"], parts["gradients"], parts["optimizer states"]) == (4 * N, 4 * N, 8 * N)
    assert parts["weights in half precision"] == 2 * (3 * PROJECTIONS + 50 * 16)
    assert parts["activations, inputs of blocks"] == 3 * 16 * 16 * 4  # the residual stream is fp32
    assert parts["activations, inside of blocks"] == 16 * 2 * (24 * 16 + 4 * 24)
    assert parts["logits and loss"] == 16 * 50 * 14
    assert parts == plan(small, **CHOSEN | {"precision": "16-mixed"})


def test_bf16_halves_weights_gradients_and_moments(small):
    parts = plan(small, **CHOSEN | {"precision": "bf16"})
    assert (parts["weights"], parts["gradients"], parts["optimizer states"]) == (2 * N, 2 * N, 4 * N)
    assert parts["activations, inputs of blocks"] == 3 * 16 * 16 * 2
    assert "weights in half precision" not in parts


@pytest.mark.parametrize(("optim", "expected"), [
    ("adamw", 8 * N),
    ("adamw_stochastic", 8 * N),
    ("adamw_8bit", 2 * N),
    ("adafactor", 4 * (2 * (50 + 16) + 3 * (4 * (16 + 16) + 3 * (16 + 24) + 2 * 16) + 16)),
    ("muon", 8 * N - 4 * PROJECTIONS * 3),
    ("sgd", None),
])  # fmt: skip
def test_optimizer_states_by_hand(small, optim, expected):
    assert plan(small, **CHOSEN | {"optim": optim}).get("optimizer states") == expected


def test_without_checkpointing_every_block_keeps_its_inside(small):
    less, more = plan(small, **CHOSEN), plan(small, **CHOSEN, checkpointing=False)
    assert more["activations, inside of blocks"] == 3 * less["activations, inside of blocks"]
    assert "activations, inputs of blocks" not in more


def test_ddp_holds_its_gradients_twice_and_fsdp_divides(small):
    alone, ddp, fsdp = (
        plan(small, **CHOSEN),
        plan(small, **CHOSEN, n_processes=4),
        plan(small, **CHOSEN, n_processes=4, fsdp=True),
    )
    assert ddp == alone | {"gradients in DDP's buckets": 4 * N}
    divided = ("weights", "gradients", "optimizer states", "masks")
    assert {name: fsdp[name] for name in divided} == {name: alone[name] // 4 for name in divided}
    assert fsdp["gathered by FSDP"] == 4 * (2 * BLOCK + 50 * 16)
    assert {name: fsdp[name] for name in alone if name not in divided} == {n: v for n, v in alone.items() if n not in divided}
    assert "weights in half precision" not in plan(small, **CHOSEN | {"precision": "bf16-mixed"}, n_processes=4, fsdp=True)


def test_lora_by_hand(small):
    parts = plan(small, **CHOSEN | {"method": "lora", "precision": "bf16"}, lora_r=2)
    adapters = 3 * 2 * (4 * (16 + 16) + 3 * (16 + 24))
    assert parts["weights"] == 2 * N
    assert (parts["adapters"], parts["gradients"], parts["optimizer states"]) == (4 * adapters, 4 * adapters, 8 * adapters)
    inputs = 4 * 16 + 2 * 16 + 24
    made = 3 * PROJECTIONS + 3 * 4 * 16 * 24  # a product and a byte of mask of each weight; of the largest three in fp32
    assert parts["activations, inside of blocks"] == 16 * 2 * int(18.5 * 16 + 4 * 24) + 16 * 3 * inputs + made
    assert "masks" not in parts
    assert plan(small, **CHOSEN | {"method": "lora"}, lora_r=2)["weights"] == 4 * N


def test_a_teacher_is_whole_on_every_device(small):
    teacher = outline_of(**SMALL | {"hidden_size": 32, "num_attention_heads": 8, "num_hidden_layers": 1})
    n_teacher = sum(p.numel() for p in teacher.parameters())
    with_teacher = plan(small, **CHOSEN | {"precision": "bf16"}, n_processes=4, fsdp=True, teacher=teacher)
    without = plan(small, **CHOSEN | {"precision": "bf16"}, n_processes=4, fsdp=True)
    assert with_teacher == without | {"teacher": 2 * n_teacher + 16 * 50 * 14}


def test_frozen_embeddings_have_no_gradients_and_no_states(small):
    chosen = {"method": "full", "precision": "bf16", "optim": "adamw", "batch_size": 1, "block_size": 16}
    whole, frozen = (plan(small, **chosen, freeze_embeddings=freeze) for freeze in (False, True))
    tables = {id(table.weight): table.weight.numel() for table in (small.get_input_embeddings(), small.get_output_embeddings())}
    saved = {"gradients": 2 * sum(tables.values()), "optimizer states": 4 * sum(tables.values())}
    assert {name: whole[name] - frozen[name] for name in whole if whole[name] != frozen[name]} == saved


def test_tied_embeddings_count_once():
    tied = plan(outline_of(**SMALL, tie_word_embeddings=True), **CHOSEN)
    assert tied["weights"] == 4 * (N - 50 * 16)


# ------------------------------------------------------------------------------------------------------------- by counting


def model_of(family: str, layers: int):
    prefix, head, _ = FAMILY_CASES[family]
    shape = {"hidden_size": 64, "num_hidden_layers": layers, "num_attention_heads": 4, "vocab_size": 50}
    shape |= {"ffn_dim": 160, "word_embed_proj_dim": 64, "dropout": 0.0} if family == "opt" else {"intermediate_size": 160}
    shape |= {"num_key_value_heads": 4, "head_dim": 16} if family == "qwen3" else {}
    config = getattr(transformers, f"{prefix}Config")(**shape, attn_implementation="sdpa")
    return getattr(transformers, f"{prefix}For{head}")(config).train()


def kept_by_forward(family: str, layers: int, precision: str, method: str) -> int:
    """Bytes that a real forward saves for its backward, without weights and autocast's copies of them."""
    model = model_of(family, layers)
    if precision == "bf16":
        model = model.bfloat16()
    n_weights = sum(linear.weight.numel() for block in blocks_of(model) for linear in block.projections)
    if method == "lora":
        model = lora.add_lora(model, 2, 16.0, 0.05, sparse=True)
    own = {parameter.untyped_storage().data_ptr() for parameter in model.parameters()}
    kept = {}

    def keep(tensor):
        storage = tensor.untyped_storage()
        kept[storage.data_ptr()] = (storage.nbytes(), tensor)  # held, so that no address is used twice
        return tensor

    mixed = torch.autocast("cpu", torch.bfloat16) if precision == "bf16-mixed" else nullcontext()
    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor), mixed:
        model.base_model(input_ids=torch.zeros(2, 64, dtype=torch.long))
    copies = 2 * n_weights if precision == "bf16-mixed" else 0
    return sum(size for address, (size, _) in kept.items() if address not in own) - copies


def planned_and_counted(family: str, precision: str, method: str) -> tuple[int, float]:
    """Bytes that a block keeps: by the plan, and what two blocks more make of it."""
    with torch.device("meta"):
        outline = model_of(family, 1)
    chosen = CHOSEN | {"precision": precision, "method": method, "block_size": 64}
    counted = [kept_by_forward(family, layers, precision, method) for layers in (1, 3)]
    return plan(outline, **chosen, checkpointing=False)["activations, inside of blocks"], (counted[1] - counted[0]) / 2


@pytest.mark.parametrize("precision", ["32", "bf16", "bf16-mixed"])
@pytest.mark.parametrize(("family", "most"), [("llama", 1.35), ("qwen3", 1.1), ("opt", 1.1)])
def test_what_a_block_keeps_is_counted(family, most, precision):
    """Never less than is kept, and of the families whose figures these are hardly more."""
    estimate, counted = planned_and_counted(family, precision, "full")
    assert 1 <= estimate / counted <= most


@pytest.mark.parametrize("precision", ["32", "bf16"])
def test_what_a_block_keeps_under_lora_is_counted(precision):
    """Without the buffers of the one adapter that is being made, which are gone when the next one is."""
    estimate, counted = planned_and_counted("llama", precision, "lora")
    assert 1 <= (estimate - 3 * 4 * 64 * 160) / counted <= 1.35


# -------------------------------------------------------------------------------------------------------- 7B, 8B, advice

GUIDE = {"method": "full", "precision": "bf16", "optim": "adamw", "batch_size": 1, "block_size": 1024}


def test_the_guides_figures_for_7b(llama_7b):
    """Weights 13 GB, gradients 13, AdamW 26, together 55 to 65; LoRA about 20."""
    parts = plan(llama_7b, **GUIDE)
    assert parts["weights"] == parts["gradients"] == 2 * 6_738_415_616
    assert parts["optimizer states"] == 4 * 6_738_415_616
    assert 53e9 < sum(parts.values()) < 66e9
    assert 15e9 < sum(plan(llama_7b, **GUIDE | {"method": "lora"}).values()) < 21e9


def test_8b_needs_more_than_7b_by_its_vocabulary(llama_7b, llama_8b):
    assert plan(llama_8b, **GUIDE)["weights"] == 2 * 8_030_261_248
    assert plan(llama_8b, **GUIDE)["logits and loss"] == 1024 * 128256 * 14
    assert sum(plan(llama_8b, **GUIDE).values()) > sum(plan(llama_7b, **GUIDE).values())


def test_four_gpus_of_24_gib_take_7b_by_fsdp_and_one_takes_lora(llama_7b):
    assert sum(plan(llama_7b, **GUIDE, n_processes=4, fsdp=True).values()) < 24 * GIB
    lines = advice(llama_7b, **GUIDE, gpu_bytes=24 * GIB)
    assert [line.split(",")[0] for line in lines] == ["would fit: FSDP over 4 GPUs (--fsdp)", "would fit: LoRA (--method lora)"]
    needed = sum(plan(llama_7b, **GUIDE, n_processes=4, fsdp=True).values())
    assert lines[0].endswith(f", {needed / GIB:.1f} GiB on each device")


def test_advice_holds_by_the_same_estimate(llama_7b):
    """The least of memory that is enough for a way is where its line appears."""
    ways = {
        "8-bit AdamW": {"optim": "adamw_8bit"},
        "LoRA": {"method": "lora"},
        "gradient checkpointing": {"checkpointing": True},
    }
    for name, changed in ways.items():
        needed = sum(plan(llama_7b, **GUIDE | {"checkpointing": False} | changed).values())
        for given, there in ((needed, True), (needed - 1, False)):
            lines = advice(llama_7b, **GUIDE, checkpointing=False, gpu_bytes=given)
            assert any(line.startswith(f"would fit: {name} (") for line in lines) == there


def test_advice_names_only_other_ways(llama_7b):
    """Not the optimizer and the method that are chosen, and no fewer processes than there are."""
    chosen = GUIDE | {"method": "lora", "n_processes": 4, "fsdp": True}
    lines = advice(llama_7b, **chosen, gpu_bytes=80 * GIB)
    assert [line.split(",")[0] for line in lines] == ["would fit: FSDP over 8 GPUs (--fsdp)"]
    lines = advice(llama_7b, **chosen | {"fsdp": False, "optim": "adamw_8bit"}, gpu_bytes=80 * GIB)
    assert [line.split(",")[0] for line in lines] == ["would fit: FSDP over 4 GPUs (--fsdp --optim adamw)"]


def test_advice_says_nothing_where_nothing_fits(llama_7b):
    assert advice(llama_7b, **GUIDE, gpu_bytes=GIB) == []
    over_64 = sum(plan(llama_7b, **GUIDE, n_processes=64, fsdp=True).values())
    assert advice(llama_7b, **GUIDE, gpu_bytes=over_64)[0].startswith("would fit: FSDP over 64 GPUs")
    assert advice(llama_7b, **GUIDE, gpu_bytes=over_64 - 1) == []


def test_rows_are_in_gib():
    parts = {"weights": 3 * GIB, "CUDA and libraries": GIB // 2}
    expected = [["memory of one device, estimated", "GiB"], ["weights", "3.00"], ["CUDA and libraries", "0.50"],
                ["together", "3.50"]]  # fmt: skip
    assert rows(parts) == expected
    assert rows(parts, 80 * GIB) == [*expected, ["there is", "80.00"]]
