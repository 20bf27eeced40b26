"""What providers do wrong or slowly: what the person reads, the log tells and the store has."""

import re
import socket
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from importlib.metadata import version
from itertools import pairwise
from typing import NamedTuple

import pytest
from agents import ModelSettings, ModelTracing, ToolTimeoutError, function_tool

from client import Chat, Local, error_of, leave, load_main, text_of, texts
from conftest import PROVIDERS
from provider import (
    Anthropic,
    Body,
    Cut,
    Failure,
    Finish,
    Gemini,
    Ollama,
    OpenAI,
    Raw,
    Silence,
    Stream,
    Text,
    Thought,
    ToolCall,
    sse,
)

# The servers, whose answers LiteLLM reads with code of its own, and the formats of their providers.
OLLAMA, OPENROUTER = "ollama_chat/llama3.2", "openrouter/qwen/qwen3-235b"
GROQ = "groq/llama-3.3-70b-versatile"
MISTRAL, VLLM = "mistral/mistral-large-latest", "hosted_vllm/meta-llama/Llama-3.1-8B-Instruct"
COMPATIBLE = ("openai", OPENROUTER, GROQ, MISTRAL, VLLM)
FORMATS = {"gemini": Gemini, "anthropic": Anthropic, OLLAMA: Ollama}
FORMATS |= dict.fromkeys(COMPATIBLE, OpenAI)
ALL = tuple(FORMATS)
LATER = {"Retry-After": "60"}  # so that the provider is not asked again at once
HALF = "The first half"
TRY_AGAIN = ("RATE_LIMIT", "UNAVAILABLE", "NOT_UNDERSTOOD", "EMPTY_REPLY", "CUT_OFF")


class Case(NamedTuple):
    steps: list | Callable[[str], list]  # of the provider's answer, or a function of the server
    error: str = ""  # its name in main.py, see message_of; "" for a complete reply
    wires: tuple[str, ...] = tuple(PROVIDERS)
    kept: str = ""  # what is shown and stored of the reply
    cause: str = ""  # what the log tells of it
    requests: int = 1  # of the turn: 2 after a quiet second try


def cut(steps, wires: tuple[str, ...], kept: str = HALF) -> Case:
    return Case(steps, "CUT_OFF", wires, kept)


def end_of_gemini(reason: str) -> Raw:
    return Raw(Gemini({}).chunk([], finishReason=reason))


def refusal(message: str, **error) -> list:
    return [Body({"type": "error", "error": {"message": message, **error}}, 400)]


