"""A small invented world to measure mixtures in: facts of a harbour town, and eight voices.

Standard library only. Documents train the demo model and its states; `score_answer` judges what a
mixture says.
"""

from __future__ import annotations

from mrss_provider.evaluate.world.documents import (
    HOME_FACTS,
    Document,
    base_document,
    knowledge_document,
    question,
    small_talk_document,
    voice_document,
)
from mrss_provider.evaluate.world.lexicon import HOME_TOWN
from mrss_provider.evaluate.world.relations import RELATIONS, Fact, Relation
from mrss_provider.evaluate.world.scoring import Score, markers, score_answer, voices_in
from mrss_provider.evaluate.world.towns import NUM_SETTLED, OTHER_TOWNS, Town
from mrss_provider.evaluate.world.voices import MARKED, PLAIN, VOICES, Voice

__all__ = [
    "HOME_FACTS",
    "HOME_TOWN",
    "MARKED",
    "NUM_SETTLED",
    "OTHER_TOWNS",
    "PLAIN",
    "RELATIONS",
    "VOICES",
    "Document",
    "Fact",
    "Relation",
    "Score",
    "Town",
    "Voice",
    "base_document",
    "knowledge_document",
    "markers",
    "question",
    "score_answer",
    "small_talk_document",
    "voice_document",
    "voices_in",
]
