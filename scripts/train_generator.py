"""Trains the embedded FLUX.1 Kontext checkpoint on the emoji world by flow matching.

python scripts/train_generator.py --vae build/vae/vae --out build/generator

A tiny ``FluxTransformer2DModel`` and its two text encoders are trained together, on pairs that are
rendered as they are needed. ``--init build/generator/pipeline --copy .2 --lost .15 --missed .15
--steps 1200`` then trains on pairs with the flaws of real data (see ``Flaws``). Resumable: the same
command goes on where it stopped, also with more ``--steps``. The result is a stock
``FluxKontextPipeline`` folder with bfloat16 weights.
"""

from __future__ import annotations

import argparse
import math
from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass, fields, replace
from pathlib import Path

import torch
import torch.nn.functional as F
from _tokenizers import MAX_TOKENS, clip_tokenizer, t5_tokenizer
from _training import Run, batches, to_bytes
from diffusers import (
    AutoencoderTiny,
    FlowMatchEulerDiscreteScheduler,
    FluxKontextPipeline,
    FluxTransformer2DModel,
)
from safetensors.torch import load_file
from torch import Tensor, nn
from transformers import CLIPTextConfig, CLIPTextModel, CLIPTokenizer, T5Config, T5EncoderModel

from customized_grpo.data.emoji.world import Attributes, EmojiBatch, EmojiWorld
from customized_grpo.generators.cpu.flux1 import use_cpu_blocks, use_stock_blocks

