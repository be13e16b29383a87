"""Hugging Face's cache, and fetching into it: through huggingface_hub, which speaks to the hub, lays out the
cache and shows progress.

What arrives is compared with the checksums that the hub lists, and removed where it differs. Large files are
put into the cache's blobs from here, since huggingface_hub throws away what it had of a file when a download
ends early. A name that chooses a file is answered from the cache without a connection; one that leaves the
choice to us asks the hub first, so that it means the same whatever the cache has. Imports `choose`, `names`
and `errors`. Read next: cached.py.
"""

from __future__ import annotations

import fcntl
import glob
import hashlib
import logging
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from tinyllm.errors import ArgumentError, NotFoundError, ReadError, UnsupportedError
from tinyllm.hub.choose import choose
from tinyllm.hub.names import RepoName

log = logging.getLogger(__name__)


class _UnreachableError(ReadError):
    """The hub gave no answer, or none about the model."""


def find(name: RepoName) -> Path:
    """The path of a model, fetched where it is not in the cache."""
    if name.choice is not None and (path := in_cache(name)):
        return path
    return pull(name)


def pull(name: RepoName) -> Path:
    """Asks the hub, and fetches what is new. Without an answer what the cache has is taken, and said."""
    try:
        return _fetch(name)
    except _UnreachableError as error:
        if path := in_cache(name):
            log.warning("%s; the files in the cache are used", error)
            return path
        raise


def cache_folder() -> Path:
    """Where huggingface_hub keeps what it fetched."""
    from huggingface_hub import constants

    return Path(constants.HF_HUB_CACHE)


def _home(name: RepoName) -> Path:
    return cache_folder() / f"models--{name.repo.replace('/', '--')}"


def snapshot_of(name: RepoName) -> Path | None:
    """The folder of a repository's files in the cache, those of one revision; None without one."""
    home = _home(name)
    revision = name.revision or "main"
    ref = home / "refs" / revision
    commit = ref.read_text(encoding="ascii", errors="replace").strip() if ref.is_file() else revision
    folder = home / "snapshots" / commit
    return folder if folder.is_dir() else None


def files_in(snapshot: Path) -> list[str]:
    """The files that are there, by their paths in the repository; a link to nothing is none."""
    return sorted(p.relative_to(snapshot).as_posix() for p in snapshot.rglob("*") if p.is_file())


def in_cache(name: RepoName) -> Path | None:
    """The path of a model whose files are all in the cache, as far as their names tell."""
    if (snapshot := snapshot_of(name)) is None:
        return None
    try:
        chosen = choose(files_in(snapshot), name.choice, str(name))
    except (NotFoundError, UnsupportedError, ArgumentError):
        return None
    return snapshot / chosen.load


def _fetch(name: RepoName) -> Path:
    import huggingface_hub
    from huggingface_hub import HfApi, constants

    if constants.HF_HUB_OFFLINE:
        raise _UnreachableError(f"{name}: HF_HUB_OFFLINE is set, so nothing is fetched")
    with _told(name):
        info = HfApi(library_name="tinyllm").model_info(
            name.repo, revision=name.revision, files_metadata=True
        )
        there = {file.rfilename: file for file in info.siblings or ()}
        chosen = choose(there, name.choice, str(name))
        home = _home(name)
        new = [file for file in chosen.files if not (home / "snapshots" / str(info.sha) / file).is_file()]
        if new:
            n_bytes = sum(there[file].size or 0 for file in new)
            log.info("%s: fetching %d files, %d bytes", name, len(new), n_bytes)
        checked = {file for file in new if _fetch_blob(home, there[file], name, str(info.sha))}
        snapshot = Path(
            huggingface_hub.snapshot_download(
                name.repo,
                revision=name.revision,
                allow_patterns=[glob.escape(file) for file in chosen.files],
                library_name="tinyllm",
            )
        )
    for file in new:
        if file not in checked:
            _check(snapshot / file, there[file], str(name))
    return snapshot / chosen.load


