"""make, the versions in backend/constraints.txt, and the models that MODEL=auto selects."""

import re
import shutil
import subprocess
import sys
from datetime import date

import pytest

from client import ROOT

MAKEFILE = (ROOT / "Makefile").read_text()
PYTHONS = re.search(r"^PYTHONS := (.+)$", MAKEFILE, re.M)[1]

# The Pythons on PATH with their versions, what is given to make, and a part of what it prints.
FOUND = {
    "python3": ({"python3": "3.11.7", "python3.13": "3.13.0"}, []),
    "python3.12": ({"python3": "3.9.18", "python3.10": "3.10.13", "python3.12": "3.12.1"}, []),
    "python3.14": ({"python3": "3.15.0", "python3.9": "3.9.18", "python3.14": "3.14.0"}, []),
    "python3.10": ({"python3.10": "3.10.13"}, []),
    "python3.11": ({"python3": "3.13.0", "python3.11": "3.11.7"}, ["PYTHON=python3.11"]),
}
MISSING = {
    "python3 is Python 3.9.18.": ({"python3": "3.9.18"}, []),
    "python3.9 is Python": ({"python3": "3.12.1", "python3.9": "3.9.18"}, ["PYTHON=python3.9"]),
    "python3 is missing.": ({}, []),
}


@pytest.mark.parametrize("says", [*FOUND, *MISSING])
def test_make_chooses_a_python(tmp_path, says):
    """Each Python is this one, which says that it is another version."""
    pythons, arguments = (FOUND | MISSING)[says]
    for name, version in pythons.items():
        numbers = tuple(map(int, version.split(".")))
        lie = f"import sys; sys.version_info = {numbers}; exec(sys.argv[1])"
        answer = f'[ "$1" = --version ] && echo Python {version}'
        script = f"#!/bin/sh\n{answer} || exec {sys.executable} -c '{lie}' \"$2\"\n"
        (tmp_path / name).write_text(script)
        (tmp_path / name).chmod(0o755)
    command = [shutil.which("make"), "-C", str(ROOT), "--always-make", "--no-print-directory"]
    command += ["--dry-run", "venv", *arguments]
    run = subprocess.run(command, env={"PATH": str(tmp_path)}, stdout=-1, stderr=-2, text=True)
    if says in FOUND:
        assert f"\n{says} -m venv backend/.venv\n" in run.stdout
    else:
        (line,) = run.stdout.splitlines()
        for part in (says, f"Python {PYTHONS} are supported: make PYTHON=", "uv run"):
            assert part in line


def test_make_help_lists_the_targets():
    output = subprocess.run(["make", "-C", ROOT, "help"], capture_output=True, text=True).stdout
    for target in re.search(r"^\.PHONY: (.+)$", MAKEFILE, re.M)[1].split():
        assert re.search(rf"^{target}\b", output, re.M) or target == "postgres", output


def versions(name: str) -> dict[str, str]:
    lines = [line.partition(" ;")[0] for line in (ROOT / name).read_text().splitlines()]
    pairs = [re.match(r"([\w.-]+)(?:\[\w+\])?==(.+)$", line).groups() for line in lines]
    return {name.lower().replace("_", "-"): version for name, version in pairs}


def test_requirements_and_constraints_agree():
    constraints = versions("backend/constraints.txt")
    wanted = versions("backend/requirements.txt") | versions("tests/requirements.txt")
    assert wanted.items() <= constraints.items()
    assert constraints.keys() >= {"openai", "pydantic", "starlette", "anyio"}


def test_the_file_carries_its_requirements():
    """As inline script metadata, for the Pythons of the Makefile: peps.python.org/pep-0723."""
    code = (ROOT / "backend" / "main.py").read_text()
    block = re.match(r"# /// script\n((?:#.*\n)+?)# ///\n", code)[1]
    listed = re.findall(r'^#     "(.+)",$', block, re.M)
    assert listed == (ROOT / "backend" / "requirements.txt").read_text().split()
    newest, *_, oldest = PYTHONS.split()
    major, minor = newest.split(".")
    assert f'requires-python = ">={oldest},<{major}.{int(minor) + 1}"' in block


def test_the_requirements_satisfy_the_template():
    wanted = versions("backend/requirements.txt")
    numbers = {name: tuple(map(int, number.split("."))) for name, number in wanted.items()}
    assert numbers.pop("openai-chatkit") <= (1, 4, 0)
    assert numbers.pop("openai-agents") >= (0, 6, 2) and numbers.pop("litellm")
    assert numbers == {"fastapi": (0, 115, 6), "uvicorn": (0, 32, 1), "python-dotenv": (1, 0, 1)}


def test_the_default_models_are_alive(main):
    """In LiteLLM's own map, and not past their deprecation date."""
    known = main.litellm.model_cost
    for name in {*main.DEFAULT_MODELS} - {"mock"}:
        model = main.litellm_name(name, "auto")
        entry = known.get(model) or known[model.partition("/")[2]]
        assert entry["litellm_provider"] == name and entry.get("supports_system_messages", True)
        assert entry.get("deprecation_date", "9999") > date.today().isoformat()
