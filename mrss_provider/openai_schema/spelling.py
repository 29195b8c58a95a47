"""How a token's bytes, which may be no text by themselves, are spelled in JSON."""

from __future__ import annotations


def num_chars(token: bytes) -> int:
    """Count the characters that begin in `token`."""
    return sum(byte & 0xC0 != 0x80 for byte in token)


def token_text(token: bytes) -> str:
    """Spell a token so that `token_bytes` reads it back exactly."""
    try:
        text = token.decode()
    except UnicodeDecodeError:
        text = ""
    if token and (not text or text.startswith("bytes:")):
        return "bytes:" + "".join(f"\\x{byte:02x}" for byte in token)
    return text


def token_bytes(text: str) -> bytes:
    """Read what `token_text` spelled."""
    if text.startswith("bytes:"):
        return bytes.fromhex(text.removeprefix("bytes:").replace("\\x", ""))
    return text.encode()
