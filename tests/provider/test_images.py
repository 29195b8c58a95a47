"""What makes or changes images is refused as a mistake of the caller's, and cools nothing down."""

import asyncio
import io

import litellm
import pytest

CALLS = {
    "generation": (litellm.image_generation, litellm.aimage_generation, {}),
    "edit": (litellm.image_edit, litellm.aimage_edit, {"image": io.BytesIO(b"png")}),
}


@pytest.mark.usefixtures("provider")
@pytest.mark.parametrize("kind", CALLS)
@pytest.mark.parametrize("is_async", [True, False])
def test_an_image_is_refused_by_a_400_that_says_why(kind, is_async):
    plain, coroutine, more = CALLS[kind]
    call = {"model": "mrss/tone", "prompt": "A lighthouse", **more}
    with pytest.raises(litellm.BadRequestError, match="make no images") as caught:
        asyncio.run(coroutine(**call)) if is_async else plain(**call)
    assert caught.value.status_code == 400
