"""Structured pruning of the tiny LM by finetune_llama3.py: what it costs without training, what training gives back, how fast.

    python benchmarks/structured_llm.py                       the tables: three seeds
    python benchmarks/structured_llm.py --seeds 0 --names Taylor   a part of them, beside what is there
    python benchmarks/structured_llm.py --collect             run nothing: the runs that are finished
    python benchmarks/structured_llm.py --speed               only the speeds and the cost of importance, beside what is there

Every run is `finetune_llama3.py` on assets/tiny_llama and the news: 128 x 512 calibration tokens; its perplexity is of the test
split. What is compared is the excess: log-perplexity over the dense model's. Torch-Pruning takes as much from the same model by
the same calibration tokens, in an environment of its own: neurons and, as it does under grouped-query attention, query heads;
its rounding is coarse, so the nearest of several ratios asked counts. Training is the guide's scenario 1 (1,000 windows
of 512 tokens, two epochs, batches of 4): as it is; behind block reconstruction, from twice the calibration text and with no
layer protected; and with an optimizer and a rate for this small model, embeddings that stay as they are and the dense model as
the teacher.
Speeds are of random Llamas of 100 M and 300 M parameters, one sequence, fp32, in turns: the larger the model, the less of a
token's time is Python's. The cost of importance is that of all groups' scores of the smaller one against a forward and a
backward with gradients of all weights, on the same 64 x 512 tokens in the same precision; memory is the growth of a fresh
process.

Writes benchmarks/results/structured_llm.json (every run: command, metrics) and .md.
"""

from __future__ import annotations

import json
import math
import multiprocessing
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import torch
from transformers import LlamaConfig, LlamaForCausalLM

REPOSITORY = Path(__file__).resolve().parent.parent
sys.path[:0] = [str(REPOSITORY), str(REPOSITORY / "benchmarks")]

from one_shot import peer_python  # noqa: E402
from pruning_frontier import met  # noqa: E402
from recovery import ran_on, run, spread, where  # noqa: E402

from common import assets, generation, structured, text, train_utils  # noqa: E402
from common.blocks import KINDS, blocks_of  # noqa: E402
from common.checkpoint import load_causal_lm, save_tensors  # noqa: E402
from common.data import load_tokenizer  # noqa: E402
from common.eval_utils import resident_peak  # noqa: E402
from common.importance import random_scores  # noqa: E402
from common.pruning import shrink_  # noqa: E402
from common.runs import Parser, UserError, environment, read_json, run_script, table, write_atomic  # noqa: E402
from common.streaming import StreamedLM  # noqa: E402

RESULTS = REPOSITORY / "benchmarks" / "results" / "structured_llm"
WHOLE = ["--protected_layers", "0"]
#  name: flags, at these ratios
UNTRAINED = {
    "L2, uniform": (["--importance", "l2", "--allocation", "uniform", "--no_refit", *WHOLE], (0.25, 0.5)),
    "Taylor": (["--importance", "taylor", "--no_refit", *WHOLE], (0.25, 0.5)),
    "random": (["--importance", "random", "--no_refit", *WHOLE], (0.25,)),
    "obs, uniform": (["--allocation", "uniform", *WHOLE], (0.25, 0.5)),
    "obs, sensitivity": (["--allocation", "sensitivity", *WHOLE], (0.25, 0.5)),
    "obs, global": (WHOLE, (0.25, 0.5)),
    "obs (the default: ends protected)": ([], (0.25, 0.5)),
    "the default, reconstructed": (["--reconstruct_passes", "8"], (0.25,)),
    "obs, query heads": (["--gqa_mode", "queries"], (0.25,)),
    "fisher": (["--importance", "fisher"], (0.25,)),
    "fisher, no refit": (["--importance", "fisher", "--no_refit"], (0.25,)),
}
PEERS = {  # scores and ranking of Torch-Pruning
    "Torch-Pruning, L2, local": ("l2", "local"),
    "Torch-Pruning, L2, global": ("l2", "global"),
    "Torch-Pruning, Taylor, local": ("taylor", "local"),
    "Torch-Pruning, Taylor, global": ("taylor", "global"),
}
OURS, WANTED = "obs (the default: ends protected)", {"L2, uniform": 1 / 3, "Taylor": 0.7} | dict.fromkeys(PEERS, 1.0)
SCENARIO = ["--finetune", "--finetune_epochs", "2", "--finetune_samples", "1000", "--finetune_grad_accum", "4",
            "--finetune_warmup_steps", "50", "--no_gradient_checkpointing"]  # fmt: skip
