"""Rotation of keys on their way into the pages, and of queries: against transformers, the definition, and itself."""

from __future__ import annotations

import math

import pytest
import torch
from transformers import LlamaConfig, Qwen2Config
from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS
from transformers.models.llama.modeling_llama import LlamaRotaryEmbedding, apply_rotary_pos_emb

from mvkernels import BackendError, PagedKVCache, Rope, rotate
from mvkernels.ops.decode.append import append_rows
from mvkernels.reference.rope import rotate as rotate_reference
from tests.cache.world import poisoned_cache
from tests.conftest import interpreting

GPU = torch.cuda.is_available() and not interpreting()
TRITON = pytest.param("triton", marks=pytest.mark.triton)
BACKENDS = ["cpu", "reference", TRITON]
DTYPES = [torch.float32, torch.float16, torch.bfloat16]

TYPES = {
    "default": {"rope_type": "default"},
    "linear": {"rope_type": "linear", "factor": 4.0},
    "llama3": {
        "rope_type": "llama3", "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0,
        "original_max_position_embeddings": 512,
    },
    "yarn": {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 512},
    "yarn given": {
        "rope_type": "yarn", "factor": 40.0, "original_max_position_embeddings": 4096, "beta_fast": 16, "beta_slow": 2,
        "truncate": False, "attention_factor": 0.9,
    },
    "yarn ratio": {
        "rope_type": "yarn", "factor": 40.0, "original_max_position_embeddings": 4096, "mscale": 0.8,
        "mscale_all_dim": 1.2,
    },
    "yarn near": {"rope_type": "yarn", "factor": 0.5, "original_max_position_embeddings": 64},
}  # fmt: skip


def make_config(kind: str, head_dim: int = 64, family=LlamaConfig, **changes: object):
    return family(
        hidden_size=4 * head_dim, num_attention_heads=4, num_key_value_heads=2, head_dim=head_dim,
        max_position_embeddings=2048, rope_parameters={"rope_theta": 10000.0, **TYPES[kind], **changes},
    )  # fmt: skip


def device_of(backend: str) -> str:
    return "cuda" if GPU and backend == "triton" else "cpu"


def rows(count: int, heads: int, dim: int, dtype=torch.float32, device="cpu", seed: int = 0) -> torch.Tensor:
    return torch.randn(count, heads, dim, generator=torch.Generator().manual_seed(seed)).to(device, dtype)


# -- frequencies -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("theta", [10000.0, 500000.0, 1000000])
@pytest.mark.parametrize("head_dim", [64, 80, 128])
@pytest.mark.parametrize("kind", TYPES)
def test_frequencies_are_those_of_transformers(kind: str, head_dim: int, theta: float) -> None:
    config = make_config(kind, head_dim, rope_theta=theta)
    rope = Rope.from_config(config)
    init = ROPE_INIT_FUNCTIONS.get(TYPES[kind]["rope_type"], LlamaRotaryEmbedding.compute_default_rope_parameters)
    inv_freq, scaling = init(config)
    torch.testing.assert_close(rope.inv_freq, inv_freq, rtol=2e-6, atol=0)
    assert rope.scaling == pytest.approx(scaling, rel=1e-12)


def test_every_type_gives_other_frequencies() -> None:
    """Or the comparison above would not tell one from another."""
    found = [Rope.from_config(make_config(kind)) for kind in TYPES]
    assert len({(*rope.inv_freq.tolist(), rope.scaling) for rope in found}) == len(TYPES)


def test_a_part_of_a_head_is_rotated() -> None:
    parameters = {"rope_theta": 10000.0, "rope_type": "linear", "factor": 2.0, "partial_rotary_factor": 0.5}
    config = make_config("linear", **parameters)
    wanted, _ = ROPE_INIT_FUNCTIONS["linear"](config)
    rope = Rope.from_config(config)
    assert len(rope.inv_freq) == 16
    torch.testing.assert_close(rope.inv_freq, wanted, rtol=2e-6, atol=0)


