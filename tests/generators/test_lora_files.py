"""LoRAs in the layouts of other trainers: read as diffusers reads them, and trained on."""

from __future__ import annotations

import dataclasses
import json
import re
from pathlib import Path
from typing import Any

import pytest
import torch
from families import FAMILIES, STEPS, Family, denoise, run_config
from helpers import assert_near, changed
from lora_layouts import LAYOUTS, Layout, make_adapters, merge, write_diffusers, write_peft
from made_runs import make_run
from safetensors.torch import load_file, save_file
from torch import Tensor
from toy_world import blocks

from customized_grpo.cli.main import main
from customized_grpo.config import LoraSettings, check_config
from customized_grpo.errors import CheckpointError, ConfigError
from customized_grpo.files import LORA_FILE
from customized_grpo.generators.flux2_klein import Flux2KleinGenerator
from customized_grpo.generators.lora import TRAINED, attach_lora
from customized_grpo.generators.lora_files import read_lora
from customized_grpo.pictures import save_grid
from customized_grpo.training import samples, validation
from customized_grpo.training.policy import make_policy
from customized_grpo.training.rollout import collect_rollout
from customized_grpo.training.train import train

CPU = torch.device("cpu")
_FAMILIES = {f.name: f for f in FAMILIES}
_CASES = [(layout, name) for layout in LAYOUTS for name in layout.families]


