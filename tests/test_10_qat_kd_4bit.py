"""The script as a user meets it: its runs and what it says of them, killed and resumed, and what is refused."""

import json
import multiprocessing
import os
import re
import shutil
import signal
import subprocess
import sys

import pytest
import torch
import transformers

from common import checkpoint, data, eval_utils, quantizers
from common.blocks import blocks_of
from common.runs import REPOSITORY, read_json
from tests import test_8_pruning_with_finetuning as eight
from tests.test_8_pruning_with_finetuning import as_program, base, classifier, hastened, only_run, script, tiny  # noqa: F401

SCRIPT = REPOSITORY / "10_qat_kd_4bit.py"
FLAGS = ["--max_length", 16, "--batch_size", 16, "--num_epochs", 2, "--min_delta", 0, "--learning_rate", 0.002,
         "--device", "cpu"]  # fmt: skip
STEPS = 30  # of the flags above, 15 an epoch


@pytest.fixture(scope="module")
def qat():
    return eight.load_script(SCRIPT, "script_10")


@pytest.fixture(scope="module")
def pruning_out(base, classifier, tmp_path_factory):  # noqa: F811
    """An output directory in which script 8 has left a pruned model with uneven layers, all heads in place."""
    out = tmp_path_factory.mktemp("pruning_out")
    eight.load_script().main([*base, "--model", classifier, "--num_epochs", 0, "--target_sparsity", 0.4,
                              "--granularity", "neurons", "--out_dir", out])  # fmt: skip
    return out


@pytest.fixture(scope="module")
def flags(tiny, pruning_out):  # noqa: F811
    pruned = only_run(pruning_out) / "model"
    return ["--task", tiny / "texts.csv", "--data_dir", tiny / "data", "--pruned_model_path", pruned, *FLAGS]


def run(qat, argv, out):
    qat.main([*argv, "--out_dir", out])
    folder = only_run(out, "qat")
    return folder, read_json(folder / "run.json")


# ---------------------------------------------------------------------------------------------------------------- a run


def test_a_run_and_its_record(qat, flags, tiny, pruning_out, tmp_path, capsys):  # noqa: F811
    folder, record = run(qat, flags, tmp_path)
    printed = capsys.readouterr().out
    measured = record["metrics"]
    assert record["status"] == "finished" and list(measured) == ["dense", "pruned", "ptq", "qat"]
    assert record["reload_difference"] == 0 and record["reload_agreement"] == 1
    assert {values["n"] for values in measured.values()} == {43}
    assert measured["dense"]["accuracy"] > 0.75 and measured["qat"]["accuracy"] >= measured["pruned"]["accuracy"] - 0.05
    assert measured["ptq"]["bytes"] == pytest.approx(measured["qat"]["bytes"], rel=0.01)
    assert "bits a quantised weight" in printed
    assert 4 < measured["qat"]["bits_per_weight"] < 8 and "bits_per_weight" not in measured["dense"]
    layers = read_json(only_run(pruning_out) / "run.json")["layers"]
    assert [layer["neurons"] for layer in record["layers"]] == [n + -n % 32 for n in (layer["neurons"] for layer in layers)]
    assert sorted(path.name for path in folder.iterdir()) == ["history.csv", "model", "ptq", "run.json"]
    stages = read_json(folder / "model" / "compression.json")["stages"]
    assert [stage["asked"]["script"] for stage in stages] == ["8_pruning_with_finetuning.py", SCRIPT.name]

    (tmp_path / "bare.py").write_text(eight.BARE)
    (validation,) = (tiny / "data").glob("texts-*/validation.parquet")
    command = [sys.executable, "-I", tmp_path / "bare.py", folder / "model", validation]
    bare = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, timeout=120)
    assert bare.returncode == 0, bare.stderr
    accuracy = pytest.approx(measured["qat"]["accuracy"], abs=1e-6)
    assert json.loads(bare.stdout.splitlines()[-1]) == {"accuracy": accuracy, "labels": {"0": "bad", "1": "good"}}

    run(qat, flags, tmp_path)  # the same command again trains nothing
    assert "finished before" in capsys.readouterr().out


def test_the_latest_pruned_model_is_found_and_its_dense_model(qat, flags, pruning_out, capsys):
    argv = [word for word in flags if word != "--pruned_model_path" and "model" not in str(getattr(word, "name", ""))]
    qat.main([*argv, "--out_dir", pruning_out, "--dry_run"])
    plan = capsys.readouterr().out
    folder = only_run(pruning_out)
    assert str(folder / "model") in plan and str(read_json(folder / "run.json")["dense_dir"]) in plan
    assert f"{STEPS} in 2 epochs" in plan and not (pruning_out / "qat").exists()


