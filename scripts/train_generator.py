"""Trains the embedded FLUX.1 Kontext checkpoint on the emoji world by flow matching.

python scripts/train_generator.py --vae build/vae/vae --out build/generator

Renders a pool of (reference, prompt, target) triples, encodes it once, then trains a tiny
``FluxTransformer2DModel`` together with its two text encoders. Resumable: the same command goes on
where it stopped. The result is a stock ``FluxKontextPipeline`` folder with bfloat16 weights.
"""

from __future__ import annotations

import argparse
import math
from dataclasses import dataclass, fields
from pathlib import Path

import torch
import torch.nn.functional as F
from _tokenizers import MAX_TOKENS, clip_tokenizer, t5_tokenizer
from _training import Run
from diffusers import (
    AutoencoderTiny,
    FlowMatchEulerDiscreteScheduler,
    FluxKontextPipeline,
    FluxTransformer2DModel,
)
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from transformers import CLIPTextConfig, CLIPTextModel, CLIPTokenizer, T5Config, T5EncoderModel

from customized_grpo.data.emoji.world import EmojiWorld

TEXT_WIDTH = 128
SHIFT = 2.0  # of the sampling schedule; written into the scheduler's config


class Denoiser(nn.Module):
    """Transformer and text encoders, trained together."""

    def __init__(self, clip: CLIPTokenizer, num_t5_tokens: int, token_channels: int) -> None:
        super().__init__()
        eos = clip.eos_token_id
        self.text_encoder = CLIPTextModel(
            CLIPTextConfig(
                vocab_size=len(clip),
                hidden_size=TEXT_WIDTH,
                intermediate_size=2 * TEXT_WIDTH,
                num_hidden_layers=1,
                num_attention_heads=2,
                projection_dim=TEXT_WIDTH,
                max_position_embeddings=MAX_TOKENS + 2,
                bos_token_id=eos - 1,
                eos_token_id=eos,
                pad_token_id=clip.pad_token_id,
            )
        )
        self.text_encoder_2 = T5EncoderModel(
            T5Config(
                vocab_size=num_t5_tokens,
                d_model=TEXT_WIDTH,
                d_kv=64,
                d_ff=2 * TEXT_WIDTH,
                num_layers=2,
                num_heads=2,
                feed_forward_proj="gated-gelu",
                is_encoder_decoder=False,
                use_cache=False,
                dropout_rate=0.0,
            )
        )
        self.transformer = FluxTransformer2DModel(
            patch_size=1,
            in_channels=token_channels,
            num_layers=1,
            num_single_layers=4,
            attention_head_dim=64,
            num_attention_heads=4,
            joint_attention_dim=TEXT_WIDTH,
            pooled_projection_dim=TEXT_WIDTH,
            guidance_embeds=False,
            axes_dims_rope=(16, 24, 24),
        )
        _start_as_identity(self.transformer)

    def forward(self, latents: Tensor, sigma: Tensor, reference: Tensor, clip: Tensor, t5: Tensor):
        pooled = self.text_encoder(clip).pooler_output
        text = self.text_encoder_2(t5).last_hidden_state
        target_ids = FluxKontextPipeline._prepare_latent_image_ids(1, 4, 4, "cpu", torch.float32)
        reference_ids = target_ids.clone()
        reference_ids[:, 0] = 1
        velocity = self.transformer(
            hidden_states=torch.cat([latents, reference], 1),
            timestep=sigma,
            pooled_projections=pooled,
            encoder_hidden_states=text,
            txt_ids=torch.zeros(text.shape[1], 3),
            img_ids=torch.cat([target_ids, reference_ids]),
            return_dict=False,
        )[0]
        return velocity[:, : latents.shape[1]]


def _start_as_identity(transformer: FluxTransformer2DModel) -> None:
    """adaLN-zero: modulation weights 0, gates small, output 0; diffusers leaves that to us."""
    for name, module in transformer.named_modules():
        if isinstance(module, nn.Linear) and ".norm" in f".{name}" and name.endswith("linear"):
            nn.init.zeros_(module.weight)
            nn.init.zeros_(module.bias)
            chunks = module.bias.data.view(-1, transformer.inner_dim)
            for gate in {6: (2, 5), 3: (2,), 2: ()}[len(chunks)]:
                chunks[gate] = 0.3
    nn.init.zeros_(transformer.proj_out.weight)
    nn.init.zeros_(transformer.proj_out.bias)


def pack(latents: Tensor) -> Tensor:
    """``[B, C, 8, 8]`` -> ``[B, 16, 4 C]``, as the pipeline packs."""
    batch, channels, height, width = latents.shape
    return FluxKontextPipeline._pack_latents(latents, batch, channels, height, width)


@dataclass(frozen=True, kw_only=True, slots=True)
class Pool:
    """Encoded triples: latents ``[N, 16, 4 C]`` bfloat16, token ids ``[N, length]``.

    ``subject`` ``[N, 16]`` is the share of each token that the subject covers in the target.
    """

    targets: Tensor
    references: Tensor
    subject: Tensor
    clip: Tensor
    t5: Tensor


