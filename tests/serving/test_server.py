"""`narvl serve`: each verb in each form, bad requests, limits, the key, load, and the end of workers and server."""

from __future__ import annotations

import base64
import io
import json
import os
import re
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

import narvl
from narvl_plugin.bench.serving import FORM, Sent, bad_requests, form, memory_mb, send
from narvl_plugin.data.ngram_files import write_ngrams
from narvl_plugin.data.text import load_codec

pytestmark = pytest.mark.integration

TEXTS = {
    "caption": {},
    "answer": {"question": "what color is the cat?"},
    "locate": {"text": "the cat"},
    "entails": {"statement": "a cat sits"},
}
MAX_BYTES, MAX_PIXELS, MAX_TEXT, MAX_QUEUE = 100_000, 1_000_000, 200, 30


def encoded(image: Image.Image, kind: str = "PNG") -> bytes:
    stream = io.BytesIO()
    image.save(stream, format=kind)
    return stream.getvalue()


def random_image(seed: int, size: tuple[int, int] = (24, 32)) -> bytes:
    draw = np.random.default_rng(seed)
    return encoded(Image.fromarray(draw.integers(0, 256, (*size, 3), dtype=np.uint8)))


IMAGE = random_image(1)
BASE64 = base64.b64encode(IMAGE).decode()


@pytest.fixture(scope="module")
def student(several_tasks: Path) -> narvl.Model:
    return narvl.load(several_tasks, device="cpu")


@pytest.fixture(scope="module")
def client(start_server: Callable[..., Any]) -> Any:
    limits = ("--max-bytes", MAX_BYTES, "--max-pixels", MAX_PIXELS, "--max-text", MAX_TEXT, "--max-queue", MAX_QUEUE)
    return start_server(*limits)


def assert_same(found: Any, expected: Any) -> None:
    """Compare two predictions as plain values; a batch may change numbers by rounding."""
    assert type(found) is type(expected)
    if isinstance(expected, dict):
        assert found.keys() == expected.keys()
        for name in expected:
            assert_same(found[name], expected[name])
    elif isinstance(expected, list):
        assert len(found) == len(expected)
        for one, other in zip(found, expected, strict=True):
            assert_same(one, other)
    else:
        assert found == (pytest.approx(expected, rel=1e-3, abs=1e-6) if isinstance(expected, float) else expected)


@pytest.mark.parametrize("verb", TEXTS)
def test_each_verb_answers_as_the_api_does_in_both_forms(client: Any, student: narvl.Model, verb: str) -> None:
    expected = json.loads(json.dumps(student.predict(verb, IMAGE, *TEXTS[verb].values()).to_dict()))
    sent = [client.form(f"/{verb}", image=IMAGE, **TEXTS[verb]), client.json(f"/{verb}", image=BASE64, **TEXTS[verb])]
    for answer in sent:
        assert answer.status == 200, answer.body
        assert answer.headers["content-type"] == "application/json"
        assert_same(answer.json, expected)


@pytest.mark.parametrize("task", ["regions", "graphs"])
def test_sets_are_answered_as_the_api_does(
    request: pytest.FixtureRequest, start_server: Callable[..., Any], task: str
) -> None:
    checkpoint = request.getfixturevalue(f"write_{task}")("narvl")
    verbs: dict[str, Any] = {"regions": {"text": "a cat"}, "locate": {"text": "a cat"}}
    model, client = narvl.load(checkpoint, device="cpu"), start_server(checkpoint=checkpoint)
    for verb, fields in (verbs if task == "regions" else {"graph": {}}).items():
        answer = client.form(f"/{verb}", image=IMAGE, **fields)
        assert answer.status == 200, answer.body
        expected = model.predict(verb, IMAGE, *fields.values())
        assert expected.box or expected.boxes or expected.triplets
        assert_same(answer.json, json.loads(json.dumps(expected.to_dict())))
    schemas = client.get("/openapi.json").json["components"]["schemas"]
    assert schemas["Prediction"]["properties"].keys() == answer.json.keys()


