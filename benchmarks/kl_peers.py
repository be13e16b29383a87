"""How far tinyllm and llama.cpp each are from a model's float weights, format by format, on the same files.

    python benchmarks/kl_peers.py stories-f16.gguf q8_0.gguf q4_0.gguf --text held-out.txt

The truth is the float file run by tinyllm with a float32 cache: float32 activations, nothing rounded. Every
other file is run by both engines with the same cache type. Printed are the KL divergence of each from the
truth, the mean difference of the two token by token, and llama.cpp's divergence from its own run of the
float file. Windows are llama-perplexity's. Needs llama-cpp-python (PYTHONPATH may say where its modules
are). Imports tinyllm.measure.quality.
"""

from __future__ import annotations

import argparse
import ctypes
import json
import sys
from collections.abc import Iterator
from contextlib import ExitStack
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

import tinyllm
from tinyllm import backends
from tinyllm.measure import quality

F32 = npt.NDArray[np.float32]
CACHE_TYPES = {"f32": 0, "f16": 1, "q8_0": 8}  # ggml's numbers


class LlamaCpp:
    """llama.cpp's logits of whole windows, at llama_decode."""

    def __init__(self, path: str | Path, n_ctx: int, *, cache_type: str = "f16", threads: int = 1) -> None:
        import llama_cpp

        self._lib: Any = llama_cpp
        self._lib.llama_log_set(quiet(self._lib), None)
        self._lib.llama_backend_init()
        params = self._lib.llama_model_default_params()
        params.n_gpu_layers = 0
        self._model = self._lib.llama_model_load_from_file(str(path).encode(), params)
        if not self._model:
            raise RuntimeError(f"llama.cpp cannot load {path}")
        options = self._lib.llama_context_default_params()
        options.n_ctx = options.n_batch = options.n_ubatch = n_ctx
        options.n_threads = options.n_threads_batch = threads
        options.type_k = options.type_v = CACHE_TYPES[cache_type]
        self._context = self._lib.llama_init_from_model(self._model, options)
        if not self._context:
            raise RuntimeError(f"llama.cpp makes no context for {path}")
        vocabulary = self._lib.llama_model_get_vocab(self._model)
        self._vocab_size = int(self._lib.llama_vocab_n_tokens(vocabulary))

    def logits(self, ids: npt.NDArray[np.int32], first: int) -> F32:
        """float32 [n - first, vocab_size]: what predicts each token of a window [n] from `first` on."""
        lib, n = self._lib, len(ids)
        lib.llama_memory_clear(lib.llama_get_memory(self._context), True)
        batch = lib.llama_batch_init(n, 0, 1)
        try:
            batch.n_tokens = n
            for i, token in enumerate(ids.tolist()):
                batch.token[i], batch.pos[i] = token, i
                batch.n_seq_id[i], batch.seq_id[i][0] = 1, 0
                batch.logits[i] = first - 1 <= i < n - 1
            if lib.llama_decode(self._context, batch):
                raise RuntimeError("llama_decode failed")
            n_rows = n - first
            pointer = ctypes.cast(lib.llama_get_logits(self._context), ctypes.POINTER(ctypes.c_float))
            return np.ctypeslib.as_array(pointer, (n_rows, self._vocab_size)).copy()
        finally:
            lib.llama_batch_free(batch)

    def close(self) -> None:
        self._lib.llama_free(self._context)
        self._lib.llama_model_free(self._model)


_KEPT: list[Any] = []  # the callback must outlive every call of the library


def quiet(lib: Any) -> Any:
    if not _KEPT:
        _KEPT.append(lib.llama_log_callback(lambda level, text, data: None))
    return _KEPT[0]


def llama_cpp_quality(path: str | Path, on: quality.Windows, **options: Any) -> quality.Quality:
    """What llama.cpp makes of a text: its perplexity, counted as llama-perplexity counts it."""
    peer = LlamaCpp(path, on.ids.shape[1], **options)
    comparison = quality.Comparison(1)
    for window in on.ids:
        comparison.add(window[on.first :], [peer.logits(window, on.first)])
    peer.close()
    return comparison.qualities()[0]


