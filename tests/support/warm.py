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
    "chatkit.server",
    "fastapi.security",
    "httpcore",
    "litellm",
    "litellm._service_logger",
    "litellm.proxy._types",
    "openai.resources.chat",
    "uvicorn.protocols.http.auto",
    "forked",
):
    importlib.import_module(name)

assert threading.active_count() == 1, threading.enumerate()  # a fork has none of them
