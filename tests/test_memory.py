"""What the model is told again in later turns, beside the texts.

With --postgres the servers are two workers on PostgreSQL.
"""

import asyncio
import json
import re

import pytest

from client import SUPPORT, Chat, Server, done, error_of, message, text_of, until
from conftest import ON_SQLITE, PROVIDERS
from provider import Failure, Gemini, Silence, Text, Thought, ToolCall
from test_turns import Reading, again


@pytest.fixture(params=["in memory", pytest.param("on SQLite", marks=pytest.mark.slow)])
def customised(request, servers, provider_name):
    """The server with the tools of customised.py."""
    if request.param == "in memory":
        return servers(f"customised_{provider_name}")
    if request.config.getoption("--postgres"):
        pytest.skip("it runs on PostgreSQL instead")
    return servers(f"durable_{provider_name}")


def told(provider) -> list[tuple[str, str]]:
    """The newest request as (role, text) of each part."""
    return provider.requests[-1].messages


def conversation(provider) -> list[tuple]:
    """The newest request, read in its provider's own form.

    (role, text) of each text, ("call", tool, arguments) and ("output", tool, text). Each call is
    followed by its output, and no two have the same id.
    """
    request = provider.requests[-1]
    found: list[tuple] = []
    ids: dict[str, str] = {}
    for kind, *part in map(in_common_form, parts(request.format, request.body)):
        if kind == "call":
            id, name, arguments = part
            assert id not in ids
            ids[id] = name
            found.append((kind, name, arguments))
        elif kind == "output":
            id, text = part
            assert found[-1][:2] == ("call", ids[id])
            found.append((kind, ids[id], text))
        else:
            found.append((kind, *part))
    kinds = [kind for kind, *_ in found]
    assert kinds.count("call") == kinds.count("output")
    return found


def parts(format: type, body: dict):
    """(role, part) of each part of the request."""
    if format is Gemini:
        for content in body["contents"]:
            for part in content["parts"]:
                yield {"model": "assistant"}.get(content["role"], content["role"]), part
        return
    for entry in body["messages"]:
        role, content = entry["role"], entry.get("content")
        if role == "tool":
            yield role, {"type": "tool_result", "tool_use_id": entry["tool_call_id"], **entry}
        elif role != "system":
            for part in [{"text": content}] if isinstance(content, str) else content or []:
                yield role, part
        for call in entry.get("tool_calls", []):
            yield role, call


def in_common_form(role_and_part: tuple[str, dict]) -> tuple:
    role, part = role_and_part
    match part:
        case {"function_call": call}:  # Gemini
            return "call", call["id"], call["name"], call["args"]
        case {"function_response": output}:
            return "output", output["id"], output["response"]["content"]
        case {"type": "tool_use"}:  # Anthropic
            return "call", part["id"], part["name"], part["input"]
        case {"type": "function", "function": call}:  # OpenAI
            return "call", part["id"], call["name"], json.loads(call["arguments"])
        case {"type": "tool_result", "content": content}:
            if isinstance(content, list) and len(content) == 1:
                content = content[0]["text"]
            return "output", part["tool_use_id"], content
    return role, part["text"]


STOPPED = (
    "user",
    "Hidden context for the agent (not shown to the user):\n<HiddenContext>\n"
    "The user cancelled the stream. Stop responding to the prior request.\n</HiddenContext>",
)


def pair(tool: str, arguments: dict, output: str) -> list[tuple]:
    return [("call", tool, arguments), ("output", tool, output)]


def stock(city: str) -> list[tuple]:
    return pair("stock", {"city": city}, f"{city}: A=4711, B=4712")


OSLO = ToolCall("stock", {"city": "Oslo"})
KOELN = ToolCall("stock", {"city": "Köln"})


# ---- Tools ----------------------------------------------------------------------


