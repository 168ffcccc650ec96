"""`pytest bench`: ratios against calibration kernels, and what is called a regression."""

import json

import pytest

from geoengine.bench import baselines
from geoengine.bench.baselines import BaselineError, Baselines, kernels, measure
from geoengine.bench.suite import timing

pytest_plugins = ["pytester"]


class Clock:
    """A time that passes only when it is told to; the machine is busy in some rounds."""

    now = 0.0

    def perf_counter(self):
        return self.now

    def work(self, *seconds):
        turns = iter(())

        def run():
            nonlocal turns
            own = next(turns, None)
            if own is None:
                turns = iter(seconds)
                own = next(turns)
            self.now += own

        return run


@pytest.fixture
def clock(monkeypatch):
    made = Clock()
    monkeypatch.setattr(timing, "time", made)
    return made


def test_a_ratio_is_of_the_rounds_in_which_nothing_was_in_the_way(clock):
    assert measure(clock.work(3.0, 9.0, 3.5), clock.work(2.0, 8.0)) == 1.5


def stored(tmp_path, **ratios):
    run = Baselines()
    for name, ratio in ratios.items():
        run.compare(name, "gemm", lambda ratio=ratio: ratio)
    path = tmp_path / "baselines.json"
    run.write(path)
    return path


def test_a_regression_is_more_than_a_fifth_and_measured_twice(tmp_path):
    run = Baselines.read(stored(tmp_path, slow=2.0, shaky=2.0, same=2.0, quick=2.0))
    ratios = {"slow": [2.5, 2.42], "shaky": [3.0, 2.1], "same": [2.39], "quick": [1.0]}
    for name, values in ratios.items():
        rest = iter(values)
        run.compare(name, "gemm", lambda rest=rest: next(rest))
        assert next(rest, None) is None, "measured again when it is slower, and only then"
    assert [(one.name, one.ratio) for one in run.regressions] == [("slow", 2.42)]
    [line] = [line for line in run.lines() if "REGRESSION" in line]
    assert line.split() == ["slow", "gemm", "2.42", "2", "+21%", "REGRESSION"]


def test_another_kernel_and_a_new_stage_have_no_baseline(tmp_path):
    run = Baselines.read(stored(tmp_path, one=1.0))
    assert run.compare("one", "copy", lambda: 9.0).baseline is None
    assert run.compare("new", "gemm", lambda: 9.0).change is None
    assert not run.regressions


def test_stages_that_did_not_run_keep_their_baselines(tmp_path):
    path = stored(tmp_path, one=1.0, two=2.0)
    run = Baselines.read(path)
    run.compare("two", "gemm", lambda: 3.0)
    run.write(path)
    ratios = json.loads(path.read_text())["ratios"]
    assert {name: own["ratio"] for name, own in ratios.items()} == {"one": 1.0, "two": 3.0}


@pytest.mark.parametrize("text", ["", "[]", '{"schema": 9}', '{"schema": 1, "machine": {}, "ratios": {}}'])
def test_damaged_baselines(tmp_path, text):
    path = tmp_path / "baselines.json"
    path.write_text(text)
    with pytest.raises(BaselineError, match="cannot be read as baselines"):
        Baselines.read(path)
    assert Baselines.read(tmp_path / "none.json").ratios == {}


def test_kernels_run(tmp_path):
    made = kernels(tmp_path)
    assert set(made) == {"gemm", "copy", "zlib", "python", "disk"}
    for kernel in made.values():
        kernel()


def test_stored_baselines_are_of_the_stages_that_there_are():
    names = Baselines.read(baselines.STORED).ratios
    text = baselines.STORED.with_name("benchmark_stages.py").read_text(encoding="utf-8")
    assert len(names) >= 15
    for name in names:
        assert f"def {name.partition('[')[0]}(" in text, f"`pytest bench --write-baselines`: no stage {name}"


def test_pytest_shows_and_fails(pytester, clock, tmp_path, monkeypatch):
    work = {"stage": clock.work(2.0), "gemm": clock.work(1.0)}
    monkeypatch.setattr(baselines, "WORK", work, raising=False)
    pytester.makeconftest("from geoengine.bench.conftest import *")
    pytester.makepyfile(
        """
        import pytest
        from geoengine.bench import baselines

        @pytest.fixture(scope="session")
        def calibration():
            return {"gemm": baselines.WORK["gemm"]}

        def test_stage(stage):
            stage(baselines.WORK["stage"], against="gemm")
        """
    )

    def run(*options):
        path = tmp_path / "own.json"
        return pytester.runpytest_inprocess("-p", "no:cacheprovider", f"--baselines={path}", *options)

    run().stdout.fnmatch_lines(["*no baselines in*"])
    run("--write-baselines").stdout.fnmatch_lines(["*stored in*"])
    done = run("--fail-on-regression")
    done.stdout.fnmatch_lines(["test_stage*gemm*2 *2 *+0%", "0 of 1 stages are more than 20% slower*"])
    assert done.ret == 0
    work["stage"] = clock.work(2.5)
    done = run()
    done.stdout.fnmatch_lines(["test_stage*2.5 *2 *+25%  REGRESSION", "1 of 1 stages are*"])
    assert done.ret == 0, "shown, and no failure unless asked"
    assert run("--fail-on-regression").ret == 1
