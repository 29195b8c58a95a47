"""Compare models, and mixtures, that LiteLLM reaches: asked side by side, or as arms of a proxy.

`arm_log` is for a proxy: `litellm_settings.callbacks: mrss_provider.compare.arm_log` makes it
append a line for each call, which `mrss compare report --from-log` reads.
"""

from __future__ import annotations

from typing import Any

__all__ = ["arm_log"]


def __getattr__(name: str) -> Any:
    # LiteLLM takes an attribute of a module; made when it is first asked for, since it loads
    # LiteLLM, which a comparison through a base URL does without.
    if name == "arm_log":
        from mrss_provider.compare.log_callback import make_arm_log

        globals()[name] = make_arm_log()
        return globals()[name]
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
