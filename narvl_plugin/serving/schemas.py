"""What requests and answers look like, for their validation and for the OpenAPI page."""

from __future__ import annotations

import base64
import binascii
from typing import Annotated, Any, Literal

from pydantic import AfterValidator, BaseModel, BeforeValidator, ConfigDict, Field, StringConstraints, create_model

TEXT_NAMES = {"answer": "question", "locate": "text", "regions": "text", "entails": "statement"}
"""The name of the text that a verb reads beside the image."""
MAX_BEAM = 64
"""Largest beam and largest number of alternatives in a request."""
MAX_ANSWERS = 1000
"""Largest closed list of answers in a request."""


def _image_bytes(image: Any) -> bytes:
    """Return the bytes of an uploaded file, or of base64."""
    if isinstance(image, bytes):
        return image
    try:
        decoded = base64.b64decode(image, validate=True)
    except (TypeError, ValueError, binascii.Error):
        raise ValueError("expected the bytes of an image file as base64; paths and addresses are not read") from None
    if not decoded:
        raise ValueError("is empty; send the bytes of an image file")
    return decoded


def _not_blank(text: str) -> str:
    if not text.strip():
        raise ValueError("is empty; give a text")
    return text


class RequestFields(BaseModel):
    """The fields that all verbs read."""

    model_config = ConfigDict(extra="forbid")

    image: Annotated[
        bytes,
        BeforeValidator(_image_bytes, json_schema_input_type=str),
        Field(description="The file of an image: an upload in a form, base64 in JSON."),
    ]
    answers: Annotated[
        list[str] | None, Field(min_length=1, max_length=MAX_ANSWERS, description="Closed list of answers.")
    ] = None
    beam: Annotated[int | None, Field(ge=1, le=MAX_BEAM, description="Width of the beam search.")] = None
    nbest: Annotated[int | None, Field(ge=1, le=MAX_BEAM, description="Number of alternatives.")] = None
    abstain_below: Annotated[
        float, Field(ge=0, le=1, description="Confidence below which the output of a student is empty.")
    ] = 0.0


def request_schema(verb: str, max_text: int) -> type[RequestFields]:
    """Return the fields of a verb's requests.

    Args:
        verb: caption, answer, locate, regions, graph, tree or entails.
        max_text: the largest number of characters of a text.
    """
    text = Annotated[str, StringConstraints(max_length=max_text), AfterValidator(_not_blank)]
    answers = Annotated[list[text] | None, RequestFields.model_fields["answers"]]
    fields: dict[str, Any] = {"answers": (answers, None)}
    if verb in TEXT_NAMES:
        fields[TEXT_NAMES[verb]] = (text, ...)
    return create_model(f"{verb.capitalize()}Request", __base__=RequestFields, **fields)


class Token(BaseModel):
    """A token of the output with its probability."""

    text: str
    probability: float


class Query(BaseModel):
    """The label of a student's query with its probability."""

    text: str
    probability: float
    kind: Literal["token", "repeat", "blank"]


class Alternative(BaseModel):
    """One of the best outputs."""

    text: str
    confidence: float
    box: tuple[float, float, float, float] | None


class FoundBox(BaseModel):
    """A region of several, with its probability."""

    box: tuple[float, float, float, float]
    probability: float


class FoundTriplet(BaseModel):
    """A relation between two objects, with its probability."""

    subject: str
    subject_box: tuple[float, float, float, float]
    relation: str
    object: str
    object_box: tuple[float, float, float, float]
    probability: float


class Node(BaseModel):
    """A node of a tree, with the probability that the node and all below it are in the image."""

    label: str
    probability: float
    children: list[Node]


class Prediction(BaseModel):
    """What the model predicts: the values of `Prediction.to_dict()`."""

    text: str
    confidence: float
    tokens: list[Token]
    queries: list[Query]
    alternatives: list[Alternative]
    box: Annotated[
        tuple[float, float, float, float] | None,
        Field(description="Left, upper, right and lower edge, in pixels of the image as a person sees it."),
    ]
    boxes: Annotated[list[FoundBox], Field(description="All regions, the most probable first, for regions.")]
    triplets: Annotated[list[FoundTriplet], Field(description="Relations, the most probable first, for graph.")]
    tree: Annotated[Node | None, Field(description="The scene with its regions and their objects, for tree.")]
    task: str
    prompt: str | None
    labels: list[int]


class Problem(BaseModel):
    """Why a request is refused, in one line."""

    detail: str
