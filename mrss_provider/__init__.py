"""Gated mixtures of recurrent states, as a LiteLLM provider."""
