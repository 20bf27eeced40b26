"""What the model is told again in later turns: texts, tool calls, quotes, tags, hidden items.

With --postgres the servers are two workers.
"""

import asyncio
import json
import re

import pytest
from agents import RunContextWrapper, StopAtTools, function_tool
from chatkit.agents import AgentContext, ClientToolCall

from client import Chat, Local, Reading, again, done, text_of
from provider import Finish, OpenAI, Raw, Silence, Text, Thought, ToolCall

one_provider = pytest.mark.parametrize("provider_name", ["openai"])


def told(provider) -> list[tuple[str, str]]:
    """The newest request as (role, text) of each part."""
    return provider.requests[-1].messages


def conversation(provider) -> list[tuple]:
    """The newest request, read in its provider's own form.

    (role, text) of each text, ("call", tool, arguments) and ("output", tool, text), each after its
    call. No two calls have the same id, and nothing but calls and outputs stands between the two.
    """
    found: list[tuple] = []
    calls: dict[str, tuple] = {}
    for kind, *part in parts(provider.requests[-1].body):
        if kind == "call":
            id, name, arguments = part
            assert id not in calls
            calls[id] = (kind, name, arguments)
            found.append(calls[id])
        elif kind == "output":
            id, text = part
            place = max(place for place, part in enumerate(found) if part is calls[id])
            assert {part[0] for part in found[place:]} <= {"call", "output"}
            found.insert(place + 1, (kind, calls[id][1], text))
        else:
            found.append((kind, *part))
    assert [kind for kind, *_ in found].count("output") == len(calls)
    return found


def parts(body: dict):
    """Each part of the request in a common form."""
    for entry in body.get("contents") or body["messages"]:
        role = entry["role"].replace("model", "assistant")
        content = entry.get("parts") or entry.get("content") or []
        if role == "tool":  # OpenAI
            yield "output", entry["tool_call_id"], content
        if role in ("tool", "system"):
            continue
        for part in [{"text": content}] if isinstance(content, str) else content:
            match part:
                case {"function_call": call}:  # Gemini
                    yield "call", call["id"], call["name"], call["args"]
                case {"function_response": output}:
                    yield "output", output["id"], output["response"]["content"]
                case {"type": "tool_use"}:  # Anthropic
                    yield "call", part["id"], part["name"], part["input"]
                case {"type": "tool_result"}:
                    yield "output", part["tool_use_id"], part["content"]
                case _:
                    yield role, part["text"]
        for call in entry.get("tool_calls", []):
            function = call["function"]
            yield "call", call["id"], function["name"], json.loads(function["arguments"])


def pair(tool: str, arguments: dict, output: str) -> list[tuple]:
    return [("call", tool, arguments), ("output", tool, output)]


def stock(city: str) -> list[tuple]:
    return pair("stock", {"city": city}, f"{city}: A=4711, B=4712")


def note(text: str) -> str:
    head = "Hidden context for the agent (not shown to the user):"
    return f"{head}\n<HiddenContext>\n{text}\n</HiddenContext>"


# In chatkit's words.
QUOTE = "The user is referring to this in particular: \nthe quoted part"
OSLO = ToolCall("stock", {"city": "Oslo"})
KOELN = ToolCall("stock", {"city": "Köln"})
RED = ToolCall("pick_colour", {"hint": "warm"})

# ---- Texts --------------------------------------------------------------------------------------

TEXTS = ["\U0001f600 \u202eשלום\u202c e\u0301 \u2028", "NUL \0 in the middle", "long " * 60_000]


def test_each_message_is_told_once_unchanged_and_in_order(chat, provider, main):
    expected = []
    for text in TEXTS:
        provider.script[text] = [[Text(text)]]
        assert [text_of(item) for item in done(chat.say(text))] == [text]
        expected += [("user", text), ("assistant", text)]
    assert [text_of(item) for item in chat.items()] == [text for _, text in expected]
    chat.say("and on")
    assert told(provider) == [*expected, ("user", "and on")]
    request = provider.requests[-1]
    assert request.format.instructions(request.body) == main.server.agent.instructions


# ---- Tools --------------------------------------------------------------------------------------


def test_a_tool_call_is_told_in_later_turns(custom_chat, provider):
    """In its place between the texts, once; and no client ever sees it."""
    provider.script["what is there?"] = [
        [Thought("Hm."), Text("Let me look. "), OSLO, KOELN],
        [Thought("So."), Text("Two things.")],
    ]
    events = custom_chat.say("what is there?")
    first = [
        ("user", "what is there?"),
        ("assistant", "Let me look. "),
        *stock("Oslo"),
        *stock("Köln"),
        ("assistant", "Two things."),
    ]
    for text in ("and the second?", "and on"):
        events += custom_chat.say(text)
        assert conversation(provider)[: len(first) + 1] == [*first, ("user", "and the second?")]

    shown = [event.model_dump_json() for event in events]
    shown += [json.dumps(custom_chat.items())]
    shown += [json.dumps(custom_chat.get("threads.get_by_id", thread_id=custom_chat.thread_id))]
    shown += [json.dumps(custom_chat.get("threads.list", limit=1))]
    assert not [text for text in shown if "A=4711" in text or "hidden_context" in text]
    hidden = [item for item in custom_chat.debug() if item["type"] == "HiddenContextItem"]
    assert [set(item) for item in hidden] == [{"id", "type"}]


