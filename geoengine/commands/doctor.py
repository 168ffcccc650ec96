"""`geoengine doctor`."""

from __future__ import annotations

import json
import sys
from typing import Annotated

import typer

from geoengine.commands.terminal import waiting, write_result


def doctor(
    as_json: Annotated[bool, typer.Option("--json", help="A JSON object instead of a table.")] = False,
) -> None:
    """Tell what this machine can run, and the command that mends what it cannot."""
    from geoengine.engine.doctor import examine, findings_table

    with waiting("looking around"):
        findings = examine()
    if as_json:
        write_result(json.dumps({"findings": [finding.to_dict() for finding in findings]}, indent=2) + "\n")
    else:
        write_result(findings_table(findings, sys.stdout))
