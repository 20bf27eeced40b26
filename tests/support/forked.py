"""Server processes forked from one that has done the imports, which take seconds."""

import importlib
import multiprocessing
import multiprocessing.forkserver
import os
import runpy
import subprocess
import sys
import threading
import warnings
from pathlib import Path
from unittest.mock import patch

import uvicorn._subprocess

SUPPORT = Path(__file__).resolve().parent
# By main.py, and by the libraries with their first request.
IMPORTED = """
    agents.extensions.models.litellm_model anyio._backends._asyncio chatkit.agents chatkit.server
    fastapi.security httpcore litellm litellm._service_logger litellm.proxy._types
    litellm.litellm_core_utils.default_encoding openai.resources.chat
    uvicorn.protocols.http.h11_impl uvicorn.protocols.websockets.auto
"""
COMPILED = ("Response", "ResponseOutputItemAddedEvent", "ResponseOutputItemDoneEvent")
context = multiprocessing.get_context("forkserver")
context.set_forkserver_preload(["forked"])


def warm_up() -> None:
    """Start the process, which does its imports, below, while this one goes on."""
    environment = {
        "PATH": os.environ["PATH"],
        "PYTHONPATH": str(SUPPORT),
        "IMPORT_ALL": "yes",
        "LITELLM_LOCAL_MODEL_COST_MAP": "True",
        "LITELLM_MODE": "PRODUCTION",  # it reads no .env
        "OPENAI_AGENTS_DISABLE_TRACING": "true",
    }
    with patch.dict(os.environ, environment, clear=True):
        multiprocessing.forkserver.ensure_running()


if os.environ.pop("IMPORT_ALL", ""):
    runpy.run_path(str(SUPPORT / "only_loopback" / "sitecustomize.py"))
    for name in IMPORTED.split():
        importlib.import_module(name)
    for name in COMPILED:  # pydantic does it with the first object, in 0.3 seconds
        getattr(importlib.import_module("openai.types.responses"), name).model_rebuild()
    assert threading.active_count() == 1, threading.enumerate()  # a fork has none of them


def run(arguments: list[str], environment: dict[str, str], folder: str, output) -> None:
    """Do in this fork what `python *arguments` does in a new process: a program, or -m uvicorn."""
    for number in (1, 2):
        os.dup2(output.fileno(), number)
    output.close()
    for stream in (sys.stdout, sys.stderr):
        stream.reconfigure(line_buffering=True)
    multiprocessing.process._parent_process = None  # a new process is nobody's worker
    multiprocessing.current_process()._config["daemon"] = False  # it may have workers, forks, too
    uvicorn._subprocess.spawn = multiprocessing.get_context("fork")
    os.environ.clear()
    os.environ.update(environment)
    os.chdir(folder)
    program = arguments[0]
    sys.path[:0] = [str(Path(program).parent), *environment["PYTHONPATH"].split(os.pathsep)]
    module = environment.get("PYTHONWARNINGS", "__main__").rpartition(":")[2]
    warnings.filterwarnings("error", category=DeprecationWarning, module=module)
    if program == "-m":
        sys.argv = arguments[1:]
        runpy.run_module(sys.argv[0], run_name="__main__", alter_sys=True)
    else:
        sys.argv = arguments
        runpy.run_path(program, run_name="__main__")


class Forked:
    """A program in a fork, with the methods of subprocess.Popen that the tests use."""

    def __init__(self, arguments: list[str], environment: dict[str, str], folder: Path):
        reader, writer = context.Pipe(duplex=False)
        self.process = context.Process(
            target=run, args=(arguments, environment, str(folder), writer), daemon=True
        )
        self.process.start()
        writer.close()
        self.pid = self.process.pid
        self.stdout = os.fdopen(os.dup(reader.fileno()), encoding="utf-8", errors="replace")
        reader.close()
        self.send_signal = lambda number: os.kill(self.pid, number)
        self.kill = self.process.kill

    def poll(self) -> int | None:
        return self.process.exitcode

    def wait(self, seconds: float) -> int:
        self.process.join(seconds)
        if self.process.exitcode is None:
            raise subprocess.TimeoutExpired(str(self.pid), seconds)
        return self.process.exitcode
