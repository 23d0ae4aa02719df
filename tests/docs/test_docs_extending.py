"""docs/extending.md: every file is written and trained with as it stands there."""

from __future__ import annotations

import csv
import json
import tomllib
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from helpers import ROOT, import_from, metrics
from PIL import Image
from snippets import commands, snippets

from customized_grpo import registry
from customized_grpo.config import added_method, load_config, load_study
from customized_grpo.ops import constant_weights, shape_advantages
from customized_grpo.training.advantages import assign_credit
from customized_grpo.training.train import train
from customized_grpo.types import Example, ForwardTerms

FILES = snippets("docs/extending.md", "python")
SECTIONS = {
    name: yaml.safe_load(text) for name, text in snippets("docs/extending.md", "yaml").items()
}
SMALL = {
    "rollout": {"num_steps": 3, "num_trained_steps": 2, "group_size": 3, "prompts_per_rollout": 2},
    "train": {"num_updates": 1, "learning_rate": 1e-3},
    "evaluation": {"num_examples": 2},
}


@pytest.fixture
def written(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The working directory with the files of the page, and data for the data source."""
    monkeypatch.chdir(tmp_path)
    import_from(tmp_path, monkeypatch)
    for name, text in FILES.items():
        (tmp_path / name).write_text(text)
    with open("subjects.csv", "w", newline="", encoding="utf-8") as file:
        rows = csv.writer(file)
        rows.writerow(["prompt", "picture", "subject"])
        for subject, color in (("cat", "gold"), ("dog", "brown"), ("fox", "orange")):
            Image.new("RGB", (64, 64), color).save(f"{subject}.png")
            rows.writerow([f"a {subject} on a cold beach", f"{subject}.png", subject])
    return tmp_path


def config_file(folder: Path, *parts: str, **sections: Any) -> Path:
    """configs/emoji.yaml in float32, made small, with sections of the page put over it."""
    config = yaml.safe_load((ROOT / "configs" / "emoji.yaml").read_text())
    config |= SMALL | {"mixed_precision": "no", "advantage": {}}
    for section in (*(SECTIONS[part] for part in parts), sections):
        for name, value in section.items():
            both = isinstance(value, dict) and name == "advantage"
            config[name] = {**config[name], **value} if both else value
    path = folder / "run.yaml"
    path.write_text(yaml.safe_dump(config))
    return path


def code_lines(source: str) -> int:
    body = source[source.index("\n\n\n") :]  # below the imports
    return sum(bool(line.strip()) for line in body.splitlines())


@pytest.mark.parametrize("name", FILES)
def test_examples_are_short(name: str) -> None:
    assert code_lines(FILES[name]) <= 30


def test_reward_shaping_schedule_and_data_train_the_embedded_model(written: Path) -> None:
    parts = ("reward", "shaping", "schedule", "data")
    run = train(load_config(config_file(written, *parts, name="own")))
    (row,) = metrics(run)
    assert row["reward/warmth/std"] > 0
    assert row["grad_norm"] > 0
    assert row["invalid_samples"] == 0
    advantages = [json.loads(line) for line in (run / "advantages.jsonl").read_text().splitlines()]
    assert "warmth" in json.dumps(advantages[0])
    weights = json.loads((run / "schedule.json").read_text())
    first = dict(zip(weights["objectives"], weights["weights"][0], strict=True))
    assert first == pytest.approx({"identity": 0.3 * 0.8, "prompt": 0.7 * 0.8, "warmth": 0.2})
    assert {e.subject for e in load_config(run / "config.yaml").data.build(0).held_out(9)} == {
        "fox"
    }


def test_the_reward_is_what_the_policy_follows(written: Path) -> None:
    """Alone, as both objectives: its advantages are the only ones, so warmth has to rise."""
    rewards = [
        {"type": "my_rewards:WarmthConfig", "name": name, "objective": name}
        for name in ("identity", "prompt")
    ]
    path = config_file(written, "generator", name="warm", rewards=rewards, evaluators=[])
    flags = ["--train.num_updates", "40", "--train.learning_rate", "1e-2", "--advantage.shaping",
             "linear", "--rollout.group_size", "8", "--evaluation.classifier", "null"]  # fmt: skip
    torch.manual_seed(0)
    rows = metrics(train(load_config(path, flags)))
    means = [row["reward/prompt/mean"] for row in rows]
    assert sum(means[-5:]) / 5 > sum(means[:5]) / 5 + 0.05


def test_the_reward_reads_picture_and_prompt(written: Path) -> None:
    config = registry.import_object("my_rewards:WarmthConfig")(objective="warmth")
    red = torch.tensor([1.0, 0.5, 0.0])[:, None, None].expand(3, 8, 8)
    warm, cold = (Example(id=p, prompt=p, references=(), subject="") for p in ("a", "a cold b"))
    scores = config.build(torch.device("cpu")).score(torch.stack([red, red]), [warm, cold])
    assert scores.tolist() == [1.0, -1.0]


def test_the_generator_trains_and_its_weights_come_back(written: Path) -> None:
    run = train(load_config(config_file(written, "generator", "data", name="pixels")))
    (row,) = metrics(run)
    assert row["grad_norm"] > 0
    assert 0 <= row["mismatch"] < 5e-6
    generator = load_config(run / "config.yaml").generator.build(torch.device("cpu"))
    before = generator.transformer.weight.clone()
    generator.load_weights(run / "weights")
    assert not torch.equal(before, generator.transformer.weight)


def test_the_algorithm_fits_the_better_samples(written: Path) -> None:
    sampler = {**SMALL["rollout"], "dynamics": "ode", "shared_noise": False}
    parts = ("algorithm", "shaping", "schedule")
    path = config_file(written, *parts, name="raft", rollout=sampler, loss={"kl_weight": 0.1})
    run = train(load_config(path))
    (row,) = metrics(run)
    assert 0 < row["fitted"] < 1
    assert row["grad_norm"] > 0
    assert row["kl"] == 0  # before the first update
    latents = torch.zeros(3, 2)
    terms = ForwardTerms(
        velocity=latents,
        old_velocity=latents,
        target=torch.tensor([[1.0, 1.0], [2.0, 0.0], [3.0, 3.0]]),
        sigma=torch.ones(3),
        advantage=torch.tensor([2.0, 0.5, -1.0]),
        clip=5.0,
    )
    losses, numbers = load_config(run / "config.yaml").algorithm.losses(terms)
    assert losses.tolist() == [2.0, 1.0, 0.0]
    assert numbers["fitted"] == pytest.approx(2 / 3)


def test_a_study_takes_the_algorithm_beside_its_own(written: Path) -> None:
    """By the command of the page."""
    (words,) = commands("docs/extending.md")
    _, _, study, flag, added = words
    assert flag == "--add"
    _, configs = load_study(ROOT / study, added=[added_method(added)])
    assert type(configs["raft"].algorithm).__name__ == "RaftAlgorithm"
    assert configs["raft"].rollout.dynamics == "ode"


def test_the_shaping_is_only_a_penalty_and_a_run_uses_it(written: Path) -> None:
    behind = registry.import_object("my_shaping:BEHIND")
    advantages = torch.tensor([[1.0, 2.0], [-1.0, 2.0], [-1.0, -3.0], [torch.nan, 1.0]])
    total = shape_advantages(behind, advantages, constant_weights(torch.ones(1)), gamma=0.5)
    torch.testing.assert_close(total[:, 0], torch.tensor([1.5, 0.5 - 0.5, -2.0 - 1.5, 0.0]))
    config = load_config(config_file(written, "shaping", "schedule", name="shaped"))
    scores, groups, sigmas = torch.randn(6, 2), torch.arange(2).repeat_interleave(3), torch.ones(2)
    objectives = ("prompt", "identity")  # the order of the config's rewards
    found = assign_credit(scores, groups, sigmas, config.advantage, config.rewards, objectives)
    weights = torch.tensor([[0.7, 0.3]])
    expected = shape_advantages(behind, found.per_objective, weights, gamma=0.5)
    torch.testing.assert_close(found.per_step, expected)


def test_the_entry_points_lead_to_the_classes(written: Path) -> None:
    declared = tomllib.loads(snippets("docs/extending.md", "toml")["pyproject.toml"])["project"]
    for group, plugs in declared["entry-points"].items():
        for name, target in plugs.items():
            cls = registry.load_plug(group, target)
            assert cls.group == group
            assert cls.__dataclass_fields__["type"].default == name
