"""What providers demand of a conversation: those of provider.py refuse what the real ones do."""

import json
import re
from dataclasses import replace
from types import SimpleNamespace

import pytest
from agents import Agent, ModelSettings, WebSearchTool, function_tool

from client import Chat, Local, done, error_of, text_of
from conftest import CUSTOMISED, SERVERS
from provider import OWN, Failure, Finish, Reset, Text, Thought, ToolCall, strings
from test_errors import message_of

OTHERS = {
    "Claude": "anthropic/claude-sonnet-4-5",
    "Gemini": "gemini/gemini-flash-latest",
    "DeepSeek": "deepseek/deepseek-v4-pro",
    "Mistral": "mistral/mistral-large-latest",
    "OpenRouter": "openrouter/anthropic/claude-sonnet-4.5",
}
CONVERSING = CUSTOMISED | {"MODEL_TIMEOUT": "2", "OTHERS": json.dumps(OTHERS)}
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


def told(provider) -> str:
    """What the newest request tells."""
    body = provider.requests[-1].body
    return json.dumps(body.get("messages") or body["contents"])


def assert_told(provider, phrases: list[str]) -> None:
    """Each once, in this order."""
    assert re.findall("|".join(map(re.escape, phrases)), told(provider)) == phrases


def reply(events: list) -> str:
    """The last text that was shown. There was no error."""
    assert not [event for event in events if event.type == "error"], events
    return text_of(done(events)[-1])


def act(chat: Chat, type: str = "custom_action", **params) -> str:
    params = {"action": {"type": "respond"}, **params, "thread_id": chat.thread_id}
    return reply(list(chat.stream(f"threads.{type}", **params)))


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
    assert chat.http.post(f"/hidden/{chat.thread_id}", json=text).is_success


STOPPED = "It may have been carried out."  # the end of main.STOPPED_CALL
CANCELLED = "The user cancelled the stream."  # chatkit's note
SHOWN = "the card was shown"
THOUGHT, SO = Thought("I must think."), Text("So.")
BUSY, FINE = [Failure("server")], [Text("Fine.")]
CITIES = ("Oslo", "Rome", "Paris")
OSLO, ROME, PARIS = (ToolCall("stock", {"city": city}) for city in CITIES)
IN_OSLO, IN_ROME, IN_PARIS = (f"{city}: A=4711" for city in CITIES)
LAST, SLOW, SECOND = map(ToolCall, ("last_card", "slow", "transfer_to_second"))
NOTHING, TWO = (ToolCall("give", {"what": what}) for what in ("nothing", "two texts"))
RED = ToolCall("pick_colour", {"hint": "warm"})
CHOOSE = ToolCall("pick_colour", {"hint": "warm", "name": "choose"})


@pytest.mark.parametrize("route", ROUTES)
def test_a_long_conversation(server, chat, provider, route):
    provider.rules["own"] = OWN
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
    assert act(chat, "retry_after_item", item_id=asked) == "You said: an image"
    assert reply(chat.say("hand over")) == "Here I am."
    assert reply(chat.say("the end")) == "You said: the end"

    assert provider.refused == []
    phrases = ["see Oslo", "First I look.", IN_OSLO, "Two things."]
    phrases += ["see both", IN_ROME, IN_PARIS, "Two cities."]
    phrases += [SHOWN, "a colour", "ruby", "Red it is."]
    phrases += ["what is it?", "You said: The user", "compare @Bericht", "You said: Bericht"]
    phrases += ["a note", "You said: go on", "be slow", STOPPED, CANCELLED]
    phrases += ["be busy", "You said: an image", "hand over", "Here I am.", "the end"]
    assert_told(provider, phrases)
    assert "be rude" not in told(provider)
    if route != "deepseek":  # LiteLLM takes the images out
        assert "iVBORw0KGgo" in told(provider)
    if route in REPLAYED:
        assert_told(provider, [f"Thought {number}." for number in range(6)])


