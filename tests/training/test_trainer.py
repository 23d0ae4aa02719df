import dataclasses
import gc
import json
import shutil
from collections.abc import Sequence
from pathlib import Path
from weakref import WeakValueDictionary

import pytest
import torch
from diffusers import FluxTransformer2DModel
from helpers import ROOT, assert_near, changed, metrics, tiny
from PIL import Image, ImageColor
from safetensors.torch import load_file

from customized_grpo.assets import path_revision
from customized_grpo.config import RunConfig, dump_config, load_config
from customized_grpo.data.jsonl import JsonlConfig
from customized_grpo.errors import ConfigError, CustomizedGRPOError, DataError
from customized_grpo.evaluation.evaluate import Evaluation, current_outcome, evaluate_run
from customized_grpo.evaluation.marks import marks
from customized_grpo.evaluation.outcome import Outcome
from customized_grpo.evaluation.tables import run_table
from customized_grpo.generators.base import Conditioning
from customized_grpo.generators.pipeline import PipelineGenerator
from customized_grpo.rewards import loading
from customized_grpo.rewards.truth import SHARES
from customized_grpo.runs.run import Run
from customized_grpo.training.session import Session
from customized_grpo.training.train import train
from customized_grpo.types import Example

EMBEDDED = [p for p in (ROOT / "configs").glob("*.yaml") if "embedded:" in p.read_text()]


def weights(run: Path) -> dict[str, torch.Tensor]:
    return load_file(run / "weights" / "pytorch_lora_weights.safetensors")


def without_seconds(row: dict[str, float]) -> dict[str, float]:
    return {name: value for name, value in row.items() if not name.startswith("seconds/")}


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return train(tiny(tmp_path_factory.mktemp("trained")))


def copied(run: Path, folder: Path) -> Path:
    """A run that may be changed."""
    return Path(shutil.copytree(run, folder / run.name))


@pytest.fixture(scope="module")
def evaluated(run: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Outcome]:
    """The run and its evaluation, for which every example was encoded once."""
    folder, encoded = copied(run, tmp_path_factory.mktemp("evaluated")), list[str]()
    encode = PipelineGenerator.encode

    def counting(self: PipelineGenerator, examples: Sequence[Example]) -> Conditioning:
        encoded.extend(example.id for example in examples)
        return encode(self, examples)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(PipelineGenerator, "encode", counting)
        report = evaluate_run(folder)
    assert len(encoded) == len(set(encoded)) == len(report.own.columns["clip-text"])
    return folder, report


def test_run_folder_holds_everything(run: Path) -> None:
    assert {path.name for path in run.iterdir()} == {
        ".lock",
        "advantages.jsonl",
        "checkpoints",
        "config.yaml",
        "environment.json",
        "finished.json",
        "metrics.jsonl",
        "schedule.json",
        "samples",
        "weights",
    }
    assert load_config(run / "config.yaml") == tiny(run.parents[1])
    assert [p.name for p in sorted((run / "samples").iterdir())] == ["000000.png", "000002.png"]
    rows = metrics(run)
    assert [row["update"] for row in rows] == [1, 2]
    for name in (
        "reward/preference/mean",
        "reward/dinov2/std",
        "copy_gap",
        "share/conflicted",
        "share/both_positive",
        "share/both_negative",
        "ratio_mean",
        "mismatch",
        "clip_fraction",
        "grad_norm",
        "zero_variance_groups",
        "seconds/rollout",
        "seconds/reward",
        "seconds/update",
    ):
        assert name in rows[0], name
    assert rows[0]["grad_norm"] > 0
    assert all(0 <= row["mismatch"] < 5e-6 for row in rows)
    assert all(tensor.norm() > 0 for name, tensor in weights(run).items() if "lora_B" in name)


def test_errors_name_the_section_of_the_plug(tiny_config: RunConfig) -> None:
    rewards = (tiny_config.rewards[0], dataclasses.replace(tiny_config.rewards[1], path="nowhere"))
    with pytest.raises(ConfigError, match=r"^rewards\.1\.path: checkpoint 'nowhere'"):
        train(dataclasses.replace(tiny_config, rewards=rewards))
    with pytest.raises(ConfigError, match=r"^generator\.path: checkpoint 'nowhere'"):
        train(changed(tiny_config, generator={"path": "nowhere"}))


