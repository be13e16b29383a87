"""GGUF headers: good files as the `gguf` package writes them, and every way of being broken.

Broken files are built by helpers_hostile.encode, field by field, so that each field can lie.
"""

from __future__ import annotations

import itertools
import os
import struct
import tracemalloc
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import pytest
from conftest import ReadCount
from helpers_formats import kind_of, size
from helpers_hostile import ARRAY, BOOL, F32, I32, STRING, U32, U64, File, T, array, bounded, encode, scalar
from hypothesis import given
from hypothesis import strategies as st

from tinyllm.errors import Error, FormatError, NotFoundError, ReadError, UnsupportedError
from tinyllm.files import CHUNK_BYTES, FORMATS, GGUF_FORMATS, find_model
from tinyllm.files import gguf as loader
from tinyllm.files.gguf import read_gguf

pytestmark = pytest.mark.usefixtures("frozen_heap")  # memory and blocks of the core are counted

GOOD = File(
    [
        ("general.architecture", scalar(STRING, "llama")),
        ("tokenizer.ggml.tokens", array(STRING, ["a", "é", ""])),
        ("tokenizer.ggml.scores", array(F32, [0.0, -1.0, -2.5])),
        ("tokenizer.ggml.token_type", array(I32, [1, 1, 3])),
        ("tokenizer.ggml.eos_token_id", scalar(U32, 2)),
        ("tokenizer.ggml.padding_token_id", scalar(U32, 0xFFFFFFFF)),
        ("flag", scalar(BOOL, 1)),
        ("empty", array(U32, [])),
    ],
    [T("a", (32, 2), 0), T("b", (64, 3, 2), 8), T("c", (5,), 30)],
)


def with_pair(key: str | bytes, value: bytes) -> File:
    return replace(GOOD, pairs=[*GOOD.pairs, (key, value)])


TOKENIZER = "tokenizer.ggml."


def vocabulary(**arrays: bytes) -> File:
    """A file with two tokens and these other arrays."""
    return File(
        [(TOKENIZER + "tokens", array(STRING, ["a", "b"])), *((TOKENIZER + k, v) for k, v in arrays.items())]
    )


def with_tensor(t: T) -> File:
    return replace(GOOD, tensors=[*GOOD.tensors, t])


@pytest.fixture
def read(tmp_path: Path) -> Callable[[bytes], loader.GGUFFile]:
    def write_and_read(raw: bytes) -> loader.GGUFFile:
        path = tmp_path / "model.gguf"
        path.write_bytes(raw)
        return read_gguf(path)

    return write_and_read


Read = Callable[[bytes], loader.GGUFFile]


def write_reference(path: Path, tensors: dict[str, np.ndarray[Any, Any]], **kwargs: Any) -> None:
    """A file by the reference writer, with a value of every kind."""
    writer = gguf.GGUFWriter(path, "llama", **kwargs)
    writer.add_uint8("u8", 200)
    writer.add_int8("i8", -100)
    writer.add_uint16("u16", 60000)
    writer.add_int16("i16", -30000)
    writer.add_uint32("u32", 4_000_000_000)
    writer.add_int32("i32", -2_000_000_000)
    writer.add_uint64("u64", 2**63)
    writer.add_int64("i64", -(2**62))
    writer.add_float32("f32", 0.5)
    writer.add_float64("f64", 0.1)
    writer.add_bool("yes", True)
    writer.add_string("text", "naïve \n text")
    writer.add_array("strings", ["", "x", "Ġé"])
    writer.add_array("ints", [1, -2, 3])
    writer.add_array("floats", [0.5, -0.25])
    writer.add_array("bools", [True, False])
    for name, values in tensors.items():
        writer.add_tensor(name, values)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def test_reference_writer(tmp_path: Path) -> None:
    path = tmp_path / "reference"
    rng = np.random.default_rng(0)
    tensors: dict[str, np.ndarray[Any, Any]] = {
        "one": rng.standard_normal(7).astype(np.float32),
        "two": rng.standard_normal((3, 64)).astype(np.float16),
        "three": rng.standard_normal((2, 3, 32)).astype(np.float32),
    }
    write_reference(path, tensors)
    file = read_gguf(path)
    assert find_model(path) == "gguf"
    assert file.files == (path,)
    scalars = {
        "u8": 200,
        "i8": -100,
        "u16": 60000,
        "i16": -30000,
        "u32": 4_000_000_000,
        "i32": -2_000_000_000,
        "u64": 2**63,
        "i64": -(2**62),
        "f32": 0.5,
        "f64": 0.1,
        "yes": True,
        "text": "naïve \n text",
        "general.architecture": "llama",
    }
    for key, value in scalars.items():
        assert file.metadata[key] == value
        assert type(file.metadata[key]) is type(value)
    assert file.metadata["strings"] == ["", "x", "Ġé"]
    assert file.metadata["ints"].tolist() == [1, -2, 3]
    assert file.metadata["floats"].tolist() == [0.5, -0.25]
    assert file.metadata["bools"].tolist() == [True, False]
    assert list(file.tensors) == list(tensors)
    for name, values in tensors.items():
        assert file.tensors[name].shape == values.shape
        assert file.tensors[name].n_bytes == values.nbytes
        assert np.array_equal(file.tensors[name].read_f32(), values.astype(np.float32))


