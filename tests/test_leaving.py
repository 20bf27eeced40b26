"""Clients that disconnect, many clients at once, and a server that gets SIGTERM."""

import asyncio
import gc
import json
import re
import signal
import time
import weakref
from concurrent.futures import ThreadPoolExecutor
from types import SimpleNamespace

import httpx
import pytest
from agents import Model, ModelSettings, ModelTracing, function_tool
from openai.types.responses import Response

from client import (
    NO_TLS,
    Chat,
    done,
    error_of,
    items_shown,
    memory,
    message,
    outline,
    text_of,
    until,
)
from provider import Pause, Silence, Text, Thought, ToolCall
from test_turns import Reading

pytestmark = pytest.mark.anyio
COMPLAINTS = ("never retrieved", "was destroyed", "Traceback", "Unclosed", "ERROR")


def leave_after(chat: Chat, text: str, enough) -> list:
    """Start a chat and disconnect at the first event for which `enough` is true."""
    events, stream = [], chat.start(text)
    for event in stream:
        events.append(event)
        if enough(event):
            break
    stream.close()
    return events


def shown(events: list) -> str:
    updates = [event.update for event in events if event.type == "thread.item.updated"]
    return "".join(update.delta for update in updates if update.type.endswith("text_delta"))


NAMES = ["gemini/gemini-flash-latest", "openai/gpt-4o", "anthropic/claude-sonnet-4-6"]

# ---- Every event of a turn ------------------------------------------------------

# The pieces of a turn with a thought, a text, a tool and a text after it, each with what is shown
# when all events of the piece have come.
PIECES = [
    (Thought("Hm, "), "[workflow]Hm, "),
    (Thought("well."), "[workflow]Hm, well."),
    (Text("one "), "[workflow]Hm, well.[message]one "),
    (Text("two "), "[workflow]Hm, well.[message]one two "),
    (ToolCall("clock"), "[workflow]Hm, well.[message]one two "),
    (Text("three "), "[workflow]Hm, well.[message]one two [message]three "),
    (Text("four"), "[workflow]Hm, well.[message]one two [message]three four"),
    (ToolCall("clock"), "[workflow]Hm, well.[message]one two [message]three four"),
]


class PieceByPiece:
    """A chat whose provider sends the next piece when all events of the last one were read."""

    def __init__(self, url: str, provider, text: str) -> None:
        self.chat, self.provider, self.text = Chat(url), provider, text
        self.gates = [Silence() for _ in PIECES]
        self.sent = 0  # the number of pieces that the provider was allowed to send
        self.events: list = []
        requests: list[list] = [[]]
        for gate, (piece, _) in zip(self.gates, PIECES, strict=True):
            requests[-1] += [gate, piece]
            if isinstance(piece, ToolCall):
                requests.append([])
        provider.script[text] = [*requests[:-1], [Silence()]]

    def leave_after(self, count: int) -> "PieceByPiece":
        """Leave after so many events, or when those of the last piece were read."""
        stream = self.chat.start(self.text)
        for event in stream:
            if event.type == "progress_update":  # a heartbeat
                continue
            self.events.append(event)
            if len(self.events) == count or (self.all_read() and self.sent == len(PIECES)):
                break
            if self.all_read():
                self.gates[self.sent].end.set()
                self.sent += 1
        stream.close()
        for request in self.requests():
            assert request.closed.wait(1)
        return self

    def all_read(self) -> bool:
        """Whether the provider waits: every event of what it has sent was read."""
        if self.sent == 0:
            return self.events[-1].type == "thread.updated"  # the new title is the last before it
        if isinstance(PIECES[self.sent - 1][0], ToolCall):
            return self.events[-1].type == "thread.item.done"
        return self.shown() == self.outline_of_what_was_sent()

    def outline_of_what_was_sent(self) -> str:
        return PIECES[self.sent - 1][1] if self.sent else ""

    def shown(self) -> str:
        return outline(items_shown(self.events))

    def requests(self) -> list:
        return [request for request in list(self.provider.requests) if request.message == self.text]


