"""The command `narvl serve`. It imports what it needs only when it runs."""

from __future__ import annotations

from typing import Annotated

import typer

from narvl_plugin.cli.options import AnyModelArgument, BpeDir, Device, NgramAutomaton, NgramWeight
from narvl_plugin.errors import InputError


def serve(
    checkpoint: AnyModelArgument = None,
    host: Annotated[
        str, typer.Option(help="Address to listen at. The default takes requests of this machine only.")
    ] = "127.0.0.1",
    port: Annotated[int, typer.Option(min=0, max=65535, help="Port. With 0 a free one is chosen and printed.")] = 8000,
    max_batch_size: Annotated[int, typer.Option(min=1, help="Largest number of images in one pass.")] = 8,
    batch_timeout: Annotated[
        float, typer.Option(min=0, max=10, help="Seconds that a request waits for others to fill its batch.")
    ] = 0.01,
    workers: Annotated[int, typer.Option(min=1, help="Number of processes, each with a model.")] = 1,
    device: Device = None,
    bpe_dir: BpeDir = None,
    max_queue: Annotated[
        int, typer.Option(min=1, help="Number of requests that may be under way. Others get the status 503.")
    ] = 256,
    max_bytes: Annotated[int, typer.Option(min=1, help="Largest body of a request, in bytes.")] = 20_000_000,
    max_pixels: Annotated[int, typer.Option(min=1, help="Largest number of pixels of an image.")] = 50_000_000,
    max_text: Annotated[int, typer.Option(min=1, help="Largest number of characters of a text.")] = 500,
    ngram_automaton: NgramAutomaton = None,
    ngram_weight: NgramWeight = 0.2,
) -> None:
    """Serve a model over HTTP.

    Each of the model's verbs is an address: POST /caption, /answer, /locate, /regions, /graph, /entails. An image comes
    in a form or as base64 in JSON. GET /openapi.json describes all fields, GET /health and /metrics tell the state. If
    the environment variable NARVL_API_KEY is set, requests need the header Authorization: Bearer KEY.

    Example: curl -F image=@scene.png -F question="what color is the car?" localhost:8000/answer
    """
    try:
        from narvl_plugin.serving.server import serve
    except ImportError as error:
        raise InputError(
            f"narvl serve needs the package {error.name}; install narvl with its extra: pip install 'narvl[serve]'"
        ) from error
    serve(
        checkpoint,
        host=host,
        port=port,
        max_batch_size=max_batch_size,
        batch_timeout=batch_timeout,
        workers=workers,
        device=device,
        bpe_dir=bpe_dir,
        max_queue=max_queue,
        max_bytes=max_bytes,
        max_pixels=max_pixels,
        max_text=max_text,
        ngram_automaton=ngram_automaton,
        ngram_weight=ngram_weight,
    )
