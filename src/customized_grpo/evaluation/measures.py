"""What evaluations are made of: pure functions of scores, features and images.

Axes: B examples, N objectives, V variants, D features.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor


def joint_rates(scores: Tensor, baseline: Tensor) -> tuple[float, float]:
    """Joint domination and joint collapse rate (arXiv:2605.13155).

    The shares of examples that are better, and worse, than the baseline on *every* objective;
    ``scores`` and ``baseline`` are ``[B, N]``. Examples with a NaN count in neither.
    """
    domination = (scores > baseline).all(1).float().mean().item()
    return domination, (scores < baseline).all(1).float().mean().item()


def hypervolume(points: Sequence[Sequence[float]], reference: Sequence[float]) -> float:
    """Area that points of two objectives dominate above a reference point (Zitzler, 1999).

    Higher is better in both; points that are not above the reference in both add nothing.
    """
    area, best = 0.0, reference[1]
    for x, y in sorted(((p[0], p[1]) for p in points), reverse=True):
        if x > reference[0] and y > best:
            area += (x - reference[0]) * (y - best)
            best = y
    return area


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


def diversity(features: Tensor) -> float:
    """Mean ``1 - cosine`` over the pairs of variants of an example; features ``[V, B, D]``."""
    unit = F.normalize(features.float(), dim=-1)
    similarity = torch.einsum("vbd,wbd->bvw", unit, unit)
    count = len(features)
    pairs = similarity.sum((1, 2)) - similarity.diagonal(dim1=1, dim2=2).sum(1)
    return (1 - pairs / (count * (count - 1))).mean().item()


def standard_error(differences: Tensor) -> float:
    """Of the mean of ``[B]`` paired differences; NaN entries are left out."""
    values = differences[~differences.isnan()]
    return (values.std() / len(values) ** 0.5).item()
