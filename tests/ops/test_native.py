"""Compiled libraries: only whole ones of our own are loaded, one process compiles, and nothing is left behind."""

from __future__ import annotations

import ctypes
import os
import shutil
import signal
import stat
import subprocess
import sys
import tempfile
import time
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from mvkernels.ops import native
from mvkernels.ops.decode import native as decode_native
from mvkernels.ops.dense import layer as layer_native
from mvkernels.ops.dense import linear_amx as linear_tiles
from mvkernels.ops.dense.linear import linear_reason

ROOT = Path(__file__).resolve().parents[2]
pytestmark = pytest.mark.skipif(shutil.which("g++") is None, reason="needs g++, which is not installed")
SOURCE = 'extern "C" int answer() { return 42; }\n'


@pytest.fixture
def source(tmp_path: Path) -> Path:
    path = tmp_path / "tiny.cpp"
    path.write_text(SOURCE)
    return path


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """The cache folder, not there yet; temporary files and the fallback lie beside it."""
    monkeypatch.setenv("MVKERNELS_CACHE", str(tmp_path / "cache"))
    (tmp_path / "temporary").mkdir()
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path / "temporary"))
    native._warn_once.cache_clear()
    yield tmp_path / "cache"
    native._warn_once.cache_clear()


def load(source: Path) -> tuple[int, Path]:
    """What the library answers, and where it is; not by what this process has loaded before."""
    library, reason = native._try(source, ())
    assert library is not None, reason
    return library.answer(), Path(library._name)


def entries(folder: Path) -> set[str]:
    return {path.name for path in folder.iterdir()}


def foreign(path: Path) -> Path:
    """Another library, as an attacker would plant it."""
    subprocess.run(["g++", "-shared", "-fPIC", "-x", "c++", "-", "-o", path], input=SOURCE.replace("42", "666"),
                   text=True, check=True)  # fmt: skip
    return path


def test_a_library_is_compiled_once_and_nothing_else_stays(source: Path, folder: Path) -> None:
    answer, path = load(source)
    assert answer == 42 and path.parent == folder and stat.S_IMODE(path.stat().st_mode) == 0o755
    made = path.stat().st_ino
    assert load(source) == (42, path) and path.stat().st_ino == made
    assert entries(folder) == {path.name, native.LOCK} and not list((folder.parent / "temporary").iterdir())


def cut(path: Path) -> None:
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])


def flip(path: Path) -> None:
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 1
    path.write_bytes(data)


def link(path: Path) -> None:
    path.rename(path.with_name("elsewhere"))
    path.symlink_to("elsewhere")


def pipe(path: Path) -> None:
    path.unlink()
    os.mkfifo(path, 0o600)  # to read it would never end


def own(path: Path) -> None:
    if os.geteuid():
        pytest.skip("needs root to give a file away")
    os.chown(path, 12345, -1)


@pytest.mark.parametrize(
    "damage",
    [
        cut,
        flip,
        link,
        pipe,
        own,
        lambda path: path.write_bytes(b""),
        lambda path: path.write_bytes(path.read_bytes()[:-1]),
        lambda path: path.write_bytes(b"no library" * 1000),
        lambda path: path.chmod(0o777),
        lambda path: path.chmod(0o775),
        foreign,
    ],
    ids=["cut", "flipped", "link", "pipe", "owner", "empty", "last byte", "garbage", "world", "group", "planted"],
)
def test_what_is_not_right_is_compiled_again(damage: Callable[[Path], object], source: Path, folder: Path) -> None:
    _, path = load(source)
    good = path.read_bytes()
    # A copy, as the loader would give the library that is loaded already for the same file.
    path.rename(path.with_name("first"))
    shutil.copy(path.with_name("first"), path)
    damage(path)
    damaged = path.lstat().st_ino
    assert load(source) == (42, path)
    assert path.lstat().st_ino != damaged and path.read_bytes() == good and not path.is_symlink()
    assert stat.S_IMODE(path.stat().st_mode) == 0o755 and path.stat().st_uid == os.geteuid()


def test_a_whole_library_under_the_name_of_another_is_compiled_again(source: Path, folder: Path) -> None:
    _, path = load(source)
    other = source.with_name("other.cpp")
    other.write_text(SOURCE.replace("42", "43"))
    key, _ = native._recipe(other, shutil.which("g++") or "", ())
    shutil.copy(path, folder / f"other-{key[:16]}.so")
    assert load(other) == (43, folder / f"other-{key[:16]}.so")


def unwritable(folder: Path) -> None:
    folder.write_text("a file")


def open_to_all(folder: Path) -> None:
    folder.mkdir()
    folder.chmod(0o777)


def open_to_a_group(folder: Path) -> None:
    folder.mkdir()
    folder.chmod(0o775)


def of_another_user(folder: Path) -> None:
    folder.mkdir()
    own(folder)