RECONSTRUCTED = [*WHOLE, "--importance_samples", "256", "--reconstruct_passes", "4"]
TAUGHT = ["--distill", "--distill_weight", "1", "--hidden_weight", "10"]
TRAINED = {
    "dense, trained as long": ["--pruning_ratio", "0", *SCENARIO],
    "scenario 1": ["--pruning_ratio", "0.25", "--prune_mlp", *SCENARIO],
    "scenario 1, reconstructed": ["--pruning_ratio", "0.25", "--prune_mlp", *SCENARIO, *RECONSTRUCTED],
    "LoRA, taught": ["--pruning_ratio", "0.25", "--prune_mlp", *SCENARIO, *TAUGHT, "--finetune_method", "lora",
                     "--finetune_lr", "3e-3", "--lora_dropout", "0"],
    "full, taught": ["--pruning_ratio", "0.25", "--prune_mlp", *SCENARIO, *TAUGHT, "--finetune_lr", "1e-3",
                     "--finetune_optim", "muon", "--freeze_embeddings"],
}  # fmt: skip
WITHIN = 0.03  # of the dense model trained as long
LARGE = {
    "100 M": {"hidden_size": 768, "intermediate_size": 2048, "num_hidden_layers": 12, "num_attention_heads": 12,
              "num_key_value_heads": 4, "vocab_size": 8192, "tie_word_embeddings": True},
    "300 M": {"hidden_size": 1024, "intermediate_size": 2816, "num_hidden_layers": 24, "num_attention_heads": 16,
              "num_key_value_heads": 4, "vocab_size": 8192, "tie_word_embeddings": True},
}  # fmt: skip
SPEEDS = {0.25: 1.2, 0.5: 1.6}
IMPORTANCE = {"seconds": 1.3, "memory": 1.1}

TORCH_PRUNING = "torch-pruning==1.6.1"
PEER = """
import copy, json, math, sys, torch, torch_pruning as tp
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM
directory, tokens, scores, ranking, ratio = sys.argv[1:]
tokens, ratio = load_file(tokens), float(ratio)
whole = AutoModelForCausalLM.from_pretrained(directory, dtype=torch.float32).eval()
whole.config.use_cache = False
config = whole.config
for piece in tokens["calibration"].split(8) if scores == "taylor" else ():
    whole(input_ids=piece, labels=piece).loss.backward()
gradients = {name: parameter.grad for name, parameter in whole.named_parameters()}

def size(model):
    return sum(p.numel() for name, p in model.named_parameters() if "_proj." in name)

def prune(asked):
    model = copy.deepcopy(whole)
    for name, parameter in model.named_parameters():
        parameter.grad = gradients[name]
    parts = [(layer.self_attn, layer.mlp) for layer in model.model.layers]
    heads = {a.q_proj: config.num_attention_heads for a, _ in parts}
    heads |= {linear: config.num_key_value_heads for a, _ in parts for linear in (a.k_proj, a.v_proj)}
    of_group = config.num_attention_heads // config.num_key_value_heads
    of_heads = math.floor(asked * of_group) / of_group
    left = asked * size(model) - of_heads * sum(a.q_proj.weight.numel() + a.o_proj.weight.numel() for a, _ in parts)
    of_neurons = left / sum(3 * m.up_proj.weight.numel() for _, m in parts)
    kept = [model.lm_head, model.model.embed_tokens, *(linear for a, m in parts for linear in (a.o_proj, m.down_proj))]
    importance = tp.importance.GroupTaylorImportance() if scores == "taylor" else tp.importance.GroupMagnitudeImportance(p=2)
    tp.pruner.BasePruner(model, tokens["calibration"][:1, :8], importance, global_pruning=ranking == "global",
                         pruning_ratio=of_neurons, ignored_layers=kept, num_heads=heads, prune_num_heads=True,
                         prune_head_dims=False, head_pruning_ratio=of_heads,
                         output_transform=lambda output: output.logits.sum()).step()
    for a, _ in parts:
        a.num_key_value_groups = a.q_proj.out_features // a.k_proj.out_features
    return model, 1 - size(model) / size(whole)

@torch.no_grad()
def perplexity(model):
    total, n = 0.0, 0
    for piece in tokens["test"].split(int(config.max_position_embeddings)):
        if len(piece) > 1:
            logits = model(input_ids=piece[None]).logits[0, :-1]
            total, n = total + float(torch.nn.functional.cross_entropy(logits, piece[1:], reduction="sum")), n + len(piece) - 1
    return math.exp(total / n)

tried = []
for step in range(12):
    tried.append(prune(ratio * (1 + step / 20)))
    if tried[-1][1] >= ratio:
        break
model, removed = min(tried, key=lambda pruned: abs(pruned[1] - ratio))
print(json.dumps({"dense": perplexity(whole), "perplexity": perplexity(model), "sparsity": removed}))
"""


