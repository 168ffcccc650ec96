"""The results of all benchmarks and machines as one text: `geoengine bench report`."""

from __future__ import annotations

import importlib
import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Protocol, cast

from geoengine.bench.readme import table
from geoengine.bench.suite.results import ResultsError, make_folder, read, read_json, write_plots
from geoengine.engine.errors import MissingExtraError
from geoengine.engine.render.files import write_atomically

TITLES = {
    "table1": "The paper's Table 1 again",
    "stages": "What each stage takes, and its limit",
    "peers": "Beside what else there is",
    "scale": "As photos, beams and indices grow",
}
"""The benchmarks of the suite, in the order in which they are shown; each is a module beside this one.

One with other settings, or of some parts, has a name of its own behind a hyphen, as in table1-network.
"""

NAME = "README.md"
"""Of the report in a folder."""

_ODD = (LookupError, TypeError, ValueError, AttributeError, ArithmeticError)
"""What rows raise that have another form than this version's."""

Document = dict[str, Any]


class Benchmark(Protocol):
    """What a benchmark's module gives to be shown; none of it needs the packages that measure."""

    def tables(self, document: Document) -> str:
        """Return the figures as Markdown."""

    def key_figures(self, document: Document) -> dict[str, str]:
        """Return the few figures by which machines are compared, each with its unit."""


@dataclass(kw_only=True, slots=True)
class Collection:
    """What was found in folders: results by (machine, benchmark), and what cannot be shown, a sentence each.

    `others` are reports of other programs in the folders of machines.
    """

    documents: dict[tuple[str, str], Document] = field(default_factory=dict)
    troubles: list[str] = field(default_factory=list)
    others: list[Path] = field(default_factory=list)

    def machines(self, benchmark: str | None = None) -> list[str]:
        """Return the machines with results of one benchmark, or of any."""
        return list(dict.fromkeys(m for m, name in self.documents if benchmark in (None, name)))

    def benchmarks(self) -> list[str]:
        """Return the benchmarks with results, in the order in which they are shown."""
        order = list(TITLES)
        return sorted({name for _, name in self.documents}, key=lambda name: (order.index(_base(name)), name))


def collect(folders: Sequence[Path]) -> Collection:
    """Read the results in folders, each one of a machine or one with folders of machines.

    Raises ResultsError for a folder that is not there.
    """
    found = Collection()
    for folder in folders:
        if not folder.is_dir():
            raise ResultsError(f"{folder}: there is no such folder; `geoengine bench table1` makes results")
        for file in sorted([*folder.glob("*.json"), *folder.glob("*/*.json")]):
            _take(found, file, folder if len(folders) > 1 else None)
    return found


def _take(found: Collection, file: Path, folder: Path | None) -> None:
    try:
        if "benchmark" not in read_json(file):
            if file.with_suffix(".md").is_file():
                found.others.append(file.with_suffix(".md"))
            return
        document = read(file)
    except ResultsError as error:
        found.troubles.append(str(error))
        return
    name = document["benchmark"]
    if _base(name) not in TITLES:
        found.troubles.append(f"{file}: this version knows no benchmark {name!r}, but {', '.join(TITLES)}")
        return
    machine = document["machine"]["name"]
    if (machine, name) in found.documents:
        machine = f"{machine} ({folder or file.parent})"  # one machine, measured twice
    found.documents[machine, name] = document


def render(found: Collection, home: Path | None = None) -> tuple[str, dict[str, dict[str, str]]]:
    """Return the report as Markdown, and for each machine its plots, SVG texts by name.

    With `home`, the folder of the report, it links to other reports, and plots are drawn and shown as they
    will lie there: in a folder for each machine. What cannot be shown joins `troubles`.
    """
    sections = ["# Benchmarks\n", _machines(found)]
    plots: dict[str, dict[str, str]] = {}
    troubles = list(found.troubles)
    for name in found.benchmarks():
        machines = found.machines(name)
        try:
            module = _module(name)
        except ImportError as error:
            troubles.append(f"{name}: this version cannot show it ({error})")
            continue
        sections.append(f"## {_cell(name)}: {TITLES[_base(name)]}\n")
        sections.append(_side_by_side({m: found.documents[m, name] for m in machines}, module))
        for machine in machines:
            document = found.documents[machine, name]
            try:
                text = module.tables(document)
                drawn = dict(getattr(module, "plots", lambda _: {})(document)) if home else {}
            except MissingExtraError as error:
                troubles.append(f"no plots of {name}: {error}")
                drawn = {}
            except _ODD as error:
                troubles.append(
                    f"{name} of {machine}: its rows are not those that this version writes ({error!r}): "
                    "measure again with --again"
                )
                continue
            plots.setdefault(_folder_of(machine), {}).update(drawn)
            sections.append(_section(machine, document, text, drawn))
    if home and found.others:
        links = [f"- [{_link(path, home)}]({_link(path, home)})" for path in found.others]
        sections.append("## Other measurements\n\n" + "\n".join(links) + "\n")
    if troubles:
        sections.append("## Not shown\n\n" + "\n".join(f"- {_cell(text)}" for text in troubles) + "\n")
    found.troubles[:] = troubles
    return "\n".join(section for section in sections if section), plots


def _base(name: str) -> str:
    return name.partition("-")[0]


