"""The emoji world: an endless supply of (reference, prompt, target) triples rendered on the CPU.

A *subject* (an emoji) is shown in a scene; the reference shows it in another one, plain. The prompt
asks for one of DreamBench's kinds: a new context (scene, placement, a prop beside it), a changed
property (colour), an accessory, or all of them at once. Everything is vectorised over the batch
and drawn from one ``torch.Generator``: the same seed gives the same pictures and sentences.
"""

from __future__ import annotations

import random
from dataclasses import dataclass, fields
from functools import cache

import torch
import torch.nn.functional as F
from torch import Tensor

from customized_grpo.data.emoji.catalog import ACCESSORIES, PROPS, load_catalog, load_glyph
from customized_grpo.data.emoji.scenes import SCENES, paint_scenes

SIZE = 64
SUBJECT_SIZE = 32
PROP_SIZE = 22
# Shifts between placements are whole 16 px tokens of the embedded generator: copying a subject from
# the reference is then learnable by a small transformer in an hour.
_PLACEMENT_LEFT = (16, 0, 32)
_SUBJECT_TOP = 26

PLACEMENTS = ("in the middle", "on the left", "on the right")
COLORS: dict[str, tuple[float, float, float]] = {
    "red": (1.0, 0.15, 0.15),
    "golden": (1.0, 0.78, 0.1),
    "green": (0.15, 0.85, 0.25),
    "blue": (0.2, 0.4, 1.0),
    "purple": (0.65, 0.25, 0.95),
    "pink": (1.0, 0.5, 0.75),
    "silver": (0.8, 0.82, 0.86),
    "black": (0.22, 0.22, 0.24),
}
KINDS = ("context", "property", "accessory", "combined")

_OPENINGS = ("", "a photo of ", "a picture of ", "an image of ")
_WEARING = ("wearing", "with")
_BESIDE = ("beside", "next to", "near")


@dataclass(frozen=True, kw_only=True, slots=True)
class Attributes:
    """What a prompt asks for, int64 ``[B]``; scene and placement: an index, others: 0 = nothing."""

    scene: Tensor
    placement: Tensor
    prop: Tensor
    color: Tensor
    accessory: Tensor


@dataclass(frozen=True, kw_only=True, slots=True)
class EmojiBatch:
    """Pictures ``[B, 3, 64, 64]`` in [0, 1] and masks of the subject ``[B, 1, 64, 64]``."""

    prompts: list[str]
    references: Tensor
    reference_masks: Tensor
    targets: Tensor
    target_masks: Tensor
    subject: Tensor
    attributes: Attributes


