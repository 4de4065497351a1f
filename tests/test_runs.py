"""Flags, the record of a run, and how a program ends."""

import errno
import io
import json
import os
import random
import re
import signal
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch

from common import runs
from common.runs import (
    REPOSITORY,
    Interrupted,
    Parser,
    Run,
    UserError,
    read_json,
    run_script,
    stop_requests,
    table,
    write_atomic,
)

# ----------------------------------------------------------------------------------------------------------------- flags

PRESETS = [
    ("num_epochs", 8, 4, "passes over 100 % of the data", (0, 10)),
    ("learning_rate", 0.1, 0.2, "peak", (0, 1)),
    ("schedule", "cubic", "linear", "how", ("cubic", "linear")),
    ("refit", True, False, "whether"),
    ("importance", "l2", "fisher", "free text"),
]


def parse(*argv):
    return Parser("A script of 100 %.", PRESETS, shared=tuple(runs.SHARED_FLAGS)).parse_args(argv)


def test_the_preset_table_and_what_beats_it():
    full, fast = parse(), parse("--fast")
    assert [getattr(full, row[0]) for row in PRESETS] == [8, 0.1, "cubic", True, "l2"]
    assert [getattr(fast, row[0]) for row in PRESETS] == [4, 0.2, "linear", False, "fisher"]
    args = parse("--fast", "--num_epochs", 0, "--learning_rate", "0.0", "--schedule", "cubic", "--refit")
    assert [getattr(args, row[0]) for row in PRESETS] == [0, 0.0, "cubic", True, "fisher"]
    assert parse("--no_refit").refit is False
    assert isinstance(parse("--learning_rate", "1").learning_rate, float)


def test_hyphens_and_underscores_in_names_and_nothing_changed_in_values():
    for name, value in (("--run_name", "a-b_c"), ("--run-name", "--x=y--z"), ("--model", "org/some-model--v1_2")):
        attribute = name.strip("-").replace("-", "_")
        assert getattr(parse(f"{name}={value}"), attribute) == value
        if not value.startswith("-"):
            assert getattr(parse(name, value), attribute) == value
    args = parse("--dry-run", "--no-refit", "--num-epochs=3", "--local-dir", "a-b/c--d=e", "--learning-rate", "1e-4")
    assert (args.dry_run, args.refit, args.num_epochs, args.local_dir) == (True, False, 3, Path("a-b/c--d=e"))
    assert args.learning_rate == 1e-4


@pytest.mark.parametrize(
    "argv, message",
    [
        (["--num_epoch", "3"], "unrecognized arguments"),  # no abbreviations
        (["--num-epochs", "11"], "--num_epochs 11: expected a value from 0 to 10"),
        (["--num_epochs=-1"], "--num_epochs -1: expected"),
        (["--learning_rate", "-0.5"], "--learning_rate -0.5: expected a value from 0 to 1"),
        (["--learning_rate", "nan"], "--learning_rate nan: expected"),
        (["--learning_rate", "inf"], "--learning_rate inf: expected"),
        (["--num_epochs", "1.5"], "invalid int value"),
        (["--schedule", "square"], "invalid choice: 'square'"),
        (["--resume", "maybe"], "invalid choice: 'maybe'"),
        (["--refit", "--no_refit"], "not allowed with"),
        (["--seed", "-1"], "--seed -1: expected"),
        (["--save_every", "0"], "--save_every 0: expected"),
        (["stray"], "unrecognized arguments: stray"),
    ],
)
def test_a_wrong_flag_is_one_line_and_status_2(argv, message, capsys):
    with pytest.raises(SystemExit) as stop:
        parse(*argv)
    printed = capsys.readouterr()
    assert stop.value.code == 2 and message in printed.err and printed.err.startswith("error: ")
    assert printed.err.count("\n") == 1 and printed.out == ""


