"""The script as a user meets it: runs, the guide's configurations, killed and resumed, several processes, what is refused."""

import csv
import errno
import functools
import json
import math
import multiprocessing
import os
import random
import re
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pandas
import psutil
import pytest
import torch
from torch.nn import functional

import train_optimized as script
from common import checkpoint, loading, posterior, runs, train_utils, vae_eval
from common.runs import REPOSITORY, read_json
from tests.killing import die_at
from tests.test_8_pruning_with_finetuning import load_script

WORDS = ["good", "bad", "film", "story", "the", "a", "of", "is", "and", "actor", "long", "short", "well", "not"]
TINY = ["--device", "cpu", "--precision", "32", "--width", 16, "--n_layers", 1, "--n_heads", 2, "--latent_dim", 4,
        "--max_sequence_length", 16, "--num_workers", 0, "--num_epochs", 2, "--dropout", 0.1, "--word_dropout", 0.1,
        "--iw_samples", 2, "--n_evaluated", 8, "--learning_rate", 0.01, "--update_frequency", 3, "--plot_frequency", 6,
        "--val_check_interval", 0.5]  # fmt: skip
STEPS = 14  # of these flags on the texts below, 7 an epoch


def hasten():
    """One thread, so that processes agree bit for bit; few steps of an encoder that is trained ahead."""
    torch.set_num_threads(1)
    script.INNER, script.MOST_INNER = 3, 9


@pytest.fixture(scope="module", autouse=True)
def hastened():
    threads = torch.get_num_threads()
    hasten()
    yield
    torch.set_num_threads(threads)


@pytest.fixture(scope="module")
def base(tmp_path_factory):
    """Flags of a small run on 60 texts in a Parquet file; what comes after them wins."""
    folder, pick = tmp_path_factory.mktemp("texts"), random.Random(0)
    texts = [f"{i} {' '.join(pick.choices(WORDS, k=pick.randint(1, 12)))}" for i in range(60)]
    pandas.DataFrame({"text": texts[:54]}).to_parquet(folder / "train.parquet")
    pandas.DataFrame({"text": texts[54:]}).to_parquet(folder / "validation.parquet")
    return ["--data", folder, "--data_dir", folder / "data", *TINY]


def only_run(out):
    (record,) = (out / "vae").glob("[!.]*/run.json")
    return record.parent


def run(argv, out):
    script.main([*argv, "--out_dir", out])
    return only_run(out), read_json(only_run(out) / "run.json")


def as_program(argv):
    try:
        runs.run_script(lambda: script.main(argv))
    except SystemExit as stop:
        return stop.code
    return 0


def weights(folder):
    """The best model, and the last weights."""
    return (folder / "model" / "model.safetensors").read_bytes(), (folder / "weights" / "last.safetensors").read_bytes()


def curves(folder):
    """history.csv without the speeds, and posterior.csv."""
    with open(folder / "history.csv", newline="") as file:
        rows = [row for row in csv.reader(file) if row[2] != "examples_per_second"]
    return rows, (folder / "posterior.csv").read_text()


@pytest.fixture(scope="module")
def undisturbed(base, tmp_path_factory):
    return run(base, tmp_path_factory.mktemp("undisturbed"))


# ---------------------------------------------------------------------------------------------------------------- a run


def test_a_run_and_its_record(undisturbed, base, capsys):
    folder, record = undisturbed
    assert record["status"] == "finished" and record["config"]["script"] == "train_optimized.py"
    assert sorted(path.name for path in folder.iterdir()) == ["dashboards", "history.csv", "model", "posterior.csv", "run.json",
                                                              "texts", "weights"]  # fmt: skip
    found = record["metrics"]["vae"]
    assert found["n"] == 6 and found["tokens"] > 12 and 1 < found["perplexity"] < 8192
    assert found["importance_weighted_nll"] <= found["negative_elbo"] and len(found["kl_of"]) == 4
    assert {"waiting for data", "monitoring", "validation"} <= record["timings_of_training"].keys()
    assert record["peak_memory"] > 50 * 2**20 and record["verdict"] == ["starting", "before step 200"]
    rows, looks = curves(folder)
    validations = [(int(row[0]), float(row[3])) for row in rows if row[2] == "negative_elbo"]
    assert [step for step, _ in validations] == [4, 7, 11, 14]
    assert validations[-1][1] < validations[0][1]  # it learns
    best = sorted([value, step] for step, value in validations)[:2]
    assert record["best"] == best
    names = sorted(path.name for path in (folder / "weights").iterdir())
    assert names == ["last.safetensors", *sorted(f"step-{step:06d}.safetensors" for _, step in best)]
    assert [int(line.split(",")[0]) for line in looks.splitlines()[1:]] == [3, 6, 9, 12]
    assert sorted(path.name for path in (folder / "dashboards").iterdir()) == ["posterior-000006.png", "posterior-000012.png"]
    lines = {path.stem: path.read_text().splitlines() for path in (folder / "texts").iterdir()}
    assert len(lines["samples"]) == 10 and len(lines["interpolation"]) == 12
    assert lines["interpolation"][0].startswith("from   ") and lines["reconstructions"][0].startswith("text   ")
    betas = [float(row[3]) for row in rows if row[2] == "beta"]
    assert betas[0] == pytest.approx(2 / 7) and betas[-1] == 1

    before = (folder / "run.json").read_bytes()
    script.main([*base, "--out_dir", folder.parent.parent])
    assert "finished before" in capsys.readouterr().out and (folder / "run.json").read_bytes() == before