def test_leaving_after_any_event(customised, provider):
    """What was shown is stored, and nothing that the provider had not sent.

    The provider's connection is closed within a second, the log has one line for the turn, and the
    thread goes on.
    """
    start = len(customised.log)
    whole = PieceByPiece(customised.url, provider, "the whole turn").leave_after(1000)
    assert whole.sent == len(PIECES)
    places = range(1, len(whole.events))
    with ThreadPoolExecutor(8) as pool:
        chats = list(
            pool.map(
                lambda place: PieceByPiece(
                    customised.url, provider, f"leave after {place}"
                ).leave_after(place),
                places,
            )
        )
    assert [len(left.events) for left in chats] == list(places)
    chats.append(whole)
    for left in chats:
        customised.wait_for(f"thread={left.chat.thread_id} ", seconds=10)
    log = customised.log[start:]
    for left in chats:
        stored = left.chat.items()
        stored_outline = outline(stored)
        if left.all_read():
            assert stored_outline == left.shown()
        ids = [item["id"] for item in items_shown(left.events)]
        assert [item["id"] for item in stored][: len(ids)] == ids
        assert stored_outline.startswith(left.shown())
        assert left.outline_of_what_was_sent().startswith(stored_outline)
        (line,) = [line for line in log if f"thread={left.chat.thread_id} " in line]
        assert " end=stopped " in line
        assert [text_of(item) for item in done(left.chat.say("and on"))] == ["You said: and on"]
    threads = chats[0].chat.http.get("/debug/threads").json()
    for left in chats:
        kinds = [item["type"] for item in threads[left.chat.thread_id]["items"]]
        assert kinds.count("SDKHiddenContextItem") == 1
        assert kinds[-3] == "SDKHiddenContextItem"
    assert [
        line for line in log if " turn pid=" not in line and '"POST /chatkit ' not in line
    ] == []


async def test_a_store_that_fails_ends_the_run(main, provider, monkeypatch):
    """chatkit then drops the turn's events, without an error in them.

    The run must end at once, not with the garbage.
    """

    class Broken(main.MemoryStore):
        async def add_thread_item(self, thread_id, item, context):
            if item.type == "assistant_message":
                raise OSError("the disk is full")
            await super().add_thread_item(thread_id, item, context)

    @function_tool
    async def wait() -> None:
        await asyncio.Event().wait()

    provider.script["go"] = [[Text("Let me look. "), ToolCall("wait")]]
    server = main.ChatKitServerImpl(Broken())
    server.agent.tools.append(wait)
    server.agent.model_settings = ModelSettings()
    server.agent.model = main.ProviderModel(
        model="openai/gpt-4o", base_url=f"{provider.url}/openai", api_key="key"
    )
    request = {"type": "threads.create", "params": {"input": message("go")}}
    log = []
    monkeypatch.setattr(
        main, "logger", SimpleNamespace(info=lambda line, *values: log.append(line % values))
    )
    before = asyncio.all_tasks()
    gc.disable()
    try:
        events = [event async for event in await server.process(json.dumps(request).encode(), {})]
        assert b'"type":"error"' in events[-1]
        _, pending = await asyncio.wait(asyncio.all_tasks() - before, timeout=2)
        assert not pending
    finally:
        gc.enable()
    assert [re.search("end=[a-z]+", line)[0] for line in log] == ["end=fault"]


async def test_a_turn_that_hangs_is_cancelled(main, monkeypatch):
    """It gets as long as running chats get at the end of the server.

    The client gets one last event, however often it is stopped.
    """

    class Hanging(main.MemoryStore):
        async def add_thread_item(self, thread_id, item, context):
            if item.type == "assistant_message" and not hangs.is_set():
                hangs.set()
                await asyncio.Event().wait()
            await super().add_thread_item(thread_id, item, context)

    async def read() -> None:
        events.extend([event async for event in await server.process(request, {})])

    hangs, events = asyncio.Event(), []
    monkeypatch.setattr(main, "SHUTDOWN_SECONDS", 0.1)
    server = main.ChatKitServerImpl(Hanging())
    request = json.dumps({"type": "threads.create", "params": {"input": message("go")}})
    reader = asyncio.create_task(read())
    await hangs.wait()
    (turn,) = server.turns
    await asyncio.gather(server.stop_all_turns(), server.stop_all_turns())
    assert turn.task.cancelled() and not server.turns
    await reader
    assert events.count(main.SERVER_STOPPED) == 1 and events[-1] == main.SERVER_STOPPED
    page = await server.store.load_thread_items(turn.thread_id, None, 10, "asc", {})
    assert text_of(page.data[0]) == "go"
    replies = [text_of(item) for item in page.data if item.type == "assistant_message"]
    # chatkit keeps the unfinished message up to 1.5; newer releases keep a copy without its text.
    assert replies in ([main.MOCK_REPLY], [])


