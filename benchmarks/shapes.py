"""Networks beyond images, at the shapes that people train, as ordinary modules: `(B, ...)` to logits `(B, ..., C)`."""

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor, nn

import native


class Block(nn.Module):
    """A transformer's layer, norms first: attention with or without a causal mask, then a network by position."""

    def __init__(self, dim: int, heads: int, *, causal: bool) -> None:
        super().__init__()
        self.heads, self.causal = heads, causal
        self.before, self.after = nn.LayerNorm(dim), nn.LayerNorm(dim)
        self.inward, self.outward = nn.Linear(dim, 3 * dim), nn.Linear(dim, dim)
        self.mlp = nn.Sequential(nn.Linear(dim, 4 * dim), nn.GELU(), nn.Linear(4 * dim, dim))

    def forward(self, x: Tensor, seen: Tensor | None = None) -> Tensor:
        """Attend to the keys in `seen` `(B, T)`, if it is given."""
        queries, keys, values = self.inward(self.before(x)).unflatten(-1, (3, self.heads, -1)).permute(2, 0, 3, 1, 4)
        mask = None if seen is None else seen[:, None, None]
        found = F.scaled_dot_product_attention(queries, keys, values, attn_mask=mask, is_causal=self.causal)
        x = x + self.outward(found.transpose(1, 2).flatten(2))
        return x + self.mlp(self.after(x))


