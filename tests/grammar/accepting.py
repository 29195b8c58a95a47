"""Constraints on a tiny vocabulary, asked what they let pass."""

import asyncio
import json
from pathlib import Path

import numpy as np
from tiny_model import vocabulary

from mrss_provider.backend import Grammar
from mrss_provider.grammar import Grammars
from mrss_provider.tokenizer import Tokenizer

VOCAB_SIZE = 320
ENTRIES = vocabulary()
_IDS = {entry: i for i, entry in ENTRIES.items()}
_LONGEST = max(map(len, _IDS))


def encode(text):
    """Greedy longest match, as the World tokenizers do."""
    data = text.encode()
    ids = []
    while data:
        piece = next(data[:n] for n in range(_LONGEST, 0, -1) if data[:n] in _IDS)
        ids.append(_IDS[piece])
        data = data[len(piece) :]
    return ids


TOKENIZER = Tokenizer(Path("tiny"), ENTRIES, encode)


def new_grammars():
    return Grammars(TOKENIZER, VOCAB_SIZE)


def begin(grammars, text, kind="json_schema", *, param="response_format", **options):
    """Return the constraint of a grammar; a schema may be given as it is."""
    if kind == "json_schema" and not isinstance(text, str):
        text = json.dumps(text)
    return asyncio.run(grammars.begin(Grammar(kind, text, param), **options))


def mask(constraint):
    """Return the tokens that may come next, as a set; 0 is the end."""
    words = np.zeros(constraint.num_words, dtype=np.uint32)
    constraint.fill_mask(words)
    bits = np.unpackbits(words.view(np.uint8), bitorder="little")
    return set(np.flatnonzero(bits).tolist())


def accepts(constraint, text):
    """Tell whether a whole answer may be `text`, token by token by the masks."""
    constraint = constraint.fork()
    for token_id in encode(text) if isinstance(text, str) else text:
        if token_id not in mask(constraint):
            return False
        constraint.advance(token_id)
    return 0 in mask(constraint)
