"""Write the report of a run on a folder of images as one self-contained HTML page.

Images and figures are embedded as base64; the page loads nothing and runs no script. It adapts to the width of the
screen and to light and dark mode. The first part builds elements of the page, the second its sections from a
`FolderAnalysis`.

Shapes: pixels (H, W, 3) uint8.
"""

import base64
import io
import shlex
from collections.abc import Iterable, Mapping, Sequence
from html import escape
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from matplotlib.figure import Figure
from PIL import Image
from torch import Tensor

from minissl.data.images import decode_image, short_side
from minissl.evaluation import attention_mass_mask, dense_attention, dense_patches
from minissl.reports import recommend
from minissl.reports.analysis import FolderAnalysis, analyze_run, center_features, nearest_images, outliers, summary
from minissl.reports.dataset_stats import DatasetStats, folder_path
from minissl.training import checkpoint
from minissl.visualization import collapse_figure, curves_figure, pca_rgb
from minissl.visualization.curves import NON_LOSS_KEYS

TILE_PIXELS = 120  # maximum side of an image in a grid
MAP_PIXELS = 176  # side of an image with maps

TERM_DESCRIPTIONS = {
    "loss": "The loss should fall and then level off.",
    "positive_similarity": "The positive similarity, the cosine of two views of one image, should be well above 0.",
    "teacher_entropy": "The teacher's entropy should be well below the red line, the entropy of uniform targets.",
    "koleo": "The KoLeo term falls as the nearest neighbors of a batch move apart.",
    "rank_me": "RankMe is the effective rank of the features; 1 means that all features are equal (collapse).",
    "knn": "The k-NN accuracy should rise above that of the randomly initialized encoder.",
}

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
.warning { border-left: 3px solid var(--alarm); padding-left: 1rem; }
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
.query { grid-column: span 2; grid-row: span 2; margin-right: 5px; }
.query img { outline: 2px solid var(--accent); outline-offset: 2px; }
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


def document(title: str, lead: str, sections: Mapping[str, str], footer: str) -> str:
    """Build a page: title, first paragraph, table of contents, sections and footer.

    Args:
        title: plain text.
        lead: HTML.
        sections: title (plain text) -> HTML; empty sections are left out.
        footer: HTML.
    """
    shown = [(name, html) for name, html in sections.items() if html]
    links = "".join(f'<a href="#part{i}">{escape(name)}</a>' for i, (name, _) in enumerate(shown))
    parts = "".join(
        f'<section id="part{i}"><h2>{escape(name)}</h2>{html}</section>' for i, (name, html) in enumerate(shown)
    )
    return (
        f'<!doctype html>\n<html lang="en"><head><meta charset="utf-8"><title>{escape(title)}</title>'
        f'<meta name="viewport" content="width=device-width, initial-scale=1"><style>{STYLE}</style></head>'
        f'<body><main><h1>{escape(title)}</h1>{lead}<nav aria-label="Contents">{links}</nav>{parts}'
        f'<footer class="note">{footer}</footer></main></body></html>\n'
    )


def data_url(image_format: str, content: bytes) -> str:
    """Encode an image file as a data URL."""
    return f"data:image/{image_format};base64,{base64.b64encode(content).decode()}"


def tile(pixels: np.ndarray, alt: str, note: str = "", style: str = "") -> str:
    """Embed an image with its alternative text and an optional caption: PNG up to 48 pixels high, else JPEG."""
    image_format, buffer = ("png" if len(pixels) <= 48 else "jpeg"), io.BytesIO()
    Image.fromarray(pixels).save(buffer, image_format, quality=85)
    size = f'width="{pixels.shape[1]}" height="{pixels.shape[0]}"'
    caption = f"<figcaption>{escape(note)}</figcaption>" if note else ""
    img = f'<img src="{data_url(image_format, buffer.getvalue())}" alt="{escape(alt)}" {size}>'
    return f'<figure class="{style}">{img}{caption}</figure>'


def photo(file: Path, note: str = "", style: str = "", size: int = TILE_PIXELS) -> str:
    """Embed the center square of an image file, at most `size` pixels a side."""
    pixels = decode_image(file, min(size, short_side(file) or size))
    assert pixels is not None, f"{file} could be read before"
    return tile(pixels, f"image {file.name}", note, style)


