"""The experiment file: JSON, read once and strictly into typed, frozen objects.

Every key is declared here; `ki-ds schema` prints the JSON Schema that follows from it. `experiment.graph` reads it and
checks the references between its parts.
"""

from __future__ import annotations

import re
from typing import Annotated, Any, Literal

from pydantic import (
    AfterValidator,
    Field,
    field_validator,
    model_validator,
)

from ki_ds.experiment.sources import Place, Source
from ki_ds.experiment.strict import Strict, as_path
from ki_ds.targets.selection import Selection

NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,99}")
MOST_TOKENS, MOST_IDS = 1 << 20, 1024  # of a sequence; that are kept of a row
MOST_STEPS, MOST_SEQUENCES = 10**9, 1 << 17  # of a run, of a step: together below 2^47 samples, where Mix is exact

Positive = Annotated[int, Field(gt=0, le=MOST_STEPS)]
Sequences = Annotated[int, Field(gt=0, le=MOST_SEQUENCES)]
Share = Annotated[float, Field(ge=0, le=1)]
Beta = Annotated[float, Field(ge=0, lt=1)]
Seed = Annotated[int, Field(ge=0, lt=1 << 32)]
Name = Annotated[str, Field(pattern=f"^{NAME.pattern}$")]


def _file_or_json(given: Any) -> Any:
    return as_path(given) if isinstance(given, str) else given


# ---------------------------------------------------------------------------------------------------- corpora


class Corpus(Strict):
    """A named collection of documents of one domain."""

    sources: Annotated[list[Source], Field(min_length=1)] = Field(description="where its documents are, in this order")
    validation: Annotated[float, Field(gt=0, lt=1)] = Field(
        0.005, description="share of the documents held out, chosen by a hash of their text"
    )
    invalid_utf8: Literal["replace", "refuse"] = Field(
        "replace", description="what happens to bytes that are no UTF-8; what is replaced is counted in the manifest"
    )


class TrainTokenizer(Strict):
    """A byte-level BPE tokenizer, trained on named corpora."""

    vocabulary_size: Annotated[int, Field(ge=261, le=1 << 24)] = Field(
        description="ids in all: 256 bytes and the special tokens come first"
    )
    on: Annotated[list[Name], Field(min_length=1)] = Field(description="the corpora that it is trained on")


class Tokenizer(Strict):
    """Exactly one of the two."""

    train: TrainTokenizer | None = Field(None, description="make one from the corpora")
    pretrained: Place | None = Field(None, description="a Hugging Face tokenizer folder or name")

    @model_validator(mode="after")
    def _one(self) -> Tokenizer:
        if (self.train is None) == (self.pretrained is None):
            raise ValueError('give exactly one of "train" and "pretrained"')
        return self


class Masking(Strict):
    """Masked-language-model views (Devlin et al. 2019): of the chosen tokens 80 % masked, 10 % random, 10 % kept."""

    probability: Annotated[float, Field(gt=0, lt=1)] = Field(0.15, description="with which a token is chosen")
    views: Annotated[int, Field(gt=0, le=1000)] = Field(10, description="different maskings of a sequence")


# ----------------------------------------------------------------------------------------------------- models


MUON = {"muon_learning_rate", "muon_momentum"}  # keys that no other optimizer has


