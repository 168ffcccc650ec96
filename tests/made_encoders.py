"""Small vision towers, their ONNX files, and what either makes of pictures."""

import onnxruntime
import torch
from open_clip.timm_model import TimmModel
from timm.models.vision_transformer import VisionTransformer as TimmTransformer

from geoengine.engine.manifest import Variant
from geoengine.export.encoders import VisionConfig
from geoengine.export.model import Head, Trunk
from geoengine.export.onnx_graphs import write_heads, write_trunks

MEAN, STD = (0.48, 0.46, 0.41), (0.27, 0.26, 0.28)
SMALL = VisionConfig(image_size=16, patch_size=8, width=32, layers=3, heads=4, output_dim=24, quick_gelu=True)
SIGLIP = {"class_token": False, "global_pool": "map", "num_classes": 0}


def shaken(tower, seed=3):
    """The tower with all weights moved: biases and norms start at 0 and 1, which would hide mistakes."""
    torch.manual_seed(seed)
    with torch.no_grad():
        for parameter in tower.parameters():
            parameter += 0.1 * torch.randn_like(parameter)
    return tower.eval().requires_grad_(False)


def timm_tower(proj="none", **options):
    """A small vision transformer of timm's within open_clip's adapter; by default like SigLIP's."""
    tower = TimmModel("test_vit", embed_dim=24, image_size=16, pool="", proj=proj)
    sizes = {"img_size": 16, "patch_size": 8, "embed_dim": 64 if proj == "linear" else 32, "depth": 3}
    tower.trunk = TimmTransformer(**sizes, num_heads=4, **{**SIGLIP, **options})
    return tower


def write_encoder(tower, folder, *, variant=Variant.fp32, sides=(16,), blocks=1):
    """The files of a tower split after `blocks` blocks: trunks by side, and "head"."""
    trunks = {side: Trunk(tower, blocks=blocks, side=side, mean=MEAN, std=STD) for side in sides}
    head = Head(tower, trunk_layers=blocks, mean=MEAN, std=STD)
    files = write_trunks(trunks, folder, variant=variant)
    return {**files, "head": write_heads([("photo", head)], folder, variant=variant)["photo"]}


def run_graph(file, batch):
    """What a graph makes of a batch, in ONNX Runtime on the CPU."""
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = 1
    options.log_severity_level = 3
    # ONNX Runtime's layout optimiser for CPUs, on from the level above, crashes on float16 graphs.
    options.graph_optimization_level = onnxruntime.GraphOptimizationLevel.ORT_ENABLE_EXTENDED
    session = onnxruntime.InferenceSession(file, options, providers=["CPUExecutionProvider"])
    return session.run(None, {session.get_inputs()[0].name: batch})[0]


def encode(files, side, pictures):
    """The embeddings of an encoder's files, float32[n, d]."""
    return run_graph(files["head"], run_graph(files[side], pictures))


def expected(tower, pictures):
    """The unit embeddings of the tower in PyTorch, float32[n, d]."""
    mean, std = torch.tensor(MEAN)[:, None, None], torch.tensor(STD)[:, None, None]
    with torch.no_grad():
        batch = (torch.from_numpy(pictures).permute(0, 3, 1, 2) / 255 - mean) / std
        return torch.nn.functional.normalize(tower(batch), dim=-1).numpy()