TEXT_WIDTH = 128
NUM_TOKENS = 16  # of a picture
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
        target_ids = FluxKontextPipeline._prepare_latent_image_ids(
            1, 4, 4, latents.device, torch.float32
        )
        reference_ids = target_ids.clone()
        reference_ids[:, 0] = 1
        velocity = self.transformer(
            hidden_states=torch.cat([latents, reference], 1),
            timestep=sigma,
            pooled_projections=pooled,
            encoder_hidden_states=text,
            txt_ids=torch.zeros(text.shape[1], 3, device=latents.device),
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


def warm_start(denoiser: Denoiser, folder: Path) -> None:
    """Takes over a pipeline's weights, such as those that the package embeds."""
    parts = {
        "text_encoder": "model",
        "text_encoder_2": "model",
        "transformer": "diffusion_pytorch_model",
    }
    for part, name in parts.items():
        weights = load_file(folder / part / f"{name}.safetensors")
        missing, unexpected = getattr(denoiser, part).load_state_dict(
            {key: tensor.float() for key, tensor in weights.items()}, strict=False
        )
        if unexpected or set(missing) - {"encoder.embed_tokens.weight"}:  # T5 ties it
            raise SystemExit(f"{folder / part}: of another architecture, {missing} {unexpected}")


@dataclass(frozen=True, kw_only=True, slots=True)
class Flaws:
    """Shares of pairs with a flaw of real training data; the others are right.

    A *model organism* of bases such as UNO, which are trained on synthetic pairs: what they do
    wrong now and then is what reinforcement learning has to choose between.
    """

    copy: float = 0.0
    """The target is the reference itself."""
    lost: float = 0.0
    """The target shows another subject that the same word names."""
    missed: float = 0.0
    """The target lacks one of the prop, colour and accessory that the prompt asks for."""


class Pairs:
    """Endless (reference, prompt, target) triples, rendered and tokenised."""

    def __init__(self, tokenizers, flaws: Flaws, size: int) -> None:
        self._world, self._tokenizers = EmojiWorld("train"), tokenizers
        self._flaws, self._size = flaws, size
        self._same_noun: dict[str, list[int]] = defaultdict(list)
        for index in self._world.indices.tolist():
            self._same_noun[self._world.subjects[index].noun].append(index)

    def batch(self, rng: torch.Generator) -> tuple[Tensor, ...]:
        """Targets and references, uint8 ``[B, 3, 64, 64]``, the share of each token that the
        subject covers in the target ``[B, 16]``, token ids of CLIP and of T5."""
        triples = self._world.sample(self._size, rng)
        targets, masks = self._flawed(triples, rng)
        texts = [
            tokenizer(
                triples.prompts,
                padding="max_length",
                max_length=length,
                truncation=True,
                return_tensors="pt",
            ).input_ids
            for tokenizer, length in zip(
                self._tokenizers, (MAX_TOKENS + 2, MAX_TOKENS), strict=True
            )
        ]
        subject = F.avg_pool2d(masks, 16).flatten(1)
        return to_bytes(targets), to_bytes(triples.references), subject, *texts

    def _flawed(self, triples: EmojiBatch, rng: torch.Generator) -> tuple[Tensor, Tensor]:
        """Targets and their subject masks, some of them flawed."""
        flaws, targets, masks = self._flaws, triples.targets.clone(), triples.target_masks.clone()
        if flaws == Flaws():
            return targets, masks
        place = torch.rand(len(targets), generator=rng)
        limits = torch.tensor([flaws.copy, flaws.lost, flaws.missed]).cumsum(0)
        kind = torch.bucketize(place, limits, right=True)
        others = (
            (triples.references, triples.reference_masks),
            self._world.render(self._others(triples.subject, rng), triples.attributes, rng),
            self._world.render(triples.subject, _one_missed(triples.attributes, rng), rng),
        )
        for number, (images, subject_masks) in enumerate(others):
            rows = kind == number
            targets[rows], masks[rows] = images[rows], subject_masks[rows]
        return targets, masks

    def _others(self, subjects: Tensor, rng: torch.Generator) -> Tensor:
        """For each subject another one of the same noun, or any if there is none."""
        chosen = []
        for subject in subjects.tolist():
            same = self._same_noun[self._world.subjects[subject].noun]
            others = [s for s in same if s != subject] or self._world.indices.tolist()
            chosen.append(others[int(torch.randint(len(others), (1,), generator=rng))])
        return torch.tensor(chosen)


def _one_missed(wanted: Attributes, rng: torch.Generator) -> Attributes:
    """Without one of what is asked for; where nothing is, as it is."""
    asked = torch.stack([wanted.prop, wanted.color, wanted.accessory], 1)
    dropped = torch.multinomial((asked > 0).float() + 1e-9, 1, generator=rng)
    prop, color, accessory = asked.scatter(1, dropped, 0).unbind(1)
    return replace(wanted, prop=prop, color=color, accessory=accessory)


@torch.no_grad()
def encode(vae: AutoencoderTiny, images: Tensor) -> Tensor:
    """Latents ``[B, 16, 4 C]`` of uint8 pictures ``[B, 3, 64, 64]``."""
    return pack(vae.encode(images.float() / 127.5 - 1).latents)


def flow_matching_loss(
    denoiser: Denoiser, vae: AutoencoderTiny, batch: Sequence[Tensor], rng: torch.Generator
) -> Tensor:
    """Squared velocity error at logit-normal noise levels (SD3, arXiv:2403.03206).

    Tokens of the subject weigh up to five times as much: backgrounds are quickly learnt and their
    random details never, while copying the subject from the reference takes long. ``rng`` and the
    models are on one device.
    """
    device = rng.device
    targets, references, subject, clip, t5 = (t.to(device, non_blocking=True) for t in batch)
    clean, reference = encode(vae, targets), encode(vae, references)
    sigma = torch.sigmoid(torch.randn(len(clean), generator=rng, device=device) + 0.3)
    noise = torch.randn(clean.shape, generator=rng, device=device)
    noisy = torch.lerp(clean, noise, sigma.view(-1, 1, 1))
    # Not on a CPU: without AMX its bfloat16 products are slower than those in float32.
    with torch.autocast(device.type, torch.bfloat16, enabled=device.type == "cuda"):
        velocity = denoiser(noisy, sigma, reference, clip, t5)
    weight = 1 + 4 * subject.unsqueeze(-1)
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
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--vae", type=Path, required=True)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--init", type=Path, help="pipeline to start from")
    parser.add_argument("--steps", type=int, default=17_000)
    parser.add_argument("--batch", type=int, default=128)
    parser.add_argument("--lr", type=float, default=8e-4)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--device", default="cpu", choices=("cpu", "cuda"))
    parser.add_argument("--workers", type=int, default=0, help="processes that render")
    for flaw in fields(Flaws):
        parser.add_argument(f"--{flaw.name}", type=float, default=0.0, help="share of pairs")
    args = parser.parse_args()
    torch.manual_seed(args.seed)
    # With torch's default, an illegal memory access on an H200 (torch 2.11); without these, none.
    torch.backends.cuda.enable_cudnn_sdp(False)
    torch.backends.cuda.enable_mem_efficient_sdp(False)
    tokenizers = (clip_tokenizer(), t5_tokenizer())
    vae = AutoencoderTiny.from_pretrained(args.vae).to(args.device)
    denoiser = Denoiser(tokenizers[0], len(tokenizers[1]), 4 * vae.config.latent_channels)
    if args.init is not None:
        warm_start(denoiser, args.init)
    denoiser.to(args.device)
    if args.device == "cpu":
        use_cpu_blocks(denoiser.transformer, NUM_TOKENS)
    run = Run(args.out, denoiser, peak_lr=args.lr, num_steps=args.steps)
    flaws = Flaws(copy=args.copy, lost=args.lost, missed=args.missed)
    pairs = Pairs(tokenizers, flaws, args.batch)
    for batch in batches(pairs.batch, run.left, seed=args.seed, workers=args.workers):
        rng = run.rng(args.seed + 1, args.device)
        run.update(flow_matching_loss(denoiser, vae, batch, rng))
    denoiser.load_state_dict(run.ema.shadow)
    use_stock_blocks(denoiser.transformer)
    save_pipeline(denoiser.to("cpu"), vae.to("cpu"), tokenizers, args.out / "pipeline")


if __name__ == "__main__":
    main()
