"""Train the bundled model `stories`: a small Llama on TinyStories, from plain text files to GGUF.

Owns everything between the text and the weights: cleaning, truecasing, tokenizer, model, optimizer,
export (Hugging Face directory and GGUF) and evaluation. It stands alone: it imports nothing of tinyllm,
so that the library is tested against a file it did not write. Needs torch, numpy, sentencepiece,
safetensors and gguf. Read docs/stories.md for the result.
"""

from __future__ import annotations

import argparse
import copy
import json
import logging
import math
import os
import random
import re
import signal
import time
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import asdict, dataclass
from io import BytesIO
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import sentencepiece
import torch
import torch.distributed as dist
import torch.nn.functional as F
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

log = logging.getLogger("train_stories")

UNK, BOS, EOS = 0, 1, 2
END_OF_STORY = "<|endoftext|>"
PARAGRAPH = "\n\n"


# ---------------------------------------------------------------------------------------------- text

_MOJIBAKE = {"â€œ": '"', "â€™": "'", "â€˜": "'", "â€¦": "...", "â€“": "-", "â€”": "-", "â€": '"'}
_TYPOGRAPHY = {"“": '"', "”": '"', "«": '"', "»": '"', "’": "'", "‘": "'", "`": "'"}
_TYPOGRAPHY |= {"…": "...", "–": "-", "—": "-"}


def clean(text: str) -> str:
    """Plain quotes and dashes, single spaces, one blank line between paragraphs."""
    for table in (_MOJIBAKE, _TYPOGRAPHY):
        for bad, good in table.items():
            text = text.replace(bad, good)
    text = re.sub(r"[^\S\n]+", " ", text)
    return re.sub(r" ?\n\s*", PARAGRAPH, text.strip())


def fingerprint(story: str) -> str:
    """What is left of a story when case, spacing and punctuation do not count; finds repeats."""
    return re.sub(r"[^a-z]", "", story.lower())


def marked_stories(text: str) -> list[str]:
    """Stories of a text in which END_OF_STORY closes each one; the last, cut off, is dropped."""
    return [story for story in map(clean, text.split(END_OF_STORY)[:-1]) if story]


class Openings:
    """Tells a story's first paragraph from a later one by its first words, learnt from marked stories."""

    def __init__(self, stories: Iterable[str]) -> None:
        self.first: Counter[str] = Counter()
        self.later: Counter[str] = Counter()
        for story in stories:
            head, *rest = story.split(PARAGRAPH)
            self.first.update(self._keys(head))
            for paragraph in rest:
                self.later.update(self._keys(paragraph))

    @staticmethod
    def _keys(paragraph: str) -> list[str]:
        words = re.findall(r"[\w']+|[^\w\s]", paragraph.lower())[:4]
        return [" ".join(words[:n]) for n in range(1, len(words) + 1)]

    def opens(self, paragraph: str) -> bool:
        """True where the longest known beginning was seen more often as a story's first paragraph."""
        for key in reversed(self._keys(paragraph)):
            if self.first[key] + self.later[key]:
                return self.first[key] > self.later[key]
        return False


def unmarked_stories(text: str, openings: Openings) -> list[str]:
    """Stories of a text without marks: a single line break ends a story unless the next line goes on.

    Such files keep a blank line between paragraphs, so most single breaks are ends of stories; the few
    stories that use single breaks inside are put together again by looking at how the next piece opens.
    """
    stories: list[str] = []
    for piece in re.split(r"(?<!\n)\n(?!\n)", text):
        piece = clean(piece)
        if not piece:
            continue
        if stories and not (openings.opens(piece) or len(piece) > 400):
            stories[-1] += PARAGRAPH + piece
        else:
            stories.append(piece)
    return stories[:-1]


_TOKEN = re.compile(r"[\w']+|[^\w\s]|\n+| +")
_SPEECH = {"said", "asked", "replied", "shouted", "cried", "yelled", "exclaimed", "whispered", "answered"}
_SPEECH |= {"called", "laughed", "thought"}


class Truecaser:
    """Restores capitals from the counts of a cased text: sentence starts, "I", names by their context."""

    def __init__(self, stories: Iterable[str]) -> None:
        self.capital: Counter[str] = Counter()
        self.seen: Counter[str] = Counter()
        for story in stories:
            for word, previous, place in self._walk(story):
                if place == "inside":
                    for key in (word.lower(), f"{previous} {word.lower()}"):
                        self.seen[key] += 1
                        self.capital[key] += word[0].isupper()

    @staticmethod
    def _walk(story: str) -> Iterator[tuple[str, str, str]]:
        """(word, the token before it in lower case, place: "start", "inside" or "after-quote")."""
        for word, previous, place, _ in Truecaser._places(_TOKEN.findall(story)):
            yield word, previous, place

    @staticmethod
    def _places(tokens: Sequence[str]) -> Iterator[tuple[str, str, str, int]]:
        place, previous, quoted = "start", "", False
        for i, token in enumerate(tokens):
            if token.startswith("\n"):
                place, previous, quoted = "start", "", False
            elif token == '"':
                place = ("after-quote" if place == "start" else "inside") if quoted else "start"
                quoted, previous = not quoted, '"'
            elif token in ".!?":
                place, previous = "start", token
            elif token[0].isalpha():
                yield token, previous, place, i
                place, previous = "inside", token.lower()
            elif not token.isspace():
                place, previous = ("inside" if token.isalnum() else place), token

    def __call__(self, story: str) -> str:
        tokens = _TOKEN.findall(story)
        named = set(re.findall(r"\b(?:named|called|name was|name is) ([a-z]+)\b", story))
        named = {name for name in named if self.seen[name] < 20 or self.capital[name] * 10 > self.seen[name]}
        for word, previous, place, i in self._places(list(tokens)):
            if self._is_capital(word, previous, place, named, tokens, i):
                tokens[i] = word[0].upper() + word[1:]
        return "".join(tokens)

    def _is_capital(
        self, word: str, previous: str, place: str, named: set[str], tokens: Sequence[str], i: int
    ) -> bool:
        if place == "start" or re.fullmatch(r"i('\w+)?", word):
            return True
        base = re.sub(r"'s?$", "", word)
        if base in named and previous not in {"a", "the", "an", "his", "her", "my"}:
            return True
        if place == "after-quote":
            ended = next((t for t in reversed(tokens[:i]) if t in ".!?"), ".")
            follows = [t for t in tokens[i + 1 : i + 8] if t.isalpha()]
            if ended == "." or not (word in _SPEECH or _SPEECH & set(follows[:3])):
                return True
        for key in (f"{previous} {base}", f"{previous} {word}", base, word):
            if self.seen[key] >= 2:
                return self.capital[key] * 2 > self.seen[key]
        return False


