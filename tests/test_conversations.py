"""What providers demand of a conversation: each of them answers it to its end.

The provider of the tests refuses what the real one refuses: see RULES and `check` in provider.py.
"""

import json
import logging

import pytest
from agents import Agent, FunctionTool, ModelSettings, WebSearchTool, function_tool

from client import SUPPORT, Chat, done, error_of, message, text_of
from conftest import SERVERS
from provider import (
    UNEXPECTED,
    Cut,
    Failure,
    Finish,
    Reset,
    Silence,
    Stream,
    Text,
    Thought,
    ToolCall,
    alternating,
    kimi,
    strings,
)

CONVERSING = {"PROGRAM": str(SUPPORT / "conversing.py"), "MODEL_TIMEOUT": "2"}
CONVERSING["MISTRAL_API_KEY"] = "mistral-key-0123456789"
ROUTES = {  # name: the environment of its server
    "gemini": {},
    "openai": {},
    "anthropic": {"MODEL": "claude-sonnet-4-5", "THINKING": "low"},
    "mistral": {"MODEL": "mistral-large-latest"},
    "deepseek": {"MODEL": "deepseek-v4-pro"},
    "openrouter": {"MODEL": "qwen/qwen3-235b"},
    "groq": {"MODEL": "openai/gpt-oss-120b"},
    "hosted_vllm": {"MODEL": "mistralai/Mistral-Small-3.2-24B-Instruct-2506"},
    "ollama_chat": {"MODEL": "llama3.2"},
    "own": {"PROVIDER": "openai", "MODEL": "kimi-k2-thinking", "BASE": "own"},
}
SERVERS.update(
    {f"conversing_{route}": {"PROVIDER": route, **CONVERSING, **ROUTES[route]} for route in ROUTES}
)
REPLAYED = ("anthropic", "deepseek", "own")  # these refuse a tool call without its reasoning


def slow(*values, unless: bool = False):
    """What only `make test-slow` runs: others of its kind differ more from each other."""
    return pytest.param(*values, marks=() if unless else pytest.mark.slow)


EACH = [slow(route, unless=route in ("anthropic", "mistral", "own")) for route in ROUTES]


@pytest.fixture
def server(servers, route):
    return servers(f"conversing_{route}")


@pytest.fixture
def chat(server):
    return Chat(server.url)


def told(provider) -> str:
    """What the newest request tells."""
    body = provider.requests[-1].body
    return json.dumps(body.get("messages") or body["contents"])


def assert_told(provider, phrases: list[str]) -> None:
    """Each once, in this order."""
    text = told(provider)
    assert [(phrase, text.count(phrase)) for phrase in phrases] == [(p, 1) for p in phrases]
    places = [text.index(phrase) for phrase in phrases]
    assert places == sorted(places)


def reply(events: list) -> str:
    """The text that the turn has shown at last. There was no error."""
    assert not [event for event in events if event.type == "error"], events
    return text_of(done(events)[-1])


def retry(chat: Chat, item_id: str) -> str:
    params = {"thread_id": chat.thread_id, "item_id": item_id}
    return reply(list(chat.stream("threads.retry_after_item", **params)))


def stop_in_a_tool(server, chat: Chat, text: str) -> None:
    stream = chat.start(text)
    next(event for event in stream if event.type == "stream_options")
    line = f"thread={chat.thread_id} provider="
    ended = "\n".join(server.log).count(line)
    server.wait_for(f"slow starts in {chat.thread_id}", seconds=10)
    stream.close()
    server.wait_for(line, ended + 1)


def tagged(text: str) -> dict:
    tag = {"type": "input_tag", "id": "doc_1", "text": "Bericht", "data": {"ort": "Lima"}}
    return {"content": [{"type": "input_text", "text": text}, tag]}


def hide(chat: Chat, text: str) -> None:
    assert chat.http.post(f"/hidden/{chat.thread_id}", json=text).status_code == 200


STOPPED = "It may have been carried out."  # main.STOPPED_CALL
CANCELLED = "The user cancelled the stream."  # chatkit's note
THOUGHT, BUSY, FINE = Thought("I must think."), [Failure("server")], [Text("Fine.")]
CITIES = ("Oslo", "Rome", "Paris")
OSLO, ROME, PARIS = (ToolCall("stock", {"city": city}) for city in CITIES)
IN_OSLO, IN_ROME, IN_PARIS = (f"{city}: A=4711" for city in CITIES)
LAST, SLOW, SECOND = map(ToolCall, ("last_card", "slow", "transfer_to_second"))
RED = ToolCall("pick_colour", {"hint": "warm"})


