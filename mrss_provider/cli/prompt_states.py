"""`mrss states from-prompt`: a long text becomes a state file."""

from __future__ import annotations

from pathlib import Path

from mrss_provider.cli.output import CommandError, note, read_text
from mrss_provider.cli.states import new_target, open_library, open_model, save_state
from mrss_provider.config import EngineConfig
from mrss_provider.mixture import BASE
from mrss_provider.model import StateMetadata
from mrss_provider.model.prompt_state import state_from_prompt
from mrss_provider.tokenizer import Tokenizer, find_vocabulary


def make_from_prompt(
    config: EngineConfig,
    text: Path,
    name: str,
    start: str,
    *,
    group: str | None,
    licence: str | None,
    force: bool,
) -> None:
    """Read a text from the state `start` and write what the model is then as a state `name`.

    Raises:
        MRSSError: a bad name, an unknown state, a model or vocabulary that cannot be read.
        CommandError: a name that is taken, or no text.
    """
    model = open_model(config)
    target = new_target(config.states, name, model.config, force=force)
    tokenizer = Tokenizer.load(config.tokenizer or find_vocabulary(config.model))
    tokens = tokenizer.encode(read_text(text))
    if not tokens:
        raise CommandError(f"{text} is empty; give a text to read")
    begins = None if start == BASE else open_library(config, model.config).get(start)
    note(f"reading {len(tokens)} tokens ...")
    metadata = StateMetadata(group=group, licence=licence)
    state = state_from_prompt(model, tokens, name=name, start=begins, metadata=metadata)
    save_state(target, state, model.config, force=force)
