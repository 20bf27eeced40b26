"""Settings, starts that must not happen, keys, models, and the template's five boxes."""

import os
import re
import shutil
import subprocess
import sys
from datetime import date
from pathlib import Path
from types import ModuleType

import httpx
import pytest

from client import EXAMPLES, NO_TLS, ROOT, Chat, Server, done, error_of, load_main, text_of

UNUSABLE = [
    ({"PROVIDER": "gemni"}, "PROVIDER='gemni' is none of gemini, openai, anthropic, mock."),
    ({"PROVIDER": "groq"}, "needs MODEL"),
    ({"PORT": "http"}, "PORT='http': Input should be a valid integer"),
    ({"PORT": "99999"}, "PORT='99999': Input should be less than 65536."),
    ({"PORT": "0"}, "PORT='0': Input should be greater than 0."),
    ({"WORKERS": "0"}, "WORKERS='0': Input should be greater than 0."),
    ({"WORKERS": "two"}, "WORKERS='two': Input should be a valid integer"),
    ({"MODEL_TIMEOUT": "-1"}, "MODEL_TIMEOUT='-1': Input should be greater than 0."),
    ({"MODEL_TIMEOUT": "nan"}, "MODEL_TIMEOUT='nan': Input should be greater than 0."),
    (
        {"CHATKIT_TOKENS": "alice"},
        "CHATKIT_TOKENS is not of the form user:token,user:token, each token once.",
    ),
    ({"CHATKIT_TOKENS": "alice:a,bob:a"}, "CHATKIT_TOKENS"),
    ({"CHATKIT_TOKENS": "alice:a:b"}, "CHATKIT_TOKENS"),
    ({"CHATKIT_TOKENS": "alice:a,:b"}, "CHATKIT_TOKENS"),
    ({"CHATKIT_TOKENS": "alice:a,bob:"}, "CHATKIT_TOKENS"),
    ({"CHATKIT_TOKENS": " , "}, "CHATKIT_TOKENS"),
    ({"CHATKIT_TOKENS": "alice:tokën"}, "CHATKIT_TOKENS has a token that no header can hold"),
    ({"CHATKIT_TOKENS": "alice:to\x1bken"}, "CHATKIT_TOKENS has a token that no header can hold"),
    *[
        ({"ALLOWED_ORIGINS": f"https://app.example,{origin}"}, f"ALLOWED_ORIGINS: '{origin}' is")
        for origin in (
            "https://app.example/chat",
            "https://app.example//",
            "https://app.example?",
            "https://*.app.example",
            "https://me@app.example",
            "https://äpp.example",
            "https://app.example:port",
            "app.example",
            "null",
        )
    ],
]


@pytest.mark.parametrize(("environment", "says"), UNUSABLE, ids=str)
def test_an_unusable_setting_stops_the_start_with_one_line(tmp_path, environment, says):
    with pytest.raises(SystemExit) as stop:
        load_main(tmp_path, environment)
    line = stop.value.code  # a text: Python prints it and exits with 1
    assert says in line
    assert "\n" not in line and "alice" not in line


@pytest.mark.parametrize(
    ("text", "origins"),
    [
        ("*", ["*"]),
        ("https://app.example/", ["https://app.example"]),
        (" HTTPS://App.Example:443 ,", ["https://app.example"]),
        ("http://localhost:3000,http://[::1]:80", ["http://localhost:3000", "http://[::1]"]),
        ("http://app.example:443", ["http://app.example:443"]),
        ("capacitor://localhost", ["capacitor://localhost"]),
    ],
)
def test_origins_are_understood_as_browsers_send_them(tmp_path, text, origins):
    assert origins == load_main(tmp_path, {"ALLOWED_ORIGINS": text}).ALLOWED_ORIGINS


AS_AN_OPERATOR_SEES_IT = [
    ({"PORT": "99999"}, "PORT='99999': Input should be less than 65536."),
    ({"PROVIDER": "nope", "WORKERS": "2"}, "PROVIDER='nope' is none of gemini, openai, "),
    ({"WORKERS": "2"}, "WORKERS=2 needs a database: MemoryStore keeps the threads of one process."),
]


