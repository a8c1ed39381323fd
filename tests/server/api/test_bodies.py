"""Request bodies are parsed to models or give problem details; no image model is needed."""

from __future__ import annotations

import asyncio
import base64
import json
import zlib
from collections.abc import AsyncIterator
from typing import Any

import httpx
import pytest
from fastapi import FastAPI
from fastapi import Request as HttpRequest
from fastapi.responses import JSONResponse
from hypothesis import assume, given, settings
from hypothesis import strategies as st

from server.api.bodies import MAX_BODY, MAX_COMMAS, describe_body, read_body
from server.api.body_limits import BodyLimits
from server.api.forms import MAX_FIELDS
from server.api.problems import problem, problem_response
from server.requests.errors import ServerError
from server.requests.schemas import GenerateRequest
from server.requests.uploads import MAX_FILE

JSON = {"Content-Type": "application/json"}
FORM = {"Content-Type": "multipart/form-data; boundary=xyz"}
FILE = bytes(range(256)) * 3  # what is in a file is of no concern here
BASE64 = base64.b64encode(FILE).decode()

app = FastAPI()


def described(file: bytes) -> str:
    return f"{len(file)} bytes, {zlib.crc32(file)}"


@app.post("/")
async def echo(http: HttpRequest) -> JSONResponse:
    with BodyLimits().lease() as lease:
        body = await read_body(http, GenerateRequest, lease)
    return JSONResponse(
        {name: described(value) if isinstance(value, bytes) else value for name, value in body.model_dump().items()}
    )


@app.exception_handler(ServerError)
async def _refused(_http: HttpRequest, error: ServerError) -> JSONResponse:
    return problem_response(problem(error))


def post(**arguments: Any) -> httpx.Response:
    async def send() -> httpx.Response:
        async with httpx.AsyncClient(transport=httpx.ASGITransport(app), base_url="http://here:8000") as client:
            return await client.post("/", **arguments)

    return asyncio.run(send())


def part(content: bytes, *, name: str = "prompt", filename: str | None = None) -> bytes:
    names = f'name="{name}"' + ("" if filename is None else f'; filename="{filename}"')
    return f"--xyz\r\nContent-Disposition: form-data; {names}\r\n\r\n".encode() + content + b"\r\n"


def form(*parts: bytes) -> bytes:
    return b"".join(parts) + b"--xyz--\r\n"


def taken(answer: httpx.Response) -> dict[str, Any]:
    """The fields of the model that the body became."""
    assert answer.status_code == 200, answer.text[:500]
    fields: dict[str, Any] = answer.json()
    return fields


def check_refused(answer: httpx.Response, status: int, *words: str, field: str | None = None) -> None:
    assert answer.status_code == status, answer.text[:500]
    document = answer.json()
    messages = {error["field"]: error["message"] for error in document["errors"]}
    said = document["detail"] if field is None else messages[field]
    assert all(word in said for word in words), said
    assert len(answer.content) < 5000


def test_a_form_and_json_are_equivalent() -> None:
    fields = {
        "prompt": "a réd cat",
        "num_inference_steps": 20,
        "guidance_scale": 7.5,
        "seed": 7,
        "image_format": "webp",
    }
    as_json = post(json={**fields, "image": BASE64, "mask": f"data:image/png;base64,{BASE64}"})
    files = {"image": ("../../etc/passwd", FILE, "text/html"), "mask": ("C:\\\\b.png", FILE)}
    as_form = post(data={name: str(value) for name, value in fields.items()}, files=files)
    assert taken(as_json) == taken(as_form)
    assert taken(as_form)["image"] == taken(as_form)["mask"] == described(FILE)


def test_a_file_may_be_text_in_a_form() -> None:
    answer = post(content=form(part(b""), part(BASE64.encode(), name="image"), part(b"a", name="prompt")), headers=FORM)
    check_refused(answer, 422, "once", field="prompt")
    answer = post(content=form(part(BASE64.encode(), name="image"), part(b"a")), headers=FORM)
    assert taken(answer)["image"] == described(FILE)


