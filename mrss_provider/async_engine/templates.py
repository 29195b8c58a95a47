"""Which chat template a model is told in, and why."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

from mrss_provider.async_engine.card import CARD_FILE, Card, model_folder
from mrss_provider.chat import ChatTemplate, detect_template, load_template


def choose_template(asked: str | None, card: Card, model: Path) -> tuple[ChatTemplate, str]:
    """Return the template, and what chose it: what was asked for, the card, or the model's name.

    Args:
        asked: for by whoever runs the engine; None leaves it to the model.
        card: of the model.
        model: checkpoint file or folder.

    Raises:
        ConfigError: no such template, or a file that is none.
    """
    folder = model_folder(model)
    if asked is not None:
        name, why = asked, "it was asked for"
    elif card.template is not None:
        name, why = card.template, f"{CARD_FILE} says so"
    else:
        name, why = detect_template(model.name, folder.absolute().name)
    template = load_template(name, folder)
    # The card's stops go with the card's template.
    if card.stop is not None and asked in (None, card.template):
        template = replace(template, stop=card.stop)
    return template, why
