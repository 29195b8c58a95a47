"""Chats: text, sampling, log-probabilities."""

from __future__ import annotations

from conformance.feature import DRAWN, GREEDY, HI, Ask, feature


@feature("chat", "Chat", short=True)
def chat(ask: Ask) -> None:
    reply = ask.chat(messages=HI, **GREEDY)
    assert reply.text
    assert reply.choices[0].finish in ("stop", "length")
    assert 0 < reply.usage["completion_tokens"] <= GREEDY["max_tokens"]
    assert reply.usage["prompt_tokens"] > 5


@feature("stream", "Chat", "stream", short=True)
def stream(ask: Ask) -> None:
    reply = ask.stream(messages=HI, **GREEDY)
    assert reply.num_chunks > 1
    assert reply.text == ask.chat(messages=HI, **GREEDY).text


@feature("usage of a stream", "Chat", "stream", short=True)
def stream_usage(ask: Ask) -> None:
    streamed = ask.stream(messages=HI, stream_options={"include_usage": True}, **GREEDY)
    whole = ask.chat(messages=HI, **GREEDY)
    for key in ("prompt_tokens", "completion_tokens"):
        assert streamed.usage[key] == whole.usage[key]


@feature("`n`", "Chat", short=True)
def several(ask: Ask) -> None:
    reply = ask.chat(messages=HI, n=3, **DRAWN)
    assert len({choice.text for choice in reply.choices}) > 1
    assert len(reply.choices) == 3


@feature("`n`, streamed", "Chat", "stream")
def several_streamed(ask: Ask) -> None:
    streamed = ask.stream(messages=HI, n=3, **DRAWN)
    whole = ask.chat(messages=HI, n=3, **DRAWN)
    assert [c.text for c in streamed.choices] == [c.text for c in whole.choices]
    assert [c.finish for c in streamed.choices] == [c.finish for c in whole.choices]


@feature("`seed`", "Chat", short=True)
def seed(ask: Ask) -> None:
    texts = [ask.chat(messages=HI, **{**DRAWN, "seed": number}).text for number in (3, 3, 4)]
    assert texts[0] == texts[1] != texts[2]


@feature("`system_fingerprint`", "Chat")
def fingerprint(ask: Ask) -> None:
    tone, base = (ask.chat(messages=HI, model=name, **GREEDY) for name in ("tone", "base"))
    assert tone.fingerprint
    assert tone.fingerprint != base.fingerprint


@feature("`stop`", "Chat", short=True)
def stop(ask: Ask) -> None:
    whole = ask.chat(messages=HI, **GREEDY).text
    mark = whole[len(whole) // 2 :][:3]
    reply = ask.chat(messages=HI, stop=[mark], **GREEDY)
    assert reply.text == whole[: whole.index(mark)]
    assert reply.choices[0].finish == "stop"


@feature("`max_tokens`", "Chat")
def max_tokens(ask: Ask) -> None:
    reply = ask.chat(messages=HI, temperature=0.0, max_tokens=3)
    assert reply.usage["completion_tokens"] == 3
    assert reply.choices[0].finish == "length"


@feature("`logprobs`", "Chat", short=True)
def logprobs(ask: Ask) -> None:
    reply = ask.chat(messages=HI, logprobs=True, **GREEDY)
    entries = reply.choices[0].logprobs
    assert len(entries) == reply.usage["completion_tokens"]
    assert "".join(entry["token"] for entry in entries).strip().startswith(reply.text)
    assert all(entry["logprob"] <= 0 for entry in entries)


@feature("`top_logprobs`", "Chat")
def top_logprobs(ask: Ask) -> None:
    reply = ask.chat(messages=HI, logprobs=True, top_logprobs=3, **GREEDY)
    for entry in reply.choices[0].logprobs:
        tops = [top["logprob"] for top in entry["top_logprobs"]]
        assert len(tops) == 3
        assert tops == sorted(tops, reverse=True)
        assert entry["logprob"] == tops[0]


@feature("`logprobs`, streamed", "Chat", "stream")
def streamed_logprobs(ask: Ask) -> None:
    streamed = ask.stream(messages=HI, logprobs=True, **GREEDY)
    whole = ask.chat(messages=HI, logprobs=True, **GREEDY)
    told = [
        [(entry["token"], entry["logprob"]) for entry in reply.choices[0].logprobs]
        for reply in (streamed, whole)
    ]
    assert told[0] == told[1]


@feature("`mrss` and `top_k` in `extra_body`", "Chat")
def extensions(ask: Ask) -> None:
    asked = {"messages": HI, "model": "knowledge+tone", **DRAWN}
    alone = ask.chat(**{**asked, "model": "tone"}, extra_body={"top_k": 1}).text
    weighted = {"weights": {"knowledge": 0.0, "tone": 1.0}, "merge": "linear", "gate": "fixed"}
    assert ask.chat(**asked, extra_body={"top_k": 1, "mrss": weighted}).text == alone
