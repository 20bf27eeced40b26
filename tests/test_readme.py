"""The README's commands and what it says of names and files."""

import json
import re
import shlex

import httpx

from client import EVENT, NO_TLS, ROOT

README = (ROOT / "README.md").read_text()


def shape(value):
    """A JSON value with its texts, ids and times left out."""
    if isinstance(value, dict):
        return {
            name: value[name] if name in ("type", "allow_cancel") else shape(value[name])
            for name in value
        }
    return [shape(part) for part in value] if isinstance(value, list) else type(value).__name__


def test_the_curl_answers_as_shown(servers):
    server = servers("env_file")
    command, output = re.search(r"\$ (curl .*?)\n(.*?)```", README, re.S).groups()
    words = shlex.split(command)
    url = next(word for word in words if word.startswith("localhost:8000")).replace(
        "localhost:8000", server.url
    )
    response = httpx.post(url, verify=NO_TLS, content=words[words.index("-d") + 1])
    assert response.status_code == 200
    answered = [json.loads(line[6:]) for line in response.text.splitlines() if line]
    for event in answered:
        assert EVENT.validate_python(event).type != "error"
    assert response.text.startswith("data: ") and response.text.endswith("\n\n")
    position = 0
    for line in filter(None, output.splitlines()):
        if line == "...":
            continue
        wanted = shape(json.loads(line.removeprefix("data: ")))
        shapes = [shape(event) for event in answered[position:]]
        assert wanted in shapes, wanted
        position += shapes.index(wanted) + 1


def test_every_workaround_has_its_test():
    table = README.split("## Workarounds")[1].split("\n## ")[0]
    tests = re.findall(r"def (test_\w+)", (ROOT / "tests" / "test_workarounds.py").read_text())
    code = (ROOT / "backend" / "main.py").read_text()
    rows = re.findall(r"^\| (?!library|-)(.+?) \| (.+?) \| (.+?) \|$", table, re.M)
    for _, place, _ in rows:
        assert (name := re.search(r"`([\w. =()]+?)(\.\.\.\))?`", place)) and name[1] in code, place
    assert [test.strip("`") for _, _, test in rows] == tests


def test_what_it_names_is_there():
    for path in re.findall(r"`((?:backend|tests)/[\w./]+)`", README):
        assert (ROOT / path).exists() or path == "backend/.venv", path
    makefile = (ROOT / "Makefile").read_text()
    for target in re.findall(r"`?make ([a-z-]+)", README):
        assert re.search(rf"^{target}:", makefile, re.M) or target in ("and", "each", "it"), target


def test_every_recipe_is_named():
    table = README.split("## Recipes")[1].split("\n## ")[0]
    files = {path.name for path in (ROOT / "tests" / "examples").glob("*.py")}
    assert set(re.findall(r"^\| `(\w+\.py)` \|", table, re.M)) == files


def test_no_section_is_there_twice():
    headings = re.findall(r"^## .*", README, re.M)
    assert sorted({*headings}) == sorted(headings)