USAGE = Raw(sse({"usageMetadata": Gemini.usage}))
HALVES = [Text("The first "), Text("half")]
EXPIRED = refusal("It has expired.", code=400, details=[{"reason": "API_KEY_INVALID"}])
CREDIT = refusal("Your credit balance is too low.", type="invalid_request_error")
RATE = Body({"error": {"message": "Slow down.", "code": 429}}, 200)
CASES = {
    # ---- The provider refuses
    "the key": Case([Failure("key")], "KEY_REFUSED", cause="The key was ***"),
    "an expired key": Case(EXPIRED, "KEY_REFUSED", ("gemini",)),
    "no access": Case([Failure("forbidden")], "403"),
    "an unknown model": Case([Failure("model")], "UNKNOWN_MODEL"),
    "the rate": Case([Failure("rate", headers=LATER)], "RATE_LIMIT"),
    "the length": Case([Failure("long")], "TOO_LONG"),
    "the rate of a minute": Case([Failure("minute")], "RATE_LIMIT", ("gemini",)),
    "overloaded": Case([Failure("server", headers=LATER)], "UNAVAILABLE"),
    "payment": Case([Failure("image", 402)], "USED_UP", ALL),
    "credit": Case(CREDIT, "USED_UP", ("anthropic",)),
    "a conflict": Case([Failure("image", 409)], "409", ALL),
    "a detail": Case([Body({"detail": "why"}, 400)], "REFUSED_MESSAGE", COMPATIBLE, cause="why"),
    "what the message holds": Case([Failure("image", 422)], "REFUSED_MESSAGE", ALL),
    **{
        f"{kind} of {wire}": Case([Failure(kind)], error, (wire,))
        for wire, error, kinds in (
            (OPENROUTER, "404", "no-tools data-policy"),
            ("openai", "404", "no-route no-page deployment"),
            ("openai", "UNKNOWN_MODEL", "project access access-bedrock"),
            ("openai", "TOO_LONG", "tpm"),
            (GROQ, "TOO_LONG", "tpm-groq"),
            ("openai", "USED_UP", "quota"),
            ("gemini", "USED_UP", "day"),
            (GROQ, "NOT_UNDERSTOOD", "tool"),
            ("openai", "REFUSED_MESSAGE", "policy azure image"),
            (OLLAMA, "SETUP", "calling"),
            ("openai", "FILTERED", "flagged"),
            ("anthropic", "REFUSED_MESSAGE", "image image-size"),
            ("anthropic", "FILTERED", "policy"),
            ("gemini", "REFUSED_MESSAGE", "policy image"),
        )
        for kind in kinds.split()
    },
    # ---- Its answer is no reply
    "a web page": Case([Failure("html")], "NOT_UNDERSTOOD", ("gemini", "anthropic")),
    # LiteLLM keeps the response of these. A server of one's own is often in OpenAI's format.
    "a page in its place": Case([Failure("html")], "NOT_UNDERSTOOD", COMPATIBLE, cause="Log in"),
    "other JSON": Case([Failure("json")], "NOT_UNDERSTOOD", (*PROVIDERS, OPENROUTER)),
    "an error object": Case(
        [Failure("endpoint")], "NOT_UNDERSTOOD", ("openai", OLLAMA), cause="Unexpected endpoint"
    ),
    "that of others": Case([Failure("endpoint")], "UNAVAILABLE", COMPATIBLE[3:], "", "method", 2),
    "an error object with a status": Case([RATE], "RATE_LIMIT", COMPATIBLE[1:], requests=2),
    "a rate in words": Case([Stream("rate")], "RATE_LIMIT", (GROQ,), requests=2),
    "a length in words": Case([Stream("long")], "NOT_UNDERSTOOD", (GROQ, OPENROUTER)),
    "no byte": Case([Body(b"")], "NOT_UNDERSTOOD", ALL),
    "no text": Case([Finish()], "EMPTY_REPLY"),
    "only thoughts": Case([Thought("Hm."), Finish()], "EMPTY_REPLY"),
    "no tokens left": Case([Finish("length")], "LONG_REPLY"),
    "the prompt is filtered": Case([Finish("prompt")], "FILTERED"),
    "filtered at once": Case([Finish("filter")], "FILTERED"),
    # ---- The reply does not end well
    "filtered": Case([*HALVES, Finish("filter")], "FILTERED_REPLY", kept=HALF),
    "the length limit": Case([*HALVES, Finish("length")], "LONG_REPLY", ALL, HALF),
    "dropped": cut([*HALVES, Cut()], tuple(PROVIDERS)),
    "an error": cut([*HALVES, Stream("server")], tuple(wire for wire in ALL if wire != OLLAMA)),
    "an error of Ollama": cut([*HALVES, Raw(b'{"error": "it has failed"}\n')], (OLLAMA,)),
    # Workaround (LiteLLM 2195): it says "stop" for each chunk of Gemini's.
    "closed": cut([HALVES[0], Raw(b"")], ALL, "The first "),
    "closed in a line": cut(
        lambda wire: [HALVES[0], Raw(FORMATS[wire]({}).step(HALVES[1])[:60])], ALL, "The first "
    ),
    "only [DONE]": cut([*HALVES, Raw(b"data: [DONE]\n\n")], ("openai",)),
    # Workaround (LiteLLM 16651): it says "stop" for these words.
    "a wrong call": Case([end_of_gemini("MALFORMED_FUNCTION_CALL")], "NOT_UNDERSTOOD", ("gemini",)),
    "a wrong end": cut([*HALVES, end_of_gemini("UNEXPECTED_TOOL_CALL")], ("gemini",)),
    **{
        f"the reason {reason}": cut([*HALVES, Raw(OpenAI({}).chunk({}, reason))], COMPATIBLE)
        for reason in ("error", "network_error", "insufficient_system_resource")
    },
    "the limit of Mistral": Case(
        [*HALVES, Raw(OpenAI({}).chunk({}, "model_length"))], "LONG_REPLY", COMPATIBLE, HALF
    ),
    # Neither call is run: its arguments may be incomplete, and others may have had to follow.
    "a call and no end": Case([ToolCall("clock"), Raw(b"")], "CUT_OFF"),
    "a call at the length limit": Case([ToolCall("clock"), Finish("length")], "LONG_REPLY"),
    # ---- It does
    "half an emoji": Case([Text("A\ud83d"), Text("\ude00 B")], kept="A?? B"),
    "tokens after the end": Case([*HALVES, Finish(), USAGE], "", ("gemini",), HALF),
    # Workaround (LiteLLM, no issue known): it ends a reply after 100 equal chunks.
    "a long table rule": Case([Text("---")] * 500, kept="---" * 500),
}


