"""Linear layers on a CPU, for inference with few rows: `pack_linear` and its undoing.

A step of decoding multiplies a few rows with every weight, so it is as fast as the weights are read. PyTorch hands
fp32 products of that shape to MKL, which reads them several times over for 2 to 8 rows. These read them once:

    compiled   a kernel of this library (`ops/dense/linear.cpp`) on fp32 weights where they lie, for up to 512 rows (64
               without AVX-512); more go to PyTorch. Taken where there is a C++ compiler and no other dtype is asked
               for. Weights of which bf16 has all numbers, as it has of a checkpoint that was published in it, are
               `narrow`: with up to 8 rows a copy in bf16 is read, half as much, with the same result bit for bit
    tiles      the same on a processor with AMX, where all weights that are multiplied together are narrow: its matrix
               units multiply the copy with up to 512 rows (`linear_amx.cpp`). The result is as exact, and a row
               has the same bits with any number of them
    packed     oneDNN on weights in its own order, which take as much memory again. Rows are padded to 4, for which it
               has faster kernels than for fewer. Packed when a layer is first called without gradients

Layers that get the same input (queries, keys and values; gate and up) are one product. The parameters stay as they are
and where they are. When a weight has changed (another tensor, or written to in place) what was derived is made again;
writing through `weight.data` is not seen. With gradients, under autocast or torch.compile, in another dtype and on
another device, a layer is what it was.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from typing import Any, NamedTuple, TypeGuard, TypeVar

import torch
from torch import nn

from mvkernels.hf_parts import Snapshot
from mvkernels.ops.dense.linear import LinearLayers, few_rows, is_bf16, linear_reason
from mvkernels.ops.dense.linear_amx import MOST_ROWS, TileLayers, tiles_reason
from mvkernels.ops.dense.product import Product
from mvkernels.ops.native import warn_if_busy

# Projections that get the same input, by their names in transformers' modules.
TOGETHER = (("q_proj", "k_proj", "v_proj"), ("gate_proj", "up_proj"))
MIN_ROWS = 4
DTYPES = (torch.float32, torch.bfloat16)

Model = TypeVar("Model", bound=nn.Module)


def pack_linear(model: Model, dtype: torch.dtype | None = None, narrow: bool = True) -> Model:
    """Let the linear layers of a model multiply few rows fast, in place; returns it. Twice only changes how.

    Every `torch.nn.Linear` (no subclass) takes part that is on a CPU, in fp32 or bf16. dtype: None for the layer's, or
    that of packed weights and of the product. torch.bfloat16 halves what is read and changes the result: an opt-in.
    narrow: whether weights that lose nothing in bf16 are also kept in it, for half as much memory as they take.
    Raises ValueError for another dtype, and for bf16 on a CPU without it.
    """
    if dtype is not None and dtype not in DTYPES:
        raise ValueError(f"pack_linear: expected torch.float32, torch.bfloat16 or None, got {dtype}")
    if dtype is torch.bfloat16 and not _takes(dtype):
        raise ValueError("pack_linear: expected a CPU with bf16 instructions for torch.bfloat16, got one without")
    warn_if_busy()
    unpack_linear(model)
    taken: set[nn.Module] = set()
    for module in model.modules():
        for names in TOGETHER:
            group = [one for name in names if _fits(one := getattr(module, name, None), dtype)]
            if len(group) == len(names) and len({one.weight.shape[1] for one in group}) == 1:
                taken.update(group)
                _install(group, dtype, narrow)
    for module in model.modules():
        if module not in taken and _fits(module, dtype):
            _install([module], dtype, narrow)
    return model


def packs_without_memory(model: nn.Module) -> bool:
    """Whether `pack_linear` would use all weights of a model where they lie, but for narrow ones."""
    weights = _weights(model)
    return all(_lies_well(weight) for weight in weights) and linear_reason() is None


def narrow_bytes(model: nn.Module) -> int:
    """How much memory narrow weights of a model take, about."""
    return sum(torch.bfloat16.itemsize * weight.numel() for weight in _weights(model) if _lies_well(weight))


def narrow_rows() -> int:
    """Up to how many rows narrow weights are read here; 0: never."""
    if linear_reason() is not None:
        return 0
    return MOST_ROWS if tiles_reason() is None else few_rows()


def _weights(model: nn.Module) -> list[torch.Tensor]:
    return [module.weight for module in model.modules() if type(module) is nn.Linear]


def _lies_well(tensor: torch.Tensor) -> bool:
    """Whether the compiled kernel can use a tensor where it is."""
    return tensor.device.type == "cpu" and tensor.dtype is torch.float32 and tensor.is_contiguous()


def unpack_linear(model: Model) -> Model:
    """Restore the layers that `pack_linear` changed, and free what was packed; returns the model."""
    for module in model.modules():
        if isinstance(getattr(module.__dict__.get("forward"), "func", None), _Pack):
            del module.__dict__["forward"]
    return model


def pack_of(layers: Sequence[nn.Module]) -> _Pack | None:
    """What `pack_linear` has made of layers with the same input; None where it has not put just these together, in this
    order. `compiled` of it is the kernel on their weights as they are then, for as long as their forwards are the same.
    """
    packs = [getattr(layer.__dict__.get("forward"), "func", None) for layer in layers]
    pack = packs[0]
    alike = isinstance(pack, _Pack) and pack.layers == layers and packs.count(pack) == len(packs)
    return pack if alike else None


def _install(layers: Sequence[nn.Linear], dtype: torch.dtype | None, narrow: bool) -> None:
    pack = _Pack(layers, dtype, narrow)
    for place, layer in enumerate(layers):
        layer.forward = partial(pack, place)  # type: ignore[method-assign]


def _fits(module: Any, dtype: torch.dtype | None) -> TypeGuard[nn.Linear]:
    if not _is_regular(module) or module.weight.device.type != "cpu":
        return False
    return module.weight.dtype in DTYPES and _takes(dtype or module.weight.dtype)


def _is_regular(module: Any) -> bool:
    """Whether weight and bias are parameters, and not made anew whenever somebody asks for them."""
    return type(module) is nn.Linear and module._parameters.get("weight") is not None and "bias" in module._parameters


def _takes(dtype: torch.dtype) -> bool:
    """Whether oneDNN is there, with this dtype."""
    available: bool = torch.backends.mkldnn.is_available()  # type: ignore[no-untyped-call]
    if not available or not hasattr(torch.ops.mkldnn, "_linear_pointwise"):
        return False
    return dtype is torch.float32 or bool(torch.ops.mkldnn._is_mkldnn_bf16_supported())


class _Made(NamedTuple):
    """What is made of the weights of some layers: a kernel's product, or what oneDNN multiplies.

    bounds: each layer's part of the result. weights: as they were, and biases.
    """

    compiled: Product | None
    packed: torch.Tensor | None
    bias: torch.Tensor | None
    bounds: list[tuple[int, int]]
    weights: Snapshot


class _Pack:
    """Linear layers with the same input as one product. Called with a layer's place among them, it gives its part.

    The product is kept from the first layer's call to the last one's, beside the very tensor it was made of.
    """

    def __init__(self, layers: Sequence[nn.Linear], dtype: torch.dtype | None, narrow: bool) -> None:
        self.layers, self.dtype, self.narrow = list(layers), dtype, narrow
        # In one piece each, as several threads may call the layers.
        self._made: _Made | None = None
        self._latest: tuple[torch.Tensor, torch.Tensor] | None = None

    def __getstate__(self) -> dict[str, Any]:
        # A packed tensor can neither be pickled nor copied.
        return {"layers": self.layers, "dtype": self.dtype, "narrow": self.narrow}

    def __setstate__(self, state: dict[str, Any]) -> None:
        _Pack.__init__(self, **state)

    def __call__(self, place: int, x: torch.Tensor) -> torch.Tensor:
        made, latest = self._made, self._latest
        if place and made is not None and latest is not None and latest[0] is x:
            out = latest[1]
        else:
            layer = self.layers[place]
            if (
                torch.is_grad_enabled()
                or torch.compiler.is_compiling()
                or x.device.type != "cpu"
                or layer.weight.device.type != "cpu"
                or x.dtype is not layer.weight.dtype
                or x.dtype not in DTYPES
                or (x.dtype is torch.bfloat16 and not _takes(torch.bfloat16))
                or torch.is_autocast_enabled("cpu")
                or not all(map(_is_regular, self.layers))
                or x.shape[-1] != layer.weight.shape[1]
            ):
                return nn.functional.linear(x, layer.weight, layer.bias)
            made = self.made()
            if made.compiled is not None and x.numel() > made.compiled.most_rows * x.shape[-1]:
                return nn.functional.linear(x, layer.weight, layer.bias)
            out = self._product(made, x)
        if len(self.layers) == 1:
            return out
        self._latest = None if place == len(self.layers) - 1 else (x, out)
        first, last = made.bounds[place]
        return out[..., first:last]

    def made(self) -> _Made:
        """Of the weights as they are now."""
        weights = [weight for layer in self.layers for weight in layer._parameters.values()]
        made = self._made
        if made is None or not made.weights.holds(weights):
            made = self._made = self._make(weights)
        return made

    def compiled(self) -> Product | None:
        """The compiled kernel on the weights as they are now; None where they are multiplied in another way."""
        return self.made().compiled if all(map(_is_regular, self.layers)) else None

    def _product(self, made: _Made, x: torch.Tensor) -> torch.Tensor:
        """All layers' results side by side, [.., sum of their sizes], in x's dtype."""
        if made.compiled is not None:
            return made.compiled(x)
        rows, dtype = x.shape[-2] if x.dim() > 1 else 1, x.dtype
        few = rows < MIN_ROWS and x.dim() > 1 and x.numel() == rows * x.shape[-1]
        if few:
            x = nn.functional.pad(x, (0, 0, 0, MIN_ROWS - rows))
        if self.dtype is not None:
            x = x.to(self.dtype)
        out: torch.Tensor = torch.ops.mkldnn._linear_pointwise(x, made.packed, made.bias, "none", [], "")
        out = out.to(dtype)
        return out[..., :rows, :] if few else out

    def _make(self, tensors: Sequence[torch.Tensor | None]) -> _Made:
        seen = Snapshot(tensors)
        ends = torch.tensor([len(layer.weight) for layer in self.layers]).cumsum(0).tolist()
        compiled = packed = bias = None
        with torch.no_grad():
            lie_well = all(_lies_well(tensor) for tensor in tensors if tensor is not None)
            if self.dtype is None and lie_well and linear_reason() is None:
                weights, biases = [one.weight for one in self.layers], [one.bias for one in self.layers]
                compiled = _compile(weights, biases, self.narrow)
            else:
                packed, bias = self._pack()
        return _Made(compiled, packed, bias, list(zip([0, *ends], ends, strict=False)), seen)

    def _pack(self) -> tuple[torch.Tensor, torch.Tensor | None]:
        """Weights in oneDNN's order, and biases side by side."""
        dtype = self.dtype or self.layers[0].weight.dtype
        weights = [layer.weight.detach() for layer in self.layers]
        whole = (weights[0] if len(weights) == 1 else torch.cat(weights)).to(dtype).contiguous()
        packed = torch.ops.mkldnn._reorder_linear_weight(whole, None)
        if all(layer.bias is None for layer in self.layers):
            return packed, None
        biases = [
            layer.weight.new_zeros(len(layer.weight)) if layer.bias is None else layer.bias.detach()
            for layer in self.layers
        ]
        return packed, torch.cat(biases).to(dtype)


def _compile(weights: Sequence[torch.Tensor], biases: Sequence[torch.Tensor | None], narrow: bool) -> Product:
    if narrow and tiles_reason() is None and all(is_bf16(one) and bool(one.isfinite().all()) for one in weights):
        return TileLayers(weights, biases)
    return LinearLayers(weights, biases, narrow)
