"""A reader of Containerfiles, as far as those in this folder go: what `prove.py` runs is what they say."""

from __future__ import annotations

import json
import re
import shlex
from dataclasses import dataclass, field

_NAME = re.compile(r"\$\{(\w+)\}")


@dataclass
class Stage:
    """One FROM and what follows it; `steps` are its RUN and COPY instructions in order."""

    base: str
    name: str
    steps: list[tuple[str, str]] = field(default_factory=list)


@dataclass
class Image:
    """What a Containerfile describes: its stages, and how the last one is run."""

    stages: list[Stage]
    user: str = "0"
    healthcheck: list[str] = field(default_factory=list)
    entrypoint: list[str] = field(default_factory=list)
    command: list[str] = field(default_factory=list)


def parse(text: str) -> Image:
    """Read a Containerfile; raises ValueError for an instruction that it does not know."""
    image, arguments = Image([]), {}
    for number, instruction, rest in _instructions(text):
        if instruction == "ARG":
            name, _, value = rest.partition("=")
            arguments[name] = value
        elif instruction == "FROM":
            base, _, name = _NAME.sub(lambda found: arguments[found[1]], rest).partition(" AS ")
            image.stages.append(Stage(base, name))
        elif instruction in ("RUN", "COPY", "ENV", "WORKDIR"):
            image.stages[-1].steps.append((instruction, rest))
        elif instruction == "USER":
            image.user = rest
        elif instruction == "ENTRYPOINT":
            image.entrypoint = json.loads(rest)
        elif instruction == "CMD":
            image.command = json.loads(rest)
        elif instruction == "HEALTHCHECK":
            image.healthcheck = json.loads(rest.partition(" CMD ")[2])
        elif instruction not in ("EXPOSE", "STOPSIGNAL"):
            raise ValueError(f"line {number}: {instruction} is not known here")
    return image


def environment(rest: str) -> dict[str, str]:
    """Return the variables of an ENV instruction."""
    pairs = (pair.partition("=") for pair in shlex.split(rest))
    return {name: value for name, _, value in pairs}


def _instructions(text: str) -> list[tuple[int, str, str]]:
    """Return (line, instruction, the rest), with continued lines joined and comments left out."""
    found, waiting, begun = [], "", 0
    for number, line in enumerate(text.splitlines(), start=1):
        if not line.strip() or (line.lstrip().startswith("#")):
            continue
        begun = begun if waiting else number
        waiting += line.rstrip().removesuffix("\\").strip() + " "
        if not line.rstrip().endswith("\\"):
            instruction, _, rest = waiting.strip().partition(" ")
            found.append((begun, instruction, rest.strip()))
            waiting = ""
    return found