class EmojiWorld:
    """Subjects of one split (``train`` or ``held_out``) and the renderer."""

    def __init__(self, split: str) -> None:
        if split not in ("train", "held_out"):
            raise ValueError(f"split must be 'train' or 'held_out', got {split!r}")
        self.subjects, self._glyphs = load_catalog(SUBJECT_SIZE)
        self.indices = torch.tensor([i for i, s in enumerate(self.subjects) if s.split == split])
        self._props, self._accessories = _extra_glyphs()

    def sample(self, batch_size: int, rng: torch.Generator) -> EmojiBatch:
        """Independent triples, subjects and attributes uniform."""
        pick = torch.randint(len(self.indices), (batch_size,), generator=rng)
        subject = self.indices[pick]
        wanted = sample_attributes(batch_size, rng)
        shown = _reference_attributes(wanted, rng)
        targets, target_masks = self.render(subject, wanted, rng)
        references, reference_masks = self.render(subject, shown, rng)
        words = random.Random(int(torch.randint(2**62, (1,), generator=rng)))
        prompts = [
            write_prompt(self.subjects[s].noun, values, words)
            for s, values in zip(subject.tolist(), _rows(wanted), strict=True)
        ]
        return EmojiBatch(
            prompts=prompts,
            references=references,
            reference_masks=reference_masks,
            targets=targets,
            target_masks=target_masks,
            subject=subject,
            attributes=wanted,
        )

    def render(
        self, subject: Tensor, attributes: Attributes, rng: torch.Generator
    ) -> tuple[Tensor, Tensor]:
        """Images ``[B, 3, 64, 64]`` and subject masks ``[B, 1, 64, 64]`` for subjects ``[B]``."""
        image = paint_scenes(attributes.scene, SIZE, rng)
        image = self._draw_props(image, attributes, rng)
        return self._draw_subjects(image, subject, attributes)

    def portray(self, subject: Tensor, color: int, accessory: int) -> tuple[Tensor, Tensor]:
        """The same of subjects alone, in the middle of plain grey; nothing of it is random."""
        none = torch.zeros_like(subject)
        attributes = Attributes(
            scene=none, placement=none, prop=none, color=none + color, accessory=none + accessory
        )
        grey = torch.full((len(subject), 3, SIZE, SIZE), 0.5)
        return self._draw_subjects(grey, subject, attributes)

    def _draw_subjects(
        self, image: Tensor, subject: Tensor, attributes: Attributes
    ) -> tuple[Tensor, Tensor]:
        left = torch.tensor(_PLACEMENT_LEFT)[attributes.placement]
        glyph = _tint(self._glyphs[subject], attributes.color)
        layer = _place(glyph, left, torch.full_like(left, _SUBJECT_TOP))
        image = _over(image, layer)
        return self._draw_accessories(image, attributes, left).clamp(0, 1), layer[:, 3:]

    def _draw_props(self, image: Tensor, attributes: Attributes, rng: torch.Generator) -> Tensor:
        coin = torch.rand(len(image), generator=rng) < 0.5
        on_left = (attributes.placement == 2) | ((attributes.placement == 0) & coin)
        left = torch.where(on_left, 0, SIZE - PROP_SIZE)
        top = torch.full_like(left, _SUBJECT_TOP + SUBJECT_SIZE - PROP_SIZE + 2)
        layer = _place(self._props[attributes.prop], left, top)
        return _over(image, layer)

    def _draw_accessories(self, image: Tensor, attributes: Attributes, left: Tensor) -> Tensor:
        for index, accessory in enumerate(ACCESSORIES.values(), start=1):
            rows = (attributes.accessory == index).nonzero()[:, 0]
            if not len(rows):
                continue
            glyph = self._accessories[index - 1]
            width = glyph.shape[-1]
            x = left[rows] + (SUBJECT_SIZE - width) // 2
            y = round(_SUBJECT_TOP + accessory.center_y * SUBJECT_SIZE - width / 2)
            layer = _place(glyph.expand(len(rows), -1, -1, -1), x, torch.full_like(x, y))
            image[rows] = _over(image[rows], layer)
        return image


def attribute_values(name: str) -> tuple[str, ...]:
    """What an attribute's indices mean: phrases of the grammar, ``none`` where nothing is asked."""
    return {
        "scene": tuple(SCENES),
        "placement": PLACEMENTS,
        "prop": ("none", *PROPS),
        "color": ("none", *COLORS),
        "accessory": ("none", *ACCESSORIES),
    }[name]


def describe(attributes: Attributes, row: int) -> dict[str, str]:
    """Attribute -> value of one example of a batch."""
    return {
        f.name: attribute_values(f.name)[int(getattr(attributes, f.name)[row])]
        for f in fields(attributes)
    }


def sample_attributes(batch_size: int, rng: torch.Generator) -> Attributes:
    """Attributes of random prompts: a quarter of each of KINDS."""

    def draw(count: int) -> Tensor:
        return torch.randint(count, (batch_size,), generator=rng)

    kind = draw(len(KINDS))
    combined = kind == KINDS.index("combined")

    def asked(name: str, count: int) -> Tensor:
        return torch.where((kind == KINDS.index(name)) | combined, draw(count) + 1, 0)

    return Attributes(
        scene=draw(len(SCENES)),
        placement=draw(len(PLACEMENTS)),
        prop=asked("context", len(PROPS)),
        color=asked("property", len(COLORS)),
        accessory=asked("accessory", len(ACCESSORIES)),
    )


