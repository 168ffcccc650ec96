"""Folders of encoders, shared trunks, and reading weights."""

import json
import os
from pathlib import Path

import pytest
import torch

from geoengine.engine.errors import ExportError
from geoengine.export import encoders, weights
from geoengine.export.encoders import VisionConfig

torch.set_num_threads(1)
TINY = VisionConfig(image_size=16, patch_size=8, width=32, layers=3, heads=4, output_dim=24, quick_gelu=True)


def tower_states(names: list[str], trunk_layers: int, vision: VisionConfig = TINY) -> dict[str, dict]:
    """Full state dicts that are equal up to `trunk_layers` blocks."""
    torch.manual_seed(7)
    base = vision.build().state_dict()
    states = {}
    for name in names:
        fresh = vision.build().state_dict()
        states[name] = {
            key: (base if encoders.in_trunk(key, trunk_layers) else fresh)[key].clone() for key in base
        }
    return states


def save(path: Path, states: dict[str, dict], **changes) -> None:
    options = {
        "vision": TINY,
        "trunk": states["photo"],
        "heads": states,
        "trunk_layers": 1,
        "mean": (0.5, 0.4, 0.3),
        "std": (0.2, 0.3, 0.25),
        "logit_scale": {"z04": 20.0, "z06": 30.5},
    }
    encoders.save_encoder_folder(path, **{**options, **changes})


def test_folder_round_trip_rounds_to_half_and_shares_the_trunk(tmp_path):
    states = tower_states(["photo", "z04", "z06"], 1)
    save(tmp_path / "set", states)
    loaded = encoders.load_encoder_folder(tmp_path / "set")
    assert (loaded.model, loaded.world, loaded.pretrained) == ("planet-vit", "planet", "checkpoints")
    assert (loaded.levels, loaded.trunk_layers) == ((4, 6), 1)
    assert loaded.logit_scale == {"z04": 20.0, "z06": 30.5}
    assert (loaded.mean, loaded.std) == ((0.5, 0.4, 0.3), (0.2, 0.3, 0.25))
    for name, state in states.items():
        for key, tensor in loaded.towers[name].state_dict().items():
            assert torch.equal(tensor, state[key].half().float()), (name, key)
    photo, z04 = loaded.towers["photo"], loaded.towers["z04"]
    assert photo.conv1.weight.data_ptr() == z04.conv1.weight.data_ptr()
    assert sorted(p.name for p in (tmp_path / "set").iterdir()) == [
        "encoders.json", "head_photo.safetensors", "head_z04.safetensors", "head_z06.safetensors",
        "trunk.safetensors",
    ]  # fmt: skip


def test_folder_bytes_repeat_and_replace_an_older_set(tmp_path):
    states = tower_states(["photo", "z04", "z06"], 1)
    heads_only = {
        name: {key: tensor for key, tensor in state.items() if not encoders.in_trunk(key, 1)}
        for name, state in states.items()
    }
    save(tmp_path / "a", states)
    save(tmp_path / "b", tower_states(["photo", "z04", "z06"], 2))
    save(tmp_path / "b", states, heads=heads_only)
    for file in (tmp_path / "a").iterdir():
        assert file.read_bytes() == (tmp_path / "b" / file.name).read_bytes()
    assert sorted(p.name for p in tmp_path.iterdir()) == ["a", "b"]


def test_folder_is_not_written_over_something_else(tmp_path):
    (tmp_path / "photos").mkdir()
    (tmp_path / "photos" / "a.jpg").write_bytes(b"x")
    with pytest.raises(ExportError, match="is not a folder of encoders"):
        save(tmp_path / "photos", tower_states(["photo", "z04", "z06"], 1))


def test_a_folder_that_cannot_be_replaced_stays(tmp_path, monkeypatch):
    for name in ("set", "new"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "mark").write_text(name)
    rename = Path.rename

    def refuse(path: Path, target: Path) -> Path:
        if path.name == "new":
            raise OSError("disk gone")
        return rename(path, target)

    monkeypatch.setattr(Path, "rename", refuse)
    with pytest.raises(OSError, match="disk gone"):
        encoders.replace_folder(tmp_path / "new", tmp_path / "set")
    assert (tmp_path / "set" / "mark").read_text() == "set"
    assert sorted(p.name for p in tmp_path.iterdir()) == ["new", "set"]


