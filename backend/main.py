"""ChatKit server: OpenAI's ChatKit in front of any model that LiteLLM reaches.

Run it   make run                  (or python backend/main.py)
         make run PROVIDER=mock    canned replies: no key, no network

Routes   POST /chatkit             ChatKit's protocol: JSON, or a stream of server-sent events
         GET  /health              {"status": "ok"}
         GET  /debug/threads       {thread id: {"items": [{"id", "type", "content"?}], "count"}}

Settings PROVIDER, MODEL, MODEL_TIMEOUT, GEMINI_API_KEY, OPENAI_API_KEY, ANTHROPIC_API_KEY, HOST, PORT,
         ALLOWED_ORIGINS, CHATKIT_TOKENS: in the environment or in .env; .env.example explains each

Limits   threads live in this one process and end with it; the model sees a thread's newest HISTORY_ITEMS
         items; a request has at most MAX_BODY_BYTES
"""

import asyncio
import gc
import json
import logging
import os
import secrets
import signal
import sys
from bisect import bisect_left, bisect_right
from collections import defaultdict
from collections.abc import AsyncIterator, Iterator
from contextlib import asynccontextmanager, contextmanager, suppress
from functools import partial
from importlib.metadata import version
from itertools import dropwhile
from pathlib import Path

from dotenv import load_dotenv

ROOT_DIR = Path(__file__).resolve().parent.parent
load_dotenv(ROOT_DIR / ".env")

# ---- Settings --------------------------------------------------------------------------------------------

INSTRUCTIONS = "You are a helpful assistant."
MOCK_REPLY = "This is a canned reply from PROVIDER=mock. Set PROVIDER and its key to talk to a model."
HISTORY_ITEMS = 100  # how many of a thread's newest items the model sees
TITLE_CHARACTERS = 60
MAX_BODY_BYTES = 4 * 1024 * 1024
SILENCE_SECONDS = 15  # after which the stream says that it is alive: proxies cut one that is idle for 60
SHUTDOWN_SECONDS = 5  # how long running chats may go on after SIGTERM


def setting(name: str, default: str) -> str:
    """The variable's value; a blank one counts as unset."""
    return os.getenv(name, "").strip() or default


def number(name: str, default: str, kind: type, highest: int):
    """The variable as `kind`, above 0. Stops the start with one line if it is none."""
    with suppress(ValueError):
        if 0 < (value := kind(setting(name, default))) <= highest:
            return value
    raise SystemExit(f"{name}={setting(name, default)!r} is not a number above 0, up to {highest}.")


def parse_tokens(value: str) -> dict[str, str]:
    """{token: user} of "alice:token1,bob:token2". Stops the start with one line if it is malformed."""
    entries = [[part.strip() for part in entry.split(":", 1)] for entry in value.split(",")] if value else []
    users = {entry[-1]: entry[0] for entry in entries}
    if len(users) < len(entries) or any(len(entry) != 2 or not all(entry) for entry in entries):
        raise SystemExit("CHATKIT_TOKENS is not of the form user:token,user:token, each token once.")
    return users


PROVIDER = setting("PROVIDER", "gemini").lower()
MODEL = setting("MODEL", "auto")
MODEL_TIMEOUT = number("MODEL_TIMEOUT", "120", float, 86_400)  # seconds of a model's silence
HOST = setting("HOST", "0.0.0.0")
PORT = number("PORT", "8000", int, 65_535)
ALLOWED_ORIGINS = [origin.strip() for origin in setting("ALLOWED_ORIGINS", "*").split(",")]
TOKENS = parse_tokens(setting("CHATKIT_TOKENS", ""))

logger = logging.getLogger("uvicorn.error")  # the one that uvicorn shows

# ---- Libraries -------------------------------------------------------------------------------------------
# Imported after the settings: they take seconds, and they read these two from the environment. LiteLLM fetches
# its price map from the internet, and openai-agents uploads traces of prompts and replies to OpenAI, unless told.
os.environ.setdefault("LITELLM_LOCAL_MODEL_COST_MAP", "True")
os.environ.setdefault("OPENAI_AGENTS_DISABLE_TRACING", "true")
gc.disable()  # searching the imports' 400 000 objects for garbage takes a third of the start

