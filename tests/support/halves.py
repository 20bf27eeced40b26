"""Run the tests in two processes side by side: python tests/support/halves.py [options of pytest].

Each keeps about one core busy, and starts the servers that its half of the files needs. What the
second one prints follows when the first one has ended.
"""

import signal
import subprocess
import sys
import tempfile
from pathlib import Path

TESTS = Path(__file__).resolve().parents[1]
# About half of the time, with and without the slow tests.
FIRST = ("examples", "faults", "leaving", "memory", "turns")

first = [str(TESTS / f"test_{name}.py") for name in FIRST]
second = [str(TESTS), *(f"--ignore={path}" for path in first)]
command = [sys.executable, "-m", "pytest", "-q", *sys.argv[1:]]

# Ctrl-C reaches both processes, and they end with what they know. SIGTERM does not.
signal.signal(signal.SIGINT, lambda *_: None)
signal.signal(signal.SIGTERM, lambda *_: [half.send_signal(signal.SIGINT) for half in halves])

with tempfile.TemporaryFile("w+") as output:
    halves = [
        subprocess.Popen([*command, *first]),
        subprocess.Popen([*command, *second], stdout=output, stderr=subprocess.STDOUT),
    ]
    codes = [half.wait() for half in halves]
    output.seek(0)
    print(output.read(), end="")

NO_TESTS = 5  # pytest's code where -k selects none: no fault, if the other half has some
sys.exit(max([code for code in codes if code != NO_TESTS], key=abs, default=NO_TESTS))
