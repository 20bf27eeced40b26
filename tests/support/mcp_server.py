"""An MCP server with one tool, for tests/examples/mcp_tools.py."""

try:
    from mcp.server.mcpserver import MCPServer
except ImportError:  # mcp 1
    from mcp.server.fastmcp import FastMCP as MCPServer

server = MCPServer("weather")


@server.tool()
def weather(city: str) -> str:
    """Tell the weather."""
    return f"It rains in {city}."


server.run()
