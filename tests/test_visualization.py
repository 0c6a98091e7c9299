"""Tests of figures: they draw the numbers they are given, with titles, labels and shared scales."""

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from matplotlib.colors import to_rgb

from minissl import visualization
from minissl.data.transforms.functional import normalize
from minissl.data.transforms.lab_color import rgb_to_lab
from minissl.evaluation import attention_iou, attention_mass_mask, dense_attention
from minissl.visualization import (
    attention_figure,
    attention_frame_figure,
    attention_history_figure,
    attention_layers_figure,
    attention_masks_figure,
    bars_figure,
    charts,
    collapse_figure,
    curves_figure,
    grid,
    image_grid,
    lines_figure,
    matches_figure,
    matrices_figure,
    neighbors_figure,
    overlay_masks,
    pca_figure,
    points_figure,
    results_table_figure,
    seeds_figure,
    similarity_figure,
    text_ranking_figure,
    top_images_figure,
    views_figure,
)
from minissl.visualization.attention import HIT, MISSED, WRONG
from minissl.visualization.collapse import collapse_lab_figure
from tests.golden import tiny_vit


def drawn(axis):
    return torch.as_tensor(axis.images[0].get_array())


def random_images(n, size=16):
    return torch.randint(0, 256, (n, 3, size, size), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))


class Run:
    """A training as `collapse_lab_figure` draws it."""

    collapse_type = "none"
    targets = torch.rand(5, 8)
    lines = [  # noqa: RUF012
        {"step": 1, "loss": 2.0, "teacher_entropy": 1.0},
        {"step": 2, "loss": 2.0, "teacher_entropy": 1.0, "knn": 0.5, "rank_me": 3.0, "feature_std": 0.1}
        | {"embed_dim": 16, "alignment": 0.5, "uniformity": -1.0},
    ]


def all_figures():
    """One example of each function of `minissl.visualization` that returns a figure."""
    torch.manual_seed(0)
    images, encoder, seeds = random_images(4), tiny_vit().eval(), {"a": torch.rand(3, 2), "b": torch.rand(3, 2)}
    maps, masks, features = torch.rand(4, 8, 8), (torch.rand(4, 16, 16) > 0.5).byte(), torch.randn(40, 6)
    rows, matches = {"a": {"x": 0.5}, "b": {"x": 0.25}}, {"a": [torch.tensor([[0, 5]])] * 4}
    return {
        "attention_figure": attention_figure(encoder, images, 16, masks=masks),
        "attention_frame_figure": attention_frame_figure(images, maps),
        "attention_history_figure": attention_history_figure(images, maps[None].expand(3, -1, -1, -1), "abc"),
        "attention_layers_figure": attention_layers_figure(encoder, images, 16, [0, 1]),
        "attention_masks_figure": attention_masks_figure(images, maps, masks),
        "bars_figure": bars_figure(rows, "t", {"x": 0.1}),
        "collapse_figure": collapse_figure(features, torch.randn(40, 6)),
        "collapse_lab_figure": collapse_lab_figure({"a": Run(), "b": Run()}),
        "curves_figure": curves_figure([{"step": i, "loss": 9.0 - i, "knn": 0.1 * i} for i in (1, 2)], 32, 0.3),
        "image_grid": image_grid([("a", images), ("b", maps)], "t", map_label="value"),
        "lines_figure": lines_figure((1, 2, 3), seeds, "x", "y (%)", "t"),
        "matches_figure": matches_figure(images, images, matches, {"a": [torch.tensor([True])] * 4}, (4, 4)),
        "matrices_figure": matrices_figure({"a": maps[0], "b": maps[1]}, "rows", "columns", "t", "cosine"),
        "neighbors_figure": neighbors_figure(images, features[:4], [0, 1], 2),
        "pca_figure": pca_figure(encoder, images, 16),
        "points_figure": points_figure({"a": features[:5, :2]}, {"a": features[:5, :2]}),
        "results_table_figure": results_table_figure({"a": {"k": [1.0]}}, {"k": "k-NN"}, "t (%)"),
        "seeds_figure": seeds_figure({"k-NN (%)": {"a": torch.rand(3)}}, "t"),
        "similarity_figure": similarity_figure(encoder, images[0], 16, [(4, 4), (8, 8)]),
        "text_ranking_figure": text_ranking_figure(images, ["one", "two"], torch.rand(4, 2)),
        "top_images_figure": top_images_figure(images, torch.rand(4), "t"),
        "views_figure": views_figure(images, normalize(images)),
    }


