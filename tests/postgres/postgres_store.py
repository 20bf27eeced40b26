"""This recipe stores the threads in PostgreSQL 13 or newer, for one server process or for several.

You need an existing database. Start the server with a key, or without one:

    backend/.venv/bin/python -m pip install -r tests/postgres/requirements.txt
    export DATABASE_URL=postgresql://user:password@localhost:5432/chat
    GEMINI_API_KEY=... make run APP=tests/postgres/postgres_store.py
    PROVIDER=mock make run APP=tests/postgres/postgres_store.py

This starts four processes. uvicorn calls them workers:

    PYTHONPATH=backend backend/.venv/bin/uvicorn --app-dir tests/postgres postgres_store:app \\
        --workers 4 --host 0.0.0.0 --port 8000 --http h11

In a file of your own, write `import postgres_store` below `import main`, and add this folder to
PYTHONPATH (make run does it). The import gives the server a store on DATABASE_URL. For workers,
your file needs `app = main.app`.

Change the arguments of PostgresStore in the last lines, and PAGE_BYTES.

Rights   The store creates its three tables when it starts. If its role may not do this, print the
         SQL: PYTHONPATH=backend backend/.venv/bin/python tests/postgres/postgres_store.py --schema
         Run the SQL as another role. Then grant the store's role SELECT, INSERT, UPDATE and DELETE
         on the tables.
Workers  Any worker can continue any thread, so sticky sessions are not needed. If a worker is
         killed, the unfinished part of its replies is lost. uvicorn starts another worker, and the
         threads go on. If a user retries a reply while it streams, and another worker gets the
         retry, both replies are stored.
Poolers  You can put PgBouncer or another pooler in front of the database, in transaction mode, too.
         Each method sends one statement, which is one transaction. It prepares nothing, and keeps
         nothing in the session.
Outages  While the database cannot be used, requests get a 503, and replies end with an error.
         Both come after `timeout` seconds at the latest, and both say UNAVAILABLE. The log has the
         cause, without the password. GET /health still answers. When the database is back, the
         first request works, without a restart of the server.
         The store sends a statement that fails once more, on a new connection. So it also finds the
         new primary server after a failover, if DATABASE_URL names both servers:
         postgresql://user:password@one,two/chat?target_session_attrs=read-write
         If DATABASE_URL is malformed, the start fails with one line, and uvicorn ends, too.
Figures  Of `make bench-postgres` on two slow cores, which the database, the provider and the client
         shared, 2026-11-28. 25 streams at 50 deltas/s have a p95 delay under 100 ms, with one
         worker and with two: plan one core for each 15 streams. A worker needs 305 MiB, their
         parent 40. It opens up to 10 connections (`max_size`); 4 served 200 chats in the tests.
         The first delta comes after 18 ms, 13 in memory. A page of 20 rows takes as long with
         100,000 rows as with 100. A message and its reply are 7 statements: load the thread twice,
         add the message, read three pages, add the reply. A step with tool calls is one more.
Growth   If one database is too small, use one for each group of users: every statement names the
         owner. A distributed database with PostgreSQL's protocol may work, too; none was tested.

`make test-postgres` tests all this, on a database of its own or on that of DATABASE_URL.
"""

import asyncio
import multiprocessing
import os
import re
import signal
import socket
import sys
import time
from collections.abc import AsyncIterator, Iterator
from contextlib import asynccontextmanager, contextmanager, suppress
from dataclasses import dataclass
from typing import Any, Generic, TypeVar

import anyio
import psycopg
from chatkit.errors import CustomStreamError
from chatkit.store import NotFoundError, Store, StoreItemType
from chatkit.types import Attachment, Page, ThreadItem, ThreadMetadata
from fastapi import Request
from fastapi.responses import JSONResponse
from psycopg import AsyncConnection
from psycopg.conninfo import conninfo_to_dict, make_conninfo
from psycopg.errors import InsufficientPrivilege, InvalidSchemaName, UndefinedTable
from pydantic import TypeAdapter

import main

