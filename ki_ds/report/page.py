"""The report: curves, tables and savings of an experiment's models, as one HTML file, PNG figures and JSON."""

from __future__ import annotations

import base64
import contextlib
import json
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import jinja2
import numpy as np

from ki_ds.errors import UserError, reason
from ki_ds.experiment.schema import Experiment, Inherit
from ki_ds.experiment.strict import parse
from ki_ds.files import write_atomically
from ki_ds.metrics import read_metrics
from ki_ds.progress import duration
from ki_ds.report import figures, savings
from ki_ds.report.savings import Record, Run, Step
from ki_ds.report.words import comparisons, number, warnings
from ki_ds.sealed import read_manifest

SIZES = ("parameters", "steps", "batch_size", "sequence_length")


# ------------------------------------------------------------------------------------------------------------ reading


class _Result(savings.Recorded):
    perplexity: float | None
    rows: int | None = None
    sequences: int | None = None


class _Results(savings.Recorded):
    corpora: dict[str, _Result]


def _files(workdir: Path, name: str) -> tuple[Path, Path]:
    return workdir / "models" / name / "metrics.jsonl", workdir / "models" / name / "manifest.json"


def _read_run(workdir: Path, name: str) -> Run:
    metrics, manifest = _files(workdir, name)
    facts = parse(savings.Facts, read_manifest(manifest.parent)["facts"], f"{manifest}: facts")

    def remedy(_done: int) -> str:
        return f"Put a whole copy of the file back, or remove {metrics.parent} and run `ki-ds run`: it trains it again."

    history, initial, seconds = [], {}, None
    for line in read_metrics(metrics, facts.steps, remedy):
        if line["step"] == 0:
            initial = line.get("validation", {})
            continue
        seconds = line.get("seconds")
        ce, kl, alpha = (line.get(key) for key in ("ce", "kl", "alpha"))
        history.append(Step(line["step"], ce, kl, alpha, line.get("validation", {})))
    return Run(name, facts, tuple(history), initial, seconds)


def _results(workdir: Path, name: str) -> dict[str, _Result]:
    """What a model's evaluation found on each corpus, infinities included; empty where there is none.

    Raises:
        UserError: the file cannot be read.
    """
    path = workdir / "results" / name / "perplexity.json"
    if not path.exists():
        return {}
    try:
        data = json.loads(path.read_bytes().decode())
    except (OSError, ValueError, RecursionError) as error:
        remedy = f"remove {path.parent} and run `ki-ds run` again: it is made anew"
        raise UserError(f"{path}: not JSON: {reason(error)}; {remedy}") from None
    return parse(_Results, data, str(path)).corpora


def _model(experiment: Experiment, workdir: Path, name: str, run: Run | None) -> Record:
    """A model's record; its perplexities are the evaluation's, or else those of the last validation in training."""
    perplexities = {corpus: savings.final(run.curve(corpus)) for corpus in run.corpora()} if run else {}
    results = _results(workdir, name)
    perplexities |= {corpus: savings.finite(result.perplexity) for corpus, result in results.items()}
    inherit = experiment.models[name].inherit
    return {
        **{size: getattr(run.facts, size) if run else None for size in SIZES},
        "teachers": {corpus: teacher.model for corpus, teacher in run.facts.teachers.items()} if run else {},
        "perplexities": perplexities,
        "initial_perplexities": {name: savings.finite(value) for name, value in run.initial.items()} if run else {},
        "diverged": run.facts.diverged if run else {},
        "training": _training(experiment, workdir, run) if run else None,
        "inherit": _inherit(inherit, run) if run and inherit else None,
    }


def _training(experiment: Experiment, workdir: Path, run: Run) -> Record:
    """How a model was trained; null where a manifest of an older version does not say."""
    train, facts = experiment.models[run.name].train, run.facts
    tokens = facts.steps * facts.batch_size * facts.sequence_length
    return {
        "optimizer": train.optimizer if train else None,
        "learning_rate": train.learning_rate if train else None,
        "muon_learning_rate": train.muon_learning_rate if train and train.optimizer == "muon" else None,
        "schedule": train.schedule if train else None,
        "seed": experiment.model_seed(run.name),
        "tokens": tokens,
        "precision": facts.precision,
        "ranks": facts.ranks,
        "device": facts.device,
        "seconds": run.seconds,
        "tokens_per_second": tokens / run.seconds if run.seconds else None,
        "versions": read_manifest(workdir / "models" / run.name).get("versions", {}),
    }