def run_peer(name: str, ratio: float, seed: int, args) -> dict | None:
    """Torch-Pruning on the same tokens as a row. Its models are pickles that no `transformers` loads: it scores them itself."""
    if args.collect:
        return None
    folder = args.out_dir / "torch_pruning"
    folder.mkdir(parents=True, exist_ok=True)
    base, source = assets.resolve_model("tiny_llama", args.data_dir), text.prepare_text("news", args.data_dir)
    tokenizer = load_tokenizer(base.path, load_causal_lm(base.path).config)
    train, test = (text.token_stream(source.path, split, tokenizer) for split in ("train", "test"))
    save_tensors(folder / "tokens.safetensors", {"calibration": text.calibration_samples(train, 128, 512, seed),
                                                 "test": torch.from_numpy(test.astype("int64"))})  # fmt: skip
    (folder / "prune.py").write_text(PEER, encoding="utf-8")
    pinned = (REPOSITORY / "requirements.txt").read_text(encoding="utf-8").split()
    python = peer_python(folder / "venv", [*(line for line in pinned if line.startswith("transformers==")), TORCH_PRUNING])
    print(f"$ {TORCH_PRUNING}: {name}, {ratio:g}, seed {seed}", flush=True)
    done = subprocess.run([python, folder / "prune.py", base.path, folder / "tokens.safetensors", *PEERS[name], str(ratio)],
                          capture_output=True, text=True, check=False)  # fmt: skip
    if done.returncode:
        raise UserError(f"{TORCH_PRUNING} failed: {done.stderr.strip().splitlines()[-1]}")
    found = json.loads(done.stdout.strip().splitlines()[-1])
    print(f"  perplexity {found['perplexity']:.2f}, removed {found['sparsity']:.3f}", flush=True)
    return {"name": name, "ratio": ratio, "seed": seed, "command": TORCH_PRUNING, "pruned": None, **found,
            "ran_on": ran_on(environment() | {"gpus": []})}  # fmt: skip


def prune(name: str, flags: list[str], ratio: float | None, seed: int, args) -> dict | None:
    """One run as a row."""
    asked = [] if ratio is None else ["--pruning_ratio", f"{ratio:g}", "--prune_mlp"]
    command = ["finetune_llama3.py", *asked, *flags, "--finetune_dataset", "news", "--eval_text", "news", "--seed", str(seed)]
    label = f"structured-{name}-{ratio or 'trained'}-seed{seed}".replace(" ", "-").replace(",", "").replace(":", "")
    record = run(label.replace("(", "").replace(")", ""), command, "llama3", args, "--save_ckpt_log_name")
    if record is None:
        return None
    metrics = record["metrics"]
    last = list(metrics.values())[-1]
    print(f"  perplexity {last['perplexity']:.2f}", flush=True)
    return {"name": name, "ratio": ratio, "seed": seed, "command": record["shown"], "perplexity": last["perplexity"],
            "dense": metrics["dense"]["perplexity"], "pruned": metrics.get("pruned", {}).get("perplexity"),
            "sparsity": last.get("sparsity", 0.0), "layers": record.get("layers"), "timings": record["timings"],
            "ran_on": ran_on(record["environment"])}  # fmt: skip


# ------------------------------------------------------------------------------------------------------------------ speeds


def random_llama(size: str) -> LlamaForCausalLM:
    torch.manual_seed(0)
    return LlamaForCausalLM(LlamaConfig(**LARGE[size], max_position_embeddings=1024)).eval()


def measure_speeds(size: str, seconds: float) -> dict:
    models = {"dense": random_llama(size)}
    for ratio in SPEEDS:
        model = random_llama(size)
        blocks = blocks_of(model)
        scores = random_scores(blocks, torch.Generator().manual_seed(0))
        keep = structured.choose(scores, blocks, ratio, range(1, len(blocks) - 1), KINDS, "global", 0.1, multiple=8)
        shrink_(model, keep)
        models[f"{ratio:g}"] = model
    return generation.speeds(models, 128, 32, seconds)


