"""`geoengine bench report`: results of several machines in one text, and what cannot be shown."""

import importlib
import json
import subprocess
import sys
from types import SimpleNamespace

import pytest
from command_line import refused, run

from geoengine.bench.suite import report, results
from geoengine.engine.errors import MissingExtraError


def made(name="peers", machine="made-2-cores", **changes):
    about = {
        "name": machine,
        "cpu": "Made | CPU",
        "cores": 2,
        "gpu": None,
        "memory_gib": 8.0,
        "packages": {"numpy": "2.0"},
        "commit": "abc",
        "date": "2026-11-22",
        "load": 0.5,
    }
    rows = [{"key": "k=1", "seconds": 1.5}]
    document = {"schema": results.SCHEMA, "benchmark": name, "machine": about, "settings": {}, "facts": {}}
    return {**document, "complete": True, "rows": rows, **changes}


def put(folder, document, text=None):
    file = folder / document["machine"]["name"] / f"{document['benchmark']}.json"
    file.parent.mkdir(parents=True, exist_ok=True)
    file.write_text(json.dumps(document) if text is None else text)
    return file


@pytest.fixture(autouse=True)
def module(monkeypatch):
    """A benchmark's module, in the place of each."""
    one = SimpleNamespace(
        tables=lambda document: f"## Own heading\n\nseconds: {document['rows'][0]['seconds']}\n",
        key_figures=lambda document: {"k=1": f"{document['rows'][0]['seconds']} s"},
        plots=lambda document: {"peers-curve": "<svg/>"},
    )
    monkeypatch.setattr(report, "_module", lambda name: one)
    return one


def shown(*folders):
    found = report.collect(folders)
    return report.render(found)[0], found.troubles


def test_machines_stand_side_by_side(tmp_path):
    put(tmp_path, made())
    put(tmp_path, made(machine="other-8-cores", rows=[{"key": "k=1", "seconds": 0.25}]))
    text, troubles = shown(tmp_path)
    assert not troubles
    assert "| side by side | made-2-cores | other-8-cores |" in text
    assert "| k=1 | 1.5 s | 0.25 s |" in text
    assert "### made-2-cores\n" in text and "#### Own heading" in text and "seconds: 0.25" in text
    assert "| processor | Made \\| CPU | Made \\| CPU |" in text and "| memory | 8.0 GiB | 8.0 GiB |" in text
    assert "| made-2-cores | peers | 2026-11-22 | abc | 0.5 | 1 | complete |" in text


def test_one_machine_has_nothing_at_its_side(tmp_path):
    put(tmp_path, made())
    assert "side by side" not in shown(tmp_path)[0]


def test_a_benchmark_with_other_settings_is_shown_after_it(tmp_path):
    put(tmp_path, made("table1-network"))
    put(tmp_path, made("table1"))
    put(tmp_path, made("peers"))
    headings = [line for line in shown(tmp_path)[0].splitlines() if line.startswith("## ")][2:]
    assert [heading[3:].partition(":")[0] for heading in headings] == ["table1", "table1-network", "peers"]


@pytest.mark.parametrize("name", ["peers", "peers-scoring"])
def test_an_unfinished_run_is_called_so_and_shown(tmp_path, name):
    put(tmp_path, made(name, complete=False))
    text, troubles = shown(tmp_path)
    assert "**Unfinished**: 1 rows so far; `geoengine bench peers`" in text and "seconds: 1.5" in text
    assert not troubles


@pytest.mark.parametrize(
    ("document", "text", "said"),
    [
        (made("stages", schema=7), None, "results of schema 7, and this version reads 1"),
        (made("stages"), '{"schema": 1, "bench', "cannot be read"),
        (made("stages"), "[1]", "holds no results of a benchmark"),
        (made("stages", rows=None), None, "lacks rows"),
        (made("stages", rows=[{"key": "k=1"}]), None, "its rows are not those that this version writes"),
        (made("unheard"), None, "knows no benchmark 'unheard'"),
    ],
)
def test_what_cannot_be_shown_is_one_sentence_and_the_rest_is_shown(tmp_path, document, text, said):
    put(tmp_path, made())
    put(tmp_path, document, text)
    shown_text, troubles = shown(tmp_path)
    assert "seconds: 1.5" in shown_text and "## Not shown" in shown_text
    assert len(troubles) == 1 and said in troubles[0] and "\n" not in troubles[0]


def test_a_benchmark_whose_module_is_missing(tmp_path, monkeypatch):
    put(tmp_path, made())
    monkeypatch.setattr(report, "_module", lambda name: importlib.import_module("geoengine.bench.suite.none"))
    assert [text.partition(" (")[0] for text in shown(tmp_path)[1]] == ["peers: this version cannot show it"]
    assert run("bench", "report", tmp_path, "--json").exit_code == 0