@pytest.mark.parametrize("route", ROUTES)
def test_a_long_conversation(server, chat, provider, route):
    provider.rules["own"] = (alternating, kimi)
    ponder = [Thought(f"Thought {number}.") for number in range(6)]
    provider.script |= {
        "see Oslo": [[ponder[0], Text("First I look."), OSLO], [Text("Two things.")]],
        "see both": [[ponder[1], ROME, PARIS], [Text("Two cities.")]],
        "a card": [[ponder[2], LAST]],
        "a colour": [[ponder[3], RED], [Text("Red it is.")]],
        "be slow": [[ponder[4], SLOW]],
        "be busy": [BUSY],
        "be rude": [[Failure("policy")]],
        "hand over": [[ponder[5], SECOND], [Text("Here I am.")]],
    }
    assert reply(chat.say("see Oslo")) == "Two things."
    assert reply(chat.say("see both")) == "Two cities."
    assert done(chat.say("a card"), "widget")
    assert done(chat.say("a colour"), "client_tool_call")
    assert reply(chat.answer("ruby")) == "Red it is."
    assert reply(chat.say("what is it?", quoted_text="B=4712")).endswith("B=4712")
    assert reply(chat.say("", **tagged("compare "))).startswith("You said: Bericht: ")
    hide(chat, "a note")
    assert reply(chat.say("go on")) == "You said: go on"
    stop_in_a_tool(server, chat, "be slow")
    assert error_of(chat.say("be busy")).allow_retry
    assert not error_of(chat.say("be rude")).allow_retry
    image = chat.http.post("/image").json()
    assert reply(chat.say("an image", attachments=[image])) == "You said: an image"
    asked = [item["id"] for item in chat.items() if item["type"] == "user_message"][-1]
    assert retry(chat, asked) == "You said: an image"
    assert reply(chat.say("hand over")) == "Here I am."
    assert reply(chat.say("the end")) == "You said: the end"

    assert provider.refused == []
    phrases = ["see Oslo", "First I look.", IN_OSLO, "Two things."]
    phrases += ["see both", IN_ROME, IN_PARIS, "Two cities."]
    phrases += ["the card was shown", "a colour", "ruby", "Red it is."]
    phrases += ["what is it?", "You said: The user", "compare @Bericht", "You said: Bericht"]
    phrases += ["a note", "You said: go on", "be slow", STOPPED, CANCELLED]
    phrases += ["be busy", "You said: an image", "hand over", "Here I am.", "the end"]
    assert_told(provider, phrases)
    assert "be rude" not in told(provider)
    if route != "deepseek":  # LiteLLM takes the images out
        assert "iVBORw0KGgo" in told(provider)
    if route in REPLAYED:
        assert_told(provider, [f"Thought {number}." for number in range(6)])


# ---- Each kind of turn, and then one more ---------------------------------------

TURNS: dict[str, tuple[list[list], list[str]]] = {  # the steps, and what the next turn is told
    "a tool": ([[THOUGHT, OSLO], FINE], [IN_OSLO, "Fine."]),
    "a text before a tool": ([[THOUGHT, Text("So."), OSLO], FINE], ["So.", IN_OSLO, "Fine."]),
    "parallel tools": (
        [[THOUGHT, OSLO, ROME], [THOUGHT, PARIS], FINE],
        [IN_OSLO, IN_ROME, IN_PARIS, "Fine."],
    ),
    "a tool that ends the turn": (
        [[THOUGHT, OSLO], [THOUGHT, Text("So."), LAST]],
        [IN_OSLO, "So.", "the card was shown"],
    ),
    "a client tool": ([[THOUGHT, RED], FINE], ["ruby", "Fine."]),
    "a client tool beside another": (
        [[THOUGHT, Text("So."), OSLO, RED], [THOUGHT, ROME], FINE],
        ["So.", IN_OSLO, "ruby", IN_ROME, "Fine."],
    ),
    "a client tool under another name": ([[THOUGHT, ToolCall("ask_page")], FINE], ["ruby"]),
    "a client tool that nobody answers": ([[THOUGHT, OSLO, RED]], [IN_OSLO]),
    "a stopped tool": ([[THOUGHT, SLOW]], [STOPPED, CANCELLED]),
    "a stopped tool beside another": (
        [[THOUGHT, Text("So."), OSLO, SLOW]],
        ["So.", IN_OSLO, STOPPED, CANCELLED],
    ),
    "an error after a tool": ([[THOUGHT, OSLO], BUSY], [IN_OSLO]),
    "an error in a tool": ([[THOUGHT, OSLO, ToolCall("broken")]], [IN_OSLO, STOPPED]),
    "an unknown tool": ([[THOUGHT, ToolCall("nope")], FINE], ["not found", "Fine."]),
    "a hand-off": ([[THOUGHT, OSLO], [THOUGHT, SECOND], FINE], [IN_OSLO, "Fine."]),
    "an error": ([BUSY], []),
    "an empty reply": ([[THOUGHT, Finish()]], []),
    "white space": ([[Text(" \n"), Text("\n")]], []),
    "white space before a tool": ([[THOUGHT, Text("\n\n"), OSLO], FINE], [IN_OSLO, "Fine."]),
    "white space after a tool": ([[THOUGHT, OSLO], [Text(" \n")]], [IN_OSLO]),
    "a tool's list of texts": ([[THOUGHT, ToolCall("two_texts")], FINE], ["one text", "Fine."]),
}


