"""Runs that are killed: whatever is on the disk then, the run goes on from the newest whole checkpoint."""

from __future__ import annotations

import shutil
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from transformers import TrainerCallback

from mvkernels.model.training import Recipe, TuningRecipe, train, tune
from mvkernels.model.training.checkpoints import CHECKPOINTS, newest_whole
from mvkernels.model.training.recipe_file import prepare_folder
from tests.support.tiny_model import tiny_model, tiny_tokenizer
from tests.test_files import full_disk, names
from tests.training.test_training import Interrupt
from tests.training.test_tuning import TRACE

SMALL = Recipe(
    steps=4, tokens_per_step=200, warmup_steps=1, hidden_size=32, layers=1, intermediate_size=32, log_every=1,
    save_every=2,
)  # fmt: skip

Run = Callable[..., Any]


class Watch:
    """Copies of a folder as it is before every change to a file in it: what a kill at that moment leaves there."""

    def __init__(self) -> None:
        self.folder: Path | None = None

    @contextmanager
    def of(self, folder: Path, copies: Path) -> Iterator[list[Path]]:
        self.copies, self.found, self.last = copies, [], ()  # type: ignore[var-annotated]
        self.folder = folder
        try:
            yield self.found
        finally:
            self.folder = None

    def __call__(self, event: str, arguments: tuple[Any, ...]) -> None:
        folder, self.folder = self.folder, None  # what happens in here is not watched
        if folder is None:
            return
        try:
            if folder.exists() and any(isinstance(a, (str, Path)) and str(folder) in str(a) for a in arguments):
                state = tuple((path, path.stat().st_size) for path in sorted(folder.rglob("*")))
                if state != self.last:
                    self.last = state
                    self.found.append(Path(shutil.copytree(folder, self.copies / str(len(self.found)))))
        finally:
            self.folder = folder


WATCH = Watch()


@pytest.fixture(scope="module", autouse=True)
def hook() -> None:
    sys.addaudithook(WATCH)  # there is no way to remove one


