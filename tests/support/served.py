"""What `uvicorn main:app --app-dir backend` runs, on the port of the environment."""

import os
import sys

import uvicorn

sys.argv = ["uvicorn", "main:app", "--app-dir", "backend", "--port", os.environ["PORT"]]
uvicorn.main()
