"""Documents from the disk in batches: against plain loops over the texts; loading by processes, and processes that die."""

import multiprocessing
import os
import pickle
import signal

import numpy as np
import pandas
import pytest
import torch
from transformers import AutoTokenizer

from common import assets, loading, text
from common.loading import Documents, Loader, epoch_order, padding_share, within
from common.runs import UserError

TEXTS = [" ".join(["word", "an other", "x"][i % 3] for _ in range(1 + 7 * i % 23)) for i in range(40)]


@pytest.fixture(scope="module")
def tokenizer():
    return AutoTokenizer.from_pretrained(assets.TINY_LLAMA)


@pytest.fixture(scope="module")
def prepared(tmp_path_factory):
    """A prepared text of distinct documents, from a Parquet file."""
    folder = tmp_path_factory.mktemp("loading")
    distinct = [f"{i} {words}" for i, words in enumerate(TEXTS)]
    pandas.DataFrame({"text": distinct[:30]}).to_parquet(folder / "train.parquet")
    pandas.DataFrame({"text": distinct[30:]}).to_parquet(folder / "validation.parquet")
    return loading.prepare(str(folder), folder / "data").path


@pytest.fixture(scope="module")
def documents(prepared, tokenizer):
    return Documents(prepared, "train", tokenizer, 12)


def expected_ids(tokenizer, n=30, limit=12):
    return [[*tokenizer(f"{i} {TEXTS[i]}")["input_ids"], tokenizer.eos_token_id][:limit] for i in range(n)]


# ------------------------------------------------------------------------------------------------------------ documents


def test_documents_are_the_texts_tokenised_and_cut(documents, tokenizer):
    expected, whole = expected_ids(tokenizer), expected_ids(tokenizer, limit=10**6)
    assert [documents.tokens(i).tolist() for i in range(len(documents))] == expected
    assert documents.lengths.tolist() == [len(row) for row in expected]
    assert documents.n_cut == sum(len(row) > 12 for row in whole) > 0
    assert documents.cut_tokens == sum(max(0, len(row) - 12) for row in whole)
    assert isinstance(documents.ids, np.memmap) and not documents.ids.flags.writeable


def test_a_batch_is_padded_at_the_end(documents, tokenizer):
    expected, index = expected_ids(tokenizer), np.array([5, 0, 17])
    batch = documents.batch(index)
    longest = max(len(expected[i]) for i in index)
    assert batch["ids"].shape == (3, longest) and batch["ids"].dtype == np.int64
    for row, i in zip(batch["ids"], index, strict=True):
        assert row.tolist() == expected[i] + [tokenizer.eos_token_id] * (longest - len(expected[i]))
    assert batch["lengths"].tolist() == [len(expected[i]) for i in index]
    assert documents.batch(index, 20)["ids"].shape == (3, 20)


def test_a_subset_keeps_its_order(documents):
    part = documents.subset(np.array([7, 3]))
    assert [part.tokens(i).tolist() for i in (0, 1)] == [documents.tokens(i).tolist() for i in (7, 3)]
    assert len(part) == 2 and len(documents) == 30


def test_another_process_gets_the_path_and_not_the_tokens(documents):
    packed = pickle.dumps(documents)
    assert len(packed) < 3000 and pickle.loads(packed).tokens(4).tolist() == documents.tokens(4).tolist()


def test_tokens_are_made_once(prepared, tokenizer, documents, monkeypatch):
    before = documents.path.stat().st_mtime_ns
    monkeypatch.setattr(text, "_store", None)  # would be called
    assert Documents(prepared, "train", tokenizer, 5).path.stat().st_mtime_ns == before


def test_offsets_of_another_stream(prepared, tokenizer, documents, tmp_path):
    offsets = documents.path.with_name("train.offsets.npy")
    whole = offsets.read_bytes()
    try:
        np.save(offsets, np.array([0, 3]))
        with pytest.raises(UserError, match="holds the documents of another stream"):
            Documents(prepared, "train", tokenizer, 12)
    finally:
        offsets.write_bytes(whole)


def test_splits_share_nothing(prepared, tokenizer):
    train, selection, judged = loading.splits(prepared, tokenizer, 12, 0)
    starts = [set(part.starts.tolist()) for part in (train, selection)]
    assert (len(train), len(selection), len(judged)) == (27, 3, 10) and not starts[0] & starts[1]
    assert set(starts[0] | starts[1]) == set(Documents(prepared, "train", tokenizer, 12).starts.tolist())
    assert loading.splits(prepared, tokenizer, 12, 0)[0].starts.tolist() == train.starts.tolist()
    assert loading.splits(prepared, tokenizer, 12, 1)[0].starts.tolist() != train.starts.tolist()
    assert len(loading.splits(prepared, tokenizer, 12, 0, n_judged=4)[2]) == 4


# --------------------------------------------------------------------------------------------------------------- orders


@pytest.mark.parametrize("by_length", [True, False])
def test_an_epoch_has_every_document_once_in_an_order_of_seed_and_epoch(documents, by_length):
    order = epoch_order(documents.lengths, 4, 0, 0, by_length)
    assert sorted(np.concatenate(order).tolist()) == list(range(30)) and [len(index) for index in order].count(2) == 1
    same, other = epoch_order(documents.lengths, 4, 0, 0, by_length), epoch_order(documents.lengths, 4, 0, 1, by_length)
    assert all(map(np.array_equal, order, same)) and not all(map(np.array_equal, order, other))
    spread = np.mean([np.ptp(documents.lengths[index]) for index in order])
    assert spread < 1.5 if by_length else spread > 3


