"""The command line. Help and early refusals answer at once; Lightning is imported only to work."""

from __future__ import annotations

import atexit
import difflib
import errno
import os
import re
import shutil
import socket
import sys
import traceback
from pathlib import Path

from trainer import interruption
from trainer.config_files import ConfigError, read_command
from trainer.output import outlast_readers
from trainer.run_dir import is_first_of_node, is_first_rank, rank_name
from trainer.tracking.redact import redact_credentials

COMMANDS = (
    *("fit", "validate", "test", "predict", "mine", "export", "compare"),
    *("check", "prepare", "preflight", "cache", "demo"),
)

_STOPPABLE = ("fit", "predict", "mine")  # what they have done is kept, and the same command goes on
_UNREAD = "nobody reads standard output any more: its lines are dropped, the work goes on\n"


def main(argv: list[str] | None = None) -> int:
    """Runs one command line (default: this process's) and returns its exit status.

    0 done; 1 the work failed; 2 the command line or a config file is wrong. A fit, predict or mine that was asked to
    stop has saved where it stood: 85 by USR1 (start me again), 143 by TERM, 130 by Ctrl-C, 129 by HUP (its terminal was
    closed).
    ``--debug`` or ``TRAINER_DEBUG=1`` shows the traceback of every failure.
    """
    args = list(sys.argv[1:] if argv is None else argv)
    if argv is None:
        stoppable = args[:1] and args[0] in _STOPPABLE
        outlast_readers(_UNREAD if stoppable and is_first_rank(os.environ) else "")
        if stoppable:
            interruption.listen()
    debug = "--debug" in args or os.environ.get("TRAINER_DEBUG") == "1"
    # The loss of a rank is said in one sentence, which 30 lines of C++ would hide.
    os.environ.setdefault("TORCH_CPP_LOG_LEVEL", "ERROR")
    try:
        code = _dispatch([arg for arg in args if arg != "--debug"])
        atexit.register(_leave_ranks)
        return code
    except ConfigError as error:
        if debug:
            raise
        if is_first_of_node(os.environ):  # the ranks of a node read the same files; another node may see others
            first = is_first_rank(os.environ)
            where = "" if first else f"rank {rank_name(os.environ)} on host {socket.gethostname()}: "
            print(redact_credentials(f"{where}{error}"), file=sys.stderr)
        return 2
    except interruption.Interrupted as stop:
        atexit.register(_leave_ranks)
        return int(stop.code or 1)
    except SystemExit:
        if interruption.received() is None:
            raise
        return 130  # Lightning's way out of a second Ctrl-C
    except KeyboardInterrupt:
        if debug:
            raise
        print("interrupted", file=sys.stderr)
        return 130
    except Exception as error:
        user_error = _user_error(error)
        if debug or user_error is None:
            raise
        if not _is_said(user_error):
            print(redact_credentials(_sentence(user_error)), file=sys.stderr)
        return 1


def _leave_ranks() -> None:
    """End the process group in order. One that is left to the clean-up of C++ aborts a process that was done, now and
    then ("terminate called without an active exception"), and its job has failed."""
    distributed = sys.modules.get("torch.distributed")
    if distributed is not None and distributed.is_available() and distributed.is_initialized():
        distributed.destroy_process_group()


def _dispatch(args: list[str]) -> int:
    if not args or args[0] in ("-h", "--help", "help"):
        print(help_text("trainer"), end="")
        return 0
    command, rest = args[0], args[1:]
    if command not in COMMANDS:
        raise ConfigError(_not_a_command(args))
    if command == "demo":
        from trainer.demo import main as demo

        return demo(rest)
    if "-h" in rest or "--help" in rest:
        print(help_text(command), end="")
        return 0
    if command == "export":
        from trainer.export.command import export

        return export(rest)
    if command == "compare":
        from trainer.compare.command import compare

        return compare(rest)
    if command == "check":
        return _check(rest)
    if command == "predict":
        from trainer.predict.command import predict

        return predict(rest)
    if command == "mine":
        from trainer.mine.command import mine

        return mine(rest)
    if command == "prepare":
        from trainer.prepare import prepare

        return prepare(rest)
    if command == "preflight":
        from trainer.preflight import preflight

        return preflight(rest)
    if command == "cache":
        from trainer.cache_command import cache

        return cache(rest)
    return _run_lightning(command, rest)


def help_text(name: str) -> str:
    """A screen of help that was made from the live parser (`python -m trainer.help_text`)."""
    return (Path(__file__).parent / "help" / f"{name}.txt").read_text(encoding="utf-8")


