"""Several workers on PostgreSQL.

Their Store under load, workers that die, and a database that is slow or gone.
"""

import asyncio
import json
import os
import signal
import threading
from collections import Counter
from pathlib import Path

import httpx
import pytest
from chatkit.types import AssistantMessageItem

from client import (
    NO_TLS,
    POSTGRES,
    Chat,
    Reading,
    Server,
    done,
    error_of,
    items_shown,
    many,
    message,
    text_of,
    until,
)
from provider import Silence, Text, ToolCall
from test_store import NOW, thread

pytestmark = pytest.mark.anyio
UNAVAILABLE = "The database is unavailable. Try again in a moment."


@pytest.fixture(scope="module")
def url(database):
    return database.schema()


def workers(
    provider,
    folder: Path,
    url: str,
    changes: dict[str, str] | None = None,
    fork: bool = True,
    **more: str,
):
    """Two workers on the database, started."""
    environment = {**provider.environment(), "PROVIDER": "openai", "DATABASE_URL": url, **more}
    served = POSTGRES / "served.py"
    return Server(folder, environment, served, fork, changes, workers=2).started()


@pytest.fixture(scope="module")
def server(provider, url, tmp_path_factory):
    """Two workers in new processes, each with fewer connections than it has chats."""
    options = json.dumps({"max_size": 4, "timeout": 30})
    folder = tmp_path_factory.mktemp("postgres")
    server = workers(provider, folder, url, fork=False, STORE_OPTIONS=options)
    yield server
    assert server.stop() == 0


@pytest.fixture
def chat(server):
    return Chat(server.url)


def worker(chat: Chat) -> int:
    """The process that answers on the chat's connection."""
    return chat.http.get("/worker").json()


async def left(server: Server) -> None:
    """Return when each worker has noticed which clients are gone.

    By then it has answered requests that came later.
    """
    answers: Counter[int] = Counter()
    while len(answers) < 2 or min(answers.values()) < 5:
        answers[await asyncio.to_thread(worker, Chat(server.url))] += 1


class Locked:
    """A thread's row that another transaction holds: whatever is written to the thread waits."""

    def __init__(self, database, url: str, thread_id: str):
        self.database, self.connection = database, database.connect(url)
        self.connection.execute("BEGIN")
        self.connection.execute("SELECT FROM chatkit_threads WHERE id = %s FOR UPDATE", [thread_id])

    async def awaited(self) -> None:
        """Return when somebody waits for the row."""
        with self.database.connect() as connection:
            waiting = "SELECT 1 FROM pg_stat_activity WHERE %s = ANY(pg_blocking_pids(pid))"
            await until(
                lambda: connection.execute(waiting, [self.connection.info.backend_pid]).fetchone()
            )

    def release(self) -> None:
        self.connection.close()


# ---- The Store ------------------------------------------------------------------


async def test_workers_that_start_at_once_make_one_schema(database, postgres_store):
    url = database.schema()
    stores = [postgres_store.PostgresStore(url) for _ in range(8)]
    await asyncio.gather(
        *(store.save_thread(thread(f"thr_{number}"), {}) for number, store in enumerate(stores))
    )
    assert len((await stores[0].load_threads(100, None, "asc", {})).data) == 8
    await asyncio.gather(*(store.close() for store in stores))


async def test_workers_that_add_at_once_agree_on_the_order(database, postgres_store):
    """Who reads page after page while they add misses nothing."""
    url = database.schema()
    stores = [postgres_store.PostgresStore(url) for _ in range(3)]
    await stores[0].save_thread(thread("thr_1"), {})

    async def add(name: int) -> None:
        row = AssistantMessageItem(id="", thread_id="thr_1", created_at=NOW, content=[])
        for number in range(150):
            row = row.model_copy(update={"id": f"msg_{name}_{number}"})
            await stores[name % 2].add_thread_item("thr_1", row, {})

    async def read() -> None:
        while len(seen) < 8 * 150:
            page = await stores[2].load_thread_items(
                "thr_1", seen[-1] if seen else None, 50, "asc", {}
            )
            seen.extend(row.id for row in page.data)

    seen: list[str] = []
    await asyncio.wait_for(asyncio.gather(read(), *map(add, range(8))), 60)
    stored = await stores[0].load_thread_items("thr_1", None, 10_000, "asc", {})
    assert seen == [row.id for row in stored.data]
    await asyncio.gather(*(store.close() for store in stores))


