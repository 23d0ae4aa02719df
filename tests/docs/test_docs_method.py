"""docs/in_your_trainer.md, method.md, choosing.md: snippets run, numbers and pictures are ours."""

from __future__ import annotations

import importlib
import re
import sys
from dataclasses import dataclass, field
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from helpers import ROOT, assert_near
from snippets import snippets
from torch import Tensor

from customized_grpo.config import AdvantageConfig
from customized_grpo.ops import shifted_sigmas
from customized_grpo.rewards.clip_text import ClipTextConfig
from customized_grpo.rewards.dinov2 import Dinov2Config
from customized_grpo.training.advantages import assign_credit

TRAINER = snippets("docs/in_your_trainer.md", "python")
PICTURES = ROOT / "docs" / "pictures"
SIGMAS = shifted_sigmas(25, 3.0)
REWARDS = (
    Dinov2Config(path="x", objective="identity"),
    ClipTextConfig(path="x", objective="prompt"),
)


def executed(source: str) -> dict[str, Any]:
    names: dict[str, Any] = {}
    exec(source, names)
    return names


@pytest.fixture
def scores() -> Tensor:
    """``[24, 2]``: identity and prompt of two groups; one image could not be scored."""
    found = torch.rand(24, 2, generator=torch.Generator().manual_seed(0))
    found[5, 1] = torch.nan
    return found


GROUPS = torch.arange(2).repeat_interleave(12)


def ours(scores: Tensor) -> Tensor:
    """Advantages ``[24, 25]`` as `cgrpo train` computes them."""
    names = ("identity", "prompt")
    return assign_credit(scores, GROUPS, SIGMAS, AdvantageConfig(), REWARDS, names).per_step


def same(actual: Tensor, expected: Tensor) -> None:
    assert_near(actual, expected, terms=16)


@dataclass
class Sample:
    """Of Flow-Factory: what an aggregation reads and writes."""

    unique_id: int
    extra_kwargs: dict[str, Any] = field(default_factory=dict)


@dataclass
class Processor:
    """Flow-Factory's AdvantageProcessor in one of two processes, as documented at 3a2a482."""

    rank: int
    of_all: dict[str, Tensor]
    ids: Tensor

    def collect_group_rewards(self, samples, rewards) -> tuple[dict[str, np.ndarray], np.ndarray]:
        start = self.rank * len(samples)
        for name, values in rewards.items():  # this process's part of what is gathered
            same_part = self.of_all[name][start : start + len(samples)]
            assert torch.equal(values.nan_to_num(), same_part.nan_to_num())
        groups = np.unique(self.ids.numpy(), return_inverse=True)[1]
        return {name: values.numpy() for name, values in self.of_all.items()}, groups

    def _to_local(self, values: np.ndarray) -> Tensor:
        return torch.as_tensor(values).reshape(2, -1, *values.shape[1:])[self.rank]

    def compute_advantages(self, samples, rewards, store_to_samples, aggregation_func) -> Tensor:
        return aggregation_func(self, samples, rewards, store_to_samples)


def test_flow_factory_gets_the_advantages_of_all_processes(scores: Tensor) -> None:
    sars_tdw = executed(TRAINER["flow_factory"])["sars_tdw"]
    ids = 900 - GROUPS * 7  # labels of the host's: neither from 0 nor rising
    of_all = {"prompt": scores[:, 1], "identity": scores[:, 0]}
    parts, stored = [], []
    for rank, rows in enumerate(torch.arange(24).split(12)):
        samples = [Sample(int(i)) for i in ids[rows]]
        local = {name: values[rows] for name, values in of_all.items()}
        processor = Processor(rank, of_all, ids)
        parts.append(processor.compute_advantages(samples, local, True, sars_tdw))
        stored += [sample.extra_kwargs["advantage"] for sample in samples]
    same(torch.cat(parts), ours(scores))
    same(torch.stack(stored), ours(scores))


def verl_core_algos() -> ModuleType:
    """The registry of verl's core_algos, as documented at 012be9d."""
    module = ModuleType("verl.trainer.ppo.core_algos")
    registered: dict[str, Any] = {}

    def register_adv_est(name: str):
        return lambda function: registered.setdefault(name, function)

    vars(module).update(register_adv_est=register_adv_est, get_adv_estimator_fn=registered.get)
    return module


def compute_advantage(core_algos: Any, data: Any, adv_estimator: str) -> None:
    """What verl's trainer hands to an estimator that it does not know (at 0040110)."""
    advantages, returns = core_algos.get_adv_estimator_fn(adv_estimator)(
        token_level_rewards=data.batch["token_level_rewards"],
        response_mask=data.batch["response_mask"],
        config=None,
        index=data.non_tensor_batch["uid"],
    )
    data.batch |= {"advantages": advantages, "returns": returns}


