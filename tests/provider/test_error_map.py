"""The error table against errors.py's tree, and what an unmapped exception becomes."""

import asyncio

import litellm
import pytest

from mrss_provider import errors
from mrss_provider.errors import MRSSError, QueueFullError
from mrss_provider.provider.error_map import TABLE, to_litellm

# The classes that make LiteLLM's router cool a deployment down at once, for every caller.
COOLING = (litellm.NotFoundError, litellm.AuthenticationError)


def tree(cls=MRSSError):
    return [cls, *(found for child in cls.__subclasses__() for found in tree(child))]


def ours():
    return [cls for cls in tree() if cls.__module__ == "mrss_provider.errors"]


@pytest.mark.parametrize("cls", ours(), ids=lambda cls: cls.__name__)
def test_every_error_has_a_row_of_its_own_and_maps(cls):
    assert cls in TABLE, f"{cls.__name__} has no row in error_map.TABLE"
    mapped = to_litellm(cls("what went wrong"), "mrss/base")
    assert type(mapped) is TABLE[cls]
    assert "what went wrong" in str(mapped)
    assert (mapped.llm_provider, mapped.model) == ("mrss", "mrss/base")
    assert mapped.code == cls.code


@pytest.mark.parametrize("cls", ours(), ids=lambda cls: cls.__name__)
def test_status_is_ours_unless_the_operator_is_to_blame(cls):
    mapped = to_litellm(cls("x"), "mrss/base")
    if issubclass(cls, errors.FileFormatError | errors.ConfigError | errors.StorageError):
        assert mapped.status_code == 500
    elif cls in (errors.NotFoundError, errors.ConflictError, errors.PayloadTooLargeError):
        assert mapped.status_code == 400
    else:
        assert mapped.status_code == cls.status_code


def test_no_mistake_of_a_caller_cools_a_deployment_down():
    mistakes = errors.InvalidRequestError | errors.NotFoundError | errors.ConflictError
    for cls in ours():
        if issubclass(cls, mistakes):
            assert not issubclass(TABLE[cls], COOLING)


def test_param_and_code_reach_the_openai_error_object():
    error = errors.UnknownNameError("unknown state 'ton'", position=0, suggestions=("tone",))
    mapped = to_litellm(error, "mrss/ton")
    assert (mapped.param, mapped.code, mapped.type) == (
        "model",
        "model_not_found",
        "invalid_request_error",
    )


@pytest.mark.parametrize(("hint_s", "header"), [(0.2, "1"), (1.0, "1"), (2.5, "3")])
def test_full_queue_tells_when_to_come_back(hint_s, header):
    mapped = to_litellm(QueueFullError("full", retry_after_s=hint_s), "mrss/base")
    assert mapped.response.headers["retry-after"] == header


def test_defect_gives_an_id_and_keeps_the_traceback_in_the_log(caplog):
    try:
        raise ZeroDivisionError("secret path /home/x")
    except ZeroDivisionError as exc:
        mapped = to_litellm(exc, "mrss/base")
    assert isinstance(mapped, litellm.InternalServerError)
    (record,) = caplog.records
    error_id = record.args[0]
    assert len(error_id) == 12
    assert error_id in str(mapped)
    assert "secret" not in str(mapped)
    assert "Traceback" not in str(mapped)
    assert "secret path" in caplog.text


def test_litellms_own_exceptions_pass_through():
    error = litellm.BadRequestError("x", model="m", llm_provider="mrss")
    assert to_litellm(error, "mrss/base") is error


def test_a_router_goes_on_after_a_session_that_is_not_there(provider, backend):
    router = litellm.Router(
        model_list=[{"model_name": "mrss/tone", "litellm_params": {"model": "mrss/tone"}}],
        num_retries=0,
    )
    call = {"model": "mrss/tone", "messages": [{"role": "user", "content": "Hi"}]}

    async def main():
        backend.open_error = errors.NotFoundError("there is no session 'gone'", param="session")
        with pytest.raises(Exception, match="no session 'gone'"):
            await router.acompletion(**call)
        backend.open_error = None
        return await router.acompletion(**call)

    assert asyncio.run(main()).choices[0].message.content
