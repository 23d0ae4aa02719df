import errno
import os
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from customized_grpo.config import TrainConfig
from customized_grpo.errors import CheckpointError
from customized_grpo.files import replace_folder, write_atomic, write_folder
from customized_grpo.runs.checkpoint import Progress, TrainingState
from customized_grpo.runs.ema import Ema
from customized_grpo.tools.estimate.counting import count
from customized_grpo.training.build import make_optimizer


def fill(text: str):
    return lambda folder: (folder / "file").write_text(text)


def test_a_folder_is_replaced_whole(tmp_path: Path) -> None:
    target = tmp_path / "weights"
    replace_folder(target, fill("one"))
    replace_folder(target, fill("two"))
    assert (target / "file").read_text() == "two"
    assert [p.name for p in tmp_path.iterdir()] == ["weights"]


def test_a_failed_write_leaves_the_old_folder(tmp_path: Path) -> None:
    target = tmp_path / "weights"
    replace_folder(target, fill("one"))

    def broken(folder: Path) -> None:
        (folder / "file").write_text("half")
        raise OSError("disk full")

    with pytest.raises(OSError, match="disk full"):
        replace_folder(target, broken)
    assert (target / "file").read_text() == "one"


def test_a_new_folder_takes_nothing_from_what_lies_beside_it(tmp_path: Path) -> None:
    for name in ("mine.tmp", "mine.old"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "theirs").touch()
    (tmp_path / "mine").mkdir()  # empty: its place is taken
    before = {path.name for path in tmp_path.iterdir()}
    write_folder(tmp_path / "mine", fill("one"))
    assert (tmp_path / "mine" / "file").read_text() == "one"
    with pytest.raises(OSError, match="not empty"):
        write_folder(tmp_path / "mine", fill("two"))
    assert (tmp_path / "mine" / "file").read_text() == "one"
    assert {path.name for path in tmp_path.iterdir()} == before
    assert len(list(tmp_path.glob("mine.*/theirs"))) == 2
    other = tmp_path / "other"
    other.mkdir()
    assert (tmp_path / "mine").stat().st_mode == other.stat().st_mode


def test_a_link_leads_to_where_a_new_folder_is_written(tmp_path: Path) -> None:
    (tmp_path / "link").symlink_to("there/deeper")
    write_folder(tmp_path / "link", fill("one"))
    assert (tmp_path / "link").is_symlink()
    assert (tmp_path / "there" / "deeper" / "file").read_text() == "one"
    assert sorted(path.name for path in tmp_path.iterdir()) == ["link", "there"]
    assert [path.name for path in (tmp_path / "there").iterdir()] == ["deeper"]


@pytest.mark.parametrize("mask", [0o022, 0o027, 0o077])
def test_files_of_safetensors_follow_the_umask_too(tmp_path: Path, mask: int) -> None:
    def write(folder: Path) -> None:
        (folder / "deeper").mkdir()
        save_file({"x": torch.zeros(1)}, folder / "deeper" / "weights.safetensors")
        (folder / "text").touch()

    before = os.umask(mask)
    try:
        replace_folder(tmp_path / "inside", write)
        write_folder(tmp_path / "mine", write)
    finally:
        os.umask(before)
    files = [path for path in tmp_path.rglob("*") if path.is_file()]
    assert [path.stat().st_mode & 0o777 for path in files] == [0o666 & ~mask] * 4


def test_text_is_replaced_whole(tmp_path: Path) -> None:
    write_atomic(tmp_path / "a.json", "1")
    write_atomic(tmp_path / "a.json", "2")
    assert (tmp_path / "a.json").read_text() == "2"
    assert len(list(tmp_path.iterdir())) == 1


