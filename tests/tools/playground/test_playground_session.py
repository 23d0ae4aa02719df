"""The work behind the page: the pictures of `cgrpo generate`, which can be ended at any step."""

from __future__ import annotations

import dataclasses
import json
import math
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from helpers import ROOT
from made_runs import make_run
from PIL import Image
from playground_tools import add_checkpoint, quick_config

from customized_grpo.cli.main import main
from customized_grpo.config import CacheConfig, dump_config
from customized_grpo.data.jsonl import JsonlConfig
from customized_grpo.errors import CheckpointError, ResourceError, RewardError
from customized_grpo.files import LORA_FILE
from customized_grpo.rewards.endpoints.remote import RemoteRewardConfig
from customized_grpo.rewards.endpoints.vlm_judge import VlmJudgeConfig
from customized_grpo.tools.playground import markup
from customized_grpo.tools.playground.request import Comparison, DrawRequest, read_request
from customized_grpo.tools.playground.session import Session, _spreads

FOX = "a golden fox on the beach"
PICTURE = Path("a.png")


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of a run."""
    return make_run(quick_config(tmp_path_factory.mktemp("runs")))


@pytest.fixture(scope="module")
def loaded(run: Path) -> Session:
    return Session(run)


@pytest.fixture
def session(loaded: Session) -> Session:
    """Of the run; has drawn nothing yet."""
    loaded._kept.clear()
    return loaded


@pytest.fixture(autouse=True)
def _reference(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """In the working directory."""
    monkeypatch.chdir(tmp_path)
    small = np.random.default_rng(0).integers(0, 255, (8, 8, 3), np.uint8)
    Image.fromarray(small).resize((80, 64), Image.Resampling.NEAREST).save(PICTURE)


@pytest.fixture
def copied(run: Path, tmp_path: Path, loaded: Session, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The session's run, to be changed."""
    shutil.copytree(run, tmp_path / "copied")
    monkeypatch.setattr(loaded, "_run", tmp_path / "copied")
    return tmp_path / "copied"


def draw(session: Session, request: DrawRequest) -> Comparison:
    return session.draw(request, lambda stage, done, total: None)


def ask(session: Session, seed: int = 3, strength: float = 1.0, place: int = -1) -> DrawRequest:
    trained = session.trained()
    return read_request(PICTURE, FOX, seed, trained[place] if trained else None, strength)


def generated(*words: object) -> dict[str, np.ndarray]:
    """Pixels by `cgrpo generate`, by model."""
    shutil.rmtree("by-generate", ignore_errors=True)
    asked = ["--prompt", FOX, "--reference", PICTURE, "--out", "by-generate"]
    assert main([str(word) for word in ("generate", *words, *asked)]) == 0
    files = Path("by-generate").glob("0001-*.png")
    return {file.stem.split("-")[-1]: pixels(Image.open(file)) for file in files}


def pixels(image: Image.Image) -> np.ndarray:
    return np.asarray(image.convert("RGB")).astype(int)


def assert_same(outcome: Comparison, expected: dict[str, np.ndarray]) -> None:
    drawn = {"base": outcome.base, "tuned": outcome.tuned}
    assert {name for name, one in drawn.items() if one is not None} == expected.keys()
    for name, wanted in expected.items():
        np.testing.assert_array_equal(pixels(drawn[name].image), wanted)  # pyright: ignore


def test_pictures_are_those_of_generate(session: Session, run: Path) -> None:
    first = draw(session, ask(session, seed=8))
    none = draw(session, ask(session, strength=0.0))
    assert none.tuned is not None
    assert (pixels(none.tuned.image) == pixels(none.base.image)).all()
    assert set(none.change.values()) == {0.0}
    again = draw(session, ask(session, strength=0.7))  # the base with a LoRA loaded and disabled
    assert_same(again, generated(run, "--seeds", 3, "--strength", 0.7))
    assert_same(first, generated(run, "--seeds", 8))


