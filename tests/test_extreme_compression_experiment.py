"""The script as a user meets it: console and record, formulas, killed and going on, on several processes, and refused."""

import io
import math
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from contextlib import redirect_stdout

import pytest
import torch
from filelock import FileLock
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, AutoTokenizer

import extreme_compression_experiment as script
from common import assets, checkpoint, eval_utils, fetch, finetuning, following, runs, text
from common.gradual import MASKS, GradualTrainer
from common.runs import REPOSITORY, UserError, read_json
from common.sparse_trainer import SparseTrainer, check_sparsity, last_checkpoint
from tests.killing import die_at
from tests.test_finetune_dense import curve, started, tiny, zeros  # noqa: F401
from tests.test_streaming import one_thread  # noqa: F401

LENGTH, SAMPLES, BATCH, EPOCHS = 64, 48, 4, 2
STEPS = SAMPLES // BATCH  # of an epoch
CUBIC = ["--schedule", "cubic", "--initial_density", 1, "--prune_every", 2]


@pytest.fixture(scope="module")
def base(tiny):  # noqa: F811
    """Flags of a run of seconds; what comes after them wins."""
    return ["--fast", "--model", tiny / "dense", "--dataset", tiny / "text", "--eval_text", tiny / "text", "--data_dir",
            tiny / "data", "--base_samples", SAMPLES, "--num_epochs", EPOCHS, "--batch_size", BATCH, "--block_size", LENGTH,
            "--max_eval_samples", 8, "--nsamples", 4, "--precision", "32", "--device", "cpu",
            "--distill_weight", 0.5]  # fmt: skip


def only_run(out):
    (record,) = (out / "extreme").glob("[!.]*/run.json")
    return record.parent


def run(argv, out):
    script.main([*argv, "--out_dir", out])
    folder = only_run(out)
    return folder, read_json(folder / "run.json")


def pairs(argv):
    return zip(argv[::2], argv[1::2], strict=True)


def as_program(argv):
    try:
        runs.run_script(lambda: script.main(argv))
    except SystemExit as stop:
        return stop.code or 0
    return 0


def weights(folder):
    return (folder / "model" / "model.safetensors").read_bytes()


EVERYTHING = ["--format", "sparse", "--with_tracking"]


@pytest.fixture(scope="module")
def alone(base, tmp_path_factory):
    """Left alone: its directory, its record, what it printed."""
    shown = io.StringIO()
    with redirect_stdout(shown):
        folder, record = run([*base, *EVERYTHING], tmp_path_factory.mktemp("alone"))
    return folder, record, shown.getvalue()


@pytest.fixture(scope="module")
def test_stream(tiny, alone):  # noqa: F811
    """The tokens that perplexity is of."""
    (prepared,) = [path for path in (tiny / "data").glob("text-*") if path.is_dir()]
    return text.token_stream(prepared, "test", AutoTokenizer.from_pretrained(tiny / "dense"))


@pytest.fixture
def out(alone, tmp_path):
    """A directory of runs in which the model is pruned already."""
    shutil.copytree(alone[0].parent.parent / "one_shot", tmp_path / "out" / "one_shot")
    return tmp_path / "out"


