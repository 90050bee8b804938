"""The ki-ds command; the only reader of argv.

Exit codes: 0 done; 2 the input is wrong; 75 stopped by a signal, to be started again (130 by Ctrl-C, 129 because its
terminal was lost); 1 anything else.
"""

from __future__ import annotations

import errno
import os
import sys
import time
from types import FrameType
from typing import Annotated

import typer

from ki_ds import __version__
from ki_ds.cli import look, run
from ki_ds.cli.targets import app as targets_app
from ki_ds.errors import StageFailed, UserError
from ki_ds.files import remedy
from ki_ds.launch import distributed, heartbeat, signals
from ki_ds.progress import outlast_terminal, say, show_cursor

PEER_GONE = ("Connection closed by peer", "Connection reset by peer", "Broken pipe")  # gloo's words

app = typer.Typer(
    no_args_is_help=True, add_completion=False, pretty_exceptions_enable=False, rich_markup_mode=None,
    help="Knowledge inheritance: pre-train a larger language model with the help of a smaller one.",
)  # fmt: skip
run.add(app)
look.add(app)
app.add_typer(targets_app, name="targets")


def version(shown: bool) -> None:
    if shown:
        say(f"ki-ds {__version__}")
        raise typer.Exit


@app.callback()
def top(_version: Annotated[bool, typer.Option("--version", callback=version, is_eager=True)] = False) -> None:
    """Knowledge inheritance: pre-train a larger language model with the help of a smaller one."""


def _on_signal(number: int, _frame: FrameType | None) -> None:
    """Stop what this process does; where that does not come through, the same signal again ends it at once."""
    first = not signals.asked
    if signals.note(number):
        show_cursor()
        os._exit(signals.code_of(number))
    if first:
        raise heartbeat.Stopped


def main(arguments: list[str] | None = None) -> None:
    """Run a command and end the process with its exit code."""
    outlast_terminal()
    signals.asked.clear()
    with signals.listening(_on_signal):
        _run(arguments)


def _run(arguments: list[str] | None) -> None:
    try:
        distributed.check_environment()
        app(args=arguments, standalone_mode=True)
    except UserError as error:
        heartbeat.end("failed")
        if distributed.rank():
            time.sleep(3)  # rank 0 most often says the same, and its end stops this process
        for line in str(error).splitlines():
            print(f"error: {line}", file=sys.stderr, flush=True)
        raise SystemExit(2) from None
    except StageFailed as failed:
        raise SystemExit(failed.code) from None
    except heartbeat.Stopped:
        heartbeat.end("stopped")
        if distributed.rank() == 0 and not heartbeat.THIS_RANK.watched:
            print("stopped, as asked; the same command goes on from here", file=sys.stderr, flush=True)
        raise SystemExit(heartbeat.exit_code()) from None
    except RuntimeError as error:
        if distributed.world_size() == 1 or not any(sign in str(error) for sign in PEER_GONE):
            raise
        print(f"rank {distributed.rank()}: stops, because another rank has ended", file=sys.stderr, flush=True)
        time.sleep(10)  # the launcher is to see that one's exit code, not this one's
        raise SystemExit(1) from None
    except OSError as error:
        if error.errno not in (errno.ENOSPC, errno.EDQUOT, errno.EACCES, errno.EROFS, errno.ENAMETOOLONG):
            raise
        print(f"error: {error.filename or 'a file'}: {error.strerror}. {remedy(error)}", file=sys.stderr, flush=True)
        raise SystemExit(2) from None
