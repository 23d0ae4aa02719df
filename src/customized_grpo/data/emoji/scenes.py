"""Procedural backgrounds of the emoji world, vectorised over the batch.

Each scene is a function of pixel coordinates and of a few random numbers per image, so that no two
beaches are alike. ``paint_scenes`` is the only entry point.
"""

from __future__ import annotations

import math
from collections.abc import Callable

import torch
from torch import Tensor

_NUM_RANDOM = 8


def _rgb(*color: float) -> Tensor:
    return torch.tensor(color).view(1, 3, 1, 1)


def _mix(a: Tensor, b: Tensor, weight: Tensor) -> Tensor:
    return a + (b - a) * weight


def _split(horizon: Tensor, top: Tensor, bottom: Tensor, y: Tensor) -> Tensor:
    return torch.where(y < horizon, top, bottom)


def _hash(a: Tensor, b: Tensor, seed: Tensor) -> Tensor:
    """Pseudo-random number in [0, 1) per integer cell (a, b), different for every image."""
    value = torch.sin(a * 127.1 + b * 311.7 + seed * 74.7) * 43758.5453
    return value - value.floor()


def _beach(x, y, r):
    shade = 0.9 + 0.2 * r[1]
    sky = _mix(_rgb(0.45, 0.75, 0.98), _rgb(0.8, 0.93, 1.0), y * 2)
    horizon = 0.38 + 0.12 * r[0]
    shore = horizon + 0.12 + 0.03 * torch.sin(x * 9 + 6.28 * r[2])
    sea = _rgb(0.1, 0.5, 0.75).expand_as(sky)
    sand = _rgb(0.95, 0.85, 0.6) * shade
    return _split(horizon, sky, _split(shore, sea, sand, y), y)


def _forest(x, y, r):
    stripe = torch.sin(x * (18 + 6 * r[0]) + 6.28 * r[1] + 0.5 * torch.sin(y * 5))
    trees = torch.where(stripe > 0.35, _rgb(0.28, 0.17, 0.08), _rgb(0.07, 0.3, 0.13))
    return _split(0.72 + 0.1 * r[2], trees * (0.7 + 0.5 * y), _rgb(0.16, 0.4, 0.12), y)


def _snow(x, y, r):
    hill = 0.55 + 0.15 * (r[0] - 0.5) + 0.05 * torch.sin(x * 6 + 6.28 * r[1])
    flakes = _hash((x * 16).floor(), (y * 16).floor(), r[2]) > 0.93
    ground = _split(hill, _rgb(0.62, 0.72, 0.85), _rgb(0.93, 0.96, 1.0), y)
    return torch.where(flakes, _rgb(1.0, 1.0, 1.0), ground)


def _city(x, y, r):
    column = ((x + r[0]) * 6).floor()
    roof = 0.1 + 0.4 * _hash(column, column * 0, r[1])
    window = ((x * 10 % 1) > 0.4) & ((y * 8 % 1) > 0.4)
    lit = _hash((x * 10).floor(), (y * 8).floor(), r[2]) > 0.35
    towers = torch.where(window & lit, _rgb(0.98, 0.85, 0.4), _rgb(0.18, 0.18, 0.26))
    night = _split(roof, _rgb(0.05, 0.05, 0.2), towers, y)
    return _split(torch.full_like(r[0], 0.8), night, _rgb(0.3, 0.3, 0.32), y)


def _desert(x, y, r):
    dune = 0.5 + 0.1 * (r[0] - 0.5) + 0.07 * torch.sin(x * 5 + 6.28 * r[1])
    ripple = 0.06 * torch.sin(y * 40 + 3 * torch.sin(x * 6 + 6.28 * r[2]))
    return _split(dune, _rgb(0.99, 0.8, 0.5), _rgb(0.88, 0.55, 0.25) + ripple, y)


def _space(x, y, r):
    stars = _hash((x * 16).floor(), (y * 16).floor(), r[0]) > 0.93
    nebula = 0.5 + 0.5 * torch.sin(4 * x + 6.28 * r[1]) * torch.sin(5 * y + 6.28 * r[2])
    sky = _mix(_rgb(0.02, 0.02, 0.1), _rgb(0.2, 0.05, 0.3), nebula)
    return torch.where(stars, _rgb(1.0, 1.0, 0.92), sky)


def _underwater(x, y, r):
    wave = torch.sin(y * 26 + 2 * torch.sin(x * 8 + 6.28 * r[0]) + 6.28 * r[1])
    return _mix(_rgb(0.1, 0.5, 0.8), _rgb(0.02, 0.15, 0.42), y) + 0.06 * wave


def _meadow(x, y, r):
    horizon = 0.42 + 0.12 * r[0]
    flowers = _hash((x * 16).floor(), (y * 16).floor(), r[1]) > 0.92
    color = torch.where(r[2] > 0.5, _rgb(1.0, 0.95, 0.4), _rgb(1.0, 0.6, 0.8))
    grass = torch.where(flowers, color, _rgb(0.4, 0.75, 0.25))
    return _split(horizon, _mix(_rgb(0.5, 0.8, 1.0), _rgb(0.9, 0.97, 1.0), y * 2), grass, y)


