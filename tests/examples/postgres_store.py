"""chatkit's Store on PostgreSQL 13 or newer, for any number of workers. Copy it beside main.py and change one line:

    from postgres_store import PostgresStore          # pip install "psycopg[binary,pool]"

    store = PostgresStore(os.environ["DATABASE_URL"])

Each method sends one statement: one round trip, one transaction. Every statement may be repeated, and is repeated once
if its connection turns out to be dead. Raises chatkit's NotFoundError for what is missing or belongs to another user,
psycopg_pool's PoolTimeout if no connection is free within `timeout` seconds, and psycopg's OperationalError if the
database does not answer.
"""

import re
import secrets

import anyio
from chatkit.errors import CustomStreamError
from chatkit.store import NotFoundError, Store, StoreItemType, default_generate_id
from chatkit.types import Attachment, Page, ThreadItem, ThreadMetadata
from psycopg import OperationalError
from psycopg.errors import QueryCanceled
from psycopg_pool import AsyncConnectionPool, PoolTimeout
from pydantic import BaseModel, TypeAdapter

# `number` grows with every row, so it is the order of addition. `owner` is the user's id, "" without users.
SCHEMA = """
SELECT pg_advisory_xact_lock(727464);  -- two workers that run CREATE ... IF NOT EXISTS at once would fail
CREATE TABLE IF NOT EXISTS chatkit_threads (
    id text PRIMARY KEY, owner text NOT NULL, number bigint GENERATED ALWAYS AS IDENTITY, data jsonb NOT NULL
);
CREATE UNIQUE INDEX IF NOT EXISTS chatkit_threads_page ON chatkit_threads (owner, number);
CREATE TABLE IF NOT EXISTS chatkit_items (
    thread_id text REFERENCES chatkit_threads ON DELETE CASCADE, id text,
    owner text NOT NULL, number bigint GENERATED ALWAYS AS IDENTITY, data jsonb NOT NULL, PRIMARY KEY (thread_id, id)
);
CREATE UNIQUE INDEX IF NOT EXISTS chatkit_items_page ON chatkit_items (owner, thread_id, number);
CREATE TABLE IF NOT EXISTS chatkit_attachments (id text PRIMARY KEY, owner text NOT NULL, data jsonb NOT NULL);
"""
ITEM = TypeAdapter(ThreadItem)
TABLES = {  # kind of row -> its table, its type, the condition for the rows that a context may see
    "Thread": ("chatkit_threads", TypeAdapter(ThreadMetadata), "owner = %(owner)s"),
    "Item": ("chatkit_items", ITEM, "owner = %(owner)s AND thread_id = %(thread_id)s"),
    "Attachment": ("chatkit_attachments", TypeAdapter(Attachment), "owner = %(owner)s"),
}


class ThreadDeleted(NotFoundError, CustomStreamError):
    """Another worker has deleted the thread. chatkit shows the message if a reply is streaming into the thread."""


def to_jsonb(text: str) -> str:
    """Escape NUL, which jsonb cannot store, with U+FFFE, a code point that no text contains, and U+FFFE with itself."""
    text = text.replace("\ufffe", "\ufffe1")
    return re.sub(
        r"\\u0000|\\.", lambda found: "\ufffe0" if found[0] == r"\u0000" else found[0], text
    )


def from_jsonb(text: str) -> str:
    return text.replace("\ufffe0", r"\u0000").replace("\ufffe1", "\ufffe")


