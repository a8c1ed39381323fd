"""`multipart/form-data`, RFC 7578, read in memory: nothing of it reaches the file system, a filename least of all."""

from __future__ import annotations

from dataclasses import dataclass

from python_multipart.multipart import parse_options_header

from server.requests.errors import BodyTooLarge, MalformedBody

MAX_FIELDS = 64
_MAX_HEADERS = 2048  # bytes, of a field or of Content-Type
_MAX_BOUNDARY = 70  # bytes; RFC 2046, section 5.1.1


@dataclass(frozen=True, slots=True)
class Field:
    """One part of a form."""

    name: str
    filename: bytes | None  # None says that it is text; whatever else it says is the caller's business
    content: bytes | bytearray

    @property
    def is_file(self) -> bool:
        return self.filename is not None

    @property
    def text(self) -> str:
        """The content of a field that is no file.

        Raises:
            MalformedBody: it is not UTF-8.
        """
        return _decode(self.content)


def read_form(body: bytearray, content_type: str) -> list[Field]:
    """The fields of `body` in order, without the files that somebody at a browser did not choose.

    Raises:
        MalformedBody, BodyTooLarge
    """
    boundary = parse_options_header(content_type[:_MAX_HEADERS])[1].get(b"boundary", b"")
    if not 0 < len(boundary) <= _MAX_BOUNDARY:
        raise MalformedBody("Content-Type names no boundary: leave that header to the library that makes the form.")
    fields: list[Field] = []
    _preamble, *parts = (b"\r\n" + body).split(b"\r\n--" + boundary, MAX_FIELDS + 1)
    for part in parts:
        if part.startswith(b"--"):
            return [field for field in fields if field.content or field.filename != b""]
        if len(fields) == MAX_FIELDS:
            raise BodyTooLarge(f"The form has more than {MAX_FIELDS} fields.")
        fields.append(_read_field(part))
    raise MalformedBody("Invalid form: it ends before its last boundary.")


def _read_field(part: bytes) -> Field:
    head, blank, content = part.partition(b"\r\n\r\n")
    padding, *lines = head[:_MAX_HEADERS].split(b"\r\n")
    if padding.strip(b" \t") or not blank or len(head) > _MAX_HEADERS:
        raise MalformedBody("Invalid form: a part does not begin with headers and an empty line.")
    headers = {name.lower(): value for name, _, value in (line.partition(b":") for line in lines)}
    kind, options = parse_options_header(headers.get(b"content-disposition", b"").strip())
    if kind != b"form-data" or b"name" not in options:
        raise MalformedBody('Invalid form: each part needs a header Content-Disposition: form-data; name="...".')
    return Field(_decode(options[b"name"]), options.get(b"filename"), content)


def _decode(text: bytes | bytearray) -> str:
    try:
        return text.decode()
    except UnicodeDecodeError:
        raise MalformedBody("Invalid form: names and texts are UTF-8, and what is not needs a filename.") from None
