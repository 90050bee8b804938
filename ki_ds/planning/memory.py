"""How much memory training takes on a rank: on the device, in host memory, on NVMe. Reckoned from shapes alone.

P parameters, n ranks. Mixed precision with Adam holds 2 + 2 + 12 bytes a parameter, and ZeRO divides the 12 (stage 1),
the gradients' 2 (stage 2) and the weights' 2 (stage 3) among the ranks (Rajbhandari et al. 2020, ZeRO: Memory
Optimizations Toward Training Trillion Parameter Models, section 3). What DeepSpeed 0.19 really allocates differs from
that in places, and was read from its sources and measured (docs/results/engine.md):

- stages 1 to 3 keep a master copy of 4 P/n bytes in fp32 too, where it is a second copy of the weights;
- at stage 0 all gradients are copied into one buffer to be summed over ranks, also where there is one rank;
- the bucket that gradients are reduced through is allocated whole, 5e8 elements unless `reduce_bucket_size` says less,
  however small the model; only a CPU leaves what is never touched unallocated. Reducing copies what is in it once more;
- the optimizer step of stages 1 and 2 makes the gradient of a rank's share twice over, 8 P/n bytes;
- stage 3 gathers weights up to `stage3_max_live_parameters` elements, 1e9 unless said, and lets go of them only beyond.
"""

from __future__ import annotations

import copy
from dataclasses import dataclass
from typing import Any, Literal, NamedTuple

import torch

from ki_ds.engine.config import EngineConfig, OptimizerOffload, ParameterOffload
from ki_ds.kernels.loss.chunked import CHUNK_BYTES, LEAST_ROWS, MOST_ROWS
from ki_ds.kernels.select.eager import LOGIT_BYTES
from ki_ds.models import architectures, flops, matrices
from ki_ds.planning.activations import Kept, Pass, kept

Where = Literal["device", "host", "nvme"]
Phase = Literal["always", "backward", "reduction", "step"]
STAGE_0_BUCKET = 5e8  # elements: DeepSpeed's MEMORY_OPT_ALLREDUCE_SIZE, which no key changes


class Item(NamedTuple):
    """Memory of one purpose."""

    name: str
    where: Where
    phase: Phase
    bytes: float


class Model(NamedTuple):
    """What of a model decides how much memory its weights take."""

    sizes: tuple[int, ...]  # elements of every parameter, tied ones once
    hidden: int
    vocabulary: int  # rows of the head
    muon: tuple[tuple[int, ...], ...] = ()  # elements of the matrices that Muon steps, and not Adam, by group

    @property
    def parameters(self) -> int:
        return sum(self.sizes)


def outlined(config: Any, objective: str, optimizer: str = "adamw") -> Model:
    """Of a Hugging Face configuration, and the optimizer that trains it."""
    model = flops.outline(config, objective)
    head = model.get_output_embeddings().weight
    layers = matrices.hidden(model, head) if optimizer == "muon" else []
    groups: dict[float, list[int]] = {}
    for layer in layers:
        groups.setdefault(matrices.muon_ratio(layer), []).append(layer.weight.numel())
    sizes = tuple(p.numel() for p in model.parameters())
    return Model(sizes, head.shape[1], head.shape[0], tuple(map(tuple, groups.values())))


class Micro(NamedTuple):
    """What a rank computes at once."""

    tokens: int  # sequences · sequence length
    rows: int  # tokens to be predicted
    k: int  # kept entries of a target; 0: no teacher
    kept: Kept  # activations


class Setting(NamedTuple):
    """What of an engine JSON decides how much memory is taken."""

    zero_stage: int
    weight: int  # bytes of a weight
    accumulated: int  # bytes of an accumulated gradient
    compute: int  # bytes of an activation in a matrix product
    bucket: float  # elements
    buckets: int
    live: float  # elements of gathered weights, ZeRO 3
    small: float  # elements of a weight that ZeRO 3 leaves whole
    sub_group: float  # elements that ZeRO 3 steps at once
    optimizer: OptimizerOffload
    parameters: ParameterOffload
    recomputed: bool  # activations, from the layers' inputs
    state: int  # bytes of a master weight, and of a moment
    secondary: int  # ranks that share a second copy of the weights, ZeRO 3; 1: there is none

    @classmethod
    def of(cls, config: EngineConfig) -> Setting:
        """Of an engine JSON."""
        weight = 4 if config.precision == "fp32" else 2
        return cls(
            config.zero_stage, weight,
            accumulated={"fp32": 4, "fp16": 2, "bf16": 2}.get(config.accumulation or "", weight),
            compute=2 if config.autocast else weight,
            bucket=config.reduce_bucket_size if config.zero_stage else STAGE_0_BUCKET,
            buckets=2 if config.overlap_comm and config.zero_stage in (1, 2) else 1,
            live=config.max_live_parameters,
            small=config.param_persistence_threshold,
            sub_group=config.sub_group_size,
            optimizer=config.offload_optimizer,
            parameters=config.offload_parameters,
            recomputed=config.activation_checkpointing,
            state=2 if config.half_states else 4,
            secondary=config.secondary_ranks,
        )  # fmt: skip