class PostgresStore(Store[dict]):
    def __init__(self, url: str, max_size: int = 10, timeout: float = 30) -> None:
        """Open at most `max_size` connections per worker; a statement waits at most `timeout` seconds for one."""
        options = {
            "min_size": 1,
            "max_size": max_size,
            "timeout": timeout,
            "reconnect_timeout": timeout,
        }
        self.pool = AsyncConnectionPool(url, kwargs={"autocommit": True}, open=False, **options)
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

    async def rows(self, statement: str, context: dict, **values: str | int) -> list[tuple]:
        """Return the rows of the statement; repeat it on a new connection if this one is dead."""
        values = {"owner": context.get("user_id", ""), **values}
        values = {
            name: value.replace("\0", "\ufffe0") if name != "limit" else value
            for name, value in values.items()
        }
        with anyio.CancelScope(shield=True):  # a client that leaves must not interrupt a write
            try:
                return await self.rows_once(statement, values)
            except (PoolTimeout, QueryCanceled):
                raise
            except OperationalError:
                await self.pool.check()  # after a restart of the database all connections are dead
                return await self.rows_once(statement, values)

    async def rows_once(self, statement: str, values: dict) -> list[tuple]:
        if not self.opened:
            await self.open()
        async with self.pool.connection() as connection:
            cursor = await connection.execute(statement, values)
            return await cursor.fetchall() if cursor.description else []

    async def load(self, kind: str, id: str, context: dict, thread_id: str = ""):
        table, adapter, where = TABLES[kind]
        statement = f"SELECT data::text FROM {table} WHERE {where} AND id = %(id)s"
        rows = await self.rows(statement, context, id=id, thread_id=thread_id)
        if not rows:
            raise NotFoundError(f"{kind} {id} not found")
        return adapter.validate_json(from_jsonb(rows[0][0]))

    async def save(self, kind: str, row: BaseModel, context: dict) -> None:
        """Add the thread or attachment, or replace it in place."""
        table, adapter, _ = TABLES[kind]
        statement = (
            f"INSERT INTO {table} AS stored (id, owner, data) VALUES (%(id)s, %(owner)s, %(data)s) "
            "ON CONFLICT (id) DO UPDATE SET data = excluded.data WHERE stored.owner = excluded.owner RETURNING id"
        )
        if not await self.rows(
            statement, context, id=row.id, data=to_jsonb(adapter.dump_json(row).decode())
        ):
            raise NotFoundError(f"{kind} {row.id} not found")

    async def page(
        self, kind: str, after: str | None, limit: int, order: str, context: dict, thread_id=""
    ) -> Page:
        table, adapter, where = TABLES[kind]
        beyond, direction = (">", "ASC") if order == "asc" else ("<", "DESC")
        start = (
            f"AND number {beyond} (SELECT number FROM {table} WHERE {where} AND id = %(after)s)"
            if after
            else ""
        )
        statement = f"SELECT data::text FROM {table} WHERE {where} {start} ORDER BY number {direction} LIMIT %(limit)s"
        limit = min(limit, 2**31)
        rows = await self.rows(
            statement, context, after=after or "", limit=limit + 1, thread_id=thread_id
        )
        if after and not rows:
            await self.load(
                kind, after, context, thread_id
            )  # raises NotFoundError unless it is the last row
        data = [adapter.validate_json(from_jsonb(text)) for (text,) in rows[:limit]]
        more = len(rows) > limit
        return Page(data=data, has_more=more, after=data[-1].id if more else None)

    async def delete(self, kind: str, id: str, context: dict, thread_id: str = "") -> None:
        table, _, where = TABLES[kind]
        await self.rows(
            f"DELETE FROM {table} WHERE {where} AND id = %(id)s",
            context,
            id=id,
            thread_id=thread_id,
        )

    # ---- chatkit's Store

    def generate_thread_id(self, context):
        return self.generate_item_id("thread", None, context)

    def generate_item_id(self, item_type: StoreItemType, thread, context):
        return f"{default_generate_id(item_type).split('_')[0]}_{secrets.token_hex(16)}"  # chatkit's 32-bit ids collide

    async def load_thread(self, thread_id, context):
        return await self.load("Thread", thread_id, context)

    async def save_thread(self, thread, context):
        await self.save("Thread", thread, context)

    async def load_threads(self, limit, after, order, context):
        return await self.page("Thread", after, limit, order, context)

    async def delete_thread(self, thread_id, context):
        await self.delete("Thread", thread_id, context)

    async def load_thread_items(self, thread_id, after, limit, order, context):
        return await self.page("Item", after, limit, order, context, thread_id)

    async def add_thread_item(self, thread_id, item, context):
        # The row lock makes concurrent writers wait, so that numbers are in the order of the commits.
        statement = (
            "WITH thread AS (SELECT id, owner FROM chatkit_threads "
            "WHERE owner = %(owner)s AND id = %(thread_id)s FOR UPDATE) "
            "INSERT INTO chatkit_items (thread_id, owner, id, data) "
            "SELECT id, owner, %(id)s, %(data)s::jsonb FROM thread "
            "ON CONFLICT (thread_id, id) DO UPDATE SET data = excluded.data RETURNING id"
        )
        data = to_jsonb(ITEM.dump_json(item).decode())
        if not await self.rows(statement, context, thread_id=thread_id, id=item.id, data=data):
            raise ThreadDeleted(f"Thread {thread_id} not found")

    save_item = add_thread_item

    async def load_item(self, thread_id, item_id, context):
        return await self.load("Item", item_id, context, thread_id)

    async def delete_thread_item(self, thread_id, item_id, context):
        await self.delete("Item", item_id, context, thread_id)

    async def save_attachment(self, attachment, context):
        await self.save("Attachment", attachment, context)

    async def load_attachment(self, attachment_id, context):
        return await self.load("Attachment", attachment_id, context)

    async def delete_attachment(self, attachment_id, context):
        await self.delete("Attachment", attachment_id, context)
