"""C++ kernels for the CPU: compiled with g++ for this machine at the first call, and cached in a folder.

The folder is `$MVKERNELS_CACHE`, else `mvkernels` in `$XDG_CACHE_HOME`, else in `~/.cache`. If it is not usable,
`mvkernels-UID` in the folder for temporary files is taken. Only the user or root may have write access. The name of a
library has a hash of its source and `native.h`, the flags, the compiler's version and the machine's features, so that
several machines can share a home. Its last bytes are a hash of that key and of all bytes before: a truncated, damaged
or renamed file is compiled again. A file lock lets one process compile while the others wait. `$CXX` names another g++.
Parallel regions run in the threads of the OpenMP library that PyTorch has loaded.
"""

from __future__ import annotations

import ctypes
import functools
import hashlib
import os
import platform
import shutil
import signal
import stat
import subprocess
import tempfile
import time
import warnings
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

HEADER = Path(__file__).with_name("native.h")
# -Bsymbolic-functions: a library calls its own functions, even if others in the process have the same names.
# avoid-fma-max-bits: tuned for AMD's Zen, GCC fuses multiply and add in some loops but not in others, so that the bits
# of a row would depend on the number of rows.
FLAGS = (
    *("-std=c++17", "-O3", "-fno-math-errno", "--param=avoid-fma-max-bits=0"),
    *("-fopenmp", "-shared", "-fPIC", "-Wl,-Bsymbolic-functions"),
)
SECONDS = 600  # timeout of a compilation, which takes 20 s on an idle machine
SCRATCH, LOCK = ".mvkernels-build-", ".mvkernels-lock"
WITHOUT = (
    "mvkernels: no compiled CPU kernels: {}. PyTorch's operations are used instead; on a CPU the engine then takes "
    "about four times as long. Install g++ (`apt install g++`), or name a compiler in $CXX; `mvkernels env` checks it."
)
BUSY = (
    "mvkernels: other processes use the cores of this machine. Threads of PyTorch and of the CPU kernels spin while "
    "they wait for one another, so a step may take many times as long. Set OMP_WAIT_POLICY=PASSIVE or "
    "OMP_NUM_THREADS=1 before Python starts."
)
# Runs a command that does not outlive this process, even if it is killed: stdin is a pipe that then breaks.
GUARDED = """
exec 3<&0 </dev/null
(read -r _ <&3; kill -KILL 0) >/dev/null 2>&1 &
"$@" 3<&-
status=$?
{ kill -KILL $!; wait $!; } 2>/dev/null
exit $status
"""


def native_reason(source: Path) -> str | None:
    """Return why a source cannot be compiled and loaded here, or None. Tries it, once per process."""
    return _load(source)[1]


def native_library(source: Path, *flags: str) -> ctypes.CDLL:
    """Load the library of a source, compiled with further `flags`. Raises RuntimeError with the reason if it fails."""
    library, reason = _load(source, flags)
    if library is None:
        raise RuntimeError(f"{source.name}: {reason}")
    return library


@functools.cache
def _load(source: Path, flags: tuple[str, ...] = ()) -> tuple[ctypes.CDLL | None, str | None]:
    library, reason = _try(source, flags)
    if reason is not None:
        _warn_once(WITHOUT.format(reason))
    return library, reason


def _try(source: Path, flags: tuple[str, ...]) -> tuple[ctypes.CDLL | None, str | None]:
    name = os.environ.get("CXX") or "g++"
    compiler = shutil.which(name)
    if compiler is None:
        return None, f"expected the C++ compiler {name}, which is not installed"
    unusable = []
    try:
        key, command = _recipe(source, compiler, flags)
        for folder in _folders():
            try:
                library = ctypes.CDLL(str(_compiled(folder, source.stem, key, command)))
            except OSError as error:
                unusable.append(f"{folder}: {error.strerror or error}")
                continue
            if unusable:
                _warn_once(f"mvkernels: {'; '.join(unusable)}: compiled kernels are kept in {folder} instead")
            return library, None
    except subprocess.CalledProcessError as error:
        said = [line for line in error.stderr.splitlines() if "error" in line] or error.stderr.splitlines()
        return None, f"{name} failed: {said[0] if said else f'exit status {error.returncode}'}"
    except subprocess.TimeoutExpired:
        return None, f"{name} took more than {SECONDS} seconds"
    return None, "expected a folder for compiled kernels: " + "; ".join(unusable)


def warn_if_busy() -> None:
    """Warn once if several threads would share cores that other processes use."""
    import torch

    waits = os.environ.get("OMP_WAIT_POLICY", "").lower() == "passive"
    if torch.get_num_threads() > 1 and not waits and os.getloadavg()[0] > len(os.sched_getaffinity(0)):
        _warn_once(BUSY)


@functools.cache
def _warn_once(message: str) -> None:
    warnings.warn(message, stacklevel=2)


def _recipe(source: Path, compiler: str, flags: tuple[str, ...]) -> tuple[str, tuple[str, ...]]:
    """Return the hash of everything that a library depends on, and the command that compiles it."""
    flags, libraries = (*FLAGS, _tuned(), *flags), _openmp()
    version = _run([compiler, "--version"]).splitlines()[:1]
    text = (*flags, *libraries, *version, _features())
    key = b"\0".join((source.read_bytes(), HEADER.read_bytes(), *map(str.encode, text)))
    return hashlib.sha256(key).hexdigest(), (compiler, *flags, str(source), *libraries)


