"""The README's commands, its blocks of code, and what it says of names and files."""

import os
import re
import shlex
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import httpx
import pytest

from client import EXAMPLES, NO_TLS, ROOT, Chat, done, free_port, text_of

README = (ROOT / "README.md").read_text()
CODE = (ROOT / "backend" / "main.py").read_text()
BLOCKS = re.findall(r"^```(\w+)\n(.*?)^```", README, re.M | re.S)
CONSOLE = [block for language, block in BLOCKS if language == "console"]
PROGRAMS = r"make|uv|pip|python|git|docker|cp|echo|export|PYTHONPATH=\S+|backend/\.venv/bin/\S+"
COMMANDS = [line for block in CONSOLE for line in block.splitlines()]
COMMANDS = [re.split(r"\s{2,}#", line)[0] for line in COMMANDS]
COMMANDS += re.findall(rf"`((?:{PROGRAMS}) [^`]+)`", README)
STARTS = r"make run|python backend/main\.py"
TESTED = {
    r"uv |docker |.*pip install ": "they need a network",
    STARTS: "test_a_command_that_starts_a_server",
    r"cp |echo ": "test_the_first_start",
    r"make [a-z-]+$": "test_the_targets",
    r".* pytest ": "test_the_code",
    r"git merge-file ": "test_a_newer_version",
    r"\$ curl|    \"|data: ": "test_the_curl_answers_as_shown",
    r"export DATABASE_URL|.*/uvicorn .* postgres_store:app": "tests/postgres",
}


def section(heading: str) -> str:
    return README.split(f"\n## {heading}\n")[1].split("\n## ")[0]


def test_every_command_is_tested():
    known = re.compile("|".join(TESTED))
    assert [command for command in COMMANDS if not known.match(command)] == []


@pytest.fixture(scope="module")
def copy(tmp_path_factory):
    """The repository's files, with this virtual environment and the README's code in its places."""
    folder = tmp_path_factory.mktemp("copy") / "of it"
    skipped = shutil.ignore_patterns(".git", ".venv*", ".lock", "*cache*", ".env", "*.sqlite")
    shutil.copytree(ROOT, folder, ignore=skipped)
    (folder / "backend" / ".venv").symlink_to(sys.prefix)
    for path in folder.rglob("*s.txt"):  # make has nothing to install
        os.utime(path, (0, 0))
    for language, block in BLOCKS:
        if language == "python":
            place, below = re.match(r"# (\S+\.py)(?:, below (.+?):)?", block).groups()
            if below:
                assert CODE.count(f"\n{below}\n") == 1, below
                block = CODE.replace(f"\n{below}\n", f"\n{below}\n{block}\n")
            (folder / place).write_text(block)
    return folder


def started(command: str, folder: Path, provider, text: str = "hello", **variables: str) -> str:
    """The answer of the server that this command starts. It ends with Ctrl-C."""
    port, python = free_port(), Path(sys.executable).parent
    environment = {**provider.environment(), "HOST": "127.0.0.1", "PORT": str(port), **variables}
    environment |= {"PATH": f"{python}:{os.environ['PATH']}", "HOME": str(folder)}
    options = {"stdout": -1, "stderr": -2, "text": True, "start_new_session": True}
    process = subprocess.Popen(["bash", "-ec", command], cwd=folder, env=environment, **options)
    log = ""
    try:
        while "Uvicorn running on" not in log:
            line = process.stdout.readline()
            assert line, log
            log += line
        (reply,) = done(Chat(f"http://127.0.0.1:{port}").say(text))
    finally:
        os.killpg(process.pid, signal.SIGINT)
        log += process.communicate(timeout=20)[0]
    assert "Traceback" not in log and f"PROVIDER={variables.get('PROVIDER', '')}" in log, log
    return text_of(reply)


def test_the_first_start(copy, provider):
    """With the key in .env. The environment's are taken away."""
    (block,) = [block for block in CONSOLE if "cp .env.example .env" in block]
    said = started(block, copy, provider, GEMINI_API_KEY="")
    assert said == "You said: hello" and provider.requests[-1].key == "your-key"
    (copy / ".env").unlink()