def test_a_provider_that_repeats_its_ids(custom_chat, provider):
    """Some count the calls of each reply, and some demand ids of nine letters or digits."""
    oslo, rome, paris = (
        ToolCall("stock", {"city": city}, id="call_0") for city in ("Oslo", "Rome", "Paris")
    )
    provider.script["look"] = [[oslo], [rome], [Text("Here.")]]
    provider.script["again"] = [[paris], [Text("Here.")]]
    for text in ("look", "again", "and on"):
        custom_chat.say(text)
    found = conversation(provider)
    assert found[1:5] + found[7:9] == stock("Oslo") + stock("Rome") + stock("Paris")
    names = r'"(?:id|tool_call_id|tool_use_id)": "(\w+)"'
    ids = re.findall(names, json.dumps(provider.requests[-1].body))
    assert len(ids) == 6 and all(re.fullmatch("[a-zA-Z0-9]{9}", id) for id in ids)


@one_provider
@pytest.mark.parametrize("more", [{}, {"id": "chatcmpl-tool-2"}], ids=["none", "new"])
def test_parts_of_two_calls_that_alternate(custom_chat, provider, more):
    """Some servers give an id to each part of a call."""

    def part(index: int, arguments: str, **more) -> Raw:
        call = {"index": index, "function": {"arguments": arguments}} | more
        return Raw(OpenAI({}).chunk({"tool_calls": [call]}))

    begun = [
        part(n, "", id=f"call_{n}", function={"name": "stock", "arguments": '{"city": '})
        for n in (0, 1)
    ]
    rest = [part(n, f'"{city}"}}', **more) for n, city in enumerate(("Oslo", "Köln"))]
    provider.script["look"] = [[*begun, *rest, Finish()], [Text("Here.")]]
    custom_chat.say("look")
    told = sorted(conversation(provider)[1:], key=str)
    assert told == sorted(stock("Oslo") + stock("Köln"), key=str)


def test_a_retry_forgets(custom_chat, provider):
    chat = custom_chat
    provider.script["look"] = [[OSLO], [Text("first")], [KOELN], [Text("second")]]
    chat.say("look")
    asked, answered = chat.items()
    events = list(
        chat.stream("threads.retry_after_item", thread_id=chat.thread_id, item_id=asked["id"])
    )
    assert [text_of(item) for item in done(events)] == ["second"]
    assert conversation(provider) == [("user", "look"), *stock("Köln")]
    assert [text_of(item) for item in chat.items()] == ["look", "second"]
    assert chat.items()[0] == asked and chat.items()[1]["id"] != answered["id"]
    chat.say("and on")
    assert conversation(provider)[1:-1] == [*stock("Köln"), ("assistant", "second")]


@one_provider
def test_a_stop_in_a_tool(custom_chat, customised, provider, main):
    """A tool that was stopped may have done its work: it must not do it a second time."""
    provider.script["look"] = [[Text("Let me see. "), OSLO, ToolCall("slow_in_a_thread")]]
    stream = custom_chat.start("look")
    next(event for event in stream if "see. " in event.model_dump_json())
    customised.wait_for(f"slow_in_a_thread starts in {custom_chat.thread_id}")
    stream.close()
    customised.wait_for(f"thread={custom_chat.thread_id} ")
    custom_chat.say("and on")
    cancelled = "The user cancelled the stream. Stop responding to the prior request."
    assert conversation(provider) == [
        ("user", "look"),
        ("assistant", "Let me see. "),
        *stock("Oslo"),
        *pair("slow_in_a_thread", {}, main.STOPPED_CALL),
        ("assistant", "The tool has given its output."),
        ("user", f"{note(cancelled)}\n\nand on"),
    ]


# A tool's error, a tool of an MCP server, an agent as a tool, and a hand-off: (call, output).
OTHERS = {
    "give": ({"what": "nothing"}, "error occurred while running the tool"),
    "sunrise": ({"day": "Monday"}, "Monday: 06:12"),
    "ask_second": ({"input": "what now?"}, "You said: what now?"),
    "transfer_to_second": ({}, "Second"),
}


@one_provider
@pytest.mark.parametrize("tool", OTHERS)
def test_other_kinds_of_calls_are_told_as_in_their_turn(custom_chat, provider, tool):
    arguments, output = OTHERS[tool]
    provider.script["do it"] = [[ToolCall(tool, arguments)], [Text("Done.")]]
    custom_chat.say("do it")
    in_its_turn = conversation(provider)
    custom_chat.say("and on")
    assert conversation(provider) == [*in_its_turn, ("assistant", "Done."), ("user", "and on")]
    assert in_its_turn[1] == ("call", tool, arguments) and output in str(in_its_turn[2][2])