def test_the_saved_model_is_the_best_one_and_loads(undisturbed):
    folder, record = undisturbed
    model = checkpoint.load_own(folder / "model", script.TextVAE)
    best = checkpoint.load_tensors(folder / "weights" / f"step-{record['best'][0][1]:06d}.safetensors")
    assert all(torch.equal(best[name], value) for name, value in model.state_dict().items())
    config = read_json(folder / "model" / "config.json")
    assert config["class"] == "TextVAE" and config["shape"]["latent_dim"] == 4
    (folder / "model" / "config.json").write_text(json.dumps(config | {"class": "Other"}))
    with pytest.raises(runs.UserError, match="holds no TextVAE, but Other"):
        checkpoint.load_own(folder / "model", script.TextVAE)
    (folder / "model" / "config.json").write_text(json.dumps(config))


def test_the_report_measures_it_again(undisturbed, base, tmp_path, capsys):
    """As its run judged it; a figure that is not the recorded one is told."""
    folder, record = undisturbed
    seven = load_script(REPOSITORY / "7_evaluate_and_generate_report.py", "script_7")
    shutil.copytree(folder, tmp_path / "vae" / "changed")
    found = record["metrics"]["vae"] | {"negative_elbo": 1.001 * record["metrics"]["vae"]["negative_elbo"]}
    (tmp_path / "vae" / "changed" / "run.json").write_text(json.dumps(record | {"metrics": {"vae": found}}))
    argv = ["--runs", folder, tmp_path / "vae" / "changed", "--data_dir", base[3], "--report_dir", tmp_path / "report"]
    seven.main(argv)
    told = [line for line in capsys.readouterr().out.splitlines() if line.startswith(("skipped", "differs"))]
    assert len(told) == 1 and told[0].startswith("differs: vae/changed: negative_elbo "), told
    with open(tmp_path / "report" / "summary.csv", newline="", encoding="utf-8") as file:
        row, _ = csv.DictReader(file)
    assert float(row["negative_elbo"]) == pytest.approx(record["metrics"]["vae"]["negative_elbo"], rel=1e-4)
    assert int(row["n"]) == 6 and int(row["parameters"]) == record["metrics"]["vae"]["parameters"] and not row["perplexity"]
    page = (tmp_path / "report" / "index.html").read_text(encoding="utf-8")
    assert "importance weighted nll" in page and "negative elbo over steps" in page
    seven.main([*argv, "--fast"])
    assert "differs" not in capsys.readouterr().out


def test_watching_changes_nothing_and_costs_no_randomness(base, undisturbed, tmp_path):
    folder, _ = run([*base, "--disable_metrics_monitoring"], tmp_path)
    assert weights(folder) == weights(undisturbed[0]) and not (folder / "posterior.csv").exists()


@pytest.mark.parametrize("flags", [["--num_workers", 2], ["--no_use_dynamic_padding"], ["--data", "again"]])
def test_what_makes_no_difference_and_what_does(flags, base, undisturbed, tmp_path):
    flags = flags if flags[0] != "--data" else []
    folder, _ = run([*base, *flags], tmp_path)
    assert (weights(folder) == weights(undisturbed[0])) == ("--no_use_dynamic_padding" not in flags)


