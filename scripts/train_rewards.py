"""Trains one embedded reward model: a CLIPModel (prompt) or a Dinov2Model (identity).

python scripts/train_rewards.py --kind clip --seed 1 --width 128 --out build/reward-clip
python scripts/train_rewards.py --kind dino --seed 2 --width 96 --out build/evaluator-dino

Both are contrastive (InfoNCE over the batch). CLIP pairs a picture with its sentence. DINO pairs
the same subject in two scenes or, three times in ten, two augmented crops of one picture: like a
self-supervised DINO it sees the background too, so that copying the reference is a temptation; and
like DINO's its pictures change their colours (``jitter_colors``) and its subjects theirs, so that
a subject in another colour is nearer to itself than another subject is.
Reward and evaluator differ in seed, width, patch statistics and strength of augmentation.
"""

from __future__ import annotations

import argparse
from dataclasses import dataclass, replace
from pathlib import Path

import torch
import torch.nn.functional as F
from _tokenizers import MAX_TOKENS, clip_tokenizer
from _training import Run
from torch import Tensor, nn
from transformers import CLIPConfig, CLIPModel, Dinov2Config, Dinov2Model

from customized_grpo.data.emoji.world import SIZE, EmojiWorld, attribute_values

IMAGE_MEAN, IMAGE_STD = 0.5, 0.5  # of both models, written into preprocessor_config.json


@dataclass(frozen=True, kw_only=True, slots=True)
class Pool:
    """uint8 pictures ``[N, 3, 64, 64]``, subject numbers ``[N]`` and token ids ``[N, length]``."""

    targets: Tensor
    references: Tensor
    subject: Tensor
    tokens: Tensor


def make_pool(size: int, seed: int, tokenizer, recolor: bool) -> Pool:
    """``recolor``: every target shows its subject in any of the colours; its sentence is wrong."""
    world, generator = EmojiWorld("train"), torch.Generator().manual_seed(seed)
    parts: dict[str, list[Tensor]] = {k: [] for k in ("targets", "references", "subject", "tokens")}
    for start in range(0, size, 512):
        batch = world.sample(min(512, size - start), generator)
        if recolor:
            color = torch.randint(
                len(attribute_values("color")), batch.subject.shape, generator=generator
            )
            attributes = replace(batch.attributes, color=color)
            batch = replace(batch, targets=world.render(batch.subject, attributes, generator)[0])
        parts["targets"].append((batch.targets * 255).round().byte())
        parts["references"].append((batch.references * 255).round().byte())
        parts["subject"].append(batch.subject)
        tokens = tokenizer(
            batch.prompts, padding="max_length", max_length=MAX_TOKENS + 2, return_tensors="pt"
        )
        parts["tokens"].append(tokens.input_ids)
    return Pool(**{name: torch.cat(tensors) for name, tensors in parts.items()})


def augment(images: Tensor, strength: float, generator: torch.Generator) -> Tensor:
    """Random crop, brightness, colour shift and noise; ``images`` [B, 3, H, W] in [0, 1]."""
    batch = len(images)

    def uniform(*shape: int) -> Tensor:
        return torch.rand(*shape, generator=generator) * 2 - 1

    scale = 1 - 0.35 * strength * uniform(batch).abs()
    theta = torch.zeros(batch, 2, 3)
    theta[:, 0, 0] = theta[:, 1, 1] = scale
    theta[:, :, 2] = uniform(batch, 2) * (1 - scale)[:, None]
    grid = F.affine_grid(theta, list(images.shape), align_corners=False)
    out = F.grid_sample(images, grid, align_corners=False, padding_mode="reflection")
    out = out * (1 + 0.2 * strength * uniform(batch, 1, 1, 1))
    out = out + 0.1 * strength * uniform(batch, 3, 1, 1)
    noise = torch.randn(out.shape, generator=generator) * uniform(batch, 1, 1, 1).abs()
    return (out + 0.06 * strength * noise).clamp(0, 1)


_TO_YIQ = torch.tensor([[0.299, 0.587, 0.114], [0.596, -0.274, -0.322], [0.211, -0.523, 0.312]])


def jitter_colors(images: Tensor, generator: torch.Generator) -> Tensor:
    """DINO's colour augmentation (arXiv:2304.07193): hues of four in five ``images`` are turned, by
    at most a quarter, and one in five is grey."""
    batch = len(images)
    turn, often, grey = torch.rand(3, batch, generator=generator)
    angle = (turn - 0.5) * torch.pi * (often < 0.8)
    chroma = (grey >= 0.2).float()
    rotation = torch.zeros(batch, 3, 3)
    rotation[:, 0, 0] = 1
    rotation[:, 1, 1] = rotation[:, 2, 2] = chroma * angle.cos()
    rotation[:, 2, 1] = chroma * angle.sin()
    rotation[:, 1, 2] = -rotation[:, 2, 1]
    matrix = _TO_YIQ.inverse() @ rotation @ _TO_YIQ
    return torch.einsum("bij,bjhw->bihw", matrix, images).clamp(0, 1)


def pixels(images: Tensor) -> Tensor:
    return (images - IMAGE_MEAN) / IMAGE_STD


