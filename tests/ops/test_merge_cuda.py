"""The CUDA kernel of merge_branches: its source run on the CPU, compiled for several GPUs, and run on one."""

from __future__ import annotations

import ctypes
import functools
import re
import shutil
import subprocess
from pathlib import Path

import pytest
import torch
from hypothesis import example, given
from hypothesis import strategies as st

import mvkernels as mk
from mvkernels.ops.merge.cuda import CUPY_INSTALLED, KERNEL, OPTIONS, SOURCE, THREADS
from tests.ops.merge_cases import STATE, MergeCase, assert_same, copy_of, expected, int32, random_case

TESTS = Path(__file__).resolve().parent
CPU_THREADS = (8, THREADS)  # few threads: many passes over the children of a block
GUARD = 64  # words around each buffer that must stay as they are
SIZES = st.lists(st.none() | st.integers(0, 40), max_size=5)


@pytest.fixture(scope="module")
def kernels(tmp_path_factory: pytest.TempPathFactory) -> dict[int, ctypes.CDLL]:
    """The unmodified source as a library of the host, for each number of threads in a thread block."""
    compiler = shutil.which("g++")
    if compiler is None:
        pytest.skip("needs g++, which is not installed: it runs the kernel's source on the CPU")
    folder, found = tmp_path_factory.mktemp("kernels"), {}
    for threads in CPU_THREADS:
        library = folder / f"merge_{threads}.so"
        flags = ("-std=c++17", "-O1", "-shared", "-fPIC", "-Wall", "-Wextra", "-Werror")
        defined = (f"-DTHREADS={threads}", f'-DKERNEL_SOURCE="{SOURCE}"')
        command = [compiler, *flags, *defined, str(TESTS / "kv_merge_host.cpp"), "-o", str(library)]
        built = subprocess.run(command, capture_output=True, text=True)
        assert built.returncode == 0, built.stderr
        found[threads] = ctypes.CDLL(str(library))
    return found


class Guarded:
    """A copy of a tensor with words before and after it that nobody may write."""

    def __init__(self, tensor: torch.Tensor) -> None:
        self.shape = tensor.shape
        self.all = torch.full((tensor.numel() + 2 * GUARD,), -12345, dtype=torch.int32)
        self.all[GUARD : GUARD + tensor.numel()] = tensor.reshape(-1)

    @property
    def address(self) -> ctypes.c_void_p:
        return ctypes.c_void_p(self.all.data_ptr() + 4 * GUARD)

    def tensor(self) -> torch.Tensor:
        """What it holds now."""
        outside = torch.cat([self.all[:GUARD], self.all[len(self.all) - GUARD :]])
        assert bool((outside == -12345).all()), "the kernel wrote outside a buffer"
        return self.all[GUARD : len(self.all) - GUARD].view(self.shape)


def run_on_cpu(kernel: ctypes.CDLL, case: MergeCase, order: int) -> mk.BranchTables:
    state = [Guarded(getattr(case.tables, name)) for name in STATE]
    indices = [Guarded(index) for index in case.indices]
    sizes = (case.tables.num_branches, case.tables.capacity, len(case.children), len(case.parents), order)
    divergent = kernel.run_merge(*(buffer.address for buffer in (*state, *indices)), *map(ctypes.c_int, sizes))
    assert not divergent, "the threads of a block came to different barriers"
    for buffer, index in zip(indices, case.indices, strict=True):
        assert torch.equal(buffer.tensor(), index)
    return mk.BranchTables(*(buffer.tensor() for buffer in state))


@pytest.mark.parametrize("threads", CPU_THREADS)
@given(SIZES, st.integers(1, 120), st.integers(0, 12), st.integers(0, 2**31), st.integers(0, 9))
@example([300], 1500, 8, 1, 0)
@example([300], 1500, 8, 2, 1)
@example([1], 4, 4, 3, 0)
@example([0, None, 1, 0], 6, 3, 4, 1)
@example([256, 257, 255, 512], 4000, 9, 5, 7)
@example([300], 40, 8, 6, 0)
def test_the_source_equals_the_reference(kernels, threads, sizes, capacity, longest, seed, order) -> None:
    """In whatever order the threads run between two barriers: also where blocks overflow, or children have nothing."""
    case = random_case(sizes, capacity, longest, seed, crowded=0.4)
    assert_same(run_on_cpu(kernels[threads], case, order), expected(case))


