"""What the tests serve on PostgreSQL, as a program or with workers (`served:app`).

It is the recipe, with the store's options in STORE_OPTIONS (JSON) and with the file that PROGRAM
names (customised.py) on top of it. So it is also a file of one's own that imports the recipe.
"""

import importlib
import json
import os
import sys
from pathlib import Path

from agents import function_tool

import main
import postgres_store

if "STORE_OPTIONS" in os.environ:
    options = json.loads(os.environ["STORE_OPTIONS"])
    main.server.store = postgres_store.PostgresStore(os.environ["DATABASE_URL"], **options)


@function_tool
async def clock() -> str:
    """Tell the time."""
    return "noon"


main.server.agent.tools.append(clock)
main.store = main.server.store  # customised.py changes what has this name
if "PROGRAM" in os.environ:
    program = Path(os.environ["PROGRAM"])
    sys.path.append(str(program.parent))
    importlib.import_module(program.stem)

app = main.app


@app.get("/worker")
async def worker() -> int:
    """Tell which process answers on this connection."""
    return os.getpid()


if __name__ == "__main__":
    main.serve()
