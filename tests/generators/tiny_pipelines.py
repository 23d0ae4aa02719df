"""Tiny random checkpoints in the stock format of every family, a few MB each, built in seconds."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch
from diffusers import (
    AutoencoderKL,
    AutoencoderKLFlux2,
    AutoencoderKLQwenImage,
    AutoencoderKLQwenImage21,
    FlowMatchEulerDiscreteScheduler,
    Flux2KleinPipeline,
    Flux2Transformer2DModel,
    Flux3AutoBlocks,
    Flux3Transformer2DModel,
    FluxKontextPipeline,
    FluxPipeline,
    FluxTransformer2DModel,
    QwenImage21Pipeline,
    QwenImage21Transformer2DModel,
    QwenImageEditPlusPipeline,
    QwenImageTransformer2DModel,
)
from tokenizers.pre_tokenizers import ByteLevel
from transformers import (
    AutoTokenizer,
    CLIPTextConfig,
    CLIPTextModel,
    CLIPTokenizer,
    ProcessorMixin,
    Qwen2_5_VLConfig,
    Qwen2_5_VLForConditionalGeneration,
    Qwen2Tokenizer,
    Qwen3Config,
    Qwen3ForCausalLM,
    Qwen3VLConfig,
    Qwen3VLForConditionalGeneration,
    T5Config,
    T5EncoderModel,
    T5Tokenizer,
)
from transformers.models.qwen2_vl.image_processing_pil_qwen2_vl import Qwen2VLImageProcessorPil

_BYTES = sorted(ByteLevel.alphabet())
_CHAT = (
    "{% for m in messages %}{{'<|im_start|>' + m['role'] + '\n' + m['content'] + '<|im_end|>\n'}}"
    "{% endfor %}{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)
_CHAT_OF_PARTS = (
    "{% for m in messages %}{{'<|im_start|>' + m['role'] + '\n'}}{% for part in m['content'] %}"
    "{{ part['text'] }}{% endfor %}{{'<|im_end|>\n'}}{% endfor %}"
)
_SPECIAL = (
    "<|im_start|>", "<|im_end|>", "<|vision_start|>", "<|vision_end|>", "<|vision_pad|>",
    "<|image_pad|>", "<|video_pad|>",
)  # fmt: skip
_DOWN, _UP = ("DownEncoderBlock2D",) * 4, ("UpDecoderBlock2D",) * 4
_VAE = {
    "down_block_types": _DOWN,
    "up_block_types": _UP,
    "block_out_channels": (16, 16, 32, 32),
    "layers_per_block": 1,
    "latent_channels": 16,
    "norm_num_groups": 8,
    "sample_size": 64,
}


def build_flux1(folder: Path, kind: type[FluxPipeline] | type[FluxKontextPipeline]) -> None:
    torch.manual_seed(0)
    clip, t5 = _clip_tokenizer(), _t5_tokenizer()
    text = CLIPTextConfig(
        vocab_size=len(clip), hidden_size=32, intermediate_size=64, num_hidden_layers=2,
        num_attention_heads=4, projection_dim=32, bos_token_id=clip.bos_token_id,
        eos_token_id=clip.eos_token_id, pad_token_id=clip.pad_token_id,
    )  # fmt: skip
    text_2 = T5Config(
        vocab_size=128, d_model=32, d_kv=8, d_ff=64, num_layers=2, num_heads=4,
        feed_forward_proj="gated-gelu", is_encoder_decoder=False, use_cache=False,
    )  # fmt: skip
    kind(
        scheduler=FlowMatchEulerDiscreteScheduler(shift=3.0, use_dynamic_shifting=True),
        vae=AutoencoderKL(
            use_quant_conv=False, use_post_quant_conv=False, shift_factor=0.1159,
            scaling_factor=0.3611, **_VAE,
        ),
        text_encoder=CLIPTextModel(text),
        tokenizer=clip,
        text_encoder_2=T5EncoderModel(text_2),
        tokenizer_2=t5,
        transformer=FluxTransformer2DModel(
            in_channels=64, num_layers=2, num_single_layers=2, attention_head_dim=32,
            num_attention_heads=4, joint_attention_dim=32, pooled_projection_dim=32,
            guidance_embeds=True, axes_dims_rope=(8, 12, 12),
        ),
    ).save_pretrained(folder)  # fmt: skip


def build_klein(folder: Path, distilled: bool) -> None:
    torch.manual_seed(0)
    text = Qwen3Config(
        vocab_size=512, hidden_size=16, intermediate_size=32, num_hidden_layers=3,
        num_attention_heads=4, num_key_value_heads=2, head_dim=8, max_position_embeddings=1024,
        tie_word_embeddings=True,
    )  # fmt: skip
    Flux2KleinPipeline(
        scheduler=FlowMatchEulerDiscreteScheduler(shift=3.0, use_dynamic_shifting=True),
        vae=_flux2_vae(),
        text_encoder=Qwen3ForCausalLM(text),
        tokenizer=_qwen_tokenizer(),
        transformer=Flux2Transformer2DModel(
            in_channels=64, num_layers=2, num_single_layers=2, attention_head_dim=32,
            num_attention_heads=4, joint_attention_dim=48, timestep_guidance_channels=256,
            axes_dims_rope=(8, 8, 8, 8), guidance_embeds=False,
        ),
        is_distilled=distilled,
    ).save_pretrained(folder)  # fmt: skip


def _flux2_vae() -> AutoencoderKLFlux2:
    vae = AutoencoderKLFlux2(**_VAE)
    vae.bn.running_mean.normal_(std=0.2)
    vae.bn.running_var.uniform_(0.5, 2)
    return vae


def build_qwen(folder: Path) -> None:
    torch.manual_seed(0)
    tokenizer = _qwen_tokenizer()
    end, *vision = tokenizer.convert_tokens_to_ids(
        ["<|endoftext|>", "<|image_pad|>", "<|video_pad|>", "<|vision_start|>", "<|vision_end|>"]
    )
    config = Qwen2_5_VLConfig(
        text_config={
            "vocab_size": 512, "hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2,
            "num_attention_heads": 4, "num_key_value_heads": 2, "max_position_embeddings": 4096,
            "rope_parameters": {"rope_type": "default", "mrope_section": [1, 1, 2],
                                "rope_theta": 1e6},
            "bos_token_id": end, "eos_token_id": end, "pad_token_id": end,
        },
        vision_config={
            "depth": 2, "hidden_size": 32, "intermediate_size": 64, "num_heads": 2,
            "out_hidden_size": 32, "patch_size": 14, "spatial_merge_size": 2,
            "temporal_patch_size": 2, "fullatt_block_indexes": [1], "window_size": 112,
        },
        **dict(zip(("image_token_id", "video_token_id", "vision_start_token_id",
                    "vision_end_token_id"), vision, strict=True)),
    )  # fmt: skip
    encoder = Qwen2_5_VLForConditionalGeneration(config)
    for name, parameter in encoder.named_parameters():
        if name.endswith(("q_proj.weight", "k_proj.weight")):
            parameter.data *= 20  # sharp attention, or positions of tokens would not matter
    QwenImageEditPlusPipeline(
        scheduler=FlowMatchEulerDiscreteScheduler(
            use_dynamic_shifting=True, base_shift=0.5, max_shift=0.9, base_image_seq_len=256,
            max_image_seq_len=8192, shift_terminal=0.02,
        ),
        vae=AutoencoderKLQwenImage(
            base_dim=8, z_dim=16, dim_mult=[1, 1, 2, 2], num_res_blocks=1,
            temperal_downsample=[False, True, True],
        ),
        text_encoder=encoder,
        tokenizer=tokenizer,
        processor=None,
        transformer=QwenImageTransformer2DModel(
            num_layers=2, attention_head_dim=32, num_attention_heads=4, joint_attention_dim=32,
            axes_dims_rope=(8, 12, 12),
        ),
    ).save_pretrained(folder)  # fmt: skip
    Qwen2VLImageProcessorPil(
        min_pixels=28 * 28 * 4, max_pixels=28 * 28 * 16, patch_size=14, merge_size=2,
        temporal_patch_size=2,
    ).save_pretrained(folder / "processor")  # fmt: skip


def build_flux3(folder: Path, distilled: bool = False) -> None:
    """Its index names a prompt upsampler of another repository, as a published checkpoint's."""
    torch.manual_seed(0)
    tokenizer = _qwen_tokenizer()
    blocks = Flux3AutoBlocks()
    pipeline: Any = blocks.init_pipeline()
    pipeline.update_components(
        vae=_flux2_vae(),
        text_encoder=_qwen3_vl(tokenizer),
        transformer=Flux3Transformer2DModel(
            in_channels=64, cond_in_channels=64, num_layers=1, num_single_layers=2,
            attention_head_dim=32, num_attention_heads=4, joint_attention_dim=96,
            axes_dims_rope=(8, 8, 8, 8), flow_map=distilled,
        ),
    )  # fmt: skip
    pipeline.save_pretrained(str(folder), overwrite_modular_index=True)
    for part in (_qwen_pictures(), tokenizer):
        part.save_pretrained(folder / "tokenizer")
    index = json.loads((folder / "modular_model_index.json").read_text())
    index["tokenizer"][2] |= {
        "pretrained_model_name_or_path": str(folder),
        "subfolder": "tokenizer",
    }
    index["prompt_upsampler"][2]["pretrained_model_name_or_path"] = "someone/prompt-upsampler"
    (folder / "modular_model_index.json").write_text(json.dumps(index))


