"""Chat templates: messages and tools to the text that a model reads. A leaf, but for jinja2.

Templates are data (`templates/*.jinja`), each with what ends a turn, a thought and a call in it.
What a user or a tool wrote cannot end a turn, and forges neither a role, a tool's result nor a
thought.
"""

from __future__ import annotations

from mrss_provider.chat.rendering import (
    PromptText,
    render_chat,
    render_prompt,
    turn_starts,
    user_spans,
)
from mrss_provider.chat.template import (
    DEFAULT_TEMPLATE,
    TEMPLATE_SUFFIX,
    TEMPLATES,
    ChatTemplate,
    detect_template,
    load_template,
)
from mrss_provider.chat.tool_grammar import answer_grammar, is_free_text, told_tools

__all__ = [
    "DEFAULT_TEMPLATE",
    "TEMPLATES",
    "TEMPLATE_SUFFIX",
    "ChatTemplate",
    "PromptText",
    "answer_grammar",
    "detect_template",
    "is_free_text",
    "load_template",
    "render_chat",
    "render_prompt",
    "told_tools",
    "turn_starts",
    "user_spans",
]
