"""Any input gives an image or a 4xx error that names the problem, and the server keeps running.

A damaged bundle is rejected before any of it is loaded.
"""

from __future__ import annotations

import base64
import json
import shutil
import socket
import struct
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import httpx
import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from engines.limits import PROMPT_LENGTH
from engines.manifest import FORMAT
from server.api.bodies import MAX_BODY, MAX_COMMAS
from server.requests.images import encode
from server.requests.schemas import MAX_SEED, GenerateRequest
from server.requests.uploads import MAX_FILE
from tests.support.serving import Serving, run_server

JSON = {"Content-Type": "application/json"}
QUICK = {"prompt": "a red cat", "num_inference_steps": 1}

BOUNDS: dict[str, tuple[int, int]] = {
    "width": (8, 8192),
    "height": (8, 8192),
    "num_inference_steps": (1, 200),
    "guidance_scale": (0, 50),
    "seed": (0, MAX_SEED),
    "num_images": (1, 64),
    "preview_every": (0, 200),
    "clip_skip": (0, 64),
    "guidance_rescale": (0, 1),
    "eta": (0, 1),
    "strength": (0, 1),
}
FRACTIONS = ("guidance_scale", "guidance_rescale", "eta", "strength")
TEXTS = ("prompt", "negative_prompt")
CHOICES = ("image_format", "prompt_syntax", "sigmas", "timestep_spacing", "final_sigmas_type")


WRONG: list[tuple[str, Any]] = [
    *((field, value) for field in BOUNDS for value in (True, "20", [20], {"value": 20})),
    *((field, 20.0) for field in BOUNDS if field not in FRACTIONS),
    *((field, value) for field in (*TEXTS, "scheduler") for value in (1, True, ["a cat"], {"text": "a cat"})),
    *((field, value) for field in CHOICES for value in (1, True, "", "heun", ["png"])),
    ("prompt", None),
]


@pytest.fixture(scope="module", autouse=True)
def _unharmed(serving: Serving) -> Iterator[None]:
    yield
    assert serving.client.get("/v2/health/ready").status_code == 200
    assert serving.generate(**QUICK).status_code == 200
    assert not [line for line in serving.stderr if "Traceback" in line], "a refusal was logged as a fault"


def post(serving: Serving, body: bytes | Iterator[bytes], **headers: str) -> httpx.Response:
    return serving.client.post("/generate", content=body, headers={**JSON, **headers})


def check_refused(
    answer: httpx.Response, status: int, *, field: str | None = None, words: tuple[str, ...] = ()
) -> None:
    """`answer` is a problem document that says all of `words`, about `field` where there is one."""
    assert answer.status_code == status, answer.text[:500]
    assert answer.headers["Content-Type"] == "application/problem+json"
    document = answer.json()
    assert set(document) == {"type", "title", "status", "detail", "errors"}
    assert document["status"] == status
    assert document["title"]
    errors = {error["field"]: error["message"] for error in document["errors"]}
    if field is not None:
        assert field in errors
    message = errors.get(field, document["detail"]) if field else document["detail"]
    assert all(word in message for word in words), message


@pytest.mark.parametrize(("field", "value"), WRONG, ids=str)
def test_a_wrong_type_is_rejected(serving: Serving, field: str, value: Any) -> None:
    check_refused(serving.generate(**{**QUICK, field: value}), 422, field=field, words=("should be",))


@pytest.mark.parametrize(
    ("fields", "words"),
    [
        ({"scheduler": ""}, "unknown scheduler ''"),
        ({"scheduler": "dpm++ 2m caras"}, "did you mean dpmpp_2m"),
        ({"scheduler": "DPM++ SDE Karras"}, "take dpmpp_2m_sde"),
        ({"scheduler": "ddim", "sigmas": "karras"}, "ddim has no karras levels"),
        ({"scheduler": "euler_karras", "sigmas": "beta"}, "leave one of them out"),
        ({"scheduler": "euler", "eta": 0.5}, "euler has no eta"),
        ({"scheduler": "x" * 65}, "at most 64 characters"),
    ],
)
def test_an_unavailable_scheduler_is_answered_with_an_alternative(
    serving: Serving, fields: dict[str, Any], words: str
) -> None:
    check_refused(serving.generate(**{**QUICK, **fields}), 422, field="scheduler", words=(words,))


