"""Trains the embedded AutoencoderTiny (64 px, factor 8) on the emoji world.

python scripts/train_vae.py --out build/vae

The architecture is TAESD's, which replaces FLUX's VAE as TAEF1: convolutions and ReLU, no group
normalisation and no attention. So a latent depends on its neighbourhood alone: a subject looks much
the same in front of any background, and a transformer can copy it from the reference.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path

import torch
from _training import Run
from diffusers import AutoencoderTiny
from torch import Tensor

from customized_grpo.data.emoji.world import SIZE, EmojiWorld

WIDTH = 64
LATENT_NOISE = 0.05  # the decoder learns to forgive what a generator gets slightly wrong


def build_vae(channels: int) -> AutoencoderTiny:
    return AutoencoderTiny(
        encoder_block_out_channels=(WIDTH,) * 4,
        decoder_block_out_channels=(WIDTH,) * 4,
        num_encoder_blocks=(0, 0, 1, 1),  # few at full resolution, where they cost most
        num_decoder_blocks=(3, 3, 1, 0),
        latent_channels=channels,
    )


def vae_loss(vae: AutoencoderTiny, images: Tensor, masks: Tensor, generator: torch.Generator):
    """Mean |error| of the pixels, those of the subject weigh five times as much; mean square."""
    with torch.autocast("cpu", torch.bfloat16):
        latents = vae.encode(images).latents
        noise = torch.randn(latents.shape, generator=generator)
        decoded = vae.decode(latents + LATENT_NOISE * noise).sample
    error = decoded.float() - images
    weight = 1 + 4 * masks
    return (weight * error.abs()).mean() / weight.mean(), error.square().mean()


@torch.no_grad()
def measure_latents(vae: AutoencoderTiny, world: EmojiWorld, seed: int) -> None:
    """Writes mean and 1 / std of the latents, and the size of the images, into the config."""
    sample = world.sample(512, torch.Generator().manual_seed(seed)).targets * 2 - 1
    latents = vae.encode(sample).latents
    vae.register_to_config(
        shift_factor=round(latents.mean().item(), 5),
        scaling_factor=round(1 / latents.std().item(), 5),
        sample_size=SIZE,
    )


@torch.no_grad()
def psnr(vae: AutoencoderTiny, seed: int) -> dict[str, float]:
    """Peak signal-to-noise ratio in dB on held-out subjects: of all pixels, of the subject's."""
    batch = EmojiWorld("held_out").sample(256, torch.Generator().manual_seed(seed))
    decoded = vae.decode(vae.encode(batch.targets * 2 - 1).latents).sample / 2 + 0.5
    error, mask = (decoded.clamp(0, 1) - batch.targets).square(), batch.target_masks
    subject = (error * mask).sum() / (3 * mask.sum())
    return {"psnr": -10 * error.mean().log10().item(), "subject": -10 * subject.log10().item()}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--channels", type=int, default=48)
    parser.add_argument("--steps", type=int, default=12_000)
    parser.add_argument("--batch", type=int, default=16)
    parser.add_argument("--lr", type=float, default=4e-3)
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()
    torch.manual_seed(args.seed)
    vae = build_vae(args.channels)
    run = Run(args.out, vae, peak_lr=args.lr, num_steps=args.steps)
    world = EmojiWorld("train")
    while run.step < args.steps:
        generator = run.generator(args.seed)
        batch = world.sample(args.batch // 2, generator)
        images = torch.cat([batch.targets, batch.references]) * 2 - 1
        masks = torch.cat([batch.target_masks, batch.reference_masks])
        images = images.to(memory_format=torch.channels_last)
        loss, mse = vae_loss(vae, images, masks, generator)
        run.update(loss, psnr=(-10 * (mse / 4).log10()).item())
    vae.load_state_dict(run.ema.shadow)
    measure_latents(vae, world, args.seed)
    vae.save_pretrained(args.out / "vae")
    print(json.dumps(psnr(vae, args.seed)))


if __name__ == "__main__":
    main()
