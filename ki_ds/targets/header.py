"""The header of a shard: JSON, read once, strictly, into typed objects (FORMAT.md, *Header*)."""

from __future__ import annotations

from dataclasses import asdict, dataclass, field, replace
from typing import Any, TypeVar

from ki_ds.targets.codec import Codec
from ki_ds.targets.distortion import Distortion
from ki_ds.targets.selection import Selection

Part = TypeVar("Part")
NUMBERS = ("start", "end", "rows", "entries", "sequence_length")  # whole numbers that every header gives
LARGEST_NUMBER = 1 << 62


@dataclass(frozen=True)
class Origin:
    """A teacher or a corpus: what it was called, and what it was."""

    name: str
    digest: str


@dataclass(frozen=True)
class Masking:
    """How the views of a masked language model were made."""

    probability: float
    views: int


@dataclass(frozen=True)
class StreamOrder:
    """In which order samples come."""

    seed: int
    views: int
    sequences: int


PARTS = {
    "teacher": Origin, "corpus": Origin, "masking": Masking, "stream": StreamOrder, "selection": Selection,
}  # fmt: skip


@dataclass(frozen=True)
class FolderHeader:
    """What every shard of a folder says alike. To decode, length and codec are enough; whoever wrote the file may have
    left out the rest, or have said more."""

    sequence_length: int
    codec: Codec
    teacher: Origin | None = None
    corpus: Origin | None = None
    tokenizer: str | None = None  # its digest
    objective: str | None = None  # mlm, clm
    masking: Masking | None = None  # None for clm
    stream: StreamOrder | None = None
    selection: Selection | None = None
    more: dict[str, Any] = field(default_factory=dict)  # keys of another writer, or in another form, as they stand

    @property
    def record(self) -> dict[str, Any]:
        """As in a shard and in the folder's manifest."""
        parts = {name: None if (part := getattr(self, name)) is None else asdict(part) for name in PARTS}
        said = {
            "teacher": parts["teacher"], "corpus": parts["corpus"], "tokenizer": self.tokenizer,
            "objective": self.objective, "masking": parts["masking"], "stream": parts["stream"],
            "sequence_length": self.sequence_length, "selection": parts["selection"], "codec": self.codec.record,
        }  # fmt: skip
        unsaid = {name for name, value in said.items() if value is None}
        if self.objective is not None:
            unsaid -= {"masking"}  # a causal model's says that there is none
        return {**{name: value for name, value in said.items() if name not in unsaid}, **self.more}

    @classmethod
    def read(cls, said: Any) -> FolderHeader:
        """The inverse of `record`. What is not needed to decode and is not as expected is kept as it is, in `more`.

        Raises:
            ValueError: it is not a header.
        """
        if not isinstance(said, dict) or not _whole(said.get("sequence_length")):
            raise ValueError(f"the header must give a whole number sequence_length, found {str(said)[:200]}")
        try:
            codec = Codec.read(said.get("codec"))
        except ValueError as error:
            raise ValueError(f"the header's codec: {str(error)[:300]}") from None
        found: dict[str, Any] = {name: _part(kind, said.get(name)) for name, kind in PARTS.items()}
        found |= {name: _text(said.get(name)) for name in ("tokenizer", "objective")}
        known = cls(said["sequence_length"], codec, **found)
        record = known.record
        return replace(known, more={key: said[key] for key in said if key not in record or record[key] != said[key]})


@dataclass(frozen=True)
class ShardHeader:
    """What one shard says of itself: the samples that it holds, sums over them, and what its folder says alike."""

    folder: FolderHeader
    start: int
    end: int
    rows: int
    entries: int
    distortion: Distortion | None  # of its rows by quantisation

    @property
    def record(self) -> dict[str, Any]:
        """As in the file."""
        own = {"start": self.start, "end": self.end, "rows": self.rows, "entries": self.entries}
        lost = {} if self.distortion is None else {"distortion": asdict(self.distortion)}
        return {**own, **lost, **self.folder.record}

    @classmethod
    def read(cls, said: Any) -> ShardHeader:
        """The inverse of `record`.

        Raises:
            ValueError: it is not a header.
        """
        numbers = [said.get(name) for name in NUMBERS] if isinstance(said, dict) else [None]
        if not all(map(_whole, numbers)) or said["start"] > said["end"]:
            raise ValueError(f"the header must give whole numbers {', '.join(NUMBERS)}, found {str(said)[:200]}")
        distortion = _part(Distortion, said.get("distortion"))
        own = {*NUMBERS[:4], *(["distortion"] if distortion and asdict(distortion) == said["distortion"] else [])}
        folder = FolderHeader.read({key: value for key, value in said.items() if key not in own})
        return cls(folder, said["start"], said["end"], said["rows"], said["entries"], distortion)


def _whole(number: Any) -> bool:
    return type(number) is int and 0 <= number < LARGEST_NUMBER


def _text(value: Any) -> str | None:
    return value if isinstance(value, str) else None


def _part(kind: type[Part], said: Any) -> Part | None:
    """An object of the header; None where a key is missing or of another type."""
    if not isinstance(said, dict):
        return None
    values = {name: said.get(name) for name in kind.__annotations__}
    return kind(**values) if all(FORMS[form](values[name]) for name, form in kind.__annotations__.items()) else None


FORMS = {"int": _whole, "float": lambda value: type(value) in (int, float), "str": lambda value: isinstance(value, str)}
