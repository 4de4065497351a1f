"""How fast `evaluate_perplexity` is, and what memory it takes, beside the plain loop over windows.

    python benchmarks/perplexity.py            a minute or two on two cores
    python benchmarks/perplexity.py --fast     fewer windows and repetitions

The plain loop is the one that is commonly written: one window a forward, `model(input_ids=window, labels=window).loss`, hence
the logits of all its positions in fp32 at once. The model is a Llama with random weights, made on the spot: neither time nor
memory depends on how good it is. Tokens are random too, or from `--tokens` (a .npy that `1_prepare_data.py` stored).

- Speed: both sides in turns in one process, over the same windows and a tail of half a window; ratios are of turns that follow
  each other.
- Memory: each side in a fresh process, the peak that it adds to what is there once the model is loaded: of the process's
  resident set, on CUDA of the allocator.

Both must find the same perplexity, to a relative 1e-5; a target that is missed is reported as missed, and the exit status stays
0. Writes benchmarks/results/perplexity.json and .md.
"""

from __future__ import annotations

import json
import math
import multiprocessing
import shlex
import statistics
import sys
import time
from contextlib import suppress
from pathlib import Path

import numpy as np
import torch
import transformers
from tqdm import tqdm

REPOSITORY = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(REPOSITORY))

from common import eval_utils, runs, train_utils  # noqa: E402

PRESETS = [
    # flag, full, fast, meaning, limits
    ("hidden_size", 256, 256, "width of the model, a multiple of 64", (64, 10**5)),
    ("n_layers", 6, 6, "its blocks", (1, 1000)),
    ("vocab_size", 32_000, 32_000, "its vocabulary", (2, 10**6)),
    ("token_length", 2048, 2048, "tokens of a window", (2, 10**6)),
    ("n_windows", 8, 2, "whole windows", (1, 10**6)),
    ("n_repeats", 7, 2, "turns of each side", (1, 10**6)),
    ("precision", "32", "32", "of the forwards", train_utils.PRECISIONS),
]
FASTER, SMALLER = 1.5, 0.5  # targets: tokens a second at least, added memory at most, against the plain loop
PLAIN, OURS = "plain loop", "evaluate_perplexity"


def random_model(settings: dict, device: torch.device):
    """A Llama with weights large enough that its logits differ."""
    torch.manual_seed(settings["seed"])
    width, n_heads = settings["hidden_size"], settings["hidden_size"] // 64
    config = transformers.LlamaConfig(
        vocab_size=settings["vocab_size"], hidden_size=width, intermediate_size=width * 8 // 3, num_attention_heads=n_heads,
        num_key_value_heads=n_heads // 2 if n_heads % 2 == 0 else n_heads, num_hidden_layers=settings["n_layers"],
        max_position_embeddings=settings["token_length"], initializer_range=0.1, tie_word_embeddings=True,
    )  # fmt: skip
    return transformers.LlamaForCausalLM(config).to(device).eval()


def plain_loop(model, tokens: np.ndarray, token_length: int, precision: str) -> float:
    """Perplexity, one window after the other."""
    nll, n = 0.0, 0
    with torch.no_grad():
        for start in range(0, len(tokens) - 1, token_length):
            window = torch.from_numpy(tokens[start : start + token_length].astype(np.int64))[None].to(model.device)  # (1, T)
            with train_utils.autocast(model.device, precision):
                loss = model(input_ids=window, labels=window).loss
            nll += loss.item() * (window.shape[1] - 1)
            n += window.shape[1] - 1
    return math.exp(nll / n)


def ours(model, tokens: np.ndarray, token_length: int, precision: str) -> float:
    return eval_utils.evaluate_perplexity(model, tokens, token_length, precision=precision)["perplexity"]


SIDES = {PLAIN: plain_loop, OURS: ours}


def added_memory(name: str, settings: dict, tokens: np.ndarray, device_name: str) -> int:
    """Bytes that one side adds at its peak to a process of its own that holds the model."""
    arguments = (name, settings, tokens, device_name, torch.get_num_threads())
    with multiprocessing.get_context("spawn").Pool(1) as pool:
        return pool.apply(_added_memory, arguments)


def _added_memory(name: str, settings: dict, tokens: np.ndarray, device_name: str, threads: int) -> int:
    torch.set_num_threads(threads)
    device = torch.device(device_name)
    model = random_model(settings, device)
    SIDES[name](model, tokens[:16], 16, settings["precision"])  # the libraries' own buffers
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
        before = torch.cuda.memory_allocated(device)
        SIDES[name](model, tokens, settings["token_length"], settings["precision"])
        return torch.cuda.max_memory_allocated(device) - before
    with suppress(OSError):
        Path("/proc/self/clear_refs").write_text("5")  # Linux: the peak is counted from here
    before = eval_utils.resident_peak()
    SIDES[name](model, tokens, settings["token_length"], settings["precision"])
    return eval_utils.resident_peak() - before