def test_a_pruned_model_of_another_task_is_not_taken(qat, flags, pruning_out, tmp_path, capsys):
    other = eight.write_csv(tmp_path / "other.csv", ["bad", "good"], n=200)
    argv = ["--task", other, "--data_dir", tmp_path / "data", "--out_dir", pruning_out, *FLAGS, "--dry_run"]
    assert "no finished run on" in refusal(qat, argv, capsys)


def test_without_a_pruned_model_one_is_made(qat, tiny, classifier, base, tmp_path, capsys, monkeypatch):  # noqa: F811
    """By script 8, with the same task and places: here its stand-in calls it in this process, with small values."""

    original = subprocess.run

    def in_process(command, check, **kwargs):
        if command[0] != sys.executable:  # git, for the record
            return original(command, check=check, **kwargs)
        assert command[1].name == "8_pruning_with_finetuning.py" and "--fast" in command and check is False
        eight.load_script().main([*map(str, base), "--granularity", "neurons", "--num_epochs", "0", *command[3:]])
        return subprocess.CompletedProcess(command, 0)

    monkeypatch.setattr(qat.subprocess, "run", in_process)
    places = ["--model", classifier, "--task", tiny / "texts.csv", "--data_dir", tiny / "data"]
    argv = ["--fast", *places, *FLAGS, "--num_epochs", 0]
    _, record = run(qat, argv, tmp_path)
    assert "no pruned model of this task under" in capsys.readouterr().out
    assert list(record["metrics"]) == ["dense", "pruned", "ptq"]


def test_a_dense_student_is_its_own_teacher(qat, flags, classifier, tmp_path):  # noqa: F811
    _, record = run(qat, [*flags, "--pruned_model_path", classifier, "--num_epochs", 1], tmp_path)
    assert list(record["metrics"]) == ["dense", "ptq", "qat"] and record["reload_difference"] == 0


@pytest.mark.parametrize("chosen", [
    ["--scale_method", "minmax", "--no_symmetric", "--activations", "static"],
    ["--scale_method", "mse", "--weight_bits", 2, "--activation_bits", 32, "--embedding_bits", 32],
    ["--weight_bits", 3, "--group_size", -1, "--activation_bits", 16, "--embedding_bits", 8, "--embedding_group_size", 32],
    ["--fast", "--precision", "32", "--activations", "static", "--distill_weight", 0.5, "--train_fraction", 1],
])  # fmt: skip
def test_every_choice_trains_and_packs_exactly(qat, flags, tmp_path, chosen):
    folder, record = run(qat, [*flags, "--num_epochs", 1, *chosen], tmp_path)
    assert record["reload_difference"] == 0 and record["metrics"]["qat"]["accuracy"] > 0.6
    config = read_json(folder / "model" / "config.json")["quantization_config"]
    assert {group["weights"]["num_bits"] for group in config["config_groups"].values()} <= {2, 3, 4, 8}


def test_an_onnx_file_is_measured_too(qat, flags, tmp_path, capsys):
    pytest.importorskip("onnxruntime")
    folder, record = run(qat, [*flags, "--num_epochs", 1, "--export", "onnx"], tmp_path)
    onnx, trained = record["metrics"]["onnx"], record["metrics"]["qat"]
    assert onnx["n"] == 43 and onnx["accuracy"] == pytest.approx(trained["accuracy"], abs=0.05)
    assert onnx["bytes"] == (folder / "model.onnx").stat().st_size and onnx["latency_ms"] > 0 and onnx["single_latency_ms"] > 0
    assert re.search(r"onnx +ratio", capsys.readouterr().out)


@pytest.mark.skipif(not shutil.which("g++"), reason="torch.compile needs a C++ compiler")
def test_compiled_it_trains_and_packs_too(qat, flags, tmp_path):
    _, record = run(qat, [*flags, "--num_epochs", 1, "--compile"], tmp_path)
    assert record["reload_difference"] == 0 and record["metrics"]["qat"]["accuracy"] > 0.6


def test_where_training_only_does_harm_what_it_started_from_is_kept(qat, flags, tmp_path, capsys):
    folder, record = run(qat, [*flags, "--num_epochs", 1, "--learning_rate", 9.0], tmp_path)
    (at_start,) = [float(row[3]) for row in eight.curves(folder) if row[1] == "ptq"]
    (trained,) = [float(row[3]) for row in eight.curves(folder) if row[1:3] == ["qat", "selection_accuracy"]]
    assert trained < at_start and f"PTQ  selection accuracy {at_start:.4f}" in capsys.readouterr().out
    assert record["metrics"]["qat"]["accuracy"] == record["metrics"]["ptq"]["accuracy"]


