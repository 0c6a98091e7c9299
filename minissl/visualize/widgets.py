"""Things to move in a notebook, each with a still picture beside it for where nothing runs.

Widgets are made of ipywidgets; they only call functions that figures are made by. The picture is an image that is
exchanged, not an output that is captured: so a notebook that holds one also runs where nobody watches.
"""

from collections.abc import Callable, Mapping, Sequence
from io import BytesIO

from matplotlib.figure import Figure


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
        control.description = name
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


def _redrawn(draw: Callable[..., Figure], controls: dict):
    """The controls above a picture, which is drawn again when one of them is moved."""
    from ipywidgets import Image, VBox

    picture = Image(format="png")

    def redraw(_=None) -> None:
        page = BytesIO()
        draw(**{name: control.value for name, control in controls.items()}).savefig(page, format="png", dpi=100)
        picture.value = page.getvalue()

    for control in controls.values():
        control.observe(redraw, "value")
    redraw()
    return VBox([*controls.values(), picture])
