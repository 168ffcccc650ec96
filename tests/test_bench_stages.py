"""The stages of a search: the clock, the limits and how they are shown."""

import json
import time
import xml.etree.ElementTree as ElementTree

import pytest
from int8_bundle import make_tower, write_int8_bundle
from made_encoders import MEAN, STD
from tiny_bundle import write_tiny_bundle, write_tiny_tiles
from typer.testing import CliRunner

from geoengine.bench.suite import stages
from geoengine.bench.suite.limits import MODEL, RESIZE, graph_flop
from geoengine.bench.suite.results import Results
from geoengine.bench.suite.stage_clock import BOOKKEEPING, DECODE, STAGES, TRUNK, StageClock
from geoengine.bench.suite.stages import StageSettings
from geoengine.bench.suite.waterfall import Bar, waterfall
from geoengine.commands.bench import app
from geoengine.engine.errors import BackendError, GeoEngineError

RATES = {
    "per": "processor second",
    "cores": 2,
    "memory": 1e10,
    "host_memory": 1e10,
    "reading": 1e9,
    "decoding": 4e3,
    "products": 1e11,
    "products_of": "torch",
    "precision": "fp32",
}


@pytest.fixture(autouse=True)
def known_rates(monkeypatch):
    monkeypatch.setattr(stages.limits, "measure_limits", lambda variant, tiles, *, gpu: dict(RATES))


@pytest.fixture(scope="module")
def small(tmp_path_factory):
    """A bundle and a folder of tiles for it."""
    folder = tmp_path_factory.mktemp("stages")
    write_tiny_tiles(folder / "tiles")
    return write_tiny_bundle(folder / "bundle", sides=(8,), world="earth"), folder / "tiles"


def measured(small, folder, **options):
    settings = StageSettings(bundle=str(small[0]), tiles=str(small[1]), k=2, rounds=1, **options)
    with Results.start(folder, settings.benchmark, settings.to_dict()) as results:
        stages.measure(settings, results, lambda *_: None)
    return results


def test_the_accounts_of_a_search_add_up_to_the_whole(small, tmp_path):
    [row] = measured(small, tmp_path, backends=("onnxruntime-cpu",)).document["rows"]
    own = row["stages"]
    assert tuple(own) == STAGES
    assert sum(stage["busy_s"] for stage in own.values()) == pytest.approx(row["total_s"])
    waited = sum(stage["waits_s"] for stage in own.values()) + row["waiting_s"]
    assert waited == pytest.approx(row["whole_s"])
    tiles = 4 + 2 * 16
    assert row["encoded"] == tiles + 1  # and the photo
    assert own["fetch"]["calls"] == own["decode"]["calls"] == own["copy"]["calls"] == tiles
    assert own["digest"]["calls"] == tiles and own["top-k"]["calls"] == 2
    for stage in ("decode", "trunk", "head", "bookkeeping"):
        assert own[stage]["busy_s"] > 0
    assert own["decode"]["waits_s"] == 0  # other threads decode
    assert own["preprocess"]["busy_s"] == 0  # tiles come in the encoder's size
    assert 0 < row["but_encoder_busy"] < 1


def test_streams_side_by_side_add_up_too(small, tmp_path):
    """OpenVINO shares a batch out: every picture is counted once, and so is the time."""
    pytest.importorskip("openvino", reason="needs openvino, the extra of that name")
    bundle = write_int8_bundle(tmp_path / "bundle", make_tower(), levels=(1, 3), world="earth")
    [row] = measured((bundle, small[1]), tmp_path / "out", backends=("openvino",)).document["rows"]
    own = row["stages"]
    assert row["encoded"] == 4 + 2 * 16 + 1
    assert own["head"]["calls"] == own["trunk"]["calls"] >= 3
    assert sum(stage["busy_s"] for stage in own.values()) == pytest.approx(row["total_s"])
    waited = sum(stage["waits_s"] for stage in own.values()) + row["waiting_s"]
    assert waited == pytest.approx(row["whole_s"])
    assert min(own[stage][account] for stage in ("trunk", "head") for account in ("busy_s", "waits_s")) > 0


def test_a_search_is_as_before_once_it_was_watched(small, tmp_path):
    from geoengine.engine import pictures
    from geoengine.engine.backends import batches
    from geoengine.engine.sources import streaming

    seams = (streaming.read_picture, streaming._Work.run, pictures.hashlib, batches.to_square)
    measured(small, tmp_path, backends=("onnxruntime-cpu",))
    assert (streaming.read_picture, streaming._Work.run, pictures.hashlib, batches.to_square) == seams


