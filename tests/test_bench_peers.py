"""`geoengine bench peers`: what is right counts, and what is missing is said."""

import sys

import numpy as np
import pytest
from command_line import run

from geoengine.bench.kernels import Case, Table
from geoengine.bench.suite import peers, peers_encoders, peers_scoring
from geoengine.bench.suite.peers_contenders import BASE
from geoengine.bench.suite.peers_part import Part
from geoengine.bench.suite.results import Results, read


def silent(done, total, what):
    """Show no progress."""


def test_agreement_counts_the_best_tiles_that_both_find():
    rng = np.random.default_rng(0)
    photos, tiles = rng.standard_normal((3, 8)), rng.standard_normal((64, 8))
    exact = [photos, tiles]
    same = peers_encoders.agreement([3 * photos, tiles], exact)
    assert same["min_cosine"] == pytest.approx(1) and same["min_overlap"] == 1
    # The second photo looks the other way: it finds the worst tiles, and its cosine is -1.
    turned = peers_encoders.agreement([photos * [[1], [-1], [1]], tiles], exact)
    assert turned["min_cosine"] == pytest.approx(-1)
    assert turned["min_overlap"] == 0 and turned["mean_overlap"] == pytest.approx(2 / 3)


def contender(speed, cosine, *, ours=False):
    right = {"min_cosine": cosine, "mean_cosine": cosine, "mean_overlap": 0.9, "min_overlap": 0.5}
    return {"ours": ours, "seconds": {"median": 32 / speed}, "batch_difference": 1e-7, **right}


def made_document(**changes):
    contenders = {
        BASE: contender(10, 1.0),
        "right": contender(50, 0.9997),
        "wrong": contender(500, 0.9),
        "absent": {"ours": False, "missing": "pip install absent"},
        "broken": {"ours": False, "failed": "RuntimeError: no compiler"},
        "openvino int8": contender(60, 0.9998, ours=True),
        "onnxruntime-cpu fp32": contender(12, 1.0, ours=True),
        **changes,
    }
    methods = {
        "ours fp16": {"ours": True, "seconds": {"median": 1e-3}, "found": 1.0},
        "faiss flat fp32": {"ours": False, "seconds": {"median": 3e-3}, "found": 0.875},
        "usearch exact fp16": {"ours": False, "missing": "pip install usearch"},
    }
    return {
        "settings": {"batch": 32, "rounds": 5},
        "rows": [
            {"key": "random", "part": "encoders", "contenders": contenders},
            {"key": "outliers", "part": "encoders", "contenders": contenders},
            {"key": "n", "part": "scoring", "n": 1024, "d": 512, "m": 1, "k": 16, "methods": methods},
        ],
    }


def test_the_goal_is_against_the_best_peer_that_is_as_right():
    rows = peers_encoders.encoder_rows(made_document())
    ours, peer = peers_encoders.best_peer(rows)
    assert (ours["name"], peer["name"]) == ("openvino int8", "right")
    text = peers_encoders.goal_text(rows)
    assert ": met, openvino int8 has 120 % of the speed of right." in text
    assert "wrong, has 8.33 times ours" in text and "falls to 0.9000" in text
    slower = made_document(**{"openvino int8": contender(30, 0.9998, ours=True)})
    assert ": not met, openvino int8 has 60 %" in peers_encoders.goal_text(
        peers_encoders.encoder_rows(slower)
    )


def test_one_bad_tower_makes_a_peer_wrong():
    document = made_document()
    document["rows"][1] = {**document["rows"][1], "contenders": {**document["rows"][1]["contenders"]}}
    document["rows"][1]["contenders"]["right"] = contender(50, 0.97)
    _, peer = peers_encoders.best_peer(peers_encoders.encoder_rows(document))
    assert peer["name"] == BASE


