"""Methods of main_block.py against each other: what each pattern costs the tiny LM, on the same calibration tokens.

    python benchmarks/one_shot.py                              the table: six cases, five methods, three draws
    python benchmarks/one_shot.py --cases "2:4" --seeds 0      a part of it (with --add beside what is there)
    python benchmarks/one_shot.py --llmcompressor              llm-compressor's Wanda and SparseGPT beside what is there

Every run is `main_block.py` in this one process, with 128 x 512 calibration tokens of the news articles; the seed draws them.
What is compared is the excess: log-perplexity on the test split over the dense model's. Times are those of the records
(allocation and pruning, without loading text and writing the model), as ratios in one run; shown too is what a method takes
beyond the two forwards that all but magnitude share, which is what Wanda's paper compares (arXiv 2306.11695, section 4.3).
llm-compressor gets the same tokens, and its models are scored by the same function; it pins another transformers, so it is
installed apart, below --out_dir.

Writes benchmarks/results/one_shot.json (every run: command, metrics) and .md.
"""

from __future__ import annotations

import contextlib
import io
import json
import math
import shlex
import statistics
import subprocess
import sys
from pathlib import Path

import torch
from transformers import AutoTokenizer

REPOSITORY = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(REPOSITORY))

import main_block  # noqa: E402
from common import assets, checkpoint, data, eval_utils, text  # noqa: E402
from common.blocks import blocks_of  # noqa: E402
from common.runs import Parser, UserError, environment, read_json, run_script, table, write_atomic  # noqa: E402

RESULTS = REPOSITORY / "benchmarks" / "results" / "one_shot"
OWN = "kfac"
#  case: (flags, what the excess is a share of, wanted share)
CASES = {
    "block 16x16, 20 %": (["--sparsity_type", "block", "--sparsity_ratio", "0.2"], "wanda", 0.25),
    "block 16x16, 50 %": (["--sparsity_type", "block", "--sparsity_ratio", "0.5"], "wanda", 0.25),
    "unstructured, 50 %": (["--sparsity_ratio", "0.5"], "sparsegpt", 0.8),
    "2:4": (["--sparsity_type", "2:4"], "sparsegpt", 0.8),
    "unstructured, 70 %": (["--sparsity_ratio", "0.7"], "sparsegpt", 0.75),
    "unstructured, 80 %": (["--sparsity_ratio", "0.8"], "sparsegpt", 0.75),
}
METHODS = ("magnitude", "wanda", "sparsegpt", "admm", OWN)
ONCE = ("magnitude", "admm")  # shown beside the others, and no target's: with the first draw
OTHERS = {"wanda": "WandaPruningModifier", "sparsegpt": "SparseGPTModifier"}
LLMCOMPRESSOR = "llmcompressor==0.14.0.1"
TIMES = {"wanda": 1 / 3, OWN: 3.0}  # of sparsegpt's time, at most


def run(case: str, method: str, seed: int, args, dense: float) -> dict:
    """One run of main_block.py as a row."""
    command = ["--prune_method", method, *CASES[case][0], "--nsamples", str(args.nsamples), "--seqlen", str(args.seqlen),
               "--seed", str(seed)]  # fmt: skip
    places = ["--model", args.model, "--data_dir", str(args.data_dir), "--out_dir", str(args.out_dir)]
    name = f"{method}-{case.replace(' ', '').replace(',', '-').replace(':', '-').replace('%', '')}-seed{seed}"
    print(f"$ python main_block.py {shlex.join(command)}", flush=True)
    with contextlib.redirect_stdout(io.StringIO()), contextlib.redirect_stderr(io.StringIO()):
        main_block.main([*command, *places, "--calibration", args.text, "--run_name", name, "--resume", "never"])
    record = read_json(args.out_dir / "one_shot" / name / "run.json")
    found = score(Path(record["model_dir"]), args)
    seconds = sum(record["timings"][phase] for phase in ("allocation", "pruning"))
    made = row(case, method, seed, f"python main_block.py {shlex.join(command)}", found,
               record["metrics"]["pruned"]["sparsity"], dense, seconds)  # fmt: skip
    n_blocks, parts = read_json(Path(record["model_dir"]) / "config.json")["num_hidden_layers"], record["timings_of_pruning"]
    n_forwards = n_blocks - 1 + (n_blocks if "statistics" in parts else 0)  # of a block; nobody takes what the last one gives
    return made | {"seconds_beyond_forwards": seconds - n_forwards * parts["forward"] / (n_blocks - 1)}


def score(directory: Path, args) -> dict:
    """Perplexity of a model directory on the text's test split, as main_block.py --eval has it."""
    model = checkpoint.load_causal_lm(directory, eval_utils.scoring_dtype(torch.device("cpu")))
    folder = text.prepare_text(args.text, args.data_dir).path
    stream = text.token_stream(folder, "test", AutoTokenizer.from_pretrained(directory))
    return eval_utils.evaluate_perplexity(model, stream, min(2048, data.n_positions(model.config) or 2048))


