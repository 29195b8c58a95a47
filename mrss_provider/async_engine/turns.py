"""Turns: before which tokens of a prompt its rows are given their tuned states anew."""

from __future__ import annotations

import asyncio
from collections.abc import Sequence

from mrss_provider.async_engine.loading import Loaded
from mrss_provider.async_engine.prompting import MAX_INLINE_CHARS
from mrss_provider.backend import GenerateRequest
from mrss_provider.chat import ChatTemplate, PromptText, told_tools, turn_starts, user_spans
from mrss_provider.engine.request import ResolvedMixture
from mrss_provider.errors import InvalidRequestError
from mrss_provider.tokenizer import Tokenizer


async def reinjections_of(
    request: GenerateRequest,
    text: PromptText | None,
    prompt: Sequence[int],
    mixture: ResolvedMixture,
    loaded: Loaded,
) -> tuple[ResolvedMixture, tuple[int, ...]]:
    """Return the positions of a prompt where turns of the user's begin, but for the first.

    There are none without a mixture that wants them.

    Args:
        request: whose messages say where turns are. A prompt is one turn, whatever is in it.
        text: that the messages were rendered to; None where no token of them is new.
        prompt: the tokens of `text`, or of a beginning of it.
        mixture: of the request.
        loaded: the model.

    Returns:
        The mixture as it is served, and the positions. Where nobody asked for turns and there are
        none, or they cannot be found, it is the one without `reinject`.

    Raises:
        InvalidRequestError: turns are asked for where there are none, or cannot be found.
    """
    if mixture.reinject == "never":
        return mixture, ()
    messages = request.messages
    if messages is None:
        if request.mixture.reinject is not None:
            raise InvalidRequestError(
                "mrss.reinject 'turn' is for chats: a prompt has no turns; leave it out, or send "
                "messages",
                param="mrss.reinject",
            )
        return mixture.without_reinject or mixture, ()
    if text is None or sum(message.role == "user" for message in messages) < 2:
        return mixture, ()
    arguments = (request, text, prompt, loaded.template, loaded.tokenizer)
    try:
        if len(text.text) <= MAX_INLINE_CHARS:
            return mixture, find_turns(*arguments)
        return mixture, await asyncio.to_thread(find_turns, *arguments)
    except InvalidRequestError as exc:
        if mixture.without_reinject is None:
            raise
        loaded.tell_of_hidden_turns(exc)
        return mixture.without_reinject, ()


def find_turns(
    request: GenerateRequest,
    text: PromptText,
    prompt: Sequence[int],
    template: ChatTemplate,
    tokenizer: Tokenizer,
) -> tuple[int, ...]:
    """Return the first token of each turn of the user's but the first; as `reinjections_of`.

    A token that has the end of the turn before in it as well counts to that one.
    """
    messages, spans, data = request.messages, text.user_spans, text.text.encode()
    assert messages is not None
    if spans is None:
        spans = user_spans(messages, template, text.text, told_tools(request), request.thinking)
    starts = turn_starts(messages, template, text.text, spans)
    written, begins = tokenizer.byte_starts(prompt)
    if not data.startswith(written):
        raise InvalidRequestError(
            "mrss.reinject 'turn' is refused: the model's vocabulary writes this chat differently, "
            "so that its turns cannot be found; leave it out",
            param="mrss.reinject",
        )
    places = begins.searchsorted(_byte_places(text.text, len(data), starts[1:])).tolist()
    return tuple(dict.fromkeys(place for place in places if place < len(prompt)))


def _byte_places(text: str, num_bytes: int, places: Sequence[int]) -> list[int]:
    """Return how many bytes of UTF-8 come before each of `places`, which are ascending.

    Args:
        text: that the places are in.
        num_bytes: of all of it.
        places: numbers of characters.
    """
    if num_bytes == len(text):
        return list(places)
    found = []
    char = byte = 0
    for place in places:
        byte += len(text[char:place].encode())
        char = place
        found.append(byte)
    return found
