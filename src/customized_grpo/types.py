"""The values that travel through the pipeline, from example to policy batch.

Axes: B samples, P prompts (groups), K trained steps, T denoising steps, N objectives, R rewards,
M (sample, step) pairs, L the latent shape.
"""

from __future__ import annotations

from collections.abc import Callable, Hashable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol, TypeAlias, runtime_checkable

import torch.nn.functional as F
from torch import Tensor

from customized_grpo.errors import DataError


@dataclass(frozen=True, kw_only=True, slots=True)
class Example:
    """One task: show this subject as the prompt says."""

    id: str
    prompt: str
    references: tuple[Tensor, ...]
    """Pictures of the subject, each ``[3, H, W]`` in [0, 1]."""
    subject: str
    """Words for the subject, such as 'dog'; '' where the data do not say: see ``named_subject``."""
    reference_subjects: tuple[str, ...] = ()
    """Words for the subject of each reference, where several are to be in one picture; () = all
    show ``subject``."""
    reference_masks: tuple[Tensor, ...] | None = None
    """Where the subject is in each reference, ``[1, H, W]`` in [0, 1]."""
    target: Tensor | None = None
    """What a perfect answer looks like, ``[3, H, W]``; known in synthetic worlds only."""
    target_mask: Tensor | None = None
    """Where the subject is in the target, ``[1, H, W]`` in [0, 1]."""
    attributes: Mapping[str, str] = field(default_factory=dict)
    """What the prompt asks for, attribute -> value, where the data know; 'none' = nothing."""

    @property
    def subjects(self) -> tuple[str, ...]:
        """Words for each of several subjects; () where there is one."""
        return tuple(dict.fromkeys(self.reference_subjects))

    def words_of(self, number: int) -> str:
        """Words for the subject of a reference; '' where the data do not say."""
        return self.reference_subjects[number] if self.reference_subjects else self.subject

    @property
    def named_subject(self) -> str:
        """The subject's words, for rewards that cannot do without.

        Raises:
            DataError: if the data do not say.
        """
        if not self.subject:
            raise DataError(
                f"example {self.id!r}: subject: must say what the references show, got nothing; "
                "add it to the data, or leave out the reward that needs it"
            )
        return self.subject


@runtime_checkable
class KnowsSubjects(Protocol):
    """A data source that can show any of its subjects as a prompt asks for it."""

    def look(self, example: Example) -> Hashable:
        """What the prompt says of the subject itself; examples of one look share portraits."""
        ...

    def rivals(self, example: Example) -> Sequence[str]:
        """Subjects that an output is compared with besides the example's own."""
        ...

    def portraits(self, subjects: Sequence[str], look: Any) -> tuple[Tensor, Tensor]:
        """Subjects ``[S, 3, H, W]`` with a look, on plain ground, and masks ``[S, 1, H, W]``."""
        ...


@dataclass(frozen=True, kw_only=True, slots=True)
class Rollout:
    """Samples of one or several groups, and the transitions that will be trained.

    The trained steps differ from group to group, so every transition carries its own step index.
    """

    latents: Tensor
    """``[B, K, *L]`` float32, before each trained step."""
    next_latents: Tensor
    """``[B, K, *L]`` float32, the very numbers that the next step was computed from."""
    log_probs: Tensor
    """``[B, K]`` float32 under the policy that sampled."""
    step_index: Tensor
    """``[B, K]`` int64, position in the schedule (0 = noisiest)."""
    sigmas: Tensor
    """``[T + 1]`` float32, 1 -> 0."""
    images: Tensor
    """``[B, 3, H, W]`` in [0, 1]."""
    group_ids: Tensor
    """``[B]`` int64."""
    final_latents: Tensor
    """``[B, *L]`` float32, what the images were decoded from."""
    seeds: Tensor
    """``[B]`` int64 on the CPU, from which each sample's own noise was drawn."""
    means: Tensor | None = None
    """``[B, K, *L]`` float32 of the transitions, where the loss needs them."""


@dataclass(frozen=True, kw_only=True, slots=True)
class RewardScores:
    """What the reward models said of a batch of images."""

    scores: Tensor
    """``[B, R]`` float32; NaN = could not be scored."""
    names: tuple[str, ...]
    copy_gap: Tensor
    """``[B]`` float32, see ``rewards.identity.IdentityReward``; NaN = not known."""
    errors: tuple[str, ...] = ()


@dataclass(frozen=True, kw_only=True, slots=True)
class Advantages:
    """Group-relative advantages before and after shaping."""

    per_objective: Tensor
    """``[B, N]`` float32; NaN rows are invalid."""
    per_step: Tensor
    """``[B, T]`` float32, shaped and weighted for every step of the schedule; 0 if invalid."""
    valid: Tensor
    """``[B]`` bool."""
    kl_gate: Tensor | None = None
    """``[B]`` float32: 1 for samples that ``loss.kl_weight`` holds for, else 0; None: for all."""

    def take(self, rows: Tensor) -> Advantages:
        """The same for samples ``rows`` (int64) only."""
        return Advantages(
            per_objective=self.per_objective[rows],
            per_step=self.per_step[rows],
            valid=self.valid[rows],
            kl_gate=None if self.kl_gate is None else self.kl_gate[rows],
        )