# `number` grows with every row, so it is the order of addition. `owner` is the user's id, or "".
SCHEMA = """\
-- Workers that start at once would create the same table: one does it, the others wait.
SELECT pg_advisory_xact_lock(727464);
CREATE TABLE IF NOT EXISTS chatkit_threads (
    id text PRIMARY KEY,
    owner text NOT NULL,
    number bigint GENERATED ALWAYS AS IDENTITY,
    data jsonb NOT NULL
);
CREATE UNIQUE INDEX IF NOT EXISTS chatkit_threads_page ON chatkit_threads (owner, number);
CREATE TABLE IF NOT EXISTS chatkit_items (
    thread_id text REFERENCES chatkit_threads ON DELETE CASCADE,
    id text,
    owner text NOT NULL,
    number bigint GENERATED ALWAYS AS IDENTITY,
    data jsonb NOT NULL,
    PRIMARY KEY (thread_id, id)
);
CREATE UNIQUE INDEX IF NOT EXISTS chatkit_items_page ON chatkit_items (owner, thread_id, number);
CREATE TABLE IF NOT EXISTS chatkit_attachments (
    id text PRIMARY KEY,
    owner text NOT NULL,
    data jsonb NOT NULL
);
"""
# It changes nothing, but fails as a write does: without the tables, without rights, on a standby.
PROBE = "UPDATE chatkit_attachments SET data = data WHERE false"

Row = TypeVar("Row", ThreadMetadata, ThreadItem, Attachment)


@dataclass
class Table(Generic[Row]):
    name: str
    kind: str  # what an error calls a row
    type: TypeAdapter[Row]
    visible: str = "owner = %(owner)s"  # the condition for the rows that a context may see


THREADS = Table("chatkit_threads", "Thread", TypeAdapter(ThreadMetadata))
ITEMS = Table[ThreadItem](
    "chatkit_items",
    "Item",
    TypeAdapter(ThreadItem),
    visible="owner = %(owner)s AND thread_id = %(thread_id)s",
)
ATTACHMENTS = Table[Attachment]("chatkit_attachments", "Attachment", TypeAdapter(Attachment))

PAGE_BYTES = 4 * 1024 * 1024  # a page of long rows ends here
LOG_SECONDS = 60  # the same cause is logged once in this time

# ---- What fails ----------------------------------------------------------------------------------

BAD_URL = (
    "DATABASE_URL is not of the form postgresql://user:password@host:5432/database: "
    "special characters in a password are written as %40 and the like, and no driver is named."
)
RIGHTS = (
    "The role needs SELECT, INSERT, UPDATE and DELETE on the three chatkit_ tables, and CREATE on "
    "their schema unless the tables exist. With --schema, postgres_store.py prints their SQL."
)
UNAVAILABLE = "The database is unavailable. Try again in a moment."


class DatabaseUnavailable(CustomStreamError):
    """A reply ends with this error, a request gets a 503. The cause is in `__cause__`."""

    # The store logs the cause, once in LOG_SECONDS, and main.py need not. It could not log each:
    # chatkit tells it nothing of an item that it could not store.
    logged = True

    def __init__(self) -> None:
        super().__init__(UNAVAILABLE, allow_retry=True)


class ThreadDeleted(NotFoundError, CustomStreamError):
    """Another worker has deleted the thread. A reply that streams into it ends with the message."""

    def __init__(self, reason: str) -> None:
        CustomStreamError.__init__(self, main.DELETED)
        self.args = (reason,)


@main.app.exception_handler(DatabaseUnavailable)
async def unavailable(request: Request, error: DatabaseUnavailable) -> JSONResponse:
    return JSONResponse({"detail": UNAVAILABLE}, 503)


logged: dict[str, float] = {}  # cause -> when it was logged


def log_cause(error: Exception) -> None:
    """Log the database's own words, on one line, and what helps if rights are missing."""
    diagnosis = error.diag.message_primary if isinstance(error, psycopg.Error) else None
    cause = " ".join((diagnosis or str(error)).split())
    if isinstance(error, (InsufficientPrivilege, InvalidSchemaName)):
        cause += f". {RIGHTS}"
    now = time.monotonic()
    for text in [text for text, when in logged.items() if now - when > LOG_SECONDS]:
        del logged[text]
    if cause not in logged:
        logged[cause] = now
        main.logger.error("The database is unavailable: %s", cause)


