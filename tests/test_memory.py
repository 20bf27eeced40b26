"""What the model is told again in later turns, beside the texts."""

import json

import pytest

from client import Chat, done, message, text_of
from provider import Silence, Text, ToolCall
from test_turns import Reading, again


def told(provider) -> list[tuple[str, str]]:
    """The newest request as (role, text) of each part."""
    return provider.requests[-1].messages


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
    "object": ({"ort": "Köln", "n": [1, None]}, '{"ort": "Köln", "n": [1, null]}'),
    "list": (["a", {"text": "b"}], '["a", {"text": "b"}]'),
    "number": (5, "5"),
    "true": (True, "true"),
    "null": (None, "null"),
}


@pytest.mark.parametrize("kind", HIDDEN)
def test_a_hidden_item_is_told_as_json(custom_chat, provider, kind):
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


def test_an_item_that_cannot_be_told(custom_chat, customised, provider):
    """Each later turn is told that there is something, and the log has one line of it."""
    custom_chat.say("hello")
    hide(custom_chat, "what no converter knows")
    start = len(customised.log)
    for text in ("one", "two"):
        assert [text_of(item) for item in done(custom_chat.say(text))] == [f"You said: {text}"]
        assert told(provider)[2] == (
            "user",
            "[Here is a hidden_context_item that cannot be shown to you.]",
        )
    lines = [line for line in customised.log[start:] if "cannot be told to the model" in line]
    assert lines and len(lines) <= max(customised.workers, 1)
    assert custom_chat.thread_id in lines[0] and "NotImplementedError" in lines[0]
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