def test_the_console_of_the_guide(alone, test_stream):
    _, record, shown = alone
    known, epochs = record["perplexity"], record["epochs"]
    baseline, first, last = known["baseline"], epochs["1"]["perplexity"], epochs["2"]["perplexity"]
    n_tokens = len(test_stream)
    rule, arrow = "=" * 70, {True: "↓", False: "↑"}
    for block in (
        f"{rule}\n📊 Baseline Evaluation (Before Training)\n{rule}\n  📖 Loading text-",
        f"  📏 Sequence length: {n_tokens}\n  ✅ Baseline Perplexity: {baseline:.2f}\n{rule}\n",
        f"{rule}\n✅ Epoch 1 Complete\n{rule}\n  📊 Average Loss: {epochs['1']['mean_loss']:.4f}\n"
        f"  🔢 Batches Processed: {STEPS}\n\n"
        "💾 Memory Stats:\n  Memory before entering the train: ",
        f"🔍 Evaluating model after Epoch 1...\n\n{rule}\n📊 Evaluation After Epoch 1\n{rule}\n  📖 Loading text-",
        f"  ✅ Perplexity: {first:.2f}\n  📈 Epoch: 1/2\n  🎯 Density: 0.1000 (sparsity 0.9000)\n{rule}\n",
        f"📈 Perplexity Trend:\n  Baseline: {baseline:.2f}\n  Epoch 1: {first:.2f} "
        f"({arrow[first <= baseline]}{abs(first / baseline - 1):.1%})\n",
        f"{rule}\n📊 Final Perplexity Summary\n{rule}\n  Dense: {known['dense']:.2f}\n  Baseline: {baseline:.2f}\n"
        f"  Final (Epoch 2): {last:.2f}\n  Best (Epoch {record['best_epoch']}, by validation): ",
        f"  Total Improvement: {(baseline - last) / baseline:+.1%}\n{rule}\n",
        "to density 0.10 (sparsity 0.90)",
    ):
        assert block in shown, block
    memory = [int(number) for number in re.findall(r"Memory.*: (-?\d+) MB", shown)]
    assert len(memory) == 4 * EPOCHS and memory[0] > 50 and abs(memory[0] + memory[2] - memory[3]) <= 1


def test_what_is_measured_is_true(alone, test_stream):
    """Perplexities by a loop of our own over what stock transformers loads; density by counting."""
    folder, record, _ = alone
    stream = torch.from_numpy(test_stream.astype("int64"))
    for name, directory in (("dense", record["dense_dir"]), ("trained", record["model_dir"])):
        model, total, n = AutoModelForCausalLM.from_pretrained(directory).double().eval(), 0.0, 0
        for piece in stream.split(128):
            if len(piece) > 1:
                with torch.no_grad():
                    logits = model(input_ids=piece[None]).logits[0, :-1]
                total += float(torch.nn.functional.cross_entropy(logits, piece[1:], reduction="sum"))
                n += len(piece) - 1
        assert record["metrics"][name]["perplexity"] == pytest.approx(math.exp(total / n), rel=1e-4)
    best = record["epochs"][str(record["best_epoch"])]
    assert record["metrics"]["trained"]["perplexity"] == pytest.approx(best["perplexity"], rel=1e-4)
    assert best["validation_perplexity"] == min(epoch["validation_perplexity"] for epoch in record["epochs"].values())
    tensors = {name: value for name, value in load_file(folder / "model" / "model.safetensors").items() if "_proj" in name}
    left = sum(int(value.count_nonzero()) for value in tensors.values()) / sum(value.numel() for value in tensors.values())
    assert left == pytest.approx(0.1, abs=5e-4) and record["sparsity"]["after"] == pytest.approx(1 - left, abs=1e-9)
    assert record["sparsity"]["zeros_lost"] == 0
    start = load_file(f"{record['student_dir']}/model.safetensors")
    for name, value in tensors.items():
        assert not bool(value[start[name] == 0].any()), name
    assert best["perplexity"] < record["perplexity"]["baseline"]


def test_what_is_written(alone):
    folder, record, shown = alone
    assert sorted(path.name for path in folder.iterdir()) == ["history.csv", "model", "run.json", "sparse", "tensorboard"]
    assert list((folder / "tensorboard").iterdir())
    assert record["status"] == "finished" and record["sparse"]["ratio"] <= 0.25
    assert f"({record['sparse']['ratio']:.3f}), rebuilt bit for bit" in shown
    assert curve(folder, "perplexity") == {STEPS * n: record["epochs"][str(n)]["perplexity"] for n in (1, 2)}
    assert len(curve(folder)) >= 10
    for epoch in record["epochs"].values():
        assert epoch["batches"] == STEPS and 0 < epoch["memory_before"] <= epoch["memory_peak"]
        assert epoch["seconds"] > 0 and epoch["evaluation_seconds"] > 0
    asked = read_json(folder / "model" / "compression.json")["stages"]
    assert [stage["asked"]["script"] for stage in asked] == ["main_block.py", "extreme_compression_experiment.py"]


