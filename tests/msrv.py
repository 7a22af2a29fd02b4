"""Checks that no Rust dependency asks for a newer Rust than this workspace: `rust-version` in Cargo.toml.

    python tests/msrv.py

Clippy's `incompatible_msrv` checks the workspace's own code.
"""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

HOUSE = Path(__file__).parents[1]


def version_of(package: dict[str, str | None]) -> tuple[int, ...]:
    return tuple(int(part) for part in (package["rust_version"] or "0").split("."))


def main() -> str | None:
    command = ["cargo", "metadata", "--format-version", "1", "--locked"]
    metadata = json.loads(subprocess.run(command, cwd=HOUSE, capture_output=True, check=True).stdout)
    members = [package for package in metadata["packages"] if package["id"] in metadata["workspace_members"]]
    oldest = min(members, key=version_of)
    newer = [package for package in metadata["packages"] if version_of(package)[:2] > version_of(oldest)[:2]]
    if not newer:
        print(f"every dependency builds with Rust {oldest['rust_version']}")
        return None
    found = ", ".join(f"{package['name']} {package['version']} ({package['rust_version']})" for package in newer)
    return f"expected dependencies that build with Rust {oldest['rust_version']}, found {found}"


if __name__ == "__main__":
    sys.exit(main())
