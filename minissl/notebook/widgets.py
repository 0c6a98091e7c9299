"""Interactive figures for notebooks, made of ipywidgets.

A figure is shown as a PNG image whose value is replaced. Its output is not captured, so a notebook with widgets also
runs without a browser.
"""

from collections.abc import Callable, Mapping, Sequence
from io import BytesIO
from typing import Any

import torch.nn.functional as F
from matplotlib.figure import Figure
from torch import Tensor


def interactive_figure(draw: Callable[..., Figure], **choices: Sequence[Any] | Mapping[str, Any]) -> Any:
    """Return a widget with a control for each argument of `draw`; a change redraws the figure.

    Args:
        draw: keyword arguments -> figure.
        choices: for each argument a list of values, a dict of names and values, or a (low, high, step).
    """
    from ipywidgets import interactive

    controls = {name: interactive.widget_from_abbrev(choice) for name, choice in choices.items()}
    for name, control in controls.items():
        control.description, control.style.description_width = name, "initial"  # or a long name is cut off
    return _redrawn(draw, controls)


def text_input_figure(draw: Callable[[str], Figure], start: str) -> Any:
    """Return a widget with a text box; a new sentence redraws the figure.

    Args:
        draw: sentence -> figure.
        start: the first sentence.
    """
    from ipywidgets import Text

    box = Text(start, continuous_update=False, layout={"width": "90%"})
    return _redrawn(lambda text: draw(text), {"text": box})


def image_picker(image: Tensor, draw: Callable[[int, int], Figure], grid: tuple[int, int] = (8, 8)) -> Any:
    """Return a widget with an image of buttons beside a figure; a click on a button redraws the figure.

    Args:
        image: (3, H, W) uint8, with at least as many pixels as buttons along both axes.
        draw: row and column of the button -> figure; the first figure is that of the center button.
        grid: rows and columns of buttons, each in the mean color of its part of the image.
    """
    from ipywidgets import GridBox, HBox, Image

    rows, columns = grid
    side = f"{max(14, 256 // max(grid))}px"
    buttons = _color_buttons(image, grid, side)
    figure = Image(format="png")

    def choose(index: int) -> None:
        figure.value = _png(draw(index // columns, index % columns))
        for i, button in enumerate(buttons):
            button.description = "●" if i == index else ""

    for i, button in enumerate(buttons):
        button.on_click(lambda _, index=i: choose(index))
    choose(rows // 2 * columns + columns // 2)
    layout = {"grid_template_columns": f"repeat({columns}, {side})", "grid_gap": "0", "flex": "none"}
    return HBox([GridBox(buttons, layout=layout), figure], layout={"align_items": "center"})


def _color_buttons(image: Tensor, grid: tuple[int, int], side: str) -> list[Any]:
    """Return buttons, row by row, in the mean colors of a grid over an image."""
    from ipywidgets import Button, Layout

    colors = F.adaptive_avg_pool2d(image.float().cpu(), grid).round().int().flatten(1).T.tolist()
    square, buttons = Layout(width=side, height=side, margin="0", padding="0"), []
    for i, color in enumerate(colors):
        button = Button(layout=square, tooltip=f"row {i // grid[1]}, column {i % grid[1]}")
        background = "#{:02x}{:02x}{:02x}".format(*color)
        button.style = {"button_color": background, "text_color": "black" if sum(color) > 380 else "white"}
        buttons.append(button)
    return buttons


def _png(figure: Figure) -> bytes:
    """Render a figure as PNG."""
    buffer = BytesIO()
    figure.savefig(buffer, format="png", dpi=100)
    return buffer.getvalue()


def _redrawn(draw: Callable[..., Figure], controls: dict[str, Any]) -> Any:
    """Return a widget of controls above a figure that is redrawn when one of them changes."""
    from ipywidgets import Image, VBox

    figure = Image(format="png")

    def redraw(_: object = None) -> None:
        figure.value = _png(draw(**{name: control.value for name, control in controls.items()}))

    for control in controls.values():
        control.observe(redraw, "value")
    redraw()
    return VBox([*controls.values(), figure])
