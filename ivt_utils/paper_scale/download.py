"""Files of a data set on the Hub: which revision and which files, then each of them whole, resumed and checked.

Everything is anonymous, without telemetry and without code from the Hub. A file grows under the name `.partial` and a
broken download goes on from its last byte in the next run, too: `hf_hub_download` of huggingface_hub 2.4 resumes within
one call only, and throws a broken file away. A file counts when its SHA-256 is the one that the Hub declares.
"""

import fnmatch
import os
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from ivt_utils.runtime.files import DATA, ArtefactError, checksum, read_json

REVISIONS = DATA / "hub_revisions.json"
DOWNLOADS = DATA / "hub" / "downloads"
AGAIN = "run the same command again, and it goes on from where it stopped"


def fetch(repo: str, patterns: tuple, revision: str | None, folder: Path | None = None) -> tuple[str, list[dict]]:
    """Return (commit hash, files) of the files of a data set that fit the patterns; what is missing is downloaded.

    A file is {"name", "path", "size" (bytes), "sha256"}. `revision` is a commit hash; with None, "main" is resolved
    to its commit hash once, and all files come from that one. Files lie in `folder` (data/hub/downloads). Raises an
    ArtefactError without a network, for a revision or file that is not there, and for a wrong checksum.
    """
    from huggingface_hub import HfApi

    with hub_errors(repo, revision):
        info: Any = HfApi(token=False).dataset_info(repo, revision=revision or "main", files_metadata=True, timeout=60)
    held = {file.rfilename: file for file in info.siblings}
    names = []
    for pattern in patterns:
        found = sorted(name for name in held if fnmatch.fnmatchcase(name, pattern))
        if not found:
            raise ArtefactError(
                f"{repo} has no file {pattern} at revision {info.sha}, only {', '.join(sorted(held))}; "
                f"note another revision of it in {REVISIONS} and run again."
            )
        names += found
    entry = sources().get(repo, {})
    known = entry.get("files", {}) if entry.get("revision") == info.sha else {}
    place = Path(folder or DOWNLOADS) / repo.replace("/", "--") / info.sha
    files = []
    for name in names:
        declared = held[name].lfs.sha256 if held[name].lfs else None
        noted = known.get(name, {}).get("sha256")
        if noted and declared and noted != declared:
            raise ArtefactError(
                f"The Hub declares another checksum for {name} of {repo} than {REVISIONS} notes; "
                "do not use it, and tell the authors of this course."
            )
        path = download(repo, name, info.sha, place / name, held[name].size, declared or noted)
        files.append({"name": name, "path": path, "size": path.stat().st_size, "sha256": declared or checksum(path)})
    return info.sha, files


def download(repo: str, name: str, commit: str, path: Path, size: int, expected: str | None) -> Path:
    """Return the path of a file that is whole and has the expected SHA-256 (None: the size alone is checked).

    A file with another checksum is deleted, and the ArtefactError says to run again.
    """
    from huggingface_hub import hf_hub_url
    from huggingface_hub.file_download import http_get
    from huggingface_hub.utils import build_hf_headers

    partial = path.with_name(path.name + ".partial")
    if not path.exists():
        path.parent.mkdir(parents=True, exist_ok=True)
        if partial.exists() and partial.stat().st_size > size:
            partial.unlink()
        with hub_errors(repo, commit), open(partial, "ab") as file:
            http_get(
                hf_hub_url(repo, name, repo_type="dataset", revision=commit),
                file,
                resume_size=file.tell(),
                headers=build_hf_headers(token=False),
                expected_size=size,
                displayed_filename=name,
            )
        os.replace(partial, path)
    if path.stat().st_size != size or (expected and checksum(path) != expected):
        path.unlink()
        raise ArtefactError(
            f"{name} of {repo} arrived damaged (its checksum is not the one that the Hub declares) and "
            "was deleted; run the same command again."
        )
    return path


@contextmanager
def hub_errors(repo: str, revision: str | None):
    """Turn an error of the Hub or the network into an ArtefactError of one sentence; a full disk stays an OSError."""
    from huggingface_hub import errors

    try:
        yield
    except errors.OfflineModeIsEnabled:
        raise ArtefactError(f"HF_HUB_OFFLINE is set, so {repo} cannot be downloaded; unset it and {AGAIN}.") from None
    except errors.RevisionNotFoundError:
        raise ArtefactError(
            f"The Hub has no revision {revision} of {repo}; write null for it in {REVISIONS} to take "
            "the newest one, and run again."
        ) from None
    except errors.RepositoryNotFoundError:
        raise ArtefactError(
            f"The Hub has no data set {repo} that is open to everyone; it was moved or withdrawn, so "
            "tell the authors of this course."
        ) from None
    except (errors.HTTPError, OSError) as error:  # HTTPError: that of the HTTP library which the Hub's client uses
        if isinstance(error, OSError) and error.errno and not isinstance(error, ConnectionError):
            raise
        raise ArtefactError(
            f"The download of {repo} broke off ({type(error).__name__}); check the network connection and {AGAIN}."
        ) from None


def sources() -> dict[str, dict]:
    """Return what the project notes of each data set: {repo: {"revision", "bytes", "license", "files", ...}}.

    `revision` is null where none is known for sure: then the newest one is taken, and its hash noted in the manifest.
    """
    return read_json(REVISIONS)["sources"]
