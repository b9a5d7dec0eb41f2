"""Workers: how batches are collected, and what becomes of questions when a model or a worker fails."""

from __future__ import annotations

import asyncio
import io
import json
import os
import shutil
import signal
import sys
import threading
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest
from PIL import Image

from narvl_plugin.api import Decoding, Prediction
from narvl_plugin.errors import InputError
from narvl_plugin.serving import pool as pools
from narvl_plugin.serving.messages import ANSWER, ASK, Question, WorkerSettings, question_of
from narvl_plugin.serving.pool import Pool, Unavailable
from narvl_plugin.serving.worker import Batcher, Worker


def image_bytes(width: int = 8) -> bytes:
    stream = io.BytesIO()
    Image.new("RGB", (width, 6), (200, 30, 30)).save(stream, format="PNG")
    return stream.getvalue()


def settings(checkpoint: Path | None = None) -> WorkerSettings:
    given = None if checkpoint is None else str(checkpoint)
    return WorkerSettings(given, "cpu", None, 4, 0.01, max_pixels=1000, threads=1, readers=1)


def test_a_full_batch_does_not_wait() -> None:
    batcher: Batcher[str, int] = Batcher(max_size=3, timeout=60)
    for number in range(7):
        batcher.add("a", number)
    assert batcher.take() == ("a", [0, 1, 2])
    assert batcher.take() == ("a", [3, 4, 5])
    threading.Timer(0.1, lambda: [batcher.add("a", number) for number in (7, 8)]).start()
    assert batcher.take() == ("a", [6, 7, 8])


def test_a_batch_that_is_not_full_waits_for_the_timeout() -> None:
    batcher: Batcher[str, int] = Batcher(max_size=3, timeout=0.2)
    start = time.monotonic()
    batcher.add("a", 1)
    threading.Timer(0.1, batcher.add, ("a", 2)).start()
    assert batcher.take() == ("a", [1, 2])
    assert 0.2 <= time.monotonic() - start < 5


def test_batches_hold_one_key_and_none_starves() -> None:
    batcher: Batcher[str, int] = Batcher(max_size=2, timeout=0.05)
    batcher.add("rare", 0)
    for number in range(1, 5):
        batcher.add("often", number)
    assert batcher.take() == ("often", [1, 2])  # full, while the other may still be filled
    time.sleep(0.06)
    assert batcher.take() == ("rare", [0])
    assert batcher.take() == ("often", [3, 4])


@pytest.mark.skipif(sys.version_info >= (3, 12) or not hasattr(os, "pidfd_open"), reason="sets Python 3.11's watcher")
def test_a_worker_that_has_just_ended_keeps_its_status(caplog: pytest.LogCaptureFixture) -> None:
    """asyncio does not know yet that it has ended, since its loop is busy."""

    async def kill_one() -> int | None:
        with asyncio.PidfdChildWatcher() as watcher:
            asyncio.get_event_loop_policy().set_child_watcher(watcher)
            watcher.attach_loop(asyncio.get_running_loop())
            program = (sys.executable, "-c", "raise SystemExit(3)")
            pipes = {"stdin": asyncio.subprocess.PIPE, "stdout": asyncio.subprocess.PIPE}
            process = await asyncio.create_subprocess_exec(*program, **pipes)
            os.waitid(os.P_PID, process.pid, os.WEXITED | os.WNOWAIT)
            await pools.WorkerProcess(process).kill()
            return process.returncode

    before = asyncio.get_event_loop_policy().get_child_watcher()
    try:
        assert asyncio.run(kill_one()) == 3
    finally:
        asyncio.get_event_loop_policy().set_child_watcher(before)
    assert not caplog.records


def test_a_question_survives_its_message() -> None:
    question = Question("answer", "wie groß?\n", b"\x00\xffimage", beam=3, answers=("ä", "b"), abstain_below=0.5)
    message = question.packed(7)
    number, length, size = ASK.unpack(message[: ASK.size])
    assert (number, size) == (7, 7)
    assert question_of(message[ASK.size :][:length], message[ASK.size + length :]) == question


