"""A request, and what its answer was, for the tests of the client."""

from mrss_provider.backend import GenerateRequest, Message, MixtureOptions
from mrss_provider.sampling_params import SamplingParams

REQUEST = GenerateRequest(
    "knowledge+tone",
    SamplingParams(temperature=0.5, stop=("\n",), seed=3, max_tokens=9),
    messages=(Message("user", "héllo 😀"),),
    mixture=MixtureOptions(weights={"tone": 0.25}, merge="linear"),
    timeout_s=30.0,
)


async def collect(client, request=REQUEST):
    stream = await client.open(request)
    try:
        return stream.info, [delta async for delta in stream]
    finally:
        await stream.aclose()


def joined(deltas, index=0):
    return "".join(delta.text for delta in deltas if delta.index == index)