def test_tables_say_what_is_missing():
    text = peers.tables(made_document())
    lines = {line.split("|")[1].strip(): line for line in text.splitlines() if line.startswith("|")}
    assert "not installed: pip install absent" in lines["absent"]
    assert "failed: RuntimeError: no compiler" in lines["broken"]
    assert "not installed: pip install usearch" in lines["usearch exact fp16"]
    assert "3.00 x, 87.5 %" in lines["faiss flat fp32"]
    assert " 60.0 | 1.00 | 6.00 " in lines["**openvino int8**"]
    assert len({lines[name].count("|") for name in ("absent", "right", "encoder")}) == 1
    figures = peers.key_figures(made_document())
    assert figures["our fastest encoder (openvino int8)"] == "60.0 images/s"
    assert figures["times the best peer as right (right)"] == "1.20"
    assert figures["scoring 1,024 rows for 1, times the quickest peer"] == "3.00"


@pytest.mark.parametrize("kept", [0, 1, 2])
def test_unfinished_results_can_be_shown(kept):
    document = made_document()
    document["rows"] = document["rows"][:kept]
    assert ("Goal" in peers.tables(document)) == (kept > 0)
    assert bool(peers.key_figures(document)) == (kept > 0)


def test_results_without_ours_can_be_shown():
    document = made_document(
        **{name: {"ours": True, "failed": "x"} for name in ("openvino int8", "onnxruntime-cpu fp32")}
    )
    assert "not measured" in peers.tables(document)


def test_scoring_finds_the_exact_rows_and_goes_on(tmp_path):
    cases = (Case(300, 32, 3, 5), Case(64, 32, 1, 5))
    settings = {"part": "scoring"}
    with Results.start(tmp_path, "peers-scoring", settings) as results:
        peers_scoring.measure_scoring(results, silent, cases[:1], seconds=0.0)
    with Results.start(tmp_path, "peers-scoring", settings) as again:
        peers_scoring.measure_scoring(again, silent, cases, seconds=0.0)
    first, second = peers_scoring.scoring_rows(read(again.path))
    assert first == results.document["rows"][0] and (second["n"], second["m"]) == (64, 1)
    for row in (first, second):
        ran = {name: own for name, own in row["methods"].items() if "found" in own}
        assert {"ours fp32", "ours fp16", "NumPy fp32", "PyTorch fp32"} <= set(ran)
        assert all(own["found"] >= 0.8 for own in ran.values())
        assert all(own["found"] == 1 for name, own in ran.items() if "fp32" in name)


def test_scoring_sees_a_wrong_method_and_a_missing_one(monkeypatch):
    monkeypatch.setitem(sys.modules, "usearch.compiled", None)
    ready = Table(64, 8, 1)
    ready.methods["wrong"] = lambda queries, k: (None, np.tile(np.arange(k), (len(queries), 1)))
    figures = peers_scoring.compare(ready, Case(64, 8, 4, 3), 0.0)
    assert figures["wrong"]["found"] < 0.7 < figures["ours fp16"]["found"]
    assert figures["usearch exact fp16"] == {"ours": False, "missing": "pip install usearch"}


def test_a_part_alone_does_not_replace_both():
    settings = [peers.PeersSettings(part=part, backends=("openvino",)) for part in Part]
    assert [own.benchmark for own in settings] == ["peers-encoders", "peers-scoring", "peers"]


def test_the_file_of_results_does_not_name_a_python_of_this_machine():
    settings = peers.PeersSettings(backends=("openvino",), fastembed="/home/somebody/bin/python")
    assert settings.to_dict()["fastembed"] is True


@pytest.mark.parametrize(
    "words, message",
    [
        (("--backend", "onnx"), "unknown backend onnx: there are tensorrt"),
        (("encoders", "--fastembed", "/no/python"), "/no/python: cannot be run"),
        (("--batch", "4"), "greater than or equal to 16"),
    ],
)
def test_wrong_input_is_refused(tmp_path, words, message):
    done = run("bench", "peers", *words, "--out", tmp_path)
    assert done.exit_code == 2 and message in done.stderr
    assert not any(tmp_path.iterdir())
