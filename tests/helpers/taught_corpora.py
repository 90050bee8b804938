"""Two small corpora with targets on disk, and what the loader is to make of them, sample by sample."""

from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np

from ki_ds.corpus.hashing import counter_hash, derive_key
from ki_ds.corpus.masking import Viewer
from ki_ds.corpus.stream import CorpusStream, Mix
from ki_ds.engine.batch_layout import BatchLayout
from ki_ds.kernels.select.pack import pack_arrays
from ki_ds.targets.codec import Codec
from ki_ds.targets.folder import ShardFolder
from ki_ds.targets.header import FolderHeader
from ki_ds.targets.quanta import NAT
from ki_ds.targets.shard import pack_block, shard_name, write_shard
from ki_ds.training.batches import TargetCollator
from ki_ds.training.loader import CorpusReader, Loader

LENGTH, K, PER_SHARD, SPECIAL, MASK = 24, 6, 5, [0, 1, 2, 3, 4], 4
SIZES = (11, 7)  # sequences of the corpora
QUANTUM, TAIL = 1 / 16, 2.0
SCALARS = ("first", "truth", 1.0, TAIL)


@dataclass(frozen=True)
class World:
    """Two corpora with targets on disk, and what the tests need to know of them."""

    readers: list[CorpusReader]
    views: int
    vocabulary: int
    folder: Path
    kind: str = "top_k"


def stored_ids(corpus, sequence, view, index, vocabulary, k=K):
    """[k] distinct ids, most probable first, that name a row: no two share them, but by accident."""
    key = derive_key("ids", corpus, sequence, view, index)
    first = int(counter_hash(key, np.arange(1))[0] % np.uint64(vocabulary))
    return (first + np.arange(k) * 7) % vocabulary


def stored_row(kind, corpus, sequence, view, index, vocabulary, k=K):
    """(ids, values, tail's log weight at temperature 2) of a sample: quanta below the first, or counts of draws."""
    some = sequence + 3 * view + index
    ids, values = stored_ids(corpus, sequence, view, index, vocabulary, k), np.arange(k) * (1 + some % 9)
    if kind != "top_k":  # ragged
        ids, values = ids[: 1 + some % k], values[: 1 + some % k]
    if kind == "counts":
        values = 1 + values
    return ids, values, -(some % 700) / NAT


def codec(kind, vocabulary, k=K):
    if kind == "counts":
        return Codec(vocabulary, k, 0.0, ("first", "truth"))
    return Codec(vocabulary, k, QUANTUM, scalars=SCALARS)


def write_targets(folder, reader, vocabulary, samples, kind="top_k", k=K, move=()):
    """Shards of the first samples of a reader's stream, as a teacher would leave them; `move`: records that lose their
    last row to the next one."""
    folder.mkdir(parents=True)
    how = codec(kind, vocabulary, k)
    header = FolderHeader(LENGTH, how)
    for start in range(0, samples, PER_SHARD):
        end = min(start + PER_SHARD, samples)
        sequences, views = reader.stream.pairs(np.arange(start, end))
        view = reader.viewer(reader.tokens[sequences], sequences, views)
        tokens = [(int(sequences[row]), int(views[row]), int(i)) for row, i in np.argwhere(view.loss_mask_BS)]
        rows = [stored_row(kind, reader.name, *token, vocabulary, k) for token in tokens]
        ids = np.zeros((len(rows), k), np.int64)
        given = np.zeros((len(rows), k), np.int64) if kind == "counts" else np.full((len(rows), k), -np.inf)
        for row, (kept, values, _) in enumerate(rows):
            ids[row, : len(kept)] = kept
            given[row, : len(kept)] = values if kind == "counts" else -0.5 - QUANTUM * values
        tails = np.array([tail for *_, tail in rows])
        scalars = {"first": np.full(len(rows), -0.5), "truth": np.full(len(rows), -0.5), 1.0: tails - 1}
        planes, distortion_n = pack_arrays(how, ids, given, scalars | {TAIL: tails})
        ends = np.cumsum(view.loss_mask_BS.sum(axis=1))
        ends[[sample - start for sample in move if start <= sample < end - 1]] -= 1
        block = pack_block(how, planes, ends, reader.viewer.digests(view), distortion_n)
        write_shard(folder / shard_name(start, end), header, start, [block])
    return ShardFolder(folder, samples, PER_SHARD, header, keep=2)


def make_world(
    folder, objective="mlm", vocabulary=300, views=3, taught=(True, True), seed=1, kind="top_k", ks=(K, K), move=()
):
    readers = []
    for number, size in enumerate(SIZES):
        name = f"corpus{number}"
        tokens = np.random.default_rng(number).integers(5, vocabulary, (size, LENGTH))
        tokens = tokens.astype(np.uint16 if vocabulary <= 1 << 16 else np.uint32)
        viewer = Viewer(objective, seed, name, vocabulary, SPECIAL, MASK if objective == "mlm" else None, 0.25)
        reader = CorpusReader(name, tokens, CorpusStream(size, views, seed, f"digest{number}"), viewer, None)
        if taught[number]:
            targets = write_targets(folder / name, reader, vocabulary, size * views, kind, ks[number], move)
            reader = replace(reader, targets=targets)
        readers.append(reader)
    return World(readers, views, vocabulary, folder, kind)


def layout(batch=8, micro=2, rank=0, world_size=1):
    return BatchLayout(batch, micro, rank, world_size)


def loader(world, cut=None, weights=(2.0, 1.0), k=K, readers=None, tail=None, alpha=lambda step: 0.5):
    readers = world.readers if readers is None else readers
    mix, cut = Mix(list(weights[: len(readers)])), layout() if cut is None else cut
    return Loader(readers, mix, cut, alpha, TargetCollator(k, tail))


def rows_of(batches):
    """Every target row as one comparable tuple: (input sequence, index, label, α, count, ids, values)."""
    rows = []
    for batch in batches:
        sequences = [tuple(row) for row in batch.input_ids_BS.tolist()]
        targets = batch.targets
        for n, (row, label) in enumerate(zip(batch.rows_N.tolist(), batch.labels_N.tolist(), strict=True)):
            taught = ()
            if targets is not None:
                count = int(targets.count_N[n])
                ids, values = targets.ids()[n].tolist()[:count], targets.values_NK[n].tolist()[:count]
                taught = (float(batch.alpha_N[n]), count, tuple(ids), tuple(values))
            rows.append((sequences[row // LENGTH], row % LENGTH, label, *taught))
    return rows


def expected_rows(world, step, batch_size, alpha, k=K, weights=(2.0, 1.0), ks=(K, K)):
    """The same from the definitions, sample by sample: the k most probable ids, which rise."""
    choice, samples = Mix(list(weights))(np.arange(step * batch_size, (step + 1) * batch_size))
    rows = []
    for number, sample in zip(choice.tolist(), samples.tolist(), strict=True):
        reader = world.readers[number]
        (sequence,), (view,) = (x.tolist() for x in reader.stream.pairs(np.array([sample])))
        seen = reader.viewer(reader.tokens[[sequence]], np.array([sequence]), np.array([view]))
        for index in np.flatnonzero(seen.loss_mask_BS[0]).tolist():
            ids, values, _ = stored_row(world.kind, reader.name, sequence, view, index, world.vocabulary, ks[number])
            held = sorted(zip(ids[:k].tolist(), values[:k].tolist(), strict=True))
            taught = (np.float32(alpha).item(), len(held), tuple(x for x, _ in held), tuple(y for _, y in held))
            rows.append((tuple(seen.inputs_BS[0].tolist()), index, int(seen.labels_BS[0, index]), *taught))
    return rows
