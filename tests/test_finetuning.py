"""Windows of a stream, what the console and the history are told, and processes that stop together."""

import math
import multiprocessing
import os
import socket

import numpy as np
import pytest
import torch
import torch.distributed as dist
from transformers import TrainerControl, TrainerState

from common.finetuning import Console, StopTogether, Windows
from common.runs import Run, UserError

# ---------------------------------------------------------------------------------------------------------------- windows


def test_windows_are_pieces_that_do_not_overlap(tmp_path):
    np.save(tmp_path / "ids.npy", np.arange(1000, 1107, dtype=np.int32))
    windows = Windows(np.load(tmp_path / "ids.npy", mmap_mode="r"), 10)
    assert len(windows) == 10  # the last 7 tokens are no window
    for i in range(10):
        found = windows[i]
        assert found["input_ids"].dtype == torch.int64 and found["input_ids"].tolist() == [*range(1000 + 10 * i, 1010 + 10 * i)]
        assert torch.equal(found["labels"], found["input_ids"])
    windows[3]["input_ids"].zero_()  # what is handed out is not the file
    assert windows[3]["input_ids"][0] == 1030
    assert len(Windows(np.arange(10), 10)) == len(Windows(np.arange(19), 10)) == 1


@pytest.mark.parametrize(("n", "starts"), [
    (None, [*range(0, 100, 10)]), (10, [*range(0, 100, 10)]), (11, [*range(0, 100, 10)]), (1, [0]), (2, [0, 90]),
    (4, [0, 30, 60, 90]), (5, [0, 20, 40, 70, 90]),
])  # fmt: skip
def test_fewer_windows_are_drawn_evenly(n, starts):
    windows = Windows(np.arange(105), 10, n)
    assert windows.starts.tolist() == starts and [int(windows[i]["input_ids"][0]) for i in range(len(windows))] == starts


def test_many_windows_are_drawn_evenly():
    windows = Windows(np.zeros(3 * 12_345, np.int32), 3, 1000)
    steps = np.diff(windows.starts)
    assert len(windows) == 1000 and windows.starts[0] == 0 and windows.starts[-1] == 3 * 12_344
    assert set(steps.tolist()) == {3 * 12, 3 * 13}


@pytest.mark.parametrize(("n", "starts"), [(4, [0, 30, 60, 90]), (10, [*range(0, 100, 10)]), (20, [*range(0, 100, 5)])])
def test_more_windows_than_there_are_overlap_evenly(n, starts):
    windows = Windows(np.arange(105), 10, n, overlap=True)
    assert windows.starts.tolist() == starts
    assert windows[n - 1]["input_ids"].tolist() == [*range(starts[-1], starts[-1] + 10)]


def test_every_step_is_a_whole_one():
    for n, multiple, left in ((10, 4, 8), (10, 5, 10), (10, 1, 10), (10, 16, 0)):
        windows = Windows(np.arange(100), 10)
        windows.drop_rest_(multiple)
        assert windows.starts.tolist() == [*range(0, 10 * left, 10)], (n, multiple)


def test_too_little_text():
    with pytest.raises(UserError, match="too little text: 1,029 tokens, expected a window of 1,030 at least"):
        Windows(np.arange(1029), 1030)


# ---------------------------------------------------------------------------------------------------------------- console


def told(console, step, **logs):
    console.on_log(None, TrainerState(global_step=step, max_steps=20), TrainerControl(), logs=logs)


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
@pytest.mark.parametrize("key", ["loss", "eval_loss"])
@pytest.mark.parametrize("first", [True, False])
def test_a_loss_that_is_no_number_ends_every_process(key, value, first, tmp_path):
    with Run(tmp_path, "exp", {}, "mine") as run:
        with pytest.raises(UserError, match=rf"^{key} is -?(nan|inf) at step 1,230\. .*--learning_rate or --precision 32$"):
            told(Console(run if first else None), 1230, **{key: value}, grad_norm=1.0)
        assert run.history() == []


