import os
import subprocess
import sys

import pytest
from command_line import refused, run

from geoengine.commands import terminal
from geoengine.engine.errors import GeoEngineError

# --- the terminal ---


def geoengine_process(code, stdout, *arguments):
    """Run the command line in a new process in which `code` prepared a command "speak"."""
    program = (
        "import sys, geoengine.cli as cli\n"
        "from geoengine.commands.terminal import write_result\n"
        f"def speak():\n    {code}\n"
        "cli.app.command()(speak)\nsys.argv = ['geoengine', 'speak']\ncli.main()\n"
    )
    buffered = {key: value for key, value in os.environ.items() if key != "PYTHONUNBUFFERED"}
    return subprocess.run(
        [sys.executable, "-c", program],
        stdout=stdout,
        stderr=subprocess.PIPE,
        text=True,
        timeout=60,
        env=buffered,
    )


def test_a_reader_that_goes_away_is_not_complained_about():
    read, write = os.pipe()
    os.close(read)
    with os.fdopen(write, "w") as pipe:
        result = geoengine_process("write_result('x')", pipe)
    assert (result.returncode, result.stderr) == (terminal.Exit.BROKEN_PIPE, "")


@pytest.mark.skipif(not os.path.exists("/dev/full"), reason="needs /dev/full, which Linux has")
@pytest.mark.parametrize("unbuffered", ["", "1"])
def test_a_table_that_cannot_be_written_is_one_sentence(unbuffered):
    program = "import sys, geoengine.cli as cli\nsys.argv = ['geoengine', 'doctor']\ncli.main()\n"
    with open("/dev/full", "w") as full:
        result = subprocess.run(
            [sys.executable, "-c", program],
            stdout=full,
            stderr=subprocess.PIPE,
            text=True,
            timeout=60,
            env=os.environ | {"PYTHONUNBUFFERED": unbuffered},
        )
    assert result.returncode == terminal.Exit.FAILED
    assert result.stderr.startswith("geoengine: the results cannot be written")
    assert result.stderr.count("\n") == 1


@pytest.mark.skipif(not os.path.exists("/dev/full"), reason="needs /dev/full, which Linux has")
def test_results_that_cannot_be_written_are_one_sentence():
    with open("/dev/full", "w") as full:
        result = geoengine_process("write_result('x')", full)
    assert result.returncode == 2
    assert result.stderr == "geoengine: the results cannot be written (No space left on device)\n"


def test_progress_is_silent_outside_a_terminal(capsys):
    with terminal.waiting("something"), terminal.progress_bar("something") as show:
        show("step", 1, 2)
    assert capsys.readouterr() == ("", "")


def test_progress_is_shown_on_a_terminal(capsys, monkeypatch):
    monkeypatch.setattr(sys.stderr, "isatty", lambda: True, raising=False)
    monkeypatch.setenv("TERM", "xterm")
    with terminal.waiting("loading"), terminal.progress_bar("starting") as show:
        pass
    with terminal.progress_bar("starting") as show:
        show("level 1 of 7", 128, 256)
    out, err = capsys.readouterr()
    assert out == "" and "level 1 of 7" in err and "128/256" in err


# --- the other commands ---


def test_training_into_a_place_that_cannot_be_written_is_refused(tmp_path):
    (tmp_path / "file").touch()
    refused(run("train", "planet", "--out", tmp_path / "file" / "x"), "cannot be written")


def test_training_from_a_file_that_is_not_there_is_refused(tmp_path):
    refused(run("train", "planet", "--out", tmp_path / "x", "--start", tmp_path / "no"), "no encoders.json")


def build_report(path):
    from geoengine.export.report import BuildReport, ReportRow

    row = ReportRow(
        artifact="onnx/trunk",
        variant="fp16",
        backend="openvino",
        min_cosine=0.9999,
        mean_cosine=1.0,
        images_per_second=12.34,
        bytes=2_000_000,
    )
    return BuildReport(
        path=path,
        model="m",
        pretrained="none",
        world="earth",
        rows=(row,),
        skipped=(("tensorrt", "no GPU"),),
        bytes=2_000_000,
        seconds=3.0,
    )


def test_build_engines_passes_its_options_on(monkeypatch, tmp_path):
    from geoengine.export import build

    seen = []

    def built(config, progress):
        progress(1, 3, "trunk")
        seen.append(config)
        return build_report(config.out)

    monkeypatch.setattr(build, "build_engines", built)
    options = ["--model", "ViT", "--pretrained", "none", "--levels", "4-8", "--backend", "onnxruntime-cuda"]
    options += ["--precision", "fp32", "--precision", "fp16", "--max-batch", "64", "--calibration", tmp_path]
    result = run("build-engines", *options, "--out", tmp_path)
    assert result.exit_code == 0, result.stderr
    assert seen == [
        build.BuildConfig(
            model="ViT",
            pretrained="none",
            levels=(4, 6, 8),
            backend="onnxruntime-cuda",
            precisions=("fp32", "fp16"),
            max_batch=64,
            calibration=tmp_path,
            out=tmp_path,
        )
    ]
    for text in ("0.999900", "onnx/trunk", "openvino", "12.3", "not run by tensorrt: no GPU"):
        assert text in result.stdout
    assert "the weights are random" in result.stderr


def test_build_engines_refuses_an_unknown_precision():
    refused(run("build-engines", "--precision", "int4"), "unknown precision 'int4'")


@pytest.mark.parametrize(
    ("option", "function"), [("--verify", "verify_bundle"), ("--plans", "compile_bundle")]
)
def test_build_engines_of_a_bundle_that_is_there(monkeypatch, tmp_path, option, function):
    from geoengine.export import check

    def damaged(path, **options):
        raise GeoEngineError(f"{path} is damaged")

    monkeypatch.setattr(check, function, damaged)
    refused(run("build-engines", option, "--out", tmp_path), f"{tmp_path} is damaged")
    monkeypatch.setattr(check, function, lambda path, **options: build_report(path))
    assert "onnx/trunk" in run("build-engines", option, "--out", tmp_path).stdout


@pytest.mark.parametrize(
    ("interrupt", "told"),
    [
        (KeyboardInterrupt(), "the same command goes on with this build"),
        (KeyboardInterrupt("another command goes on"), "another command goes on"),
    ],
)
def test_an_interrupted_build_says_how_it_goes_on(monkeypatch, tmp_path, interrupt, told):
    from geoengine.export import build

    def interrupted(config, progress):
        raise interrupt

    monkeypatch.setattr(build, "build_engines", interrupted)
    result = run("build-engines", "--out", tmp_path)
    assert result.exit_code == 130
    assert told in result.stderr