import anyio
import litellm
from agents import Agent, ModelBehaviorError, ModelRefusalError, ModelSettings, Runner, RunResultStreaming
from agents import InputGuardrailTripwireTriggered, OutputGuardrailTripwireTriggered
from agents.extensions.models.litellm_model import LitellmModel
from chatkit.agents import AgentContext, ThreadItemConverter, stream_agent_response
from chatkit.errors import CustomStreamError, ErrorCode
from chatkit.server import ChatKitServer, NonStreamingResult, StreamingResult
from chatkit.store import NotFoundError, Store, StoreItemType, default_generate_id
from chatkit.types import (
    AssistantMessageContent, AssistantMessageItem, Attachment, ChatKitReq, ClientToolCallItem, ErrorEvent, Page,
    ProgressUpdateEvent, ThreadItem, ThreadItemAddedEvent, ThreadItemDoneEvent, ThreadItemRemovedEvent,
    ThreadItemUpdatedEvent, ThreadMetadata, ThreadStreamEvent, UserMessageInput, UserMessageItem,
    UserMessageTagContent, WorkflowItem, is_streaming_req,
)  # fmt: skip
from fastapi import Depends, FastAPI, HTTPException, Request
from fastapi.middleware.cors import CORSMiddleware
from fastapi.responses import JSONResponse, Response, StreamingResponse
from pydantic import BaseModel, TypeAdapter, ValidationError
from starlette.requests import ClientDisconnect

gc.freeze()  # and, again and again, a tenth of every stream
gc.enable()

# ---- Store -----------------------------------------------------------------------------------------------

THREAD, ITEM, ATTACHMENT = TypeAdapter(ThreadMetadata), TypeAdapter(ThreadItem), TypeAdapter(Attachment)


class Rows:
    """JSON rows by id, in the order of their first put.

    Each has a number, and numbers only grow: bisection finds a row's place, so that a page costs the same
    however many rows there are.
    """

    def __init__(self) -> None:
        self.rows: dict[str, tuple[int, bytes]] = {}  # id -> (number, row)
        self.ids: list[str] = []  # by number

    def put(self, row: BaseModel, **options) -> None:
        """Add the row, or replace the one of its id where it stands."""
        if row.id in self.rows:
            number = self.rows[row.id][0]
        else:
            number = self.rows[self.ids[-1]][0] + 1 if self.ids else 0
            self.ids.append(row.id)
        self.rows[row.id] = number, row.model_dump_json(**options).encode()

    def remove(self, id: str) -> None:
        if id in self.rows:
            del self.ids[self._place(id, bisect_left)]
            del self.rows[id]

    def page(self, adapter: TypeAdapter, after: str | None, limit: int, order: str) -> Page:
        """At most `limit` rows beyond the one called `after`. Raises KeyError if there is none."""
        limit = max(limit, 1)
        if order == "desc":
            stop = self._place(after, bisect_left) if after else len(self.ids)
            ids, more = self.ids[max(stop - limit, 0) : stop][::-1], stop > limit
        else:
            start = self._place(after, bisect_right) if after else 0
            ids, more = self.ids[start : start + limit], start + limit < len(self.ids)
        data = [adapter.validate_json(self.rows[id][1]) for id in ids]
        return Page(data=data, has_more=more, after=ids[-1] if more else None)

    def _place(self, id: str, bisect) -> int:
        return bisect(self.ids, self.rows[id][0], key=lambda id: self.rows[id][0])


class ThreadState:
    def __init__(self, owner: str | None) -> None:
        self.owner = owner
        self.rows = Rows()

    @property
    def items(self) -> list[ThreadItem]:
        return [ITEM.validate_json(self.rows.rows[id][1]) for id in self.rows.ids]


