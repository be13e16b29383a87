"""libtinyllm_cuda.so: opened with cffi when first asked for, its GPUs, or in one sentence why none.

Imports errors alone. Only `backends` imports this module, and nothing else opens the library.
"""

from __future__ import annotations

import functools
import os
from pathlib import Path
from typing import Any

from tinyllm.errors import ArgumentError, Error, MemoryLimitError, UnsupportedError

# What tinyllm.h and cuda/tinyllm_cuda.h declare; tests/test_boundary.py compares.
CORE = """
typedef int tl_status;
typedef struct tl_backend tl_backend;
typedef struct tl_message { char text[512]; } tl_message;
"""
INTERFACE = """
typedef struct tl_cuda_info {
    char name[256];
    int major, minor;
    int n_processors;
    uint64_t total_bytes, free_bytes;
    double bandwidth_gb_s;
} tl_cuda_info;
int tl_cuda_abi(void);
int tl_cuda_device_count(tl_message *why);
tl_status tl_cuda_device_info(int device, tl_cuda_info *info, tl_message *message);
tl_status tl_cuda_backend(int device, const tl_backend **backend, tl_message *message);
tl_status tl_cuda_read_bandwidth(int device, double *gb_s, size_t n_bytes, int repetitions,
                                 tl_message *message);
"""
ERRORS = {3: ArgumentError, 4: MemoryLimitError}  # by tl_status; the others: UnsupportedError


class Library:
    """The opened library. Raises UnsupportedError where it cannot be opened or is of another build."""

    def __init__(self, path: Path, abi: int) -> None:
        """abi: what the library has to say of the interface it was built with."""
        if not path.exists():
            raise UnsupportedError(f"there is no {path}")
        import cffi  # half of its 50 ms is spent in cdef, and most machines have no such library

        self.ffi = cffi.FFI()
        self.ffi.cdef(CORE + INTERFACE)
        try:
            self._lib = self.ffi.dlopen(os.fspath(path))
            same = self._lib.tl_cuda_abi() == abi
        except (OSError, AttributeError) as error:
            why = str(error).split(".  Additionally")[0]  # cffi goes on about other ways to name it
            raise UnsupportedError(f"{path} cannot be opened: {why}") from None
        if not same:
            raise UnsupportedError(f"{path} is of another build of tinyllm: install tinyllm again")

    def gpus(self) -> tuple[list[Gpu], str]:
        """The devices that can be used, and "" or why there are none."""
        why = self.ffi.new("tl_message *")
        count = self._lib.tl_cuda_device_count(why)
        reasons, found = [self._text(why)] if count < 1 else [], []
        for index in range(count):
            try:
                found.append(Gpu(self, index))
            except Error as error:
                reasons.append(f"cuda:{index} cannot be used: {error}")
        return found, "" if found else "; ".join(reasons)

    def call(self, name: str, *arguments: Any) -> None:
        """Calls a function that returns a status, and raises what it says."""
        message = self.ffi.new("tl_message *")
        status = getattr(self._lib, name)(*arguments, message)
        if status:
            raise ERRORS.get(status, UnsupportedError)(self._text(message))

    def _text(self, message: Any) -> str:
        return str(self.ffi.string(message.text).decode("utf-8", "replace"))


class Gpu:
    """One device. name: as `device=` takes it, "cuda:0". title: the card's. capability: the compute
    capability, (major, minor). total_bytes: of its memory. bandwidth_gb_s: by its data sheet, 0 where the
    driver does not tell. table: the address of its operations, a tl_backend.

    Raises UnsupportedError for one that this library does not run on.
    """

    def __init__(self, library: Library, index: int) -> None:
        self._library, self._index, self.name = library, index, f"cuda:{index}"
        info = self._info()
        self.title: str = library.ffi.string(info.name).decode("utf-8", "replace")
        self.capability: tuple[int, int] = (info.major, info.minor)
        self.total_bytes: int = info.total_bytes
        self.bandwidth_gb_s: float = info.bandwidth_gb_s
        backend = library.ffi.new("const tl_backend **")
        library.call("tl_cuda_backend", index, backend)
        self.table = int(library.ffi.cast("uintptr_t", backend[0]))

    def _info(self) -> Any:
        info = self._library.ffi.new("tl_cuda_info *")
        self._library.call("tl_cuda_device_info", self._index, info)
        return info

    def free_memory(self) -> int:
        """Bytes of the device's memory that are free now."""
        return int(self._info().free_bytes)

    def read_bandwidth(self, n_bytes: int, repetitions: int) -> float:
        """How fast the device reads n_bytes (at least 1 MB) of its memory now, in GB/s (1e9 bytes)."""
        gb_s = self._library.ffi.new("double *")
        self._library.call("tl_cuda_read_bandwidth", self._index, gb_s, n_bytes, repetitions)
        return float(gb_s[0])


@functools.cache
def look(path: Path, abi: int) -> tuple[list[Gpu], str]:
    """The GPUs that the library at `path` can use, and "" or why there are none. Looks once."""
    try:
        return Library(path, abi).gpus()
    except UnsupportedError as error:
        return [], str(error)
