"""Tiny checkpoints of every reward model, in the real formats, with random weights."""

from __future__ import annotations

import json
from pathlib import Path

import torch
from safetensors.torch import save_file
from tokenizers import pre_tokenizers
from torch import Tensor, nn
from transformers import (
    BitImageProcessorPil,
    CLIPConfig,
    CLIPImageProcessorPil,
    CLIPModel,
    CLIPSegConfig,
    CLIPSegForImageSegmentation,
    CLIPTokenizer,
    Dinov2Config,
    Dinov2Model,
    DINOv3ViTConfig,
    DINOv3ViTModel,
    GemmaTokenizer,
    PreTrainedModel,
    Qwen2Tokenizer,
    Qwen2VLConfig,
    Qwen2VLForConditionalGeneration,
    Siglip2Config,
    Siglip2ImageProcessorPil,
    Siglip2Model,
    Siglip2Tokenizer,
    SiglipConfig,
    SiglipImageProcessorPil,
    SiglipModel,
    ViTConfig,
    ViTImageProcessorPil,
    ViTModel,
)

BYTES = sorted(pre_tokenizers.ByteLevel.alphabet())
TOWER = {
    "hidden_size": 32,
    "intermediate_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
}
VISION = TOWER | {"image_size": 32, "patch_size": 8}


def clip_tokenizer() -> CLIPTokenizer:
    words = [*BYTES, *(c + "</w>" for c in BYTES), "<|startoftext|>", "<|endoftext|>"]
    return CLIPTokenizer(vocab={w: i for i, w in enumerate(words)}, merges=[], model_max_length=77)


def _clip_towers(hidden_act: str) -> dict:
    tokenizer = clip_tokenizer()
    text = {
        "vocab_size": len(tokenizer),
        "bos_token_id": tokenizer.bos_token_id,
        "eos_token_id": tokenizer.eos_token_id,
        "pad_token_id": tokenizer.pad_token_id,
        "hidden_act": hidden_act,
    }
    return {
        "text_config": TOWER | text,
        "vision_config": VISION | {"hidden_act": hidden_act},
        "projection_dim": 24,
    }


def _seed(model: nn.Module) -> nn.Module:
    """Weights large enough that different pictures get clearly different features."""
    generator = torch.Generator().manual_seed(0)
    for parameter in model.parameters():
        if parameter.ndim > 1:
            parameter.data.normal_(0, 0.1, generator=generator)
    return model


def _save(folder: Path, model: PreTrainedModel, *parts) -> str:
    _seed(model)
    for part in (model, *parts):
        part.save_pretrained(folder)
    return str(folder)


def save_clip(folder: Path, hidden_act: str = "quick_gelu") -> str:
    processor = CLIPImageProcessorPil(
        size={"shortest_edge": 32}, crop_size={"height": 32, "width": 32}
    )
    model = CLIPModel(CLIPConfig(**_clip_towers(hidden_act)))
    return _save(folder, model, clip_tokenizer(), processor)


def save_dino(folder: Path) -> str:
    """A model for 224 px without a pooler, as published; the processor's file is the published one,
    too, which is not DINO's own preprocessing."""
    config = ViTConfig(**TOWER, image_size=224, patch_size=32)
    processor = ViTImageProcessorPil(size={"height": 224, "width": 224}, resample=2)
    return _save(folder, ViTModel(config, add_pooling_layer=False), processor)


def save_dinov2(folder: Path) -> str:
    processor = BitImageProcessorPil(
        size={"shortest_edge": 36}, crop_size={"height": 32, "width": 32}
    )
    config = Dinov2Config(
        hidden_size=32, num_hidden_layers=2, num_attention_heads=2, image_size=32, patch_size=8
    )
    return _save(folder, Dinov2Model(config), processor)