# ---- Connections ---------------------------------------------------------------------------------


def connection_string(url: str, timeout: float) -> str:
    """Return the URL with what finds a dead connection. Stops the start if the URL is malformed."""
    # Half of the time, so that the other half is left to try it on another connection.
    options: dict[str, Any] = {
        "connect_timeout": int(timeout / 2),
        "tcp_user_timeout": int(timeout / 2 * 1000),  # milliseconds
        "keepalives_idle": 30,
        "keepalives_interval": 5,
        "keepalives_count": 3,
    }
    try:
        given = conninfo_to_dict(url)
    except psycopg.ProgrammingError:  # its message quotes the URL
        given = {}
    # Parts of a password that is not escaped end up in these, and libpq's messages quote them.
    names = f"{given.get('host')}{given.get('dbname')}"
    ports = str(given.get("port", "")).replace(",", "")
    if not given or "@" in names or ports.strip("0123456789"):
        end_parent()
        raise SystemExit(BAD_URL)
    return make_conninfo("", **{**options, **given})


def end_parent() -> None:
    """Tell uvicorn to end, if this is one of its workers.

    Workaround (uvicorn discussion 2440): in place of a worker that ends at its start, it starts
    another one, for ever.
    """
    parent = multiprocessing.parent_process()
    if parent and parent.pid:
        os.kill(parent.pid, signal.SIGTERM)


@contextmanager
def time_limit(deadline: float, reason: str) -> Iterator[None]:
    """Raises TimeoutError with the reason at the deadline, a time of the event loop's clock."""
    try:
        with anyio.fail_after(deadline - asyncio.get_running_loop().time()):
            yield
    except TimeoutError:
        raise TimeoutError(reason) from None


def shut_down(connection: AsyncConnection) -> None:
    """End a statement that the database does not answer: psycopg finds its socket closed.

    If it was cancelled, psycopg would wait for up to 10 seconds more, for the same database.
    """
    with suppress(OSError, psycopg.Error):  # it has failed already
        theirs = socket.socket(fileno=connection.fileno())
        try:
            theirs.shutdown(socket.SHUT_RDWR)
        finally:
            theirs.detach()  # psycopg closes it


# ---- The store -----------------------------------------------------------------------------------


def to_jsonb(text: str) -> str:
    """Write NUL, which jsonb cannot store, as U+FFFE 0, and U+FFFE as U+FFFE 1."""
    text = text.replace("\ufffe", "\ufffe1")
    return re.sub(
        r"\\u0000|\\.", lambda found: "\ufffe0" if found[0] == r"\u0000" else found[0], text
    )


def from_jsonb(text: str) -> str:
    return text.replace("\ufffe0", r"\u0000").replace("\ufffe1", "\ufffe")


