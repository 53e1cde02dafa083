"""The subcommands. Each module is imported only when its command is called; bad input is one line and exit status 2."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from contextlib import contextmanager
from typing import NoReturn

from mvkernels._lazy import EXTRAS, missing_message
from mvkernels.errors import BackendError, CacheError

#: What bad input or a bad file raises. All else but a missing optional package is a defect, and shows its traceback.
INPUT_ERRORS = (ValueError, OSError, BackendError, CacheError)


@contextmanager
def one_line_errors() -> Iterator[None]:
    """Turns an error that the input caused into one line on stderr and exit status 2."""
    try:
        yield
    except BrokenPipeError:
        sys.stderr.close()  # the reader has gone: no message can reach it, and none about that may follow
        raise SystemExit(141) from None
    except ModuleNotFoundError as error:
        top = (error.name or "").partition(".")[0]
        if top not in EXTRAS:
            raise
        fail(missing_message("this command", top))
    except ImportError as error:
        if error.name not in EXTRAS:
            raise
        fail(str(error))
    except INPUT_ERRORS as error:
        fail(str(error) or type(error).__name__)


def fail(message: str) -> NoReturn:
    """Says what is wrong in one line on stderr, and exits with status 2."""
    print("mvkernels: error:", " ".join(message.split()), file=sys.stderr)
    raise SystemExit(2) from None