def test_help_shows_both_columns(capsys):
    with pytest.raises(SystemExit) as stop:
        parse("--help")
    shown = " ".join(capsys.readouterr().out.split())
    assert stop.value.code == 0
    for text in ("A script of 100 %.", "100 % of the data [8, fast 4]", "whether [on, fast off]", "data and models [data]"):
        assert text in shown


def test_flags_that_change_no_result_are_flags():
    assert set(runs.NO_RESULT) <= set(runs.SHARED_FLAGS) and "seed" not in runs.NO_RESULT


# ------------------------------------------------------------------------------------------------------------- the end


@pytest.mark.parametrize(
    "error, code, message",
    [
        (UserError("data.csv: not found. Run: x"), 2, "error: data.csv: not found. Run: x\n"),
        (Interrupted("The same command goes on."), 130, "\ninterrupted. The same command goes on.\n"),
        (KeyboardInterrupt(), 130, "\ninterrupted.\n"),
        (OSError(errno.ENOSPC, "No space left on device", "a"), 2, "error: a: No space left on device. Free some space"),
        (OSError(errno.EROFS, "Read-only file system"), 2, "error: output: Read-only file system."),
        (PermissionError(errno.EACCES, "Permission denied", "out"), 2, "error: out: Permission denied."),
        (RuntimeError("Error while serializing: I/O error: full (os error 28)"), 2, "error: output: No space left on device."),
        (RuntimeError("CUDA out of memory. Tried to allocate\nmore"), 2, "error: out of memory (CUDA out of memory."),
        (RuntimeError("[enforce fail] DefaultCPUAllocator: can't allocate memory"), 2, "error: out of memory ([enforce fail]"),
        (MemoryError(), 2, "error: out of memory (out of memory). Use a smaller model"),
    ],
)
def test_exit_status(error, code, message, capsys):
    def main():
        raise error

    with pytest.raises(SystemExit) as stop:
        run_script(main)
    printed = capsys.readouterr().err
    assert stop.value.code == code and printed.startswith(message) and printed.strip().count("\n") == 0


@pytest.mark.parametrize("error", [ValueError("a bug"), OSError(errno.EIO, "I/O error"), RuntimeError("(os error 5)")])
def test_a_bug_keeps_its_traceback(error):
    def main():
        raise error

    with pytest.raises(type(error)) as raised:
        run_script(main)
    assert raised.value is error
    assert run_script(lambda: None) is None


def test_a_code_page_without_a_sign_stops_nothing(monkeypatch):
    written = io.BytesIO()
    monkeypatch.setattr(sys, "stdout", io.TextIOWrapper(written, encoding="cp1252"))  # as Windows redirects to a file
    run_script(lambda: print("✅ done"))
    sys.stdout.flush()
    assert written.getvalue() == b"? done\n"


# ------------------------------------------------------------------------------------------------------- seed and device


def test_one_seed_for_everything():
    def draw(seed):
        runs.seed_everything(seed)
        return random.random(), np.random.rand(), torch.rand(1).item()

    assert draw(3) == draw(3) and all(a != b for a, b in zip(draw(3), draw(4), strict=True))


def test_resolve_device():
    assert runs.resolve_device("cpu") == torch.device("cpu") and torch.get_float32_matmul_precision() == "highest"
    available = "cuda" if torch.cuda.is_available() else "mps" if torch.backends.mps.is_available() else "cpu"
    assert runs.resolve_device("auto").type == available
    for name in ("nonsense", "cuda:99"):
        with pytest.raises(UserError, match=rf"--device {name}: .*Use --device auto or cpu"):
            runs.resolve_device(name)


def test_environment_without_git(monkeypatch):
    assert re.fullmatch(r"[0-9a-f]{12}(-dirty)?", runs.environment()["commit"] or "0" * 12)
    monkeypatch.setenv("PATH", "")
    found = runs.environment()
    assert found["commit"] is None and found["versions"]["torch"] == torch.__version__
    assert found["threads"] == torch.get_num_threads()


# ----------------------------------------------------------------------------------------------------------------- files


