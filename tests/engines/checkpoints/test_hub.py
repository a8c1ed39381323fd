"""Checkpoints are downloaded from the hub: no more than is needed, of one commit."""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import socket
import subprocess
import sys
import threading
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import pytest

from engines.checkpoints.find import find_checkpoint
from tests import ROOT
from tests.support.checkpoints import PARTS, Families, edit, pickle_weights
from tests.support.ldm import write_single_file
from tests.support.tiny import make_decoder


class Hub(ThreadingHTTPServer):
    """A fake hub that serves snapshot downloads: revisions, their files, and the files' contents."""

    daemon_threads = True

    def __init__(self) -> None:
        super().__init__(("127.0.0.1", 0), HubHandler)
        self.models: dict[str, dict[str, Path]] = {}  # folders by model and revision
        self.private: set[str] = set()
        self.fetched: list[str] = []
        self.tokens: set[str | None] = set()

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.server_port}"

    def commit(self, model: str, revision: str) -> str | None:
        """Return the commit of a revision, or of a commit itself."""
        commits = {name: hashlib.sha1(f"{model}@{name}".encode()).hexdigest() for name in self.models[model]}  # noqa: S324 - a commit's name
        return revision if revision in commits.values() else commits.get(revision)

    def folder(self, model: str, commit: str) -> Path:
        return next(path for name, path in self.models[model].items() if self.commit(model, name) == commit)


class HubHandler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    server: Hub

    def do_HEAD(self) -> None:
        self.do_GET()

    def do_GET(self) -> None:
        self.server.tokens.add(self.headers.get("Authorization"))
        path = self.path.split("?")[0].strip("/")
        model, _, rest = path.removeprefix("api/models/").partition("/")
        name, _, rest = rest.partition("/")
        model = f"{model}/{name}"
        if model not in self.server.models or (model in self.server.private and not self.headers.get("Authorization")):
            self.answer(401, b"{}", {"X-Error-Code": "RepoNotFound"})
            return
        kind, _, rest = rest.partition("/")
        revision, _, file = rest.partition("/")
        commit = self.server.commit(model, revision)
        if commit is None:
            self.answer(404, b"{}", {"X-Error-Code": "RevisionNotFound"})
        elif kind == "resolve":
            self.content(self.server.folder(model, commit), file, commit)
        else:
            listed = self.listing(self.server.folder(model, commit))
            info = {"id": model, "sha": commit, "siblings": [{"rfilename": entry["path"]} for entry in listed]}
            self.answer(
                200, json.dumps(listed if kind == "tree" else info).encode(), {"Content-Type": "application/json"}
            )

    def listing(self, folder: Path) -> list[dict[str, Any]]:
        files = [path for path in sorted(folder.rglob("*")) if path.is_file()]
        return [
            {
                "type": "file",
                "path": path.relative_to(folder).as_posix(),
                "size": path.stat().st_size,
                "oid": digest(path),
            }
            for path in files
        ]

    def content(self, folder: Path, file: str, commit: str) -> None:
        if self.command == "GET":
            self.server.fetched.append(file)
        path = folder / file
        self.answer(200, path.read_bytes(), {"ETag": f'"{digest(path)}"', "X-Repo-Commit": commit})

    def answer(self, status: int, body: bytes, headers: dict[str, str]) -> None:
        self.send_response(status)
        for name, value in {**headers, "Content-Length": str(len(body))}.items():
            self.send_header(name, value)
        self.end_headers()
        if self.command == "GET":
            self.wfile.write(body)

    def log_message(self, *_: object) -> None: ...


def digest(path: Path) -> str:
    return hashlib.sha1(path.read_bytes()).hexdigest()  # noqa: S324 - git's name of a file


@pytest.fixture
def hub() -> Iterator[Hub]:
    with Hub() as server:
        thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.05})
        thread.start()
        yield server
        server.shutdown()
        thread.join()