# What the user does, or the model's steps after "do it"; and what the next turn is told.
TURNS: dict[str, tuple] = {
    "only a quote": (lambda chat: chat.say("", quoted_text="the quote"), ["the quote"]),
    "a tag": (lambda chat: chat.say("", **tagged("see ")), ["see @Bericht", "doc_1"]),
    "an action": (lambda chat: (chat.say("hello"), act(chat)), ["hello", "Aye.", "Aye."]),
    "two notes": (
        lambda chat: (chat.say("hello"), hide(chat, "one note"), hide(chat, "two")),
        ["hello", "one note", "two"],
    ),
    "errors": (lambda chat: (chat.say("be busy"), chat.say("so busy")), ["be busy", "so busy"]),
    "a tool": ([[THOUGHT, OSLO], FINE], [IN_OSLO, "Fine."]),
    "a text before a tool": ([[THOUGHT, SO, OSLO], FINE], ["So.", IN_OSLO, "Fine."]),
    "parallel tools": (
        [[THOUGHT, OSLO, ROME], [THOUGHT, PARIS], FINE],
        [IN_OSLO, IN_ROME, IN_PARIS, "Fine."],
    ),
    "a tool that ends the turn": ([[THOUGHT, OSLO], [THOUGHT, SO, LAST]], [IN_OSLO, "So.", SHOWN]),
    "a client tool": ([[THOUGHT, RED], FINE], ["ruby", "Fine."]),
    "a client tool later": ([[THOUGHT, OSLO], [THOUGHT, RED], FINE], [IN_OSLO, "ruby", "Fine."]),
    "a client tool beside another": (
        [[THOUGHT, SO, OSLO, RED], [THOUGHT, ROME], FINE],
        ["So.", IN_OSLO, "ruby", IN_ROME, "Fine."],
    ),
    "a client tool, then a note": ([[THOUGHT, RED]], ["a note", "ruby"]),
    "a client tool under another name": ([[THOUGHT, CHOOSE], FINE], ["ruby"]),
    "a client tool that nobody answers": ([[THOUGHT, OSLO, RED]], [IN_OSLO]),
    "a stopped tool": ([[THOUGHT, SLOW]], [STOPPED, CANCELLED]),
    "a stopped tool beside another": (
        [[THOUGHT, SO, OSLO, SLOW]],
        ["So.", IN_OSLO, STOPPED, CANCELLED],
    ),
    "an error after a tool": ([[THOUGHT, OSLO], BUSY], [IN_OSLO]),
    "an error in a tool": ([[THOUGHT, OSLO, ToolCall("broken")]], [IN_OSLO, STOPPED]),
    "arguments that are no JSON": (
        [[THOUGHT, ToolCall("stock", '{"city": "Os"lo"}')], FINE],
        ["An error occurred", "Fine."],
    ),
    "an unknown tool": ([[THOUGHT, ToolCall("nope")], FINE], ["not found", "Fine."]),
    "a hand-off": ([[THOUGHT, OSLO], [THOUGHT, SECOND], FINE], [IN_OSLO, "Fine."]),
    "an error": ([BUSY], []),
    "an empty reply": ([[THOUGHT, Finish()]], []),
    "white space": ([[Text(" \n"), Text("\n")]], []),
    "white space before a tool": ([[THOUGHT, Text("\n\n"), OSLO], FINE], [IN_OSLO, "Fine."]),
    "white space after a tool": ([[THOUGHT, OSLO], [Text(" \n")]], [IN_OSLO]),
    "a tool that fails": ([[THOUGHT, NOTHING], FINE], ["An error occurred", "Fine."]),
    "a tool's list of texts": ([[THOUGHT, TWO], FINE], ["one text", "another", "Fine."]),
}


