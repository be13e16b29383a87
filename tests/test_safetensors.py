"""safetensors files and directories: good ones as the `safetensors` package writes them, and broken ones.

Whatever tinyllm reads, the package must read alike; whatever the package refuses, tinyllm must refuse.
"""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest
import safetensors
from conftest import ReadCount
from helpers_hostile import bounded
from hypothesis import given
from hypothesis import strategies as st
from safetensors.numpy import load_file, save_file

from tinyllm.errors import Error, FormatError, NotFoundError, ReadError, UnsupportedError
from tinyllm.files import BF16, F16, F32, MAX_JSON_DEPTH, find_model, parse_json, read_json
from tinyllm.files.safetensors import INDEX, SINGLE, read_safetensors

pytestmark = pytest.mark.usefixtures("frozen_heap")  # memory and blocks of the core are counted

Array = npt.NDArray[Any]


def header_bytes(header: Any) -> bytes:
    raw = header if isinstance(header, bytes) else json.dumps(header).encode()
    return len(raw).to_bytes(8, "little") + raw


def entry(dtype: Any = "F32", shape: Any = (2, 3), offsets: Any = (0, 24), **more: Any) -> dict[str, Any]:
    return {"dtype": dtype, "shape": shape, "data_offsets": offsets, **more}


GOOD = {"a": entry(), "b": entry("BF16", (4,), (24, 32)), "__metadata__": {"format": "pt"}}
DATA = bytes(range(32))


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return tmp_path / "model.safetensors"


def test_package_writer(path: Path) -> None:
    rng = np.random.default_rng(0)
    tensors: dict[str, Array] = {
        "x": rng.standard_normal((3, 5)).astype(np.float32),
        "y": rng.standard_normal((7,)).astype(np.float16),
        "scalar": np.array(2.5, np.float32),
    }
    save_file(tensors, path, metadata={"format": "np"})
    file = read_safetensors(path)
    assert find_model(path) == "safetensors"
    assert file.files == (path,)
    assert file.tensors.keys() == tensors.keys()
    for name, info in file.tensors.items():
        assert info.shape == tensors[name].shape
        assert info.format == (F16 if tensors[name].dtype == np.float16 else F32)
        assert np.array_equal(info.read_f32(), tensors[name].astype(np.float32))


def test_bf16_values(path: Path) -> None:
    words = np.array([0x3F80, 0xC000, 0x0001, 0x7F80], "<u2")  # 1, -2, the least subnormal, infinity
    path.write_bytes(header_bytes({"w": entry("BF16", [2, 2], [0, 8])}) + words.tobytes())
    info = read_safetensors(path).tensors["w"]
    assert info.format == BF16
    assert info.read_f32().tolist() == [[1.0, -2.0], [2.0**-133, np.inf]]


def test_real_models(data_dir: Path, reads: ReadCount) -> None:
    for name in ("stories260K-hf", "babyllama-tok105-hf"):
        directory = data_dir / "models" / name
        before = reads.n_bytes
        file = read_safetensors(directory)
        assert reads.n_bytes - before < 20_000  # the header alone
        values = load_file(directory / SINGLE)
        assert file.tensors.keys() == values.keys()
        for key, info in file.tensors.items():
            assert np.array_equal(info.read_f32(), values[key])


# Header and index, broken

