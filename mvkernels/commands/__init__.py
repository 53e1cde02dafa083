"""The subcommands. Each module is imported only when its command is called; bad input is one line and exit status 2."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from contextlib import contextmanager

from mvkernels.errors import BackendError, CacheError

#: What bad input, a bad file or a missing dependency raises. Anything else is a defect, and shows its traceback.
INPUT_ERRORS = (ValueError, OSError, ImportError, BackendError, CacheError)


@contextmanager
def one_line_errors() -> Iterator[None]:
    """Turns an error that the input caused into one line on stderr and exit status 2."""
    try:
        yield
    except BrokenPipeError:
        sys.stderr.close()  # the reader has gone: no message can reach it, and none about that may follow
        raise SystemExit(141) from None
    except INPUT_ERRORS as error:
        text = " ".join(str(error).split()) or type(error).__name__
        print(f"mvkernels: error: {text}", file=sys.stderr)
        raise SystemExit(2) from None
