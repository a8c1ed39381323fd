"""Settings that are checked at the door."""

from __future__ import annotations

import pytest

from engines.cli import parse
from server.startup.settings import ServerSettings, unknown_variables
from tests.support.serving import run_server


@pytest.mark.parametrize(
    ("name", "advice"),
    [
        ("LATENTD_MAX_WATING", "did you mean LATENTD_MAX_WAITING?"),
        ("latentd_prot", "did you mean LATENTD_PORT?"),
        ("LATENTD_XYZZY", "see --help."),
    ],
)
def test_a_variable_that_is_no_setting_is_named(name: str, advice: str) -> None:
    (sentence,) = unknown_variables([name, "PATH", "LATENTD_PORT", "latentd_host"])
    assert sentence == f"{name} is no setting and has no effect: {advice}"


def test_a_misspelt_variable_is_reported_at_the_start() -> None:
    ended = run_server("--bundle", "/nowhere", LATENTD_MAX_WATING="3")
    assert ended.returncode == 1
    warning, error = ended.stderr.splitlines()
    assert "did you mean LATENTD_MAX_WAITING?" in warning
    assert error.startswith("error: ")


def test_origins_are_separated_by_commas(monkeypatch: pytest.MonkeyPatch) -> None:
    assert parse(ServerSettings, []).allowed_origins == ()
    origins = ("https://a.example", "http://localhost:3000")
    assert (
        parse(ServerSettings, ["--allowed-origins", "https://A.example, http://localhost:3000,"]).allowed_origins
        == origins
    )
    monkeypatch.setenv("LATENTD_ALLOWED_ORIGINS", ",".join(origins))
    assert parse(ServerSettings, []).allowed_origins == origins


@pytest.mark.parametrize(
    ("flag", "value"),
    [
        ("--allowed-origins", "https://a.example/page"),
        ("--allowed-origins", "a.example"),
        ("--allowed-origins", "https://a.example,ftp://b"),
        ("--trusted-proxies", "*"),
        ("--trusted-proxies", "proxy.example.com"),
        ("--trusted-proxies", "10.0.0.1/8"),
        ("--root-path", "images"),
        ("--root-path", "https://a.example/images"),
        ("--root-path", "/a b"),
        ("--root-path", "/ä"),
    ],
)
def test_what_is_no_origin_address_or_path_is_refused(
    flag: str, value: str, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit):
        parse(ServerSettings, [flag, value])
    assert capsys.readouterr().err.startswith(f"error: {flag}: ")


@pytest.mark.parametrize(("given", "path"), [("", ""), ("/", ""), ("/images", "/images"), ("/a/b.c/", "/a/b.c")])
def test_a_root_path_has_no_slash_at_its_end(given: str, path: str) -> None:
    assert parse(ServerSettings, ["--root-path", given]).root_path == path


def test_the_version_is_shown() -> None:
    ended = run_server("--version")
    assert ended.returncode == 0
    assert ended.stdout.startswith("latentd 0.")
