"""Zero-shot tasks by lm-evaluation-harness, and a task that needs no hub: which continuation of a news article is its own."""

from __future__ import annotations

import copy
import difflib
import json
import logging
import os
import random
import re
import warnings
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, redirect_stdout, suppress
from pathlib import Path
from typing import Any

import torch

from common import corpus, data, eval_utils, fetch, runs, text
from common.runs import UserError

DEFAULT_TASKS = ("boolq", "rte", "hellaswag", "winogrande", "arc_easy", "arc_challenge", "openbookqa")  # the field's seven
NEWS_CHOICE = "news_choice"
QUESTIONS = 500  # of news_choice
CONTEXT, CONTINUATION, N_CHOICES = 64, 24, 4  # words of a context and of a continuation, continuations to choose from
LOCAL_FORMATS = ("json", "csv", "parquet", "text", "arrow")  # dataset_path of tasks whose data are files
WAYS_OUT = (f"the task {NEWS_CHOICE}, which needs no hub; --include_path FOLDER with a task's YAML and its data; "
            "HF_DATASETS_CACHE= a cache that has it; HF_ENDPOINT= a mirror of the hub")  # fmt: skip


def evaluate(model, tokenizer, tasks: list[str], include_path: Path | Sequence[Path] | None = None, limit: int | None = None,
             batch_size: int = 8) -> dict[str, dict[str, float]]:  # fmt: skip
    """{task: {metric: value, metric_stderr: its standard error, "n": questions}}; of a group also the group's own values.

    All tasks without examples in the prompt, log-probabilities in fp32, contexts longer than the model cut from the left.
    include_path: folder(s) with YAML files of tasks, which come before those of the harness; a YAML file can name Python
    functions beside it, which are run. limit: so many questions of each task, the first ones. Mode and tokenizer are left as
    found. UserError: see `load_tasks`; and an answer that is longer than the model.
    """
    _check(limit, batch_size)
    loaded = load_tasks(tasks, include_path)
    from lm_eval import evaluator
    from lm_eval.models.huggingface import HFLM

    with _quiet(), eval_utils.evaluating(model), _without_cache(model):
        lm = HFLM(pretrained=model, tokenizer=copy.deepcopy(tokenizer), batch_size=batch_size, softmax_dtype=torch.float32,
                  max_length=data.n_positions(model.config))  # fmt: skip
        try:
            found = evaluator.evaluate(lm, loaded, limit=limit, log_samples=False, bootstrap_iters=1000)
        except AssertionError as error:  # so the harness answers lengths that do not fit
            what = str(error) or f"a task has an answer that is empty, or longer than the model's {lm.max_length} positions"
            raise UserError(f"--eval_zero_shot: {what}. Leave it out") from None
    return {name: _metrics(values, found, name) for name, values in found["results"].items()}


def _check(limit: int | None, batch_size: int) -> None:
    if limit is not None and limit < 1:
        raise UserError(f"limit {limit}: expected 1 or more questions of each task")
    if batch_size < 1:
        raise UserError(f"batch_size {batch_size}: expected 1 or more")


def _metrics(values: dict[str, Any], found: dict[str, Any], name: str) -> dict[str, float]:
    """The harness writes "acc,none" and "acc_stderr,none"; another filter than none is kept in the name."""
    metrics = {}
    for key, value in values.items():
        metric, comma, which = key.partition(",")
        if comma and isinstance(value, int | float):  # a standard error that there is none of is a text
            metrics[metric if which == "none" else f"{metric} ({which})"] = float(value)
    return metrics | {"n": _n_questions(found, name)}


def _n_questions(found: dict[str, Any], name: str) -> int:
    if name in found["n-samples"]:
        return int(found["n-samples"][name]["effective"])
    return sum(_n_questions(found, part) for part in found["group_subtasks"].get(name, []))