def test_writers_of_one_file_do_not_take_each_others(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """In containers of their own their process ids are equal."""
    seen = set()
    monkeypatch.setattr("customized_grpo.files.sync", lambda path: seen.add(path.name))
    for _ in range(2):
        write_atomic(tmp_path / "a.json", "1")
    assert len(seen - {tmp_path.name}) == 2


def test_a_text_that_cannot_be_written_leaves_nothing_behind(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(*_: object) -> None:
        raise OSError(errno.ENOSPC, "no space left")

    write_atomic(tmp_path / "a.json", "1")
    monkeypatch.setattr("customized_grpo.files.sync", full)
    with pytest.raises(OSError, match=r"no space left: .*a\.json"):
        write_atomic(tmp_path / "a.json", "2")
    assert [path.name for path in tmp_path.iterdir()] == ["a.json"]
    assert (tmp_path / "a.json").read_text() == "1"


def test_ema_averages_and_gives_the_weights_back() -> None:
    module = torch.nn.Linear(1, 1, bias=False)
    torch.nn.init.constant_(module.weight, 1.0)
    ema = Ema(module, decay=0.75)
    with torch.no_grad():
        module.weight.fill_(3.0)
    ema.update()
    with ema.applied():
        assert module.weight.item() == pytest.approx(0.75 * 1 + 0.25 * 3)
    assert module.weight.item() == 3.0


def test_the_average_is_applied_without_a_copy_of_all_weights() -> None:
    """The optimizer holds the parameters and FSDP their parts: they stay the same tensors."""
    module = torch.nn.ModuleList([torch.nn.Linear(64, 64, bias=False) for _ in range(8)])
    ema = Ema(module, decay=0.5)
    places = [p.data_ptr() for p in module.parameters()]
    with torch.no_grad():
        module[0].weight.fill_(3.0)
    average, current = ema.average[0].clone(), module[0].weight.clone()

    def apply() -> None:
        with ema.applied():
            assert torch.equal(module[0].weight, average)
            assert [p.data_ptr() for p in module.parameters()] == places

    assert count(apply).peak <= 2 * module[0].weight.nbytes
    assert torch.equal(module[0].weight, current)
    assert torch.equal(ema.average[0], average)


def made(seed: int, optimizer: str = "adamw", width: int = 3):
    """A module that has been trained for two steps, its optimizer, its average."""
    torch.manual_seed(seed)
    module = torch.nn.Sequential(torch.nn.Linear(width, 64), torch.nn.Linear(64, 64))
    module[0].requires_grad_(False)
    trained = [p for p in module.parameters() if p.requires_grad]
    optimizer_ = make_optimizer(trained, TrainConfig(optimizer=optimizer, learning_rate=0.1))
    ema = Ema(module, 0.5)
    for _ in range(2):
        step(module, optimizer_, ema)
    return module, optimizer_, ema


def step(module: torch.nn.Module, optimizer: torch.optim.Optimizer, ema: Ema) -> None:
    optimizer.zero_grad()
    module(torch.randn(5, module[0].in_features)).square().sum().backward()
    optimizer.step()
    ema.update()


@pytest.mark.parametrize("optimizer", ["adamw", "adamw-8bit"])
def test_a_state_goes_on_as_if_nothing_had_been(optimizer: str) -> None:
    if optimizer == "adamw-8bit":
        pytest.importorskip("bitsandbytes")
    module, optimizer_, ema = made(0, optimizer)
    other, other_optimizer, other_ema = made(1, optimizer)
    other[0].load_state_dict(module[0].state_dict())  # frozen: not in the state
    tensors = TrainingState(module, optimizer_, ema).tensors()
    step(module, optimizer_, ema)  # goes on while the copy is kept
    TrainingState(other, other_optimizer, other_ema).load(tensors)
    step(other, other_optimizer, other_ema)
    for one, two in zip(module.parameters(), other.parameters(), strict=True):
        assert torch.equal(one, two)
    for one, two in zip(ema.average, other_ema.average, strict=True):
        assert torch.equal(one, two)


def test_a_state_of_another_model_is_refused() -> None:
    tensors = TrainingState(*made(0)).tensors()
    module, optimizer, _ = made(0)
    with pytest.raises(CheckpointError, match=r"ema/1.bias is in the checkpoint only"):
        TrainingState(module, optimizer, None).load(tensors)
    tensors["policy/1.weight"] = tensors["policy/1.weight"][:5]
    with pytest.raises(CheckpointError, match=r"policy/1.weight is \(5, 64\) in the checkpoint"):
        TrainingState(*made(0)).load(tensors)


def test_the_best_is_best_at_its_weaker_objective() -> None:
    others = {"validation/reward/a": 1.0, "validation/share/copies": 0.5}
    progress = Progress(base={"validation/a": 2.0, "validation/a/b": 0.5, **others})
    found = []
    for a, b in ((2.2, 0.51), (3.0, 0.5), (2.1, 0.55), (2.1, 0.55)):
        progress.validation = {"validation/a": a, "validation/a/b": b, "validation/reward/a": 0.0}
        found.append((progress.score(), progress.note_best()))
    assert [best for _, best in found] == [True, False, True, False]
    assert [score for score, _ in found] == pytest.approx([0.02, 0.0, 0.05, 0.05])
    progress.validation = {}
    assert progress.score() is None
    assert not progress.note_best()