def test_checkpoints_along_training_take_turns(session: Session, copied: Path) -> None:
    weak, strong = add_checkpoint(copied, 1, 0.3), add_checkpoint(copied, 20, 2.0)
    (copied / "checkpoints" / "000030.tmp").mkdir()  # left over of an interrupted write
    labels = [trained.label for trained in session.trained()]
    assert labels == ["after update 1", "after update 20", "at the end of training"]
    outcomes = [draw(session, ask(session, place=place)) for place in (2, 0, 1, 2)]
    folders = [copied / "weights", weak, strong]
    config = copied / "config.yaml"
    for outcome, folder in zip(outcomes[:3], folders, strict=True):
        assert_same(outcome, generated(config, "--lora", folder, "--seeds", 3))
    assert outcomes[3].tuned is outcomes[0].tuned
    transformer: Any = session._base.transformer
    assert len(transformer.peft_config) == 1  # those before take no memory


def test_the_checkpoint_of_the_last_update_is_the_end(session: Session, copied: Path) -> None:
    add_checkpoint(copied, session.config.train.num_updates, 1.0)
    assert [trained.label for trained in session.trained()] == ["at the end of training"]
    add_checkpoint(copied, 1, 1.0)  # the run goes on while the page is open
    assert len(session.trained()) == 2


def test_a_loaded_checkpoint_has_a_strength_when_the_run_has_deleted_it(
    session: Session, copied: Path
) -> None:
    folder = add_checkpoint(copied, 1, 2.0)
    requests = [ask(session, strength=strength, place=0) for strength in (1.0, 0.0)]
    full = draw(session, requests[0])
    shutil.rmtree(folder.parent)
    none = draw(session, requests[1])
    assert full.tuned is not None
    assert none.tuned is not None
    base = pixels(none.base.image)
    assert (pixels(full.tuned.image) != base).any()
    assert (pixels(none.tuned.image) == base).all()
    assert "strength 0" in markup.answer(none, session.objectives)


def test_a_folder_whose_weights_are_gone_is_named(copied: Path) -> None:
    (copied / "weights" / LORA_FILE).unlink()
    with pytest.raises(CheckpointError, match=f"must hold {LORA_FILE} or a transformer"):
        Session(copied)


@pytest.mark.slow
def test_all_weights_are_trained(tmp_path: Path) -> None:
    full = make_run(quick_config(tmp_path), lora=False)
    session = Session(full)
    outcomes = [draw(session, ask(session, seed)) for seed in (3, 4)]
    assert not session.is_lora
    base, tuned = (generator.pipeline for generator in (session._base, session._tuned))  # pyright: ignore
    shared = [name for name, part in base.components.items() if part is getattr(tuned, name)]
    assert base.components.keys() - shared == {"transformer"}
    assert_same(outcomes[0], generated(full, "--seeds", 3))
    assert_same(outcomes[1], generated(full, "--seeds", 4))


def test_a_config_has_the_base_only() -> None:
    session = Session(ROOT / "configs" / "emoji.yaml")
    assert session.trained() == ()
    assert not session.is_lora
    (example,) = session.examples(1)
    request = DrawRequest(example=example, seed=0, trained=None, strength=1.0)
    outcome = draw(session, request)
    assert outcome.tuned is None
    assert outcome.change == {}
    assert outcome.base.scores.keys() == {"preference", "dinov2"}


def test_scores_are_the_rewards_of_the_run(session: Session) -> None:
    outcome = draw(session, ask(session))
    assert outcome.tuned is not None
    names = {"identity": "dinov2", "prompt": "preference"}
    assert session.objectives == {"preference": "prompt", "dinov2": "identity"}
    for objective, reward in names.items():
        before, after = outcome.base.scores[reward], outcome.tuned.scores[reward]
        assert math.isfinite(before)
        assert outcome.change[objective] == pytest.approx(after - before)
        assert after != before
    shown = torch.from_numpy(pixels(outcome.base.image)).permute(2, 0, 1)[None] / 255
    scored = session._rewards.score(shown.float(), [outcome.request.example]).scores[0]
    assert scored.tolist() == pytest.approx(list(outcome.base.scores.values()), abs=0.01, rel=0.01)