class MemoryStore(Store[dict]):
    """chatkit's Store in memory: the class to replace by a database (tests/test_store.py is its contract).

    The request context is {} or {"user_id": ...}: each user sees their own threads and attachments only. What
    is missing raises NotFoundError, an unknown cursor too; a missing thread has an empty page of items;
    deleting what is not there does nothing. Rows are JSON, so nothing stored is shared with a caller.
    """

    def __init__(self) -> None:
        self._threads: dict[str, ThreadState] = {}
        self._threads_of: defaultdict[str | None, Rows] = defaultdict(Rows)
        self._attachments_of: defaultdict[str | None, Rows] = defaultdict(Rows)

    def generate_thread_id(self, context: dict) -> str:
        return unique_id("thread")

    def generate_item_id(self, item_type: StoreItemType, thread: ThreadMetadata, context: dict) -> str:
        return unique_id(item_type)

    async def load_thread(self, thread_id: str, context: dict) -> ThreadMetadata:
        with missing("Thread", thread_id):
            return THREAD.validate_json(self._threads_of[owner(context)].rows[thread_id][1])

    async def save_thread(self, thread: ThreadMetadata, context: dict) -> None:
        if self._threads.setdefault(thread.id, ThreadState(owner(context))).owner != owner(context):
            raise NotFoundError(f"Thread {thread.id} not found")
        self._threads_of[owner(context)].put(thread, exclude={"items"})  # chatkit also hands over whole Threads

    async def load_threads(self, limit: int, after: str | None, order: str, context: dict) -> Page[ThreadMetadata]:
        with missing("Thread", after):
            return self._threads_of[owner(context)].page(THREAD, after, limit, order)

    async def delete_thread(self, thread_id: str, context: dict) -> None:
        if thread_id in self._threads_of[owner(context)].rows:
            self._threads_of[owner(context)].remove(thread_id)
            del self._threads[thread_id]

    async def load_thread_items(
        self, thread_id: str, after: str | None, limit: int, order: str, context: dict
    ) -> Page[ThreadItem]:
        if thread_id not in self._threads_of[owner(context)].rows:
            return Page()
        with missing("Item", after):
            return self._threads[thread_id].rows.page(ITEM, after, limit, order)

    async def add_thread_item(self, thread_id: str, item: ThreadItem, context: dict) -> None:
        self._items(thread_id, context).put(item)

    async def save_item(self, thread_id: str, item: ThreadItem, context: dict) -> None:
        self._items(thread_id, context).put(item)

    async def load_item(self, thread_id: str, item_id: str, context: dict) -> ThreadItem:
        items = self._items(thread_id, context)
        with missing("Item", item_id):
            return ITEM.validate_json(items.rows[item_id][1])

    async def delete_thread_item(self, thread_id: str, item_id: str, context: dict) -> None:
        with suppress(NotFoundError):
            self._items(thread_id, context).remove(item_id)

    async def save_attachment(self, attachment: Attachment, context: dict) -> None:
        self._attachments_of[owner(context)].put(attachment)

    async def load_attachment(self, attachment_id: str, context: dict) -> Attachment:
        with missing("Attachment", attachment_id):
            return ATTACHMENT.validate_json(self._attachments_of[owner(context)].rows[attachment_id][1])

    async def delete_attachment(self, attachment_id: str, context: dict) -> None:
        self._attachments_of[owner(context)].remove(attachment_id)

    def _items(self, thread_id: str, context: dict) -> Rows:
        if thread_id not in self._threads_of[owner(context)].rows:
            raise NotFoundError(f"Thread {thread_id} not found")
        return self._threads[thread_id].rows


def owner(context: dict) -> str | None:
    return context.get("user_id")


@contextmanager
def missing(name: str, id: str | None) -> Iterator[None]:
    """A KeyError inside comes out as chatkit's NotFoundError."""
    try:
        yield
    except KeyError:
        raise NotFoundError(f"{name} {id} not found") from None


def unique_id(item_type: StoreItemType) -> str:
    """chatkit's prefix and 128 random bits. Of its own 32, two are the same in 77 000 threads as likely as not."""
    return f"{default_generate_id(item_type).split('_')[0]}_{secrets.token_hex(16)}"


# ---- Model -----------------------------------------------------------------------------------------------

# What MODEL=auto stands for. The template's gemini-2.0-flash and claude-3-sonnet-20240229 are shut down.
DEFAULT_MODELS = {"gemini": "gemini-flash-latest", "openai": "gpt-4o", "anthropic": "claude-sonnet-4-6"}
DEFAULT_MODELS["mock"] = DEFAULT_MODELS["openai"]


def litellm_name(provider: str, model: str) -> str:
    """LiteLLM's name of the model, provider/model. Stops the start with one line if there is none."""
    known = ", ".join(DEFAULT_MODELS)
    if provider not in DEFAULT_MODELS and provider not in litellm.provider_list:
        raise SystemExit(f"PROVIDER={provider!r} is unknown: use {known}, or with MODEL any other of LiteLLM's.")
    if model == "auto" and provider not in DEFAULT_MODELS:
        raise SystemExit(f"PROVIDER={provider} has no default model: set MODEL.")
    prefix = "openai" if provider == "mock" else provider
    return f"{prefix}/{(DEFAULT_MODELS[provider] if model == 'auto' else model).removeprefix(prefix + '/')}"


