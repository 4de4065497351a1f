import errno
import json
import multiprocessing
import socket
import subprocess
import sys
import time
import zipfile
from http.server import BaseHTTPRequestHandler, HTTPServer
from pathlib import Path
from threading import Thread

import huggingface_hub
import pytest
from huggingface_hub import constants, errors

from common import fetch
from common.fetch import Asset, Unavailable, UserError, prepare, sha256_of

# ------------------------------------------------------------------------------------------------------------------- hub


@pytest.fixture
def online(monkeypatch):
    """As if the process had just started, with a hub at the address that is given to the returned function."""
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    monkeypatch.setattr(fetch, "PROBE_SECONDS", 0.5)
    for name in ("http_proxy", "https_proxy", "all_proxy", "HTTP_PROXY", "HTTPS_PROXY", "ALL_PROXY"):
        monkeypatch.delenv(name, raising=False)
    return lambda url: monkeypatch.setattr(constants, "ENDPOINT", url)


@pytest.fixture
def server():
    """A hub that answers HEAD with `server.status` and counts how often it was asked."""

    class Handler(BaseHTTPRequestHandler):
        def do_HEAD(self):
            self.server.asked += 1
            self.send_response(self.server.status)
            self.end_headers()

        def log_message(self, *args):
            pass

    hub = HTTPServer(("127.0.0.1", 0), Handler)
    hub.asked, hub.status, hub.url = 0, 200, f"http://127.0.0.1:{hub.server_port}"
    Thread(target=hub.serve_forever, daemon=True).start()
    yield hub
    hub.shutdown()
    hub.server_close()


def test_a_hub_that_answers_is_asked_once(online, server):
    online(server.url)
    assert fetch.hub_available() and fetch.hub_available()
    assert server.asked == 1 and not constants.HF_HUB_OFFLINE


def test_a_hub_that_fails_puts_the_client_offline(online, server):
    online(server.url)
    server.status = 503
    assert not fetch.hub_available() and not fetch.hub_available()
    assert server.asked == 1 and constants.HF_HUB_OFFLINE and huggingface_hub.is_offline_mode()


def test_a_silent_or_absent_hub_costs_little(online):
    with socket.socket() as silent:
        silent.bind(("127.0.0.1", 0))
        silent.listen()
        online(f"http://127.0.0.1:{silent.getsockname()[1]}")
        start = time.monotonic()
        assert not fetch.hub_available()
        assert time.monotonic() - start < 2
    constants.HF_HUB_OFFLINE = False
    fetch._hub_trouble.cache_clear()
    online("not a url")
    assert not fetch.hub_available()


def test_a_look_up_that_hangs_is_not_waited_for(online, monkeypatch):
    monkeypatch.setattr("huggingface_hub.utils.get_session", lambda: time.sleep(3))
    start = time.monotonic()
    assert not fetch.hub_available()
    assert time.monotonic() - start < 2 and "no answer in 0.5 s" in fetch._hub_trouble()


def test_offline_by_environment_asks_nobody(monkeypatch):
    monkeypatch.setattr("huggingface_hub.utils.get_session", lambda: pytest.fail("asked"))
    assert not fetch.hub_available()


def test_a_snapshot_is_recorded_with_revision_and_licence(monkeypatch, tmp_path):
    (tmp_path / "abc123").mkdir()
    (tmp_path / "abc123" / "README.md").write_text("---\nlanguage: en\nlicense: apache-2.0\n---\n", encoding="utf-8")
    monkeypatch.setattr(huggingface_hub, "snapshot_download", lambda name, **options: str(tmp_path / "abc123"))
    folder, record = fetch.hub_snapshot("a/b", "model", ["*.json"])
    assert folder.name == "abc123"
    assert record == {"source": "hub", "origin": "a/b", "revision": "abc123", "licence": "apache-2.0"}


@pytest.mark.parametrize("error", [errors.LocalEntryNotFoundError("nothing"), ConnectionError("cut"), RuntimeError("xet")])
def test_a_snapshot_that_cannot_be_had_is_unavailable(monkeypatch, error):
    def fail(*args, **options):
        raise error

    monkeypatch.setattr(huggingface_hub, "snapshot_download", fail)
    with pytest.raises(Unavailable, match="hub, a/b: HF_HUB_OFFLINE is set; not in its cache"):
        fetch.hub_snapshot("a/b", "model", ["*.json"])


# ---------------------------------------------------------------------------------------------------------------- wheels


@pytest.fixture
def index(monkeypatch, tmp_path):
    """pip finds one small wheel, and nothing else."""
    wheel = tmp_path / "links" / "tiny_asset-1.0-py3-none-any.whl"
    wheel.parent.mkdir()
    with zipfile.ZipFile(wheel, "w") as packed:
        packed.writestr("tiny_asset/data.txt", "cargo")
        packed.writestr("tiny_asset-1.0.dist-info/METADATA", "Metadata-Version: 2.1\nName: tiny-asset\nVersion: 1.0\n"
                        "Requires-Dist: not-there\n")  # fmt: skip
        packed.writestr("tiny_asset-1.0.dist-info/WHEEL", "Wheel-Version: 1.0\nRoot-Is-Purelib: true\nTag: py3-none-any\n")
        packed.writestr("tiny_asset-1.0.dist-info/RECORD", "")
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    monkeypatch.setenv("PIP_FIND_LINKS", str(wheel.parent))
    (tmp_path / "work").mkdir()
    return wheel


