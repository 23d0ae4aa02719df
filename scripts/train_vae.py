"""Trains the embedded AutoencoderKL (64 px, factor 8, 32 channels) on the emoji world.

python scripts/train_vae.py --steps 4500 --out build/vae-first         # 21 minutes on one core
python scripts/train_vae.py --steps 5000 --decoder-of build/vae-first/vae --out build/vae

The second command keeps the encoder, and so the latents, and trains the decoder alone: a generator
trained on these latents stays valid.
"""

from __future__ import annotations

import argparse
from pathlib import Path

import torch
from _training import Run
from diffusers import AutoencoderKL

from customized_grpo.data.emoji import EmojiWorld


def build_vae() -> AutoencoderKL:
    return AutoencoderKL(
        in_channels=3,
        out_channels=3,
        down_block_types=("DownEncoderBlock2D",) * 4,
        up_block_types=("UpDecoderBlock2D",) * 4,
        block_out_channels=(16, 32, 64, 128),
        layers_per_block=1,
        latent_channels=32,
        norm_num_groups=8,
        sample_size=64,
        use_quant_conv=False,
        use_post_quant_conv=False,
        shift_factor=0.0,
        scaling_factor=1.0,
    )


def vae_loss(vae: AutoencoderKL, images: torch.Tensor, generator: torch.Generator):
    """Mean |error| of pixels and of their differences; a small KL keeps the latents smooth."""
    with torch.autocast("cpu", torch.bfloat16):
        posterior = vae.encode(images).latent_dist
        mean, logvar = posterior.mean.float(), posterior.logvar.float()
        noise = torch.randn(mean.shape, generator=generator)
        decoded = vae.decode(mean + noise * (0.5 * logvar).exp()).sample.float()
    error = decoded - images
    edges = error.diff(dim=-1).abs().mean() + error.diff(dim=-2).abs().mean()
    kl = 0.5 * (mean.square() + logvar.exp() - 1 - logvar).mean()
    return error.abs().mean() + 0.5 * edges + 5e-4 * kl, error.square().mean()


@torch.no_grad()
def measure_latents(vae: AutoencoderKL, world: EmojiWorld, seed: int) -> None:
    """Writes mean and 1 / standard deviation of the latents into the config."""
    sample = world.sample(512, torch.Generator().manual_seed(seed)).targets * 2 - 1
    latents = vae.encode(sample).latent_dist.mode()
    vae.register_to_config(
        shift_factor=round(latents.mean().item(), 5),
        scaling_factor=round(1 / latents.std().item(), 5),
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--decoder-of", type=Path, help="checkpoint whose encoder is kept")
    parser.add_argument("--steps", type=int, default=4500)
    parser.add_argument("--batch", type=int, default=12)
    parser.add_argument("--lr", type=float, default=1e-3)
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()
    torch.manual_seed(args.seed)
    vae = AutoencoderKL.from_pretrained(args.decoder_of) if args.decoder_of else build_vae()
    vae.encoder.requires_grad_(args.decoder_of is None)
    vae.to(memory_format=torch.channels_last)  # pyright: ignore
    run = Run(args.out, vae, peak_lr=args.lr, num_steps=args.steps)
    world = EmojiWorld("train")
    while run.step < args.steps:
        generator = run.generator(args.seed)
        batch = world.sample(args.batch // 2, generator)
        images = torch.cat([batch.targets, batch.references]) * 2 - 1
        loss, mse = vae_loss(vae, images.to(memory_format=torch.channels_last), generator)
        run.update(loss, psnr=(-10 * (mse / 4).log10()).item())
    vae.load_state_dict(run.ema.shadow)
    if not args.decoder_of:
        measure_latents(vae, world, args.seed)
    vae.save_pretrained(args.out / "vae")


if __name__ == "__main__":
    main()
