"""The experiment as a graph: read and checked; who starts and inherits from whom, and what is wanted of a teacher."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, replace
from pathlib import Path

from ki_ds.corpus.stream import Mix
from ki_ds.errors import UserError, listed, nearest, some
from ki_ds.experiment.schedules import teacher_steps
from ki_ds.experiment.schema import Experiment, Inherit, Model, Train
from ki_ds.experiment.strict import assignment, merge_patch, parse, read_json
from ki_ds.targets.quanta import lowest_temperature, quantum
from ki_ds.targets.selection import Selection
from ki_ds.targets.spec import TargetSpec


def load_experiment(path: Path, scale: str | None = None, settings: tuple[str, ...] = ()) -> Experiment:
    """Read an experiment file, apply a scale and `key=value` settings, check types and references.

    Raises:
        UserError: with the JSON path of every problem found.
    """
    data = read_json(path)
    if not isinstance(data, dict):
        raise UserError(f"{path}: expected a JSON object, found {type(data).__name__}")
    if scale is not None:
        scales = data.get("scales", {})
        known = list(scales) if isinstance(scales, dict) else []
        if scale not in known:
            found = some(known) or "none"
            raise UserError(f'{path}: scales: there is no scale "{scale}"; the file has {found}{nearest(scale, known)}')
        if not isinstance(scales[scale], dict):
            raise UserError(f"{path}: scales.{scale}: expected an object, a merge patch over this file")
        data = merge_patch(data, scales[scale])
    for setting in settings:
        data = merge_patch(data, assignment(setting))
    experiment = parse(Experiment, data, str(path))
    lines = check(experiment)
    if lines:
        raise UserError("\n".join(f"{path}: {line}" for line in lines))
    return experiment


def check(experiment: Experiment) -> list[str]:
    """The broken references and impossible numbers, a line each, opening with its JSON path."""
    return listed(_problems(experiment))


def _problems(experiment: Experiment) -> Iterator[str]:
    yield from _tokenizer(experiment)
    for name, model in experiment.models.items():
        yield from _model(experiment, name, model)
    if experiment.tokenizer.train:
        yield from beyond_vocabulary(experiment, experiment.tokenizer.train.vocabulary_size)
    yield from _cycles(experiment)
    yield from _comparisons(experiment)


def _unknown(place: str, what: str, name: str, known: Iterable[str]) -> str:
    return f'{place}: there is no {what} "{name}"; the file has {some(known)}{nearest(name, known)}'


def _tokenizer(experiment: Experiment) -> Iterator[str]:
    train, known = experiment.tokenizer.train, experiment.corpora
    named = train.on if train else []
    return (_unknown("tokenizer.train.on", "corpus", name, known) for name in named if name not in known)


def _model(experiment: Experiment, name: str, model: Model) -> Iterator[str]:
    place, corpora, models = f"models.{name}", experiment.corpora, experiment.models
    if model.start_from is not None and model.start_from not in models:
        yield _unknown(f"{place}.start_from", "model", model.start_from, models)
    elif model.start_from is not None and models[model.start_from].targets is not None:
        yield f'{place}.start_from: of "{model.start_from}" there are only predictions ("targets"), no weights'
    for corpus in model.targets or ():
        if corpus not in corpora:
            yield _unknown(f"{place}.targets.{corpus}", "corpus", corpus, corpora)
    if model.pretrained is not None and experiment.tokenizer.train:
        yield (
            f"{place}.pretrained: this experiment trains a tokenizer of its own (tokenizer.train), so the ids of "
            f'"{model.pretrained}" would mean other tokens; expected "tokenizer": {{"pretrained": …}} of that model'
        )
    if model.train is None:
        return
    for corpus in model.train.on:
        if corpus not in corpora:
            yield _unknown(f"{place}.train.on.{corpus}", "corpus", corpus, corpora)
    try:
        Mix(list(model.train.on.values()))
    except ValueError as error:
        yield f"{place}.train.on: {error}"
    inherit = model.inherit
    if inherit is None:
        return
    for corpus, teacher in inherit.teachers.items():
        if corpus not in model.train.on:
            yield _unknown(f"{place}.inherit.from.{corpus}", "corpus in train.on", corpus, model.train.on)
        if teacher not in models:
            yield _unknown(f"{place}.inherit.from.{corpus}", "model", teacher, models)
            continue
        stored = models[teacher].targets
        if stored is not None and corpus not in stored:
            yield _unknown(f"{place}.inherit.from.{corpus}", "corpus in its targets", corpus, stored)
    yield from _temperature(experiment, place, inherit)
    if inherit.teacher_steps is not None and inherit.teacher_steps > model.train.steps:
        wanted = f"expected at most train.steps, {model.train.steps}"
        if inherit.schedule == "linear":
            slope = model.train.steps / inherit.teacher_steps
            wanted += f'; an alpha that ends above 0 is given by its slope, here "alpha_T": {slope:.6g}'
        yield f"{place}.inherit.teacher_steps: found {inherit.teacher_steps}; {wanted}"


def _temperature(experiment: Experiment, place: str, inherit: Inherit) -> list[str]:
    """A temperature so low that no quantum of targets computed here meets the bound on their distortion."""
    teachers = [experiment.models.get(name) for name in inherit.teachers.values()]
    if inherit.targets.select == "sampled" or all(teacher is None or teacher.targets for teacher in teachers):
        return []
    bound = experiment.target_distortion.mean
    try:
        quantum(bound, inherit.temperature)
    except ValueError:
        return [
            f"{place}.inherit.temperature: found {inherit.temperature:g}; expected at least "
            f"{lowest_temperature(bound):.3g}: below it no quantum keeps target_distortion.mean, {bound:g}"
        ]
    return []


def beyond_vocabulary(experiment: Experiment, vocabulary: int) -> list[str]:
    """Every k that keeps more ids of a row than there are, a line each, opening with its JSON path."""
    wanted = {name: model.inherit.targets for name, model in experiment.models.items() if model.inherit}
    return [
        f"models.{name}.inherit.targets.k: found {targets.k}; expected at most the vocabulary size, {vocabulary}"
        for name, targets in wanted.items()
        if targets.select != "sampled" and targets.k > vocabulary
    ]


def needs(experiment: Experiment, name: str) -> list[str]:
    """The models that must be finished before this one can be trained: its origin and its teachers."""
    model = experiment.models[name]
    origin = [model.start_from] if model.start_from is not None else []
    teachers = list(model.inherit.teachers.values()) if model.inherit else []
    return [other for other in dict.fromkeys(origin + teachers) if other in experiment.models]


class Cycle(ValueError):
    """What needs itself, by way of others; `path` names them, the first again at the end."""

    def __init__(self, path: list[str]):
        super().__init__(path)
        self.path = path


def in_order(names: Iterable[str], needs: Callable[[str], Iterable[str]]) -> list[str]:
    """All names and what they need, each after what it needs, otherwise as given. However long a chain is.

    Raises:
        Cycle: a name needs itself, by way of others.
    """
    ordered: dict[str, None] = {}
    for name in names:
        path = {} if name in ordered else {name: iter(needs(name))}  # from the name to what it needs: what is left
        while path:
            last, others = next(reversed(path.items()))
            other = next((one for one in others if one not in ordered), None)
            if other is None:
                ordered[last] = None
                del path[last]
            elif other in path:
                before = list(path)
                raise Cycle([*before[before.index(other) :], other])
            else:
                path[other] = iter(needs(other))
    return list(ordered)


def _cycles(experiment: Experiment) -> Iterator[str]:
    try:
        order(experiment)
    except Cycle as cycle:
        shown = cycle.path if len(cycle.path) <= 10 else [*cycle.path[:5], "…", *cycle.path[-4:]]
        yield f"models.{shown[0]}: a cycle: {' needs '.join(shown)}; a teacher must not descend from its student"


def _comparisons(experiment: Experiment) -> Iterator[str]:
    trained = [name for name, model in experiment.models.items() if model.train]
    for index, comparison in enumerate(experiment.compare):
        for role, name in (("student", comparison.student), ("baseline", comparison.baseline)):
            if name not in trained:
                yield _unknown(f"compare.{index}.{role}", "trained model", name, trained)


def order(experiment: Experiment) -> list[str]:
    """All models, each after those it needs, otherwise in the file's order."""
    return in_order(experiment.models, lambda name: needs(experiment, name))


