"""Tune initial states on examples: a voice, a body of knowledge, a task."""

from __future__ import annotations

from mrss_provider.tune.chats import chat_example, read_chats
from mrss_provider.tune.config import TuneConfig, TuneJob, TuneResult
from mrss_provider.tune.examples import Example, ExampleSource, mark_example
from mrss_provider.tune.files import read_weights, save_result
from mrss_provider.tune.tuning import Progress, tune_state, tune_states

__all__ = [
    "Example",
    "ExampleSource",
    "Progress",
    "TuneConfig",
    "TuneJob",
    "TuneResult",
    "chat_example",
    "mark_example",
    "read_chats",
    "read_weights",
    "save_result",
    "tune_state",
    "tune_states",
]
