"""Identity: is it the same subject, and is it more than a copy of the picture?

One implementation for every image encoder; ``dino``, ``dinov2``, ``dinov3``, ``clip-image`` and
``efficientnet-lite`` differ in theirs only. Axes: B images, U different examples, R references,
D features.
"""

from __future__ import annotations

import hashlib
import logging
from collections import OrderedDict
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import torch
import torch.nn.functional as F
from pydantic import NonNegativeFloat
from torch import Tensor

from customized_grpo.assets import one_line
from customized_grpo.config import Checkpoint, RewardConfig, find_checkpoints
from customized_grpo.errors import DataError
from customized_grpo.rewards.base import distinct
from customized_grpo.rewards.dual_encoder import batched
from customized_grpo.rewards.loading import load_model
from customized_grpo.rewards.matching import matched, regions
from customized_grpo.rewards.preprocess import Preprocessing, blank
from customized_grpo.rewards.regions import Segmenter, cut_out
from customized_grpo.types import Example

logger = logging.getLogger("customized_grpo")

_CACHED = 4096  # references whose features are kept: 32 MB at 2 x 1024 numbers


@dataclass(frozen=True, kw_only=True, slots=True)
class IdentityConfig(RewardConfig):
    """What the identity rewards have in common; the type says which encoder looks."""

    references: Literal["max", "mean"] = "max"
    """How several references count: by the most similar one, or by their mean."""

    region: Literal["image", "subject"] = "image"
    """What is seen of a reference: the whole picture, or the subject cut out by its mask (grey
    around it), so that copying the reference's background is not rewarded."""

    output_region: Literal["image", "subject"] = "image"
    """What is seen of the output: the whole picture, or the subject that the segmenter finds in it;
    where it finds none, the whole picture."""

    segmenter: str | None = None
    """Folder or hub id of a CLIPSeg, such as 'CIDAS/clipseg-rd64-refined', which finds the subject
    by its name: in outputs, and in references without masks."""

    copy_penalty: NonNegativeFloat = 0.0
    """Weight of what is subtracted for copying: how much more similar the whole output is to the
    whole reference than the reference's subject alone is; 0 if it is not, 0 = off."""

    def __post_init__(self) -> None:
        """Checks options that need each other.

        Raises:
            ValueError: if one would have no effect or lacks another.
        """
        if self.output_region == "subject" and self.segmenter is None:
            raise ValueError(
                "segmenter must be given for output_region 'subject', got null; write "
                "segmenter: CIDAS/clipseg-rd64-refined"
            )
        if (
            self.segmenter
            and not self.copy_penalty
            and self.output_region == self.region == "image"
        ):
            raise ValueError(
                f"segmenter must be null where nothing is cut out, got {self.segmenter!r}; set "
                "region or output_region to subject"
            )


@dataclass(frozen=True, kw_only=True, slots=True)
class EncoderConfig(IdentityConfig):
    """Those whose encoder is a checkpoint of transformers."""

    path: str
    """Folder, hub id, or 'embedded:reward-dino' for dinov2."""

    def checkpoints(self) -> tuple[Checkpoint, ...]:
        """See Plug."""
        return find_checkpoints(self, {"path": "model", "segmenter": "model"})


