"""The numbers of a training run: metrics.jsonl and TensorBoard. Every field is described in docs/metrics.md."""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Iterator
from contextlib import suppress
from pathlib import Path
from typing import Any

from ki_ds.errors import UserError, reason
from ki_ds.files import write_atomically

TAIL = 1 << 20  # bytes at the end of a file that surely hold a whole line

NUMBER, INTEGER, TRUTH, OBJECT = (int, float, type(None)), (int,), (bool,), (dict,)
# what a line may hold, by the types that JSON has for it; null is a number that was not finite, or that is not there
FIELDS: dict[str, tuple[type, ...]] = {
    "step": INTEGER, "tokens": INTEGER, "seconds": NUMBER, "loss": NUMBER, "ce": NUMBER, "kl": NUMBER,
    "kl_tau2": NUMBER, "corpora": OBJECT, "alpha": NUMBER, "learning_rate": NUMBER, "gradient_norm": NUMBER,
    "applied": TRUTH, "skipped": INTEGER, "loss_scale": NUMBER, "tokens_per_second": NUMBER,
    "reading_seconds": NUMBER, "waited_seconds": NUMBER, "validation": OBJECT,
}  # fmt: skip

WORDS = {
    int: "an integer", float: "a number", type(None): "null", bool: "true or false", dict: "an object",
    list: "an array", str: "a string",
}  # fmt: skip

Record = dict[str, Any]  # a line
Remedy = Callable[[int], str]  # what to do where the lines are whole up to this step only


class Metrics:
    """`metrics.jsonl` and TensorBoard of one run; opened at a step, what an earlier try wrote after it is cut off."""

    def __init__(self, folder: Path, step: int, remedy: Remedy) -> None:
        """Open to go on after `step`; at 0 the file begins anew.

        Raises:
            UserError: the lines up to the step are not whole, or the file cannot be read or written.
        """
        from torch.utils.tensorboard import SummaryWriter

        self.path = folder / "metrics.jsonl"
        self.last: Record = {}  # the last line that was kept
        self.first_perplexity: dict[str, float | None] = {}  # of the first validation on each corpus
        size = 0
        for line, record in _lines(self.path, step, remedy) if step else ():
            size, self.last = size + len(line), record
            self._note(record)
        write_atomically(self.path, _beginning(self.path, size))
        self.file = self.path.open("a", encoding="utf-8")
        self.tensorboard = SummaryWriter(str(folder / "tensorboard"), purge_step=step + 1 if step else 0)

    def _note(self, record: Record) -> None:
        self.first_perplexity = record.get("validation", {}) | self.first_perplexity

    def write(self, record: Record) -> None:
        """One step's record; null for what is not finite."""
        clean = finite(record)
        self._note(clean)
        self.file.write(json.dumps(clean, allow_nan=False) + "\n")
        self.file.flush()
        for name, number in _flat(clean):
            if isinstance(number, (int, float)) and name != "step":
                self.tensorboard.add_scalar(name, number, record["step"])

    def sync(self) -> None:
        """Bring what was written to disk: a checkpoint must not know of steps that the metrics do not."""
        os.fsync(self.file.fileno())

    def close(self) -> None:
        """Flush and close both."""
        self.file.close()
        self.tensorboard.close()


def finite(value: Any) -> Any:
    """The value, with None for each float that JSON cannot say."""
    if isinstance(value, dict):
        return {key: finite(item) for key, item in value.items()}
    return None if isinstance(value, float) and not abs(value) < float("inf") else value


def _flat(record: Record, prefix: str = "") -> Iterator[tuple[str, Any]]:
    for key, value in record.items():
        yield from _flat(value, f"{prefix}{key}/") if isinstance(value, dict) else [(prefix + key, value)]


def _beginning(path: Path, size: int) -> Iterator[bytes]:
    """The first bytes of a file, in blocks."""
    if size:
        with path.open("rb") as file:
            while size and (block := file.read(min(size, 1 << 20))):
                size -= len(block)
                yield block


# ------------------------------------------------------------------------------------------------------------ reading


def read_metrics(path: Path, steps: int, remedy: Remedy) -> Iterator[Record]:
    """The records of a whole run, one after the other: of step 0, where it was validated, and of steps 1 … `steps`.

    Raises:
        UserError: a line is damaged, or there is not exactly one of each step, in order; with file, line and remedy.
    """
    for _, record in _lines(path, steps, remedy, whole=True):
        yield record


def _lines(path: Path, steps: int, remedy: Remedy, whole: bool = False) -> Iterator[tuple[bytes, Record]]:
    """Lines as they stand and their records, up to that of the last step; `whole`: nothing may stand behind it.

    Raises:
        UserError: as `read_metrics`.
    """
    done, number = -1, 0
    try:
        with path.open("rb") as file:
            for number, line in enumerate(file, 1):
                if done == steps and not whole:
                    return
                try:
                    record = _parsed(line)
                    step = record["step"]
                    done = 0 if done < 0 and step == 1 else done  # made before step 0 was validated
                    if done == steps:
                        raise ValueError(f"found step {step} behind the last, {steps}")
                    if step != done + 1:
                        raise ValueError(f"found step {step}, expected {done + 1}")
                except ValueError as error:
                    raise UserError(f"{path}:{number}: {error}. {remedy(max(done, 0))}") from None
                done = step
                yield line, record
    except FileNotFoundError:
        pass
    except OSError as error:
        raise UserError(f"{path}: cannot be read: {reason(error)}. Make it readable for this user.") from None
    if done < steps:
        raise UserError(
            f"{path}: ends after line {number} with step {max(done, 0)}; expected every step from 1 to {steps}. "
            f"{remedy(max(done, 0))}"
        )


def _parsed(line: bytes) -> Record:
    """A line's record.

    Raises:
        ValueError: it is cut off or not a line of metrics.
    """
    if not line.endswith(b"\n"):
        raise ValueError("cut off")
    try:
        record = json.loads(line.decode())
    except RecursionError:
        raise ValueError("nested too deep") from None
    except UnicodeDecodeError:
        raise ValueError("not UTF-8") from None
    except ValueError as error:
        raise ValueError(f"not JSON: {reason(error)}") from None
    if not isinstance(record, dict):
        raise ValueError("not a JSON object")
    if "step" not in record:
        raise ValueError("step: missing")
    for name in FIELDS.keys() & record.keys():
        _check(name, record[name], FIELDS[name])
    for name, value in record.get("validation", {}).items():
        _check(f"validation.{name}", value, NUMBER)
    for name, of_corpus in record.get("corpora", {}).items():
        _check(f"corpora.{name}", of_corpus, OBJECT)
        for key, value in of_corpus.items():
            _check(f"corpora.{name}.{key}", value, NUMBER)
    return record


def _check(name: str, value: Any, kinds: tuple[type, ...]) -> None:
    if type(value) not in kinds:
        raise ValueError(f"{name}: found {WORDS[type(value)]}, expected {' or '.join(WORDS[kind] for kind in kinds)}")


def last_step(path: Path) -> int:
    """The step of the last line that is whole, 0 where there is none: of a long file only the end is read."""
    with suppress(OSError), path.open("rb") as file:
        file.seek(max(file.seek(0, os.SEEK_END) - TAIL, 0))
        for line in reversed(file.read().splitlines(keepends=True)):
            with suppress(ValueError):
                return int(_parsed(line)["step"])
    return 0
