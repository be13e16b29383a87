"""What the PyTorch that is there does with the same shapes (peer.json): decoding one token at a time in the
manner of gpt-fast, a plain Llama in bfloat16 whose blocks go through torch.compile and whose step is one CUDA
graph.

Weights are random, made on the device, in three kinds: int4 in groups of 32 through PyTorch's own kernel,
int8 with a scale a row, and int4 in groups of 32 unpacked in the compiled product. Without PyTorch it
says so.
"""

from __future__ import annotations

import functools
import importlib.util
import os
import sys
import time
from typing import Any

import synthetic
from common import EMULATE, seconds_left, write

POSITIONS = 256  # of the cache, as in gpt-fast's own benchmark of short texts
GROUP = 32
REPETITIONS = 3


def main() -> int:
    result: dict[str, Any] = {"status": "ok", "rows": []}
    if importlib.util.find_spec("torch") is None:
        write("peer", result | {"status": "not run: there is no PyTorch"})
        return 0
    import torch

    gpu = torch.cuda.is_available() and not EMULATE
    result |= {"torch": torch.__version__, "device": torch.cuda.get_device_name() if gpu else "cpu"}
    if not gpu and not EMULATE:
        write("peer", result | {"status": "not run: this PyTorch sees no GPU"})
        return 0
    shapes = ["tiny"] if EMULATE else ["llama-2-7b", "llama-3.1-8b", "llama-3.2-1b"]
    for name in shapes:
        for kind in KINDS:
            if seconds_left() < 15:
                break
            row: dict[str, Any] = {"model": name, "test": kind}
            try:
                row |= time_decoding(name, kind, "cuda" if gpu else "cpu")
            except Exception as error:  # whatever this PyTorch cannot do is its result
                if os.environ.get("CHECK_RAISE"):
                    raise
                row["error"] = f"{type(error).__name__}: {error}"[:400]
            print(row, flush=True)
            result["rows"].append(row)
            write("peer", result)
    return 0


KINDS = ("int4 aten", "int8", "int4")


