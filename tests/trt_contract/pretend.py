"""TensorRT as far as our code can see it: what the fakes of `contract` do when they are called.

A plan is JSON. Running one computes something simple of every picture, so that a row that comes from the
wrong memory, or too early, is seen. `TRT_TROUBLE`, JSON from a graph's stem to a word, makes things fail.
"""

import json
import os
import signal
import threading
import time
from pathlib import Path
from types import SimpleNamespace

import numpy as np
from trt_contract.cudart import array_at

TOKENS, WIDTH, EMBED_DIM = 5, 12, 6
SCRATCH_BYTES = 1000


def tokens_of(pixels):
    """uint8[n, S, S, 3] -> float32[n, TOKENS, WIDTH]."""
    flat = pixels.reshape(len(pixels), int(np.prod(pixels.shape[1:]))).astype(np.float32) / 255
    sums = [flat[:, start :: TOKENS * WIDTH].sum(axis=1) for start in range(TOKENS * WIDTH)]
    return np.stack(sums, axis=1).reshape(-1, TOKENS, WIDTH)


def embeddings_of(stem, tokens):
    """float32[n, TOKENS, WIDTH] -> unit float32[n, EMBED_DIM], another one for every head."""
    seed = int.from_bytes(stem.encode(), "little") % (1 << 32)
    matrix = np.random.default_rng(seed).normal(size=(TOKENS * WIDTH, EMBED_DIM)).astype(np.float32)
    rows = tokens.reshape(len(tokens), TOKENS * WIDTH) @ matrix
    return rows / np.linalg.norm(rows, axis=1, keepdims=True)


class Pretend:
    """Behaviours for `Contract.module`; `cudart` is an `Emulated`, `trouble` maps graphs to what fails."""

    def __init__(self, contract, cudart):
        self.contract, self.trt, self.cudart = contract, contract.trt, cudart
        self.trouble = json.loads(os.environ.get("TRT_TROUBLE", "{}"))
        self.caches = []  # what timing caches were made from
        self.captured = 0
        self.executed = []  # batches, in order
        self.contexts = []

    def module(self):
        return self.contract.module(
            {
                "Builder": lambda logger: Builder(self, logger),
                "OnnxParser": lambda network, logger: Parser(self, network, logger),
                "Runtime": lambda logger: SimpleNamespace(
                    deserialize_cuda_engine=lambda data: self.engine(data, logger)
                ),
            }
        )

    def engine(self, data, logger):
        try:
            plan = json.loads(bytes(data))
        except ValueError:
            logger.log(self.trt.ILogger.ERROR, "Error Code 1: the plan is\nfor another device")
            return None
        return self.contract.fake("ICudaEngine", Engine(self, plan))


class Builder:
    def __init__(self, pretend, logger):
        self.pretend, self.logger = pretend, logger

    def create_network(self, flags):
        typed = int(self.pretend.trt.NetworkDefinitionCreationFlag.STRONGLY_TYPED)
        assert flags == 1 << typed, "the network must be strongly typed"
        self.network = Network(self.pretend)
        return self.pretend.contract.fake("INetworkDefinition", self.network)

    def create_builder_config(self):
        self.config = Config(self.pretend)
        return self.pretend.contract.fake("IBuilderConfig", self.config)

    def create_optimization_profile(self):
        profile = SimpleNamespace()
        profile.set_shape = lambda name, low, best, high: vars(profile).update(shapes=(low, best, high))
        return self.pretend.contract.fake("IOptimizationProfile", profile)

    def build_serialized_network(self, network, config):
        stem = self.network.stem
        trouble = self.pretend.trouble.get(stem, "")
        if trouble == "crash":
            os.kill(os.getpid(), signal.SIGSEGV)
        if trouble == "build":
            words = "Error Code 10: Internal Error (Could not find any implementation for node blk.3)"
            self.logger.log(self.pretend.trt.ILogger.INTERNAL_ERROR, words)
            return None
        if not self._phases(endless=trouble == "endless"):
            return None
        return json.dumps(
            {
                "stem": stem,
                "input": self.network.source.name,
                "output": self.network.result.name,
                "tails": [self.network.source.tail, self.network.result.tail],
                "profiles": [[shape[0] for shape in shapes] for shapes in self.config.profiles],
                "trouble": trouble,
            }
        ).encode()

    def _phases(self, endless):
        """Report nested phases, the inner one from another thread; False when told to stop."""
        monitor = self.config.progress_monitor
        going = [True]
        monitor.phase_start("Building", None, 2)
        for step in range(2):
            monitor.phase_start("Timing", "Building", 3)

            def time_kernels(until=None if endless else 3):
                done = 0
                while going[0] and done != until:
                    going[0] = monitor.step_complete("Timing", min(done, 2))
                    done += 1
                    time.sleep(0.01 if endless else 0)

            timer = threading.Thread(target=time_kernels)
            timer.start()
            timer.join()
            monitor.phase_finish("Timing")
            if not going[0] or not monitor.step_complete("Building", step):
                return False
        monitor.phase_finish("Building")
        return True


