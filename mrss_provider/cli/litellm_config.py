"""`mrss litellm-config`: a LiteLLM proxy's configuration, written from what an engine serves."""

from __future__ import annotations

import math
import os
import re
import subprocess
import sys
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from mrss_provider.backend import ModelCard
from mrss_provider.cli.litellm_entries import Arm, Entries, Group, Wishes
from mrss_provider.cli.output import CommandError, answer, note
from mrss_provider.cli.proxy_config import BUNDLED_PROXY_CONFIG, examine
from mrss_provider.errors import InvalidRequestError
from mrss_provider.mixture import parse_mixture
from mrss_provider.replacing import write_output

_CHECK_TIMEOUT_S = 180.0


def read_group(text: str) -> Group:
    """Read `name=mixture:weight,mixture:weight`; the number after the last colon is the share.

    Raises:
        CommandError: another form.
    """
    name, equals, rest = text.partition("=")
    parts = rest.split(",")
    if not equals or not name or len(parts) < 2:
        raise _bad_group(text, "a name, `=`, and two arms or more")
    arms = []
    for part in parts:
        mixture, colon, share = part.rpartition(":")
        try:
            weight = float(share)
        except ValueError:
            weight = math.nan
        if not colon or not mixture or not 0 < weight < math.inf:
            raise _bad_group(text, f"a share above 0 after the last colon of each arm, not {part}")
        arms.append(Arm(mixture, weight))
    return Group(name, tuple(arms))


def _bad_group(text: str, wanted: str) -> CommandError:
    return CommandError(
        f"--ab needs {wanted}, as in 'pirates=knowledge+tone:3,tone:1'; got {text!r}"
    )


def config_text(cards: Sequence[ModelCard], wishes: Wishes) -> str:
    """Return the configuration as YAML with comments.

    Raises:
        CommandError: a wish that this engine or LiteLLM cannot fulfil.
        InvalidRequestError: a name that is no mixture.
    """
    by_name = {card.id: card for card in cards}
    for name in (*wishes.names, *(group.name for group in wishes.groups)):
        _check_whole(name)
    for name in (*wishes.names, *(arm.mixture for group in wishes.groups for arm in group.arms)):
        _check_known(name, by_name)
    if wishes.openai_route and not (wishes.api_base or "").startswith(("http://", "https://")):
        raise CommandError(
            "--openai-route needs an engine with a TCP port: start one with "
            "`mrss serve --port 9000` and add --api-base http://127.0.0.1:9000"
        )
    entries = Entries(by_name, wishes)
    writer = _Writer()
    lines = [*_head(wishes), "", "model_list:"]
    for comment, group in entries.groups():
        lines += [f"  # {line}" for line in comment.splitlines()]
        for entry in group:
            lines += writer.entry(entry)
        lines.append("")
    text = "\n".join([*lines, _settings(wishes)])
    return _without_unused_anchors(text)


def _check_whole(name: str) -> None:
    if "," in name:
        raise CommandError(
            f"LiteLLM takes {name!r} for several names, as it splits them at commas; make it a "
            "named mixture of mixtures.toml, whose name has none"
        )


def _check_known(name: str, cards: Mapping[str, ModelCard]) -> None:
    for term in parse_mixture(name).terms:
        if term.name not in cards:
            raise CommandError(
                f"the engine has no {term.name!r}, which {name!r} names; it has {', '.join(cards)}"
            )


def _head(wishes: Wishes) -> Iterator[str]:
    yield "# A LiteLLM proxy in front of the mrss engine, written by `mrss litellm-config`:"
    yield "#"
    variables = [f"{key}={value}" for key, value in (wishes.variables or {}).items()]
    command = "litellm --config FILE --host 127.0.0.1 --port 4000"
    yield f"#   {' '.join([*variables, command])}"
    yield "#"
    if wishes.api_base is None:
        yield "# Each worker is a thin client of the engine at the Unix socket MRSS_SOCKET, else of"
        yield "# one that is started for this user."
    else:
        yield f"# Each worker is a thin client of the engine at {wishes.api_base}."


def _settings(wishes: Wishes) -> str:
    """Return what the bundled configuration has after its model list: one truth for both."""
    text = BUNDLED_PROXY_CONFIG.read_text(encoding="utf-8")
    settings = text[text.index("\nlitellm_settings:") + 1 :]
    if wishes.openai_route:
        settings = settings.replace("litellm_settings:\n", f"litellm_settings:\n{_MESSAGES}")
    if wishes.groups:
        settings = settings.replace("router_settings:\n", f"router_settings:\n{_STICKY}")
    return settings


_MESSAGES = """\
  # The same for /v1/messages.
  use_chat_completions_url_for_anthropic_messages: true
"""
_STICKY = """\
  # One conversation stays with one arm: the header x-litellm-session-id, or
  # metadata.session_id, says which conversation it is.
  optional_pre_call_checks: ["session_affinity"]
"""


