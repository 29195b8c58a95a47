"""The seam: what a front end asks for, what it gets back, and the `Backend` protocol.

A leaf. `AsyncEngine` (in this process) and `Client` (over HTTP) are both a `Backend`, so the
server and the LiteLLM provider are written and tested against this package alone.
"""

from mrss_provider.backend.answer import (
    AGREED,
    CallsReaders,
    Delta,
    DeltaStream,
    Embeddings,
    FinishReason,
    StreamInfo,
    TextPiece,
    TokenLogprob,
    Tokens,
    TokenTrace,
    ToolCallDelta,
    TopLogprob,
    TraceSummary,
    Usage,
)
from mrss_provider.backend.capabilities import (
    CacheStats,
    Embeds,
    EngineStats,
    KeepsSessions,
    Observable,
    SessionInfo,
    Tokenizes,
    TrainedGates,
)
from mrss_provider.backend.protocol import (
    Backend,
    ModelCard,
)
from mrss_provider.backend.request import (
    EmbedRequest,
    GenerateRequest,
    Grammar,
    Message,
    MixtureOptions,
    Reinject,
    Role,
    Tool,
    ToolCall,
    ToolChoice,
)

__all__ = [
    "AGREED",
    "Backend",
    "CacheStats",
    "CallsReaders",
    "Delta",
    "DeltaStream",
    "EmbedRequest",
    "Embeddings",
    "Embeds",
    "EngineStats",
    "FinishReason",
    "GenerateRequest",
    "Grammar",
    "KeepsSessions",
    "Message",
    "MixtureOptions",
    "ModelCard",
    "Observable",
    "Reinject",
    "Role",
    "SessionInfo",
    "StreamInfo",
    "TextPiece",
    "TokenLogprob",
    "TokenTrace",
    "Tokenizes",
    "Tokens",
    "Tool",
    "ToolCall",
    "ToolCallDelta",
    "ToolChoice",
    "TopLogprob",
    "TraceSummary",
    "TrainedGates",
    "Usage",
]
