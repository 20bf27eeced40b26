# /// script
# requires-python = ">=3.10,<3.15"
# dependencies = [
#     "fastapi==0.115.6",
#     "uvicorn[standard]==0.32.1",
#     "openai-chatkit==1.4.0",
#     "openai-agents[litellm]==0.20.0",
#     "litellm==1.106.2",
#     "python-dotenv==1.0.1",
# ]
# ///
"""A ChatKit server: OpenAI's ChatKit in front of any model that LiteLLM supports.

Run it   make run                  with the tested versions in backend/constraints.txt
         uv run backend/main.py    with the versions listed above; a copy of this file is enough
         python backend/main.py    with the versions that you have installed
         PROVIDER=mock             set this for canned replies: no key, no network

Routes   GET  /chatkit             a page with the chat
         POST /chatkit             ChatKit's protocol: JSON, or a stream of server-sent events
         GET  /health              {"status": "ok"}
         GET  /debug/threads       {thread id: {"items": [{"id", "type", "content"?}], "count"}}

Settings PROVIDER, MODEL, MODELS, MODEL_TIMEOUT, GEMINI_API_KEY, OPENAI_API_KEY, ANTHROPIC_API_KEY,
         HOST, PORT, WORKERS, ALLOWED_ORIGINS, CHATKIT_TOKENS: in the environment or in .env;
         see .env.example

Limits   threads are kept in memory, by one process; the model sees the newest HISTORY_ITEMS
         items of a thread; MAX_BODY_BYTES and the constants after it bound a request

The file, from top to bottom. Start reading at `ChatKitServerImpl.respond`: it is one turn.
A message goes from chatkit_endpoint to process, check and Turn.read; in the turn's own task from
produce to chatkit and respond; in openai-agents' task through the run (ProviderModel); and in the
turn's task back through the stages. chatkit then stores the items that are done, and the events go
through the queue to Turn.read and the client.

         Process-wide effects      what importing this file changes outside of it
         Settings                  constants, then environment variables
         Store                     MemoryStore: threads, items and attachments
         Model                     ProviderModel: LiteLLM with time limits and readable faults
         Server                    Turn: the task of one reply
                                   ChatKitServerImpl: checks a request, then answers it
                                   with_...: the stages that a turn's events pass through
                                   ToolMemory: what tools were asked and answered
                                   Converter: what the model is told of each item
                                   warm_up: what the first chat would have to wait for
         Routes                    the FastAPI app
         Start                     serve: uvicorn, with one process or several

To change the instructions: INSTRUCTIONS. The agent and its tools: ChatKitServerImpl.__init__.
Who is asking: request_context. What the model is told: ChatKitServerImpl.history and Converter.
What later turns are told of tools: ToolMemory and ChatKitServerImpl.forgotten_tools.
The database: `store = `. The texts of faults: FAULTS. The page: PAGE.

Some functions work around faults of the libraries. The README lists each of them, with the test
that fails without it.
"""
# ruff: noqa: E402 (LiteLLM and openai-agents read environment variables when they are imported)

from __future__ import annotations

import asyncio
import difflib
import gc
import json
import logging
import os
import re
import secrets
import signal
import socket
import sys
import threading
import time
import traceback
import warnings
from bisect import bisect_left
from collections.abc import AsyncGenerator, AsyncIterator, Awaitable, Callable, Sequence
from contextlib import aclosing, asynccontextmanager, suppress
from contextvars import ContextVar
from dataclasses import replace
from datetime import datetime
from pathlib import Path
from types import ModuleType
from typing import Annotated, Any, ClassVar, Generic, NamedTuple, NoReturn, TypeVar
from weakref import ref

from dotenv import dotenv_values, load_dotenv

# ---- Process-wide effects ------------------------------------------------------------------------

# Importing this file changes these things for the whole process, and nothing else.

ROOT_DIR = Path(__file__).resolve().parent.parent
# The template's place, or beside this file, for a copy of it.
ENV_FILES = [ROOT_DIR / ".env", Path(__file__).resolve().parent / ".env"]
ENV_FILE = next((file for file in ENV_FILES if file.is_file()), None)
# With None, load_dotenv would search the folders above.
ENV_PATH = ENV_FILE or ENV_FILES[0]
# load_dotenv leaves a variable that exists as it is. A blank one, which docker compose makes of an
# unset one, would hide the value in the file.
for name in dotenv_values(ENV_PATH):
    if not os.getenv(name, "set").strip():
        del os.environ[name]
load_dotenv(ENV_PATH)


def set_default(name: str, value: str) -> None:
    """Set an environment variable that is unset or blank."""
    if not os.getenv(name, "").strip():
        os.environ[name] = value


# LiteLLM would download its price map when it is imported, and a list of headers for Claude on
# Bedrock later. Newer releases have one setting for all that they download.
set_default("LITELLM_LOCAL_MODEL_COST_MAP", "True")
set_default("LITELLM_LOCAL_ANTHROPIC_BETA_HEADERS", "True")
set_default("LITELLM_OFFLINE_MODE", "True")
# openai-agents would upload traces of every chat to OpenAI.
set_default("OPENAI_AGENTS_DISABLE_TRACING", "true")
# LiteLLM would let a process have 500 connections to a provider, and 1,000 in all: the 501st chat
# would wait until another one has ended.
set_default("AIOHTTP_CONNECTOR_LIMIT_PER_HOST", "10000")
set_default("AIOHTTP_CONNECTOR_LIMIT", "10000")


def clean_keys() -> None:
    """LiteLLM would send a blank key, which docker compose leaves, to the provider.

    A key that comes from a file may end with a line break, which no header may hold.
    """
    for name, value in list(os.environ.items()):
        if name.endswith("_API_KEY"):
            os.environ[name] = value.strip()
            if not value.strip():
                del os.environ[name]


clean_keys()

import httpx
import litellm
from litellm.litellm_core_utils import core_helpers
from litellm.llms.custom_httpx.http_handler import AsyncHTTPHandler
from litellm.llms.vertex_ai.gemini.vertex_and_google_ai_studio_gemini import (
    ModelResponseIterator as GeminiChunks,
)

# LiteLLM would print "Give Feedback / Get Help" when a call fails.
litellm.suppress_debug_info = True
# LiteLLM ends a stream after 100 equal chunks. A long table rule has more of them.
litellm.REPEATED_STREAMING_CHUNK_LIMIT = 2**63  # type: ignore[attr-defined]  # untyped
# If a provider reports no tokens, LiteLLM would count them: for a Llama model with a tokenizer that
# it downloads, on the event loop. And the log would show its guess.
litellm.disable_token_counter = True
# This finalizer sets context variables. Before Python 3.12 it may run inside ContextVar.set, and
# crash the process.
litellm.CustomStreamWrapper.__del__ = lambda stream: None
# LiteLLM prepares a request in a thread. If the turn is stopped meanwhile, Python warns that nobody
# awaits the result.
warnings.filterwarnings(
    "ignore", r"coroutine '\S*(async_streaming|acompletion\w*)' was never awaited", RuntimeWarning
)
# LiteLLM says "stop", a normal end, for these of the providers' words for a failure (LiteLLM issue
# 16651). This is the only word of its own for one.
FAILED_END = "malformed_function_call"
finish_reasons: dict[str, Any] = core_helpers._FINISH_REASON_MAP
for reason in (
    FAILED_END,
    "FINISH_REASON_UNSPECIFIED",
    "MALFORMED_FUNCTION_CALL",
    "MALFORMED_RESPONSE",
    "MISSING_THOUGHT_SIGNATURE",
    "TOO_MANY_TOOL_CALLS",
    "UNEXPECTED_TOOL_CALL",
    "ERROR",
    "error",
    "network_error",
):
    finish_reasons[reason] = FAILED_END
# LiteLLM 1.106 does not know this one, and says "stop", too.
finish_reasons["model_context_window_exceeded"] = "length"


def parse_gemini_chunk(self: GeminiChunks, chunk: Any) -> Any:
    """Parse a chunk of Gemini's reply, and tell whether it is the last.

    LiteLLM says "stop" for every chunk that gives no reason for an end (LiteLLM issue 2195), so a
    reply that is cut off would seem to be complete.
    """
    parsed = original_parse(self, chunk)
    if parsed is not None:
        for choice, candidate in zip(parsed.choices, chunk.get("candidates", []), strict=False):
            if not candidate.get("finishReason"):
                choice.finish_reason = None
        parsed.hidden_params["is_finished"] = any(choice.finish_reason for choice in parsed.choices)
    return parsed


original_parse: Any = GeminiChunks.chunk_parser
GeminiChunks.chunk_parser = parse_gemini_chunk  # type: ignore[method-assign]


def show_refusal(self: litellm.CustomStreamWrapper, chunk: Any) -> Any:
    """Make OpenAI's refusal the text of the reply: LiteLLM 1.106 drops it."""
    for choice in chunk.choices or []:
        if refusal := getattr(choice.delta, "refusal", None):
            choice.delta.content = refusal
            choice.delta.refusal = None
    return original_handle(self, chunk)


original_handle: Any = litellm.CustomStreamWrapper.handle_openai_chat_completion_chunk
litellm.CustomStreamWrapper.handle_openai_chat_completion_chunk = show_refusal


class LineResponse(httpx.Response):
    """A response that LiteLLM reads by lines: server-sent events, or JSON."""

    async def aiter_lines(self) -> AsyncIterator[str]:
        """Yield the lines as they were sent.

        httpx also splits lines at U+2028, U+2029 and U+0085, which JSON may contain as they are
        (LiteLLM issue 30471). And LiteLLM takes any line that contains "[DONE]" for the end of the
        reply (LiteLLM issue 31562), so that is escaped in JSON. LiteLLM 1.110 has neither fault.
        """
        rest = ""
        async for text in self.aiter_text():
            *lines, rest = re.split("\r\n|\n|\r", rest + text)
            for line in lines:
                yield line if line.endswith("[DONE]") else line.replace("[DONE]", r"[\u0044ONE]")
        if rest:
            yield rest


async def post_and_read_lines(self: AsyncHTTPHandler, *args: Any, **kwargs: Any) -> httpx.Response:
    response: httpx.Response = await original_post(self, *args, **kwargs)
    response.__class__ = LineResponse
    return response


original_post: Any = AsyncHTTPHandler.post
AsyncHTTPHandler.post = post_and_read_lines  # type: ignore[method-assign]

# ---- End of the process-wide effects -------------------------------------------------------------

import anyio
from agents import (
    Agent,
    FunctionTool,
    InputGuardrailTripwireTriggered,
    ItemHelpers,
    MaxTurnsExceeded,
    ModelBehaviorError,
    ModelProvider,
    ModelRefusalError,
    ModelResponse,
    ModelSettings,
    OutputGuardrailTripwireTriggered,
    RunConfig,
    RunContextWrapper,
    RunHooks,
    Runner,
    RunResultStreaming,
    Tool,
    ToolInputGuardrailTripwireTriggered,
    ToolOutputGuardrailTripwireTriggered,
    TResponseInputItem,
)
from agents.extensions.models.litellm_model import LitellmModel
from agents.items import TResponseStreamEvent
from agents.models import get_default_model_settings
from agents.tool_context import ToolContext
from chatkit.agents import (
    AgentContext,
    ClientToolCall,
    ThreadItemConverter,
    stream_agent_response,
)
from chatkit.errors import CustomStreamError, ErrorCode
from chatkit.server import ChatKitServer, NonStreamingResult, StreamingResult
from chatkit.store import AttachmentStore, NotFoundError, Store, StoreItemType, default_generate_id
from chatkit.types import (
    AssistantMessageContentPartAdded,
    AssistantMessageContentPartAnnotationAdded,
    AssistantMessageContentPartDone,
    AssistantMessageContentPartTextDelta,
    AssistantMessageItem,
    Attachment,
    ChatKitReq,
    ClientToolCallItem,
    ErrorEvent,
    HiddenContextItem,
    InferenceOptions,
    Page,
    ProgressUpdateEvent,
    StreamingReq,
    StreamOptionsEvent,
    ThreadItem,
    ThreadItemDoneEvent,
    ThreadItemRemovedEvent,
    ThreadItemUpdate,
    ThreadMetadata,
    ThreadStreamEvent,
    UserMessageInput,
    UserMessageItem,
    UserMessageTagContent,
    is_streaming_req,
)
from fastapi import Depends, FastAPI, HTTPException, Request
from fastapi.middleware.cors import CORSMiddleware
from fastapi.responses import HTMLResponse, JSONResponse, Response, StreamingResponse
from fastapi.security import HTTPAuthorizationCredentials, HTTPBearer
from litellm.constants import DEFAULT_ANTHROPIC_CHAT_MAX_TOKENS
from litellm.exceptions import (
    AuthenticationError,
    ContentPolicyViolationError,
    ContextWindowExceededError,
)
from litellm.types.utils import LlmProviders
from openai import AsyncStream
from openai._streaming import ServerSentEvent
from openai.types.chat import ChatCompletionChunk
from openai.types.responses import (
    ResponseFunctionToolCallParam,
    ResponseInputMessageContentListParam,
    ResponseInputTextParam,
    ResponseReasoningSummaryTextDoneEvent,
)
from openai.types.responses.response_input_item_param import FunctionCallOutput, Message
from pydantic import Field, PositiveFloat, PositiveInt, TypeAdapter, ValidationError
from starlette.requests import ClientDisconnect
from starlette.types import Receive, Scope, Send

# ---- Settings ------------------------------------------------------------------------------------