def plain(directory: Path, samples: torch.Tensor, precision: str) -> None:
    """A forward and a backward with gradients of all weights, of each batch."""
    model = load_causal_lm(directory, torch.float32)
    for batch in samples.split(8):
        with train_utils.autocast(torch.device("cpu"), precision):
            loss = model(input_ids=batch, labels=batch).loss
        loss.backward()
        model.zero_grad(set_to_none=True)


def scored(directory: Path, samples: torch.Tensor, precision: str, scorers: tuple[str, ...]) -> None:
    lm = StreamedLM(directory, torch.device("cpu"), precision)
    with tempfile.TemporaryDirectory() as folder:
        structured.group_scores(lm, blocks_of(lm.model), samples, 8, scorers, 0, Path(folder), on_disk=True)


def in_a_process(function, *given) -> tuple[float, int]:
    """Seconds (the lesser of two runs) and the growth of the resident set, in a fresh process."""
    with multiprocessing.get_context("spawn").Pool(1) as pool:
        return pool.apply(_timed, (function, given, torch.get_num_threads()))


def _timed(function, given, threads: int) -> tuple[float, int]:
    torch.set_num_threads(threads)
    torch.nn.functional.linear(torch.randn(64, 64), torch.randn(64, 64))
    before, times = resident_peak(), []
    for _ in range(2):
        start = time.perf_counter()
        function(*given)
        times.append(time.perf_counter() - start)
    return min(times), resident_peak() - before


def measure_importance() -> dict:
    """Of a random Llama, whose scores take as long as those of any other of this shape."""
    precision = train_utils.resolve_precision("auto", torch.device("cpu"))
    samples = torch.randint(5, 8192, (64, 512), generator=torch.Generator().manual_seed(0))
    with tempfile.TemporaryDirectory() as folder:
        random_llama("100 M").save_pretrained(folder)
        seconds, memory = in_a_process(plain, Path(folder), samples, precision)
        found = {"forward and backward": {"seconds": seconds, "bytes": memory}}
        for scorers in (("taylor",), ("fisher",), ("obs",)):
            seconds, memory = in_a_process(scored, Path(folder), samples, precision, scorers)
            found["+".join(scorers)] = {"seconds": seconds, "bytes": memory}
    return found | {"precision": precision}


# ------------------------------------------------------------------------------------------------------------------- table


