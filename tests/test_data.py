"""Tokenised data and batches."""

import json

import numpy as np
import pandas
import pytest
import torch
import transformers
from tokenizers import Tokenizer, models, pre_tokenizers, processors

from common import data
from common.data import Split, bucketed, collate, tokenize
from common.runs import UserError

WORDS = [f"w{i}" for i in range(40)]


@pytest.fixture(scope="module")
def tokenizer():
    """[CLS] words [SEP], a word an id."""
    return word_tokenizer("[CLS] $A [SEP]")


def word_tokenizer(template):
    vocabulary = {word: i for i, word in enumerate(["[UNK]", "[CLS]", "[SEP]", "[PAD]", *WORDS])}
    inner = Tokenizer(models.WordLevel(vocabulary, unk_token="[UNK]"))
    inner.pre_tokenizer = pre_tokenizers.Whitespace()
    specials = [(token, vocabulary[token]) for token in ("[CLS]", "[SEP]") if token in template]
    inner.post_processor = processors.TemplateProcessing(single=template, special_tokens=specials)
    return transformers.PreTrainedTokenizerFast(tokenizer_object=inner, cls_token="[CLS]", sep_token="[SEP]", pad_token="[PAD]")


def random_split(lengths, seed=0):
    ids = np.random.default_rng(seed).integers(4, 44, sum(lengths)).astype(np.int32)
    return Split(ids, np.concatenate([[0], np.cumsum(lengths)]), np.arange(len(lengths)), 3, 0)


def examples(split):
    return [split.ids[start:end].tolist() for start, end in zip(split.offsets[:-1], split.offsets[1:], strict=True)]


# ------------------------------------------------------------------------------------------------------------ tokenising


def test_tokenize_cuts_keeps_the_closing_token_and_counts(tokenizer):
    texts = ["w0 w1", "w0 w1 w2", "w0 w1 w2 w3 w4 w5", "", "unheard"]
    split = tokenize(texts, np.array([1, 0, 1, 0, 1]), tokenizer, max_length=5)
    assert examples(split) == [[1, 4, 5, 2], [1, 4, 5, 6, 2], [1, 4, 5, 6, 2], [1, 2], [1, 0, 2]]
    assert (split.n_truncated, split.pad_id, split.labels.tolist()) == (1, 3, [1, 0, 1, 0, 1])
    assert split.lengths.tolist() == [4, 5, 5, 2, 3] and len(split) == 5


def test_tokenize_without_a_closing_token_keeps_the_first_tokens():
    """As the tokenizers of causal models do: what was cut is the end, not the middle."""
    split = tokenize(["w0 w1 w2 w3 w4 w5"], np.array([0]), word_tokenizer("[CLS] $A"), max_length=4)
    assert examples(split) == [[1, 4, 5, 6]] and split.n_truncated == 1


def test_tokenize_agrees_with_the_tokenizer_over_many_texts(tokenizer):
    rng = np.random.default_rng(0)
    texts = [" ".join(rng.choice(WORDS, rng.integers(0, 12))) for _ in range(10_050)]  # more than one chunk
    split = tokenize(texts, np.zeros(len(texts)), tokenizer, max_length=8)
    assert examples(split) == tokenizer(texts, truncation=True, max_length=8)["input_ids"]
    assert split.n_truncated == sum(len(text.split()) > 6 for text in texts)


def test_subset_keeps_order_and_repeats():
    split = random_split([3, 1, 4, 2])
    part = split.subset(np.array([2, 0, 2]))
    whole = examples(split)
    assert examples(part) == [whole[2], whole[0], whole[2]] and part.labels.tolist() == [2, 0, 2]
    assert len(split.subset(np.arange(0))) == 0


# --------------------------------------------------------------------------------------------------------------- batches


def lengths_like_sst2(n):
    return np.clip(np.random.default_rng(1).geometric(0.08, n) + 2, 3, 64)


