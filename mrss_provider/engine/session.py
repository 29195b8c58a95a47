"""Session: a saved conversation, and its one form in bytes.

It is what an answer can go on from: the rows' states, the tokens, and the seed of the answer's
random numbers, whose position follows from the tokens.
"""

from __future__ import annotations

import itertools
import json
import secrets
import time
from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, cast, get_args

import numpy as np
import torch
from numpy.typing import NDArray

from mrss_provider.backend import Message, Role, SessionInfo
from mrss_provider.engine.prompt_lookup import state_key
from mrss_provider.engine.request import MAX_EVIDENCE, ResolvedMixture
from mrss_provider.errors import StateFileError
from mrss_provider.model.packed_tensors import Buffer
from mrss_provider.model.snapshot_file import SnapshotBlob, load_snapshots, pack_snapshots
from mrss_provider.model.state import StateSnapshot

if TYPE_CHECKING:
    from mrss_provider.model import ModelConfig

SESSION_KEY = "x.session"
"""Where a file's header says what the session is."""


@dataclass(frozen=True, eq=False)
class Session:
    """A conversation between two steps.

    Attributes:
        info: whose it is, and its id. `num_bytes` counts once it is stored.
        states: what the rows' states contain, as `states_of` tells it.
        tokens: all of it: what was asked and answered.
        num_prompt: tokens before the last answer; an answer after them can go on.
        num_read: tokens that the rows have read: fewer than there are.
        rows: one a row of the mixture, on the CPU; none if nothing was read.
        seed: of the last answer.
        turn: of the user's.
        messages: of a chat, with its last answer; None of a plain text.
        evidence: log-probabilities [T, K] that the rows gave to what a gate has read.
        reinjections: before which of `tokens` the rows were given their tuned states anew, or will
            be when they read on.
    """

    info: SessionInfo
    states: tuple[str, ...]
    tokens: tuple[int, ...]
    num_prompt: int
    num_read: int
    rows: tuple[StateSnapshot, ...]
    seed: int
    turn: int
    messages: tuple[Message, ...] | None
    evidence: NDArray[np.float32] | None = None
    reinjections: tuple[int, ...] = ()

    @property
    def answer(self) -> tuple[int, ...]:
        """The last answer's tokens."""
        return self.tokens[self.num_prompt :]

    def to_bytes(self, config: ModelConfig) -> bytes:
        """Return the session as a file of `config`'s model."""
        return bytes(self.pack(config))

    def pack(self, config: ModelConfig) -> memoryview:
        """Do as `to_bytes`; other threads of Python run meanwhile."""
        fields = {
            "id": self.info.id,
            "owner": self.info.owner,
            "mixture": self.info.mixture,
            "created": self.info.created,
            "updated": self.info.updated,
            "num_tokens": len(self.tokens),
            "states": self.states,
            "num_prompt": self.num_prompt,
            "num_read": self.num_read,
            "seed": self.seed,
            "turn": self.turn,
            "reinjections": self.reinjections,
            "messages": self.messages and [(m.role, m.content) for m in self.messages],
        }
        extra = {} if self.evidence is None else {"evidence": torch.from_numpy(self.evidence)}
        tokens = torch.tensor(self.tokens, dtype=torch.int32)
        blob = SnapshotBlob(self.rows, tokens, {"session": json.dumps(fields)}, extra)
        return pack_snapshots(blob, config)

    @classmethod
    def from_bytes(cls, data: Buffer, config: ModelConfig, state_dtype: torch.dtype) -> Session:
        """Read `to_bytes`, and check all of it.

        Raises:
            StateFileError: damaged, no session, or of another model.
        """
        blob = load_snapshots(data, config, state_dtype)
        tokens = tuple(blob.tokens.tolist())
        try:
            fields = json.loads(blob.strings["session"])
            messages = fields["messages"]
            if messages is not None:
                messages = tuple(Message(_role(role), str(content)) for role, content in messages)
            session = cls(
                info_of(fields, len(data)),
                tuple(map(str, fields["states"])),
                tokens,
                int(fields["num_prompt"]),
                int(fields["num_read"]),
                blob.rows,
                int(fields["seed"]),
                int(fields["turn"]),
                messages,
                # A file without the field is of rows that began once.
                reinjections=tuple(map(int, fields.get("reinjections", ()))),
            )
        except (KeyError, TypeError, ValueError, OverflowError, RecursionError) as exc:
            raise StateFileError(f"the file is no session: {exc!r}") from exc
        return replace(session, evidence=_evidence(blob, session))


def new_info(owner: str, mixture: str, num_tokens: int) -> SessionInfo:
    """Return the beginning of a session under a new id."""
    now = int(time.time())
    return SessionInfo(f"ses_{secrets.token_hex(12)}", owner, mixture, num_tokens, 0, now, now)


def states_of(mixture: ResolvedMixture) -> tuple[str, ...]:
    """Return what identifies the content of a mixture's rows."""
    return tuple(state_key(state, reads_bos=False) for state in mixture.states)


def info_of(fields: Mapping[str, object], num_bytes: int) -> SessionInfo:
    """Return what a session file of so many bytes says of itself."""
    return SessionInfo(
        str(fields["id"]),
        str(fields["owner"]),
        str(fields["mixture"]),
        int(str(fields["num_tokens"])),
        num_bytes,
        int(str(fields["created"])),
        int(str(fields["updated"])),
    )


def _role(text: str) -> Role:
    if text not in get_args(Role):
        raise ValueError(f"{text!r} is no role")
    return cast(Role, text)


def _are_turns(session: Session) -> bool:
    """Tell whether there may be reinjections where a session has them: at turns, beside a base."""
    positions = session.reinjections
    turns = [message for message in session.messages or () if message.role == "user"]
    has_base = state_key(None, reads_bos=False) in session.states
    return not positions or (
        has_base
        and len(positions) < len(turns)
        and all(0 < a < b for a, b in itertools.pairwise((*positions, len(session.tokens))))
    )


def _evidence(blob: SnapshotBlob, session: Session) -> NDArray[np.float32] | None:
    """Return the evidence of a blob, and check what the session says of itself.

    Raises:
        StateFileError: numbers that do not go together.
    """
    num_rows, num_tokens = len(session.rows), len(session.tokens)
    is_whole = (
        num_rows == (len(session.states) if session.num_read else 0)
        and 0 <= session.num_read < num_tokens
        and 0 < session.num_prompt <= num_tokens
        and 0 <= session.seed < 1 << 64
        and session.turn > 0
        and _are_turns(session)
    )
    evidence = blob.extra.get("evidence")
    if evidence is not None:
        shape = tuple(evidence.shape)
        is_whole &= evidence.dtype == torch.float32 and len(shape) == 2
        is_whole = is_whole and shape[1] == len(session.states) and shape[0] <= MAX_EVIDENCE
        # Logarithms of probabilities, but for rounding; NaN compares as false.
        is_whole = is_whole and bool((evidence < 1e-3).all())
    if not is_whole:
        raise StateFileError("the file is no session: its numbers do not go together")
    return None if evidence is None else evidence.numpy()