class PostgresStore(Store[main.Context]):
    """chatkit's Store. tests/test_store.py is its contract.

    Raises NotFoundError for what is missing or belongs to another user, and DatabaseUnavailable for
    what the database does not do, or not in time.
    """

    def __init__(self, url: str, max_size: int = 10, timeout: float = 8) -> None:
        """Open at most `max_size` connections in each process. No call takes more than `timeout`.

        If the database is not there, the log says why. The store works as soon as it is there.
        """
        self.conninfo = connection_string(url, timeout)
        self.max_size, self.timeout = max_size, timeout
        self.free = asyncio.Semaphore(max_size)
        self.idle: list[AsyncConnection] = []  # the one that was used last is the next
        self.no_answer = f"no answer within {timeout:g} seconds"
        try:
            self.create_tables()
        except psycopg.Error as error:
            log_cause(error)

    def create_tables(self) -> None:
        """Create the tables if they are missing, and find out whether they can be written to."""
        with psycopg.connect(self.conninfo, autocommit=True, prepare_threshold=None) as connection:
            try:
                connection.execute(PROBE)
            except UndefinedTable:
                connection.execute(SCHEMA)  # sent in one piece, so it is one transaction

    async def close(self) -> None:
        """Close the idle connections."""
        while self.idle:
            await self.idle.pop().close()

    @asynccontextmanager
    async def connection(self, deadline: float) -> AsyncIterator[AsyncConnection]:
        """Lend an idle connection, or a new one, until the deadline. One that fails is closed.

        psycopg_pool would make everybody wait while the database refuses, and not tell them why.
        """
        with time_limit(deadline, f"all {self.max_size} connections are busy"):
            await self.free.acquire()
        try:
            if self.idle:
                connection = self.idle.pop()
            else:
                with time_limit(deadline, self.no_answer):
                    # By default psycopg prepares a statement that comes often. Behind a pooler the
                    # next one reaches another session, which knows another one by that name.
                    connection = await AsyncConnection.connect(
                        self.conninfo, autocommit=True, prepare_threshold=None
                    )
            timer = asyncio.get_running_loop().call_at(deadline, shut_down, connection)
            try:
                yield connection
            except BaseException:
                await connection.close()
                raise
            finally:
                timer.cancel()
            self.idle.append(connection)
        finally:
            self.free.release()

    async def rows_once(
        self, statement: str, parameters: dict[str, str | int], deadline: float
    ) -> list[tuple[Any, ...]]:
        try:
            async with self.connection(deadline) as connection:
                cursor = await connection.execute(statement, parameters)
                return await cursor.fetchall() if cursor.description else []
        except psycopg.Error as error:
            if asyncio.get_running_loop().time() < deadline:
                raise
            raise TimeoutError(self.no_answer) from error

    async def rows(
        self, statement: str, context: main.Context, limit: int = 0, **values: str
    ) -> list[tuple[Any, ...]]:
        """Return the rows of the statement, which is sent once more if it fails.

        Raises DatabaseUnavailable, and logs the cause.
        """
        values = {"owner": main.user_of(context), **values}
        parameters: dict[str, str | int] = {"limit": limit}
        for name, value in values.items():
            parameters[name] = value.replace("\0", "\ufffe0")  # text cannot store NUL, either
        deadline = asyncio.get_running_loop().time() + self.timeout
        try:
            try:
                return await self.rows_once(statement, parameters, deadline)
            except UndefinedTable:  # the database was not there at the start
                with time_limit(deadline, self.no_answer):
                    await asyncio.to_thread(self.create_tables)
            except psycopg.Error:  # the idle connections may be as dead, or as read-only
                await self.close()
            return await self.rows_once(statement, parameters, deadline)
        except (psycopg.Error, TimeoutError) as error:
            log_cause(error)
            raise DatabaseUnavailable from error

    async def load(
        self, table: Table[Row], id: str, context: main.Context, thread_id: str = ""
    ) -> Row:
        statement = f"SELECT data::text FROM {table.name} WHERE {table.visible} AND id = %(id)s"
        rows = await self.rows(statement, context, id=id, thread_id=thread_id)
        if not rows:
            raise NotFoundError(f"{table.kind} {id} not found")
        return table.type.validate_json(from_jsonb(rows[0][0]))

    async def save(self, table: Table[Row], row: Row, context: main.Context) -> None:
        """Add the thread or attachment, or replace it in place."""
        statement = (
            f"INSERT INTO {table.name} AS stored (id, owner, data) "
            "VALUES (%(id)s, %(owner)s, %(data)s) "
            "ON CONFLICT (id) DO UPDATE SET data = excluded.data "
            "WHERE stored.owner = excluded.owner RETURNING id"
        )
        data = to_jsonb(table.type.dump_json(row).decode())
        if not await self.rows(statement, context, id=row.id, data=data):
            raise NotFoundError(f"{table.kind} {row.id} not found")

    async def page(
        self,
        table: Table[Row],
        after: str | None,
        limit: int,
        order: str,
        context: main.Context,
        thread_id: str = "",
    ) -> Page[Row]:
        comparison, direction = (">", "ASC") if order == "asc" else ("<", "DESC")
        start, limit = "", min(limit, 2**31)
        if after:
            number = f"SELECT number FROM {table.name} WHERE {table.visible} AND id = %(after)s"
            start = f"AND number {comparison} ({number})"
        # Of the rows that are too many, NULL: they are not sent.
        statement = (
            "WITH page AS ("
            f"SELECT number, data::text AS data FROM {table.name} WHERE {table.visible} {start} "
            f"ORDER BY number {direction} LIMIT %(limit)s"
            "), sized AS ("
            f"SELECT number, data, sum(octet_length(data)) OVER (ORDER BY number {direction}) "
            "- octet_length(data) AS before FROM page"
            f") SELECT CASE WHEN before < {PAGE_BYTES} THEN data END FROM sized "
            f"ORDER BY number {direction}"
        )
        rows = await self.rows(
            statement, context, limit + 1, after=after or "", thread_id=thread_id
        )
        if after and not rows:
            # Raises NotFoundError unless it is the last row.
            await self.load(table, after, context, thread_id)
        texts = [text for (text,) in rows[:limit] if text is not None]
        data = [table.type.validate_json(from_jsonb(text)) for text in texts]
        more = len(rows) > len(data)
        return Page(data=data, has_more=more, after=data[-1].id if more else None)

    async def delete(
        self, table: Table[Row], id: str, context: main.Context, thread_id: str = ""
    ) -> None:
        statement = f"DELETE FROM {table.name} WHERE {table.visible} AND id = %(id)s"
        await self.rows(statement, context, id=id, thread_id=thread_id)

    # ---- chatkit's Store

    def generate_thread_id(self, context: main.Context) -> str:
        return main.long_id("thread")

    def generate_item_id(
        self, item_type: StoreItemType, thread: ThreadMetadata, context: main.Context
    ) -> str:
        return main.long_id(item_type)

    async def load_thread(self, thread_id: str, context: main.Context) -> ThreadMetadata:
        return await self.load(THREADS, thread_id, context)

    async def save_thread(self, thread: ThreadMetadata, context: main.Context) -> None:
        await self.save(THREADS, thread, context)

    async def load_threads(
        self, limit: int, after: str | None, order: str, context: main.Context
    ) -> Page[ThreadMetadata]:
        return await self.page(THREADS, after, limit, order, context)

    async def delete_thread(self, thread_id: str, context: main.Context) -> None:
        await self.delete(THREADS, thread_id, context)

    async def load_thread_items(
        self, thread_id: str, after: str | None, limit: int, order: str, context: main.Context
    ) -> Page[ThreadItem]:
        return await self.page(ITEMS, after, limit, order, context, thread_id)

    async def add_thread_item(
        self, thread_id: str, item: ThreadItem, context: main.Context
    ) -> None:
        # The row lock makes concurrent writers wait, so that numbers are in the order of commits.
        statement = (
            "WITH thread AS (SELECT id, owner FROM chatkit_threads "
            "WHERE owner = %(owner)s AND id = %(thread_id)s FOR UPDATE) "
            "INSERT INTO chatkit_items (thread_id, owner, id, data) "
            "SELECT id, owner, %(id)s, %(data)s::jsonb FROM thread "
            "ON CONFLICT (thread_id, id) DO UPDATE SET data = excluded.data RETURNING id"
        )
        data = to_jsonb(ITEMS.type.dump_json(item).decode())
        if not await self.rows(statement, context, thread_id=thread_id, id=item.id, data=data):
            raise ThreadDeleted(f"Thread {thread_id} not found")

    save_item = add_thread_item

    async def load_item(self, thread_id: str, item_id: str, context: main.Context) -> ThreadItem:
        return await self.load(ITEMS, item_id, context, thread_id)

    async def delete_thread_item(self, thread_id: str, item_id: str, context: main.Context) -> None:
        await self.delete(ITEMS, item_id, context, thread_id)

    async def save_attachment(self, attachment: Attachment, context: main.Context) -> None:
        await self.save(ATTACHMENTS, attachment, context)

    async def load_attachment(self, attachment_id: str, context: main.Context) -> Attachment:
        return await self.load(ATTACHMENTS, attachment_id, context)

    async def delete_attachment(self, attachment_id: str, context: main.Context) -> None:
        await self.delete(ATTACHMENTS, attachment_id, context)


if __name__ == "__main__" and sys.argv[1:] == ["--schema"]:
    print(SCHEMA, end="")
    sys.exit()

main.server.store = PostgresStore(os.getenv("DATABASE_URL", ""))
app = main.app

if __name__ == "__main__":
    main.serve()