def test_saving_refuses_unequal_trunks_wrong_shapes_and_overflow(tmp_path):
    states = tower_states(["photo", "z04", "z06"], 0)
    with pytest.raises(ExportError, match="trunk tensors given with z04 differ"):
        save(tmp_path / "set", states)
    states = tower_states(["photo", "z04", "z06"], 1)
    wrong = {**states, "z06": {**states["z06"], "proj": torch.zeros(32, 5)}}
    with pytest.raises(ExportError, match=r"tensor proj of z06 has shape \(32, 5\), expected \(32, 24\)"):
        save(tmp_path / "set", wrong)
    large = {**states, "z06": {**states["z06"], "proj": torch.full((32, 24), 1e6)}}
    with pytest.raises(ExportError, match="proj has values that float16 cannot hold"):
        save(tmp_path / "set", large)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (lambda folder: (folder / "encoders.json").unlink(), "has no encoders.json"),
        (lambda folder: (folder / "encoders.json").write_text("{"), "encoders.json is damaged"),
        (lambda folder: (folder / "head_z06.safetensors").unlink(), "no head for z06"),
        (
            lambda folder: (folder / "trunk.safetensors").write_bytes(b"nonsense"),
            "not a readable safetensors",
        ),
        (lambda folder: edit_config(folder, trunk_layers=3), r"trunk_layers must be in \[0, 3\), got 3"),
        (lambda folder: edit_config(folder, trunk_layers=2), "lacks transformer.resblocks.1"),
    ],
)
def test_loading_a_damaged_folder_says_what_is_wrong(tmp_path, damage, message):
    save(tmp_path / "set", tower_states(["photo", "z04", "z06"], 1))
    damage(tmp_path / "set")
    with pytest.raises(ExportError, match=message):
        encoders.load_encoder_folder(tmp_path / "set")


def edit_config(folder: Path, **changes) -> None:
    file = folder / "encoders.json"
    file.write_text(json.dumps({**json.loads(file.read_text()), **changes}))


@pytest.mark.parametrize("shared", [0, 1, 2])
def test_shared_blocks_are_counted_by_content(shared):
    states = tower_states(["photo", "z04", "z06"], shared)
    assert encoders.shared_blocks(states, 2) == shared
    assert encoders.shared_blocks(states, 1) == min(shared, 1)


def test_different_patch_embeddings_share_nothing():
    states = tower_states(["photo", "z04"], 2)
    states["z04"]["conv1.weight"][0, 0, 0, 0] += 1e-6
    assert encoders.shared_blocks(states, 2) is None


def test_torch_files_with_code_are_refused(tmp_path):
    class Evil:
        def __reduce__(self):
            return os.mkdir, (str(tmp_path / "ran"),)

    torch.save({"state_dict": Evil()}, tmp_path / "evil.pt")
    with pytest.raises(ExportError, match="is refused"):
        weights.read_state(tmp_path / "evil.pt")
    assert not (tmp_path / "ran").exists()


@pytest.mark.filterwarnings("ignore::FutureWarning")  # PyTorch gives TorchScript up
def test_torchscript_is_refused_with_the_remedy(tmp_path):
    torch.jit.save(torch.jit.script(torch.nn.Linear(2, 2)), tmp_path / "ViT-B-32.pt")
    with pytest.raises(ExportError, match=r"ViT-B-32.pt is refused: .* TorchScript .* --pretrained openai"):
        weights.read_state(tmp_path / "ViT-B-32.pt")


def test_torch_files_of_tensors_are_unwrapped(tmp_path):
    torch.save({"epoch": 3, "state_dict": {"module.proj": torch.ones(2)}}, tmp_path / "a.pt")
    assert list(weights.read_state(tmp_path / "a.pt")) == ["proj"]
    (tmp_path / "b.pt").write_bytes(b"not a file")
    with pytest.raises(ExportError, match=r"not a readable PyTorch|refused"):
        weights.read_state(tmp_path / "b.pt")
    with pytest.raises(ExportError, match="does not exist"):
        weights.read_state(tmp_path / "c.pt")
