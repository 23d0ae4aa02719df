"""The work behind the page: the pictures of `cgrpo generate`, in a queue, cancelled at any step."""

from __future__ import annotations

import dataclasses
import math
import shutil
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from helpers import ROOT
from made_runs import make_run
from PIL import Image
from playground_tools import SECONDS, Gate, add_checkpoint, quick_config

from customized_grpo.cli.main import main
from customized_grpo.config import CacheConfig, dump_config
from customized_grpo.data.jsonl import JsonlConfig
from customized_grpo.errors import CheckpointError, DataError, ResourceError, RewardError
from customized_grpo.generators.lora import LORA_FILE
from customized_grpo.rewards.endpoints.remote import RemoteRewardConfig
from customized_grpo.rewards.endpoints.vlm_judge import VlmJudgeConfig
from customized_grpo.tools.playground import markup
from customized_grpo.tools.playground import session as session_module
from customized_grpo.tools.playground.request import Outcome, Request, read_request
from customized_grpo.tools.playground.session import Cancelled, Job, Session

FOX = "a golden fox on the beach"
PICTURE = Path("a.png")


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of a run."""
    return make_run(quick_config(tmp_path_factory.mktemp("runs")))


@pytest.fixture(scope="module")
def loaded(run: Path) -> Iterator[Session]:
    session = Session(run)
    yield session
    session.close()


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
    monkeypatch.setattr(loaded, "_target", tmp_path / "copied")
    return tmp_path / "copied"


def draw(session: Session, request: Request) -> Outcome:
    job = session.submit(request)
    assert job.wait(SECONDS)
    return job.result()


def ask(session: Session, seed: int = 3, strength: float = 1.0, place: int = -1) -> Request:
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


def assert_same(outcome: Outcome, expected: dict[str, np.ndarray]) -> None:
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


@pytest.mark.slow
def test_under_autocast_too(tmp_path: Path) -> None:
    run = make_run(quick_config(tmp_path, mixed_precision="bf16"))
    session = Session(run)
    outcomes = [draw(session, ask(session, seed)) for seed in (8, 3)]
    session.close()
    assert_same(outcomes[1], generated(run, "--seeds", 3))


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


def test_a_checkpoint_that_is_deleted_while_it_is_listed_is_left_out(
    session: Session, copied: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    empty, folder = (add_checkpoint(copied, update, 1.0) for update in (1, 2))
    (empty / LORA_FILE).unlink()  # the first that goes
    exists = Path.exists

    def delete_after(path: Path) -> bool:
        found = exists(path)
        if path == folder / LORA_FILE:
            shutil.rmtree(folder.parent)
        return found

    monkeypatch.setattr(Path, "exists", delete_after)
    assert [trained.label for trained in session.trained()] == ["at the end of training"]
    assert not folder.is_dir()


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
    session.close()
    assert_same(outcomes[0], generated(full, "--seeds", 3))
    assert_same(outcomes[1], generated(full, "--seeds", 4))


def test_a_config_has_the_base_only() -> None:
    session = Session(ROOT / "configs" / "emoji.yaml")
    assert session.trained() == ()
    assert not session.is_lora
    (example,) = session.examples(1)
    request = Request(example=example, seed=0, trained=None, strength=1.0)
    outcome = draw(session, request)
    session.close()
    assert outcome.tuned is None
    assert outcome.change == {}
    assert outcome.base.scores.keys() == {"clip-text", "dinov2"}


def test_scores_are_the_rewards_of_the_run(session: Session) -> None:
    outcome = draw(session, ask(session))
    assert outcome.tuned is not None
    names = {"identity": "dinov2", "prompt": "clip-text"}
    assert session.objectives == {"clip-text": "prompt", "dinov2": "identity"}
    for objective, reward in names.items():
        before, after = outcome.base.scores[reward], outcome.tuned.scores[reward]
        assert -1 <= before <= 1
        assert outcome.change[objective] == pytest.approx(after - before)
        assert after != before
    shown = torch.from_numpy(pixels(outcome.base.image)).permute(2, 0, 1)[None] / 255
    scored = session._rewards.score(shown.float(), [outcome.request.example]).scores[0]
    assert scored.tolist() == pytest.approx(list(outcome.base.scores.values()), abs=0.01)


@pytest.mark.slow
def test_several_rewards_of_an_objective_are_averaged_by_weight(tmp_path: Path) -> None:
    config = quick_config(tmp_path)
    first, second = config.rewards
    other = dataclasses.replace(first, name="other", path="embedded:evaluator-clip", weight=3.0)
    session = Session(make_run(dataclasses.replace(config, rewards=(first, second, other))))
    outcome = draw(session, ask(session))
    session.close()
    assert outcome.tuned is not None
    tuned = outcome.tuned.scores
    gains = {name: tuned[name] - score for name, score in outcome.base.scores.items()}
    expected = (gains["clip-text"] + 3 * gains["other"]) / 4
    assert outcome.change["prompt"] == pytest.approx(expected)


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
    assert math.isnan(outcome.base.scores["clip-text"])
    assert outcome.base.errors == ("clip-text: the judge is out",)
    assert math.isnan(outcome.change["prompt"])
    assert math.isfinite(outcome.change["identity"])
    assert math.isfinite(draw(session, ask(session)).change["prompt"])
    assert len(calls) == 3  # the tuned picture was not drawn and scored again


@pytest.mark.parametrize(
    ("error", "expected"),
    [
        (RewardError("the judge is out"), "the judge is out"),
        (torch.OutOfMemoryError(), r"out of memory; lower generator.height"),
    ],
)
def test_without_scores_there_is_a_picture(
    session: Session, monkeypatch: pytest.MonkeyPatch, error: Exception, expected: str
) -> None:
    def fail(*_: object) -> None:
        raise error

    with monkeypatch.context() as patched:
        patched.setattr(session._rewards, "score", fail)
        failed = draw(session, ask(session))
    assert all(map(math.isnan, failed.base.scores.values()))
    assert expected in failed.base.errors[0]
    again = draw(session, ask(session))
    assert (pixels(failed.base.image) == pixels(again.base.image)).all()


def test_a_subject_that_a_reward_cannot_do_without_is_named(
    session: Session, monkeypatch: pytest.MonkeyPatch
) -> None:
    def needs(_: object, examples: Any) -> None:
        examples[0].named_subject  # noqa: B018

    monkeypatch.setattr(session._rewards._rewards[1], "score", needs)
    outcome = draw(session, ask(session))
    assert all(map(math.isnan, outcome.base.scores.values()))
    assert "subject: must say what the references show" in outcome.base.errors[0]


@pytest.fixture
def gate(session: Session, monkeypatch: pytest.MonkeyPatch) -> Iterator[Gate]:
    gate = Gate(session, monkeypatch)
    yield gate
    gate.open()


def test_progress_counts_the_steps_of_both_pictures(session: Session, gate: Gate) -> None:
    job = session.submit(ask(session))
    gate.go_to(1)
    assert (job.stage, job.done, job.total) == ("base: denoising", 1, 4)
    gate.go_to(3)
    assert (job.stage, job.done, job.total) == ("tuned: denoising", 3, 4)
    gate.open()
    assert job.wait(SECONDS)
    assert job.done == 4
    known = session.submit(ask(session))
    assert known.wait(SECONDS)
    assert (known.done, gate.steps) == (4, 4)  # nothing is drawn twice
    assert known.result().base.image is job.result().base.image


def test_cancel_ends_what_one_owner_has_in_the_queue(session: Session, gate: Gate) -> None:
    running = session.submit(ask(session, seed=1), "me")
    gate.go_to(1)
    waiting = session.submit(ask(session, seed=2), "me")
    others = session.submit(ask(session, seed=3), "you")
    assert [session.ahead_of(job) for job in (running, waiting, others)] == [0, 1, 2]
    assert session.jobs("me") == [running, waiting]
    assert session.cancel("me") == 2
    assert waiting.wait(SECONDS)  # though the gate is closed
    assert session.ahead_of(others) == 1
    gate.open()
    for job in (running, waiting):
        assert job.wait(SECONDS)
        with pytest.raises(Cancelled):
            job.result()
    assert others.wait(SECONDS)
    assert others.result().tuned is not None
    assert gate.steps == 1 + 4  # the step under way when it was cancelled was the last
    assert session.jobs() == []
    assert session.cancel("me") == 0


def test_a_cancelled_request_leaves_no_trace(session: Session, gate: Gate, run: Path) -> None:
    job = session.submit(ask(session))
    gate.go_to(4)  # in the last step of the tuned picture, its LoRA merged into the weights
    job.cancel()
    gate.open()
    assert job.wait(SECONDS)
    assert_same(draw(session, ask(session, seed=4)), generated(run, "--seeds", 4))


def test_a_full_queue_is_refused(
    session: Session, gate: Gate, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(session_module, "MOST_JOBS", 2)
    jobs = [session.submit(ask(session, seed)) for seed in (1, 2)]
    with pytest.raises(ResourceError, match="queue: must have at most 2 requests, it is full"):
        session.submit(ask(session, 3))
    gate.open()
    assert jobs[-1].wait(SECONDS)
    assert draw(session, ask(session, 3))


def test_damaged_weights_are_named_and_the_next_are_drawn(session: Session, copied: Path) -> None:
    damaged = add_checkpoint(copied, 1, 1.0) / LORA_FILE
    damaged.write_bytes(damaged.read_bytes()[:1000])
    with pytest.raises(CheckpointError, match="cannot be loaded as a LoRA"):
        draw(session, ask(session, place=0))
    assert_same(draw(session, ask(session)), generated(copied, "--seeds", 3))
    gone = dataclasses.replace(session.trained()[0], folder=copied / "checkpoints" / "gone")
    with pytest.raises(CheckpointError):
        draw(session, dataclasses.replace(ask(session), trained=gone))


def test_rewritten_weights_are_read_again(session: Session, copied: Path) -> None:
    first = draw(session, ask(session))
    other = add_checkpoint(copied, 1, 3.0) / LORA_FILE
    (copied / "weights" / LORA_FILE).write_bytes(other.read_bytes())
    second = draw(session, ask(session))
    assert second.tuned is not None
    assert first.tuned is not None
    assert (pixels(first.tuned.image) != pixels(second.tuned.image)).any()


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


def test_the_generator_says_what_it_cannot_take(session: Session) -> None:
    request = ask(session)
    two = dataclasses.replace(request.example, references=request.example.references * 2)
    with pytest.raises(DataError, match="takes exactly one reference, got 2"):
        session.submit(dataclasses.replace(request, example=two))
    assert session.jobs() == []


def test_without_data_there_are_no_examples(
    session: Session, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    data = JsonlConfig(path="gone.jsonl", held_out="gone.jsonl")
    model = dataclasses.replace(session._model, config=quick_config(Path(), data=data))
    monkeypatch.setattr(session, "_model", model)
    assert session.examples(4) == []
    assert "no examples on the page" in caplog.text


def test_an_upload_is_encoded_into_no_folder(run: Path, tmp_path: Path) -> None:
    config = quick_config(tmp_path, cache=CacheConfig(folder=str(tmp_path / "encoded")))
    (tmp_path / "config.yaml").write_text(dump_config(config))
    session = Session(tmp_path / "config.yaml")
    draw(session, ask(session))
    session.close()
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
    monkeypatch.setattr(session, "_model", dataclasses.replace(session._model, config=config))
    assert session.receivers == {
        "<far>": ("gpu2:8100", "gpu3:8100"),
        "vlm-judge": ("api.example.com",),
    }
    assert (
        "sent to gpu2:8100, gpu3:8100 (&lt;far&gt;); api.example.com (vlm-judge)."
        in markup.heading(session)
    )


@pytest.mark.slow
def test_closing_ends_what_is_drawn_and_what_waits(
    run: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    session = Session(run)
    gate = Gate(session, monkeypatch)
    jobs: list[Job] = [session.submit(ask(session, seed)) for seed in (1, 2)]
    gate.go_to(1)
    threading.Timer(0.2, gate.open).start()
    session.close()
    assert all(job.wait(0) for job in jobs)
    for job in jobs:
        with pytest.raises(Cancelled):
            job.result()