BROKEN: dict[str, tuple[Any, str]] = {
    "not JSON": (b"{", "not valid JSON"),
    "not UTF-8": (b'{"a\xff": 1}', "not UTF-8 at byte 3"),
    "UTF-16": (json.dumps(GOOD).encode("utf-16"), "not UTF-8"),
    "no object": ([], "not a JSON object"),
    "NaN": (b'{"a": NaN}', "NaN is no JSON"),
    "huge number": (b'{"a": ' + b"9" * 5000 + b"}", "not valid JSON|exactly"),
    "duplicate tensor": (b'{"a": 1, "a": 2}', "'a' appears twice"),
    "duplicate field": (b'{"a": {"dtype": "F32", "dtype": "F32"}}', "'dtype' appears twice"),
    "too deep": (b'{"a": ' + b"[" * 100 + b"]" * 100 + b"}", "nested deeper"),
    "far too deep": (b'{"a": ' + b"[" * 200_000 + b"]" * 200_000 + b"}", "nested"),
    "metadata": ({"__metadata__": {"a": 1}}, "must map strings to strings"),
    "metadata list": ({"__metadata__": []}, "must map strings to strings"),
    "empty name": ({"": entry()}, "empty name"),
    "entry list": ({"a": [1]}, "must have exactly"),
    "field missing": ({"a": {"dtype": "F32", "shape": [6]}}, "must have exactly"),
    "field unknown": ({"a": entry(extra=1)}, "must have exactly"),
    "dtype of a number": ({"a": entry(7)}, "dtype is not a string"),
    "dtype unsupported": ({"a": entry("I16")}, "has dtype 'I16'; F32, F16 and BF16 are supported"),
    "dtype unknown": ({"a": entry("F33")}, "has dtype 'F33'"),
    "shape": ({"a": entry(shape="23")}, "shape must be a list"),
    "shape negative": ({"a": entry(shape=[-2, -3])}, "shape must be a list"),
    "shape float": ({"a": entry(shape=[2.0, 3])}, "shape must be a list"),
    "shape bool": ({"a": entry(shape=[True, 6])}, "shape must be a list"),
    "shape zero": ({"a": entry(shape=[0, 3], offsets=[0, 0])}, "dimension of 0"),
    "shape deep": ({"a": entry(shape=[1] * 9)}, "at most 8"),
    "shape overflow": ({"a": entry(shape=[2**62, 2**62])}, "takes"),
    "offsets three": ({"a": entry(offsets=[0, 8, 24])}, "data_offsets must be two"),
    "offsets descend": ({"a": entry(offsets=[24, 0])}, "ascending"),
    "offsets negative": ({"a": entry(offsets=[-24, 0])}, "data_offsets must be two"),
    "offsets huge": ({"a": entry(offsets=[2**64, 2**64 + 24])}, "data_offsets must be two"),
    "offsets bool": ({"a": entry(offsets=[False, 24])}, "data_offsets must be two"),
    "too few bytes": (
        {"a": entry(offsets=[0, 20])},
        r"shape \(2, 3\) of F32 takes 24 bytes, its data_offsets 20",
    ),
    "gap before": ({"a": entry(offsets=[8, 32])}, "leaves a gap after the header"),
    "gap": ({"a": entry(offsets=[0, 24]), "b": entry("F32", [1], [28, 32])}, "leaves a gap after tensor 'a'"),
    "overlap": ({"a": entry(offsets=[0, 24]), "b": entry("F32", [3], [20, 32])}, "overlaps tensor 'a'"),
    "past the end": ({"a": entry("F32", [9], [0, 36])}, "truncated download"),
    "bytes left over": ({"a": entry()}, "belongs to no tensor"),
    "nothing but data": ({}, "belongs to no tensor"),
}


@pytest.mark.parametrize("name", BROKEN)
def test_broken(name: str, path: Path, reads: ReadCount) -> None:
    header, message = BROKEN[name]
    path.write_bytes(header_bytes(header) + DATA)
    with (
        bounded(reads, path.stat().st_size),
        pytest.raises((FormatError, UnsupportedError), match=r"model\.safetensors: .*(" + message + ")"),
    ):
        read_safetensors(path)


def test_header_length(path: Path, reads: ReadCount) -> None:
    for claimed in (2**64 - 1, 2**63, 2**40, 100):
        path.write_bytes(claimed.to_bytes(8, "little") + b"{}")
        with pytest.raises(FormatError, match=f"claims a header of {claimed} bytes, but the file has 10"):
            read_safetensors(path)
    path.write_bytes((2**30).to_bytes(8, "little"))
    os.truncate(path, 2**40)
    with pytest.raises(FormatError, match="claims a header"):
        read_safetensors(path)
    assert reads.n_bytes == 8 * 5


def test_truncation_at_every_byte(path: Path) -> None:
    raw = header_bytes(GOOD) + DATA
    path.write_bytes(raw)
    assert len(read_safetensors(path).tensors) == 2
    for n in range(len(raw) - 1, -1, -1):
        os.truncate(path, n)
        with pytest.raises(FormatError):
            read_safetensors(path)


def test_not_a_readable_file(tmp_path: Path) -> None:
    with pytest.raises(NotFoundError, match="no such file"):
        read_safetensors(tmp_path / "nothing.safetensors")
    os.mkfifo(tmp_path / "pipe")
    with pytest.raises(ReadError, match="not a regular file"):
        read_safetensors(tmp_path / "pipe")
    with pytest.raises(NotFoundError, match=f"holds neither {SINGLE} nor {INDEX}$"):
        read_safetensors(tmp_path)
    (tmp_path / "pytorch_model.bin").touch()
    with pytest.raises(NotFoundError, match=r"'pytorch_model\.bin' must be converted to safetensors first"):
        read_safetensors(tmp_path)


SHARDS: dict[str, dict[str, Array]] = {
    "s1.safetensors": {"a": np.ones((2, 2), np.float32), "b": np.zeros(3, np.float16)},
    "s2.safetensors": {"c": np.full(4, 7, np.float32)},
}
WEIGHT_MAP = {name: file for file, tensors in SHARDS.items() for name in tensors}


