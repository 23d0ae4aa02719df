import pytest
import torch
from torch import nn

from customized_grpo.config import LoraSettings, RunConfig
from customized_grpo.generators.base import Conditioning
from customized_grpo.generators.flux_kontext import FluxKontextGenerator
from customized_grpo.generators.lora import attach_lora, folded_lora
from customized_grpo.rollout import make_policy
from customized_grpo.types import Example


@pytest.fixture
def adapted(generator: FluxKontextGenerator) -> FluxKontextGenerator:
    torch.manual_seed(0)
    attach_lora(generator.transformer, LoraSettings(rank=4, alpha=6), generator.lora_targets)
    for name, parameter in generator.transformer.named_parameters():
        if "lora_B" in name:
            nn.init.normal_(parameter, std=0.05)
    return generator


def test_folded_adapters_give_the_same_output_and_gradients_in_float64(
    adapted: FluxKontextGenerator, tiny_config: RunConfig, examples: list[Example]
) -> None:
    transformer = adapted.transformer.double()
    policy = make_policy(adapted, tiny_config)
    encoded = adapted.encode(examples)
    conditioning = Conditioning(
        per_sample={name: t.double() for name, t in encoded.per_sample.items()},
        shared=encoded.shared,
    )
    noise = adapted.noise(4, torch.Generator().manual_seed(0))
    parameters = {n: p for n, p in transformer.named_parameters() if p.requires_grad}

    def output_and_gradients(micro_batches: int):
        outputs = []
        for rows in torch.arange(4).chunk(micro_batches):
            velocity = policy.velocity(noise[rows], rows, conditioning.take(rows))
            velocity.square().sum().backward()
            outputs.append(velocity.detach())
        return torch.cat(outputs)

    plain = output_and_gradients(1)
    wanted = {name: p.grad.clone() for name, p in parameters.items() if p.grad is not None}
    transformer.zero_grad()
    before = {name: p.clone() for name, p in transformer.named_parameters()}
    with folded_lora(transformer):
        folded = output_and_gradients(2)
    torch.testing.assert_close(folded, plain, atol=1e-6, rtol=0)  # velocities are float32
    assert len(wanted) == len(parameters) > 0
    for name, gradient in wanted.items():
        error = (parameters[name].grad - gradient).norm() / gradient.norm()
        assert error < 1e-5, name
    for name, parameter in transformer.named_parameters():
        assert torch.equal(parameter, before[name]), name
    assert {n for n, p in transformer.named_parameters() if p.requires_grad} == set(parameters)


def test_folded_gradients_add_to_those_that_are_there(adapted: FluxKontextGenerator) -> None:
    layer = next(m for m in adapted.transformer.modules() if hasattr(m, "lora_A"))
    inputs = torch.randn(3, layer.in_features)
    layer(inputs).sum().backward()
    once = layer.lora_A["default"].weight.grad.clone()
    with folded_lora(adapted.transformer):
        layer(inputs).sum().backward()
    torch.testing.assert_close(layer.lora_A["default"].weight.grad, 2 * once)


def test_weights_come_back_after_an_error(adapted: FluxKontextGenerator) -> None:
    layer = next(m for m in adapted.transformer.modules() if hasattr(m, "lora_A"))
    weight = layer.base_layer.weight

    def fail() -> None:
        with folded_lora(adapted.transformer):
            assert layer.base_layer.weight is not weight
            raise RuntimeError("out of memory")

    with pytest.raises(RuntimeError, match="out of memory"):
        fail()
    assert layer.base_layer.weight is weight
    assert not layer.disable_adapters