def test_a_tool_call_is_told_in_later_turns(custom_chat, provider):
    """In its place between the texts, once; and no client ever sees it."""
    provider.script["what is there?"] = [
        [Thought("Hm."), Text("Let me look. "), OSLO],
        [Thought("So."), Text("Two things.")],
    ]
    events = custom_chat.say("what is there?")
    first = [
        ("user", "what is there?"),
        ("assistant", "Let me look. "),
        *stock("Oslo"),
        ("assistant", "Two things."),
    ]
    events += custom_chat.say("and the second?")
    assert conversation(provider) == [*first, ("user", "and the second?")]
    events += custom_chat.say("and on")
    assert conversation(provider)[:-2] == [*first, ("user", "and the second?")]

    shown = [event.model_dump_json() for event in events]
    shown += [json.dumps(custom_chat.items())]
    shown += [json.dumps(custom_chat.get("threads.get_by_id", thread_id=custom_chat.thread_id))]
    shown += [json.dumps(custom_chat.get("threads.list", limit=1))]
    assert not [text for text in shown if "A=4711" in text or "hidden_context" in text]
    hidden = [item for item in custom_chat.debug() if item["type"] == "HiddenContextItem"]
    assert [set(item) for item in hidden] == [{"id", "type"}]


def test_parallel_tool_calls(custom_chat, provider):
    provider.script["both"] = [[Text("Both. "), OSLO, KOELN], [Text("Here.")]]
    custom_chat.say("both")
    custom_chat.say("and on")
    assert conversation(provider)[1:-1] == [
        ("assistant", "Both. "),
        *stock("Oslo"),
        *stock("Köln"),
        ("assistant", "Here."),
    ]


def test_a_provider_that_repeats_its_ids(custom_chat, provider):
    """Some count the calls of each reply, and some demand ids of nine letters or digits."""
    for text in ("look", "and again"):
        provider.script[text] = [[ToolCall("stock", {"city": text}, id="call_0")], [Text("Here.")]]
        custom_chat.say(text)
    custom_chat.say("and on")
    told = conversation(provider)
    assert told[1:3] + told[5:7] == stock("look") + stock("and again")
    ids = re.findall(
        r'"(?:id|tool_call_id|tool_use_id)": "(\w+)"', json.dumps(provider.requests[-1].body)
    )
    assert len(ids) == 4 and all(re.fullmatch("[a-zA-Z0-9]{9}", id) for id in ids)


def test_a_retry_forgets(custom_chat, provider):
    provider.script["look"] = [[OSLO], [Text("first")], [KOELN], [Text("second")]]
    custom_chat.say("look")
    (asked, _) = custom_chat.items()
    list(
        custom_chat.stream(
            "threads.retry_after_item", thread_id=custom_chat.thread_id, item_id=asked["id"]
        )
    )
    assert conversation(provider) == [("user", "look"), *stock("Köln")]
    custom_chat.say("and on")
    assert conversation(provider)[:-1] == [
        ("user", "look"),
        *stock("Köln"),
        ("assistant", "second"),
    ]


@pytest.mark.anyio
@pytest.mark.parametrize("tool", ["slow", "slow_in_a_thread"])
@pytest.mark.parametrize("parallel", [False, True], ids=["one after another", "in parallel"])
async def test_a_stop_in_the_middle_of_a_slow_tool(
    custom_chat, customised, provider, main, parallel, tool
):
    """A tool that was stopped may have done its work: the model must not do it a second time."""
    slow = ToolCall(tool)
    provider.script["look"] = [[OSLO, slow]] if parallel else [[OSLO], [slow]]
    stream = custom_chat.start("look")
    next(event for event in stream if event.type == "stream_options")
    await asyncio.to_thread(customised.wait_for, f"{tool} starts in {custom_chat.thread_id}")
    await until(
        lambda: "HiddenContextItem" in [item["type"] for item in again(custom_chat).debug()]
    )
    stream.close()
    await until(lambda: again(custom_chat).debug()[-1]["type"] == "SDKHiddenContextItem")
    again(custom_chat).say("and on")
    assert conversation(provider) == [
        ("user", "look"),
        *stock("Oslo"),
        *pair(tool, {}, main.STOPPED_CALL),
        STOPPED,
        ("user", "and on"),
    ]


def test_a_fault_between_two_tool_calls(custom_chat, provider):
    provider.script["look"] = [[Text("Let me see. "), OSLO], [Failure("rate")]]
    error_of(custom_chat.say("look"))
    custom_chat.say("and on")
    assert conversation(provider) == [
        ("user", "look"),
        ("assistant", "Let me see. "),
        *stock("Oslo"),
        ("user", "and on"),
    ]