@pytest.mark.parametrize(
    "fields", [{"guidance_start": 1.0}, {"guidance_end": 0.0}, {"guidance_start": 0.7, "guidance_end": 0.2}]
)
def test_an_empty_guidance_interval_is_rejected(serving: Serving, fields: dict[str, float]) -> None:
    check_refused(serving.generate(**{**QUICK, **fields}), 422)


@pytest.mark.parametrize("field", BOUNDS)
def test_an_out_of_range_value_names_the_bound(serving: Serving, field: str) -> None:
    least, most = BOUNDS[field]
    beyond = 0.001 if field in FRACTIONS else 1
    check_refused(serving.generate(**{**QUICK, field: least - beyond}), 422, field=field, words=(f"equal to {least}",))
    check_refused(serving.generate(**{**QUICK, field: most + beyond}), 422, field=field, words=(f"equal to {most}",))


@pytest.mark.parametrize("field", BOUNDS)
def test_a_bound_itself_is_allowed(field: str) -> None:
    for value in BOUNDS[field]:
        body = GenerateRequest.model_validate_json(json.dumps({"prompt": "", field: value}))
        assert getattr(body, field) == value


@pytest.mark.parametrize("field", TEXTS)
def test_a_long_text_is_rejected_and_not_echoed(serving: Serving, field: str) -> None:
    assert serving.generate(**{**QUICK, field: "x" * PROMPT_LENGTH}).status_code == 200
    answer = serving.generate(**{**QUICK, field: "x" * (PROMPT_LENGTH + 1)})
    check_refused(answer, 422, field=field, words=(str(PROMPT_LENGTH),))
    assert "xx" not in answer.text


@pytest.mark.parametrize("number", ["NaN", "Infinity", "-Infinity", "1e999", "-1e999"])
def test_guidance_is_finite(serving: Serving, number: str) -> None:
    answer = post(serving, f'{{"prompt": "", "guidance_scale": {number}}}'.encode())
    check_refused(answer, 422, field="guidance_scale", words=("finite",))


def test_the_prompt_is_required(serving: Serving) -> None:
    check_refused(serving.generate(), 422, field="prompt", words=("required",))


def test_an_unknown_field_is_named(serving: Serving) -> None:
    check_refused(serving.generate(**QUICK, steps=20), 422, field="steps", words=("use num_inference_steps",))


def test_an_unsupported_size_lists_the_supported_ones(serving: Serving) -> None:
    answer = serving.generate(**QUICK, width=64)
    check_refused(answer, 422, field="width", words=("32x32, 48x32", "64x32"))
    check_refused(answer, 422, field="height")


def test_too_many_images_name_the_row_limit(serving: Serving) -> None:
    check_refused(serving.generate(**QUICK, num_images=5), 422, field="num_images", words=("10 UNet rows", "take 8"))


def test_an_image_file_holds_one_image(serving: Serving) -> None:
    answer = post(serving, json.dumps({**QUICK, "num_images": 2}).encode(), Accept="image/png")
    check_refused(answer, 422, field="num_images", words=("application/json",))


@pytest.mark.parametrize(
    "name", ["x" * 60_000, "\n" * 9_000, "é" * 9_000, "a.b", "", "\0"], ids=lambda name: repr(name[:3])
)
def test_a_long_field_name_is_not_echoed(serving: Serving, name: str) -> None:
    answer = serving.generate(**{**QUICK, name: 1})
    check_refused(answer, 422)
    assert all(len(error["field"]) <= 200 for error in answer.json()["errors"])
    assert len(answer.json()["detail"]) < 500


def test_many_errors_give_a_short_response(serving: Serving) -> None:
    answer = serving.generate(**{f"field{index}": index for index in range(3000)})
    check_refused(answer, 422)
    assert len(answer.content) < 5000


