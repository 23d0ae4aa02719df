"""The configuration: what a file says is what the run gets, or one line says why not."""

import inspect
import shlex
from dataclasses import MISSING, fields, replace
from pathlib import Path
from typing import Any, get_args

import pytest
from helpers import ROOT
from hypothesis import given
from hypothesis import strategies as st
from tiny_plugs import YAML, TinyGenerator, TinyReward

from customized_grpo import ops, registry
from customized_grpo.config import (
    AdvantageConfig,
    ConstantSchedule,
    CosineSchedule,
    CustomSchedule,
    LinearSchedule,
    LoraSettings,
    MeasuredSchedule,
    NftAlgorithm,
    RolloutConfig,
    RunConfig,
    ScheduleConfig,
    TrainConfig,
    check_config,
    dump_config,
    explain_batch,
    list_fields,
    load_config,
)
from customized_grpo.config.decoding import decode
from customized_grpo.config.yaml_text import Dumper, parse_yaml
from customized_grpo.data.folder import FolderConfig
from customized_grpo.errors import ConfigError
from customized_grpo.rewards.ballots import Ballots
from customized_grpo.rewards.endpoints.vlm_judge import VlmJudgeConfig
from customized_grpo.rewards.votes import VotesConfig

CONFIGS = sorted((Path(__file__).parents[1] / "configs").glob("*.yaml"))
NFT = ("--algorithm", "{type: nft}")
AWM = ("--algorithm", "{type: awm}")
ODE = ("--rollout.dynamics", "ode", "--rollout.shared_noise", "false")


@pytest.fixture
def load(tmp_path):
    def load(*overrides: str, text: str = YAML) -> RunConfig:
        path = tmp_path / "run.yaml"
        path.write_text(text)
        return load_config(path, overrides)

    return load


def error_of(load, *overrides: str, text: str = YAML) -> str:
    with pytest.raises(ConfigError) as caught:
        load(*overrides, text=text)
    message = str(caught.value)
    assert "\n" not in message
    assert message.strip()
    return message


def test_a_file_gives_its_values_and_the_defaults(load):
    config = load()
    assert config.generator == TinyGenerator(path="here")
    assert [reward.label for reward in config.rewards] == ["face", "text"]
    assert config.rollout == RolloutConfig(num_steps=12, num_trained_steps=7, prompts_per_rollout=8)
    assert config.lora == LoraSettings()
    assert config.advantage == AdvantageConfig()
    assert config.evaluators == ()


@pytest.mark.parametrize("path", CONFIGS, ids=lambda path: path.name)
def test_every_shipped_config_loads_and_dumps(path, tmp_path):
    config = load_config(path)
    copy = tmp_path / "copy.yaml"
    copy.write_text(dump_config(config))
    assert load_config(copy) == config


@given(
    name=st.from_regex(r"[A-Za-z0-9][A-Za-z0-9._-]{0,8}", fullmatch=True),
    path=st.text(st.characters(exclude_categories=("Cs", "Cc"))),
    rate=st.floats(min_value=1e-300, max_value=1e300),
)
def test_a_dump_loads_back_equal(tmp_path_factory, name, path, rate):
    file = tmp_path_factory.getbasetemp() / "dump.yaml"
    file.write_text(YAML)
    config = load_config(file)
    config = replace(
        config,
        name=name,
        generator=replace(config.generator, path=path),
        train=replace(config.train, learning_rate=rate),
        lora=None,
        advantage=AdvantageConfig(gamma=0.3, schedule=CosineSchedule(low=0.1)),
    )
    file.write_text(dump_config(config), encoding="utf-8")
    assert load_config(file) == config


@given(st.text() | st.floats(allow_nan=False) | st.integers() | st.booleans() | st.none())
def test_the_yaml_dialect_reads_what_it_writes(value):
    import yaml

    assert parse_yaml(yaml.dump([value], Dumper=Dumper), "") == [value]


@pytest.mark.parametrize(
    ("text", "value"),
    [("1e-4", 1e-4), ("1.5E3", 1500.0), ("-2", -2), (".5", 0.5), ("", None), ("~", None)]
    + [(word, word) for word in ("no", "yes", "on", "1_000", "0x10", "012", "1:30", "2026-11-23")],
)
def test_plain_scalars_are_yaml_1_2(text, value):
    read = parse_yaml(text, "")
    assert read == value
    assert type(read) is type(value)