def test_bucketed_covers_each_example_once():
    for n, batch_size, pool in ((1, 4, 2), (7, 4, 2), (8, 4, 2), (1003, 16, 5), (1000, 1, 50)):
        lengths = lengths_like_sst2(n)
        batches = bucketed(lengths, batch_size, np.random.default_rng(0), pool)
        assert sorted(np.concatenate(batches).tolist()) == list(range(n))
        assert sorted(map(len, batches))[1:] == [batch_size] * (-(-n // batch_size) - 1)  # one short batch at most
        assert len(batches) == -(-n // batch_size)


@pytest.mark.parametrize(("n", "fraction", "batch_size"), [(10, 0.3, 2), (10, 1, 4), (1, 0.3, 4), (7, 0.5, 2), (99, 0.37, 8)])
def test_epochs_take_the_data_in_turn(n, fraction, batch_size):
    """As many examples as the fraction says; none comes a second time before all have come once."""
    split, share = random_split([3] * n), max(1, round(n * fraction))
    seen = []
    for epoch in range(5):
        batches = data.epoch_batches(split, batch_size, fraction, 0, epoch)
        assert data.n_batches(split, batch_size, fraction) == len(batches) and data.n_in_epoch(split, fraction) == share
        assert sum(map(len, batches)) == share
        seen += sorted(np.concatenate(batches), key=lambda i, epoch=epoch: (i - epoch * share) % n)
    assert [int(i) for i in seen] == [i % n for i in range(5 * share)]
    again = data.epoch_batches(split, batch_size, fraction, 0, 4)
    assert all(np.array_equal(a, b) for a, b in zip(batches, again, strict=True))


def test_bucketed_is_a_function_of_the_generator_alone():
    lengths = lengths_like_sst2(500)
    once, again, other = (bucketed(lengths, 16, np.random.default_rng([7, epoch])) for epoch in (0, 0, 1))
    assert all(np.array_equal(a, b) for a, b in zip(once, again, strict=True))
    assert not all(np.array_equal(a, b) for a, b in zip(once, other, strict=True))
    np.random.seed(0)
    before = np.random.get_state()[1].copy()
    bucketed(lengths, 16, np.random.default_rng(0))
    assert np.array_equal(before, np.random.get_state()[1])


def test_bucketed_batches_pad_little_and_come_in_random_order():
    split = random_split(lengths_like_sst2(20_000).tolist())
    batches = bucketed(split.lengths, 32, np.random.default_rng(0))
    at_random = np.array_split(np.random.default_rng(0).permutation(20_000), 625)
    assert data.padding_share(split, batches) < 0.05 < 0.5 < data.padding_share(split, at_random)
    longest = [split.lengths[index].max() for index in batches]
    assert abs(np.corrcoef(longest[:-1], longest[1:])[0, 1]) < 0.2


def test_padding_share_by_hand():
    split = random_split([2, 4, 1, 1, 3])
    assert data.padding_share(split, [np.array([0, 1]), np.array([2, 3, 4])]) == pytest.approx(1 - 11 / (2 * 4 + 3 * 3))
    assert data.padding_share(split, [np.array([2, 3])]) == 0


def test_in_order_is_sorted_by_length():
    batches = data.in_order(np.array([5, 1, 3, 1, 2]), 2)
    assert [index.tolist() for index in batches] == [[1, 3], [4, 2], [0]]


def test_collate_is_the_tokenizers_padding(tokenizer):
    split = random_split([3, 1, 4, 2, 6])
    for index in ([0, 1, 2], [4, 1], [3]):  # the last example too: nothing beyond the end of the array is read
        expected = tokenizer.pad({"input_ids": [examples(split)[i] for i in index]}, return_tensors="pt")
        batch = collate(split, np.array(index))
        assert torch.equal(batch["input_ids"], expected["input_ids"])
        assert torch.equal(batch["attention_mask"], expected["attention_mask"])
        assert batch["labels"].tolist() == batch["index"].tolist() == index
        assert all(tensor.dtype == torch.int64 for tensor in batch.values())
        assert set(data.inputs_of(batch)) == {"input_ids", "attention_mask"}


def test_loader_gives_every_batch_in_turn():
    split = random_split([3, 1, 4, 2, 6])
    batches = [np.array([4, 0]), np.array([1]), np.array([2, 3])]
    loaded = list(data.loader(split, batches, torch.device("cpu")))
    assert [batch["index"].tolist() for batch in loaded] == [[4, 0], [1], [2, 3]]
    assert all(torch.equal(a["input_ids"], collate(split, b)["input_ids"]) for a, b in zip(loaded, batches, strict=True))


# ------------------------------------------------------------------------------------------------------- a prepared task


@pytest.fixture
def task(tmp_path):
    def make(n_train):
        for split, n in (("train", n_train), ("validation", 5)):
            rows = {"text": [f"{WORDS[i % 40]} {WORDS[i // 40]}" for i in range(n)], "label": [i % 2 for i in range(n)]}
            pandas.DataFrame(rows).to_parquet(tmp_path / f"{split}.parquet")
        (tmp_path / "manifest.json").write_text(json.dumps({"label_names": ["bad", "good"]}))
        return tmp_path

    return make


def test_the_selection_slice_is_held_out_of_the_training_data(task, tokenizer):
    def load(n_selection=50, selection=1.0, seed=0):
        return data.load_classification(task(400), tokenizer, 8, n_selection, selection, seed)

    def texts(split):
        return [tuple(example) for example in examples(split)]

    whole = load()
    assert whole.label_names == ["bad", "good"] and len(whole.validation) == 5
    assert (len(whole.train), len(whole.selection)) == (360, 40)  # a tenth held out at most
    assert len({*texts(whole.train), *texts(whole.selection)}) == 400
    assert texts(load(selection=0.5).selection) == texts(whole.selection)[:20]
    assert len(load(n_selection=10).selection) == 10
    assert texts(load(seed=1).selection) != texts(whole.selection)
    for text, label in zip(texts(whole.train), whole.train.labels, strict=True):
        assert ((text[1] - 4) + 40 * (text[2] - 4)) % 2 == label


@pytest.mark.parametrize("n_train", [2, 3, 9, 10])
def test_a_tiny_task_still_has_something_to_train_and_to_select_on(task, tokenizer, n_train):
    split = data.load_classification(task(n_train), tokenizer, 8, 2000, 0.5, 0)
    assert len(split.selection) == 1 and len(split.train) == n_train - 1
    assert data.n_in_epoch(split.train, 0.01) == 1


def test_unreadable_parquet_is_a_user_error(tmp_path, task):
    with pytest.raises(UserError, match=r"train.parquet: not readable .* --force"):
        data.read_texts(tmp_path, "train")
    path = task(10) / "train.parquet"
    path.write_bytes(path.read_bytes()[:-50])
    with pytest.raises(UserError, match="not readable"):
        data.read_texts(tmp_path, "train")
    pandas.DataFrame({"text": ["a"], "class": [0]}).to_parquet(path)
    with pytest.raises(UserError, match="not readable"):
        data.read_texts(tmp_path, "train")


# ---------------------------------------------------------------------------------------------------------------- length


def test_check_length_counts_the_positions_that_tokens_can_have():
    bert = transformers.BertConfig(max_position_embeddings=64)
    roberta = transformers.RobertaConfig(max_position_embeddings=66, pad_token_id=1)  # positions 2 to 65
    for config in (bert, roberta):
        data.check_length(config, 64)
        for length in (65, 2, 0):
            with pytest.raises(UserError, match="expected 3 to 64"):
                data.check_length(config, length)


def test_a_roberta_of_the_checked_length_runs():
    config = transformers.RobertaConfig(hidden_size=8, num_hidden_layers=1, num_attention_heads=1, intermediate_size=8,
                                        vocab_size=10, max_position_embeddings=18, pad_token_id=1)  # fmt: skip
    model = transformers.RobertaForSequenceClassification(config)
    data.check_length(config, 16)
    assert model(torch.full((1, 16), 5)).logits.shape == (1, 2)
    with pytest.raises((IndexError, RuntimeError)):
        model(torch.full((1, 17), 5))
