"""What people add to their copy: other models, tools, agents, handlers and stores."""

import json

import httpx
import pytest
from agents import Agent, ToolGuardrailFunctionOutput, function_tool, tool_input_guardrail
from chatkit.store import Store

from client import NO_TLS, Chat, done, error_of, load_main, message, text_of
from provider import Failure, Silence, Text, Thought, ToolCall


@pytest.fixture
def additions(servers):
    return servers("additions")


@pytest.fixture
def chat(additions):
    return Chat(additions.url)


def choosing(model: str | None = None, tool: str | None = None) -> dict:
    """The options of a message, as ChatKit's composer sends them."""
    options: dict = {"model": model} if model else {}
    if tool:
        options["tool_choice"] = {"id": tool}
    return {"inference_options": options}


# ---- The model picker -----------------------------------------------------------


@pytest.mark.parametrize(
    ("choice", "name"),
    [
        ("gpt-4o-mini", "openai/gpt-4o-mini"),
        ("gemini/gemini-flash-latest", "gemini/gemini-flash-latest"),
        ("anthropic/claude-sonnet-4-6", "anthropic/claude-sonnet-4-6"),
        ("openai/gpt-4o", "openai/gpt-4o"),
        (None, "openai/gpt-4o"),
    ],
)
def test_a_message_chooses_its_model(additions, chat, provider, choice, name):
    assert [text_of(item) for item in done(chat.say("hello", **choosing(choice)))] == [
        "You said: hello"
    ]
    (request,) = provider.requests
    kind, _, model = name.partition("/")
    assert request.format.__name__.lower() == kind
    assert request.body.get("model", model) == model
    log = additions.wait_for(f"thread={chat.thread_id} ")
    assert f"thread={chat.thread_id} provider={kind} model={name} end=done" in log
    # The next message has a choice of its own.
    chat.say("and on")
    assert provider.requests[-1].body["model"] == "gpt-4o"


def test_the_choice_holds_after_a_client_tool(chat, provider):
    provider.script["go"] = [[ToolCall("ask_browser")], [Text("Thanks.")]]
    chat.say("hello")
    chat.say("go", **choosing("gpt-4o-mini", "ask_browser"))
    list(chat.stream("threads.add_client_tool_output", thread_id=chat.thread_id, result="red"))
    chat.say("and on")
    asked = [
        (request.body["model"], request.body.get("tool_choice")) for request in provider.requests
    ]
    forced = {"type": "function", "function": {"name": "ask_browser"}}
    assert asked == [
        ("gpt-4o", None),
        ("gpt-4o-mini", forced),
        ("gpt-4o-mini", None),
        ("gpt-4o", None),
    ]


@pytest.mark.slow
def test_the_choice_holds_in_a_turn_that_is_longer_than_the_window(main, chat, provider):
    calls = [ToolCall("give_notice")] * (main.HISTORY_ITEMS + 1)
    provider.script["go"] = [calls, [ToolCall("ask_browser")], [Text("Thanks.")]]
    chat.say("go", **choosing("gpt-4o-mini"))
    list(chat.stream("threads.add_client_tool_output", thread_id=chat.thread_id, result="red"))
    assert [request.body["model"] for request in provider.requests] == ["gpt-4o-mini"] * 3


def test_the_fault_of_a_chosen_model(additions, chat, provider):
    provider.script["hello"] = [[Failure("key")]]
    error = error_of(chat.say("hello", **choosing("mistral/m")))
    assert "MISTRAL_API_KEY" in error.message and not error.allow_retry
    log = additions.wait_for(f"thread={chat.thread_id} ")
    assert f"thread={chat.thread_id} provider=mistral model=mistral/m end=fault" in log
    assert log.count("MISTRAL_API_KEY is not set") == 1