async def test_a_pool_of_one_connection_serves_all(database, postgres_store):
    store = postgres_store.PostgresStore(database.schema(), max_size=1)
    await asyncio.gather(*(store.save_thread(thread(f"thr_{number}"), {}) for number in range(100)))
    assert len((await store.load_threads(1000, None, "asc", {})).data) == 100
    await store.close()


async def test_nothing_is_prepared(database, postgres_store):
    """Behind a pooler, the name of a prepared statement may be that of another client's."""
    store = postgres_store.PostgresStore(database.schema(), max_size=1)
    for _ in range(20):
        await store.load_threads(1, None, "asc", {})
    (connection,) = store.idle
    prepared = await connection.execute("SELECT statement FROM pg_prepared_statements")
    assert await prepared.fetchall() == []
    await store.close()


async def test_deleting_a_thread_deletes_its_items(database, postgres_store):
    url = database.schema()
    store = postgres_store.PostgresStore(url)
    await store.save_thread(thread("thr_1"), {})
    await store.add_thread_item(
        "thr_1", AssistantMessageItem(id="m", thread_id="thr_1", created_at=NOW, content=[]), {}
    )
    await store.delete_thread("thr_1", {})
    with database.connect(url) as connection:
        assert connection.execute("SELECT count(*) FROM chatkit_items").fetchone() == (0,)
    await store.close()


# ---- Workers --------------------------------------------------------------------


async def test_workers_behind_a_pooler(provider, database, tmp_path):
    """In transaction mode, with two connections to the database for all of them."""
    if not (url := database.pooled()):
        pytest.skip("PgBouncer is not on this machine, or the database is that of DATABASE_URL")
    server = workers(provider, tmp_path, url)

    def use(number: int) -> list[str]:
        """Three messages; every second thread is deleted afterwards. The texts of all replies."""
        chat = Chat(server.url)
        replies = [chat.say(f"{number} says {text}") for text in ("one", "two", "three")]
        assert len(chat.items()) == 6
        if number % 2:
            chat.get("threads.delete", thread_id=chat.thread_id)
        return [text_of(item) for events in replies for item in done(events)]

    replies = await asyncio.gather(*(asyncio.to_thread(use, number) for number in range(40)))
    said = [f"{number} says {text}" for number in range(40) for text in ("one", "two", "three")]
    assert [text for texts in replies for text in texts] == [f"You said: {text}" for text in said]
    kept = httpx.get(f"{server.url}/debug/threads", verify=NO_TLS).json().values()
    stored = [text for thread in kept for item in thread["items"] for text in item["content"]]
    assert sorted(stored) == sorted(
        reply
        for text in said
        if int(text.split()[0]) % 2 == 0
        for reply in (text, f"You said: {text}")
    )
    assert server.stop() == 0
    assert "Traceback" not in "\n".join(server.log) and "unavailable" not in "\n".join(server.log)


def test_a_chat_goes_on_with_another_worker(server, provider, chat):
    chat.say("one")
    others = (Chat(server.url, thread_id=chat.thread_id) for _ in range(100))
    other = next(other for other in others if worker(other) != worker(chat))
    assert [text_of(item) for item in done(other.say("two"))] == ["You said: two"]
    assert provider.requests[-1].messages == [
        ("user", "one"),
        ("assistant", "You said: one"),
        ("user", "two"),
    ]
    assert other.items() == chat.items()


