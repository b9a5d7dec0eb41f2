"""Worker processes, and the questions that wait for them."""

from __future__ import annotations

import asyncio
import itertools
import json
import logging
import os
import signal
import sys
import time
from collections import deque
from contextlib import suppress
from dataclasses import dataclass, field
from typing import Any

from narvl_plugin.errors import InputError
from narvl_plugin.serving.messages import ANSWER, OK, Answer, Question, WorkerSettings, packed_settings

logger = logging.getLogger(__name__)

PATIENCE = 120.0
"""Seconds after which a question is given up. A worker that answered nothing meanwhile is killed."""
PAUSE = 1.0
"""Seconds before another attempt, where a worker did not become ready."""
AHEAD = 3
"""Batches that a worker holds: while it predicts one, it decodes and collects the next ones."""


class Unavailable(Exception):
    """A question that no worker answers now. The message says why."""


@dataclass(eq=False)
class Asked:
    """A question on its way.

    Attributes:
        question: the question.
        answer: its answer.
        worker: the worker that has it, None while it waits.
    """

    question: Question
    answer: asyncio.Future[Answer]
    worker: WorkerProcess | None = None


@dataclass(eq=False)
class WorkerProcess:
    """A process with a model, and the questions that it has.

    Attributes:
        process: the process.
        asked: the questions by their numbers.
        last_answer: the time of its last answer.
    """

    process: asyncio.subprocess.Process
    asked: dict[int, Asked] = field(default_factory=dict)
    last_answer: float = field(default_factory=time.monotonic)

    @classmethod
    async def start(cls, settings: WorkerSettings) -> WorkerProcess:
        """Start a process, which loads the model; `read` returns its first message when it has done so."""
        process = await asyncio.create_subprocess_exec(
            *(sys.executable, "-P", "-m", "narvl_plugin.serving.worker"),
            stdin=asyncio.subprocess.PIPE,
            stdout=asyncio.subprocess.PIPE,
            start_new_session=True,  # the terminal's Ctrl-C goes to the server alone, which ends its workers
            env={**os.environ, "PYTHONPATH": os.pathsep.join(filter(None, sys.path))},
        )
        worker = cls(process)
        worker.write(packed_settings(settings))
        return worker

    def write(self, message: bytes) -> None:
        """Send a message. A process that has ended loses it, and `read` tells."""
        assert self.process.stdin is not None
        self.process.stdin.write(message)

    async def read(self) -> tuple[int, Answer]:
        """Return the next answer with the number of its question.

        Raises:
            EOFError: the process has ended.
        """
        assert self.process.stdout is not None
        number, status, batch, length = ANSWER.unpack(await self.process.stdout.readexactly(ANSWER.size))
        return number, Answer(status, batch, await self.process.stdout.readexactly(length))

    async def kill(self) -> None:
        """End the process, if it has not ended."""
        if self.process.returncode is None:
            # Its own `kill` first asks whether it has ended, and so takes the status that asyncio waits for.
            with suppress(ProcessLookupError):
                os.kill(self.process.pid, signal.SIGKILL)
        await self.process.wait()


