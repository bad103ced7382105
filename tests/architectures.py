"""Whole pipelines in small sizes, written for the tests: detectors with their heads, U-Nets, diffusion, translation, speech, mixtures of experts.

Each function returns (model, example inputs). What is hard about each stands in its docstring.
"""

from __future__ import annotations

import math
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

Model = tuple[nn.Module, tuple[Tensor, ...]]


def conv(inputs: int, outputs: int, kernel: int = 3, stride: int = 1, groups: int = 1, act: type[nn.Module] = nn.SiLU) -> nn.Sequential:
    return nn.Sequential(
        nn.Conv2d(inputs, outputs, kernel, stride, kernel // 2, groups=groups, bias=False), nn.BatchNorm2d(outputs), act()
    )  # fmt: skip


# --- detectors ------------------------------------------------------------------------------------------------------------


class C2f(nn.Module):
    """Cross-stage partial block: split in two, a chain of bottlenecks on one part, everything concatenated."""

    def __init__(self, inputs: int, outputs: int, number: int, shortcut: bool):
        super().__init__()
        self.c, self.shortcut = outputs // 2, shortcut
        self.cv1, self.cv2 = conv(inputs, 2 * self.c, 1), conv((2 + number) * self.c, outputs, 1)
        self.m = nn.ModuleList(nn.Sequential(conv(self.c, self.c), conv(self.c, self.c)) for _ in range(number))

    def forward(self, x: Tensor) -> Tensor:
        y = list(self.cv1(x).split((self.c, self.c), 1))
        for m in self.m:
            y.append(y[-1] + m(y[-1]) if self.shortcut else m(y[-1]))
        return self.cv2(torch.cat(y, 1))


class Sppf(nn.Module):
    """One window of maxima, applied again and again, with all stages concatenated."""

    def __init__(self, channels: int):
        super().__init__()
        self.cv1, self.cv2, self.pool = conv(channels, channels // 2, 1), conv(channels * 2, channels, 1), nn.MaxPool2d(5, 1, 2)

    def forward(self, x: Tensor) -> Tensor:
        y = [self.cv1(x)]
        for _ in range(3):
            y.append(self.pool(y[-1]))
        return self.cv2(torch.cat(y, 1))


class Yolo(nn.Module):
    """Anchor-free one-stage detector: CSP blocks, a pyramid down and up, decoupled heads, boxes as expectations over bins."""

    def __init__(self, classes: int = 6, bins: int = 8):
        super().__init__()
        self.classes, self.bins, self.strides = classes, bins, (8, 16)
        self.stem = nn.Sequential(conv(3, 16, 3, 2), conv(16, 32, 3, 2), C2f(32, 32, 1, True))
        self.p3 = nn.Sequential(conv(32, 48, 3, 2), C2f(48, 48, 2, True))
        self.p4 = nn.Sequential(conv(48, 64, 3, 2), C2f(64, 64, 1, True), Sppf(64))
        self.up, self.top_down = nn.Upsample(scale_factor=2), C2f(112, 48, 1, False)
        self.down, self.bottom_up = conv(48, 48, 3, 2), C2f(112, 64, 1, False)
        self.box = nn.ModuleList(nn.Sequential(conv(c, 16), conv(16, 16), nn.Conv2d(16, 4 * bins, 1)) for c in (48, 64))
        self.cls = nn.ModuleList(nn.Sequential(conv(c, c, groups=c), conv(c, 24, 1), nn.Conv2d(24, classes, 1)) for c in (48, 64))
        self.register_buffer("project", torch.arange(bins, dtype=torch.float))

    def forward(self, x: Tensor) -> Tensor:
        p3 = self.p3(self.stem(x))
        p4 = self.p4(p3)
        n3 = self.top_down(torch.cat([self.up(p4), p3], 1))
        n4 = self.bottom_up(torch.cat([self.down(n3), p4], 1))
        levels, points, strides = [], [], []
        for i, level in enumerate((n3, n4)):
            levels.append(torch.cat([self.box[i](level), self.cls[i](level)], 1).flatten(2))
            rows, columns = level.shape[2:]
            y, x = torch.meshgrid(torch.arange(rows) + 0.5, torch.arange(columns) + 0.5, indexing="ij")
            points.append(torch.stack([x, y], -1).view(-1, 2))
            strides.append(torch.full((rows * columns, 1), float(self.strides[i])))
        box, cls = torch.cat(levels, 2).split((4 * self.bins, self.classes), 1)
        b, _, a = box.shape
        sides = torch.einsum("bkna,n->bka", box.view(b, 4, self.bins, a).softmax(2), self.project.to(box.dtype))
        point = torch.cat(points).T.to(box.dtype)[None]
        lt, rb = sides.chunk(2, 1)
        boxes = torch.cat([(2 * point + rb - lt) / 2, rb + lt], 1) * torch.cat(strides).T.to(box.dtype)
        return torch.cat([boxes, cls.sigmoid()], 1)


def yolo() -> Model:
    return Yolo(), (torch.randn(2, 3, 64, 64),)


class AnchorHead(nn.Module):
    """Anchors on one axis with the numbers that describe a box: channels = anchors · (4 + 1 + classes), decoded with a grid."""

    def __init__(self) -> None:
        super().__init__()
        self.backbone = nn.Sequential(conv(3, 16, 3, 2, act=nn.ReLU), conv(16, 32, 3, 2, act=nn.ReLU), conv(32, 48, act=nn.ReLU))
        self.head = nn.Conv2d(48, 3 * 9, 1)
        self.register_buffer("anchors", torch.rand(1, 3, 1, 1, 2) * 4)

    def forward(self, x: Tensor) -> Tensor:
        x = self.head(self.backbone(x))
        b, _, h, w = x.shape
        x = x.view(b, 3, 9, h, w).permute(0, 1, 3, 4, 2).contiguous()
        y, z = torch.meshgrid(torch.arange(h), torch.arange(w), indexing="ij")
        grid = torch.stack((z, y), 2).view(1, 1, h, w, 2).to(x.dtype)
        xy, wh, conf = x.sigmoid().split((2, 2, 5), 4)
        return torch.cat([(xy * 2 - 0.5 + grid) * 4, (wh * 2) ** 2 * self.anchors, conf], 4).view(b, -1, 9)


def anchor_head() -> Model:
    return AnchorHead(), (torch.randn(2, 3, 32, 32),)


class WeightedPyramid(nn.Module):
    """A pyramid whose levels are fused with learned weights, by depthwise-separable convolutions, with heads shared by all levels."""

    def __init__(self, c: int = 24):
        super().__init__()
        self.c3, self.c4, self.c5 = conv(3, 16, 3, 4), conv(16, 24, 3, 2), conv(24, 40, 3, 2)
        self.lateral = nn.ModuleList(conv(i, c, 1) for i in (16, 24, 40))
        self.fuse = nn.ModuleList(nn.Sequential(nn.Conv2d(c, c, 3, 1, 1, groups=c), nn.Conv2d(c, c, 1), nn.BatchNorm2d(c)) for _ in range(4))
        self.weights = nn.Parameter(torch.rand(4, 2))
        self.tower, self.out = nn.Sequential(conv(c, c), conv(c, c)), nn.Conv2d(c, 9, 3, padding=1)

    def _fused(self, i: int, a: Tensor, b: Tensor) -> Tensor:
        w = F.relu(self.weights[i])
        w = w / (w.sum() + 1e-4)
        return self.fuse[i](F.silu(w[0] * a + w[1] * b))

    def forward(self, x: Tensor) -> list[Tensor]:
        c3 = self.c3(x)
        c4 = self.c4(c3)
        a, b, c = (lateral(x) for lateral, x in zip(self.lateral, (c3, c4, self.c5(c4)), strict=True))
        b = self._fused(0, b, F.interpolate(c, size=b.shape[2:]))
        a = self._fused(1, a, F.interpolate(b, size=a.shape[2:]))
        b = self._fused(2, b, F.max_pool2d(a, 2))
        c = self._fused(3, c, F.max_pool2d(b, 2))
        return [self.out(self.tower(level)) for level in (a, b, c)]


def weighted_pyramid() -> Model:
    return WeightedPyramid(), (torch.randn(2, 3, 64, 64),)


class Detr(nn.Module):
    """Boxes from learned queries: torch's own transformer over a convolutional map with sine positions."""

    def __init__(self, d: int = 32):
        super().__init__()
        self.d = d
        self.backbone = nn.Sequential(conv(3, 16, 3, 4), conv(16, 32, 3, 4))
        self.project, self.queries = nn.Conv2d(32, d, 1), nn.Parameter(torch.randn(7, d))
        self.transformer = nn.Transformer(d, 4, 2, 2, 64, batch_first=True)
        self.classes, self.boxes = nn.Linear(d, 5), nn.Sequential(nn.Linear(d, d), nn.ReLU(), nn.Linear(d, 4))

    def forward(self, x: Tensor) -> dict[str, Tensor]:
        x = self.project(self.backbone(x))
        b, _, h, w = x.shape
        rate = torch.exp(torch.arange(0, self.d // 2, 2) * (-math.log(1e4) / (self.d // 2))).to(x.dtype)
        y = torch.arange(h).to(x.dtype)[:, None] * rate
        z = torch.arange(w).to(x.dtype)[:, None] * rate
        sines = [torch.stack([v.sin(), v.cos()], -1).flatten(1) for v in (y, z)]
        position = torch.cat([sines[0][:, None].expand(h, w, -1), sines[1][None].expand(h, w, -1)], -1).flatten(0, 1)
        memory = x.flatten(2).transpose(1, 2) + position
        y = self.transformer(memory, self.queries.unsqueeze(0).expand(b, -1, -1))
        return {"logits": self.classes(y), "boxes": self.boxes(y).sigmoid()}


def detr() -> Model:
    return Detr(), (torch.randn(2, 3, 64, 64),)


class DeformableAttention(nn.Module):
    """Heads that read the map at learned offsets from reference points, by grid sampling."""

    def __init__(self, d: int = 32, heads: int = 4, points: int = 2):
        super().__init__()
        self.heads, self.points, self.width = heads, points, d // heads
        self.stem = conv(3, d, 3, 4)
        self.value, self.offsets, self.weights, self.out = (
            nn.Linear(d, d),
            nn.Linear(d, heads * points * 2),
            nn.Linear(d, heads * points),
            nn.Linear(d, d),
        )
        self.query, self.reference, self.head = nn.Parameter(torch.randn(5, d)), nn.Parameter(torch.rand(5, 2)), nn.Linear(d, 4)

    def forward(self, x: Tensor) -> Tensor:
        x = self.stem(x)
        b, _, h, w = x.shape
        q = self.query.expand(b, -1, -1)
        value = (
            self.value(x.flatten(2).transpose(1, 2))
            .view(b, h * w, self.heads, self.width)
            .permute(0, 2, 3, 1)
            .reshape(b * self.heads, self.width, h, w)
        )
        offsets = self.offsets(q).view(b, 5, self.heads, self.points, 2).permute(0, 2, 1, 3, 4).flatten(0, 1)
        weights = self.weights(q).view(b, 5, self.heads, self.points).softmax(-1).permute(0, 2, 1, 3).reshape(b * self.heads, 1, 5, self.points)
        grid = self.reference.view(1, 5, 1, 2) * 2 - 1 + offsets * 0.1
        sampled = F.grid_sample(value, grid, align_corners=False)
        y = (sampled * weights).sum(-1).view(b, self.heads * self.width, 5).transpose(1, 2)
        return self.head(q + self.out(y))


def deformable_attention() -> Model:
    return DeformableAttention(), (torch.randn(2, 3, 32, 32),)


class Detector(nn.Module):
    """torchvision's own parts, without the code that branches on boxes: pyramid, proposals' head, aligned regions, box head."""

    def __init__(self) -> None:
        super().__init__()
        from torchvision.models.detection import faster_rcnn, rpn
        from torchvision.ops import FeaturePyramidNetwork

        self.c3, self.c4 = conv(3, 16, 3, 4), conv(16, 32, 3, 2)
        self.pyramid = FeaturePyramidNetwork([16, 32], 24)
        self.rpn, self.box_head, self.predictor = rpn.RPNHead(24, 3), faster_rcnn.TwoMLPHead(24 * 9, 40), faster_rcnn.FastRCNNPredictor(40, 5)

    def forward(self, x: Tensor, boxes: Tensor) -> Any:
        from torchvision.ops import roi_align

        c3 = self.c3(x)
        levels = list(self.pyramid({"a": c3, "b": self.c4(c3)}).values())
        regions = roi_align(levels[0], boxes, (3, 3), 0.25, 2)
        return self.rpn(levels), self.predictor(self.box_head(regions))


def detector() -> Model:
    return Detector(), (torch.randn(2, 3, 32, 32), torch.tensor([[0.0, 1, 1, 20, 20], [1.0, 4, 4, 30, 16], [1.0, 0, 0, 9, 9]]))


class MaskHead(nn.Module):
    """Class logits and mask logits from regions: transposed convolution, and coefficients that combine prototypes."""

    def __init__(self) -> None:
        super().__init__()
        self.features, self.prototypes = conv(3, 24, 3, 2), nn.Sequential(conv(24, 24), nn.ConvTranspose2d(24, 24, 2, 2), conv(24, 8, 1))
        self.coefficients = nn.Conv2d(24, 8, 1)

    def forward(self, x: Tensor) -> Tensor:
        x = self.features(x)
        coefficients = self.coefficients(x).flatten(2).tanh()
        return torch.einsum("bka,bkhw->bahw", coefficients, self.prototypes(x))


def mask_head() -> Model:
    return MaskHead(), (torch.randn(2, 3, 16, 16),)


# --- images to images -----------------------------------------------------------------------------------------------------


class Unet(nn.Module):
    """Skips concatenated with what comes back up."""

    def __init__(self) -> None:
        super().__init__()

        def double(i: int, o: int) -> nn.Sequential:
            return nn.Sequential(conv(i, o, act=nn.ReLU), conv(o, o, act=nn.ReLU))

        self.a, self.b, self.c = double(1, 16), double(16, 32), double(32, 48)
        self.up_b, self.up_a = nn.ConvTranspose2d(48, 32, 2, 2), nn.ConvTranspose2d(32, 16, 2, 2)
        self.d, self.e, self.out = double(64, 32), double(32, 16), nn.Conv2d(16, 2, 1)

    def forward(self, x: Tensor) -> Tensor:
        a = self.a(x)
        b = self.b(F.max_pool2d(a, 2))
        c = self.c(F.max_pool2d(b, 2))
        d = self.d(torch.cat([self.up_b(c), b], 1))
        return self.out(self.e(torch.cat([self.up_a(d), a], 1)))


def unet() -> Model:
    return Unet(), (torch.randn(2, 1, 16, 16),)


class TimeBlock(nn.Module):
    """Group norms; a time embedding that scales and shifts; a shortcut that changes the width."""

    def __init__(self, inputs: int, outputs: int, time: int):
        super().__init__()
        self.norm1, self.conv1 = nn.GroupNorm(4, inputs), nn.Conv2d(inputs, outputs, 3, padding=1)
        self.time = nn.Linear(time, 2 * outputs)
        self.norm2, self.conv2 = nn.GroupNorm(4, outputs), nn.Conv2d(outputs, outputs, 3, padding=1)
        self.skip = nn.Conv2d(inputs, outputs, 1) if inputs != outputs else nn.Identity()

    def forward(self, x: Tensor, t: Tensor) -> Tensor:
        y = self.conv1(F.silu(self.norm1(x)))
        scale, shift = self.time(F.silu(t))[:, :, None, None].chunk(2, 1)
        return self.skip(x) + self.conv2(F.silu(self.norm2(y) * (1 + scale) + shift))


class DiffusionUnet(nn.Module):
    """Denoiser: sinusoidal time, residual blocks with group norm, self-attention at the bottom, skips concatenated."""

    def __init__(self, c: int = 16, time: int = 32):
        super().__init__()
        self.c, self.heads = c, 2
        self.time = nn.Sequential(nn.Linear(c, time), nn.SiLU(), nn.Linear(time, time))
        self.stem, self.a, self.down = nn.Conv2d(3, c, 3, padding=1), TimeBlock(c, c, time), nn.Conv2d(c, 2 * c, 3, 2, 1)
        self.b, self.norm, self.qkv, self.proj = (
            TimeBlock(2 * c, 2 * c, time),
            nn.GroupNorm(4, 2 * c),
            nn.Conv2d(2 * c, 6 * c, 1),
            nn.Conv2d(2 * c, 2 * c, 1),
        )
        self.up, self.d = nn.ConvTranspose2d(2 * c, c, 4, 2, 1), TimeBlock(2 * c, c, time)
        self.out = nn.Sequential(nn.GroupNorm(4, c), nn.SiLU(), nn.Conv2d(c, 3, 3, padding=1))

    def forward(self, x: Tensor, t: Tensor) -> Tensor:
        rate = torch.exp(-math.log(1e4) * torch.arange(self.c // 2) / (self.c // 2)).to(x.dtype)
        angle = t[:, None].to(x.dtype) * rate
        t = self.time(torch.cat([angle.cos(), angle.sin()], -1))
        a = self.a(self.stem(x), t)
        b = self.b(self.down(a), t)
        n, _, h, w = b.shape
        q, k, v = self.qkv(self.norm(b)).reshape(n * self.heads, -1, h * w).chunk(3, 1)
        weight = torch.einsum("bct,bcs->bts", q * 0.5, k * 0.5).softmax(-1)
        b = b + self.proj(torch.einsum("bts,bcs->bct", weight, v).reshape(n, -1, h, w))
        return self.out(self.d(torch.cat([self.up(b), a], 1), t))


def diffusion_unet() -> Model:
    return DiffusionUnet(), (torch.randn(2, 3, 8, 8), torch.tensor([3, 500]))


class DiffusionTransformer(nn.Module):
    """Patches under norms without affine terms of their own; six vectors from the condition shift, scale and gate."""

    def __init__(self, d: int = 32):
        super().__init__()
        self.embed, self.position = nn.Conv2d(3, d, 2, 2), nn.Parameter(torch.randn(1, 16, d) * 0.02)
        self.condition, self.modulation = nn.Embedding(10, d), nn.Linear(d, 6 * d)
        self.norm1, self.norm2 = nn.LayerNorm(d, elementwise_affine=False), nn.LayerNorm(d, elementwise_affine=False)
        self.attention, self.mlp = nn.MultiheadAttention(d, 4, batch_first=True), nn.Sequential(nn.Linear(d, 64), nn.GELU(), nn.Linear(64, d))
        self.out = nn.Linear(d, 12)

    def forward(self, x: Tensor, label: Tensor) -> Tensor:
        x = self.embed(x).flatten(2).transpose(1, 2) + self.position
        s1, b1, g1, s2, b2, g2 = self.modulation(F.silu(self.condition(label)))[:, None].chunk(6, -1)
        y = self.norm1(x) * (1 + s1) + b1
        x = x + g1 * self.attention(y, y, y, need_weights=False)[0]
        x = x + g2 * self.mlp(self.norm2(x) * (1 + s2) + b2)
        b = x.shape[0]
        return torch.einsum("bhwpqc->bchpwq", self.out(x).view(b, 4, 4, 2, 2, 3)).reshape(b, 3, 8, 8)


def diffusion_transformer() -> Model:
    return DiffusionTransformer(), (torch.randn(2, 3, 8, 8), torch.tensor([1, 7]))


class SuperResolution(nn.Module):
    """Densely concatenated residual blocks, then channels become pixels."""

    def __init__(self, c: int = 16, growth: int = 8):
        super().__init__()
        self.stem = nn.Conv2d(3, c, 3, padding=1)
        self.dense = nn.ModuleList(nn.Conv2d(c + i * growth, growth if i < 3 else c, 3, padding=1) for i in range(4))
        self.up, self.out = nn.Conv2d(c, 4 * c, 3, padding=1), nn.Conv2d(c, 3, 3, padding=1)

    def forward(self, x: Tensor) -> Tensor:
        x = self.stem(x)
        parts = [x]
        for layer in self.dense[:-1]:
            parts.append(F.leaky_relu(layer(torch.cat(parts, 1)), 0.2))
        x = x + 0.2 * self.dense[-1](torch.cat(parts, 1))
        return self.out(F.leaky_relu(F.pixel_shuffle(self.up(x), 2), 0.2))


def super_resolution() -> Model:
    return SuperResolution(), (torch.randn(2, 3, 8, 8),)


# --- sequences ------------------------------------------------------------------------------------------------------------


class Translator(nn.Module):
    """Encoder and decoder with one embedding for both and for the output; a causal mask; cross-attention; sine positions."""

    def __init__(self, words: int = 50, d: int = 32):
        super().__init__()
        self.d = d
        self.embed = nn.Embedding(words, d)
        self.transformer = nn.Transformer(d, 4, 2, 2, 64, batch_first=True, norm_first=True, activation="gelu")
        table = torch.arange(24)[:, None] * torch.exp(torch.arange(0, d, 2) * (-math.log(1e4) / d))
        self.register_buffer("position", torch.stack([table.sin(), table.cos()], -1).flatten(1))

    def forward(self, source: Tensor, target: Tensor) -> Tensor:
        x, y = (self.embed(ids) * math.sqrt(self.d) + self.position[: ids.shape[1]] for ids in (source, target))
        mask = torch.full((target.shape[1], target.shape[1]), float("-inf")).triu(1).to(x.dtype)
        return F.linear(self.transformer(x, y, tgt_mask=mask), self.embed.weight)


def translator() -> Model:
    return Translator(), (torch.randint(0, 50, (2, 9)), torch.randint(0, 50, (2, 7)))


class Summariser(nn.Module):
    """Attention of the kind that T5 has: no scale, relative positions in buckets shared by all layers, RMS norms by hand, gated GELU."""

    def __init__(self, d: int = 32, heads: int = 4, width: int = 8):
        super().__init__()
        self.heads, self.width = heads, width
        self.embed, self.bias = nn.Embedding(40, d), nn.Embedding(8, heads)
        self.q, self.k, self.v = (nn.Linear(d, heads * width, bias=False) for _ in range(3))
        self.o = nn.Linear(heads * width, d, bias=False)
        self.scale1, self.scale2 = nn.Parameter(torch.ones(d)), nn.Parameter(torch.ones(d))
        self.gate, self.up, self.down = nn.Linear(d, 64, bias=False), nn.Linear(d, 64, bias=False), nn.Linear(64, d, bias=False)
        self.head = nn.Linear(d, 40, bias=False)

    def _normed(self, x: Tensor, scale: Tensor) -> Tensor:
        return scale * (x * torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + 1e-6))

    def forward(self, ids: Tensor) -> Tensor:
        x = self.embed(ids)
        b, n, _ = x.shape
        y = self._normed(x, self.scale1)
        q, k, v = (p(y).view(b, n, self.heads, self.width).transpose(1, 2) for p in (self.q, self.k, self.v))
        distance = (torch.arange(n)[None] - torch.arange(n)[:, None]).clamp(-3, 4) + 3
        weight = (q @ k.transpose(2, 3) + self.bias(distance).permute(2, 0, 1)[None]).softmax(-1)
        x = x + self.o((weight @ v).transpose(1, 2).reshape(b, n, self.heads * self.width))
        y = self._normed(x, self.scale2)
        return self.head(x + self.down(F.gelu(self.gate(y)) * self.up(y)))


def summariser() -> Model:
    return Summariser(), (torch.randint(0, 40, (2, 11)),)


class Experts(nn.Module):
    """Every token goes to its two best experts of four; the experts' weights are stacked in one tensor each, as language models keep them."""

    def __init__(self, d: int = 24, hidden: int = 32, experts: int = 4):
        super().__init__()
        self.inp, self.router = nn.Linear(10, d), nn.Linear(d, experts, bias=False)
        self.up, self.down = nn.Parameter(torch.randn(experts, d, 2 * hidden) * 0.2), nn.Parameter(torch.randn(experts, hidden, d) * 0.2)
        self.shared, self.out = nn.Sequential(nn.Linear(d, 48), nn.SiLU(), nn.Linear(48, d)), nn.Linear(d, 5)

    def forward(self, x: Tensor) -> Tensor:
        x = self.inp(x)
        score, index = self.router(x).softmax(-1).topk(2, -1)
        weight = torch.zeros_like(x[..., :4]).scatter(-1, index, score / score.sum(-1, keepdim=True))
        gate, value = torch.einsum("btd,edh->bteh", x, self.up).chunk(2, -1)
        y = torch.einsum("bteh,ehd->bted", F.silu(gate) * value, self.down)
        return self.out(x + self.shared(x) + (y * weight[..., None]).sum(2))


def experts() -> Model:
    return Experts(), (torch.randn(2, 6, 10),)


class ExpertModules(nn.Module):
    """Experts as modules of their own, each run on all tokens and weighted by a soft router."""

    def __init__(self, d: int = 24) -> None:
        super().__init__()
        self.inp, self.router, self.out = nn.Linear(10, d), nn.Linear(d, 3), nn.Linear(d, 5)
        self.experts = nn.ModuleList(nn.Sequential(nn.Linear(d, h), nn.ReLU(), nn.Linear(h, d)) for h in (16, 32, 48))

    def forward(self, x: Tensor) -> Tensor:
        x = self.inp(x)
        weight = self.router(x).softmax(-1)
        return self.out(torch.stack([e(x) for e in self.experts], -1).mul(weight.unsqueeze(-2)).sum(-1))


def expert_modules() -> Model:
    return ExpertModules(), (torch.randn(2, 6, 10),)


class SpeechCtc(nn.Module):
    """Spectrogram → convolutions over time and frequency → stacked bidirectional recurrent layers → letters for each frame."""

    def __init__(self) -> None:
        super().__init__()
        self.front = nn.Sequential(conv(1, 8, 3, 2, act=nn.Hardtanh), conv(8, 8, act=nn.Hardtanh))
        self.rnn, self.norm = nn.GRU(8 * 10, 24, 2, batch_first=True, bidirectional=True), nn.BatchNorm1d(48)
        self.head = nn.Linear(48, 12)

    def forward(self, x: Tensor) -> Tensor:
        x = self.front(x.unsqueeze(1))
        b, c, f, t = x.shape
        x, _ = self.rnn(x.reshape(b, c * f, t).transpose(1, 2))
        return self.head(self.norm(x.transpose(1, 2)).transpose(1, 2)).log_softmax(-1)


def speech_ctc() -> Model:
    return SpeechCtc(), (torch.randn(2, 20, 16),)


class Conformer(nn.Module):
    """Half-step feed-forward, attention with a learned relative shift, gated depthwise convolution in time."""

    def __init__(self, d: int = 32, heads: int = 4):
        super().__init__()
        self.heads, self.width = heads, d // heads
        self.inp, self.ff1, self.ff2 = nn.Linear(20, d), self._ff(d), self._ff(d)
        self.norm_a, self.qkv, self.pos, self.o = nn.LayerNorm(d), nn.Linear(d, 3 * d), nn.Linear(d, d, bias=False), nn.Linear(d, d)
        self.u, self.v = nn.Parameter(torch.randn(heads, self.width)), nn.Parameter(torch.randn(heads, self.width))
        self.norm_c, self.point1, self.depth = nn.LayerNorm(d), nn.Conv1d(d, 2 * d, 1), nn.Conv1d(d, d, 5, padding=2, groups=d)
        self.norm_d, self.point2 = nn.BatchNorm1d(d), nn.Conv1d(d, d, 1)
        self.norm, self.head = nn.LayerNorm(d), nn.Linear(d, 12)
        self.register_buffer("table", torch.randn(19, d))

    def _ff(self, d: int) -> nn.Sequential:
        return nn.Sequential(nn.LayerNorm(d), nn.Linear(d, 64), nn.SiLU(), nn.Dropout(0.1), nn.Linear(64, d))

    def _attention(self, x: Tensor) -> Tensor:
        b, n, _ = x.shape
        q, k, v = self.qkv(self.norm_a(x)).view(b, n, 3, self.heads, self.width).unbind(2)
        p = self.pos(self.table).view(2 * n - 1, self.heads, self.width)
        content = torch.einsum("bihd,bjhd->bhij", q + self.u, k)
        moved = torch.einsum("bihd,phd->bhip", q + self.v, p)
        moved = F.pad(moved, (1, 0)).view(b, self.heads, 2 * n, n)[:, :, 1:].reshape(b, self.heads, n, 2 * n - 1)[..., :n]
        weight = ((content + moved) / math.sqrt(8)).softmax(-1)
        return self.o(torch.einsum("bhij,bjhd->bihd", weight, v).reshape(b, n, -1))

    def forward(self, x: Tensor) -> Tensor:
        x = self.inp(x)
        x = x + 0.5 * self.ff1(x)
        x = x + self._attention(x)
        y = F.glu(self.point1(self.norm_c(x).transpose(1, 2)), 1)
        x = x + self.point2(F.silu(self.norm_d(self.depth(y)))).transpose(1, 2)
        return self.head(self.norm(x + 0.5 * self.ff2(x))).log_softmax(-1)


def conformer() -> Model:
    return Conformer(), (torch.randn(2, 10, 20),)


class Wave(nn.Module):
    """Raw audio: a strided stack under a group norm of one channel a group, a grouped positional convolution with weight norm, a transformer."""

    def __init__(self, d: int = 32):
        super().__init__()
        self.conv1, self.norm1, self.conv2 = nn.Conv1d(1, 24, 10, 5), nn.GroupNorm(24, 24), nn.Conv1d(24, 24, 3, 2)
        self.norm, self.project = nn.LayerNorm(24), nn.Linear(24, d)
        self.position = torch.nn.utils.parametrizations.weight_norm(nn.Conv1d(d, d, 4, padding=2, groups=4), dim=2)
        self.layer, self.head = nn.TransformerEncoderLayer(d, 4, 64, batch_first=True), nn.Linear(d, 10)

    def forward(self, x: Tensor) -> Tensor:
        x = F.gelu(self.conv2(F.gelu(self.norm1(self.conv1(x.unsqueeze(1))))))
        x = self.project(self.norm(x.transpose(1, 2)))
        x = x + F.gelu(self.position(x.transpose(1, 2))[..., :-1]).transpose(1, 2)
        return self.head(self.layer(x))


def wave() -> Model:
    return Wave(), (torch.randn(2, 160),)


class Vocoder(nn.Module):
    """Transposed convolutions and dilated residual blocks whose answers are averaged."""

    def __init__(self) -> None:
        super().__init__()
        self.inp, self.out = nn.Conv1d(16, 32, 7, padding=3), nn.Conv1d(16, 1, 7, padding=3)
        self.up = nn.ConvTranspose1d(32, 16, 8, 4, 2)
        self.blocks = nn.ModuleList(nn.ModuleList(nn.Conv1d(16, 16, k, padding=d * (k - 1) // 2, dilation=d) for d in (1, 3)) for k in (3, 5))

    def forward(self, x: Tensor) -> Tensor:
        x = self.up(F.leaky_relu(self.inp(x), 0.1))
        total = torch.zeros_like(x)
        for block in self.blocks:
            y = x
            for layer in block:
                y = y + layer(F.leaky_relu(y, 0.1))
            total = total + y
        return torch.tanh(self.out(F.leaky_relu(total / len(self.blocks))))


def vocoder() -> Model:
    return Vocoder(), (torch.randn(2, 16, 12),)


class Stepwise(nn.Module):
    """Recurrent cells in a loop over time, with attention over the encoder's states."""

    def __init__(self, d: int = 24):
        super().__init__()
        self.encoder, self.cell = nn.LSTM(8, d, batch_first=True), nn.LSTMCell(8 + d, d)
        self.query, self.out, self.second = nn.Linear(d, d), nn.Linear(2 * d, 8), nn.GRUCell(8, d)

    def forward(self, x: Tensor) -> Tensor:
        memory, (h, c) = self.encoder(x)
        h, c = h[0], c[0]
        step, answers, g = torch.zeros_like(x[:, 0]), [], torch.zeros_like(h)
        for _ in range(3):
            context = torch.bmm((memory @ self.query(h).unsqueeze(2)).softmax(1).transpose(1, 2), memory).squeeze(1)
            h, c = self.cell(torch.cat([step, context], 1), (h, c))
            g = self.second(step, g)
            step = self.out(torch.cat([h + g, context], 1))
            answers.append(step)
        return torch.stack(answers, 1)


def stepwise() -> Model:
    return Stepwise(), (torch.randn(2, 7, 8),)


class StateSpace(nn.Module):
    """A selective state space: gates, a causal depthwise convolution, decay from a parameter, a loop over time."""

    def __init__(self, d: int = 16, inner: int = 32, state: int = 4, rank: int = 2):
        super().__init__()
        self.inner, self.state, self.rank = inner, state, rank
        self.norm, self.inp, self.conv = nn.RMSNorm(d), nn.Linear(d, 2 * inner, bias=False), nn.Conv1d(inner, inner, 3, padding=2, groups=inner)
        self.x_proj, self.dt_proj, self.out = nn.Linear(inner, rank + 2 * state, bias=False), nn.Linear(rank, inner), nn.Linear(inner, d, bias=False)
        self.a_log, self.d = nn.Parameter(torch.rand(inner, state)), nn.Parameter(torch.ones(inner))
        self.embed, self.head = nn.Linear(6, d), nn.Linear(d, 3)

    def forward(self, x: Tensor) -> Tensor:
        x = self.embed(x)
        n = x.shape[1]
        u, z = self.inp(self.norm(x)).chunk(2, -1)
        u = F.silu(self.conv(u.transpose(1, 2))[..., :n]).transpose(1, 2)
        dt, b, c = self.x_proj(u).split((self.rank, self.state, self.state), -1)
        dt = F.softplus(self.dt_proj(dt))
        decay = torch.exp(dt.unsqueeze(-1) * -torch.exp(self.a_log))
        drive = dt.unsqueeze(-1) * b.unsqueeze(2) * u.unsqueeze(-1)
        h, ys = torch.zeros_like(drive[:, 0]), []
        for t in range(n):
            h = decay[:, t] * h + drive[:, t]
            ys.append(torch.einsum("bds,bs->bd", h, c[:, t]))
        y = (torch.stack(ys, 1) + u * self.d) * F.silu(z)
        return self.head(x + self.out(y))


def state_space() -> Model:
    return StateSpace(), (torch.randn(2, 5, 6),)


# --- others ---------------------------------------------------------------------------------------------------------------


class PointNet(nn.Module):
    """A learned 3 × 3 transform of the points, shared layers, a maximum over all of them."""

    def __init__(self) -> None:
        super().__init__()
        self.t1, self.t2 = nn.Conv1d(3, 16, 1), nn.Linear(16, 9)
        self.a, self.b, self.norm = nn.Conv1d(3, 24, 1), nn.Conv1d(24, 48, 1), nn.BatchNorm1d(48)
        self.c, self.head = nn.Linear(48, 24), nn.Linear(24, 4)

    def forward(self, x: Tensor) -> Tensor:
        transform = self.t2(F.relu(self.t1(x)).amax(2)).view(-1, 3, 3) + torch.eye(3).to(x.dtype)
        x = torch.bmm(x.transpose(1, 2), transform).transpose(1, 2)
        x = F.relu(self.norm(self.b(F.relu(self.a(x)))))
        return self.head(F.relu(self.c(torch.max(x, 2)[0])))


def point_net() -> Model:
    return PointNet(), (torch.randn(2, 3, 20),)


class Contrastive(nn.Module):
    """Two towers into one space: the embeddings are compared by cosine, so their width is shared though neither reads the other."""

    def __init__(self) -> None:
        super().__init__()
        self.image = nn.Sequential(conv(3, 16, 3, 2), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(16, 24))
        self.words, self.text, self.scale = nn.Embedding(30, 20), nn.Linear(20, 24), nn.Parameter(torch.tensor(2.0))

    def forward(self, x: Tensor, ids: Tensor) -> tuple[Tensor, Tensor]:
        image = F.normalize(self.image(x), dim=-1)
        text = F.normalize(self.text(self.words(ids).mean(1)), dim=-1)
        return self.scale.exp() * image @ text.T, F.cosine_similarity(image, text)


def contrastive() -> Model:
    return Contrastive(), (torch.randn(2, 3, 8, 8), torch.randint(0, 30, (2, 5)))


class SlowFast(nn.Module):
    """Two pathways over one clip at two speeds, the fast one joined into the slow one."""

    def __init__(self) -> None:
        super().__init__()
        self.slow1, self.fast1 = nn.Conv3d(3, 16, 3, (1, 2, 2), 1), nn.Conv3d(3, 4, 3, (1, 2, 2), 1)
        self.lateral = nn.Conv3d(4, 8, (5, 1, 1), (4, 1, 1), (2, 0, 0))
        self.slow2, self.fast2, self.head = nn.Conv3d(24, 24, 1), nn.Conv3d(4, 8, 1), nn.Linear(32, 5)

    def forward(self, x: Tensor) -> Tensor:
        slow, fast = F.relu(self.slow1(x[:, :, ::4])), F.relu(self.fast1(x))
        slow = F.relu(self.slow2(torch.cat([slow, self.lateral(fast)], 1)))
        return self.head(torch.cat([slow.mean((2, 3, 4)), F.relu(self.fast2(fast)).mean((2, 3, 4))], 1))


def slow_fast() -> Model:
    return SlowFast(), (torch.randn(2, 3, 8, 12, 12),)


class Radiance(nn.Module):
    """A deep perceptron over encoded positions, which it reads again half-way."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b = nn.Linear(3 + 24, 32), nn.Linear(32, 32)
        self.c, self.density, self.feature, self.colour = nn.Linear(32 + 27, 32), nn.Linear(32, 1), nn.Linear(32, 16), nn.Linear(16 + 3, 3)

    def forward(self, x: Tensor, view: Tensor) -> Tensor:
        angle = x.unsqueeze(-1) * 2.0 ** torch.arange(4).to(x.dtype)
        x = torch.cat([x, angle.sin().flatten(-2), angle.cos().flatten(-2)], -1)
        h = F.relu(self.c(torch.cat([F.relu(self.b(F.relu(self.a(x)))), x], -1)))
        return torch.cat([self.colour(torch.cat([self.feature(h), view], -1)).sigmoid(), F.relu(self.density(h))], -1)


def radiance() -> Model:
    return Radiance(), (torch.randn(5, 3), torch.randn(5, 3))


class DispatchedExperts(nn.Module):
    """Every expert runs on the tokens that chose it, picked out by truth values and written back, or added, to where they were."""

    def __init__(self, d: int = 24) -> None:
        super().__init__()
        self.inp, self.router, self.out = nn.Linear(10, d), nn.Linear(d, 3), nn.Linear(d, 5)
        self.first, self.second = (nn.ModuleList(nn.Sequential(nn.Linear(d, 32), nn.GELU(), nn.Linear(32, d)) for _ in range(3)) for _ in range(2))

    def forward(self, x: Tensor) -> Tensor:
        x = self.inp(x)
        chosen = self.router(x).argmax(-1)
        y, z = torch.zeros_like(x), torch.zeros_like(x)
        for number, (first, second) in enumerate(zip(self.first, self.second, strict=True)):
            mine = chosen == number
            y[mine] = first(x[mine])
            z = z.index_put((mine,), second(x[mine]), accumulate=True)
        z[:, 0] = 0.5
        return self.out(x + y + z)


def dispatched_experts() -> Model:
    return DispatchedExperts(), (torch.randn(2, 6, 10),)


class GroupedExperts(nn.Module):
    """Tokens are sorted by their expert, and all experts multiply their rows in one operator (Mixtral and others, in transformers 5)."""

    def __init__(self, d: int = 24, experts: int = 3) -> None:
        super().__init__()
        self.inp, self.router, self.out = nn.Linear(10, d), nn.Linear(d, experts), nn.Linear(d, 5)
        self.up, self.down = nn.Parameter(torch.randn(experts, d, 32) / 5), nn.Parameter(torch.randn(experts, 16, d) / 5)

    def forward(self, x: Tensor) -> Tensor:
        x = self.inp(x)
        rows = x.reshape(-1, x.shape[-1])
        weight, chosen = self.router(rows).softmax(-1).max(-1)
        order = chosen.argsort(stable=True)
        ends = (chosen[:, None] == torch.arange(len(self.up))).sum(0).cumsum(0, dtype=torch.int32)
        product = torch.ops.transformers.grouped_mm_fallback
        gate, value = product(rows[order], self.up, ends).chunk(2, -1)
        answer = product(F.silu(gate) * value, self.down, ends) * weight[order][:, None]
        return self.out(x + answer[order.argsort()].view(x.shape))


def grouped_experts() -> Model:
    import transformers.integrations.moe  # noqa: F401  it registers the operator

    return GroupedExperts(), (torch.randn(2, 6, 10),)


class VisionLanguage(nn.Module):
    """What was seen of a picture stands in the places of a text that are marked for it."""

    def __init__(self, d: int = 24) -> None:
        super().__init__()
        self.see, self.project = nn.Conv2d(3, 16, 4, 4), nn.Linear(16, d)
        self.tokens, self.norm = nn.Embedding(12, d), nn.LayerNorm(d)
        self.mix, self.out = nn.TransformerEncoderLayer(d, 4, 48, batch_first=True), nn.Linear(d, 12)

    def forward(self, ids: Tensor, image: Tensor) -> Tensor:
        text = self.tokens(ids)
        seen = self.project(F.gelu(self.see(image)).flatten(2).transpose(1, 2))
        text = text.masked_scatter((ids == 11).unsqueeze(-1).expand_as(text), seen)
        return self.out(self.mix(self.norm(text)))


def vision_language() -> Model:
    return VisionLanguage(), (torch.tensor([[1, 11, 11, 11, 11, 4, 5], [3, 2, 11, 11, 11, 11, 9]]), torch.randn(2, 3, 8, 8))


class StyledImage(nn.Module):
    """A picture's style scales the kernels, and all pictures of a batch are groups of one convolution (StyleGAN2's modulated convolution)."""

    def __init__(self, d: int = 24) -> None:
        super().__init__()
        self.style, self.inp, self.out = nn.Linear(8, d), nn.Conv2d(3, d, 3, padding=1), nn.Conv2d(2 * d, 3, 1)
        self.weight = nn.Parameter(torch.randn(2 * d, d, 3, 3))

    def forward(self, style: Tensor, x: Tensor) -> Tensor:
        x = self.inp(x)
        weight = self.weight * (self.style(style) + 1)[:, None, :, None, None]
        weight = weight * torch.rsqrt(weight.square().sum((2, 3, 4), keepdim=True) + 1e-8)
        y = F.conv2d(x.view(1, -1, *x.shape[2:]), weight.flatten(0, 1), padding=1, groups=len(x))
        return self.out(F.leaky_relu(y.view(len(x), -1, *x.shape[2:]), 0.2))


def styled_image() -> Model:
    return StyledImage(), (torch.randn(2, 8), torch.randn(2, 3, 8, 8))


ALL = (
    yolo, anchor_head, weighted_pyramid, detr, deformable_attention, detector, mask_head, unet, diffusion_unet, diffusion_transformer,
    super_resolution, translator, summariser, experts, expert_modules, dispatched_experts, vision_language, speech_ctc, conformer, wave, vocoder,
    stepwise, state_space, point_net, contrastive, slow_fast, radiance, grouped_experts, styled_image,
)  # fmt: skip
