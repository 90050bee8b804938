"""JSON, read strictly: typed, frozen objects, and errors that say where, what was found and what is allowed."""

from __future__ import annotations

import json
import re
import types
from pathlib import Path
from typing import Annotated, Any, TypeVar, Union, get_args, get_origin

from pydantic import BaseModel, ConfigDict, Tag, ValidationError

from ki_ds.errors import UserError, nearest


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
        UserError: there is no key or no equals sign.
    """
    path, equals, value = text.partition("=")
    if not equals or not all(path.split(".")):
        raise UserError(f"--set {text}: expected key=value, for instance --set models.student.train.steps=100")
    try:
        patch: Any = json.loads(value, parse_constant=_no_constants, parse_float=_finite)
    except (ValueError, RecursionError):
        patch = value
    for key in reversed(path.split(".")):
        patch = {key: patch}
    return patch


def _no_duplicates(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    keys = [key for key, _ in pairs]
    twice = sorted({key for key in keys if keys.count(key) > 1})
    if twice:
        raise ValueError(f'the key "{twice[0]}" stands twice in one object')
    return dict(pairs)


def _no_constants(constant: str) -> None:
    raise ValueError(f"{constant} is not JSON")


def _finite(text: str) -> float:
    number = float(text)
    if not abs(number) < float("inf"):
        raise ValueError(f"the number {text} is too large")
    return number


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
        found = json.loads(text, object_pairs_hook=_no_duplicates, parse_constant=_no_constants, parse_float=_finite)
        json.dumps(found, ensure_ascii=False).encode()  # a lone surrogate is not text
        return found
    except json.JSONDecodeError as error:
        raise UserError(f"{path}:{error.lineno}:{error.colno}: not JSON: {error.msg}") from None
    except UnicodeEncodeError:
        raise UserError(f"{path}: holds half of a surrogate pair (such as \\ud800), which is not text") from None
    except (ValueError, RecursionError) as error:
        raise UserError(f"{path}: {error}") from None


def parse(kind: type[Kind], data: Any, source: str) -> Kind:
    """JSON data as a typed object.

    Raises:
        UserError: one line a problem, each opening with `source` and the JSON path.
    """
    try:
        return kind.model_validate(data, by_alias=True, by_name=False)  # a field's Python name is no key of the file
    except ValidationError as error:
        raise UserError("\n".join(f"{source}: {line}" for line in problems(error, kind))) from None


def problems(error: ValidationError, kind: type[BaseModel]) -> list[str]:
    """One line a problem: JSON path, what was found, what is allowed, the nearest valid name."""
    lines = []
    kinds: dict[str, list[str]] = {}
    for item in error.errors():
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
    text = json.dumps(value, default=str)
    return text if len(text) <= 80 else text[:77] + "..."
