"""The stores on PostgreSQL that tests/test_store.py tests."""

import itertools

import pytest


class InTurns:
    """Stores of one database, each call with the next of them, as a request goes to any worker."""

    def __init__(self, stores: list):
        self.stores = itertools.cycle(stores)

    def __getattr__(self, name: str):
        return getattr(next(self.stores), name)


async def opened(request):
    """A store on the database itself, or two behind PgBouncer."""
    PostgresStore = request.getfixturevalue("postgres_store").PostgresStore
    database, pooled = request.getfixturevalue("database"), request.param == "pgbouncer"
    url = database.pooled() if pooled else database.schema()
    if not url:
        pytest.skip("PgBouncer is not on this machine, or the database is that of DATABASE_URL")
    stores = [PostgresStore(url) for _ in range(2 if pooled else 1)]
    yield InTurns(stores)
    for store in stores:
        await store.close()
