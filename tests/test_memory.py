"""What the model is told again in later turns: texts, tool calls, quotes, tags, hidden items.

With --postgres the servers are two workers.
"""

import json
import re

import pytest
from agents import RunContextWrapper, StopAtTools, function_tool
from chatkit.agents import AgentContext, ClientToolCall
from chatkit.types import FileAttachment

from client import Local, Reading, again, done, text_of, until
from conftest import PROVIDERS
from provider import Finish, OpenAI, Raw, Silence, Text, Thought, ToolCall


@pytest.fixture
def provider_name() -> str:
    """One of them: tests/test_conversations.py has what the others demand."""
    return "openai"


def told(provider) -> list[tuple[str, str]]:
    """The newest request as (role, text) of each part."""
    return provider.requests[-1].messages


def conversation(provider) -> list[tuple]:
    """The newest request: (role, text), ("call", tool, arguments) and ("output", tool, text)."""
    found: list[tuple] = []
    calls: dict[str, tuple] = {}  # that wait for their outputs
    for message in provider.requests[-1].body["messages"]:
        content = message.get("content") or []
        texts = [content] if isinstance(content, str) else [part["text"] for part in content]
        if message["role"] == "tool":
            call = calls.pop(message["tool_call_id"])
            (place,) = [place for place, part in enumerate(found) if part is call]
            found.insert(place + 1, ("output", call[1], *texts))
        elif message["role"] != "system":
            assert not calls
            found += [(message["role"], text) for text in texts]
        for call in message.get("tool_calls", []):
            name, arguments = call["function"]["name"], call["function"]["arguments"]
            calls[call["id"]] = ("call", name, json.loads(arguments))
            found.append(calls[call["id"]])
    assert not calls
    return found


def pair(tool: str, arguments: dict, output: str) -> list[tuple]:
    return [("call", tool, arguments), ("output", tool, output)]


def stock(city: str) -> list[tuple]:
    return pair("stock", {"city": city}, f"{city}: A=4711, B=4712")


OSLO = ToolCall("stock", {"city": "Oslo"})
RED = ToolCall("pick_colour", {"hint": "warm"})

TEXTS = ["\U0001f600 \u202eשלום\u202c e\u0301 \u2028", "NUL \0 in the middle", "long " * 60_000]


@pytest.mark.parametrize("provider_name", PROVIDERS)
def test_each_message_is_told_once_unchanged_and_in_order(chat, provider, main):
    expected = []
    for text in TEXTS:
        provider.script[text] = [[Text(text)]]
        assert [text_of(item) for item in done(chat.say(text))] == [text]
        expected += [("user", text), ("assistant", text)]
    chat.say("and on")
    assert told(provider) == [*expected, ("user", "and on")]
    request = provider.requests[-1]
    assert request.format.instructions(request.body) == main.server.agent.instructions


def test_a_tool_call_is_told_in_later_turns(custom_chat, provider):
    """In its place, once; and no client ever sees it."""
    provider.script["what is there?"] = [
        [Thought("Hm."), Text("Let me look. "), OSLO, ToolCall("stock", {"city": "Köln"})],
        [ToolCall("ask_second", {"input": "what now?"})],
        [Thought("So."), Text("Two things.")],
    ]
    events = custom_chat.say("what is there?")
    first = [("user", "what is there?"), ("assistant", "Let me look. ")]
    first += [*stock("Oslo"), *stock("Köln")]
    first += pair("ask_second", {"input": "what now?"}, "You said: what now?")
    first += [("assistant", "Two things.")]
    for text in ("and the second?", "and on"):
        events += custom_chat.say(text)
        assert conversation(provider)[: len(first) + 1] == [*first, ("user", "and the second?")]

    threads = [custom_chat.thread(), custom_chat.get("threads.list", limit=1)]
    shown = str([events, custom_chat.items(), threads])
    assert "Two things." in shown and "A=4711" not in shown and "hidden_context" not in shown
    hidden = [item for item in custom_chat.debug() if item["type"] == "HiddenContextItem"]
    assert [set(item) for item in hidden] == [{"id", "type"}] * 2


def test_a_provider_that_repeats_its_ids(custom_chat, provider):
    """Some count the calls of each reply, and some demand ids of nine letters or digits."""
    cities = ("Oslo", "Rome", "Paris")
    oslo, rome, paris = (ToolCall("stock", {"city": city}, id="call_0") for city in cities)
    provider.script["look"] = [[oslo], [rome], [Text("Here.")]]
    provider.script["again"] = [[paris], [Text("Here.")]]
    for text in ("look", "again", "and on"):
        custom_chat.say(text)
    found = [part for part in conversation(provider) if part[0] in ("call", "output")]
    assert found == stock("Oslo") + stock("Rome") + stock("Paris")
    ids = re.findall(r'"id": "(\w+)"', json.dumps(provider.requests[-1].body))
    assert len({*ids}) == 3 and all(re.fullmatch("[a-zA-Z0-9]{9}", id) for id in ids)


