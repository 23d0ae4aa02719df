"""Sampling a generator for every item: resumable picture by picture, over any number of processes.

Items are sampled in fixed batches of one layout. A batch with a picture missing is sampled again as
a whole, since its company moves a picture's last bits; pictures that are there stay as they are.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path

import torch
from torch import Tensor

from customized_grpo.assets import path_revision
from customized_grpo.buckets import layout
from customized_grpo.config import BenchmarkConfig, revisions
from customized_grpo.config.decoding import to_raw
from customized_grpo.data.listed import PictureCache
from customized_grpo.errors import ConfigError, within
from customized_grpo.evaluation.items import BenchmarkSet, Item
from customized_grpo.evaluation.manifest import MANIFEST, write_manifest
from customized_grpo.files import write_atomic
from customized_grpo.generators.base import Generator
from customized_grpo.generators.lora_files import lora_file
from customized_grpo.pictures import png
from customized_grpo.runs.ranks import Ranks
from customized_grpo.training.build import load_trained
from customized_grpo.training.policy import Policy
from customized_grpo.training.sampling import sample_images
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
    files = [_file(wanted, item) for item in wanted.items]
    batches = _batches(wanted, config.sampling.batch_size)
    mine = [
        batch
        for batch in batches[ranks.rank :: ranks.world_size]
        if not all((folder / files[row]).exists() for row in batch)
    ]
    policy = _load(config, device) if mine else None
    _keep_recipe(config, wanted, folder, ranks)  # which names what was downloaded just now
    cache = PictureCache()
    for batch in mine:
        assert policy is not None
        items = [wanted.items[row] for row in batch]
        examples = [wanted.example(item, cache) for item in items]
        images = _sample(policy, examples, [i.noise_seed(config.sampling.seed) for i in items])
        for row, image in zip(batch, images, strict=True):
            file = folder / files[row]
            if not file.exists():
                file.parent.mkdir(parents=True, exist_ok=True)
                write_atomic(file, png(image))
    ranks.barrier()
    if ranks.is_first:
        write_atomic(folder / MANIFEST, write_manifest(wanted.items, files))
    ranks.barrier()


def _file(wanted: BenchmarkSet, item: Item) -> str:
    """Path of a picture, made of numbers, because names of photos may be paths."""
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
    assert config.generator is not None
    recipe = {
        "set": wanted.digest,
        "generator": to_raw(config.generator),
        "checkpoints": revisions(config.generator),
        "lora": config.lora and path_revision(config.lora),
        "sampling": to_raw(config.sampling),
    }
    text = json.dumps(recipe, sort_keys=True) + "\n"
    file = folder / _RECIPE
    if ranks.is_first and not file.exists():
        folder.mkdir(parents=True, exist_ok=True)
        write_atomic(file, text)
    ranks.barrier()
    kept = file.read_text(encoding="utf-8")
    with suppress(ValueError, TypeError, KeyError):  # damaged: it is another recipe
        # The commit of a checkpoint that is not on this machine is unknown: nothing is sampled by
        # it here, so the pictures are those of the commit that they were sampled by.
        recipe["checkpoints"] = json.loads(kept)["checkpoints"] | recipe["checkpoints"]
    if kept != json.dumps(recipe, sort_keys=True) + "\n":
        raise ConfigError(
            f"name: {folder} must hold pictures of this benchmark, generator, lora and sampling, "
            "got those of another recipe; choose another name, or delete the folder"
        )


def _load(config: BenchmarkConfig, device: torch.device) -> Policy:
    """The generator with its weights, and how it samples."""
    assert config.generator is not None
    sampling = config.sampling
    with within("generator"):
        built: Generator = config.generator.build(device)
    if config.lora is not None:
        weights = Path(config.lora).expanduser()
        if not (weights / "transformer").is_dir():
            weights = lora_file(weights, "lora: ")
        load_trained(built, weights, sampling.mixed_precision)
    return Policy(
        generator=built,
        sigmas=built.sigmas(sampling.num_steps, sampling.shift).to(device),
        dynamics="flow",
        noise_level=0.0,
        autocast=sampling.mixed_precision == "bf16",
    )


@torch.no_grad()
def _sample(policy: Policy, examples: Sequence[Example], seeds: Sequence[int]) -> Tensor:
    """Images ``[B, 3, H, W]``, each from the noise of its own seed."""
    generator = policy.generator
    for example in examples:
        generator.check(example)
    noise = [generator.noise(1, torch.Generator().manual_seed(seed)) for seed in seeds]
    conditioning = generator.encode(examples)
    return sample_images(
        policy, conditioning, torch.cat(noise).to(policy.sigmas.device), len(examples)
    )