def gather(cased: Sequence[Path], lowercase: Sequence[Path]) -> list[str]:
    """All training stories, cleaned, truecased where needed, without repeats."""
    stories = [s for path in cased for s in marked_stories(path.read_text("utf-8", errors="replace"))]
    known = "|".join(map(fingerprint, stories))
    openings, truecase = Openings(stories), Truecaser(stories)
    for path in lowercase:
        found = unmarked_stories(path.read_text("utf-8", errors="replace"), openings)
        fresh = [s for s in found if fingerprint(s) not in known]
        log.info("%s: %d stories, %d of them new", path.name, len(found), len(fresh))
        stories += map(truecase, fresh)
    unique = {fingerprint(s): s for s in stories if len(s) > 80}
    return list(unique.values())


# ----------------------------------------------------------------------------------------- tokenizer


def train_tokenizer(stories: Iterable[str], pieces: int) -> bytes:
    """A SentencePiece BPE model (serialized) with byte fallback and one piece for a paragraph break.

    The break is trained as a letter of a script of its own, so that no merge crosses it, and renamed in
    the serialized model, where both names are two bytes long.
    """
    stand_in = "Ж"
    out = BytesIO()
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=(s.replace(PARAGRAPH, stand_in) for s in stories),
        model_writer=out,
        model_type="bpe",
        vocab_size=pieces,
        byte_fallback=True,
        character_coverage=0.99995,
        required_chars=stand_in,
        normalization_rule_name="identity",
        remove_extra_whitespaces=False,
        split_digits=True,
        max_sentence_length=100_000,
        unk_id=UNK,
        bos_id=BOS,
        eos_id=EOS,
        pad_id=-1,
        num_threads=2,
        minloglevel=2,
    )
    return out.getvalue().replace(stand_in.encode(), PARAGRAPH.encode())


# --------------------------------------------------------------------------------------------- model


@dataclass
class Config:
    """Shape of the Llama; the names are those of a Hugging Face config.json where they exist."""

    vocab_size: int = 2048
    hidden_size: int = 256
    intermediate_size: int = 768
    num_hidden_layers: int = 4
    num_attention_heads: int = 4
    num_key_value_heads: int = 2
    max_position_embeddings: int = 512
    rope_theta: float = 10000.0
    rms_norm_eps: float = 1e-5

    @property
    def head_dim(self) -> int:
        return self.hidden_size // self.num_attention_heads


class RMSNorm(nn.Module):
    def __init__(self, size: int, eps: float) -> None:
        super().__init__()
        self.weight, self.eps = nn.Parameter(torch.ones(size)), eps

    def forward(self, x: Tensor) -> Tensor:
        y = x.float()
        y = y * torch.rsqrt(y.square().mean(-1, keepdim=True) + self.eps)
        return (y * self.weight).to(x.dtype)


class Attention(nn.Module):
    def __init__(self, c: Config) -> None:
        super().__init__()
        self.heads, self.kv_heads, self.head_dim = c.num_attention_heads, c.num_key_value_heads, c.head_dim
        self.q_proj = nn.Linear(c.hidden_size, self.heads * c.head_dim, bias=False)
        self.k_proj = nn.Linear(c.hidden_size, self.kv_heads * c.head_dim, bias=False)
        self.v_proj = nn.Linear(c.hidden_size, self.kv_heads * c.head_dim, bias=False)
        self.o_proj = nn.Linear(self.heads * c.head_dim, c.hidden_size, bias=False)

    def forward(self, x: Tensor, cos: Tensor, sin: Tensor, past: list[Tensor] | None) -> Tensor:
        b, t, _ = x.shape
        q = rotate(self.q_proj(x).view(b, t, self.heads, self.head_dim).transpose(1, 2), cos, sin)
        k = rotate(self.k_proj(x).view(b, t, self.kv_heads, self.head_dim).transpose(1, 2), cos, sin)
        v = self.v_proj(x).view(b, t, self.kv_heads, self.head_dim).transpose(1, 2)
        if past is not None:
            k, v = (torch.cat(pair, 2) for pair in zip(past, (k, v), strict=True)) if past else (k, v)
            past[:] = k, v
        group = self.heads // self.kv_heads
        k, v = (a.repeat_interleave(group, dim=1) for a in (k, v))
        y = F.scaled_dot_product_attention(q, k, v, is_causal=past is None)
        return self.o_proj(y.transpose(1, 2).reshape(b, t, -1))


