"""The provider fails: one error event that says what to do, one log line, the thread goes on."""

import asyncio
import socket
from concurrent.futures import ThreadPoolExecutor
from itertools import pairwise
from types import SimpleNamespace

import pytest
from agents import ModelSettings, ModelTracing

from client import ROOT, Chat, done, error_of, say_at_once, text_of
from conftest import PROVIDERS
from provider import SECRET, Cut, Failure, Finish, Raw, Silence, Stream, Text, Thought, ToolCall

KEYS = ("gemini-key-0123456789", "openai-key-0123456789", "anthropic-key-0123456789")
PARTIAL = [Text("The first "), Text("half")]

# name: steps of the provider, what the message says, allow_retry, what is stored of the reply
FAULTS = {
    "key refused": ([Failure("key")], "_API_KEY", False, ""),
    "forbidden": ([Failure("forbidden")], "_API_KEY", False, ""),
    "unknown model": ([Failure("model")], "MODEL", False, ""),
    "rate limit": ([Failure("rate")], "Wait", True, ""),
    "too long": ([Failure("long")], "Start a new thread", False, ""),
    "filtered at once": ([Finish("filter")], "filter", False, ""),
    "prompt filtered": ([Finish("prompt")], "filter", False, ""),
    "filtered on the way": ([*PARTIAL, Finish("filter")], "filter", False, "The first half"),
    "server error": ([Failure("server")], "unavailable", True, ""),
    "server error on the way": ([*PARTIAL, Stream("server")], "cut off", True, "The first half"),
    "cut": ([*PARTIAL, Cut()], "cut off", True, "The first half"),
    "web page": ([Failure("html")], "not understood", True, ""),
    "other JSON": ([Failure("json")], "not understood", True, ""),
    "no event": ([Raw(b"")], "not understood", True, ""),
    "empty": ([Finish()], "empty", True, ""),
    "only thoughts": ([Thought("Hm."), Finish()], "empty", True, ""),
    "no tokens left": ([Finish("length")], "empty", True, ""),
}
NAMES = {
    "gemini": ("GEMINI_API_KEY", "gemini/gemini-flash-latest"),
    "openai": ("OPENAI_API_KEY", "openai/gpt-4o"),
    "anthropic": ("ANTHROPIC_API_KEY", "anthropic/claude-sonnet-4-6"),
}


@pytest.mark.parametrize("fault", FAULTS)
def test_fault(chat, server, provider, provider_name, fault):
    steps, says, allow_retry, kept = FAULTS[fault]
    chat.say("hello")
    before = chat.items()
    provider.script["please"] = [steps]
    log_start = len(server.log)
    events = chat.say("please")

    error = error_of(events)
    assert (error.code, error.allow_retry) == ("custom", allow_retry)
    assert says in error.message
    key, model = NAMES[provider_name]
    assert (key in error.message) == (says == "_API_KEY")
    assert (model in error.message) == (says == "MODEL")
    for secret in (*KEYS, SECRET, "http", "Exception", "sk-"):
        assert secret not in str(events)

    asked, *replies = chat.items()[len(before) :]
    assert text_of(asked) == "please"
    assert [text_of(item) for item in replies if item["type"] == "assistant_message"] == [
        kept
    ] * bool(kept)
    shown = [event.item.id for event in events if event.type == "thread.item.added"]
    assert [item["id"] for item in replies] == shown

    assert [text_of(item) for item in done(chat.say("and on"))] == ["You said: and on"]
    log = server.log[log_start:]
    assert len([line for line in log if error.message in line]) == 1, log
    assert "Traceback" not in "\n".join(log)
    for key in KEYS:
        assert key not in "\n".join(server.log)


