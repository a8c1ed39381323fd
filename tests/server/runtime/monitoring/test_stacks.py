"""What a hang leaves in the log."""

from __future__ import annotations

import threading

from server.runtime.monitoring.stacks import stacks


def test_every_thread_is_named_with_the_function_it_is_in() -> None:
    waits, goes_on = threading.Event(), threading.Event()

    def hang_in_the_driver() -> None:
        waits.set()
        goes_on.wait()

    thread = threading.Thread(target=hang_in_the_driver, name="executor")
    thread.start()
    waits.wait()
    found = stacks()
    goes_on.set()
    thread.join()
    assert "Thread executor:" in found
    assert "in hang_in_the_driver" in found
    assert "Thread MainThread:" in found