@pytest.mark.parametrize("make", [unwritable, open_to_all, open_to_a_group, of_another_user])
def test_a_folder_of_others_is_not_used_and_that_is_said_once(
    make: Callable[[Path], None], source: Path, folder: Path
) -> None:
    _, path = load(source)
    shutil.rmtree(folder)
    make(folder)
    if folder.is_dir():
        foreign(folder / path.name)  # under the very name
        folder.joinpath(path.name).chmod(0o755)
    fallback = folder.parent / "temporary" / f"mvkernels-{os.geteuid()}"
    with pytest.warns(UserWarning, match="are kept in") as said:
        assert load(source) == (42, fallback / path.name)
        load(source)
    [warning] = [str(one.message) for one in said]
    assert warning.startswith(f"mvkernels: {folder}: ") and str(fallback) in warning
    # A fallback that is not ours either is not used.
    fallback.chmod(0o777)
    library, reason = native._try(source, ())
    assert library is None and reason.count("expected a folder") >= 2 and str(fallback) in reason


def test_without_a_home_there_is_still_a_folder(source: Path, folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A user without a passwd entry, as containers have: Path.home() raises RuntimeError."""
    for name in ("MVKERNELS_CACHE", "XDG_CACHE_HOME", "HOME"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setattr(os.path, "expanduser", lambda path: path)  # as it is without an entry
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        answer, path = load(source)
    assert answer == 42 and path.parent == folder.parent / "temporary" / f"mvkernels-{os.geteuid()}"


@pytest.mark.parametrize("chosen", [".", "relative"])
def test_a_relative_folder_is_one_of_the_working_directory(
    chosen: str, source: Path, folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(folder.parent)
    monkeypatch.setenv("MVKERNELS_CACHE", chosen)
    assert load(source)[1].parent == folder.parent / chosen


def test_every_part_of_the_key_counts(source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    header, compiler = tmp_path / "native.h", tmp_path / "g++"
    header.write_text("// one")
    compiler.write_text("#!/bin/sh\necho ${VERSION:-1}\n")
    compiler.chmod(0o755)
    monkeypatch.setattr(native, "HEADER", header)
    key = lambda *flags: native._recipe(source, str(compiler), flags)[0]  # noqa: E731
    first = key()
    assert key() == first
    changes: dict[str, Callable[[pytest.MonkeyPatch], object]] = {
        "source": lambda _: source.write_text(SOURCE + "\n"),
        "header": lambda _: header.write_text("// two"),
        "version": lambda m: m.setenv("VERSION", "2"),
        "flags": lambda m: m.setattr(native, "FLAGS", native.FLAGS[:-1]),
        "tuned": lambda m: m.setattr(native, "_tuned", lambda: "-march=other"),
        "openmp": lambda m: m.setattr(native, "_openmp", lambda: ("/other/libgomp.so",)),
        "features": lambda m: m.setattr(native, "_features", lambda: "flags: none"),
    }
    found = {"nothing": first, "given flags": key("-DONE"), "other given flags": key("-DTWO")}
    for name, change in changes.items():
        with monkeypatch.context() as patch:
            change(patch)
            found[name] = key()
        source.write_text(SOURCE)
        header.write_text("// one")
    assert len(set(found.values())) == len(found), found


# -- several processes, and such as are killed ------------------------------------------------------------------------

# Writes down that it compiles, and that it has.
SLOW = """#!/bin/sh
case "$*" in *--version*) exec g++ --version;; esac
echo $$ >> "$LOG"
sleep "$DELAY" &
wait
exec g++ "$@"
"""
LOAD = """
import sys
from pathlib import Path
from mvkernels.ops import native
native._openmp = lambda: ()
native.SECONDS = float(sys.argv[2])
library, reason = native._try(Path(sys.argv[1]), ())
print(library.answer() if library else reason)
"""


@pytest.fixture
def start(source: Path, folder: Path, tmp_path: Path) -> Callable[..., subprocess.Popen[str]]:
    """Starts a process that loads the library, with a compiler that takes its time."""
    compiler = tmp_path / "slow"
    compiler.write_text(SLOW)
    compiler.chmod(0o755)

    def begin(delay: float, limit: float = 100) -> subprocess.Popen[str]:
        given = {"CXX": str(compiler), "LOG": str(tmp_path / "log"), "DELAY": str(delay), "PYTHONPATH": str(ROOT)}
        return subprocess.Popen(
            [sys.executable, "-c", LOAD, str(source), str(limit)], env={**os.environ, **given}, text=True,
            stdout=subprocess.PIPE, stderr=subprocess.PIPE,
            preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),  # xdist's workers ignore it
        )  # fmt: skip

    return begin


def compiling(tmp_path: Path) -> list[int]:
    """Process numbers of the compilers that were started, as soon as there is one."""
    end = time.monotonic() + 60
    while not (log := tmp_path / "log").exists() or not log.read_text().endswith("\n"):
        assert time.monotonic() < end
        time.sleep(0.01)
    return [int(line) for line in log.read_text().split()]


def assert_gone(group: int) -> None:
    """Waits until no process of a group is left, zombies aside."""

    def states() -> list[str]:
        found = []
        for path in Path("/proc").glob("[0-9]*/stat"):
            try:
                state, _, number = path.read_text().rpartition(")")[2].split()[:3]
            except OSError:
                continue
            if int(number) == group and state != "Z":
                found.append(path.read_text())
        return found

    end = time.monotonic() + 30
    while left := states():
        assert time.monotonic() < end, left
        time.sleep(0.01)


def test_three_processes_compile_once(
    start: Callable[..., subprocess.Popen[str]], tmp_path: Path, folder: Path
) -> None:
    processes = [start(1) for _ in range(3)]
    assert [process.communicate()[0] for process in processes] == ["42\n"] * 3
    assert len(compiling(tmp_path)) == 1
    assert len(entries(folder)) == 2


@pytest.mark.skipif(not Path("/proc/self/stat").exists(), reason="needs /proc")
@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGTERM, signal.SIGINT])
def test_the_compiler_ends_with_its_process_and_the_next_one_cleans_up(
    number: signal.Signals, start: Callable[..., subprocess.Popen[str]], source: Path, tmp_path: Path, folder: Path
) -> None:
    process = start(60)
    [compiler] = compiling(tmp_path)
    group = os.getpgid(compiler)
    assert group != os.getpgid(0)
    process.send_signal(number)
    process.communicate()
    assert_gone(group)
    answer, path = load(source)  # the lock is free again
    assert answer == 42 and entries(folder) == {path.name, native.LOCK}


@pytest.mark.skipif(not Path("/proc/self/stat").exists(), reason="needs /proc")
def test_a_compiler_that_takes_too_long_is_ended_and_named(
    start: Callable[..., subprocess.Popen[str]], tmp_path: Path, folder: Path
) -> None:
    process = start(60, limit=1)
    [compiler] = compiling(tmp_path)
    group = os.getpgid(compiler)
    out, _ = process.communicate()
    assert out == f"{tmp_path / 'slow'} took more than 1.0 seconds\n"
    assert_gone(group)
    assert entries(folder) == {native.LOCK}


def test_a_lock_that_is_never_released_is_not_waited_for_for_ever(
    source: Path, folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(native, "SECONDS", 0.01)
    folder.mkdir()
    with native._locked(folder), pytest.raises(TimeoutError, match="another process"), native._locked(folder):
        pass


# -- what is said ------------------------------------------------------------------------------------------------------


def test_without_a_compiler_it_is_said_once(
    source: Path, folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("CXX", "no-such-compiler")
    other = tmp_path / "other.cpp"
    other.write_text(SOURCE)
    with pytest.warns(UserWarning) as said:
        assert native.native_reason(source) == native.native_reason(other)
    [warning] = [str(one.message) for one in said]
    assert "expected the C++ compiler no-such-compiler, which is not installed" in warning
    assert "four times as long" in warning and "$CXX" in warning
    assert not folder.exists()


@pytest.fixture
def anew() -> Iterator[None]:
    """Libraries are looked for again, in the test and after it."""
    asked = (native._load, native._warn_once, layer_native.layer_reason, layer_native.kernels, linear_reason)
    caches = (*asked, linear_tiles.tiles_reason, decode_native.compile_reason)
    for cache in caches:
        cache.cache_clear()
    yield
    for cache in caches:
        cache.cache_clear()


def test_the_command_line_says_that_there_is_no_compiler(
    anew: None, folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    env, loading = pytest.importorskip("mvkernels.cli.env"), pytest.importorskip("mvkernels.cli.loading")
    monkeypatch.setenv("CXX", "no-such-compiler")
    _, notes = loading.load_engine("embedded", loading.Placement(device="cpu"))
    reason = "expected the C++ compiler no-such-compiler, which is not installed"
    assert notes == [native.WITHOUT.format(reason)]
    for _ in range(2):
        assert env.cpu_kernels() == {"folder": None, "warning": native.WITHOUT.format(reason)}


def test_the_command_line_says_which_folder_is_used(anew: None, folder: Path) -> None:
    env = pytest.importorskip("mvkernels.cli.env")
    unwritable(folder)
    found = env.cpu_kernels()
    assert found["folder"] == str(folder.parent / "temporary" / f"mvkernels-{os.geteuid()}")
    assert found["warning"].startswith(f"mvkernels: {folder}: ")


def test_the_bytes_behind_a_library_do_no_harm(source: Path, folder: Path) -> None:
    _, path = load(source)
    assert ctypes.CDLL(str(shutil.copy(path, path.with_name("copy.so")))).answer() == 42
