"""The `Backend` protocol: where answers come from."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal, Protocol

from mrss_provider.backend.answer import DeltaStream
from mrss_provider.backend.request import GenerateRequest, Reinject


@dataclass(frozen=True)
class ModelCard:
    """One name that `/v1/models` lists.

    Attributes:
        id: a state, a named mixture, or `base`.
        kind: what it is.
        description: one line, may be empty.
        created: Unix time in seconds.
        context_len: longest prompt plus answer, in tokens.
        supports: what can be asked of it besides text: `tools`, `thinking`, `embeddings`.
        reinject: whether its states are given anew at turns of the user's, where a request does
            not say.
    """

    id: str
    kind: Literal["base", "state", "mixture"]
    description: str = ""
    created: int = 0
    context_len: int = 0
    supports: tuple[str, ...] = ()
    reinject: Reinject = "never"


class Backend(Protocol):
    """Where answers come from."""

    async def open(self, request: GenerateRequest) -> DeltaStream:
        """Admit a request.

        Raises:
            MRSSError: everything that can be known before the first token (a bad name, a
                prompt that is too long, a full queue) is raised here, so that a front end can
                still answer with a status.
        """
        ...

    async def models(self) -> list[ModelCard]:
        """Return the names that are served, `base` first."""
        ...

    async def aclose(self) -> None:
        """Release everything; open streams end with `EngineUnavailableError`."""
        ...