def missing_key(provider: str, model: str) -> str | None:
    """The API key variable that the provider needs and the environment lacks."""
    for name in [name for name in os.environ if name.endswith("_API_KEY") and not os.environ[name].strip()]:
        del os.environ[name]  # LiteLLM takes a blank key for a key
    names = [] if provider == "mock" else litellm.validate_environment(model)["missing_keys"]
    return next((name for name in reversed(names) if name.endswith("_API_KEY")), None)


litellm.suppress_debug_info = True  # no "Give Feedback / Get Help" in the log
MODEL_NAME = litellm_name(PROVIDER, MODEL)
MISSING_KEY = missing_key(PROVIDER, MODEL_NAME)

# The newest openai-agents get LiteLLM 1.83: later ones want an older openai. It takes a connection that broke
# for the end of the reply, unless its transport is httpx's. (Not needed from 1.106 on, and slower.)
OLD_LITELLM = tuple(map(int, version("litellm").split(".")[:2])) < (1, 106)
litellm.disable_aiohttp_transport = OLD_LITELLM


class BrokenReply(Exception):
    """The stream of a reply ended before the reply did."""


class NoReply(Exception):
    """The provider answered, but not with a stream of its kind."""


class EmptyReply(Exception):
    """A turn ended without a text, a tool call or anything else to see."""


KEY_NAME = f"{PROVIDER.upper()}_API_KEY"
FILTERED = litellm.ContentPolicyViolationError, ModelRefusalError
GUARDRAILS = InputGuardrailTripwireTriggered, OutputGuardrailTripwireTriggered
TURN_FAULTS = ModelRefusalError, ModelBehaviorError, EmptyReply, *GUARDRAILS  # of a turn, not of one request
FAULTS = [  # errors; HTTP statuses; what the person in the chat reads; whether to try again may help
    (litellm.AuthenticationError, {401, 403}, f"The AI provider refused the key. Check {KEY_NAME}.", False),
    (litellm.NotFoundError, {404}, f"The AI provider does not know the model {MODEL_NAME}. Check MODEL.", False),
    (litellm.RateLimitError, {429}, "The AI provider limits the rate of requests. Wait a moment and try again.", True),
    (litellm.ContextWindowExceededError, {413}, "This conversation is too long. Start a new thread.", False),
    (FILTERED, {}, "The AI provider's content filter stopped this.", False),
    (GUARDRAILS, {}, "This server's rules do not allow this. Put it differently.", False),
    ((TimeoutError, litellm.Timeout), {408}, "The AI provider was silent for too long: it timed out. Try again.", True),
    (BrokenReply, {}, "The reply was cut off: the connection to the AI provider broke. Try again.", True),
    ((NoReply, ModelBehaviorError), {}, "The AI provider's answer was not understood. Try again.", True),
    (EmptyReply, {}, "The AI provider's reply was empty. Try again.", True),
    (litellm.APIConnectionError, range(500, 600), "The AI provider is unavailable. Try again later.", True),
    (litellm.BadRequestError, range(400, 500), "The AI provider refused this request. Start a new thread.", False),
]


class ProviderFault(CustomStreamError):
    """A fault in words for the person in the chat."""

    # Otherwise openai-agents raises an error ahead of the deltas that came before it.
    _agents_drain_queued_stream_events = True


@contextmanager
def faults_explained(errors: type | tuple = Exception) -> Iterator[None]:
    """Of these errors, the faults above come out as ProviderFault, their cause in the log. All others pass."""
    try:
        yield
    except CustomStreamError:
        raise
    except errors as error:
        causes = [error]  # LiteLLM wraps errors, and the status that tells is not always the outermost
        while cause := causes[-1].__cause__ or causes[-1].__context__:
            causes.append(cause)
        for types, statuses, message, allow_retry in FAULTS:
            for cause in causes:
                if isinstance(cause, types) or getattr(cause, "status_code", None) in statuses:
                    logger.error("%s (%s: %s)", message, type(cause).__name__, redacted(str(cause)))
                    raise ProviderFault(message, allow_retry=allow_retry) from error
        raise


def redacted(text: str) -> str:
    """The text on one line, without any API key of the environment."""
    for name in os.environ:
        if name.endswith("_API_KEY"):
            text = text.replace(os.environ[name], "***")
    return " ".join(text.split())[:500]


