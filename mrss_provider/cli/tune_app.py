"""`mrss tune`: options and help. The work is in `tune.py`."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any, Literal

import typer

from mrss_provider.cli.options import takes_config
from mrss_provider.config import EngineConfig

_ENGINE_OPTIONS = ("model", "states", "tokenizer", "template", "device", "dtype", "threads")


@takes_config(EngineConfig, only=_ENGINE_OPTIONS)
def tune(
    overrides: dict[str, Any],
    out: Annotated[Path, typer.Option(help="The state to write; its name is the state's.")],
    data: Annotated[
        Path | None,
        typer.Option(
            help='JSON Lines: {"prompt", "response"}, {"messages"} or {"text"}, maybe with '
            '"facts": strings of the answers.'
        ),
    ] = None,
    held_out: Annotated[
        Path | None, typer.Option(help="JSON Lines to judge by. [a share of --data]")
    ] = None,
    held_out_share: Annotated[
        float | None,
        typer.Option(help="Of the lines; 0 judges by nothing and keeps the last state. [0.1]"),
    ] = None,
    loss_on: Annotated[
        Literal["answer", "all"], typer.Option(help="Tokens that are learnt.")
    ] = "answer",
    locality: Annotated[
        float,
        typer.Option(help="Learn only facts, and keep other tokens at the base by this much."),
    ] = 0.0,
    surprise: Annotated[
        float | None,
        typer.Option(
            help="With --locality: share of the answers' tokens that are facts in lines that do "
            "not name theirs, those that surprise the base most. [0.2]"
        ),
    ] = None,
    lr: Annotated[str, typer.Option(metavar="auto|FLOAT", help="Peak learning rate.")] = "auto",
    epochs: Annotated[float | None, typer.Option(help="Passes over the data. [3]")] = None,
    steps: Annotated[int | None, typer.Option(help="Batches, instead of --epochs.")] = None,
    batch_size: Annotated[int, typer.Option(help="Examples a step.")] = 8,
    max_len: Annotated[int, typer.Option(help="Tokens of an example; the rest is cut.")] = 512,
    warmup_steps: Annotated[
        int | None, typer.Option(help="Then the rate falls by a cosine. [a twentieth]")
    ] = None,
    grad_clip: Annotated[float, typer.Option(help="Largest norm of the gradient.")] = 1.0,
    offsets: Annotated[
        bool, typer.Option("--offsets", help="Learn an offset too, which does not fade.")
    ] = False,
    offset_rate: Annotated[
        float | None, typer.Option(help="With --offsets: its peak learning rate. [0.01]")
    ] = None,
    distance: Annotated[
        int, typer.Option(help="Up to so many tokens of other talk before each chat.")
    ] = 0,
    distance_data: Annotated[
        Path | None, typer.Option(help="JSON Lines of other talk. [chats of --data]")
    ] = None,
    start: Annotated[
        str | None,
        typer.Option(
            "--from",
            metavar="STATE",
            help="Go on from this state, a file or a name in --states, and not from the base.",
        ),
    ] = None,
    beside: Annotated[
        list[str] | None,
        typer.Option(help="Tune it inside a mixture with this state; may be repeated."),
    ] = None,
    merge: Annotated[str | None, typer.Option(help="With --beside: its rule. [delta]")] = None,
    gate: Annotated[str | None, typer.Option(help="With --beside: its gate. [fixed]")] = None,
    distill: Annotated[
        str | None, typer.Option(help="Imitate this mixture, such as knowledge+tone.")
    ] = None,
    prompts: Annotated[
        Path | None, typer.Option(help='With --distill: JSON Lines, {"prompt"} or {"messages"}.')
    ] = None,
    samples: Annotated[
        int | None, typer.Option(help="With --distill: answers a prompt. [2]")
    ] = None,
    patience: Annotated[
        int, typer.Option(help="Looks at the held-out text without a gain that end it; 0: never.")
    ] = 5,
    seed: Annotated[int, typer.Option(help="The same seed gives the same state.")] = 0,
    group: Annotated[
        str | None, typer.Option(help="What it is about: knowledge, tone, task, ...")
    ] = None,
    title: Annotated[str | None, typer.Option(help="Its name for people.")] = None,
    licence: Annotated[str | None, typer.Option(help="Its licence, an SPDX name.")] = None,
    file_format: Annotated[
        Literal["safetensors", "pth"] | None,
        typer.Option("--format", help="Of the file. [by the name of --out]"),
    ] = None,
    curve: Annotated[
        bool, typer.Option("--curve/--no-curve", help="Draw the losses beside it, as a PNG.")
    ] = True,
    checkpoint_every: Annotated[float, typer.Option(help="Seconds between checkpoints.")] = 30.0,
    resume: Annotated[
        bool, typer.Option("--resume", help="Go on with a run that was left or killed.")
    ] = False,
    force: Annotated[
        bool, typer.Option("--force", help="Write over a state, or an unfinished run.")
    ] = False,
    as_json: Annotated[bool, typer.Option("--json", help="Print the summary as JSON.")] = False,
) -> None:
    """Tune a state: learn where the model begins, and nothing else.

    From chats or texts (--data), or from what a mixture says (--distill). Ctrl-C leaves off, and
    the same command with --resume goes on.
    """
    from mrss_provider.cli.tune import tune as command
    from mrss_provider.cli.tune_data import Source
    from mrss_provider.cli.tune_job import Job
    from mrss_provider.tune.config import TuneConfig

    _check(data, distill, prompts, held_out, beside)
    _check_used(
        ("--merge", merge, "goes with --beside", bool(beside)),
        ("--gate", gate, "goes with --beside", bool(beside)),
        ("--surprise", surprise, "goes with --locality", locality != 0),
        ("--offset-rate", offset_rate, "goes with --offsets", offsets),
        ("--samples", samples, "goes with --distill", distill is not None),
        ("--epochs", epochs, "must be left out with --steps", steps is None),
        ("--held-out-share", held_out_share, "must be left out with --held-out", held_out is None),
    )
    rate = _rate(lr)
    source = Source(
        data=data,
        held_out=held_out,
        held_out_share=0.1 if held_out_share is None else held_out_share,
        distill=None if distill is None else distill.removeprefix("mrss/"),
        prompts=prompts,
        samples=2 if samples is None else samples,
        max_len=max_len,
        distance=distance,
        distance_data=distance_data,
        seed=seed,
    )
    config = TuneConfig(
        steps=1 if steps is None else steps,
        batch_size=batch_size,
        learning_rate=1.0 if rate is None else rate,
        warmup_steps=warmup_steps or 0,
        grad_clip=grad_clip,
        loss_on=loss_on,
        locality=locality,
        offsets=offsets,
        offset_rate=0.01 if offset_rate is None else offset_rate,
        max_len=max_len,
        seed=seed,
    )
    job = Job(
        out=_named(out, file_format),
        source=source,
        config=config,
        steps=steps,
        warmup_steps=warmup_steps,
        rate=rate,
        epochs=3.0 if epochs is None else epochs,
        surprise=0.2 if surprise is None else surprise,
        start=start,
        beside=tuple(beside or ()),
        merge="delta" if merge is None else merge,
        gate="fixed" if gate is None else gate,
        patience=patience,
        save_every_s=checkpoint_every,
        group=group,
        title=title,
        licence=licence,
        curve=curve,
        resume=resume,
        force=force,
        as_json=as_json,
    )
    if not command(EngineConfig.from_env(overrides), job):
        raise typer.Exit(130)


def _check(
    data: Path | None,
    distill: str | None,
    prompts: Path | None,
    held_out: Path | None,
    beside: list[str] | None,
) -> None:
    """Refuse options that contradict each other."""
    if (data is None) == (distill is None):
        raise typer.BadParameter("give --data, or --distill with --prompts: one of them")
    if (distill is None) != (prompts is None):
        raise typer.BadParameter("--distill and --prompts go together")
    if distill in ("", "mrss/"):
        raise typer.BadParameter(
            f"--distill must be a mixture such as knowledge+tone, got {distill!r}"
        )
    if distill is not None and (held_out is not None or beside):
        raise typer.BadParameter(
            "--distill holds some of its prompts out, and imitates one mixture: leave --held-out "
            "and --beside out"
        )


def _check_used(*options: tuple[str, object, str, bool]) -> None:
    """Refuse options that would change nothing: (option, its value, a rule, whether it is met)."""
    for option, value, rule, is_met in options:
        if value is not None and not is_met:
            raise typer.BadParameter(f"{option} {rule}, got {value!r}")


def _rate(text: str) -> float | None:
    if text == "auto":
        return None
    try:
        return float(text)
    except ValueError:
        raise typer.BadParameter(f"--lr must be auto or a number, got {text!r}") from None


def _named(out: Path, file_format: str | None) -> Path:
    """Return `out` with the suffix of `file_format`.

    Raises:
        typer.BadParameter: it has the other one.
    """
    suffix = f".{file_format}" if file_format else ""
    if not out.name:
        raise typer.BadParameter(f"--out must be a file's name, got {str(out)!r}")
    if not out.suffix:
        return out.with_name(out.name + (suffix or ".safetensors"))
    if suffix and out.suffix != suffix:
        raise typer.BadParameter(f"--format {file_format} and --out {out.name} do not fit")
    return out
