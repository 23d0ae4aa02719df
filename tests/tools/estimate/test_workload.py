"""The work of published models and of every config, without their weights."""

from __future__ import annotations

import dataclasses
import re
from pathlib import Path
from typing import Any

import pytest
import torch
from helpers import ROOT, changed

from customized_grpo.config import BalanceSettings, LoraSettings, NftAlgorithm, load_config
from customized_grpo.errors import ConfigError
from customized_grpo.generators.flux1 import Flux1Generator
from customized_grpo.generators.lora import add_lora
from customized_grpo.generators.lora_files import Pair
from customized_grpo.rewards.endpoints.rubrics import load_rubric
from customized_grpo.rewards.endpoints.vlm_judge import VlmJudgeConfig
from customized_grpo.tools.estimate.architectures import FAMILIES, PIPELINES
from customized_grpo.tools.estimate.cards import card_for, hours_and_dollars
from customized_grpo.tools.estimate.checkpoints import (
    build,
    counted_path,
    parameters,
    pipeline_components,
)
from customized_grpo.tools.estimate.cost import activations, loading_ram, predict_memory
from customized_grpo.tools.estimate.devices import DEVICES
from customized_grpo.tools.estimate.encoders import count_rewards
from customized_grpo.tools.estimate.judges import count_judges
from customized_grpo.tools.estimate.transformer import PrefixCount, Tokens, count_transformer
from customized_grpo.tools.estimate.workload import Workload, count_run

CONFIGS = ROOT / "configs"
COUNTED = ("emoji", "flux2-klein-base", "qwen-image-2.1", "uno-paper")  # the others: `make long`


@pytest.fixture(scope="module")
def emoji() -> Workload:
    return count_run(load_config(CONFIGS / "emoji.yaml"))


@pytest.mark.parametrize(
    ("path", "name", "billions"),
    [
        ("black-forest-labs/FLUX.1-Kontext-dev", "transformer", 11.9),
        ("black-forest-labs/FLUX.2-klein-4B", "transformer", 3.9),
        ("black-forest-labs/FLUX.2-klein-9B", "transformer", 9.1),
        ("Qwen/Qwen-Image-Edit-2509", "transformer", 20.4),
        ("Qwen/Qwen-Image-2.1", "transformer", 7.1),
        ("Qwen/Qwen-Image-2.1", "text_encoder", 8.77),
        ("black-forest-labs/FLUX.1-dev", "text_encoder", 0.123),
        ("black-forest-labs/FLUX.1-dev", "text_encoder_2", 4.76),
        ("black-forest-labs/FLUX.1-dev", "vae", 0.084),
    ],
)
def test_published_models_have_their_published_size(path: str, name: str, billions: float) -> None:
    model = build(pipeline_components(path)[name], torch.bfloat16)
    assert parameters(model) / 1e9 == pytest.approx(billions, abs=min(0.06, 0.01 * billions))


@pytest.mark.slow
def test_a_pass_of_flux_by_hand() -> None:
    """Linear layers: what sees every token, half of a double block each; and the attention."""
    component = pipeline_components("black-forest-labs/FLUX.1-dev")["transformer"]
    tokens = Tokens(target=(32, 32), references=((32, 32),), text=512)
    rank = 512  # beside a bfloat16 base, not merged: a twelfth of the pass
    counted = count_transformer(component, tokens, LoraSettings(rank=rank), torch.bfloat16, True)
    length, width, double, single = 2560, 3072, 19, 38
    per_token = double * (4 + 8) * width**2 + single * (3 + 1 + 4 + 4) * width**2
    attention = (double + single) * 4 * length**2 * width
    adapters = (
        length * (double + single) * 3 * 2 * width * rank + double * length * 2 * width * rank
    )
    by_hand = 2 * (length * per_token + adapters) + attention
    assert counted.forward_flops == pytest.approx(by_hand, rel=0.01)
    assert 2.0 < counted.pair_flops / counted.forward_flops < 2.3