@pytest.mark.parametrize(("environment", "says"), AS_AN_OPERATOR_SEES_IT, ids=str)
def test_an_unusable_setting_as_an_operator_sees_it(tmp_path, environment, says):
    """No worker is started, and none is started again."""
    server = Server(tmp_path, {"PROVIDER": "mock", **environment}, fork=True)
    assert server.process.wait(60) == 1
    server.reader.join(10)
    line, end = server.log
    assert line.startswith(says) and end == "(end of log)"


@pytest.fixture(scope="module")
def bare(servers):
    return servers("no_key")


def test_without_a_key_the_provider_is_never_called(bare, provider):
    chat = Chat(bare.url)
    error = error_of(chat.say("hello"))
    assert (error.code, error.allow_retry) == ("custom", False)
    assert "GEMINI_API_KEY" in error.message and "PROVIDER=mock" in error.message
    assert [text_of(item) for item in chat.items()] == ["hello"]
    assert provider.requests == []


def test_the_log_of_a_start(bare):
    log = "\n".join(bare.log)
    assert bare.log.count("INFO:     PROVIDER=gemini, model gemini/gemini-flash-latest") == 1
    assert (
        log.count("GEMINI_API_KEY is not set")
        == log.count("WARNING:  GEMINI_API_KEY is not set")
        == 1
    )
    assert (
        log.count("anyone who can reach this port can read every thread")
        == log.count("WARNING:  CHATKIT_T")
        == 1
    )
    assert log.count("Started server process") == 1
    for noise in ("Traceback", "OUTSIDE", "Give Feedback", "Provider List", "tracing"):
        assert noise not in log


@pytest.mark.parametrize(
    ("files", "read"),
    [([".env"], ".env"), (["backend/.env"], "backend/.env"), ([".env", "backend/.env"], ".env")],
)
def test_which_env_file_is_read(tmp_path, files, read):
    """The template's, or the one beside main.py, for a copy of it."""
    (tmp_path / "backend").mkdir()
    for file in files:
        (tmp_path / file).write_text(f"MODEL=from-{file}\n")
    main = load_main(tmp_path)
    assert tmp_path / read == main.ENV_FILE
    assert f"from-{read}" == main.MODEL


def test_the_start_says_which_env_file_was_read(servers, bare):
    server = servers("env_file")
    file = Path(server.wait_for("Settings from").partition(" and ")[2].splitlines()[0])
    assert file.name == ".env" and file.read_text().startswith("PROVIDER=mock")
    assert "Settings from the environment and no .env file" in "\n".join(bare.log)


def test_mock_needs_neither_key_nor_network(servers, provider):
    """As `uvicorn main:app --app-dir backend` serves it; PROVIDER=mock is set in .env."""
    chat = Chat(servers("env_file").url)
    for _ in range(2):
        events = chat.say("hello")
        (reply,) = done(events)
        assert "PROVIDER=mock" in text_of(reply)
        assert "error" not in [event.type for event in events]
    assert len(chat.items()) == 4 and provider.requests == []


def test_the_environment_wins_over_the_env_file(servers):
    """.env says PORT=1."""
    server = servers("env_file")
    assert server.port != 1 and httpx.get(f"{server.url}/health", verify=NO_TLS).json() == {
        "status": "ok"
    }


@pytest.mark.parametrize("model", ["gpt-4o-mini", "openai/gpt-4o-mini"])
def test_a_model_with_or_without_its_prefix(main, model):
    assert main.litellm_name("openai", model) == "openai/gpt-4o-mini"


def test_a_provider_with_slashes_in_its_models(main):
    assert main.litellm_name("openrouter", "anthropic/claude-x") == "openrouter/anthropic/claude-x"


@pytest.mark.parametrize(
    ("name", "found"),
    [
        ("gpt-4o-mini", "openai/gpt-4o-mini"),
        ("openai/gpt-4o-mini", "openai/gpt-4o-mini"),
        ("anthropic/claude-sonnet-4-6", "anthropic/claude-sonnet-4-6"),
        ("meta-llama/llama-x", "openai/meta-llama/llama-x"),  # no provider of that name
    ],
)
def test_the_model_of_an_agent(main, name, found):
    """An agent names it with or without its provider; the model is made once."""
    models = main.ProviderModels(main.model)
    assert models.get_model(name).model == found
    assert models.get_model(name) is models.get_model(name)
    assert models.get_model(None) is main.model