@pytest.mark.parametrize("version", [2, 3])
def test_versions_2_and_3(version: int, read: Read) -> None:
    file = read(encode(replace(GOOD, version=version)))
    assert file.tensors["b"].shape == (2, 3, 64)
    assert [t.format for t in file.tensors.values()] == [0, 8, 30]


def test_every_format_has_the_size_that_gguf_gives_it(read: Read) -> None:
    for number, form in GGUF_FORMATS.items():
        kind = kind_of(form.name)
        assert (int(kind), *size(kind)) == (number, form.block, form.block_bytes)
        info = read(encode(File(tensors=[T("w", (512, 3), number)]))).tensors["w"]
        assert info.n_bytes == 512 * 3 // form.block * form.block_bytes


def test_formats_equal_the_cores() -> None:
    from tinyllm import _core

    core = {number: (name.upper(), block, n_bytes) for number, name, block, n_bytes, *_ in _core.formats()}
    assert core == {number: (f.name, f.block, f.block_bytes) for number, f in FORMATS.items()}


def test_real_files_equal_the_reference_reader(data_dir: Path) -> None:
    paths = [data_dir / "models/stories260K/stories260K.gguf", data_dir / "vocab/ggml-vocab-llama-spm.gguf"]
    for path in paths:
        file, reference = read_gguf(path), gguf.GGUFReader(path)
        for key, entry in reference.fields.items():
            value = entry.contents()
            if key.startswith("GGUF.") or value == 0xFFFFFFFF:
                assert key not in file.metadata
                continue
            mine = file.metadata[key]
            assert (mine.tolist() if isinstance(mine, np.ndarray) else mine) == value
        assert len(file.metadata) == sum(
            1 for k, e in reference.fields.items() if not k.startswith("GGUF.") and e.contents() != 0xFFFFFFFF
        )
        for t in reference.tensors:
            info = file.tensors[t.name]
            assert info.shape == tuple(int(n) for n in reversed(t.shape))
            assert (info.format, info.offset, info.n_bytes) == (int(t.tensor_type), t.data_offset, t.n_bytes)


@pytest.mark.parametrize("name", ["llama-bpe", "llama-spm", "deepseek-llm", "gpt-2", "phi-3", "qwen2"])
def test_vocabularies(name: str, data_dir: Path, reads: ReadCount) -> None:
    path = data_dir / f"vocab/ggml-vocab-{name}.gguf"
    file = read_gguf(path)
    assert len(file.metadata["tokenizer.ggml.tokens"]) >= 32000
    assert file.tensors == {}
    # Strings that straddle the window's border are kept, not read again.
    assert reads.n_bytes == path.stat().st_size
    assert reads.calls <= path.stat().st_size // CHUNK_BYTES + 3


