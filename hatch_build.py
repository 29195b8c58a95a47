"""Puts the demo model, the states and the proxy configuration into the wheel.

A checkout reads them where they are, so an editable install carries no copy.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

from hatchling.builders.hooks.plugin.interface import BuildHookInterface

_BUNDLED = (
    "models/demo/model.safetensors",
    "models/demo/vocab.txt",
    "models/demo/card.toml",
    "states/*.safetensors",
    "states/gates/*.safetensors",
    "states/mixtures.toml",
    "proxy_config.yaml",
)
_IF_THERE = ("states/README.md",)


class BundleHook(BuildHookInterface):
    """Adds the bundled files under `mrss_provider/_bundled`."""

    def initialize(self, version: str, build_data: dict[str, Any]) -> None:
        """Extend `build_data`, unless the install is editable.

        Raises:
            FileNotFoundError: a bundled file is not in the checkout.
        """
        if version == "editable":
            return
        root = Path(self.root)
        for pattern in (*_BUNDLED, *_IF_THERE):
            paths = sorted(root.glob(pattern))
            if not paths and pattern in _BUNDLED:
                raise FileNotFoundError(f"the wheel needs {pattern}")
            for path in paths:
                inside = f"mrss_provider/_bundled/{path.relative_to(root).as_posix()}"
                build_data["force_include"][str(path)] = inside