@pytest.fixture(scope="module")
def figures():
    return all_figures()


def test_every_figure_has_an_example(figures):
    assert set(figures) == {n for n in visualization.__all__ if n.endswith("_figure")} | {"image_grid"}


def test_every_figure_has_a_title(figures):
    for name, figure in figures.items():
        titles = [figure.get_suptitle(), *(axis.get_title() for axis in figure.axes)]
        assert figure.get_suptitle() or (len(figure.axes) == 1 and figure.axes[0].get_title()), (name, titles)


def test_every_axis_is_labeled(figures):
    """An axis without numbers or names on it needs no label."""
    for name, figure in figures.items():
        for axis in figure.axes:
            shared = axis.get_shared_y_axes().get_siblings(axis)
            for direction, label in (("x", axis.get_xlabel()), ("y", any(a.get_ylabel() for a in shared))):
                ticks = getattr(axis, f"get_{direction}ticks")()
                names = [t.get_text() for t in getattr(axis, f"get_{direction}ticklabels")()]
                is_named = any(n.strip("-\u22120123456789.") for n in names)
                is_image_map = bool(axis.images) and name == "results_table_figure"
                is_colorbar = axis.get_label() == "<colorbar>" and bool(axis.get_ylabel())
                if axis.axison and len(ticks) and not (is_named or is_image_map or is_colorbar):
                    assert label, (name, direction, axis.get_title())


def test_maps_share_one_scale_with_a_color_bar(figures):
    for name, figure in figures.items():
        maps = [axis.images[0] for axis in figure.axes if axis.images and axis.images[0].get_array().ndim == 2]
        bars = [axis for axis in figure.axes if axis.get_label() == "<colorbar>"]
        assert len({one.get_clim() for one in maps}) <= 1, name
        if maps and name not in ("attention_masks_figure", "results_table_figure"):  # binary; values are written
            assert [bool(bar.get_ylabel()) for bar in bars] == [True], name


def test_several_series_have_a_legend(figures):
    for name in ("bars_figure", "lines_figure", "collapse_figure", "collapse_lab_figure"):
        assert any(axis.get_legend() for axis in figures[name].axes), name
    for name in ("attention_masks_figure", "matches_figure", "seeds_figure", "points_figure"):
        assert figures[name].legends, name


@pytest.mark.slow
def test_every_figure_can_be_written(figures, tmp_path):
    for name, figure in figures.items():
        figure.savefig(tmp_path / f"{name}.png", dpi=50)


@pytest.mark.parametrize("knn", [0.1, 0.9])
def test_the_random_init_is_in_the_figure_and_named(knn):
    """The line was above the axes for a run that had not reached it."""
    axis = curves_figure([{"step": step, "knn": knn} for step in (1, 2)], random_knn=0.3).axes[0]
    low, high = axis.get_ylim()
    (name,) = axis.texts
    assert low < min(knn, 0.3)
    assert high > max(knn, 0.3)
    assert (name.xy[1], name.get_text()) == (0.3, "random init")


def test_a_loss_that_starts_above_the_chance_level_is_drawn_whole():
    lines = [{"step": i, "loss": 9.0 - i} for i in range(4)]
    assert curves_figure(lines, num_prototypes=32).axes[0].get_ylim()[1] >= 9


