"""Files in JSON: base64 text, or a `data:` URL of it."""

from __future__ import annotations

import binascii
import re

from pydantic_core import PydanticCustomError

from server.requests.uploads import MAX_FILE

# RFC 2397: the media type may be missing or wrong and have parameters; the file's first bytes decide what it is.
_DATA_URL = re.compile(r"data:[^,]{0,1000};base64,", re.IGNORECASE)
_URL = re.compile(r"[a-z][a-z0-9+.-]{0,30}:", re.IGNORECASE)
_PIECE = 1024 * 1024  # characters
_STANDARD = bytes.maketrans(b"-_", b"+/")  # from the URL-safe alphabet


def decode(text: object) -> bytes:
    """Decode base64 (RFC 4648, sections 4 and 5) or a base64 `data:` URL; line breaks and missing padding are allowed.

    Raises PydanticCustomError: the text is another URL, is not base64, or is not 1 to MAX_FILE bytes.
    """
    if isinstance(text, bytes):  # constructed in Python: neither JSON nor a form can hold bytes
        return text
    if not isinstance(text, str):
        raise _refuse("Input should be a file, as base64 text")
    if prefix := _DATA_URL.match(text):
        text = text[prefix.end() :]
    elif text[:5].lower() == "data:":
        raise _refuse("A data: URL should be in base64: data:image/png;base64,…")
    if _URL.match(text):
        raise _refuse("URLs are not fetched: send the file itself, in base64 or as multipart/form-data")
    content = _decode(text)
    if not 0 < len(content) <= MAX_FILE:
        raise _refuse(f"The file should have at least 1 byte and at most {MAX_FILE} bytes")
    return content


def _decode(text: str) -> bytes:
    """Decode piece by piece, so that other threads get the interpreter's lock in between."""
    content, rest = bytearray(), b""
    try:
        for start in range(0, len(text), _PIECE):
            digits = rest + text[start : start + _PIECE].encode("ascii").translate(_STANDARD, b"\r\n")
            end = max(len(digits) - 4, 0) // 4 * 4  # the last ones may be padding
            if b"=" in digits[:end]:
                raise ValueError("padding within the text")
            content += binascii.a2b_base64(digits[:end], strict_mode=True)
            rest = digits[end:]
            if len(content) > MAX_FILE:
                return bytes(content)  # which is refused
        if not rest.endswith(b"="):
            rest += b"=" * (-len(rest) % 4)
        return bytes(content + binascii.a2b_base64(rest, strict_mode=True))
    except ValueError:
        raise _refuse("Input should be valid base64 (RFC 4648)") from None


def _refuse(message: str) -> PydanticCustomError:
    return PydanticCustomError("image", message)
