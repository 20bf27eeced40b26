"""make bench: what this server costs on top of openai-agents, against the loopback provider.

    python tests/bench.py [--main FILE] [WORD ...]

Words select figures by their names. With --main another main.py is measured as well, each run right
after ours, and the ratio of the two is shown. Of several runs the median counts.
"""

import argparse
import asyncio
import os
import resource
import signal
import statistics
import subprocess
import sys
import tempfile
import time
from contextlib import contextmanager
from datetime import date, datetime
from pathlib import Path

import httpx

sys.path.extend(f"{Path(__file__).parent}/{name}" for name in ("support", "examples"))

import client
from client import NO_TLS, POSTGRES, SUPPORT, Server, free_port, load_main, memory

CORES = sorted(os.sched_getaffinity(0))
# openai-agents' own loop over main.py's model and agent, 20 replies at once: CPU seconds per delta.
AGENTS = """
import asyncio, os, sys, time
from pathlib import Path
os.environ["OPENAI_AGENTS_DISABLE_TRACING"] = "true"
sys.path.insert(0, sys.argv[1])
import client
client.MAIN = Path(sys.argv[3])
main = client.load_main(Path(sys.argv[2]), dict(os.environ))
def is_delta(event):
    return event.type == "raw_response_event" and event.data.type == "response.output_text.delta"
async def stream():
    run = main.Runner.run_streamed(main.server.agent, "hello")
    return sum([is_delta(event) async for event in run.stream_events()])
async def run():
    await stream()
    began = time.process_time()
    deltas = sum(await asyncio.gather(*(stream() for _ in range(20))))
    print((time.process_time() - began) / deltas, flush=True)
    os._exit(0)
asyncio.run(run())
"""
IMPORTS = """
import os
os.environ["LITELLM_LOCAL_MODEL_COST_MAP"] = "True"
import uvicorn, dotenv, fastapi.middleware.cors, fastapi.responses, fastapi.staticfiles
import agents.extensions.models.litellm_model, chatkit.server, chatkit.store, chatkit.agents
os._exit(0)
"""


def say(text: str) -> None:
    print(f"{datetime.now():%H:%M:%S}  {text}", file=sys.stderr, flush=True)


def folder() -> Path:
    return Path(tempfile.mkdtemp())


def wait_for(url: str) -> None:
    """Until something answers there."""
    while True:
        try:
            return httpx.get(url, verify=NO_TLS)
        except httpx.ConnectError:
            time.sleep(0.01)


@contextmanager
def upstream(deltas: int, per_second: float):
    """The loopback provider as a process of its own; yields the environment that leads to it."""
    url = f"http://127.0.0.1:{(port := free_port())}"
    program = [sys.executable, str(SUPPORT / "provider.py"), *map(str, (port, deltas, per_second))]
    process = subprocess.Popen(program)
    wait_for(url)
    yield {"OPENAI_BASE_URL": f"{url}/openai", "OPENAI_API_KEY": "key", "PROVIDER": "openai"}
    process.terminate()
    process.wait()


@contextmanager
def served(deltas: int, per_second: float, workers: int = 0, **variables: str):
    """The server in front of that provider; with DATABASE_URL, on PostgreSQL."""
    program = POSTGRES / "postgres_store.py" if "DATABASE_URL" in variables else None
    with upstream(deltas, per_second) as environment:
        server = Server(folder(), environment | variables, program, workers=workers).started()
        chats(server, 2 * server.workers)
        yield server
        server.stop()