@dataclass(frozen=True)
class Estimate:
    """Memory of a rank, by purpose."""

    items: tuple[Item, ...]

    def of(self, where: Where) -> float:
        """The most that is taken at a time, bytes: what is always there, and the largest of the phases."""
        return self.phase("always", where) + max(
            self.phase(phase, where) for phase in ("backward", "reduction", "step")
        )

    def phase(self, phase: Phase, where: Where = "device") -> float:
        """Bytes of one phase alone."""
        return sum(item.bytes for item in self.items if item.where == where and item.phase == phase)

    @property
    def device(self) -> float:
        return self.of("device")

    @property
    def host(self) -> float:
        return self.of("host")

    @property
    def nvme(self) -> float:
        return self.of("nvme")


def estimate(model: Model, micro: Micro, ranks: int, config: EngineConfig, gpu: bool) -> Estimate:
    """Memory of a rank that trains under an engine JSON, above what the process takes without a model.

    Without a GPU the device is host memory: add `device` and `host`. Not in it: buffers of the communication library,
    fragmentation, what the loader reads ahead (the targets of two steps, in host memory), checkpoints while they are
    written. The gradients of a first micro-batch count beside all activations, as those of a second do.
    """
    how = Setting.of(config)
    items = [*states(model, ranks, how), *gradients(model, ranks, how, gpu)]
    items += [
        *activations(micro.kept, how),
        Item("loss", "device", "backward", loss_bytes(model, micro, how, gpu)),
        Item("targets", "device", "backward", target_bytes(model, micro)),
    ]
    return Estimate(tuple(item for item in items if item.bytes))


def states(model: Model, ranks: int, how: Setting) -> list[Item]:
    """Weights, master copy and the optimizer's moments."""
    whole, share = model.parameters, model.parameters / ranks
    if how.zero_stage == 0:
        return [Item("weights", "device", "always", 4 * whole), Item("moments", "device", "always", 8 * whole)]
    place: Where = {"none": "device", "cpu": "host", "nvme": "nvme"}[how.optimizer.device]  # type: ignore[assignment]
    masters = how.state * share  # a copy of the partition, also where that is of the same type
    adam = share - sum(map(sum, model.muon)) / ranks
    found = [Item("master weights", place, "always", masters), Item("moments", place, "always", 2 * how.state * adam)]
    found += muon(model, ranks, how) if model.muon else []
    if how.optimizer.device == "nvme":
        held = how.optimizer.buffer_count * 4 * min(share, how.sub_group)
        found.append(Item("swap buffers", "host", "always", held))
    if how.zero_stage < 3:
        return [Item("weights", "device", "always", how.weight * whole), *found]
    small = sum(size for size in model.sizes if size <= how.small)
    live = min(whole, max(how.live, max(model.sizes)))
    if how.secondary > 1:
        beside: Where = "host" if how.parameters.active else "device"
        found.append(Item("second copy of the weights", beside, "always", how.weight * whole / how.secondary))
    found.append(Item("small weights, whole", "device", "always", how.weight * small))
    if ranks > 1 or how.parameters.active:  # else what is gathered is the partition itself
        gathered: list[Phase] = ["backward", "reduction"]
        found += [Item("gathered weights", "device", phase, how.weight * live) for phase in gathered]
    inside = min(share, how.parameters.max_in_cpu) if how.parameters.device == "nvme" else share
    found.append(Item("weights", "host" if how.parameters.active else "device", "always", how.weight * inside))
    if how.parameters.device == "nvme":
        buffers = how.parameters.buffer_count * how.parameters.buffer_size
        found.append(Item("weights", "nvme", "always", how.weight * share))
        found.append(Item("swap buffers", "host", "always", how.weight * buffers))
    return found


def muon(model: Model, ranks: int, how: Setting) -> list[Item]:
    """Muon's momentum, in the type of the gradients, and what its step makes of whole matrices."""
    whole, largest = sum(map(sum, model.muon)), max(map(max, model.muon))
    share = whole / ranks
    product = Item("Muon, a matrix", "device", "step" if how.zero_stage == 3 else "reduction", 4 * 4 * largest)
    if how.zero_stage == 3:  # gathers gradients and momenta, of a bucket's matrices at a time
        found = [Item("momentum", "device", "always", how.weight * share), product]
        at_once = min(whole, max(how.bucket, largest))
        return found + [Item("Muon, gathered", "device", "step", 4 * how.weight * at_once)] * (ranks > 1)
    # a rank has the whole momentum of a matrix that the ranks' shares of a group cut, and a second one until a step is
    # known to be good
    own = sum(min(sum(group) / ranks + (max(group) if ranks > 1 else 0), sum(group)) for group in model.muon)
    return [
        Item("momentum", "device", "always", how.weight * own),
        Item("momentum, new", "device", "always", how.weight * own),
        Item("Muon, updates", "device", "reduction", how.weight * share),
        product,
    ]


