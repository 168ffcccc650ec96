"""What the OpenAPI document says of the routes besides their parameters: bodies, answers, examples."""

from __future__ import annotations

import json
from typing import Any

from geoengine.engine.render.json_lines import schema_text
from geoengine.service.parameters import Parameters
from geoengine.service.problems import MEDIA_TYPE

_PROBLEM = {
    "type": "object",
    "required": ["type", "title", "status", "detail", "request"],
    "properties": {
        "type": {"type": "string"},
        "title": {"type": "string"},
        "status": {"type": "integer"},
        "detail": {"type": "string", "description": "One sentence that says what to do."},
        "request": {"type": "string", "description": "The request's id, also in X-Request-ID."},
    },
}
_REASONS = {
    400: "The body cannot be read.",
    401: "A key is needed.",
    403: "Not for pages of other sites, nor under this host name.",
    404: "There is no such thing.",
    405: "Not with this method.",
    406: "Answers are JSON or GeoJSON.",
    408: "The body came too slowly.",
    413: "The photo has too many bytes or pixels.",
    415: "This is no photo of a kind that can be read.",
    422: "The photo is damaged, or a parameter impossible.",
    429: "Too many requests; see Retry-After.",
    503: "The service is busy or cannot answer now; see Retry-After.",
}
_LOCATING = (400, 401, 403, 405, 408, 413, 415, 422, 429, 503)

_PHOTO = {"type": "string", "format": "binary", "description": "The photo's file."}
_LEVEL_EXAMPLE = {
    "index": 0,
    "levels": 7,
    "zoom": 4,
    "candidates": 256,
    "missing": 0,
    "late": 0,
    "coverage": 1.0,
    "known": 256,
    "enlarged": 0,
    "exhaustive": False,
    "beam": [{"z": 4, "x": 8, "y": 5, "score": 0.421875}],
}


def _problems(*statuses: int) -> dict[int | str, dict[str, Any]]:
    return {
        status: {
            "description": _REASONS[status],
            "content": {
                MEDIA_TYPE: {
                    "schema": _PROBLEM,
                    "example": {
                        "type": "about:blank",
                        "title": "Refused",
                        "status": status,
                        "detail": _REASONS[status],
                        "request": "9f86d081884c7d65",
                    },
                }
            },
        }
        for status in statuses
    }


def _form() -> dict[str, Any]:
    schema = Parameters.model_json_schema()
    properties = {name: _plain(value, schema) for name, value in schema["properties"].items()}
    return {
        "type": "object",
        "required": ["photo"],
        "additionalProperties": False,
        "properties": {"photo": _PHOTO, **properties},
    }


def _plain(value: dict[str, Any], schema: dict[str, Any]) -> dict[str, Any]:
    """Return a parameter's schema without references to definitions elsewhere."""
    text = json.dumps(value)
    for name, definition in schema.get("$defs", {}).items():
        text = text.replace(json.dumps({"$ref": f"#/$defs/{name}"}), json.dumps(definition))
    plain = json.loads(text)
    assert isinstance(plain, dict)
    return plain


def _bodies() -> dict[str, Any]:
    raw = {"schema": _PHOTO}
    return {
        "requestBody": {
            "required": True,
            "content": {
                "multipart/form-data": {"schema": _form()},
                "image/jpeg": raw,
                "application/octet-stream": raw,
            },
        }
    }


def _result_schema() -> dict[str, Any]:
    """Return the schema of a result, its definitions written out."""
    schema = json.loads(schema_text())
    definitions = schema.pop("$defs")
    for key in ("$schema", "$id"):
        schema.pop(key, None)

    def written_out(node: Any) -> Any:  # noqa: ANN401 - any JSON
        if isinstance(node, dict):
            if "$ref" in node:
                rest = {key: value for key, value in node.items() if key != "$ref"}
                return written_out(definitions[node["$ref"].removeprefix("#/$defs/")] | rest)
            return {key: written_out(value) for key, value in node.items()}
        return [written_out(item) for item in node] if isinstance(node, list) else node

    plain = written_out(schema)
    assert isinstance(plain, dict)
    return plain


def _ok(media_type: str, description: str, **content: Any) -> dict[int | str, dict[str, Any]]:  # noqa: ANN401
    return {200: {"description": description, "content": {media_type: content}}}


_EVENTS = "\n".join(
    (
        'event: accepted\ndata: {"request": "9f86d081884c7d65", "waiting": 0}\n',
        'event: progress\ndata: {"zoom": 4, "index": 0, "levels": 7, "done": 128, "total": 256}\n',
        f"event: level\ndata: {json.dumps(_LEVEL_EXAMPLE)}\n",
        "event: result\ndata: {}\n",
    )
)

LOCATE: dict[str, Any] = {
    "summary": "Locate a photo",
    "openapi_extra": _bodies(),
    "responses": {
        200: {
            "description": "Where the photo may have been taken.",
            "content": {
                "application/json": {"schema": _result_schema()},
                "application/geo+json": {"schema": {"type": "object"}},
            },
        },
        **_problems(*_LOCATING, 406),
    },
}
STREAM: dict[str, Any] = {
    "summary": "Locate a photo, with the stages of the search as server-sent events",
    "openapi_extra": _bodies(),
    "responses": {
        **_ok("text/event-stream", "Events; result or error is the last.", example=_EVENTS),
        **_problems(*_LOCATING),
    },
}
TILE: dict[str, Any] = {
    "summary": "A map tile",
    "responses": {
        **_ok("image/jpeg", "The tile.", schema={"type": "string", "format": "binary"}),
        **_problems(401, 403, 404, 422, 429, 503),
    },
}
ABOUT: dict[str, Any] = {
    "summary": "What is searched, and with which limits",
    "responses": {**_ok("application/json", "Facts.", schema={"type": "object"}), **_problems(401, 403)},
}
HEALTH: dict[str, Any] = {
    "summary": "Whether the service can answer, and with what",
    "responses": {
        **_ok("application/json", "It can.", schema={"type": "object"}, example={"status": "ok"}),
        503: {
            "description": "It cannot now.",
            "content": {"application/json": {"schema": {"type": "object"}, "example": {"status": "stalled"}}},
        },
        **_problems(403),
    },
}
METRICS: dict[str, Any] = {
    "summary": "Figures for Prometheus",
    "responses": {**_ok("text/plain", "Figures.", schema={"type": "string"}), **_problems(401, 403)},
}
