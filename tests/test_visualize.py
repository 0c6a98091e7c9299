"""The pictures of attention show the numbers they are given, each in its place."""

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from matplotlib.colors import to_rgb

from minissl.color import rgb_to_lab
from minissl.evaluate import attention_iou, fine_attention, mass_mask
from minissl.visualize import (
    bars_figure,
    board_figure,
    charts,
    curves_figure,
    film_figure,
    frame_figure,
    grid,
    layers_figure,
    lines_figure,
    masks_figure,
    overlay,
    picture_grid,
    points_figure,
    seeds_figure,
)
from minissl.visualize.attention import HIT, MISSED, WRONG
from tests.golden import tiny_vit


def shown(axis):
    return torch.as_tensor(axis.images[0].get_array())


def pictures(n, size=16):
    return torch.randint(0, 256, (n, 3, size, size), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))


@pytest.mark.parametrize("knn", [0.1, 0.9])
def test_the_line_to_beat_is_in_the_picture_and_its_name_beside_it(knn):
    """It was above the axes for a run that had not beaten it."""
    axis = curves_figure([{"step": step, "knn": knn} for step in (1, 2)], chance=0.3).axes[0]
    low, high = axis.get_ylim()
    (name,) = axis.texts
    assert low < min(knn, 0.3)
    assert high > max(knn, 0.3)
    assert (name.xy[1], name.get_text()) == (0.3, "random encoder")


def test_a_grid_has_one_scale_of_colours_or_each_picture_its_own():
    columns = [("a", [torch.full((2, 2), 3.0), torch.tensor([[1.0, 2.0], [3.0, 4.0]])]), ("b", [torch.ones(2, 2)])]
    own = picture_grid(columns, "t")
    assert own.axes[2].images[0].get_clim() == (1, 4)
    assert not own.axes[3].images
    assert not own.axes[3].axison
    fixed = picture_grid(columns, "t", limits=(0, None))
    assert [fixed.axes[i].images[0].get_clim() for i in (0, 1, 2)] == [(0, 3), (0, 1), (0, 4)]


def test_a_column_for_each_block():
    encoder, images = tiny_vit().eval(), pictures(3)
    figure = layers_figure(encoder, images, 16, [0, 1])
    assert [axis.get_title() for axis in figure.axes[:3]] == ["image", "block 0", "block 1"]
    for layer in (0, 1):
        expected = fine_attention(encoder, images, 16, layer=layer).mean(dim=1)
        for axis, one in zip(figure.axes[1 + layer :: 3], expected):
            assert torch.equal(shown(axis), one)


def nearest_color(pixel):
    """Which of the three names a pixel has, or none where it is grey."""
    if float(pixel.max() - pixel.min()) < 1e-4:
        return None
    ends = {name: float((pixel - 0.25 * pixel.mean() - 0.75 * torch.tensor(c)).norm()) for name, c in PARTS}
    return min(ends, key=ends.get)


PARTS = (HIT, MISSED, WRONG)


def test_every_pixel_is_hit_missed_wrong_or_neither():
    torch.manual_seed(0)
    maps, masks = torch.rand(2, 4, 4) ** 4, torch.zeros(2, 8, 8, dtype=torch.uint8)
    masks[:, 1:7, 2:6] = 3
    figure = masks_figure(pictures(2), maps, masks)
    found = mass_mask(maps).repeat_interleave(2, 1).repeat_interleave(2, 2)
    for i in range(2):
        picture = shown(figure.axes[3 * i + 2])
        for row in range(8):
            for column in range(8):
                here, true = bool(found[i, row, column]), bool(masks[i, row, column])
                name = {(True, True): HIT, (False, True): MISSED, (True, False): WRONG}.get((here, true), (None,))[0]
                assert nearest_color(picture[row, column]) == name
        overlap = float(attention_iou(maps[i : i + 1, None], masks[i : i + 1]))
        assert figure.axes[3 * i + 2].texts[0].get_text() == f"IoU\n{overlap:.2f}"
    title = figure.axes[2].get_title()
    assert all(name in title for name, _ in PARTS)


