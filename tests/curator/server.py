"""A local endpoint of the chat completions protocol, with a scripted curator behind it, and faults by a seeded plan."""

from __future__ import annotations

import asyncio
import hashlib
import json
import random
import threading
from collections import Counter
from dataclasses import dataclass, field
from typing import Any, Self

from tests.curator import script as curator_script

HTTP_FAULTS = ("429", "500", "timeout", "cut")
ANSWER_FAULTS = {
    "summary": ("misnumbered",),
    "groups": ("dependent",),
    "structure": ("unclosed",),
    "refill": ("dropped",),
    "mapreduce": ("cross-reference", "no conclusion"),
}


@dataclass(frozen=True)
class Faults:
    """Shares of requests, 0 to 1. Which ones follows from seed and request; only the first time that it is sent.

    http: of passing failures. answers: of answers that are wrong, never of one to a complaint.
    """

    seed: int = 0
    http: float = 0.0
    answers: float = 0.0


@dataclass
class Server:
    """`with Server() as server: ... server.url`. structured: whether it takes response_format. hang: seconds."""

    faults: Faults = field(default_factory=Faults)
    structured: bool = True
    status: int | None = None  # refuse everything with this status
    hang: float = 3.0
    delay: float = 0.0
    retry_after: float = 0.05
    requests: int = 0
    tokens: int = 0
    open_now: int = 0
    open_most: int = 0
    keys: set[str] = field(default_factory=set)
    happened: Counter[str] = field(default_factory=Counter)
    longest_answer: int = 0
    seen: Counter[bytes] = field(default_factory=Counter)

    def __enter__(self) -> Self:
        self._loop = asyncio.new_event_loop()
        started = threading.Event()

        def serve() -> None:
            asyncio.set_event_loop(self._loop)
            self._server = self._loop.run_until_complete(asyncio.start_server(self._client, "127.0.0.1", 0))
            started.set()
            self._loop.run_forever()

        self._thread = threading.Thread(target=serve, daemon=True)
        self._thread.start()
        assert started.wait(10)
        port = self._server.sockets[0].getsockname()[1]
        self.url = f"http://127.0.0.1:{port}/v1"
        return self

    def __exit__(self, *_: object) -> None:
        async def stop() -> None:
            self._server.close()
            others = asyncio.all_tasks() - {asyncio.current_task()}
            for task in others:
                task.cancel()
            await asyncio.gather(*others, return_exceptions=True)

        asyncio.run_coroutine_threadsafe(stop(), self._loop).result(10)
        self._loop.call_soon_threadsafe(self._loop.stop)
        self._thread.join(10)

    async def _client(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        try:
            while True:
                head = (await reader.readuntil(b"\r\n\r\n")).decode("latin-1")
                fields = (line.partition(":") for line in head.split("\r\n"))
                headers = {name.lower(): value.strip() for name, _, value in fields}
                body = await reader.readexactly(int(headers["content-length"]))
                self.keys.add(headers.get("authorization", ""))
                self.open_now += 1
                self.open_most = max(self.open_most, self.open_now)
                try:
                    if not await self._reply(head, body, writer):
                        return
                finally:
                    self.open_now -= 1
        except (asyncio.IncompleteReadError, ConnectionError, asyncio.CancelledError):
            pass  # the client went, or the server is stopped
        finally:
            writer.close()

    async def _reply(self, head: str, body: bytes, writer: asyncio.StreamWriter) -> bool:
        """Whether the connection stays open."""
        assert head.startswith("POST /v1/chat/completions "), head
        request = json.loads(body)
        self.requests += 1
        await asyncio.sleep(self.delay)
        if self.status is not None:
            return await self._send(writer, self.status, {"error": {"message": f"status {self.status}, key in it"}})
        if "response_format" in request and not self.structured:
            self.happened["no response_format"] += 1
            return await self._send(writer, 400, {"error": {"message": "response_format is not supported"}})
        fault = self._http_fault(body)
        if fault:
            self.happened[fault] += 1
        if fault == "429":
            return await self._send(
                writer, 429, {"error": {"message": "slow down"}}, f"Retry-After: {self.retry_after}\r\n"
            )
        if fault == "500":
            return await self._send(writer, 500, {"error": {"message": "oops"}})
        if fault == "timeout":
            await asyncio.sleep(self.hang)
            return False
        reply = self._completion(request)
        if fault == "cut":
            return await self._send(writer, 200, reply, cut=True)
        self.tokens += reply["usage"]["total_tokens"]
        return await self._send(writer, 200, reply)

    def _http_fault(self, body: bytes) -> str | None:
        key = hashlib.sha256(body).digest()
        self.seen[key] += 1
        draw = random.Random(f"{self.faults.seed}{key.hex()}")
        return draw.choice(HTTP_FAULTS) if self.seen[key] == 1 and draw.random() < self.faults.http else None

    def _completion(self, request: dict[str, Any]) -> dict[str, Any]:
        messages = request["messages"]
        text = self.text(messages, "response_format" in request)
        self.longest_answer = max(self.longest_answer, len(text))
        most = 4 * request.get("max_completion_tokens", request.get("max_tokens", 1 << 20))
        finish, text = ("length" if len(text) > most else "stop"), text[:most]
        prompt = sum(len(message["content"]) for message in messages) // 4
        return {
            "id": "1",
            "object": "chat.completion",
            "created": 0,
            "model": request["model"],
            "choices": [{"index": 0, "finish_reason": finish, "message": {"role": "assistant", "content": text}}],
            "usage": {
                "prompt_tokens": prompt,
                "completion_tokens": len(text) // 4,
                "total_tokens": prompt + len(text) // 4,
            },
        }

    def text(self, messages: list[dict[str, str]], structured: bool) -> str:
        """The curator's answer, with a fault where the plan has one."""
        right = curator_script.answer(messages, structured)
        last = messages[-1]["content"]
        draw = random.Random(f"{self.faults.seed}{json.dumps(messages)}")
        if not last.startswith("# Stage ") or draw.random() >= self.faults.answers:
            return right
        stage = curator_script.stage_of(last)
        fault = draw.choice(ANSWER_FAULTS[stage])
        self.happened[fault] += 1
        value = json.loads(right if structured else curator_script.answer(messages, True))
        spoil(fault, value, last)
        return json.dumps(value) if structured else curator_script.plain(stage, value)

    async def _send(
        self, writer: asyncio.StreamWriter, status: int, value: dict[str, Any], more: str = "", cut: bool = False
    ) -> bool:
        body = json.dumps(value).encode()
        head = f"HTTP/1.1 {status} X\r\nContent-Type: application/json\r\nContent-Length: {len(body)}\r\n{more}\r\n"
        writer.write(head.encode() + (body[: len(body) // 2] if cut else body))
        await writer.drain()
        return not cut


def spoil(fault: str, value: dict[str, Any], request: str) -> None:
    """Makes a right answer wrong."""
    if fault == "misnumbered":
        value["steps"][-1]["id"] = "S999"
    elif fault == "dependent":
        group = max(value["groups"], key=lambda one: len(one["paths"]))
        first, second = group["paths"][0], group["paths"][-1]
        need = next(one for one in value["needs"] if one["step"] == second[-1])
        if len(group["paths"]) > 1:
            need["uses"].append(first[0])
        else:
            value["needs"].remove(need)
    elif fault == "unclosed":
        value["lines"].pop(len(value["lines"]) - 1 - value["lines"][::-1].index("</Parallel>"))
    elif fault == "dropped":
        value["ranges"][-1]["last"] -= 1
    elif fault == "cross-reference":
        first = int(request.partition("\n[")[2].partition("]")[0])
        value["edits"] = [edit for edit in value["edits"] if edit["sentence"] != first]
        value["edits"].append({"sentence": first, "text": "Similarly to path 2, as above, this works out."})
    else:
        value["conclusion"] = ""
