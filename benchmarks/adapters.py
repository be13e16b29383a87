"""What adapters cost: decoding one text with and without one, and eight texts with eight adapters and
without, in alternating turns.

    python benchmarks/adapters.py MODEL.gguf [--rank 16] [--dtype BF16] [--seconds 60]

Adapters of random numbers stand beside all seven matrices of every layer, as `target_modules="all-linear"`
makes them. Each turn times some steps of the model (`Model.forward`, one token a text, logits of all) without
and with adapters; the medians of the turns are compared, and the fastest ones, which a busy machine disturbs
least. Needs a quiet machine."""

from __future__ import annotations

import argparse
import json
import statistics
import tempfile
import time
from pathlib import Path
from typing import Any

import numpy as np

import tinyllm

MODULES = {
    "self_attn.q_proj": "wq",
    "self_attn.k_proj": "wk",
    "self_attn.v_proj": "wv",
    "self_attn.o_proj": "wo",
    "mlp.gate_proj": "w_gate",
    "mlp.up_proj": "w_up",
    "mlp.down_proj": "w_down",
}
N_TEXTS = 8
STEPS = 4  # of a turn
START = 200  # tokens a text has


def write_adapter(folder: Path, config: Any, rank: int, dtype: str, seed: int) -> Path:
    """A directory as PEFT saves it, with numbers as small as those of a trained adapter."""
    random = np.random.default_rng(seed)
    q, kv = config.n_heads * config.head_dim, config.n_kv_heads * config.head_dim
    shapes = {
        "wq": (q, config.dim), "wk": (kv, config.dim), "wv": (kv, config.dim), "wo": (config.dim, q),
        "w_gate": (config.ff_dim, config.dim), "w_up": (config.ff_dim, config.dim),
        "w_down": (config.dim, config.ff_dim),
    }  # fmt: skip
    header: dict[str, Any] = {}
    blobs: list[bytes] = []
    end = 0
    for layer in range(config.n_layers):
        for module, name in MODULES.items():
            rows, k = shapes[name]
            for of, shape in (("A", (rank, k)), ("B", (rows, rank))):
                values = (0.01 * random.standard_normal(shape)).astype(np.float32)
                raw = {
                    "F32": values,
                    "F16": values.astype(np.float16),
                    "BF16": (values.view(np.uint32) >> 16).astype(np.uint16),
                }[dtype].tobytes()
                tensor = f"base_model.model.model.layers.{layer}.{module}.lora_{of}.weight"
                header[tensor] = {"dtype": dtype, "shape": shape, "data_offsets": [end, end + len(raw)]}
                end += len(raw)
                blobs.append(raw)
    text = json.dumps(header).encode()
    folder.mkdir()
    (folder / "adapter_model.safetensors").write_bytes(
        len(text).to_bytes(8, "little") + text + b"".join(blobs)
    )
    said = {"peft_type": "LORA", "r": rank, "lora_alpha": rank}
    (folder / "adapter_config.json").write_text(json.dumps(said))
    return folder


class Texts:
    """n texts of START tokens, and steps of them."""

    def __init__(self, llm: tinyllm.LLM, n: int) -> None:
        self._llm, self._n = llm, n
        pages = -(-(START + 64) // 64)
        self._pool = llm.model.cache("f16", n * pages)
        self._pool.grow(n * pages)
        self._tables = np.arange(n * pages).reshape(n, 1, pages)
        self._adapters: list[Any] = []
        self._forward(np.arange(START))

    def _forward(self, positions: Any) -> None:
        m = len(positions)
        self._llm.model.forward(
            np.tile((positions * 7919) % self._llm.config.vocab_size, self._n),
            np.tile(positions, self._n),
            np.repeat(np.arange(self._n), m),
            self._tables,
            rows=np.arange(m - 1, m * self._n, m),
            adapters=self._adapters or None,
            cache=self._pool,
        )

    def seconds(self, adapters: list[Any]) -> float:
        """Of a step."""
        self._adapters = adapters
        start = time.perf_counter()
        for i in range(STEPS):
            self._forward(np.array([START + i]))
        return (time.perf_counter() - start) / STEPS


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("model")
    parser.add_argument("--rank", type=int, default=16)
    parser.add_argument("--dtype", choices=("F32", "F16", "BF16"), default="BF16")
    parser.add_argument("--seconds", type=float, default=60)
    args = parser.parse_args()
    with tempfile.TemporaryDirectory() as text, tinyllm.load(args.model, device="cpu", context=512) as llm:
        for i in range(N_TEXTS):
            path = write_adapter(Path(text) / str(i), llm.config, args.rank, args.dtype, i)
            llm.add_adapter(str(i), path)
        uses = [llm._applied(str(i)).uses for i in range(N_TEXTS)]
        size = llm.adapter_bytes / N_TEXTS / 1e6
        print(f"{args.model}: adapters of rank {args.rank}, {args.dtype}, {size:.1f} MB each")
        for n, with_adapters in ((1, uses[:1]), (N_TEXTS, uses), (N_TEXTS, uses[:1] * N_TEXTS)):
            texts = Texts(llm, n)
            plain: list[float] = []
            adapted: list[float] = []
            end = time.perf_counter() + args.seconds / 3
            while len(plain) < 3 or time.perf_counter() < end:
                plain.append(texts.seconds([]))
                adapted.append(texts.seconds(with_adapters))
            kinds = len({id(use) for use in with_adapters})
            print(f"{n} texts, {kinds} adapters, {len(plain)} turns of {STEPS} steps")
            for name, of in (("median", statistics.median), ("fastest", min)):
                a, b = of(plain), of(adapted)
                times = f"{1e3 * a:.2f} ms a step without, {1e3 * b:.2f} with"
                print(f"  {name}: {times}, {100 * (b / a - 1):+.1f} %, {a / b:.3f}x")


if __name__ == "__main__":
    main()