class MLP(nn.Module):
    def __init__(self, c: Config) -> None:
        super().__init__()
        self.gate_proj = nn.Linear(c.hidden_size, c.intermediate_size, bias=False)
        self.up_proj = nn.Linear(c.hidden_size, c.intermediate_size, bias=False)
        self.down_proj = nn.Linear(c.intermediate_size, c.hidden_size, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        return self.down_proj(F.silu(self.gate_proj(x)) * self.up_proj(x))


class Layer(nn.Module):
    def __init__(self, c: Config) -> None:
        super().__init__()
        self.input_layernorm = RMSNorm(c.hidden_size, c.rms_norm_eps)
        self.self_attn = Attention(c)
        self.post_attention_layernorm = RMSNorm(c.hidden_size, c.rms_norm_eps)
        self.mlp = MLP(c)


class Llama(nn.Module):
    """Parameter names and RoPE halves as in Hugging Face; the output matrix is the embedding."""

    def __init__(self, c: Config) -> None:
        super().__init__()
        self.config = c
        self.embed_tokens = nn.Embedding(c.vocab_size, c.hidden_size)
        self.layers = nn.ModuleList(Layer(c) for _ in range(c.num_hidden_layers))
        self.norm = RMSNorm(c.hidden_size, c.rms_norm_eps)
        frequency = c.rope_theta ** (-torch.arange(0, c.head_dim, 2) / c.head_dim)
        angle = torch.outer(torch.arange(c.max_position_embeddings), frequency).repeat(1, 2)
        self.register_buffer("cos", angle.cos(), persistent=False)
        self.register_buffer("sin", angle.sin(), persistent=False)
        for name, p in self.named_parameters():
            if p.ndim == 2:
                nn.init.normal_(p, std=0.02 if "embed" in name else 1 / math.sqrt(p.shape[1]))
                if "o_proj" in name or "down_proj" in name:
                    p.data.mul_(1 / math.sqrt(2 * c.num_hidden_layers))

    def forward(self, ids: Tensor, dropout: float = 0.0, past: Sequence[list[Tensor]] = ()) -> Tensor:
        """ids (rows, t) -> logits (rows, t, vocabulary). Dropout drops a channel for a whole row, which
        regularizes like element-wise dropout and needs next to no random numbers. past holds a list for
        each layer, at first empty: the keys and values so far, which ids, one token a row, go on from."""
        start = past[0][0].shape[2] if past and past[0] else 0
        cos, sin = (table[start : start + ids.shape[1]] for table in (self.cos, self.sin))
        x = self.embed_tokens(ids)
        x = x * self._mask(x, dropout)
        for layer, before in zip(self.layers, past or [None] * len(self.layers), strict=True):
            x = x + self._mask(x, dropout) * layer.self_attn(layer.input_layernorm(x), cos, sin, before)
            x = x + self._mask(x, dropout) * layer.mlp(layer.post_attention_layernorm(x))
        x = self.norm(x)
        return F.linear(x * self._mask(x, dropout), self.embed_tokens.weight)

    @staticmethod
    def _mask(x: Tensor, dropout: float) -> Tensor | float:
        if not dropout:
            return 1.0
        return (torch.rand(x.shape[0], 1, x.shape[2], device=x.device) >= dropout).to(x.dtype) / (1 - dropout)


def rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    a, b = x.chunk(2, dim=-1)
    return (x * cos + torch.cat((-b, a), dim=-1) * sin).to(x.dtype)


# ----------------------------------------------------------------------------------------- optimizer


class Muon(torch.optim.Optimizer):
    """Momentum whose update of a matrix is made (nearly) orthogonal by a quintic Newton-Schulz iteration.

    The method and its coefficients are Keller Jordan's (2024). Matrices of one shape go through the
    iteration together.
    """

    def __init__(self, matrices: Iterable[Tensor], lr: float, weight_decay: float) -> None:
        super().__init__(matrices, {"lr": lr, "weight_decay": weight_decay, "momentum": 0.95})

    @torch.no_grad()
    def step(self, closure: None = None) -> None:  # type: ignore[override]
        for group in self.param_groups:
            shapes: dict[tuple[int, int], list[tuple[Tensor, Tensor]]] = {}
            for p in group["params"]:
                momentum = self.state[p].setdefault("momentum", torch.zeros_like(p))
                momentum.lerp_(p.grad, 1 - group["momentum"])
                update = p.grad.lerp(momentum, group["momentum"])
                wide = update.shape[0] <= update.shape[1]
                update = update if wide else update.T
                shapes.setdefault((update.shape[0], update.shape[1]), []).append((p, update))
            for members in shapes.values():
                updates = self._orthogonal(torch.stack([u for _, u in members]))
                for (p, _), update in zip(members, updates, strict=True):
                    p.mul_(1 - group["lr"] * group["weight_decay"])
                    scale = math.sqrt(max(1.0, p.shape[0] / p.shape[1]))
                    update = (update if p.shape == update.shape else update.T).to(p.dtype)
                    p.add_(update, alpha=-group["lr"] * scale)

    @staticmethod
    def _orthogonal(x: Tensor, steps: int = 5) -> Tensor:
        x = (x / (x.norm(dim=(1, 2), keepdim=True) + 1e-7)).bfloat16()
        for _ in range(steps):
            a = x @ x.mT
            b = torch.baddbmm(a, a, a, beta=-4.7750, alpha=2.0315)
            x = torch.baddbmm(x, b, x, beta=3.4445)
        return x


# ------------------------------------------------------------------------------------------ training


def windows(ids: Sequence[int], context: int) -> list[list[int]]:
    """[BOS, story, EOS] cut into rows of at most context inputs and one more target."""
    ids = [BOS, *ids, EOS]
    cut = [ids[at : at + context + 1] for at in range(0, len(ids) - 1, context)]
    return [row for row in cut if len(row) > 16]


def batches(rows: list[list[int]], tokens: int, rng: random.Random) -> list[list[list[int]]]:
    """One epoch of batches of about `tokens` tokens, rows of like length together, in random order."""
    rows = sorted(rng.sample(rows, len(rows)), key=lambda r: len(r) + rng.uniform(0, 16))
    out: list[list[list[int]]] = [[]]
    for row in rows:
        if out[-1] and (len(out[-1]) + 1) * padded(len(row) - 1) > tokens:
            out.append([])
        out[-1].append(row)
    return rng.sample(out, len(out))


def padded(length: int, multiple: int = 32) -> int:
    return -(-length // multiple) * multiple


def tensors(rows: Sequence[Sequence[int]], context: int, device: str) -> tuple[Tensor, Tensor]:
    """Inputs and targets (rows, t); padding is EOS in the inputs and -100, not counted, in the targets."""
    t = min(context, padded(max(map(len, rows)) - 1))
    x, y = np.full((len(rows), t), EOS), np.full((len(rows), t), -100)
    for i, row in enumerate(rows):
        x[i, : len(row) - 1], y[i, : len(row) - 1] = row[:-1], row[1:]
    return torch.from_numpy(x).to(device), torch.from_numpy(y).to(device)


@torch.no_grad()
def held_loss(model: Llama, rows: list[list[int]], device: str) -> float:
    """Mean loss in nats a token over rows, in float32."""
    total = count = 0.0
    rows = sorted(rows, key=len)
    for at in range(0, len(rows), 16):
        x, y = tensors(rows[at : at + 16], model.config.max_position_embeddings, device)
        total += F.cross_entropy(model(x).flatten(0, 1), y.flatten(), reduction="sum").item()
        count += (y >= 0).sum().item()
    return total / count


def schedule(progress: float, decay: float) -> float:
    """Learning rate factor over progress 0..1: short warm-up, constant, then linear to zero."""
    return min(1.0, progress / 0.01 + 0.02, max(0.0, (1 - progress) / decay))


class Team:
    """The processes that train together (one, unless started by torchrun) and what they agree on."""

    def __init__(self, device: str) -> None:
        self.rank, self.size = int(os.environ.get("RANK", 0)), int(os.environ.get("WORLD_SIZE", 1))
        if self.size > 1:
            dist.init_process_group("nccl" if device == "cuda" else "gloo")
            if device == "cuda":
                torch.cuda.set_device(self.rank)
        self.device = device

    def wait(self) -> None:
        if self.size > 1:
            dist.barrier()

    def progress(self, value: float) -> float:
        """The first process's value."""
        shared = torch.tensor([value], device=self.device)
        if self.size > 1:
            dist.broadcast(shared, 0)
        return shared.item()

    def average_gradients(self, parameters: Sequence[Tensor]) -> None:
        if self.size > 1:
            flat = torch.cat([p.grad.flatten() for p in parameters]) / self.size
            dist.all_reduce(flat)
            for p, part in zip(parameters, flat.split([p.numel() for p in parameters]), strict=True):
                p.grad.copy_(part.view_as(p))


def train(args: argparse.Namespace) -> None:
    """Train within args.minutes of wall time; the best held-back average so far is always in args.out."""
    team = Team(args.device)
    log.disabled = team.rank > 0
    rng = random.Random(args.seed)
    torch.manual_seed(args.seed)
    args.out.mkdir(parents=True, exist_ok=True)

    stories = gather(args.text, args.lowercase_text)
    rng.shuffle(stories)
    held, stories = stories[: args.held_back], stories[args.held_back :]
    log.info("%d stories, %.2f million characters", len(stories), sum(map(len, stories)) / 1e6)
    if team.rank == 0 and not args.resume:
        write_atomically(args.out / "train.txt", f"\n{END_OF_STORY}\n".join(stories).encode())
        write_atomically(args.out / "tokenizer.model", train_tokenizer(stories, args.vocab_size))
    team.wait()
    sp = sentencepiece.SentencePieceProcessor(model_file=str(args.out / "tokenizer.model"))
    # A few stories use single line breaks, so that prompts with them are not unheard of.
    for i in rng.sample(range(len(stories)), len(stories) // 25):
        stories[i] = stories[i].replace(PARAGRAPH, "\n")
    rows = [r for ids in sp.encode(stories) for r in windows(ids, args.context)]
    held_rows = [r for ids in sp.encode(held) for r in windows(ids, args.context)]
    tokens = sum(map(len, rows)) / 1e6
    log.info("%d rows, %.2f million tokens; held back %d rows", len(rows), tokens, len(held_rows))

    model = (load(args.out) if args.resume else Llama(model_config(args))).to(args.device)
    average = copy.deepcopy(model)
    torch.manual_seed(args.seed + team.rank)
    parameters = list(model.parameters())
    log.info("%.2f million parameters", sum(p.numel() for p in parameters) / 1e6)
    matrices = [p for p in model.layers.parameters() if p.ndim == 2]
    vectors = [p for p in parameters if p.ndim == 1]
    embedding = [model.embed_tokens.weight]
    adam = torch.optim.AdamW(
        [{"params": embedding, "weight_decay": args.weight_decay}, {"params": vectors, "weight_decay": 0.0}],
        lr=args.adam_lr,
        betas=(0.9, 0.98),
        fused=True,
    )
    muon = Muon(matrices, lr=args.muon_lr, weight_decay=args.weight_decay)

    def loss_of(x: Tensor, y: Tensor) -> Tensor:
        return F.cross_entropy(model(x, args.dropout).flatten(0, 1).float(), y.flatten())

    compiled = torch.compile(loss_of, dynamic=True) if args.compile else loss_of

    def step_loss(x: Tensor, y: Tensor) -> Tensor:
        with torch.autocast(args.device, torch.bfloat16, enabled=args.bf16):
            return compiled(x, y)

    stop = [False]
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, lambda *_: stop.__setitem__(0, True))
    share = args.batch_tokens // team.size
    some = batches(rows, share, random.Random(args.seed))[:3]
    for turn in range(team.size):  # compile before the clock starts, once: the others find it cached
        if turn == team.rank:
            for batch in some:
                step_loss(*tensors(batch, args.context, args.device)).backward()
            model.zero_grad(set_to_none=True)
        team.wait()

    best = math.inf
    if args.resume:
        best = json.loads((args.out / "state.json").read_text())["held_back_loss"]
    start = checked = time.monotonic()
    steps, seen, recent, epoch, total = 0, 0, 0.0, 0, 1
    queue: list[list[list[int]]] = []
    while True:
        now = time.monotonic()
        progress = team.progress(2.0 if stop[0] else (now - start) / (60 * args.minutes))
        if team.rank == 0 and (progress >= 1 or now - checked > 60 * args.check_minutes):
            loss = held_loss(average, held_rows, args.device)
            checked = time.monotonic()
            log.info(
                "%5.1f min  step %5d  epoch %5.2f  %6.0f tok/s  train %.4f  held back %.4f%s",
                (now - start) / 60, steps, epoch - len(queue) / total, seen / (now - start), recent, loss,
                " *" if loss < best else "",
            )  # fmt: skip
            if loss < best:
                best = loss
                state = {"held_back_loss": loss, "minutes": (now - start) / 60, "steps": steps}
                save(average, args.out, state)
        if progress >= 1:
            break
        if len(queue) < team.size:
            queue = batches(rows, share, rng)
            total, epoch = len(queue), epoch + 1
        mine = [queue.pop() for _ in range(team.size)][team.rank]
        x, y = tensors(mine, args.context, args.device)
        factor = schedule(progress, args.decay)
        for optimizer, lr in ((adam, args.adam_lr), (muon, args.muon_lr)):
            for group in optimizer.param_groups:
                group["lr"] = lr * factor
        loss_now = step_loss(x, y)
        loss_now.backward()
        team.average_gradients(parameters)
        nn.utils.clip_grad_norm_(embedding + vectors, 1.0)
        adam.step()
        muon.step()
        model.zero_grad(set_to_none=True)
        steps, seen = steps + 1, seen + x.numel() * team.size
        recent += (loss_now.item() - recent) * max(0.02, 1 / steps)
        with torch.no_grad():
            keep = min(args.average, 1 - 10 / (steps + 10))
            for a, p in zip(average.parameters(), parameters, strict=True):
                a.lerp_(p, 1 - keep)
        if steps % 50 == 0:
            log.debug("step %d  %.0f tok/s  train %.4f", steps, seen / (time.monotonic() - start), recent)
    team.wait()


def model_config(args: argparse.Namespace) -> Config:
    return Config(
        vocab_size=args.vocab_size,
        hidden_size=args.dim,
        intermediate_size=args.ff,
        num_hidden_layers=args.layers,
        num_attention_heads=args.heads,
        num_key_value_heads=args.kv_heads,
        max_position_embeddings=args.context,
    )


# -------------------------------------------------------------------------------------------- export


def write_atomically(path: Path, data: bytes) -> None:
    part = path.with_name(path.name + ".part")
    part.write_bytes(data)
    os.replace(part, path)


def save(model: Llama, out: Path, state: dict[str, Any]) -> None:
    """Write model.safetensors, config.json and state.json (how far the training was) to out."""
    config: dict[str, Any] = {
        "architectures": ["LlamaForCausalLM"],
        "model_type": "llama",
        **asdict(model.config),
        "hidden_act": "silu",
        "tie_word_embeddings": True,
        "attention_bias": False,
        "mlp_bias": False,
        "bos_token_id": BOS,
        "eos_token_id": EOS,
        "torch_dtype": "float32",
    }
    weights = {f"model.{name}": p.detach().cpu().contiguous() for name, p in model.named_parameters()}
    save_file(weights, out / "model.safetensors.part", metadata={"format": "pt"})
    os.replace(out / "model.safetensors.part", out / "model.safetensors")
    write_atomically(out / "config.json", (json.dumps(config, indent=2) + "\n").encode())
    write_atomically(out / "state.json", (json.dumps(state) + "\n").encode())


def load(directory: Path) -> Llama:
    """The model that `save` wrote."""
    stored = json.loads((directory / "config.json").read_text())
    model = Llama(Config(**{k: v for k, v in stored.items() if k in Config.__dataclass_fields__}))
    weights = load_file(directory / "model.safetensors")
    model.load_state_dict({name.removeprefix("model."): w for name, w in weights.items()})
    return model.eval()


_GGUF_NAMES = {
    "input_layernorm": "attn_norm",
    "self_attn.q_proj": "attn_q",
    "self_attn.k_proj": "attn_k",
    "self_attn.v_proj": "attn_v",
    "self_attn.o_proj": "attn_output",
    "post_attention_layernorm": "ffn_norm",
    "mlp.gate_proj": "ffn_gate",
    "mlp.up_proj": "ffn_up",
    "mlp.down_proj": "ffn_down",
}


def gguf_tensor(name: str, weight: np.ndarray, c: Config) -> tuple[str, np.ndarray]:
    """Name and rows as GGUF has them: RoPE pairs lie side by side there, in halves in Hugging Face."""
    if "q_proj" in name or "k_proj" in name:
        heads = c.num_attention_heads if "q_proj" in name else c.num_key_value_heads
        pairs = weight.reshape(heads, 2, c.head_dim // 2, weight.shape[1]).swapaxes(1, 2)
        weight = np.ascontiguousarray(pairs.reshape(weight.shape))
    name = name.replace("embed_tokens", "token_embd")
    if name.startswith("layers."):
        _, layer, rest = name.split(".", 2)
        return f"blk.{layer}.{_GGUF_NAMES[rest.removesuffix('.weight')]}.weight", weight
    return ("output_norm.weight" if name == "norm.weight" else name), weight


def write_gguf(directory: Path, path: Path, kind: str) -> None:
    """Write the model in directory to path as GGUF; kind "F16" or "Q8_0" for matrices, norms stay F32."""
    model, c = load(directory), load(directory).config
    part = path.with_name(path.name + ".part")
    writer = gguf.GGUFWriter(part, "llama")
    writer.add_type("model")
    writer.add_name("stories")
    writer.add_size_label(f"{sum(p.numel() for p in model.parameters()) / 1e6:.1f}M")
    writer.add_description("A small Llama that writes children's stories, trained on TinyStories")
    writer.add_license("mit")
    writer.add_float32("general.sampling.temp", 0.8)
    writer.add_dataset_count(1)
    writer.add_dataset_name(0, "TinyStories")
    writer.add_dataset_repo_url(0, "https://huggingface.co/datasets/roneneldan/TinyStories")
    writer.add_languages(["en"])
    writer.add_block_count(c.num_hidden_layers)
    writer.add_context_length(c.max_position_embeddings)
    writer.add_embedding_length(c.hidden_size)
    writer.add_feed_forward_length(c.intermediate_size)
    writer.add_head_count(c.num_attention_heads)
    writer.add_head_count_kv(c.num_key_value_heads)
    writer.add_key_length(c.head_dim)
    writer.add_value_length(c.head_dim)
    writer.add_rope_dimension_count(c.head_dim)
    writer.add_rope_freq_base(c.rope_theta)
    writer.add_layer_norm_rms_eps(c.rms_norm_eps)
    writer.add_vocab_size(c.vocab_size)
    writer.add_file_type(getattr(gguf.LlamaFileType, f"MOSTLY_{kind}"))
    writer.add_quantization_version(gguf.GGML_QUANT_VERSION)

    sp = sentencepiece.SentencePieceProcessor(model_file=str(directory / "tokenizer.model"))
    kinds = gguf.TokenType
    types = [
        kinds.UNKNOWN if sp.is_unknown(i)
        else kinds.CONTROL if sp.is_control(i)
        else kinds.BYTE if sp.is_byte(i)
        else kinds.NORMAL
        for i in range(sp.vocab_size())
    ]  # fmt: skip
    writer.add_tokenizer_model("llama")
    writer.add_tokenizer_pre("default")
    writer.add_token_list([sp.id_to_piece(i).encode() for i in range(sp.vocab_size())])
    writer.add_token_scores([sp.get_score(i) for i in range(sp.vocab_size())])
    writer.add_token_types([int(t) for t in types])
    writer.add_bos_token_id(BOS)
    writer.add_eos_token_id(EOS)
    writer.add_unk_token_id(UNK)
    writer.add_add_bos_token(True)
    writer.add_add_eos_token(False)
    writer.add_add_space_prefix(True)

    quantization = gguf.GGMLQuantizationType[kind]
    for name, p in model.named_parameters():
        name, weight = gguf_tensor(name, p.detach().numpy(), c)
        if weight.ndim == 1:
            writer.add_tensor(name, weight.astype(np.float32))
        else:
            writer.add_tensor(name, gguf.quants.quantize(weight, quantization), raw_dtype=quantization)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    os.replace(part, path)
    log.info("%s: %d bytes", path, path.stat().st_size)


# ---------------------------------------------------------------------------------------- evaluation


def whole_stories(text: str) -> list[str]:
    """Stories of an unmarked text with blank lines: each opens with "Once"; both ends are dropped."""
    starts = re.split(r"\n\n(?=Once )", clean(text))
    return starts[1:-1]


def rounded(model: Llama, kind: str) -> Llama:
    """The model with its matrices rounded to a GGUF type, as the exported file has them."""
    quantization = gguf.GGMLQuantizationType[kind]
    result = copy.deepcopy(model)
    for p in result.parameters():
        if p.ndim == 2:
            packed = gguf.quants.quantize(p.detach().numpy(), quantization)
            p.data.copy_(torch.from_numpy(gguf.quants.dequantize(packed, quantization)))
    return result


def common_prefix(story: str, readers: Sequence[tuple[Llama, Any]]) -> str:
    """The longest beginning of a story, cut at a space, that fits every model's context after BOS."""
    for model, sp in readers:
        while len(ids := sp.encode(story)) >= model.config.max_position_embeddings:
            kept = sp.decode(ids[: model.config.max_position_embeddings - 1])
            story = story[: story.rfind(" ", 0, len(kept))]
    return story


@torch.no_grad()
def bits_per_character(model: Llama, sp: Any, stories: Sequence[str]) -> tuple[float, float, float]:
    """(bits a character, nats a token, characters a token) of each story read after BOS, without its EOS."""
    nats = tokens = 0.0
    for story in stories:
        ids = torch.tensor([[BOS, *sp.encode(story)]])
        nats += F.cross_entropy(model(ids[:, :-1])[0], ids[0, 1:], reduction="sum").item()
        tokens += ids.shape[1] - 1
    characters = sum(map(len, stories))
    return nats / math.log(2) / characters, nats / tokens, characters / tokens


@torch.no_grad()
def sample(model: Llama, sp: Any, count: int, temperature: float, seed: int) -> list[str]:
    """Whole stories from BOS alone, each up to EOS or the end of the context."""
    generator = torch.Generator().manual_seed(seed)
    running = torch.full((count, 1), BOS)
    past: list[list[Tensor]] = [[] for _ in model.layers]
    done: list[list[int]] = []
    while running.shape[0] and running.shape[1] < model.config.max_position_embeddings:
        chances = (model(running[:, -1:], past=past)[:, -1] / temperature).softmax(-1)
        following = torch.multinomial(chances, 1, generator=generator)
        ended = following[:, 0] == EOS
        done += running[ended].tolist()
        running = torch.cat((running, following), 1)[~ended]
        past = [[a[~ended] for a in kept] for kept in past]
    return [sp.decode(ids[1:]) for ids in done + running.tolist()]


def longest_overlap(text: Sequence[str], parts: Sequence[Sequence[str]]) -> tuple[int, int]:
    """(length, end in text) of the longest run of symbols of text that occurs in one of the parts.

    A suffix automaton of the parts (Blumer et al., 1985), through which text is read once.
    """
    follow: list[dict[str, int]] = [{}]
    link, length, last = [-1], [0], 0
    for part in parts:
        for symbol in [*part, ""]:  # "" stands between parts and is not in text
            new = len(follow)
            follow.append({})
            length.append(length[last] + 1)
            link.append(0)
            at = last
            while at >= 0 and symbol not in follow[at]:
                follow[at][symbol] = new
                at = link[at]
            if at >= 0:
                link[new] = after = follow[at][symbol]
                if length[after] != length[at] + 1:
                    twin = len(follow)
                    follow.append(dict(follow[after]))
                    length.append(length[at] + 1)
                    link.append(link[after])
                    while at >= 0 and follow[at].get(symbol) == after:
                        follow[at][symbol] = twin
                        at = link[at]
                    link[after] = link[new] = twin
            last = new
    best = (0, 0)
    state = matched = 0
    for i, symbol in enumerate(text):
        while state and symbol not in follow[state]:
            state = link[state]
            matched = length[state]
        if symbol in follow[state]:
            state, matched = follow[state][symbol], matched + 1
        best = max(best, (matched, i + 1))
    return best


def evaluate(args: argparse.Namespace) -> None:
    """Log the figures of docs/stories.md: bits a character, and how much samples repeat the training text."""
    readers = [
        (load(d), sentencepiece.SentencePieceProcessor(model_file=str(d / "tokenizer.model")))
        for d in (args.out, *args.compare)
    ]
    model, sp = readers[0]
    corpus = (args.out / "train.txt").read_text("utf-8")
    stories = whole_stories(args.evaluate.read_text("utf-8", errors="replace"))
    known = "|".join(map(fingerprint, corpus.split(END_OF_STORY)))
    shared = sum(fingerprint(s) in known for s in stories)
    log.info("%d stories, %d of them also in the training text and left out", len(stories), shared)
    stories = [common_prefix(s, readers) for s in stories if fingerprint(s) not in known]
    log.info("%d characters after cutting to the shortest context", sum(map(len, stories)))
    compared = [(str(d), *reader) for d, reader in zip((args.out, *args.compare), readers, strict=True)]
    for name, m, tokenizer in [*compared, (f"{args.out} at Q8_0", rounded(model, "Q8_0"), sp)]:
        figures = bits_per_character(m, tokenizer, stories)
        log.info("%s: %.4f bits a character, %.4f nats a token of %.2f characters", name, *figures)
    samples = sample(rounded(model, "Q8_0"), sp, args.samples, 0.8, args.seed)
    length, end = longest_overlap(corpus, samples)
    log.info("longest run of characters shared with the text: %d: %r", length, corpus[end - length : end])
    words = re.findall(r"\w+", corpus.lower())
    length, end = longest_overlap(words, [re.findall(r"\w+", s.lower()) for s in samples])
    log.info("longest run of words shared with the text: %d: %s", length, " ".join(words[end - length : end]))
    for text in samples:
        log.info("%s\n%s", "-" * 80, text)


# ---------------------------------------------------------------------------------------------- main


def arguments() -> argparse.ArgumentParser:
    p = argparse.ArgumentParser(
        formatter_class=argparse.ArgumentDefaultsHelpFormatter,
        description="Train a small Llama on stories within a given time, and write it as a Hugging Face "
        "directory and as GGUF. The learning rate follows the clock, so the training ends well however fast "
        "the machine is; the best weights so far (an average over steps, judged on stories held back from "
        "the training text) are always in --out, so it may be stopped at any time.",
        epilog="Example: python examples/train_stories.py --text train.txt --minutes 75 --out stories "
        "--f16 stories-f16.gguf --q8-0 stories.gguf. To use several CPU cores or GPUs put "
        "`torchrun --nproc-per-node N` in place of `python`: on a CPU, one process a core is faster than one "
        "process with as many threads, above all when other work shares the machine.",
    )
    files = p.add_argument_group("files")
    files.add_argument(
        "--text",
        type=Path,
        nargs="+",
        default=[],
        metavar="FILE",
        help=f"training text; {END_OF_STORY} closes each story",
    )
    files.add_argument(
        "--lowercase-text",
        type=Path,
        nargs="+",
        default=[],
        metavar="FILE",
        help="text without capitals and marks; both are restored with what --text teaches, "
        "and stories that --text has are dropped",
    )
    files.add_argument(
        "--out",
        type=Path,
        required=True,
        metavar="DIR",
        help="where model.safetensors, config.json and tokenizer.model go",
    )
    files.add_argument("--f16", type=Path, metavar="FILE", help="write the model as GGUF with F16 matrices")
    files.add_argument("--q8-0", type=Path, metavar="FILE", help="write the model as GGUF with Q8_0 matrices")
    files.add_argument("--export-only", action="store_true", help="do not train: write GGUF from --out")
    files.add_argument(
        "--evaluate",
        type=Path,
        metavar="FILE",
        help="instead of training, measure the model in --out on unmarked stories it never "
        "saw, and how far samples repeat the training text",
    )
    files.add_argument(
        "--compare",
        type=Path,
        nargs="+",
        default=[],
        metavar="DIR",
        help="other Llama directories with tied embeddings to measure on the same text",
    )
    files.add_argument("--samples", type=int, default=100, help="stories to sample at temperature 0.8")
    shape = p.add_argument_group("shape of the model")
    shape.add_argument("--dim", type=int, default=256, help="hidden size")
    shape.add_argument("--ff", type=int, default=768, help="feed-forward size")
    shape.add_argument("--layers", type=int, default=4)
    shape.add_argument("--heads", type=int, default=4, help="query heads")
    shape.add_argument("--kv-heads", type=int, default=2, help="key and value heads")
    shape.add_argument("--context", type=int, default=512, help="longest sequence, in tokens")
    shape.add_argument("--vocab-size", type=int, default=2048, help="pieces of the tokenizer")
    how = p.add_argument_group("training")
    how.add_argument("--minutes", type=float, default=75.0, help="wall time to train")
    how.add_argument("--batch-tokens", type=int, default=6144, help="tokens a step")
    how.add_argument("--muon-lr", type=float, default=0.02, help="learning rate of matrices (Muon)")
    how.add_argument("--adam-lr", type=float, default=0.003, help="learning rate of the rest (AdamW)")
    how.add_argument("--weight-decay", type=float, default=0.1)
    how.add_argument("--dropout", type=float, default=0.07, help="share of channels dropped in a row")
    how.add_argument("--decay", type=float, default=0.75, help="share of the time in which the rate falls")
    how.add_argument("--average", type=float, default=0.985, help="momentum of the average of the weights")
    how.add_argument("--held-back", type=int, default=128, help="stories kept out, to choose weights by")
    how.add_argument("--check-minutes", type=float, default=3.0, help="time between looks at that loss")
    how.add_argument("--resume", action="store_true", help="go on from the weights and tokenizer in --out")
    how.add_argument("--seed", type=int, default=1)
    how.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    how.add_argument("--bf16", action=argparse.BooleanOptionalAction, default=True, help="bfloat16 autocast")
    how.add_argument(
        "--compile",
        action=argparse.BooleanOptionalAction,
        default=True,
        help="torch.compile; needs a C++ compiler on a CPU",
    )
    how.add_argument("--verbose", action="store_true", help="a line every 50 steps")
    return p  # fmt: skip


def main() -> None:
    parser = arguments()
    args = parser.parse_args()
    logging.basicConfig(level=logging.WARNING, format="%(message)s")
    log.setLevel(logging.DEBUG if args.verbose else logging.INFO)
    if args.evaluate:
        evaluate(args)
    elif not args.export_only:
        if not args.text:
            parser.error("training needs --text FILE (marked, cased stories)")
        train(args)
    if os.environ.get("RANK", "0") != "0":
        return
    for path, kind in ((args.f16, "F16"), (args.q8_0, "Q8_0")):
        if path:
            write_gguf(args.out, path, kind)


if __name__ == "__main__":
    main()
