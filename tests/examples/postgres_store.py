"""chatkit's Store on PostgreSQL 13 or newer, for any number of workers.

Copy this file beside main.py, `pip install "psycopg[binary]"`, and write in main.py,
instead of `store = MemoryStore()`:

    from postgres_store import PostgresStore

    store = PostgresStore(os.getenv("DATABASE_URL", ""))

The store creates its tables. `python postgres_store.py` prints their SQL, for a role that may not.

Each method sends one statement: one round trip, one transaction. It needs nothing from the session,
so a pooler in transaction mode, such as PgBouncer, may stand between. Every statement may be sent
again, and is sent again once, on a new connection, if it fails: the database may have restarted, or
another server may have become the primary.

Raises chatkit's NotFoundError for what is missing or belongs to another user, and
DatabaseUnavailable for what the database does not do, or not within `timeout` seconds.
"""

import asyncio
import logging
import multiprocessing
import re
import secrets
import socket
import time
from contextlib import suppress
from dataclasses import dataclass
from typing import Any, Generic, TypeVar

import anyio
import psycopg
from chatkit.errors import CustomStreamError
from chatkit.store import NotFoundError, Store, StoreItemType, default_generate_id
from chatkit.types import Attachment, Page, ThreadItem, ThreadMetadata
from fastapi import HTTPException
from psycopg import AsyncConnection
from psycopg.conninfo import conninfo_to_dict, make_conninfo
from psycopg.errors import InsufficientPrivilege, InvalidSchemaName, UndefinedTable
from pydantic import TypeAdapter

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
# Changes nothing, but fails as a write does: without the tables, without rights, on a standby.
PROBE = "UPDATE chatkit_attachments SET data = data WHERE false"

Context = dict[str, str]  # {} or {"user_id": ...}
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

BAD_URL = (
    "The database's URL is not of the form postgresql://user:password@host:5432/database: "
    "special characters in a password are written as %40 and the like, and no driver is named."
)
RIGHTS = (
    "The role needs SELECT, INSERT, UPDATE and DELETE on the three chatkit_ tables, and CREATE on "
    "their schema unless the tables exist. `python postgres_store.py` prints their SQL."
)
UNAVAILABLE = "The database is unavailable. Try again in a moment."
PAGE_BYTES = 4 * 1024 * 1024  # a page of long rows ends here
LOG_SECONDS = 60  # the same cause is logged once in this time
logger = logging.getLogger("uvicorn.error")  # the logger that uvicorn shows


class DatabaseUnavailable(HTTPException, CustomStreamError):
    """FastAPI answers a request with a 503, and chatkit ends a reply with an error event."""

    def __init__(self) -> None:
        HTTPException.__init__(self, 503, UNAVAILABLE)
        CustomStreamError.__init__(self, UNAVAILABLE, allow_retry=True)


class ThreadDeleted(NotFoundError, CustomStreamError):
    """Another worker has deleted the thread. A reply that streams into it ends with the message."""


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
        raise SystemExit(BAD_URL)
    return make_conninfo("", **{**options, **given})


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


def cause_of(error: Exception) -> str:
    """Return the database's own words, on one line, and what helps if rights are missing."""
    diagnosis = error.diag.message_primary if isinstance(error, psycopg.Error) else None
    cause = " ".join((diagnosis or str(error)).split())
    if isinstance(error, (InsufficientPrivilege, InvalidSchemaName)):
        cause += f". {RIGHTS}"
    return cause


def to_jsonb(text: str) -> str:
    """Escape NUL, which jsonb cannot store, with U+FFFE, and U+FFFE with itself.

    No text contains this code point.
    """
    text = text.replace("\ufffe", "\ufffe1")
    return re.sub(
        r"\\u0000|\\.", lambda found: "\ufffe0" if found[0] == r"\u0000" else found[0], text
    )


def from_jsonb(text: str) -> str:
    return text.replace("\ufffe0", r"\u0000").replace("\ufffe1", "\ufffe")


def new_id(item_type: StoreItemType) -> str:
    """Return an id with chatkit's prefix and 128 random bits: chatkit's own 32 bits collide."""
    prefix = default_generate_id(item_type).split("_")[0]
    return f"{prefix}_{secrets.token_hex(16)}"


