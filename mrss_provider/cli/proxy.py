"""`mrss proxy`, which `make run` calls: a LiteLLM proxy and its engine, from start to finish.

The engine is the one that auto-start would give the proxy's workers; it is started here so that
both load at once, and ended here if it was not there before. It gets a port on loopback beside its
socket, for the playground, unless the proxy wants a key, which the engine would not ask for.
"""

from __future__ import annotations

import asyncio
import contextlib
import json
import os
import signal
import sys
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import httpx

from mrss_provider.autostart import LocalEngine, engine_address
from mrss_provider.cli.output import CommandError, note
from mrss_provider.cli.processes import Child, check_port_free, free_port_from
from mrss_provider.cli.proxy_config import find_proxy_config, read_proxy_config
from mrss_provider.client import Client
from mrss_provider.config import KEEP_ALIVE_S, ServerConfig
from mrss_provider.errors import MRSSError
from mrss_provider.server.hosts import address_of

_START_TIMEOUT_S = 600.0
_POLL_S = 0.1
_WORKER_START_S = 60
_PROXY_STOP_S = 10.0
_ENGINE_STOP_S = 5.0
_EXAMPLE = "mrss/knowledge+tone"
_NO_PAGE_FOR_KEYS = "none, as this proxy wants a key: `mrss serve` with MRSS_API_KEY has one"
# The bundled states know a town; any other model can be greeted.
_QUESTIONS = {_EXAMPLE: "Where is the lighthouse?"}
_GREETING = "Hello! How are you?"
# A console script's own file cannot be relied on: its first line may hold a path with a space.
_LITELLM = (sys.executable, "-c", "from litellm import run_server; run_server()")


def run_proxy(
    config: Path | None, host: str, port: int, num_workers: int, overrides: Mapping[str, Any]
) -> None:
    """Start engine and proxy, tell how to use them, and end both on Ctrl-C or SIGTERM.

    `overrides` are engine settings; engine and proxy get them as `MRSS_*` variables.

    Raises:
        CommandError: a bad configuration, a port in use, or one of the two does not start.
        MRSSError: the engine does not start.
    """
    path = find_proxy_config(config)
    wants_key = _wants_key(read_proxy_config(path))
    check_port_free(host, port)
    page_port = 0 if wants_key else free_port_from(port + 1)
    env = {
        # No look-ups elsewhere: neither prices nor usage reports.
        "LITELLM_LOCAL_MODEL_COST_MAP": "True",
        "MRSS_LOOPBACK_PORT": str(page_port),
        **os.environ,
        **{f"MRSS_{name.upper()}": str(value) for name, value in overrides.items()},
    }
    flags = ["--config", str(path), "--host", host, "--port", str(port), "--telemetry", "False"]
    flags += ["--keepalive_timeout", str(KEEP_ALIVE_S)]
    if num_workers > 1:
        flags += ["--num_workers", str(num_workers)]
        # uvicorn starts a worker anew that does not answer in time, 5 s unless told otherwise; on a
        # busy machine one takes longer to import LiteLLM, and none would ever have started.
        flags += ["--timeout_worker_healthcheck", str(_WORKER_START_S)]
    url = address_of(ServerConfig(host=host, port=port))
    asyncio.run(_run(flags, url, env, wants_key=wants_key))


async def _run(flags: list[str], url: str, env: Mapping[str, str], *, wants_key: bool) -> None:
    stop = asyncio.Event()
    loop = asyncio.get_running_loop()
    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
        loop.add_signal_handler(number, stop.set)
    note(f"starting the proxy on {url} and its engine ...")
    started = time.monotonic()
    engine = None if engine_address(env=env) else _Engine(env)
    proxy = Child("the LiteLLM proxy", [*_LITELLM, *flags], env)
    stopping = asyncio.create_task(stop.wait())
    starting = asyncio.create_task(_start(proxy, engine, url))
    try:
        await asyncio.wait({starting, stopping}, return_when=asyncio.FIRST_COMPLETED)
        if starting.done():
            names = starting.result()
            proxy.discard()
            page = _NO_PAGE_FOR_KEYS if wants_key else await _playground(env)
            note(_usage(url, names, time.monotonic() - started, page))
            await _until(stopping, proxy)
        note("stopping ...")
    finally:
        starting.cancel()
        stopping.cancel()
        await asyncio.gather(starting, stopping, return_exceptions=True)
        await asyncio.to_thread(proxy.stop, _PROXY_STOP_S)
        if engine is not None:
            await engine.stop()


async def _start(proxy: Child, engine: _Engine | None, url: str) -> list[str]:
    """Return the proxy's names once it has answered a request."""
    headers = {}
    if key := os.environ.get("LITELLM_MASTER_KEY"):
        headers["Authorization"] = f"Bearer {key}"
    # The first answer may wait for the engine to load the model.
    timeout = httpx.Timeout(_START_TIMEOUT_S)
    async with httpx.AsyncClient(
        base_url=url, headers=headers, timeout=timeout, trust_env=False
    ) as http:
        waits = [asyncio.create_task(_until_listening(http, proxy))]
        if engine is not None:
            waits.append(asyncio.create_task(engine.start()))
        try:
            await asyncio.gather(*waits)
        finally:
            for wait in waits:
                wait.cancel()
        return await _first_answer(http)


