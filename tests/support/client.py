"""What the tests drive the server with: its process, and a small ChatKit client."""

import asyncio
import importlib.util
import json
import os
import re
import signal
import socket
import ssl
import subprocess
import sys
import threading
import time
from contextlib import contextmanager
from itertools import chain
from pathlib import Path
from unittest.mock import patch

import httpx
from chatkit.types import ThreadStreamEvent
from pydantic import TypeAdapter

from forked import Forked

PATH = os.environ["PATH"]
SUPPORT = Path(__file__).resolve().parent
EXAMPLES = SUPPORT.parent / "examples"
POSTGRES = SUPPORT.parent / "postgres"
ROOT = SUPPORT.parent.parent
MAIN = ROOT / "backend" / "main.py"
# By default each client of httpx loads all certificates, which takes 26 ms.
NO_TLS = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
START = '\nif __name__ == "__main__":'
LOGIN = "\nfrom users import logged_in\n\napp.dependency_overrides[request_context] = logged_in\n"
EVENT: TypeAdapter[ThreadStreamEvent] = TypeAdapter(ThreadStreamEvent)


def recipe_path(name: str) -> Path:
    """A recipe, or a file of yours beside the Makefile, which is run where it stands."""
    mine = ROOT / f"{name}.py"
    return mine if mine.exists() else EXAMPLES / f"{name}.py"


def changed(code: str, changes: dict[str, str]) -> str:
    for old, new in changes.items():
        assert code.count(old) == 1, old
        code = code.replace(old, new)
    return code


def write_main(folder: Path, changes: dict[str, str] | None) -> Path:
    """A copy of main.py in this folder. `changes` are parts of it and what replaces them."""
    # Whichever store it has: you may have followed the README.
    code = MAIN.read_text()
    if "class MemoryStore" in code:
        pattern = r"^store\b *[:=].*(\n[ )].*)*"
        code, count = re.subn(pattern, "store = MemoryStore()", code, flags=re.M)
        assert count == 1, f"One line of main.py should begin with `store =`, not {count}."
    path = folder / "backend" / "main.py"
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(changed(code, changes or {}))
    return path


def load_main(
    folder: Path, settings: dict[str, str] | None = None, changes: dict[str, str] | None = None
):
    """main.py as a module of this process. PROVIDER is mock unless `settings` say otherwise."""
    spec = importlib.util.spec_from_file_location("main", write_main(folder, changes))
    module = importlib.util.module_from_spec(spec)
    environment = {"PATH": PATH, "HOME": str(folder), "PROVIDER": "mock", **(settings or {})}
    imported = sys.modules.get("main", module)
    sys.modules["main"] = module  # pydantic looks for the names of annotations there
    try:
        with patch.dict(os.environ, environment, clear=True):
            spec.loader.exec_module(module)
    finally:
        sys.modules["main"] = imported
    return module


def free_port() -> int:
    with socket.create_server(("127.0.0.1", 0)) as listener:
        return listener.getsockname()[1]