INSTRUCTIONS = "You are a helpful assistant."
MOCK_REPLY = "This is a canned reply from PROVIDER=mock. Set PROVIDER and its key for a model."
HISTORY_ITEMS = 100  # the model sees this many of a thread's newest items
TOOL_OUTPUT_LENGTH = 4_000  # characters of a tool's output that later turns are told
TITLE_LENGTH = 60  # a thread is named after so many characters of its first message
# What one request may ask for. Each is checked before it costs anything.
MAX_BODY_BYTES = 1024 * 1024
MAX_VALUES = 5_000  # JSON values in a request, each list and object among them
MAX_PARTS = 200  # of a message's content, its tags among them
MAX_TAGS = 50
MAX_IDS = 100  # a message's attachments, or the items of a feedback
MAX_TITLE = 1_000  # characters of a thread's title
MAX_PAGE = 100  # rows of a page, whatever the client asks for
PAGE_BYTES = 4 * 1024 * 1024  # a page of long rows ends here; so does what the model sees of them
BODY_SECONDS = 60  # a request's body must arrive within this time
READ_SECONDS = 60  # a client that reads nothing of a stream for so long is cut off
SILENCE_SECONDS = 15  # a stream that is silent for so long sends a heartbeat
SHUTDOWN_SECONDS = 5  # running chats may go on for this long after SIGTERM, or after a stop
DISCONNECT_SECONDS = 0.05  # the news that a client has left may come later than its next message


def setting(name: str, default: str, kind: Any = str) -> Any:
    """Return the environment variable as `kind`; a blank one counts as unset.

    An invalid one stops the start with one line.
    """
    text = os.getenv(name, "").strip() or default
    try:
        return TypeAdapter(kind).validate_python(text)
    except ValidationError as error:
        raise SystemExit(f"{name}={text!r}: {error.errors()[0]['msg']}.") from None


def parse_tokens(text: str) -> dict[str, str]:
    """Return {token: user} for the text "user:token,user:token". Stops the start if it is not."""
    tokens: dict[str, str] = {}
    for entry in text.split(",") if text else []:
        user, _, token = (part.strip() for part in entry.partition(":"))
        if not user or not token or ":" in token or token in tokens:
            raise SystemExit(
                "CHATKIT_TOKENS is not of the form user:token,user:token, each token once."
            )
        if not token.isascii() or not token.isprintable():
            raise SystemExit("CHATKIT_TOKENS has a token that no header can hold: it is not ASCII.")
        tokens[token] = user
    return tokens


ORIGIN = re.compile(r"([a-z][a-z0-9+.-]*)://([a-z0-9_.-]+|\[[0-9a-f:.]+\])(:[0-9]+)?")
STANDARD_PORTS = {"http": ":80", "https": ":443"}


def parse_origins(text: str) -> list[str]:
    """Return the comma-separated origins as browsers send them. Stops the start if one is none."""
    origins = []
    for entry in text.lower().split(","):
        origin = entry.strip()
        if origin == "*":
            origins.append(origin)
        elif match := ORIGIN.fullmatch(origin.removesuffix("/")):
            scheme, host, port = match.groups()
            port = "" if port in (None, STANDARD_PORTS.get(scheme)) else port
            origins.append(f"{scheme}://{host}{port}")
        elif origin:
            raise SystemExit(
                f"ALLOWED_ORIGINS: {origin!r} is neither * nor an origin like https://host:port."
            )
    return origins


PROVIDER: str = setting("PROVIDER", "gemini").lower()
MODEL: str = setting("MODEL", "auto")
MODELS = [name.strip() for name in setting("MODELS", "").split(",") if name.strip()]
MODEL_TIMEOUT: float = setting("MODEL_TIMEOUT", "120", PositiveFloat)  # seconds without a chunk
HOST: str = setting("HOST", "0.0.0.0")
PORT: int = setting("PORT", "8000", Annotated[int, Field(gt=0, lt=65_536)])
WORKERS: int = setting("WORKERS", "1", PositiveInt)  # processes; more than one need a database
ALLOWED_ORIGINS = parse_origins(setting("ALLOWED_ORIGINS", "*"))
TOKENS = parse_tokens(setting("CHATKIT_TOKENS", ""))
logger = logging.getLogger("uvicorn.error")  # the logger that uvicorn shows

# ---- Store ---------------------------------------------------------------------------------------

Context = dict[str, Any]  # {} or {"user_id": ...}; see request_context
Stored = TypeVar("Stored", ThreadMetadata, ThreadItem, Attachment)


THREAD = TypeAdapter(ThreadMetadata)
ITEM: TypeAdapter[ThreadItem] = TypeAdapter(ThreadItem)
ATTACHMENT: TypeAdapter[Attachment] = TypeAdapter(Attachment)


class Row:
    """A stored object. With __slots__ it takes no more memory than a tuple."""

    __slots__ = ("id", "json")

    def __init__(self, id: str, json: bytes) -> None:
        self.id = id
        self.json = json


class Table(Generic[Stored]):
    """Rows in the order in which they were added, as JSON: callers share no object with the store.

    Each has a number, which never changes. Rows are sorted by it, so a binary search finds one: a
    page takes as long with 100,000 rows as with 100. Raises NotFoundError for an unknown id.
    """

    def __init__(self, kind: str, adapter: TypeAdapter[Any]) -> None:
        self.kind = kind
        self.adapter = adapter
        self.rows: list[Row] = []
        self.numbers: dict[str, int] = {}  # by id

    def __contains__(self, id: str) -> bool:
        return id in self.numbers

    def place(self, id: str) -> int:
        """Return the index of the row in `rows`."""
        if id not in self.numbers:
            raise NotFoundError(f"{self.kind} {id} not found")
        return bisect_left(self.rows, self.numbers[id], key=lambda row: self.numbers[row.id])

    def load(self, id: str) -> Stored:
        value: Stored = self.adapter.validate_json(self.rows[self.place(id)].json)
        return value

    def save(self, value: Stored) -> None:
        """Add the object, or replace the one with its id in place."""
        json = self.adapter.dump_json(value)
        if value.id in self:
            self.rows[self.place(value.id)].json = json
        else:
            number = self.numbers[self.rows[-1].id] + 1 if self.rows else 0
            self.rows.append(Row(value.id, json))
            self.numbers[value.id] = number

    def delete(self, id: str) -> None:
        """Delete the row. An unknown id is ignored."""
        if id in self:
            del self.rows[self.place(id)]
            del self.numbers[id]

    async def page(self, after: str | None, limit: int, order: str) -> Page[Stored]:
        """Return the rows after that id, at most `limit`. A page of long rows has fewer."""
        if order == "asc":
            start = self.place(after) + 1 if after else 0
            rows = self.rows[start : start + limit]
            has_more = start + limit < len(self.rows)
        else:
            end = self.place(after) if after else len(self.rows)
            rows = self.rows[max(end - limit, 0) : end][::-1]
            has_more = end > limit
        data: list[Stored] = []
        size = 0
        since = time.monotonic()
        for row in rows:
            size += len(row.json)
            if data and size > PAGE_BYTES:
                has_more = True
                break
            data.append(self.adapter.validate_json(row.json))
            if time.monotonic() - since > 0.01:  # let others run
                await asyncio.sleep(0)
                since = time.monotonic()
        await asyncio.sleep(0)  # chatkit may read a whole thread page by page
        return Page(data=data, has_more=has_more, after=data[-1].id if has_more else None)


class MemoryStore(Store[Context]):
    """chatkit's Store in memory: replace this class to use a database.

    tests/test_store.py is its contract. Users see their own threads and attachments only. Raises
    NotFoundError for what is missing; but a missing thread has an empty page of items, and
    deleting twice is allowed, as in chatkit.
    """

    def __init__(self) -> None:
        self._threads: dict[str, Table[ThreadItem]] = {}  # thread id -> its items
        self._threads_by_user: dict[str | None, Table[ThreadMetadata]] = {}
        self._attachments_by_user: dict[str | None, Table[Attachment]] = {}

    def _threads_of(self, context: Context) -> Table[ThreadMetadata]:
        user = context.get("user_id")
        if user not in self._threads_by_user:
            self._threads_by_user[user] = Table("Thread", THREAD)
        return self._threads_by_user[user]

    def _attachments_of(self, context: Context) -> Table[Attachment]:
        user = context.get("user_id")
        if user not in self._attachments_by_user:
            self._attachments_by_user[user] = Table("Attachment", ATTACHMENT)
        return self._attachments_by_user[user]

    def _items_of(self, thread_id: str, context: Context) -> Table[ThreadItem]:
        """Return the thread's items. Raises NotFoundError if it is missing or another user's."""
        self._threads_of(context).place(thread_id)
        return self._threads[thread_id]

    def generate_thread_id(self, context: Context) -> str:
        return long_id("thread")

    def generate_item_id(
        self, item_type: StoreItemType, thread: ThreadMetadata, context: Context
    ) -> str:
        return long_id(item_type)

    async def load_thread(self, thread_id: str, context: Context) -> ThreadMetadata:
        return self._threads_of(context).load(thread_id)

    async def save_thread(self, thread: ThreadMetadata, context: Context) -> None:
        if thread.id in self._threads:
            self._items_of(thread.id, context)  # raises NotFoundError if it is another user's
        else:
            self._threads[thread.id] = Table("Item", ITEM)
        self._threads_of(context).save(thread)

    async def load_threads(
        self, limit: int, after: str | None, order: str, context: Context
    ) -> Page[ThreadMetadata]:
        return await self._threads_of(context).page(after, limit, order)

    async def delete_thread(self, thread_id: str, context: Context) -> None:
        if thread_id in self._threads_of(context):
            self._threads_of(context).delete(thread_id)
            del self._threads[thread_id]

    async def load_thread_items(
        self, thread_id: str, after: str | None, limit: int, order: str, context: Context
    ) -> Page[ThreadItem]:
        if thread_id not in self._threads_of(context):
            return Page()
        return await self._threads[thread_id].page(after, limit, order)

    async def add_thread_item(self, thread_id: str, item: ThreadItem, context: Context) -> None:
        self._items_of(thread_id, context).save(item)

    async def save_item(self, thread_id: str, item: ThreadItem, context: Context) -> None:
        self._items_of(thread_id, context).save(item)

    async def load_item(self, thread_id: str, item_id: str, context: Context) -> ThreadItem:
        return self._items_of(thread_id, context).load(item_id)

    async def delete_thread_item(self, thread_id: str, item_id: str, context: Context) -> None:
        with suppress(NotFoundError):
            self._items_of(thread_id, context).delete(item_id)

    async def save_attachment(self, attachment: Attachment, context: Context) -> None:
        self._attachments_of(context).save(attachment)

    async def load_attachment(self, attachment_id: str, context: Context) -> Attachment:
        return self._attachments_of(context).load(attachment_id)

    async def delete_attachment(self, attachment_id: str, context: Context) -> None:
        self._attachments_of(context).delete(attachment_id)


def use_long_ids(store: Store[Context]) -> None:
    """Have a Store that leaves its ids to chatkit make those of `long_id`."""
    if type(store).generate_thread_id is Store.generate_thread_id:
        store.generate_thread_id = (  # type: ignore[method-assign]  # of this object alone
            lambda context: long_id("thread")
        )
    if type(store).generate_item_id is Store.generate_item_id:
        store.generate_item_id = (  # type: ignore[method-assign]  # of this object alone
            lambda item_type, thread, context: long_id(item_type)
        )


def long_id(item_type: StoreItemType) -> str:
    """Return an id with chatkit's prefix (`thr_`, `msg_`, ...) and 128 random bits.

    chatkit's own ids have 32 bits: after about 77,000 threads two are likely to have the same.
    """
    prefix = default_generate_id(item_type).split("_")[0]
    return f"{prefix}_{secrets.token_hex(16)}"


# ---- Model ---------------------------------------------------------------------------------------

# What MODEL=auto selects. The template's gemini-2.0-flash and claude-3-sonnet-20240229 have been
# shut down.
DEFAULT_MODELS = {
    "gemini": "gemini-flash-latest",
    "openai": "gpt-4o",
    "anthropic": "claude-sonnet-4-6",
    "mock": "gpt-4o",
}


def litellm_name(provider: str, model: str) -> str:
    """Return LiteLLM's name for the model, "provider/model". Stops the start if there is none."""
    known = list(DEFAULT_MODELS)
    if model != "auto":
        known += litellm.provider_list
    if provider not in known:
        raise SystemExit(
            f"PROVIDER={provider!r} is none of {', '.join(DEFAULT_MODELS)}."
            f" Any other needs MODEL, too.{did_you_mean(provider)}"
        )
    if model == "auto":
        model = DEFAULT_MODELS[provider]
    prefix = "openai" if provider == "mock" else provider
    bare = model.removeprefix(prefix + "/")
    # Some ids begin like a prefix and are meant as they are: vLLM's "openai/gpt-oss-20b", and
    # OpenRouter's own models, as "openrouter/auto".
    own_server = os.getenv("OPENAI_BASE_URL") or os.getenv("OPENAI_API_BASE")
    if (prefix == "openai" and own_server) or (prefix == "openrouter" and "/" not in bare):
        bare = model
    return f"{prefix}/{bare}"


def did_you_mean(provider: str) -> str:
    """Return a question that names the providers whose name, or default model, is close."""
    known = [known.value for known in LlmProviders]
    if provider in known:
        return ""
    names = difflib.get_close_matches(provider, known)
    for name, model in DEFAULT_MODELS.items():
        if model.startswith(provider) and name != "mock":
            names.insert(0, name)
    return f" Did you mean {' or '.join(names)}?" if names else ""


