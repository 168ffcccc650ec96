"""`pytest bench`: the time of every stage, and whether it has become slower against its calibration kernel.

`--write-baselines` stores the ratios of this run in bench/baselines.json; `--fail-on-regression` ends with
exit status 1 when a stage's ratio is more than 20 % above its baseline; `--baselines FILE` takes another
file.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import pytest

from geoengine.bench.baselines import STORED, TOLERANCE, BaselineError, Baselines, Call, kernels, measure

_KEY = pytest.StashKey[Baselines]()

Stage = Callable[..., None]
"""Times a call `(call, against=kernel)`; see `stage`."""


def pytest_addoption(parser: pytest.Parser) -> None:
    """Add the options."""
    group = parser.getgroup("baselines", "times of stages against stored ratios")
    group.addoption("--write-baselines", action="store_true", help="store the ratios of this run")
    group.addoption("--fail-on-regression", action="store_true", help="exit status 1 when a stage is slower")
    group.addoption("--baselines", type=Path, default=STORED, metavar="FILE", help="file of the ratios")


def pytest_configure(config: pytest.Config) -> None:
    """Read the baselines."""
    try:
        config.stash[_KEY] = Baselines.read(config.getoption("--baselines"))
    except BaselineError as error:
        raise pytest.UsageError(str(error)) from None


@pytest.fixture(scope="session")
def calibration(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Call]:
    """Make the kernels once."""
    return kernels(tmp_path_factory.mktemp("calibration"))


@pytest.fixture
def stage(benchmark: Any, request: pytest.FixtureRequest, calibration: dict[str, Call]) -> Stage:  # noqa: ANN401
    """Return a function that times a stage with pytest-benchmark and against a kernel."""

    def run(call: Call, *, against: str) -> None:
        baselines = request.config.stash[_KEY]
        compared = baselines.compare(request.node.name, against, partial(measure, call, calibration[against]))
        benchmark.group = f"against {against}"
        benchmark.extra_info["ratio"] = compared.ratio
        benchmark.pedantic(call, rounds=5)

    return run


def pytest_sessionfinish(session: pytest.Session) -> None:
    """Store the ratios, or fail for a regression, when that is asked."""
    baselines, option = session.config.stash[_KEY], session.config.getoption
    if option("--write-baselines") and baselines.found:
        baselines.write(option("--baselines"))
    elif (
        option("--fail-on-regression") and baselines.regressions and session.exitstatus == pytest.ExitCode.OK
    ):
        session.exitstatus = pytest.ExitCode.TESTS_FAILED


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter, config: pytest.Config) -> None:
    """Show the ratios beside their baselines."""
    baselines = config.stash[_KEY]
    if not baselines.found:
        return
    terminalreporter.section("stages against their calibration kernels")
    for line in baselines.lines():
        terminalreporter.write_line(line, red="REGRESSION" in line)
    path = config.getoption("--baselines")
    if config.getoption("--write-baselines"):
        terminalreporter.write_line(f"stored in {path}")
    elif not baselines.ratios:
        terminalreporter.write_line(f"no baselines in {path}: --write-baselines stores these")
    else:
        slower = baselines.regressions
        terminalreporter.write_line(
            f"{len(slower)} of {len(baselines.found)} stages are more than {TOLERANCE:.0%} slower than the "
            f"baselines of {baselines.machine}"
        )
