"""The script as a user meets it: its runs, their records, what happens when they are killed, and what is refused."""

import csv
import errno
import importlib.util
import json
import multiprocessing
import os
import random
import re
import shutil
import signal
import subprocess
import sys
from contextlib import contextmanager
from pathlib import Path

import pytest
import torch
import transformers
from safetensors import SafetensorError
from safetensors.torch import load_file

from common import checkpoint, data, eval_utils, runs
from common.blocks import blocks_of, total_cost
from common.runs import REPOSITORY, read_json
from tests.killing import die_at

SCRIPT = REPOSITORY / "8_pruning_with_finetuning.py"
WORDS = [f"w{i}" for i in range(100)]
TINY = {"vocab_size": 105, "hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4, "intermediate_size": 64,
        "max_position_embeddings": 70, "initializer_range": 0.1}  # fmt: skip
DENSE_STEPS = 45  # of the flags below: 15 an epoch
FLAGS = ["--width_multiple", 1, "--max_length", 16, "--batch_size", 16, "--train_fraction", 1, "--dense_fraction", 1,
         "--dense_epochs", 3, "--num_epochs", 4, "--patience", 9, "--min_delta", 0, "--learning_rate", 0.005,
         "--dense_learning_rate", 0.01, "--prune_every", 5, "--gradient_window", 3, "--dropout", 0.1,
         "--device", "cpu"]  # fmt: skip


def load_script(path=SCRIPT, name="script_8"):
    spec = importlib.util.spec_from_file_location(name, path)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def hasten(patch):
    """One thread, so that processes agree bit for bit; latency of small batches and no process for the peak memory."""
    torch.set_num_threads(1)
    latency = eval_utils.latency
    patch(eval_utils, "latency", lambda models, batch_size, length, device, seconds: latency(models, 2, 8, device, seconds=0))
    patch(eval_utils, "peak_memory", lambda *args: 1)


@pytest.fixture(scope="module", autouse=True)
def hastened():
    threads = torch.get_num_threads()
    with pytest.MonkeyPatch.context() as patch:
        hasten(patch.setattr)
        yield
    torch.set_num_threads(threads)


@pytest.fixture(scope="module")
def script():
    return load_script()


def save_tokenizer(folder):
    vocabulary = folder / "vocab.txt"
    vocabulary.write_text("\n".join(["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", *WORDS]) + "\n")
    transformers.BertTokenizerFast(str(vocabulary)).save_pretrained(folder)


def save_random(folder, prefix, head="Model", **settings):
    torch.manual_seed(0)
    getattr(transformers, prefix + head)(getattr(transformers, f"{prefix}Config")(**settings)).save_pretrained(folder)
    save_tokenizer(folder)
    return folder


def write_csv(path, names, n=300):
    """Texts of common words and of words that tell the label."""
    pick, rows = random.Random(0), ["text,label"]
    for i in range(n):
        telling = WORDS[i % len(names) * 10 :][:10]
        rows.append(" ".join(pick.choices(telling + WORDS[50:70], k=pick.randint(4, 12))) + f",{names[i % len(names)]}")
    path.write_text("\n".join(rows) + "\n")
    return path


@pytest.fixture(scope="module")
def tiny(tmp_path_factory):
    folder = tmp_path_factory.mktemp("tiny")
    save_random(folder / "bert", "Bert", **TINY)
    write_csv(folder / "texts.csv", ["bad", "good"])
    return folder


@pytest.fixture(scope="module")
def base(tiny):
    """Flags of a run that starts from an encoder; what comes after them wins."""
    return ["--model", tiny / "bert", "--task", tiny / "texts.csv", "--data_dir", tiny / "data", *FLAGS]


@pytest.fixture(scope="module")
def classifier(script, base, tiny):
    """A fine-tuned classifier: runs that start from it have no dense baseline to make."""
    out = tiny / "dense_out"
    script.main([*base, "--out_dir", out, "--num_epochs", 0, "--dropout", 0, "--dense_epochs", 4])
    (model,) = out.glob("dense/*/model")
    shutil.copytree(model, tiny / "classifier")
    return tiny / "classifier"


@pytest.fixture(scope="module")
def quick(base, classifier):
    """Flags of a run of a second: the classifier, cut at once."""
    return [*base, "--model", classifier, "--num_epochs", 0]


def only_run(out, experiment="prune"):
    (record,) = (out / experiment).glob("[!.]*/run.json")
    return record.parent


def run(script, argv, out):
    script.main([*argv, "--out_dir", out])
    folder = only_run(out)
    return folder, read_json(folder / "run.json")


def as_program(script, argv):
    """The exit status of the script, run as a program is."""
    try:
        runs.run_script(lambda: script.main(argv))
    except SystemExit as stop:
        return stop.code
    return 0


def weights(folder):
    return (folder / "model" / "model.safetensors").read_bytes()


def curves(folder):
    """history.csv without the speeds."""
    with open(folder / "history.csv", newline="") as file:
        return [row for row in csv.reader(file) if row[2] != "examples_per_second"]


# ---------------------------------------------------------------------------------------------------------------- a run

BARE = """
import sys, json, torch, pyarrow.parquet
from transformers import AutoModelForSequenceClassification, AutoTokenizer
sys.path[:] = [p for p in sys.path if p]
try:
    import common
    sys.exit("the repository is visible")
except ImportError:
    pass
model_dir, validation = sys.argv[1:]
model = AutoModelForSequenceClassification.from_pretrained(model_dir, trust_remote_code=True).eval()
tokenizer = AutoTokenizer.from_pretrained(model_dir)
rows = pyarrow.parquet.read_table(validation).to_pydict()
inputs = tokenizer(rows["text"], padding=True, truncation=True, max_length=16, return_tensors="pt")
with torch.no_grad():
    found = model(**inputs).logits.argmax(1)
print(json.dumps({"accuracy": (found == torch.tensor(rows["label"])).float().mean().item(), "labels": model.config.id2label}))
"""


