"""What sharding is for: no process holds a whole model, in whatever precision."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any
from weakref import ref

import pytest
import torch
import torch.distributed as dist
from chaos import small_run
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

from customized_grpo.cli.main import _set_up_output
from customized_grpo.config import dump_config
from customized_grpo.generators.flux1 import Flux1Generator
from customized_grpo.runs.sharding import shard
from customized_grpo.training.policy import Policy
from customized_grpo.types import Example


class Casts(TorchDispatchMode):
    """Copies in bfloat16 of float32 tensors of some shapes, and which of them are alive."""

    def __init__(self, shapes: set[torch.Size]) -> None:
        super().__init__()
        self._shapes, self._made = shapes, list[Any]()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        is_cast = func is torch.ops.aten._to_copy.default and args[0].dtype == torch.float32
        if is_cast and result.dtype == torch.bfloat16 and result.shape in self._shapes:
            self._made.append(ref(result))
        return result

    def alive(self) -> int:
        made = [cast() for cast in self._made]
        return sum(cast is not None and cast.untyped_storage().nbytes() > 0 for cast in made)


@pytest.fixture
def alone() -> Iterator[None]:
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    yield
    dist.destroy_process_group()


def policy_of(generator: Flux1Generator, dtype: torch.dtype | None, sharded: bool) -> Policy:
    generator.transformer.requires_grad_(True).float()
    if sharded:
        shard(generator.transformer, torch.device("cpu"), 1, dtype)
    return Policy(
        generator=generator, sigmas=generator.sigmas(4, 1.0), dynamics="flow", noise_level=0.7,
        autocast=True,
    )  # fmt: skip


def velocity(policy: Policy, examples: list[Example]) -> Tensor:
    noise = policy.generator.noise(2, torch.Generator().manual_seed(0))
    conditioning = policy.generator.encode(examples[:2])
    return policy.velocity(noise, torch.tensor([0, 2]), conditioning)


@pytest.mark.parametrize("gradients", [False, True])
def test_no_second_copy_of_sharded_weights_stays_in_bfloat16(
    generator: Flux1Generator, examples: list[Example], alone: None, gradients: bool
) -> None:
    """Autocast keeps the casts of trained weights, and the backward pass those it will read."""
    policy = policy_of(generator, torch.bfloat16, sharded=True)
    blocks = (
        *generator.transformer.transformer_blocks,
        *generator.transformer.single_transformer_blocks,
    )
    linear = [m for block in blocks for m in block.modules() if isinstance(m, nn.Linear)]
    counted, found = Casts({m.weight.shape for m in linear}), []
    inner = generator._predict

    def predict(*inputs: Any) -> Tensor:
        output = inner(*inputs)
        found.append(counted.alive())  # at the end of the pass, within autocast
        return output

    generator._predict = predict  # pyright: ignore[reportAttributeAccessIssue]
    with counted, torch.set_grad_enabled(gradients):
        output = velocity(policy, examples)
    assert output.dtype == torch.float32
    assert len(linear) > 10
    assert found == [0]


@pytest.mark.parametrize("dtype", [None, torch.bfloat16])
def test_gathered_in_bfloat16_it_is_the_model_under_autocast(
    generator: Flux1Generator, examples: list[Example], alone: None, dtype: torch.dtype | None
) -> None:
    """Noise level and latents stay float32, gradients too."""
    plain = velocity(policy_of(generator, None, sharded=False), examples)
    plain.square().mean().backward()
    gradients = [p.grad for p in generator.transformer.parameters()]
    generator.transformer.zero_grad()
    sharded = velocity(policy_of(generator, dtype, sharded=True), examples)
    sharded.square().mean().backward()
    assert torch.equal(sharded, plain)
    for parameter, gradient in zip(generator.transformer.parameters(), gradients, strict=True):
        assert parameter.dtype == parameter.grad.dtype == torch.float32
        apart = (parameter.grad.full_tensor() - gradient).norm() / gradient.norm()
        assert apart < 0.02  # bfloat16 has 8 bits


def test_the_command_does_not_show_what_fsdp_says_of_views(
    generator: Flux1Generator, examples: list[Example], alone: None
) -> None:
    """That gradients are right all the same is the test above."""
    policy = policy_of(generator, None, sharded=True)
    with warnings.catch_warnings(record=True) as shown:
        warnings.simplefilter("always")
        _set_up_output()
        velocity(policy, examples)
    assert not [warning for warning in shown if "view tensor" in str(warning.message)]


@pytest.mark.slow
def test_only_the_first_process_keeps_the_training_state(tmp_path: Path) -> None:
    flags = "--lora null --train.inner_updates 1 --fsdp true --train.ema_decay 0.9"
    config = small_run(tmp_path, "run", 2, *flags.split())
    file = tmp_path / "run.yaml"
    file.write_text(dump_config(config))
    script = Path(__file__).with_name("kept_states.py")
    launcher = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2"]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    subprocess.run([*launcher, script, file], env=environment, check=True, timeout=250)
    first, second = (json.loads((tmp_path / f"kept-{r}.json").read_text()) for r in (0, 1))
    assert first["bytes"] > 1e8
    assert second["bytes"] == 0
    assert second["peak"] < first["bytes"] / 10 < first["peak"]
