"""The application of a service, without uvicorn."""

from __future__ import annotations

from pathlib import Path

import pytest
from starlette.testclient import TestClient

from engines.demo import BUNDLE as DEMO
from server.access.keys import KeyFileError
from server.startup.application import application
from server.startup.served_files import open_bundles
from server.startup.settings import ServerSettings
from server.startup.wiring import make_service


def test_the_application_answers_before_the_models_are_loaded() -> None:
    settings = ServerSettings(bundle=(str(DEMO),), backend="onnxruntime")
    app = application(make_service(open_bundles(settings), settings=settings), settings, loopback=True)()
    with TestClient(app, base_url="http://127.0.0.1", raise_server_exceptions=False) as client:
        assert client.get("/v2").json()["name"] == "latentd"
        assert client.get("/v2/health/ready").status_code == 503
        assert client.get("/v2", headers={"Host": "elsewhere.example"}).status_code == 421


def test_a_file_of_keys_that_is_missing_is_reported_before_the_application_is_made(tmp_path: Path) -> None:
    settings = ServerSettings(bundle=(str(DEMO),), backend="onnxruntime", api_keys=tmp_path / "none")
    service = make_service(open_bundles(settings), settings=settings)
    with pytest.raises(KeyFileError, match=r"server\.access NAME --file"):
        application(service, settings, loopback=True)
