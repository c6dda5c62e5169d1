"""Small networks with branches, of the families that can be pruned in depth; what makes each branch silent by hand."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterable
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn import functional as F

WIDTH = 6


def conv(inputs: int, outputs: int, kernel: int = 1, groups: int = 1, stride: int = 1, bias: bool = False) -> nn.Conv2d:
    return nn.Conv2d(inputs, outputs, kernel, stride, kernel // 2, groups=groups, bias=bias)


class Basic(nn.Module):
    """Run a block of ResNet-18, its shortcut a projection where the width changes."""

    def __init__(self, inputs: int = WIDTH, outputs: int = WIDTH, hidden: int = 5, stride: int = 1) -> None:
        super().__init__()
        self.conv1, self.bn1 = conv(inputs, hidden, 3, stride=stride), nn.BatchNorm2d(hidden)
        self.conv2, self.bn2 = conv(hidden, outputs, 3), nn.BatchNorm2d(outputs)
        same = inputs == outputs and stride == 1
        self.down = (
            nn.Identity() if same else nn.Sequential(conv(inputs, outputs, stride=stride), nn.BatchNorm2d(outputs))
        )
        self.relu = nn.ReLU(inplace=True)

    def forward(self, x: Tensor) -> Tensor:
        y = self.bn2(self.conv2(self.relu(self.bn1(self.conv1(x)))))
        y += self.down(x)
        return self.relu(y)


class Gate(nn.Module):
    """Scale channels by their means (squeeze-excite)."""

    def __init__(self, width: int, hidden: int = 3) -> None:
        super().__init__()
        self.fc1, self.fc2 = conv(width, hidden, bias=True), conv(hidden, width, bias=True)

    def forward(self, x: Tensor) -> Tensor:
        return x * torch.sigmoid(self.fc2(F.relu(self.fc1(x.mean((2, 3), keepdim=True)))))


class Bottleneck(nn.Module):
    """Run a block of ResNet-50, with a gate before the join (SENet)."""

    def __init__(self, gated: bool = False) -> None:
        super().__init__()
        self.conv1, self.bn1 = conv(WIDTH, 4), nn.BatchNorm2d(4)
        self.conv2, self.bn2 = conv(4, 5, 3), nn.BatchNorm2d(5)
        self.conv3, self.bn3 = conv(5, WIDTH), nn.BatchNorm2d(WIDTH)
        self.gate = Gate(WIDTH) if gated else nn.Identity()

    def forward(self, x: Tensor) -> Tensor:
        y = F.relu(self.bn2(self.conv2(F.relu(self.bn1(self.conv1(x))))))
        return F.relu(self.gate(self.bn3(self.conv3(y))) + x)


class PreActivation(nn.Module):
    """Normalise first (He 2016): the last convolution's bias is all that a silent branch leaves."""

    def __init__(self, bias: bool = False) -> None:
        super().__init__()
        self.bn1, self.conv1 = nn.BatchNorm2d(WIDTH), conv(WIDTH, 5, 3)
        self.bn2, self.conv2 = nn.BatchNorm2d(5), conv(5, WIDTH, 3, bias=bias)

    def forward(self, x: Tensor) -> Tensor:
        return x + self.conv2(F.relu(self.bn2(self.conv1(F.relu(self.bn1(x))))))


class Inverted(nn.Module):
    """Run a block of MobileNetV2, or with a gate of MobileNetV3."""

    def __init__(self, gated: bool = False) -> None:
        super().__init__()
        self.expand, self.bn1 = conv(WIDTH, 8), nn.BatchNorm2d(8)
        self.depthwise, self.bn2 = conv(8, 8, 3, groups=8), nn.BatchNorm2d(8)
        self.gate = Gate(8) if gated else nn.Identity()
        self.project, self.bn3 = conv(8, WIDTH), nn.BatchNorm2d(WIDTH)

    def forward(self, x: Tensor) -> Tensor:
        y = F.relu6(self.bn2(self.depthwise(F.relu6(self.bn1(self.expand(x))))))
        return x + self.bn3(self.project(self.gate(y)))