@pytest.mark.parametrize("flags", [
    ["--kl_annealing", "cyclical", "--free_bits", 0.5], ["--kl_annealing", "none"], ["--aggressive", "--num_epochs", 3],
    ["--fast_detection", "--update_frequency", 2, "--precision", "bf16-mixed", "--word_dropout", 0], ["--data", "text"],
])  # fmt: skip
def test_other_choices_train_too(flags, base, tmp_path, capsys):
    if flags == ["--data", "text"]:
        (tmp_path / "plain.txt").write_text("\n\n".join(f"text number {i}" for i in range(30)))
        flags = ["--data", tmp_path / "plain.txt", "--data_dir", tmp_path / "data"]
    folder, record = run([*base, *flags], tmp_path)
    assert record["status"] == "finished" and math.isfinite(record["metrics"]["vae"]["negative_elbo"])
    if "--fast_detection" in flags:  # only what changes is said, and a flag beats the mode
        assert capsys.readouterr().out.count("posterior starting") == 1 and len(curves(folder)[1].splitlines()) == 1 + 7


# ----------------------------------------------------------------------------------------------- the guide's four, as written


GUIDE = (REPOSITORY / "docs" / "train_optimized.md").read_text(encoding="utf-8")
CONFIGURATIONS = {
    "fast": "--batch_size 4 --num_workers 8 --pin_memory --gradient_accumulation_steps 2 --max_sequence_length 1000 "
            "--precision 16-mixed --fast_detection",
    "maximum": "--batch_size 4 --num_workers 8 --pin_memory --gradient_accumulation_steps 2 --max_sequence_length 1000 "
               "--precision 16-mixed --disable_metrics_monitoring --compile_model",
    "low memory": "--batch_size 2 --num_workers 4 --max_sequence_length 500 --precision 16-mixed --fast_detection",
    "debug": "--batch_size 1 --num_workers 2 --max_sequence_length 100 --precision 32 --fast_detection",
}  # fmt: skip


@pytest.mark.parametrize("name", CONFIGURATIONS)
def test_the_guides_configurations_run_as_written(name, base, tmp_path, monkeypatch, capsys):
    """With the sizes of the model, the texts and the end made small."""
    flags = CONFIGURATIONS[name].split()
    if name == "maximum" and not any(map(script.train_utils.shutil.which, ("g++", "clang++"))):
        pytest.skip("torch.compile needs a C++ compiler")
    assert f"python train_optimized.py {CONFIGURATIONS[name]}" in GUIDE
    # traced as for inductor, without its minutes in the C++ compiler
    monkeypatch.setattr(torch, "compile", functools.partial(torch.compile, backend="eager"))
    small = ["--width", 16, "--n_layers", 1, "--n_heads", 2, "--num_epochs", 1, "--n_evaluated", 4, "--iw_samples", 1]
    folder, record = run([*base[:4], "--device", "cpu", *small, *flags], tmp_path)
    printed, cores = capsys.readouterr().out, script.processes.cores()
    config = record["config"]
    assert config["batch_size"] == int(flags[1])
    assert config["max_sequence_length"] == int(flags[flags.index("--max_sequence_length") + 1])
    asked = int(flags[3])
    assert (f"--num_workers {asked} -> {cores}" in printed) == (asked > cores)
    if "16-mixed" in flags:
        assert f"--precision 16-mixed -> {config['precision']}" in printed and config["precision"] in ("32", "bf16-mixed")
    assert (folder / "posterior.csv").exists() is False and config["update_frequency"] == (50 if name == "maximum" else 100)


def test_the_baseline_changes_values_and_a_flag_beats_it(base):
    args, _ = script.parse(["--baseline"])
    assert (args.batch_size, args.gradient_accumulation_steps, args.precision, args.padded) == (1, 1, "32", 1000)
    assert (args.update_frequency, args.plot_frequency, args.window_size, args.save_top_k) == (20, 200, 100, 3)
    args, _ = script.parse(["--baseline", "--fast-detection", "--batch_size", "3", "--use_dynamic_padding", "--fast"])
    assert (args.batch_size, args.update_frequency, args.padded, args.width) == (3, 100, None, 128)
    args, _ = script.parse([])
    assert (args.batch_size, args.gradient_accumulation_steps, args.num_epochs, args.update_frequency) == (4, 2, 10, 50)
    assert (args.val_check_interval, args.limit_val_batches, args.max_sequence_length) == (0.1, 0.1, 1000)


