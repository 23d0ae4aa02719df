"""Two processes compute what one does: on the CPU, with gloo, started by torchrun."""

from __future__ import annotations

import dataclasses
import json
import math
import signal
import time
from pathlib import Path

import pytest
import torch
from chaos import content, small_run
from helpers import changed, finished, perturb_lora, torchrun, weights
from safetensors.torch import load_file

from customized_grpo.config import GrpoAlgorithm, LoraSettings, MeasuredSchedule, RunConfig
from customized_grpo.errors import ConfigError
from customized_grpo.generators.flux_kontext import FluxKontextConfig
from customized_grpo.generators.lora import attach_lora
from customized_grpo.rewards.ballots import VOTES
from customized_grpo.rewards.endpoints.vlm_judge import VlmJudgeConfig
from customized_grpo.rewards.votes import VotesConfig
from customized_grpo.runs.checkpoint import checkpoint_folders
from customized_grpo.runs.files import START
from customized_grpo.runs.ranks import Ranks
from customized_grpo.training.build import build_generator
from customized_grpo.training.loss import policy_batch
from customized_grpo.training.train import _check_even, train
from customized_grpo.types import Advantages, Rollout

pytestmark = pytest.mark.slow


def metrics(run: Path) -> list[dict[str, float]]:
    rows = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    return [{k: v for k, v in row.items() if not k.startswith("seconds/")} for row in rows]


def assert_went_the_same_way(
    ours: dict[str, torch.Tensor],
    theirs: dict[str, torch.Tensor],
    start: dict[str, torch.Tensor] | None = None,
) -> None:
    """What two runs differ by is a small part of the way that they went.

    Weight by weight they need not agree: where a gradient is near 0, Adam makes whole steps of its
    rounding, in other weights on each machine. A sample that one of them lacks would be far more.

    Args:
        ours, theirs: the trained weights.
        start: what they were before; otherwise they are a LoRA's, whose B was 0.
    """
    assert ours.keys() == theirs.keys()
    start = start or {key: torch.zeros(()) for key in ours if "lora_B" in key}
    way = sum(float((ours[key] - begin).square().sum()) for key, begin in start.items())
    apart = sum(float((tensor - theirs[key]).square().sum()) for key, tensor in ours.items())
    assert way > 0
    assert math.sqrt(apart / way) < 1e-2


def load_base(config: RunConfig) -> dict[str, torch.Tensor]:
    return build_generator(config, torch.device("cpu")).transformer.state_dict()


def save_lora(folder: Path) -> None:
    generator = FluxKontextConfig(path="embedded:generator").build(torch.device("cpu"))
    attach_lora(generator.transformer, LoraSettings(rank=4), generator.lora_targets)
    perturb_lora(generator.transformer, 1e-3)
    generator.save_weights(folder)


