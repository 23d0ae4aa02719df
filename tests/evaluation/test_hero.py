"""A run's pictures beside those that are kept of a study."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from dataclasses import asdict, replace
from pathlib import Path

import pytest
from helpers import ROOT
from made_up import made_up, save_pictures

from customized_grpo.errors import CheckpointError, ConfigError
from customized_grpo.evaluation import hero
from customized_grpo.evaluation.hero import keep, save_hero
from customized_grpo.evaluation.marks import COPY, MISSED, OTHER
from customized_grpo.evaluation.outcome import Outcome, Yardstick


@pytest.fixture
def study(tmp_path: Path) -> Path:
    """Results of a study, and what is kept of its naive runs."""
    save_pictures(tmp_path)
    made_up().write(tmp_path / "results.json")
    script = [sys.executable, ROOT / "scripts" / "keep_pictures.py", tmp_path, "naive"]
    subprocess.run([*script, "--target", tmp_path / "kept"], check=True)
    return tmp_path


def evaluated(study: Path, yardstick: Yardstick) -> Path:
    """The run of the main method, as ``cgrpo evaluate`` leaves it."""
    run, strips = study / "run", study / "run" / "pictures" / "held_out"
    strips.mkdir(parents=True)
    for name, kept in (("reference", "reference"), ("base", "base"), ("both", "tuned")):
        shutil.copy(study / "pictures" / f"{name}.png", strips / f"{kept}.png")
    outcome = Outcome(name="tuned", own=made_up().of("both")[0].judgement, yardstick=yardstick)
    (run / "evaluation.json").write_text(json.dumps(asdict(outcome)))
    return run


def test_kept_pictures_stand_between_base_and_tuned(
    study: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run, drawn = evaluated(study, made_up().yardstick), {}
    save_hero(study / "hero.png", run, "Customized-GRPO", study / "kept")
    assert (study / "hero.png").stat().st_size > 0
    monkeypatch.setattr(
        hero, "save_grid", lambda path, examples, columns, marks: drawn.update(vars())
    )
    save_hero(study / "hero.png", run, "Customized-GRPO", study / "kept")
    assert [example.prompt for example in drawn["examples"]] == ["a dog <b>", *["a cat"] * 9]
    shades = {name: images.mean().item() for name, images in drawn["columns"].items()}
    assert list(shades) == ["base", "naive GRPO 1:1", "Customized-GRPO"]
    assert list(shades.values()) == pytest.approx([0.4, 0.6, 0.8])  # of made_up's strips
    assert all(example.references[0].mean() == 0 for example in drawn["examples"])
    expected = [[OTHER], []] * 3 + [[OTHER, MISSED], [MISSED]] * 2
    expected[9] = [COPY, MISSED]
    assert drawn["marks"] == dict.fromkeys(shades, expected)


def test_pictures_of_other_examples_are_refused(study: Path) -> None:
    yardstick = made_up().yardstick
    others = (replace(yardstick.items[0], prompt="a cow"), *yardstick.items[1:])
    run = evaluated(study, replace(yardstick, items=others))
    with pytest.raises(ConfigError, match=r"kept\.json: must be of the first examples of"):
        save_hero(study / "hero.png", run, "mine", study / "kept")


def test_what_is_not_there_is_named(study: Path) -> None:
    with pytest.raises(ConfigError, match="method must be one of naive, both, got 'none'"):
        keep(made_up(), study, "none", study / "none")
    run = evaluated(study, made_up().yardstick)
    with pytest.raises(CheckpointError, match=r"none\.json: must be .* keep_pictures\.py"):
        save_hero(study / "hero.png", run, "mine", study / "none")
