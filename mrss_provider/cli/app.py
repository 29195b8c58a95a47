"""The commands' names, options and help. Each parses and builds; its module does the work."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Annotated, Any

import typer

from mrss_provider.cli.compare_app import compare
from mrss_provider.cli.evaluate_app import evaluate
from mrss_provider.cli.gate_app import gate
from mrss_provider.cli.keys_app import keys
from mrss_provider.cli.litellm_config_app import litellm_config
from mrss_provider.cli.options import takes_config
from mrss_provider.cli.session_app import session
from mrss_provider.cli.states_app import states
from mrss_provider.cli.tune_app import tune
from mrss_provider.config import EngineConfig, ServerConfig
from mrss_provider.errors import ConfigError

app = typer.Typer(
    name="mrss",
    help="Mixtures of recurrent RWKV states: serve them, talk to them, look after their files.",
    no_args_is_help=True,
    add_completion=False,
    rich_markup_mode=None,
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
)
app.add_typer(states)
app.add_typer(gate)
app.add_typer(keys)
app.add_typer(compare)
app.add_typer(session)

_ENGINE_OPTIONS = ("model", "states", "device", "dtype", "quantize", "state_dtype", "threads")

Name = Annotated[
    str, typer.Argument(help="States and weights, such as knowledge+tone:0.5, or a named mixture.")
]
Server = Annotated[
    str | None,
    typer.Option(metavar="URL", help="Ask this engine: http://host:port or unix:///path."),
]
ApiKey = Annotated[
    str | None, typer.Option("--api-key", help="Sent to that engine. [MRSS_API_KEY]")
]
InProcess = Annotated[bool, typer.Option("--in-process", help="Load the model in this process.")]
Json = Annotated[bool, typer.Option("--json", help="Print JSON, one object a line.")]
Seed = Annotated[int | None, typer.Option(help="The same seed gives the same answer.")]
Temperature = Annotated[float | None, typer.Option(help="0 is greedy. [the mixture's]")]
TopP = Annotated[float | None, typer.Option(help="Nucleus, in (0, 1]. [the mixture's]")]
MaxTokens = Annotated[int | None, typer.Option(help="Longest answer. [1024]")]


def _print_version(wanted: bool) -> None:
    if wanted:
        from mrss_provider import __version__
        from mrss_provider.cli.output import answer

        answer(f"mrss {__version__}")
        raise typer.Exit


@app.callback()
def options(
    version: Annotated[
        bool,
        typer.Option(
            "--version", callback=_print_version, is_eager=True, help="Print the version."
        ),
    ] = False,
) -> None:
    """Take the options that stand before a command."""


@app.command()
@takes_config(EngineConfig, ServerConfig)
def serve(overrides: dict[str, Any]) -> None:
    """Serve a model and its states over the OpenAI API.

    An option that is not given is read from the environment (--max-rows: MRSS_MAX_ROWS), then
    takes the default in brackets.
    """
    from mrss_provider.cli.serve import serve as command

    config = ServerConfig.from_env(overrides)
    for name in ("host", "port"):
        if name in overrides and config.socket is not None:
            where = "--socket" if "socket" in overrides else "MRSS_SOCKET"
            raise ConfigError(
                f"--{name} means nothing on a Unix socket ({where}): leave one of the two out, or "
                "listen on 127.0.0.1 too with --loopback-port",
                param=name,
            )
    command(EngineConfig.from_env(overrides), config)


@app.command()
@takes_config(EngineConfig, only=_ENGINE_OPTIONS)
def chat(
    overrides: dict[str, Any],
    name: Name = "base",
    message: Annotated[
        str | None, typer.Option("-m", "--message", help="Answer this and leave.")
    ] = None,
    system: Annotated[str | None, typer.Option(help="A system message.")] = None,
    seed: Seed = None,
    temperature: Temperature = None,
    top_p: TopP = None,
    max_tokens: MaxTokens = None,
    trace: Annotated[
        bool, typer.Option("--trace", help="Colour the answer by the state that spoke.")
    ] = False,
    json_schema: Annotated[
        Path | None, typer.Option(help="Every answer is JSON that follows the schema in this file.")
    ] = None,
    regex: Annotated[
        str | None, typer.Option(help="Every answer matches this expression as a whole.")
    ] = None,
    as_json: Json = False,
    server: Server = None,
    api_key: ApiKey = None,
    in_process: InProcess = False,
) -> None:
    """Talk to a mixture in the terminal, or through a pipe, a line a turn.

    The engine is the one at MRSS_SOCKET, else one that this user's programs share, started if
    need be; with --model, --states, ... one for these.
    """
    from mrss_provider.cli.chat import Conversation, read_grammar
    from mrss_provider.cli.chat import chat as command
    from mrss_provider.cli.connect import connected
    from mrss_provider.sampling_params import SamplingParams

    sampling = SamplingParams(
        temperature=temperature, top_p=top_p, seed=seed, max_tokens=max_tokens
    )
    talk = Conversation(name.removeprefix("mrss/"), sampling, system, trace=trace)
    talk.grammar = read_grammar(json_schema, regex)
    asked = connected(server=server, api_key=api_key, in_process=in_process, overrides=overrides)
    with asked as (backend, runner):
        command(talk, backend, runner, message=message, as_json=as_json)


@app.command()
@takes_config(EngineConfig, only=_ENGINE_OPTIONS)
def generate(
    overrides: dict[str, Any],
    name: Name = "base",
    prompt: Annotated[str | None, typer.Option("-p", "--prompt", help="[stdin]")] = None,
    stop: Annotated[list[str] | None, typer.Option(help="Ends the text; may be repeated.")] = None,
    seed: Seed = None,
    temperature: Temperature = None,
    top_p: TopP = None,
    max_tokens: MaxTokens = None,
    as_json: Json = False,
    server: Server = None,
    api_key: ApiKey = None,
    in_process: InProcess = False,
) -> None:
    """Continue a text as it stands, without a chat template."""
    from mrss_provider.cli.ask import print_reply
    from mrss_provider.cli.connect import connected
    from mrss_provider.sampling_params import SamplingParams

    sampling = SamplingParams(
        temperature=temperature,
        top_p=top_p,
        seed=seed,
        max_tokens=max_tokens,
        stop=tuple(stop or ()),
    )
    text = sys.stdin.read() if prompt is None else prompt
    asked = connected(server=server, api_key=api_key, in_process=in_process, overrides=overrides)
    with asked as (backend, runner):
        print_reply(backend, runner, name.removeprefix("mrss/"), text, sampling, as_json)


@app.command()
@takes_config(EngineConfig, only=_ENGINE_OPTIONS)
def trace(
    overrides: dict[str, Any],
    name: Name,
    prompt: Annotated[str, typer.Argument(help="What to say to it.")],
    html: Annotated[Path | None, typer.Option(help="Write a page of its own to this file.")] = None,
    given: Annotated[
        str | None, typer.Option(help="Read this text as the answer: who would have written it?")
    ] = None,
    given_file: Annotated[Path | None, typer.Option(help="The same from a file.")] = None,
    continues: Annotated[
        bool, typer.Option("--continue", help="Continue PROMPT, without a chat template.")
    ] = False,
    seed: Seed = None,
    temperature: Temperature = None,
    top_p: TopP = None,
    max_tokens: MaxTokens = None,
    as_json: Json = False,
    server: Server = None,
    api_key: ApiKey = None,
    in_process: InProcess = False,
) -> None:
    """Show which state spoke, token by token.

    Of an answer, or with --given of a text that anybody wrote. Without --html it is coloured in
    the terminal.
    """
    from mrss_provider.backend import GenerateRequest, Message, MixtureOptions
    from mrss_provider.cli.connect import connected
    from mrss_provider.cli.output import read_text
    from mrss_provider.cli.trace import trace as command
    from mrss_provider.sampling_params import SamplingParams

    if given is not None and given_file is not None:
        raise typer.BadParameter("give --given or --given-file, not both")
    request = GenerateRequest(
        model=name.removeprefix("mrss/"),
        sampling=SamplingParams(
            temperature=temperature, top_p=top_p, seed=seed, max_tokens=max_tokens
        ),
        messages=None if continues else (Message("user", prompt),),
        prompt=prompt if continues else None,
        mixture=MixtureOptions(trace=True),
        given=given if given_file is None else read_text(given_file),
    )
    asked = connected(server=server, api_key=api_key, in_process=in_process, overrides=overrides)
    with asked as (backend, runner):
        command(backend, runner, request, html=html, as_json=as_json)


@app.command()
@takes_config(EngineConfig, only=_ENGINE_OPTIONS)
def models(
    overrides: dict[str, Any],
    as_json: Json = False,
    server: Server = None,
    api_key: ApiKey = None,
    in_process: InProcess = False,
) -> None:
    """List the names that an engine serves."""
    from mrss_provider.cli.ask import print_models
    from mrss_provider.cli.connect import connected

    asked = connected(server=server, api_key=api_key, in_process=in_process, overrides=overrides)
    with asked as (backend, runner):
        print_models(runner.run(backend.models()), as_json)


@app.command()
@takes_config(EngineConfig, only=_ENGINE_OPTIONS)
def proxy(
    overrides: dict[str, Any],
    port: Annotated[int, typer.Option(min=1, max=65535, help="TCP port.")] = 4000,
    host: Annotated[str, typer.Option(help="Address to bind.")] = "127.0.0.1",
    config: Annotated[
        Path | None, typer.Option(help="[proxy_config.yaml here, else the bundled one]")
    ] = None,
    num_workers: Annotated[
        int, typer.Option(min=1, help="Worker processes; one engine for all.")
    ] = 1,
) -> None:
    """Run a LiteLLM proxy and its engine until Ctrl-C."""
    from mrss_provider.cli.proxy import run_proxy

    run_proxy(config, host, port, num_workers, overrides)


@app.command()
def pull(
    what: Annotated[str | None, typer.Argument(metavar="REPO_OR_ALIAS", show_default=False)] = None,
    file: Annotated[
        str | None, typer.Option(help="A file of the repository, or a pattern like '*0.4b*'.")
    ] = None,
    to: Annotated[Path, typer.Option(help="Where the model gets its folder.")] = Path("models"),
    revision: Annotated[str, typer.Option(help="Branch, tag or commit.")] = "main",
    list_aliases: Annotated[bool, typer.Option("--list", help="List the aliases.")] = False,
) -> None:
    """Fetch a model from the Hugging Face hub; run it again to resume."""
    from mrss_provider.cli import pull as command
    from mrss_provider.cli.output import answer, note

    if list_aliases:
        answer(command.aliases_table())
        return
    if what is None:
        raise typer.BadParameter("give a repository or an alias (--list shows them)")
    folder = command.pull(what, file=file, to=to, revision=revision)
    answer(str(folder))
    note(f"talk to it: mrss chat --model {folder}")


@app.command()
@takes_config(EngineConfig, only=_ENGINE_OPTIONS)
def doctor(
    overrides: dict[str, Any],
    config: Annotated[
        Path | None, typer.Option(help="[proxy_config.yaml here, else the bundled one]")
    ] = None,
    as_json: Json = False,
) -> None:
    """Check the installation and the files; say a sentence."""
    from mrss_provider.cli.doctor import doctor as command

    if not command(overrides, config, as_json):
        raise typer.Exit(1)


app.command()(tune)
app.command()(evaluate)
app.command("litellm-config")(litellm_config)