def _qwen_pictures() -> Qwen2VLImageProcessorPil:
    return Qwen2VLImageProcessorPil(
        size={"shortest_edge": 32 * 32 * 4, "longest_edge": 32 * 32 * 64}, patch_size=16,
        merge_size=2, temporal_patch_size=2,
    )  # fmt: skip


def _qwen3_vl(tokenizer: Qwen2Tokenizer) -> Qwen3VLForConditionalGeneration:
    end, *vision = tokenizer.convert_tokens_to_ids(
        ["<|endoftext|>", "<|image_pad|>", "<|video_pad|>", "<|vision_start|>", "<|vision_end|>"]
    )
    config = Qwen3VLConfig(
        text_config={
            "vocab_size": 512, "hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 3,
            "num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 8,
            "max_position_embeddings": 4096,
            "rope_parameters": {"rope_type": "default", "mrope_section": [2, 1, 1],
                                "mrope_interleaved": True, "rope_theta": 5e6},
            "bos_token_id": end, "eos_token_id": end, "pad_token_id": end,
        },
        vision_config={
            "depth": 2, "hidden_size": 32, "intermediate_size": 64, "num_heads": 2,
            "out_hidden_size": 32, "patch_size": 16, "spatial_merge_size": 2,
            "temporal_patch_size": 2, "deepstack_visual_indexes": [0],
            "num_position_embeddings": 64,
        },
        **dict(zip(("image_token_id", "video_token_id", "vision_start_token_id",
                    "vision_end_token_id"), vision, strict=True)),
    )  # fmt: skip
    encoder = Qwen3VLForConditionalGeneration(config)
    for name, parameter in encoder.named_parameters():
        if name.endswith(("q_proj.weight", "k_proj.weight")):
            parameter.data *= 20  # sharp attention, or positions of tokens would not matter
    return encoder