def _inherit(inherit: Inherit, run: Run) -> Record:
    """How a student inherited."""
    given = inherit.targets.model_dump()
    kept = {"sampled": ("draws",), "top_p": ("k", "p")}.get(inherit.targets.select, ("k",))
    return {
        "schedule": inherit.schedule,
        "teacher_steps": run.facts.teacher_steps,
        "temperature": inherit.temperature,
        "select": inherit.targets.select,
        **{key: given[key] if key in kept else None for key in ("k", "p", "draws")},
    }


def _compared(experiment: Experiment, workdir: Path, runs: dict[str, Run], models: Record) -> Iterator[Record]:
    """The record of each comparison and corpus that both of its models were validated on."""
    for index, pair in enumerate(dict.fromkeys(experiment.compare)):
        for role, name in (("student", pair.student), ("baseline", pair.baseline)):
            for path in _files(workdir, name):
                if not path.exists():
                    needed = f'compare.{index}.{role} is "{name}"'
                    raise UserError(f"{path}: no such file, but {needed}; train it with `ki-ds run`, then report again")
        student, baseline = runs[pair.student], runs[pair.baseline]
        common = [corpus for corpus in student.corpora() if corpus in baseline.corpora()]
        if not common:
            raise UserError(
                f'{_files(workdir, student.name)[0]}: no validation on a corpus of "{baseline.name}", so '
                f"compare.{index} has nothing to show; give both a common corpus and `ki-ds run`, or remove the entry"
            )
        for corpus in common:
            ends = [models[run.name]["perplexities"][corpus] for run in (student, baseline)]
            teacher = models[student.name]["teachers"].get(corpus)
            perplexity = models[teacher]["perplexities"].get(corpus) if teacher in models else None
            result = {"model": teacher, "perplexity": perplexity} if teacher is not None else None
            apart = _difference(workdir, student.name, baseline.name, corpus)
            yield savings.compare(student, baseline, corpus, (ends[0], ends[1]), result, apart)


def _difference(workdir: Path, student: str, baseline: str, corpus: str) -> Record | None:
    """`savings.difference` of two evaluations of the same validation part; None where one does not say."""
    found = [_results(workdir, name).get(corpus) for name in (student, baseline)]
    with contextlib.suppress(OSError, ValueError):  # results of an older version have no such file
        mine, theirs = (
            np.fromfile(workdir / "results" / name / f"nats-{corpus}.bin", "<f4").astype(np.float64)
            for name in (student, baseline)
        )
        if len(mine) == len(theirs) and found[0] and found[1] and found[0].rows and found[0].rows == found[1].rows:
            return savings.difference(mine, theirs, found[0].rows)
    return None


# ----------------------------------------------------------------------------------------------------------- sections


def _sections(experiment: Experiment, summary: Record, runs: dict[str, Run]) -> Iterator[Record]:
    """The report's sections: a heading, plain words, and figures by file name; one for each baseline."""
    if runs and not experiment.compare:
        corpora = dict.fromkeys(corpus for run in runs.values() for corpus in run.corpora())
        evaluated = {corpus: [run for run in runs.values() if corpus in run.corpora()] for corpus in corpora}
        drawn = [(f"perplexity-{corpus}", figures.perplexity(those, corpus)) for corpus, those in evaluated.items()]
        yield {"title": "Curves", "lines": [], "figures": drawn}
    for baseline in dict.fromkeys(pair.baseline for pair in experiment.compare):
        found = [record for record in summary["comparisons"] if record["baseline"] == baseline]
        drawn = []
        for corpus in dict.fromkeys(record["corpus"] for record in found):
            here = [record for record in found if record["corpus"] == corpus]
            shown = [*(runs[record["student"]] for record in here), runs[baseline]]
            teachers = [record["final"]["teacher"] for record in here if record["final"]["teacher"]]
            drawn.append((f"perplexity-{baseline}-{corpus}", figures.perplexity(shown, corpus, teachers)))
        students = list(dict.fromkeys(record["student"] for record in found))
        for student in students:
            drawn += [(f"alpha-{student}", figures.alpha(runs[student]))]
            drawn += [(f"losses-{student}", figures.losses(runs[student]))]
        lines = comparisons(found, summary["models"])
        yield {"title": f"{', '.join(students)} against {baseline}", "lines": lines, "figures": drawn}