def test_evaluators_are_checked_and_stay_only_where_they_validate(
    tiny_config: RunConfig, monkeypatch: pytest.MonkeyPatch
) -> None:
    held: list[set[str]] = []

    def look(self: Session) -> None:
        gc.collect()
        held.append({Path(path).name for _, path, _ in loading._shared if "evaluator" in path})

    monkeypatch.setattr(loading, "_shared", WeakValueDictionary())  # not what other tests hold
    monkeypatch.setattr(Session, "run", look)
    train(tiny_config)
    settings = {"validate_every": 2, "num_validation": 2}
    train(changed(dataclasses.replace(tiny_config, name="curve"), evaluation=settings))
    assert held == [set(), {"evaluator-clip", "evaluator-dino", "evaluator-attributes"}]
    wrong = dataclasses.replace(tiny_config.evaluators[1], path="nowhere")
    evaluators = (tiny_config.evaluators[0], wrong)
    other = dataclasses.replace(tiny_config, name="wrong", evaluators=evaluators)
    with pytest.raises(ConfigError, match=r"^evaluators\.1\.path: checkpoint 'nowhere'"):
        train(other)


@pytest.mark.slow
def test_seeds_repeat_and_differ(run: Path, tiny_config: RunConfig) -> None:
    again = train(dataclasses.replace(tiny_config, name="again"))
    other = train(dataclasses.replace(tiny_config, name="other", seed=1))
    first, second = ([without_seconds(r) for r in metrics(x)] for x in (run, again))
    assert first == second
    assert all(torch.equal(t, weights(again)[name]) for name, t in weights(run).items())
    assert without_seconds(metrics(other)[0]) != first[0]


def test_ema_saves_the_average(tiny_config: RunConfig) -> None:
    frozen = changed(tiny_config, train={"ema_decay": 0.999999})
    averaged = weights(train(frozen))
    assert all(t.abs().max() < 1e-6 for name, t in averaged.items() if "lora_B" in name)


@pytest.mark.slow
def test_full_fine_tuning(tiny_config: RunConfig) -> None:
    run = train(dataclasses.replace(tiny_config, lora=None))
    assert (run / "weights" / "transformer" / "config.json").exists()
    report = evaluate_run(run)
    assert report.models["base"] != report.models["tuned"]


def test_kl_norm_penalty_ratio_norm_mask_and_micro_batches_run_together(
    tiny_config: RunConfig,
) -> None:
    config = changed(
        tiny_config,
        loss={"kl_weight": 0.01, "norm_weight": 0.1, "ratio_norm": True, "kl_mask": 1e-5},
        train={"inner_updates": 2, "micro_batch_size": 3},
    )
    first, second = metrics(train(config))
    assert first["rollout_kl"] == 0 < second["rollout_kl"]
    assert first["ratio_abs_dev"] == 0 < second["ratio_abs_dev"]
    assert "reward/dinov2/mean" in first.keys() - second.keys()  # of the rollout
    assert min(row[name] for row in (first, second) for name in ("kl", "norm_excess")) >= 0


def test_validation_scores_make_a_learning_curve(tiny_config: RunConfig) -> None:
    settings = {"validate_every": 2, "num_validation": 5}
    config = changed(tiny_config, evaluation=settings, train={"num_updates": 3})
    rows = metrics(train(config))
    names = {f"validation/{evaluator.label}" for evaluator in config.evaluators}
    names |= {f"validation/reward/{reward.label}" for reward in config.rewards}
    assert [row["update"] for row in rows] == [0, 1, 2, 3]
    assert [bool(names & row.keys()) for row in rows] == [True, False, True, True]
    assert names <= rows[0].keys()
    shares = [{n: v for n, v in row.items() if "/share/" in n} for row in rows]
    assert [len(some) for some in shares] == [4, 0, 4, 4]
    assert shares[0].keys() == {f"validation/share/{name}" for name in SHARES}
    assert all(0 <= value <= 1 for some in shares for value in some.values())
    assert rows[0]["validation/dinov2"] != rows[3]["validation/dinov2"]
    right = "validation/share/subject_right"  # known here, so it is not the similarity that counts
    gain = rows[3][right] - rows[0][right]
    assert rows[3]["gain/identity"] == pytest.approx(gain, abs=1e-6)
    assert [len([n for n in row if n.startswith("gain/")]) for row in rows] == [0, 0, 6, 6]


