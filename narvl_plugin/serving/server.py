"""`narvl serve`: the workers, and the process that answers requests."""

from __future__ import annotations

import asyncio
import os
import socket
import sys
from pathlib import Path

import uvicorn

from narvl_plugin.errors import InputError
from narvl_plugin.serving.app import Limits, Service
from narvl_plugin.serving.messages import WorkerSettings
from narvl_plugin.serving.pool import PATIENCE, Pool

KEY = "NARVL_API_KEY"
"""Environment variable of the key that requests need."""
LOCAL = ("127.0.0.1", "::1", "localhost")
BACKLOG = 2048
"""Connections that wait to be accepted."""


def serve(
    checkpoint: Path | None = None,
    *,
    host: str = "127.0.0.1",
    port: int = 8000,
    max_batch_size: int = 8,
    batch_timeout: float = 0.01,
    workers: int = 1,
    device: str | None = None,
    bpe_dir: Path | None = None,
    max_queue: int = 256,
    max_bytes: int = 20_000_000,
    max_pixels: int = 50_000_000,
    max_text: int = 500,
    ngram_automaton: Path | None = None,
    ngram_weight: float = 0.2,
) -> None:
    """Serve a model until a signal ends the program. Requests under way are answered first.

    Args:
        checkpoint: see `narvl.load`; None is the model in the box.
        host: the address to listen at.
        port: the port; 0 takes a free one, which is printed.
        max_batch_size: see `WorkerSettings`.
        batch_timeout: see `WorkerSettings`.
        workers: processes, each with a model.
        device: see `narvl.load`.
        bpe_dir: see `narvl.load`.
        max_queue: see `Limits`.
        max_bytes: see `Limits`.
        max_pixels: see `WorkerSettings`.
        max_text: see `Limits`.
        ngram_automaton: see `narvl.load`; for all captions.
        ngram_weight: see `narvl.load`.

    Raises:
        InputError: if the model cannot be loaded, the address cannot be used, or the key is empty.
    """
    key = os.environ.get(KEY)
    if key == "":
        raise InputError(f"{KEY} is empty; set a key, or unset it")
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    settings = WorkerSettings(
        checkpoint=None if checkpoint is None else str(checkpoint),
        device=device,
        bpe_dir=None if bpe_dir is None else str(bpe_dir),
        max_batch_size=max_batch_size,
        batch_timeout=batch_timeout,
        max_pixels=max_pixels,
        # One core is left for requests and for the decoding of images.
        threads=None if "OMP_NUM_THREADS" in os.environ else max(1, (cores - 1) // workers),
        readers=max(2, cores // workers),
        ngram_automaton=None if ngram_automaton is None else str(ngram_automaton),
        ngram_weight=ngram_weight,
    )
    with _bound(host, port) as listener:
        asyncio.run(_serve(listener, Pool(settings, workers), Limits(max_queue, max_bytes, max_text), key))


def _bound(host: str, port: int) -> socket.socket:
    """Return a socket at an address, which does not listen yet: until the model is loaded, connections are refused."""
    listener = socket.socket(socket.AF_INET6 if ":" in host else socket.AF_INET)
    try:
        listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        listener.bind((host, port))
    except (OSError, OverflowError) as error:
        listener.close()
        raise _unusable(host, port, error) from error
    return listener


def _unusable(host: str, port: int, error: Exception) -> InputError:
    reason = getattr(error, "strerror", None) or str(error)
    return InputError(f"{host}, port {port}: cannot be used ({reason}); choose another --port or --host")


async def _serve(listener: socket.socket, pool: Pool, limits: Limits, key: str | None) -> None:
    host, port = listener.getsockname()[:2]
    async with pool:
        try:
            listener.listen(BACKLOG)
        except OSError as error:  # another program took the port meanwhile
            raise _unusable(host, port, error) from error
        if key is None and host not in LOCAL:
            print(f"narvl: {host} is open to all who reach it; set {KEY} to require a key", file=sys.stderr)
        address = f"[{host}]" if ":" in host else host
        print(f"narvl: {', '.join(pool.verbs)} at http://{address}:{port} (Ctrl-C ends it)", file=sys.stderr)
        config = uvicorn.Config(
            Service(pool, limits, key).app(),
            lifespan="off",
            ws="none",
            log_config=None,
            access_log=False,
            server_header=False,
            proxy_headers=False,
            backlog=BACKLOG,
            timeout_graceful_shutdown=int(PATIENCE),
        )
        # On SIGINT and SIGTERM uvicorn ends gracefully, and sends the signal again, to the program's own handler.
        await uvicorn.Server(config).serve(sockets=[listener])