class ConvNeXt(nn.Module):
    """Mix positions by a depthwise convolution, then channels by an MLP, scaled per channel."""

    def __init__(self) -> None:
        super().__init__()
        self.depthwise, self.norm = conv(WIDTH, WIDTH, 3, groups=WIDTH, bias=True), nn.LayerNorm(WIDTH)
        self.fc1, self.fc2 = nn.Linear(WIDTH, 9), nn.Linear(9, WIDTH)
        self.gamma = nn.Parameter(torch.ones(WIDTH))

    def forward(self, x: Tensor) -> Tensor:
        y = self.norm(self.depthwise(x).permute(0, 2, 3, 1))
        return x + (self.gamma * self.fc2(F.gelu(self.fc1(y)))).permute(0, 3, 1, 2)


class StochasticDepth(nn.Module):
    """Drop the branch at random in training, for each example, so that only the training graph has the noise."""

    def __init__(self) -> None:
        super().__init__()
        self.conv1, self.conv2 = conv(WIDTH, 5, 3, bias=True), conv(5, WIDTH, 3, bias=True)

    def forward(self, x: Tensor) -> Tensor:
        y = self.conv2(F.relu(self.conv1(x)))
        if self.training:
            keep = torch.empty(x.shape[0], 1, 1, 1, dtype=x.dtype).bernoulli_(0.8)
            y = y * keep / 0.8
        return x + y


class Dense(nn.Module):
    """Append growth channels (DenseNet), by a bottleneck."""

    def __init__(self, inputs: int) -> None:
        super().__init__()
        self.norm1, self.conv1 = nn.BatchNorm2d(inputs), conv(inputs, 5)
        self.norm2, self.conv2 = nn.BatchNorm2d(5), conv(5, 4, 3)

    def forward(self, x: list[Tensor]) -> Tensor:
        y = self.conv1(F.relu(self.norm1(torch.cat(x, 1))))
        return self.conv2(F.relu(self.norm2(y)))


