"""A loopback stand-in for the Gemini, OpenAI and Anthropic HTTP APIs, mainly their streams.

One FastAPI app speaks the three wire formats, so that LiteLLM's real adapters run
against it. A test says what the model does in terms common to all three, a list of
steps, keyed by the text of the user message that it answers:

    provider.script["What is the time?"] = [[Text("Let me look. "), ToolCall("clock")],
                                            [Text("It is noon.")]]

The first list answers the first request that carries this message, the second the
next (after the tool's output); the last one stays. A message without a script is
answered with `echo(message)`. Every request is kept in `provider.requests`.

Run as a program (`python tests/support/provider.py PORT DELTAS PER_SECOND`) it answers every
request with DELTAS deltas, PER_SECOND of them each second (0: as fast as it can).
"""

import asyncio
import json
import re
import socket
import sys
import threading
import time
from dataclasses import dataclass, field
from typing import ClassVar

import uvicorn
from fastapi import FastAPI, Request
from fastapi.responses import HTMLResponse, JSONResponse, StreamingResponse

# ---- What a model can do: the steps of a script ---------------------------------


@dataclass
class Text:
    """One text delta."""

    text: str


@dataclass
class Thought:
    """One delta of the model's reasoning."""

    text: str


@dataclass
class ToolCall:
    name: str
    arguments: dict = field(default_factory=dict)
    id: str = ""  # some providers give the same in each turn


@dataclass
class Finish:
    """Why the reply ended: "stop" (what a script without a Finish ends with),
    "length", "filter" (blocked while answering), or "prompt" (the prompt was blocked)."""

    reason: str = "stop"


class Silence:
    """Send nothing more, until the client leaves or `end` is set."""

    def __init__(self):
        self.end = threading.Event()


@dataclass
class Pause:
    """Send nothing for some seconds."""

    seconds: float


class Cut:
    """Drop the connection in the middle of the body."""


@dataclass
class Together:
    """These steps in one piece, so that they arrive together."""

    steps: list


@dataclass
class Raw:
    """These bytes, as they are."""

    body: bytes


@dataclass
class Body:
    """The whole answer in the provider's own bytes.

    Each piece is sent on its own; one that is no bytes is sent as JSON. With `cut` the connection
    is dropped before the body's end.
    """

    pieces: list
    status: int = 200
    type: str = "text/event-stream"
    cut: bool = False


@dataclass
class Failure:
    """The whole answer is an error: a status and the provider's own body for it.

    `kind` is one of "key", "forbidden", "model", "rate", "long", "policy", "server",
    "html" (a captive portal: status 200 and a web page), "json" (status 200, no stream).
    """

    kind: str


class Stream(str):
    """A provider's error inside a stream that began well: `kind` as of Failure."""


SECRET = "https://internal.example/v1?key=sk-secret"
"""Stands in every error text, so that a test can see that none of it is passed on."""


def echo(message: str) -> list:
    """What the model answers to a message without a script."""
    return [Text("You said: "), *(Text(word) for word in re.findall(r"\S+\s*", message))]


# ---- The three wire formats -----------------------------------------------------


def sse(data, event: str = "") -> bytes:
    head = f"event: {event}\n" if event else ""
    return f"{head}data: {json.dumps(data)}\n\n".encode()


