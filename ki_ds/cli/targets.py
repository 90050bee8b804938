"""The `ki-ds targets` commands: to look at, check, mend, time and exchange stored predictions."""

from __future__ import annotations

import json
from dataclasses import asdict
from pathlib import Path
from typing import Annotated, Any

import numpy as np
import typer

from ki_ds.cli.options import File, Scale, Set, open_workspace
from ki_ds.errors import UserError
from ki_ds.experiment.schema import NAME
from ki_ds.launch import distributed
from ki_ds.progress import Progress, say

app = typer.Typer(no_args_is_help=True, rich_markup_mode=None, help="Look at, check, mend and exchange targets.")

Folder = Annotated[str, typer.Argument(metavar="DIR", help="a targets folder, or its fsspec URL")]
Workdir = Annotated[Path | None, typer.Option(help="where corpora/ and tokenizer/ are; default: DIR/../..")]
Made = Annotated[
    Path | None, typer.Option("--workdir", help="where the corpus is; default: work/<the experiment's name>")
]
Corpus = Annotated[str, typer.Option(help="the corpus that the predictions are about")]


def _open(folder: str) -> Any:
    from ki_ds.targets.manifest import open_folder
    from ki_ds.targets.source import place

    return open_folder(place(folder))


def _inputs(shards: Any, workdir: Path | None) -> Any:
    from ki_ds.exchange.teacher_inputs import teacher_inputs, work_directory

    distributed.quiet()
    return teacher_inputs(shards.header, work_directory(shards.folder, workdir))


def _output(path: Path, folder: bool = False) -> Path:
    """Where results go, checked before the work."""
    if "://" in str(path) or ":/" in str(path):
        raise UserError(f"{path}: expected a local path; copy it to a server afterwards")
    if not path.parent.is_dir():
        raise UserError(f"{path}: there is no folder {path.parent}")
    if path.exists() and path.is_dir() != folder:
        raise UserError(f"{path}: is a {'file' if folder else 'folder'}; name a {'folder' if folder else 'file'}")
    return path


def _faults(shards: Any, deep: bool, inputs: Any) -> list[Any]:
    from ki_ds.exchange.verify import verify

    with Progress(f"verify {str(shards.folder).rpartition('/')[2]}", shards.samples, "samples") as progress:
        return verify(shards, deep, inputs, progress.advance)


@app.command()
def verify(
    folder: Folder,
    against_corpus: Annotated[bool, typer.Option(help="check that the teacher saw what the corpus gives")] = False,
    deep: Annotated[bool, typer.Option(help="decode every row and check its probabilities")] = False,
    workdir: Workdir = None,
) -> None:
    """Check every byte of every shard; exit code 1 where something is damaged."""
    shards = _open(folder)
    faults = _faults(shards, deep, _inputs(shards, workdir) if against_corpus else None)
    for fault in faults:
        say(fault.message)
    bad = len({fault.shard for fault in faults})
    if faults:
        say(
            f"{folder}: {len(faults)} faults in {bad} of {len(shards)} shards; mend: `ki-ds targets repair`, then teach"
        )
        raise typer.Exit(1)
    say(f"{folder}: {len(shards)} shards, {shards.samples} samples: no fault")


@app.command("repair")
def repair_(
    folder: Folder,
    against_corpus: Annotated[bool, typer.Option(help="also set aside what was made from another input")] = False,
    deep: Annotated[bool, typer.Option(help="also set aside what does not decode to probabilities")] = False,
    workdir: Workdir = None,
) -> None:
    """Set damaged shards aside, so that `ki-ds teach` computes just those again."""
    from ki_ds.exchange.repair import repair

    shards = _open(folder)
    if not isinstance(shards.folder, Path):
        raise UserError(f"{folder}: only a local folder can be repaired; copy it here")
    faults = _faults(shards, deep, _inputs(shards, workdir) if against_corpus else None)
    moved = repair(shards.folder, shards, faults)
    for path in moved:
        say(f"set aside: {path}")
    gone = len(shards.missing())
    say(f"{folder}: {gone} of {len(shards)} shards to be computed again" + (": run `ki-ds teach`" if gone else ""))


