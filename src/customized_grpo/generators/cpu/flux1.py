"""FLUX.1's blocks for a CPU: the stock modules and weights, multiplied in fewer passes.

What is computed is what diffusers' blocks compute, but for the last one, whose text and reference
tokens nobody reads: it computes the target's.

What goes into a linear layer is contiguous: without gradients torch copies the weights once per
sample otherwise.
"""

from __future__ import annotations

from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from customized_grpo.generators.cpu.math import attention, gelu, rotated_heads

Rotary = tuple[Tensor, Tensor]


def use_cpu_blocks(transformer: Any, num_targets: int) -> None:
    """Gives the blocks of a ``FluxTransformer2DModel`` the forward passes below.

    Args:
        transformer: its output is cut to the target's tokens.
        num_targets: tokens of the target, the first ones after the text.
    """
    for block in transformer.transformer_blocks:
        block.forward = partial(_double_block, block)
        for feed_forward in (block.ff, block.ff_context):
            feed_forward.net[0].gelu = gelu
    for block in transformer.single_transformer_blocks:
        block.forward = partial(_single_block, block, None)
    cut_to_targets(transformer, num_targets)


def cut_to_targets(transformer: Any, num_targets: int) -> None:
    """Cuts the output to another number of target's tokens, if the blocks are those below."""
    last = transformer.single_transformer_blocks[-1]
    if isinstance(last.__dict__.get("forward"), partial):
        last.forward = partial(_single_block, last, num_targets)


def use_stock_blocks(transformer: nn.Module) -> None:
    """Takes that back, for torch.compile: it fuses diffusers' own operations."""
    for module in transformer.modules():
        if isinstance(module.__dict__.get("forward"), partial):
            del module.forward
        module.__dict__.pop("gelu", None)


def _double_block(
    block: Any,
    hidden_states: Tensor,
    encoder_hidden_states: Tensor,
    temb: Tensor,
    image_rotary_emb: Rotary,
    joint_attention_kwargs: None = None,
) -> tuple[Tensor, Tensor]:
    """Text and image each with weights of their own, attending to both."""
    image, text = hidden_states, encoder_hidden_states
    of_image, of_text = _modulation(block.norm1, temb, 6), _modulation(block.norm1_context, temb, 6)
    seen_image, seen_text = _joint_attention(
        block.attn,
        _modulated(block.norm1.norm, image, *of_image[:2]),
        _modulated(block.norm1_context.norm, text, *of_text[:2]),
        image_rotary_emb,
    )
    image = torch.addcmul(image, of_image[2], seen_image)
    text = torch.addcmul(text, of_text[2], seen_text)
    changed = block.ff(_modulated(block.norm2, image, *of_image[3:5]))
    changed_text = block.ff_context(_modulated(block.norm2_context, text, *of_text[3:5]))
    return (
        torch.addcmul(text, of_text[5], changed_text),
        torch.addcmul(image, of_image[5], changed),
    )


def _joint_attention(
    attn: Any, image: Tensor, text: Tensor, rotary: Rotary
) -> tuple[Tensor, Tensor]:
    rotation, eps = _rotation(rotary), attn.norm_q.eps
    width = attn.head_dim
    query = rotated_heads(
        [attn.add_q_proj(text), attn.to_q(image)],
        [attn.norm_added_q.weight, attn.norm_q.weight],
        rotation,
        eps,
        width**-0.5,
    )
    key = rotated_heads(
        [attn.add_k_proj(text), attn.to_k(image)],
        [attn.norm_added_k.weight, attn.norm_k.weight],
        rotation,
        eps,
    )
    value = torch.cat([attn.add_v_proj(text), attn.to_v(image)], 1)
    seen = _attend(query, key, value)
    seen_text, seen_image = seen.split([text.shape[1], image.shape[1]], 1)
    return attn.to_out[0](seen_image.contiguous()), attn.to_add_out(seen_text.contiguous())


def _single_block(
    block: Any,
    num_targets: int | None,
    hidden_states: Tensor,
    encoder_hidden_states: Tensor,
    temb: Tensor,
    image_rotary_emb: Rotary,
    joint_attention_kwargs: None = None,
) -> tuple[Tensor, Tensor]:
    """Text and image as one sequence; of the last block's output the target's tokens only."""
    num_texts = encoder_hidden_states.shape[1]
    tokens = torch.cat([encoder_hidden_states, hidden_states], 1)
    shift, scale, gate = _modulation(block.norm, temb, 3)
    normed = _modulated(block.norm.norm, tokens, shift, scale)
    attn, rotation = block.attn, _rotation(image_rotary_emb)
    key = rotated_heads([attn.to_k(normed)], [attn.norm_k.weight], rotation, attn.norm_k.eps)
    value = attn.to_v(normed)
    if num_targets is not None:
        wanted = slice(num_texts, num_texts + num_targets)
        tokens, rotation = tokens[:, wanted], rotation[wanted]
        normed = normed[:, wanted].contiguous()
    weights, eps = [attn.norm_q.weight], attn.norm_q.eps
    query = rotated_heads([attn.to_q(normed)], weights, rotation, eps, attn.head_dim**-0.5)
    wide = torch.cat([_attend(query, key, value), gelu(block.proj_mlp(normed))], 2)
    tokens = torch.addcmul(tokens, gate, block.proj_out(wide))
    if num_targets is not None:
        return encoder_hidden_states, tokens
    return tokens[:, :num_texts], tokens[:, num_texts:]


def _attend(query: Tensor, key: Tensor, value: Tensor) -> Tensor:
    """Attention of heads ``[B, heads, S, d]`` over values ``[B, S, heads d]``, joined again."""
    heads = value.unflatten(-1, (query.shape[1], -1)).transpose(1, 2)
    return attention(query, key, heads).transpose(1, 2).flatten(2)


def _modulation(norm: Any, temb: Tensor, count: int) -> tuple[Tensor, ...]:
    """Shift, scale and gate ``[B, 1, D]``, once or twice, by noise level and prompt."""
    return norm.linear(norm.silu(temb)).unsqueeze(1).chunk(count, -1)


def _modulated(norm: Any, x: Tensor, shift: Tensor, scale: Tensor) -> Tensor:
    return torch.addcmul(shift, norm(x), 1 + scale)


def _rotation(rotary: Rotary) -> Tensor:
    """Complex ``[S, d / 2]`` of cosines and sines ``[S, d]``, which repeat every number."""
    cos, sin = rotary
    return torch.complex(cos[:, ::2], sin[:, ::2])