@pytest.mark.parametrize(
    ("old", "new", "expected"),
    [
        ("num_steps", "num_stepz", ["rollout.num_stepz", "did you mean 'num_steps'?"]),
        ("name: test", "nmae: test", ["nmae must be a known field", "'name'"]),
        ("path: here", "pth: here", ["generator.pth", "did you mean 'path'?"]),
        ("path: here", "size: 3", ["generator.path must be given", "add `path: ...`"]),
        ("path: here", "path: 3", ["generator.path must be a valid string, got 3; quote it"]),
        ("steps: 12", "steps: '12'", ["rollout.num_steps", 'integer, got "12"', "default is 25"]),
        ("steps: 12", "steps: true", ["rollout.num_steps", "got true"]),
        ("steps: 12", "steps: 12, shared_noise: yes", ["write true or false"]),
        ("steps: 12", "steps: 12, group_size: 1", ["rollout.group_size", "equal to 2, got 1"]),
        (
            "name: test",
            "name: test\ncompile: true\nfsdp: true",
            ["fsdp must be false with compile, got true"],
        ),
        ("steps: 12", "steps: 7", ["rollout.num_trained_steps must be at most", "= 6, got 7"]),
        ("steps: 12", "steps: 12, noise_level: .nan", ["rollout.noise_level", "finite", "NaN"]),
        ("steps: 12", "steps: 12, shift: .inf", ["rollout.shift", "finite number, got Infinity"]),
        ("steps: 12", "steps: 12, dynamics: flaw", ["rollout.dynamics", "did you mean 'flow'?"]),
        ("steps: 12", "steps: 12, num_steps: 9", ["line 7", "duplicate key 'num_steps'"]),
        ("name: test", "name: ../test", ["name must match pattern", '"../test"']),
        ("name: test", "name: test\nlora: yes", ["lora must be a mapping", '"yes"']),
        ("name: test", "name: test\ntrain: {betas: [0.9]}", ["train.betas.1 must be given"]),
        ("TinyReward", "TinyRewart", ["rewards.0.type must exist", "'TinyReward'"]),
        ("name: face", "scale: 0", ["rewards.0: scale must not be 0"]),
        ("name: face", "name: text", ["rewards.1.name must be unique, got 'text'"]),
        ("name: face", "weight: 0", ["rewards.0.weight must be greater than 0, got 0"]),
        ("name: face", "weight: 2", ["rewards.0.weight must be left out", "only", "got 2; it"]),
        ("objective: prompt", "x: 1", ["rewards.1.x must be a known field", "objective"]),
        ("tiny_plugs:TinyData", "emojy", ["data.type must be one of", "did you mean 'emoji'?"]),
        ("tiny_plugs:TinyData", "tiny_plugs:NoPlug", ["data.type", "derived from DataConfig"]),
        ("tiny_plugs:TinyData", "nowhere_at_all:X", ["data.type must be importable", "nowhere"]),
        ('{type: "tiny_plugs:TinyData"}', "emoji", ["data must be a mapping", '"emoji"']),
        ('{type: "tiny_plugs:TinyData"}', "{path: x}", ["data.type must be", "got nothing"]),
        ("name: test", "name: {", ["line 3", "valid YAML"]),
        ("name: test", "name: !!binary aGk=", ["line 1", "a tag", "remove it"]),
        ("name: test", "name: &a [*a]", ["name must be nested at most 50 deep"]),
        (YAML, "- 1", ["must be a mapping of sections, got [1]"]),
        (YAML, "", ["must be a mapping of sections, got null"]),
    ],
)
def test_a_bad_file_gets_one_line(load, old, new, expected):
    assert old in YAML
    message = error_of(load, text=YAML.replace(old, new, 1))
    assert "run.yaml: " in message
    for fragment in expected:
        assert fragment in message


