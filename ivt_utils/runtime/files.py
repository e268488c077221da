"""Files that are whole or absent, checked by their SHA-256; what is wrong with one is said in a sentence."""

import errno
import hashlib
import json
import os
import shutil
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[2]  # the project's folder


DATA = ROOT / "data"


MANIFEST = "manifest.json"  # in a folder of data: the SHA-256 of its files


FULL = (errno.ENOSPC, errno.EDQUOT)


CLOSED = (errno.EACCES, errno.EPERM, errno.EROFS)


class ArtefactError(RuntimeError):
    """Something a run needs is missing, damaged or in the way; the message says what to do."""


def write_text(path: Path, text: str) -> None:
    """Write `text` whole or not at all: to a temporary name first, then renamed."""
    path = Path(path)
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        temporary.write_text(text, encoding="utf-8")
        os.replace(temporary, path)
    except OSError as error:
        with suppress(OSError):
            temporary.unlink(missing_ok=True)
        raise ArtefactError(f"{trouble(error, path)} Nothing was lost.") from error


def trouble(error: OSError, path: Path | str | None = None) -> str:
    """Return one sentence about a file that could not be read or written: which, why, and what helps against that.

    `path` is the file in question where the error does not name it, or names a temporary one.
    """
    path = path or error.filename
    path = os.fsdecode(path) if isinstance(path, str | bytes | os.PathLike) else None  # not the number of an open file
    if error.errno in FULL:
        place = path or "what was to be written"
        return f"No space left on the disk for {place}: free some, then the same command goes on from there."
    if not (path and error.strerror):
        return str(error)
    if error.errno not in CLOSED:
        return f"{path}: {error.strerror}."
    there = next((place for place in (Path(path), *Path(path).absolute().parents) if _is_there(place)), Path(path))
    if not os.access(there, os.R_OK | os.X_OK * there.is_dir()):
        return f"{path} cannot be read: {error.strerror}."
    if Path(path).absolute().is_relative_to(DATA):
        remedy = "copy the course into a folder of yours, and work there"
    else:
        remedy = "name a folder of yours with --run-dir (in a notebook: RUN_DIR)"
    return f"{path} cannot be written ({error.strerror}): {remedy}."


def _is_there(place: Path) -> bool:
    """Return whether a path is known to exist; one inside a folder that may not be entered is not."""
    try:
        return place.exists()
    except OSError:
        return False


@contextmanager
def replace_folder(path: Path):
    """Yield a fresh folder that takes the place of `path` when the block ends without an error."""
    path = Path(path)
    temporary, old = (path.with_name(f".{path.name}.{os.getpid()}.{kind}") for kind in ("tmp", "old"))
    shutil.rmtree(temporary, ignore_errors=True)
    try:
        temporary.mkdir(parents=True)
    except OSError as error:
        raise ArtefactError(trouble(error, path)) from error
    try:
        yield temporary
        if path.exists():
            os.replace(path, old)
        os.replace(temporary, path)
    except BaseException:
        if old.exists() and not path.exists():
            os.replace(old, path)
        raise
    finally:
        shutil.rmtree(temporary, ignore_errors=True)
        shutil.rmtree(old, ignore_errors=True)


def checksum(path: Path) -> str:
    """Return the SHA-256 of a file, or of a folder's files and their names."""
    if path.is_file():
        with open(path, "rb") as content:  # piece by piece: some are of several GB
            return hashlib.file_digest(content, "sha256").hexdigest()
    digest = hashlib.sha256()
    for file in sorted(path.rglob("*")):
        if file.is_file():
            digest.update(file.relative_to(path).as_posix().encode())
            digest.update(file.read_bytes())
    return digest.hexdigest()


def intact(path: Path, remedy: str | None = None) -> Path:
    """Return the path of a file whose SHA-256 is the one in the manifest.json beside it.

    Another, or no file, or no manifest raises an ArtefactError that names the file and the remedy: a command, or by
    default how a file that comes with the project is restored.
    """
    note = path.with_name(MANIFEST)
    if not note.exists():
        raise ArtefactError(f"{note} is missing, so {path.name} cannot be checked; {remedy or restoring(note)}")
    manifest = read_json(note, remedy or restoring(note))
    if not matches(manifest.get("files") if isinstance(manifest, dict) else None, path.name, path):
        raise ArtefactError(
            f"{path} is missing or damaged (its checksum is not the one in {MANIFEST}); {remedy or restoring(path)}"
        )
    return path


def matches(noted, name: str, path: Path) -> bool:
    """Return whether a file or folder is there with the checksum that is noted for `name`: {name: {"sha256"}}."""
    entry = noted.get(name) if isinstance(noted, dict) else None
    return path.exists() and isinstance(entry, dict) and entry.get("sha256") == checksum(path)


def note_files(folder: Path, names) -> None:
    """Note the SHA-256 of files of `folder` in its manifest.json, beside what it notes of other files."""
    note = folder / MANIFEST
    files = read_json(note)["files"] if note.exists() else {}
    files |= {name: {"sha256": checksum(folder / name)} for name in names}
    write_text(note, json.dumps({"files": files}, indent=1, sort_keys=True) + "\n")


def restoring(path: Path) -> str:
    """Return how to restore a file or folder of the project: with git in a clone, else from the archive.

    It is removed first, for git leaves alone what it takes for unchanged.
    """
    if not path.is_relative_to(ROOT):
        return "restore it from where it came"
    name = path.relative_to(ROOT).as_posix()
    if (ROOT / ".git").exists():
        return f"restore it with: rm -rf {name} && git checkout -- {name}"
    return f"restore it from the archive (ZIP) that the course came in: unpack it again, and copy its {name} here"


def read_json(path: Path, remedy: str | None = None):
    """Return the value of a JSON file; a missing or unreadable one raises an ArtefactError, which ends on `remedy`."""
    try:
        return json.loads(Path(path).read_text(encoding="utf-8"))
    except FileNotFoundError:
        way = restoring(Path(path)) if Path(path).is_relative_to(DATA) else "run the stage that makes it."
        raise ArtefactError(f"{path} is missing; {remedy or way}") from None
    except ValueError:
        raise ArtefactError(f"{path} is not valid JSON; {remedy or 'delete it and run again.'}") from None


def read_jsonl(path: Path) -> list[Any]:
    """Return the rows of a JSONL file; a line that is not JSON raises an ArtefactError with its number."""
    try:
        lines = Path(path).read_bytes().removesuffix(b"\n").split(b"\n")
    except FileNotFoundError:
        raise ArtefactError(f"{path} is missing; run the stage that makes it.") from None
    rows = []
    for number, line in enumerate(lines if lines != [b""] else [], 1):
        try:
            rows.append(json.loads(line))
        except (ValueError, RecursionError):
            raise damaged_line(path, number, "this is not JSON") from None
    return rows


def damaged_line(path: Path, number: int, why) -> ArtefactError:
    """Return the error that names a line of a JSONL file, counted from 1, and what is wrong with it."""
    return ArtefactError(f"{path} is damaged in line {number}; delete the file and run its stage again: {why}.")