def test_a_run_and_its_record(script, base, tiny, tmp_path, capsys):
    folder, record = run(script, [*base, "--target-sparsity=0.4", "--seed", 3], tmp_path)
    printed = capsys.readouterr().out
    assert record["status"] == "finished" and record["config"]["target_sparsity"] == 0.4 and record["config"]["seed"] == 3
    assert record["config"]["scorers"] == ["l2", "kd_gradient"] and record["config"]["device"] == "cpu"
    assert record["environment"]["versions"]["torch"].split("+")[0] == torch.__version__.split("+")[0]
    assert record["command"].startswith("python ")
    assert {asset["source"] for asset in record["config"]["assets"]} == {"local"}
    dense, pruned = record["metrics"]["dense"], record["metrics"]["pruned"]
    assert dense["n"] == pruned["n"] == 43
    assert dense["accuracy"] > 0.75 and pruned["accuracy"] > 0.75  # it learned, and kept it
    assert pruned["sparsity"] == pytest.approx(0.4, abs=0.004) and pruned["sparsity_asked"] == 0.4
    assert record["reload_difference"] == 0
    kept = [sum(layer[kind] for layer in record["layers"]) for kind in ("heads", "neurons")]
    assert kept[0] <= 8 and kept[1] < 128 and len(record["layers"]) == 2
    assert record["dense_layers"] == [{"heads": 4, "kv_heads": 4, "neurons": 64}] * 2
    assert pruned["parameters"] < dense["parameters"] and pruned["macs_per_example"] < dense["macs_per_example"]
    assert set(record["timings"]) >= {"teacher", "pruning and recovery", "measuring"}

    rows = curves(folder)
    assert rows[0] == ["step", "phase", "metric", "value"]
    assert {row[1] for row in rows[1:]} == {"pruning", "recovery"}
    rise = [(int(step), float(value)) for step, _, metric, value in rows if metric == "sparsity"]
    assert [step for step, _ in rise] == [5, 10, 15, 20, 25, 30]
    head = (4 * 32 * 8 + 3 * 8) / (2 * (4 * 32 * 33 + 2 * 32 * 64 + 64 + 32))  # of the budget; may go a step early, whole
    for step, sparsity in rise:
        scheduled = 0.4 * (1 - (1 - step / 30) ** 3)
        assert scheduled - 1e-9 <= sparsity <= min(scheduled + head, 0.41)
    judged = [int(step) for step, _, metric, _ in rows if metric == "selection_accuracy"]
    assert judged == [15, 30, 45, 60]

    assert sorted(path.name for path in folder.iterdir()) == ["history.csv", "model", "run.json"]
    assert f"{pruned['accuracy']:.4f}" in printed and str(folder / "model") in printed
    assert "sparsity 0.4" in printed and "recovery" in printed
    stages = read_json(folder / "model" / "compression.json")["stages"]
    assert [stage["asked"]["script"] for stage in stages] == [SCRIPT.name] and stages[0]["layers"] == record["layers"]

    (tmp_path / "bare.py").write_text(BARE)
    (validation,) = (tiny / "data").glob("texts-*/validation.parquet")
    command = [sys.executable, "-I", tmp_path / "bare.py", folder / "model", validation]
    bare = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, timeout=120)
    assert bare.returncode == 0, bare.stderr
    accuracy = pytest.approx(pruned["accuracy"], abs=1e-6)
    assert json.loads(bare.stdout) == {"accuracy": accuracy, "labels": {"0": "bad", "1": "good"}}

    # the same command again: nothing is trained, the record is shown
    before = (folder / "run.json").read_bytes()
    run(script, [*base, "--target-sparsity=0.4", "--seed", 3], tmp_path)
    again = capsys.readouterr().out
    assert "finished before" in again and "loss" not in again and f"{pruned['accuracy']:.4f}" in again
    assert (folder / "run.json").read_bytes() == before


def test_only_the_seed_makes_a_difference(script, quick, tmp_path):
    argv = [*quick, "--num_epochs", 2, "--importance", "fisher+random"]
    first, _ = run(script, argv, tmp_path / "a")
    second, _ = run(script, argv, tmp_path / "b")
    third, _ = run(script, [*argv, "--seed", 1], tmp_path / "c")
    assert weights(first) == weights(second) != weights(third)
    assert curves(first) == curves(second) != curves(third)


def test_the_dense_baseline_is_made_once(script, base, tmp_path, capsys):
    argv = [*base, "--num_epochs", 0, "--out_dir", tmp_path]
    script.main(argv)
    assert "epoch 3/3  dense" in capsys.readouterr().out
    dense = only_run(tmp_path, "dense")
    before = weights(dense)
    script.main([*argv, "--target_sparsity", 0.5])
    printed = capsys.readouterr().out
    assert "(made before)" in printed and "dense     loss" not in printed
    assert weights(dense) == before and read_json(dense / "run.json")["status"] == "finished"
    assert sorted(path.name for path in dense.iterdir()) == ["history.csv", "model", "run.json"]
    script.main([*argv, "--seed", 1])
    assert len(list((tmp_path / "dense").glob("[!.]*"))) == 2


def test_curves_for_tensorboard(script, quick, tmp_path):
    event_accumulator = pytest.importorskip("tensorboard.backend.event_processing.event_accumulator")
    folder, _ = run(script, [*quick, "--num_epochs", 2, "--tensorboard"], tmp_path)
    (events,) = (folder / "tensorboard").iterdir()
    found = event_accumulator.EventAccumulator(str(events)).Reload()
    for metric in ("sparsity", "loss", "selection_accuracy"):
        expected = [(int(step), float(value)) for step, _, name, value in curves(folder)[1:] if name == metric]
        assert [(event.step, event.value) for event in found.Scalars(metric)] == [(s, pytest.approx(v)) for s, v in expected]


