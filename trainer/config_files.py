"""What the user wrote, flags and YAML files, read with its places before anything slow is imported.

Every YAML node keeps its mark, so that any later complaint can say ``configs/x.yaml:12``.
"""

from __future__ import annotations

import difflib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import yaml

_KEY_TAGS = ("tag:yaml.org,2002:str", "tag:yaml.org,2002:merge")
_KINDS = {"str": "text", "int": "a whole number", "float": "a number", "bool": "true or false"}


class ConfigError(Exception):
    """The command line or a config file is wrong; the text is all the user needs (exit code 2)."""


@dataclass(frozen=True)
class Flag:
    """``--key text``; ``text`` is None where the flag stood alone."""

    key: str
    text: str | None


@dataclass(frozen=True)
class Written:
    """All that the user wrote after the subcommand: files in order, then flags (the later wins)."""

    files: tuple[yaml.MappingNode, ...] = ()
    flags: tuple[Flag, ...] = ()
    paths: tuple[str, ...] = field(default=())

    def place(self, key: str) -> str:
        """Where ``key`` got its value: ``flag --key`` or ``file:line``; empty when nowhere."""
        for flag in reversed(self.flags):
            if flag.key == key or flag.key.startswith(f"{key}."):
                return f"flag --{flag.key}"
        for file in reversed(self.files):
            for path, key_node, _ in walk_keys(file):
                if path == key:
                    return place_of(key_node)
        return ""


def read_command(args: Sequence[str]) -> Written:
    """Flags and config files of ``args`` (what follows the subcommand).

    Raises:
        ConfigError: a file is missing, a folder, not YAML, sets a key twice, or a word belongs to no flag.
    """
    flags = tuple(_split_flags(args))
    paths = tuple(flag.text or "" for flag in flags if flag.key == "config")
    files = tuple(read_config(Path(path)) for path in paths if "://" not in path)
    return Written(files, tuple(flag for flag in flags if flag.key != "config"), paths)


def _split_flags(args: Sequence[str]) -> Iterator[Flag]:
    rest = list(args)
    while rest:
        word = rest.pop(0)
        if word == "-c" or word.startswith("-c="):
            word = "--config" + word[2:]
        if not word.startswith("--"):
            hint = f"; did you mean --config {word}?" if word.endswith((".yaml", ".yml")) else ""
            if word.startswith("-") and word[1:2].isalpha():
                hint = f"; did you mean '-{word}'?"
            raise ConfigError(f"'{word}' belongs to no flag{hint}")
        key, equals, text = word[2:].partition("=")
        if equals:
            yield Flag(key, text)
        elif rest and not rest[0].startswith("--"):
            yield Flag(key, rest.pop(0))
        else:
            yield Flag(key, None)


def read_config(path: Path) -> yaml.MappingNode:
    """The checked node tree of one YAML file."""
    _check_path(path)
    try:
        loader = yaml.SafeLoader(path.read_text(encoding="utf-8-sig"))
        loader.name = str(path)
        root = loader.get_single_node()
    except UnicodeDecodeError as error:
        raise ConfigError(f"{path} is not UTF-8 text ({error.reason} at byte {error.start})") from error
    except yaml.MarkedYAMLError as error:
        line = f":{error.problem_mark.line + 1}" if error.problem_mark else ""
        hint = "; indent by spaces" if error.problem and "'\\t'" in error.problem else ""
        raise ConfigError(f"{path}{line}: not valid YAML: {error.problem}{hint}") from error
    except yaml.YAMLError as error:
        raise ConfigError(f"{path}: not valid YAML: {error}") from error
    if root is None:
        raise ConfigError(f"{path} is empty; it needs keys such as model: and data:")
    if not isinstance(root, yaml.MappingNode):
        raise ConfigError(f"{place_of(root)}: expected keys such as model: and data:, found {describe(root)}")
    _check_nodes(root)
    return root


def _check_path(path: Path) -> None:
    if path.is_dir():
        inside = sorted(str(file) for file in path.glob("*.y*ml"))
        example = inside[0] if inside else f"{path}/X.yaml"
        others = f" (there are: {', '.join(inside[:8])})" if len(inside) > 1 else ""
        raise ConfigError(f"{path} is a directory; name one file in it: --config {example}{others}")
    if not path.is_file():
        nearest = _nearest_file(path)
        hint = f"; did you mean {nearest}?" if nearest else f" (looked from {Path.cwd()})"
        raise ConfigError(f"there is no config file {path}{hint}")


def _nearest_file(path: Path) -> str | None:
    """The most similar YAML file beside ``path``, else below ``configs/``, by its name."""
    for found in (path.parent.glob("*.y*ml"), Path("configs").rglob("*.y*ml")):
        stems = {file.stem: str(file) for file in sorted(found)}
        close = difflib.get_close_matches(path.stem, stems, n=1, cutoff=0.5)
        if close:
            return stems[close[0]]
    return None