def test_a_wheel_is_opened_when_its_hash_is_right(index, tmp_path):
    with fetch.open_wheel("tiny-asset==1.0", sha256_of(index), tmp_path / "work") as wheel:
        assert wheel.read("tiny_asset/data.txt") == b"cargo"
    assert not list((tmp_path / "work").iterdir())


def test_a_wheel_with_another_hash_is_not_opened(index, tmp_path, monkeypatch):
    monkeypatch.setattr(zipfile, "ZipFile", lambda *args: pytest.fail("opened"))
    with pytest.raises(UserError, match=f"SHA-256 is {sha256_of(index)}, expected 0000. It was not opened"):
        with fetch.open_wheel("tiny-asset==1.0", "0000", tmp_path / "work"):
            pass
    assert not list((tmp_path / "work").iterdir())


def test_a_wheel_that_pip_cannot_find_ends_with_its_last_line(index, tmp_path, capfd):
    with pytest.raises(Unavailable, match=r"pip download failed \(ERROR: No matching distribution found for tiny-asset==2.0"):
        with fetch.open_wheel("tiny-asset==2.0", "0000", tmp_path / "work"):
            pass
    assert capfd.readouterr() == ("", "")


def test_without_pip_the_error_says_so(monkeypatch, tmp_path):
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(Unavailable, match=r"this Python has no pip .*ensurepip.*uv pip install pip"):
        with fetch.open_wheel("tiny-asset==1.0", "0000", tmp_path):
            pass


def test_pip_shows_its_bar_on_a_terminal_only(monkeypatch, tmp_path):
    asked = {}

    def run(command, **options):
        asked.update(options, command=command)
        return subprocess.CompletedProcess(command, 1, stderr="")

    monkeypatch.setattr(subprocess, "run", run)
    for terminal, shown in ((True, sys.stderr), (False, subprocess.DEVNULL)):
        monkeypatch.setattr(sys.stderr, "isatty", lambda terminal=terminal: terminal)
        with pytest.raises(Unavailable, match="exit status 1"):
            with fetch.open_wheel("tiny-asset==1.0", "0000", tmp_path):
                pass
        assert asked["stdout"] is shown
    assert asked["command"][0] == sys.executable and "--no-deps" in asked["command"] and not asked.get("shell")


# -------------------------------------------------------------------------------------------------- prepared directories


def build(folder, text="hello"):
    (folder / "config.json").write_text(text, encoding="utf-8")
    return {"source": "test", "files": {"config.json": {"sha256": sha256_of(folder / "config.json")}}}


def slow_build(folder):
    time.sleep(0.3)
    return build(folder, str(time.monotonic_ns()))


def prepare_in_process(target, answers):
    asset = prepare(target, fetch.verify_model, {}, slow_build)
    answers.put((asset.record["fresh"], (asset.path / "config.json").read_text(encoding="utf-8")))


def names(folder):
    return sorted(path.name for path in folder.iterdir())


@pytest.fixture
def target(tmp_path):
    return tmp_path / "data" / "x"


def test_prepared_once_then_left_alone(target):
    asset = prepare(target, fetch.verify_model, {}, build)
    assert isinstance(asset, Asset) and asset.record["fresh"] and asset.record["redone"] is None
    assert names(target) == ["config.json", "manifest.json"] and names(target.parent) == [".x.lock", "x"]
    again = prepare(target, fetch.verify_model, {}, lambda folder: pytest.fail("built again"))
    assert not again.record["fresh"] and again.record["source"] == "test"


@pytest.mark.parametrize(
    "harm, reason",
    [
        (lambda t: (t / "config.json").write_text("hell", encoding="utf-8"), "damaged, its SHA-256"),
        (lambda t: (t / "config.json").unlink(), "config.json: missing"),
        (lambda t: (t / "manifest.json").unlink(), "manifest.json: not found"),
        (lambda t: (t / "manifest.json").write_text('{"format": 1, "fi', encoding="utf-8"), "not valid JSON"),
        (lambda t: (t / "manifest.json").write_text('{"format": 0, "files": {}}', encoding="utf-8"), "not a manifest"),
        (lambda t: (t / "manifest.json").write_text('{"format": 1, "files": ["x"]}', encoding="utf-8"), "not a manifest"),
        (lambda t: (t / "manifest.json").write_text("[1]", encoding="utf-8"), "not a manifest"),
    ],
)
def test_damage_is_noticed_and_made_good(target, harm, reason):
    prepare(target, fetch.verify_model, {}, build)
    harm(target)
    with pytest.raises(UserError, match=reason):
        fetch.verify_model(target)
    asset = prepare(target, fetch.verify_model, {}, build)
    assert asset.record["fresh"] and reason in asset.record["redone"]
    assert fetch.verify_model(target)["source"] == "test" and names(target.parent) == [".x.lock", "x"]


