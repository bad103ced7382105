"""Small models, written for the tests, each with one thing that is hard to prune."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn


class Of(nn.Module):
    """Layers, parameters and buffers, and a function over them."""

    def __init__(self, run: Callable[..., Any], **layers: Any):
        super().__init__()
        self.run = run
        for name, layer in layers.items():
            if isinstance(layer, Tensor) and not isinstance(layer, nn.Parameter):
                self.register_buffer(name, layer)
            else:
                setattr(self, name, layer)

    def forward(self, *x: Tensor) -> Any:
        return self.run(self, *x)


class Residual(nn.Module):
    """Two convolutions and a shortcut; the stream's channels are one group, the inner ones another."""

    def __init__(self) -> None:
        super().__init__()
        self.stem, self.norm0 = nn.Conv2d(3, 16, 3, padding=1), nn.BatchNorm2d(16)
        self.conv1, self.norm1 = nn.Conv2d(16, 24, 3, padding=1, bias=False), nn.BatchNorm2d(24)
        self.conv2, self.norm2 = nn.Conv2d(24, 16, 3, padding=1, bias=False), nn.BatchNorm2d(16)
        self.dropout, self.head = nn.Dropout(0.5), nn.Linear(16, 5)

    def forward(self, x: Tensor) -> Tensor:
        x = F.relu(self.norm0(self.stem(x)))
        x = F.relu(x + self.norm2(self.conv2(F.relu(self.norm1(self.conv1(x))))))
        return self.head(self.dropout(x.mean((2, 3))))


class HardCoded(nn.Module):
    """The flattened size stands in the source: the class cannot follow, the graph must."""

    def __init__(self) -> None:
        super().__init__()
        self.conv, self.fc = nn.Conv2d(1, 8, 3), nn.Linear(8 * 6 * 6, 4)

    def forward(self, x: Tensor) -> Tensor:
        return self.fc(torch.relu(self.conv(x)).view(-1, 8 * 6 * 6))


class Attention(nn.Module):
    """Fused qkv, heads in an attribute, a residual stream under layer norm."""

    def __init__(self) -> None:
        super().__init__()
        self.heads = 4
        self.embed, self.norm = nn.Linear(12, 32), nn.LayerNorm(32)
        self.qkv, self.out = nn.Linear(32, 96), nn.Linear(32, 32)
        self.head = nn.Linear(32, 3)

    def forward(self, x: Tensor) -> Tensor:
        x = self.embed(x)
        b, n, _ = x.shape
        q, k, v = self.qkv(self.norm(x)).reshape(b, n, 3, self.heads, -1).permute(2, 0, 3, 1, 4).unbind(0)
        x = x + self.out(F.scaled_dot_product_attention(q, k, v).transpose(1, 2).reshape(b, n, -1))
        return self.head(x)


class Joined(nn.Module):
    """Concatenation, an uneven split, and a gate."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b, self.c = nn.Conv2d(3, 20, 1), nn.Conv2d(3, 12, 1), nn.Conv2d(16, 4, 1)

    def forward(self, x: Tensor) -> Tensor:
        both = torch.cat([self.a(x), self.b(x)], 1)
        value, gate = both.chunk(2, 1)
        return self.c(value * gate.sigmoid())


class Recurrent(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.front = nn.Conv1d(8, 12, 3, padding=1)
        self.rnn = nn.LSTM(12, 10, num_layers=2, bidirectional=True, batch_first=True)
        self.head = nn.Linear(20, 4)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.rnn(self.front(x).transpose(1, 2))[0])


class Structured(nn.Module):
    """A dictionary out, a keyword in, two inputs."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b, self.c = nn.Linear(6, 16), nn.Linear(4, 16), nn.Linear(16, 3)

    def forward(self, x: Tensor, *, extra: Tensor) -> dict[str, Any]:
        hidden = torch.relu(self.a(x) + self.b(extra))
        return {"logits": self.c(hidden), "parts": [hidden.sum(-1), (self.c(hidden) * 2,)]}


MODELS: dict[str, tuple[Callable[[], nn.Module], tuple[int, ...]]] = {
    "residual": (Residual, (2, 3, 8, 8)),
    "hard_coded": (HardCoded, (2, 1, 8, 8)),
    "attention": (Attention, (2, 5, 12)),
    "joined": (Joined, (2, 3, 4, 4)),
    "recurrent": (Recurrent, (2, 8, 6)),
}


def build(name: str) -> tuple[nn.Module, tuple[Tensor, ...]]:
    """A model in evaluation mode, with norms that a wrong slice cannot hide in, and its input."""
    torch.manual_seed(0)
    make, shape = MODELS[name]
    model = make().eval()
    for module in model.modules():
        if isinstance(module, nn.BatchNorm2d):
            nn.init.uniform_(module.weight, 0.5, 1.5)
            nn.init.normal_(module.bias)
            assert module.running_mean is not None and module.running_var is not None
            nn.init.normal_(module.running_mean)
            nn.init.uniform_(module.running_var, 0.5, 1.5)
    return model, (torch.randn(shape),)


def residual() -> tuple[nn.Module, tuple[Tensor, ...]]:
    """For the command line: `models:residual`."""
    return build("residual")
