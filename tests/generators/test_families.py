"""What every generator family promises, on a tiny checkpoint in its real format."""

from __future__ import annotations

import dataclasses
import json
import os
import sys
from pathlib import Path

import pytest
import torch
from families import FAMILIES, STEPS, Family, denoise, run_config
from helpers import (
    assert_near,
    changed,
    finished,
    metrics,
    perturb_lora,
    torchrun,
    weights,
)
from PIL import Image
from torch import Tensor
from toy_world import blocks

from customized_grpo.cli.main import main
from customized_grpo.config import (
    AlgorithmConfig,
    AwmAlgorithm,
    GrpoAlgorithm,
    LoraSettings,
    NftAlgorithm,
)
from customized_grpo.errors import ConfigError, DataError
from customized_grpo.generators.base import Conditioning, Generator
from customized_grpo.generators.flux2_klein import Flux2KleinGenerator
from customized_grpo.generators.lora import attach_lora, detach_lora
from customized_grpo.pictures import to_pil
from customized_grpo.runs.run import Run
from customized_grpo.tools.export.snippet import snippet
from customized_grpo.tools.generate import open_target
from customized_grpo.training.sampling import FixedSampler
from customized_grpo.training.train import train
from customized_grpo.types import Example

CPU = torch.device("cpu")


@pytest.fixture(scope="session", params=FAMILIES, ids=lambda family: family.name)
def family(request: pytest.FixtureRequest) -> Family:
    return request.param


@pytest.fixture(scope="session")
def checkpoint(family: Family, tmp_path_factory: pytest.TempPathFactory) -> str:
    folder = tmp_path_factory.mktemp("checkpoint") / family.name.replace(", ", "-")
    family.build(folder)
    return str(folder)


@pytest.fixture
def generator(family: Family, checkpoint: str) -> Generator:
    return family.config(checkpoint).build(CPU)


def compare(generator: Generator, ours: Tensor, theirs: Tensor) -> None:
    """Equal as latents, in the form in which the pipeline gives them."""
    if isinstance(generator, Flux2KleinGenerator):
        ours = generator.unpack(ours)
    assert_near(ours, theirs)


def test_rollout_without_noise_equals_the_stock_pipeline(
    family: Family, checkpoint: str, generator: Generator
) -> None:
    stock = family.load(checkpoint)
    noise = generator.noise(1, torch.Generator().manual_seed(3))
    for count in {1, min(2, family.most_references)}:
        task = blocks(count)
        ours = denoise(generator, generator.encode([task]), noise)
        compare(generator, ours, family.latents(stock, task, noise, STEPS))


def test_a_batch_is_its_samples(generator: Generator) -> None:
    tasks = [blocks(seed=1), blocks(prompt="a dog in the snow at night, wearing a hat", seed=2)]
    noise = generator.noise(2, torch.Generator().manual_seed(4))
    together = denoise(generator, generator.encode(tasks), noise)
    parts = [generator.encode([task]) for task in tasks]
    alone = [denoise(generator, p, n[None]) for p, n in zip(parts, noise, strict=True)]
    assert_near(together, torch.cat(alone))
    stacked = Conditioning.stack(parts)
    assert_near(denoise(generator, stacked, noise), together)
    assert (together[0] - together[1]).abs().max() > 0.1


def test_prompt_and_every_reference_matter(family: Family, generator: Generator) -> None:
    noise = generator.noise(1, torch.Generator().manual_seed(5))
    count = min(2, family.most_references)
    task = blocks(count)
    seen = denoise(generator, generator.encode([task]), noise)
    others = [dataclasses.replace(task, id="p", prompt="rain")]
    for number in range(count):
        references = list(task.references)
        references[number] = 1 - references[number]
        others.append(
            Example(
                id=f"r{number}", prompt=task.prompt, references=tuple(references), subject="cat"
            )
        )
    for other in others:
        changed = denoise(generator, generator.encode([other]), noise)
        assert (changed - seen).abs().max() > 1e-4, other.id


