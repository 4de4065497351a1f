"""The benchmarks run, at a size at which their numbers mean nothing, and their records say what they should."""

import importlib.util
import json
import random
import re
import types

import numpy as np
import pytest
import torch
import transformers

from common.runs import REPOSITORY, UserError

WORDS = [f"w{i}" for i in range(50)]


@pytest.fixture(scope="module")
def overhead():
    spec = importlib.util.spec_from_file_location("pruning_overhead", REPOSITORY / "benchmarks" / "pruning_overhead.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture(scope="module")
def flags(tmp_path_factory):
    """A random BERT and 300 labelled texts."""
    folder = tmp_path_factory.mktemp("tiny")
    (folder / "vocab.txt").write_text("\n".join(["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", *WORDS]) + "\n")
    transformers.BertTokenizerFast(str(folder / "vocab.txt")).save_pretrained(folder / "model")
    torch.manual_seed(0)
    config = transformers.BertConfig(vocab_size=55, hidden_size=32, num_hidden_layers=2, num_attention_heads=4,
                                     intermediate_size=64, max_position_embeddings=128)  # fmt: skip
    transformers.BertModel(config).save_pretrained(folder / "model")
    draw = random.Random(0)
    lines = [f"{' '.join(draw.choices(WORDS, k=draw.randint(2, 12)))} {i},{i % 2}" for i in range(300)]
    (folder / "texts.csv").write_text("\n".join(["text,label", *lines]), encoding="utf-8")
    return ["--task", folder / "texts.csv", "--model", folder / "model", "--data_dir", folder / "data", "--device", "cpu"]


def test_pruning_overhead(overhead, flags, tmp_path, capsys):
    overhead.main([*flags, "--fast", "--n_blocks", 1, "--n_batches", 1, "--n_examples", 24, "--results", tmp_path])
    record = json.loads((tmp_path / "pruning_overhead.json").read_text(encoding="utf-8"))
    assert set(record) == {"command", "environment", "settings", "assets", "measures", "presets", "seconds"}
    assert record["settings"] == {"n_blocks": 1, "n_batches": 1, "n_examples": 24, "seed": 0}
    rows = {row["measure"]: row for row in record["measures"]}
    assert len(rows) == len(record["measures"])
    for row in rows.values():
        reached = {None: None, "most": row["value"] <= (row["target"] or 0), "least": row["value"] >= (row["target"] or 0)}
        assert row["met"] is reached[row["at"]]
    targets = {name: row["target"] for name, row in rows.items() if row["target"]}
    assert targets["fast: scoring, selecting, masking, fisher"] == 0.03
    assert targets["full: scoring, selecting, masking, l2+kd_gradient"] == targets["training: fast / full"] == 0.10
    assert targets["fine-tuning: script / Trainer"] == 1.5

    for preset in ("fast", "full"):
        side = record["presets"][preset]
        assert side["steps_of_pruning"] <= side["settings"]["gradient_window"]  # so that here no step is outside of it
        seconds = {name: times["median"] for name, times in side["seconds"].items()}
        own, plain = side["settings"]["importance"], seconds["step, plain"]
        value = rows[f"{preset}: scoring, selecting, masking, {own}"]["value"]
        n_prunings = 1  # with the last step, which comes before `prune_every` here
        masking = seconds[f"pruning, {own}"] * n_prunings / (side["steps_of_pruning"] * plain)
        steps, every = side["steps_of_pruning"], side["settings"]["score_every"]
        scored = len(range(steps, 0, -every)) / steps  # of the steps, counted back from the one that prunes
        assert value == pytest.approx(scored * (seconds[f"step, {own}"] / plain - 1) + masking)
        assert rows[f"{preset}: a step scored by {own}"]["value"] == pytest.approx(seconds[f"step, {own}"] / plain)
        assert side["seconds"][f"pruning with refitting, {own}"]["n"] == side["seconds"]["step, plain"]["n"] == 1
        assert 0 <= rows[f"{preset}: padding"]["value"] < 1

    shown = (tmp_path / "pruning_overhead.md").read_text(encoding="utf-8")
    assert shown.count("| missed |") == sum(row["met"] is False for row in rows.values())
    printed = capsys.readouterr().out
    assert all(name in shown and name in printed for name in rows)


@pytest.mark.parametrize(
    ("values", "target", "at", "met"),
    [(0.03, 0.03, "most", True), (0.031, 0.03, "most", False), ([1.0, 1.5, 9.0], 1.5, "least", True),
     ([1.0, 1.4, 9.0], 1.5, "least", False), (7.0, None, "most", None)],
)  # fmt: skip
def test_met_follows_from_value_and_target(overhead, values, target, at, met):
    row = overhead.measure("x", values, "x", target, at)
    assert row["met"] is met
    assert overhead.lines_of([row])[1][-1] == {True: "yes", False: "missed", None: None}[met]


def qat_row(case, seed, qat, onnx=None):
    dense = {"accuracy": 0.90, "bytes": 90.0, "latency_ms": 200.0, "single_latency_ms": 12.0, "n": 872}
    metrics = {"dense": dense, "ptq": {"accuracy": 0.80}, "qat": {"accuracy": qat, "bytes": 9.0, "bits_per_weight": 4.4}}
    if "pruned" in case:
        metrics["pruned"] = {"accuracy": 0.899}
    if onnx:
        metrics["onnx"] = {"accuracy": qat, "latency_ms": onnx, "single_latency_ms": 3.0}
    return {"case": case, "seed": seed, "metrics": metrics, "environment": {"threads": 2, "cpu": "X"}}


def test_the_tables_of_qat_accuracy_judge_by_the_means():
    spec = importlib.util.spec_from_file_location("qat_accuracy", REPOSITORY / "benchmarks" / "qat_accuracy.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    rows = [qat_row("W4", 0, 0.8960), qat_row("W4", 1, 0.9000), qat_row("W3", 0, 0.8920), qat_row("W2 minmax", 0, 0.5),
            qat_row("W4 pruned", 0, 0.8960, onnx=80.0)]  # fmt: skip
    lines = {cells[0]: cells[1:] for line in module.tables(rows).splitlines() if line.startswith("|")
             for cells in [[cell.strip() for cell in line.strip("|").split("|")]]}  # fmt: skip
    assert lines["W4"][0] == "2" and lines["W4"][5] == "-0.20" and lines["W4"][-1] == "yes"  # as much as is allowed
    assert lines["W3"][5] == "-0.80" and lines["W3"][-1] == "no" and lines["W2 minmax"][-1] == ""
    assert lines["W4 pruned"][5] == "-0.40" and lines["W4 pruned"][7] == "-0.30" and lines["W4 pruned"][-1] == "no"
    assert lines["bytes of the directory"] == ["1/10.00", "1/9", "yes"]
    assert lines["speed of the ONNX file, 32 x 64 tokens"] == ["2.50x", "3x", "no"]
    assert lines["speed of the ONNX file, 1 x 64 tokens"] == ["4.00x", "3x", "yes"]


def test_perplexity(tmp_path, monkeypatch, capsys):
    monkeypatch.syspath_prepend(REPOSITORY / "benchmarks")  # so that the processes which measure memory find it
    module = importlib.import_module("perplexity")
    tokens = np.random.default_rng(0).integers(0, 12_000, 1600)
    np.save(tmp_path / "tokens.npy", tokens)
    small = ["--hidden_size", 64, "--n_layers", 1, "--token_length", 1024, "--vocab_size", 12_000, "--n_windows", 1]
    module.main([*small, "--n_repeats", 3, "--device", "cpu", "--tokens", tmp_path / "tokens.npy", "--results", tmp_path])
    record = json.loads((tmp_path / "perplexity.json").read_text(encoding="utf-8"))
    assert record["settings"]["n_tokens"] == 1024 + 512 and record["settings"]["tokens"].endswith("tokens.npy")
    plain, ours = record["perplexity"].values()
    assert ours == pytest.approx(plain, rel=1e-5)
    assert [len(values) for values in record["tokens_per_second"].values()] == [3, 3]
    plain, ours = record["tokens_per_second"].values()
    ratios = sorted(own / other for own, other in zip(ours, plain, strict=True))
    assert record["speed_ratio"]["median"] == pytest.approx(ratios[1])
    plain, ours = record["added_memory"].values()
    assert plain > 1024 * 12_000 * 4 and record["memory_ratio"] == ours / plain < 0.9  # all logits of a window at once
    shown = (tmp_path / "perplexity.md").read_text(encoding="utf-8")
    assert f"{record['memory_ratio']:.2f}x" in shown and shown.split("|")[0] in capsys.readouterr().out
    with pytest.raises(UserError, match="expected a multiple of 64"):
        module.main(["--hidden_size", 100])


def test_perplexity_of_the_sides_must_agree(tmp_path, monkeypatch):
    monkeypatch.syspath_prepend(REPOSITORY / "benchmarks")
    module = importlib.import_module("perplexity")
    monkeypatch.setattr(module, "added_memory", lambda *_: 1)
    monkeypatch.setitem(module.SIDES, module.OURS, lambda *arguments: module.plain_loop(*arguments) * 1.0001)
    small = ["--hidden_size", 64, "--n_layers", 1, "--token_length", 16, "--vocab_size", 99, "--n_windows", 1, "--n_repeats", 1]
    with pytest.raises(AssertionError, match=r"perplexity .* by evaluate_perplexity"):
        module.main([*small, "--device", "cpu", "--results", tmp_path])
    assert not list(tmp_path.iterdir())


def test_streaming_memory(tmp_path, monkeypatch, capsys):
    monkeypatch.syspath_prepend(REPOSITORY / "benchmarks")
    module = importlib.import_module("streaming_memory")
    flags = ["--fast", "--layers", 3, "--nsamples", 4, "--device", "cpu", "--out_dir", tmp_path / "out", "--results", tmp_path]
    module.main([*flags, "--dtype", "bfloat16"])
    record = json.loads((tmp_path / "streaming_memory.json").read_text(encoding="utf-8"))
    (run,) = record["runs"].values()
    assert run["sparsity"] == 0.5 and "--prune_method wanda --sparsity_type 2:4 --nsamples 4 --seqlen 32" in run["command"]
    assert run["peak"] > record["imports"] > 50 * 2**20 and record["tiny_model"] > record["imports"]
    assert run["share"] == run["peak"] / record["model_bytes"] and run["met"] is False  # of such a model Python is all
    shown = (tmp_path / "streaming_memory.md").read_text(encoding="utf-8")
    assert f" {run['share']:.3f} " in shown and "  no |" in shown and "wanda" in capsys.readouterr().out

    work = tmp_path / "out" / "streaming_memory"
    (folder,) = [path for path in work.glob("llama-*/") if len(list(path.glob("model-*"))) == 4]  # three blocks and the rest
    model = transformers.AutoModelForCausalLM.from_pretrained(folder)
    assert model.dtype == torch.bfloat16 and sum(p.numel() for p in model.parameters()) == record["parameters"]
    assert sum(p.numel() * 2 for p in model.parameters()) == record["model_bytes"]
    assert not list(work.glob("llama-*-wanda")) and not list((work / "runs" / "one_shot").glob("*/"))
    before = folder.stat().st_mtime_ns, [path.stat().st_mtime_ns for path in sorted(folder.iterdir())]
    assert module.random_model(work, record["settings"]) == folder  # kept for the next time
    assert before == (folder.stat().st_mtime_ns, [path.stat().st_mtime_ns for path in sorted(folder.iterdir())])


def test_streaming_memory_that_cannot_be_measured(tmp_path, monkeypatch):
    monkeypatch.syspath_prepend(REPOSITORY / "benchmarks")
    module = importlib.import_module("streaming_memory")
    flags = ["--fast", "--device", "cpu", "--out_dir", tmp_path, "--results", tmp_path]
    with pytest.raises(UserError, match="--kv_heads 3: expected the one to divide"):
        module.main([*flags, "--kv_heads", 3])
    with monkeypatch.context() as patch:
        patch.setattr(module.shutil, "disk_usage", lambda _: type("Usage", (), {"free": 10**6}))
        with pytest.raises(UserError, match=r"GB are free, expected .* Use another --out_dir"):
            module.main(flags)
    with pytest.raises(UserError, match="exit status 1: ZeroDivisionError: division by zero"):
        module.peak_of([module.sys.executable, "-c", "1 / 0"], tmp_path / "log")
    grown = module.peak_of([module.sys.executable, "-c", "x = bytearray(200 * 2**20); print(len(x))"], tmp_path / "log")[0]
    assert 200 * 2**20 < grown < 300 * 2**20


def test_one_shot(tmp_path, monkeypatch, capsys):
    from tests import test_main_block

    monkeypatch.syspath_prepend(REPOSITORY / "benchmarks")
    module = importlib.import_module("one_shot")
    monkeypatch.setattr(module, "RESULTS", tmp_path / "results" / "one_shot")
    test_main_block.save_model(tmp_path / "llama")
    (tmp_path / "text.txt").write_text("\n\n".join(test_main_block.sentences(300)))
    flags = ["--model", tmp_path / "llama", "--text", tmp_path / "text.txt", "--data_dir", tmp_path / "data", "--out_dir",
             tmp_path / "out", "--nsamples", 8, "--seqlen", 32, "--cases", "2:4", "unstructured, 80 %"]  # fmt: skip
    module.main([*flags, "--seeds", 0, 1])
    record = json.loads((tmp_path / "results" / "one_shot.json").read_text(encoding="utf-8"))
    assert record["calibration"] == "8 x 32"
    counts = {method: sum(row["method"] == method for row in record["runs"]) for method in module.METHODS}
    assert counts == {"magnitude": 2, "wanda": 4, "sparsegpt": 4, "admm": 2, "kfac": 4}
    for row in record["runs"]:
        assert row["excess"] == pytest.approx(np.log(row["perplexity"] / row["dense_perplexity"]))
        assert row["sparsity"] == pytest.approx(0.5 if row["case"] == "2:4" else 0.8, abs=0.01)
        assert row["seconds"] > row["seconds_beyond_forwards"] and str(tmp_path) not in row["command"]
    shown = (tmp_path / "results" / "one_shot.md").read_text(encoding="utf-8")
    assert shown.strip() in capsys.readouterr().out

    def excess(method):
        return np.mean([row["excess"] for row in record["runs"] if (row["case"], row["method"]) == ("2:4", method)])

    share = excess("kfac") / excess("sparsegpt")
    cells = [[cell.strip() for cell in line.split("|")[1:-1]] for line in shown.splitlines()]
    (line,) = (row for row in cells if row[:2] == ["2:4", "kfac"])
    assert line[4:] == ["sparsegpt", f"{share:.2f}", "0.8", "yes" if share <= 0.8 else "no"]


def test_sparse_trainer(tmp_path, monkeypatch, capsys):
    module = load("sparse_trainer")
    monkeypatch.setattr(module, "RESULTS", tmp_path / "sparse_trainer")
    monkeypatch.setattr(module, "LARGE", module.LARGE | {"hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 2,
                                                         "num_attention_heads": 4, "vocab_size": 200})  # fmt: skip
    monkeypatch.setattr(module, "peak_memory", lambda kind, *rest: {"SparseTrainer": 106, "Trainer": 100}.get(kind, 100))
    cases = [case for case, (size, _) in module.CASES.items() if size == "large"]
    module.main(["--fast", "--block_size", 32, "--device", "cpu", "--cases", *cases])
    record = json.loads((tmp_path / "sparse_trainer.json").read_text(encoding="utf-8"))
    blocks, single = record["cases"]
    assert {kind: len(times) for kind, times in blocks["seconds"].items()} == dict.fromkeys(module.TRAINERS, 4)
    assert blocks["sparsity"] == pytest.approx(0.2, abs=0.05) and single["sparsity"] == pytest.approx(0.5, abs=0.02)
    assert blocks["sparsity_plain"] < 0.01 and single["sparsity_plain"] < 0.01  # the plain trainer fills them up
    assert single["weight_bytes"] == 16 * single["mask_bytes"] and blocks["mask_bytes"] < single["mask_bytes"] / 16
    shown = (tmp_path / "sparse_trainer.md").read_text(encoding="utf-8")
    assert shown.strip() in capsys.readouterr().out
    assert all(re.search(r"1\.060x \|\s+1\.05x \|\s+no \|", line) for line in shown.splitlines()[2:4])
    drifting = {"Trainer": [1, 1, 2, 2, 4, 4], "SparseTrainer": [1.1, 1.1, 2, 2, 4.4, 4.4]}  # of rounds: 1.1, 1, 1.1
    assert module.ratio({"seconds": drifting}, "SparseTrainer", 2) == pytest.approx((1.1, 1.05, 1.1))


def test_gpu_training(tmp_path, monkeypatch, capsys):
    module = load("gpu_training")
    monkeypatch.setattr(module, "RESULTS", tmp_path / "gpu_training")
    monkeypatch.setattr(module, "SIDES", {name: side for name, side in module.SIDES.items() if "compiled" not in name})
    with pytest.raises(UserError, match="--device cpu: this measures a GPU"):
        module.main(["--device", "cpu"])
    module.main(["--fast", "--device", "cpu", "--models", "1 B"])
    record = json.loads((tmp_path / "gpu_training.json").read_text(encoding="utf-8"))
    assert [row["side"] for row in record["rows"]] == [*module.SIDES] and record["largest_product"] > 0
    for row in record["rows"]:
        wanted = {"Trainer": 0.0, "SparseTrainer, half of all weights": 0.5}.get(row["side"], 0.2)
        assert row["sparsity"] == pytest.approx(wanted, abs=0.05) and len(row["seconds"]) == 2
        assert row["tokens_per_second"] == pytest.approx(2 * 32 / sum(row["seconds"]))
        n = row["parameters"] - 200 * 64  # looking up embeddings multiplies nothing
        assert row["operations_per_second"] == pytest.approx(row["tokens_per_second"] * (6 * n + 12 * 2 * 64 * 32))
    shown = (tmp_path / "gpu_training.md").read_text(encoding="utf-8")
    assert shown.strip() in capsys.readouterr().out and "1.000x" in shown
    of_card = {"device": "cuda", "environment": record["environment"] | {"gpus": ["NVIDIA H100 80GB HBM3"]}}
    card = module.tables(record | of_card)
    assert f"{record['rows'][0]['operations_per_second'] / 989e12:.1%}" in card


def test_memory_table(tmp_path, monkeypatch, capsys):
    module = load("memory_table")
    monkeypatch.setattr(module, "RESULTS", tmp_path / "memory_table")
    module.main([])
    record = json.loads((tmp_path / "memory_table.json").read_text(encoding="utf-8"))
    assert len(record["plans"]) == len(module.SHAPES) * len(module.WAYS)
    wanted = "Llama-2-7B", "full, bf16, adamw_stochastic"
    (plans,) = (row["plans"] for row in record["plans"] if (row["model"], row["way"]) == wanted)
    assert 53e9 < sum(plans["1"].values()) < 66e9  # the guide says 55 to 65 GB
    assert f"{sum(plans['4'].values()) / 2**30:.1f}" in capsys.readouterr().out


def test_the_tables_of_recovery_judge_by_the_means(monkeypatch):
    module = load("recovery")

    def row(sparsity, method, perplexity, before, seed):
        return {"sparsity_asked": sparsity, "method": method, "perplexity": perplexity, "before": before, "seed": seed,
                "sparsity": sparsity, "seconds": 60.0, "steps": 7, "ran_on": "a CPU" if seed else "a GPU"}  # fmt: skip

    def lines_of(full):
        rows = [row(0.2, "dense, trained as long", 100.0, 101.0, seed) for seed in (0, 1)]
        rows += [row(0.2, "full", value, 110.0, seed) for seed, value in enumerate(full)]
        rows += [row(0.2, "LoRA", 105.0, 110.0, seed) for seed in (0, 1)]
        text = module.tables({"runs": rows})
        return text, {line.split("|")[2].strip(): [cell.strip() for cell in line.split("|")[3:-1]]
                      for line in text.splitlines() if line.startswith("|")}  # fmt: skip

    text, lines = lines_of([100.0, 102.0])
    assert lines["full"] == ["2", "7", "101.00 ± 1.41", "+1.00%", "+1%", "yes"]
    assert lines["pruned"][2:4] == ["110.00 ± 0.00", "+10.00%"] and "holds at 0.2 for 2 of 2 seeds" in text
    assert "3 runs on a CPU; 3 runs on a GPU." in text
    text, lines = lines_of([100.0, 106.0])
    assert lines["full"][3:6] == ["+3.00%", "+1%", "no"] and "holds at 0.2 for 1 of 2 seeds" in text


def test_recovery_keeps_the_rows_that_are_there(tmp_path, monkeypatch):
    """--collect, with no run at all, changes nothing of what earlier ones measured."""
    module, path = load("recovery"), tmp_path / "recovery.json"
    was = json.loads(module.RESULTS.with_suffix(".json").read_text(encoding="utf-8"))["runs"]
    path.write_text(json.dumps({"runs": was}))
    monkeypatch.setattr(module, "RESULTS", tmp_path / "recovery")
    module.main(["--collect", "--out_dir", str(tmp_path / "out")])
    kept = json.loads(path.read_text(encoding="utf-8"))["runs"]
    assert sorted(map(str, kept)) == sorted(map(str, was)) and len(kept) > 5


def test_commands_name_no_directory_of_one_machine(tmp_path, monkeypatch):
    module, asked = load("recovery"), types.SimpleNamespace(collect=False, out_dir=tmp_path / "here", data_dir=tmp_path)
    (asked.out_dir / "finetune" / "a").mkdir(parents=True)
    (asked.out_dir / "finetune" / "a" / "run.json").write_text("{}")
    monkeypatch.setattr(module, "execute", lambda command: None)
    model = asked.out_dir / "one_shot" / "b" / "model"
    record = module.run("a", ["finetune_dense.py", "--model", str(model), "--seed", "0"], "finetune", asked)
    assert record["shown"] == "python finetune_dense.py --model out/one_shot/b/model --seed 0"


def test_the_tables_of_extreme_judge_by_the_excess():
    module = load("extreme")

    def row(name, density, perplexity, seed, **more):
        return {"name": name, "density": density, "perplexity": perplexity, "dense": 80.0, "pruned": 200.0, "seed": seed,
                "steps": 250, "seconds": 60.0, "evaluation_share": 0.04, "ran_on": "a CPU"} | more  # fmt: skip

    def lines_of(ours, batch):
        at_once = [row("kfac", 0.1, 160.0, 0), row("sparsegpt", 0.1, 320.0, 0)]
        rows = [*at_once, *(row("magnitude, plain", 0.1, 320.0, seed) for seed in (0, 1)),
                *(row("ours", 0.1, value, seed) for seed, value in enumerate(ours)),
                row("ours, wide allocation", 0.1, 160.0, 0), row("batch 1", 0.1, batch, 0, steps=2000)]
        text = module.tables({"runs": rows})
        lines = [[cell.strip() for cell in line.split("|")[1:-1]] for line in text.splitlines() if line.startswith("|")]
        return text, {(line[0], line[1]): line[2:] for line in lines}

    text, lines = lines_of([160.0, 160.0], 163.0)
    assert lines["0.1", "kfac"] == ["1", "160.00", "0.693", "0.50", "0.5", "yes"]
    assert lines["ours", "0.1"] == ["2", "250", "200.00 ± 0.00", "160.00 ± 0.00", "0.50", "0.693", "0.50", "0.6", "yes"]
    assert lines["1", "1"] == ["2000", "163.00", "+1.9%", "2%", "yes"] and "Evaluation takes 4.0%" in text
    _, lines = lines_of([160.0, 280.0], 100.0)
    assert lines["ours", "0.1"][6:9] == ["0.70", "0.6", "no"] and lines["1", "1"][-1] == "no"


def load(name):
    spec = importlib.util.spec_from_file_location(name, REPOSITORY / "benchmarks" / f"{name}.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module
