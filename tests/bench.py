"""make bench: what this server costs on top of LiteLLM, measured against the loopback provider.

make bench-postgres: the same server on PostgreSQL, with one worker and with two. Every ratio is the
median of pairs of runs, measured one right after the other. Words on the command line select
figures by their names.
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
from contextlib import nullcontext
from datetime import date, datetime
from pathlib import Path

import httpx
from chatkit.types import AssistantMessageContent, AssistantMessageItem, ThreadMetadata

sys.path.insert(0, str(Path(__file__).resolve().parent / "support"))
sys.path.insert(0, str(Path(__file__).resolve().parent / "examples"))

from client import NO_TLS, SUPPORT, Server, free_port, load_main, memory, message, processes
from cluster import Database
from provider import Provider

CORES = sorted(os.sched_getaffinity(0))
PAIRS = 3
MODEL = "openai/gpt-4o"

# STREAMS replies at once; the CPU seconds per delta on the last line.
# `reply` yields whether a chunk is a delta.
MEASURE = """
async def stream(enough=None):
    deltas = 0
    async for is_delta in reply():
        deltas += is_delta
        if deltas == enough:
            break
    return deltas
async def run():
    await stream(enough=1)
    began = time.process_time()
    deltas = sum(await asyncio.gather(*(stream() for _ in range(int(sys.argv[2])))))
    print((time.process_time() - began) / deltas, flush=True)
    os._exit(0)
asyncio.run(run())
"""
# LiteLLM alone.
BARE = f"""
import asyncio, os, sys, time
os.environ["LITELLM_LOCAL_MODEL_COST_MAP"] = "True"
import litellm
async def reply():
    messages = [{{"role": "user", "content": "hello"}}]
    async for chunk in await litellm.acompletion(sys.argv[1], messages=messages, stream=True):
        yield bool(chunk.choices[0].delta.content)
{MEASURE}"""
# openai-agents' own loop over main.py's model and agent, without chatkit and HTTP.
# Otherwise the same.
AGENTS = f"""
import asyncio, os, sys, tempfile, time
from pathlib import Path
sys.path.insert(0, sys.argv[1])
from client import load_main
main = load_main(Path(tempfile.mkdtemp()) / "main", dict(os.environ))
async def reply():
    async for event in main.Runner.run_streamed(main.server.agent, "hello").stream_events():
        yield event.type == "raw_response_event" and event.data.type == "response.output_text.delta"
{MEASURE}"""
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
            httpx.get(url, verify=NO_TLS)
            return
        except httpx.ConnectError:
            time.sleep(0.01)


class Upstream:
    """The loopback provider as a process of its own."""

    def __init__(self, deltas: int, per_second: float):
        self.port = free_port()
        arguments = [
            sys.executable,
            str(SUPPORT / "provider.py"),
            str(self.port),
            str(deltas),
            str(per_second),
        ]
        self.process = subprocess.Popen(arguments)
        wait_for(f"http://127.0.0.1:{self.port}/")

    def environment(self) -> dict[str, str]:
        return {
            "OPENAI_BASE_URL": f"http://127.0.0.1:{self.port}/openai",
            "OPENAI_API_KEY": "key",
            "PROVIDER": "openai",
        }

    def __enter__(self):
        return self

    def __exit__(self, *_):
        self.process.terminate()
        self.process.wait()


def serve(upstream: Upstream, **environment: str) -> Server:
    """The server, ready; with DATABASE_URL, on PostgreSQL."""
    return Server(Path(tempfile.mkdtemp()), {**upstream.environment(), **environment}).started()


def cpu(pid: int) -> float:
    fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    return (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")


async def chats(
    url: str, streams: int, enough: int | None = None
) -> list[list[tuple[float, float]]]:
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

    limits = httpx.Limits(max_connections=None)
    async with httpx.AsyncClient(base_url=url, timeout=120, limits=limits, verify=NO_TLS) as http:
        return await asyncio.gather(*(chat(http) for _ in range(streams)))


def percentile_95(values: list[float]) -> float:
    return statistics.quantiles(values, n=20)[-1]


def cpu_per_delta() -> list[tuple[str, float]]:
    """CPU per delta, divided by that of openai-agents' own loop, and by that of LiteLLM alone."""
    ratios = []
    with Upstream(250, 50) as upstream:
        server = serve(upstream)
        asyncio.run(chats(server.url, 1))
        for pair in range(PAIRS):
            began = cpu(server.process.pid)
            deltas = sum(map(len, asyncio.run(chats(server.url, 20))))
            ours = (cpu(server.process.pid) - began) / deltas
            environment = {**upstream.environment(), "PATH": os.environ["PATH"]}
            alone = []
            for program, argument in (AGENTS, str(SUPPORT)), (BARE, MODEL):
                command = [sys.executable, "-c", program, argument, "20"]
                output = subprocess.run(
                    command, env=environment, capture_output=True, text=True
                ).stdout
                alone.append(float(output.split()[-1]))
            ratios.append([ours / theirs for theirs in alone])
            theirs = ", ".join(f"{value * 1000:.3f} ms" for value in alone)
            say(
                f"CPU per delta, pair {pair + 1}: {ours * 1000:.3f} ms; "
                f"openai-agents, LiteLLM alone: {theirs}"
            )
        server.stop()
    return [
        (f"{statistics.median(values):.2f}", target)
        for values, target in zip(zip(*ratios, strict=True), (1.10, 1.15), strict=True)
    ]


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