@pytest.mark.parametrize(
    ("options", "says"),
    [
        (choosing(model="gpt-5"), "The model gpt-5 is not offered."),
        (choosing(tool="nope"), "The tool nope is not offered."),
    ],
)
def test_what_is_not_offered(chat, provider, options, says):
    response = chat.post("threads.create", input=message("hello", **options))
    assert (response.status_code, response.json()) == (400, {"detail": says})
    chat.say("hello")
    response = chat.post(
        "threads.add_user_message", thread_id=chat.thread_id, input=message("hello", **options)
    )
    assert (response.status_code, response.json()) == (400, {"detail": says})
    assert len(chat.items()) == 2 and len(provider.requests) == 1


def test_a_tool_is_forced_in_the_first_step_only(chat, provider):
    provider.script["go"] = [[ToolCall("take_step")], [Text("Taken.")]]
    chat.say("go", **choosing(tool="take_step"))
    first, second = (request.body for request in provider.requests)
    assert first["tool_choice"] == {"type": "function", "function": {"name": "take_step"}}
    assert second.get("tool_choice") in (None, "auto")


def test_a_forced_tool_is_not_forced_on_the_next_agent(chat, provider):
    provider.script["go"] = [
        [ToolCall("take_step"), ToolCall("transfer_to_claude")],
        [Text("Taken.")],
    ]
    chat.say("go", **choosing(tool="take_step"))
    first, second = provider.requests
    assert first.body["tool_choice"]["function"]["name"] == "take_step"
    assert second.format.__name__ == "Anthropic" and "tool_choice" not in second.body


# ---- Agents ---------------------------------------------------------------------


def test_the_agent_that_a_hand_off_chose_goes_on(chat, provider, main):
    provider.script["hola"] = [[ToolCall("transfer_to_spanish")], [Text("Hola.")]]
    assert [text_of(item) for item in done(chat.say("hola"))] == ["Hola."]
    provider.script["and back"] = [[ToolCall("transfer_to_assistant")], [Text("Hello again.")]]
    for text in ("que tal", "and back", "hello"):
        chat.say(text)
    told = [request.format.instructions(request.body) for request in provider.requests]
    english, spanish = main.INSTRUCTIONS, "Answer in Spanish."
    assert told == [english, spanish, spanish, spanish, english, english]
    assert all("reasoning_effort" not in request.body for request in provider.requests)


@pytest.mark.anyio
async def test_a_forced_tool_wins_over_the_runs_settings(main, provider):
    model = main.ProviderModel("openai/gpt-4o", f"{provider.url}/openai", "key")
    server = main.ChatKitServerImpl(main.MemoryStore())
    server.agent.model = model
    server.agent.tools.append(function_tool(lambda: "noon", name_override="clock"))
    settings = main.ModelSettings(tool_choice="auto", temperature=0)
    server.run_config = main.RunConfig(model_settings=settings)
    provider.script["go"] = [[ToolCall("clock")], [Text("It is noon.")]]
    request = {"input": message("go", **choosing(tool="clock"))}
    body = json.dumps({"type": "threads.create", "params": request})
    assert b"It is noon." in b"".join([event async for event in await server.process(body, {})])
    first, second = (request.body for request in provider.requests)
    assert first["tool_choice"]["function"]["name"] == "clock"
    assert (second.get("tool_choice"), second["temperature"]) == (None, 0)


@pytest.mark.anyio
async def test_a_hand_off_and_a_change_of_the_thread(main, provider):
    """Both are kept, also if an override of `respond` changes the thread at its end."""
    model = main.ProviderModel("openai/gpt-4o", f"{provider.url}/openai", "key")

    class Counting(main.ChatKitServerImpl):
        async def respond(self, thread, input, context):
            async for event in super().respond(thread, input, context):
                yield event
            thread.metadata = {**thread.metadata, "seen": 1}

    server = Counting(main.MemoryStore())
    server.agent.model = model
    server.agent.handoffs.append(Agent("Billing", model=model))
    provider.script["go"] = [[ToolCall("transfer_to_billing")], [Text("Here.")]]
    body = json.dumps({"type": "threads.create", "params": {"input": message("go")}})
    assert [event async for event in await server.process(body, {})]
    (thread,) = (await server.store.load_threads(1, None, "asc", {})).data
    assert thread.metadata == {"agent": "Billing", "seen": 1}


