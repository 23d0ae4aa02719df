"""The scripts that made the embedded models still run, resume, and write what the adapters load."""

from __future__ import annotations

import importlib
import os
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from types import ModuleType

import pytest
import torch
from chaos import small_run
from helpers import ROOT, assert_near
from torch import nn
from transformers import CLIPTokenizer

from customized_grpo.assets import resolve_checkpoint
from customized_grpo.config import dump_config, load_config
from customized_grpo.data.emoji.source import EmojiSource
from customized_grpo.data.emoji.world import EmojiWorld, all_words
from customized_grpo.generators.flux_kontext import FluxKontextConfig
from customized_grpo.rewards.attributes import AttributeClassifier
from customized_grpo.rewards.dinov2 import Dinov2Config
from customized_grpo.rewards.pickscore import PickScoreConfig

SCRIPTS = ROOT / "scripts"


@pytest.fixture
def training(monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    monkeypatch.syspath_prepend(str(SCRIPTS))
    return importlib.import_module("_training")


@pytest.fixture
def tokenizers(monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    monkeypatch.syspath_prepend(str(SCRIPTS))
    return importlib.import_module("_tokenizers")


def _run(script: str, *arguments: object) -> None:
    command = [sys.executable, str(SCRIPTS / script), *map(str, arguments)]
    subprocess.run(command, check=True, env=os.environ, capture_output=True)


class _Net(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.blocks = nn.ModuleList([nn.Sequential(nn.Linear(4, 4))])
        self.head = nn.Linear(4, 1)


def test_an_interrupted_run_ends_as_an_uninterrupted_one(
    training: ModuleType, tmp_path: Path
) -> None:
    def advance(folder: str, until: int):
        torch.manual_seed(0)
        net = _Net()
        run = training.Run(tmp_path / folder, net, peak_lr=0.1, num_steps=6)
        while run.step < until:
            inputs = torch.randn(8, 4, generator=run.rng(seed=1))
            run.update(net.head(net.blocks[0](inputs)).square().mean())
        run.save()
        return net, run

    whole, whole_run = advance("whole", 6)
    advance("parts", 3)
    parts, parts_run = advance("parts", 6)
    for name, value in whole.state_dict().items():
        assert torch.equal(value, parts.state_dict()[name])
        assert torch.equal(whole_run.ema.shadow[name], parts_run.ema.shadow[name])


def test_muon_trains_the_matrices_inside_blocks(training: ModuleType, tmp_path: Path) -> None:
    net = nn.Sequential()
    net.blocks = nn.ModuleList([nn.Linear(4, 4), nn.Conv2d(2, 3, 3)])
    net.head = nn.Linear(4, 1)
    run = training.Run(tmp_path, net, peak_lr=0.1, num_steps=2)
    muon, adamw = run.optimizers
    assert [p.shape for p in muon.param_groups[0]["params"]] == [(4, 4), (3, 18)]
    assert len(adamw.param_groups[0]["params"]) == 4
    before = [p.clone() for p in net.parameters()]
    images = torch.randn(2, 2, 3, 3)
    run.update(net.blocks[1](images).square().sum() + net.head(net.blocks[0](torch.ones(4))).sum())
    assert all((p != b).any() for p, b in zip(net.parameters(), before, strict=True))


def test_a_later_process_builds_the_tokenizer_the_embedded_generator_was_trained_with(
    tokenizers: ModuleType,
) -> None:
    folder = Path(resolve_checkpoint("embedded:generator"), "tokenizer")
    embedded = CLIPTokenizer.from_pretrained(folder)
    rebuilt = tokenizers.clip_tokenizer()
    assert rebuilt.get_vocab() == embedded.get_vocab()
    for word in all_words():
        assert rebuilt(word).input_ids == embedded(word).input_ids


@pytest.mark.long
@pytest.mark.slow
def test_generator_scripts_write_a_pipeline_the_adapter_loads(tmp_path: Path) -> None:
    vae, first = tmp_path / "vae" / "vae", tmp_path / "first"
    _run("train_vae.py", "--steps", 2, "--batch", 2, "--patches", 8, "--out", tmp_path / "vae")
    common = ("train_generator.py", "--steps", 2, "--batch", 4, "--vae", vae)
    _run(*common, "--out", first)
    flaws = ("--copy", 0.4, "--lost", 0.3, "--missed", 0.3)
    _run(*common, "--init", first / "pipeline", *flaws, "--out", tmp_path / "generator")
    generator = FluxKontextConfig(path=str(tmp_path / "generator" / "pipeline")).build(
        torch.device("cpu")
    )
    examples = EmojiSource(seed=0).training(0, 2)
    assert generator.encode(examples) is not None
    assert generator.noise(2, torch.Generator().manual_seed(0)).isfinite().all()


def test_the_encoder_is_the_linear_map_of_each_patch(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(str(SCRIPTS))
    script = importlib.import_module("train_vae")
    mean, components = script.patch_components(channels=48, size=8, seed=0)
    vae = script.build_vae(48)
    script.set_encoder(vae, mean, components)
    images = torch.rand(2, 3, 64, 64, generator=torch.Generator().manual_seed(0))
    patches = images
    for _ in range(3):
        patches = script.space_to_depth(patches)
    wanted = ((patches.permute(0, 2, 3, 1) - mean) @ components).permute(0, 3, 1, 2)
    latents = vae.encode(images * 2 - 1).latents
    torch.testing.assert_close(latents, wanted, atol=1e-4 * wanted.abs().max().item(), rtol=0)
    scale = components.norm(dim=0)
    assert torch.allclose(components.T @ components, torch.diag(scale.square()), atol=1e-3)


def test_flawed_pairs_have_the_flaws_that_were_asked_for(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(str(SCRIPTS))
    script = importlib.import_module("train_generator")
    triples = EmojiWorld("train").sample(400, torch.Generator().manual_seed(0))

    def share_of(**flaws: float) -> float:
        pairs = script.Pairs((), script.Flaws(**flaws), 400)
        targets, _ = pairs._flawed(triples, torch.Generator().manual_seed(1))
        changed = (targets != triples.targets).flatten(1).any(1)
        if "copy" in flaws:
            assert torch.equal(targets[changed], triples.references[changed])
        return changed.float().mean().item()

    assert share_of() == 0
    assert share_of(copy=0.25) == pytest.approx(0.25, abs=0.06)
    assert share_of(lost=0.25) == pytest.approx(0.25, abs=0.06)
    # Scenes are painted anew, so a pair that is rendered again differs in any case.
    assert share_of(missed=1.0) == 1
    missed = script._one_missed(triples.attributes, torch.Generator().manual_seed(2))
    before, after = (
        sum((getattr(a, name) > 0).long() for name in ("prop", "color", "accessory"))
        for a in (triples.attributes, missed)
    )
    assert torch.equal(after, (before - 1).clamp(min=0))


@pytest.fixture
def preference(monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    monkeypatch.syspath_prepend(str(SCRIPTS))
    return importlib.import_module("train_preference")


def test_pictures_are_graded_by_what_is_there_and_how_they_look(preference: ModuleType) -> None:
    rng = torch.Generator().manual_seed(0)
    _, sharp = preference.Gallery("train").sample(40, rng)
    there = preference.own(sharp.there)
    right, missed, copy = (
        there[:, kind] for kind in (preference.RIGHT, preference.MISSED, preference.COPY)
    )
    assert (right == 1).all()
    asked = (1 / (1 - missed[:, 0])).round()  # one of 4, or of 6, is missing
    assert_near(missed, (1 - 1 / asked).unsqueeze(1).expand_as(missed))
    assert set(asked.tolist()) == {4, 6}
    assert (there[:, preference.OTHER_SUBJECT] >= 1 - 1 / asked - 1e-6).all()
    assert (copy >= 1 / asked - 1e-6).all()  # the noun, and the placement by chance
    assert (copy <= 2 / asked + 1e-6).all()
    assert_near(preference.own(sharp.grades)[:, preference.COPY], 0.4 + 0.6 * copy)

    graded = preference.degrade(sharp, rng)
    changed = (graded.images - sharp.images).abs().amax((1, 2, 3)) > 1e-5
    assert torch.equal(changed, graded.quality < 1)
    assert 0.5 < changed.float().mean() < 0.9
    assert (graded.grades >= 0).all()
    assert (preference.own(graded.there)[:, 0] <= 1).all()


@pytest.mark.parametrize("fault", ["blur", "blocks", "codec", "noise", "melt"])
def test_a_fault_grows_with_its_strength(preference: ModuleType, fault: str) -> None:
    images = EmojiWorld("train").sample(16, torch.Generator().manual_seed(0)).targets
    damage = [
        (preference.add_fault(images, fault, torch.full((16,), strength), rng) - images)
        .square()
        .mean()
        .sqrt()
        .item()
        for strength in (0.0, 0.5, 1.0)
        for rng in [torch.Generator().manual_seed(1)]
    ]
    assert damage[0] < 0.05 < damage[2]
    assert damage[0] < damage[1] < damage[2]


def test_the_choices_teach_the_grade_itself(preference: ModuleType) -> None:
    """Bradley-Terry of noisy choices is least where scores are the grade, up to a constant."""
    grades = torch.rand(3, 8, generator=torch.Generator().manual_seed(0))
    scores = (torch.zeros(3, 8)).requires_grad_()
    optimizer = torch.optim.LBFGS([scores], max_iter=200, line_search_fn="strong_wolfe")

    def closure() -> torch.Tensor:
        optimizer.zero_grad()
        loss, _ = preference.compare(scores, grades)
        loss.backward()
        return loss

    optimizer.step(closure)  # pyright: ignore[reportArgumentType]
    gap = scores.detach() - scores.detach().mean(1, keepdim=True)
    wanted = preference.CONSISTENCY * (grades - grades.mean(1, keepdim=True))
    torch.testing.assert_close(gap, wanted, atol=0.05, rtol=0.01)
    assert preference.compare(wanted, grades)[1] == 1
    assert preference.compare(-wanted, grades)[1] == 0


@pytest.mark.slow
@pytest.mark.long
def test_preference_script_writes_a_model_that_pickscore_loads(tmp_path: Path) -> None:
    init, out = resolve_checkpoint("embedded:reward-clip"), tmp_path / "preference"
    _run("train_preference.py", "--init", init, "--steps", 2, "--batch", 2, "--out", out)
    path = str(out / "model")
    config = PickScoreConfig(objective="prompt", path=path, processor=path)
    examples = EmojiSource(seed=0).training(0, 2)
    images = torch.stack([example.references[0] for example in examples])
    assert config.build(torch.device("cpu")).score(images, examples).isfinite().all()


@pytest.mark.slow
def test_reward_script_writes_a_model_the_adapter_loads(tmp_path: Path) -> None:
    _run(
        *("train_rewards.py", "--kind", "dino", "--seed", 0, "--width", 32, "--steps", 2),
        *("--batch", 4, "--pool", 8, "--out", tmp_path / "dino"),
    )
    config = Dinov2Config(objective="identity", path=str(tmp_path / "dino" / "model"))
    examples = EmojiSource(seed=0).training(0, 2)
    images = torch.stack([example.references[0] for example in examples])
    scores = config.build(torch.device("cpu")).score(images, examples)
    assert_near(scores, torch.ones(2))


@pytest.mark.slow
def test_classifier_script_writes_a_model_the_judge_loads(tmp_path: Path) -> None:
    _run("train_classifier.py", "--steps", 2, "--batch", 4, "--out", tmp_path / "attributes")
    path = str(tmp_path / "attributes" / "model")
    classifier = AttributeClassifier.load(path, torch.device("cpu"))
    examples = EmojiSource(seed=0).training(0, 8)
    hits = classifier.hits(torch.stack([e.references[0] for e in examples]), examples)
    assert set(hits) <= {f"attribute/{name}" for name in examples[0].attributes}
    assert hits["attribute/scene"].isfinite().all()


def test_the_signal_is_what_rollouts_share(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(str(SCRIPTS))
    measure = importlib.import_module("step_gradients").norm_and_signal
    norm, signal = measure(torch.tensor([[3.0, 1.0], [3.0, -1.0]]))
    assert (norm.item(), signal.item()) == pytest.approx((10**0.5, 8**0.5))
    assert measure(torch.tensor([[3.0, 4.0], [3.0, -4.0]]))[1] == 0


@pytest.mark.slow
@pytest.mark.parametrize(
    ("script", "flags"),
    [("noise_attribution", ["--num_examples", 2]), ("step_gradients", ["--num_rollouts", 2])],
)
def test_investigations_print_a_row_per_noisy_step(
    script: str, flags: list[object], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys
) -> None:
    config = tmp_path / "small.yaml"
    config.write_text(dump_config(small_run(tmp_path, "small", 4)))
    monkeypatch.syspath_prepend(str(SCRIPTS))
    monkeypatch.setattr(sys, "argv", [script, str(config), *map(str, flags)])
    importlib.import_module(script).main()
    rows = [line.split() for line in capsys.readouterr().out.splitlines()]
    steps = [row for row in rows if row and row[0] in ("0", "1")]
    assert len(steps) == 2  # of three, the last has no noise
    assert all(float(value) >= 0 for row in steps for value in row)


@pytest.mark.slow
def test_what_pays_says_it_of_every_kind(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    config = tmp_path / "small.yaml"
    emoji, small = load_config(ROOT / "configs" / "emoji.yaml"), small_run(tmp_path, "small", 4)
    judged = replace(small, evaluators=emoji.evaluators, evaluation=emoji.evaluation)
    config.write_text(dump_config(judged))
    monkeypatch.syspath_prepend(str(SCRIPTS))
    monkeypatch.setattr(sys, "argv", ["what_pays", str(config), "--num_examples", "16"])
    script = importlib.import_module("what_pays")
    script.main()
    out = capsys.readouterr().out
    shares = {
        row[:16].strip(): float(row[16:].split()[0])
        for row in out.splitlines()
        if row.startswith(("copy", "right", "another", "prompt", "neither"))
    }
    assert len(shares) == 5
    assert sum(shares.values()) == pytest.approx(1, abs=0.003)  # every sample is of one kind


def test_the_weights_mix_what_the_objectives_say(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(str(SCRIPTS))
    script = importlib.import_module("what_pays")
    config = load_config(ROOT / "configs" / "emoji.yaml")
    linear = replace(config, advantage=replace(config.advantage, shaping="linear", center=False))
    scores = torch.randn(3, 4, 2)
    columns, shaped = script.advantages(linear, scores), script.advantages(config, scores)
    assert not columns["linear"].any()
    assert shaped["sars"].abs().max() > 0.01
    for weight in (0.5, 0.9):
        mixed = weight * columns["prompt"] + (1 - weight) * columns["identity"]
        assert_near(columns[f"{weight}"], mixed, scale=1)
        assert_near(shaped[f"{weight}"], mixed + shaped["sars"], scale=1)
