"""The configuration of a benchmark: which prompts, whose pictures, measured by what."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Annotated, Literal

from pydantic import Field, PositiveFloat

from customized_grpo.config.checks import groupwise_conflicts
from customized_grpo.config.limits import Count, FilePath, NumSteps, Seed
from customized_grpo.config.names import ANCHORS
from customized_grpo.config.plugs import GeneratorPlug, RewardPlug
from customized_grpo.config.sections import FileName


@dataclass(frozen=True, slots=True, kw_only=True)
class DreamBenchSet:
    """DreamBench from its official folder: 30 subjects, 25 prompts each."""

    type: Literal["dreambench"] = "dreambench"
    """The photos and prompts of DreamBooth (arXiv:2208.12242)."""

    path: FilePath
    """The folder `dataset` of github.com/google/dreambooth."""

    reference: Literal["first", "all", "uno"] | dict[str, str] = "first"
    """Photo a picture is conditioned on: each subject's first by name, every one in turn, the one
    that UNO and Customized-GRPO were evaluated with, or by subject, such as {backpack: 02.jpg};
    subjects that are not named keep their first."""


@dataclass(frozen=True, slots=True, kw_only=True)
class EmojiSet:
    """Held-out examples of the embedded emoji world, with further views of their subjects."""

    type: Literal["emoji"] = "emoji"
    """The embedded world (extra `emoji`)."""

    num_examples: Annotated[Count, Field(ge=2)] = 128
    """Examples, the same ones for everyone."""


@dataclass(frozen=True, slots=True, kw_only=True)
class JsonlSet:
    """Your own prompts and photos: a JSONL file, one prompt a line."""

    type: Literal["jsonl"] = "jsonl"
    """See docs/evaluation.md for its keys."""

    path: FilePath
    """The file; paths in it start from its folder."""

    root: FilePath | None = None
    """Folder that the paths start from and must not leave; null = the folder of the file."""


SetConfig = Annotated[DreamBenchSet | EmojiSet | JsonlSet, Field(discriminator="type")]


@dataclass(frozen=True, slots=True, kw_only=True)
class SamplingConfig:
    """How the generator samples: deterministic Euler steps."""

    num_steps: NumSteps = 25
    """Denoising steps."""

    shift: PositiveFloat | None = None
    """Time shift of the noise schedule; null = the generator's own schedule."""

    mixed_precision: Literal["no", "bf16"] = "no"
    """bf16 = autocast of the transformer and the decoder."""

    batch_size: Count = 4
    """Images sampled together."""

    seed: Seed = 0
    """Each image's noise follows from this, its subject, prompt and index, and nothing else."""


@dataclass(frozen=True, slots=True, kw_only=True)
class BenchmarkConfig:
    """An evaluation of one model, or of anyone's pictures."""

    name: FileName
    """Folder of the evaluation under output_dir, and its name in tables."""

    output_dir: FilePath = "evaluations"
    """Folder that holds the evaluations."""

    device: Literal["auto", "cpu", "cuda"] = "auto"
    """Where to compute; auto = cuda where there is one."""

    benchmark: SetConfig
    """Subjects, photos and prompts: dreambench, emoji or jsonl."""

    num_images: Count = 1
    """Pictures per prompt; two or more have a diversity."""

    images: FilePath | None = None
    """Folder of pictures with a manifest.jsonl, from any model; null = the generator makes them."""

    generator: GeneratorPlug | None = None
    """The generator to sample, as in a run's config; null = the pictures are in `images`."""

    lora: str | None = None
    """Trained weights: a folder such as runs/mine/weights, or anyone's LoRA as lora.path of a run
    takes it; null = the generator as it is."""

    sampling: SamplingConfig = field(default_factory=SamplingConfig)
    """How the generator samples."""

    metrics: Annotated[tuple[RewardPlug, ...], Field(min_length=1)]
    """The models that measure, as a run's evaluators; joint rates take each objective's first."""

    baseline: FilePath | None = None
    """Folder of a finished evaluation of the same benchmark by the same metrics, to compare with
    picture by picture; null = none."""

    allow_partial: bool = False
    """Score what is there where pictures are missing; the result is marked as partial."""

    batch_size: Count = 32
    """Images measured together, and so lost by an interruption."""

    cache: FilePath | None = None
    """Folder of features by content, to share between evaluations; null = one of its own."""


def benchmark_conflicts(config: BenchmarkConfig) -> Iterator[str]:
    """Yields a line for every pair of fields that cannot go together."""
    if (config.images is None) == (config.generator is None):
        got = "both" if config.images else "neither"
        yield f"images must be given, or else generator, got {got}; keep one"
    if config.lora is not None and config.generator is None:
        yield f"lora must be null without a generator, got {config.lora!r}; name its generator"
    if config.sampling != SamplingConfig() and config.generator is None:
        yield "sampling must be left out without a generator; the pictures are there already"
    if config.name in ANCHORS:
        yield (
            f"name must not be {config.name!r}, which is an anchor of the tables: one would take "
            "the other's place; choose another"
        )
    yield from groupwise_conflicts("metrics", config.metrics)
    labels = [metric.label for metric in config.metrics]
    for i, label in enumerate(labels):
        if label in labels[:i]:
            yield f"metrics.{i}.name must be unique, got {label!r} twice; name one of them"
        if "/" in label:
            yield f"metrics.{i}.name must be without '/', which its columns have, got {label!r}"