def test_options_are_those_of_the_api(client: Any, student: narvl.Model) -> None:
    options: dict[str, Any] = {"answers": ["yes", "no", "red"], "nbest": 2}
    expected = json.loads(json.dumps(student.answer(IMAGE, "what?", **options).to_dict()))
    body = form(image=IMAGE, question="what?", nbest="2", answers="yes").replace(b"--\r\n", b"\r\n")
    for answer in ("no", "red"):
        body += b'Content-Disposition: form-data; name="answers"\r\n\r\n%s\r\n--narvl-bench' % answer.encode()
        body += b"\r\n" if answer == "no" else b"--\r\n"
    assert_same(client.request("POST", "/answer", body).json, expected)
    assert_same(client.json("/answer", image=BASE64, question="what?", **options).json, expected)
    kept = client.json("/caption", image=BASE64, beam=4, nbest=3).json
    assert_same(kept, json.loads(json.dumps(student.caption(IMAGE, beam=4, nbest=3).to_dict())))
    assert client.form("/caption", image=IMAGE, abstain_below="1").json["text"] == ""


@pytest.mark.parametrize(
    ("path", "fields", "status", "reason"),
    [
        ("/sing", {"image": IMAGE}, 404, r"no such address; POST /caption"),
        ("/caption", {}, 422, "image: Field required"),
        ("/caption", {"image": b""}, 422, "image: the file is empty"),
        ("/caption", {"image": b"a text, not an image\n" * 9}, 422, "image: the image is not readable"),
        ("/caption", {"image": IMAGE[:-40]}, 422, "image: the image is not readable"),
        ("/caption", {"image": "/etc/hostname"}, 422, "image: is a text; upload the file of an image"),
        ("/caption", {"image": "http://127.0.0.1:1/a.png"}, 422, "image: is a text; upload the file of an image"),
        ("/caption", {"image": IMAGE, "question": "what?"}, 422, "question: Extra inputs are not permitted"),
        ("/caption", {"image": IMAGE, "beam": "0"}, 422, "beam: .*greater than or equal to 1"),
        ("/caption", {"image": IMAGE, "beam": "1000000000"}, 422, "beam: .*less than or equal to 64"),
        ("/caption", {"image": IMAGE, "nbest": "many"}, 422, "nbest: .*valid integer"),
        ("/caption", {"image": IMAGE, "abstain_below": "nan"}, 422, "abstain_below: "),
        ("/answer", {"image": IMAGE}, 422, "question: Field required"),
        ("/answer", {"image": IMAGE, "question": "  "}, 422, "question: is empty"),
        ("/answer", {"image": IMAGE, "question": b"what?"}, 422, "question: is a file; send it as a text"),
        ("/answer", {"image": IMAGE, "question": "a" * (MAX_TEXT + 1)}, 422, "question: .*at most 200 char"),
        ("/answer", {"image": IMAGE, "question": "what?", "answers": "a" * (MAX_TEXT + 1)}, 422, "answers.0: .*200"),
        ("/answer", {"image": IMAGE, "question": "what?", "answers": " "}, 422, "answers.0: is empty"),
        ("/locate", {"image": IMAGE, "text": "a cat", "answers": "a"}, 422, "has no list of answers"),
    ],
)
def test_a_bad_form_is_refused_with_the_reason(
    client: Any, path: str, fields: dict[str, Any], status: int, reason: str
) -> None:
    assert_refused(client.form(path, **fields), status, reason)


@pytest.mark.parametrize(
    ("fields", "reason"),
    [
        ({"image": "/etc/hostname"}, "image: expected the bytes of an image file as base64"),
        ({"image": "https://127.0.0.1:1/a.png"}, "image: expected the bytes of an image file as base64"),
        ({"image": "data:image/png;base64," + BASE64}, "image: expected the bytes of an image file as base64"),
        ({"image": BASE64[:-3]}, "image: expected the bytes of an image file as base64"),
        ({"image": ""}, "image: is empty"),
        ({"image": "abcd"}, "image: the image is not readable"),
        ({"image": 7}, "image: expected the bytes"),
        ({"image": [BASE64]}, "image: expected the bytes"),
        ({"image": BASE64, "question": None}, "question: .*valid string"),
        ({"image": BASE64, "question": "what?", "answers": []}, "answers: .*at least 1 item"),
        ({"image": BASE64, "question": "what?", "answers": "red"}, "answers: .*valid array"),
        ({"image": BASE64, "question": "what?", "answers": ["yes " * 9, "no " * 9]}, "no path to any of the answers"),
        ({"image": BASE64, "question": "what?", "beam": True}, "beam: "),
        ({"image": BASE64, "question": "what?", "__class__": "x"}, "__class__: Extra inputs"),
    ],
)
def test_bad_json_is_refused_with_the_reason(client: Any, fields: dict[str, Any], reason: str) -> None:
    assert_refused(client.json("/answer", **{"question": "what?", **fields}), 422, reason)