def test_force_and_other_wishes_make_it_anew(target):
    prepare(target, fetch.verify_model, {}, build)
    assert "asked for anew" in prepare(target, fetch.verify_model, {}, build, force=True).record["redone"]
    asset = prepare(target, fetch.verify_model, {"seed": 1}, lambda folder: build(folder) | {"seed": 1})
    assert "made with another seed" in asset.record["redone"]
    assert not prepare(target, fetch.verify_model, {"seed": 1}, build).record["fresh"]


def test_killed_while_building(target):
    unfinished = target.with_name(".x.tmp")
    (unfinished / "deep").mkdir(parents=True)
    (unfinished / "config.json").write_text("half", encoding="utf-8")
    assert prepare(target, fetch.verify_model, {}, build).record["fresh"]
    assert (target / "config.json").read_text(encoding="utf-8") == "hello" and names(target.parent) == [".x.lock", "x"]


def test_killed_between_the_two_renames(target):
    prepare(target, fetch.verify_model, {}, build)
    target.rename(target.with_name(".x.old"))
    asset = prepare(target, fetch.verify_model, {}, lambda folder: pytest.fail("the old one is whole"))
    assert not asset.record["fresh"] and names(target.parent) == [".x.lock", "x"]


@pytest.mark.parametrize("number", [errno.ENOSPC, errno.EROFS, errno.EACCES])
@pytest.mark.parametrize("where", ["build", "manifest", "rename"])
def test_a_failing_disk_harms_nothing(target, monkeypatch, number, where):
    prepare(target, fetch.verify_model, {}, build)

    def fail(*args):
        raise OSError(number, "no luck", str(target))

    if where == "manifest":
        monkeypatch.setattr(fetch, "write_atomic", fail)
    if where == "rename":
        replace = fetch.os.replace
        monkeypatch.setattr(fetch.os, "replace", lambda a, b: fail() if Path(a).name == ".x.tmp" else replace(a, b))
    with pytest.raises(UserError, match=r"no luck. Cannot prepare .* what was there is intact"):
        prepare(target, fetch.verify_model, {}, fail if where == "build" else build, force=True)
    monkeypatch.undo()
    assert fetch.verify_model(target)["source"] == "test" and names(target.parent) == [".x.lock", "x"]


def test_a_directory_that_cannot_be_written_serves_what_is_whole(target, monkeypatch):
    prepare(target, fetch.verify_model, {}, build)
    monkeypatch.setattr("filelock.FileLock", lambda path: pytest.fail("a lock needs to write"))
    assert not prepare(target, fetch.verify_model, {}, build).record["fresh"]


def test_a_file_in_the_way_of_the_data_directory(tmp_path):
    (tmp_path / "data").write_text("", encoding="utf-8")
    with pytest.raises(UserError, match="Cannot prepare"):
        prepare(tmp_path / "data" / "x", fetch.verify_model, {}, build)


def test_what_others_put_there_is_never_removed(target):
    target.mkdir(parents=True)
    (target / "train.tsv").write_text("mine", encoding="utf-8")
    with pytest.raises(UserError, match=r"train.tsv: in the way, it was not prepared here"):
        prepare(target, fetch.verify_model, {}, build, force=True)
    assert names(target) == ["train.tsv"]


def test_an_interrupted_build_leaves_what_was_there(target):
    prepare(target, fetch.verify_model, {}, build)

    def stop(folder):
        build(folder, "half")
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        prepare(target, fetch.verify_model, {}, stop, force=True)
    assert (target / "config.json").read_text(encoding="utf-8") == "hello" and names(target.parent) == [".x.lock", "x"]


def test_two_processes_at_once_prepare_once(target):
    spawn = multiprocessing.get_context("spawn")
    answers = spawn.Queue()
    workers = [spawn.Process(target=prepare_in_process, args=(target, answers)) for _ in range(2)]
    for worker in workers:
        worker.start()
    found = [answers.get(timeout=60) for _ in workers]
    for worker in workers:
        worker.join()
    assert sorted(fresh for fresh, _ in found) == [False, True]
    assert len({text for _, text in found}) == 1 and names(target.parent) == [".x.lock", "x"]
    assert json.loads((target / "manifest.json").read_text(encoding="utf-8"))["name"] == "x"


def test_the_first_that_can_be_had():
    def missing():
        raise Unavailable("a: not here")

    def present():
        return Asset("there", {"name": "b"})

    assert fetch.first_available("x", [missing, present], "none") == ("there", {"name": "b", "tried": ["a: not here"]})
    with pytest.raises(UserError, match=r"x: cannot be had here. Tried: a: not here; a: not here.\nWays out: pray"):
        fetch.first_available("x", [missing, missing], "pray")
