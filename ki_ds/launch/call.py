"""What `ki-ds run` tells the ranks that it launches: a file of the control folder.

Between the two stand launchers, and shells on other nodes, that read the words of a command line once more. So these
words are few and plain whatever an argument or a folder is called.
"""

from __future__ import annotations

import base64
import json
import os
import socket
from collections.abc import Sequence
from pathlib import Path

from ki_ds.errors import UserError, reason
from ki_ds.files import write_atomically

CALL_FILE = "call.json"


def write_call(control: Path, arguments: Sequence[str]) -> str:
    """Write the arguments of `ki-ds worker`; returns where they lie, as a word of letters, digits, `-` and `_`.

    Raises:
        UserError: the file cannot be written.
    """
    path = control.absolute() / CALL_FILE
    write_atomically(path, json.dumps([*arguments]).encode())
    return base64.urlsafe_b64encode(os.fsencode(path)).decode().rstrip("=")


def read_call(word: str) -> list[str]:
    """The arguments, in a rank.

    Raises:
        UserError: the file is not seen here.
    """
    path = Path(os.fsdecode(base64.urlsafe_b64decode(word + "=" * (-len(word) % 4))))
    try:
        return [str(argument) for argument in json.loads(path.read_bytes())]
    except OSError as error:
        raise UserError(
            f"{path}: cannot be read on {socket.gethostname()}: {reason(error)}; expected --workdir on a file system "
            "that all nodes see, under the same path"
        ) from None
