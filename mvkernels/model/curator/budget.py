"""What a run may use: tokens and money, never exceeded, because a request first sets aside what it may take."""

from __future__ import annotations

import asyncio

from mvkernels.model.curator.job import Limits


class BudgetUsedUp(Exception):
    """No further request fits."""


class Budget:
    """Counts what answers took, and sets aside what requests in flight may take."""

    def __init__(self, limits: Limits, prompt_tokens: int = 0, completion_tokens: int = 0) -> None:
        self.limits = limits
        self.prompt_tokens = prompt_tokens
        self.completion_tokens = completion_tokens
        self._held: list[tuple[int, int]] = []
        self._changed = asyncio.Condition()

    @property
    def cost(self) -> float:
        return self.limits.cost(self.prompt_tokens, self.completion_tokens)

    async def hold(self, prompt_tokens: int, completion_tokens: int) -> tuple[int, int]:
        """Sets so many tokens aside; waits while requests in flight may leave room. Raises BudgetUsedUp."""
        wanted = prompt_tokens, completion_tokens
        async with self._changed:
            while not self._fits(wanted):
                if not self._held:
                    raise BudgetUsedUp(self._reason(wanted))
                await self._changed.wait()
            self._held.append(wanted)
        return wanted

    async def settle(self, held: tuple[int, int], prompt_tokens: int, completion_tokens: int) -> None:
        """Gives back what was set aside, and counts what was used."""
        self.prompt_tokens += prompt_tokens
        self.completion_tokens += completion_tokens
        self._held.remove(held)
        async with self._changed:
            self._changed.notify_all()

    def _fits(self, wanted: tuple[int, int]) -> bool:
        prompt = self.prompt_tokens + wanted[0] + sum(held[0] for held in self._held)
        completion = self.completion_tokens + wanted[1] + sum(held[1] for held in self._held)
        limits = self.limits
        if limits.max_tokens is not None and prompt + completion > limits.max_tokens:
            return False
        return limits.max_cost is None or limits.cost(prompt, completion) <= limits.max_cost

    def _reason(self, wanted: tuple[int, int]) -> str:
        limits = self.limits
        used = self.prompt_tokens + self.completion_tokens
        if limits.max_tokens is not None and used + sum(wanted) > limits.max_tokens:
            return (
                f"the token budget is used up: {used:,} of --max-tokens-total {limits.max_tokens:,}, "
                f"and the next request may take {sum(wanted):,}"
            )
        return (
            f"the cost budget is used up: {self.cost:.4f} of --max-cost {limits.max_cost:g}, "
            f"and the next request may cost {limits.cost(*wanted):.4f}"
        )
