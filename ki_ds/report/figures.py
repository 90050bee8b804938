"""The figures of a report, as PNG."""

from __future__ import annotations

import io
from collections.abc import Sequence

import numpy as np
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.ticker import FuncFormatter, LogLocator, MaxNLocator, NullLocator

from ki_ds.report import savings
from ki_ds.report.savings import Record, Run
from ki_ds.report.words import number

COLOURS = ("#0b6e99", "#d1603d", "#7b5aa6", "#b8860b", "#c2478a", "#555555")
TEACHER = "#4f8a3c"


def _plain(text: str, length: int = 40) -> str:
    """Text as it stands: matplotlib would read dollars as mathematics."""
    return (text if len(text) <= length else text[: length - 1] + "…").replace("$", r"\$")


def _axes(title: str, label: str, steps: int) -> tuple[Figure, Axes]:
    figure = Figure(figsize=(7.2, 4.4), dpi=144, layout="constrained", facecolor="white")
    FigureCanvasAgg(figure)
    axes = figure.subplots()
    axes.set_title(_plain(title, 80), loc="left", fontsize=11, fontweight="bold")
    axes.set(xlabel="training steps", ylabel=label, xlim=(0, steps * 1.02))
    axes.xaxis.set_major_locator(MaxNLocator(8, integer=True))
    axes.xaxis.set_major_formatter(FuncFormatter(lambda step, _: f"{step:,.0f}"))
    axes.spines[["top", "right"]].set_visible(False)
    axes.grid(alpha=0.25)
    return figure, axes


def _mark_break_away(axes: Axes, step: int | None) -> None:
    if step is not None:
        axes.axvline(step, color="#777777", linestyle=":", label=f"break-away: step {step:,}")


def _png(figure: Figure, axes: Axes) -> bytes:
    """The finished figure, its legend below the axes, where no curve runs through it."""
    if axes.get_legend_handles_labels()[0]:
        figure.legend(loc="outside lower center", ncols=2, frameon=False, fontsize=9)
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png", metadata={"Software": None})
    return buffer.getvalue()


def perplexity(runs: Sequence[Run], corpus: str, teachers: Sequence[Record] = ()) -> bytes:
    """The curves of some runs on a corpus, their break-aways, and what their teachers are at."""
    figure, axes = _axes(f"Validation perplexity on {corpus}", "perplexity", max(run.facts.steps for run in runs))
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
    for step in sorted({run.facts.break_away for run in runs if run.facts.break_away is not None}):
        _mark_break_away(axes, step)
    for teacher in {one["model"]: one for one in teachers if savings.usable(one["perplexity"] or 0)}.values():
        label = f"teacher {_plain(teacher['model'])}: {number(teacher['perplexity'])}"
        axes.axhline(teacher["perplexity"], color=TEACHER, linewidth=1.2, linestyle="--", label=label)
        drawn.append(teacher["perplexity"])
    spread = max(drawn) / min(drawn) if drawn else 1.0
    axes.yaxis.set_major_locator(MaxNLocator(6) if spread < 6 else LogLocator(subs=(1, 2, 5)))
    axes.yaxis.set_minor_locator(NullLocator())
    axes.yaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:,.6g}"))
    return _png(figure, axes)


def alpha(run: Run) -> bytes:
    """α of each step."""
    figure, axes = _axes(f"Weight of the teacher in {run.name}", "alpha", run.facts.steps)
    _mark_break_away(axes, run.facts.break_away)
    alphas = np.array([row.alpha for row in run.history], dtype=float)  # None becomes NaN
    axes.plot([row.step for row in run.history], alphas, color=COLOURS[0])
    axes.set_ylim(-0.03, 1.05)
    return _png(figure, axes)


def losses(run: Run) -> bytes:
    """CE and KL in training: every step, thin, and a moving average."""
    figure, axes = _axes(f"Training losses of {run.name}", "nats a row", run.facts.steps)
    _mark_break_away(axes, run.facts.break_away)
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