async def test_a_stop_that_comes_before_the_run(main, provider):
    """The provider is not asked."""

    class Slow(main.MemoryStore):
        async def load_thread_items(self, thread_id, after, limit, order, context):
            if limit == main.HISTORY_ITEMS:
                loading.set()
                await left.wait()
            return await super().load_thread_items(thread_id, after, limit, order, context)

    loading, left = asyncio.Event(), asyncio.Event()
    server = main.ChatKitServerImpl(Slow())
    server.agent.model = main.ProviderModel("openai/gpt-4o", f"{provider.url}/openai", "key")
    request = json.dumps({"type": "threads.create", "params": {"input": message("go")}})
    events = (await server.process(request, {})).json_events
    await anext(events)
    (turn,) = server.turns
    await loading.wait()
    await events.aclose()
    left.set()
    await asyncio.wait([turn.task])
    assert turn.outcome == "stopped" and provider.requests == []
    page = await server.store.load_thread_items(turn.thread_id, None, 10, "asc", {})
    assert [item.type for item in page.data] == ["user_message", "sdk_hidden_context"]


async def test_a_stopped_turn_is_forgotten(main):
    """Nothing keeps it and its events in memory."""
    server = main.ChatKitServerImpl(main.MemoryStore())
    request = json.dumps({"type": "threads.create", "params": {"input": message("go")}})
    events = (await server.process(request, {})).json_events
    await anext(events)
    (turn,) = server.turns
    kept = weakref.ref(turn)
    await events.aclose()
    await asyncio.wait([turn.task])
    del turn, events
    await asyncio.sleep(0)  # until the event loop has let go of it, too
    gc.collect()
    assert kept() is None


async def test_a_run_that_is_cancelled_twice(main, monkeypatch):
    """openai-agents may cancel a run while it closes the connection.

    The connection is closed nevertheless.
    """

    class Endless:
        completion_stream = None

        def __aiter__(self):
            return self

        async def __anext__(self):
            asked.set()
            await asyncio.Event().wait()

        async def aclose(self):
            closing.set()
            await network.wait()
            closed.set()

    async def fetch(*args, **kwargs):
        return Response.model_construct(output=[]), Endless()

    async def read() -> None:
        async for _ in main.ProviderModel(model="openai/x", api_key="key").stream_response(
            None,
            "go",
            ModelSettings(),
            [],
            None,
            [],
            ModelTracing.DISABLED,
            previous_response_id=None,
        ):
            pass

    monkeypatch.setattr(main.LitellmModel, "_fetch_response", fetch)
    asked, closing, network, closed = (asyncio.Event() for _ in range(4))
    task = asyncio.create_task(read())
    await asked.wait()
    task.cancel()
    await closing.wait()
    task.cancel()
    await asyncio.wait([task])
    assert task.cancelled()
    network.set()
    await asyncio.wait_for(closed.wait(), 5)


@pytest.mark.parametrize("name", NAMES)
async def test_leaving_between_the_answer_and_its_first_chunk(main, provider, monkeypatch, name):
    """The provider's connection is closed, though nothing was read from it."""

    class Left(main.ProviderStream):
        def __init__(self, *args):
            super().__init__(*args)
            asyncio.current_task().cancel()

    async def read() -> None:
        async for _ in model.stream_response(
            None,
            "go",
            ModelSettings(),
            [],
            None,
            [],
            ModelTracing.DISABLED,
            previous_response_id=None,
        ):
            pass

    monkeypatch.setattr(main, "ProviderStream", Left)
    provider.script["go"] = [[Text("one "), Silence()]]
    kind = name.partition("/")[0]
    model = main.ProviderModel(model=name, base_url=f"{provider.url}/{kind}", api_key="key")
    gc.disable()
    try:
        task = asyncio.create_task(read())
        await asyncio.wait([task])
        assert task.cancelled()
        for request in provider.requests:
            assert await asyncio.to_thread(request.closed.wait, 1)
    finally:
        gc.enable()


async def test_a_chat_left_in_silence_ends_at_once(chat, server, provider):
    """No token comes, so nothing is sent.

    The server must notice nevertheless that the client left.
    """
    provider.script["quiet"] = [[Silence()]]
    with server.no_new(*COMPLAINTS):
        leave_after(
            chat, "quiet", lambda event: event.type == "stream_options" and provider.asked.wait(5)
        )
        (request,) = provider.requests
        assert request.closed.wait(1) and not request.complete
        assert [
            text_of(item) for item in done(Chat(server.url, thread_id=chat.thread_id).say("on"))
        ] == ["You said: on"]


