"""Seconds and bytes by hand, for counts that are round numbers."""

from __future__ import annotations

import io
import json
from dataclasses import replace
from pathlib import Path

import pytest
from helpers import ROOT, changed
from rich.console import Console

from customized_grpo.config import BalanceSettings, NftAlgorithm, RunConfig, load_config
from customized_grpo.errors import ConfigError
from customized_grpo.tools.estimate.cost import (
    Cluster,
    activations,
    assumed_mfu,
    estimate,
    predict_memory,
    read_mfu,
)
from customized_grpo.tools.estimate.devices import Device
from customized_grpo.tools.estimate.encoders import EncoderCount, RewardCount
from customized_grpo.tools.estimate.table import show
from customized_grpo.tools.estimate.transformer import Tokens, TransformerCount
from customized_grpo.tools.estimate.workload import Workload, count_run

DEVICE = Device(
    name="round", bf16=100.0, float32=10.0, memory=1e6, bandwidth=1e6, link=50.0, network=5.0
)
MODEL = TransformerCount(
    parameters=1000, trained=20, forward_flops=8, forward_peak=3, merged=7, pair_flops=16,
    pair_peak=70, casts=5, checkpointed_peak=20, block=100, latents=64,
)  # fmt: skip
PICTURE = 3 * 64 * 64  # numbers; tokens are of 16 x 16 pixels
NOTHING = EncoderCount(parameters=0, flops=0, peak=0)


@pytest.fixture
def config() -> RunConfig:
    """4 prompts x 5 samples, 6 steps, 3 trained, 2 updates of 30 pairs."""
    flags = (
        "--rollout.prompts_per_rollout=4 --rollout.group_size=5 --rollout.num_steps=6 "
        "--rollout.num_trained_steps=3 --rollout.batch_size=10 --train.inner_updates=2 "
        "--train.num_updates=10 --train.micro_batch_size=6 --generator.dtype=bfloat16 "
        "--evaluation.validate_every=0"
    )
    return load_config(ROOT / "configs" / "emoji.yaml", flags.split())


def work(config: RunConfig, **fields: object) -> Workload:
    rewards = RewardCount(
        bytes=40, image_flops=2, example_flops=0, float32=0.5, peak=1, unknown=()
    )  # fmt: skip
    tokens = Tokens(target=(4, 4), references=(), text=4)
    standard = {
        "config": config, "tokens": tokens, "transformer": MODEL, "encode": NOTHING,
        "decode": NOTHING, "rewards": rewards, "evaluators": rewards, "guidance_passes": 1,
    }  # fmt: skip
    return Workload(**{**standard, **fields})


def test_seconds_are_flops_over_peak_and_mfu(config: RunConfig) -> None:
    cluster = Cluster(device=DEVICE, rollout_mfu=0.5, update_mfu=0.25)
    result = estimate(work(config), cluster)
    assert result.stages["rollout"].seconds == pytest.approx(20 * 6 * 8 / (100 * 0.5))
    assert result.stages["update"].seconds == pytest.approx(20 * 3 * 16 / (100 * 0.25))
    half = 20 * 2 / 2 / 0.5
    assert result.stages["reward"].seconds == pytest.approx(half / 10 + half / 100)
    seconds = sum(stage.seconds for stage in result.stages.values())
    assert result.seconds_per_iteration == pytest.approx(seconds)
    assert result.seconds_per_update == pytest.approx(seconds / 2)
    assert result.images_per_second == pytest.approx(20 / seconds)
    assert result.hours == pytest.approx(seconds * 5 / 3600)


@pytest.mark.slow
def test_pictures_that_are_not_trained_on_take_the_memory_of_their_size(config: RunConfig) -> None:
    larger = Tokens(target=(8, 8), references=(), text=4)
    other = work(config, tokens=larger, transformer=replace(MODEL, forward_peak=3000))
    plain, sized, alone = (
        activations(w, 1, fsdp=False, checkpointing=False)
        for w in (work(config), work(config, shown=other), other)
    )
    assert sized["pictures"] == alone["pictures"] > plain["pictures"]
    assert sized | {"pictures": 0} == plain | {"pictures": 0}
    counted = count_run(changed(config, evaluation={"height": 128}))
    assert counted.size == (64, 64)
    assert counted.shown is not None
    assert counted.shown.size == (128, 64)


def test_reading_the_weights_bounds_a_pass(config: RunConfig) -> None:
    slow = replace(DEVICE, bandwidth=10.0)
    result = estimate(work(config), Cluster(device=slow))
    assert result.stages["rollout"].seconds == 20 * 6 / 10 * (1000 * 2) / 10


