"""Things to move in a notebook, each with a still picture beside it for where nothing runs.

Widgets are made of ipywidgets; they only call functions that figures are made by.
"""

from collections.abc import Callable, Mapping, Sequence

from matplotlib.figure import Figure


def figure_for(draw: Callable[..., Figure], **choices: Sequence | Mapping):
    """A picture that is drawn anew for every choice.

    Args:
        draw: keyword arguments -> figure; nothing else is called.
        choices: for each of its arguments what may be chosen: a list, a dict of names, or a (low, high, step).

    Returns:
        A widget.
    """
    from IPython.display import display
    from ipywidgets import interactive

    return interactive(lambda **chosen: display(draw(**chosen)), **choices)


def text_box(draw: Callable[[str], Figure], start: str):
    """A picture that answers a sentence one types.

    Args:
        draw: sentence -> figure.
        start: the first sentence.

    Returns:
        A widget.
    """
    from IPython.display import display
    from ipywidgets import Text, interactive

    box = Text(start, continuous_update=False, layout={"width": "90%"})
    return interactive(lambda text: display(draw(text)), text=box)