def gradients(model: Model, ranks: int, how: Setting, gpu: bool) -> list[Item]:
    """Accumulated gradients, and what reducing and applying them takes."""
    whole, share, largest = model.parameters, model.parameters / ranks, max(model.sizes)
    if how.zero_stage == 0:
        copied = min(whole, how.bucket + largest)
        return [
            Item("gradients", "device", "always", 4 * whole),
            Item("gradients, flat", "device", "reduction", 4 * copied),
        ]
    touched = min(how.bucket, whole)
    apart = how.accumulated != how.weight  # then stage 1 accumulates beside what a backward pass makes
    of_bucket = how.accumulated if apart and how.zero_stage == 1 else how.weight
    bucket = how.buckets * of_bucket * (how.bucket if gpu else touched)
    head = how.weight * model.vocabulary * model.hidden  # of the head, waits for that of the embedding it is tied to
    again = how.weight * max(touched, head / how.weight)
    offloaded = how.optimizer.active
    always: list[Phase] = ["always"]
    during: list[Phase] = ["backward", "reduction"]
    # from stage 2 on gradients are reduced while earlier layers still hold their activations
    copying = during if how.zero_stage > 1 else during[1:]
    found = [Item("reduction, copied", "device", phase, again) for phase in copying]
    found += [Item("bucket", "device", phase, bucket) for phase in (always if how.zero_stage == 3 else during)]
    if how.zero_stage == 3:
        found.append(Item("gradients", "host" if offloaded else "device", "always", how.accumulated * share))
        stepped = min(share, how.sub_group) * (4 if how.accumulated == 4 else how.state + how.accumulated)
        found.append(
            Item("gradients, fp32", "host", "always", 4 * share)
            if offloaded
            else Item("gradients, fp32", "device", "step", stepped)
        )
        return found
    if how.zero_stage == 1:
        each = how.accumulated + (how.weight if apart else 0)
        found += [Item("gradients", "device", phase, each * whole) for phase in during]
    if offloaded:
        accumulated = how.weight + how.accumulated  # the bit16 copy of the weights, and what was accumulated
        found.append(Item("gradients, fp32", "host", "always", 4 * share))
        found.append(Item("buffers of the offload", "host", "always", accumulated * share))
        found.append(Item("buffers of the offload", "device", "always", how.weight * largest))
        return found
    if how.zero_stage == 2:
        found += [Item("gradients", "device", phase, how.accumulated * share) for phase in during]
    found.append(Item("gradients, incoming", "device", "reduction", how.accumulated * share))
    found.append(Item("gradients, fp32", "device", "step", 2 * how.state * share))  # in bf16 where the masters are
    return found


def activations(kept: Kept, how: Setting) -> list[Item]:
    """What a forward pass leaves for the backward pass."""
    if not how.recomputed:
        return [Item("activations", "device", "backward", kept.everything)]
    inputs = Item("inputs of layers", "device", "backward", kept.inputs)
    return [inputs, Item("activations of a layer", "device", "backward", kept.layer)]


def loss_bytes(model: Model, micro: Micro, how: Setting, gpu: bool) -> float:
    """Of `ki_ds.kernels.loss.chunked`: hidden states at the targets and their gradient, the head's gradient in fp32,
    and a chunk of logits or, when that is gone, the gradients in the weights' own type."""
    rows, hidden, vocabulary = micro.rows, model.hidden, model.vocabulary
    if gpu:
        chunk, wide = min(rows, max(2 * hidden, LEAST_ROWS), MOST_ROWS), 0
    else:
        chunk, wide = min(rows, max(CHUNK_BYTES // (4 * vocabulary), 16)), 4 if how.compute < 4 else 0
    head = vocabulary * hidden
    logits = chunk * vocabulary * (how.compute + wide) + (how.compute * head if wide else 0)
    scaled = how.weight * head + how.compute * micro.tokens * hidden
    cast = how.compute * head if how.compute != how.weight else 0
    return rows * hidden * (4 + how.compute) + 4 * head + cast + max(logits, scaled)


def target_bytes(model: Model, micro: Micro) -> float:
    """Inputs of a micro-batch: ids, rows, labels, α; and the teacher's kept entries, as they are packed."""
    entry = 3 if model.vocabulary <= 1 << 16 else 4
    return 8 * micro.tokens + micro.rows * (20 + (8 + micro.k * entry if micro.k else 0))


def inference(config: Any, objective: str, sequences: int, length: int, gpu: bool) -> tuple[float, bool]:
    """Bytes that a teacher takes on a rank: its weights in fp32, the tensors of a layer, a chunk of logits; and whether
    those of a layer are known."""
    model, quiet = outlined(config, objective), copy.deepcopy(config)
    architectures.set_dropout(quiet, 0.0)
    working = kept(quiet, objective, Pass(sequences, length, torch.float32, None, gpu))
    logits = LOGIT_BYTES["triton" if gpu else "chunked"]
    return 4 * model.parameters + working.layer + logits, working.traced
