"""The emoji world with several references per prompt: copies of its one."""

from __future__ import annotations

from dataclasses import dataclass, replace

from pydantic import PositiveInt

from customized_grpo.data.emoji.source import EmojiConfig, EmojiSource
from customized_grpo.types import Example


@dataclass(frozen=True, kw_only=True, slots=True)
class CopiedReferences(EmojiConfig):
    """See the module; ``type: _references:CopiedReferences``."""

    type: str = "_references:CopiedReferences"  # pyright: ignore
    references: PositiveInt = 1

    def build(self, seed: int) -> CopyingSource:
        """See the base class."""
        EmojiConfig.build(self, seed)  # says what is not installed
        return CopyingSource(seed, self.references)


class CopyingSource(EmojiSource):
    """See CopiedReferences."""

    def __init__(self, seed: int, references: int) -> None:
        super().__init__(seed)
        self._references = references

    def _sample(self, split: str, seed: int, count: int) -> list[Example]:
        return [
            replace(
                example,
                references=example.references * self._references,
                reference_masks=(example.reference_masks or ()) * self._references,
            )
            for example in super()._sample(split, seed, count)
        ]