def test_the_default_models_are_alive(main):
    """In LiteLLM's own map, and not past its deprecation date."""
    for provider in ("gemini", "openai", "anthropic"):
        name = main.litellm_name(provider, "auto")
        entry = main.litellm.model_cost.get(name) or main.litellm.model_cost[name.partition("/")[2]]
        assert entry["litellm_provider"] == provider
        assert entry.get("deprecation_date", "9999") > date.today().isoformat()
        assert entry.get("supports_system_messages", True)


def names_and_defaults(text: str, pattern: str) -> dict[str, str]:
    return dict(re.findall(pattern, text, re.M))


def test_readme_example_and_code_name_the_same_settings():
    code = (ROOT / "backend" / "main.py").read_text()
    from_code = names_and_defaults(code, r'setting\("([A-Z_]+)", "([^"]*)"')
    keys = dict.fromkeys(("GEMINI_API_KEY", "OPENAI_API_KEY", "ANTHROPIC_API_KEY"), "")
    assert (
        names_and_defaults((ROOT / ".env.example").read_text(), r"^([A-Z_]+)=(.*)$")
        == from_code | keys
    )
    readme = (ROOT / "README.md").read_text()
    assert names_and_defaults(readme, r"^\| `([A-Z_]+)` \| (?:`([^`]*)`)? *\|") == from_code | keys
    for name in from_code | keys:
        assert name in code.split('"""')[1], f"{name} is not in the docstring"


def requirement_lines(name: str) -> dict[str, str]:
    lines = [line.partition(" ;")[0] for line in (ROOT / name).read_text().splitlines()]
    assert all("==" in line for line in lines), name
    return {
        line.split("==")[0].split("[")[0].lower().replace("_", "-"): line.split("==")[1]
        for line in lines
    }


def test_requirements_and_constraints_agree():
    constraints = requirement_lines("backend/constraints.txt")
    wanted = requirement_lines("backend/requirements.txt") | requirement_lines(
        "tests/requirements.txt"
    )
    assert wanted.items() <= constraints.items()
    assert constraints.keys() >= {"openai", "pydantic", "starlette", "anyio"}


def test_the_file_carries_its_requirements():
    """As inline script metadata, for the Pythons that the Makefile names.

    https://peps.python.org/pep-0723/
    """
    code = (ROOT / "backend" / "main.py").read_text()
    block = re.match(r"# /// script\n((?:#.*\n)+?)# ///\n", code)[1]
    assert (
        re.findall(r'^#     "(.+)",$', block, re.M)
        == (ROOT / "backend" / "requirements.txt").read_text().split()
    )
    newest, *_, oldest = re.search(r"^PYTHONS := (.+)$", (ROOT / "Makefile").read_text(), re.M)[
        1
    ].split()
    major, minor = newest.split(".")
    assert f'requires-python = ">={oldest},<{major}.{int(minor) + 1}"' in block


def test_the_requirements_satisfy_the_template():
    wanted = requirement_lines("backend/requirements.txt")
    assert (wanted["fastapi"], wanted["uvicorn"], wanted["python-dotenv"]) == (
        "0.115.6",
        "0.32.1",
        "1.0.1",
    )
    numbers = {name: tuple(map(int, number.split("."))) for name, number in wanted.items()}
    assert numbers["openai-chatkit"] <= (1, 4, 0) and numbers["openai-agents"] >= (0, 6, 2)
    assert set(wanted) == {
        "fastapi",
        "uvicorn",
        "openai-chatkit",
        "openai-agents",
        "litellm",
        "python-dotenv",
    }


# ---- The template's five boxes --------------------------------------------------


def test_box_1_starts_without_import_errors(server):
    assert "Error" not in "\n".join(server.log[:5])


def test_box_2_health_returns_200(server):
    response = httpx.get(f"{server.url}/health", verify=NO_TLS)
    assert (response.status_code, response.json()) == (200, {"status": "ok"})


