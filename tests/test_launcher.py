"""run_dense_finetune_block_20sparsity.sh with a nvidia-smi and a python that only write down how they were called."""

import importlib.util
import json
import os
import pty
import re
import select
import shlex
import shutil
import signal
import subprocess
import sys
import termios
import time
from pathlib import Path

import pytest

from common import runs
from common.runs import REPOSITORY

pytestmark = pytest.mark.skipif(sys.platform == "win32", reason="the launcher is a bash script for Linux and macOS")

SCRIPT = REPOSITORY / "run_dense_finetune_block_20sparsity.sh"
BASH = shutil.which("bash")
TRAIN = str(REPOSITORY / "finetune_dense.py")
PRUNE = str(REPOSITORY / "main_block.py")
DEFAULT_MODEL = "out/llama2_7b/block_16x16_20sparsity/wanda/pruned_model"
FAST_MODEL = "out/tiny_llama/block_16x16_20sparsity/kfac/pruned_model"
LARGE = 81920
RULE = "=" * 42

# Takes the place of python. Checks and prunings end at once with the status that FAKE_CHECK and FAKE_PRUNE say; training too,
# with FAKE_TRAIN, unless that is "wait": then it starts a process of its own, both note the signals that come, and it ends with
# 130 half a second after the first, its process with it.
FAKE_PYTHON = r"""
import json, os, pathlib, signal, sys, time

here, argv = pathlib.Path(os.environ["FAKE_DIR"]), sys.argv[1:]
kind = "prune" if argv[0].endswith("main_block.py") else "check" if "--dry_run" in argv else "train"
call = {"kind": kind, "argv": argv, "env": {k: v for k, v in os.environ.items() if k.startswith("CUDA_")}, "pid": os.getpid(),
        "terminal": sys.stdin.isatty()}
with open(here / "calls", "a") as file:
    file.write(json.dumps(call) + "\n")
status = os.environ.get(f"FAKE_{kind.upper()}", "0")
if kind == "check":
    print("the memory table", flush=True)
if kind == "prune" and status == "0":
    save = pathlib.Path(argv[argv.index("--save") + 1])
    save.mkdir(parents=True)
    (save / "config.json").touch()
if status == "wait":
    first, parent = [], os.getpid()

    def note(number, frame):
        with open(here / ("signals" if os.getpid() == parent else "signals of its process"), "a") as file:
            file.write(signal.Signals(number).name + "\n")
        first.append(time.monotonic())

    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP, signal.SIGQUIT):
        signal.signal(number, note)
    if os.fork() == 0:
        (here / "ready").touch()
        while os.getppid() == parent:
            time.sleep(0.02)
        sys.exit()
    while not first or time.monotonic() < first[0] + 0.5:
        time.sleep(0.02)
    status = "130"
sys.exit(int(status))
"""


