"""What a run of the curator is to do, and how far it is."""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from pathlib import Path
from urllib.parse import urlsplit

from mvkernels.model.curator.chains import Columns
from mvkernels.model.curator.outputs import read_manifest
from mvkernels.model.curator.prompts import prompts_version
from mvkernels.model.settings import described, option

#: Requests at the same time: each has a task and a connection of its own.
MOST_CONCURRENT = 10_000


@dataclass(frozen=True)
class EndpointSettings:
    """base_url, model: as the endpoint names them. key: "none" for servers without one.

    retries: of one request. timeout: seconds of one request. answer_tokens: most tokens of an answer; None: the
    endpoint's own limit. temperature: None: the endpoint's own. structured: whether to ask for JSON by a schema; None:
    where the endpoint has it.
    """

    base_url: str = field(metadata=described("OpenAI-compatible endpoint, such as http://localhost:8000/v1"))
    model: str = field(metadata=described("The model's name at the endpoint."))
    key: str = "none"
    retries: int = option(12, "Of one request that failed in passing.")
    timeout: float = option(600.0, "Seconds of one request.")
    backoff: float = 1.0
    answer_tokens: int | None = option(8192, "Of one answer; 0: the endpoint's own limit.", "--max-tokens-request")
    temperature: float | None = option(None, "Default: the endpoint's own.")
    structured: bool | None = option(None, "Whether to ask for JSON by a schema. Default: where the endpoint can.")


@dataclass(frozen=True)
class Limits:
    """Of all runs into one folder; None: no limit. max_cost and prices in one currency, prices per million tokens."""

    max_tokens: int | None = option(None, "Of all runs into OUT; then the run stops.", "--max-tokens-total")
    max_cost: float | None = option(None, "Of all runs into OUT, by the prices; then it stops.")
    prompt_price: float = option(0.0, "Of a million prompt tokens.", "--price-prompt")
    completion_price: float = option(0.0, "Of a million tokens of answers.", "--price-completion")

    def cost(self, prompt_tokens: int, completion_tokens: int) -> float:
        return (prompt_tokens * self.prompt_price + completion_tokens * self.completion_price) / 1e6


@dataclass(frozen=True)
class Rules:
    """max_tries: answers to one request, the first included. max_distance: of a trace from its original.

    drop_sequential: whether a chain without a parallel step is rejected. max_characters: of a chain.
    """

    max_tries: int = option(3, "Answers to one request, until the chain is rejected.")
    max_distance: float = option(0.2, "Edit distance of a trace over its original's length.")
    drop_sequential: bool = option(False, "Reject chains without a parallel step instead of keeping them.")
    max_characters: int = option(200_000, "Of a chain; a longer one is rejected.")


@dataclass(frozen=True)
class Job:
    """What to do. concurrency: chains, and so requests, at the same time. limit: only the first chains of the input."""

    source: Path
    out: Path
    endpoint: EndpointSettings
    columns: Columns = field(default_factory=Columns)
    limit: int | None = option(None, "Only so many chains, from the first on.")
    concurrency: int = option(16, "Requests at the same time.")
    rules: Rules = field(default_factory=Rules)
    limits: Limits = field(default_factory=Limits)
    retry_rejected: bool = option(False, "Do the chains again that were rejected, say with more tries.")

    def __post_init__(self) -> None:
        """Raises ValueError for what is out of range."""
        counts = {
            "--limit": self.limit,
            "--concurrency": self.concurrency,
            "--max-tries": self.rules.max_tries,
            "--max-characters": self.rules.max_characters,
            "--max-tokens-total": self.limits.max_tokens,
            "--max-tokens-request": self.endpoint.answer_tokens,
        }
        for name, count in counts.items():
            if count is not None and count < 1:
                raise ValueError(f"{name}: expected at least 1, got {count}")
        if self.concurrency > MOST_CONCURRENT:
            raise ValueError(f"--concurrency: expected at most {MOST_CONCURRENT}, got {self.concurrency}")
        numbers = {
            "--timeout": self.endpoint.timeout,
            "--temperature": self.endpoint.temperature,
            "--max-cost": self.limits.max_cost,
            "--price-prompt": self.limits.prompt_price,
            "--price-completion": self.limits.completion_price,
        }
        for name, number in numbers.items():  # JSON, such as the manifest, holds no others
            if number is not None and not math.isfinite(number):
                raise ValueError(f"{name}: expected a finite number, got {number:g}")
        if not 0 <= self.rules.max_distance <= 1:
            raise ValueError(f"--max-distance: expected a number from 0 to 1, got {self.rules.max_distance:g}")
        if not _is_web_address(self.endpoint.base_url):
            got = without_credentials(self.endpoint.base_url)
            raise ValueError(f"--base-url: expected http://... or https://..., got {got!r}")
        if self.endpoint.timeout <= 0 or self.endpoint.retries < 0:
            raise ValueError(
                f"--timeout and --retries: expected more than 0 and at least 0, "
                f"got {self.endpoint.timeout:g} and {self.endpoint.retries}"
            )
        prices = self.limits.prompt_price, self.limits.completion_price
        if min(prices) < 0 or (self.limits.max_cost is not None and self.limits.max_cost <= 0):
            raise ValueError("--max-cost, --price-prompt, --price-completion: expected no negative ones")
        if self.limits.max_cost is not None and not any(prices):
            raise ValueError("--max-cost: expected --price-prompt and --price-completion beside it, got neither")


def _is_web_address(url: str) -> bool:
    try:
        parts = urlsplit(url)
        return parts.scheme in ("http", "https") and bool(parts.hostname) and parts.port != 0 and url.isprintable()
    except ValueError:  # of a port or an address
        return False


def without_credentials(url: str) -> str:
    """The URL without user, password, query and fragment."""
    scheme, separator, rest = url.partition("://")
    rest = rest.partition("?")[0].partition("#")[0]
    host, slash, path = rest.partition("/")
    return f"{scheme}{separator}{host.rpartition('@')[2]}{slash}{path}"


@dataclass
class State:
    """How far a run is. done: chains in the files, of all runs; here: of them in this run. total: records of the input.

    ended: why the run is over ("complete", "unfinished", "budget", "interrupted", "endpoint"); message: in words.
    """

    total: int
    done: int
    rejected: int
    warned: int
    here: int = 0
    unfinished: int = 0
    tokens: int = 0
    tokens_here: int = 0
    cost: float = 0.0
    retried: int = 0
    seconds: float = 0.0
    ended: str = "running"
    message: str = ""


def changes_since(job: Job) -> list[str]:
    """What differs from the run before in its folder: the traces there and the new ones are then of two kinds."""
    before = read_manifest(job.out)
    now = {"model": job.endpoint.model, "prompts": prompts_version()}
    return [
        f"{name}: {before[name]} until now, {value} from here on"
        for name, value in now.items()
        if before.get(name, value) != value
    ]
