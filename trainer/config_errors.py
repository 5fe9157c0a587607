"""Turns a parser's refusal into sentences with file and line.

The parser decides whether a config is wrong; this module finds where. It walks what the user wrote beside the
type hints the parser was built from, and names every key that is unknown and every value that does not fit.
"""

from __future__ import annotations

import dataclasses
import difflib
import inspect
import re
import types
import typing
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any, Literal, Union

import yaml

from trainer.config_classes import find_class, is_group, parameters, subclasses, why_no_class
from trainer.config_files import ConfigError, Flag, Written, compose_flag, describe, place_of, walk_keys
from trainer.config_migration import name_here
from trainer.config_values import FlagText, fits, is_nothing, must

UNION = "Does not validate against any of the Union"  # how the parser begins to list what each member said
_MAX_PROBLEMS = 5
_CLASS_KEYS = ("class_path", "init_args", "dict_kwargs")


def explain(message: str, groups: Mapping[str, Any], links: Mapping[str, str], written: Written) -> str:
    """One line per problem, at most five.

    Args:
        message: what the parser said.
        groups: top-level key -> class whose ``__init__`` takes the keys below it, or type of a plain value.
        links: key -> the key that it always follows.
        written: files and flags of the command.
    """
    roots = _roots(written)
    walk = _Walk(groups, links, roots)
    for root in roots:
        walk.keys(root, groups, "")
    if problems := walk.problems or [said for _, said in walk.nothing]:
        return _listed(problems)
    return _plain(message)


def check_written(groups: Mapping[str, Any], links: Mapping[str, str], written: Written) -> None:
    """Refuses what a parser lets pass: a key that always follows another, a group that is a single word."""
    for target, source in links.items():
        if place := written.place(target):
            raise ConfigError(f"{place}: '{target}' always follows '{source}'; set that one")
    for index, flag in enumerate(written.flags):
        node = compose_flag(flag)
        if isinstance(node, yaml.MappingNode) and all(key.value != "class_path" for key, _ in node.value):
            continue  # keys are added to those that stand there
        for earlier in written.flags[:index]:
            if earlier.key.startswith(f"{flag.key}."):
                raise ConfigError(
                    f"flag --{earlier.key} stands before --{flag.key}, which takes its place: put it behind"
                )
    for file in written.files:
        for key, value in file.value:
            if inspect.isclass(groups.get(key.value)) and groups[key.value].__module__ != "builtins":
                text = isinstance(value, yaml.ScalarNode) and value.tag.endswith(":str")
                if not isinstance(value, yaml.MappingNode) and not text:
                    known = ", ".join(list(parameters(groups[key.value])[0])[:3])
                    raise ConfigError(
                        f"{place_of(value)}: {key.value} must be keys ({known}, ...), found {describe(value)}"
                    )


def refuse_nothing(groups: Mapping[str, Any], links: Mapping[str, str], written: Written) -> None:
    """Refuses a key with nothing behind it that needs a value, and that nothing behind sets: the parser takes null for
    any type."""
    roots = _roots(written)
    problems: list[str] = []
    for index, root in enumerate(roots):
        walk = _Walk(groups, links, [root])
        walk.keys(root, groups, "")
        later = {path for one in roots[index + 1 :] for path, _, _ in walk_keys(one)}
        problems += [said for path, said in walk.nothing if re.sub(r"\[\d+\]", "", path) not in later]
    if problems:
        raise ConfigError(_listed(problems))


def _roots(written: Written) -> list[yaml.Node]:
    return [*written.files, *(_as_node(flag) for flag in written.flags)]


def _listed(problems: list[str]) -> str:
    rest = len(problems) - _MAX_PROBLEMS
    return "\n".join(problems[:_MAX_PROBLEMS] + ([f"and {rest} more"] if rest > 0 else []))


