"""How long a prompt and its answer may be, for this caller."""

from __future__ import annotations

from mrss_provider.backend import GenerateRequest
from mrss_provider.errors import ContextLengthError, InvalidRequestError
from mrss_provider.sampling_params import SamplingParams


def room_for(request: GenerateRequest, prompt_len: int, max_context_len: int) -> int:
    """Return the most tokens that an answer may have which does not say how many it wants."""
    # An empty prompt is read as the one token that a text begins with.
    room = max_context_len - max(1, prompt_len)
    return min(room, request.max_answer_len) if request.max_answer_len else room


def check_lengths(request: GenerateRequest, prompt_len: int, sampling: SamplingParams) -> None:
    """Return if the caller may ask for so much.

    Raises:
        ContextLengthError: the prompt is too long.
        InvalidRequestError: the answer would be.
    """
    longest = request.max_prompt_len
    if longest and prompt_len > longest:
        raise ContextLengthError(
            f"a prompt may have {longest} tokens here, got {prompt_len}; send less"
        )
    most = request.max_answer_len
    assert sampling.max_tokens is not None
    if most and sampling.max_tokens > most:
        raise InvalidRequestError(
            f"max_tokens may be {most} here, got {sampling.max_tokens}", param="max_tokens"
        )