@pytest.mark.parametrize("number", ["20", " 20 ", "+20"])
def test_a_number_is_parsed_from_text(number: str) -> None:
    answer = post(content=form(part(b"a"), part(number.encode(), name="num_inference_steps")), headers=FORM)
    assert taken(answer)["num_inference_steps"] == 20


@pytest.mark.parametrize(
    ("field", "text", "word"),
    [
        ("num_inference_steps", "abc", "integer"),
        ("num_inference_steps", "20.5", "integer"),
        ("num_inference_steps", "201", "200"),
        ("num_inference_steps", "null", "integer"),
        ("seed", "9" * 5000, "integer"),
        ("guidance_scale", "nan", "finite"),
        ("guidance_scale", "much", "number"),
        ("image_format", "gif", "png"),
        ("steps", "20", "use num_inference_steps"),
        ("steps", "", "use num_inference_steps"),
        ("image", "https://example.org/cat.png", "not fetched"),
        ("image", "a cat", "base64"),
    ],
)
def test_a_form_is_validated_strictly(field: str, text: str, word: str) -> None:
    check_refused(post(content=form(part(b"a"), part(text.encode(), name=field)), headers=FORM), 422, word, field=field)


def test_an_empty_field_counts_as_missing() -> None:
    empty = [part(b"", name=name) for name in ("seed", "negative_prompt", "scheduler", "mask")]
    unchosen = part(b"", name="image", filename="")
    assert taken(post(content=form(part(b"a"), *empty, unchosen), headers=FORM)) == taken(post(json={"prompt": "a"}))
    check_refused(post(content=form(part(b"")), headers=FORM), 422, "required", field="prompt")


def test_an_empty_file_is_rejected() -> None:
    check_refused(post(data={"prompt": "a"}, files={"image": ("cat.png", b"")}), 422, "at least 1 byte", field="image")


@pytest.mark.parametrize("name", ["prompt", "seed", "secret", ""])
def test_only_image_fields_accept_files(name: str) -> None:
    answer = post(content=form(part(b"a", name=name, filename="a.txt")), headers=FORM)
    check_refused(answer, 422, "image and mask", field=name)


def test_a_duplicate_field_is_rejected() -> None:
    image = part(FILE, name="image", filename="a.png")
    check_refused(post(content=form(part(b"a"), image, image), headers=FORM), 422, "once", field="image")
    check_refused(post(content=form(part(b"a"), part(b"")), headers=FORM), 422, "once", field="prompt")


def test_a_long_name_is_not_echoed() -> None:
    for filename in (None, "a.png"):
        long = part(b"a", name="x" * 1500, filename=filename)
        answer = post(content=form(long, long), headers=FORM)
        check_refused(answer, 422)
        assert "x" * 201 not in answer.text


MALFORMED: dict[str, bytes] = {
    "nothing": b"",
    "no part at all": b"--xyz--\r\n",
    "another boundary": form(part(b"a")).replace(b"xyz", b"abc"),
    "JSON": b'{"prompt": "a"}',
    "no last boundary": part(b"a"),
    "cut within a part": form(part(b"a"), part(FILE, name="image", filename="a.png"))[:-100],
    "cut within a header": part(b"a") + b"--xyz\r\nContent-Dispo",
    "cut within the last boundary": form(part(b"a"))[:-4],
    "no header": b"--xyz\r\n\r\na\r\n--xyz--\r\n",
    "no name": b"--xyz\r\nContent-Disposition: form-data\r\n\r\na\r\n--xyz--\r\n",
    "an attachment": form(part(b"a")).replace(b"form-data", b"attachment"),
    "a header without a colon": b"--xyz\r\nContent-Disposition\r\n\r\na\r\n--xyz--\r\n",
    "a huge header": b"--xyz\r\nContent-Disposition: " + b"x" * 100_000 + b"\r\n\r\na\r\n--xyz--\r\n",
    "many headers": b"--xyz\r\n" + b"A: b\r\n" * 1000 + b"\r\na\r\n--xyz--\r\n",
    "a text that is not UTF-8": form(part(b"\xff\xfe")),
    "a surrogate": form(part(b"\xed\xa0\x80")),
    "UTF-16": form(part("a cat".encode("utf-16"))),
    "a name that is not UTF-8": form(part(b"a")).replace(b"prompt", b"\xff"),
}


