"""What the forkserver of forked.py imports first: all that main.py imports, with the network closed."""

import os
import runpy
import threading
from pathlib import Path

runpy.run_path(str(Path(__file__).parent / "only_loopback" / "sitecustomize.py"))
os.environ.update({"LITELLM_LOCAL_MODEL_COST_MAP": "True", "OPENAI_AGENTS_DISABLE_TRACING": "true"})

import agents.extensions.models.litellm_model  # noqa: E402, F401
import chatkit.server  # noqa: E402, F401
import fastapi.security  # noqa: E402, F401
import litellm  # noqa: E402, F401
import litellm.proxy._types  # noqa: E402, F401
import openai.resources.chat  # noqa: E402, F401
import uvicorn.protocols.http.auto  # noqa: E402, F401

import forked  # noqa: E402, F401

assert threading.active_count() == 1, threading.enumerate()  # a fork has none of them