@pytest.mark.parametrize(
    ("advantage", "expected"),
    [
        ("{shaping: linear, gamma: 0.4}", "advantage.gamma must be null"),
        ("{shaping: gdpo, center: true}", "advantage.center must be false"),
        ("{shaping: harmonic, center: true}", "advantage.center must be false"),
        ("{gamma: 0}", "advantage.gamma must be greater than 0"),
        ("{schedule: {type: tdv}}", "did you mean 'tdw'?"),
        ("{schedule: {high: 0.6}}", "advantage.schedule.type must be one of tdw, constant"),
        ("{schedule: {type: tdw, hihg: 0.6}}", "did you mean 'high'?"),
        ("{schedule: {type: tdw, start: 23}}", "advantage.schedule.start must not be above end"),
        ("{schedule: {type: constant, prompt: 1.5}}", "less than or equal to 1, got 1.5"),
        ("{schedule: {type: custom}}", "advantage.schedule.target must be given"),
        ("{schedule: {type: custom, target: a.b}}", "advantage.schedule.target must match"),
        ("{schedule: {type: custom, target: 'nowhere:f'}}", "schedule.target must be importable"),
        ("{shaping: synergy_only, schedule: {type: cosine}}", "no weighted sum to schedule"),
        ("{shaping: custom}", "advantage.shaping_target must be given"),
        ("{shaping_target: 'tiny_plugs:YAML'}", "advantage.shaping_target must be given"),
        ("{shaping: custom, shaping_target: 'nowhere:f'}", "shaping_target must be importable"),
        ("{shaping: custom, shaping_target: 'tiny_plugs:YAML'}", "must name a customized_grpo.ops"),
        ("{extra_weights: {quality: 0.2}}", "advantage.extra_weights must name exactly"),
        ("{gate_floor: 0.5}", "advantage.gate_floor must be null for shaping sars, got 0.5"),
        ("{shaping: gate, gate_floor: .nan}", "advantage.gate_floor"),
        ("{shaping: gate, center: true}", "advantage.center must be false for shaping gate"),
        ("{shaping: gate, schedule: {type: measured}}", "no weighted sum to schedule"),
        ("{schedule: {type: measured, num_samples: 1}}", "schedule.num_samples must be"),
        (
            "{schedule: {type: measured, num_prompts: 60000, num_samples: 2}}",
            "advantage.schedule.num_samples must be at most 65,536 / num_prompts = 1, got 2",
        ),
    ],
)
def test_an_advantage_option_without_effect_is_refused(load, advantage, expected):
    assert expected in error_of(load, text=f"{YAML}advantage: {advantage}\n")


ONLY_PROMPT = YAML.replace("objective: identity", "objective: prompt")
QUALITY = "  - {type: 'tiny_plugs:TinyReward', objective: quality}\n"
WITH_QUALITY = YAML.replace("\nrollout: ", f"\n{QUALITY}rollout: ")


def test_shapings_get_the_objectives_they_need(load):
    for shaping in ("sars", "gate"):
        flags = ["--advantage.shaping", shaping]
        assert "rewards must cover identity and prompt" in error_of(load, *flags, text=ONLY_PROMPT)
    linear = ["--advantage.shaping", "linear"]
    needed = "advantage.schedule must be {type: constant, prompt: 1.0}"
    assert needed in error_of(load, *linear, text=ONLY_PROMPT)
    constant = ["--advantage.schedule", "{type: constant, prompt: 1}"]
    assert load(*linear, *constant, text=ONLY_PROMPT).advantage.schedule == ConstantSchedule(
        prompt=1.0
    )


def test_further_objectives_need_a_weight(load):
    assert "exactly the further objectives ['quality']" in error_of(load, text=WITH_QUALITY)
    weights = ["--advantage.extra_weights"]
    assert "sum to less than 1" in error_of(load, *weights, "{quality: 1}", text=WITH_QUALITY)
    config = load(*weights, "{quality: 0.2}", text=WITH_QUALITY)
    assert config.advantage.extra_weights == {"quality": 0.2}
    gate = ["--advantage.shaping", "gate", *weights, "{quality: 0.2}"]
    needed = "rewards must be of identity and prompt alone for shaping gate, got ['quality']"
    assert needed in error_of(load, *gate, text=WITH_QUALITY)


def test_the_default_strength_is_that_of_the_shapings_own_recipe():
    assert AdvantageConfig().strength() == 0.4
    assert AdvantageConfig(shaping="gate").strength() == 5.0
    assert AdvantageConfig(shaping="gate", gamma=2.0).strength() == 2.0


def test_a_custom_schedule_is_looked_up_when_the_config_is_read(load):
    text = f"{YAML}advantage: {{schedule: {{type: custom, target: 'tiny_plugs:my_schedule'}}}}\n"
    assert load(text=text).advantage.schedule == CustomSchedule(target="tiny_plugs:my_schedule")