@pytest.mark.parametrize("content", [content for name, content in MALFORMED.items() if name != "no part at all"])
def test_an_invalid_form_is_malformed(content: bytes) -> None:
    check_refused(post(content=content, headers=FORM), 400, "Invalid form")


def test_an_empty_form_lacks_the_prompt() -> None:
    check_refused(post(content=MALFORMED["no part at all"], headers=FORM), 422, "required", field="prompt")


@pytest.mark.parametrize(
    "kind", ["", ";", "; boundary", "; boundary=", '; boundary=""', "; charset=utf-8", "; boundary=" + "x" * 5000]
)
def test_a_form_needs_a_boundary(kind: str) -> None:
    answer = post(content=form(part(b"a")), headers={"Content-Type": f"multipart/form-data{kind}"})
    check_refused(answer, 400, "boundary")


@pytest.mark.parametrize("charset", ["utf-8", "utf-16", "latin-1", "unheard-of", "rot13", "x" * 1000])
def test_a_charset_is_ignored(charset: str) -> None:
    headers = {"Content-Type": f"multipart/form-data; boundary=xyz; charset={charset}"}
    content = form(part("é".encode()), part(charset.encode()[:9], name="_charset_"))
    check_refused(post(content=content, headers=headers), 422, "Unknown field", field="_charset_")
    assert taken(post(content=form(part("é".encode())), headers=headers))["prompt"] == "é"


def test_the_number_of_form_fields_is_limited() -> None:
    parts = [part(b"a", name=f"field{index}") for index in range(1000)]
    check_refused(post(content=form(*parts[:MAX_FIELDS]), headers=FORM), 422, "Unknown field", field="field0")
    check_refused(post(content=form(*parts), headers=FORM), 413, str(MAX_FIELDS))


@pytest.mark.parametrize(
    "kind",
    ["", "text/plain", "application/x-www-form-urlencoded", "multipart/mixed; boundary=xyz", "application/jsonp"],
)
def test_other_media_types_are_unsupported(kind: str) -> None:
    answer = post(content=form(part(b"a")), headers={"Content-Type": kind})
    check_refused(answer, 415, "application/json", "multipart/form-data")


@pytest.mark.parametrize(
    "headers",
    [
        {"Origin": "https://elsewhere.example"},
        {"Origin": "http://here:8001"},
        {"Origin": "http://here"},
        {"Origin": "http://nothere:8000"},
        {"Origin": "null"},
        {"Origin": ""},
        {"Origin": "http://here:8000", "Sec-Fetch-Site": "cross-site"},
        {"Sec-Fetch-Site": "cross-site"},
    ],
    ids=str,
)
def test_a_cross_origin_form_is_rejected(headers: dict[str, str]) -> None:
    check_refused(post(content=form(part(b"a")), headers={**FORM, **headers}), 403, "another origin")


@pytest.mark.parametrize(
    "headers",
    [
        {"Origin": "http://here:8000", "Sec-Fetch-Site": "same-origin"},
        {"Origin": "https://here:8000"},  # behind what speaks TLS for it
        {"Sec-Fetch-Site": "none"},
        {"Referer": "https://elsewhere.example"},
    ],
    ids=str,
)
def test_a_same_origin_form_is_accepted(headers: dict[str, str]) -> None:
    assert taken(post(content=form(part(b"a")), headers={**FORM, **headers}))["prompt"] == "a"


