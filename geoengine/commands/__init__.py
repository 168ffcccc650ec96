"""The commands of `geoengine`, one module each, and how they talk to a terminal."""