@torch.no_grad()
def make_pool(vae: AutoencoderTiny, size: int, seed: int, tokenizers) -> Pool:
    world, generator = EmojiWorld("train"), torch.Generator().manual_seed(seed)
    encoder = vae.to(memory_format=torch.channels_last)  # pyright: ignore
    columns: dict[str, list[Tensor]] = {f.name: [] for f in fields(Pool)}
    for start in range(0, size, 512):
        batch = world.sample(min(512, size - start), generator)
        columns["subject"].append(F.avg_pool2d(batch.target_masks, 16).flatten(1))
        for name, images in (("targets", batch.targets), ("references", batch.references)):
            pixels = (images * 2 - 1).to(memory_format=torch.channels_last)
            with torch.autocast("cpu", torch.bfloat16):
                latents = encoder.encode(pixels).latents
            columns[name].append(pack(normalise(vae, latents.float())).bfloat16())
        for name, tokenizer, length in zip(
            ("clip", "t5"), tokenizers, (MAX_TOKENS + 2, MAX_TOKENS), strict=True
        ):
            tokens = tokenizer(
                batch.prompts,
                padding="max_length",
                max_length=length,
                truncation=True,
                return_tensors="pt",
            )
            columns[name].append(tokens.input_ids)
    return Pool(**{name: torch.cat(parts) for name, parts in columns.items()})


def load_pool(folder: Path, vae: AutoencoderTiny, size: int, seed: int, tokenizers) -> Pool:
    """The pool of an interrupted run, or a new one."""
    file = folder / "pool.safetensors"
    if file.exists():
        return Pool(**load_file(file))
    pool = make_pool(vae, size, seed, tokenizers)
    save_file({f.name: getattr(pool, f.name) for f in fields(pool)}, file)
    return pool


def normalise(vae: AutoencoderTiny, latents: Tensor) -> Tensor:
    return (latents - vae.config.shift_factor) * vae.config.scaling_factor


def flow_matching_loss(denoiser: Denoiser, pool: Pool, batch: int, generator: torch.Generator):
    """Squared velocity error at logit-normal noise levels (SD3, arXiv:2403.03206).

    Tokens of the subject weigh up to five times as much: backgrounds are quickly learnt and their
    random details never, while copying the subject from the reference takes long.
    """
    rows = torch.randint(len(pool.targets), (batch,), generator=generator)
    clean, reference = pool.targets[rows].float(), pool.references[rows].float()
    sigma = torch.sigmoid(torch.randn(batch, generator=generator) + 0.3)
    noise = torch.randn(clean.shape, generator=generator)
    noisy = torch.lerp(clean, noise, sigma.view(-1, 1, 1))
    with torch.autocast("cpu", torch.bfloat16):
        velocity = denoiser(noisy, sigma, reference, pool.clip[rows], pool.t5[rows])
    weight = 1 + 4 * pool.subject[rows].unsqueeze(-1)
    error = (velocity.float() - (noise - clean)).square()
    return (weight * error).mean() / weight.mean()


def save_pipeline(denoiser: Denoiser, vae: AutoencoderTiny, tokenizers, folder: Path) -> None:
    mu = math.log(SHIFT)
    scheduler = FlowMatchEulerDiscreteScheduler(
        shift=SHIFT, use_dynamic_shifting=True, base_shift=mu, max_shift=mu
    )
    pipeline = FluxKontextPipeline(
        scheduler=scheduler,
        vae=vae,
        text_encoder=denoiser.text_encoder,
        tokenizer=tokenizers[0],
        text_encoder_2=denoiser.text_encoder_2,
        tokenizer_2=tokenizers[1],
        transformer=denoiser.transformer,
    )
    pipeline.to(dtype=torch.bfloat16).save_pretrained(folder)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--vae", type=Path, required=True)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--steps", type=int, default=8500)
    parser.add_argument("--pool", type=int, default=64_000)
    parser.add_argument("--batch", type=int, default=64)
    parser.add_argument("--lr", type=float, default=1.5e-3)
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()
    torch.manual_seed(args.seed)
    tokenizers = (clip_tokenizer(), t5_tokenizer())
    vae = AutoencoderTiny.from_pretrained(args.vae)
    denoiser = Denoiser(tokenizers[0], len(tokenizers[1]), 4 * vae.config.latent_channels)
    denoiser.transformer.set_attention_backend("_native_math")
    run = Run(args.out, denoiser, peak_lr=args.lr, num_steps=args.steps)
    pool = load_pool(args.out, vae, args.pool, args.seed, tokenizers)
    while run.step < args.steps:
        run.update(flow_matching_loss(denoiser, pool, args.batch, run.generator(args.seed)))
    denoiser.load_state_dict(run.ema.shadow)
    save_pipeline(denoiser, vae, tokenizers, args.out / "pipeline")


if __name__ == "__main__":
    main()