async def test_workers_are_told_to_stop_while_replies_stream(
    provider, database, postgres_store, tmp_path
):
    """Each client keeps what it saw, with a last event, and it is stored."""
    soon = {"STOP_SECONDS = 5": "STOP_SECONDS = 1"}
    server = workers(provider, tmp_path, database.schema(), soon)
    provider.script["go"] = [[Text("one "), Text("two"), Silence()]]
    chats = [Chat(server.url) for _ in range(8)]
    readings = [Reading(chat.start("go")) for chat in chats]
    for reading in readings:
        await reading.until('"two"')
    assert await asyncio.to_thread(server.stop, signal.SIGTERM) == 0
    store = postgres_store.PostgresStore(server.environment["DATABASE_URL"])
    for chat, reading in zip(chats, readings, strict=True):
        events = await reading.end()
        (shown,) = items_shown(events)[1:]
        assert text_of(shown) == "one two"
        error = error_of(events)
        assert "was stopped" in error.message and error.allow_retry
        stored = (await store.load_thread_items(chat.thread_id, None, 10, "asc", {})).data
        assert [text_of(item) for item in stored] == ["go", "one two"]
    await store.close()
    log = "\n".join(server.log)
    for complaint in ("Traceback", "ERROR", "never retrieved", "was destroyed", "Unclosed"):
        assert complaint not in log, log
    assert not provider.open()


def test_a_worker_is_killed(server, provider, chat):
    """A worker is killed in the middle of a reply.

    What was done is stored, and the thread goes on with the other worker or a new one.
    """
    chat.say("before")
    provider.script["go"] = [[Text("one "), ToolCall("clock")], [Text("two "), Silence()]]
    killed, events = worker(chat), []

    def read_and_kill() -> None:
        for event in chat.start("go"):
            events.append(event)
            if '"two "' in event.model_dump_json():
                os.kill(killed, signal.SIGKILL)

    with pytest.raises(httpx.RemoteProtocolError):
        read_and_kill()
    stored = done(events, "user_message") + done(events)
    other = Chat(server.url, thread_id=chat.thread_id)
    assert [text_of(item) for item in other.items()] == ["before", "You said: before", "go", "one "]
    assert [item["id"] for item in other.items()[2:]] == [item.id for item in stored]
    assert [text_of(item) for item in done(other.say("and on"))] == ["You said: and on"]
    server.wait_for("Application startup complete", 3)
    started = [
        int(line.split("[")[1].rstrip("]"))
        for line in server.log
        if "Started server process" in line
    ]
    assert len(started) == 3 and killed in started[:2]
    assert {worker(Chat(server.url)) for _ in range(100)} == {*started} - {killed}


async def test_another_worker_deletes_a_thread(server, provider, chat, main):
    """It does so while a reply streams into the thread.

    The stream ends with one error event, and nothing is stored.
    """
    silence = Silence()
    provider.script["go"] = [[Text("one "), silence, Text("two")]]
    here = worker(chat)
    other = next(other for other in (Chat(server.url) for _ in range(100)) if worker(other) != here)
    with server.no_new("Traceback"):
        reading = Reading(chat.start("go"))
        await reading.until('"one "')
        other.get("threads.delete", thread_id=chat.thread_id)
        silence.end.set()
        error = error_of(await reading.end())
    assert (error.code, error.message) == ("custom", main.DELETED)
    assert provider.requests[-1].closed.wait(5)
    for one in (chat, other):
        assert chat.thread_id not in one.http.get("/debug/threads").json()


# ---- The database ---------------------------------------------------------------


async def test_more_chats_than_connections(server, provider):
    texts = [f"chat number {number} of many" for number in range(200)]
    assert await many(server.url, texts) == [f"You said: {text}" for text in texts]


async def test_a_slow_database_keeps_only_those_who_need_it(server, database, url, chat):
    chat.say("hello")
    lock = Locked(database, url, chat.thread_id)
    events: list = []
    slow = threading.Thread(target=lambda: events.extend(chat.say("slow")))
    slow.start()
    await lock.awaited()
    try:
        texts = [f"fast {number}" for number in range(20)]
        replies = await asyncio.wait_for(many(server.url, texts), 20)
        assert not done(events)
    finally:
        lock.release()
    assert replies == [f"You said: {text}" for text in texts]
    await asyncio.to_thread(slow.join, 20)
    assert [text_of(item) for item in done(events)] == ["You said: slow"]


