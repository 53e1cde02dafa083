"""`python -m tests.training.fsdp_cpu ...` is `mvkernels ...` where accelerate shards on CPUs too, as it does on GPUs.

accelerate offers FSDP to processes with GPUs only. What it then calls, PyTorch's `fully_shard`, works over gloo.
"""

from __future__ import annotations

from typing import Any

from accelerate.state import PartialState
from accelerate.utils import DistributedType

_plain = PartialState.__init__


def _as_if_on_gpus(self: PartialState, *arguments: Any, **named: Any) -> None:
    _plain(self, *arguments, **named)
    if self.distributed_type is DistributedType.MULTI_CPU:
        self.distributed_type = DistributedType.MULTI_GPU


if __name__ == "__main__":
    PartialState.__init__ = _as_if_on_gpus  # type: ignore[method-assign]
    from mvkernels.__main__ import main

    main()
