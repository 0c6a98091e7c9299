"""Things to move in a notebook, each with a still picture beside it for where nothing runs.

Widgets are made of ipywidgets; they only call functions that figures are made by. The picture is an image that is
exchanged, not an output that is captured: so a notebook that holds one also runs where nobody watches.
"""

from collections.abc import Callable, Mapping, Sequence
from io import BytesIO

import torch.nn.functional as F
from matplotlib.figure import Figure
from torch import Tensor


def figure_for(draw: Callable[..., Figure], **choices: Sequence | Mapping):
    """A picture that is drawn anew for every choice.

    Args:
        draw: keyword arguments -> figure; nothing else is called.
        choices: for each of its arguments what may be chosen: a list, a dict of names, or a (low, high, step).

    Returns:
        A widget.
    """
    from ipywidgets import interactive

    controls = {name: interactive.widget_from_abbrev(choice) for name, choice in choices.items()}
    for name, control in controls.items():
        control.description, control.style.description_width = name, "initial"  # else a long name is cut off
    return _redrawn(draw, controls)


def text_box(draw: Callable[[str], Figure], start: str):
    """A picture that answers a sentence one types.

    Args:
        draw: sentence -> figure.
        start: the first sentence.

    Returns:
        A widget.
    """
    from ipywidgets import Text

    box = Text(start, continuous_update=False, layout={"width": "90%"})
    return _redrawn(lambda text: draw(text), {"text": box})


def picker(image: Tensor, draw: Callable[[int, int], Figure], grid: tuple[int, int] = (8, 8)):
    """An image one clicks, made of buttons in the mean colours of its parts, beside a picture of what was clicked.

    Args:
        image: (3, H, W) uint8, at least as many pixels as buttons each way.
        draw: row and column of the button -> figure; it begins with the one in the middle.
        grid: rows and columns of buttons.

    Returns:
        A widget.
    """
    from ipywidgets import Button, GridBox, HBox, Image, Layout

    rows, columns = grid
    colors = F.adaptive_avg_pool2d(image.float().cpu(), grid).round().int()  # (3, rows, columns)
    side = f"{max(14, 256 // max(grid))}px"
    square = Layout(width=side, height=side, margin="0", padding="0")
    buttons = [
        Button(layout=square, tooltip=f"row {i // columns}, column {i % columns}") for i in range(rows * columns)
    ]
    picture = Image(format="png")

    def choose(place: int) -> None:
        picture.value = _png(draw(place // columns, place % columns))
        for i, button in enumerate(buttons):
            button.description = "●" if i == place else ""

    for i, (button, color) in enumerate(zip(buttons, colors.flatten(1).T.tolist())):
        button.style = {"button_color": "#{:02x}{:02x}{:02x}".format(*color),
                        "text_color": "black" if sum(color) > 380 else "white"}  # fmt: skip
        button.on_click(lambda _, place=i: choose(place))
    choose(rows // 2 * columns + columns // 2)
    layout = {"grid_template_columns": f"repeat({columns}, {side})", "grid_gap": "0", "flex": "none"}
    return HBox([GridBox(buttons, layout=layout), picture], layout={"align_items": "center"})


def _png(figure: Figure) -> bytes:
    page = BytesIO()
    figure.savefig(page, format="png", dpi=100)
    return page.getvalue()


def _redrawn(draw: Callable[..., Figure], controls: dict):
    """The controls above a picture, which is drawn again when one of them is moved."""
    from ipywidgets import Image, VBox

    picture = Image(format="png")

    def redraw(_=None) -> None:
        picture.value = _png(draw(**{name: control.value for name, control in controls.items()}))

    for control in controls.values():
        control.observe(redraw, "value")
    redraw()
    return VBox([*controls.values(), picture])
