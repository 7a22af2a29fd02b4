"""The `meswitch` command: parses, calls, prints.

Results go to stdout, progress and errors to stderr. Exit codes: 0 fine, 1 refused or broken (the error's name, message
and hint on stderr), 2 wrong usage, 130 interrupted. torch and transformers are imported by the commands that need them.

    app         the command itself, errors to exit codes, arguments that several commands have
    deltas      compress, import, inspect, verify, restore, evaluate
    serve       generate
    router      router train, router evaluate
    tour        demo
    doctor      doctor

Imports: everything below, inside the command that needs it.
"""

from __future__ import annotations

from meswitch.cli import deltas, doctor, router, serve, tour
from meswitch.cli.app import app, main

__all__ = ["app", "deltas", "doctor", "main", "router", "serve", "tour"]
