"""Processes started by the agent: as they end the starting program ends; what they share is what it is by hand."""

import os

import psutil
import pytest
import torch
import torch.distributed as dist
from torch.distributed.elastic.utils.distributed import get_free_port

from common import processes
from common.runs import Interrupted, UserError

SCRIPT = """
import os, signal, sys
rank, how, folder = int(os.environ["RANK"]), sys.argv[1], sys.argv[2]
open(f"{folder}/{rank}", "w").write(os.environ["WORLD_SIZE"] + " " + os.environ["OMP_NUM_THREADS"])
if rank == 1 and how == "killed":
    os.kill(os.getpid(), signal.SIGKILL)
sys.exit({"fine": 0, "error": 2, "interrupted": 130, "killed": 0}[how])
"""


@pytest.fixture
def launch(tmp_path, monkeypatch):
    monkeypatch.delenv("OMP_NUM_THREADS", raising=False)
    (tmp_path / "script.py").write_text(SCRIPT)
    before = {name: os.environ.get(name) for name in ("OMP_NUM_THREADS", "TORCHELASTIC_SIGNALS_TO_HANDLE")}
    yield lambda how: processes.launch(2, str(tmp_path / "script.py"), [how, str(tmp_path)])
    for name, value in before.items():
        os.environ.pop(name, None)
        if value is not None:
            os.environ[name] = value


def test_all_well(launch, tmp_path):
    assert launch("fine") is None
    threads = max(1, processes.cores() // 2)
    assert [(tmp_path / name).read_text() for name in "01"] == [f"2 {threads}"] * 2


def test_an_error_that_was_told_is_status_2_and_told_once(launch):
    with pytest.raises(SystemExit) as stop:
        launch("error")
    assert stop.value.code == 2


@pytest.mark.parametrize(("how", "error", "message"), [
    ("interrupted", Interrupted, "The same command goes on from the last checkpoint"),
    ("killed", UserError, "process 1 of 2 ended with exit status -9. The same command goes on"),
])  # fmt: skip
def test_other_ends(how, error, message, launch):
    with pytest.raises(error, match=message):
        launch(how)


def test_alone_everything_is_as_without():
    parameter, values = torch.nn.Parameter(torch.ones(2)), torch.tensor([1.0, 2.0])
    parameter.grad = torch.tensor([3.0, 4.0])
    with pytest.raises(UserError, match=r"--devices 2: there are 1 processes"), processes.joined(torch.device("cpu"), 2):
        pass
    with processes.joined(torch.device("cpu"), 1) as rank, processes.first(rank):
        assert rank == 0 and not dist.is_initialized() and not processes.orphaned(0)
        processes.sum_gradients_([parameter])
        assert parameter.grad.tolist() == [3, 4] and processes.sum_(values) is values
        assert processes.any_of(True, "cpu") and not processes.any_of(False, "cpu") and processes.part_of([1, 2]) == [1, 2]


def share(rank, port, folder):
    os.environ |= {"TORCHELASTIC_RUN_ID": "x", "MASTER_ADDR": "localhost", "MASTER_PORT": str(port), "RANK": str(rank),
                   "WORLD_SIZE": "2", "LOCAL_RANK": str(rank)}  # fmt: skip
    a, b = torch.nn.Parameter(torch.zeros(2)), torch.nn.Parameter(torch.zeros(1, 3))
    with processes.joined(torch.device("cpu"), 2) as found:
        a.grad = torch.tensor([1.0, 2.0]) * (rank + 1)
        b.grad = None if rank else torch.ones(1, 3)  # one of them has nothing to add
        processes.sum_gradients_([a, b])
        print(f"of {rank}")
        checks = [found == rank, a.grad.tolist() == [3, 6], b.grad.tolist() == [[1, 1, 1]],
                  processes.sum_(torch.tensor([float(rank)])).item() == 1, processes.any_of(rank == 1, "cpu"),
                  not processes.any_of(False, "cpu"), processes.part_of([0, 1, 2]) == ([0, 2] if rank == 0 else [1]),
                  processes.orphaned(os.getppid() + 1), not processes.orphaned(os.getppid())]  # fmt: skip
        with processes.first(rank):
            (folder / "order").open("a").write(str(rank))
    (folder / f"{rank}.txt").write_text(str(checks))


def test_what_two_processes_share(tmp_path, capfd):
    torch.multiprocessing.start_processes(share, (get_free_port(), tmp_path), 2, start_method="fork")
    assert [(tmp_path / f"{rank}.txt").read_text() for rank in (0, 1)] == [str([True] * 9)] * 2
    assert (tmp_path / "order").read_text() == "01"
    printed = capfd.readouterr().out
    assert "of 0" in printed and "of 1" not in printed  # one of them speaks


def test_devices_that_do_not_fit(monkeypatch):
    assert processes.device_of("cpu", 3) == torch.device("cpu")
    with pytest.raises(UserError, match="--device cuda:1: is one for 2 processes"):
        processes.device_of("cuda:1", 2)
    monkeypatch.setattr(processes, "resolve_device", lambda device: torch.device("cuda"))
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
    with pytest.raises(UserError, match=r"--devices 2: there are 1 GPUs. Use as many, or --device cpu"):
        processes.device_of("cuda", 2)


def test_cores():
    assert 1 <= processes.cores() <= psutil.cpu_count()