def _module(name: str) -> Benchmark:
    """Return a benchmark's module; raises ImportError."""
    return cast(Benchmark, importlib.import_module(f"geoengine.bench.suite.{_base(name)}"))


def _section(machine: str, document: Document, text: str, drawn: Iterable[str]) -> str:
    """Return one machine's figures of one benchmark."""
    lines = [f"### {_cell(machine)}\n"]
    if not document["complete"]:
        lines.append(
            f"**Unfinished**: {len(document['rows'])} rows so far; `geoengine bench "
            f"{_base(document['benchmark'])}` with the same options goes on.\n"
        )
    lines.append(_demoted(text).strip() + "\n")
    lines += [f"![{name}]({_folder_of(machine)}/{name}.svg)\n" for name in drawn]
    return "\n".join(lines)


def _machines(found: Collection) -> str:
    """Return a table of the machines, and one of what was measured when."""
    if not found.documents:
        return ""
    columns = []
    for machine in found.machines():
        own = [doc["machine"] for (name, _), doc in found.documents.items() if name == machine]
        columns.append([machine, *_hardware(max(own, key=lambda about: str(about.get("date"))))])
    labels = ["", "processor", "cores", "GPU", "memory", "system", "Python", "packages"]
    hardware = list(zip(labels, *columns, strict=True))
    runs: list[list[object]] = [
        ["machine", "benchmark", "date", "commit", "load at the start", "rows", "state"]
    ]
    for (machine, name), document in found.documents.items():
        about = document["machine"]
        state = "complete" if document["complete"] else "unfinished"
        told = [about.get(what) for what in ("date", "commit", "load")]
        runs.append([machine, name, *told, len(document["rows"]), state])
    return "## Machines\n" + _table(hardware) + "\n## Runs\n" + _table(runs)


def _hardware(about: Mapping[str, Any]) -> list[object]:
    """Return what the table of machines says of one."""
    gpu, driver, packages = (about.get(what) for what in ("gpu", "driver", "packages"))
    return [
        about.get("cpu"),
        about.get("cores"),
        f"{gpu}, driver {driver}" if gpu and driver else gpu or "none",
        f"{about['memory_gib']} GiB" if "memory_gib" in about else None,
        about.get("system"),
        about.get("python"),
        ", ".join(f"{name} {version}" for name, version in packages.items())
        if isinstance(packages, dict)
        else None,
    ]


def _side_by_side(documents: Mapping[str, Document], module: Benchmark) -> str:
    """Return a table of the key figures of at least two machines, else nothing."""
    figures: dict[str, dict[str, str]] = {}
    for machine, document in documents.items():
        try:
            figures[machine] = module.key_figures(document)
        except _ODD:
            continue  # said where its tables fail
    if len(figures) < 2:
        return ""
    labels = dict.fromkeys(label for own in figures.values() for label in own)
    rows = [[label, *(own.get(label) for own in figures.values())] for label in labels]
    header: list[str | None] = ["side by side", *figures]
    return _table([header, *rows]).lstrip("\n")


def _table(rows: Sequence[Sequence[object]]) -> str:
    header, *body = [[_cell(cell) for cell in row] for row in rows]
    return table(header, body)


def _cell(value: object) -> str:
    """Return a value as it can stand in a table, a dash for none: results may come from anywhere."""
    text = "–" if value is None else str(value)
    return " ".join(text.split()).replace("|", "\\|").replace("<", "&lt;")


def _folder_of(machine: str) -> str:
    """Return the name of a machine's folder of plots: no path out of the report's own."""
    return re.sub(r"[^A-Za-z0-9._-]+", "-", machine).strip("-.") or "machine"


def _demoted(text: str) -> str:
    """Return Markdown whose largest heading is of level 4, below the machine's."""
    levels = [len(marks) for marks in re.findall(r"^(#{1,6}) ", text, re.MULTILINE)]
    more = 4 - min(levels) if levels else 0
    return re.sub(
        r"^(#{1,6}) ",
        lambda marks: "#" * min(max(len(marks[1]) + more, 4), 6) + " ",
        text,
        flags=re.MULTILINE,
    )


def _link(path: Path, home: Path) -> str:
    try:
        return path.resolve().relative_to(home.resolve()).as_posix()
    except ValueError:
        return path.resolve().as_posix()


def write(found: Collection, out: Path) -> Path:
    """Write the report to a file that ends in .md, or into a folder as README.md; returns the file.

    The plots lie beside it, in a folder for each machine. Raises OutputError.
    """
    file = out if out.suffix.lower() == ".md" else out / NAME
    text, plots = render(found, file.parent)
    for machine, drawn in plots.items():
        if drawn:
            make_folder(file.parent / machine)
            write_plots(file.parent / machine, drawn)
    make_folder(file.parent)
    write_atomically(file, text)
    return file


def as_json(found: Collection) -> dict[str, Any]:
    """Return all results JSON-ready, and what cannot be shown."""
    results = [
        {
            "machine": machine,
            "benchmark": name,
            "key_figures": _key_figures(name, document),
            "results": document,
        }
        for (machine, name), document in found.documents.items()
    ]
    return {"schema": 1, "results": results, "troubles": found.troubles}


def _key_figures(name: str, document: Document) -> dict[str, str] | None:
    try:
        return _module(name).key_figures(document)
    except (ImportError, *_ODD):
        return None