@pytest.fixture(scope="session")
def checkpoints(tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    found = {}
    for name in ("flux-kontext", "flux2-klein", "qwen-image-edit-plus"):
        found[name] = str(tmp_path_factory.mktemp("checkpoint") / name)
        _FAMILIES[name].build(Path(found[name]))
    return found


@pytest.fixture
def kontext(checkpoints: dict[str, str]) -> Any:
    return _FAMILIES["flux-kontext"].config(checkpoints["flux-kontext"]).build(CPU)


def pictures(family: Family, generator: Any) -> Tensor:
    """Latents by our rollout, in the form in which the stock pipeline gives them."""
    noise = generator.noise(1, torch.Generator().manual_seed(3))
    latents = denoise(generator, generator.encode([blocks()]), noise)
    return generator.unpack(latents) if isinstance(generator, Flux2KleinGenerator) else latents


@pytest.mark.parametrize(("layout", "name"), _CASES, ids=lambda case: getattr(case, "name", case))
def test_every_layout_makes_the_pictures_that_diffusers_makes_of_it(
    layout: Layout, name: str, checkpoints: dict[str, str], tmp_path: Path
) -> None:
    family, path = _FAMILIES[name], checkpoints[name]
    generator = family.config(path).build(CPU)
    adapters = layout.make(name, generator.transformer)
    file = layout.write(adapters, tmp_path / "lora", family.load(path))
    base = pictures(family, generator)
    generator.load_weights(file)
    ours = pictures(family, generator)
    assert (ours - base).abs().max() > 1e-2
    noise = generator.noise(1, torch.Generator().manual_seed(3))
    merged = family.load(path)
    merge(merged.transformer, adapters)
    assert_near(ours, family.latents(merged, blocks(), noise, STEPS))
    if name in layout.by_diffusers:
        stock = family.load(path)
        stock.load_lora_weights(str(file))
        torch.testing.assert_close(
            ours, family.latents(stock, blocks(), noise, STEPS), rtol=0, atol=1e-5
        )


@pytest.mark.slow
@pytest.mark.parametrize("layout", LAYOUTS, ids=lambda layout: layout.name)
def test_a_run_goes_on_from_every_layout(
    layout: Layout,
    checkpoints: dict[str, str],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Its first rollout is the LoRA's own, and two updates later its ranks and alphas are."""
    family, path = _FAMILIES["flux-kontext"], checkpoints["flux-kontext"]
    stock = family.config(path).build(CPU)
    adapters = layout.make(family.name, stock.transformer)
    file = layout.write(adapters, tmp_path / "lora", family.load(path))
    seen = []

    def spy(policy: Any, conditioning: Any, config: Any, rng: Any, **options: Any) -> Any:
        state = rng.get_state()
        rollout = collect_rollout(policy, conditioning, config, rng, **options)
        seen.append((conditioning, state, rollout.images))
        return rollout

    shown: list[list[str]] = []

    def shown_by(path: Path, examples: Any, columns: Any) -> None:
        shown.append(list(columns))
        save_grid(path, examples, columns)

    monkeypatch.setattr(samples, "collect_rollout", spy)
    monkeypatch.setattr(validation, "save_grid", shown_by)
    plain = run_config(family, path, tmp_path, num_updates=2, learning_rate=1e-3)
    lora = LoraSettings(path=str(file))
    config = check_config(dataclasses.replace(plain, lora=lora))
    run = train(config)
    merge(stock.transformer, adapters)
    conditioning, state, images = seen[0]
    rng = torch.Generator()
    rng.set_state(state)
    own = collect_rollout(make_policy(stock, config), conditioning, config.rollout, rng)
    torch.testing.assert_close(images, own.images, rtol=0, atol=1e-5)

    assert shown
    assert all(columns == ["start", "now"] for columns in shown)
    start = read_lora(file, family.config(path).build(CPU).transformer)
    trained = read_lora(run / "weights", family.config(path).build(CPU).transformer)
    assert trained.keys() == start.keys()
    for module, pair in trained.items():
        assert (pair.rank, pair.alpha) == (start[module].rank, start[module].alpha)
        assert 0 < (pair.up - start[module].up).abs().max() < 3e-3  # two steps of Adam
    again = family.load(path)
    again.load_lora_weights(str(run / "weights"))  # the stock loader, with the patterns
    for module, pair in trained.items():
        layer = again.transformer.get_submodule(module)
        assert layer.scaling["default_0"] == pair.alpha / pair.rank


def test_exports_are_read_back_by_every_command(
    checkpoints: dict[str, str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    family = _FAMILIES["flux-kontext"]
    plain = run_config(family, checkpoints[family.name], Path("runs"), num_updates=1)
    run = make_run(plain)
    for to in ("hub-folder", "comfyui"):
        assert main(["export", str(run), "--to", to, "--out", to]) == 0
    transformer = family.config(checkpoints[family.name]).build(CPU).transformer
    own = read_lora(run / "weights", transformer)
    for file in (Path("hub-folder"), Path("comfyui"), Path("comfyui/tiny.safetensors")):
        found = read_lora(file, transformer)
        assert found.keys() == own.keys()
        for module, pair in found.items():
            assert torch.equal(pair.down, own[module].down)
            assert torch.equal(pair.up, own[module].up)
            assert pair.alpha == own[module].alpha


def test_an_export_for_comfyui_keeps_the_scale_of_every_module(
    checkpoints: dict[str, str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A run that went on from a LoRA of many ranks and alphas."""
    monkeypatch.chdir(tmp_path)
    family, path = _FAMILIES["flux-kontext"], checkpoints["flux-kontext"]
    generator = family.config(path).build(CPU)
    adapters = make_adapters(family.name, generator.transformer, fused=False)
    write_peft(adapters, tmp_path / "lora", family.load(path))
    run = make_run(run_config(family, path, Path("runs")))
    generator.load_weights(tmp_path / "lora")
    generator.save_weights(run / "weights")
    assert main(["export", str(run), "--to", "comfyui", "--out", "comfyui"]) == 0
    tensors = load_file("comfyui/tiny.safetensors")
    for module, adapter in adapters.items():
        assert tensors[f"transformer.{module}.alpha"] == adapter.alpha
        assert torch.equal(tensors[f"transformer.{module}.lora_A.weight"], adapter.down)


@pytest.mark.slow
def test_a_fused_layer_of_flux1_is_split_at_its_real_widths() -> None:
    """diffusers knows no other; what it computes from must have the scale in it."""
    from diffusers import FluxTransformer2DModel

    with torch.device("meta"):
        model = FluxTransformer2DModel(num_layers=1, num_single_layers=1, guidance_embeds=True)
    random = torch.Generator().manual_seed(0)
    down, up = (torch.randn(s, generator=random) for s in ((4, 3072), (21504, 4)))
    name = "lora_unet_single_blocks_0_linear1"
    tensors = {f"{name}.lora_down.weight": down, f"{name}.lora_up.weight": up}
    pairs = _written(tensors | {f"{name}.alpha": torch.tensor(2.0)}, model)
    prefix = "single_transformer_blocks.0."
    parts = ["attn.to_q", "attn.to_k", "attn.to_v", "proj_mlp"]
    assert [prefix + part for part in parts] == list(pairs)
    changes = [p.alpha / p.rank * (p.up @ p.down) for p in pairs.values()]
    assert_near(torch.cat(changes), 0.5 * (up @ down))


def _written(tensors: dict[str, Tensor], model: Any) -> Any:
    import tempfile

    with tempfile.TemporaryDirectory() as folder:
        save_file(tensors, Path(folder, "x.safetensors"))
        return read_lora(Path(folder), model)


def test_adapters_stay_float32_on_a_bfloat16_base(
    checkpoints: dict[str, str], tmp_path: Path
) -> None:
    family, path = _FAMILIES["flux-kontext"], checkpoints["flux-kontext"]
    half = dataclasses.replace(family.config(path), dtype="bfloat16").build(CPU)
    adapters = make_adapters(family.name, half.transformer, fused=False)
    write_diffusers(adapters, tmp_path / "lora", family.load(path))
    half.load_weights(tmp_path / "lora")
    for module, adapter in adapters.items():
        layer = half.transformer.get_submodule(module)
        assert torch.equal(layer.lora_A[TRAINED].weight, adapter.down)
        assert torch.equal(layer.lora_B[TRAINED].weight, adapter.up)


ODD = "transformer_blocks.0.attn.to_q"


@pytest.mark.parametrize(
    ("tensors", "expected"),
    [
        ({"layers.0.attn.wq.lora_A.weight": (2, 8), "layers.0.attn.wq.lora_B.weight": (8, 2)},
         "FluxTransformer2DModel, got 'layers.0.attn.wq', which is not in it; .* another model"),
        ({"lora_unet_single_blocks_0_nothing.lora_down.weight": (2, 8),
          "lora_unet_single_blocks_0_nothing.lora_up.weight": (8, 2)},
         "got 'lora_unet_single_blocks_0_nothing', which is not in it"),
        ({f"{ODD}.lora_A.weight": (2, 64), f"{ODD}.lora_B.weight": (64, 2)},
         "must map 128 features to 128, got 64 to 64; .* another size"),
        ({f"{ODD}.lora_A.weight": (2, 128)}, r"lora_B must be there, it is missing"),
        ({f"{ODD}.lora_A.weight": (2, 128), f"{ODD}.lora_B.weight": (128, 3)},
         r"must have matrices \[rank, in\] and \[out, rank\], got \[2, 128\] and \[128, 3\]"),
        ({f"{ODD}.dora_scale": (8,)}, r"got '.*dora_scale' \(DoRA\); export it as a plain LoRA"),
        ({f"{ODD}.lokr_w1": (8,)}, r"\(LoKr\)"),
        ({"lora_te1_text_model_encoder_layers_0_mlp_fc1.lora_down.weight": (2, 8)},
         r"\(of a text encoder, which is not trained here\)"),
    ],
    ids=["model", "module", "size", "half", "ranks", "dora", "lokr", "text"],
)  # fmt: skip
def test_a_file_of_another_kind_or_model_is_refused(
    kontext: Any, tmp_path: Path, tensors: dict[str, tuple[int, ...]], expected: str
) -> None:
    file = tmp_path / "x.safetensors"
    save_file({name: torch.ones(shape) for name, shape in tensors.items()}, file)
    settings = LoraSettings(path=str(tmp_path))
    place = re.escape(f"lora.path: {file}: ")
    with pytest.raises(CheckpointError, match=f"^{place}.*{expected}"):
        attach_lora(kontext.transformer, settings, ())


def test_a_rank_or_a_module_that_the_config_of_peft_does_not_have_is_named(
    kontext: Any, checkpoints: dict[str, str], tmp_path: Path
) -> None:
    adapters = make_adapters("flux-kontext", kontext.transformer, fused=False)
    family = _FAMILIES["flux-kontext"]
    write_peft(adapters, tmp_path, family.load(checkpoints["flux-kontext"]))
    config = tmp_path / "adapter_config.json"
    good = json.loads(config.read_text())
    (first, second, *_) = adapters
    config.write_text(json.dumps(good | {"rank_pattern": good["rank_pattern"] | {first: 7}}))
    with pytest.raises(CheckpointError, match=rf"{first} must have the rank .* 7, got 4"):
        read_lora(tmp_path, kontext.transformer)
    config.write_text(json.dumps(good | {"peft_type": "IA3"}))
    with pytest.raises(CheckpointError, match=r"must be a LoRA, adapter_config\.json says"):
        read_lora(tmp_path, kontext.transformer)
    config.write_text(json.dumps(good | {"use_dora": True}))
    with pytest.raises(CheckpointError, match=r"got 'use_dora' \(DoRA\)"):
        read_lora(tmp_path, kontext.transformer)
    config.unlink()
    with pytest.raises(CheckpointError, match=r"must have adapter_config.json beside it"):
        read_lora(tmp_path, kontext.transformer)
    config.write_text(json.dumps(good))
    file = tmp_path / "adapter_model.safetensors"
    save_file({n: t for n, t in load_file(file).items() if second not in n}, file)
    with pytest.raises(CheckpointError, match=rf"the adapter of {second}, which target_modules"):
        read_lora(tmp_path, kontext.transformer)


@pytest.mark.parametrize("name", ["lora.pt", "pytorch_lora_weights.bin", "x.ckpt"])
def test_a_pickle_is_refused_unread_and_several_files_are_too(tmp_path: Path, name: str) -> None:
    file = tmp_path / name
    file.write_bytes(b"\x80\x02}.")
    for path in (file, tmp_path):
        refused = rf"^lora\.path: .*{name} must be a safetensors file, .*weights_only=True"
        with pytest.raises(CheckpointError, match=refused):
            read_lora(path, torch.nn.Module(), "lora.path: ")
    for other in ("a", "b"):
        (tmp_path / f"{other}.safetensors").write_bytes(b"")
    with pytest.raises(CheckpointError, match=r"must hold one LoRA, got a\.safetensors, b\.safet"):
        read_lora(tmp_path, torch.nn.Module())
    with pytest.raises(CheckpointError, match=f"nowhere must hold {LORA_FILE} .* hf download"):
        read_lora(tmp_path / "nowhere", torch.nn.Module())


@pytest.mark.parametrize(
    ("sections", "expected"),
    [
        ({"lora": {"path": "x", "rank": 4}}, r"lora\.rank must be null with lora\.path, got 4"),
        ({"lora": {"path": "x", "rank": None, "alpha": 2.0}}, r"lora\.alpha must be .* got 2\.0"),
        (
            {"lora": {"path": "x", "rank": None, "target_modules": ("to_q",)}},
            r"lora\.target_modules must be null with lora\.path, got \[.*to_q.*\]",
        ),
        ({"loss": {"kl_weight": 0.1, "kl_to": "start"}}, r"kl_to must be base without lora\.path"),
        (
            {"lora": {"path": "x", "rank": None}, "loss": {"kl_to": "start"}},
            r"loss\.kl_to must be base when loss\.kl_weight and loss\.norm_weight are 0",
        ),
    ],
)
def test_what_a_lora_to_start_from_excludes(
    checkpoints: dict[str, str], tmp_path: Path, sections: Any, expected: str
) -> None:
    family = _FAMILIES["flux-kontext"]
    config = run_config(family, checkpoints[family.name], tmp_path, num_updates=1)
    with pytest.raises(ConfigError, match=expected):
        check_config(changed(config, **sections))