@pytest.mark.parametrize("matrix", [
    ((0.367, 0.861, -0.228), (0.280, 0.673, 0.047), (-0.012, 0.043, 0.969)),  # deuteranopia
    ((0.152, 1.053, -0.205), (0.115, 0.786, 0.099), (-0.004, -0.048, 1.052)),  # protanopia
    ((1.256, -0.077, -0.179), (-0.078, 0.931, 0.148), (0.005, 0.691, 0.304)),  # tritanopia
    ((0.299, 0.587, 0.114),) * 3,  # no colours at all
])  # fmt: skip
def test_the_three_colours_are_told_apart_by_any_eye(matrix):
    """Machado et al., 2009, doi:10.1109/TVCG.2009.113, with all of a kind of cone missing."""
    seen = [np.array(matrix) @ np.array(color) for _, color in PARTS]
    for i in range(3):
        for j in range(i):
            assert np.abs(seen[i] - seen[j]).max() > 0.1


def test_a_film_has_a_row_for_each_image_and_a_column_for_each_moment():
    images, films = pictures(2), torch.randint(0, 256, (3, 2, 8, 8), dtype=torch.uint8)
    figure = film_figure(images, films, ["step 1", "step 8", "step 64"])
    assert [axis.get_title() for axis in figure.axes[:4]] == ["image", "step 1", "step 8", "step 64"]
    for moment in range(3):
        for i in range(2):
            axis = figure.axes[4 * i + 1 + moment]
            assert torch.equal(shown(axis), films[moment, i])
            assert axis.images[0].get_clim() == (0, int(films[moment, i].max()))  # even is bright, not a pattern


