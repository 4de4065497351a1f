"""The script as a user meets it: the guide's scenarios, what is written, killed and going on, loaded elsewhere, refused."""

import argparse
import contextlib
import csv
import errno
import functools
import importlib.util
import io
import itertools
import json
import math
import multiprocessing
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from transformers import (
    AutoModelForCausalLM,
    AutoModelForMaskedLM,
    AutoTokenizer,
    BertConfig,
    LlamaConfig,
    MistralConfig,
    PreTrainedModel,
)

import finetune_llama3
from common import assets, checkpoint, eval_utils, generation, reconstruction, runs, streaming, structured, text
from common.blocks import blocks_of
from common.runs import REPOSITORY, read_json
from common.sparse_trainer import WHOLE, SparseTrainer, last_checkpoint
from tests.killing import die_at
from tests.test_main_block import sentences
from tests.test_streaming import one_thread  # noqa: F401

SCRIPT = REPOSITORY / "finetune_llama3.py"
LENGTH, WINDOWS = 32, 24
SHAPE = {"vocab_size": 8192, "hidden_size": 48, "intermediate_size": 48, "num_hidden_layers": 4, "num_attention_heads": 16,
         "num_key_value_heads": 4, "head_dim": 4, "max_position_embeddings": 128, "tie_word_embeddings": True,
         "bos_token_id": 0, "eos_token_id": 0, "pad_token_id": 0}  # fmt: skip


# ------------------------------------------------------------------------------------------------------------- what is run


def save_toy(folder, **changes):
    """A random Llama with four query heads to a KV head, and the tokenizer of the tiny LM."""
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(LlamaConfig(**SHAPE | changes))
    for parameter in model.parameters():  # else activations are so small that no layer matters
        parameter.data += 0.1 * torch.randn_like(parameter)
    model.save_pretrained(folder)
    AutoTokenizer.from_pretrained(assets.TINY_LLAMA).save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def tiny(tmp_path_factory):
    """The toy, and a text in three files."""
    folder = tmp_path_factory.mktemp("tiny")
    tokenizer = AutoTokenizer.from_pretrained(save_toy(folder / "llama"))
    (folder / "text").mkdir()
    for seed, (split, n_windows) in enumerate((("train", WINDOWS), ("validation", 10), ("test", 10))):
        lines = sentences(200, seed)
        ends = list(itertools.accumulate(len(tokenizer(line)["input_ids"]) + 1 for line in lines))  # with the one that ends it
        del lines[next(i for i, end in enumerate(ends) if end >= n_windows * LENGTH) + 1 :]
        (folder / "text" / f"{split}.txt").write_text("\n\n".join(lines))
    return folder


def once(calls, seconds, device):
    """In the place of in_turns: the numbers are there, at no cost."""
    found = {}
    for name, call in calls.items():
        start = time.perf_counter()
        call()
        found[name] = [time.perf_counter() - start]
    return found


@pytest.fixture(scope="module", autouse=True)
def speeds_at_once():
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(generation, "in_turns", once)
        yield


@pytest.fixture(scope="module")
def base(tiny):
    """Flags that make any run of these a short one; what comes after them wins."""
    return ["--base_model", tiny / "llama", "--finetune_dataset", tiny / "text", "--eval_text", tiny / "text", "--data_dir",
            tiny / "data", "--importance_seq_len", LENGTH, "--importance_samples", 8, "--finetune_seq_len", LENGTH,
            "--ppl_seqlen", 64, "--device", "cpu", "--precision", "32"]  # fmt: skip


def only_run(out):
    (record,) = (out / "llama3").glob("[!.]*/run.json")
    return record.parent


class Ended:
    """One run: its directory, its record, what it printed."""

    def __init__(self, argv, out):
        shown = io.StringIO()
        with contextlib.redirect_stdout(shown):
            finetune_llama3.main([*argv, "--out_dir", out])
        self.shown, self.folder = shown.getvalue(), only_run(out)
        self.record = read_json(self.folder / "run.json")

    @property
    def model(self):
        return self.folder / "model"

    def files(self):
        return sorted(path.name for path in self.folder.iterdir())


def as_program(argv):
    try:
        runs.run_script(lambda: finetune_llama3.main(argv))
    except SystemExit as stop:
        return stop.code or 0
    return 0


def weights(model_dir):
    return (model_dir / "model.safetensors").read_bytes()


def curve(folder, metric="loss"):
    with open(folder / "history.csv", newline="") as file:
        return {int(row["step"]): float(row["value"]) for row in csv.DictReader(file) if row["metric"] == metric}


def shapes(model_dir):
    return [block.shape for block in blocks_of(checkpoint.load_causal_lm(model_dir))]


def parameters(model_dir, attention_only=False):
    """Of the blocks' projections."""
    blocks = blocks_of(checkpoint.load_causal_lm(model_dir))
    return sum(linear.weight.numel() for block in blocks for linear in block.projections[: 4 if attention_only else 7])


def perplexity(model_dir, tiny):
    model, source = checkpoint.load_causal_lm(model_dir), text.prepare_text(str(tiny / "text"), tiny / "data")
    found, _ = eval_utils.perplexity_on(model.eval(), AutoTokenizer.from_pretrained(model_dir), source, 64)
    return found["perplexity"]


# --------------------------------------------------------------------------------------------------- the guide's scenarios

