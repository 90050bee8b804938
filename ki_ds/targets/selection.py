"""Names of what can be kept of a prediction, without torch: an experiment file speaks of it too."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any


@dataclass(frozen=True)
class Selection:
    """How a targets folder was selected; what its identity and its shards' headers say."""

    kind: str  # top_k, top_p, sampled
    k: int  # the most entries of a row: for sampled, the number of draws
    p: float = 1.0  # top_p: the mass to be reached
    temperature: float = 1.0  # sampled: of the distribution that is drawn from

    @property
    def suffix(self) -> str:
        """What a folder's name says of it; what a larger k serves as well is left out."""
        if self.kind == "top_k":
            return ""
        return f"@top_p-{self.p:.12g}" if self.kind == "top_p" else f"@sampled-{self.k}-t{self.temperature:.12g}"

    @property
    def record(self) -> dict[str, Any]:
        """As in manifests and headers."""
        return asdict(self)


def tail_name(temperature: float) -> str:
    """The scalar that holds the tail's weight at a temperature."""
    return f"tail@{temperature:.12g}"


def scalar_names(selection: Selection, temperatures: Sequence[float]) -> tuple[str, ...]:
    """What is stored of each row beside its entries."""
    if selection.kind == "sampled":
        return ("truth",)
    return ("first", "truth", *(tail_name(t) for t in sorted({1.0, *temperatures})))