def test_strings_across_window_borders(read: Read) -> None:
    strings = ["x" * n for n in (0, 1, CHUNK_BYTES - 40, 3, 2 * CHUNK_BYTES + 1, 7)] + ["é" * 50_000] * 12
    file = read(encode(File([("strings", array(STRING, strings)), ("last", scalar(U32, 7))])))
    assert file.metadata["strings"] == strings
    assert file.metadata["last"] == 7


def test_alignment(read: Read) -> None:
    raw = encode(File([("general.alignment", scalar(U32, 256))], [T("a"), T("b")], alignment=256))
    tensors = read(raw).tensors
    assert tensors["b"].offset == tensors["a"].offset + 256
    assert tensors["a"].offset % 256 == 0


def test_ids_that_mean_none_are_left_out(read: Read) -> None:
    metadata = read(encode(GOOD)).metadata
    assert "tokenizer.ggml.padding_token_id" not in metadata
    assert metadata["tokenizer.ggml.eos_token_id"] == 2


def strings_of(second: bytes, n: int | None = None) -> bytes:
    """An array of two strings, the second of which says that it has n bytes."""
    first = struct.pack("<IIQQ", ARRAY, STRING, 2, 1) + b"a"
    return first + struct.pack("<Q", len(second) if n is None else n) + second


