# /// script
# requires-python = ">=3.10,<3.15"
# dependencies = [
#     "fastapi==0.115.6",
#     "uvicorn[standard]==0.32.1",
#     "openai-chatkit==1.4.0",
#     "openai-agents[litellm]==0.22.2",
#     "litellm==1.110.2",
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

Settings PROVIDER, MODEL, MODEL_TIMEOUT, GEMINI_API_KEY, OPENAI_API_KEY, ANTHROPIC_API_KEY, HOST,
         PORT, ALLOWED_ORIGINS, CHATKIT_TOKENS: in the environment or in .env; see .env.example

Limits   threads are kept in memory, by one process; the model sees the newest HISTORY_ITEMS
         items of a thread; MAX_BODY_BYTES and MAX_VALUES bound a request

Start reading at `ChatKitServerImpl.respond`: it is one turn, the answer to one message.

    request - process - Turn.__anext__ <- queue <- turn's task: chatkit - respond - stages <- run
                             | the client leaves
                             +-> stop(): the run is cancelled -> its events end -> the turn ends

What most people change is marked with `CHANGE ME`. The sections: Environment, Settings, Store,
Model, Server, Routes, Repairs, Start.
"""
# ruff: noqa: E402 (LiteLLM and openai-agents read environment variables when they are imported)

from __future__ import annotations

import os
from pathlib import Path

from dotenv import dotenv_values, load_dotenv

# ---- Environment ---------------------------------------------------------------------------------

# Importing this file changes only environment variables of the process. `repair_libraries` changes
# more, when the server starts.

FOLDER = Path(__file__).resolve().parent
ROOT_DIR = FOLDER.parent
ENV_FILE = ROOT_DIR / ".env"
if not ENV_FILE.is_file():
    ENV_FILE = FOLDER / ".env"  # beside a copy of this file
DEFAULTS = {
    # LiteLLM would download its price map, and a list of headers.
    "LITELLM_OFFLINE_MODE": "True",
    # LiteLLM would load a .env file by itself, with its blank variables.
    "LITELLM_MODE": "PRODUCTION",
    # openai-agents would upload traces of every chat to OpenAI.
    "OPENAI_AGENTS_DISABLE_TRACING": "true",
    # LiteLLM uses this address by itself, but lists the variable as missing.
    "OLLAMA_API_BASE": "http://localhost:11434",
    # LiteLLM's limit is 500 for a provider: the next chat would wait until another one has ended.
    "AIOHTTP_CONNECTOR_LIMIT_PER_HOST": "10000",
    "AIOHTTP_CONNECTOR_LIMIT": "10000",
}


def clean_variables() -> None:
    """Remove blank variables: docker compose sets them, and .env.example holds some.

    They would hide the values in .env, and LiteLLM would send a blank key. Values are stripped,
    too: a key may end with a line break, which no header may hold.
    """
    ours = {*DEFAULTS, *dotenv_values(ENV_FILE, encoding="utf-8-sig")}
    for name, value in os.environ.copy().items():
        if name in ours or name.endswith("_API_KEY"):
            os.environ[name] = value.strip()
            if not value.strip():
                del os.environ[name]


clean_variables()
load_dotenv(ENV_FILE, encoding="utf-8-sig")  # Windows may write a byte order mark
clean_variables()  # again, for the blank ones of .env
os.environ.update({**DEFAULTS, **os.environ})

import asyncio
import gc
import json
import logging
import re
import secrets
import time
import warnings
from collections.abc import AsyncIterator, Container, Iterator
from contextlib import asynccontextmanager, suppress
from contextvars import ContextVar
from dataclasses import dataclass, field, replace
from datetime import datetime
from itertools import takewhile
from typing import Annotated, Any
from zlib import crc32

import anyio
import litellm
import uvicorn
from agents import (
    Agent,
    AgentsException,
    InputGuardrailTripwireTriggered,
    ItemHelpers,
    MaxTurnsExceeded,
    ModelBehaviorError,
    ModelProvider,
    ModelRefusalError,
    ModelResponse,
    ModelRetrySettings,
    ModelSettings,
    OutputGuardrailTripwireTriggered,
    RetryPolicyContext,
    RunConfig,
    RunHooks,
    Runner,
    Tool,
    ToolInputGuardrailTripwireTriggered,
    ToolOutputGuardrailTripwireTriggered,
    ToolTimeoutError,
    Usage,
    UserError,
)
from agents.extensions.models.litellm_model import LitellmModel
from agents.models import get_default_model_settings
from chatkit.agents import AgentContext, ThreadItemConverter, stream_agent_response
from chatkit.errors import CustomStreamError, ErrorCode
from chatkit.server import ChatKitServer, NonStreamingResult, StreamingResult
from chatkit.store import AttachmentStore, NotFoundError, Store, StoreItemType, default_generate_id
from chatkit.types import (
    AssistantMessageItem,
    Attachment,
    ChatKitReq,
    ClientToolCallItem,
    ErrorEvent,
    HiddenContextItem,
    InferenceOptions,
    Page,
    ProgressUpdateEvent,
    StreamOptionsEvent,
    ThreadItem,
    ThreadItemAddedEvent,
    ThreadItemDoneEvent,
    ThreadItemRemovedEvent,
    ThreadItemReplacedEvent,
    ThreadItemUpdate,
    ThreadItemUpdatedEvent,
    ThreadMetadata,
    ThreadStreamEvent,
    UserMessageInput,
    UserMessageItem,
    UserMessageTagContent,
    WorkflowItem,
    is_streaming_req,
)
from fastapi import Depends, FastAPI, HTTPException, Request
from fastapi.middleware.cors import CORSMiddleware
from fastapi.responses import HTMLResponse, JSONResponse, Response, StreamingResponse
from fastapi.security import HTTPBearer
from litellm.constants import openai_compatible_providers
from litellm.litellm_core_utils import core_helpers
from litellm.llms.vertex_ai.gemini.vertex_and_google_ai_studio_gemini import (
    ModelResponseIterator as GeminiChunks,
)
from pydantic import Field, PositiveFloat, TypeAdapter, ValidationError
from pydantic_core import from_json
from starlette.requests import ClientDisconnect

# ---- Settings ------------------------------------------------------------------------------------

INSTRUCTIONS = "You are a helpful assistant."  # CHANGE ME: what the agent is told about itself
MOCK_REPLY = "This is a canned reply from PROVIDER=mock. Set PROVIDER and its key for a model."
HISTORY_ITEMS = 100  # the model sees about this many of a thread's newest items
TOOL_OUTPUT_LENGTH = 4_000  # characters of a call's arguments, and of its output, that are kept
TITLE_LENGTH = 60  # characters of a thread's title: the beginning of its first message
MAX_BODY_BYTES = 1024 * 1024  # of a request
MAX_VALUES = 5_000  # JSON values in a request, each list and object among them
MAX_PAGE = 100  # rows of a page, whatever the client asks for
SILENCE_SECONDS = 15  # a stream sends a heartbeat after this time without an event
STOP_SECONDS = 5  # for turns to go on after SIGTERM, and for a stopped turn to end
RETRY_SECONDS = 5  # a provider that asks for a longer wait is not asked again
LATE_STOP_SECONDS = 0.05  # a new message waits this long for a stop that was sent before it


def setting(name: str, default: str, value_type: Any = str) -> Any:
    """Return the environment variable as `value_type`; a blank one counts as unset.

    An invalid one ends the program with one line.
    """
    text = os.getenv(name, "").strip() or default
    try:
        return TypeAdapter(value_type).validate_python(text)
    except ValidationError as error:
        raise SystemExit(f"{name}={text!r}: {error.errors()[0]['msg']}.")


def parse_tokens(text: str) -> dict[str, str]:
    """Return {token: user} for "user:token,user:token". Any other text ends the program."""
    tokens = {}
    for entry in text.split(",") if text else []:
        # Printable ASCII fits into a header. The colon ends the user.
        match = re.fullmatch(r"\s*([^:]*[^:\s])\s*:\s*([!-9;-~]+)\s*", entry)
        if match is None or match[2] in tokens:
            raise SystemExit(
                "CHATKIT_TOKENS is not of the form user:token,user:token, each token once, in ASCII"
            )
        tokens[match[2]] = match[1]
    return tokens


PROVIDER = setting("PROVIDER", "gemini").lower()
MODEL = setting("MODEL", "auto")
# The longest wait for the model's response, and then for each chunk, in seconds.
MODEL_TIMEOUT = setting("MODEL_TIMEOUT", "120", PositiveFloat)
HOST = setting("HOST", "0.0.0.0")
PORT = setting("PORT", "8000", Annotated[int, Field(gt=0, lt=65_536)])
ALLOWED_ORIGINS = [
    origin.strip().rstrip("/") for origin in setting("ALLOWED_ORIGINS", "*").split(",")
]
TOKENS = parse_tokens(setting("CHATKIT_TOKENS", ""))
logger = logging.getLogger("uvicorn.error")  # the logger that uvicorn shows

# ---- Store ---------------------------------------------------------------------------------------

Context = dict[str, Any]  # {} or {"user_id": ...}; see request_context
ChatContext = AgentContext[Context]


def user_of(context: Context) -> str:
    """Return the id of the user who asks; "" if there is no login.

    Raises KeyError if a login gives no `user_id`: else all users would share their threads.
    """
    return context["user_id"] if context else ""


@dataclass
class Table:
    """Rows in the order in which they were added, as JSON: callers share no object with the store.

    A row's owner is its user, or an item's thread. Raises NotFoundError for an unknown id.
    """

    kind: str
    # rows[owner][id] = (class, JSON)
    rows: dict[str, dict[str, tuple[Any, str]]] = field(default_factory=dict)

    def load(self, owner: str, id: str) -> Any:
        try:
            row_class, text = self.rows[owner][id]
        except KeyError:
            raise NotFoundError(f"{self.kind} {id} not found")
        return row_class.model_validate_json(text)

    def save(self, owner: str, value: Any) -> None:
        """Add the object, or replace the one with its id in place."""
        self.rows.setdefault(owner, {})[value.id] = (type(value), value.model_dump_json())

    def delete(self, owner: str, id: str) -> object:
        """Return what was deleted, or None."""
        return self.rows.get(owner, {}).pop(id, None)

    async def page(self, owner: str, after: str | None, limit: int, order: str) -> Page[Any]:
        """Return at most `limit` rows after that id."""
        await asyncio.sleep(0)  # let others run: chatkit may read a whole thread page by page
        ids = list(self.rows.get(owner, {}))
        if order == "desc":
            ids.reverse()
        if after:
            self.load(owner, after)
            del ids[: ids.index(after) + 1]
        data = [self.load(owner, id) for id in ids[:limit]]
        has_more = len(ids) > limit
        return Page(data=data, has_more=has_more, after=data[-1].id if has_more else None)


class MemoryStore(Store[Context]):
    """chatkit's Store in memory: replace this class to use a database.

    tests/test_store.py is its contract. Users see their own threads and attachments only. Raises
    NotFoundError for what is missing; but a missing thread has an empty page of items, and
    deleting twice is allowed.
    """

    def __init__(self) -> None:
        self._threads = Table("Thread")
        self._items = Table("Item")
        self._attachments = Table("Attachment")

    def generate_thread_id(self, context: Context) -> str:
        return long_id("thread")

    def generate_item_id(
        self, item_type: StoreItemType, thread: ThreadMetadata, context: Context
    ) -> str:
        return long_id(item_type)

    async def load_thread(self, thread_id: str, context: Context) -> ThreadMetadata:
        return self._threads.load(user_of(context), thread_id)

    async def save_thread(self, thread: ThreadMetadata, context: Context) -> None:
        if thread.id in self._items.rows:
            await self.load_thread(thread.id, context)  # it may be another user's
        else:
            self._items.rows[thread.id] = {}
        # chatkit may pass a Thread, which has its items with it.
        self._threads.save(user_of(context), ThreadMetadata(**thread.model_dump()))

    async def load_threads(
        self, limit: int, after: str | None, order: str, context: Context
    ) -> Page[ThreadMetadata]:
        return await self._threads.page(user_of(context), after, limit, order)

    async def delete_thread(self, thread_id: str, context: Context) -> None:
        if self._threads.delete(user_of(context), thread_id):
            del self._items.rows[thread_id]

    async def load_thread_items(
        self, thread_id: str, after: str | None, limit: int, order: str, context: Context
    ) -> Page[ThreadItem]:
        try:
            await self.load_thread(thread_id, context)
        except NotFoundError:
            return Page()
        return await self._items.page(thread_id, after, limit, order)

    async def add_thread_item(self, thread_id: str, item: ThreadItem, context: Context) -> None:
        await self.load_thread(thread_id, context)
        self._items.save(thread_id, item)

    save_item = add_thread_item

    async def load_item(self, thread_id: str, item_id: str, context: Context) -> ThreadItem:
        await self.load_thread(thread_id, context)
        return self._items.load(thread_id, item_id)

    async def delete_thread_item(self, thread_id: str, item_id: str, context: Context) -> None:
        with suppress(NotFoundError):
            await self.load_thread(thread_id, context)
            self._items.delete(thread_id, item_id)

    async def save_attachment(self, attachment: Attachment, context: Context) -> None:
        self._attachments.save(user_of(context), attachment)

    async def load_attachment(self, attachment_id: str, context: Context) -> Attachment:
        return self._attachments.load(user_of(context), attachment_id)

    async def delete_attachment(self, attachment_id: str, context: Context) -> None:
        self._attachments.delete(user_of(context), attachment_id)


def long_id(item_type: StoreItemType) -> str:
    """Return an id with chatkit's prefix (`thr_`, `msg_`, ...) and 128 random bits.

    chatkit's own ids have 32 bits: after about 77,000 threads two are likely to have the same.
    """
    return default_generate_id(item_type) + secrets.token_hex(12)


# ---- Model ---------------------------------------------------------------------------------------

# What MODEL=auto selects. Change one if its provider shuts it down, like gemini-2.0-flash.
DEFAULT_MODELS = {
    "gemini": "gemini-flash-latest",
    "openai": "gpt-4o",
    "anthropic": "claude-sonnet-4-6",
    "mock": "gpt-4o",  # a name for LiteLLM: nobody is asked
}


def litellm_name(provider: str, model: str) -> str:
    """Return LiteLLM's name for the model, "provider/model". Without one, the program ends."""
    if model == "auto":
        model = DEFAULT_MODELS.get(provider, "")
    prefix = "openai" if provider == "mock" else provider
    if not model or prefix not in litellm.provider_list:
        raise SystemExit(
            f"PROVIDER={provider!r} must be one of {', '.join(DEFAULT_MODELS)}. Any other provider"
            " of LiteLLM needs MODEL, too."
        )
    # On a server of your own it may be a part of the id, as in vLLM's "openai/gpt-oss-20b".
    if prefix != "openai" or not address_variable("openai"):
        model = model.removeprefix(f"{prefix}/")
    return f"{prefix}/{model}"