def test_a_grid_has_one_scale_and_leaves_missing_images_empty():
    columns = [("a", [torch.full((2, 2), 3.0), torch.tensor([[1.0, 2.0], [3.0, 4.0]])]), ("b", [torch.ones(2, 2)])]
    figure = image_grid(columns, "t")
    assert [figure.axes[i].images[0].get_clim() for i in (0, 1, 2)] == [(1, 4)] * 3
    assert not figure.axes[3].images
    assert not figure.axes[3].axison
    assert image_grid(columns, "t", limits=(0, None)).axes[0].images[0].get_clim() == (0, 4)
    columns[0][1][0][0, 0] = torch.nan  # drawn as missing
    assert image_grid(columns, "t").axes[0].images[0].get_clim() == (1, 4)


def test_attention_of_each_block_is_relative_to_uniform_attention():
    encoder, images = tiny_vit().eval(), random_images(3)
    figure = attention_layers_figure(encoder, images, 16, [0, 1])
    assert [axis.get_title() for axis in figure.axes[:3]] == ["image", "block 0", "block 1"]
    for layer in (0, 1):
        expected = dense_attention(encoder, images, 16, layer=layer).mean(dim=1)
        for axis, one in zip(figure.axes[1 + layer : 9 : 3], expected):
            torch.testing.assert_close(drawn(axis), one * 256)
            assert drawn(axis).mean().item() == pytest.approx(1)


PARTS = (HIT, MISSED, WRONG)


def nearest_color(pixel):
    """Return the name of the nearest of the three colors, or None for gray."""
    if float(pixel.max() - pixel.min()) < 1e-4:
        return None
    distances = {name: float((pixel - 0.25 * pixel.mean() - 0.75 * torch.tensor(c)).norm()) for name, c in PARTS}
    return min(distances, key=distances.get)


def test_every_pixel_is_a_hit_missed_wrong_or_neither():
    torch.manual_seed(0)
    maps, masks = torch.rand(2, 4, 4) ** 4, torch.zeros(2, 8, 8, dtype=torch.uint8)
    masks[:, 1:7, 2:6] = 3
    figure = attention_masks_figure(random_images(2), maps, masks)
    kept = attention_mass_mask(maps).repeat_interleave(2, 1).repeat_interleave(2, 2)
    for i in range(2):
        overlay = drawn(figure.axes[3 * i + 2])
        for row in range(8):
            for column in range(8):
                key = bool(kept[i, row, column]), bool(masks[i, row, column])
                name = {(True, True): HIT, (False, True): MISSED, (True, False): WRONG}.get(key, (None,))[0]
                assert nearest_color(overlay[row, column]) == name
        iou = float(attention_iou(maps[i : i + 1, None], masks[i : i + 1]))
        assert figure.axes[3 * i + 2].texts[0].get_text() == f"IoU\n{iou:.2f}"
    colors = [to_rgb(patch.get_facecolor()) for patch in figure.legends[0].get_patches()]
    assert colors == [pytest.approx(color) for _, color in PARTS]


@pytest.mark.parametrize("matrix", [
    ((0.367, 0.861, -0.228), (0.280, 0.673, 0.047), (-0.012, 0.043, 0.969)),  # deuteranopia
    ((0.152, 1.053, -0.205), (0.115, 0.786, 0.099), (-0.004, -0.048, 1.052)),  # protanopia
    ((1.256, -0.077, -0.179), (-0.078, 0.931, 0.148), (0.005, 0.691, 0.304)),  # tritanopia
    ((0.299, 0.587, 0.114),) * 3,  # lightness alone
])  # fmt: skip
def test_the_three_colors_are_distinct_with_color_blindness(matrix):
    """Machado et al., 2009, doi:10.1109/TVCG.2009.113, for complete dichromacy."""
    colors = [np.array(matrix) @ np.array(color) for _, color in PARTS]
    for i in range(3):
        for j in range(i):
            assert np.abs(colors[i] - colors[j]).max() > 0.1