# ------------------------------------------------------------------------------------------------------ killed, and again


def die_in_step(script, step):
    die_at(script.train_utils, "step_", step)


def die_while_writing(script, k):
    """Kill this process when half of the k-th checkpoint is on the disk."""
    original, calls = torch.save, []

    def save(state, file):
        calls.append(k)
        original(state, file)
        if len(calls) == k:
            file.truncate(file.tell() // 2)
            file.flush()
            os.kill(os.getpid(), signal.SIGKILL)

    torch.save = save


def die_between_renames(script, k):
    """Kill this process when the k-th best/ is not yet in the place of the one before."""
    original, calls = os.replace, []

    def replace(source, target):
        calls.append(Path(target).name == ".best.old")
        original(source, target)
        if calls[-1] and sum(calls) == k:
            os.kill(os.getpid(), signal.SIGKILL)

    os.replace = replace


MOMENTS = {  # name -> how to die, steps between checkpoints
    "dense, a step": (lambda s: die_in_step(s, 22), 4),
    "dense, finished but not marked so": (lambda s: die_at(s.checkpoint, "drop", 1, after=True), 500),
    "the teacher's outputs": (lambda s: die_at(s.distill.Teacher, "__init__", 1), 500),
    "pruning, before any checkpoint": (lambda s: die_in_step(s, DENSE_STEPS + 12), 500),
    "pruning, a step": (lambda s: die_in_step(s, DENSE_STEPS + 27), 4),
    "pruning, after the cut": (lambda s: die_at(s.pruning, "shrink_", 1, after=True), 4),
    "a checkpoint half written": (lambda s: die_while_writing(s, 11), 4),
    "an epoch's end, best/ without its checkpoint": (lambda s: die_at(s.checkpoint, "save_checkpoint", 5), 500),
    "an epoch's end, with its checkpoint": (lambda s: die_at(s.checkpoint, "save_checkpoint", 5, after=True), 500),
    "best/ between two renames": (lambda s: die_between_renames(s, 2), 4),
    "recovery, a step": (lambda s: die_in_step(s, DENSE_STEPS + 41), 4),
    "measuring": (lambda s: die_at(s.eval_utils, "measure_classifiers", 1), 500),
    "finished but not marked so": (lambda s: die_at(s.checkpoint, "drop", 2, after=True), 500),
}


def run_and_die(moment, argv):
    """In a process of its own."""
    hasten(setattr)
    script = load_script()
    how, save_every = MOMENTS[moment]
    how(script)
    script.main([*argv, "--save_every", save_every])


@pytest.fixture(scope="module")
def killed():
    """Runs the script until a moment at which it kills itself."""
    context = multiprocessing.get_context("forkserver")  # one process imports, and every killed one is its fork
    context.set_forkserver_preload(["torch._dynamo", "transformers.models.bert.modeling_bert", "pandas", "sklearn.metrics",
                                    "sklearn.model_selection", "pyarrow.parquet"])  # fmt: skip

    def kill(moment, argv):
        process = context.Process(target=run_and_die, args=(moment, [str(word) for word in argv]))
        process.start()
        process.join(120)
        assert process.exitcode == -signal.SIGKILL, moment

    return kill


@pytest.fixture(scope="module")
def undisturbed(script, base, tmp_path_factory):
    """The run that the killed ones are compared with."""
    return run(script, base, tmp_path_factory.mktemp("undisturbed"))[0]


@pytest.mark.parametrize("moment", MOMENTS)
def test_a_killed_run_ends_as_if_it_had_not_been(moment, script, base, killed, undisturbed, tmp_path):
    killed(moment, [*base, "--out_dir", tmp_path])
    folder, record = run(script, base, tmp_path)
    assert weights(folder) == weights(undisturbed)
    assert curves(folder) == curves(undisturbed)
    dense = only_run(tmp_path, "dense")
    assert curves(dense) == curves(only_run(undisturbed.parent.parent, "dense"))
    assert record["status"] == "finished"
    for place in (folder, dense):
        assert sorted(path.name for path in place.iterdir()) == ["history.csv", "model", "run.json"]


@pytest.mark.parametrize(("flags", "moment"), [
    (["--num_epochs", 3], "pruning, a step"),  # the cut is in the middle of an epoch, and the kill behind it
    (["--num_epochs", 6, "--patience", 1, "--min_delta", 1], "measuring"),  # it had stopped early
    (["--num_epochs", 0], "measuring"),
])  # fmt: skip
def test_other_schedules_that_are_killed(flags, moment, script, base, killed, tmp_path):
    argv = [*base, *flags]
    reference, _ = run(script, argv, tmp_path / "reference")
    killed(moment, [*argv, "--out_dir", tmp_path / "killed"])
    folder, record = run(script, argv, tmp_path / "killed")
    assert weights(folder) == weights(reference) and record["reload_difference"] == 0
    if "0" not in map(str, flags):
        assert curves(folder) == curves(reference)


def test_killed_over_and_over_in_fast_mode(script, base, killed, tmp_path):
    """With the precision of the fast preset (bf16 where the processor has it)."""
    argv = ["--fast", *base]
    reference, _ = run(script, argv, tmp_path / "reference")
    for moment in ("dense, a step", "a checkpoint half written", "pruning, after the cut", "measuring"):
        killed(moment, [*argv, "--out_dir", tmp_path / "killed"])
    folder, _ = run(script, argv, tmp_path / "killed")
    assert weights(folder) == weights(reference)
    assert curves(folder) == curves(reference)


# ------------------------------------------------------------------------------------------- interrupted, broken, resumed


def at_step(patch, script, step, action):
    """Do something in the middle of a step; steps are counted from here on, through the dense baseline and the rest."""
    original, calls = script.train_utils.step_, []

    def call(*args):
        calls.append(step)
        original(*args)
        if len(calls) == step:
            action()

    patch.setattr(script.train_utils, "step_", call)


def interrupted(script, argv, step, number=signal.SIGINT):
    with pytest.MonkeyPatch.context() as patch:
        at_step(patch, script, step, lambda: os.kill(os.getpid(), number))
        return as_program(script, argv)


@pytest.mark.parametrize(("experiment", "step", "number"), [("dense", 22, signal.SIGINT), ("prune", 26, signal.SIGINT),
                                                           ("prune", 60, signal.SIGTERM)])  # fmt: skip
def test_ctrl_c_saves_and_says_how_to_go_on(experiment, step, number, script, base, undisturbed, tmp_path, capsys):
    argv = [*base, "--out_dir", tmp_path]
    assert interrupted(script, argv, step + DENSE_STEPS * (experiment == "prune"), number) == 130
    folder = only_run(tmp_path, experiment)
    shown = capsys.readouterr().err.splitlines()[-1]
    total = 45 if experiment == "dense" else 60
    assert shown == f"interrupted. The same command goes on from step {step} of {total} ({folder})"
    assert read_json(folder / "run.json")["status"] == read_json(only_run(tmp_path) / "run.json")["status"] == "interrupted"
    folder, record = run(script, base, tmp_path)
    assert f"resumed at step {step} of" in capsys.readouterr().out
    assert record["status"] == "finished"
    assert weights(folder) == weights(undisturbed) and curves(folder) == curves(undisturbed)


def test_a_second_ctrl_c_stops_at_once(script, base, tmp_path, monkeypatch):
    def twice():
        os.kill(os.getpid(), signal.SIGINT)
        os.kill(os.getpid(), signal.SIGINT)

    at_step(monkeypatch, script, DENSE_STEPS + 7, twice)
    before = signal.getsignal(signal.SIGINT)  # ignored, where the tests run in a shell's background
    assert as_program(script, [*base, "--out_dir", tmp_path]) == 130
    assert read_json(only_run(tmp_path) / "run.json")["status"] == "interrupted"
    assert signal.getsignal(signal.SIGINT) is before


@pytest.fixture
def stopped(script, base, tmp_path):
    """A run that was interrupted in the recovery, with two checkpoints; its flags and its directory."""
    argv = [*base, "--out_dir", tmp_path, "--save_every", 4]
    assert interrupted(script, argv, DENSE_STEPS + 41) == 130
    return argv, only_run(tmp_path)


def cut_in_half(path):
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])