class Server:
    """`python backend/main.py`, or a `program`, in a folder and an environment of its own.

    With `fork`: a fork of a process that has done the imports (forked.py).
    With `workers`: `uvicorn --workers` with the program's `app`.
    Without `login`, main.py keeps its own instead of that of the tests (users.py)."""

    def __init__(
        self,
        folder: Path,
        environment: dict[str, str],
        program: Path | None = None,
        fork: bool = False,
        changes: dict[str, str] | None = None,
        workers: int = 0,
        login: bool = True,
    ):
        main = write_main(folder, (changes or {}) | ({START: LOGIN + START} if login else {}))
        self.workers = workers or 1
        self.port = free_port()
        self.url = f"http://127.0.0.1:{self.port}"
        self.log: list[str] = []
        self.news = threading.Condition()
        command = [sys.executable, str(program or main)]
        if workers:
            served = program or main
            command[1:] = ["-m", "uvicorn", f"{served.stem}:app", "--workers", str(workers)]
            command += ["--app-dir", str(served.parent), "--port", str(self.port)]
        # This copy of main.py, and not yours with its .env.
        folders = (SUPPORT / "only_loopback", main.parent, EXAMPLES, POSTGRES, SUPPORT)
        self.environment = {
            "PATH": PATH,
            "HOME": str(folder),
            "PYTHONPATH": os.pathsep.join(map(str, folders)),
            "PYTHONUNBUFFERED": "1",
            # What Python will drop is an error in main.py.
            "PYTHONWARNINGS": f"error::DeprecationWarning:{'main' if program else '__main__'}",
            "HOST": "127.0.0.1",
            "PORT": str(self.port),
            **environment,
        }
        if fork:
            self.process = Forked(command[1:], self.environment, folder)
        else:
            self.process = subprocess.Popen(
                command, cwd=folder, env=self.environment, stdout=-1, stderr=-2, text=True
            )
        self.reader = threading.Thread(target=self.read, daemon=True)
        self.reader.start()

    def read(self) -> None:
        for line in chain(self.process.stdout, ["(end of log)"]):
            with self.news:
                self.log.append(line.rstrip("\n"))
                self.news.notify_all()

    def wait_for(self, text: str, times: int = 1, seconds: float = 60) -> str:
        """The log once it holds `text`, so many times."""

        def found() -> int:
            return "\n".join(self.log).count(text)

        with self.news:
            self.news.wait_for(lambda: found() >= times or "(end of log)" in self.log, seconds)
        assert found() >= times, self.log
        return "\n".join(self.log)

    def started(self) -> "Server":
        self.wait_for("Uvicorn running on")
        self.wait_for("Application startup complete", self.workers)
        return self

    def stop(self, number: int = signal.SIGTERM, seconds: float = 20) -> int:
        """End the process; its exit code."""
        if self.process.poll() is None:
            self.process.send_signal(number)
        try:
            return self.process.wait(seconds)
        finally:
            self.process.kill()
            self.reader.join(5)

    @contextmanager
    def no_new(self, *texts: str):
        """None of these texts comes into the log inside the block."""
        start = len(self.log)
        yield
        log = "\n".join(self.log[start:])
        for text in texts:
            assert text not in log, log


def processes(server) -> list[int]:
    """The server's process and its workers'."""
    pid = server.process.pid
    return [pid, *map(int, Path(f"/proc/{pid}/task/{pid}/children").read_text().split())]


def memory(server, *pids: int) -> int:
    """The resident memory of the server's processes, or of those of them, in KiB."""
    status = "".join(Path(f"/proc/{pid}/status").read_text() for pid in pids or processes(server))
    return sum(int(line.split()[1]) for line in status.splitlines() if line.startswith("VmRSS"))


def message(text: str, **more) -> dict:
    content = [{"type": "input_text", "text": text}] if text else []
    return {"content": content, "attachments": [], "inference_options": {}, **more}