@pytest.mark.anyio
async def test_a_guardrail_of_a_tool(main, provider):
    """The person reads a sentence, and the log has no traceback."""

    @tool_input_guardrail
    def never(data) -> ToolGuardrailFunctionOutput:
        return ToolGuardrailFunctionOutput.raise_exception()

    server = main.ChatKitServerImpl(main.MemoryStore())
    server.agent.model = main.ProviderModel("openai/gpt-4o", f"{provider.url}/openai", "key")
    tool = function_tool(lambda: "paid", name_override="pay", tool_input_guardrails=[never])
    server.agent.tools.append(tool)
    provider.script["go"] = [[ToolCall("pay")]]
    body = json.dumps({"type": "threads.create", "params": {"input": message("go")}})
    events = b"".join([event async for event in await server.process(body, {})])
    assert b"This server's rules do not allow this." in events


def test_a_thread_is_renamed_while_it_is_handed_off(chat, provider):
    silence = Silence()
    provider.script["hola"] = [[ToolCall("transfer_to_spanish")], [Text("Ho"), silence, Text("la")]]
    for event in chat.start("hola"):
        if event.type == "thread.item.updated" and not silence.end.is_set():
            again = Chat(str(chat.http.base_url), thread_id=chat.thread_id)
            again.get("threads.update", thread_id=chat.thread_id, title="Mine")
            silence.end.set()
    chat.say("que tal")
    assert chat.get("threads.get_by_id", thread_id=chat.thread_id)["title"] == "Mine"
    assert provider.requests[-1].format.instructions(provider.requests[-1].body) == (
        "Answer in Spanish."
    )


@pytest.mark.parametrize("kind", ["anthropic", "gemini"])
@pytest.mark.parametrize("fault", [None, "key", "model", "server"])
def test_an_agent_with_a_model_of_another_provider(additions, chat, provider, kind, fault):
    """The fault's text and the log line are those of the model that ran."""
    name, model = {
        "anthropic": ("claude", "anthropic/claude-sonnet-4-6"),
        "gemini": ("gemini", "gemini/gemini-flash-latest"),
    }[kind]
    answer = [Failure(fault)] if fault else [Text("Here I am.")]
    provider.script["go"] = [[ToolCall(f"transfer_to_{name}")], answer]
    events = chat.say("go")
    end = "fault" if fault else "done"
    additions.wait_for(f"thread={chat.thread_id} provider={kind} model={model} end={end} ")
    first, second = provider.requests
    assert [first.format.__name__.lower(), second.format.__name__.lower()] == ["openai", kind]
    if fault is None:
        assert [text_of(item) for item in done(events)] == ["Here I am."]
        return
    says = {"key": f"{kind.upper()}_API_KEY", "model": f"the model {model}", "server": "unavail"}
    message = error_of(events).message
    assert says[fault] in message
    assert "openai" not in message.lower()
    assert len([line for line in additions.log if line.startswith(f"ERROR:    {message} (")]) >= 1


def test_an_agent_whose_model_has_no_key(additions, chat, provider, tmp_path):
    """LiteLLM may find it elsewhere, except for the three defaults: the provider has the word."""
    provider.script["go"] = [[ToolCall("transfer_to_mistral")], [Failure("key")]]
    message = error_of(chat.say("go")).message
    assert message == "The AI provider refused the key. Check MISTRAL_API_KEY."
    line = f"thread={chat.thread_id} provider=mistral model=mistral/m end=fault "
    log = additions.wait_for(line)
    assert f"ERROR:    {message} (" in log
    # Of the defaults, each model misses the key of its own provider.
    main = load_main(tmp_path, {"PROVIDER": "openai"})
    assert main.model.missing_key == "OPENAI_API_KEY"
    other = main.model_provider.get_model("anthropic/claude-sonnet-4-6")
    assert other.missing_key == "ANTHROPIC_API_KEY"


