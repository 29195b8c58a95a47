"""`python -m mrss_provider.server`: what auto-start runs. People use `mrss serve`.

Flags are the fields of `EngineConfig` and `ServerConfig`: `--socket PATH --idle-exit-s 60`.
"""

from __future__ import annotations

import argparse
import os
import sys
from collections.abc import Mapping, Sequence
from dataclasses import fields

from mrss_provider.config import EngineConfig, ServerConfig
from mrss_provider.errors import MRSSError


def main(argv: Sequence[str] | None = None) -> int:
    """Serve until told to stop; return the exit status."""
    names = [field.name for cls in (EngineConfig, ServerConfig) for field in fields(cls)]
    parser = argparse.ArgumentParser(prog="python -m mrss_provider.server", description=__doc__)
    for name in names:
        parser.add_argument(f"--{name.replace('_', '-')}", metavar="VALUE")
    given = {key: value for key, value in vars(parser.parse_args(argv)).items() if value}
    try:
        serve(given)
    except MRSSError as exc:
        sys.stderr.write(f"{exc}\n")
        return 1
    return 0


def serve(given: Mapping[str, str]) -> None:
    """Build the configuration (flag over variable over default) and serve.

    Raises:
        MRSSError: a bad value, an address that is taken, a model that cannot be loaded.
    """
    from mrss_provider.async_engine import AsyncEngine
    from mrss_provider.server.logs import log_to_stderr
    from mrss_provider.server.run import run_server

    env = {**os.environ, **{f"MRSS_{name.upper()}": value for name, value in given.items()}}
    engine_config = EngineConfig.from_env(env=env)
    server_config = ServerConfig.from_env(env=env)
    log_to_stderr(server_config.log_format)
    run_server(AsyncEngine(engine_config), server_config, model=engine_config.model.name)


if __name__ == "__main__":
    sys.exit(main())
