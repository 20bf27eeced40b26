"""An MCP server with one tool, for tests/examples/mcp_tools.py: mcp_server.py WEATHER [FILE]

With FILE, it does not start unless that file exists.
"""

import sys
from pathlib import Path

try:
    from mcp.server.mcpserver import MCPServer
except ImportError:  # mcp 1
    from mcp.server.fastmcp import FastMCP as MCPServer

if not all(Path(name).exists() for name in sys.argv[2:]):
    sys.exit(1)
server = MCPServer("weather")


@server.tool()
def weather(city: str) -> str:
    """Tell the weather."""
    return f"It {sys.argv[1]} in {city}."


server.run()