def _not_a_command(args: list[str]) -> str:
    given = next((arg for arg in args if arg in COMMANDS), "fit")
    if args[0].startswith("-"):
        others = [arg for arg in args if arg != given] if given in args else args
        return f"the subcommand comes first: trainer {given} {' '.join(others)}"
    if args[0].endswith((".yaml", ".yml")):
        return f"'{args[0]}' is no subcommand; did you mean: trainer fit --config {' '.join(args)}"
    near = difflib.get_close_matches(args[0], COMMANDS, n=1)
    hint = f"did you mean '{near[0]}'?" if near else f"there are: {', '.join(COMMANDS)}"
    return f"'{args[0]}' is no subcommand; {hint}"


def _run_lightning(command: str, args: list[str]) -> int:
    args = ["--help" if arg == "--help-all" else arg for arg in args]
    if not args:
        raise ConfigError(f"a recipe is needed: trainer {command} --config configs/X.yaml")
    written = read_command(args)
    from trainer.lightning_cli import run

    interruption.stop_if_asked()  # the imports took seconds
    run([command, *args], written)
    return 0


def _check(args: list[str]) -> int:
    if not args:
        raise ConfigError("a recipe is needed: trainer check --config configs/X.yaml")
    if "--exact" not in args:
        from trainer.check.command import check

        return check(args)
    args = [arg for arg in args if arg != "--exact"]
    written = read_command(args)
    from trainer.distributed.exact import check_exact
    from trainer.distributed.launch import slurm_flags
    from trainer.lightning_cli import run

    args += slurm_flags({flag.key for flag in written.flags})
    return check_exact(run(["fit", *args], read_command(args), execute=False))


_PLACE_ERRORS = (
    errno.EACCES,
    errno.EEXIST,
    errno.EISDIR,
    errno.ENOENT,
    errno.ENOTDIR,
    errno.EPERM,
    errno.EROFS,
)
_FULL = (errno.EDQUOT, errno.ENOSPC)


def _user_error(error: BaseException | None) -> BaseException | None:
    """What the user can mend: a ValueError, Lightning's complaint about settings, the loss of another rank, a file that
    can't be written.

    Libraries wrap what our code raises inside them (datasets does), so the chain of causes is searched.
    """
    while error is not None:
        if isinstance(error, ValueError) or type(error).__name__ == "MisconfigurationException":
            return error
        if isinstance(error, RuntimeError) and _is_lost_rank(error):
            return error
        if isinstance(error, OSError) and (error.errno in _FULL or (error.filename and error.errno in _PLACE_ERRORS)):
            return error
        # Lightning can't take down loaders that have not started, and raises in place of what kept them from it.
        error = error.__context__ if "iter(combined_loader)" in str(error) else error.__cause__
    return None


def _is_lost_rank(error: RuntimeError) -> bool:
    meeting = sys.modules.get("trainer.distributed.meeting")  # where it was not imported there are no ranks
    return meeting is not None and meeting.LOST_RANK.search(str(error)) is not None


def _is_said(error: BaseException) -> bool:
    """Whether another rank, or the watch of this one, says it."""
    if isinstance(error, RuntimeError):
        watch = sys.modules.get("trainer.distributed.watch")  # of a fit
        return watch is not None and watch.SAID in getattr(error, "__notes__", ())
    return type(error).__name__ == "SharedError" and not is_first_rank(os.environ)


def _free(filename: str | None) -> str:
    """How much room there is where a file was to be written; a quota may be narrower."""
    if not filename:  # it may have been anywhere
        return ""
    folder = Path(filename).parent
    return f" ({shutil.disk_usage(folder).free:,} bytes free in {folder})" if folder.is_dir() else ""


def _sentence(error: BaseException) -> str:
    """``error: cause and remedy``; where a library raised it, also in which line."""
    rank = "" if is_first_rank(os.environ) else f" (rank {rank_name(os.environ)})"
    if isinstance(error, RuntimeError):  # before the watch was set up; the rank that failed says why
        return f"error{rank}: another rank has ended, so this one stops"
    if isinstance(error, OSError):
        place = f"{error.filename}: {error.strerror}" if error.filename else str(error.strerror)
        if error.errno in _FULL:
            return f"error{rank}: {place}{_free(error.filename)}; make room; a fit goes on by --ckpt_path auto"
        return f"error{rank}: {place}; name another place, or mend this one (--debug shows where)"
    text = str(error)
    if "\nOriginal Traceback" in text:  # a worker of a loader: its traceback is in the text
        text = re.split(r"\n[\w.]+: ", text.strip())[-1]
    if text.startswith("Does not validate against any of the Union"):
        from trainer.config_errors import said_of_union

        text = said_of_union(text)
    last = traceback.extract_tb(error.__traceback__)[-1]
    ours = Path(last.filename).is_relative_to(Path(__file__).parent) or text != str(error)
    where = "" if ours else f"\n  raised in {last.filename}:{last.lineno}; --debug shows the way there"
    return f"error{rank}: {text}{where}"
