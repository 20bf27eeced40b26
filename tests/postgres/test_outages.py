"""PostgreSQL that cannot be used: what the log says, what clients get, and what follows."""

import asyncio
import json
import secrets
import socket
import time
from typing import NamedTuple

import httpx
import pytest

from client import (
    NO_TLS,
    POSTGRES,
    ROOT,
    Chat,
    Reading,
    Server,
    done,
    error_of,
    message,
    text_of,
    until,
)
from cluster import Line
from forked import Forked
from provider import Silence, Text

pytestmark = pytest.mark.anyio
UNAVAILABLE = "The database is unavailable. Try again in a moment."
PASSWORD = "pass%w0rd@/"
QUOTED = "pass%25w0rd%40%2F"


class Place:
    """A database of its own, the role that owns it, and the line that leads there."""

    def __init__(self, database, owner: bool = True):
        if not database.cluster:
            pytest.skip("the database of DATABASE_URL must not be broken by a test")
        self.name = f"place_{secrets.token_hex(4)}"
        self.admin_url = database.cluster.url
        self.database = database
        self.line = Line(database.cluster.port)
        self.url = f"postgresql://{self.name}:{QUOTED}@127.0.0.1:{self.line.port}/{self.name}"
        self.do(f"CREATE ROLE {self.name} LOGIN PASSWORD '{PASSWORD}'")
        self.do(f"CREATE DATABASE {self.name}" + f" OWNER {self.name}" * owner)

    def do(self, statement: str) -> None:
        """Run the statement as the superuser, in the database itself if it begins with a colon."""
        url = self.admin_url.removesuffix("postgres") + self.name
        with self.database.connect(url if statement.startswith(":") else self.admin_url) as admin:
            admin.execute(statement.lstrip(":").format(name=self.name, password=PASSWORD))


class Fault(NamedTuple):
    says: str
    broken: str
    mended: str


FAULTS = {
    "a wrong password": Fault(
        'password authentication failed for user "{name}"',
        "ALTER ROLE {name} PASSWORD 'another'",
        "ALTER ROLE {name} PASSWORD '{password}'",
    ),
    "a missing database": Fault(
        'database "{name}" does not exist',
        "DROP DATABASE {name}",
        "CREATE DATABASE {name} OWNER {name}",
    ),
    "TLS demanded": Fault(
        'pg_hba.conf rejects connection for host "127.0.0.1", user "{name}", database "{name}", '
        "no encryption",
        "GRANT tls_demanded TO {name}",
        "REVOKE tls_demanded FROM {name}",
    ),
    "no rights": Fault(
        "permission denied for schema public. {rights}",
        ":REVOKE CREATE ON SCHEMA public FROM {name}, public, pg_database_owner",
        ":GRANT CREATE ON SCHEMA public TO {name}",
    ),
    "a read-only role": Fault(
        "cannot execute CREATE TABLE in a read-only transaction",
        "ALTER ROLE {name} SET default_transaction_read_only = on",
        "ALTER ROLE {name} RESET default_transaction_read_only",
    ),
    "a refused port": Fault("Connection refused Is the server running", "", ""),
}


@pytest.fixture
def started(provider, tmp_path):
    """started(url): the recipe on that database, without waiting for it."""
    servers = []

    def start(url: str, workers: int = 0, **options: float) -> Server:
        environment = {**provider.environment(), "PROVIDER": "openai", "DATABASE_URL": url}
        program = POSTGRES / "postgres_store.py"
        if options:
            program = POSTGRES / "served.py"
            environment["STORE_OPTIONS"] = json.dumps(options)
        servers.append(Server(tmp_path, environment, program, workers == 0, workers=workers))
        return servers[-1]

    yield start
    for server in servers:
        server.stop()


def complaints(server: Server) -> list[str]:
    return [line for line in server.log if "The database is unavailable" in line]


def refused(server: Server, kind: str = "threads.list", **params) -> None:
    """The request gets a 503 that says why."""
    body = {"type": kind, "params": params}
    response = httpx.post(f"{server.url}/chatkit", json=body, verify=NO_TLS, timeout=10)
    assert (response.status_code, response.json()) == (503, {"detail": UNAVAILABLE})


