"""Sealed folders: how stages meet on disk.

A folder is made for one *identity*: the stage, the part of the configuration that shapes the result, and the digests
of its inputs. While it is being filled it holds `unsealed.json`; when it is complete, `manifest.json` is written last
and atomically. A sealed folder is never changed; an unsealed one is continued; one that was made for another identity
is refused, with the keys that differ.

A manifest holds the digest of every file, of the identity (`fingerprint`) and of itself (`manifest`): against accidents
and edits in good faith, not against somebody who makes a whole folder anew.
"""

from __future__ import annotations

import contextlib
import json
import secrets
import shutil
from collections.abc import Callable
from dataclasses import dataclass, field
from fnmatch import fnmatch
from pathlib import Path
from typing import Any, Literal

from ki_ds.errors import UserError
from ki_ds.files import digest, file_digest, remedy, sync, write_atomically

SCHEMA = 1
MANIFEST, UNSEALED = "manifest.json", "unsealed.json"
State = Literal["sealed", "unsealed", "absent", "other"]


@dataclass(frozen=True)
class Identity:
    """What a folder is made of: `config` shaped it, `inputs` maps each input's folder to its digest."""

    stage: str
    config: dict[str, Any]
    inputs: dict[str, str]
    notes: dict[str, str] = field(default_factory=dict)  # place in the record: what to say where it differs

    @property
    def record(self) -> dict[str, Any]:
        return {"stage": self.stage, "schema": SCHEMA, "config": self.config, "inputs": self.inputs}

    @property
    def fingerprint(self) -> str:
        return digest(self.record)


@dataclass(frozen=True)
class Manifest:
    """The manifest of a sealed folder; `facts` are the stage's own results (counts, sizes, digests)."""

    path: Path
    fingerprint: str
    facts: dict[str, Any]
    record: dict[str, Any]

    @property
    def digest(self) -> str:
        """What later stages depend on: the content where the stage measured it, else the fingerprint."""
        return str(self.facts.get("content", self.fingerprint))


def _read(path: Path) -> dict[str, Any]:
    try:
        if path.exists() and not path.is_file():  # a pipe would wait for a writer
            raise OSError("it is not a file")
        text = path.read_bytes()
    except OSError as error:
        raise UserError(f"{path}: cannot be read ({error}). Remove the folder {path.parent} and run again.") from None
    return parse_manifest(text, str(path))


def parse_manifest(text: bytes, path: str) -> dict[str, Any]:
    """The content of a manifest, or of `unsealed.json`; `path` is for the error.

    Raises:
        UserError: it is not one, or of another schema.
    """
    folder = path.rpartition("/")[0]
    try:
        data = json.loads(text)
    except (ValueError, RecursionError) as error:
        raise UserError(f"{path}: cannot be read ({error}). Remove the folder {folder} and run again.") from None
    sealed = {"fingerprint", "facts", "files"} if path.endswith(MANIFEST) else set()
    if not isinstance(data, dict) or not {"stage", "schema", "config", "inputs"} | sealed <= data.keys():
        raise UserError(f"{path}: not a manifest of ki_ds. Remove the folder {folder} and run again.")
    if not all(isinstance(data[key], dict) for key in {"config", "inputs", "facts", "files"} & data.keys()):
        raise UserError(f"{path}: not a manifest of ki_ds. Remove the folder {folder} and run again.")
    if data["schema"] != SCHEMA:
        raise UserError(
            f"{path}: schema {data['schema']}, but this version of ki_ds reads {SCHEMA}. "
            "Use the version that wrote it, or choose another --workdir."
        )
    if sealed:
        _check_unchanged(data, path)
    return data


def _check_unchanged(data: dict[str, Any], path: str) -> None:
    """Check that a manifest says what it said when it was written."""
    try:
        found, whole = digest(_identity(data)), digest({key: data[key] for key in data.keys() - {"manifest"}})
    except (ValueError, RecursionError):  # NaN and the like, which no manifest holds
        found = whole = "none"
    if found != data["fingerprint"]:
        what = f"its fingerprint is {data['fingerprint']}, but that of its configuration and inputs is {found}"
    elif data.get("manifest", whole) != whole:
        what = "it does not have the digest that it had when it was written"
    else:
        return
    raise UserError(
        f"{path}: was changed after it was written: {what}. Put the original back, or remove the folder "
        f"{path.rpartition('/')[0]} and run again."
    )


def read_manifest(path: Path) -> dict[str, Any]:
    """The manifest of a folder as it stands, without looking at the folder's files.

    Raises:
        UserError: it is unreadable, or of another schema.
    """
    return _read(path / MANIFEST)