def test_only_models_with_repeated_blocks_can_be_compiled(
    tiny_config: RunConfig, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(FluxTransformer2DModel, "_repeated_blocks", None)
    with pytest.raises(ConfigError, match="compile must be false for FluxTransformer2DModel"):
        train(dataclasses.replace(tiny_config, compile=True))


@pytest.mark.slow
@pytest.mark.long
def test_compiled_blocks_train_as_eager_ones(tiny_config: RunConfig) -> None:
    plain = metrics(train(tiny_config))
    torch._dynamo.utils.counters.clear()
    compiled = metrics(train(dataclasses.replace(tiny_config, compile=True, name="compiled")))
    assert torch._dynamo.utils.counters["frames"]["ok"] > 0
    assert compiled[0]["mismatch"] < 5e-6
    assert compiled[0]["grad_norm"] == pytest.approx(plain[0]["grad_norm"], rel=1e-3)


def test_evaluation_writes_table_and_pictures(evaluated: tuple[Path, Outcome]) -> None:
    run, report = evaluated
    with Image.open(run / "evaluation.png") as image:
        seen = {color for _, color in image.convert("RGB").getcolors(image.width * image.height)}
    wrong = [
        m for model in ("base", "tuned") for row in marks(report.models[model], 4) for m in row
    ]
    assert wrong  # of four examples the base has always some wrong
    assert {ImageColor.getrgb(mark.paper) for mark in wrong} <= seen
    assert set(report.models) == {"copy", "ground truth", "unrelated", "base", "tuned"}
    assert Outcome.read(run / "evaluation.json").models == report.models
    assert current_outcome(Run.open(run)).weights == path_revision(str(run / "weights"))
    pictures = {path.stem for path in (run / "pictures" / "held_out").iterdir()}
    assert pictures == {"reference", "ground-truth", "base", "tuned"}
    assert_near(report.models["copy"].columns["dinov2"], [1.0] * 4)
    kept = json.loads((run / "evaluation.json").read_text())
    for model in ("base", "tuned"):
        means = {name: report.models[model].tensors[name].mean().item() for name in SHARES}
        assert {name: kept[model][name] for name in SHARES} == pytest.approx(means, abs=1e-6)
        assert len(kept["statistics"]["models"][model]["means"]["both_right"]) == 5
    assert "joint/domination" in kept["tuned"]
    assert not [name for name in kept["base"] if name.startswith("joint")]
    assert (run / "evaluation.json").read_text().count("\n") == 1
    table = run_table(report)
    first = [line.split()[0] for line in table.splitlines()[1:5]]
    assert tuple(first) == SHARES
    assert all(line.count("±") == 3 for line in table.splitlines()[1:5])  # base, tuned, change
    for word in ("tuned - base", "4 held-out examples", "hypervolume", "joint/domination"):
        assert word in table
    base, tuned = (report.models[m].tensors["clip-text"] for m in ("base", "tuned"))
    mean, error = report.change("clip-text")
    assert mean == pytest.approx((tuned - base).mean().item())
    assert error == pytest.approx(((tuned - base).std() / 2).item())


def test_base_and_anchors_that_are_known_are_not_judged_again(
    evaluated: tuple[Path, Outcome], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run, report = evaluated
    monkeypatch.setattr(Evaluation, "yardstick", None)
    again = evaluate_run(copied(run, tmp_path), known=report.yardstick)
    assert again.models == report.models


@pytest.mark.slow
def test_other_examples_and_one_objective_alone_can_be_evaluated(
    evaluated: tuple[Path, Outcome], tmp_path: Path
) -> None:
    before, run = evaluated[1], copied(evaluated[0], tmp_path)
    config = load_config(run / "config.yaml")
    evaluators = tuple(e for e in config.evaluators if e.objective == "identity")
    text = dump_config(dataclasses.replace(config, evaluators=evaluators))
    (run / "config.yaml").write_text(text)
    report = evaluate_run(run, "validation", num_examples=6)
    table = run_table(report)
    assert "identity (dinov2)" in table
    assert "hypervolume" not in table
    assert "6 validation examples" in table
    assert (run / "validation.png").exists()
    kept = Outcome.read(run / "validation.json").own.columns["dinov2"]
    assert kept[:4] != before.own.columns["dinov2"]
    assert {path.name for path in (run / "pictures").iterdir()} == {"held_out", "validation"}
    with pytest.raises(ConfigError, match="num_examples must be at least 2"):
        evaluate_run(run, num_examples=1)


@pytest.mark.slow
def test_an_untrained_lora_evaluates_to_the_base(tiny_config: RunConfig) -> None:
    config = changed(tiny_config, train={"learning_rate": 1e-30, "num_updates": 1})
    report = evaluate_run(train(config))
    for evaluator in ("clip-text", "dinov2"):
        base, tuned = (report.models[m].columns[evaluator] for m in ("base", "tuned"))
        assert_near(tuned, base, scale=1)


def test_a_second_run_of_the_same_name_is_refused(run: Path) -> None:
    before = (run / "metrics.jsonl").read_bytes()
    with pytest.raises(ConfigError, match="already holds a run"):
        train(tiny(run.parents[1]))
    assert (run / "metrics.jsonl").read_bytes() == before


@pytest.mark.parametrize(
    "change",
    [
        {"generator": {"path": "nowhere"}},
        {"generator": {"height": 60}},
        {"evaluation": {"classifier": "nowhere"}},
        {"evaluators": "nowhere"},
        {"lora": {"rank": 4, "target_modules": ("nothing",)}},
    ],
)
def test_mistakes_leave_nothing_behind(tiny_config: RunConfig, change: dict) -> None:
    path = change.pop("evaluators", None)
    config = changed(tiny_config, **change)
    if path is not None:
        evaluator = dataclasses.replace(config.evaluators[0], path=path)
        config = dataclasses.replace(config, evaluators=(evaluator,))
    with pytest.raises(CustomizedGRPOError) as caught:
        train(config)
    assert "\n" not in str(caught.value)
    assert not Path(tiny_config.output_dir).exists()


def test_examples_the_generator_cannot_take_leave_nothing_behind(
    tiny_config: RunConfig, tmp_path: Path
) -> None:
    Image.new("RGB", (64, 64), "red").save(tmp_path / "a.png")
    rows = [{"prompt": "a dog", "subject": "dog", "references": ["a.png"] * n} for n in (1, 2)]
    for name, row in zip(("one", "two"), rows, strict=True):
        (tmp_path / f"{name}.jsonl").write_text(json.dumps(row))
    data = JsonlConfig(path=str(tmp_path / "two.jsonl"), held_out=str(tmp_path / "one.jsonl"))
    with pytest.raises(DataError, match=r"two.jsonl:1.*exactly one reference, got 2"):
        train(dataclasses.replace(tiny_config, data=data))
    assert not Path(tiny_config.output_dir).exists()


@pytest.mark.parametrize("path", EMBEDDED, ids=lambda p: p.name)
def test_every_config_trains(path: Path, tmp_path: Path) -> None:
    flags = [
        "--output_dir", str(tmp_path),
        "--train.num_updates", "1",
        "--train.inner_updates", "1",
        "--rollout.prompts_per_rollout", "1",
        "--rollout.group_size", "2",
        "--rollout.num_steps", "3",
        "--rollout.num_trained_steps", "1",
        "--evaluation.num_validation", "2",
    ]  # fmt: skip
    assert metrics(train(load_config(path, flags)))[-1]["update"] == 1