def row(case: str, method: str, seed: int, command: str, found: dict, sparsity: float, dense: float,
        seconds: float | None) -> dict:  # fmt: skip
    pruned = found["perplexity"]
    made = {"case": case, "method": method, "seed": seed, "command": command, "perplexity": pruned, "dense_perplexity": dense,
            "excess": math.log(pruned / dense), "sparsity": sparsity, "seconds": seconds,
            "n_tokens": found["n_tokens"]}  # fmt: skip
    print(f"  perplexity {pruned:.2f}, dense {dense:.2f}, excess {made['excess']:.4f}"
          + (f", {seconds:.1f} s" if seconds else ""), flush=True)  # fmt: skip
    return made


# ----------------------------------------------------------------------------------------------------------- llm-compressor

ONESHOT = """
import json, sys, torch
from datasets import Dataset
from llmcompressor import oneshot
from llmcompressor.modifiers.pruning import {modifier}
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, AutoTokenizer
model_dir, tokens, target, seed = sys.argv[1:]
ids = load_file(tokens)["ids"]
model = AutoModelForCausalLM.from_pretrained(model_dir, dtype=torch.float32)
samples = Dataset.from_dict({{"input_ids": ids.tolist(), "attention_mask": torch.ones_like(ids).tolist()}})
recipe = {modifier}(sparsity={sparsity}, mask_structure={structure!r}, targets=["Linear"], ignore=["re:.*lm_head"])
oneshot(model=model, dataset=samples, recipe=recipe, max_seq_length=ids.shape[1], num_calibration_samples=len(ids),
        shuffle_calibration_samples=False)
model.save_pretrained(target, save_compressed=False)
"""


def peer_python(folder: Path, requirements: list[str]) -> Path:
    """An environment with this repository's torch and what is required, made once."""
    python = folder / ("Scripts" if sys.platform == "win32" else "bin") / "python"
    if not (folder / "ready").exists():
        pinned = (REPOSITORY / "requirements.txt").read_text(encoding="utf-8").split()
        torch_version = next(line for line in pinned if line.startswith("torch=="))
        subprocess.run([sys.executable, "-m", "venv", folder], check=True)
        for requirement in (torch_version, *requirements):
            subprocess.run([python, "-m", "pip", "install", "--quiet", requirement], check=True)
        (folder / "ready").write_text("")
    return python


def run_peer(case: str, method: str, seed: int, args, dense: float) -> dict | None:
    """llm-compressor's method on the same tokens, scored by our evaluation. None for patterns that it has not."""
    flags = CASES[case][0]
    if "block" in flags:
        return None
    sparsity, structure = (0.5, "2:4") if "2:4" in flags else (float(flags[-1]), "0:0")
    base = assets.resolve_model(args.model, args.data_dir)
    tokenizer = data.load_tokenizer(base.path, checkpoint.load_causal_lm(base.path).config)
    source = text.prepare_text(args.text, args.data_dir)
    samples = text.calibration_samples(text.token_stream(source.path, "train", tokenizer), args.nsamples, args.seqlen, seed)
    folder = args.out_dir / "llmcompressor"
    folder.mkdir(parents=True, exist_ok=True)
    checkpoint.save_tensors(folder / "tokens.safetensors", {"ids": samples})
    script = folder / "oneshot.py"
    script.write_text(ONESHOT.format(modifier=OTHERS[method], sparsity=sparsity, structure=structure), encoding="utf-8")
    python = peer_python(args.peer or folder / "venv", [LLMCOMPRESSOR])
    print(f"$ llm-compressor: {OTHERS[method]}, {case}, seed {seed}", flush=True)
    done = subprocess.run([python, script, base.path, folder / "tokens.safetensors", folder / "model", str(seed)],
                          capture_output=True, text=True, check=False)  # fmt: skip
    if done.returncode:
        raise UserError(f"llm-compressor failed: {done.stderr.strip().splitlines()[-1]}")
    tokenizer.save_pretrained(folder / "model")
    model = checkpoint.load_causal_lm(folder / "model")
    zeros = [(p.weight == 0).float().mean().item() for block in blocks_of(model) for p in block.projections]
    return row(case, f"llm-compressor {method}", seed, f"{LLMCOMPRESSOR} {OTHERS[method]}", score(folder / "model", args),
               statistics.mean(zeros), dense, None)  # fmt: skip


# ------------------------------------------------------------------------------------------------------------------- table


def spread(values: list[float], digits: int) -> str:
    return f"{statistics.mean(values):.{digits}f}" + (f" ± {statistics.stdev(values):.{digits}f}" if len(values) > 1 else "")