def tables(record: dict) -> str:
    rows, parts = record["runs"], []

    def of(name, ratio, key):
        return [row[key] for row in rows if (row["name"], row["ratio"]) == (name, ratio) and row[key] is not None]

    def excess(name, ratio):
        return [math.log(row["perplexity"] / row["dense"]) for row in rows if (row["name"], row["ratio"]) == (name, ratio)]

    lines = [["removed", "scores", "perplexity", "excess", "ours, share of it", "wanted", "met"]]
    for ratio in (0.25, 0.5):
        for name in (*UNTRAINED, *PEERS):
            if not of(name, ratio, "perplexity"):
                continue
            mean = statistics.mean(excess(name, ratio))
            share = statistics.mean(excess(OURS, ratio)) / mean if excess(OURS, ratio) else None
            wanted = WANTED.get(name) if ratio == 0.25 else None
            lines.append([f"{ratio:g}", name, spread(of(name, ratio, "perplexity")), f"{mean:.3f}",
                          "" if share is None or name == OURS else f"{share:.2f}", "" if wanted is None else f"{wanted:.2f}",
                          "" if wanted is None or share is None else met(share <= wanted)])  # fmt: skip
    parts.append(table(lines, markdown=True))
    as_long = of("dense, trained as long", None, "perplexity")
    if as_long:
        lines = [["0.25 removed, trained", "seeds", "perplexity", "against dense, as long", "allowed", "met"]]
        lines.append(["dense", "", spread(of("dense, trained as long", None, "dense")[:1]), "", "", ""])
        shown = {"dense, trained as long": as_long}
        for name in (name for name in TRAINED if not name.startswith("dense")):
            if name.startswith("scenario"):  # the others begin where scenario 1 does
                shown[f"pruned for {name}"] = of(name, None, "pruned")
            shown[name] = of(name, None, "perplexity")
        for name, values in shown.items():
            if values:
                against = statistics.mean(values) / statistics.mean(as_long) - 1
                allowed = WITHIN if name.startswith(("scenario 1", "full")) else None
                lines.append([name, len(values), spread(values), "" if name.startswith("dense") else f"{against:+.2%}",
                              "" if allowed is None else f"{allowed:+.0%}",
                              "" if allowed is None else met(against <= allowed)])  # fmt: skip
        parts.append(table(lines, markdown=True))
    if by_size := record.get("speeds"):
        lines = [["parameters, random", "removed", "prefill of 128 tokens", "decoding", "prefill", "decoding", "wanted", "met"]]
        for size, speeds in by_size.items():
            for name, values in speeds.items():
                ratios = (speeds["dense"]["prefill_ms"] / values["prefill_ms"],
                          values["decode_tokens_per_second"] / speeds["dense"]["decode_tokens_per_second"])  # fmt: skip
                wanted = None if name == "dense" else SPEEDS[float(name)]
                lines.append([size, "" if wanted is None else name, f"{values['prefill_ms']:.0f} ms",
                              f"{values['decode_tokens_per_second']:.1f} tokens/s", *(f"{ratio:.2f}x" for ratio in ratios),
                              *(("", "") if wanted is None else (f"{wanted:.1f}x", met(min(ratios) >= wanted)))])  # fmt: skip
        parts.append(table(lines, markdown=True))
    if found := record.get("importance"):
        base = found["forward and backward"]
        lines = [["scores of all groups", "seconds", "of forward and backward", "allowed", "met", "memory", "allowed", "met"]]
        for name, values in found.items():
            if name not in ("precision", "forward and backward"):
                ratios = values["seconds"] / base["seconds"], values["bytes"] / base["bytes"]
                lines.append([name, f"{values['seconds']:.1f}", f"{ratios[0]:.2f}x", f"{IMPORTANCE['seconds']}x",
                              met(ratios[0] <= IMPORTANCE["seconds"]), f"{ratios[1]:.2f}x", f"{IMPORTANCE['memory']}x",
                              met(ratios[1] <= IMPORTANCE["memory"])])  # fmt: skip
        parts.append(table(lines, markdown=True))
    parts.append("Removed: of the parameters in attention and FFN. Mean ± standard deviation over seeds. Excess: "
                 f"log-perplexity over the dense model's. {where(rows)}. Speeds, cost of importance: "
                 f"{record.get('speeds_on', 'not measured')}.")  # fmt: skip
    return "\n\n".join(parts) + "\n"


def main(argv=None) -> None:
    parser = Parser(__doc__, shared=("data_dir", "out_dir"))
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2], help="[0 1 2]")
    parser.add_argument("--seconds", type=float, default=10.0, help="of timing a model and measurement, at least [10]")
    parser.add_argument("--collect", action="store_true", help="run nothing; take the runs that are finished")
    parser.add_argument("--speed", action="store_true", help="only speeds and the cost of importance")
    parser.add_argument("--names", nargs="+", choices=(*UNTRAINED, *TRAINED, *PEERS),
                        help="only these rows, beside what is there")  # fmt: skip
    args = parser.parse_args(argv)
    path = RESULTS.with_suffix(".json")
    record = read_json(path) if path.exists() else {"runs": []}
    record |= {"command": "python benchmarks/structured_llm.py", "environment": environment()}

    def save() -> None:
        write_atomic(path, json.dumps(record, indent=1) + "\n")
        write_atomic(RESULTS.with_suffix(".md"), tables(record))

    if not (args.collect or args.names):
        here = environment() | {"gpus": []}  # both are of the CPU, whatever else there is
        record |= {"speeds": {size: measure_speeds(size, args.seconds) for size in LARGE}, "speeds_on": ran_on(here)}
        save()
        record |= {"importance": measure_importance()}
        save()
    wanted = args.names or (*UNTRAINED, *TRAINED, *PEERS)
    for seed in args.seeds if not args.speed else ():
        for name in wanted:
            if name in PEERS:
                found = {(name, 0.25, seed): run_peer(name, 0.25, seed, args)}
            else:
                flags, ratios = UNTRAINED.get(name) or (TRAINED[name], (None,))
                found = {(name, ratio, seed): prune(name, flags, ratio, seed, args) for ratio in ratios}
            there = read_json(path)["runs"] if path.exists() else []  # of others that run beside this one, too
            rows = {(row["name"], row["ratio"], row["seed"]): row for row in there}
            record["runs"] = list((rows | {key: row for key, row in found.items() if row}).values())
            save()
    print(tables(record))


if __name__ == "__main__":
    run_script(main)
