"""An answer's text: however many tokens are read at a time, nothing else comes of them."""

from dataclasses import replace

from hypothesis import given
from hypothesis import strategies as st
from script_engine import TOKENS, Library

from mrss_provider.async_engine.choice import Choice
from mrss_provider.engine.request import EOS_ID, EngineRequest, TokenOutput
from mrss_provider.sampling_params import SamplingParams

REQUEST = EngineRequest("r0", (1,), Library().resolve("tone", None), SamplingParams())
PIECES = st.sampled_from([*TOKENS.ids("Hello", "\n\nUs", "er", "!"), 1 + 0xF0, 1 + 0x9F, 1 + 0x98])
STOPS = st.lists(st.sampled_from(["\n\nUser", "!", "rH", "o\n", "!!"]), max_size=2)


def read(outputs, stops, lead, pauses, *, logprobs=False):
    """Return the answer's text, tokens, and end, read after the tokens numbered in `pauses`."""
    request = replace(REQUEST, sampling=SamplingParams(logprobs=logprobs))
    choice = Choice(request, 0, TOKENS, stops, lead)
    texts = []
    for n, output in enumerate(outputs):
        if choice.finish_reason is not None:
            break
        choice.add(output)
        if n in pauses or output.finish_reason is not None:
            choice.read()
            texts.append(choice.take().text)
    return "".join(texts), choice.num_tokens, choice.finish_reason


@given(
    ids=st.lists(PIECES, min_size=1, max_size=24),
    stops=STOPS,
    lead=st.sampled_from(["", " ", "H"]),
    pauses=st.sets(st.integers(0, 24)),
    end=st.sampled_from(["stop", "length"]),
)
def test_reading_together_is_reading_one_by_one(ids, stops, lead, pauses, end):
    outputs = [TokenOutput("r0", 0, token_id) for token_id in ids]
    last = EOS_ID if end == "stop" else ids[-1]
    outputs.append(TokenOutput("r0", 0, last, finish_reason=end))
    one_by_one = read(outputs, stops, lead, range(99))
    assert read(outputs, stops, lead, pauses) == one_by_one
    # With log-probabilities wanted each token is read alone, whatever waits.
    assert read(outputs, stops, lead, pauses, logprobs=True) == one_by_one
