"""Events: the same bytes whether what repeats is encoded once or every time."""

import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from mrss_provider.backend import Delta, TextPiece, TokenLogprob, Usage
from mrss_provider.openai_schema import AnswerHead, ChunkWriter, StreamOptions
from mrss_provider.server.sse import EventWriter, event

TEXTS = st.text(st.characters(exclude_categories=["Cs"]), max_size=8) | st.sampled_from(
    ["", "\0", '"\0"', '\\u0000"', "\n\n", "data: ", "é😀"]
)
DELTAS = st.lists(
    st.builds(
        Delta,
        index=st.integers(0, 2),
        text=TEXTS,
        num_tokens=st.integers(0, 3),
        logprobs=st.sampled_from([(), (), (), (TokenLogprob(5, b"x", -0.5),)]),
        finish_reason=st.sampled_from([None, None, None, "stop"]),
        usage=st.sampled_from([None, None, None, Usage(1, 2)]),
    ),
    max_size=12,
)


@pytest.mark.parametrize("kind", ["chat", "text"])
@given(deltas=DELTAS, counts=st.booleans(), as_text=st.booleans())
@example([Delta(usage=Usage(1, 2)), *[Delta(text="a", num_tokens=1)] * 3], False, False)
@example([Delta(text="a", num_tokens=1), Delta(), *[Delta(text="b", num_tokens=1)] * 3], True, True)
def test_events_are_the_chunks_encoded_one_by_one(kind, deltas, counts, as_text):
    head = AnswerHead(kind, "id-1", 1_700_000_000, 'a"b+c', "f", 2)
    options = StreamOptions(stream=True, include_usage=True, include_num_tokens=counts)
    writer = EventWriter(ChunkWriter(head, options))
    oracle = ChunkWriter(head, options)
    for delta in deltas:
        wanted = b"".join(map(event, oracle.chunks(delta)))
        piece = TextPiece(delta.index, delta.text, delta.num_tokens)
        is_text = delta == Delta(*piece) and as_text
        assert (writer.write_text(piece) if is_text else writer.write(delta)) == wanted