def compare(args: argparse.Namespace) -> list[dict[str, Any]]:
    """A row for each file: the divergence of both engines from the truth."""
    threads = args.threads or backends.default_threads()
    options: dict[str, Any] = {"cache_type": args.cache_type, "threads": threads}
    rows = []
    with ExitStack() as stack:

        def ours(path: str, **changed: Any) -> tinyllm.LLM:
            return stack.enter_context(tinyllm.load(path, device="cpu", **{**options, **changed}))

        truth = ours(args.master, cache_type="f32")
        text = Path(args.text).read_text(encoding="utf-8")
        on = quality.text_windows(truth, text, args.context, most=args.chunks)
        n_ctx = on.ids.shape[1]
        own = LlamaCpp(args.master, n_ctx, **options)
        stack.callback(own.close)
        for path in [args.master, *args.models]:
            with tinyllm.load(path, device="cpu", **options) as llm:
                peer = LlamaCpp(path, n_ctx, **options)
                both, from_own = quality.Comparison(3), quality.Comparison(2)
                for window in progress(on.ids, Path(path).name):
                    targets = window[on.first :]
                    theirs = peer.logits(window, on.first)
                    both.add(targets, [*(m.logits(window)[on.first - 1 : -1] for m in (truth, llm)), theirs])
                    from_own.add(targets, [own.logits(window, on.first), theirs])
                peer.close()
            _, our_quality, their_quality = both.qualities()
            rows.append(
                {
                    "model": Path(path).name,
                    "tinyllm": asdict(our_quality),
                    "llama.cpp": asdict(their_quality),
                    "llama.cpp from its own float run": asdict(from_own.qualities()[1]),
                    "kl_difference": asdict(quality.estimate(both.kl[0] - both.kl[1])),
                }
            )
    return rows


def progress(windows: npt.NDArray[np.int32], name: str) -> Iterator[npt.NDArray[np.int32]]:
    for i, window in enumerate(windows):
        if sys.stderr.isatty():
            print(f"\r\x1b[K{name}: window {i + 1} of {len(windows)}", end="", file=sys.stderr, flush=True)
        yield window
    if sys.stderr.isatty():
        print("\r\x1b[K", end="", file=sys.stderr, flush=True)


def table(rows: list[dict[str, Any]]) -> str:
    """Markdown; a row that tinyllm loses is a row like any other."""
    lines = [
        "| file | KL: tinyllm | KL: llama.cpp | difference | tinyllm / llama.cpp | same top: tinyllm "
        "| llama.cpp | llama.cpp from its own float run |",
        "| --- |" + " ---: |" * 7,
    ]
    for row in rows:
        ours, theirs, own = (
            row[name]["divergence"] for name in ("tinyllm", "llama.cpp", "llama.cpp from its own float run")
        )
        tops = [f"{100 * x['same_top']['value']:.2f} %" for x in (ours, theirs)]
        ratio = ours["kl"]["value"] / theirs["kl"]["value"]
        kls = [short(x) for x in (ours["kl"], theirs["kl"], row["kl_difference"])]
        lines.append("| " + " | ".join([row["model"], *kls, f"{ratio:.3f}", *tops, short(own["kl"])]) + " |")
    n_tokens = rows[0]["tinyllm"]["n_tokens"]
    return "\n".join([*lines, "", f"{n_tokens} tokens; ± is the standard error."])


def short(estimate: dict[str, Any]) -> str:
    return f"{estimate['value']:.3e} ± {estimate['error']:.0e}"


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="kl_peers.py", description=(__doc__ or "").split("\n\n")[0])
    add = parser.add_argument
    add("master", metavar="FLOAT.gguf", help="the float file that the others were made from")
    add("models", nargs="*", metavar="MODEL.gguf")
    add("--text", required=True, metavar="FILE", help="a UTF-8 text that the model was not trained on")
    add("-c", "--context", type=int, metavar="N", help="tokens of a window (512)")
    add("--chunks", type=int, metavar="N", help="only the first N windows")
    add("-t", "--threads", type=int, metavar="N", help="of both engines (the physical cores)")
    add("--cache-type", choices=tuple(CACHE_TYPES), default="f16", help="of both engines (f16)")
    add("-o", "--output", choices=("md", "json"), default="md")
    args = parser.parse_args(argv)
    rows = compare(args)
    print(table(rows) if args.output == "md" else json.dumps(rows, indent=2))
    return 0


if __name__ == "__main__":
    sys.exit(main())
