"""What the forkserver of forked.py imports first.

It is all that main.py imports, with the network closed.
"""

import importlib
import os
import runpy
import threading
from pathlib import Path

runpy.run_path(str(Path(__file__).parent / "only_loopback" / "sitecustomize.py"))
os.environ.update({"LITELLM_LOCAL_MODEL_COST_MAP": "True", "OPENAI_AGENTS_DISABLE_TRACING": "true"})

for name in (
    "agents.extensions.models.litellm_model",
    "anyio._backends._asyncio",
    "chatkit.agents",
    "chatkit.server",
    "fastapi.security",
    "httpcore",
    "litellm",
    "litellm._service_logger",
    "litellm.litellm_core_utils.default_encoding",
    "litellm.proxy._types",
    "openai.resources.chat",
    "uvicorn.protocols.http.h11_impl",
    "uvicorn.protocols.websockets.auto",
    "forked",
):
    importlib.import_module(name)

# pydantic compiles a model when the first one is made. These three take 0.3 seconds.
responses = importlib.import_module("openai.types.responses")
for name in ("Response", "ResponseOutputItemAddedEvent", "ResponseOutputItemDoneEvent"):
    getattr(responses, name).model_rebuild()

assert threading.active_count() == 1, threading.enumerate()  # a fork has none of them