# ---------------------------------------------------------------------------------------------------- for stages


@dataclass(frozen=True)
class TrainedModel:
    """A model that is trained here."""

    name: str
    model: Model
    train: Train
    seed: int  # of its initial weights and dropout

    @property
    def place(self) -> str:
        """Its JSON path, for errors."""
        return f"models.{self.name}"

    @property
    def teachers(self) -> dict[str, str]:
        """From whom it inherits, by corpus."""
        return self.model.inherit.teachers if self.model.inherit else {}

    @property
    def teacher_steps(self) -> int:
        """How many of its first steps a teacher guides."""
        return teacher_steps(self.model.inherit, self.train.steps)

    @property
    def mix(self) -> Mix:
        """Of the corpora that it is trained on."""
        return Mix(list(self.train.on.values()))

    def samples_taught(self, corpus: str) -> int:
        """How far into a corpus's stream it reads while a teacher guides it."""
        read = self.mix.counts(self.teacher_steps * self.train.batch_size)
        return read[list(self.train.on).index(corpus)]


def trained_model(experiment: Experiment, name: str) -> TrainedModel:
    """One of the models that are trained here."""
    model = experiment.models[name]
    if model.train is None:
        raise KeyError(name)
    return TrainedModel(name, model, model.train, experiment.model_seed(name))


