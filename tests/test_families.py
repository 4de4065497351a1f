"""Every family: shrunk equals masked, the saved model loads in a process that cannot see this repository."""

import copy
import json
import subprocess
import sys

import pytest
import torch
import transformers

from common.blocks import FAMILIES, blocks_of, group_costs, total_cost
from common.checkpoint import load_model, save_model
from common.pruning import keep_all, shrink_, sparsity_of, zero_groups_

SMALL = {"hidden_size": 32, "num_hidden_layers": 3, "num_attention_heads": 4, "intermediate_size": 48, "vocab_size": 50}
GQA = SMALL | {"num_key_value_heads": 2, "head_dim": 16, "pad_token_id": 0}
OPT = {"hidden_size": 32, "num_hidden_layers": 3, "num_attention_heads": 4, "ffn_dim": 48, "vocab_size": 50,
       "max_position_embeddings": 32, "word_embed_proj_dim": 32}  # fmt: skip
FAMILY_CASES = {
    "bert": ("Bert", "SequenceClassification", SMALL),
    "roberta": ("Roberta", "SequenceClassification", SMALL | {"max_position_embeddings": 40}),
    "xlm-roberta": ("XLMRoberta", "SequenceClassification", SMALL | {"max_position_embeddings": 40}),
    "distilbert": ("DistilBert", "SequenceClassification",
                   {"dim": 32, "n_layers": 3, "n_heads": 4, "hidden_dim": 48, "vocab_size": 50}),
    "opt": ("OPT", "CausalLM", OPT),
    "opt-350m": ("OPT", "CausalLM", OPT | {"do_layer_norm_before": False, "word_embed_proj_dim": 16}),
    "llama": ("Llama", "CausalLM", GQA),
    "mistral": ("Mistral", "CausalLM", GQA | {"sliding_window": 4}),
    "qwen2": ("Qwen2", "CausalLM", SMALL | {"num_key_value_heads": 2, "tie_word_embeddings": True}),
    "qwen3": ("Qwen3", "CausalLM", GQA),
}  # fmt: skip


def test_every_family_has_a_case():
    assert {name.split("-350m")[0] for name in FAMILY_CASES} == set(FAMILIES)


def random_model(family):
    prefix, head, settings = FAMILY_CASES[family]
    torch.manual_seed(0)
    config = getattr(transformers, f"{prefix}Config")(**settings)
    model = getattr(transformers, f"{prefix}For{head}")(config).eval()
    with torch.no_grad():
        for name, parameter in model.named_parameters():  # biases and norms of a fresh model are trivial: make them count
            if parameter.ndim < 2:
                parameter.add_(torch.randn_like(parameter) * 0.1)
            elif "embed" not in name:
                parameter.mul_(4)
    return model, getattr(transformers, f"AutoModelFor{head}")


def batch():
    ids = torch.randint(3, 50, (3, 9), generator=torch.Generator().manual_seed(1))
    mask = torch.ones_like(ids)
    mask[0, 6:] = 0
    return {"input_ids": ids, "attention_mask": mask}


def real_logits(model):
    """Logits at positions that are not padding (what stands at the others is nobody's business)."""
    inputs = batch()
    with torch.no_grad():
        logits = model(**inputs).logits
    return logits[inputs["attention_mask"].bool()] if logits.ndim == 3 else logits


def uneven_keep(blocks):
    keep = keep_all(blocks)
    for i in range(len(blocks)):
        keep["heads"][i][: 1 if i < 2 else 0] = False  # the last layer keeps all
        keep["neurons"][i][5 * i : 20 + i] = False
    return keep


class Tokenizer:
    def save_pretrained(self, path):
        (path / "tokenizer_config.json").write_text("{}")


BARE = """
import json, sys, torch, transformers
sys.path[:] = [p for p in sys.path if p]
try:
    import common
    sys.exit("the repository is visible")
except ImportError:
    pass
directory, head, plain = sys.argv[1:]
model = getattr(transformers, "AutoModelFor" + head).from_pretrained(directory, trust_remote_code=plain == "uneven").eval()
inputs = torch.load(directory + "/inputs.pt", weights_only=True)
with torch.no_grad():
    torch.save(model(**inputs).logits, directory + "/logits.pt")
model.save_pretrained(directory + "/again")
"""