# --------------------------------------------------------------------------------------------------------------- HTML

TEMPLATE = """<!doctype html>
<html lang="en">
<meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<title>{{ experiment.name }}</title>
<style>
:root { color-scheme: light dark; --line: color-mix(in srgb, currentColor 18%, transparent) }
body { font: 16px/1.55 system-ui, sans-serif; max-width: 74rem; margin: 3rem auto; padding: 0 1.5rem }
h1, h2 { line-height: 1.2; margin: 0 0 .5rem }
h2 { margin-top: 3rem; padding-top: 1.5rem; border-top: 1px solid var(--line) }
p { max-width: 52rem; margin: 0 0 .8rem }
.figures { display: grid; gap: 1rem; grid-template-columns: repeat(auto-fit, minmax(min(30rem, 100%), 1fr)) }
img { width: 100%; background: white; border-radius: 8px; box-shadow: 0 0 0 1px var(--line) }
.scroll { overflow-x: auto }
table { border-collapse: collapse; font-variant-numeric: tabular-nums }
th, td { padding: .4rem 1.2rem .4rem 0; border-bottom: 1px solid var(--line); text-align: right; white-space: nowrap }
th:first-child, td:first-child { text-align: left }
</style>
<h1>{{ experiment.name }}</h1>
<p>{{ experiment.objective }}, sequences of {{ count(experiment.sequence_length) }} tokens</p>
{% for line in warnings %}<p><strong>{{ line }}</strong></p>
{% endfor %}
{% for section in sections %}
<h2>{{ section.title }}</h2>
{% for line in section.lines %}<p>{{ line }}</p>
{% endfor %}
<div class="figures">
{% for file, image in section.figures %}<img alt="{{ file }}" src="data:image/png;base64,{{ inline(image) }}">
{% endfor %}</div>
{% endfor %}
<h2>Models</h2>
<p>Perplexities are those of the final evaluation, or else of the last validation in training.</p>
<div class="scroll"><table>
<tr><th>model<th>parameters<th>steps{% for corpus in corpora %}<th>perplexity on {{ corpus }}{% endfor %}</tr>
{% for model, record in models.items() %}
<tr><td>{{ model }}<td>{{ count(record.parameters) }}<td>{{ count(record.steps) }}
{%- for corpus in corpora %}<td>{{ cell(model, record.perplexities, corpus) }}{% endfor %}</tr>
{% endfor %}
</table></div>
{% for corpus, size in validation.items() %}
<p>The validation part of {{ corpus }} has {{ count(size.sequences) }} sequences, {{ count(size.rows) }} rows.</p>
{% endfor %}
{% if provenance %}
<h2>How they were made</h2>
<div class="scroll"><table>
<tr><th>{% for model in provenance[0][1] %}<th>{{ model }}{% endfor %}</tr>
{% for label, values in provenance %}
<tr><td>{{ label }}{% for value in values.values() %}<td>{{ value }}{% endfor %}</tr>
{% endfor %}
</table></div>
{% endif %}
</html>
"""


