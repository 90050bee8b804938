"""What a stage is: a piece of the pipeline that reads sealed folders and makes one.

A module of this package says all that there is to know of its stage; `ki_ds/stages/__init__.py` lists them; whatever
runs, shows or plans stages goes over that list.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, ClassVar, ParamSpec, TypeVar

from ki_ds.errors import UserError
from ki_ds.experiment.schema import Experiment
from ki_ds.planning.costs import Cost
from ki_ds.planning.room import Room
from ki_ds.sealed import MANIFEST, Identity, State, aside, check_identity, set_aside, state
from ki_ds.workspace import Workspace

P = ParamSpec("P")
Result = TypeVar("Result")


@dataclass(frozen=True)
class Stage(ABC):
    """One piece of work of a kind, known by its name: `Train("student")`."""

    kind: ClassVar[str]
    parent: ClassVar[str]  # folder of the work directory that holds its own; "" where there is one stage of the kind
    command: ClassVar[str]  # of ki-ds that runs it
    help: ClassVar[str] = ""  # of that command, where this stage gives it
    launched: ClassVar[bool] = False  # runs on all ranks, under the launcher
    lasting: ClassVar[bool] = True  # sealed, and done once; else made anew by every run
    remade: ClassVar[bool] = False  # seconds of work: made again by itself where its folder is of something else

    name: str

    @property
    def folder(self) -> str:
        """The folder under the work directory that it makes."""
        return f"{self.parent}/{self.name}" if self.parent else self.name

    @property
    def label(self) -> str:
        """How a launcher is told of it."""
        return f"{self.kind}:{self.name}"

    def __str__(self) -> str:
        return f"{self.kind} {self.name}" if self.parent else self.kind

    @classmethod
    @abstractmethod
    def of(cls, experiment: Experiment) -> list[Any]:
        """The stages of this kind that an experiment has."""

    @abstractmethod
    def inputs(self, experiment: Experiment) -> list[str]:
        """The folders that it reads."""

    @abstractmethod
    def identity(self, space: Workspace) -> Identity:
        """What its folder is made of.

        Raises:
            UserError: an input is not sealed yet.
        """

    @abstractmethod
    def run(self, space: Workspace) -> None:
        """Do the work, from sealed folders to a sealed folder; a sealed one returns at once. Every rank calls this.

        Raises:
            UserError: the input or the state of the work directory does not allow it.
        """

    def refuse(self, space: Workspace, ranks: int, here: bool, refusals: Refusals) -> None:
        """Gather what can be refused before anything runs; `here`: the ranks run on this machine."""
        return

    def cost(self, space: Workspace, ranks: int, room: Room) -> Cost:
        """What it will cost, known before it runs."""
        return Cost()

    def state(self, space: Workspace) -> State:
        """'sealed', 'unsealed' (begun, or to be extended), 'absent', or 'other' where its folder belongs to something
        else."""
        folder = space.root / self.folder
        if any(not (space.root / read / MANIFEST).exists() for read in self.inputs(space.experiment)):
            return "absent" if state(folder) == "absent" else "unsealed"
        return state(folder, self.identity(space))

    def progress(self, space: Workspace) -> str:
        """How far it is, in words; empty where nothing is known."""
        return ""

    def conclusion(self, space: Workspace) -> list[str]:
        """Lines for the end of a run."""
        return []

    def check_identity(self, space: Workspace) -> None:
        """Check that its folder, where there is one, was made for this experiment.

        Raises:
            UserError: naming the keys that differ, or the command that makes it again.
        """
        if self.remade and self.state(space) == "other":
            folder = space.root / self.folder
            raise UserError(f"{folder}: made from something else. Run `ki-ds {self.command}`: it is made again.")
        if self.lasting and (space.root / self.folder / MANIFEST).exists():
            check_identity(space.root / self.folder, self.identity(space))

    def make_way(self, space: Workspace) -> None:
        """Set its folder aside where it was made from something else and is to be made again; rank 0's to do."""
        if not (space.redo or self.remade):
            return
        folder, state = space.root / self.folder, self.state(space)
        if state == "other" or (state == "absent" and aside(folder).exists()):  # a killed run had just made way
            set_aside(folder, self.identity(space))

    def check_state(self, space: Workspace) -> None:
        """Check that its folder, finished or begun, is not in its way, as far as its inputs are there to tell.

        Raises:
            UserError: naming the keys that differ.
        """
        if self.lasting and not self.remade and not space.redo and self.state(space) == "other":
            check_identity(space.root / self.folder, self.identity(space))


class Refusals:
    """Every problem that is found before anything runs."""

    def __init__(self) -> None:
        self.lines: list[str] = []

    def gather(self, check: Callable[P, Result], *arguments: P.args, **named: P.kwargs) -> Result | None:
        """What a check returns; None where it refuses, which is noted."""
        try:
            return check(*arguments, **named)
        except UserError as error:
            self.lines.append(str(error))
            return None

    def check(self) -> None:
        """Refuse.

        Raises:
            UserError: a line a problem.
        """
        if self.lines:
            raise UserError("\n".join(dict.fromkeys(self.lines)))


def viewing(experiment: Experiment) -> dict[str, Any]:
    """The part of an identity that says what a model is shown of a corpus."""
    found: dict[str, Any] = {
        "objective": experiment.objective, "seed": experiment.seed, "sequence_length": experiment.sequence_length,
    }  # fmt: skip
    if experiment.objective == "mlm":
        found["masking"] = experiment.masking.model_dump(mode="json")
    return found