@pytest.mark.parametrize("turn", TURNS)
@pytest.mark.parametrize("route", EACH)
def test_the_thread_goes_on(server, chat, provider, monkeypatch, route, turn):
    """After each kind of turn; on a server of one's own also if content must be a string."""
    monkeypatch.setattr(provider, "answer", lambda _: [Text("Aye.")])
    provider.rules["own"] = (*OWN, strings)
    provider.script |= {"be busy": [BUSY], "so busy": [BUSY]}
    turn_of, phrases = TURNS[turn]
    if callable(turn_of):
        turn_of(chat)
    else:
        provider.script["do it"], phrases = list(turn_of), ["do it", *phrases]
        events = stop_in_a_tool(server, chat, "do it") if "stopped" in turn else chat.say("do it")
        if turn in ("an empty reply", "white space"):
            error_of(events)
        elif "client tool" in turn and "nobody" not in turn:
            if "note" in turn:
                hide(chat, "a note")
            chat.answer("ruby")
    assert reply(chat.say("and on")) == "Aye."
    assert provider.refused == []
    assert_told(provider, [*phrases, "and on"])
    assert (STOPPED in told(provider)) == (STOPPED in phrases)
    is_remembered = not callable(turn_of) and THOUGHT in turn_of[0] and len(phrases) > 1
    if route in REPLAYED and is_remembered:  # once for each step
        count = sum(THOUGHT in step and len(step) > 1 for step in turn_of)
        assert told(provider).count(THOUGHT.text) == count


@pytest.mark.parametrize("route", [slow("openai"), "deepseek", slow("anthropic")])
@pytest.mark.parametrize("other", OTHERS)
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


STEPS = {"openai": Failure("policy"), "anthropic": Failure("image"), "gemini": Finish("prompt")}


@pytest.mark.parametrize("tool", [OSLO, RED], ids=["a tool", "a client tool"])
@pytest.mark.parametrize(("route", "step"), STEPS.items(), ids=str)
def test_a_refused_message(main, server, chat, provider, route, step, tool):
    """It is left out, with its calls, until it is tried again."""
    provider.script["bad words"] = [[THOUGHT, tool], [step], [Text("Never mind.")]]
    chat.say("hello")
    events = chat.say("bad words")
    if tool is RED:
        events = chat.answer("ruby")
    error = error_of(events)
    assert error.message in (main.FILTERED.message, main.REFUSED_MESSAGE.message)
    assert not error.allow_retry
    assert reply(chat.say("and on")) == "You said: and on"
    # What was refused after a client's answer is that answer.
    left_out = ["ruby"] if tool is RED else ["bad words", "A=4711"]
    assert not [text for text in left_out if text in told(provider)]
    asked = [item["id"] for item in chat.items() if item["type"] == "user_message"][1]
    assert act(chat, "retry_after_item", item_id=asked) == "Never mind."
    chat.say("the end")
    assert_told(provider, ["You said: hello", "bad words", "Never mind.", "the end"])


@pytest.mark.parametrize("route", ["openai"])
def test_a_message_that_was_not_answered_and_then_refused(chat, provider, route):
    """It is told with the next one, which is refused for it. The second refusal forgets both."""
    for text in ("one", "two", "three"):
        provider.script[text] = [[Failure("policy")]]
    provider.script["bad words"] = provider.script["my name"] = [BUSY]
    assert error_of(chat.say("bad words")).allow_retry
    for text in ("one", "two"):
        assert not error_of(chat.say(text)).allow_retry
        assert_told(provider, ["bad words", text])
    assert reply(chat.say("and on")) == "You said: and on"
    assert "bad words" not in told(provider)
    error_of(chat.say("my name"))
    error_of(chat.say("three"))  # the first refusal for some time
    assert reply(chat.say("the end")).endswith("the end") and "my name" in told(provider)


TRIES = [  # the routes, and the steps
    *[("openai", Failure("server", status)) for status in (500, 502, 503)],
    *[(route, Failure("server")) for route in ("anthropic", "gemini", "ollama_chat")],
    *[(route, Reset()) for route in ("openai", "anthropic", "gemini", "ollama_chat")],
    *[(r, Failure("rate", headers={"Retry-After": "0.1"})) for r in ("openai", "anthropic")],
]


