"""How much memory `main_block.py` takes for a model that is larger than it: a random Llama of 1.1 B parameters, pruned to 2:4.

    python benchmarks/streaming_memory.py                            wanda, fp32: about 15 GB of disk, minutes on two cores
    python benchmarks/streaming_memory.py --methods wanda sparsegpt --dtype bfloat16
    python benchmarks/streaming_memory.py --fast                     a small model: shows that it runs, and nothing else

The model has the shape of TinyLlama-1.1B and random weights: what memory is needed does not depend on how good they are. It is
written shard by shard, so that this script does not need the memory either, and kept below --out_dir. Tokenizer and
calibration text are made on the spot as well, of random words. For each method `main_block.py` runs in a process of its own.

Measured is the peak of that process's resident set (VmHWM of /proc/PID/status; elsewhere than Linux what psutil says, asked
every few milliseconds), and beside it what is Python's and not the model's: the peak of a process that only imports what
main_block.py imports, and that of the same run on a model of two megabytes. The target is a peak, all included, under a third
of the model's bytes. Hence fp32 by default (4.4 GB): a third of the same model in bf16 (2.2 GB) is hardly more than the
imports and the embeddings take, so there the target says more about Python than about streaming. --dtype bfloat16 shows it.

A target that is missed is reported as missed, and the exit status stays 0. Writes benchmarks/results/streaming_memory.json
and .md.
"""

from __future__ import annotations

import json
import math
import random
import shlex
import shutil
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import torch
import transformers
from tqdm import tqdm

REPOSITORY = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(REPOSITORY))

from common import checkpoint, runs, streaming  # noqa: E402

PRESETS = [
    # flag, full, fast, meaning, limits
    ("layers", 22, 2, "blocks of the model", (1, 1000)),
    ("hidden_size", 2048, 128, "its width", (16, 10**5)),
    ("ffn_size", 5632, 256, "width of its feed-forward layers", (16, 10**6)),
    ("heads", 32, 4, "heads of its attention", (1, 10**4)),
    ("kv_heads", 4, 2, "heads of its keys and values", (1, 10**4)),
    ("vocab_size", 32_000, 600, "its vocabulary", (600, 10**6)),
    ("nsamples", 8, 8, "pieces of calibration text", (1, 10**6)),
    ("seqlen", 256, 32, "tokens of each", (2, 2048)),
    ("dtype", "float32", "float32", "of the model's files", ("float32", "bfloat16", "float16")),
]
METHODS = ("magnitude", "wanda", "sparsegpt", "kfac")
TARGET = 1 / 3  # of the model's bytes, at most
N_WORDS = 500
IMPORTS = "import main_block"


def config_of(settings: dict) -> transformers.LlamaConfig:
    return transformers.LlamaConfig(
        vocab_size=settings["vocab_size"], hidden_size=settings["hidden_size"], intermediate_size=settings["ffn_size"],
        num_hidden_layers=settings["layers"], num_attention_heads=settings["heads"],
        num_key_value_heads=settings["kv_heads"], max_position_embeddings=2048, tie_word_embeddings=False, bos_token_id=0,
        eos_token_id=0, pad_token_id=0, dtype=settings["dtype"], architectures=["LlamaForCausalLM"],
    )  # fmt: skip


def shapes_of(config) -> Iterator[tuple[str, dict[str, tuple[int, ...]]]]:
    """The shards of a Llama, one a block and one for the rest: name of the file, names and shapes of its tensors."""
    width, inner = config.hidden_size, config.intermediate_size
    keys = width // config.num_attention_heads * config.num_key_value_heads
    block = {"self_attn.q_proj": (width, width), "self_attn.k_proj": (keys, width), "self_attn.v_proj": (keys, width),
             "self_attn.o_proj": (width, width), "mlp.gate_proj": (inner, width), "mlp.up_proj": (inner, width),
             "mlp.down_proj": (width, inner), "input_layernorm": (width,), "post_attention_layernorm": (width,)}  # fmt: skip
    n = config.num_hidden_layers + 1
    for i in range(config.num_hidden_layers):
        yield f"model-{i + 2:05d}-of-{n:05d}.safetensors", {f"model.layers.{i}.{k}.weight": v for k, v in block.items()}
    yield f"model-00001-of-{n:05d}.safetensors", {"model.embed_tokens.weight": (config.vocab_size, width),
                                                  "lm_head.weight": (config.vocab_size, width),
                                                  "model.norm.weight": (width,)}  # fmt: skip