def address_variable(provider: str) -> str:
    """Return the environment variable that is set and may give the provider's address, or ""."""
    prefix = provider.removesuffix("_chat").upper()  # ollama_chat has ollama's
    for name in (f"{prefix}_BASE_URL", f"{prefix}_API_BASE"):
        if os.getenv(name):
            return name
    return ""


@dataclass
class ErrorKind:
    """One kind of error: what the person in the chat reads of it, and how it is recognised.

    It fits if a cause has a listed class, or if the HTTP status is listed and the provider's text
    matches `words`: a regular expression, for which capital letters make no difference.
    """

    message: str  # may name the {key}, the {model} and the {hint}: attributes of ProviderModel
    allow_retry: bool = False
    is_left_out: bool = False  # whether later turns leave out the message that led to it
    statuses: Container[int] = ()
    classes: tuple[type[Exception], ...] = ()
    words: str = ""


# For these, chatkit removes the turn's messages.
GUARDRAILS = (InputGuardrailTripwireTriggered, OutputGuardrailTripwireTriggered)
FILTERED = ErrorKind(
    "The AI provider's content filter stopped this. Rephrase your message.",
    is_left_out=True,
    statuses=[400, 403],
    classes=(litellm.exceptions.ContentPolicyViolationError, ModelRefusalError),
    words="input was flagged|terms of service|usage guidelines|content exists risk",
)
TOO_LONG = ErrorKind(
    "This is too long for the model, and later turns leave it out. Shorten your message, or start"
    " a new thread.",
    is_left_out=True,
    statuses=[400, 413, 429, 500],
    classes=(litellm.exceptions.ContextWindowExceededError,),
    words="request (body )?too large|maximum (context|model|prompt) length|n_ctx"
    "|context (length|window|limit|size)|reduce the length of|input is too long for",
)
RATE_LIMIT = ErrorKind(
    "The AI provider's rate limit is reached. Wait a moment and try again.",
    allow_retry=True,
    statuses=[429],
)
TIMED_OUT = ErrorKind(
    "The AI provider timed out: it sent nothing for too long. Try again.",
    allow_retry=True,
    statuses=[408],
    classes=(TimeoutError,),
)
LONG_REPLY = ErrorKind(
    "The reply reached the model's length limit, and ends here. Ask for the rest, or for less."
)
EMPTY_REPLY = ErrorKind("The AI provider's reply was empty. Try again.", allow_retry=True)
NOT_UNDERSTOOD = ErrorKind(
    "The AI provider's answer was not understood. Try again.{hint}",
    allow_retry=True,
    statuses=[400],
    classes=(ModelBehaviorError, StopAsyncIteration),
    words="(tool_use|output_parse|json_validate)_failed|unexpected (response|tokens)|has crashed"
    "|unloaded|degraded function",
)
CUT_OFF = ErrorKind(
    "The reply was cut off: the AI provider did not finish it. Try again.",
    allow_retry=True,
    classes=(ConnectionResetError,),
)
SETUP = ErrorKind(
    "This server is not set up for this. The server's log has the reason.",
    statuses=[400, 422],
    classes=(
        UserError,
        litellm.exceptions.UnsupportedParamsError,
        ImportError,
        TypeError,
        AttributeError,
        NameError,
    ),
    # What providers say if the model does not take tools, their images or a setting, or if they do
    # not serve this country.
    words="support tools|tool.choice|function (calling|tools)|tool (use|calling)|'tools"
    "|tools\\.\\d|invalid schema|function_declarations|unsupported.(parameter|value)"
    "|unknown parameter|response_format|argument (supplied|not supported)"
    "|is unsupported, did you mean|not enabled for models|`temperature`|max_tokens|top_p"
    "|reasoning_(effort|format)|thinking (budget|level|is not)|works in thinking mode"
    "|(adaptive|support) thinking|thinking.type|user location|has been (disabled|restricted)"
    "|api version|messages with role|thought_signature|chat template|role not supported",
)
UNAVAILABLE = ErrorKind(
    "The AI provider is unavailable. Try again later.{hint}",
    allow_retry=True,
    statuses=range(500, 600),
    classes=(OSError,),
)
REFUSED_MESSAGE = ErrorKind(
    "The AI provider refused this message, and later turns leave it out. Change it, and send it"
    " again. The server's log has the reason.",
    is_left_out=True,
    statuses=[400, 413, 422],
)
NO_KEY = ErrorKind("This server has no {key}. Set it, or try PROVIDER=mock.")
USED_UP = ErrorKind(
    "The quota or credit at the AI provider is used up. Check the plan and billing of {key}.",
    statuses=range(400, 600),
    words="insufficient.(quota|balance)|exceeded_current_quota|credit balance is too low|per.?day"
    "|limit: 0|api usage limits|billing_|billing hard limit|spend(ing)? (cap|limit)"
    "|credits are depleted|ly usage limit|key limit exceeded|credits or licenses"
    "|used all available credits|arrearage|free tier is not available",
)
UNKNOWN_MODEL = ErrorKind(
    "The AI provider does not know the model {model}, or refuses it. Check MODEL.",
    statuses=[400, 403, 404],
    words="model_not_(found|available|supported)|invalid_model|valid model|model not exist"
    '|AccessDenied|model not found|is not found for API|no endpoints found for|"model: '
    "|LLM provider NOT provided|model \\S+ does not exist|not found, try pulling|' not found"
    "|was not found or your project|no longer (available|supported)|not a chat model"
    "|in v1/responses|end of its life|model identifier|inference profile|no models loaded"
    "|unavailable model|specified model|unknown model",
)
KEY_REFUSED = ErrorKind(
    "The AI provider refused the key. Check {key}.",
    statuses=[400, 500],  # 500: no header can hold the key
    words="api.key.(not valid|invalid)|incorrect api key|'ascii' codec",
)
CHAT_ERRORS = [  # the first that fits is the one: a used-up quota is a 429, too
    replace(USED_UP, statuses=[402], words=""),
    USED_UP,
    UNKNOWN_MODEL,
    replace(REFUSED_MESSAGE, statuses=[404], words="image input"),
    ErrorKind(
        "The AI provider has nothing at this address. The server's log has the reason.{hint}",
        statuses=[404, 405],
    ),
    FILTERED,
    replace(
        KEY_REFUSED, statuses=[401], words="", classes=(litellm.exceptions.AuthenticationError,)
    ),
    KEY_REFUSED,
    ErrorKind(
        "The AI provider refused access. Check {key}. The server's log has the reason.",
        statuses=[403],
    ),
    TOO_LONG,
    RATE_LIMIT,
    ErrorKind(
        "This server's rules do not allow this. Rephrase your message.",
        is_left_out=True,
        classes=(
            *GUARDRAILS,
            ToolInputGuardrailTripwireTriggered,
            ToolOutputGuardrailTripwireTriggered,
        ),
    ),
    ErrorKind(
        "The model used tools again and again without an answer. Rephrase your message.",
        classes=(MaxTurnsExceeded,),
    ),
    TIMED_OUT,
    CUT_OFF,
    NOT_UNDERSTOOD,
    SETUP,
    UNAVAILABLE,
    REFUSED_MESSAGE,
    ErrorKind(
        "The AI provider refused this request. The server's log has the reason.",
        statuses=range(400, 500),
    ),
    # LiteLLM could not read what it got.
    replace(NOT_UNDERSTOOD, classes=(ValueError, KeyError)),
]
FILTERED_REPLY = replace(
    FILTERED, message=f"{FILTERED.message} The reply is not complete.", is_left_out=False
)


