"""The `meswitch` command: parses, calls, prints.

Results go to stdout, progress and errors to stderr. Exit codes: 0 fine, 1 refused or broken (one line and a hint on
stderr; `MESWITCH_DEBUG=1` adds the traceback), 2 wrong usage, 130 interrupted. torch and transformers are imported by
the commands that need them, so that help is quick.

    guard        the process: `main`, signals, streams, and whatever is raised to exit codes
    message      an exception to a line and a hint
    app          the command itself: its commands in order
    arguments    arguments that several commands have
    choices      wrong values of options to wrong usage

    compress     compress, import
    deltas       inspect, verify, restore, upgrade
    evaluate     evaluate
    router       router train, router evaluate
    generate     generate
    replay       replay
    plot         what replay and moe timeline draw
    moe          moe plan, moe compress
    share        moe share
    timeline     moe timeline
    demo         demo
    doctor       doctor

Imports: everything below, inside the command that needs it.
"""

from __future__ import annotations

from meswitch.cli.guard import main

__all__ = ["main"]
