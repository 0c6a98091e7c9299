"""Find and build methods by name, or by the path of a file."""

import importlib
import importlib.util
import inspect
from inspect import Parameter, signature
from pathlib import Path
from types import ModuleType
from typing import Any

from minissl.errors import InputError, suggestion
from minissl.methods import list_methods
from minissl.methods.base import Method
from minissl.models.outputs import Encoder


def get_method_class(name: str) -> type[Method]:
    """Return the method class of a name, or of the path of a Python file, which is executed.

    Raises:
        InputError: if there is no such method, or the file does not define exactly one.
    """
    if name.endswith(".py"):
        module = _load_file(Path(name).expanduser())
    elif name in list_methods():
        module = importlib.import_module(f"minissl.methods.{name}")
    else:
        known = list_methods()
        raise InputError(f"Unknown method {name!r}{suggestion(name, known)}; choose {', '.join(known)}.")
    found = [c for c in vars(module).values() if isinstance(c, type) and c.__module__ == module.__name__]
    classes = [c for c in found if issubclass(c, Method) and not inspect.isabstract(c)]
    if len(classes) != 1:
        raise InputError(f"{name} defines {len(classes)} subclasses of minissl.Method; it must define exactly one.")
    return classes[0]


def method_options(method_class: type[Method]) -> dict[str, Parameter]:
    """Return the options of a method by name, those it passes on to its base class (as `**options`) included."""
    options: dict[str, Parameter] = {}
    for ancestor in method_class.__mro__:
        if "__init__" not in vars(ancestor):
            continue
        own = list(signature(vars(ancestor)["__init__"]).parameters.values())[2:]  # after self and encoder
        options = {p.name: p for p in own if p.kind is not Parameter.VAR_KEYWORD} | options
        if not any(p.kind is Parameter.VAR_KEYWORD for p in own):
            break
    return options


def create_method(name: str, encoder: Encoder, **options: Any) -> Method:
    """Build a method that trains an encoder.

    Args:
        name: one of `list_methods()`, or the path of a Python file that defines one.
        encoder: maps normalized images to Tokens; it is trained in place.
        options: keyword arguments of the method's constructor; those left out have their defaults.

    Returns:
        The method, with its name and all options in `config`.

    Raises:
        InputError: for an unknown name or option, or values that the constructor refuses.
    """
    method_class = get_method_class(name)
    known = method_options(method_class)
    for option in options:
        if option not in known:
            raise InputError(f"{name} has no option {option!r}{suggestion(option, known)}; it has {', '.join(known)}.")
    method = method_class(encoder, **options)
    defaults = {key: parameter.default for key, parameter in known.items()}
    method.config = {"name": name, "options": defaults | options}
    return method


def _load_file(path: Path) -> ModuleType:
    """Execute a Python file as a module. Raises InputError if it is missing or fails."""
    spec = importlib.util.spec_from_file_location(f"minissl_user_method_{path.stem}", path) if path.is_file() else None
    if spec is None or spec.loader is None:
        raise InputError(f"There is no Python file {path}; give the path of a file that defines a method.")
    module = importlib.util.module_from_spec(spec)
    try:
        spec.loader.exec_module(module)
    except Exception as error:  # the user's own code: any exception is possible
        raise InputError(f"{path} failed to import ({type(error).__name__}: {error}); correct it first.") from error
    return module