NOT_JSON = {
    "empty": b"",
    "truncated": b'{"prompt": "a red c',
    "two documents": b'{"prompt": ""}{"prompt": ""}',
    "trailing comma": b'{"prompt": "",}',
    "byte-order mark": b'\xef\xbb\xbf{"prompt": ""}',
    "UTF-16": '{"prompt": ""}'.encode("utf-16"),
    "not UTF-8": b'{"prompt": "\xff\xfe"}',
    "a raw NUL": b'{"prompt": "\0"}',
    "a lone high surrogate": rb'{"prompt": "\ud800"}',
    "a lone low surrogate": rb'{"prompt": "\udc00 cat"}',
    "a surrogate as a name": rb'{"\ud800": 1}',
    "a number of 5000 digits": b'{"prompt": "", "seed": ' + b"9" * 5000 + b"}",
    "30000 open brackets": b'{"prompt": ' + b"[" * 30_000,
    "30000 nested lists": b'{"prompt": ' + b"[" * 30_000 + b"]" * 30_000 + b"}",
    "10000 nested objects": b'{"a":' * 10_000 + b"1" + b"}" * 10_000,
}


@pytest.mark.parametrize("body", NOT_JSON.values(), ids=NOT_JSON)
def test_invalid_json_is_malformed(serving: Serving, body: bytes) -> None:
    check_refused(post(serving, body), 400, words=("Invalid JSON",))


@pytest.mark.parametrize("body", [b"null", b"[]", b'[{"prompt": ""}]', b'"a red cat"', b"1", b"true", b"1e999"])
def test_a_body_must_be_an_object(serving: Serving, body: bytes) -> None:
    check_refused(post(serving, body), 422, field="body", words=("object",))


def test_of_duplicate_keys_the_last_counts(serving: Serving) -> None:
    answer = post(serving, b'{"prompt": "a cat", "num_inference_steps": 1, "prompt": "a boat"}')
    assert answer.status_code == 200
    assert answer.json()["parameters"]["prompt"] == "a boat"


@pytest.mark.parametrize(
    "prompt",
    [
        "",
        " ",
        "\0",
        "a\0cat",
        "\x1b[31mred\x7f",
        "\u202e\ufeff\ufffe",
        "🐈" * 300,
        "e" + "\u0301" * 500,
        "<|endoftext|>",
    ],
    ids=ascii,
)
def test_any_text_is_a_prompt(serving: Serving, prompt: str) -> None:
    answer = serving.generate(**{**QUICK, "prompt": prompt, "negative_prompt": prompt})
    assert answer.status_code == 200, answer.text[:500]
    assert answer.json()["parameters"]["prompt"] == prompt


def test_a_prompt_cannot_inject_events(serving: Serving) -> None:
    body = json.dumps({**QUICK, "prompt": "a cat\r\n\r\nevent: error\r\ndata: {}\r\n\r\n"}).encode()
    answer = post(serving, body, Accept="text/event-stream")
    assert "event: completed" in answer.text.splitlines()
    assert "event: error" not in answer.text.splitlines()


def padded(length: int) -> bytes:
    return json.dumps(QUICK).encode().ljust(length)


def in_chunks(body: bytes) -> Iterator[bytes]:
    yield from (body[start : start + 5000] for start in range(0, len(body), 5000))


@pytest.mark.parametrize("send", [lambda body: body, in_chunks], ids=["with Content-Length", "chunked"])
def test_the_body_size_is_limited(serving: Serving, send: Callable[[bytes], bytes | Iterator[bytes]]) -> None:
    assert post(serving, send(padded(MAX_BODY))).status_code == 200
    for length in (MAX_BODY + 1, 2 * MAX_BODY):
        check_refused(post(serving, send(padded(length))), 413, words=(str(MAX_BODY),))
    check_refused(post(serving, send(b'{"prompt": [' + b"1," * (MAX_COMMAS + 1))), 413, words=(str(MAX_COMMAS),))


