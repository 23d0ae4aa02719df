"""Group normalisation, shapings and schedules: golden vectors, slow loops, properties."""

import inspect
import math
from itertools import combinations
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from customized_grpo.ops import (
    SCHEDULES,
    SHAPINGS,
    Shaping,
    combine_advantages,
    constant_weights,
    cosine_weights,
    group_normalize,
    linear_weights,
    shape_advantages,
    shaping_bonus,
    shifted_sigmas,
    synergy_bonus,
    tdw_weights,
)
from customized_grpo.ops.advantages import _check_rows
from customized_grpo.ops.sde import require_full_precision

TOLERANCE = 1e-5
PROPERTY = settings(derandomize=True, max_examples=40)
NAN = math.nan

seeds = st.integers(0, 2**31 - 1)
advantage_values = st.floats(-4, 4, width=32)


def close(actual: Tensor, expected: Tensor, tolerance: float = TOLERANCE) -> None:
    torch.testing.assert_close(
        actual, expected, atol=tolerance, rtol=tolerance, equal_nan=True, check_dtype=True
    )


def random_scores(seed: int, num_groups: int = 3, size: int = 6, rewards: int = 2) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn((num_groups * size, rewards), generator=generator)


def labels(num_groups: int = 3, size: int = 6) -> Tensor:
    return torch.arange(num_groups).repeat_interleave(size)