def _provenance(models: Record) -> list[tuple[str, dict[str, str]]]:
    """What the page says of how each trained model was made: a row a property."""

    def rows(record: Record) -> dict[str, Any]:
        training, inherit = record["training"], record["inherit"] or {}
        kept = " ".join(f"{key} {inherit[key]}" for key in ("k", "p", "draws") if inherit.get(key) is not None)
        seconds, rate = training["seconds"], training["tokens_per_second"]
        rates = [f"{x:g}" for key in ("muon_learning_rate", "learning_rate") if (x := training[key]) is not None]
        return {
            "optimizer, learning rate": f"{training['optimizer']}, {' and '.join(rates)}",
            "its schedule": training["schedule"],
            "batch": f"{record['batch_size']:,} × {record['sequence_length']:,} tokens",
            "tokens": f"{training['tokens']:,}",
            "seed": training["seed"],
            "τ": inherit.get("temperature"),
            "K, selection": f"{inherit['select']}, {kept}" if inherit else None,
            "schedule, steps taught": f"{inherit['schedule']}, {inherit['teacher_steps']:,}" if inherit else None,
            "precision": training["precision"],
            "ranks, device": f"{training['ranks']} × {training['device']}" if training["ranks"] else None,
            "time in steps": None if seconds is None else duration(seconds),
            "tokens a second": None if rate is None else f"{rate:,.0f}",
            "versions": ", ".join(f"{name} {version}" for name, version in training["versions"].items()),
        }

    found = {name: rows(record) for name, record in models.items() if record["training"]}
    labels = next(iter(found.values()), {})
    return [
        (label, {name: "–" if of[label] is None else str(of[label]) for name, of in found.items()}) for label in labels
    ]


def _html(experiment: Experiment, summary: Record, sections: list[Record]) -> str:
    def cell(model: str, perplexities: Record, corpus: str) -> str:
        if corpus in perplexities:
            return number(perplexities[corpus])
        return "unknown" if corpus in (experiment.models[model].targets or ()) else "–"

    template = jinja2.Environment(autoescape=True).from_string(TEMPLATE)
    return template.render(
        experiment=experiment,
        sections=sections,
        models=summary["models"],
        warnings=warnings(summary),
        validation=summary["validation"],
        provenance=_provenance(summary["models"]),
        corpora=list(dict.fromkeys(name for model in summary["models"].values() for name in model["perplexities"])),
        cell=cell,
        count=lambda value: "–" if value is None else f"{value:,}",
        inline=lambda image: base64.b64encode(image).decode("ascii"),
    )


def report(experiment: Experiment, workdir: Path) -> Path:
    """Write report/: report.html (one self-contained file), its figures as PNG, and summary.json.

    Raises:
        UserError: there is nothing to show, a compared model was not trained, or a file is damaged.
    """
    trained = [name for name in experiment.models if all(path.exists() for path in _files(workdir, name))]
    runs = {name: _read_run(workdir, name) for name in trained}
    models = {name: _model(experiment, workdir, name, runs.get(name)) for name in experiment.models}
    compared = list(_compared(experiment, workdir, runs, models))
    known = [name for name, model in models.items() if name in runs or model["perplexities"]]
    shown = {name: models[name] for name in models if name in known or experiment.models[name].targets}
    if not known:
        raise UserError(
            f"{workdir}: no model of {experiment.name} was trained or evaluated here; use `ki-ds run` first"
        )
    validation = {
        corpus: {"sequences": result.sequences, "rows": result.rows}
        for name in known
        for corpus, result in _results(workdir, name).items()
    }
    summary: Record = {
        "experiment": experiment.name, "models": shown, "validation": validation, "comparisons": compared,
    }  # fmt: skip
    sections = list(_sections(experiment, summary, runs))
    folder = workdir / "report"
    folder.mkdir(parents=True, exist_ok=True)
    files: dict[str, bytes] = {}
    for title, image in (figure for section in sections for figure in section["figures"]):
        name = re.sub(r"[^A-Za-z0-9._-]", "_", title)[:200]
        while files.setdefault(name, image) != image:  # names with dashes can meet
            name += "-2"
    for name, image in files.items():
        write_atomically(folder / f"{name}.png", image)
    write_atomically(folder / "summary.json", json.dumps(summary, indent=2, allow_nan=False).encode())
    write_atomically(folder / "report.html", _html(experiment, summary, sections).encode())
    return folder / "report.html"
