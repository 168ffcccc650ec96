"""What a client may choose of a search, and how large it may be."""

from __future__ import annotations

import itertools
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Annotated, Any

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from geoengine.commands.levels import parse_levels
from geoengine.engine.errors import GeoEngineError
from geoengine.engine.regions import Region, RegionError, parse_given_region
from geoengine.engine.regions.box import searched_area
from geoengine.engine.scoring.kinds import Method, Objective, Score
from geoengine.engine.search import SearchConfig, levels_of
from geoengine.engine.sources import TileSource
from geoengine.service.problems import Problem

_DEEPEST_FIRST = 10
"""The deepest first level of a search within a region: its tiles are counted, which takes memory for each."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Offer:
    """What a service lets its clients choose from."""

    levels: tuple[int, ...]
    methods: tuple[Method, ...] = (Method.tiles,)
    priors: tuple[str, ...] = ()
    max_k: int = 64


class Parameters(BaseModel):
    """The parameters of a search, in the query or as parts of a form."""

    model_config = ConfigDict(extra="forbid")

    k: Annotated[int, Field(ge=1, description="Beam width: tiles kept after each level.")] = 16
    levels: Annotated[
        str | None, Field(description="Zooms to search, such as 4,6,8 or 4-16.", max_length=200)
    ] = None
    top: Annotated[int, Field(ge=1, description="Candidates in the answer, at most k.")] = 5
    within: Annotated[
        str | None,
        Field(
            description="Search only here: west,south,east,north in degrees, a country's ISO 3166 code, or "
            "GeoJSON with polygons.",
            max_length=256 << 10,
        ),
    ] = None
    method: Annotated[
        Method | None,
        Field(
            description="What is asked: map tiles, and with some services GeoCLIP in several ways; with "
            "those that have no tiles, GeoCLIP alone."
        ),
    ] = None
    score: Annotated[
        Score | None, Field(description="What ranks tiles; by default the best that the encoders allow.")
    ] = None
    quota: Annotated[
        int | None, Field(ge=1, description="Most children of one tile in a beam, while there are others.")
    ] = None
    centred: Annotated[
        bool, Field(description="Subtract the mean embedding of a level's tiles before scoring.")
    ] = False
    objective: Annotated[
        str,
        Field(
            description="best-tile, or a radius such as 25km: the answer is the centre of most probability "
            "within it.",
            max_length=40,
        ),
    ] = "best-tile"
    prior: Annotated[
        str | None,
        Field(description="How likely photos are to be taken anywhere, by name.", max_length=40),
    ] = None

    def config(self, offer: Offer) -> SearchConfig:
        """Return the search; raises GeoEngineError for what is not offered."""
        for name, value in (("k", self.k), ("top", self.top), ("quota", self.quota)):
            if value is not None and value > offer.max_k:
                raise GeoEngineError(f"{name} must be at most {offer.max_k} here")
        method = self.method or offer.methods[0]
        if method not in offer.methods:
            raise GeoEngineError(f"method {method} is not offered here: there are {', '.join(offer.methods)}")
        if self.prior is not None and self.prior not in offer.priors:
            there = f"there are {', '.join(offer.priors)}" if offer.priors else "there is none"
            raise GeoEngineError(f"this prior is not offered here: {there}")
        levels = offer.levels
        chosen = levels if self.levels is None else parse_levels(self.levels)
        unknown = [zoom for zoom in chosen if zoom not in levels]
        if unknown:
            raise GeoEngineError(
                f"level {unknown[0]} is not offered here: there are {', '.join(map(str, levels))}"
            )
        return SearchConfig(
            k=self.k,
            levels=chosen,
            top=self.top,
            within=None if self.within is None else parse_given_region(self.within),
            method=method,
            score=self.score,
            quota=self.quota,
            centred=self.centred,
            objective=Objective.parse(self.objective),
            prior=self.prior,
        )


def parse_parameters(query: Iterable[tuple[str, str]], form: Mapping[str, str]) -> Parameters:
    """Return the parameters of a request; raises a 422 problem, which names the first that is wrong."""
    values: dict[str, Any] = {}
    for name, value in (*query, *form.items()):
        if name in values:
            raise Problem(422, "a parameter is given twice: give each once, in the query or in the form")
        values[name] = value
    try:
        return Parameters.model_validate(values)
    except ValidationError as error:
        raise wrong_parameter(error.errors()) from None


def wrong_parameter(errors: Iterable[Any]) -> Problem:
    """Return the problem for what a validation found; it does not repeat what was given."""
    first = next(iter(errors))
    known = [part for part in first["loc"] if part in Parameters.model_fields]
    if not known:
        names = ", ".join(Parameters.model_fields)
        return Problem(422, f"there is a parameter that is not known: the parameters are {names}")
    return Problem(422, f"parameter {known[0]}: {first['msg'][:200]}")


def check_work(config: SearchConfig, source: TileSource, max_tiles: int) -> None:
    """Raise GeoEngineError for a search of more than `max_tiles` tiles, and for a region without any."""
    if not config.method.searches:
        return
    levels = levels_of(source, config.levels, overzoom=config.overzoom)
    area = searched_area(source, config.within)
    first = 4 ** levels[0]
    if area is not None and (first <= max_tiles or levels[0] <= _DEEPEST_FIRST):
        first = _counted(area, levels[0])
    below = sum(config.k * 4 ** (fine - coarse) for coarse, fine in itertools.pairwise(levels))
    if first + below > max_tiles:
        raise GeoEngineError(
            f"this search would look at {first + below:,} tiles, more than the {max_tiles:,} allowed here: "
            "begin with a coarser level, leave out none, use a smaller k, or search in a smaller region"
        )


def _counted(area: Region, zoom: int) -> int:
    count = len(area.tiles(zoom))
    if not count:
        raise RegionError("there are no map tiles in this region: search within another one")
    return count