class PostgresStore(Store[Context]):
    logged_message = UNAVAILABLE  # with its cause; main.py does not log it for each reply

    def __init__(self, url: str, max_size: int = 10, timeout: float = 8) -> None:
        """Open at most `max_size` connections in each worker. No call takes longer than `timeout`.

        If the database is not there, the log says why. The store works as soon as it is there.
        """
        self.conninfo = connection_string(url, timeout)
        self.max_size, self.timeout = max_size, timeout
        self.free = asyncio.Semaphore(max_size)
        self.idle: list[AsyncConnection] = []  # the one that was used last is the next
        self.logged: dict[str, float] = {}  # cause -> when it was logged
        if multiprocessing.parent_process() is None:  # the parent of workers has done it for them
            try:
                self.create_tables()
            except psycopg.Error as error:
                self.log(cause_of(error))

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

    def log(self, cause: str) -> None:
        now = time.monotonic()
        recent = {text: when for text, when in self.logged.items() if now - when < LOG_SECONDS}
        if cause not in recent:
            logger.error("The database is unavailable: %s", cause)
        self.logged = {cause: now, **recent}

    async def borrow(self, deadline: float) -> AsyncConnection:
        """Return an idle connection, or a new one, before the deadline.

        psycopg_pool would make everybody wait while the database refuses, and not tell them why.
        """
        loop = asyncio.get_running_loop()
        try:
            with anyio.fail_after(deadline - loop.time()):
                await self.free.acquire()
        except TimeoutError:
            raise TimeoutError(f"all {self.max_size} connections are busy") from None
        connection = self.idle.pop() if self.idle else None
        try:
            if connection is None:
                with anyio.fail_after(deadline - loop.time()):
                    # By default psycopg prepares a statement that comes often. Behind a pooler the
                    # next one reaches another session, which knows another one by that name.
                    connection = await AsyncConnection.connect(
                        self.conninfo, autocommit=True, prepare_threshold=None
                    )
        except BaseException:
            self.free.release()
            raise
        return connection

    async def rows_once(
        self, statement: str, parameters: dict[str, str | int], deadline: float
    ) -> list[tuple[Any, ...]]:
        loop = asyncio.get_running_loop()
        connection = await self.borrow(deadline)
        limit = loop.call_later(deadline - loop.time(), shut_down, connection)
        try:
            cursor = await connection.execute(statement, parameters)
            rows = await cursor.fetchall() if cursor.description else []
        except BaseException as error:
            await connection.close()
            if isinstance(error, psycopg.Error) and loop.time() >= deadline:
                raise TimeoutError from error
            raise
        else:
            self.idle.append(connection)
            return rows
        finally:
            limit.cancel()
            self.free.release()

    async def rows(
        self, statement: str, context: Context, limit: int = 0, **values: str
    ) -> list[tuple[Any, ...]]:
        """Return the rows of the statement. Raises DatabaseUnavailable, and logs the cause."""
        values = {"owner": context.get("user_id", ""), **values}
        parameters: dict[str, str | int] = {"limit": limit}
        for name, value in values.items():
            parameters[name] = value.replace("\0", "\ufffe0")  # text cannot store NUL, either
        loop = asyncio.get_running_loop()
        deadline = loop.time() + self.timeout
        try:
            try:
                return await self.rows_once(statement, parameters, deadline)
            except UndefinedTable:  # the database was not there at the start
                with anyio.fail_after(deadline - loop.time()):
                    await asyncio.to_thread(self.create_tables)
            except psycopg.Error:  # the idle connections may be as dead, or as read-only
                await self.close()
            return await self.rows_once(statement, parameters, deadline)
        except (psycopg.Error, TimeoutError) as error:
            self.log(cause_of(error) or f"no answer within {self.timeout:g} seconds")
            raise DatabaseUnavailable from error

    async def load(self, table: Table[Row], id: str, context: Context, thread_id: str = "") -> Row:
        statement = f"SELECT data::text FROM {table.name} WHERE {table.visible} AND id = %(id)s"
        rows = await self.rows(statement, context, id=id, thread_id=thread_id)
        if not rows:
            raise NotFoundError(f"{table.kind} {id} not found")
        return table.type.validate_json(from_jsonb(rows[0][0]))

    async def save(self, table: Table[Row], row: Row, context: Context) -> None:
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
        context: Context,
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
        self, table: Table[Row], id: str, context: Context, thread_id: str = ""
    ) -> None:
        statement = f"DELETE FROM {table.name} WHERE {table.visible} AND id = %(id)s"
        await self.rows(statement, context, id=id, thread_id=thread_id)

    # ---- chatkit's Store

    def generate_thread_id(self, context: Context) -> str:
        return new_id("thread")

    def generate_item_id(
        self, item_type: StoreItemType, thread: ThreadMetadata, context: Context
    ) -> str:
        return new_id(item_type)

    async def load_thread(self, thread_id: str, context: Context) -> ThreadMetadata:
        return await self.load(THREADS, thread_id, context)

    async def save_thread(self, thread: ThreadMetadata, context: Context) -> None:
        await self.save(THREADS, thread, context)

    async def load_threads(
        self, limit: int, after: str | None, order: str, context: Context
    ) -> Page[ThreadMetadata]:
        return await self.page(THREADS, after, limit, order, context)

    async def delete_thread(self, thread_id: str, context: Context) -> None:
        await self.delete(THREADS, thread_id, context)

    async def load_thread_items(
        self, thread_id: str, after: str | None, limit: int, order: str, context: Context
    ) -> Page[ThreadItem]:
        return await self.page(ITEMS, after, limit, order, context, thread_id)

    async def add_thread_item(self, thread_id: str, item: ThreadItem, context: Context) -> None:
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

    async def load_item(self, thread_id: str, item_id: str, context: Context) -> ThreadItem:
        return await self.load(ITEMS, item_id, context, thread_id)

    async def delete_thread_item(self, thread_id: str, item_id: str, context: Context) -> None:
        await self.delete(ITEMS, item_id, context, thread_id)

    async def save_attachment(self, attachment: Attachment, context: Context) -> None:
        await self.save(ATTACHMENTS, attachment, context)

    async def load_attachment(self, attachment_id: str, context: Context) -> Attachment:
        return await self.load(ATTACHMENTS, attachment_id, context)

    async def delete_attachment(self, attachment_id: str, context: Context) -> None:
        await self.delete(ATTACHMENTS, attachment_id, context)


if __name__ == "__main__":
    print(SCHEMA, end="")