def random_model(work: Path, settings: dict) -> Path:
    """A Llama's directory with random weights, written a shard at a time; one that is whole is left as it is."""
    folder = work / f"llama-{runs.fingerprint({k: v for k, v in settings.items() if k not in ('nsamples', 'seqlen')})}"
    index = folder / "model.safetensors.index.json"  # written last
    if index.exists():
        return folder
    config, dtype, seed = config_of(settings), getattr(torch, settings["dtype"]), settings["seed"]
    generator, weights, total = torch.Generator().manual_seed(seed), {}, 0
    config.save_pretrained(folder)
    save_tokenizer(folder, ["</s>", "<unk>", *random_words(seed)])
    for file, shapes in tqdm([*shapes_of(config)], "writing a random model", leave=False, disable=None):
        tensors = {}
        for name, shape in shapes.items():
            values = torch.randn(shape, generator=generator) * 0.02 if len(shape) > 1 else torch.ones(shape)
            tensors[name] = values.to(dtype)
        streaming.save_tensors(folder / file, tensors)
        weights |= dict.fromkeys(tensors, file)
        total += sum(tensor.numel() * tensor.element_size() for tensor in tensors.values())
    runs.write_atomic(index, json.dumps({"metadata": {"total_size": total}, "weight_map": weights}, indent=1) + "\n")
    return folder


def random_words(seed: int) -> list[str]:
    draw = random.Random(seed)
    return sorted({"".join(draw.choices("abcdefghijklmnopqrstuvwxyz", k=6)) for _ in range(N_WORDS)})


