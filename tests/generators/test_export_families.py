"""Exports of every generator family: the stock pipeline computes what the run computes."""

import dataclasses
import json
import re
from pathlib import Path

import numpy as np
import pytest
import torch
from diffusers import Flux3ModularPipeline, FluxKontextPipeline
from diffusers.pipelines.qwenimage import pipeline_qwenimage_edit_plus as qwen_module
from families import (
    FAMILIES,
    HEIGHT,
    REFERENCE,
    STEPS,
    WIDTH,
    Family,
    denoise,
    load_flux3_parts,
    run_config,
)
from helpers import assert_near
from made_runs import make_run
from PIL import Image
from safetensors.torch import load_file
from toy_world import blocks

from customized_grpo.cli.main import main
from customized_grpo.errors import ConfigError
from customized_grpo.generators.flux2_klein import Flux2KleinGenerator
from customized_grpo.tools.export.folders import export_run

_CHOSEN = FAMILIES


@pytest.fixture(params=_CHOSEN, ids=lambda family: family.name)
def family(request: pytest.FixtureRequest) -> Family:
    return request.param


@pytest.fixture
def run(family: Family, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    family.build(Path("base"))
    if "edit-plus" in family.name:  # as a published checkpoint has it
        index = json.loads(Path("base/model_index.json").read_text())
        index["processor"] = ["transformers", "Qwen2VLProcessor"]
        Path("base/model_index.json").write_text(json.dumps(index))
    return make_run(run_config(family, "base", Path("runs")))


def test_merged_and_plain_diffusers_make_the_latents_of_the_run(family: Family, run: Path) -> None:
    export_run(run, "merged", Path("merged"))
    generator = family.config("base").build(torch.device("cpu"))
    noise, task = generator.noise(1, torch.Generator().manual_seed(3)), blocks()
    base = denoise(generator, generator.encode([task]), noise)
    generator.load_weights(run / "weights")
    ours = denoise(generator, generator.encode([task]), noise)
    assert (ours - base).abs().max() > 1e-3
    theirs = family.latents(family.load("merged"), task, noise, STEPS)
    unpacked = generator.unpack(ours) if isinstance(generator, Flux2KleinGenerator) else ours
    assert_near(unpacked, theirs)
    if "qwen" in family.name:
        index = json.loads(Path("merged/model_index.json").read_text())
        kind = "Qwen2VLProcessor" if "edit-plus" in family.name else "Qwen3VLProcessor"
        assert index["processor"] == ["transformers", kind]
        assert sorted(p.name for p in Path("merged/processor").iterdir()) == sorted(
            p.name for p in Path("base/processor").iterdir()
        )


def test_a_small_lora_survives_in_the_sum_with_a_bfloat16_base(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """Of the paper's rank, with weights as large as 30 updates at 2e-5 make them: each addend is
    below half of what bfloat16 can tell apart from the base's weights."""
    monkeypatch.chdir(tmp_path)
    kontext = FAMILIES[0]
    kontext.build(Path("base"))
    config = run_config(kontext, "base", Path("runs"))
    half = dataclasses.replace(config.generator, dtype="bfloat16")
    config = dataclasses.replace(config, generator=half, mixed_precision="bf16")
    run = make_run(config, scale=6e-4, rank=512, alpha=512)
    export_run(run, "merged", Path("merged"))
    merged = FluxKontextPipeline.from_pretrained("merged", dtype=torch.float32)
    base, lora = (
        half.build(torch.device("cpu")).transformer.state_dict(),
        load_file(run / "weights" / "pytorch_lora_weights.safetensors"),
    )
    wanted, found, rounded = [], [], []
    for name in (name for name in lora if "lora_A" in name):
        module = name.removeprefix("transformer.").removesuffix(".lora_A.weight")
        before = base[f"{module}.weight"].float()
        after = merged.transformer.state_dict()[f"{module}.weight"]
        wanted.append((lora[name.replace("lora_A", "lora_B")] @ lora[name]).flatten())
        found.append((after - before).flatten())
        rounded.append((after.bfloat16().float() - before).flatten())
    wanted, found, rounded = (torch.cat(parts) for parts in (wanted, found, rounded))
    assert (found - wanted).norm() <= 1e-2 * wanted.norm()
    share = ((rounded - wanted).norm() / wanted.norm()).item()
    assert share > 0.5
    assert f"would be off by {100 * share:.0f} % of what the LoRA adds" in caplog.text


def test_the_card_loads_it_or_says_what_does(
    family: Family, run: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    export_run(run, "hub-folder", Path("mine"))
    card = Path("mine/README.md").read_text()
    is_qwen = "qwen" in family.name  # which takes references in their own shape
    # Nothing is resized, and the others' is not of the picture's shape.
    size = (REFERENCE, REFERENCE, 3) if is_qwen else (80, 112, 3)
    pixels = np.random.default_rng(0).integers(0, 255, size, np.uint8)
    Image.fromarray(pixels).save("reference.png")
    words = ["--prompt", "a picture of it on the beach", "--reference", "reference.png"]
    if family.name != "uno":
        assert "load_lora_weights('mine')" in card
    if family.name == "uno":
        assert "No stock pipeline takes references" in card
        assert "```python" not in card
    else:
        (code,) = re.findall(r"```python\n(.*?)```", card, re.S)
        # Toys hardly look at a reference, so that pictures alone would not tell one from another.
        vae = type(family.config("base").build(torch.device("cpu")).pipeline.vae)
        encode, encoded = vae.encode, []
        monkeypatch.setattr(
            vae, "encode", lambda self, x, *a, **k: encoded.append(x) or encode(self, x, *a, **k)
        )
        if family.name.startswith("flux3"):  # whose processor needs torchvision
            monkeypatch.setattr(
                Flux3ModularPipeline,
                "load_components",
                lambda pipeline, **how: load_flux3_parts(pipeline, "base", **how),
            )
        if family.name.startswith(("flux2", "flux3")):  # which draw patches, in another order
            seed = torch.Generator().manual_seed(0)
            ours = family.config("base").build(torch.device("cpu")).noise(1, seed)
            patches = ours.transpose(1, 2).unflatten(2, (HEIGHT // 16, WIDTH // 16))
            code = code.replace("generator=torch.Generator().manual_seed(0)", "latents=patches")
            exec(code, {"patches": patches})
        elif is_qwen:  # whose processor needs torchvision
            assert ("diffusers #14194" in card) == ("edit-plus" in family.name)
            assert ("negative_prompt=' '" in code) == ("guided" in family.name)
            pipeline = family.load("base")
            with monkeypatch.context() as patched:
                patched.setattr(type(pipeline), "from_pretrained", lambda *_, **__: pipeline)
                for name in ("VAE_IMAGE_SIZE", "CONDITION_IMAGE_SIZE"):
                    patched.setattr(qwen_module, name, getattr(qwen_module, name))
                exec(code, {})
        else:
            exec(code, {})
        by_card = encoded.pop()
        assert main(["generate", str(run), *words, "--out", "ours"]) == 0
        assert encoded[-1].shape == by_card.shape
        assert_near(encoded[-1], by_card)
        theirs, ours = (
            np.asarray(on_white(Image.open(path))).astype(int)
            for path in (Path("picture.png"), next(Path("ours").glob("*-tuned.png")))
        )
        assert np.abs(theirs - ours).max() <= 1


def on_white(picture: Image.Image) -> Image.Image:
    """What is transparent, as Qwen-Image-2.1 may draw, is white."""
    behind = Image.new("RGBA", picture.size, "white")
    return Image.alpha_composite(behind, picture.convert("RGBA")).convert("RGB")


def test_comfyui_is_for_the_flux_family(family: Family, run: Path) -> None:
    if "qwen" in family.name or "flux3" in family.name:
        with pytest.raises(ConfigError, match="must be one of flux-kontext, flux2-klein, uno"):
            export_run(run, "comfyui", Path("loras"))
        return
    export_run(run, "comfyui", Path("loras"))
    tensors = load_file(Path("loras/tiny.safetensors"))
    plain = load_file(run / "weights" / "pytorch_lora_weights.safetensors")
    assert {name: value for name, value in tensors.items() if ".alpha" in name} == {
        name.replace(".lora_A.weight", ".alpha"): torch.tensor(8.0)
        for name in plain
        if "lora_A" in name
    }
    assert all(torch.equal(tensors[name], plain[name]) for name in plain)