@pytest.mark.parametrize("name", FAULTS)
def test_a_database_that_cannot_be_used(database, started, postgres_store, name):
    """One line in the log, a 503 for each request, and the first one after it is mended works."""
    fault = FAULTS[name]
    place = Place(database)
    place.do("CREATE ROLE tls_demanded") if name == "TLS demanded" else None
    place.do(fault.broken) if fault.broken else place.line.cut()
    server = started(place.url).started()
    assert httpx.get(f"{server.url}/health", verify=NO_TLS).status_code == 200
    refused(server, "threads.list")
    refused(server, "threads.add_user_message", thread_id="thr_1", input=message("hello"))
    debug = httpx.get(f"{server.url}/debug/threads", verify=NO_TLS)
    assert (debug.status_code, debug.json()) == (503, {"detail": UNAVAILABLE})
    refused(server, "threads.create", input=message("hello"))
    (line,) = complaints(server)
    assert fault.says.format(name=place.name, rights=postgres_store.RIGHTS) in line
    place.do(fault.mended) if fault.mended else place.line.repair()
    assert [text_of(item) for item in done(Chat(server.url).say("hello"))] == ["You said: hello"]
    log = "\n".join(server.log)
    assert "Traceback" not in log and PASSWORD not in log and QUOTED not in log
    assert len(complaints(server)) == 1


@pytest.mark.parametrize(
    "url",
    [
        "",
        "postgresql+asyncpg://chat:secret@127.0.0.1/chat",
        "mysql://chat:secret@127.0.0.1/chat",
        "postgresql://chat:secret%@127.0.0.1/chat",
        "postgresql://chat:secret@secret@127.0.0.1/chat",
        "postgresql://chat:secret/secret@127.0.0.1/chat",
        "postgresql://chat:1/secret@127.0.0.1/chat",
        "host=127.0.0.1 password=secret secret",
    ],
)
def test_a_malformed_url_stops_the_start(postgres_store, url):
    with pytest.raises(SystemExit) as stop:
        postgres_store.PostgresStore(url)
    assert stop.value.code == postgres_store.BAD_URL and "\n" not in postgres_store.BAD_URL
    assert stop.value.__suppress_context__ or stop.value.__context__ is None


@pytest.mark.parametrize("workers", [0, 2])
def test_a_malformed_url_as_an_operator_sees_it(started, postgres_store, workers):
    """One line, not the URL. uvicorn ends, too, and does not start the workers again for ever."""
    server = started("postgresql+asyncpg://chat:secret@127.0.0.1/chat", workers)
    code = server.process.wait(60)
    server.reader.join(10)
    if not workers:
        assert (code, server.log) == (1, [postgres_store.BAD_URL, "(end of log)"])
    else:
        log = "\n".join(server.log)
        assert postgres_store.BAD_URL in log and "secret" not in log and "Traceback" not in log


def test_a_role_that_may_not_create_tables(database, started, tmp_path):
    """Who may runs the SQL that the file prints."""
    place = Place(database)
    place.do(":REVOKE CREATE ON SCHEMA public FROM {name}, public, pg_database_owner")
    program = str(POSTGRES / "postgres_store.py")
    environment = {"PYTHONPATH": str(ROOT / "backend"), "PROVIDER": "mock"}
    printing = Forked([program, "--schema"], environment, tmp_path)
    place.do(":" + printing.stdout.read())
    assert printing.wait(20) == 0
    place.do(":GRANT SELECT, INSERT, UPDATE, DELETE ON ALL TABLES IN SCHEMA public TO {name}")
    server = started(place.url).started()
    chat = Chat(server.url)
    assert [text_of(item) for item in done(chat.say("hello"))] == ["You said: hello"]
    chat.get("threads.delete", thread_id=chat.thread_id)
    assert not complaints(server)


def test_a_role_that_may_only_read(database, started, postgres_store):
    place = Place(database)
    place.do(":REVOKE CREATE ON SCHEMA public FROM {name}, public, pg_database_owner")
    postgres_store.PostgresStore(place.admin_url.removesuffix("postgres") + place.name)
    place.do(":GRANT SELECT ON ALL TABLES IN SCHEMA public TO {name}")
    server = started(place.url).started()
    assert Chat(server.url).get("threads.list")["data"] == []
    (line,) = complaints(server)
    assert f"permission denied for table chatkit_attachments. {postgres_store.RIGHTS}" in line


