"""docs/metrics.md against real files."""

from pathlib import Path

PAGE = Path(__file__).parents[2] / "docs" / "metrics.md"


def fields(heading):
    """The fields in the table under a heading, as tuples of names."""
    section = next(part for part in PAGE.read_text().split("\n## ") if part.startswith(heading))
    return {tuple(line.split("`")[1].split(".")) for line in section.splitlines() if line.startswith("| `")}


def paths(value, place=()):
    """Places of everything in a JSON value that is not a container."""
    if isinstance(value, dict | list):
        items = value.items() if isinstance(value, dict) else enumerate(value)
        return {path for key, item in items for path in paths(item, (*place, str(key)))}
    return {place}


def fits(path, field, whole=True):
    alike = all(name.startswith("<") or name == part for part, name in zip(path, field, strict=False))
    return alike and (len(path) == len(field) if whole else len(path) <= len(field))


def compare(heading, values):
    """(what real values hold and the page does not describe, what it describes and none of them holds)."""
    described, found = fields(heading), {path for value in values for path in paths(value)}
    null = {path for value in values for path in nulls(value)}  # of an object that is not there
    strange = {path for path in found if not any(fits(path, field, path not in null) for field in described)}
    return strange, {field for field in described if not any(fits(path, field) for path in found)}


def nulls(value):
    def at(path):
        here = value
        for key in path:
            here = here[int(key) if isinstance(here, list) else key]
        return here

    return {path for path in paths(value) if at(path) is None}