def read_unsealed(path: Path) -> dict[str, Any]:
    """What a folder that is being filled is to become.

    Raises:
        UserError: it is unreadable, or of another schema.
    """
    return _read(path / UNSEALED)


def open_sealed(path: Path) -> Manifest:
    """The manifest of a sealed folder, after checking that its files are there with their sizes.

    Raises:
        UserError: the folder is missing, unsealed, or a file of it was lost or cut.
    """
    if not (path / MANIFEST).exists():
        state = "was begun but not finished" if (path / UNSEALED).exists() else "is not there"
        raise UserError(f"{path}: {state}. Run `ki-ds run` on the experiment: it makes what is missing.")
    data = _read(path / MANIFEST)
    for name, size in data["files"].items():
        file = path / name
        found = file.stat().st_size if file.exists() else None
        if found != size:
            what = "is missing" if found is None else f"has {found} bytes"
            whole = data["stage"] != "teach"  # targets are mended shard by shard
            remedy = "run again" if found is None and not whole else f"remove {path if whole else file} and run again"
            remedy = f"Put the original back, or {remedy}: it is made anew."
            raise UserError(f"{file}: {what}, but the manifest says {size} bytes. {remedy}")
    return Manifest(path, str(data["fingerprint"]), dict(data["facts"]), data)


def check_contents(path: Path, digest_of: Callable[[Path], str], leave_out: str = "") -> None:
    """Check that the files of a sealed folder are what they were when it was sealed, but for those that are named like
    `leave_out`. A folder from before manifests had digests passes.

    Raises:
        UserError: naming the first that is not; or as `open_sealed`.
    """
    record = open_sealed(path).record
    for name, wanted in record.get("digests", {}).items():
        if fnmatch(name, leave_out):
            continue
        try:
            found = digest_of(path / name)
            if found != wanted:  # as remembered, maybe
                found = file_digest(path / name)
        except OSError as error:
            raise UserError(f"{path / name}: cannot be read: {error.strerror}") from None
        if found != wanted:
            raise UserError(
                f"{path / name}: was changed after it was sealed: its digest is {found}, the manifest says {wanted}. "
                f"Put the original back, or remove {path} and run again: it is made anew."
            )


def state(path: Path, identity: Identity | None = None) -> State:
    """'sealed', 'unsealed', 'absent', or 'other' where the folder was made for another identity."""
    states: dict[str, State] = {MANIFEST: "sealed", UNSEALED: "unsealed"}
    for name, found in states.items():
        if (path / name).exists():
            matches = identity is None or digest(_identity(_read(path / name))) == identity.fingerprint
            return found if matches else "other"
    return "absent"


def _identity(record: dict[str, Any]) -> dict[str, Any]:
    return {key: record[key] for key in ("stage", "schema", "config", "inputs")}


def made_of(path: Path) -> dict[str, Any]:
    """The record of the identity that a folder, sealed or being filled, was made for; empty where there is neither.

    Raises:
        UserError: it is unreadable, or of another schema.
    """
    found = next((path / name for name in (MANIFEST, UNSEALED) if (path / name).exists()), None)
    return _identity(_read(found)) if found else {}


def check_identity(path: Path, identity: Identity) -> None:
    """Check that a folder with a manifest, or one that is being filled, was made for this identity.

    Raises:
        UserError: naming the keys that differ.
    """
    found = made_of(path)
    if digest(found) != identity.fingerprint:
        differ = differences(found, identity.record)
        notes = [note for place, note in identity.notes.items() if any(one.startswith(f"{place}: ") for one in differ)]
        raise UserError(
            f"{path}: made from another experiment, corpus or configuration; "
            + "; ".join(differ)
            + ". Choose another --workdir, put the old value back, or make it again: `ki-ds run --redo`, or remove the "
            f"folder {path}." + "".join(f" {note}" for note in notes)
        )


def prepare(path: Path, identity: Identity, facts: dict[str, Any] | None = None) -> Manifest | None:
    """The manifest where the folder is sealed; else make it ready to be filled and return None. `facts` are what an
    interrupted run is to find again, by `begun`.

    Raises:
        UserError: the folder belongs to another experiment, or to the same one before it was changed.
    """
    for name in (MANIFEST, UNSEALED):
        if (path / name).exists():
            check_identity(path, identity)
            if name == MANIFEST:
                (path / UNSEALED).unlink(missing_ok=True)  # a crash just after sealing leaves it
            return open_sealed(path) if name == MANIFEST else None
    # a crash in the middle of the first write leaves a temporary file of it and nothing else
    if path.is_dir() and any(not fnmatch(file.name, f"{UNSEALED}.*.tmp") for file in path.iterdir()):
        raise UserError(
            f"{path}: holds files but no manifest, so it is not ki_ds's. Move it away or choose another --workdir."
        )
    try:
        path.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UserError(f"{path}: cannot be made: {error.strerror}. {remedy(error)}") from None
    write_atomically(path / UNSEALED, _pretty({**identity.record, "facts": facts or {}}))
    return None


