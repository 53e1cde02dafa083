"""A whole run: chains from a file, so many at a time, into a folder; it stops cleanly and goes on where it stopped."""

from __future__ import annotations

import asyncio
import contextlib
import signal
import time
from collections.abc import Callable, Iterator
from dataclasses import asdict
from typing import Any

from mvkernels._lazy import import_for
from mvkernels.model.curator.budget import Budget, BudgetUsedUp
from mvkernels.model.curator.cache import AnswerCache
from mvkernels.model.curator.chains import Chain, ChainReader
from mvkernels.model.curator.endpoint import Endpoint, EndpointBusy, EndpointError
from mvkernels.model.curator.job import Job, State, without_credentials
from mvkernels.model.curator.outputs import (
    CACHE,
    PARQUET,
    REJECTED,
    TRACES,
    OutputFolder,
    hash_of,
    read_manifest,
    write_manifest,
    write_parquet,
)  # fmt: skip
from mvkernels.model.curator.pipeline import Pipeline
from mvkernels.model.curator.prompts import prompts_version


async def curate(
    job: Job,
    watch: Callable[[State], None] = lambda state: None,
    say: Callable[[str], None] = lambda message: None,
) -> State:
    """Curates what is not yet in the folder, and writes the files there.

    watch: is called at the beginning and after every chain. say: with a line when the endpoint fails. Raises ValueError
    for bad input, EndpointError (a ValueError) where the endpoint cannot be used; the folder is in order then too.
    """
    for module in ("openai", "rapidfuzz", "pyarrow"):
        import_for("curate", module)
    reader = ChainReader(job.source, job.columns, job.limit)
    next(iter(reader), None)  # a file that is none is found before anything is written
    folder = OutputFolder(job.out, job.retry_rejected)
    try:
        cache = AnswerCache(job.out / CACHE)
        with contextlib.closing(cache):
            run = _Run(job, reader, folder, cache, say)
            return await run.go(watch)
    finally:
        folder.close()