def message_of(main, name: str) -> str:
    """The text of an error: by its name or that of its text, by a class, or by a status."""
    value = getattr(main, name, name)
    if isinstance(value, main.ErrorKind):
        return value.message
    return next(
        kind.message
        for kind in main.CHAT_ERRORS
        if value in kind.classes
        or (name.isdigit() and int(name) in kind.statuses and not kind.words)
    )


def pattern(main, name: str, wire: str) -> str:
    """It fits the error's text, with what its {key} and {model} stand for and any {hint}."""
    provider = wire.partition("/")[0].upper()
    base = "OPENAI_BASE_URL" if wire == "openai" else f"{provider.removesuffix('_CHAT')}_API_BASE"
    names = {"key": f"{provider}_API_KEY", "hint": "" if wire == MISTRAL else f" Check {base}."}
    if wire in PROVIDERS:
        names["model"] = main.litellm_name(wire, "auto")
    text = re.escape(message_of(main, name))
    return re.sub(r"\\{(\w+)\\}", lambda match: names.get(match[1], ".*"), text)


@pytest.mark.parametrize(
    ("name", "wire"), [(name, wire) for name, case in CASES.items() for wire in case.wires]
)
def test_what_a_provider_answers(main, servers, provider, name, wire):
    """One event tells it, and one line in the log; what was shown is stored; the thread goes on."""
    case = CASES[name]
    server = servers(wire)
    chat = Chat(server.url)
    provider.script["please"] = [case.steps(wire) if callable(case.steps) else case.steps]
    start = len(server.log)
    events = chat.say("please")
    server.wait_for(f"thread={chat.thread_id} ")
    assert len(provider.requests) == case.requests
    (turn,) = [line for line in server.log[start:] if f"thread={chat.thread_id} " in line]
    # Workaround (LiteLLM, no issue known): it prints "Give Feedback / Get Help" if a call fails.
    # It also warns once of a setting of yours that a model will not know much longer.
    lines = [line for line in server.log[start:] if not re.match("INFO: |.*LiteLLM:WARN", line)]

    if case.error:
        message = pattern(main, case.error, wire)
        error = error_of(events)
        assert (error.code, error.allow_retry) == ("custom", case.error in TRY_AGAIN)
        assert re.fullmatch(message, error.message)
        (line,) = lines
        assert re.fullmatch(rf"ERROR: +{message}( \(\w+.*: .*\))?", line) and case.cause in line
        assert " end=error " in turn
    else:
        assert not lines
        assert " end=done " in turn and turn.endswith("input_tokens=7 output_tokens=3")
    assert not re.search("https?:|Exception|sk-", str(events))
    assert "-key-0123456789" not in "\n".join([*lines, str(events)])

    _, *replies = chat.items()
    messages = [item for item in replies if item["type"] == "assistant_message"]
    assert [text_of(item) for item in messages] == [case.kept] * bool(case.kept)
    shown = [event.item.id for event in events if event.type == "thread.item.added"]
    assert [item["id"] for item in replies] == shown
    assert texts(chat.say("and on")) == ["You said: and on"]
    # Only a message that was refused for what it holds is left out.
    is_refused = case.error in ("FILTERED", "REFUSED_MESSAGE", "TOO_LONG") and not case.kept
    assert ("please" in str(provider.requests[-1].messages)) == (not is_refused)