def test_how_much_pictures_differ_comes_from_the_log(run: Path, tmp_path: Path) -> None:
    assert _spreads(None, ["dinov2"]) == {}
    assert _spreads(run, ["dinov2"]) == {}  # which has no log
    rows = [{"update": 0}, {"update": 1, "reward/dinov2/std": 0.1}]
    rows += [{"update": 2, "reward/dinov2/std": 0.3}]
    lines = "".join(json.dumps(row) + "\n" for row in rows)
    (tmp_path / "metrics.jsonl").write_text(lines)
    assert _spreads(tmp_path, ["dinov2"]) == {"dinov2": pytest.approx(0.2)}
    assert _spreads(tmp_path, ["dinov2", "preference"]) == {}


@pytest.mark.slow
def test_several_rewards_of_an_objective_are_averaged_by_weight(tmp_path: Path) -> None:
    config = quick_config(tmp_path)
    first, second = config.rewards
    other = dataclasses.replace(first, name="other", path="embedded:evaluator-clip", weight=3.0)
    run = make_run(dataclasses.replace(config, rewards=(first, second, other)))
    stds = {"reward/preference/std": 1.0, "reward/other/std": 0.2, "reward/dinov2/std": 0.1}
    (run / "metrics.jsonl").write_text(json.dumps({"update": 1} | stds) + "\n")
    session = Session(run)
    outcome = draw(session, ask(session))
    assert outcome.tuned is not None
    tuned = outcome.tuned.scores
    gains = {name: tuned[name] - score for name, score in outcome.base.scores.items()}
    expected = (gains["preference"] + 3 * gains["other"]) / 4
    assert outcome.change["prompt"] == pytest.approx(expected)
    assert outcome.spread == pytest.approx({"prompt": (1.0 + 3 * 0.2) / 4, "identity": 0.1})


def test_what_cannot_be_scored_is_shown_and_tried_again(
    session: Session, monkeypatch: pytest.MonkeyPatch
) -> None:
    reward = session._rewards._rewards[0]
    score, calls = reward.score, []

    def fail_once(images: torch.Tensor, examples: Any) -> torch.Tensor:
        calls.append(1)
        if len(calls) == 1:
            raise RewardError("the judge is out")
        return score(images, examples)

    monkeypatch.setattr(reward, "score", fail_once)
    outcome = draw(session, ask(session))
    assert math.isnan(outcome.base.scores["preference"])
    assert outcome.base.errors == ("preference: the judge is out",)
    assert math.isnan(outcome.change["prompt"])
    assert math.isfinite(outcome.change["identity"])
    assert math.isfinite(draw(session, ask(session)).change["prompt"])
    assert len(calls) == 3  # the tuned picture was not drawn and scored again