class Pool:
    """Workers that answer questions. A worker that ends is replaced.

    Attributes:
        verbs: the verbs of the model.
        restarts: how often a worker was replaced.
    """

    def __init__(self, settings: WorkerSettings, workers: int) -> None:
        """Prepare a pool; `async with` starts it.

        Args:
            settings: how workers predict.
            workers: the number of processes.
        """
        self.verbs: tuple[str, ...] = ()
        self.restarts = 0
        self._settings, self._workers = settings, workers
        self._processes: list[WorkerProcess] = []
        self._ready: list[WorkerProcess] = []
        self._waiting: deque[Asked] = deque()
        self._numbers = itertools.count(1)
        self._tasks: list[asyncio.Task[Any]] = []

    @property
    def ready(self) -> int:
        """The number of workers that can answer now."""
        return len(self._ready)

    @property
    def waiting(self) -> int:
        """The number of questions that no worker has yet."""
        return len(self._waiting)

    async def __aenter__(self) -> Pool:
        """Start the workers, and wait until all are ready.

        Raises:
            InputError: if the model cannot be loaded.
        """
        self._tasks = [asyncio.create_task(self._start()) for _ in range(self._workers)]
        try:
            started = await asyncio.gather(*self._tasks)
        except BaseException:
            await self.__aexit__()
            raise
        self._tasks = [asyncio.create_task(self._keep(worker)) for worker in started]
        return self

    async def __aexit__(self, *error: object) -> None:
        """End the workers."""
        for task in self._tasks:
            task.cancel()
        await asyncio.gather(*self._tasks, return_exceptions=True)
        await asyncio.gather(*(worker.kill() for worker in self._processes))

    async def ask(self, question: Question) -> Answer:
        """Return the answer to a question.

        Raises:
            Unavailable: if its worker ended, or took too long.
        """
        asked = Asked(question, asyncio.get_running_loop().create_future())
        self._waiting.append(asked)
        self._hand_out()
        try:
            return await asyncio.wait_for(asked.answer, PATIENCE)
        except TimeoutError:
            worker = asked.worker
            if worker is not None and time.monotonic() - worker.last_answer >= PATIENCE:
                await worker.kill()
            raise Unavailable(f"no answer within {PATIENCE:.0f} seconds; try again later") from None

    async def _start(self) -> WorkerProcess:
        """Start a worker, and wait until it is ready.

        Raises:
            InputError: if it cannot load the model.
        """
        worker = await WorkerProcess.start(self._settings)
        self._processes.append(worker)
        try:
            _, first = await worker.read()
        except EOFError:
            await self._bury(worker)
            status = worker.process.returncode
            raise InputError(f"a worker ended with status {status} while it loaded the model") from None
        if first.status != OK:
            await self._bury(worker)
            raise InputError(first.body.decode())
        self.verbs = tuple(json.loads(first.body))
        self._ready.append(worker)
        self._hand_out()
        return worker

    async def _keep(self, worker: WorkerProcess) -> None:
        """Take a worker's answers until it ends, then those of another one, and so on."""
        while True:
            try:
                await self._take_answers(worker)
            except EOFError:
                self._ready.remove(worker)
                await self._bury(worker)
            logger.warning("a worker ended with status %s; another is started", worker.process.returncode)
            self.restarts += 1
            while worker not in self._ready:
                try:
                    worker = await self._start()
                except InputError as error:
                    logger.warning("a worker could not be started: %s", error)
                    await asyncio.sleep(PAUSE)

    async def _take_answers(self, worker: WorkerProcess) -> None:
        while True:
            number, answer = await worker.read()
            worker.last_answer = time.monotonic()
            asked = worker.asked.pop(number)
            if not asked.answer.done():
                asked.answer.set_result(answer)
            self._hand_out()

    async def _bury(self, worker: WorkerProcess) -> None:
        """Forget a worker that has ended, and its questions."""
        with suppress(TimeoutError):
            await asyncio.wait_for(worker.process.wait(), PAUSE)  # it keeps the status with which it is about to end
        await worker.kill()
        self._processes.remove(worker)
        for asked in worker.asked.values():
            if not asked.answer.done():
                asked.answer.set_exception(Unavailable("the worker that had this request ended; try again"))
        worker.asked.clear()

    def _hand_out(self) -> None:
        """Give waiting questions to the workers that have fewest, as long as these have room."""
        while self._waiting and self._ready:
            worker = min(self._ready, key=lambda one: len(one.asked))
            if len(worker.asked) >= AHEAD * self._settings.max_batch_size:
                return
            asked = self._waiting.popleft()
            if not asked.answer.done():
                number = next(self._numbers)
                worker.asked[number] = asked
                asked.worker = worker
                worker.write(asked.question.packed(number))