def test_a_fault_of_a_parallel_tool(custom_chat, provider, main):
    """The tool that raised has no output, and may have done a part of its work."""
    provider.script["look"] = [[Text("Let me see. "), OSLO, ToolCall("broken")]]
    error_of(custom_chat.say("look"))
    custom_chat.say("and on")
    assert conversation(provider) == [
        ("user", "look"),
        ("assistant", "Let me see. "),
        *stock("Oslo"),
        *pair("broken", {}, main.STOPPED_CALL),
        ("user", "and on"),
    ]


def test_a_failed_tools_error_is_its_output(custom_chat, provider):
    provider.script["divide"] = [[ToolCall("divide", {"number": 0})], [Text("It failed.")]]
    custom_chat.say("divide")
    in_its_turn = conversation(provider)
    custom_chat.say("and on")
    assert conversation(provider)[:3] == in_its_turn
    assert "error occurred while running the tool" in in_its_turn[2][2]  # openai-agents' words


RED = ToolCall("pick_colour", {"hint": "warm"})


CLIENT_CALLS = {
    "last": ([OSLO, RED], "pick_colour"),
    "first": ([RED, OSLO], "pick_colour"),
    "under another name": ([ToolCall("ask_page"), OSLO], "choose"),
}


@pytest.mark.parametrize("place", CLIENT_CALLS)
def test_a_client_tool_call_is_told_once(custom_chat, provider, place):
    """chatkit stores it, so it must not be remembered as well."""
    calls, name = CLIENT_CALLS[place]
    provider.script["a colour"] = [[Text("Choose. "), *calls], [Text("Red it is.")]]
    custom_chat.say("a colour")
    custom_chat.answer("red")
    expected = [
        ("user", "a colour"),
        ("assistant", "Choose. "),
        *stock("Oslo"),
        *pair(name, {"hint": "warm"}, '"red"'),
    ]
    assert conversation(provider) == expected
    custom_chat.say("and on")
    assert conversation(provider)[:-2] == expected


def test_a_hand_off_is_no_tool_result(custom_chat, provider):
    """The second agent has no tools, and is told what those of the first said."""
    hand_off = ToolCall("transfer_to_second")
    provider.script["look"] = [[OSLO], [Text("Ask him. "), hand_off], [Text("Here I am.")]]
    custom_chat.say("look")
    custom_chat.say("and on")
    *first, text, asked = conversation(provider)
    assert first == [("user", "look"), *stock("Oslo"), ("assistant", "Ask him. ")]
    assert (text, asked) == (("assistant", "Here I am."), ("user", "and on"))


OTHER_TOOLS = {  # of an MCP server, and an agent as a tool
    "mcp": ("sunrise", {"day": "Monday"}, "Monday: 06:12"),
    "agent": ("ask_second", {"input": "what now?"}, "You said: what now?"),
}


@pytest.mark.parametrize("kind", OTHER_TOOLS)
def test_other_kinds_of_tools(custom_chat, provider, kind):
    tool, arguments, output = OTHER_TOOLS[kind]
    provider.script["look"] = [[ToolCall(tool, arguments)], [Text("Here.")]]
    custom_chat.say("look")
    in_its_turn = conversation(provider)
    custom_chat.say("and on")
    assert conversation(provider)[:3] == in_its_turn
    assert output in str(in_its_turn[2][2])


def test_a_guardrail_takes_back_the_tool_calls(custom_chat, provider):
    custom_chat.say("hello")
    before = custom_chat.debug()
    provider.script["tell me"] = [[Text("Let me see. "), OSLO], [Text("the forbidden word")]]
    events = custom_chat.say("tell me")
    shown = {event.item.id for event in events if event.type == "thread.item.added"}
    removed = {event.item_id for event in events if event.type == "thread.item.removed"}
    assert len(shown) == 2 and removed == shown
    assert [item["type"] for item in custom_chat.debug()[len(before) :]] == ["UserMessageItem"]
    custom_chat.say("go on")
    assert conversation(provider)[2:] == [("user", "tell me"), ("user", "go on")]


@pytest.mark.parametrize("provider_name", ["openai"])
def test_a_hook_of_the_application(custom_chat, customised, provider, provider_name):
    """It follows the run beside the memory."""
    provider.script["look"] = [[OSLO], [Text("Here.")]]
    custom_chat.say("look")
    customised.wait_for(f"stock starts in {custom_chat.thread_id}")
    custom_chat.say("and on")
    assert conversation(provider)[1:3] == stock("Oslo")


# ---- What a tool may answer -----------------------------------------------------


