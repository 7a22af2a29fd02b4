"""What parts of a run on a GPU found: written as it is found, and made into one table and one JSON file."""

from __future__ import annotations

import argparse
import json
import sys
import time
import traceback
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any


class Results:
    """A file of one JSON line a case: `part`, `case`, and `values` or `error`, whole at every moment."""

    def __init__(self, part: str, path: Path | None) -> None:
        self.part, self.path, self.failed = part, path, 0

    def note(self, case: str, values: dict[str, Any]) -> None:
        self._write({"part": self.part, "case": case, "values": values})

    def run(self, case: str, work: Callable[[], dict[str, Any]]) -> None:
        """Notes what `work` returns, or what it raises."""
        try:
            self.note(case, work())
        except Exception as error:
            traceback.print_exc()
            self.fail(case, f"{type(error).__name__}: {error}")

    def fail(self, case: str, why: str) -> None:
        self.failed += 1
        self._write({"part": self.part, "case": case, "error": why.strip()})

    def _write(self, line: dict[str, Any]) -> None:
        text = json.dumps(line, ensure_ascii=False)
        print(text, flush=True)
        if self.path is not None:
            with self.path.open("a", encoding="utf-8") as file:
                file.write(text + "\n")


def read(path: Path) -> list[dict[str, Any]]:
    """Every whole line of such a file; none where there is no file."""
    lines = path.read_text(encoding="utf-8").split("\n")[:-1] if path.exists() else []
    return [json.loads(line) for line in lines]


def write(folder: Path, lines: Sequence[dict[str, Any]]) -> None:
    """`report.json` and `report.md`, each whole at every moment."""
    texts = {"report.json": json.dumps(lines, indent=1, ensure_ascii=False), "report.md": markdown(lines)}
    for name, text in texts.items():
        part = folder / f".{name}"
        part.write_text(text + "\n", encoding="utf-8")
        part.replace(folder / name)


def markdown(lines: Sequence[dict[str, Any]]) -> str:
    """A section a part: a table of its cases, and then what failed."""
    sections = []
    for part in dict.fromkeys(line["part"] for line in lines):
        own = [line for line in lines if line["part"] == part]
        found = [line for line in own if "values" in line]
        text = [f"### {part}", ""]
        for columns in dict.fromkeys(tuple(line["values"]) for line in found):
            same = [line for line in found if tuple(line["values"]) == columns]
            text += [*_table(columns, same), ""]
        text += [f"* **failed: {line['case']}**: {_cell(line['error'])}" for line in own if "error" in line]
        sections.append("\n".join(text).rstrip())
    return "\n\n".join(sections)


def _table(columns: Sequence[str], lines: Sequence[dict[str, Any]]) -> list[str]:
    rows = [["", *columns], ["---"] * (len(columns) + 1)]
    rows += [[line["case"], *line["values"].values()] for line in lines]
    return [f"| {' | '.join(map(_cell, row))} |" for row in rows]


def _cell(value: object) -> str:
    return str(value).replace("|", "\\|").replace("\n", " ")


def main_of(about: str | None, part: str, measure: Callable[..., None], sizes: Sequence[str]) -> None:
    """The command line of a bench: `measure(results, device, kernels, size)`. Exit code 1 where a case failed."""
    parser = argparse.ArgumentParser(description=about, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", default="cuda:0")
    parser.add_argument("--kernels", default="cuda")
    parser.add_argument("--size", default=sizes[0], choices=sizes)
    parser.add_argument("--results", type=Path, help="a file that results are appended to")
    arguments = parser.parse_args()
    results, start = Results(part, arguments.results), time.monotonic()

    def whole() -> dict[str, Any]:
        measure(results, arguments.device, arguments.kernels, arguments.size)
        return {"seconds": round(time.monotonic() - start, 1), "cases that failed": results.failed}

    results.run("the whole part", whole)
    sys.exit(min(results.failed, 1))