@pytest.mark.parametrize("family", FAMILY_CASES)
def test_shrunk_equals_masked_and_reloads(family, tmp_path):
    model, auto_class = random_model(family)
    dense = real_logits(model)
    blocks = blocks_of(model)
    keep = uneven_keep(blocks)
    before = sum(p.numel() for b in blocks for linear in b.projections for p in linear.parameters())
    sparsity = sparsity_of(keep, group_costs(blocks), total_cost(blocks))

    zero_groups_(blocks, keep)
    masked = real_logits(model)
    assert (masked - dense).abs().max() > 1e-2  # the groups mattered

    shapes = shrink_(model, keep)
    assert [shape["neurons"] for shape in shapes] == [int(kept.sum()) for kept in keep["neurons"]]
    assert [shape["kv_heads"] for shape in shapes] == [int(kept.sum()) for kept in keep["heads"]]
    after = sum(p.numel() for b in blocks_of(model) for linear in b.projections for p in linear.parameters())
    assert 1 - after / before == pytest.approx(sparsity, abs=1e-12)
    torch.testing.assert_close(real_logits(model), masked, rtol=1e-4, atol=1e-4)

    saved = tmp_path / "model"
    save_model(saved, model, Tokenizer(), {"script": "test"})
    assert json.loads((saved / "compression.json").read_text())["stages"] == [{"script": "test"}]
    config = json.loads((saved / "config.json").read_text())
    assert config["architectures"] == [type(model).__name__] and "auto_map" in config
    full = batch()
    with torch.no_grad():
        logits = model(**full).logits
        assert torch.equal(load_model(saved, auto_class).eval()(**full).logits, logits)
    in_a_bare_process(saved, auto_class, full, logits, "uneven")
    # saved again by a process that only has stock transformers, it still loads
    assert torch.equal(load_model(saved / "again", auto_class).eval()(**full).logits, logits)


def in_a_bare_process(saved, auto_class, inputs, logits, shape):
    torch.save(inputs, saved / "inputs.pt")
    (saved.parent / "bare.py").write_text(BARE)
    command = [sys.executable, "-I", saved.parent / "bare.py", saved, auto_class.__name__.removeprefix("AutoModelFor"), shape]
    subprocess.run(command, check=True, cwd=saved.parent, timeout=120, capture_output=True)
    assert torch.equal(torch.load(saved / "logits.pt", weights_only=True), logits)


@pytest.mark.parametrize("family", ["bert", "distilbert", "opt-350m", "llama", "qwen2"])
def test_even_shapes_load_plainly(family, tmp_path):
    model, auto_class = random_model(family)
    keep = keep_all(blocks_of(model))
    for i in range(3):
        keep["neurons"][i][i : i + 10] = False
        if family == "llama":
            keep["heads"][i][i % 2] = False
    shrink_(model, keep)
    save_model(tmp_path / "model", model, Tokenizer())
    assert not (tmp_path / "model" / "modeling_pruned.py").exists()
    with torch.no_grad():
        logits = model(**batch()).logits
    in_a_bare_process(tmp_path / "model", auto_class, batch(), logits, "plain")


def test_uneven_llama_generates_like_the_masked_one():
    model, _ = random_model("llama")
    masked, _ = random_model("llama")
    keep = uneven_keep(blocks_of(model))
    zero_groups_(blocks_of(masked), keep)
    shrink_(model, keep)
    inputs = {"input_ids": batch()["input_ids"][:, :4], "attention_mask": torch.tensor([[0, 1, 1, 1], [1] * 4, [1] * 4])}
    settings = {"max_new_tokens": 12, "do_sample": False, "pad_token_id": 0, "eos_token_id": None}
    assert torch.equal(model.generate(**inputs, **settings), masked.generate(**inputs, **settings))


@pytest.mark.parametrize("family", ["bert", "llama", "opt"])
def test_zeroed_groups_stay_zero_and_the_cut_model_trains_alike(family):
    """AdamW steps on a zeroed model leave its zeros exact; the cut model, with the cut moments, takes the same steps."""
    model, _ = random_model(family)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3, weight_decay=0.1)

    def step(model, optimizer):
        model(**batch()).logits.float().square().mean().backward()
        optimizer.step()
        optimizer.zero_grad()

    step(model, optimizer)  # moments exist, also of what goes
    keep = uneven_keep(blocks_of(model))
    zero_groups_(blocks_of(model), keep, optimizer)
    other, _ = random_model(family)
    other.load_state_dict(model.state_dict())
    second = torch.optim.AdamW(other.parameters(), lr=1e-3, weight_decay=0.1)
    second.load_state_dict(copy.deepcopy(optimizer.state_dict()))
    shrink_(other, keep, second)
    for _ in range(3):
        step(model, optimizer)
        step(other, second)
    blocks = blocks_of(model)
    assert not any(b.ffn.out.weight[:, ~kept].any() or any(linear.weight[~kept].any() for linear in b.ffn.ins)
                   for b, kept in zip(blocks, keep["neurons"], strict=True))  # fmt: skip
    for block, kept in zip(blocks, keep["heads"], strict=True):
        columns = kept.repeat_interleave(block.attention.o.in_features // len(kept))
        assert not block.attention.o.weight[:, ~columns].any() and not block.attention.q.weight[~columns].any()
    torch.testing.assert_close(real_logits(other), real_logits(model), rtol=1e-4, atol=1e-4)
