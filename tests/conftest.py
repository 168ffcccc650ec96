"""Every test is seeded: hypothesis draws the same examples in every run and sets no time limit of its own."""

import os

from hypothesis import settings

os.environ["ORT_DISABLE_TELEMETRY"] = "1"  # also where a test imports onnxruntime by itself

settings.register_profile("geoengine", derandomize=True, deadline=None, database=None)
settings.load_profile("geoengine")
