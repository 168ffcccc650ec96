"""The ONNX files of every variant: types, operators, shared weights, and agreement with open_clip."""

import numpy as np
import onnx
import pytest
import torch
from made_encoders import SMALL, encode, expected, write_encoder
from onnx import TensorProto

from geoengine.engine.errors import ExportError
from geoengine.engine.manifest import Variant
from geoengine.export.encoders import VisionConfig
from geoengine.export.pictures import sample_pictures
from geoengine.export.weight_file import WeightFile

torch.set_num_threads(1)
VARIANTS = (Variant.fp32, Variant.fp16, Variant.fp16_attention)
HALVES = (Variant.fp16, Variant.fp16_attention)
WIDE = VisionConfig(image_size=64, patch_size=32, width=768, layers=3, heads=12, output_dim=512)
OUTLIERS = {5: 20.0, 133: -40.0, 377: 60.0, 600: 100.0}  # residual channels, times the rest


def make_tower(vision, *, seed=1, half=False, outliers=False):
    """A tower with random weights; `half` rounds them to float16, as OpenAI's are."""
    torch.manual_seed(seed)
    tower = vision.build()
    with torch.no_grad():
        for channel, size in OUTLIERS.items() if outliers else ():
            tower.ln_pre.bias[channel] += size
            for block in tower.transformer.resblocks:
                block.mlp.c_proj.weight[channel] *= size
                block.attn.out_proj.weight[channel] *= size
        for parameter in tower.parameters():
            parameter.data = parameter.half().float() if half else parameter.data
    return tower


@pytest.fixture(scope="module")
def small(tmp_path_factory):
    """A small tower with weights that float16 holds, and its files by variant, all in one folder."""
    tower, folder = make_tower(SMALL, half=True), tmp_path_factory.mktemp("small")
    return tower, {
        variant: write_encoder(tower, folder, variant=variant, sides=(16, 24)) for variant in VARIANTS
    }


def lowest_cosine(tower, embeddings, pictures):
    """The lowest cosine to PyTorch in float32."""
    return (embeddings.astype(float) * expected(tower, pictures)).sum(1).min()


def types(file):
    """Per operator, the element types of its first input and of its first output, one pair a node."""
    graph = onnx.shape_inference.infer_shapes(onnx.load(file), strict_mode=True, data_prop=True).graph
    known = {v.name: v.type.tensor_type.elem_type for v in [*graph.input, *graph.value_info, *graph.output]}
    known |= {tensor.name: tensor.data_type for tensor in graph.initializer}
    found: dict[str, list] = {}
    for node in graph.node:
        found.setdefault(node.op_type, []).append((known[node.input[0]], known[node.output[0]]))
    return found


@pytest.mark.parametrize("variant", HALVES)
@pytest.mark.parametrize("part", [16, 24, "head"])
def test_products_are_half_and_norms_full(small, variant, part):
    full, half = (TensorProto.FLOAT, TensorProto.FLOAT), (TensorProto.FLOAT16, TensorProto.FLOAT16)
    found = types(small[1][variant][part])
    fused = variant is Variant.fp16_attention
    blocks = 2 if part == "head" else 1
    # a last block has one product more; the patch embedding and the projection are products too
    products = [half] * (blocks * (4 if fused else 6) + (2 if part == "head" else 1))
    assert (
        found["MatMul"] == [full] * (4 if part == 24 else 0) + products
    )  # of the resize: two patches a side
    assert found.get("Attention", []) == ([half] * blocks if fused else [])
    assert found.get("Softmax", []) == ([] if fused else [half] * blocks)
    assert set(found["Sigmoid"]) == {half}
    assert set(found["LayerNormalization"]) == {full}
    assert found.get("ReduceL2", [full]) == [full]
    graph = onnx.load(small[1][variant][part], load_external_data=False).graph
    ends = [value.type.tensor_type.elem_type for value in (*graph.input, *graph.output)]
    assert ends == [TensorProto.FLOAT if part == "head" else TensorProto.UINT8, TensorProto.FLOAT]


def test_attention_is_products_and_softmax_in_a_row(small):
    """With nothing between them, since TensorRT fuses only that."""
    for part in (16, "head"):
        nodes = onnx.load(small[1][Variant.fp16][part], load_external_data=False).graph.node
        maker = {output: node for node in nodes for output in node.output}
        for node in nodes:
            if node.op_type == "Softmax":
                (user,) = [other for other in nodes if node.output[0] in other.input]
                assert maker[node.input[0]].op_type == user.op_type == "MatMul"


