"""load: everything that an `AsyncEngine` computes with. Runs on the engine's thread."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

from mrss_provider.async_engine.card import Card, model_folder, read_card
from mrss_provider.chat import ChatTemplate, load_template
from mrss_provider.config import EngineConfig
from mrss_provider.sampling_params import SamplingOrder
from mrss_provider.tokenizer import Tokenizer, find_vocabulary

if TYPE_CHECKING:
    from mrss_provider.engine.engine import Engine
    from mrss_provider.engine.state_library import StateLibrary


@dataclass(frozen=True)
class Loaded:
    """A model that is ready, and what goes with it.

    Attributes:
        template: its `stop` holds a chat's stops.
        sampling_order: for requests that say none; None is the engine's own.
    """

    engine: Engine
    library: StateLibrary
    tokenizer: Tokenizer
    template: ChatTemplate
    card: Card
    sampling_order: SamplingOrder | None = None


def load(config: EngineConfig) -> Loaded:
    """Load model, tokenizer, card, template and states.

    Raises:
        MRSSError: a file that is missing or not what its use needs.
    """
    card = read_card(config.model)
    template = load_template(config.template or card.template, model_folder(config.model))
    # The card's stops go with the card's template.
    if card.stop is not None and config.template in (None, card.template):
        template = replace(template, stop=card.stop)
    tokenizer = Tokenizer.load(config.tokenizer or find_vocabulary(config.model))

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
