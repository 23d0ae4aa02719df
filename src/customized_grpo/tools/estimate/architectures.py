"""The shapes of published checkpoints, so that they can be counted before they are downloaded.

The numbers are those of the configs in the repositories named. What is left out is the default of
the class. A checkpoint in a folder, or a hub id that is not listed, is read from its own config.
"""

from __future__ import annotations

from typing import Any, TypeAlias

Component: TypeAlias = tuple[str, dict[str, Any]]
"""Class in diffusers or transformers, and its config."""

_CLIP_L_TEXT = {
    "hidden_size": 768, "intermediate_size": 3072, "num_hidden_layers": 12,
    "num_attention_heads": 12, "vocab_size": 49408, "bos_token_id": 49406, "eos_token_id": 49407,
}  # fmt: skip
_VAE_LEVELS = {
    "block_out_channels": [128, 256, 512, 512],
    "down_block_types": ["DownEncoderBlock2D"] * 4,
    "up_block_types": ["UpDecoderBlock2D"] * 4,
    "layers_per_block": 2,
}

_FLUX1: dict[str, Component] = {
    "transformer": ("FluxTransformer2DModel", {"guidance_embeds": True}),
    "vae": (
        "AutoencoderKL",
        {**_VAE_LEVELS, "latent_channels": 16, "use_quant_conv": False,
         "use_post_quant_conv": False},
    ),
    "text_encoder": ("CLIPTextModel", _CLIP_L_TEXT),
    "text_encoder_2": (
        "T5EncoderModel",
        {"d_model": 4096, "d_ff": 10240, "d_kv": 64, "num_layers": 24, "num_heads": 64,
         "vocab_size": 32128, "feed_forward_proj": "gated-gelu", "is_encoder_decoder": False},
    ),
}  # fmt: skip


def _klein(double: int, single: int, heads: int, text: int, text_mlp: int) -> dict[str, Component]:
    transformer = {
        "num_layers": double, "num_single_layers": single, "num_attention_heads": heads,
        "joint_attention_dim": 3 * text, "guidance_embeds": False,
    }  # fmt: skip
    encoder = {
        "hidden_size": text, "intermediate_size": text_mlp, "num_hidden_layers": 36,
        "num_attention_heads": 32, "num_key_value_heads": 8, "tie_word_embeddings": True,
    }  # fmt: skip
    return {
        "transformer": ("Flux2Transformer2DModel", transformer),
        "vae": ("AutoencoderKLFlux2", {}),
        "text_encoder": ("Qwen3ForCausalLM", encoder),
    }


_KLEIN_4B = _klein(5, 20, heads=24, text=2560, text_mlp=9728)
_KLEIN_9B = _klein(8, 24, heads=32, text=4096, text_mlp=12288)

_QWEN_7B = {
    "hidden_size": 3584, "intermediate_size": 18944, "num_hidden_layers": 28,
    "num_attention_heads": 28, "num_key_value_heads": 4, "vocab_size": 152064,
}  # fmt: skip
_QWEN_IMAGE: dict[str, Component] = {
    "transformer": ("QwenImageTransformer2DModel", {}),
    "vae": ("AutoencoderKLQwenImage", {}),
    "text_encoder": (
        "Qwen2_5_VLForConditionalGeneration",
        {"text_config": _QWEN_7B, "vision_config": {"hidden_size": 1280}},
    ),
}
_QWEN3_VL_8B = {
    "text_config": {
        "hidden_size": 4096, "intermediate_size": 12288, "num_hidden_layers": 36,
        "num_attention_heads": 32, "num_key_value_heads": 8, "vocab_size": 151936,
        "rope_parameters": {"rope_type": "default", "mrope_section": [24, 20, 20],
                            "mrope_interleaved": True, "rope_theta": 5e6},
    },
    "vision_config": {"out_hidden_size": 4096},
}  # fmt: skip
_QWEN_IMAGE_21: dict[str, Component] = {
    "transformer": ("QwenImage21Transformer2DModel", {}),
    "vae": ("AutoencoderKLQwenImage21", {}),
    # By its width, which the transformer's ``context_in_dim`` tells.
    "text_encoder": ("Qwen3VLForConditionalGeneration", _QWEN3_VL_8B),
}