@pytest.mark.parametrize("variant", VARIANTS)
@pytest.mark.parametrize("count", [1, 2, 7, 33, 4096])
def test_every_variant_agrees_with_open_clip_at_any_batch(small, variant, count):
    tower, files = small
    pictures = sample_pictures(16, min(count, 64), seed=count).repeat(-(-count // 64), 0)[:count]
    embeddings = encode(files[variant], 16, pictures)
    assert embeddings.shape == (count, 24)
    assert lowest_cosine(tower, embeddings, pictures) > (0.999999 if variant is Variant.fp32 else 0.9999)


@pytest.mark.parametrize("outliers", [False, True])
def test_half_precision_at_the_width_of_clip(tmp_path, outliers):
    """As wide as ViT-B, where rounding adds up over 768 and 3072 products, and with outlier channels."""
    tower = make_tower(WIDE, outliers=outliers)
    pictures = sample_pictures(64, 8)
    embeddings = encode(write_encoder(tower, tmp_path, variant=Variant.fp16, sides=(64,)), 64, pictures)
    assert lowest_cosine(tower, embeddings, pictures) > 0.99999


def test_pixels_lose_nothing_in_half_precision(small):
    """The patch embedding's float16 weights are normal numbers, and its pixels exact."""
    graph = onnx.load(small[1][Variant.fp16][16]).graph
    (weights,) = [onnx.numpy_helper.to_array(t) for t in graph.initializer if t.name == "w_patch"]
    assert weights.dtype == np.float16
    assert (abs(weights) < np.finfo(np.float16).tiny).mean() < 0.01
    every = torch.arange(256, dtype=torch.float32)
    assert torch.equal(((every.half() - 128) * (1 / 64)).float() * 64 + 128, every)


def test_variants_share_one_weight_file(small):
    files = small[1]
    folder = files[Variant.fp32]["head"].parent
    assert {file.name for file in folder.glob("*.weights")} == {"trunk.weights", "head_photo.weights"}
    for part in (16, 24, "head"):
        places = []
        for variant in VARIANTS:
            graph = onnx.load(files[variant][part], load_external_data=False).graph
            places.append(
                {
                    tensor.name.removesuffix(".half"): [(e.key, e.value) for e in tensor.external_data]
                    for tensor in graph.initializer
                    if tensor.external_data
                }
            )
        full, half, attention = places
        assert half == attention
        differ = {name.split(".")[-1] for name in half if name in full and full[name] != half[name]}
        assert differ <= {"w_patch", "w_qkv", "w_q"}  # those with a factor folded in
        same = {name.split(".")[-1] for name in half if full.get(name) == half[name]}
        assert same >= {"w_out", "w_up", "w_down"}
    before = {file.name: file.read_bytes() for file in folder.iterdir()}
    write_encoder(small[0], folder, variant=Variant.fp16, sides=(16, 24))
    assert {file.name: file.read_bytes() for file in folder.iterdir()} == before


def test_weights_that_half_cannot_hold_stay_full(tmp_path):
    tower = make_tower(SMALL)
    graph = onnx.load(write_encoder(tower, tmp_path)["head"]).graph
    stored = {t.name: onnx.numpy_helper.to_array(t) for t in graph.initializer}
    assert not {name for name, array in stored.items() if array.dtype == np.float16}
    block = tower.transformer.resblocks[2]
    np.testing.assert_array_equal(stored["blocks.2.w_up"], block.mlp.c_fc.weight.detach().T)
    np.testing.assert_array_equal(stored["blocks.2.b_down"], block.mlp.c_proj.bias.detach())


def test_a_weight_file_drops_what_no_graph_uses(small, tmp_path):
    write_encoder(small[0], tmp_path, variant=Variant.fp16, sides=(16,))
    whole = (tmp_path / "trunk.weights").read_bytes()
    with (tmp_path / "trunk.weights").open("ab") as stream:
        stream.write(b"left by an interrupted build")
    WeightFile(tmp_path / "trunk.weights")
    assert (tmp_path / "trunk.weights").read_bytes() == whole


@pytest.mark.parametrize(("block", "name"), [(0, "blocks.0.w_up"), (2, "blocks.2.w_up")])
def test_weights_beyond_half_are_refused_by_name(tmp_path, block, name):
    tower = make_tower(SMALL)
    with torch.no_grad():
        tower.transformer.resblocks[block].mlp.c_fc.weight[3, 4] = -7e4
    expected = rf"the weight {name} .* float16: its largest value is 7e\+04.* build with --precision fp32"
    with pytest.raises(ExportError, match=expected):
        write_encoder(tower, tmp_path, variant=Variant.fp16, sides=(16,))
    write_encoder(tower, tmp_path, variant=Variant.fp32, sides=(16,))
