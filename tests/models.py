"""Small models that the tests share. Module level, so that they pickle."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint


def calls_of_ops(graph: torch.fx.Graph) -> int:
    """How many attention calls of a graph are an op of ours: one without a gradient, one with."""
    ops = torch.ops.sla2.forward, torch.ops.sla2.attention
    # Dynamo's graphs have the packet, exported ones its overload
    return sum(node.target in (op, op.default) for op in ops for node in graph.nodes)


class Attention(nn.Module):
    """Self-attention over (B, N, dim)."""

    def __init__(self, dim: int = 32, heads: int = 2) -> None:
        super().__init__()
        self.qkv = nn.Linear(dim, 3 * dim)
        self.out = nn.Linear(dim, dim)
        self.heads = heads

    def forward(self, x: Tensor) -> Tensor:
        B, N, C = x.shape
        q, k, v = self.qkv(x).view(B, N, 3, self.heads, -1).permute(2, 0, 3, 1, 4)
        return self.out(F.scaled_dot_product_attention(q, k, v).transpose(1, 2).reshape(B, N, C))


class Causal(Attention):
    """`Attention` in which a token sees those before it."""

    def forward(self, x: Tensor) -> Tensor:
        B, N, C = x.shape
        q, k, v = self.qkv(x).view(B, N, 3, self.heads, -1).permute(2, 0, 3, 1, 4)
        return self.out(F.scaled_dot_product_attention(q, k, v, is_causal=True).transpose(1, 2).reshape(B, N, C))


class HandWritten(Attention):
    """`Attention` spelt out; options make it stranger.

    island: scores in float32 with autocast off. softmax_module: softmax as a child. twist: something that keeps it
    from being a plain attention call. drop: dropout on the weights. bias: a mask that the forward makes itself.
    """

    def __init__(
        self,
        dim: int = 32,
        heads: int = 2,
        island: bool = False,
        softmax_module: bool = False,
        twist: str = "",
        drop: float = 0.0,
        bias: str = "",
    ) -> None:
        super().__init__(dim, heads)
        self.scale, self.island, self.twist, self.bias = (dim // heads) ** -0.5, island, twist, bias
        self.softmax = nn.Softmax(dim=-1) if softmax_module else None
        self.drop = nn.Dropout(drop)
        self._factors = [0.5]
        if bias == "plain tensor":
            self.temperature = torch.tensor(0.5)
        if twist == "talking heads":
            self.talk = nn.Linear(heads, heads)
        if twist == "writes a buffer":
            self.calls: Tensor
            self.register_buffer("calls", torch.zeros(()))
        self.causal: Tensor
        self.register_buffer("causal", torch.ones(512, 512, dtype=torch.bool).tril(), persistent=False)

    def biased(self, s: Tensor) -> Tensor:
        n = s.shape[-1]
        if self.bias == "zeros":
            s += torch.zeros(1, 1, n, n, dtype=s.dtype, device=s.device)
        elif self.bias == "causal buffer":
            s = s.masked_fill(self.causal[:n, :n] == 0, float("-inf"))
        elif self.bias == "causal constant":
            s = s + torch.full((n, n), float("-inf"), device=s.device).triu(1)
        elif self.bias == "written later":
            bias = torch.zeros(n, n, device=s.device)
            bias.view(-1)[::7].fill_(-3.0)
            s = s + bias
        elif self.bias == "literal":
            s = s * torch.tensor(0.5)
        elif self.bias == "plain tensor":
            s = s * self.temperature
        elif self.bias == "list":
            s = s * self._factors[0]
        elif self.bias == "random":
            s = s + torch.randint(0, 2, (n, n), device=s.device)
        return s

    def scores(self, q: Tensor, k: Tensor) -> Tensor:
        if self.island:
            with torch.autocast(q.device.type, enabled=False):
                return q.float() @ k.float().transpose(-2, -1) * self.scale
        return (q * self.scale) @ k.transpose(-2, -1)

    def forward(self, x: Tensor) -> Tensor | tuple[Tensor, Tensor]:  # type: ignore[override]
        B, N, C = x.shape
        q, k, v = self.qkv(x).reshape(B, N, 3, self.heads, -1).permute(2, 0, 3, 1, 4)
        s = self.biased(self.scores(q, k))
        weights = s.softmax(dim=-1).to(v.dtype) if self.softmax is None else self.softmax(s)
        weights = self.drop(weights)
        if self.twist == "talking heads":
            weights = self.talk(weights.permute(0, 2, 3, 1)).permute(0, 3, 1, 2)
        if self.twist == "writes a buffer":
            self.calls += 1
        if self.twist == "data dependent" and not bool(weights.sum() > 0):
            weights = weights * 0
        out = self.out((weights @ v).transpose(1, 2).reshape(B, N, C))
        return (out, weights) if self.twist == "weights" else out


class Net(nn.Module):
    """Residual attention blocks, optionally with a graph break in each, or checkpointed."""

    def __init__(
        self, depth: int = 3, dim: int = 32, graph_break: bool = False, use_checkpoint: bool = False
    ) -> None:
        super().__init__()
        self.blocks = nn.ModuleList(Attention(dim) for _ in range(depth))
        self.graph_break, self.use_checkpoint = graph_break, use_checkpoint

    def forward(self, x: Tensor) -> Tensor:
        for block in self.blocks:
            if self.graph_break:
                torch._dynamo.graph_break()
            x = x + (checkpoint(block, x, use_reentrant=False) if self.use_checkpoint else block(x))
        return x


class SelfAndCross(nn.Module):
    """One owner with two calls: attention over x, then to the context's tokens."""

    def __init__(self, dim: int = 32) -> None:
        super().__init__()
        self.proj = nn.Linear(dim, dim)

    def forward(self, x: Tensor, context: Tensor) -> Tensor:
        q = self.proj(x)[:, None]
        y = F.scaled_dot_product_attention(q, q, q)
        c = self.proj(context)[:, None]
        return (y + F.scaled_dot_product_attention(query=y, key=c, value=c))[:, 0]


class Shared(nn.Module):
    """One attention module called three times."""

    def __init__(self) -> None:
        super().__init__()
        self.attention = Attention()
        self.again = self.attention

    def forward(self, x: Tensor) -> Tensor:
        return self.again(self.attention(self.attention(x)))


class Caching(nn.Module):
    """Keeps tensors that its first forward makes: an attribute, a buffer, and a dict entry."""

    def __init__(self) -> None:
        super().__init__()
        self.attention = Attention()
        self.positions: Tensor | None = None
        self.cache: dict[str, Tensor] = {}
        self.steps: Tensor
        self.register_buffer("steps", torch.zeros(()))

    def forward(self, x: Tensor) -> Tensor:
        if self.positions is None:
            self.positions = torch.linspace(0, 1, x.shape[1])[:, None]
        self.cache.setdefault("scale", torch.tensor(0.5))
        self.steps += 1
        return self.attention(x + self.positions * self.cache["scale"])


class DataDependent(nn.Module):
    """Cannot run under fake tensors: reads a value."""

    def __init__(self) -> None:
        super().__init__()
        self.attention = Attention()

    def forward(self, x: Tensor) -> Tensor:
        return self.attention(x) * (2.0 if x.sum().item() > 0 else 1.0)


class Masked(nn.Module):
    """Attention with whatever options the test wants."""

    def forward(self, q: Tensor, k: Tensor, v: Tensor, **options: object) -> Tensor:
        return F.scaled_dot_product_attention(q, k, v, **options)  # type: ignore[arg-type]
