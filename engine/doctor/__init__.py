"""What this machine can run: one finding per thing that locating a photo needs or could use."""

from __future__ import annotations

from collections.abc import Iterable
from typing import TextIO

from geoengine.engine.doctor import bundles, decoding, gpu, machine, onnx_runtime
from geoengine.engine.doctor.finding import Finding, State


def examine() -> list[Finding]:
    """Look at the machine and the installation; never raises for what it finds."""
    looked = (machine, onnx_runtime, gpu, decoding, bundles)
    return [finding for part in looked for finding in part.findings()]


def findings_table(findings: Iterable[Finding], terminal: TextIO) -> str:
    """Return the findings as a table for `terminal`, and under it the commands that mend what is missing."""
    from rich.table import Table
    from rich.text import Text

    from geoengine.engine.render.table import printable, text_of

    marks = {State.OK: ("ok", "green"), State.ABSENT: ("-", "yellow"), State.BROKEN: ("broken", "bold red")}
    table = Table(box=None, pad_edge=False, show_header=False)
    table.add_column(no_wrap=True, style="bold")
    table.add_column(no_wrap=True)
    table.add_column(overflow="fold")
    listed = list(findings)
    for finding in listed:
        mark, style = marks[finding.state]
        detail = Text(printable(finding.detail))
        if finding.remedy:
            detail.append(f"\n→ {finding.remedy}", style="cyan")
        table.add_row(finding.topic, Text(mark, style=style), detail)
    return text_of([table], terminal)
