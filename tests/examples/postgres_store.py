"""chatkit's Store on PostgreSQL 13 or newer, for any number of workers.

Copy it beside main.py and change one line:

    from postgres_store import PostgresStore          # pip install "psycopg[binary,pool]"

    store = PostgresStore(os.environ["DATABASE_URL"])

Each method sends one statement: one round trip, one transaction. Every statement may be repeated,
and is repeated once if its connection turns out to be dead. Raises chatkit's NotFoundError for what
is missing or belongs to another user, psycopg_pool's PoolTimeout if no connection is free within
`timeout` seconds, and psycopg's OperationalError if the database does not answer.
"""

import re
import secrets
from dataclasses import dataclass
from typing import Any, Generic, TypeVar

import anyio
from chatkit.errors import CustomStreamError
from chatkit.store import NotFoundError, Store, StoreItemType, default_generate_id
from chatkit.types import Attachment, Page, ThreadItem, ThreadMetadata
from psycopg import OperationalError
from psycopg.errors import QueryCanceled
from psycopg_pool import AsyncConnectionPool, PoolTimeout
from pydantic import TypeAdapter

# `number` grows with every row, so it is the order of addition.
# `owner` is the user's id, "" without users.
# The lock: two workers that run CREATE ... IF NOT EXISTS at once would fail.
SCHEMA = """
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


class ThreadDeleted(NotFoundError, CustomStreamError):
    """Another worker has deleted the thread.

    chatkit shows the message if a reply is streaming into the thread.
    """


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
    def __init__(self, url: str, max_size: int = 10, timeout: float = 30) -> None:
        """Open at most `max_size` connections per worker.

        A statement waits at most `timeout` seconds for one.
        """
        self.pool = AsyncConnectionPool(
            url,
            kwargs={"autocommit": True},
            open=False,
            min_size=1,
            max_size=max_size,
            timeout=timeout,
            reconnect_timeout=timeout,
        )
        self.opened = False

    async def open(self) -> None:
        """Connect, and create the tables if they are missing. The first statement calls this."""
        await self.pool.open()
        async with self.pool.connection() as connection:
            found = await connection.execute("SELECT to_regclass('chatkit_attachments')")
            if await found.fetchone() == (None,):
                await connection.execute(SCHEMA)  # sent in one piece, so it is one transaction
        self.opened = True

    async def close(self) -> None:
        await self.pool.close()

    async def rows(
        self, statement: str, context: Context, limit: int = 0, **values: str
    ) -> list[tuple[Any, ...]]:
        """Return the rows of the statement; repeat it on a new connection if this one is dead."""
        values = {"owner": context.get("user_id", ""), **values}
        parameters: dict[str, str | int] = {"limit": limit}
        for name, value in values.items():
            parameters[name] = value.replace("\0", "\ufffe0")
        with anyio.CancelScope(shield=True):  # a client that leaves must not interrupt a write
            try:
                found = await self.rows_once(statement, parameters)
            except (PoolTimeout, QueryCanceled):
                raise
            except OperationalError:
                await self.pool.check()  # after a restart of the database all connections are dead
                found = await self.rows_once(statement, parameters)
        return found

    async def rows_once(
        self, statement: str, parameters: dict[str, str | int]
    ) -> list[tuple[Any, ...]]:
        if not self.opened:
            await self.open()
        async with self.pool.connection() as connection:
            cursor = await connection.execute(statement, parameters)
            return await cursor.fetchall() if cursor.description else []

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
        statement = (
            f"SELECT data::text FROM {table.name} WHERE {table.visible} {start} "
            f"ORDER BY number {direction} LIMIT %(limit)s"
        )
        rows = await self.rows(
            statement, context, limit + 1, after=after or "", thread_id=thread_id
        )
        if after and not rows:
            # Raises NotFoundError unless it is the last row.
            await self.load(table, after, context, thread_id)
        data = [table.type.validate_json(from_jsonb(text)) for (text,) in rows[:limit]]
        more = len(rows) > limit
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
