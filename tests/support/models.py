"""A model with a weight of every kind, closures that keep what they saw, and its loss on counted numbers."""

from __future__ import annotations

from collections.abc import Callable, Mapping

import torch
from torch import Tensor, nn

from pgap_kernels import draw, noise

from .bounds import UNIT
from .counted import SECOND_ORDER, Counted, activation, layer_norm, linear

IDS = torch.arange(24).view(8, 3) % 11
TARGET = draw((8, 3, 11), 9, 9)


def filled(model: nn.Module, scale: float = 0.5) -> nn.Module:
    """Its parameters drawn by their names."""
    with torch.no_grad():
        for name, p in model.named_parameters():
            p.copy_(scale * draw(p.shape, 2, noise.tensor_id(name)))
    return model


class Affine(nn.Module):
    """A scalar and a tensor of three dimensions."""

    def __init__(self) -> None:
        super().__init__()
        self.gain, self.filter = nn.Parameter(torch.zeros(())), nn.Parameter(torch.zeros(2, 3, 2))

    def forward(self, x: Tensor) -> Tensor:
        return x * self.gain + self.filter.sum()


class Words(nn.Module):
    """An embedding that may be the head too, layers with and without bias, a norm, a pair as small as LoRA's.

    More ``words`` than are used make the embedding larger than all other weights together.
    """

    def __init__(self, tied: bool = True, words: int = 11) -> None:
        super().__init__()
        self.embed = nn.Embedding(words, 6)
        self.up = nn.Linear(6, 9, bias=False)
        self.norm = nn.LayerNorm(9)
        self.affine = Affine()
        self.down = nn.Linear(9, 6)
        self.lora_a = nn.Linear(9, 2, bias=False)
        self.lora_b = nn.Linear(2, 6, bias=False)
        self.head = nn.Linear(6, words)
        if tied:
            self.head.weight = self.embed.weight
        filled(self)

    def forward(self, ids: Tensor) -> Tensor:
        hidden = self.affine(self.norm(self.up(self.embed(ids))))
        return self.head(self.down(hidden) + self.lora_b(self.lora_a(hidden)))[..., :11]


def layer(name: str, w: Mapping[str, Counted], x: Counted | Tensor, dtype: torch.dtype = torch.float32) -> Counted:
    """The output of a layer of ``Words`` at a point."""
    if name == "embed":
        return activation(w["embed.weight"][x], dtype)
    if name == "norm":
        return layer_norm(x, w["norm.weight"], w["norm.bias"], dtype)
    if name == "affine":
        return activation(x * w["affine.gain"] + w["affine.filter"].sum(), dtype)
    return linear(x, w.get(f"{name}.weight", w["embed.weight"]), w.get(f"{name}.bias"), dtype)


def loss_at(w: Mapping[str, Counted]) -> tuple[float, float]:
    """The loss of ``Losses`` at a point, and how far it may be off."""
    x = IDS
    for name in ("embed", "up", "norm", "affine"):
        x = layer(name, w, x)
    x = activation(layer("down", w, x) + layer("lora_b", w, layer("lora_a", w, x)), torch.float32)
    x = layer("head", w, x)
    terms = (x.value * TARGET).abs()
    error = (x.error * TARGET.abs()).mean() + SECOND_ORDER * (terms.numel() + 2) * UNIT * terms.mean()
    return (x.value * TARGET).mean().item(), error.item()


class Layers:
    """Inputs and outputs of a model's layers in every forward; of a stacked batch those of its halves, as of two."""

    NAMES = ("embed", "up", "norm", "affine", "down", "lora_a", "lora_b", "head")

    def __init__(self, model: nn.Module, halves: int) -> None:
        self.forwards: list[list[tuple[str, Tensor, Tensor]]] = []
        for name in self.NAMES:
            model.get_submodule(name).register_forward_hook(lambda m, args, y, n=name: self.keep(n, halves, args[0], y))

    def keep(self, name: str, halves: int, x: Tensor, y: Tensor) -> None:
        if name == self.NAMES[0]:
            self.forwards += [[] for _ in range(halves)]
        for forward, a, b in zip(self.forwards[-halves:], x.chunk(halves), y.chunk(halves), strict=True):
            forward.append((name, a.clone(), b.clone()))


class Losses:
    """A closure that keeps the losses of its calls, of a stacked batch one for each half.

    Attributes:
        seen: every loss.
        calls: how often it was called.
        at: what is called with the number of a call before its forward.
    """

    def __init__(self, model: nn.Module, paired: bool = False, at: Callable[[int], None] | None = None) -> None:
        self.model, self.halves, self.at = model, 2 if paired else 1, at
        self.seen: list[float] = []
        self.calls = 0

    def __call__(self) -> Tensor:
        if self.at is not None:
            self.at(self.calls)
        self.calls += 1
        logits = self.model(torch.cat([IDS] * self.halves)).float()
        loss = (logits.reshape(self.halves, -1) * TARGET.flatten()).mean(1)
        self.seen += loss.tolist()
        return loss


INPUTS = draw((8, 6), 1, 0)
LABELS = torch.arange(8) % 4


def classifier() -> nn.Sequential:
    """A small classification of ``INPUTS`` into ``LABELS``; its loss begins near log 4."""
    return filled(nn.Sequential(nn.Linear(6, 9), nn.Tanh(), nn.Linear(9, 4)), 0.3)


def snapshot(model: nn.Module) -> dict[str, Tensor]:
    """Copies of its parameters."""
    return {name: p.detach().clone() for name, p in model.named_parameters()}


def assert_same_weights(left: nn.Module | Mapping[str, Tensor], right: nn.Module | Mapping[str, Tensor]) -> None:
    """To the bit."""
    left, right = (x if isinstance(x, Mapping) else snapshot(x) for x in (left, right))
    assert left.keys() == right.keys()
    assert [name for name in left if not torch.equal(left[name], right[name])] == []


def parameters_of(model: nn.Module) -> dict:
    """What each module has under each of its parameters' names."""
    return {(module, name): p for module in model.modules() for name, p in module._parameters.items()}


def assert_clean(parameters: dict) -> None:
    """Modules have their own Parameters again."""
    assert all(module._parameters[name] is p for (module, name), p in parameters.items())


def failing(kind) -> Callable[[], Tensor]:
    """What a closure does at the moment it fails: an exception of a kind, a loss that is one, or a vector."""

    def fail() -> Tensor:
        if isinstance(kind, float):
            return torch.tensor(kind)
        if kind == "vector":
            return torch.zeros(2)
        raise kind("deliberate")

    return fail
