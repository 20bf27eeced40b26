"""What `uvicorn main:app --app-dir backend` runs, or another APP, on PORT."""

import os
import sys

import uvicorn

app = os.environ.get("APP", "main:app")
sys.argv = ["uvicorn", app, "--app-dir", "backend", "--port", os.environ["PORT"]]
uvicorn.main()