BROKEN: dict[str, tuple[File, str]] = {
    "magic": (replace(GOOD, magic=b"GGML"), "not a GGUF file"),
    "version 0": (replace(GOOD, version=0), "version 0"),
    "version 1": (replace(GOOD, version=1), "version 1 is too old"),
    "version huge": (replace(GOOD, version=0x7FFFFFFF), "version 2147483647 is unknown"),
    "version byte-swapped": (replace(GOOD, version=0x03000000), "big-endian"),
    "tensor count": (replace(GOOD, n_tensors=2**64 - 1), "is it a truncated download"),
    "pair count": (replace(GOOD, n_pairs=2**63), "is it a truncated download"),
    "empty key": (with_pair("", scalar(U32, 1)), "length of 0"),
    "long key": (with_pair("k" * 65536, scalar(U32, 1)), "length of 65536"),
    "key not UTF-8": (with_pair(b"\xff", scalar(U32, 1)), "not UTF-8"),
    "duplicate key": (with_pair("flag", scalar(BOOL, 0)), "'flag' appears twice"),
    "value type": (with_pair("x", struct.pack("<II", 13, 0)), "unknown value type 13"),
    "element type": (with_pair("x", struct.pack("<IIQ", ARRAY, 77, 0)), "unknown value type 77"),
    "nested array": (with_pair("x", struct.pack("<IIQIQI", ARRAY, ARRAY, 1, U32, 1, 7)), "array of arrays"),
    "array length": (with_pair("x", array(U32, [1], count=5000)), "needs 20000 bytes"),
    "string array length": (with_pair("x", array(STRING, ["a"], count=2**61)), "'x' needs"),
    "string length": (with_pair("x", struct.pack("<IQ", STRING, 2**64 - 1) + b"abc"), "'x' needs"),
    "string not UTF-8": (with_pair("x", scalar(STRING, b"a\xff")), "'x' is not UTF-8"),
    "element not UTF-8": (with_pair("x", array(STRING, ["a", b"\xc3"])), "element 1 of 'x' is not UTF-8"),
    "element of all lengths": (with_pair("x", strings_of(b"ab", n=2**64 - 1)), "needs 18446744073709551623"),
    "element that turns back": (with_pair("x", strings_of(b"ab", n=2**64 - 8)), "needs 18446744073709551616"),
    "element of a negative length": (with_pair("x", strings_of(b"ab", n=2**63)), "'x' needs 922337203685477"),
    "element past the end": (with_pair("x", strings_of(b"ab", n=5000)), "'x' needs 5008 bytes"),
    "element of a surrogate": (with_pair("x", strings_of(b"\xed\xa0\x80")), "element 1 of 'x' is not UTF-8"),
    "element spelled too long": (with_pair("x", strings_of(b"\xc0\x80")), "element 1 of 'x' is not UTF-8"),
    "bool": (with_pair("x", scalar(BOOL, 2)), "neither 0 nor 1"),
    "bools": (with_pair("x", array(BOOL, [1, 255])), "neither 0 nor 1"),
    "alignment 0": (with_pair("general.alignment", scalar(U32, 0)), "power of two"),
    "alignment 48": (with_pair("general.alignment", scalar(U32, 48)), "power of two"),
    "alignment huge": (with_pair("general.alignment", scalar(U32, 1 << 31)), "power of two"),
    "alignment type": (with_pair("general.alignment", scalar(U64, 32)), "uint32"),
    "alignment string": (with_pair("general.alignment", scalar(STRING, "32")), "uint32"),
    "alignment array": (with_pair("general.alignment", array(U32, [32])), "uint32"),
    "no dimensions": (with_tensor(T("x", ())), "0 dimensions"),
    "five dimensions": (with_tensor(T("x", (1, 1, 1, 1, 1))), "5 dimensions"),
    "rank huge": (with_tensor(T("x", (1,), n_dims=2**32 - 1)), "4294967295 dimensions"),
    "dimension 0": (with_tensor(T("x", (32, 0))), "dimension of 0"),
    "dimension negative": (with_tensor(T("x", (2**64 - 32,))), "would take"),
    "product overflow": (with_tensor(T("x", (2**33, 2**33))), "would take"),
    "product overflows to few": (with_tensor(T("x", (2**32, 2**32))), "would take"),
    "bytes overflow": (with_tensor(T("x", (2**62,))), "would take"),
    "partial block": (with_tensor(T("x", (33, 32), 8)), "Q8_0 blocks hold 32"),
    "partial super-block": (with_tensor(T("x", (128, 2), 14)), "Q6_K blocks hold 256"),
    "type unknown": (with_tensor(T("x", type=99)), "number 99, which is unknown"),
    "type unsupported": (with_tensor(T("x", (256,), 15)), "Q8_K"),
    "unaligned": (with_tensor(T("x", offset=4)), "no multiple of the alignment"),
    "overlap": (with_tensor(T("x", offset=0)), "overlap"),
    "offset past the end": (with_tensor(T("x", offset=1 << 40)), "is it a truncated download"),
    "offset overflow": (with_tensor(T("x", offset=2**64 - 32)), "is it a truncated download"),
    "duplicate tensor": (with_tensor(T("a")), "'a' appears twice"),
    "empty tensor name": (with_tensor(T("")), "length of 0"),
    "scores too short": (vocabulary(scores=array(F32, [1.0])), "scores has 1 elements for 2 tokens"),
    "types too long": (vocabulary(token_type=array(I32, [1, 1, 1])), "token_type has 3 elements for 2"),
    "types without tokens": (File([(TOKENIZER + "token_type", array(I32, [1]))]), "1 elements for 0 tokens"),
    "scores of ints": (vocabulary(scores=array(I32, [1, 1])), "array of floats"),
    "types of floats": (vocabulary(token_type=array(F32, [1, 1])), "array of integers"),
    "tokens of ints": (File([("tokenizer.ggml.tokens", array(U32, [1]))]), "array of strings"),
    "merges scalar": (with_pair("tokenizer.ggml.merges", scalar(STRING, "a b")), "array of strings"),
    "id out of range": (with_pair("tokenizer.ggml.bos_token_id", scalar(U32, 3)), "there are 3 tokens"),
    "id negative": (with_pair("tokenizer.ggml.bos_token_id", scalar(I32, -2)), "there are 3 tokens"),
    "id of a string": (with_pair("tokenizer.ggml.bos_token_id", scalar(STRING, "1")), "must be a token id"),
    "id of a bool": (with_pair("tokenizer.ggml.bos_token_id", scalar(BOOL, 1)), "must be a token id"),
    "split.count": (with_pair("split.count", scalar(STRING, "2")), "whole number"),
}  # fmt: skip


@pytest.mark.parametrize("name", BROKEN)
def test_broken(name: str, read: Read, reads: ReadCount) -> None:
    file, message = BROKEN[name]
    raw = encode(file)
    with (
        bounded(reads, len(raw)),
        pytest.raises((FormatError, UnsupportedError), match=r"model\.gguf: .*" + message),
    ):
        read(raw)