def test_a_damaged_checkpoint_is_passed_over(script, stopped, undisturbed, capsys):
    argv, folder = stopped
    cut_in_half(folder / "checkpoint" / "last.pt")
    assert as_program(script, argv) == 0
    assert re.search(r"warning: .*last.pt is damaged.*; continuing from previous.pt; resumed at step 40 of 60",
                     capsys.readouterr().out)  # fmt: skip
    assert weights(folder) == weights(undisturbed) and curves(folder) == curves(undisturbed)


def test_with_both_checkpoints_damaged_only_a_new_start_helps(script, stopped, undisturbed, capsys):
    argv, folder = stopped
    for path in (folder / "checkpoint").iterdir():
        cut_in_half(path)
    assert as_program(script, argv) == 2
    assert "Use --resume never to start anew" in capsys.readouterr().err
    assert as_program(script, [*argv, "--resume", "never"]) == 0
    assert weights(folder) == weights(undisturbed) and curves(folder) == curves(undisturbed)
    aside = folder.with_name(folder.name + ".old-1")
    assert (aside / "checkpoint" / "last.pt").exists() and read_json(aside / "run.json")["status"] == "failed"


def finite(folder):
    state = torch.load(folder / "checkpoint" / "last.pt", weights_only=True)
    return all(value.isfinite().all() for value in state["parts"]["model"].values())


@pytest.mark.parametrize("what", ["loss", "gradient"])
def test_a_run_that_diverges_keeps_what_was_good(what, script, base, undisturbed, tmp_path, monkeypatch, capsys):
    argv, calls = [*base, "--out_dir", tmp_path, "--save_every", 4], []
    original = script.objective

    def objective(output, *args):
        calls.append(what)
        loss = original(output, *args)
        if len(calls) == DENSE_STEPS + 44:
            return loss * torch.nan if what == "loss" else loss + (output.logits * 0).sqrt().sum()  # which is zero
        return loss

    monkeypatch.setattr(script, "objective", objective)
    assert as_program(script, argv) == 2
    folder = only_run(tmp_path)
    shown = capsys.readouterr().err.splitlines()[-1]
    assert re.match(r"error: (the loss|a weight) is not finite any more before step 45\. .* is intact; start anew", shown)
    assert read_json(folder / "run.json")["status"] == "failed" and finite(folder)
    monkeypatch.undo()
    assert as_program(script, argv) == 0
    assert weights(folder) == weights(undisturbed)
    record = read_json(folder / "run.json")
    assert record["status"] == "finished" and "error" not in record


FULL = Path("/dev/full")  # every write to it finds the disk full


