"""Makes the embedded AutoencoderTiny (64 px, factor 8) for the emoji world.

python scripts/train_vae.py --out build/vae

The encoder is not trained: it is a principal component analysis of 8 x 8 patches, which TAESD's
convolutions without blocks can hold exactly (three of stride 2 put a patch into the channels, the
third turns it to its components). So a latent depends on its own patch alone, and a subject that
moves by whole patches has the same latents wherever it stands: a transformer learns to copy it from
the reference. Components are scaled half-way to equal variance, so that a generator's loss counts
details too. The decoder (convolutions and ReLU, as TAEF1's) is trained: it sees the neighbours, and
is several dB better than the linear inverse.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path

import torch
import torch.nn.functional as F
from _training import Run, batches, to_bytes
from diffusers import AutoencoderTiny
from torch import Tensor

from customized_grpo.data.emoji.world import SIZE, EmojiWorld

WIDTH = 64
SUBJECT_WEIGHT = 4.0  # of the subject's pixels beyond that of others
WHITENING = 0.5  # 0: components keep their variance, 1: all have the same
LATENT_NOISE = 0.05  # the decoder learns to forgive what a generator gets slightly wrong


def build_vae(channels: int) -> AutoencoderTiny:
    return AutoencoderTiny(
        encoder_block_out_channels=(WIDTH,) * 4,
        decoder_block_out_channels=(WIDTH,) * 4,
        num_encoder_blocks=(0, 0, 0, 0),
        num_decoder_blocks=(3, 3, 2, 0),  # none at full resolution, where they cost most
        latent_channels=channels,
        scaling_factor=1.0,
        shift_factor=0.0,
    )


def space_to_depth(images: Tensor) -> Tensor:
    """``[B, C, H, W]`` -> ``[B, 4 C, H / 2, W / 2]``; channel = (row, column, C) of a 2 x 2."""
    b, c, h, w = images.shape
    cells = images.view(b, c, h // 2, 2, w // 2, 2).permute(0, 3, 5, 1, 2, 4)
    return cells.reshape(b, 4 * c, h // 2, w // 2)


def patch_components(channels: int, size: int, seed: int) -> tuple[Tensor, Tensor]:
    """Mean ``[192]`` of 8 x 8 patches and their scaled components ``[192, channels]``."""
    batch = EmojiWorld("train").sample(size, torch.Generator().manual_seed(seed))
    patches = torch.cat([batch.targets, batch.references])
    for _ in range(3):
        patches = space_to_depth(patches)
    patches = patches.permute(0, 2, 3, 1).reshape(-1, patches.shape[1])
    masks = torch.cat([batch.target_masks, batch.reference_masks])
    weight = 1 + SUBJECT_WEIGHT * F.avg_pool2d(masks, 8).flatten()
    mean = (weight[:, None] * patches).sum(0) / weight.sum()
    centered = patches - mean
    covariance = (centered * weight[:, None]).T @ centered / weight.sum()
    variances, vectors = torch.linalg.eigh(covariance.double())
    variances, vectors = variances.flip(0)[:channels].float(), vectors.flip(1)[:, :channels].float()
    scale = variances.pow(-WHITENING / 2)
    return mean, vectors * (scale / (variances * scale.square()).mean().sqrt())


@torch.no_grad()
def set_encoder(vae: AutoencoderTiny, mean: Tensor, components: Tensor) -> None:
    """Writes the linear map into the encoder's convolutions, and freezes it."""
    first, *halving, last = vae.encoder.layers
    for layer in vae.encoder.layers:
        layer.requires_grad_(False)
        layer.weight.zero_()
    first.bias.zero_()
    for channel in range(3):
        first.weight[channel, channel, 1, 1] = 1
    for layer, count in zip(halving[:2], (3, 12), strict=True):
        for row in range(2):  # the 3 x 3 around pixel (2 i, 2 j) has the cell at (1, 1) to (2, 2)
            for column in range(2):
                for channel in range(count):
                    out = (2 * row + column) * count + channel
                    layer.weight[out, channel, 1 + row, 1 + column] = 1
    cells = components.T.reshape(-1, 2, 2, 48).permute(0, 3, 1, 2)
    halving[2].weight[: len(cells), :48, 1:, 1:] = cells
    for channel in range(len(cells)):
        last.weight[channel, channel, 1, 1] = 1
    last.bias.copy_(-(mean @ components))


class Pictures:
    """Pictures uint8 ``[B, 3, 64, 64]`` and masks of their subjects ``[B, 1, 64, 64]``."""

    def __init__(self, size: int) -> None:
        self._world, self._size = EmojiWorld("train"), size

    def batch(self, rng: torch.Generator) -> tuple[Tensor, Tensor]:
        batch = self._world.sample(self._size // 2, rng)
        images = torch.cat([batch.targets, batch.references])
        masks = torch.cat([batch.target_masks, batch.reference_masks])
        return to_bytes(images), to_bytes(masks)


def decoder_loss(
    vae: AutoencoderTiny, images: Tensor, masks: Tensor, rng: torch.Generator
) -> tuple[Tensor, Tensor]:
    """Mean |error| + 2 error^2 of the pixels, those of the subject weigh more; mean square."""
    device = rng.device
    images = images.to(device).float() / 127.5 - 1
    images = images.to(memory_format=torch.channels_last)
    with torch.no_grad():
        latents = vae.encode(images).latents
    noise = torch.randn(latents.shape, generator=rng, device=device)
    with torch.autocast(device.type, torch.bfloat16, enabled=device.type == "cuda"):
        decoded = vae.decode(latents + LATENT_NOISE * noise).sample
    error = decoded.float() - images
    weight = 1 + SUBJECT_WEIGHT / 255 * masks.to(device)
    distance = error.abs() + 2 * error.square()
    return (weight * distance).mean() / weight.mean(), error.square().mean()


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
    parser.add_argument("--steps", type=int, default=6_000)
    parser.add_argument("--batch", type=int, default=16)
    parser.add_argument("--patches", type=int, default=6_000, help="pictures for the encoder")
    parser.add_argument("--lr", type=float, default=2e-3)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--device", default="cpu", choices=("cpu", "cuda"))
    parser.add_argument("--workers", type=int, default=0, help="processes that render")
    args = parser.parse_args()
    torch.manual_seed(args.seed)
    vae = build_vae(args.channels)
    set_encoder(vae, *patch_components(args.channels, args.patches, args.seed + 1))
    vae.register_to_config(sample_size=SIZE)
    vae.save_pretrained(args.out / "vae")  # its encoder is final: a generator may be trained now
    vae.to(args.device)
    run = Run(args.out, vae.decoder, peak_lr=args.lr, num_steps=args.steps)
    pictures = Pictures(args.batch)
    for images, masks in batches(pictures.batch, run.left, seed=args.seed, workers=args.workers):
        loss, mse = decoder_loss(vae, images, masks, run.rng(args.seed + 1, args.device))
        run.update(loss, psnr=(-10 * (mse / 4).log10()).item())
    vae.decoder.load_state_dict(run.ema.shadow)
    vae.to("cpu").save_pretrained(args.out / "vae")
    print(json.dumps(psnr(vae, args.seed)))


if __name__ == "__main__":
    main()
