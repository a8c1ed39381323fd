"""Parser of `multipart/form-data` (RFC 7578), in memory: nothing is written to disk, and filenames are ignored."""

from __future__ import annotations

from dataclasses import dataclass

from python_multipart.multipart import parse_options_header

from server.requests.errors import BodyTooLarge, MalformedBody

MAX_FIELDS = 64
_MAX_HEADERS = 2048  # bytes, of a part or of Content-Type
_MAX_BOUNDARY = 70  # bytes; RFC 2046, section 5.1.1


@dataclass(frozen=True, slots=True)
class FormField:
    """One part of a form."""

    name: str
    filename: bytes | None  # None for text fields; only its presence matters
    content: bytes | bytearray

    @property
    def is_file(self) -> bool:
        return self.filename is not None

    @property
    def text(self) -> str:
        """The content of a text field.

        Raises:
            MalformedBody: the content is not UTF-8.
        """
        return _decode(self.content)


def read_form(body: bytearray, content_type: str) -> list[FormField]:
    """The fields of `body` in order, without file inputs that were left empty in a browser.

    Raises:
        MalformedBody, BodyTooLarge
    """
    boundary = parse_options_header(content_type[:_MAX_HEADERS])[1].get(b"boundary", b"")
    if not 0 < len(boundary) <= _MAX_BOUNDARY:
        raise MalformedBody("Content-Type has no boundary: let the library that builds the form set this header.")
    fields: list[FormField] = []
    _preamble, *parts = (b"\r\n" + body).split(b"\r\n--" + boundary, MAX_FIELDS + 1)
    for part in parts:
        if part.startswith(b"--"):
            return [field for field in fields if field.content or field.filename != b""]
        if len(fields) == MAX_FIELDS:
            raise BodyTooLarge(f"The form has more than {MAX_FIELDS} fields.")
        fields.append(_read_field(part))
    raise MalformedBody("Invalid form: the closing boundary is missing.")


def _read_field(part: bytes) -> FormField:
    head, blank, content = part.partition(b"\r\n\r\n")
    padding, *lines = head[:_MAX_HEADERS].split(b"\r\n")
    if padding.strip(b" \t") or not blank or len(head) > _MAX_HEADERS:
        raise MalformedBody("Invalid form: a part does not start with headers and an empty line.")
    headers = {name.lower(): value for name, _, value in (line.partition(b":") for line in lines)}
    kind, options = parse_options_header(headers.get(b"content-disposition", b"").strip())
    if kind != b"form-data" or b"name" not in options:
        raise MalformedBody('Invalid form: each part needs the header Content-Disposition: form-data; name="...".')
    return FormField(_decode(options[b"name"]), options.get(b"filename"), content)


def _decode(text: bytes | bytearray) -> str:
    try:
        return text.decode()
    except UnicodeDecodeError:
        raise MalformedBody(
            "Invalid form: names and text must be UTF-8; send other content as a file, with a filename."
        ) from None
