"""Logging holds nobody up, whatever has become of standard error."""

from __future__ import annotations

import logging
import os
import subprocess
import sys
from collections.abc import Iterator
from contextlib import closing
from pathlib import Path
from typing import BinaryIO

import pytest

from server.startup.log_repeats import Repeats
from server.startup.logs import LogHandler
from tests import ROOT

PIPE = 65_536  # bytes that a pipe holds


_handlers: list[LogHandler] = []


@pytest.fixture(autouse=True)
def handlers_are_closed() -> Iterator[None]:
    yield
    while _handlers:
        _handlers.pop().close()


@pytest.fixture
def pipe() -> Iterator[tuple[BinaryIO, int]]:
    """What reads, and the descriptor that is written to."""
    reading, writing = os.pipe()
    with os.fdopen(reading, "rb") as reader:
        yield reader, writing


def test_a_closed_handler_writes_to_no_file_that_has_its_number(tmp_path: Path) -> None:
    """Others close the descriptor, and the next file that is opened has its number."""
    reading, writing = os.pipe()
    logger, handler = log_to(writing)
    os.close(writing)
    with (tmp_path / "file").open("wb", buffering=0) as file:
        assert file.fileno() == writing
        logger.info("for the pipe")
        handler.flush()
        handler.close()
        assert (tmp_path / "file").read_bytes() == b""
    assert os.read(reading, 100) == b"for the pipe\n"
    assert os.read(reading, 100) == b"", "its own descriptor is closed"
    os.close(reading)


def log_to(descriptor: int, *, most_waiting: int = 4096, burst: int = 10**9) -> tuple[logging.Logger, LogHandler]:
    """A logger of its own, whose handler is closed after the test."""
    logger = logging.Logger("test")
    handler = LogHandler(descriptor, most_waiting=most_waiting, repeats=Repeats(burst=burst))
    logger.addHandler(handler)
    _handlers.append(handler)
    return logger, handler


def run(code: str, *, shell: str = "") -> subprocess.CompletedProcess[str]:
    """Run `code` after `logs.start("info")`, with what the shell does to its standard error."""
    program = f"import logging\nfrom server.startup import logs\nlogs.start('info')\n{code}"
    command = ["sh", "-c", f'exec "$@" {shell}', "sh", sys.executable, "-c", program]
    return subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=60, check=False)  # noqa: S603 - our own


def test_messages_arrive_in_order(pipe: tuple[BinaryIO, int]) -> None:
    reader, writing = pipe
    logger, handler = log_to(writing)
    for number in range(100):
        logger.info("message %d", number)
    handler.close()
    os.close(writing)
    assert reader.read().decode() == "".join(f"message {number}\n" for number in range(100))
    assert handler.lost == 0


def test_an_unread_pipe_holds_nobody_up_and_the_lost_messages_are_counted(pipe: tuple[BinaryIO, int]) -> None:
    reader, writing = pipe
    logger, handler = log_to(writing, most_waiting=10)
    for number in range(2000):  # far more than a pipe and the queue hold
        logger.info("%d %s", number, "x" * 200)
    lost = handler.lost
    assert lost * 210 > 2000 * 200 - PIPE - 11 * 210
    assert reader.readline().startswith(b"0 "), "somebody reads again"
    while f"{lost} log messages were lost".encode() not in reader.readline():
        pass


def test_a_flood_is_a_few_lines(pipe: tuple[BinaryIO, int]) -> None:
    reader, writing = pipe
    logger, handler = log_to(writing, burst=5)
    for _ in range(50_000):
        logger.warning("Invalid HTTP request received.")
    handler.flush()
    handler.close()
    os.close(writing)
    lines = reader.read().decode().splitlines()
    assert lines[:5] == ["Invalid HTTP request received."] * 5
    assert lines[5:] == ["Invalid HTTP request received. (repeated 49,995 more times within 30 s)"]


def test_a_reader_that_is_gone_loses_messages_and_nothing_else(pipe: tuple[BinaryIO, int]) -> None:
    reader, writing = pipe
    logger, handler = log_to(writing)
    reader.close()
    logger.info("nobody hears this")
    handler.flush()
    assert handler.lost == 1


@pytest.mark.skipif(not os.path.exists("/dev/full"), reason="has no /dev/full")
def test_a_full_disk_loses_messages_and_nothing_else() -> None:
    with open("/dev/full", "wb", buffering=0) as full:
        logger, handler = log_to(full.fileno())
        logger.info("there is no room for this")
        handler.flush()
        assert handler.lost == 1


def test_a_non_blocking_pipe_gets_every_message(pipe: tuple[BinaryIO, int]) -> None:
    reader, writing = pipe
    os.set_blocking(writing, False)
    logger, handler = log_to(writing)
    for number in range(1000):
        logger.info("%d %s", number, "x" * 200)
    lines = [reader.readline() for _ in range(1000)]
    assert [int(line.split()[0]) for line in lines] == list(range(1000))
    assert handler.lost == 0


def test_a_message_that_cannot_be_formatted_fails_nobody(pipe: tuple[BinaryIO, int]) -> None:
    reader, writing = pipe
    logger, handler = log_to(writing)
    logger.info("%d", "no number")
    logger.info("lone surrogate \udcff")
    handler.flush()
    assert reader.readline() == b"lone surrogate \\udcff\n"
    assert handler.lost == 1


def test_the_last_words_are_written_before_the_process_ends() -> None:
    ended = run("logging.getLogger('a').info('one')\nlogs.announce('two')")
    assert ended.returncode == 0
    first, second = ended.stderr.splitlines()
    assert first.endswith("INFO a: one")
    assert second == "two"


@pytest.mark.parametrize("shell", ["2>&-", "2>/dev/full", "<&- >&- 2>&-"])
def test_a_closed_or_full_standard_error_ends_nothing(shell: str) -> None:
    code = "import os, sys\nlogging.error('lost')\nlogs.announce('lost')\nos._exit(7 + (os.open('/', 0) < 3))"
    assert run(code, shell=shell).returncode == 7, "and no file may have its number"


def test_the_end_does_not_wait_for_a_reader_that_never_comes() -> None:
    command = [sys.executable, "-c", "import logging; from server.startup import logs; logs.start('info')\n"
               "for n in range(3000): logging.info(f'{n}' + 'x' * 100)"]  # fmt: skip
    with subprocess.Popen(command, cwd=ROOT, stderr=subprocess.PIPE) as process, closing(process.stderr or sys.stderr):  # noqa: S603 - our own
        assert process.wait(30) == 0


def test_announcements_pass_every_level() -> None:
    ended = run("logging.getLogger().setLevel('ERROR')\nlogging.warning('no')\nlogs.announce('is ready')")
    assert ended.stderr == "is ready\n"