@pytest.mark.skipif(not FULL.exists(), reason="no /dev/full here")
@pytest.mark.parametrize("file", ["checkpoint/.next.pt", "history.csv"])
def test_a_full_disk(file, script, base, undisturbed, tmp_path, monkeypatch, capsys):
    argv = [*base, "--out_dir", tmp_path, "--run_name", "mine", "--save_every", 4]
    folder, calls, original = tmp_path / "prune" / "mine", [], script.checkpoint.save_checkpoint
    blocked = folder / file

    def save_checkpoint(directory, *args, **kwargs):
        calls.append(directory)
        if directory.parent == folder and calls.count(directory) == 3:
            blocked.unlink(missing_ok=True)
            blocked.symlink_to(FULL)
        original(directory, *args, **kwargs)

    monkeypatch.setattr(script.checkpoint, "save_checkpoint", save_checkpoint)
    assert as_program(script, argv) == 2
    shown = capsys.readouterr().err.splitlines()[-1]
    assert shown.startswith("error: ") and "ree some space" in shown and "intact" in shown
    assert read_json(folder / "run.json")["status"] == "failed" and finite(folder)
    monkeypatch.undo()
    blocked.unlink(missing_ok=True)
    assert as_program(script, argv) == 0
    assert weights(folder) == weights(undisturbed)


def test_a_disk_that_is_full_when_the_model_is_saved(script, base, undisturbed, tmp_path, monkeypatch, capsys):
    original, calls = transformers.PreTrainedModel.save_pretrained, []

    def save_pretrained(model, folder, **kwargs):
        calls.append(folder)
        if len(calls) == 3:
            Path(folder).mkdir(exist_ok=True)
            (Path(folder) / "model.safetensors").write_bytes(b"a part")
            raise SafetensorError("Error while serializing: I/O error: No space left on device (os error 28)")
        original(model, folder, **kwargs)

    monkeypatch.setattr(transformers.PreTrainedModel, "save_pretrained", save_pretrained)
    argv = [*base, "--out_dir", tmp_path]
    assert as_program(script, argv) == 2
    shown = capsys.readouterr().err.splitlines()[-1]
    assert shown.startswith("error: ") and "No space left" in shown and "intact" in shown
    assert not list(tmp_path.glob("*/*/.*.new"))
    assert as_program(script, argv) == 0
    assert weights(only_run(tmp_path)) == weights(undisturbed)


# -------------------------------------------------------------------------------------------------------------- refused


def tree(folder):
    return {path: path.read_bytes() for path in sorted(folder.rglob("*")) if path.is_file()} if folder.exists() else {}


def refused(script, argv, out, capsys):
    """The one line that refuses a run, which leaves everything as it is and trains nothing."""
    before = tree(out)
    capsys.readouterr()
    assert as_program(script, [*argv, "--out_dir", out]) == 2
    printed, shown = capsys.readouterr()
    assert tree(out) == before and "epoch 1/" not in printed
    assert shown.startswith("error: ") and shown.count("\n") == 1 and "Traceback" not in shown
    return shown


@pytest.mark.parametrize(("flags", "message"), [
    (["--target_sparsity", 0.96], "expected a value from 0 to 0.95"),
    (["--target_sparsity=-0.1"], "expected a value from 0 to 0.95"),
    (["--target_sparsity", "nan"], "expected a value from 0 to 0.95"),
    (["--target_spars", 0.2], "unrecognized arguments"),
    (["--importance", "l3"], "expected one or several of l2, random, taylor"),
    (["--importance", "l2+l2"], "each once"),
    (["--max_length", 71], "has 70 positions; expected 3 to 70"),
    (["--max_length", 2], "expected 3 to 70"),
    (["--granularity", "heads", "--target_sparsity", 0.9], r"--granularity heads with --floor 0.02 allows 0\.3\d\d at most"),
    (["--floor", 1], "allows 0.000 at most"),
    (["--schedule", "steep"], "invalid choice"),
    (["--num_epochs", "-1"], "expected a value from 0"),
    (["--seed", "-1"], "expected a value from 0"),
    (["--save_every", 0], "expected a value from 1"),
    (["--device", "abacus"], "Use --device auto or cpu"),
    (["--device", "cpu", "--precision", "16-mixed"], "needs CUDA, the device is cpu"),
    (["--model", "no/such/model/here"], "no such directory"),
    (["--task", "no.csv"], "no such file or folder"),
    (["--text_column", "words"], "no column called words"),
])  # fmt: skip
def test_flags_that_are_refused(flags, message, script, base, tmp_path, capsys):
    shown = refused(script, [*base, *flags], tmp_path / "out", capsys)
    assert re.search(message, shown), shown
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(("change", "message"), [
    ({"model_type": "gpt2"}, "model type 'gpt2' is not supported; known: bert, roberta"),
    ({"model_type": "no_such_family"}, "no_such_family"),
    ({"model_type": None}, "model_type"),
    ("tokenizer", "no tokenizer"),
    ("weights", "no model.safetensors"),
    ("vocabulary", "105 tokens"),
])  # fmt: skip
def test_models_that_are_refused(change, message, script, base, tiny, tmp_path, capsys):
    model = tmp_path / "model"
    shutil.copytree(tiny / "bert", model)
    if isinstance(change, dict):
        config = {key: value for key, value in (read_json(model / "config.json") | change).items() if value is not None}
        (model / "config.json").write_text(json.dumps(config))
    elif change == "weights":
        (model / "model.safetensors").unlink()
    elif change == "vocabulary":
        save_random(model, "Bert", **TINY | {"vocab_size": 80})
    else:
        for path in (*model.glob("token*"), *model.glob("vocab*")):
            path.unlink()
    shown = refused(script, [*base, "--model", model], tmp_path / "out", capsys)
    assert (message in shown and str(model) in shown) or message.startswith("model type")