class Launcher:
    """The script with fakes, in an empty directory."""

    def __init__(self, tmp_path: Path):
        self.bin, self.cwd, self.notes = tmp_path / "bin", tmp_path / "work", tmp_path / "notes"
        for folder in (self.bin, self.cwd, self.notes):
            folder.mkdir()
        for tool in ("cat", "dirname", "tr"):  # all that the script needs, and no nvidia-smi
            (self.bin / tool).symlink_to(shutil.which(tool))
        (self.notes / "fake.py").write_text(FAKE_PYTHON)
        self.python = self.program(
            "python", f'exec {shlex.quote(sys.executable)} -S -E {shlex.quote(str(self.notes / "fake.py"))} "$@"'
        )
        self.env = {"PATH": str(self.bin), "FAKE_DIR": str(self.notes)}

    def program(self, name: str, body: str) -> Path:
        (self.bin / name).write_text(f"#!/bin/sh\n{body}\n")
        (self.bin / name).chmod(0o755)
        return self.bin / name

    def gpus(self, *listed) -> None:
        """A nvidia-smi with these GPUs: a number of free MiB, or the text of the line behind the index."""
        lines = [f"{i}, {LARGE}, {gpu}" if isinstance(gpu, int) else f"{i}, {gpu}" for i, gpu in enumerate(listed)]
        query = "--query-gpu=index,memory.total,memory.free --format=csv,noheader,nounits"
        shown = "\n".join(f"echo {shlex.quote(line)}" for line in lines)
        self.program("nvidia-smi", f'[ "$*" = "{query}" ] || exit 64\n{shown}')

    def model(self, path: str = DEFAULT_MODEL) -> str:
        (self.cwd / path).mkdir(parents=True)
        (self.cwd / path / "config.json").touch()
        return path

    def command(self, flags) -> dict:
        return {"args": [BASH, str(SCRIPT), *flags], "cwd": self.cwd, "env": self.env, "preexec_fn": default_signals}

    def __call__(self, *flags, **env) -> subprocess.CompletedProcess:
        self.env |= env
        return subprocess.run(
            **self.command(flags), stdin=subprocess.DEVNULL, capture_output=True, text=True, check=False, timeout=60
        )

    def calls(self, kind: str | None = None) -> list[dict]:
        path = self.notes / "calls"
        found = [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else []
        return [call for call in found if kind in (None, call["kind"])]

    def trained(self) -> list[str]:
        """The words of the one training."""
        (call,) = self.calls("train")
        return call["argv"]

    def refused(self, *flags, **env) -> str:
        """The message with which nothing is started."""
        before = self.calls("train") + self.calls("prune")
        done = self(*flags, **env)
        assert (done.returncode, self.calls("train") + self.calls("prune")) == (2, before)
        assert done.stderr.startswith("error: ") and done.stderr.count("\n") == 1
        return done.stderr.removeprefix("error: ").removesuffix("\n")


def default_signals() -> None:
    """What a shell gives its commands, also where the tests were started with Ctrl+C ignored."""
    for number in (signal.SIGINT, signal.SIGQUIT, signal.SIGHUP, signal.SIGTERM):
        signal.signal(number, signal.SIG_DFL)


@pytest.fixture
def launcher(tmp_path):
    return Launcher(tmp_path)


@pytest.fixture
def ready(launcher):
    """Eight large GPUs and a pruned model."""
    launcher.gpus(*[LARGE] * 8)
    launcher.model()
    return launcher


def value_of(words: list[str], flag: str) -> str:
    assert words.count(flag) == 1
    return words[words.index(flag) + 1]


# ------------------------------------------------------------------------------------------------------------ the script


def test_it_is_executable_and_parses():
    assert os.access(SCRIPT, os.X_OK)
    assert subprocess.run([BASH, "-n", SCRIPT], check=False).returncode == 0


def test_shellcheck_has_nothing_to_say():
    shellcheck = shutil.which("shellcheck", path=f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}")
    assert shellcheck, "pip install -r requirements-dev.txt"
    done = subprocess.run([shellcheck, SCRIPT], capture_output=True, text=True, check=False)
    assert (done.returncode, done.stdout) == (0, "")


def test_nothing_that_bash_3_2_does_not_know():
    """macOS has no other."""
    code = re.sub(r"(?m)(^|\s)#.*$", "", SCRIPT.read_text(encoding="utf-8"))
    newer = r"mapfile|readarray|(declare|local|typeset) -|\$\{\w+(\[[^]]*\])?(,|\^|@)|wait -n|&>>|\|&|\bcoproc\b|;;?&|\[-\d"
    assert not re.search(newer, code)
    empty_at_times = ("HANDED_ON", "COUNTS", "MAKE_MODEL", "CHOSEN", "IDS", "VISIBLE")
    guarded = re.findall(r'\$\{HANDED_ON\[@\]\+"\$\{HANDED_ON\[@\]\}"\}', code)
    assert len(guarded) == 1 and code.count('"${HANDED_ON[@]}"') == 1
    assert all(f"${{#{name}[@]}}" in code for name in empty_at_times if name != "HANDED_ON")  # counted before it is expanded


def test_help(launcher):
    for flag in ("--help", "-h"):
        done = launcher(flag)
        assert (done.returncode, done.stderr, launcher.calls()) == (0, "", [])
    lines = done.stdout.splitlines()
    assert lines[0] == "Usage: run_dense_finetune_block_20sparsity.sh [OPTIONS] [-- FLAGS OF finetune_dense.py]"
    for line in (
        "  --num_gpus N        Number of GPUs to use (default: 1)",
        '  --gpu_ids "X,Y"     Comma-separated GPU IDs (default: "2", or the first one if there is no such GPU)',
        "  -h, --help          Show this help message",
        "  Single GPU (default):     ./run_dense_finetune_block_20sparsity.sh",
        '  Single GPU (GPU 3):       ./run_dense_finetune_block_20sparsity.sh --num_gpus 1 --gpu_ids "3"',
        '  Dual GPU (GPU 2,3):       ./run_dense_finetune_block_20sparsity.sh --num_gpus 2 --gpu_ids "2,3"',
        '  Quad GPU (GPU 0-3):       ./run_dense_finetune_block_20sparsity.sh --num_gpus 4 --gpu_ids "0,1,2,3"',
    ):
        assert line in lines
    assert "hours" not in done.stdout  # nobody measured them


def test_every_flag_is_in_the_help(launcher):
    shown = set(re.findall(r"^  (?:-h, )?--([a-z_]+)", launcher("--help").stdout, re.MULTILINE))
    known = re.findall(r"^        ([a-z_| ]+)\)$", SCRIPT.read_text(encoding="utf-8").split("HANDED_ON=()")[0], re.MULTILINE)
    assert shown == {name for line in known for name in line.split(" | ")} - {""}


# ------------------------------------------------------------------------------------------------------------- the banner

BANNER = f"""{RULE}
Dense Fine-tuning Configuration
{RULE}
Method: Full fine-tuning with SparseTrainer
Pruned model: out/llama2_7b/block_16x16_20sparsity/wanda/pruned_model
Output directory: out/llama2_7b/block_16x16_20sparsity/wanda/dense_finetuned_model
Dataset: wikitext (wikitext-2-raw-v1)

GPU Configuration:
  Number of GPUs: 2
  GPU IDs: 2,3
  Training mode: Multi-GPU (torchrun)

Training Parameters:
  Number of epochs: 3
  Learning rate: 5e-5
  Per-device batch size: 1
  Gradient accumulation: 4
  Effective batch size: 8
  Block size: 1024
  Max train samples: 30000
  Precision: bf16
{RULE}

Available GPU memory: 81920 MB (~80 GB)
the memory table

🚀 Starting dense fine-tuning with SparseTrainer...
Training mode: 2 GPU(s) on device(s): 2,3
Effective batch size: 8
{RULE}
Using multi-GPU training with torchrun (2 GPUs)...
"""


def test_the_guides_run_on_two_gpus(ready):
    done = ready("--num_gpus", "2", "--gpu_ids", "2,3")
    assert (done.returncode, done.stderr) == (0, "")
    assert done.stdout.startswith(BANNER)
    check, train = ready.calls()
    training = [
        *(TRAIN, "--model", DEFAULT_MODEL, "--save", DEFAULT_MODEL.replace("pruned", "dense_finetuned"), "--method", "full"),
        *("--device", "cuda", "--num_epochs", "3", "--learning_rate", "5e-5", "--batch_size", "1"),
        *("--gradient_accumulation_steps", "4", "--block_size", "1024", "--max_train_samples", "30000"),
        *("--dataset", "wikitext2", "--precision", "bf16"),
    ]
    assert check["argv"] == [*training, "--dry_run", "--num_processes", "2", "--gpu_memory", "81920"]
    torchrun = ["-m", "torch.distributed.run", "--nproc_per_node", "2", "--shutdown_timeout", "900", "--standalone"]
    assert train["argv"] == [*torchrun, *training]
    assert check["env"] == train["env"] == {"CUDA_VISIBLE_DEVICES": "2,3", "CUDA_DEVICE_ORDER": "PCI_BUS_ID"}


def test_one_gpu_is_plain_python(ready):
    done = ready()
    assert ready.trained()[:3] == [TRAIN, "--model", DEFAULT_MODEL]
    for line in ("  Training mode: Single GPU", "Training mode: 1 GPU(s) on device(s): 2", "Using single-GPU training..."):
        assert line in done.stdout.splitlines()


def test_next_steps(ready):
    done = ready("--output_dir", "out/my model")
    assert done.returncode == 0
    assert done.stdout.endswith("""
✅ Fine-tuning finished: out/my model

Next steps:
1. Evaluate the model:
   python main_block.py --model out/my\\ model --eval
2. Check that it is as sparse as before:
   from transformers import AutoModelForCausalLM
   from common.sparse_trainer import check_sparsity
   model = AutoModelForCausalLM.from_pretrained("out/my model")
   print(f"Sparsity: {check_sparsity(model):.4f}")
""")


def test_lora(ready):
    done = ready("--method", "lora")
    assert value_of(ready.trained(), "--method") == "lora"
    assert value_of(ready.trained(), "--save") == DEFAULT_MODEL.replace("pruned", "lora_finetuned")
    assert "Method: LoRA fine-tuning with SparseTrainer\n" in done.stdout
    assert "🚀 Starting LoRA fine-tuning with SparseTrainer...\n" in done.stdout


@pytest.mark.parametrize(
    ("model", "expected"), [("a/b/pruned_model/", "a/b/dense_finetuned_model"), ("m", "dense_finetuned_model")]
)
def test_the_output_is_beside_the_model(ready, model, expected):
    ready.model(model)
    ready("--model", model)
    assert value_of(ready.trained(), "--save") == expected
    assert value_of(ready.trained(), "--model") == model.rstrip("/")


# ---------------------------------------------------------------------------------------------------- batch and several GPUs


@pytest.mark.parametrize(("n", "steps"), [(1, 8), (2, 4), (4, 2), (8, 1)])
def test_accumulation_keeps_the_batch(ready, n, steps):
    done = ready("--num_gpus", str(n))
    assert value_of(ready.trained(), "--gradient_accumulation_steps") == str(steps)
    assert f"  Gradient accumulation: {steps}\n  Effective batch size: 8\n" in done.stdout
    assert ready.calls("train")[0]["env"]["CUDA_VISIBLE_DEVICES"] == ",".join(map(str, range(n)))
    assert ("torch.distributed.run" in ready.trained()) == (n > 1)


@pytest.mark.parametrize("n", [3, 5, 6, 7])
def test_counts_that_do_not_divide_the_batch_are_refused(ready, n):
    message = ready.refused("--num_gpus", str(n))
    assert message == (f"--num_gpus {n}: a batch of 1 x {n} x 1 machines does not divide the effective batch size 8; "
                       "these do: 1,2,4,8")  # fmt: skip
    assert ready.calls() == []


def test_counts_that_divide_depend_on_batch_and_machines(ready):
    nodes = ("--nnodes", "2", "--node_rank", "0", "--rdzv_endpoint", "a:1")
    assert ready.refused("--num_gpus", "8", *nodes).endswith(
        "x 8 x 2 machines does not divide the effective batch size 8; these do: 1,2,4"
    )
    assert ready.refused("--num_gpus", "4", "--", "--batch_size", "4").endswith("these do: 1,2")
    assert ready.refused("--", "--batch_size", "3").endswith("these do: none")
    assert ready.refused("--", "--batch_size", "16").endswith("these do: none")


def test_another_effective_batch(ready):
    done = ready("--num_gpus", "2", "--", "--effective_batch_size", "32", "--batch-size=4")
    words = ready.trained()
    assert value_of(words, "--gradient_accumulation_steps") == "4" and value_of(words, "--batch_size") == "4"
    assert "--effective_batch_size" not in words
    assert "  Per-device batch size: 4\n  Gradient accumulation: 4\n  Effective batch size: 32\n" in done.stdout


def test_accumulation_that_is_given_makes_the_batch(ready):
    done = ready("--num_gpus", "3", "--", "--gradient_accumulation_steps", "5")
    assert value_of(ready.trained(), "--gradient_accumulation_steps") == "5"
    assert "  Gradient accumulation: 5\n  Effective batch size: 15\n" in done.stdout


def test_several_machines(ready):
    done = ready("--nnodes", "2", "--node_rank", "1", "--rdzv_endpoint", "10.0.0.1:29500", "--num_gpus", "2")
    assert done.returncode == 0
    assert ready.trained()[:17] == [
        *("-m", "torch.distributed.run", "--nproc_per_node", "2", "--shutdown_timeout", "900"),
        *("--nnodes", "2", "--node_rank", "1", "--rdzv_backend", "static", "--rdzv_endpoint", "10.0.0.1:29500"),
        *("--rdzv_id", "dense_finetune", TRAIN),
    ]
    assert value_of(ready.trained(), "--gradient_accumulation_steps") == "2"
    assert value_of(ready.calls("check")[0]["argv"], "--num_processes") == "4"
    assert "  Machines: 2, this is number 1, rendezvous at 10.0.0.1:29500\n" in done.stdout
    assert "Next steps" not in done.stdout  # the model is on machine 0


def test_one_process_on_each_of_several_machines_is_torchrun(ready):
    done = ready("--nnodes", "4", "--node_rank", "0", "--rdzv_endpoint", "a:1")
    assert value_of(ready.trained(), "--nproc_per_node") == "1" and value_of(ready.trained(), "--nnodes") == "4"
    assert value_of(ready.trained(), "--gradient_accumulation_steps") == "2"
    assert "Next steps" in done.stdout


@pytest.mark.parametrize(("flags", "message"), [
    ("--nnodes 2 --node_rank 0", "--nnodes 2: needs --rdzv_endpoint HOST:PORT, the address of machine 0"),
    ("--nnodes 2 --node_rank 0 --rdzv_endpoint host", "--nnodes 2: needs --rdzv_endpoint HOST:PORT, the address of machine 0"),
    ("--nnodes 2 --rdzv_endpoint a:1", "--nnodes 2: needs --node_rank, the number of this machine from 0 to 1"),
    ("--nnodes 2 --rdzv_endpoint a:1 --node_rank 2", "--nnodes 2: needs --node_rank, the number of this machine from 0 to 1"),
    ("--nnodes 2 --rdzv_endpoint a:1 --node_rank x", "--nnodes 2: needs --node_rank, the number of this machine from 0 to 1"),
    ("--node_rank 1", "--node_rank and --rdzv_endpoint: are of several machines; give --nnodes 2 or more"),
    ("--rdzv_endpoint a:1", "--node_rank and --rdzv_endpoint: are of several machines; give --nnodes 2 or more"),
    ("--nnodes 0", "--nnodes 0: expected a number of 1 or more"),
])  # fmt: skip
def test_machines_that_are_refused(ready, flags, message):
    assert ready.refused(*flags.split()) == message
    assert ready.calls() == []


# ------------------------------------------------------------------------------------------------------------ which GPUs


@pytest.mark.parametrize(("n_gpus", "flags", "visible", "expected"), [
    (4, "", None, "2"),
    (2, "", None, "0"),
    (4, "--num_gpus 2", None, "0,1"),
    (4, "--num_gpus 1", None, "0"),
    (4, "--gpu_ids 3,1", None, "3,1"),
    (4, "--gpu_ids 3 --num_gpus 1", None, "3"),
    (4, "", "3,1", "1"),
    (4, "", "1,2,3", "2"),
    (4, "--num_gpus 2", "3,1", "1,3"),
    (4, "--gpu_ids 0", "3", "0"),
    (4, "", "", "2"),
    (4, "", "GPU-1b2c", "2"),
])  # fmt: skip
def test_the_gpus_that_are_taken(launcher, n_gpus, flags, visible, expected):
    """By number as nvidia-smi counts; without a choice GPU 2 or the first ones, of those that a scheduler gave."""
    launcher.gpus(*[LARGE] * n_gpus)
    launcher.model()
    done = launcher(*flags.split(), **({} if visible is None else {"CUDA_VISIBLE_DEVICES": visible}))
    assert done.returncode == 0
    assert launcher.calls("train")[0]["env"]["CUDA_VISIBLE_DEVICES"] == expected
    assert f"  GPU IDs: {expected}\n" in done.stdout
    said = f"There is no GPU 2, the default: using GPU {expected}\n"
    assert (said in done.stdout) == (flags == "" and expected != "2")


@pytest.mark.parametrize(("flags", "message"), [
    ("--num_gpus 8", "--num_gpus 8: there are 4 GPUs (0,1,2,3)"),
    ("--gpu_ids 7", "--gpu_ids 7: no GPU 7; there are 0,1,2,3"),
    ("--gpu_ids 0,7", "--gpu_ids 0,7: no GPU 7; there are 0,1,2,3"),
    ("--gpu_ids 01", "--gpu_ids 01: no GPU 01; there are 0,1,2,3"),
    ("--gpu_ids 1,0,1", "--gpu_ids 1,0,1: GPU 1 is named twice"),
    ("--gpu_ids 0,1 --num_gpus 4", "--num_gpus 4: --gpu_ids 0,1 are 2"),
    ("--gpu_ids 0,1 --num_gpus 1", "--num_gpus 1: --gpu_ids 0,1 are 2"),
    ("--gpu_ids two", "--gpu_ids two: expected numbers with commas between them, as 2,3"),
    ("--gpu_ids 0,,1", "--gpu_ids 0,,1: expected numbers with commas between them, as 2,3"),
    ("--gpu_ids 0,", "--gpu_ids 0,: expected numbers with commas between them, as 2,3"),
    ("--num_gpus two", "--num_gpus two: expected a number of 1 or more"),
    ("--num_gpus 0", "--num_gpus 0: expected a number of 1 or more"),
    ("--num_gpus -1", "--num_gpus -1: expected a number of 1 or more"),
    ("--num_gpus 2.0", "--num_gpus 2.0: expected a number of 1 or more"),
    ("--num_gpus 99999999999999999999", "--num_gpus 99999999999999999999: expected a number of 1 or more"),
    ("--device cpu --gpu_ids 0", "--gpu_ids 0: training is on the CPU. Leave it out"),
])  # fmt: skip
def test_gpus_that_are_refused(launcher, flags, message):
    launcher.gpus(*[LARGE] * 4)
    launcher.model()
    assert launcher.refused(*flags.split()) == message
    assert launcher.calls() == []


def test_spaces_between_ids_are_fine(ready):
    ready("--gpu_ids", "2, 3")
    assert ready.calls("train")[0]["env"]["CUDA_VISIBLE_DEVICES"] == "2,3"


def test_gpus_that_a_scheduler_gave_and_that_are_not_there(ready):
    assert ready.refused(CUDA_VISIBLE_DEVICES="9") == "CUDA_VISIBLE_DEVICES=9: no such GPU; there are 0,1,2,3,4,5,6,7"
    assert ready.refused("--num_gpus", "2", CUDA_VISIBLE_DEVICES="3") == "--num_gpus 2: there are 1 GPUs (3)"


# -------------------------------------------------------------------------------------------------------- without a GPU

HOW = "For a trial on the CPU: --fast; to train this model on it: --device cpu"


@pytest.mark.parametrize(("smi", "why"), [
    (None, "there is no nvidia-smi"),
    ("echo NVIDIA-SMI has failed\nexit 9", "nvidia-smi fails"),
    ("echo No devices were found", "nvidia-smi lists none"),
])  # fmt: skip
def test_no_gpu(launcher, smi, why):
    launcher.model()
    if smi:
        launcher.program("nvidia-smi", smi)
    assert launcher.refused() == f"no NVIDIA GPU: {why}. {HOW}"
    assert launcher.refused("--fast", "--device", "cuda") == f"no NVIDIA GPU: {why}. {HOW}"
    assert launcher.refused("--fast", "--gpu_ids", "0") == "--gpu_ids 0: training is on the CPU. Leave it out"


@pytest.mark.parametrize("n", [1, 2])
def test_the_cpu_when_asked_for(ready, n):
    """Also where there are GPUs; nothing asks nvidia-smi, and there is no memory to compare with."""
    ready.program("nvidia-smi", ': >"$FAKE_DIR/asked"')
    done = ready("--device", "cpu", "--num_gpus", str(n))
    assert done.returncode == 0 and not (ready.notes / "asked").exists()
    words = ready.trained()
    assert value_of(words, "--device") == "cpu" and "--precision" not in words
    assert value_of(words, "--gradient_accumulation_steps") == str(8 // n)
    assert ready.calls("train")[0]["env"]["CUDA_VISIBLE_DEVICES"] == ""
    assert "--gpu_memory" not in ready.calls("check")[0]["argv"]
    assert ("torch.distributed.run" in words) == (n == 2)
    mode = {1: "CPU", 2: "CPU (torchrun)"}[n]
    assert f"  Number of GPUs: 0 ({n} process(es) on the CPU)\n  GPU IDs: none\n  Training mode: {mode}\n" in done.stdout
    assert "Available GPU memory" not in done.stdout


def test_a_precision_that_is_given_holds_on_the_cpu_too(ready):
    ready("--device", "cpu", "--", "--precision", "bf16")
    assert value_of(ready.trained(), "--precision") == "bf16"


# ------------------------------------------------------------------------------------------------------------------ fast


def test_fast_prunes_and_trains_on_the_cpu(launcher):
    done = launcher("--fast")
    assert (done.returncode, done.stderr) == (0, "")
    prune, check, train = launcher.calls()
    assert prune["argv"] == [PRUNE, "--fast", "--prune_method", "kfac", "--sparsity_type", "block", "--block_size", "16",
                             "--sparsity_ratio", "0.2", "--save", FAST_MODEL]  # fmt: skip
    training = [TRAIN, "--model", FAST_MODEL, "--save", FAST_MODEL.replace("pruned", "dense_finetuned"), "--method", "full",
                "--device", "cpu", "--fast"]  # fmt: skip
    assert check["argv"] == [*training, "--dry_run", "--num_processes", "1"]
    assert train["argv"] == training
    for name in ("Dataset", "  Number of epochs", "  Learning rate", "  Per-device batch size", "  Gradient accumulation",
                 "  Effective batch size", "  Block size", "  Max train samples"):  # fmt: skip
        assert f"{name}: (fast preset)\n" in done.stdout
    assert "  Precision: auto\n" in done.stdout


def test_fast_prunes_once(launcher):
    launcher("--fast")
    launcher("--fast")
    assert [call["kind"] for call in launcher.calls()] == ["prune", "check", "train", "check", "train"]


def test_fast_takes_a_gpu_where_there_is_one(launcher):
    launcher.gpus(LARGE)
    launcher.model(FAST_MODEL)
    launcher("--fast")
    words = launcher.trained()
    assert value_of(words, "--device") == "cuda" and "--precision" not in words
    assert launcher.calls("train")[0]["env"]["CUDA_VISIBLE_DEVICES"] == "0"


def test_fast_in_several_processes(launcher):
    launcher("--fast", "--num_gpus", "3")
    assert value_of(launcher.trained(), "--nproc_per_node") == "3"
    assert "--gradient_accumulation_steps" not in launcher.trained()
    assert value_of(launcher.calls("check")[0]["argv"], "--num_processes") == "3"


def test_what_is_given_beats_the_fast_preset(launcher):
    done = launcher("--fast", "--", "--num_epochs", "2", "--effective_batch_size", "32", "--data_dir", "my data")
    words = launcher.trained()
    assert value_of(words, "--num_epochs") == "2" and value_of(words, "--effective_batch_size") == "32"
    assert "--learning_rate" not in words and "--dataset" not in words
    assert "  Number of epochs: 2\n" in done.stdout and "  Effective batch size: 32\n" in done.stdout
    assert launcher.calls("prune")[0]["argv"][-2:] == ["--data_dir", "my data"] and value_of(words, "--data_dir") == "my data"


def test_a_pruning_that_fails_ends_it(launcher):
    done = launcher("--fast", FAKE_PRUNE="2")
    assert (done.returncode, [call["kind"] for call in launcher.calls()]) == (2, ["prune"])


# ------------------------------------------------------------------------------------------------------------- the model


def test_a_missing_model_says_what_makes_it(launcher):
    launcher.gpus(LARGE)
    pattern = "--sparsity_type block --block_size 16 --sparsity_ratio 0.2 --save"
    missing = "no pruned model there. Run"
    assert launcher.refused() == (f"{DEFAULT_MODEL}: {missing}: python main_block.py --model meta-llama/Llama-2-7b-hf "
                                  f"--prune_method wanda {pattern} {DEFAULT_MODEL}")  # fmt: skip
    assert launcher.refused("--model", "my model") == (f"my model: {missing}: python main_block.py --model DENSE_MODEL "
                                                       f"--prune_method wanda {pattern} my\\ model")  # fmt: skip
    assert launcher.refused("--fast", "--model", "m") == "m: no pruned model there. Leave --model out, and --fast makes one"
    message = launcher.refused("--fast", "--nnodes", "2", "--node_rank", "0", "--rdzv_endpoint", "a:1")
    assert message == (f"{FAST_MODEL}: {missing} on one machine: python main_block.py --fast --prune_method kfac "
                       f"{pattern} {FAST_MODEL}")  # fmt: skip
    assert launcher.calls() == []


def test_a_directory_without_a_config_is_no_model(launcher):
    launcher.gpus(LARGE)
    (launcher.cwd / "m").mkdir()
    assert launcher.refused("--model", "m").startswith("m: no pruned model there. ")


# ---------------------------------------------------------------------------------------------------------------- memory


def test_memory_is_that_of_the_chosen_gpu_with_the_least_free(launcher):
    launcher.gpus(100, 81_000, 40_960, 81_920)
    launcher.model()
    done = launcher("--gpu_ids", "3,2")
    assert "Available GPU memory: 40960 MB (~40 GB)\nGPU 2: 40960 of its 81920 MB are in use already\n" in done.stdout
    assert value_of(launcher.calls("check")[0]["argv"], "--gpu_memory") == "40960"
    done = launcher("--gpu_ids", "1,3")
    assert "Available GPU memory: 81000 MB (~79 GB)\nthe memory table\n" in done.stdout  # the driver's own is no use


@pytest.mark.parametrize(
    ("line", "mib"), [("24576, [N/A]", "24576"), ("[N/A], [N/A]", None), ("[Not Supported], [Not Supported]", None)]
)
def test_memory_that_nvidia_smi_does_not_tell(launcher, line, mib):
    launcher.gpus(line)
    launcher.model()
    done = launcher()
    assert done.returncode == 0
    if mib:
        assert value_of(launcher.calls("check")[0]["argv"], "--gpu_memory") == mib
    else:
        assert "--gpu_memory" not in launcher.calls("check")[0]["argv"]
        assert "Available GPU memory: nvidia-smi does not tell, so it is not checked\n" in done.stdout


WARNING = "the memory table\n\n⚠️  Warning: GPU memory may be insufficient!\nConsider using LoRA fine-tuning instead.\n"


def test_too_little_memory_is_refused_without_a_terminal(ready):
    message = ready.refused(FAKE_CHECK="3")
    assert message == "GPU memory may be insufficient, and there is no terminal to ask at. To continue anyway: --yes"
    assert [call["kind"] for call in ready.calls()] == ["check"]


def test_too_little_memory_with_yes(ready):
    done = ready("--yes", FAKE_CHECK="3")
    assert (done.returncode, len(ready.calls("train"))) == (0, 1)
    assert WARNING in done.stdout and "(y/n)" not in done.stdout
    assert "Consider using LoRA" not in ready("--yes", "--method", "lora").stdout


@pytest.mark.parametrize("status", [1, 2, 130])
def test_a_check_that_fails_ends_it(ready, status):
    done = ready(FAKE_CHECK=str(status))
    assert (done.returncode, done.stderr, [call["kind"] for call in ready.calls()]) == (status, "", ["check"])


class Terminal:
    """The launcher in the foreground of a terminal of its own."""

    def __init__(self, launcher: Launcher, *flags, stdin: int | None = None, **env):
        launcher.env |= env
        self.master, slave = pty.openpty()
        self.shown = ""
        self.process = subprocess.Popen(**launcher.command(flags) | {"preexec_fn": lambda: self.take(slave)}, stdout=slave,
                                        stderr=slave, stdin=slave if stdin is None else stdin, pass_fds=(slave,))  # fmt: skip
        os.close(slave)

    @staticmethod
    def take(slave: int) -> None:
        default_signals()
        os.setsid()
        if sys.platform == "linux":
            import fcntl

            fcntl.ioctl(slave, termios.TIOCSCTTY, 0)
        else:
            os.close(os.open(os.ttyname(slave), os.O_RDWR))

    def until(self, text: str | None = None) -> str:
        """Read until `text` appears, or to the end."""
        end = time.monotonic() + 60
        while text is None or text not in self.shown:
            assert time.monotonic() < end, self.shown
            if select.select([self.master], [], [], 1)[0]:
                try:
                    piece = os.read(self.master, 4096)
                except OSError:  # Linux, when nobody has the terminal any more
                    piece = b""
                if not piece:
                    break
                self.shown += piece.decode(errors="replace").replace("\r\n", "\n")
        return self.shown

    def type(self, keys: str) -> None:
        os.write(self.master, keys.encode())

    def end(self) -> int:
        self.until()
        os.close(self.master)
        return self.process.wait(60)


@pytest.mark.parametrize(("keys", "status", "n_trainings"), [
    (["y\n"], 0, 1),
    (["Yes\n"], 0, 1),
    (["n\n"], 0, 0),
    (["NO\n"], 0, 0),
    (["\x04"], 0, 0),
    (["perhaps\n", "\n", "y\n"], 0, 1),
    (["yn\n", "n\n"], 0, 0),
    (["\x03"], -signal.SIGINT, 0),
])  # fmt: skip
def test_too_little_memory_is_asked_about(ready, keys, status, n_trainings):
    terminal = Terminal(ready, FAKE_CHECK="3")
    for i, key in enumerate(keys):
        terminal.until("Continue anyway? (y/n) " + "".join(f"{typed}Continue anyway? (y/n) " for typed in keys[:i]))
        terminal.type(key)
    assert (terminal.end(), len(ready.calls("train"))) == (status, n_trainings)
    assert WARNING in terminal.shown
    assert ("Nothing was started.\n" in terminal.shown) == (n_trainings == 0 and status == 0)


def test_only_a_terminal_to_read_from_is_asked(ready):
    terminal = Terminal(ready, stdin=subprocess.DEVNULL, FAKE_CHECK="3")
    assert (terminal.end(), ready.calls("train")) == (2, [])
    assert "(y/n)" not in terminal.shown and "To continue anyway: --yes\n" in terminal.shown


def test_enough_memory_is_not_asked_about(ready):
    terminal = Terminal(ready)
    assert (terminal.end(), len(ready.calls("train"))) == (0, 1)
    assert "Warning" not in terminal.shown and "(y/n)" not in terminal.shown
    assert not any(call["terminal"] for call in ready.calls())  # who reads from it in the background is stopped


# --------------------------------------------------------------------------------------------------------------- dry run


@pytest.mark.parametrize("flags", [("--num_gpus", "2"), ("--device", "cpu"), ("--", "--run_name", 'it\'s "my" run $1; ls*')])
def test_dry_run_starts_nothing_and_shows_what_would_be_started(ready, flags):
    """The command that is shown, typed into a shell, is the command that is run."""
    done = ready("--dry-run", *flags)
    assert (done.returncode, done.stderr, [call["kind"] for call in ready.calls()]) == (0, "", ["check"])
    assert done.stdout.startswith(f"{RULE}\nDense Fine-tuning Configuration\n") and "the memory table\n" in done.stdout
    head, command = done.stdout.splitlines()[-2:]
    assert head == "The command:"
    subprocess.run([BASH, "-c", command], cwd=ready.cwd, env=ready.env, check=True)
    ready(*flags)
    typed, run = ready.calls("train")
    assert (typed["argv"], typed["env"]) == (run["argv"], run["env"])


def test_dry_run_with_too_little_memory_does_not_ask(ready):
    done = ready("--dry_run", FAKE_CHECK="3")
    assert (done.returncode, ready.calls("train")) == (0, [])
    assert WARNING + "\nThe command:\n" in done.stdout and "(y/n)" not in done.stdout


def test_dry_run_makes_no_model(launcher):
    done = launcher("--fast", "--dry_run")
    assert (done.returncode, launcher.calls(), list(launcher.cwd.iterdir())) == (0, [], [])
    assert f"There is no pruned model yet. It is made by:\n  python {PRUNE} --fast " in done.stdout
    assert f" python {TRAIN} --model {FAST_MODEL} " in done.stdout.splitlines()[-1]


# ----------------------------------------------------------------------------------------------------------------- flags


def test_flags_with_hyphens_and_equals_signs(ready):
    ready.model("m=1/pruned")
    done = ready("--num-gpus=2", "--gpu-ids=4,5", "--model=m=1/pruned", "--output-dir=o", "--method=lora", "--dry-run")
    assert done.returncode == 0
    words = ready.calls("check")[0]["argv"]
    assert [value_of(words, flag) for flag in ("--model", "--save", "--method")] == ["m=1/pruned", "o", "lora"]
    assert ready.calls("check")[0]["env"]["CUDA_VISIBLE_DEVICES"] == "4,5"


@pytest.mark.parametrize(("flags", "message"), [
    ("--num_gpus", "--num_gpus: expected a value. See: bash run_dense_finetune_block_20sparsity.sh --help"),
    ("--model --yes", "--model: expected a value. See: bash run_dense_finetune_block_20sparsity.sh --help"),
    ("--gpu-ids=", "--gpu-ids: expected a value. See: bash run_dense_finetune_block_20sparsity.sh --help"),
    ("--num_gpus --", "--num_gpus: expected a value. See: bash run_dense_finetune_block_20sparsity.sh --help"),
    ("--yes=1", "--yes: takes no value"),
    ("--num_epochs 1", "--num_epochs: unknown flag; those of finetune_dense.py go behind a --. "
                       "See: bash run_dense_finetune_block_20sparsity.sh --help"),
    ("--gpus 2", "--gpus: unknown flag; those of finetune_dense.py go behind a --. "
                 "See: bash run_dense_finetune_block_20sparsity.sh --help"),
    ("2", "2: expected a flag. See: bash run_dense_finetune_block_20sparsity.sh --help"),
    ("-n 2", "-n: expected a flag. See: bash run_dense_finetune_block_20sparsity.sh --help"),
    ("--method dense", "--method dense: expected full or lora"),
    ("--device mps", "--device mps: expected auto, cpu or cuda"),
    ("-- --save o", "--save: give --output_dir before the --"),
    ("-- --dry-run", "--dry-run: is a flag of this script too, give it before the --"),
    ("-- --model=m", "--model: is a flag of this script too, give it before the --"),
    ("-- --gpu_memory 1", "--gpu_memory: is found out by this script, leave it out"),
    ("-- --batch_size", "--batch_size: expected a value. See: bash run_dense_finetune_block_20sparsity.sh --help"),
    ("-- --batch_size two", "--batch_size two: expected a number of 1 or more"),
    ("-- --gradient_accumulation_steps 0", "--gradient_accumulation_steps 0: expected a number of 1 or more"),
])  # fmt: skip
def test_flags_that_are_refused(ready, flags, message):
    assert ready.refused(*flags.split()) == message
    assert ready.calls() == []


def test_what_is_behind_the_dashes_is_handed_on_as_it_is(ready):
    words = ["--fsdp", "--optim", "adamw_8bit", "--run_name", "a  b*'\"$HOME\\", "", "--seed=3", "-x", "--", "--num-x=a b"]
    ready("--gpu_ids", "1,0", "--", *words)
    assert ready.trained()[-len(words) :] == words
    assert ready.calls("check")[0]["argv"][-len(words) - 5 : -5] == words


def test_the_banner_shows_what_is_given_behind_the_dashes(ready):
    done = ready("--", "--num-epochs", "1", "--learning_rate=1e-4", "--block_size", "512", "--max_train_samples", "300",
                 "--dataset", "my texts", "--precision", "bf16-mixed")  # fmt: skip
    for line in ("Dataset: my texts", "  Number of epochs: 1", "  Learning rate: 1e-4", "  Block size: 512",
                 "  Max train samples: 300", "  Precision: bf16-mixed"):  # fmt: skip
        assert line in done.stdout.splitlines()
    words = ready.trained()
    assert value_of(words, "--num_epochs") == "1" and value_of(words, "--dataset") == "my texts"
    assert "--num-epochs" not in words


def test_spaces_in_paths(ready):
    ready.model("my models/pruned model")
    ready("--model", "my models/pruned model", "--num_gpus", "2")
    assert value_of(ready.trained(), "--model") == "my models/pruned model"
    assert value_of(ready.trained(), "--save") == "my models/dense_finetuned_model"


def test_in_the_repository_the_scripts_names_are_enough(ready):
    ready.model("m")
    model, ready.cwd = ready.cwd / "m", REPOSITORY
    ready("--model", str(model), "--dry_run")
    assert ready.calls("check")[0]["argv"][0] == "finetune_dense.py"


def test_the_interpreter(ready):
    """PYTHON, or else python, or else python3."""
    other = ready.program("my python", ': >"$FAKE_DIR/mine"; exec python "$@"')
    assert ready(PYTHON=str(other)).returncode == 0 and (ready.notes / "mine").exists()
    assert ready.refused(PYTHON="no-such-python").startswith("no-such-python: not found. ")
    ready.env.pop("PYTHON")
    ready.python.rename(ready.bin / "python3")
    assert ready().returncode == 0
    (ready.bin / "python3").unlink()
    assert ready.refused().startswith("python3: not found. ")


@pytest.mark.parametrize(
    "flags", [("--num_gpus", "2"), ("--method", "lora", "--gpu_ids", "0,1,2,3"), ("--device", "cpu"), ("--fast",)]
)
def test_the_scripts_take_what_they_are_given(ready, monkeypatch, flags):
    """Every word that finetune_dense.py and main_block.py get is one that their parsers know."""
    assert ready(*flags).returncode == 0

    class Parsed(Exception):
        pass

    parse = runs.Parser.parse_args

    def stop_after_parsing(self, argv=None, namespace=None):
        raise Parsed(parse(self, argv, namespace))

    monkeypatch.setattr(runs.Parser, "parse_args", stop_after_parsing)
    for call in ready.calls():
        at = next(i for i, word in enumerate(call["argv"]) if word in (TRAIN, PRUNE))
        spec = importlib.util.spec_from_file_location("script_under_test", call["argv"][at])
        module = importlib.util.module_from_spec(spec)
        spec.loader.exec_module(module)
        with pytest.raises(Parsed):
            module.main(call["argv"][at + 1 :])


# --------------------------------------------------------------------------------------------------------------- endings


@pytest.mark.parametrize("status", [1, 2, 5])
def test_it_ends_as_the_training_does(ready, status):
    done = ready(FAKE_TRAIN=str(status))
    assert (done.returncode, done.stderr) == (status, "")
    assert "Next steps" not in done.stdout


GOES_ON = "Interrupted. The same command goes on from the last checkpoint.\n"


class Training:
    """A launcher whose training waits for signals."""

    def __init__(self, launcher: Launcher, *flags, stage: str = "train"):
        self.launcher, self.stage = launcher, stage
        launcher.env |= {f"FAKE_{stage.upper()}": "wait"}
        self.process = subprocess.Popen(**launcher.command(flags) | {"start_new_session": True}, stdin=subprocess.DEVNULL,
                                        stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)  # fmt: skip
        self.wait_for("ready")

    def wait_for(self, name: str) -> None:
        end = time.monotonic() + 60
        while not (self.launcher.notes / name).exists():
            assert time.monotonic() < end and self.process.poll() is None
            time.sleep(0.02)

    def end(self) -> tuple[int, list[str], str]:
        """Exit status, the signals that the training got, and what was said on stderr. Nothing of it is left."""
        _, said = self.process.communicate(timeout=60)
        (call,) = self.launcher.calls(self.stage)
        with pytest.raises(ProcessLookupError):
            os.kill(call["pid"], 0)
        return self.process.returncode, signals_of(self.launcher), said


def signals_of(launcher: Launcher) -> list[str]:
    """Those that the training got; what it started, as the workers of a DataLoader, ends with it and gets none."""
    assert not (launcher.notes / "signals of its process").exists()
    return (launcher.notes / "signals").read_text().split()


@pytest.mark.parametrize(
    ("sent", "expected"), [("SIGINT", "SIGINT"), ("SIGTERM", "SIGTERM"), ("SIGHUP", "SIGTERM"), ("SIGQUIT", "SIGQUIT")]
)
def test_a_signal_is_handed_on_once(ready, sent, expected):
    training = Training(ready)
    training.process.send_signal(getattr(signal, sent))
    assert training.end() == (130, [expected], GOES_ON)


def test_a_signal_to_the_whole_group_is_handed_on_once(ready):
    """What a job control or `timeout` does: the training is in another group."""
    training = Training(ready, "--num_gpus", "2")
    os.killpg(training.process.pid, signal.SIGINT)
    assert training.end() == (130, ["SIGINT"], GOES_ON)


def test_a_second_signal_is_handed_on_too(ready):
    training = Training(ready)
    training.process.send_signal(signal.SIGTERM)
    training.wait_for("signals")
    training.process.send_signal(signal.SIGINT)
    assert training.end() == (130, ["SIGTERM", "SIGINT"], GOES_ON)


@pytest.mark.parametrize("keys", ["\x03", "\x1c"])
def test_ctrl_c_in_a_terminal_reaches_the_training_once(ready, keys):
    terminal = Terminal(ready, FAKE_TRAIN="wait")
    terminal.until("Using single-GPU training...")
    end = time.monotonic() + 60
    while not (ready.notes / "ready").exists() and time.monotonic() < end:
        time.sleep(0.02)
    terminal.type(keys)
    assert terminal.end() == 130
    assert signals_of(ready) == [{"\x03": "SIGINT", "\x1c": "SIGQUIT"}[keys]]
    assert terminal.shown.endswith(GOES_ON)


def test_a_signal_during_the_check_starts_no_training(ready):
    check = Training(ready, stage="check")
    check.process.send_signal(signal.SIGTERM)
    assert check.end() == (130, ["SIGTERM"], "")
    assert ready.calls("train") == []


def test_a_signal_during_the_pruning_starts_no_training(launcher):
    pruning = Training(launcher, "--fast", stage="prune")
    pruning.process.send_signal(signal.SIGINT)
    assert pruning.end() == (130, ["SIGINT"], "Interrupted. The same command goes on from there.\n")
    assert [call["kind"] for call in launcher.calls()] == ["prune"]


def test_a_training_that_is_killed(ready):
    training = Training(ready)
    os.kill(ready.calls("train")[0]["pid"], signal.SIGKILL)
    _, said = training.process.communicate(timeout=60)
    assert training.process.returncode == 128 + signal.SIGKILL
    assert said.endswith(GOES_ON)
