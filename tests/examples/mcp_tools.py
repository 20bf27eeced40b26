"""The tools of an MCP server, which is started and stopped with this one.

Copy this file beside main.py and run it in its place. MCP_SERVER is the command that starts the MCP
server, for example MCP_SERVER="uvx mcp-server-time".
"""

import os
import shlex
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager

from agents.mcp import MCPServerStdio
from fastapi import FastAPI

import main

command, *arguments = shlex.split(os.environ["MCP_SERVER"])
tools = MCPServerStdio({"command": command, "args": arguments}, cache_tools_list=True)
main.server.agent.mcp_servers.append(tools)
lifespan_of_main = main.app.router.lifespan_context


@asynccontextmanager
async def lifespan(app: FastAPI) -> AsyncIterator[None]:
    async with tools, lifespan_of_main(app):
        yield


main.app.router.lifespan_context = lifespan

if __name__ == "__main__":
    main.serve()
