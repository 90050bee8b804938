"""What can be kept of a prediction, without torch: an experiment file speaks of it too."""

from __future__ import annotations

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
    def counts(self) -> bool:
        """Whether entries hold how often an id was drawn, and not its log-probability."""
        return self.kind == "sampled"

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