def write_shards(directory: Path, weight_map: Mapping[str, Any] = WEIGHT_MAP) -> None:
    directory.mkdir(exist_ok=True)
    for file, tensors in SHARDS.items():
        save_file(tensors, directory / file)
    (directory / INDEX).write_text(json.dumps({"metadata": {"total_size": 38}, "weight_map": weight_map}))


def test_shards(tmp_path: Path) -> None:
    write_shards(tmp_path)
    file = read_safetensors(tmp_path)
    assert {name: info.path.name for name, info in file.tensors.items()} == WEIGHT_MAP
    assert [p.name for p in file.files] == sorted(SHARDS)
    assert file.tensors["c"].read_f32().tolist() == [7.0] * 4


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("/etc/s1.safetensors", "no plain file name"),
        ("../s1.safetensors", "no plain file name"),
        ("sub/../s1.safetensors", "no plain file name"),
        ("sub\\s1.safetensors", "no plain file name"),
        ("..", "no plain file name"),
        ("", "no plain file name"),
        ("s1\0", "no plain file name"),
        ("s1\ud800", "no plain file name"),
        (7, "no plain file name"),
        (["s1.safetensors"], "no plain file name"),
    ],
)
def test_index_names(name: Any, message: str, tmp_path: Path) -> None:
    write_shards(tmp_path, {**WEIGHT_MAP, "a": name})
    with pytest.raises(FormatError, match=message):
        read_safetensors(tmp_path)


def test_index_broken(tmp_path: Path) -> None:
    write_shards(tmp_path, {**WEIGHT_MAP, "d": "s3.safetensors"})
    with pytest.raises(
        NotFoundError, match=r"s3\.safetensors: this shard, named by .*index\.json, is missing"
    ):
        read_safetensors(tmp_path)
    write_shards(tmp_path, {**WEIGHT_MAP, "c": "s1.safetensors", "d": "s2.safetensors"})
    with pytest.raises(FormatError, match=r"do not hold: 'c' in s1\.safetensors, 'd' in s2\.safetensors$"):
        read_safetensors(tmp_path)
    for broken in (
        "{}",
        '{"weight_map": []}',
        '{"weight_map": {}}',
        "[]",
        '{"weight_map": {}, "weight_map": {}}',
    ):
        (tmp_path / INDEX).write_text(broken)
        with pytest.raises(FormatError, match=r"index\.json: "):
            read_safetensors(tmp_path)


def test_hugging_face_cache_snapshot(tmp_path: Path) -> None:
    """A snapshot is a folder of links to blobs named by hash; shards are sought beside the links."""
    blobs, snapshot = tmp_path / "blobs", tmp_path / "snapshots" / "0123abc"
    write_shards(blobs)
    snapshot.mkdir(parents=True)
    (blobs / "config.json").write_text('{"model_type": "llama"}')
    for i, name in enumerate([*SHARDS, INDEX, "config.json"]):
        (blobs / name).rename(blobs / f"{i:064x}")
        (snapshot / name).symlink_to(Path("..") / ".." / "blobs" / f"{i:064x}")
    assert find_model(snapshot) == "directory"
    file = read_safetensors(snapshot)
    assert [p.parent for p in file.files] == [snapshot, snapshot]
    assert file.tensors["c"].read_f32().tolist() == [7.0] * 4
    assert read_json(snapshot / "config.json") == {"model_type": "llama"}
    (snapshot / "s2.safetensors").unlink()
    (snapshot / "s2.safetensors").symlink_to("nowhere")
    with pytest.raises(NotFoundError, match="s2"):
        read_safetensors(snapshot)


def test_single_file_goes_before_the_index(tmp_path: Path) -> None:
    write_shards(tmp_path)
    save_file({"only": np.ones(1, np.float32)}, tmp_path / SINGLE)
    assert list(read_safetensors(tmp_path).tensors) == ["only"]


# JSON and what is no model


def test_json_depth() -> None:
    def nested(depth: int) -> bytes:
        return b'{"a":' * (depth - 1) + b"{}" + b"}" * (depth - 1)

    assert parse_json(nested(MAX_JSON_DEPTH), "x")
    with pytest.raises(FormatError, match="x: nested deeper than"):
        parse_json(nested(MAX_JSON_DEPTH + 1), "x")


def test_json_file(tmp_path: Path) -> None:
    path = tmp_path / "config.json"
    path.write_text("[1]")
    with pytest.raises(FormatError, match=r"config\.json: expected a JSON object, found list"):
        read_json(path)
    os.truncate(path, 2**40)
    with pytest.raises(FormatError, match="too many for such a file"):
        read_json(path)


