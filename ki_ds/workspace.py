"""An experiment in its work directory: where every stage's folder is, what it is made from, and its opened inputs."""

from __future__ import annotations

import site
import sys
from dataclasses import replace
from functools import cache, cached_property, partial
from pathlib import Path
from typing import Any

import torch

from ki_ds.corpus import tokenizer as tokenizers
from ki_ds.corpus.masking import Viewer
from ki_ds.corpus.stream import CorpusStream, Mix
from ki_ds.corpus.tokenizer import TextTokenizer
from ki_ds.corpus.tokens import Tokens, open_tokens
from ki_ds.engine import config as engine_config
from ki_ds.engine import optimizers
from ki_ds.engine.batch_layout import BatchLayout
from ki_ds.errors import UserError
from ki_ds.exchange.teacher_inputs import header
from ki_ds.experiment.graph import Needed, Stage, needs, targets_needed, taught_by
from ki_ds.experiment.schedules import alpha, teacher_steps
from ki_ds.experiment.schema import Experiment, Train
from ki_ds.experiment.strict import read_json
from ki_ds.models import architectures, hugging_face
from ki_ds.sealed import Identity, open_sealed
from ki_ds.stages import identities
from ki_ds.targets.codec import Codec, quantum
from ki_ds.targets.folder import ShardFolder, open_folder
from ki_ds.targets.selection import tail_name
from ki_ds.targets.source import Place, place
from ki_ds.teaching import teacher as inference
from ki_ds.training.batches import TargetCollator
from ki_ds.training.loader import CorpusReader, Loader

# where ds_configs stands: in a checkout, in an installed package
SHIPPED = (Path(__file__).parent.parent, *(Path(p) / "share" / "ki_ds" for p in (sys.prefix, site.getuserbase())))