class ProviderModel(LitellmModel):
    """LitellmModel with faults explained, and with streams that are timed, fair, and whole or a fault."""

    async def _fetch_response(self, *args, **kwargs):
        with faults_explained(), anyio.fail_after(MODEL_TIMEOUT):
            fetched = await super()._fetch_response(*args, **kwargs)
        if not kwargs.get("stream"):
            return fetched
        response, stream = fetched
        if OLD_LITELLM and stream.make_call:
            stream.make_call = partial(finite_chunks, stream.make_call)
        return response, self._chunks(stream)

    async def _chunks(self, stream: litellm.CustomStreamWrapper) -> AsyncIterator[litellm.ModelResponseStream]:
        with faults_explained():
            try:
                while True:
                    with anyio.fail_after(MODEL_TIMEOUT):
                        chunk = await anext(stream, None)
                    if chunk is None:
                        break
                    # LiteLLM hands over buffered chunks without a pause: with a fast provider no other chat
                    # gets a turn, and nothing of this one is sent, before the reply's end.
                    await asyncio.sleep(0)
                    yield chunk
            except litellm.exceptions.MidStreamFallbackError as error:
                if error.is_pre_first_chunk:
                    raise
                raise BrokenReply(error) from error
            finally:
                await asyncio.shield(close(stream))  # a second cancellation would leave it half done
            finish_reason = stream.received_finish_reason or stream.intermittent_finish_reason
            if finish_reason == "content_filter":
                raise litellm.ContentPolicyViolationError(finish_reason, self.model, PROVIDER)
            if finish_reason is None:  # LiteLLM takes the end of any body for the end of a reply
                raise BrokenReply if stream.response_uptil_now else NoReply


async def close(stream: litellm.CustomStreamWrapper) -> None:
    """Close the provider's connection. LiteLLM closes none of Anthropic's: the lines hold it."""
    lines = getattr(stream.completion_stream, "streaming_response", None)
    await stream.aclose()
    if hasattr(lines, "aclose"):
        await lines.aclose()


async def finite_chunks(make_call, **options) -> AsyncIterator:
    """The old LiteLLM's chunks of a Gemini stream, without the None that it returns for ever after a web page."""

    async def finite(chunks: AsyncIterator) -> AsyncIterator:
        nothing = 0
        async for chunk in chunks:
            nothing = nothing + 1 if chunk is None else 0
            if nothing > 10_000:
                return
            if chunk is not None:
                yield chunk

    return finite(await make_call(**options))


model = (LitellmModel if PROVIDER == "mock" else ProviderModel)(model=MODEL_NAME)

# ---- Server ----------------------------------------------------------------------------------------------

REQUEST = TypeAdapter(ChatKitReq)
# What a user of this file has to write before the operation can be served, and the item that it is about.
ACTION, SYNC_ACTION = "threads.custom_action", "threads.sync_custom_action"
HANDLERS = {ACTION: "action", SYNC_ACTION: "sync_action", "input.transcribe": "transcribe"}
ITEM_TYPES = {
    ACTION: "widget",
    SYNC_ACTION: "widget",
    "threads.retry_after_item": "user_message",
    "threads.add_structured_input": "structured_input",
}


class Converter(ThreadItemConverter):
    """chatkit's converter of thread items to the model's input, with two gaps closed."""

    async def assistant_message_to_input(self, item: AssistantMessageItem):
        # chatkit makes `output_text` parts, which openai-agents refuses on its way to LiteLLM ("Unknown
        # content"): the second message of every conversation would fail.
        text = "".join(part.text for part in item.content)
        return {"type": "message", "role": "assistant", "content": text} if text else None

    async def tag_to_message_content(self, tag: UserMessageTagContent):
        return {"type": "input_text", "text": f"{tag.text}: {json.dumps({'id': tag.id, **tag.data})}"}


class RunEvents:
    """A run for stream_agent_response that can be cancelled while an event is awaited.

    chatkit's _merge_generators then forgets the task that waits, and asyncio complains of its outcome ("Task
    exception was never retrieved"). So this makes the task, and looks at its outcome.
    """

    def __init__(self, result: RunResultStreaming) -> None:
        self.result = result
        self.events = result.stream_events()
        self.next: asyncio.Future | None = None

    def stream_events(self) -> "RunEvents":
        return self

    def __anext__(self) -> asyncio.Future:
        self.next = asyncio.ensure_future(anext(self.events))
        return self.next

    def cancel(self) -> None:
        """End the run, or the provider goes on, and is paid, to the end of the reply."""
        if self.next:
            self.next.add_done_callback(lambda task: task.cancelled() or task.exception())
        self.result.cancel()


