"""What stays green when somebody has made the files their own: everything outside this folder."""

import os
import re
import shutil
import subprocess
import sys

import pytest

from client import ROOT

# The copy's run leaves these providers out: their tests read the same values as those of others.
OMITTED = "anthropic or groq or hosted_vllm or ollama or openrouter"
# Each is a part of a file and what replaces it. " ... " is everything up to what follows it.
CHANGES = {
    "backend/main.py": {
        'INSTRUCTIONS = "You are a helpful assistant."': 'INSTRUCTIONS = "You sell boats."',
        "MOCK_REPLY = ": 'MOCK_REPLY = "Ahoy. " ',
        "HISTORY_ITEMS = 100": "HISTORY_ITEMS = 60",
        "TOOL_OUTPUT_LENGTH = 4_000": "TOOL_OUTPUT_LENGTH = 3_000",
        "TITLE_LENGTH = 60": "TITLE_LENGTH = 40",
        "MAX_BODY_BYTES = 1024 * 1024": "MAX_BODY_BYTES = 2 * 1024 * 1024",
        "MAX_VALUES = 5_000": "MAX_VALUES = 4_000",
        "MAX_PAGE = 100": "MAX_PAGE = 50",
        "SILENCE_SECONDS = 15": "SILENCE_SECONDS = 20",
        "STOP_SECONDS = 5": "STOP_SECONDS = 4",
        "DEFAULT_MODELS = { ... }": """
DEFAULT_MODELS = {
    "gemini": "gemini-3.5-flash",
    "openai": "gpt-5.2",
    "anthropic": "claude-haiku-4-5",
    "mock": "gpt-5.2",
}
""",
        # The agent: another name, settings, tools, and a second agent.
        "class ChatKitServerImpl(": """
from agents import function_tool


@function_tool
def boats() -> str:
    \"""List the boats.\"""
    return "a canoe"


class ChatKitServerImpl(""",
        'Agent("Assistant", instructions=INSTRUCTIONS, model=model)': """Agent(
            "Captain",
            instructions=INSTRUCTIONS,
            model=model,
            model_settings=ModelSettings(temperature=0.5),
            tools=[boats],
            handoffs=[Agent[ChatContext]("Sailor", handoff_description="Knows the winds.")],
        )""",
        "store = MemoryStore()": """
class BoatStore(MemoryStore):
    pass


store: MemoryStore = BoatStore()
""",
        # The login: by a cookie, and without CHATKIT_TOKENS.
        "def parse_tokens( ... \n\n\nPROVIDER =": "PROVIDER =",
        'TOKENS = parse_tokens(setting("CHATKIT_TOKENS", ""))\n': "",
        "    if not TOKENS and request_context ... \n        )\n": "",
        '    openapi_url=None if TOKENS else "/openapi.json", ... \n': "    openapi_url=None,\n",
        "async def request_context( ... \n\n\nRequestContext": """
async def request_context(request: Request) -> Context:
    if user := request.cookies.get("boatman"):
        return {"user_id": user}
    raise HTTPException(401, "Come aboard first.")


RequestContext""",
        # A workaround that only older Pythons need.
        "    # Workaround (LiteLLM, no issue known): this finalizer ... lambda stream: None\n": "",
        'PAGE_OPTIONS = "{}"': 'PAGE_OPTIONS = "{ header: { enabled: false } }"',
    },
    ".env.example": {"PROVIDER=gemini": "PROVIDER=mistral\nBOATS=3"},
    "backend/requirements.txt": {"python-dotenv": "boats==1.0\npython-dotenv"},
}


@pytest.mark.slow
def test_a_copy_in_which_everything_is_changed(tmp_path):
    folder = tmp_path / "copy"
    skipped = shutil.ignore_patterns(".git", ".venv*", ".lock", ".*_cache", "__pycache__", ".env")
    shutil.copytree(ROOT, folder, ignore=skipped)
    (folder / "README.md").write_text("# Boats\n")
    for name, changes in CHANGES.items():
        text = (folder / name).read_text()
        for old, new in changes.items():
            pattern = re.escape(old).replace(re.escape(" ... "), ".*?")
            text, count = re.subn(pattern, lambda _, new=new: new, text, flags=re.S)
            assert count == 1, old
        (folder / name).write_text(text)
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider"]
    command += ["-m", "not slow", "-k", f"not ({OMITTED})"]
    environment = {name: os.environ[name] for name in ("PATH", "HOME") if name in os.environ}
    run = subprocess.run(command, cwd=folder, env=environment, stdout=-1, stderr=-2, text=True)
    print(run.stdout.splitlines()[-1])  # pytest's sum and its time
    assert run.returncode == 0, run.stdout[-20_000:]
