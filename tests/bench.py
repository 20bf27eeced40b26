"""make bench: what this server costs on top of LiteLLM, measured against the loopback provider.

    python tests/bench.py [--main FILE] [--postgres] [WORD ...]

Words select figures by their names. With --main another main.py is measured as well, each run right
after ours, and the ratio of the two is shown. With --postgres (make bench-postgres) the server runs
on PostgreSQL, with one worker and with two. Of several runs the median counts.
"""

import argparse
import asyncio
import importlib
import json
import os
import resource
import signal
import statistics
import subprocess
import sys
import tempfile
import time
import tracemalloc
from contextlib import contextmanager, nullcontext
from datetime import date, datetime
from pathlib import Path

import httpx
from chatkit.types import AssistantMessageContent, AssistantMessageItem, ThreadMetadata

sys.path.extend(f"{Path(__file__).parent}/{name}" for name in ("support", "examples", "postgres"))

import client
from client import NO_TLS, POSTGRES, SUPPORT, Server, free_port, load_main, memory, processes
from cluster import Database

CORES = sorted(os.sched_getaffinity(0))
# 20 replies at once; the CPU seconds per delta on the last line. `reply` yields whether a chunk is
# a delta: of LiteLLM alone, or of openai-agents' own loop over main.py's model and agent.
MEASURE = """
import asyncio, os, sys, time
from pathlib import Path
{reply}
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
    deltas = sum(await asyncio.gather(*(stream() for _ in range(20))))
    print((time.process_time() - began) / deltas, flush=True)
    os._exit(0)
asyncio.run(run())
"""
LITELLM = """
os.environ["LITELLM_LOCAL_MODEL_COST_MAP"] = "True"
import litellm
async def reply():
    messages = [{"role": "user", "content": "hello"}]
    async for chunk in await litellm.acompletion("openai/gpt-4o", messages=messages, stream=True):
        yield bool(chunk.choices[0].delta.content)
"""
AGENTS = """
sys.path.insert(0, sys.argv[1])
import client
client.MAIN = Path(sys.argv[2])
main = client.load_main(Path(sys.argv[3]), dict(os.environ))
async def reply():
    async for event in main.Runner.run_streamed(main.server.agent, "hello").stream_events():
        yield event.type == "raw_response_event" and event.data.type == "response.output_text.delta"
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
def served(deltas: int, per_second: float, workers: int = 1, **variables: str):
    """The server in front of that provider; with DATABASE_URL, on PostgreSQL."""
    program = POSTGRES / "postgres_store.py" if "DATABASE_URL" in variables else None
    with upstream(deltas, per_second) as environment:
        server = Server(folder(), environment | variables, program, workers=workers).started()
        server.variables = environment
        chats(server, 2 * workers)
        yield server
        server.stop()


def cpu(pid: int) -> float:
    fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    return (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")


def chats(server: Server, streams: int, enough: int | None = None) -> list[list[tuple]]:
    """Chats at once: for each delta the second in which it was sent and that in which it came."""

    async def chat(http: httpx.AsyncClient) -> list[tuple[float, float]]:
        body = {"type": "threads.create", "params": {"input": client.message("hello")}}
        seen = []
        async with http.stream("POST", "/chatkit", json=body) as response:
            async for line in response.aiter_lines():
                if '"delta":"' in line:
                    seen.append((float(json.loads(line[6:])["update"]["delta"]), time.time()))
                    if len(seen) == enough:
                        break
        return seen

    async def run() -> list[list[tuple[float, float]]]:
        options = {"timeout": 120, "limits": httpx.Limits(max_connections=None), "verify": NO_TLS}
        async with httpx.AsyncClient(base_url=server.url, **options) as http:
            return await asyncio.gather(*(chat(http) for _ in range(streams)))

    return asyncio.run(run())


def percentile_95(values: list[float]) -> float:
    return statistics.quantiles(values, n=20)[-1]


# ---- The figures: each function measures once, and returns a value for each of its names ---------


def cpu_per_delta(main) -> list[float]:
    def alone(reply: str, environment: dict[str, str]) -> float:
        command = [sys.executable, "-c", MEASURE.replace("{reply}", reply)]
        command += [str(SUPPORT), str(client.MAIN), str(folder() / "main")]
        environment = {**environment, "PATH": os.environ["PATH"]}
        return float(subprocess.check_output(command, env=environment, text=True).split()[-1])

    with served(250, 50) as server:
        began = cpu(server.process.pid)
        deltas = sum(map(len, chats(server, 20)))
        ours = (cpu(server.process.pid) - began) / deltas
        agents, litellm = (alone(reply, server.variables) for reply in (AGENTS, LITELLM))
    times = ", ".join(f"{value * 1000:.3f} ms" for value in (ours, agents, litellm))
    say(f"CPU per delta of the server, of openai-agents, of LiteLLM: {times}")
    return [ours / agents, ours / litellm]


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


def a_thread(id: str = "t") -> ThreadMetadata:
    return ThreadMetadata(id=id, created_at=datetime.now())


def a_message(id: str = "", text: str = "") -> AssistantMessageItem:
    content = [AssistantMessageContent(text=text + "hello " * 20)]
    return AssistantMessageItem(id=id, thread_id="t", created_at=datetime.now(), content=content)


async def page_ratio(stores: dict) -> float:
    """Time of a page at 100,000 rows ÷ at 100, from the start: the worse of both orders.

    A page from the middle is shown, too: MemoryStore walks there.
    """
    ratios = []
    for order, middle in (("asc", False), ("asc", True), ("desc", False), ("desc", True)):
        times = {count: [] for count in stores}
        for count, store in 300 * list(stores.items()):
            item, thread = (f"{kind}_{count // 2}" if middle else None for kind in ("msg", "thr"))
            began = time.perf_counter()
            await store.load_thread_items("t", item, 20, order, {})
            await store.load_threads(20, thread, order, {})
            times[count].append(time.perf_counter() - began)
        ratios.append(statistics.median(times[100_000]) / statistics.median(times[100]))
    say(f"pages at 100,000 rows ÷ at 100: {[round(ratio, 2) for ratio in ratios]}")
    return max(ratios[::2])


def memory_store(main) -> list[float]:
    async def filled(count: int, threads: bool = True):
        store = main.MemoryStore()
        await store.save_thread(a_thread(), {})
        for number in range(count):
            id = (
                store.generate_item_id("message", a_thread(), {})
                if not threads
                else f"msg_{number}"
            )
            await store.add_thread_item("t", a_message(id, f"{number} "), {})
            if threads:
                await store.save_thread(a_thread(f"thr_{number}"), {})
        return store

    async def measure() -> list[float]:
        ratio = await page_ratio({count: await filled(count) for count in (100, 100_000)})
        tracemalloc.start()
        store = await filled(20_000, threads=False)
        size = tracemalloc.get_traced_memory()[0] / 20_000
        tracemalloc.stop()
        return [ratio, size] if store else []

    return asyncio.run(measure())


def resident_memory(main) -> list[float]:
    with served(500, 50) as server:
        sizes = [memory(server)]
        for _ in range(24):
            chats(server, 50, enough=1)
            sizes.append(memory(server))
    return [sizes[0] / 1024, (sizes[24] - sizes[4]) / 1024]


def start(main) -> list[float]:
    def timed(call, *arguments) -> float:
        began = time.perf_counter()
        call(*arguments)
        return time.perf_counter() - began

    with upstream(1, 0) as environment:
        began = time.perf_counter()
        server = Server(folder(), environment)
        wait_for(f"{server.url}/health")
        ours = time.perf_counter() - began
        times = [timed(chats, server, 1) for _ in range(6)]
        server.stop()
    imports = timed(subprocess.run, [sys.executable, "-c", IMPORTS])
    say(f"start {ours:.2f} s, the imports {imports:.2f} s, chats {[round(t, 3) for t in times]} s")
    return [ours / imports, times[0] / statistics.median(times[1:])]


# ---- PostgreSQL ----------------------------------------------------------------------------------

FILL = (
    """INSERT INTO chatkit_threads (id, owner, data) SELECT 'thr_' || n, '', jsonb_build_object(
    'id', 'thr_' || n, 'created_at', '2026-01-01T00:00:00') FROM generate_series(1, %(count)s) n""",
    """INSERT INTO chatkit_items (thread_id, id, owner, data) SELECT 't', 'msg_' || n, '',
    jsonb_set(%(item)s, '{id}', to_jsonb('msg_' || n)) FROM generate_series(1, %(count)s) n""",
    "ANALYZE",
)


def postgres_store(database) -> type:
    """The recipe's class in this process. It wants a database when it is imported."""
    os.environ["DATABASE_URL"] = database.schema()
    return importlib.import_module("postgres_store").PostgresStore


