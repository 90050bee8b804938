"""A targets folder made of predictions that were computed elsewhere."""

from __future__ import annotations

import shutil
from pathlib import Path

from ki_ds.errors import UserError
from ki_ds.exchange.tables import Answers, blocks
from ki_ds.exchange.teacher_inputs import TeacherInputs, header
from ki_ds.experiment.schema import Experiment
from ki_ds.files import file_digest
from ki_ds.progress import Progress
from ki_ds.sealed import Identity, prepare, read_unsealed, reopen, state
from ki_ds.targets import codec
from ki_ds.targets.codec import Codec
from ki_ds.targets.folder import finish, open_folder
from ki_ds.targets.selection import Selection
from ki_ds.targets.shard import Block, check_bound, shard_name, write_shard


def make(
    folder: Path, path: Path, inputs: TeacherInputs, every: int, experiment: Experiment, corpus: str, name: str
) -> int:
    """Import a Parquet file of answers into a sealed folder; the number of samples.

    Raises:
        UserError: the answers do not fit the corpus, or the folder holds something else.
    """
    answers = Answers(path)
    longest = answers.longest()
    size = inputs.tokenizer.size
    if not 0 < longest <= min(1024, size):
        raise UserError(f"{path}: rows of up to {longest} ids; expected 1 to {min(1024, size)}")
    selection = Selection("top_k", longest)
    scalars = ("first", *(("truth",) if answers.truth else ()), "tail@1")
    how = Codec(size, longest, codec.quantum(experiment.target_distortion.mean), scalars=scalars)
    digests = {"answers": file_digest(path), f"corpora/{corpus}": inputs.tokens.digest}
    teacher = {"name": name, "digest": digests["answers"]}
    said = header(experiment, corpus, inputs.tokens, inputs.tokenizer.digest, teacher, selection.record, how)
    per_shard = experiment.samples_per_shard
    identity = Identity("teach", {**said, "samples_per_shard": per_shard}, digests)
    if state(folder) == "unsealed" and "answers" in read_unsealed(folder)["inputs"]:
        shutil.rmtree(folder)  # of an import that failed: answers may have been corrected since
    if state(folder, identity) == "sealed" and open_folder(folder).missing():
        reopen(folder, identity)  # a shard was set aside
    found = prepare(folder, identity)
    if found is not None:
        return int(found.facts["samples"])
    done, waiting = 0, list[Block]()

    def flush() -> None:
        nonlocal done, waiting
        check_bound(waiting, experiment.target_distortion, how, f"{path}: samples from {done} on")
        write_shard(folder / shard_name(done, done + len(waiting)), how, said, done, waiting)
        done, waiting = done + len(waiting), []

    with Progress(f"import {path.name}", None, "samples") as progress:
        for block in blocks(answers, inputs, how, every):
            waiting.append(block)
            progress.advance(1)
            if len(waiting) == per_shard:
                flush()
        if waiting:
            flush()
    if not done:
        raise UserError(f"{path}: has no rows")
    finish(folder, identity, done, per_shard, said)
    return done
