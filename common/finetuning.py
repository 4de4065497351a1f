"""What scripts that train by a `transformers.Trainer` share: windows of text, console and history, stopping together."""

from __future__ import annotations

import math
import os
import shlex
import shutil
import signal
import subprocess
import sys
from contextlib import contextmanager, suppress
from datetime import timedelta
from pathlib import Path

import numpy as np
import torch
import torch.distributed as dist
from accelerate import PartialState
from accelerate.utils.memory import clear_device_cache
from torch.utils.data import Dataset
from tqdm import tqdm
from transformers import EarlyStoppingCallback, PrinterCallback, ProgressCallback, TrainerCallback, TrainingArguments

from common import checkpoint, eval_utils
from common.blocks import blocks_of
from common.checkpoint import load_causal_lm
from common.data import load_tokenizer
from common.runs import REPOSITORY, Interrupted, Run, UserError, finished_runs, require, stop_requests
from common.sparse_trainer import check_sparsity, last_checkpoint, layer_sparsity, lost_zeros, masks_of, prunable_weights
from common.train_utils import resolve_precision

HALVES = {"16-mixed": torch.float16, "bf16-mixed": torch.bfloat16}  # what products are in where weights are in fp32


def stored_dtype(precision: str, frozen: bool) -> torch.dtype:
    """What a model's weights are held in while it trains: fp32, but for --precision bf16 and (under adapters) frozen ones."""
    return torch.float32 if precision == "32" or not (frozen or precision == "bf16") else HALVES.get(precision, torch.bfloat16)


def freeze_embeddings_(model: torch.nn.Module) -> None:
    """Embeddings and output head stay as they are: neither gradients nor optimizer states are made for them."""
    for table in (model.get_input_embeddings(), model.get_output_embeddings()):
        table.requires_grad_(False)


def lm_precision(precision: str, device: torch.device) -> str:
    """`--precision` of a language model's training, auto resolved: bf16 where a GPU has it, as states can be too large for
    fp16; "bf16" is all of it in that, weights too.
    """
    if precision == "auto" and device.type == "cuda" and torch.cuda.is_bf16_supported():
        return "bf16-mixed"
    return precision if precision == "bf16" else resolve_precision(precision, device)


