"""The report of real (tiny) runs: what it measures, flags, skips and shows, also in a browser where there is one."""

import csv
import json
import re
import shutil
import subprocess

import numpy as np
import pytest
import torch

from common import eval_utils, report
from common.runs import REPOSITORY, read_json
from tests import test_8_pruning_with_finetuning as eight
from tests.test_8_pruning_with_finetuning import as_program, base, classifier, hastened, only_run, script, tiny  # noqa: F401

SCRIPT = REPOSITORY / "7_evaluate_and_generate_report.py"


@pytest.fixture(scope="module")
def seven():
    return eight.load_script(SCRIPT, "script_7")


@pytest.fixture(scope="module")
def out(base, tiny, classifier, tmp_path_factory):  # noqa: F811
    """A dense run, a pruned one that trained, its 4-bit model, one that failed, one that was interrupted, two broken ones."""
    out = tmp_path_factory.mktemp("reported")
    eight.load_script().main([*base, "--out_dir", out, "--num_epochs", 2, "--dense_epochs", 1, "--granularity", "neurons",
                              "--target_sparsity", 0.4])  # fmt: skip
    qat = eight.load_script(REPOSITORY / "10_qat_kd_4bit.py", "script_10")
    places = ["--task", tiny / "texts.csv", "--data_dir", tiny / "data", "--out_dir", out]
    qat.main([*places, "--max_length", 16, "--batch_size", 16, "--num_epochs", 1, "--device", "cpu"])
    for name, status in (("failed", "failed"), ("stopped", "interrupted")):
        (out / "prune" / name).mkdir()
        record = {"status": status, "config": {}, "command": "python x.py", "error": "UserError: <b>no</b>"}
        (out / "prune" / name / "run.json").write_text(json.dumps(record))
    (out / "prune" / "broken").mkdir()
    (out / "prune" / "broken" / "run.json").write_text('{"status": ')
    (out / "prune" / "bare" / "model").mkdir(parents=True)
    return out


@pytest.fixture(scope="module")
def written(seven, out, tiny, tmp_path_factory):  # noqa: F811
    folder = tmp_path_factory.mktemp("report")
    quick = ["--latency_seconds", 0, "--latency_batch", 2]
    seven.main(["--out_dir", out, "--data_dir", tiny / "data", "--report_dir", folder, *quick])
    return folder


def rows_of(folder):
    with open(folder / "summary.csv", newline="") as file:
        return {row["run"]: row for row in csv.DictReader(file)}


def test_models_are_measured_again_as_recorded(written, out):
    rows = rows_of(written)
    assert {row["status"] for row in rows.values()} == {"finished", "failed", "interrupted"} and len(rows) == 5
    for experiment, name in (("prune", "pruned"), ("qat", "qat")):
        finished = [row for key, row in rows.items() if key.startswith(experiment) and row["status"] == "finished"]
        (row,) = finished
        expected = read_json(out / row["run"] / "run.json")["metrics"][name]
        for key in ("accuracy", "f1", "parameters", "bytes", "macs_per_example", "n"):
            assert float(row[key]) == pytest.approx(expected[key], rel=1e-12), key
        assert not row["differences"] and row["fast"] == "False"
    (dense,) = (row for key, row in rows.items() if key.startswith("dense"))
    assert 0.5 < float(dense["accuracy"]) <= 1 and float(dense["bytes"]) > 4 * float(dense["parameters"])


def test_what_cannot_be_read_is_skipped_and_said(written):
    text = (written / "report.md").read_text()
    assert re.search(r"- .*broken/run.json: not valid JSON", text) and re.search(r"- .*bare/run.json: not found", text)
    page = (written / "index.html").read_text()
    assert "broken/run.json: not valid JSON" in page and "prune/stopped: interrupted" in page
    assert "&lt;b&gt;no&lt;/b&gt;" in page and "<b>no" not in page


def test_the_page_is_one_file_with_everything_in_it(written, out):
    page = (written / "index.html").read_text()
    assert not re.search(r'(?:src|href)="(?:https?:)?//', page) and "@import" not in page and "<link" not in page
    for caption in ("Accuracy against megabytes on disk", "selection accuracy over steps", "What is left of each layer",
                    "Attention and FFN weights", "Confusion, n = 43", "bits a weight"):  # fmt: skip
        assert caption in page, caption
    assert "pruning phase" in page and "prefers-color-scheme: dark" in page and "@media print" in page
    ids = re.findall(r' id="([^"]+)"', page)
    assert len(ids) == len(set(ids))
    links = set(re.findall(r'href="([^"#]+run\.json)"', page))
    assert links and all((written / link).resolve().is_file() for link in links)
    config = read_json(only_run(out, "qat") / "model" / "config.json")
    assert config["quantization_config"]["config_groups"]["group_0"]["weights"]["num_bits"] == 4
    assert re.search(r"<td data-value=\"0\">0</td><td data-value=\"(?:4|5)\.\d\d\">", page)  # four bits and their scales


