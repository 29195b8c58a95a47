"""What `/v1/models` lists of a loaded model: each name, and what can be asked of it."""

from __future__ import annotations

from dataclasses import replace

from mrss_provider.async_engine.loading import Loaded
from mrss_provider.backend import ModelCard
from mrss_provider.engine.request import ResolvedMixture
from mrss_provider.errors import MRSSError


def model_cards(loaded: Loaded) -> list[ModelCard]:
    """Return the names that are served, `base` first."""
    return [_described(card, loaded) for card in loaded.library.cards()]


def _described(card: ModelCard, loaded: Loaded) -> ModelCard:
    try:
        mixture = loaded.library.resolve(card.id)
    except MRSSError:
        # A mixture that names what is no longer there is listed, and refused when asked.
        return card
    return replace(card, supports=_supports(mixture, loaded), reinject=mixture.reinject)


def _supports(mixture: ResolvedMixture, loaded: Loaded) -> tuple[str, ...]:
    template = loaded.speaking(mixture.template).template
    found = []
    if template.tool_call is not None:
        found.append("tools")
    if template.thought is not None:
        found.append("thinking")
    # The hidden states of one state can be an embedding.
    if mixture.rows == 1:
        found.append("embeddings")
    return tuple(found)