class IdentityReward:
    """Cosine similarity of output and references, less the copy penalty; see IdentityConfig.

    ``score = agg_r cos(o, t_r) - copy_penalty * max_r max(0, cos(O, W_r) - cos(S_r, W_r))``

    with features of: o the output in ``output_region``, t the reference in ``region``, O and W the
    whole pictures, S the reference's subject alone. ``cos(S, W)`` is the similarity to the
    reference that its subject explains. A faithful subject in a new scene stays below it and pays
    nothing; a copy pays ``1 - cos(S, W)``, and distance beyond that is not rewarded. It is the
    idea of the copy-paste score of WithAnyone (arXiv:2510.14975), with the reference's own subject
    in place of a ground truth, which training prompts do not have.

    Where the references show several subjects, each has to be in the output: the first term is the
    mean over subjects of the similarity to the region that ``matching`` gives each.

    ``copy_gap = max_r cos(O, W_r) - cos(O, B_r)``, with B the reference on grey in place of its
    background: what an output has of the reference beyond the subject. About 0 for the subject in
    another scene, ``1 - cos(B, W)`` for a copy. Of what can be said without ground truth it is
    least moved by the identity itself (docs/reward_hacking.md).
    """

    def __init__(
        self,
        encode: Callable[[Tensor], Tensor],
        preprocess: Preprocessing,
        config: IdentityConfig,
        segmenter: Segmenter | None = None,
    ) -> None:
        self._encode, self._preprocess = encode, preprocess
        self._config, self._segmenter = config, segmenter
        self._cache: OrderedDict[bytes, Tensor] = OrderedDict()

    @classmethod
    def load(
        cls,
        config: EncoderConfig,
        model_class: Any,
        features: Callable[[Any, Tensor], Tensor],
        device: torch.device,
        preprocess: Preprocessing | None = None,
        unused: str = "",
    ) -> IdentityReward:
        """Loads a reward with the encoder ``features(model, pixels) -> [B, D]``.

        ``preprocess`` None: as the checkpoint's preprocessor_config.json says. ``unused``: weights
        under this name may be missing.

        Raises:
            ConfigError: if a checkpoint is missing or of another kind.
        """
        model = load_model(model_class, config.path, device, unused=unused)
        preprocess = preprocess or Preprocessing.from_pretrained(config.path)
        segmenter = config.segmenter and Segmenter.load(config.segmenter, device)
        reward = cls(lambda pixels: features(model, pixels), preprocess, config, segmenter or None)
        with one_line(f"path: {config.path!r} does not work"):
            reward.embed(blank(device))
        return reward

    @torch.no_grad()
    def score(self, images: Tensor, examples: Sequence[Example]) -> Tensor:
        """See the Protocol; NaN where no reference of the example shows its subject.

        Raises:
            DataError: if a subject is to be cut out and neither masks nor a segmenter are there.
        """
        return self.score_and_gap(images, examples)[0]

    @torch.no_grad()
    def score_and_gap(self, images: Tensor, examples: Sequence[Example]) -> tuple[Tensor, Tensor]:
        """See CopyMeter; the gap is not known without masks and a segmenter.

        Raises:
            DataError: as ``score``.
        """
        config = self._config
        several = torch.tensor([bool(example.subjects) for example in examples])
        if len(several.unique()) == 2:
            return self._in_two(images, examples, several)
        unique, place = distinct(examples)
        references = self._references(unique, images.device)[place.to(images.device)]
        subjects, wholes, bare = references.unbind(2)
        targets = wholes if config.region == "image" else subjects
        if several.any():
            output, identity = None, self._matched(images, examples, targets)
        else:
            output = self._outputs(images, examples)
            identity = _pool(torch.einsum("bd,brd->br", output, targets), config.references)
        if self._segmenter is None and all(e.reference_masks is None for e in examples):
            return identity, torch.full_like(identity, torch.nan)
        if output is None or config.output_region == "subject":
            output = self.embed(images)
        gap = _pool(torch.einsum("bd,brd->br", output, wholes - bare), "max")
        if not config.copy_penalty:
            return identity, gap
        explained = (subjects * wholes).sum(2)
        excess = (torch.einsum("bd,brd->br", output, wholes) - explained).clamp(min=0)
        return identity - config.copy_penalty * _pool(excess, "max"), gap

    def _in_two(
        self, images: Tensor, examples: Sequence[Example], several: Tensor
    ) -> tuple[Tensor, Tensor]:
        """Those with one subject and those with several, each by themselves."""
        found = torch.empty(2, len(images), device=images.device)
        for kind in (False, True):
            rows = (several == kind).nonzero()[:, 0]
            some = [examples[row] for row in rows.tolist()]
            rows = rows.to(images.device)
            found[:, rows] = torch.stack(self.score_and_gap(images[rows], some))
        return found[0], found[1]

    def _outputs(self, images: Tensor, examples: Sequence[Example]) -> Tensor:
        if self._config.output_region == "image":
            return self.embed(images)
        return self.embed_outputs(list(images), [example.named_subject for example in examples])

    def _matched(self, images: Tensor, examples: Sequence[Example], targets: Tensor) -> Tensor:
        """Identity ``[B]`` of several subjects, each in a region of its own; targets
        ``[B, R, D]``. A subject that no reference shows is left out.

        Raises:
            DataError: if there is no segmenter that finds them in outputs.
        """
        found = []
        for image, example, shown in zip(images, examples, targets, strict=True):
            if self._segmenter is None or self._config.output_region == "image":
                raise DataError(
                    f"example {example.id!r}: subjects: must be one for output_region 'image', got "
                    f"{len(example.subjects)}; set output_region: subject and a segmenter in the "
                    "reward, which then finds each in outputs"
                )
            names = example.subjects
            places = regions(self._segmenter.masks([image] * len(names), names))
            parts = [cut_out(image, place) for place in places] or [image]
            features = batched(self._features, self._preprocess.stack(parts))
            similar = features @ shown[: len(example.references)].T
            numbered = list(enumerate(example.reference_subjects))
            shows = [[number for number, n in numbered if n == name] for name in names]
            of_each = [_pool(similar[:, which], self._config.references) for which in shows]
            known = [row for row in of_each if not row.isnan().any()]
            nothing = images.new_tensor(torch.nan)
            found.append(matched(torch.stack(known), len(names)) if known else nothing)
        return torch.stack(found)

    @torch.no_grad()
    def embed(self, images: Tensor) -> Tensor:
        """See ImageEmbedder."""
        return batched(lambda some: self._features(self._preprocess(some)), images)

    @torch.no_grad()
    def embed_outputs(self, images: Sequence[Tensor], subjects: Sequence[str]) -> Tensor:
        """Unit features ``[B, D]`` of pictures ``[3, H, W]`` of any sizes in ``output_region``.

        ``subjects`` are the words that a segmenter looks for.
        """
        if self._config.output_region == "subject" and self._segmenter is not None:
            masks = self._segmenter.masks(images, subjects)
            images = [
                cut_out(image, mask) if mask.any() else image
                for image, mask in zip(images, masks, strict=True)
            ]
        return batched(self._features, self._preprocess.stack(images))

    @torch.no_grad()
    def embed_photos(
        self, photos: Sequence[Tensor], masks: Sequence[Tensor | None], subjects: Sequence[str]
    ) -> Tensor:
        """Unit features ``[B, D]`` of photos ``[3, H, W]`` in ``region``; NaN = no subject found.

        Raises:
            DataError: if a subject is to be cut out and neither mask nor segmenter is there.
        """
        if self._config.region == "image":
            return batched(self._features, self._preprocess.stack(photos))
        found: list[Tensor] = []
        for photo, mask, words in zip(photos, masks, subjects, strict=True):
            if mask is None:
                mask = self._find(photo, words, f"photos of {words!r}")
            mask = mask.to(photo.device)
            found.append(
                cut_out(photo, mask) if (mask > 0.5).any() else torch.full_like(photo, torch.nan)
            )
        return batched(self._features, self._preprocess.stack(found))

    def _find(self, picture: Tensor, words: str, what: str) -> Tensor:
        """The segmenter's mask ``[1, H, W]``, for ``what`` the data have none."""
        if self._segmenter is None:
            raise DataError(
                f"{what}: the subject region needs a mask for every photo, got none; add masks to "
                "the data, or name a segmenter"
            )
        return self._segmenter.masks([picture], [words])[0]

    def _features(self, pixels: Tensor) -> Tensor:
        return F.normalize(self._encode(pixels).float(), dim=-1)

    def _references(self, examples: Sequence[Example], device: torch.device) -> Tensor:
        """Features ``[U, R, 3, D]``, see ``_encode_reference``; NaN = not there."""
        keys = [
            [_digest(example, n) for n in range(len(example.references))] for example in examples
        ]
        for example, row in zip(examples, keys, strict=True):
            for number, key in enumerate(row):
                if key not in self._cache:  # encoded alone: a batch would move its last bits
                    self._cache[key] = self._encode_reference(example, number, device)
                self._cache.move_to_end(key)
        rows = [torch.stack([self._cache[key] for key in row]) for row in keys]
        while len(self._cache) > _CACHED:
            self._cache.popitem(last=False)
        return torch.nn.utils.rnn.pad_sequence(rows, batch_first=True, padding_value=torch.nan)

    def _encode_reference(self, example: Example, number: int, device: torch.device) -> Tensor:
        """Features ``[3, D]`` of the subject alone, the whole picture, and the picture without its
        background; NaN = no subject is found, or nobody has looked for it."""
        picture = example.references[number].to(device)
        mask = self._mask(example, number, picture)
        whole = self._features(self._preprocess(picture[None]))[0]
        if mask is None:
            return torch.stack([whole * torch.nan, whole, whole * torch.nan])
        bare = torch.lerp(torch.full_like(picture, 0.5), picture, mask)
        subject, without = (
            self._features(self._preprocess(part[None]))[0]
            for part in (cut_out(picture, mask), bare)
        )
        return torch.stack([subject, whole, without])

    def _mask(self, example: Example, number: int, picture: Tensor) -> Tensor | None:
        """Where the subject is ``[1, H, W]``; None: nowhere, or not known and not needed.

        Raises:
            DataError: if it is needed and neither mask nor segmenter is there.
        """
        is_needed = self._config.region == "subject" or self._config.copy_penalty > 0
        if example.reference_masks is not None:
            mask = example.reference_masks[number].to(picture.device)
        elif self._segmenter is not None or is_needed:
            words = ""
            if self._segmenter is not None:
                words = example.words_of(number) or example.named_subject
            mask = self._find(picture, words, f"example {example.id!r}").to(picture.device)
        else:
            return None
        if (mask > 0.5).any():
            return mask
        if is_needed:
            logger.warning(
                "example %r: no subject in reference %d; it is left out", example.id, number
            )
        return None


def _pool(similarities: Tensor, how: str) -> Tensor:
    """``[B]`` of ``[B, R]``, leaving out NaN; NaN if nothing is left."""
    if how == "mean":
        return similarities.nanmean(1)
    best = similarities.nan_to_num(-torch.inf, posinf=torch.inf).amax(1)
    return torch.where(best.isfinite(), best, torch.nan)


def _digest(example: Example, number: int) -> bytes:
    """Digest of what a reference's features depend on: examples of one subject share them."""
    digest = hashlib.blake2b(example.words_of(number).encode(), digest_size=16)
    masks = example.reference_masks or ()
    for tensor in (example.references[number], *masks[number : number + 1]):
        digest.update(str(tuple(tensor.shape)).encode())
        digest.update(tensor.detach().float().cpu().contiguous().numpy().tobytes())
    return digest.digest()