@pytest.mark.parametrize("threads", CPU_THREADS)
@pytest.mark.parametrize(
    ("parents", "children", "child_ptr"),
    [
        ([9, 4], [1, 2, 5], [0, 2, 3]),
        ([-2, 4], [1, 2, 5], [0, 2, 3]),
        ([0, 4], [1, 9, 5], [0, 2, 3]),
        ([0, 4], [-1, 2, 5], [0, 2, 3]),
        ([0, 4], [1, 0, 5], [0, 2, 3]),
        ([4, 0], [5, 1, 2], [0, 1, 4]),
        ([0, 4], [1, 2, 5], [3, 2, 3]),
        ([0, 4], [1, 2, 5], [-1, 2, 3]),
    ],
)  # fmt: skip
def test_a_block_with_numbers_out_of_range_is_refused(kernels, threads, parents, children, child_ptr) -> None:
    """On a GPU the host does not read the indices. The other block is merged."""
    tables = random_case([2, 1], 12, 4, 0, idle=1).tables
    tables.used.fill_(2)
    case = MergeCase(tables, int32(parents), int32(children), int32(child_ptr))
    got = run_on_cpu(kernels[threads], case, 0)
    assert_same(got, expected(case))
    assert int(got.error) == 2
    assert sorted(got.used.tolist()) == [0, 2, 2, 2, 2, 4]


@pytest.mark.parametrize("threads", CPU_THREADS)
@pytest.mark.parametrize(
    ("used", "error"),
    [([2, 3, 3, 1, 1], 0), ([2, 3, 4, 1, 1], 1), ([8, 0, 0, 1, 1], 0), ([8, 1, 0, 1, 1], 1), ([0, 8, 8, 1, 1], 1),
     ([9, 0, 0, 1, 1], 2), ([-1, 0, 0, 1, 1], 2), ([0, 9, 0, 1, 1], 2), ([2, 3, -1, 1, 1], 2)],
)  # fmt: skip
def test_lengths_at_and_beyond_the_capacity(kernels, threads, used, error) -> None:
    """Rows of 8 entries. The other block is merged in any case."""
    tables = random_case([2, 1], 8, 0, 0, idle=0).tables
    tables.used.copy_(int32(used))
    case = MergeCase(tables, int32([0, 3]), int32([1, 2, 4]), int32([0, 2, 3]))
    got = run_on_cpu(kernels[threads], case, 0)
    assert_same(got, expected(case))
    assert int(got.error) == error
    assert got.used[:3].tolist() == (used[:3] if error else [8, 0, 0])
    assert got.used[3:].tolist() == [2, 0]


@pytest.mark.parametrize("threads", CPU_THREADS)
@pytest.mark.parametrize("order", [0, 1, 2])
def test_blocks_that_are_not_disjoint_write_nothing_outside_the_rows_of_their_parents(kernels, threads, order) -> None:
    """No defined result, but no damage either: a slot twice in a block, in two blocks, or as parent and child."""
    tables = random_case([], 8, 0, 0, idle=20).tables
    tables.used.fill_(3)
    children = [1, 1, 2, 3, 4, 0, 5, 5, 5, 5, 5, 5, 5, 5, 5, 5, 5, 6]
    case = MergeCase(tables, int32([0, 7, 8, 8]), int32(children), int32([0, 2, 4, 6, 18]))
    got = run_on_cpu(kernels[threads], case, order)
    others = [slot for slot in range(20) if slot not in (0, 7, 8)]
    assert torch.equal(got.pages[others], tables.pages[others])
    assert torch.equal(got.counts[others], tables.counts[others])
    assert bool(((got.used >= 0) & (got.used <= 8)).all())


# -- compiled for a GPU ----------------------------------------------------------------------------------------------


def compile_cubin(capability: int) -> tuple[bytes, str]:
    """The source compiled by NVRTC, which needs no driver, and what the compiler had to say."""
    nvrtc = pytest.importorskip("cuda.bindings.nvrtc", reason="needs the dev extra: cuda-bindings is not installed")

    def call(function, *arguments):
        status, *results = function(*arguments)
        assert status == nvrtc.nvrtcResult.NVRTC_SUCCESS, f"{function.__name__}: {status}"
        return results[0] if results else None

    try:
        program = call(nvrtc.nvrtcCreateProgram, SOURCE.read_bytes(), SOURCE.name.encode(), 0, [], [])
    except RuntimeError as error:  # the bindings are there, the library is not
        pytest.skip(f"needs the dev extra: {error}")
    options = [f"--gpu-architecture=sm_{capability}".encode(), *(option.encode() for option in OPTIONS)]
    (status,) = nvrtc.nvrtcCompileProgram(program, len(options), options)
    log = bytes(call(nvrtc.nvrtcGetProgramLogSize, program))
    call(nvrtc.nvrtcGetProgramLog, program, log)
    text = log.decode().strip("\0 \n")
    assert status == nvrtc.nvrtcResult.NVRTC_SUCCESS, text
    cubin = bytes(call(nvrtc.nvrtcGetCUBINSize, program))
    call(nvrtc.nvrtcGetCUBIN, program, cubin)
    return cubin, text


