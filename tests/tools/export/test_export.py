"""`cgrpo export`: what others load computes what the run computes."""

import dataclasses
import json
import re
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
import yaml
from diffusers import DiffusionPipeline
from helpers import assert_near, changed, error_line
from made_runs import make_run
from PIL import Image
from safetensors.torch import load_file, save_file

from customized_grpo.cli.main import main
from customized_grpo.config import LoraSettings, RunConfig, dump_config
from customized_grpo.evaluation.items import Item
from customized_grpo.evaluation.outcome import Judgement, Outcome, Yardstick
from customized_grpo.files import LORA_FILE
from customized_grpo.generators.flux1 import Flux1Generator
from customized_grpo.runs.checkpoint import CheckpointStore
from customized_grpo.runs.run import Run
from customized_grpo.tools.export.comfyui import comfyui_tensors
from customized_grpo.tools.export.folders import _write_hub_folder, export_run
from customized_grpo.training.build import make_trainable
from customized_grpo.training.policy import make_policy
from customized_grpo.training.sampling import sample_images
from customized_grpo.types import Example

PROMPT = "an animal on the beach"


@pytest.fixture
def config(tiny_config: RunConfig, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> RunConfig:
    """Of a run with a shift of its own; a reference lies in the working directory."""
    monkeypatch.chdir(tmp_path)
    small = np.random.default_rng(0).integers(0, 255, (8, 8, 3), np.uint8)
    picture = Image.fromarray(small).resize((64, 64), Image.Resampling.NEAREST)
    picture.save("reference.png")
    rollout = {"num_steps": 3, "num_trained_steps": 1, "shift": 2.0}
    return changed(tiny_config, rollout=rollout)


@pytest.fixture
def run(config: RunConfig) -> Path:
    return make_run(config)


def pixels(path: Path) -> np.ndarray:
    with Image.open(path) as image:
        return np.asarray(image).astype(int)


def run_the_card(folder: Path) -> dict:
    """What the names of its snippet are, after it has run."""
    (code,) = re.findall(r"```python\n(.*?)```", (folder / "README.md").read_text(), re.S)
    names: dict = {}
    exec(code, names)
    return names


@pytest.mark.parametrize(
    ("lora", "size"), [(True, (64, 64)), (False, (64, 64)), (True, (96, 72)), (True, (80, 110))]
)
def test_the_snippet_of_the_card_makes_the_picture_of_cgrpo_generate(
    config: RunConfig, lora: bool, size: tuple[int, int]
) -> None:
    run = make_run(config, scale=0.05, lora=lora)
    if size != (64, 64):  # a phone's: of another shape, lying on its side, and here cut out
        with Image.open("reference.png") as picture:
            taken = picture.convert("RGBA").resize(size, Image.Resampling.NEAREST)
        taken.putalpha(Image.linear_gradient("L").resize(size))
        exif = Image.Exif()
        exif[0x0112] = 6
        taken.save("reference.png", exif=exif)
    assert main(["export", str(run), "--to", "hub-folder", "--out", "mine"]) == 0
    names = run_the_card(Path("mine"))
    assert bool(names["pipeline"].get_list_adapters()) == lora
    words = ["--prompt", PROMPT, "--reference", "reference.png", "--out", "ours"]
    assert main(["generate", "mine/config.yaml", "--lora", "mine", *words]) == 0
    theirs = pixels(Path("picture.png"))
    base, tuned = (pixels(next(Path("ours").glob(f"*-{kind}.png"))) for kind in ("base", "tuned"))
    # 8 bit: what rounding alone can change; where a reference is resized, Pillow rounds in between.
    assert np.abs(theirs - tuned).max() <= (1 if size == (64, 64) else 12)
    assert np.abs(theirs - tuned).mean() < 0.5
    assert np.abs(theirs - base).mean() > 1


@pytest.mark.parametrize("offload", [False, True])
def test_the_snippet_of_the_card_computes_on_the_gpu_where_there_is_one(
    config: RunConfig, offload: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    run = make_run(changed(config, generator={"offload": offload}))
    export_run(run, "hub-folder", Path("mine"))
    (code,) = re.findall(r"```python\n(.*?)```", Path("mine/README.md").read_text(), re.S)
    moves: list[str] = []
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(DiffusionPipeline, "to", lambda self, place: moves.append(place))
    monkeypatch.setattr(
        DiffusionPipeline, "enable_model_cpu_offload", lambda self: moves.append("in turn")
    )
    exec(code.partition("image = pipeline(")[0], {})
    assert moves == ["in turn" if offload else "cuda"]


def test_the_card_says_what_was_trained_how_and_to_what_effect(
    run: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    yardstick = Yardstick(
        set="held_out",
        items=(Item(subject="a dog", prompt_index=0, prompt="a dog"),) * 2,
        objectives={"clip": "prompt"},
        base=Judgement(columns={"clip": [0.25, 0.5]}),
    )
    tuned = Outcome(
        name="tuned",
        own=Judgement({"clip": [0.5, 0.875]}),
        yardstick=yardstick,
        weights=Run.open(run).digest,
    )
    (run / "evaluation.json").write_text(tuned.to_json())
    Image.new("RGB", (8, 8), "red").save(run / "evaluation.png")
    words = ["export", str(run), "--to", "hub-folder", "--out", "mine", "--license", "mit"]
    assert main(words) == 0
    listed = capsys.readouterr().out.splitlines()
    files = ["README.md", "config.yaml", LORA_FILE, "samples.png"]
    assert listed == ["exported: mine", *(f"  {name}" for name in files)]
    card = Path("mine/README.md").read_text()
    front = yaml.safe_load(card.split("---")[1])
    assert front["license"] == "mit"
    assert front["library_name"] == "diffusers"
    assert "base_model" not in front  # the embedded one is not on the hub
    assert "+0.3125 ± 0.0625" in card
    assert "tuned is better in prompt (+0.3125 ± 0.0625)." in card
    assert "LoRA of rank 4, alpha 8" in card
    assert "| updates | 2 of 2, learning rate 0.0005 |" in card
    assert "(samples.png)" in card
    assert Path("mine/config.yaml").read_bytes() == (run / "config.yaml").read_bytes()
    assert pixels(Path("mine/samples.png")).tolist() == pixels(run / "evaluation.png").tolist()
    beside = [Path("bare.tmp"), Path("bare.old")]
    for path in beside:
        path.mkdir()
    assert main([*words[:4], "--no-picture", "--out", "bare"]) == 0
    assert all(path.exists() for path in beside)
    assert not Path("bare/samples.png").exists()
    assert "samples.png" not in Path("bare/README.md").read_text()


@pytest.mark.parametrize("kept", ["of other weights", "of an earlier version"])
def test_a_card_has_no_results_of_other_weights(
    run: Path, kept: str, caplog: pytest.LogCaptureFixture
) -> None:
    """As after `cgrpo evaluate` and a resume."""
    digest = Run.open(run).digest if kept == "of other weights" else None
    item = Item(subject="a dog", prompt_index=0, prompt="a dog")
    yardstick = Yardstick(set="held_out", items=(item,), objectives={"clip": "prompt"})
    judged = Judgement({"clip": [0.5]})
    outcome = Outcome(name="tuned", own=judged, yardstick=yardstick, weights=digest)
    (run / "evaluation.json").write_text(outcome.to_json())
    Image.new("RGB", (8, 8), "red").save(run / "evaluation.png")
    (run / "samples").mkdir()
    for update, color in ((1, "green"), (2, "blue"), (7, "black")):  # 7: weights that are gone
        Image.new("RGB", (8, 8), color).save(run / "samples" / f"{update:06d}.png")
    weights = load_file(run / "weights" / LORA_FILE)
    save_file({name: 2 * tensor for name, tensor in weights.items()}, run / "weights" / LORA_FILE)
    export_run(run, "hub-folder", Path("mine"))
    assert "The weights were not evaluated" in Path("mine/README.md").read_text()
    blue = pixels(run / "samples" / "000002.png").tolist()
    assert pixels(Path("mine/samples.png")).tolist() == blue
    (warning,) = (r.getMessage() for r in caplog.records if r.levelname == "WARNING")
    assert warning.startswith(f"left out of the model card: RUN: {run} must have been evaluated")
    assert warning.endswith(f"run `cgrpo evaluate {run}`")


def test_a_base_on_the_hub_is_named_as_the_hub_wants_it(run: Path, config: RunConfig) -> None:
    text = (run / "config.yaml").read_text().replace("embedded:generator", "owner/base-model")
    (run / "config.yaml").write_text(text)
    export_run(run, "hub-folder", Path("mine"))
    card = Path("mine/README.md").read_text()
    front = yaml.safe_load(card.split("---")[1])
    assert (front["base_model"], front["base_model_relation"]) == ("owner/base-model", "adapter")
    assert "base = 'owner/base-model'" in card
    assert "height=1024," in card
    assert "not evaluated" in card


def test_what_a_plug_calls_its_key_is_not_given_to_others(run: Path) -> None:
    opened, config = Run.open(run), (run / "config.yaml").read_text()
    (run / "config.yaml").write_text(config + "api_key: s3cr3t\n")
    Path("mine").mkdir()
    _write_hub_folder(opened, "mine", "mit", False, Path("mine"))
    assert Path("mine/config.yaml").read_text() == config + "api_key: '***'\n"


def test_merged_is_a_stock_pipeline_with_the_pictures_of_base_and_lora(
    run: Path, config: RunConfig, examples: list[Example]
) -> None:
    assert main(["export", str(run), "--to", "merged", "--out", "model"]) == 0
    generator = config.generator.build(torch.device("cpu"))
    generator.load_weights(run / "weights")
    merged = dataclasses.replace(config.generator, path="model").build(torch.device("cpu"))
    assert not getattr(merged.transformer, "peft_config", None)
    noise = generator.noise(2, torch.Generator().manual_seed(0))
    encoded = generator.encode(examples[:2])

    def draw(model: Flux1Generator) -> torch.Tensor:
        return sample_images(make_policy(model, config), encoded, noise, 2)

    ours = draw(generator)
    assert_near(draw(merged), ours)
    with generator.base_policy():
        assert (ours - draw(generator)).abs().mean() > 1e-3
    for name, tensor in encoded.tensors().items():
        assert torch.equal(tensor, merged.encode(examples[:2]).tensors()[name])
    with torch.no_grad():  # and not only with the LoRA merged for sampling
        one, other = (
            g.velocity(noise, torch.full((2,), 0.7), encoded) for g in (generator, merged)
        )
    assert_near(one, other)


def test_merged_of_all_weights_holds_them(config: RunConfig) -> None:
    run = make_run(config, lora=False)
    export_run(run, "merged", Path("model"))
    file = "transformer/diffusion_pytorch_model.safetensors"
    saved, trained = load_file(Path("model") / file), load_file(run / "weights" / file)
    assert saved.keys() == trained.keys()
    assert all(torch.equal(saved[name], trained[name]) for name in saved)


def _fused(state: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """FLUX's own layout, as ComfyUI keeps it: projections that see the same input are one weight,
    rows one after the other."""
    groups = {
        "attn": ("to_q", "to_k", "to_v"),
        "context": ("add_q_proj", "add_k_proj", "add_v_proj"),
    }
    found = {}
    for number in range(sum("transformer_blocks" in n and "add_q_proj.weight" in n for n in state)):
        for name, parts in groups.items():
            rows = [state[f"transformer_blocks.{number}.attn.{part}.weight"] for part in parts]
            found[f"double.{number}.{name}"] = torch.cat(rows)
    singles = {n.split(".")[1] for n in state if n.startswith("single_transformer_blocks")}
    for number in singles:
        prefix = f"single_transformer_blocks.{number}"
        rows = [state[f"{prefix}.attn.{part}.weight"] for part in groups["attn"]]
        found[f"single.{number}"] = torch.cat([*rows, state[f"{prefix}.proj_mlp.weight"]])
    return found


def _place(module: str, width: int) -> tuple[str, int]:
    """Fused weight and first row of a module, by ComfyUI's table."""
    place = {"to_q": 0, "to_k": 1, "to_v": 2, "proj_mlp": 3}
    place |= {"add_q_proj": 0, "add_k_proj": 1, "add_v_proj": 2}
    part = module.split(".")[-1]
    if part not in place:
        return "", 0
    kind, number, *_ = module.removeprefix("transformer.").split(".")
    if kind == "single_transformer_blocks":
        return f"single.{number}", place[part] * width
    return f"double.{number}.{'context' if 'add' in part else 'attn'}", place[part] * width


def test_what_comfyui_adds_is_what_diffusers_merges(run: Path, config: RunConfig) -> None:
    assert main(["export", str(run), "--to", "comfyui", "--out", "loras"]) == 0
    tensors = load_file(Path("loras") / f"{run.name}.safetensors")
    generator = config.generator.build(torch.device("cpu"))
    state = generator.transformer.state_dict()
    fused = {name: weight.clone() for name, weight in _fused(state).items()}
    width = generator.transformer.config.num_attention_heads
    width *= generator.transformer.config.attention_head_dim
    modules = {name.removesuffix(".alpha") for name in tensors if name.endswith(".alpha")}
    assert len(tensors) == 3 * len(modules)
    for module in modules:
        up, down = tensors[f"{module}.lora_B.weight"], tensors[f"{module}.lora_A.weight"]
        name, first = _place(module, width)
        if name:
            change = tensors[f"{module}.alpha"] / len(down) * (up @ down)
            fused[name][first : first + len(change)] += change
    export_run(run, "merged", Path("model"))
    merged = _fused(load_file("model/transformer/diffusion_pytorch_model.safetensors"))
    changes = []
    for name, weight in merged.items():
        assert_near(fused[name], weight, terms=64)
        changes.append((weight - _fused(state)[name]).abs().max().item())
    assert min(changes) > 1e-3  # every fused weight has been adapted


def test_diffusers_reads_the_scale_of_the_comfyui_file_too(run: Path, config: RunConfig) -> None:
    from peft.tuners.lora import LoraLayer

    export_run(run, "comfyui", Path("loras"))
    generator = config.generator.build(torch.device("cpu"))
    generator.pipeline.load_lora_weights("loras", weight_name=f"{run.name}.safetensors")
    layers = [m for m in generator.transformer.modules() if isinstance(m, LoraLayer)]
    assert {float(scale) for layer in layers for scale in layer.scaling.values()} == {2.0}


def test_the_comfyui_file_is_read_back_by_generate_and_as_a_start(
    run: Path, config: RunConfig
) -> None:
    export_run(run, "comfyui", Path("loras"))
    file = f"loras/{run.name}.safetensors"
    words = ["--prompt", PROMPT, "--reference", "reference.png", "--no-base"]
    assert main(["generate", str(run), *words, "--out", "own"]) == 0
    text = dump_config(config)
    Path("plain.yaml").write_text(text)
    assert main(["generate", "plain.yaml", "--lora", file, *words, "--out", "read"]) == 0
    own, read = (pixels(next(Path(out).glob("*-tuned.png"))) for out in ("own", "read"))
    assert (own == read).all()
    going_on = dataclasses.replace(config, name="on", lora=LoraSettings(path=file))
    generator = config.generator.build(torch.device("cpu"))
    make_trainable(generator, going_on)
    generator.save_weights(Path("again"))
    before, after = (load_file(folder / LORA_FILE) for folder in (run / "weights", Path("again")))
    assert before.keys() == after.keys()
    assert all(torch.equal(before[name], after[name]) for name in before)


def test_a_module_that_comfyui_does_not_know_is_named(tmp_path: Path) -> None:
    from safetensors.torch import save_file

    pair = {f"transformer.norm_out.linear.lora_{m}.weight": torch.zeros(2, 2) for m in "AB"}
    meta = {"lora_adapter_metadata": json.dumps({"transformer.lora_alpha": 4})}
    save_file(pair, tmp_path / "x.safetensors", meta)
    with pytest.raises(Exception, match=r"ComfyUI knows .* got 'transformer.norm_out.linear'"):
        comfyui_tensors(tmp_path / "x.safetensors")


def test_an_unfinished_run_gives_its_newest_checkpoint(run: Path) -> None:
    assert Run.open(run).updates == 2
    store = CheckpointStore(run, keep=2)
    weights = load_file(run / "weights" / LORA_FILE)
    record = {"score": None}
    store.save(
        1, {}, record, lambda folder: shutil.copytree(run / "weights", folder, dirs_exist_ok=True)
    )
    store.wait()
    shutil.rmtree(run / "weights")
    export_run(run, "hub-folder", Path("mine"))
    assert "| updates | 1 of 2," in Path("mine/README.md").read_text()
    exported = load_file(Path("mine") / LORA_FILE)
    assert all(torch.equal(weights[name], exported[name]) for name in weights)


def test_a_refused_export_leaves_nothing(
    run: Path, config: RunConfig, capsys: pytest.CaptureFixture[str]
) -> None:
    full = make_run(dataclasses.replace(config, name="full"), lora=False)
    Path("there").mkdir()
    before = sorted(Path().iterdir())
    cases = [
        (run, "hub-folder", "there", "--out must not exist yet"),
        (full, "comfyui", "new", "must be the run of a LoRA, got one of all weights"),
        (run.parent, "merged", "new", "config.yaml is not in it"),
    ]
    for folder, to, out, expected in cases:
        assert expected in error_line(capsys, "export", folder, "--to", to, "--out", out)
    words = ["export", run, "--to", "merged", "--out", "new", "--license", "mit"]
    assert "--license has no effect with --to merged" in error_line(capsys, *words)
    text = (run / "config.yaml").read_text()
    (run / "config.yaml").write_text(text.replace("quantization: null", "quantization: int8"))
    assert "quantization must be null, got 'int8'" in error_line(capsys, *words[:6])
    assert sorted(Path().iterdir()) == before