class Windows(Dataset):
    """Pieces of a token stream, (length,) each, that do not overlap, read from the disk when they are asked for.

    n: at most so many, drawn evenly over the stream; with `overlap` exactly so many, which overlap where the stream is too
    short for them. A window is its own labels: models shift them.
    """

    def __init__(self, stream: np.ndarray, length: int, n: int | None = None, overlap: bool = False):
        found = len(stream) // length
        if not found:
            raise UserError(f"too little text: {len(stream):,} tokens, expected a window of {length:,} at least")
        self.stream, self.length = stream, length
        self.starts = np.arange(found) * length
        if n is not None and n < found:
            self.starts = self.starts[np.linspace(0, found - 1, n).round().astype(np.int64)]
        elif n is not None and overlap and n > found:
            self.starts = np.linspace(0, len(stream) - length, n).round().astype(np.int64)

    def drop_rest_(self, multiple: int) -> None:
        """Leave out the last windows, so that their number is a multiple of this."""
        self.starts = self.starts[: len(self.starts) // multiple * multiple]

    def __len__(self) -> int:
        return len(self.starts)

    def __getitem__(self, i: int) -> dict[str, torch.Tensor]:
        start = self.starts[i]
        ids = torch.from_numpy(np.asarray(self.stream[start : start + self.length], np.int64))
        return {"input_ids": ids, "labels": ids}


def join(device: str) -> PartialState:
    """The processes that torchrun started, joined. They wait two hours for each other, not the ten minutes of NCCL: one of them
    prepares what is missing, text and models, while the others wait.
    """
    return PartialState(cpu=device == "cpu", timeout=timedelta(hours=2))


def part() -> None:
    """End what processes have in common; each goes on, or ends, alone. For when no trainer is held any more: DDP that outlives
    its process group can wait for ever, and a group that outlives Python can abort the process.
    """
    clear_device_cache(garbage_collection=True)
    if dist.is_initialized():
        dist.barrier()  # nobody closes a connection that another one still reads
        dist.destroy_process_group()


def write_full(state: dict[str, torch.Tensor], base: Path, target: Path, tokenizer, run: Run) -> int:
    """Trained weights as the model directory `target`, in the dtype of `base`, the sparse model that training began with.

    It is loaded again: the run's record gets its sparsity and that of each projection, before and after. Returns how many of
    the weights that were zero in `base` are not after training (then nothing is written), or that were zero after training are
    not in what is loaded again.
    """
    stored = load_causal_lm(base)
    model = load_causal_lm(base, torch.float32)
    model.load_state_dict(state)
    model.to(stored.dtype)
    for weight in prunable_weights(model).values():
        weight.data += 0.0  # a mask makes a negative weight a negative zero, which is no zero bit for bit
    lost, before, masks = lost_zeros(model, masks_of(stored)), layer_sparsity(stored), masks_of(model)
    if not lost:
        checkpoint.save_model(target, model, tokenizer, {"asked": run.config}, base)
        lost = read_back(target, before, masks, run)
    return lost


def read_back(target: Path, before: dict[str, float], masks: dict, run: Run) -> int:
    """Count a written model's zeros into the run's record; how many of those that `masks` hold were lost."""
    reloaded = load_causal_lm(target)
    after, lost = layer_sparsity(reloaded), lost_zeros(reloaded, masks)
    run.record.setdefault("sparsity", {}).update({"after": check_sparsity(reloaded), "zeros_lost": lost})
    run.record["projections"] = [{"name": name, "sparsity_before": before[name], "sparsity": after[name]} for name in after]
    return lost


def run_main_block(words: list[str]) -> int:
    """Run main_block.py with these words to its end; its exit status. Asked to stop, it is asked too, and waited for."""
    print(f"\n$ python main_block.py {shlex.join(words)}", flush=True)
    with stop_requests() as requested:
        process, asked = subprocess.Popen([sys.executable, REPOSITORY / "main_block.py", *words]), False
        while process.poll() is None:
            with suppress(subprocess.TimeoutExpired):
                process.wait(0.2)
            if requested() and not asked:
                process.send_signal(signal.SIGTERM)
                asked = True
        if requested():
            raise Interrupted("The same command goes on with the pruning")
    return process.returncode


def check_tracking(name: str, flag: str) -> None:
    """UserError where curves cannot go to "tensorboard" or "wandb": not installed, or no key and not offline."""
    if name == "none":
        return
    require(name, flag)
    if name == "wandb" and os.environ.get("WANDB_MODE") not in ("offline", "disabled"):
        import wandb

        if not wandb.api.api_key:
            raise UserError(f"{flag}: wandb has no key here. Run: wandb login; or set WANDB_MODE=offline")


def perplexities(directories: dict[str, Path], source, device, token_length: int, stride: int) -> tuple[dict, dict]:
    """Perplexity, sparsity and bytes of model directories on a prepared text's test split; and how it was measured."""
    found, how = {}, {}
    for name, directory in directories.items():
        model = load_causal_lm(directory, eval_utils.scoring_dtype(device)).to(device)
        tokenizer = load_tokenizer(directory, model.config)
        found[name], how = eval_utils.perplexity_on(model, tokenizer, source, token_length, stride,
                                                    progress=f"perplexity, {name}")  # fmt: skip
        found[name] |= {"sparsity": check_sparsity(model), "bytes": eval_utils.directory_bytes(directory)}
    return found, how


def find_dense(out_dir: Path, directory: Path) -> Path | None:
    """The dense model that main_block.py made a pruned one of, by the record of that run."""
    for _, record in finished_runs(out_dir, "one_shot"):
        if Path(record["model_dir"]).resolve() == Path(directory).resolve() and Path(record["dense_dir"]).exists():
            return Path(record["dense_dir"])
    return None


def check_teacher(student, teacher, flag: str, hidden_weight: float) -> None:
    """UserError where a teacher's predictions, or with `hidden_weight` its hidden states, are no pattern for a student's."""
    ours, theirs = student.config, teacher.config
    if theirs.vocab_size != ours.vocab_size:
        raise UserError(f"{flag}: its vocabulary has {theirs.vocab_size:,} tokens, the model's {ours.vocab_size:,}. "
                        "Expected the dense model that it was made of")  # fmt: skip
    shapes = [(config.num_hidden_layers, config.hidden_size) for config in (ours, theirs)]
    if hidden_weight and shapes[0] != shapes[1]:
        raise UserError(f"--hidden_weight {hidden_weight:g}: the teacher has {shapes[1][0]} blocks of width {shapes[1][1]}, "
                        f"the model {shapes[0][0]} of {shapes[0][1]}. Use --hidden_weight 0")  # fmt: skip


def arguments(run: Run, seed: int, device: str, precision: str, **more) -> TrainingArguments:
    """What the scripts ask of a Trainer alike, and `more`: one GPU a process, no pickles of its own, no words of its own."""
    made = TrainingArguments(
        output_dir=str(run.checkpoint_dir), run_name=run.dir.name, seed=seed, data_seed=seed, use_cpu=device == "cpu",
        bf16=precision == "bf16-mixed", fp16=precision == "16-mixed", logging_nan_inf_filter=False, log_level="error",
        log_level_replica="error", disable_tqdm=True, save_total_limit=2, prediction_loss_only=True,
        remove_unused_columns=False, ddp_find_unused_parameters=False, dataloader_pin_memory=device == "cuda",
        **more)  # fmt: skip
    made._n_gpu = min(made.n_gpu, 1)  # of more GPUs than processes the Trainer would take all, by DataParallel
    return made


def check_targets(model, names: tuple[str, ...]) -> None:
    """UserError where LoRA is asked onto projections that the model's blocks do not have."""
    inside = {linear for block in blocks_of(model) for linear in block.projections}
    there = {name.rpartition(".")[2] for name, module in model.named_modules() if module in inside}
    if missing := set(names) - there:
        raise UserError(f"--lora_target_modules {','.join(sorted(missing))}: not in this model's blocks; expected some of "
                        f"{', '.join(sorted(there))}")  # fmt: skip


def check_space(directory: Path, needed: int) -> None:
    """UserError where the disk of a directory, there or not, has less room than `needed` bytes."""
    there = next(folder for folder in (directory, *directory.resolve().parents) if folder.exists())
    if (free := shutil.disk_usage(there).free) < needed:
        raise UserError(f"{directory}: {free / 1e9:,.3f} GB are free there, and what is written takes {needed / 1e9:,.3f} GB "
                        "at least. Free some space or name another --out_dir")  # fmt: skip


@contextmanager
def ends_told(run: Run):
    """Inside, Ctrl+C says how to go on, and so does a disk that torch.save finds full."""
    try:
        yield
    except KeyboardInterrupt:
        raise Interrupted(f"The same command goes on ({run.dir})") from None
    except RuntimeError as error:
        if "inline_container" not in str(error):
            raise
        raise UserError(f"{run.dir}: could not write a checkpoint ({str(error).splitlines()[0]}). Free some space and run the "
                        "same command again: what was written before is intact") from None  # fmt: skip


def quiet_(trainer) -> None:
    """Take away what Console stands for."""
    for callback in (PrinterCallback, ProgressCallback):
        trainer.remove_callback(callback)


class Console(TrainerCallback):
    """A progress bar, one line a logging interval, and the run's history; NaN ends the training with advice.

    On every process: what it says only the one that has a `run` says.
    """

    def __init__(self, run: Run | None):
        self.run, self.bar = run, None

    def on_train_begin(self, args, state, control, **kwargs):
        if self.run is not None:
            self.run.rewind(state.global_step)
            self.bar = tqdm(total=state.max_steps, initial=state.global_step, desc="training", leave=False, disable=None)

    def on_step_end(self, args, state, control, **kwargs):
        if self.bar is not None:
            self.bar.update(state.global_step - self.bar.n)

    def on_train_end(self, args, state, control, **kwargs):
        if self.bar is not None:
            self.bar.close()

    def on_log(self, args, state, control, logs=None, **kwargs):
        for key in ("loss", "eval_loss"):
            self.check(args, state, logs, key)
        if self.run is not None:
            self.show(args, state, logs)

    def check(self, args, state, logs: dict, key: str) -> None:
        """UserError where what was logged is no number."""
        if not math.isfinite(logs.get(key, 0.0)):
            raise UserError(f"{key} is {logs[key]} at step {state.global_step:,}. {self.advice(args)}")

    def advice(self, args) -> str:
        return "The last checkpoint is intact; start anew with a lower --learning_rate or --precision 32"

    def show(self, args, state, logs: dict) -> None:
        """Print and keep what was logged at a step."""
        shown = {key.removeprefix("eval_"): value for key, value in logs.items() if isinstance(value, int | float)}
        if "loss" in logs:
            tqdm.write(f"Step {state.global_step}: loss={logs['loss']:.4f}")
            kept = {key: shown[key] for key in ("loss", "grad_norm", "learning_rate") if key in shown}
            self.run.log(state.global_step, "training", **kept)
        if "eval_loss" in logs:
            perplexity, sparsity = shown["perplexity"], shown["sparsity"]
            tqdm.write(f"Step {state.global_step}: validation perplexity={perplexity:.2f} sparsity={sparsity:.4f}")
            self.run.log(state.global_step, "training", validation_perplexity=perplexity, sparsity=sparsity)


class Epochs(Console):
    """Console that counts in epochs of `per_epoch` steps, as `--finetune_epochs` does."""

    def __init__(self, run: Run, per_epoch: int):
        super().__init__(run)
        self.per_epoch = per_epoch

    def on_step_begin(self, args, state, control, **kwargs):
        if state.global_step % self.per_epoch == 0:
            tqdm.write(f"epoch {state.global_step // self.per_epoch + 1}/{-(-state.max_steps // self.per_epoch)} begins")

    def on_step_end(self, args, state, control, **kwargs):
        super().on_step_end(args, state, control, **kwargs)
        control.should_log |= state.global_step % self.per_epoch == 0  # the end of an epoch is always told
        return control

    def on_log(self, args, state, control, logs=None, **kwargs):
        super().on_log(args, state, control, logs, **kwargs)
        if not args.fp16:  # which skips the step; else the weights are none any more, and would be saved
            self.check(args, state, logs, "grad_norm")

    def advice(self, args) -> str:
        found = last_checkpoint(args.output_dir)
        kept = f"The last good state is {found}" if found else "No checkpoint was made before"
        return (f"{kept}. Start anew with a lower --finetune_lr or --finetune_max_grad_norm, or --precision 32 "
                "(--resume never, or another --save_ckpt_log_name)")  # fmt: skip

    def show(self, args, state, logs: dict) -> None:
        if "loss" not in logs:
            return
        kept = {key: float(logs[key]) for key in ("loss", "grad_norm", "learning_rate") if key in logs}
        self.run.log(state.global_step, "training", **kept)
        epoch, before = divmod(state.global_step - 1, self.per_epoch)
        mean = self.mean_loss(epoch)
        tqdm.write(f"  progress: {100 * (before + 1) // self.per_epoch}% | mean loss: {mean:.4f} | "
                   f"LR: {kept['learning_rate']:.2e}")  # fmt: skip
        if before + 1 == self.per_epoch:
            tqdm.write(f"✅ epoch {epoch + 1} done, mean loss: {mean:.4f}")

    def mean_loss(self, epoch: int) -> float:
        """Of an epoch's steps, counted from 0, as far as they were logged."""
        losses, last = [], epoch * self.per_epoch  # each a mean over the steps since the one before
        for step, _, metric, value in self.run.history():
            if metric == "loss" and last < step <= (epoch + 1) * self.per_epoch:
                losses.append((step - last, value))
                last = step
        return sum(n * value for n, value in losses) / sum(n for n, _ in losses)


class Patience(EarlyStoppingCallback):
    """EarlyStoppingCallback whose count goes on where a run does; one that had run out ends the resumed training at once."""

    def on_train_begin(self, args, state, control, **kwargs):
        super().on_train_begin(args, state, control, **kwargs)
        stored = state.stateful_callbacks[type(self).__name__]["attributes"]  # of the checkpoint, else of this one
        self.early_stopping_patience_counter = stored["early_stopping_patience_counter"]
        control.should_training_stop |= self.early_stopping_patience_counter >= self.early_stopping_patience
        return control


class StopTogether(TrainerCallback):
    """Ends the training of all processes at the same step, with a checkpoint, when one of them was asked to stop.

    requested: says whether this process was (runs.stop_requests). save_every: steps between checkpoints. Every checkpoint
    begins a new mean of the logged loss, so that a resumed run logs what one left alone does.
    """

    def __init__(self, requested, save_every: int):
        self.requested, self.save_every, self.stopped = requested, save_every, False
        self.group = None

    def on_train_begin(self, args, state, control, **kwargs):
        if dist.is_initialized() and dist.get_world_size() > 1:
            self.group = dist.new_group(backend="gloo")  # of the hosts: no GPU waits for it

    def on_step_end(self, args, state, control, **kwargs):
        stop = torch.tensor([int(self.requested())])
        if self.group is not None:
            dist.all_reduce(stop, dist.ReduceOp.MAX, group=self.group)
        self.stopped = bool(stop)
        control.should_training_stop |= self.stopped
        control.should_save |= self.stopped or state.global_step % self.save_every == 0
        control.should_log |= control.should_save or control.should_evaluate
        return control
