"""Clients that leave, many at once, and servers that end. With --postgres: two workers."""

import asyncio
import gc
import json
import signal
import sqlite3
import weakref
from concurrent.futures import ThreadPoolExecutor

import pytest
from agents import function_tool

import client
from client import Chat, Local, Reading, done, error_of, items_shown, many, outline, text_of, until
from conftest import COMPLAINTS
from provider import Pause, Silence, Text, Thought, ToolCall

# The pieces of a turn, each with what is shown when all events of the piece have come.
PIECES = [
    (Thought("Hm, "), "[workflow]Hm, "),
    (Thought("well."), "[workflow]Hm, well."),
    (Text("one "), "[workflow]Hm, well.[message]one "),
    (Text("two "), "[workflow]Hm, well.[message]one two "),
    (ToolCall("clock"), "[workflow]Hm, well.[message]one two "),
    (Text("three "), "[workflow]Hm, well.[message]one two [message]three "),
    (ToolCall("clock"), "[workflow]Hm, well.[message]one two [message]three "),
]


class PieceByPiece:
    """A chat whose provider sends the next piece when all events of the last one were read."""

    def __init__(self, url: str, provider, text: str, count: int) -> None:
        """Leave after so many events, or when those of the last piece were read."""
        self.chat = Chat(url)
        self.sent = 0  # the number of pieces that the provider was allowed to send
        self.events: list = []
        gates = [Silence() for _ in PIECES]
        steps: list[list] = [[]]
        for gate, (piece, _) in zip(gates, PIECES, strict=True):
            steps[-1] += [gate, piece]
            if isinstance(piece, ToolCall):
                steps.append([])
        provider.script[text] = [*steps[:-1], [Silence()]]
        stream = self.chat.start(text)
        for event in stream:
            if event.type == "progress_update":  # a heartbeat
                continue
            self.events.append(event)
            if len(self.events) == count or (self.all_read() and self.sent == len(PIECES)):
                break
            if self.all_read():
                gates[self.sent].end.set()
                self.sent += 1
        stream.close()
        requests = [request for request in provider.requests if request.message == text]
        assert all(request.closed.wait(5) for request in requests)

    def all_read(self) -> bool:
        """Whether the provider waits: every event of what it has sent was read."""
        if self.sent == 0:
            return self.events[-1].type == "thread.updated"  # the new title is the last before it
        piece, shown = PIECES[self.sent - 1]
        if isinstance(piece, ToolCall):
            return self.events[-1].type == "thread.item.done"
        return self.shown() == shown

    def shown(self) -> str:
        return outline(items_shown(self.events))


def test_leaving_after_any_event(customised, provider):
    """What was shown is stored, and no more; the log has one line; the thread goes on."""
    url, start = customised.url, len(customised.log)
    whole = PieceByPiece(url, provider, "the whole turn", 1000)
    assert whole.sent == len(PIECES)
    places = range(1, len(whole.events))
    with ThreadPoolExecutor(8) as pool:
        chats = [whole, *pool.map(lambda n: PieceByPiece(url, provider, f"after {n}", n), places)]
    for left in chats:
        customised.wait_for(f"thread={left.chat.thread_id} ", seconds=10)
    whole.chat.http.get("/collect")
    log = customised.log[start:]
    for left in chats:
        stored = left.chat.items()
        if left.all_read():
            assert outline(stored) == left.shown()
        ids = [item["id"] for item in items_shown(left.events)]
        assert [item["id"] for item in stored][: len(ids)] == ids
        assert outline(stored).startswith(left.shown())
        was_sent = PIECES[left.sent - 1][1] if left.sent else ""
        assert was_sent.startswith(outline(stored))
        (line,) = [line for line in log if f"thread={left.chat.thread_id} " in line]
        assert " end=stopped " in line
        kinds = [item["type"] for item in left.chat.debug()]
        assert kinds.index("SDKHiddenContextItem") == len(kinds) - 1
        assert [text_of(item) for item in done(left.chat.say("and on"))] == ["You said: and on"]
    usual = (" turn pid=", '"POST /chatkit ', '"GET /collect ')
    assert [line for line in log if not any(text in line for text in usual)] == []


async def test_a_store_that_fails_ends_the_run(main, provider, log):
    """chatkit then drops the turn's events. The run must end at once, not with the garbage."""

    class Broken(main.MemoryStore):
        async def add_thread_item(self, thread_id, item, context):
            if item.type == "assistant_message":
                raise OSError("the disk is full")
            await super().add_thread_item(thread_id, item, context)

    @function_tool
    async def wait() -> None:
        await asyncio.Event().wait()

    provider.script["go"] = [[Text("Let me look. "), ToolCall("wait")]]
    before = asyncio.all_tasks()
    gc.disable()
    try:
        events = await Local(main, provider, Broken(), tools=[wait]).say("go")
        assert error_of(events).code == "stream.error"
        _, pending = await asyncio.wait(asyncio.all_tasks() - before, timeout=2)
        assert not pending
    finally:
        gc.enable()
    (line,) = [text for text in log.messages if text.startswith("turn ")]
    assert " end=error " in line