@pytest.mark.parametrize("turn", TURNS)
@pytest.mark.parametrize("route", EACH)
def test_the_thread_goes_on(server, chat, provider, route, turn):
    """After each kind of turn; on a server of one's own also if content must be a string."""
    provider.rules["own"] = (alternating, kimi, strings)
    steps, phrases = TURNS[turn]
    provider.script["do it"] = list(steps)
    if "stopped" in turn:
        stop_in_a_tool(server, chat, "do it")
    else:
        events = chat.say("do it")
        if turn in ("an empty reply", "white space"):
            assert "empty" in error_of(events).message
        elif "client tool" in turn and "nobody" not in turn:
            chat.answer("ruby")
    assert reply(chat.say("and on")) == "You said: and on"
    assert provider.refused == []
    assert_told(provider, ["do it", *phrases, "and on"])
    if route in REPLAYED and THOUGHT in steps[0] and phrases:
        assert THOUGHT.text in told(provider)


NEIGHBOURS = {  # what comes before the user's message, and what of it is told
    "a quote": (lambda chat: chat.say("see", quoted_text="the quote"), ["see", "the quote"]),
    "a tag": (lambda chat: chat.say("", **tagged("see ")), ["see @Bericht", "doc_1"]),
    "a note": (lambda chat: hide(chat, "a note"), ["a note"]),
    "two notes": (lambda chat: (hide(chat, "one note"), hide(chat, "two")), ["one note", "two"]),
    "errors": (lambda chat: (chat.say("be busy"), chat.say("so busy")), ["be busy", "so busy"]),
}


@pytest.mark.parametrize("kind", NEIGHBOURS)
@pytest.mark.parametrize("route", EACH)
def test_neighbours_of_one_role(server, chat, provider, route, kind):
    provider.rules["own"] = (alternating, strings)
    provider.script |= {"be busy": [BUSY], "so busy": [BUSY]}
    act, phrases = NEIGHBOURS[kind]
    chat.say("hello")
    act(chat)
    assert reply(chat.say("and on")) == "You said: and on"
    assert provider.refused == []
    for phrase in phrases:
        assert phrase in told(provider)


# ---- Another provider in between ------------------------------------------------

OTHERS = {
    "Claude": "anthropic/claude-sonnet-4-5",
    "Gemini": "gemini/gemini-flash-latest",
    "DeepSeek": "deepseek/deepseek-v4-pro",
    "Mistral": "mistral/mistral-large-latest",
}


@pytest.mark.parametrize(
    ("route", "other"),
    [
        slow(r, other, unless=r == "deepseek")
        for r in ("openai", "deepseek", "anthropic")
        for other in OTHERS
    ],
)
def test_another_provider_in_between(server, chat, provider, route, other):
    """One turn by it, or a hand-off to it in the middle of a turn, after a tool of each."""
    via = f"now this via {OTHERS[other]}"
    provider.script["do it"] = [[THOUGHT, OSLO], FINE]
    provider.script[via] = [[Thought("So be it."), ROME], [Text("Good.")]]
    hand_off = ToolCall(f"transfer_to_other_{other.lower()}")
    provider.script["hand over"] = [[THOUGHT, PARIS], [THOUGHT, hand_off], [Text("Here.")]]
    assert reply(chat.say("do it")) == "Fine."
    assert reply(chat.say(via)) == "Good."
    assert reply(chat.say("and on")) == "You said: and on"
    assert reply(chat.say("hand over")) == "Here."
    assert reply(chat.say("the end")) == "You said: the end"
    assert provider.refused == []
    assert_told(provider, [IN_OSLO, "Fine.", IN_ROME, "Good.", IN_PARIS, "Here."])
    if route in REPLAYED:
        assert THOUGHT.text in told(provider)


# ---- What a provider refuses is not told again ----------------------------------

