"""Put the measured figures into the README, so that none is typed by hand: `make readme`.

The figures are the reports of `geoengine evaluate planet … --json` in `bench/results/planet/`, one file a
run, and what `geoengine bench` wrote. A block of the README
between `<!-- name -->` and `<!-- /name -->` is replaced. The report of all machines becomes
`bench/results/README.md`. Tests check that both are current.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

_ROOT = Path(__file__).resolve().parent.parent
README = _ROOT / "README.md"
RESULTS = _ROOT / "bench" / "results"

NOT_MEASURED = "Not measured yet: `geoengine bench table1` does."
_KINDS = ("cold", "indexed", "warm")


def render(text: str, results: Path = RESULTS) -> str:
    """Return the README `text` with its blocks of figures filled from the files in `results`."""
    from geoengine.bench.suite import report

    found = report.collect([results])
    table1 = [
        document
        for (_, name), document in found.documents.items()
        if name == "table1" and document["complete"]
    ]
    planet = load_results(results / "planet")
    peers = [
        document
        for (_, name), document in found.documents.items()
        if name == "peers" and document["complete"] and not document["machine"]["gpu"]
    ]
    blocks = {
        "accuracy": accuracy_table(planet),
        "recall": recall_table(planet),
        "headline": headline(planet),
        "cpu": cpu_table(peers),
        "claim": claim(table1),
        "speed": speed_table(table1),
    }
    return filled(text, blocks, "the README")


def filled(text: str, blocks: Mapping[str, str], what: str) -> str:
    """Return a text with what stands between `<!-- name -->` and `<!-- /name -->` replaced, for each block.

    Raises ValueError, which calls the text `what`, unless it has each block once.
    """
    for name, block in blocks.items():
        first, last = f"<!-- {name} -->", f"<!-- /{name} -->"
        if text.count(first) != 1 or text.count(last) != 1:
            raise ValueError(f"{what} must have one block {first} … {last}")
        before, rest = text.split(first)
        text = before + first + block + last + rest.split(last)[1]
    return text


def load_results(folder: Path) -> list[dict[str, Any]]:
    """Return the figures of every search of all reports in a folder: by score, narrow beams first."""
    reports = [json.loads(file.read_text(encoding="utf-8")) for file in sorted(folder.glob("*.json"))]
    results = [result for report in reports for result in report["results"]]
    return sorted(results, key=lambda result: (result["score"], int(result["k"])))


def accuracy_table(results: Sequence[dict[str, Any]]) -> str:
    """Return a Markdown table of the share of photos within each distance, with 95 % intervals at 1 km."""
    distances = list(results[0]["within_km"])
    rows = []
    for result in results:
        within = result["within_km"]
        nearest = within[distances[0]]
        interval = " – ".join(percent(end) for end in nearest["ci95"])
        shares = [percent(within[distance]["share"]) for distance in distances]
        median = f"{result['median_km']:.2f} km"
        rows.append([result["score"], result["k"], result["photos"], *shares, interval, median])
    headings = [f"≤ {float(distance):,g} km" for distance in distances]
    header = ["score", "k", "photos", *headings, "≤ 1 km, 95 % interval", "median"]
    return table(header, rows)


def recall_table(results: Sequence[dict[str, Any]]) -> str:
    """Return a Markdown table of how often the true tile is in the beam of each level."""
    zooms = list(results[0]["recall"])
    rows = [
        [result["score"], result["k"], *(percent(result["recall"][zoom]["share"]) for zoom in zooms)]
        for result in results
    ]
    return table(["score", "k", *(f"zoom {zoom}" for zoom in zooms)], rows)


def headline(results: Sequence[dict[str, Any]]) -> str:
    """Return the share within 1 km at k = 16 and of how many photos, of the path score where there is one."""
    result = [result for result in results if result["k"] == 16][-1]
    return f"{percent(next(iter(result['within_km'].values()))['share'])} of {result['photos']} photos"


def claim(table1: Sequence[dict[str, Any]]) -> str:
    """Return a sentence for each machine on what a photo costs at k = 16."""
    sentences = []
    for document in table1:
        for row in document["rows"]:
            if row["k"] != 16:
                continue
            ratio = _ratios(row)
            faster = ""
            if ratio:
                faster = (
                    f", {ratio['cold']} times as fast as the paper's procedure in the same run, and "
                    f"{duration(row['warm']['median'])}, {ratio['warm']} times as fast, where all its tiles "
                    "are known from photos before"
                )
            sentences.append(
                f"On {_where(document)}, a photo at k = 16 takes {duration(row['cold']['median'])}{faster} "
                f"({document['facts']['model']})."
            )
    return " ".join(sentences) or NOT_MEASURED


def speed_table(table1: Sequence[dict[str, Any]]) -> str:
    """Return a Markdown table of what a photo costs on each machine, beside the paper's procedure."""
    rows = []
    for document in table1:
        for row in sorted(document["rows"], key=lambda row: int(row["k"])):
            ratio = _ratios(row)
            cells: list[str] = []
            for kind in _KINDS:
                seconds = duration(row[kind]["median"]) if row[kind] else "–"
                cells.append(f"{seconds} ({ratio[kind]} x)" if kind in ratio else seconds)
            again = duration(row["paper"]["extrapolated_s"]) if row["paper"] else "–"
            rows.append([_where(document), row["k"], f"{row['tiles']:,.0f}", *cells, again])
    if not rows:
        return f"\n{NOT_MEASURED}\n"
    header = [
        "machine",
        "k",
        "tiles",
        "nothing known",
        "zooms 4–8 indexed",
        "all known",
        "the paper's procedure",
    ]
    return table(header, rows)