@pytest.mark.parametrize(
    ("kind", "body", "status", "reason"),
    [
        ("text/plain", IMAGE, 415, "the content type is text/plain; send multipart/form-data or application/json"),
        ("application/x-www-form-urlencoded", b"image=a", 415, "the content type is application/x-www"),
        ("application/json", b"{", 422, "Invalid JSON"),
        ("application/json", b'{"image": "\\ud800"}', 422, "JSON"),
        ("application/json", b"[" * 90_000, 422, "JSON"),
        ("application/json", b"\xff\xfe", 422, "JSON"),
        ("multipart/form-data", form(image=IMAGE), 400, "the form is not readable: Missing boundary"),
        (FORM, b"nothing", 400, "the form is not readable"),
        (FORM, form(image=IMAGE, beam="1").replace(b'"beam"', b'"image"'), 422, "image: "),
    ],
)
def test_a_bad_body_is_refused_with_the_reason(client: Any, kind: str, body: bytes, status: int, reason: str) -> None:
    assert_refused(client.request("POST", "/caption", body, kind), status, reason)


def assert_refused(answer: Any, status: int, reason: str) -> None:
    detail = answer.json["detail"]
    assert (answer.status, list(answer.json)) == (status, ["detail"]), detail
    assert re.search(reason, detail), detail
    assert "\n" not in detail and len(detail) < 500 and "/work" not in detail


def test_images_with_too_many_pixels_are_refused_before_they_are_decoded(client: Any) -> None:
    large = encoded(Image.new("1", (1200, 1000)))
    assert_refused(
        client.form("/caption", image=large), 422, "has 1200 x 1000 pixels; this server takes up to 1,000,000"
    )
    bomb = encoded(Image.new("1", (20_000, 20_000)))
    assert len(bomb) < MAX_BYTES
    before = time.monotonic()
    assert_refused(client.form("/caption", image=bomb), 422, "image: the image (has 20000 x 20000 pixels|is refused)")
    assert time.monotonic() - before < 5


def test_a_large_body_is_refused_before_it_is_read(client: Any) -> None:
    head = f"POST /caption HTTP/1.1\r\nHost: a\r\nContent-Type: {FORM}\r\n"
    with socket.create_connection(("127.0.0.1", client.port), timeout=60) as connection:
        connection.sendall(f"{head}Content-Length: 1000000000000\r\n\r\n".encode())
        answer = b"".join(iter(lambda: connection.recv(65536), b""))  # the server closes the connection
    assert answer.startswith(b"HTTP/1.1 413") and b"the body has more than 100,000 bytes" in answer
    with socket.create_connection(("127.0.0.1", client.port), timeout=60) as connection:
        connection.sendall(f"{head}Transfer-Encoding: chunked\r\n\r\n".encode())
        try:
            for _ in range(1000):
                connection.sendall(b"10000\r\n" + bytes(0x10000) + b"\r\n")
        except (BrokenPipeError, ConnectionResetError):
            return
    pytest.fail("65 MB were read")


def test_other_methods_are_refused(client: Any) -> None:
    assert client.get("/caption").status == 405
    assert client.request("PUT", "/health").status == 405


def test_the_server_describes_itself(client: Any) -> None:
    from narvl_plugin.serving.schemas import Prediction

    assert client.get("/").body.decode().startswith("narvl: POST /caption, /answer, /locate, /entails; GET /health")
    assert (client.get("/health").status, client.get("/health").json) == (200, {"workers_ready": 1})
    page = client.get("/openapi.json").json
    assert {f"/{verb}" for verb in TEXTS} < set(page["paths"])
    for verb, texts in TEXTS.items():
        bodies = page["paths"][f"/{verb}"]["post"]["requestBody"]["content"]
        for kind in ("multipart/form-data", "application/json"):
            assert bodies[kind]["schema"]["required"] == ["image", *texts]
    found = client.form("/locate", image=IMAGE, text="the cat").json
    assert Prediction.model_validate(found, strict=False).model_dump(mode="json") == found
    assert "http://" not in json.dumps(page) and "https://" not in json.dumps(page)
    assert client.get("/docs").status == 404


