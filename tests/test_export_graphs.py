"""The ONNX files of every variant: types, operators, shared weights, and agreement with open_clip."""

import onnx
import onnxruntime
import pytest
import torch
from onnx import TensorProto

from geoengine.engine.errors import ExportError
from geoengine.engine.manifest import Variant
from geoengine.export.encoders import VisionConfig
from geoengine.export.model import Head, Trunk, in_variant
from geoengine.export.onnx_graphs import write_heads, write_trunks
from geoengine.export.pictures import sample_pictures
from geoengine.export.weight_file import WeightFile

torch.set_num_threads(1)
MEAN, STD = (0.48, 0.46, 0.41), (0.27, 0.26, 0.28)
VARIANTS = (Variant.fp32, Variant.fp16, Variant.fp16_attention)
HALVES = (Variant.fp16, Variant.fp16_attention)
SMALL = VisionConfig(image_size=16, patch_size=8, width=64, layers=3, heads=4, output_dim=24, quick_gelu=True)
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


def write(tower, folder, variant, sides, blocks=1):
    """The files of a tower split after `blocks` blocks: trunks by side, and "head"."""
    trunks = {side: Trunk(tower, blocks=blocks, side=side, mean=MEAN, std=STD) for side in sides}
    files = write_trunks(trunks, folder, variant=variant)
    head = write_heads([("photo", Head(tower, trunk_layers=blocks))], folder, variant=variant)
    return {**files, "head": head["photo"]}


@pytest.fixture(scope="module")
def small(tmp_path_factory):
    """A small tower with weights that float16 holds, and its files by variant, all in one folder."""
    tower, folder = make_tower(SMALL, half=True), tmp_path_factory.mktemp("small")
    return tower, {variant: write(tower, folder, variant, (16, 24)) for variant in VARIANTS}


def encode(files, pictures, side):
    """The embeddings that the files give, float32[n, d]."""
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = 1
    options.log_severity_level = 3
    # ONNX Runtime's layout optimiser for CPUs, on from the level above, crashes on float16 graphs.
    options.graph_optimization_level = onnxruntime.GraphOptimizationLevel.ORT_ENABLE_EXTENDED
    for file in (files[side], files["head"]):
        session = onnxruntime.InferenceSession(file, options, providers=["CPUExecutionProvider"])
        (pictures,) = session.run(None, {session.get_inputs()[0].name: pictures})
    return pictures


def cosines(tower, embeddings, pictures):
    """Cosines to open_clip's tower in float32, float64[n]."""
    mean, std = torch.tensor(MEAN)[:, None, None], torch.tensor(STD)[:, None, None]
    with torch.no_grad():
        expected = tower((torch.from_numpy(pictures).permute(0, 3, 1, 2) / 255 - mean) / std)
    return torch.nn.functional.cosine_similarity(torch.from_numpy(embeddings).double(), expected.double())


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
    assert found["MatMul"] == [full] * (2 if part == 24 else 0) + products
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
    embeddings = encode(files[variant], pictures, 16)
    assert embeddings.shape == (count, 24)
    assert cosines(tower, embeddings, pictures).min() > (0.9999999 if variant is Variant.fp32 else 0.9999)


@pytest.mark.parametrize("outliers", [False, True])
def test_half_precision_at_the_width_of_clip(tmp_path, outliers):
    """As wide as ViT-B, where rounding adds up over 768 and 3072 products, and with outlier channels."""
    tower = make_tower(WIDE, outliers=outliers)
    pictures = sample_pictures(64, 8)
    embeddings = encode(write(tower, tmp_path, Variant.fp16, (64,)), pictures, 64)
    assert cosines(tower, embeddings, pictures).min() > 0.99999


def test_pixels_lose_nothing_in_half_precision(small):
    """The patch embedding's float16 weights are normal numbers, and its pixels exact."""
    trunk = in_variant(Trunk(small[0], blocks=0, side=16, mean=MEAN, std=STD), Variant.fp16)
    weights = trunk.w_patch.float().abs()
    assert trunk.w_patch.dtype == torch.float16
    assert (weights < torch.finfo(torch.float16).tiny).float().mean() < 0.01
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
        stem = part == "head" or "w_patch"
        assert {name for name in half if name in full and full[name] != half[name]} <= {
            stem, "blocks.0.w_qkv", "blocks.1.w_q", "projection",
        }  # fmt: skip
        for name in ("blocks.0.w_out", "blocks.0.w_up", "blocks.0.w_down"):
            assert full[name] == half[name]
    before = {file.name: file.read_bytes() for file in folder.iterdir()}
    write(small[0], folder, Variant.fp16, (16, 24))
    assert {file.name: file.read_bytes() for file in folder.iterdir()} == before


def test_a_weight_file_drops_what_no_graph_uses(small, tmp_path):
    write(small[0], tmp_path, Variant.fp16, (16,))
    whole = (tmp_path / "trunk.weights").read_bytes()
    with (tmp_path / "trunk.weights").open("ab") as stream:
        stream.write(b"left by an interrupted build")
    WeightFile(tmp_path / "trunk.weights")
    assert (tmp_path / "trunk.weights").read_bytes() == whole


@pytest.mark.parametrize(("block", "name"), [(0, "blocks.0.w_up"), (1, "blocks.0.w_up")])
def test_weights_beyond_half_are_refused_by_name(tmp_path, block, name):
    tower = make_tower(SMALL)
    with torch.no_grad():
        tower.transformer.resblocks[block].mlp.c_fc.weight[3, 4] = -7e4
    expected = rf"the weight {name} .* float16: its largest value is 7e\+04.* build with --precision fp32"
    with pytest.raises(ExportError, match=expected):
        write(tower, tmp_path, Variant.fp16, (16,))
    write(tower, tmp_path, Variant.fp32, (16,))
