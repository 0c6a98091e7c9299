"""Look at a folder of pictures, say how to learn from it and why, do it, and write what was found into one page.

Every section is a function of the `album.Album`, and says what to look for.
"""

import shlex
from collections.abc import Sequence
from html import escape
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from minissl import advise, checkpoint
from minissl.album import Album, centred, headline, neighbours, odd_ones, open_album
from minissl.data.images import decode
from minissl.evaluate import fine_attention, fine_patches, mass_mask
from minissl.markup import bars, chart, document, grid, keep, pair, photo, say, terms, tile
from minissl.survey import Facts, folder_of
from minissl.visualize import collapse_figure, curves_figure, pca_rgb
from minissl.visualize.curves import NOT_A_TERM

LARGE = 176  # pixels of a picture beside its maps

MEANS = {
    "loss": "The loss should fall, and then level off.",
    "partners": "Partners is the cosine of two views of one picture; it should be well above 0.",
    "teacher_entropy": "The teacher's entropy is how undecided its answers are, and should be well below the red line.",
    "koleo": "KoLeo falls as pictures move apart.",
    "rank_me": "RankMe is how many directions the features use; at 1 all pictures are the same to the network.",
    "knn": "k-NN is the share of right classes by the nearest pictures, and should rise above the untrained network's.",
}


def write(out: Path, facts: Facts) -> Path:
    """Write OUT/report.html about a finished run on a folder. Returns its path."""
    path = out / "report.html"
    html = page(open_album(out, facts), str(out))
    checkpoint.write(path, html.encode("utf-8", "replace"))  # names of files may hold what is no text
    return path


def page(album: Album, out: str) -> str:
    """The whole page, HTML."""
    style = "lead beware" if album.findings else "lead"
    sections = {
        "The pictures": the_pictures(album),
        "The advice": the_advice(album.facts, advise.command(album.facts, out)),
        "The training": the_training(album),
        "Classes": the_classes(album),
        "Groups": the_groups(album),
        "Nearest neighbours": the_neighbours(album),
        "Where it looks": the_maps(album),
        "Odd ones out": the_odd(album),
        "Near-copies": the_copies(album),
    }
    name = folder_of(album.facts.data).resolve().name
    end = (
        f"By minissl. The network is encoder.safetensors, beside this page; python -m minissl doctor {out} looks at it."
    )
    return document(f"What is in {name}", say(" ".join(headline(album)), style), sections, escape(end))