def test_the_manual_says_what_the_two_modes_change():
    lines = GUIDE.split("change these, in both columns")[1].split("Other flags:")[0].splitlines()
    rows = [[cell.strip() for cell in line.replace("`", "").split("|")[1:-1]] for line in lines if line.startswith("| `--")]
    table = {tuple(cells[0].split(", ")): cells[1:] for cells in rows}

    def said(flag, column):
        ((flags, cells),) = [(flags, cells) for flags, cells in table.items() if f"--{flag}" in flags]
        found = cells[column].split(", ")[flags.index(f"--{flag}")]
        return {"on": "True", "off": "False"}.get(found, found)

    default = {row[0]: row[1] for row in script.PRESETS}
    assert {flag: said(flag, 0) for flag in script.BASELINE} == {flag: str(default[flag]) for flag in script.BASELINE}
    assert {flag: said(flag, 2) for flag in script.BASELINE} == {flag: str(value) for flag, value in script.BASELINE.items()}
    changed = script.FAST_DETECTION
    assert {flag: said(flag, 1) for flag in changed} == {flag: str(value) for flag, value in changed.items()}


# ------------------------------------------------------------------------------------------------------------ the model


@pytest.fixture
def model():
    torch.manual_seed(0)
    return script.TextVAE(50, 20, 16, 2, 2, 4).eval()


def test_padding_changes_nothing(model):
    ids, lengths = torch.randint(1, 50, (3, 9)), torch.tensor([9, 4, 1])
    noise = torch.randn(3, 4)
    nats, mean, log_variance = model(ids, lengths, noise)
    for i, length in enumerate(lengths.tolist()):
        alone = model(ids[i : i + 1, :length], lengths[i : i + 1], noise[i : i + 1])
        for found, expected in zip((nats, mean, log_variance), alone, strict=True):
            assert torch.allclose(found[i], expected[0], atol=1e-5)


def test_the_decoder_sees_what_was_before_and_z_in_every_layer(model):
    ids, z = torch.randint(1, 50, (1, 8)), torch.randn(1, 4)
    logits = model.decode(ids, z)
    changed = ids.clone()
    changed[0, 5] = (changed[0, 5] + 1) % 50
    other = model.decode(changed, z)
    assert torch.allclose(logits[:, :5], other[:, :5], atol=1e-6) and not torch.allclose(logits[:, 5:], other[:, 5:], atol=1e-3)
    assert not torch.allclose(logits, model.decode(ids, z + 1), atol=1e-3)
    for block in model.decoder:  # each layer alone lets z through
        kept = [other.latent.weight.clone() for other in model.decoder]
        with torch.no_grad():
            for other in model.decoder:
                other.latent.weight.mul_(other is block)
            assert not torch.allclose(model.decode(ids, z), model.decode(ids, z + 1), atol=1e-3)
            for other, weight in zip(model.decoder, kept, strict=True):
                other.latent.weight.copy_(weight)


def test_the_encoder_sees_both_ways(model):
    ids, lengths = torch.randint(1, 50, (1, 6)), torch.tensor([6])
    model.zero_grad()
    embedded = []
    hook = model.drop.register_forward_hook(lambda module, args, out: embedded.append(out) or out.retain_grad())
    model.encode(ids, lengths)[0].sum().backward()
    hook.remove()
    assert (embedded[0].grad.abs().sum(2) > 0).all()


def test_the_loss_by_hand(model):
    """-log p(x|z) word by word, the text shifted behind token 0; dropped words are the row behind the vocabulary."""
    ids, lengths, z = torch.randint(1, 50, (1, 5)), torch.tensor([4]), torch.randn(1, 4)
    dropped = torch.tensor([[False, True, False, False, False]])
    nats = 0.0
    for t in range(4):
        seen = torch.tensor([[0, *ids[0, :t].tolist()]])
        seen[0, 1:][dropped[0, :t]] = 50
        nats -= functional.log_softmax(model.decode(seen, z)[0, -1].double(), 0)[ids[0, t]].item()
    assert model.reconstruction(ids, lengths, z, dropped).item() == pytest.approx(nats, rel=1e-5)
    assert model.embedding.weight.shape == (51, 16)


@pytest.mark.parametrize(("kind", "expected"), [
    ("none", [1, 1, 1, 1, 1, 1, 1, 1]), ("linear", [0, 0.25, 0.5, 0.75, 1, 1, 1, 1]), ("cyclical", [0, 1, 0, 1, 0, 1, 0, 1]),
])  # fmt: skip
def test_annealing(kind, expected):
    args = type("Args", (), {"kl_annealing": kind, "kl_rise": 0.5})
    assert [script.kl_weight(step, 8, args) for step in range(8)] == expected