def test_other_model_settings_lose_nothing(tmp_path, additions, provider):
    """Tokens, retries and the canned reply do not depend on the agent's settings."""
    main = load_main(tmp_path)
    main.server.agent.model_settings = main.ModelSettings(temperature=0.5)
    settings = main.model.settings.resolve(main.server.agent.model_settings)
    assert settings.include_usage and settings.extra_args == {"mock_response": main.MOCK_REPLY}
    assert settings.temperature == 0.5


# ---- What counts as an answer ---------------------------------------------------


@pytest.mark.parametrize("tool", ["play_sound", "give_notice", "take_step", "replace_card"])
def test_a_visible_turn_is_a_turn(chat, provider, tool):
    provider.script["go"] = [[ToolCall(tool)], []]
    assert "error" not in [event.type for event in chat.say("go")]


@pytest.mark.parametrize(
    "steps", [[ToolCall("leave_note")], [Thought("Hm."), ToolCall("leave_note")]]
)
def test_a_hidden_item_is_no_answer(chat, provider, steps):
    provider.script["go"] = [steps, []]
    assert "empty" in error_of(chat.say("go")).message


# ---- Requests -------------------------------------------------------------------


def test_feedback_leaves_a_line(additions, chat):
    reply = done(chat.say("hello"))[0].id
    ids = [chat.items()[0]["id"], reply]
    chat.get("items.feedback", thread_id=chat.thread_id, item_ids=ids, kind="negative")
    line = f"feedback thread={chat.thread_id} items={','.join(ids)} kind=negative"
    assert additions.wait_for(line).count(line) == 1


@pytest.mark.parametrize(
    ("how", "reason"), [("locked", "The shop is closed."), ("closed", "This thread is closed.")]
)
def test_a_thread_that_has_ended(chat, provider, how, reason):
    provider.script["end it"] = [[ToolCall("end_thread", {"how": how})], [Text("Bye.")]]
    chat.say("end it")
    asked = chat.items()[0]["id"]
    for type, params in (
        ("threads.add_user_message", {"input": message("still there?")}),
        ("threads.retry_after_item", {"item_id": asked}),
    ):
        response = chat.post(type, thread_id=chat.thread_id, **params)
        assert (response.status_code, response.json()) == (409, {"detail": reason})
    assert len(chat.items()) == 2
    assert chat.get("threads.get_by_id", thread_id=chat.thread_id)["status"]["type"] == how


def test_a_store_that_fails_outside_a_stream(additions):
    start = len(additions.log)
    response = httpx.post(
        f"{additions.url}/chatkit",
        json={"type": "threads.list", "params": {"after": "broken"}},
        headers={"Origin": "https://app.example"},
        verify=NO_TLS,
    )
    assert response.status_code == 500
    assert response.json() == {"detail": "The server failed. Its log has the cause."}
    assert response.headers["access-control-allow-origin"]
    additions.wait_for("OSError: the disk is full")
    log = "\n".join(additions.log[start:])
    assert log.count("Traceback (most recent call last)") == 1


def test_every_store_has_unique_ids(tmp_path):
    main = load_main(tmp_path)

    class Plain(main.MemoryStore):
        generate_thread_id = Store.generate_thread_id
        generate_item_id = Store.generate_item_id

    class Own(main.MemoryStore):
        def generate_thread_id(self, context):
            return "mine"

    thread = main.ThreadMetadata(id="thr_1", created_at="2026-01-01T00:00:00")
    plain, own = Plain(), Own()
    for store in (plain, own):
        main.ChatKitServerImpl(store)
    assert len(plain.generate_thread_id({}).removeprefix("thr_")) == 32
    assert len(plain.generate_item_id("message", thread, {}).removeprefix("msg_")) == 32
    assert own.generate_thread_id({}) == "mine"


def test_an_attachment_store_and_a_converter(tmp_path):
    main = load_main(tmp_path)
    attachments, converter = object(), main.Converter()
    server = main.ChatKitServerImpl(main.MemoryStore(), attachments)
    server.converter = converter
    assert (server.attachment_store, server.converter) == (attachments, converter)
