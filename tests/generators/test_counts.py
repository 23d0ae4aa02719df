"""What is counted of a run from its config is what its models do: an oracle for every family.

The oracle runs the real adapters on real checkpoints, with torch's own counter and the attention
that is written out in products.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from families import FAMILIES, Family, run_config
from helpers import ROOT
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode
from toy_world import blocks

from customized_grpo.config import LoraSettings, RunConfig, load_config
from customized_grpo.data.emoji.source import EmojiSource
from customized_grpo.generators.cpu import lora_merged, use_stock_blocks
from customized_grpo.rewards.base import RewardSet
from customized_grpo.tools.estimate.checkpoints import pipeline_components
from customized_grpo.tools.estimate.encoders import count_text_encoder
from customized_grpo.tools.estimate.transformer import Tokens, count_transformer
from customized_grpo.tools.estimate.workload import count_run
from customized_grpo.training.build import make_trainable
from customized_grpo.training.policy import make_policy
from customized_grpo.types import Example

CPU = torch.device("cpu")
TOLERANCE = 0.01
# One of each architecture, but for Qwen-Image-2.1's, which takes longest; CI counts all.
FAST = {"flux-kontext", "flux2-klein-base"}


def flops(function: Callable[[], object]) -> int:
    with FlopCounterMode(display=False) as counter, sdpa_kernel(SDPBackend.MATH):
        function()
    return counter.get_total_flops()


def check(config: RunConfig, example: Example) -> None:
    """The transformer's pass, a trained pair and the VAE, of one sample."""
    generator = config.generator.build(CPU)
    use_stock_blocks(generator.transformer)  # on a CPU FLUX.1's last block leaves tokens out
    conditioning = generator.encode([example])
    given = conditioning.per_sample
    prompt = "positive" if "positive" in given else "encoder_hidden_states"  # Qwen's name for it
    if "negative" in given:  # an empty prompt is shorter where it is not padded; counted as long
        given["negative"] = given[prompt]
    if "negative_length" in given:
        given["negative_length"] = given["positive_length"]
    text = given[prompt].shape[1]
    references = len(example.references)
    work = count_run(config, references, text)
    noise = generator.noise(1, torch.Generator().manual_seed(0))
    seen = noise.shape[1] + conditioning.per_sample["reference_latents"].shape[1]
    assert work.tokens.image == seen
    assert work.transformer.latents == noise.numel()
    assert work.transformer.parameters == sum(p.numel() for p in generator.transformer.parameters())
    policy, index = make_policy(generator, config), torch.zeros(1, dtype=torch.int64)
    with torch.no_grad():
        decoded = flops(lambda: generator.decode(noise))
    make_trainable(generator, config)
    with torch.no_grad(), lora_merged(generator.transformer):  # as in a rollout
        pass_ = flops(lambda: policy.velocity(noise, index, conditioning))
    trained = [p for p in generator.transformer.parameters() if p.requires_grad]
    pair = flops(lambda: policy.velocity(noise, index, conditioning).sum().backward())
    twice, model = work.guidance_passes, work.transformer
    assert model.trained == sum(p.numel() for p in trained)
    forward_flops = model.forward_flops + model.prefix.forward_flops
    assert twice * forward_flops == pytest.approx(pass_, rel=TOLERANCE)
    pair_flops = model.pair_flops + model.prefix.pair_flops
    assert twice * pair_flops == pytest.approx(pair, rel=TOLERANCE)
    assert work.decode.flops == pytest.approx(decoded, rel=TOLERANCE)


@pytest.mark.parametrize(
    "family",
    [
        pytest.param(family, id=family.name, marks=[] if family.name in FAST else pytest.mark.slow)
        for family in FAMILIES
    ],
)
def test_counts_of_every_family(family: Family, tmp_path: Path) -> None:
    family.build(tmp_path / "checkpoint")
    config = run_config(family, str(tmp_path / "checkpoint"), tmp_path)
    check(config, blocks(min(2, family.most_references)))


@pytest.mark.slow
def test_counts_of_the_embedded_generator() -> None:
    config = load_config(ROOT / "configs" / "emoji.yaml")
    (example,) = EmojiSource(0).training(0, 1)
    check(config, example)
    everything = dataclasses.replace(config, lora=None)
    check(everything, example)


@pytest.mark.slow
def test_adapters_beside_a_bfloat16_base_are_passed_through_in_the_rollout_too() -> None:
    config = load_config(ROOT / "configs" / "emoji.yaml", ["--generator.dtype", "bfloat16"])
    (example,) = EmojiSource(0).training(0, 1)
    check(config, example)
    merged = count_run(load_config(ROOT / "configs" / "emoji.yaml")).transformer
    apart = count_run(config).transformer
    assert (apart.merged, merged.merged > 0) == (0, True)
    assert apart.forward_flops > 1.2 * merged.forward_flops


def test_counts_of_the_embedded_encoders_and_rewards() -> None:
    config = load_config(ROOT / "configs" / "emoji.yaml")
    examples = EmojiSource(0).training(0, 1)
    generator = config.generator.build(CPU)
    work = count_run(config)
    assert work.encode.flops == pytest.approx(flops(lambda: generator.encode(examples)), rel=0.02)
    rewards = RewardSet(config.rewards, CPU)
    scored = flops(lambda: rewards.score(torch.rand(1, 3, 64, 64), examples))
    again = flops(lambda: rewards.score(torch.rand(1, 3, 64, 64), examples))
    counted = work.rewards.image_flops + work.rewards.example_flops
    # Prompts are shorter than the text tower's limit, which is counted.
    assert scored <= counted < 1.1 * scored
    assert again < scored  # the reference's features are kept
    assert work.rewards.unknown == ()


@pytest.mark.slow
@pytest.mark.parametrize("deep", [{"num_layers": 5, "num_single_layers": 4}, {"num_layers": 1}])
def test_a_deep_model_is_extrapolated_from_shallow_ones(
    deep: dict[str, int], monkeypatch: pytest.MonkeyPatch
) -> None:
    kind, config = pipeline_components("embedded:generator")["transformer"]
    tokens = Tokens(target=(4, 4), references=((4, 4),), text=8)
    arguments = (tokens, LoraSettings(rank=4), torch.float32, False)
    short = count_transformer((kind, {**config, **deep}), *arguments)
    monkeypatch.setattr("customized_grpo.tools.estimate.transformer._DEPTHS", ())
    whole = count_transformer((kind, {**config, **deep}), *arguments)
    for name in ("parameters", "trained", "forward_flops", "pair_flops"):
        assert getattr(short, name) == getattr(whole, name), name
    assert short.pair_peak == pytest.approx(whole.pair_peak, rel=0.02)
    assert short.checkpointed_peak < short.pair_peak


def test_a_text_encoder_reads_no_more_than_it_can() -> None:
    component = pipeline_components("embedded:generator")["text_encoder"]
    short, long = (count_text_encoder(component, n, 0, torch.float32).flops for n in (32, 500))
    assert short == long
