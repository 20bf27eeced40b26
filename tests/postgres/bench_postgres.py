"""make bench-postgres: the server on PostgreSQL, with one worker and with two.

    python tests/postgres/bench_postgres.py [WORD ...]

Words select figures by their names.
"""

import asyncio
import importlib
import json
import os
import statistics
import sys
import time
from datetime import datetime
from functools import partial
from pathlib import Path

from chatkit.types import AssistantMessageContent, AssistantMessageItem, ThreadMetadata

sys.path.append(str(Path(__file__).parents[1]))

import bench
import client
from bench import STREAMS, Server, chats, held, say, served
from cluster import Database

FILL = (
    """INSERT INTO chatkit_threads (id, owner, data) SELECT 'thr_' || n, '', jsonb_build_object(
    'id', 'thr_' || n, 'created_at', '2026-01-01T00:00:00') FROM generate_series(1, %(count)s) n""",
    """INSERT INTO chatkit_items (thread_id, id, owner, data) SELECT 't', 'msg_' || n, '',
    jsonb_set(%(item)s, '{id}', to_jsonb('msg_' || n)) FROM generate_series(1, %(count)s) n""",
    "ANALYZE",
)


def store_class(database) -> type:
    """The recipe's class in this process. It wants a database when it is imported."""
    os.environ["DATABASE_URL"] = database.schema()
    return importlib.import_module("postgres_store").PostgresStore


PAGES = "page of 20 at 100,000 rows ÷ at 100, from the start, the worse of both orders"


def a_thread(id: str = "t") -> ThreadMetadata:
    return ThreadMetadata(id=id, created_at=datetime.now())


def a_message(id: str) -> AssistantMessageItem:
    content = [AssistantMessageContent(text="hello " * 20)]
    return AssistantMessageItem(id=id, thread_id="t", created_at=datetime.now(), content=content)


async def page_ratio(stores: dict) -> float:
    """Time of a page at 100,000 rows ÷ at 100, from the start: the worse of both orders."""
    ratios = []
    for order in ("asc", "desc"):
        times = {count: [] for count in stores}
        for count, store in 300 * list(stores.items()):
            began = time.perf_counter()
            await store.load_thread_items("t", None, 20, order, {})
            await store.load_threads(20, None, order, {})
            times[count].append(time.perf_counter() - began)
        ratios.append(statistics.median(times[100_000]) / statistics.median(times[100]))
    return max(ratios)


def pages(main, database) -> list[float]:
    async def measure() -> float:
        stores = {}
        for count in (100, 100_000):
            url, item = database.schema(), a_message("m").model_dump_json()
            values = {"count": count, "item": item}
            stores[count] = store_class(database)(url)
            await stores[count].save_thread(a_thread(), {})
            with database.connect(url) as connection:
                for statement in FILL:
                    connection.execute(statement, values if "%" in statement else None)
        ratio = await page_ratio(stores)
        await asyncio.gather(*(store.close() for store in stores.values()))
        return ratio

    return [asyncio.run(measure())]


def first_delta(main, database) -> list[float]:
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


def streams(main, database) -> list[float]:
    found = []
    for workers in (0, 2):
        with served(150, 50, workers, DATABASE_URL=database.schema()) as server:
            found.append(held(server))
            query = "SELECT count(*) FROM pg_stat_activity WHERE backend_type = 'client backend'"
            with database.connect() as connection:
                connections = connection.execute(query).fetchone()[0] - 1
            each = [client.memory(server, pid) // 1024 for pid in client.processes(server)]
            say(f"{server.workers} workers: {connections} connections, MiB of each process {each}")
    return found


def round_trips(main, database) -> list[float]:
    """The statements of a thread's second message, counted where they are sent."""

    class Counted(store_class(database)):
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


FIGURES = [
    (streams, 1, [(f"{STREAMS}, one worker", None), ("the same, two workers", None)]),
    (pages, 1, [(PAGES, 1.5)]),
    (first_delta, 1, [("time to the first delta ÷ in memory", None)]),
    (round_trips, 1, [("statements of a message and its reply", None)]),
]

if __name__ == "__main__":
    with Database() as database:
        bench.run([(partial(measure, database=database), *more) for measure, *more in FIGURES])
