"""Trains the embedded attribute classifier: which scene, placement, prop, colour and accessory?

python scripts/train_classifier.py --out build/evaluator-attributes

A ``ResNetForImageClassification`` whose labels are 'attribute/value'; the logits of one attribute
are a softmax of their own. No reward is made from it: it tells whether what a prompt asks for is
in the picture, whatever the reward models say. Blur, noise and colour shifts make it forgive what
a small generator gets slightly wrong.
"""

from __future__ import annotations

import argparse
import json
from dataclasses import fields
from pathlib import Path

import torch
import torch.nn.functional as F
from _training import Run
from torch import Tensor
from transformers import CLIPImageProcessorPil as ImageProcessor
from transformers import ResNetConfig, ResNetForImageClassification

from customized_grpo.data.emoji.world import SIZE, Attributes, EmojiWorld, attribute_values

ATTRIBUTES = tuple(field.name for field in fields(Attributes))


def labels() -> list[str]:
    """'attribute/value' in the order of the logits."""
    return [f"{name}/{value}" for name in ATTRIBUTES for value in attribute_values(name)]


def build_classifier() -> ResNetForImageClassification:
    names = labels()
    config = ResNetConfig(
        embedding_size=32,
        hidden_sizes=[48, 96, 160, 224],
        depths=[1, 2, 2, 1],
        layer_type="basic",
        num_labels=len(names),
        id2label=dict(enumerate(names)),
        label2id={name: i for i, name in enumerate(names)},
    )
    return ResNetForImageClassification(config)


def augment(images: Tensor, generator: torch.Generator) -> Tensor:
    """Blur, brightness, colour and noise, differently strong for every image."""

    def uniform(*shape: int) -> Tensor:
        return torch.rand(len(images), *shape, generator=generator) * 2 - 1

    small = F.interpolate(images, scale_factor=0.5, mode="area")
    blurred = F.interpolate(small, size=images.shape[-2:], mode="bilinear", align_corners=False)
    out = torch.lerp(images, blurred, uniform(1, 1, 1).abs())
    out = out * (1 + 0.15 * uniform(1, 1, 1)) + 0.05 * uniform(3, 1, 1)
    noise = torch.randn(out.shape, generator=generator) * uniform(1, 1, 1).abs()
    return (out + 0.06 * noise).clamp(0, 1)


def classifier_loss(
    model: ResNetForImageClassification, images: Tensor, attributes: Attributes
) -> tuple[Tensor, dict[str, float]]:
    """Sum of the attributes' cross-entropies, and the accuracy of each."""
    pixels = (images * 2 - 1).to(memory_format=torch.channels_last)
    with torch.autocast("cpu", torch.bfloat16):
        logits = model(pixels).logits
    parts = logits.float().split([len(attribute_values(name)) for name in ATTRIBUTES], 1)
    wanted = [getattr(attributes, name) for name in ATTRIBUTES]
    loss = sum(F.cross_entropy(p, w) for p, w in zip(parts, wanted, strict=True))
    accuracy = {
        name: (part.argmax(1) == want).float().mean().item()
        for name, part, want in zip(ATTRIBUTES, parts, wanted, strict=True)
    }
    return loss, accuracy  # pyright: ignore


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--steps", type=int, default=800)
    parser.add_argument("--batch", type=int, default=128)
    parser.add_argument("--lr", type=float, default=2e-3)
    parser.add_argument("--seed", type=int, default=5)
    args = parser.parse_args()
    torch.manual_seed(args.seed)
    model = build_classifier()
    run = Run(args.out, model, peak_lr=args.lr, num_steps=args.steps)
    world = EmojiWorld("train")
    model.train()
    while run.step < args.steps:
        generator = run.rng(args.seed)
        batch = world.sample(args.batch, generator)
        loss, accuracy = classifier_loss(model, augment(batch.targets, generator), batch.attributes)
        run.update(loss, **accuracy)
    model.load_state_dict(run.ema.shadow)
    model.eval()
    held_out = EmojiWorld("held_out").sample(1024, torch.Generator().manual_seed(args.seed))
    with torch.no_grad():
        print(json.dumps(classifier_loss(model, held_out.targets, held_out.attributes)[1]))
    model.to(torch.bfloat16).save_pretrained(args.out / "model")  # pyright: ignore
    size, half = {"height": SIZE, "width": SIZE}, [0.5] * 3
    ImageProcessor(
        size={"shortest_edge": SIZE}, crop_size=size, image_mean=half, image_std=half
    ).save_pretrained(args.out / "model")


if __name__ == "__main__":
    main()