def spaced(n: int, of: int) -> list[int]:
    """n rows of so many, evenly spaced and not at the ends: drawn, not chosen."""
    n = min(n, of)
    return [(2 * i + 1) * of // (2 * n) for i in range(n)]


def the_pictures(album: Album) -> str:
    facts = album.facts
    unread = f"; {facts.broken:,} that cannot be read" if facts.broken else ""
    about = {
        "Number": f"{facts.train:,} to learn from, {facts.test:,} kept back" + unread,
        "Labels": f"{facts.classes} class folders, used to ask and not to learn" if facts.classes else "none",
        "Short side": f"{facts.middle} pixels, the median; {facts.smallest} at least",
        "Long side": f"{facts.aspect:.2f} times the short one, the median; the middle square is kept",
        "Grey": f"{facts.grey:.0%}, of {facts.looked:,} that were looked at",
        "Near-copies": f"{facts.copies:.1%} of these nearly repeat an earlier one",
        "Alike": f"{facts.alike:.2f}, the cosine of a thumbnail with the most similar other (median)",
        "Texture": f"{facts.texture:.2f}, how well the quarters of a picture agree; 1 is the same everywhere",
    }
    shown = (photo(album.files[row]) for row in spaced(14, len(album.files)))
    return grid(shown, 7, 7) + terms(about.items())


def the_advice(facts: Facts, command: Sequence[str]) -> str:
    told = [(f"{keep(one.option)} <code>{escape(one.text)}</code>", escape(one.reason)) for one in advise.advise(facts)]
    said = "What was chosen, and why. k-NN is the share of right classes by the 20 nearest neighbours, in percent."
    beware = "".join(say(sentence, "beware") for sentence in advise.cautions(facts))
    words = " ".join(keep(word) if word.startswith("--") else escape(shlex.quote(word)) for word in command)
    return f"{say(said)}{terms(told)}{beware}<pre>python -m minissl {words}</pre>"


def the_training(album: Album) -> str:
    charts, names = [], dict.fromkeys(name for line in album.log for name in line if name not in NOT_A_TERM)
    for name in names:
        lines = [{"step": line["step"], name: line[name]} for line in album.log if name in line]
        figure = curves_figure(lines, album.run.options.get("prototypes"), album.metrics.get("random_knn"))
        alt = f"{name.replace('_', ' ')}, step by step: from {lines[0][name]:.2f} to {lines[-1][name]:.2f}"
        charts.append(chart(figure, alt))
    said = " ".join(MEANS[name] for name in names if name in MEANS)
    spread = chart(collapse_figure(album.sample, album.before), "singular values and cosines of the features")
    why = (
        "Left: the later a line falls, the more directions are used. Right: where all pairs are at 1, nothing differs."
    )
    return f'{say(said)}{pair(charts)}<div class="scroll">{spread}</div>{say(why)}'


def the_classes(album: Album) -> str:
    found = album.metrics
    if "knn" not in found:
        return ""
    said = (
        f"The class folders were not learnt from. Here {found['test_images']:,} pictures get the class that their 20 "
        "nearest among the others have; what a network has before it is trained is the mark to beat."
    )
    commonest = album.pictures.labels.bincount().max() / len(album.files)
    return say(said) + bars({"Trained": found["knn"], "Untrained": found["random_knn"], "Largest class": commonest})


def kind(album: Album, row: int) -> str:
    """The name of a picture's class, if there are classes."""
    labels = album.pictures.labels
    return "" if labels is None else album.pictures.classes[int(labels[row])]


def name_of(album: Album, row: int) -> str:
    """A picture's file in its folder."""
    file, root = album.files[row], folder_of(album.facts.data)
    return file.relative_to(root).with_suffix("").as_posix().removeprefix("train/")


def the_groups(album: Album) -> str:
    text = say(
        "Every picture is put into one of these by k-means, which finds as many groups as it is asked for. Shown are "
        "the ten nearest to each middle. A good group shows one kind of thing; a poor one shares a colour, or nothing."
    )
    for number, rows in enumerate(album.groups, 1):
        names = [kind(album, row) for row in rows.tolist()]
        most = sorted({*names} - {""}, key=names.count, reverse=True)[:3]
        said = ", ".join(f"{names.count(name) / len(names):.0%} {name}" for name in most)
        text += f"<h3>{number}. {len(rows):,} pictures{escape(f': {said}' if said else '')}</h3>"
        text += grid((photo(album.files[row]) for row in rows[:10].tolist()), 10, 5)
    return text


def the_neighbours(album: Album) -> str:
    said = (
        "Framed are pictures that were drawn, not chosen; beside each the six whose features are most like its own, "
        f"with {'their classes' if album.pictures.classes else 'their cosines (1 is the same, 0 a stranger)'}. They "
        "should show the same thing, not only the same colours."
    )
    rows, unit, parts = torch.tensor(spaced(8, len(album.files))), F.normalize(centred(album.features), dim=-1), []
    for row, near in zip(rows.tolist(), neighbours(unit, rows, 6).tolist()):
        tiles = [photo(album.files[row], kind(album, row), "asked", LARGE)]
        tiles += [photo(album.files[i], kind(album, i) or f"{unit[i] @ unit[row]:.2f}") for i in near]
        parts.append(grid(tiles, 5, 5))
    return say(said) + pair(parts)


def the_maps(album: Album) -> str:
    """Empty for an encoder without attention."""
    if not hasattr(album.encoder, "attention"):
        return ""
    rows, size = spaced(8, len(album.kept)), album.run.size
    pictures = album.kept.images[rows]
    looks = mass_mask(fine_attention(album.encoder, pictures, size).mean(dim=1)).float()  # (8, size, size)
    colors = pca_rgb(fine_patches(album.encoder, pictures, 2 * size, 0))  # (8, 3, h, w)
    parts = []
    for file, look, color in zip((album.kept_files[row] for row in rows), looks, colors):
        pixels = decode(file, LARGE)
        lit = to_pixels(pixels / 255 * (0.2 + 0.8 * enlarged(look[None])))
        shown = [tile(pixels, f"picture {file.name}"), tile(lit, f"where the network looks in {file.name}")]
        shown.append(tile(to_pixels(enlarged(color)), f"the patches of {file.name} in colours of what is alike"))
        parts.append(grid(shown, 3, 3))
    said = (
        "Pictures that were kept back; the same, lit where 60% of the network's attention is (its class token's, over "
        "all heads); and its patches, their three main directions in red, green and blue. Light should lie on things "
        "and not on the ground, and the same part of a thing should have one colour in all pictures."
    )
    return say(said) + pair(parts)


def enlarged(x: Tensor) -> np.ndarray:
    """(C, h, w) to (LARGE, LARGE, C), between its places as well."""
    grown = F.interpolate(x[None], (LARGE, LARGE), mode="bilinear", align_corners=False)[0]
    return grown.permute(1, 2, 0).numpy()


def to_pixels(x: np.ndarray) -> np.ndarray:
    """[0, 1] to uint8."""
    return (255 * x).round().clip(0, 255).astype(np.uint8)


def the_odd(album: Album) -> str:
    said = (
        "The pictures whose tenth nearest neighbour is farthest. A rare kind, a mistake, or what does not belong here: "
        "the names of the files are under them."
    )
    found = odd_ones(album.features, min(14, len(album.files))).tolist()
    return say(said) + grid((photo(album.files[row], name_of(album, row)) for row in found), 7, 4)


def the_copies(album: Album) -> str:
    if not album.copies:
        return say(f"None among {len(album.files):,} pictures.")
    said = (
        f"Thumbnails that are nearly the same, also mirrored or a little moved: {len(album.copies)} sets, the most "
        "alike first; of up to eight, two pictures each. Dark and plain ones may be here by mistake."
    )
    sets = ([photo(album.files[row], name_of(album, row)) for row in rows[:2].tolist()] for rows in album.copies[:8])
    return say(said) + grid((grid(two, 2, 2) for two in sets), 4, 2)
