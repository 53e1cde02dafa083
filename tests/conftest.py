"""Fixtures, the deterministic hypothesis profile, and the reasons for which a marked test is skipped."""

from __future__ import annotations

import functools
import importlib.util
import os
from collections.abc import Callable, Generator
from pathlib import Path

import pytest
from hypothesis import HealthCheck, settings

ROOT = Path(__file__).resolve().parent.parent

# The same examples on every run and every machine; no deadline, because the machine may be busy.
settings.register_profile(
    "ci",
    derandomize=True,
    database=None,
    deadline=None,
    max_examples=25,
    suppress_health_check=[HealthCheck.too_slow, HealthCheck.data_too_large],
)
settings.load_profile("ci")


def call_with_room(function: Callable[..., object], /, **arguments: object) -> object:
    return function(**arguments)


# CPython keeps frames in chunks of 16 KiB, and maps and unmaps a chunk on each call that crosses a border: a loop of
# Triton's interpreter at such a depth took 3.5 times as long. A frame of 512 KiB makes the chunk around it 1 MiB.
call_with_room.__code__ = call_with_room.__code__.replace(co_stacksize=2**16)


@pytest.hookimpl(tryfirst=True, wrapper=True)
def pytest_pyfunc_call(pyfuncitem: pytest.Function) -> Generator[None, object, object]:
    pyfuncitem.obj = functools.partial(call_with_room, pyfuncitem.obj)
    return (yield)


def data_folder() -> Path:
    """The folder with the real inputs; it need not exist."""
    named = os.environ.get("MVKERNELS_DATA")
    return Path(named).resolve() if named else ROOT.parent / "shared" / "data"


def interpreting() -> bool:
    return os.environ.get("TRITON_INTERPRET", "0").lower() not in ("", "0", "false", "off", "no")


def has_cuda() -> bool:
    import torch

    return torch.cuda.is_available()


def skip_reasons() -> dict[str, str]:
    """Marker -> why its tests cannot run in this process; markers whose tests can run are absent."""
    reasons = {}
    cuda = has_cuda()
    triton = importlib.util.find_spec("triton") is not None
    if not cuda:
        reasons["gpu"] = "needs a CUDA device: torch.cuda.is_available() is False"
    elif interpreting():
        reasons["gpu"] = "TRITON_INTERPRET is set, with which no kernel runs on the GPU: runs in a process without it"
    if not data_folder().is_dir():
        reasons["real_data"] = f"needs the real inputs: no folder {data_folder()} (set MVKERNELS_DATA)"
    if not triton:
        reasons["triton"] = reasons["aot"] = "needs triton, which is not installed"
    elif not cuda and not interpreting():
        reasons["triton"] = "no CUDA device: runs in the interpreter, with TRITON_INTERPRET=1 in the environment"
    if triton and interpreting():
        reasons["aot"] = "TRITON_INTERPRET is set, which spoils ahead-of-time compilation: runs in a process without it"
    return reasons


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    reasons = skip_reasons()
    for item in items:
        for marker, reason in reasons.items():
            if item.get_closest_marker(marker):
                item.add_marker(pytest.mark.skip(reason=reason))


@pytest.fixture(scope="session")
def data_dir() -> Path:
    """Folder with the real inputs (``MVKERNELS_DATA``, default ``../shared/data``)."""
    folder = data_folder()
    if not folder.is_dir():
        pytest.skip(f"needs the real inputs: no folder {folder} (set MVKERNELS_DATA)")
    return folder