@pytest.mark.slow
def test_a_run_that_goes_on_trains_the_weights_of_its_lora(
    tmp_path: Path, generator: Flux1Generator
) -> None:
    """Of more blocks than are counted, and with what the KL may be relative to beside them."""
    transformer: Any = generator.transformer
    transformer.requires_grad_(False)
    layers = {n: m for n, m in transformer.named_modules() if n.endswith("attn.to_k")}
    pairs = {
        name: Pair(
            down=torch.ones(rank, layer.in_features),
            up=torch.ones(layer.out_features, rank),
            alpha=1.0,
        )
        for (name, layer), rank in zip(layers.items(), (3, 5, 5, 5, 5), strict=True)
    }
    add_lora(transformer, pairs)
    generator.save_weights(tmp_path)
    trained = sum(pair.down.numel() + pair.up.numel() for pair in pairs.values())
    flags = ["--lora", f"{{path: {tmp_path}}}"]
    kl = [*flags, "--loss.kl_weight=0.1", "--loss.kl_to=start"]
    plain, with_start = (count_run(load_config(CONFIGS / "emoji.yaml", f)) for f in (flags, kl))
    assert plain.transformer.trained == trained
    memory = [
        predict_memory(work, 1, fsdp=False, checkpointing=False) for work in (plain, with_start)
    ]
    assert memory[1].trained - memory[0].trained == 4 * trained


@pytest.mark.slow
@pytest.mark.parametrize(("every", "counted"), [(0, 0), (10, 1)])
def test_evaluators_are_there_only_if_they_validate(every: int, counted: int) -> None:
    flags = [f"--evaluation.validate_every={every}"]
    work = count_run(load_config(CONFIGS / "emoji.yaml", flags))
    assert (work.evaluators.bytes > 0) == bool(counted)


def test_a_segmenter_is_there_beside_the_reward_that_it_serves() -> None:
    (reward,) = load_config(CONFIGS / "uno-paper.yaml").rewards[:1]
    alone, both = (
        count_rewards([dataclasses.replace(reward, region=region, segmenter=path)], 1).bytes
        for region, path in (("image", None), ("subject", "CIDAS/clipseg-rd64-refined"))
    )
    assert (both - alone) / 4e6 == pytest.approx(150.7, abs=1)  # million weights, as published


def test_the_numbers_of_an_iteration(emoji: Workload) -> None:
    assert (emoji.samples, emoji.velocities, emoji.pairs) == (96, 96 * 6, 96 * 5)
    stages = {stage.name: stage for stage in emoji.stages()}
    assert stages["rollout"].flops == 96 * 6 * emoji.transformer.forward_flops
    assert stages["update"].flops == 96 * 5 * emoji.transformer.pair_flops
    assert stages["decode"].flops == 96 * emoji.decode.flops
    assert stages["encode"].flops == 8 * emoji.encode.flops
    assert stages["reward"].flops == pytest.approx(
        96 * emoji.rewards.image_flops + 8 * emoji.rewards.example_flops
    )


def test_what_is_computed_twice_is_not_useful_and_the_kl_is(emoji: Workload) -> None:
    passes = pytest.approx(emoji.pairs * emoji.transformer.forward_flops)
    plain = emoji.stages()[-1]
    again = with_fields(emoji, generator={"gradient_checkpointing": True}).stages()[-1]
    assert (again.flops, plain.again, again.again) == (plain.flops, 0, passes)
    kl = with_fields(emoji, loss={"kl_weight": 1e-3}).stages()[-1]
    assert kl.flops - plain.flops == passes
    config = dataclasses.replace(emoji.config, algorithm=NftAlgorithm())
    old = dataclasses.replace(emoji, config=config).stages()[-1]  # an old policy's
    assert (old.flops - plain.flops, old.passes) == (passes, 3 * emoji.pairs)


def test_steps_before_the_window_are_shared_by_a_group(emoji: Workload) -> None:
    late = with_fields(emoji, rollout={"window": (2, 5), "num_trained_steps": 3})
    assert late.velocities == 8 * 2 + 96 * 4
    assert with_fields(late, rollout={"shared_noise": False}).velocities == 96 * 6