def _plain(message: str) -> str:
    """The parser's own sentence without its jargon."""
    if UNION in message:
        key = re.match(r'Parser key "([^"]+)":', message)
        # Where nothing is left, keys of a class were given, and no class.
        said = said_of_union(message) or "no class is named for these keys; name it in front of them, as class_path"
        return f"{f'{key[1]}: ' if key else ''}{said}"
    unset = r'arguments are required: (.*)|Parser key "([^"]+)":\s+Expected a .* Got value: None$'
    if missing := re.search(unset, message):
        keys = (missing[1] or missing[2]).split(", ")
        names = ", ".join(f"'{re.sub('^(fit|validate|test)[.]', '', key)}'" for key in keys)
        return f"no value for {names}: set it in a --config file or as a flag"
    message = re.sub(r'Parser key "([^"]+)":\s*', r"\1: ", message)
    return re.sub(r"\s+", " ", message).replace("<class '", "").replace("'>", "")


def said_of_union(message: str) -> str:
    """What a class said, whole, without what the other members of the Union (None, a list) would need.

    Args:
        message: of the parser; each member begins with a dash, and what it says may go over several lines.
    """
    lines = [line.strip() for line in message[message.index(UNION) :].splitlines()]
    noise = (UNION, "Subtypes:", "Errors:", "- Expected a", "Given value")
    kept = [line for line in lines if line and not line.startswith(noise)]
    return "".join(f"; {line[2:]}" if line.startswith("- ") else f" {line}" for line in kept).lstrip("; ")


def _as_node(flag: Flag) -> yaml.MappingNode:
    """``--a.b text`` as the tree {a: {b: text}} whose place is the flag."""
    mark = yaml.Mark(f"flag --{flag.key}", 0, 0, 0, None, 0)
    node = compose_flag(flag) or FlagText("tag:yaml.org,2002:str", flag.text or "", mark, mark)
    for part in reversed(flag.key.removesuffix("+").split(".")):
        key = yaml.ScalarNode("tag:yaml.org,2002:str", part, mark, mark)
        node = yaml.MappingNode("tag:yaml.org,2002:map", [(key, node)], mark, mark)
    assert isinstance(node, yaml.MappingNode)
    return node