@pytest.mark.parametrize(
    ("arguments", "expected"),
    [
        (["--seed", "3"], lambda c: c.seed == 3),
        (["--name", "123"], lambda c: c.name == "123"),
        (["--rollout.num_steps=9"], lambda c: c.rollout.num_steps == 9),
        (["--rollout.num-steps", "9"], lambda c: c.rollout.num_steps == 9),
        (["--rollout.shift", "3"], lambda c: c.rollout.shift == 3.0),
        (["--rollout.shift", "3", "--rollout.shift", "null"], lambda c: c.rollout.shift is None),
        (["--rollout.shared_noise", "false"], lambda c: c.rollout.shared_noise is False),
        (["--train.learning_rate", "1e-4"], lambda c: c.train.learning_rate == 1e-4),
        (["--train.betas", "0.5", "0.6"], lambda c: c.train.betas == (0.5, 0.6)),
        (["--generator.path", "there"], lambda c: c.generator.path == "there"),
        (["--generator.size", "64"], lambda c: c.generator.size == 64),
        (["--rewards.1.scale", "2"], lambda c: [r.scale for r in c.rewards] == [1.0, 2.0]),
        (["--cache.folder", "null"], lambda c: c.cache.folder is None),
        (["--faults.reward_pauses", "1", "2.5"], lambda c: c.faults.reward_pauses == (1.0, 2.5)),
        (["--rewards.0.scale", "-2"], lambda c: c.rewards[0].scale == -2.0),
        (["--lora", "null"], lambda c: c.lora is None),
        (["--lora", "null", "--lora", "{rank: 3}"], lambda c: c.lora == LoraSettings(rank=3)),
        (["--lora.target_modules", "to_q", "to_k"], lambda c: len(c.lora.target_modules) == 2),
        (["--advantage.schedule.high", "0.8"], lambda c: c.advantage.schedule.high == 0.8),
        (["--advantage.schedule", "{type: linear}"],
         lambda c: c.advantage.schedule == LinearSchedule()),
        ([*NFT, *ODE, "--algorithm.beta", "0.1"],
         lambda c: c.algorithm == NftAlgorithm(beta=0.1)),
        ([*NFT, *ODE, "--rollout.num_trained_steps", "12"],
         lambda c: c.rollout.num_trained_steps == c.rollout.num_steps),
        ([*NFT, *ODE, "--rollout.window", "5", "12"], lambda c: c.rollout.window == (5, 12)),
        (["--evaluators", '[{type: "tiny_plugs:TinyReward", objective: prompt}]'],
         lambda c: c.evaluators == (TinyReward(objective="prompt"),)),
        # Valid only together: what fields demand of each other is checked at the end.
        (["--rollout.num_steps", "4", "--rollout.num_trained_steps", "3"],
         lambda c: c.rollout.num_trained_steps == 3),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, list) else "",
)  # fmt: skip
def test_overrides(load, arguments, expected):
    assert expected(load(*arguments))