def test_a_changed_figure_is_flagged(seven, out, tiny, tmp_path, capsys):  # noqa: F811
    source = next(path for path in (out / "prune").iterdir() if (path / "model" / "config.json").exists())
    changed = tmp_path / "prune" / "changed"
    shutil.copytree(source, changed)
    record = read_json(changed / "run.json")
    record["metrics"]["pruned"]["accuracy"] -= 0.01
    record["metrics"]["pruned"]["parameters"] += 1
    (changed / "run.json").write_text(json.dumps(record))
    argv = ["--runs", changed, "--data_dir", tiny / "data", "--report_dir", tmp_path / "r", "--latency_seconds", 0]
    seven.main(argv)
    printed = capsys.readouterr().out
    assert "differs: prune/changed: accuracy" in printed and "differs: prune/changed: parameters" in printed
    assert "f1" not in rows_of(tmp_path / "r")["prune/changed"]["differences"]
    seven.main([*argv, "--fast"])
    row = rows_of(tmp_path / "r")["prune/changed"]
    assert row["n"] == "11" and row["fast"] == "True" and row["differences"].startswith("parameters")
    assert "Measured on 25% of the validation set" in (tmp_path / "r" / "index.html").read_text()
    shutil.rmtree(changed / "model")
    seven.main(argv)
    assert "skipped: prune/changed: " in capsys.readouterr().out


def test_a_bad_model_and_missing_data_cost_only_their_own_rows(seven, out, tiny, tmp_path, capsys):  # noqa: F811
    source = next(path for path in (out / "prune").iterdir() if (path / "model" / "config.json").exists())
    shutil.copytree(source, tmp_path / "prune" / "good")
    shutil.copytree(source, tmp_path / "prune" / "torn")
    weights = tmp_path / "prune" / "torn" / "model" / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-100])
    argv = ["--out_dir", tmp_path, "--report_dir", tmp_path / "r", "--latency_seconds", 0]
    seven.main([*argv, "--data_dir", tiny / "data"])
    assert "skipped: prune/torn: " in capsys.readouterr().out
    rows = rows_of(tmp_path / "r")
    assert rows["prune/good"]["accuracy"] and not rows["prune/torn"]["accuracy"]
    seven.main([*argv, "--data_dir", tmp_path / "nothing"])
    assert "is not under" in capsys.readouterr().out


def test_refusals(seven, tmp_path, capsys):
    assert as_program(seven, ["--out_dir", tmp_path]) == 2
    assert "nothing to report under" in capsys.readouterr().err
    assert as_program(seven, ["--fast", "--update_readme"]) == 2
    assert "takes no figures of fast runs" in capsys.readouterr().err


def test_calibration_error_by_a_loop_over_bins():
    generator = torch.Generator().manual_seed(0)
    logits, labels = 2 * torch.randn(300, 3, generator=generator), torch.randint(0, 3, (300,), generator=generator).numpy()
    confidence, predicted = logits.double().softmax(1).max(1)
    total = 0.0
    for b in range(15):
        inside = [i for i in range(300) if b / 15 <= confidence[i] < (b + 1) / 15 or (b == 14 and confidence[i] == 1)]
        if inside:
            right = np.mean([predicted[i] == labels[i] for i in inside])
            total += len(inside) / 300 * abs(right - np.mean([confidence[i] for i in inside]))
    assert eval_utils.calibration_error(logits, labels) == pytest.approx(total, abs=1e-6)
    sure = torch.tensor([[50.0, 0.0], [50.0, 0.0]])
    assert eval_utils.calibration_error(sure, np.array([0, 1])) == pytest.approx(0.5)


# ------------------------------------------------------------------------------------------------------------ in a browser

PROBE = """<script>
const seen = {errors: []};
addEventListener("error", event => seen.errors.push(String(event.message)));
addEventListener("load", () => {
  seen.wide = document.documentElement.scrollWidth - document.documentElement.clientWidth;
  const table = document.querySelector("table.sorts");
  const column = () => [...table.tBodies[0].rows].map(row => row.cells[3].textContent);
  const button = table.querySelectorAll("th button")[3];
  button.focus(); seen.focused = document.activeElement === button;
  button.click(); seen.up = column(); button.click(); seen.down = column();
  const pre = document.createElement("pre"); pre.id = "seen"; pre.textContent = JSON.stringify(seen); document.body.append(pre);
});
</script>"""


@pytest.mark.parametrize("width", [1280, 500])  # 500 is the narrowest window that headless Chromium makes
def test_in_a_browser(written, tmp_path, width):
    chromium = shutil.which("chromium") or shutil.which("google-chrome")
    if chromium is None:
        pytest.skip("no Chromium on this machine")
    page = (written / "index.html").read_text().replace("<head>", "<head>" + PROBE, 1)
    (tmp_path / "page.html").write_text(page)
    command = [chromium, "--headless", "--no-sandbox", "--disable-gpu", "--no-first-run", "--disable-background-networking",
               f"--user-data-dir={tmp_path / 'profile'}", f"--window-size={width},900", "--dump-dom",
               (tmp_path / "page.html").as_uri()]  # fmt: skip
    done = subprocess.run(command, capture_output=True, text=True, timeout=120, check=True)
    seen = json.loads(re.search(r'<pre id="seen">(.*?)</pre>', done.stdout)[1])
    assert seen["errors"] == [] and seen["wide"] <= 0 and seen["focused"]
    numbers = [float(text) for text in seen["up"] if text]
    assert len(numbers) == 3 and numbers == sorted(numbers)
    assert [float(text) for text in seen["down"] if text] == sorted(numbers, reverse=True)


def test_a_table_escapes_and_marks():
    text = report.html_table([["a<b", "x"], [report.Cell("1 & 2", 3, "r.json?a&b"), report.Cell("no", bad=True)]])
    assert "a&lt;b" in text and '<a href="r.json?a&amp;b">1 &amp; 2</a>' in text
    assert 'data-value="3"' in text and 'class="bad"' in text
