"""make bench: what this server costs on top of LiteLLM, against the loopback provider.

Every figure that is a ratio compares two runs of this session, in pairs, and is the median.
"""

import asyncio
import json
import os
import resource
import signal
import statistics
import subprocess
import sys
import tempfile
import time
from datetime import date, datetime
from pathlib import Path

import httpx
from client import Server, free_port, load_main, memory, message
from provider import Provider

HERE = Path(__file__).parent
CORES = sorted(os.sched_getaffinity(0))
PAIRS = 3
MODEL = "openai/gpt-4o"

# A bare client of LiteLLM: STREAMS streams at once, its CPU seconds per delta on the last line.
BARE = """
import asyncio, os, sys, time
os.environ["LITELLM_LOCAL_MODEL_COST_MAP"] = "True"
import litellm
async def stream(enough=None):
    deltas = 0
    messages = [{"role": "user", "content": "hello"}]
    async for chunk in await litellm.acompletion(sys.argv[1], messages=messages, stream=True):
        deltas += bool(chunk.choices[0].delta.content)
        if deltas == enough:
            break
    return deltas
async def main():
    await stream(enough=1)
    began = time.process_time()
    deltas = sum(await asyncio.gather(*(stream() for _ in range(int(sys.argv[2])))))
    print((time.process_time() - began) / deltas, flush=True)
    os._exit(0)
asyncio.run(main())
"""
IMPORTS = """
import os
os.environ["LITELLM_LOCAL_MODEL_COST_MAP"] = "True"
import uvicorn
from dotenv import load_dotenv
from fastapi import FastAPI, Request
from fastapi.middleware.cors import CORSMiddleware
from fastapi.responses import Response, StreamingResponse
from fastapi.staticfiles import StaticFiles
from agents import Agent, Runner
from agents.extensions.models.litellm_model import LitellmModel
from chatkit.server import ChatKitServer, StreamingResult
from chatkit.store import Store
from chatkit.agents import AgentContext, stream_agent_response, ThreadItemConverter
os._exit(0)
"""


def say(text: str) -> None:
    print(f"{datetime.now():%H:%M:%S}  {text}", file=sys.stderr, flush=True)


def wait_for(url: str) -> None:
    """Until something answers there."""
    while True:
        try:
            httpx.get(url)
            return
        except httpx.ConnectError:
            time.sleep(0.01)


class Upstream:
    """The loopback provider as a process of its own."""

    def __init__(self, deltas: int, per_second: float):
        self.port = free_port()
        arguments = [sys.executable, str(HERE / "provider.py"), str(self.port), str(deltas), str(per_second)]
        self.process = subprocess.Popen(arguments)
        wait_for(f"http://127.0.0.1:{self.port}/")

    def environment(self) -> dict[str, str]:
        return {"OPENAI_BASE_URL": f"http://127.0.0.1:{self.port}/openai", "OPENAI_API_KEY": "key", "PROVIDER": "openai"}

    def __enter__(self):
        return self

    def __exit__(self, *_):
        self.process.terminate()
        self.process.wait()


def serve(upstream: Upstream) -> Server:
    return Server(Path(tempfile.mkdtemp()), upstream.environment()).started()


