"""Sampling a generator for every item: resumable picture by picture, over any number of processes.

Items are sampled in fixed batches of one layout. A batch with a picture missing is sampled again as
a whole, since its company moves a picture's last bits; pictures that are there stay as they are.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from customized_grpo.assets import path_revision
from customized_grpo.buckets import layout
from customized_grpo.config import BenchmarkConfig, GeneratorConfig, revisions
from customized_grpo.config.decoding import to_raw
from customized_grpo.data.listed import PictureCache
from customized_grpo.errors import CheckpointError, ConfigError, within
from customized_grpo.evaluation.benchmark.items import BenchmarkSet, Item
from customized_grpo.evaluation.benchmark.manifest import MANIFEST, write_manifest
from customized_grpo.files import write_atomic
from customized_grpo.generators.base import Generator
from customized_grpo.pictures import png
from customized_grpo.runs.ranks import Ranks
from customized_grpo.training.build import load_trained
from customized_grpo.training.rollout import Policy, sample_images
from customized_grpo.types import Example

_RECIPE = "recipe.json"


def generate(
    config: BenchmarkConfig, wanted: BenchmarkSet, folder: Path, device: torch.device, ranks: Ranks
) -> None:
    """Samples what is missing in ``folder``, and its manifest when all is there.

    Raises:
        ConfigError: if the folder holds pictures of another recipe.
        CheckpointError: if the weights do not fit the generator.
    """
    assert config.generator is not None
    files = [_file(wanted, item) for item in wanted.items]
    batches = _batches(wanted, config.sampling.batch_size)
    mine = [
        batch
        for batch in batches[ranks.rank :: ranks.size]
        if not all((folder / files[row]).exists() for row in batch)
    ]
    sampler = _Sampler(config, config.generator, wanted, device) if mine else None
    _keep_recipe(config, wanted, folder, ranks)  # which names what was downloaded just now
    if sampler is not None:
        for batch in mine:
            images = sampler([wanted.items[row] for row in batch])
            for row, image in zip(batch, images, strict=True):
                _write_new(folder / files[row], image)
    ranks.wait()
    if ranks.first:
        write_atomic(folder / MANIFEST, write_manifest(wanted.items, files))
    ranks.wait()


def _write_new(file: Path, image: Tensor) -> None:
    """A picture that is there stays."""
    if not file.exists():
        file.parent.mkdir(parents=True, exist_ok=True)
        write_atomic(file, png(image))


def _file(wanted: BenchmarkSet, item: Item) -> str:
    """Path of a picture; numbers, because names of photos may be paths."""
    subject = list(wanted.subjects).index(item.subject)
    places = wanted.subject_rows(item.subject)
    photos = "-".join(str(places.index(row)) for row in wanted.reference_rows(item))
    return f"{subject:03d}/{item.prompt_index:04d}-{photos}-{item.index}.png"


def _batches(wanted: BenchmarkSet, size: int) -> list[list[int]]:
    """Items that follow each other, of one layout, at most ``size``."""
    batches: list[list[int]] = []
    last = None
    for row, item in enumerate(wanted.items):
        shapes = [(p.picture.height, p.picture.width) for p in wanted.references(item)]
        if layout(shapes) != last or len(batches[-1]) == size:
            batches.append([])
        last = layout(shapes)
        batches[-1].append(row)
    return batches


def _keep_recipe(config: BenchmarkConfig, wanted: BenchmarkSet, folder: Path, ranks: Ranks) -> None:
    """Pictures of two recipes must not lie in one folder."""
    text = json.dumps(_recipe(config, wanted), sort_keys=True) + "\n"
    file = folder / _RECIPE
    if ranks.first and not file.exists():
        folder.mkdir(parents=True, exist_ok=True)
        write_atomic(file, text)
    ranks.wait()
    if file.read_text(encoding="utf-8") != text:
        raise ConfigError(
            f"name: {folder} must hold pictures of this benchmark, generator, lora and sampling, "
            "got those of another recipe; choose another name, or delete the folder"
        )


def _recipe(config: BenchmarkConfig, wanted: BenchmarkSet) -> dict[str, Any]:
    generator = config.generator
    assert generator is not None
    return {
        "set": wanted.digest,
        "generator": to_raw(generator),
        "checkpoints": revisions(generator),
        "lora": config.lora and path_revision(config.lora),
        "sampling": to_raw(config.sampling),
    }


class _Sampler:
    """The generator with its weights, and the photos read last."""

    def __init__(
        self,
        config: BenchmarkConfig,
        generator: GeneratorConfig,
        wanted: BenchmarkSet,
        device: torch.device,
    ) -> None:
        sampling = config.sampling
        with within("generator"):
            self._generator: Generator = generator.build(device)
        self._wanted, self._cache, self._seed = wanted, PictureCache(), sampling.seed
        if config.lora is not None:
            self._load(Path(config.lora), sampling.mixed_precision)
        self._policy = Policy(
            generator=self._generator,
            sigmas=self._generator.sigmas(sampling.num_steps, sampling.shift).to(device),
            dynamics="flow",
            noise_level=0.0,
            autocast=sampling.mixed_precision == "bf16",
        )

    def _load(self, weights: Path, mixed_precision: str) -> None:
        if not weights.is_dir():
            raise CheckpointError(
                f"lora: must be a folder of trained weights, got {str(weights)!r}; it is "
                "runs/NAME/weights of a run"
            )
        load_trained(self._generator, weights, mixed_precision)

    @torch.no_grad()
    def __call__(self, items: Sequence[Item]) -> Tensor:
        """Images ``[B, 3, H, W]``."""
        seeds = [item.noise_seed(self._seed) for item in items]
        noise = [self._generator.noise(1, torch.Generator().manual_seed(seed)) for seed in seeds]
        examples = [self._example(item) for item in items]
        for example in examples:
            self._generator.check(example)
        conditioning = self._generator.encode(examples)
        return sample_images(
            self._policy, conditioning, torch.cat(noise).to(self._policy.sigmas.device), len(items)
        )

    def _example(self, item: Item) -> Example:
        return Example(
            id=hashlib.sha256(item.describe().encode()).hexdigest(),
            prompt=item.prompt,
            references=tuple(
                self._cache.load(photo.picture) for photo in self._wanted.references(item)
            ),
            subject=self._wanted.subjects[item.subject].words,
        )