SCENARIOS = {  # as the guide has them, without the model; the fourth one's layers are those of an 8B model there
    "1": "--save_ckpt_log_name standard_finetune --pruning_ratio 0.25 --prune_mlp --save_model --test_after_prune --finetune "
         "--finetune_method full --finetune_lr 1e-5 --finetune_epochs 2 --finetune_samples 1000 --finetune_grad_accum 4 "
         "--finetune_warmup_steps 50",
    "2": "--save_ckpt_log_name aggressive_prune --pruning_ratio 0.30 --prune_mlp --save_model --test_after_prune --finetune "
         "--finetune_method full --finetune_lr 2e-5 --finetune_epochs 3 --finetune_samples 2000 --finetune_grad_accum 8 "
         "--finetune_warmup_steps 100 --finetune_weight_decay 0.02",
    "3": "--save_ckpt_log_name lora_finetune --pruning_ratio 0.25 --prune_mlp --save_model --test_after_prune --finetune "
         "--finetune_method lora --finetune_lr 2e-4 --finetune_epochs 3 --finetune_samples 1500 --finetune_grad_accum 8",
    "4": "--save_ckpt_log_name quick_test --pruning_ratio 0.25 --importance_samples 20 --layer_start 1 --layer_end 3 "
         "--save_model --test_after_prune --finetune --finetune_samples 100 --finetune_epochs 1 --finetune_batch_size 1 "
         "--finetune_grad_accum 2",
}  # fmt: skip
STEPS = {"1": 2 * WINDOWS // 4, "2": 3 * WINDOWS // 8, "3": 3 * WINDOWS // 8, "4": WINDOWS // 2}


@pytest.fixture(scope="module")
def scenario(base, tmp_path_factory):
    """Runs of the scenarios, each made once."""
    return functools.cache(lambda name: Ended([*base, *SCENARIOS[name].split()], tmp_path_factory.mktemp(f"scenario{name}")))


@pytest.mark.parametrize("name", SCENARIOS)
def test_the_scenarios_of_the_guide(name, scenario, tiny):
    ended, flags = scenario(name), SCENARIOS[name].split()
    record, ratio = ended.record, float(flags[flags.index("--pruning_ratio") + 1])
    lora, mlp = "lora" in flags, "--prune_mlp" in flags
    assert ended.folder.name == flags[1] and record["status"] == "finished"
    for flag, value in itertools.pairwise(flags):  # what was asked for is what was done
        if flag.startswith("--finetune_") or flag in ("--pruning_ratio", "--importance_samples"):
            assert str(record["config"][flag[2:]]) == str(type(record["config"][flag[2:]])(value)), flag
    assert list(record["metrics"]) == ["dense", "pruned", "lora" if lora else "full"]
    whole, left = (parameters(folder, not mlp) for folder in (tiny / "llama", ended.model))
    if name == "4":  # a quarter of the layers that it names
        assert 1 - left / whole == pytest.approx(0.25 * 2 / 4, abs=0.04)
    else:
        assert ratio - 1e-9 <= 1 - left / whole < ratio + 0.04
    before, after = shapes(tiny / "llama"), shapes(ended.model)
    assert record["layers_before"] == before and record["layers"] == after != before
    assert [after[i] == before[i] for i in (0, 3)] == [True, True]  # protected
    assert mlp == (after[1]["neurons"] + after[2]["neurons"] < 96)
    assert all(shape["heads"] == 4 * shape["kv_heads"] for shape in after)
    assert all(shape["neurons"] % 8 == 0 or shape["neurons"] < 8 for shape in after)  # fewer stay as they are
    for model, folder in (("dense", tiny / "llama"), ("lora" if lora else "full", ended.model)):
        found = record["metrics"][model]
        assert found["perplexity"] == pytest.approx(perplexity(folder, tiny), rel=1e-5)
        assert found["parameters"] == sum(p.numel() for p in checkpoint.load_causal_lm(folder).parameters())
        assert found["cache_bytes_per_token"] == sum(2 * shape["kv_heads"] * 4 * 4 for shape in shapes(folder))
    assert record["metrics"]["lora" if lora else "full"]["sparsity"] == pytest.approx(record["sparsity"], abs=1e-9)
    assert record["metrics"]["lora" if lora else "full"]["perplexity"] < record["metrics"]["pruned"]["perplexity"]
    assert max(curve(ended.folder)) == STEPS[name]  # the last step is told
    assert f"fine-tuning  {'lora' if lora else 'full'}, {STEPS[name]} steps" in ended.shown.splitlines()


def test_the_console_is_that_of_the_guide(scenario):
    ended = scenario("1")
    lines = ended.shown.splitlines()
    start = lines.index("fine-tuning configuration:")
    assert lines[start + 1 : start + 15] == [
        "  mode: full fine-tuning", "  learning rate: 1e-05", "  epochs: 2", "  samples: 1000", "  batch size: 1",
        "  gradient accumulation steps: 4", "  effective batch size: 4", f"  sequence length: {LENGTH}",
        "  gradient clipping: 1.0", "  weight decay: 0.01", "  learning rate schedule: linear", "  warm-up steps: 50",
        "  precision: 32", "  optimizer: adamw"]  # fmt: skip
    assert [line for line in lines if line.startswith("epoch ")] == ["epoch 1/2 begins", "epoch 2/2 begins"]
    progress = [re.fullmatch(r"  progress: (\d+)% \| mean loss: (\d+\.\d{4}) \| LR: (\d\.\d\de[-+]\d\d)", line)
                for line in lines if line.startswith("  progress")]  # fmt: skip
    assert [int(found[1]) for found in progress] == [16, 33, 50, 66, 83, 100] * 2
    losses, rates = curve(ended.folder), curve(ended.folder, "learning_rate")
    for step, found in enumerate(progress, 1):  # of the epoch until then
        of_epoch = [losses[s] for s in range(6 * ((step - 1) // 6) + 1, step + 1)]
        assert float(found[2]) == pytest.approx(sum(of_epoch) / len(of_epoch), abs=1e-4)
        assert float(found[3]) == pytest.approx(rates[step], rel=0.01)
    assert rates[1] < rates[5] <= 1e-5 * 6 / 50  # warm-up
    done = [line for line in lines if line.startswith("✅")]
    assert done[:2] == [f"✅ epoch {epoch} done, mean loss: {progress[6 * epoch - 1][2]}" for epoch in (1, 2)]
    assert done[2:] == ["✅ fine-tuning done!"]


def test_the_console_of_lora(scenario):
    ended = scenario("3")
    lines = ended.shown.splitlines()
    assert "configuring LoRA (r=8, alpha=16, dropout=0.05)..." in lines and "  mode: LoRA fine-tuning" in lines
    model = checkpoint.load_causal_lm(ended.model)
    n = sum(p.numel() for p in model.parameters())
    trained = sum(8 * sum(linear.weight.shape) for block in blocks_of(model) for linear in block.projections)
    assert (f"trainable params: {trained:,} || all params: {n + trained:,} || trainable%: "
            f"{100 * trained / (n + trained):.4f}") in lines  # fmt: skip
    ends = ["✅ fine-tuning done!", "merging LoRA weights into the model...", "✅ LoRA weights merged"]
    assert lines[lines.index(ends[0]) :][:3] == ends
    assert not any("lora" in name for name in load_file(ended.model / "model.safetensors"))


def test_the_end_of_an_epoch_is_told_wherever_it_is(base, tmp_path):
    """23 steps an epoch, and a line every other step."""
    flags = ["--finetune_samples", 23, "--finetune_grad_accum", 1, "--finetune_batch_size", 1]
    ended = Ended([*base, *flags, "--pruning_ratio", 0, "--finetune", "--finetune_epochs", 2], tmp_path)
    assert {23, 46} <= set(curve(ended.folder)) and len(curve(ended.folder)) < 30
    for epoch in (1, 2):
        assert f"✅ epoch {epoch} done, mean loss: " in ended.shown
    assert ended.shown.count("  progress: 100% |") == 2


def test_what_is_written(scenario, tiny):
    for name in SCENARIOS:
        ended = scenario(name)
        assert ended.files() == ["history.csv", "model", "run.json", "training.log"]  # nothing temporary, hidden or not
        log = (ended.folder / "training.log").read_text()
        assert log == ended.shown and len(re.findall(r"^PPL after pruning: [\d.]+$", log, re.MULTILINE)) == 1
        assert f"model   {ended.model}" in log.splitlines() and f"record  {ended.folder / 'run.json'}" in log.splitlines()
    ended = scenario("1")
    record = ended.record
    assert list(record["timings"]) == ["importance", "cutting", "training", "measuring"]
    for key in ("perplexity", "n_tokens", "parameters", "block_parameters", "bytes", "macs_of_prompt",
                "cache_bytes_per_token", "prefill_ms", "decode_tokens_per_second"):  # fmt: skip
        assert all(found[key] > 0 for found in record["metrics"].values()), key
    assert record["perplexity_after_pruning"] == pytest.approx(record["metrics"]["pruned"]["perplexity"], rel=1e-6)
    assert f"PPL after pruning: {record['metrics']['pruned']['perplexity']:.2f}" in ended.shown
    assert f"PPL before pruning: {record['metrics']['dense']['perplexity']:.2f}" in ended.shown
    assert record["model_dir"] == str(ended.model) and record["dense_dir"] == str(tiny / "llama")
    assert record["evaluation"]["token_length"] == 64 and record["evaluation"]["split"] == "test"
    assert len(record["refit_errors"]) >= 2 and all(0 <= error < 1 for error in record["refit_errors"])
    assert [asset["name"].split("-")[0] for asset in record["config"]["assets"]] == ["llama", "text"]
    (stage,) = checkpoint.compression_stages(ended.model)
    assert stage == {"asked": record["config"], "layers": record["layers"]}
    assert checkpoint.load_causal_lm(ended.model).config.use_cache
    table = ended.shown.partition("✅ fine-tuning done!")[2]
    for key in ("dense", "pruned", "full"):
        assert f"{record['metrics'][key]['perplexity']:.2f}" in table.replace(",", "")


def test_no_model_without_save_model(base, tmp_path):
    flags = ["--pruning_ratio", 0.25, "--finetune", "--finetune_samples", 8]
    ended = Ended([*base, *flags], tmp_path)
    assert ended.files() == ["history.csv", "run.json", "training.log"] and "model_dir" not in ended.record
    assert "model   not kept: no --save_model" in ended.shown and list(ended.record["metrics"]) == ["dense", "pruned", "full"]
    only_pruned = Ended([*base, "--pruning_ratio", 0.25], tmp_path / "pruned")
    assert only_pruned.files() == ["run.json", "training.log"] and "PPL" not in only_pruned.shown


# -------------------------------------------------------------------------------------------------- the progressive recipe


def test_two_stages(scenario, base, tiny, tmp_path):
    """The second one trains what the first one left, and does not prune."""
    first = scenario("1")
    flags = "--pruning_ratio 0 --save_model --finetune --finetune_lr 5e-6 --finetune_epochs 2 --finetune_samples 1000 " \
            "--finetune_weight_decay 0.02"  # fmt: skip
    ended = Ended([*base, "--base_model", first.model, *flags.split()], tmp_path)
    assert list(ended.record["metrics"]) == ["dense", "full"] and "pruning      none" in ended.shown.splitlines()
    assert shapes(ended.model) == shapes(first.model) and weights(ended.model) != weights(first.model)
    stages = checkpoint.compression_stages(ended.model)
    assert [stage["asked"]["pruning_ratio"] for stage in stages] == [0.25, 0] and stages[0]["asked"] == first.record["config"]
    assert ended.record["metrics"]["full"]["perplexity"] < ended.record["metrics"]["dense"]["perplexity"]
    assert ended.files() == ["history.csv", "model", "run.json", "training.log"]
    AutoModelForCausalLM.from_pretrained(ended.model, trust_remote_code=True)


@pytest.mark.parametrize("mode", ["groups", "queries"])
def test_an_uneven_model_is_pruned_again(mode, scenario, base, tmp_path):
    first = scenario("1").model
    ended = Ended([*base, "--base_model", first, "--pruning_ratio", 0.3, "--prune_mlp", "--gqa_mode", mode, "--save_model",
                   "--protected_layers", 0], tmp_path)  # fmt: skip
    assert 0.3 - 1e-9 <= 1 - owned(ended.model, mode) / owned(first, mode) < 0.34
    assert ended.record["layers_before"] == shapes(first) and ended.record["layers"] == shapes(ended.model)
    for old, new in zip(shapes(first), shapes(ended.model), strict=True):
        assert all(new[key] <= old[key] for key in old) and (mode == "groups" or new["kv_heads"] == old["kv_heads"])
    ids = torch.arange(3, 20)[None]
    ours = checkpoint.load_causal_lm(ended.model)
    loaded = AutoModelForCausalLM.from_pretrained(ended.model, trust_remote_code=True)
    with torch.no_grad():
        assert torch.equal(loaded.eval()(ids).logits, ours.eval()(ids).logits)
    assert [stage["asked"]["gqa_mode"] for stage in checkpoint.compression_stages(ended.model)] == ["groups", mode]


# ------------------------------------------------------------------------------------------------------- loaded elsewhere

BARE = """
import sys, torch, transformers
sys.path[:] = [p for p in sys.path if p]
try:
    import common
    sys.exit("the repository is visible")
except ImportError:
    pass
torch.set_num_threads(1)
root, *folders = sys.argv[1:]
for i, folder in enumerate(folders):
    trust = {} if i == 0 else {"trust_remote_code": True}
    model = transformers.AutoModelForCausalLM.from_pretrained(folder, **trust).eval()
    tokenizer = transformers.AutoTokenizer.from_pretrained(folder, padding_side="left")
    tokenizer.pad_token = tokenizer.eos_token
    words = tokenizer(["the court of the river says", "the price"], return_tensors="pt", padding=True)
    with torch.no_grad():
        logits = model(words["input_ids"]).logits
    said = [model.generate(**words, max_new_tokens=12, min_new_tokens=12, do_sample=False, use_cache=c) for c in (True, False)]
    exported = None
    if i == 1:
        program = torch.export.export(model, (), {"input_ids": words["input_ids"], "use_cache": False})
        with torch.no_grad():
            exported = program.module()(input_ids=words["input_ids"], use_cache=False).logits
    torch.save((dict(words), logits, said, exported), f"{root}/{i}.pt")
"""


@pytest.fixture(scope="module")
def even(base, tmp_path_factory):
    """Pruned alike in all layers."""
    flags = ["--allocation", "uniform", "--protected_layers", 0, "--pruning_ratio", 0.25, "--prune_mlp", "--save_model"]
    return Ended([*base, *flags], tmp_path_factory.mktemp("even"))


def test_models_load_in_a_bare_process(scenario, even, tmp_path):
    """With the cache and without it the same tokens; what torch.export makes of the uneven one says the same."""
    assert len({json.dumps(shape) for shape in shapes(even.model)}) == 1
    assert not (even.model / "modeling_pruned.py").exists() and (scenario("1").model / "modeling_pruned.py").exists()
    (tmp_path / "bare.py").write_text(BARE)
    folders = [even.model, scenario("1").model, scenario("3").model]
    environment = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"} | {"HF_HOME": str(tmp_path)}
    done = subprocess.run([sys.executable, "-I", tmp_path / "bare.py", tmp_path, *folders], cwd=tmp_path, env=environment,
                          timeout=120, capture_output=True, text=True)  # fmt: skip
    assert done.returncode == 0, done.stderr[-3000:]
    for i, folder in enumerate(folders):
        words, logits, (cached, plain), exported = torch.load(tmp_path / f"{i}.pt", weights_only=True)
        model = checkpoint.load_causal_lm(folder).eval()
        with torch.no_grad():
            torch.testing.assert_close(model(words["input_ids"]).logits, logits, rtol=1e-5, atol=1e-5)
        assert torch.equal(cached, plain) and len(set(cached[:, -12:].flatten().tolist())) > 1
        assert torch.equal(model.generate(**words, max_new_tokens=12, min_new_tokens=12, do_sample=False), cached)
        if i == 1:
            torch.testing.assert_close(exported, logits, rtol=1e-5, atol=1e-5)


def test_even_heads_that_do_not_divide_the_width(base, tmp_path):
    """As a quarter of an 8B model does: 24 heads, width 4,096."""
    save_toy(tmp_path / "llama", hidden_size=32)
    flags = ["--allocation", "uniform", "--protected_layers", 0, "--pruning_ratio", 0.25, "--save_model"]
    ended = Ended([*base, "--base_model", tmp_path / "llama", *flags], tmp_path / "out")
    assert {shape["heads"] for shape in shapes(ended.model)} == {12}
    AutoModelForCausalLM.from_pretrained(ended.model, trust_remote_code=True)


# ------------------------------------------------------------------------------------------------------ killed, and again


#  how to die, and what the same command then says
MOMENTS = {
    "in group_scores": (lambda: die_at(structured, "_of_block", 3), None),
    "in refit_blocks": (lambda: die_at(structured, "refit_toward_", 3), None),
    "a block half kept": (lambda: die_at(structured, "save_tensors", 2), None),
    "cut, not kept": (lambda: die_at(checkpoint, "save_model", 1), None),
    "in a step": (lambda: die_at(SparseTrainer, "training_step", 4 * 8 + 2), 5),
    "trained, not kept": (lambda: die_at(checkpoint, "save_model", 2), 10),
    "kept, not cleared": (lambda: die_at(checkpoint, "drop", 2), "trained"),
    "cleared, not marked so": (lambda: die_at(checkpoint, "drop", 2, after=True), "trained"),
}


def of_small_batches():
    """Else all calibration text of these runs is one."""
    finetune_llama3.TOKENS_A_BATCH = 2 * LENGTH


def reconstructing():
    of_small_batches()
    die_at(reconstruction, "_error", 8)  # five times a block


def run_and_die(moment, argv):
    """In a process of its own."""
    torch.set_num_threads(1)
    generation.in_turns = once
    with contextlib.redirect_stdout(io.StringIO()):
        reconstructing() if moment == "in reconstruct_" else MOMENTS[moment][0]()
        finetune_llama3.main(argv)


@pytest.fixture(scope="module")
def killed():
    """Runs the script until a moment at which it kills itself."""
    context = multiprocessing.get_context("forkserver")  # one process imports, and every killed one is its fork
    context.set_forkserver_preload([__name__, "transformers.models.llama.modeling_llama", "peft", "pyarrow.parquet"])

    def kill(moment, argv):
        process = context.Process(target=run_and_die, args=(moment, [str(word) for word in argv]))
        process.start()
        process.join(120)
        assert process.exitcode == -signal.SIGKILL, moment

    return kill


@pytest.fixture(scope="module")
def left_alone(scenario):
    """Scenario 1, with its record as far as it does not depend on the time."""
    return scenario("1")


def lasting(record):
    clocks = ("prefill_ms", "decode_tokens_per_second")
    metrics = {name: {k: v for k, v in found.items() if k not in clocks} for name, found in record["metrics"].items()}
    return metrics | {key: record[key] for key in ("layers", "sparsity", "refit_errors", "perplexity_after_pruning")}


@pytest.mark.parametrize("moment", MOMENTS)
def test_a_killed_run_ends_as_if_it_had_not_been(moment, base, killed, left_alone, tmp_path):
    argv, whole = [*base, *SCENARIOS["1"].split(), "--save_every", 5], MOMENTS[moment][1]
    if "refit" in moment or "group_scores" in moment:
        argv.append("--offload_activations")  # what it leaves on the disk is no trouble
    killed(moment, [*argv, "--out_dir", tmp_path])
    assert read_json(only_run(tmp_path) / "run.json")["status"] == "running"
    again = Ended(argv, tmp_path)
    if whole == "trained":
        assert "epoch" not in again.shown.replace("epochs", "") and "resumed from" not in again.shown
    else:
        assert ("resumed from" in again.shown) == (whole is not None)
        assert whole is None or f"/checkpoint-{whole}\n" in again.shown
    assert weights(again.model) == weights(left_alone.model)
    assert lasting(again.record) == lasting(left_alone.record) and again.record["status"] == "finished"
    assert again.files() == left_alone.files()
    log = (again.folder / "training.log").read_text()
    assert log.endswith(again.shown) and log.count("PPL after pruning: ") >= 1
    losses, wanted = curve(again.folder), curve(left_alone.folder)
    assert losses == wanted


def test_killed_lora_goes_on_exactly(base, killed, scenario, tmp_path):
    """Adapters and their dropout."""
    argv = [*base, *SCENARIOS["3"].split(), "--save_every", 2]
    killed("in a step", [*argv, "--out_dir", tmp_path])
    again = Ended(argv, tmp_path)
    assert "/checkpoint-4\n" in again.shown and weights(again.model) == weights(scenario("3").model)


def interrupted(argv, k, owner=SparseTrainer, name="training_step", times=1):
    """Ctrl+C at the k-th call of a function."""
    calls, original = [], getattr(owner, name)

    def call(*args, **kwargs):
        calls.append(1)
        for _ in range(times if len(calls) == k else 0):
            os.kill(os.getpid(), signal.SIGINT)
        return original(*args, **kwargs)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(runs, "REPEATED", 0.0)
        patch.setattr(owner, name, call)
        return as_program(argv)


@pytest.mark.parametrize("method", ["1", "3"])
def test_ctrl_c_in_training_says_how_to_go_on(method, base, scenario, tmp_path, capsys):
    argv = [*base, *SCENARIOS[method].split(), "--out_dir", tmp_path]
    assert interrupted(argv, 15 if method == "1" else 30) == 130
    folder = only_run(tmp_path)
    shown = capsys.readouterr().err.splitlines()[-1]
    assert shown == f"interrupted. The same command goes on from step 4 of {STEPS[method]} ({folder})"
    assert (folder / "checkpoint" / "checkpoint-4" / WHOLE).exists() and not (folder / "model").exists()
    assert read_json(folder / "run.json")["status"] == "interrupted"
    if method == "1":
        assert interrupted(argv, 1, times=2) == 130  # the second one stops at once
        assert [path.name for path in (folder / "checkpoint").iterdir()] == ["checkpoint-4"]
    again = Ended(argv[:-2], tmp_path)
    assert "/checkpoint-4\n" in again.shown and again.record["status"] == "finished"
    assert weights(again.model) == weights(scenario(method).model) and curve(folder) == curve(scenario(method).folder)


def test_ctrl_c_in_the_pruning(base, left_alone, tmp_path, capsys):
    argv = [*base, *SCENARIOS["1"].split(), "--out_dir", tmp_path]
    before = signal.signal(signal.SIGINT, signal.default_int_handler)  # ignored, where the tests run in a shell's background
    try:
        assert interrupted(argv, 2, structured, "refit_toward_") == 130
    finally:
        signal.signal(signal.SIGINT, before)
    shown = capsys.readouterr().err.splitlines()[-1]
    assert shown == f"interrupted. The same command goes on ({only_run(tmp_path)})"
    assert read_json(only_run(tmp_path) / "run.json")["status"] == "interrupted"
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(structured, "group_scores", lambda *_: pytest.fail("scored again"))
        assert weights(Ended(argv[:-2], tmp_path).model) == weights(left_alone.model)


# ---------------------------------------------------------------------------------------------------------------- methods


@pytest.fixture(scope="module")
def pruned(base, tmp_path_factory):
    """Runs that prune and keep the model, each made once: 30 % of the FFN and the attention, unless other flags say."""

    @functools.cache
    def run(*flags):
        return Ended([*base, "--pruning_ratio", 0.3, "--prune_mlp", "--save_model", *flags], tmp_path_factory.mktemp("pruned"))

    return run


def owned(model_dir, mode, mlp=True):
    """The parameters that groups own: of query heads alone no keys and values."""
    found = 0
    for block in blocks_of(checkpoint.load_causal_lm(model_dir)):
        attention, ffn = block.attention, [*block.ffn.ins, block.ffn.out] if mlp else []
        linears = [attention.q, attention.o, *ffn] + ([attention.k, attention.v] if mode == "groups" else [])
        found += sum(linear.weight.numel() for linear in linears)
    return found


@pytest.mark.parametrize("allocation", structured.ALLOCATIONS)
@pytest.mark.parametrize("mode", ["groups", "queries"])
def test_allocations_meet_the_budget(allocation, mode, pruned, tiny):
    """Of all layers; only where they are to be alike each one is rounded down, to a multiple of eight neurons."""
    ended = pruned("--allocation", allocation, "--gqa_mode", mode, "--protected_layers", 0)
    after = shapes(ended.model)
    gone = 1 - owned(ended.model, mode) / owned(tiny / "llama", mode)
    assert 0.3 - 1e-9 <= gone < (0.33 if allocation == "global" else 0.3 + 8 * 3 * 48 * 4 / owned(tiny / "llama", mode))
    uneven = len({json.dumps(shape) for shape in after}) > 1
    assert uneven == (allocation != "uniform") and (ended.model / "modeling_pruned.py").exists() == uneven
    assert ("sensitivity" in ended.record) == (allocation == "sensitivity")


@pytest.mark.parametrize(("allocation", "ratio"), [("uniform", 0.2), ("sensitivity", 0.2),
                                                   ("sensitivity", 0.6)])  # fmt: skip
@pytest.mark.parametrize("mode", ["groups", "queries"])
def test_heads_alone_meet_the_budget(mode, ratio, allocation, base, tiny, tmp_path):
    """A whole head more than asked at most, but where all layers are to be alike."""
    flags = ["--pruning_ratio", ratio, "--allocation", allocation, "--gqa_mode", mode, "--protected_layers", 0]
    ended = Ended([*base, *flags, "--save_model"], tmp_path)
    gone = 1 - owned(ended.model, mode, mlp=False) / owned(tiny / "llama", mode, mlp=False)
    assert ratio - 1e-9 <= gone <= ratio + (1 / 4 if allocation == "uniform" else 1 / 16), ended.record["layers"]
    for shape in shapes(ended.model):
        assert shape["neurons"] == 48 and shape["kv_heads"] >= 1
        assert shape["kv_heads"] == 4 if mode == "queries" else shape["heads"] == 4 * shape["kv_heads"]
        assert shape["heads"] % shape["kv_heads"] == 0
    if mode == "queries":  # the KV heads are those of the dense model
        for name, tensor in load_file(ended.model / "model.safetensors").items():
            if "k_proj" in name or "v_proj" in name:
                assert torch.equal(tensor, load_file(tiny / "llama" / "model.safetensors")[name])


@pytest.mark.parametrize("importance", [*structured.SCORERS, "l2+fisher"])
def test_scorers(importance, pruned, tiny):
    ended = pruned("--importance", importance)
    assert ended.record["config"]["importance"] == importance and ended.record["config"]["scorers"] == importance.split("+")
    assert 0.3 - 1e-9 <= 1 - parameters(ended.model) / parameters(tiny / "llama") < 0.34
    assert math.isfinite(ended.record["metrics"]["pruned"]["perplexity"])
    others = {weights(pruned("--importance", other).model) for other in ("obs", "random") if other != importance}
    assert weights(ended.model) not in others


def test_a_run_killed_while_it_reconstructs(base, killed, tmp_path, monkeypatch):
    monkeypatch.setattr(finetune_llama3, "TOKENS_A_BATCH", finetune_llama3.TOKENS_A_BATCH)  # put back at the end
    of_small_batches()
    argv = [*base, "--prune_mlp", "--save_model", "--reconstruct_passes", 4, "--importance_samples", 20]
    whole = Ended(argv, tmp_path / "whole")
    assert len(whole.record["reconstruction_errors"]) == 3
    assert all(0 < after <= before for before, after in whole.record["reconstruction_errors"])
    assert any(after < before for before, after in whole.record["reconstruction_errors"])
    killed("in reconstruct_", [*argv, "--out_dir", tmp_path / "killed"])
    again = Ended(argv, tmp_path / "killed")
    assert weights(again.model) == weights(whole.model)
    assert again.record["reconstruction_errors"] == whole.record["reconstruction_errors"]


def test_refitting_is_what_moves_the_weights_that_stay(pruned, tiny):
    plain, refitted = pruned("--no_refit"), pruned()
    assert "refit_errors" not in plain.record and plain.record["layers"] == refitted.record["layers"]
    dense, left, moved = (load_file(folder / "model.safetensors") for folder in (tiny / "llama", plain.model, refitted.model))
    cut = [name for name, tensor in left.items() if tensor.shape != dense[name].shape]
    first = min(int(name.split(".")[2]) for name in cut)
    for name, tensor in left.items():
        values = set(dense[name].flatten().tolist())
        assert set(tensor.flatten().tolist()) <= values, name  # cut and not touched
        changed = name.endswith(("o_proj.weight", "down_proj.weight")) and int(name.split(".")[2]) >= first
        if name == f"model.layers.{first}.self_attn.o_proj.weight" and name not in cut:
            changed = False  # nothing had gone before it
        assert torch.equal(moved[name], tensor) != changed, name


def test_what_changes_no_result_changes_none(pruned, scenario, base, tmp_path):
    assert weights(pruned("--offload_activations").model) == weights(pruned().model)
    assert pruned("--offload_activations").folder.name == pruned().folder.name
    argv = [*base, *SCENARIOS["1"].split(), "--no_gradient_checkpointing"]
    ended, wanted = Ended(argv, tmp_path), load_file(scenario("1").model / "model.safetensors")
    assert ended.record["config"] == scenario("1").record["config"]
    for name, tensor in load_file(ended.model / "model.safetensors").items():
        torch.testing.assert_close(tensor, wanted[name], rtol=1e-4, atol=1e-6)


def test_the_seed_makes_a_difference(base, left_alone, tmp_path):
    assert weights(Ended([*base, *SCENARIOS["1"].split(), "--seed", 1], tmp_path).model) != weights(left_alone.model)


LEARNING = ["--pruning_ratio", 0.25, "--prune_mlp", "--save_model", "--finetune", "--finetune_lr", 1e-2,
            "--finetune_epochs", 2]  # fmt: skip


@pytest.mark.parametrize("flags", [[], ["--distill"], ["--distill", "--hidden_weight", 1, "--distill_weight", 1],
                                   ["--finetune_method", "lora", "--distill", "--hidden_weight", 0.1],
                                   ["--precision", "bf16-mixed"], ["--precision", "bf16"],
                                   *(["--finetune_optim", name] for name in ("muon", "adafactor"))],
                         ids=lambda flags: " ".join(map(str, flags)) or "plain")  # fmt: skip
def test_ways_to_train(flags, base, tmp_path):
    """And with checkpointing, with which every scenario trains."""
    ended = Ended([*base, *LEARNING, *flags], tmp_path)
    losses, metrics = list(curve(ended.folder).values()), ended.record["metrics"]
    first, last = sum(losses[:3]) / 3, sum(losses[-3:]) / 3
    assert last < first * 0.98, losses
    if "--hidden_weight" not in flags:
        assert metrics["lora" if "lora" in flags else "full"]["perplexity"] < 0.9 * metrics["pruned"]["perplexity"]
    stored = load_file(ended.model / "model.safetensors").values()
    assert {tensor.dtype for tensor in stored} == {torch.float32}  # as the model that it came from
    assert all(torch.equal(tensor, tensor.bfloat16().float()) for tensor in stored) == ("bf16" in flags)  # all of it


@pytest.mark.parametrize("optimizer", ["adamw", "muon", "sgd"])
def test_frozen_embeddings(optimizer, base, tmp_path):
    """All but them moves, by each optimizer in its own way."""
    flags = ["--pruning_ratio", 0, "--finetune", "--save_model", "--finetune_lr", 1e-2, "--finetune_optim", optimizer]
    ended, others = Ended([*base, *flags, "--freeze_embeddings"], tmp_path / "a"), Ended([*base, *flags], tmp_path / "b")
    before, frozen, moved = (load_file(folder / "model.safetensors") for folder in (Path(base[1]), ended.model, others.model))
    assert "model.embed_tokens.weight" in before
    for name, tensor in before.items():
        assert torch.equal(tensor, frozen[name]) == (name == "model.embed_tokens.weight"), name
        assert not torch.equal(tensor, moved[name]), name
    n = sum(tensor.numel() for tensor in before.values())
    assert f"trainable params: {n - before['model.embed_tokens.weight'].numel():,} || all params: {n:,} ||" in ended.shown


def test_adapters_where_they_are_asked_for(base, tmp_path):
    flags = ["--pruning_ratio", 0.25, "--finetune", "--finetune_method", "lora", "--lora_target_modules", "q_proj,v_proj",
             "--lora_r", 4, "--lora_alpha", 12.5, "--lora_dropout", 0, "--finetune_lr", 1e-2, "--save_model", "--no_refit",
             "--layer_start", 1, "--layer_end", 2]  # fmt: skip
    ended, plain = Ended([*base, *flags], tmp_path / "a"), Ended([*base, *flags[:2], *flags[-6:]], tmp_path / "b")
    assert "configuring LoRA (r=4, alpha=12.5, dropout=0)..." in ended.shown
    after, before = load_file(ended.model / "model.safetensors"), load_file(plain.model / "model.safetensors")
    changed = {name for name, tensor in after.items() if not torch.equal(tensor, before[name])}
    assert changed == {f"model.layers.{i}.self_attn.{name}.weight" for i in range(4) for name in ("q_proj", "v_proj")}
    trained = sum(4 * sum(after[name].shape) for name in changed)
    assert f"trainable params: {trained:,} || " in ended.shown


def test_a_window_that_is_shorter_than_the_prompt(base, tmp_path):
    """Mistral: its cache forgets what leaves the window."""
    torch.manual_seed(0)
    AutoModelForCausalLM.from_config(MistralConfig(**SHAPE, sliding_window=16)).save_pretrained(tmp_path / "mistral")
    AutoTokenizer.from_pretrained(assets.TINY_LLAMA).save_pretrained(tmp_path / "mistral")
    ended = Ended([*base, "--base_model", tmp_path / "mistral", "--pruning_ratio", 0.25, "--save_model"], tmp_path / "out")
    assert ended.record["metrics"]["pruned"]["decode_tokens_per_second"] > 0
    loaded = AutoModelForCausalLM.from_pretrained(ended.model, trust_remote_code=True)
    assert loaded.config.sliding_window == 16 and loaded.config.pruned_linears


def without_peft(monkeypatch):
    require = runs.require

    def call(module, what):
        if module == "peft":
            raise runs.UserError(f"peft is not installed; {what} needs it. Run: pip install -r requirements-extra.txt")
        return require(module, what)

    monkeypatch.setattr(runs, "require", call)


def test_without_peft(base, tmp_path, monkeypatch, capsys):
    """An error that names the command; all weights are trained only where that was asked for, and the log says so."""
    without_peft(monkeypatch)
    argv = [*base, "--pruning_ratio", 0, "--finetune", "--finetune_method", "lora", "--finetune_samples", 8]
    assert as_program([*argv, "--out_dir", tmp_path]) == 2
    printed = capsys.readouterr().err
    assert printed == ("error: peft is not installed; --finetune_method lora needs it. "
                       "Run: pip install -r requirements-extra.txt\n")  # fmt: skip
    assert not list(tmp_path.iterdir())
    ended = Ended([*argv, "--allow_full_fallback"], tmp_path)
    warning = "⚠️ peft is not installed: all weights are trained (--allow_full_fallback)"
    assert list(ended.record["metrics"]) == ["dense", "full"] and ended.record["config"]["finetune_method"] == "full"
    assert warning in ended.shown.splitlines() and (ended.folder / "training.log").read_text() == ended.shown
    capsys.readouterr()
    with_it = [*argv[:-4], "--allow_full_fallback", "--finetune_samples", 8]  # full: nothing falls back
    assert as_program([*with_it, "--dry_run"]) == 0 and warning not in capsys.readouterr().out


# ----------------------------------------------------------------------------------------------------------------- refused

LORA = ["--finetune", "--finetune_method", "lora"]
REFUSED = [
    (["--pruning_ratio", 0.91], "--pruning_ratio 0.91: expected a value from 0 to 0.9"),
    (["--pruning_ratio", -0.1], "--pruning_ratio -0.1: expected a value from 0 to 0.9"),
    (["--pruning_ratio", "nan"], "--pruning_ratio nan: expected a value from 0 to 0.9"),
    (["--layer_start", 2, "--layer_end", 2], "layers 2 to 2: expected a range within 0 to 4 that is not empty"),
    (["--layer_start", 3, "--layer_end", 1], "layers 3 to 1: expected a range within 0 to 4 that is not empty"),
    (["--layer_start", -1], "layers -1 to 4: expected a range"),
    (["--layer_end", 5], "layers 0 to 5: expected a range"),
    (["--layer_start", 10, "--layer_end", 15], "layers 10 to 15: expected a range within 0 to 4"),
    (["--protected_layers", 2], "layers 2 to 2: expected a range"),
    (["--pruning_ratio", 0.8], "--pruning_ratio 0.8: layers 1 to 2 have 0.375 to give without --prune_mlp. Ask for less"),
    (["--pruning_ratio", 0.5, "--prune_mlp"], "--pruning_ratio 0.5: layers 1 to 2 have 0.4"),
    (["--pruning_ratio", 0.8, "--layer_start", 0, "--floor", 0.5], "have 0.500 to give"),
    (["--base_model", "NO GQA", "--gqa_mode", "queries"], "--gqa_mode queries: every query head of this model has keys of its"),
    (["--importance", "wanda"], "--importance wanda: expected one or several of obs, "),
    (["--importance", "l2+l2"], "--importance l2+l2: expected one or several of"),
    (["--base_model", "BERT"], "causal language model"),
    (["--base_model", "EMPTY"], "no config.json"),
    (["--base_model", "/nowhere/at/all"], "/nowhere/at/all: no such directory"),
    (["--base_model", "GPT2"], "'gpt2' is not supported"),
    (["--base_model", "NO TOKENIZER"], "no tokenizer"),
    (["--importance_seq_len", 129], "--importance_seq_len 129: this llama model has 128 positions"),
    (["--finetune", "--finetune_seq_len", 129], "--finetune_seq_len 129: this llama model has 128 positions"),
    (["--ppl_seqlen", 129], "--ppl_seqlen 129: this llama model has 128 positions"),
    (["--ppl_seqlen", 1], "--ppl_seqlen 1"),
    ([*LORA, "--lora_target_modules", "q_proj,nothing"], "--lora_target_modules nothing: not in this model's blocks; "),
    ([*LORA, "--lora_target_modules", "lm_head"], "--lora_target_modules lm_head: "),
    ([*LORA, "--lora_target_modules", ""], "--lora_target_modules "),
    (["--pruning_ratio", 0], "nothing to do: --pruning_ratio 0 and no --finetune"),
    (["--finetune", "--finetune_dataset", "SHORT"], "windows of 32 tokens, less than a step of 4"),
    (["--finetune_dataset", "SHORT", "--importance_seq_len", 128], "too little calibration text"),
    (["--finetune_dataset", "nothing.txt"], "nothing.txt"),
    (["--eval_text", "nothing.txt"], "nothing.txt"),
    (["--eval_text", "NO TEST"], "has no validation split; it has train"),
    (["--finetune", "--hidden_weight", 1], "--hidden_weight 1.0: is for --distill"),
    (["--no_refit", "--reconstruct_passes", 2], "--reconstruct_passes 2: is for --refit"),
    (["--finetune", "--pruning_ratio", 0, "--reconstruct_passes", 2], "--reconstruct_passes 2: is for --pruning_ratio"),
    (["--reconstruct_passes", 2], "the calibration text is one batch, and another is needed"),
    (["--distill"], "--distill: is for --finetune"),
    (["--finetune_method", "all"], "invalid choice: 'all'"),
    (["--allocation", "greedy"], "invalid choice: 'greedy'"),
    (["--gqa_mode", "keys"], "invalid choice: 'keys'"),
    (["--finetune_lr", "nan"], "--finetune_lr nan"),
    (["--finetune", "--finetune_optim", "lion"], "invalid choice: 'lion'"),
    (["--finetune", "--finetune_optim", "adamw_8bit"], "torchao is not installed; --finetune_optim adamw_8bit needs it"),
    (["--finetune_epochs", 0], "--finetune_epochs 0"),
    (["--device", "cuda:99"], "--device cuda:99"),
    (["--save_ckpt_log_name", "a/b"], "a/b: expected the name of a directory"),
    (["--save_ckpt_log_name", "FILE"], "a file is in the way"),
    (["--out_dir", "FILE OUT"], "a file is in the way"),
]  # fmt: skip


def place(name, folder, tiny):
    """What a flag of REFUSED names, made."""
    if name == "BERT":
        sizes = {"hidden_size": 16, "num_hidden_layers": 4, "num_attention_heads": 2, "intermediate_size": 16}
        AutoModelForMaskedLM.from_config(BertConfig(vocab_size=8192, **sizes)).save_pretrained(folder / name)
        AutoTokenizer.from_pretrained(tiny / "llama").save_pretrained(folder / name)
    elif name == "NO GQA":
        save_toy(folder / name, num_key_value_heads=16)
    elif name in ("GPT2", "NO TOKENIZER"):
        shutil.copytree(tiny / "llama", folder / name)
        if name == "GPT2":
            config = read_json(folder / name / "config.json") | {"model_type": "gpt2", "architectures": ["GPT2LMHeadModel"]}
            (folder / name / "config.json").write_text(json.dumps(config))
        for path in (folder / name).glob("tokenizer*" if name == "NO TOKENIZER" else "nothing"):
            path.unlink()
    elif name == "EMPTY":
        (folder / name).mkdir()
    elif name in ("SHORT", "NO TEST"):
        shutil.copytree(tiny / "text", folder / name)
        if name == "SHORT":
            (folder / name / "train.txt").write_text("\n\n".join(sentences(5)))
        else:  # as a prepared text is that was made so; of other ones it is drawn
            prepared = text.prepare_text(str(folder / name), folder / "elsewhere").path
            record = read_json(prepared / "manifest.json")
            record["splits"] = {split: found for split, found in record["splits"].items() if split == "train"}
            (prepared / "manifest.json").write_text(json.dumps(record))
            return prepared
    elif name == "FILE":
        (folder / "out" / "llama3").mkdir(parents=True)
        (folder / "out" / "llama3" / name).write_text("in the way")
        return name
    elif name == "FILE OUT":
        (folder / name).write_text("in the way")
    return folder / name


def nothing_is_loaded(monkeypatch):
    for owner, name in ((streaming.StreamedLM, "read"), (finetune_llama3, "load_causal_lm"), (structured, "load_causal_lm"),
                        (generation, "load_causal_lm")):  # fmt: skip
        monkeypatch.setattr(owner, name, lambda *_, **__: pytest.fail("something was loaded"))


@pytest.mark.parametrize(("flags", "message"), REFUSED, ids=lambda value: " ".join(map(str, value)).replace("/", "_")
                         if isinstance(value, list) else "")  # fmt: skip
def test_what_is_refused_is_refused_in_one_line(flags, message, base, tiny, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    find_spec = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda name, *_: None if name == "torchao" else find_spec(name, *_))
    flags = [place(flag, tmp_path, tiny) if str(flag).isupper() else flag for flag in flags]
    before = set(tmp_path.rglob("*"))
    nothing_is_loaded(monkeypatch)
    capsys.readouterr()
    assert as_program([*base, "--save_model", "--out_dir", tmp_path / "out", *flags]) == 2
    printed = capsys.readouterr().err
    assert printed.startswith("error: ") and message in printed and printed.count("\n") == 1, printed
    left = {path for path in tmp_path.rglob("*") if "tokens" not in path.parts and path.suffix != ".lock"}
    assert left <= before


def test_what_is_not_used_is_not_refused(base, tmp_path, capsys):
    """The defaults of what is left out do not have to fit the model."""
    only_pruned = [*base, "--finetune_seq_len", 512, "--finetune_grad_accum", 1000, "--dry_run", "--out_dir", tmp_path]
    assert as_program(only_pruned) == 0, capsys.readouterr().err
    only_trained = [*base, "--importance_seq_len", 512, "--pruning_ratio", 0, "--finetune", "--dry_run", "--out_dir", tmp_path]
    assert as_program(only_trained) == 0, capsys.readouterr().err


def test_a_name_that_is_taken_is_told(base, left_alone, tmp_path, capsys):
    """Another configuration under the same name; and stage 2 under the name of stage 1, whose model it would move away."""
    shutil.copytree(left_alone.folder, tmp_path / "llama3" / left_alone.folder.name)
    folder, argv = only_run(tmp_path), [*base, *SCENARIOS["1"].split(), "--out_dir", tmp_path]
    assert as_program([*argv, "--finetune_lr", 2e-5]) == 2
    printed = capsys.readouterr().err
    assert "finetune_lr 1e-05 -> 2e-05" in printed and "--resume never" in printed and printed.count("\n") == 1
    name = re.search(r"another (--\w+)", printed.partition(". ")[2])[1]
    assert as_program([*argv, "--finetune_lr", 2e-5, name, "b", "--dry_run"]) == 0, name  # the flag that it names is one
    for resume in ("auto", "never"):
        capsys.readouterr()
        assert as_program([*argv, "--base_model", folder / "model", "--pruning_ratio", 0, "--resume", resume]) == 2
        assert (folder / "model").exists() and only_run(tmp_path) == folder
    printed = capsys.readouterr().err
    assert printed.startswith("error: --base_model ") and "--save_ckpt_log_name" in printed and printed.count("\n") == 1


FULL = Path("/dev/full")  # every write to it finds the disk full


@pytest.mark.skipif(not FULL.exists(), reason="no /dev/full here")
def test_a_full_disk_is_told_before_the_work(base, tmp_path, monkeypatch, capsys):
    nothing_is_loaded(monkeypatch)
    (tmp_path / "llama3" / "full").mkdir(parents=True)
    (tmp_path / "llama3" / "full" / "training.log").symlink_to(FULL)
    assert as_program([*base, "--save_ckpt_log_name", "full", "--out_dir", tmp_path]) == 2
    printed = capsys.readouterr().err
    assert printed.startswith("error: ") and "No space left on device. Free some space" in printed and printed.count("\n") == 1


@pytest.mark.parametrize("number", [errno.EROFS, errno.EACCES, errno.ENOSPC])
def test_an_output_directory_that_takes_nothing(number, base, tmp_path, monkeypatch, capsys):
    nothing_is_loaded(monkeypatch)

    def refuse(path, *_):
        raise OSError(number, os.strerror(number), str(path))

    monkeypatch.setattr(runs, "write_atomic", refuse)
    assert as_program([*base, "--out_dir", tmp_path]) == 2
    printed = capsys.readouterr().err
    assert printed.startswith(f"error: {tmp_path}") and os.strerror(number) in printed and printed.count("\n") == 1


def filled(folder, path, **_):
    raise OSError(errno.ENOSPC, "No space left on device", str(path))


def filled_zip(*_, **__):
    raise RuntimeError("[enforce fail at inline_container.cc:672] . unexpected pos 64 vs 0")  # as torch.save has it


@pytest.mark.parametrize(("owner", "name", "function"), [(PreTrainedModel, "save_pretrained", filled),
                                                         (SparseTrainer, "_save_optimizer_and_scheduler", filled_zip)],
                         ids=["a model", "a checkpoint"])  # fmt: skip
def test_a_disk_that_fills_up_on_the_way(owner, name, function, base, left_alone, tmp_path, monkeypatch, capsys):
    argv = [*base, *SCENARIOS["1"].split(), "--save_every", 5]
    with monkeypatch.context() as patch:
        patch.setattr(owner, name, function)
        assert as_program([*argv, "--out_dir", tmp_path]) == 2
    printed = capsys.readouterr().err.splitlines()[-1]
    assert printed.startswith(f"error: {only_run(tmp_path)}")
    assert re.search(r"Free some space .*what was (already written|written before) is intact$", printed), printed
    assert read_json(only_run(tmp_path) / "run.json")["status"] == "failed"
    assert weights(Ended(argv, tmp_path).model) == weights(left_alone.model)


def test_too_small_a_disk_is_told_before_the_work(base, tiny, tmp_path, monkeypatch, capsys):
    """What will be written is the pruned and the trained model, and a checkpoint where there will be one."""
    nothing_is_loaded(monkeypatch)
    stored = eval_utils.directory_bytes(tiny / "llama")
    states = 12 * sum(p.numel() for p in streaming.causal_outline(tiny / "llama").parameters())
    for flags, needed in (([], stored), (["--finetune"], 2 * stored), (["--finetune", "--save_every", 5], 2 * stored + states)):
        room = int(0.75 * needed) - 1
        monkeypatch.setattr(shutil, "disk_usage", lambda _, room=room: argparse.Namespace(free=room))
        out = tmp_path / "not" / "there"
        assert as_program([*base, *flags, "--out_dir", out]) == 2
        printed = capsys.readouterr().err
        assert printed.startswith(f"error: {out}: ") and "free there" in printed and printed.count("\n") == 1
        assert f"takes {int(0.75 * needed) / 1e9:.3f} GB" in printed and not out.exists()
        assert as_program([*base, *flags, "--dry_run", "--out_dir", out]) == 0


# ----------------------------------------------------------------------------------------------------- plans, ends, numbers


@pytest.mark.parametrize("name", SCENARIOS)
def test_a_dry_run_prints_the_plan(name, base, tiny, tmp_path, monkeypatch, capsys):
    nothing_is_loaded(monkeypatch)
    assert as_program([*base, *SCENARIOS[name].split(), "--dry-run", "--out_dir", tmp_path]) == 0
    plan = capsys.readouterr().out.splitlines()
    assert plan[0] == f"model        {tiny / 'llama'}, 0.5 M parameters"
    method = "lora" if name == "3" else "full"
    assert f"fine-tuning  {method}, {STEPS[name]} steps" in plan and "running      32, cpu" in plan
    what = {"1": "0.25 of attention and FFN", "2": "0.3 of attention and FFN", "3": "0.25 of attention and FFN",
            "4": "0.25 of attention"}[name]  # fmt: skip
    assert f"pruning      {what}, obs, global" in plan
    assert not list(tmp_path.iterdir())


def test_fast_is_scenario_4(capsys):
    flags = SCENARIOS["4"].split()
    args, *_ = finetune_llama3.parse_args(["--fast", "--finetune"])
    for flag, value in itertools.pairwise(flags):
        if flag.startswith("--finetune_") or flag in ("--pruning_ratio", "--importance_samples"):
            assert getattr(args, flag[2:]) == float(value), flag
    full, *_ = finetune_llama3.parse_args(["--finetune"])
    guide = {"finetune_lr": 1e-5, "finetune_epochs": 1, "finetune_samples": 500, "finetune_batch_size": 1,
             "finetune_seq_len": 512, "finetune_grad_accum": 4, "finetune_max_grad_norm": 1.0, "finetune_weight_decay": 0.01,
             "finetune_warmup_steps": 0, "finetune_method": "full", "lora_r": 8, "lora_alpha": 16, "lora_dropout": 0.05,
             "refit": True, "prune_mlp": False, "save_model": False}  # fmt: skip
    assert {name: getattr(full, name) for name in guide} == guide


def test_a_finished_run_is_not_done_again(base, left_alone, monkeypatch, capsys):
    nothing_is_loaded(monkeypatch)
    left = {path: path.stat().st_mtime_ns for path in left_alone.folder.rglob("*") if path.name != "training.log"}
    again = Ended([*base, *SCENARIOS["1"].split()], left_alone.folder.parent.parent)
    assert again.record == left_alone.record
    assert left == {path: path.stat().st_mtime_ns for path in left_alone.folder.rglob("*") if path.name != "training.log"}
    assert f"run          {left_alone.folder} (finished before; --resume never starts anew)" in again.shown
    assert again.shown.partition("latency")[2] == left_alone.shown.partition("latency")[2]
    assert again.shown.splitlines()[-1] == f"record  {left_alone.folder / 'run.json'}"
    for found in left_alone.record["metrics"].values():
        assert f"{found['perplexity']:.2f}" in again.shown.replace(",", "")


def test_a_finished_run_that_was_measured_otherwise(base, tiny, left_alone, monkeypatch, capsys):
    """Its pruned model is gone, so it cannot be measured as the others of its table were."""
    nothing_is_loaded(monkeypatch)
    other = tiny / "other"
    other.mkdir()
    for split in ("validation", "test"):
        (other / f"{split}.txt").write_text((tiny / "text" / "train.txt").read_text())
    argv, before = [*base, *SCENARIOS["1"].split(), "--out_dir", left_alone.folder.parent.parent], left_alone.record
    for flags in (["--ppl_seqlen", 32], ["--eval_text", other]):
        assert as_program([*argv, *flags]) == 2
        printed = capsys.readouterr().err
        assert printed.startswith(f"error: {left_alone.folder}: was measured with another --eval_text or --ppl_seqlen")
        assert "main_block.py --model DIR --eval" in printed and "--resume never" in printed and printed.count("\n") == 1
    assert read_json(left_alone.folder / "run.json") == before


def test_a_run_can_be_started_anew(base, tmp_path):
    argv = [*base, "--pruning_ratio", 0.25, "--save_ckpt_log_name", "mine", "--save_model"]
    first = Ended(argv, tmp_path)
    finetune_llama3.main([*argv, "--resume", "never", "--out_dir", tmp_path])
    assert weights(first.folder.with_name("mine.old-1") / "model") == weights(first.model)


def test_a_loss_that_is_no_number(base, tmp_path, monkeypatch, capsys):
    """One line with advice that this script understands; the last good state stays, no model is written."""
    argv = [*base, "--pruning_ratio", 0.25, "--finetune", "--save_model", "--save_every", 2, "--finetune_epochs", 2,
            "--out_dir", tmp_path]  # fmt: skip
    compute, calls = SparseTrainer.compute_loss, []

    def spoilt(*args, **kwargs):
        calls.append(1)
        return compute(*args, **kwargs) * (math.nan if len(calls) > 4 * 6 else 1)

    monkeypatch.setattr(SparseTrainer, "compute_loss", spoilt)
    assert as_program(argv) == 2
    printed = capsys.readouterr().err
    assert re.fullmatch(r"error: loss is nan at step 7\. [^\n]*\n", printed), printed
    assert f"{only_run(tmp_path)}/checkpoint/checkpoint-6" in printed
    advised = re.findall(r"--\w+", printed)
    assert {"--finetune_lr", "--finetune_max_grad_norm"} <= set(advised)
    rows = {f"--{row[0]}" for row in finetune_llama3.PRESETS}
    assert set(advised) <= rows | {"--precision", "--save_ckpt_log_name", "--resume"}
    folder = only_run(tmp_path)
    assert read_json(folder / "run.json")["status"] == "failed" and not (folder / "model").exists()
    assert last_checkpoint(folder / "checkpoint").name == "checkpoint-6"
    kept = load_file(folder / "checkpoint" / "checkpoint-6" / "model.safetensors")
    assert all(tensor.isfinite().all() for tensor in kept.values())


def test_a_gradient_that_is_no_number_ends_before_it_is_kept(base, tmp_path, monkeypatch, capsys):
    """The loss of the last step is a number still, and its weights are none."""
    step, calls = SparseTrainer.training_step, []

    def spoilt(trainer, model, *args):
        loss = step(trainer, model, *args)
        calls.append(1)
        if len(calls) == 4 * 6:
            next(p for p in model.parameters() if p.grad is not None).grad.fill_(math.inf)
        return loss

    monkeypatch.setattr(SparseTrainer, "training_step", spoilt)
    flags = ["--pruning_ratio", 0, "--finetune", "--save_model", "--save_every", 2]
    assert as_program([*base, *flags, "--out_dir", tmp_path]) == 2
    printed = capsys.readouterr().err
    assert re.fullmatch(r"error: grad_norm is (nan|inf) at step 6\. [^\n]*\n", printed), printed
    folder = only_run(tmp_path)
    assert not (folder / "model").exists() and last_checkpoint(folder / "checkpoint").name == "checkpoint-4"


def test_every_flag_is_read(capsys):
    with pytest.raises(SystemExit) as stop:
        finetune_llama3.main(["--help"])
    assert stop.value.code == 0
    flags = set(re.findall(r"^  --(\w+)", capsys.readouterr().out, re.MULTILINE))
    assert len(flags) > 40 and {row[0] for row in finetune_llama3.PRESETS} < flags
    code = SCRIPT.read_text() + (REPOSITORY / "common" / "runs.py").read_text()
    assert not flags - set(re.findall(r"\bargs\.(\w+)", code))
    guide = set(re.findall(r"--(\w+)", " ".join(SCENARIOS.values())))
    assert guide < flags
    assert set(finetune_llama3.NO_RESULT) - flags <= set(runs.NO_RESULT)


def test_as_a_program(base, left_alone, tmp_path):
    """With --base_model as the guide has it, and what it prints is what its log holds."""
    words = [sys.executable, SCRIPT, *base, *SCENARIOS["1"].split(), "--out_dir", left_alone.folder.parent.parent]
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    done = subprocess.run([str(word) for word in words], cwd=tmp_path, env=environment, capture_output=True, text=True,
                          encoding="utf-8")  # fmt: skip
    assert done.returncode == 0 and "finished before" in done.stdout, done.stderr
    assert done.stdout.splitlines()[-2:] == [f"model   {left_alone.model}", f"record  {left_alone.folder / 'run.json'}"]