def test_silence(main, servers, provider):
    """Before the first token and between two: the connection is closed, the text stays."""
    provider.script |= {"at once": [[Silence()]], "later": [[*HALVES, Silence()]]}
    urls = [servers(f"customised_{name}").url for name in PROVIDERS]
    chats = [(Chat(url), text) for url in urls for text in provider.script]
    with ThreadPoolExecutor(len(chats)) as pool:
        replies = list(pool.map(lambda pair: pair[0].say(pair[1]), chats))
    for (chat, text), events in zip(chats, replies, strict=True):
        error = error_of(events)
        assert (error.message, error.allow_retry) == (main.TIMED_OUT.message, True)
        assert [event.type for event in events].count("progress_update") > 1
        assert text_of(chat.items()[-1]) == {"later": HALF}.get(text, text)
    assert len(provider.requests) == len(chats)  # a timeout is not tried again
    for request in provider.requests:
        assert request.closed.wait(5)


@pytest.mark.parametrize("stream", [True, False])
async def test_a_provider_that_is_not_there(main, monkeypatch, provider_name, stream):
    """A connection that is accepted and never answered, and then one that is refused."""
    listener = socket.create_server(("127.0.0.1", 0))
    url = f"http://127.0.0.1:{listener.getsockname()[1]}"
    model = main.ProviderModel(main.litellm_name(provider_name, "auto"), url, "key")
    arguments = (None, "go", ModelSettings(), [], None, [], ModelTracing.DISABLED)
    ask = model.stream_response if stream else model.get_response
    for seconds, kind in ((0.3, main.TIMED_OUT), (5, main.UNAVAILABLE)):
        monkeypatch.setattr(main, "MODEL_TIMEOUT", seconds)
        answer = ask(*arguments, previous_response_id=None)
        with pytest.raises(main.ChatError) as raised:
            await (anext(answer) if stream else answer)
        assert raised.value.kind is kind
        listener.close()
    assert "Cannot connect to host" in main.described(raised.value.__cause__)


async def test_a_key_that_no_header_can_hold(main, provider, provider_name):
    local = Local(main)
    name, url = main.litellm_name(provider_name, "auto"), f"{provider.url}/{provider_name}"
    local.server.agent.model = main.ProviderModel(name, url, "sk-abc\u2026789")
    assert error_of(await local.say("go")).message.startswith("The AI provider refused the key.")


def test_heartbeats_while_the_model_is_silent(servers, provider):
    """Proxies close idle streams, so a progress_update is sent as a heartbeat."""
    silence = Silence()
    provider.script["think hard"] = [[Text("Well, "), silence, Text("yes.")]]
    stream = Chat(servers("customised_openai").url).start("think hard")
    assert texts(leave(stream, "nothing", {"progress_update": silence})) == ["Well, yes."]


class Refused(Exception):  # as the libraries of providers raise it
    def __init__(self, status_code: int | str, text: str = "", body: str = ""):
        super().__init__(text)
        self.status_code, self.body = status_code, body


CHAINS = [  # the innermost error first
    ("RATE_LIMIT", [Refused(429), ValueError(), RuntimeError("node 40301 is busy")]),
    ("TIMED_OUT", [TimeoutError(), ValueError(), RuntimeError()]),
    # The innermost status is the provider's own: LiteLLM may have made up the outer one.
    ("403", [Refused(403), Refused(429)]),
    ("RATE_LIMIT", [Refused(429), Refused(403)]),
    ("USED_UP", [Refused(429, body="insufficient_quota"), Refused(500)]),
    ("TIMED_OUT", [Refused(408)]),
    ("UNAVAILABLE", [Refused(599)]),
    ("UNAVAILABLE", [OSError()]),
    ("CUT_OFF", [ConnectionResetError(), OSError()]),
    ("SETUP", [TypeError()]),
    ("", [TimeoutError(), ToolTimeoutError("slow", 60)]),  # a tool's own timeout
    ("", [RuntimeError("429")]),
    ("", [RuntimeError("one"), RuntimeError("two")] * 2),  # a circle
]