def test_without_memory_for_scores_there_is_a_picture(
    session: Session, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(*_: object) -> None:
        raise torch.OutOfMemoryError

    with monkeypatch.context() as patched:
        patched.setattr(session._rewards, "score", fail)
        failed = draw(session, ask(session))
    assert all(map(math.isnan, failed.base.scores.values()))
    assert "out of memory; lower generator.height" in failed.base.errors[0]
    again = draw(session, ask(session))
    assert (pixels(failed.base.image) == pixels(again.base.image)).all()


def test_a_subject_that_a_reward_cannot_do_without_is_named(
    session: Session, monkeypatch: pytest.MonkeyPatch
) -> None:
    def needs(_: object, examples: Any) -> None:
        examples[0].named_subject  # noqa: B018

    monkeypatch.setattr(session._rewards._rewards[1], "score_and_gap", needs)
    outcome = draw(session, ask(session))
    assert all(map(math.isnan, outcome.base.scores.values()))
    assert "subject: must say what the references show" in outcome.base.errors[0]


def test_progress_counts_the_steps_of_both_pictures(session: Session) -> None:
    seen: list[tuple[str, int, int]] = []
    first = session.draw(ask(session), lambda *said: seen.append(said))
    assert [said for said in seen if "denoising" in said[0]] == [
        (f"{name}: denoising", step, 2) for name in ("base", "tuned") for step in (0, 1)
    ]
    seen.clear()
    again = session.draw(ask(session), lambda *said: seen.append(said))
    assert seen == []  # nothing is drawn twice
    assert again.base.image is first.base.image


def test_a_request_that_is_ended_leaves_no_trace(session: Session, run: Path) -> None:
    def end(stage: str, done: int, total: int) -> None:
        if (stage, done) == ("tuned: denoising", 1):  # its LoRA is merged into the weights
            raise InterruptedError

    with pytest.raises(InterruptedError):
        session.draw(ask(session), end)
    assert_same(draw(session, ask(session, seed=4)), generated(run, "--seeds", 4))


def test_damaged_weights_are_named_and_the_next_are_drawn(session: Session, copied: Path) -> None:
    damaged = add_checkpoint(copied, 1, 1.0) / LORA_FILE
    damaged.write_bytes(damaged.read_bytes()[:1000])
    with pytest.raises(CheckpointError, match="cannot be loaded as a LoRA"):
        draw(session, ask(session, place=0))
    assert_same(draw(session, ask(session)), generated(copied, "--seeds", 3))
    gone = dataclasses.replace(session.trained()[0], folder=copied / "checkpoints" / "gone")
    with pytest.raises(CheckpointError):
        draw(session, dataclasses.replace(ask(session), trained=gone))


def test_memory_that_runs_out_names_what_to_lower(
    session: Session, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(*_: object) -> None:
        raise torch.OutOfMemoryError

    with monkeypatch.context() as patched:
        patched.setattr(session._base, "velocity", fail)
        with pytest.raises(ResourceError, match=r"out of memory; lower generator\.height"):
            draw(session, ask(session))
    assert draw(session, ask(session))


def test_without_data_there_are_no_examples(
    session: Session, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    data = JsonlConfig(path="gone.jsonl", held_out="gone.jsonl")
    target = dataclasses.replace(session._target, config=quick_config(Path(), data=data))
    monkeypatch.setattr(session, "_target", target)
    assert session.examples(4) == []
    assert "no examples on the page" in caplog.text


def test_an_upload_is_encoded_into_no_folder(run: Path, tmp_path: Path) -> None:
    config = quick_config(tmp_path, cache=CacheConfig(folder=str(tmp_path / "encoded")))
    (tmp_path / "config.yaml").write_text(dump_config(config))
    session = Session(tmp_path / "config.yaml")
    draw(session, ask(session))
    assert not (tmp_path / "encoded").exists()


def test_who_gets_the_pictures_is_said(session: Session, monkeypatch: pytest.MonkeyPatch) -> None:
    assert session.receivers == {}
    assert "sent" not in markup.heading(session)
    urls = ("http://gpu2:8100", "http://gpu3:8100/", "http://gpu2:8100/other")
    remote = RemoteRewardConfig(objective="identity", urls=urls, reward="dino", name="<far>")
    judge = VlmJudgeConfig(
        objective="prompt", base_url="https://api.example.com/v1", model="m", criterion="prompt"
    )
    config = dataclasses.replace(session.config, rewards=(*session.config.rewards, remote, judge))
    monkeypatch.setattr(session, "_target", dataclasses.replace(session._target, config=config))
    assert session.receivers == {
        "<far>": ("gpu2:8100", "gpu3:8100"),
        "vlm-judge": ("api.example.com",),
    }
    assert (
        "sent to gpu2:8100, gpu3:8100 (&lt;far&gt;); api.example.com (vlm-judge)."
        in markup.heading(session)
    )
