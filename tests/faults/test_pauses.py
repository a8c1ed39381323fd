"""A process that is paused under load, as a suspended machine is: its clocks go on, and nobody is at fault."""

from __future__ import annotations

import signal
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from engines.demo import BUNDLE as DEMO
from tests.server.test_lifecycle import unended
from tests.support.bare_server import wait_until
from tests.support.serving import Serving

pytestmark = pytest.mark.faults

_PAUSE = 20.0  # seconds, twice the watchdog's least limit


@pytest.mark.parametrize("bundle", [DEMO], ids=["demo"])
@pytest.mark.parametrize("draining", [False, True], ids=["serving", "draining"])
def test_a_pause_under_load_costs_nobody_anything(bundle: Path, *, draining: bool) -> None:
    """While it drains, the pause is longer than the drain may take."""
    with Serving(bundle, "--drain-seconds", "15", "--watchdog", "2") as serving, ThreadPoolExecutor(8) as pool:
        fields = {"prompt": "a red cat", "num_inference_steps": 10}
        answers = [pool.submit(serving.generate, **fields, seed=seed) for seed in range(8)]
        wait_until(lambda: unended(serving) == 8)
        if draining:
            serving.process.send_signal(signal.SIGTERM)
        serving.process.send_signal(signal.SIGSTOP)
        time.sleep(_PAUSE)
        assert not [answer for answer in answers if answer.done()], "nobody was paused: this proves nothing"
        serving.process.send_signal(signal.SIGCONT)
        assert [answer.result().status_code for answer in answers] == [200] * 8
        if not draining:
            assert serving.generate(**fields).status_code == 200
            assert serving.stop() == 0
        assert serving.process.wait(60) == 0
        assert not [line for line in serving.stderr if "took longer than" in line]
