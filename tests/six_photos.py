"""Photos of a subject that a newcomer may have, and a small budget for the run about it."""

from __future__ import annotations

from pathlib import Path

import torch
from PIL import Image

from customized_grpo.data.emoji.world import EmojiWorld, sample_attributes
from customized_grpo.pictures import to_pil

SMALL = [
    "--rollout.prompts_per_rollout", "2",
    "--rollout.group_size", "3",
    "--rollout.num_steps", "3",
    "--rollout.num_trained_steps", "1",
    "--train.num_updates", "2",
    "--evaluation.num_examples", "4",
    "--evaluation.num_validation", "2",
]  # fmt: skip


def take_photos(folder: Path, count: int) -> None:
    """A drawn dog in painted places, at four times their size."""
    world = EmojiWorld("train")
    dog = next(i for i, subject in enumerate(world.subjects) if subject.name == "dog")
    random = torch.Generator().manual_seed(0)
    wanted = sample_attributes(count, random)
    pictures, _ = world.render(torch.full((count,), dog), wanted, random)
    folder.mkdir()
    for name, pixels in zip(("front", "garden", "sofa", "x", "y", "z"), pictures, strict=False):
        picture = to_pil(pixels).resize((256, 256), Image.Resampling.BICUBIC)
        picture.save(folder / f"{name}.png")
