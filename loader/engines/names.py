"""What engines call the schemes: imported in each of their processes, and so without torch."""

from __future__ import annotations

from ..schemes.names import ALIASES, AUTO, SCHEME_NAMES

SCHEMES = tuple(name for name in SCHEME_NAMES if name not in (AUTO, "none", *ALIASES))
"""The schemes that an engine can be told to use."""
LOAD_FORMAT = "quantload"
"""What vLLM calls our way of reading checkpoints."""
PREFIX = "quantload_"
"""Before the name of a scheme it is ours beyond doubt, whatever the engine calls its own."""