class ChatError(CustomStreamError):
    """An error whose message the person in the chat reads. Its `__cause__` is for the log."""

    # Workaround (openai-agents, no issue known): it raises an error before it passes on the earlier
    # deltas.
    _agents_drain_queued_stream_events = True

    def __init__(self, kind: ErrorKind, model: ProviderModel, cause: Any = None) -> None:
        message = kind.message.format(**vars(model))
        super().__init__(message, allow_retry=kind.allow_retry)
        self.args = (message,)  # str(error): an agent used as a tool tells it to its caller
        self.kind = kind
        self.__cause__ = cause


def chat_error_for(error: Exception, model: ProviderModel, answered: bool = False) -> Exception:
    """Return a ChatError of the first of CHAT_ERRORS that fits, or the error itself.

    With `answered`, a text or a tool call came: all kinds but three are CUT_OFF then.
    """
    is_bug_of_a_tool = isinstance(error, UserError) and error.__cause__
    if isinstance(error, CustomStreamError | ToolTimeoutError) or is_bug_of_a_tool:
        return error
    causes = []
    status, said = 0, ""
    inner: BaseException | None = error
    while inner and inner not in causes:
        causes.append(inner)
        # The last status is the provider's. A few errors have a text there.
        if isinstance(code := getattr(inner, "status_code", None), int):
            status = code
        said += f"{inner} {getattr(inner, 'body', '')} "
        inner = inner.__cause__ or inner.__context__
    # For the log: OpenAI's client keeps some texts of providers in `body` alone.
    error.said = said  # type: ignore[attr-defined]
    for kind in [FILTERED_REPLY, TIMED_OUT, SETUP] if answered else CHAT_ERRORS:
        has_class = any(isinstance(cause, kind.classes) for cause in causes)
        if has_class or (status in kind.statuses and re.search(kind.words, said, re.I)):
            return ChatError(kind, model, error)
    return ChatError(CUT_OFF, model, error) if answered else error


def log_error(error: Exception) -> None:
    """Log the message that the person reads, and its cause, in one line.

    chatkit logs all others but its StreamError. A Store that has logged it sets `error.logged`.
    """
    if isinstance(error, CustomStreamError) and not getattr(error, "logged", False):
        cause = f" ({described(error.__cause__)})" if error.__cause__ else ""
        logger.error("%s%s", error.message, cause)


def described(error: BaseException) -> str:
    """Return the error's class, status, code and 300 characters of what was said, on one line.

    Some providers repeat the key, and an address may hold a token: asterisks take their place.
    """
    text = getattr(error, "said", str(error))  # see chat_error_for
    endings = ("_KEY", "_TOKEN", "_SECRET", "_PASSWORD", "_BASE_URL", "_API_BASE")
    values = [value for name, value in os.environ.items() if name.endswith(endings)]
    for secret in sorted(values, key=len, reverse=True):  # one may be a part of another
        if len(secret) >= 8:  # what is shorter is no secret, but may be a part of many words
            text = text.replace(secret, "***")
    facts = [type(error).__name__, getattr(error, "status_code", ""), getattr(error, "code", "")]
    return f"{' '.join(str(fact) for fact in facts if fact)}: {text!r:.300}"


def is_worth_a_retry(context: RetryPolicyContext) -> bool:
    """Decide whether openai-agents asks the provider again, once, before anything was shown."""
    if "retryDelay" in str(context.error.__cause__):  # in Gemini's text, and seldom short
        return False
    wait = context.normalized.retry_after or 0
    kind = getattr(context.error, "kind", None)
    return kind in (RATE_LIMIT, UNAVAILABLE, CUT_OFF) and wait <= RETRY_SECONDS


def needs_reasoning(name: str) -> bool:
    """Return whether the model, if it thinks, must be given its reasoning with each tool call.

    Cerebras refuses any reasoning.
    """
    if name.startswith("cerebras/"):
        return False
    return re.search("deepseek|kimi|glm", name, re.I) is not None