def held(server: Server) -> int:
    """How many streams at 50 deltas/s the server sends with a p95 delay under 100 ms."""
    held = 0
    for streams in range(10, 101, 5):
        seen = asyncio.run(chats(server.url, streams))
        # The first second is that of the connections.
        late = percentile_95([came - sent for deltas in seen for sent, came in deltas[50:]])
        say(f"{streams} streams: p95 delay {late * 1000:.0f} ms")
        if late > 0.1:
            break
        held = streams
    return held


def streams_held() -> tuple[str, None]:
    with Upstream(150, 50) as upstream:
        server = serve(upstream)
        asyncio.run(chats(server.url, 1))
        for thread in os.listdir(f"/proc/{server.process.pid}/task"):
            os.sched_setaffinity(int(thread), CORES[:1])
        streams = held(server)
        server.stop()
    return str(streams), None


def stored_message(id: str, text: str) -> AssistantMessageItem:
    content = [AssistantMessageContent(text=text)]
    return AssistantMessageItem(id=id, thread_id="t", created_at=datetime.now(), content=content)


async def page_ratio(stores: dict) -> float:
    """Time of a page at 100,000 rows divided by that at 100.

    The worst of both orders, start and middle.
    """
    ratios = []
    for order in ("asc", "desc"):
        for middle in (False, True):
            times = {count: [] for count in stores}
            for _ in range(300):
                for count, store in stores.items():
                    began = time.perf_counter()
                    await store.load_thread_items(
                        "t", f"msg_{count // 2}" if middle else None, 20, order, {}
                    )
                    await store.load_threads(20, f"thr_{count // 2}" if middle else None, order, {})
                    times[count].append(time.perf_counter() - began)
            ratios.append(statistics.median(times[100_000]) / statistics.median(times[100]))
    say("pages at 100,000 rows ÷ at 100: " + ", ".join(f"{ratio:.2f}" for ratio in ratios))
    return max(ratios)


def pages(main) -> tuple[str, float]:
    async def measure() -> float:
        stores = {}
        for count in (100, 100_000):
            store = stores[count] = main.MemoryStore()
            thread = ThreadMetadata(id="t", created_at=datetime.now())
            item = stored_message("", "hello " * 20)
            await store.save_thread(thread, {})
            for number in range(count):
                item.id, thread.id = f"msg_{number}", f"thr_{number}"
                await store.add_thread_item("t", item, {})
                await store.save_thread(thread, {})
        return await page_ratio(stores)

    return f"{asyncio.run(measure()):.2f}", 1.5


def bytes_per_message(main) -> tuple[str, None]:
    async def fill(count: int) -> None:
        for number in range(count):
            id = store.generate_item_id("message", thread, {})
            await store.add_thread_item(
                "t", stored_message(id, f"message {number} " + "hello " * 20), {}
            )

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
        say(
            f"resident memory after 200 cancelled streams {sizes[0]} KiB, "
            f"after 1 200 {sizes[1]} KiB"
        )
        server.stop()
    return f"{(sizes[1] - sizes[0]) / 1024:+.1f}", None


def start() -> tuple[str, None]:
    ratios = []
    with Provider() as provider:
        for pair in range(PAIRS + 1):
            began = time.perf_counter()
            server = Server(
                Path(tempfile.mkdtemp()), {**provider.environment(), "PROVIDER": "openai"}
            )
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


# ---- PostgreSQL -----------------------------------------------------------------

FILL = """
INSERT INTO chatkit_threads (id, owner, data)
SELECT 'thr_' || n, '', jsonb_build_object('id', 'thr_' || n, 'created_at', '2026-01-01T00:00:00')
FROM generate_series(0, %(count)s - 1) n;
"""
FILL_ITEMS = """
INSERT INTO chatkit_items (thread_id, id, owner, data)
SELECT 't', 'msg_' || n, '', %(item)s::jsonb || jsonb_build_object('id', 'msg_' || n)
FROM generate_series(0, %(count)s - 1) n;
"""


def postgres_pages(main, database) -> tuple[str, float]:
    from postgres_store import PostgresStore

    async def measure() -> float:
        stores = {}
        for count in (100, 100_000):
            url = database.schema()
            store = stores[count] = PostgresStore(url)
            await store.save_thread(ThreadMetadata(id="t", created_at=datetime.now()), {})
            item = stored_message("", "hello " * 20)
            with database.connect(url) as connection:
                connection.execute(FILL, {"count": count})
                connection.execute(FILL_ITEMS, {"count": count, "item": item.model_dump_json()})
                connection.execute("ANALYZE")
        ratio = await page_ratio(stores)
        await asyncio.gather(*(store.close() for store in stores.values()))
        return ratio

    return f"{asyncio.run(measure()):.2f}", 1.5


