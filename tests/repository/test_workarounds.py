"""Faults of the libraries that main.py works around, and that no test of what it does would show.

Each test fails without its workaround. tests/test_errors.py names more of LiteLLM's.
"""

import asyncio
import gc
import os
import subprocess
import sys
import time
import weakref
from concurrent.futures import ThreadPoolExecutor
from contextvars import ContextVar

import litellm
import pytest
from agents import Agent, ModelSettings, ModelTracing, RunConfig, Runner
from litellm.litellm_core_utils import core_helpers

from client import MAIN, PATH, SUPPORT, Chat, error_of, until
from conftest import PROVIDERS
from provider import Failure, Silence, Text


def collect(server) -> None:
    """Have the garbage collected: asyncio then complains of what was forgotten."""
    time.sleep(0.1)  # until the event loop has let go of it
    times = "\n".join(server.log).count("/collect")
    Chat(server.url).http.get("/collect")
    server.wait_for("/collect", times + 1)


def test_words_for_a_failure(main):
    """LiteLLM 16651: it says "stop", a normal end, for these words of providers."""
    ends = {word: core_helpers.map_finish_reason(word) for word in main.FAILURES.split()}
    assert set(ends.values()) == {main.FAILED_END}


async def mocked(reply: str) -> litellm.CustomStreamWrapper:
    """LiteLLM's stream of a reply that it makes up, a chunk for each three letters."""
    question = [{"role": "user", "content": "go"}]
    return await litellm.acompletion("openai/gpt-4o", question, stream=True, mock_response=reply)


async def test_a_finalizer_sets_context_variables(main):
    """LiteLLM, no issue known: that of a stream. Inside ContextVar.set, Python < 3.12 may crash."""
    changed = []

    def watch(frame, event, function) -> None:
        if event == "c_call" and isinstance(function.__self__, ContextVar):
            changed.append(function.__name__)

    stream = await mocked("one two three")
    collected = weakref.ref(stream)
    for _ in range(3):
        await anext(stream)
    await until(lambda: sys.getrefcount(collected()) <= 2)  # LiteLLM's threads have let go of it
    sys.setprofile(watch)
    try:
        del stream
        gc.collect()
    finally:
        sys.setprofile(None)
    assert collected() is None
    assert not {"set", "reset"} & set(changed)


def test_leaving_while_a_request_is_prepared(servers):
    """LiteLLM, no issue known: it is prepared in a thread, and nobody awaits the result."""
    server = servers("customised_openai")
    times = server.log.count("prepared") + 1
    with server.no_new("never awaited"):
        stream = Chat(server.url).start("slow to prepare")
        next(stream)
        server.wait_for("preparing", times)
        stream.close()
        server.wait_for("prepared", times)
        collect(server)


async def test_a_fast_reply_blocks_other_chats(main, provider):
    """LiteLLM, no issue known: it returns buffered chunks without yielding to the event loop."""
    order = []

    async def other() -> None:
        for _ in range(400):
            order.append("other")
            await asyncio.sleep(0)

    stream = await mocked("x " * 400)
    task = asyncio.create_task(other())
    async for _ in main.checked_chunks(main.model, stream):
        order.append("chunk")
    await task
    assert order[50:150].count("chunk") in range(25, 75)


async def test_every_chunk_is_kept(main, provider, monkeypatch):
    """LiteLLM, no issue known: it keeps the whole reply, for callbacks of the application alone."""
    for callbacks, most in ([], 4), ([lambda *_: None], 400):
        monkeypatch.setattr(litellm, "success_callback", callbacks)
        stream = await mocked("x " * 200)
        kept = [len(stream.chunks) async for _ in main.checked_chunks(main.model, stream)]
        assert most / 4 < max(kept) <= most


async def test_leaving_between_two_chunks(main, provider):
    """LiteLLM, no issue known: a stream that is abandoned then keeps its connection."""
    provider.script["go"] = [[[Text("one "), Text("two "), Text("three ")], Silence()]]
    model = main.ProviderModel("openai/gpt-4o", f"{provider.url}/openai", "key")
    arguments = (None, "go", ModelSettings(), [], None, [], ModelTracing.DISABLED)

    async def leave() -> None:
        async for event in model.stream_response(*arguments, previous_response_id=None):
            if event.type == "response.output_text.delta":
                asyncio.current_task().cancel()  # the next chunk is there already: nothing is read

    await asyncio.wait([asyncio.create_task(leave())])
    (request,) = provider.requests
    assert await asyncio.to_thread(request.closed.wait, 5)


FIRST_CHAT = """
import asyncio, sys
import main
from client import Local
async def chat():
    async with main.lifespan(main.app):
        before = {*sys.modules}
        await Local(main).say("hello")
        print(len({*sys.modules} - before))
asyncio.run(chat())
"""


@pytest.mark.slow
def test_the_first_chat_imports_hundreds_of_modules(provider):
    """LiteLLM and openai-agents, no issue known: the start does it."""

    def imported(name: str) -> int:
        path = os.pathsep.join(map(str, (MAIN.parent, SUPPORT)))
        environment = provider.environment() | {"PATH": PATH, "PYTHONPATH": path, "PROVIDER": name}
        return int(subprocess.check_output([sys.executable, "-c", FIRST_CHAT], env=environment))

    with ThreadPoolExecutor() as pool:
        assert max(pool.map(imported, PROVIDERS)) < 10
    assert [request.message for request in provider.requests] == ["hello"] * len(PROVIDERS)


@pytest.mark.parametrize("settings", [None, ModelSettings(temperature=0)])
async def test_a_second_agent_gets_openais_reasoning_effort(main, provider, settings):
    """openai-agents, no issue known: it gives an agent without a model the effort "none".

    Gemini would not think then, and o4-mini refuses it.
    """
    agent = Agent("Second")
    assert agent.model_settings.reasoning is not None
    agent.model = main.ProviderModel("gemini/gemini-flash-latest", f"{provider.url}/gemini", "key")
    result = Runner.run_streamed(agent, "go", run_config=RunConfig(model_settings=settings))
    assert [event async for event in result.stream_events()]
    (request,) = provider.requests
    assert "thinking" not in str(request.body)


def test_an_abandoned_queue_getter(servers, provider):
    """chatkit, no issue known: its _merge_generators leaves one behind after an error."""
    provider.script["fail"] = [[Failure("key")]]
    server = servers("customised_openai")
    with server.no_new("was destroyed"):
        for _ in range(5):
            error_of(Chat(server.url).say("fail"))
        collect(server)


async def test_a_type_adapter_for_each_request(main, monkeypatch):
    """chatkit, no issue known: its process builds one, which takes 20 ms."""
    monkeypatch.delattr("chatkit.server.TypeAdapter")
    result = await main.server.process(b'{"type": "threads.list", "params": {}}', {})
    assert result.json == b'{"data":[],"has_more":false}'