class Gemini:
    """https://ai.google.dev/api/generate-content: POST models/…:streamGenerateContent?alt=sse"""

    type = "text/event-stream"
    status: ClassVar[dict[str, int]] = {
        "key": 400,
        "forbidden": 403,
        "model": 404,
        "rate": 429,
        "long": 400,
        "policy": 400,
        "server": 503,
    }
    words: ClassVar[dict[str, tuple[str, str]]] = {
        "key": ("INVALID_ARGUMENT", "API key not valid. Please pass a valid API key."),
        "forbidden": ("PERMISSION_DENIED", "Your API key does not have permission."),
        "model": ("NOT_FOUND", "models/nope is not found for API version v1beta."),
        "rate": ("RESOURCE_EXHAUSTED", "You exceeded your current quota."),
        "long": (
            "INVALID_ARGUMENT",
            "The input token count (1200000) exceeds the maximum number of tokens allowed "
            "(1048576).",
        ),
        "policy": (
            "INVALID_ARGUMENT",
            "The request was rejected by our safety system: content_policy_violation",
        ),
        "server": ("UNAVAILABLE", "The model is overloaded. Please try again later."),
    }

    def __init__(self, body: dict):
        self.calls = 0

    def error(self, kind: str) -> dict:
        state, message = self.words[kind]
        return {
            "error": {"code": self.status[kind], "message": f"{message} {SECRET}", "status": state}
        }

    def chunk(self, parts: list | None = None, **candidate) -> bytes:
        candidate = {"content": {"parts": parts or [], "role": "model"}, "index": 0, **candidate}
        return sse(
            {
                "candidates": [candidate],
                "usageMetadata": {
                    "promptTokenCount": 7,
                    "candidatesTokenCount": 3,
                    "totalTokenCount": 10,
                },
                "modelVersion": "gemini-flash-latest",
                "responseId": "resp-1",
            }
        )

    def begin(self) -> bytes:
        return b""

    def complete(self, text: str) -> dict:
        """The answer to a request that does not stream."""
        return json.loads(self.chunk([{"text": text}], finishReason="STOP").removeprefix(b"data: "))

    def step(self, step) -> bytes:
        match step:
            case Text(text):
                return self.chunk([{"text": text}])
            case Thought(text):
                return self.chunk([{"text": text, "thought": True}])
            case ToolCall(name, arguments):
                return self.chunk(
                    [
                        {
                            "functionCall": {"name": name, "args": arguments},
                            "thoughtSignature": "c2ln",
                        }
                    ]
                )
            case Stream():
                return sse(self.error(step))
            case Finish("prompt"):
                return sse(
                    {
                        "promptFeedback": {"blockReason": "SAFETY", "safetyRatings": []},
                        "usageMetadata": {"promptTokenCount": 7, "totalTokenCount": 7},
                        "modelVersion": "gemini-flash-latest",
                        "responseId": "resp-1",
                    }
                )
            case Finish("filter"):
                ratings = [
                    {"category": "HARM_CATEGORY_HARASSMENT", "probability": "HIGH", "blocked": True}
                ]
                return sse(
                    {
                        "candidates": [
                            {"finishReason": "SAFETY", "index": 0, "safetyRatings": ratings}
                        ],
                        "usageMetadata": {"promptTokenCount": 7, "totalTokenCount": 7},
                        "modelVersion": "gemini-flash-latest",
                        "responseId": "resp-1",
                    }
                )
            case Finish(reason):
                return self.chunk(
                    [{"text": ""}], finishReason={"stop": "STOP", "length": "MAX_TOKENS"}[reason]
                )

    @staticmethod
    def messages(body: dict) -> list[tuple[str, str]]:
        """(role, text) of each part: a tool call, its output and an image count as "tool"."""
        found = []
        for content in body["contents"]:
            for part in content["parts"]:
                text = part.get("text") if "text" in part else json.dumps(part, sort_keys=True)
                role = (
                    "tool"
                    if "text" not in part
                    else {"model": "assistant"}.get(content["role"], content["role"])
                )
                found.append((role, text))
        return found

    @staticmethod
    def instructions(body: dict) -> str:
        return "".join(part["text"] for part in body.get("system_instruction", {}).get("parts", []))