def cpu(pid: int) -> float:
    fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    return (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")


async def chats(url: str, streams: int, enough: int | None = None) -> list[list[tuple[float, float]]]:
    """Chats at once: for each delta the second in which it was sent and that in which it came."""

    async def chat(http: httpx.AsyncClient) -> list[tuple[float, float]]:
        body = {"type": "threads.create", "params": {"input": message("hello")}}
        seen = []
        async with http.stream("POST", "/chatkit", json=body) as response:
            async for line in response.aiter_lines():
                if '"delta":"' in line:
                    seen.append((float(json.loads(line[6:])["update"]["delta"]), time.time()))
                    if len(seen) == enough:
                        break
        return seen

    async with httpx.AsyncClient(base_url=url, timeout=120, limits=httpx.Limits(max_connections=None)) as http:
        return await asyncio.gather(*(chat(http) for _ in range(streams)))


def percentile_95(values: list[float]) -> float:
    return statistics.quantiles(values, n=20)[-1]


def cpu_per_delta() -> tuple[str, float]:
    ratios = []
    with Upstream(250, 50) as upstream:
        server = serve(upstream)
        asyncio.run(chats(server.url, 1))
        for pair in range(PAIRS):
            began = cpu(server.process.pid)
            deltas = sum(map(len, asyncio.run(chats(server.url, 20))))
            ours = (cpu(server.process.pid) - began) / deltas
            command = [sys.executable, "-c", BARE, MODEL, "20"]
            environment = {**upstream.environment(), "PATH": os.environ["PATH"]}
            bare = float(subprocess.run(command, env=environment, capture_output=True, text=True).stdout.split()[-1])
            ratios.append(ours / bare)
            say(f"CPU per delta, pair {pair + 1}: {ours * 1000:.3f} ms, bare {bare * 1000:.3f} ms")
        server.stop()
    return f"{statistics.median(ratios):.2f}", 1.15


def first_delta() -> tuple[str, float]:
    ratios = []
    with Upstream(500, 0) as upstream:
        server = serve(upstream)
        asyncio.run(chats(server.url, 1))
        for run in range(PAIRS):
            began = time.time()
            seen = asyncio.run(chats(server.url, 16))
            whole = time.time() - began
            first = percentile_95([deltas[0][1] - began for deltas in seen])
            ratios.append(first / whole)
            say(f"first delta, run {run + 1}: {first:.3f} s of {whole:.2f} s")
        server.stop()
    return f"{statistics.median(ratios):.2f}", 0.10


def streams_held() -> tuple[str, None]:
    held = 0
    with Upstream(150, 50) as upstream:
        server = serve(upstream)
        asyncio.run(chats(server.url, 1))
        for thread in os.listdir(f"/proc/{server.process.pid}/task"):
            os.sched_setaffinity(int(thread), CORES[:1])
        for streams in range(10, 101, 5):
            seen = asyncio.run(chats(server.url, streams))
            # The first second is that of the connections.
            late = percentile_95([came - sent for deltas in seen for sent, came in deltas[50:]])
            say(f"{streams} streams: p95 delay {late * 1000:.0f} ms")
            if late > 0.1:
                break
            held = streams
        server.stop()
    return str(held), None


def pages(main) -> tuple[str, float]:
    from chatkit.types import AssistantMessageContent, AssistantMessageItem, ThreadMetadata

    async def measure() -> list[float]:
        ratios = []
        stores = {}
        for count in (100, 100_000):
            store = stores[count] = main.MemoryStore()
            await store.save_thread(ThreadMetadata(id="t", created_at=datetime.now()), {})
            content = [AssistantMessageContent(text="hello " * 20)]
            item = AssistantMessageItem(id="", thread_id="t", created_at=datetime.now(), content=content)
            for number in range(count):
                item.id = f"msg_{number}"
                await store.add_thread_item("t", item, {})
                if count == 100_000:
                    await store.save_thread(ThreadMetadata(id=f"thr_{number}", created_at=datetime.now()), {})
            if count == 100:
                for number in range(count):
                    await store.save_thread(ThreadMetadata(id=f"thr_{number}", created_at=datetime.now()), {})
        for order in ("asc", "desc"):
            for middle in (False, True):
                times = {100: [], 100_000: []}
                for _ in range(300):
                    for count, store in stores.items():
                        began = time.perf_counter()
                        after = f"msg_{count // 2}" if middle else None
                        await store.load_thread_items("t", after, 20, order, {})
                        after = f"thr_{count // 2}" if middle else None
                        await store.load_threads(20, after, order, {})
                        times[count].append(time.perf_counter() - began)
                ratios.append(statistics.median(times[100_000]) / statistics.median(times[100]))
        return ratios

    ratios = asyncio.run(measure())
    say("pages at 100 000 rows ÷ at 100: " + ", ".join(f"{ratio:.2f}" for ratio in ratios))
    return f"{max(ratios):.2f}", 1.5


def bytes_per_message(main) -> tuple[str, None]:
    from chatkit.types import AssistantMessageContent, AssistantMessageItem, ThreadMetadata

    async def fill(count: int) -> None:
        for number in range(count):
            content = [AssistantMessageContent(text=f"message {number} " + "hello " * 20)]
            id = store.generate_item_id("message", thread, {})
            item = AssistantMessageItem(id=id, thread_id="t", created_at=datetime.now(), content=content)
            await store.add_thread_item("t", item, {})

    import tracemalloc

    store, thread = main.MemoryStore(), ThreadMetadata(id="t", created_at=datetime.now())
    asyncio.run(store.save_thread(thread, {}))
    tracemalloc.start()
    before = tracemalloc.get_traced_memory()[0]
    asyncio.run(fill(20_000))
    size = (tracemalloc.get_traced_memory()[0] - before) / 20_000
    tracemalloc.stop()
    return f"{size:.0f}", None


def after_cancelled() -> tuple[str, None]:
    with Upstream(500, 50) as upstream:
        server = serve(upstream)
        sizes = []
        for round in range(24):
            asyncio.run(chats(server.url, 50, enough=1))
            if round in (3, 23):
                sizes.append(memory(server))
        say(f"resident memory after 200 cancelled streams {sizes[0]} KiB, after 1 200 {sizes[1]} KiB")
        server.stop()
    return f"{(sizes[1] - sizes[0]) / 1024:+.1f}", None


def start() -> tuple[str, None]:
    ratios = []
    with Provider() as provider:
        for pair in range(PAIRS + 1):
            began = time.perf_counter()
            server = Server(Path(tempfile.mkdtemp()), {**provider.environment(), "PROVIDER": "openai"})
            wait_for(f"{server.url}/health")
            ours = time.perf_counter() - began
            server.stop()
            began = time.perf_counter()
            subprocess.run([sys.executable, "-c", IMPORTS], env={"PATH": os.environ["PATH"]})
            imports = time.perf_counter() - began
            say(f"start, pair {pair}: {ours:.2f} s, the imports {imports:.2f} s")
            if pair:  # the first fills the caches
                ratios.append(ours / imports)
    return f"{statistics.median(ratios):.2f}", None


def run() -> None:
    resource.setrlimit(resource.RLIMIT_NOFILE, (resource.getrlimit(resource.RLIMIT_NOFILE)[1],) * 2)
    main = load_main(Path(tempfile.mkdtemp()) / "main")
    figures = {
        "CPU per delta ÷ bare LiteLLM's, 20 streams at 50 deltas/s": cpu_per_delta,
        "p95 time to the first delta ÷ length of the run, 16 fast streams": first_delta,
        "streams at 50 deltas/s with p95 delay under 100 ms, on one core": streams_held,
        "page of 20 at 100 000 rows ÷ at 100, worst of both orders, start and middle": lambda: pages(main),
        "bytes per stored message of 130 characters": lambda: bytes_per_message(main),
        "memory that 1 000 cancelled streams add to that after 200, MiB": after_cancelled,
        "start to the first /health ÷ the template's imports": start,
    }
    wanted = sys.argv[1:]
    rows = []
    for name, measure in figures.items():
        if not wanted or any(word in name for word in wanted):
            say(name)
            value, target = measure()
            rows.append((name, value, f"≤ {target:.2f}" if target else ""))
    print(f"\n{len(CORES)} cores, {date.today()}, Python {sys.version.split()[0]}\n")
    print("| figure | value | target |\n|---|---|---|")
    for row in rows:
        print("| " + " | ".join(row) + " |")


if __name__ == "__main__":
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(1))
    run()