@pytest.mark.parametrize(("content", "message"), [
    ("", "the file is empty"),
    ("text,label\n", "no rows"),
    ("text,label\n" + "some words,good\n" * 30, "one class only|too few"),
    ("text,label\n" + "".join(f"words w{i},good\n" for i in range(30)), "one class only"),
    ("text,mark\nw1,good\nw2,bad\n", "no column called label"),
    (b"PAR1 and then nonsense", "cannot be read as parquet"),
])  # fmt: skip
def test_tasks_that_are_refused(content, message, script, base, tmp_path, capsys):
    path = tmp_path / ("texts.csv" if isinstance(content, str) else "texts.parquet")
    path.write_bytes(content.encode() if isinstance(content, str) else content)
    argv = [*base, "--task", path, "--data_dir", tmp_path / "data"]
    assert re.search(message, refused(script, argv, tmp_path / "out", capsys))
    assert not [path for path in (tmp_path / "data").glob("*") if not path.name.endswith(".lock")]


def test_a_task_of_a_handful_of_texts(script, quick, tmp_path):
    few = write_csv(tmp_path / "few.csv", ["bad", "good"], 9)
    _, record = run(script, [*quick, "--num_epochs", 2, "--task", few, "--data_dir", tmp_path / "data"], tmp_path)
    assert record["metrics"]["pruned"]["n"] >= 1


def test_a_prepared_task_that_was_damaged(script, quick, tmp_path, capsys):
    argv = [*quick, "--data_dir", tmp_path / "data"]
    first, _ = run(script, argv, tmp_path / "a")
    (train,) = (tmp_path / "data").glob("texts-*/train.parquet")
    whole = train.read_bytes()
    cut_in_half(train)
    shown = refused(script, [*argv, "--task", train.parent], tmp_path / "out", capsys)
    assert "train.parquet: damaged" in shown
    second, _ = run(script, argv, tmp_path / "b")
    assert weights(first) == weights(second) and train.read_bytes() == whole


def test_a_changed_configuration_is_another_run(script, quick, tmp_path, capsys):
    argv = [*quick, "--out_dir", tmp_path, "--run_name", "mine"]
    script.main(argv)
    shown = refused(script, [*quick, "--run_name", "mine", "--target_sparsity", 0.3, "--seed", 5], tmp_path, capsys)
    assert "seed 0 -> 5, target_sparsity 0.2 -> 0.3" in shown and "Use another --run_name, or --resume never" in shown
    script.main([*argv, "--target_sparsity", 0.3, "--resume", "never"])
    script.main([*argv, "--target_sparsity", 0.3, "--resume", "never"])
    asked = {path.parent.name: read_json(path)["config"]["target_sparsity"] for path in tmp_path.glob("prune/*/run.json")}
    assert asked == {"mine": 0.3, "mine.old-1": 0.2, "mine.old-2": 0.3}
    script.main([*quick, "--out_dir", tmp_path])
    script.main([*quick, "--out_dir", tmp_path, "--target_sparsity", 0.3])
    assert len(list(tmp_path.glob("prune/[!.]*"))) == 5


def test_a_refused_run_trains_no_dense_baseline(script, base, quick, tmp_path, monkeypatch, capsys):
    script.main([*quick, "--out_dir", tmp_path, "--run_name", "mine"])
    assert "another configuration" in refused(script, [*base, "--run_name", "mine"], tmp_path, capsys)
    monkeypatch.setitem(sys.modules, "torch.utils.tensorboard", None)
    assert "pip install -r requirements-extra.txt" in refused(script, [*base, "--tensorboard"], tmp_path, capsys)
    assert not (tmp_path / "dense").exists()


def test_an_output_directory_that_cannot_be_written(script, quick, tmp_path, monkeypatch, capsys):
    (tmp_path / "file").write_text("mine")
    assert "a file is in the way" in refused(script, quick, tmp_path / "file", capsys)
    for number in (errno.EACCES, errno.EROFS):
        def mkdir(path, *args, number=number, **kwargs):
            raise OSError(number, os.strerror(number), str(path))

        monkeypatch.setattr(Path, "mkdir", mkdir)
        shown = refused(script, quick, tmp_path / "out", capsys)
        monkeypatch.undo()
        assert os.strerror(number) in shown and str(tmp_path / "out") in shown and "name another directory" in shown


def test_two_processes_do_not_share_a_run(script, quick, tmp_path, capsys):
    with runs.Run(tmp_path, "prune", {}, "mine"):
        assert "another process" in refused(script, [*quick, "--run_name", "mine"], tmp_path, capsys)


# -------------------------------------------------------------------------------------------------------------- pruning


def cost(folder, budget):
    return total_cost(blocks_of(checkpoint.outline(folder)), budget, 16)


@pytest.mark.parametrize("importance", ["l2", "taylor", "fisher", "kd_gradient", "activation", "random", "l2+kd_gradient"])
def test_every_score_prunes_without_training(importance, script, quick, classifier, tmp_path):
    folder, record = run(script, [*quick, "--importance", importance, "--target_sparsity", 0.4], tmp_path)
    assert record["metrics"]["pruned"]["sparsity"] == pytest.approx(0.4, abs=0.004)
    assert record["reload_difference"] == 0 and not (tmp_path / "dense").exists()
    assert record["config"]["scorers"] == importance.split("+")
    assert len(weights(folder)) < 0.8 * (classifier / "model.safetensors").stat().st_size


@pytest.mark.parametrize("flags", [[], ["--allocation", "uniform"], ["--num_epochs", 1]])
def test_layers_end_with_a_multiple_of_neurons(flags, script, quick, tmp_path):
    _, record = run(script, [*quick, "--target_sparsity", 0.4, "--width_multiple", 8, *flags], tmp_path)
    widths = [layer["neurons"] for layer in record["layers"]]
    assert all(width % 8 == 0 or width < 8 for width in widths) and len(set(widths)) + bool(flags) > 1
    asked, found = 0.4, record["metrics"]["pruned"]["sparsity"]
    one = 8 / (sum(layer["neurons"] for layer in record["dense_layers"]))  # of all neurons, the step
    assert asked - 0.004 <= found < asked + 0.004 + one


