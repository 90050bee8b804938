"""How the ranks of a launched stage begin together."""

from __future__ import annotations

import torch

from ki_ds.files import digest
from ki_ds.launch import distributed
from ki_ds.sealed import Identity, Manifest, prepare, versions
from ki_ds.stages.stage import Stage
from ki_ds.workspace import Workspace


def join(stage: Stage, space: Workspace) -> tuple[Identity, torch.device]:
    """Join the process group, and check that all ranks are about to do the same.

    Raises:
        UserError: naming the ranks that differ, and in what.
    """
    device = distributed.init_distributed()
    identity = stage.identity(space)
    shared = {
        "the experiment file": digest(space.experiment.model_dump(mode="json")),
        "the engine JSON": digest(space.engine_config.raw),
        "the tokenizer": space.tokenizer.digest,
        f"what {stage} is made of": identity.fingerprint,
    }
    distributed.agree(shared | {f"the version of {name}": found for name, found in versions().items()})
    return identity, device


def prepared(stage: Stage, space: Workspace, identity: Identity) -> Manifest | None:
    """`sealed.prepare` by rank 0, its result on every rank; what a stage makes again by itself is set aside before."""
    found = None
    if distributed.rank() == 0:
        stage.make_way(space)
        found = prepare(space.root / stage.folder, identity)
    return distributed.broadcast_object(found)
