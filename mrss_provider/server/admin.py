"""Administration over HTTP: `/v1/states`, `/v1/mixtures`, `/v1/model`. All need an admin.

What is done to states and mixtures here lasts: the next start finds it.
"""

from __future__ import annotations

from dataclasses import asdict
from typing import Any, get_args

from starlette.requests import Request
from starlette.responses import JSONResponse, Response
from starlette.routing import Route

from mrss_provider.administration import Defaults, MixtureSpec, ModelInfo, ModelOrder, StateInfo
from mrss_provider.backend import ModelCard
from mrss_provider.errors import InvalidRequestError, NotFoundError
from mrss_provider.mixture import Kind, check_name
from mrss_provider.sampling_params import SamplingParams
from mrss_provider.server.administrators import admin_of, for_admins
from mrss_provider.server.body import read_request
from mrss_provider.server.form import Form
from mrss_provider.server.model_swap import load_model, remove_model
from mrss_provider.server.service import Service
from mrss_provider.server.uploads import uploaded

_FORMATS = ("safetensors", "pth", "st")
_MIXTURE_FIELDS = (
    "name",
    "terms",
    "merge",
    "gate",
    "cut",
    "reinject",
    "temperature",
    "top_p",
    "sampling_order",
    "template",
    "description",
    "display_name",
)
_MODEL_FIELDS = (
    "path",
    "display_name",
    "dtype",
    "quantize",
    "template",
    "temperature",
    "top_p",
    "drain_s",
)
_MAX_DRAIN_S = 3600.0