TEXTS = """
    400 TOO_LONG This endpoint's maximum context length is 65536 tokens.
    400 TOO_LONG Prompt contains 40000 tokens, too large for model with 32768 maximum context length
    400 TOO_LONG Trying to keep the first 5000 tokens when context the overflows. context length
    400 TOO_LONG Please reduce the length of the messages or completion.
    404 UNKNOWN_MODEL This model models/gemini-2.0-flash is no longer available to new users.
    400 UNKNOWN_MODEL The model `x` has been decommissioned and is no longer supported.
    400 UNKNOWN_MODEL Retry your request with the ID or ARN of an inference profile
    400 USED_UP You have reached your specified API usage limits.
    429 USED_UP Your account is not active: billing_not_active
    429 USED_UP Your prepayment credits are depleted.
    400 USED_UP Billing hard limit has been reached
    403 USED_UP Key limit exceeded (total limit).
    429 RATE_LIMIT Please check your plan and billing details. Quota of 15 per minute
    400 SETUP User location is not supported for the API use.
    400 SETUP "auto" tool choice requires --enable-auto-tool-choice
    400 SETUP Function calling is not enabled for models/gemma
    400 SETUP tools.0.custom.input_schema: JSON schema is invalid
    400 SETUP `temperature` is deprecated for this model.
    400 SETUP Function tools with reasoning_effort are not supported for gpt-5.6
    400 SETUP Invalid 'tools[0].function.name': string does not match pattern.
    400 SETUP Function call is missing a thought_signature in functionCall parts.
    400 SETUP Image URLs are only allowed for messages with role 'user', but this message with role
    400 KEY_REFUSED Incorrect API key provided: x
    403 FILTERED Your chosen model requires moderation and your input was flagged
    404 REFUSED_MESSAGE No endpoints found that support image input
    400 REFUSED_MESSAGE Expected `thinking` or `redacted_thinking`, but found `tool_use`.
    400 REFUSED_MESSAGE image exceeds 5 MB maximum
    400 NOT_UNDERSTOOD The model has crashed without additional information.
    500 TOO_LONG Cannot truncate prompt with n_keep (4321) >= n_ctx (4096)
    400 TOO_LONG request (5000 tokens) exceeds the available context size (4096 tokens)
    413 TOO_LONG Request body too large for gpt-4o model. Max size: 8000 tokens.
    400 REFUSED_MESSAGE Error rendering prompt with jinja template: "No user query found"
    400 REFUSED_MESSAGE The `reasoning_content` in the thinking mode must be passed back
    400 SETUP As of transformers v4.44, default chat template is no longer allowed
    400 SETUP System role not supported
    400 SETUP `tool calling` is not supported with this model
    400 SETUP Budget 0 is invalid. This model only works in thinking mode.
    400 NOT_UNDERSTOOD Failed to generate JSON. Please adjust your prompt. json_validate_failed
    400 NOT_UNDERSTOOD Function id '1': DEGRADED function cannot be invoked
    400 USED_UP Gemini API free tier is not available in your country. Please enable billing
    429 USED_UP Insufficient balance or no resource package. Please recharge.
    429 USED_UP Your account is suspended. exceeded_current_quota_error
    400 USED_UP Access denied, please make sure your account is in good standing. Arrearage
    400 UNKNOWN_MODEL Unable to access non-serverless model x. model_not_available
    400 UNKNOWN_MODEL The requested model 'x' is not supported by any provider. model_not_supported
    429 RATE_LIMIT Quota exceeded for metric: generate_content_free_tier_requests, limit: 5
"""


@pytest.mark.parametrize("line", TEXTS.strip().splitlines())
def test_the_words_of_single_providers(main, line):
    status, name, text = line.split(maxsplit=2)
    found = main.chat_error_for(Refused(int(status), text), main.model)
    assert found.kind.message == message_of(main, name)