class Workspace:
    """An experiment file's content, the folders where its relative paths are looked up, and the work directory."""

    def __init__(self, experiment: Experiment, source: Path, root: Path):
        self.experiment, self.root = experiment, root
        folder = source.resolve().parent
        self.bases = [*dict.fromkeys([folder, *folder.parents, Path.cwd(), *SHIPPED])]

    def folder(self, stage: Stage) -> Path:
        """Where the stage's result stands."""
        return self.root / stage.folder

    def find(self, path: str, place: str) -> Path:
        """An existing file: absolute, or relative to the experiment file's folder, one above it, or the current one.

        Raises:
            UserError: there is none.
        """
        for base in self.bases:
            if (base / path).exists():
                return base / path
        looked = f"{self.bases[0]}, the folders above it and {Path.cwd()}"
        raise UserError(f"{place}: there is no {path} (looked in {looked})")

    def model_or_name(self, pretrained: str) -> str:
        """A folder that exists, looked up as `find` does, or else a name on the Hugging Face hub."""
        found = next((base / pretrained for base in self.bases if (base / pretrained).is_dir()), None)
        return str(found) if found else pretrained

    # ------------------------------------------------------------------------------------------------ inputs

    @cached_property
    def engine_config(self) -> dict[str, Any]:
        """The DeepSpeed JSON, checked."""
        config, source = self._deepspeed_json(self.experiment.engine, "engine")
        engine_config.check(config, source)
        for name, model in self.experiment.models.items():
            if model.train:
                optimizers.check_fit(model.train, config, f"models.{name}", source)
        return config

    @cached_property
    def inference_config(self) -> dict[str, Any] | None:
        """The DeepSpeed JSON by which teachers are partitioned, checked; None: they are not."""
        given = self.experiment.inference
        if given.engine is None:
            return None
        config, source = self._deepspeed_json(given.engine, "inference.engine")
        inference.check_config(config, source, given.precision)
        return config

    def _deepspeed_json(self, given: str | dict[str, Any], place: str) -> tuple[dict[str, Any], str]:
        source = place if isinstance(given, dict) else str(self.find(given, place))
        config = given if isinstance(given, dict) else read_json(Path(source))
        if not isinstance(config, dict):
            raise UserError(f"{source}: expected a JSON object, a DeepSpeed configuration")
        return config, source

    @property
    def engine_source(self) -> str:
        """Where the DeepSpeed JSON comes from, for errors."""
        given = self.experiment.engine
        return "engine" if isinstance(given, dict) else str(self.find(given, "engine"))

    @cached_property
    def tokenizer(self) -> TextTokenizer:
        """The experiment's tokenizer, once its stage is sealed."""
        folder = self.folder(Stage("tokenizer", "tokenizer"))
        open_sealed(folder)
        return tokenizers.load(folder, self.experiment.objective, "tokenizer")

    @cache  # noqa: B019 - a workspace lives as long as its process
    def tokens(self, corpus: str) -> Tokens:
        """A sealed corpus."""
        return open_tokens(self.folder(Stage("corpus", corpus)))

    def stream(self, corpus: str) -> CorpusStream:
        """The stream over a corpus's training part."""
        tokens = self.tokens(corpus)
        return CorpusStream(len(tokens.train), self.experiment.views, self.experiment.seed, tokens.digest)

    def viewer(self, corpus: str) -> Viewer:
        """Makes the views of a corpus's sequences."""
        e, t = self.experiment, self.tokenizer
        return Viewer(
            e.objective, e.seed, self.tokens(corpus).digest, t.size, t.special, t.mask, e.masking.probability
        )  # fmt: skip

    def needed(self, stage: Stage) -> Needed:
        """What a teach stage must make; past the last view pairs come again, so no more than all views are stored."""
        needed = targets_needed(self.experiment, stage.name)
        every = self.experiment.views * len(self.tokens(needed.corpus).train)
        return replace(needed, samples=min(needed.samples, every))

    def codec(self, identity: Identity) -> Codec:
        """How the rows of a targets folder of this identity are packed."""
        said, scalars = identity.config["selection"], tuple(identity.config["scalars"])
        size = self.tokenizer.size
        if said["kind"] == "sampled":
            return Codec(size, min(said["k"], size), 0.0, "count", scalars)
        lowest = min(float(name.removeprefix("tail@")) for name in scalars if name.startswith("tail@"))
        return Codec(size, said["k"], quantum(identity.config["target_distortion"], lowest), scalars=scalars)

    def targets_header(self, stage: Stage, identity: Identity) -> dict[str, Any]:
        """What every shard of a targets folder says of itself, beside its own samples and counts."""
        needed = targets_needed(self.experiment, stage.name)
        teacher = {"name": needed.teacher, "digest": identity.inputs[f"models/{needed.teacher}"]}
        return header(
            self.experiment, needed.corpus, self.tokens(needed.corpus), self.tokenizer.digest, teacher,
            identity.config["selection"], self.codec(identity),
        )  # fmt: skip

    def stored(self, teacher: str, corpus: str) -> Place:
        """Where predictions lie that were made elsewhere."""
        given = (self.experiment.models[teacher].targets or {})[corpus]
        found = next((base / given for base in self.bases if "://" not in given and (base / given).exists()), None)
        return found or place(given)

    def identity(self, stage: Stage) -> Identity:
        """What the stage's folder is made of.

        Raises:
            UserError: an input is not sealed yet.
        """
        return identities.identity(self, stage)

    def model_folder(self, name: str) -> str:
        """The Hugging Face folder (or hub name) of a finished model of the experiment."""
        model = self.experiment.models[name]
        if model.train is None:
            return self.model_or_name(str(model.pretrained))
        return str(self.folder(Stage("train", name)) / "model")

    @cache  # noqa: B019
    def model_digest(self, name: str) -> str:
        """What later stages know a finished model by: its weights."""
        model = self.experiment.models[name]
        if model.train is not None:
            return open_sealed(self.folder(Stage("train", name))).digest
        return identities.pretrained_digest(self.model_folder(name))

    def new_student(self, name: str) -> Any:
        """The Hugging Face model that training begins with."""
        model, objective, place = self.experiment.models[name], self.experiment.objective, f"models.{name}"
        assert model.train is not None
        if model.architecture is not None:
            config = architectures.configuration(
                model.architecture, objective, self.tokenizer, self.experiment.sequence_length, f"{place}.architecture"
            )
            architectures.set_dropout(config, model.train.dropout)
            return hugging_face.new_model(config, objective, self.experiment.model_seed(name))
        source = self.model_folder(model.start_from) if model.start_from else self.model_or_name(str(model.pretrained))
        found = hugging_face.load_model(source, objective, place, model.train.dropout)
        self.check_fit(name, found.config)
        return found

    def finished_model(self, name: str, dtype: torch.dtype = torch.float32) -> Any:
        """A finished model, to teach or to be evaluated."""
        found = hugging_face.load_model(
            self.model_folder(name), self.experiment.objective, f"models.{name}", dtype=dtype
        )
        self.check_fit(name, found.config)
        return found

    def check_fit(self, name: str, config: Any, size: int | None = None) -> None:
        """Check that a model fits the experiment's tokenizer and sequence length.

        Raises:
            UserError: its head has another number of rows, or it has too few positions.
        """
        model, place = self.experiment.models[name], f"models.{name}"
        size = self.tokenizer.size if size is None else size
        if config.vocab_size < size:
            raise UserError(f"{place}: its vocabulary has {config.vocab_size} ids, the tokenizer {size}")
        if config.vocab_size > size and not model.padded_vocabulary:
            raise UserError(
                f"{place}: its vocabulary has {config.vocab_size} ids, the tokenizer {size}. If the rest is padding "
                'that no text ever uses, say so with "padded_vocabulary": true; else take its own tokenizer'
            )
        positions = getattr(config, "max_position_embeddings", None)
        if positions is not None:
            usable = positions - (config.pad_token_id + 1 if config.model_type in architectures.OFFSET_POSITIONS else 0)
            if usable < self.experiment.sequence_length:
                raise UserError(
                    f"{place}: it knows {usable} positions, sequence_length is {self.experiment.sequence_length}"
                )

    def targets(self, name: str, corpus: str) -> ShardFolder | None:
        """The targets that a student reads on a corpus.

        Raises:
            UserError: they are not finished, or not what the student asks for.
        """
        model = self.experiment.models[name]
        if model.inherit is None or corpus not in model.inherit.teachers:
            return None
        stage, teacher = taught_by(self.experiment, model)[corpus], model.inherit.teachers[corpus]
        folder = self.stored(teacher, corpus) if stage is None else self.folder(Stage("teach", stage))
        if stage is not None:
            open_sealed(self.folder(Stage("teach", stage)))
        found, wanted = open_folder(folder), model.inherit.targets
        place, how = f"models.{name}.inherit.targets", found.codec
        selection = wanted.selection(model.inherit.temperature)
        said, counts = found.header.get("selection"), how.values == "count"
        if not isinstance(said, dict):
            raise UserError(f"{folder}: the header of its shards does not say what was selected")
        alike = {**said, "k": 0} == {**selection.record, "k": 0} and counts == (selection.kind == "sampled")
        if not alike or how.k < min(selection.k, self.tokenizer.size) or (counts and said.get("k") != selection.k):
            raise UserError(f"{folder}: holds {said}; expected {place} {selection.record}")
        if wanted.tail and tail_name(model.inherit.temperature) not in how.scalars:
            there = ", ".join(f"{temperature:g}" for temperature in how.temperatures)
            raise UserError(
                f"{folder}: the tail's weight is stored at the temperatures {there}; expected "
                f"{model.inherit.temperature:g} (models.{name}.inherit.temperature)"
            )
        if how.vocabulary != self.tokenizer.size:
            raise UserError(
                f"{folder}: of a vocabulary of {how.vocabulary} ids; the tokenizer has {self.tokenizer.size}"
            )
        if stage is None and found.samples < (read := self._samples_read(name, corpus)):
            raise UserError(
                f"{folder}: holds {found.samples} samples; expected the {read} that models.{name} reads of "
                f"corpora.{corpus} while it is taught"
            )
        return found

    def _samples_read(self, name: str, corpus: str) -> int:
        train, inherit = self.experiment.models[name].train, self.experiment.models[name].inherit
        assert train is not None
        every = Mix(list(train.on.values())).counts(teacher_steps(inherit, train.steps) * train.batch_size)
        return min(every[list(train.on).index(corpus)], self.experiment.views * len(self.tokens(corpus).train))

    def lanes(self, name: str) -> list[CorpusReader]:
        """The corpora that a model is trained on, with its teachers' targets."""
        model = self.experiment.models[name]
        assert model.train is not None
        lanes = [
            CorpusReader(
                corpus, self.tokens(corpus).train, self.stream(corpus), self.viewer(corpus), self.targets(name, corpus)
            )
            for corpus in model.train.on
        ]
        quanta = {str(lane.targets.folder): lane.targets.codec.quantum for lane in lanes if lane.targets}
        if len(set(quanta.values())) > 1:
            listed = ", ".join(f"{folder}: {value:g}" for folder, value in quanta.items())
            raise UserError(f"models.{name}: its targets were quantised differently ({listed}); make them alike")
        return lanes

    def loader(self, name: str, layout: BatchLayout) -> Loader:
        """The batches of a model's training."""
        model = self.experiment.models[name]
        assert model.train is not None
        inherit = model.inherit
        collate = None
        if inherit:
            k = inherit.targets.selection(inherit.temperature).k
            collate = TargetCollator(k, tail_name(inherit.temperature) if inherit.targets.tail else None)
        schedule = partial(alpha, inherit, steps=model.train.steps)
        return Loader(self.lanes(name), Mix(list(model.train.on.values())), layout, schedule, collate)

    def model_config(self, name: str, tokenizer: TextTokenizer) -> Any:
        """The Hugging Face configuration of a model, before it exists."""
        model = self.experiment.models[name]
        if model.architecture is not None:
            place = f"models.{name}.architecture"
            length = self.experiment.sequence_length
            return architectures.configuration(model.architecture, self.experiment.objective, tokenizer, length, place)
        if model.start_from is not None:
            return self.model_config(model.start_from, tokenizer)
        return hugging_face.pretrained_configuration(
            self.model_or_name(str(model.pretrained)), f"models.{name}.pretrained"
        )

    def layout(self, train: Train, name: str, rank: int, world_size: int) -> BatchLayout:
        """How a training run is cut among ranks."""
        size = engine_config.micro_batch_size(train, world_size, f"models.{name}")
        return BatchLayout(train.batch_size, size, rank, world_size)

    def inputs_of(self, stage: Stage) -> list[Stage]:
        """The stages whose folders a stage reads."""
        e = self.experiment
        tokenizer = Stage("tokenizer", "tokenizer")

        def finished(name: str) -> list[Stage]:
            return [Stage("train", name)] if e.models[name].train else []

        if stage.kind == "tokenizer":
            return []
        if stage.kind == "corpus":
            return [tokenizer]
        if stage.kind == "teach":
            teacher, corpus = stage.name.split("@")[:2]
            return [tokenizer, Stage("corpus", corpus), *finished(teacher)]
        if stage.kind == "train":
            model = e.models[stage.name]
            taught = [name for name in taught_by(e, model).values() if name]
            read = [Stage("corpus", corpus) for corpus in (model.train.on if model.train else {})]
            read += [Stage("teach", name) for name in taught]
            return [tokenizer, *read, *(one for other in needs(e, stage.name) for one in finished(other))]
        everything = [Stage("corpus", name) for name in e.corpora]
        return [tokenizer, *everything, *(finished(stage.name) if stage.kind == "evaluate" else [])]