class ChatKitServerImpl(ChatKitServer[dict]):
    def __init__(self, store: Store[dict]) -> None:
        super().__init__(store)
        self.converter = Converter()
        options = {"mock_response": MOCK_REPLY} if PROVIDER == "mock" else {"max_retries": 0}
        self.agent = Agent[AgentContext](
            name="Assistant", instructions=INSTRUCTIONS, model=model, model_settings=ModelSettings(extra_args=options)
        )

    async def process(self, request: bytes, context: dict) -> StreamingResult | NonStreamingResult:
        """Answer a request. Raises HTTPException (400) or NotFoundError before anything is stored."""
        try:
            parsed = REQUEST.validate_json(request)
        except ValidationError as error:
            problem = error.errors(include_url=False, include_input=False)[0]
            place = ".".join(map(str, problem["loc"]))
            raise HTTPException(400, f"{place}: {problem['msg']}".removeprefix(": ")[:300]) from None
        await self.check(parsed, context)
        # Not super().process(), which makes the TypeAdapter anew, some 20 ms, for every request.
        if is_streaming_req(parsed):
            return StreamingResult(self._process_streaming(parsed, context))
        return NonStreamingResult(await self._process_non_streaming(parsed, context))

    async def check(self, request: ChatKitReq, context: dict) -> None:
        """Refuse what chatkit would answer with a 500, with a broken stream, or with nothing at all."""

        def require(condition: object, reason: str) -> None:
            if not condition:
                raise HTTPException(400, reason)

        kind, params = request.type, request.params
        handler = HANDLERS.get(kind)
        handled = not handler or getattr(type(self), handler) is not getattr(ChatKitServer, handler)
        require(handled, f"{kind} is not supported by this server.")
        require(self.attachment_store or not kind.startswith("attachments."), "Attachments are not configured.")
        require((getattr(params, "limit", None) or 1) > 0, "limit must be at least 1.")

        thread_id = getattr(params, "thread_id", None)
        if thread_id is not None:
            await self.store.load_thread(thread_id, context)
        item_id = getattr(params, "item_id", None)
        for id in getattr(params, "item_ids", [] if item_id is None else [item_id]):
            item = await self.store.load_item(thread_id, id, context)
            require(item.type == ITEM_TYPES.get(kind, item.type), f"Item {id} is not a {ITEM_TYPES.get(kind)}.")
            if kind == "threads.add_structured_input":
                require(item.status == "pending", f"Item {id} is not pending.")
        if kind == "threads.add_client_tool_output":
            newest = await self.store.load_thread_items(thread_id, None, 1, "desc", context)
            pending = [item for item in newest.data if item.type == "client_tool_call" and item.status == "pending"]
            require(pending, "No client tool call is pending in this thread.")
        if isinstance(message := getattr(params, "input", None), UserMessageInput):
            require(message_text(message) or message.attachments, "The message is empty.")
            for attachment_id in message.attachments:
                await self.store.load_attachment(attachment_id, context)

    async def respond(
        self, thread: ThreadMetadata, input: UserMessageItem | None, context: dict
    ) -> AsyncIterator[ThreadStreamEvent]:
        """Stream the agent's reply to the thread, which `input` is already stored in.

        What was shown of a reply that fails is stored. Raises CustomStreamError with a message for the chat.
        """
        if thread.title is None and input:
            thread.title = message_text(input)[:TITLE_CHARACTERS] or None  # chatkit saves and sends it
        if MISSING_KEY:
            raise CustomStreamError(f"This server has no {MISSING_KEY}. Set it, or try PROVIDER=mock.")
        agent_context = AgentContext(thread=thread, store=self.store, request_context=context)
        result = Runner.run_streamed(self.agent, await self.history(thread, context), context=agent_context)
        run, answered = RunEvents(result), False
        unfinished: dict[str, ThreadItem] = {}
        texts: defaultdict[str, str] = defaultdict(str)
        with faults_explained(TURN_FAULTS):  # the rest, as a bug in a tool, is the server's own
            try:
                async for event in self.with_unique_ids(stream_agent_response(agent_context, run), thread, context):
                    match event:
                        case ThreadItemAddedEvent(item=item):
                            unfinished[item.id] = item
                        case ThreadItemUpdatedEvent(item_id=item_id, update=update):
                            texts[item_id] += getattr(update, "delta", "")
                        case ThreadItemDoneEvent(item=item):
                            unfinished.pop(item.id, None)
                            answered = answered or item.type != "workflow"
                        case ThreadItemRemovedEvent(item_id=item_id):
                            unfinished.pop(item_id, None)
                    yield event
                if not answered:
                    raise EmptyReply
            except Exception:
                for item in unfinished.values():
                    if isinstance(item, AssistantMessageItem):
                        item.content = [AssistantMessageContent(text=texts[item.id])]
                    if isinstance(item, AssistantMessageItem | WorkflowItem):
                        yield ThreadItemDoneEvent(item=item)
                raise
            finally:
                run.cancel()
                # chatkit's _merge_generators leaves a queue getter behind ("Task was destroyed"): one more
                # event, which nobody sees, ends it.
                await agent_context.stream(ProgressUpdateEvent(text=""))

    async def with_unique_ids(
        self, events: AsyncIterator[ThreadStreamEvent], thread: ThreadMetadata, context: dict
    ) -> AsyncIterator[ThreadStreamEvent]:
        """The events of one turn, each message and client tool call under an id of its own.

        Through LiteLLM all of them carry openai-agents' placeholder `__fake_id__`, and the next would
        overwrite the last. Items whose id is the store's (workflows, widgets) keep it.
        """
        id_mapping: defaultdict[str, list[str]] = defaultdict(list)  # the model's id -> ours, the newest last
        async for event in events:
            match event:
                case ThreadItemAddedEvent(item=AssistantMessageItem() as item):
                    id_mapping[item.id].append(self.store.generate_item_id("message", thread, context))
                    item.id = id_mapping[item.id][-1]
                case ThreadItemUpdatedEvent(item_id=old_id) if old_id in id_mapping:
                    event.item_id = id_mapping[old_id][-1]
                case ThreadItemDoneEvent(item=AssistantMessageItem() as item) if item.id in id_mapping:
                    item.id = id_mapping[item.id][-1]
                case ThreadItemDoneEvent(item=ClientToolCallItem(id="__fake_id__") as item):
                    item.id = self.store.generate_item_id("tool_call", thread, context)
                case ThreadItemRemovedEvent(item_id="__fake_id__"):  # a guardrail tripped: the whole turn goes
                    for new_id in id_mapping["__fake_id__"]:
                        yield ThreadItemRemovedEvent(item_id=new_id)
                    continue
            yield event

    async def history(self, thread: ThreadMetadata, context: dict) -> list:
        """The model's input: the thread's newest items, oldest first, from a user message on."""
        page = await self.store.load_thread_items(thread.id, None, HISTORY_ITEMS, "desc", context)
        items = page.data[::-1]
        # Some providers refuse a conversation that the assistant begins.
        from_user = list(dropwhile(lambda item: item.type != "user_message", items))
        return await self.converter.to_agent_input(from_user or items)

    async def handle_stream_cancelled(
        self, thread: ThreadMetadata, pending_items: list[ThreadItem], context: dict
    ) -> None:
        """Store what was shown when the client stopped or left: the thoughts here, the text in chatkit."""
        with suppress(NotFoundError):  # the thread was deleted meanwhile
            for item in pending_items:
                if isinstance(item, WorkflowItem):
                    await self.store.add_thread_item(thread.id, item, context)
            await super().handle_stream_cancelled(thread, pending_items, context)


