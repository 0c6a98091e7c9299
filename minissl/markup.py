"""A page that holds everything: pictures are inside it as base64, nothing is fetched and nothing runs.

It reads on a phone and on a desk, in light and in dark. Here is its style, and how pictures, figures and tables become
parts of it; what they say is the business of `page`. Pictures are (H, W, 3) uint8.
"""

import base64
import io
from collections.abc import Iterable, Mapping
from html import escape
from pathlib import Path

import numpy as np
from matplotlib.figure import Figure
from PIL import Image

from minissl.data.images import decode, short_side

TILE = 120  # pixels a side of a picture in the page, at most

STYLE = """
:root { color-scheme: light dark; --ink: #1c1d20; --soft: #62666e; --line: #e4e6ea; --paper: #fff; --tint: #f5f6f8;
  --accent: #1f4e79; --alarm: #c2410c; }
@media (prefers-color-scheme: dark) {
  :root { --ink: #e8e9ec; --soft: #9a9fa8; --line: #33363c; --paper: #17181b; --tint: #212327; --accent: #8ab8e6;
    --alarm: #f08a4b; }
  .chart { filter: invert(.908) hue-rotate(180deg); } }
* { box-sizing: border-box; }
body { margin: 0; background: var(--paper); color: var(--ink); font: 17px/1.6 system-ui, sans-serif;
  -webkit-text-size-adjust: 100%; }
main { max-width: 46rem; margin: 0 auto; padding: 4rem 1.25rem 5rem; }
h1 { font-size: 2.2rem; line-height: 1.15; letter-spacing: -.02em; margin: 0 0 1.4rem; overflow-wrap: anywhere; }
h2 { font-size: 1.4rem; letter-spacing: -.01em; margin: 4.5rem 0 .7rem; }
h3 { font-size: 1rem; margin: 2rem 0 0; }
p { margin: 0 0 1rem; }
.lead { font-size: 1.12rem; }
.note { color: var(--soft); font-size: .93rem; }
.beware { border-left: 3px solid var(--alarm); padding-left: 1rem; }
nav { margin: 2.5rem 0 0; padding: 1rem 1.3rem; background: var(--tint); border-radius: 12px; columns: 2; }
nav a { display: block; color: var(--accent); text-decoration: none; padding: .2rem 0; break-inside: avoid; }
code, pre { font: .86em/1.5 ui-monospace, monospace; }
pre code { font-size: 1em; }
pre { background: var(--tint); border-radius: 12px; padding: 1rem 1.3rem; white-space: pre-wrap;
  overflow-wrap: anywhere; }
dl { margin: 1.2rem 0; }
dl div { display: grid; grid-template-columns: 13rem 1fr; gap: .1rem 1.3rem; padding: .65rem 0;
  border-top: 1px solid var(--line); }
dt { font-weight: 600; }
dt code { font-size: .9em; }
dt code + code { font-weight: 400; color: var(--accent); padding-left: .3rem; }
dd { margin: 0; font-size: .95rem; }
figure { margin: 0; min-width: 0; }
img { display: block; width: 100%; height: auto; border-radius: 6px; }
figcaption { font-size: .7rem; line-height: 1.35; color: var(--soft); padding-top: 3px;
  overflow-wrap: anywhere; hyphens: auto; }
.grid { display: grid; gap: 6px; grid-template-columns: repeat(var(--wide), 1fr); margin: .8rem 0 1.4rem; }
.asked { grid-column: span 2; grid-row: span 2; margin-right: 5px; }
.asked img { outline: 2px solid var(--accent); outline-offset: 2px; }
.pair { display: grid; gap: 1.2rem 1.6rem; grid-template-columns: 1fr 1fr; margin: 1.2rem 0; align-items: start; }
.pair .grid, .grid .grid { margin: 0; }
.grid:has(.grid) { gap: 1.2rem; }
.scroll { overflow-x: auto; }
.scroll img { min-width: 34rem; }
.bar { height: .6rem; border-radius: 3px; background: var(--accent); margin: .5rem 0 .15rem; }
footer { margin-top: 5rem; border-top: 1px solid var(--line); padding-top: 1.2rem; }
@media (max-width: 40rem) {
  main { padding-top: 2.2rem; }
  h1 { font-size: 1.7rem; }
  .pair, dl div { grid-template-columns: 1fr; }
  .grid { grid-template-columns: repeat(var(--narrow), 1fr); } }
"""


