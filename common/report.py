"""One HTML file that needs nothing else: text, tables that sort, charts as SVG; and the same tables as Markdown."""

from __future__ import annotations

import html
import io
import re
from typing import Any, NamedTuple

from common.runs import table

INK = "#123456"  # drawn in this colour, and replaced by the colour of the page's text

STYLE = """
:root { color-scheme: light dark; --line: #8885; --faint: #8882; --link: #0b57d0; --bad: #b3261e; }
@media (prefers-color-scheme: dark) { :root { --link: #8ab4f8; --bad: #f2b8b5; } }
* { box-sizing: border-box; }
body { font: 15px/1.5 system-ui, sans-serif; margin: 0 auto; padding: 1rem; max-width: 72rem; }
h1 { font-size: 1.6rem; } h2 { font-size: 1.25rem; margin-top: 2rem; } h3 { font-size: 1rem; }
a { color: var(--link); } code { font-size: .85em; overflow-wrap: anywhere; }
.scroll { overflow-x: auto; max-width: 100%; }
table { border-collapse: collapse; font-variant-numeric: tabular-nums; font-size: .87rem; }
th, td { padding: .3rem .6rem; border-bottom: 1px solid var(--line); text-align: right; white-space: nowrap; }
th:first-child, td:first-child, td.text { text-align: left; } li, p { overflow-wrap: anywhere; }
th button { all: unset; cursor: pointer; font-weight: 600; } th button:focus-visible { outline: 2px solid var(--link); }
th[aria-sort=ascending] button::after { content: " \\2191"; } th[aria-sort=descending] button::after { content: " \\2193"; }
.bad { color: var(--bad); font-weight: 600; }
details { border: 1px solid var(--line); border-radius: .4rem; padding: .5rem .8rem; margin: .6rem 0; }
summary { cursor: pointer; font-weight: 600; overflow-wrap: anywhere; }
.charts { display: flex; flex-wrap: wrap; gap: 1rem; align-items: flex-start; }
figure { margin: 0; flex: 1 1 20rem; max-width: 34rem; min-width: 0; } figcaption { font-size: .85rem; }
figure svg { width: 100%; height: auto; display: block; }
@media print { body { max-width: none; } details { break-inside: avoid; } th button::after { content: "" !important; } }
"""

SCRIPT = """
for (const head of document.querySelectorAll("table.sorts thead")) {
  head.querySelectorAll("th").forEach((cell, column) => cell.querySelector("button").addEventListener("click", () => {
    const up = cell.getAttribute("aria-sort") !== "ascending";
    head.querySelectorAll("th").forEach(other => other.removeAttribute("aria-sort"));
    cell.setAttribute("aria-sort", up ? "ascending" : "descending");
    const body = head.parentElement.tBodies[0], value = row => row.cells[column].dataset.value ?? "";
    const both = (a, b) => a !== "" && b !== "" && !isNaN(a) && !isNaN(b);
    const order = (a, b) => both(a, b) ? a - b : a === "" ? 1 : b === "" ? -1 : a.localeCompare(b);
    [...body.rows].sort((a, b) => (up ? 1 : -1) * order(value(a), value(b))).forEach(row => body.append(row));
  }));
}
window.addEventListener("beforeprint", () => document.querySelectorAll("details").forEach(d => d.open = true));
"""


class Cell(NamedTuple):
    """What a cell shows, what it is sorted by, where it leads, and whether something is wrong with it."""

    text: str
    value: Any = None
    link: str | None = None
    bad: bool = False


def cell(content: Any) -> Cell:
    return content if isinstance(content, Cell) else Cell("" if content is None else str(content), content)


def html_table(rows: list[list[Any]], sorts: bool = True) -> str:
    """Rows (the first is the header; Cells or anything) as a table that sorts by a click, or a key, on a column's head."""
    head, *body = rows

    def shown(content) -> str:
        c = cell(content)
        text = html.escape(c.text)
        text = f'<a href="{html.escape(c.link)}">{text}</a>' if c.link and c.text else text
        kinds = " ".join(kind for kind, on in (("bad", c.bad), ("text", len(c.text) > 40)) if on)
        value = "" if c.value is None else html.escape(str(c.value))
        return f'<td{f" class={chr(34)}{kinds}{chr(34)}" if kinds else ""} data-value="{value}">{text}</td>'

    heads = "".join(f'<th scope="col">{f"<button>{html.escape(str(h))}</button>" if sorts else html.escape(str(h))}</th>'
                    for h in head)  # fmt: skip
    lines = "".join(f"<tr>{''.join(map(shown, row))}</tr>\n" for row in body)
    kind = ' class="sorts"' if sorts else ""
    whole = f"<table{kind}><thead><tr>{heads}</tr></thead>\n<tbody>{lines}</tbody></table>"
    return f'<div class="scroll" tabindex="0">{whole}</div>'


def markdown_table(rows: list[list[Any]]) -> str:
    return table([[cell(content).text.replace("|", "\\|") for content in row] for row in rows], markdown=True)


def svg(figure, name: str) -> str:
    """A matplotlib figure as SVG to stand in a page: transparent, in the page's text colour, its ids its own."""
    import matplotlib

    buffer = io.StringIO()
    with matplotlib.rc_context({"svg.fonttype": "none", "svg.hashsalt": name}):
        figure.savefig(buffer, format="svg", transparent=True, metadata={"Date": None, "Creator": None})
    text = buffer.getvalue()
    text = text[text.index("<svg") :].replace(INK, "currentColor")
    text = re.sub(r'(id="|href="#|url\(#)', lambda m: m[0] + name + "-", text)
    return text.replace("<svg ", f'<svg role="img" aria-label="{html.escape(name)}" ', 1)


def new_figure(width: float = 5.2, height: float = 3.4):
    """A figure and its axes, in the page's ink and without a display."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    names = ("text.color", "axes.labelcolor", "axes.edgecolor", "xtick.color", "ytick.color")
    with matplotlib.rc_context(dict.fromkeys(names, INK) | {"font.size": 9}):
        figure, axes = pyplot.subplots(figsize=(width, height), layout="constrained")
    axes.spines[["top", "right"]].set_visible(False)
    axes.grid(alpha=0.25)
    axes.ticklabel_format(useOffset=False)
    return figure, axes


def chart(figure, name: str, caption: str) -> str:
    """The figure as an HTML figure with its caption; closed afterwards."""
    from matplotlib import pyplot

    text = f"<figure>{svg(figure, name)}<figcaption>{html.escape(caption)}</figcaption></figure>"
    pyplot.close(figure)
    return text


def page(title: str, body: str) -> str:
    return (f'<!doctype html>\n<html lang="en"><head><meta charset="utf-8"><title>{html.escape(title)}</title>\n'
            f'<meta name="viewport" content="width=device-width, initial-scale=1">\n<style>{STYLE}</style></head>\n'
            f"<body>\n{body}\n<script>{SCRIPT}</script>\n</body></html>\n")  # fmt: skip
