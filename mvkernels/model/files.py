"""Files and folders that are written whole or not at all, however the writing ends: an error, a kill, a full disk."""

from __future__ import annotations

import os
import re
import shutil
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

# The end of a name that nothing but a writer uses.
_SCRATCH = ".part"
# How the libraries that are written in Rust (safetensors, tokenizers) end the message of an error of the system.
_RUST_ERROR = re.compile(r"\(os error (\d+)\)")
# How PyTorch begins the message of a file that it could not write. It gives no reason.
_TORCH_ERROR = re.compile(r"PytorchStreamWriter failed|\[enforce fail at inline_container|iostream error$")


@contextmanager
def whole_file(path: str | Path) -> Iterator[Path]:
    """Yield a path beside `path` to write a file to. At the end that file takes the place of `path`, in one step.

    After an error `path` is what it was before, and nothing is left beside it. A device or a pipe (`/dev/stdout`) is
    written to directly; of a link, the file behind it is replaced.

    Raises:
        OSError: The file could not be written. It names `path`, whatever library reported it.
    """
    path = Path(path)
    if path.exists() and not path.is_file():
        with errors_name(path):
            yield path
        return
    target = Path(os.path.realpath(path))
    scratch = target.with_name(f".{target.name}{_SCRATCH}")
    with errors_name(path, scratch):
        scratch.unlink(missing_ok=True)  # of a writer that was killed
        try:
            yield scratch
            if target.exists():
                shutil.copymode(target, scratch)
            sync(scratch)
            scratch.replace(target)
            _fsync(target.parent)
        finally:
            scratch.unlink(missing_ok=True)


def write_whole(path: str | Path, text: str, errors: str = "strict") -> None:
    """Write a text file in UTF-8, whole or not at all (see `whole_file`). errors: as of `open`."""
    with whole_file(path) as scratch:
        scratch.write_text(text, encoding="utf-8", errors=errors)


@contextmanager
def whole_folder(path: str | Path, last: Sequence[str] = ("config.json",)) -> Iterator[Path]:
    """Yield an empty folder to write into. At the end `path` has what was written there.

    A folder that does not exist appears in one step. Into one that does, the files are moved one by one, those in
    `last` at the end, in this order: a folder without them is incomplete. After an error `path` is what it was before.

    Raises:
        OSError: A file could not be written. It names the file, or `path` where the library does not say which.
    """
    path = Path(path)
    exists = path.is_dir()
    scratch = path / _SCRATCH if exists else path.with_name(f".{path.name}{_SCRATCH}")
    with errors_name(path, scratch):
        scratch.parent.mkdir(parents=True, exist_ok=True)
        shutil.rmtree(scratch, ignore_errors=True)  # of a writer that was killed
        scratch.mkdir()
        try:
            yield scratch
            sync(scratch)
            if exists:
                order = {name: place for place, name in enumerate(last)}
                for entry in sorted(scratch.iterdir(), key=lambda entry: order.get(entry.name, -1)):
                    entry.replace(path / entry.name)
                _fsync(path)
            else:
                scratch.replace(path)
                _fsync(path.parent)
        finally:
            shutil.rmtree(scratch, ignore_errors=True)


def is_free(path: str | Path) -> bool:
    """Whether nothing is at `path`, or an empty folder, or one with what a killed `whole_folder` left."""
    path = Path(path)
    if path.is_dir():
        return all(entry.name == _SCRATCH for entry in path.iterdir())
    return not path.exists()


def require_free(path: Path) -> None:
    """Raise ValueError where a new folder cannot be written to `path`, because something is there (see `is_free`)."""
    if not is_free(path):
        raise ValueError(f"expected a target that does not exist or is an empty folder, got {path}")


@contextmanager
def errors_name(path: Path, scratch: Path | None = None) -> Iterator[None]:
    """Turn the errors of writing into an OSError that names `path`. scratch: what stands in for it meanwhile."""
    try:
        yield
    except OSError as error:
        name = str(path) if error.filename is None else str(error.filename)
        if scratch is not None and Path(name).is_relative_to(scratch):
            name = str(path / Path(name).relative_to(scratch))
        if error.errno is None:
            raise OSError(f"{name}: {error}") from error
        raise OSError(error.errno, error.strerror or str(error), name) from error
    except Exception as error:
        code = _RUST_ERROR.search(str(error))
        if code is not None:
            raise OSError(int(code[1]), os.strerror(int(code[1])), str(path)) from error
        if _TORCH_ERROR.search(str(error)):
            raise OSError(f"{path}: could not be written, as on a full disk") from error
        raise


def sync(path: Path) -> None:
    """Put a file, or a folder with all that is in it, on the disk (fsync)."""
    for folder, _, files in os.walk(path):
        for name in files:
            _fsync(Path(folder, name))
        _fsync(Path(folder))
    if path.is_file():
        _fsync(path)


def _fsync(path: Path) -> None:
    """One file, or the names in one folder."""
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    except OSError:
        if not path.is_dir():  # some network file systems refuse it for a folder
            raise
    finally:
        os.close(handle)
