"""An OpenAI-compatible endpoint on this machine, for trying models out, and a web page for it.

It listens on the loopback interface only, and asks for the token that its address has. Pages of other sites can neither
read from it nor send requests to it: the Host header must name this machine, and the content type must be JSON, for
which browsers send a CORS preflight first.
"""

import asyncio
import json
import re
import secrets
import socket
import threading
import time
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from itertools import count
from pathlib import Path
from typing import Any

from aiohttp import web
from aiohttp.typedefs import Handler

from components.prepare.dataset import Message
from components.shared.errors import FineloopError, UserError
from components.shared.protocol import script_source
from ray_jobs.talking.speaker import Reply, Speaker
from ray_jobs.text.chat_format import without_reasoning

UNSERVED = ("tools", "functions", "stop", "logprobs", "response_format", "logit_bias", "seed")
"""Unsupported parameters, which are refused since they would change the answer."""
NEUTRAL: Mapping[str, Any] = {"n": 1, "top_p": 1, "presence_penalty": 0, "frequency_penalty": 0}
"""Parameters that are accepted only at these values."""
ROLES = ("system", "developer", "user", "assistant")
LOOPBACK = "127.0.0.1"
PAGE = (Path(__file__).parent / "page.html").read_text(encoding="utf-8")
SCRIPTS = re.findall(r"<script>(.*?)</script>", PAGE, flags=re.DOTALL)
POLICY = (  # only the page's own script runs, and only its own server can be reached
    f"default-src 'none'; script-src {' '.join(map(script_source, SCRIPTS))}; style-src 'unsafe-inline'; "
    "img-src data:; connect-src 'self'; base-uri 'none'; form-action 'none'; frame-ancestors 'none'"
)
MOST_BYTES = 2**20
"""Maximum size of a request's body, in bytes."""
PATIENCE_S = 60.0
"""Seconds that a client has to send a request, or to read what was sent to it."""


@dataclass(frozen=True)
class Request:
    """A validated request."""

    model: str
    turns: Sequence[Message]
    max_tokens: int | None
    temperature: float
    stream: bool


def parsed_request(body: Any) -> Request:
    """Parse and validate the body; raises UserError where it is not a request or asks for something unsupported."""
    if not isinstance(body, dict):
        raise UserError("the body is not a JSON object")
    if unserved := [name for name in UNSERVED if body.get(name)]:
        raise UserError(f"{unserved[0]} is not served here")
    if other := [name for name, value in NEUTRAL.items() if body.get(name) not in (None, value)]:
        raise UserError(f"{other[0]} is served at {NEUTRAL[other[0]]} alone")
    most = body.get("max_completion_tokens") or body.get("max_tokens")
    if most is not None and (not isinstance(most, int) or isinstance(most, bool) or most < 1):
        raise UserError(f"max_tokens {most!r}: expected a whole number above 0")
    temperature = body.get("temperature") or 0.0
    if not isinstance(temperature, (int, float)) or not 0 <= temperature <= 2:
        raise UserError(f"temperature {temperature!r}: expected a number from 0 to 2")
    messages = body.get("messages")
    if not isinstance(messages, list) or not messages:
        raise UserError("messages: expected a list with at least one message")
    turns = [_turn(message) for message in messages]
    if turns[-1].role != "user":
        raise UserError(f"messages: the last one is of the {turns[-1].role}, and should be of the user")
    return Request(str(body.get("model", "")), turns, most, float(temperature), bool(body.get("stream")))


def _turn(message: Any) -> Message:
    role = message.get("role") if isinstance(message, dict) else None
    if role not in ROLES:
        raise UserError(f"messages: role {role!r}: expected {', '.join(ROLES)}")
    content = message.get("content")
    if isinstance(content, list) and all(isinstance(part, dict) and part.get("type") == "text" for part in content):
        content = "".join(str(part.get("text", "")) for part in content)
    if not isinstance(content, str):
        raise UserError("messages: content: expected text, or parts of text")
    # Without reasoning, as in a chat: it is not part of the conversation.
    text = without_reasoning(content) if role == "assistant" else content
    return Message("system" if role == "developer" else role, text)


def error_body(message: str, *, kind: str = "invalid_request_error") -> dict[str, Any]:
    """An error response."""
    return {"error": {"message": message, "type": kind, "param": None, "code": None}}


