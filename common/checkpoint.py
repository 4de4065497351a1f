"""Exact resume, and compressed models that load with stock `transformers`."""

from __future__ import annotations

import copy
import hashlib
import json
import os
import random
import shutil
import tempfile
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from transformers import AutoConfig, AutoModelForCausalLM, AutoModelForSequenceClassification

from common import modeling_bitmask, modeling_pruned
from common.blocks import family_of
from common.runs import UserError, read_json, write_atomic

# ------------------------------------------------------------------------------------------------------------ checkpoints


def save_checkpoint(directory: Path, parts: dict[str, Any], **state: Any) -> None:
    """Write the `state_dict()` of each of `parts`, `state` (tensors, numbers, lists) and all random states as `last.pt`.

    The checkpoint before stays as `previous.pt`. Written beside and renamed into place: a process killed at any moment
    leaves a whole file.
    """
    directory.mkdir(parents=True, exist_ok=True)
    state |= {"parts": {name: part.state_dict() for name, part in parts.items()}, "rng": _rng_state()}
    beside, last = directory / ".next.pt", directory / "last.pt"
    try:
        with open(beside, "wb") as file:
            torch.save(state, file)
            file.flush()
            os.fsync(file.fileno())
    except (OSError, RuntimeError) as error:  # torch reports a full disk as a RuntimeError
        beside.unlink(missing_ok=True)
        raise UserError(f"{directory}: could not write a checkpoint ({str(error).splitlines()[0]}). Free some space and run "
                        "the same command again: the checkpoint before is intact") from None  # fmt: skip
    if last.exists():
        os.replace(last, directory / "previous.pt")
    os.replace(beside, last)


def load_checkpoint(directory: Path) -> tuple[dict[str, Any] | None, str | None]:
    """The newest whole checkpoint and, if a damaged one had to be passed over, a warning. (None, None) where there is none.

    Build what has to be built, then `restore_`. A damaged file is put aside, so that it never takes the place of a whole
    one. UserError when all are damaged.
    """
    damaged = []
    for name in ("last.pt", "previous.pt"):
        path = directory / name
        if not path.exists():
            continue
        try:
            state = torch.load(path, map_location="cpu", weights_only=True)
        except Exception as error:  # what a damaged archive raises is not documented: RuntimeError, EOFError, pickle errors
            damaged.append(f"{path} is damaged ({type(error).__name__})")
            continue
        if damaged:
            os.replace(directory / "last.pt", directory / "damaged.pt")
        return state, f"{'; '.join(damaged)}; continuing from {name}" if damaged else None
    if damaged:
        raise UserError(f"{'; '.join(damaged)}. Use --resume never to start anew (what is there is moved aside)")
    return None, None


def drop(*paths: Path) -> None:
    """Remove what a finished run no longer needs: directories or files, there or not."""
    for path in paths:
        if path.is_dir():
            shutil.rmtree(path, ignore_errors=True)
        else:
            path.unlink(missing_ok=True)


def _rng_state() -> dict[str, Any]:
    kind, keys, position, has_gauss, gauss = np.random.get_state()
    return {
        "python": json.dumps(random.getstate()),
        "numpy": [kind, torch.from_numpy(keys.astype(np.int64)), int(position), int(has_gauss), float(gauss)],
        "torch": torch.get_rng_state(),
        "cuda": torch.cuda.get_rng_state_all() if torch.cuda.is_available() else [],
    }


def restore_(state: dict[str, Any], parts: dict[str, Any]) -> None:
    """Load every part of a checkpoint, and set every random state to what `save_checkpoint` found."""
    for name, part in parts.items():
        part.load_state_dict(state["parts"][name])
    rng = state["rng"]
    version, internal, gauss = json.loads(rng["python"])
    random.setstate((version, tuple(internal), gauss))
    kind, keys, *rest = rng["numpy"]
    np.random.set_state((kind, keys.numpy().astype(np.uint32), *rest))
    torch.set_rng_state(rng["torch"])
    if rng["cuda"] and torch.cuda.is_available():
        torch.cuda.set_rng_state_all(rng["cuda"])


# ----------------------------------------------------------------------------------------------------------------- models