# The client reads its endpoint and cache directory on import, so each test runs a process of its own, without torch.
FIND = """
import json, sys
from contextlib import contextmanager
from engines.errors import CheckpointError
from engines.checkpoints.find import find_checkpoint

class Recorder:
    def __init__(self): self.seen = {"stages": [], "bytes": [], "notes": []}
    @contextmanager
    def stage(self, name): self.seen["stages"].append(name); yield self
    def update(self, done, total): self.seen["bytes"].append([done, total])
    def note(self, text): self.seen["notes"].append(text)

outcomes = []
for arguments in json.loads(sys.argv[1]):
    progress = Recorder()
    try:
        checkpoint = find_checkpoint(arguments.pop("model"), progress=progress, **arguments)
        outcome = {"name": checkpoint.name, "folder": str(checkpoint.config.folder), "sha256": checkpoint.source.sha256}
    except CheckpointError as error:
        outcome = {"error": str(error)}
    outcomes.append(outcome | progress.seen)
assert not {"torch", "diffusers", "transformers"} & set(sys.modules)
print(json.dumps(outcomes))
"""


@pytest.fixture
def ask(tmp_path: Path) -> Callable[..., list[dict[str, Any]]]:
    """Run `find_checkpoint` with each set of arguments, in one process that knows the hub at a URL."""

    def ask(url: str, *calls: dict[str, Any], token: str = "", offline: bool = False) -> list[dict[str, Any]]:
        environment = {name: value for name, value in os.environ.items() if "proxy" not in name.lower()}
        environment |= {"HF_ENDPOINT": url, "HF_HOME": str(tmp_path / "home"), "HF_TOKEN": token}
        environment |= {"HF_HUB_OFFLINE": "1"} if offline else {}
        command = [sys.executable, "-c", FIND, json.dumps(calls)]
        ended = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, check=False)  # noqa: S603 - our own
        assert ended.returncode == 0, ended.stderr
        assert not ended.stderr
        outcomes: list[dict[str, Any]] = json.loads(ended.stdout)
        return outcomes

    return ask


Ask = Callable[..., list[dict[str, Any]]]


@pytest.fixture
def published(copied: Path) -> Path:
    """A checkpoint with the other files that hub repositories hold."""
    for extra in ("README.md", "unet/diffusion_pytorch_model.fp16.safetensors", "safety_checker/model.safetensors"):
        (copied / extra).parent.mkdir(exist_ok=True)
        (copied / extra).write_bytes(b"not needed")
    shutil.copy(copied / "vae/config.json", copied / "safety_checker/config.json")
    (copied / "unet/diffusion_pytorch_model.bin").write_bytes(b"a pickle next to safetensors")
    return copied


def test_a_hub_checkpoint_is_downloaded_pinned_and_counted(
    hub: Hub, ask: Ask, published: Path, families: Families
) -> None:
    hub.models["us/tiny"] = {"main": published, "v1": families("sd15")}
    main, again, pinned, unknown = ask(
        hub.url,
        {"model": "us/tiny"},
        {"model": "us/tiny"},
        {"model": "us/tiny", "revision": "v1"},
        {"model": "us/tiny", "revision": "v2"},
    )
    assert main["name"] == "us/tiny"
    assert main["sha256"] == again["sha256"] == find_checkpoint(str(published)).source.sha256
    assert pinned["sha256"] == find_checkpoint(str(families("sd15"))).source.sha256
    assert "us/tiny has no revision 'v2'" in unknown["error"]
    weights = sum(path.stat().st_size for path in published.glob("[tuv]*/*model.safetensors"))
    assert main["stages"] == ["downloading us/tiny"] * 2
    assert main["bytes"][-1] == [weights, weights]
    assert not again["bytes"]
    extra = {"README.md", "diffusion_pytorch_model.fp16.safetensors", "diffusion_pytorch_model.bin", "safety_checker"}
    assert not extra & {name for file in hub.fetched for name in file.split("/")}
    assert max(Counter(hub.fetched).values()) == 2  # once for each revision
    assert hub.tokens == {None}