def _wood(x, y, r):
    plank = ((y + 0.2 * r[0]) * 5).floor()
    shade = 0.85 + 0.3 * _hash(plank, plank * 0, r[1])
    grain = 0.05 * torch.sin(y * 50 + 3 * torch.sin(x * 7 + 6.28 * r[2]))
    gap = ((y + 0.2 * r[0]) * 5 % 1) < 0.08
    return torch.where(gap, _rgb(0.3, 0.17, 0.08), _rgb(0.65, 0.42, 0.22) * shade + grain)


def _bricks(x, y, r):
    row = ((y + r[0]) * 6).floor()
    u = (x + r[1]) * 3 + 0.5 * (row % 2)
    mortar = ((y + r[0]) * 6 % 1 < 0.18) | (u % 1 < 0.1)
    shade = 0.85 + 0.3 * _hash(u.floor(), row, r[2])
    return torch.where(mortar, _rgb(0.78, 0.74, 0.7), _rgb(0.66, 0.26, 0.2) * shade)


def _stripes(x, y, r):
    wave = torch.sin((x + y * (0.4 + 0.4 * r[1])) * (18 + 6 * r[0]) + 6.28 * r[2])
    return _mix(_rgb(0.98, 0.78, 0.87), _rgb(0.93, 0.5, 0.68), (wave > 0).float())


def _sunset(x, y, r):
    sky = _mix(_rgb(0.45, 0.15, 0.5), _rgb(1.0, 0.6, 0.2), (y / (0.6 + 0.1 * r[0])).clamp(0, 1))
    center_x = 0.15 + 0.7 * r[1]
    sun = (x - center_x) ** 2 + (y - 0.3) ** 2 < 0.014
    sky = torch.where(sun, _rgb(1.0, 0.93, 0.55), sky)
    return _split(0.66 + 0.08 * r[0], sky, _rgb(0.22, 0.08, 0.2), y)


def _checkers(x, y, r):
    cell = ((x + r[0]) * 4).floor() + ((y + r[1]) * 4).floor()
    return _mix(_rgb(0.95, 0.95, 0.92), _rgb(0.3, 0.55, 0.55), cell % 2)


def _volcano(x, y, r):
    cracks = torch.sin(x * 10 + 2 * torch.sin(y * 7 + 6.28 * r[0]) + 6.28 * r[1])
    cracks = cracks * torch.sin(y * 11 + 2 * torch.sin(x * 8 + 6.28 * r[2]))
    return _mix(_rgb(0.16, 0.1, 0.1), _rgb(1.0, 0.4, 0.05), (1 - cracks.abs() * 4).clamp(0, 1))


def _library(x, y, r):
    shelf = ((y + 0.3 * r[0]) * 3).floor()
    book = ((x + r[1]) * 9).floor()
    hue = [_hash(book, shelf + k, r[2]) for k in range(3)]
    books = torch.cat([0.25 + 0.55 * h for h in hue], 1)
    board = ((y + 0.3 * r[0]) * 3 % 1) > 0.86
    return torch.where(board, _rgb(0.36, 0.22, 0.12), books * 0.85)


def _stage(x, y, r):
    folds = 0.75 + 0.25 * torch.sin(x * (24 + 8 * r[0]) + 6.28 * r[1])
    beam = ((x - 0.3 - 0.4 * r[2]).abs() < 0.1 + 0.25 * y).float()
    curtain = _rgb(0.6, 0.05, 0.1) * folds + 0.18 * beam
    return _split(torch.full_like(r[0], 0.8), curtain, _rgb(0.55, 0.38, 0.2) + 0.15 * beam, y)


# Phrase in a prompt -> painter.
SCENES: dict[str, Callable[[Tensor, Tensor, Tensor], Tensor]] = {
    "on the beach": _beach,
    "in the forest": _forest,
    "in the snow": _snow,
    "in the city at night": _city,
    "in the desert": _desert,
    "in outer space": _space,
    "under water": _underwater,
    "in a meadow": _meadow,
    "on a wooden floor": _wood,
    "in front of a brick wall": _bricks,
    "in front of pink stripes": _stripes,
    "at sunset": _sunset,
    "on checkered tiles": _checkers,
    "on a volcano": _volcano,
    "in a library": _library,
    "on a stage": _stage,
}


def paint_scenes(scene: Tensor, size: int, rng: torch.Generator) -> Tensor:
    """Backgrounds ``[B, 3, size, size]`` in [0, 1] for scene indices ``[B]`` (order of SCENES)."""
    batch = len(scene)
    axis = (torch.arange(size) + 0.5) / size
    y, x = (t[None, None] for t in torch.meshgrid(axis, axis, indexing="ij"))
    random = torch.rand(_NUM_RANDOM, batch, 1, 1, 1, generator=rng)
    out = torch.empty(batch, 3, size, size)
    for index, paint in enumerate(SCENES.values()):
        rows = (scene == index).nonzero()[:, 0]
        if len(rows):
            out[rows] = paint(x, y, random[:, rows]).expand(len(rows), 3, size, size)
    brightness = 0.9 + 0.2 * random[-1]
    slow = 0.04 * torch.sin(2 * math.pi * (x * random[-2] + y * random[-3]))
    return (out * brightness + slow).clamp(0, 1)