@pytest.mark.parametrize(("size", "steps", "rate"), [(1, 10000, "5e-06"), (4, 2500, "1e-05"), (8, 1250, "1.41e-05")])
def test_steps_and_rate_of_the_guide(size, steps, rate, tiny, base, tmp_path, capsys):  # noqa: F811
    argv = [word for flag, value in pairs(base[1:]) if flag not in ("--base_samples", "--batch_size", "--num_epochs")
            for word in (flag, value)] + ["--batch-size", size, "--sparsity", 0.1]  # fmt: skip
    script.main([*argv, "--out_dir", tmp_path, "--dry_run"])
    assert f"5 epochs of max_step={steps} (batch_size={size}), lr={rate}," in capsys.readouterr().out
    assert not list(tmp_path.iterdir())


def test_finished_is_not_done_again(base, alone, capsys):
    folder, _, _ = alone
    before = weights(folder)
    script.main([*base, *EVERYTHING, "--out_dir", folder.parent.parent])
    shown = capsys.readouterr().out
    assert "(finished before; --resume never starts anew)" in shown and "Step " not in shown and "Final Perplexity" in shown
    assert weights(folder) == before


def test_it_is_followed_on_one_text(base, alone, capsys):
    """A finished run is not compared with perplexities of other windows."""
    assert as_program([*base, *EVERYTHING, "--token_length", 64, "--out_dir", alone[0].parent.parent]) == 2
    printed = capsys.readouterr().err
    assert "is followed on another --eval_text, --token_length or --stride" in printed and "main_block.py" in printed