class EmptyReply(Exception):
    """A turn ended without a text, a tool call or anything else that the user can see."""


class LengthLimit(Exception):
    """The model's length limit ended the reply."""


class Fault(NamedTuple):
    """A kind of fault: what the person in the chat reads of it, and how it is recognised."""

    message: str  # may name the {key} and the {model}
    allow_retry: bool
    statuses: Sequence[int] = ()  # HTTP statuses of the provider
    errors: Sequence[type[Exception]] = ()
    words: Sequence[str] = ()  # what some providers say of it, whatever the status


GUARDRAILS: list[type[Exception]] = [
    InputGuardrailTripwireTriggered,
    OutputGuardrailTripwireTriggered,
]
# A mistake in this server, or in what is installed, and not the provider's.
SERVER_BUGS: list[type[Exception]] = [ImportError, TypeError, AttributeError, NameError]
# Unlike for those above, chatkit takes back no message for these.
TOOL_GUARDRAILS: list[type[Exception]] = [
    ToolInputGuardrailTripwireTriggered,
    ToolOutputGuardrailTripwireTriggered,
]
# What openai-agents raises around the model's calls, so that ProviderModel cannot catch it. The own
# errors of a tool are none of these: chatkit logs them.
TURN_ERRORS: tuple[type[Exception], ...] = (
    EmptyReply,
    MaxTurnsExceeded,
    ModelBehaviorError,
    ModelRefusalError,
    *GUARDRAILS,
    *TOOL_GUARDRAILS,
)
FILTERED = Fault(
    "The AI provider's content filter stopped this.",
    allow_retry=False,
    errors=[ContentPolicyViolationError, ModelRefusalError],
)
TIMED_OUT = Fault(
    "The AI provider timed out: it sent nothing for too long. Try again.",
    allow_retry=True,
    statuses=[408],
    errors=[TimeoutError],
)
TOO_LONG_A_REPLY = Fault(
    "The reply reached the model's length limit, and ends here. Ask for the rest.",
    allow_retry=False,
    errors=[LengthLimit],
)
CUT_OFF = Fault(
    "The reply was cut off: the AI provider dropped the connection. Try again.",
    allow_retry=True,
    errors=[ConnectionResetError],
)
SERVER_BUG = Fault(
    "This server cannot use the AI provider. The server's log has the reason.",
    allow_retry=False,
    errors=SERVER_BUGS,
)
FAULTS = [  # the first that fits is the one
    Fault(
        "The quota or credit at the AI provider is used up. Check the plan and billing of {key}.",
        allow_retry=False,
        statuses=[402],
        words=["insufficient_quota", "credit balance is too low"],
    ),
    Fault(
        "The AI provider refused the key. Check {key}.",
        allow_retry=False,
        statuses=[401, 403],
        errors=[AuthenticationError],
        words=["API_KEY_INVALID"],
    ),
    Fault(
        "The AI provider does not know the model {model}. Check MODEL.",
        allow_retry=False,
        statuses=[404],
    ),
    Fault(
        "The AI provider's rate limit is reached. Wait a moment and try again.",
        allow_retry=True,
        statuses=[429],
    ),
    Fault(
        "This conversation is too long. Start a new thread.",
        allow_retry=False,
        statuses=[413],
        errors=[ContextWindowExceededError],
    ),
    FILTERED,
    Fault(
        "This server's rules do not allow this. Rephrase your message.",
        allow_retry=False,
        errors=[*GUARDRAILS, *TOOL_GUARDRAILS],
    ),
    Fault(
        "The model used tools again and again without an answer. Rephrase your message.",
        allow_retry=False,
        errors=[MaxTurnsExceeded],
    ),
    TIMED_OUT,
    TOO_LONG_A_REPLY,
    CUT_OFF,
    Fault(
        "The AI provider's answer was not understood. Try again.",
        allow_retry=True,
        errors=[ModelBehaviorError, StopAsyncIteration],
    ),
    Fault("The AI provider's reply was empty. Try again.", allow_retry=True, errors=[EmptyReply]),
    SERVER_BUG,
    Fault(
        "The AI provider is unavailable. Try again later.",
        allow_retry=True,
        statuses=range(500, 600),
        errors=[OSError],
    ),
    Fault(
        "The AI provider refused this request. The server's log has the reason.",
        allow_retry=False,
        statuses=range(400, 500),
    ),
]
# After a part of the reply, whatever else the provider reports has cut it off.
FAULTS_AFTER_TEXT = [FILTERED, TIMED_OUT, TOO_LONG_A_REPLY, SERVER_BUG]


def causes_of(error: BaseException) -> list[BaseException]:
    """Return the error and its causes, the innermost last."""
    causes: list[BaseException] = []
    cause: BaseException | None = error
    while cause and cause not in causes:
        causes.append(cause)
        cause = cause.__cause__ or (None if cause.__suppress_context__ else cause.__context__)
    return causes


def find_fault(error: BaseException, after_text: bool = False) -> Fault | None:
    """Return the first of FAULTS that fits the error or one of its causes."""
    causes = causes_of(error)
    status = find_status(causes)
    text = " ".join(f"{cause} {getattr(cause, 'body', '')}" for cause in causes)

    for fault in FAULTS_AFTER_TEXT if after_text else FAULTS:
        if status in fault.statuses or any(word in text for word in fault.words):
            return fault
        if any(isinstance(cause, tuple(fault.errors)) for cause in causes):
            return fault
    return CUT_OFF if after_text else None


def find_status(causes: list[BaseException]) -> int | None:
    """Return the HTTP status of the provider, if the error comes from an answer of it.

    The innermost cause knows. LiteLLM wraps it in an error whose status it may have read from the
    digits in a text: "Cannot connect to 127.0.0.1:40301" counts as 403 (LiteLLM issue 34954).
    """
    for cause in reversed(causes):
        if isinstance(cause, (OSError, *SERVER_BUGS)):
            return None
        response = getattr(cause, "response", None)
        status = getattr(cause, "status_code", None) or getattr(response, "status_code", None)
        if isinstance(status, int):
            return status
    return None


class ProviderFault(CustomStreamError):
    """A fault with a message for the person in the chat."""

    # Otherwise openai-agents raises an error before it has passed on the deltas that preceded it.
    _agents_drain_queued_stream_events = True


class ProviderModel(LitellmModel):
    """LitellmModel with a time limit, readable faults, and settings of its own.

    `model` is LiteLLM's name, "provider/model". With `canned_reply` that text is the answer to
    everything, and no provider is asked.
    """

    def __init__(
        self,
        model: str,
        base_url: str | None = None,
        api_key: str | None = None,
        canned_reply: str | None = None,
    ) -> None:
        super().__init__(model=model, base_url=base_url, api_key=api_key)
        self.canned_reply = canned_reply
        self.provider = "mock" if canned_reply else model.partition("/")[0]
        self.unset = [] if api_key or canned_reply else unset_variables(model)
        # LiteLLM may list several names for one key, ours last.
        self.missing_key = (
            self.unset[-1] if self.unset and self.provider in DEFAULT_MODELS else None
        )
        self.key_name = f"{self.provider.upper()}_API_KEY"
        # LiteLLM may read another variable, or more than one, and prefers Google's to Gemini's:
        # then name none.
        prefers_google = self.provider == "gemini" and "GOOGLE_API_KEY" in os.environ
        if self.key_name not in [*os.environ, *self.unset] or prefers_google:
            self.key_name = f"this server's credentials for {self.provider}"
        # Log lines count the tokens. LiteLLM refuses `stream_options`, which asks for them, for
        # two providers.
        self.settings = ModelSettings(
            include_usage=self.provider not in ("bytez", "oci"),
            extra_args={"mock_response": canned_reply} if canned_reply else {"max_retries": 0},
        )

    async def _fetch_response(
        self,
        system_instructions: str | None,
        input: str | list[TResponseInputItem],
        model_settings: ModelSettings,
        *args: Any,
        stream: bool = False,
        **kwargs: Any,
    ) -> Any:
        if turn := Turn.current.get(None):
            turn.model = self
            if turn.explain_mark:
                told = [system_instructions, MARK_EXPLAINED]
                system_instructions = "\n\n".join(filter(None, told))
        if self.missing_key:
            raise self.log_fault(
                f"This server has no {self.missing_key}. Set it, or try PROVIDER=mock.", False
            )
        # An agent that was made without a model has the reasoning effort and the verbosity of
        # OpenAI's default model, which other models refuse. Equal settings of your own are dropped
        # with them.
        default = get_default_model_settings()
        same_effort = model_settings.reasoning == default.reasoning
        if same_effort and model_settings.verbosity == default.verbosity:
            model_settings = replace(model_settings, reasoning=None, verbosity=None)
        model_settings = self.settings.resolve(model_settings)
        fetch: Any = super()._fetch_response  # its overloads allow no *args
        try:
            with anyio.fail_after(MODEL_TIMEOUT):
                fetched = await fetch(
                    system_instructions, input, model_settings, *args, stream=stream, **kwargs
                )
        except Exception as error:
            self.raise_fault(error)
        if not stream:
            return fetched
        response, chunks = fetched
        return response, ProviderStream(self, chunks)

    async def stream_response(
        self, *args: Any, **kwargs: Any
    ) -> AsyncIterator[TResponseStreamEvent]:
        """Stream the reply, with one more event at the end of each thought.

        OpenAI's own models send `reasoning_summary_text.done`; openai-agents' conversion of chat
        completions does not. chatkit begins the next thought after it: without it, the thoughts
        before and after a tool are run together, and those within one reply are lost.
        """
        async for event in super().stream_response(*args, **kwargs):
            if event.type == "response.reasoning_summary_part.done":
                yield ResponseReasoningSummaryTextDoneEvent(
                    type="response.reasoning_summary_text.done",
                    item_id=event.item_id,
                    output_index=event.output_index,
                    summary_index=event.summary_index,
                    text=event.part.text,
                    sequence_number=event.sequence_number,
                )
            yield event

    def start_warnings(self) -> list[str]:
        """Return what the operator should know of this model when the server starts."""
        if self.missing_key:
            return [
                f"{self.missing_key} is not set: every chat with {self.model} gets an error."
                " PROVIDER=mock needs no key."
            ]
        warnings = []
        if self.unset:
            warnings.append(
                f"{' and '.join(self.unset)} is not set, which LiteLLM asks for with {self.model}."
                " Unless another variable serves, every chat fails."
            )
        if self.provider == "anthropic" and self.model.partition("/")[2] not in litellm.model_cost:
            warnings.append(
                f"LiteLLM does not know {self.model}: its replies end after"
                f" {DEFAULT_ANTHROPIC_CHAT_MAX_TOKENS} tokens. To change that, set"
                " DEFAULT_ANTHROPIC_CHAT_MAX_TOKENS."
            )
        return warnings

    def raise_fault(self, error: Exception, after_text: bool = False) -> NoReturn:
        """Raise the ProviderFault that FAULTS has for the error, or else the error itself."""
        fault = None if isinstance(error, ProviderFault) else find_fault(error, after_text)
        if fault is None:
            raise error
        message = fault.message.format(key=self.key_name, model=self.model)
        raise self.log_fault(message, fault.allow_retry, error) from error

    def log_fault(
        self, message: str, allow_retry: bool, error: Exception | None = None
    ) -> ProviderFault:
        """Return a ProviderFault with this message, after a line in the log with its cause."""
        if error:
            logger.error("%s (%s)", message, cause_of(error, self.api_key))
        else:
            logger.error("%s", message)
        if turn := Turn.current.get(None):
            turn.logged_message = message
        return ProviderFault(message, allow_retry=allow_retry)


def unset_variables(model: str) -> list[str]:
    """Return the variables that LiteLLM asks for and that are not set.

    Others may do as well: LiteLLM names one variable where a provider accepts several.
    """
    names: list[str] = litellm.validate_environment(model)["missing_keys"]
    return [name for name in names if not os.getenv(name)]


def cause_of(error: Exception, key: str | None) -> str:
    """Return the error for the log: its class, status and code, and 300 characters of its message.

    Some providers repeat what was said in the chat: that is left out.
    """
    names = [
        type(error).__name__,
        getattr(error, "status_code", None),
        getattr(error, "code", None),
    ]
    turn = Turn.current.get(None)
    chat = texts_of(turn.run.to_input_list()) if turn and turn.run else ""
    text = without_chat(on_one_line(error, key)[:300], printable(chat))
    return f"{' '.join(str(name) for name in names if name)}: {text}"


def texts_of(value: Any) -> str:
    """Return all texts in the model's input. The data of images, megabytes each, are none."""
    if isinstance(value, dict):
        value = list(value.values())
    if isinstance(value, list):
        return " ".join(map(texts_of, value))
    text = str(value)
    is_data = text.startswith("data:") and ";base64," in text[:100]
    return "" if is_data else text


def without_chat(text: str, chat: str) -> str:
    """Return the text with [...] for each 12 characters or more that it repeats of the chat."""
    kept, at = "", 0
    while at < len(text):
        inside_word = at and text[at - 1].isalnum() and text[at].isascii()
        too_short = len(text) - at < 12
        place = -1 if inside_word or too_short else chat.find(text[at : at + 12])
        if place < 0:
            kept += text[at]
            at += 1
            continue
        same = 12
        while at + same < len(text) and text[at + same] == chat[place + same : place + same + 1]:
            same += 1
        kept += "[...]"
        at += same
    return kept