OUTPUTS = {  # what the tool answers, and what of it is told
    "half a pair": r"half \?",
    "pictures": r"two things\n\[image: it was not kept\]\n\[file: it was not kept\]",
    "report": r"the start x+\n\[\d+ characters were cut out here\]\nx+ the end",
}


@one_provider
@pytest.mark.parametrize("what", OUTPUTS)
def test_what_is_kept_of_an_output(custom_chat, provider, main, what):
    provider.script["use it"] = [[ToolCall("give", {"what": what})], [Text("Used.")]]
    custom_chat.say("use it")
    custom_chat.say("and on")
    _, call, (*_, output), *_ = conversation(provider)
    assert call == ("call", "give", {"what": what})
    assert re.fullmatch(OUTPUTS[what], output) and len(output) < main.TOOL_OUTPUT_LENGTH + 50


@one_provider
def test_a_tool_whose_output_must_not_be_kept(custom_chat, provider):
    provider.script["tell me"] = [[ToolCall("password")], [Text("Told.")]]
    custom_chat.say("tell me")
    custom_chat.say("and on")
    texts = [("user", "tell me"), ("assistant", "Told."), ("user", "and on")]
    assert conversation(provider) == texts
    assert "HiddenContextItem" not in [item["type"] for item in custom_chat.debug()]


def test_arguments_are_always_an_object_and_never_long(main):
    """LiteLLM parses them for Gemini and Anthropic: others would fail every later turn."""
    texts = ('{"a": "ö"}', "", "{", "[1]")
    kept = [{"a": "ö"}, {}, {"arguments": "{"}, {"arguments": "[1]"}]
    assert [json.loads(main.as_arguments(text)) for text in texts] == kept
    long = json.loads(main.as_arguments(json.dumps({"text": "x" * 200_000})))["arguments"]
    assert "characters were cut out here" in long and len(long) < main.TOOL_OUTPUT_LENGTH + 100


# ---- In this process -----------------------------------------------------------------------------


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


# ---- Client tools -------------------------------------------------------------------------------


@one_provider
async def test_another_turn_replies_before_the_client_answers(custom_chat, provider):
    """The answer is found, and the model reads it after that reply, once."""
    custom_chat.say("hello")
    first, second = Silence(), Silence()
    provider.script["a colour"] = [[first, RED]]
    provider.script["the time"] = [[Text("It is "), second, Text("noon.")], [Text("And red.")]]
    provider.asked.clear()
    asking = Reading(again(custom_chat).start("a colour"))
    assert await asyncio.to_thread(provider.asked.wait, 5)
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
    kinds = [item["type"] for item in custom_chat.items()[-3:]]
    assert kinds == ["assistant_message", "client_tool_call", "assistant_message"]


# ---- Quotes, tags and hidden items --------------------------------------------------------------


@one_provider
def test_a_message_that_is_only_a_quote(chat, provider):
    assert done(chat.say("", quoted_text="the quoted part"))
    assert told(provider) == [("user", QUOTE)]


@one_provider
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


def hide(chat: Chat, content) -> None:
    response = chat.http.post(f"/hidden/{chat.thread_id}", content=json.dumps(content))
    assert response.status_code == 200, response.text


HIDDEN = {  # what the application stores: what the model is told
    "a note": "a note",
    '{"n": [1, null], "ort": "Köln"}': {"n": [1, None], "ort": "Köln"},
    '["a", {"text": "b"}]': ["a", {"text": "b"}],
    "5": 5,
    "true": True,
    "null": None,
}


@one_provider
def test_a_hidden_item_is_told_as_json(custom_chat, provider):
    custom_chat.say("hello")
    for content in HIDDEN.values():
        hide(custom_chat, content)
    assert done(custom_chat.say("and on"))
    assert told(provider)[2:] == [("user", "\n\n".join([*map(note, HIDDEN), "and on"]))]


@one_provider
def test_an_item_that_cannot_be_told(custom_chat, customised, provider):
    """Each later turn is told that there is something, and the log has one line of it."""
    custom_chat.say("hello")
    hide(custom_chat, "what no converter knows")
    start = len(customised.log)
    assert [text_of(item) for item in done(custom_chat.say("go on"))] == ["You said: go on"]
    gap = "[Here is a hidden_context_item that cannot be shown to you.]"
    assert told(provider)[2:] == [("user", f"{gap}\n\ngo on")]
    log = customised.log[start:]
    (line,) = [line for line in log if "cannot be told to the model: NotImplementedError" in line]
    assert custom_chat.debug()[2]["id"] in line
    assert "secret words" not in "\n".join(log) and "Traceback" not in "\n".join(log)
