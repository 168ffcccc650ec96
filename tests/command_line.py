"""Runs the command line inside the test process, and says what a refusal looks like."""

from typer.testing import CliRunner

from geoengine.cli import app


def run(*arguments):
    return CliRunner().invoke(app, [str(argument) for argument in arguments])


def refused(result, sentence):
    """Whether a command ended with status 2, one line on stderr and nothing on stdout."""
    assert (result.exit_code, result.stdout) == (2, "")
    assert result.stderr.startswith("geoengine: ") and result.stderr.count("\n") == 1
    assert sentence in result.stderr
