"""With this recipe, your site's own login replaces CHATKIT_TOKENS: a JSON Web Token in a cookie.

With a key     export SESSION_SECRET=$(openssl rand -hex 32) ALLOWED_ORIGINS=http://localhost:8000
               backend/.venv/bin/python -c 'import jwt, os, time; print("document.cookie =",
                   repr("session=" + jwt.encode({"sub": "alice", "exp": time.time() + 3600},
                   os.environ["SESSION_SECRET"])))'
               make run APP=tests/examples/login.py
               Open http://localhost:8000/chatkit. Copy the line that the second command has
               printed into the browser's console, and reload the page. You are now alice.
Without a key  Do the same, but write PROVIDER=mock make run APP=tests/examples/login.py
Change         Write your own `logged_in`: it may, for example, look the session up in a database.

Your login sets the cookie `session` with HttpOnly, Secure and SameSite=Lax. Its value is a token
that SESSION_SECRET signs (HS256). The token has the user (`sub`, a string) and its end (`exp`). A
page on another host of your site needs two things: a cookie with that site as its Domain, and
`credentials: "include"` in ChatKit's option `api.fetch`. For pages of other sites, the cookie needs
SameSite=None, and some browsers block such cookies. /docs stays open.
"""

import os
from typing import Annotated

import jwt  # PyJWT, which openai-agents installs through mcp
from fastapi import Cookie, HTTPException

import main

SESSION_SECRET = os.getenv("SESSION_SECRET", "")
if len(SESSION_SECRET) < 32:
    raise SystemExit("SESSION_SECRET needs 32 characters, for example of: openssl rand -hex 32")
# A browser sends the cookie of whoever is logged in, no matter whose page asks.
if "*" in main.ALLOWED_ORIGINS:
    raise SystemExit("With ALLOWED_ORIGINS=* any web page could read the chats. Name your own.")


def logged_in(session: Annotated[str, Cookie()] = "") -> main.Context:
    """Return the context that the Store receives. Raises HTTPException (401)."""
    try:
        claims = jwt.decode(
            session, SESSION_SECRET, algorithms=["HS256"], options={"require": ["sub", "exp"]}
        )
    except jwt.InvalidTokenError:
        raise HTTPException(401, "Please log in.") from None
    return {"user_id": claims["sub"]}


main.app.dependency_overrides[main.request_context] = logged_in

if __name__ == "__main__":
    main.serve()