class _Walk:
    """Goes down trees of nodes beside type hints and collects what does not fit."""

    def __init__(self, groups: Mapping[str, Any], links: Mapping[str, str], roots: Sequence[yaml.Node]) -> None:
        self.groups = groups
        self.links = links
        self.roots = roots
        self.problems: list[str] = []
        self.nothing: list[tuple[str, str]] = []  # keys that need a value and have null, each with what to say

    def keys(self, node: yaml.Node, known: Mapping[str, Any], path: str, closed: bool = True) -> None:
        """Keys of a mapping; with ``closed`` no others may stand there."""
        for key, value in node.value:
            name = f"{path}.{key.value}".lstrip(".")
            help_flag = isinstance(value, FlagText) and key.value == "help"
            if key.value in known:
                self.value(value, known[key.value], name)
            elif closed and key.value != "<<" and not help_flag:
                hint = self.suggest(key.value, path, known)
                self.problems.append(f"{place_of(key)}: unknown key '{name}'{hint}")

    def suggest(self, key: str, path: str, known: Iterable[str]) -> str:
        """The nearest key at this level, or the same word at another level, or the keys there are."""
        key = key.replace("-", "_")
        if elsewhere := name_here(key):
            return elsewhere
        known = [name for name in known if f"{path}.{name}" not in self.links]  # setting these is refused
        near = [f"{path}.{name}".lstrip(".") for name in difflib.get_close_matches(key, known, n=1)]
        follows = tuple(f"{name}." for name in self.links)
        free = [name for name in _dotted_keys(self.groups) if not f"{name}.".startswith(follows)]
        same = [name for name in free if name.endswith(f".{key}")]
        if same and not (path and near):
            return f"; did you mean {' or '.join(repr(name) for name in same)}?"
        if near:
            return f"; did you mean '{near[0]}'?"
        names = [name for name in known if name not in ("config", "print_config")]
        return f"; keys here: {', '.join(names[:12])}{', ...' if len(names) > 12 else ''}"

    def value(self, node: yaml.Node, hint: Any, path: str) -> None:
        if is_nothing(node, hint):
            self.nothing.append((path, f"{_at(node, path)} {must(hint, node)}"))
        if typing.get_origin(hint) in (Union, types.UnionType):
            hint = _choose(node, hint)
        origin, args = typing.get_origin(hint), typing.get_args(hint)
        if isinstance(node, yaml.MappingNode) and is_group(hint):
            self.group(node, hint, path)
        elif _is_of_flag(node) and isinstance(node, yaml.MappingNode) and origin is list:  # --data.train.path x
            self.value(node, args[0], path)
        elif isinstance(node, yaml.SequenceNode) and origin is list:
            for index, item in enumerate(node.value):
                before = len(self.problems)
                self.value(item, args[0], f"{path}[{index}]")
                if len(self.problems) == before:  # a misspelt key would be missing too
                    self.whole(item, args[0], f"{path}[{index}]")
        elif isinstance(node, yaml.MappingNode) and origin is dict:
            for key, value in node.value:
                self.value(value, args[1], f"{path}.{key.value}")
        elif isinstance(node, yaml.ScalarNode) and is_group(hint) and not dataclasses.is_dataclass(hint):
            if not node.tag.endswith("null"):
                self.class_name(node, hint, path)
        elif (cls := _class_meant(node, hint)) and not fits(node, hint):
            self.class_name(node, cls, path)  # of a class that is there, the parser says what is wrong
        elif (_is_word_for_keys(node, hint) or not fits(node, hint)) and not self.is_class_of(node, hint):
            self.problems.append(f"{_at(node, path)} {must(hint, node)}{_item_hint(node, hint, path)}")

    def is_class_of(self, node: yaml.Node, hint: Any) -> bool:
        """Whether a class of a Union is named: then what is wrong is below it, and the parser says it."""
        name = node.value if isinstance(node, yaml.ScalarNode) else None
        return name is not None and any(is_group(one) and find_class(name, one) for one in typing.get_args(hint))

    def group(self, node: yaml.MappingNode, hint: type, path: str) -> None:
        """Keys below a class: its own, or class_path with init_args."""
        written = {key.value: value for key, value in node.value}
        known, closed = parameters(hint)
        if "class_path" in written:
            cls = self.class_name(written["class_path"], hint, f"{path}.class_path")
            if cls and isinstance(written.get("init_args"), yaml.MappingNode):
                known, closed = parameters(cls)
                self.keys(written["init_args"], known, f"{path}.init_args", closed)
            for key, _ in node.value:
                if key.value not in _CLASS_KEYS:
                    self.problems.append(
                        f"{place_of(key)}: unknown key '{path}.{key.value}' beside class_path; "
                        f"what the class takes goes below '{path}.init_args'"
                    )
        elif path in self.groups or dataclasses.is_dataclass(hint):
            self.keys(node, known, path, closed)
        else:
            self.arguments(node, hint, path)

    def arguments(self, node: yaml.MappingNode, hint: type, path: str) -> None:
        """What a class takes, without the class: it is named elsewhere, or any subclass may be meant."""
        names = {name for cls in subclasses(hint) for name in parameters(cls)[0]}
        known: dict[str, Any] = dict.fromkeys([*_CLASS_KEYS, *names], Any)
        if cls := self.class_at(path, hint):
            taken, closed = parameters(cls)
            for key, _ in node.value:
                if closed and key.value in names and key.value not in taken:
                    takes = f"it takes {', '.join(taken)}" if taken else "it takes nothing"
                    self.problems.append(
                        f"{_at(key, f'{path}.{key.value}')}: {cls.__name__} takes no '{key.value}'; {takes}"
                    )
            known |= taken
        self.keys(node, known, path)

    def class_at(self, path: str, hint: type) -> type | None:
        """The class that was named last for ``path``."""
        for root in reversed(self.roots):
            for key, _, value in walk_keys(root):
                if key in (path, f"{path}.class_path") and isinstance(value, yaml.ScalarNode):
                    return find_class(value.value, hint)
        return None

    def whole(self, node: yaml.Node, hint: Any, path: str) -> None:
        """Required keys of a list item: no later file adds to an item, so they stand here or nowhere."""
        if dataclasses.is_dataclass(hint) and isinstance(node, yaml.MappingNode):
            written = {key.value for key, _ in node.value}
            for part in dataclasses.fields(hint):
                required = part.default is dataclasses.MISSING and part.default_factory is dataclasses.MISSING
                if required and part.name not in written and not written & {"class_path", "<<"}:
                    self.problems.append(f"{place_of(node)}: {path} has no '{part.name}'")

    def class_name(self, node: yaml.Node, hint: type, path: str) -> type | None:
        """The class that is named, None (and a problem) where there is none of that kind."""
        if not isinstance(node, yaml.ScalarNode) or node.tag != "tag:yaml.org,2002:str":
            self.problems.append(f"{_at(node, path)} must be a class name, found {describe(node)}")
            return None
        cls = find_class(node.value, hint)
        if cls is None and path in self.groups and not subclasses(hint)[1:]:
            keys = ", ".join(list(parameters(hint)[0])[:3])
            off = ": it can't be switched off" if node.value == "null" else ""
            self.problems.append(f"{_at(node, path)} must be keys ({keys}, ...), found '{node.value}'{off}")
        elif cls is None:
            self.problems.append(f"{_at(node, path)}: {why_no_class(node.value, hint)}")
        return cls