class ProviderModel(LitellmModel):
    """LitellmModel with a time limit, readable errors, and settings of its own.

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
        super().__init__(model, base_url, api_key, lambda _: needs_reasoning(model))
        self.canned_reply = canned_reply
        self.provider = "mock" if canned_reply else model.partition("/")[0]
        address = "the base URL" if base_url else address_variable(self.provider)
        self.hint = f" Check {address}." if address else ""
        missing = litellm.validate_environment(model)["missing_keys"]
        self.key = f"{self.provider.upper()}_API_KEY"
        if self.key not in [*missing, *os.environ]:
            self.key = f"the credentials for {self.provider}"
        self.missing_keys = [] if api_key or canned_reply or address else missing
        self.settings = ModelSettings(
            include_usage=True,  # the log counts the tokens
            extra_args={
                "max_retries": 0,  # of OpenAI's client
                # For some of these providers LiteLLM would drop it.
                "allowed_openai_params": (
                    ["max_retries"] if self.provider in openai_compatible_providers else []
                ),
                "drop_params": True,  # settings that the model does not know
                "mock_response": canned_reply,
            },
        )

    async def _fetch_response(
        self,
        system_instructions: Any,
        input: Any,
        model_settings: ModelSettings,
        tools: list[Tool],
        *args: Any,
        **kwargs: Any,
    ) -> Any:
        if turn := Turn.current.get(None):
            turn.model = self
        if self.missing_keys and self.provider in DEFAULT_MODELS:
            raise ChatError(NO_KEY, self)
        messages, is_begun_by_another = model_input(input, self.model)
        # An agent that was made without a model has the reasoning effort and the verbosity (which
        # LitellmModel never sends) of OpenAI's default model: adding these to its settings changes
        # nothing. If you chose the same two, they count as these.
        default = get_default_model_settings()
        is_default = default.reasoning and model_settings.resolve(default) == model_settings
        # A Claude that thinks refuses to go on with a turn that another model has begun.
        if is_default or ("claude" in self.model and is_begun_by_another):
            model_settings = replace(model_settings, reasoning=None)
        settings = self.settings.resolve(model_settings)
        if tools and "tools" not in (litellm.get_supported_openai_params(self.model) or ["tools"]):
            logger.warning("LiteLLM says that %s takes no tools. It leaves them out.", self.model)
        try:
            with anyio.fail_after(MODEL_TIMEOUT):
                fetched = await super()._fetch_response(
                    system_instructions, messages, settings, tools, *args, **kwargs
                )
        except Exception as error:
            raise chat_error_for(error, self)
        if not kwargs["stream"]:
            return fetched
        response, chunks = fetched
        return response, checked_chunks(self, chunks)


async def checked_chunks(
    model: ProviderModel, stream: litellm.CustomStreamWrapper
) -> AsyncIterator[litellm.ModelResponseStream]:
    """Yield the chunks of a reply. Closing the generator closes the provider's connection.

    Raises ChatError if a chunk takes too long, or if the provider gives no reason for the end of
    the reply, or not a good one: LiteLLM takes an empty response for a complete reply.
    """
    reply_id = secrets.token_hex(8)
    indexes: dict[Any, int] = {}  # of the tool calls, see repair_delta
    try:
        body = await body_without_stream(stream)
        while True:
            # Workaround (LiteLLM, no issue known): it returns buffered chunks without yielding to
            # the event loop. A fast reply would block all other chats.
            await asyncio.sleep(0)
            with anyio.fail_after(MODEL_TIMEOUT):
                chunk = await anext(stream, None)
            if chunk is None:
                break
            if not (litellm.success_callback or litellm.callbacks):
                # LiteLLM keeps all chunks for callbacks, 5 to 8 KB each. It needs the last two.
                del stream.chunks[:-2]
            for choice in chunk.choices:
                repair_delta(choice.delta, reply_id, indexes)
            yield chunk
        # LiteLLM's own map would read FAILED_END as "stop": see repair_libraries.
        reason = core_helpers.map_finish_reason(stream.received_finish_reason or FAILED_END)
        if reason == "content_filter":
            raise ModelRefusalError(reason)
        if reason == "length":
            raise ChatError(LONG_REPLY, model)
        if reason == FAILED_END and not model.canned_reply:  # which has no reason
            raise ModelBehaviorError(body or "the stream ended too early")
    except Exception as error:
        # What has begun with a text or a tool call was cut off.
        raise chat_error_for(error, model, bool(stream.response_uptil_now or indexes))
    finally:
        await stream.aclose()


async def body_without_stream(stream: litellm.CustomStreamWrapper) -> str:
    """Return what the provider sent in place of a stream, for the log, or "".

    Workaround (LiteLLM, no issue known): it reads a web page, or an error object (LM Studio), as an
    empty stream. Both have a length, which a stream has not.
    """
    chunks = stream.completion_stream
    response: Any = getattr(chunks, "response", None) or getattr(chunks, "http_response", None)
    if not response or "Content-Length" not in response.headers:
        return ""
    with anyio.fail_after(MODEL_TIMEOUT):
        await response.aread()
    return response.text


def repair_delta(delta: Any, reply_id: str, indexes: dict[Any, int]) -> None:
    """Correct what some providers send.

    `indexes` maps both a call's id and the provider's index to the index that we give the call.
    """
    if delta.content:
        # A lone surrogate (half of an emoji) could be neither sent nor stored.
        delta.content = delta.content.encode(errors="replace").decode()
    for call in delta.tool_calls or []:
        # Workaround (LiteLLM 33678): all parallel calls of Ollama have the index 0.
        # Others give each part of a call an id of its own.
        if call.id and call.function.name:
            indexes[call.index] = indexes.setdefault(call.id, len(set(indexes.values())))
        call.index = indexes.get(call.index, call.index)
        # Some give the same id in each reply, and openai-agents would drop the earlier call.
        call.id = f"call_{reply_id}_{call.index}"


class ProviderModels(ModelProvider):
    """What openai-agents asks for the model of each agent that has no Model object of its own.

    So second agents (hand-offs, one for titles) go through LiteLLM like the first. An agent without
    a model gets the default model; a name with a slash is LiteLLM's, others are models of PROVIDER.
    """

    def get_model(self, model_name: str | None) -> ProviderModel:
        if model_name in (None, "", "auto"):
            return model
        return make_model(model_name if "/" in model_name else litellm_name(PROVIDER, model_name))


def make_model(name: str) -> ProviderModel:
    """Return the model with LiteLLM's name, "provider/model"; with PROVIDER=mock a canned one."""
    return ProviderModel(name, canned_reply=MOCK_REPLY if PROVIDER == "mock" else None)


model = make_model(litellm_name(PROVIDER, MODEL))

# ---- Server --------------------------------------------------------------------------------------

REQUEST = TypeAdapter(ChatKitReq)
Events = AsyncIterator[ThreadStreamEvent]


def as_sse(event: ThreadStreamEvent) -> bytes:
    """Return the event as chatkit sends it."""
    return f"data: {event.model_dump_json(by_alias=True, exclude_none=True)}\n\n".encode()


HEARTBEAT = as_sse(ProgressUpdateEvent(text="Still working…"))
DELETED = "This thread, or a part of it, was deleted meanwhile. Reload the page."
STOPPED = "The server was stopped before the reply was complete. Try again in a moment."
SERVER_STOPPED = as_sse(ErrorEvent(message=STOPPED, allow_retry=True))


@dataclass(eq=False)
class Turn(AsyncIterator[bytes]):
    """One streaming request. Three tasks take part in it:

        the response        __anext__, which returns what is in the queue
        the turn's task     fill_queue: it reads chatkit's events, which come from respond and its
                            stages, and puts them into the queue. In it chatkit stores the items.
        openai-agents' task the run: it calls the model and the tools

    A client that leaves cancels the first one only. Turn.stop then ends the run, whose events end
    without an exception, and what was streamed is stored as at the end of any turn.
    """

    current = ContextVar["Turn"]("current")  # of the task that runs

    server: ChatKitServerImpl  # this turn is among its `turns` while its task runs
    context: Context
    thread_id: str  # "-" until chatkit has made the thread: turns of no thread are no neighbours
    # Unbounded on purpose: a reply fits in memory, and a client that reads slowly must not hold the
    # provider's connection. b"" is the end.
    queue: asyncio.Queue[bytes] = field(default_factory=asyncio.Queue)
    has_begun: asyncio.Event = field(default_factory=asyncio.Event)
    task: asyncio.Task[None] = field(init=False)  # see `start`
    run: Any = None  # the RunResultStreaming, as soon as there is one
    question_ids: list[str] = field(default_factory=list)  # of the messages that it answers
    model: ProviderModel = model  # the one that ran last
    outcome: str = "done"  # for the log: done, stopped or error
    stopped: bool = False
    client_left: bool = False
    start_time: float = field(default_factory=time.monotonic)
    first_delta: float = 0

    # ---- What the response does with it

    async def start(self, events: Events) -> None:
        """Start the task, and return when its first event is in the queue.

        Raises the error of a task that fails before its first event.
        """
        self.server.turns.add(self)
        self.task = asyncio.create_task(self.fill_queue(events))
        await self.has_begun.wait()
        if self.task.done():
            self.task.result()

    async def __anext__(self) -> bytes:
        """Return the next event, or a heartbeat if there is none for SILENCE_SECONDS."""
        event = HEARTBEAT
        with anyio.move_on_after(SILENCE_SECONDS):
            event = await self.queue.get()
        if not event:
            raise StopAsyncIteration
        return event

    async def aclose(self) -> None:
        """Stop the turn because the client has left. A turn that has ended stays as it is.

        Neither this nor `stop` may await: Starlette has cancelled the scope in which this runs.
        """
        if not self.task.done():
            self.client_left = not self.stopped
            self.stop()

    def stop(self, last_event: bytes = b"") -> None:
        """End the turn soon, with this event for a client that still reads.

        A turn that has not ended after STOP_SECONDS, because a tool or a database hangs, is
        cancelled. Then chatkit stores the unfinished text and a note; new tool calls are lost.
        """
        if self.stopped:
            return
        self.stopped = True
        self.outcome = "stopped"
        if self.run:
            self.run.cancel()
        if last_event:
            self.queue.put_nowait(last_event)
        timer = asyncio.get_running_loop().call_later(STOP_SECONDS, self.task.cancel)
        self.task.add_done_callback(lambda _: timer.cancel())

    # ---- What the turn's task does

    async def fill_queue(self, events: Events) -> None:
        """Put the turn's events into the queue, and then its end."""
        Turn.current.set(self)
        try:
            async for event in events:
                if getattr(event, "code", "custom") != "custom":  # an error without words
                    # Another process may have deleted the thread: this raises NotFoundError,
                    # for which the client gets a better message.
                    await self.server.store.load_thread(self.thread_id, self.context)
                self.put(event)
        except Exception as error:
            self.outcome = "error"
            if not self.has_begun.is_set():
                raise  # `start` raises it
            self.put(error_event(error))
        finally:
            if self.run:
                # Workaround (chatkit, no issue known): after an error of the Store, it does not end
                # the run. After any error, its _merge_generators leaves a task that waits for one
                # more event ("Task was destroyed but it is pending!"). No client gets this event.
                self.run.cancel()
                await self.run.context_wrapper.context.stream(ProgressUpdateEvent(text=""))
            self.server.turns.discard(self)
            self.write_log_line()
            # No await may follow: `start` looks whether the task has failed when it has begun.
            self.queue.put_nowait(b"")
            self.has_begun.set()

    def put(self, event: ThreadStreamEvent) -> None:
        """Queue an event for the client. A turn that was stopped sends nothing more."""
        match event.type:
            case "thread.created":
                self.thread_id = event.thread.id
            case "thread.item.updated":
                self.first_delta = self.first_delta or time.monotonic() - self.start_time
            case "error":
                self.outcome = "error"
        if not self.stopped:
            self.queue.put_nowait(as_sse(event))
        self.has_begun.set()

    def write_log_line(self) -> None:
        """Log one line. Tokens are the sum of the model's completed responses, "-" if unknown."""
        usage = self.run.context_wrapper.usage if self.run else Usage()
        logger.info(
            "turn pid=%s thread=%s provider=%s model=%s end=%s first_delta=%s total=%.3fs"
            " input_tokens=%s output_tokens=%s",
            os.getpid(),
            self.thread_id,
            self.model.provider,
            self.model.model,
            self.outcome,
            f"{self.first_delta:.3f}s" if self.first_delta else "-",
            time.monotonic() - self.start_time,
            usage.input_tokens or "-",
            usage.output_tokens or "-",
        )