def time_decoding(name: str, kind: str, device: str) -> dict[str, Any]:
    """Tokens a second of greedy decoding, the median of some runs of 64 tokens."""
    import torch

    shape = synthetic.SHAPES[name]
    torch.manual_seed(0)
    started = time.perf_counter()
    model = decoder(shape, kind, device)
    token = torch.ones(1, dtype=torch.long, device=device)
    position = torch.zeros(1, dtype=torch.long, device=device)

    def step() -> None:  # in place, so that it can be a graph
        token.copy_(model(token, position).argmax(-1))
        position.add_(1).remainder_(POSITIONS)

    with torch.inference_mode():
        run = step if device == "cpu" else captured(step)
        setup_s = time.perf_counter() - started
        n = 4 if device == "cpu" else 64
        rates = []
        for _ in range(REPETITIONS):
            wait(device)
            start = time.perf_counter()
            for _ in range(n):
                run()
            wait(device)
            rates.append(n / (time.perf_counter() - start))
    rate = sorted(rates)[len(rates) // 2]
    n_bytes = sum(b.numel() * b.element_size() for key, b in model.named_buffers() if "weight" in key)
    return {"tok_s": rate, "gb_s": rate * n_bytes / 1e9, "weight_bytes": n_bytes, "setup_s": setup_s}


def wait(device: str) -> None:
    import torch

    if device == "cuda":
        torch.cuda.synchronize()


def captured(step: Any) -> Any:
    """The step as a CUDA graph."""
    import torch

    stream = torch.cuda.Stream()
    with torch.cuda.stream(stream):
        for _ in range(3):
            step()
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        step()
    return graph.replay


@functools.cache  # one class a kind, else every block would be compiled for itself
def linears() -> dict[str, Any]:
    """Modules of random weights by kind: x [1, k] -> [1, rows]."""
    import torch
    from torch import nn

    half = torch.bfloat16

    class Int8(nn.Module):
        def __init__(self, rows: int, k: int, device: str) -> None:
            super().__init__()
            numbers = torch.randint(-127, 128, (rows, k), dtype=torch.int8, device=device)
            self.register_buffer("weight", numbers)
            self.register_buffer("weight_scale", torch.full((rows,), k**-0.5 / 73, dtype=half, device=device))

        def forward(self, x: Any) -> Any:
            return nn.functional.linear(x, self.weight.to(half)) * self.weight_scale

    class Int4(nn.Module):
        """Byte (j, i) of a row holds numbers i and 16 + i of group j."""

        def __init__(self, rows: int, k: int, device: str) -> None:
            super().__init__()
            self.rows, self.groups = rows, k // GROUP
            numbers = torch.randint(0, 256, (rows, k // GROUP, 16), dtype=torch.uint8, device=device)
            self.register_buffer("weight", numbers)
            scales = torch.full((rows, k // GROUP), k**-0.5 / 4.6, dtype=half, device=device)
            self.register_buffer("weight_scale", scales)

        def forward(self, x: Any) -> Any:
            low, high = x.view(self.groups, 2, 16).unbind(1)
            both = ((self.weight & 15).to(half) - 8) * low + ((self.weight >> 4).to(half) - 8) * high
            return (both.float().sum(-1) * self.weight_scale).sum(-1).to(half).view(1, self.rows)

    class Int4Aten(nn.Module):
        def __init__(self, rows: int, k: int, device: str) -> None:
            super().__init__()
            if device == "cpu":  # these two take other arguments there
                self.product = torch.ops.aten._weight_int4pack_mm_for_cpu
                pack = torch.ops.aten._convert_weight_to_int4pack_for_cpu
                numbers = torch.randint(0, 16, (rows, k), dtype=torch.int32)
            else:
                self.product = torch.ops.aten._weight_int4pack_mm
                pack = torch.ops.aten._convert_weight_to_int4pack
                numbers = torch.randint(0, 256, (rows, k // 2), dtype=torch.uint8, device=device)
            self.register_buffer("weight", pack(numbers, 8))
            scales = torch.full((k // GROUP, rows, 2), k**-0.5 / 4.6, dtype=half, device=device)
            scales[..., 1] = 0
            self.register_buffer("weight_scale", scales)

        def forward(self, x: Any) -> Any:
            return self.product(x, self.weight, GROUP, self.weight_scale)

    return {"int8": Int8, "int4": Int4, "int4 aten": Int4Aten}


def decoder(shape: synthetic.Shape, kind: str, device: str) -> Any:
    """A Llama that takes one token: model(token [1], position [1]) -> logits [1, vocabulary]."""
    import torch
    from torch import nn

    half, d, linear = torch.bfloat16, shape.head_dim, linears()[kind]
    kv_dim = shape.n_kv_heads * d

    def normed(x: Any) -> Any:
        return nn.functional.rms_norm(x.float(), (shape.dim,), eps=1e-5).to(half)

    def rotated(x: Any, angles: Any) -> Any:  # [heads, d]
        a, b = x.float().chunk(2, -1)
        cos, sin = angles.cos(), angles.sin()
        return torch.cat([a * cos - b * sin, a * sin + b * cos], -1).to(half)

    class Block(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.qkv = linear(shape.dim + 2 * kv_dim, shape.dim, device)
            self.o = linear(shape.dim, shape.dim, device)
            self.gate_up = linear(2 * shape.ff_dim, shape.dim, device)
            self.down = linear(shape.dim, shape.ff_dim, device)
            cache = (1, shape.n_kv_heads, POSITIONS, d)
            self.register_buffer("k", torch.zeros(cache, dtype=half, device=device))
            self.register_buffer("v", torch.zeros(cache, dtype=half, device=device))

        def forward(self, x: Any, position: Any, angles: Any, mask: Any) -> Any:
            q, k, v = (
                self.qkv(normed(x)).view(-1, d).split([shape.n_heads, shape.n_kv_heads, shape.n_kv_heads])
            )
            q, k = rotated(q, angles), rotated(k, angles)
            self.k.index_copy_(2, position, k.view(1, -1, 1, d))
            self.v.index_copy_(2, position, v.reshape(1, -1, 1, d))
            out = nn.functional.scaled_dot_product_attention(
                q.view(1, -1, 1, d), self.k, self.v, attn_mask=mask, enable_gqa=True
            )
            x = x + self.o(out.reshape(1, shape.dim))
            gate, up = self.gate_up(normed(x)).chunk(2, -1)
            return x + self.down(nn.functional.silu(gate) * up)

    class Decoder(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.blocks = nn.ModuleList(Block() for _ in range(shape.n_layers))
            self.embedding = torch.randn(shape.vocab_size, shape.dim, dtype=half, device=device)
            self.output = linear(shape.vocab_size, shape.dim, device)
            steps = torch.arange(0, d, 2, device=device) / d
            self.frequencies = shape.rope_theta**-steps
            self.at = torch.arange(POSITIONS, device=device)
            self.block = torch.compile(Block.forward, fullgraph=True, dynamic=False)
            self.last = torch.compile(lambda x: self.output(normed(x)), dynamic=False)

        def forward(self, token: Any, position: Any) -> Any:
            x = self.embedding[token]
            angles, mask = position * self.frequencies, (self.at <= position).view(1, 1, 1, -1)
            for block in self.blocks:
                x = self.block(block, x, position, angles, mask)
            return self.last(x)

    return Decoder()


if __name__ == "__main__":
    sys.exit(main())
