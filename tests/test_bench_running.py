"""What all of `geoengine bench table1`, `stages`, `peers` and `scale` do, whatever they measure."""

import json
import signal
import subprocess
import sys

import pytest
from command_line import refused, run

from geoengine.bench.suite import peers, scale, stages, table1
from geoengine.bench.suite.results import read
from geoengine.engine.errors import MissingExtraError

COMMANDS = {
    "table1": (table1, ("table1", "--k", "16")),
    "stages": (stages, ("stages", "--backend", "openvino")),
    "peers-scoring": (peers, ("peers", "scoring")),
    "scale-k": (scale, ("scale", "k")),
}


@pytest.fixture(params=COMMANDS)
def benchmark_name(request):
    return request.param


@pytest.fixture
def suite(benchmark_name, monkeypatch):
    """A benchmark's module that measures rows a and b at once, and shows their keys."""
    module = COMMANDS[benchmark_name][0]

    def measure(settings, results, progress):
        results.state(told=True)
        for number, key in enumerate("ab"):
            progress(f"row {key}", number, 2)
            if not results.known(key):
                results.add(key, seconds=1.5)

    monkeypatch.setattr(module, "measure", measure)
    monkeypatch.setattr(module, "tables", lambda document: f"rows: {keys(document)}\n")
    monkeypatch.setattr(module, "plots", lambda document: {"made": "<svg/>"}, raising=False)
    return module


@pytest.fixture
def command(benchmark_name, suite, tmp_path):
    def call(*more):
        return run("bench", *COMMANDS[benchmark_name][1], "--out", tmp_path, *more)

    return call


def keys(document):
    return " ".join(row["key"] for row in document["rows"])


def interrupted_after(module, monkeypatch, rows):
    """Have a benchmark be interrupted when it has added so many rows of its own."""
    whole = module.measure

    def measure(settings, results, progress):
        add, added = results.add, []

        def stopping(key, **figures):
            if len(added) == rows:
                raise KeyboardInterrupt
            added.append(key)
            add(key, **figures)

        results.add = stopping
        whole(settings, results, progress)

    monkeypatch.setattr(module, "measure", measure)


def test_a_run_ends_with_tables_plots_and_the_place_of_its_results(command, benchmark_name, tmp_path):
    done = command()
    [file] = tmp_path.glob(f"*/{benchmark_name}.json")
    assert (done.exit_code, done.stdout) == (0, "rows: a b\n")
    assert done.stderr == f"geoengine: results: {file}\n"
    assert read(file)["complete"] and read(file)["facts"]["told"]
    assert file.with_name("made.svg").read_text() == "<svg/>"
    again = command("--json")
    assert again.exit_code == 0 and json.loads(again.stdout) == read(file)


def test_without_what_draws_there_are_tables(command, suite, monkeypatch):
    def plots(document):
        raise MissingExtraError("drawing plots needs the extra `evaluate`")

    monkeypatch.setattr(suite, "plots", plots)
    done = command()
    assert (done.exit_code, done.stdout) == (0, "rows: a b\n")
    assert done.stderr.startswith("geoengine: no plots: drawing plots needs the extra `evaluate`\n")


def test_an_interrupted_run_keeps_its_rows_and_goes_on(command, suite, benchmark_name, tmp_path, monkeypatch):
    with monkeypatch.context() as patch:
        interrupted_after(suite, patch, 1)
        stopped = command()
    [file] = tmp_path.glob(f"*/{benchmark_name}.json")
    assert (stopped.exit_code, stopped.stdout) == (130, "")
    assert stopped.stderr == (
        f"geoengine: interrupted: {file} keeps the finished rows, 1 so far; the same command goes on there, "
        "and --again starts anew\n"
    )
    document = read(file)
    assert not document["complete"] and keys(document) == "a"
    document["rows"][0]["seconds"] = 123.0
    file.write_text(json.dumps(document))
    assert command().stdout == "rows: a b\n"
    assert [row["seconds"] for row in read(file)["rows"]] == [123.0, 1.5]


def test_again_starts_anew(command, suite, benchmark_name, tmp_path, monkeypatch):
    with monkeypatch.context() as patch:
        interrupted_after(suite, patch, 1)
        command()
    [file] = tmp_path.glob(f"*/{benchmark_name}.json")
    file.write_text(file.read_text().replace("1.5", "123.0"))
    assert command("--again").exit_code == 0
    assert [row["seconds"] for row in read(file)["rows"]] == [1.5, 1.5]


def test_a_run_that_ends_before_its_first_row_leaves_the_last_one(
    command, suite, benchmark_name, tmp_path, monkeypatch
):
    command()
    interrupted_after(suite, monkeypatch, 0)
    stopped = command()
    assert stopped.exit_code == 130
    assert stopped.stderr.endswith("interrupted before a row was finished; the same command starts anew\n")
    [file] = tmp_path.glob(f"*/{benchmark_name}.json")
    assert read(file)["complete"] and keys(read(file)) == "a b"


@pytest.mark.parametrize("name", ["table1", "stages"])
@pytest.mark.parametrize(
    ("more", "sentence"),
    [
        (["--backend", "abacus"], "unknown backend 'abacus'"),
        (["--precision", "fp7"], "unknown precision 'fp7'"),
        (["--tiles", "nowhere"], "there is no tile source 'nowhere'"),
    ],
)
def test_wrong_input_is_refused_before_encoders_are_built(name, more, sentence, tmp_path, monkeypatch):
    monkeypatch.setenv("GEOENGINE_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr("geoengine.export.build.build_engines", lambda *_: pytest.fail("builds encoders"))
    refused(run("bench", name, *more, "--out", tmp_path), sentence)


BUSY = """
import time
from geoengine.bench.suite import scale
from geoengine.cli import main

def measure(settings, results, progress):
    results.add("a", seconds=123.0)
    print("running", flush=True)
    time.sleep(60)

scale.measure = measure
main()
"""


@pytest.mark.parametrize("benchmark_name", ["scale-k"], indirect=True)
def test_one_benchmark_is_run_once_at_a_time(command, benchmark_name, tmp_path):
    arguments = ["bench", *COMMANDS[benchmark_name][1], "--out", str(tmp_path)]
    with subprocess.Popen(
        [sys.executable, "-c", BUSY, *arguments], stdout=subprocess.PIPE, text=True
    ) as other:
        try:
            assert other.stdout.readline() == "running\n"
            for more in ([], ["--again"]):
                refused(command(*more), f"another run (process {other.pid}, since 20")
            [file] = tmp_path.glob("*/scale-k.json")
            assert keys(read(file)) == "a"
        finally:
            other.kill()
    assert other.returncode == -signal.SIGKILL
    assert command().exit_code == 0, "what was killed holds no lock"
    assert [row["seconds"] for row in read(file)["rows"]] == [123.0, 1.5]