def test_unsupported_models_are_refused_before_their_weights_are_downloaded(
    hub: Hub, ask: Ask, published: Path
) -> None:
    edit(published / "model_index.json", _class_name="StableDiffusion3Pipeline")
    hub.models["us/xl"] = {"main": published}
    (outcome,) = ask(hub.url, {"model": "us/xl"})
    assert "us/xl is a StableDiffusion3Pipeline" in outcome["error"]
    assert hub.fetched
    assert not [file for file in hub.fetched if file.endswith(".safetensors")]


def test_every_part_of_two_encoders_is_downloaded(hub: Hub, ask: Ask, copied_xl: Path) -> None:
    as_variant(copied_xl, "fp16", (*PARTS, "text_encoder_2"))
    hub.models["us/xl"] = {"main": copied_xl}
    plain, half = ask(hub.url, {"model": "us/xl"}, {"model": "us/xl", "variant": "fp16"})
    assert "us/xl has no .safetensors weights for text_encoder, unet, vae, text_encoder_2." in plain["error"]
    assert "It has the variants fp16: pass one as --variant fp16." in plain["error"]
    assert half["sha256"] == find_checkpoint(str(copied_xl), variant="fp16").source.sha256
    assert {"text_encoder_2/model.fp16.safetensors", "text_encoder_2/config.json", "tokenizer_2/tokenizer.json"} <= {
        *hub.fetched
    }


def test_pickles_are_downloaded_only_with_allow_pickle(hub: Hub, ask: Ask, copied: Path) -> None:
    pickle_weights(copied)
    hub.models["us/pickled"] = {"main": copied}
    (refused,) = ask(hub.url, {"model": "us/pickled"})
    assert "us/pickled has no .safetensors weights for text_encoder, unet, vae" in refused["error"]
    assert "pass --allow-pickle" in refused["error"]
    assert not [file for file in hub.fetched if file.endswith(".bin")]
    (allowed,) = ask(hub.url, {"model": "us/pickled", "allow_pickle": True})
    assert allowed["sha256"] == find_checkpoint(str(copied), allow_pickle=True).source.sha256
    assert len(allowed["notes"]) == 3


def test_a_private_checkpoint_needs_a_token(hub: Hub, ask: Ask, published: Path) -> None:
    hub.models["us/secret"] = {"main": published}
    hub.private.add("us/secret")
    (refused,) = ask(hub.url, {"model": "us/secret"})
    assert "set HF_TOKEN" in refused["error"]
    (allowed,) = ask(hub.url, {"model": "us/secret"}, token="hf_of_a_test")  # noqa: S106 - opens nothing
    assert allowed["name"] == "us/secret"
    assert hub.tokens == {None, "Bearer hf_of_a_test"}


def test_a_single_files_configs_come_from_the_hub(
    hub: Hub, ask: Ask, published: Path, families: Families, tmp_path: Path
) -> None:
    """Those of SD 1.x and of SDXL are known."""
    path = write_single_file(published, tmp_path / "one.safetensors")
    xl = write_single_file(families("xl"), tmp_path / "xl.safetensors")
    hub.models |= {
        "us/tiny": {"main": published},
        "stable-diffusion-v1-5/stable-diffusion-v1-5": {"main": published},
        "stabilityai/stable-diffusion-xl-base-1.0": {"main": families("xl")},
    }
    calls = ({"model": str(path), "config": "us/tiny"}, {"model": str(path)}, {"model": str(xl)})
    given, default, of_xl = ask(hub.url, *calls)
    assert given["sha256"] == default["sha256"] == find_checkpoint(str(path), config=str(published)).source.sha256
    assert of_xl["sha256"] == find_checkpoint(str(xl), config=str(families("xl"))).source.sha256
    assert not [file for file in hub.fetched if file.endswith((".safetensors", ".bin"))]


def test_a_decoder_comes_from_the_hub(hub: Hub, ask: Ask, copied: Path, tmp_path: Path) -> None:
    decoder = make_decoder(tmp_path / "decoder")
    (decoder / "taesd_decoder.safetensors").write_bytes(b"not needed")
    hub.models["us/taesd"] = {"main": decoder}
    (outcome,) = ask(hub.url, {"model": str(copied), "decoder": "us/taesd"})
    assert outcome["sha256"] == find_checkpoint(str(copied), decoder=str(decoder)).source.sha256
    assert hub.fetched == ["config.json", "diffusion_pytorch_model.safetensors"]
    edit(decoder / "config.json", _class_name="AutoencoderKL")
    hub.models["us/vae"] = {"main": decoder}
    (outcome,) = ask(hub.url, {"model": str(copied), "decoder": "us/vae"})
    assert "us/vae is of class AutoencoderKL" in outcome["error"]
    assert hub.fetched[2:] == ["config.json"]