def test_saved_lora_loads_in_the_stock_pipeline(
    family: Family, checkpoint: str, generator: Generator, tmp_path: Path
) -> None:
    task = blocks()
    noise = generator.noise(1, torch.Generator().manual_seed(6))
    base = denoise(generator, generator.encode([task]), noise)
    attach_lora(generator.transformer, LoraSettings(rank=4, alpha=8), generator.lora_targets)
    perturb_lora(generator.transformer)
    tuned = denoise(generator, generator.encode([task]), noise)
    with generator.base_policy():
        assert torch.equal(denoise(generator, generator.encode([task]), noise), base)
    assert (tuned - base).abs().max() > 1e-3
    generator.save_weights(tmp_path)
    stock = family.load(checkpoint)
    stock.load_lora_weights(str(tmp_path))
    compare(generator, tuned, family.latents(stock, task, noise, STEPS))


@pytest.mark.slow
def test_loras_take_turns(generator: Generator, tmp_path: Path) -> None:
    """Whatever was loaded before, a LoRA and the base compute what they compute alone."""
    conditioning = generator.encode([blocks()])
    noise = generator.noise(1, torch.Generator().manual_seed(6))
    alone = {"base": denoise(generator, conditioning, noise)}
    attach_lora(generator.transformer, LoraSettings(rank=4, alpha=8), generator.lora_targets)
    for name, std in (("weak", 0.02), ("strong", 0.05)):
        perturb_lora(generator.transformer, std)
        alone[name] = denoise(generator, conditioning, noise)
        generator.save_weights(tmp_path / name)
    for name in ("weak", "strong", "weak"):
        detach_lora(generator.transformer)
        assert torch.equal(denoise(generator, conditioning, noise), alone["base"])
        generator.load_weights(tmp_path / name)
        assert torch.equal(denoise(generator, conditioning, noise), alone[name])
        with generator.base_policy():
            assert torch.equal(denoise(generator, conditioning, noise), alone["base"])


def test_evaluation_may_have_a_guidance_of_its_own(
    family: Family, checkpoint: str, generator: Generator, tmp_path: Path
) -> None:
    """Of the model that is trained; what the training samples stays as it was."""
    plain = run_config(family, checkpoint, tmp_path)
    config = changed(plain, evaluation={"guidance_scale": 7.0})
    if family.name == "flux2-klein":
        with pytest.raises(ConfigError, match=r"^evaluation\.guidance_scale: .* distilled, got 7"):
            FixedSampler(generator, config, [blocks()])
        return
    noise = generator.noise(1, torch.Generator().manual_seed(6))
    other = dataclasses.replace(family.config(checkpoint), guidance_scale=7.0).build(CPU)
    sampler = FixedSampler(generator, config, [blocks()])  # before what is trained is there
    for model in (generator, other):
        torch.manual_seed(0)
        attach_lora(model.transformer, LoraSettings(rank=4, alpha=8), model.lora_targets)
        perturb_lora(model.transformer)
    trained = denoise(generator, generator.encode([blocks()]), noise)
    drawn = sampler()
    assert torch.equal(drawn, FixedSampler(other, plain, [blocks()])())
    assert (drawn - FixedSampler(generator, plain, [blocks()])()).abs().max() > 1e-4
    assert torch.equal(denoise(generator, generator.encode([blocks()]), noise), trained)


def test_evaluation_may_have_a_size_of_its_own(
    family: Family, checkpoint: str, generator: Generator, tmp_path: Path
) -> None:
    """Of the model that is trained, and nothing of it stays where the training goes on."""
    plain = run_config(family, checkpoint, tmp_path)
    config = changed(plain, evaluation={"height": 96, "width": 64})
    sampler = FixedSampler(generator, config, [blocks()])
    noise = generator.noise(1, torch.Generator().manual_seed(6))
    conditioning = generator.encode([blocks()])
    trained = denoise(generator, conditioning, noise)
    other = dataclasses.replace(family.config(checkpoint), height=96, width=64).build(CPU)
    drawn = sampler()
    assert drawn.shape == (1, 3, 96, 64)
    assert torch.equal(drawn, FixedSampler(other, plain, [blocks()])())
    assert torch.equal(denoise(generator, conditioning, noise), trained)
    config = changed(plain, evaluation={"width": 100})
    line = r"evaluation\.width: must be a multiple of (16|32), .*, got 100; write 96 or (112|128)"
    with pytest.raises(ConfigError, match=f"^{line}$"):
        FixedSampler(generator, config, [blocks()])