def _dotted_keys(groups: Mapping[str, Any], path: str = "") -> Iterator[str]:
    for name, hint in groups.items():
        yield f"{path}{name}"
        if is_group(hint) and (not path or dataclasses.is_dataclass(hint)):
            yield from _dotted_keys(parameters(hint)[0], f"{path}{name}.")


def _is_word_for_keys(node: yaml.Node, hint: Any) -> bool:
    """``lora: true``: the parser takes it for a class of which no key must be given, and fails later."""
    return dataclasses.is_dataclass(hint) and isinstance(node, yaml.ScalarNode) and not node.tag.endswith("null")


def _at(node: yaml.Node, path: str) -> str:
    """``file:line: path``; a flag that names the path already is enough."""
    place = place_of(node)
    return place if place == f"flag --{path}" else f"{place}: {path}"


def _is_of_flag(node: yaml.Node) -> bool:
    return place_of(node).startswith("flag --")


def _item_hint(node: yaml.Node, hint: Any, path: str) -> str:
    """How to write what stands in place of a list of keys: as its one item."""
    items = [one for one in (hint, *typing.get_args(hint)) if typing.get_origin(one) is list]
    item = typing.get_args(items[0])[0] if items else None
    if not dataclasses.is_dataclass(item):
        return ""
    if isinstance(node, yaml.MappingNode) and node.value:
        return f"; put '- ' before {node.value[0][0].value}"
    return f"; did you mean --{path}.path?" if isinstance(node, FlagText) and node.value else ""


def _choose(node: yaml.Node, union: Any) -> Any:
    """The member of a union that was meant, by the kind of what was written; in doubt the union itself."""
    fitting = [option for option in typing.get_args(union) if _can_hold(node, option)]
    if not fitting and _is_of_flag(node):  # --data.validation.path x sets a key of what is in the list
        fitting = [option for option in typing.get_args(union) if typing.get_origin(option) is list]
    groups = [option for option in fitting if is_group(option)]
    if isinstance(node, yaml.MappingNode) and len(groups) > 1:
        names = [value.value for key, value in node.value if key.value == "class_path"]
        fitting = [option for option in groups if names and find_class(names[0], option)][:1] or groups[:1]
    return fitting[0] if len(fitting) == 1 else union


def _class_meant(node: yaml.Node, union: Any) -> type | None:
    """The one class of a union of which a word must be the name, for the others take no word."""
    options = typing.get_args(union) if typing.get_origin(union) in (Union, types.UnionType) else ()
    groups = [option for option in options if is_group(option) and not dataclasses.is_dataclass(option)]
    is_word = isinstance(node, yaml.ScalarNode) and node.tag == "tag:yaml.org,2002:str"
    takes_words = any(option is str or typing.get_origin(option) is Literal for option in options)
    return groups[0] if is_word and len(groups) == 1 and not takes_words else None


def _can_hold(node: yaml.Node, option: Any) -> bool:
    origin = typing.get_origin(option) or option
    if isinstance(node, yaml.MappingNode):
        return origin is dict or is_group(option)
    if isinstance(node, yaml.SequenceNode):
        return origin in (list, tuple)
    return option is not type(None) or node.tag.endswith("null")
