"""The sources of a corpus, as the experiment file says them: one class a kind."""

from __future__ import annotations

from typing import Annotated, Any

from pydantic import AfterValidator, BeforeValidator, Discriminator, Field, Tag, WithJsonSchema

from ki_ds.experiment.strict import Strict, as_path

Place = Annotated[str, AfterValidator(as_path)]


class TextSource(Strict):
    """Text files; blank lines separate documents."""

    text: Place = Field(description="path, glob or fsspec URL; .gz, .xz, .zst and .bz2 are decompressed")


class JsonLinesSource(Strict):
    """JSON Lines files; a document a line."""

    jsonl: Place = Field(description="path, glob or fsspec URL; .gz, .xz, .zst and .bz2 are decompressed")
    field: str = Field("text", description="the key that holds the document's text")


class ParquetSource(Strict):
    """Parquet files; a document a row."""

    parquet: Place = Field(description="path, glob or fsspec URL")
    field: str = Field("text", description="the column that holds the document's text")


class DatasetSource(Strict):
    """A Hugging Face dataset by name or folder, streamed."""

    dataset: Place = Field(description="a name on the Hugging Face hub, or a folder")
    configuration: str | None = Field(None, description="which of the dataset's configurations, where it has several")
    split: str = Field("train", description="which of its parts")
    field: str = Field("text", description="the column that holds the document's text")


SOURCE_KINDS: dict[str, type[Strict]] = {
    "text": TextSource, "jsonl": JsonLinesSource, "parquet": ParquetSource, "dataset": DatasetSource,
}  # fmt: skip

# The kinds one by one: at "matches none of four" an editor would underline the whole source for a typo in it.
SOURCE_SCHEMA = {
    "type": "object",
    "oneOf": [{"required": [kind]} for kind in SOURCE_KINDS],
    "allOf": [
        {"if": {"required": [kind]}, "then": cls.model_json_schema()} for kind, cls in SOURCE_KINDS.items()
    ],
}  # fmt: skip


def _source_kind(value: Any) -> str | None:
    if isinstance(value, dict):
        kinds = [kind for kind in SOURCE_KINDS if kind in value]
        return kinds[0] if len(kinds) == 1 else None
    return next((kind for kind, cls in SOURCE_KINDS.items() if isinstance(value, cls)), None)


def _no_former_kind(value: Any) -> Any:
    if isinstance(value, dict) and "installed_documentation" in value:
        raise ValueError(
            '"installed_documentation" is no source any more: `ki-ds demo` writes that text itself. Expected '
            '{"jsonl": "documentation.jsonl"} and such a file, a line {"text": …} for each document'
        )
    return value


Source = Annotated[
    Annotated[TextSource, Tag("text")]
    | Annotated[JsonLinesSource, Tag("jsonl")]
    | Annotated[ParquetSource, Tag("parquet")]
    | Annotated[DatasetSource, Tag("dataset")],
    Discriminator(
        _source_kind,
        custom_error_type="source_kind",
        custom_error_message=f"a source has exactly one of the keys {', '.join(SOURCE_KINDS)}",
    ),
    BeforeValidator(_no_former_kind),
    WithJsonSchema(SOURCE_SCHEMA),
]
