"""CLIP models by name, tag and file, and folders of fine-tuned map encoders."""

import json
import math
from pathlib import Path

import open_clip
import pytest
import torch
from made_encoders import run_graph
from safetensors.torch import save_file

from geoengine.engine.errors import ExportError
from geoengine.engine.manifest import Variant
from geoengine.export.checkpoints import load_clip_encoders
from geoengine.export.onnx_graphs import write_heads, write_trunks
from geoengine.export.pictures import sample_pictures
from geoengine.export.reference import reference_embeddings

torch.set_num_threads(1)
LEVELS = (4, 6)
CONFIG = {
    "embed_dim": 24,
    "vision_cfg": {"image_size": 16, "layers": 3, "width": 32, "head_width": 8, "patch_size": 8},
    "text_cfg": {"context_length": 8, "vocab_size": 50, "width": 16, "heads": 2, "layers": 1},
}
SIGLIP = {
    "embed_dim": 96,
    "init_logit_bias": -10,
    "custom_text": True,
    "vision_cfg": {
        "image_size": 160,
        "timm_model_name": "test_vit3",  # timm's own small model; without class token, attention pooling
        "timm_model_pretrained": False,
        "timm_pool": "map",
        "timm_proj": "none",
    },
    "text_cfg": CONFIG["text_cfg"],
}
RESNET = {**CONFIG, "vision_cfg": {"image_size": 32, "layers": [1, 1, 1, 1], "width": 8, "patch_size": None}}
TAGS = {
    "first": {"hf_hub": "someone/tiny-clip/", "quick_gelu": True, "mean": (0.1, 0.2, 0.3)},
    "second": {"url": "https://example.org/tiny.pt", "interpolation": "bilinear"},
}

_HALF = {"mean": (0.5, 0.5, 0.5), "std": (0.5, 0.5, 0.5), "interpolation": "bicubic"}
SIGLIP_TAGS = {
    "webli": {"hf_hub": "someone/siglip/", "resize_mode": "squash", **_HALF},
    "padded": {"hf_hub": "someone/padded/", "resize_mode": "longest", **_HALF},
}


@pytest.fixture(scope="module", autouse=True)
def tiny_clip(tmp_path_factory):
    """Teach open_clip small models, some with pretrained tags, for the time of these tests."""
    folder = tmp_path_factory.mktemp("configs")
    models = {"Tiny-ViT": CONFIG, "Tiny-SigLIP": SIGLIP, "Tiny-RN": RESNET}
    for name, config in models.items():
        (folder / f"{name}.json").write_text(json.dumps(config))
        open_clip.add_model_config(folder / f"{name}.json")
    tags = {"Tiny-ViT": TAGS, "Tiny-SigLIP": SIGLIP_TAGS}
    open_clip.pretrained._PRETRAINED.update(tags)
    yield
    for name in models:
        open_clip.pretrained._PRETRAINED.pop(name, None)
        del open_clip.factory._MODEL_CONFIGS[name]
        open_clip.factory._MODEL_CONFIG_PATHS.remove(folder / f"{name}.json")


def load(pretrained: str, checkpoints: Path | None = None, model: str = "Tiny-ViT"):
    return load_clip_encoders(model=model, pretrained=pretrained, checkpoints=checkpoints, levels=LEVELS)


def clip_state(seed: int, model: str = "Tiny-ViT") -> dict[str, torch.Tensor]:
    torch.manual_seed(seed)
    clip = open_clip.create_model(model, pretrained=None, precision="fp32")
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
        r"open_clip_model.safetensors .* of huggingface.co/someone/tiny-clip .* pass the file as --pretrained"
    )
    with pytest.raises(ExportError, match=expected):
        load("first")


def test_siglip_from_a_file_and_partial_checkpoints(tmp_path):
    state, tuned = clip_state(1, "Tiny-SigLIP"), clip_state(2, "Tiny-SigLIP")
    save_file({**state, "logit_scale": torch.tensor(math.log(110.0))}, tmp_path / "siglip.safetensors")
    last = (
        "visual.trunk.blocks.7.",
        "visual.trunk.blocks.8.",
        "visual.trunk.norm.",
        "visual.trunk.attn_pool.",
    )
    part = {name.removeprefix("visual."): t for name, t in tuned.items() if name.startswith(last)}
    (tmp_path / "maps").mkdir()
    for name in ("z04", "z06"):
        save_file(part, tmp_path / "maps" / f"{name}.safetensors")
    encoders = load(str(tmp_path / "siglip.safetensors"), tmp_path / "maps", "Tiny-SigLIP")
    assert (encoders.trunk_layers, encoders.image_size, encoders.embed_dim) == (7, 160, 96)
    assert encoders.mean == encoders.std == (0.5, 0.5, 0.5)  # the tags agree on it
    assert encoders.resize_mode == "shortest"  # and do not agree on this
    assert encoders.logit_scale == pytest.approx({"z04": 110.0, "z06": 110.0})
    z04 = encoders.towers["z04"].state_dict()
    for name, tensor in visual(state).items():
        assert torch.equal(z04[name], part.get(name, tensor))
    save_file(
        {**part, "trunk.attn_pool.latent": torch.zeros(1, 2, 96)}, tmp_path / "maps" / "z06.safetensors"
    )
    with pytest.raises(ExportError, match=r"trunk.attn_pool.latent of .*\(1, 2, 96\), expected \(1, 1, 96\)"):
        load(str(tmp_path / "siglip.safetensors"), tmp_path / "maps", "Tiny-SigLIP")


def test_resize_modes(monkeypatch, tmp_path):
    save_file(clip_state(1, "Tiny-SigLIP"), tmp_path / "siglip.safetensors")
    monkeypatch.setattr(open_clip, "download_pretrained", lambda config: str(tmp_path / "siglip.safetensors"))
    assert load("webli", model="Tiny-SigLIP").resize_mode == "squash"
    with pytest.raises(ExportError, match="resize_mode 'longest'; only 'shortest' and 'squash'"):
        load("padded", model="Tiny-SigLIP")


def test_models_that_are_no_vision_transformers_are_refused():
    with pytest.raises(ExportError, match="type ModifiedResNet cannot be exported, only vision transformers"):
        load("none", model="Tiny-RN")


def test_encoders_with_patch_embeddings_of_their_own_share_nothing(base, tmp_path):
    (tmp_path / "maps").mkdir()
    for seed, name in enumerate(("z04", "z06")):
        save_file(visual(clip_state(seed + 5)), tmp_path / "maps" / f"{name}.safetensors")
    encoders = load(str(base[0]), tmp_path / "maps")
    assert encoders.trunk_layers is None
    pictures = sample_pictures(24, 4)
    (trunk,) = write_trunks({24: encoders.trunk(24)}, tmp_path, variant=Variant.fp32).values()
    heads = ((name, encoders.head(name)) for name in encoders.towers)
    for name, file in write_heads(heads, tmp_path, variant=Variant.fp32).items():
        found = run_graph(file, run_graph(trunk, pictures))
        assert (found * reference_embeddings(encoders, name, pictures)).sum(1).min() > 0.9999


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
