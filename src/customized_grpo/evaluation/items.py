"""What an evaluation asks for: subjects with their photos, and one item per picture."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any

from torch import Tensor

from customized_grpo.data.listed import Loadable, PictureCache
from customized_grpo.types import Example


@dataclass(frozen=True, eq=False, slots=True)
class Rendered:
    """A picture that no file holds."""

    pixels: Tensor

    @property
    def height(self) -> int:
        """See Loadable."""
        return self.pixels.shape[1]

    @property
    def width(self) -> int:
        """See Loadable."""
        return self.pixels.shape[2]

    def load(self) -> Tensor:
        """See Loadable."""
        return self.pixels


@dataclass(frozen=True, kw_only=True, slots=True)
class Photo:
    """A picture that something is measured of: a photo of a subject, or an output."""

    name: str
    picture: Loadable
    digest: str
    """SHA-256 of its content, of the mask's too."""
    mask: Loadable | None = None
    """White where the subject is."""


@dataclass(frozen=True, kw_only=True, slots=True)
class PhotographedSubject:
    """A subject and all real photos of it."""

    name: str
    words: str
    """What it is called in prompts."""
    photos: tuple[Photo, ...]
    kind: str = ""
    """live or object; '' where the benchmark does not say."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Item:
    """One picture that is asked for."""

    subject: str
    prompt_index: int
    """Position in the subject's list of prompts, or in the split of a run."""
    prompt: str
    kind: str = ""
    category: str = ""
    """context, property, accessory, or what the benchmark calls it; '' = not known."""
    references: tuple[str, ...] = ()
    """Names of the photos that the picture is conditioned on."""
    index: int = 0
    """Number among the pictures of this prompt."""

    @property
    def key(self) -> tuple[Any, ...]:
        """What tells it from every other item."""
        return (self.subject, self.prompt_index, self.references, self.index)

    def describe(self) -> str:
        """``dog, prompt 3, reference 00.jpg, index 0``."""
        references = " + ".join(self.references)
        where = f"prompt {self.prompt_index}, reference {references}, index {self.index}"
        return f"{self.subject}, {where}"

    def noise_seed(self, seed: int) -> int:
        """Seed of the picture's noise; it depends on subject, prompt and index only."""
        text = json.dumps([seed, self.subject, self.prompt_index, self.index])
        return int.from_bytes(hashlib.sha256(text.encode()).digest()[:8]) >> 1


def make_example(
    words: str, prompt: str, references: Sequence[Photo], cache: PictureCache
) -> Example:
    """An example whose id names all of it: rewards take examples of one id for the same."""
    return Example(
        id=json.dumps([words, prompt, *(photo.digest for photo in references)]),
        prompt=prompt,
        references=tuple(cache.load(photo.picture) for photo in references),
        subject=words,
    )


@dataclass(frozen=True, kw_only=True)
class BenchmarkSet:
    """All of it; the order of the items is the order of every list of numbers."""

    type: str
    subjects: Mapping[str, PhotographedSubject]
    items: tuple[Item, ...]
    rules: Mapping[str, str] = field(default_factory=dict)
    """How references, categories and prompts were chosen, in words."""

    @cached_property
    def photos(self) -> tuple[Photo, ...]:
        """All photos, subject by subject."""
        return tuple(photo for subject in self.subjects.values() for photo in subject.photos)

    @cached_property
    def rows(self) -> dict[tuple[str, str], int]:
        """(subject, name of the photo) -> place in ``photos``."""
        names = [(s.name, photo.name) for s in self.subjects.values() for photo in s.photos]
        return {name: row for row, name in enumerate(names)}

    def subject_rows(self, subject: str) -> list[int]:
        """Places of a subject's photos in ``photos``."""
        return [self.rows[subject, photo.name] for photo in self.subjects[subject].photos]

    def reference_rows(self, item: Item) -> list[int]:
        """Places of the photos an item is conditioned on."""
        return [self.rows[item.subject, name] for name in item.references]

    def references(self, item: Item) -> tuple[Photo, ...]:
        """The photos an item is conditioned on."""
        return tuple(self.photos[row] for row in self.reference_rows(item))

    def example(self, item: Item, cache: PictureCache) -> Example:
        """What a generator is asked for."""
        words, photos = self.subjects[item.subject].words, self.references(item)
        return make_example(words, item.prompt, photos, cache)

    @cached_property
    def digest(self) -> str:
        """SHA-256 of all that is asked for and compared with: evaluations agree if it is equal."""
        content = {
            "photos": [[*name, self.photos[row].digest] for name, row in self.rows.items()],
            "items": [[*item.key, item.prompt] for item in self.items],
        }
        return hashlib.sha256(json.dumps(content).encode()).hexdigest()

    def counts(self) -> dict[str, int]:
        """How many subjects, photos, prompts and pictures there are."""
        prompts = {(item.subject, item.prompt_index) for item in self.items}
        return {
            "subjects": len(self.subjects),
            "photos": len(self.photos),
            "prompts": len(prompts),
            "images": len(self.items),
        }