def error_event(error: Exception) -> ErrorEvent:
    """Log an error that chatkit does not turn into an event, and return the event for it."""
    if isinstance(error, CustomStreamError):  # of a Store
        log_error(error)
        return ErrorEvent(message=error.message, allow_retry=error.allow_retry)
    if isinstance(error, NotFoundError):
        logger.warning("%s (%s)", DELETED, error)
        return ErrorEvent(message=DELETED)
    logger.error("A turn failed.", exc_info=error)
    return ErrorEvent(code=ErrorCode.STREAM_ERROR, allow_retry=True)


class ChatKitServerImpl(ChatKitServer[Context]):
    """chatkit's server: `process` checks a request, `respond` answers it."""

    def __init__(
        self, store: Store[Context], attachment_store: AttachmentStore[Context] | None = None
    ) -> None:
        super().__init__(store, attachment_store)
        # CHANGE ME: the agent. Its tools: server.agent.tools.append(your_function_tool), below.
        self.agent: Agent[ChatContext] = Agent("Assistant", instructions=INSTRUCTIONS, model=model)
        self.run_config = RunConfig(
            model_provider=ProviderModels(),
            model_settings=ModelSettings(
                retry=ModelRetrySettings(max_retries=1, policy=is_worth_a_retry)
            ),
            tool_not_found_behavior="return_error_to_model",
            tool_name_collision_policy="error",
        )
        self.converter = Converter()
        self.forgotten_tools: set[str] = set()  # names of tools whose calls must not be kept
        self.turns: set[Turn] = set()  # the turns that run in this process

    # ---- A turn

    async def respond(
        self, thread: ThreadMetadata, input: UserMessageItem | None, context: Context
    ) -> Events:
        """Stream the agent's reply to the thread, in which chatkit has stored `input`.

        Raises CustomStreamError, whose message chatkit sends to the client.
        """
        turn = Turn.current.get()
        if thread.title is None and input:
            thread.title = message_text(input)[:TITLE_LENGTH] or None
            # chatkit saves a changed thread after the next event: this one. Saved later, a thread
            # that another process has deleted would come back.
            yield StreamOptionsEvent(stream_options=self.get_stream_options(thread, context))

        agent_context = AgentContext(thread=thread, store=self.store, request_context=context)
        memory = ToolMemory(agent_context, self.forgotten_tools)
        turn.run = Runner.run_streamed(
            await self.agent_for(thread, input, context),
            await self.history(thread, context),
            context=agent_context,
            hooks=memory,
            run_config=await self.run_config_for(thread, input, context),
        )
        if turn.stopped:  # the stop came before the run
            turn.run.cancel()

        # Each stage is a function further down, with one idea. What leaves the last one goes to
        # chatkit: it stores each item that is done, and then sends the event. Ids come first, as
        # items are stored by them, and the words of errors last.
        events = stream_agent_response(agent_context, turn.run)
        events = with_unique_ids(events, agent_context)
        events = with_everything_stored(events, turn, memory)
        events = with_chat_errors(events, turn, memory)
        async for event in events:
            yield event

        if turn.client_left:
            with suppress(NotFoundError):  # the thread may have been deleted meanwhile
                await self.handle_stream_cancelled(thread, [], context)  # stores a note of the stop

    async def agent_for(
        self, thread: ThreadMetadata, input: UserMessageItem | None, context: Context
    ) -> Agent[ChatContext]:
        """Return the agent that answers. Override it to choose one by user or by thread.

        `input` is None if the turn goes on after a client tool.
        """
        return self.agent

    async def run_config_for(
        self, thread: ThreadMetadata, input: UserMessageItem | None, context: Context
    ) -> RunConfig:
        """Return the settings of the run. Override it to choose a model by user or by message."""
        return self.run_config

    async def history(self, thread: ThreadMetadata, context: Context) -> list[Any]:
        """Return the model's input: the thread's newest items, oldest first.

        It starts with a user message: some providers refuse a conversation that starts with the
        assistant's. What a provider has refused is left out.
        """
        refused = []
        kept = []
        items = await self.newest_items(thread.id, context)
        for item in items:
            if ids := hidden_content(item, REFUSED_ITEMS):  # of older items
                refused += ids
            elif item.id not in refused:
                kept.append(item)
        while kept and kept[-1].type != "user_message":
            kept.pop()
        question = kept[:1]
        if items[1:] and hidden_content(items[1], REFUSED_ITEMS):
            # The turn before was refused: an older message that has no answer may be the cause.
            question += takewhile(lambda item: item.type not in REPLY_TYPES, kept[1:])
        Turn.current.get().question_ids = [item.id for item in question]
        return await self.converter.to_agent_input(kept[::-1])

    async def newest_items(self, thread_id: str, context: Context) -> list[ThreadItem]:
        """Return the items that the model sees, newest first. A user message is among them."""
        page = Page[ThreadItem](has_more=True)
        items: list[ThreadItem] = []
        while page.has_more and "user_message" not in [item.type for item in items]:
            page = await self.store.load_thread_items(
                thread_id, page.after, HISTORY_ITEMS, "desc", context
            )
            items += page.data
        return items

    def _update_pending_items(self, *_: Any) -> None:
        """Do nothing: `extend_item` already keeps the items complete that chatkit would store.

        Workaround (chatkit-python pull request 76): chatkit 1.4 to 1.5 appends each step of a
        workflow to the very object that is streamed, so that steps and thoughts are doubled. And it
        copies a message for each delta.
        """

    # ---- Requests

    async def process(
        self, request: str | bytes | bytearray, context: Context
    ) -> StreamingResult | NonStreamingResult:
        """Answer a request.

        Raises HTTPException (400 or 409) or NotFoundError before chatkit stores anything.
        """
        parsed = parse_request(request)
        thread_id = getattr(parsed.params, "thread_id", "")
        await self.check(parsed, thread_id, context)
        await self.settle_turns(parsed, thread_id)
        if parsed.type == "threads.add_client_tool_output":
            await self.put_tool_call_last(thread_id, context)

        # Not super().process(): a stream is a Turn here. And it builds the TypeAdapter again for
        # every request, which takes 20 ms.
        try:
            if not is_streaming_req(parsed):
                return NonStreamingResult(await self._process_non_streaming(parsed, context))
            turn = Turn(self, context, thread_id or "-")
            await turn.start(self._process_streaming_impl(parsed, context))
            return StreamingResult(turn)  # type: ignore[arg-type]  # it is no generator
        except NotImplementedError:  # of chatkit, for what you have not written
            raise HTTPException(400, f"{parsed.type} is not supported.")
        except ValueError as error:
            if type(error) is ValueError:  # a subclass, as pydantic's, may show what is stored
                raise HTTPException(400, str(error))
            raise

    async def settle_turns(self, request: ChatKitReq, thread_id: str) -> None:
        """Stop the thread's running turns, change their title, or wait for them: see each case."""
        match request.type:
            case "threads.delete" | "threads.retry_after_item":
                # Twice: another turn may begin meanwhile, and would save the thread again. But a
                # turn that hangs must not hold up a deletion for ever.
                for _ in range(2):
                    await stop_turns(self.turns_of(thread_id))
            case "threads.update":
                # A running turn may save its thread, and would bring the old title back.
                for turn in self.turns_of(thread_id):
                    if turn.run:
                        turn.run.context_wrapper.context.thread.title = request.params.title
        turns = self.turns_of(thread_id)
        if is_streaming_req(request):
            # A user may stop a reply and send a message at once. The server may see the message
            # first: it waits, so that what was streamed is stored before it.
            await wait_until_ended(turns, LATE_STOP_SECONDS)
            await wait_until_ended([turn for turn in turns if turn.stopped])

    async def put_tool_call_last(self, thread_id: str, context: Context) -> None:
        """Move the client tool call that the request answers to the end of the thread.

        Workaround (chatkit-python pull request 123): it looks at the newest item alone, but a note
        or the reply of another turn may have followed the call. Its reasoning stays before it.
        """
        items = await self.newest_items(thread_id, context)
        call: Any = next((item for item in items if item.type == "client_tool_call"), None)
        require(call and call.status == "pending", "No client tool call is pending in this thread.")
        place = items.index(call)  # 0 if it is the newest item
        if place:
            for item in reversed(items[place : place + 2]):  # its reasoning, and then the call
                if item is call or hidden_content(item, REMEMBERED_CALL):
                    await self.store.delete_thread_item(thread_id, item.id, context)
                    await self.store.add_thread_item(thread_id, item, context)

    def turns_of(self, thread_id: str) -> list[Turn]:
        return [turn for turn in self.turns if turn.thread_id == thread_id]

    async def stop_all_turns(self) -> None:
        """Stop every turn because the server ends, and wait until what was streamed is stored."""
        await stop_turns(list(self.turns), SERVER_STOPPED)

    async def check(self, request: ChatKitReq, thread_id: str, context: Context) -> None:
        """Refuse what chatkit would answer with a 500, a broken stream or an empty one. Cap limit.

        Raises HTTPException (400 or 409) or NotFoundError. chatkit itself refuses other mistakes.
        """
        params: Any = request.params  # checked by chatkit's types
        if limit := getattr(params, "limit", None):  # None and 0 are chatkit's default
            require(limit > 0, "limit must be at least 1.")
            params.limit = min(limit, MAX_PAGE)
        if thread_id:
            status = (await self.store.load_thread(thread_id, context)).status
            wants_reply = request.type in ("threads.add_user_message", "threads.retry_after_item")
            if wants_reply and status.type != "active":  # locked or closed by an application
                raise HTTPException(409, status.reason or f"This thread is {status.type}.")
        match request.type:
            case "threads.create" | "threads.add_user_message":
                message = params.input
                text = message_text(message) or (message.quoted_text or "").strip()
                require(text or message.attachments, "The message is empty.")
                for attachment_id in message.attachments:
                    await self.store.load_attachment(attachment_id, context)
                self.check_options(message.inference_options)
            case "threads.retry_after_item":
                item: Any = await self.store.load_item(thread_id, params.item_id, context)
                require(item.type == "user_message", f"Item {item.id} is not a user_message.")
                self.check_options(item.inference_options)
            case "threads.custom_action":
                require(self.action != super().action, f"{request.type} is not supported.")
                if params.item_id:  # an action may be about no item
                    item = await self.store.load_item(thread_id, params.item_id, context)
                    require(item.type == "widget", f"Item {item.id} is not a widget.")
            case "attachments.create" | "attachments.delete":
                require(self.attachment_store, "Attachments are not configured.")
                if request.type == "attachments.delete":
                    await self.store.load_attachment(params.attachment_id, context)

    def check_options(self, options: InferenceOptions) -> None:
        """Refuse a choice of a model or a tool.

        To offer some, override this, and agent_for or run_config_for.
        """
        chosen = options.model or (options.tool_choice and options.tool_choice.id)
        if chosen:
            raise HTTPException(400, f"{chosen:.100} is not offered.")


