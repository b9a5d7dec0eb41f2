"""`narvl serve` under load: a real server, many clients at once, beside captioning the same files in one process."""

from __future__ import annotations

import base64
import http.client
import io
import itertools
import json
import math
import os
import re
import subprocess
import sys
import tempfile
import threading
import time
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from pathlib import Path
from random import Random
from statistics import median
from typing import Any, NamedTuple

import numpy as np
import torch

from narvl_plugin.api.files import predict_files
from narvl_plugin.bench.timing import describe_machine, use_threads
from narvl_plugin.data.scenes.art import load_art
from narvl_plugin.data.scenes.compose import Composer, HeldOutPairs
from narvl_plugin.data.scenes.nouns import NOUNS
from narvl_plugin.errors import InputError
from narvl_plugin.report.results import markdown_table
from narvl_plugin.whole_files import require_writable, write_whole

SIDE = 128
"""Side of the images, in pixels."""
ONE_PROCESS_BATCH = 32
"""Images in one pass where one process captions the files."""
BOUNDARY = "narvl-bench"
FORM = f"multipart/form-data; boundary={BOUNDARY}"
TIMEOUT = 180
"""Seconds after which a request counts as lost."""
WARMUP = 2
"""Requests of each client before those that are timed."""


class Sent(NamedTuple):
    """A request.

    Attributes:
        name: the name of its image; empty for a bad one.
        content_type: its content type.
        body: its body.
        status: the expected HTTP status.
    """

    name: str
    content_type: str
    body: bytes
    status: int = 200


class Received(NamedTuple):
    """What came back.

    Attributes:
        status: the HTTP status; 0 if the request was lost.
        text: the text of the prediction; empty if there is none.
        confidence: its confidence.
        seconds: the time that it took.
    """

    status: int
    text: str
    confidence: float
    seconds: float

    def is_like(self, text: str, confidence: float) -> bool:
        """Tell whether this is a prediction. A batch changes the confidence by rounding."""
        return self.text == text and math.isclose(self.confidence, confidence, rel_tol=1e-2, abs_tol=1e-9)


class Running(NamedTuple):
    """A server that runs: the number of its process, and its port at 127.0.0.1."""

    pid: int
    port: int


@contextmanager
def running_server(*arguments: object, environment: Mapping[str, str] | None = None) -> Iterator[Running]:
    """Run `narvl serve` on a free port while the block runs.

    Args:
        *arguments: the arguments of `narvl serve` other than --port.
        environment: variables of the environment to add.

    Raises:
        InputError: if the server does not start.
    """
    command = [sys.executable, "-m", "narvl", "serve", *map(str, arguments), "--port", "0"]
    with subprocess.Popen(
        command, stderr=subprocess.PIPE, text=True, errors="replace", env={**os.environ, **(environment or {})}
    ) as process:
        assert process.stderr is not None
        lines: list[str] = []
        try:
            for line in process.stderr:
                lines.append(line.strip())
                if found := re.search(r" at http://127\.0\.0\.1:(\d+) ", line):
                    # What it writes later must be read, or it would wait.
                    threading.Thread(target=_copy, args=(process.stderr,), daemon=True).start()
                    yield Running(process.pid, int(found[1]))
                    return
            raise InputError(f"the server did not start: {' '.join(lines)[-500:]}")
        finally:
            process.terminate()
            process.wait()


def _copy(lines: Iterator[str]) -> None:
    for line in lines:
        if "start the same command again" not in line:
            sys.stderr.write(line)


def form(**fields: str | bytes) -> bytes:
    """Return a form as the body of a request; bytes are uploaded as a file."""
    parts = b""
    for name, value in fields.items():
        file = '; filename="image"' if isinstance(value, bytes) else ""
        head = f'--{BOUNDARY}\r\nContent-Disposition: form-data; name="{name}"{file}\r\n\r\n'
        parts += head.encode() + (value if isinstance(value, bytes) else value.encode()) + b"\r\n"
    return parts + f"--{BOUNDARY}--\r\n".encode()


