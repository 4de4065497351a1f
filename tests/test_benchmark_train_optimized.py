"""The benchmark of train_optimized.py runs, at a size at which its numbers mean nothing, and judges as it says."""

import importlib.util
import json
import random

import pandas
import pytest
import torch

import train_optimized as script
from common import assets
from common.runs import REPOSITORY


@pytest.fixture(scope="module")
def benchmark():
    path = REPOSITORY / "benchmarks" / "train_optimized.py"
    spec = importlib.util.spec_from_file_location("benchmark_train_optimized", path)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_all_parts(benchmark, tmp_path, monkeypatch, capsys):
    """In this process, on texts that stand in for the reviews, without torch.compile."""
    pick = random.Random(0)
    for split in ("train", "validation"):
        texts = [f"{split} {i} {' '.join(pick.choices(['a', 'film', 'of', 'note'], k=pick.randint(1, 9)))}" for i in range(80)]
        (tmp_path / "reviews").mkdir(exist_ok=True)
        pandas.DataFrame({"text": texts, "label": 0}).to_parquet(tmp_path / "reviews" / f"{split}.parquet")
    monkeypatch.setattr(assets, "prepare_task", lambda *args: assets.Asset(tmp_path / "reviews", {}))
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    monkeypatch.setattr(benchmark, "execute", lambda command: script.main([*command[1:], "--num_workers", "0"]))
    some = {name: benchmark.MEASURES[name] for name in ("batch of 4", "half the length")}
    monkeypatch.setattr(benchmark, "MEASURES", some)
    monkeypatch.setattr(script, "INNER", 2)
    monkeypatch.setattr(script, "MOST_INNER", 4)
    flags = ["--fast", "--device", "cpu", "--data_dir", tmp_path / "data", "--out_dir", tmp_path / "out", "--results", tmp_path]
    flags += ["--seeds", 0, "--detection_seeds", 0, "--n_whole", 40, "--n_quality", 40, "--n_measured", 24, "--n_watched", 40]
    try:
        benchmark.main([*flags, "--parts", "quality", "measures", "monitoring", "detection", "routes"])
        first = json.loads((tmp_path / "train_optimized.json").read_text())
        benchmark.main([*flags, "--parts", "whole"])  # beside what is there
    finally:
        torch.set_num_threads(threads)
    record = json.loads((tmp_path / "train_optimized.json").read_text())
    assert {part: rows for part, rows in record["parts"].items() if part != "whole"} == first["parts"]
    sides = {row["side"]: row for row in record["parts"]["whole"]}
    assert sides["baseline"]["steps"] == 36 and sides["optimised"]["steps"] == 5  # 36 texts left to train on
    assert all(0 < row["monitoring"] + row["waiting"] + row["validation"] < 1 for row in sides.values())
    assert [row["side"] for row in record["parts"]["quality"]] == list(benchmark.SIDES)
    assert set(record["settings"]) == set(record["parts"]) and record["settings"]["whole"]["n_whole"] == 40
    assert [row["route"] for row in record["parts"]["routes"]] == list(benchmark.ROUTES)
    shown = (tmp_path / "train_optimized.md").read_text()
    assert shown.strip() in capsys.readouterr().out and shown.count("\n| --") == 6
    assert str(tmp_path) not in shown and all(str(tmp_path) not in row["command"] for row in record["parts"]["whole"])


def look(step, active, kl=3.0):
    return {"step": step, "kl": kl, "active_units": active, "mutual_information": active / 4, "kl_of": [0] * 8}


def test_when_a_collapse_happened_and_when_it_is_told(benchmark):
    looks = [look(step, 0 if step in (30, 40) or step >= 420 else 8) for step in range(10, 1010, 10)]
    assert benchmark.happened_at(looks) == 420
    assert benchmark.told_at(looks, 10) == 430 and benchmark.told_at(looks, 50) == 500 and benchmark.told_at(looks, 100) == 600
    alive = [look(step, 8) for step in range(10, 1010, 10)]
    assert benchmark.happened_at(alive) is None and benchmark.told_at(alive, 10) is None


def test_the_tables_judge(benchmark):
    rows = [{"side": side, "texts_per_second": speed, "negative_elbo": loss, "peak_memory": 2**30,
             "steps": 80 if side == "baseline" else 10}
            for side, speed, loss in (("baseline", 10.0, 100.0), ("optimised", 29.0, 101.5))]  # fmt: skip
    assert benchmark.table_whole(rows)[2][2:7] == ["80", "29.00", "2.90x", "3x", "no"]
    assert benchmark.table_quality(rows)[2][4:] == ["+1.50%", "+1%", "no"]
    rows[1] |= {"texts_per_second": 31.0, "negative_elbo": 100.9}
    assert benchmark.table_whole(rows)[2][6] == benchmark.table_quality(rows)[2][6] == "yes"
    watched = [{"side": "fast_detection", "steps": 9, "monitoring": 0.011, "waiting": 0.02}]
    assert benchmark.table_monitoring(watched)[1][4::3] == ["no", "yes"]
    found = [{"kind": "collapses", "seed": 0, "steps": 900, "happened": 100, "told": {"50": 400, "100": 400}},
             {"kind": "collapses", "seed": 1, "steps": 900, "happened": 100, "told": {"50": 450, "100": 500}},
             {"kind": "collapses", "seed": 2, "steps": 900, "happened": 700, "told": {"50": None, "100": None}},
             {"kind": "healthy", "seed": 0, "steps": 900, "happened": None, "told": {"10": None, "50": None}},
             {"kind": "healthy", "seed": 1, "steps": 900, "happened": None, "told": {"10": 300, "50": None}}]  # fmt: skip
    assert [line[-1] for line in benchmark.table_detection(found)[1:]] == ["yes", "no", "no", "yes", "no"]
    measured = [{"side": side, "repeat": 0, "texts_per_second": speed, "warm_texts_per_second": warm, "peak_memory": 1.0}
                for side, speed, warm in (("baseline", 10.0, 10.0), ("batch of 4", 10.1, 11.0), ("torch.compile", 5.0, 12.0))]
    assert [line[-1] for line in benchmark.table_measures(measured)[1:]] == ["", "no", "yes"]