def timed(name: str, model, tokens: np.ndarray, settings: dict) -> tuple[float, float]:
    """Seconds of one side's turn, and the perplexity that it found."""
    start = time.perf_counter()
    found = SIDES[name](model, tokens, settings["token_length"], settings["precision"])  # which waits for the device
    return time.perf_counter() - start, found


def main(argv=None) -> None:
    parser = runs.Parser(__doc__, PRESETS, ("seed", "device"))
    parser.add_argument("--tokens", type=Path, help="stream of tokens, a .npy of integers below --vocab_size [random ones]")
    parser.add_argument("--results", type=Path, default=REPOSITORY / "benchmarks" / "results",
                        help="folder of the record and the table [benchmarks/results]")  # fmt: skip
    args = parser.parse_args(argv)
    if args.hidden_size % 64:
        raise runs.UserError(f"--hidden_size {args.hidden_size}: expected a multiple of 64")
    runs.quiet_transformers()
    device = runs.resolve_device(args.device)
    args.precision = train_utils.resolve_precision(args.precision, device)
    settings = {row[0]: getattr(args, row[0]) for row in PRESETS} | {"seed": args.seed}
    n = args.n_windows * args.token_length + args.token_length // 2
    if args.tokens:
        if not args.tokens.is_file():
            raise runs.UserError(f"{args.tokens}: not found. Expected a .npy of tokens")
        tokens = np.array(np.load(args.tokens, mmap_mode="r")[:n])
    else:
        tokens = np.random.default_rng(args.seed).integers(0, args.vocab_size, n)
    memory = {name: added_memory(name, settings, tokens, str(device)) for name in tqdm(SIDES, "memory", leave=False)}

    model = random_model(settings, device)
    names, seconds, found = [*SIDES], {name: [] for name in SIDES}, {}
    for i in tqdm(range(args.n_repeats + 1), "speed", leave=False):  # the first is not counted
        for name in names if i % 2 else names[::-1]:
            took, found[name] = timed(name, model, tokens, settings)
            seconds[name] += [took] if i else []
    difference = abs(found[OURS] / found[PLAIN] - 1)
    if not difference <= 1e-5:
        raise AssertionError(f"perplexity {found[OURS]} by {OURS}, {found[PLAIN]} by the {PLAIN}")

    rates = {name: [len(tokens) / value for value in values] for name, values in seconds.items()}
    ratios = [ours / plain for ours, plain in zip(rates[OURS], rates[PLAIN], strict=True)]
    low, faster, high = (float(value) for value in np.quantile(ratios, (0.25, 0.5, 0.75)))
    smaller = memory[OURS] / memory[PLAIN]
    rows = [["", PLAIN, OURS, "ratio", "quartiles", "n", "target", "met"],
            ["tokens a second", *(f"{statistics.median(rates[name]):,.0f}" for name in SIDES), f"{faster:.2f}x",
             f"{low:.2f}x to {high:.2f}x", len(ratios), f"at least {FASTER}x", "yes" if faster >= FASTER else "no"],
            ["peak memory added", *(f"{memory[name] / 2**20:,.0f} MiB" for name in SIDES), f"{smaller:.2f}x",
             "", 1, f"at most {SMALLER}x", "yes" if smaller <= SMALLER else "no"]]  # fmt: skip
    n_parameters = sum(parameter.numel() for parameter in model.parameters())
    where = (f"Random Llama of {n_parameters / 1e6:.1f} M parameters, vocabulary {args.vocab_size:,}; {len(tokens):,} tokens "
             f"in windows of {args.token_length:,}; {device}, {torch.get_num_threads()} threads; precision {args.precision}. "
             f"The perplexities differ by a relative {difference:.0e}.")  # fmt: skip
    record = {"command": shlex.join(["python", "benchmarks/perplexity.py", *map(str, sys.argv[1:] if argv is None else argv)]),
              "environment": runs.environment() | {"device": str(device)},
              "settings": settings | {"tokens": str(args.tokens or "random"), "n_tokens": len(tokens)},
              "parameters": n_parameters,
              "perplexity": found, "tokens_per_second": rates, "speed_ratio": {"median": faster, "p25": low, "p75": high},
              "added_memory": memory, "memory_ratio": smaller}  # fmt: skip
    path = args.results / "perplexity.json"
    runs.write_atomic(path, json.dumps(record, indent=1) + "\n")
    runs.write_atomic(path.with_suffix(".md"), f"{runs.table(rows, markdown=True)}\n\n{where}\n")
    print(f"{runs.table(rows)}\n\n{where}\nrecord  {path}")


if __name__ == "__main__":
    runs.run_script(main)
