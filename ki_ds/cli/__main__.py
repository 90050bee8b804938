"""The program ki-ds, and `python -m ki_ds.cli`, by which launchers start ranks."""

from __future__ import annotations

import os
from types import FrameType

from ki_ds.launch import signals


def _end(number: int, _frame: FrameType | None) -> None:
    os._exit(signals.code_of(number))


def main() -> None:
    """Run a command; a signal while its libraries are loaded, which takes seconds, ends it without a word."""
    with signals.listening(_end):
        from ki_ds.cli.main import main as run
    run()


if __name__ == "__main__":
    main()