def test_silence(servers, provider):
    """Before the first token and between two.

    The connection is closed, the text stays. All providers at once.
    """
    silences = {"at once": ([Silence()], ""), "later": ([*PARTIAL, Silence()], "The first half")}
    provider.script.update({text: [steps] for text, (steps, _) in silences.items()})
    chats = [
        (Chat(servers(f"customised_{name}").url), text) for name in PROVIDERS for text in silences
    ]
    with ThreadPoolExecutor(len(chats)) as pool:
        streams = list(pool.map(lambda pair: pair[0].say(pair[1]), chats))
    for (chat, text), events in zip(chats, streams, strict=True):
        error = error_of(events)
        assert (error.code, error.allow_retry) == ("custom", True) and "timed out" in error.message
        assert text_of(chat.items()[-1]) == (silences[text][1] or text)
    assert len(provider.requests) == len(chats)
    for request in provider.requests:
        assert request.closed.wait(1)
    for chat, _ in chats:
        assert [text_of(item) for item in done(chat.say("and on"))] == ["You said: and on"]


@pytest.mark.anyio
async def test_a_provider_that_is_not_there(main, monkeypatch, provider_name):
    """A connection that is refused, and one that is accepted and never answered."""

    async def fault(url: str) -> Exception:
        model = main.ProviderModel(model=NAMES[provider_name][1], base_url=url, api_key="key")
        settings = ModelSettings(extra_args={"max_retries": 0})
        events = model.stream_response(
            None, "go", settings, [], None, [], ModelTracing.DISABLED, previous_response_id=None
        )
        with pytest.raises(main.ProviderFault) as raised:
            _ = [event async for event in events]
        return raised.value

    monkeypatch.setattr(main, "MODEL_TIMEOUT", 0.5)
    listener = socket.create_server(("127.0.0.1", 0))
    # LiteLLM takes 403 for the status wherever it stands in an error of Gemini's.
    while "403" in str(listener.getsockname()):
        listener = socket.create_server(("127.0.0.1", 0))
    with listener:
        url = f"http://127.0.0.1:{listener.getsockname()[1]}"
        error = await fault(url)
        assert "timed out" in error.message and error.allow_retry
    error = await fault(url)
    assert "unavailable" in error.message and error.allow_retry


class Refused(Exception):
    """As the libraries of providers raise it."""

    def __init__(self, status_code: int):
        self.status_code = status_code


def raised(*errors: Exception, cause: bool) -> Exception:
    """The last of the errors, raised because of the one before or while it was handled."""
    for earlier, later in pairwise(errors):
        try:
            try:
                raise earlier
            except Exception as error:
                if cause:
                    raise later from error
                raise later  # noqa: B904 - its cause is not named on purpose
        except Exception:
            pass
    return errors[-1]


@pytest.mark.parametrize("cause", [True, False], ids=["cause", "context"])
def test_a_status_inside_of_another_error(main, cause):
    """It is found at any depth; so is the class of an error."""

    def found(*errors: Exception) -> str | None:
        fault = main.find_fault(raised(*errors, cause=cause))
        return fault and fault.message

    assert "rate limit" in found(Refused(429))
    assert "rate limit" in found(Refused(429), ValueError())
    assert "rate limit" in found(Refused(429), ValueError(), RuntimeError())
    assert "timed out" in found(TimeoutError(), ValueError(), RuntimeError())
    assert found(KeyError(), ValueError(), RuntimeError()) is None
    # The innermost status is the provider's own: LiteLLM may read the outer from digits in a text.
    assert "refused the key" in found(Refused(403), Refused(429))
    assert "rate limit" in found(Refused(429), Refused(403))


def test_a_circle_of_errors(main):
    first, second = ValueError(), RuntimeError()
    first.__context__, second.__context__ = second, first
    assert main.find_fault(first) is None


def test_other_chats_go_on_while_a_web_page_is_no_stream(server, provider):
    provider.script["lost"] = [[Failure("html")]]
    provider.script["half a chunk"] = [[Text("a"), Raw(b'data: {"candidates": [{"cont')]]
    replies = say_at_once(server.url, ["lost", "half a chunk", "fine"])
    assert "not understood" in error_of(replies["lost"]).message
    assert [text_of(item) for item in done(replies["fine"])] == ["You said: fine"]