class Train(Strict):
    """How a model is trained. Defaults are the paper's (appendix, pre-training settings)."""

    on: Annotated[dict[Name, Annotated[float, Field(gt=0, le=1e9)]], Field(min_length=1)] = Field(
        description="corpora and their weights in the mix"
    )
    steps: Positive = Field(description="T: updates in all")
    batch_size: Sequences = Field(description="sequences a step, over all ranks")
    learning_rate: Annotated[float, Field(gt=0, le=1000)] = Field(description="the highest, at the end of the warm-up")
    micro_batch_size: Sequences | None = Field(
        None, description="sequences a rank computes at once; default: the largest divisor up to 32"
    )
    optimizer: Literal["adamw", "lamb", "muon"] = Field(
        "adamw", description="the algorithm; the engine JSON chooses the implementation (docs/optimizers.md)"
    )
    muon_learning_rate: Annotated[float, Field(gt=0, le=1000)] = Field(
        0.02, description="muon: the highest of the hidden matrices; `learning_rate` is that of all else, by AdamW"
    )
    muon_momentum: Beta = Field(0.95, description="muon: decay of the hidden matrices' momentum")
    schedule: Literal["linear", "constant", "wsd"] = Field(
        "linear", description="of the learning rate: it falls linearly after the warm-up; stays; wsd: stays, then falls"
    )
    warmup: Share = Field(0.1, description="linear: share of the steps in which the learning rate rises linearly")
    warmup_steps: Annotated[int, Field(ge=0)] | None = Field(None, description="constant and wsd: steps of the rise")
    decay_steps: Positive | None = Field(None, description="wsd: steps, the last, in which it falls linearly")
    betas: tuple[Beta, Beta] = Field((0.9, 0.98), description="decay of the optimizer's first and second moments")
    epsilon: Annotated[float, Field(gt=0, le=1000)] = Field(1e-6, description="beside the root of the second moment")
    weight_decay: Annotated[float, Field(ge=0, le=1000)] = Field(0.01, description="decoupled; not of biases and norms")
    gradient_clipping: Annotated[float, Field(ge=0, le=1e9)] = Field(1.0, description="largest global norm; 0: none")
    dropout: Annotated[float, Field(ge=0, lt=1)] = Field(0.1, description="every dropout of the model")
    evaluate_every: Positive | None = Field(None, description="steps; default: a twentieth of the run")
    checkpoint_every: Positive | None = Field(None, description="steps; default: a tenth of the run")
    keep_checkpoints: Positive = Field(2, description="the last so many stay on disk")

    @field_validator("betas", mode="before")
    @classmethod
    def _tuple(cls, value: Any) -> Any:
        return tuple(value) if isinstance(value, list) else value

    @model_validator(mode="after")
    def _one_schedule(self) -> Train:
        own = {"linear": {"warmup"}, "constant": {"warmup_steps"}}.get(self.schedule, {"warmup_steps", "decay_steps"})
        keys = self.model_fields_set & {"warmup", "warmup_steps", "decay_steps"}
        given = sorted(key for key in keys if getattr(self, key) is not None)
        if {*given} | (own & {"warmup"}) != own:  # "warmup" alone has a default
            needed, found = " and ".join(sorted(own)), " and ".join(given) or "none"
            raise ValueError(f'"schedule": "{self.schedule}" takes {needed}; it has {found}')
        if (self.warmup_steps or 0) + (self.decay_steps or 0) > self.steps:
            raise ValueError('"warmup_steps" and "decay_steps" are together more than "steps"')
        return self

    @model_validator(mode="after")
    def _muon(self) -> Train:
        for key in sorted(MUON & self.model_fields_set if self.optimizer != "muon" else ()):
            raise ValueError(f'"{key}" belongs to "optimizer": "muon"; it is "{self.optimizer}"')
        return self

    @property
    def evaluation_steps(self) -> int:
        return self.evaluate_every or max(self.steps // 20, 1)

    @property
    def checkpoint_steps(self) -> int:
        return self.checkpoint_every or max(self.steps // 10, 1)


class TargetSettings(Strict):
    """What is kept of a teacher's prediction of each row."""

    select: Literal["top_k", "top_k_tail", "top_p", "sampled"] = Field(
        "top_k",
        description="top_k: renormalised over the k ids (the paper); top_k_tail: all other ids as one more outcome; "
        "top_p: the smallest set that reaches mass p, renormalised; sampled: counts of random draws",
    )
    k: Annotated[int, Field(gt=0, le=MOST_IDS)] = Field(100, description="ids a row; top_p: at most")
    p: Annotated[float, Field(gt=0, le=1)] | None = Field(None, description="top_p: the mass to be reached")
    draws: Annotated[int, Field(gt=0, le=255)] = Field(50, description="sampled: draws a row, with replacement")

    @model_validator(mode="after")
    def _belongs(self) -> TargetSettings:
        own = {"top_p": {"k", "p"}, "sampled": {"draws"}}.get(self.select, {"k"})
        for name in sorted(self.model_fields_set - own - {"select"}):
            raise ValueError(
                f'"{name}" does not belong to "select": "{self.select}", which takes {", ".join(sorted(own))}'
            )
        if self.select == "top_p" and self.p is None:
            raise ValueError('"top_p" needs "p", the mass to be reached')
        return self

    def selection(self, temperature: float) -> Selection:
        """What a targets folder for these settings holds."""
        if self.select == "sampled":
            return Selection("sampled", self.draws, temperature=temperature)
        return Selection("top_p", self.k, p=self.p) if self.p is not None else Selection("top_k", self.k)

    @property
    def tail(self) -> bool:
        """Whether the loss reads the tail's mass."""
        return self.select == "top_k_tail"


class Distortion(Strict):
    """What quantisation may cost: KL(teacher ‖ stored teacher) of a row's kept ids, in nats."""

    mean: Annotated[float, Field(ge=5e-8, le=0.04)] = Field(2e-4, description="over a shard; fixes the quantum")
    max: Annotated[float, Field(gt=0, le=1000)] = Field(2e-3, description="of any row; more is refused")


class Inherit(Strict):
    """From whom a model inherits on each corpus, and for how long (section 3)."""

    teachers: Annotated[dict[Name, Name], Field(min_length=1)] = Field(alias="from", description="corpus: teacher")
    schedule: Literal["linear", "heaviside", "constant"] = Field("linear", description="how alpha goes with the steps")
    alpha_T: Annotated[float, Field(gt=0, le=MOST_STEPS)] | None = Field(
        None,
        description="linear: alpha falls from 1 by alpha_T / steps a step; heaviside: it drops to 0 where linear ends",
    )
    teacher_steps: Positive | None = Field(
        None, description="steps with alpha > 0, at most all; the same as alpha_T = steps / this"
    )
    alpha: Annotated[float, Field(gt=0, le=1)] | None = Field(None, description="the value of the constant schedule")
    temperature: Annotated[float, Field(gt=0, le=1000)] = Field(2.0, description="tau of both softmaxes")
    targets: TargetSettings = Field(
        default_factory=lambda: TargetSettings.model_validate({}), description="what is kept of a teacher's prediction"
    )

    @model_validator(mode="after")
    def _one_length(self) -> Inherit:
        if self.schedule == "constant":
            if self.alpha_T is not None:
                raise ValueError(
                    'the constant schedule takes "alpha" and, to end early, "teacher_steps"; not "alpha_T"'
                )
        elif (self.alpha_T is None) == (self.teacher_steps is None):
            raise ValueError('give exactly one of "alpha_T" and "teacher_steps"')
        elif self.alpha is not None:
            raise ValueError('"alpha" belongs to the constant schedule')
        return self


class Model(Strict):
    """Exactly one origin (architecture, start_from, pretrained, targets); trained here, or used as it is."""

    architecture: str | dict[str, Any] | None = Field(
        None, description="a name that ki_ds/models/architectures.py has, or an inline Hugging Face configuration"
    )
    start_from: Name | None = Field(None, description="another model of this experiment")
    pretrained: Place | None = Field(None, description="a Hugging Face model folder or name")
    targets: dict[Name, Place] | None = Field(
        None,
        min_length=1,
        description="corpus: folder or fsspec URL of predictions made elsewhere; such a model can only teach",
    )
    padded_vocabulary: bool = Field(
        False, description="the pretrained head has rows beyond the tokenizer's vocabulary, to be left out"
    )
    trust_remote_code: bool = Field(
        False, description="run the Python code that comes with the pretrained model, as its author wrote it"
    )
    train: Train | None = Field(None, description="how it is trained here; without it it is used as it is")
    inherit: Inherit | None = Field(None, description="from whom it inherits while it is trained, and for how long")
    seed: Seed | None = Field(None, description="for initial weights and dropout; default: the experiment's")

    @model_validator(mode="after")
    def _consistent(self) -> Model:
        origins = (self.architecture, self.start_from, self.pretrained, self.targets)
        if sum(origin is not None for origin in origins) != 1:
            raise ValueError('give exactly one of "architecture", "start_from", "pretrained" and "targets"')
        if self.train is None and self.pretrained is None and self.targets is None:
            raise ValueError('only a model with "pretrained" or "targets" can go without "train"')
        if self.train is not None and self.targets is not None:
            raise ValueError('"targets" are predictions of a model made elsewhere; it cannot be trained here')
        if self.train is None and self.inherit is not None:
            raise ValueError('"inherit" needs "train"')
        if self.trust_remote_code and self.pretrained is None:
            raise ValueError('"trust_remote_code" belongs to "pretrained": only such a model comes with code')
        return self


class Inference(Strict):
    """How teachers are run; of this only the precision shapes what they say."""

    precision: Literal["fp32", "bf16", "fp16"] = Field("fp32", description="in which a teacher computes")
    tensor_parallel: Positive = Field(1, description="ranks that share one copy of a teacher, each with a part of it")
    engine: Annotated[str | dict[str, Any] | None, AfterValidator(_file_or_json)] = Field(
        None, description="DeepSpeed JSON, a file or the configuration itself, with ZeRO stage 3: a teacher is "
        "partitioned over all ranks",
    )  # fmt: skip
    micro_batch_size: Sequences | None = Field(
        None, description="sequences computed at once; default: 16, on a GPU as many as fit and pay"
    )

    @model_validator(mode="after")
    def _one_way(self) -> Inference:
        if self.engine is not None and self.tensor_parallel > 1:
            raise ValueError('give "engine" (ZeRO-3) or "tensor_parallel" above 1, not both')
        return self


class Comparison(Strict):
    """A student shown against a baseline."""

    student: Name = Field(description="the model that inherits")
    baseline: Name = Field(description="the model that it is measured against")


class Experiment(Strict):
    """A graph of corpora and models."""

    dialect: str | None = Field(None, alias="$schema", exclude=True, description="for editors; changes nothing")
    name: Name = Field(description="names the default work directory, work/<name>")
    seed: Seed = Field(1, description="of data order, masks, initial weights and dropout")
    objective: Literal["mlm", "clm"] = Field(description="mlm: masked language models; clm: causal ones")
    sequence_length: Annotated[int, Field(ge=8, le=MOST_TOKENS)] = Field(512, description="tokens of a sequence")
    tokenizer: Tokenizer = Field(description="trained here, or given")
    masking: Masking = Field(
        default_factory=lambda: Masking.model_validate({}), description='how sequences are masked; "mlm" only'
    )
    corpora: Annotated[dict[Name, Corpus], Field(min_length=1)] = Field(description="the corpora by name")
    models: Annotated[dict[Name, Model], Field(min_length=1)] = Field(description="the models by name")
    compare: list[Comparison] = Field([], description="what the report sets side by side")
    target_distortion: Distortion = Field(
        default_factory=lambda: Distortion.model_validate({}), description="what quantising the targets may cost"
    )
    engine: Annotated[str | dict[str, Any], AfterValidator(_file_or_json)] = Field(
        "ds_configs/engine/zero1_fp32.json", description="DeepSpeed JSON: a file, or the configuration itself"
    )
    inference: Inference = Field(
        default_factory=lambda: Inference.model_validate({}), description="how teachers are run"
    )
    samples_per_shard: Annotated[int, Field(gt=0, le=1 << 20)] = Field(1024, description="samples in a shard file")
    scales: dict[Name, dict[str, Any]] = Field({}, description="JSON merge patches (RFC 7396) over this file")

    @model_validator(mode="after")
    def _objective(self) -> Experiment:
        if self.objective == "clm" and "masking" in self.model_fields_set:
            raise ValueError('"masking" belongs to the objective "mlm"; a causal model sees its input unmasked')
        return self

    @property
    def views(self) -> int:
        """Different maskings of each sequence; a causal model has one view."""
        return self.masking.views if self.objective == "mlm" else 1

    def model_seed(self, name: str) -> int:
        """The seed of a model's initial weights and dropout."""
        seed = self.models[name].seed
        return self.seed if seed is None else seed