@pytest.mark.parametrize(
    ("head", "message"),
    [
        (b"", "the file is empty"),
        (b"<!DOCTYPE html><html>", "a web page"),
        (b"\n <HTML><head>", "a web page"),
        (b"version https://git-lfs.github.com/spec/v1\noid sha256:00\n", "git lfs pull"),
        (b"PK\x03\x04" + bytes(60), "PyTorch pickle.*convert it to safetensors"),
        (b"\x80\x02}q\x00", "PyTorch pickle"),
        (b"tjgg" + bytes(60), "from before GGUF"),
        (b'{"model_type": "llama"}', "name the directory"),
        (
            b"GGUX" + bytes(60),
            r"starts with b'GGUX\\x00\\x00\\x00\\x00'; expected a GGUF file or a directory",
        ),
        (b"\xff" * 8 + b"{", "starts with"),
    ],
)
def test_not_a_model(head: bytes, message: str, tmp_path: Path) -> None:
    path = tmp_path / "model.gguf"  # the extension decides nothing
    path.write_bytes(head)
    with pytest.raises(FormatError, match=r"model\.gguf: not a model: .*" + message):
        find_model(path)


def test_find_model(tmp_path: Path) -> None:
    with pytest.raises(NotFoundError, match="no such file"):
        find_model(tmp_path / "nothing")
    with pytest.raises(FormatError, match=r"has no config\.json"):
        find_model(tmp_path)
    (tmp_path / "m.gguf").touch()
    with pytest.raises(FormatError, match=r"name one of them: 'm\.gguf'"):
        find_model(tmp_path)
    (tmp_path / "config.json").touch()
    assert find_model(tmp_path) == "directory"


# Random headers against the package


def package_reads(path: Path) -> dict[str, Any] | None:
    """The tensors as the package sees them, or None where it refuses the file."""
    try:
        with safetensors.safe_open(path, framework="numpy") as file:
            return {name: file.get_slice(name) for name in file.keys()}  # noqa: SIM118
    except safetensors.SafetensorError:
        return None


leaves = st.one_of(st.none(), st.booleans(), st.integers(-3, 70), st.text(max_size=3))
numbers = st.one_of(st.integers(-1, 40), st.sampled_from([2**32, 2**63, 2**64]), leaves)
entries = st.fixed_dictionaries(
    {
        "dtype": st.one_of(st.sampled_from(["F32", "F16", "BF16", "I8"]), leaves),
        "shape": st.one_of(st.lists(st.integers(1, 3), max_size=3), st.lists(numbers, max_size=3)),
        "data_offsets": st.one_of(
            st.sampled_from([[0, 24], [0, 12], [24, 32], [12, 32]]), st.lists(numbers, max_size=3)
        ),
    }
)
fitting = st.builds(
    lambda dtype, n: {"dtype": dtype, "n": n}, st.sampled_from(["F32", "F16", "BF16"]), st.integers(1, 4)
)


@st.composite
def headers(draw: st.DrawFn) -> tuple[dict[str, Any], int]:
    """A right header and the size of its data, into which up to two wrong things are put."""
    header: dict[str, Any] = {}
    end = 0
    for i, part in enumerate(draw(st.lists(fitting, max_size=3))):
        start, end = end, end + part["n"] * (4 if part["dtype"] == "F32" else 2)
        header[f"t{i}"] = entry(part["dtype"], [part["n"]], [start, end])
    for _ in range(draw(st.integers(0, 2))):
        name = draw(st.sampled_from(["t0", "t1", "x", "", "__metadata__"]))
        if isinstance(header.get(name), dict) and draw(st.booleans()):
            field = draw(st.sampled_from(["dtype", "shape", "data_offsets"]))
            header[name][field] = draw(entries)[field]
        else:
            header[name] = draw(st.one_of(entries, leaves))
    return header, max(end + draw(st.sampled_from([0, 0, 0, 1, -1])), 0)


@given(headers())
def test_random_headers(tmp_path: Path, made: tuple[dict[str, Any], int]) -> None:
    header, n_bytes = made
    path = tmp_path / "random.safetensors"
    path.write_bytes(header_bytes(header) + bytes(n_bytes))
    reference = package_reads(path)
    try:
        mine = read_safetensors(path).tensors
    except Error as error:
        str(error).encode()
        return
    assert reference is not None
    assert {name: list(info.shape) for name, info in mine.items()} == {
        name: part.get_shape() for name, part in reference.items()
    }


def damage(draw: Callable[[Any], Any], raw: bytearray) -> None:
    for _ in range(draw(st.integers(1, 4))):
        raw[draw(st.integers(0, len(raw) - 1))] = draw(st.integers(0, 255))


@given(st.data())
def test_random_damage(tmp_path: Path, data: st.DataObject) -> None:
    raw = bytearray(header_bytes(GOOD) + DATA)
    damage(data.draw, raw)
    path = tmp_path / "damaged.safetensors"
    path.write_bytes(raw)
    try:
        tensors = read_safetensors(path).tensors
    except Error as error:
        str(error).encode()
        return
    assert package_reads(path) is not None
    assert sum(t.n_bytes for t in tensors.values()) <= len(raw)
