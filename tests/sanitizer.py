"""A plugin of pytest's for `make sanitize`: the tests meet the extension that was built with sanitizers."""

import importlib.util
import os
import sys

_SPEC = importlib.util.spec_from_file_location(
    "geoengine.kernels._topk_cpu", os.environ["GEOENGINE_SANITIZED"]
)
assert _SPEC is not None and _SPEC.loader is not None
_MODULE = importlib.util.module_from_spec(_SPEC)
sys.modules[_SPEC.name] = _MODULE
_SPEC.loader.exec_module(_MODULE)