def trained_models(experiment: Experiment) -> dict[str, TrainedModel]:
    """The models that are trained here, each after those it needs."""
    return {name: trained_model(experiment, name) for name in order(experiment) if experiment.models[name].train}


def targets_name(teacher: str, corpus: str, inherit: Inherit) -> str:
    """Name of the targets of a teacher over a corpus, as a student wants them: teacher@corpus for the top k of any k,
    teacher@corpus@… for other selections."""
    return f"{teacher}@{corpus}{inherit.targets.selection(inherit.temperature).suffix}"


def taught_by(experiment: Experiment, model: Model) -> dict[str, str | None]:
    """Names of the targets that a student reads on each corpus; None: they come from elsewhere."""
    inherit = model.inherit
    if inherit is None:
        return {}
    return {
        corpus: None if experiment.models[teacher].targets else targets_name(teacher, corpus, inherit)
        for corpus, teacher in inherit.teachers.items()
    }


@dataclass(frozen=True)
class WantedTargets:
    """What the students of one targets folder read of it."""

    teacher: str
    corpus: str
    spec: TargetSpec  # with the largest k; samples past the last view come again, and are not left out here
    tails: tuple[float, ...]  # of the temperatures, those whose tail a loss reads


def wanted_targets(experiment: Experiment, name: str) -> WantedTargets:
    """What the targets of this name must hold."""
    teacher, corpus = name.split("@")[:2]
    samples, chosen = 0, Selection("top_k", 1)
    temperatures, tails = set(), set()
    for model in trained_models(experiment).values():
        inherit = model.model.inherit
        if inherit is None or taught_by(experiment, model.model).get(corpus) != name:
            continue
        samples = max(samples, model.samples_taught(corpus))
        selection = inherit.targets.selection(inherit.temperature)
        chosen = replace(selection, k=max(selection.k, chosen.k))
        temperatures.add(inherit.temperature)
        tails |= {inherit.temperature} if inherit.targets.tail else set()
    spec = TargetSpec(chosen, tuple(temperatures), experiment.target_distortion.mean, samples)
    return WantedTargets(teacher, corpus, spec, tuple(sorted(tails)))
