"""What the OpenAI wire refuses: each by the name of its parameter, with what is allowed."""

import pytest
from openai_bodies import CHAT, TEXT, parse, refusal

from mrss_provider import openai_schema as schema
from mrss_provider.errors import ContextLengthError, InvalidRequestError


@pytest.mark.parametrize("key", sorted(schema.CHAT_KEYS.refused))
def test_refused_chat_keys_are_named_unless_neutral(key):
    refused = refusal({**CHAT, key: ["x"]})
    assert key in str(refused)
    assert refused.param == key
    for neutral in (None, *schema.CHAT_KEYS.refused[key].neutral):
        assert parse({**CHAT, key: neutral}) == parse(CHAT)


@pytest.mark.parametrize("key", sorted(schema.COMPLETION_KEYS.refused))
def test_refused_completion_keys_are_named_unless_neutral(key):
    assert refusal({**TEXT, key: ["x"]}).param == key
    for neutral in (None, *schema.COMPLETION_KEYS.refused[key].neutral):
        assert parse({**TEXT, key: neutral}) == parse(TEXT)


@pytest.mark.parametrize(
    ("extra", "param", "words"),
    [
        ({"temprature": 1}, "temprature", "did you mean 'temperature'"),
        ({"mrss_gate": "x"}, "mrss_gate", "did you mean 'mrss.gate'"),
        ({"gate": "fixed"}, "gate", "did you mean 'mrss.gate'"),
        ({"guided_json": {}}, "guided_json", "use 'response_format'"),
        ({"foo": 1}, "foo", "leave it out"),
        ({"mrss": {"wieghts": {}}}, "mrss.wieghts", "did you mean 'mrss.weights'"),
        ({"mrss": {"trace": 1}}, "mrss.trace", "true or false"),
        ({"mrss": {"given": ["x"]}}, "mrss.given", "a text"),
        ({"mrss": {"given": ""}}, "mrss.given", "a text"),
        ({"mrss": {"given": "\ud800"}}, "mrss.given", "surrogate"),
        ({"mrss": {"given": "x"}, "n": 2}, "n", "left out with mrss.given"),
        ({"mrss": {"given": "x"}, "max_tokens": 5}, "max_tokens", "left out with mrss.given"),
        ({"mrss": {"given": "x"}, "stop": "."}, "stop", "left out with mrss.given"),
        ({"mrss": {"reinject": "always"}}, "mrss.reinject", "one of never, turn, got 'always'"),
        ({"mrss": {"merge": "mean"}}, "mrss.merge", "one of linear, geometric, product"),
        ({"mrss": {"gate": 1}}, "mrss.gate", "fixed, schedule, novelty"),
        ({"mrss": {"cut": 1.0}}, "mrss.cut", "[0, 1)"),
        ({"mrss": {"weights": {"a": 1e999}}}, "mrss.weights", "finite"),
        ({"mrss": {"sampling_order": "top"}}, "sampling_order", "'rwkv'"),
        ({"mrss": "linear"}, "mrss", "an object"),
        ({"mrss_gatingweight": ["x"]}, "mrss_gatingweight", "a number"),
        ({"mrss_gatingweight": ["nan"]}, "mrss_gatingweight", "finite"),
        ({"mrss_gatingweight": 1}, "mrss_gatingweight", "a list"),
        ({"mrss_gatingweight": [1], "mrss": {"weights": {"a": 1}}}, "mrss_gatingweight", "both"),
        ({"n": 0}, "n", "[1, 16]"),
        ({"n": True}, "n", "[1, 16]"),
        ({"n": 17}, "n", "[1, 16]"),
        ({"timeout": 0}, "timeout", "above 0"),
        ({"timeout": "5"}, "timeout", "above 0"),
        ({"timeout": 10**400}, "timeout", "above 0"),
        ({"timeout": 1.1e9}, "timeout", "above 0"),
        ({"timeout": float("nan")}, "timeout", "above 0"),
        ({"stream": 1}, "stream", "true or false"),
        ({"stream_options": {"include_usage": "yes"}}, "stream_options.include_usage", "true"),
        (
            {"stream_options": {"include_usge": True}},
            "stream_options.include_usge",
            "include_usage",
        ),
        ({"stop": [1]}, "stop", "strings"),
        ({"stop": ""}, "stop", "1 to"),
        ({"stop": 5}, "stop", "list"),
        ({"logit_bias": {"x": 1}}, "logit_bias", "token ids"),
        ({"logit_bias": {"1": 101}}, "logit_bias", "[-100, 100]"),
        ({"logit_bias": {"٣": 1}}, "logit_bias", "token ids"),
        ({"logprobs": 1}, "logprobs", "true or false"),
        ({"top_logprobs": 3}, "top_logprobs", "logprobs"),
        ({"max_tokens": 5, "max_completion_tokens": 6}, "max_completion_tokens", "equal"),
        ({"max_completion_tokens": 0}, "max_completion_tokens", "integer in [1"),
        ({"max_tokens": 2**31}, "max_tokens", "[1, 2147483647], got 2147483648"),
        ({"temperature": float("inf")}, "temperature", "[0, 100]"),
        ({"temperature": "1"}, "temperature", "[0, 100]"),
        ({"params": 5}, "params", "an object"),
        ({"model": ""}, "model", "1 to"),
        ({"model": None}, "model", "got nothing"),
        ({"model": "x" * 2000}, "model", "1 to"),
        ({"messages": []}, "messages", "1 to"),
        ({"messages": "hi"}, "messages", "a list"),
        ({"messages": [5]}, "messages[0]", "an object"),
        ({"messages": [{"role": "tool", "content": "x"}]}, "messages[0].tool_call_id", "the id"),
        ({"messages": [{"role": "function", "content": "x"}]}, "messages[0]", "tool_call_id"),
        ({"messages": [{"role": "critic", "content": "x"}]}, "messages[0]", "one of system"),
        ({"messages": [{"role": [], "content": "x"}]}, "messages[0]", "one of system"),
        ({"messages": [{"role": "user"}]}, "messages[0].content", "a string"),
        ({"messages": [{"role": "user", "content": "\ud800"}]}, "messages[0].content", "surrogate"),
        (
            {"messages": [{"role": "user", "content": [{"type": "image_url"}]}]},
            "messages[0].content[0]",
            "only text",
        ),
        (
            {"messages": [{"role": "assistant", "content": "", "tool_calls": [{}]}]},
            "messages[0].tool_calls[0].function",
            "an object",
        ),
        ({"messages": [{"role": "user", "content": "", "x": 1}]}, "messages[0].x", "no parameter"),
    ],
)
def test_a_bad_chat_is_refused_by_name(extra, param, words):
    refused = refusal({**CHAT, **extra})
    assert refused.param == param
    assert words in str(refused)
    assert refused.status_code == 400


