import dataclasses
import re

import pytest
import torch
from helpers import assert_near, perturb_lora
from peft.tuners.lora import LoraLayer
from toy_world import blocks

from customized_grpo.config import LoraSettings, RunConfig
from customized_grpo.errors import ConfigError
from customized_grpo.generators.cpu import lora_merged
from customized_grpo.generators.flux1 import Flux1Generator
from customized_grpo.generators.lora import attach_lora, trust_autocast
from customized_grpo.training.policy import make_policy
from customized_grpo.types import Example


def test_gradients_under_autocast_are_those_of_peft(
    generator: Flux1Generator, tiny_config: RunConfig, examples: list[Example]
) -> None:
    torch.manual_seed(0)
    attach_lora(generator.transformer, LoraSettings(rank=4), generator.lora_targets)
    policy = make_policy(generator, dataclasses.replace(tiny_config, mixed_precision="bf16"))
    conditioning = generator.encode(examples)
    noise, steps = generator.noise(4, torch.Generator().manual_seed(0)), torch.arange(4)
    parameters = [p for p in generator.transformer.parameters() if p.requires_grad]

    def gradient() -> torch.Tensor:
        generator.transformer.zero_grad()
        policy.velocity(noise, steps, conditioning).square().sum().backward()
        return torch.cat([p.grad.flatten() for p in parameters if p.grad is not None])

    cast = gradient()
    trust_autocast(generator.transformer)
    layers = [m for m in generator.transformer.modules() if isinstance(m, LoraLayer)]
    assert layers
    assert not any(layer.cast_input_dtype_enabled for layer in layers)
    assert torch.cosine_similarity(gradient(), cast, 0) > 0.999


def test_a_star_names_the_same_layer_of_every_block(generator: Flux1Generator) -> None:
    """The output projection of the single blocks, which the model's last layer shares a name with.

    UNO's own LoRA adapts it, and so does the released recipe.
    """
    transformer = generator.transformer
    wanted = {n for n, _ in transformer.named_modules() if re.search(r"single.*\.proj_out$", n)}
    targets = (*generator.lora_targets, "single_transformer_blocks.*.proj_out")
    attach_lora(transformer, LoraSettings(rank=4, target_modules=targets), ())
    adapted = {n for n, m in transformer.named_modules() if isinstance(m, LoraLayer)}
    assert len(wanted) == len(transformer.single_transformer_blocks) > 1  # pyright: ignore
    assert {name for name in adapted if name.endswith("proj_out")} == wanted
    assert any(name.endswith("attn.to_q") for name in adapted)


@pytest.mark.parametrize(
    "target", ["single_transformer_blocks.*.proj", "blocks.*.proj_out", "to_k2"]
)
def test_a_target_that_names_nothing_is_refused(generator: Flux1Generator, target: str) -> None:
    settings = LoraSettings(rank=4, target_modules=("to_q", target))
    with pytest.raises(ConfigError, match=rf"target_modules: .* got \['{re.escape(target)}'\]; "):
        attach_lora(generator.transformer, settings, ())


def test_merged_adapters_are_the_adapters_and_leave_no_trace(generator: Flux1Generator) -> None:
    transformer = adapted(generator)
    layer = transformer.transformer_blocks[0].attn.to_q
    tokens = torch.randn(5, layer.in_features)
    before, base = layer(tokens), layer.base_layer(tokens)
    weights = {name: p.clone() for name, p in transformer.named_parameters()}
    for gradients in (False, True):
        with torch.set_grad_enabled(gradients), lora_merged(transformer):
            assert layer.merged
            assert_near(layer(tokens), before, terms=layer.in_features)
            with generator.base_policy():
                assert torch.equal(layer(tokens), base)
            assert_near(layer(tokens), before, terms=layer.in_features)
    assert not layer.merged
    after = dict(transformer.named_parameters())
    assert after.keys() == weights.keys()
    assert all(torch.equal(p, weights[name]) for name, p in after.items())
    assert torch.equal(layer(tokens), before)


def test_a_bfloat16_base_is_not_merged_for_it_would_round_the_adapters_away(
    generator: Flux1Generator,
) -> None:
    transformer = adapted(generator)
    first, second = (block.attn.to_q for block in transformer.single_transformer_blocks[:2])
    first.base_layer.bfloat16()
    with torch.no_grad(), lora_merged(transformer):
        assert not first.merged
        assert second.merged


def test_a_failure_inside_gives_the_weights_back(generator: Flux1Generator) -> None:
    transformer = adapted(generator)
    layer = transformer.transformer_blocks[0].attn.to_q
    weight = layer.base_layer.weight
    with pytest.raises(RuntimeError), lora_merged(transformer):
        raise RuntimeError
    assert layer.base_layer.weight is weight
    assert not layer.merged


def adapted(generator: Flux1Generator) -> torch.nn.Module:
    torch.manual_seed(0)
    attach_lora(generator.transformer, LoraSettings(rank=4, alpha=8), generator.lora_targets)
    perturb_lora(generator.transformer)
    return generator.transformer


def test_autocast_finds_frozen_weights_cast(generator: Flux1Generator) -> None:
    transformer = adapted(generator)
    noise = generator.noise(1, torch.Generator().manual_seed(0))
    conditioning = generator.encode([blocks()])

    def velocity() -> torch.Tensor:
        with torch.no_grad(), torch.autocast("cpu", torch.bfloat16):
            return generator.velocity(noise, torch.tensor([0.7]), conditioning)

    cast_each_time = velocity()
    trust_autocast(transformer)
    assert transformer.x_embedder.weight.dtype == torch.bfloat16
    assert transformer.transformer_blocks[0].attn.to_q.base_layer.weight.dtype == torch.float32
    assert torch.equal(velocity(), cast_each_time)
