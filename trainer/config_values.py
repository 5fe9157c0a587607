"""Whether a single value fits its type, and what it must be, in the user's words."""

from __future__ import annotations

import dataclasses
import types
import typing
from collections.abc import Iterator
from typing import Any, Literal, Union

import yaml
from jsonargparse import ArgumentParser, get_loader

from trainer.config_files import describe

_NAMES = {str: "text", int: "a whole number", float: "a number", bool: "true or false", type(None): "null"}


class FlagText(yaml.ScalarNode):
    """Text of a flag: it is read by what its key expects, so ``no`` is text where text is expected."""


def fits(node: yaml.Node, hint: Any) -> bool:
    """Whether the parser takes this value for a key of this type."""
    parser = ArgumentParser(exit_on_error=False)
    try:
        parser.add_argument("--value", type=hint)
    except ValueError:  # a hint that the parser does not check either
        return True
    try:
        if isinstance(node, FlagText):
            parser.parse_args([f"--value={node.value}"])
        else:
            parser.parse_object({"value": plain_value(node)})
    except Exception:  # whatever the refusal was, the caller says it in its own words
        return False
    return True


def is_nothing(node: yaml.Node, hint: Any) -> bool:
    """Whether null stands where a plain value is needed."""
    leaves = list(_leaves(hint))
    plain = [leaf for leaf in leaves if leaf in (bool, float, int, str) or isinstance(leaf, str)]
    if not plain or type(None) in leaves or Any in leaves:
        return False
    if isinstance(node, FlagText):  # text to a key of text
        return node.value == "null" and str not in plain
    return node.tag == "tag:yaml.org,2002:null"


def plain_value(node: yaml.Node) -> Any:
    """The value as the parser reads it (5e-5 is a number there, unlike in PyYAML)."""
    if isinstance(node, yaml.MappingNode):
        return {plain_value(key): plain_value(value) for key, value in node.value}
    if isinstance(node, yaml.SequenceNode):
        return [plain_value(item) for item in node.value]
    if node.tag == "tag:yaml.org,2002:null":
        return None
    quoted = isinstance(node, yaml.ScalarNode) and node.style is not None
    return node.value if quoted else get_loader("yaml")(node.value)


def must(hint: Any, node: yaml.Node) -> str:
    """``must be text, but YAML reads no as false; quote it: "no"`` and the like."""
    wanted = f"must be {name_hint(hint)}"
    if isinstance(node, FlagText):
        return f"{wanted}, found '{node.value}'" if node.value else f"{wanted}, found nothing"
    kind = node.tag.rpartition(":")[2]
    found = f"found {describe(node)}"
    if kind == "bool":
        value = str(plain_value(node)).lower()
        found = f"found {value}" if node.value == value else f"but YAML reads {node.value} as {value}"
    takes_text = any(leaf is str or isinstance(leaf, str) for leaf in _leaves(hint))
    quote = f'; quote it: "{node.value}"' if takes_text and kind in ("bool", "int", "float") else ""
    return f"{wanted}, {found}{quote}"


def _leaves(hint: Any) -> Iterator[Any]:
    """The types and literal values that a hint is made of."""
    if typing.get_origin(hint) in (Union, types.UnionType, Literal):
        for arg in typing.get_args(hint):
            yield from _leaves(arg)
    else:
        yield hint


def name_hint(hint: Any) -> str:
    """A type in words."""
    origin, args = typing.get_origin(hint), typing.get_args(hint)
    if hint in _NAMES:
        return _NAMES[hint]
    if origin in (Union, types.UnionType):
        return " or ".join(dict.fromkeys(name_hint(arg) for arg in args if arg is not type(None)))
    if origin is Literal:
        return "one of " + ", ".join(str(arg) for arg in args)
    if origin is tuple:
        return f"a list of {len(args)}: " + ", ".join(name_hint(arg) for arg in args)
    if origin is dict:
        return f"keys with {name_hint(args[1])} each"
    if args:  # list, Iterable
        return f"a list ({name_hint(args[0])} each)"
    if dataclasses.is_dataclass(hint):
        return f"keys ({', '.join(field.name for field in dataclasses.fields(hint)[:3])}, ...)"
    return f"a {getattr(hint, '__name__', hint)}"
