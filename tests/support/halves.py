"""Run the tests in two processes side by side: python tests/support/halves.py [options of pytest].

Each keeps about one core busy, and starts the servers that its half of the files needs. What the
second one prints follows when the first one has ended.
"""

import subprocess
import sys
import tempfile
from pathlib import Path

TESTS = Path(__file__).resolve().parents[1]
# About half of the time.
FIRST = ("chat", "examples", "leaving", "steps", "wire", "workarounds")

first = [str(TESTS / f"test_{name}.py") for name in FIRST]
second = [str(TESTS), *(f"--ignore={path}" for path in first)]
command = [sys.executable, "-m", "pytest", "-q", *sys.argv[1:]]

with tempfile.TemporaryFile("w+") as output:
    half = subprocess.Popen([*command, *second], stdout=output, stderr=subprocess.STDOUT)
    try:
        code = subprocess.call([*command, *first])
        code = half.wait() or code
    finally:
        half.terminate()
        half.wait()
        output.seek(0)
        print(output.read(), end="")
sys.exit(code)