def save_dinov3(folder: Path) -> str:
    """The processor needs torchvision: its file is written by hand, as the published ones are."""
    config = DINOv3ViTConfig(**VISION, num_register_tokens=2)
    path = _save(folder, DINOv3ViTModel(config))
    processor = {
        "crop_size": None,
        "default_to_square": True,
        "do_center_crop": None,
        "do_normalize": True,
        "do_rescale": True,
        "do_resize": True,
        "image_mean": [0.485, 0.456, 0.406],
        "image_processor_type": "DINOv3ViTImageProcessorFast",
        "image_std": [0.229, 0.224, 0.225],
        "resample": 2,
        "rescale_factor": 0.00392156862745098,
        "size": {"height": 32, "width": 32},
    }
    (folder / "preprocessor_config.json").write_text(json.dumps(processor))
    return path


def siglip_tokenizer(naflex: bool) -> Siglip2Tokenizer | GemmaTokenizer:
    """Gemma's as it is beside the fixed-resolution checkpoints, as published."""
    letters = [chr(c) for first in ("a", "A") for c in range(ord(first), ord(first) + 26)]
    words = ["<pad>", "<eos>", "<bos>", "<unk>", "<mask>", "▁", *letters]
    cls = Siglip2Tokenizer if naflex else GemmaTokenizer
    return cls(vocab={w: i for i, w in enumerate(words)}, merges=[], padding_side="right")


def save_siglip(folder: Path, naflex: bool = False) -> str:
    tokenizer = siglip_tokenizer(naflex)
    text = TOWER | {"vocab_size": len(tokenizer), "projection_size": 32}
    text |= {"bos_token_id": 2, "eos_token_id": 1, "pad_token_id": 0}
    if naflex:
        vision = TOWER | {"patch_size": 8, "num_patches": 16}
        model = Siglip2Model(Siglip2Config(text_config=text, vision_config=vision))
        processor = Siglip2ImageProcessorPil(patch_size=8, max_num_patches=16)
    else:
        model = SiglipModel(SiglipConfig(text_config=text, vision_config=VISION))
        processor = SiglipImageProcessorPil(size={"height": 32, "width": 32}, resample=2)
    return _save(folder, model, tokenizer, processor)


def save_clipseg(folder: Path) -> str:
    config = CLIPSegConfig(
        **_clip_towers("quick_gelu"),
        extract_layers=[0, 1],
        reduce_dim=16,
        decoder_num_attention_heads=2,
        decoder_intermediate_size=32,
    )
    processor = ViTImageProcessorPil(size={"height": 40, "width": 40})
    return _save(folder, CLIPSegForImageSegmentation(config), clip_tokenizer(), processor)


def open_clip_state(clip: CLIPModel) -> dict[str, Tensor]:
    """Random weights in open_clip's layout, in the shapes of ``clip``; written from its source."""
    generator = torch.Generator().manual_seed(1)

    def random(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator) * 0.1

    text, vision = clip.config.text_config, clip.config.vision_config
    side = vision.image_size // vision.patch_size
    state = {
        "logit_scale": torch.tensor(2.0),
        "positional_embedding": random(text.max_position_embeddings, text.hidden_size),
        "text_projection": random(text.hidden_size, clip.config.projection_dim),
        "token_embedding.weight": random(text.vocab_size, text.hidden_size),
        "visual.class_embedding": random(vision.hidden_size),
        "visual.positional_embedding": random(side**2 + 1, vision.hidden_size),
        "visual.proj": random(vision.hidden_size, clip.config.projection_dim),
        "visual.conv1.weight": random(vision.hidden_size, 3, vision.patch_size, vision.patch_size),
    }
    for prefix, config in (("", text), ("visual.", vision)):
        width, inner = config.hidden_size, config.intermediate_size
        norms = ["visual.ln_pre", "visual.ln_post"] if prefix else ["ln_final"]
        for layer in range(config.num_hidden_layers):
            block = f"{prefix}transformer.resblocks.{layer}."
            norms += [f"{block}ln_1", f"{block}ln_2"]
            state[f"{block}attn.in_proj_weight"] = random(3 * width, width)
            state[f"{block}attn.in_proj_bias"] = random(3 * width)
            for name, rows, columns in (
                ("attn.out_proj", width, width),
                ("mlp.c_fc", inner, width),
                ("mlp.c_proj", width, inner),
            ):
                state[f"{block}{name}.weight"] = random(rows, columns)
                state[f"{block}{name}.bias"] = random(rows)
        for norm in norms:
            state |= {f"{norm}.weight": 1 + random(width), f"{norm}.bias": random(width)}
    return state