class AdminRoutes:
    """The endpoints over one service."""

    def __init__(self, service: Service) -> None:
        self._backend = service.backend
        self._lifecycle = service.lifecycle
        self._config = service.config

    def table(self) -> list[Route]:
        """Return the routes."""
        calls = [
            ("GET", "/v1/states", self.states),
            ("POST", "/v1/states", self.add_state),
            ("GET", "/v1/states/{name}", self.state),
            ("DELETE", "/v1/states/{name}", self.remove_state),
            ("GET", "/v1/mixtures", self.mixtures),
            ("POST", "/v1/mixtures", self.create_mixture),
            ("GET", "/v1/mixtures/{name}", self.mixture),
            ("PUT", "/v1/mixtures/{name}", self.put_mixture),
            ("DELETE", "/v1/mixtures/{name}", self.remove_mixture),
            ("GET", "/v1/model", self.model),
            ("POST", "/v1/model", self.load_model),
            ("DELETE", "/v1/model", self.remove_model),
        ]
        return [Route(path, for_admins(call), methods=[method]) for method, path, call in calls]

    async def states(self, request: Request) -> Response:
        """List the loaded states."""
        return _list([_state(info) for info in await admin_of(self._backend).states()])

    async def state(self, request: Request) -> Response:
        """Show one."""
        name = request.path_params["name"]
        for info in await admin_of(self._backend).states():
            if info.name == name:
                return JSONResponse(_state(info))
        raise NotFoundError(f"there is no state {name!r:.100}", param="name")

    async def add_state(self, request: Request) -> Response:
        """Load a file of the folder (JSON), or the bytes of one (anything else)."""
        admin = admin_of(self._backend)
        if request.headers.get("content-type", "").startswith("application/json"):
            body = await read_request(request, self._config)
            form = Form(body, ("path", "name"))
            name = form.text("name") if "name" in form else None
            info = await admin.add_state(form.text("path"), name)
        else:
            name = check_name(request.query_params.get("name", ""))
            kind = request.query_params.get("format", _FORMATS[0])
            if kind not in _FORMATS:
                raise InvalidRequestError(
                    f"format must be one of {', '.join(_FORMATS)}, got {kind!r:.40}", param="format"
                )
            limit, stall_s = admin.max_state_bytes, self._config.stall_s
            async with uploaded(request, f".{kind}", limit, "max_state_bytes", stall_s) as file:
                info = await admin.upload_state(file, name)
        return JSONResponse(_state(info), 201)

    async def remove_state(self, request: Request) -> Response:
        """Unload one."""
        info = await admin_of(self._backend).remove_state(request.path_params["name"])
        kept = info.file if info.file and not info.added else None
        return JSONResponse({**_deleted("state", info.name), "kept_file": kept})

    async def mixtures(self, request: Request) -> Response:
        """List the named mixtures."""
        return _list(await self._mixtures())

    async def mixture(self, request: Request) -> Response:
        """Show one."""
        name = request.path_params["name"]
        return JSONResponse(await self._mixture(name))

    async def create_mixture(self, request: Request) -> Response:
        """Create one."""
        form = await self._form(request, _MIXTURE_FIELDS)
        return await self._put(form.text("name"), form, is_new=True)

    async def put_mixture(self, request: Request) -> Response:
        """Create or replace one."""
        form = await self._form(request, _MIXTURE_FIELDS)
        name = request.path_params["name"]
        if form.text("name", name) != name:
            raise InvalidRequestError("the body has another name than the path", param="name")
        return await self._put(name, form, is_new=False)

    async def remove_mixture(self, request: Request) -> Response:
        """Remove one."""
        name = request.path_params["name"]
        await admin_of(self._backend).remove_mixture(name)
        return JSONResponse(_deleted("mixture", name))

    async def model(self, request: Request) -> Response:
        """Show what is loaded."""
        return JSONResponse(_model(await admin_of(self._backend).model()))

    async def load_model(self, request: Request) -> Response:
        """Put another model in the place of the loaded one."""
        form = await self._form(request, _MODEL_FIELDS)
        defaults = Defaults(form.number("temperature"), form.number("top_p"))
        SamplingParams(temperature=defaults.temperature, top_p=defaults.top_p)
        order = ModelOrder(
            path=form.text("path"),
            display_name=form.text("display_name", ""),
            dtype=form.text("dtype", "") or None,
            quantize=form.text("quantize", "") or None,
            template=form.text("template", "") or None,
            defaults=defaults,
            drain_s=self._drain_s(form.number("drain_s")),
        )
        info = await load_model(admin_of(self._backend), self._lifecycle, order)
        return JSONResponse(_model(info))

    async def remove_model(self, request: Request) -> Response:
        """Unload the model."""
        await remove_model(admin_of(self._backend), self._lifecycle, self._config.drain_s)
        return JSONResponse(_deleted("model", ""))

    async def _form(self, request: Request, known: tuple[str, ...]) -> Form:
        return Form(await read_request(request, self._config), known)

    async def _put(self, name: str, form: Form, *, is_new: bool) -> Response:
        admin = admin_of(self._backend)
        was_new = await admin.put_mixture(name, _spec(form), is_new=is_new)
        return JSONResponse(await self._mixture(name), 201 if was_new else 200)

    async def _mixture(self, name: str) -> dict[str, Any]:
        for mixture in await self._mixtures():
            if mixture["name"] == name:
                return mixture
        raise NotFoundError(f"there is no mixture {name!r:.100}", param="name")

    async def _mixtures(self) -> list[dict[str, Any]]:
        """Return the named mixtures: what each says, and what of it was left to us."""
        specs = await admin_of(self._backend).mixtures()
        cards = {card.id: card for card in await self._backend.models()}
        return [_mixture(name, spec, cards.get(name)) for name, spec in specs.items()]

    def _drain_s(self, asked: float | None) -> float:
        if asked is None:
            return self._config.drain_s
        if not 0 <= asked <= _MAX_DRAIN_S:
            raise InvalidRequestError(
                f"drain_s must be in [0, {_MAX_DRAIN_S:g}], got {asked:g}", param="drain_s"
            )
        return asked


def admin_routes(service: Service) -> list[Route]:
    """Return the routes of administration over one service."""
    return AdminRoutes(service).table()


def _spec(form: Form) -> MixtureSpec:
    words = ("reinject", "sampling_order", "template", "description", "display_name")
    texts = {key: form.text(key) for key in words if key in form}
    texts |= {kind: form.method(kind) for kind in get_args(Kind) if kind in form}
    numbers = {key: form.number(key) for key in ("cut", "temperature", "top_p") if key in form}
    return MixtureSpec(terms=form.text("terms"), **texts, **numbers)  # type: ignore[arg-type]


def _list(items: list[dict[str, Any]]) -> Response:
    return JSONResponse({"object": "list", "data": items})


def _state(info: StateInfo) -> dict[str, Any]:
    return {"object": "state", **asdict(info)}


def _mixture(name: str, spec: MixtureSpec, card: ModelCard | None) -> dict[str, Any]:
    said = {key: value for key, value in asdict(spec).items() if value not in (None, "")}
    served = {"served": {"reinject": card.reinject}} if card else {}
    return {"object": "mixture", "name": name, **said, **served}


def _model(info: ModelInfo) -> dict[str, Any]:
    return {"object": "model", **asdict(info)}


def _deleted(kind: str, name: str) -> dict[str, Any]:
    return {"object": kind, "name": name, "deleted": True}
