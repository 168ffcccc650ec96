"""Every test is seeded: hypothesis draws the same examples in every run and sets no time limit of its own."""

from hypothesis import settings

settings.register_profile("geoengine", derandomize=True, deadline=None, database=None)
settings.load_profile("geoengine")
