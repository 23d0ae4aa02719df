"""Scoring beside sampling: the same scores, in the same order, and never a deadlock."""

import threading
from collections.abc import Sequence

import pytest
import torch
from helpers import assert_near, changed

from customized_grpo.config import RunConfig
from customized_grpo.errors import RewardError
from customized_grpo.generators.flux1 import Flux1Generator
from customized_grpo.rewards.base import RewardSet
from customized_grpo.training.policy import make_policy
from customized_grpo.training.rollout import collect_rollout
from customized_grpo.training.scoring import ScoringQueue
from customized_grpo.types import Example, RewardScores

WAIT = 20


def example(number: int = 0) -> Example:
    return Example(id=str(number), prompt="", references=(torch.zeros(3, 1, 1),), subject="")


def scores_of(images: torch.Tensor, error: str | None = None) -> RewardScores:
    errors = () if error is None else (error,)
    values = images[:, 0, 0, 0]
    return RewardScores(scores=values[:, None], names=("first",), copy_gap=-values, errors=errors)


def numbered(number: int, count: int = 1) -> torch.Tensor:
    return torch.full((count, 3, 2, 2), float(number))


def test_order_is_that_of_put_and_errors_are_kept() -> None:
    def score(images: torch.Tensor, examples: Sequence[Example]) -> RewardScores:
        return scores_of(images, f"error {int(images[0, 0, 0, 0])}")

    with ScoringQueue(score) as queue:
        for number in range(20):
            queue.put(numbered(number, count=1 + number % 3), [example()] * (1 + number % 3))
        result = queue.result()
    expected = [float(n) for n in range(20) for _ in range(1 + n % 3)]
    assert result.scores[:, 0].tolist() == expected
    assert (-result.copy_gap).tolist() == expected
    assert result.errors == tuple(f"error {n}" for n in range(20))
    assert result.names == ("first",)


def test_scoring_overlaps_with_what_the_caller_does_next() -> None:
    """The reward of part 0 only ends when part 1 was sampled: in sequence it would never end."""
    events: list[str] = []
    sampled = [threading.Event() for _ in range(3)]

    def score(images: torch.Tensor, examples: Sequence[Example]) -> RewardScores:
        number = int(images[0, 0, 0, 0])
        events.append(f"score {number}")
        assert sampled[min(number + 1, 2)].wait(WAIT)
        events.append(f"scored {number}")
        return scores_of(images)

    with ScoringQueue(score) as queue:
        for number in range(3):
            events.append(f"sampled {number}")
            sampled[number].set()
            queue.put(numbered(number), [example()])
        assert queue.result().scores[:, 0].tolist() == [0, 1, 2]
    assert events.index("sampled 1") < events.index("scored 0")
    assert [e for e in events if e.startswith("score")] == [
        f"{word} {number}" for number in range(3) for word in ("score", "scored")
    ]


def test_the_queue_is_bounded() -> None:
    release, entered = threading.Event(), threading.Semaphore(0)

    def score(images: torch.Tensor, examples: Sequence[Example]) -> RewardScores:
        entered.release()
        assert release.wait(WAIT)
        return scores_of(images)

    handed_over: list[int] = []

    def put_all(queue: ScoringQueue) -> None:
        for number in range(5):
            queue.put(numbered(number), [example()])
            handed_over.append(number)

    with ScoringQueue(score, max_waiting=1) as queue:
        caller = threading.Thread(target=put_all, args=(queue,))
        caller.start()
        assert entered.acquire(timeout=WAIT)
        caller.join(0.3)
        assert caller.is_alive()
        assert handed_over == [0, 1]
        release.set()
        caller.join(WAIT)
        assert not caller.is_alive()
        assert queue.result().scores[:, 0].tolist() == [0, 1, 2, 3, 4]


def test_an_exception_reaches_the_caller_and_nothing_hangs() -> None:
    calls = []

    def score(images: torch.Tensor, examples: Sequence[Example]) -> RewardScores:
        calls.append(1)
        raise RewardError("broken")

    def put_many(queue: ScoringQueue) -> None:
        for number in range(50):  # many more than the queue holds
            queue.put(numbered(number), [example()])

    with (
        ScoringQueue(score, max_waiting=1) as queue,
        pytest.raises(RewardError, match="broken"),
    ):
        put_many(queue)
    assert len(calls) < 50
    was_put = threading.Event()

    def fail_later(images: torch.Tensor, examples: Sequence[Example]) -> RewardScores:
        assert was_put.wait(WAIT)
        return score(images, examples)

    with ScoringQueue(fail_later) as queue:
        queue.put(numbered(0), [example()])
        was_put.set()
        with pytest.raises(RewardError, match="broken"):
            queue.result()


def test_a_failing_sampler_drops_what_has_not_begun() -> None:
    release, entered, scored = threading.Event(), threading.Event(), []

    def score(images: torch.Tensor, examples: Sequence[Example]) -> RewardScores:
        entered.set()
        assert release.wait(WAIT)
        scored.append(int(images[0, 0, 0, 0]))
        return scores_of(images)

    def sample_and_fail() -> None:
        with ScoringQueue(score) as queue:
            for number in range(3):
                queue.put(numbered(number), [example()])
            assert entered.wait(WAIT)
            threading.Timer(0.2, release.set).start()
            raise MemoryError("out of memory")

    with pytest.raises(MemoryError):
        sample_and_fail()
    assert scored == [0]


def test_overlapped_scores_equal_those_in_sequence(
    generator: Flux1Generator, tiny_config: RunConfig, examples: list[Example]
) -> None:
    config = changed(tiny_config, rollout={"batch_size": 2})
    policy, conditioning = make_policy(generator, config), generator.encode(examples[:2])
    rewards = RewardSet(config.rewards, torch.device("cpu"))
    parts: list[tuple[torch.Tensor, list[Example]]] = []

    with ScoringQueue(rewards.score) as queue:

        def on_images(images: torch.Tensor, groups: torch.Tensor) -> None:
            parts.append((images, [examples[i] for i in groups.tolist()]))
            queue.put(*parts[-1])

        rollout = collect_rollout(
            policy,
            conditioning,
            config.rollout,
            torch.Generator().manual_seed(0),
            on_images=on_images,
        )
        overlapped = queue.result()
    plain = collect_rollout(policy, conditioning, config.rollout, torch.Generator().manual_seed(0))
    assert torch.equal(plain.images, rollout.images)
    assert torch.equal(torch.cat([images for images, _ in parts]), rollout.images)
    assert [e.id for _, part in parts for e in part] == [
        examples[i].id for i in rollout.group_ids.tolist()
    ]
    in_sequence = torch.cat([rewards.score(*part).scores for part in parts])
    assert torch.equal(overlapped.scores, in_sequence)
    whole = rewards.score(rollout.images, [examples[i] for i in rollout.group_ids.tolist()])
    assert_near(overlapped.scores, whole.scores, scale=1)
