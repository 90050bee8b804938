"""Stage: curves, tables and savings of an experiment's models, as one HTML file, PNG figures and JSON."""

from __future__ import annotations

import base64
import io
import json
import re
from collections.abc import Iterator, Sequence
from pathlib import Path

import jinja2
import numpy as np
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.ticker import FuncFormatter, LogLocator, MaxNLocator, NullLocator

from ki_ds.errors import UserError
from ki_ds.experiment.schema import Experiment
from ki_ds.experiment.strict import Kind, parse
from ki_ds.files import write_atomically
from ki_ds.report import savings
from ki_ds.report.savings import Record, Run, number, words

COLOURS = ("#0b6e99", "#d1603d", "#7b5aa6", "#b8860b", "#c2478a", "#555555")
TEACHER = "#4f8a3c"
SIZES = ("parameters", "steps", "batch_size", "sequence_length")


# ------------------------------------------------------------------------------------------------------------ reading


class _Manifest(savings.Recorded):
    facts: savings.Facts


class _Result(savings.Recorded):
    perplexity: float | None


class _Results(savings.Recorded):
    corpora: dict[str, _Result]


def _parsed(kind: type[Kind], text: str, source: str) -> Kind:
    """JSON as another stage wrote it, NaN and infinities included: a run that diverged is worth a report."""
    try:
        return parse(kind, json.loads(text), source)
    except json.JSONDecodeError as error:
        raise UserError(f"{source}: not JSON: {error.msg}; remove its folder and run `ki-ds run` again") from None


def _files(workdir: Path, name: str) -> tuple[Path, Path]:
    return workdir / "models" / name / "metrics.jsonl", workdir / "models" / name / "manifest.json"


def _read_run(workdir: Path, name: str) -> Run:
    metrics, manifest = _files(workdir, name)
    facts = _parsed(_Manifest, manifest.read_text(encoding="utf-8"), str(manifest)).facts
    lines = enumerate(metrics.read_text(encoding="utf-8").splitlines(), start=1)
    rows = [_parsed(savings.Step, line, f"{metrics}:{place}") for place, line in lines if line.strip()]
    by_step = {row.step: row for row in rows}  # a resumed run writes the steps since its checkpoint again
    return Run(name, facts, tuple(by_step[step] for step in sorted(by_step)))


