"""With this recipe, the agent has the tools of MCP servers. It starts them, and again if they end.

With a key     MCP_SERVER="uvx mcp-server-time" make run APP=tests/examples/mcp_tools.py
               This example needs uv: run pip install uv first.
Without a key  backend/.venv/bin/python -m pytest tests/test_examples.py -k mcp
Change         MCP_SERVER is the command that starts your server. For several servers, add names, as
               in MCP_SERVER_TIME and MCP_SERVER_MAIL. If your server has a URL, set MCP_SERVER to
               it, import MCPServerStreamableHttp in place of MCPServerStdio, and write
               MCPServerStreamableHttp({"url": command}, True, name).
"""

import asyncio
import logging
import os
import shlex
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from typing import Any

from agents.mcp import MCPServerManager, MCPServerStdio
from fastapi import FastAPI

import main

# Tools are named mcp_<server>__<tool>, so that two servers may have one of the same name.
main.server.agent.mcp_config["include_server_in_tool_names"] = True
# openai-agents logs it, too, without the server's name.
logging.getLogger("openai.agents").addFilter(lambda line: "connect MCP" not in line.getMessage())

# A manager for each server: it starts all of its servers again.
MANAGERS: dict[MCPServerStdio, MCPServerManager] = {}
for variable, command in sorted(os.environ.items()):
    if variable.startswith("MCP_SERVER"):
        name = variable.removeprefix("MCP_SERVER").strip("_").lower() or "server"
        program, *arguments = shlex.split(command)
        server = MCPServerStdio({"command": program, "args": arguments}, True, name)
        # In parallel: in a task that also ends what it has started.
        manager = MCPServerManager([server], connect_timeout_seconds=30, connect_in_parallel=True)
        MANAGERS[server] = manager
if not MANAGERS:
    raise SystemExit("MCP_SERVER must be the command that starts an MCP server.")
searches: dict[MCPServerStdio, asyncio.Task[bool]] = {}


async def answers(server: MCPServerStdio) -> bool:
    """Return whether the server answers. If it does not, it is started again."""
    manager = MANAGERS[server]
    try:
        server.invalidate_tools_cache()  # type: ignore[no-untyped-call]
        await server.list_tools()
    except Exception:
        was_away = manager.errors
        if not await manager.reconnect(failed_only=False) and not was_away:
            error = repr(manager.errors[server])[:200]
            main.logger.warning("The MCP server %s is away: %s", server.name, error)
    return bool(manager.active_servers)


async def refresh() -> None:
    """Let the agent have the servers that answer soon. Turns share the search for a server."""
    for server in MANAGERS:
        if server not in searches or searches[server].done():
            searches[server] = asyncio.create_task(answers(server))
    found = searches.copy()
    await asyncio.wait(found.values(), timeout=5)
    main.server.agent.mcp_servers = [
        server for server, search in found.items() if search.done() and search.result()
    ]


respond_without_refresh = main.server.respond


async def respond(*args: Any, **kwargs: Any) -> main.Events:
    await refresh()
    async for event in respond_without_refresh(*args, **kwargs):
        yield event


lifespan_of_main = main.app.router.lifespan_context


@asynccontextmanager
async def lifespan(app: FastAPI) -> AsyncIterator[None]:
    async with lifespan_of_main(app):
        await refresh()
        yield
    for search in searches.values():
        search.cancel()
    for manager in MANAGERS.values():
        await manager.cleanup_all()


main.server.respond = respond  # type: ignore[method-assign]
main.app.router.lifespan_context = lifespan

if __name__ == "__main__":
    main.serve()
