"""Building bundles: a build that fails or is interrupted changes nothing, and the next one goes on."""

import shutil
from pathlib import Path

import pytest
import torch
from made_builds import build_small, digests, reuse_graphs

from geoengine.engine.bundle import EngineBundle
from geoengine.engine.errors import ExportError
from geoengine.export import build, reference, staging
from geoengine.export.build import build_engines
from geoengine.export.config import BuildConfig
from geoengine.export.staging import locked

torch.set_num_threads(1)


@pytest.fixture(scope="module")
def built(tmp_path_factory):
    """A bundle's folder, its report, and the steps that were told."""
    return build_small(tmp_path_factory.mktemp("built"))


@pytest.fixture
def reuse(monkeypatch, built):
    reuse_graphs(monkeypatch, built[0] / "bundle" / "onnx")


def interrupted(config, at):
    """Build until a step whose name has `at` in it."""

    def interrupt(done: int, total: int, doing: str) -> None:
        if at in doing:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        build_engines(config, interrupt)


def test_an_interrupted_build_leaves_the_old_bundle_and_goes_on_where_it_stopped(built, reuse, tmp_path):
    shutil.copytree(built[0] / "bundle", tmp_path / "out")
    (tmp_path / "out" / "mark").write_text("old")
    before = digests(tmp_path / "out")
    config = BuildConfig(encoder_folder=built[0] / "set", out=tmp_path / "out", input_sizes=(24,))
    interrupted(config, "check encoder z06")
    assert digests(tmp_path / "out") == before
    assert {file.name for file in tmp_path.iterdir()} == {"out", ".out.partial"}
    notes = (tmp_path / ".out.partial" / "notes.jsonl").open("a")
    notes.write('{"what": "onnxruntime-cpu fp')  # as if the power had failed
    notes.close()
    steps = []
    build_engines(config, lambda done, total, doing: steps.append(doing))
    assert not any(word in step for step in steps for word in ("export", "PyTorch"))
    assert "mark" not in digests(tmp_path / "out")
    assert [file.name for file in tmp_path.iterdir()] == ["out"]
    assert set(digests(tmp_path / "out")) == set(digests(built[0] / "bundle"))
    EngineBundle.open(tmp_path / "out")


def test_what_another_build_left_behind_is_not_used(built, reuse, tmp_path):
    interrupted(BuildConfig(encoder_folder=built[0] / "set", out=tmp_path / "out"), "check encoder z06")
    (tmp_path / ".out.partial" / "onnx" / "old.onnx").write_bytes(b"old")
    steps = []
    other = BuildConfig(encoder_folder=built[0] / "set", out=tmp_path / "out", levels=(4,))
    build_engines(other, lambda done, total, doing: steps.append(doing))
    assert "export the trunk, fp32" in steps
    assert "onnx/old.onnx" not in digests(tmp_path / "out")


def test_two_builds_do_not_share_a_folder(built, tmp_path):
    config = BuildConfig(encoder_folder=built[0] / "set", out=tmp_path / "out")
    with locked(tmp_path / "out"), pytest.raises(ExportError, match=r"another build of .*out is running"):
        build_engines(config)


def test_a_full_disk_keeps_what_is_done(built, reuse, monkeypatch, tmp_path):
    def full(reference, file):
        raise OSError(28, "No space left on device", str(file))

    config = BuildConfig(encoder_folder=built[0] / "set", out=tmp_path / "out")
    with monkeypatch.context() as patched:
        patched.setattr(reference, "save_reference", full)
        with pytest.raises(ExportError, match=r"No space left .* kept in .*\.out\.partial, and the same"):
            build_engines(config)
    steps = []
    build_engines(config, lambda done, total, doing: steps.append(doing))
    assert not any("export" in step for step in steps)


def test_places_that_a_bundle_must_not_go(built, tmp_path, monkeypatch):
    def build_into(out: Path) -> None:
        build_engines(BuildConfig(encoder_folder=built[0] / "set", out=out))

    (tmp_path / "photos").mkdir()
    (tmp_path / "photos" / "a.jpg").write_bytes(b"x")
    with pytest.raises(ExportError, match="photos exists and is not an engine bundle"):
        build_into(tmp_path / "photos")
    with pytest.raises(ExportError, match=r"a\.jpg is a file"):
        build_into(tmp_path / "photos" / "a.jpg")
    usage = shutil.disk_usage(tmp_path)
    monkeypatch.setattr(shutil, "disk_usage", lambda path: usage._replace(free=1_000_000))
    with pytest.raises(ExportError, match="has 1 MB free, and the bundle may need 10 MB"):
        build_into(tmp_path / "new")
    assert [file.name for file in tmp_path.iterdir()] == ["photos"]