class OpenAI:
    """https://platform.openai.com/docs/api-reference/chat/streaming: POST chat/completions"""

    type = "text/event-stream"
    status: ClassVar[dict[str, int]] = {
        "key": 401,
        "forbidden": 403,
        "model": 404,
        "rate": 429,
        "long": 400,
        "policy": 400,
        "server": 503,
    }
    words: ClassVar[dict[str, tuple[str, str]]] = {
        "key": ("invalid_api_key", "Incorrect API key provided: sk-secret."),
        "forbidden": (
            "unsupported_country_region_territory",
            "Country, region, or territory not supported",
        ),
        "model": (
            "model_not_found",
            "The model `nope` does not exist or you do not have access to it.",
        ),
        "rate": ("rate_limit_exceeded", "Rate limit reached for gpt-4o."),
        "long": (
            "context_length_exceeded",
            "This model's maximum context length is 128000 tokens. "
            "However, your messages resulted in 130000 tokens.",
        ),
        "policy": (
            "content_policy_violation",
            "Your request was rejected as a result of our safety system.",
        ),
        "server": (None, "The server is overloaded or not ready yet."),
    }

    def __init__(self, body: dict):
        self.calls = 0
        self.usage = (body.get("stream_options") or {}).get("include_usage")

    def error(self, kind: str) -> dict:
        code, message = self.words[kind]
        return {
            "error": {
                "message": f"{message} {SECRET}",
                "type": "invalid_request_error",
                "param": None,
                "code": code,
            }
        }

    def chunk(self, delta: dict, finish_reason: str | None = None) -> bytes:
        return sse(
            {
                "id": "chatcmpl-1",
                "object": "chat.completion.chunk",
                "created": 1,
                "model": "gpt-4o-2024-11-20",
                "system_fingerprint": "fp_1",
                "choices": [
                    {"index": 0, "delta": delta, "logprobs": None, "finish_reason": finish_reason}
                ],
            }
        )

    def begin(self) -> bytes:
        return self.chunk({"role": "assistant", "content": "", "refusal": None})

    def complete(self, text: str) -> dict:
        message = {"role": "assistant", "content": text, "refusal": None}
        return {
            "id": "chatcmpl-1",
            "object": "chat.completion",
            "created": 1,
            "model": "gpt-4o-2024-11-20",
            "choices": [
                {"index": 0, "message": message, "logprobs": None, "finish_reason": "stop"}
            ],
            "usage": {"prompt_tokens": 7, "completion_tokens": 3, "total_tokens": 10},
        }

    def step(self, step) -> bytes:
        match step:
            case Text(text):
                return self.chunk({"content": text})
            case Thought(text):
                return self.chunk({"reasoning_content": text})
            case ToolCall(name, arguments):
                self.calls += 1
                id = step.id or f"call_{time.time_ns()}"
                head = {"index": self.calls - 1, "id": id, "type": "function"}
                text = json.dumps(arguments)
                half = len(text) // 2
                return (
                    self.chunk(
                        {"tool_calls": [{**head, "function": {"name": name, "arguments": ""}}]}
                    )
                    + self.chunk(
                        {
                            "tool_calls": [
                                {"index": self.calls - 1, "function": {"arguments": text[:half]}}
                            ]
                        }
                    )
                    + self.chunk(
                        {
                            "tool_calls": [
                                {"index": self.calls - 1, "function": {"arguments": text[half:]}}
                            ]
                        }
                    )
                )
            case Stream():
                return sse(self.error(step))
            case Finish(reason):
                names = {"stop": "tool_calls" if self.calls else "stop", "length": "length"}
                usage = b""
                if self.usage:
                    usage = sse(
                        {
                            "id": "chatcmpl-1",
                            "object": "chat.completion.chunk",
                            "created": 1,
                            "model": "gpt-4o-2024-11-20",
                            "choices": [],
                            "usage": {
                                "prompt_tokens": 7,
                                "completion_tokens": 3,
                                "total_tokens": 10,
                            },
                        }
                    )
                return (
                    self.chunk({}, names.get(reason, "content_filter"))
                    + usage
                    + b"data: [DONE]\n\n"
                )

    @staticmethod
    def messages(body: dict) -> list[tuple[str, str]]:
        found = []
        for message in body["messages"]:
            if message["role"] == "system":
                continue
            if message["role"] == "tool" or message.get("tool_calls"):
                found.append(("tool", json.dumps(message, sort_keys=True)))
            elif isinstance(message["content"], str):
                found.append((message["role"], message["content"]))
            else:
                for part in message["content"]:
                    text = part.get("text") or json.dumps(part, sort_keys=True)
                    found.append((message["role"] if "text" in part else "tool", text))
        return found

    @staticmethod
    def instructions(body: dict) -> str:
        return "".join(
            message["content"] for message in body["messages"] if message["role"] == "system"
        )