def save_model(directory: Path, model, tokenizer, stage: dict[str, Any] | None = None, earlier: Path | None = None,
               packed: tuple[dict[str, torch.Tensor], dict] | None = None) -> None:  # fmt: skip
    """Write a model directory that stock `transformers` loads; the old one is replaced only when the new one is whole.

    Where layers differ in shape, or embeddings are packed, `modeling_pruned.py` goes along and loading needs
    `trust_remote_code=True`. `stage` (what was asked for and what was measured) is appended to the stages of the model it
    started from (`earlier`'s compression.json). packed: tensors and quantization_config (common/quantizers.py) to write in the
    place of the model's own.
    """
    directory = Path(directory)
    beside = directory.with_name(f".{directory.name}.new")  # one name, so that what a killed process left is removed
    shutil.rmtree(beside, ignore_errors=True)
    config, name = copy.deepcopy(model.config), type(model).__name__
    config.__dict__.pop("auto_map", None)
    tables = {f"{table}.weight_packed" for table, module in model.named_modules() if isinstance(module, torch.nn.Embedding)}
    try:
        beside.mkdir(parents=True)
        if hasattr(config, "pruned_linears") or (packed and tables & set(packed[0])):
            config.auto_map = {_auto_class(name): f"modeling_pruned.Pruned{name}"}
            shutil.copy(modeling_pruned.__file__, beside / "modeling_pruned.py")
        if packed:
            save_file(packed[0], beside / "model.safetensors", metadata={"format": "pt"})
            config.quantization_config, config.architectures = packed[1], [name]
        else:
            model.save_pretrained(beside)
            config.architectures, config.dtype = [name], model.dtype  # of what is stored, not of what was loaded
        config.save_pretrained(beside)
        tokenizer.save_pretrained(beside)
        settings = beside / "tokenizer_config.json"
        if settings.exists():  # without what says how this process had loaded it, which no model depends on
            kept = {key: value for key, value in read_json(settings).items() if key not in ("is_local", "local_files_only")}
            settings.write_text(json.dumps(kept, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")
        vocabulary = beside / "tokenizer.json"
        if packed and vocabulary.exists():  # written with an indent for each token: a third of it is blanks
            text = json.dumps(read_json(vocabulary), ensure_ascii=False, separators=(",", ":"))
            vocabulary.write_text(text, encoding="utf-8")
        stages = [*(compression_stages(earlier) if earlier else []), *([] if stage is None else [stage])]
        if stages:
            write_atomic(beside / "compression.json", json.dumps({"stages": stages}, indent=2, default=str) + "\n")
        aside = directory.with_name(f".{directory.name}.old")
        shutil.rmtree(aside, ignore_errors=True)
        if directory.exists():
            os.replace(directory, aside)
        os.replace(beside, directory)
        shutil.rmtree(aside, ignore_errors=True)
    except BaseException:
        shutil.rmtree(beside, ignore_errors=True)
        raise


def save_bitmask(dense: Path, target: Path, names: list[str]) -> dict[str, int]:
    """Write a saved model again, its weights `names` as a bit a weight and what is not zero (common/modeling_bitmask.py).

    Loads with `trust_remote_code=True` as the model that `dense` holds, bit for bit: it is read again and compared before it
    takes its place. Returns the bytes of these weights, `dense_bytes` and `sparse_bytes`, and their `ratio`. UserError for
    weights that are of no 16 or 32 bits a number.
    """
    tensors, config = {}, AutoConfig.from_pretrained(dense)
    for path in sorted(Path(dense).glob("*.safetensors")):
        tensors |= load_tensors(path)
    original = dict(tensors)
    of_names = {next(stored for stored in (name, name.partition(".")[2]) if stored in tensors): name for name in names}
    shapes, found = {}, {"dense_bytes": 0, "sparse_bytes": 0}
    for stored in of_names:
        weight = tensors.pop(stored)
        if weight.element_size() not in modeling_bitmask.AS_INTEGERS:
            raise UserError(f"{dense}: {stored} is {weight.dtype}; expected bfloat16, float16 or float32")
        parts = dict(zip(("bitmask", "values"), modeling_bitmask.pack(weight), strict=True))
        tensors |= {f"{stored}.{part}": tensor for part, tensor in parts.items()}
        shapes[stored] = list(weight.shape)
        found["dense_bytes"] += weight.nbytes
        found["sparse_bytes"] += sum(tensor.nbytes for tensor in parts.values())
    name = config.architectures[0]
    config.bitmask_weights, config.auto_map = shapes, {_auto_class(name): f"modeling_bitmask.Bitmask{name}"}
    beside = target.with_name(f".{target.name}.new")
    shutil.rmtree(beside, ignore_errors=True)
    beside.mkdir(parents=True)
    for file in Path(dense).iterdir():
        if file.is_file() and ".safetensors" not in file.name:
            shutil.copyfile(file, beside / file.name)
    for module in (modeling_pruned, modeling_bitmask):
        shutil.copy(module.__file__, beside)
    config.save_pretrained(beside)
    save_tensors(beside / "model.safetensors", tensors)
    for name, rebuilt in modeling_bitmask.state_of(beside, config).items():
        if not torch.equal(rebuilt.view(torch.uint8), original[name].view(torch.uint8)):
            raise RuntimeError(f"{beside}: {name} is not what it was")
    shutil.rmtree(target, ignore_errors=True)
    os.replace(beside, target)
    return found | {"ratio": found["sparse_bytes"] / max(1, found["dense_bytes"])}


def save_tensors(path: Path, tensors: dict[str, torch.Tensor]) -> None:
    """A safetensors file, written beside and renamed into place."""
    path.parent.mkdir(parents=True, exist_ok=True)
    beside = path.with_name(f".{path.name}.new")
    save_file({name: tensor.detach().cpu().contiguous() for name, tensor in tensors.items()}, beside, metadata={"format": "pt"})
    os.replace(beside, path)


def keep_best_(directory: Path, best: list[list[float]], n: int, score: float, step: int, model) -> None:
    """Add (score, step) to `best` where it is among the n lowest, and keep the model's weights as step-<step>.safetensors; what
    is not among them any more is removed."""
    best.append([score, step])
    best.sort()
    for _, out in best[n:]:
        drop(directory / f"step-{out:06d}.safetensors")
    del best[n:]
    if [score, step] in best:
        save_tensors(directory / f"step-{step:06d}.safetensors", model.state_dict())


def load_tensors(path: Path) -> dict[str, torch.Tensor]:
    """UserError where the file is missing or damaged."""
    try:
        return load_file(path)
    except (OSError, SafetensorError) as error:
        raise UserError(f"{path}: not readable ({str(error).splitlines()[0]}). Use --resume never to start anew") from None


def save_own(directory: Path, model: torch.nn.Module, shape: dict[str, Any], tokenizer) -> None:
    """A model of a script's own class: model.safetensors, config.json (the class, its arguments), the tokenizer's files."""
    save_tensors(directory / "model.safetensors", model.state_dict())
    tokenizer.save_pretrained(directory)
    config = {"class": type(model).__name__, "shape": shape}
    write_atomic(directory / "config.json", json.dumps(config, indent=2) + "\n")


def load_own(directory: Path, kind: type[torch.nn.Module]) -> torch.nn.Module:
    """What `save_own` wrote, as the class `kind`, ready to be looked at. UserError where it is of another one."""
    config = read_json(directory / "config.json")
    if config.get("class") != kind.__name__:
        raise UserError(f"{directory}: holds no {kind.__name__}, but {config.get('class') or config.get('architectures')}")
    model = kind(**config["shape"])
    model.load_state_dict(load_tensors(directory / "model.safetensors"))
    return model.eval()


def digest(directory: Path) -> str:
    """Eight hex digits of a model directory: of its config and its weights."""
    sha = hashlib.sha256()
    for path in sorted([*Path(directory).glob("*.safetensors"), Path(directory) / "config.json"]):
        with open(path, "rb") as file:
            sha.update(hashlib.file_digest(file, "sha256").digest())
    return sha.hexdigest()[:8]


def compression_stages(directory: Path) -> list[dict]:
    """The stages in a model directory's compression.json, first to last; none for a model that was never compressed."""
    path = Path(directory) / "compression.json"
    return read_json(path)["stages"] if path.exists() else []


def is_result_of(directory: Path, config: dict) -> bool:
    """Whether a model directory is there and is what a run of this configuration wrote; another may have, since."""
    return [stage["asked"] for stage in compression_stages(directory)[-1:]] == [config]


def copy_result(source: Path, target: Path, config: dict) -> None:
    """Put the model that a run of this configuration wrote to `source`, where it is still there, to `target` as well."""
    if is_result_of(source, config):
        beside = target.with_name(f".{target.name}.new")
        shutil.rmtree(beside, ignore_errors=True)
        shutil.copytree(source, beside)
        shutil.rmtree(target, ignore_errors=True)
        os.replace(beside, target)


def check_target(directory: Path, base: Path) -> None:
    """UserError where a model written to --save `directory` would replace what no script made, or cannot be written.

    base: the model directory that it is made of.
    """
    place = directory.resolve()
    if base.resolve().is_relative_to(place):
        raise UserError(f"--save {directory}: would replace the model that it is made of, {base}. Name another directory")
    if place.exists() and not (place / "compression.json").is_file() and not (place.is_dir() and not any(place.iterdir())):
        raise UserError(f"--save {directory}: is there, and holds no compressed model. Name another directory")
    parent = next(folder for folder in place.parents if folder.exists())
    try:
        tempfile.TemporaryFile(dir=parent).close()
    except OSError as error:
        raise UserError(f"--save {directory}: {parent} cannot be written ({error.strerror}). Name another directory") from None


def _auto_class(name: str) -> str:
    for head in ("ForSequenceClassification", "ForCausalLM"):
        if name.endswith(head):
            return f"AutoModel{head}"
    return "AutoModel"


@contextmanager
def _no_bars():
    """compressed-tensors shows a progress bar for each of its stages, and has no switch for them."""
    from tqdm import std

    original = std.tqdm.__init__
    std.tqdm.__init__ = lambda bar, *args, **kwargs: original(bar, *args, **kwargs | {"disable": True})
    try:
        yield
    finally:
        std.tqdm.__init__ = original


def load_model(directory: Path, auto_class, **kwargs):
    """`auto_class.from_pretrained`, for plain models and for ours of uneven shapes, running no code from the directory."""
    try:
        config = AutoConfig.from_pretrained(directory)
        for module in (modeling_pruned, modeling_bitmask):
            if f"{module.__name__.rpartition('.')[2]}." in str(getattr(config, "auto_map", "")):
                auto_class = getattr(module, config.architectures[0])
        with _no_bars():
            model = auto_class.from_pretrained(directory, use_safetensors=True, **kwargs)
            if getattr(config, "quantization_config", None):  # unpacked now and not in the first forward
                model.hf_quantizer.compressor.decompress_model(model)
        return model
    except (OSError, ValueError, KeyError, SafetensorError, modeling_bitmask.Damaged) as error:
        raise UserError(f"{directory}: not loadable as {auto_class.__name__} ({str(error).splitlines()[0]}). "
                        "Expected config.json and *.safetensors of a supported model") from None  # fmt: skip


def load_classifier(directory: Path, names: list[str] | None = None, dropout: float | None = None):
    """A sequence classifier. With `names`, for these labels: a head of another size is made anew. `dropout` replaces the
    probabilities of all Dropout modules, and not the config's.
    """
    labels = {}
    if names is not None:
        labels = {"num_labels": len(names), "id2label": dict(enumerate(names)), "label2id": {n: i for i, n in enumerate(names)},
                  "ignore_mismatched_sizes": True}  # fmt: skip
    model = load_model(directory, AutoModelForSequenceClassification, **labels)
    for module in model.modules():
        if isinstance(module, torch.nn.Dropout) and dropout is not None:
            module.p = dropout
    return model


def load_causal_lm(directory: Path, dtype: torch.dtype | None = None):
    """A causal language model. dtype: of its weights, by default the one that the config names.

    UserError where the directory holds another kind of model: its head would be made anew, at random.
    """
    architecture = (_config_of(directory).architectures or ["no architecture"])[0]
    if not architecture.endswith("ForCausalLM"):
        raise UserError(f"{directory}: holds {architecture}; expected a causal language model (as LlamaForCausalLM)")
    return load_model(directory, AutoModelForCausalLM, dtype=dtype or "auto")


def outline(directory: Path, auto_class=AutoModelForSequenceClassification):
    """The model in a directory without its weights, on the meta device: for shapes, costs and counts.

    auto_class: what it is loaded as, a classifier or `AutoModelForCausalLM`. UserError where the config is not one of a family
    in common/blocks.py, or not one of such a model.
    """
    config = _config_of(directory)
    family_of(config)
    try:
        with torch.device("meta"):
            model = auto_class.from_config(config)
    except ValueError:
        raise UserError(f"{directory}: a {config.model_type} model is not loadable as {auto_class.__name__}") from None
    if getattr(config, "pruned_linears", None):
        with torch.device("meta"):
            modeling_pruned.resize_(model, config)
    return model


def _config_of(directory: Path):
    try:
        return AutoConfig.from_pretrained(directory)
    except (OSError, ValueError, KeyError) as error:
        raise UserError(f"{directory}: no config.json of a known model ({str(error).splitlines()[0]})") from None


def is_classifier_of(config, names: list[str]) -> bool:
    """Whether a config is that of a classifier with these labels (by name, or by number where they have no names)."""
    trained = (config.architectures or [""])[0].endswith("ForSequenceClassification")
    shown = [str(config.id2label[i]).lower() for i in range(config.num_labels)]
    return trained and shown in ([name.lower() for name in names], [f"label_{i}" for i in range(len(names))])