# ---- Checks of a request


def require(is_fine: object, reason: str) -> None:
    if not is_fine:
        raise HTTPException(400, reason)


def parse_request(request: str | bytes | bytearray) -> ChatKitReq:
    """Return chatkit's request. Raises HTTPException (400) with the first reason why it is none."""
    try:
        # json.loads accepts NaN and lone surrogates, which cannot be stored.
        value = from_json(request, allow_inf_nan=False)  # at most 200 levels deep
        # pydantic makes an object of each value, and an error of each wrong one.
        require(count_values(value) <= MAX_VALUES, f"There are more than {MAX_VALUES} JSON values.")
        return REQUEST.validate_python(value)
    except ValidationError as error:
        first = error.errors()[0]
        place = ".".join(map(str, first["loc"]))
        raise HTTPException(400, f"{place}: {first['msg']}"[:300])
    except ValueError as error:
        raise HTTPException(400, f"Invalid JSON: {error}")


def count_values(value: Any) -> int:
    """Return how many JSON values there are in the value, with itself."""
    if isinstance(value, dict):
        value = list(value.values())
    return 1 + sum(map(count_values, value)) if isinstance(value, list) else 1


async def stop_turns(turns: list[Turn], last_event: bytes = b"") -> None:
    """Stop the turns, and wait until they have ended."""
    for turn in turns:
        turn.stop(last_event)
    await wait_until_ended(turns)


async def wait_until_ended(turns: list[Turn], seconds: float = 2 * STOP_SECONDS) -> None:
    """Wait until the turns have ended, but at most for these seconds."""
    if turns:
        await asyncio.wait([turn.task for turn in turns], timeout=seconds)


def message_text(message: UserMessageItem | UserMessageInput) -> str:
    """Return what the user typed, on one line."""
    return " ".join(" ".join(part.text for part in message.content).split())


# ---- The stages of a turn: its events pass through these generators, in the order of `respond`


async def with_unique_ids(events: Events, agent_context: ChatContext) -> Events:
    """Give each message and client tool call an id of its own.

    Workaround (chatkit-python issue 36): through LiteLLM all of them have openai-agents'
    placeholder `__fake_id__`, and each would overwrite the one before. Items whose id comes from
    the store (workflows, widgets) keep it.
    """
    id_mapping = {"__fake_id__": ""}  # the model's id -> the newest of ours; calls have it, too
    given = []
    async for event in events:
        match event:
            case ThreadItemAddedEvent(item=AssistantMessageItem() as item):
                id_mapping[item.id] = item.id = agent_context.generate_id("message")
                given.append(item.id)
            case ThreadItemUpdatedEvent(item_id=id):
                event.item_id = id_mapping.get(id, id)
            case ThreadItemDoneEvent(item=ClientToolCallItem() as item):
                item.call_id = item.id = agent_context.generate_id("tool_call")
            case ThreadItemDoneEvent(item=item):
                item.id = id_mapping.get(item.id, item.id)
            case ThreadItemRemovedEvent(item_id=id) if id in id_mapping:
                for id in given:  # a guardrail removes every message of the turn
                    yield ThreadItemRemovedEvent(item_id=id)
                continue
        yield event


def is_answer(event: ThreadStreamEvent) -> bool:
    """Return whether the user sees this as an answer."""
    if event.type != "thread.item.done":
        return event.type in ("thread.item.replaced", "client_effect", "notice")
    match event.item:
        case AssistantMessageItem(content=parts):
            return any(part.text.strip() for part in parts)
        case WorkflowItem(workflow=workflow):
            return workflow.type != "reasoning"
    return "hidden" not in event.item.type


async def with_everything_stored(events: Events, turn: Turn, memory: ToolMemory) -> Events:
    """Add the tool calls between the messages, and complete what an error or a stop leaves.

    chatkit stores an item when it is done: what was streamed of an unfinished one would be lost.
    """
    unfinished: dict[str, Any] = {}  # by id: the event that would complete the item
    messages_begun = 0
    failure = None
    try:
        async for event in events:
            if turn.stopped and event.type != "thread.item.removed":
                continue  # nobody sees this event, so it must not be stored
            match event:
                case (
                    ThreadItemAddedEvent(item=AssistantMessageItem())
                    # chatkit looks for it at the end of the thread: its reasoning comes before it.
                    | ThreadItemDoneEvent(item=ClientToolCallItem())
                ):
                    for call in memory.take_calls(messages_begun):
                        yield call
                    messages_begun += 1  # nothing follows a client tool call
            match event:
                case ThreadItemUpdatedEvent(item_id=id, update=update) if id in unfinished:
                    extend_item(unfinished[id].item, update)
                case ThreadItemAddedEvent(item=item):
                    unfinished[item.id] = ThreadItemDoneEvent(item=item)
                case ThreadItemDoneEvent(item=item) | ThreadItemReplacedEvent(item=item):
                    unfinished.pop(item.id, None)
                case ThreadItemRemovedEvent(item_id=id):
                    unfinished.pop(id, None)
            yield event
    except GUARDRAILS:  # the turn's items are removed. The client never heard of the tool calls.
        for id in memory.hidden_ids:
            await turn.server.store.delete_thread_item(turn.thread_id, id, turn.context)
        raise
    except Exception as error:
        failure = error
    for event in [*unfinished.values(), *memory.take_calls(memory.messages_completed)]:
        yield event
    if failure:
        raise failure


def extend_item(item: Any, update: ThreadItemUpdate) -> None:
    """Apply an update to a streamed message. It is always about the newest part.

    In place: chatkit stores this same object if its task is cancelled.
    """
    match update.type:
        case "assistant_message.content_part.added":
            item.content.append(update.content)
        case "assistant_message.content_part.text_delta":
            item.content[-1].text += update.delta
        case "assistant_message.content_part.annotation_added":
            item.content[-1].annotations.append(update.annotation)


async def with_chat_errors(events: Events, turn: Turn, memory: ToolMemory) -> Events:
    """Log a Store's and the run's errors, and raise them with the words that the person reads.

    A turn that completes no answer is an error, too.
    """
    answered = False
    try:
        async for event in events:
            answered |= is_answer(event)
            yield event
        if not (answered or turn.stopped):
            raise ChatError(EMPTY_REPLY, turn.model)
    except (CustomStreamError, AgentsException) as error:
        known = chat_error_for(error, turn.model)
        log_error(known)
        match known:
            case ChatError(kind=ErrorKind(is_left_out=True)):
                yield memory.hidden_item(REFUSED_ITEMS, turn.question_ids + memory.hidden_ids)
        raise known


# ---- Tool memory

# These types mark our hidden items among an application's own.
REMEMBERED_CALL = "remembered_tool_call"
REFUSED_ITEMS = "refused_items"
# With an item of these types, a message has an answer, or a part of one.
REPLY_TYPES = ("assistant_message", "client_tool_call", "hidden_context_item")
STOPPED_CALL = "The call was stopped before its result was known. It may have been carried out."


def hidden_content(item: ThreadItem, mark: str) -> list[Any]:
    """Return what one of our hidden items with this mark holds; [] for any other item."""
    match item:
        case HiddenContextItem(content={"type": found, "input": list(held)}) if found == mark:
            return held
    return []