@pytest.mark.parametrize("more", [{}, {"id": "chatcmpl-tool-2"}], ids=["none", "new"])
def test_parts_of_two_calls_that_alternate(custom_chat, provider, more):
    """Some servers give an id to each part of a call, or the name after the id."""

    def part(**call) -> Raw:
        return Raw(OpenAI({}).chunk({"tool_calls": [call]}))

    start = {"name": "stock", "arguments": '{"city": '}
    nameless = part(index=0, id="call_0", function={"arguments": ""})
    begun = [nameless, *(part(index=n, id=f"call_{n}", function=start) for n in (0, 1))]
    ends = [{"arguments": f'"{city}"}}'} for city in ("Oslo", "Köln")]
    rest = [part(index=n, function=end, **more) for n, end in enumerate(ends)]
    provider.script["look"] = [[*begun, *rest, Finish()], [Text("Here.")]]
    custom_chat.say("look")
    told = sorted(conversation(provider)[1:], key=str)
    assert told == sorted(stock("Oslo") + stock("Köln"), key=str)


OUTPUTS = {  # what the tool answers, and what of it is told
    "half a pair": r"half \?",
    "a picture": r"two things\n\[image: it was not kept\]",
    "report": r"the start x+\n\[\d+ characters were cut out here\]\nx+ the end",
}


def test_what_is_kept_of_an_output(custom_chat, provider, main):
    calls = [ToolCall("give", {"what": what}) for what in OUTPUTS]
    provider.script["use it"] = [calls, [Text("Used.")]]
    custom_chat.say("use it")
    custom_chat.say("and on")
    kept = [output for kind, *_, output in conversation(provider) if kind == "output"]
    for output, pattern in zip(kept, OUTPUTS.values(), strict=True):
        assert re.fullmatch(pattern, output) and len(output) < main.TOOL_OUTPUT_LENGTH + 50


async def test_arguments_are_always_an_object_and_never_long(main, provider):
    """LiteLLM parses them for Gemini and Anthropic: others would fail every later turn."""
    texts = ('{"a": "ö"}', "", "{", "[1]")
    kept = [{"a": "ö"}, {}, {"arguments": "{"}, {"arguments": "[1]"}]
    assert [json.loads(main.as_arguments(text)) for text in texts] == kept
    local = Local(main, provider, **TOOLS)
    provider.script["go"] = [[ToolCall("stock", {"city": "x" * 200_000})], [Text("It is far.")]]
    for text in ("go", "and on"):
        await local.say(text)
    body = str(provider.requests[-1].body)  # its arguments and its output
    assert body.count("characters were cut out here") == 2 < len(body) / main.TOOL_OUTPUT_LENGTH < 3


@function_tool(name_override="stock")
async def look_up(city: str) -> str:
    return f"{city}: A=4711, B=4712"


@function_tool
async def pick_colour(ctx: RunContextWrapper[AgentContext], hint: str) -> str:
    ctx.context.client_tool_call = ClientToolCall(name="pick_colour", arguments={"hint": hint})
    return "asked"


TOOLS = {
    "tools": [look_up, pick_colour],
    "tool_use_behavior": StopAtTools(stop_at_tool_names=["pick_colour"]),
}


async def test_geminis_signature_is_kept_with_its_call(main, provider):
    """While the turn goes on, here after a client's tool, Gemini refuses a call without it."""
    local = Local(main, provider, model="gemini/gemini-flash-latest", **TOOLS)
    provider.script["look"] = [[Thought("Hm."), OSLO], [RED], [Text("Red it is.")]]
    await local.say("look")
    assert [text_of(item) for item in done(await local.answer("red"))] == ["Red it is."]
    assert json.dumps(provider.requests[-1].body).count('"thoughtSignature": "c2ln"') == 1


async def test_a_tool_whose_output_must_not_be_kept(main, provider):
    local = Local(main, provider, **TOOLS)
    local.server.forgotten_tools.add("stock")
    provider.script["tell me"] = [[OSLO], [Text("Told.")]]
    await local.say("tell me")
    await local.say("and on")
    texts = [("user", "tell me"), ("assistant", "Told."), ("user", "and on")]
    assert conversation(provider) == texts and "A=4711" not in str(await local.items())


