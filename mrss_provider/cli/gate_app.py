"""`mrss gate`: options and help. The work is in `gate.py` and `gate_train.py`."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer

from mrss_provider.cli.options import takes_config
from mrss_provider.config import EngineConfig

gate = typer.Typer(
    name="gate",
    help="How the states of a mixture are weighed and merged.",
    no_args_is_help=True,
    rich_markup_mode=None,
)


@gate.command("list")
@takes_config(EngineConfig, only=("states",))
def list_(
    overrides: dict[str, Any],
    as_json: Annotated[bool, typer.Option("--json", help="Print one JSON object.")] = False,
) -> None:
    """List merge rules and gates, what they take, and the trained gates of the folder."""
    from mrss_provider.cli.gate import list_methods

    list_methods(EngineConfig.from_env(overrides).states, as_json)


@gate.command()
@takes_config(EngineConfig, only=("model", "device", "dtype", "quantize", "threads"))
def train(
    overrides: dict[str, Any],
    mixture: Annotated[str, typer.Option(help="States and weights, such as knowledge+tone:0.5.")],
    data: Annotated[
        Path,
        typer.Option(
            help='JSON Lines of text that needs all of the states at once: {"prompt", "response"}, '
            '{"messages"} or {"text"}.'
        ),
    ],
    out: Annotated[str, typer.Option(help="What requests will call the gate.")],
    held_out: Annotated[
        Path | None, typer.Option(help="Text to judge the gate by. [a fifth of --data]")
    ] = None,
    states_folder: Annotated[
        Path | None,
        typer.Option(
            "--states", "--states-folder", help="Folder of the states; the gate goes into it."
        ),
    ] = None,
    epochs: Annotated[int, typer.Option(help="Passes over the data, at most.")] = 200,
    seed: Annotated[int, typer.Option(help="The same seed gives the same gate.")] = 0,
    licence: Annotated[str | None, typer.Option(help="Its licence, an SPDX name.")] = None,
    force: Annotated[
        bool,
        typer.Option("--force", help="Write it over a gate of that name, and if it gains nothing."),
    ] = False,
) -> None:
    """Train a gate for a mixture, and judge it by text that it did not learn from.

    The model and the states stay as they are. The gate is written if it predicts the held-out text
    better, under the linear merge, than the best fixed weights do.
    """
    from mrss_provider.cli.gate_train import Job
    from mrss_provider.cli.gate_train import train as command
    from mrss_provider.tune.gate_training import GateConfig

    if states_folder is not None:
        overrides["states"] = states_folder
    config = GateConfig(epochs=epochs, seed=seed)
    job = Job(mixture, data, out, held_out, config=config, licence=licence, force=force)
    command(EngineConfig.from_env(overrides), job)