def tables(record: dict) -> str:
    """Perplexities and excesses by case and method, and times, as Markdown."""
    rows = record["runs"]
    methods = [*METHODS, *(f"llm-compressor {m}" for m in OTHERS)]

    def of(case, method, key):
        return [r[key] for r in rows if (r["case"], r["method"]) == (case, method) and r.get(key) is not None]

    lines = [["case", "method", "perplexity", "excess", "share of", "excess, share", "wanted", "met"]]
    for case, (_, base, wanted) in CASES.items():
        for method in methods:
            if not (excess := of(case, method, "excess")):
                continue
            line = [case, method, spread(of(case, method, "perplexity"), 2), spread(excess, 4), "", "", "", ""]
            if method == OWN and (of_base := of(case, base, "excess")):
                share = statistics.mean(excess) / statistics.mean(of_base)
                line[4:] = [base, f"{share:.2f}", f"{wanted:g}", "yes" if share <= wanted else "no"]
            lines.append(line)
    text = table(lines, markdown=True)
    lines = [["time", "seconds", "of sparsegpt's", "wanted", "met", "beyond the forwards, seconds", "of sparsegpt's"]]

    def timed(method: str, key: str) -> tuple[list, float | None]:
        """Mean seconds by case, and all of them as a share of sparsegpt's where there are as many."""
        own, base = ([statistics.mean(of(case, m, key)) for case in CASES if of(case, m, key)] for m in (method, "sparsegpt"))
        return own, sum(own) / sum(base) if own and len(own) == len(base) else None

    for method in METHODS:
        (whole, ratio), (beyond, share) = timed(method, "seconds"), timed(method, "seconds_beyond_forwards")
        if whole:
            wanted = TIMES.get(method)
            met = ("yes" if ratio <= wanted else "no") if wanted and ratio is not None else ""
            lines.append([method, f"{statistics.mean(whole):.1f}", "" if ratio is None else f"{ratio:.2f}",
                          f"{wanted:.2f}" if wanted else "", met,
                          f"{statistics.mean(beyond):.1f}" if beyond else "", "" if share is None else f"{share:.2f}"])
    where, some, n = record["environment"], rows[0], len({r["seed"] for r in rows})
    said = (f"Dense perplexity {some['dense_perplexity']:.2f} on {some['n_tokens']:,} tokens of the test split; "
            f"{record['calibration']} calibration tokens; mean ± standard deviation over {n} draws of them (of "
            f"{' and '.join(ONCE)} one). Excess: "
            f"log-perplexity over the dense model's. {where['threads']} threads, {where['cpu']}.")  # fmt: skip
    return f"{text}\n\n{table(lines, markdown=True)}\n\n{said}\n"


def main(argv=None) -> None:
    parser = Parser(__doc__, shared=("data_dir", "out_dir"))
    parser.add_argument("--model", default="tiny_llama", help="[tiny_llama]")
    parser.add_argument("--text", default="news", help="of calibration and evaluation [news]")
    parser.add_argument("--cases", nargs="+", default=list(CASES), choices=CASES, help="[all]")
    parser.add_argument("--methods", nargs="+", default=list(METHODS), choices=METHODS, help="[all]")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2], help="draws of the calibration text [0 1 2]")
    parser.add_argument("--nsamples", type=int, default=128, help="[128]")
    parser.add_argument("--seqlen", type=int, default=512, help="[512]")
    parser.add_argument("--llmcompressor", action="store_true", help="its methods; ours are taken from the JSON")
    parser.add_argument("--add", action="store_true", help="keep the rows of the JSON that are not measured again")
    parser.add_argument("--peer", type=Path, help="an environment that has llm-compressor [made below --out_dir]")
    args = parser.parse_args(argv)
    path = RESULTS.with_suffix(".json")
    rows = read_json(path)["runs"] if args.add or args.llmcompressor else []
    dense = score(assets.resolve_model(args.model, args.data_dir).path, args)["perplexity"]

    def keep(rows):
        record = {"command": "python benchmarks/one_shot.py", "environment": environment(), "runs": rows,
                  "calibration": f"{args.nsamples} x {args.seqlen}"}  # fmt: skip
        write_atomic(path, json.dumps(record, indent=1) + "\n")
        write_atomic(RESULTS.with_suffix(".md"), tables(record))
        return record

    for seed in args.seeds:
        for case in args.cases:
            for method in [m for m in args.methods if not args.llmcompressor or m in OTHERS]:
                if method in ONCE and seed != args.seeds[0]:
                    continue
                found = (run_peer if args.llmcompressor else run)(case, method, seed, args, dense)
                if found:
                    key = (case, found["method"], seed)
                    rows = [r for r in rows if (r["case"], r["method"], r["seed"]) != key] + [found]
                record = keep(rows)
    print(tables(record))


if __name__ == "__main__":
    run_script(main)
