"""The classes that a config may name: what they take, and which one a name means.

Their arguments are the keys of a config, so a parser and its errors read them from ``__init__``.
"""

from __future__ import annotations

import difflib
import inspect
import typing
from importlib import import_module
from typing import Any, Optional

from trainer.config_migration import class_here


def parameters(cls: type) -> tuple[dict[str, Any], bool]:
    """Name -> type hint of what a class takes, and whether that is all (no ``**kwargs`` left open)."""
    hints: dict[str, Any] = {}
    for base in cls.__mro__[:-1]:
        if "__init__" not in base.__dict__:
            continue
        init = base.__dict__["__init__"]
        try:
            resolved = typing.get_type_hints(init)
        except (NameError, TypeError):
            resolved = {}
        signature = list(inspect.signature(init).parameters.values())[1:]
        for parameter in signature:
            if parameter.kind in (parameter.POSITIONAL_OR_KEYWORD, parameter.KEYWORD_ONLY):
                hint = resolved.get(parameter.name, Any)
                hints.setdefault(parameter.name, Optional[hint] if parameter.default is None else hint)
        if all(parameter.kind is not parameter.VAR_KEYWORD for parameter in signature):
            return hints, True
    return hints, not any("__init__" in base.__dict__ for base in cls.__mro__[:-1])


def is_group(hint: Any) -> bool:
    """A class, written as keys or by its name; not a plain value, container or union."""
    if hint is Any:  # a class since Python 3.11
        return False
    return inspect.isclass(hint) and typing.get_origin(hint) is None and hint.__module__ != "builtins"


def subclasses(cls: type) -> list[type]:
    """``cls`` and all classes below it, each once."""
    found: dict[type, None] = {cls: None}
    direct: list[type] = cls.__subclasses__()
    for sub in direct:
        found |= dict.fromkeys(subclasses(sub))
    return list(found)


def find_class(name: str, base: type) -> type | None:
    """A class below ``base`` by bare name, or by the path that the parser would import."""
    for cls in subclasses(base):
        if name == cls.__name__:
            return cls
    found, _ = _imported(name)
    return found if inspect.isclass(found) and issubclass(found, base) else None


def _imported(name: str) -> tuple[Any, str]:
    """What ``module.attribute`` names, or None and why there is nothing; the parser hides why an import failed."""
    path, _, attribute = name.rpartition(".")
    if not path:
        return None, ""
    try:
        module = import_module(path)
    except Exception as error:  # whatever the user's own module raises
        parents = [path.rsplit(".", up)[0] for up in range(path.count(".") + 1)]
        is_away = isinstance(error, ModuleNotFoundError) and error.name in parents
        said = str(error) if isinstance(error, ImportError) else f"{type(error).__name__}: {error}"
        return None, f"can't import module {path}: {said}{'; is its folder on PYTHONPATH?' if is_away else ''}"
    if not hasattr(module, attribute):
        near = difflib.get_close_matches(attribute, vars(module), n=1)
        hint = f"; did you mean '{path}.{near[0]}'?" if near else ""
        return None, f"module {path} has no {attribute}{hint}"
    return getattr(module, attribute), ""


def why_no_class(name: str, base: type) -> str:
    """Why ``name`` is no class below ``base``, and which one may be meant."""
    classes = [sub for sub in subclasses(base) if sub is not base and not inspect.isabstract(sub)]
    internal = ("_", "LazyInstance_")  # jsonargparse makes a class for a default that is an instance
    names = sorted({sub.__name__ for sub in classes if not sub.__name__.startswith(internal)})
    module, _, bare = name.rpartition(".")
    refused = f"'{name}' is no {base.__name__}"
    elsewhere = class_here(bare, names) if module.partition(".")[0] in ("", "sentence_transformers") else None
    if elsewhere:
        return refused + elsewhere
    if module:
        _, cause = _imported(name)
        return cause or f"{refused}; make it a class that inherits from {base.__module__}.{base.__name__}"
    lower = {one.lower(): one for one in names}
    near = difflib.get_close_matches(bare.lower(), lower, n=1) if elsewhere is None else []
    return refused + (f"; did you mean '{lower[near[0]]}'?" if near else f"; there are: {', '.join(names)}")