def as_variant(folder: Path, variant: str, parts: Sequence[str] = PARTS) -> None:
    """Rename the weights of `parts` to those of a variant."""
    for part in parts:
        for path in (folder / part).glob("*model.safetensors"):
            path.rename(path.with_name(f"{path.stem}.{variant}.safetensors"))


def test_only_the_weights_of_the_variant_are_downloaded(hub: Hub, ask: Ask, copied: Path) -> None:
    """Parts that lack it have their plain weights, as in diffusers."""
    shutil.copy(copied / "unet/diffusion_pytorch_model.safetensors", copied / "unet/plain")
    as_variant(copied, "non_ema", ["unet"])
    (copied / "unet/plain").rename(copied / "unet/diffusion_pytorch_model.safetensors")
    hub.models["us/tiny"] = {"main": copied}
    (found,) = ask(hub.url, {"model": "us/tiny", "variant": "non_ema"})
    assert found["sha256"] == find_checkpoint(str(copied), variant="non_ema").source.sha256
    assert sorted(file for file in hub.fetched if file.endswith(".safetensors")) == [
        "text_encoder/model.safetensors",
        "unet/diffusion_pytorch_model.non_ema.safetensors",
        "vae/diffusion_pytorch_model.safetensors",
    ]


def test_variants_that_the_hub_has_are_named(hub: Hub, ask: Ask, copied: Path) -> None:
    as_variant(copied, "fp16")
    hub.models["us/half"] = {"main": copied}
    plain, other, half = ask(
        hub.url,
        {"model": "us/half"},
        {"model": "us/half", "variant": "bf16"},
        {"model": "us/half", "variant": "fp16"},
    )
    assert "us/half has no .safetensors weights for text_encoder, unet, vae" in plain["error"]
    assert "us/half has no weights of the variant bf16" in other["error"]
    for refused in (plain, other):
        assert "It has the variants fp16: pass one as --variant fp16." in refused["error"]
    assert half["sha256"] == find_checkpoint(str(copied), variant="fp16").source.sha256


def test_without_the_network_the_cache_is_used(hub: Hub, ask: Ask, published: Path) -> None:
    hub.models |= {"us/tiny": {"main": published}, "us/other": {"main": published}}
    (found,) = ask(hub.url, {"model": "us/tiny"})
    fetched = len(hub.fetched)
    cached, variant, other = ask(
        hub.url,
        {"model": "us/tiny"},
        {"model": "us/tiny", "variant": "fp16"},
        {"model": "us/other"},
        offline=True,
    )
    assert cached["sha256"] == found["sha256"]
    assert cached["stages"] == ["looking up us/tiny"] * 2
    for model, refused in (("us/tiny", variant), ("us/other", other)):
        assert refused["error"].startswith(f"{model} is no folder here, and the hub's cache, to which HF_HUB_OFFLINE")
    assert len(hub.fetched) == fetched


def test_an_unreachable_hub_is_explained(ask: Ask, families: Families, tmp_path: Path) -> None:
    path = write_single_file(families("sd1"), tmp_path / "one.safetensors")
    with closed_port() as url:
        model, configs = ask(url, {"model": "us/tiny"}, {"model": str(path)})
    assert model["error"].startswith("us/tiny could not be downloaded")
    assert "check the name and the network" in model["error"]
    assert "The configs that describe one.safetensors are missing" in configs["error"]
    assert "Pass --config DIR" in configs["error"]


@contextmanager
def closed_port() -> Iterator[str]:
    """A URL of a port that is reserved and refuses connections."""
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        yield f"http://127.0.0.1:{taken.getsockname()[1]}"