@pytest.mark.parametrize(
    ("name", "flags"),
    [
        # two groups of 3 over 2 processes: split, and unevenly; ratios and KL are used. The rate is
        # low, here and below, where few samples leave some gradients near 0: Adam makes whole steps
        # of their rounding (1 of 3.5 million weights differed by over 1e-6, in parts 29).
        (
            "split",
            "--rollout.group_size 3 --train.num_updates 6 --loss.kl_weight 0.01 "
            "--train.learning_rate 1e-4 --loss.kl_share 0.4",
        ),
        pytest.param(
            "whole",
            "--train.inner_updates 1 --train.num_updates 5 --train.micro_batch_size 3",
            marks=pytest.mark.long,
        ),
        # whole groups, as many in each process; ratios and KL are used
        (
            "sharded",
            "--rollout.prompts_per_rollout 4 --rollout.group_size 3 --train.num_updates 6 "
            "--loss.kl_weight 0.01 --train.micro_batch_size 3 --fsdp true",
        ),
        # A part of each group an update: split over the processes, or sharded with the model.
        pytest.param(
            "parts",
            "--rollout.prompts_per_rollout 1 --rollout.group_size 9 --train.num_updates 6 "
            "--train.inner_updates 3 --train.split samples --train.learning_rate 1e-4",
            marks=pytest.mark.long,
        ),
        pytest.param(
            "sharded-parts",
            "--rollout.group_size 4 --train.num_updates 6 --train.split samples --fsdp true "
            "--train.learning_rate 1e-4",
            marks=pytest.mark.long,
        ),
        # Gradients of the objectives, of all processes' pairs: whole, or in parts.
        pytest.param(
            "balanced",
            "--rollout.group_size 3 --train.num_updates 6 --train.learning_rate 1e-4 "
            '--advantage.balance {"every":2} --loss.kl_mask 1e-5',
            marks=pytest.mark.long,
        ),
        pytest.param(
            "sharded-balanced",
            "--rollout.prompts_per_rollout 4 --train.num_updates 6 --train.learning_rate 1e-4 "
            '--fsdp true --advantage.balance {"every":2} --loss.norm_weight 0.1',
            marks=pytest.mark.long,
        ),
        pytest.param(
            "measured",
            '--advantage.schedule {"type":"measured","num_prompts":2,"num_samples":3} '
            "--train.num_updates 6 --train.learning_rate 1e-4",
            marks=pytest.mark.long,
        ),
        pytest.param(
            "sharded-gate",
            "--advantage.shaping gate --advantage.center false --advantage.schedule.high 0.7 "
            "--rollout.prompts_per_rollout 4 "
            "--train.num_updates 6 --train.learning_rate 1e-4 --fsdp true",
            marks=pytest.mark.long,
        ),
        # Noise by the sample, and an old policy that samples: in each process, or in parts.
        (
            "nft",
            '--algorithm {"type":"nft","old_decay":0.5,"old_decay_rate":0.1} '
            "--rollout.group_size 3 --train.num_updates 6 --train.learning_rate 1e-4 "
            "--rollout.dynamics ode --rollout.shared_noise false --loss.kl_weight 0.01 "
            "--loss.step_weight none",
        ),
        pytest.param(
            "awm",
            '--algorithm {"type":"awm","old_decay":0.5,"old_decay_rate":0.1} '
            "--rollout.group_size 3 --train.num_updates 6 --train.learning_rate 1e-4 "
            "--rollout.dynamics ode --rollout.shared_noise false --loss.step_weight none",
            marks=pytest.mark.long,
        ),
        pytest.param(
            "sharded-nft",
            '--algorithm {"type":"nft","old_decay":0.5,"old_decay_rate":0.1} --fsdp true '
            "--rollout.prompts_per_rollout 4 --train.num_updates 6 --train.learning_rate 1e-4 "
            '--loss.step_weight none --advantage.balance {"every":2}',
            marks=pytest.mark.long,
        ),
        # The LoRA that the run began with, in parts beside the trained one.
        pytest.param(
            "sharded-start",
            '--lora {"path":"LORA"} --loss.kl_weight 0.1 --loss.kl_to start --fsdp true '
            "--rollout.prompts_per_rollout 4 --train.num_updates 6 --train.learning_rate 1e-4",
            marks=pytest.mark.long,
        ),
        (
            "full",
            "--lora null --train.inner_updates 1 --train.learning_rate 1e-4 --fsdp true "
            "--loss.step_weight none",
        ),
    ],
)
def test_two_processes_are_one(tmp_path: Path, name: str, flags: str) -> None:
    # The rank of the config: that of the other tests leaves a gradient near 0 in "sharded", too.
    flags = f"--lora.rank 128 {flags} --evaluation.num_validation 3"  # shared unevenly, too
    if "LORA" in flags:
        save_lora(tmp_path / "lora")
        flags = flags.replace("LORA", str(tmp_path / "lora"))
    config = small_run(tmp_path, name, 5, *flags.split())
    one = train(config)  # alone there is nothing to shard
    two = small_run(tmp_path, f"{name}-two", 5, *flags.split())
    out, _ = finished(torchrun(two, tmp_path))
    run = tmp_path / f"{name}-two"
    assert out == f"run: {run}\n"
    ours, theirs = weights(one), weights(run)
    base = load_base(config) if config.lora is None else None
    if (run / START).exists():
        base = load_file(run / START / "pytorch_lora_weights.safetensors")
    assert_went_the_same_way(ours, theirs, base)
    for row, other in zip(metrics(one), metrics(run), strict=True):
        assert row == pytest.approx(other, rel=2e-3, abs=1e-4)  # the loss is a sum around 0
    assert (one / "advantages.jsonl").read_text().count("\n") == (
        run / "advantages.jsonl"
    ).read_text().count("\n")


