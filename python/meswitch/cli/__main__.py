"""`python -m meswitch.cli` is the `meswitch` command, also where its script is not installed."""

from meswitch.cli.guard import main

if __name__ == "__main__":
    main()
