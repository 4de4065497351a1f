"""The script as a user meets it: what it trains and writes, on one process and several, killed and going on, and refused."""

import csv
import gc
import importlib
import importlib.util
import io
import json
import math
import multiprocessing
import os
import re
import shutil
import signal
import socket
import subprocess
import sys
import time
from contextlib import contextmanager, redirect_stdout
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from torch.nn import functional
from torch.nn.parallel import DistributedDataParallel
from transformers import AutoModelForCausalLM, AutoModelForMaskedLM, AutoTokenizer, BertConfig, LlamaConfig, Trainer

import finetune_dense
from common import assets, checkpoint, eval_utils, finetuning, runs, text
from common.blocks import blocks_of
from common.runs import REPOSITORY, read_json
from common.sparse_trainer import WHOLE, SparseTrainer, check_sparsity, last_checkpoint, prunable_weights
from tests.killing import die_at
from tests.test_main_block import sentences
from tests.test_streaming import cut, one_thread  # noqa: F401

SCRIPT = REPOSITORY / "finetune_dense.py"
STEPS, LENGTH, BATCH = 24, 64, 8
PRECISE = 1e-4  # of losses, relative: with several processes the same sum is made in another order


# ------------------------------------------------------------------------------------------------------------- what is run


def random_llama(**changes):
    settings = {"vocab_size": 8192, "hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 2,
                "num_attention_heads": 4, "num_key_value_heads": 2, "max_position_embeddings": 128,
                "tie_word_embeddings": True, "bos_token_id": 0, "eos_token_id": 0, "pad_token_id": 0}  # fmt: skip
    torch.manual_seed(0)
    return AutoModelForCausalLM.from_config(LlamaConfig(**settings | changes))