_QWEN3_VL_4B = {
    "text_config": {
        **_QWEN3_VL_8B["text_config"], "hidden_size": 2560, "intermediate_size": 9728,
        "tie_word_embeddings": True,
    },
    "vision_config": {
        "depth": 24, "hidden_size": 1024, "intermediate_size": 4096, "out_hidden_size": 2560,
        "deepstack_visual_indexes": [5, 11, 17],
    },
    "tie_word_embeddings": True,
}  # fmt: skip
_FLUX3_KLEIN: dict[str, Component] = {
    "transformer": ("Flux3Transformer2DModel", {}),
    "vae": ("AutoencoderKLFlux2", {}),
    # By its width: eight of its layers are the transformer's ``joint_attention_dim``.
    "text_encoder": ("Qwen3VLForConditionalGeneration", _QWEN3_VL_4B),
}

PIPELINES: dict[str, dict[str, Component]] = {
    "black-forest-labs/FLUX.1-dev": _FLUX1,
    "black-forest-labs/FLUX.1-Kontext-dev": _FLUX1,
    "black-forest-labs/FLUX.2-klein-4B": _KLEIN_4B,
    "black-forest-labs/FLUX.2-klein-base-4B": _KLEIN_4B,
    "black-forest-labs/FLUX.2-klein-9B": _KLEIN_9B,
    "black-forest-labs/FLUX.2-klein-base-9B": _KLEIN_9B,
    "black-forest-labs/flux-3-image-klein-base": _FLUX3_KLEIN,
    "Qwen/Qwen-Image-2.1": _QWEN_IMAGE_21,
    "Qwen/Qwen-Image-Edit-2509": _QWEN_IMAGE,
}

# The generators of this package -> the checkpoint of their family that is the first one to take.
FAMILIES = {
    "flux-kontext": "black-forest-labs/FLUX.1-Kontext-dev",
    "uno": "black-forest-labs/FLUX.1-dev",
    "flux2-klein": "black-forest-labs/FLUX.2-klein-base-4B",
    "flux3-klein": "black-forest-labs/flux-3-image-klein-base",
    "qwen-image-2.1": "Qwen/Qwen-Image-2.1",
    "qwen-image-edit-plus": "Qwen/Qwen-Image-Edit-2509",
}


def _tower(width: int, mlp: int, layers: int, heads: int, **more: Any) -> dict[str, Any]:
    return {
        "hidden_size": width, "intermediate_size": mlp, "num_hidden_layers": layers,
        "num_attention_heads": heads, **more,
    }  # fmt: skip


_CLIP_L: Component = (
    "CLIPModel",
    {"vision_config": _tower(1024, 4096, 24, 16, patch_size=14, image_size=224),
     "text_config": _CLIP_L_TEXT, "projection_dim": 768},
)  # fmt: skip
_CLIP_H: Component = (
    "CLIPModel",
    {"vision_config": _tower(1280, 5120, 32, 16, patch_size=14, image_size=224),
     "text_config": {**_CLIP_L_TEXT, **_tower(1024, 4096, 24, 16)}, "projection_dim": 1024},
)  # fmt: skip


def _siglip(patch: int, pixels: int, *tower: int) -> Component:
    vision = _tower(*tower, patch_size=patch, image_size=pixels)
    text = _tower(*tower, vocab_size=256000)
    return "SiglipModel", {"vision_config": vision, "text_config": text}


_DINO = {"patch_size": 14, "image_size": 224}  # 518 in its config, 224 in its preprocessing

REWARDS: dict[str, Component] = {
    "facebook/dino-vits16": ("ViTModel", _tower(384, 1536, 12, 6, patch_size=16, image_size=224)),
    "facebook/dinov2-base": ("Dinov2Model", _DINO),
    "CIDAS/clipseg-rd64-refined": (
        "CLIPSegForImageSegmentation",
        {"vision_config": {"patch_size": 16}, "use_complex_transposed_convolution": True},
    ),
    "openai/clip-vit-large-patch14": _CLIP_L,
    "laion/CLIP-ViT-H-14-laion2B-s32B-b79K": _CLIP_H,
    "yuvalkirstain/PickScore_v1": _CLIP_H,
    "google/siglip2-base-patch16-224": _siglip(16, 224, 768, 3072, 12, 12),
    "google/siglip2-so400m-patch14-384": _siglip(14, 384, 1152, 4304, 27, 16),
    "Qwen/Qwen2-VL-7B-Instruct": (
        "Qwen2VLForConditionalGeneration",
        {"text_config": _QWEN_7B, "vision_config": {"embed_dim": 1280, "hidden_size": 3584}},
    ),
}
