"""The smallest bodies of OpenAI's routes, and how a body is parsed and refused."""

import pytest
from hypothesis import strategies as st

from mrss_provider import openai_schema as schema
from mrss_provider.errors import InvalidRequestError

CHAT = {"model": "tone", "messages": [{"role": "user", "content": "hi"}]}
TEXT = {"model": "tone", "prompt": "hi"}

texts = st.text(st.characters(exclude_categories=["Cs"]), max_size=20)


def parse(body):
    """Parse as the route of the body's kind does."""
    if "messages" in body:
        return schema.parse_chat_request(body)
    return schema.parse_completion_request(body)


def refusal(body) -> InvalidRequestError:
    with pytest.raises(InvalidRequestError) as caught:
        parse(body)
    return caught.value
