"""From the body of a request to a question. Bad input raises an `HTTPException` with a reason of one line."""

from __future__ import annotations

import asyncio
import sys
from collections.abc import AsyncGenerator
from typing import Any

from pydantic import ValidationError
from starlette.exceptions import HTTPException
from starlette.formparsers import MultiPartException, MultiPartParser
from starlette.requests import ClientDisconnect, Request

from narvl_plugin.errors import harmless
from narvl_plugin.serving.messages import Question
from narvl_plugin.serving.schemas import MAX_ANSWERS, TEXT_NAMES, RequestFields

UPLOAD_SECONDS = 60
"""Longest time that the body of a request may take to arrive."""
FIELDS = 10
"""Fields of a form besides answers: more than any verb reads."""
JSON, FORM = "application/json", "multipart/form-data"


class InMemoryParser(MultiPartParser):
    """A parser of forms that writes no temporary files. The whole body, which is limited, is in memory anyway."""

    spool_max_size = sys.maxsize


async def read_question(request: Request, verb: str, schema: type[RequestFields], max_bytes: int) -> Question:
    """Return what a request asks.

    Args:
        request: the request.
        verb: its verb.
        schema: the verb's fields.
        max_bytes: the largest body.

    Raises:
        HTTPException: if the request cannot be used.
    """
    kind = request.headers.get("content-type", "").partition(";")[0].strip().lower()
    if kind not in (JSON, FORM):
        raise HTTPException(415, f"the content type is {harmless(kind)[:80] or 'missing'}; send {FORM} or {JSON}")
    try:
        async with asyncio.timeout(UPLOAD_SECONDS):
            body = await _read_body(request, max_bytes)
    except TimeoutError:
        raise HTTPException(408, f"the body did not arrive within {UPLOAD_SECONDS} seconds") from None
    except ClientDisconnect:
        raise HTTPException(400, "the connection ended before the body did") from None
    try:
        if kind == JSON:
            fields = schema.model_validate_json(body, strict=True)
        else:
            fields = schema.model_validate(await _form_fields(request, body, schema))
    except ValidationError as error:
        raise HTTPException(422, _reason(error)) from None
    answers = None if fields.answers is None else tuple(fields.answers)
    text = getattr(fields, TEXT_NAMES[verb]) if verb in TEXT_NAMES else None
    return Question(verb, text, fields.image, fields.beam, fields.nbest, answers, fields.abstain_below)


async def _read_body(request: Request, max_bytes: int) -> bytes:
    """Return the body of a request; one that is too large is not read to its end."""
    refused = HTTPException(413, f"the body has more than {max_bytes:,} bytes", {"Connection": "close"})
    try:
        declared = int(request.headers.get("content-length", 0))
    except ValueError:
        raise HTTPException(400, "the content length is not a number") from None
    if declared > max_bytes:
        raise refused
    body = bytearray()
    async for chunk in request.stream():
        body += chunk
        if len(body) > max_bytes:
            raise refused
    return bytes(body)


async def _form_fields(request: Request, body: bytes, schema: type[RequestFields]) -> dict[str, Any]:
    """Return the fields of a form. Each is given once, but for answers."""

    async def stream() -> AsyncGenerator[bytes, None]:
        yield body

    parser = InMemoryParser(
        request.headers,
        stream(),
        max_files=FIELDS,
        max_fields=MAX_ANSWERS + FIELDS,
        max_part_size=len(body),  # the schema limits texts
    )
    try:
        form = await parser.parse()
    except MultiPartException as error:
        raise HTTPException(400, f"the form is not readable: {harmless(error.message)}") from None
    fields: dict[str, Any] = {}
    for name, value in form.multi_items():
        if name == "image" and isinstance(value, str):
            raise HTTPException(422, "image: is a text; upload the file of an image")
        if name != "image" and not isinstance(value, str):
            raise HTTPException(422, f"{harmless(name)[:80]}: is a file; send it as a text")
        if name == "answers":
            fields.setdefault(name, []).append(value)
        elif name in fields:
            raise HTTPException(422, f"{harmless(name)[:80]}: is given twice")
        else:
            fields[name] = value if isinstance(value, str) else await value.read()
    if fields.get("image") == b"":
        raise HTTPException(422, "image: the file is empty")
    return fields


def _reason(error: ValidationError) -> str:
    """Return the first of the errors in one line, without the input."""
    first = error.errors(include_url=False, include_context=False, include_input=False)[0]
    where = ".".join(map(str, first["loc"]))[:80]
    what = first["msg"].removeprefix("Value error, ")
    return harmless(" ".join(f"{where}: {what}".split() if where else what.split()))