class Config:
    def __init__(self, pretend):
        self.pretend, self.profiles, self.flags_on, self.cache = pretend, [], {}, None

    def set_flag(self, flag):
        self.flags_on[flag] = True

    def clear_flag(self, flag):
        self.flags_on[flag] = False

    def add_optimization_profile(self, profile):
        self.profiles.append(profile._behaviour.shapes)
        return len(self.profiles) - 1

    def create_timing_cache(self, content):
        self.pretend.caches.append(bytes(content))
        serialized = bytes(content) or b"timings"
        return self.pretend.contract.fake("ITimingCache", SimpleNamespace(serialize=lambda: serialized))

    def set_timing_cache(self, cache, ignore_mismatch):
        self.cache = cache
        return cache.serialize() != b"of another GPU"

    def get_timing_cache(self):
        return self.cache


class Network:
    def __init__(self, pretend):
        self.pretend = pretend

    def read(self, path):
        """Take the graph's kind from its name: `trunk.<side>…` or `head_<encoder>…`."""
        trt, fake = self.pretend.trt, self.pretend.contract.fake
        self.stem = Path(path).name.split(".fp")[0]
        tokens = ("tokens", (TOKENS, WIDTH), trt.float32)
        if self.stem.startswith("trunk"):
            side = int(self.stem.split(".")[1])
            ends = ("pixels", (side, side, 3), trt.uint8), tokens
        else:
            ends = tokens, ("embedding", (EMBED_DIM,), trt.float32)
        self.source, self.result = (Tensor(trt, *end) for end in ends)
        wrong = self.pretend.trouble.get(self.stem) == "fp32"
        kinds = [
            ("norm", trt.LayerType.NORMALIZATION, trt.float32),
            ("blk.3.wo", trt.LayerType.MATRIX_MULTIPLY, trt.float32 if wrong else trt.float16),
            ("blk.3.w1", trt.LayerType.MATRIX_MULTIPLY, trt.float16),
        ]
        if self.stem == "trunk.16":
            kinds.append(("resize", trt.LayerType.MATRIX_MULTIPLY, trt.float32))
        self.layers = [fake("ILayer", Layer(self.pretend, *kind)) for kind in kinds]
        self.num_layers = len(self.layers)

    def get_layer(self, index):
        return self.layers[index]

    def get_input(self, index):
        return self.pretend.contract.fake("ITensor", self.source)

    def get_output(self, index):
        return self.pretend.contract.fake("ITensor", self.result)


class Tensor:
    def __init__(self, trt, name, tail, dtype):
        self.name, self.tail, self.dtype, self.shape = name, tail, dtype, trt.Dims((-1, *tail))


class Layer:
    def __init__(self, pretend, name, kind, dtype):
        self.pretend, self.name, self.type, self.dtype = pretend, name, kind, dtype

    def get_output(self, index):
        return self.pretend.contract.fake("ITensor", SimpleNamespace(dtype=self.dtype))


class Parser:
    def __init__(self, pretend, network, logger):
        self.pretend, self.network, self.num_errors = pretend, network._behaviour, 0

    def parse_from_file(self, path):
        assert Path(path).is_file()
        self.network.read(path)
        self.num_errors = 2 if self.pretend.trouble.get(self.network.stem) == "parse" else 0
        return not self.num_errors

    def get_error(self, index):
        error = SimpleNamespace(
            node_name=lambda: f"blk.{index}.attention",
            node_operator=lambda: "MatMul",
            desc=lambda: "Assertion failed: types differ",
        )
        return self.pretend.contract.fake("ParserError", error)


