"""`fixed`: what the name says, at every token."""

from mrss_provider.engine.gates.gate import Gate


class Fixed(Gate):
    """Both halves do nothing."""

    name = "fixed"