def load_tasks(tasks: list[str], include_path: Path | Sequence[Path] | None = None) -> dict[str, Any]:
    """What the harness makes of the names of tasks, with their data, for `evaluate`; a script may call it early, to check.

    UserError: lm-eval is not installed, no such task (with those of nearly that name), a folder without YAML files, data that
    cannot be had. Nothing is asked of the network where all tasks are in `include_path` and their data are files.
    """
    runs.require("lm_eval", "--eval_zero_shot")
    folders = [include_path] if isinstance(include_path, str | Path) else list(include_path or ())
    for folder in map(Path, folders):
        if not folder.is_dir():
            raise UserError(f"--include_path {folder}: no such folder")
        if not any(folder.rglob("*.yaml")):
            raise UserError(f"--include_path {folder}: no .yaml file in it. Expected a task of lm-evaluation-harness")
    if not tasks:
        raise UserError(f"--eval_zero_shot: no task. Expected names such as {', '.join(DEFAULT_TASKS)}")
    from lm_eval.tasks import TaskManager

    with _quiet():
        manager = TaskManager(include_path=list(folders), include_defaults=False)
        configs = [manager.task_index[name].cfg or {} for name in tasks if name in manager.task_index]
        if len(configs) < len(tasks) or any("group" in config for config in configs):
            own, manager = manager.all_tasks, TaskManager(include_path=list(folders))
            for name in tasks:
                _check_name(name, manager.all_tasks, own)
        parts = [_load(manager, name) for name in dict.fromkeys(tasks)]
        loaded = {key: {k: v for part in parts for k, v in part[key].items()} for key in ("tasks", "groups", "group_map")}
    for name, task in loaded["tasks"].items():
        if getattr(task, "UNSAFE_CODE", False) or getattr(task, "MULTIMODAL", False):
            what = "runs code that the model writes" if getattr(task, "UNSAFE_CODE", False) else "shows images or plays sound"
            raise UserError(f"--eval_zero_shot {name}: {what}, which is not done here. Leave it out")
        task.set_config(key="num_fewshot", value=0)
        task.set_fewshot_seed(seed=0)
    return loaded


def _check_name(name: str, known: list[str], own: list[str]) -> None:
    if name not in known:
        near = difflib.get_close_matches(name, known, 5, 0.5)
        said = f" Near: {', '.join(near)}." if near else ""
        said += f" In --include_path: {', '.join(own[:8])}." if own else ""
        raise UserError(f"--eval_zero_shot {name}: no such task in lm-evaluation-harness.{said} "
                        f"Without a hub: {NEWS_CHOICE}")  # fmt: skip


def _load(manager, name: str) -> dict[str, Any]:
    remote = sorted(o for o in _origins(manager.task_index, name) if o not in LOCAL_FORMATS and not Path(o).is_dir())
    offline = not remote or not fetch.hub_available()
    with _offline_if(offline):
        try:
            return manager.load([name])
        except ImportError as error:
            raise UserError(f"--eval_zero_shot {name}: needs more than lm-eval itself ({_first_line(error)})") from None
        except Exception as error:  # what comes out of a failed download is of a dozen kinds, and not documented
            if not remote:
                raise UserError(f"--eval_zero_shot {name}: its files cannot be read ({_cause(error)})") from None
            tried = "the hub does not answer, and it is not in the cache" if offline else _cause(error)
            raise UserError(f"--eval_zero_shot {name}: its data cannot be had here. Tried: hub, {', '.join(remote[:3])}: "
                            f"{tried}.\nWays out: {WAYS_OUT}") from None  # fmt: skip


def _origins(index: dict[str, Any], name: str) -> set[str]:
    """Where the data of a task come from, or of all tasks that a group or a tag stands for: names on the hub, file formats."""
    if name not in index:
        return {name}
    entry, config = index[name], index[name].cfg or {}
    parts = config.get("task", []) if "group" in config else sorted(entry.tags) if entry.cfg is None else None
    if not isinstance(parts, list):
        return {str(config.get("dataset_path") or name)}
    found = set()
    for part in parts:
        own = part if isinstance(part, dict) else {"task": part}
        part = own.get("task") or own.get("group")
        found |= {own["dataset_path"]} if "dataset_path" in own else _origins(index, part) if isinstance(part, str) else {name}
    return found


def _first_line(error: BaseException) -> str:
    return f"{type(error).__name__}: {error}".strip(": \n").splitlines()[0]


def _cause(error: BaseException) -> str:
    """The first error of a chain: datasets wraps what is really wrong."""
    while (before := error.__cause__ or error.__context__) is not None:
        error = before
    return _first_line(error)


@contextmanager
def _offline_if(wanted: bool) -> Iterator[None]:
    """Inside, `datasets` keeps to files and its cache; else it reports even the reading of a local file to a counter.

    It looks at the environment when it is imported, and not again."""
    from datasets import config

    before, config.HF_HUB_OFFLINE = config.HF_HUB_OFFLINE, wanted or config.HF_HUB_OFFLINE
    try:
        yield
    finally:
        config.HF_HUB_OFFLINE = before


@contextmanager
def _without_cache(model) -> Iterator[None]:
    """Inside, forwards keep no keys and values, which nobody reads."""
    before, model.config.use_cache = getattr(model.config, "use_cache", None), False
    try:
        yield
    finally:
        model.config.use_cache = before