def on_one_line(error: BaseException, key: str | None = None) -> str:
    """Return what the error says, with asterisks in place of every key: some providers repeat it.

    LiteLLM ends some errors with a traceback, and some hold the provider's JSON as it came.
    """
    text = str(error).partition("Traceback (most recent call last)")[0]
    text = re.sub(r"\\+u([0-9a-fA-F]{4})", lambda escape: chr(int(escape[1], 16)), text)
    text = printable(text)
    keys = [key or "", *TOKENS]
    keys += [value for name, value in os.environ.items() if name.endswith(SECRET_SUFFIXES)]
    for secret in sorted(keys, key=len, reverse=True):  # one may be a part of another
        if len(secret) >= 8:  # what is shorter is no secret, but may be a part of many words
            text = text.replace(printable(secret), "***")
    return text


# How the names of variables end that hold keys.
SECRET_SUFFIXES = ("_KEY", "_APIKEY", "_TOKEN", "_SECRET", "_PASSWORD")
# Control characters, and those that change the direction of a text or break its lines.
UNPRINTABLE = re.compile(
    r"[\x00-\x1f\x7f-\x9f\u200b-\u200f\u2028-\u202e\u2060-\u206f\ud800-\udfff]"
)


def printable(text: str) -> str:
    """Return the text on one line, without what could do something to a terminal."""
    return UNPRINTABLE.sub("?", " ".join(text.split()))


class ProviderStream(AsyncIterator[litellm.ModelResponseStream]):
    """The chunks of a reply.

    Raises ProviderFault if a chunk takes too long, or if the stream ends too early.
    """

    def __init__(self, model: ProviderModel, stream: litellm.CustomStreamWrapper) -> None:
        self.model = model
        self.stream = stream
        self.answered = False  # a text or a tool call came
        self.halves: dict[str, str] = {}  # of characters whose other half is in the next chunk
        self.places: dict[int, int] = {}  # index of a tool call in the chunks -> our own
        self.call_ids: list[str] = []
        if isinstance(source := stream.completion_stream, AsyncStream):
            events = ServerSentEvents(source._decoder, stream)
            source._decoder = events  # type: ignore[assignment]

    async def __anext__(self) -> litellm.ModelResponseStream:
        try:
            with anyio.fail_after(MODEL_TIMEOUT):
                chunk: litellm.ModelResponseStream = await anext(self.stream)
            # LiteLLM returns buffered chunks without yielding to the event loop: a fast reply would
            # block all other chats. Not before the first chunk: LiteLLM 1.106 cannot close
            # Anthropic's connection before something was read from it.
            await asyncio.sleep(0)
        except StopAsyncIteration:
            self.check_end()
            raise
        except asyncio.CancelledError:
            # Close it at once: otherwise the exception keeps the connection's frames in a cycle.
            await asyncio.shield(self.aclose())
            raise
        except Exception as error:
            self.model.raise_fault(error, self.answered)
        if not litellm.success_callback and not litellm.callbacks:
            # LiteLLM keeps every chunk, 5 to 8 KB each, for these. It needs no more than the first,
            # which may hold the tokens of the input, and the last two.
            del self.stream.chunks[1:-2]
        for choice in chunk.choices:
            self.mend(choice.delta)
        return chunk

    def mend(self, delta: Any) -> None:
        """Correct what some providers send, before openai-agents and chatkit see it."""
        if refusal := getattr(delta, "refusal", None):  # chatkit would not show it
            delta.content = refusal
            delta.refusal = None
        for name in ("content", "reasoning_content"):
            text = getattr(delta, name, None)
            if text and (self.halves.get(name) or not text.isascii()):
                setattr(delta, name, self.whole_characters(name, text))
        for call in delta.tool_calls or []:
            if call.id and call.id not in self.call_ids:
                self.places[call.index] = len(self.call_ids)
                self.call_ids.append(call.id)
            call.index = self.places.get(call.index, call.index)
        if delta.content or delta.tool_calls:
            self.answered = True

    def whole_characters(self, name: str, text: str) -> str:
        """Return the text without a half of a character at its end: the next text begins with it.

        Some providers escape an emoji as two surrogates, and split it between two chunks. They
        cannot be encoded, and the turn would end with an error.
        """
        text = self.halves.get(name, "") + text
        self.halves[name] = text[-1] if "\ud800" <= text[-1] <= "\udbff" else ""
        text = text.removesuffix(self.halves[name])
        return text.encode("utf-16", "surrogatepass").decode("utf-16", "replace")

    def check_end(self) -> None:
        """Raise unless the provider gave a reason for the end of the reply, and a good one.

        LiteLLM takes the end of any response for the end of the reply. Its canned replies have no
        reason for their end.
        """
        if self.model.canned_reply:
            return
        stream = self.stream
        reason = stream.received_finish_reason or stream.intermittent_finish_reason
        if reason:
            reason = core_helpers.map_finish_reason(reason)
        error: Exception
        if reason == "content_filter":
            error = ContentPolicyViolationError(reason, self.model.model, self.model.provider)
        elif reason == "length" and self.answered:
            error = LengthLimit(reason)
        elif reason and reason != FAILED_END:
            return
        elif self.answered:
            error = ConnectionResetError("the stream ended before the reply did")
        else:
            error = ModelBehaviorError("the stream held no reply")
        self.model.raise_fault(error)

    async def aclose(self) -> None:
        """Close the provider's connection; openai-agents calls this.

        LiteLLM 1.106 leaves Anthropic's open, so find it.
        """
        lines = getattr(self.stream.completion_stream, "streaming_response", None)
        await self.stream.aclose()
        if lines is not None and hasattr(lines, "aclose"):
            await lines.aclose()


class ServerSentEvents:
    """A decoder of OpenAI's client that also tells LiteLLM of "[DONE]".

    The client keeps that to itself. vLLM and some gateways send no other mark of the end.
    """

    def __init__(self, decoder: Any, stream: litellm.CustomStreamWrapper) -> None:
        self.decoder = decoder
        self.stream = ref(stream)  # which holds this decoder

    async def aiter_bytes(self, chunks: AsyncIterator[bytes]) -> AsyncIterator[ServerSentEvent]:
        async for event in self.decoder.aiter_bytes(chunks):
            stream = self.stream()
            if event.data.startswith("[DONE]") and stream and not stream.received_finish_reason:
                stream.received_finish_reason = "stop"
            yield event


class ProviderModels(ModelProvider):
    """What openai-agents asks for the model of each agent that has no Model object of its own.

    So second agents (hand-offs, one for titles) go through LiteLLM like the first. An agent without
    a model gets the default model; a name is "provider/model", or a model of PROVIDER.
    """

    def __init__(self, default: ProviderModel) -> None:
        self.default = default
        self.by_name: dict[str, ProviderModel] = {}

    def get_model(self, model_name: str | None) -> ProviderModel:
        if model_name is None:
            return self.default
        if model_name not in self.by_name:
            provider, slash, _ = model_name.partition("/")
            if slash and provider in litellm.provider_list:
                self.by_name[model_name] = make_model(model_name)
            else:
                self.by_name[model_name] = make_model(litellm_name(PROVIDER, model_name))
        return self.by_name[model_name]


def make_model(name: str) -> ProviderModel:
    """Return the model with LiteLLM's name, "provider/model"; with PROVIDER=mock a canned one."""
    return ProviderModel(name, canned_reply=MOCK_REPLY if PROVIDER == "mock" else None)


model = make_model(litellm_name(PROVIDER, MODEL))
model_provider = ProviderModels(model)
# What a client may choose for a message, by the name that it sends.
OFFERED_MODELS = {name: model_provider.get_model(name) for name in MODELS}
OFFERED_MODELS |= {MODEL: model, model.model: model}

# ---- Server --------------------------------------------------------------------------------------

REQUEST: TypeAdapter[ChatKitReq] = TypeAdapter(ChatKitReq)
Events = AsyncIterator[ThreadStreamEvent]


def as_sse(event: ThreadStreamEvent) -> bytes:
    """Return the event as chatkit sends it."""
    return b"data: " + event.model_dump_json(by_alias=True, exclude_none=True).encode() + b"\n\n"


HEARTBEAT = as_sse(ProgressUpdateEvent(text="Still working…"))
STREAM_ERROR = as_sse(ErrorEvent(code=ErrorCode.STREAM_ERROR, allow_retry=True))
SERVER_STOPPED = as_sse(
    ErrorEvent(
        code="custom",
        message="The server was stopped before the reply was complete. Try again in a moment.",
        allow_retry=True,
    )
)


class Turn:
    """One streaming request. Three tasks take part in it:

        the response        Turn.read, which yields what is in the queue
        the turn's task     produce: it reads chatkit's events, which come from respond and its
                            stages, and puts them into the queue. In it chatkit stores the items.
        openai-agents' task the run: it calls the model and the tools

    A client that leaves cancels the first one only. Turn.stop then ends the run, whose events end
    without an exception, and what was streamed is stored as at the end of any turn.
    """

    current: ClassVar[ContextVar[Turn]] = ContextVar("current")  # of the task that runs

    def __init__(self, server: ChatKitServerImpl, thread_id: str | None) -> None:
        self.server = server  # this turn is among its `turns` while its task runs
        self.thread_id = thread_id  # None until chatkit has made the thread
        # Unbounded on purpose: a reply fits in memory, and a client that reads slowly must not hold
        # the provider's connection. None is the end.
        self.queue: asyncio.Queue[bytes | None] = asyncio.Queue()
        self.task: asyncio.Task[None] | None = None
        self.heartbeat: asyncio.TimerHandle | None = None
        self.run: RunResultStreaming | None = None
        self.agent_context: AgentContext[Context] | None = None
        self.memory: ToolMemory | None = None
        self.model = model  # the one that ran last
        self.outcome = "done"  # for the log: done, stopped or fault
        self.logged_message: str | None = None  # of the fault that the model has logged
        self.explain_mark = False  # whether the model is told anything by the application
        self.stopped = False
        self.client_left = False
        self.started = self.last_event = time.monotonic()
        self.first_delta: float | None = None

    # ---- What the response does with it

    async def read(self, events: AsyncIterator[bytes]) -> AsyncGenerator[bytes, None]:
        """Start the turn and yield chatkit's events. Closing the generator stops the turn."""
        self.server.turns.add(self)
        self.task = asyncio.create_task(self.produce(events))
        try:
            while (event := await self.queue.get()) is not None:
                yield event
        finally:
            if not self.task.done():
                self.client_left = True
                self.stop()

    def stop(self, last_event: bytes | None = None) -> None:
        """End the turn soon, with this event for a client that still reads.

        Only a turn that does not end by itself, because a tool or a database hangs, is cancelled.
        Of an unfinished item only a message's text is kept then, by chatkit 1.4 to 1.5.
        """
        if self.stopped or self.task is None:
            return
        self.stopped = True
        self.outcome = "stopped"
        if self.run:
            self.run.cancel()
        if last_event:
            self.queue.put_nowait(last_event)
        timer = asyncio.get_running_loop().call_later(SHUTDOWN_SECONDS, self.task.cancel)
        self.task.add_done_callback(lambda _: timer.cancel())

    # ---- What the turn's task does

    async def produce(self, events: AsyncIterator[bytes]) -> None:
        """Put the turn's events into the queue, and then its end."""
        Turn.current.set(self)
        self.send_heartbeats()
        try:
            async for event in events:
                self.put(event)
        except Exception:  # chatkit has logged it. It sends an event for a turn's errors only.
            self.put(STREAM_ERROR)
        finally:
            if self.heartbeat:
                self.heartbeat.cancel()
            await self.end_run()
            self.server.turns.discard(self)
            self.write_log_line()
            self.queue.put_nowait(None)

    def put(self, event: bytes) -> None:
        """Queue an event for the client. A turn that was stopped sends nothing more.

        Events are recognised by how chatkit's JSON begins: parsing each would cost too much.
        """
        self.last_event = time.monotonic()
        if self.first_delta is None and event.startswith(b'data: {"type":"thread.item.updated"'):
            self.first_delta = self.last_event - self.started
        if event.startswith(b'data: {"type":"error"'):
            self.outcome = "fault"
            self.log_error(event)
        if self.thread_id is None and event.startswith(b'data: {"type":"thread.created"'):
            self.thread_id = json.loads(event.removeprefix(b"data: "))["thread"]["id"]
        if not self.stopped:
            self.queue.put_nowait(event)

    def log_error(self, error_event: bytes) -> None:
        """Log what the client reads of a CustomStreamError that the application has raised.

        The model has logged its own faults, a Store may do the same (`logged_message`), and chatkit
        logs the errors that have no message.
        """
        message = json.loads(error_event.removeprefix(b"data: ")).get("message")
        logged = (self.logged_message, getattr(self.server.store, "logged_message", None))
        if message and message not in logged:
            logger.error("%s", message)

    def send_heartbeats(self) -> None:
        """Queue a heartbeat if no event came for SILENCE_SECONDS, and look again in time."""
        silence = time.monotonic() - self.last_event
        if silence >= SILENCE_SECONDS:
            self.put(HEARTBEAT)
            silence = 0
        loop = asyncio.get_running_loop()
        self.heartbeat = loop.call_later(SILENCE_SECONDS - silence, self.send_heartbeats)

    def attach(
        self, run: RunResultStreaming, agent_context: AgentContext[Context], memory: ToolMemory
    ) -> None:
        """Keep the run, which a stop cancels. The stop may have come before the run."""
        self.run = run
        self.agent_context = agent_context
        self.memory = memory
        if self.stopped:
            run.cancel()

    async def end_run(self) -> None:
        """End what chatkit may have abandoned: after a fault of the Store, it is the run itself."""
        if self.run:
            self.run.cancel()
        if self.agent_context:
            # One more event, which nobody reads, ends the queue getter that chatkit's
            # _merge_generators leaves behind ("Task was destroyed but it is pending!").
            await self.agent_context.stream(ProgressUpdateEvent(text=""))

    def write_log_line(self) -> None:
        """Log one line. Tokens are the sum of the model's completed responses, "-" if unknown."""
        usage = self.run.context_wrapper.usage if self.run else None
        logger.info(
            "turn pid=%s thread=%s provider=%s model=%s end=%s first_delta=%s total=%s"
            " input_tokens=%s output_tokens=%s",
            os.getpid(),
            self.thread_id or "-",
            self.model.provider,
            self.model.model,
            self.outcome,
            "-" if self.first_delta is None else f"{self.first_delta:.3f}s",
            f"{time.monotonic() - self.started:.3f}s",
            (usage and usage.input_tokens) or "-",
            (usage and usage.output_tokens) or "-",
        )


