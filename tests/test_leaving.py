"""Clients that disconnect, many clients at once, and a server that gets SIGTERM."""

import asyncio
import gc
import json
import re
import signal
import time
from itertools import count
from types import SimpleNamespace

import httpx
import pytest
from agents import Model, ModelSettings, ModelTracing, function_tool
from openai.types.responses import Response

from client import NO_TLS, Chat, done, memory, message, text_of, until
from provider import Pause, Silence, Text, Thought, ToolCall

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


async def test_leaving_at_any_event(custom_chat, customised, provider):
    """The provider's connection is closed within a second.

    The streamed text is stored, and the thread goes on.
    """
    first = [Thought("Hm. "), Text("one "), Text("two "), ToolCall("clock")]
    second = [Text("three "), Text("four "), Text("five"), Silence()]
    with customised.no_new(*COMPLAINTS):
        for place in range(2, 14):
            provider.script["go"] = [first, second]
            provider.requests.clear()
            chat = Chat(customised.url)
            places = count()
            events = leave_after(
                chat, "go", lambda _, places=places, place=place: next(places) == place
            )
            assert len(events) == place + 1
            reader = Chat(customised.url, thread_id=chat.thread_id)
            # The note of the cancellation is what is stored last.
            await until(lambda reader=reader: reader.debug()[-1]["type"] == "SDKHiddenContextItem")
            assert all(request.closed.wait(1) for request in provider.requests), place
            stored = [
                text_of(item) for item in reader.items() if item["type"] == "assistant_message"
            ]
            assert "".join(stored).startswith(shown(events)), place
            assert [text_of(item) for item in done(reader.say("and on"))] == ["You said: and on"]


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


async def test_a_chat_that_ended_leaves_no_request_open(customised, provider):
    assert Chat(customised.url).say("hello")
    assert not provider.open()


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
