"""The login of the tests: client.py writes it into the main.py of each server, in place of yours.

USERS is user:token,user:token. Without it, nobody needs a token.
"""

import os

from fastapi import HTTPException, Request

USERS = [entry.split(":") for entry in os.environ.get("USERS", "").split(",") if entry]


def logged_in(request: Request) -> dict[str, str]:
    """Return the context that the store receives."""
    for user, token in USERS:
        if request.headers.get("Authorization") == f"Bearer {token}":
            return {"user_id": user}
    if USERS:
        raise HTTPException(401, "Who are you?", headers={"WWW-Authenticate": "Bearer"})
    return {}
