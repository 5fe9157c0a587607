"""Output that nobody reads any more: the work does not end with its reader."""

from __future__ import annotations

import errno
import io
import os
import sys
from contextlib import suppress
from typing import Any

_GONE = (errno.EPIPE, errno.EIO)  # a pipe without a reader, a terminal that was closed


class _Lasting(io.FileIO):
    """A stream that drops what is written once its reader is gone.

    Args:
        farewell: said on stderr then; nothing where empty.
    """

    def __init__(self, descriptor: int, farewell: str) -> None:
        super().__init__(descriptor, "wb", closefd=False)
        self._farewell = farewell

    def write(self, data: Any) -> int:
        try:
            return super().write(data)
        except OSError as error:
            if error.errno not in _GONE:
                raise
        nowhere = os.open(os.devnull, os.O_WRONLY)
        os.dup2(nowhere, self.fileno())  # for what libraries write past this object, too
        os.close(nowhere)
        with suppress(OSError):
            os.write(2, self._farewell.encode())
        return len(data)


def outlast_readers(farewell: str = "") -> None:
    """Let this process go on when ``| head`` has seen enough, or a Ctrl-C ends the ``tee`` beside it as well.

    Args:
        farewell: a line for stderr when the reader of stdout is gone.
    """
    for name, said in (("stdout", farewell), ("stderr", "")):
        stream = getattr(sys, name)
        if stream is None:  # closed from the start
            continue
        raw = _Lasting(stream.fileno(), said)
        text = io.TextIOWrapper(
            raw if stream.write_through else io.BufferedWriter(raw),  # type: ignore[arg-type]  # as python -u does
            encoding=stream.encoding,
            errors=stream.errors,
            line_buffering=stream.line_buffering,
            write_through=stream.write_through,
        )
        setattr(sys, name, text)