class Bert(nn.Module):
    """A classifier of token ids `(B, T)`; id 0 is padding, which no one attends to."""

    def __init__(self, vocabulary: int, length: int, dim: int, layers: int) -> None:
        super().__init__()
        self.tokens, self.positions = nn.Embedding(vocabulary, dim), nn.Embedding(length, dim)
        self.blocks = nn.ModuleList(Block(dim, dim // 64, causal=False) for _ in range(layers))
        self.norm, self.head = nn.LayerNorm(dim), nn.Linear(dim, 10)

    def forward(self, ids: Tensor) -> Tensor:
        """Classify by the first token."""
        x = self.tokens(ids) + self.positions(torch.arange(ids.shape[1], device=ids.device).expand_as(ids))
        for block in self.blocks:
            x = block(x, ids != 0)
        return self.head(self.norm(x)[:, 0])


class Gpt2(nn.Module):
    """A language model whose head is its embedding."""

    def __init__(self, vocabulary: int, length: int, dim: int, layers: int) -> None:
        super().__init__()
        self.tokens, self.positions = nn.Embedding(vocabulary, dim), nn.Embedding(length, dim)
        self.blocks = nn.ModuleList(Block(dim, dim // 64, causal=True) for _ in range(layers))
        self.norm, self.head = nn.LayerNorm(dim), nn.Linear(dim, vocabulary, bias=False)
        nn.init.normal_(self.tokens.weight, std=0.02)
        self.head.weight = self.tokens.weight

    def forward(self, ids: Tensor) -> Tensor:
        """Predict each next token."""
        x = self.tokens(ids) + self.positions(torch.arange(ids.shape[1], device=ids.device).expand_as(ids))
        for block in self.blocks:
            x = block(x)
        return self.head(self.norm(x))


class Lora(nn.Module):
    """A frozen linear map and a product of two narrow ones, both trained."""

    def __init__(self, before: int, after: int, rank: int = 8) -> None:
        super().__init__()
        self.frozen = nn.Linear(before, after, bias=False).requires_grad_(False)
        self.down, self.up = nn.Linear(before, rank, bias=False), nn.Linear(rank, after, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        """Add the two."""
        return self.frozen(x) + self.up(self.down(x))


class LlamaBlock(nn.Module):
    """RMS norms, rotary positions, SwiGLU; with `lora`, queries and values by `Lora`."""

    def __init__(self, dim: int, heads: int, *, lora: bool) -> None:
        super().__init__()
        self.heads = heads
        adapted: Callable[[int, int], nn.Module] = Lora if lora else _linear
        self.before, self.after = nn.RMSNorm(dim), nn.RMSNorm(dim)
        self.q, self.k, self.v, self.o = adapted(dim, dim), _linear(dim, dim), adapted(dim, dim), _linear(dim, dim)
        wide = 8 * dim // 3
        self.gate, self.up, self.down = _linear(dim, wide), _linear(dim, wide), _linear(wide, dim)

    def forward(self, x: Tensor) -> Tensor:
        """Attend, then transform position by position."""
        h = self.before(x)
        q, k, v = (layer(h).unflatten(-1, (self.heads, -1)).transpose(1, 2) for layer in (self.q, self.k, self.v))
        found = F.scaled_dot_product_attention(_rotated(q), _rotated(k), v, is_causal=True)
        x = x + self.o(found.transpose(1, 2).flatten(2))
        h = self.after(x)
        return x + self.down(F.silu(self.gate(h)) * self.up(h))


class Llama(nn.Module):
    """A language model of `LlamaBlock`s; with `lora`, nothing but the adapters is trained."""

    def __init__(self, vocabulary: int, dim: int, layers: int, *, lora: bool = False) -> None:
        super().__init__()
        self.tokens, self.head = nn.Embedding(vocabulary, dim), _linear(dim, vocabulary)
        self.blocks = nn.ModuleList(LlamaBlock(dim, dim // 64, lora=lora) for _ in range(layers))
        self.norm = nn.RMSNorm(dim)
        for name, parameter in self.named_parameters():
            parameter.requires_grad_(not lora or _adapter(name))

    def forward(self, ids: Tensor) -> Tensor:
        """Predict each next token."""
        x = self.tokens(ids)
        for block in self.blocks:
            x = block(x)
        return self.head(self.norm(x))


class Recurrent(nn.Module):
    """A recurrent network over `(B, T, d)`, and a linear map of its last output."""

    def __init__(self, kind: Callable[..., nn.Module], dim: int, layers: int) -> None:
        super().__init__()
        self.network, self.head = kind(dim, dim, layers, batch_first=True), nn.Linear(dim, 10)

    def forward(self, x: Tensor) -> Tensor:
        """Classify."""
        return self.head(self.network(x)[0][:, -1])


class Augmented(nn.Module):
    """A network of images over several images `(B, K, C, H, W)` of one example, to logits `(B, K, classes)`."""

    def __init__(self, network: nn.Module) -> None:
        super().__init__()
        self.network = network

    def forward(self, x: Tensor) -> Tensor:
        """Classify each image."""
        return self.network(x.flatten(0, 1)).unflatten(0, x.shape[:2])


class Vit(nn.Module):
    """A vision transformer."""

    def __init__(self, size: int, patch: int, dim: int, layers: int) -> None:
        super().__init__()
        self.patches = nn.Conv2d(3, dim, patch, patch)
        self.embedding = native.Embedding((size // patch) ** 2, dim)
        self.blocks = nn.Sequential(*(Block(dim, dim // 64, causal=False) for _ in range(layers)))
        self.norm, self.head = nn.LayerNorm(dim), nn.Linear(dim, 1000)

    def forward(self, x: Tensor) -> Tensor:
        """Classify by the class token."""
        return self.head(self.norm(self.blocks(self.embedding(self.patches(x))))[:, 0])


def _adapter(name: str) -> bool:
    return any(part in name for part in (".q.down", ".q.up", ".v.down", ".v.up"))


def _linear(before: int, after: int) -> nn.Linear:
    return nn.Linear(before, after, bias=False)


def _rotated(x: Tensor) -> Tensor:
    length, dim = x.shape[-2:]
    rates = 10_000 ** (-torch.arange(0, dim, 2, device=x.device) / dim)
    angles = (torch.arange(length, device=x.device)[:, None] * rates).to(x.dtype)
    cos, sin = angles.cos(), angles.sin()
    first, second = x.chunk(2, -1)
    return torch.cat([first * cos - second * sin, second * cos + first * sin], -1)