class ChatKitServerImpl(ChatKitServer[Context]):
    """chatkit's server: `respond` answers, `process` refuses what could not be answered."""

    def __init__(
        self, store: Store[Context], attachment_store: AttachmentStore[Context] | None = None
    ) -> None:
        super().__init__(store, attachment_store)
        use_long_ids(store)
        self.agent: Agent[AgentContext[Context]] = Agent(
            "Assistant", instructions=INSTRUCTIONS, model=model
        )
        self.run_config = RunConfig(model_provider=model_provider)
        self.converter = Converter()
        self.hooks: type[ToolMemory] = ToolMemory
        self.forgotten_tools: set[str] = set()  # names of tools whose calls must not be kept
        self.turns: set[Turn] = set()  # the turns that run in this process
        self.warming_up: asyncio.Task[None] | None = None

    # ---- A turn

    async def respond(
        self, thread: ThreadMetadata, input: UserMessageItem | None, context: Context
    ) -> Events:
        """Stream the agent's reply to the thread, in which chatkit has stored `input`.

        Raises CustomStreamError, whose message chatkit sends to the client.
        """
        turn = Turn.current.get(None) or Turn(self, thread.id)
        if self.warming_up:
            await asyncio.wait([self.warming_up])  # it uses LiteLLM's connections, too
        if thread.title is None and input:
            thread.title = message_text(input)[:TITLE_LENGTH] or None
            yield self.event_that_saves(thread, context)

        agent = await self.agent_for(thread, input, context)
        run_config = await self.run_config_for(thread, input, context)
        if input and (tool := input.inference_options.tool_choice):
            agent, run_config = force_tool(tool.id, agent, run_config)
        agent_context = AgentContext(thread=thread, store=self.store, request_context=context)
        memory = self.hooks(self.forgotten_tools)
        result = Runner.run_streamed(
            agent,
            await self.history(thread, context),
            context=agent_context,
            hooks=memory,
            run_config=run_config,
        )
        turn.attach(result, agent_context, memory)

        # Each stage is a function further down, with one idea. What leaves the last one goes to
        # chatkit: it stores each item that is done, and then sends the event.
        events = stream_agent_response(agent_context, result)
        events = with_unique_ids(events, turn)
        events = with_reply(events, turn)
        events = with_unfinished_items(events, turn)
        events = with_tool_memory(events, turn)
        try:
            async for event in events:
                yield event
        except TURN_ERRORS as error:
            turn.model.raise_fault(error)
        self.remember_agent(thread, result.last_agent)

        if turn.client_left:
            with suppress(NotFoundError):  # the thread may have been deleted meanwhile
                await self.handle_stream_cancelled(thread, [], context)  # stores a note of the stop

    async def agent_for(
        self, thread: ThreadMetadata, input: UserMessageItem | None, context: Context
    ) -> Agent[AgentContext[Context]]:
        """Return the agent that answers: the one that the thread was handed off to, or the first.

        Override it to choose by user or by thread. It finds the agents that are listed as Agent
        objects in `handoffs`.
        """
        name = thread.metadata.get("agent")
        known = [self.agent]
        for agent in known:  # grows on the way
            if agent.name == name:
                return agent
            agents = [other for other in agent.handoffs if isinstance(other, Agent)]
            known += [other for other in agents if other not in known]
        return self.agent

    def remember_agent(self, thread: ThreadMetadata, agent: Agent[Any]) -> None:
        """Let the agent that a hand-off chose answer the thread's next message, too.

        chatkit saves the thread if it changed.
        """
        if agent.name != thread.metadata.get("agent", self.agent.name):
            thread.metadata = {**thread.metadata, "agent": agent.name}

    async def run_config_for(
        self, thread: ThreadMetadata, input: UserMessageItem | None, context: Context
    ) -> RunConfig:
        """Return the run's settings, with the model that the user chose.

        A turn that goes on after a client tool has the model of the message before it.
        """
        config = self.run_config
        if input is None and MODELS:
            items = await self.newest_items(thread.id, context)
            input = next((item for item in items if item.type == "user_message"), None)
        if input and (name := input.inference_options.model):
            config = replace(config, model=OFFERED_MODELS.get(name, model))
        return config

    def event_that_saves(self, thread: ThreadMetadata, context: Context) -> ThreadStreamEvent:
        """Return a harmless event: chatkit saves a changed thread after each event that it gets.

        The next one comes from the model. Until then the thread may be deleted, and would come back
        with its new title.
        """
        return StreamOptionsEvent(stream_options=self.get_stream_options(thread, context))

    async def history(self, thread: ThreadMetadata, context: Context) -> list[TResponseInputItem]:
        """Return the model's input: the thread's newest items, oldest first.

        It starts with a user message: some providers refuse a conversation that starts with the
        assistant's.
        """
        items = (await self.newest_items(thread.id, context))[::-1]
        while items and items[0].type != "user_message":
            items = items[1:]
        told = await self.converter.to_agent_input(items)
        if turn := Turn.current.get(None):
            turn.explain_mark = any(f"<{MARK}>" in str(message.get("content")) for message in told)
        return told

    async def newest_items(self, thread_id: str, context: Context) -> list[ThreadItem]:
        """Return as many items as the model sees, newest first.

        If they are all of one long turn, the user message that began it follows them.
        """
        items: list[ThreadItem] = []
        after = None
        while True:
            page = await self.store.load_thread_items(
                thread_id, after, HISTORY_ITEMS, "desc", context
            )
            questions = [item for item in page.data if item.type == "user_message"]
            items += page.data if after is None else questions[:1]
            if questions or not page.has_more:
                return items
            after = page.after

    def _update_pending_items(self, *_: Any) -> None:
        """Keep no copies of the items that are streamed.

        chatkit keeps them to store them if its task is cancelled, which happens only to a turn that
        hangs. But chatkit 1.4 to 1.5 appends each step of a workflow to the very object that is
        streamed, so that steps and thoughts are doubled (chatkit-python pull request 76). And it
        copies a message for each delta.
        """

    async def add_feedback(
        self, thread_id: str, item_ids: list[str], feedback: str, context: Context
    ) -> None:
        """Log the user's feedback, "positive" or "negative". Override it to keep it elsewhere."""
        logger.info("feedback thread=%s items=%s kind=%s", thread_id, ",".join(item_ids), feedback)

    # ---- Requests

    async def process(
        self, request: str | bytes | bytearray, context: Context
    ) -> StreamingResult | NonStreamingResult:
        """Answer a request.

        Raises HTTPException (400 or 409) or NotFoundError before anything is stored.
        """
        parsed = parse_request(request)
        await self.check(parsed, context)
        thread_id: str | None = getattr(parsed.params, "thread_id", None)
        if thread_id and parsed.type in ("threads.delete", "threads.retry_after_item"):
            await self.stop_turns(thread_id)

        if parsed.type == "threads.update" and thread_id:
            # A running turn may save its thread, and would bring the old title back.
            for turn in self.turns_of(thread_id):
                if turn.agent_context:
                    turn.agent_context.thread.title = parsed.params.title

        # Not super().process(): it builds the TypeAdapter again for every request, for 20 ms.
        if not is_streaming_req(parsed):
            return NonStreamingResult(await self._process_non_streaming(parsed, context))
        if thread_id:
            await self.wait_for_stopped_turns(thread_id)
            if parsed.type == "threads.add_client_tool_output":
                await self.put_tool_call_last(thread_id, context)
        turn = Turn(self, thread_id)
        # chatkit's method calls _process_streaming_impl, and that calls respond. None of it runs
        # before the response reads.
        return StreamingResult(turn.read(self._process_streaming(parsed, context)))

    async def _process_streaming_impl(
        self, request: StreamingReq, context: Context
    ) -> AsyncGenerator[ThreadStreamEvent, None]:
        """Pass on chatkit's events. If the thread is deleted or the Store fails, say so and end.

        Another process may do that at any moment. chatkit would log a traceback, and send an error
        without a message.
        """
        thread_id: str | None = getattr(request.params, "thread_id", None)
        try:
            async with aclosing(super()._process_streaming_impl(request, context)) as events:
                async for event in events:
                    if event.type == "thread.created":
                        thread_id = event.thread.id
                    if event.type == "error" and event.code != "custom" and thread_id:
                        # Raises NotFoundError if it is gone. Before the yield, because chatkit logs
                        # a traceback after it.
                        await self.store.load_thread(thread_id, context)
                    yield event
        except NotFoundError as error:
            message = "This thread, or a part of it, was deleted meanwhile. Reload the page."
            logger.warning("%s (%s)", message, error)
            if turn := Turn.current.get(None):
                turn.logged_message = message
            yield ErrorEvent(message=message)
        except CustomStreamError as error:  # of a Store; chatkit tells it only during `respond`
            yield ErrorEvent(code="custom", message=error.message, allow_retry=error.allow_retry)

    async def put_tool_call_last(self, thread_id: str, context: Context) -> None:
        """Move the client tool call that is answered to the end of the thread.

        chatkit looks at the newest item alone, but a note or the reply of another turn may have
        followed the call (chatkit-python pull request 123).
        """
        items = await self.newest_items(thread_id, context)
        call = pending_tool_call(items)
        if call and call is not items[0]:
            thread = await self.store.load_thread(thread_id, context)
            id = self.store.generate_item_id("tool_call", thread, context)
            moved = call.model_copy(update={"id": id})
            await self.store.add_thread_item(thread_id, moved, context)
            await self.store.delete_thread_item(thread_id, call.id, context)

    async def stop_turns(self, thread_id: str) -> None:
        """Stop the thread's turns in this process, and wait until they have ended.

        Repeat it, because a turn may begin while we wait: it would save a deleted thread again.
        """
        stopped: set[Turn] = set()
        while turns := set(self.turns_of(thread_id)) - stopped:
            for turn in turns:
                turn.stop()
            await wait_until_ended(list(turns))
            stopped |= turns

    def turns_of(self, thread_id: str) -> list[Turn]:
        return [turn for turn in self.turns if turn.thread_id == thread_id]

    async def wait_for_stopped_turns(self, thread_id: str) -> None:
        """Wait until the thread's turns that were stopped are stored, so that the order is kept.

        Whoever stops a reply and sends the next message at once does both at the same moment: the
        server may hear of the message first.
        """
        turns = self.turns_of(thread_id)
        await wait_until_ended(turns, seconds=DISCONNECT_SECONDS)
        await wait_until_ended([turn for turn in turns if turn.stopped])

    async def stop_all_turns(self) -> None:
        """Stop every turn because the server ends, and wait until what was streamed is stored."""
        turns = list(self.turns)
        for turn in turns:
            turn.stop(SERVER_STOPPED)
        await wait_until_ended(turns)

    async def check(self, request: ChatKitReq, context: Context) -> None:
        """Refuse what chatkit would answer with a 500, a broken stream or an empty one.

        It also limits what a request may cost. Raises HTTPException (400 or 409) or NotFoundError.
        Some requests are of newer releases of chatkit.
        """
        params: Any = request.params  # checked by chatkit's types
        kind: str = request.type
        match kind:
            case "threads.create":
                await self.check_message(params.input, None, context)
            case "threads.add_user_message":
                thread = await self.store.load_thread(params.thread_id, context)
                check_open(thread)
                await self.check_message(params.input, thread, context)
            case "threads.add_client_tool_output":
                await self.check_pending_tool_call(params.thread_id, context)
            case "threads.retry_after_item":
                message: Any = await self.check_item(params, "user_message", context)
                thread = await self.store.load_thread(params.thread_id, context)
                check_open(thread)
                await self.check_options(message.inference_options, thread, context)
            case "threads.custom_action":
                self.check_method("action", kind)
                await self.check_item(params, "widget", context)
            case "threads.sync_custom_action":
                self.check_method("sync_action", kind)
                await self.check_item(params, "widget", context)
            case "threads.add_structured_input":
                await self.check_structured_input(params, context)
            case "threads.list":
                check_limit(params)
            case "items.list":
                check_limit(params)
                await self.store.load_thread(params.thread_id, context)
            case "threads.update":
                check_count(len(params.title), MAX_TITLE, "characters in a title")
                await self.store.load_thread(params.thread_id, context)
            case "threads.get_by_id" | "threads.delete":
                await self.store.load_thread(params.thread_id, context)
            case "items.feedback":
                params.item_ids = list(dict.fromkeys(params.item_ids))
                check_count(len(params.item_ids), MAX_IDS, "items in a feedback")
                await self.store.load_thread(params.thread_id, context)
                for item_id in params.item_ids:
                    await self.store.load_item(params.thread_id, item_id, context)
                    await asyncio.sleep(0)  # a long item takes milliseconds: let others run
            case "attachments.create":
                self.check_attachment_store("create_attachment", kind)
            case "attachments.delete":
                self.check_attachment_store("delete_attachment", kind)
                await self.store.load_attachment(params.attachment_id, context)
            case "input.transcribe":
                self.check_method("transcribe", kind)

    async def check_message(
        self, message: UserMessageInput, thread: ThreadMetadata | None, context: Context
    ) -> None:
        tags = [part for part in message.content if part.type == "input_tag"]
        check_count(len(message.content), MAX_PARTS, "parts in a message")
        check_count(len(tags), MAX_TAGS, "tags in a message")
        check_count(len(message.attachments), MAX_IDS, "attachments in a message")
        quoted_text = (message.quoted_text or "").strip()
        if not message_text(message) and not quoted_text and not message.attachments:
            raise HTTPException(400, "The message is empty.")
        for attachment_id in message.attachments:
            await self.store.load_attachment(attachment_id, context)
        await self.check_options(message.inference_options, thread, context)

    async def check_options(
        self, options: InferenceOptions, thread: ThreadMetadata | None, context: Context
    ) -> None:
        """Refuse a model or a tool that is not offered. `thread` is None until it is made."""
        if options.model and options.model not in OFFERED_MODELS:
            raise HTTPException(400, f"The model {options.model:.100} is not offered.")
        if options.tool_choice:
            new_thread = ThreadMetadata(id="", created_at=datetime.now())
            agent = await self.agent_for(thread or new_thread, None, context)
            known = options.tool_choice.id in [tool.name for tool in agent.tools]
            if not known and not agent.mcp_servers:  # which are asked for theirs in the run
                raise HTTPException(400, f"The tool {options.tool_choice.id:.100} is not offered.")

    async def check_item(self, params: Any, item_type: str, context: Context) -> ThreadItem | None:
        """Refuse an item of another type. An action may be about no item."""
        await self.store.load_thread(params.thread_id, context)
        if params.item_id is None:
            return None
        item = await self.store.load_item(params.thread_id, params.item_id, context)
        if item.type != item_type:
            raise HTTPException(400, f"Item {params.item_id} is not a {item_type}.")
        return item

    async def check_structured_input(self, params: Any, context: Context) -> None:
        item: Any = await self.check_item(params, "structured_input", context)
        if item.status != "pending":
            raise HTTPException(400, f"Item {params.item_id} is not pending.")

    async def check_pending_tool_call(self, thread_id: str, context: Context) -> None:
        await self.store.load_thread(thread_id, context)
        if pending_tool_call(await self.newest_items(thread_id, context)) is None:
            raise HTTPException(400, "No client tool call is pending in this thread.")

    def check_method(self, name: str, kind: str) -> None:
        """Refuse a request whose method you have not written: chatkit's own raises an error."""
        if not is_written(self, ChatKitServer, name):
            raise HTTPException(400, f"{kind} is not supported.")

    def check_attachment_store(self, name: str, kind: str) -> None:
        if self.attachment_store is None:
            raise HTTPException(400, "Attachments are not configured.")
        if not is_written(self.attachment_store, AttachmentStore, name):
            raise HTTPException(400, f"{kind} is not supported.")