def cpu(pid: int) -> float:
    fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    return (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")


def chats(server: Server, streams: int, enough: int | None = None) -> list[list[tuple]]:
    """Chats at once: for each delta the second in which it was sent and that in which it came."""
    found = asyncio.run(client.deltas(server.url, ["hello"] * streams, enough))
    return [[(float(sent), came) for sent, came in deltas] for deltas in found]


def percentile_95(values: list[float]) -> float:
    return statistics.quantiles(values, n=20)[-1]


# ---- The figures: each function measures once, and returns a value for each of its names
def cpu_per_delta(main) -> list[float]:
    program = [sys.executable, "-c", AGENTS, str(SUPPORT), str(folder()), str(client.MAIN)]
    with served(250, 50) as server:
        began = cpu(server.process.pid)
        deltas = sum(map(len, chats(server, 20)))
        ours = (cpu(server.process.pid) - began) / deltas
        output = subprocess.check_output(program, env=server.environment, text=True)
    return [ours / float(output.split()[-1])]


def first_delta(main) -> list[float]:
    with served(500, 0) as server:
        began = time.time()
        seen = chats(server, 16)
        return [percentile_95([deltas[0][1] - began for deltas in seen]) / (time.time() - began)]


def held(server: Server) -> int:
    """How many streams at 50 deltas/s the server sends with a p95 delay under 100 ms."""
    held = 0
    for streams in range(10, 101, 5):
        # The first second is that of the connections.
        delays = [came - sent for seen in chats(server, streams) for sent, came in seen[50:]]
        say(f"{streams} streams: p95 delay {percentile_95(delays) * 1000:.0f} ms")
        if percentile_95(delays) > 0.1:
            break
        held = streams
    return held


def streams_held(main) -> list[float]:
    with served(150, 50) as server:
        for thread in os.listdir(f"/proc/{server.process.pid}/task"):
            os.sched_setaffinity(int(thread), CORES[:1])
        return [held(server)]


def resident_memory(main) -> list[float]:
    with served(500, 50) as server:
        sizes = [memory(server)]
        for _ in range(84):
            chats(server, 50, enough=1)
            sizes.append(memory(server))
    return [sizes[0] / 1024, (sizes[84] - sizes[4]) / 4 / 1024]


def timed(call, *arguments) -> float:
    began = time.perf_counter()
    call(*arguments)
    return time.perf_counter() - began


def start(main) -> list[float]:
    with upstream(1, 0) as environment:
        began = time.perf_counter()
        server = Server(folder(), environment)
        wait_for(f"{server.url}/health")
        ours = time.perf_counter() - began
        times = [timed(chats, server, 1) for _ in range(6)]
        server.stop()
    imports = timed(subprocess.run, [sys.executable, "-c", IMPORTS])
    return [ours / imports, times[0] / statistics.median(times[1:])]


STREAMS = "streams at 50 deltas/s with p95 delay under 100 ms"
# Each function, how often it runs, and its figures with their targets.
FIGURES = [
    (cpu_per_delta, 3, [("CPU per delta ÷ openai-agents' own", 1.10)]),
    (first_delta, 3, [("p95 of the first delta ÷ length of the run, 16 fast streams", 0.10)]),
    (streams_held, 1, [(f"{STREAMS}, on one core", None)]),
    (
        resident_memory,
        1,
        [("MiB after a chat", None), ("MiB that 1,000 cancelled add, of 4,000", None)],
    ),
    (start, 3, [("start ÷ the template's imports", 1.10), ("the first chat ÷ the next", 4)]),
]


def run(all_figures: list[tuple]) -> None:
    """Measure what the words of the command line select, and print a table."""
    resource.setrlimit(resource.RLIMIT_NOFILE, (resource.getrlimit(resource.RLIMIT_NOFILE)[1],) * 2)
    parser = argparse.ArgumentParser(usage=__doc__)
    parser.add_argument("--main", type=Path)
    parser.add_argument("words", nargs="*", metavar="WORD")
    chosen = parser.parse_args()
    files = [client.MAIN, chosen.main.resolve()] if chosen.main else [client.MAIN]
    rows = []
    for measure, times, figures in all_figures:
        if chosen.words and not any(word in str(figures) for word in chosen.words):
            continue
        runs = []
        for client.MAIN in times * files:
            runs.append(measure(load_main(folder())))
            say(f"{client.MAIN}, {figures[0][0]}: {runs[-1]}")
        for (name, target), values in zip(figures, zip(*runs, strict=True), strict=True):
            columns = [list(values[place :: len(files)]) for place in range(len(files))]
            if chosen.main:
                columns.append([ours / other for ours, other in zip(*columns, strict=True)])
            shown = [f"{statistics.median(column):.2f}" for column in columns]
            rows.append([name, *shown, f"≤ {target:.2f}" if target else ""])
    heads = ["figure", "value", *(["of the other", "÷ that"] if chosen.main else []), "target"]
    print(f"\n{len(CORES)} cores, {date.today()}, Python {sys.version.split()[0]}\n")
    for row in (heads, ["---"] * len(heads), *rows):
        print(f"| {' | '.join(row)} |")


signal.signal(signal.SIGTERM, lambda *_: sys.exit(1))
if __name__ == "__main__":
    run(FIGURES)