def document(title: str, lead: str, sections: Mapping[str, str], end: str) -> str:
    """A whole page: a title, a paragraph, a table of contents, the sections under their titles, and a last line.

    Args:
        title: plain text.
        lead: HTML.
        sections: title, plain text -> HTML; those of which there is nothing are left out.
        end: HTML.
    """
    there = [(title, text) for title, text in sections.items() if text]
    links = "".join(f'<a href="#part{i}">{escape(name)}</a>' for i, (name, _) in enumerate(there))
    parts = "".join(f'<section id="part{i}"><h2>{escape(n)}</h2>{text}</section>' for i, (n, text) in enumerate(there))
    return (
        f'<!doctype html>\n<html lang="en"><head><meta charset="utf-8"><title>{escape(title)}</title>'
        f'<meta name="viewport" content="width=device-width, initial-scale=1"><style>{STYLE}</style></head>'
        f'<body><main><h1>{escape(title)}</h1>{lead}<nav aria-label="Contents">{links}</nav>{parts}'
        f'<footer class="note">{end}</footer></main></body></html>\n'
    )


def address(kind: str, content: bytes) -> str:
    return f"data:image/{kind};base64,{base64.b64encode(content).decode()}"


def tile(pixels: np.ndarray, alt: str, note: str = "", style: str = "") -> str:
    """A picture, what it is for those who do not see it, and perhaps a line under it: PNG if small, else JPEG."""
    kind, buffer = ("png" if len(pixels) <= 48 else "jpeg"), io.BytesIO()
    Image.fromarray(pixels).save(buffer, kind, quality=85)
    size = f'width="{pixels.shape[1]}" height="{pixels.shape[0]}"'
    under = f"<figcaption>{escape(note)}</figcaption>" if note else ""
    shown = f'<img src="{address(kind, buffer.getvalue())}" alt="{escape(alt)}" {size}>'
    return f'<figure class="{style}">{shown}{under}</figure>'


def photo(file: Path, note: str = "", style: str = "", size: int = TILE) -> str:
    """A file as a tile, the middle square of it; small pictures stay as they are."""
    return tile(decode(file, min(size, short_side(file))), f"picture {file.name}", note, style)


def grid(tiles: Iterable[str], wide: int, narrow: int) -> str:
    """Tiles in rows of so many, on a desk and on a phone."""
    return f'<div class="grid" style="--wide:{wide};--narrow:{narrow}">{"".join(tiles)}</div>'


def pair(parts: Iterable[str]) -> str:
    """Parts in two columns, on a phone in one."""
    return f'<div class="pair">{"".join(parts)}</div>'


def chart(figure: Figure, alt: str) -> str:
    """A figure of matplotlib, whose light is turned round in the dark."""
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png", dpi=130)
    return f'<figure><img class="chart" src="{address("png", buffer.getvalue())}" alt="{escape(alt)}"></figure>'


def terms(pairs: Iterable[tuple[str, str]]) -> str:
    """A table of terms and what is said of them, both HTML."""
    return "<dl>" + "".join(f"<div><dt>{term}</dt><dd>{said}</dd></div>" for term, said in pairs) + "</dl>"


def bars(shares: Mapping[str, float]) -> str:
    """Shares, 0 to 1, as bars under each other."""
    shown = (
        (escape(name), f'<div class="bar" style="width:{share:.1%}"></div>{share:.1%}')
        for name, share in shares.items()
    )
    return terms(shown)


def keep(word: str) -> str:
    """An option, whose dashes are no place to break a line."""
    return f'<code style="white-space:nowrap">{escape(word)}</code>'


def say(text: str, style: str = "note") -> str:
    """A paragraph of plain text."""
    return f'<p class="{style}">{escape(text)}</p>'
