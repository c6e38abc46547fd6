"""Convolutions, pooling, and norms over features and channels."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from torch import nn
from torch.nn import functional as F

from funcstage.testing.layers.base import (
    NO,
    OUT,
    YES,
    Layer,
    Op,
    Place,
    channels,
    features,
    second,
)


def _batch_norm(*ndims: int) -> Callable[[Place], bool]:
    def fits(place: Place) -> bool:
        if not channels(*ndims)(place) or place.shape[0] == 0:
            return False
        return place.size(0, *range(2, len(place.shape))) > 1

    return fits


def _instance_norm(place: Place) -> bool:
    return channels(3, 4)(place) and place.shape[0] > 0 and place.size(*range(2, len(place.shape))) > 1


def _conv(n: int, transposed: bool = False) -> Callable[..., nn.Module]:
    kinds = (nn.ConvTranspose1d, nn.ConvTranspose2d) if transposed else (nn.Conv1d, nn.Conv2d)

    def build(place: Place, out: int, kernel: int, bias: bool, groups: bool) -> nn.Module:
        channels = place.shape[1]
        out = out or channels
        divides = groups and out % channels == 0
        made: Any = kinds[n - 1]
        return made(
            channels,
            out,
            kernel,
            padding=kernel // 2,
            bias=bias,
            groups=channels if divides else 1,
            **place.made,
        )

    return build


def _layer_norm(place: Place, affine: str) -> nn.Module:
    return nn.LayerNorm(
        place.shape[-1], elementwise_affine=affine != "none", bias=affine == "both", **place.made
    )


def _group_norm(place: Place, groups: int, affine: bool) -> nn.Module:
    channels = place.shape[1]
    return nn.GroupNorm(groups if channels % groups == 0 else 1, channels, affine=affine, **place.made)


def _batched_norm(place: Place, affine: bool, stats: bool, momentum: float | None) -> nn.Module:
    kind: Any = nn.BatchNorm2d if len(place.shape) == 4 else nn.BatchNorm1d
    return kind(place.shape[1], affine=affine, track_running_stats=stats, momentum=momentum, **place.made)


def _instanced_norm(place: Place, affine: bool, stats: bool) -> nn.Module:
    kind: Any = nn.InstanceNorm2d if len(place.shape) == 4 else nn.InstanceNorm1d
    return kind(place.shape[1], affine=affine, track_running_stats=stats, **place.made)


def _pool(place: Place, kind: str) -> nn.Module:
    flat = len(place.shape) == 3
    kinds: dict[str, Any] = {
        "max": F.max_pool1d if flat else F.max_pool2d,
        "average": F.avg_pool1d if flat else F.avg_pool2d,
    }
    function = kinds[kind]
    return Op(lambda x: function(x, 3, stride=1, padding=1))


LAYERS: dict[str, Layer] = {
    "layer norm": Layer(
        _layer_norm,
        lambda p: len(p.shape) >= 2 and p.shape[-1] > 0,
        {"affine": ("both", "weight", "none")},
        fresh=True,
        tags="dense sequence attention",
    ),
    "rms norm": Layer(
        lambda place, affine: nn.RMSNorm(place.shape[-1], elementwise_affine=affine, **place.made),
        features,
        {"affine": YES},
        tags="dense sequence attention",
    ),
    "group norm": Layer(
        _group_norm,
        lambda p: channels(2, 3, 4)(p) and p.size(*range(len(p.shape))) not in (1, 2),
        {"groups": (1, 2), "affine": YES},
        fresh=True,
        tags="image",
    ),
    "batch norm": Layer(
        _batched_norm,
        _batch_norm(2, 3, 4),
        {"affine": YES, "stats": YES, "momentum": (0.1, None)},
        fresh=True,
        tags="image state dense",
    ),
    "instance norm": Layer(
        _instanced_norm,
        _instance_norm,
        {"affine": YES, "stats": YES},
        tags="image state",
    ),
    "conv1d": Layer(
        _conv(1),
        channels(3),
        {"out": OUT, "kernel": (3, 1), "bias": YES, "groups": NO},
        second,
        fresh=True,
        complex=True,
        tags="image sequence",
    ),
    "conv2d": Layer(
        _conv(2),
        channels(4),
        {"out": OUT, "kernel": (3, 1), "bias": YES, "groups": NO},
        second,
        fresh=True,
        complex=True,
        tags="image",
    ),
    "conv transpose 1d": Layer(
        _conv(1, True),
        channels(3),
        {"out": OUT, "kernel": (3, 1), "bias": YES, "groups": NO},
        second,
        fresh=True,
        tags="image",
    ),
    "conv transpose 2d": Layer(
        _conv(2, True),
        channels(4),
        {"out": OUT, "kernel": (3, 1), "bias": YES, "groups": NO},
        second,
        fresh=True,
        tags="image",
    ),
    "pool": Layer(_pool, channels(3, 4), {"kind": ("max", "average")}, tags="image"),
}
