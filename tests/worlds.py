"""Small benchmarks on disk: photos, prompts, and folders of pictures with a manifest."""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from PIL import Image
from torch import Tensor

from customized_grpo.config import BenchmarkConfig
from customized_grpo.config.decoding import decode
from customized_grpo.evaluation.items import BenchmarkSet, Item
from customized_grpo.evaluation.manifest import MANIFEST, write_manifest

SUBJECTS = {"rex": ("dog", "live", 3), "mug": ("cup", "object", 2), "bob": ("dog", "live", 1)}
PROMPTS = {"context": "a {} on the beach", "property": "a red {}", "accessory": "a {} with a hat"}


def smooth(seed: int, height: int = 40, width: int = 48) -> Tensor:
    """A picture with a colour of its own and some shapes ``[3, H, W]``."""
    random = torch.Generator().manual_seed(seed)
    coarse = torch.rand(1, 3, 4, 4, generator=random)
    return torch.nn.functional.interpolate(coarse, (height, width), mode="bilinear")[0]


def write_png(path: Path, image: Tensor) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    pixels = (image.clamp(0, 1) * 255).round().byte().permute(1, 2, 0).numpy()
    Image.fromarray(pixels).save(path)


def write_jsonl(folder: Path) -> Path:
    """Three subjects with three, two and one photos, three prompts each."""
    rows = []
    for number, (name, (words, kind, count)) in enumerate(SUBJECTS.items()):
        photos = [f"{name}/{i}.png" for i in range(count)]
        for i, photo in enumerate(photos):
            own = smooth(number) * 0.8 + 0.2 * smooth(10 * number + i + 1)
            write_png(folder / photo, own)
        shared = {"subject": name, "class": words, "kind": kind, "photos": photos}
        for category, prompt in PROMPTS.items():
            own = {"prompt": prompt.format(words), "category": category, "references": photos[:1]}
            rows.append(shared | own)
    file = folder / "prompts.jsonl"
    file.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return file


def write_outputs(folder: Path, wanted: BenchmarkSet, image: Callable[[Item], Tensor]) -> Path:
    """A picture for every item, and the manifest."""
    files = [f"pictures/{number:04d}.png" for number in range(len(wanted.items))]
    for item, file in zip(wanted.items, files, strict=True):
        write_png(folder / file, image(item))
    (folder / MANIFEST).write_text(write_manifest(wanted.items, files))
    return folder


def config_of(folder: Path, metrics: Sequence[dict[str, Any]], **fields: Any) -> BenchmarkConfig:
    """A checked config; ``benchmark`` is the JSONL file in ``folder`` unless it is given."""
    raw = {
        "name": "test",
        "output_dir": str(folder / "evaluations"),
        "device": "cpu",
        "benchmark": {"type": "jsonl", "path": str(folder / "prompts.jsonl")},
        "images": str(folder / "outputs"),
        "metrics": list(metrics),
        "batch_size": 4,
    }
    return decode(raw | fields, "test", BenchmarkConfig)