def _fetch_blob(home: Path, listed: Any, name: RepoName, commit: str) -> bool:
    """A large file into the cache's blobs, where huggingface_hub finds it, going on where a try ended.
    False for what is left to huggingface_hub: small files, and those too large for plain HTTP."""
    from huggingface_hub import constants, hf_hub_url
    from huggingface_hub.file_download import http_get
    from huggingface_hub.utils import build_hf_headers  # type: ignore[attr-defined]

    if not listed.lfs or not listed.size or listed.size > getattr(constants, "MAX_HTTP_DOWNLOAD_SIZE", 50e9):
        return False
    blob = home / "blobs" / listed.lfs.sha256
    if blob.is_file():
        return True
    blob.parent.mkdir(parents=True, exist_ok=True)
    part = blob.with_name(f"{blob.name}.tinyllm-part")
    with part.open("ab") as file:
        fcntl.flock(file, fcntl.LOCK_EX)  # another process may be at it
        if blob.is_file():
            part.unlink(missing_ok=True)
            return True
        if file.tell() > listed.size:
            file.truncate(0)
        url = hf_hub_url(name.repo, listed.rfilename, revision=commit)
        http_get(
            url,
            file,
            resume_size=file.seek(0, 2),
            headers=build_hf_headers(library_name="tinyllm"),
            expected_size=listed.size,
            displayed_filename=listed.rfilename,
        )
        file.flush()
        _check(part, listed, str(name))
        part.replace(blob)
    return True


def _check(path: Path, listed: Any, name: str) -> None:
    """Removes a file that is not what the hub lists: large ones have a SHA-256 there, others git's SHA-1."""
    if not path.is_file():
        raise ReadError(f"{name}: {listed.rfilename} did not arrive; try again")
    lfs = listed.lfs
    wanted, digest = (lfs.sha256, hashlib.sha256()) if lfs else (listed.blob_id, hashlib.sha1())
    if not lfs:
        digest.update(b"blob %d\0" % path.stat().st_size)
    with path.open("rb") as file:
        while chunk := file.read(1 << 20):
            digest.update(chunk)
    if wanted and digest.hexdigest() != wanted:
        path.resolve().unlink()
        path.unlink(missing_ok=True)
        raise ReadError(
            f"{name}: {listed.rfilename} is not what the hub says it is (checksum "
            f"{digest.hexdigest()[:12]}..., expected {wanted[:12]}...), so it was removed; try again"
        )


@contextmanager
def _told(name: RepoName) -> Iterator[None]:
    """Whatever huggingface_hub raises, as one of our errors."""
    from huggingface_hub import errors

    others: tuple[type[Exception], ...] = (OSError, *_client_errors())
    page = f"https://huggingface.co/{name.repo}"
    try:
        yield
    except errors.GatedRepoError as error:
        raise ReadError(
            f"{name}: its makers ask for an account: accept their terms on {page}, then log in with "
            "`hf auth login` or set HF_TOKEN"
        ) from error
    except errors.RepositoryNotFoundError as error:
        raise NotFoundError(
            f"{name}: no such repository (or a private one: log in with `hf auth login` or set HF_TOKEN)"
        ) from error
    except errors.RevisionNotFoundError as error:
        raise NotFoundError(f"{name}: the repository has no revision {name.revision}") from error
    except errors.HFValidationError as error:
        raise ArgumentError(f"{name}: {error}") from error
    except errors.HfHubHTTPError as error:
        raise _UnreachableError(f"{name}: the hub answers: {_first_line(error)}") from error
    except (NotFoundError, ReadError):
        raise
    except others as error:
        raise _UnreachableError(f"{name}: cannot be fetched: {_first_line(error)}") from error


def _client_errors() -> tuple[type[Exception], ...]:
    """What the HTTP client raises that huggingface_hub uses: another one in each of its major versions."""
    from huggingface_hub import errors

    bases = [
        base for base in errors.HfHubHTTPError.__mro__ if base.__name__ in ("HTTPError", "RequestException")
    ]
    return tuple(base for base in bases if issubclass(base, Exception))


def _first_line(error: BaseException) -> str:
    return (str(error).strip() or type(error).__name__).splitlines()[0]