def test_a_full_disk_is_told_before_the_work(base, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(shutil, "disk_usage", lambda path: type("Usage", (), {"free": 1000})())
    assert as_program([*base, "--out_dir", tmp_path / "out"]) == 2
    assert "are free there, and what is written takes" in capsys.readouterr().err
    assert not (tmp_path / "out" / "extreme").exists()


# ------------------------------------------------------------------------------------------------------------------ killed


def in_the_first_epoch():
    die_at(SparseTrainer, "training_step", 8)


def in_the_second_epoch():
    die_at(SparseTrainer, "training_step", STEPS + 6)


def while_it_follows():
    die_at(eval_utils, "evaluate_perplexity", 3, after=True)


def while_writing():
    die_at(checkpoint, "save_model", 1)


def while_measuring():
    die_at(eval_utils, "perplexity_on", 2)


MOMENTS = (in_the_first_epoch, in_the_second_epoch, while_it_follows, while_writing, while_measuring)


def assert_goes_on(argv, out, started, moment, whole, capsys):  # noqa: F811
    ended, shown = started(1, argv, out, moment, "extreme_compression_experiment")
    assert ended == [-signal.SIGKILL], shown
    folder, record = run(argv, out)
    assert record["status"] == "finished" and weights(folder) == weights(whole[0])
    kept = ("perplexity", "validation_perplexity", "sparsity", "mean_loss", "batches")
    for number, epoch in whole[1]["epochs"].items():
        assert {key: record["epochs"][number][key] for key in kept} == {key: epoch[key] for key in kept}, number
    assert record["perplexity"] == whole[1]["perplexity"] and record["best_epoch"] == whole[1]["best_epoch"]
    for name, values in whole[1]["metrics"].items():
        assert record["metrics"][name]["perplexity"] == values["perplexity"]
    assert not (folder / "checkpoint").exists()
    return capsys.readouterr().out


@pytest.mark.parametrize("moment", MOMENTS, ids=lambda moment: moment.__name__)
def test_a_killed_run_goes_on_exactly(moment, base, alone, out, started, capsys):  # noqa: F811
    shown = assert_goes_on([*base, "--save_every", 5], out, started, moment, alone, capsys)
    assert "sparsity 0.90" in shown and "block 1/" not in shown  # it was pruned before


@pytest.fixture(scope="module")
def gradual(base, tmp_path_factory):
    folder, record = run([*base, *CUBIC], tmp_path_factory.mktemp("gradual"))
    return folder, record


def test_pruned_while_training(gradual, alone):
    folder, record = gradual
    assert record["student_dir"] == record["dense_dir"] and record["perplexity"]["baseline"] == record["perplexity"]["dense"]
    sparsity = curve(folder, "sparsity")
    assert [round(sparsity[step], 3) for step in (STEPS, 2 * STEPS)] == [0.9, 0.9]  # the schedule ends with the first half
    assert record["sparsity"]["after"] == pytest.approx(0.9, abs=5e-4)
    places = zeros(folder / "model")
    share = sum(int(place.sum()) for place in places.values()) / sum(place.numel() for place in places.values())
    assert share == pytest.approx(0.9, abs=5e-4)
    assert not (folder.parent.parent / "one_shot").exists()


def with_a_mask_half_grown():
    die_at(GradualTrainer, "prune_", 4, after=True)


@pytest.mark.parametrize("moment", [in_the_first_epoch, with_a_mask_half_grown], ids=lambda moment: moment.__name__)
def test_gradual_goes_on_exactly_masks_included(moment, base, gradual, tmp_path, started, capsys):  # noqa: F811
    assert_goes_on([*base, *CUBIC, "--save_every", 3], tmp_path / "out", started, moment, gradual, capsys)


def test_checkpoints_hold_the_masks(base, tmp_path, started):  # noqa: F811
    ended, shown = started(1, [*base, *CUBIC, "--save_every", 5], tmp_path / "out", in_the_first_epoch,
                           "extreme_compression_experiment")  # fmt: skip
    assert ended == [-signal.SIGKILL], shown
    found = last_checkpoint(only_run(tmp_path / "out") / "checkpoint")
    assert found.name == "checkpoint-5" and (found / MASKS).exists()
    model = load_file(found / "model.safetensors")
    masks = load_file(found / MASKS)
    for name, mask in masks.items():
        free = ((mask[:, None] >> torch.arange(8)) & 1).flatten()[: model[name].numel()].view(model[name].shape).bool()
        assert torch.equal(free, model[name] != 0), name


@pytest.mark.parametrize("more", [[], CUBIC], ids=["one shot", "cubic"])
def test_two_processes_share_the_model_and_learn_the_same(more, base, alone, gradual, out, started):  # noqa: F811
    """FSDP2; one epoch is measured by the first process on a whole copy."""
    folder, record = gradual if more else alone[:2]
    ended, shown = started(2, [*base, *more], out, None, "extreme_compression_experiment")
    assert ended == [0, 0] and "2 processes (FSDP2)" in shown[0], shown
    assert "Epoch" not in shown[1]
    found = read_json(only_run(out) / "run.json")
    for number, epoch in record["epochs"].items():
        for key in ("perplexity", "validation_perplexity", "mean_loss"):
            assert found["epochs"][number][key] == pytest.approx(epoch[key], rel=2e-4 if not more else 5e-3), (number, key)
        assert found["epochs"][number]["sparsity"] == pytest.approx(epoch["sparsity"], abs=1e-4)
    if not more:
        ours, theirs = zeros(only_run(out) / "model"), zeros(folder / "model")
        assert all(torch.equal(ours[name], theirs[name]) for name in theirs)


# ------------------------------------------------------------------------------------------------------------ out of bounds


def test_patience(base, out):
    """At a rate of zero no epoch is better than the first one."""
    _, record = run([*base, "--base_lr", 0, "--patience", 1, "--num_epochs", 4], out)
    assert sorted(record["epochs"]) == ["1", "2"] and record["best_epoch"] == 1


def test_nan_ends_it_with_advice(base, out, monkeypatch, capsys):
    step = SparseTrainer.compute_loss

    def broken(trainer, *args, **kwargs):
        return step(trainer, *args, **kwargs) * (math.nan if trainer.state.global_step >= STEPS + 3 else 1)

    monkeypatch.setattr(SparseTrainer, "compute_loss", broken)
    assert as_program([*base, "--out_dir", out]) == 2
    printed = capsys.readouterr().err
    assert re.search(rf"error: (loss|grad_norm) is nan at step {STEPS}|error: .* is nan at step 1[4-9]", printed)
    assert f"checkpoint-{STEPS}" in printed and "--base_lr" in printed
    assert read_json(only_run(out) / "run.json")["status"] == "failed"
    assert last_checkpoint(only_run(out) / "checkpoint").name == f"checkpoint-{STEPS}"


@pytest.mark.parametrize("error", [torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 20.00 GiB"),
                                   RuntimeError("DefaultCPUAllocator: can't allocate memory: you tried to allocate")],
                         ids=["GPU", "CPU"])  # fmt: skip
def test_out_of_memory_says_what_fits(error, base, out, monkeypatch, capsys):
    def full(*args):
        raise error

    monkeypatch.setattr(SparseTrainer, "training_step", full)
    assert as_program([*base, "--out_dir", out]) == 2
    printed = capsys.readouterr().err.splitlines()[-1]
    assert printed.startswith(f"error: out of memory with forwards of 4 windows of {LENGTH} tokens: ")
    assert "--gradient_accumulation_steps 2: forwards of 2" in printed
    assert as_program([*base, "--out_dir", out, "--gradient_accumulation_steps", 4]) == 2
    assert "--block_size" in capsys.readouterr().err


def test_another_error_is_not_hidden(base, out, monkeypatch):
    def wrong(*args):
        raise RuntimeError("shapes do not match")

    monkeypatch.setattr(SparseTrainer, "training_step", wrong)
    with pytest.raises(RuntimeError, match="shapes do not match"):
        script.main([*base, "--out_dir", out])


def test_accumulation_changes_nothing(base, alone, out):
    _, record = run([*base, "--gradient_accumulation_steps", 4], out)
    for number, epoch in alone[1]["epochs"].items():
        assert record["epochs"][number]["perplexity"] == pytest.approx(epoch["perplexity"], rel=2e-4)
    assert record["config"] == alone[1]["config"]


BAD = {
    "density 0": (["--sparsity", 0], "--sparsity 0.0: is the share of weights that is kept"),
    "the same twice": (["--sparsity", 0.1, "--density", 0.2], "argument --density: not allowed with argument --sparsity"),
    "a dense model beside one": (["--dense_model", "there"], "--dense_model: is for --prune_method none"),
    "density of nothing": (["--sparsity", 0.0005], "expected 0.001 to 1"),
    "pattern and allocation": (["--sparsity_type", "2:4", "--sparsity", 0.5, "--allocation", "owl"], "--allocation owl: every"),
    "pruned before, of another density": (["--prune_method", "none", "--no_distill"], "has density 1.0000, and --sparsity"),
    "nobody knows its dense model": (["--prune_method", "none"], "no record names the dense model"),
    "a GPU by number": (["--device", "cuda:0"], "--device cuda:0: name GPUs by CUDA_VISIBLE_DEVICES"),
    "density 1.2": (["--density", 1.2], "--sparsity 1.2: is the share of weights that is kept"),
    "a share as percent": (["--sparsity", 10], "expected 0.001 to 1"),
    "unknown short name": (["--model", "opt-350"], "tiny_llama, opt-125m, opt-350m, opt-1.3b"),
    "no batch": (["--batch_size", 0], "--batch_size 0: expected a value from 1"),
    "a batch larger than an epoch": (["--base_samples", 2], "--base_samples 2: is less than one --batch_size 4"),
    "accumulation": (["--gradient_accumulation_steps", 3], "--batch_size 4: 1 processes with 3 forwards each do not divide it"),
    "no accumulation": (["--gradient_accumulation_steps", 0], "--gradient_accumulation_steps 0: expected 1 or more"),
    "a rate": (["--base_lr", 2], "--base_lr 2.0: expected a value from 0 to 1"),
    "positions": (["--block_size", 129], "--block_size 129: this llama model has 128 positions"),
    "positions of the evaluation": (["--token_length", 4096], "--token_length 4096: this llama model has 128 positions"),
    "stride": (["--token_length", 64, "--stride", 65], "--stride 65: expected 1 to 64"),
    "pattern and density": (["--sparsity_type", "2:4"], "--sparsity_type 2:4: keeps 0.5 of the weights, and --sparsity asks"),
    "pattern": (["--sparsity_type", "4:2", "--sparsity", 0.5], "--sparsity_type 4:2"),
    "block": (["--sparsity_type", "block", "--pattern_block", "5"], "--block_size 5x5: model.layers.0.self_attn.q_proj"),
    "cubic blocks": (["--schedule", "cubic", "--sparsity_type", "block"], "--schedule cubic: prunes single weights"),
    "cubic muon": (["--schedule", "cubic", "--optim", "muon"], "--schedule cubic: prunes single weights"),
    "cubic upwards": (["--schedule", "cubic", "--initial_density", 0.05], "--initial_density 0.05: is below --sparsity 0.1"),
    "text": (["--eval_text", "no/such/text"], "no/such/text"),
    "generation": (["--generation_metrics", -1], "--generation_metrics -1: expected 0 or more"),
    "method": (["--prune_method", "all"], "--prune_method"),
    "epochs": (["--num_epochs", "many"], "--num_epochs"),
}  # fmt: skip


@pytest.mark.parametrize(("more", "told"), BAD.values(), ids=BAD.keys())
def test_refused_before_a_model_is_loaded(more, told, base, tmp_path, monkeypatch, capsys):
    def loads(*args, **kwargs):
        raise AssertionError("a model was loaded")

    monkeypatch.setattr(script, "load_causal_lm", loads)
    monkeypatch.setattr(following, "load_causal_lm", loads)
    assert as_program([*base, *more, "--out_dir", tmp_path / "out"]) == 2
    printed = capsys.readouterr().err
    assert printed.startswith("error: ") and told in printed and printed.count("\n") == 1
    assert not (tmp_path / "out").exists()


def test_a_model_of_the_hub_that_cannot_be_had_names_the_way_out(base, tmp_path, capsys):
    assert as_program([*base, "--model", "opt-350m", "--out_dir", tmp_path / "out"]) == 2
    printed = capsys.readouterr().err
    assert printed.startswith("error: ") and "facebook/opt-350m" in printed and "tiny_llama" in printed


def test_a_pruning_that_fails_ends_it(base, tmp_path, monkeypatch, capsys):
    (tmp_path / "main_block.py").write_text("raise SystemExit(2)")
    monkeypatch.setattr(finetuning, "REPOSITORY", tmp_path)
    assert as_program([*base, "--out_dir", tmp_path / "out"]) == 2
    shown = capsys.readouterr()
    assert "$ python main_block.py --model " in shown.out
    assert shown.err.splitlines()[-1] == "error: main_block.py ended with exit status 2: there is no pruned model to train"


def test_it_goes_on_from_what_was_pruned_before(base, alone, out):
    """--prune_method none: the dense model that taught before, as the record of the pruning names it, teaches again."""
    argv = [*base, "--prune_method", "none", "--model", alone[1]["student_dir"], "--num_epochs", 1, "--distill_weight", 1]
    _, record = run(argv, out)
    assert record["student_dir"] == alone[1]["student_dir"] and record["dense_dir"] == alone[1]["dense_dir"]
    assert record["perplexity"]["dense"] == alone[1]["perplexity"]["dense"] != record["perplexity"]["baseline"]
    assert record["sparsity"]["after"] == pytest.approx(0.9, abs=5e-4) and record["epochs"]["1"]["mean_loss"] > 0.1
    start, ended = (load_file(f"{folder}/model.safetensors") for folder in (record["student_dir"], record["model_dir"]))
    assert any(not torch.equal(start[name], ended[name]) for name in start)


def test_the_sparse_format_is_a_model_to_go_on_from(base, alone, out):
    argv = [*base, "--prune_method", "none", "--model", alone[0] / "sparse", "--num_epochs", 1]
    _, record = run([*argv, "--dense_model", alone[1]["dense_dir"]], out)
    assert record["perplexity"]["baseline"] == pytest.approx(alone[1]["metrics"]["trained"]["perplexity"], rel=1e-5)
    assert record["sparsity"]["zeros_lost"] == 0


def test_half_precision_stays_half(tiny, base, tmp_path):  # noqa: F811
    """The directory is in the dtype that the dense model is stored in, and says so."""
    dense = AutoModelForCausalLM.from_pretrained(tiny / "dense").to(torch.bfloat16)
    dense.save_pretrained(tmp_path / "half")
    AutoTokenizer.from_pretrained(tiny / "dense").save_pretrained(tmp_path / "half")
    argv = [*base, "--model", tmp_path / "half", "--num_epochs", 1, "--prune_method", "magnitude", "--format", "sparse"]
    folder, _ = run(argv, tmp_path / "out")
    assert {value.dtype for value in load_file(folder / "model" / "model.safetensors").values()} == {torch.bfloat16}
    for name in ("model", "sparse"):
        assert AutoModelForCausalLM.from_pretrained(folder / name, trust_remote_code=name == "sparse").dtype == torch.bfloat16
    tensors = [value for name, value in load_file(folder / "model" / "model.safetensors").items() if "_proj" in name]
    assert all(bool((value.view(torch.int16)[value == 0] == 0).all()) for value in tensors)  # no negative zero


def test_zeros_that_training_loses_are_seen(base, alone, out, monkeypatch, capsys):
    """And what was refused is not taken for done by the next start."""
    state_of = SparseTrainer.full_state

    def broken(trainer):
        state = state_of(trainer)
        name = "model.layers.0.mlp.up_proj.weight"
        row = state[name][0]
        row[row == 0] = 1.0
        return state

    monkeypatch.setattr(SparseTrainer, "full_state", broken)
    argv = [*base, "--num_epochs", 1]
    for _ in range(2):
        with pytest.raises(RuntimeError, match="weights that were zero are not any more"):
            run(argv, out)
        assert not (only_run(out) / "model").exists()
    monkeypatch.undo()
    _, record = run(argv, out)
    assert record["sparsity"]["zeros_lost"] == 0 and record["status"] == "finished"


def stopped_while_it_is_read_back():
    die_at(finetuning, "read_back", 1)


def killed_before_the_sparse_one_is_recorded():
    die_at(checkpoint, "save_bitmask", 1, after=True)


@pytest.mark.parametrize("moment", [stopped_while_it_is_read_back, killed_before_the_sparse_one_is_recorded],
                         ids=lambda moment: moment.__name__)  # fmt: skip
def test_what_is_written_and_not_recorded_is_done_again(moment, base, alone, out, started):  # noqa: F811
    argv = [*base, "--format", "sparse"]
    ended, shown = started(1, argv, out, moment, "extreme_compression_experiment")
    assert ended == [-signal.SIGKILL], shown
    folder, record = run(argv, out)
    assert weights(folder) == weights(alone[0]) and record["sparse"]["ratio"] == alone[1]["sparse"]["ratio"]
    assert record["sparsity"] == alone[1]["sparsity"] and record["best_epoch"] == alone[1]["best_epoch"]


def test_what_changes_nothing_is_no_other_run(base, tmp_path, monkeypatch):
    names = []
    monkeypatch.setattr(script, "Run", lambda *given, **more: names.append(given[2]) or sys.exit(9))
    for more in ([], ["--schedule_share", 0.2, "--initial_density", 0.3, "--prune_every", 7, "--pattern_block", "4"]):
        assert as_program([*base, *more, "--out_dir", tmp_path]) == 9
    assert names[0] == names[1]
    for more in ([], ["--distill_weight", 0.1, "--hidden_weight", 3, "--temperature", 2]):
        assert as_program([*base, "--no_distill", *more, "--out_dir", tmp_path]) == 9
    assert names[2] == names[3] != names[0]


def test_another_calibration_text_is_another_pruning(base, tiny, alone, out, monkeypatch):  # noqa: F811
    """The text may have changed under the same name."""
    asked = []
    monkeypatch.setattr(finetuning, "run_main_block", lambda words: asked.append(words) or 2)
    args, _ = script.parse_args([*base, "--out_dir", out])
    dense = assets.resolve_model(str(tiny / "dense"), tiny / "data")
    source = text.prepare_text(str(tiny / "text"), tiny / "data")
    assert str(script.prune(args, dense, source, 0.1)) == alone[1]["student_dir"] and not asked
    changed = fetch.Asset(source.path, source.record | {"sha256": "0" * 64})
    with pytest.raises(UserError, match="main_block"):
        script.prune(args, dense, changed, 0.1)
    assert len(asked) == 1


def test_a_run_of_one_process_is_not_gone_on_with_by_two(base, alone, out, started):  # noqa: F811
    ended, shown = started(1, [*base, "--save_every", 5], out, in_the_first_epoch, "extreme_compression_experiment")
    assert ended == [-signal.SIGKILL], shown
    ended, shown = started(2, [*base, "--save_every", 5], out, None, "extreme_compression_experiment")
    assert 2 in ended and "was saved by one process, and so it has to go on" in shown[0] + shown[1], shown


def test_out_of_memory_while_it_measures(base, out, monkeypatch, capsys):
    def full(*args, **kwargs):
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 20.00 GiB")

    with monkeypatch.context() as patch:
        patch.setattr(eval_utils, "evaluate_perplexity", full)
        assert as_program([*base, "--out_dir", out]) == 2
        assert "Use a shorter --token_length" in capsys.readouterr().err
    _, record = run([*base, "--token_length", 64, "--num_epochs", 1], out / "again")  # nothing was followed before
    assert record["followed"][1] == 64


def test_sigterm_ends_the_pruning_too(base, tmp_path):
    command = [sys.executable, REPOSITORY / "extreme_compression_experiment.py", *base, "--nsamples", 400, "--out_dir",
               tmp_path / "out"]  # fmt: skip
    process = subprocess.Popen([str(word) for word in command], stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True,
                               env=os.environ | {"OMP_NUM_THREADS": "1"})  # fmt: skip
    end = time.monotonic() + 120
    while not list((tmp_path / "out" / "one_shot").glob("*/run.json")):
        assert process.poll() is None and time.monotonic() < end, process.communicate()[0][-2000:]
        time.sleep(0.02)
    process.terminate()
    shown = process.communicate(timeout=120)[0]
    assert process.returncode == 130 and "The same command goes on with the pruning" in shown, shown[-2000:]
    (record,) = (tmp_path / "out" / "one_shot").glob("*/run.json")
    FileLock(record.parent.parent / f".{record.parent.name}.lock").acquire(timeout=0)  # it has ended, and lets go of its run


def test_continuations_are_scored(base, alone, capsys):
    """The finished run is not trained again for them."""
    pytest.importorskip("sacrebleu", reason="sacrebleu is not installed (requirements-extra.txt)")
    script.main([*base, *EVERYTHING, "--generation_metrics", 3, "--out_dir", alone[0].parent.parent])
    shown = capsys.readouterr().out
    assert "BLEU of continuations" in shown and "ROUGE-L" in shown and "Step " not in shown
    found = read_json(alone[0] / "run.json")["metrics"]
    for values in found.values():
        assert values["n_continuations"] == 3 and 0 <= values["bleu"] <= 100 and 0 <= values["rougeL"] <= 1


def test_the_program_says_how_to_go_on_after_ctrl_c(base, out):
    command = [sys.executable, REPOSITORY / "extreme_compression_experiment.py", *base, "--num_epochs", 500, "--out_dir", out]
    process = subprocess.Popen([str(word) for word in command], stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True,
                               env=os.environ | {"OMP_NUM_THREADS": "1"})  # fmt: skip
    end = time.monotonic() + 120
    while not list((out / "extreme").glob("*/history.csv")):
        assert process.poll() is None and time.monotonic() < end, process.communicate()[0][-2000:]
        time.sleep(0.05)
    process.send_signal(signal.SIGINT)
    shown = process.communicate(timeout=120)[0]
    assert process.returncode == 130 and "interrupted. The same command goes on from step" in shown, shown[-2000:]
    found = last_checkpoint(only_run(out) / "checkpoint")
    model = load_file(found / "model.safetensors")
    left = [value for name, value in model.items() if "_proj" in name]
    assert sum(int(v.count_nonzero()) for v in left) / sum(v.numel() for v in left) == pytest.approx(0.1, abs=5e-4)


def test_masks_hold_in_every_optimizer(base, alone, out):
    _, record = run([*base, "--optim", "muon", "--num_epochs", 1], out)
    assert record["sparsity"]["zeros_lost"] == 0
    model = following.load_causal_lm(record["model_dir"])
    assert check_sparsity(model) == pytest.approx(0.9, abs=5e-4)
