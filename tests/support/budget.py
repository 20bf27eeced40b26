"""How large backend/main.py is, against its budget: python tests/support/budget.py [FILE].

A new idea displaces an older one. `undocumented` counts the names that a library does not document:
attributes and imports with one leading underscore, and methods of such a name that main.py writes.
"""

import ast
import io
import re
import sys
import tokenize
from pathlib import Path

MAIN = Path(__file__).resolve().parents[2] / "backend" / "main.py"
BUDGET = {
    "code lines": 1276,  # without blank lines, comments and docstrings. The aim is 1,160
    "nodes": 10103,  # of the syntax tree. The aim is 9,900
    "nodes a line": 8.4,
    "definitions": 116,  # classes and functions, nested ones too
    "longest function": 45,  # lines, from `def` to its end
    "undocumented names": 12,
}
OWN = {"_threads", "_items", "_attachments"}  # of MemoryStore
Function = ast.FunctionDef | ast.AsyncFunctionDef
LAYOUT = {
    getattr(tokenize, name)
    for name in ["COMMENT", "NL", "NEWLINE", "INDENT", "DEDENT", "ENDMARKER"]
}


def code_lines(source: str, tree: ast.Module) -> int:
    lines: set[int] = set()
    for token in tokenize.generate_tokens(io.StringIO(source).readline):
        if token.type not in LAYOUT:
            lines.update(range(token.start[0], token.end[0] + 1))
    for node in ast.walk(tree):
        if isinstance(node, ast.Module | ast.ClassDef | Function) and ast.get_docstring(node):
            lines.difference_update(range(node.body[0].lineno, node.body[0].end_lineno + 1))
    return len(lines)


def undocumented(tree: ast.Module) -> list[str]:
    """The private names that main.py reads, imports, or overrides in a class that inherits."""
    used: set[str] = set()
    for node in ast.walk(tree):
        if isinstance(node, ast.Attribute):
            used.add(node.attr)
        elif isinstance(node, ast.ImportFrom):
            used |= {*(node.module or "").split("."), *(alias.name for alias in node.names)}
        elif isinstance(node, ast.ClassDef):
            used |= {part.name for part in node.body if isinstance(part, Function)}
            assigned = [part.targets[0] for part in node.body if isinstance(part, ast.Assign)]
            used |= {getattr(target, "id", "") for target in assigned}
    return sorted(name for name in used - OWN if re.match("_[^_]", name))


def measure(path: Path = MAIN) -> dict[str, float]:
    source = path.read_text(encoding="utf-8")
    tree = ast.parse(source)
    nodes = list(ast.walk(tree))
    functions = [node for node in nodes if isinstance(node, Function)]
    longest = max(functions, key=lambda node: node.end_lineno - node.lineno)
    lines = code_lines(source, tree)
    return {
        "total lines": len(source.splitlines()),
        "code lines": lines,
        "nodes": len(nodes),
        "nodes a line": round(len(nodes) / lines, 2),
        "definitions": sum(isinstance(node, ast.ClassDef | Function) for node in nodes),
        "longest function": longest.end_lineno - longest.lineno + 1,
        "undocumented names": len(undocumented(tree)),
    }


if __name__ == "__main__":
    path = Path(sys.argv[1]) if len(sys.argv) > 1 else MAIN
    for name, figure in measure(path).items():
        limit = BUDGET.get(name)
        verdict = "" if limit is None else f" of {limit}" + (" TOO MUCH" if figure > limit else "")
        print(f"{name:20} {figure}{verdict}")
    print("undocumented:", ", ".join(undocumented(ast.parse(path.read_text(encoding="utf-8")))))