def reopen(path: Path, identity: Identity, facts: dict[str, Any] | None = None) -> None:
    """Make a folder, sealed or being filled, ready to be added to: it is unsealed before anything changes."""
    write_atomically(path / UNSEALED, _pretty({**identity.record, "facts": facts or {}}))
    (path / MANIFEST).unlink(missing_ok=True)


def aside(path: Path) -> Path:
    """Where a folder waits until a new one in its place is sealed: a name that no stage has."""
    return path.with_name(f".{path.name}.old")


def set_aside(path: Path, identity: Identity) -> None:
    """Make way for a new folder; the old one is removed when that is sealed. Where one of this identity was waiting,
    it is back."""
    old = aside(path)
    if (old / MANIFEST).exists() and not (path / MANIFEST).exists():  # what was finished waits, what was begun goes
        remove(path)
        if state(old, identity) == "sealed":
            old.rename(path)
    elif path.exists():
        remove(old)
        path.rename(old)


def remove(path: Path) -> None:
    """Remove a folder, or a link to one, if it is there; half removed, it must not look like anything: it first gets a
    name as of a folder that was set aside."""
    gone = path.with_name(f".{secrets.token_hex(4)}.old")
    try:
        path.rename(gone)
    except FileNotFoundError:
        return
    if gone.is_symlink():
        gone.unlink()
    else:
        shutil.rmtree(gone, ignore_errors=True)


def begun(path: Path) -> dict[str, Any]:
    """The facts of a folder, sealed or being filled; empty where there is neither."""
    for name in (MANIFEST, UNSEALED):
        if (path / name).exists():
            return dict(_read(path / name).get("facts", {}))
    return {}


def differences(found: Any, expected: Any, place: str = "") -> list[str]:
    """The places where two JSON values differ, as 'place: found …, expected …', at most five."""
    if isinstance(found, dict) and isinstance(expected, dict):
        lines = [
            line
            for key in sorted(found.keys() | expected.keys())
            for line in differences(found.get(key, ...), expected.get(key, ...), f"{place}.{key}" if place else key)
        ]
        return lines[:5]
    texts = ["nothing" if value is ... else json.dumps(value, sort_keys=True) for value in (found, expected)]
    shown = [text if len(text) < 60 else text[:57] + "..." for text in texts]
    return [] if texts[0] == texts[1] else [f"{place}: found {shown[0]}, expected {shown[1]}"]


def seal(
    path: Path, identity: Identity, facts: dict[str, Any], leave_out: tuple[str, ...] = (), synced: str = "",
    digest_of: Callable[[Path], str] = file_digest,
) -> Manifest:  # fmt: skip
    """Write the manifest; from now on the folder is complete. What it can do without (`leave_out`) is not listed; files
    that are named like `synced` were flushed to disk when they were written. `digest_of`: of a file, as it lies."""
    for leftover in path.rglob("*.tmp"):
        if leftover.is_file():
            leftover.unlink(missing_ok=True)
    files, digests = {}, {}
    for file in sorted(path.rglob("*")):
        listed = file.relative_to(path).parts[0] not in (*leave_out, MANIFEST, UNSEALED) and file.suffix != ".tmp"
        if file.is_file() and listed:
            if not fnmatch(file.name, synced):
                sync(file)  # the manifest must not outlive what it vouches for
            name = str(file.relative_to(path))
            files[name], digests[name] = file.stat().st_size, digest_of(file)
    record = {
        **identity.record, "fingerprint": identity.fingerprint, "facts": facts, "files": files, "digests": digests,
        "versions": versions(),
    }  # fmt: skip
    record["manifest"] = digest(record)
    write_atomically(path / MANIFEST, _pretty(record))
    (path / UNSEALED).unlink(missing_ok=True)
    remove(aside(path))
    return open_sealed(path)


def _pretty(value: Any) -> bytes:
    return (json.dumps(value, indent=1, ensure_ascii=False, allow_nan=False) + "\n").encode()


def versions() -> dict[str, str]:
    """The versions of the libraries that results depend on."""
    from importlib import metadata

    names = ("ki_ds", "torch", "deepspeed", "transformers", "tokenizers", "numpy", "zstandard")
    found = {}
    for name in names:
        with contextlib.suppress(metadata.PackageNotFoundError):
            found[name] = metadata.version(name)
    return found
