"""The README: its figures are those measured, its Python runs, its commands exist."""

import json
import re
import shutil
from pathlib import Path

import pytest
from typer.main import get_command

from geoengine.bench import readme
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
    encoders = tmp_path / "results" / "cpu" / "encoders.json"
    encoders.write_text(re.sub(r'"ratio": [\d.]+', '"ratio": 77.7', encoders.read_text()))
    changed = readme.render(TEXT, tmp_path / "results")
    assert changed.count("12.3 %") == len(readme.load_results(tmp_path / "results" / "planet")) + 1
    assert changed.count("77.7") == len(json.loads(encoders.read_text())["rows"])


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