def test_write_atomic_is_all_or_nothing(tmp_path, monkeypatch):
    path = tmp_path / "a" / "b.txt"
    write_atomic(path, "old\n")

    def fail(*args):
        raise OSError(errno.ENOSPC, "No space left on device")

    for step in ("fsync", "replace"):
        with monkeypatch.context() as patch:
            patch.setattr(os, step, fail)
            with pytest.raises(OSError, match="No space"):
                write_atomic(path, "new\n")
        assert path.read_bytes() == b"old\n" and list(path.parent.iterdir()) == [path]
    write_atomic(path, "naïve 好\n")
    assert path.read_bytes() == "naïve 好\n".encode()


def test_read_json_says_what_is_wrong(tmp_path):
    with pytest.raises(UserError, match="not found"):
        read_json(tmp_path / "x.json")
    for content in (b'{"a": ', b"\xff\xfe"):
        (tmp_path / "x.json").write_bytes(content)
        with pytest.raises(UserError, match=r"x.json: not valid JSON"):
            read_json(tmp_path / "x.json")


def test_fingerprint_is_of_the_content():
    assert runs.fingerprint({"a": 1, "b": Path("x")}) == runs.fingerprint({"b": "x", "a": 1})
    assert runs.fingerprint({"a": 1}) != runs.fingerprint({"a": 2})
    assert re.fullmatch("[0-9a-f]{8}", runs.fingerprint([None, 1.5]))


# --------------------------------------------------------------------------------------------------------------- the run


def open_run(tmp_path, name="mine", **settings):
    config = settings.pop("config", {"seed": 0, "rate": 0.1})
    return Run(tmp_path, "exp", config, name, **settings)


def record(tmp_path, name="mine"):
    return read_json(tmp_path / "exp" / name / "run.json")


@pytest.mark.parametrize(
    "error, status",
    [(ValueError("oops"), "failed"), (Interrupted("stop"), "interrupted"), (KeyboardInterrupt(), "interrupted")],
)
def test_the_record_says_how_a_run_ended(tmp_path, error, status):
    with pytest.raises(type(error)), open_run(tmp_path) as run:
        assert record(tmp_path)["status"] == "running"
        run.record["metrics"] = {"accuracy": 0.5}
        with run.timed("training"):
            raise error
    ended = record(tmp_path)
    assert ended["status"] == status and ended.get("error") == ("ValueError: oops" if status == "failed" else None)
    assert ended["metrics"] == {"accuracy": 0.5} and ended["config"] == {"seed": 0, "rate": 0.1}
    assert list(ended["timings"]) == ["training"]

    with open_run(tmp_path) as run:  # goes on
        assert not run.finished and run.record["started"] == ended["started"] and "error" not in record(tmp_path)
        run.record["timings"]["training"] = 100.0
        with run.timed("training"):
            pass
        assert run.record["timings"]["training"] >= 100
    assert record(tmp_path)["status"] == "finished" and "error" not in record(tmp_path)


def test_a_finished_run_is_left_alone(tmp_path):
    with open_run(tmp_path) as run:
        run.record["metrics"] = 1
    before = (run.dir / "run.json").read_bytes()
    with open_run(tmp_path) as run:
        assert run.finished and run.record["metrics"] == 1
    with pytest.raises(ValueError), open_run(tmp_path):
        raise ValueError
    assert (run.dir / "run.json").read_bytes() == before


def test_a_changed_configuration_is_another_run(tmp_path):
    with pytest.raises(Interrupted), open_run(tmp_path):
        raise Interrupted
    before = record(tmp_path)
    with pytest.raises(UserError, match=r"another configuration \(depth None -> 2, rate 0.1 -> 0.2\).*--resume never"):
        (refused := open_run(tmp_path, config={"seed": 0, "rate": 0.2, "depth": 2})).__enter__()
    assert record(tmp_path) == before
    with open_run(tmp_path):  # what was refused has let go of the lock
        assert refused.record == {}
    names = {open_run(tmp_path, name=None, config={"seed": seed}).dir.name for seed in (0, 1, 0)}
    assert len(names) == 2
    paths = Run(tmp_path, "exp", {"out": Path("x"), "limits": (1, 2)}, "typed")
    with paths:
        pass
    with Run(tmp_path, "exp", {"out": Path("x"), "limits": (1, 2)}, "typed") as again:  # as JSON says it
        assert again.finished