def test_without_what_draws_there_are_no_plots(tmp_path, module):
    def plots(document):
        raise MissingExtraError("drawing plots needs the extra `evaluate`")

    module.plots = plots
    put(tmp_path, made())
    found = report.collect([tmp_path])
    text = report.write(found, tmp_path / "out").read_text()
    assert "seconds: 1.5" in text and "![" not in text
    assert found.troubles == ["no plots of peers: drawing plots needs the extra `evaluate`"]
    assert shown(tmp_path)[1] == [], "a terminal shows none anyway"


def test_one_machine_measured_twice(tmp_path):
    put(tmp_path / "before", made())
    put(tmp_path / "after", made(rows=[{"key": "k=1", "seconds": 0.75}]))
    text, _ = shown(tmp_path / "before", tmp_path / "after")
    assert f"| side by side | made-2-cores | made-2-cores ({tmp_path / 'after'}) |" in text
    assert "| k=1 | 1.5 s | 0.75 s |" in text


def test_the_folder_of_one_machine_will_do(tmp_path):
    put(tmp_path, made())
    assert "seconds: 1.5" in shown(tmp_path / "made-2-cores")[0]


def test_reports_of_other_programs_are_linked(tmp_path):
    put(tmp_path, made())
    (tmp_path / "made-2-cores" / "kernels.json").write_text('{"cases": []}')
    (tmp_path / "made-2-cores" / "kernels.md").write_text("# Kernels")
    file = report.write(report.collect([tmp_path]), tmp_path)
    assert file == tmp_path / "README.md"
    text = file.read_text()
    assert "- [made-2-cores/kernels.md](made-2-cores/kernels.md)" in text
    assert "![peers-curve](made-2-cores/peers-curve.svg)" in text
    assert (tmp_path / "made-2-cores" / "peers-curve.svg").read_text() == "<svg/>"


def test_a_machine_does_not_name_a_folder_elsewhere(tmp_path):
    document = made()
    file = put(tmp_path / "in", document)
    document["machine"]["name"] = "../../../evil\n# heading"
    file.write_text(json.dumps(document))
    written = report.write(report.collect([tmp_path / "in"]), tmp_path / "out" / "all.md")
    assert written.name == "all.md"
    assert {path.name for path in tmp_path.iterdir()} == {"in", "out"}
    assert "\n# heading" not in written.read_text()


def test_the_command_in_a_terminal(tmp_path):
    put(tmp_path, made())
    done = run("bench", "report", tmp_path)
    assert done.exit_code == 0 and "seconds: 1.5" in done.stdout
    broken = put(tmp_path, made("stages"), "{")
    done = run("bench", "report", tmp_path)
    assert done.exit_code == 1 and "seconds: 1.5" in done.stdout
    assert done.stderr.startswith(f"geoengine: {broken}: cannot be read")
    done = run("bench", "report", tmp_path, "--json")
    found = json.loads(done.stdout)
    assert found["results"][0]["key_figures"] == {"k=1": "1.5 s"} and len(found["troubles"]) == 1
    done = run("bench", "report", tmp_path, "--out", tmp_path / "new" / "report.md")
    assert done.stdout == f"{tmp_path / 'new' / 'report.md'}\n"
    assert "seconds: 1.5" in (tmp_path / "new" / "report.md").read_text()


def test_no_results_are_one_sentence(tmp_path):
    refused(run("bench", "report", tmp_path), "no results; `geoengine bench table1` makes some")
    refused(run("bench", "report", tmp_path, "--out", tmp_path / "new"), "no results")
    assert not (tmp_path / "new").exists()
    (tmp_path / "made-2-cores").mkdir()
    (tmp_path / "made-2-cores" / "kernels.json").write_text('{"cases": []}')
    refused(run("bench", "report", tmp_path), "no results")
    refused(run("bench", "report", tmp_path / "none"), "there is no such folder")


def test_a_place_that_cannot_be_written(tmp_path):
    put(tmp_path, made())
    (tmp_path / "file").write_text("")
    refused(run("bench", "report", tmp_path, "--out", tmp_path / "file" / "report.md"), "cannot be made")


def test_reading_needs_no_package_that_measures(tmp_path):
    put(tmp_path, made("unheard"))
    code = (
        "import sys\n"
        "for name in ('torch', 'onnxruntime', 'openvino', 'faiss', 'usearch', 'matplotlib'):\n"
        "    sys.modules[name] = None\n"
        "from geoengine.bench.suite import report\n"
        "for name in report.TITLES:\n"
        "    report._module(name)\n"
        f"print(report.collect([__import__('pathlib').Path({str(tmp_path)!r})]).troubles)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60)
    assert "knows no benchmark" in done.stdout, done.stderr