def test_a_folder_that_cannot_be_made(built, tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(
        ExportError, match=r"file cannot be made \(File exists\): name another one with --out"
    ):
        build_engines(BuildConfig(encoder_folder=built[0] / "set", out=tmp_path / "file" / "b"))


def test_interrupted_plans_leave_a_whole_bundle_and_say_what_goes_on(built, monkeypatch, tmp_path):
    def interrupt(path, **options):
        raise KeyboardInterrupt

    monkeypatch.setattr(build, "compile_bundle", interrupt)
    config = BuildConfig(
        encoder_folder=built[0] / "set", precisions=("fp16",), levels=(4,), out=tmp_path / "b"
    )
    with pytest.raises(KeyboardInterrupt, match=r"is whole, .*build-engines --plans --out .*b`"):
        build_engines(config)
    EngineBundle.open(tmp_path / "b")


class Killed(BaseException):
    """What nothing catches, as SIGKILL."""


@pytest.mark.parametrize("rename", [0, 1])
def test_a_build_killed_while_it_replaces_a_bundle_goes_on(built, reuse, monkeypatch, tmp_path, rename):
    shutil.copytree(built[0] / "bundle", tmp_path / "out")
    (tmp_path / "out" / "mark").write_text("old")
    config = BuildConfig(encoder_folder=built[0] / "set", out=tmp_path / "out", input_sizes=(24,))
    renamed = []

    def killed(source, target):
        if len(renamed) == rename:
            raise Killed
        renamed.append(shutil.move(source, target))

    with monkeypatch.context() as patched:
        patched.setattr(Path, "rename", killed)
        with pytest.raises(Killed):
            build_engines(config)
    steps = []
    build_engines(config, lambda done, total, doing: steps.append(doing))
    assert not any(word in step for step in steps for word in ("export", "PyTorch"))
    assert [file.name for file in tmp_path.iterdir()] == ["out"]
    assert set(digests(tmp_path / "out")) == set(digests(built[0] / "bundle"))


def test_a_bundle_built_again_keeps_its_plans(built, reuse, tmp_path):
    shutil.copytree(built[0] / "bundle", tmp_path / "out")
    plans = tmp_path / "out" / "tensorrt" / "gpu"
    plans.mkdir(parents=True)
    for name in ("plans.json", "timing.cache", ".lock"):
        (plans / name).write_text(name)
    build_engines(BuildConfig(encoder_folder=built[0] / "set", out=tmp_path / "out"))
    assert sorted(file.name for file in plans.iterdir()) == ["plans.json", "timing.cache"]
    build_engines(BuildConfig(encoder_folder=built[0] / "set", out=tmp_path / "out", levels=(4,)))
    assert not plans.exists(), "they are of other encoders"


def test_graphs_that_were_cut_off_are_written_again(built, tmp_path):
    config = BuildConfig(
        encoder_folder=built[0] / "set", precisions=("int8",), levels=(4,), out=tmp_path / "out"
    )
    interrupted(config, "calibrate")
    folder = tmp_path / ".out.partial" / "onnx"
    (folder / "trunk.16.int8.onnx").write_bytes(b"\x08\x0a\x3a\xff")
    (folder / "trunk.weights").write_bytes(b"part")
    build_engines(config)
    EngineBundle.open(tmp_path / "out")


def test_a_lock_in_a_folder_that_has_gone_is_not_held(monkeypatch, tmp_path):
    target, calls = tmp_path / "out", []
    real = staging.fcntl.flock

    def another_build_ends_first(file, how):
        calls.append(how)
        if len(calls) == 1:
            shutil.rmtree(staging.staging_path(target))
        real(file, how)

    monkeypatch.setattr(staging.fcntl, "flock", another_build_ends_first)
    with locked(target):
        assert len(calls) == 2
        with pytest.raises(ExportError, match="is running"), locked(target):
            pass