def test_text_and_references_of_a_prompt_are_counted_once(emoji: Workload) -> None:
    prefix = PrefixCount(forward_flops=2e9, pair_flops=5e9)
    model = dataclasses.replace(emoji.transformer, prefix=prefix)
    config = load_config(CONFIGS / "qwen-image-2.1.yaml")
    work = dataclasses.replace(emoji, config=config, transformer=model)
    stages = {stage.name: stage for stage in work.stages()}
    assert stages["rollout"].flops == 16 * 20 * model.forward_flops + 2 * prefix.forward_flops
    update = stages["update"]
    assert update.flops == 16 * 12 * model.pair_flops + 2 * prefix.pair_flops
    assert update.again == 16 * 12 * model.forward_flops + 2 * prefix.forward_flops
    shared = with_fields(work, rollout={"window": (2, 15), "shared_noise": True})
    parts = with_fields(work, train={"inner_updates": 4, "split": "samples"})
    assert (work.prefixes, shared.prefixes, parts.prefixes) == ((2, 2, 0), (4, 2, 0), (2, 8, 0))
    sharded = dataclasses.replace(work, config=dataclasses.replace(work.config, fsdp=True))
    assert sharded.stages()[1].flops == 320 * (model.forward_flops + prefix.forward_flops)
    spent, all_of_it = (w.stages()[1].flops + w.stages()[4].flops for w in (work, sharded))
    assert work.saved == pytest.approx(1 - spent / all_of_it)
    assert (sharded.saved, emoji.saved) == (0, 0)


def test_gradients_that_are_balanced_are_counted_without_the_base(emoji: Workload) -> None:
    """Two objectives at every fourth rollout: half a rollout's pairs more, prefixes once a prompt
    whatever the updates, and no pass of the untrained model."""
    prefix = PrefixCount(forward_flops=2e9, pair_flops=5e9)
    model = dataclasses.replace(emoji.transformer, prefix=prefix)
    work = dataclasses.replace(emoji, transformer=model)
    split = {"inner_updates": 4, "split": "samples"}
    plain = with_fields(work, train=split, loss={"norm_weight": 0.1})
    balanced = with_fields(plain, advantage={"balance": BalanceSettings(every=4)})
    assert (plain.prefixes[1:], balanced.prefixes[1:]) == ((32, 0), (32, 4))
    before, now = plain.stages()[-1], balanced.stages()[-1]
    assert now.flops - before.flops == pytest.approx(240 * model.pair_flops + 4 * 5e9)
    assert now.passes - before.passes == 480
    sharded = dataclasses.replace(balanced, config=dataclasses.replace(balanced.config, fsdp=True))
    more = sharded.stages()[-1].flops - now.flops
    assert more == pytest.approx((480 - 32) * (5e9 + 2e9) + (240 - 4) * 5e9)
    at_once = [with_fields(w, train={"micro_batch_size": None}) for w in (plain, balanced)]
    memory = [activations(w, 1, fsdp=False, checkpointing=False) for w in at_once]
    assert memory[1]["update"] > 1.5 * memory[0]["update"], "the whole rollout at once"
    nft = dataclasses.replace(balanced.config, algorithm=NftAlgorithm())  # one without advantage
    assert dataclasses.replace(balanced, config=nft).measurements == 3 / 4 > balanced.measurements


def with_fields(work: Workload, **sections: dict) -> Workload:
    return dataclasses.replace(work, config=changed(work.config, **sections))


@pytest.mark.parametrize(
    ("kind", "path", "counted"),
    [
        ("flux-kontext", "models/kontext", "black-forest-labs/FLUX.1-Kontext-dev"),
        ("flux2-klein", "models/FLUX.2-klein-9B", "black-forest-labs/FLUX.2-klein-base-9B"),
        ("flux2-klein", "models/klein", "black-forest-labs/FLUX.2-klein-base-4B"),
        ("uno", "black-forest-labs/FLUX.1-dev", "black-forest-labs/FLUX.1-dev"),
    ],
)
def test_weights_that_are_not_there_are_counted_as_their_family(
    kind: str, path: str, counted: str
) -> None:
    assert counted_path(kind, path) == counted
    assert counted in PIPELINES


