"""What running a causal LM costs: the cache against one that a forward filled, speeds of models that take turns, decoding."""

import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM

from common import assets, generation, structured, text
from common.blocks import KINDS, blocks_of
from common.checkpoint import load_causal_lm, save_model
from common.data import load_tokenizer
from common.importance import l2_scores
from common.pruning import shrink_
from tests.test_streaming import one_thread  # noqa: F401


def llama(dtype=torch.float32):
    torch.manual_seed(0)
    shape = {"vocab_size": 120, "hidden_size": 32, "intermediate_size": 40, "num_hidden_layers": 3, "num_attention_heads": 4}
    return LlamaForCausalLM(LlamaConfig(**shape, num_key_value_heads=2, max_position_embeddings=64)).to(dtype).eval()


def uneven(dtype=torch.float32):
    model = llama(dtype)
    scores = l2_scores(blocks_of(model))
    scores["heads"] = [torch.tensor([0.0, 1e3]), torch.tensor([1e3, 1e3]), torch.tensor([1e3, 0.0])]
    shrink_(model, structured.choose(scores, blocks_of(model), 0.3, range(3), KINDS, "global", 0.1))
    return model


@pytest.mark.parametrize("made", [llama, uneven])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_cache_is_as_large_as_a_filled_one(made, dtype):
    model = made(dtype)
    cache = model(input_ids=torch.arange(7)[None], use_cache=True).past_key_values
    filled = sum(tensor.numel() * tensor.element_size() for layer in cache.layers for tensor in (layer.keys, layer.values))
    assert generation.cache_bytes_per_token(model) * 7 == filled
    assert generation.cache_bytes_per_token(model, 2) * 7 == filled * 2 // dtype.itemsize


def test_removed_kv_heads_leave_the_cache():
    assert generation.cache_bytes_per_token(uneven()) == generation.cache_bytes_per_token(llama()) * 4 // 6


def test_decoding_takes_one_token_a_forward_and_leaves_the_prompt():
    model, seen, lengths = llama(), [], []

    def note(module, args, kwargs):
        seen.append(tuple(kwargs["input_ids"].shape))
        lengths.append(kwargs["past_key_values"].get_seq_length() if kwargs.get("past_key_values") else 0)

    model.register_forward_pre_hook(note, with_kwargs=True)
    model.train()
    found = generation.speeds({"a": model}, 10, 3, seconds=0.0)["a"]
    assert found["prefill_ms"] > 0 and found["decode_tokens_per_second"] > 0 and model.training
    of_prompts = [length for shape, length in zip(seen, lengths, strict=True) if shape == (1, 10)]
    of_tokens = [length for shape, length in zip(seen, lengths, strict=True) if shape == (1, 1)]
    assert set(of_prompts) == {0} and len(of_prompts) >= 11 and set(seen) == {(1, 10), (1, 1)}
    assert of_tokens == [10, 11, 12] * (len(of_tokens) // 3) and len(of_tokens) >= 30


def test_smaller_models_are_measured_beside_the_dense_one(tmp_path):
    """On the tokens of a text that is prepared here, with a tokenizer that is at hand."""
    base = assets.resolve_model("tiny_llama", tmp_path / "data", "auto")
    tokenizer = load_tokenizer(base.path, load_causal_lm(base.path).config)
    directories = {}
    for name, made in (("dense", llama), ("pruned", uneven)):
        model = made()
        model.resize_token_embeddings(len(tokenizer))
        save_model(tmp_path / name, model, tokenizer)
        directories[name] = tmp_path / name
    folder = tmp_path / "text"
    folder.mkdir()
    for split in ("train", "validation", "test"):
        (folder / f"{split}.txt").write_text("\n".join(f"a sentence of {split} and number {i}" for i in range(40)))
    source = text.prepare_text(str(folder), tmp_path / "data")
    measured, how = generation.measure_causal_lms(directories, source, torch.device("cpu"), 32, 16, 4, 0.0)
    dense, pruned = measured["dense"], measured["pruned"]
    gone = 1 - pruned["block_parameters"] / dense["block_parameters"]
    assert "sparsity" not in dense and pruned["sparsity"] == pytest.approx(gone)
    assert 0.3 <= pruned["sparsity"] < 0.32 and pruned["macs_of_prompt"] < dense["macs_of_prompt"]
    assert pruned["cache_bytes_per_token"] == dense["cache_bytes_per_token"] * 4 // 6
    assert dense["parameters"] - pruned["parameters"] == dense["block_parameters"] - pruned["block_parameters"]
    assert how["split"] == "test" and how["token_length"] == 32 and how["prompt"] == 16
    assert all(values["perplexity"] > 1 for values in measured.values())


def test_greedy_is_what_the_model_says_next(tmp_path):
    base = assets.resolve_model("tiny_llama", tmp_path, "auto")
    model = load_causal_lm(base.path, torch.float32)
    tokenizer = load_tokenizer(base.path, model.config)
    ids = tokenizer("The government", return_tensors="pt").input_ids
    for _ in range(5):
        ids = torch.cat([ids, model(ids).logits[:, -1:].argmax(-1)], 1)
    assert generation.greedy(model, tokenizer, "The government", 5) == tokenizer.decode(ids[0], skip_special_tokens=True)
