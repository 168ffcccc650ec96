"""CLIP models by name, tag and file, and folders of fine-tuned map encoders."""

import json
import math
from pathlib import Path

import open_clip
import pytest
import torch
from safetensors.torch import save_file

from geoengine.engine.errors import ExportError
from geoengine.export.checkpoints import load_clip_encoders

torch.set_num_threads(1)
LEVELS = (4, 6)
CONFIG = {
    "embed_dim": 24,
    "vision_cfg": {"image_size": 16, "layers": 3, "width": 32, "head_width": 8, "patch_size": 8},
    "text_cfg": {"context_length": 8, "vocab_size": 50, "width": 16, "heads": 2, "layers": 1},
}
TAGS = {
    "first": {"hf_hub": "someone/tiny-clip/", "quick_gelu": True, "mean": (0.1, 0.2, 0.3)},
    "second": {"url": "https://example.org/tiny.pt", "interpolation": "bilinear"},
}


@pytest.fixture(scope="module", autouse=True)
def tiny_clip(tmp_path_factory):
    """Teach open_clip a small model with two pretrained tags, for the time of these tests."""
    file = tmp_path_factory.mktemp("configs") / "Tiny-ViT.json"
    file.write_text(json.dumps(CONFIG))
    open_clip.add_model_config(file)
    open_clip.pretrained._PRETRAINED["Tiny-ViT"] = TAGS
    yield
    del open_clip.pretrained._PRETRAINED["Tiny-ViT"]
    del open_clip.factory._MODEL_CONFIGS["Tiny-ViT"]
    open_clip.factory._MODEL_CONFIG_PATHS.remove(file)


def load(pretrained: str, checkpoints: Path | None = None, model: str = "Tiny-ViT"):
    return load_clip_encoders(model=model, pretrained=pretrained, checkpoints=checkpoints, levels=LEVELS)


def clip_state(seed: int) -> dict[str, torch.Tensor]:
    torch.manual_seed(seed)
    clip = open_clip.create_model("Tiny-ViT", pretrained=None, precision="fp32")
    return {name: tensor.detach().clone() for name, tensor in clip.state_dict().items()}


def visual(state: dict, *, first_block: int = -1) -> dict[str, torch.Tensor]:
    """The vision tower's tensors, or only those from a block on."""
    tower = {name.removeprefix("visual."): t for name, t in state.items() if name.startswith("visual.")}
    if first_block < 0:
        return tower
    kept = ("ln_post.", "proj", *(f"transformer.resblocks.{block}." for block in range(first_block, 3)))
    return {name: tensor for name, tensor in tower.items() if name.startswith(kept)}


@pytest.fixture
def base(tmp_path):
    """A whole CLIP checkpoint as a file, and its state."""
    state = {**clip_state(1), "logit_scale": torch.tensor(math.log(50.0))}
    save_file(state, tmp_path / "clip.safetensors")
    return tmp_path / "clip.safetensors", state


def test_random_weights_are_seeded_and_marked(caplog):
    first, second = load("none"), load("none")
    assert (first.pretrained, first.world, first.levels, first.trunk_layers) == ("none", "earth", LEVELS, 1)
    assert caplog.records == []
    for name, tower in first.towers.items():
        for key, tensor in tower.state_dict().items():
            assert torch.equal(tensor, second.towers[name].state_dict()[key])
    assert not torch.equal(first.towers["z04"].proj, first.towers["z06"].proj)
    assert first.towers["z04"].conv1.weight.data_ptr() == first.towers["photo"].conv1.weight.data_ptr()


def test_without_checkpoints_the_map_encoders_are_the_photo_encoder(base):
    file, state = base
    encoders = load(str(file))
    assert encoders.pretrained == "checkpoints"
    assert encoders.logit_scale == pytest.approx({"z04": 50.0, "z06": 50.0})
    for tower in encoders.towers.values():
        for key, tensor in visual(state).items():
            assert torch.equal(tower.state_dict()[key], tensor)