@pytest.mark.parametrize(
    ("arguments", "expected"),
    [
        (["--train.num_updats", "3"], "did you mean '--train.num_updates'?"),
        (["--rewards.0.weigth", "3"], "did you mean '--rewards.0.weight'?"),
        (["--rewards.2.weight", "3"], "override must be a field"),
        (["--train.num_updates", "many"], 'train.num_updates must be a valid integer, got "many"'),
        (["--train.num_updates"], "--train.num_updates must be one value (int), got nothing; its"),
        (["--train.num_updates", "-5"], "train.num_updates must be greater than 0, got -5"),
        (["--train.learning_rate", ".nan"], "train.learning_rate must be a finite number"),
        (["--rollout.shared_noise", "maybe"], "write true or false"),
        (["--rollout.dynamics", "dense"], "did you mean 'dance'?"),
        (["--rollout.group_size", "1"], "rollout.group_size must be greater than or equal to 2"),
        (["--rollout.num_trained_steps", "12"], "rollout.num_trained_steps must be at most"),
        (["--generator.path", "a", "b"], "--generator.path must be one value (text), got a b"),
        (["--generator.type", "flux-kontext"], "replace them all: --generator '{type: ...}'"),
        (["--rewards", "[]"], "rewards must have at least 1 item"),
        (["--lora", "{rang: 3}"], "did you mean 'rank'?"),
        (["--lora", "["], "--lora: line 1 must be valid YAML"),
        (["3"], "override must start with a flag"),
        (["--rollout.dynamics", "cps", "--rollout.noise_level", "1.2"], "at most 1 for dynamics"),
        (["--train.inner_updates", "3"], "train.inner_updates must divide"),
        (
            ["--train.split", "samples", "--train.inner_updates", "5"],
            "train.inner_updates must divide rollout.group_size = 12 for train.split samples",
        ),
        (
            ["--train.split", "samples", "--train.inner_updates", "1"],
            "train.split must be groups when train.inner_updates is 1, got samples",
        ),
        (["--train.inner_updates", "8"], "train.num_updates must be a multiple"),
        (
            ["--evaluation.guidance_scale", "4"],
            "evaluation.guidance_scale must be null for generator tiny, got 4.0; it has no",
        ),
        (
            ["--evaluation.height", "512"],
            "evaluation.height must be null for generator tiny, got 512; it has no height",
        ),
        (
            ["--rollout.aspect_ratios", "1:1", "reference"],
            'rollout.aspect_ratios must be empty for generator tiny, got ["1:1", "reference"]; it',
        ),
        (["--rollout.aspect_ratios", "2:1"], "rollout.aspect_ratios"),
        (
            ["--loss.ratio_norm", "true", "--rollout.dynamics", "cps"],
            "loss.ratio_norm must be false for rollout.dynamics cps, got true",
        ),
        (["--loss.kl_mask", "1e-5"], "loss.kl_mask must be null when train.inner_updates is 1"),
        (
            ["--advantage.balance", "{}", "--advantage.shaping", "synergy_only"],
            "advantage.balance must be null, got {",
        ),
        (["--advantage.balance", "{decay: 1}"], "advantage.balance.decay must be less than 1"),
        (["--loss.kl_mask", "0"], "loss.kl_mask must be greater than 0"),
        (["--lora", "null", "--loss.kl_weight", "0.1"], "loss.kl_weight must be 0 when lora"),
        (["--lora", "null", "--loss.norm_weight", "1"], "loss.norm_weight must be 0 when lora"),
        (
            ["--train.inner_updates", "2", "--loss.kl_mask", "1e-5", "--loss.clip_range", "1e-3"],
            "loss.clip_range must be left out with loss.kl_mask, got 0.001;",
        ),
        (
            ["--loss.ratio_norm", "true", "--loss.step_weight", "noise"],
            "loss.step_weight must be none or equal with loss.ratio_norm, got noise;",
        ),
        (["--loss.kl_share", "0.1"], "loss.kl_share must be 1 when loss.kl_weight is 0, got 0.1;"),
        (
            ["--loss.kl_share", "0.1", "--loss.kl_weight", "1"],
            "loss.kl_share must be 1 when evaluation.validate_every is 0, got 0.1;",
        ),
        (
            [
                *("--evaluators", '[{type: "tiny_plugs:TinyReward", objective: quality}]'),
                *("--evaluation.validate_every", "1", "--loss.kl_weight", "1"),
                *("--loss.kl_share", "0.1"),
            ],
            "loss.kl_share must be 1 when no evaluator is of an objective of the rewards, got 0.1;",
        ),
        (
            ["--algorithm", "{type: awm, old_decay: 0, old_weight: 3}", *ODE],
            "algorithm.old_weight must be left out for old_decay 0 and one update per rollout, got",
        ),
        (
            ["--algorithm", "{type: nft, old_decay: 0, beta: 0.1}", *ODE],
            "algorithm.beta must be left out for old_decay 0 and one update per rollout, got 0.1;",
        ),
        (
            ["--algorithm", "{type: nft, old_decay: 0, old_decay_rate: 0.1}", *ODE],
            "algorithm.old_decay_rate must be left out for old_decay 0, got 0.1; it is how",
        ),
        (
            ["--algorithm", "{type: awm, old_decay_rate: 0}", *ODE],
            "algorithm.old_decay_rate must be above 0 for old_decay 0.5, got 0; the share",
        ),
        (
            ["--train.inner_updates", "1", "--loss.clip_range", "0.1"],
            "loss.clip_range must be left out when train.inner_updates is 1 and loss.pin_ratio",
        ),
        (
            ["--algorithm", "{type: awm}", *ODE, "--loss.clip_range", "0.1"],
            "and awm has none (its clip is algorithm.clip_range): take it out",
        ),
        (
            ["--evaluation.validate_every", "5"],
            "evaluators must name a model when evaluation.validate_every is set, got none",
        ),
        (["--rollout.dynamics", "ode"], "must be dance, flow or cps for algorithm grpo, got ode;"),
        ([*NFT, "--rollout.dynamics", "ode"], "rollout.shared_noise must be false for rollout.dyn"),
        (
            [*NFT, *ODE, "--advantage.schedule", "{type: measured}"],
            "advantage.schedule.type must be another than measured for rollout.dynamics ode, got",
        ),
        ([*NFT, "--loss.clip_range", "0.2"], "loss.clip_range must be left out for algorithm nft"),
        (
            [*NFT, "--loss.kl_mask", "1e-5", "--train.inner_updates", "2"],
            "loss.kl_mask must be left out for algorithm nft, got 1e-05; it is about the",
        ),
        ([*NFT, "--loss.ratio_norm", "true"], "loss.ratio_norm must be left out for algorithm nft"),
        ([*NFT, "--loss.step_weight", "equal"], 'left out for algorithm nft, got "equal"'),
        ([*NFT, "--loss.pin_ratio", "false"], "loss.pin_ratio must be left out for algorithm nft"),
        ([*AWM, "--advantage.balance", "{}"], "advantage.balance must be null for algorithm awm"),
        (
            ["--algorithm", "{type: ntf}"],
            "algorithm.type must be one of awm, grpo, nft, or an import path package.module:Class, "
            "got 'ntf'; did you mean 'nft'?",
        ),
        (
            ["--algorithm", "{type: 'tiny_plugs:TinyAlgorithm'}", "--advantage.balance", "{}"],
            "advantage.balance must be null for algorithm tiny-algorithm",
        ),
        (
            ["--algorithm", "{type: 'tiny_plugs:HalfAlgorithm'}"],
            "algorithm.type must name a whole class, got <class 'tiny_plugs.HalfAlgorithm'> "
            "without losses; add that",
        ),
        (
            ["--algorithm", "{type: 'tiny_plugs:StrangeAlgorithm'}"],
            "algorithm.type must name a class derived from GrpoAlgorithm or ForwardAlgorithm",
        ),
        ([*NFT, "--rollout.num_trained_steps", "13"], "must be at most num_steps = 12, got 13; lo"),
        ([*NFT, "--rollout.window", "5", "12"], "the steps 0 to 10, got [5, 12]; the end"),
        ([*NFT, *ODE, "--rollout.window", "5", "13"], "the steps 0 to 11, got [5, 13]; the end"),
        (["--algorithm.beta", "1"], "override must be a field"),
        ([*NFT, "--algorithm.beta", "0"], "algorithm.beta must be greater than 0, got 0"),
        ([*NFT, "--algorithm.old_decay", "1"], "algorithm.old_decay must be less than 1, got 1"),
        (["--rollout.window", "2", "8"], "rollout.window must hold num_trained_steps = 7 of the"),
        (["--rollout.window", "3", "12"], "steps 0 to 10, got [3, 12]; the end is exclusive"),
    ],
    ids=" ".join,
)
def test_a_bad_override_gets_one_line(load, arguments, expected):
    assert expected in error_of(load, *arguments)