@pytest.mark.parametrize(("flags", "budget", "most"), [
    (["--budget", "macs"], "macs", 0.304),
    (["--allocation", "uniform"], "parameters", 0.32),
    (["--allocation", "uniform", "--budget", "macs"], "macs", 0.32),
    (["--granularity", "neurons"], "parameters", 0.304),
    (["--granularity", "neurons", "--allocation", "uniform"], "parameters", 0.315),
    (["--granularity", "heads"], "parameters", 0.37),
    (["--no_refit"], "parameters", 0.304),
    (["--no-refit", "--importance", "l2", "--schedule", "linear"], "parameters", 0.304),
])  # fmt: skip
def test_every_choice_removes_what_was_asked(flags, budget, most, script, quick, classifier, tmp_path):
    """Heads are coarse here, an eighth of a layer each: where they alone may go, more goes than was asked for."""
    folder, record = run(script, [*quick, "--target_sparsity", 0.3, *flags], tmp_path)
    removed = 1 - cost(folder / "model", budget) / cost(classifier, budget)
    assert 0.2999 <= removed <= most and record["metrics"]["pruned"]["sparsity"] == pytest.approx(removed)
    layers = record["layers"]
    if "neurons" in flags:
        assert [layer["heads"] for layer in layers] == [4, 4]
    if "heads" in flags:
        assert [layer["neurons"] for layer in layers] == [64, 64]
    if "uniform" in flags:
        assert layers[0] == layers[1]
        assert (folder / "model" / "modeling_pruned.py").exists() != ("neurons" in flags)


def test_nothing_to_remove(script, quick, classifier, tmp_path):
    folder, record = run(script, [*quick, "--target_sparsity", 0], tmp_path)
    assert record["metrics"]["pruned"]["sparsity"] == 0 and record["layers"] == record["dense_layers"]
    before, after = load_file(classifier / "model.safetensors"), load_file(folder / "model" / "model.safetensors")
    assert all(torch.equal(before[name], after[name]) for name in before)


def test_refitting_keeps_the_outputs_closer(script, quick, classifier, tiny, tmp_path):
    (task,) = (tiny / "data").glob("texts-*")
    texts, labels = data.read_texts(task, "train")
    train = data.tokenize(texts, labels, transformers.AutoTokenizer.from_pretrained(classifier), 16)

    def logits(folder):
        return eval_utils.predict(checkpoint.load_classifier(folder), train, torch.device("cpu"))

    errors = {}
    for flag in ("--refit", "--no_refit"):
        folder, _ = run(script, [*quick, flag, "--target_sparsity", 0.5, "--importance", "fisher"], tmp_path / flag)
        errors[flag] = (logits(folder / "model") - logits(classifier)).square().mean()
    assert errors["--refit"] < 0.7 * errors["--no_refit"]


def test_calibration_sees_the_model_without_dropout(script, quick, tmp_path, monkeypatch):
    original, modes = script.pruning.gram_matrices, []

    @contextmanager
    def gram_matrices(model, blocks):
        hook = model.register_forward_pre_hook(lambda module, args: modes.append(module.training))
        with original(model, blocks) as grams:
            yield grams
        hook.remove()

    monkeypatch.setattr(script.pruning, "gram_matrices", gram_matrices)
    run(script, [*quick, "--num_epochs", 1, "--refit"], tmp_path)
    assert modes and not any(modes)


# ---------------------------------------------------------------------------------------------------- tasks, stages, plans


def test_a_dry_run_writes_nothing(script, base, tmp_path, capsys):
    script.main([*base, "--out_dir", tmp_path / "out", "--dry-run", "--target-sparsity", 0.5])
    plan = capsys.readouterr().out
    assert not (tmp_path / "out").exists()
    assert re.search(r"bert \(local\), 8 heads, 128 neurons", plan) and "bad -> 0, good -> 1" in plan
    assert re.search(r"232 of 232 an epoch; 25 to select, 43 to judge", plan)
    assert re.search(r"30 to prune, of 4 epochs; batch 16, 32, ", plan)
    assert re.search(r"cubic, 6 prunings: 0.211 0.352 0.438 0.481 0.498 ...", plan) and "MiB" in plan


def test_three_classes_named_by_texts(script, base, tmp_path):
    task = write_csv(tmp_path / "moods.csv", ["sorrow", "anger", "joy"])
    folder, record = run(script, [*base, "--task", task, "--data_dir", tmp_path / "data", "--num_epochs", 2], tmp_path)
    names = {"0": "anger", "1": "joy", "2": "sorrow"}
    assert read_json(folder / "model" / "config.json")["id2label"] == names
    assert record["metrics"]["dense"]["accuracy"] > 0.6 and 0 < record["metrics"]["pruned"]["f1"] < 1.01


