"""Server processes forked from one that has done the imports already.

They take seconds in each new process. A forked server still runs its program from the first line,
as `__main__`, with an environment made from scratch.
"""

import multiprocessing
import multiprocessing.forkserver
import os
import runpy
import subprocess
import sys
import warnings
from pathlib import Path

SUPPORT = Path(__file__).resolve().parent
context = multiprocessing.get_context("forkserver")
context.set_forkserver_preload(["warm"])


def warm_up() -> None:
    """Start the forkserver, with no variable but these.

    It does its imports while this process goes on.
    """
    environment = dict(os.environ)
    os.environ.clear()
    os.environ.update({"PATH": environment["PATH"], "PYTHONPATH": str(SUPPORT)})
    multiprocessing.forkserver.ensure_running()
    os.environ.clear()
    os.environ.update(environment)


def run(program: str, environment: dict[str, str], folder: str, output) -> None:
    """Do in this fork what `python PROGRAM` does in a new process."""
    for number in (1, 2):
        os.dup2(output.fileno(), number)
    output.close()
    # A new process is nobody's worker, and may have workers.
    multiprocessing.process._parent_process = None
    multiprocessing.current_process()._config["daemon"] = False
    sys.stdin = None  # its number is not that of an open file in the workers
    for stream in (sys.stdout, sys.stderr):
        stream.reconfigure(line_buffering=True)
    os.environ.clear()
    os.environ.update(environment)
    os.chdir(folder)
    sys.argv = [program]
    sys.path[:0] = [str(Path(program).parent), *environment["PYTHONPATH"].split(os.pathsep)]
    warnings.filterwarnings(
        "error", category=DeprecationWarning, module=environment["PYTHONWARNINGS"].split(":")[-1]
    )
    runpy.run_path(program, run_name="__main__")


class Forked:
    """A program in a fork, with the methods of subprocess.Popen that the tests use."""

    def __init__(self, program: str, environment: dict[str, str], folder: Path):
        reader, writer = context.Pipe(duplex=False)
        self.process = context.Process(
            target=run, args=(program, environment, str(folder), writer), daemon=True
        )
        self.process.start()
        writer.close()
        self.pid = self.process.pid
        self.stdout = os.fdopen(os.dup(reader.fileno()), encoding="utf-8", errors="replace")
        reader.close()

    def poll(self) -> int | None:
        return self.process.exitcode

    def wait(self, seconds: float) -> int:
        self.process.join(seconds)
        if self.process.exitcode is None:
            raise subprocess.TimeoutExpired(str(self.pid), seconds)
        return self.process.exitcode

    def send_signal(self, number: int) -> None:
        os.kill(self.pid, number)

    def kill(self) -> None:
        self.process.kill()
