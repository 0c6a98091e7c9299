"""Tests of interactive figures: a change redraws them."""

from io import BytesIO

import torch
from matplotlib.figure import Figure
from PIL import Image

from minissl.notebook.widgets import image_picker, interactive_figure, text_input_figure


def width(widget):
    return Image.open(BytesIO(widget.children[-1].value)).width


def test_a_new_text_redraws_the_figure():
    widget = text_input_figure(lambda text: Figure(figsize=(len(text), 1)), "one")
    assert width(widget) == 300
    widget.children[0].value = "seven"
    assert width(widget) == 500


def test_every_control_redraws_the_figure_with_its_value():
    calls = []

    def draw(scale, kind):
        calls.append((scale, kind))
        return Figure(figsize=(2, 1))

    widget = interactive_figure(draw, scale=(0.0, 1.0, 0.5), kind={"first": 1, "second": 2})
    scale, kind, _ = widget.children
    assert (scale.description, kind.description) == ("scale", "kind")
    assert {control.style.description_width for control in (scale, kind)} == {"initial"}  # no long name is cut off
    scale.value, kind.value = 1.0, 2
    assert calls == [(0.5, 1), (1.0, 1), (1.0, 2)]


def test_a_click_redraws_the_figure():
    calls = []

    def draw(row, column):
        calls.append((row, column))
        return Figure(figsize=(1 + row, 1 + column))

    image = torch.zeros(3, 12, 8, dtype=torch.uint8)
    image[0, :4, :4] = 255
    widget = image_picker(image, draw, (3, 2))
    buttons, figure = widget.children[0].children, widget.children[1]
    assert len(buttons) == 6
    assert [button.style.button_color for button in buttons] == ["#ff0000"] + ["#000000"] * 5
    before = figure.value
    buttons[4].click()
    assert calls == [(1, 1), (2, 0)]
    assert figure.value != before
    assert Image.open(BytesIO(figure.value)).size == (300, 100)
    assert [button.description for button in buttons] == ["", "", "", "", "●", ""]