class Server:
    """Answers with `speakers`, by their names, one request at a time; the page loads `about`."""

    def __init__(self, port: int, speakers: Mapping[str, Speaker], about: Mapping[str, Any]) -> None:
        """Raises UserError where something else listens at the port."""
        self.speakers, self.about, self.token = speakers, about, secrets.token_urlsafe(24)
        self._since, self._numbers, self._one = int(time.time()), count(1), ThreadPoolExecutor(1, "speaker")
        try:
            self._socket = socket.create_server((LOOPBACK, port))
        except OSError as exc:
            raise UserError(f"--port {port} cannot be had on {LOOPBACK}: {exc.strerror}") from exc
        self.url = f"http://{LOOPBACK}:{self._socket.getsockname()[1]}"

    async def serve(self) -> None:
        """Answer until the task is cancelled."""
        app = web.Application(client_max_size=MOST_BYTES, middlewares=[self._guarded])
        app.add_routes(web.get(path, self._get, allow_head=False) for path in ("/", "/health", "/about", "/v1/models"))
        app.on_response_prepare.append(_unsniffed)
        app.add_routes([web.post("/v1/chat/completions", self._completion)])
        # No access log: requests contain prompts and addresses. A handler whose client hangs up is cancelled.
        runner = web.AppRunner(
            app, access_log=None, handler_cancellation=True, keepalive_timeout=PATIENCE_S, shutdown_timeout=0.1
        )
        await runner.setup()
        try:
            await web.SockSite(runner, self._socket).start()
            await asyncio.Event().wait()
        finally:
            await runner.cleanup()

    @web.middleware
    async def _guarded(self, request: web.Request, handler: Handler) -> web.StreamResponse:
        """Refuse what does not name this machine, which protects against DNS rebinding, and what lacks the token."""
        host = request.headers.get("Host", "").rpartition(":")[0]
        token = request.query.get("token") or request.headers.get("Authorization", "").removeprefix("Bearer ")
        if host not in (LOOPBACK, "localhost") or not request.raw_path.startswith("/"):
            return _wrong(403, f"Host {host!r}: expected {LOOPBACK} or localhost")
        if request.path != "/health" and not secrets.compare_digest(
            token.encode(errors="replace"), self.token.encode()
        ):
            return _wrong(401, "expected the token that `fineloop serve` printed: /?token=..., or as an API key")
        try:
            async with asyncio.timeout(PATIENCE_S):
                await request.read()
            return await handler(request)
        except TimeoutError:
            return _wrong(408, f"the request did not come within {PATIENCE_S:.0f} s")
        except FineloopError as exc:
            return _wrong(400, str(exc))
        except web.HTTPException as exc:
            return _wrong(exc.status, f"{request.method} {request.path}: {exc.reason}")

    async def _get(self, request: web.Request) -> web.Response:
        match request.path:
            case "/":
                headers = {"Content-Security-Policy": POLICY, "Referrer-Policy": "no-referrer"}
                return web.Response(text=PAGE, content_type="text/html", headers=headers)
            case "/health":
                return web.json_response({"status": "ok"})
            case "/about":
                return web.json_response(dict(self.about))
        about = {"object": "model", "created": self._since, "owned_by": "fineloop"}
        return web.json_response({"object": "list", "data": [{"id": name, **about} for name in self.speakers]})

    async def _completion(self, request: web.Request) -> web.StreamResponse:
        if request.content_type != "application/json":
            return _wrong(415, "expected Content-Type: application/json")
        try:
            body = json.loads(await request.read())
            json.dumps(body, ensure_ascii=False).encode()  # no tokenizer takes half of a surrogate pair
        except (ValueError, RecursionError) as exc:
            return _wrong(400, f"not JSON that can be read: {exc}")
        wanted = parsed_request(body)
        speaker = self.speakers.get(wanted.model)
        if speaker is None:
            return _wrong(404, f"there is no model {wanted.model!r}: there is {', '.join(self.speakers)}")
        number, ended, loop = next(self._numbers), threading.Event(), asyncio.get_running_loop()
        words = asyncio.Queue[str | None]()

        def require_reader() -> None:
            # The connection itself: this handler is cancelled only when the event loop next has its turn.
            if ended.is_set() or request.transport is None:
                raise asyncio.CancelledError

        def on_text(text: str) -> None:
            require_reader()
            loop.call_soon_threadsafe(words.put_nowait, text)

        def spoken() -> Reply:
            require_reader()
            how: dict[str, Any] = {"max_tokens": wanted.max_tokens, "temperature": wanted.temperature}
            return speaker.answer(wanted.turns, on_text=on_text, **how)

        def completion(kind: str, choice: dict[str, Any], reply: Reply | None = None) -> dict[str, Any]:
            reason = reply and ("stop" if reply.ended else "length")
            head = {"id": f"chatcmpl-{number}", "object": kind, "created": int(time.time()), "model": wanted.model}
            return {**head, "choices": [{"index": 0, **choice, "finish_reason": reason}]}

        answer = loop.run_in_executor(self._one, spoken)
        answer.add_done_callback(lambda _: words.put_nowait(None))
        try:
            if not wanted.stream:
                reply = await answer
                message = {"role": "assistant", "content": reply.text}
                usage = {"prompt_tokens": reply.prompt_tokens, "completion_tokens": reply.tokens}
                usage["total_tokens"] = reply.prompt_tokens + reply.tokens
                whole = completion("chat.completion", {"message": message, "logprobs": None}, reply)
                return web.json_response({**whole, "usage": usage})
            response = web.StreamResponse(headers={"Content-Type": "text/event-stream"})
            await response.prepare(request)

            async def event(data: str) -> None:
                async with asyncio.timeout(PATIENCE_S):
                    await response.write(f"data: {data}\n\n".encode())

            def chunk(delta: dict[str, str], reply: Reply | None = None) -> str:
                return json.dumps(completion("chat.completion.chunk", {"delta": delta}, reply))

            try:
                await event(chunk({"role": "assistant", "content": ""}))
                while (text := await words.get()) is not None:
                    await event(chunk({"content": text}))
                try:
                    last = [chunk({}, await answer), "[DONE]"]
                except FineloopError as exc:
                    last = [json.dumps(error_body(str(exc)))]
                for data in last:
                    await event(data)
            except (ConnectionError, TimeoutError):  # it has hung up, or does not read, for which no model waits
                if request.transport is not None:
                    request.transport.abort()
            return response
        finally:  # also where the client has gone: an answer that waits is not begun, and one that goes on ends
            ended.set()
            answer.cancel()


async def _unsniffed(_request: web.Request, response: web.StreamResponse) -> None:
    response.headers["X-Content-Type-Options"] = "nosniff"


def _wrong(status: int, message: str) -> web.Response:
    kind = "invalid_request_error" if status != 404 else "not_found_error"
    return web.json_response(error_body(message, kind=kind), status=status)