HEART = encode(np.full((40, 64, 3), (200, 30, 30), np.uint8), "png")
PICTURES = {
    "no picture": (b"a red cat", "PNG, JPEG or WebP"),
    "a GIF": (b"GIF89a\1\0\1\0\0\0\0;", "PNG, JPEG or WebP"),
    "truncated": (HEART[:60], "truncated"),
    "30000 pixels wide": (HEART[:16] + struct.pack(">I", 30_000) + HEART[20:], "damaged"),
    "twelve megabytes of nothing": (bytes(MAX_FILE), "PNG, JPEG or WebP"),
    "more than that": (bytes(MAX_FILE + 1), str(MAX_FILE)),
}


@pytest.mark.parametrize(("file", "word"), PICTURES.values(), ids=PICTURES)
@pytest.mark.parametrize("field", ["image", "mask"])
def test_an_unreadable_image_is_rejected(serving: Serving, field: str, file: bytes, word: str) -> None:
    files = {"image": HEART, field: file}
    as_json = serving.generate(**QUICK, **{name: base64.b64encode(content).decode() for name, content in files.items()})
    check_refused(as_json, 422, field=field, words=(word,))
    as_form = serving.client.post("/generate", data=QUICK, files={name: (name, files[name]) for name in files})
    check_refused(as_form, 422, field=field, words=(word,))


@pytest.mark.parametrize("url", ["http://127.0.0.1:1/cat.png", "file:///etc/passwd", "gopher:cat"])
def test_an_image_url_is_not_fetched(serving: Serving, url: str) -> None:
    check_refused(serving.generate(**QUICK, image=url), 422, field="image", words=("not fetched",))


def test_an_image_is_not_echoed(serving: Serving) -> None:
    answer = serving.generate(**QUICK, image="QUJD" * 1000 + "!")
    check_refused(answer, 422, field="image", words=("base64",))
    assert "QUJD" not in answer.text


def test_a_form_is_validated_as_strictly_as_json(serving: Serving) -> None:
    form = {"prompt": (None, "a red cat"), "num_inference_steps": (None, "one")}
    check_refused(serving.client.post("/generate", files=form), 422, field="num_inference_steps", words=("integer",))
    form["num_inference_steps"] = (None, "1")
    assert serving.client.post("/generate", files=form).status_code == 200
    foreign = serving.client.post("/generate", files=form, headers={"Origin": "https://elsewhere.example"})
    check_refused(foreign, 403, words=("another origin",))


@pytest.mark.parametrize("body", [b"", b"--xyz", b"--abc\r\n", b"--xyz\r\n\r\n", b"\xff" * 5000])
def test_an_invalid_form_is_malformed(serving: Serving, body: bytes) -> None:
    answer = post(serving, body, **{"Content-Type": "multipart/form-data; boundary=xyz"})
    check_refused(answer, 400, words=("Invalid form",))


def test_a_disconnect_within_a_body_is_not_an_error(serving: Serving) -> None:
    address = (serving.client.base_url.host, serving.client.base_url.port)
    with socket.create_connection(address) as connection:
        connection.sendall(b"POST /generate HTTP/1.1\r\nHost: localhost\r\nContent-Type: application/json\r\n")
        connection.sendall(b'Content-Length: 100\r\n\r\n{"prompt": "a red c')
        assert serving.client.get("/v2/health/live").status_code == 200
    assert serving.generate(**QUICK).status_code == 200
    assert not [line for line in serving.stderr if "Traceback" in line]


@pytest.mark.parametrize(
    "kind", ["", "text/plain", "application/x-www-form-urlencoded", "application/jsonp", ";", "x" * 5000]
)
def test_other_content_types_are_rejected(serving: Serving, kind: str) -> None:
    answer = post(serving, json.dumps(QUICK).encode(), **{"Content-Type": kind})
    check_refused(answer, 415, words=("application/json",))


@pytest.mark.parametrize(
    "accept", ["text/html", "image/gif", ",;,;q=", "*/*;q=0", "image/png;q=two", "x" * 60_000, "/"]
)
def test_an_unsupported_accept_header_is_rejected(serving: Serving, accept: str) -> None:
    check_refused(
        post(serving, json.dumps(QUICK).encode(), Accept=accept), 406, words=("image/png", "text/event-stream")
    )