@dataclass
class ToolMemory(RunHooks[Any]):
    """Follows the run of a turn and keeps its tool calls, with their reasoning, for later turns.

    Providers refuse a call without its output, and some a call without its reasoning: all that
    belongs to one step is one hidden item.
    """

    agent_context: ChatContext
    forgotten_tools: set[str]
    messages_completed: int = 0  # of the model, in this turn
    # The steps that are not stored yet: the number of messages up to each, and what the model said.
    steps: list[tuple[int, Any]] = field(default_factory=list)
    outputs: dict[str, Any] = field(default_factory=dict)  # of the calls, by their ids
    client_call_id: str = ""  # the id of the call that the client answers
    hidden_ids: list[str] = field(default_factory=list)  # ids of the hidden items

    async def on_llm_start(self, context: Any, agent: Any, prompt: Any, input: list[Any]) -> None:
        # If a call never ran, because there is no such tool, its output is only in the next input.
        for item in input:
            match item:
                case {"type": "function_call_output", "call_id": id, "output": output}:
                    self.outputs[id] = output

    async def on_llm_end(self, context: Any, agent: Any, response: ModelResponse) -> None:
        # The run's events would not do: a stop drops those that were not read yet.
        self.messages_completed += [output.type for output in response.output].count("message")
        self.steps.append((self.messages_completed, response))

    async def on_tool_end(self, context: Any, agent: Any, tool: Tool, result: object) -> None:
        if str(result).startswith("An error occurred while"):  # openai-agents does not log it
            logger.error("The tool %s failed (%s)", tool.name, described(Exception(result)))
        call = getattr(context, "tool_call", None)
        if call is None:  # a tool of OpenAI's Responses API
            return
        # The run's event comes only when all parallel calls have ended.
        self.outputs[call.call_id] = ItemHelpers.tool_call_output_item(call, result)["output"]
        # A client tool sets `client_tool_call`, which parallel tools share: it is the call of that
        # name, or else the first one that ends.
        asked = self.agent_context.client_tool_call
        if asked and (asked.name == tool.name or not self.client_call_id):
            self.client_call_id = call.call_id

    def take_calls(self, count: int) -> Iterator[ThreadItemDoneEvent]:
        """Remove and yield what is to be stored after this number of the turn's messages.

        A call without an output was stopped.
        """
        while self.steps and self.steps[0][0] <= count:
            kept, answers, has_call = [], [], False
            for item in self.steps.pop(0)[1].to_input_items():
                if item["type"] == "reasoning":
                    kept.append(item)
                if item["type"] != "function_call" or item["name"] in self.forgotten_tools:
                    continue
                has_call = True
                id = item["call_id"]
                if id == self.client_call_id:
                    continue  # chatkit stores it itself, after this item
                kept.append({**item, "arguments": shortened(item["arguments"])})
                output = shortened(as_text(self.outputs.get(id, STOPPED_CALL)))
                answers.append({"type": "function_call_output", "call_id": id, "output": output})
            if has_call and kept:
                yield self.hidden_item(REMEMBERED_CALL, kept + answers)

    def hidden_item(self, mark: str, content: list[Any]) -> ThreadItemDoneEvent:
        item = HiddenContextItem(
            id=self.agent_context.generate_id("sdk_hidden_context"),
            thread_id=self.agent_context.thread.id,
            created_at=datetime.now(),
            content={"type": mark, "input": content},
        )
        self.hidden_ids.append(item.id)
        return ThreadItemDoneEvent(item=item)


def as_text(output: Any) -> str:
    """Return a tool's output as text: images and files are not kept."""
    return "\n".join(
        part.get("text", f"[{part['type'].removeprefix('input_')}: it was not kept]")
        for part in parts_of(output)
    )


def as_arguments(text: str) -> str:
    """Return as a JSON object what the model wrote as arguments, even if `shortened` has cut it.

    LiteLLM and vLLM parse them again in every later request.
    """
    with suppress(ValueError, RecursionError):
        if isinstance(json.loads(text), dict):
            return text
    return as_json({"arguments": text} if text else {})


def shortened(text: str) -> str:
    """Return the text with its middle cut out if it is longer than TOOL_OUTPUT_LENGTH."""
    text = text.encode(errors="replace").decode()  # a lone surrogate cannot be stored
    cut = len(text) - TOOL_OUTPUT_LENGTH
    if cut <= 0:
        return text
    half = TOOL_OUTPUT_LENGTH // 2
    return f"{text[:half]}\n[{cut} characters were cut out here]\n{text[-half:]}"


# ---- What the model is told


class Converter(ThreadItemConverter):
    """chatkit's conversion of thread items to the model's input, with its gaps closed."""

    async def _thread_item_to_input_item(self, item: Any, is_last_message: bool = True) -> Any:
        try:
            return await super()._thread_item_to_input_item(item, is_last_message)
        except Exception as error:
            # It would fail every later turn. The error's text may hold what was said in the chat.
            logger.error("Item %s cannot be told to the model: %s", item.id, type(error).__name__)
            return [{"role": "user", "content": f"[Here is a {item.type} that you cannot see.]"}]

    async def user_message_to_input(self, item: UserMessageItem, *_: Any, **__: Any) -> Any:
        # The model trusts chatkit's tags of hidden items: a user's text must not hold them. Without
        # `is_last_message`, chatkit tells the quotes of older messages, too.
        text = item.model_dump_json().replace("HiddenContext>", "HiddenContext >")
        return await super().user_message_to_input(UserMessageItem.model_validate_json(text))

    async def tag_to_message_content(self, tag: UserMessageTagContent) -> Any:
        return {"type": "input_text", "text": f"{tag.text}: {as_json({**tag.data, 'id': tag.id})}"}

    async def hidden_context_to_input(self, item: HiddenContextItem) -> Any:
        if remembered := hidden_content(item, REMEMBERED_CALL):
            return remembered
        if not isinstance(item.content, str):
            item = item.model_copy(update={"content": as_json(item.content)})
        return await super().hidden_context_to_input(item)


def model_input(items: str | list[Any], name: str) -> tuple[list[Any], bool]:
    """Return the model's input as every provider takes it.

    Also return whether the turn so far holds what another model said, or an unsigned thought.

    Many models refuse two messages of one role in a row, and most refuse an empty text. Mistral
    refuses a user's message right after a tool's output. Some refuse to go on after the
    assistant's message. Some servers refuse a list in place of a text. Some models refuse a tool
    call without their own reasoning.
    """
    messages: list[Any] = [{}]  # so that there is a last one; it is left out in the end
    is_begun_by_another = False
    for message in map(simplified, ItemHelpers.input_to_new_input_list(items)):  # copies
        kind = kind_of(message)
        is_empty = "role" in message and not message["content"]
        origin = message.get("provider_data", {})
        is_own = origin.get("model", name) == name
        if kind == "reasoning" and "claude" in name and "thinking_blocks" not in origin:
            is_own = False  # OpenRouter gives it without its signature
        is_begun_by_another = kind != "user" and (is_begun_by_another or not is_own)
        if is_empty or (kind == "reasoning" and not is_own):
            continue
        while kind == "user" and kind_of(messages[-1]) == "reasoning":
            messages.pop()  # the call that it belongs to was never answered
        last = kind_of(messages[-1])
        if kind == last and "role" in message:
            parts = parts_of(messages[-1]["content"]) + parts_of(message["content"])
            message = simplified({**messages.pop(), "content": parts})
        elif kind == "user" and last == "function_call_output":
            messages.append({"role": "assistant", "content": "The tool has given its output."})
        elif last in ("user", "function_call_output") and kind != last and needs_reasoning(name):
            # A step of the model begins. Reasoning of its own, if it has some, replaces this.
            messages.append({"type": "reasoning", "summary": [{"text": "-"}]})
        messages.append(message)
    if kind_of(messages[-1]) == "assistant":  # another turn's reply, or an action after a reply
        messages.append({"role": "user", "content": "Go on."})
    return messages[1:], is_begun_by_another


def kind_of(item: Any) -> Any:
    """Return user, assistant, reasoning, function_call or function_call_output."""
    return item.get("role", item.get("type"))


def simplified(item: Any) -> Any:
    """Return the item, which it may change, without blank texts. Only texts become a string.

    The assistant's messages stay a list, with an id: only then does openai-agents join them with
    the calls that follow, and keep their reasoning. A call's arguments become a JSON object, and
    its id nine digits: Mistral takes nine digits or letters.
    """
    if "call_id" in item:
        item["call_id"] = f"{crc32(item['call_id'].encode()) % 10**9:09}"
    if "arguments" in item:
        item["arguments"] = as_arguments(item["arguments"])
    place = "content" if "role" in item else "output"
    if place not in item:
        return item
    parts = parts_of(item[place])
    text = "\n\n".join(part["text"] for part in parts if part.get("text", "").strip())
    others = [part for part in parts if "text" not in part]
    if item.get("role") == "assistant":
        texts = [{"type": "output_text", "text": text}] if text else []
        return {"type": "message", "id": "", **item, "content": texts + others}
    return {**item, place: parts_of(text) + others if others else text}


def parts_of(content: Any) -> list[Any]:
    """Return the parts of a message or a tool's output, which may be a string."""
    if isinstance(content, str):
        return [{"type": "input_text", "text": content}] if content else []
    return content


def as_json(value: Any) -> str:
    """Return the value as JSON for the model, with all characters as they are."""
    return json.dumps(value, ensure_ascii=False)


# ---- Routes --------------------------------------------------------------------------------------


@asynccontextmanager
async def lifespan(_: FastAPI) -> AsyncIterator[None]:
    repair_libraries()
    file = ENV_FILE if ENV_FILE.is_file() else "no .env"
    logger.info("PROVIDER=%s, model %s, %s. The chat is at /chatkit", PROVIDER, model.model, file)
    if model.missing_keys:
        logger.warning("LiteLLM may need %s. mock needs no key.", " or ".join(model.missing_keys))
    if not TOKENS and request_context not in app.dependency_overrides:
        logger.warning(
            "CHATKIT_TOKENS is not set: anyone who can reach this port can read every thread."
        )
    await warm_up()
    # The garbage collector need not look at what the imports made. This saves 5 % of the CPU time.
    gc.freeze()
    yield
    await server.stop_all_turns()


async def warm_up() -> None:
    """Do what the first chat of a process does: hundreds of imports, which take a second."""
    for dummy in (
        ProviderModel(model.model, canned_reply="Warm."),
        ProviderModel(model.model, base_url="http://127.0.0.1:0", api_key="none"),
    ):
        # Some providers' clients look for credentials on the network.
        with suppress(Exception), anyio.fail_after(5):
            async for _ in Runner.run_streamed(Agent("Warm", model=dummy), "Hi.").stream_events():
                pass


async def check_origin(request: Request) -> None:
    """Refuse pages of other origins than ALLOWED_ORIGINS. It must name this server's own page, too.

    CORS alone hides the answer, after the request has run.
    """
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
app.add_middleware(
    CORSMiddleware,
    allow_origins=ALLOWED_ORIGINS,
    allow_credentials=True,
    allow_methods=["*"],
    allow_headers=["*"],
)