@app.command()
def inspect(
    folder: Folder,
    sample: Annotated[int, typer.Option(min=0, help="of the rows to show")] = 0,
    rows: Annotated[int, typer.Option(min=0, help="how many rows to show")] = 4,
    as_json: Annotated[bool, typer.Option("--json", help="as JSON")] = False,
    workdir: Workdir = None,
) -> None:
    """Header, statistics and a few decoded rows; with token text where the corpus is at hand."""
    from ki_ds.exchange import inspection

    shards = _open(folder)
    if sample >= shards.samples:
        raise UserError(f"--sample {sample}: {folder} holds samples 0 to {shards.samples}")
    try:
        inputs = _inputs(shards, workdir)
    except UserError as error:
        inputs = None
        if workdir is not None:
            raise
        note = str(error)
    figures = inspection.statistics(shards)
    header = shards.shard(sample // shards.per_shard).header.record
    found = inspection.rows(shards, sample, rows, inputs)
    if as_json:
        say(json.dumps({"header": header, "statistics": figures, "rows": [asdict(row) for row in found]}, indent=1))
        return
    say(json.dumps(header, indent=1))
    for name, value in figures.items():
        if isinstance(value, dict):
            say(f"{name}:", ", ".join(f"{part} {size:.3f}" for part, size in value.items()))
        else:
            say(f"{name}: {value if isinstance(value, int) else f'{value:.4g}'}")
    if inputs is None:
        say(f"without token text: {note}")

    def text(token: int | None) -> str:
        if token is None:
            return "?"
        return repr(inputs.tokenizer.hugging_face.decode([token])) if inputs else str(token)

    for row in found:
        truth = "" if row.truth is None else f" ({np.exp(row.truth):.3f})"
        where = "" if row.index is None else f", index {row.index}"
        listed = "  ".join(f"{text(token)} {p:.3f}" for token, p in zip(row.ids, row.p, strict=True))
        say(f"sample {row.sample}{where}: true {text(row.token)}{truth}: {listed}")


@app.command()
def bench(
    folder: Folder, seconds: Annotated[float, typer.Option(min=0.1, max=3600, help="how long to read")] = 5.0
) -> None:  # fmt: skip
    """How fast this folder is read and decoded, on one thread."""
    from ki_ds.exchange import inspection

    shards = _open(folder)
    found = inspection.bench(shards, seconds)
    say(
        f"{folder}: {found['rows']:.0f} rows in {found['seconds']:.1f} s: {found['rows_per_second']:,.0f} rows/s, "
        f"{found['megabytes_per_second']:,.0f} MB/s of planes"
    )


@app.command()
def export(
    folder: Folder,
    output: Annotated[Path, typer.Argument(metavar="OUT", help="OUT.parquet, or a folder for safetensors files")],
    workdir: Workdir = None,
) -> None:
    """Write (ids, log-probabilities) for other trainers: to Parquet, or to arrays in safetensors files."""
    from ki_ds.exchange import export as tables

    shards, parquet = _open(folder), output.suffix == ".parquet"
    _output(output, folder=not parquet)
    if not parquet and output.exists() and any(output.iterdir()):
        raise UserError(f"{output}: is not empty; name another folder, or remove what is in it")
    try:
        inputs = _inputs(shards, workdir)
    except UserError as error:
        if workdir is not None:
            raise
        inputs = None
        say(f"without the columns index and token: {error}")
    parts = tables.tables(shards, inputs)
    write = tables.export_parquet if parquet else tables.export_arrays
    say(f"{output}: {write(parts, output)} rows")


@app.command()
def ask(
    file: File,
    output: Annotated[Path, typer.Argument(metavar="OUT.parquet", help="the teacher inputs")],
    corpus: Corpus,
    samples: Annotated[int, typer.Option(min=1, help="how far into the corpus's stream")],
    workdir: Made = None, scale: Scale = None, settings: Set = None,
) -> None:  # fmt: skip
    """Write the teacher inputs, what a teacher elsewhere is to be shown; `import` reads its answers."""
    from ki_ds.exchange.teacher_inputs import write_teacher_inputs

    if _output(output).suffix != ".parquet":
        raise UserError(f"{output}: expected a name that ends in .parquet")
    _, inputs, every = _corpus(file, scale, workdir, settings, corpus)
    if samples > every:
        raise UserError(f"--samples {samples}: {corpus} has {every} in all its views")
    say(f"{output}: {write_teacher_inputs(inputs, samples, output)} rows at {samples} samples")


@app.command("import")
def import_(
    file: File,
    answers: Annotated[Path, typer.Argument(metavar="ANSWERS.parquet", help="of `ask`'s questions")],
    output: Annotated[Path, typer.Argument(metavar="DIR", help="the targets folder to make")],
    corpus: Corpus,
    name: Annotated[str, typer.Option(help="of the teacher")] = "imported",
    workdir: Made = None, scale: Scale = None, settings: Set = None,
) -> None:  # fmt: skip
    """Make targets of predictions made elsewhere; a model with "targets" then teaches them."""
    from ki_ds.exchange.import_ import make

    _output(output, folder=True)
    if not NAME.fullmatch(name):
        raise UserError(f"--name {name}: expected the name of a model: letters, digits, '.', '_' and '-'")
    space, inputs, every = _corpus(file, scale, workdir, settings, corpus)
    made = make(output, answers, inputs, every, space.experiment, corpus, name)
    model = json.dumps({name: {"targets": {corpus: str(output)}}})
    say(f"{output}: {made} samples. In the experiment: models: {model}")


def _corpus(
    file: Path, scale: str | None, workdir: Path | None, settings: list[str] | None, corpus: str
) -> tuple[Any, Any, int]:
    """(workspace, what a teacher is shown, samples of all views)."""
    from ki_ds.exchange.teacher_inputs import TeacherInputs

    space = open_workspace(file, scale, workdir, settings)
    experiment = space.experiment
    if corpus not in experiment.corpora:
        raise UserError(f"--corpus {corpus}: {file} has {', '.join(experiment.corpora)}")
    inputs = TeacherInputs(space.tokens(corpus), space.stream(corpus), space.viewer(corpus), space.tokenizer)
    return space, inputs, experiment.views * len(inputs.tokens.train)