class Anthropic:
    """https://docs.anthropic.com/en/api/messages-streaming: POST v1/messages"""

    type = "text/event-stream"
    status: ClassVar[dict[str, int]] = {
        "key": 401,
        "forbidden": 403,
        "model": 404,
        "rate": 429,
        "long": 400,
        "policy": 400,
        "server": 529,
    }
    words: ClassVar[dict[str, tuple[str, str]]] = {
        "key": ("authentication_error", "invalid x-api-key"),
        "forbidden": (
            "permission_error",
            "Your API key does not have permission to use the specified resource.",
        ),
        "model": ("not_found_error", "model: nope"),
        "rate": ("rate_limit_error", "This request would exceed your organization's rate limit."),
        "long": ("invalid_request_error", "prompt is too long: 210000 tokens > 200000 maximum"),
        "policy": ("invalid_request_error", "Output blocked by content filtering policy"),
        "server": ("overloaded_error", "Overloaded"),
    }

    def __init__(self, body: dict):
        self.calls = 0
        self.block: str | None = None
        self.index = -1

    def error(self, kind: str) -> dict:
        name, message = self.words[kind]
        return {
            "type": "error",
            "error": {"type": name, "message": f"{message} {SECRET}"},
            "request_id": "req_1",
        }

    def begin(self) -> bytes:
        message = {
            "id": "msg_1",
            "type": "message",
            "role": "assistant",
            "model": "claude-sonnet-4-6",
            "content": [],
            "stop_reason": None,
            "stop_sequence": None,
            "usage": {"input_tokens": 7, "output_tokens": 1},
        }
        return sse({"type": "message_start", "message": message}, "message_start") + sse(
            {"type": "ping"}, "ping"
        )

    def complete(self, text: str) -> dict:
        return {
            "id": "msg_1",
            "type": "message",
            "role": "assistant",
            "model": "claude-sonnet-4-6",
            "content": [{"type": "text", "text": text}],
            "stop_reason": "end_turn",
            "stop_sequence": None,
            "usage": {"input_tokens": 7, "output_tokens": 3},
        }

    def delta(self, delta: dict) -> bytes:
        data = {"type": "content_block_delta", "index": self.index, "delta": delta}
        return sse(data, "content_block_delta")

    def open(self, kind: str | None, block: dict | None = None) -> bytes:
        """Close the open content block, unless it is of this kind, and open one."""
        if kind == self.block and kind != "tool_use":
            return b""
        out = b""
        if self.block:
            if self.block == "thinking":
                out += self.delta({"type": "signature_delta", "signature": "c2ln"})
            out += sse({"type": "content_block_stop", "index": self.index}, "content_block_stop")
        self.block = kind
        if kind:
            self.index += 1
            data = {
                "type": "content_block_start",
                "index": self.index,
                "content_block": {"type": kind, **block},
            }
            out += sse(data, "content_block_start")
        return out

    def step(self, step) -> bytes:
        match step:
            case Text(text):
                return self.open("text", {"text": ""}) + self.delta(
                    {"type": "text_delta", "text": text}
                )
            case Thought(text):
                opened = self.open("thinking", {"thinking": "", "signature": ""})
                return opened + self.delta({"type": "thinking_delta", "thinking": text})
            case ToolCall(name, arguments):
                self.calls += 1
                id = step.id or f"toolu_{time.time_ns()}"
                opened = self.open("tool_use", {"id": id, "name": name, "input": {}})
                return opened + self.delta(
                    {"type": "input_json_delta", "partial_json": json.dumps(arguments)}
                )
            case Stream():
                return sse(self.error(step), "error")
            case Finish(reason):
                names = {"stop": "tool_use" if self.calls else "end_turn", "length": "max_tokens"}
                data = {
                    "type": "message_delta",
                    "delta": {"stop_reason": names.get(reason, "refusal"), "stop_sequence": None},
                    "usage": {"output_tokens": 3},
                }
                return (
                    self.open(None)
                    + sse(data, "message_delta")
                    + sse({"type": "message_stop"}, "message_stop")
                )

    @staticmethod
    def messages(body: dict) -> list[tuple[str, str]]:
        found = []
        for message in body["messages"]:
            content = message["content"]
            for part in (
                [{"type": "text", "text": content}] if isinstance(content, str) else content
            ):
                if part["type"] == "text":
                    found.append((message["role"], part["text"]))
                else:
                    found.append(("tool", json.dumps(part, sort_keys=True)))
        return found

    @staticmethod
    def instructions(body: dict) -> str:
        system = body.get("system", "")
        return system if isinstance(system, str) else "".join(part["text"] for part in system)