@pytest.fixture(scope="module", params=["from nothing", "on traces"])
def kind(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> tuple[Recipe | TuningRecipe, Run]:
    if request.param == "from nothing":
        return SMALL, train
    folder = tmp_path_factory.mktemp("base")
    tiny_model().save_pretrained(folder / "model")
    tiny_tokenizer().save_pretrained(folder / "model")
    for i in range(4):
        (folder / f"{i}.xml").write_text(TRACE.format(i, i + 1))
    recipe = TuningRecipe(
        model=str(folder / "model"), data=(str(folder),), passes=(1.0, 1.0), documents_per_step=2, tokens_per_row=600,
        save_every=2, chat=False,
    )  # fmt: skip
    return recipe, tune


def contents(folder: Path) -> dict[str, bytes]:
    return {name: (folder / name).read_bytes() for name in names(folder) if (folder / name).is_file()}


def test_a_kill_at_every_file(kind: tuple[Any, Run], tmp_path: Path) -> None:
    recipe, run = kind
    out = tmp_path / "out"
    with WATCH.of(out, tmp_path / "killed") as killed:
        done = run(recipe, out, progress=False)
    assert len(killed) >= 35
    wanted = load_file(out / "model.safetensors")
    whole: dict[int, dict[str, bytes]] = {}
    reached: dict[int, Path] = {}
    for folder in killed:
        checkpoint = newest_whole(folder / CHECKPOINTS)
        step = 0 if checkpoint is None else int(checkpoint.name.split("-")[1])
        if checkpoint is not None:
            found = contents(checkpoint)
            assert whole.setdefault(step, found) == found, folder
        if (folder / recipe.outcome).exists():  # and nothing but the checkpoints is to be removed
            assert set(names(out)) <= set(names(folder))
        else:
            assert prepare_folder(recipe, folder, resume=True) == checkpoint
            assert step >= max(reached, default=0)
            reached[step] = folder
        if (folder / "config.json").exists():  # it looks like a model
            assert all(torch.equal(load_file(folder / "model.safetensors")[name], wanted[name]) for name in wanted)
            assert (folder / "tokenizer.json").exists()
    assert sorted(reached) == [0, 2, 4]
    for folder in reached.values():
        again = run(recipe, folder, resume=True, progress=False)
        assert again.losses == done.losses
        assert all(torch.equal(load_file(folder / "model.safetensors")[name], wanted[name]) for name in wanted)
        assert names(folder) == names(out)


@pytest.fixture(scope="module")
def interrupted(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run that was interrupted in its third step, behind the checkpoint of the second."""
    out = tmp_path_factory.mktemp("interrupted") / "out"
    with pytest.raises(KeyboardInterrupt):
        train(SMALL, out, progress=False, callbacks=[Interrupt(3)])
    assert [path.name for path in (out / CHECKPOINTS).iterdir()] == ["checkpoint-2"]
    return out


@pytest.mark.parametrize("damage", ["missing", "empty", "cut"])
def test_a_torn_checkpoint_is_passed_over(damage: str, interrupted: Path, tmp_path: Path) -> None:
    """Whichever of its files it is; such a checkpoint is also what other programs and full disks leave."""
    whole, torn = interrupted / CHECKPOINTS / "checkpoint-2", tmp_path / "checkpoint-10"
    shutil.copytree(whole, tmp_path / "checkpoint-9")
    (tmp_path / "checkpoint-best").mkdir()  # not one of a run
    (tmp_path / "checkpoint-99").touch()
    files = [name for name in names(whole) if (whole / name).is_file()]
    assert {"model.safetensors", "optimizer.pt", "scheduler.pt", "rng_state.pth", "trainer_state.json"} <= {*files}
    for name in files:
        shutil.copytree(whole, torn)
        assert newest_whole(tmp_path) == torn
        if damage == "missing":
            (torn / name).unlink()
        else:
            (torn / name).write_bytes(b"" if damage == "empty" else (whole / name).read_bytes()[:-1])
        assert newest_whole(tmp_path) == tmp_path / "checkpoint-9", name
        shutil.rmtree(torn)


def test_a_run_goes_on_past_a_torn_checkpoint(interrupted: Path, tmp_path: Path) -> None:
    """It also takes its place when the run comes there again, and is not kept instead of a newer one."""
    out = Path(shutil.copytree(interrupted, tmp_path / "out"))
    for step in (4, 6):
        shutil.copytree(out / CHECKPOINTS / "checkpoint-2", out / CHECKPOINTS / f"checkpoint-{step}")
        (out / CHECKPOINTS / f"checkpoint-{step}" / "optimizer.pt").write_bytes(b"torn")
    with pytest.raises(KeyboardInterrupt):
        train(SMALL, out, resume=True, progress=False, callbacks=[AfterSaving(4)])
    assert [path.name for path in (out / CHECKPOINTS).iterdir()] == ["checkpoint-4"]
    assert newest_whole(out / CHECKPOINTS) == out / CHECKPOINTS / "checkpoint-4"
    assert [step for step, _ in train(SMALL, out, resume=True, progress=False).losses] == [1, 2, 3, 4]
    with pytest.raises(ValueError, match=r"expected a folder with the checkpoint of .*out, whose run is finished"):
        train(SMALL, out, resume=True)


class AfterSaving(TrainerCallback):
    """What Ctrl-C does, behind a checkpoint."""

    def __init__(self, step: int) -> None:
        self.step = step

    def on_save(self, args, state, control, **kwargs):
        if state.global_step == self.step:
            raise KeyboardInterrupt


def test_a_full_disk_keeps_the_checkpoint_before(interrupted: Path, tmp_path: Path) -> None:
    """Whatever file does not fit: the error names the checkpoint, and the run goes on when there is room."""
    before = names(interrupted)
    for name in ("model.safetensors", "optimizer.pt", "trainer_state.json"):
        out = Path(shutil.copytree(interrupted, tmp_path / name / "out"))
        size = (out / CHECKPOINTS / "checkpoint-2" / name).stat().st_size
        with full_disk(size - 1), pytest.raises(OSError, match=r"out/checkpoints/checkpoint-4") as caught:
            train(SMALL, out, resume=True, progress=False)
        assert "\n" not in str(caught.value) and ".part" not in str(caught.value)
        assert names(out) == before
