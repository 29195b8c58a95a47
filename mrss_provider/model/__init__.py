"""RWKV-6 and RWKV-7 on torch: checkpoints, forward passes, states. Knows no text and no HTTP."""

from mrss_provider.model.config import ModelConfig
from mrss_provider.model.model import Model, load_model
from mrss_provider.model.state import StatePool, StateSnapshot
from mrss_provider.model.state_metadata import StateMetadata
from mrss_provider.model.tuned_state import (
    OrientationCheck,
    TunedState,
    average_states,
    check_orientation,
    load_tuned_state,
    save_tuned_state,
)

__all__ = [
    "Model",
    "ModelConfig",
    "OrientationCheck",
    "StateMetadata",
    "StatePool",
    "StateSnapshot",
    "TunedState",
    "average_states",
    "check_orientation",
    "load_model",
    "load_tuned_state",
    "save_tuned_state",
]