def test_box_3_chatkit_accepts_post(chat):
    assert chat.get("threads.list")["data"] is not None
    assert chat.http.get("/chatkit").headers["content-type"].startswith("text/html")


def test_box_4_messages_do_not_overwrite_each_other(chat):
    for text in ("one", "two"):
        chat.say(text)
    state = chat.http.get("/debug/threads").json()[chat.thread_id]
    assert state["count"] == 4 and len({item["id"] for item in state["items"]}) == 4
    assert [(item["type"], item["content"]) for item in state["items"]] == [
        ("UserMessageItem", ["one"]),
        ("AssistantMessageItem", ["You said: one"]),
        ("UserMessageItem", ["two"]),
        ("AssistantMessageItem", ["You said: two"]),
    ]


def test_box_5_the_agent_remembers(chat, provider):
    chat.say("My name is Ada.")
    chat.say("What is my name?")
    assert ("user", "My name is Ada.") in provider.requests[-1].messages


# ---- make -----------------------------------------------------------------------


def make_on(folder: Path, pythons: dict[str, str], *arguments: str) -> str:
    """What `make` prints where PATH has these Pythons alone.

    `pythons` holds their names, and the versions that they say they are.
    """
    for name, version in pythons.items():
        numbers = tuple(map(int, version.split(".")))
        lie = f"import sys; sys.version_info = {numbers}; exec(sys.argv[1])"
        answer = f'[ "$1" = --version ] && echo Python {version}'
        run = f"""exec {sys.executable} -c '{lie}' "$2" """
        (folder / name).write_text(f"#!/bin/sh\n{answer} || {run}\n")
        (folder / name).chmod(0o755)
    command = [
        shutil.which("make"),
        "-C",
        str(ROOT),
        "--always-make",
        "--no-print-directory",
        *arguments,
    ]
    return subprocess.run(
        command, env={"PATH": str(folder)}, stdout=-1, stderr=subprocess.STDOUT, text=True
    ).stdout


@pytest.mark.parametrize(
    ("pythons", "chosen"),
    [
        ({"python3": "3.11.7", "python3.13": "3.13.0"}, "python3"),
        ({"python3": "3.9.18", "python3.10": "3.10.13", "python3.12": "3.12.1"}, "python3.12"),
        ({"python3": "3.15.0", "python3.9": "3.9.18", "python3.14": "3.14.0"}, "python3.14"),
        ({"python3.10": "3.10.13"}, "python3.10"),
    ],
)
def test_make_finds_a_python(tmp_path, pythons, chosen):
    assert f"\n{chosen} -m venv backend/.venv\n" in make_on(tmp_path, pythons, "--dry-run", "venv")
    pythons = {**pythons, "python3.11": "3.11.7"}
    assert "\npython3.11 -m venv" in make_on(
        tmp_path, pythons, "--dry-run", "venv", "PYTHON=python3.11"
    )


@pytest.mark.parametrize(
    ("pythons", "arguments", "says"),
    [
        ({"python3": "3.9.18", "python3.9": "3.9.18"}, [], "python3 is Python 3.9.18"),
        (
            {"python3": "3.12.1", "python3.9": "3.9.18"},
            ["PYTHON=python3.9"],
            "python3.9 is Python 3.9.18",
        ),
        ({}, [], "python3 is missing"),
    ],
)
def test_make_finds_no_python(tmp_path, pythons, arguments, says):
    (line,) = make_on(tmp_path, pythons, "venv", f"VENV={tmp_path}/venv", *arguments).splitlines()
    assert (
        f"{says}, supported are Python 3.14 3.13 3.12 3.11 3.10: make PYTHON=" in line
        and "uv run" in line
    )


def test_make_help_lists_the_targets():
    output = subprocess.run(["make", "-C", str(ROOT)], capture_output=True, text=True).stdout
    targets = "venv run test test-postgres test-latest test-browser lint bench bench-postgres"
    for target in [*targets.split(), "lock", "check-lock", "clean"]:
        assert re.search(rf"^{target}\b", output, re.M), output


