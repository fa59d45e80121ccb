"""Runs the tests of faults and prints what they show, as docs/reliability.md has it.

    python tests/reliability.py        less than ten minutes on 2 cores

A row is a test: its first line in the source, "what goes wrong: what happens", and how many cases of it have passed.
"""

import ast
import sys
from collections import Counter
from pathlib import Path

import pytest

FOLDER = Path(__file__).resolve().parent
FILES = {"Killed": "test_kills.py", "Damaged, full, read-only": "test_damage.py", "Out of range": "test_flags.py"}
FILES |= {"Properties, of examples that hypothesis looks for": "test_properties.py"}


def described(file: str) -> dict[str, str]:
    """The first line of each test of a file, by the test's name."""
    nodes = ast.parse((FOLDER / file).read_text()).body
    tests = [node for node in nodes if isinstance(node, ast.FunctionDef) and node.name.startswith("test_")]
    return {test.name: ast.get_docstring(test).partition("\n")[0] for test in tests}


class Counts:
    """A plugin that counts what becomes of each test's cases."""

    def __init__(self):
        self.passed, self.all = Counter(), Counter()

    def pytest_runtest_logreport(self, report):
        name = report.nodeid.partition("::")[2].partition("[")[0]
        if report.when == "call" or report.outcome != "passed":
            self.all[name] += 1
            self.passed[name] += report.passed


def main() -> int:
    counts, workers = Counts(), ["-n", "2", "--dist", "worksteal"]
    code = pytest.main(["-q", *workers, *(str(FOLDER / file) for file in FILES.values())], plugins=[counts])
    for title, file in FILES.items():
        print(f"\n## {title}\n\nThe tests of `tests/{file}`:\n\n| what goes wrong: what happens | passed |\n|---|---|")
        for name, line in described(file).items():
            print(f"| {line} | {counts.passed[name]} of {counts.all[name]} |")
    return code


if __name__ == "__main__":
    sys.exit(main())