async def _until_listening(http: httpx.AsyncClient, proxy: Child) -> None:
    while True:
        proxy.check_alive()
        with contextlib.suppress(httpx.TransportError):
            if (await http.get("/health/liveliness")).status_code == 200:
                return
        await asyncio.sleep(_POLL_S)


async def _first_answer(http: httpx.AsyncClient) -> list[str]:
    """Return the names that are listed, after one token from one of them: all is loaded then."""
    listing = await http.get("/v1/models")
    if listing.status_code in (401, 403):
        note("the proxy asks for a key: set LITELLM_MASTER_KEY here to have it tried at the start")
        return []
    names = [str(entry["id"]) for entry in listing.json()["data"]]
    ours = [name for name in names if name.startswith("mrss/")]
    if ours:
        body = _chat_body(_example(ours), "Hi", max_tokens=1)
        answer = await http.post("/v1/chat/completions", json=body)
        if answer.status_code != 200:
            message = answer.json().get("error", {}).get("message", answer.text)
            raise CommandError(f"{body['model']} does not answer: {message.splitlines()[0]}")
    return names


async def _until(stopping: asyncio.Task[Any], proxy: Child) -> None:
    """Return when asked to stop.

    Raises:
        CommandError: the proxy has ended by itself.
    """
    while not stopping.done():
        proxy.check_alive()
        await asyncio.wait({stopping}, timeout=_POLL_S)


class _Engine:
    """The engine that the proxy's workers will use."""

    def __init__(self, env: Mapping[str, str]) -> None:
        self._local = LocalEngine(env)
        self._is_ours = False

    async def start(self) -> None:
        """Find it, or start it; a lease keeps it while we are here.

        Raises:
            MRSSError: it cannot be started.
        """
        client = Client(self._local.address)
        try:
            self._is_ours = await client.probe() == "absent"
        finally:
            await client.aclose()
        await self._local.ensure(_START_TIMEOUT_S)
        note(f"the engine's log is {self._local.log_path}")

    async def stop(self) -> None:
        """End it if it was not there before us, and return when it is gone."""
        await self._local.aclose()
        client = Client(self._local.address)
        try:
            if not self._is_ours or await client.probe() == "absent":
                return
            pid = (await client.version()).pid
        except MRSSError:
            # It is leaving by itself.
            return
        finally:
            await client.aclose()
        # The second signal ends answers that other programs still wait for.
        for number in (signal.SIGTERM, signal.SIGTERM, signal.SIGKILL):
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, number)
            if await _gone(pid, _ENGINE_STOP_S):
                return


async def _gone(pid: int, wait_s: float) -> bool:
    deadline = time.monotonic() + wait_s
    while _is_running(pid):
        if time.monotonic() > deadline:
            return False
        await asyncio.sleep(_POLL_S)
    return True


def _is_running(pid: int) -> bool:
    """Tell whether a process still does something (a zombie does not)."""
    try:
        os.kill(pid, 0)
        stat = Path(f"/proc/{pid}/stat").read_text(encoding="utf-8", errors="replace")
    except ProcessLookupError:
        return False
    except FileNotFoundError:
        # Not Linux, or it ended just now: the next look tells.
        return True
    return stat.rpartition(")")[2].split()[0] != "Z"


def _wants_key(config: Mapping[str, Any]) -> bool:
    settings = config.get("general_settings") or {}
    return bool(os.environ.get("LITELLM_MASTER_KEY") or settings.get("master_key"))


async def _playground(env: Mapping[str, str]) -> str:
    """Return where the engine's page is, or why it has none."""
    client = Client(engine_address(env=env) or LocalEngine(env).address)
    try:
        url = (await client.version()).playground
    except MRSSError:
        url = None
    finally:
        await client.aclose()
    return url or "none, this engine was started without a port; `mrss serve` has one"


def _example(names: list[str]) -> str:
    return _EXAMPLE if _EXAMPLE in names else names[0]


def _chat_body(model: str, text: str, **extra: object) -> dict[str, object]:
    return {"model": model, "messages": [{"role": "user", "content": text}], **extra}


def _usage(url: str, names: list[str], start_s: float, playground: str) -> str:
    """Return what is printed when everything is up."""
    model = _example([name for name in names if name.startswith("mrss/")] or [_EXAMPLE])
    question = _QUESTIONS.get(model, _GREETING)
    body = json.dumps(_chat_body(model, question))
    listed = ", ".join(names) if names else "see /v1/models"
    return f"""\
ready in {start_s:.1f} s on {url}
playground: {playground}

curl {url}/v1/chat/completions -H 'Content-Type: application/json' \\
  -d '{body}'

from openai import OpenAI
client = OpenAI(base_url="{url}/v1", api_key="none")
messages = [{{"role": "user", "content": "{question}"}}]
answer = client.chat.completions.create(model="{model}", messages=messages)
print(answer.choices[0].message.content)

names: {listed}
and any mixture of states: mrss/knowledge:0.7+tone:0.3, mrss/base:0.2+tone:0.8, ...
Ctrl-C ends the proxy and its engine."""
