"""C++ kernels for the CPU: compiled with g++ for this very machine when one is first called, kept in a folder, loaded.

The folder is `$MVKERNELS_CACHE`, else `mvkernels` in `$XDG_CACHE_HOME`, else in `~/.cache`. A library's name has a hash
of its source and `native.h`, the flags, the compiler's version and the machine's features, so that a home that many
machines share serves each its own. `$CXX` names another g++. The parallel regions run in the threads of the OpenMP
library that PyTorch has loaded already.
"""

from __future__ import annotations

import ctypes
import functools
import hashlib
import os
import platform
import shutil
import subprocess
import tempfile
from pathlib import Path

HEADER = Path(__file__).with_name("native.h")
# -Bsymbolic-functions: a library calls its own functions, whatever else in the process has their names.
FLAGS = ("-std=c++17", "-O3", "-fno-math-errno", "-fopenmp", "-shared", "-fPIC", "-Wl,-Bsymbolic-functions")
SECONDS = 120  # that a compilation may take


def native_reason(source: Path) -> str | None:
    """Why a source cannot be compiled and loaded here, or None. Tries it, once in a process."""
    return _load(source)[1]


def native_library(source: Path, *flags: str) -> ctypes.CDLL:
    """The library of a source. flags: further ones of the compiler. Raises RuntimeError with the reason where there is
    none."""
    library, reason = _load(source, flags)
    if library is None:
        raise RuntimeError(f"{source.name}: {reason}")
    return library


@functools.cache
def _load(source: Path, flags: tuple[str, ...] = ()) -> tuple[ctypes.CDLL | None, str | None]:
    name = os.environ.get("CXX") or "g++"
    compiler = shutil.which(name)
    if compiler is None:
        return None, f"expected the C++ compiler {name}, which is not installed"
    try:
        return ctypes.CDLL(str(_compiled(source, compiler, flags))), None
    except subprocess.CalledProcessError as error:
        said = [line for line in error.stderr.splitlines() if "error" in line] or error.stderr.splitlines()
        return None, f"{name} failed: {said[0] if said else f'exit status {error.returncode}'}"
    except (OSError, subprocess.TimeoutExpired) as error:
        return None, f"{type(error).__name__}: {error}"


def _compiled(source: Path, compiler: str, flags: tuple[str, ...]) -> Path:
    """The library's file, compiled unless it is there. Several processes may compile at once: each renames its own."""
    flags, libraries = (*FLAGS, _tuned(), *flags), _openmp()
    version = _output(compiler, "--version").splitlines()[0]
    key = "\0".join((source.read_text(), HEADER.read_text(), *flags, *libraries, version, _features()))
    folder = _folder()
    target = folder / f"{source.stem}-{hashlib.sha256(key.encode()).hexdigest()[:16]}.so"
    if not target.exists():
        folder.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=folder) as scratch:
            made = Path(scratch) / target.name
            _output(compiler, *flags, str(source), *libraries, "-o", str(made))
            os.replace(made, target)
    return target


def _output(*command: str) -> str:
    return subprocess.run(command, check=True, capture_output=True, text=True, timeout=SECONDS).stdout


def _folder() -> Path:
    if chosen := os.environ.get("MVKERNELS_CACHE"):
        return Path(chosen)
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "mvkernels"


def _tuned() -> str:
    return "-mcpu=native" if platform.machine() in ("aarch64", "arm64") else "-march=native"


def _openmp() -> tuple[str, ...]:
    """PyTorch's own OpenMP library, where it brings one: with another one there would be twice as many threads."""
    import torch

    folder = Path(torch.__file__).parent / "lib"
    found = sorted(folder.glob("libgomp*.so*"))
    return ("-Wl,--as-needed", str(found[0]), f"-Wl,-rpath,{folder}") if found else ()


def _features() -> str:
    """What the processor can do, as Linux says it."""
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return platform.processor()
    return next((line for line in lines if line.startswith(("flags", "Features"))), platform.processor())