class Failing:
    """A model, and its engine, whose predictions fail for images of a width."""

    text_column = None
    verb = "caption"

    def __init__(self, error: Exception, width: int = 8) -> None:
        self.error, self.width = error, width

    def engine(self, verb: str) -> Any:
        return self

    def decoding_for(self, verb: str, **options: Any) -> Decoding:
        return Decoding(**options)

    def attention(self, *_: object) -> None:
        raise AssertionError("nobody asks for it")

    def prepare(self, image: bytes, text: str, where: str) -> int:
        return Image.open(io.BytesIO(image)).width

    def predict(self, prepared: Sequence[int], decoding: Any) -> list[Prediction]:
        if self.width in prepared:
            raise self.error
        return [Prediction(str(width), 1.0, (), (), ()) for width in prepared]


def answers(written: bytes) -> list[tuple[int, int, bytes]]:
    """Return number, status and body of each answer."""
    found = []
    while written:
        number, status, _, length = ANSWER.unpack(written[: ANSWER.size])
        found.append((number, status, written[ANSWER.size :][:length]))
        written = written[ANSWER.size + length :]
    return found


@pytest.mark.parametrize("kind", [InputError, ValueError])
def test_what_is_wrong_with_one_image_of_a_batch_is_told_to_its_sender_alone(kind: type[Exception]) -> None:
    output = io.BytesIO()
    worker = Worker(Failing(kind("image: is\nunusual")), settings(), output)
    for width in (7, 8, 9):
        worker.read(width, Question("caption", None, image_bytes(width)))
    worker.predict()
    found = answers(output.getvalue())
    assert [(number, status) for number, status, _ in found] == [(7, 200), (8, 422), (9, 200)]
    assert [json.loads(body)["text"] for _, status, body in found if status == 200] == ["7", "9"]
    assert found[1][2] == b"image: is unusual"


def test_an_unexpected_error_is_answered_without_its_words_and_raised() -> None:
    output = io.BytesIO()
    worker = Worker(Failing(RuntimeError("secret")), settings(), output)
    worker.read(1, Question("caption", None, image_bytes()))
    with pytest.raises(RuntimeError, match="secret"):
        worker.predict()
    assert answers(output.getvalue()) == [(1, 500, b"the server failed to answer this request")]


async def until(condition: Callable[[], object]) -> None:
    deadline = time.monotonic() + 60
    while not condition():
        assert time.monotonic() < deadline
        await asyncio.sleep(0.05)


@pytest.mark.integration
def test_a_worker_that_does_not_answer_is_replaced(several_tasks: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    async def run() -> None:
        question = Question("caption", None, image_bytes())
        async with Pool(settings(several_tasks), 1) as pool:
            assert (await pool.ask(question)).status == 200
            monkeypatch.setattr(pools, "PATIENCE", 1.0)
            os.kill(pool._processes[0].process.pid, signal.SIGSTOP)
            with pytest.raises(Unavailable, match="no answer within 1 seconds"):
                await pool.ask(question)
            await until(lambda: pool.ready == 0)
            await until(lambda: pool.ready == 1)
            assert (await pool.ask(question)).status == 200

    asyncio.run(run())


@pytest.mark.integration
def test_a_model_that_is_gone_for_a_while_is_loaded_later(
    several_tasks: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    student = tmp_path / "student.pt"
    shutil.copyfile(several_tasks, student)
    monkeypatch.setattr(pools, "PAUSE", 0.1)
    attempts = []
    monkeypatch.setattr(pools.logger, "warning", lambda text, *values: attempts.append(text % values))

    async def run() -> None:
        async with Pool(settings(student), 1) as pool:
            student.rename(tmp_path / "elsewhere.pt")
            pool._processes[0].process.kill()
            await until(lambda: len(attempts) >= 3)
            answer = asyncio.create_task(pool.ask(Question("caption", None, image_bytes())))
            (tmp_path / "elsewhere.pt").rename(student)
            assert (await answer).status == 200

    asyncio.run(run())
    assert attempts[0] == "a worker ended with status -9; another is started"
    assert "student.pt: no such checkpoint" in attempts[1]
