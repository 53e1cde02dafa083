"""Freed memory that stays with the process: counted by the pages that the system has to bring."""

from __future__ import annotations

import platform
import subprocess
import sys

import pytest

PROGRAM = """
import resource, sys, torch
from mvkernels.model.training.allocator import keep_freed_memory
if sys.argv[1] == "kept":
    assert keep_freed_memory()
def work():
    for _ in range(8):
        torch.ones(20_000_000)  # 80 MB, freed at once
work()
before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
work()
print(resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before)
"""


@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="needs glibc")
def test_large_blocks_are_brought_once() -> None:
    def faults(how: str) -> int:
        run = subprocess.run([sys.executable, "-c", PROGRAM, how], check=True, capture_output=True, text=True)
        return int(run.stdout)

    assert faults("given back") > 100_000 > 25_000 > faults("kept")  # 156,250 pages are written
