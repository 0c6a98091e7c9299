"""What is moved in a notebook draws its picture anew, without anyone who captures output."""

from io import BytesIO

import torch
from matplotlib.figure import Figure
from PIL import Image

from minissl.visualize.widgets import figure_for, picker, text_box


def width(widget):
    return Image.open(BytesIO(widget.children[-1].value)).width


def test_a_sentence_is_answered():
    box = text_box(lambda text: Figure(figsize=(len(text), 1)), "one")
    assert width(box) == 300
    box.children[0].value = "seven"
    assert width(box) == 500


def test_every_control_redraws_and_gives_its_value():
    seen = []

    def draw(scale, kind):
        seen.append((scale, kind))
        return Figure(figsize=(2, 1))

    moved = figure_for(draw, scale=(0.0, 1.0, 0.5), kind={"first": 1, "second": 2})
    scale, kind, _ = moved.children
    assert (scale.description, kind.description) == ("scale", "kind")
    assert {control.style.description_width for control in (scale, kind)} == {"initial"}  # a long name is whole
    scale.value, kind.value = 1.0, 2
    assert seen == [(0.5, 1), (1.0, 1), (1.0, 2)]


def test_a_click_exchanges_the_picture():
    seen = []

    def draw(row, column):
        seen.append((row, column))
        return Figure(figsize=(1 + row, 1 + column))

    image = torch.zeros(3, 12, 8, dtype=torch.uint8)
    image[0, :4, :4] = 255
    box = picker(image, draw, (3, 2))
    buttons, picture = box.children[0].children, box.children[1]
    assert len(buttons) == 6
    assert [button.style.button_color for button in buttons] == ["#ff0000"] + ["#000000"] * 5
    before = picture.value
    buttons[4].click()
    assert seen == [(1, 1), (2, 0)]
    assert picture.value != before
    assert Image.open(BytesIO(picture.value)).size == (300, 100)
    assert [button.description for button in buttons] == ["", "", "", "", "●", ""]