async def many(url: str, texts: list[str], leave: bool = False) -> list[str]:
    """Chats at once; the text that each was sent, or None as soon as one delta has come."""

    async def one(http: httpx.AsyncClient, text: str) -> str:
        body = {"type": "threads.create", "params": {"input": message(text)}}
        found = ""
        async with http.stream("POST", "/chatkit", json=body) as response:
            async for line in response.aiter_lines():
                if '"delta":"' in line:
                    if leave:
                        return "left"
                    found += line.split('"delta":"')[1].split('"')[0]
        return found

    limits = httpx.Limits(max_connections=None)
    async with httpx.AsyncClient(base_url=url, timeout=60, limits=limits, verify=NO_TLS) as http:
        return await asyncio.gather(*(one(http, text) for text in texts))


@pytest.mark.slow
async def test_cancelled_streams_leave_nothing_behind(server, provider):
    endless = [[Text("word "), Silence()]]

    async def cancel(number: int) -> None:
        texts = [f"cancel {number} {chat}" for chat in range(25)]
        provider.script.update((text, endless) for text in texts)
        assert await many(server.url, texts, leave=True) == ["left"] * 25, server.log[-30:]
        await until(lambda: not provider.open())

    with server.no_new(*COMPLAINTS):
        for number in range(5):  # until the allocator has reserved its memory
            await cancel(number)
        before = memory(server)
        for number in range(5, 11):
            await cancel(number)
        grown = memory(server) - before
        assert await many(server.url, ["still there"]) == ["You said: still there"]
    print(f"150 cancelled streams: {before} KiB before, {grown} KiB more after")
    assert grown < 6 * 1024
    assert not any(request.complete for request in provider.requests[:-1])


@pytest.mark.slow
async def test_two_hundred_chats_at_once(servers, provider):
    server = servers("gemini")
    texts = [f"chat number {number} of many" for number in range(200)]
    for text in texts:
        provider.script[text] = [
            [Text("You "), Pause(0.5), *(Text(part) for part in ("said: ", text))]
        ]
    start = len(server.log)
    with server.no_new(*COMPLAINTS):
        replies = await many(server.url, texts)
    unusual = [
        line for line in server.log[start:] if "end=done" not in line and "200 OK" not in line
    ]
    assert replies == [f"You said: {text}" for text in texts], unusual


@pytest.mark.slow
async def test_six_hundred_silent_streams(servers, provider, database):
    """A new chat does not wait for one of them, as with LiteLLM's limit of 500 it would."""
    if database:
        pytest.skip("two workers share the streams, and each has fewer than 500")
    server = servers("as_by_a_user")  # a new process: LiteLLM reads the limit when it is imported
    provider.script["silent"] = [[Text("word "), Pause(600)]]
    body = json.dumps({"type": "threads.create", "params": {"input": message("silent")}})
    request = f"POST /chatkit HTTP/1.1\r\nHost: _\r\nContent-Length: {len(body)}\r\n\r\n{body}"

    async def start() -> asyncio.StreamWriter:
        """Return when the stream is silent."""
        reader, writer = await asyncio.open_connection("127.0.0.1", server.port)
        writer.write(request.encode())
        await reader.readuntil(b'"delta":"word "')
        return writer

    streams = await asyncio.wait_for(asyncio.gather(*(start() for _ in range(600))), 60)
    assert await asyncio.wait_for(many(server.url, ["hello"]), 30) == ["You said: hello"]
    for stream in streams:
        stream.close()
    await until(lambda: not provider.open(), 30)


async def test_a_chat_that_ended_leaves_no_request_open(customised, provider):
    assert Chat(customised.url).say("hello")
    assert not provider.open()


