"""`meswitch inspect`, `verify`, `restore` and `upgrade`: what is done with a delta directory."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer

from meswitch.cli.arguments import AllowQuantizedBase, DeltaDirectory, Json
from meswitch.cli.message import say_error
from meswitch.errors import MeswitchError
from meswitch.terminal.progress import show_progress, show_status
from meswitch.terminal.tables import format_number, format_size, make_table, print_json, stdout_console


def inspect(delta: DeltaDirectory, as_json: Json = False) -> None:
    """Show what a delta directory holds, site by site.

    \b
      meswitch inspect experts/math
      meswitch inspect experts/math --json
    """
    from meswitch.delta.directory import Delta

    summary = Delta.open(delta).inspect()
    if as_json:
        print_json(summary)
    else:
        _print_sites(summary["sites"])
        _print_sums(summary)


def _print_sites(sites: list[dict[str, Any]]) -> None:
    table = make_table("site", "kind", "shape >", "bits >", "bpw >", "bytes >", "error >")
    for site in sites:
        shape, error = "x".join(map(str, site["shape"])), site["relative_error"]
        sizes = [_bits(site), f"{site['bpw']:.2f}", f"{site['bytes']:,}"]
        table.add_row(
            site["name"], site["kind"], shape, *sizes, "" if error is None else format_number(error, "{:.4f}")
        )
    stdout_console().print(table)


def _bits(site: dict[str, Any]) -> str:
    if "density" in site:
        return f"sparse {site['density']:.2%}"
    return "" if site["bits"] is None else str(site["bits"])


def _print_sums(summary: dict[str, Any]) -> None:
    for kind, sums in summary["kinds"].items():
        typer.echo(f"{kind}: {sums['sites']} sites, {sums['parameters']:,} parameters, {format_size(sums['bytes'])}")
    copies = 2 * summary["parameters"]
    typer.echo(
        f"total: {summary['parameters']:,} parameters, {summary['bpw']:.2f} bits a weight,"
        f" {format_size(summary['bytes'])}; 16-bit copies weigh {format_size(copies)},"
        f" {copies / max(summary['bytes'], 1):.1f} times as much"
    )
    typer.echo(f"{'made of' if summary['kind'] == 'base' else 'base'}: {summary['base_fingerprint']}")


def verify(
    delta: DeltaDirectory,
    base: Annotated[
        str | None,
        typer.Option(
            metavar="BASE",
            help="Also check that the delta was made against this base, a folder or a hub id (default: not checked).",
            show_default=False,
        ),
    ] = None,
) -> None:
    """Read every byte of a delta directory and check it.

    Exit code 0 where it is sound, 1 where it is not.

    \b
      meswitch verify experts/math --base base/
    """
    from meswitch.delta.directory import Delta

    with show_status("reading"):
        Delta.open(delta).verify(base)
    typer.echo(f"sound: {delta}")


def upgrade(
    deltas: Annotated[list[Path], typer.Argument(metavar="DIR...", help="Delta directories.", show_default=False)],
) -> None:
    """Rewrite delta directories of older format versions in today's, in their places.

    Every byte is checked on the way. One that has today's version already is left alone. One that cannot be upgraded
    stays as it is, and the others go on.

    \b
      meswitch upgrade experts/*
    """
    from meswitch.delta.directory import Delta

    failed = False
    for directory in deltas:
        try:
            delta = Delta.open(directory)
            old = delta.format_version
            with show_status(f"upgrading {directory}"):
                changed = delta.upgrade()
            now = Delta.open(directory).format_version
        except (MeswitchError, OSError) as error:
            say_error(error)
            failed = True
            continue
        typer.echo(f"version {old} to {now}: {directory}" if changed else f"version {now} already: {directory}")
    if failed:
        raise typer.Exit(1)


def restore(
    paths: Annotated[
        list[str],
        typer.Argument(
            metavar="[BASE] DIR",
            help="The base, a folder or a hub id, and a delta directory; or a quantized model alone.",
            show_default=False,
        ),
    ],
    out: Annotated[Path, typer.Option("-o", "--out", metavar="DIR", help="The checkpoint folder to write.")],
    allow_quantized_base: AllowQuantizedBase = False,
) -> None:
    """Rebuild an ordinary checkpoint from base and delta, or from a quantized model.

    \b
      meswitch restore base/ experts/math -o merged/
      meswitch restore base-4bit/ -o base-again/
    """
    if len(paths) > 2:
        raise typer.BadParameter(f"expected a base and a delta directory, found {len(paths)} paths")
    *base, delta = paths
    with show_progress(first="restoring") as progress:
        from meswitch.delta import restoration

        restoration.restore(
            base[0] if base else None, delta, out, allow_quantized_base=allow_quantized_base, progress=progress
        )
    typer.echo(str(out))