# ---- Checks of a request


def parse_request(request: str | bytes | bytearray) -> ChatKitReq:
    """Return chatkit's request. Raises HTTPException (400) with the first reason why it is none."""
    body = request.encode() if isinstance(request, str) else bytes(request)
    # pydantic makes an object of each value, and an error of each wrong one.
    check_count(count_values(body), MAX_VALUES, "JSON values in a request")
    try:
        return REQUEST.validate_json(request)
    except ValidationError as error:
        first = error.errors(include_url=False, include_input=False)[0]
        place = ".".join(str(name) for name in first["loc"])
        reason = f"{place}: {first['msg']}" if place else first["msg"]
        raise HTTPException(400, reason[:300]) from None


def is_written(owner: object, base: type, name: str) -> bool:
    """Return whether the owner has a method of this name that is not the base class's."""
    method = getattr(owner, name, None)
    original = getattr(base, name, None)
    return method is not None and getattr(method, "__func__", method) is not original


def pending_tool_call(newest_items: list[ThreadItem]) -> ClientToolCallItem | None:
    """Return the newest client tool call that waits for its answer."""
    for item in newest_items:
        if item.type == "client_tool_call" and item.status == "pending":
            return item
    return None


def check_open(thread: ThreadMetadata) -> None:
    """Refuse a message to a thread that an application has locked or closed."""
    if thread.status.type != "active":
        raise HTTPException(409, thread.status.reason or f"This thread is {thread.status.type}.")


def count_values(body: bytes) -> int:
    """Return how many values the JSON text has at most, without parsing it.

    Each value stands after a comma or an opening bracket that is not part of a string.
    """
    body = body.replace(b"\\\\", b"").replace(b'\\"', b"")  # now each quote is a string's end
    between_strings = body.split(b'"', 4 * MAX_VALUES)[::2]  # too many, if there are more of them
    structure = b"".join(between_strings)
    return 1 + sum(structure.count(mark) for mark in (b",", b"[", b"{"))


def check_count(count: int, limit: int, name: str) -> None:
    if count > limit:
        raise HTTPException(400, f"There are more than {limit} {name}.")


def check_limit(params: Any) -> None:
    if params.limit and params.limit < 1:  # None and 0 are chatkit's default
        raise HTTPException(400, "limit must be at least 1.")
    if params.limit:
        params.limit = min(params.limit, MAX_PAGE)


async def wait_until_ended(turns: list[Turn], seconds: float = 2 * SHUTDOWN_SECONDS) -> None:
    """Wait until the turns have ended, or for so many seconds."""
    tasks = [turn.task for turn in turns if turn.task]
    if tasks:
        await asyncio.wait(tasks, timeout=seconds)


def force_tool(
    name: str, agent: Agent[AgentContext[Context]], run_config: RunConfig
) -> tuple[Agent[AgentContext[Context]], RunConfig]:
    """Return the agent and the run's settings with the tool that the user chose.

    openai-agents forces it in the agent's first step only. It is not one of the run's settings:
    those hold for the next agent of a hand-off, too, which may not have the tool.
    """
    forced = ModelSettings(tool_choice=name)
    agent = agent.clone(model_settings=agent.model_settings.resolve(forced))
    if run_config.model_settings:  # whose choice would win
        settings = replace(run_config.model_settings, tool_choice=None)
        run_config = replace(run_config, model_settings=settings)
    return agent, run_config


def message_text(message: UserMessageItem | UserMessageInput) -> str:
    """Return what the user typed, on one line."""
    return " ".join(" ".join(part.text for part in message.content).split())


# ---- The stages of a turn: its events pass through these generators, in the order of `respond`


async def with_unique_ids(events: Events, turn: Turn) -> Events:
    """Give each message and client tool call an id of its own.

    Through LiteLLM all of them have openai-agents' placeholder `__fake_id__`, and each would
    overwrite the one before (chatkit-python issue 36). Items whose id comes from the store
    (workflows, widgets) keep it.
    """
    assert turn.agent_context
    new_id = turn.agent_context.generate_id
    # The model's id -> ours, newest last. The placeholder is among them from the start: a guardrail
    # that trips before any message takes it back, too.
    id_mapping: dict[str, list[str]] = {"__fake_id__": []}
    async for event in events:
        if event.type == "thread.item.added" and event.item.type == "assistant_message":
            ids = id_mapping.setdefault(event.item.id, [])
            ids.append(new_id("message"))
            event.item.id = ids[-1]
        elif event.type == "thread.item.updated" and id_mapping.get(event.item_id):
            event.item_id = id_mapping[event.item_id][-1]
        elif event.type == "thread.item.done" and event.item.type == "client_tool_call":
            event.item.id = new_id("tool_call")
        elif event.type == "thread.item.done" and id_mapping.get(event.item.id):
            event.item.id = id_mapping[event.item.id][-1]
        elif event.type == "thread.item.removed" and event.item_id in id_mapping:
            # A guardrail takes back every message of the turn.
            for id in id_mapping[event.item_id]:
                yield ThreadItemRemovedEvent(item_id=id)
            continue
        yield event


async def with_reply(events: Events, turn: Turn) -> Events:
    """Raise EmptyReply if a turn completes nothing that the user can see as an answer."""
    answered = False
    async for event in events:
        answered = answered or is_answer(event)
        yield event
    if not answered and not turn.stopped:
        raise EmptyReply


def is_answer(event: ThreadStreamEvent) -> bool:
    """Return whether the event is one: reasoning alone and hidden items are none."""
    if event.type == "thread.item.done":
        if event.item.type == "workflow":
            return event.item.workflow.type != "reasoning"
        return event.item.type not in ("hidden_context_item", "sdk_hidden_context")
    return event.type in ("thread.item.replaced", "client_effect", "notice")


async def with_unfinished_items(events: Events, turn: Turn) -> Events:
    """Complete the items that a fault or a stop leaves unfinished.

    chatkit stores an item when it is done, so what was streamed of these would be lost.
    """
    unfinished: dict[str, ThreadItem] = {}  # by id
    try:
        async for event in events:
            if turn.stopped:  # nobody sees this event, so it must not be stored
                continue
            if event.type == "thread.item.updated":
                item = unfinished.get(event.item_id)
                if item and item.type == "assistant_message":
                    extend_message(item, event.update)
            elif event.type == "thread.item.added":
                unfinished[event.item.id] = event.item
            elif event.type == "thread.item.done" or event.type == "thread.item.replaced":
                unfinished.pop(event.item.id, None)
            elif event.type == "thread.item.removed":
                unfinished.pop(event.item_id, None)
            yield event
    except Exception:
        for item in unfinished.values():
            yield ThreadItemDoneEvent(item=item)
        raise
    if turn.stopped:
        for item in unfinished.values():
            yield ThreadItemDoneEvent(item=item)


async def with_tool_memory(events: Events, turn: Turn) -> Events:
    """Store the tool calls in their places between the messages, also before a fault or a stop.

    chatkit reads the AgentContext's events beside those of the run: a call may overtake the text
    before it, and a fault or a stop drops the calls that were not read yet.
    """
    memory, context = turn.memory, turn.agent_context
    assert memory and context
    messages = 0
    too_early: list[HiddenContextItem] = []  # until the messages before them have come
    try:
        async for event in events:
            match event:
                case ThreadItemDoneEvent(item=HiddenContextItem() as item) if (
                    item.id in memory.unstored
                ):
                    too_early.append(item)
                case ThreadItemRemovedEvent() if event.item_id in memory.messages_before:
                    # A guardrail takes the turn back. The client never heard of the call.
                    await context.store.delete_thread_item(
                        context.thread.id, event.item_id, context.request_context
                    )
                case _:
                    yield event
            if event.type == "thread.item.done" and event.item.type == "assistant_message":
                messages += 1
            while too_early and memory.messages_before[too_early[0].id] <= messages:
                yield ThreadItemDoneEvent(item=memory.unstored.pop(too_early.pop(0).id))
    except Exception as error:
        if not isinstance(error, tuple(GUARDRAILS)):
            for item in memory.items_of_the_rest():
                yield ThreadItemDoneEvent(item=item)
        raise
    for item in memory.items_of_the_rest():
        yield ThreadItemDoneEvent(item=item)


def extend_message(message: AssistantMessageItem, update: ThreadItemUpdate) -> None:
    """Apply an update to a streamed message, as the client does."""
    parts = message.content
    match update:
        case AssistantMessageContentPartAdded():
            parts[update.content_index : update.content_index + 1] = [update.content]
        case AssistantMessageContentPartTextDelta():
            parts[update.content_index].text += update.delta
        case AssistantMessageContentPartAnnotationAdded():
            parts[update.content_index].annotations.append(update.annotation)
        case AssistantMessageContentPartDone():
            parts[update.content_index].text = update.content.text


# ---- Tool memory

REMEMBERED_CALL = "remembered_tool_call"  # marks our hidden items among an application's own
STOPPED_CALL = "The call was stopped before its result was known. It may have been carried out."