def test_truncation_at_every_byte(tmp_path: Path) -> None:
    raw = encode(GOOD)
    path = tmp_path / "cut.gguf"
    path.write_bytes(raw)
    assert len(read_gguf(path).tensors) == 3
    last = raw.rindex(b"\0" * 32)  # padding after the last tensor's 10 bytes may be missing
    end = max(t.offset + t.n_bytes for t in read_gguf(path).tensors.values())
    assert last <= end <= len(raw)
    for n in range(end - 1, -1, -1):
        os.truncate(path, n)
        with pytest.raises(FormatError, match=r"truncated download|not a GGUF file"):
            read_gguf(path)
    path.write_bytes(raw[:end])
    assert len(read_gguf(path).tensors) == 3


def test_not_a_readable_file(tmp_path: Path) -> None:
    with pytest.raises(NotFoundError, match=r"nothing\.gguf: no such file"):
        read_gguf(tmp_path / "nothing.gguf")
    with pytest.raises(ReadError, match="not a regular file"):
        read_gguf(tmp_path)
    os.mkfifo(tmp_path / "pipe")
    with pytest.raises(ReadError, match="not a regular file"):
        read_gguf(tmp_path / "pipe")
    with pytest.raises(ReadError, match="cannot be opened"):
        read_gguf("nul\0byte")
    (tmp_path / "empty").touch()
    with pytest.raises(FormatError, match="truncated"):
        read_gguf(tmp_path / "empty")


