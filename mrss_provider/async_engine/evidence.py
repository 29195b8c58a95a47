"""Evidence: which tokens of a prompt the user wrote, for gates that read them.

Nothing here changes a prompt: spans of characters are laid over the tokens that it has anyway.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence

from mrss_provider.backend import GenerateRequest
from mrss_provider.chat import ChatTemplate, PromptText, told_tools, user_spans
from mrss_provider.engine.request import MAX_EVIDENCE, ResolvedMixture
from mrss_provider.tokenizer import Tokenizer


def reads_prompt(mixture: ResolvedMixture) -> bool:
    """Tell whether the mixture's gate wants the user's text scored."""
    # The caller's model is loaded, and torch with it; whoever only listens needs neither.
    from mrss_provider.engine.gates import gate_of

    return gate_of(mixture).reads_prompt


def find_evidence(
    request: GenerateRequest,
    text: PromptText | None,
    token_ids: Sequence[int],
    template: ChatTemplate,
    tokenizer: Tokenizer,
) -> tuple[range, ...]:
    """Return where the last `MAX_EVIDENCE` tokens of the user's are in a prompt.

    Args:
        request: whose `messages` say what the user wrote; without them all of the prompt is.
        text: of the prompt, where `token_ids` were made of one.
        token_ids: of the prompt.
        template: which the messages were rendered with.
        tokenizer: which made `token_ids`.
    """
    if request.messages is None or text is None:
        return last_positions([range(len(token_ids))])
    spans = text.user_spans
    if spans is None:
        tools = told_tools(request)
        spans = user_spans(request.messages, template, text.text, tools, request.thinking)
    return last_positions(token_spans(spans, text.text, token_ids, tokenizer))


def user_turn(request: GenerateRequest) -> int:
    """Return how many turns the user has had; a prompt without messages is one."""
    roles = [message.role for message in request.messages or ()]
    return max(1, roles.count("user"))


def token_spans(
    spans: Sequence[range], text: str, token_ids: Sequence[int], tokenizer: Tokenizer
) -> tuple[range, ...]:
    """Return the positions of the tokens that hold at least one character of `spans`.

    Args:
        spans: of characters of `text`, in order, none empty.
        text: what `token_ids` encode.
        token_ids: of the prompt.
        tokenizer: which made them.

    Returns:
        Spans of positions in `token_ids`; none where the tokens' bytes are not the text's, because
        the vocabulary writes it differently.
    """
    if not spans or tokenizer.decode_bytes(token_ids) != text.encode():
        return ()
    lengths = [len(tokenizer.token_bytes(token_id) or b"") for token_id in token_ids]
    found: list[range] = []
    token, token_end = 0, 0  # Tokens before `token` end at byte `token_end`.
    char, byte = 0, 0
    for span in spans:
        first_byte = byte + len(text[char : span.start].encode())
        last_byte = first_byte + len(text[span.start : span.stop].encode())
        while token_end + lengths[token] <= first_byte:
            token_end += lengths[token]
            token += 1
        start = token
        while token_end + lengths[token] < last_byte:
            token_end += lengths[token]
            token += 1
        found.append(range(start, token + 1))
        char, byte = span.stop, last_byte
    return _joined(found)


def last_positions(spans: Iterable[range], most: int = MAX_EVIDENCE) -> tuple[range, ...]:
    """Return the last `most` positions of `spans`, which are in order."""
    kept: list[range] = []
    for span in reversed(list(spans)):
        part = span[max(0, len(span) - most) :]
        if part:
            kept.append(part)
        most -= len(part)
    return tuple(reversed(kept))


def _joined(spans: Sequence[range]) -> tuple[range, ...]:
    """Return `spans` with those joined that share a token."""
    joined: list[range] = []
    for span in spans:
        if joined and span.start < joined[-1].stop:
            span = range(joined.pop().start, span.stop)
        joined.append(span)
    return tuple(joined)
