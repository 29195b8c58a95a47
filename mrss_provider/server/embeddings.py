"""Embeddings and tokens over HTTP: `/v1/embeddings`, `/tokenize`, `/detokenize`."""

from __future__ import annotations

import asyncio

from starlette.requests import Request
from starlette.responses import JSONResponse, Response
from starlette.routing import Route
from starlette.types import Receive, Scope, Send

from mrss_provider.backend import Embeddings, Embeds, Tokenizes, Usage
from mrss_provider.errors import MRSSError, NotFoundError
from mrss_provider.openai_schema import (
    ParsedEmbedRequest,
    embeddings_pieces,
    parse_detokenize_request,
    parse_embed_request,
    parse_tokenize_request,
    tokens_object,
)
from mrss_provider.server.auth import Caller, caller_of
from mrss_provider.server.body import read_and_parse, read_request
from mrss_provider.server.generation import until_disconnect
from mrss_provider.server.limits import limited_inputs, num_tokens_of_inputs
from mrss_provider.server.refusals import error_response
from mrss_provider.server.service import Service

# Of an answer, in one write.
_WRITE_BYTES = 1 << 16


class EmbeddingResponse(Response):
    """Embeds when it is sent; whoever hangs up ends it.

    Args:
        service: the server's parts.
        backend: what embeds.
        parsed: the request.
        caller: who asks.
    """

    def __init__(
        self, service: Service, backend: Embeds, parsed: ParsedEmbedRequest, caller: Caller
    ) -> None:
        super().__init__()
        self._service = service
        self._backend = backend
        self._parsed = parsed
        self._request = limited_inputs(parsed.request, caller, service.config)
        self._caller = caller
        self._allowance = service.allowances.of(caller)

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Send the answer (ASGI)."""
        with self._service.stalls.watched(scope, send) as write:
            try:
                await self._answer(receive, write.send)
            except MRSSError as exc:
                await error_response(exc)(scope, receive, write.send)

    async def _answer(self, receive: Receive, send: Send) -> None:
        wanted = num_tokens_of_inputs(self._request)
        taken = self._allowance.taken(self._caller.limits, wanted)
        with self._service.lifecycle.running(), taken as reservation:
            # Of a request whose client leaves nobody knows how much was read.
            reservation.num_used = wanted
            found: list[Embeddings] = []

            async def run() -> None:
                found.append(await self._backend.embed(self._request))
                reservation.num_used = found[0].num_tokens
                await self._send(found[0], send)

            try:
                await until_disconnect(receive, run())
            except MRSSError:
                reservation.num_used = 0
                raise
            finally:
                metrics = self._service.metrics
                metrics.usage += Usage(sum(each.num_tokens for each in found), 0)

    async def _send(self, found: Embeddings, send: Send) -> None:
        headers = {"content-type": "application/json", "x-mrss-mixture": found.mixture}
        headers |= self._allowance.headers()
        await send(
            {
                "type": "http.response.start",
                "status": 200,
                "headers": [(k.encode(), v.encode()) for k, v in headers.items()],
            }
        )
        body = bytearray()
        for piece in embeddings_pieces(found, self._parsed.encoding):
            body += piece
            if len(body) >= _WRITE_BYTES:
                await send({"type": "http.response.body", "body": bytes(body), "more_body": True})
                body.clear()
                # Thousands of vectors must not hold up the answers that are being written.
                await asyncio.sleep(0)
        await send({"type": "http.response.body", "body": bytes(body), "more_body": False})


class TextRoutes:
    """The endpoints over one service that answer with vectors and tokens."""

    def __init__(self, service: Service) -> None:
        self._service = service

    def table(self) -> list[Route]:
        """Return the routes."""
        routes = [Route("/tokenizer_info", self.tokenizer_info, methods=["GET"])]
        for prefix in ("/v1", ""):
            routes += [
                Route(f"{prefix}/embeddings", self.embed, methods=["POST"]),
                Route(f"{prefix}/tokenize", self.tokenize, methods=["POST"]),
                Route(f"{prefix}/detokenize", self.detokenize, methods=["POST"]),
            ]
        return routes

    async def embed(self, request: Request) -> Response:
        """Turn texts into vectors."""
        service = self._service
        service.lifecycle.check_open()
        backend = service.backend
        if not isinstance(backend, Embeds):
            raise NotFoundError("this engine has no embeddings")
        parsed = await read_and_parse(request, service.config, parse_embed_request)
        return EmbeddingResponse(service, backend, parsed, caller_of(request))

    async def tokenize(self, request: Request) -> Response:
        """Tell the tokens of a prompt or a chat."""
        backend = self._backend()
        asked = parse_tokenize_request(await self._read(request))
        return JSONResponse(tokens_object(await backend.tokenize(asked)))

    async def detokenize(self, request: Request) -> Response:
        """Tell the text of tokens."""
        backend = self._backend()
        token_ids = parse_detokenize_request(await self._read(request))
        return JSONResponse({"prompt": await backend.detokenize(token_ids)})

    async def tokenizer_info(self, request: Request) -> Response:
        """Tell that tokens are to be had here; no token of RWKV's vocabularies is only a mark."""
        self._backend()
        marks = dict.fromkeys(("bos_token", "eos_token", "pad_token"))
        return JSONResponse({"tokenizer_class": "mrss", **marks})

    async def _read(self, request: Request) -> object:
        self._service.lifecycle.check_open()
        return await read_request(request, self._service.config)

    def _backend(self) -> Tokenizes:
        backend = self._service.backend
        if not isinstance(backend, Tokenizes):
            raise NotFoundError("this engine does not tell its tokens")
        return backend


def text_routes(service: Service) -> list[Route]:
    """Return the routes of embeddings and tokens over one service."""
    return TextRoutes(service).table()
