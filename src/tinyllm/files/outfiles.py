"""Files that are there complete or not at all: `replacing`, by which everything writes that others keep.

While it is written a file has no name, so that whatever ends the work, SIGKILL as well, leaves nothing. Where
the file system has no unnamed files it is a hidden one in the same folder, which an exception removes and a
signal that ends the process does not. Imports `errors`.
"""

from __future__ import annotations

import errno
import os
import secrets
import shutil
import stat
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from functools import partial
from pathlib import Path
from typing import IO

from tinyllm.errors import WriteError, comes_from, size_text


def target_of(path: str | os.PathLike[str]) -> Path:
    """Where a file that is written to `path` comes to lie: ~ expanded and symbolic links followed, so that a
    link stays one and what it points to is replaced.

    Raises WriteError where no regular file is or can be: a directory, a device, a pipe, a folder that is not
    there or not ours to write to, a name that is empty or too long.
    """
    if not os.fspath(path):  # which Python takes for the current directory
        raise WriteError("the path is empty: name a file")
    try:
        target = Path(os.path.realpath(Path(path).expanduser()))
        try:
            mode = target.stat().st_mode
        except FileNotFoundError:
            mode = stat.S_IFREG
        os.stat(f"{target.parent}/")
        if not os.access(target.parent, os.W_OK | os.X_OK):
            raise PermissionError(errno.EACCES, os.strerror(errno.EACCES))
    except (OSError, ValueError, RuntimeError) as error:
        if not comes_from(error):
            raise
        raise WriteError(f"{path!s:.4096}: cannot be written: {getattr(error, 'strerror', error)}") from None
    if stat.S_ISDIR(mode):
        raise WriteError(f"{path}: is a directory; name a file")
    if not stat.S_ISREG(mode):
        raise WriteError(f"{path}: is no regular file, and would be replaced by one; name another")
    return target


@contextmanager
def replacing(path: str | os.PathLike[str], n_bytes: int) -> Iterator[IO[bytes]]:
    """A file to write that takes the place of `target_of(path)` when the block ends, complete and on the
    disk; where something else ends it, whatever was there is as it was. n_bytes: how many there will be.

    Raises WriteError for what the system refuses, before any work where the disk has too little room.
    """
    target = target_of(path)
    part, unnamed = f".{target.name[:200]}.{secrets.token_hex(4)}.part", ""
    descriptors: list[int] = []  # those that are open
    try:
        try:
            free = shutil.disk_usage(target.parent).free
            folder = _open(descriptors, target.parent, os.O_RDONLY | os.O_DIRECTORY)
        except OSError as error:
            if not comes_from(error):
                raise
            raise WriteError(f"{path}: cannot be written: {error.strerror}") from None
        if n_bytes > free:
            raise WriteError(_no_room(path, n_bytes, free))
        try:
            descriptor, unnamed = _new_file(descriptors, part, folder)
            with open(descriptor, "wb", closefd=False) as file:
                yield file
                file.flush()
                os.fsync(descriptor)
                if unnamed:
                    os.link(unnamed, part, dst_dir_fd=folder)
            os.replace(part, target.name, src_dir_fd=folder, dst_dir_fd=folder)
        except BaseException as error:
            with suppress(OSError):  # it has no name yet, or no longer this one
                os.unlink(part, dir_fd=folder)
            if isinstance(error, OSError) and error.errno in (errno.ENOSPC, errno.EDQUOT):
                raise WriteError(_no_room(path, n_bytes, free)) from None
            if isinstance(error, OSError) and error.errno and error.filename in (None, part, unnamed):
                raise WriteError(f"{path}: cannot be written: {error.strerror}") from None
            raise
        with suppress(OSError):  # so that the new name outlives a power cut, where the system can do that
            os.fsync(folder)
    finally:
        list(map(os.close, descriptors))


def _open(descriptors: list[int], path: str | os.PathLike[str], flags: int, folder: int | None = None) -> int:
    """os.open, whose descriptor is in the list from the start: between the two no code of Python's runs, so
    no interrupt comes there either. (The list's end closes them in the same way.)"""
    opening = partial(os.open, flags=flags | os.O_CLOEXEC, mode=0o666, dir_fd=folder)
    descriptors.extend(map(opening, [path]))
    return descriptors[-1]


def _new_file(descriptors: list[int], part: str, folder: int) -> tuple[int, str]:
    """A descriptor of a new file in `folder`, and the path by which a file without a name can get one. The
    path is "" where it had to be made with the name `part`."""
    try:
        descriptor = _open(descriptors, ".", os.O_WRONLY | os.O_TMPFILE, folder)
        unnamed = f"/proc/self/fd/{descriptor}"
        if os.path.exists(unnamed):
            return descriptor, unnamed
    except (AttributeError, OSError) as error:  # not Linux, or a file system that knows no such files
        if not comes_from(error):
            raise
    return _open(descriptors, part, os.O_WRONLY | os.O_CREAT | os.O_EXCL, folder), ""


def _no_room(path: str | os.PathLike[str], n_bytes: int, free: int) -> str:
    return (
        f"{path}: no room: {size_text(n_bytes)} are needed, {size_text(free)} were free. Nothing is left "
        "of it; make room, or write to another disk"
    )