def postgres_pages(main, database) -> list[float]:
    async def measure() -> float:
        stores = {}
        for count in (100, 100_000):
            url, values = database.schema(), {"count": count, "item": a_message().model_dump_json()}
            stores[count] = postgres_store(database)(url)
            await stores[count].save_thread(a_thread(), {})
            with database.connect(url) as connection:
                for statement in FILL:
                    connection.execute(statement, values if "%" in statement else None)
        ratio = await page_ratio(stores)
        await asyncio.gather(*(store.close() for store in stores.values()))
        return ratio

    return [asyncio.run(measure())]


def round_trips(main, database) -> list[float]:
    """The statements of a thread's second message, counted where they are sent."""

    class Counted(postgres_store(database)):
        async def rows_once(self, *arguments):
            sent.append(sys._getframe(1).f_back.f_code.co_name)
            return await super().rows_once(*arguments)

    async def turns() -> None:
        store, thread = Counted(database.schema()), {}
        server = main.ChatKitServerImpl(store)
        for type in ("threads.create", "threads.add_user_message"):
            sent.clear()
            request = {"type": type, "params": {**thread, "input": client.message("hello")}}
            async for event in await server.process(json.dumps(request), {}):
                thread = thread or {"thread_id": json.loads(event[6:])["thread"]["id"]}
            say(f"{type}: {len(sent)} statements: {', '.join(sent)}")
        await store.close()

    sent: list[str] = []
    asyncio.run(turns())
    return [len(sent)]