@pytest.mark.parametrize(
    ("extra", "param", "words"),
    [
        ({"prompt": []}, "prompt", "1 to"),
        ({"prompt": None}, "prompt", "text, token ids"),
        ({"prompt": [[]]}, "prompt", "empty list"),
        ({"prompt": [1, -2]}, "prompt", ">= 0"),
        ({"prompt": [[1, True]]}, "prompt", ">= 0"),
        ({"prompt": [1, "x"]}, "prompt", "prompt: a token id is an integer >= 0, got 'x'"),
        ({"prompt": [1.0, 2.0]}, "prompt", "prompt: a token id is an integer >= 0, got 1.0"),
        ({"prompt": [True, 2]}, "prompt", "prompt: a token id is an integer >= 0, got True"),
        ({"prompt": [-(10**5000)]}, "prompt", "got an integer of thousands of digits"),
        ({"logit_bias": {10**5000: 1}}, "logit_bias", "got an integer of thousands of digits"),
        ({"logit_bias": {"1": 5, "01": 3}}, "logit_bias", "has token 1 twice"),
        ({"prompt": [[1], [2, -3]]}, "prompt", "prompt[1]: a token id is an integer >= 0"),
        ({"prompt": ["x", 1]}, "prompt[1]", "a list of token ids"),
        ({"prompt": ["x"] * 129}, "prompt", "1 to 128"),
        ({"best_of": 1, "n": 2}, "best_of", "[n, 16]"),
        ({"best_of": 17}, "best_of", "[n, 16]"),
        ({"best_of": 2, "stream": True}, "best_of", "streamed"),
        ({"best_of": 2, "mrss": {"session": "s"}}, "best_of", "one answer"),
        ({"echo": 1}, "echo", "true or false"),
        ({"echo": True, "mrss": {"given": "x"}}, "mrss.given", "echo"),
        ({"echo": True, "mrss": {"session": "s"}}, "mrss.session", "echo"),
        ({"max_tokens": 0}, "max_tokens", "integer in [1"),
        ({"suffix": "x"}, "suffix", "only writes forward"),
        ({"logprobs": True}, "logprobs", "[0, 20]"),
        ({"logprobs": 21}, "logprobs", "[0, 20]"),
        ({"max_completion_tokens": 5}, "max_completion_tokens", "max_tokens"),
    ],
)
def test_a_bad_completion_is_refused_by_name(extra, param, words):
    refused = refusal({**TEXT, **extra})
    assert refused.param == param
    assert words in str(refused)


@pytest.mark.parametrize("body", [None, [], "x", 5])
def test_a_body_that_is_no_object_is_refused(body):
    for parse_body in (schema.parse_chat_request, schema.parse_completion_request):
        with pytest.raises(InvalidRequestError, match="JSON object"):
            parse_body(body)


def test_too_many_characters_are_a_context_error():
    long = "x" * (schema.MAX_CHARS // 2 + 1)
    for body in (
        {**CHAT, "messages": [{"role": "user", "content": long}] * 2},
        {**TEXT, "prompt": [long, long]},
    ):
        with pytest.raises(ContextLengthError, match="in all"):
            parse(body)