@pytest.mark.parametrize("written", ["message", "reply"])
async def test_leaving_while_the_database_writes(server, provider, database, url, chat, written):
    """What the client sent and what was streamed to it is stored.

    No statement is interrupted.
    """
    chat.say("hello")
    log_start = len(server.log)
    silence = Silence()
    if written == "message":
        provider.script["go"] = [[silence]]
        lock = Locked(database, url, chat.thread_id)
        body = {
            "type": "threads.add_user_message",
            "params": {"thread_id": chat.thread_id, "input": message("go")},
        }
        async with httpx.AsyncClient(base_url=server.url, verify=NO_TLS) as http:
            request = asyncio.create_task(http.post("/chatkit", json=body))
            await lock.awaited()
            request.cancel()
    else:
        provider.script["go"] = [[Text("one "), Text("two"), silence]]
        stream = chat.start("go")
        next(event for event in stream if '"two"' in event.model_dump_json())
        lock = Locked(database, url, chat.thread_id)
        silence.end.set()
        await lock.awaited()
        stream.close()
    await left(server)
    lock.release()
    kept = ["go"] if written == "message" else ["go", "one two"]
    reader = Chat(server.url, thread_id=chat.thread_id)
    await until(lambda: len(reader.items()) == 2 + len(kept))
    assert [text_of(item) for item in reader.items()] == ["hello", "You said: hello", *kept]
    (reply,) = done(reader.say("and on"))
    assert text_of(reply).endswith("and on")
    assert "closing connection" not in "\n".join(server.log[log_start:])


async def test_the_database_restarts_between_two_messages(server, database, chat):
    """Every connection of every worker is dead, and nobody notices."""
    if not database.cluster:
        pytest.skip("the database of DATABASE_URL must not be restarted by a test")
    texts = [f"chat {number}" for number in range(40)]
    await many(server.url, texts)
    chat.say("before")
    database.cluster.stop()
    database.cluster.start()
    assert await many(server.url, texts) == [f"You said: {text}" for text in texts]
    assert [text_of(item) for item in done(chat.say("after"))] == ["You said: after"]
    assert [text_of(item) for item in chat.items()] == [
        "before",
        "You said: before",
        "after",
        "You said: after",
    ]


async def test_the_database_stops_while_chats_run(server, database, provider):
    """Each ends with one error that may be retried.

    What was confirmed is stored. New ones work without a restart.
    """
    if not database.cluster:
        pytest.skip("the database of DATABASE_URL must not be stopped by a test")
    log_start = len(server.log)
    silence = Silence()
    provider.script["go"] = [[Text("one "), silence, Text("two")]]
    chats = [Chat(server.url) for _ in range(6)]
    events = [[] for _ in chats]
    threads = [
        threading.Thread(
            target=lambda chat=chat, seen=seen: [seen.append(event) for event in chat.start("go")]
        )
        for chat, seen in zip(chats, events, strict=True)
    ]
    for running in threads:
        running.start()
    await until(
        lambda: all('"one "' in str([event.model_dump_json() for event in seen]) for seen in events)
    )
    database.cluster.stop()
    silence.end.set()
    for running in threads:
        await asyncio.to_thread(running.join, 30)
    for seen in events:
        error = error_of(seen)
        assert (error.message, error.allow_retry) == (UNAVAILABLE, True)
    complaints = [line for line in server.log[log_start:] if "ERROR" in line]
    assert 1 <= len(complaints) <= 4, complaints  # two workers, and at most two causes
    assert all("The database is unavailable: " in line for line in complaints), complaints
    database.cluster.start()
    provider.script["go"] = [[Text("three")]]
    for chat in chats:
        (asked,) = chat.items()
        assert text_of(asked) == "go"
        retried = list(
            chat.stream("threads.retry_after_item", thread_id=chat.thread_id, item_id=asked["id"])
        )
        assert [text_of(item) for item in done(retried)] == ["three"]
        assert [text_of(item) for item in chat.items()] == ["go", "three"]