def grid(tiles: Iterable[str], wide: int, narrow: int) -> str:
    """Arrange tiles in rows of `wide` tiles, or of `narrow` on a narrow screen."""
    return f'<div class="grid" style="--wide:{wide};--narrow:{narrow}">{"".join(tiles)}</div>'


def pair(parts: Iterable[str]) -> str:
    """Arrange parts in two columns, or in one on a narrow screen."""
    return f'<div class="pair">{"".join(parts)}</div>'


def chart(figure: Figure, alt: str) -> str:
    """Embed a matplotlib figure; its brightness is inverted in dark mode."""
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png", dpi=130)
    return f'<figure><img class="chart" src="{data_url("png", buffer.getvalue())}" alt="{escape(alt)}"></figure>'


def terms(pairs: Iterable[tuple[str, str]]) -> str:
    """Build a table of terms and descriptions, both HTML."""
    return "<dl>" + "".join(f"<div><dt>{term}</dt><dd>{text}</dd></div>" for term, text in pairs) + "</dl>"


def bars(fractions: Mapping[str, float]) -> str:
    """Draw fractions in [0, 1] as horizontal bars with percentages."""
    rows = (
        (escape(name), f'<div class="bar" style="width:{fraction:.1%}"></div>{fraction:.1%}')
        for name, fraction in fractions.items()
    )
    return terms(rows)


def unbroken_code(word: str) -> str:
    """Format an option as code that is not broken across lines."""
    return f'<code style="white-space:nowrap">{escape(word)}</code>'


def paragraph(text: str, style: str = "note") -> str:
    """Build a paragraph of plain text."""
    return f'<p class="{style}">{escape(text)}</p>'


def write_report(run_dir: Path, stats: DatasetStats) -> Path:
    """Write report.html into the folder of a finished run on a folder of images. Returns its path."""
    path = run_dir / "report.html"
    html = render_report(analyze_run(run_dir, stats), str(run_dir))
    checkpoint.write_atomic(path, html.encode("utf-8", "replace"))  # file names may contain invalid Unicode
    return path


def render_report(analysis: FolderAnalysis, run_dir: str) -> str:
    """Build the whole page as HTML; `run_dir` is the run's folder as it is typed on the command line."""
    sections = {
        "Images": section_images(analysis),
        "Recommended options": section_recommendations(analysis.stats, recommend.command(analysis.stats, run_dir)),
        "Training": section_training(analysis),
        "k-NN accuracy": section_classes(analysis),
        "Clusters": section_groups(analysis),
        "Nearest neighbors": section_neighbors(analysis),
        "Attention and patch features": section_maps(analysis),
        "Outliers": section_outliers(analysis),
        "Near-duplicates": section_duplicates(analysis),
    }
    lead = paragraph(" ".join(summary(analysis)), "lead warning" if analysis.findings else "lead")
    footer = (
        f"Written by minissl. The trained encoder is encoder.safetensors in the same folder; "
        f"minissl doctor {run_dir} diagnoses the training."
    )
    name = folder_path(analysis.stats.data).resolve().name
    return document(f"Self-supervised features of {name}", lead, sections, escape(footer))