@pytest.mark.long
def test_two_processes_rank_as_one(tmp_path: Path) -> None:
    """Each asks for its own groups, whole, though micro-batches split them."""
    rollout = "--rollout.prompts_per_rollout 4 --rollout.batch_size 3 --rollout.group_size 4"
    flags = ["--train.learning_rate", "1e-4", *rollout.split()]
    servers = pytest.importorskip("servers", reason="needs the extra [serve]")
    with servers.scripted_server(servers.ranked_by_redness) as (url, requests):
        rank = VlmJudgeConfig(
            objective="prompt", criterion="prompt-ranking", base_url=f"{url}/v1", model="m"
        )
        weighed = []
        for name in ("one", "two"):
            config = small_run(tmp_path, name, 4, *flags)
            identity = next(r for r in config.rewards if r.objective == "identity")
            config = dataclasses.replace(config, rewards=(identity, rank))
            if name == "one":
                weighed.append(weights(train(config)))
                alone = len(requests)
            else:
                finished(torchrun(config, tmp_path))
                weighed.append(weights(tmp_path / name))
    sizes = [len(servers.pictures_of(r)) for r in requests if r.method == "POST"]
    assert set(sizes) == {4}
    assert len(sizes) == 2 * (alone - 1)  # but for the GET of the start
    assert_went_the_same_way(*weighed)


@pytest.mark.long
def test_two_processes_ask_people_as_one(tmp_path: Path) -> None:
    """Each about its own groups, whole and once, and all go on when the last is answered."""
    voter = pytest.importorskip("voter", reason="cgrpo vote needs the extra [playground]")
    rollout = "--rollout.prompts_per_rollout 4 --rollout.batch_size 3 --rollout.group_size 3"
    weighed, asked = [], []
    for name in ("one", "two"):
        config = small_run(tmp_path, name, 4, "--train.learning_rate", "1e-4", *rollout.split())
        identity = next(r for r in config.rewards if r.objective == "identity")
        votes = VotesConfig(objective="prompt", choice="best-and-worst")
        config = dataclasses.replace(config, rewards=(identity, votes))
        with voter.Voter(tmp_path / name / "votes"):
            if name == "one":
                train(config)
            else:
                finished(torchrun(config, tmp_path))
        weighed.append(weights(tmp_path / name))
        lines = (tmp_path / name / "votes" / VOTES).read_text().splitlines()
        asked.append([json.loads(line)["group"] for line in lines])
    assert set(asked[0][:4]) == set(asked[1][:4])  # later pictures are equal but for rounding
    assert [len(set(groups)) for groups in asked] == [len(groups) for groups in asked] == [8, 8]
    assert_went_the_same_way(*weighed)


@pytest.mark.parametrize("fsdp", [pytest.param("false", marks=pytest.mark.long), "true"])
def test_a_run_goes_on_with_another_number_of_processes(tmp_path: Path, fsdp: str) -> None:
    # A low rate, for Adam makes whole steps of the rounding of gradients near 0.
    flags = ("--rollout.prompts_per_rollout", "4", "--train.learning_rate", "1e-4")
    straight = train(small_run(tmp_path, "straight", 8, *flags))
    config = small_run(tmp_path, "two", 8, "--fsdp", fsdp, *flags)
    process = torchrun(config, tmp_path)
    while len(checkpoint_folders(tmp_path / "two")) < 1 and process.poll() is None:
        time.sleep(0.1)
    process.send_signal(signal.SIGTERM)
    _, errors = process.communicate(timeout=120)
    assert process.returncode != 0
    if not (tmp_path / "two" / "finished.json").exists():
        assert "stopped by SIGTERM" in errors
    run = train(config, resume=True)
    one, two = content(straight), content(run)
    assert one.keys() == two.keys()
    assert_went_the_same_way(weights(straight), weights(run))