def build_qwen_21(folder: Path) -> None:
    torch.manual_seed(0)
    tokenizer = _qwen_tokenizer()
    tokenizer.chat_template = _CHAT_OF_PARTS
    encoder = _qwen3_vl(tokenizer)
    for part in (_qwen_pictures(), tokenizer):
        part.save_pretrained(folder / "processor")
    channels = 16
    QwenImage21Pipeline(
        scheduler=FlowMatchEulerDiscreteScheduler(
            use_dynamic_shifting=True, base_shift=0.5, max_shift=0.9, base_image_seq_len=256,
            max_image_seq_len=8192, shift_terminal=0.02,
        ),
        vae=AutoencoderKLQwenImage21(
            base_dim=8, decoder_base_dim=8, z_dim=channels, dim_mult=[1, 1, 2, 2, 2],
            num_res_blocks=1, latents_mean=torch.randn(channels).tolist(),
            latents_std=(1 + torch.rand(channels)).tolist(),
        ),
        text_encoder=encoder,
        processor=ChatProcessor(folder, tokenizer),
        transformer=QwenImage21Transformer2DModel(
            in_channels=channels, out_channels=channels, num_layers=3, attention_head_dim=32,
            num_attention_heads=4, context_in_dim=32, axes_dims_rope=(8, 12, 12),
        ),
    ).save_pretrained(folder)  # fmt: skip
    index = json.loads((folder / "model_index.json").read_text())
    index["processor"] = ["transformers", "Qwen3VLProcessor"]  # as a published checkpoint has it
    (folder / "model_index.json").write_text(json.dumps(index))