class Ollama(OpenAI):
    """https://docs.ollama.com/api/chat: POST api/chat, one JSON object a line"""

    type = "application/x-ndjson"

    def line(self, content: str, done: bool = False, **more) -> bytes:
        message = {"role": "assistant", "content": content}
        return (
            json.dumps({"model": "llama3.2", "message": message, "done": done, **more}).encode()
            + b"\n"
        )

    def begin(self) -> bytes:
        return b""

    def step(self, step) -> bytes:
        match step:
            case Text(text):
                return self.line(text)
            case Finish(reason):
                return self.line("", True, done_reason=reason, prompt_eval_count=7, eval_count=3)


class Responses(OpenAI):
    """https://platform.openai.com/docs/api-reference/responses-streaming: POST responses"""

    def __init__(self, body: dict):
        super().__init__(body)
        self.number = -1
        self.text = ""

    def event(self, type: str, **more) -> bytes:
        self.number += 1
        return sse({"type": type, "sequence_number": self.number, **more}, type)

    def response(self, status: str, output: list, **more) -> dict:
        return {
            "id": "resp_1",
            "object": "response",
            "created_at": 1,
            "status": status,
            "error": None,
            "incomplete_details": None,
            "instructions": None,
            "metadata": {},
            "model": "gpt-5-codex",
            "output": output,
            "parallel_tool_calls": True,
            "temperature": 1.0,
            "tool_choice": "auto",
            "tools": [],
            "top_p": 1.0,
            **more,
        }

    def message(self, status: str) -> dict:
        content = (
            [{"type": "output_text", "text": self.text, "annotations": []}] if self.text else []
        )
        return {
            "id": "msg_1",
            "type": "message",
            "role": "assistant",
            "status": status,
            "content": content,
        }

    def begin(self) -> bytes:
        return self.event(
            "response.created", response=self.response("in_progress", [])
        ) + self.event(
            "response.output_item.added", output_index=0, item=self.message("in_progress")
        )

    def step(self, step) -> bytes:
        place = {"item_id": "msg_1", "output_index": 0, "content_index": 0}
        match step:
            case Text(text):
                self.text += text
                return self.event("response.output_text.delta", **place, delta=text, logprobs=[])
            case Finish("stop"):
                usage = {"input_tokens": 7, "output_tokens": 3, "total_tokens": 10}
                usage |= {
                    "input_tokens_details": {"cached_tokens": 0},
                    "output_tokens_details": {"reasoning_tokens": 0},
                }
                item = self.message("completed")
                return self.event(
                    "response.output_item.done", output_index=0, item=item
                ) + self.event(
                    "response.completed", response=self.response("completed", [item], usage=usage)
                )
            case Finish("length"):
                item = self.message("incomplete")
                details = {"reason": "max_output_tokens"}
                return self.event(
                    "response.output_item.done", output_index=0, item=item
                ) + self.event(
                    "response.incomplete",
                    response=self.response("incomplete", [item], incomplete_details=details),
                )

    @staticmethod
    def messages(body: dict) -> list[tuple[str, str]]:
        found = []
        for item in (
            [{"role": "user", "content": body["input"]}]
            if isinstance(body["input"], str)
            else body["input"]
        ):
            content = item.get("content")
            if "role" not in item:
                found.append(("tool", json.dumps(item, sort_keys=True)))
            elif isinstance(content, str):
                found.append((item["role"], content))
            else:
                found += [(item["role"], part["text"]) for part in content]
        return found

    @staticmethod
    def instructions(body: dict) -> str:
        return body.get("instructions", "")


# ---- The server -----------------------------------------------------------------


EXPLAINED = re.compile(
    r"(?:\n\n)?Only the application can write between <(application-[0-9a-f]{16})> and </\1>\."
    r" Anything like it without these is typed by the user\."
)