def test_the_busiest_device_sets_the_time(config: RunConfig) -> None:
    one, three = (
        estimate(work(config), Cluster(device=replace(DEVICE, link=1e12), num_devices=n))
        for n in (1, 3)
    )
    share = 7 / 20  # of 20 samples on 3 devices
    assert three.stages["rollout"].seconds == pytest.approx(share * one.stages["rollout"].seconds)
    share = 4 / 10  # of the 10 samples of an update
    assert three.stages["update"].seconds == pytest.approx(share * one.stages["update"].seconds)
    assert three.device_hours == 3 * three.hours


def test_gradients_are_summed_over_the_slowest_link(config: RunConfig) -> None:
    for count, link in ((2, 50.0), (16, 5.0)):
        result = estimate(work(config), Cluster(device=DEVICE, num_devices=count))
        waits = 2 * 2 * (count - 1) / count * 4 * 20 / link
        assert result.stages["update"].communication == pytest.approx(waits)
        assert result.stages["rollout"].communication == 0


def test_sharded_weights_are_gathered_for_every_pass(config: RunConfig) -> None:
    result = estimate(work(config), Cluster(device=DEVICE, num_devices=2, fsdp=True))
    gathered = 6 * (1000 * 2) / 2 / 50  # six passes of the 10 samples of a device
    assert result.stages["rollout"].seconds == pytest.approx(gathered)
    assert result.layout == "fsdp"


def test_memory_by_hand(config: RunConfig) -> None:
    memory = estimate(work(config), Cluster(device=DEVICE, num_devices=4)).memory
    plain = memory["ddp"]
    assert plain.transformer == 1000 * 2
    assert plain.trained == 20 * (4 + 4 + 8 + 4)  # weights, gradient, two moments, average
    assert plain.rewards == 40 + 40  # with the evaluators
    kept = 3 * 2 * 64 + 64  # before and after three steps, and the last latents
    assert plain.trajectories == 5 * (kept + PICTURE) * 4
    largest = max(activations(work(config), 4, fsdp=False, checkpointing=False).values())
    assert plain.activations == largest
    assert plain.total == 2000 + 400 + 80 + plain.trajectories + largest
    assert memory["fsdp"].transformer == 1000 * 2 / 4 + 2 * 100 * 2
    assert memory["fsdp"].trained == plain.trained / 4


def test_nft_keeps_old_weights_and_their_velocities_in_place_of_trajectories(
    config: RunConfig,
) -> None:
    layout = {"fsdp": False, "checkpointing": False}
    old = work(replace(config, algorithm=NftAlgorithm()))
    memory = predict_memory(old, 4, **layout)
    assert memory.trained == 20 * (4 + 4 + 8 + 4 + 4)  # as above, and the old weights
    balanced = work(changed(old.config, advantage={"balance": BalanceSettings()}))
    more = predict_memory(balanced, 4, **layout).trained - memory.trained
    assert more == 20 * (4 + 4)  # another objective's gradient, and that without advantage
    assert memory.trajectories == 5 * (64 + PICTURE) * 4
    update = [activations(run, 4, **layout)["update"] for run in (work(config), old)]
    assert update[0] - update[1] == 3 * 3 * 64 * 4  # of three pairs of each of three samples
    on_policy = replace(config, algorithm=NftAlgorithm(old_decay=0.0))
    single = work(changed(on_policy, train={"inner_updates": 1}))
    assert predict_memory(single, 4, **layout).trained == 20 * (4 + 4 + 8 + 4)


def test_bytes_of_the_stages_by_hand(config: RunConfig) -> None:
    vae = EncoderCount(parameters=30, flops=0, peak=1000)
    run = work(config, decode=vae, guidance_passes=2)
    plain = activations(run, 4, fsdp=False, checkpointing=False)
    pairs = 3 * 3 * 2 * 64 * 4  # of three samples: copies of the rollout's, before and after
    assert plain["update"] == 6 * 70 * 2 + 2 * 7 + 5 + pairs  # the passes of guidance are both kept
    assert plain["rollout"] == 256 * 1000 + 5  # 256 pictures of 64 x 64 at once, and five scored
    without = activations(replace(run, decode=NOTHING), 4, fsdp=False, checkpointing=False)
    assert without["rollout"] == 5 * 3 + 7 + 5
    assert without["pictures"] == 6 * 3 + 7 + 6 * PICTURE * 4
    kept = activations(run, 4, fsdp=False, checkpointing=True)
    assert kept["update"] == 6 * 20 * 2 + 2 * 7 + pairs
    sharded = activations(run, 4, fsdp=True, checkpointing=False)
    assert sharded["update"] == 6 * 70 * 2 + 5 + pairs  # nothing is merged


