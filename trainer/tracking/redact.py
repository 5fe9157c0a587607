"""Takes secrets out of what is stored or sent: configs, command lines, texts."""

from __future__ import annotations

import os
import re
from collections.abc import Mapping, Sequence
from typing import Any

REDACTED = "[redacted]"

# model.max_tokens is no secret: a name in the plural of token hides strings only.
_SECRET_NAME = re.compile(r"secret|passw|credential|api_?key|(^|[_.-])(keys?|jwt)$|tokens?$", re.IGNORECASE)
# What a run reads and how, and where it lies (data/key=5/x.parquet): the words "key: x" in there hide nothing.
_ANY_WORDS = frozenset(
    {
        *("prompt", "prompts", "columns", "where", "label_map", "holdout_by"),
        *("path", "backbone", "corpus", "queries", "qrels", "cache_dir", "default_root_dir"),
    }
)
_CREDENTIALS = (
    # scheme://user:password@host
    (re.compile(r"(\b[a-z][a-z0-9+.-]*://)[^/\s]+@", re.IGNORECASE), rf"\g<1>{REDACTED}@"),
    # ?token=value of an address
    (
        re.compile(r"([?&][\w.-]*(?:secret|passw|credential|key|token|sig|signature)\w*=)[^\s&'\"]+", re.IGNORECASE),
        rf"\g<1>{REDACTED}",
    ),
    # what the hub, GitHub, GitLab, Slack, AWS and others issue; a folder may be called sk-encoder or hf_models
    (
        re.compile(
            r"\b(?:hf_[A-Za-z0-9]{16,}|gh[pousr]_[A-Za-z0-9]{16,}|github_pat_\w{16,}|glpat-[\w-]{16,}|xox[a-z]-[\w-]{10,}"
            r"|sk-(?:(?:proj|ant|svcacct|live|test)-[\w-]{16,}|[A-Za-z0-9]{20,})|AKIA[A-Z0-9]{16})"
        ),
        REDACTED,
    ),
    (re.compile(r"(\bbearer\s+)[\w.~+/-]{16,}=*", re.IGNORECASE), rf"\g<1>{REDACTED}"),
)
# name=value and name: value, in addresses, options and inline JSON
_NAMED = re.compile(
    r"""((?:secret|passw\w*|credential|(?<![a-z])key|api_?key|token|signature|(?<![a-z])sig)["']?\s*[=:]\s*["']?)"""
    r"""[^\s"'&,}]+""",
    re.IGNORECASE,
)


def is_secret_name(name: str) -> bool:
    """Whether a value under this name is a secret: key, token, password, ... as a word of the name."""
    return _SECRET_NAME.search(name) is not None


def redact_text(text: str) -> str:
    """The text without credentials, as :func:`redact_credentials` finds them, and what stands behind a secret name
    (``token=...``)."""
    return _NAMED.sub(rf"\g<1>{REDACTED}", redact_credentials(text))


def redact_credentials(text: str) -> str:
    """The text without what is a secret whatever stands before it: credentials in addresses, tokens by their shape,
    values of secret environment variables."""
    for name, value in os.environ.items():
        if len(value) >= 8 and is_secret_name(name):
            text = text.replace(value, REDACTED)
    for pattern, replacement in _CREDENTIALS:
        text = pattern.sub(replacement, text)
    return text


def redact(value: Any, name: str = "", any_words: bool = False) -> Any:
    """A copy of a config without its secrets; numbers stay unless their name says password or secret.

    Of places, prompts, and columns and values of the data (``any_words``), only credentials are taken out: the export
    and a resume read them again, whatever words are in them.
    """
    any_words = any_words or name.lstrip("-").rpartition(".")[2] in _ANY_WORDS
    if isinstance(value, Mapping):
        return {key: redact(item, str(key), any_words) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [redact(item, name, any_words) for item in value]
    if any_words:
        return redact_credentials(value) if isinstance(value, str) else value
    if value is None or isinstance(value, bool):
        return value
    if isinstance(value, int | float):
        return REDACTED if re.search("secret|passw", name, re.IGNORECASE) else value
    return REDACTED if is_secret_name(name) else redact_text(str(value))


def redact_arguments(arguments: Sequence[str]) -> list[str]:
    """A command line without its secrets: `--x.token=...`, `--x.token ...`, what `redact_text` finds."""
    safe: list[str] = []
    hide_next = False
    for argument in arguments:
        name, equals, value = argument.partition("=")
        is_option = name.startswith("-")
        if hide_next and not is_option:
            safe.append(REDACTED)
        elif is_option and equals:
            safe.append(f"{name}={redact(_number_or_text(value), name)}")
        else:
            safe.append(redact_text(argument))
        hide_next = is_option and not equals and is_secret_name(name) and not name.endswith("tokens")
    return safe


def _number_or_text(text: str) -> float | str:
    return int(text) if text.isdecimal() else text