class DenseBlock(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.ModuleList(Dense(WIDTH + 4 * index) for index in range(3))
        self.norm, self.back = nn.BatchNorm2d(WIDTH + 12), conv(WIDTH + 12, WIDTH)

    def forward(self, x: Tensor) -> Tensor:
        features = [x]
        for layer in self.layers:
            features.append(layer(features))
        return self.back(F.relu(self.norm(torch.cat(features, 1))))


class Paths(nn.Module):
    """Join two paths by a cat and the block by an addition (Inception-ResNet)."""

    def __init__(self) -> None:
        super().__init__()
        self.one, self.two = conv(WIDTH, 3, bias=True), conv(WIDTH, 4, 3, bias=True)
        self.back = conv(7, WIDTH, bias=True)

    def forward(self, x: Tensor) -> Tensor:
        return F.relu(x + 0.3 * self.back(torch.cat([F.relu(self.one(x)), F.relu(self.two(x))], 1)))


class Attention(nn.Module):
    """Attend with q, k, v packed in one Linear, then an MLP with a gate; layer scale behind both."""

    def __init__(self) -> None:
        super().__init__()
        self.norm1, self.norm2 = nn.LayerNorm(WIDTH), nn.RMSNorm(WIDTH)
        self.qkv, self.proj = nn.Linear(WIDTH, 3 * 8), nn.Linear(8, WIDTH)
        self.scale1, self.scale2 = nn.Parameter(torch.ones(WIDTH)), nn.Parameter(torch.ones(WIDTH))
        self.gate, self.up, self.down = nn.Linear(WIDTH, 7), nn.Linear(WIDTH, 7, bias=False), nn.Linear(7, WIDTH)

    def forward(self, x: Tensor) -> Tensor:
        b, t, _ = x.shape
        q, k, v = self.qkv(self.norm1(x)).reshape(b, t, 3, 2, 4).permute(2, 0, 3, 1, 4).unbind(0)
        y = F.scaled_dot_product_attention(q, k, v).transpose(1, 2).reshape(b, t, 8)
        x = x + self.scale1 * self.proj(y)
        z = self.norm2(x)
        return x + self.scale2 * self.down(F.silu(self.gate(z)) * self.up(z))


class Mixer(nn.Module):
    """Mix positions: what a silent branch leaves is one number per position, not per channel."""

    def __init__(self, steps: int) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(WIDTH)
        self.fc1, self.fc2 = nn.Linear(steps, 7), nn.Linear(7, steps)

    def forward(self, x: Tensor) -> Tensor:
        return x + self.fc2(F.gelu(self.fc1(self.norm(x).transpose(1, 2)))).transpose(1, 2)


class Projection(nn.Module):
    """Run a Linear written as an addmm over flattened positions (GPT-2)."""

    def __init__(self) -> None:
        super().__init__()
        self.fc = nn.Linear(WIDTH, 7)
        self.weight, self.bias = nn.Parameter(torch.randn(7, WIDTH)), nn.Parameter(torch.randn(WIDTH))

    def forward(self, x: Tensor) -> Tensor:
        y = F.gelu(self.fc(x))
        return x + torch.addmm(self.bias, y.view(-1, y.shape[-1]), self.weight).view(x.shape)


class Recurrent(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.lstm, self.fc = nn.LSTM(WIDTH, 5, batch_first=True), nn.Linear(5, WIDTH)

    def forward(self, x: Tensor) -> Tensor:
        return x + self.fc(self.lstm(x)[0])


class Images(nn.Module):
    """Put blocks between a stem and a head, [B, 3, 8, 8] to [B, 3]."""

    def __init__(self, *blocks: nn.Module, width: int = WIDTH) -> None:
        super().__init__()
        self.stem, self.blocks, self.head = conv(3, WIDTH, 3, bias=True), nn.Sequential(*blocks), nn.Linear(width, 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.blocks(torch.tanh(self.stem(x))).mean((2, 3)))


class Sequences(nn.Module):
    """Put blocks between a stem and a head, [B, T, 4] to [B, T, 3]."""

    def __init__(self, *blocks: nn.Module) -> None:
        super().__init__()
        self.stem, self.blocks, self.head = nn.Linear(4, WIDTH), nn.Sequential(*blocks), nn.Linear(WIDTH, 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.blocks(torch.tanh(self.stem(x))))


def filled(module: nn.Module, seed: int = 3) -> nn.Module:
    """Give every tensor values away from 0 and 1, in float64, and switch to evaluation."""
    generator = torch.Generator().manual_seed(seed)
    module = module.double().eval()
    with torch.no_grad():
        for name, value in module.state_dict().items():
            if value.is_floating_point():
                noise = torch.rand(value.shape, generator=generator, dtype=value.dtype)
                positive = name.endswith("running_var")
                value.copy_(noise + 0.5 if positive else (noise - 0.5) * 2 / max(1.0, value[0].numel() ** 0.5))
    return module


Silence = Callable[[nn.Module], None]


def zeroed(*prefixes: str) -> Silence:
    """Make a function that zeroes every parameter and running mean under some names: what they give is then zero."""

    def silence(module: nn.Module) -> None:
        for name, value in module.state_dict().items():
            if name.startswith(prefixes) and not name.endswith(("running_var", "num_batches_tracked")):
                value.zero_()

    return silence


def silent_dense(layer: int) -> Silence:
    """Zero a layer of the DenseBlock, and what the norms behind it make of its channels."""

    def silence(module: nn.Module) -> None:
        zeroed(*(f"blocks.0.layers.{layer}.{part}" for part in ("conv1", "norm2", "conv2")))(module)
        first = WIDTH + 4 * layer
        later = [f"blocks.0.layers.{index}.norm1" for index in range(layer + 1, 3)]
        for norm in [*later, "blocks.0.norm"]:
            for part in ("weight", "bias", "running_mean"):
                module.state_dict()[f"{norm}.{part}"][first : first + 4] = 0

    return silence


def silent(module: nn.Module, how: Iterable[Silence]) -> nn.Module:
    """Return a copy whose branches give what they give without their units."""
    twin = copy.deepcopy(module)
    with torch.no_grad():
        for each in how:
            each(twin)
    return twin


@dataclass(frozen=True)
class Family:
    """A network, the shape of its input, and for each branch by name what silences it."""

    make: Callable[[], nn.Module]
    shape: tuple[int, ...]
    branches: dict[str, Silence]
    time: bool = False  # whether the length is dynamic too


def _under(prefix: str, *names: str) -> Silence:
    return zeroed(*(f"{prefix}.{name}" for name in names))


IMAGE, SEQUENCE = (3, 8, 8), (5, 4)


def encoder(norm_first: bool) -> nn.Module:
    return nn.TransformerEncoderLayer(WIDTH, 2, 7, batch_first=True, norm_first=norm_first, activation="gelu")


_ENCODER = {
    "blocks.0.self_attn": _under("blocks.0", "self_attn.in_proj"),
    "blocks.0.linear2": _under("blocks.0", "linear1"),
}

FAMILIES = {
    "basic": Family(
        lambda: Images(Basic(), Basic(WIDTH, 8, 4, 2), width=8),
        IMAGE,
        {f"blocks.{index}.conv2": _under(f"blocks.{index}", "conv1", "bn1") for index in (0, 1)},
    ),
    "bottleneck": Family(
        lambda: Images(Bottleneck()), IMAGE, {"blocks.0.conv3": _under("blocks.0", "conv1", "bn1", "conv2", "bn2")}
    ),
    "gated bottleneck": Family(
        lambda: Images(Bottleneck(gated=True)),
        IMAGE,
        {
            "blocks.0.gate.fc2": _under("blocks.0", "gate.fc1"),
            "blocks.0.conv3": _under("blocks.0", "conv1", "bn1", "conv2", "bn2", "gate.fc1"),
        },
    ),
    "pre-activation": Family(
        lambda: Images(PreActivation(), PreActivation(bias=True)),
        IMAGE,
        {f"blocks.{index}.conv2": _under(f"blocks.{index}", "conv1", "bn2") for index in (0, 1)},
    ),
    "inverted": Family(
        lambda: Images(Inverted()), IMAGE, {"blocks.0.project": _under("blocks.0", "expand", "bn1", "depthwise", "bn2")}
    ),
    "gated inverted": Family(
        lambda: Images(Inverted(gated=True)),
        IMAGE,
        {
            "blocks.0.gate.fc2": _under("blocks.0", "gate.fc1"),
            "blocks.0.project": _under("blocks.0", "expand", "bn1", "depthwise", "bn2"),
        },
    ),
    "convnext": Family(lambda: Images(ConvNeXt()), IMAGE, {"blocks.0.fc2": _under("blocks.0", "fc1")}),
    "stochastic depth": Family(
        lambda: Images(StochasticDepth()), IMAGE, {"blocks.0.conv2": _under("blocks.0", "conv1")}
    ),
    "dense": Family(
        lambda: Images(DenseBlock()),
        IMAGE,
        {f"blocks.0.layers.{index}.conv2": silent_dense(index) for index in range(3)},
    ),
    "paths": Family(
        lambda: Images(Paths()),
        IMAGE,
        {
            "blocks.0.one": _under("blocks.0", "one"),
            "blocks.0.two": _under("blocks.0", "two"),
            "blocks.0.back": _under("blocks.0", "one", "two"),
        },
    ),
    "encoder, norm first": Family(lambda: Sequences(encoder(True)), SEQUENCE, _ENCODER),
    "encoder, norm last": Family(lambda: Sequences(encoder(False)), SEQUENCE, _ENCODER),
    "packed attention": Family(
        lambda: Sequences(Attention(), Attention()),
        SEQUENCE,
        {
            f"blocks.{index}.{name}": _under(f"blocks.{index}", *inner)
            for index in (0, 1)
            for name, inner in {"proj": ("qkv",), "down": ("gate", "up")}.items()
        },
        time=True,
    ),
    "mixer": Family(lambda: Sequences(Mixer(5)), SEQUENCE, {"blocks.0.fc2": _under("blocks.0", "fc1")}),
    "addmm": Family(lambda: Sequences(Projection()), SEQUENCE, {"blocks.0": _under("blocks.0", "fc")}, time=True),
    "recurrent": Family(
        lambda: Sequences(Recurrent()), SEQUENCE, {"blocks.0.fc": _under("blocks.0", "lstm")}, time=True
    ),
}