def message_text(message: UserMessageItem | UserMessageInput) -> str:
    """What the user typed, on one line."""
    return " ".join(" ".join(part.text for part in message.content).split())


# ---- Routes ----------------------------------------------------------------------------------------------


@asynccontextmanager
async def lifespan(app: FastAPI) -> AsyncIterator[None]:
    logger.info("Model: %s", "canned replies (PROVIDER=mock)" if PROVIDER == "mock" else MODEL_NAME)
    if MISSING_KEY:
        logger.warning("%s is not set: every chat gets an error. PROVIDER=mock needs no key.", MISSING_KEY)
    if not TOKENS:
        logger.warning("CHATKIT_TOKENS is not set: anyone who can reach this port can read every thread.")
    yield


app = FastAPI(title="ChatKit Server", lifespan=lifespan)
app.add_middleware(
    CORSMiddleware, allow_origins=ALLOWED_ORIGINS, allow_credentials=True, allow_methods=["*"], allow_headers=["*"]
)

store = MemoryStore()
server = ChatKitServerImpl(store)


def request_context(request: Request) -> dict:
    """Who is asking, as the Store receives it: put your own login here.

    {"user_id": ...} of a token in CHATKIT_TOKENS; {} if that is not set. Raises HTTPException (401).
    """
    if not TOKENS:
        return {}
    scheme, _, given = request.headers.get("authorization", "").partition(" ")
    users = [user for token, user in TOKENS.items() if secrets.compare_digest(token.encode(), given.encode())]
    if scheme.lower() != "bearer" or not users:
        raise HTTPException(401, "A valid bearer token is needed.", headers={"WWW-Authenticate": "Bearer"})
    return {"user_id": users[0]}


