"""OpenAI servers of known speed and quality, for a proxy to stand before.

    stub = Stub(right=0.9, chunk_s=0.004)    # nine of ten answers are "right", 4 ms a token
    stub = Stub(right=0.9, chunk_s=0.004, first_s=0.2)    # and 200 ms before the first one

Which answers are right is a function of prompt and seed, the same for stubs with one `luck`.
"""

import asyncio
import hashlib
import json
import threading

import uvicorn
from starlette.applications import Starlette
from starlette.responses import JSONResponse, StreamingResponse
from starlette.routing import Route

NUM_TOKENS = 6


class Stub:
    """A server in a thread, from construction to `stop`.

    Args:
        right: share of the answers that are right.
        chunk_s: from token to token.
        first_s: before the first token, beside.
        error_rate: share of the calls that meet a 400.
        luck: which answers are right; stubs of another luck are wrong elsewhere.
    """

    def __init__(self, *, right, chunk_s, first_s=0.0, error_rate=0.0, luck=""):
        self._right, self._chunk_s, self._first_s = right, chunk_s, first_s
        self._error_rate, self._luck = error_rate, luck
        self._num_calls = 0
        route = Route("/v1/chat/completions", self._chat, methods=["POST"])
        config = uvicorn.Config(
            Starlette(routes=[route]),
            port=0,
            log_level="error",
            # LiteLLM keeps a connection for 120 s, and whoever asks must be the first to close it.
            timeout_keep_alive=3600,
            loop="asyncio",
        )
        self._server = uvicorn.Server(config)
        self._thread = threading.Thread(target=self._server.run, daemon=True)
        self._thread.start()
        while not self._server.started:
            assert self._thread.is_alive()
        (socket,) = self._server.servers[0].sockets
        self.url = f"http://127.0.0.1:{socket.getsockname()[1]}/v1"

    def stop(self):
        self._server.should_exit = True
        self._thread.join(10)

    async def _chat(self, request):
        body = await request.json()
        self._num_calls += 1
        if self._draw("error", self._num_calls) < self._error_rate:
            error = {"message": "a bad day", "type": "invalid_request_error", "code": "bad"}
            return JSONResponse({"error": error}, 400)
        prompt = body["messages"][-1]["content"]
        is_right = self._draw(prompt, body.get("seed")) < self._right
        words = ["The", " answer", " is", " right" if is_right else " wrong", ",", " aye"]
        if not body.get("stream"):
            # The proxy's health check.
            message = {"role": "assistant", "content": "".join(words)}
            choice = {"index": 0, "message": message, "finish_reason": "stop"}
            return JSONResponse({"id": "chatcmpl-1", "created": 1, "choices": [choice]})
        return StreamingResponse(self._events(words), media_type="text/event-stream")

    def _draw(self, *parts):
        digest = hashlib.sha256(repr((self._luck, *parts)).encode()).digest()
        return int.from_bytes(digest[:6], "big") / 2**48

    async def _events(self, words):
        head = {"id": f"chatcmpl-{id(words)}", "object": "chat.completion.chunk", "created": 1}
        head["model"] = "stub"
        await asyncio.sleep(self._first_s)
        for word in words:
            await asyncio.sleep(self._chunk_s)
            choice = {"index": 0, "delta": {"role": "assistant", "content": word}}
            yield self._event({**head, "choices": [{**choice, "finish_reason": None}]})
        end = {"index": 0, "delta": {}, "finish_reason": "stop"}
        yield self._event({**head, "choices": [end]})
        usage = {"prompt_tokens": 5, "completion_tokens": NUM_TOKENS, "total_tokens": 11}
        yield self._event({**head, "choices": [], "usage": usage})
        yield "data: [DONE]\n\n"

    @staticmethod
    def _event(chunk):
        return f"data: {json.dumps(chunk)}\n\n"