class TextProcessor:
    """What Qwen3VLProcessor does with one prompt without pictures."""

    def __init__(self, folder: str) -> None:
        self.tokenizer = AutoTokenizer.from_pretrained(folder, subfolder="tokenizer")

    def apply_chat_template(self, messages: list[dict], **_: Any) -> str:
        (message,) = messages
        said = message["content"]
        return f"<|im_start|>{message['role']}\n{said}<|im_end|>\n<|im_start|>assistant\n"


class PictureAndTextProcessor:
    """What Qwen2VLProcessor does, which needs torchvision: an oracle for the stock pipeline."""

    def __init__(self, folder: Path, tokenizer: Any) -> None:
        self.images = Qwen2VLImageProcessorPil.from_pretrained(folder / "processor")
        self.tokenizer = tokenizer

    def __call__(self, text: list[str], images: list, padding: bool, return_tensors: str) -> Any:
        from transformers import BatchFeature

        data = dict(self.images(images=images, return_tensors=return_tensors))
        counts = data["image_grid_thw"].prod(-1) // self.images.merge_size**2
        (line,) = text
        parts = line.split("<|image_pad|>")
        line = parts[0] + "".join(
            "<|image_pad|>" * int(n) + part for n, part in zip(counts, parts[1:], strict=True)
        )
        tokens = self.tokenizer([line], return_tensors=return_tensors)
        return BatchFeature({**tokens, **data})


class ChatProcessor(PictureAndTextProcessor, ProcessorMixin):
    """What Qwen3VLProcessor does, for one prompt and without torchvision."""

    def __call__(self, text: list[str], padding_side: str = "left", images: Any = (), **rest: Any):
        found = super().__call__(text, images, **rest)
        picture = self.tokenizer.convert_tokens_to_ids("<|image_pad|>")
        found["mm_token_type_ids"] = (found["input_ids"] == picture).int()
        return found

    def apply_chat_template(self, messages: list[dict], **_: Any) -> list[list[int]]:
        (message,) = messages
        said = message["content"][0]["text"]
        return [self.tokenizer(f"<|im_start|>{message['role']}\n{said}<|im_end|>\n").input_ids]

    def save_pretrained(self, folder: Any, **_: Any) -> None:
        """Its parts are there."""


def _clip_tokenizer() -> CLIPTokenizer:
    pieces = [*_BYTES, *(c + "</w>" for c in _BYTES), "<|startoftext|>", "<|endoftext|>"]
    vocabulary = {piece: i for i, piece in enumerate(pieces)}
    return CLIPTokenizer(vocab=vocabulary, merges=[], model_max_length=77)


def _t5_tokenizer() -> T5Tokenizer:
    pieces = [("<pad>", 0.0), ("</s>", 0.0), ("<unk>", 0.0), ("\u2581", -2.0)]
    pieces += [(chr(c), -3.0) for c in range(33, 127)]
    return T5Tokenizer(vocab=pieces, extra_ids=0, model_max_length=64)


def _qwen_tokenizer() -> Qwen2Tokenizer:
    vocabulary = {piece: i for i, piece in enumerate([*_BYTES, "<|endoftext|>"])}
    tokenizer = Qwen2Tokenizer(
        vocab=vocabulary, merges=[], model_max_length=4096, padding_side="right"
    )
    tokenizer.add_special_tokens({"additional_special_tokens": list(_SPECIAL)})
    tokenizer.chat_template = _CHAT
    return tokenizer
