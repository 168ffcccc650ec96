"""`geoengine.export.plan_builder` with TensorRT and CUDA replaced; writes the names used to `TRT_USED`."""

import json
import os
import sys
from pathlib import Path

import tensorrt_bindings
from trt_contract.contract import Contract
from trt_contract.cudart import Emulated
from trt_contract.pretend import Pretend

from geoengine.engine.backends import cuda
from geoengine.export import plan_builder

contract, emulated = Contract(tensorrt_bindings), Emulated()
sys.modules["tensorrt"] = Pretend(contract, emulated).module()
cuda.cuda_runtime = lambda: emulated
status = plan_builder.main()
Path(os.environ["TRT_USED"]).write_text(json.dumps(sorted(contract.used)))
sys.exit(status)
