"""Google's Map Tiles API, which wants a session: for users who have Google's permission only."""

from __future__ import annotations

import dataclasses
import json
import logging
from urllib.parse import quote

from geoengine.engine.errors import SourceError
from geoengine.engine.sources.description import CachePolicy, SourceDescription
from geoengine.engine.sources.fetch import Answer, Call, Fetcher, UnusableError
from geoengine.engine.sources.http import HttpSource
from geoengine.engine.sources.template import UrlTemplate

TERMS = "https://developers.google.com/maps/documentation/tile/policies"
_SESSION_PATH = "/v1/createSession?key={env:"
_ASKED = {"mapType": "satellite", "language": "en-US", "region": "US"}

_log = logging.getLogger(__name__)


def open_google(description: SourceDescription) -> HttpSource:
    """Open a source whose template has {session} in it, after asking for a session.

    The template also has {env:NAME} for the key. Raises SourceError unless the description accepts the terms,
    and for one that would keep tiles or fetch them in bulk, which the terms forbid whoever accepts them.
    """
    if not description.accept_terms:
        raise SourceError(
            "Google's terms forbid to analyse, index or keep pictures of its Map Tiles API; read "
            f"{TERMS} and set accept_terms = true if you have a permission"
        )
    if description.prefetch or description.cache is not CachePolicy.NONE:
        raise SourceError(f'Google\'s terms ({TERMS}) need cache = "none" and prefetch = false')
    _log.warning("Google's tiles are used under its terms: %s", TERMS)
    description = dataclasses.replace(description, terms=TERMS)
    session = _session(description)
    template = UrlTemplate(
        description.template, headers=description.headers, values={"session": quote(session, safe="")}
    )
    return HttpSource(description, template=template)


def _session(description: SourceDescription) -> str:
    tiles = UrlTemplate(description.template, headers=description.headers, values={"session": ""})
    if len(tiles.variables) != 1:
        raise SourceError(f"{tiles.shown}: the template needs key={{env:NAME}} with the key's variable")
    template = UrlTemplate(f"{tiles.scheme}://{tiles.host}{_SESSION_PATH}{tiles.variables[0]}}}")

    def read(answer: Answer) -> str:
        try:
            return str(json.loads(answer.body)["session"])
        except (ValueError, KeyError, TypeError):
            raise UnusableError("it gave no session") from None

    fetcher = Fetcher(description, template)
    try:
        session = fetcher.get(
            template.url(),
            read,
            what="a session",
            call=Call(template.shown),
            headers={"Content-Type": "application/json"},
            content=json.dumps(_ASKED).encode(),
        )
    finally:
        fetcher.close()
    if session is None:
        raise SourceError(f"{template.shown}: the server gives no session")
    return session