class Chat:
    """A user's thread over HTTP. Every event of every stream is parsed by chatkit's own types."""

    def __init__(self, url: str, token: str = "", thread_id: str | None = None):
        headers = {"Authorization": f"Bearer {token}"} if token else {}
        self.http = httpx.Client(base_url=url, headers=headers, timeout=60, verify=NO_TLS)
        self.thread_id = thread_id

    def post(self, type: str, **params) -> httpx.Response:
        return self.http.post("/chatkit", json={"type": type, "params": params})

    def get(self, type: str, **params) -> dict:
        """The answer to an operation that does not stream."""
        response = self.post(type, **params)
        assert response.status_code == 200, response.text
        return response.json()

    def stream(self, type: str, **params):
        """The events of a streaming operation, as they come."""
        body = {"type": type, "params": params}
        with self.http.stream("POST", "/chatkit", json=body) as response:
            assert response.status_code == 200, response.read()
            assert response.headers["content-type"].startswith("text/event-stream")
            rest = ""
            for text in response.iter_text():  # not iter_lines, which also splits at U+2028
                *lines, rest = (rest + text).split("\n\n")
                for line in lines:
                    assert line.startswith("data: "), line
                    event = EVENT.validate_python(json.loads(line.removeprefix("data: ")))
                    if event.type == "thread.created":
                        self.thread_id = event.thread.id
                    yield event
            assert not rest

    def start(self, text: str, **more):
        """The events that answer a message, the first of which makes the thread."""
        if self.thread_id is None:
            return self.stream("threads.create", input=message(text, **more))
        return self.stream(
            "threads.add_user_message", input=message(text, **more), thread_id=self.thread_id
        )

    def say(self, text: str, **more) -> list:
        return list(self.start(text, **more))

    def answer(self, result) -> list:
        """The events that follow the client's answer to its tool call."""
        params = {"thread_id": self.thread_id, "result": result}
        return list(self.stream("threads.add_client_tool_output", **params))

    def items(self) -> list[dict]:
        """All stored items, oldest first, hidden ones left out."""
        found, page = [], {"has_more": True}
        while page["has_more"]:
            asked = {"thread_id": self.thread_id, "order": "asc", "after": page.get("after")}
            page = self.get("items.list", **asked)
            found += page["data"]
        return found

    def thread(self) -> dict:
        return self.get("threads.get_by_id", thread_id=self.thread_id)

    def debug(self) -> list[dict]:
        """All stored items in /debug/threads' shape, hidden ones too."""
        return self.http.get("/debug/threads").json()[self.thread_id]["items"]


def error_of(events: list):
    """The one error of a stream, which is its end (but for the thread's new title)."""
    errors = [event for event in events if event.type == "error"]
    assert len(errors) == 1, events
    assert [event for event in events if event.type != "thread.updated"][-1] is errors[0]
    return errors[0]


def done(events: list, type: str = "assistant_message") -> list:
    """The items of this type that the stream completed."""
    items = [event.item for event in events if event.type == "thread.item.done"]
    return [item for item in items if item.type == type]


def text_of(item) -> str:
    content = item["content"] if isinstance(item, dict) else item.model_dump()["content"]
    return "".join(part["text"] for part in content)


def texts(events: list) -> list[str]:
    """The texts of the messages that the stream completed."""
    return [text_of(item) for item in done(events)]


def items_shown(events: list) -> list[dict]:
    """The items that a client shows after these events, in the shape of items.list."""
    items: dict[str, dict] = {}
    for event in events:
        match event.type:
            case "thread.item.added" | "thread.item.done" | "thread.item.replaced":
                items[event.item.id] = event.item.model_dump(mode="json")
            case "thread.item.removed":
                del items[event.item_id]
            case "thread.item.updated":
                apply(event.update, items[event.item_id])
    return list(items.values())


def apply(update, item: dict) -> None:
    """Apply an update of a message or a workflow, as a client does."""
    if update.type.startswith("workflow."):
        parts, index, part = item["workflow"]["tasks"], update.task_index, update.task
    else:
        parts, index = item["content"], update.content_index
        part = getattr(update, "content", None)
    if update.type.endswith("text_delta"):
        parts[index]["text"] += update.delta
    elif update.type.endswith(".added"):
        assert index == len(parts), update
        parts.append(part.model_dump(mode="json"))
    else:
        parts[index] = part.model_dump(mode="json")


def outline(items: list[dict]) -> str:
    """The kinds and the texts of all items but the user's, as one text."""
    found = ""
    for item in items:
        match item["type"]:
            case "assistant_message":
                found += f"[message]{text_of(item)}"
            case "workflow":
                tasks = item["workflow"]["tasks"]
                found += "[workflow]" + "|".join(task["content"] for task in tasks)
    return found


async def until(true, seconds: float = 5) -> None:
    """Poll something over HTTP that tells of no event."""
    for _ in range(int(seconds / 0.02)):
        if true():
            return
        await asyncio.sleep(0.02)
    raise AssertionError("it did not come true")


