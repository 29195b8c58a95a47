"""What some backends can do besides answering: embed, tokenise, save conversations, and more."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol, runtime_checkable

from mrss_provider.backend.answer import Embeddings, Tokens
from mrss_provider.backend.request import EmbedRequest, GenerateRequest


@dataclass(frozen=True)
class CacheStats:
    """What a cache of states has done since the start, and holds now.

    Attributes:
        hits: requests that began with states of the cache.
        misses: those that might have and did not.
        hit_tokens: prompt tokens that did not have to be read.
        num_entries: snapshots held.
        device_bytes: what they take on the device.
        ram_bytes: the same in memory.
        disk_bytes: the same on disk.
    """

    hits: int = 0
    misses: int = 0
    hit_tokens: int = 0
    num_entries: int = 0
    device_bytes: int = 0
    ram_bytes: int = 0
    disk_bytes: int = 0


@dataclass(frozen=True)
class EngineStats:
    """Gauges of this moment, and totals since the start.

    Attributes:
        num_waiting: requests without rows.
        num_running: requests with rows.
        num_rows: rows that are held.
        num_free_rows: rows that nobody holds.
        num_steps: steps launched.
        num_prompt_tokens: tokens read of prompts.
        num_sampled_tokens: tokens drawn.
        cache: of states, where there is one.
        device_bytes: memory of the device that is in use by us; 0 on a CPU.
        device_bytes_total: memory that the device has; 0 on a CPU.
    """

    num_waiting: int
    num_running: int
    num_rows: int
    num_free_rows: int
    num_steps: int
    num_prompt_tokens: int
    num_sampled_tokens: int
    cache: CacheStats | None = None
    device_bytes: int = 0
    device_bytes_total: int = 0


@runtime_checkable
class Observable(Protocol):
    """A backend that tells how it is doing."""

    def stats(self) -> EngineStats | None:
        """Return the numbers of this moment, without waiting; None while nothing is loaded."""
        ...


@dataclass(frozen=True)
class SessionInfo:
    """What there is to know of a saved conversation.

    Attributes:
        owner: whose it is; nobody else sees it.
        mixture: canonical name.
        num_tokens: of the conversation so far.
        num_bytes: that it takes.
        created: Unix time in seconds.
        updated: of the last answer that was saved.
    """

    id: str
    owner: str
    mixture: str
    num_tokens: int
    num_bytes: int
    created: int
    updated: int


@runtime_checkable
class TrainedGates(Protocol):
    """A backend that knows trained gates."""

    async def trained_gates(self) -> tuple[str, ...]:
        """Return their names, which the gate `learned` takes.

        Raises:
            MRSSError: the model cannot be loaded.
        """
        ...


@runtime_checkable
class Embeds(Protocol):
    """A backend that turns texts into vectors."""

    async def embed(self, request: EmbedRequest) -> Embeddings:
        """Read the inputs, as part of the engine's other work; cancelling it drops what is left.

        Raises:
            MRSSError: as `Backend.open`; also a mixture of several states.
        """
        ...


@runtime_checkable
class Tokenizes(Protocol):
    """A backend that tells what it would read, without reading it."""

    async def tokenize(self, request: GenerateRequest) -> Tokens:
        """Return the tokens of a prompt, or of a chat as `Backend.open` renders it.

        Raises:
            MRSSError: a name that is not served, or messages that the template refuses.
        """
        ...

    async def detokenize(self, token_ids: Sequence[int]) -> str:
        """Return the text of tokens; U+FFFD stands for bytes that are none.

        Raises:
            InvalidRequestError: an id outside the vocabulary.
        """
        ...


@runtime_checkable
class KeepsSessions(Protocol):
    """A backend that saves conversations: `GenerateRequest.session` goes on with one.

    A session that is not there and one of another owner are the same `NotFoundError`.
    """

    async def create_session(self, request: GenerateRequest) -> SessionInfo:
        """Read a prompt, or a chat up to where the next turn begins, and save what the rows are.

        Raises:
            MRSSError: what `Backend.open` raises, or the owner has too many sessions.
        """
        ...

    async def session(self, session_id: str, owner: str) -> SessionInfo:
        """Return one of the owner's sessions."""
        ...

    async def sessions(self, owner: str) -> list[SessionInfo]:
        """Return the owner's sessions, the oldest first."""
        ...

    async def fork_session(self, session_id: str, owner: str) -> SessionInfo:
        """Save the same conversation once more, under another id."""
        ...

    async def export_session(self, session_id: str, owner: str) -> bytes:
        """Return a session as a safetensors file with a checksum, for `import_session`."""
        ...

    async def import_session(self, data: bytes, owner: str) -> SessionInfo:
        """Save what `export_session` returned, of any owner, under a new id.

        Raises:
            StateFileError: damaged, or of another model.
            PayloadTooLargeError: more than an owner may save.
        """
        ...

    async def delete_session(self, session_id: str, owner: str) -> None:
        """Forget a session."""
        ...