def test_a_tilde_is_the_home_folder_wherever_a_path_is_named(load, tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path))
    photos = "{type: folder, path: ~/photos, mask_path: ~/masks, templates: ~/templates.txt}"
    config: Any = load("--output_dir=~/runs", "--cache.folder=~/cache", "--data", photos)
    judge = {"base_url": "http://localhost", "model": "m", "criterion": "prompt"}
    judge |= {"objective": "prompt", "cache": "~/judge.sqlite"}
    found = [config.output_dir, config.cache.folder, decode(judge, "here", VlmJudgeConfig).cache]
    found += [config.data.path, config.data.mask_path, config.data.templates]
    names = ["runs", "cache", "judge.sqlite", "photos", "masks", "templates.txt"]
    assert found == [str(tmp_path / name) for name in names]
    written = decode({"path": "~/a", "templates": ["~/{subject}"]}, "here", FolderConfig)
    assert written.templates == ("~/{subject}",)
    votes = decode({"objective": "prompt", "folder": "~/votes"}, "here", VotesConfig)
    assert Ballots(votes.place(tmp_path)).folder == tmp_path / "votes"


def test_a_missing_file_is_named(tmp_path):
    with pytest.raises(ConfigError, match=r"'uno-paper': .*; write .*/configs/uno-paper.yaml$"):
        load_config("uno-paper")  # ships, wherever the package lies
    with pytest.raises(ConfigError, match=r"got '.*nothing\.yaml': No such file"):
        load_config(tmp_path / "nothing.yaml")
    (tmp_path / "latin.yaml").write_bytes(b"name: caf\xe9")
    with pytest.raises(ConfigError, match="not UTF-8"):
        load_config(tmp_path / "latin.yaml")


