"""Rollouts of several shapes: each is that of a run of this shape alone; a mistake shows early."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from families import FAMILIES, run_config
from helpers import changed
from loops import make_loop

from customized_grpo.config import RunConfig
from customized_grpo.errors import ConfigError
from customized_grpo.generators.flux1 import Flux1Generator
from customized_grpo.training.loop import inner_rows
from customized_grpo.training.sampling import as_evaluated
from customized_grpo.training.sizes import check_sizes

SIZES = {(80, 112), (112, 80), (96, 96)}  # of the area of 64 x 144, in multiples of 16


def test_each_rollout_is_that_of_a_run_of_its_shape(tmp_path: Path) -> None:
    """Whatever came before it, so a resumed run goes on with it."""
    (kontext,) = (f for f in FAMILIES if f.name == "flux-kontext")
    kontext.build(tmp_path / "checkpoint")
    plain = run_config(kontext, str(tmp_path / "checkpoint"), tmp_path)
    ratios = ("3:2", "2:3", "reference")
    small = {"group_size": 3, "prompts_per_rollout": 1}
    config = changed(plain, rollout={**small, "aspect_ratios": ratios})
    loop = make_loop(config, tmp_path)
    loop.optimizer = torch.optim.SGD(loop.parameters, 0.0)
    (rows,), seen = inner_rows(loop.config), set()
    for number in range(3):
        experience = loop.collect(number)
        batch = loop._batch_of(experience, rows)
        stats = loop.update(batch, experience.conditioning, is_first=True)
        assert stats["mismatch"] < 1e-4
        seen.add(experience.rollout.images.shape[-2:])
        alone = loop.sizes.config_of(loop.policy)
        assert not alone.rollout.aspect_ratios
        other = make_loop(alone, tmp_path).collect(number).rollout
        assert torch.equal(experience.rollout.images, other.images)
        assert torch.equal(experience.rollout.latents, other.latents)
        assert torch.equal(experience.rollout.sigmas, other.sigmas)
    assert seen == SIZES
    prompts = loop.data.training(0, 1)
    heights = [loop.sizes.of(n, prompts).policy.generator.height for n in range(12)]  # pyright: ignore
    turns = [tuple(heights[i : i + 3]) for i in range(0, 12, 3)]
    assert {tuple(sorted(turn)) for turn in turns} == {(80, 96, 112)}
    assert len(set(turns)) > 1


def test_what_has_one_size_has_no_other(generator: Flux1Generator, tiny_config: RunConfig) -> None:
    line = "height: must be 64 for embedded:generator, which has seen no other pictures, got "
    check_sizes(generator, changed(tiny_config, rollout={"aspect_ratios": ("1:1",)}))
    with pytest.raises(ConfigError, match=f"^rollout.aspect_ratios: {line}48; leave it out$"):
        check_sizes(generator, changed(tiny_config, rollout={"aspect_ratios": ("1:1", "3:2")}))
    with pytest.raises(ConfigError, match=f"^evaluation.{line}128; leave it out$"):
        as_evaluated(generator, changed(tiny_config, evaluation={"height": 128}))


def test_the_field_is_named_that_a_generator_cannot_have(tiny_config: RunConfig) -> None:
    for field in ("height", "width"):
        config = changed(tiny_config, evaluation={field: 128})
        with pytest.raises(ConfigError, match=f"^evaluation.{field} must be null .*, got 128; "):
            as_evaluated(object(), config)  # pyright: ignore[reportArgumentType]