class ToolMemory(RunHooks[Any]):
    """Follows the run of a turn and keeps its tool calls for the turns to come.

    `with_tool_memory` stores them. To follow the run yourself, set `server.hooks` to a subclass
    whose methods call these, too.
    """

    def __init__(self, forgotten_tools: set[str]) -> None:
        self.forgotten_tools = forgotten_tools
        self.messages_done = 0  # by the model
        self.messages_before: dict[str, int] = {}  # each call, by its item's id
        self.unstored: dict[str, HiddenContextItem] = {}  # calls that are not stored yet, by id
        self.running: list[ToolContext[Any]] = []  # calls that have not ended
        self.claimed_call: ClientToolCall | None = None  # by a tool of another name

    async def on_llm_end(
        self,
        context: RunContextWrapper[AgentContext[Context]],
        agent: Agent[AgentContext[Context]],
        response: ModelResponse,
    ) -> None:
        self.messages_done += [output.type for output in response.output].count("message")

    async def on_tool_start(
        self,
        context: RunContextWrapper[AgentContext[Context]],
        agent: Agent[AgentContext[Context]],
        tool: Tool,
    ) -> None:
        if not isinstance(context, ToolContext) or not isinstance(tool, FunctionTool):
            return  # a tool of OpenAI's Responses API
        if tool.name not in self.forgotten_tools:
            self.running.append(context)

    async def on_tool_end(
        self,
        context: RunContextWrapper[AgentContext[Context]],
        agent: Agent[AgentContext[Context]],
        tool: Tool,
        result: object,
    ) -> None:
        if not isinstance(context, ToolContext) or not isinstance(tool, FunctionTool):
            return  # a tool of OpenAI's Responses API
        self.running = [other for other in self.running if other is not context]
        if tool.name in self.forgotten_tools or self.asks_client(context.context, agent, tool):
            return
        item = self.remember(context, result)
        await context.context.stream(ThreadItemDoneEvent(item=item))

    def items_of_the_rest(self) -> list[HiddenContextItem]:
        """Return what is still to be stored when the run has ended.

        Among it are the calls that a stop or a fault did not let end. A function that is not async
        goes on in its thread, and may still do what it was asked.
        """
        for context in self.running:
            self.remember(context, STOPPED_CALL)
        self.running = []
        return list(self.unstored.values())

    def remember(self, context: ToolContext[Any], result: object) -> HiddenContextItem:
        """Return the item that is to be stored for this call."""
        item = HiddenContextItem(
            id=context.context.generate_id("sdk_hidden_context"),
            thread_id=context.context.thread.id,
            created_at=datetime.now(),
            content=remembered_call(context, result),
        )
        self.messages_before[item.id] = self.messages_done
        self.unstored[item.id] = item
        return item

    def asks_client(
        self, context: AgentContext[Context], agent: Agent[Any], tool: FunctionTool
    ) -> bool:
        """Return whether chatkit stores this call itself, as one that the client answers.

        A client tool sets `client_tool_call` on the context, which parallel tools share. If that
        has a tool's name, it is the call of that tool; if not, of the first tool that ends.
        """
        call = context.client_tool_call
        if call is None or call.name == tool.name:
            return call is not None
        if call is self.claimed_call or call.name in [other.name for other in agent.tools]:
            return False
        self.claimed_call = call
        return True


def remembered_call(context: ToolContext[Any], result: object) -> dict[str, Any]:
    """Return a hidden item's content: the call and its output, as the model is told of them.

    One item holds both: providers refuse a call without its output.
    """
    call = context.tool_call
    assert call
    output = ItemHelpers.tool_call_output_item(call, result)["output"]  # as it was told in its turn
    if not isinstance(output, str):
        output = "\n".join(as_text(part) for part in output)
    told = call_and_output(
        # Not the provider's id, which may be long, or the same in each turn. Mistral demands nine
        # letters or digits.
        call_id=secrets.token_hex(5)[:9],
        name=context.tool_name,
        arguments=as_arguments(context.tool_arguments),
        output=shortened(output),
        provider_data=call.model_dump(mode="json").get("provider_data"),
    )
    return {"type": REMEMBERED_CALL, "input": told}


def as_text(part: Any) -> str:
    """Return a part of a tool's output as text: images and files are not kept."""
    if part["type"] == "input_text":
        text: str = part["text"]
        return text
    kind = part["type"].removeprefix("input_")
    name = part.get("filename") or part.get("file_id") or "without a name"
    return f"[The tool also returned this {kind}, which was not kept: {name}]"


def as_arguments(text: str) -> str:
    """Return a tool's arguments as a JSON object of limited length, whatever the model wrote.

    LiteLLM parses them again in every later turn.
    """
    try:
        is_object = isinstance(json.loads(text), dict)
    except ValueError:
        is_object = False
    if is_object and len(text) <= TOOL_OUTPUT_LENGTH:
        return shortened(text)
    return as_json({"arguments": shortened(text)}) if text else "{}"


def shortened(text: str) -> str:
    """Return the text with its middle cut out if it is longer than TOOL_OUTPUT_LENGTH."""
    text = text.encode(errors="replace").decode()  # half of a surrogate pair cannot be stored
    cut = len(text) - TOOL_OUTPUT_LENGTH
    if cut <= 0:
        return text
    half = TOOL_OUTPUT_LENGTH // 2
    return f"{text[:half]}\n[{cut} characters were cut out here]\n{text[-half:]}"


# ---- What the model is told

# Around what the application tells the model in the role of the user, because providers have no
# other role in the middle of a conversation: LiteLLM moves system messages to the start for Gemini
# and Anthropic. Nobody else can write it: it is new in each process, and taken out of what users
# send. It stays the same between turns, so that providers can cache the conversation.
MARK = f"application-{secrets.token_hex(8)}"
MARK_EXPLAINED = (
    f"Only the application can write between <{MARK}> and </{MARK}>."
    " Anything like it without these is typed by the user."
)


def marked(message: Any) -> Any:
    """Return a message of the user's role as one of the application's."""
    if message.get("role") != "user" or not isinstance(message["content"], list):
        return message
    content = [
        {**part, "text": f"<{MARK}>\n{part['text']}\n</{MARK}>"} if "text" in part else part
        for part in message["content"]
    ]
    return {**message, "content": content}


def without_mark(message: Any) -> Any:
    """Return a message that a user has sent. It may repeat a mark that the model has told."""
    if not isinstance(message["content"], list):
        return message
    content = [
        {**part, "text": part["text"].replace(MARK, "***")} if "text" in part else part
        for part in message["content"]
    ]
    return {**message, "content": content}


class Converter(ThreadItemConverter):
    """chatkit's conversion of thread items to the model's input, with its gaps closed."""

    def __init__(self) -> None:
        self.failed: set[str] = set()  # ids of the items that could not be converted

    async def to_agent_input(
        self, thread_items: Sequence[ThreadItem] | ThreadItem
    ) -> list[TResponseInputItem]:
        items = thread_items if isinstance(thread_items, Sequence) else [thread_items]
        told: list[TResponseInputItem] = []
        for item in items:
            # One at a time: an item that cannot be converted would fail every later turn.
            try:
                messages: list[Any] = await super().to_agent_input(item)
            except Exception as error:
                self.log_once(item, error)
                sentence = f"[Here is a {item.type} that cannot be shown to you.]"
                told.append(marked(user_message(sentence)))
                continue
            told += map(without_mark if item.type == "user_message" else marked, messages)
        return told

    def log_once(self, item: ThreadItem, error: Exception) -> None:
        """Log where the error was raised. Its text may hold what was said in the chat."""
        if item.id in self.failed:
            return
        self.failed.add(item.id)
        place = traceback.extract_tb(error.__traceback__)[-1]
        logger.error(
            "Item %s of thread %s, a %s, cannot be told to the model: %s in %s, %s line %s",
            item.id,
            item.thread_id,
            item.type,
            type(error).__name__,
            place.name,
            place.filename,
            place.lineno,
        )

    async def user_message_to_input(
        self, item: UserMessageItem, is_last_message: bool = True
    ) -> list[TResponseInputItem]:
        # chatkit tells a quoted text only while its message is the last item, and of two tags with
        # the same text only the first.
        text = ""
        tags: dict[tuple[str, str], UserMessageTagContent] = {}
        for part in item.content:
            if part.type == "input_tag":
                text += f"@{part.text}"
                tags[part.id, part.text] = part
            else:
                text += part.text

        told: list[TResponseInputItem] = []
        typed = user_message(text) if text.strip() else user_message()
        for attachment in item.attachments:
            typed["content"].append(await self.attachment_to_message_content(attachment))
        if typed["content"]:
            told.append(typed)
        if item.quoted_text:
            quote = f"The user is referring to this in particular:\n{item.quoted_text}"
            told.append(user_message(quote))
        if tags:
            explained = user_message("What the names after @ stand for. Write them without the @.")
            for tag in tags.values():
                explained["content"].append(await self.tag_to_message_content(tag))
            told.append(explained)
        return told

    async def assistant_message_to_input(
        self, item: AssistantMessageItem
    ) -> TResponseInputItem | None:
        # chatkit makes `output_text` parts, which openai-agents cannot convert for LiteLLM
        # ("Unknown content"): the second message of every conversation would fail.
        text = "".join(part.text for part in item.content)
        if not text:
            return None
        return {"type": "message", "role": "assistant", "content": text}

    async def tag_to_message_content(self, tag: UserMessageTagContent) -> ResponseInputTextParam:
        data = {name: value for name, value in tag.data.items() if name != "id"}
        text = f"{tag.text}: {as_json({'id': tag.id, **data})}"
        return {"type": "input_text", "text": text}

    async def hidden_context_to_input(
        self, item: HiddenContextItem
    ) -> TResponseInputItem | list[TResponseInputItem] | None:
        content = item.content
        if isinstance(content, dict) and content.get("type") == REMEMBERED_CALL:
            told: list[TResponseInputItem] = content["input"]
            return told
        if not isinstance(content, str):
            item = item.model_copy(update={"content": as_json(content)})
        return await super().hidden_context_to_input(item)

    async def client_tool_call_to_input(
        self, item: ClientToolCallItem
    ) -> list[TResponseInputItem] | None:
        if item.status == "pending":  # providers refuse a call without its output
            return None
        return call_and_output(
            item.call_id, item.name, as_json(item.arguments), as_json(item.output)
        )


def user_message(*texts: str) -> Message:
    """Return a message for the model in the role of the user."""
    parts: ResponseInputMessageContentListParam = [
        ResponseInputTextParam(type="input_text", text=text) for text in texts
    ]
    return Message(type="message", role="user", content=parts)


def call_and_output(
    call_id: str,
    name: str,
    arguments: str,
    output: str,
    provider_data: dict[str, Any] | None = None,
) -> list[TResponseInputItem]:
    """Return a tool call and its output for the model.

    `provider_data` is LiteLLM's, for example Gemini's thought signature.
    """
    call = ResponseFunctionToolCallParam(
        type="function_call", call_id=call_id, name=name, arguments=arguments
    )
    if provider_data:
        call["provider_data"] = provider_data  # type: ignore[typeddict-unknown-key]
    return [call, FunctionCallOutput(type="function_call_output", call_id=call_id, output=output)]


def as_json(value: Any) -> str:
    """Return the value as JSON for the model, to whom other scripts are not escaped."""
    return json.dumps(value, ensure_ascii=False)


# ---- Warm-up


def warm_up(models: list[ProviderModel]) -> None:
    """Do, in a thread, what the first chat of a process does: hundreds of imports.

    On the event loop they would hold up every other chat for most of a second. A canned reply
    imports what reads replies, and a request to an address where nobody listens what sends them.
    Neither reaches the chunks of OpenAI's client, which pydantic compiles with the first of them.
    """
    ChatCompletionChunk.model_rebuild()
    for model in models:
        try:
            asyncio.run(answer_unseen(ProviderModel(model.model, canned_reply="Warm.")))
            if not model.canned_reply:
                with socket.socket() as nobody:
                    nobody.bind(("127.0.0.1", 0))
                    url = f"http://127.0.0.1:{nobody.getsockname()[1]}"
                    asyncio.run(send_request(LitellmModel(model.model, url, "no key")))
        except Exception as error:  # one is expected: nobody listens
            if find_fault(error) is SERVER_BUG:
                log_that_it_cannot_be_used(model, causes_of(error)[-1])


def log_that_it_cannot_be_used(model: ProviderModel, cause: BaseException) -> None:
    hint = ""
    if isinstance(cause, ImportError) and "mcp" in str(cause):
        hint = " LiteLLM uses OpenAI's Responses API for it, and mcp 2.2 or newer for that."
    reason = on_one_line(cause)
    logger.error("%s cannot be used here: %.300s.%s", model.model, reason, hint)


async def answer_unseen(model: ProviderModel) -> None:
    """Answer a message, in a thread that nobody sees."""
    server = ChatKitServerImpl(MemoryStore())
    server.agent.model = model
    message = {"content": [{"type": "input_text", "text": "Hello."}], "attachments": []}
    params = {"input": {**message, "inference_options": {}}}
    request = REQUEST.validate_python({"type": "threads.create", "params": params})
    assert is_streaming_req(request)
    async for _ in server._process_streaming(request, {}):
        pass


async def send_request(model: LitellmModel) -> None:
    """Ask a model, and nothing else."""
    settings = ModelSettings(extra_args={"max_retries": 0})
    agent = Agent("Warm-up", model=model, model_settings=settings)
    async for _ in Runner.run_streamed(agent, "Hello.").stream_events():
        pass


# ---- Routes --------------------------------------------------------------------------------------


@asynccontextmanager
async def lifespan(app: FastAPI) -> AsyncIterator[None]:
    # Full garbage collections need not scan what the imports made: a twentieth of a stream's time.
    gc.freeze()
    logger.info("PROVIDER=%s, model %s", PROVIDER, model.model)
    logger.info("Settings from the environment and %s", ENV_FILE or "no .env file")
    logger.info("The chat is at /chatkit")
    offered = list(dict.fromkeys(OFFERED_MODELS.values()))
    for offered_model in offered:
        for warning in offered_model.start_warnings():
            logger.warning("%s", warning)
    if not TOKENS and request_context not in app.dependency_overrides:
        logger.warning(
            "CHATKIT_TOKENS is not set: anyone who can reach this port can read every thread."
        )
    stop_turns_at_signals()
    server.warming_up = asyncio.create_task(asyncio.to_thread(warm_up, offered))
    yield
    await server.stop_all_turns()
    await server.warming_up