def test_a_config_made_in_python_is_checked_on_demand(load):
    config = load()
    assert check_config(config) == config
    with pytest.raises(ConfigError, match=r"rollout\.group_size"):
        check_config(replace(config, rollout=RolloutConfig(group_size=1)))
    with pytest.raises(ConfigError, match=r"train\.inner_updates must divide"):
        check_config(replace(config, train=TrainConfig(inner_updates=3)))


def test_names_and_defaults_are_those_of_ops():
    hints = {f.name: f for f in fields(AdvantageConfig)}
    assert hints["shaping"].default == "sars"
    shapings = inspect.get_annotations(AdvantageConfig, eval_str=True)["shaping"]
    assert set(get_args(shapings)) == {*ops.SHAPINGS, "custom"}
    dynamics = inspect.get_annotations(RolloutConfig, eval_str=True)["dynamics"]
    assert set(get_args(dynamics)) == set(get_args(ops.Dynamics))
    for schedule in get_args(get_args(ScheduleConfig)[0]):
        options = {f.name: f.default for f in fields(schedule)}
        type_ = options.pop("type")
        if schedule in (CustomSchedule, MeasuredSchedule):  # no functions of the noise level
            continue
        parameters = inspect.signature(ops.SCHEDULES[type_]).parameters
        assert options == {name: p.default for name, p in parameters.items() if name != "sigmas"}


def test_every_field_is_documented_and_only_plugs_and_the_name_are_required(load):
    infos = [*list_fields(), *list_fields(load())]
    algorithms = registry.plug_types(registry.ALGORITHMS)
    for option in (
        *get_args(get_args(ScheduleConfig)[0]),
        *(registry.load_plug(registry.ALGORITHMS, name) for name in algorithms),
    ):
        infos += list_fields(option)
    undocumented = {info.path for info in infos if not info.doc} - {
        f"{plug}.type" for plug in ("data", "generator", "rewards.0", "rewards.1")
    }
    assert not undocumented
    required = {info.path for info in list_fields() if info.value is MISSING}
    assert required == {"name", "data", "generator", "rewards"}


def test_every_plug_of_a_run_is_asked_what_it_needs(load):
    sections = {"data", "generator", "algorithm", "rewards.0", "rewards.1"}
    assert set(load().plugs()) == sections


def test_the_arithmetic_is_explained(load):
    config = load(
        "--train.inner_updates", "2", "--train.num_updates", "100",
        "--train.micro_batch_size", "100", "--rollout.group_size", "6",
    )  # fmt: skip
    text = explain_batch(config)
    assert "8 prompts x 6 samples = 48 images" in text
    assert "4 groups x 6 samples x 7 trained steps = 168 (sample, step) pairs, in 2" in text
    assert "50 rollouts = 2400 images" in text
    assert "ratio" not in text
    parts = explain_batch(load("--train.split", "samples", "--train.inner_updates", "2"))
    assert "8 groups x 6 samples x 7 trained steps = 336 (sample, step) pairs" in parts
    assert "ratio: 1" in explain_batch(load())
    assert "measured" not in explain_batch(load())
    nft = explain_batch(load("--algorithm", "{type: nft}"))
    assert "ratio" not in nft
    assert "noised anew" in nft
    measured = explain_batch(load("--advantage.schedule", "{type: measured, num_prompts: 3}"))
    assert "11 steps x 3 prompts x 4 samples = 132 images" in measured


@pytest.mark.parametrize(
    "flags",
    [
        [*NFT, *ODE],
        ["--advantage.shaping", "gate", "--advantage.center", "false"],
    ],
    ids=["nft", "gate"],
)
def test_what_the_demo_sets_can_be_taken_back_as_the_error_says(flags: list[str]) -> None:
    emoji = ROOT / "configs" / "emoji.yaml"
    with pytest.raises(ConfigError, match="or write --") as caught:
        load_config(emoji, flags)
    _, _, fix = str(caught.value).rpartition("or write ")
    load_config(emoji, [*flags, *shlex.split(fix)])