class Reading:
    """A stream that is read by a thread of its own."""

    def __init__(self, stream):
        self.events: list = []
        self.thread = threading.Thread(target=lambda: self.events.extend(stream), daemon=True)
        self.thread.start()

    async def until(self, text: str) -> None:
        """Return when an event that holds the text has come."""
        await until(lambda: any(text in event.model_dump_json() for event in list(self.events)))

    async def end(self) -> list:
        await asyncio.to_thread(self.thread.join, 10)
        assert not self.thread.is_alive()
        return self.events


def leave(stream, text: str, gates: dict | None = None) -> list:
    """Read a stream until an event holds the text, and leave. Return the events.

    `gates` are {text: Silence}: when an event holds the text, the provider goes on.
    """
    events = []
    for event in stream:
        events.append(event)
        said = event.model_dump_json()
        for gate in [gate for key, gate in (gates or {}).items() if key in said]:
            gate.end.set()
        if text in said:
            break
    stream.close()
    return events


def again(chat: Chat) -> Chat:
    """The same thread over a connection of its own."""
    return Chat(str(chat.http.base_url), thread_id=chat.thread_id)


async def deltas(url: str, texts: list[str], enough: int | None = None) -> list[list[tuple]]:
    """Chats at once: each one's deltas, `enough` at most, with the times at which they came."""

    async def one(http: httpx.AsyncClient, text: str) -> list[tuple[str, float]]:
        body = {"type": "threads.create", "params": {"input": message(text)}}
        found = []
        async with http.stream("POST", "/chatkit", json=body) as response:
            async for line in response.aiter_lines():
                if '"delta":"' in line:
                    found.append((line.split('"delta":"')[1].split('"')[0], time.time()))
                    if len(found) == enough:
                        break
        return found

    limits = httpx.Limits(max_connections=None)
    async with httpx.AsyncClient(base_url=url, timeout=120, limits=limits, verify=NO_TLS) as http:
        return await asyncio.gather(*(one(http, text) for text in texts))


async def many(url: str, texts: list[str]) -> list[str]:
    """Chats at once: the text that each was sent."""
    return ["".join(delta for delta, _ in found) for found in await deltas(url, texts)]


class Local:
    """main.py's server in this process, with one thread. Without a provider the reply is canned."""

    def __init__(self, main, provider=None, store=None, model: str = "", **agent):
        self.server = main.ChatKitServerImpl(store or main.MemoryStore())
        chosen = main.model
        if provider:
            model = model or main.litellm_name("openai", "auto")
            url = f"{provider.url}/{model.partition('/')[0]}"
            chosen = main.ProviderModel(model, url, "key-0123456789")
        self.server.agent = main.Agent("Assistant", model=chosen, **agent)
        self.thread: dict[str, str] = {}

    async def process(self, type: str, **params):
        return await self.server.process(json.dumps({"type": type, "params": params}), {})

    async def start(self, text: str, **more):
        """The turn that answers a message: an iterator of its events' bytes."""
        type = "threads.add_user_message" if self.thread else "threads.create"
        turn = (await self.process(type, input=message(text, **more), **self.thread)).json_events
        self.thread = {"thread_id": turn.thread_id}
        return turn

    async def say(self, text: str, **more) -> list:
        turn = await self.start(text, **more)
        return [EVENT.validate_json(event[6:]) async for event in turn]

    async def answer(self, result) -> list:
        """The events that follow the client's answer to its tool call."""
        type = "threads.add_client_tool_output"
        turn = (await self.process(type, result=result, **self.thread)).json_events
        return [EVENT.validate_json(event[6:]) async for event in turn]

    async def items(self) -> list:
        """All stored items, hidden ones too, oldest first; [] if the thread is deleted."""
        place = self.thread["thread_id"], None, 1_000, "asc", {}
        return (await self.server.store.load_thread_items(*place)).data