def test_a_reply_may_end_in_silence_after_a_tool(custom_chat, provider):
    """Claude and Gemini may say nothing more after a tool's output.

    What came before is the reply.
    """
    provider.script["look"] = [[Text("Looking. "), ToolCall("clock")], [Finish()]]
    events = custom_chat.say("look")
    assert not [event for event in events if event.type == "error"]
    assert [text_of(item) for item in done(events)] == ["Looking. "]


def test_a_tool_that_does_not_exist(custom_chat, provider):
    provider.script["act"] = [[ToolCall("no_such_tool")]]
    error = error_of(custom_chat.say("act"))
    assert "not understood" in error.message and error.allow_retry


@pytest.mark.parametrize(
    ("tool", "cause"),
    [
        ("broken", "ZeroDivisionError: a bug in a tool"),
        ("broken_database", "TimeoutError: the tool's database was silent"),
    ],
)
def test_a_bug_in_a_tool_is_the_servers_own(custom_chat, customised, provider, tool, cause):
    provider.script["act"] = [[Text("Let me try. "), ToolCall(tool)]]
    error = error_of(custom_chat.say("act"))
    assert (error.code, error.message) == ("stream.error", None)
    log = customised.wait_for(cause)
    assert "Traceback" in log
    assert [text_of(item) for item in custom_chat.items()] == ["act", "Let me try. "]
    assert [text_of(item) for item in done(custom_chat.say("and on"))] == ["You said: and on"]


def test_heartbeats_while_the_model_is_silent(custom_chat, provider):
    """Proxies close idle streams, so a progress_update is sent as a heartbeat."""
    silence = Silence()
    provider.script["think hard"] = [[Text("Well, "), silence, Text("yes.")]]
    events = []
    for event in custom_chat.start("think hard"):
        events.append(event)
        if [event.type for event in events].count("progress_update") == 2:
            silence.end.set()
    assert [event.type for event in events].count("progress_update") >= 2
    assert [text_of(item) for item in done(events)] == ["Well, yes."]
    assert [item["type"] for item in custom_chat.items()] == ["user_message", "assistant_message"]


class Clock:
    """In the place of `time` and of the event loop: it moves from one call to the next."""

    def __init__(self) -> None:
        self.now = 0.0
        self.calls: list = []

    def monotonic(self) -> float:
        return self.now

    def call_later(self, delay: float, call) -> None:
        self.calls.append((self.now + delay, call))

    def move(self) -> None:
        self.calls.sort(key=lambda call: call[0])
        self.now, call = self.calls.pop(0)
        call()


def test_a_heartbeat_comes_when_the_silence_has_lasted(main, monkeypatch):
    """Not when the silence is looked at next, which may be almost twice as late."""
    clock = Clock()
    loop = SimpleNamespace(Queue=asyncio.Queue, get_running_loop=lambda: clock)
    monkeypatch.setattr(main, "time", clock)
    monkeypatch.setattr(main, "asyncio", loop)
    turn = main.Turn(set(), None)
    turn.send_heartbeats()
    for silences in (0.3, 0.7, 2.6):
        clock.call_later(silences * main.SILENCE_SECONDS, lambda: turn.put(b"an event"))
    times = []
    while len(times) < 3:
        clock.move()
        while turn.queue.qsize():
            if turn.queue.get_nowait() == main.HEARTBEAT:
                times.append(clock.now / main.SILENCE_SECONDS)
    assert times == pytest.approx([1.7, 3.6, 4.6])


def test_silence_is_a_quarter_of_what_proxies_allow():
    assert "\nSILENCE_SECONDS = 15 " in (ROOT / "backend" / "main.py").read_text()