def test_file_cut_while_it_is_read(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "model.gguf"
    path.write_bytes(encode(GOOD))
    info = read_gguf(path).tensors["a"]
    pread = os.pread

    def cut(fd: int, n: int, offset: int) -> bytes:
        os.truncate(path, info.offset + 4)
        return pread(fd, n, offset)

    monkeypatch.setattr(os, "pread", cut)
    with pytest.raises(FormatError, match=f"{info.n_bytes - 4} bytes at offset {info.offset + 4} are gone"):
        info.read_f32()


LIES = [
    replace(GOOD, n_tensors=2**40),
    replace(GOOD, n_pairs=2**40),
    with_pair("x", array(STRING, [], count=2**40)),
    with_pair("x", array(U64, [], count=2**40)),
    with_pair("x", struct.pack("<IQ", STRING, 2**40)),
    with_tensor(T("x", (2**40,))),
    with_tensor(T("x", (32,), n_dims=2**31)),
    with_pair("split.count", scalar(U32, 2**31 - 1)),
]


@pytest.mark.parametrize("lie", range(len(LIES)))
def test_a_lie_costs_no_more_than_the_file(lie: int, tmp_path: Path, reads: ReadCount) -> None:
    path = tmp_path / "model.gguf"
    path.write_bytes(encode(LIES[lie]))
    tracemalloc.start()
    try:
        with pytest.raises(Error):
            read_gguf(path)
        peak = tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
    size = path.stat().st_size
    assert reads.n_bytes <= size
    assert peak < 100 * size + (
        1 << 18
    )  # objects for each entry of the file, and the interpreter's own caches


def test_a_huge_file_costs_no_more_than_its_header(tmp_path: Path, reads: ReadCount) -> None:
    path = tmp_path / "sparse.gguf"
    path.write_bytes(encode(File([("x", struct.pack("<IQ", STRING, 2**40))])))
    os.truncate(path, 2**41)
    with pytest.raises(FormatError, match="a header of more than"):
        read_gguf(path)
    assert reads.n_bytes <= CHUNK_BYTES


# Split sets


def split_pairs(number: int, count: int, total: int) -> list[tuple[str | bytes, bytes]]:
    return [
        ("split.no", scalar(U32, number)),
        ("split.count", scalar(U32, count)),
        ("split.tensors.count", scalar(I32, total)),
    ]


def part_path(directory: Path, number: int, count: int) -> Path:
    return directory / f"m-{number + 1:05}-of-{count:05}.gguf"


def write_split(directory: Path, count: int = 3) -> Path:
    for i in range(count):
        pairs = split_pairs(i, count, count)
        if i == 0:
            pairs.append(("general.architecture", scalar(STRING, "llama")))
        raw = encode(File(pairs, [T(f"t{i}")]))
        part_path(directory, i, count).write_bytes(raw)
    return part_path(directory, 0, count)


def test_split_set(tmp_path: Path) -> None:
    first = write_split(tmp_path)
    file = read_gguf(first)
    assert list(file.tensors) == ["t0", "t1", "t2"]
    assert file.files == tuple(part_path(tmp_path, i, 3) for i in range(3))
    assert [file.tensors[f"t{i}"].path for i in range(3)] == list(file.files)
    assert file.metadata["general.architecture"] == "llama"


def test_split_set_by_the_reference_writer(tmp_path: Path) -> None:
    tensors = {f"t{i}": np.full((4, 32), i, np.float32) for i in range(5)}
    write_reference(tmp_path / "m.gguf", tensors, split_max_tensors=2)
    file = read_gguf(tmp_path / "m-00001-of-00003.gguf")
    assert len(file.files) == 3
    assert file.metadata["text"] == "naïve \n text"
    for name, values in tensors.items():
        assert np.array_equal(file.tensors[name].read_f32(), values)


def test_split_set_through_links(tmp_path: Path) -> None:
    """Siblings are sought beside the path as given, not beside what a link points to."""
    blobs, snapshot = tmp_path / "blobs", tmp_path / "snapshot"
    blobs.mkdir()
    snapshot.mkdir()
    write_split(tmp_path)
    for i in range(3):
        part_path(tmp_path, i, 3).rename(blobs / f"blob{i}")
        part_path(snapshot, i, 3).symlink_to(Path("..") / "blobs" / f"blob{i}")
    assert len(read_gguf(part_path(snapshot, 0, 3)).tensors) == 3


def rewrite(directory: Path, number: int, file: File) -> None:
    part_path(directory, number, 3).write_bytes(encode(file))


def test_split_set_broken(tmp_path: Path) -> None:
    first = write_split(tmp_path)

    def refused(message: str, kind: type[Error] = FormatError, path: Path = first) -> None:
        with pytest.raises(kind, match=message):
            read_gguf(path)
        write_split(tmp_path)
        assert len(read_gguf(first).tensors) == 3

    part_path(tmp_path, 1, 3).unlink()
    refused("m-00002-of-00003.gguf: part 2 of 3 is missing", NotFoundError)
    part_path(tmp_path, 1, 3).write_bytes(part_path(tmp_path, 2, 3).read_bytes())
    refused("m-00002-of-00003.gguf: split.no is 2, expected 1")
    rewrite(tmp_path, 1, File(split_pairs(1, 4, 3), [T("t1")]))
    refused("split.count is 4, expected 3")
    rewrite(tmp_path, 1, File(split_pairs(1, 3, 7), [T("t1")]))
    refused("split.tensors.count is 7, expected 3")
    rewrite(tmp_path, 1, File([], [T("t1")]))
    refused("split.no must be a whole number")
    rewrite(tmp_path, 1, File(split_pairs(1, 3, 3), [T("t0")]))
    refused("an earlier part holds already: 't0'")
    rewrite(tmp_path, 1, File(split_pairs(1, 3, 3), [T("t1"), T("t9")]))
    refused("split.tensors.count is 3, but the parts hold 4")
    foreign = [*split_pairs(1, 3, 3), ("general.architecture", scalar(STRING, "gpt2"))]
    rewrite(tmp_path, 1, File(foreign, [T("t1")]))
    refused("general.architecture is another")
    rewrite(tmp_path, 1, replace(GOOD, magic=b"????"))
    refused("m-00002-of-00003.gguf: not a GGUF file")
    refused("this is part 2 of 3; name the first part, m-00001-of-00003.gguf", path=part_path(tmp_path, 1, 3))
    renamed = tmp_path / "other.gguf"
    renamed.write_bytes(first.read_bytes())
    refused("found by name: call the first NAME-00001-of-00003.gguf", path=renamed)
    misnamed = part_path(tmp_path, 1, 5)
    misnamed.write_bytes(first.read_bytes())
    refused("its name must be m-00001-of-00003.gguf", path=misnamed)


# Random files and random damage

names = st.text(min_size=1, max_size=8)
values = st.one_of(
    st.builds(lambda v: scalar(U32, v), st.integers(0, 2**32 - 1)),
    st.builds(lambda v: scalar(F32, v), st.floats(width=32)),
    st.builds(lambda v: scalar(STRING, v), st.text(max_size=20)),
    st.builds(lambda v: array(I32, v), st.lists(st.integers(-(2**31), 2**31 - 1), max_size=5)),
    st.builds(lambda v: array(STRING, v), st.lists(st.text(max_size=5), max_size=5)),
)
sizes = st.one_of(st.integers(0, 70), st.sampled_from([2**31, 2**32, 2**63, 2**64 - 1]))
tensors = st.builds(
    T,
    name=names,
    dims=st.lists(st.integers(1, 3), max_size=3).map(lambda more: (256, *more)),
    type=st.sampled_from(sorted(GGUF_FORMATS)),
)
LIES_OF_A_FILE = {"n_tensors": sizes, "n_pairs": sizes, "version": sizes, "data": st.binary(max_size=300)}
LIES_OF_A_TENSOR = {
    "name": st.sampled_from(["", "w"]),
    "dims": st.lists(sizes, max_size=5).map(tuple),
    "type": st.integers(0, 50),
    "offset": sizes,
    "n_dims": st.integers(0, 6),
}
LIES_OF_A_PAIR = st.one_of(
    st.tuples(st.sampled_from(["general.alignment", "tokenizer.ggml.tokens", "split.count", ""]), values),
    st.tuples(names, st.integers(0, 12).map(lambda kind: struct.pack("<IQQ", kind, 0, 0))),
)


@st.composite
def files(draw: st.DrawFn) -> File:
    """A right file, in which up to two things are then made wrong."""
    file = File(
        pairs=list(draw(st.dictionaries(names, values, max_size=4)).items()),
        tensors=draw(st.lists(tensors, max_size=3, unique_by=lambda t: t.name)),
    )
    for _ in range(draw(st.integers(0, 2))):
        kind = draw(st.sampled_from(["file", "pair", "tensor"]))
        if kind == "pair":
            file.pairs.append(draw(LIES_OF_A_PAIR))
        elif kind == "tensor" and file.tensors:
            name = draw(st.sampled_from(sorted(LIES_OF_A_TENSOR)))
            setattr(draw(st.sampled_from(file.tensors)), name, draw(LIES_OF_A_TENSOR[name]))
        else:
            name = draw(st.sampled_from(sorted(LIES_OF_A_FILE)))
            setattr(file, name, draw(LIES_OF_A_FILE[name]))
    return file


def read_or_refuse(path: Path) -> None:
    try:
        file = read_gguf(path)
    except Error as error:
        str(error).encode()  # fit to be printed
        return
    size = path.stat().st_size
    ranges = sorted((t.offset, t.offset + t.n_bytes) for t in file.tensors.values())
    assert all(0 < start < end <= size for start, end in ranges)
    assert all(before[1] <= after[0] for before, after in itertools.pairwise(ranges))


@given(files())
def test_random_files(tmp_path: Path, file: File) -> None:
    path = tmp_path / "random.gguf"
    path.write_bytes(encode(file))
    read_or_refuse(path)


@given(st.data())
def test_random_damage(tmp_path: Path, data: st.DataObject) -> None:
    raw = bytearray(encode(GOOD))
    for _ in range(data.draw(st.integers(1, 4))):
        at = data.draw(st.integers(0, len(raw) - 8))
        width = data.draw(st.sampled_from([1, 4, 8]))
        value = data.draw(st.one_of(st.integers(0, 300), st.integers(0, 2 ** (8 * width) - 1))) % 2 ** (
            8 * width
        )
        raw[at : at + width] = value.to_bytes(width, "little")
    path = tmp_path / "damaged.gguf"
    path.write_bytes(raw)
    read_or_refuse(path)