def _model(workdir: Path, name: str, run: Run | None) -> Record:
    """A model's row; its perplexities are the evaluation's, or else those of the last validation in training."""
    perplexities = {corpus: savings.final(run.curve(corpus)) for corpus in run.corpora()} if run else {}
    path = workdir / "results" / name / "perplexity.json"
    if path.exists():
        results = _parsed(_Results, path.read_text(encoding="utf-8"), str(path)).corpora
        perplexities |= {corpus: savings.finite(result.perplexity) for corpus, result in results.items()}
    return {
        **{size: getattr(run.facts, size) if run else None for size in SIZES},
        "teachers": {corpus: teacher.model for corpus, teacher in run.facts.teachers.items()} if run else {},
        "perplexities": perplexities,
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
            teacher = models[student.name]["teachers"].get(corpus)
            perplexity = models[teacher]["perplexities"].get(corpus) if teacher in models else None
            result = {"model": teacher, "perplexity": perplexity} if teacher is not None else None
            yield savings.compare(student, baseline, corpus, result)


# ------------------------------------------------------------------------------------------------------------ figures


def _plain(text: str, length: int = 40) -> str:
    """Text as it stands: matplotlib would read dollars as mathematics."""
    return (text if len(text) <= length else text[: length - 1] + "…").replace("$", r"\$")


def _axes(title: str, label: str, steps: int, break_away: int | None) -> tuple[Figure, Axes]:
    figure = Figure(figsize=(7.2, 4.4), dpi=144, layout="constrained", facecolor="white")
    FigureCanvasAgg(figure)
    axes = figure.subplots()
    axes.set_title(_plain(title, 80), loc="left", fontsize=11, fontweight="bold")
    axes.set(xlabel="training steps", ylabel=label, xlim=(0, steps * 1.02))
    axes.xaxis.set_major_locator(MaxNLocator(8, integer=True))
    axes.xaxis.set_major_formatter(FuncFormatter(lambda step, _: f"{step:,.0f}"))
    axes.spines[["top", "right"]].set_visible(False)
    axes.grid(alpha=0.25)
    if break_away is not None:
        axes.axvline(break_away, color="#777777", linestyle=":", label=f"break-away: step {break_away:,}")
    return figure, axes


def _png(figure: Figure, axes: Axes) -> bytes:
    """The finished figure, its legend below the axes, where no curve runs through it."""
    if axes.get_legend_handles_labels()[0]:
        figure.legend(loc="outside lower center", ncols=2, frameon=False, fontsize=9)
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png", metadata={"Software": None})
    return buffer.getvalue()


def _perplexity(runs: Sequence[Run], corpus: str, teacher: Record | None, break_away: int | None) -> bytes:
    steps = max(run.facts.steps for run in runs)
    figure, axes = _axes(f"Validation perplexity on {corpus}", "perplexity", steps, break_away)
    axes.set_yscale("log")
    drawn: list[float] = []
    for index, run in enumerate(runs):
        curve = run.curve(corpus)
        points = [(step, value) for step, value in curve if savings.usable(value)]
        at, values = [step for step, _ in points], [value for _, value in points]
        style = ("-", "--", ":")[index // len(COLOURS) % 3]
        label = f"{_plain(run.name)}: {number(savings.final(curve))}"
        marker = "o" if len(points) <= 40 else None
        axes.plot(at, values, style, color=COLOURS[index % len(COLOURS)], marker=marker, markersize=3, label=label)
        drawn += values
    if teacher and savings.usable(teacher["perplexity"] or 0):
        label = f"teacher {_plain(teacher['model'])}: {number(teacher['perplexity'])}"
        axes.axhline(teacher["perplexity"], color=TEACHER, linewidth=1.2, linestyle="--", label=label)
        drawn.append(teacher["perplexity"])
    spread = max(drawn) / min(drawn) if drawn else 1.0
    axes.yaxis.set_major_locator(MaxNLocator(6) if spread < 6 else LogLocator(subs=(1, 2, 5)))
    axes.yaxis.set_minor_locator(NullLocator())
    axes.yaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:,.6g}"))
    return _png(figure, axes)


def _alpha(run: Run) -> bytes:
    figure, axes = _axes(f"Weight of the teacher in {run.name}", "alpha", run.facts.steps, run.facts.break_away)
    alphas = np.array([row.alpha for row in run.history], dtype=float)  # None becomes NaN
    axes.plot([row.step for row in run.history], alphas, color=COLOURS[0])
    axes.set_ylim(-0.03, 1.05)
    return _png(figure, axes)


def _losses(run: Run) -> bytes:
    """CE and KL in training: every step, thin, and a moving average."""
    figure, axes = _axes(f"Training losses of {run.name}", "nats per target", run.facts.steps, run.facts.break_away)
    steps = np.array([row.step for row in run.history])
    for colour, label, key in ((COLOURS[0], "CE with the text", "ce"), (TEACHER, "KL from the teacher", "kl")):
        values = np.array([getattr(row, key) for row in run.history], dtype=float)
        known = np.isfinite(values)
        if not known.any():
            continue
        window = np.ones(min(max(1, len(values) // 20), 500))
        sums, counts = (np.convolve(part, window, "same") for part in (np.where(known, values, 0.0), known))
        average = np.where(known, sums / np.maximum(counts, 1), np.nan)
        axes.plot(steps, np.where(known, values, np.nan), color=colour, linewidth=0.6, alpha=0.4)
        axes.plot(steps, average, color=colour, linewidth=1.6, label=label)
    return _png(figure, axes)


def _sections(experiment: Experiment, summary: Record, runs: dict[str, Run]) -> Iterator[Record]:
    """The report's sections: a heading, plain words, and figures by file name."""
    if runs and not experiment.compare:
        corpora = dict.fromkeys(corpus for run in runs.values() for corpus in run.corpora())
        evaluated = {corpus: [run for run in runs.values() if corpus in run.corpora()] for corpus in corpora}
        figures = [
            (f"perplexity-{corpus}", _perplexity(those, corpus, None, None)) for corpus, those in evaluated.items()
        ]
        yield {"title": "Curves", "lines": [], "figures": figures}
    for pair in dict.fromkeys(experiment.compare):
        student, baseline = runs[pair.student], runs[pair.baseline]
        names = (student.name, baseline.name)
        found = [record for record in summary["comparisons"] if (record["student"], record["baseline"]) == names]
        figures = []
        for corpus, teacher in ((record["corpus"], record["final"]["teacher"]) for record in found):
            figure = _perplexity([student, baseline], corpus, teacher, student.facts.break_away)
            figures.append((f"perplexity-{student.name}-{corpus}", figure))
        figures += [(f"alpha-{student.name}", _alpha(student)), (f"losses-{student.name}", _losses(student))]
        lines = words({**summary, "comparisons": found})
        yield {"title": f"{student.name} against {baseline.name}", "lines": lines, "figures": figures}


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
{%- for corpus in corpora %}<td>{{ number(record.perplexities[corpus]) if corpus in record.perplexities else "–" }}
{%- endfor %}</tr>
{% endfor %}
</table></div>
</html>
"""


def _html(experiment: Experiment, summary: Record, sections: list[Record]) -> str:
    template = jinja2.Environment(autoescape=True).from_string(TEMPLATE)
    return template.render(
        experiment=experiment,
        sections=sections,
        models=summary["models"],
        corpora=list(dict.fromkeys(name for model in summary["models"].values() for name in model["perplexities"])),
        number=number,
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
    models = {name: _model(workdir, name, runs.get(name)) for name in experiment.models}
    comparisons = list(_compared(experiment, workdir, runs, models))
    shown = {name: model for name, model in models.items() if name in runs or model["perplexities"]}
    if not shown:
        raise UserError(
            f"{workdir}: no model of {experiment.name} was trained or evaluated here; use `ki-ds run` first"
        )
    summary: Record = {"experiment": experiment.name, "models": shown, "comparisons": comparisons}
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