REFUSED = [
    *[("openai", [Failure(kind)]) for kind in ("policy", "flagged", "azure", "image")],
    *[("anthropic", [Failure(kind)]) for kind in ("policy", "image", "image-size")],
    *[("gemini", [Failure(kind)]) for kind in ("policy", "image")],
    *[(route, [Finish("filter")]) for route in ("openai", "anthropic", "gemini")],
    ("gemini", [Finish("prompt")]),
    ("openai", [Failure("policy", 413)]),
    ("openai", [Failure("policy", 422)]),
]


@pytest.mark.parametrize(
    ("route", "steps", "first"),
    [
        slow(*case, first, unless=first == "at once" or case == REFUSED[0])
        for case in REFUSED
        for first in ("at once", "after a tool", "after a client tool")
    ],
    ids=str,
)
def test_a_refused_message(server, chat, provider, route, steps, first):
    """It is left out, with its calls, until it is tried again."""
    before = {"after a tool": [[THOUGHT, OSLO]], "after a client tool": [[THOUGHT, RED]]}
    provider.script["bad words"] = [*before.get(first, []), steps, [Text("Never mind.")]]
    chat.say("hello")
    events = chat.say("bad words")
    if first == "after a client tool":
        events = chat.answer("ruby")
    error = error_of(events)
    assert "this" in error.message and not error.allow_retry
    assert reply(chat.say("and on")) == "You said: and on"
    # What was refused after a client's answer is that answer.
    left_out = ["ruby"] if first == "after a client tool" else ["bad words", "A=4711"]
    assert not [text for text in left_out if text in told(provider)]
    asked = [item["id"] for item in chat.items() if item["type"] == "user_message"][1]
    assert retry(chat, asked) == "Never mind."
    chat.say("the end")
    assert_told(provider, ["You said: hello", "bad words", "Never mind.", "the end"])


# ---- A second try, or none ------------------------------------------------------

ALL = ("openai", "anthropic", "gemini")
SOON, LATE = {"Retry-After": "1"}, {"Retry-After": "3600"}
TRIES: dict[str, tuple[list, tuple[str, ...], int]] = {  # the steps, the routes, how many requests
    **{str(status): ([Failure("server", status)], ("openai",), 2) for status in (500, 502, 503)},
    "the usual status": (BUSY, ("anthropic", "gemini", "ollama_chat"), 2),
    "reset": ([Reset()], (*ALL, "ollama_chat"), 2),
    "429": ([Failure("rate", headers=SOON)], ("openai", "anthropic"), 2),
    "429 for an hour": ([Failure("rate", headers=LATE)], ALL, 1),
    **{kind: ([Failure(kind)], ALL, 1) for kind in ("key", "forbidden", "model", "long", "json")},
    **{kind: ([Failure(kind)], ("openai",), 1) for kind in ("quota", "tool", "tpm")},
    "day": ([Failure("day")], ("gemini",), 1),
    "silence": ([Silence()], ("openai",), 1),
    "after a text": ([Text("Well, "), Stream("server")], ALL, 1),
    "cut after a text": ([Text("Well, "), Cut()], ALL, 1),
}


@pytest.mark.parametrize(
    ("fault", "route"), [(fault, route) for fault in TRIES for route in TRIES[fault][1]]
)
def test_a_quiet_second_try_or_none(server, chat, provider, route, fault):
    """A fault that is no refusal of the message forgets nothing, either."""
    steps, _, requests = TRIES[fault]
    provider.script["do it"] = [steps, [Text("Here I am.")]]
    start = len(server.log)
    events = chat.say("do it")
    assert len(provider.requests) == requests
    if requests == 2:
        assert reply(events) == "Here I am."
        server.wait_for(f"thread={chat.thread_id} ")
        assert "ERROR" not in "\n".join(server.log[start:])
    else:
        assert "leave it out" not in error_of(events).message
    assert reply(chat.say("and on")) == "You said: and on"
    assert "do it" in told(provider)


# ---- The texts of errors --------------------------------------------------------

MODEL, KEY, WAIT = "Check MODEL", "Check {key}", "Wait a moment"
SAYS = [  # the routes, the kinds, what the message says, and what it does not
    ("openrouter", "no-tools data-policy", "The server's log", MODEL, KEY),
    ("own", "no-route no-page endpoint html", "OPENAI_BASE_URL", MODEL, KEY),
    ("own", "deployment", "The server's log", MODEL, KEY),
    ("openai own gemini anthropic", "model", MODEL, KEY),
    ("openai", "project", MODEL, "refused the key"),
    ("own", "access access-bedrock", "", "refused the key", KEY),
    ("openai", "forbidden", "", "refused the key"),
    ("openai anthropic gemini", "key", KEY, MODEL),
    ("openai", "tpm long", "too long", WAIT),
    ("groq", "tpm-groq", "too long", WAIT),
    ("gemini", "day", "used up", WAIT),
    ("openai", "quota", "used up", WAIT),
    ("gemini", "rate minute", WAIT, "used up"),
    ("openai", "rate", WAIT, "used up"),
    ("groq", "tool", "Try again", "refused"),
]