def test_metrics_count_requests_and_batches(client: Any) -> None:
    def value(name: str) -> float:
        found = re.search(rf"^{re.escape(name)} (\S+)$", client.get("/metrics").body.decode(), re.MULTILINE)
        return float(found[1]) if found else 0.0

    counted = 'narvl_requests_total{status="200",verb="caption"}', 'narvl_requests_total{status="422",verb="caption"}'
    before = [value(name) for name in counted]
    client.form("/caption", image=IMAGE)
    client.form("/caption", image=b"nothing")
    assert [value(name) for name in counted] == [before[0] + 1, before[1] + 1]
    assert value('narvl_request_seconds_count{verb="caption"}') >= 2
    assert value("narvl_batch_size_count") >= 1
    assert (value("narvl_queue_length"), value("narvl_requests_under_way"), value("narvl_workers_ready")) == (0, 0, 1)


def test_under_load_nothing_is_lost_or_swapped_and_memory_stays(client: Any, student: narvl.Model) -> None:
    colors = np.random.default_rng(7).integers(0, 256, (40, 3))
    images = [encoded(Image.new("RGB", (24, 32), tuple(map(int, color)))) for color in colors]
    expected = [(one.text, one.confidence) for one in student.caption(images)]
    assert len({(text, f"{confidence:.1g}") for text, confidence in expected}) > 20
    bad = bad_requests(IMAGE)
    sent = [
        bad[place // 20 % len(bad)] if place % 20 == 7 else Sent(str(place % 40), FORM, form(image=images[place % 40]))
        for place in range(300)
    ]
    send(client.port, sent[:80], 16)
    before = memory_mb(client.pid)
    found, _ = send(client.port, sent, 16)
    assert [one.status for one in found] == [one.status for one in sent]
    answered = [(one, expected[int(request.name)]) for one, request in zip(found, sent, strict=True) if request.name]
    assert len(answered) == 285
    assert all(one.is_like(*other) for one, other in answered)
    after = memory_mb(client.pid)
    if before is not None and after is not None:
        assert after - before < 20
    sizes = re.findall(r'narvl_batch_size_bucket\{le="([\d.]+)"\} ([\d.]+)', client.get("/metrics").body.decode())
    total = max(float(count) for _, count in sizes)
    assert dict(sizes)["1.0"] != str(total), "no batch had more than one image"


def test_options_and_verbs_are_not_mixed_in_a_batch(client: Any, student: narvl.Model) -> None:
    image = Image.open(io.BytesIO(IMAGE))
    jobs: list[tuple[str, dict[str, Any]]] = [
        *((verb, dict(texts)) for verb, texts in TEXTS.items()),
        *(("caption", {"nbest": nbest, "beam": 4}) for nbest in (2, 3)),
        *(("answer", {"question": "what?", "answers": answers}) for answers in (["yes", "no"], ["red", "no"])),
    ]
    found: dict[int, Any] = {}

    def ask(place: int) -> None:
        verb, fields = jobs[place % len(jobs)]
        found[place] = client.json(f"/{verb}", image=BASE64, **fields).json

    threads = [threading.Thread(target=ask, args=(place,)) for place in range(3 * len(jobs))]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    for place, answer in found.items():
        verb, fields = jobs[place % len(jobs)]
        texts = [value for name, value in fields.items() if name in ("question", "text", "statement")]
        options = {name: value for name, value in fields.items() if name in ("answers", "beam", "nbest")}
        assert_same(answer, json.loads(json.dumps(student.predict(verb, image, *texts, **options).to_dict())))


def test_a_client_that_leaves_disturbs_nobody(client: Any) -> None:
    body = form(image=IMAGE)
    head = f"POST /caption HTTP/1.1\r\nHost: a\r\nContent-Type: {FORM}\r\nContent-Length: {len(body)}\r\n\r\n".encode()
    for sent in (head, head + body[:100], head + body):
        with socket.create_connection(("127.0.0.1", client.port), timeout=60) as connection:
            connection.sendall(sent)
    assert client.form("/caption", image=IMAGE).status == 200
    wait_until(lambda: b"narvl_requests_under_way 0.0" in client.get("/metrics").body)


def wait_until(condition: Callable[[], object]) -> None:
    deadline = time.monotonic() + 60
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.1)


