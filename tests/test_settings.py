"""Settings, starts that must not happen, keys, models, and the template's five boxes."""

import re
import subprocess
import sys
from pathlib import Path

import litellm
import pytest

from client import Chat, done, error_of, load_main, text_of, write_main

UNUSABLE = [
    ("PROVIDER", "gemni", "PROVIDER='gemni' must be one of "),
    ("PROVIDER", "groq", "Any other provider of LiteLLM needs MODEL, too."),
    ("PORT", "0", "PORT='0': Input should be greater than 0."),
    ("PORT", "65536", "PORT='65536': Input should be less than 65536."),
    ("MODEL_TIMEOUT", "nan", "MODEL_TIMEOUT='nan': Input should be greater than 0."),
]


@pytest.mark.parametrize(("name", "value", "says"), UNUSABLE)
def test_an_unusable_setting_stops_the_start_with_one_line(tmp_path, name, value, says):
    with pytest.raises(SystemExit) as stop:
        load_main(tmp_path, {name: value})
    line = stop.value.code  # a text: Python prints it and exits with 1
    assert name in line and says in line and "\n" not in line


def test_what_is_read_as_it_is_meant(tmp_path):
    """With spaces around it, and as browsers send an origin."""
    settings = {"ALLOWED_ORIGINS": " https://app.example/ , http://localhost:3000", "PORT": " 80 "}
    main = load_main(tmp_path, settings)
    assert main.ALLOWED_ORIGINS == ["https://app.example", "http://localhost:3000"]
    assert main.PORT == 80
    ollama = load_main(tmp_path, {"PROVIDER": "ollama_chat", "MODEL": "llama3.2"})
    assert ollama.model.missing_keys == []  # LiteLLM knows the usual address


def test_without_a_key_the_provider_is_never_called(servers, provider, main):
    """In one process, whatever a hosting platform sets: each would have threads of its own."""
    server = servers("no_key")
    chat = Chat(server.url)
    log = "\n".join(server.log)
    name = re.search(r"INFO:     PROVIDER=(\w+), model ", log)[1]
    error = error_of(chat.say("hello"))
    assert (error.code, error.allow_retry) == ("custom", False)
    assert error.message == main.NO_KEY.message.format(key=f"{name.upper()}_API_KEY")
    assert [text_of(item) for item in chat.items()] == ["hello"] and provider.requests == []
    for once in (
        f"INFO:     PROVIDER={name}, model {main.litellm_name(name, 'auto')}, no .env.",
        "WARNING:  LiteLLM may need ",
        "Started server process",
    ):
        assert log.count(once) == 1, log
    log = "\n".join(server.log)
    assert "Traceback" not in log and "tracing" not in log


def test_mock_needs_neither_key_nor_network(servers, provider, main):
    """As uvicorn serves it. PROVIDER=mock is set in .env, PORT=1 too, but the environment wins."""
    server = servers("env_file")
    chat = Chat(server.url)
    for _ in range(2):
        events = chat.say("hello")
        assert text_of(done(events)[0]) == main.MOCK_REPLY
        assert "error" not in [event.type for event in events]
    assert len(chat.items()) == 4 and provider.requests == [] and server.port != 1
    file = Path(re.search(r", (\S*\.env)\. The chat", server.wait_for("The chat is at"))[1])
    assert file.name == ".env" and file.read_text().startswith("PROVIDER=mock")


@pytest.mark.parametrize("files", [[".env"], ["backend/.env"], [".env", "backend/.env"]])
def test_which_env_file_is_read(tmp_path, files):
    """The template's, or the one beside main.py, for a copy of it."""
    (tmp_path / "backend").mkdir()
    for file in files:
        (tmp_path / file).write_text(f"MODEL=from-{file}\n", "utf-8-sig")  # as Windows may do
    main = load_main(tmp_path)
    assert tmp_path / files[0] == main.ENV_FILE and f"from-{files[0]}" == main.MODEL


@pytest.mark.parametrize(("value", "read"), [("", "of the file"), (" ", "of the file"), ("m", "m")])
def test_a_blank_variable_is_unset(tmp_path, main, value, read):
    """Docker compose makes it of an unset one; a blank key would be sent, and traces uploaded."""
    (tmp_path / ".env").write_text("MODEL=of the file\nOPENAI_API_KEY=of the file\nHOST=\n")
    settings = dict.fromkeys(("MODEL", "OPENAI_API_KEY", "OPENAI_AGENTS_DISABLE_TRACING"), value)
    at = "# ---- Settings -"
    keep = {at: f"KEPT = dict(os.environ)\n\n{at}"}
    loaded = load_main(tmp_path, settings, keep)
    assert read == loaded.MODEL == loaded.KEPT["OPENAI_API_KEY"] and loaded.HOST == main.HOST
    assert loaded.KEPT["OPENAI_AGENTS_DISABLE_TRACING"] == (value.strip() or "true")
    kept = load_main(tmp_path / "no file", settings, keep).KEPT
    assert kept.get("OPENAI_API_KEY", "") == value.strip()


@pytest.mark.slow
def test_only_this_file_reads_an_env_file(tmp_path):
    """LiteLLM would look for one above its own folder, and set its blank keys."""
    (tmp_path / "litellm").symlink_to(Path(litellm.__file__).parent)
    (tmp_path / ".env").write_text("PROVIDER=gemini\nGEMINI_API_KEY=\n")
    write_main(tmp_path, None)
    program = tmp_path / "program.py"
    program.write_text("import main; print(main.make_model('gemini/x').missing_keys)")
    environment = {"PYTHONPATH": str(tmp_path / "backend")}
    printed = subprocess.check_output([sys.executable, program], env=environment, text=True)
    assert "GEMINI_API_KEY" in printed


def test_the_names_of_models(main, monkeypatch):
    """With or without the provider. An agent without a model has the default."""
    assert main.litellm_name("openai", "openai/model-x") == "openai/model-x"
    assert main.litellm_name("openrouter", "openai/model-x") == "openrouter/openai/model-x"
    monkeypatch.setattr(main, "PROVIDER", "openai")
    assert main.ProviderModels().get_model("model-x").model == "openai/model-x"
    assert main.ProviderModels().get_model("anthropic/model-x").model == "anthropic/model-x"
    assert main.ProviderModels().get_model(None) is main.model
    monkeypatch.delenv("ANTHROPIC_API_KEY", raising=False)
    assert main.ProviderModel("anthropic/x").missing_keys == ["ANTHROPIC_API_KEY"]
    monkeypatch.setenv("ANTHROPIC_API_BASE", "http://gateway")  # it may have the key
    assert main.ProviderModel("anthropic/x").missing_keys == []


def test_the_five_boxes(server, chat, provider):
    """It starts, /health, POST /chatkit, no message overwrites another, the agent remembers."""
    assert "Error" not in "\n".join(server.log[:5])
    response = chat.http.get("/health")
    assert (response.status_code, response.json()) == (200, {"status": "ok"})
    assert chat.http.get("/chatkit").headers["content-type"].startswith("text/html")
    for text in ("one", "two"):
        chat.say(text)
    state = chat.http.get("/debug/threads").json()[chat.thread_id]
    assert state["count"] == 4 and len({item["id"] for item in state["items"]}) == 4
    kinds = ["UserMessageItem", "AssistantMessageItem"] * 2
    texts = [["one"], ["You said: one"], ["two"], ["You said: two"]]
    assert [item["type"] for item in state["items"]] == kinds
    assert [item["content"] for item in state["items"]] == texts
    assert ("user", "one") in provider.requests[-1].messages
