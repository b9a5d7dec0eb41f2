"""Arguments and options that several commands of `narvl` have."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

# --- Models and what they read ---------------------------------------------------------------------------------------

Teacher = Annotated[Path, typer.Option(help="Checkpoint of the teacher, or port of OFA.")]
Student = Annotated[Path, typer.Option(help="Checkpoint of the student.")]
Data = Annotated[Path, typer.Option(help="TSV file with images.")]
BpeDir = Annotated[Path | None, typer.Option(help="Folder of the vocabulary, if not the checkpoint's.")]
Ans2LabelFile = Annotated[Path | None, typer.Option(help="File of the list of answers, if not the checkpoint's.")]
Benchmark = Annotated[
    str, typer.Option("--task", help="caption, vqa, gqa, refcoco, grefcoco, snli_ve or visual_genome.")
]
Task = Annotated[
    str,
    typer.Option(help="Task of the data: caption, vqa_gen, refcoco, snli_ve, regions, scene_graph or scene_tree."),
]

# --- Generation ------------------------------------------------------------------------------------------------------

Beam = Annotated[int, typer.Option(min=1, help="Width of the teacher's beam search.")]
MaxLenB = Annotated[int | None, typer.Option(min=1, help="Longest output, in tokens, if not as in --eval-args.")]
NoRepeat = Annotated[
    int | None,
    typer.Option(
        min=0, help="Length of n-grams that may not repeat, if not as in --eval-args. Zero allows repetitions."
    ),
]
BatchSize = Annotated[int, typer.Option(min=1, help="Rows per batch.")]
SkipBadRows = Annotated[int, typer.Option(min=0, help="Number of unusable rows that may be left out.")]
Device = Annotated[str | None, typer.Option(help="Device by its name in torch. By default a GPU if one is there.")]

# --- Predictions for image files -------------------------------------------------------------------------------------

ImageFiles = Annotated[
    list[str], typer.Argument(help="Image files, patterns, and folders, which are searched recursively.")
]
ImagesAndText = Annotated[
    list[str],
    typer.Argument(
        help="Image files, patterns, and folders, which are searched recursively; then the text, in quotes."
    ),
]
_ANY_MODEL = (
    "Checkpoint of a student or a teacher, port of OFA (a folder or hf://OWNER/NAME), or folder of narvl export. By "
    "default a small model that comes with narvl and knows scenes of emoji art."
)
AnyModel = Annotated[Path | None, typer.Option(help=_ANY_MODEL)]
AnyModelArgument = Annotated[Path | None, typer.Argument(help=_ANY_MODEL)]
Predictions = Annotated[
    str | None,
    typer.Option(
        help="File to write: NAME.tsv, NAME.jsonl, NAME.parquet, or NAME.json, for captions in COCO's results format. "
        "A name that ends in a slash is a folder of shards."
    ),
]
JsonLines = Annotated[bool, typer.Option("--json", help="Write lines of JSON with all that is known.")]
ShowPage = Annotated[
    Path | None, typer.Option(help="HTML page to write with the images, boxes, queries and heat maps.")
]
ImageWorkers = Annotated[int, typer.Option(min=0, help="Processes that read images while the model runs.")]
SearchBeam = Annotated[int | None, typer.Option(min=1, help="Width of the beam search, if not as in --eval-args.")]
NBest = Annotated[int | None, typer.Option(min=1, help="Number of alternatives, in JSON and on the page.")]
AbstainBelow = Annotated[
    float,
    typer.Option(
        min=0,
        max=1,
        help="Confidence below which a student's output is empty. That of a set is its surest element's.",
    ),
]
SkipImages = Annotated[
    int, typer.Option("--skip-bad-rows", min=0, help="Number of unreadable images that may be left out.")
]

# --- Where bulk inference runs ----------------------------------------------------------------------------------------

Engine = Annotated[
    str, typer.Option("--engine", help="What fills a folder of shards: local, this process, or ray, actors of Ray.")
]
Address = Annotated[
    str | None, typer.Option(help="Address of a Ray cluster, or auto. By default Ray starts on this machine.")
]
Actors = Annotated[int | None, typer.Option(min=1, help="Actors of Ray, each with a model. By default as many as fit.")]
GpusPerActor = Annotated[
    float | None, typer.Option(min=0, help="GPUs of an actor; 0.5 shares one. By default 1 if there are GPUs.")
]

NgramAutomaton = Annotated[
    Path | None,
    typer.Option(
        help="File of narvl ngrams: a student's caption is then the best one whose pairs of tokens are all known."
    ),
]
NgramWeight = Annotated[
    float, typer.Option(min=0, help="Factor of the n-grams' log-probabilities. Zero only rules out.")
]

# --- Benchmarks ------------------------------------------------------------------------------------------------------

JsonFile = Annotated[Path, typer.Option(help="JSON file to write.")]
TimedImages = Annotated[int, typer.Option(min=1, help="Number of images to time.")]
Repeats = Annotated[int, typer.Option(min=1, help="How often each is timed.")]
Threads = Annotated[int, typer.Option(min=1, help="Threads of torch.")]
TimedDevice = Annotated[str, typer.Option("--device", help="cpu or cuda.")]
Size = Annotated[str, typer.Option(help="Size of the models: nano, tiny, medium, base, large or huge.")]
Side = Annotated[int | None, typer.Option(min=32, help="Side of the images, in pixels. By default 480, of nano 128.")]
Compiled = Annotated[bool, typer.Option("--compiled", help="Also time torch.compile, which takes minutes.")]
InBfloat16 = Annotated[bool, typer.Option("--bfloat16", help="Take weights and images in bfloat16.")]

# --- Data sets -------------------------------------------------------------------------------------------------------

Raw = Annotated[Path, typer.Option(help="Folder of the unpacked official files.")]
SplitsDir = Annotated[Path, typer.Option("--out", help="Folder for one TSV file per split.")]
Images = Annotated[Path | None, typer.Option(help="Folder with the official folders of images, if not --raw.")]
Splits = Annotated[str | None, typer.Option(help="Splits, joined by commas. By default all of the data set.")]
ImagePaths = Annotated[bool, typer.Option("--image-paths", help="Write paths of images instead of their bytes.")]
CheckImages = Annotated[bool, typer.Option("--check-images", help="Open each image, and drop rows of broken ones.")]


def overrides(bpe_dir: Path | None, ans2label_file: Path | None, member: str | None = None) -> dict[str, str]:
    """Return the options of the task that differ from the checkpoint's."""
    given = {"bpe_dir": bpe_dir, "ans2label_file": ans2label_file, "member": member}
    return {name: str(value) for name, value in given.items() if value is not None}


def with_ngrams(file: Path | None) -> dict[str, str]:
    """Return the options of a student's task that give it n-grams."""
    return {} if file is None else {"ngram_automaton": str(file)}
