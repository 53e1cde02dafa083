"""What is written whole or not at all: files and folders, and the errors that name them."""

from __future__ import annotations

import os
import resource
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from mvkernels.model.files import errors_name, is_free, whole_file, whole_folder, write_whole
from tests.support.tiny_model import tiny_model, tiny_tokenizer


@contextmanager
def full_disk(bytes_left: int) -> Iterator[None]:
    """The system refuses files beyond a size, as it does on a full disk, with another number."""
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (bytes_left, before[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)


WRITERS: dict[str, Callable[[Path], object]] = {
    "text": lambda path: path.write_text("x" * 9999),
    "safetensors": lambda path: save_file({"x": torch.zeros(9999)}, path),
    "torch": lambda path: torch.save(torch.zeros(9999), path),
}


def names(folder: Path) -> list[str]:
    return sorted(str(path.relative_to(folder)) for path in folder.rglob("*"))


@pytest.mark.parametrize("before", [None, "before"], ids=["a new file", "an old file"])
@pytest.mark.parametrize("writer", WRITERS)
def test_a_file_is_whole_or_what_it_was(writer: str, before: str | None, tmp_path: Path) -> None:
    path = tmp_path / "page.html"
    if before is not None:
        path.write_text(before)
    with full_disk(4096), pytest.raises(OSError, match=r"page.html'?(:|$)") as caught, whole_file(path) as scratch:
        WRITERS[writer](scratch)
    assert ".part" not in str(caught.value) and "\n" not in str(caught.value)
    assert names(tmp_path) == ([] if before is None else ["page.html"])
    assert before is None or path.read_text() == before


def test_a_file_is_seen_when_it_is_whole(tmp_path: Path) -> None:
    path = tmp_path / "a.txt"
    path.write_text("old")
    path.chmod(0o640)
    link = tmp_path / "link.txt"
    link.symlink_to(path)
    with whole_file(link) as scratch:
        assert scratch.suffix == ".part" and scratch.parent == tmp_path
        with scratch.open("w") as file:
            file.write("new")
            file.flush()
            assert path.read_text() == "old"
    assert path.read_text() == "new" and link.is_symlink()
    assert path.stat().st_mode & 0o777 == 0o640 and names(tmp_path) == ["a.txt", "link.txt"]
    with pytest.raises(RuntimeError, match="the caller's own"), whole_file(path) as scratch:
        scratch.write_text("torso")
        raise RuntimeError("the caller's own")
    assert path.read_text() == "new" and names(tmp_path) == ["a.txt", "link.txt"]


def test_what_a_killed_writer_left_is_overwritten(tmp_path: Path) -> None:
    elsewhere = tmp_path / "elsewhere"
    elsewhere.write_text("kept")
    (tmp_path / ".a.txt.part").symlink_to(elsewhere)
    write_whole(tmp_path / "a.txt", "whole")
    assert elsewhere.read_text() == "kept" and (tmp_path / "a.txt").read_text() == "whole"
    (tmp_path / ".b.part").mkdir()
    (tmp_path / ".b.part" / "torso").touch()
    with whole_folder(tmp_path / "b") as scratch:
        (scratch / "x").touch()
    assert names(tmp_path) == ["a.txt", "b", "b/x", "elsewhere"]
    (tmp_path / "c" / ".part").mkdir(parents=True)
    assert is_free(tmp_path / "c") and is_free(tmp_path / "d") and not is_free(tmp_path / "b")
    with whole_folder(tmp_path / "c") as scratch:
        (scratch / "x").touch()
    assert names(tmp_path / "c") == ["x"]


def test_a_pipe_is_written_to(tmp_path: Path) -> None:
    pipe = tmp_path / "pipe"
    os.mkfifo(pipe)
    reader = os.open(pipe, os.O_RDONLY | os.O_NONBLOCK)
    write_whole(pipe, "through")
    assert os.read(reader, 99) == b"through" and names(tmp_path) == ["pipe"]
    os.close(reader)


def test_where_nothing_can_be_written(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match=r"nowhere/page.html'$"):
        write_whole(tmp_path / "nowhere" / "page.html", "x")
    with pytest.raises(IsADirectoryError, match=f"{tmp_path}'$"):
        write_whole(tmp_path, "x")
    with pytest.raises(OSError, match=r"No space left on device: '/dev/full'$"):
        write_whole("/dev/full", "x")


@pytest.mark.parametrize("kind", ["new", "empty", "used"])
def test_a_folder_is_whole_or_what_it_was(kind: str, tmp_path: Path) -> None:
    path = tmp_path / "out"
    if kind != "new":
        path.mkdir()
    if kind == "used":
        (path / "recipe.json").write_text("kept")
    before = names(tmp_path)
    for size, file in ((100, "config.json"), (20000, "model.safetensors")):
        with full_disk(size), pytest.raises(OSError, match=r"/out(/\w+\.json)?'$"), whole_folder(path) as scratch:
            tiny_model().save_pretrained(scratch)
            raise AssertionError(f"{file} was written")
        assert names(tmp_path) == before
    with full_disk(4096), pytest.raises(OSError, match=r"File too large: .*/out"), whole_folder(path) as scratch:
        tiny_tokenizer().save_pretrained(scratch)
    assert names(tmp_path) == before
    with whole_folder(path) as scratch:
        for name in ("config.json", "a", "z"):
            (scratch / name).write_text(name)
        visible = [name for name in names(path) if not name.startswith(".part")]
        assert visible == (["recipe.json"] if kind == "used" else [])
    assert names(path) == sorted(["a", "config.json", "z", *(["recipe.json"] if kind == "used" else [])])


def test_the_last_file_comes_last(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A kill between two files leaves a folder that nothing takes for a model."""
    (tmp_path / "recipe.json").touch()
    moved: list[str] = []
    plain = Path.replace
    monkeypatch.setattr(Path, "replace", lambda self, to: moved.append(self.name) or plain(self, to))
    with whole_folder(tmp_path, ("config.json", "losses.csv")) as scratch:
        for name in ("config.json", "a", "losses.csv", "z"):
            (scratch / name).touch()
    assert sorted(moved[:2]) == ["a", "z"] and moved[2:] == ["config.json", "losses.csv"]


def test_errors_that_are_not_of_writing_stay(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match=r"other.txt"), errors_name(tmp_path / "page.html"):
        (tmp_path / "other.txt").read_text()
    with pytest.raises(KeyError), errors_name(tmp_path):
        raise KeyError("x")
