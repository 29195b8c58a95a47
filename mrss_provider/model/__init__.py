"""RWKV-6 and RWKV-7 on torch: checkpoints, forward passes, states. Knows no text and no HTTP."""

from mrss_provider.model.config import ModelConfig
from mrss_provider.model.model import Model, load_model
from mrss_provider.model.state import StatePool, StateSnapshot

__all__ = ["Model", "ModelConfig", "StatePool", "StateSnapshot", "load_model"]