def save_tokenizer(folder: Path, words: list[str]) -> None:
    from tokenizers import Tokenizer, models, pre_tokenizers

    tokenizer = Tokenizer(models.WordLevel({word: i for i, word in enumerate(words)}, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    fast = transformers.PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token="</s>", unk_token="<unk>")
    fast.save_pretrained(folder)


def write_text(path: Path, n_tokens: int, seed: int) -> Path:
    """Plain text of random words, a hundred a document, of which what is not held out has `n_tokens` and more."""
    draw, words = random.Random(seed), random_words(seed)
    n = max(40, -(-n_tokens * 5 // 400))  # a tenth is held out
    runs.write_atomic(path, "\n\n".join(" ".join(draw.choices(words, k=100)) for _ in range(n)) + "\n")
    return path


def peak_of(command: list[str], log: Path) -> tuple[int, float]:
    """Bytes of a process's resident set at its peak, and its seconds. UserError, with the end of its output, if it fails.

    The kernel's own mark is read while the process runs. By getrusage a child has at least what its parent had.
    """
    start, peak = time.perf_counter(), 0
    with open(log, "w", encoding="utf-8") as file:
        process = subprocess.Popen(command, cwd=REPOSITORY, stdout=file, stderr=subprocess.STDOUT)
        try:
            while process.poll() is None:
                peak = max(peak, resident_peak(process.pid))
                time.sleep(0.005)
        finally:
            if process.poll() is None:
                process.terminate()
                process.wait()
    if process.returncode:
        last = (log.read_text(encoding="utf-8", errors="replace").strip().splitlines() or ["no output"])[-1]
        raise runs.UserError(f"{shlex.join(command[:2])} ...: exit status {process.returncode}: {last} (all of it: {log})")
    return peak, time.perf_counter() - start


def resident_peak(pid: int) -> int:
    """Bytes that a running process has had resident at most; 0 where it has just ended."""
    status = Path(f"/proc/{pid}/status")
    if sys.platform == "linux":
        try:
            found = status.read_text().partition("VmHWM:")[2].split()
        except OSError:
            return 0
        return int(found[0]) * 1024 if found else 0
    try:
        import psutil
    except ImportError:
        raise runs.UserError("memory cannot be measured here without psutil. Run: pip install psutil") from None
    try:
        info = psutil.Process(pid).memory_info()
    except psutil.Error:
        return 0
    return getattr(info, "peak_wset", info.rss)


def prune(method: str, model: Path, text: Path, args) -> dict:
    """One run of main_block.py: its command, peak and what it reached. The pruned model is removed again."""
    work = model.parent
    target = work / f"{model.name}-{method}"
    command = ["main_block.py", "--model", str(model), "--prune_method", method, "--sparsity_type", "2:4",
               "--nsamples", str(args.nsamples), "--seqlen", str(args.seqlen), "--calibration", str(text),
               "--offload_activations", "--save", str(target), "--seed", str(args.seed), "--device", args.device,
               "--resume", "never", "--run_name", target.name, "--data_dir", str(work / "data"),
               "--out_dir", str(work / "runs")]  # fmt: skip
    print(f"$ python {shlex.join(command)}", flush=True)
    try:
        peak, seconds = peak_of([sys.executable, *command], work / f"{target.name}.log")
        timings = runs.read_json(work / "runs" / "one_shot" / target.name / "run.json")["timings"]
        names = [f"{projection['name']}.weight" for projection in checkpoint.compression_stages(target)[-1]["projections"]]
        sparsity = streaming.measured_sparsity(target, names)
    finally:
        checkpoint.drop(target, *(work / "runs" / "one_shot").glob(f"{target.name}*"))
    shown = shlex.join(["python", *command]).replace(f"{work}/", "").replace(f"{work}\\", "")
    return {"command": shown, "peak": peak, "seconds": round(seconds, 1),
            "sparsity": sparsity, "timings": timings}  # fmt: skip


def main(argv=None) -> None:
    parser = runs.Parser(__doc__, PRESETS, ("seed", "device", "out_dir"))
    parser.add_argument("--methods", nargs="+", default=["wanda"], choices=METHODS, help="[wanda]")
    parser.add_argument("--results", type=Path, default=REPOSITORY / "benchmarks" / "results",
                        help="folder of the record and the table [benchmarks/results]")  # fmt: skip
    args = parser.parse_args(argv)
    if args.hidden_size % args.heads or args.heads % args.kv_heads or args.hidden_size // args.heads % 2:
        raise runs.UserError(f"--heads {args.heads}, --kv_heads {args.kv_heads}: expected the one to divide --hidden_size "
                             f"{args.hidden_size} into even parts, the other to divide --heads")  # fmt: skip
    runs.quiet_transformers()
    args.device = str(runs.resolve_device(args.device))
    settings = {row[0]: getattr(args, row[0]) for row in PRESETS} | {"seed": args.seed}
    work = args.out_dir.absolute() / "streaming_memory"
    n_parameters = sum(math.prod(shape) for _, shapes in shapes_of(config_of(settings)) for shape in shapes.values())
    n_bytes = n_parameters * getattr(torch, args.dtype).itemsize
    work.mkdir(parents=True, exist_ok=True)
    if (free := shutil.disk_usage(work).free) < 3.2 * n_bytes:  # the model, its pruned blocks, and the pruned model
        raise runs.UserError(f"{work}: {free / 1e9:.1f} GB are free, expected {3.2 * n_bytes / 1e9:.1f}. Use another --out_dir")
    words = work / f"words-{args.nsamples}x{args.seqlen}-seed{args.seed}.txt"
    text = write_text(words, args.nsamples * args.seqlen, args.seed)
    model = random_model(work, settings)
    tiny = random_model(work, {row[0]: row[2] for row in PRESETS} | {"seed": args.seed})
    imports, _ = peak_of([sys.executable, "-c", IMPORTS], work / "imports.log")
    floor = prune(args.methods[0], tiny, text, args)["peak"]
    found = {method: prune(method, model, text, args) for method in args.methods}

    rows = [["method", "model", "imports", "tiny model", "peak", "of the model", "target", "met", "sparsity", "seconds"]]
    for method, values in found.items():
        share = values["peak"] / n_bytes
        values |= {"share": share, "met": share < TARGET}
        sizes = [f"{size / 2**20:,.0f} MiB" for size in (n_bytes, imports, floor, values["peak"])]
        rows.append([method, *sizes, f"{share:.3f}", f"under {TARGET:.3f}", "yes" if values["met"] else "no",
                     f"{values['sparsity']:.4f}", f"{values['seconds']:.0f}"])  # fmt: skip
    how = "VmHWM of /proc/PID/status" if sys.platform == "linux" else "psutil, asked every 5 ms"
    where = (f"Random Llama of {n_parameters / 1e6:,.1f} M parameters in {args.dtype}, {args.layers} blocks, vocabulary "
             f"{args.vocab_size:,}; pruned to 2:4 with {args.nsamples} x {args.seqlen} tokens, activations on disk; "
             f"{args.device}, {torch.get_num_threads()} threads. Peak resident memory of the process ({how}); imports: of one "
             f"that does nothing else; tiny model: of the same run by {args.methods[0]} on a model of 2 MiB.")  # fmt: skip
    record = {"command": shlex.join(["python", "benchmarks/streaming_memory.py",
                                     *map(str, sys.argv[1:] if argv is None else argv)]),
              "environment": runs.environment() | {"device": args.device}, "settings": settings, "parameters": n_parameters,
              "model_bytes": n_bytes, "measured_by": how, "imports": imports, "tiny_model": floor,
              "target": TARGET, "runs": found}  # fmt: skip
    path = args.results / "streaming_memory.json"
    runs.write_atomic(path, json.dumps(record, indent=1) + "\n")
    runs.write_atomic(path.with_suffix(".md"), f"{runs.table(rows, markdown=True)}\n\n{where}\n")
    print(f"{runs.table(rows)}\n\n{where}\nrecord  {path}")


if __name__ == "__main__":
    runs.run_script(main)