def children(pid: int) -> list[int]:
    return [int(child) for child in Path(f"/proc/{pid}/task/{pid}/children").read_text().split()]


needs_proc = pytest.mark.skipif(
    not Path(f"/proc/{os.getpid()}/task/{os.getpid()}/children").exists(), reason="needs the children in /proc"
)


@needs_proc
def test_a_killed_worker_is_replaced_and_no_request_hangs(start_server: Callable[..., Any]) -> None:
    client = start_server("--workers", 2)
    workers = children(client.pid)
    assert len(workers) == 2 and client.get("/health").json == {"workers_ready": 2}
    sent = [Sent("one", FORM, form(image=IMAGE))] * 400
    killer = threading.Timer(0.3, os.kill, (workers[0], signal.SIGKILL))
    killer.start()
    found, _ = send(client.port, sent, 16)
    assert {one.status for one in found} <= {200, 503}
    assert sum(one.status == 503 for one in found) <= 24  # what one worker had
    assert len({one.text for one in found if one.status == 200}) == 1
    wait_until(lambda: client.get("/health").json == {"workers_ready": 2})
    assert workers[0] not in children(client.pid) and len(children(client.pid)) == 2
    assert client.form("/caption", image=IMAGE).status == 200
    assert b"narvl_worker_restarts 1.0" in client.get("/metrics").body


@needs_proc
def test_too_many_requests_get_503_and_health_follows_the_workers(client: Any) -> None:
    (worker,) = children(client.pid)
    os.kill(worker, signal.SIGSTOP)
    answers: list[Any] = []
    sent = [Sent("", FORM, form(image=IMAGE))] * MAX_QUEUE
    waiting = threading.Thread(target=lambda: answers.extend(send(client.port, sent, MAX_QUEUE)[0]))
    waiting.start()
    wait_until(lambda: f"narvl_requests_under_way {MAX_QUEUE}.0".encode() in client.get("/metrics").body)
    assert f"narvl_queue_length {MAX_QUEUE - 24}.0".encode() in client.get("/metrics").body
    refused = client.form("/caption", image=IMAGE)
    assert_refused(refused, 503, f"{MAX_QUEUE} requests are under way; try again later")
    assert int(refused.headers["retry-after"]) >= 1
    assert client.get("/health").status == 200
    os.kill(worker, signal.SIGKILL)
    wait_until(lambda: client.get("/health").status == 503)
    waiting.join()
    # The worker had three batches of eight; the others waited for the new worker.
    assert sorted(one.status for one in answers) == [200] * (MAX_QUEUE - 24) + [503] * 24
    assert client.get("/health").status == 200
    assert client.form("/caption", image=IMAGE).status == 200


def test_with_a_key_only_those_who_have_it_are_answered(start_server: Callable[..., Any]) -> None:
    client = start_server(NARVL_API_KEY="a secret of Köln")
    key = "Bearer a secret of Köln".encode().decode("latin-1")  # as http.client encodes it
    body = form(image=IMAGE)
    assert client.request("POST", "/caption", body, Authorization=key).status == 200
    for wrong in ({}, {"Authorization": key[:-1]}, {"Authorization": key.replace("Bearer", "Basic")}):
        refused = client.request("POST", "/caption", body, **wrong)
        assert_refused(refused, 401, "the key is missing or wrong")
        assert refused.headers["www-authenticate"] == "Bearer"
    for path in ("/", "/metrics", "/openapi.json", "/nothing", "/health/", "//health"):
        assert client.get(path).status == 401
    assert client.get("/health").status == 200


ENDINGS = {signal.SIGINT: 130, signal.SIGTERM: 143}


