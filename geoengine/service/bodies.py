"""Request bodies: read in memory up to a limit, in time, and taken apart as they come."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from dataclasses import dataclass, field

from python_multipart.exceptions import FormParserError
from python_multipart.multipart import MultipartParser, parse_options_header
from starlette.requests import ClientDisconnect, Request

from geoengine.service.problems import Problem

_MOST_PARTS = 32
_MOST_PARAMETER_BYTES = 256 << 10  # a GeoJSON region of ten thousand corners
_ENVELOPE_BYTES = 64 << 10  # what multipart adds to a photo
_RAW_KINDS = ("image/", "application/octet-stream")


@dataclass(slots=True)
class Upload:
    """What a request brings: the bytes of one photo, and parameters that came with it."""

    photo: bytearray = field(default_factory=bytearray)
    parameters: dict[str, str] = field(default_factory=dict)


async def read_upload(request: Request, *, max_bytes: int, timeout_s: float) -> Upload:
    """Return what a request brings; raises a problem when it is too large, too slow, or no photo.

    The body is the photo itself, or multipart/form-data with a part `photo` and parts for parameters. It is
    read no further than the limit, and never reaches a disk; names of files are not looked at.
    """
    kind, options = parse_options_header(request.headers.get("content-type", ""))
    multipart = kind == b"multipart/form-data"
    if not multipart and not kind.decode("latin-1").startswith(_RAW_KINDS):
        raise Problem(
            415,
            "send the photo itself as image/* or application/octet-stream, or multipart/form-data with a "
            "part named photo",
        )
    if request.headers.get("content-encoding", "identity").lower() != "identity":
        raise Problem(415, "send the photo without a content encoding")
    most = max_bytes + _ENVELOPE_BYTES + _MOST_PARAMETER_BYTES if multipart else max_bytes
    chunks = _limited(request, most, max_bytes)
    try:
        async with asyncio.timeout(timeout_s):
            upload = await (_Form(options, max_bytes).read(chunks) if multipart else _raw(chunks))
    except TimeoutError:
        raise Problem(408, f"the photo did not arrive within {timeout_s:g} s: try again") from None
    except ClientDisconnect:
        raise Problem(400, "the upload ended early") from None
    if not upload.photo:
        part = " in a part named photo" if multipart else ""
        raise Problem(422, f"there is no photo in the request: send its bytes{part}")
    return upload


async def _limited(request: Request, most: int, told: int) -> AsyncIterator[bytes]:
    """Yield the body's chunks; refuses one that is, or says that it is, over the limit."""
    length = request.headers.get("content-length", "")
    if length.isdecimal() and int(length[:20]) > most:
        raise _too_large(told)
    size = 0
    async for chunk in request.stream():
        size += len(chunk)
        if size > most:
            raise _too_large(told)
        yield chunk


def _too_large(max_bytes: int) -> Problem:
    return Problem(413, f"the photo has over {max_bytes / 2**20:g} MB, the limit: send a smaller one")


async def _raw(chunks: AsyncIterator[bytes]) -> Upload:
    upload = Upload()
    async for chunk in chunks:
        upload.photo += chunk
    return upload


class _Form:
    """Takes multipart/form-data apart, with limits for each part."""

    def __init__(self, options: dict[bytes, bytes], max_bytes: int) -> None:
        self._upload, self._max_bytes = Upload(), max_bytes
        self._parts, self._size, self._complete = 0, 0, False
        self._header, self._value = bytearray(), bytearray()
        self._disposition = b""
        self._name = ""
        self._data = bytearray()
        boundary = options.get(b"boundary", b"")
        try:
            self._parser = MultipartParser(
                boundary,
                {
                    "on_part_begin": self._begin,
                    "on_part_data": self._add,
                    "on_part_end": self._end_part,
                    "on_header_field": lambda data, start, end: self._header.extend(data[start:end]),
                    "on_header_value": lambda data, start, end: self._value.extend(data[start:end]),
                    "on_header_end": self._end_header,
                    "on_headers_finished": self._named,
                    "on_end": self._end,
                },
            )
        except FormParserError:
            boundary = b""
        if not boundary:
            raise Problem(400, "the multipart body cannot be read: its boundary is missing or too long")

    async def read(self, chunks: AsyncIterator[bytes]) -> Upload:
        """Return the photo and the parameters; raises a problem for what is no such form."""
        try:
            async for chunk in chunks:
                self._parser.write(chunk)
            self._parser.finalize()
        except FormParserError:
            raise Problem(400, "the multipart body cannot be read: it is damaged") from None
        if not self._complete:
            raise Problem(400, "the multipart body cannot be read: it ends early")
        return self._upload

    def _begin(self) -> None:
        self._parts += 1
        if self._parts > _MOST_PARTS:
            raise Problem(422, f"the form has more than {_MOST_PARTS} parts")
        self._disposition, self._data = b"", bytearray()

    def _end_header(self) -> None:
        if self._header.lower() == b"content-disposition":
            self._disposition = bytes(self._value)
        self._header.clear()
        self._value.clear()

    def _named(self) -> None:
        _, options = parse_options_header(self._disposition)
        self._name = options.get(b"name", b"").decode("utf-8", "replace")
        if not self._name:
            raise Problem(400, "the multipart body cannot be read: a part has no name")
        if self._name in self._upload.parameters or (self._name == "photo" and self._upload.photo):
            raise Problem(422, "the form has two parts of one name")

    def _add(self, data: bytes, start: int, end: int) -> None:
        self._data += data[start:end]
        if self._name == "photo" and len(self._data) > self._max_bytes:
            raise _too_large(self._max_bytes)
        if self._name != "photo" and len(self._data) > _MOST_PARAMETER_BYTES:
            raise Problem(413, f"a parameter is larger than {_MOST_PARAMETER_BYTES >> 10} KB")

    def _end_part(self) -> None:
        if self._name == "photo":
            self._upload.photo = self._data
            return
        try:
            self._upload.parameters[self._name] = self._data.decode("utf-8")
        except UnicodeDecodeError:
            raise Problem(422, "a parameter of the form is no UTF-8 text") from None

    def _end(self) -> None:
        self._complete = True