def info_nce(a: Tensor, b: Tensor, scale: Tensor | float) -> tuple[Tensor, Tensor]:
    """Symmetric InfoNCE (CLIP, arXiv:2103.00020) and top-1 accuracy of rows ``[B, D]``."""
    logits = F.normalize(a.float(), dim=-1) @ F.normalize(b.float(), dim=-1).T * scale
    labels = torch.arange(len(a))
    loss = (F.cross_entropy(logits, labels) + F.cross_entropy(logits.T, labels)) / 2
    return loss, (logits.argmax(1) == labels).float().mean()


def build_clip(width: int, tokenizer) -> CLIPModel:
    vision = {
        "hidden_size": width,
        "intermediate_size": 3 * width,
        "num_hidden_layers": 3,
        "num_attention_heads": width // 32,
        "image_size": SIZE,
        "patch_size": 8,
        "hidden_act": "silu",
    }
    text = {
        "vocab_size": len(tokenizer),
        "hidden_size": 96,
        "intermediate_size": 192,
        "num_hidden_layers": 2,
        "num_attention_heads": 3,
        "max_position_embeddings": MAX_TOKENS + 2,
        "bos_token_id": tokenizer.bos_token_id,
        "eos_token_id": tokenizer.eos_token_id,
        "pad_token_id": tokenizer.pad_token_id,
        "hidden_act": "silu",
    }
    return CLIPModel(CLIPConfig(text_config=text, vision_config=vision, projection_dim=96))


def clip_loss(model: CLIPModel, pool: Pool, batch: int, strength: float, generator):
    rows = torch.randint(len(pool.targets), (batch,), generator=generator)
    images = augment(pool.targets[rows].float() / 255, 0.35 * strength, generator)
    with torch.autocast("cpu", torch.bfloat16, enabled=torch.cpu._is_amx_tile_supported()):
        image = model.get_image_features(pixel_values=pixels(images)).pooler_output
        text = model.get_text_features(input_ids=pool.tokens[rows]).pooler_output
    return info_nce(image, text, model.logit_scale.exp().clamp(max=100))


def build_dino(width: int) -> Dinov2Model:
    return Dinov2Model(
        Dinov2Config(
            hidden_size=width,
            num_hidden_layers=3,
            num_attention_heads=width // 32,
            mlp_ratio=3,
            image_size=SIZE,
            patch_size=8,
            hidden_act="silu",
            layerscale_value=0.3,
        )
    )


def dino_loss(model: Dinov2Model, pool: Pool, batch: int, strength: float, generator):
    rows = torch.randint(len(pool.targets), (batch,), generator=generator)
    references, targets = (t[rows].float() / 255 for t in (pool.references, pool.targets))
    same_picture = torch.rand(batch, 1, 1, 1, generator=generator) < 0.3
    pairs = references, torch.where(same_picture, references, targets)
    a, b = (augment(jitter_colors(x, generator), strength, generator) for x in pairs)
    with torch.autocast("cpu", torch.bfloat16, enabled=torch.cpu._is_amx_tile_supported()):
        features = model(pixel_values=pixels(torch.cat([a, b]))).pooler_output
    return info_nce(*features.chunk(2), 12.0)


def save(model: nn.Module, kind: str, tokenizer, folder: Path) -> None:
    from transformers import CLIPImageProcessorPil

    model.to(torch.bfloat16).save_pretrained(folder)  # pyright: ignore
    size = {"shortest_edge": SIZE}
    crop = {"height": SIZE, "width": SIZE}
    mean, std = [IMAGE_MEAN] * 3, [IMAGE_STD] * 3
    CLIPImageProcessorPil(
        size=size, crop_size=crop, image_mean=mean, image_std=std, do_convert_rgb=True
    ).save_pretrained(folder)
    if kind == "clip":
        tokenizer.save_pretrained(folder)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--kind", choices=("clip", "dino"), required=True)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--init", type=Path, help="Dinov2Model to go on from")
    parser.add_argument("--seed", type=int, required=True)
    parser.add_argument("--width", type=int, default=128)
    parser.add_argument("--strength", type=float, default=1.0, help="of the augmentation")
    parser.add_argument("--steps", type=int, default=800)
    parser.add_argument("--batch", type=int, default=256)
    parser.add_argument("--pool", type=int, default=40_000)
    parser.add_argument("--lr", type=float, default=1.5e-3)
    args = parser.parse_args()
    torch.manual_seed(args.seed)
    tokenizer = clip_tokenizer()
    model = build_clip(args.width, tokenizer) if args.kind == "clip" else build_dino(args.width)
    if args.init:
        model = Dinov2Model.from_pretrained(args.init, dtype=torch.float32)
    model.set_attn_implementation("eager")
    run = Run(args.out, model, peak_lr=args.lr, num_steps=args.steps)
    pool = make_pool(args.pool, args.seed, tokenizer, recolor=args.kind == "dino")
    loss_of = clip_loss if args.kind == "clip" else dino_loss
    while run.step < args.steps:
        generator = run.rng(args.seed)
        loss, accuracy = loss_of(model, pool, args.batch, args.strength, generator)  # pyright: ignore
        run.update(loss, accuracy=accuracy.item())
    model.load_state_dict(run.ema.shadow)
    save(model, args.kind, tokenizer, args.out / "model")


if __name__ == "__main__":
    main()