def test_resume_never_moves_what_is_there_aside(tmp_path):
    for content in ("first", "second"):
        with open_run(tmp_path, resume="never", config={"content": content}) as run:
            assert not run.finished and not (run.dir / "note").exists()
            (run.dir / "note").write_text(content)
    (run.dir / "run.json").write_text("{")  # damaged, so auto cannot go on
    with pytest.raises(UserError, match="not valid JSON"):
        open_run(tmp_path).__enter__()
    with open_run(tmp_path, resume="never"):
        pass
    notes = {path.parent.name: path.read_text() for path in (tmp_path / "exp").glob("*/note")}
    assert notes == {"mine.old-1": "first", "mine.old-2": "second"}


def test_the_first_error_is_not_hidden_by_a_full_disk(tmp_path, monkeypatch):
    def fail(*args):
        raise OSError(errno.ENOSPC, "No space left on device")

    with pytest.raises(ValueError, match="the reason"), open_run(tmp_path):
        monkeypatch.setattr(runs, "write_atomic", fail)
        raise ValueError("the reason")
    monkeypatch.undo()
    with pytest.raises(OSError, match="No space"), open_run(tmp_path):
        monkeypatch.setattr(runs, "write_atomic", fail)
    monkeypatch.undo()
    with open_run(tmp_path) as run:
        assert not run.finished


def test_a_file_in_the_way(tmp_path):
    (tmp_path / "exp").write_text("")
    with pytest.raises(UserError, match="a file is in the way"):
        open_run(tmp_path).__enter__()


HOLDER = """
import sys
from common.runs import Run
with Run(sys.argv[1], "exp", {"seed": 0, "rate": 0.1}, "mine") as run:
    print("inside", flush=True)
    sys.stdin.read()
    run.record["by"] = "holder"
"""


def test_two_processes_do_not_share_a_run(tmp_path):
    holder = subprocess.Popen([sys.executable, "-c", HOLDER, tmp_path], cwd=REPOSITORY, text=True,
                              stdin=subprocess.PIPE, stdout=subprocess.PIPE)  # fmt: skip
    try:
        assert holder.stdout.readline() == "inside\n"
        with pytest.raises(UserError, match="another process is working on this run"):
            open_run(tmp_path).__enter__()
        with open_run(tmp_path, name="other"):
            pass
        holder.stdin.close()
        with open_run(tmp_path, wait=True) as run:
            assert run.finished and run.record["by"] == "holder"
        assert holder.wait(60) == 0
    finally:
        holder.kill()
        holder.wait()
        holder.stdout.close()


def test_history_and_rewind(tmp_path):
    with open_run(tmp_path) as run:
        assert run.history() == []
        run.rewind(0)
        for step in (5, 10, 15):
            run.log(step, "pruning", loss=1 / step, sparsity=0.1)
        with open(run.dir / "history.csv", "a") as file:
            file.write("1")  # of 16: killed while writing
        run.rewind(10)
        run.log(12, "recovery", loss=0.25)
    assert run.history() == [(5, "pruning", "loss", 0.2), (5, "pruning", "sparsity", 0.1), (10, "pruning", "loss", 0.1),
                             (10, "pruning", "sparsity", 0.1), (12, "recovery", "loss", 0.25)]  # fmt: skip
    assert (run.dir / "history.csv").read_text().startswith("step,phase,metric,value\n")


def test_history_of_a_process_killed_at_its_first_line(tmp_path):
    for rewind in (True, False):
        with open_run(tmp_path, name=str(rewind)) as run:
            (run.dir / "history.csv").write_text("")
            if rewind:
                run.rewind(0)
            run.log(1, "dense", loss=0.5)
        assert run.history() == [(1, "dense", "loss", 0.5)]