class Engine:
    def __init__(self, pretend, plan):
        self.pretend, self.plan, self.num_io_tensors = pretend, plan, 2
        self.device_memory_size_v2 = SCRATCH_BYTES
        self.num_optimization_profiles = len(plan["profiles"])

    def get_tensor_name(self, index):
        return [self.plan["output"], self.plan["input"]][index]

    def get_tensor_mode(self, name):
        mode = self.pretend.trt.TensorIOMode
        return mode.INPUT if name == self.plan["input"] else mode.OUTPUT

    def get_tensor_dtype(self, name):
        return self.pretend.trt.uint8 if name == "pixels" else self.pretend.trt.float32

    def get_tensor_shape(self, name):
        return self.pretend.trt.Dims((-1, *self.plan["tails"][name == self.plan["output"]]))

    def get_tensor_profile_shape(self, name, index):
        dims = self.pretend.trt.Dims
        return [dims((batch, *self.plan["tails"][0])) for batch in self.plan["profiles"][index]]

    def create_execution_context(self, strategy):
        assert strategy == self.pretend.trt.ExecutionContextAllocationStrategy.USER_MANAGED
        self.pretend.contexts.append(Context(self.pretend, self.plan))
        return self.pretend.contract.fake("IExecutionContext", self.pretend.contexts[-1])

    def create_engine_inspector(self):
        inspector = SimpleNamespace(get_engine_information=lambda format: self._layers())
        return self.pretend.contract.fake("EngineInspector", inspector)

    def _layers(self):
        exact = {"Inputs": [{"Name": "x", "Format/Datatype": "Float", "Datatype": "Float"}]}
        kind = "Float" if self.plan["trouble"] == "fp32 kernel" else "Half"
        kernel = (
            "sm80_xmma_gemm_f32f32_tf32f32_f32" if kind == "Float" else "sm80_xmma_gemm_f16f16_f16f32_f16"
        )
        tensor = {"Name": "x", "Dimensions": [-1, 5, 12]}
        if int(self.pretend.trt.__version__.split(".")[0]) < 11:
            tensor["Format/Datatype"] = kind
        else:
            tensor |= {"Format": "Row major linear", "Datatype": kind}
        both = {"Inputs": [tensor], "Outputs": [tensor]}
        layers = [
            {"Name": "blk.3.wo_myl0_7", "LayerType": "gemm", "TacticName": kernel, **both},
            {"Name": "__mye_12", "LayerType": "kgen", "TacticName": "_gemm_mha_v2_0x5", **both},
            {"Name": "norm", "LayerType": "kgen", "TacticName": "__myl_MeanSubMul", **both},
        ]
        if self.plan["stem"] == "trunk.16":
            layers.append({"Name": "resize_myl0_1", "LayerType": "gemm", "TacticName": "sgemm", **exact})
        return json.dumps({"Layers": layers, "I/O Tensors": []})


class Context:
    """Refuses to be touched after a graph was captured from it, which TensorRT leaves undefined."""

    def __init__(self, pretend, plan):
        self.pretend, self.plan = pretend, plan
        self.profile = self.scratch = self.shape = None
        self.addresses = {}
        self.frozen = False

    def set_optimization_profile_async(self, profile_index, stream_handle):
        assert stream_handle in self.pretend.cudart.streams
        self.profile = self.plan["profiles"][profile_index]
        return True

    def set_device_memory(self, memory, size):
        assert size >= SCRATCH_BYTES and memory % 256 == 0
        self.pretend.cudart.check(memory, size)
        self.scratch = memory

    def set_input_shape(self, name, shape):
        assert not self.frozen, "a context whose graph was captured must be left alone"
        low, _, high = self.profile
        self.shape = tuple(shape)
        return (
            name == self.plan["input"] and low <= shape[0] <= high and [*shape[1:]] == self.plan["tails"][0]
        )

    def set_tensor_address(self, name, memory):
        self.addresses[name] = memory
        return name in (self.plan["input"], self.plan["output"])

    def execute_async_v3(self, stream_handle):
        cudart = self.pretend.cudart
        if stream_handle in cudart.capturing:
            if self.pretend.trouble.get(self.plan["stem"]) == "no capture":
                return False
            self.frozen = True
            self.pretend.captured += 1
        assert self.scratch is not None
        source, target = self.addresses[self.plan["input"]], self.addresses[self.plan["output"]]
        count = self.shape[0]
        cudart.enqueue(stream_handle, lambda: self._compute(count, source, target))
        return True

    def _compute(self, count, source, target):
        self.pretend.executed.append(count)
        (source_tail, target_tail), stem = self.plan["tails"], self.plan["stem"]
        for address, tail, size in (
            (source, source_tail, 1 if stem[0] == "t" else 4),
            (target, target_tail, 4),
        ):
            self.pretend.cudart.check(address, count * int(np.prod(tail)) * size)
        if stem.startswith("trunk"):
            result = tokens_of(array_at(source, (count, *source_tail), np.uint8))
        else:
            result = embeddings_of(stem, array_at(source, (count, *source_tail), np.float32))
        array_at(target, (count, *target_tail), np.float32)[...] = result