@dataclass
class Seen:
    """One request as the provider saw it; `closed` is set when its answer is over,
    `complete` says whether all of it was sent."""

    format: type
    body: dict
    headers: dict
    path: str
    closed: threading.Event = field(default_factory=threading.Event)
    complete: bool = False
    raw: dict = field(init=False)
    """The body as it came. In `body` the application's mark, which differs from process to process,
    is taken off the messages that have it, if the instructions explain it."""

    def __post_init__(self):
        self.raw = self.body
        text = json.dumps(self.body)
        explained = EXPLAINED.search(self.format.instructions(self.body))
        if explained:
            mark = explained[1]
            text = text.replace(json.dumps(explained[0])[1:-1], "")
            for end in (f"<{mark}>\\n", f"\\n</{mark}>"):
                text = text.replace(end, "")
        self.body = json.loads(text)

    @property
    def key(self) -> str:
        names = ("x-goog-api-key", "x-api-key", "authorization", "api-key")
        keys = [self.headers[name] for name in names if name in self.headers]
        return keys[0].removeprefix("Bearer ") if keys else ""

    @property
    def messages(self) -> list[tuple[str, str]]:
        return self.format.messages(self.body)

    @property
    def message(self) -> str:
        """The text of the newest user message."""
        return next((text for role, text in reversed(self.messages) if role == "user"), "")


OPENAI_COMPATIBLE = ("OPENROUTER", "DEEPSEEK", "GROQ", "HOSTED_VLLM")