def test_training_brings_two_bits_back(qat, flags, tmp_path):
    argv = [*flags, "--weight_bits", 2, "--group_size", -1, "--num_epochs", 8, "--patience", 8]
    folder, record = run(qat, argv, tmp_path)
    losses = [float(row[3]) for row in eight.curves(folder) if row[2] == "loss"]
    assert losses[-1] < 0.7 * losses[0]
    assert record["metrics"]["qat"]["accuracy"] >= record["metrics"]["ptq"]["accuracy"]


# ------------------------------------------------------------------------------------------------------ killed, and again

MOMENTS = {
    "the start": lambda s: eight.die_at(s.checkpoint, "save_tensors", 1, after=True),
    "a step": lambda s: eight.die_in_step(s, 9),
    "a checkpoint half written": lambda s: eight.die_while_writing(s, 3),
    "an epoch's end, before its checkpoint": lambda s: eight.die_at(s.checkpoint, "save_tensors", 2, after=True),
    "measuring": lambda s: eight.die_at(s.eval_utils, "measure_classifiers", 1),
}


def run_and_die(moment, argv):
    eight.hasten(setattr)
    module = eight.load_script(SCRIPT, "script_10")
    MOMENTS[moment](module)
    module.main([*argv, "--save_every", 4])


@pytest.fixture(scope="module")
def left_alone(qat, flags, tmp_path_factory):
    folder, _ = run(qat, [*flags, "--dropout", 0.1], tmp_path_factory.mktemp("alone"))
    return folder


@pytest.mark.parametrize("moment", MOMENTS)
def test_a_killed_run_ends_as_one_left_alone(moment, qat, flags, left_alone, tmp_path):
    argv = [*flags, "--dropout", 0.1, "--out_dir", tmp_path]
    process = multiprocessing.get_context("spawn").Process(target=run_and_die, args=(moment, [str(word) for word in argv]))
    process.start()
    process.join(180)
    assert process.exitcode == -signal.SIGKILL
    folder, record = run(qat, argv, tmp_path)
    assert record["status"] == "finished"
    assert eight.weights(folder) == eight.weights(left_alone) and eight.curves(folder) == eight.curves(left_alone)


def test_interrupted_it_says_how_to_go_on(qat, flags, left_alone, tmp_path, capsys):
    argv = [*flags, "--dropout", 0.1, "--out_dir", tmp_path]
    with pytest.MonkeyPatch.context() as patch:
        eight.at_step(patch, qat, 20, lambda: os.kill(os.getpid(), signal.SIGTERM))
        assert as_program(qat, argv) == 130
    assert "The same command goes on from step 20 of 30" in capsys.readouterr().err
    folder, _ = run(qat, argv, tmp_path)
    assert eight.weights(folder) == eight.weights(left_alone)


# -------------------------------------------------------------------------------------------------------------- refused


def refusal(qat, argv, capsys):
    capsys.readouterr()
    assert as_program(qat, argv) == 2
    err = capsys.readouterr().err.strip()
    assert err.startswith("error: ") and "\n" not in err
    return err


@pytest.mark.parametrize(("chosen", "message"), [
    (["--weight_bits", 9], "--weight_bits 9: expected a value from 2 to 8"),
    (["--group_size", 48], "--group_size 48: expected one of 32, 64, 128, -1"),
    (["--activation_bits", 12], "--activation_bits 12: expected one of 8, 16, 32"),
    (["--embedding_bits", 5], "--embedding_bits 5: expected one of 4, 8, 32"),
    (["--embedding_group_size", 64], "--embedding_group_size 64: .*word_embeddings has 32 columns, which it does not divide"),
    (["--pruned_model_path", "nowhere"], "nowhere: no config.json of a known model"),
    (["--export", "onnx", "--weight_bits", 3], "--export onnx: takes 4-bit symmetric weights"),
    (["--max_length", 71], "--max_length 71: this bert model has 70 positions"),
])  # fmt: skip
def test_values_that_do_not_fit(qat, flags, tmp_path, capsys, chosen, message):
    assert re.search(message, refusal(qat, [*flags, *chosen, "--out_dir", tmp_path], capsys))
    assert not (tmp_path / "qat").exists()