def _check_nodes(root: yaml.Node) -> None:
    """Refuses what YAML itself lets pass: a key set twice, and tags that ask for objects."""
    seen: set[int] = set()
    queue: list[tuple[str, yaml.Node]] = [("", root)]
    while queue:
        path, node = queue.pop(0)
        if id(node) in seen:  # an alias: visited at its anchor
            continue
        seen.add(id(node))
        if not node.tag.startswith("tag:yaml.org,2002:") or "python" in node.tag:
            tag = node.tag.replace("tag:yaml.org,2002:", "!!")
            raise ConfigError(f"{place_of(node)}: the YAML tag {tag} is refused; write a plain value")
        if isinstance(node, yaml.SequenceNode):
            queue += [(f"{path}[{index}]", item) for index, item in enumerate(node.value)]
        if isinstance(node, yaml.MappingNode):
            first: dict[str, yaml.Node] = {}
            for key, value in node.value:
                if not isinstance(key, yaml.ScalarNode):  # {{ x }} of a template
                    where = f" below {path}" if path else ""
                    raise ConfigError(f"{place_of(key)}: {describe(key)} in place of a key{where}; quote what is text")
                name = f"{path}.{key.value}".lstrip(".")
                if key.tag not in _KEY_TAGS:
                    raise ConfigError(
                        f"{place_of(key)}: the key {name} is not text: YAML reads {key.value} as "
                        f'{describe(key, quoted=False)}; quote it: "{key.value}"'
                    )
                if name in first:
                    line = first[name].start_mark.line + 1
                    raise ConfigError(
                        f"{place_of(key)}: key '{name}' was already set in line {line}; keep one of the two"
                    )
                first[name] = key
                queue += [(name, key), (name, value)]


def walk_keys(node: yaml.Node, path: str = "") -> Iterator[tuple[str, yaml.Node, yaml.Node]]:
    """(dotted key, key node, value node) of every key of nested mappings; lists are not entered."""
    if isinstance(node, yaml.MappingNode):
        for key, value in node.value:
            name = f"{path}.{key.value}".lstrip(".")
            yield name, key, value
            yield from walk_keys(value, name)


def replaced_lists(files: Sequence[yaml.MappingNode]) -> list[str]:
    """A sentence for every list that a later file takes the place of: lists do not add up."""
    notes: list[str] = []
    last: dict[str, yaml.Node] = {}
    for file in files:
        for path, key, value in walk_keys(file):
            if isinstance(value, yaml.SequenceNode):
                if path in last:
                    notes.append(f"{place_of(key)}: '{path}' replaces the list of {place_of(last[path])}")
                last[path] = key
    return notes


def clear_replaced_lists(args: Sequence[str], files: Sequence[yaml.MappingNode]) -> list[str]:
    """The words behind the subcommand, with an empty list before each list that takes the place of one with keys.

    The config files stand first, for the parser lets the later word win, and a flag wins wherever it was typed.
    jsonargparse would fill what the entries of the new list leave out with what the entries of the old one say, where
    there are as many of them.

    Args:
        args: the words.
        files: the config files among them, as `read_command` has read them.
    """
    words: list[str] = []
    with_keys: set[str] = set()
    left = iter(files)
    for flag in sorted(_split_flags(args), key=lambda flag: flag.key != "config"):  # keeps the order of each kind
        lists: dict[str, yaml.Node | None] = {flag.key: compose_flag(flag)}
        if flag.key == "config" and "://" not in (flag.text or ""):
            lists = {path: value for path, _, value in walk_keys(next(left))}
        for path, value in lists.items():
            if isinstance(value, yaml.SequenceNode):
                if path in with_keys:
                    words.append(f"--{path}=[]")
                if any(isinstance(item, yaml.MappingNode) for item in value.value):
                    with_keys.add(path)
        words.append(f"--{flag.key}" if flag.text is None else f"--{flag.key}={flag.text}")
    return words


def compose_flag(flag: Flag) -> yaml.Node | None:
    """The list or the keys that a flag holds as YAML; None where it is a plain value."""
    try:
        loader = yaml.SafeLoader(flag.text or "")
        loader.name = f"flag --{flag.key}"
        node = loader.get_single_node()
    except yaml.YAMLError:
        return None
    return None if isinstance(node, yaml.ScalarNode) else node


def place_of(node: yaml.Node) -> str:
    """``file:line``, or the flag that a node was made from."""
    name = str(node.start_mark.name)
    return name if name.startswith("flag --") else f"{name}:{node.start_mark.line + 1}"


def describe(node: yaml.Node, quoted: bool = True) -> str:
    """What a node holds, in the user's words."""
    if isinstance(node, yaml.SequenceNode):
        return f"a list of {len(node.value)}"
    if isinstance(node, yaml.MappingNode):
        return f"keys ({', '.join(str(key.value) for key, _ in node.value[:4])})"
    name = node.tag.rpartition(":")[2]
    kind = _KINDS.get(name, name)
    return "nothing" if name == "null" else f"'{node.value}' ({kind})" if quoted else kind