def steps_of(model, **flags):
    args, _ = script.parse([str(word) for word in TINY])
    vars(args).update({"word_dropout": 0.0, "rank": 0, **flags})
    return script.Steps(model, args, 5.0)


def batch(n=4, seed=0):
    generator = torch.Generator().manual_seed(seed)
    return {"ids": torch.randint(1, 50, (n, 6), generator=generator), "lengths": torch.tensor([6, 2, 4, 1])[:n]}


@pytest.mark.parametrize("free", [0.0, 0.2])
def test_objective_and_free_bits(model, free):
    steps = steps_of(model, free_bits=free)
    loss, nats, kl, n = steps.backward(batch(), [7], 4, 0.3).tolist()
    mean, log_variance = model.encode(**batch())
    per_dimension = torch.distributions.kl_divergence(torch.distributions.Normal(mean, (0.5 * log_variance).exp()),
                                                      torch.distributions.Normal(0.0, 1.0))  # fmt: skip
    assert kl == pytest.approx(per_dimension.sum().item(), rel=1e-5) and n == 4
    counted = sum(max(free, value) for value in per_dimension.flatten().tolist())
    assert loss == pytest.approx(nats + 0.3 * counted, rel=1e-5)


def gradients(model):
    return torch.cat([p.grad.flatten() for p in model.parameters()])


def test_gradients_are_sums_over_the_texts_of_a_step(model, monkeypatch):
    """Two halves of a batch give what the whole one gives, in nats a text over the mean length."""
    noise = torch.randn(4, 4)
    steps = steps_of(model, dropout=0.0)
    drawn = []
    monkeypatch.setattr(script.torch, "randn", lambda n, d, device: (drawn.append(n), noise[sum(drawn[:-1]) :][:n])[1])
    halves = [{name: part[i : i + 2] for name, part in batch().items()} for i in (0, 2)]
    sums = sum(steps.backward(half, [0], 4, 1.0) for half in halves)
    found = gradients(model)
    model.zero_grad()
    drawn.clear()
    whole = steps.backward(batch(), [0], 4, 1.0)
    assert torch.allclose(sums, whole) and torch.allclose(found, gradients(model), atol=1e-6)
    model.zero_grad()
    nats, mean, log_variance = model(**batch(), noise=noise)
    kl = posterior.kl_per_dimension(mean, log_variance).clamp(min=steps.args.free_bits)
    ((nats.sum() + kl.sum()) / (4 * 5.0)).backward()
    assert torch.allclose(found, gradients(model), atol=1e-6)


def test_an_aggressive_encoder_is_trained_alone_until_it_is_no_better(model, monkeypatch):
    class Texts:
        lengths = np.full(20, 6)

        def __len__(self):
            return 20

        def batch(self, index, padded):
            return {"ids": np.random.default_rng(index[0]).integers(1, 50, (len(index), 6)), "lengths": np.full(len(index), 6)}

    steps = steps_of(model, learning_rate=0.001)
    before = {name: p.clone() for name, p in model.named_parameters()}
    objectives = iter([9.0] * 10 + [8.0] * 10 + [8.0] * 10 + [1.0] * 70)  # of texts that are all as long
    original = steps.backward
    calls = []

    def backward(batch, number, n, beta):
        calls.append(number)
        return torch.cat([torch.tensor([next(objectives)]).double(), original(batch, number, n, beta)[1:]])

    monkeypatch.setattr(steps, "backward", backward)
    monkeypatch.setattr(script, "INNER", 10)
    monkeypatch.setattr(script, "MOST_INNER", 100)
    steps.args.group = 1
    steps.lag_(Texts(), 3, 1.0, 0.01)
    assert [number[1] for number in calls] == list(range(30))  # the third ten are no better than the second
    moved = {name for name, p in model.named_parameters() if not torch.equal(p, before[name])}
    assert moved and all(name.startswith("encoder") for name in moved)
    assert all(p.requires_grad != name.startswith("encoder") for name, p in model.named_parameters())


# ------------------------------------------------------------------------------------------------------ killed, and again


def die_while_writing(k):
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