def test_models_that_do_not_fit(qat, flags, classifier, tiny, tmp_path, capsys):  # noqa: F811
    argv = [*flags, "--out_dir", tmp_path]
    other = eight.save_random(tmp_path / "three", "Bert", "ForSequenceClassification", **eight.TINY, num_labels=3)
    assert "a classifier of 3 labels" in refusal(qat, [*argv, "--pruned_model_path", other], capsys)
    assert "a classifier of 3 labels" in refusal(qat, [*argv, "--teacher_path", other], capsys)
    wide = eight.save_random(tmp_path / "wide", "Bert", "ForSequenceClassification", **eight.TINY | {"hidden_size": 64})
    found = refusal(qat, [*argv, "--teacher_path", wide], capsys)
    assert "differ in width and layers ((32, 2) and (64, 2))" in found and "--hidden_weight 0" in found
    moved = tmp_path / "elsewhere" / "model"
    checkpoint.shutil.copytree(flags[flags.index("--pruned_model_path") + 1], moved)
    assert "Name it with --teacher_path" in refusal(qat, [*argv, "--pruned_model_path", moved], capsys)
    assert "no finished run" in refusal(qat, [word for word in argv if word not in flags[4:6]] + ["--dry_run"], capsys)


def test_a_quantised_student_and_a_missing_library(qat, flags, tmp_path, capsys, monkeypatch):
    folder, _ = run(qat, [*flags, "--num_epochs", 0], tmp_path)
    argv = [*flags, "--pruned_model_path", folder / "model", "--out_dir", tmp_path]
    assert "is quantised already" in refusal(qat, argv, capsys)
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    assert "compressed-tensors is not installed" in refusal(qat, argv, capsys)


# ---------------------------------------------------------------------------------------------------------- what is lost


def test_states_are_compared_in_units_of_the_teachers():
    generator = torch.Generator().manual_seed(0)
    ours, theirs = ([torch.randn(2, 5, 4, generator=generator) for _ in range(3)] for _ in range(2))
    mask = torch.tensor([[1, 1, 1, 0, 0], [1, 1, 1, 1, 1]])
    real = mask.bool()
    from common.distill import states_loss

    expected = [float((a[real] - b[real]).double().square().mean() / b[real].double().square().mean())
                for a, b in zip(ours, theirs, strict=True)]  # fmt: skip
    assert states_loss(ours, theirs, mask).item() == pytest.approx(sum(expected) / 3, rel=1e-5)
    assert states_loss(theirs, theirs, mask).item() == 0
    parts = [states_loss(*([layer[i, None] for layer in states] for states in (ours, theirs)), mask[i, None]) for i in (0, 1)]
    assert states_loss(ours, theirs, mask, of_each=True).item() == pytest.approx(sum(parts).item() / 2, rel=1e-6)


def test_the_running_teacher_is_matched_where_it_is_asked_for(qat, flags, classifier, tiny, pruning_out):  # noqa: F811
    """The loss of each weight alone is zero for the teacher itself and not for the student; without weights nothing runs."""
    from types import SimpleNamespace

    (task,) = (tiny / "data").glob("texts-*")
    texts, labels = data.read_texts(task, "validation")
    tokens = data.tokenize(texts[:8], labels[:8], transformers.AutoTokenizer.from_pretrained(classifier), 16)
    (batch,) = data.loader(tokens, [torch.arange(8).numpy()], torch.device("cpu"))
    dense, pruned = (checkpoint.load_classifier(path).eval() for path in (classifier, only_run(pruning_out) / "model"))
    zeros = {"distill_weight": 1, "feature_weight": 0, "temperature": 1}
    weights = ("hidden_weight", "attention_weight", "embedding_weight")
    with torch.no_grad(), qat.distill.attention_outputs(blocks_of(dense)) as theirs, \
            qat.distill.attention_outputs(blocks_of(pruned)) as ours:  # fmt: skip
        looked = {name: m(**data.inputs_of(batch), output_hidden_states=True) for name, m in (("d", dense), ("p", pruned))}
        teacher = SimpleNamespace(logits=looked["d"].logits)
        states = looked["d"].hidden_states, theirs
        for name in weights:
            args = SimpleNamespace(**zeros, **dict.fromkeys(weights, 0) | {name: 1})
            assert qat.objective(looked["d"], theirs, batch, teacher, states, args).item() == pytest.approx(0, abs=1e-6)
            alone = qat.objective(looked["p"], ours, batch, teacher, None, args)
            added = qat.objective(looked["p"], ours, batch, teacher, states, args) - alone
            assert (added > 1e-4) == (name != "embedding_weight"), name  # pruning leaves the embeddings alone


def test_predictions_of_the_packed_model_are_those_of_the_fake_quantised_one(qat, flags, tmp_path):
    """Also after training with other kernels (eager attention): the record compares like with like."""
    folder, record = run(qat, [*flags, "--num_epochs", 1], tmp_path)
    packed = checkpoint.load_classifier(folder / "model")
    assert not quantizers.quantized_modules(packed) and record["reload_agreement"] == 1
    assert eval_utils.directory_bytes(folder / "model") == record["metrics"]["qat"]["bytes"]
