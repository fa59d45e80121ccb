"""Keeps the `[shared]` sections of the scripts byte-identical.

    python tests/sync.py pretrain_atc.py    copies that script's shared sections over the same ones of all others
    python tests/sync.py --check            names the first difference (file, section, line); exit code 1

A section goes from its banner, a line `# === name [shared] ===`, to the next banner. To change a section in one script
alone, as for an ablation, drop `[shared]` from its banner there: it is then neither compared nor copied over.
"""

import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent


def split(text: str) -> list[str]:
    """A script's text cut before each banner: what precedes the first one, then a section each."""
    parts = [""]
    for line in text.splitlines(keepends=True):
        if line.startswith("# === "):
            parts.append("")
        parts[-1] += line
    return parts


def name_of(section: str) -> str:
    return section.partition("\n")[0].strip("# =")


def shared(text: str) -> dict[str, str]:
    """Shared sections by name, without the blank lines at their ends."""
    return {name_of(part): part.rstrip() for part in split(text) if name_of(part).endswith("[shared]")}


def copy(source: Path, scripts: list[Path]) -> list[str]:
    """Copies the source's shared sections over those of the same name in the scripts; returns what it changed."""
    given, changed = shared(source.read_text()), []
    for script in scripts:
        parts = split(script.read_text())
        for i, part in enumerate(parts):
            name = name_of(part)
            if name in given and part.rstrip() != given[name]:
                parts[i] = given[name] + part[len(part.rstrip()) :]
                changed.append(f"{script.name}: {name}")
        script.write_text("".join(parts))
    return changed


def first_difference(scripts: list[Path]) -> str | None:
    """The first line at which a script's shared section differs from the first script's that has it."""
    first: dict[str, tuple[Path, str]] = {}
    for script in scripts:
        text = script.read_text()
        for name, section in shared(text).items():
            other, expected = first.setdefault(name, (script, section))
            if section == expected:
                continue
            lines, others = section.split("\n"), expected.split("\n")
            at = next((i for i, (a, b) in enumerate(zip(lines, others, strict=False)) if a != b), None)
            at = min(len(lines), len(others)) if at is None else at
            line = text[: text.index(section)].count("\n") + at + 1
            return f"{script.name}:{line}: section '{name}' differs from {other.name}'s in its line {at + 1}"
    return None


def main() -> None:
    scripts = sorted(ROOT.glob("*.py"))
    if sys.argv[1:] == ["--check"]:
        if difference := first_difference(scripts):
            raise SystemExit(difference)
        print(f"The shared sections of {len(scripts)} scripts are in sync.")
    elif len(sys.argv) == 2 and Path(sys.argv[1]).name in [script.name for script in scripts]:
        print("\n".join(copy(ROOT / Path(sys.argv[1]).name, scripts)) or "Everything is in sync already.")
    else:
        raise SystemExit(__doc__)


if __name__ == "__main__":
    main()
