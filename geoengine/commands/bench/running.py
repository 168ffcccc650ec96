"""A run of a benchmark, from its file of results to its tables: the same for all."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol, TypeVar

import typer

from geoengine.commands.terminal import Exit, complain, progress_bar, write_result
from geoengine.engine.errors import MissingExtraError

if TYPE_CHECKING:
    from geoengine.bench.suite.results import Progress, Results


class Settings(Protocol):
    """What a benchmark is asked."""

    @property
    def benchmark(self) -> str:
        """The name of the file of results."""

    def to_dict(self) -> dict[str, Any]:
        """Return them JSON-ready."""


_Asked = TypeVar("_Asked", bound=Settings, contravariant=True)


class Benchmark(Protocol[_Asked]):
    """A benchmark's module; one with plots has `plots`, which gives SVG texts by name, too."""

    def measure(self, settings: _Asked, results: Results, progress: Progress) -> None:
        """Add the rows that are not there yet."""

    def tables(self, document: dict[str, Any]) -> str:
        """Return the results as Markdown."""


def run(suite: Benchmark[_Asked], settings: _Asked, *, out: Path, again: bool, as_json: bool) -> None:
    """Measure, write plots beside the results, and print tables, or the file of results.

    Ends the command when it is interrupted; raises GeoEngineError.
    """
    from geoengine.bench.suite.results import Results

    with Results.start(out, settings.benchmark, settings.to_dict(), again=again) as results:
        try:
            with progress_bar("starting") as show:
                suite.measure(settings, results, show)
        except KeyboardInterrupt:
            complain(_kept(results))
            raise typer.Exit(Exit.INTERRUPTED) from None
        results.finish()
    _write_plots(suite, results)
    complain(f"results: {results.path}")
    document = results.document
    write_result(json.dumps(document, indent=1) + "\n" if as_json else suite.tables(document))


def _kept(results: Results) -> str:
    """Return what an interruption leaves, and how to go on."""
    count = len(results.document["rows"])
    if not count:
        return "interrupted before a row was finished; the same command starts anew"
    return (
        f"interrupted: {results.path} keeps the finished rows, {count} so far; the same command goes on "
        "there, and --again starts anew"
    )


def _write_plots(suite: object, results: Results) -> None:
    from geoengine.bench.suite.results import write_plots

    plots = getattr(suite, "plots", None)
    if plots is None:
        return
    try:
        drawn: Mapping[str, str] = plots(results.document)
    except MissingExtraError as error:
        complain(f"no plots: {error}")
        return
    write_plots(results.path.parent, drawn)