@needs_proc
@pytest.mark.parametrize(("number", "to_group"), [(signal.SIGINT, True), (signal.SIGTERM, False)])
def test_requests_under_way_are_answered_before_the_end(
    several_tasks: Path, number: signal.Signals, to_group: bool
) -> None:
    command = [sys.executable, "-m", "narvl", "serve", several_tasks, "--port", "0", "--device", "cpu"]
    server = subprocess.Popen(
        command,
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=True,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
    )
    assert server.stderr is not None
    found = re.search(r"at http://127.0.0.1:(\d+) ", server.stderr.readline())
    assert found
    workers = children(server.pid)
    os.kill(workers[0], signal.SIGSTOP)
    answers: list[Any] = []
    request = [Sent("one", FORM, form(image=IMAGE))]
    clients = [threading.Thread(target=lambda: answers.append(send(int(found[1]), request, 1)[0][0])) for _ in range(9)]
    for thread in clients:
        thread.start()
    time.sleep(1)
    (os.killpg if to_group else os.kill)(server.pid, number)
    time.sleep(0.5)
    with pytest.raises(OSError):  # no new connections
        socket.create_connection(("127.0.0.1", int(found[1])), timeout=5)
    os.kill(workers[0], signal.SIGCONT)
    for thread in clients:
        thread.join()
    assert [one.status for one in answers] == [200] * 9
    assert server.wait(timeout=60) == ENDINGS[number]
    errors = server.stderr.read().splitlines()
    assert len(errors) == 1 and errors[0].endswith("start the same command again to go on")
    assert not any(Path(f"/proc/{worker}").exists() for worker in workers)


@needs_proc
def test_workers_end_when_the_server_is_killed(several_tasks: Path) -> None:
    command = [sys.executable, "-m", "narvl", "serve", several_tasks, "--port", "0", "--device", "cpu"]
    with subprocess.Popen(command, stderr=subprocess.PIPE, text=True) as server:
        assert server.stderr is not None
        assert "http://" in server.stderr.readline()
        workers = children(server.pid)
        server.kill()
    assert workers
    wait_until(lambda: not any(Path(f"/proc/{worker}").exists() for worker in workers))


def failure(*arguments: object, **environment: str) -> str:
    """Return the one line with which `narvl serve` fails."""
    command = [sys.executable, "-m", "narvl", "serve", *map(str, arguments)]
    done = subprocess.run(command, capture_output=True, text=True, env={**os.environ, **environment}, timeout=120)
    assert (done.returncode, done.stdout) == (1, "")
    assert done.stderr.count("\n") == 1, done.stderr
    return done.stderr


def test_what_cannot_be_served_is_one_line(several_tasks: Path, tmp_path: Path) -> None:
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        port = taken.getsockname()[1]
        assert f"127.0.0.1, port {port}: cannot be used (Address already in use)" in failure(
            several_tasks, "--port", port
        )
    assert "cannot be used" in failure(several_tasks, "--host", "no.such.host.invalid")
    assert "gone.pt: no such checkpoint" in failure(tmp_path / "gone.pt", "--port", 0, "--workers", 2)
    assert "NARVL_API_KEY is empty" in failure(several_tasks, NARVL_API_KEY="")
    absent = tmp_path / "gone.ngrams"
    assert "gone.ngrams: no such file" in failure(several_tasks, "--port", 0, "--ngram-automaton", absent)


def test_n_grams_are_for_all_captions(
    start_server: Callable[..., Any],
    several_tasks: Path,
    answer_vocabulary: Path,
    write_tsv: Callable[..., Path],
    tmp_path: Path,
) -> None:
    file = tmp_path / "captions.ngrams"
    data = write_tsv("train.tsv", [["1", "1", "a"]])
    write_ngrams(data, file, load_codec(answer_vocabulary), order=2, hard=2, column=2)
    client = start_server("--ngram-automaton", file, "--ngram-weight", 0.5)
    model = narvl.load(several_tasks, device="cpu", ngram_automaton=file, ngram_weight=0.5)
    assert client.form("/caption", image=IMAGE).json["text"] == model.caption(IMAGE).text
    assert client.form("/answer", image=IMAGE, **TEXTS["answer"], nbest="2").status == 200
    refused = client.form("/caption", image=IMAGE, beam="2")
    assert refused.status == 422
    assert "take a beam of 1, and an nbest of 1" in refused.json["detail"]
    assert str(tmp_path) not in refused.json["detail"]