def test_partial_and_whole_checkpoints_make_one_set(base, tmp_path):
    file, state = base
    folder = tmp_path / "maps"
    folder.mkdir()
    tuned = visual(clip_state(2), first_block=1)
    save_file(tuned, folder / "z04.safetensors")
    whole = {
        f"visual.{name}": t for name, t in (visual(state) | visual(clip_state(3), first_block=2)).items()
    }
    torch.save({"state_dict": {**whole, "logit_scale": torch.tensor(math.log(20.0))}}, folder / "z06.pt")
    encoders = load(str(file), folder)
    assert encoders.trunk_layers == 1
    assert encoders.logit_scale == pytest.approx({"z04": 50.0, "z06": 20.0})
    z04 = encoders.towers["z04"].state_dict()
    for name, tensor in visual(state).items():
        assert torch.equal(z04[name], tuned.get(name, tensor))
    assert torch.equal(encoders.towers["z06"].proj, whole["visual.proj"])
    assert torch.equal(encoders.towers["photo"].proj, state["visual.proj"])


def test_whole_checkpoints_need_no_pretrained_weights(tmp_path):
    state = clip_state(1)
    for name in ("photo", "z04"):
        save_file(visual(state), tmp_path / f"{name}.safetensors")
    other = visual(state)
    other["transformer.resblocks.0.ln_1.bias"] += 1
    save_file(other, tmp_path / "z06.safetensors")
    assert load("first", tmp_path).trunk_layers == 0


def test_the_tag_decides_activation_and_normalisation(monkeypatch, base):
    monkeypatch.setattr(open_clip, "download_pretrained", lambda config: str(base[0]))
    encoders = load("first")
    assert encoders.pretrained == "first"
    assert type(encoders.towers["z04"].transformer.resblocks[0].mlp.gelu).__name__ == "QuickGELU"
    assert encoders.mean == (0.1, 0.2, 0.3)


@pytest.mark.parametrize(
    ("model", "pretrained", "message"),
    [
        ("ViT-B-23", "none", "unknown model 'ViT-B-23': did you mean .*ViT-B-32"),
        ("Tiny-ViT", "frist", "Tiny-ViT has no pretrained weights 'frist': did you mean first"),
        ("Tiny-ViT", "nowhere.safetensors", r"weights file nowhere\.safetensors does not exist"),
        ("Tiny-ViT", "second", "trained with interpolation 'bilinear'; only 'bicubic'"),
    ],
)
def test_unknown_names_are_answered_with_the_closest(model, pretrained, message):
    with pytest.raises(ExportError, match=message):
        load(pretrained, model=model)


def test_no_network_says_what_to_download(monkeypatch):
    def offline(config):
        raise OSError("no route to host")

    monkeypatch.setattr(open_clip, "download_pretrained", offline)
    expected = (
        r"open_clip_model.safetensors of huggingface.co/someone/tiny-clip .* pass the file as --pretrained"
    )
    with pytest.raises(ExportError, match=expected):
        load("first")


def test_bad_checkpoint_folders_are_refused(base, tmp_path):
    file, state = base
    folder = tmp_path / "maps"
    with pytest.raises(ExportError, match="maps does not exist"):
        load(str(file), folder)
    folder.mkdir()
    save_file(visual(state), folder / "z06.safetensors")
    with pytest.raises(ExportError, match=r"lacks the map encoders z04: .* such as z04\.safetensors"):
        load(str(file), folder)
    part = visual(state, first_block=1)
    save_file({**part, "proj": torch.zeros(32, 12)}, folder / "z04.safetensors")
    with pytest.raises(
        ExportError, match=r"tensor proj of .*z04.safetensors has shape \(32, 12\), expected \(32, 24\)"
    ):
        load(str(file), folder)
    save_file({name: t for name, t in part.items() if name != "ln_post.bias"}, folder / "z04.safetensors")
    with pytest.raises(ExportError, match=r"z04.safetensors lacks ln_post.bias"):
        load(str(file), folder)
    save_file(part, folder / "z04.safetensors")
    with pytest.raises(ExportError, match="hold only part of an encoder, and the rest cannot be random"):
        load("none", folder)