def test_a_database_that_is_silent_at_the_start(database, started):
    place = Place(database)
    place.line.silence()
    server = started(place.url, timeout=2).started()
    refused(server)
    causes = [line.partition("unavailable: ")[2] for line in complaints(server)]
    assert causes == ["connection timeout expired", "no answer within 2 seconds"]
    place.line.flows.set()
    assert [text_of(item) for item in done(Chat(server.url).say("hello"))] == ["You said: hello"]


async def test_a_database_that_falls_silent(database, started, provider):
    """No request waits longer than the timeout, also when its client has left."""
    place = Place(database)
    server = started(place.url, max_size=4, timeout=2).started()
    chat = Chat(server.url)
    silence = Silence()
    provider.script["go"] = [[Text("one "), silence, Text("two")]]
    reading = Reading(chat.start("go"))
    await reading.until('"one "')
    place.line.silence()
    began = time.monotonic()
    with pytest.raises(httpx.ReadTimeout):
        httpx.get(f"{server.url}/debug/threads", verify=NO_TLS, timeout=0.1)
    silence.end.set()
    await asyncio.gather(*(asyncio.to_thread(refused, server) for _ in range(12)))
    error = error_of(await reading.end())
    assert (error.message, error.allow_retry) == (UNAVAILABLE, True)
    assert time.monotonic() - began < 10
    place.line.flows.set()
    (reply,) = done(chat.say("and on"))
    assert text_of(reply).endswith("and on")
    causes = [line.partition("unavailable: ")[2] for line in complaints(server)]
    # Whoever finds no connection free may learn that instead.
    assert set(causes) - {"all 4 connections are busy"} == {"no answer within 2 seconds"}
    assert len(causes) == len(set(causes))
    assert "Traceback" not in "\n".join(server.log)


async def test_a_pool_that_is_too_small(database, postgres_store):
    """The cause says so: the database itself is well."""
    store = postgres_store.PostgresStore(database.schema(), max_size=1)
    await store.free.acquire()
    usual, store.timeout = store.timeout, 0.1
    with pytest.raises(postgres_store.DatabaseUnavailable) as raised:
        await store.load_threads(1, None, "asc", {})
    assert str(raised.value.__cause__) == "all 1 connections are busy"
    store.free.release()
    store.timeout = usual
    assert (await store.load_threads(1, None, "asc", {})).data == []
    await store.close()


async def test_a_server_that_has_become_read_only(database, started):
    """After a failover: the statement is sent again, on a connection to the new primary."""
    place = Place(database)
    server = started(place.url).started()
    chat = Chat(server.url)
    chat.say("before")
    # New connections of this role reach a server that can be written to, those that exist do not.
    place.do("ALTER ROLE {name} SET default_transaction_read_only = off")
    with database.connect() as watching:
        try:
            place.do("ALTER SYSTEM SET default_transaction_read_only = on")
            place.do("SELECT pg_reload_conf()")
            shown = "SHOW default_transaction_read_only"
            await until(lambda: watching.execute(shown).fetchone() == ("on",))
            assert [text_of(item) for item in done(chat.say("after"))] == ["You said: after"]
        finally:
            watching.execute("SET default_transaction_read_only = off")
            watching.execute("ALTER SYSTEM RESET default_transaction_read_only")
            watching.execute("SELECT pg_reload_conf()")
    assert not complaints(server)


async def test_a_dead_connection_is_noticed(database, postgres_store):
    """What the kernel is told, on Linux: it ends a connection whose other side is gone."""
    store = postgres_store.PostgresStore(database.schema())
    await store.load_threads(1, None, "asc", {})
    ours = socket.socket(fileno=store.idle[0].fileno())
    names = ("TCP_USER_TIMEOUT", "TCP_KEEPIDLE", "TCP_KEEPINTVL", "TCP_KEEPCNT")
    options = [ours.getsockopt(socket.IPPROTO_TCP, getattr(socket, name)) for name in names]
    ours.detach()
    await store.close()
    assert options == [4000, 30, 5, 3]
