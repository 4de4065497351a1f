"""What running a causal LM costs: the cache against one that a forward filled, speeds of models that take turns, decoding."""

import math

import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM

from common import assets, generation, structured, text
from common.blocks import KINDS, blocks_of
from common.checkpoint import load_causal_lm, save_model
from common.data import load_tokenizer
from common.importance import l2_scores
from common.pruning import shrink_
from common.runs import UserError
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


class Words:
    """A tokenizer whose tokens are words w0, w1, ..."""

    eos_token_id = 0

    def batch_decode(self, ids, skip_special_tokens=True):
        return [" ".join(f"w{i}" for i in row if i != 0) for row in ids.tolist()]


class Knows(torch.nn.Module):
    """Continues the numbers 1, 2, 3, ..., `wrong` of every ten of its words apart."""

    device = torch.device("cpu")

    def __init__(self, wrong):
        super().__init__()
        self.wrong = wrong

    def generate(self, input_ids, max_new_tokens, **_):
        new = input_ids[:, -1:] + torch.arange(1, max_new_tokens + 1)
        return torch.cat([input_ids, torch.where(new % 10 < self.wrong, 5000 + new, new)], 1)


def test_continuations_against_the_text_itself():
    """BLEU and ROUGE of a writer who makes known mistakes, worked out by hand from its right n-grams."""
    pytest.importorskip("sacrebleu", reason="sacrebleu is not installed (requirements-extra.txt)")
    stream = torch.arange(1, 400).numpy()
    perfect = generation.continuation_metrics(Knows(0), Words(), stream, 5, prompt=7, new=30)
    assert perfect["bleu"] == pytest.approx(100) and perfect["n_continuations"] == 5
    assert perfect["rouge1"] == perfect["rouge2"] == perfect["rougeL"] == 1
    some = generation.continuation_metrics(Knows(2), Words(), stream, 5, prompt=7, new=30)
    assert some["rouge1"] == pytest.approx(0.8) and some["rougeL"] == pytest.approx(0.8)
    starts = [round(i * (399 - 37) / 4) for i in range(5)]
    shares, totals = [0] * 4, [0] * 4  # n-grams of 1 to 4 words that are right, and all
    pairs = []
    for start in starts:
        right = [(word % 10) >= 2 for word in range(start + 8, start + 38)]
        for n in range(4):
            totals[n] += 30 - n
            shares[n] += sum(all(right[i : i + n + 1]) for i in range(30 - n))
        pairs.append(sum(all(right[i : i + 2]) for i in range(29)) / 29)
    bleu = 100 * math.exp(sum(math.log(share / total) for share, total in zip(shares, totals, strict=True)) / 4)
    assert some["bleu"] == pytest.approx(bleu, rel=1e-6) and some["rouge2"] == pytest.approx(sum(pairs) / 5)


def test_a_text_too_short_to_continue():
    pytest.importorskip("sacrebleu", reason="sacrebleu is not installed (requirements-extra.txt)")
    with pytest.raises(UserError, match="36 tokens: too few for a prompt of 7 and 30 that follow"):
        generation.continuation_metrics(Knows(0), Words(), torch.arange(36).numpy(), 5, prompt=7, new=30)


def test_a_real_model_continues():
    pytest.importorskip("sacrebleu", reason="sacrebleu is not installed (requirements-extra.txt)")
    found = generation.continuation_metrics(llama(), Words(), torch.arange(1, 100).numpy(), 3, prompt=7, new=9, batch_size=2)
    assert 0 <= found["bleu"] <= 100 and 0 <= found["rougeL"] <= 1
