"""One place for what every test needs: no network, few threads, none of the user's settings."""

import gc
import os
import signal
import sys
from collections.abc import Generator

import pytest

# Before torch, litellm or huggingface_hub are imported: they read these once.
for _name in [name for name in os.environ if name.startswith("MRSS_")]:
    del os.environ[_name]
os.environ |= {
    "OMP_NUM_THREADS": "1",
    "MKL_NUM_THREADS": "1",
    "TOKENIZERS_PARALLELISM": "false",
    "LITELLM_LOCAL_MODEL_COST_MAP": "True",
    "HF_HUB_OFFLINE": "1",
    "HF_HUB_DISABLE_TELEMETRY": "1",
    "NO_PROXY": "127.0.0.1,localhost",
    "COLUMNS": "80",
}
# A shell ignores Ctrl-C in what it runs in the background, and so would commands under test.
if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:
    signal.signal(signal.SIGINT, signal.default_int_handler)

# `release_memory` undoes a server's freeze, as it must; what the tests have loaded stays frozen.
gc.unfreeze = lambda: None


@pytest.hookimpl(wrapper=True)
def pytest_collection() -> Generator[None, object, object]:
    """Load the tests, in which is no garbage, and keep them out of what looks for garbage later.

    Looking at every 700 new objects, as Python does by itself, takes a tenth of the suite's time.
    """
    gc.disable()
    try:
        return (yield)
    finally:
        gc.freeze()
        gc.set_threshold(20_000, 20, 20)
        gc.enable()


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Begin with the kernels, whose files take longest: the workers then end together."""
    items.sort(key=lambda item: "kernels" not in item.path.parts)


@pytest.hookimpl(tryfirst=True)
def pytest_runtest_setup() -> None:
    """Let a test that draws from torch's own generator draw the same, whatever ran before it."""
    if "torch" in sys.modules:
        sys.modules["torch"].manual_seed(0)
