"""The formulas of the evaluation, as pure functions of scores, features and images.

Axes: N pictures (items), P photos, D features. Most give one number per picture, NaN where it does
not apply; means and their intervals are taken in ``statistics``.
"""

from __future__ import annotations

import math
from collections.abc import Hashable, Mapping, Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

Rows = Sequence[Sequence[int]]
"""Places of photos, a list for every picture."""


def identity_columns(
    similarity: Tensor, references: Rows, photos: Rows, pool: str = "max"
) -> dict[str, Tensor]:
    """Identity of pictures by their similarities ``[N, P]`` to all photos of the benchmark.

    - ``reference``: to the photo it is conditioned on; of several, the most similar (``pool`` max)
      or their mean;
    - ``photos``: mean over *all* real photos of the subject;
    - ``copy``: ``reference`` less the mean over the subject's other photos: what is more similar
      to the one photo that was shown than to the subject. NaN where there is no other.
    """
    shown = [_row(similarity, n, rows) for n, rows in enumerate(references)]
    reference = torch.stack([_pooled(values, pool) for values in shown])
    others = [sorted(set(all_) - set(some)) for some, all_ in zip(references, photos, strict=True)]
    return {
        "reference": reference,
        "photos": _means(similarity, photos),
        "copy": reference - _means(similarity, others),
    }


def _row(similarity: Tensor, n: int, rows: Sequence[int]) -> Tensor:
    return similarity[n, torch.tensor(rows, dtype=torch.int64)]


def _means(similarity: Tensor, places: Rows) -> Tensor:
    """Mean over the given photos of each picture; NaN entries are left out."""
    return torch.stack([_row(similarity, n, rows).nanmean() for n, rows in enumerate(places)])


def _pooled(values: Tensor, pool: str) -> Tensor:
    if pool == "mean":
        return values.nanmean()
    known = values[~values.isnan()]
    return known.max() if len(known) else values.new_tensor(torch.nan)


def photo_numbers(
    features: Tensor, subjects: Sequence[str], classes: Sequence[str]
) -> dict[str, float]:
    """How far features ``[P, D]`` tell apart the subjects of real photos.

    - ``copy``: similarity of a photo to itself;
    - ``same subject``, ``other of its class``, ``other class``: mean over all pairs of two photos,
      each pair counted alike; left out where there is no such pair;
    - ``nearest``: share of photos whose most similar other photo is of the same subject.
    """
    unit = F.normalize(features.double(), dim=-1)
    similarity = unit @ unit.T
    itself = torch.eye(len(unit), dtype=torch.bool)
    one, kin = (
        torch.tensor([[a == b for b in names] for a in names]) for names in (subjects, classes)
    )
    pairs = {
        "copy": itself,
        "same subject": one & ~itself,
        "other of its class": kin & ~one,
        "other class": ~kin & ~one,
    }
    nearest = similarity.masked_fill(itself, -torch.inf).argmax(1)
    right = one[torch.arange(len(unit)), nearest].double().mean().item()
    known = {name: similarity[some].mean().item() for name, some in pairs.items() if some.any()}
    return known | {"nearest": right}


def diversity_column(features: Tensor, groups: Sequence[Hashable]) -> Tensor:
    """Mean ``1 - cosine`` of a picture to the others of its group; features are ``[N, D]``.

    The mean over a group's pictures is the mean over its pairs. NaN where a group is one picture.
    Features may lie on a GPU; the column does not.
    """
    features = features.double().cpu()
    members: dict[Hashable, list[int]] = {}
    for row, group in enumerate(groups):
        members.setdefault(group, []).append(row)
    column = torch.full((len(features),), torch.nan, dtype=torch.float64)
    for rows in members.values():
        if len(rows) > 1:
            some = F.normalize(features[rows], dim=-1)
            distance = 1 - some @ some.T
            column[rows] = (distance.sum(1) - distance.diagonal()) / (len(rows) - 1)
    return column


def joint_columns(
    scores: Mapping[str, Tensor], baseline: Mapping[str, Tensor]
) -> dict[str, Tensor]:
    """Whether a picture is better, and worse, than the baseline's on *every* objective.

    Their means are the joint domination and joint collapse rates (arXiv:2605.13155). Pictures that
    lack a score count in neither.
    """
    own = torch.stack([scores[name] for name in scores], 1)
    other = torch.stack([baseline[name] for name in scores], 1)
    known = ~(own - other).isnan().any(1)

    def rate(flags: Tensor) -> Tensor:
        return torch.where(known, flags.all(1).double(), torch.nan)

    return {"joint/domination": rate(own > other), "joint/collapse": rate(own < other)}


def other_prompts(prompts: Sequence[tuple[str, str]]) -> list[str]:
    """For each (subject, prompt) the next other prompt of the subject, or else of the benchmark.

    A picture that follows its prompt scores lower under it; one that ignores it does not.
    Where there is one prompt only, it stands for itself.
    """
    of: dict[str, list[str]] = {}
    for subject, prompt in prompts:
        if prompt not in of.setdefault(subject, []):
            of[subject].append(prompt)
    everything = list(dict.fromkeys(prompt for _, prompt in prompts))
    other: list[str] = []
    for subject, prompt in prompts:
        pool = of[subject] if len(of[subject]) > 1 else everything
        other.append(pool[(pool.index(prompt) + 1) % len(pool)])
    return other


def hypervolume(point: Sequence[float], reference: Sequence[float]) -> float:
    """Area that a point of objectives dominates above a reference point (Zitzler, 1999).

    Higher is better in all; 0 if the point is not above the reference in all.
    """
    return math.prod(max(x - zero, 0.0) for x, zero in zip(point, reference, strict=True))


def frechet_distance(features: Tensor, reference: Tensor) -> float:
    """Fréchet distance of Gaussians fitted to ``[B, D]`` features (FID, arXiv:1706.08500).

    ``|m1 - m2|^2 + tr(C1 + C2 - 2 (C1 C2)^(1/2))``; smaller is closer, 0 for equal sets. Biased
    upwards for few samples: compare at an equal B only.
    """
    a, b = features.double(), reference.double()
    c1, c2 = torch.cov(a.T), torch.cov(b.T)
    root = torch.linalg.eigvals(c1 @ c2).real.clamp(min=0).sqrt().sum()
    distance = (a.mean(0) - b.mean(0)).square().sum() + c1.trace() + c2.trace() - 2 * root
    return max(distance.item(), 0.0)


def high_frequency_energy(images: Tensor) -> Tensor:
    """Mean power ``[B]`` of images ``[B, 3, H, W]`` above half the Nyquist frequency.

    Noise and grid textures, the usual trace of reward hacking in pixels, raise it; blur lowers it.
    """
    spectrum = torch.fft.fft2(images.float(), norm="ortho").abs().square()
    y, x = (torch.fft.fftfreq(side, device=images.device).abs() for side in images.shape[-2:])
    high = torch.maximum(y[:, None], x[None, :]) > 0.25
    return spectrum[..., high].mean((1, 2))