MOMENTS = {
    "in the middle of an accumulation": lambda: die_at(script.Steps, "backward", 10),  # the second batch of step 5
    "between gradients and step": lambda: die_at(train_utils, "step_", 9),
    "a checkpoint half written": lambda: die_while_writing(3),
    "best weights without their checkpoint": lambda: die_at(checkpoint, "keep_best_", 3, after=True),
    "a look at the posterior": lambda: die_at(posterior.PosteriorMetricsMonitor, "_append", 3, after=True),
    "judging": lambda: die_at(vae_eval, "evaluate", 1),
}


def run_and_die(moment, argv):
    hasten()
    MOMENTS[moment]()
    script.main(argv)


@pytest.fixture(scope="module")
def context():
    """One process imports, and every other one is its fork."""
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["tests.test_train_optimized", "torch._dynamo", "pyarrow.parquet"])
    return context


@pytest.fixture(scope="module")
def killed(context):
    def kill(moment, argv):
        process = context.Process(target=run_and_die, args=(moment, [str(word) for word in argv]))
        process.start()
        process.join(120)
        assert process.exitcode == -signal.SIGKILL, moment

    return kill


@pytest.mark.parametrize("moment", MOMENTS)
def test_a_killed_run_ends_as_one_left_alone(moment, base, killed, undisturbed, tmp_path):
    killed(moment, [*base, "--out_dir", tmp_path, "--save_every", 2])
    folder, record = run([*base, "--save_every", 2], tmp_path)
    assert record["status"] == "finished" and record["best"] == undisturbed[1]["best"]
    assert weights(folder) == weights(undisturbed[0]) and curves(folder) == curves(undisturbed[0])
    assert record["metrics"] == undisturbed[1]["metrics"]


def test_an_aggressive_run_that_is_killed(base, killed, tmp_path):
    argv = [*base, "--aggressive", "--num_epochs", 1, "--save_every", 2]
    alone, _ = run(argv, tmp_path / "alone")
    killed("between gradients and step", [*argv, "--out_dir", tmp_path / "killed"])
    folder, _ = run(argv, tmp_path / "killed")
    assert weights(folder) == weights(alone) and curves(folder) == curves(alone)


def test_interrupted_it_says_how_to_go_on(base, undisturbed, tmp_path, monkeypatch, capsys):
    original, calls = train_utils.step_, []

    def step_(*args):
        original(*args)
        calls.append(1)
        if len(calls) == 5:
            os.kill(os.getpid(), signal.SIGTERM)

    monkeypatch.setattr(train_utils, "step_", step_)
    assert as_program([*base, "--out_dir", tmp_path]) == 130
    assert f"The same command goes on from step 5 of {STEPS}" in capsys.readouterr().err
    monkeypatch.undo()
    folder, _ = run(base, tmp_path)
    assert "resumed at step 5 of 14" in capsys.readouterr().out
    assert weights(folder) == weights(undisturbed[0]) and curves(folder) == curves(undisturbed[0])


# ---------------------------------------------------------------------------------------------------- several processes


def run_told(argv, log):
    """In a process of its own, that tells what it says in a file."""
    with open(log, "w") as file:
        os.dup2(file.fileno(), 1)
        os.dup2(file.fileno(), 2)
    script.main(argv)


def test_two_processes_are_one_and_are_killed_and_resumed_exactly(base, context, undisturbed, tmp_path, monkeypatch):
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    argv = [*base, "--devices", 2, "--gradient_accumulation_steps", 1, "--save_every", 1, "--out_dir", tmp_path]

    def start():
        process = context.Process(target=run_told, args=([str(word) for word in argv], str(tmp_path / "log")))
        process.start()
        return process

    doomed, deadline = start(), time.monotonic() + 120
    while not list(tmp_path.glob("vae/*/checkpoint/last.pt")):
        assert time.monotonic() < deadline and doomed.is_alive(), (tmp_path / "log").read_text()
        time.sleep(0.01)
    family = [psutil.Process(doomed.pid), *psutil.Process(doomed.pid).children(recursive=True)]
    for process in family:
        process.kill()
    psutil.wait_procs(family, 30)
    assert len(family) == 3 and read_json(only_run(tmp_path) / "run.json")["status"] == "running"
    again = start()
    again.join(180)
    told = (tmp_path / "log").read_text()
    assert again.exitcode == 0, told
    assert "x 2 processes" in told and "resumed at step" in told and told.count("training: ") == 1  # one of them speaks
    folder = only_run(tmp_path)
    assert weights(folder) == weights(undisturbed[0])  # the same batches of a step, in one process and never killed
    values = [[float(row[3]) for row in curves(one)[0][1:]] for one in (folder, undisturbed[0])]
    assert values[0] == pytest.approx(values[1], rel=1e-5)