def postgres_first_delta(main, database) -> list[float]:
    """One chat after the other on each server, in turns."""
    with served(1, 0) as in_memory, served(1, 0, DATABASE_URL=database.schema()) as stored:
        times: dict[Server, list[float]] = {in_memory: [], stored: []}
        for server in 120 * [in_memory, stored]:
            began = time.time()
            times[server].append(chats(server, 1)[0][0][1] - began)
    # The first chats fill the caches.
    milliseconds = [statistics.median(seen[20:]) * 1000 for seen in times.values()]
    say("first delta in memory {:.1f} ms, on PostgreSQL {:.1f} ms".format(*milliseconds))
    return [milliseconds[1] / milliseconds[0]]


def postgres_streams(main, database) -> list[float]:
    found = []
    for workers in (1, 2):
        with served(150, 50, workers, DATABASE_URL=database.schema()) as server:
            found.append(held(server))
            query = "SELECT count(*) FROM pg_stat_activity WHERE backend_type = 'client backend'"
            with database.connect() as connection:
                connections = connection.execute(query).fetchone()[0] - 1
            each = [memory(server, pid) // 1024 for pid in processes(server)]
            say(f"{workers} workers: {connections} connections, MiB of each process {each}")
    return found


# ---- The table -----------------------------------------------------------------------------------

STREAMS = "streams at 50 deltas/s with p95 delay under 100 ms"
PAGES = "page of 20 at 100,000 rows ÷ at 100, from the start, the worse of both orders"
# Each function, how often it runs, and its figures with their targets.
IN_MEMORY = [
    (cpu_per_delta, 3, [("CPU per delta ÷ openai-agents' own", 1.10), ("÷ LiteLLM's", 1.15)]),
    (first_delta, 3, [("p95 of the first delta ÷ length of the run, 16 fast streams", 0.10)]),
    (streams_held, 1, [(f"{STREAMS}, on one core", None)]),
    (memory_store, 1, [(PAGES, 1.5), ("bytes per stored message of 130 characters", None)]),
    (resident_memory, 1, [("MiB after a chat", None), ("MiB that 1,000 cancelled add", None)]),
    (start, 3, [("start ÷ the template's imports", 1.10), ("the first chat ÷ the next", 4)]),
]
ON_POSTGRES = [
    (postgres_streams, 1, [(f"{STREAMS}, one worker", None), ("the same, two workers", None)]),
    (postgres_pages, 1, [(PAGES, 1.5)]),
    (postgres_first_delta, 1, [("time to the first delta ÷ in memory", None)]),
    (round_trips, 1, [("statements of a message and its reply", None)]),
]


def run() -> None:
    parser = argparse.ArgumentParser(usage=__doc__)
    parser.add_argument("--main", type=Path)
    parser.add_argument("--postgres", action="store_true")
    parser.add_argument("words", nargs="*", metavar="WORD")
    chosen = parser.parse_args()
    resource.setrlimit(resource.RLIMIT_NOFILE, (resource.getrlimit(resource.RLIMIT_NOFILE)[1],) * 2)
    mains, rows = {}, []
    files = [client.MAIN, chosen.main.resolve()] if chosen.main else [client.MAIN]
    for client.MAIN in files:
        mains[client.MAIN] = load_main(folder() / "main")
    with Database() if chosen.postgres else nullcontext() as database:
        for measure, times, figures in ON_POSTGRES if chosen.postgres else IN_MEMORY:
            if chosen.words and not any(word in str(figures) for word in chosen.words):
                continue
            runs = []  # of each the values of each main.py
            for _ in range(times):
                runs.append([])
                for client.MAIN, main in mains.items():
                    runs[-1].append(measure(main, *filter(None, [database])))
                    say(f"{client.MAIN}, {measure.__name__}: {runs[-1][-1]}")
            for place, (name, target) in enumerate(figures):
                columns = list(zip(*([each[place] for each in row] for row in runs), strict=True))
                if len(mains) > 1:
                    columns.append([ours / theirs for ours, theirs in zip(*columns, strict=True)])
                shown = [f"{statistics.median(column):.2f}" for column in columns]
                rows.append([name, *shown, f"≤ {target:.2f}" if target else ""])
    print(f"\n{len(CORES)} cores, {date.today()}, Python {sys.version.split()[0]}\n")
    heads = ["figure", "value", *(["of the other", "÷ that"] if chosen.main else []), "target"]
    for row in (heads, ["---"] * len(heads), *rows):
        print(f"| {' | '.join(row)} |")


if __name__ == "__main__":
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(1))
    run()