@pytest.mark.parametrize(
    ("route", "kind", "says"),
    [(r, k, says) for routes, kinds, *says in SAYS for r in routes.split() for k in kinds.split()],
)
def test_what_an_error_says(server, chat, provider, route, kind, says):
    """The advice fits the cause, and the log has the provider's words in one line."""
    key = "OPENAI_API_KEY" if route == "own" else f"{route.upper()}_API_KEY"
    said, *never = [text.format(key=key) for text in says]
    provider.script["do it"] = [[Failure(kind)]]
    start = len(server.log)
    error = error_of(chat.say("do it"))
    assert said in error.message
    assert not [text for text in never if text in error.message]
    assert error.allow_retry == ("try again" in error.message.lower())
    server.wait_for(f"thread={chat.thread_id} ")
    lines = [line for line in server.log[start:] if error.message in line]
    assert len(lines) == 1 and "Traceback" not in "\n".join(server.log[start:])
    words = {"endpoint": UNEXPECTED, "html": "Log in", "tool": "failed_generation"}
    assert words.get(kind, "") in lines[0]


# ---- Tools, settings, and mistakes of the setup ---------------------------------


@pytest.mark.parametrize("route", ["openai", "anthropic", "gemini", "mistral", "own"])
def test_an_unknown_tool_again_and_again(server, chat, provider, route):
    provider.script["do it"] = [[THOUGHT, ToolCall("nope")]]
    error = error_of(chat.say("do it"))
    assert "again and again" in error.message and not error.allow_retry
    assert len(provider.requests) == 10
    assert reply(chat.say("and on")) == "You said: and on"
    assert provider.refused == []


def clock(number: int) -> FunctionTool:
    return function_tool(lambda: "noon", name_override="clock")


@pytest.fixture
def log(main, monkeypatch, caplog):
    """The records of main.py in this process; the provider's uvicorn silences its logger."""
    monkeypatch.setattr(main, "logger", logging.getLogger("main"))
    return caplog


async def run(main, provider, name: str, path: str, **agent) -> str:
    """The events that a server of this process sends, whose agent has that model."""
    model = main.ProviderModel(name, f"{provider.url}/{path}", "key")
    server = main.ChatKitServerImpl(main.MemoryStore())
    server.agent = Agent("Assistant", model=model, **agent)
    body = json.dumps({"type": "threads.create", "params": {"input": message("hello")}})
    return b"".join([event async for event in (await server.process(body, {}))]).decode()


@pytest.mark.anyio
@pytest.mark.parametrize("name", ["gpt-5", "gpt-4o"])
async def test_settings_that_a_model_refuses(main, provider, name):
    settings = ModelSettings(temperature=0.2, parallel_tool_calls=True)
    events = await run(main, provider, f"openai/{name}", "openai", model_settings=settings)
    assert "You said: " in events
    (request,) = provider.requests
    assert ("temperature" in request.body) == (name == "gpt-4o")


@pytest.mark.anyio
async def test_tools_are_not_dropped_in_silence(main, provider, log):
    await run(main, provider, "perplexity/sonar", "own/v1", tools=[clock(1)])
    sent = "tools" in provider.requests[0].body
    assert sent or [record for record in log.records if "tools" in record.getMessage()]


MISTAKES = {
    "two tools of one name": ([clock(1), clock(2)], "clock"),
    "a hosted tool": ([WebSearchTool()], "WebSearchTool"),
}


@pytest.mark.anyio
@pytest.mark.parametrize("mistake", MISTAKES)
@pytest.mark.parametrize("name", ["openai/gpt-4o", "anthropic/claude-sonnet-4-6"])
async def test_a_mistake_of_the_setup(main, provider, log, mistake, name):
    """A sentence, and one log line that names it, without a traceback."""
    tools, tool = MISTAKES[mistake]
    events = await run(main, provider, name, name.partition("/")[0], tools=tools)
    errors = [record for record in log.records if record.levelname == "ERROR"]
    assert "not set up" in events
    assert len(errors) == 1 and tool in errors[0].getMessage() and errors[0].exc_info is None