# -------------------------------------------------------------------------------------------------------- what goes wrong


def finite(folder):
    state = torch.load(folder / "checkpoint" / "last.pt", weights_only=True)
    return all(value.isfinite().all() for value in state["parts"]["model"].values())


def spoil(monkeypatch, when):
    """The loss of the batches of which `when` says so is NaN."""
    original, calls = script.TextVAE.forward, []

    def forward(model, ids, lengths, noise, dropped=None):
        nats, mean, log_variance = original(model, ids, lengths, noise, dropped)
        calls.append(1)
        return nats * (math.nan if when(len(calls)) else 1), mean, log_variance

    monkeypatch.setattr(script.TextVAE, "forward", forward)


def test_a_loss_that_is_no_number_stops_with_advice(base, undisturbed, tmp_path, monkeypatch, capsys):
    spoil(monkeypatch, lambda call: call == 17)
    assert as_program([*base, "--out_dir", tmp_path, "--save_every", 2]) == 2
    shown = capsys.readouterr().err.splitlines()[-1]
    assert re.match(r"error: the loss or a weight is not finite any more at step \d+\. The last checkpoint is intact; ", shown)
    assert "--precision bf16-mixed or 32" in shown and finite(only_run(tmp_path))
    monkeypatch.undo()
    folder, _ = run(base, tmp_path)
    assert weights(folder) == weights(undisturbed[0])


@pytest.fixture
def scaled(monkeypatch):
    """Loss scaling, as under fp16, on the CPU."""
    made = []

    def grad_scaler(device, precision):
        made.append(torch.amp.GradScaler("cpu", init_scale=2.0**8))
        return made[-1]

    monkeypatch.setattr(train_utils, "grad_scaler", grad_scaler)
    return made


def test_under_loss_scaling_an_overflow_is_a_step_not_taken(base, scaled, tmp_path, monkeypatch):
    spoil(monkeypatch, lambda call: call in (5, 9))
    folder, record = run(base, tmp_path)
    assert record["status"] == "finished" and scaled[0].get_scale() == 2.0**6  # halved twice
    assert all(value.isfinite().all() for value in checkpoint.load_tensors(folder / "weights" / "last.safetensors").values())


def test_under_loss_scaling_nothing_but_overflows_stops_with_advice(base, scaled, tmp_path, monkeypatch, capsys):
    spoil(monkeypatch, lambda call: call > 4)
    assert as_program([*base, "--out_dir", tmp_path, "--save_every", 2, "--num_epochs", 4]) == 2
    assert "fp16 overflows in every step, however small the loss is scaled" in capsys.readouterr().err
    assert finite(only_run(tmp_path))


def test_a_disk_that_fills_while_plotting_stops_no_training(base, undisturbed, tmp_path, monkeypatch, capsys):
    def plot(monitor, step):
        raise OSError(errno.ENOSPC, "No space left on device", "dashboards/posterior.png")

    monkeypatch.setattr(posterior.PosteriorMetricsMonitor, "plot", plot)
    folder, record = run(base, tmp_path)
    assert "warning: dashboards/posterior.png: No space left on device" in capsys.readouterr().out
    assert record["status"] == "finished" and weights(folder) == weights(undisturbed[0])


def test_a_loading_process_that_dies(base, tmp_path, monkeypatch, capsys):
    original = loading.Loader.__call__

    def call(self, batches):
        for i, found in enumerate(original(self, batches)):
            if i == 4:
                os.kill(self.loader._iterator._workers[0].pid, signal.SIGKILL)
            yield found

    monkeypatch.setattr(loading.Loader, "__call__", call)
    assert as_program([*base, "--num_workers", 1, "--num_epochs", 20, "--out_dir", tmp_path]) == 2
    assert "a process that loads data died" in capsys.readouterr().err