_WHY = {
    "allowed_openai_params": "LiteLLM refuses these two for a provider that it does not know.",
    "additional_drop_params": (
        "The openai client sends it with every request for an embedding, and LiteLLM refuses it."
    ),
    "use_chat_completions_api": "For /v1/responses, which the engine has not.",
    "health_check_model": "A wildcard cannot be probed by itself.",
    "input_cost_per_token": "In USD, for spend tracking.",
    "cache_read_input_token_cost": (
        "Of prompts that the engine remembers. Unsaid, they are free in some versions of LiteLLM."
    ),
    "max_input_tokens": "Prompt and answer together.",
}


class _Writer:
    """Writes entries as YAML. What an earlier entry says too is merged in from there (`<<`).

    The reason for a key stands over its first appearance.
    """

    def __init__(self) -> None:
        self._told: set[str] = set()
        self._anchors: dict[str, Mapping[str, Any]] = {}

    def entry(self, entry: Mapping[str, Any]) -> Iterator[str]:
        """Yield the lines of an entry."""
        yield f"  - model_name: {_scalar(entry['model_name'])}"
        for section, short in (("litellm_params", "params"), ("model_info", "info")):
            fields = entry[section]
            shared = [
                n
                for n, old in self._anchors.items()
                if n.startswith(short) and old.keys() <= fields.keys()
            ]
            if shared:
                anchor = self._anchors[shared[0]]
                yield f"    {section}:"
                yield f"      <<: *{shared[0]}"
                fields = {k: v for k, v in fields.items() if k not in anchor or anchor[k] != v}
            else:
                name = f"{short}_{sum(n.startswith(short) for n in self._anchors) + 1}"
                self._anchors[name] = fields
                yield f"    {section}: &{name}"
            yield from self._fields(fields)

    def _fields(self, fields: Mapping[str, Any]) -> Iterator[str]:
        for key, value in fields.items():
            if key in _WHY and key not in self._told:
                self._told.add(key)
                yield f"      # {_WHY[key]}"
            yield f"      {key}: {_scalar(value)}"


def _without_unused_anchors(text: str) -> str:
    return re.sub(r" &(\w+)$", lambda m: m[0] if f"*{m[1]}\n" in text else "", text, flags=re.M)


def _scalar(value: object) -> str:
    import yaml

    text: str = yaml.safe_dump(value, default_flow_style=True, width=math.inf)
    return text.removesuffix("...\n").strip()


def write(text: str, out: Path | None, *, force: bool) -> None:
    """Write the configuration to a file, or to stdout.

    Raises:
        CommandError: the file is there and `force` is not given, or cannot be written.
    """
    if out is None:
        answer(text.rstrip("\n"))
        return
    try:
        if not force:
            # It is nobody else's from here on.
            out.open("x").close()
        write_output(out, text.encode())
    except FileExistsError as exc:
        raise CommandError(f"{out} is there already; --force overwrites it") from exc
    except OSError as exc:
        raise CommandError(f"{out} cannot be written: {exc.strerror or exc}") from exc
    note(f"wrote {out}; run it: litellm --config {out} --host 127.0.0.1 --port 4000")


def check(text: str) -> None:
    """Let LiteLLM itself read the configuration, and look for what it would not notice.

    Raises:
        CommandError: what is wrong with it.
    """
    with tempfile.TemporaryDirectory(prefix="mrss") as folder:
        path = Path(folder) / "config.yaml"
        path.write_text(text, encoding="utf-8")
        problems = examine(path)
        if problems:
            raise CommandError(f"the configuration is wrong: {'; '.join(problems)}")
        command = [sys.executable, "-c", "from litellm import run_server; run_server()"]
        try:
            result = subprocess.run(
                [*command, "--config", str(path), "--validate_config"],
                env={"LITELLM_LOCAL_MODEL_COST_MAP": "True", **os.environ},
                capture_output=True,
                text=True,
                timeout=_CHECK_TIMEOUT_S,
                check=False,
            )
        except subprocess.TimeoutExpired as exc:
            raise CommandError(
                f"LiteLLM has not read the configuration within {_CHECK_TIMEOUT_S:g} s; try again"
            ) from exc
    lines = (result.stdout + result.stderr).strip().splitlines() or ["no output"]
    if result.returncode:
        raise CommandError(f"LiteLLM refuses the configuration: {lines[-1]}")
    note(next((line for line in lines if "config OK" in line), lines[-1]))


def litellm_config(
    cards: Sequence[ModelCard], wishes: Wishes, *, out: Path | None, force: bool, checked: bool
) -> None:
    """Write the configuration for an engine that serves `cards`; with `checked`, tested first.

    Raises:
        CommandError: it cannot be made, is wrong, or cannot be written.
    """
    if out is not None and out.exists() and not force:
        raise CommandError(f"{out} is there already; --force overwrites it")
    try:
        text = config_text(cards, wishes)
    except InvalidRequestError as exc:
        raise CommandError(f"no such mixture can be: {exc}") from exc
    if checked:
        check(text)
    write(text, out, force=force)