@pytest.mark.parametrize(
    ("parameters", "message"),
    [
        ({"rope_type": "dynamic", "rope_theta": 1e4}, "expected one of 'default', .* got 'dynamic'"),
        ({"rope_type": "linear", "rope_theta": 1e4}, "type 'linear': expected factor, got"),
        ({"rope_type": "yarn", "factor": 2.0}, "expected rope_theta, original_max_position_embeddings, got"),
        ({"rope_theta": 1e4, "partial_rotary_factor": 0.1}, "even number of rotated dimensions from 2 to 10, got 1"),
        ({"rope_theta": 1e4, "partial_rotary_factor": 0.5}, "even number of rotated dimensions from 2 to 10, got 5"),
    ],
)
def test_parameters_that_are_missing_or_unknown_are_named(parameters: dict, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        Rope.from_parameters(parameters, 10)


def test_the_longest_sequence_stands_in_for_the_original_one() -> None:
    parameters = {"rope_theta": 1e4, "rope_type": "yarn", "factor": 2.0}
    wanted = Rope.from_parameters({**parameters, "original_max_position_embeddings": 77}, 32)
    assert torch.equal(Rope.from_parameters(parameters, 32, 77).inv_freq, wanted.inv_freq)


def test_a_config_with_several_sets_is_refused() -> None:
    config = make_config("default", family=Qwen2Config)
    config.rope_parameters = {"full_attention": {"rope_theta": 1e4}, "sliding_attention": {"rope_theta": 1e6}}
    with pytest.raises(ValueError, match="expected one set for all layers"):
        Rope.from_config(config)
    with pytest.raises(ValueError, match=r"inv_freq: expected \[H\] torch.float32, got \[4\] torch.float64"):
        Rope(torch.ones(4, dtype=torch.float64))


# -- rotation ----------------------------------------------------------------------------------------------------

POSITIONS = [0, 1, 2, 31, 700, 2047, 40000, 99999]


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("kind", ["default", "llama3", "yarn"])
@pytest.mark.parametrize("backend", BACKENDS)
def test_rotated_rows_are_those_of_transformers(backend: str, kind: str, dtype: torch.dtype) -> None:
    """At most as far from exact arithmetic on the same angles; transformers rounds cos, sin and products to dtype."""
    config, device = make_config(kind), device_of(backend)
    x, positions = rows(8, 4, 64, dtype), torch.tensor(POSITIONS, dtype=torch.int32)
    rope = Rope.from_config(config, device)
    got = rotate(x.to(device), positions.to(device), rope, backend)
    assert (got.dtype, got.shape, got.is_contiguous()) == (dtype, x.shape, True)
    embedding = LlamaRotaryEmbedding(config)
    theirs, _ = apply_rotary_pos_emb(x, x, *(t[0] for t in embedding(x, positions[None])), unsqueeze_dim=1)
    exact = rotate_reference(x.double(), positions, embedding.inv_freq, rope.scaling)
    mine, error = ((found.cpu().double() - exact).abs().max() for found in (got, theirs))
    # 2e-6 in relative frequency, times the position, is what the frequencies may differ by.
    far = 2 * POSITIONS[-1] * float((rope.inv_freq.cpu() / embedding.inv_freq - 1).abs().max()) * float(x.abs().max())
    assert mine <= error + 1e-6 * float(x.abs().max()) + far
    assert far < 0.2 and (got.cpu() - x).abs().max() > 1


@pytest.mark.parametrize("backend", BACKENDS)
def test_each_pair_turns_by_position_times_frequency(backend: str) -> None:
    """Quarter turns, by hand, with a scaling and a rest that stays."""
    device = device_of(backend)
    rope = Rope(torch.tensor([math.pi / 2, math.pi], device=device), 3.0)
    x = torch.tensor([1.0, 2.0, 10.0, 20.0, 7.0]).to(device).expand(5, 1, 5)
    got = rotate(x, torch.arange(5, device=device), rope, backend)
    wanted = [
        [3, 6, 30, 60, 7], [-30, -6, 3, -60, 7], [-3, 6, -30, 60, 7], [30, -6, -3, -60, 7], [3, 6, 30, 60, 7],
    ]  # fmt: skip
    torch.testing.assert_close(got[:, 0].cpu(), torch.tensor(wanted).float(), rtol=0, atol=1e-4)


@pytest.mark.triton
def test_cos_and_sin_of_the_kernel() -> None:
    """One frequency of 1: the kernel's cos and sin at the positions themselves."""
    device = device_of("triton")
    rope = Rope(torch.ones(1, device=device))
    positions = torch.cat([torch.arange(50), torch.arange(50, 500, 3), torch.arange(500, 100000, 1999)])
    x = torch.tensor([1.0, 0.0], device=device).expand(len(positions), 1, 2)
    got = rotate(x, positions.to(device), rope, "triton")[:, 0].cpu().double()
    wanted = torch.stack([positions.double().cos(), positions.double().sin()], dim=1)
    # The interpreter has no fused multiply-add: the reduction rounds once more.
    torch.testing.assert_close(got, wanted, rtol=0, atol=4e-7 if GPU else 5e-6)


@pytest.mark.parametrize("backend", BACKENDS)
def test_rotation_takes_strided_rows(backend: str) -> None:
    device = device_of(backend)
    rope = Rope.from_config(make_config("default", 24), device)
    positions = torch.arange(5, device=device)
    whole = rows(3, 5, 48, device=device)
    for x in (whole[:, :, :24].transpose(0, 1), whole[..., ::2].transpose(0, 1)):
        torch.testing.assert_close(
            rotate(x, positions, rope, backend), rotate(x.contiguous(), positions, rope, "reference")
        )


# -- append ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(("heads", "dim"), [(2, 64), (1, 40), (20, 64)])
@pytest.mark.parametrize("backend", BACKENDS)
def test_append_rotates_the_keys_and_nothing_else(backend: str, heads: int, dim: int, dtype: torch.dtype) -> None:
    """The rows of several branches at once, at the positions of their tree; untouched slots keep their NaN."""
    device = device_of(backend)
    rope = Rope.from_config(make_config("yarn", dim), device)
    cache = poisoned_cache(20, 3, 2, heads, dim, dtype, device)
    root = cache.new()
    cache.commit(cache.plan([(root, 5)]))
    a, b = cache.fork(root, 2)
    step = cache.plan([(b, 3), (a, 4)])
    k_new, v_new = (rows(7, heads, dim, dtype, device, seed) for seed in (1, 2))
    k_new = k_new.transpose(0, 1).contiguous().transpose(0, 1)  # as a model has them
    cache.append(1, k_new, v_new, step, backend=backend, rope=rope)
    assert step.positions.tolist() == [5, 6, 7, 5, 6, 7, 8]
    keys, values = cache.k[1].flatten(0, 1), cache.v[1].flatten(0, 1)
    exact = rotate_reference(k_new.double(), step.positions, rope.inv_freq, rope.scaling)
    ulp = torch.finfo(dtype).eps
    torch.testing.assert_close(keys[step.slots].double(), exact, rtol=ulp, atol=1e-6)
    assert torch.equal(values[step.slots], v_new)
    for stored in (keys, values):
        assert int(torch.isnan(stored).all(dim=(1, 2)).sum()) == len(stored) - 7
    assert torch.isnan(cache.k[0]).all() and torch.isnan(cache.v[0]).all()
    if backend != "reference":  # the same bits as rotation by itself
        assert torch.equal(keys[step.slots], rotate(k_new, step.positions, rope, backend))
    cache.rollback(step)


@pytest.mark.parametrize("rotate_keys", [False, True])
@pytest.mark.parametrize("backend", BACKENDS)
def test_rows_without_a_slot_are_written_nowhere(backend: str, rotate_keys: bool) -> None:
    """Of a step with fewer rows than what runs it: slot -1 is no slot, and no last one either."""
    device = device_of(backend)
    cache = poisoned_cache(4, 3, 1, 2, 40, device=device)
    k_new, v_new = rows(5, 2, 40, device=device), rows(5, 2, 40, device=device, seed=1)
    slots = torch.tensor([7, -1, 0, -1, 5], device=device)
    rope = Rope.from_config(make_config("default", 40), device)
    positions = torch.tensor([3, 0, 70, 0, 9], dtype=torch.int32, device=device)
    append_rows(cache.k[0], cache.v[0], k_new, v_new, slots, backend, rope.at(positions) if rotate_keys else None)
    wanted = rotate(k_new, positions, rope, backend) if rotate_keys else k_new
    live = slots >= 0
    for stored, new in ((cache.k[0], wanted), (cache.v[0], v_new)):
        found = stored.flatten(0, 1)
        torch.testing.assert_close(found[slots[live]], new[live])
        assert int(torch.isnan(found).all(dim=(1, 2)).sum()) == len(found) - 3


def test_the_same_attention_as_keys_rotated_before() -> None:
    """Scores depend on the distance of two positions only, whatever was rotated where."""
    rope = Rope.from_config(make_config("default"))
    found = []
    for first in (0, 1000):
        positions = torch.arange(first, first + 6)
        q, k = rotate(rows(6, 2, 64), positions, rope), rotate(rows(6, 2, 64, seed=1), positions, rope)
        found.append(torch.einsum("nhd,mhd->hnm", q, k))
    torch.testing.assert_close(*found, rtol=1e-3, atol=2e-3)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"positions": torch.arange(4)}, r"positions: expected \[3\] int32 or int64, one for each row, got"),
        ({"positions": torch.arange(3.0)}, "got torch.float32"),
        ({"rope": Rope(torch.ones(5))}, "rope: expected at most 4 frequencies, half a head, got 5"),
        ({"rope": Rope(torch.ones(2, device="meta"))}, "rope: expected the device cpu of the rows, got meta"),
        ({"x": torch.zeros(3, 8)}, r"x: expected floating point \[N, heads, D\], got"),
        ({"x": torch.zeros(3, 1, 8, requires_grad=True)}, "expected a tensor outside autograd"),
        ({"backend": "flash"}, "expected one of 'auto', 'cpu', 'triton', 'reference', got 'flash'"),
    ],
)
def test_bad_arguments_of_rotate(change: dict, message: str) -> None:
    call = {"x": torch.zeros(3, 1, 8), "positions": torch.arange(3), "rope": Rope(torch.ones(2)), **change}
    with pytest.raises(ValueError, match=message):
        rotate(**call)