async def test_a_turn_that_hangs_is_cancelled(main, monkeypatch):
    """After as long as all get. Its client gets one last event, however often it is stopped."""

    class Hanging(main.MemoryStore):
        async def add_thread_item(self, thread_id, item, context):
            if item.type == "assistant_message" and not hangs.is_set():
                hangs.set()
                await asyncio.Event().wait()
            await super().add_thread_item(thread_id, item, context)

    hangs = asyncio.Event()
    monkeypatch.setattr(main, "STOP_SECONDS", 0.1)
    local = Local(main, store=Hanging())
    turn = await local.start("go")
    await hangs.wait()
    await asyncio.gather(local.server.stop_all_turns(), local.server.stop_all_turns())
    assert turn.task.cancelled() and not local.server.turns
    events = [event async for event in turn]
    assert events.count(main.SERVER_STOPPED) == 1 and events[-1] == main.SERVER_STOPPED
    # chatkit keeps the unfinished message up to 1.5; newer releases keep a copy without its text.
    texts = [text_of(item) for item in await local.items() if item.type.endswith("message")]
    assert texts in (["go", main.MOCK_REPLY], ["go"])


@pytest.mark.parametrize("server_ends", [False, True])
async def test_a_stop_that_comes_before_the_run(main, provider, server_ends):
    """The provider is not asked, and nothing keeps the turn in memory. A note tells who left."""

    class Slow(main.MemoryStore):
        async def load_thread_items(self, thread_id, after, limit, order, context):
            if limit == main.HISTORY_ITEMS:
                loading.set()
                await left.wait()
            return await super().load_thread_items(thread_id, after, limit, order, context)

    loading, left = asyncio.Event(), asyncio.Event()
    local = Local(main, provider, Slow())
    turn = await local.start("go")
    await loading.wait()
    if server_ends:
        turn.stop()
    await turn.aclose()
    left.set()
    await asyncio.wait([turn.task])
    assert turn.outcome == "stopped" and provider.requests == []
    note = ["sdk_hidden_context"] * (not server_ends)
    assert [item.type for item in await local.items()] == ["user_message", *note]
    kept = weakref.ref(turn)
    del turn
    await asyncio.sleep(0)  # until the event loop has let go of it, too
    gc.collect()
    assert kept() is None


@pytest.mark.slow
async def test_six_hundred_silent_streams(servers, provider, database):
    """50 other chats do not wait for one of them, as with LiteLLM's limit of 500 they would."""
    if database:
        pytest.skip("two workers share the streams, and each has fewer than 500")
    server = servers("as_by_a_user")  # a new process: LiteLLM reads the limit when it is imported
    provider.script["silent"] = [[Text("word "), Pause(600)]]
    body = json.dumps({"type": "threads.create", "params": {"input": client.message("silent")}})
    request = f"POST /chatkit HTTP/1.1\r\nHost: _\r\nContent-Length: {len(body)}\r\n\r\n{body}"

    async def start() -> asyncio.StreamWriter:
        """Return when the stream is silent."""
        reader, writer = await asyncio.open_connection("127.0.0.1", server.port)
        writer.write(request.encode())
        await reader.readuntil(b'"delta":"word "')
        return writer

    streams = await asyncio.wait_for(asyncio.gather(*(start() for _ in range(600))), 60)
    texts = [f"chat number {number} of many" for number in range(50)]
    provider.script.update((text, [[Text("You "), Pause(0.5), Text(text)]]) for text in texts)
    with server.no_new(*COMPLAINTS):
        replies = await asyncio.wait_for(many(server.url, texts), 30)
    assert replies == [f"You {text}" for text in texts]
    for stream in streams:
        stream.close()
    await until(lambda: not provider.open(), 30)


ITEMS = "SELECT json FROM rows WHERE kind = 'Item' AND parent = ? ORDER BY number"
WAYS = {  # uvicorn's workers; the signal, and the exit code
    "python main.py": (0, signal.SIGTERM, -15),
    "python main.py and Ctrl-C": (0, signal.SIGINT, 0),
    "uvicorn main:app": (1, signal.SIGTERM, -15),
    "uvicorn main:app --workers 2": (2, signal.SIGTERM, 0),
}


@pytest.mark.slow
@pytest.mark.parametrize("way", WAYS)
async def test_told_to_stop_while_replies_stream(provider, tmp_path, way):
    """What was shown is stored, each client gets a last event, each turn has one log line."""
    workers, number, code = WAYS[way]
    path, program = str(tmp_path / "chat.sqlite"), client.SUPPORT / "customised.py"
    variables = {"PROVIDER": "openai", "DATABASE": path, "STOP_SECONDS": "1"}
    environment = provider.environment() | variables
    server = client.Server(tmp_path, environment, program, workers < 2, workers=workers).started()
    provider.script["go"] = [[Thought("Hm. "), Text("one "), Silence()]]
    chats = [Chat(server.url) for _ in range(4)]
    readings = [Reading(chat.start("go")) for chat in chats]
    for reading in readings:
        await reading.until('"one "')
    start = len(server.log)
    assert await asyncio.to_thread(server.stop, number, 7) == code
    assert not provider.open()
    assert not [line for line in server.log if any(text in line for text in COMPLAINTS)]
    database = sqlite3.connect(path)
    for chat, reading in zip(chats, readings, strict=True):
        events = await reading.end()
        error = error_of(events)
        assert error.allow_retry and "server was stopped" in error.message
        rows = database.execute(ITEMS, (chat.thread_id,)).fetchall()
        stored = outline([json.loads(row) for (row,) in rows])
        assert stored == outline(items_shown(events)) == "[workflow]Hm. [message]one "
        (line,) = [line for line in server.log[start:] if f"thread={chat.thread_id} " in line]
        assert " end=stopped " in line and "cancelled" not in str(rows)  # not by the user