async def request_body(request: Request) -> bytes:
    """The body. Raises HTTPException: 413 as soon as it is longer than MAX_BODY_BYTES, 400 if it breaks off."""
    body = bytearray()
    try:
        async for chunk in request.stream():
            body += chunk
            if len(body) > MAX_BODY_BYTES:
                raise HTTPException(413, f"The request is longer than {MAX_BODY_BYTES} bytes.")
    except ClientDisconnect:
        raise HTTPException(400, "The request broke off.") from None
    return bytes(body)


def sse(event: ThreadStreamEvent) -> bytes:
    return b"data: " + event.model_dump_json(exclude_none=True).encode() + b"\n\n"


STILL_WORKING = sse(ProgressUpdateEvent(text="Still working…"))


class EventStream(StreamingResponse):
    """chatkit's events, read in a task of their own, with a sign of life where they fail to come.

    When the client leaves, Starlette drops the response wherever it is, mostly where it sends. chatkit stores
    what was shown only if the cancellation reaches it where it waits for the model: this task waits nowhere else.
    """

    def __init__(self, result: StreamingResult) -> None:
        headers = {"Cache-Control": "no-cache", "X-Accel-Buffering": "no"}
        super().__init__(self.events(), media_type="text/event-stream", headers=headers)
        self.queue: asyncio.Queue[bytes | None] = asyncio.Queue()
        self.reader = asyncio.create_task(self.read(result))

    async def read(self, result: StreamingResult) -> None:
        try:
            async for event in result:
                self.queue.put_nowait(event)
        except Exception:  # chatkit has logged it
            self.queue.put_nowait(sse(ErrorEvent(code=ErrorCode.STREAM_ERROR, allow_retry=True)))
        finally:
            self.queue.put_nowait(None)

    async def events(self) -> AsyncIterator[bytes]:
        event = b""
        while event is not None:
            event = STILL_WORKING
            with anyio.move_on_after(SILENCE_SECONDS):
                event = await self.queue.get()
            if event:
                yield event

    async def __call__(self, scope, receive, send) -> None:
        try:
            await super().__call__(scope, receive, send)
        finally:
            self.reader.cancel()
            await asyncio.wait([self.reader])


@app.exception_handler(NotFoundError)
async def not_found(request: Request, error: NotFoundError):
    return JSONResponse({"detail": str(error)}, status_code=404)


@app.post("/chatkit")
async def chatkit_endpoint(request: Request, context: dict = Depends(request_context)):
    result = await server.process(await request_body(request), context)
    if isinstance(result, StreamingResult):
        return EventStream(result)
    return Response(content=result.json, media_type="application/json")


@app.get("/health")
async def health():
    return {"status": "ok"}


@app.get("/debug/threads")
async def debug_threads(context: dict = Depends(request_context)):
    result = {}
    for thread_id, state in store._threads.items():
        if state.owner != owner(context):
            continue
        items = []
        for item in state.items:
            item_data = {"id": item.id, "type": type(item).__name__}
            if hasattr(item, "content") and item.content:
                item_data["content"] = [part.text for part in item.content if hasattr(part, "text")]
            items.append(item_data)
        result[thread_id] = {"items": items, "count": len(items)}
    return result


# ---- Start -----------------------------------------------------------------------------------------------

if __name__ == "__main__":
    import uvicorn

    # uvicorn raises the signal again after its shutdown, and the exit code would not be 0.
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(0))
    # One worker, whatever WEB_CONCURRENCY says: each would have a memory of its own.
    uvicorn.run(app, host=HOST, port=PORT, workers=1, timeout_graceful_shutdown=SHUTDOWN_SECONDS)