def test_a_pruned_model_is_the_start_of_a_next_stage(script, quick, base, tmp_path, capsys):
    first, before = run(script, [*quick, "--target_sparsity", 0.3], tmp_path / "first")
    second, record = run(script, [*quick, "--model", first / "model", "--num_epochs", 2, "--importance", "taylor"],
                         tmp_path / "second")  # fmt: skip
    assert not (tmp_path / "second" / "dense").exists()  # it is a classifier of this task
    assert record["dense_layers"] == before["layers"] != record["layers"]
    stages = read_json(second / "model" / "compression.json")["stages"]
    assert [stage["asked"]["target_sparsity"] for stage in stages] == [0.3, 0.2]
    assert [stage["layers"] for stage in stages] == [before["layers"], record["layers"]]
    assert 0.2 <= record["metrics"]["pruned"]["sparsity"] < 0.206  # a neuron is 0.0055 of what the first stage left
    left = cost(second / "model", "parameters") / cost(first / "model", "parameters")
    assert record["metrics"]["pruned"]["sparsity"] == pytest.approx(1 - left, abs=1e-9)

    # and of a classifier for other labels: the dense baseline is the pruned model, fine-tuned
    task = write_csv(tmp_path / "moods.csv", ["anger", "joy", "sorrow"])
    third, record = run(script, [*quick, "--task", task, "--data_dir", tmp_path / "data", "--model", first / "model"],
                        tmp_path / "third")  # fmt: skip
    assert record["dense_layers"] == before["layers"]
    assert len(read_json(third / "model" / "compression.json")["stages"]) == 2


@pytest.mark.parametrize(("prefix", "settings"), [
    ("DistilBert", {"vocab_size": 105, "dim": 32, "n_layers": 2, "n_heads": 4, "hidden_dim": 64}),
    ("Roberta", TINY | {"pad_token_id": 0, "max_position_embeddings": 72}),
])  # fmt: skip
def test_other_families(prefix, settings, script, base, tmp_path):
    model = save_random(tmp_path / prefix, prefix, **settings)
    folder, record = run(script, [*base, "--model", model, "--num_epochs", 0, "--dense_epochs", 1], tmp_path)
    assert record["metrics"]["pruned"]["sparsity"] == pytest.approx(0.2, abs=0.002) and record["reload_difference"] == 0
    assert read_json(folder / "model" / "config.json")["model_type"] == prefix.lower()


def test_fast_without_anything_but_wheels(script, wheel_data_dir, tmp_path, monkeypatch, capsys):
    """Every fortieth row, so that it takes seconds; nothing is named, nothing is asked of the hub."""
    original = script.data.read_texts

    def read_texts(task_dir, split):
        texts, labels = original(task_dir, split)
        return texts[::40], labels[::40]

    monkeypatch.setattr(script.data, "read_texts", read_texts)
    argv = ["--fast", "--train_fraction", 0.4, "--num_epochs", 2, "--dense_epochs", 1, "--prune_every", 1, "--max_length", 32]
    _, record = run(script, [*argv, "--data_dir", wheel_data_dir], tmp_path)
    assert [(asset["name"], asset["source"]) for asset in record["config"]["assets"]] == [("minilm-l6-h384", "wheel"),
                                                                                         ("reviews", "wheel")]  # fmt: skip
    assert record["metrics"]["pruned"]["sparsity"] == pytest.approx(0.2, abs=0.002) and record["reload_difference"] == 0
    assert "bad" not in capsys.readouterr().out


# ------------------------------------------------------------------------------------------------------------ the script


def test_importing_has_no_side_effect(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    state, handler, threads = torch.get_rng_state(), signal.getsignal(signal.SIGINT), torch.get_num_threads()
    load_script(name="imported")
    assert torch.equal(torch.get_rng_state(), state) and signal.getsignal(signal.SIGINT) is handler
    assert torch.get_num_threads() == threads and "imported" not in sys.modules
    assert not list(tmp_path.iterdir()) and capsys.readouterr() == ("", "")


def test_every_flag_is_read(script, capsys):
    with pytest.raises(SystemExit) as stop:
        script.main(["--help"])
    assert stop.value.code == 0
    flags = set(re.findall(r"^  --(\w+)", capsys.readouterr().out, re.MULTILINE))
    assert len(flags) > 40 and {row[0] for row in script.PRESETS} < flags
    code = SCRIPT.read_text() + (REPOSITORY / "common" / "runs.py").read_text()
    read = set(re.findall(r"\b(?:args|a)\.(\w+)", code))
    assert not flags - read


def test_a_copy_becomes_an_experiment(quick, tmp_path):
    """What the README says, done as a user does it; in another folder, with the repository on PYTHONPATH."""
    section = (REPOSITORY / "README.md").read_text().split("## Make it your experiment")[1].split("\n## ")[0]
    function, row = re.search(r"```python\n(.*?)\n(WEIGHT_SCORERS = .*?)\n```", section, re.DOTALL).groups()
    (name,) = re.findall(r"--importance (\w+)", section)
    text = re.sub(r"^WEIGHT_SCORERS = .*$", lambda _: function + row, SCRIPT.read_text(), count=1, flags=re.MULTILINE)
    assert function.count("\n") < 12 and text != SCRIPT.read_text()
    copy = tmp_path / "my_experiment.py"
    copy.write_text(text)
    command = [sys.executable, copy.name, *quick, "--importance", f"{name}+fisher", "--out_dir", "out"]
    environment = os.environ | {"PYTHONPATH": str(REPOSITORY), "OMP_NUM_THREADS": "1"}
    done = subprocess.run([str(word) for word in command], cwd=tmp_path, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    record = read_json(only_run(tmp_path / "out") / "run.json")
    assert record["status"] == "finished" and record["config"]["scorers"] == [name, "fisher"]
    assert record["command"].startswith("python my_experiment.py --model") and "--importance" in record["command"]
    stages = read_json(only_run(tmp_path / "out") / "model" / "compression.json")["stages"]
    assert stages[0]["asked"]["script"] == "my_experiment.py" and stages[0]["asked"]["importance"] == f"{name}+fisher"
    assert record["metrics"]["pruned"]["peak_memory"] > 2**20 and record["metrics"]["pruned"]["runs"] >= 10
    assert "latency, median" in done.stdout and done.stdout.rstrip().endswith("run.json")
