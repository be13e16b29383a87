"""Files that appear complete or not at all: where they may lie, and what ends the writing of one."""

from __future__ import annotations

import gc
import os
import signal
import stat
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
from helpers_interrupts import Interrupts

from tinyllm import errors
from tinyllm import files as loaders
from tinyllm.files import FileReader, outfiles
from tinyllm.files.outfiles import replacing, target_of


@pytest.fixture(params=["unnamed", "named"])
def kind(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    """Both ways of writing: with an unnamed file, and as where the system has none."""
    if request.param == "named":
        monkeypatch.delattr(os, "O_TMPFILE", raising=False)
    return str(request.param)


def fifo(path: Path) -> None:
    os.mkfifo(path)


def link_to_fifo(path: Path) -> None:
    os.mkfifo(path.with_name("pipe"))
    path.symlink_to("pipe")


def node(path: Path) -> None:
    """A socket's, as a device's no regular file."""
    os.mknod(path, stat.S_IFSOCK | 0o600)


def loop(path: Path) -> None:
    path.symlink_to(path.name)


def in_a_file(path: Path) -> None:
    path.parent.rmdir()
    path.parent.write_bytes(b"")


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (fifo, "x: is no regular file, and would be replaced by one"),
        (link_to_fifo, "x: is no regular file, and would be replaced by one"),
        (node, "x: is no regular file, and would be replaced by one"),
        (Path.mkdir, "x: is a directory; name a file"),
        (loop, "x: cannot be written: Too many levels of symbolic links"),
        (in_a_file, "x: cannot be written: Not a directory"),
    ],
)
def test_only_a_regular_file_is_replaced(make: Callable[[Path], None], message: str, tmp_path: Path) -> None:
    path = tmp_path / "folder" / "x"
    path.parent.mkdir()
    make(path)
    before = os.lstat(path) if path.parent.is_dir() else None
    with pytest.raises(errors.WriteError, match=message), replacing(path, 1):
        pytest.fail("too late")
    if before:
        after = os.lstat(path)
        assert (after.st_ino, after.st_mode) == (before.st_ino, before.st_mode)


def test_a_folder_of_others_is_noticed_first(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(os, "access", lambda path, mode: Path(path) != tmp_path)
    with pytest.raises(errors.WriteError, match="x: cannot be written: Permission denied"):
        target_of(tmp_path / "x")


@pytest.mark.parametrize("there", [True, False])
def test_a_link_stays_one(there: bool, kind: str, tmp_path: Path) -> None:
    """What it points to, in another folder and there or not, is what is written."""
    (tmp_path / "a").mkdir()
    (tmp_path / "b").mkdir()
    target, link = tmp_path / "a" / "file", tmp_path / "b" / "link"
    link.symlink_to("../a/file")
    if there:
        target.write_bytes(b"before")
    with replacing(link, 3) as file:
        file.write(b"new")
    assert os.readlink(link) == "../a/file"
    assert not target.is_symlink()
    assert target.read_bytes() == b"new"
    assert (os.listdir(tmp_path / "a"), os.listdir(tmp_path / "b")) == (["file"], ["link"])


def test_until_it_is_complete_there_is_the_old_one(kind: str, tmp_path: Path) -> None:
    path = tmp_path / "x"
    path.write_bytes(b"before")
    umask = os.umask(0o027)
    try:
        with replacing(path, 3) as file:
            file.write(b"new")
            assert len(os.listdir(tmp_path)) == (1 if kind == "unnamed" else 2)
            assert path.read_bytes() == b"before"
    finally:
        os.umask(umask)
    assert path.read_bytes() == b"new"
    assert path.stat().st_mode & 0o777 == 0o640
    assert os.listdir(tmp_path) == ["x"]


@pytest.mark.parametrize("when", ["within", "fsync", "replace"])
def test_what_fails_leaves_nothing(
    when: str, kind: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "x"
    path.write_bytes(b"before")

    def refused(*args: object, **options: object) -> None:
        raise OSError(5, "Input/output error", args[0] if when == "replace" else None)

    def write() -> None:
        with replacing(path, 3) as file:
            file.write(b"new")
            if when == "within":
                refused()

    if when != "within":
        monkeypatch.setattr(os, when, refused)
    with pytest.raises(errors.WriteError, match="x: cannot be written: Input/output error"):
        write()
    assert path.read_bytes() == b"before"
    assert os.listdir(tmp_path) == ["x"]


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGHUP, signal.SIGKILL])
def test_what_ends_the_process_leaves_nothing(number: signal.Signals, tmp_path: Path) -> None:
    script = (
        "import signal, sys, time; from tinyllm.files.outfiles import replacing\n"
        "signal.signal(signal.SIGHUP, signal.SIG_DFL)\n"  # which nohup has its children ignore
        "with replacing(sys.argv[1], 100) as file:\n"
        "    file.write(b'x' * 50); file.flush(); print(flush=True); time.sleep(60)"
    )
    command = [sys.executable, "-c", script, str(tmp_path / "x")]
    with subprocess.Popen(command, stdout=subprocess.PIPE) as process:
        assert process.stdout is not None
        process.stdout.readline()
        named = os.listdir(tmp_path)
        process.send_signal(number)
        assert process.wait(60) == -number
    if named:
        pytest.skip("the file system knows no files without a name")
    assert os.listdir(tmp_path) == []


@pytest.mark.parametrize(
    ("n", "text"),
    [(0, "0 bytes"), (99, "99 bytes"), (1000, "1.00 kB"), (123_456, "0.12 MB"), (2 * 10**9, "2.00 GB")],
)
def test_sizes_do_not_round_to_nothing(n: int, text: str) -> None:
    assert errors.size_text(n) == text


@pytest.mark.usefixtures("frozen_heap")
@pytest.mark.filterwarnings("ignore:unclosed file:ResourceWarning")  # Python closes it then
def test_an_interrupt_anywhere_leaves_nothing_open(kind: str, tmp_path: Path) -> None:
    path = tmp_path / "x"

    def write_and_read() -> None:
        with replacing(path, 3) as file:
            file.write(b"abc")
        with FileReader(path) as reader:
            assert reader.read_at(0, 3) == b"abc"

    write_and_read()
    gc.collect()
    files, n_open = {outfiles.__file__, loaders.__file__}, len(os.listdir("/proc/self/fd"))
    places = Interrupts(files)
    places.run(write_and_read)
    assert places.n > 30
    for at in range(1, places.n + 1):
        assert Interrupts(files, at).run(write_and_read)
        gc.collect()
        assert len(os.listdir("/proc/self/fd")) == n_open, at
        assert path.read_bytes() == b"abc"
        assert os.listdir(tmp_path) == ["x"], at
