"""The OpenAI-style server: one quantized model, loaded while `/health` already answers.

`serve` runs it from beginning to end. `create_app` and `ServerState` are its two halves, for embedding in another
program. Nothing here is imported by the rest of the package, so the extra `serve` is needed only by who imports this.
"""

from __future__ import annotations

from importlib.util import find_spec

_NEEDED = ("fastapi", "uvicorn", "pydantic", "openai")
_MISSING = [name for name in _NEEDED if find_spec(name) is None]
if _MISSING:
    raise ImportError(f"the server needs {', '.join(_MISSING)}: pip install 'quantload[serve]'", name=_MISSING[0])

from .app import create_app  # noqa: E402  (after the check, so that its message is what the user sees)
from .binding import BindError  # noqa: E402
from .serve import serve  # noqa: E402
from .state import ServerState  # noqa: E402

__all__ = ["BindError", "ServerState", "create_app", "serve"]