@contextmanager
def _quiet() -> Iterator[None]:
    """Inside, the harness and `datasets` say nothing, except for one progress bar on a terminal."""
    from tqdm import std

    original, loggers = std.tqdm.__init__, [logging.getLogger(name) for name in ("lm_eval", "datasets")]
    levels = [logger.level for logger in loggers]

    def init(bar, *args, **kwargs):
        shown = str(kwargs.get("desc", "")).startswith("Running")
        original(bar, *args, **kwargs | {"disable": None if shown else True, "leave": False})

    std.tqdm.__init__ = init
    for logger in loggers:
        logger.setLevel(logging.CRITICAL)
    try:
        with warnings.catch_warnings(), open(os.devnull, "w") as nowhere, redirect_stdout(nowhere):
            warnings.simplefilter("ignore")
            yield
    finally:
        std.tqdm.__init__ = original
        for logger, level in zip(loggers, levels, strict=True):
            logger.setLevel(level)


# ------------------------------------------------------------------------------------------------------ a task of our own


def offline_task(name: str, data_dir: Path, source: str = "auto", seed: int = 0) -> Path | None:
    """The folder to include for "news_choice", made of the prepared news' test split if it is not there; None for others.

    The articles are those that no model of this repository was trained on, whatever the seed, which draws the questions.
    """
    if name != NEWS_CHOICE:
        return None
    prepared = text.prepare_text("news", data_dir, source)
    folder = Path(data_dir) / "zero_shot" / (f"{NEWS_CHOICE}-seed{seed}" if seed else NEWS_CHOICE)
    return write_choice_task(folder, NEWS_CHOICE, corpus.read_texts(prepared.path, "test"), seed, QUESTIONS)


def write_choice_task(folder: Path, name: str, documents: list[str], seed: int, n: int) -> Path:
    """Write a task of lm-evaluation-harness into `folder`, which is returned: <name>.yaml and <name>.jsonl.

    A question is 64 words of a document and four continuations of 24 words: its own, and those of pieces of three other
    documents. `n` questions, or as many as the documents have pieces. Files that are there and the same stay as they are.
    UserError where fewer than four documents are long enough.
    """
    if n < 1:
        raise UserError(f"{name}: {n} questions, expected 1 or more")
    draw = random.Random(seed)
    pieces = [(i, *piece) for i, document in enumerate(documents) for piece in _pieces(document)]
    if (found := len({i for i, *_ in pieces})) < N_CHOICES:
        raise UserError(f"{name}: {found} documents have {CONTEXT + CONTINUATION} words or more, expected {N_CHOICES} at least")
    ends: dict[int, list[str]] = {}
    for i, _, end in pieces:
        ends.setdefault(i, []).append(end)
    draw.shuffle(pieces)
    questions = []
    for i, context, end in pieces[:n]:
        others = draw.sample([j for j in ends if j != i], N_CHOICES - 1)
        choices, answer = [draw.choice(ends[j]) for j in others], draw.randrange(N_CHOICES)
        choices.insert(answer, end)
        questions.append({"context": context, "choices": choices, "answer": answer})
    folder = Path(folder).absolute()
    path = folder / f"{name}.jsonl"
    described = {
        "task": name, "dataset_path": "json", "test_split": "test", "output_type": "multiple_choice",
        "dataset_kwargs": {"data_files": {"test": str(path)}, "cache_dir": str(folder / ".cache")},
        "doc_to_text": "context", "doc_to_choice": "choices", "doc_to_target": "answer",
        "metric_list": [{"metric": metric, "aggregation": "mean", "higher_is_better": True} for metric in ("acc", "acc_norm")],
        "metadata": {"version": 1.0},
    }  # fmt: skip
    _write(path, "".join(json.dumps(question, ensure_ascii=False) + "\n" for question in questions))
    _write(folder / f"{name}.yaml", json.dumps(described, indent=2) + "\n")  # JSON is YAML
    return folder


def _pieces(document: str) -> list[tuple[str, str]]:
    """A document's contexts and their continuations, one after the other; line breaks within them are kept."""
    words = [(found.start(), found.end()) for found in re.finditer(r"\S+", document)]
    length = CONTEXT + CONTINUATION
    return [(document[words[i][0] : words[i + CONTEXT - 1][1]], document[words[i + CONTEXT][0] : words[i + length - 1][1]])
            for i in range(0, len(words) - length + 1, length)]  # fmt: skip


def _write(path: Path, content: str) -> None:
    """Atomically, and only what is new: a data set is loaded anew when its file was touched."""
    with suppress(OSError, UnicodeDecodeError):
        if path.read_text(encoding="utf-8") == content:
            return
    runs.write_atomic(path, content)
