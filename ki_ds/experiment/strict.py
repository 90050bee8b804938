"""JSON, read strictly: typed, frozen objects, and errors that say where, what was found and what is allowed."""

from __future__ import annotations

import json
import re
import types
from collections import Counter
from itertools import islice
from pathlib import Path
from typing import Annotated, Any, TypeVar, Union, get_args, get_origin

from pydantic import BaseModel, ConfigDict, GetJsonSchemaHandler, Tag, ValidationError
from pydantic_core import CoreSchema

from ki_ds.errors import MOST_LISTED, UserError, listed, nearest

DEEPEST = 64  # arrays and objects one in another
LARGEST = 2**63 - 1  # of whole numbers
LONGEST_PATH, LONGEST_NAME = 3000, 255  # bytes: Linux has 4,095, of which what lies beneath needs some


class Strict(BaseModel):
    """Frozen, no unknown keys, no silent conversion of types, no NaN and no infinities."""

    model_config = ConfigDict(
        extra="forbid",
        frozen=True,
        strict=True,
        allow_inf_nan=False,
        validate_by_name=True,
        serialize_by_alias=True,
    )

    @classmethod
    def __get_pydantic_json_schema__(cls, core: CoreSchema, handler: GetJsonSchemaHandler) -> dict[str, Any]:
        """What an editor is told. An optional key is described as it is where it is given: beside "or null" an editor
        would underline a whole block for a typo in it."""
        found = handler(core)
        described = handler.resolve_ref_schema(found)
        for key, one in described.get("properties", {}).items():
            given = [member for member in one.get("anyOf", ()) if member != {"type": "null"}]
            if len(given) == 1:
                rest = {name: value for name, value in one.items() if name not in ("anyOf", "default")}
                described["properties"][key] = given[0] | rest
        return found


Kind = TypeVar("Kind", bound=Strict)

WRONG_TYPE = {
    "model_type": "an object",
    "dict_type": "an object",
    "list_type": "an array",
    "tuple_type": "an array",
    "string_type": "a string",
    "int_type": "an integer",
    "float_type": "a number",
    "bool_type": "true or false",
}


def merge_patch(target: Any, patch: Any) -> Any:
    """RFC 7396: objects merge key by key, null removes, anything else replaces."""
    if not isinstance(patch, dict):
        return patch
    merged = dict(target) if isinstance(target, dict) else {}
    for key, value in patch.items():
        if value is None:
            merged.pop(key, None)
        else:
            merged[key] = merge_patch(merged.get(key), value)
    return merged


def assignment(text: str) -> dict[str, Any]:
    """`a.b.c=value` as a merge patch; the value is JSON, or else a plain string.

    Raises:
        UserError: there is no key or no equals sign; the value is a number too large, or nested too deep.
    """
    path, equals, value = text.partition("=")
    if not equals or not all(path.split(".")):
        raise UserError(f"--set {cut(text)}: expected key=value, for instance --set models.student.train.steps=100")
    try:
        patch = loads(value)
    except (json.JSONDecodeError, NotJson):
        patch = value
    except ValueError as error:
        raise UserError(f"--set {cut(text)}: {error}") from None
    for key in reversed(path.split(".")):
        patch = {key: patch}
    if too_deep(patch):
        raise UserError(f"--set {cut(text)}: {TOO_DEEP}")
    return patch


class NotJson(ValueError):
    """What Python's reader takes, but JSON has not."""


TOO_DEEP = f"arrays and objects are nested more than {DEEPEST} deep"


def loads(text: str) -> Any:
    """A JSON value whose numbers are finite and whose depth is bounded.

    Raises:
        ValueError: saying what is wrong with it.
    """
    try:
        found = json.loads(
            text, object_pairs_hook=_no_duplicates, parse_constant=_no_constants, parse_float=_finite, parse_int=_whole
        )
    except RecursionError:
        raise ValueError(TOO_DEEP) from None
    if too_deep(found):
        raise ValueError(TOO_DEEP)
    return found


def too_deep(value: Any) -> bool:
    """Whether arrays and objects stand more than `DEEPEST` one in another."""
    level = [value]
    for _ in range(DEEPEST + 1):
        holders = [one for one in level if isinstance(one, (dict, list))]
        level = [one for holder in holders for one in (holder.values() if isinstance(holder, dict) else holder)]
    return bool(level)