def test_cross_origin_json_is_left_to_the_browsers_preflight() -> None:
    assert taken(post(json={"prompt": "a"}, headers={"Origin": "https://elsewhere.example"}))["prompt"] == "a"


class Flood:
    """A body without an end, that knows how much of it was taken."""

    def __init__(self, start: bytes) -> None:
        self.start = start
        self.taken = 0

    async def __aiter__(self) -> AsyncIterator[bytes]:
        yield self.start
        while True:
            self.taken += 2**20
            yield bytes(2**20)


@pytest.mark.parametrize("said", [{}, {"Content-Length": "10"}], ids=["chunked", "a Content-Length that lies"])
@pytest.mark.parametrize(
    ("kind", "start"),
    [(JSON, b'{"prompt": "'), (FORM, part(b"")[:-2]), (FORM, part(b"", name="image", filename="a.png")[:-2])],
    ids=["JSON", "form", "file"],
)
def test_the_body_size_is_checked_while_receiving(kind: dict[str, str], start: bytes, said: dict[str, str]) -> None:
    flood = Flood(start)
    check_refused(post(content=flood, headers={**kind, **said}), 413, str(MAX_BODY))
    assert flood.taken <= MAX_BODY + 2**20


def test_two_images_of_the_maximum_size_are_accepted() -> None:
    file = bytes(MAX_FILE)
    text = base64.b64encode(file).decode()
    as_json = taken(post(content=json.dumps({"prompt": "a", "image": text, "mask": text}), headers=JSON))
    assert as_json["image"] == as_json["mask"] == described(file)
    as_form = taken(post(data={"prompt": "a"}, files={"image": ("a.png", file), "mask": ("b.png", file)}))
    assert as_form["image"] == as_form["mask"] == described(file)
    one_more = {"image": ("a.png", file + b"\0")}
    check_refused(post(data={"prompt": "a"}, files=one_more), 422, str(MAX_FILE), field="image")


@pytest.mark.parametrize("body", [b'{"a":1' + b',"b":1' * 5_000_000 + b"}", b"[" + b"1," * 10_000_000 + b"1]"])
def test_a_body_of_many_values_is_rejected_before_parsing(body: bytes) -> None:
    """Read, it would become millions of complaints, and gigabytes of them."""
    check_refused(post(content=body, headers=JSON), 413, str(MAX_COMMAS))


@pytest.mark.parametrize(
    "body",
    [
        b'{"prompt": ' + b"[" * 2**25,
        b'{"prompt": "' + b"x" * 2**25,
        b'{"prompt": "", "seed": ' + b"9" * 2**25 + b"}",
        b'{"prompt": "", "guidance_scale": 0.' + b"9" * 2**25,
        b" " * 2**25,
    ],
    ids=["brackets", "a text", "an integer", "a fraction", "nothing"],
)
def test_a_large_body_that_is_not_json_is_malformed(body: bytes) -> None:
    check_refused(post(content=body, headers=JSON), 400, "Invalid JSON")


@pytest.mark.parametrize(
    ("text", "word"),
    [
        ("", "at least 1 byte"),
        ("data:image/png;base64,", "at least 1 byte"),
        ("a cat", "base64"),
        ("QUJDR", "base64"),
        ("QU=JD", "base64"),
        ("QUI=QUI=", "base64"),
        ("éééé", "base64"),
        (" QUJD", "base64"),
        ("./cat.png", "base64"),
        ("data:image/png;base64,data:image/png;base64,QUJD", "not fetched"),
        ("data:image/png,QUJD", "base64"),
        ("http://example.org/cat.png", "not fetched"),
        ("HTTPS://example.org/cat.png", "not fetched"),
        ("file:///etc/passwd", "not fetched"),
        ("gopher:cat", "not fetched"),
        (base64.b64encode(bytes(MAX_FILE + 1)).decode(), str(MAX_FILE)),
        (20, "base64"),
        (True, "base64"),
        ([BASE64], "base64"),
    ],
    ids=lambda value: str(value)[:40],
)
def test_an_image_in_json_must_be_base64(text: Any, word: str) -> None:
    answer = post(json={"prompt": "a", "image": text})
    check_refused(answer, 422, word, field="image")
    assert "QUJD" not in answer.text