class _Run:
    def __init__(
        self, job: Job, reader: ChainReader, folder: OutputFolder, cache: AnswerCache, say: Callable[[str], None]
    ) -> None:
        self.job = job
        self.reader = reader
        self.folder = folder
        self.before = read_manifest(job.out)
        _, prompt_tokens, completion_tokens = cache.spent()
        self.cache = cache
        self.budget = Budget(job.limits, prompt_tokens, completion_tokens)
        self.endpoint = Endpoint(job.endpoint, cache, self.budget, max(8, job.concurrency), say)
        self.pipeline = Pipeline(self.endpoint, job.rules)
        self.tokens_before = prompt_tokens + completion_tokens
        self.started = time.time()
        self.state = State(reader.count(), len(folder.done), folder.counts[REJECTED], folder.warned)
        self.input_hash = hash_of(job.source)

    async def go(self, watch: Callable[[State], None]) -> State:
        self._write_manifest()
        watch(self.state)
        chains = (chain for chain in self.reader if chain.id not in self.folder.done)
        tasks = [asyncio.create_task(self._work(chains, watch)) for _ in range(self.job.concurrency)]
        try:
            with _interruptible(tasks, self._interrupt):
                await asyncio.wait(tasks, return_when=asyncio.FIRST_EXCEPTION)
        finally:
            for task in tasks:
                task.cancel()
            results = await asyncio.gather(*tasks, return_exceptions=True)
            await self.endpoint.close()
        failed = [one for one in results if isinstance(one, Exception)]
        if self.state.ended == "running":
            self._end(failed)
        self._finish()
        if failed and self.state.ended != "interrupted":
            raise failed[0]
        return self.state

    async def _work(self, chains: Iterator[Chain], watch: Callable[[State], None]) -> None:
        """Takes one chain after the other until there is none, or the run is to stop."""
        for chain in chains:
            try:
                good, record = await self.pipeline.curate(chain)
            except EndpointBusy as busy:
                self.state.unfinished += 1
                self.state.message = str(busy)
                continue
            except BudgetUsedUp as used_up:
                self.state.ended, self.state.message = "budget", str(used_up)
                return
            self.folder.write(good, record)
            self._count(good, record)
            watch(self.state)
            if self.state.ended != "running":
                return
            await asyncio.sleep(0)  # chains that are all in the cache would not let go of the loop

    def _count(self, good: bool, record: dict[str, Any]) -> None:
        state = self.state
        state.done += 1
        state.here += 1
        state.rejected += not good
        state.warned += bool(record.get("warnings"))
        self._measure()

    def _measure(self) -> None:
        state = self.state
        state.tokens = self.budget.prompt_tokens + self.budget.completion_tokens
        state.tokens_here = state.tokens - self.tokens_before
        state.cost = self.budget.cost
        state.retried = self.endpoint.retried
        state.seconds = time.time() - self.started

    def _interrupt(self) -> None:
        self.state.ended = "interrupted"
        self.state.message = f"interrupted; run again to go on: the same command keeps what is in {self.job.out}"

    def _end(self, failed: list[Exception]) -> None:
        state = self.state
        if failed:
            state.ended = "endpoint" if isinstance(failed[0], EndpointError) else "failed"
            state.message = str(failed[0])
        elif state.unfinished:
            state.ended = "unfinished"
            state.message = (
                f"{state.unfinished} chains were not answered for (the last one: {state.message}); "
                "run again to go on with them"
            )
        else:
            state.ended, state.message = "complete", ""

    def _finish(self) -> None:
        """Writes the files that are made of the others."""
        self._measure()
        from mvkernels.model.curator.report import write_report  # imports torch, which nothing before this needs

        write_parquet(self.folder.folder)
        self._write_manifest()
        write_report(self.folder.folder)

    def _write_manifest(self) -> None:
        from mvkernels import __version__

        job, folder, state = self.job, self.folder.folder, self.state
        this_run = {
            "started": _utc(self.started),
            "seconds": round(time.time() - self.started, 3),
            "ended": state.ended,
            "message": state.message,
            "chains": state.here,
            "unfinished": state.unfinished,
            "requests": self.endpoint.sent,
            "retried": self.endpoint.retried,
            "tokens": state.tokens_here,
            "version": __version__,
            "model": job.endpoint.model,
            "base_url": without_credentials(job.endpoint.base_url),
            "prompts": prompts_version(),
            "settings": {
                **asdict(job.rules),
                "concurrency": job.concurrency,
                "limit": job.limit,
                "temperature": job.endpoint.temperature,
                "answer_tokens": job.endpoint.answer_tokens,
                **asdict(job.limits),
            },
        }
        outputs = (TRACES, REJECTED, PARQUET) if state.ended != "running" else ()
        answers, prompt_tokens, completion_tokens = self.cache.spent()
        manifest = {
            "state": state.ended,
            "model": job.endpoint.model,
            "base_url": without_credentials(job.endpoint.base_url),
            "prompts": prompts_version(),
            "counts": {
                "chains": state.done,
                "traces": self.folder.counts[TRACES],
                "rejected": self.folder.counts[REJECTED],
                "warned": self.folder.warned,
                "unfinished": state.unfinished,
            },
            "input": {"file": job.source.name, "sha256": self.input_hash, "columns": asdict(self.reader.columns)},
            "outputs": {name: hash_of(folder / name) for name in outputs if (folder / name).exists()},
            "answers": answers,
            "tokens": {"prompt": prompt_tokens, "completion": completion_tokens},
            "cost": round(job.limits.cost(prompt_tokens, completion_tokens), 6),
            "runs": [*self.before.get("runs", []), this_run],
        }
        write_manifest(folder, manifest)


@contextlib.contextmanager
def _interruptible(tasks: list[asyncio.Task[None]], noted: Callable[[], None]) -> Iterator[None]:
    """While inside, Ctrl-C and SIGTERM cancel the tasks, where signals can be handled at all."""
    loop = asyncio.get_running_loop()
    handled = []

    def stop() -> None:
        noted()
        for task in tasks:
            task.cancel()

    for number in (signal.SIGINT, signal.SIGTERM):
        with contextlib.suppress(NotImplementedError, RuntimeError, ValueError):
            loop.add_signal_handler(number, stop)
            handled.append(number)
    try:
        yield
    finally:
        for number in handled:
            loop.remove_signal_handler(number)


def _utc(seconds: float) -> str:
    return time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime(seconds))