PairLosses: TypeAlias = tuple[Tensor, dict[str, Tensor]]
"""Losses ``[m]`` of m pairs, or their sum, and numbers for the log: name -> a mean over them."""


@dataclass(frozen=True, kw_only=True, slots=True)
class PolicyTerms:
    """What the losses of m transitions are computed from."""

    log_prob: Tensor
    """``[m]`` float32 of the policy that is trained; gradients flow."""
    old_log_prob: Tensor
    """``[m]`` float32 of the policy that sampled."""
    advantage: Tensor
    """``[m]`` float32."""
    clip_range: float
    """``loss.clip_range``."""
    divergence: Tensor | None = None
    """``[m]`` float32, the KL of the step's Gaussian to that of the policy that sampled, where
    ``loss.kl_mask`` is given."""
    kl_mask: float | None = None
    """``loss.kl_mask``."""


@dataclass(frozen=True, kw_only=True, slots=True)
class ForwardTerms:
    """What the losses of m noised samples are computed from."""

    velocity: Tensor
    """``[m, *L]`` float32 of the model that is trained; gradients flow."""
    old_velocity: Tensor
    """``[m, *L]`` float32 of the policy that sampled, at the same latents."""
    target: Tensor
    """``[m, *L]`` float32, noise - latents: the velocity that leads back to the sample."""
    sigma: Tensor
    """``[m]`` float32, the noise levels."""
    advantage: Tensor
    """``[m]`` float32."""
    clip: float
    """``advantage.clip``, what no advantage is beyond."""


@dataclass(frozen=True, kw_only=True, slots=True)
class PolicyBatch:
    """Transitions to train on; the step index travels with the data."""

    losses: Callable[[PolicyTerms], PairLosses]
    """The algorithm's."""
    latents: Tensor
    """``[M, *L]``."""
    next_latents: Tensor
    """``[M, *L]``."""
    step_index: Tensor
    """``[M]`` int64."""
    old_log_prob: Tensor
    """``[M]`` float32."""
    advantage: Tensor
    """``[M]`` float32."""
    sample_index: Tensor
    """``[M]`` int64, row of the rollout (and of its conditioning) each pair belongs to."""
    weight: Tensor
    """``[M]`` float32: 0 for pairs of invalid samples, which are there where all processes must
    compute equally many, else 1."""
    old_mean: Tensor | None = None
    """``[M, *L]`` under the policy that sampled, where the loss needs it."""
    kl_gate: Tensor | None = None
    """``[M]`` float32 as in ``Advantages``."""


@dataclass(frozen=True, kw_only=True, slots=True)
class ForwardBatch:
    """Samples to train on at noise levels drawn for them; noise is made where it is needed."""

    losses: Callable[[ForwardTerms], PairLosses]
    """The algorithm's."""
    clip: float
    """``advantage.clip``."""
    final_latents: Tensor
    """``[b, *L]`` of the rollout's samples, not of the pairs; 0 for invalid ones."""
    noise_seed: Tensor
    """``[M]`` int64, on the CPU, where noise is drawn."""
    step_index: Tensor
    """``[M]`` int64, position of the noise level in the schedule."""
    advantage: Tensor
    """``[M]`` float32."""
    sample_index: Tensor
    """``[M]`` int64, row of ``final_latents`` (and of the conditioning) each pair belongs to."""
    weight: Tensor
    """``[M]`` float32, as in ``PolicyBatch``."""
    old_velocity: Tensor | None = None
    """``[M, *L]`` of the policy that sampled; None: it is the one that is trained."""
    kl_gate: Tensor | None = None
    """``[M]`` float32 as in ``Advantages``."""


Batch: TypeAlias = PolicyBatch | ForwardBatch
"""What an update is computed from, by the algorithm."""


def crop_and_resize(image: Tensor, height: int, width: int) -> Tensor:
    """Largest centred crop of ``[C, H, W]`` with the wanted aspect ratio, resized to it."""
    if image.shape[-2:] == (height, width):
        return image
    _, h, w = image.shape
    scale = min(h / height, w / width)
    crop_h, crop_w = round(height * scale), round(width * scale)
    top, left = (h - crop_h) // 2, (w - crop_w) // 2
    cropped = image[:, top : top + crop_h, left : left + crop_w]
    return F.interpolate(
        cropped[None], (height, width), mode="bicubic", antialias=True, align_corners=False
    )[0].clamp(0, 1)