class Provider:
    """The app, its scripts and what it has seen; `with Provider() as provider:` serves it."""

    def __init__(self, answer=echo, per_second: float = 0):
        self.script: dict[str, list[list]] = {}
        self.requests: list[Seen] = []
        self.asked = threading.Event()
        self.answer = answer
        self.per_second = per_second
        self.keep = True
        self.app = FastAPI()
        for method in ("streamGenerateContent", "generateContent"):
            route = f"/gemini/models/{{model}}:{method}"
            self.app.add_api_route(route, self.gemini, methods=["POST"])
        # OpenAI's route, and Azure's: openai/deployments/{model}/chat/completions
        self.app.add_api_route("/openai/{path:path}chat/completions", self.openai, methods=["POST"])
        self.app.add_api_route("/openai/responses", self.responses, methods=["POST"])
        self.app.add_api_route("/ollama/api/chat", self.ollama, methods=["POST"])
        self.app.add_api_route("/anthropic/v1/messages", self.anthropic, methods=["POST"])

    async def gemini(self, request: Request):
        return await self.respond(Gemini, request)

    async def openai(self, request: Request):
        return await self.respond(OpenAI, request)

    async def anthropic(self, request: Request):
        return await self.respond(Anthropic, request)

    async def responses(self, request: Request):
        return await self.respond(Responses, request)

    async def ollama(self, request: Request):
        return await self.respond(Ollama, request)

    async def respond(self, format, request: Request):
        seen = Seen(format, await request.json(), dict(request.headers), str(request.url))
        if self.keep:
            self.requests.append(seen)
            self.asked.set()
        message = seen.message
        replies = self.script.get(message) or [self.answer(message)]
        steps = replies.pop(0) if len(replies) > 1 else replies[0]
        writer = format(seen.body)
        if steps and isinstance(steps[0], Body):
            body = steps[0]
            return StreamingResponse(
                self.send(body, seen), status_code=body.status, media_type=body.type
            )
        if steps and isinstance(steps[0], Failure):
            seen.closed.set()
            kind = steps[0].kind
            if kind == "html":
                return HTMLResponse(
                    "<html>\n<body>\n<h1>Log in to the network</h1>\n</body>\n</html>"
                )
            if kind == "json":
                return JSONResponse({"hello": "world"})
            body = writer.error(kind)
            if kind == "key":  # some providers repeat it
                body["error"]["message"] += f" The key was {seen.key}."
            return JSONResponse(body, status_code=format.status[kind])
        if not (seen.body.get("stream") or "stream" in seen.path):
            return await self.complete(writer, steps, seen)
        return StreamingResponse(self.stream(writer, steps, seen), media_type=format.type)

    async def send(self, body: Body, seen: Seen):
        try:
            for piece in body.pieces:
                yield piece if isinstance(piece, bytes) else json.dumps(piece).encode()
                await asyncio.sleep(0.005)  # otherwise two pieces may arrive as one
            if body.cut:
                raise ConnectionError("cut on purpose")
            seen.complete = True
        finally:
            seen.closed.set()

    async def complete(self, writer, steps: list, seen: Seen):
        """The texts of the steps in one piece."""
        texts = []
        for step in steps:
            match step:
                case Text(text):
                    texts.append(text)
                case Silence():
                    await self.silence(step)
                case _:
                    raise NotImplementedError(step)
        seen.closed.set()
        seen.complete = True
        return JSONResponse(writer.complete("".join(texts)))

    async def silence(self, step: Silence):
        while not step.end.is_set():  # noqa: ASYNC110 - set by another thread
            await asyncio.sleep(0.02)

    async def stream(self, writer, steps: list, seen: Seen):
        finished = False
        started = time.perf_counter()
        try:
            if begin := writer.begin():
                yield begin
            for number, step in enumerate(steps):
                if self.per_second:
                    due = started + number / self.per_second - time.perf_counter()
                    await asyncio.sleep(max(due, 0))
                match step:
                    case Pause(seconds):
                        await asyncio.sleep(seconds)
                    case Silence():
                        await self.silence(step)
                    case Cut():
                        raise ConnectionError("cut on purpose")
                    case Raw(body):
                        yield body
                    case Together(parts):
                        yield b"".join(map(writer.step, parts))
                    case _:
                        finished = finished or isinstance(step, (Finish, Stream))
                        yield writer.step(step)
            if not finished and not (steps and isinstance(steps[-1], Raw)):
                yield writer.step(Finish())
            seen.complete = True
        finally:
            seen.closed.set()

    def open(self) -> list[Seen]:
        """The requests whose answers are still under way."""
        return [seen for seen in self.requests if not seen.closed.is_set()]

    def environment(self) -> dict[str, str]:
        """The variables that point LiteLLM at this provider, with keys that work here."""
        return {
            "GEMINI_API_BASE": f"{self.url}/gemini",
            "OPENAI_BASE_URL": f"{self.url}/openai",
            "ANTHROPIC_API_BASE": f"{self.url}/anthropic",
            "OLLAMA_API_BASE": f"{self.url}/ollama",
            "AZURE_API_BASE": self.url,
            "MISTRAL_AZURE_API_BASE": f"{self.url}/openai",  # LiteLLM's only name for it
            **{f"{name}_API_BASE": f"{self.url}/openai" for name in OPENAI_COMPATIBLE},
            "GEMINI_API_KEY": "gemini-key-0123456789",
            "OPENAI_API_KEY": "openai-key-0123456789",
            "ANTHROPIC_API_KEY": "anthropic-key-0123456789",
            "AZURE_API_KEY": "azure-key-0123456789",
            **{f"{name}_API_KEY": f"{name.lower()}-key-0123456789" for name in OPENAI_COMPATIBLE},
        }

    def __enter__(self):
        listener = socket.create_server(("127.0.0.1", 0), backlog=1024)
        listener.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        self.url = f"http://127.0.0.1:{listener.getsockname()[1]}"
        # Not uvloop: as this process's policy it keeps playwright on Python < 3.12 from starting.
        config = uvicorn.Config(self.app, loop="asyncio", **OPTIONS)
        self.server = uvicorn.Server(config)
        self.thread = threading.Thread(
            target=self.server.run, kwargs={"sockets": [listener]}, daemon=True
        )
        self.thread.start()
        return self

    def __exit__(self, *_):
        self.server.should_exit = self.server.force_exit = True
        self.thread.join(10)


# Uvicorn's 5 seconds are about what passes between two tests: a connection could be closed as it
# is used again.
OPTIONS = {"log_level": "critical", "lifespan": "off", "timeout_keep_alive": 600}


class Now(Text):
    """A text delta that holds the time at which it is sent, in seconds."""

    text = property(lambda self: f"{time.time():.6f} ")

    def __init__(self):
        pass


if __name__ == "__main__":
    port, deltas, per_second = int(sys.argv[1]), int(sys.argv[2]), float(sys.argv[3])
    provider = Provider(lambda _: [Now()] * deltas, per_second)
    provider.keep = False
    uvicorn.run(provider.app, host="127.0.0.1", port=port, **OPTIONS)