@pytest.mark.parametrize("cause", [True, False], ids=["cause", "context"])
@pytest.mark.parametrize(("name", "errors"), CHAINS)
def test_a_status_or_a_class_inside_of_another_error(main, name, errors, cause):
    """Each was raised because of the one before, or while that was handled."""
    for earlier, later in pairwise(errors):
        later.__cause__, later.__context__ = (earlier, None) if cause else (None, earlier)
    found = main.chat_error_for(errors[-1], main.model)
    assert (found.kind.message == message_of(main, name)) if name else found is errors[-1]


def test_secrets_are_masked(main, monkeypatch):
    """One may be a part of another. What is shorter than eight characters is no secret."""
    secrets = {"A_TOKEN": "secret-1", "B_PASSWORD": "secret-12", "C_KEY": "short"}
    for name, value in {**secrets, "D_BASE_URL": "http://gateway/token"}.items():
        monkeypatch.setenv(name, value)
    error = Refused(401, "secret-12, secret-1, short\nhttp://gateway/token/v1" + "x" * 500)
    error.code = "bad_key"
    told = main.described(error)
    assert told.startswith(r"Refused 401 bad_key: '***, ***, short\n***/v1xxx") and len(told) < 350


async def test_a_tool_that_raises_is_logged(main, provider, log, monkeypatch):
    """openai-agents tells it the model alone."""

    @function_tool
    def clock() -> None:
        raise RuntimeError("secret-1 is no time")

    monkeypatch.setenv("A_TOKEN", "secret-1")
    provider.script["go"] = [[ToolCall("clock")], [Text("Sorry.")]]
    assert texts(await Local(main, provider, tools=[clock]).say("go")) == ["Sorry."]
    (line,) = [record.getMessage() for record in log.records if record.levelname == "ERROR"]
    says = "The tool clock failed (Exception: 'An error occurred while running the tool."
    assert line.startswith(says) and "secret" not in line


@pytest.mark.parametrize(
    ("name", "more"), [("gemini", {"GOOGLE_API_KEY": "x"}), ("together_ai", {"MODEL": "m"})]
)
def test_no_key_is_named_if_another_may_count(tmp_path, name, more):
    """LiteLLM prefers GOOGLE_API_KEY to GEMINI_API_KEY; of other providers it knows more names."""
    main = load_main(tmp_path, {"PROVIDER": name, **more})
    assert f"the credentials for {name}" in str(main.ChatError(main.NO_KEY, main.model))


@pytest.mark.parametrize("wire", [wire for wire in ALL if wire != "anthropic"])
def test_tokens_that_the_provider_does_not_report(servers, provider, wire):
    """Workaround (LiteLLM, no issue known): it downloads a tokenizer to count them."""
    writer = FORMATS[wire]({})
    pieces = b"".join(writer.step(step) for step in (HALVES[0], Finish()))
    for name in (b"usageMetadata", b"prompt_eval_count", b"eval_count"):
        pieces = pieces.replace(name, b"x")
    provider.script["please"] = [[Raw(pieces)]]
    server = servers(wire)
    chat = Chat(server.url)
    assert texts(chat.say("please")) == ["The first "]
    line = server.wait_for(f"thread={chat.thread_id} ").split(chat.thread_id)[1].split("\n")[0]
    assert line.endswith("input_tokens=- output_tokens=-")


@pytest.mark.parametrize("wire", ["openai", GROQ, OLLAMA])
def test_a_stream_with_a_wrong_type(servers, monkeypatch, wire):
    monkeypatch.setattr(FORMATS[wire], "type", "application/json")
    assert texts(Chat(servers(wire).url).say("hello")) == ["You said: hello"]


def test_an_id_that_begins_like_a_prefix(servers, provider):
    Chat(servers("openai/openai/gpt-oss-20b").url).say("hello")
    assert provider.requests[0].body["model"] == "openai/gpt-oss-20b"


def test_a_model_of_the_responses_api(servers, provider):
    """LiteLLM needs mcp 2.2 for it, which no Python 3.14 can install with this FastAPI."""
    server = servers("openai/gpt-5-codex")
    events = Chat(server.url).say("hello")
    if version("mcp") >= "2.2":
        assert texts(events) == ["You said: hello"]
        assert provider.requests[0].path.endswith("/openai/responses")
    else:
        assert "ImportError" in server.wait_for("The server's log has the reason")