@pytest.mark.aot
@pytest.mark.parametrize("capability", [80, 90, 100])
def test_the_source_compiles_without_a_warning_and_spills_nothing(capability: int, tmp_path: Path) -> None:
    from triton.backends import nvidia

    cubin, log = compile_cubin(capability)
    assert log == ""
    (tmp_path / "kernel.cubin").write_bytes(cubin)
    tool = Path(next(iter(nvidia.__path__))) / "bin" / "cuobjdump"
    command = [tool, "--dump-resource-usage", tmp_path / "kernel.cubin"]
    text = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    found = {name: int(value) for name, value in re.findall(r"(REG|STACK|LOCAL|SHARED):(\d+)", text)}
    assert f"Function {KERNEL}:" in text
    assert found["STACK"] == found["LOCAL"] == 0
    # 64 registers: four thread blocks of 256 on a multiprocessor.
    assert found["REG"] <= 64
    assert 2 * 4 * THREADS <= found["SHARED"] <= 2 * 4 * THREADS + 1024 + 64  # the driver reserves 1 KiB from sm_80 on


# -- on a GPU --------------------------------------------------------------------------------------------------------


@pytest.fixture
def device() -> torch.device:
    if not CUPY_INSTALLED:
        pytest.skip("needs the cuda extra: cupy is not installed")
    return torch.device("cuda", torch.cuda.current_device())


GPU_CASES = {
    "ragged": ([3, 0, None, 1, 17], 200, 20, 0.0),
    "300 children": ([300, 2], 4000, 20, 0.0),
    "overflow": ([5, 5, 5, 5, 300], 20, 9, 0.5),
    "many blocks": ([7] * 500, 300, 40, 0.2),
    "no children": ([0, None], 4, 4, 0.0),
}


def gpu_case(name: str) -> MergeCase:
    sizes, capacity, longest, crowded = GPU_CASES[name]
    return random_case(sizes, capacity, longest, seed=0, crowded=crowded)


@pytest.mark.gpu
@pytest.mark.parametrize("on_device", [True, False], ids=["indices on the device", "indices on the host"])
@pytest.mark.parametrize("name", GPU_CASES)
def test_gpu_equals_the_reference(name: str, on_device: bool, device: torch.device) -> None:
    case = gpu_case(name)
    tables = copy_of(case.tables, device)
    indices = [index.to(device) if on_device else index for index in case.indices]
    mk.merge_branches(tables, *indices)
    assert_same(tables, expected(case))


@pytest.mark.gpu
def test_gpu_runs_on_the_current_stream_and_waits_for_nothing(device: torch.device) -> None:
    """Behind a long wait on a stream of its own: the call returns before, and the result is right after it."""
    case = gpu_case("300 children")
    tables, indices = copy_of(case.tables, device), [index.to(device) for index in case.indices]
    mk.merge_branches(copy_of(case.tables, device), *indices)
    torch.cuda.synchronize()
    stream = torch.cuda.Stream()
    with torch.cuda.stream(stream):
        torch.cuda._sleep(200_000_000)
        mk.merge_branches(tables, *indices)
        assert not stream.query()
    stream.synchronize()
    assert_same(tables, expected(case))


@pytest.mark.gpu
def test_gpu_graph_replays_with_other_blocks(device: torch.device) -> None:
    """Captured once over empty blocks; each replay merges what the index tensors hold then. Nothing is allocated."""
    sizes, capacity, longest, _ = GPU_CASES["many blocks"]
    first = random_case(sizes, capacity, longest, seed=1, crowded=0.2)
    tables, indices = copy_of(first.tables, device), [index.to(device) for index in first.indices]
    indices[0].fill_(-1)
    mk.merge_branches(tables, *indices)  # compiles
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        before = torch.cuda.memory_allocated()
        mk.merge_branches(tables, *indices)
        assert torch.cuda.memory_allocated() == before
    for seed in (1, 2, 3):
        case = random_case(sizes, capacity, longest, seed, crowded=0.2)
        for name in STATE:
            getattr(tables, name).copy_(getattr(case.tables, name))
        for mine, theirs in zip(indices, case.indices, strict=True):
            mine.copy_(theirs)
        graph.replay()
        torch.cuda.synchronize()
        assert_same(tables, expected(case))


@pytest.mark.gpu
def test_gpu_capture_says_what_it_needs(device: torch.device, monkeypatch: pytest.MonkeyPatch) -> None:
    from mvkernels.ops.merge import cuda as kv_merge_cuda

    case = gpu_case("ragged")
    tables, indices = copy_of(case.tables, device), [index.to(device) for index in case.indices]
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        tables.used.zero_()
        with pytest.raises(ValueError, match=r"expected indices on cuda:\d+ while a CUDA graph is captured, got cpu"):
            mk.merge_branches(tables, *case.indices)
        # As in a new process; the kernel itself stays, for unloading it would spoil the capture.
        monkeypatch.setattr(kv_merge_cuda, "_kernel", functools.cache(kv_merge_cuda._kernel.__wrapped__))
        with pytest.raises(mk.BackendError, match="call merge_branches once on this device before"):
            mk.merge_branches(tables, *indices)
