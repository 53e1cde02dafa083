"""The subcommands. Each module is imported only when its command is called; bad input is one line and exit status 2."""

from __future__ import annotations

import errno
import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from typing import NoReturn

from mvkernels._lazy import EXTRAS, missing_message
from mvkernels.errors import BackendError, CacheError

#: What bad input or a bad file raises. All else but a missing optional package is a defect, and shows its traceback.
INPUT_ERRORS = (ValueError, OSError, BackendError, CacheError)
#: What a write says where there is no room.
FULL = (errno.ENOSPC, errno.EFBIG, errno.EDQUOT)


@contextmanager
def one_line_errors(to_go_on: str = "") -> Iterator[None]:
    """Turn an error that the input caused into one line on stderr and exit status 2; Ctrl-C into one and status 130.

    Args:
        to_go_on: What the line adds after Ctrl-C: how to go on.
    """
    try:
        yield
        sys.stdout.flush()  # so that what cannot be written is an error, and not a word at the very end of the process
    except KeyboardInterrupt:
        print(f"interrupted{to_go_on and '; '}{to_go_on}", file=sys.stderr)
        raise SystemExit(130) from None
    except BrokenPipeError:
        _discard_stdout()
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
        if isinstance(error, OSError) and error.filename is None and error.errno in FULL:  # a file would be named
            _discard_stdout()
            fail(f"standard output: {error.strerror}")
        fail(str(error) or type(error).__name__)


def _discard_stdout() -> None:
    """What could not be written there is still in the buffer, and would be tried again at the end of the process."""
    with suppress(OSError):  # of a test's, which is no file of the system
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())


def fail(message: str) -> NoReturn:
    """Says what is wrong in one line on stderr, and exits with status 2."""
    print("mvkernels: error:", " ".join(message.split()), file=sys.stderr)
    raise SystemExit(2) from None
