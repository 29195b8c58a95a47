"""load: everything that an `AsyncEngine` computes with. Runs on the engine's thread."""

from __future__ import annotations

import functools
import logging
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

from mrss_provider.async_engine.card import Card, read_card
from mrss_provider.async_engine.pauses import pause_ids
from mrss_provider.async_engine.templates import choose_template
from mrss_provider.chat import ChatTemplate, load_template
from mrss_provider.config import EngineConfig
from mrss_provider.errors import ConfigError, MRSSError
from mrss_provider.sampling_params import SamplingOrder
from mrss_provider.tokenizer import Tokenizer, find_vocabulary

if TYPE_CHECKING:
    from mrss_provider.engine.engine import Engine
    from mrss_provider.engine.state_library import StateLibrary
    from mrss_provider.grammar import Grammars


logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class Loaded:
    """A model that is ready, and what goes with it.

    Attributes:
        template: its `stop` holds a chat's stops.
        sampling_order: for requests that say none; None is the engine's own.
        plain: the same with the model's own template, where this has another one.
    """

    engine: Engine
    library: StateLibrary
    tokenizer: Tokenizer
    template: ChatTemplate
    card: Card
    sampling_order: SamplingOrder | None = None
    plain: Loaded | None = None

    @functools.cached_property
    def grammars(self) -> Grammars:
        """What answers are asked to conform to, compiled."""
        if self.plain is not None:
            return self.plain.grammars
        from mrss_provider.grammar import Grammars

        return Grammars(self.tokenizer, self.engine.model_config.vocab_size)

    def speaking(self, template: str | None) -> Loaded:
        """Return this with the template that a mixture asks for; None is the model's."""
        if template is None or template == self.template.name:
            return self
        if template not in self._others:
            self._others[template] = replace(self, template=load_template(template), plain=self)
        return self._others[template]

    def tell_of_hidden_turns(self, why: MRSSError) -> None:
        """Log once that mixtures are served without `reinject`, which no request asked for."""
        if not self._told:
            self._told.append(why)
            logger.warning(
                "chats are served as with reinject 'never', tuned states fade in long ones: %s",
                why.message,
            )

    @functools.cached_property
    def _told(self) -> list[MRSSError]:
        return []

    @functools.cached_property
    def _others(self) -> dict[str, Loaded]:
        return {}


def load(config: EngineConfig) -> Loaded:
    """Load model, tokenizer, card, template and states.

    Raises:
        MRSSError: a file that is missing or not what its use needs, or that may not be read; too
            little memory.
    """
    try:
        return _load(config)
    except PermissionError as exc:
        raise ConfigError(f"{exc.filename} cannot be read: {exc.strerror}") from exc
    except (RuntimeError, MemoryError) as exc:
        from mrss_provider.model.memory import lacked_memory

        if not lacked_memory(exc):
            raise
        raise ConfigError(
            f"there is too little memory for {config.model.name} with the states of "
            f"{config.max_rows} rows; take fewer (--max-rows), --quantize it, or take a smaller "
            f"model ({(str(exc) or repr(exc)).splitlines()[0]:.200})"
        ) from exc


def _load(config: EngineConfig) -> Loaded:
    card = read_card(config.model)
    template, why = choose_template(config.template, card, config.model)
    logger.info("chat template %s: %s", template.name, why)
    tokenizer = Tokenizer.load(config.tokenizer or find_vocabulary(config.model))
    # Each takes some 20 ms of a large vocabulary, which an event loop should not wait for.
    tokenizer.byte_starts(())
    pause_ids(tokenizer, template.stop)

    # torch takes a second to import: the server listens before.
    from mrss_provider.engine.engine import Engine
    from mrss_provider.engine.state_library import StateLibrary
    from mrss_provider.model import load_model

    model = load_model(
        config.model,
        device=config.device,
        dtype=config.dtype,
        threads=config.threads,
        state_dtype=config.state_dtype,
        quantize=config.quantize,
        sparse_ffn=config.sparse_ffn,
    )
    library = StateLibrary(
        config.states,
        model.config,
        model_name=card.name or None,
        max_states=config.max_states,
        context_len=config.max_context_len,
        strict=config.strict,
    )
    allowed_ids = tokenizer.allowed_ids(model.config.vocab_size)
    engine = Engine(model, library, config, allowed_ids=allowed_ids)
    return Loaded(engine, library, tokenizer, template, card)