def evenly_spaced(n: int, total: int) -> list[int]:
    """Return at most n distinct indices of `total`, at the centers of equal parts."""
    n = min(n, total)
    return [(2 * i + 1) * total // (2 * n) for i in range(n)]


def section_images(analysis: FolderAnalysis) -> str:
    """Show a sample of the images, and the statistics of the folder."""
    stats = analysis.stats
    unreadable = f"; {stats.num_unreadable:,} unreadable files" if stats.num_unreadable else ""
    rows = {
        "Number of images": f"{stats.num_train:,} for training, {stats.num_test:,} for testing" + unreadable,
        "Labels": f"{stats.num_classes} class folders, used for evaluation only" if stats.num_classes else "none",
        "Short side": f"{stats.median_side} pixels (median), {stats.min_side} (minimum)",
        "Aspect ratio": f"{stats.aspect_ratio:.2f} (median, long side by short side); the center square is kept",
        "Gray": f"{stats.gray_fraction:.0%} of a sample of {stats.sample_size:,} images",
        "Near-duplicates": f"{stats.duplicate_fraction:.1%} of the sample duplicate an earlier image",
        "Nearest similarity": f"{stats.nearest_similarity:.2f}, median cosine of a thumbnail and the nearest other",
        "Texture agreement": f"{stats.texture_agreement:.2f}, similarity of an image's quarters (1: a uniform texture)",
    }
    tiles = (photo(analysis.files[row]) for row in evenly_spaced(14, len(analysis.files)))
    return grid(tiles, 7, 7) + terms(rows.items())


def section_recommendations(stats: DatasetStats, command: Sequence[str]) -> str:
    """Show the options with their reasons, the warnings and the command."""
    rows = [
        (f"{unbroken_code(line.option)} <code>{escape(line.text)}</code>", escape(line.reason))
        for line in recommend.recommend(stats)
    ]
    text = "The chosen options and the reasons. k-NN is the accuracy of the 20 nearest neighbors' vote, in percent."
    warnings = "".join(paragraph(sentence, "warning") for sentence in recommend.warnings_for(stats))
    args = " ".join(unbroken_code(arg) if arg.startswith("--") else escape(shlex.quote(arg)) for arg in command)
    return f"{paragraph(text)}{terms(rows)}{warnings}<pre>minissl {args}</pre>"


def section_training(analysis: FolderAnalysis) -> str:
    """Show a curve of each logged quantity, and the singular values and cosines of the features."""
    charts, names = [], dict.fromkeys(name for line in analysis.log for name in line if name not in NON_LOSS_KEYS)
    num_prototypes = analysis.run.method_options.get("num_prototypes")
    for name in names:
        lines = [{"step": line["step"], name: line[name]} for line in analysis.log if name in line]
        figure = curves_figure(lines, num_prototypes, analysis.metrics.get("random_knn"))
        alt = f"{name.replace('_', ' ')} by step: from {lines[0][name]:.2f} to {lines[-1][name]:.2f}"
        charts.append(chart(figure, alt))
    text = " ".join(TERM_DESCRIPTIONS[name] for name in names if name in TERM_DESCRIPTIONS)
    figure = collapse_figure(analysis.sample_features, analysis.random_features)
    collapse = chart(figure, "singular values of the features, and cosines of pairs of images")
    note = "Left: the slower the singular values fall, the higher the rank. Right: if all cosines are 1, the features "
    note += "have collapsed."
    return f'{paragraph(text)}{pair(charts)}<div class="scroll">{collapse}</div>{paragraph(note)}'


def section_classes(analysis: FolderAnalysis) -> str:
    """Show the k-NN accuracy; empty without labels."""
    metrics, labels = analysis.metrics, analysis.images.labels
    if "knn" not in metrics or labels is None:
        return ""
    text = (
        f"The labels were not used for training. Each of {metrics['test_images']:,} test images gets the class that "
        "its 20 nearest neighbors among the training images vote for. A trained encoder should exceed random init."
    )
    largest = float(labels.bincount().max() / len(analysis.files))
    fractions = {"Trained": metrics["knn"], "Random init": metrics["random_knn"], "Largest class": largest}
    return paragraph(text) + bars(fractions)


def class_name(analysis: FolderAnalysis, row: int) -> str:
    """Return the name of an image's class, or "" without labels."""
    labels = analysis.images.labels
    return "" if labels is None else analysis.images.classes[int(labels[row])]


def file_label(analysis: FolderAnalysis, row: int) -> str:
    """Return the path of an image within its folder, without suffix."""
    file, root = analysis.files[row], folder_path(analysis.stats.data)
    return file.relative_to(root).with_suffix("").as_posix().removeprefix("train/")


def section_groups(analysis: FolderAnalysis) -> str:
    """Show the ten most central images of each cluster, with its most frequent classes."""
    html = paragraph(
        "k-means assigns every image to one of these clusters; their number is fixed in advance. Shown are the ten "
        "images nearest to each cluster's mean. A good cluster contains one class; a poor one shares only a color."
    )
    for number, rows in enumerate(analysis.groups, 1):
        names = [class_name(analysis, row) for row in rows.tolist()]
        frequent = sorted({*names} - {""}, key=names.count, reverse=True)[:3]
        classes = ", ".join(f"{names.count(name) / len(names):.0%} {name}" for name in frequent)
        html += f"<h3>{number}. {len(rows):,} images{escape(f': {classes}' if classes else '')}</h3>"
        html += grid((photo(analysis.files[row]) for row in rows[:10].tolist()), 10, 5)
    return html


def section_neighbors(analysis: FolderAnalysis) -> str:
    """Show the six nearest neighbors of eight images."""
    captions = "classes" if analysis.images.classes else "cosine similarities"
    text = (
        "Framed are evenly spaced query images; beside each are its six nearest neighbors in feature space, with their "
        f"{captions}. They should show the same content, not only the same colors."
    )
    rows = torch.tensor(evenly_spaced(8, len(analysis.files)))
    unit, parts = F.normalize(center_features(analysis.features), dim=-1), []
    for row, neighbors in zip(rows.tolist(), nearest_images(unit, rows, 6).tolist()):
        tiles = [photo(analysis.files[row], class_name(analysis, row), "query", MAP_PIXELS)]
        tiles += [photo(analysis.files[i], class_name(analysis, i) or f"{unit[i] @ unit[row]:.2f}") for i in neighbors]
        parts.append(grid(tiles, 5, 5))
    return paragraph(text) + pair(parts)


def section_maps(analysis: FolderAnalysis) -> str:
    """Show the attention and the patch features of eight test images."""
    rows, size = evenly_spaced(8, len(analysis.test_images)), analysis.run.crop_size
    images = analysis.test_images.images[rows]
    attention = dense_attention(analysis.encoder, images, size).mean(dim=1)  # (8, size, size), over all heads
    masks = attention_mass_mask(attention).float()
    colors = pca_rgb(dense_patches(analysis.encoder, images, 2 * size, 0))  # (8, 3, h, w)
    parts = []
    for file, mask, color in zip((analysis.test_files[row] for row in rows), masks, colors):
        pixels = decode_image(file, MAP_PIXELS)
        assert pixels is not None, f"{file} could be read before"
        attended = to_pixels(pixels / 255 * (0.2 + 0.8 * resize_map(mask[None])))
        tiles = [tile(pixels, f"image {file.name}"), tile(attended, f"attention in {file.name}")]
        tiles.append(tile(to_pixels(resize_map(color)), f"PCA of the patch features of {file.name}"))
        parts.append(grid(tiles, 3, 3))
    text = (
        "Test images; the region with 60% of the class token's attention, averaged over all heads; and the first three "
        "principal components of the patch features as red, green and blue. Attention should lie on objects rather "
        "than on the background, and the same part of an object should have one color in all images."
    )
    return paragraph(text) + pair(parts)


def resize_map(x: Tensor) -> np.ndarray:
    """Resize a map (C, h, w) to (MAP_PIXELS, MAP_PIXELS, C) by bilinear interpolation."""
    resized = F.interpolate(x[None], (MAP_PIXELS, MAP_PIXELS), mode="bilinear", align_corners=False)[0]
    return resized.permute(1, 2, 0).numpy()


def to_pixels(x: np.ndarray) -> np.ndarray:
    """Convert floats in [0, 1] to uint8."""
    return (255 * x).round().clip(0, 255).astype(np.uint8)


def section_outliers(analysis: FolderAnalysis) -> str:
    """Show the images with the most distant tenth neighbor."""
    text = (
        "The images whose tenth nearest neighbor is farthest, with their file names: rare classes, mistakes, or images "
        "that do not belong to the data set."
    )
    rows = outliers(analysis.features, min(14, len(analysis.files))).tolist()
    return paragraph(text) + grid((photo(analysis.files[row], file_label(analysis, row)) for row in rows), 7, 4)


def section_duplicates(analysis: FolderAnalysis) -> str:
    """Show two images of each of the first eight sets of near-duplicates."""
    if not analysis.duplicates:
        return paragraph(f"None among {len(analysis.files):,} images.")
    text = (
        f"{len(analysis.duplicates)} sets of images with nearly equal thumbnails, also mirrored or slightly shifted; "
        "two images of at most eight sets are shown, the most similar first. Dark or plain images may be mistakes."
    )
    sets = (
        [photo(analysis.files[row], file_label(analysis, row)) for row in rows[:2].tolist()]
        for rows in analysis.duplicates[:8]
    )
    return paragraph(text) + grid((grid(tiles, 2, 2) for tiles in sets), 4, 2)
