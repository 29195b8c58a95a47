"""RWKV-Infer's routes, as its users' scripts call them; `docs/rwkv_infer.md` has the table.

What they load is in memory only, and computes as RWKV-Infer does: logits averaged with fixed
weights, the untuned state last, truncation before temperature.
"""

from __future__ import annotations

from typing import TypedDict

from starlette.requests import Request
from starlette.responses import JSONResponse, Response
from starlette.routing import Route

from mrss_provider.administration import Administers, Defaults, ModelOrder
from mrss_provider.errors import InvalidRequestError, MRSSError
from mrss_provider.server.administrators import admin_of, for_admins, with_detail
from mrss_provider.server.body import read_request
from mrss_provider.server.form import Form, unescaped
from mrss_provider.server.model_swap import load_model, remove_model
from mrss_provider.server.service import Service

_DEFAULTS = ("default_temperature", "default_top_p")
_MODEL_FIELDS = (
    "model_filename",
    "model_viewname",
    "model_strategy",
    "template",
    "endtoken",
    "adapter_filename",
    "adapter_mode",
    "adapter_scaling",
    *_DEFAULTS,
)
# RWKV-Infer's own, where neither the script nor a state says more.
_TEMPERATURE = 1.0
_TOP_P = 0.3
_VIEWNAME = "default model"


class _Precision(TypedDict, total=False):
    """What `model_strategy` says of a model; what is missing is as the engine has it."""

    dtype: str
    quantize: str


_PRECISIONS: dict[str, _Precision] = {
    "": {},
    "None": {},
    **{quantize: {"quantize": quantize} for quantize in ("int8", "int4", "fp8")},
    **{dtype: {"dtype": dtype, "quantize": "none"} for dtype in ("fp16", "bf16", "fp32")},
}


class RwkvInferRoutes:
    """The endpoints over one service."""

    def __init__(self, service: Service) -> None:
        self._backend = service.backend
        self._lifecycle = service.lifecycle
        self._config = service.config

    def table(self) -> list[Route]:
        """Return the routes."""
        changes = {
            "/loadmodel": self.load_model,
            "/removemodel": self.remove_model,
            "/loadstatemodel": self.load_state,
            "/mrss_loadstatemodel": self.load_mixture,
            "/mrss_set_gatingweight": self.set_weights,
            "/removestatemodel": self.remove_states,
        }
        return [
            *(Route(path, for_admins(call), methods=["POST"]) for path, call in changes.items()),
            Route("/models", with_detail(self.models)),
            Route("/healthcheck", self.healthcheck),
        ]

    async def load_model(self, request: Request) -> Response:
        """Put another model in the place of the loaded one."""
        form = await self._form(request, _MODEL_FIELDS)
        if form.text("adapter_filename", ""):
            raise InvalidRequestError(
                "adapters are not served; merge it into the checkpoint and load that",
                param="adapter_filename",
            )
        defaults = form.defaults()
        endtoken = unescaped(form.text("endtoken", ""))
        order = ModelOrder(
            path=form.text("model_filename"),
            display_name=_display_name(form.text("model_viewname", _VIEWNAME), "model_viewname"),
            **_precision(form.text("model_strategy", "")),
            template=form.text("template", "") or None,
            stop=(endtoken,) if endtoken else None,
            defaults=Defaults(
                _TEMPERATURE if defaults.temperature is None else defaults.temperature,
                _TOP_P if defaults.top_p is None else defaults.top_p,
            ),
            sampling_order="rwkv",
            drain_s=self._config.drain_s,
        )
        try:
            await load_model(admin_of(self._backend), self._lifecycle, order)
        except MRSSError as exc:
            if exc.param == "path":
                exc.param = "model_filename"
            raise
        return _success()

    async def remove_model(self, request: Request) -> Response:
        """Unload the model."""
        await remove_model(admin_of(self._backend), self._lifecycle, self._config.drain_s)
        return _success()

    async def load_state(self, request: Request) -> Response:
        """Load one state."""
        form = await self._form(request, ("state_filename", "state_viewname", *_DEFAULTS))
        await admin_of(self._backend).serve_state(
            form.text("state_filename"), _viewname(form), form.defaults()
        )
        return _success()

    async def load_mixture(self, request: Request) -> Response:
        """Load a mixture of states."""
        known = ("state_viewname", "state_filenames", "contain_originalstate")
        form = await self._form(request, (*known, "state_gatingweight", *_DEFAULTS))
        await admin_of(self._backend).serve_mixture(
            form.texts("state_filenames"),
            _viewname(form),
            with_base=form.truth("contain_originalstate", default=False),
            weights=form.numbers("state_gatingweight"),
            defaults=form.defaults(),
        )
        return _success()

    async def set_weights(self, request: Request) -> Response:
        """Change the weights of a mixture."""
        form = await self._form(request, ("state_viewname", "state_gatingweight", *_DEFAULTS))
        await admin_of(self._backend).reweigh(
            _viewname(form), form.numbers("state_gatingweight"), form.defaults()
        )
        return _success()

    async def remove_states(self, request: Request) -> Response:
        """Unload all states; whatever the body says."""
        await read_request(request, self._config)
        await admin_of(self._backend).remove_all_states()
        return _success()

    async def models(self, request: Request) -> Response:
        """List the names that requests may have, the model's first."""
        if isinstance(self._backend, Administers):
            ids = await self._backend.admin.request_ids()
        else:
            ids = [card.id for card in await self._backend.models()]
        return JSONResponse([{"object": "models", "id": text} for text in ids])

    async def healthcheck(self, request: Request) -> Response:
        """Tell that the process is alive."""
        return JSONResponse({"message": "ok", "status_code": 200})

    async def _form(self, request: Request, known: tuple[str, ...]) -> Form:
        return Form(await read_request(request, self._config), known)


def rwkv_infer_routes(service: Service) -> list[Route]:
    """Return RWKV-Infer's routes over one service."""
    return RwkvInferRoutes(service).table()


def _success() -> Response:
    return JSONResponse({"status": "success"})


def _precision(strategy: str) -> _Precision:
    if strategy not in _PRECISIONS:
        raise InvalidRequestError(
            f"model_strategy must be '', fp16, bf16, fp32, or what this engine can quantize to: "
            f"int8, int4, fp8; got {strategy!r:.40}",
            param="model_strategy",
        )
    return _PRECISIONS[strategy]


def _viewname(form: Form) -> str:
    return _display_name(form.text("state_viewname"), "state_viewname")


def _display_name(text: str, param: str) -> str:
    text = text.strip().removeprefix("mrss/")
    if not 0 < len(text) <= 200 or not text.isprintable():
        raise InvalidRequestError(
            f"{param} must have 1 to 200 printable characters, got {text!r:.220}", param=param
        )
    return text