def test_full_weights_round_trip(family: Family, checkpoint: str, tmp_path: Path) -> None:
    first, second = (family.config(checkpoint).build(CPU) for _ in range(2))
    parameter = next(first.transformer.parameters())
    with torch.no_grad():
        parameter.add_(0.25)
    first.save_weights(tmp_path)
    second.load_weights(tmp_path)
    assert torch.equal(next(second.transformer.parameters()), parameter)


def test_too_many_references_and_mixed_layouts_are_refused(
    family: Family, generator: Generator
) -> None:
    with pytest.raises(DataError, match=f"got {family.most_references + 1}"):
        generator.encode([blocks(family.most_references + 1)])
    wide = torch.zeros(3, 64, 128)
    mixed = Example(id="wide", prompt="x", references=(wide,), subject="x")
    with pytest.raises(DataError, match="must be equal in number and shape"):
        generator.encode([blocks(), mixed])


def test_gradient_checkpointing_changes_no_gradient(family: Family, checkpoint: str) -> None:
    config = family.config(checkpoint)
    gradients = []
    for on in (False, True):
        generator = dataclasses.replace(config, gradient_checkpointing=on).build(CPU)
        assert generator.transformer.gradient_checkpointing is on
        torch.manual_seed(0)
        attach_lora(generator.transformer, LoraSettings(rank=4), generator.lora_targets)
        noise = generator.noise(1, torch.Generator().manual_seed(7))
        conditioning = generator.encode([blocks()])
        generator.velocity(noise, torch.tensor([0.7]), conditioning).square().mean().backward()
        parameters = [p for p in generator.transformer.parameters() if p.requires_grad]
        gradients.append(torch.cat([p.grad.flatten() for p in parameters if p.grad is not None]))
    assert gradients[0].any()
    assert_near(gradients[1], gradients[0])


@pytest.mark.slow
def test_a_trained_lora_loads_in_the_stock_pipeline(
    family: Family, checkpoint: str, generator: Generator, tmp_path: Path
) -> None:
    run = train(run_config(family, checkpoint, tmp_path, num_updates=1, learning_rate=1e-2))
    task = blocks()
    noise = generator.noise(1, torch.Generator().manual_seed(8))
    base = denoise(generator, generator.encode([task]), noise)
    generator.load_weights(run / "weights")
    tuned = denoise(generator, generator.encode([task]), noise)
    assert (tuned - base).abs().max() > 1e-3
    stock = family.load(checkpoint)
    stock.load_lora_weights(str(run / "weights"))
    compare(generator, tuned, family.latents(stock, task, noise, STEPS))


def test_offloaded_encoders_come_back_and_change_nothing(
    family: Family, checkpoint: str, generator: Generator
) -> None:
    offloaded = dataclasses.replace(family.config(checkpoint), offload=True).build(CPU)
    noise = generator.noise(1, torch.Generator().manual_seed(9))
    ours, theirs = (
        g.decode(denoise(g, g.encode([blocks()]), noise)) for g in (offloaded, generator)
    )
    assert torch.equal(ours, theirs)


def test_bfloat16_weights_without_autocast(
    family: Family, checkpoint: str, generator: Generator, tmp_path: Path
) -> None:
    """The base in bfloat16, adapters in float32 from the file on; all weights in float32."""
    half = dataclasses.replace(family.config(checkpoint), dtype="bfloat16").build(CPU)
    noise, sigma = generator.noise(1, torch.Generator().manual_seed(10)), torch.tensor([0.7])

    def velocity(g: Generator) -> Tensor:
        with torch.no_grad():
            return g.velocity(noise, sigma, g.encode([blocks()]))

    whole, rounded = velocity(generator), velocity(half)
    assert 0 < (rounded - whole).abs().max() < 0.3 * whole.std()
    attach_lora(generator.transformer, LoraSettings(rank=4), generator.lora_targets)
    generator.save_weights(tmp_path)
    half.load_weights(tmp_path)
    loaded = [p for n, p in half.transformer.named_parameters() if ".lora_" in n]
    assert {p.dtype for p in loaded} == {torch.float32}
    assert velocity(half).isfinite().all()
    full = dataclasses.replace(family.config(checkpoint), dtype="bfloat16").build(CPU)
    full.transformer.float()  # as trained in full
    assert (velocity(full) - whole).abs().max() < 0.3 * whole.std()