def test_verl_calls_it_by_its_name(scores: Tensor, monkeypatch: pytest.MonkeyPatch) -> None:
    core_algos = verl_core_algos()
    for name in ("verl", "verl.trainer", "verl.trainer.ppo"):
        monkeypatch.setitem(sys.modules, name, ModuleType(name))
    monkeypatch.setitem(sys.modules, core_algos.__name__, core_algos)
    executed(TRAINER["verl"])
    rewards = torch.zeros(24, 25)
    rewards[:, :2] = scores
    mask = torch.ones(24, 25)
    mask[:, -1] = 0
    uids = np.array([f"{'ba'[group]}-prompt" for group in GROUPS], dtype=object)
    data = SimpleNamespace(
        batch={"token_level_rewards": rewards, "response_mask": mask},
        non_tensor_batch={"uid": uids},
    )
    compute_advantage(core_algos, data, "sars_tdw")
    same(data.batch["advantages"], ours(scores) * mask)
    assert data.batch["returns"].shape == (24, 25)


def test_the_loop_raises_both_rewards() -> None:
    """The page shows the loop of examples/one_loop.py, which trains a toy."""
    source = (ROOT / "examples" / "one_loop.py").read_text(encoding="utf-8")
    loop = TRAINER["loop"]
    assert loop[loop.index("def train") :] in source
    with torch.random.fork_rng():
        before, after = executed(source)["main"]()
    assert before.max() < -0.3
    assert after.min() > -0.05


@pytest.fixture(scope="module")
def figures() -> Any:
    pytest.importorskip("matplotlib", reason="needs the extra [report]")
    sys.path.insert(0, str(ROOT / "scripts"))
    yield importlib.import_module("method_figures")
    sys.path.remove(str(ROOT / "scripts"))


def numbers(svg: str) -> list[float]:
    return [float(number) for number in re.findall(r"-?\d+\.?\d*", re.sub(r"#\w+", "", svg))]


def test_the_pictures_are_what_the_script_draws(
    figures: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys
) -> None:
    monkeypatch.setattr(sys, "argv", ["method_figures", "--out", str(tmp_path)])
    figures.main()
    text = (ROOT / "docs" / "method.md").read_text(encoding="utf-8")
    shown = set(re.findall(r"\(pictures/(method-\S+\.svg)\)", text))
    assert shown == {path.name for path in tmp_path.iterdir()}
    for name in sorted(shown):
        drawn, kept = (folder.joinpath(name).read_text() for folder in (tmp_path, PICTURES))
        assert len(kept) < 100_000
        if (version := re.search(r"Matplotlib v[\d.]+", kept)) and version[0] in drawn:
            assert numbers(drawn) == pytest.approx(numbers(kept), abs=0.05)
    assert "prompt's share" in capsys.readouterr().out


def test_the_text_quotes_the_numbers_of_the_script(figures: Any) -> None:
    results = figures.Results.read(ROOT / "docs" / "results" / "proof" / "results.json")
    text = (ROOT / "docs" / "method.md").read_text(encoding="utf-8")
    text = re.sub(r"(?<![\d.])\.(?=\d)", "0.", text)  # .38 is 0.38
    for what, number in figures.quoted(results).items():
        for part in number.split(", "):
            assert re.search(rf"(?<![\d.]){re.escape(part)}(?!\d)", text), what


def test_the_gain_is_what_the_log_probability_gains(figures: Any) -> None:
    """Against finite differences of the log-probability itself, in units of the noise."""
    from customized_grpo.ops import gaussian_log_prob, sde_moments

    gains = figures.step_gains(SIGMAS, "dance", 0.4)
    assert gains.shape == (24,)
    for step in (0, 11, 23):
        kind = {"dynamics": "dance", "noise_level": 0.4}
        x, v = torch.zeros(1, 1), torch.zeros(1, 1)
        mean, std = sde_moments(v, x, SIGMAS[step], SIGMAS[step + 1], **kind)
        moved, _ = sde_moments(v + 1e-2, x, SIGMAS[step], SIGMAS[step + 1], **kind)
        back, _ = sde_moments(v - 1e-2, x, SIGMAS[step], SIGMAS[step + 1], **kind)
        sample = mean + std  # noise of 1
        slope = gaussian_log_prob(sample, moved, std) - gaussian_log_prob(sample, back, std)
        assert slope.abs().item() / 2e-2 == pytest.approx(gains[step].item(), rel=1e-3)


def test_the_share_is_the_scripts(figures: Any) -> None:
    (source,) = snippets("docs/choosing.md", "python").values()
    names = executed(source)
    gains = figures.step_gains(SIGMAS, "dance", 0.4)
    same(torch.tensor(names["gains"]), gains)
    assert names["share"].item() == pytest.approx(figures.prompt_share(names["weights"], gains))
    (stated,) = re.findall(r"# (0\.\d+)\n", source)
    assert f"{names['share'].item():.2f}" == stated