@pytest.mark.slow
@pytest.mark.parametrize("busy", [False, True], ids=["idle", "busy"])
async def test_told_to_stop(servers, provider, busy):
    server = servers("stopped_busy" if busy else "stopped_idle")
    if busy:
        provider.script["long"] = [[Text("word "), Silence()]]
        streams = [Chat(server.url).start("long") for _ in range(3)]
        for stream in streams:
            next(event for event in stream if "text_delta" in str(event))
    began = time.monotonic()
    assert server.stop(signal.SIGTERM) == 0
    assert time.monotonic() - began < (10 if busy else 2)
    assert not provider.open()
    for complaint in ("never retrieved", "was destroyed", "Unclosed"):
        assert complaint not in "\n".join(server.log)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("name", "number", "code"),
    [
        ("stopped_streaming", signal.SIGTERM, 0),
        ("interrupted_streaming", signal.SIGINT, 0),
        ("served_streaming", signal.SIGTERM, -signal.SIGTERM),
    ],
    ids=["python main.py", "python main.py and Ctrl-C", "uvicorn main:app"],
)
async def test_told_to_stop_while_replies_stream(servers, provider, name, number, code):
    """What was shown is stored, and each client gets a last event with words.

    The log has one line for each turn and no traceback. uvicorn's own program ends with the signal.
    """
    provider.script["go"] = [[Thought("Hm. "), Text("one "), Silence()]]
    server = servers(name)
    chats = [Chat(server.url) for _ in range(8)]
    readings = [Reading(chat.start("go")) for chat in chats]
    for reading in readings:
        await reading.until('"one "')
    start = len(server.log)
    assert await asyncio.to_thread(server.stop, number) == code
    reader = servers("sqlite_1")
    for chat, reading in zip(chats, readings, strict=True):
        events = await reading.end()
        error = error_of(events)
        assert (error.code, error.allow_retry) == ("custom", True)
        assert "server was stopped" in error.message and "Try again" in error.message
        stored = Chat(reader.url, thread_id=chat.thread_id).items()
        assert stored[0]["type"] == "user_message"
        assert outline(stored) == outline(items_shown(events)) == "[workflow]Hm. [message]one "
        (line,) = [line for line in server.log[start:] if f"thread={chat.thread_id} " in line]
        assert " end=stopped " in line
    assert not [line for line in server.log if any(text in line for text in COMPLAINTS)]
    assert not provider.open()


async def test_a_run_ends_when_its_reader_leaves(main):
    """The run is a task of its own.

    Without its reader the provider would generate, and bill, the rest of the reply.
    """

    class Endless(Model):
        async def get_response(self, *args, **kwargs):
            raise NotImplementedError

        async def stream_response(self, *args, **kwargs):
            try:
                asked.set()
                yield await asyncio.Event().wait()
            finally:
                ended.set()

    async def read() -> None:
        async for _ in await server.process(json.dumps(request).encode(), {}):
            pass

    # The abandoned tasks have tests of their own.
    asyncio.get_running_loop().set_exception_handler(lambda *_: None)
    asked, ended = asyncio.Event(), asyncio.Event()
    server = main.ChatKitServerImpl(main.MemoryStore())
    server.agent.model = Endless()
    request = {"type": "threads.create", "params": {"input": message("go")}}
    task = asyncio.create_task(read())
    await asked.wait()
    task.cancel()
    await asyncio.wait([task])
    await asyncio.wait_for(ended.wait(), 5)


async def test_what_was_streamed_is_stored_by_a_database_driver(servers, provider):
    """No cancellation reaches it: Starlette's would end every await that follows."""
    provider.script["go"] = [[Thought("Hm. "), Text("one "), Text("two "), Silence()]]
    chat = Chat(servers("sqlite_1").url)
    stream = chat.start("go")
    next(event for event in stream if '"two "' in event.model_dump_json())
    stream.close()
    await until(
        lambda: (
            [text_of(item) for item in chat.items() if item["type"] == "assistant_message"]
            == ["one two "]
        )
    )


async def test_reasoning_is_stored(chat, provider):
    """chatkit stores the text of a cancelled stream, but no workflow."""
    provider.script["go"] = [[Thought("Hm. "), Silence()]]
    stream = chat.start("go")
    next(event for event in stream if "Hm. " in event.model_dump_json())
    stream.close()
    await until(lambda: [item["type"] for item in chat.items()] == ["user_message", "workflow"])
    assert chat.items()[1]["workflow"]["tasks"][0]["content"] == "Hm. "


async def test_no_task_is_abandoned(customised, provider):
    """chatkit's _merge_generators abandons it: "Task exception was never retrieved"."""
    provider.script["go"] = [[Text("one "), Silence()]]
    httpx.get(f"{customised.url}/collect", verify=NO_TLS)
    with customised.no_new("never retrieved"):
        for _ in range(5):
            chat = Chat(customised.url)
            stream = chat.start("go")
            next(event for event in stream if event.type == "thread.item.updated")
            stream.close()
            await until(lambda chat=chat: chat.debug()[-1]["type"] == "SDKHiddenContextItem")
            assert httpx.get(f"{customised.url}/collect", verify=NO_TLS).status_code == 200