def test_tensorboard_that_is_not_installed(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "torch.utils.tensorboard", None)
    with pytest.raises(UserError, match=r"pip install -r requirements-extra\.txt"):
        open_run(tmp_path, tensorboard=True)
    assert not list(tmp_path.iterdir())


# ----------------------------------------------------------------------------------------------------------- stopping


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_request_to_stop_is_seen_and_a_second_one_interrupts(number, monkeypatch):
    clock = [100.0]
    monkeypatch.setattr(runs.time, "monotonic", lambda: clock[0])
    before = [signal.getsignal(n) for n in (signal.SIGINT, signal.SIGTERM)]
    with pytest.raises(KeyboardInterrupt), stop_requests() as requested:
        assert not requested()
        os.kill(os.getpid(), number)
        assert requested()
        for again in (0.0, 0.5, 0.9 * runs.REPEATED):  # the same wish: torchrun hands on what the terminal sent to all
            clock[0] = 100 + again
            os.kill(os.getpid(), signal.SIGINT)
            os.kill(os.getpid(), signal.SIGTERM)
            assert requested()
        clock[0] = 100 + 1.1 * runs.REPEATED  # after the first one, not after the last
        os.kill(os.getpid(), signal.SIGINT)
        pytest.fail("the second one was ignored")
    assert [signal.getsignal(n) for n in (signal.SIGINT, signal.SIGTERM)] == before
    with stop_requests() as requested:  # every run asks anew
        assert not requested()


# --------------------------------------------------------------------------------------------------------------- console


def test_table_by_hand():
    rows = [["", "dense", "n"], ["accuracy", 0.9, None], ["F1", "0.8512", 3]]
    assert table(rows).splitlines() == [
        "           dense  n",
        "--------  ------  -",
        "accuracy     0.9   ",
        "F1        0.8512  3",
    ]
    assert table(rows, markdown=True).splitlines() == [
        "|          |  dense |  n |",
        "| -------- | -----: | -: |",
        "| accuracy |    0.9 |    |",
        "| F1       | 0.8512 |  3 |",
    ]


# --------------------------------------------------------------------------------------------------------------- imports

IMPORTS = """
import importlib, importlib.util, pathlib, signal, sys
sys.path.insert(0, sys.argv[1])
root, handler = pathlib.Path(sys.argv[1]), signal.getsignal(signal.SIGINT)
for path in [*sorted(root.glob("common/*.py")), *sorted(root.glob("*.py"))]:
    if path.stem == "mask_kernels" and importlib.util.find_spec("triton") is None:
        continue  # imported by nobody where there is no Triton
    importlib.import_module(f"common.{path.stem}" if path.parent.name == "common" else path.stem)
import torch
assert not torch.cuda.is_initialized() and signal.getsignal(signal.SIGINT) is handler
"""


def test_importing_writes_and_prints_nothing(tmp_path):
    places = {name: str(tmp_path / name) for name in ("HOME", "HF_HOME", "XDG_CACHE_HOME", "TMPDIR")}
    for place in places.values():
        Path(place).mkdir()
    done = subprocess.run([sys.executable, "-B", "-c", IMPORTS, REPOSITORY], cwd=tmp_path, env=os.environ | places,
                          capture_output=True, text=True, timeout=120, check=False)  # fmt: skip
    assert (done.returncode, done.stdout) == (0, ""), done.stderr
    assert [path for path in tmp_path.rglob("*") if path.is_file()] == []


def test_flags_and_errors_need_no_torch():
    code = "import sys, json, common.runs, common.tables, common.fetch; print(json.dumps(sorted(sys.modules)))"
    done = subprocess.run([sys.executable, "-c", code], cwd=REPOSITORY, capture_output=True, text=True, check=True, timeout=60)
    assert not {"torch", "transformers", "common.blocks"} & set(json.loads(done.stdout))