def _folders() -> Iterator[Path]:
    """Yield the folders for libraries, best first."""
    home = os.path.expanduser("~/.cache")  # unlike Path.home, no error where there is no home
    if chosen := os.environ.get("MVKERNELS_CACHE"):
        yield Path(os.path.abspath(os.path.expanduser(chosen)))
    elif os.path.isabs(cache := os.environ.get("XDG_CACHE_HOME") or home):
        yield Path(cache) / "mvkernels"
    yield Path(tempfile.gettempdir()) / f"mvkernels-{os.geteuid()}"


def _compiled(folder: Path, stem: str, key: str, command: Sequence[str]) -> Path:
    """Return the file of a library in a folder, compiled unless it is there and whole. Raises OSError."""
    folder.mkdir(mode=0o755, parents=True, exist_ok=True)
    found = folder.stat()
    if not _is_ours(found):
        got = f"{stat.filemode(found.st_mode)} of user {found.st_uid}"
        raise PermissionError(f"expected a folder that only user {os.geteuid()} can write to, got {got}")
    library = folder / f"{stem}-{key[:16]}.so"
    if not _is_whole(library, key):
        with _locked(folder):
            if not _is_whole(library, key):  # another process may have compiled it meanwhile
                _compile(library, key, command)
    return library


def _compile(library: Path, key: str, command: Sequence[str]) -> None:
    for left in library.parent.glob(SCRATCH + "*"):  # by a process that was killed: this one has the lock
        shutil.rmtree(left, ignore_errors=True)
    with tempfile.TemporaryDirectory(prefix=SCRATCH, dir=library.parent) as scratch:
        made = Path(scratch) / library.name
        _run([*command, "-o", str(made)], scratch)
        code = made.read_bytes()
        made.write_bytes(code + _digest(key, code))  # behind the end of the ELF file, which loaders ignore
        made.chmod(0o755)
        os.replace(made, library)


def _is_ours(found: os.stat_result) -> bool:
    """Whether only this user or root can write to a file."""
    return found.st_uid in (0, os.geteuid()) and not found.st_mode & 0o022


def _is_whole(library: Path, key: str) -> bool:
    """Whether a library is a file of this user or root with all its bytes."""
    try:
        found = library.lstat()
        if not stat.S_ISREG(found.st_mode) or not _is_ours(found):
            return False
        data = library.read_bytes()
    except OSError:
        return False
    size = hashlib.sha256().digest_size
    return data[-size:] == _digest(key, data[:-size])


def _digest(key: str, code: bytes) -> bytes:
    return hashlib.sha256(key.encode() + code).digest()


@contextmanager
def _locked(folder: Path) -> Iterator[None]:
    """Hold the lock of the one process that compiles for a folder. The system releases it if the process dies."""
    import fcntl

    with open(folder / LOCK, "ab", opener=lambda name, flags: os.open(name, flags, 0o600)) as file:
        end = time.monotonic() + 2 * SECONDS
        while True:
            try:
                fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
                break
            except BlockingIOError:
                if time.monotonic() > end:
                    raise TimeoutError(f"another process has held {LOCK} for {2 * SECONDS} seconds") from None
                time.sleep(0.05)
        yield


def _run(command: Sequence[str], scratch: str | None = None) -> str:
    """Run a compiler and return its output. Raises CalledProcessError and TimeoutExpired; leaves no process behind.

    scratch: a folder for its temporary files.
    """
    env = {**os.environ, "LC_ALL": "C"} | ({} if scratch is None else {"TMPDIR": scratch})
    reading, writing = os.pipe()
    with open(reading, "rb") as stdin, open(writing, "wb"):
        process = subprocess.Popen(
            ["sh", "-c", GUARDED, "sh", *command], stdin=stdin, stdout=subprocess.PIPE, stderr=subprocess.PIPE,
            env=env, encoding="utf-8", errors="replace", start_new_session=True,
        )  # fmt: skip
        with process:
            try:
                out, err = process.communicate(timeout=SECONDS)
            except BaseException:
                os.killpg(process.pid, signal.SIGKILL)  # the compiler is several processes
                raise
    if process.returncode:
        raise subprocess.CalledProcessError(process.returncode, list(command), out, err)
    return str(out)


def _tuned() -> str:
    return "-mcpu=native" if platform.machine() in ("aarch64", "arm64") else "-march=native"


def _openmp() -> tuple[str, ...]:
    """Return link flags for PyTorch's own OpenMP library, if it has one: a second one would double the threads."""
    import torch

    folder = Path(torch.__file__).parent / "lib"
    found = sorted(folder.glob("libgomp*.so*"))
    return ("-Wl,--as-needed", str(found[0]), f"-Wl,-rpath,{folder}") if found else ()


def _features() -> str:
    """Return the features of the processor, as in /proc/cpuinfo."""
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return platform.processor()
    return next((line for line in lines if line.startswith(("flags", "Features"))), platform.processor())
