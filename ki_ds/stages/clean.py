"""What lies in a work directory that nothing in its experiment names."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from ki_ds import sealed
from ki_ds.launch.lock import held
from ki_ds.sealed import MANIFEST, UNSEALED
from ki_ds.stages import STAGES
from ki_ds.stages.pipeline import stages
from ki_ds.workspace import Workspace


@dataclass(frozen=True)
class Unnamed:
    """A folder that a stage once made."""

    folder: str  # under the work directory
    size_bytes: int


def unnamed(space: Workspace) -> list[Unnamed]:
    """Folders that stages made, or that were set aside for new ones, and that no stage of the experiment makes."""
    named = {stage.folder for stage in stages(space.experiment)}
    parents = {kind.parent for kind in STAGES} | {""}
    found = []
    for path in sorted(path for parent in parents for path in (space.root / parent).glob("*") if path.is_dir()):
        folder = str(path.relative_to(space.root))
        waits = path.name.startswith(".") and path.name.endswith(".old")  # `sealed.aside`
        made = waits or any((path / name).exists() for name in (MANIFEST, UNSEALED))
        if made and not path.is_symlink() and folder not in named:
            size = sum(file.lstat().st_size for file in path.rglob("*") if not file.is_dir())
            found.append(Unnamed(folder, size))
    return found


def remove(space: Workspace, one: Unnamed) -> None:
    """Remove one, unless somebody is making it.

    Raises:
        UserError: somebody is.
    """
    path = Path(one.folder)
    name = path.name[1 : -len(".old")] if path.name.startswith(".") else path.name  # what waits belongs to the new one
    with held(space.root, [str(path.with_name(name))]):
        sealed.remove(space.root / path)
