"""How similar two images are, and a short comparison against a real server."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from benchmarks.server.step_cache import Rgb, StepCacheResults, main, ssim
from engines.demo import BUNDLE as DEMO
from tests.support.serving import Serving


def noise(seed: int) -> Rgb:
    image: Rgb = np.random.default_rng(seed).integers(0, 256, (48, 64, 3), np.uint8)
    return image


def test_identical_images_have_a_similarity_of_1() -> None:
    assert ssim(noise(1), noise(1)) == pytest.approx(1)


def test_similarity_falls_with_noise_and_hardly_with_brightness() -> None:
    y, x = np.mgrid[0:48, 0:64]
    image = np.stack([100 + 60 * np.sin(x / 5), 100 + 60 * np.cos(y / 7), 100 + x], axis=-1).astype(np.uint8)
    brighter = image + np.uint8(10)
    noisy = [(image + share * (noise(2) - 128.0) / 4).clip(0, 255).astype(np.uint8) for share in (0.2, 0.5, 1.0)]
    assert ssim(image, brighter) > 0.97
    similarity = [ssim(image, one) for one in noisy]
    assert similarity == sorted(similarity, reverse=True)
    assert abs(ssim(noise(1), noise(2))) < 0.05


def test_the_cache_of_a_real_server(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = tmp_path / "cache.json"
    with Serving(DEMO) as serving:
        words = [
            "--url",
            str(serving.client.base_url),
            "--out",
            str(out),
            "--scheduler",
            "dpmpp_2m",
            "--steps",
            "8",
            "--seeds",
            "2",
        ]
        assert main(words) == 0
    cases = StepCacheResults.model_validate_json(out.read_bytes()).cases
    assert [case.cache for case in cases] == ["fast", "faster"]
    for case in cases:
        assert [pair.seed for pair in case.pairs] == [1, 2]
        assert all(10 < pair.psnr < 99 for pair in case.pairs), "another image of the same subject"
    assert "dpmpp_2m" in capsys.readouterr().out


def test_no_server_answers(tmp_path: Path) -> None:
    assert main(["--url", "http://127.0.0.1:9", "--out", str(tmp_path / "none.json")]) == 2
    assert not (tmp_path / "none.json").exists()
