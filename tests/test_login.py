"""The login that main.py ships: the bearer tokens of CHATKIT_TOKENS."""

import httpx
import pytest

from client import MAIN, NO_TLS, Chat, Server, load_main

pytestmark = pytest.mark.skipif("def parse_tokens(" not in MAIN.read_text(), reason="no tokens")
TOKENS = {"alice": "token-of-alice", "bob": "token-of-bob"}


@pytest.fixture(scope="module", params=[TOKENS, {}], ids=["tokens", "no tokens"])
def server(request, tmp_path_factory):
    tokens = " , ".join(f"{user} : {token}" for user, token in request.param.items())
    environment = {"PROVIDER": "mock", "CHATKIT_TOKENS": tokens}
    server = Server(tmp_path_factory.mktemp("login"), environment, fork=True, login=False).started()
    server.tokens = request.param
    yield server
    assert server.stop() == -15


WRONG = ["", "Bearer", "Bearer nobody", "token-of-alice", "Basic token-of-alice"]
WRONG += ["Bearer token-of-alic", "Bearer token-of-alice2", "Bearer \u00fc"]


@pytest.mark.parametrize("header", [None, *WRONG])
def test_no_valid_token(server, header):
    """Without CHATKIT_TOKENS, nobody needs one."""
    headers = {} if header is None else {"Authorization": header.encode("latin-1")}
    with httpx.Client(base_url=server.url, verify=NO_TLS, headers=headers) as http:
        listing = {"type": "threads.list", "params": {}}
        for response in (http.post("/chatkit", json=listing), http.get("/debug/threads")):
            assert response.status_code == (401 if server.tokens else 200)
            if server.tokens:
                assert response.json() == {"detail": "A valid bearer token is needed."}
                assert response.headers["www-authenticate"] == "Bearer"
        assert http.get("/health").json() == {"status": "ok"}


def test_each_user_has_threads_of_their_own(server):
    counts = []
    for token in TOKENS.values():
        chat = Chat(server.url, token)
        chat.say("hello")
        chat.http.headers["Authorization"] = f"bearer {token}"  # its capital makes no difference
        counts.append(len(chat.http.get("/debug/threads").raise_for_status().json()))
        assert token not in "\n".join(server.log)
    assert counts == ([1, 1] if server.tokens else [1, 2])


def test_a_server_without_tokens_says_so(server):
    """And it shows /docs, which are closed otherwise."""
    warning = "WARNING:  CHATKIT_TOKENS is not set: anyone who can reach this port can read"
    assert "\n".join(server.log).count(warning) == (not server.tokens)
    for path in ("/docs", "/redoc", "/openapi.json", "/docs/oauth2-redirect"):
        answer = httpx.get(f"{server.url}{path}", verify=NO_TLS)
        assert answer.status_code == (404 if server.tokens else 200)


MALFORMED = ["alice", "alice:a,bob:a", "alice:a:b", "alice:a,:b", "alice:a,bob:", ","]
MALFORMED += ["alice:tokën", "alice:to\x1bken", "alice:to ken"]


@pytest.mark.parametrize("text", MALFORMED)
def test_malformed_tokens_stop_the_start_with_one_line(tmp_path, text):
    with pytest.raises(SystemExit, match=r"^CHATKIT_TOKENS is not of the form .*$") as stop:
        load_main(tmp_path, {"CHATKIT_TOKENS": text})
    assert "alice" not in stop.value.code
