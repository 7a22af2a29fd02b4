"""What is shown on a terminal: progress of long work, tables, numbers. The command line and the demo print through it.

    progress   bars on a terminal, a line every few seconds elsewhere
    tables     tables, numbers, sizes and text

Progress and notes go to stderr, results to stdout.

Threads: the callbacks of `show_progress` may be called from any thread. Show one display at a time: two would overwrite
each other.

Imports: `progress` alone.
"""
