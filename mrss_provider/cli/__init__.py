"""The `mrss` command. Heavy imports happen inside commands: `mrss --help` stays quick."""

from __future__ import annotations


def main() -> None:
    """Run the command line.

    Raises:
        SystemExit: with the exit status.
    """
    import logging

    from mrss_provider.cli.app import app
    from mrss_provider.cli.output import run

    logging.basicConfig(level=logging.WARNING, format="%(levelname)s: %(message)s")
    run(lambda: app(prog_name="mrss"))
