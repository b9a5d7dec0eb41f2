"""The command `narvl demo`. It imports what it needs only when it runs."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from narvl_plugin.cli.options import AnyModelArgument, BpeDir, Device, NgramAutomaton, NgramWeight


def demo(
    checkpoint: AnyModelArgument = None,
    teacher: Annotated[Path | None, typer.Option(help="Checkpoint of a teacher, to show beside the student.")] = None,
    host: Annotated[
        str, typer.Option(help="Address to listen at. At 0.0.0.0 other machines can use the page, too.")
    ] = "127.0.0.1",
    port: Annotated[int, typer.Option(min=0, max=65535, help="Port to listen at; 0 takes a free one.")] = 7860,
    bpe_dir: BpeDir = None,
    device: Device = None,
    ngram_automaton: NgramAutomaton = None,
    ngram_weight: NgramWeight = 0.2,
) -> None:
    """Show a model on a page in the browser.

    The page takes uploaded images, the webcam and examples. It shows the answer, the queries, and where the model
    looked for each token. It loads nothing from the internet. It needs the package gradio: pip install 'narvl[demo]'.

    Example: narvl demo student.pt --teacher teacher.pt
    """
    from narvl_plugin.demo.server import serve

    serve(
        checkpoint,
        teacher=teacher,
        host=host,
        port=port,
        bpe_dir=bpe_dir,
        device=device,
        ngram_automaton=ngram_automaton,
        ngram_weight=ngram_weight,
    )