def test_a_collapsed_posterior_stops_where_it_should_and_goes_on_where_it_may(base, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(posterior, "GRACE", 4)
    argv = [*base, "--kl_annealing", "none", "--free_bits", 0, "--learning_rate", 0.0001, "--out_dir", tmp_path]
    monkeypatch.setattr(posterior, "ACTIVE", 10.0)  # so that none is
    assert as_program([*argv, "--on_collapse", "stop"]) == 2
    shown = capsys.readouterr().err
    assert "the posterior has collapsed at step 6: no active unit. Start anew with --kl_annealing" in shown
    assert as_program([*argv, "--on_collapse", "warn"]) == 0
    printed = capsys.readouterr().out
    assert "resumed at step 6 of 14" in printed and read_json(only_run(tmp_path) / "run.json")["verdict"][0] == "collapsed"


# -------------------------------------------------------------------------------------------------------------- refused


@pytest.mark.parametrize(("flags", "message"), [
    (["--width", 18, "--n_heads", 4], "--width 18: --n_heads 4 does not divide it"),
    (["--data", "nowhere.parquet"], "--data nowhere.parquet: not reviews or news, and no such file or folder"),
    (["--data", "news", "--text_column", "words"], "--data news: --text_column is for a path"),
    (["--text_column", "words"], "no column called words. Name one with --text_column; columns found: text"),
    (["--max_sequence_length", 0], "--max_sequence_length 0: expected a value from 1"),
    (["--batch_size", 0], "--batch_size 0: expected a value from 1"),
    (["--precision", "8"], "invalid choice"),
    (["--kl_annealing", "often"], "invalid choice"),
    (["--limit_val_batches", 1.5], "expected a value from 1e-06 to 1"),
    (["--window_size", 1], "--window_size 1: expected a value from 2"),
    (["--device", "cpu:0", "--devices", 2], "--device cpu:0: is one for 2 processes"),
    (["--device", "abacus"], "Use --device auto or cpu"),
    (["--on_collaps", "stop"], "unrecognized arguments"),
])  # fmt: skip
def test_what_is_refused(flags, message, base, tmp_path, capsys):
    assert as_program([*base, *flags, "--out_dir", tmp_path]) == 2
    shown = capsys.readouterr().err
    assert shown.startswith("error: ") and shown.count("\n") == 1 and message in shown, shown
    assert not (tmp_path / "vae").exists()


def test_without_a_compiler_there_is_no_compiling(base, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(train_utils.shutil, "which", lambda name: None)
    assert as_program([*base, "--compile_model", "--out_dir", tmp_path]) == 2
    assert "--compile_model: on a CPU it needs a C++ compiler, and there is none" in capsys.readouterr().err


def test_texts_of_one_token_and_beyond_the_limit(base, tmp_path, capsys):
    _, record = run([*base, "--max_sequence_length", 1], tmp_path)
    assert record["metrics"]["vae"]["tokens"] == 6 and record["status"] == "finished"
    assert "54 texts cut at 1" in capsys.readouterr().out


def test_two_texts_are_enough(tmp_path):
    for split in ("train", "validation"):
        pandas.DataFrame({"text": [f"one of {split}", f"two of {split}"]}).to_parquet(tmp_path / f"{split}.parquet")
    argv = ["--data", tmp_path, "--data_dir", tmp_path / "data", *TINY]
    assert run(argv, tmp_path / "out")[1]["status"] == "finished"


def test_a_dry_run_writes_nothing(base, tmp_path, capsys):
    script.main([*base, "--out_dir", tmp_path / "out", "--dry-run", "--devices", 2, "--num_workers", 99])
    plan = capsys.readouterr().out
    assert "49 to train, 5 to select, 6 to judge" in plan and re.search(r"x 2 forwards x 2 processes", plan)
    assert "--num_workers 99 -> " in plan and not (tmp_path / "out").exists()


# ------------------------------------------------------------------------------------------------------------ the script


def test_every_flag_is_read(capsys):
    with pytest.raises(SystemExit):
        script.main(["--help"])
    flags = set(re.findall(r"^  --(\w+)", capsys.readouterr().out, re.MULTILINE))
    code = Path(script.__file__).read_text() + (REPOSITORY / "common" / "runs.py").read_text()
    read = {*re.findall(r"\bargs\.(\w+)", code), "baseline", "n_layers"}  # one by its name in argv, one by its name in shape
    assert len(flags) > 40 and not flags - read


def test_importing_has_no_side_effect(tmp_path):
    command = [sys.executable, "-B", "-c", "import train_optimized"]
    environment = os.environ | {"PYTHONPATH": str(REPOSITORY)}
    done = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True)
    assert (done.returncode, done.stdout, done.stderr) == (0, "", "") and not list(tmp_path.iterdir())