def test_a_process_that_fails_brings_the_others_down(tmp_path: Path) -> None:
    config = small_run(tmp_path, "failing", 4, "--rollout.group_size", "2")
    (tmp_path / "failing").mkdir()
    (tmp_path / "failing" / "something").touch()
    process = torchrun(config, tmp_path)
    _, errors = process.communicate(timeout=120)
    assert process.returncode != 0
    assert "already holds something else" in errors


def test_what_does_not_divide_is_refused_with_numbers_that_would(tmp_path: Path) -> None:
    flags = "--fsdp true --rollout.prompts_per_rollout 10 --train.inner_updates 2"
    config = small_run(tmp_path, "uneven", 4, *flags.split())
    _check_even(config, Ranks(world_size=5))
    parts = changed(config, rollout={"group_size": 2}, train={"split": "samples"})
    _check_even(parts, Ranks(world_size=10))
    with pytest.raises(
        ConfigError, match=r"multiple of processes \(4\) with fsdp, got 10; 8 or 12"
    ):
        _check_even(parts, Ranks(world_size=4))
    with pytest.raises(
        ConfigError,
        match=r"^rollout.prompts_per_rollout: must be a multiple of .* \(2 x 4 = 8\) with fsdp, "
        "got 10; 8 or 16 would do$",
    ):
        _check_even(config, Ranks(world_size=4))
    schedule = {"schedule": MeasuredSchedule(num_prompts=10)}
    measured = changed(small_run(tmp_path, "measured", 4), advantage=schedule)
    _check_even(measured, Ranks(world_size=5))
    with pytest.raises(
        ConfigError,
        match=r"^advantage.schedule.num_prompts: must be a multiple of the processes \(4\), "
        "got 10; 12 would do$",
    ):
        _check_even(measured, Ranks(world_size=4))


def test_an_invalid_sample_counts_for_nothing_where_it_must_be_computed() -> None:
    """Its own numbers may be anything; its pairs have weight and advantage 0."""
    values = torch.arange(12.0).view(3, 2, 2)
    values[1, 0] = torch.nan
    rollout = Rollout(
        latents=values,
        next_latents=values,
        log_probs=values[..., 0],
        step_index=torch.tensor([[0, 1]] * 3),
        sigmas=torch.linspace(1, 0, 4),
        images=torch.zeros(3, 3, 1, 1),
        group_ids=torch.zeros(3, dtype=torch.int64),
        final_latents=values[:, 0],
        seeds=torch.arange(3),
    )
    valid = torch.tensor([True, False, True])
    per_step = torch.ones(3, 3) * valid[:, None]
    advantages = Advantages(per_objective=torch.ones(3, 2), per_step=per_step, valid=valid)
    kept = policy_batch(
        rollout,
        advantages,
        torch.arange(3),
        torch.ones(rollout.sigmas.numel() - 1),
        GrpoAlgorithm().losses,
        keep_invalid=True,
    )
    left = policy_batch(
        rollout,
        advantages,
        torch.arange(3),
        torch.ones(rollout.sigmas.numel() - 1),
        GrpoAlgorithm().losses,
    )
    assert kept.weight.tolist() == [1, 1, 0, 0, 1, 1] == kept.advantage.tolist()
    assert left.weight.tolist() == [1, 1, 1, 1]
    is_counted = kept.weight.bool()
    for field in dataclasses.fields(kept):
        values = getattr(kept, field.name)
        if isinstance(values, torch.Tensor):
            assert values.isfinite().all()
            assert torch.equal(values[is_counted], getattr(left, field.name)), field.name


def test_shares_cover_every_row_once_and_are_even() -> None:
    chunks = [torch.arange(7), torch.arange(7, 12)]
    shares = Ranks(world_size=3).split(chunks)
    assert sorted(torch.cat(shares).tolist()) == list(range(12))
    for chunk in chunks:
        sizes = [sum(row in chunk for row in share) for share in shares]
        assert max(sizes) - min(sizes) <= 1
    with pytest.raises(ConfigError, match="5 samples per update must be at least one for each"):
        Ranks(world_size=6).split(chunks)