def bad_requests(image: bytes) -> list[Sent]:
    """Return requests of captions that a server must refuse, made of the file of an image."""
    path = json.dumps({"image": "/etc/hostname"}).encode()
    option = json.dumps({"image": base64.b64encode(image).decode(), "beam": 0}).encode()
    return [
        Sent("", FORM, form(image=b"this is a text, not an image\n" * 9), 422),
        Sent("", FORM, form(image=image[: len(image) // 2]), 422),
        Sent("", FORM, form(), 422),
        Sent("", "text/plain", image, 415),
        Sent("", "application/json", path, 422),
        Sent("", "application/json", option, 422),
        Sent("", "application/json", b"{", 422),
    ]


def send(port: int, requests: Sequence[Sent], clients: int) -> tuple[list[Received], float]:
    """Send requests of captions from many clients at once, and return what came back, in order, and the seconds.

    Args:
        port: the port of the server.
        requests: the requests; each client takes the next one as soon as it has an answer.
        clients: the number of clients.
    """
    found: list[Received] = [Received(0, "", 0.0, 0.0)] * len(requests)
    places = itertools.count()

    def work() -> None:
        connection = http.client.HTTPConnection("127.0.0.1", port, timeout=TIMEOUT)
        while (place := next(places)) < len(requests):
            request = requests[place]
            start = time.perf_counter()
            try:
                connection.request("POST", "/caption", request.body, {"Content-Type": request.content_type})
                answer = connection.getresponse()
                body, status = json.loads(answer.read()), answer.status
            except (OSError, http.client.HTTPException, ValueError):
                connection.close()
                continue
            text, confidence = body.get("text", ""), body.get("confidence", 0.0)
            found[place] = Received(status, text, confidence, time.perf_counter() - start)
        connection.close()

    threads = [threading.Thread(target=work) for _ in range(clients)]
    start = time.perf_counter()
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    return found, time.perf_counter() - start


def memory_mb(pid: int) -> float | None:
    """Return the resident memory of a process and all below it, in MiB; None on systems without /proc."""
    parents, pages = {}, {}
    for folder in Path("/proc").glob("[0-9]*"):
        try:
            fields = (folder / "stat").read_text().rpartition(") ")[2].split()
            number = int(folder.name)
            parents[number], pages[number] = int(fields[1]), int(fields[21])
        except OSError:
            continue  # has ended
    if pid not in pages:
        return None
    family = {pid}
    while more := {child for child, parent in parents.items() if parent in family} - family:
        family |= more
    return sum(pages[number] for number in family) * os.sysconf("SC_PAGE_SIZE") / 2**20


def serving(
    out: Path,
    *,
    student: Path,
    bpe_dir: Path | None = None,
    images: int = 512,
    requests: int = 512,
    clients: int = 32,
    bad: float = 0.0,
    max_batch_size: int = 8,
    repeats: int = 3,
    threads: int = 1,
    device: str = "cpu",
) -> dict[str, Any]:
    """Measure a server with batching and without, and one process that captions the same files, in turns.

    Every answer is compared with what one process predicts for the same image.

    Args:
        out: the JSON file to write.
        student: the checkpoint.
        bpe_dir: the vocabulary's folder, if not the checkpoint's.
        images: the number of images, which are scenes of emoji art.
        requests: the number of requests in each turn. They go through the images again and again.
        clients: clients that send at once, each the next request as soon as it has an answer.
        bad: the share of bad requests, 0 to 1, which a server must refuse.
        max_batch_size: the largest batch of the server with batching.
        repeats: the number of turns.
        threads: torch's threads.
        device: torch's name of the device.

    Returns:
        The contents of the file.

    Raises:
        InputError: if the student does not caption, or a server does not start.
    """
    require_writable(out)
    systems = {"batching": max_batch_size, "no_batching": 1}
    environment = {"OMP_NUM_THREADS": str(threads)}
    common = [student, "--device", device, *(() if bpe_dir is None else ("--bpe-dir", bpe_dir))]
    speeds: dict[str, list[float]] = {name: [] for name in ("one_process", *systems)}
    received: dict[str, list[Received]] = {name: [] for name in systems}
    memory: dict[str, list[float | None]] = {name: [] for name in systems}
    with tempfile.TemporaryDirectory() as folder, ExitStack() as servers, use_threads(threads):
        files = _draw(Path(folder) / "images", images)
        sent = _requests(files, requests, bad)
        running = {
            name: servers.enter_context(running_server(*common, "--max-batch-size", size, environment=environment))
            for name, size in systems.items()
        }
        for server in running.values():
            send(server.port, list(itertools.islice(itertools.cycle(sent), WARMUP * clients)), clients)
        for _ in range(repeats):
            captions = Path(folder) / "captions.jsonl"
            captions.unlink(missing_ok=True)
            count = predict_files(
                [Path(folder) / "images"],
                checkpoint=student,
                out=captions,
                batch_size=ONE_PROCESS_BATCH,
                bpe_dir=bpe_dir,
                device=device,
            )
            speeds["one_process"].append(count.captions / count.seconds)
            for name, server in running.items():
                memory[name].append(memory_mb(server.pid))
                answers, seconds = send(server.port, sent, clients)
                memory[name].append(memory_mb(server.pid))
                received[name] += answers
                speeds[name].append(sum(one.status == 200 for one in answers) / seconds)
        rows = map(json.loads, captions.read_text(encoding="utf-8").splitlines())
        expected = {Path(row["image"]).name: (row["text"], row["confidence"]) for row in rows}
    medians = {name: median(measured) for name, measured in speeds.items()}
    result = {
        "images_per_second": medians,
        "of_one_process": {name: medians[name] / medians["one_process"] for name in systems},
        "systems": {
            name: _latencies(received[name])
            | _checked(sent * repeats, received[name], expected)
            | {"memory_mb": memory[name]}
            for name in systems
        },
        "machine": describe_machine(torch.device(device), threads, torch.float32),
        "settings": {
            **{"student": str(student), "images": images, "requests": requests, "clients": clients, "bad": bad},
            **{"max_batch_size": max_batch_size, "one_process_batch": ONE_PROCESS_BATCH, "repeats": repeats},
        },
    }
    write_whole(out, json.dumps(result, indent=2) + "\n")
    return result


def _draw(folder: Path, number: int) -> dict[str, bytes]:
    """Write scenes as JPEG files into a new folder, and return their bytes by name."""
    folder.mkdir()
    composer, random, files = Composer(load_art(NOUNS), HeldOutPairs(NOUNS, 1), SIDE, 4), Random(1), {}
    for place in range(number):
        stream = io.BytesIO()
        composer.compose(random, unseen_pairs=False)[1].save(stream, format="JPEG", quality=90)
        name = f"{place:06}.jpg"
        files[name] = stream.getvalue()
        (folder / name).write_bytes(stream.getvalue())
    return files


def _requests(files: Mapping[str, bytes], number: int, bad: float) -> list[Sent]:
    """Return requests, of which a share is bad, in a random order."""
    good = [Sent(name, FORM, form(image=image)) for name, image in files.items()]
    wrong = bad_requests(next(iter(files.values())))
    refused = math.ceil(number * bad)
    sent = [
        *itertools.islice(itertools.cycle(good), number - refused),
        *itertools.islice(itertools.cycle(wrong), refused),
    ]
    Random(2).shuffle(sent)
    return sent


def _latencies(received: Sequence[Received]) -> dict[str, float]:
    """Return the median and the 95th percentile of the answered requests, in ms."""
    p50, p95 = np.percentile([1000 * one.seconds for one in received if one.status == 200] or [math.nan], [50, 95])
    return {"p50_ms": float(p50), "p95_ms": float(p95)}


def _checked(sent: Sequence[Sent], received: Sequence[Received], expected: Mapping[str, Any]) -> dict[str, Any]:
    """Return how many requests had each status, and how many were lost or answered wrongly."""
    pairs = list(zip(sent, received, strict=True))
    return {
        "statuses": dict(sorted(Counter(str(one.status) for one in received).items())),
        "lost": sum(not one.status for one in received),
        "unexpected_statuses": sum(one.status not in (0, request.status) for request, one in pairs),
        "other_answers": sum(
            not one.is_like(*expected[request.name]) for request, one in pairs if one.status == 200 == request.status
        ),
    }


def table(result: Mapping[str, Any]) -> str:
    """Format the result of `serving` as a Markdown table."""
    speeds, systems = result["images_per_second"], result["systems"]
    rows = [["one process", f"{speeds['one_process']:.1f}", "1.00", "", "", "", "", ""]]
    for name, measured in systems.items():
        first, *_, last = (math.nan if one is None else one for one in measured["memory_mb"])
        rows.append(
            [
                f"server, {name.replace('_', ' ')}",
                *(f"{speeds[name]:.1f}", f"{result['of_one_process'][name]:.2f}"),
                *(f"{measured['p50_ms']:.0f}", f"{measured['p95_ms']:.0f}"),
                *(str(measured["lost"]), str(measured["unexpected_statuses"] + measured["other_answers"])),
                f"{first:.0f} to {last:.0f}",
            ]
        )
    return markdown_table(["", "images/s", "ratio", "p50 ms", "p95 ms", "lost", "wrong", "memory, MiB"], rows)