def prune_(model):
    """Blocks of 16 x 16 at random, three in ten."""
    with torch.no_grad():
        for block in blocks_of(model):
            for linear in block.projections:
                rows, columns = linear.weight.shape
                picked = torch.rand(rows // 16, columns // 16) < 0.3
                linear.weight[picked.repeat_interleave(16, 0).repeat_interleave(16, 1)] = 0
    return model


@pytest.fixture(scope="module")
def tiny(tmp_path_factory):
    """A random Llama, dense and pruned, with the tokenizer of the tiny LM; and a text in three files."""
    folder = tmp_path_factory.mktemp("tiny")
    tokenizer, model = AutoTokenizer.from_pretrained(assets.TINY_LLAMA), random_llama()
    for name in ("dense", "pruned"):
        (model if name == "dense" else prune_(model)).save_pretrained(folder / name)
        tokenizer.save_pretrained(folder / name)
    (folder / "text").mkdir()
    tokens = sum(len(tokenizer(line)["input_ids"]) + 1 for line in sentences(100)) / 100  # of a sentence, with its end
    for seed, (split, n_windows) in enumerate((("train", STEPS * BATCH + 5), ("validation", 10), ("test", 10))):
        lines = sentences(int(n_windows * LENGTH / tokens) + 20, seed)
        (folder / "text" / f"{split}.txt").write_text("\n\n".join(lines))
    return folder


@pytest.fixture(scope="module")
def base(tiny):
    """Flags of a run of two seconds; what comes after them wins."""
    return ["--fast", "--model", tiny / "pruned", "--dataset", tiny / "text", "--eval_text", tiny / "text", "--data_dir",
            tiny / "data", "--dense_model", tiny / "dense", "--block_size", LENGTH, "--batch_size", 1,
            "--effective_batch_size", BATCH, "--max_train_samples", STEPS * BATCH, "--max_eval_samples", 8, "--precision", "32",
            "--device", "cpu", "--distill_from", "none", "--hidden_weight", 0, "--no_freeze_embeddings"]  # fmt: skip


def only_run(out):
    (record,) = (out / "finetune").glob("[!.]*/run.json")
    return record.parent


def run(argv, out):
    finetune_dense.main([*argv, "--out_dir", out])
    folder = only_run(out)
    return folder, read_json(folder / "run.json")


def as_program(argv):
    try:
        runs.run_script(lambda: finetune_dense.main(argv))
    except SystemExit as stop:
        return stop.code or 0
    return 0


def weights(folder):
    return (folder / "model" / "model.safetensors").read_bytes()


def zeros(folder):
    """Where the weights of projections are zero; the row of padding in the embeddings is for everyone to learn."""
    tensors = load_file(folder / "model.safetensors")
    return {name: tensor == 0 for name, tensor in tensors.items() if name.endswith("_proj.weight")}


def same_zeros(one, other):
    return one.keys() == other.keys() and all(torch.equal(one[name], other[name]) for name in one)


def curve(folder, metric="loss"):
    with open(folder / "history.csv", newline="") as file:
        return {int(row["step"]): float(row["value"]) for row in csv.DictReader(file) if row["metric"] == metric}


def assert_same_curves(folder, other, rel=PRECISE):
    for metric in ("loss", "validation_perplexity"):
        one, two = curve(folder, metric), curve(other, metric)
        assert one.keys() == two.keys() and len(one) >= 4
        assert [two[step] for step in one] == pytest.approx(list(one.values()), rel=rel), metric
    assert curve(folder, "sparsity") == curve(other, "sparsity")


def measured(record):
    """Without the bytes: of the model's directory is the trainer's log, where a run with more checkpoints has more lines."""
    return {name: {key: value for key, value in found.items() if key != "bytes"} for name, found in record["metrics"].items()}


@pytest.fixture(scope="module")
def alone(base, tmp_path_factory):
    """One process, left alone: its directory, its record, what it printed."""
    shown = io.StringIO()
    with redirect_stdout(shown):
        folder, record = run(base, tmp_path_factory.mktemp("alone"))
    return folder, record, shown.getvalue()


# ---------------------------------------------------------------------------------------------------------- several processes


def free_port():
    with socket.socket() as server:
        server.bind(("127.0.0.1", 0))
        return server.getsockname()[1]


def main_of_rank(rank, n, port, argv, log, prepare, script):
    """What torchrun starts."""
    file = os.open(f"{log}.{rank}", os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
    for descriptor in (1, 2):
        os.dup2(file, descriptor)
    torch.set_num_threads(1)
    if n > 1:
        os.environ |= {"RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": str(n), "LOCAL_WORLD_SIZE": str(n),
                       "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}  # fmt: skip
    if prepare is not None:
        prepare()
    runs.run_script(lambda: importlib.import_module(script).main(argv))


@pytest.fixture(scope="module")
def started():
    """Runs a script in n processes, and says how they ended."""
    context = multiprocessing.get_context("forkserver")  # one process imports, and all others are its forks
    context.set_forkserver_preload([__name__, "transformers.models.llama.modeling_llama", "peft", "pyarrow.parquet"])

    def start(n, argv, out, prepare=None, script="finetune_dense"):
        port, argv = free_port(), [str(word) for word in (*argv, "--out_dir", out)]
        given = (n, port, argv, f"{out}.log", prepare, script)
        processes = [context.Process(target=main_of_rank, args=(rank, *given)) for rank in range(n)]
        with pytest.MonkeyPatch.context() as patch:
            patch.setenv("OMP_NUM_THREADS", "1")  # as torchrun has it
            for process in processes:
                process.start()
        try:
            for process in processes:
                process.join(240)
        finally:
            for process in processes:
                process.kill()
        shown = [Path(f"{out}.log.{rank}").read_text(errors="replace") for rank in range(n)]
        return [process.exitcode for process in processes], shown

    return start


def ddp_ends_before_its_group():
    """Where DDP is the last to hold its process group, it ends that with the GIL in hand: gloo's thread, which wants it to let
    go of a tensor, is waited for without end, once in twenty times.
    """
    destroy = torch.distributed.destroy_process_group

    def call(*args):
        alive = [found for found in gc.get_objects() if type(found) is DistributedDataParallel]
        assert not alive, "DDP is alive when its process group is destroyed"
        print("the group is ended", flush=True)
        destroy(*args)

    torch.distributed.destroy_process_group = call


@pytest.fixture(scope="module")
def pair(base, started, tmp_path_factory):
    """Two processes, left alone."""
    out = tmp_path_factory.mktemp("pair") / "out"
    ended, shown = started(2, base, out, ddp_ends_before_its_group)
    assert all("the group is ended" in said for said in shown), shown
    assert ended == [0, 0], shown
    return only_run(out), shown


@pytest.mark.parametrize("n", [2, 4])
def test_several_processes_learn_the_same(n, alone, base, request, tmp_path):
    if n == 2:
        folder, shown = request.getfixturevalue("pair")
    else:
        ended, shown = request.getfixturevalue("started")(n, base, tmp_path / "out")
        assert ended == [0] * n, shown
        folder = only_run(tmp_path / "out")
    assert f"({1} x {n} processes x {BATCH // n} forwards)" in shown[0]
    assert {said.replace("the group is ended\n", "") for said in shown[1:]} == {""}, shown  # only the first one speaks
    assert_same_curves(alone[0], folder)
    assert same_zeros(zeros(folder / "model"), zeros(alone[0] / "model"))
    ours, theirs = load_file(folder / "model" / "model.safetensors"), load_file(alone[0] / "model" / "model.safetensors")
    for name, tensor in theirs.items():
        torch.testing.assert_close(ours[name], tensor, rtol=1e-3, atol=1e-4)
    record = read_json(folder / "run.json")
    assert record["config"] == alone[1]["config"] and record["best"]["step"] == alone[1]["best"]["step"]
    assert record["metrics"]["full"]["perplexity"] == pytest.approx(alone[1]["metrics"]["full"]["perplexity"], rel=PRECISE)


def say_what_is_sharded():
    step = SparseTrainer.training_step

    def call(trainer, model, *args):
        if trainer.state.global_step == 0:
            print("weights are", *{type(parameter.data).__name__ for parameter in model.parameters()}, flush=True)
        return step(trainer, model, *args)

    SparseTrainer.training_step = call


@pytest.fixture(scope="module")
def shards_killed(base, started, tmp_path_factory):
    """Two processes with half of the model each, killed in their tenth step."""
    out = tmp_path_factory.mktemp("shards") / "out"
    ended, shown = started(2, [*base, "--fsdp"], out, in_a_step)
    assert ended == [-signal.SIGKILL] * 2, shown
    return out


def test_sharded_is_as_whole(alone, pair, shards_killed, base, started, tmp_path):
    """And where both processes are killed in a step, the same command goes on exactly."""
    argv = [*base, "--fsdp"]
    ended, shown = started(2, argv, tmp_path / "out", say_what_is_sharded)
    assert ended == [0, 0] and ", FSDP2" in shown[0], shown
    assert all("weights are DTensor\n" in said for said in shown), shown
    folder = only_run(tmp_path / "out")
    assert_same_curves(pair[0], folder)
    assert same_zeros(zeros(folder / "model"), zeros(alone[0] / "model"))
    ours, theirs = load_file(folder / "model" / "model.safetensors"), load_file(pair[0] / "model" / "model.safetensors")
    assert ours.keys() == theirs.keys()
    for name, tensor in theirs.items():
        torch.testing.assert_close(ours[name], tensor, rtol=1e-3, atol=1e-4)
    shutil.copytree(shards_killed, tmp_path / "again")
    ended, shown = started(2, argv, tmp_path / "again")
    assert ended == [0, 0] and "/checkpoint-6\n" in shown[0], shown
    assert weights(only_run(tmp_path / "again")) == weights(folder)


def test_it_goes_on_with_another_number_of_processes(alone, base, started, tmp_path, capsys):
    ended, shown = started(2, base, tmp_path / "out", in_a_step)
    assert ended == [-signal.SIGKILL] * 2, shown
    folder, _ = run(base, tmp_path / "out")
    assert "/checkpoint-6\n" in capsys.readouterr().out
    assert_same_curves(alone[0], folder)
    assert same_zeros(zeros(folder / "model"), zeros(alone[0] / "model"))


def test_sharded_it_goes_on_with_another_number_of_processes(pair, shards_killed, base, started, tmp_path):
    shutil.copytree(shards_killed, tmp_path / "out")
    ended, shown = started(4, [*base, "--fsdp"], tmp_path / "out")
    assert ended == [0] * 4 and "/checkpoint-6\n" in shown[0], shown
    assert_same_curves(pair[0], only_run(tmp_path / "out"))


def test_random_rounding_sharded_and_killed(base, started, tiny, tmp_path):
    pytest.importorskip("torchao", reason="torchao is not installed (requirements-extra.txt)")
    argv = [*base, "--fsdp", "--optim", "adamw_stochastic", "--precision", "bf16", "--num_epochs", 0.5, "--weight_decay", 0.1]
    ended, shown = started(2, argv, tmp_path / "out", in_a_step_of_8_bits)
    assert ended == [-signal.SIGKILL] * 2, shown
    ended, shown = started(2, argv, tmp_path / "out", not_compiled)
    assert ended == [0, 0] and "resumed from" in shown[0], shown
    ended, shown = started(2, argv, tmp_path / "whole", not_compiled)
    assert ended == [0, 0], shown
    folder = only_run(tmp_path / "whole")
    assert weights(only_run(tmp_path / "out")) == weights(folder)
    assert same_zeros(zeros(folder / "model"), zeros(tiny / "pruned"))


def test_adapters_sharded_and_killed(base, started, tiny, tmp_path):
    argv = [*base, "--num_epochs", 0.5, *LORA, "--lora_dropout", 0]
    ended, shown = started(2, [*argv, "--fsdp"], tmp_path / "out", in_a_step)
    assert ended == [-signal.SIGKILL] * 2, shown
    ended, shown = started(2, [*argv, "--fsdp"], tmp_path / "out")
    assert ended == [0, 0] and "resumed from" in shown[0], shown
    one, _ = run(argv, tmp_path / "one")
    assert_same_curves(one, only_run(tmp_path / "out"))
    assert same_zeros(zeros(only_run(tmp_path / "out") / "model"), zeros(tiny / "pruned"))


def test_sharded_checkpoints_are_for_sharded_training(shards_killed, base, tmp_path, capsys):
    shutil.copytree(shards_killed, tmp_path / "out")
    assert as_program([*base, "--out_dir", tmp_path / "out"]) == 2
    printed = capsys.readouterr().err
    assert printed.startswith("error: ") and "checkpoint-6: was saved with --fsdp" in printed and printed.count("\n") == 1
    assert "--resume never" in printed and checkpoint_of(tmp_path / "out") == 6


def test_sharded_in_half_precision(base, started, tmp_path):
    """Products are in bf16, and neither the loss that is returned nor the sum of gradients: perplexities would be 1 % off."""
    argv = [*base, "--precision", "bf16-mixed", "--num_epochs", 0.35]
    one, _ = run(argv, tmp_path / "one")
    ended, shown = started(2, [*argv, "--fsdp", "--gradient_checkpointing"], tmp_path / "two", say_what_is_sharded)
    assert ended == [0, 0] and "weights are DTensor\n" in shown[0], shown
    assert_same_curves(one, only_run(tmp_path / "two"), rel=3e-3)


def torchrun(argv, out, *more, n=2, **settings):
    command = [sys.executable, "-m", "torch.distributed.run", "--nproc_per_node", n, *(more or ["--standalone"]), SCRIPT, *argv,
               "--out_dir", out]  # fmt: skip
    environment = os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": str(REPOSITORY)} | settings.pop("env", {})
    before = settings.pop("before", [])
    return subprocess.Popen([str(word) for word in (*before, *command)], env=environment, stdout=subprocess.PIPE,
                            stderr=subprocess.STDOUT, text=True, start_new_session=True, **settings)  # fmt: skip


def until(condition, process, seconds=120):
    """Waits for something that a process brings about."""
    end = time.monotonic() + seconds
    while not condition():
        if process.poll() is not None or time.monotonic() > end:
            kill_all(process)
            pytest.fail(f"it did not come to that: {process.communicate()[0][-3000:]}")
        time.sleep(0.01)


def kill_all(process):
    for number in processes_of(process.args[-1]):
        os.kill(number, signal.SIGKILL)
    process.kill()


def processes_of(out):
    """The processes that were started with this --out_dir, and their environments' ranks (None: torchrun)."""
    found = {}
    for folder in Path("/proc").glob("[0-9]*"):
        try:
            words = (folder / "cmdline").read_bytes().split(b"\0")
            state = (folder / "stat").read_text().rsplit(")", 1)[1].split()[0]
            ranks = re.search(rb"(?:^|\0)RANK=(\d+)", (folder / "environ").read_bytes())
        except OSError:
            continue
        if str(out).encode() in words and state != "Z":
            found[int(folder.name)] = ranks and int(ranks[1])
    return found


def logged(out, step):
    """A line of this step, or of a later one, is in the history."""

    def condition():
        lines = [line for path in (out / "finetune").glob("*/history.csv") for line in path.read_text().splitlines()]
        steps = [line.partition(",")[0] for line in lines]
        return any(int(found) >= step for found in steps if found.isdigit())

    return condition


def checkpoint_of(out):
    found = last_checkpoint(only_run(out) / "checkpoint")
    return 0 if found is None else int(found.name.removeprefix("checkpoint-"))


needs_proc = pytest.mark.skipif(not Path("/proc/self/environ").exists(), reason="finds processes by /proc")


@needs_proc
def test_one_of_two_is_killed(pair, base, started, tmp_path):
    """SIGKILL, as by a machine that is out of memory: the other one ends too, and the same command goes on."""
    argv, out = [*base, "--save_every", 5], tmp_path / "out"
    process = torchrun(argv, out)
    until(logged(out, 6), process)
    (victim,) = [number for number, rank in processes_of(out).items() if rank == 1]
    os.kill(victim, signal.SIGKILL)
    shown = process.communicate(timeout=120)[0]
    assert process.returncode != 0 and not processes_of(out), shown
    step = checkpoint_of(out)
    assert 5 <= step < STEPS and not (only_run(out) / "model").exists()
    ended, shown = started(2, argv, out)
    assert ended == [0, 0] and f"/checkpoint-{step}\n" in shown[0], shown
    assert weights(only_run(out)) == weights(pair[0])
    record = read_json(only_run(out) / "run.json")
    assert record["status"] == "finished" and measured(record) == measured(read_json(pair[0] / "run.json"))


@needs_proc
def test_ctrl_c_reaches_every_process(pair, base, started, tmp_path):
    argv, out = [*base, "--save_every", 1000], tmp_path / "out"
    process = torchrun(argv, out)
    until(logged(out, 6), process)
    assert sorted(processes_of(out).values(), key=str) == [0, 1, None]
    os.killpg(process.pid, signal.SIGINT)
    shown = process.communicate(timeout=120)[0]
    assert process.returncode != 0 and not processes_of(out), shown
    folder, step = only_run(out), checkpoint_of(out)
    assert 6 <= step < STEPS and (folder / "checkpoint" / f"checkpoint-{step}" / WHOLE).exists()
    assert read_json(folder / "run.json")["status"] == "interrupted"
    assert f"interrupted. The same command goes on from step {step} ({folder})" in shown
    ended, shown = started(2, argv, out)
    assert ended == [0, 0] and f"/checkpoint-{step}\n" in shown[0], shown
    assert weights(folder) == weights(pair[0]) and read_json(folder / "run.json")["status"] == "finished"
    assert curve(folder, "validation_perplexity") == curve(pair[0], "validation_perplexity")
    assert curve(folder).keys() - curve(pair[0]).keys() <= {step}  # it logged once more, where it was stopped


@contextmanager
def two_machines():
    """Two network namespaces, joined by a veth pair: their names, and their addresses."""
    names, ends = [f"ft{os.getpid()}{end}" for end in "ab"], [f"v{os.getpid()}{end}" for end in "ab"]
    addresses = ["10.213.77.1", "10.213.77.2"]

    def ip(*words):
        done = subprocess.run(["ip", *words], capture_output=True, text=True, check=False)
        if done.returncode:
            pytest.skip(f"no network namespaces here: ip {' '.join(words)}: {done.stderr.strip()}")

    if shutil.which("ip") is None:
        pytest.skip("no network namespaces here: there is no ip (iproute2)")
    try:
        for name in names:
            ip("netns", "add", name)
        ip("link", "add", ends[0], "netns", names[0], "type", "veth", "peer", "name", ends[1], "netns", names[1])
        for name, end, address in zip(names, ends, addresses, strict=True):
            ip("-n", name, "address", "add", f"{address}/24", "dev", end)
            ip("-n", name, "link", "set", end, "up")
            ip("-n", name, "link", "set", "lo", "up")
        yield list(zip(names, ends, addresses, strict=True))
    finally:
        for name in names:  # their links go with them
            subprocess.run(["ip", "netns", "delete", name], capture_output=True, check=False)


def test_two_machines_learn_the_same(alone, base, tmp_path):
    """Only the wire between them joins the two: each has its own loopback. They share the disk."""
    out = tmp_path / "out"
    with two_machines() as machines:
        started = []
        for rank, (name, end, address) in enumerate(machines):
            where = ["--nnodes", 2, "--node_rank", rank, "--rdzv_backend", "c10d", "--rdzv_endpoint", f"{machines[0][2]}:29400",
                     "--rdzv_id", "a", "--rdzv_conf", f"is_host={1 - rank}", "--local_addr", address]  # fmt: skip
            inside, interface = ["ip", "netns", "exec", name], {"GLOO_SOCKET_IFNAME": end}
            started.append(torchrun(base, out, *where, n=1, before=inside, env=interface))
        try:
            shown = [process.communicate(timeout=240)[0] for process in started]
        finally:
            for process in started:
                kill_all(process)
    assert [process.returncode for process in started] == [0, 0], shown
    assert "(1 x 2 processes x 4 forwards)" in shown[0] + shown[1]
    assert_same_curves(alone[0], only_run(out))
    assert same_zeros(zeros(only_run(out) / "model"), zeros(alone[0] / "model"))


# ---------------------------------------------------------------------------------------------------------- one process, killed


def in_a_step():
    """In the tenth: a process of n takes BATCH / n forwards a step."""
    die_at(SparseTrainer, "training_step", 9 * BATCH // int(os.environ.get("WORLD_SIZE", 1)) + 2)


def before_a_checkpoint():
    die_at(SparseTrainer, "training_step", 2 * BATCH)


def checkpoint_half_kept():
    die_at(SparseTrainer, "_save_optimizer_and_scheduler", 3, after=True)


def checkpoint_not_marked():
    die_at(Trainer, "_save_checkpoint", 3, after=True)


def while_writing():
    die_at(checkpoint, "save_model", 1)


def while_measuring():
    die_at(eval_utils, "evaluate_perplexity", 2)


def in_the_fifteenth_step():
    die_at(SparseTrainer, "training_step", 14 * BATCH + 2)


@pytest.mark.parametrize("moment", [in_the_fifteenth_step, while_writing], ids=lambda moment: moment.__name__)
def test_patience_is_not_renewed_by_a_kill(moment, base, started, tmp_path):
    """At a rate of zero no look is better than the first one, so the third one is the last."""
    argv = [*base, "--learning_rate", 0, "--patience", 2]
    whole, record = run(argv, tmp_path / "whole")
    assert [*curve(whole, "validation_perplexity")] == [6, 12, 18] and record["best"]["step"] == 6
    ended, shown = started(1, argv, tmp_path / "out", moment)
    assert ended == [-signal.SIGKILL], shown
    folder, again = run(argv, tmp_path / "out")
    assert curve(folder, "validation_perplexity") == curve(whole, "validation_perplexity")
    assert again["best"] == record["best"] and weights(folder) == weights(whole)


#  the checkpoint of which step is whole by then, with one every five steps and at every look
MOMENTS = {before_a_checkpoint: None, in_a_step: 6, checkpoint_half_kept: 6, checkpoint_not_marked: 6, while_writing: 24,
           while_measuring: "trained"}  # fmt: skip


@pytest.mark.parametrize("moment", MOMENTS, ids=lambda moment: moment.__name__)
def test_a_killed_run_goes_on_exactly(moment, alone, base, started, tmp_path, capsys):
    argv, out = [*base, "--save_every", 5], tmp_path / "out"
    ended, shown = started(1, argv, out, moment)
    assert ended == [-signal.SIGKILL], shown
    folder, whole = only_run(out), MOMENTS[moment]
    assert read_json(folder / "run.json")["status"] == "running"
    again, record = run(argv, out)
    told = capsys.readouterr().out
    if whole == "trained":
        assert "(trained before; " in told and "Step " not in told
    else:
        assert ("resumed from" in told) == (whole is not None) and (whole is None or f"/checkpoint-{whole}\n" in told), told
    assert again == folder and record["status"] == "finished"
    assert weights(folder) == weights(alone[0])
    assert measured(record) == measured(alone[1]) and record["best"] == alone[1]["best"]
    assert sorted(path.name for path in folder.iterdir()) == ["history.csv", "model", "run.json"]
    wanted = curve(alone[0], "validation_perplexity")
    assert curve(folder, "validation_perplexity") == wanted and curve(folder)[STEPS] == curve(alone[0])[STEPS]


# ------------------------------------------------------------------------------------------------------------- what is made

BARE = """
import sys, torch, transformers
sys.path[:] = [p for p in sys.path if p]
try:
    import common
    sys.exit("the repository is visible")
except ImportError:
    pass
torch.set_num_threads(1)
for folder in sys.argv[1:]:
    model = transformers.AutoModelForCausalLM.from_pretrained(folder).eval()
    ids = transformers.AutoTokenizer.from_pretrained(folder)("the court of the river says", return_tensors="pt")["input_ids"]
    with torch.no_grad():
        torch.save((ids, model(ids).logits, sum(int((p == 0).sum()) for p in model.parameters())), folder + "/said.pt")
"""


def perplexity(directory, tiny, split="test", length=128):
    """By hand: windows that do not overlap, the last one shorter."""
    model = AutoModelForCausalLM.from_pretrained(directory, dtype=torch.float32).eval()
    source = text.prepare_text(str(tiny / "text"), tiny / "data")
    ids = torch.from_numpy(text.token_stream(source.path, split, AutoTokenizer.from_pretrained(directory)).astype("int64"))
    total = n = 0
    with torch.no_grad():
        for window in ids.split(length):
            if len(window) > 1:
                logits = model(window[None]).logits[0, :-1]
                total += float(functional.cross_entropy(logits.double(), window[1:], reduction="sum"))
                n += len(window) - 1
    return math.exp(total / n), n


def validation_loss(directory, tiny):
    """Of the windows that the training looks at."""
    model = AutoModelForCausalLM.from_pretrained(directory).eval()
    source = text.prepare_text(str(tiny / "text"), tiny / "data")
    stream = text.token_stream(source.path, "validation", AutoTokenizer.from_pretrained(directory))
    windows = finetuning.Windows(stream, LENGTH, 8)
    ids = torch.stack([windows[i]["input_ids"] for i in range(8)])
    with torch.no_grad():
        return float(functional.cross_entropy(model(ids).logits[:, :-1].flatten(0, 1).double(), ids[:, 1:].flatten()))


def test_what_is_said_and_recorded(alone, tiny):
    folder, record, shown = alone
    pruned = AutoModelForCausalLM.from_pretrained(tiny / "pruned")
    n, sparsity = sum(p.numel() for p in pruned.parameters()), check_sparsity(pruned)
    assert 0.25 < sparsity < 0.35
    for line in ("*** Starting sparse full fine-tuning ***", f"Initial model sparsity: {sparsity:.4f}",
                 f"Trainable params: {n:,} || All params: {n:,} || Trainable%: 100.00",
                 f"training     full, {STEPS} steps of {BATCH} windows (1 x 1 processes x {BATCH} forwards)",
                 f"model   {folder / 'model'}", f"record  {folder / 'run.json'}"):  # fmt: skip
        assert line in shown.splitlines(), line
    losses = {int(step): float(loss) for step, loss in re.findall(r"^Step (\d+): loss=(\d+\.\d{4})$", shown, re.MULTILINE)}
    assert {10, 20} < set(losses) and losses == {step: round(loss, 4) for step, loss in curve(folder).items()}
    assert losses[STEPS] < losses[6] - 0.5  # it learns
    looks = re.findall(r"^Step (\d+): validation perplexity=([\d.]+) sparsity=([\d.]+)$", shown, re.MULTILINE)
    assert [int(step) for step, *_ in looks] == [6, 12, 18, 24] and {found for *_, found in looks} == {f"{sparsity:.4f}"}

    assert record["status"] == "finished" and record["sparsity"] == {"before": sparsity, "after": sparsity, "zeros_lost": 0}
    assert [found["name"] for found in record["projections"]] == list(prunable_weights(pruned))
    assert len(record["projections"]) == 14
    for found in record["projections"]:
        share = float((pruned.get_parameter(found["name"]) == 0).double().mean())
        assert found["sparsity"] == found["sparsity_before"] == pytest.approx(share, abs=1e-9)
    config, resolved = record["config"], {"method": "full", "learning_rate": 5e-4, "effective_batch_size": BATCH}
    assert config.items() >= resolved.items()
    assert config["seed"] == 0 and [asset["name"].split("-")[0] for asset in config["assets"]] == ["pruned", "text"]
    assert sorted(record["timings"]) == ["measuring", "training", "writing"]
    assert sorted(path.name for path in folder.iterdir()) == ["history.csv", "model", "run.json"]  # no checkpoint is left


def test_another_place_for_a_trained_model_is_no_new_training(alone, base, tmp_path, capsys):
    shutil.copytree(alone[0].parent.parent, tmp_path / "out")
    folder, record = run([*base, "--save", tmp_path / "there"], tmp_path / "out")
    assert "Step " not in capsys.readouterr().out and record["model_dir"] == str(tmp_path / "there")
    assert (tmp_path / "there" / "model.safetensors").read_bytes() == weights(alone[0])
    assert measured(record) == measured(alone[1]) and weights(folder) == weights(alone[0])


def test_the_best_model_is_kept(alone, tiny):
    folder, record, _ = alone
    looks = curve(folder, "validation_perplexity")
    best = min(looks, key=looks.get)
    assert record["best"]["step"] == best
    assert math.exp(record["best"]["validation_loss"]) == pytest.approx(looks[best], rel=1e-9)
    state = read_json(folder / "model" / "trainer_state.json")
    assert state["global_step"] == STEPS and state["best_metric"] == record["best"]["validation_loss"]
    assert validation_loss(folder / "model", tiny) == pytest.approx(record["best"]["validation_loss"], rel=1e-5)


def test_the_table_of_perplexities(alone, tiny):
    folder, record, shown = alone
    models = {"dense": tiny / "dense", "pruned": tiny / "pruned", "full": folder / "model"}
    assert list(record["metrics"]) == list(models)
    for name, directory in models.items():
        found, (wanted, n) = record["metrics"][name], perplexity(directory, tiny)
        assert found["perplexity"] == pytest.approx(wanted, rel=1e-4) and found["n_tokens"] == n
        model = AutoModelForCausalLM.from_pretrained(directory)
        assert found["sparsity"] == check_sparsity(model)
        assert re.search(rf"{wanted:.2f}", shown.partition("Step 24")[2].replace(",", "")), name
    assert record["metrics"]["full"]["perplexity"] < 0.9 * record["metrics"]["pruned"]["perplexity"]
    measured = record["evaluation"]
    assert measured["token_length"] == 128 and measured["split"] == "test" and measured["text"].startswith("text")


def test_it_loads_anywhere_with_its_zeros(alone, loras, tiny, tmp_path):
    (tmp_path / "bare.py").write_text(BARE)
    saved = [alone[0] / "model", loras["sparse"][0] / "model"]
    command = [sys.executable, "-I", tmp_path / "bare.py", *saved]
    subprocess.run(command, check=True, cwd=tmp_path, timeout=120, capture_output=True)
    pruned = zeros(tiny / "pruned")
    for folder in saved:
        ids, logits, n = torch.load(folder / "said.pt", weights_only=True)
        (folder / "said.pt").unlink()
        model = AutoModelForCausalLM.from_pretrained(folder).eval()
        with torch.no_grad():
            torch.testing.assert_close(model(ids).logits, logits, rtol=1e-5, atol=1e-5)
        assert same_zeros(zeros(folder), pruned) and n >= sum(int(tensor.sum()) for tensor in pruned.values())
        files = {path.name for path in folder.iterdir()}
        assert {"model.safetensors", "config.json", "generation_config.json", "tokenizer.json", "trainer_state.json"} <= files
        assert not any(name.endswith((".bin", ".pt", ".pth")) for name in files)
        (stage,) = checkpoint.compression_stages(folder)
        assert stage["asked"]["script"] == "finetune_dense.py" and stage["asked"]["block_size"] == LENGTH
        assert model.config.use_cache  # it generates as it did


def test_a_finished_run_is_not_trained_again(alone, base, monkeypatch, capsys):
    for owner, name in ((finetune_dense, "train"), (finetuning, "perplexities"), (finetune_dense, "write")):
        monkeypatch.setattr(owner, name, lambda *_: pytest.fail("again"))
    before = {path: path.stat().st_mtime_ns for path in alone[0].rglob("*")}
    folder, record = run(base, alone[0].parent.parent)
    shown = capsys.readouterr().out
    assert folder == alone[0] and record == alone[1] and before == {path: path.stat().st_mtime_ns for path in folder.rglob("*")}
    assert "(trained before; " in shown and shown.splitlines()[-1] == f"record  {folder / 'run.json'}"


def test_other_windows_are_measured_and_nothing_is_trained(alone, base, tmp_path, monkeypatch):
    monkeypatch.setattr(finetune_dense, "train", lambda *_: pytest.fail("again"))
    shutil.copytree(alone[0], tmp_path / "finetune" / alone[0].name)
    _, record = run([*base, "--token_length", 32], tmp_path)
    assert (record["evaluation"]["token_length"], alone[1]["evaluation"]["token_length"]) == (32, 128)
    assert record["metrics"]["full"]["perplexity"] != alone[1]["metrics"]["full"]["perplexity"]
    assert read_json(only_run(tmp_path) / "run.json") == record | {"status": "finished"}
    assert run(base, tmp_path)[1]["metrics"] == alone[1]["metrics"]


def test_a_checkpoint_that_fills_the_disk(alone, base, tmp_path, monkeypatch, capsys):
    def filled(*_, **__):
        raise RuntimeError("[enforce fail at inline_container.cc:672] . unexpected pos 64 vs 0")  # as torch.save has it

    with monkeypatch.context() as patch:
        patch.setattr(SparseTrainer, "_save_optimizer_and_scheduler", filled)
        assert as_program([*base, "--out_dir", tmp_path]) == 2
    printed = capsys.readouterr().err.splitlines()[-1]
    assert printed.startswith(f"error: {only_run(tmp_path)}: could not write a checkpoint") and "Free some space" in printed
    assert read_json(only_run(tmp_path) / "run.json")["status"] == "failed"
    assert weights(run(base, tmp_path)[0]) == weights(alone[0])


def test_what_changes_no_result_changes_none(alone, base, tmp_path, capsys):
    """Other forwards of the same batch, checkpointing, a place of one's own: the same run."""
    more = ["--batch_size", 4, "--gradient_checkpointing", "--save", tmp_path / "mine", "--save_every", 7]
    folder, record = run([*base, *more], tmp_path / "out")
    assert folder.name == alone[0].name and record["config"] == alone[1]["config"]
    assert "(4 x 1 processes x 2 forwards)" in capsys.readouterr().out
    assert curve(folder)[6] == pytest.approx(curve(alone[0])[6], rel=PRECISE)
    assert curve(folder, "validation_perplexity") == pytest.approx(curve(alone[0], "validation_perplexity"), rel=PRECISE)
    assert record["model_dir"] == str(tmp_path / "mine") and not (folder / "model").exists()
    assert same_zeros(zeros(tmp_path / "mine"), zeros(alone[0] / "model"))


def test_distillation_does_not_depend_on_the_forwards_of_a_batch(base, tiny, tmp_path):
    """Nor on the processes that share it: eight windows at once and one by one give the same curve."""
    argv = [*base, "--num_epochs", 0.5, "--distill_from", tiny / "dense", "--distill_weight", 0.7, "--hidden_weight", 3]
    (one, _), (eight, _) = (run([*argv, "--batch_size", size], tmp_path / str(size)) for size in (1, 8))
    assert_same_curves(one, eight)


def test_frozen_embeddings_stay_as_they_are(base, tiny, started, tmp_path):
    """In one process and sharded over two, which learn the same; all else learns."""
    argv = [flag for flag in base if flag != "--no_freeze_embeddings"]  # which is the preset of --fast
    argv += ["--num_epochs", 0.5, "--distill_from", tiny / "dense"]
    folder, _ = run(argv, tmp_path / "one")
    before, after = (load_file(path / "model.safetensors") for path in (tiny / "pruned", folder / "model"))
    moved = {name for name, tensor in before.items() if not torch.equal(tensor, after[name])}
    assert before.keys() - moved == {"model.embed_tokens.weight"}
    ended, shown = started(2, [*argv, "--fsdp"], tmp_path / "two")
    assert ended == [0, 0], shown
    assert_same_curves(folder, only_run(tmp_path / "two"))
    assert torch.equal(load_file(only_run(tmp_path / "two") / "model" / "model.safetensors")["model.embed_tokens.weight"],
                       before["model.embed_tokens.weight"])  # fmt: skip


def joined(flags):
    return " ".join(map(str, flags)).replace("/", "_")


@pytest.mark.parametrize("flags", [["--precision", "bf16"], ["--precision", "bf16-mixed", "--optim", "adafactor"],
                                   ["--optim", "sgd", "--learning_rate", 0.1, "--weight_decay", 0.1],
                                   ["--distill_from", "DENSE", "--distill_weight", 0.5, "--scheduler", "linear"],
                                   ["--optim", "muon"]], ids=joined)  # fmt: skip
def test_other_ways_to_train(flags, base, tiny, tmp_path):
    flags = [str(tiny / "dense") if flag == "DENSE" else flag for flag in flags]
    folder, record = run([*base, "--num_epochs", 0.5, *flags], tmp_path)
    assert same_zeros(zeros(folder / "model"), zeros(tiny / "pruned")) and record["sparsity"]["zeros_lost"] == 0
    looks = list(curve(folder, "validation_perplexity").values())
    assert len(looks) == 4 and looks[-1] < 0.99 * looks[0]
    stored = load_file(folder / "model" / "model.safetensors")
    assert {tensor.dtype for tensor in stored.values()} == {torch.float32}  # as the model that it came from


def test_curves_for_tensorboard(base, tmp_path):
    """They outlive the checkpoints, and are those of history.csv."""
    event_accumulator = pytest.importorskip("tensorboard.backend.event_processing.event_accumulator")
    folder, _ = run([*base, "--num_epochs", 0.5, "--report_to", "tensorboard"], tmp_path)
    events = event_accumulator.EventAccumulator(str(folder / "tensorboard")).Reload()
    assert {"loss", "validation_perplexity"} <= set(events.Tags()["scalars"])
    for metric in ("loss", "validation_perplexity"):
        shown = {event.step: event.value for event in events.Scalars(metric)}
        assert shown == pytest.approx(curve(folder, metric), rel=1e-6) and len(shown) >= 2


def not_compiled():
    torch.compile = lambda function, **_: function  # torchao compiles its step, which takes a minute


def in_a_step_of_8_bits():
    not_compiled()
    in_a_step()


def test_rounding_at_random_keeps_small_updates(base, started, tiny, tmp_path):
    """bf16 weights end where fp32 ones do; where every step rounds to the nearest they stay behind."""
    pytest.importorskip("torchao", reason="torchao is not installed (requirements-extra.txt)")
    argv, ends = [*base, "--num_epochs", 0.5, "--learning_rate", 1e-4, "--n_evaluations", 1], {}
    for name, flags in {"fp32": [], "nearest": ["--precision", "bf16"],
                        "random": ["--precision", "bf16", "--optim", "adamw_stochastic"]}.items():  # fmt: skip
        ended, shown = started(1, [*argv, *flags], tmp_path / name, not_compiled)
        assert ended == [0] and ("note: bf16 weights round" in shown[0]) == (name == "nearest"), shown
        folder = only_run(tmp_path / name)
        ends[name] = curve(folder, "validation_perplexity").popitem()[1]
        assert same_zeros(zeros(folder / "model"), zeros(tiny / "pruned"))
    assert abs(ends["random"] - ends["fp32"]) < 0.3 * abs(ends["nearest"] - ends["fp32"]), ends


def test_8_bit_adamw(base, started, tiny, tmp_path):
    """Its states are rounded, so a weight of zero would move; killed and going on as all others."""
    pytest.importorskip("torchao", reason="torchao is not installed (requirements-extra.txt)")
    argv = [*base, "--optim", "adamw_8bit", "--num_epochs", 0.5]
    ended, shown = started(1, argv, tmp_path / "out", in_a_step_of_8_bits)
    assert ended == [-signal.SIGKILL], shown
    ended, shown = started(1, argv, tmp_path / "out", not_compiled)
    assert ended == [0] and "/checkpoint-9\n" in shown[0], shown
    folder = only_run(tmp_path / "out")
    looks = list(curve(folder, "validation_perplexity").values())
    assert looks[-1] < 0.9 * looks[0] and same_zeros(zeros(folder / "model"), zeros(tiny / "pruned"))


def test_muon_on_two_processes_and_killed(base, started, tiny, tmp_path):
    argv = [*base, "--optim", "muon", "--num_epochs", 0.5]
    one, _ = run(argv, tmp_path / "one")
    ended, shown = started(1, argv, tmp_path / "killed", in_a_step)
    assert ended == [-signal.SIGKILL], shown
    assert weights(run(argv, tmp_path / "killed")[0]) == weights(one)
    ended, shown = started(2, argv, tmp_path / "two")
    assert ended == [0, 0], shown
    assert_same_curves(one, only_run(tmp_path / "two"), 1e-3)  # its products are in bf16
    assert same_zeros(zeros(one / "model"), zeros(only_run(tmp_path / "two") / "model"))


def test_the_fast_preset_learns_from_the_model_that_was_pruned(base, tiny, tmp_path, capsys):
    argv = base[: base.index("--distill_from")]
    _, record = run([*argv, "--num_epochs", 0.1], tmp_path / "named")
    assert (record["config"]["distill_from"], record["config"]["hidden_weight"]) == (str(tiny / "dense"), 10)
    argv[argv.index("--dense_model") : argv.index("--dense_model") + 2] = []
    capsys.readouterr()
    _, record = run([*argv, "--num_epochs", 0.1], tmp_path / "nobody")
    assert record["config"]["distill_from"] is None and "dense" not in record["metrics"]
    assert f"note: no record names the dense model of {tiny / 'pruned'}" in capsys.readouterr().out


def test_harm_is_told(base, tmp_path, capsys):
    note = "note: training made it worse. Try a lower --learning_rate"
    _, record = run([*base, "--learning_rate", 0.9, "--num_epochs", 0.2], tmp_path / "harmed")
    assert record["metrics"]["full"]["perplexity"] > record["metrics"]["pruned"]["perplexity"]
    assert note in capsys.readouterr().out
    _, record = run(base, tmp_path / "healed")
    assert record["metrics"]["full"]["perplexity"] < record["metrics"]["pruned"]["perplexity"]
    assert note not in capsys.readouterr().out


def test_distillation_in_two_processes(base, started, tiny, tmp_path):
    argv = [*base, "--num_epochs", 0.5, "--distill_from", tiny / "dense", "--distill_weight", 0.7, "--temperature", 2]
    one, _ = run(argv, tmp_path / "one")
    ended, shown = started(2, argv, tmp_path / "two")
    assert ended == [0, 0], shown
    assert_same_curves(one, only_run(tmp_path / "two"))


def test_early_stopping(base, tmp_path, capsys):
    folder, record = run([*base, "--patience", 1, "--min_delta", 50], tmp_path)  # nothing is so much better
    assert list(curve(folder, "validation_perplexity")) == [6, 12] and record["best"]["step"] == 12
    assert record["status"] == "finished" and "metrics" in record
    assert read_json(folder / "model" / "trainer_state.json")["global_step"] == 12


# ------------------------------------------------------------------------------------------------------------------- LoRA


LORA = ["--method", "lora", "--learning_rate", 5e-3, "--gradient_checkpointing"]


@pytest.fixture(scope="module")
def loras(alone, base, tmp_path_factory):
    """Beside the run of all weights, in its directory: by merge, the directory, the record, what was printed."""
    found = {}
    for merge in ("sparse", "plain"):
        shown, out = io.StringIO(), tmp_path_factory.mktemp(f"lora_{merge}")
        shutil.copytree(alone[0].parent.parent, out, dirs_exist_ok=True)
        with redirect_stdout(shown):
            finetune_dense.main([*base, *LORA, "--merge", merge, "--out_dir", out])
        (path,) = [path for path in (out / "finetune").glob("[!.]*/run.json") if read_json(path)["config"]["method"] == "lora"]
        found[merge] = path.parent, read_json(path), shown.getvalue()
    return found


def test_lora_keeps_the_zeros(loras, tiny):
    folder, record, shown = loras["sparse"]
    pruned = AutoModelForCausalLM.from_pretrained(tiny / "pruned")
    total = sum(p.numel() for p in pruned.parameters())
    trained = sum(8 * sum(weight.shape) for weight in prunable_weights(pruned).values())
    assert "*** Starting sparse LoRA fine-tuning ***" in shown
    assert (f"Trainable params: {trained:,} || All params: {total + trained:,} || "
            f"Trainable%: {100 * trained / (total + trained):.2f}") in shown  # fmt: skip
    assert record["sparsity"] == {"before": check_sparsity(pruned), "after": check_sparsity(pruned), "zeros_lost": 0}
    after, before = load_file(folder / "model" / "model.safetensors"), load_file(tiny / "pruned" / "model.safetensors")
    assert same_zeros(zeros(folder / "model"), zeros(tiny / "pruned"))
    for name, tensor in before.items():
        assert torch.equal(tensor, after[name]) == (name not in prunable_weights(pruned)), name
    assert record["metrics"]["lora"]["perplexity"] < record["metrics"]["pruned"]["perplexity"]
    assert validation_loss(folder / "model", tiny) == pytest.approx(record["best"]["validation_loss"], rel=1e-4)  # merged


def test_a_plain_merge_says_what_it_lost(loras, tiny):
    folder, record, shown = loras["plain"]
    before, after = zeros(tiny / "pruned"), zeros(folder / "model")
    lost = sum(int((before[name] & ~after[name]).sum()) for name in before)
    assert record["sparsity"]["zeros_lost"] == lost > 10_000
    assert record["sparsity"]["after"] < 0.05 < 0.25 < record["sparsity"]["before"]
    assert (f"the plain merge filled {lost:,} zeros: sparsity {record['sparsity']['before']:.4f} -> "
            f"{record['sparsity']['after']:.4f}") in shown  # fmt: skip


def test_one_table_of_all_methods(loras, alone):
    for _, record, shown in loras.values():
        assert list(record["metrics"]) == ["dense", "pruned", "full", "lora"]
        assert record["metrics"]["full"]["perplexity"] == pytest.approx(alone[1]["metrics"]["full"]["perplexity"], rel=1e-6)
        header = shown.splitlines()[[line.startswith("perplexity ") for line in shown.splitlines()].index(True) - 2]
        assert header.split() == ["dense", "pruned", "ratio", "full", "ratio", "lora", "ratio"]


def test_killed_lora_goes_on_exactly(loras, base, started, tmp_path):
    argv = [*base, *LORA, "--save_every", 5]
    ended, shown = started(1, argv, tmp_path / "out", in_a_step)
    assert ended == [-signal.SIGKILL], shown
    folder, record = run(argv, tmp_path / "out")
    assert weights(folder) == weights(loras["sparse"][0]) and record["best"] == loras["sparse"][1]["best"]


# ----------------------------------------------------------------------------------------------------------------- refused


REFUSED = [
    (["--block_size", 129], "--block_size 129: this llama model has 128 positions"),
    (["--block_size", 1], "--block_size 1: expected a value from 2"),
    (["--batch_size", 3], "--effective_batch_size 8: 1 processes with 3 windows each do not divide it"),
    (["--batch_size", 16], "at this --batch_size none do"),
    (["--fsdp"], "--fsdp: shards over processes, and there is one"),
    (["--optim", "adamw_8bit"], "torchao is not installed; --optim adamw_8bit needs it"),
    (["--optim", "lion"], "invalid choice: 'lion'"),
    (["--report_to", "wandb"], "wandb is not installed"),
    (["--dataset", "NO VALIDATION"], "has no validation split; it has train"),
    (["--dataset", "SHORT"], "windows of 64 tokens, less than a step of 8"),
    (["--dataset", "SHORT VALIDATION"], "too little text: "),
    (["--dataset", "nothing.txt"], "nothing.txt"),
    (["--eval_text", "nothing.txt"], "nothing.txt"),
    (["--distill_from", "OTHER VOCABULARY"], "its vocabulary has 300 tokens, the model's 8,192"),
    (["--distill_from", "nowhere"], "nowhere"),
    (["--dense_model", "nowhere"], "nowhere"),
    (["--gpu_memory", 1000], "--gpu_memory and --num_processes: plan only, together with --dry_run"),
    (["--num_processes", 2], "plan only, together with --dry_run"),
    (["--model", "BERT"], "causal language model"),
    (["--model", "/nowhere/at/all"], "no such directory"),
    (["--model", "DAMAGED"], "DAMAGED: not loadable"),
    (["--learning_rate", "nan"], "--learning_rate nan"),
    (["--learning_rate", -1], "--learning_rate -1.0"),
    (["--token_length", 129], "--token_length 129"),
    (["--stride", 129], "--stride 129"),
    (["--save", "FULL"], "holds no compressed model"),
    (["--save", "FILE"], "holds no compressed model"),
    (["--save", "PRUNED"], "would replace the model that it is made of"),
    (["--save", "PRUNED/.."], "would replace the model that it is made of"),
    (["--save", "/proc/model"], "cannot be written"),
    (["--device", "cuda:99"], "--device cuda:99"),
    (["--run_name", "a/b"], "--run_name a/b"),
]  # fmt: skip


def place(name, folder, tiny):
    """What a flag of REFUSED names, made."""
    if name == "BERT":
        sizes = {"hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 16}
        AutoModelForMaskedLM.from_config(BertConfig(vocab_size=8192, **sizes)).save_pretrained(folder / name)
        AutoTokenizer.from_pretrained(tiny / "pruned").save_pretrained(folder / name)
    elif name == "OTHER VOCABULARY":
        random_llama(vocab_size=300).save_pretrained(folder / name)
    elif name == "DAMAGED":
        shutil.copytree(tiny / "pruned", folder / name)
        cut(folder / name / "model.safetensors")
    elif name in ("NO VALIDATION", "SHORT", "SHORT VALIDATION"):
        shutil.copytree(tiny / "text", folder / name)
        if name == "NO VALIDATION":  # as a prepared text is that was made so; of other ones it is drawn
            prepared = text.prepare_text(str(folder / name), folder / "elsewhere").path
            record = read_json(prepared / "manifest.json")
            record["splits"] = {split: found for split, found in record["splits"].items() if split == "train"}
            (prepared / "manifest.json").write_text(json.dumps(record))
            return prepared
        short = folder / name / f"{'train' if name == 'SHORT' else 'validation'}.txt"
        short.write_text("\n\n".join(sentences(5 if name == "SHORT" else 1)))
    elif name == "FULL":
        (folder / name).mkdir()
        (folder / name / "thesis.tex").write_text("not to be lost")
    elif name == "FILE":
        (folder / name).write_text("a file")
    elif name.startswith("PRUNED"):
        return tiny / name.replace("PRUNED", "pruned")
    return folder / name


@pytest.mark.parametrize(("flags", "message"), REFUSED, ids=lambda value: joined(value) if isinstance(value, list) else "")
def test_what_is_refused_is_refused_in_one_line(flags, message, base, tiny, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    find_spec, missing = importlib.util.find_spec, ("torchao", "wandb")
    monkeypatch.setattr(importlib.util, "find_spec", lambda name, *_: None if name in missing else find_spec(name, *_))
    flags = [place(flag, tmp_path, tiny) if str(flag).isupper() or flag == "PRUNED/.." else flag for flag in flags]
    before, damaged = set(tmp_path.rglob("*")), "DAMAGED" in str(flags[-1])  # the last is only known when it is read
    if not damaged:
        for owner in (finetune_dense, checkpoint):
            monkeypatch.setattr(owner, "load_causal_lm", lambda *_, **__: pytest.fail("something was loaded"))
    capsys.readouterr()
    assert as_program([*base, *flags, "--out_dir", tmp_path / "out"]) == 2
    printed = capsys.readouterr().err
    assert printed.startswith("error: ") and message in printed and printed.count("\n") == 1, printed
    left = {path for path in tmp_path.rglob("*") if "tokens" not in path.parts and path.suffix != ".lock"}
    assert damaged or left <= before


def test_no_pruned_model_says_what_makes_one(base, tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(finetune_dense.subprocess, "run", lambda *_, **__: pytest.fail("something was made"))
    without = [word for word in base if word != "--fast"]
    del without[without.index("--model") : without.index("--model") + 2]
    for argv in (without, ["--fast", "--dry_run", *without]):
        assert as_program([*argv, "--out_dir", tmp_path]) == 2
        printed = capsys.readouterr().err
        assert printed.startswith(f"error: {tmp_path}/one_shot: no pruned model. Name one with --model, or run: python main_")
        assert f"--out_dir {tmp_path}" in printed and printed.count("\n") == 1


def test_the_latest_pruned_model_is_the_default(base, tiny, tmp_path, capsys):
    """And its dense model is the one that its record names."""

    def finished(name, ended, model):
        folder = tmp_path / "one_shot" / name
        folder.mkdir(parents=True)
        record = {"status": "finished", "ended": ended, "model_dir": str(model), "dense_dir": str(tiny / "dense")}
        (folder / "run.json").write_text(json.dumps(record))

    finished("older", "2024-01-01", tiny / "dense")
    finished("latest", "2025-01-01", tiny / "pruned")
    finished("gone", "2026-01-01", tmp_path / "gone")
    argv = list(base)
    for flag in ("--model", "--dense_model"):
        del argv[argv.index(flag) : argv.index(flag) + 2]
    _, record = run([*argv, "--num_epochs", 0.1], tmp_path)
    assert f"model        {tiny / 'pruned'}, 0.6 M parameters" in capsys.readouterr().out
    assert record["student_dir"] == str(tiny / "pruned") and list(record["metrics"]) == ["dense", "pruned", "full"]


def test_a_loss_that_is_no_number(base, tiny, tmp_path, capsys):
    """Too high a learning rate does it after a while; a weight that has overflown is quicker."""
    model = AutoModelForCausalLM.from_pretrained(tiny / "pruned")
    with torch.no_grad():
        weight = blocks_of(model)[1].ffn.out.weight
        weight[tuple((weight != 0).nonzero()[0].tolist())] = math.inf
    model.save_pretrained(tmp_path / "model")
    AutoTokenizer.from_pretrained(tiny / "pruned").save_pretrained(tmp_path / "model")
    assert as_program([*base, "--model", tmp_path / "model", "--out_dir", tmp_path / "out"]) == 2
    printed = capsys.readouterr().err.splitlines()
    assert re.fullmatch(r"error: (loss|eval_loss) is (nan|inf) at step 6\. The last checkpoint is intact; start anew with a "
                        "lower --learning_rate or --precision 32", printed[-1])  # fmt: skip
    folder = only_run(tmp_path / "out")
    record = read_json(folder / "run.json")
    assert record["status"] == "failed" and "UserError: " in record["error"] and not (folder / "model").exists()


@pytest.mark.parametrize("flags", [[], ["--gpu_memory", 100_000], ["--method", "lora", "--num_processes", 4],
                                   ["--fsdp", "--num_processes", 2]], ids=joined)  # fmt: skip
def test_a_dry_run_prints_the_plan(flags, base, tmp_path, monkeypatch, capsys):
    for owner in (finetune_dense, checkpoint):
        monkeypatch.setattr(owner, "load_causal_lm", lambda *_, **__: pytest.fail("something was loaded"))
    assert as_program([*base, "--dry_run", *flags, "--out_dir", tmp_path]) == 0
    plan = capsys.readouterr().out
    n = flags[-1] if "--num_processes" in flags else 1
    assert f"{STEPS} steps of {BATCH} windows (1 x {n} processes x {BATCH // n} forwards)" in plan
    assert re.search(r"^weights +\d", plan, re.MULTILINE) and re.search(r"^together +\d+\.\d\d$", plan, re.MULTILINE)
    assert not list(tmp_path.iterdir())


def test_a_dry_run_says_that_it_does_not_fit(base, tmp_path, capsys):
    assert as_program([*base, "--dry_run", "--gpu_memory", 1, "--out_dir", tmp_path]) == 3
    plan = capsys.readouterr().out
    assert re.search(r"^together +\d+\.\d\d$", plan, re.MULTILINE) and re.search(r"^there is +0.00$", plan, re.MULTILINE)
    assert not list(tmp_path.iterdir())


# -------------------------------------------------------------------------------------------------------------- the script


def test_every_flag_is_read(capsys):
    with pytest.raises(SystemExit) as stop:
        finetune_dense.main(["--help"])
    assert stop.value.code == 0
    flags = set(re.findall(r"^  --(\w+)", capsys.readouterr().out, re.MULTILINE))
    assert len(flags) > 40 and {row[0] for row in finetune_dense.PRESETS} < flags
    code = SCRIPT.read_text() + (REPOSITORY / "common" / "runs.py").read_text()
    assert not flags - set(re.findall(r"\bargs\.(\w+)", code))


def test_flags_that_change_no_result_are_flags(capsys):
    with pytest.raises(SystemExit):
        finetune_dense.main(["--help"])
    flags = set(re.findall(r"--(\w+)", capsys.readouterr().out))
    assert set(finetune_dense.NO_RESULT) - flags <= set(runs.NO_RESULT)


@pytest.mark.parametrize("optim", ["adafactor", "adamw_8bit", "muon"])
def test_optimizers_that_cannot_step_on_pieces(optim, base, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(runs, "require", lambda *_: None)
    argv = [*base, "--dry_run", "--fsdp", "--num_processes", 2, "--optim", optim, "--out_dir", tmp_path]
    assert as_program(argv) == 2
    printed = capsys.readouterr().err
    assert printed.startswith(f"error: --optim {optim}: ") and "--fsdp" in printed and printed.count("\n") == 1


# -------------------------------------------------------------------------------------------------------------- the script