@pytest.mark.parametrize(
    ("accept", "kind"),
    [
        ("image/png;q=0.1, application/json;q=0.9", "application/json"),
        ("application/json;q=0.1, image/webp", "image/webp"),
        ("image/jpeg;q=0.5;level=1, */*;q=0.1", "image/jpeg"),
        ("text/html, IMAGE/*;Q=0.8, text/event-stream;q=0.2", "image/png"),
        (",,image/avif,,;;,*/*;q=0.001", "application/json"),
        ("image/png;q=99, image/webp;q=0.1", "image/webp"),
    ],
)
def test_the_preferred_media_type_is_sent(serving: Serving, accept: str, kind: str) -> None:
    answer = post(serving, json.dumps(QUICK).encode(), Accept=accept)
    assert answer.status_code == 200
    assert answer.headers["Content-Type"] == kind


@pytest.mark.parametrize("path", ["/generat", "/generate/1", "/v3", "/%00", "/..%2f..%2fetc/passwd", "/" + "x" * 5000])
def test_an_unknown_path_is_not_found(serving: Serving, path: str) -> None:
    check_refused(serving.client.get(path), 404)


@pytest.mark.parametrize(
    ("method", "path", "allowed"), [("GET", "/generate", "POST"), ("POST", "/metrics", "GET, HEAD")]
)
def test_a_wrong_method_lists_the_allowed_ones(serving: Serving, method: str, path: str, allowed: str) -> None:
    answer = serving.client.request(method, path)
    check_refused(answer, 405)
    assert sorted(answer.headers["Allow"].split(", ")) == allowed.split(", ")


@pytest.mark.parametrize("given", [b"", b"a b", b"\xff\xfe", b"<script>", b"a,b", b"x" * 129])
def test_an_invalid_request_id_is_replaced(serving: Serving, given: bytes) -> None:
    answer = serving.client.post("/generate", json=QUICK, headers={b"X-Request-Id": given})
    assert answer.status_code == 200
    assert answer.headers["X-Request-Id"] == answer.json()["id"]
    assert answer.json()["id"].isalnum()
    assert answer.json()["id"].encode() != given


@pytest.mark.parametrize("given", ["7", "trace-01.span_2", "x" * 128])
def test_a_request_id_is_kept(serving: Serving, given: str) -> None:
    answer = post(serving, json.dumps(QUICK).encode(), **{"X-Request-Id": given})
    assert answer.headers["X-Request-Id"] == answer.json()["id"] == given


any_text = st.text(st.characters(exclude_categories=()), max_size=40)  # with lone surrogates
any_value = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | any_text,
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(any_text, inner, max_size=4),
    max_leaves=8,
)
plausible = st.fixed_dictionaries(
    {"prompt": any_text},
    optional={
        "negative_prompt": any_text,
        "width": st.sampled_from([32, 48, None]),
        "guidance_scale": st.floats(0, 50),
        "seed": st.integers(0, MAX_SEED),
        "num_images": st.integers(1, 5),
        "scheduler": st.sampled_from(["ddim", "dpmpp_2m_karras", "euler_ancestral", "pndm"]),
        "image_format": st.sampled_from(["png", "jpeg", "webp"]),
        "preview_every": st.integers(0, 200),
    },
)
implausible = st.dictionaries(st.sampled_from(list(GenerateRequest.model_fields)) | any_text, any_value, max_size=2)
accepts = st.sampled_from(["*/*", "application/json", "image/png", "image/jpeg", "image/webp", "text/event-stream"])
bounded = settings(
    max_examples=100, deadline=None, derandomize=True, database=None, suppress_health_check=[HealthCheck.too_slow]
)


@bounded
@given(likely=plausible, unlikely=implausible, accept=accepts)
def test_no_field_value_causes_a_server_error(serving: Serving, likely: Any, unlikely: Any, accept: str) -> None:
    body = json.dumps({**likely, **unlikely, "num_inference_steps": 1}).encode()
    answer = post(serving, body, Accept=accept)
    assert answer.status_code < 500
    assert "event: error" not in answer.text.splitlines()