def test_append_refuses_a_rope_that_does_not_fit_and_writes_nothing() -> None:
    cache = poisoned_cache(4, 3, head_dim=8)
    step = cache.plan([(cache.new(), 3)])
    new = torch.zeros(3, 1, 8)
    for backend in ("cpu", "reference"):
        with pytest.raises(ValueError, match="rope: expected at most 4 frequencies"):
            cache.append(0, new, new, step, backend, rope=Rope(torch.ones(5)))
    assert all(torch.isnan(tensor).all() for tensor in (*cache.k, *cache.v))


@pytest.mark.triton
def test_triton_does_not_rotate_in_double_precision() -> None:
    device = device_of("triton")
    cache = PagedKVCache(4, 3, 1, 1, 8, torch.float64, device)
    step, new = cache.plan([(cache.new(), 3)]), torch.zeros(3, 1, 8, dtype=torch.float64, device=device)
    rope = Rope(torch.ones(2, device=device))
    cache.append(0, new, new, step, backend="triton")  # a copy is a copy
    with pytest.raises(BackendError, match=r"to rotate, got torch\.float64"):
        cache.append(0, new, new, step, backend="triton", rope=rope)
    with pytest.raises(BackendError, match=r"to rotate, got torch\.float64"):
        rotate(new, step.positions, rope, backend="triton")