def round_trips(main, database) -> tuple[str, None]:
    """The statements of a thread's second message, counted where they are sent."""
    from postgres_store import PostgresStore

    class Counted(PostgresStore):
        async def rows_once(self, *arguments):
            sent.append(sys._getframe(1).f_back.f_code.co_name)
            return await super().rows_once(*arguments)

    async def turns() -> None:
        store = Counted(database.schema())
        server = main.ChatKitServerImpl(store)
        params = {"input": message("hello")}
        for type in ("threads.create", "threads.add_user_message"):
            sent.clear()
            async for event in await server.process(
                json.dumps({"type": type, "params": params}).encode(), {}
            ):
                params["thread_id"] = (
                    params.get("thread_id") or json.loads(event[6:])["thread"]["id"]
                )
            say(f"{type}: {len(sent)} statements: {', '.join(sent)}")
        await store.close()

    sent: list[str] = []
    asyncio.run(turns())
    return str(len(sent)), None


def postgres_first_delta(database) -> tuple[str, None]:
    """One chat after the other on each server, in turns."""
    with Upstream(1, 0) as upstream:
        servers = [serve(upstream), serve(upstream, DATABASE_URL=database.schema())]
        times: list[list[float]] = [[], []]
        for number in range(120):
            for server, seen in zip(servers, times, strict=True):
                began = time.time()
                ((delta,),) = asyncio.run(chats(server.url, 1))
                if number >= 20:  # the first chats fill the caches
                    seen.append(delta[1] - began)
        memory_ms, postgres_ms = (statistics.median(seen) * 1000 for seen in times)
        say(f"first delta in memory {memory_ms:.1f} ms, on PostgreSQL {postgres_ms:.1f} ms")
        for server in servers:
            server.stop()
    return f"{postgres_ms / memory_ms:.2f}", None


def postgres_streams(database, workers: int) -> tuple[str, None]:
    with Upstream(150, 50) as upstream:
        server = serve(upstream, WORKERS=str(workers), DATABASE_URL=database.schema())
        asyncio.run(chats(server.url, 4))
        streams = held(server)
        with database.connect() as connection:
            query = "SELECT count(*) FROM pg_stat_activity WHERE backend_type = 'client backend'"
            connections = connection.execute(query).fetchone()[0] - 1
        each = [memory(server, pid) // 1024 for pid in processes(server)]
        say(f"{workers} workers: {connections} connections, MiB of each process {each}")
        server.stop()
    return str(streams), None


def run() -> None:
    resource.setrlimit(resource.RLIMIT_NOFILE, (resource.getrlimit(resource.RLIMIT_NOFILE)[1],) * 2)
    main = load_main(Path(tempfile.mkdtemp()) / "main")
    wanted = sys.argv[1:]
    figures = {
        (
            "CPU per delta ÷ openai-agents' own loop, 20 streams at 50 deltas/s",
            "… ÷ LiteLLM alone",
        ): cpu_per_delta,
        "p95 time to the first delta ÷ length of the run, 16 fast streams": first_delta,
        "streams at 50 deltas/s with p95 delay under 100 ms, on one core": streams_held,
        "page of 20 at 100,000 rows ÷ at 100, worst of both orders, start and middle": lambda: (
            pages(main)
        ),
        "bytes per stored message of 130 characters": lambda: bytes_per_message(main),
        "memory that 1,000 cancelled streams add to that after 200, MiB": after_cancelled,
        "start to the first /health ÷ the template's imports": start,
    }
    with Database() if "--postgres" in wanted else nullcontext() as database:
        if database:
            wanted.remove("--postgres")
            figures = {
                "streams at 50 deltas/s with p95 delay under 100 ms, one worker": lambda: (
                    postgres_streams(database, 1)
                ),
                "the same, two workers": lambda: postgres_streams(database, 2),
                "page of 20 at 100,000 rows ÷ at 100, worst case": lambda: postgres_pages(
                    main, database
                ),
                "time to the first delta ÷ in memory": lambda: postgres_first_delta(database),
                "statements of a message and its reply": lambda: round_trips(main, database),
            }
        rows = []
        for names, measure in figures.items():
            names = [names] if isinstance(names, str) else names
            if not wanted or any(word in name for word in wanted for name in names):
                say(names[0])
                values = measure()
                values = [values] if len(names) == 1 else values
                for name, (value, target) in zip(names, values, strict=True):
                    rows.append((name, value, f"≤ {target:.2f}" if target else ""))
    print(f"\n{len(CORES)} cores, {date.today()}, Python {sys.version.split()[0]}\n")
    print("| figure | value | target |\n|---|---|---|")
    for row in rows:
        print("| " + " | ".join(row) + " |")


if __name__ == "__main__":
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(1))
    run()