@pytest.mark.parametrize("command", sorted(filter(re.compile(STARTS).match, {*COMMANDS})))
def test_a_command_that_starts_a_server(copy, provider, command):
    said = started(command, copy, provider)
    assert said == "You said: hello" or ("PROVIDER=mock" in command and "canned reply" in said)
    # The README's file with a database.
    assert (copy / "chat.sqlite").exists() == ("mine.py" in command)
    (copy / "chat.sqlite").unlink(missing_ok=True)


def test_the_code(copy):
    """The README's test of its tool."""
    (command,) = [command for command in COMMANDS if " pytest " in command]
    run = subprocess.run(shlex.split(command), cwd=copy, capture_output=True, text=True)
    assert run.returncode == 0 and "3 passed" in run.stdout, run.stdout + run.stderr


def test_a_newer_version(tmp_path):
    """What is new comes into a changed main.py."""
    (command,) = [command for command in COMMANDS if command.startswith("git merge-file ")]
    lines = CODE.splitlines(keepends=True)
    (tmp_path / "old.py").write_text(CODE)
    (tmp_path / "main.py").write_text("".join(["# mine\n", *lines]))
    (tmp_path / "new.py").write_text("".join([*lines, "# new\n"]))
    assert subprocess.run(shlex.split(command), cwd=tmp_path).returncode == 0
    assert (tmp_path / "main.py").read_text() == "".join(["# mine\n", *lines, "# new\n"])


def test_the_curl_answers_as_shown(servers):
    """The events that it shows come in this order, and each has the fields that are shown."""
    command, output = re.search(r"\$ (curl .*?)\n(data: .*?)```", README, re.S).groups()
    url, body = re.match(r"curl -sN localhost:8000(\S+) -d '(.*)'$", command, re.S).groups()
    answer = httpx.post(f"{servers('env_file').url}{url}", verify=NO_TLS, content=body)
    assert answer.status_code == 200
    events = iter(answer.text.split("\n\n"))
    for shown in output.splitlines():
        types = ".*".join(re.findall(r'"type":"[\w.]+"', shown))
        assert any(re.search(types, event) for event in events), shown


def test_what_it_names_is_there():
    for path in re.findall(r"`((?:backend|tests)/[\w./]+)`", README):
        assert (ROOT / path).exists(), path
    for name in re.findall(r"`([A-Z]+_[A-Z_]+)`", README):
        assert name in CODE or f"{name}=" in README, name
    recipes = {path.name for path in EXAMPLES.glob("*.py")}
    assert recipes <= {*re.findall(r"(\w+\.py)`", section("Recipes"))}


def test_the_targets():
    targets = {command.split()[1] for command in COMMANDS if command.startswith("make ")}
    subprocess.check_output(["make", "-n", *targets], cwd=ROOT)


def test_the_errors_that_it_explains(main):
    """A row has the first words of an error."""
    rows = re.findall(r"^\| (.*?) \.\.\. \|", section("When something fails"), re.M)
    kinds = [*main.CHAT_ERRORS, main.NO_KEY]
    said = [kind.message.format(key="GEMINI_API_KEY", model="", hint="") for kind in kinds]
    assert len(rows) == 6
    for row in rows:
        assert [text for text in said if text.startswith(row)], row


def test_readme_example_and_code_name_the_same_settings():
    settings = dict(re.findall(r'setting\("([A-Z_]+)", "([^"]*)"', CODE))
    settings |= dict.fromkeys(("GEMINI_API_KEY", "OPENAI_API_KEY", "ANTHROPIC_API_KEY"), "")
    example = (ROOT / ".env.example").read_text()
    assert dict(re.findall(r"^([A-Z_]+)=(.*)$", example, re.M)) == settings
    table = section("Settings")
    assert {*re.findall(r"`([A-Z]{4,}[A-Z_]*)`", table)} == settings.keys()
    rows = [line.split("|") for line in table.splitlines() if line.startswith("| `")]
    for name, default in settings.items():
        assert default in str([row[2] for row in rows if f"`{name}`" in row[1]]), name
        assert name in CODE.split('"""')[1], f"{name} is not in the docstring"
