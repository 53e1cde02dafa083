"""Slow pure-PyTorch definitions of the semantics, against which every backend is tested.

Imports ``mvkernels.grammar`` and torch only, never the layout or the kernels, so that their errors stay independent.
"""

from __future__ import annotations

if __name__ != "mvkernels.reference":
    raise ImportError(
        f"this package is mvkernels.reference and cannot be imported as {__name__!r}: import mvkernels.reference"
    )