def save_hpsv2(folder: Path) -> dict[str, str]:
    clip = save_clip(folder / "clip", hidden_act="gelu")
    state = open_clip_state(CLIPModel.from_pretrained(clip))
    torch.save({"epoch": 1, "state_dict": state}, folder / "HPS_v2.1_compressed.pt")
    return {"path": str(folder), "clip": clip}


QWEN_TOKENS = [
    "<|im_start|>", "<|im_end|>", "<|vision_start|>", "<|vision_end|>", "<|image_pad|>",
    "<|video_pad|>",
]  # fmt: skip


def qwen_tokenizer() -> Qwen2Tokenizer:
    words = [*BYTES, "<|endoftext|>"]
    tokenizer = Qwen2Tokenizer(vocab={w: i for i, w in enumerate(words)}, merges=[])
    tokenizer.add_special_tokens({"additional_special_tokens": QWEN_TOKENS})
    return tokenizer


def qwen2vl_config() -> dict:
    """config.json in the flat layout of the published Qwen2-VL-7B-Instruct."""
    ids = qwen_tokenizer().convert_tokens_to_ids
    return TOWER | {
        "architectures": ["Qwen2VLForConditionalGeneration"],
        "model_type": "qwen2_vl",
        "bos_token_id": ids("<|endoftext|>"),
        "eos_token_id": ids("<|im_end|>"),
        "vision_start_token_id": ids("<|vision_start|>"),
        "vision_end_token_id": ids("<|vision_end|>"),
        "image_token_id": ids("<|image_pad|>"),
        "video_token_id": ids("<|video_pad|>"),
        "hidden_act": "silu",
        "max_position_embeddings": 32768,
        "max_window_layers": 2,
        "num_key_value_heads": 1,
        "rms_norm_eps": 1e-06,
        "rope_theta": 1000000.0,
        "rope_scaling": {"type": "mrope", "mrope_section": [2, 3, 3]},
        "sliding_window": 32768,
        "tie_word_embeddings": False,
        "torch_dtype": "bfloat16",
        "use_sliding_window": False,
        "vision_config": {
            "depth": 2,
            "embed_dim": 32,
            "hidden_size": 32,
            "in_chans": 3,
            "mlp_ratio": 4,
            "num_heads": 2,
            "patch_size": 14,
            "spatial_merge_size": 2,
            "spatial_patch_size": 14,
            "temporal_patch_size": 2,
        },
        "vocab_size": 320,  # above the tokenizer's, as published
    }


INSTRUCTION = "How well does the picture show '{text_prompt}'? \n{as a number} <|Reward|>"


def published_hpsv3_state(vocab_size: int) -> dict[str, Tensor]:
    """Random weights under the names of HPSv3.safetensors, which is of transformers 4.45."""
    config = Qwen2VLConfig.from_dict(qwen2vl_config() | {"vocab_size": vocab_size})
    model = _seed(Qwen2VLForConditionalGeneration(config))
    old = {}
    for name, tensor in model.state_dict().items():
        name = name.replace("model.language_model.", "model.").replace("model.visual.", "visual.")
        old[name] = tensor.clone()
    width = config.text_config.hidden_size
    sizes = {"rm_head.0": (1024, width), "rm_head.3": (16, 1024), "rm_head.5": (2, 16)}
    generator = torch.Generator().manual_seed(2)
    for name, shape in sizes.items():
        old[f"{name}.weight"] = torch.randn(*shape, generator=generator) * shape[1] ** -0.5
        old[f"{name}.bias"] = torch.randn(shape[0], generator=generator)
    return old


def save_hpsv3(folder: Path) -> dict[str, str]:
    base = folder / "base"
    tokenizer = qwen_tokenizer()
    tokenizer.save_pretrained(base)
    (base / "config.json").write_text(json.dumps(qwen2vl_config()))
    save_file(published_hpsv3_state(len(tokenizer) + 1), folder / "HPSv3.safetensors")
    (folder / "instruction.txt").write_text(INSTRUCTION)
    return {
        "path": str(folder), "base": str(base), "instruction": str(folder / "instruction.txt")
    }  # fmt: skip