@pytest.mark.parametrize(("n", "side"), [(1, 1), (5, 3), (16, 4), (17, 5)])
def test_a_frame_is_a_square_of_images_row_by_row(n, side):
    images, maps = torch.full((n, 3, 8, 8), 255, dtype=torch.uint8), torch.zeros(n, 4, 4, dtype=torch.uint8)
    for i in range(n):
        maps[i, i % 4, i // 4 % 4] = 10 + i
    figure = frame_figure(images, maps, "step 64")
    assert figure.get_suptitle() == "step 64"
    drawn = [axis for axis in figure.axes if axis.images]
    assert len(drawn) == n
    assert max(axis.get_subplotspec().colspan.stop for axis in drawn) == side
    for i, axis in enumerate(drawn):
        brightest = int(shown(axis)[..., 0].argmax())
        assert (brightest // 8 // 2, brightest % 8 // 2) == (i % 4, i // 4 % 4)


def test_bars_are_shares_of_whatever_is_said():
    rows = {"a": {"x": 0.25, "y": 0.5}, "b": {"x": 1.0, "y": 0.0}}
    (axis,) = bars_figure(rows, "t", {"x": 0.1, "y": 0.1}, y_name="share (%)").axes
    assert axis.get_ylabel() == "share (%)"
    assert [bar.get_height() for bar in axis.patches] == [25, 50, 100, 0]
    assert [line.get_ydata()[0] for line in axis.lines] == [10, 10]
    assert bars_figure(rows, "t").axes[0].get_ylabel() == "right answers (%)"


def test_bars_have_room_for_the_highest_share_asked_for():
    rows = {"a": {"x": 0.1, "y": 0.2}}
    assert bars_figure(rows, "t").axes[0].get_ylim() == (0, 112)
    small = bars_figure(rows, "t", highest=0.25, width=0.5)
    assert small.axes[0].get_ylim() == (0, 28)
    assert small.get_size_inches()[0] == pytest.approx(2.6)


def test_more_rows_than_colours_are_all_drawn_and_told_apart():
    rows = {str(i): {"x": 0.1 * i} for i in range(8)}
    bars = bars_figure(rows, "t").axes[0].patches
    assert [bar.get_height() for bar in bars] == pytest.approx([10 * i for i in range(8)])
    assert len({(bar.get_facecolor(), bar.get_hatch()) for bar in bars}) == 8


def test_a_loss_that_begins_above_chance_is_shown_whole():
    lines = [{"step": i, "loss": 9.0 - i} for i in range(4)]
    assert curves_figure(lines, prototypes=32).axes[0].get_ylim()[1] >= 9


def test_points_have_their_numbers_and_pushes():
    points = torch.tensor([[1.0, 0.0], [0.0, -1.0]])
    figure = points_figure({"still": points, "pushed": points}, {"pushed": torch.tensor([[0.0, 0.5], [0.25, 0.0]])})
    still, pushed = figure.axes
    assert still.lines[1].get_xydata().tolist() == points.tolist()
    assert [text.get_text() for text in still.texts] == ["1", "2"]
    assert not still.collections
    (arrows,) = pushed.collections
    assert (arrows.U.tolist(), arrows.V.tolist()) == ([0.0, 0.25], [0.5, 0.0])


def test_every_seed_is_seen_beside_the_mean():
    panels = {
        "k": {"a": torch.tensor([1.0, 3.0]), "b": torch.tensor([5.0])},
        "speed": {"a": torch.ones(2), "b": torch.ones(1)},
    }
    left, right = seeds_figure(panels, "t").axes
    assert [bar.get_width() for bar in left.patches] == [2, 5]
    assert [line.get_xdata().tolist() for line in left.lines if line.get_alpha() == 0.7] == [[1, 3], [5]]
    (low, high) = left.collections[0].get_segments()[0][:, 0]
    assert (low, high) == (1, 3)  # one deviation on either side
    assert left.get_xlim()[0] == right.get_xlim()[0] == 0
    assert [text.get_text() for text in left.get_yticklabels()] == ["a", "b"]


def test_a_board_says_means_marks_the_highest_and_leaves_out_what_was_not_asked():
    rows = {"a": {"k": [10.0, 30.0], "z": [5.0]}, "b": {"k": [40.0]}}
    (axis,) = board_figure(rows, {"k": "k-NN, object", "z": "zero"}, "t").axes
    said = {(text.get_position(), text.get_text(), text.get_weight()) for text in axis.texts}
    assert said == {((0, 0), "20", "normal"), ((1, 0), "5", "bold"), ((0, 1), "40", "bold"), ((1, 1), "-", "normal")}
    assert axis.images[0].get_array()[:, 0].tolist() == [0, 1]
    assert [text.get_text() for text in axis.get_xticklabels()] == ["k-NN\nobject", "zero"]


def test_each_object_has_one_colour_in_all_frames_and_the_ground_keeps_its_own():
    frames = torch.full((2, 3, 2, 3), 100, dtype=torch.uint8)
    masks = torch.tensor([[[0, 1, 2], [255, 1, 7]], [[1, 0, 2], [0, 0, 8]]], dtype=torch.uint8)
    shown = overlay(frames, masks)
    plain = torch.full((3,), 100 / 255)
    for place in ((0, 0, 0), (0, 1, 0), (1, 0, 1), (1, 1, 0)):
        torch.testing.assert_close(shown[place[0], :, place[1], place[2]], plain)
    torch.testing.assert_close(shown[0, :, 0, 1], shown[1, :, 0, 0])
    torch.testing.assert_close(shown[0, :, 0, 2], shown[1, :, 0, 2])
    torch.testing.assert_close(shown[0, :, 1, 2], shown[0, :, 0, 1])  # the colours of object 1 come again at 7
    assert (shown[0, :, 0, 1] - shown[0, :, 0, 2]).abs().sum() > 0.3


EYES = {  # Machado et al., 2009, table 1, severity 1.0: linear RGB as such eyes have it
    "protanopia": [[0.152286, 1.052583, -0.204868], [0.114503, 0.786281, 0.099216], [-0.003882, -0.048116, 1.051998]],
    "deuteranopia": [[0.367322, 0.860646, -0.227968], [0.280085, 0.672501, 0.047413], [-0.011820, 0.042940, 0.968881]],
    "most people's": [[1, 0, 0], [0, 1, 0], [0, 0, 1]],
}


@pytest.mark.parametrize("eye", EYES)
@pytest.mark.parametrize("colors", [charts.COLORS, grid.OBJECTS], ids=["charts", "masks"])
def test_colours_are_told_apart_by_any_eye(eye, colors):
    encoded = torch.tensor([to_rgb(color) for color in colors], dtype=torch.float64)  # (n, 3)
    linear = torch.where(encoded <= 0.04045, encoded / 12.92, ((encoded + 0.055) / 1.055) ** 2.4)
    seen = (linear @ torch.tensor(EYES[eye], dtype=torch.float64).T).clamp(0, 1)
    again = torch.where(seen <= 0.0031308, 12.92 * seen, 1.055 * seen ** (1 / 2.4) - 0.055)
    lab = rgb_to_lab(again[..., None, None])[:, :, 0, 0]  # (n, 3)
    assert F.pdist(lab).min() > 15  # about six times what one just notices


def test_lines_differ_in_their_markers_as_well():
    lines = {name: torch.rand(3, 2) for name in "abcdef"}
    (axis,) = lines_figure((1, 2, 3), lines, "x", "y", "six").axes
    shown = [container.lines[0] for container in axis.containers]
    assert len({line.get_marker() for line in shown}) == len({line.get_color() for line in shown}) == 6
