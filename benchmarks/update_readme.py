"""Put generated text between the markers of README.md and docs/: result tables, the script table, preset tables.

    python benchmarks/update_readme.py            rewrite what has changed
    python benchmarks/update_readme.py --check    change nothing; exit status 2 if anything would change

A marker is a pair of lines `<!-- generated: NAME -->` and `<!-- end: NAME -->`. NAME is `results/FILE.md` for a table that a
benchmark wrote (its picture is linked by the page itself), `presets/SCRIPT.py` for the preset table of a script, or
`modules/FOLDER` for what each module of a folder says of itself. No number in a document is typed by hand.
"""

from __future__ import annotations

import ast
import importlib.util
import re
import sys
from pathlib import Path

REPOSITORY = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(REPOSITORY))

from common.runs import Parser, Preset, UserError, run_script, table, write_atomic  # noqa: E402

MARKED = re.compile(r"<!-- generated: (?P<name>\S+) -->\n.*?<!-- end: (?P=name) -->", re.DOTALL)


def generated(name: str) -> str:
    """The text of one marker. UserError for a name without a source."""
    kind, _, rest = name.partition("/")
    if kind == "modules":
        return modules(REPOSITORY / rest)
    path = REPOSITORY / ("benchmarks/results" if kind == "results" else "") / rest
    if kind not in ("results", "presets") or not path.is_file():
        raise UserError(f"<!-- generated: {name} -->: {path} not found. Run: make results")
    return path.read_text(encoding="utf-8") if kind == "results" else presets(path)


def load_script(path: Path):
    """A script as a module: names that start with a digit cannot be imported by `import`."""
    spec = importlib.util.spec_from_file_location("script", path)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def presets(script: Path) -> str:
    """A script's preset table, full and fast side by side."""
    rows = [["flag", "full", "fast", "meaning"]]
    for row in (Preset(*row) for row in load_script(script).PRESETS):
        values = [{True: "on", False: "off"}[v] if isinstance(v, bool) else str(v) for v in (row.full, row.fast)]
        rows.append([f"`--{row.flag}`", *values, row.meaning])
    return table(rows, markdown=True) + "\n"


def modules(folder: Path) -> str:
    """Every module of a folder with the first sentence of its docstring."""
    lines = ["| module | its job |", "|---|---|"]
    for path in sorted(folder.glob("[!_]*.py")):
        first = ast.get_docstring(ast.parse(path.read_text(encoding="utf-8"))).partition("\n\n")[0]
        lines.append(f"| `{path.name}` | {' '.join(first.split()).partition('. ')[0].rstrip('.')} |")
    return "\n".join(lines) + "\n"


def main(argv=None) -> None:
    parser = Parser(__doc__)
    parser.add_argument("--check", action="store_true", help="change nothing, exit status 2 if anything would change")
    args = parser.parse_args(argv)
    stale = []
    for page in [REPOSITORY / "README.md", *sorted((REPOSITORY / "docs").glob("*.md"))]:
        old = page.read_text(encoding="utf-8")
        new = MARKED.sub(lambda m: f"<!-- generated: {m['name']} -->\n\n{generated(m['name'])}\n<!-- end: {m['name']} -->", old)
        if new != old:
            stale.append(page.relative_to(REPOSITORY).as_posix())
            if not args.check:
                write_atomic(page, new)
    if args.check and stale:
        raise UserError(f"{', '.join(stale)}: not what the sources say. Run: python benchmarks/update_readme.py")
    print("\n".join(f"{'stale' if args.check else 'updated'}: {name}" for name in stale) or "everything is up to date")


if __name__ == "__main__":
    run_script(main)
