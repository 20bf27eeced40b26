"""Your site's own login in place of CHATKIT_TOKENS: a JSON Web Token in a cookie.

Try it         export SESSION_SECRET=$(openssl rand -hex 32)
               ALLOWED_ORIGINS=http://localhost:8000 make run APP=tests/examples/login.py
               and log in as alice, in the browser's console, with what this prints:
               backend/.venv/bin/python -c 'import jwt, os, time; print("document.cookie =",
                   repr("session=" + jwt.encode({"sub": "alice", "exp": time.time() + 3600},
                   os.environ["SESSION_SECRET"])))'
Without a key  the same with PROVIDER=mock in front of make
Change         logged_in, for example to ask your own database of sessions

Your login sets the cookie `session`, with the attributes HttpOnly, Secure and SameSite=Lax. Its
value is a token that SESSION_SECRET signs (HS256), with the user (`sub`, a string) and an end
(`exp`). A page of another server sends the cookie if ChatKit's option `api.fetch` sets
`credentials: "include"`. /docs stays open.
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
