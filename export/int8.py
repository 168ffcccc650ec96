"""The int8 variant: trunks and heads whose matrix products are 8-bit, for CPUs.

It is made from the fp32 graphs and calibration pictures. Layer normalisations, attention, activations and the
residual stream stay float32. All scales are fixed here, none depends on what is in a batch; so an
embedding does not depend on its batch, and the integer sums make it the same, bit for bit.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnx_ir as ir
from numpy.typing import NDArray

from geoengine.engine.backends.sessions import load_onnxruntime
from geoengine.engine.cores import available_cores
from geoengine.engine.errors import ExportError
from geoengine.engine.manifest import Variant
from geoengine.export.int8_graph import PATCH_WEIGHT, Site, find_sites, remove_unused, rewrite, weight_of
from geoengine.export.int8_scales import (
    InputScale,
    Observed,
    Product,
    choose_scale,
    pixel_scale,
    quantize,
)
from geoengine.export.onnx_graphs import save_graph
from geoengine.export.weight_file import WeightFile

_BATCH = 2  # pictures observed at once; bounds the memory for all the products' inputs


def quantize_graphs(
    trunks: Mapping[int, Path],
    heads: Mapping[str, Path],
    folder: Path,
    pictures: NDArray[np.uint8],
    *,
    smooth: bool = True,
) -> tuple[dict[int, Path], dict[str, Path]]:
    """Write the int8 graphs of fp32 `trunks`, by side, and `heads`, by encoder; return their paths likewise.

    The files are `trunk.<side>.int8.onnx` and `head_<encoder>.int8.onnx` in `folder`, with their weights in
    `trunk.weights` and `head_<encoder>.weights`. `pictures`, uint8[n, S, S, 3], calibrate; S must be one of
    the sides, and all trunks must hold the same weights. A head is calibrated on the trunk's tokens of them.
    `smooth=False` leaves all channels at one scale, for comparison. Raises ExportError for graphs of another
    form, and for pictures that do not fit.
    """
    side = pictures.shape[1] if pictures.ndim == 4 else 0
    fits = pictures.dtype == np.uint8 and pictures.shape[1:] == (side, side, 3) and len(pictures) > 0
    if side not in trunks or not fits:
        raise ExportError(
            f"calibration needs pictures uint8 (n, S, S, 3) with S one of {sorted(trunks)}, "
            f"got {pictures.dtype} {pictures.shape}"
        )
    scales, products, tokens = _calibrate(trunks[side], pictures, smooth)
    weights = WeightFile(folder / "trunk.weights")
    made_trunks = {}
    for other, path in trunks.items():
        made_trunks[other] = folder / f"trunk.{other}.{Variant.int8}.onnx"
        _write(path, made_trunks[other], weights, scales, products)
    made_heads = {}
    for encoder, path in heads.items():
        scales, products, _ = _calibrate(path, tokens, smooth)
        made_heads[encoder] = folder / f"head_{encoder}.{Variant.int8}.onnx"
        _write(path, made_heads[encoder], WeightFile(folder / f"head_{encoder}.weights"), scales, products)
    return made_trunks, made_heads


def _calibrate(
    path: Path, samples: NDArray[Any], smooth: bool
) -> tuple[dict[str, InputScale], dict[str, Product], NDArray[np.float32]]:
    """Return scales by the weight that they go before, products by weight, and the graph's results."""
    model = ir.load(path)
    sites = find_sites(model.graph)
    observed, results = _observe(path, sites, samples)
    groups: dict[str, list[Site]] = {}
    for site in sites:
        groups.setdefault(site.group, []).append(site)
    scales: dict[str, InputScale] = {}
    products: dict[str, Product] = {}
    for members in groups.values():
        weights = [weight_of(site) for site in members]
        if members[0].weight == PATCH_WEIGHT:
            scale = pixel_scale(len(weights[0]))
        else:
            scale = choose_scale([observed[site.input] for site in members], weights, smooth=smooth)
        for site, weight in zip(members, weights, strict=True):
            scales[site.weight] = scale
            products[site.weight] = quantize(scale, weight, observed[site.input])
    return scales, products, results


def _observe(
    path: Path, sites: list[Site], samples: NDArray[Any]
) -> tuple[dict[str, Observed], NDArray[np.float32]]:
    """Run an fp32 graph on samples; return what the sites' inputs hold, by name, and the graph's results."""
    ort = load_onnxruntime()
    proto = onnx.load(path, load_external_data=False)
    result = proto.graph.output[0].name
    names = list(dict.fromkeys(site.input for site in sites))
    proto.graph.output.extend(
        onnx.helper.make_tensor_value_info(name, onnx.TensorProto.FLOAT, None) for name in names
    )
    options = ort.SessionOptions()
    options.intra_op_num_threads = available_cores()
    options.log_severity_level = 3
    options.add_session_config_entry("session.intra_op.allow_spinning", "0")
    options.add_session_config_entry(
        "session.model_external_initializers_file_folder_path", str(path.parent.absolute())
    )
    session = ort.InferenceSession(
        proto.SerializeToString(),
        options,
        providers=["CPUExecutionProvider"],
        disabled_optimizers=["NchwcTransformer"],  # crashes on weights stored in float16 (ONNX Runtime 1.31)
    )
    observed = {name: Observed() for name in names}
    results = []
    for start in range(0, len(samples), _BATCH):
        batch = samples[start : start + _BATCH]
        first, *values = session.run([result, *names], {session.get_inputs()[0].name: batch})
        results.append(first)
        for name, value in zip(names, values, strict=True):
            observed[name].add(value, len(batch) / len(samples))
    return observed, np.concatenate(results)


def _write(
    source: Path,
    target: Path,
    weights: WeightFile,
    scales: Mapping[str, InputScale],
    products: Mapping[str, Product],
) -> None:
    model = ir.load(source)
    sites = find_sites(model.graph)
    rewrite(model.graph, sites, {site.group: scales[site.weight] for site in sites}, products)
    remove_unused(model)
    save_graph(model, weights, target)