def _ratios(row: Mapping[str, Any]) -> dict[str, str]:
    """Return how many times as fast as the paper's procedure in the same run each kind of search is."""
    from geoengine.bench.suite.table1_tables import speedups

    return {kind: f"{ratio:,.1f}" if ratio < 10 else f"{ratio:,.0f}" for kind, ratio in speedups(row).items()}


def _where(document: Mapping[str, Any]) -> str:
    machine = document["machine"]
    return f"{machine['gpu'] or '{cores} cores of {cpu}'.format(**machine)} ({machine['date']})"


def duration(seconds: float) -> str:
    """Return a time in milliseconds, seconds or minutes, with about three digits."""
    if seconds < 1:
        return f"{1e3 * seconds:.3g} ms"
    if seconds < 99.5:
        return f"{seconds:.3g} s"
    return f"{round(seconds / 60):,} min" if seconds >= 595 else f"{seconds / 60:.1f} min"


def cpu_table(peers: Sequence[dict[str, Any]]) -> str:
    """Return a Markdown table for each machine of the encoders on its CPU: speed, and the worse agreement."""
    from geoengine.bench.suite.peers_encoders import encoder_rows, worst

    header = ["encoder", "speed, PyTorch eager = 1", "min cosine", "same top 16", "batch changes it by"]
    texts = []
    for document in peers:
        rows = [
            [
                f"**{row['name']}**" if row["ours"] else row["name"],
                f"{row['ratio']:.1f}",
                f"{worst(row, 'min_cosine'):.4f}",
                percent(worst(row, "mean_overlap")),
                f"{worst(row, 'batch_difference'):.0e}",
            ]
            for row in encoder_rows(document)
            if "ratio" in row
        ]
        texts.append(f"\n{_where(document)}:\n{table(header, rows)}")
    return "".join(texts) or "\nNot measured yet: `geoengine bench peers` does.\n"


def table(header: Sequence[str], rows: Iterable[Sequence[object]]) -> str:
    """Return a Markdown table, right-aligned, with a line break before and after."""
    lines = [header, ["---:"] * len(header), *rows]
    return "\n" + "\n".join("| " + " | ".join(map(str, line)) + " |" for line in lines) + "\n"


def percent(share: float) -> str:
    """Return a share as a percentage with one decimal."""
    return f"{100 * share:.1f} %"


def main() -> None:
    """Write both files, and the tables in the guides."""
    from geoengine.bench import bulk_cost_tables, planet_tables
    from geoengine.bench.suite import report

    planet_tables.main()
    guide = bulk_cost_tables.DOCUMENT
    guide.write_text(bulk_cost_tables.render(guide.read_text(encoding="utf-8")), encoding="utf-8")
    README.write_text(render(README.read_text(encoding="utf-8")), encoding="utf-8")
    report.write(report.collect([RESULTS]), RESULTS)


if __name__ == "__main__":
    main()
