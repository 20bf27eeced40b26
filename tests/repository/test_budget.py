"""The size of what people read: main.py, the README, the tests."""

from budget import BUDGET, measure
from client import POSTGRES, ROOT

README = ROOT / "README.md"
PYTHON = [path for path in ROOT.rglob("*.py") if not any(part[0] == "." for part in path.parts)]


def test_main_is_within_its_budget():
    figures = measure()
    over = {name: figures[name] for name, limit in BUDGET.items() if figures[name] > limit}
    assert over == {}, f"of {BUDGET}"


def test_the_tests_and_the_readme_are_within_theirs():
    tests = [path for path in (ROOT / "tests").rglob("*.py") if POSTGRES not in path.parents]
    assert sum(len(path.read_text().splitlines()) for path in tests) <= 7_000
    assert len(README.read_text().splitlines()) <= 250
    assert max(map(len, README.read_text().splitlines())) <= 120  # not by packing
    assert max(len(line) for path in PYTHON for line in path.read_text().splitlines()) <= 100
