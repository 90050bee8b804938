"""A targets folder made of predictions that were computed elsewhere."""

from __future__ import annotations

import shutil
from pathlib import Path

from ki_ds.errors import UserError
from ki_ds.exchange.answers import Answers, blocks
from ki_ds.exchange.teacher_inputs import TeacherInputs, folder_header
from ki_ds.experiment.schema import MOST_IDS, Experiment
from ki_ds.files import file_digest
from ki_ds.progress import Progress, say
from ki_ds.sealed import Identity, prepare, read_unsealed, reopen, state
from ki_ds.targets.codec import Codec
from ki_ds.targets.distortion import Distortion, check_bound
from ki_ds.targets.header import Origin
from ki_ds.targets.manifest import TargetFacts, open_folder, read_facts, seal_targets
from ki_ds.targets.quanta import quantum
from ki_ds.targets.scalars import Scalar
from ki_ds.targets.selection import Selection
from ki_ds.targets.shard import FrameBlock, shard_name, write_shard


def make(
    folder: Path, path: Path, inputs: TeacherInputs, every: int, experiment: Experiment, corpus: str, name: str
) -> int:
    """Import a Parquet file of answers into a sealed folder; the number of samples.

    Raises:
        UserError: the answers do not fit the corpus, or the folder holds something else.
    """
    answers = Answers(path, every, experiment.sequence_length)
    longest = answers.longest
    size = inputs.tokenizer.size
    if not 0 < longest <= min(MOST_IDS, size):
        raise UserError(f"{path}: rows of up to {longest} ids; expected 1 to {min(MOST_IDS, size)}")
    selection = Selection("top_k", longest)
    scalars: tuple[Scalar, ...] = ("first", *(("truth",) if answers.truth else ()), 1.0)
    how = Codec(size, longest, quantum(experiment.target_distortion.mean), scalars)
    digests = {"answers": file_digest(path), f"corpora/{corpus}": inputs.tokens.digest}
    teacher = Origin(name, digests["answers"])
    header = folder_header(experiment, corpus, inputs.tokens, inputs.tokenizer.digest, teacher, selection, how)
    per_shard = experiment.samples_per_shard
    # the key is as it was, so that what was imported once is known again
    identity = Identity("teach", {**header.record, "positions_per_shard": per_shard}, digests)
    if state(folder) == "unsealed" and "answers" in read_unsealed(folder)["inputs"]:
        shutil.rmtree(folder)  # of an import that failed: answers may have been corrected since
    if state(folder, identity) == "sealed" and open_folder(folder).missing():
        reopen(folder, identity)  # a shard was set aside
    if state(folder, identity) == "other":
        raise UserError(f"{folder}: holds something else, or answers that were imported otherwise; name another folder")
    found = prepare(folder, identity)
    if found is not None:
        return read_facts(folder)[0].samples
    if answers.beside:
        say(f"{path}: rows of {longest} ids, or of these and the true token, as vLLM gives them: that one is left out")
    if not answers.checksums:
        say(f"{path}: its pages have no checksums, so that damage to a number may go unseen (write it with "
            "write_page_checksum=True)")  # fmt: skip
    done, waiting = 0, list[FrameBlock]()

    def flush() -> None:
        nonlocal done, waiting
        lost = Distortion.of(block.distortion_n for block in waiting)
        check_bound(lost, experiment.target_distortion, how.quantum, f"{path}: samples from {done} on")
        write_shard(folder / shard_name(done, done + len(waiting)), header, done, waiting)
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
    said = {"answers": {"page_checksums": answers.checksums, "true_token_left_out": answers.beside}}
    seal_targets(folder, identity, TargetFacts(done, per_shard, header), said)
    return done