def test_unknown_checkpoints_are_named() -> None:
    assert set(FAMILIES.values()) <= set(PIPELINES)
    with pytest.raises(ConfigError, match=r"path: 'someone/something' has no readable"):
        counted_path("a-plug-of-others", "someone/something")


def test_a_run_says_what_it_was_counted_as(
    emoji: Workload, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert emoji.stand_in == ""
    monkeypatch.setitem(FAMILIES, "flux-kontext", emoji.config.generator.path)  # pyright: ignore
    elsewhere = with_fields(emoji, generator={"path": "models/kontext"}).config
    assert count_run(elsewhere).stand_in == "embedded:generator"


def text_tokens(criterion: str, question: int = 0) -> float:
    asked = load_rubric(criterion).questions[question]
    return len(asked.system + asked.user) / 4 + 64


def test_a_judge_is_asked_about_each_picture_of_the_run(emoji: Workload) -> None:
    """80 updates, 2 a rollout of 96; validated at 0, 20, ... 80, on 32 examples each, which the
    rewards score too; asked where the KL shall hold, an evaluator sees all samples."""
    judge = VlmJudgeConfig(
        objective="identity", criterion="identity", base_url="http://127.0.0.1:9/v1", model="m",
        max_side=280, price_prompt=2.0, price_completion=10.0,
    )  # fmt: skip
    config = dataclasses.replace(emoji.config, rewards=(judge,), evaluators=(judge,))
    rollouts, validations = count_judges(dataclasses.replace(emoji, config=config))
    assert (rollouts.requests, validations.requests) == (40 * 96 + 5 * 32, 5 * 32)
    text = text_tokens("identity")
    assert rollouts.tokens == round(text + 64 * 64 / 784 + 100)  # the picture, and a photo
    each = (rollouts.tokens * 2 + 256 * 10) / 1e6
    assert rollouts.cost == pytest.approx(4000 * each)
    gated = changed(config, loss={"kl_weight": 0.1, "kl_share": 0.1})
    _, validations = count_judges(dataclasses.replace(emoji, config=gated))
    assert validations.requests == 40 * 96 + 5 * 32
    free = dataclasses.replace(judge, criterion="prompt", price_prompt=None, price_completion=None)
    config = dataclasses.replace(config, rewards=(free,), evaluators=())
    (counted,) = count_judges(dataclasses.replace(emoji, config=config))
    assert counted.cost is None
    assert counted.tokens == round(text_tokens("prompt") + 64 * 64 / 784)
    assert count_judges(emoji) == ()


def test_a_ranking_is_one_request_a_group_and_a_rubric_one_a_question(emoji: Workload) -> None:
    """40 rollouts of 8 groups of 12; 5 validations of 32, which rank nothing."""
    rank = VlmJudgeConfig(
        objective="prompt", criterion="prompt-ranking", base_url="http://127.0.0.1:9/v1", model="m",
        price_prompt=0.0, price_completion=1.0,
    )  # fmt: skip
    edit = dataclasses.replace(rank, criterion="edit-score", max_side=280, max_tokens=100)
    config = dataclasses.replace(emoji.config, rewards=(rank, edit))
    rollout = config.rollout
    assert (rollout.prompts_per_rollout, rollout.group_size) == (8, 12)
    ranked, scored = count_judges(dataclasses.replace(emoji, config=config))
    assert ranked.requests == 40 * 8
    assert ranked.tokens == round(text_tokens("prompt-ranking") + 12 * 64 * 64 / 784)
    assert ranked.cost == pytest.approx(320 * 512 / 1e6)
    assert scored.requests == 2 * (40 * 96 + 5 * 32)
    texts = text_tokens("edit-score") + text_tokens("edit-score", 1)
    assert scored.tokens == round((texts + 2 * 64 * 64 / 784 + 100) / 2)  # a photo in one of them
    assert scored.cost == pytest.approx(scored.requests * 100 / 1e6)


@pytest.mark.parametrize(("gigabytes", "card"), [(20, "rtx4090"), (30, "l40s"), (700, "b200")])
def test_the_card_is_the_smallest_usual_one_that_fits(
    emoji: Workload, monkeypatch: pytest.MonkeyPatch, gigabytes: float, card: str
) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert card_for(emoji, 1).name.startswith("this CPU")
    other = with_fields(emoji, generator={"path": "models/kontext"})
    large = dataclasses.replace(
        other, rewards=dataclasses.replace(emoji.rewards, bytes=gigabytes * 1e9)
    )
    assert card_for(large, 1).name == card
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda: "NVIDIA RTX A6000")
    assert card_for(large, 1).name == "a6000", "the one that is here"
    here = dataclasses.replace(large, config=dataclasses.replace(large.config, device="cpu"))
    assert card_for(here, 1).name.startswith("this CPU")