def _no_duplicates(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    twice = [key for key, times in Counter(key for key, _ in pairs).items() if times > 1]
    if twice:
        raise ValueError(f'the key "{min(twice)}" stands twice in one object')
    return dict(pairs)


def _no_constants(constant: str) -> None:
    raise NotJson(f"{constant} is not JSON")


def _finite(text: str) -> float:
    number = float(text)
    if not abs(number) < float("inf"):
        raise ValueError(f"the number {cut(text)} is too large")
    return number + 0.0  # -0.0 is 0.0


def _whole(text: str) -> int:
    # Python would read thousands of digits in quadratic time, and more of them not at all
    number = int(text) if len(text) < 20 else 10**20
    if abs(number) > LARGEST:
        raise ValueError(f"the number {cut(text)} is too large; expected at most {LARGEST}")
    return number


def cut(text: str) -> str:
    """A text, or its beginning."""
    return text if len(text) <= 80 else text[:77] + "..."


def as_path(text: str) -> str:
    """A path, glob or URL, or a name on a hub, as it is; the operating system could open it.

    Raises:
        ValueError: it is empty or too long, or holds NUL.
    """
    if not text or "\0" in text:
        raise ValueError("a path is neither empty nor holds the character NUL")
    sizes = [len(part.encode(errors="surrogatepass")) for part in text.split("/")]
    if sum(sizes) + len(sizes) > LONGEST_PATH or ("://" not in text and max(sizes) > LONGEST_NAME):
        raise ValueError(f"a path has at most {LONGEST_PATH} bytes, and {LONGEST_NAME} between two slashes")
    return text


def read_json(path: Path) -> Any:
    """The value in a JSON file; duplicate keys, NaN and infinities are refused.

    Raises:
        UserError: the file is missing, not UTF-8 or not JSON, with line and column.
    """
    try:
        text = path.read_text(encoding="utf-8")
    except FileNotFoundError:
        raise UserError(f"{path}: no such file") from None
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"{path}: cannot be read: {error}") from None
    try:
        found = loads(text)
        json.dumps(found, ensure_ascii=False).encode()  # a lone surrogate is not text
        return found
    except json.JSONDecodeError as error:
        raise UserError(f"{path}:{error.lineno}:{error.colno}: not JSON: {error.msg}") from None
    except UnicodeEncodeError:
        raise UserError(f"{path}: holds half of a surrogate pair (such as \\ud800), which is not text") from None
    except ValueError as error:
        raise UserError(f"{path}: {error}") from None


def parse(kind: type[Kind], data: Any, source: str) -> Kind:
    """JSON data as a typed object.

    Raises:
        UserError: one line a problem, each opening with `source` and the JSON path.
    """
    try:
        return kind.model_validate(data, by_alias=True, by_name=False)  # a field's Python name is no key of the file
    except ValidationError as error:
        raise UserError("\n".join(f"{source}: {line}" for line in listed(problems(error, kind)))) from None


def problems(error: ValidationError, kind: type[BaseModel]) -> list[str]:
    """One line for each of the first problems: JSON path, what was found, what is allowed, the nearest valid name."""
    lines: list[str] = []
    kinds: dict[str, list[str]] = {}
    for item in error.errors(include_url=False):
        if len(lines) > MOST_LISTED:
            break
        holder, shown = _walk(kind, item["loc"])
        place = ".".join(shown) or "(top)"
        found = _shown(item["input"])
        if item["type"] == "extra_forbidden":
            allowed = [field.alias or key for key, field in holder.model_fields.items()] if holder else []
            listed = f"; allowed: {', '.join(allowed)}" if allowed else ""
            lines.append(f"{place}: unknown key{listed}{nearest(shown[-1], allowed)}")
        elif item["type"] == "missing":
            lines.append(f"{place}: missing; it is required")
        elif item["type"] == "literal_error":
            allowed = re.findall(r"'([^']*)'", str(item.get("ctx", {}).get("expected", "")))
            lines.append(f"{place}: found {found}; allowed: {', '.join(allowed)}{nearest(str(item['input']), allowed)}")
        elif item["type"] in WRONG_TYPE:
            if place in kinds:  # a union, which gives one problem for each of its members
                lines.pop()
            kinds.setdefault(place, []).append(WRONG_TYPE[item["type"]])
            lines.append(f"{place}: expected {' or '.join(kinds[place])}; found {found}")
        elif item["type"] == "string_pattern_mismatch":
            lines.append(f"{place}: a name is letters, digits, '.', '_' and '-', at most 100 of them; found {found}")
        else:
            message = item["msg"].removeprefix("Value error, ")
            lines.append(f"{place}: {message[:1].lower()}{message[1:]}; found {found}")
    return lines


def _walk(kind: type[BaseModel], location: tuple[int | str, ...]) -> tuple[type[BaseModel] | None, list[str]]:
    """Follow an error's location through the types: (type that holds its last key, location as the user wrote it)."""
    holder: type[BaseModel] | None = None
    here: Any = kind
    shown: list[str] = []
    for part in location:
        here, tagged = _chosen(here, part)
        if tagged:  # a discriminator's tag, or a union member's label, is not a key of the file
            continue
        if part != "[key]":
            shown.append(str(part))
        holder = here if isinstance(here, type) and issubclass(here, BaseModel) else None
        if holder:
            fields = {field.alias or key: field.annotation for key, field in holder.model_fields.items()}
            here = fields.get(str(part))
        elif get_origin(here) in (dict, list):
            here = get_args(here)[-1]
    return holder, shown


def _chosen(annotation: Any, part: int | str) -> tuple[Any, bool]:
    """Strip Annotated and Optional; of a union take the member that the part names: (annotation, it is but a name)."""
    while get_origin(annotation) is Annotated:
        annotation = get_args(annotation)[0]
    if get_origin(annotation) in (Union, types.UnionType):
        members = [member for member in get_args(annotation) if member is not type(None)]
        for member in members:
            if Tag(str(part)) in getattr(member, "__metadata__", ()):
                return get_args(member)[0], True
        models = [member for member in members if isinstance(member, type) and issubclass(member, BaseModel)]
        return (models or members)[0], not models and len(members) > 1
    return annotation, False


def _shown(value: Any) -> str:
    parts = json.JSONEncoder(default=str).iterencode(value)
    return cut("".join(islice(parts, 81)))  # no more of a large value than is shown