# -- ahead of time -----------------------------------------------------------------------------------------------


@pytest.mark.aot
@pytest.mark.parametrize(
    ("capability", "element", "dim", "half"),
    [
        (80, "bf16", 128, 64), (90, "bf16", 128, 64), (100, "bf16", 128, 64),
        (80, "fp16", 80, 40), (90, "fp32", 64, 16),
    ],
)  # fmt: skip
def test_append_rotated_kernel(capability: int, element: str, dim: int, half: int, tmp_path) -> None:
    from mvkernels.ops.decode.append_triton import append_rotated_kernel
    from tests.ops.test_decode_aot import assert_fits, compile_kernel

    types = dict.fromkeys(("k_new_ptr", "v_new_ptr", "k_ptr", "v_ptr"), f"*{element}") | {"slots_ptr": "*i64"}
    types |= {"positions_ptr": "*i32", "inv_freq_ptr": "*fp32", "scaling": "fp32"}
    types |= dict.fromkeys(("stride_kn", "stride_kh", "stride_vn", "stride_vh"), "i32")
    constants = {"HEADS": 8, "D": dim, "HALF": half, "BLOCK_E": 1024}
    assert_fits(compile_kernel(append_rotated_kernel, types, constants, capability), capability, tmp_path)


@pytest.mark.aot
@pytest.mark.parametrize("capability", [80, 90, 100])
def test_rotate_kernel(capability: int, tmp_path) -> None:
    from mvkernels.ops.decode.append_triton import rotate_kernel
    from tests.ops.test_decode_aot import assert_fits, compile_kernel

    types = {"x_ptr": "*bf16", "out_ptr": "*bf16", "positions_ptr": "*i64", "inv_freq_ptr": "*fp32", "scaling": "fp32"}
    types |= dict.fromkeys(("stride_n", "stride_h"), "i32")
    constants = {"HEADS": 28, "D": 128, "HALF": 64, "BLOCK_E": 1024}
    assert_fits(compile_kernel(rotate_kernel, types, constants, capability), capability, tmp_path)
