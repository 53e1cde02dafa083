"""`python -m tests.training.processes N MODULE ...` is `torchrun --nproc-per-node N -m MODULE ...`, with what takes
seconds to import imported once: the processes are forked from the one that has it.
"""

from __future__ import annotations

import os
import runpy
import signal
import socket
import sys
import traceback

import accelerate  # noqa: F401
import peft  # noqa: F401

import mvkernels.model.training.tuning  # noqa: F401


def main() -> int:
    count, module = int(sys.argv[1]), sys.argv[2]
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        address = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(free.getsockname()[1])}
    os.environ |= {"WORLD_SIZE": str(count), "LOCAL_WORLD_SIZE": str(count), **address}
    sys.argv = [module, *sys.argv[3:]]
    running = {fork(rank, module) for rank in range(count)}
    failed = 0
    while running:
        process, status = os.wait()
        running.discard(process)
        if status and not failed:  # the others would wait for it
            failed = 1
            for other in running:
                os.kill(other, signal.SIGTERM)
    return failed


def fork(rank: int, module: str) -> int:
    process = os.fork()
    if process:
        return process
    status = 1
    try:
        os.environ |= {"RANK": str(rank), "LOCAL_RANK": str(rank)}
        runpy.run_module(module, run_name="__main__", alter_sys=True)
        status = 0
    except SystemExit as end:
        status = end.code if isinstance(end.code, int) else 0 if end.code is None else 1
    except BaseException:
        traceback.print_exc()
    finally:
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(status)


if __name__ == "__main__":
    raise SystemExit(main())
