"""The `meswitch` command: parses, calls, prints.

Results go to stdout, progress and errors to stderr. Exit codes: 0 fine, 1 refused or broken (the error's name, message
and hint on stderr), 2 wrong usage, 130 interrupted. torch and transformers are imported by the commands that need them,
so that help is quick.

    app          the command itself: its commands in order, `main`
    group        errors to exit codes
    arguments    arguments that several commands have
    choices      wrong values of options to wrong usage

    compress     compress, import
    deltas       inspect, verify, restore
    evaluate     evaluate
    router       router train, router evaluate
    generate     generate
    demo         demo
    doctor       doctor

Imports: everything below, inside the command that needs it.
"""

from __future__ import annotations

from meswitch.cli.app import app, main

__all__ = ["app", "main"]
