"""What is shown on a terminal: progress of long work, tables, numbers. The command and the demo print through it.

Progress and notes go to stderr, results to stdout. May be called from any thread; two displays at once would mix.

Imports: `progress` alone.
"""