# The default old_weight holds models of random weights back: flux3-klein made half of the way.
@pytest.mark.slow
@pytest.mark.parametrize(
    "algorithm",
    [
        GrpoAlgorithm(),
        pytest.param(NftAlgorithm(), marks=pytest.mark.long),
        pytest.param(AwmAlgorithm(old_weight=0.01), marks=pytest.mark.long),
    ],
    ids=lambda a: a.type,
)
@pytest.mark.parametrize(
    "family",
    [
        pytest.param(family, id=family.name, marks=[pytest.mark.long] if others else [])
        for others, family in enumerate(FAMILIES)
    ],
    indirect=True,
)
def test_redness_goes_up(
    family: Family, checkpoint: str, tmp_path: Path, algorithm: AlgorithmConfig
) -> None:
    """Deterministic pictures of the same four prompts, before and after training all weights."""
    updates = 8 if algorithm.type == "nft" else 20
    config = run_config(family, checkpoint, tmp_path, num_updates=updates, learning_rate=3e-3)
    evaluation = dataclasses.replace(config.evaluation, validate_every=updates, num_validation=4)
    config = dataclasses.replace(
        config,
        evaluation=evaluation,
        evaluators=config.rewards[:1],
        lora=None,
        algorithm=algorithm,
    )
    if algorithm.type != "grpo":
        own = {"dynamics": "ode", "shared_noise": False, "prompts_per_rollout": 4}  # all there are
        config = changed(config, rollout=own)
    run = train(config)
    rows = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    before, after = (row["validation/reward/prompt"] for row in (rows[0], rows[-1]))
    assert after > before + 2 * rows[1]["reward/prompt/std"]


@pytest.mark.slow
@pytest.mark.long
def test_a_transformer_in_two_parts_is_trained_as_one(
    family: Family, checkpoint: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """FSDP by torchrun, against one process."""
    monkeypatch.setenv("PYTHONPATH", os.pathsep.join(sys.path))
    config = run_config(family, checkpoint, tmp_path, num_updates=2, learning_rate=1e-4)
    one, two = train(config), tmp_path / "two"
    finished(torchrun(dataclasses.replace(config, name="two", fsdp=True), tmp_path))
    for row, other in zip(metrics(one), metrics(two), strict=True):  # Adam would hide a factor
        assert row["grad_norm"] == pytest.approx(other["grad_norm"], rel=1e-3)
    alone, together = weights(one), weights(two)
    assert max(tensor.abs().max() for name, tensor in alone.items() if "lora_B" in name) > 5e-5
    assert alone.keys() == together.keys()
    for name, tensor in alone.items():
        assert (together[name] - tensor).abs().max() < 1e-5  # a tenth of a step


def test_a_run_is_drawn_and_exported_as_it_is_evaluated(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """With the guidance and the size of its evaluation; drawn in any size."""
    monkeypatch.chdir(tmp_path)
    (kontext,) = (f for f in FAMILIES if f.name == "flux-kontext")
    kontext.build(tmp_path / "checkpoint")
    config = run_config(kontext, str(tmp_path / "checkpoint"), tmp_path, num_updates=1)
    own = {"guidance_scale": 7.0, "height": 96, "num_examples": 2}
    run = train(changed(config, evaluation=own))
    target = open_target(run)
    assert (target.config.generator.height, target.config.generator.width) == (96, 144)  # pyright: ignore
    assert target.config.generator.guidance_scale == 7  # pyright: ignore
    assert open_target(run / "config.yaml").config == target.config
    assert Run.open(run).config.generator.guidance_scale == 2.5  # pyright: ignore
    for line in ("guidance_scale=7.0,", "height=96,", "width=144,"):
        assert line in snippet(Run.open(run), "weights")
    to_pil(blocks().references[0]).save("a.png")
    words = ["generate", str(run), "--prompt", "a dog", "--reference", "a.png", "--no-base"]
    for number, (more, size) in enumerate([([], (144, 96)), (["--size", "80x112"], (80, 112))]):
        assert main([*words, *more, "--out", f"out-{number}"]) == 0
        with Image.open(f"out-{number}/0001-a-dog-seed0-tuned.png") as image:
            assert image.size == size
    assert main([*words, "--size", "100x64"]) == 2
    error = capsys.readouterr().err
    assert "--size: width: must be a multiple of 16, " in error
    assert error.endswith("got 100; write 96 or 112\n")
