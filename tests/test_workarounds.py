"""Faults of the libraries that main.py works around, each test named after its fault.

The others stand where the behaviour is tested; README.md, "Workarounds", has the whole list.
"""

import asyncio
import re

import httpx
import pytest
from agents import ModelSettings, ModelTracing
from client import Chat, error_of, until
from provider import Failure, Silence, Text, Together

pytestmark = pytest.mark.anyio


async def test_a_fast_reply_does_not_block_others(main):
    """LiteLLM hands over buffered chunks without ever giving way to the event loop."""

    class Buffered:
        completion_stream, received_finish_reason = None, "stop"

        async def __anext__(self):
            if turns.pop() is None:
                raise StopAsyncIteration
            return "chunk"

        async def aclose(self):
            pass

    async def other() -> None:
        for _ in range(100):
            order.append("other")
            await asyncio.sleep(0)

    turns, order = [None, *range(100)], []
    task = asyncio.create_task(other())
    async for chunk in main.ProviderModel(model="openai/x")._chunks(Buffered()):
        order.append(chunk)
    await task
    assert len(order) == 200
    assert order.index("other") < 5
    assert order[100:].count("chunk") > 25


@pytest.mark.parametrize("name", ["gemini/gemini-flash-latest", "openai/gpt-4o", "anthropic/claude-sonnet-4-6"])
async def test_leaving_between_two_chunks(main, provider, name):
    """Of Anthropic's streams LiteLLM closes nothing when they are abandoned while no chunk is awaited."""
    kind = name.partition("/")[0]
    provider.script["go"] = [[Together([Text("one "), Text("two "), Text("three ")]), Silence()]]
    model = main.ProviderModel(model=name, base_url=f"{provider.url}/{kind}", api_key="key")

    async def leave() -> None:
        async for event in model.stream_response(
            None, "go", ModelSettings(), [], None, [], ModelTracing.DISABLED, previous_response_id=None
        ):
            if event.type == "response.output_text.delta":
                asyncio.current_task().cancel()  # the next chunk is there already: nothing is read

    task = asyncio.create_task(leave())
    await asyncio.wait([task])
    assert task.cancelled()
    (request,) = provider.requests
    assert await asyncio.to_thread(request.closed.wait, 1)


async def test_a_run_that_is_cancelled_twice(main):
    """openai-agents cancels a run in `cancel` and again when its events are over: perhaps while the connection closes."""

    class Endless:
        completion_stream = None

        async def __anext__(self):
            asked.set()
            await asyncio.Event().wait()

        async def aclose(self):
            closing.set()
            await network.wait()
            closed.set()

    async def read() -> None:
        async for _ in main.ProviderModel(model="openai/x")._chunks(Endless()):
            pass

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


async def test_leaving_while_something_is_sent(main):
    """Starlette cancels the stream where it sends, and chatkit's generator is dropped without a word."""
    sends, heard = asyncio.Event(), []

    async def events():
        try:
            yield b"data: {}\n\n"
            await asyncio.Event().wait()
        except BaseException as error:
            heard.append(type(error))
            raise

    async def receive() -> dict:
        await sends.wait()
        return {"type": "http.disconnect"}

    async def send(message: dict) -> None:
        if message["type"] == "http.response.body":
            sends.set()
            for _ in range(10):  # meanwhile the client is noticed to have left
                await asyncio.sleep(0)

    await main.EventStream(events())({"type": "http"}, receive, send)
    assert heard == [asyncio.CancelledError]


async def test_a_type_adapter_per_request(main, monkeypatch):
    """chatkit's process makes one for every request, which takes some 20 ms."""
    monkeypatch.delattr("chatkit.server.TypeAdapter")
    result = await main.server.process(b'{"type": "threads.list", "params": {}}', {})
    assert result.json == b'{"data":[],"has_more":false}'


async def test_a_forgotten_task(customised, provider):
    """chatkit's _merge_generators: "Task exception was never retrieved", once the task is collected."""
    provider.script["go"] = [[Text("one "), Silence()]]
    httpx.get(f"{customised.url}/collect")
    with customised.no_new("never retrieved"):
        for _ in range(5):
            chat = Chat(customised.url)
            stream = chat.start("go")
            next(event for event in stream if event.type == "thread.item.updated")
            stream.close()
            await until(lambda: chat.debug()[-1]["type"] == "SDKHiddenContextItem")
            assert httpx.get(f"{customised.url}/collect").status_code == 200


async def test_a_forgotten_queue_getter(custom_chat, customised, provider):
    """chatkit's _merge_generators: "Task was destroyed but it is pending!", once it is collected."""
    provider.script["fail"] = [[Failure("rate")]]
    httpx.get(f"{customised.url}/collect")
    with customised.no_new("was destroyed"):
        for _ in range(5):
            error_of(custom_chat.say("fail"))
        assert httpx.get(f"{customised.url}/collect").status_code == 200
        assert "was destroyed" not in "\n".join(customised.log)


async def test_ids_have_128_bits(main):
    store = main.MemoryStore()
    thread = main.ThreadMetadata(id="thr_1", created_at="2026-01-01T00:00:00")
    for id in (store.generate_thread_id({}), store.generate_item_id("message", thread, {})):
        assert re.fullmatch(r"(thr|msg)_[0-9a-f]{32}", id)


async def test_nothing_is_left_of_an_uncollected_run(customised, provider):
    """After all of the above no request is open at the provider."""
    assert Chat(customised.url).say("hello")
    assert not provider.open()