@pytest.mark.parametrize(("route", "fault"), TRIES, ids=str)
def test_a_quiet_second_try(server, chat, provider, route, fault):
    """The person and the log hear nothing of the first. tests/test_errors.py has what gets none."""
    provider.script["do it"] = [[fault], [Text("Here I am.")]]
    start = len(server.log)
    assert reply(chat.say("do it")) == "Here I am." and len(provider.requests) == 2
    server.wait_for(f"thread={chat.thread_id} ")
    assert "ERROR" not in "\n".join(server.log[start:])


def test_how_long_a_second_try_waits(main):
    error = main.ChatError(main.RATE_LIMIT, main.model)
    waits = [main.RETRY_SECONDS, main.RETRY_SECONDS + 0.1]
    asked = [SimpleNamespace(error=error, normalized=SimpleNamespace(retry_after=w)) for w in waits]
    assert [main.is_worth_a_retry(context) for context in asked] == [True, False]


@pytest.mark.parametrize("name", ["nvidia_nim", "zai"])
async def test_no_client_of_a_library_tries_again(main, provider, name):
    """LiteLLM does not pass `max_retries` on to these: each of the two tries would be three."""
    provider.script["do it"] = [[Failure("server", 503)]]
    await Local(main, provider, model=f"{name}/any").say("do it")
    assert len(provider.requests) == 2


@pytest.mark.parametrize("route", ["openai", "anthropic", "gemini", "mistral", "own"])
def test_an_unknown_tool_again_and_again(main, server, chat, provider, route):
    provider.script["do it"] = [[THOUGHT, ToolCall("nope")]]
    error = error_of(chat.say("do it"))
    assert error.message == message_of(main, "MaxTurnsExceeded") and not error.allow_retry
    assert len(provider.requests) == 10
    assert reply(chat.say("and on")) == "You said: and on"
    assert provider.refused == []


def test_the_models_that_need_their_reasoning(main):
    """Cerebras refuses what others need, with the same models."""
    names = ["deepseek/deepseek-chat", "openrouter/z-ai/glm-4.7", "cerebras/glm-4.7", "openai/o3"]
    assert [main.needs_reasoning(name) for name in names] == [True, True, False, False]


CLOCK = function_tool(lambda: "noon", name_override="clock")


@pytest.mark.parametrize("name", ["gpt-5", "gpt-4o"])
async def test_settings_that_a_model_refuses(main, provider, name):
    settings = ModelSettings(temperature=0.2, parallel_tool_calls=True)
    await Local(main, provider, model=f"openai/{name}", model_settings=settings).say("hello")
    (request,) = provider.requests
    assert ("temperature" in request.body) == (name == "gpt-4o")


async def test_tools_are_not_dropped_in_silence(main, provider, log):
    local = Local(main, tools=[CLOCK])
    url = f"{provider.url}/own/v1"
    local.server.agent.model = main.ProviderModel("perplexity/sonar", url, "key")
    await local.say("hello")
    sent = "tools" in provider.requests[0].body
    assert sent or [record for record in log.records if "tools" in record.getMessage()]


MISTAKES = {
    "two tools of one name": ({"tools": [CLOCK, replace(CLOCK)]}, "clock"),
    "two agents of one name": ({"handoffs": [Agent("Clock"), Agent("CLOCK")]}, "to_clock"),
    "a hosted tool": ({"tools": [WebSearchTool()]}, "WebSearchTool"),
}


@pytest.mark.parametrize("mistake", MISTAKES)
@pytest.mark.parametrize("name", ["openai/gpt-4o", "anthropic/claude-sonnet-4-6"])
async def test_a_mistake_of_the_setup(main, provider, log, mistake, name):
    """A sentence, and one log line that names it, without a traceback."""
    agent, tool = MISTAKES[mistake]
    error = error_of(await Local(main, provider, model=name, **agent).say("hello"))
    assert error.message == main.SETUP.message
    (line,) = [record for record in log.records if record.levelname == "ERROR"]
    assert tool in line.getMessage() and line.exc_info is None