store = MemoryStore()  # CHANGE ME: the database, a chatkit Store
server = ChatKitServerImpl(store)


@app.exception_handler(NotFoundError)
async def not_found(request: Request, error: NotFoundError) -> Response:
    return JSONResponse({"detail": str(error)}, 404)


# CHANGE ME: who is asking. With your own login, delete TOKENS here, in `lifespan` and `app`.
async def request_context(request: Request) -> Context:
    """Return the context that the Store receives.

    {"user_id": ...} for a token in CHATKIT_TOKENS; {} if that is not set. Raises HTTPException
    (401). With a login by cookie, set ALLOWED_ORIGINS to your own pages. Browsers send cookies with
    every page's requests: with *, any page could read your users' chats.
    """
    if not TOKENS:
        return {}
    bearer = await HTTPBearer(auto_error=False)(request)
    for token, user in TOKENS.items():
        if bearer and secrets.compare_digest(token.encode(), bearer.credentials.encode()):
            return {"user_id": user}
    raise HTTPException(401, "A valid bearer token is needed.", {"WWW-Authenticate": "Bearer"})


RequestContext = Annotated[Context, Depends(request_context)]


async def request_body(request: Request) -> bytearray:
    """Return the body. Raises HTTPException (413) as soon as it exceeds MAX_BODY_BYTES."""
    body = bytearray()
    with suppress(ClientDisconnect):  # half a request is no JSON: nobody reads the answer
        async for chunk in request.stream():
            body += chunk
            if len(body) > MAX_BODY_BYTES:
                raise HTTPException(413, f"The request is longer than {MAX_BODY_BYTES} bytes.")
    return body


class EventStream(StreamingResponse):
    """The events of a turn, which is stopped when the client leaves.

    Starlette then cancels the response, and never closes an iterator that is no generator.
    """

    async def stream_response(self, send: Any) -> None:
        try:
            await super().stream_response(send)
        finally:
            await self.body_iterator.aclose()  # type: ignore[attr-defined]  # the turn


@app.post("/chatkit")
async def chatkit_endpoint(request: Request, context: RequestContext) -> Response:
    result = await server.process(await request_body(request), context)
    if isinstance(result, StreamingResult):
        # no-transform: a proxy that compresses would hold the events back.
        headers = {"Cache-Control": "no-cache, no-transform", "X-Accel-Buffering": "no"}
        return EventStream(result.json_events, media_type="text/event-stream", headers=headers)
    return Response(content=result.json, media_type="application/json")


@app.get("/health")
async def health() -> dict[str, str]:
    return {"status": "ok"}


# Debug endpoint to inspect stored items
@app.get("/debug/threads")
async def debug_threads(context: RequestContext) -> dict[str, Any]:
    result = {}
    page = Page[ThreadMetadata](has_more=True)
    while page.has_more:
        page = await server.store.load_threads(MAX_PAGE, page.after, "asc", context)
        for thread in page.data:
            items = []
            async for item in server._paginate_thread_items_reverse(thread.id, context):
                item_data: dict[str, Any] = {"id": item.id, "type": type(item).__name__}
                if item.type in ("user_message", "assistant_message") and item.content:
                    item_data["content"] = [part.text for part in item.content]
                items.append(item_data)
            result[thread.id] = {"items": items[::-1], "count": len(items)}
    return result


# CHANGE ME: more of ChatKit's options for the page, as a JavaScript object: composer, theme, ...
# https://openai.github.io/chatkit-js/api/openai/chatkit/type-aliases/chatkitoptions lists them.
PAGE_OPTIONS = "{}"
PAGE = """<!doctype html>
<meta charset="utf-8"><meta name="viewport" content="width=device-width"><title>Chat</title>
<p id="notice">Loading ChatKit from cdn.platform.openai.com ...</p>
<openai-chatkit id="chat" style="display: block; height: 98vh"></openai-chatkit>
<script>
  const url = location.origin + location.pathname;
  const options = PAGE_OPTIONS;
  async function fetchAsUser(target, init = {}) {
    const headers = new Headers(init.headers);
    const isOurs = new URL(target, url).origin === location.origin;
    if (isOurs && sessionStorage.token) headers.set("Authorization", sessionStorage.token);
    const response = await fetch(target, { ...init, headers });
    if (!isOurs || response.headers.get("WWW-Authenticate") !== "Bearer") return response;
    const token = prompt("This server needs a token (CHATKIT_TOKENS):")?.trim();
    if (!token || /[^!-~]/.test(token)) return response;
    sessionStorage.token = `Bearer ${token}`;
    return fetchAsUser(target, init);
  }
  customElements.whenDefined("openai-chatkit").then(() => {
    const api = { url, domainKey: "local-dev", fetch: fetchAsUser, ...options.api };
    chat.setOptions({ ...options, api });
    const isLocal = ["localhost", "127.0.0.1", "[::1]"].includes(location.hostname);
    if (isLocal || options.api?.domainKey) return notice.remove();
    notice.textContent = `ChatKit needs a domain key for ${location.hostname}: set api.domainKey in
      PAGE_OPTIONS. Get it at platform.openai.com/settings/organization/security/domain-allowlist`;
  });
</script>
<script src="https://cdn.platform.openai.com/deployments/chatkit/chatkit.js" async
  onerror="notice.textContent = 'ChatKit could not be loaded. It needs ' + this.src"></script>"""


@app.get("/chatkit", response_class=HTMLResponse)
async def chatkit_page() -> str:
    """Show the chat in a browser."""
    return PAGE.replace("PAGE_OPTIONS", PAGE_OPTIONS, 1)  # the second one stands in a text


# ---- Repairs -------------------------------------------------------------------------------------

# What FAILURES become: a finish reason of LiteLLM's, which its own map lacks and reads as "stop".
FAILED_END = "malformed_function_call"
FAILURES = """malformed_function_call MALFORMED_FUNCTION_CALL UNEXPECTED_TOOL_CALL
    TOO_MANY_TOOL_CALLS MISSING_THOUGHT_SIGNATURE MALFORMED_RESPONSE FINISH_REASON_UNSPECIFIED
    ERROR error network_error insufficient_system_resource"""
parse_chunk: Any = GeminiChunks.chunk_parser
uvicorn_shutdown = uvicorn.Server.shutdown


def repair_libraries() -> None:
    """Change LiteLLM and uvicorn for the whole process. The start of the server calls this."""
    # Workaround (LiteLLM, no issue known): it prints "Give Feedback / Get Help" if a call fails.
    litellm.suppress_debug_info = True
    # Workaround (LiteLLM, no issue known): it ends a stream after 100 equal chunks. A long table
    # rule has more of them.
    litellm.REPEATED_STREAMING_CHUNK_LIMIT = 1_000_000_000  # type: ignore[attr-defined]  # untyped
    # Workaround (LiteLLM, no issue known): if a provider reports no tokens, it downloads a
    # tokenizer to count them.
    litellm.disable_token_counter = True
    # Workaround (LiteLLM, no issue known): this finalizer sets context variables, which may crash
    # Python before 3.12.
    litellm.CustomStreamWrapper.__del__ = lambda stream: None
    # Workaround (LiteLLM, no issue known): a turn may be stopped while LiteLLM prepares its request
    # in a thread, and Python warns that nobody awaits the result.
    warnings.filterwarnings(
        "ignore", r"coroutine '\S*(async_streaming|acompletion\w*)' was never", RuntimeWarning
    )
    # Workaround (LiteLLM 16651): it reads these words of providers as "stop", a normal end.
    failures: Any = dict.fromkeys(FAILURES.split(), FAILED_END)
    core_helpers._FINISH_REASON_MAP.update(failures, model_length="length")
    GeminiChunks.chunk_parser = parse_gemini_chunk  # type: ignore[method-assign]
    uvicorn.Server.shutdown = shutdown_with_last_event  # type: ignore[method-assign]


def parse_gemini_chunk(self: GeminiChunks, chunk: Any) -> Any:
    """Workaround (LiteLLM 2195): it says "stop" for every chunk that gives no reason for an end.

    A reply that is cut off would seem to be complete.
    """
    parsed = parse_chunk(self, chunk)
    for choice, candidate in zip(parsed.choices, chunk.get("candidates", []), strict=False):
        if not candidate.get("finishReason"):
            choice.finish_reason = None
    # LiteLLM sets False for every chunk, and would then ignore the finish_reason.
    parsed.hidden_params["is_finished"] = True
    return parsed


async def shutdown_with_last_event(self: uvicorn.Server, sockets: Any = None) -> None:
    """Workaround (uvicorn, no issue known): it waits for the streams, and cancels them in the end.

    The turns are stopped after STOP_SECONDS, so that each client gets a last event, with
    `python main.py`, `uvicorn main:app` and `--workers` alike.
    """
    loop = asyncio.get_running_loop()
    loop.call_later(STOP_SECONDS, lambda: loop.create_task(server.stop_all_turns()))
    await uvicorn_shutdown(self, sockets)


# ---- Start ---------------------------------------------------------------------------------------


def serve() -> None:
    """Serve on HOST and PORT, with one process.

    A program may `import main`, change `main.server` (its `store`, its `agent.instructions`), and
    call this. Several processes need a database: see tests/postgres/postgres_store.py. A deletion
    stops the turns of one process only.
    """
    uvicorn.run(
        app,
        host=HOST,
        port=PORT,
        http="h11",  # it refuses headers that do not end; httptools has no limit
        timeout_graceful_shutdown=STOP_SECONDS + 5,
        workers=1,  # whatever WEB_CONCURRENCY says
    )


if __name__ == "__main__":
    serve()
