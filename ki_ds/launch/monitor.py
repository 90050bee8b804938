"""Watches the ranks of a run through their signs of life, and names those that fall silent."""

from __future__ import annotations

import contextlib
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ki_ds.launch.records import read_record, write_record
from ki_ds.progress import duration

WORD_FILE = "word.json"  # in the control folder: what the monitor says
START_S = 120.0  # at least so long a rank may take to appear: Python and its libraries are loaded before its first sign


def rank_file(rank: int) -> str:
    """The name of a rank's file in the control folder."""
    return f"rank-{rank:05d}.json"


@dataclass
class RankState:
    """What the monitor last saw of a rank, and since when (seconds of this machine's monotonic clock)."""

    record: dict[str, Any]
    alive_since: float
    progress_since: float


class Monitor:
    """Watches the ranks of a run through their files in the control folder."""

    def __init__(self, folder: Path, world_size: int, timeout_s: float):
        self.folder, self.timeout_s, self.start_s, self.beat = folder, timeout_s, max(timeout_s, START_S), 0
        now = time.monotonic()
        self.ranks = {rank: RankState({}, now, now) for rank in range(world_size)}

    def say(self, word: str) -> None:
        """Tell the ranks: "run", "save" or "stop"."""
        self.beat += 1
        with contextlib.suppress(OSError):
            self.folder.mkdir(parents=True, exist_ok=True)
        write_record(self.folder / WORD_FILE, {"beat": self.beat, "say": word})

    def look(self) -> str:
        """Which ranks have been silent for too long, in words; empty while all is well."""
        now = time.monotonic()
        for rank, state in self.ranks.items():
            record = read_record(self.folder / rank_file(rank)) or state.record
            if record.get("beat") != state.record.get("beat"):
                state.alive_since = now
            if record.get("progress") != state.record.get("progress"):
                state.progress_since = now
            if not state.record and record:  # until the last rank is here, those before it have nothing to get on with
                for other in self.ranks.values():
                    other.progress_since = now
            state.record = record
        return self.verdict(now)

    def verdict(self, now: float) -> str:
        """As `look`, from what was seen before."""
        left = {rank: state for rank, state in self.ranks.items() if not state.record.get("ended")}
        limits = {rank: self.timeout_s if state.record else self.start_s for rank, state in left.items()}
        dead = [rank for rank, state in left.items() if now - state.alive_since > limits[rank]]
        all_here = all(state.record for state in left.values())
        stuck = [
            rank
            for rank, state in left.items()
            if all_here and now - state.progress_since > self.timeout_s * state.record.get("patience", 1)
        ]
        blamed = dead or [rank for rank in stuck if not left[rank].record.get("waiting")]
        if not blamed and len(stuck) < len(left):
            return ""  # who waits for others is not to blame
        blamed = blamed or stuck
        least = min((left[rank].record.get("progress", 0) for rank in blamed), default=0)
        behind = dead or [rank for rank in blamed if left[rank].record.get("progress", 0) == least]
        return "; ".join(self._words(rank, rank in dead) for rank in behind)

    def _words(self, rank: int, dead: bool) -> str:
        record = self.ranks[rank].record
        if not record:
            return f"rank {rank}: did not appear within {duration(self.start_s)}"
        sign = "no sign of life" if dead else "no progress"
        return (
            f"rank {rank} (host {record.get('host')}, process {record.get('process')}): {sign} for "
            f"{duration(self.timeout_s)}; last: {record.get('doing')}"
        )

    @property
    def stop_requested(self) -> bool:
        """Whether a signal has asked any rank to save and end."""
        return any(state.record.get("stop_requested") for state in self.ranks.values())

    def living(self) -> list[int]:
        """Ranks that have appeared and have not said that they ended."""
        found = {rank: read_record(self.folder / rank_file(rank)) or {} for rank in self.ranks}
        return [rank for rank, record in found.items() if record and not record.get("ended")]

    def ended(self) -> set[str]:
        """How the ranks say that they have ended."""
        found = (read_record(self.folder / rank_file(rank)) or {} for rank in self.ranks)
        return {str(record["ended"]) for record in found if record.get("ended")}