def test_loading_reads_what_is_quantised_as_a_whole(emoji: Workload) -> None:
    weights, others = (
        emoji.transformer.parameters,
        emoji.encode.parameters + emoji.decode.parameters,
    )
    half = with_fields(emoji, generator={"dtype": "bfloat16", "quantization": "int8"})
    assert loading_ram(half) == 2 * (weights + others)
    away = with_fields(half, generator={"offload": True})
    assert loading_ram(away) == pytest.approx(2 * weights + 2 * others * 4 / 3)


@pytest.mark.slow
@pytest.mark.parametrize(
    "path",
    [
        pytest.param(path, id=path.stem, marks=[] if path.stem in COUNTED else pytest.mark.long)
        for path in sorted(CONFIGS.glob("*.yaml"))
    ],
)
def test_every_config_can_be_counted(path: Path) -> None:
    config = load_config(path)
    work = count_run(config)
    judged_elsewhere = [r.name for r in config.rewards if isinstance(r, VlmJudgeConfig)]
    idle = {stage.name for stage in work.stages() if stage.flops == 0}
    assert idle == ({"reward"} if len(judged_elsewhere) == len(config.rewards) else set())
    assert work.rewards.unknown == tuple(sorted(judged_elsewhere))
    assert price_cells(path.stem) in (
        {},
        {n: hours_and_dollars(work, c) for n, c in DEVICES.items()},
    )


def price_cells(config: str) -> dict[str, str]:
    """Card -> the cell of a config in the table of docs/rented_gpu.md; {}: it is not there."""
    lines = (ROOT / "docs" / "rented_gpu.md").read_text(encoding="utf-8").splitlines()
    table = [line for line in lines if line.startswith(("| |", "| `"))]
    head, *rows = [[cell.strip() for cell in line.split("|")[1:-1]] for line in table]
    if f"`{config}`" not in head:
        return {}
    column = head.index(f"`{config}`")
    return {row[0].split("`")[1]: row[column] for row in rows}


HEADERS = ("flux2-klein-base", "flux2-klein", "flux-kontext-24gb", "flux-kontext", "uno-paper",
           "qwen-image-2.1", "qwen-image-edit-plus")  # fmt: skip


@pytest.mark.parametrize("config", HEADERS)
def test_the_head_of_a_config_says_hours_and_dollars_on_its_card(config: str) -> None:
    text = " ".join((CONFIGS / f"{config}.yaml").read_text().replace("\n#", "").split())
    card, cell = re.findall(r"`--device (\S+)`: ([\d.]+ h, \$[\d.]*\d)", text)[0]
    assert price_cells(config)[card].removeprefix("~ ") == cell


def test_a_price_says_where_the_run_fits_only_just(emoji: Workload) -> None:
    needed = predict_memory(emoji, 1, fsdp=False, checkpointing=False).total
    cards = (dataclasses.replace(DEVICES["h100"], memory=needed / s) for s in (0.89, 0.91, 1.1))
    roomy, tight, small = (hours_and_dollars(emoji, card) for card in cards)
    assert (tight, small) == (f"~ {roomy}", "-")
    assert " h, $" in roomy
    assert not roomy.startswith("~")