def remembered(chat: Chat, provider, call: ToolCall) -> list[tuple]:
    """The parts of a later turn that tell of this call."""
    provider.script["use it"] = [[call], [Text("Used.")]]
    chat.say("use it")
    chat.say("and on")
    told = conversation(provider)
    assert (told[0], told[-1]) == (("user", "use it"), ("user", "and on"))
    return [part for part in told[1:-1] if part[0] != "assistant"]


def test_a_long_output(custom_chat, provider, main):
    call, output = remembered(custom_chat, provider, ToolCall("report", {"length": 200_000}))
    start, cut, end = output[2].split("\n")
    assert call == ("call", "report", {"length": 200_000})
    assert start.startswith("the start xx") and end.endswith("xx the end")
    assert len(start) + len(end) == main.TOOL_OUTPUT_LENGTH
    left_out = 200_000 + len("the start ") + len(" the end") - main.TOOL_OUTPUT_LENGTH
    assert cut == f"[{left_out} characters were cut out here]"


def test_an_output_that_is_not_text(custom_chat, provider):
    assert remembered(custom_chat, provider, ToolCall("pictures")) == pair(
        "pictures",
        {},
        "two things\n"
        "[The tool also returned this image, which was not kept: without a name]\n"
        "[The tool also returned this file, which was not kept: plan.pdf]",
    )


def test_an_output_that_cannot_be_stored(custom_chat, provider):
    assert remembered(custom_chat, provider, ToolCall("half_a_pair")) == pair(
        "half_a_pair", {}, "half ?"
    )


def test_a_tool_whose_output_must_not_be_kept(custom_chat, provider):
    assert remembered(custom_chat, provider, ToolCall("password")) == []
    assert "HiddenContextItem" not in [item["type"] for item in custom_chat.debug()]


@pytest.mark.parametrize(
    ("written", "told"),
    [
        ('{"city": "Köln"}', {"city": "Köln"}),
        ("", {}),
        ("{", {"arguments": "{"}),
        ("[1]", {"arguments": "[1]"}),
    ],
)
def test_arguments_are_always_an_object(main, written, told):
    """LiteLLM parses them for Gemini and Anthropic: others would fail every later turn."""
    assert json.loads(main.as_arguments(written)) == told


def test_long_arguments(main):
    told = json.loads(main.as_arguments(json.dumps({"text": "x" * 200_000})))
    assert "characters were cut out here" in told["arguments"]
    assert len(told["arguments"]) < main.TOOL_OUTPUT_LENGTH + 100


# ---- Where it is kept -----------------------------------------------------------


@pytest.fixture
def not_on_postgres(pytestconfig):
    if pytestconfig.getoption("--postgres"):
        pytest.skip("it runs elsewhere")


@pytest.mark.slow
def test_after_a_restart(not_on_postgres, provider, provider_name, tmp_path):
    settings = {"PROVIDER": provider_name, "DATABASE": str(tmp_path / "chat.sqlite")}
    environment = {**provider.environment(), **settings}
    thread_id = None
    for text in ("look", "and on"):
        folder = tmp_path / text
        program = SUPPORT / "customised.py"
        server = Server(folder, environment, program, fork=True, changes=ON_SQLITE).started()
        chat = Chat(server.url, thread_id=thread_id)
        provider.script["look"] = [[OSLO], [Text("Here.")]]
        assert done(chat.say(text))
        thread_id = chat.thread_id
        server.stop()
    assert conversation(provider) == [
        ("user", "look"),
        *stock("Oslo"),
        ("assistant", "Here."),
        ("user", "and on"),
    ]


@pytest.mark.slow
@pytest.mark.parametrize("provider_name", PROVIDERS)
def test_after_a_change_of_the_provider(not_on_postgres, servers, provider, provider_name):
    """The calls of each are told to the others, without the data that only one understands."""
    chat = Chat(servers(f"durable_{provider_name}").url)
    provider.script["look"] = [[OSLO], [Text("Here.")]]
    chat.say("look")
    for other in PROVIDERS:
        chat = Chat(servers(f"durable_{other}").url, thread_id=chat.thread_id)
        chat.say(f"now {other}")
        assert conversation(provider)[:4] == [
            ("user", "look"),
            *stock("Oslo"),
            ("assistant", "Here."),
        ]
        assert "provider_data" not in json.dumps(provider.requests[-1].body)


