"""The script as a user meets it: what it prunes and saves, what happens when it is killed, and what it refuses."""

import csv
import itertools
import json
import multiprocessing
import os
import random
import re
import shutil
import signal
import subprocess
import sys

import pytest
import torch
from safetensors.torch import load_file
from tokenizers import ByteLevelBPETokenizer
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedTokenizerFast

import main_block
from common import checkpoint, curvature, eval_utils, runs, streaming, text
from common.runs import REPOSITORY, read_json
from tests.killing import die_at
from tests.test_8_pruning_with_finetuning import load_script
from tests.test_streaming import all_tensors, cut, edit_config, one_thread, random_lm, rename  # noqa: F401

VOCABULARY = {"vocab_size": 320, "bos_token_id": 0, "eos_token_id": 1, "pad_token_id": 1}
LIMIT = VOCABULARY | {"max_position_embeddings": 64}
PATTERNS = {"unstructured": [], "2:4": ["--sparsity_type", "2:4"], "block": ["--sparsity_type", "block", "--block_size", 16]}
FAMILIES = ["opt", "opt-350m", "mistral", "qwen2", "qwen3", "qwen2-mixed", "llama-tied"]
WORDS = ["the", "a", "court", "of", "river", "price", "minister", "storm", "says", "goal", "second", "team", "north", "water"]


def sentences(n, seed=0):
    """With a likely order of words, so that there is something to predict."""
    pick, found = random.Random(seed), []
    for _ in range(n):
        at, line = pick.randrange(len(WORDS)), []
        for _ in range(pick.randint(6, 16)):
            at = (at + 1) % len(WORDS) if pick.random() < 0.7 else pick.randrange(len(WORDS))
            line.append(WORDS[at])
        found.append(" ".join(line))
    return found


def save_tokenizer(folder):
    bpe = ByteLevelBPETokenizer()
    bpe.train_from_iterator(sentences(50), vocab_size=320, special_tokens=["<s>", "</s>"], show_progress=False)
    PreTrainedTokenizerFast(tokenizer_object=bpe._tokenizer, bos_token="<s>", eos_token="</s>").save_pretrained(folder)


def save_model(folder, case="llama", dtype=torch.bfloat16):
    random_lm(case, dtype, **LIMIT).save_pretrained(folder)
    save_tokenizer(folder)
    return folder


@pytest.fixture(scope="session")
def tiny(tmp_path_factory):
    """A Llama that was never trained, with a tokenizer, and a text."""
    folder = tmp_path_factory.mktemp("tiny")
    save_model(folder / "llama")
    (folder / "text.txt").write_text("\n\n".join(sentences(300)))
    return folder


@pytest.fixture(scope="session")
def base(tiny):
    """Flags of a run of half a second; what comes after them wins."""
    return ["--model", tiny / "llama", "--calibration", tiny / "text.txt", "--eval_text", tiny / "text.txt", "--data_dir",
            tiny / "data", "--nsamples", 10, "--seqlen", 40, "--fisher_samples", 6, "--device", "cpu",
            "--precision", "32"]  # fmt: skip


def only_run(out):
    (record,) = (out / "one_shot").glob("[!.]*/run.json")
    return record.parent


def run(argv, out):
    main_block.main([*argv, "--out_dir", out])
    folder = only_run(out)
    return folder, read_json(folder / "run.json")


def as_program(argv):
    try:
        runs.run_script(lambda: main_block.main(argv))
    except SystemExit as stop:
        return stop.code
    return 0


def weights(folder):
    return (folder / "model" / "model.safetensors").read_bytes()


def projections_of(record):
    return {f"{found['name']}.weight": found for found in record["projections"]}


# --------------------------------------------------------------------------------------------- pruned, saved, loaded again

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
    model = transformers.AutoModelForCausalLM.from_pretrained(folder + "/model", dtype=torch.float32).eval()
    transformers.AutoTokenizer.from_pretrained(folder + "/model")
    with torch.no_grad():
        torch.save(model(torch.load(folder + "/ids.pt", weights_only=True)).logits, folder + "/logits.pt")