@bounded
@given(body=any_value.map(lambda value: json.dumps(value).encode()) | st.binary(max_size=200))
def test_no_body_causes_a_server_error(serving: Serving, body: bytes) -> None:
    assert 400 <= post(serving, body).status_code < 500


@bounded
@given(accept=st.text("*/;,=q01.9 \tapplication/json", max_size=60), kind=st.text("/;=application/json", max_size=40))
def test_no_header_causes_a_server_error(serving: Serving, accept: str, kind: str) -> None:
    answer = post(serving, b"{}", **{"Accept": accept.strip(), "Content-Type": kind})
    assert 400 <= answer.status_code < 500


def rewrite(bundle: Path, change: Callable[[Any], object]) -> None:
    file = bundle / "manifest.json"
    manifest = json.loads(file.read_text())
    change(manifest)
    file.write_text(json.dumps(manifest))


def alter(file: Path) -> None:
    content = bytearray(file.read_bytes())
    content[len(content) // 2] ^= 1
    file.write_bytes(content)


def truncate(file: Path) -> None:
    file.write_bytes(file.read_bytes()[:-1])


def swap(one: Path, other: Path) -> None:
    first, second = one.read_bytes(), other.read_bytes()
    one.write_bytes(second)
    other.write_bytes(first)


def leave(manifest: Any, path: str) -> None:
    manifest["graphs"]["denoise"]["onnx"]["fp32"]["files"][0]["path"] = path


SPOILT: dict[str, tuple[Callable[[Path], object], tuple[str, ...]]] = {
    "a graph is missing": (lambda b: (b / "onnx/decode.onnx").unlink(), ("decode.onnx", "is missing")),
    "one bit is altered": (lambda b: alter(b / "onnx/denoise.onnx"), ("denoise.onnx", "not the file that was built")),
    "a file is truncated": (
        lambda b: truncate(b / "tokenizer.json"),
        ("tokenizer.json", "bytes, and", "were built"),
    ),
    "two graphs are swapped": (
        lambda b: swap(b / "onnx/encode_prompt.onnx", b / "onnx/decode.onnx"),
        ("encode_prompt.onnx", "bytes, and", "were built"),
    ),
    "no manifest": (lambda b: (b / "manifest.json").unlink(), ("manifest.json", "build_engines.py")),
    "no bundle": (shutil.rmtree, ("manifest.json", "build_engines.py")),
    "the manifest is not JSON": (lambda b: (b / "manifest.json").write_text('{"format": 1'), ("manifest.json", "JSON")),
    "the manifest is not text": (lambda b: (b / "manifest.json").write_bytes(b"\xff\xfe"), ("manifest.json",)),
    "an unknown field": (lambda b: rewrite(b, lambda m: m.update(license="none")), ("manifest.json", "license")),
    "another format": (lambda b: rewrite(b, lambda m: m.update(format=FORMAT + 1)), ("manifest.json", "format")),
    "a graph is not named": (lambda b: rewrite(b, lambda m: m["graphs"].pop("denoise")), ("denoise",)),
    "a path climbs out": (lambda b: rewrite(b, lambda m: leave(m, "../denoise.onnx")), ("'../denoise.onnx' leaves",)),
    "a path is absolute": (lambda b: rewrite(b, lambda m: leave(m, "/etc/passwd")), ("'/etc/passwd' leaves",)),
}


@pytest.mark.parametrize(("spoil", "words"), SPOILT.values(), ids=SPOILT)
def test_a_damaged_bundle_is_rejected(
    bundle: Path, tmp_path: Path, spoil: Callable[[Path], object], words: tuple[str, ...]
) -> None:
    copy = tmp_path / "bundle"
    shutil.copytree(bundle, copy)
    spoil(copy)
    ended = run_server("--bundle", str(copy), "--port", "0")
    assert ended.returncode == 1
    assert ended.stdout == ""
    assert ended.stderr.startswith("error: ")
    assert ended.stderr.count("\n") == 1, ended.stderr
    assert all(word in ended.stderr for word in words), ended.stderr