@pytest.mark.parametrize("provider_name", ["gemini"])
def test_geminis_thought_signature_comes_back(custom_chat, provider, provider_name):
    """Gemini wants it while the turn goes on, here after a client's tool."""
    provider.script["a colour"] = [[OSLO], [RED], [Text("Red it is.")]]
    custom_chat.say("a colour")
    custom_chat.answer("red")
    parts = [
        part for content in provider.requests[-1].body["contents"] for part in content["parts"]
    ]
    signatures = [part.get("thoughtSignature") for part in parts if "function_call" in part]
    assert signatures[0] == "c2ln"


@pytest.mark.slow
@pytest.mark.parametrize("provider_name", ["openai"])
def test_a_hundred_turns_with_tools(not_on_postgres, servers, provider, main, provider_name):
    """The window starts at a user message, splits no pair, and ends with the newest."""
    # Of a long conversation, OpenAI's own client takes four times as long.
    chat = Chat(servers("customised_gemini").url)
    for number in range(100):
        calls = [ToolCall("report", {"length": 200_000})] if number % 10 == 0 else [OSLO]
        provider.script[f"turn {number}"] = [calls, [Text(f"reply {number}")]]
        chat.say(f"turn {number}")
    chat.say("and on")
    told = conversation(provider)
    turns = (main.HISTORY_ITEMS - 1) // 3
    assert len(told) == 4 * turns + 1
    assert told[0] == ("user", f"turn {100 - turns}")
    assert told[-4:] == [*stock("Oslo"), ("assistant", "reply 99"), ("user", "and on")]
    characters = len(json.dumps(provider.requests[-1].body["contents"]))
    assert characters < (turns // 10 + 1) * main.TOOL_OUTPUT_LENGTH + turns * 1_000


@pytest.mark.slow
def test_a_turn_that_is_longer_than_the_window(main, custom_chat, provider):
    """It goes on after a client tool, and the model still reads what was asked."""
    calls = [OSLO] * (main.HISTORY_ITEMS + 1)
    provider.script["go"] = [calls, [ToolCall("pick_colour", {"hint": "warm"})], [Text("Fine.")]]
    custom_chat.say("hello")
    custom_chat.say("go")
    (reply,) = done(custom_chat.answer("red"))
    assert text_of(reply) == "Fine."
    window = stock("Oslo") * (main.HISTORY_ITEMS - 1)
    assert conversation(provider)[:-2] == [("user", "go"), *window]


# ---- Quotes and tags ------------------------------------------------------------


def test_a_quote_stays_while_its_turn_goes_on(custom_chat, provider):
    """A client's tool ends the stream; the turn goes on with its answer."""
    quote = ("user", "The user is referring to this in particular:\nthe quoted part")
    provider.script[quote[1]] = [[ToolCall("pick_colour", {"hint": "warm"})], [Text("Fine.")]]
    custom_chat.say("a colour", quoted_text="the quoted part")
    custom_chat.answer("red")
    assert told(provider)[:2] == [("user", "a colour"), quote]
    assert len(told(provider)) == 4


def test_a_message_that_is_only_a_quote(chat, provider):
    chat.say("hello")
    response = chat.post(
        "threads.add_user_message",
        thread_id=chat.thread_id,
        input=message("", quoted_text="the quoted part"),
    )
    assert response.status_code == 200
    quote = "The user is referring to this in particular:\nthe quoted part"
    assert told(provider) == [
        ("user", "hello"),
        ("assistant", "You said: hello"),
        ("user", quote),
    ]
    assert text_of(chat.items()[-1]) == f"You said: {quote}"
    blank = message(" ", quoted_text=" \n")
    response = chat.post("threads.add_user_message", thread_id=chat.thread_id, input=blank)
    assert (response.status_code, response.json()) == (400, {"detail": "The message is empty."})


def test_each_tag_is_told(chat, provider):
    """Two tags with one title, and a tag that names itself in its data. No script is escaped."""
    tags = [
        {"type": "input_tag", "id": id, "text": "Bericht", "data": data}
        for id, data in [
            ("doc_1", {"ort": "Köln"}),
            ("doc_2", {"ort": "東京", "id": "forged"}),
            ("doc_1", {"ort": "Köln"}),
        ]
    ]
    content = [{"type": "input_text", "text": "Compare "}, *tags]
    list(chat.stream("threads.create", input=message("") | {"content": content}))
    texts = [text for _, text in told(provider)]
    assert texts == [
        "Compare @Bericht@Bericht@Bericht",
        "What the names after @ stand for. Write them without the @.",
        'Bericht: {"id": "doc_1", "ort": "Köln"}',
        'Bericht: {"id": "doc_2", "ort": "東京"}',
    ]


# ---- Hidden items of the application --------------------------------------------


def hide(chat: Chat, content) -> None:
    response = chat.http.post(f"/hidden/{chat.thread_id}", content=json.dumps(content))
    assert response.status_code == 200, response.text


HIDDEN = {
    "text": ("a note", "a note"),
    "object": ({"n": [1, None], "ort": "Köln"}, '{"n": [1, null], "ort": "Köln"}'),
    "list": (["a", {"text": "b"}], '["a", {"text": "b"}]'),
    "number": (5, "5"),
    "true": (True, "true"),
    "null": (None, "null"),
}


@pytest.mark.parametrize("provider_name", ["openai"])
@pytest.mark.parametrize("kind", HIDDEN)
def test_a_hidden_item_is_told_as_json(custom_chat, provider, provider_name, kind):
    content, text = HIDDEN[kind]
    custom_chat.say("hello")
    hide(custom_chat, content)
    for _ in range(2):
        assert done(custom_chat.say("and on"))
        assert told(provider)[2] == (
            "user",
            "Hidden context for the agent (not shown to the user):\n"
            f"<HiddenContext>\n{text}\n</HiddenContext>",
        )
    (item,) = [item for item in custom_chat.debug() if item["type"] == "HiddenContextItem"]
    assert set(item) == {"id", "type"}


@pytest.mark.parametrize("provider_name", ["openai"])
@pytest.mark.parametrize(
    ("content", "error"),
    [
        ("what no converter knows", "NotImplementedError"),
        ({"type": "remembered_tool_call", "output": "secret words"}, "KeyError"),
    ],
    ids=["of the application", "of a tool"],
)
def test_an_item_that_cannot_be_told(
    custom_chat, customised, provider, provider_name, content, error
):
    """Each later turn is told that there is something, and the log has one line of it."""
    custom_chat.say("hello")
    hide(custom_chat, content)
    start = len(customised.log)
    for text in ("one", "two"):
        assert [text_of(item) for item in done(custom_chat.say(text))] == [f"You said: {text}"]
        assert told(provider)[2] == (
            "user",
            "[Here is a hidden_context_item that cannot be shown to you.]",
        )
    lines = [line for line in customised.log[start:] if "cannot be told to the model" in line]
    assert lines and len(lines) <= max(customised.workers, 1)
    assert custom_chat.thread_id in lines[0] and error in lines[0]
    assert "secret words" not in "\n".join(customised.log[start:])
    assert "Traceback" not in "\n".join(customised.log[start:])


# ---- Client tools ---------------------------------------------------------------


@pytest.mark.anyio
async def test_another_turn_replies_before_the_client_answers(custom_chat, provider):
    """The answer is found, and the model reads it after that reply."""
    custom_chat.say("hello")
    first, second = Silence(), Silence()
    provider.script["a colour"] = [[first, ToolCall("pick_colour", {"hint": "warm"})]]
    provider.script["the time"] = [[Text("It is "), second, Text("noon.")], [Text("And red.")]]
    provider.asked.clear()
    asking = Reading(again(custom_chat).start("a colour"))
    assert provider.asked.wait(5)
    replying = Reading(again(custom_chat).start("the time"))
    await replying.until('"It is "')
    first.end.set()
    assert len(done(await asking.end(), "client_tool_call")) == 1
    second.end.set()
    await replying.end()

    assert [text_of(item) for item in done(custom_chat.answer({"farbe": "grün"}))] == ["And red."]
    *texts, call, output = told(provider)
    assert texts[2:] == [("user", "a colour"), ("user", "the time"), ("assistant", "It is noon.")]
    assert (call[0], output[0]) == ("tool", "tool")
    assert "warm" in call[1] and "gr\\u00fcn" in output[1]  # escaped once, by the tests' own JSON
    assert [item["type"] for item in custom_chat.items()[-3:]] == [
        "assistant_message",
        "client_tool_call",
        "assistant_message",
    ]