"""
SAVED = [("llama", method, kind) for method, kind in itertools.product(main_block.METHODS, PATTERNS)]
SAVED += [(family, "kfac", "block") for family in FAMILIES]


@pytest.fixture(scope="module")
def saved(base, tmp_path_factory):
    """All of SAVED: the run's directory and record, the dense model, and the last hidden states' logits in memory.

    They are loaded by one process that cannot see this repository.
    """
    root, found = tmp_path_factory.mktemp("saved"), {}
    prune_ = main_block.prune_

    def and_keep_logits(lm, hidden, args, pattern, shares, run):
        records, last = prune_(lm, hidden, args, pattern, shares, run), len(lm) - 1
        with lm.loaded(last, load_file(run.dir / "blocks" / f"block-{last}.safetensors")):
            lm.advance(last, hidden)  # as nothing else does: what the last block gives nobody takes
        with torch.no_grad():
            found["logits"] = lm.logits(torch.zeros(hidden[0].shape[:2], dtype=torch.long), hidden[0])
        return records

    def and_keep_ids(stream, n, length, seed):
        found["ids"] = calibration_samples(stream, n, length, seed)
        return found["ids"]

    calibration_samples = text.calibration_samples
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(main_block, "prune_", and_keep_logits)
        patch.setattr(text, "calibration_samples", and_keep_ids)
        for case, method, kind in SAVED:
            model = root / case
            if not model.exists():
                save_model(model, case, torch.float32 if case == "qwen3" else torch.bfloat16)
            folder, record = run([*base, "--model", model, "--prune_method", method, *PATTERNS[kind], "--sparsity_ratio", 0.5],
                                 root / f"{case}-{method}-{kind}".replace(":", "-"))  # fmt: skip
            torch.save(found["ids"][: len(found["logits"])], folder / "ids.pt")
            found[case, method, kind] = folder, record, model, found["logits"]
    (root / "bare.py").write_text(BARE)
    command = [sys.executable, "-I", root / "bare.py", *(found[key][0] for key in SAVED)]
    subprocess.run(command, check=True, cwd=root, timeout=200, capture_output=True)
    return found


@pytest.mark.parametrize(("case", "method", "kind"), SAVED)
def test_it_loads_anywhere_as_it_was_in_memory(case, method, kind, saved):
    folder, _, model, in_memory = saved[case, method, kind]
    logits = torch.load(folder / "logits.pt", weights_only=True)
    torch.testing.assert_close(logits, in_memory, rtol=1e-5, atol=1e-5 * float(in_memory.abs().max()))
    dense = AutoModelForCausalLM.from_pretrained(model, dtype=torch.float32).eval()
    with torch.no_grad():
        difference = dense(torch.load(folder / "ids.pt", weights_only=True)).logits - logits
    assert difference.abs().max() > 0.001
    assert AutoTokenizer.from_pretrained(folder / "model").get_vocab() == AutoTokenizer.from_pretrained(model).get_vocab()


@pytest.mark.parametrize(("case", "method", "kind"), SAVED)
def test_zeros_are_where_they_are_claimed_and_nothing_else_is_touched(case, method, kind, saved):
    folder, record, model, _ = saved[case, method, kind]
    before, after, claimed = load_file(model / "model.safetensors"), all_tensors(folder / "model"), projections_of(record)
    assert before.keys() == after.keys() and len(claimed) == 3 * (6 if "opt" in case else 7)
    zeros, asked = 0, 0.0
    for name, tensor in after.items():
        assert tensor.dtype == before[name].dtype and tensor.shape == before[name].shape
        if name not in claimed:
            assert torch.equal(tensor, before[name]), name
            continue
        found = claimed[name]
        assert found["sparsity"] == pytest.approx(float((tensor == 0).double().mean()), abs=1e-6)
        assert 0 < found["error"] < 1
        if kind == "2:4":
            assert found["sparsity"] == 0.5 and (tensor.unflatten(1, (-1, 4)) != 0).sum(2).max() == 2
        elif kind == "block":
            blocks = tensor.unflatten(1, (-1, 16)).unflatten(0, (-1, 16))  # (rows, 16, columns, 16)
            whole = (blocks != 0).sum((1, 3))
            assert int((whole == 0).sum()) == round(whole.numel() * found["sparsity_asked"])
            assert (whole[whole > 0] > 250).all()
        else:
            wanted = found["sparsity_asked"]
            step = 1 / tensor.shape[1] if method == "wanda" else 1 / tensor.numel()
            assert found["sparsity"] == pytest.approx(wanted, abs=0.51 * step)
        zeros, asked = zeros + int((tensor == 0).sum()), asked + found["sparsity_asked"] * tensor.numel()
    total = sum(after[name].numel() for name in claimed)
    assert record["metrics"]["pruned"]["sparsity"] == pytest.approx(zeros / total, abs=1e-9)
    assert asked / total == pytest.approx(0.5, abs=0.005)
    assert ("lm_head.weight" in before) == (case in ("llama", "mistral", "qwen3", "qwen2-mixed"))  # the others are tied


def test_the_record_and_the_models_own(saved, tiny):
    folder, record, model, _ = saved["llama", "kfac", "block"]
    assert record["status"] == "finished" and record["model_dir"] == str(folder / "model")
    config = record["config"]
    resolved = {"prune_method": "kfac", "sparsity_type": "block", "update": "refit", "allocation": "sensitivity", "seqlen": 40}
    assert config.items() >= resolved.items()
    assert [asset["name"].split("-")[0] for asset in config["assets"]] == ["llama", "text"]
    (stage,) = checkpoint.compression_stages(folder / "model")
    assert stage["asked"] == config and stage["pattern"] == "block 16x16" and stage["projections"] == record["projections"]
    assert sorted(record["timings"]) == ["allocation", "pruning", "writing"]
    assert record["metrics"]["dense"]["bytes"] == eval_utils.directory_bytes(model)
    left = sorted(path.name for path in folder.iterdir())
    assert left == ["ids.pt", "logits.pt", "model", "run.json"]  # the first two are these tests'


# ------------------------------------------------------------------------------------------------------ methods by updates


@pytest.mark.parametrize("method", main_block.METHODS)
@pytest.mark.parametrize("kind", PATTERNS)
def test_every_update_goes_with_every_mask(method, kind, base, tiny, tmp_path):
    made = {}
    for update in ("none", "obs", "refit"):
        argv = [*base, "--prune_method", method, "--update", update, *PATTERNS[kind], "--allocation", "uniform"]
        folder, record = run(argv, tmp_path / update)
        assert record["config"]["update"] == update
        made[update] = all_tensors(folder / "model"), projections_of(record)
    dense = all_tensors(tiny / "llama")
    for name, found in made["none"][1].items():
        tensor = made["none"][0][name]
        assert torch.equal(tensor[tensor != 0], dense[name][tensor != 0])  # what stays is as it was
        assert all(other[1][name]["sparsity"] == found["sparsity"] for other in made.values())
    first = "model.layers.0.self_attn.q_proj.weight"  # what it sees is not yet changed by the update
    for update in ("obs", "refit"):
        assert torch.equal(made[update][0][first] == 0, made["none"][0][first] == 0)
    error = {update: found[first]["error"] for update, (_, found) in made.items()}
    if method != "kfac":  # its refit weighs the outputs by their gradients
        assert error["refit"] <= error["obs"] * 1.001
    if method in ("kfac", "admm", "sparsegpt"):  # the others measured theirs by the diagonal alone
        assert error["obs"] < error["none"]


def test_the_methods_own_update_is_the_default(base, tmp_path):
    own = {method: run([*base, "--prune_method", method], tmp_path / method)[1]["config"] for method in main_block.METHODS}
    assert {method: config["update"] for method, config in own.items()} == main_block.METHODS
    found = {method: config["allocation"] for method, config in own.items()}
    assert found == {"magnitude": "uniform", "wanda": "uniform", "sparsegpt": "uniform", "admm": "uniform",
                     "kfac": "sensitivity"}


@pytest.mark.parametrize("method", ["magnitude", "sparsegpt", "kfac"])
@pytest.mark.parametrize("sparsity", [0.2, 0.7])
def test_allocations_keep_the_total(method, sparsity, base, tmp_path):
    shares = {}
    for allocation in ("uniform", "owl", "sensitivity"):
        argv = [*base, "--prune_method", method, "--allocation", allocation, "--sparsity_ratio", sparsity]
        _, record = run(argv, tmp_path / allocation)
        shares[allocation] = [found["sparsity_asked"] for found in record["projections"]]
        assert record["metrics"]["pruned"]["sparsity"] == pytest.approx(sparsity, abs=0.002)
        assert [found["sparsity"] for found in record["projections"]] == pytest.approx(shares[allocation], abs=0.001)
    assert set(shares["uniform"]) == {sparsity}
    owl = [set(shares["owl"][7 * i : 7 * i + 7]) for i in range(3)]
    assert [len(block) for block in owl] == [1, 1, 1] and len(set.union(*owl)) > 1
    assert max(abs(share - sparsity) for share in shares["owl"]) <= curvature.LIMIT + 1e-9
    assert len(set(shares["sensitivity"])) > 5
    assert max(abs(share - sparsity) for share in shares["sensitivity"]) <= 0.2 + 1e-9


def test_the_allocation_limit(base, tmp_path):
    argv = [*base, "--prune_method", "kfac", "--allocation_limit", 0.03]
    _, record = run(argv, tmp_path)
    shares = [found["sparsity_asked"] for found in record["projections"]]
    assert max(abs(share - 0.5) for share in shares) == pytest.approx(0.03)


def test_forwards_in_bf16(kfac, undisturbed, tmp_path):
    folder, record = run([*kfac, "--precision", "bf16-mixed"], tmp_path / "a")
    assert weights(folder) == weights(run([*kfac, "--precision", "bf16-mixed"], tmp_path / "b")[0]) != weights(undisturbed)
    wanted = read_json(undisturbed / "run.json")["projections"]
    for found, exact in zip(record["projections"], wanted, strict=True):
        assert found["sparsity_asked"] == pytest.approx(exact["sparsity_asked"], abs=0.02)
        assert found["error"] == pytest.approx(exact["error"], rel=0.3)


def test_sparsity_zero_removes_nothing(base, tiny, tmp_path):
    folder, record = run([*base, "--prune_method", "magnitude", "--sparsity_ratio", 0], tmp_path)
    assert weights(folder) == (tiny / "llama" / "model.safetensors").read_bytes()
    assert record["metrics"]["pruned"]["sparsity"] == 0


def test_a_pruned_model_is_pruned_again(base, tmp_path):
    first, _ = run([*base, "--prune_method", "wanda", "--sparsity_ratio", 0.3], tmp_path / "first")
    second, record = run([*base, "--model", first / "model", "--prune_method", "sparsegpt"], tmp_path / "second")
    stages = checkpoint.compression_stages(second / "model")
    assert [stage["asked"]["prune_method"] for stage in stages] == ["wanda", "sparsegpt"]
    assert record["metrics"]["pruned"]["sparsity"] == pytest.approx(0.5, abs=0.002)


# ----------------------------------------------------------------------------------------------------------- the same again


@pytest.fixture(scope="module")
def kfac(base):
    return [*base, "--prune_method", "kfac", *PATTERNS["block"]]


@pytest.fixture(scope="module")
def undisturbed(kfac, tmp_path_factory):
    """The run that the killed ones are compared with."""
    return run(kfac, tmp_path_factory.mktemp("undisturbed"))[0]


def test_only_the_seed_makes_a_difference(kfac, undisturbed, tmp_path):
    assert weights(run(kfac, tmp_path / "again")[0]) == weights(undisturbed)
    assert weights(run([*kfac, "--seed", 1], tmp_path / "seed")[0]) != weights(undisturbed)


@pytest.mark.parametrize("allocation", ["sensitivity", "owl"])
def test_activations_on_disk_change_nothing(allocation, kfac, undisturbed, tmp_path, monkeypatch):
    argv = [*kfac, "--allocation", allocation]
    memory = undisturbed if allocation == "sensitivity" else run(argv, tmp_path / "memory")[0]
    made, init = [], streaming.Activations.__init__

    def note(self, directory=None):
        made.append(directory)
        init(self, directory)

    monkeypatch.setattr(streaming.Activations, "__init__", note)
    folder, _ = run([*argv, "--offload_activations"], tmp_path / "disk")
    assert weights(folder) == weights(memory)
    assert len(made) >= 6 and None not in made
    assert sorted(path.name for path in folder.iterdir()) == ["model", "run.json"]


def test_save_is_where_it_says(kfac, undisturbed, tmp_path, capsys):
    target = tmp_path / "deep" / "pruned_model"
    argv = [*kfac, "--save", target, "--out_dir", tmp_path / "out"]
    main_block.main(argv)
    folder = only_run(tmp_path / "out")
    assert (target / "model.safetensors").read_bytes() == weights(undisturbed) and not (folder / "model").exists()
    assert read_json(folder / "run.json")["model_dir"] == str(target) and f"model   {target}" in capsys.readouterr().out
    # finished: nothing is done again, unless the model is not there any more, or is that of another run
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(main_block, "prune_", lambda *_: pytest.fail("pruned again"))
        main_block.main(argv)
        assert "finished before" in capsys.readouterr().out
    main_block.main([*kfac, "--seed", 1, "--save", target, "--out_dir", tmp_path / "out"])
    assert (target / "model.safetensors").read_bytes() != weights(undisturbed)
    main_block.main(argv)
    assert (target / "model.safetensors").read_bytes() == weights(undisturbed)
    shutil.rmtree(target)
    main_block.main(argv)
    assert (target / "model.safetensors").read_bytes() == weights(undisturbed)
    assert read_json(folder / "run.json")["status"] == "finished"


def test_a_dry_run_loads_nothing_and_writes_nothing(kfac, tmp_path, monkeypatch, capsys):
    for owner, name in ((streaming.StreamedLM, "read"), (checkpoint, "load_causal_lm")):
        monkeypatch.setattr(owner, name, lambda *_: pytest.fail("something was loaded"))
    main_block.main([*kfac, "--dry-run", "--eval", "--out_dir", tmp_path / "out", "--save", tmp_path / "model"])
    plan = capsys.readouterr().out
    assert "3 blocks with 0.0 M weights" in plan and "kfac, block 16x16, sparsity 0.5, sensitivity, update refit" in plan
    assert re.search(r"text-\w{8}: 10 x 40 of \d,\d{3} tokens", plan)
    main_block.main([*kfac[: kfac.index("--prune_method")], "--dry_run", "--eval"])
    assert "Sequence length:" in capsys.readouterr().out
    assert not list(tmp_path.iterdir())


# ------------------------------------------------------------------------------------------------------ killed, and again


MOMENTS = {  # name -> how to die, blocks that are done by then
    "in the sweep": (lambda: die_at(curvature, "save_tensors", 2), 0),
    "after the sweep": (lambda: die_at(curvature, "sensitivity_allocation", 1, after=True), 0),
    "in block 1": (lambda: die_at(main_block, "prune_weight", 4), 0),
    "block 1 half kept": (lambda: die_at(streaming, "save_tensors", 1), 0),
    "after block 1": (lambda: die_at(streaming, "save_tensors", 1, after=True), 1),
    "in block 3": (lambda: die_at(main_block, "prune_weight", 17), 2),
    "while writing": (lambda: die_at(streaming, "save_tensors", 4, after=True), 3),
    "written, not measured": (lambda: die_at(streaming, "measured_sparsity", 1), 3),
    "finished, not marked so": (lambda: die_at(checkpoint, "drop", 1), None),
    "blocks removed, not marked so": (lambda: die_at(checkpoint, "drop", 1, after=True), None),
    "evaluating": (lambda: die_at(eval_utils, "evaluate_perplexity", 1), None),
}


def run_and_die(moment, argv):
    """In a process of its own."""
    torch.set_num_threads(1)
    MOMENTS[moment][0]()
    main_block.main(argv)


@pytest.fixture(scope="module")
def killed():
    """Runs the script until a moment at which it kills itself."""
    context = multiprocessing.get_context("forkserver")  # one process imports, and every killed one is its fork
    context.set_forkserver_preload([__name__, "transformers.models.llama.modeling_llama", "pandas", "pyarrow.parquet"])

    def kill(moment, argv):
        process = context.Process(target=run_and_die, args=(moment, [str(word) for word in argv]))
        process.start()
        process.join(120)
        assert process.exitcode == -signal.SIGKILL, moment

    return kill


@pytest.mark.parametrize("moment", MOMENTS)
def test_a_killed_run_ends_as_if_it_had_not_been(moment, kfac, killed, undisturbed, tmp_path, monkeypatch):
    argv = [*kfac, *(["--eval"] if moment == "evaluating" else [])]
    killed(moment, [*argv, "--out_dir", tmp_path])
    calls, prune_weight = [], main_block.prune_weight

    def count(*args):
        calls.append(1)
        return prune_weight(*args)

    monkeypatch.setattr(main_block, "prune_weight", count)
    folder, record = run(argv, tmp_path)
    done = MOMENTS[moment][1]
    assert len(calls) == (0 if done is None else 7 * (3 - done))
    assert weights(folder) == weights(undisturbed)
    assert record["status"] == "finished" and record["projections"] == read_json(undisturbed / "run.json")["projections"]
    assert sorted(path.name for path in folder.iterdir()) == ["model", "run.json"]


def interrupt(patch, k, times=1):
    calls, prune_weight = [], main_block.prune_weight

    def call(*args):
        calls.append(1)
        for _ in range(times if len(calls) == k else 0):
            os.kill(os.getpid(), signal.SIGINT)
        return prune_weight(*args)

    patch.setattr(main_block, "prune_weight", call)


def interrupted(argv, k=3, times=1):
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(runs, "REPEATED", 0.0)
        interrupt(patch, k, times)
        return as_program(argv)


def test_ctrl_c_says_how_to_go_on(kfac, undisturbed, tmp_path, capsys):
    argv = [*kfac, "--out_dir", tmp_path]
    before = signal.getsignal(signal.SIGINT)
    assert interrupted(argv) == 130
    folder = only_run(tmp_path)
    assert capsys.readouterr().err.splitlines()[-1] == f"interrupted. The same command goes on at block 2 of 3 ({folder})"
    assert read_json(folder / "run.json")["status"] == "interrupted" and not (folder / "model").exists()
    assert signal.getsignal(signal.SIGINT) is before
    assert interrupted(argv, k=2, times=2) == 130  # the second one stops at once
    assert len(list((folder / "blocks").glob("*.safetensors"))) == 1
    assert interrupted(argv, k=14) == 0  # in the last block there is nothing to go on with
    assert weights(folder) == weights(undisturbed)


def test_ctrl_c_in_the_sweep(kfac, undisturbed, tmp_path, monkeypatch, capsys):
    argv = [*kfac, "--out_dir", tmp_path]

    def stop(*_):
        os.kill(os.getpid(), signal.SIGINT)

    before = signal.signal(signal.SIGINT, signal.default_int_handler)  # ignored, where the tests run in a shell's background
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(curvature, "score_quantiles", stop)
        assert as_program(argv) == 130
    signal.signal(signal.SIGINT, before)
    shown = capsys.readouterr().err.splitlines()[-1]
    assert shown == f"interrupted. The same command starts again: no block was pruned yet ({only_run(tmp_path)})"
    assert read_json(only_run(tmp_path) / "run.json")["status"] == "interrupted"
    assert weights(run(kfac, tmp_path)[0]) == weights(undisturbed)


def test_a_changed_configuration_is_another_run(kfac, undisturbed, tmp_path, capsys):
    named = [*kfac, "--run_name", "mine", "--out_dir", tmp_path]
    assert interrupted(named) == 130
    folder = only_run(tmp_path)
    assert folder.name == "mine"
    assert as_program([*named, "--nsamples", 12]) == 2
    shown = capsys.readouterr().err.splitlines()[-1]
    assert "nsamples 10 -> 12" in shown and "--resume never" in shown
    assert as_program([*named, "--nsamples", 12, "--resume", "never"]) == 0
    assert read_json(folder / "run.json")["config"]["nsamples"] == 12
    aside = folder.with_name("mine.old-1")
    assert (aside / "blocks" / "block-0.safetensors").exists() and weights(folder) != weights(undisturbed)
    assert as_program([*named, "--resume", "never"]) == 0
    assert weights(folder) == weights(undisturbed) and (folder.with_name("mine.old-2") / "model").exists()


def test_a_damaged_block_says_what_helps(kfac, tmp_path, capsys):
    argv = [*kfac, "--out_dir", tmp_path]
    assert interrupted(argv) == 130
    cut(only_run(tmp_path) / "blocks" / "block-0.safetensors")
    assert as_program(argv) == 2
    assert re.search(r"error: .*block-0.safetensors: not readable .* Use --resume never", capsys.readouterr().err)
    assert as_program([*argv, "--resume", "never"]) == 0


# --------------------------------------------------------------------------------------------------------------- evaluated


def shown_perplexities(out):
    return [float(found) for found in re.findall(r"Perplexity: ([\d.]+)", out)]


def perplexity(directory, tiny, split="test", joiner="eos", **how):
    model = checkpoint.load_causal_lm(directory, torch.float32)
    source = text.prepare_text(str(tiny / "text.txt"), tiny / "data")
    stream = text.token_stream(source.path, split, AutoTokenizer.from_pretrained(directory), joiner)
    return eval_utils.evaluate_perplexity(model, stream, **how), stream


@pytest.mark.parametrize(("flags", "how"), [
    ([], {"token_length": 64}),
    (["--token_length", 32], {"token_length": 32}),
    (["--token_length", 32, "--stride", 8], {"token_length": 32, "stride": 8}),
    (["--ppl_protocol", "wanda"], {"token_length": 64, "protocol": "wanda", "joiner": "blank"}),
])  # fmt: skip
def test_any_directory_is_evaluated(flags, how, base, tiny, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    main_block.main([*base, "--eval", *flags])
    out = capsys.readouterr().out
    wanted, stream = perplexity(tiny / "llama", tiny, **how)
    assert shown_perplexities(out) == [round(wanted["perplexity"], 2)]
    assert f"Sequence length: {len(stream)}" in out and f"({wanted['n_tokens']:,} tokens in windows of" in out
    assert not list(tmp_path.iterdir())  # no run is made of it


def test_a_pruned_model_is_evaluated_beside_the_dense_one(base, tiny, tmp_path, capsys):
    folder, record = run([*base, "--prune_method", "sparsegpt", "--eval", "--token_length", 48], tmp_path)
    wanted = {name: perplexity(path, tiny, token_length=48)[0] for name, path in (("dense", tiny / "llama"),
                                                                                 ("pruned", folder / "model"))}  # fmt: skip
    out = capsys.readouterr().out
    assert shown_perplexities(out) == [round(wanted[name]["perplexity"], 2) for name in ("dense", "pruned")]
    assert wanted["dense"]["perplexity"] != wanted["pruned"]["perplexity"]
    for name, found in wanted.items():
        assert record["metrics"][name]["perplexity"] == pytest.approx(found["perplexity"], rel=1e-6)
        assert record["metrics"][name]["n_tokens"] == found["n_tokens"]
    assert record["evaluation"]["token_length"] == 48 and record["evaluation"]["protocol"] == "tokens"
    main_block.main([*base, "--model", folder / "model", "--eval", "--token_length", 48])
    assert shown_perplexities(capsys.readouterr().out) == [round(wanted["pruned"]["perplexity"], 2)]


def test_as_a_program(kfac, undisturbed, tiny, tmp_path):
    words = [sys.executable, REPOSITORY / "main_block.py", *kfac, "--save", "pruned", "--eval"]
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    done = subprocess.run([str(word) for word in words], cwd=tmp_path, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert (tmp_path / "pruned" / "model.safetensors").read_bytes() == weights(undisturbed)
    found = [perplexity(path, tiny, token_length=64)[0]["perplexity"] for path in (tiny / "llama", tmp_path / "pruned")]
    assert shown_perplexities(done.stdout) == [round(value, 2) for value in found]
    record = only_run(tmp_path / "out").relative_to(tmp_path) / "run.json"
    assert done.stdout.splitlines()[-2:] == ["model   pruned", f"record  {record}"]
    assert re.search(r"^block 2/3  sparsity 0.\d{4}  error 0.\d{4}  ", done.stdout, re.MULTILINE)


# ----------------------------------------------------------------------------------------------------------------- refused


def broken(folder, what):
    if what == "no model":
        folder.mkdir()
        return folder
    save_model(folder)
    if what in ("bert", "gpt2", "mixtral", "qwen2_moe"):
        edit_config(folder, model_type=what, architectures=["BertForMaskedLM" if what == "bert" else "XForCausalLM"])
    elif what == "damaged":
        cut(folder / "model.safetensors")
    elif what == "a tensor missing":
        rename(folder, lambda name: None if name == "model.norm.weight" else name)
    else:
        for path in folder.glob("tokenizer*"):
            path.unlink()
    return folder


REFUSED = [
    (["--prune_method", "wanda", "--sparsity_ratio", 1], "--sparsity_ratio 1.0"),
    (["--prune_method", "wanda", "--sparsity_ratio", -0.1], "--sparsity_ratio -0.1"),
    (["--prune_method", "wanda", "--sparsity_ratio", "nan"], "--sparsity_ratio nan"),
    (["--prune_method", "wanda", "--sparsity_type", "block", "--block_size", 32], "is 48 x 32, which it does not divide"),
    (["--prune_method", "wanda", "--sparsity_type", "block", "--block_size", "0"], "--block_size 0"),
    (["--prune_method", "wanda", "--sparsity_type", "4:2"], "expected 0 < N < M"),
    (["--prune_method", "wanda", "--sparsity_type", "2:5"], "which 5 does not divide"),
    (["--prune_method", "wanda", "--sparsity_type", "half"], "--sparsity_type half"),
    (["--prune_method", "nothing"], "invalid choice: 'nothing'"),
    (["--prune_method", "wanda", "--sparsity_type", "2:4", "--allocation", "owl"], "--allocation owl"),
    (["--prune_method", "kfac", "--sparsity_type", "2:4", "--allocation", "sensitivity"], "--allocation sensitivity"),
    (["--prune_method", "wanda", "--seqlen", 65], "--seqlen 65: this llama model has 64 positions"),
    (["--prune_method", "wanda", "--seqlen", 1], "--seqlen 1"),
    (["--prune_method", "wanda", "--nsamples", 0], "--nsamples 0"),
    (["--prune_method", "wanda", "--calibration", "SHORT"], "too little calibration text"),
    (["--prune_method", "wanda", "--calibration", "nothing.txt"], "nothing.txt"),
    (["--prune_method", "wanda", "--save", "FILE"], "holds no compressed model"),
    (["--prune_method", "wanda", "--save", "FILE/model"], "cannot be written"),
    (["--prune_method", "wanda", "--save", "/proc/pruned"], "cannot be written"),
    (["--prune_method", "wanda", "--save", "MODEL"], "would replace the model that it is made of"),
    (["--prune_method", "wanda", "--save", "MODEL/.."], "would replace the model that it is made of"),
    (["--prune_method", "wanda", "--save", "FULL"], "holds no compressed model"),
    (["--prune_method", "wanda", "--save", "DENSE"], "holds no compressed model"),
    (["--prune_method", "wanda", "--eval", "--token_length", 65], "--token_length 65"),
    (["--prune_method", "wanda", "--eval", "--stride", 65], "--stride 65"),
    (["--prune_method", "wanda", "--eval", "--eval_text", "nothing.txt"], "nothing.txt"),
    (["--prune_method", "wanda", "--device", "cuda:99"], "--device cuda:99"),
    (["--prune_method", "wanda", "--run_name", "a/b"], "--run_name a/b"),
    ([], "nothing to do"),
    (["--save", "x", "--eval"], "nothing is pruned"),
    (["--eval", "--model", "bert"], "needs a causal language model"),
    (["--eval", "--model", "gpt2"], "'gpt2' is not supported"),
    (["--eval", "--model", "no tokenizer"], "no tokenizer"),
    (["--eval", "--token_length", 1], "--token_length 1"),
    (["--prune_method", "wanda", "--model", "/nowhere/at/all"], "no such directory"),
    *((["--prune_method", "wanda", "--model", what], message) for what, message in [
        ("no model", "so not a whole model"), ("bert", "BertForMaskedLM"), ("gpt2", "'gpt2' is not supported"),
        ("mixtral", "'mixtral' is not supported"), ("qwen2_moe", "'qwen2_moe' is not supported"), ("damaged", "not readable"),
        ("a tensor missing", "no tensor model.norm.weight"), ("no tokenizer", "no tokenizer")]),
]  # fmt: skip


@pytest.mark.parametrize(("flags", "message"), REFUSED, ids=lambda value: " ".join(map(str, value)).replace("/", "_")
                         if isinstance(value, list) else "")  # fmt: skip
def test_what_is_refused_is_refused_before_anything_is_read(flags, message, base, tiny, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "short.txt").write_text("\n\n".join(WORDS))
    (tmp_path / "file").write_text("a file")
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "thesis.tex").write_text("not to be lost")
    (tmp_path / "dense").mkdir()
    (tmp_path / "dense" / "config.json").write_text("{}")
    places = {"DENSE": tmp_path / "dense",
              "SHORT": tmp_path / "short.txt", "FILE": tmp_path / "file", "FILE/model": tmp_path / "file" / "model",
              "MODEL": tiny / "llama", "MODEL/..": tiny / "llama" / "..", "FULL": tmp_path / "full"}  # fmt: skip
    flags = [places.get(flag, flag) if isinstance(flag, str) else flag for flag in flags]
    if "--model" in flags and not str(flags[-1]).startswith("/"):
        flags[-1] = broken(tmp_path / "model", flags[-1])
    before = sorted(tmp_path.rglob("*"))
    for owner, name in ((streaming.StreamedLM, "read"), (checkpoint, "load_causal_lm")):
        monkeypatch.setattr(owner, name, lambda *_, **__: pytest.fail("something was loaded"))
    assert as_program([*base, *flags]) == 2
    printed = capsys.readouterr().err
    assert printed.startswith("error: ") and message in printed and printed.count("\n") <= 2, printed
    assert sorted(tmp_path.rglob("*")) == before


def test_a_run_that_is_there_and_cannot_be_written(kfac, tmp_path, capsys):
    (tmp_path / "one_shot").write_text("in the way")
    assert as_program([*kfac, "--out_dir", tmp_path]) == 2
    assert "a file is in the way" in capsys.readouterr().err


def test_pieces_that_overlap_are_told(base, tmp_path, capsys):
    run([*base, "--prune_method", "magnitude", "--nsamples", 400], tmp_path)
    assert "warning: 400 x 40 tokens are drawn from" in capsys.readouterr().out


# -------------------------------------------------------------------------------------------------------------- the script


def test_every_flag_is_read(capsys):
    with pytest.raises(SystemExit) as stop:
        main_block.main(["--help"])
    assert stop.value.code == 0
    flags = set(re.findall(r"^  --(\w+)", capsys.readouterr().out, re.MULTILINE))
    assert len(flags) > 25 and {row[0] for row in main_block.PRESETS} < flags
    code = (REPOSITORY / "main_block.py").read_text() + (REPOSITORY / "common" / "runs.py").read_text()
    assert not flags - set(re.findall(r"\b(?:args|a)\.(\w+)", code))


def test_the_fast_column_is_the_fast_one(base, tmp_path):
    argv = [word for word in base if word not in ("--fisher_samples", 6)]
    _, record = run([*argv, "--prune_method", "magnitude", "--fast"], tmp_path)
    assert record["config"]["fisher_samples"] == 16 and record["config"]["nsamples"] == 10


def test_importing_has_no_side_effect(tmp_path):
    done = subprocess.run([sys.executable, "-c", "import main_block"], cwd=tmp_path, capture_output=True, text=True,
                          env=os.environ | {"PYTHONPATH": str(REPOSITORY)})  # fmt: skip
    assert (done.returncode, done.stdout, done.stderr) == (0, "", "") and not list(tmp_path.iterdir())


# -------------------------------------------------------------------------------------------------------------- in the report


def test_the_report_measures_it_as_it_was_recorded(base, tiny, tmp_path, capsys):
    folder, record = run([*base, "--prune_method", "wanda", "--eval", "--token_length", 48], tmp_path / "out")
    seven = load_script(REPOSITORY / "7_evaluate_and_generate_report.py")
    argv = ["--out_dir", tmp_path / "out", "--data_dir", tiny / "data", "--report_dir", tmp_path / "report", "--device", "cpu",
            "--latency_seconds", 0, "--latency_batch", 2, "--latency_length", 16]  # fmt: skip
    seven.main(argv)
    with open(tmp_path / "report" / "summary.csv", newline="") as file:
        (row,) = csv.DictReader(file)
    assert float(row["perplexity"]) == pytest.approx(record["metrics"]["pruned"]["perplexity"], rel=1e-6)
    assert int(row["n"]) == record["metrics"]["pruned"]["n_tokens"] and not row["differences"] and not row["accuracy"]
    page = (tmp_path / "report" / "index.html").read_text(encoding="utf-8")
    assert "Perplexity against megabytes on disk" in page and "Accuracy against" not in page
    assert "Share of zeros" in page and "down_proj" in page and ">0.50</text>" in page  # half of every projection is gone
    record["metrics"]["pruned"]["perplexity"] *= 1.01
    runs.write_atomic(folder / "run.json", json.dumps(record))
    capsys.readouterr()
    seven.main(argv)
    assert "differs: one_shot/" in capsys.readouterr().out
    seven.main([*argv, "--fast"])
    with open(tmp_path / "report" / "summary.csv", newline="") as file:
        (part,) = csv.DictReader(file)
    assert int(part["n"]) < int(row["n"]) and not part["differences"]