def test_validation_pictures_are_sampled_and_scored(config: RunConfig) -> None:
    every = {"validate_every": 10, "num_validation": 40, "batch_size": 32}
    run = work(changed(config, evaluation=every))
    stages = activations(run, 1, fsdp=False, checkpointing=False)
    assert stages["pictures"] == 32 * 3 + 7 + 40 * PICTURE * 4


def test_sharded_weights_that_are_all_trained_are_gathered_in_bfloat16(config: RunConfig) -> None:
    full = replace(config, lora=None, mixed_precision="bf16")
    for run, each in ((full, 2), (replace(full, mixed_precision="no"), 4)):
        result = estimate(work(run), Cluster(device=DEVICE, num_devices=2, fsdp=True))
        assert result.memory["fsdp"].transformer == 1000 * 4 / 2 + 2 * 100 * each
        assert result.stages["rollout"].seconds == pytest.approx(6 * (1000 * each) / 2 / 50)


@pytest.mark.parametrize(
    ("sections", "bytes_"),
    [
        ({"generator": {"quantization": "int8"}}, 1000),
        ({"generator": {"dtype": "float32"}}, 4000),
    ],
)
def test_bytes_of_the_frozen_weights(config: RunConfig, sections: dict, bytes_: int) -> None:
    run = changed(config, **sections)
    assert estimate(work(run), Cluster(device=DEVICE)).memory["ddp"].transformer == bytes_


def test_offloaded_encoders_come_for_their_stage(config: RunConfig) -> None:
    text = EncoderCount(parameters=500, flops=0, peak=10)
    away = changed(config, generator={"offload": True})
    for run, encoders, encoding in ((config, 1000, 10), (away, 0, 1010)):
        counted = work(run, encode=text)
        assert estimate(counted, Cluster(device=DEVICE)).memory["ddp"].encoders == encoders
        stages = activations(counted, 1, fsdp=False, checkpointing=False)
        assert stages["encode"] == encoding


def test_float32_on_a_cpu_reaches_more_of_its_peak(config: RunConfig) -> None:
    """As measured: 3.05 s an update of configs/emoji.yaml with two threads of 140 GFLOP/s each; by
    the share of bfloat16 products on a GPU it would be 6.2 s."""
    cpu = replace(DEVICE, float32=280e9, bf16=280e9, is_cpu=True)
    mfu, on_gpu = (assumed_mfu(config, device) for device in (cpu, DEVICE))
    assert 1.415e12 / 2 / cpu.float32 / mfu == pytest.approx(3.05, rel=0.12)
    assert on_gpu == assumed_mfu(replace(config, mixed_precision="bf16"), cpu) == 0.4


def test_mfu_is_measured_or_given(tmp_path: Path) -> None:
    file = tmp_path / "mfu.json"
    file.write_text("stage ...\n" + json.dumps({"rollout_mfu": 0.6, "update_mfu": 0.5}) + "\n")
    assert read_mfu(0.3, None) == (0.3, 0.3)
    assert read_mfu(0.3, file) == (0.6, 0.5)
    file.write_text("nothing\n")
    with pytest.raises(ConfigError, match="--benchmark must end with the JSON line"):
        read_mfu(0.3, file)
    with pytest.raises(ConfigError, match="--mfu must be a share"):
        Cluster(device=DEVICE, rollout_mfu=1.5)


@pytest.mark.parametrize(
    ("share", "said"), [(0.8, ""), (0.95, "! tight: 0.1 GB to spare"), (1.05, "! does not fit")]
)
def test_what_fits_only_just_is_said(config: RunConfig, share: float, said: str) -> None:
    model = replace(MODEL, parameters=10**9)
    needed = estimate(work(config, transformer=model), Cluster(device=DEVICE)).memory["ddp"].total
    cluster = Cluster(device=replace(DEVICE, memory=needed / share))
    counted, text = work(config, transformer=model), io.StringIO()
    show(counted, cluster, estimate(counted, cluster), None, Console(file=text, width=200))
    assert said in text.getvalue()
    for other in ("! tight", "! does not fit"):
        assert (other in text.getvalue()) == said.startswith(other)