def write_prompt(noun: str, values: tuple[int, int, int, int, int], words: random.Random) -> str:
    """One English sentence for attribute indices (scene, placement, prop, color, accessory)."""
    scene, placement, prop, color, accessory = values
    described = f"{list(COLORS)[color - 1]} {noun}" if color else noun
    article = "an" if described[0] in "aeiou" else "a"
    parts = [f"{words.choice(_OPENINGS)}{article} {described}"]
    if accessory:
        parts.append(f"{words.choice(_WEARING)} {list(ACCESSORIES)[accessory - 1]}")
    if prop:
        parts.append(f"{words.choice(_BESIDE)} {list(PROPS)[prop - 1]}")
    parts.append(list(SCENES)[scene])
    sentence = " ".join(parts)
    where = PLACEMENTS[placement]
    if placement == 0 and words.random() < 0.5:  # the middle is what silence means
        return sentence
    return f"{where}, {sentence}" if words.random() < 0.25 else f"{sentence}, {where}"


def all_words() -> list[str]:
    """Every word the grammar can write, sorted: the vocabulary of the embedded tokenizers."""
    subjects, _ = load_catalog(SUBJECT_SIZE)
    phrases = [*PROPS, *ACCESSORIES, *SCENES, *COLORS, *PLACEMENTS, *_OPENINGS, *_WEARING, *_BESIDE]
    phrases += [s.noun for s in subjects] + ["an", "a", ","]
    return sorted({word for phrase in phrases for word in phrase.split()})


@cache
def _extra_glyphs() -> tuple[Tensor, list[Tensor]]:
    """Props ``[1 + num_props, 4, s, s]`` with an empty one first, and the accessories."""
    props = [torch.zeros(4, PROP_SIZE, PROP_SIZE)]
    props += [load_glyph(name, PROP_SIZE) for name in PROPS.values()]
    accessories = [
        load_glyph(a.emoji, 2 * round(a.width * SUBJECT_SIZE / 2)) for a in ACCESSORIES.values()
    ]
    return torch.stack(props), accessories


def _reference_attributes(wanted: Attributes, rng: torch.Generator) -> Attributes:
    """Plain subject in any placement and in a scene other than the wanted one."""
    none = torch.zeros_like(wanted.scene)
    offset = torch.randint(1, len(SCENES), wanted.scene.shape, generator=rng)
    placement = torch.randint(len(PLACEMENTS), wanted.scene.shape, generator=rng)
    scene = (wanted.scene + offset) % len(SCENES)
    return Attributes(scene=scene, placement=placement, prop=none, color=none, accessory=none)


def _rows(a: Attributes) -> list[tuple[int, int, int, int, int]]:
    columns = (a.scene, a.placement, a.prop, a.color, a.accessory)
    return [tuple(row) for row in torch.stack(columns, 1).tolist()]  # pyright: ignore


def _tint(glyph: Tensor, color: Tensor) -> Tensor:
    """Recolours premultiplied RGBA glyphs ``[B, 4, s, s]``: mostly luminance times colour."""
    table = torch.tensor([(0.0, 0.0, 0.0), *COLORS.values()])
    rgb, alpha = glyph[:, :3], glyph[:, 3:]
    luminance = rgb.mean(1, keepdim=True) * 0.75 + 0.25 * alpha
    tinted = (0.15 * rgb + 0.95 * luminance * table[color].view(-1, 3, 1, 1)).clamp(max=1)
    return torch.cat([torch.where((color > 0).view(-1, 1, 1, 1), tinted, rgb), alpha], 1)


def _place(glyph: Tensor, left: Tensor, top: Tensor) -> Tensor:
    """Glyphs ``[B, 4, s, s]`` at whole-pixel positions on empty canvases ``[B, 4, 64, 64]``."""
    side = glyph.shape[-1]
    padded = F.pad(glyph, (1, 1, 1, 1))
    axis = torch.arange(SIZE)
    x = (axis - left[:, None] + 1).clamp(0, side + 1)
    y = (axis - top[:, None] + 1).clamp(0, side + 1)
    rows = torch.arange(len(glyph)).view(-1, 1, 1)
    return padded.permute(0, 2, 3, 1)[rows, y[:, :, None], x[:, None, :]].permute(0, 3, 1, 2)


def _over(image: Tensor, layer: Tensor) -> Tensor:
    return image * (1 - layer[:, 3:]) + layer[:, :3]
