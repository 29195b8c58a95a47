"""The constraint of a request's answers: its grammar, from where the answer begins."""

from __future__ import annotations

from typing import TYPE_CHECKING

from mrss_provider.async_engine.loading import Loaded
from mrss_provider.async_engine.resumption import Resumption
from mrss_provider.backend import GenerateRequest

if TYPE_CHECKING:
    from mrss_provider.engine.constraint import Constraint


async def constraint_for(
    request: GenerateRequest, loaded: Loaded, going: Resumption | None, lead: str
) -> Constraint | None:
    """Return what the answers conform to; None where anything may be said.

    Compiles on a thread of its own what was not asked for lately. Where an answer is gone on with,
    what there is of it is the beginning of what the grammar describes.

    Args:
        request: as it is answered.
        loaded: the model.
        going: the session that it goes on with.
        lead: what the model may write before an answer.

    Raises:
        InvalidRequestError: the grammar cannot be honoured, or does not allow the beginning.
        QueueFullError: others' grammars are being compiled.
    """
    if request.grammar is None:
        return None
    answered: tuple[int, ...] = ()
    if going is not None and going.start is not None:
        answered = going.start.answer
    before = ""
    if answered:
        # Its first token has brought the lead, if any.
        written = loaded.tokenizer.decode_bytes(answered)
        own = loaded.template.lead
        lead = own if written.startswith(own.encode()) else ""
    elif request.messages and request.messages[-1].role == "assistant":
        before = request.messages[-1].content
    return await loaded.grammars.begin(
        request.grammar,
        lead=lead,
        before=before,
        answered=answered,
        stops=loaded.template.stop,
    )