def test_the_console_and_the_history(tmp_path, capsys):
    with Run(tmp_path, "exp", {}, "mine") as run:
        console = Console(run)
        for step in (10, 20):  # a process that was killed at 20 goes on from 10
            run.log(step, "training", loss=9.0)
        state = TrainerState(global_step=10, max_steps=20)
        console.on_train_begin(None, state, TrainerControl())
        assert run.history() == [(10, "training", "loss", 9.0)]
        assert (console.bar.total, console.bar.n) == (20, 10)
        for state.global_step in range(11, 16):
            console.on_step_end(None, state, TrainerControl())
        told(console, 15, loss=2.34567, grad_norm=0.5, learning_rate=1e-4, epoch=0.1)
        told(console, 15, eval_loss=2.0, eval_perplexity=7.38906, eval_sparsity=0.29577, eval_runtime=1.0, epoch=0.1)
        told(console, 20, train_runtime=3.0, train_loss=2.1)
        console.on_train_end(None, state, TrainerControl())
        assert run.history()[1:] == [
            (15, "training", "loss", 2.34567), (15, "training", "grad_norm", 0.5), (15, "training", "learning_rate", 1e-4),
            (15, "training", "validation_perplexity", 7.38906), (15, "training", "sparsity", 0.29577)]  # fmt: skip
    shown = capsys.readouterr().out
    assert shown == "Step 15: loss=2.3457\nStep 15: validation perplexity=7.39 sparsity=0.2958\n"


def test_another_process_says_nothing(capsys):
    console = Console(None)
    state = TrainerState(global_step=3, max_steps=20)
    console.on_train_begin(None, state, TrainerControl())
    console.on_step_end(None, state, TrainerControl())
    told(console, 10, loss=2.0)
    told(console, 10, eval_loss=2.0)
    console.on_train_end(None, state, TrainerControl())
    assert capsys.readouterr() == ("", "")


# ---------------------------------------------------------------------------------------------------------------- stopping


def steps_of(requested, save_every=3, n=8, evaluated=()):
    """Which steps log, which save, and which is the last, as (logged, saved, last)."""
    stop, logged, saved = StopTogether(requested, save_every), [], []
    state = TrainerState(global_step=0, max_steps=n)
    stop.on_train_begin(None, state, TrainerControl())
    for state.global_step in range(1, n + 1):
        control = TrainerControl(should_evaluate=state.global_step in evaluated, should_log=False)
        control = stop.on_step_end(None, state, control)
        logged += [state.global_step] * control.should_log
        saved += [state.global_step] * control.should_save
        assert stop.stopped == control.should_training_stop
        if control.should_training_stop:
            break
    return logged, saved, state.global_step


def test_one_process_saves_and_stops():
    assert steps_of(lambda: False) == ([3, 6], [3, 6], 8)
    assert steps_of(lambda: False, save_every=100, evaluated=[2, 5]) == ([2, 5], [], 8)  # a look begins a new mean too
    asked = iter([False, False, False, True])
    assert steps_of(lambda: next(asked)) == ([3, 4], [3, 4], 4)


def test_what_was_asked_for_already_stays():
    control = TrainerControl(should_training_stop=True, should_save=True, should_log=True)
    StopTogether(lambda: False, 100).on_step_end(None, TrainerState(global_step=1), control)
    assert control.should_training_stop and control.should_save and control.should_log


def free_port():
    with socket.socket() as server:
        server.bind(("127.0.0.1", 0))
        return server.getsockname()[1]


def stops(rank, port, results):
    os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port), "RANK": str(rank), "WORLD_SIZE": "2"}
    dist.init_process_group("gloo")
    asked = iter([False, False, False, False, rank == 1, False, False, False])  # one of the two, in its fifth step
    results.put((rank, steps_of(lambda: next(asked))))
    dist.destroy_process_group()


def test_two_processes_stop_at_the_same_step():
    context = multiprocessing.get_context("forkserver")
    results, port = context.Queue(), free_port()
    processes = [context.Process(target=stops, args=(rank, port, results)) for rank in range(2)]
    for process in processes:
        process.start()
    try:
        found = dict(results.get(timeout=100) for _ in processes)
        for process in processes:
            process.join(60)
        assert [process.exitcode for process in processes] == [0, 0]
    finally:
        for process in processes:
            process.kill()
    assert found == {0: ([3, 5], [3, 5], 5), 1: ([3, 5], [3, 5], 5)}