@pytest.mark.parametrize(
    "text",
    [
        BASE64,
        f"data:image/png;base64,{BASE64}",
        f"DATA:image/SVG+xml;BASE64,{BASE64}",
        base64.encodebytes(FILE).decode(),
    ],
    ids=["bare", "data URL", "data URL in capitals", "in lines"],
)
def test_an_image_in_json_is_accepted(text: str) -> None:
    assert taken(post(json={"prompt": "a", "image": text}))["image"] == described(FILE)


def test_openapi_describes_images_as_base64_and_as_files() -> None:
    content = describe_body(GenerateRequest)["content"]
    as_json = content["application/json"]["schema"]["properties"]
    as_form = content["multipart/form-data"]["schema"]["properties"]
    assert as_json["image"]["anyOf"][0] == {"type": "string", "contentEncoding": "base64", "minLength": 1}
    assert as_form["image"]["format"] == as_form["mask"]["format"] == "binary"
    assert as_form["image"]["description"] == as_json["image"]["description"]
    assert as_form["prompt"] == as_json["prompt"]


def test_an_image_is_left_out_of_the_repr() -> None:
    body = GenerateRequest(prompt="a", image=FILE)
    assert body.image == FILE
    assert "image=" not in repr(body)


def test_a_disconnect_within_a_form_is_not_an_error() -> None:
    messages: list[dict[str, Any]] = [
        {"type": "http.request", "body": part(b"a"), "more_body": True},
        {"type": "http.disconnect"},
    ]

    async def receive() -> dict[str, Any]:
        return messages.pop(0)

    async def read() -> None:
        scope = {
            "type": "http",
            "method": "POST",
            "path": "/",
            "headers": [(b"content-type", FORM["Content-Type"].encode())],
        }
        await read_body(HttpRequest(scope, receive), GenerateRequest, BodyLimits().lease())

    with pytest.raises(ServerError, match="disconnected"):
        asyncio.run(read())


quick = settings(max_examples=200, deadline=None, derandomize=True, database=None)
pieces = st.sampled_from(
    [b"--xyz", b"--xyz--", b"\r\n", b"\r", b"\n", b"--", b"x", b":", b'"', b";", b"=", b"\0", b"\xff"]
)
headers = st.sampled_from(
    [b"Content-Disposition: form-data", b'; name="prompt"', b"; name=image", b'; filename="a"', b"; filename*=utf-8''a"]
)


@quick
@given(content=st.lists(pieces | headers | st.binary(max_size=9), max_size=30).map(b"".join), opened=st.booleans())
def test_no_form_causes_a_server_error(content: bytes, opened: bool) -> None:
    answer = post(content=b"--xyz\r\n" * opened + content, headers=FORM)
    assert answer.status_code in (200, 400, 413, 422), answer.text


@quick
@given(kind=st.text('multipart/form-data;="\\ *boundary', max_size=60).map("multipart/form-data;".__add__))
def test_no_content_type_causes_a_server_error(kind: str) -> None:
    answer = post(content=form(part(b"a")), headers={"Content-Type": kind})
    assert answer.status_code in (200, 400, 413, 415, 422), answer.text


@quick
@given(content=st.lists(pieces | st.binary(max_size=9), max_size=30).map(b"".join))
def test_a_file_arrives_unchanged(content: bytes) -> None:
    assume(b"\r\n--xyz" not in b"\r\n" + content)
    file = part(content, name="image", filename="a.png")
    answer = post(content=form(part(b"a"), file), headers=FORM)
    if content:
        assert taken(answer)["image"] == described(content)
    else:
        check_refused(answer, 422, "at least 1 byte", field="image")
