"""`mrss compare`: options and help. The work is in `compare.py`, `compare_report.py` and so on."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

compare = typer.Typer(
    name="compare",
    help="""Compare models and mixtures: side by side, and with statistics.

    mrss compare --models mrss/knowledge+tone,mrss/base --prompts prompts.jsonl --seeds 3

    Exits with 0, or with 3 if some calls failed and 1 if all did. Ctrl-C and kills lose only the
    answers under way: the same command goes on.""",
    invoke_without_command=True,
    no_args_is_help=True,
    rich_markup_mode=None,
)

Scorers = Annotated[
    list[str] | None,
    typer.Option(
        "--scorer",
        metavar="NAME",
        help="knowledge, tone, tone:VOICE or module:function; several: commas, or again.",
    ),
]
Judge = Annotated[
    str | None,
    typer.Option(metavar="MODEL", help="Ask this model which of two answers is better, twice."),
]
BaseUrl = Annotated[
    str | None,
    typer.Option(metavar="URL", help="A proxy or any OpenAI server. [LiteLLM's SDK, in here]"),
]
ApiKey = Annotated[str | None, typer.Option(help="Sent to that server. [MRSS_API_KEY]")]
Concurrency = Annotated[int, typer.Option(min=1, max=1024, help="Most calls at a time.")]
Rate = Annotated[float, typer.Option(min=0, help="Most calls begun a second; 0: no limit.")]
Timeout = Annotated[float, typer.Option(min=0.1, help="Seconds for a whole answer.")]
Json = Annotated[bool, typer.Option("--json", help="Print one JSON object.")]

# Options that say something of answers that are only shown.
_OF_LIVE = frozenset(
    {
        "live",
        "models",
        "base_url",
        "api_key",
        "temperature",
        "max_tokens",
        "params",
        "timeout",
        "first_seed",
    }
)


@compare.callback()
def run(
    context: typer.Context,
    models: Annotated[
        str | None, typer.Option(metavar="A,B,...", help="What to compare, by LiteLLM's names.")
    ] = None,
    prompts: Annotated[Path | None, typer.Option(help="What to ask: JSON Lines.")] = None,
    seeds: Annotated[int, typer.Option(min=1, max=1000, help="Answers to each prompt.")] = 1,
    first_seed: Annotated[int, typer.Option(min=0, help="Their seeds begin here.")] = 0,
    out: Annotated[Path, typer.Option(help="Folder of results; the same goes on.")] = Path(
        "comparison"
    ),
    base_url: BaseUrl = None,
    api_key: ApiKey = None,
    temperature: Annotated[float | None, typer.Option(help="Of all requests.")] = None,
    max_tokens: Annotated[int | None, typer.Option(help="Of all requests.")] = None,
    params: Annotated[
        str | None, typer.Option(metavar="JSON", help="Other parameters of all requests.")
    ] = None,
    scorer: Scorers = None,
    judge: Judge = None,
    concurrency: Concurrency = 4,
    rate: Rate = 0.0,
    timeout: Timeout = 600.0,
    retry_errors: Annotated[
        bool, typer.Option("--retry-errors", help="Ask again what failed before.")
    ] = False,
    warm_up: Annotated[
        bool, typer.Option("--warm-up/--no-warm-up", help="First ask each for one token, unheard.")
    ] = True,
    live: Annotated[
        str | None,
        typer.Option(metavar="PROMPT", help="Only this: two to four answers as they come."),
    ] = None,
    as_json: Json = False,
) -> None:
    """Put prompts to several models and say what differs."""
    given = _given(context)
    if context.invoked_subcommand is not None:
        if given:
            raise typer.BadParameter(
                f"options of a comparison do not go with {context.invoked_subcommand!r}: put that "
                "command's own behind its name"
            )
        return
    if models is None:
        raise typer.BadParameter("give --models, such as mrss/knowledge+tone,mrss/base")
    from mrss_provider.cli.compare_jobs import Asking, asked_params, split_models

    asking = Asking(
        models=split_models(models),
        params=asked_params(params, temperature, max_tokens),
        base_url=base_url,
        api_key=api_key,
        concurrency=concurrency,
        rate_per_s=rate,
        timeout_s=timeout,
    )
    if live is not None:
        from mrss_provider.cli.compare_live import compare_live

        for name, option in given.items():
            if name not in _OF_LIVE:
                raise typer.BadParameter(
                    f"--live shows the answers to one prompt as they come: leave {option} out"
                )
        if code := compare_live(asking, live, first_seed):
            raise typer.Exit(code)
        return
    if prompts is None:
        raise typer.BadParameter("give --prompts, a file of JSON Lines, or --live PROMPT")
    from mrss_provider.cli.compare import Job
    from mrss_provider.cli.compare import run as command

    job = Job(
        asking,
        prompts=prompts,
        seeds=tuple(range(first_seed, first_seed + seeds)),
        out=out,
        scorers=_split(scorer),
        judge=judge,
        retry_errors=retry_errors,
        warm_up=warm_up,
        as_json=as_json,
    )
    if code := command(job):
        raise typer.Exit(code)


@compare.command()
def report(
    folder: Annotated[
        Path | None, typer.Argument(help="A comparison, whose report is made anew.")
    ] = None,
    from_log: Annotated[
        Path | None, typer.Option(help="What a proxy's log callback wrote: report its arms.")
    ] = None,
    feedback: Annotated[
        Path | None, typer.Option(help="With --from-log: what /v1/feedback wrote.")
    ] = None,
    group: Annotated[
        str | None, typer.Option(help="With --from-log: only this model_name.")
    ] = None,
    scorer: Scorers = None,
    judge: Annotated[
        str | None, typer.Option(metavar="MODEL", help="Whose judgements to report; asks nobody.")
    ] = None,
    as_json: Json = False,
) -> None:
    """Report a comparison again, after votes, or a weighted group's arms from a proxy's log."""
    if (folder is None) == (from_log is None):
        raise typer.BadParameter("give the folder of a comparison, or --from-log LOG")
    from mrss_provider.cli import compare_report

    if from_log is not None:
        if scorer or judge:
            raise typer.BadParameter("--scorer and --judge are of a comparison, not of a log")
        compare_report.report_log(from_log, feedback, group, as_json=as_json)
        return
    if feedback or group:
        raise typer.BadParameter("--feedback and --group go with --from-log")
    assert folder is not None
    compare_report.report_folder(folder, _split(scorer), judge, as_json=as_json)


@compare.command()
def vote(
    folder: Annotated[Path, typer.Argument(help="A comparison.")],
    voter: Annotated[str, typer.Option(help="Who votes; each sees everything once.")] = "me",
) -> None:
    """Vote on pairs of answers without seeing whose they are; q leaves, and the same goes on."""
    from mrss_provider.cli.compare_vote import vote as command

    command(folder, voter)


def _given(context: typer.Context) -> dict[str, str]:
    """Return parameter -> option of what was given on the command line."""
    options = {parameter.name: parameter.opts[0] for parameter in context.command.params}
    return {
        name: options[name]
        for name in context.params
        if getattr(context.get_parameter_source(name), "name", "") == "COMMANDLINE"
    }


def _split(names: list[str] | None) -> tuple[str, ...]:
    found = [name.strip() for given in names or () for name in given.split(",")]
    return tuple(dict.fromkeys(name for name in found if name))
