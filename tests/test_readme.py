"""The README: its figures are those measured, its Python runs, its commands exist."""

import json
import re
import shutil
from pathlib import Path

import pytest
from typer.main import get_command

from geoengine.bench import readme
from geoengine.bench.suite import report
from geoengine.cli import app

TEXT = readme.README.read_text(encoding="utf-8")
ROOT = Path(__file__).parent.parent


def test_the_figures_are_those_of_the_results():
    assert readme.render(TEXT) == TEXT, "run `make readme`"


def test_other_results_give_other_figures(tmp_path):
    shutil.copytree(readme.RESULTS, tmp_path / "results")
    for file in (tmp_path / "results" / "planet").glob("*.json"):
        report = json.loads(file.read_text())
        for result in report["results"]:
            result["within_km"]["1"]["share"] = 0.123
        file.write_text(json.dumps(report))
    [peers] = (tmp_path / "results").glob("*-cores/peers.json")
    document = json.loads(peers.read_text())
    timed = [own["seconds"] for own in document["rows"][0]["contenders"].values() if "seconds" in own]
    for seconds in timed[1:]:
        seconds["median"] = timed[0]["median"] / 987.6
    peers.write_text(json.dumps(document))
    changed = readme.render(TEXT, tmp_path / "results")
    assert changed.count("12.3 %") == len(readme.load_results(tmp_path / "results" / "planet")) + 1
    assert changed.count("987.6") == len(timed) - 1


def test_a_missing_block_is_an_error():
    with pytest.raises(ValueError, match="one block <!-- recall -->"):
        readme.render(TEXT.replace("<!-- recall -->", ""))


def test_the_python_runs(monkeypatch, capsys):
    monkeypatch.chdir(ROOT)
    [block] = re.findall(r"```python\n(.*?)```", TEXT, re.DOTALL)
    exec(compile(block, "README.md", "exec"), {})
    assert "km" in capsys.readouterr().out


def test_the_commands_and_their_options_exist():
    used = re.findall(r"geoengine ((?:locate|build-engines|evaluate|doctor|train)[^`\n#]*)", TEXT)
    assert {line.split()[0] for line in used} == {"locate", "build-engines", "evaluate", "doctor", "train"}
    for line in used:
        command = get_command(app)
        for word in line.split():
            command = getattr(command, "commands", {}).get(word, command)
        known = {option for parameter in command.params for option in parameter.opts}
        assert known.issuperset(re.findall(r"--[a-z-]+", line)), line


def test_files_that_it_links_to_are_there():
    links = re.findall(r"\]\(([^)#:]+)\)", TEXT)
    assert "RESPONSIBLE_USE.md" in links
    for link in links:
        assert (ROOT / link).exists(), link


def test_the_report_of_all_machines_is_current():
    found = report.collect([readme.RESULTS])
    text, plots = report.render(found, readme.RESULTS)
    assert not found.troubles
    assert (readme.RESULTS / report.NAME).read_text() == text, "run `make readme`"
    for machine, drawn in plots.items():
        for name in drawn:  # what is in them depends on matplotlib's version
            assert (readme.RESULTS / machine / f"{name}.svg").is_file(), "run `make readme`"


def table1(gpu=None):
    spread = {"median": 20.0, "least": 19.0, "most": 21.0, "rounds": 3}
    row = {"key": "k=16", "k": 16, "tiles": 1792, "cold": spread, "indexed": None}
    row |= {"warm": spread | {"median": 0.0421}, "paper": {"extrapolated_s": 300.0}}
    machine = {"cpu": "Made", "cores": 2, "gpu": gpu, "date": "2026-01-02"}
    return {"machine": machine, "facts": {"model": "ViT-X"}, "rows": [{**row, "k": 64, "paper": None}, row]}


def test_figures_of_speed_come_with_machine_and_date():
    told = readme.claim([table1()])
    assert told.startswith("On 2 cores of Made (2026-01-02), a photo at k = 16 takes 20 s, 15 times as fast")
    assert "42.1 ms, 7,126 times as fast" in told
    assert readme.claim([table1(gpu="NVIDIA H200")]).startswith("On NVIDIA H200 (2026-01-02), ")
    first, second = readme.speed_table([table1()]).strip().splitlines()[2:]
    assert (
        first
        == "| 2 cores of Made (2026-01-02) | 16 | 1,792 | 20 s (15 x) | – | 42.1 ms (7,126 x) | 5.0 min |"
    )
    assert second == "| 2 cores of Made (2026-01-02) | 64 | 1,792 | 20 s | – | 42.1 ms | – |"


def test_what_was_not_measured_is_called_so():
    assert readme.claim([]) == readme.NOT_MEASURED
    assert readme.NOT_MEASURED in readme.speed_table([])


@pytest.mark.parametrize(
    ("seconds", "text"),
    [
        (0.0004, "0.4 ms"),
        (0.12345, "123 ms"),
        (99.4, "99.4 s"),
        (99.6, "1.7 min"),
        (594, "9.9 min"),
        (1830, "30 min"),
    ],
)
def test_times(seconds, text):
    assert readme.duration(seconds) == text