async def test_an_item_that_cannot_be_told(main, provider, log):
    """Here nobody has said what becomes of an attachment. The log tells nothing of the chat."""
    local = Local(main, provider)
    attachment = FileAttachment(id="atc_1", name="a.txt", mime_type="text/plain")
    await local.server.store.save_attachment(attachment, {})
    assert done(await local.say("secret words", attachments=["atc_1"]))
    assert told(provider) == [("user", "[Here is a user_message that you cannot see.]")]
    (line,) = [record for record in log.records if record.levelname == "ERROR"]
    id = (await local.items())[0].id
    assert line.getMessage() == f"Item {id} cannot be told to the model: NotImplementedError"


async def test_the_window_starts_at_a_question_and_splits_no_call(main, provider, monkeypatch):
    monkeypatch.setattr(main, "HISTORY_ITEMS", 9)
    local = Local(main, provider, **TOOLS)
    for number in range(6):
        provider.script[f"turn {number}"] = [[OSLO], [Text(f"reply {number}")]]
        await local.say(f"turn {number}")
    await local.say("and on")
    expected = []
    for number in (4, 5):
        expected += [("user", f"turn {number}"), *stock("Oslo"), ("assistant", f"reply {number}")]
    assert conversation(provider) == [*expected, ("user", "and on")]


async def test_a_turn_that_is_longer_than_the_window(main, provider, monkeypatch):
    """It goes on after a client tool, and the model still reads what was asked."""
    monkeypatch.setattr(main, "HISTORY_ITEMS", 3)
    local = Local(main, provider, **TOOLS)
    provider.script["go"] = [*[[OSLO]] * 7, [RED], [Text("Fine.")]]
    await local.say("hello")
    await local.say("go")
    assert [text_of(item) for item in done(await local.answer("red"))] == ["Fine."]
    found = conversation(provider)
    assert found[-2:] == pair("pick_colour", {"hint": "warm"}, '"red"')
    assert found[:-2] == [("user", "go"), *stock("Oslo") * 7]


async def test_another_turn_replies_before_the_client_answers(custom_chat, provider):
    """The answer is found, and the model reads it after that reply, once."""
    custom_chat.say("hello")
    first, second = Silence(), Silence()
    provider.script["a colour"] = [[first, RED]]
    provider.script["the time"] = [[Text("It is "), second, Text("noon.")], [Text("And red.")]]
    asking = Reading(again(custom_chat).start("a colour"))
    await until(lambda: len(provider.requests) == 2)
    replying = Reading(again(custom_chat).start("the time"))
    await replying.until('"It is "')
    first.end.set()
    assert len(done(await asking.end(), "client_tool_call")) == 1
    second.end.set()
    await replying.end()

    assert [text_of(item) for item in done(custom_chat.answer("red"))] == ["And red."]
    assert conversation(provider)[2:] == [
        ("user", "a colour\n\nthe time"),
        ("assistant", "It is noon."),
        *pair("pick_colour", {"hint": "warm"}, '"red"'),
    ]


def test_a_tag_is_told(chat, provider):
    """Also between white space, and with an id in its data; no script is escaped."""
    tag = {"type": "input_tag", "id": "doc_2", "text": "Bericht"}
    tag["data"] = {"ort": "東京", "id": "forged"}
    blank = {"type": "input_text", "text": " \n "}
    assert done(chat.say("", content=[blank, tag, blank]))
    ((role, text),) = told(provider)
    assert (role, text.split("\n\n")[0]) == ("user", " \n @Bericht \n ")
    told_of_it = text.rpartition("\n\nBericht: ")[2]
    assert json.loads(told_of_it) == {"ort": "東京", "id": "doc_2"} and "東京" in told_of_it


HIDDEN = {  # what the application stores: what the model is told
    "a note": "a note",
    '{"n": [1, null], "ort": "Köln"}': {"n": [1, None], "ort": "Köln"},
    '["a", {"text": "b"}]': ["a", {"text": "b"}],
    "null": None,
}


def test_a_hidden_item_is_told_as_json(custom_chat, provider):
    custom_chat.say("hello")
    for content in map(json.dumps, HIDDEN.values()):
        assert custom_chat.http.post(f"/hidden/{custom_chat.thread_id}", content=content).is_success
    custom_chat.say("and on")
    head = "Hidden context for the agent (not shown to the user):"  # chatkit's words
    notes = [f"{head}\n<HiddenContext>\n{text}\n</HiddenContext>" for text in HIDDEN]
    assert told(provider)[2:] == [("user", "\n\n".join([*notes, "and on"]))]