def test_a_stage_inside_another_is_counted_once():
    clock = StageClock()
    with clock.search(), clock.stage(TRUNK):
        time.sleep(0.02)
        with clock.stage(DECODE):
            time.sleep(0.05)
    assert clock.wall_s[DECODE] >= 0.05
    assert sum(clock.wall_s.values()) == pytest.approx(clock.whole_s)
    assert 0.02 <= clock.wall_s[TRUNK] <= clock.whole_s - clock.wall_s[DECODE]
    with clock.stage(BOOKKEEPING):
        time.sleep(0.01)  # outside a search
    assert sum(clock.wall_s.values()) == pytest.approx(clock.whole_s)


def test_vit_b_32_has_the_flop_of_its_shapes(tmp_path):
    """Of towers with as few blocks as show what one costs, in ViT-B/32's width, at 224 and 256 pixels."""
    from geoengine.engine.manifest import Variant
    from geoengine.export.encoders import VisionConfig
    from geoengine.export.model import Trunk
    from geoengine.export.onnx_graphs import write_trunks

    sizes = {"image_size": 224, "patch_size": 32, "width": 768, "heads": 12, "output_dim": 512}
    tower = VisionConfig(**sizes, layers=2, quick_gelu=True).build().requires_grad_(False)
    flop = {}
    for blocks in (1, 2):
        trunks = {side: Trunk(tower, blocks=blocks, side=side, mean=MEAN, std=STD) for side in (224, 256)}
        (tmp_path / str(blocks)).mkdir()
        files = write_trunks(trunks, tmp_path / str(blocks), variant=Variant.fp32)
        flop[blocks] = {side: graph_flop(files[side]) for side in (224, 256)}
    block = flop[2][224][MODEL] - flop[1][224][MODEL]
    whole = flop[1][224][MODEL] + 11 * block + 2 * 768 * 512
    assert whole == pytest.approx(8.7e9, rel=0.02)
    assert flop[1][224][RESIZE] == 0
    assert flop[1][256][MODEL] == flop[1][224][MODEL]
    # Columns of 256 rows, then rows of 224 columns, of three colours, from the pixels that a patch needs.
    whole = 2 * 3 * 256 * 224 * (256 + 224)
    assert 32 / 256 * whole < flop[1][256][RESIZE] < 48 / 256 * whole


def test_a_waterfall_is_a_picture_whose_bars_follow_each_other():
    text = waterfall('A "title" & <more>', [Bar("one", 1.0, 0.5), Bar("two", 3.0, None)], "seconds")
    root = ElementTree.fromstring(text)
    bars = [bar for bar in root.iter() if bar.get("class") == "bar"]
    first, second = ((float(bar.get("x")), float(bar.get("width"))) for bar in bars)
    assert second[0] == pytest.approx(first[0] + first[1], abs=0.2)
    assert second[1] == pytest.approx(3 * first[1], rel=0.01)
    limits = [bar for bar in root.iter() if bar.get("class") == "limit"]
    assert [float(bar.get("width")) for bar in limits] == [pytest.approx(first[1] / 2, abs=0.1)]
    assert "prefers-color-scheme: dark" in text


def test_the_command_shows_its_rows_and_keeps_them(small, tmp_path):
    command = ["stages", "--bundle", str(small[0]), "--tiles", str(small[1]), "--k", "2", "--rounds", "1"]
    command += ["--backend", "onnxruntime-cpu", "--out", str(tmp_path)]
    done = CliRunner().invoke(app, command)
    assert done.exit_code == 0, done.output
    assert "| bookkeeping |" in done.stdout and "Model FLOP utilisation of the encoder" in done.stdout
    [file] = tmp_path.glob("*/stages.json")
    assert file.with_name("stages-onnxruntime-cpu.svg").is_file()
    done = CliRunner().invoke(app, [*command, "--json"])
    assert json.loads(done.stdout)["rows"][0]["backend"] == "onnxruntime-cpu"


def test_an_unfinished_document_and_figures_without_products_are_shown(small, tmp_path):
    document = measured(small, tmp_path, backends=("onnxruntime-cpu",)).document
    assert len(stages.key_figures(document)) == 2
    for stage in document["rows"][0]["stages"].values():
        stage.pop("limit_s", None)
    assert "not installed: pip install 'geoengine[export]'" in stages.tables(document)
    assert len(stages.key_figures(document)) == 1
    assert stages.tables({"rows": []}) == "Nothing measured yet.\n"


def test_what_cannot_be_measured_is_said(small, tmp_path):
    with pytest.raises(GeoEngineError, match="at least 1, got 0"):
        StageSettings(k=0)
    with pytest.raises(BackendError, match="unknown backend 'fast'"):
        measured(small, tmp_path, backends=("fast",))