# Then a second SIGTERM ends this process at once. A worker may get the first one twice, from
# systemd and from its parent.
serves_alone = False


def stop_turns_at_signals() -> None:
    """Let running turns go on for SHUTDOWN_SECONDS after SIGTERM, and then stop them.

    uvicorn has set its handler before the lifespan starts. It waits for the requests and cancels
    them in the end: the turns are stopped before that, so that each client gets its partial reply
    and a last event.
    """
    loop = asyncio.get_running_loop()
    came: set[int] = set()

    def stop_soon() -> None:
        loop.call_later(SHUTDOWN_SECONDS, lambda: loop.create_task(server.stop_all_turns()))

    def chained(handler: Any) -> Any:
        def handle(number: int, frame: Any) -> None:
            if number in came and serves_alone:  # whoever sends it twice does not want to wait
                signal.signal(number, signal.SIG_DFL)
                signal.raise_signal(number)
            came.add(number)
            loop.call_soon_threadsafe(stop_soon)
            handler(number, frame)

        return handle

    for number in (signal.SIGINT, signal.SIGTERM):
        handler = signal.getsignal(number)
        in_main_thread = threading.current_thread() is threading.main_thread()
        if in_main_thread and callable(handler):
            signal.signal(number, chained(handler))


CORS: dict[str, Any] = {
    "allow_origins": ALLOWED_ORIGINS,
    "allow_credentials": True,
    "allow_methods": ["*"],
    "allow_headers": ["*"],
}


async def check_origin(request: Request) -> None:
    """Refuse the pages of other origins. CORS alone hides the answer, after the request has run."""
    origin = request.headers.get("Origin")  # servers and command lines send none
    if origin is not None and origin not in ALLOWED_ORIGINS and "*" not in ALLOWED_ORIGINS:
        raise HTTPException(403, f"The origin {origin:.100} is not one of ALLOWED_ORIGINS.")


app = FastAPI(
    title="ChatKit Server",
    lifespan=lifespan,
    dependencies=[Depends(check_origin)],
    openapi_url=None if TOKENS else "/openapi.json",  # without it, there are no /docs
    redirect_slashes=False,  # the redirect goes to whatever Host the client names
)
app.add_middleware(CORSMiddleware, **CORS)

store = MemoryStore()
server = ChatKitServerImpl(store)


@app.exception_handler(NotFoundError)
async def not_found(request: Request, error: NotFoundError) -> Response:
    return JSONResponse({"detail": str(error)}, 404)


@app.exception_handler(Exception)
async def failed(request: Request, error: Exception) -> CORSMiddleware:
    """Answer when a Store fails outside of a stream; uvicorn logs the error.

    Starlette sends this answer outside of the CORS middleware, and a web page could not read it.
    """
    answer = JSONResponse({"detail": "The server failed. Its log has the cause."}, 500)
    return CORSMiddleware(answer, **CORS)


@app.exception_handler(ClientDisconnect)
async def client_disconnected(request: Request, error: ClientDisconnect) -> Response:
    return Response(status_code=400)  # nobody reads it


Bearer = Annotated[HTTPAuthorizationCredentials | None, Depends(HTTPBearer(auto_error=False))]


async def request_context(bearer: Bearer) -> Context:
    """Return the context that the Store receives: who is asking. Put your own login here.

    {"user_id": ...} for a token in CHATKIT_TOKENS; {} if that is not set. Raises HTTPException
    (401). With a login by cookie, set ALLOWED_ORIGINS to your own pages: browsers send cookies
    along with every page's requests, so with * any page could read your users' chats.
    """
    if not TOKENS:
        return {}
    given = bearer.credentials.encode() if bearer else b""
    for token, user in TOKENS.items():
        if secrets.compare_digest(token.encode(), given):
            return {"user_id": user}
    headers = {"WWW-Authenticate": "Bearer"}
    raise HTTPException(401, "A valid bearer token is needed.", headers=headers)


RequestContext = Annotated[Context, Depends(request_context)]


async def request_body(request: Request) -> bytes:
    """Return the body.

    Raises HTTPException: 413 as soon as it exceeds MAX_BODY_BYTES, and 408 after BODY_SECONDS.
    """
    body = bytearray()
    try:
        with anyio.fail_after(BODY_SECONDS):
            async for chunk in request.stream():
                body += chunk
                if len(body) > MAX_BODY_BYTES:
                    raise HTTPException(413, f"The request is longer than {MAX_BODY_BYTES} bytes.")
    except TimeoutError:
        reason = f"The request did not arrive within {BODY_SECONDS} seconds."
        raise HTTPException(408, reason, headers={"Connection": "close"}) from None
    return bytes(body)


class TimedStream(StreamingResponse):
    """A streamed response. Its client is cut off if it reads nothing for READ_SECONDS.

    uvicorn would wait for ever, with what there is to send in memory.
    """

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        # uvicorn's `receive` is a method of the object that holds the connection.
        cycle = getattr(receive, "__self__", None)
        self.connection: Any = getattr(cycle, "transport", None)
        await super().__call__(scope, receive, send)

    async def stream_response(self, send: Send) -> None:
        async def send_in_time(message: Any) -> None:
            self.watch()
            try:
                # uvicorn waits while too much is unread, and writes then: meanwhile what is unread
                # can only shrink.
                await send(message)
            finally:
                self.timer.cancel()

        await super().stream_response(send_in_time if self.connection else send)

    def watch(self) -> None:
        unread = self.connection.get_write_buffer_size()
        loop = asyncio.get_running_loop()
        self.timer = loop.call_later(READ_SECONDS, self.look_again, unread)

    def look_again(self, unread: int) -> None:
        if self.connection.get_write_buffer_size() < unread:
            self.watch()
        else:
            logger.warning("A client that read nothing for %s s was cut off.", READ_SECONDS)
            self.connection.abort()  # the rest happens as if the client had left


class EventStream(TimedStream):
    """The events of a turn, which is stopped when the client leaves.

    Starlette then cancels the response. If that happens while it sends, it forgets the iterator.
    """

    def __init__(self, result: StreamingResult) -> None:
        headers = {"Cache-Control": "no-cache", "X-Accel-Buffering": "no"}
        super().__init__(result, media_type="text/event-stream", headers=headers)
        self.events = result.json_events

    async def stream_response(self, send: Send) -> None:
        try:
            await super().stream_response(send)
        finally:
            await self.events.aclose()


@app.post("/chatkit")
async def chatkit_endpoint(request: Request, context: RequestContext) -> Response:
    result = await server.process(await request_body(request), context)
    if isinstance(result, StreamingResult):
        return EventStream(result)
    return Response(content=result.json, media_type="application/json")


@app.get("/health")
async def health() -> dict[str, str]:
    return {"status": "ok"}


T = TypeVar("T")


async def all_rows(load_page: Callable[[str | None], Awaitable[Page[T]]]) -> AsyncIterator[T]:
    """Yield the rows of every page; load_page(after) loads one page."""
    after = None
    while True:
        page = await load_page(after)
        for row in page.data:
            yield row
        if not page.has_more:
            return
        after = page.after


# Debug endpoint to inspect stored items
@app.get("/debug/threads")
async def debug_threads(context: RequestContext) -> Response:
    # A Store that fails does so here, before the answer has begun.
    await server.store.load_threads(1, None, "asc", context)
    return TimedStream(debug_json(context), media_type="application/json")


async def debug_json(context: Context) -> AsyncIterator[str]:
    """Yield the JSON in pieces: the whole of it may not fit in memory."""
    store = server.store
    before = "{"
    async for thread in all_rows(lambda after: store.load_threads(100, after, "asc", context)):
        yield f"{before}{json.dumps(thread.id)}: "
        async for piece in debug_thread(thread.id, context):
            yield piece
        before = ", "
    yield "{}" if before == "{" else "}"


async def debug_thread(thread_id: str, context: Context) -> AsyncIterator[str]:
    store = server.store
    count = 0
    yield '{"items": ['
    async for item in all_rows(
        lambda after: store.load_thread_items(thread_id, after, 100, "asc", context)
    ):
        yield (", " if count else "") + json.dumps(debug_item(item))
        count += 1
    yield f'], "count": {count}}}'


def debug_item(item: ThreadItem) -> dict[str, Any]:
    item_data: dict[str, Any] = {"id": item.id, "type": type(item).__name__}
    if item.type in ("user_message", "assistant_message") and item.content:
        item_data["content"] = [part.text for part in item.content if hasattr(part, "text")]
    return item_data


# More of ChatKit's options for the page, as a JavaScript object: composer, startScreen, theme, ...
# https://openai.github.io/chatkit-js/api/openai/chatkit/type-aliases/chatkitoptions lists them.
# A host other than localhost needs api.domainKey.
PAGE_OPTIONS = "{}"
PAGE = """<!doctype html>
<html lang="en">
<meta charset="utf-8">
<meta name="viewport" content="width=device-width">
<title>Chat</title>
<style>
  body { margin: 0; font: 1rem/1.5 sans-serif }
  p, form { margin: 2rem }
  openai-chatkit { display: block; height: 100vh }
  [hidden] { display: none }
</style>
<p id="notice">Loading ChatKit from cdn.platform.openai.com ...</p>
<form id="login" hidden>
  <input id="token" type="password" aria-label="Token" required> <button>Open the chat</button>
</form>
<openai-chatkit id="chat" hidden></openai-chatkit>
<script>
  const [notice, login, token, chat] = document.querySelectorAll("#notice, #login, #token, #chat");
  const url = location.origin + location.pathname;

  function say(text) {
    notice.textContent = text;
    notice.hidden = text === "";
    chat.hidden = text !== "";
  }

  async function fetchAsUser(target, init = {}) {
    const headers = new Headers(init.headers);
    const isOurs = new URL(target, url).origin === location.origin;
    if (isOurs && sessionStorage.token) headers.set("Authorization", sessionStorage.token);
    const response = await fetch(target, { ...init, headers });
    if (isOurs && response.status === 401) {
      login.hidden = !response.headers.get("WWW-Authenticate")?.startsWith("Bearer");
      say((await response.clone().json()).detail);
    }
    return response;
  }

  async function start() {
    const body = JSON.stringify({ type: "threads.list", params: { limit: 1 } });
    const response = await fetchAsUser(url, { method: "POST", body });
    if (!response.ok) return say((await response.json()).detail);
    await customElements.whenDefined("openai-chatkit");
    const options = PAGE_OPTIONS;
    const api = { url, domainKey: "local-dev", fetch: fetchAsUser, ...options.api };
    chat.setOptions({ ...options, api });
    login.hidden = true;
    say("");
  }

  login.onsubmit = (event) => {
    event.preventDefault();
    sessionStorage.token = `Bearer ${token.value}`;
    start();
  };
</script>
<script src="https://cdn.platform.openai.com/deployments/chatkit/chatkit.js" async
  onload="start()" onerror="say('ChatKit could not be loaded. It needs ' + this.src)"></script>
</html>
"""


@app.get("/chatkit", response_class=HTMLResponse)
async def chatkit_page() -> str:
    """Show the chat in a browser."""
    return PAGE.replace("PAGE_OPTIONS", PAGE_OPTIONS)


# ---- Start ---------------------------------------------------------------------------------------


def serve() -> None:
    """Serve on HOST and PORT, with WORKERS processes.

    The program that calls this may have an `app` of its own, or `import main` and change it.
    """
    global serves_alone
    import uvicorn

    # uvicorn raises SIGTERM again after its shutdown, and the exit code would not be 0.
    signal.signal(signal.SIGTERM, signal.default_int_handler)
    program = sys.modules["__main__"]
    served = getattr(program, "app", app)
    serves_alone = WORKERS == 1
    if not serves_alone:
        if isinstance(server.store, MemoryStore):
            raise SystemExit(
                f"WORKERS={WORKERS} needs a database: MemoryStore keeps the threads of one process."
            )
        served = name_for_workers(program)
        # With a file, multiprocessing would import it before uvicorn's code runs, and the parent
        # kills a worker that does not answer it within 5 seconds.
        program.__file__ = None
        end_workers_at_second_signal()
    uvicorn.run(
        served,
        host=HOST,
        port=PORT,
        workers=WORKERS,
        http="h11",  # it refuses headers of more than 64 KiB; httptools keeps what comes
        timeout_graceful_shutdown=SHUTDOWN_SECONDS + 5,
    )


def name_for_workers(program: ModuleType) -> str:
    """Return the name by which each worker imports the program, and the app in it."""
    places = ["app"] if hasattr(program, "app") else []
    for name, value in vars(program).items():
        if value is sys.modules[__name__]:
            places.append(f"{name}.app")
    if not places:
        raise SystemExit("With WORKERS, the program needs `import main` at its top, or an `app`.")
    return f"{Path(program.__file__ or '').stem}:{places[0]}"


def end_workers_at_second_signal() -> None:
    """uvicorn's parent process waits for its workers, and does not hear a second SIGTERM."""
    from uvicorn.supervisors import Multiprocess

    wait_for_workers = Multiprocess.join_all

    def join_all(parent: Multiprocess) -> None:
        def end_workers(number: int, frame: Any) -> None:
            for worker in parent.processes:
                worker.kill()

        for number in (signal.SIGINT, signal.SIGTERM):
            signal.signal(number, end_workers)
        wait_for_workers(parent)

    Multiprocess.join_all = join_all  # type: ignore[assignment]


if __name__ == "__main__":
    serve()
