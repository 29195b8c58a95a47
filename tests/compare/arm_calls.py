"""Calls of a weighted group's two arms, as the proxy's log has them."""

import json

from mrss_provider.compare.log_callback import line_of

PAYLOAD = {
    "id": "chatcmpl-1",
    "litellm_call_id": "call-1",
    "model_group": "pirate",
    "model_id": "arm-a",
    "model": "mrss/tone",
    "stream": True,
    "cache_hit": None,
    "startTime": 10.0,
    "completionStartTime": 10.25,
    "endTime": 11.5,
    "prompt_tokens": 3,
    "completion_tokens": 5,
    "response_cost": 0.5,
    "status": "success",
    "error_information": {},
    "messages": [{"role": "user", "content": "a secret"}],
    "response": "another secret",
}
FAILED = {
    **PAYLOAD,
    "status": "failure",
    "error_information": {"error_class": "RateLimitError", "error_code": "429"},
}


def call(i, arm, *, ttft_s=0.2, failed=False, **fields):
    payload = {
        **(FAILED if failed else PAYLOAD),
        "id": f"answer-{i}",
        "litellm_call_id": f"call-{i}",
        "model_id": arm,
        "model": f"mrss/{arm}-model",
        "completionStartTime": 10.0 + ttft_s,
        "endTime": 10.5 + ttft_s,
        **fields,
    }
    return line_of(payload)


def write(path, lines):
    path.write_text("".join(json.dumps(line) + "\n" for line in lines))
    return path


def traffic(rng, num_calls, *, slower=1.0, error_rates=(0.02, 0.02)):
    """Yield calls of two arms, as a proxy deals them out."""
    for i in range(num_calls):
        which = int(rng.random() < 0.5)
        ttft_s = 0.2 * rng.lognormal(0.0, 0.5) * (slower if which else 1.0)
        yield call(
            i, ("arm-a", "arm-b")[which], ttft_s=ttft_s, failed=rng.random() < error_rates[which]
        )