def golden_scores(case: dict[str, Any]) -> tuple[Tensor, Tensor]:
    scores = torch.tensor([case["identity_rewards"], case["prompt_rewards"]]).T
    return scores, labels(len(scores) // case["group_size"], case["group_size"])


class TestGolden:
    @pytest.mark.parametrize("index", range(2))
    def test_from_rewards_to_the_total_advantage(self, golden: dict[str, Any], index: int) -> None:
        case = golden["sars"][index]
        scores, group_ids = golden_scores(case)
        advantages = group_normalize(scores, group_ids)
        close(advantages[:, 0], torch.tensor(case["adv_identity"]))
        close(advantages[:, 1], torch.tensor(case["adv_prompt"]))
        synergy = synergy_bonus(advantages, case["gamma"])
        close(synergy, torch.tensor(case["synergy"]))
        steps = [int(step) for step in case["advantage_at_step_of_25"]]
        weights = tdw_weights(shifted_sigmas(25, 3)[steps])
        expected = torch.tensor(list(case["advantage_at_step_of_25"].values())).T
        close(combine_advantages(advantages, synergy, weights, case["adv_clip"]), expected)
        close(shape_advantages("sars", advantages, weights, gamma=case["gamma"]), expected)

    @pytest.mark.parametrize("index", range(2))
    def test_bfloat16_inputs_are_upcast_first(self, golden: dict[str, Any], index: int) -> None:
        scores, group_ids = golden_scores(golden["sars"][index])
        low = scores.bfloat16()
        assert torch.equal(group_normalize(low, group_ids), group_normalize(low.float(), group_ids))
        advantages = group_normalize(scores, group_ids).bfloat16()
        synergy, full_synergy = synergy_bonus(advantages), synergy_bonus(advantages.float())
        assert torch.equal(synergy, full_synergy)
        weights = torch.tensor([[0.3, 0.7], [0.5, 0.5]]).bfloat16()
        total = combine_advantages(advantages, synergy.bfloat16(), weights)
        full_total = combine_advantages(
            advantages.float(), synergy.bfloat16().float(), weights.float()
        )
        assert total.dtype == torch.float32
        assert torch.equal(total, full_total)

    def test_tdw_table(self, golden: dict[str, Any]) -> None:
        table = torch.tensor(golden["tdw_official_T25"])
        prompt_first = torch.equal(table[0], torch.tensor([0.7, 0.3]))
        assert prompt_first, "the golden table lists (prompt, identity); ours is (identity, prompt)"
        close(tdw_weights(shifted_sigmas(25, 3)[:25]), table.flip(1))


def slow_group_normalize(scores: np.ndarray, group_ids: list[int], eps: float) -> np.ndarray:
    result = np.full(scores.shape, NAN)
    for b, r in np.ndindex(scores.shape):
        peers = [
            scores[i, r]
            for i in range(len(scores))
            if group_ids[i] == group_ids[b] and not math.isnan(scores[i, r])
        ]
        if not math.isnan(scores[b, r]):
            result[b, r] = (scores[b, r] - np.mean(peers)) / (np.std(peers, ddof=1) + eps)
    return result


class TestGroupNormalize:
    @PROPERTY
    @given(seed=seeds, eps=st.sampled_from([1e-8, 1e-4, 0.1]))
    def test_equals_a_slow_loop(self, seed: int, eps: float) -> None:
        scores = random_scores(seed)
        scores[[0, 3, 8, 9], [0, 1, 1, 1]] = NAN
        ids = [7, -3, 7, 2**40, -3, 2**40] * 3
        expected = slow_group_normalize(scores.double().numpy(), ids, eps)
        close(group_normalize(scores, torch.tensor(ids), eps), torch.from_numpy(expected).float())

    @PROPERTY
    @given(seed=seeds, data=st.data())
    def test_order_and_labels_do_not_matter(self, seed: int, data: st.DataObject) -> None:
        scores, group_ids = random_scores(seed), labels()
        order = torch.tensor(data.draw(st.permutations(range(18))))
        relabel = torch.tensor(data.draw(st.lists(st.integers(-9, 9), min_size=3, unique=True)))
        expected = group_normalize(scores, group_ids)[order]
        close(group_normalize(scores[order], relabel[group_ids[order]]), expected, 1e-6)

    @PROPERTY
    @given(seed=seeds, scale=st.floats(0.1, 10), offset=st.floats(-3, 3))
    def test_invariant_to_affine_maps_of_each_reward(
        self, seed: int, scale: float, offset: float
    ) -> None:
        scores = random_scores(seed)
        mapped = scores.clone()
        mapped[:, 1] = mapped[:, 1] * scale + offset
        result, expected = group_normalize(mapped, labels()), group_normalize(scores, labels())
        assert torch.equal(result[:, 0], expected[:, 0])
        close(result[:, 1], expected[:, 1], 1e-4)

    @PROPERTY
    @given(seed=seeds, row=st.integers(0, 17), column=st.integers(0, 1))
    def test_nan_stays_in_its_group_and_reward(self, seed: int, row: int, column: int) -> None:
        scores, group_ids = random_scores(seed), labels()
        damaged = scores.clone()
        damaged[row, column] = NAN
        result, expected = group_normalize(damaged, group_ids), group_normalize(scores, group_ids)
        assert result.isnan().nonzero().tolist() == [[row, column]]
        affected = (group_ids == group_ids[row])[:, None] & (torch.arange(2) == column)
        assert torch.equal(result[~affected], expected[~affected])
        peers = affected.clone()
        peers[row] = False
        alone = group_normalize(scores[peers[:, column], column][:, None], labels(1, 5))
        close(result[peers], alone[:, 0], 1e-6)

    @PROPERTY
    @given(seed=seeds)
    def test_each_group_has_mean_zero_and_unbiased_std_one(self, seed: int) -> None:
        groups = group_normalize(random_scores(seed), labels()).reshape(3, 6, 2)
        close(groups.mean(dim=1), torch.zeros(3, 2))
        close(groups.std(dim=1), torch.ones(3, 2))

    @pytest.mark.parametrize("value", [0.0, 0.1, -7.3, 1e4])
    def test_a_group_equal_up_to_float_noise_is_exactly_zero(self, value: float) -> None:
        scores = torch.full((6, 1), value)
        scores[1::2] = torch.nextafter(scores[1::2], torch.tensor(math.inf))
        assert torch.equal(group_normalize(scores, labels(1)), torch.zeros(6, 1))

    def test_a_small_but_real_spread_is_kept(self) -> None:
        scores = 0.8 + 1e-4 * torch.arange(6.0)[:, None]
        close(group_normalize(scores, labels(1)).std(), torch.tensor(1.0), 1e-3)

    def test_single_scored_sample_and_unscored_group(self) -> None:
        scores = torch.tensor([[1.0], [NAN], [NAN], [NAN]])
        close(
            group_normalize(scores, labels(2, 2)), torch.tensor([[0.0], [NAN], [NAN], [NAN]]), 1e-9
        )

    def test_bad_arguments_are_named(self) -> None:
        with pytest.raises(ValueError, match=r"scores must be finite.*\[1, 0\]"):
            group_normalize(torch.tensor([[1.0], [math.inf]]), labels(1, 2))
        with pytest.raises(ValueError, match="group_ids must have one label per sample"):
            inspect.unwrap(group_normalize)(torch.zeros(4, 1), labels(1, 3))

    @pytest.mark.parametrize("shape", [(4,), (4, 1, 1)])
    def test_what_is_no_table_is_named(self, shape: tuple[int, ...]) -> None:
        """A single column without its axis would be spread over a square, silently."""
        rows = torch.ones(shape)
        with pytest.raises(ValueError, match="scores must be a tensor of shape"):
            inspect.unwrap(group_normalize)(rows, labels(1, 4))
        with pytest.raises(ValueError, match="advantages must be a tensor of shape"):
            inspect.unwrap(shaping_bonus)("sars", rows)

    def test_what_is_no_tensor_is_named(self) -> None:
        with pytest.raises(ValueError, match=r"scores must be a tensor of shape .* got list"):
            inspect.unwrap(_check_rows)("scores", [[1.0, 2.0]])
        unchecked: Any = inspect.unwrap(require_full_precision)
        with pytest.raises(ValueError, match="sigmas must be a tensor, got list"):
            unchecked("sigmas", [1.0, 0.5])


def slow_sars(row: list[float], gamma: float) -> float:
    terms = [
        math.tanh(abs(a * b)) * (1 if a > 0 and b > 0 else -1) for a, b in combinations(row, 2)
    ]
    return gamma * sum(terms) / len(terms)


class TestSynergyBonus:
    @PROPERTY
    @given(
        rows=st.lists(st.lists(advantage_values, min_size=3, max_size=3), min_size=1, max_size=5),
        gamma=st.floats(0, 2),
        objectives=st.integers(2, 3),
    )
    def test_equals_a_slow_loop(
        self, rows: list[list[float]], gamma: float, objectives: int
    ) -> None:
        rows = [row[:objectives] for row in rows]
        expected = torch.tensor([slow_sars(row, gamma) for row in rows])
        close(synergy_bonus(torch.tensor(rows), gamma), expected, 1e-6)

    @PROPERTY
    @given(seed=seeds)
    def test_symmetric_in_the_objectives(self, seed: int) -> None:
        advantages = random_scores(seed, rewards=3)
        close(synergy_bonus(advantages[:, [2, 0, 1]]), synergy_bonus(advantages), 1e-6)

    def test_sign_by_quadrant(self) -> None:
        advantages = torch.tensor([[1.0, 2.0], [1.0, -2.0], [-1.0, 2.0], [-1.0, -2.0], [0.0, 2.0]])
        strength = 0.4 * math.tanh(2.0)
        expected = torch.tensor([strength, -strength, -strength, -strength, 0.0])
        close(synergy_bonus(advantages), expected, 1e-6)

    @PROPERTY
    @given(seed=seeds)
    def test_center_gives_every_group_mean_zero(self, seed: int) -> None:
        advantages = group_normalize(random_scores(seed), labels())
        plain = synergy_bonus(advantages)
        centred = synergy_bonus(advantages, center=True, group_ids=labels())
        close(centred.reshape(3, 6).mean(dim=1), torch.zeros(3), 1e-6)
        shifts = (plain - centred).reshape(3, 6)
        close(shifts, shifts[:, :1].expand(3, 6), 1e-6)

    def test_nan_rows_stay_nan_and_out_of_the_group_mean(self) -> None:
        advantages = random_scores(0)
        advantages[4, 1] = NAN
        plain = synergy_bonus(advantages)
        assert plain.isnan().nonzero().tolist() == [[4]]
        centred = synergy_bonus(advantages, center=True, group_ids=labels())
        assert centred.isnan().nonzero().tolist() == [[4]]
        valid = [0, 1, 2, 3, 5]
        close(centred[valid], plain[valid] - plain[valid].mean(), 1e-6)

    def test_documented_bias_for_independent_gaussian_advantages(self) -> None:
        advantages = random_scores(0, num_groups=1, size=200_000)
        assert synergy_bonus(advantages, 1.0).mean().item() == pytest.approx(-0.21, abs=0.01)

    def test_bad_arguments_are_named(self) -> None:
        advantages = random_scores(0)
        with pytest.raises(ValueError, match="group_ids must be given when center is True"):
            synergy_bonus(advantages, center=True)
        with pytest.raises(ValueError, match="gamma must not be negative"):
            synergy_bonus(advantages, -0.1)
        with pytest.raises(ValueError, match="at least 2 objectives"):
            synergy_bonus(advantages[:, :1])


class TestCombine:
    @PROPERTY
    @given(seed=seeds, clip=st.floats(0.5, 6))
    def test_equals_a_slow_loop(self, seed: int, clip: float) -> None:
        advantages, weights = 3 * random_scores(seed), random_scores(seed + 1, 1, 4).abs()
        synergy = synergy_bonus(advantages)
        total = combine_advantages(advantages, synergy, weights, clip)
        without = combine_advantages(advantages, None, weights, clip)
        assert total.shape == (18, 4)
        for b, k in np.ndindex(18, 4):
            weighted = sum(weights[k, n].item() * advantages[b, n].item() for n in range(2))
            expected = max(-clip, min(clip, weighted + synergy[b].item()))
            assert total[b, k].item() == pytest.approx(expected, abs=1e-5)
            assert without[b, k].item() == pytest.approx(max(-clip, min(clip, weighted)), abs=1e-5)

    @pytest.mark.parametrize("name", SHAPINGS)
    def test_invalid_samples_get_zero_and_disturb_nobody(self, name: str) -> None:
        scores, weights = random_scores(1), torch.tensor([[0.3, 0.7], [0.5, 0.5]])
        scores[2, 0] = scores[7] = NAN
        advantages = group_normalize(scores, labels())
        raw: dict[str, Any] = {"scores": scores.nan_to_num(), "levels": torch.zeros(2)}
        total = shape_advantages(name, advantages, weights, group_ids=labels(), **raw)
        assert not total.isnan().any()
        assert torch.equal(total[[2, 7]], torch.zeros(2, 2))
        others = [b for b in range(18) if b not in (2, 7)]
        assert (total[others] != 0).any(dim=1).all()
        raw["scores"] = scores[others]
        alone = shape_advantages(
            name, advantages[others], weights, group_ids=labels()[others], **raw
        )
        close(alone, total[others], 1e-6)

    def test_zero_weight_does_not_hide_an_unscored_objective(self) -> None:
        advantages = torch.tensor([[1.0, NAN], [1.0, 2.0]])
        total = combine_advantages(advantages, None, torch.tensor([[1.0, 0.0]]))
        close(total, torch.tensor([[0.0], [1.0]]), 1e-6)

    def test_nan_bonus_of_a_valid_sample_is_not_hidden(self) -> None:
        total = combine_advantages(torch.ones(1, 2), torch.tensor([NAN]), torch.ones(1, 2))
        assert total.isnan().all()

    def test_float32_survives_autocast(self) -> None:
        advantages, weights = random_scores(3), torch.rand(5, 2)
        with torch.autocast("cpu", torch.bfloat16):
            inside = combine_advantages(advantages, None, weights)
        assert torch.equal(inside, combine_advantages(advantages, None, weights))

    def test_bad_arguments_are_named(self) -> None:
        with pytest.raises(ValueError, match=r"weights must have shape \[steps, 3\]"):
            inspect.unwrap(combine_advantages)(torch.zeros(4, 3), None, torch.zeros(2, 1))
        with pytest.raises(ValueError, match="clip must be positive"):
            combine_advantages(torch.zeros(4, 2), None, torch.zeros(2, 2), 0)


PAIR_BONUS = {
    "sars": lambda a, b: math.tanh(abs(a * b)) * (1 if a > 0 and b > 0 else -1),
    "min": min,
    "max": max,
    "harmonic": lambda a, b: a * b / (a + b + 1e-6),
    "product": lambda a, b: math.log1p(math.exp(a)) * math.log1p(math.exp(b)),
}


class TestShapings:
    @pytest.mark.parametrize("name", PAIR_BONUS)
    @pytest.mark.parametrize("objectives", [2, 3])
    def test_bonus_equals_its_formula(self, name: str, objectives: int) -> None:
        advantages = random_scores(5, rewards=objectives)
        weights = torch.full((1, objectives), 0.25)
        bonus = shaping_bonus(name, advantages, gamma=0.3)
        for b, row in enumerate(advantages.double().tolist()):
            terms = [PAIR_BONUS[name](x, y) for x, y in combinations(row, 2)]
            expected = 0.3 * sum(terms) / len(terms)
            assert bonus[b].item() == pytest.approx(expected, rel=1e-4, abs=1e-5)
        total = shape_advantages(name, advantages, weights, gamma=0.3)
        close(total, combine_advantages(advantages, bonus, weights))

    def test_every_shaping_of_the_ablation_is_there(self) -> None:
        assert set(SHAPINGS) == PAIR_BONUS.keys() | {"linear", "synergy_only", "gdpo", "gate"}

    def test_linear_is_the_weighted_sum_alone(self) -> None:
        advantages, weights = random_scores(2), torch.rand(3, 2)
        total = shape_advantages("linear", advantages, weights, gamma=0.9)
        close(total, combine_advantages(advantages, None, weights))

    def test_synergy_only_is_the_bonus_at_every_step(self) -> None:
        advantages, weights = random_scores(2), torch.rand(3, 2)
        total = shape_advantages("synergy_only", advantages, weights, gamma=0.9)
        close(total, synergy_bonus(advantages, 0.9)[:, None].expand(18, 3))

    def test_gdpo_whitens_each_step_over_the_batch_before_the_clip(self) -> None:
        advantages, weights = random_scores(2), torch.tensor([[0.2, 0.8], [30.0, 10.0]])
        total = shape_advantages("gdpo", advantages, weights)
        weighted = advantages @ weights.T
        close(total, (weighted - weighted.mean(dim=0)) / weighted.std(dim=0))
        clipped = shape_advantages("gdpo", advantages, weights, clip=0.5)
        close(clipped, total.clamp(-0.5, 0.5))

    def test_harmonic_pole_is_bounded_by_the_clip_only(self) -> None:
        advantages = torch.tensor([[0.5, -0.5], [1.0, -1.001], [0.0, -1e-6], [0.0, 0.0]])
        bonus = shaping_bonus("harmonic", advantages)
        assert bonus[0].item() == pytest.approx(-0.4 * 0.25 / 1e-6, rel=1e-3)
        assert torch.equal(bonus[2:], torch.zeros(2))
        total = shape_advantages("harmonic", advantages, torch.tensor([[0.5, 0.5]]))
        assert total[0, 0].item() == -5.0
        assert total[1, 0].item() == 5.0

    def test_center_reaches_the_bonus(self) -> None:
        advantages, weights = random_scores(2), torch.tensor([[0.5, 0.5]])
        options: dict[str, Any] = {"gamma": 0.3, "center": True, "group_ids": labels()}
        for name in ("sars", "min", "max", "product", "synergy_only"):
            difference = (
                shape_advantages(name, advantages, weights, **options)
                - shape_advantages(name, advantages, weights, gamma=0.3)
            ).reshape(3, 6)
            close(difference, difference[:, :1].expand(3, 6))
            assert (difference.abs() > 1e-3).all()

    def test_a_shaping_of_ones_own(self) -> None:
        advantages, weights = random_scores(2), torch.tensor([[0.5, 0.5]])
        own = Shaping(bonus=lambda advantages_BN, gamma: gamma * advantages_BN[:, 0])
        total = shape_advantages(own, advantages, weights, gamma=0.5)
        close(total, (advantages @ torch.tensor([[1.0], [0.5]])).clamp(-5, 5))

    def test_bad_arguments_are_named(self) -> None:
        advantages, weights = random_scores(0), torch.ones(1, 2)
        with pytest.raises(ValueError, match=r"shaping must be one of sars, linear, .*'sar'"):
            shape_advantages("sar", advantages, weights)
        for name in ("linear", "gdpo"):
            with pytest.raises(ValueError, match="center must be False"):
                shape_advantages(name, advantages, weights, center=True, group_ids=labels())
        with pytest.raises(ValueError, match="bonus or score must be given"):
            Shaping(weighted_sum=False)
        with pytest.raises(ValueError, match="group_ids must have one label per sample"):
            inspect.unwrap(shaping_bonus)("sars", advantages, center=True, group_ids=labels(1))


def slow_tdw_prompt(sigma: float) -> float:
    t = 25 * (1 - sigma / (3 - 2 * sigma))
    if t < 6 - 1e-3:
        return 0.7
    if t >= 22 - 1e-3:
        return 0.5
    return 0.3 + 0.4 * (1 - 1 / (1 + math.exp(-0.8 * (t - 10))))


def sigma_at(t: float) -> Tensor:
    """The noise level at (fractional) step t of the paper's schedule."""
    u = 1 - t / 25
    return torch.tensor([3 * u / (1 + 2 * u)])


class TestSchedules:
    @PROPERTY
    @given(
        num_steps=st.integers(1, 60), shift=st.floats(0.3, 12), name=st.sampled_from([*SCHEDULES])
    )
    def test_rows_sum_to_one_and_lie_in_the_unit_interval(
        self, num_steps: int, shift: float, name: str
    ) -> None:
        weights = SCHEDULES[name](shifted_sigmas(num_steps, shift))
        close(weights.sum(dim=1), torch.ones(num_steps + 1), 1e-6)
        assert bool(((weights >= 0) & (weights <= 1)).all())

    @PROPERTY
    @given(num_steps=st.integers(1, 60), shift=st.floats(0.3, 12))
    def test_tdw_depends_on_sigma_alone(self, num_steps: int, shift: float) -> None:
        sigmas = shifted_sigmas(num_steps, shift)
        expected = torch.tensor([slow_tdw_prompt(sigma) for sigma in sigmas.double().tolist()])
        close(tdw_weights(sigmas)[:, 1], expected)

    @PROPERTY
    @given(multiple=st.integers(1, 8))
    def test_a_finer_schedule_contains_the_coarser_one(self, multiple: int) -> None:
        coarse = tdw_weights(shifted_sigmas(25, 3))
        fine = tdw_weights(shifted_sigmas(25 * multiple, 3))
        close(fine[::multiple], coarse)

    @PROPERTY
    @given(steps=st.lists(st.integers(0, 24), min_size=1), name=st.sampled_from([*SCHEDULES]))
    def test_any_selection_and_order_of_steps_gets_its_own_rows(
        self, steps: list[int], name: str
    ) -> None:
        sigmas = shifted_sigmas(25, 3)
        assert torch.equal(SCHEDULES[name](sigmas[steps]), SCHEDULES[name](sigmas)[steps])

    def test_phases_begin_on_their_boundary_despite_rounding(self) -> None:
        before, on = tdw_weights(sigma_at(6 - 2e-3)), tdw_weights(sigma_at(6 - 5e-4))
        close(before[0, 1], torch.tensor(0.7), 1e-6)
        close(on[0, 1], torch.tensor(0.6843337), 1e-4)
        close(tdw_weights(sigma_at(6 + 5e-4))[0, 1], torch.tensor(0.6843337), 1e-4)
        close(tdw_weights(sigma_at(22 - 2e-3))[0, 1], torch.tensor(0.3), 1e-3)
        close(tdw_weights(sigma_at(22 - 5e-4))[0, 1], torch.tensor(0.5), 1e-6)

    def test_timesteps_of_a_thousand_round_trip_to_the_same_table(
        self, golden: dict[str, Any]
    ) -> None:
        sigmas = (shifted_sigmas(25, 3) * 1000.0)[:25] / 1000.0
        close(tdw_weights(sigmas), torch.tensor(golden["tdw_official_T25"]).flip(1))

    def test_every_tdw_constant_has_its_effect(self) -> None:
        sigmas = shifted_sigmas(25, 3)
        default = tdw_weights(sigmas)
        changes = [
            ("high", 0.9), ("low", 0.1), ("start", 4), ("center", 12),
            ("slope", 0.4), ("end", 20), ("final", 0.6),
        ]  # fmt: skip
        for name, value in changes:
            options: dict[str, Any] = {name: value}
            assert not torch.equal(tdw_weights(sigmas, **options), default), name
        moved = tdw_weights(sigmas, start=8, end=18, final=0.2)[:, 1]
        close(moved[:8], torch.full((8,), 0.7), 1e-6)
        close(moved[18:], torch.full((8,), 0.2), 1e-6)

    def test_constant(self) -> None:
        close(constant_weights(torch.tensor([1.0, 0.3]), 0.6), torch.tensor([[0.4, 0.6]] * 2))

    @pytest.mark.parametrize("schedule", [linear_weights, cosine_weights])
    def test_ramps_move_the_weight_from_prompt_to_identity(self, schedule: Any) -> None:
        weights = schedule(shifted_sigmas(24, 3), 0.8, 0.1)
        close(weights[0], torch.tensor([0.2, 0.8]), 1e-6)
        close(weights[12], torch.tensor([0.55, 0.45]), 1e-5)
        close(weights[24], torch.tensor([0.9, 0.1]), 1e-6)
        assert bool((weights[:, 0].diff() > 0).all())

    def test_linear_is_straight_and_cosine_is_flat_at_the_ends(self) -> None:
        sigmas = shifted_sigmas(24, 3)
        straight, eased = linear_weights(sigmas)[:, 1].diff(), cosine_weights(sigmas)[:, 1].diff()
        close(straight, torch.full((24,), -0.4 / 24))
        assert eased[0].abs() < 0.15 * straight[0].abs()
        assert eased[-1].abs() < 0.15 * straight[0].abs()

    @pytest.mark.parametrize("name", SCHEDULES)
    def test_bad_sigmas_are_named(self, name: str) -> None:
        for bad in (1000.0, -0.1, NAN):
            with pytest.raises(ValueError, match=r"sigmas must lie in \[0, 1\]"):
                SCHEDULES[name](torch.tensor([0.5, bad]))
        with pytest.raises(ValueError, match="sigmas must be float32"):
            SCHEDULES[name](torch.tensor([0.5]).bfloat16())

    @pytest.mark.parametrize(
        ("schedule", "options", "message"),
        [
            (tdw_weights, {"high": 1.2}, "high must lie in"),
            (tdw_weights, {"final": -0.2}, "final must lie in"),
            (tdw_weights, {"start": 23}, "start must not be above end"),
            (constant_weights, {"prompt": 2.0}, "prompt must lie in"),
            (linear_weights, {"low": -1.0}, "low must lie in"),
            (cosine_weights, {"high": 1.1}, "high must lie in"),
        ],
    )
    def test_bad_options_are_named(
        self, schedule: Any, options: dict[str, float], message: str
    ) -> None:
        with pytest.raises(ValueError, match=message):
            schedule(torch.tensor([0.5]), **options)


def test_scores_of_any_size_give_finite_advantages() -> None:
    """A spread beyond float32's range counts as no information; sums are clipped."""
    huge = torch.tensor([[3e38, 1.0], [-3e38, 2.0], [1e38, 3.0], [1.0, math.nan], [2.0, math.nan]])
    advantages = group_normalize(huge, torch.tensor([0, 0, 0, 1, 1]))
    assert advantages[:3].isfinite().all()
    assert advantages[:3, 1].tolist() == sorted(advantages[:3, 1].tolist())
    assert advantages[3:, 1].isnan().all()  # a group that one reward could not score at all
    total = combine_advantages(torch.full((2, 2), 1e30), None, torch.tensor([[0.5, 0.5]]))
    assert total.flatten().tolist() == [5.0, 5.0]