def test_padding_by_hand():
    assert padding_share(np.array([2, 2, 4, 4]), 2) == 0
    assert padding_share(np.array([2, 4]), 2) == pytest.approx(1 - 6 / 8)
    assert padding_share(np.array([2, 4]), 1, 10) == pytest.approx(1 - 6 / 20)


def test_batches_within_a_number_of_tokens():
    lengths = np.array([5, 1, 9, 3, 3, 100])
    found = within(lengths, 12)
    assert [index.tolist() for index in found] == [[1, 3, 4], [0], [2], [5]]  # three of 3, with padding; 100 goes alone
    assert [len(index) for index in within(lengths, 12, padded=4)] == [3, 3]


# -------------------------------------------------------------------------------------------------------------- loading


@pytest.mark.parametrize("n_workers", [0, 2])
def test_loaded_batches_are_those_of_the_documents_epoch_after_epoch(documents, n_workers):
    timings, state, pids = {}, torch.get_rng_state(), []
    load = Loader(documents, "cpu", n_workers, True, None, timings)
    for epoch in (0, 1):
        order = epoch_order(documents.lengths, 4, 0, epoch)[epoch * 3 :]  # the second epoch is gone on with
        found = list(load(order))
        assert len(found) == len(order)
        for batch, index in zip(found, order, strict=True):
            for name, array in documents.batch(index).items():
                assert batch[name].tolist() == array.tolist() and batch[name].dtype == torch.int64
        pids.append([worker.pid for worker in load.loader._iterator._workers] if n_workers else [])
    assert pids[0] == pids[1] and len(pids[0]) == n_workers
    assert timings["waiting for data"] > 0 and torch.equal(torch.get_rng_state(), state)


def test_a_fixed_length(documents):
    (batch,) = Loader(documents, "cpu", 0, False, 25, {})([np.array([0, 1])])
    assert batch["ids"].shape == (2, 25)


def test_ctrl_c_is_not_for_the_loading_processes(documents):
    load, order = Loader(documents, "cpu", 1, False, None, {}), epoch_order(documents.lengths, 1, 0, 0)
    for i, _ in enumerate(load(order)):
        if i == 1:
            os.kill(load.loader._iterator._workers[0].pid, signal.SIGINT)
    assert i == len(order) - 1 and load.loader._iterator._workers[0].is_alive()


def test_a_loading_process_that_dies_is_told_with_the_way_out(documents):
    load = Loader(documents, "cpu", 1, False, None, {})
    with pytest.raises(UserError, match=r"a process that loads data died \(DataLoader worker.* with --num_workers 0 without"):
        with loading.deaths_told():
            for i, _ in enumerate(load(epoch_order(documents.lengths, 1, 0, 0))):
                if i == 1:
                    os.kill(load.loader._iterator._workers[0].pid, signal.SIGKILL)
    with pytest.raises(RuntimeError, match="another error"), loading.deaths_told():
        raise RuntimeError("another error")


def pickled_in_a_spawned_process(packed, queue):
    queue.put(pickle.loads(packed).batch(np.array([1]))["ids"].tolist())


def test_a_process_that_inherits_nothing_maps_the_file_itself(documents):
    context = multiprocessing.get_context("fork")
    queue = context.Queue()
    process = context.Process(target=pickled_in_a_spawned_process, args=(pickle.dumps(documents), queue))
    process.start()
    assert queue.get(timeout=60) == documents.batch(np.array([1]))["ids"].tolist()
    process.join()


# -------------------------------------------------------------------------------------------------------------- refused


def test_where_texts_come_from(tmp_path):
    with pytest.raises(UserError, match="--data nowhere: not reviews or news, and no such file or folder"):
        loading.prepare("nowhere", tmp_path)
    with pytest.raises(UserError, match="--data news: --text_column is for a path"):
        loading.prepare("news", tmp_path, "words")


def test_files_that_do_not_do(tmp_path, tokenizer):
    pandas.DataFrame({"words": ["one", "two"], "label": [0, 1]}).to_parquet(tmp_path / "no_column.parquet")
    with pytest.raises(UserError, match=r"no column called text or sentence. .*columns found: words, label"):
        loading.prepare(str(tmp_path / "no_column.parquet"), tmp_path / "data")
    pandas.DataFrame({"text": ["", "  ", None]}).to_parquet(tmp_path / "empty.parquet")
    with pytest.raises(UserError, match="no documents in it"):
        loading.prepare(str(tmp_path / "empty.parquet"), tmp_path / "data")
    pandas.DataFrame({"text": ["only one"]}).to_parquet(tmp_path / "one.parquet")
    with pytest.raises(UserError, match="1 documents are too few to hold some out"):
        loading.prepare(str(tmp_path / "one.parquet"), tmp_path / "data")
    (tmp_path / "two").mkdir()
    for split in ("train", "validation"):
        pandas.DataFrame({"text": [f"one of {split}"]}).to_parquet(tmp_path / "two" / f"{split}.parquet")
    found = loading.prepare(str(tmp_path / "two"), tmp_path / "data")
    with pytest.raises(UserError, match="1 text to train on, expected two at least"):
        loading.splits(found.path, tokenizer, 10, 0)


def test_empty_texts_are_dropped_and_that_is_said(tmp_path, tokenizer):
    pandas.DataFrame({"words": ["one", "", "two", "three", None, "four"]}).to_parquet(tmp_path / "some.parquet")
    found = loading.prepare(str(tmp_path / "some.parquet"), tmp_path / "data", "words")
    assert "train: 2 rows without a text dropped" in found.record["notes"]
    assert sum(len(part) for part in loading.splits(found.path, tokenizer, 10, 0)[:2]) == 2  # one each for the other splits
