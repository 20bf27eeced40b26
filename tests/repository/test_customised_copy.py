"""What stays green when somebody has made the files their own: everything outside this folder.

Not yet among the changes: the default models, another agent and the login. Some tests repeat them.
"""

import os
import shutil
import subprocess
import sys

import pytest

from client import ROOT

# Each is a part of a file and what replaces it.
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
        "store = MemoryStore()": """
class BoatStore(MemoryStore):
    pass


store = BoatStore()
""",
        "server = ChatKitServerImpl(store)": '''
server = ChatKitServerImpl(store)
from agents import function_tool


@function_tool
def boats() -> str:
    """List the boats."""
    return "a canoe"


server.agent.tools.append(boats)
''',
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
            assert text.count(old) == 1, old
            text = text.replace(old, new)
        (folder / name).write_text(text)
    command = [sys.executable, "-m", "pytest", "-q", "-m", "not slow", "-p", "no:cacheprovider"]
    environment = {name: os.environ[name] for name in ("PATH", "HOME") if name in os.environ}
    run = subprocess.run(command, cwd=folder, env=environment, stdout=-1, stderr=-2, text=True)
    assert run.returncode == 0, run.stdout[-20_000:]
