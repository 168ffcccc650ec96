"""What decodes tiles here, and how to get the other one."""

from __future__ import annotations

import os

from geoengine.engine.doctor import gpu
from geoengine.engine.doctor.finding import Finding, State
from geoengine.engine.errors import SourceError
from geoengine.engine.sources.decoders import (
    EXTRA,
    NVIMGCODEC,
    OPENCV,
    VARIABLE,
    choose_decoder,
    is_installed,
)

_TOPIC = "Tile decoder"


def findings() -> list[Finding]:
    """Choose what decodes tiles as a search would; on a GPU machine that measures."""
    has_gpu = bool(gpu.cuda_devices())
    try:
        decoder, reason = choose_decoder(gpu=has_gpu)
    except SourceError as error:
        remedy = EXTRA if has_gpu and not is_installed() else f"unset {VARIABLE}"
        return [Finding(topic=_TOPIC, state=State.BROKEN, detail=str(error), remedy=remedy)]
    detail = f"{decoder.name}: {reason}"
    if has_gpu and not is_installed() and not os.environ.get(VARIABLE):
        return [Finding(topic=_TOPIC, state=State.ABSENT, detail=detail, remedy=EXTRA)]
    if has_gpu and is_installed():
        other = OPENCV if decoder.batch > 1 else NVIMGCODEC
        detail += f"; {VARIABLE}={other} takes the other one"
    return [Finding(topic=_TOPIC, state=State.OK, detail=detail)]