def test_a_history_has_a_row_per_image_and_a_column_per_step():
    images, histories = random_images(2), torch.randint(1, 200, (3, 2, 8, 8), dtype=torch.uint8)
    figure = attention_history_figure(images, histories, ["step 1", "step 8", "step 64"])
    assert [axis.get_title() for axis in figure.axes[:4]] == ["image", "step 1", "step 8", "step 64"]
    for step in range(3):
        for i in range(2):
            axis = figure.axes[4 * i + 1 + step]
            torch.testing.assert_close(drawn(axis), histories[step, i] / histories[step, i].max())
            assert axis.images[0].get_clim() == (0, 1)


@pytest.mark.parametrize(("n", "side"), [(1, 1), (5, 3), (16, 4), (17, 5)])
def test_a_frame_is_a_square_of_images_row_by_row(n, side):
    images, maps = torch.full((n, 3, 8, 8), 255, dtype=torch.uint8), torch.zeros(n, 4, 4, dtype=torch.uint8)
    for i in range(n):
        maps[i, i % 4, i // 4 % 4] = 10 + i
    figure = attention_frame_figure(images, maps, "step 64")
    assert figure.get_suptitle() == "step 64"
    axes = [axis for axis in figure.axes if axis.images]
    assert len(axes) == n
    assert max(axis.get_subplotspec().colspan.stop for axis in axes) == side
    for i, axis in enumerate(axes):
        brightest = int(drawn(axis)[..., 0].argmax())
        assert (brightest // 8 // 2, brightest % 8 // 2) == (i % 4, i // 4 % 4)


def test_bars_are_percentages():
    rows = {"a": {"x": 0.25, "y": 0.5}, "b": {"x": 1.0, "y": 0.0}}
    (axis,) = bars_figure(rows, "t", {"x": 0.1, "y": 0.1}, y_name="probability (%)").axes
    assert axis.get_ylabel() == "probability (%)"
    assert [bar.get_height() for bar in axis.patches] == [25, 50, 100, 0]
    assert [line.get_ydata()[0] for line in axis.lines] == [10, 10]
    assert [text.get_text() for text in axis.get_legend().texts].count("chance level") == 1


def test_bars_fit_below_the_maximal_value():
    rows = {"a": {"x": 0.1, "y": 0.2}}
    assert bars_figure(rows, "t").axes[0].get_ylim() == (0, 112)
    small = bars_figure(rows, "t", max_value=0.25, width=0.5)
    assert small.axes[0].get_ylim() == (0, 28)
    assert small.get_size_inches()[0] == pytest.approx(2.6)


def test_more_rows_than_colors_are_distinct():
    rows = {str(i): {"x": 0.1 * i} for i in range(8)}
    bars = bars_figure(rows, "t").axes[0].patches
    assert [bar.get_height() for bar in bars] == pytest.approx([10 * i for i in range(8)])
    assert len({(bar.get_facecolor(), bar.get_hatch()) for bar in bars}) == 8


def test_points_have_numbers_and_arrows():
    points = torch.tensor([[1.0, 0.0], [0.0, -1.0]])
    figure = points_figure({"plain": points, "moved": points}, {"moved": torch.tensor([[0.0, 0.5], [0.25, 0.0]])})
    plain, moved = figure.axes
    assert plain.lines[1].get_xydata().tolist() == points.tolist()
    assert [text.get_text() for text in plain.texts] == ["1", "2"]
    assert not plain.collections
    (arrows,) = moved.collections
    assert (arrows.U.tolist(), arrows.V.tolist()) == ([0.0, 0.25], [0.5, 0.0])


def test_every_seed_is_drawn_beside_the_mean():
    panels = {
        "k": {"a": torch.tensor([1.0, 3.0]), "b": torch.tensor([5.0])},
        "speed": {"a": torch.ones(2), "b": torch.ones(1)},
    }
    left, right = seeds_figure(panels, "t").axes
    assert [bar.get_width() for bar in left.patches] == [2, 5]
    assert [line.get_xdata().tolist() for line in left.lines if line.get_alpha() == 0.7] == [[1, 3], [5]]
    (low, high) = left.collections[0].get_segments()[0][:, 0]
    assert (low, high) == (1, 3)  # one standard deviation on either side
    assert left.get_xlim()[0] == right.get_xlim()[0] == 0
    assert [text.get_text() for text in left.get_yticklabels()] == ["a", "b"]


def test_a_table_holds_means_with_the_highest_in_bold():
    rows = {"a": {"k": [10.0, 30.0], "z": [5.0]}, "b": {"k": [40.0]}}
    (axis,) = results_table_figure(rows, {"k": "k-NN, object", "z": "zero"}, "t").axes
    cells = {(text.get_position(), text.get_text(), text.get_weight()) for text in axis.texts}
    assert cells == {((0, 0), "20", "normal"), ((1, 0), "5", "bold"), ((0, 1), "40", "bold"), ((1, 1), "-", "normal")}
    assert axis.images[0].get_array()[:, 0].tolist() == [0, 1]
    assert [text.get_text() for text in axis.get_xticklabels()] == ["k-NN\nobject", "zero"]


def test_each_object_has_one_color_in_all_frames_and_the_background_stays():
    frames = torch.full((2, 3, 2, 3), 100, dtype=torch.uint8)
    masks = torch.tensor([[[0, 1, 2], [255, 1, 7]], [[1, 0, 2], [0, 0, 8]]], dtype=torch.uint8)
    overlay = overlay_masks(frames, masks)
    torch.testing.assert_close(overlay, overlay_masks(frames / 255, masks))
    for t, row, column in ((0, 0, 0), (0, 1, 0), (1, 0, 1), (1, 1, 0)):
        torch.testing.assert_close(overlay[t, :, row, column], torch.full((3,), 100 / 255))
    torch.testing.assert_close(overlay[0, :, 0, 1], overlay[1, :, 0, 0])
    torch.testing.assert_close(overlay[0, :, 0, 2], overlay[1, :, 0, 2])
    torch.testing.assert_close(overlay[0, :, 1, 2], overlay[0, :, 0, 1])  # object 7 has the color of object 1
    assert (overlay[0, :, 0, 1] - overlay[0, :, 0, 2]).abs().sum() > 0.3


VISION = {  # Machado et al., 2009, table 1, severity 1.0: a linear map of linear RGB
    "protanopia": [[0.152286, 1.052583, -0.204868], [0.114503, 0.786281, 0.099216], [-0.003882, -0.048116, 1.051998]],
    "deuteranopia": [[0.367322, 0.860646, -0.227968], [0.280085, 0.672501, 0.047413], [-0.011820, 0.042940, 0.968881]],
    "trichromacy": [[1, 0, 0], [0, 1, 0], [0, 0, 1]],
}


@pytest.mark.parametrize("vision", VISION)
@pytest.mark.parametrize("colors", [charts.COLORS, grid.MASK_COLORS], ids=["charts", "masks"])
def test_colors_are_distinct_with_color_blindness(vision, colors):
    encoded = torch.tensor([to_rgb(color) for color in colors], dtype=torch.float64)  # (n, 3)
    linear = torch.where(encoded <= 0.04045, encoded / 12.92, ((encoded + 0.055) / 1.055) ** 2.4)
    perceived = (linear @ torch.tensor(VISION[vision], dtype=torch.float64).T).clamp(0, 1)
    encoded = torch.where(perceived <= 0.0031308, 12.92 * perceived, 1.055 * perceived ** (1 / 2.4) - 0.055)
    lab = rgb_to_lab(encoded[..., None, None])[:, :, 0, 0]  # (n, 3)
    assert F.pdist(lab).min() > 15  # about six times a just noticeable difference


def test_lines_have_distinct_markers_and_colors():
    lines = {name: torch.rand(3, 2) for name in "abcdef"}
    (axis,) = lines_figure((1, 2, 3), lines, "x", "y", "six").axes
    curves = [container.lines[0] for container in axis.containers]
    assert len({line.get_marker() for line in curves}) == len({line.get_color() for line in curves}) == 6