def test_a_canned_reply_is_complete(servers):
    """It has no finish reason: ProviderStream would take it for one that was cut off."""
    events = Chat(servers("env_file").url).say("hello")
    assert "error" not in [event.type for event in events]


@pytest.mark.parametrize(
    "program",
    [
        "from main import serve",
        "import main as chat\nserve = chat.serve",
        "import main\nmain.app.title = 'mine'\nserve = main.serve",
        "def serve():\n    import main\n    main.serve()",
    ],
)
def test_a_program_that_serves(tmp_path, program):
    path = tmp_path / "program.py"
    path.write_text(f"{program}\nif __name__ == '__main__':\n    serve()\n")
    server = Server(tmp_path / "server", {"PROVIDER": "mock"}, path, fork=True).started()
    title = httpx.get(f"{server.url}/openapi.json", verify=NO_TLS).json()["info"]["title"]
    assert title == ("mine" if "mine" in program else "ChatKit Server")
    assert server.stop() == 0


def test_what_each_worker_imports(main, monkeypatch):
    """The program, not main.py alone: that would serve without what the program adds."""
    monkeypatch.setitem(sys.modules, main.__name__, main)
    program = ModuleType("program")
    program.__file__ = "/srv/program.py"
    with pytest.raises(SystemExit, match="import main"):
        main.name_for_workers(program)
    program.chat = main
    assert main.name_for_workers(program) == "program:chat.app"
    program.app = main.app
    assert main.name_for_workers(program) == "program:app"


@pytest.mark.parametrize(("value", "kept"), [("", "true"), (" ", "true"), ("false", "false")])
def test_a_blank_variable_has_the_default(main, monkeypatch, value, kept):
    """With OPENAI_AGENTS_DISABLE_TRACING="", openai-agents would upload traces."""
    monkeypatch.setenv("OPENAI_AGENTS_DISABLE_TRACING", value)
    main.set_default("OPENAI_AGENTS_DISABLE_TRACING", "true")
    assert os.environ["OPENAI_AGENTS_DISABLE_TRACING"] == kept


@pytest.mark.parametrize(
    ("value", "read"), [("", "from-the-file"), (" ", "from-the-file"), ("m", "m")]
)
def test_a_blank_variable_hides_nothing_in_the_env_file(tmp_path, value, read):
    (tmp_path / ".env").write_text("MODEL=from-the-file\nOPENAI_API_KEY=key-of-the-file\n")
    settings = {"PROVIDER": "openai", "MODEL": value, "OPENAI_API_KEY": value}
    main = load_main(tmp_path, settings)
    assert read == main.MODEL and main.model.missing_key is None


def test_a_blank_key_is_a_missing_key(tmp_path):
    """LiteLLM's validate_environment accepts a blank key."""
    assert (
        load_main(tmp_path, {"PROVIDER": "openai", "OPENAI_API_KEY": " "}).model.missing_key
        == "OPENAI_API_KEY"
    )


def test_web_concurrency_starts_no_workers(servers):
    """Hosting platforms set it, and uvicorn follows it. Each worker would have its own threads."""
    log = "\n".join(servers("workers").log)
    assert log.count("Started server process") == 1 and "parent process" not in log


def test_a_program_of_your_own_beside_main(recipe, monkeypatch, tmp_path):
    """The tests find what you have put into backend/, and your .env is not read for it."""
    yours = tmp_path / "yours" / "backend"
    yours.mkdir(parents=True)
    (yours / ".env").write_text("MODEL=yours\n")
    shutil.copy(ROOT / "backend" / "main.py", yours)
    shutil.copy(EXAMPLES / "widget.py", yours / "mine.py")
    monkeypatch.setattr("client.ROOT", yours.parent)
    server = recipe("mine", "mock")
    assert "no .env file" in "\n".join(server.log)
    assert done(Chat(server.url).say("hello"))


def test_a_generic_agent_at_the_top_of_main(tmp_path):
    """pydantic looks for the names of its annotation in sys.modules["main"]."""
    at = "# ---- Start -"
    agent = "billing = Agent[AgentContext[Context]](name='Billing')"
    assert load_main(tmp_path, changes={at: f"{agent}\n{at}"}).billing.name == "Billing"
