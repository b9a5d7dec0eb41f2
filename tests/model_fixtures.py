"""What tests share that needs torch and fairseq: vocabularies, small models, trainings in a test's own process."""

import logging
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import quick_hydra  # noqa: F401 - makes it so
import torch
from captions import CAPTIONS, TEXTS_WITH_ANSWERS
from device_waits import DeviceWaits
from fairseq import checkpoint_utils, options
from fairseq.dataclass.utils import convert_namespace_to_omegaconf
from fairseq.tasks import TASK_DATACLASS_REGISTRY, setup_task
from fairseq_cli import generate, train
from omegaconf import OmegaConf

import narvl_plugin.registered  # noqa: F401 - registers the tasks
from narvl_plugin.checkpoints.reading import whole_checkpoint
from narvl_plugin.data.text import TextCodec, load_codec, train_sentencepiece
from narvl_plugin.models.registered import FAMILIES

# fairseq has what is logged printed, from debug messages of all libraries on, which pytest would keep for each test.
logging.root.handlers.clear()
logging.root.setLevel(logging.INFO)


TREES = (
    "( red plain ( left ( small red hat ) ( dog ) ( dog ) ) ( right ( dog ) ) )",
    "( blue plain ( right ( red hat ) ) )",
    "( red plain )",
)
TRIPLETS = "dog 4,0,8,6 | on | red hat 0,0,4,3&&dog 0,0,4,6 | left of | dog 4,0,8,6\n"


@pytest.fixture(scope="session")
def vocabulary(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Give a folder with an spm.model trained on a few captions."""
    folder = tmp_path_factory.mktemp("vocabulary")
    (folder / "captions.tsv").write_text("".join(f"{caption}\n" for caption in CAPTIONS), encoding="utf-8")
    train_sentencepiece(folder / "captions.tsv", [0], folder, 500)
    return folder


@pytest.fixture(scope="session")
def answer_vocabulary(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Give a folder with an spm.model that can spell yes, no and maybe, and columns of answers."""
    folder = tmp_path_factory.mktemp("answer_vocabulary")
    (folder / "texts.tsv").write_text("".join(f"{text}\n" for text in TEXTS_WITH_ANSWERS))
    train_sentencepiece(folder / "texts.tsv", [0], folder, 500)
    return folder


@pytest.fixture(scope="session")
def graph_vocabulary(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Give a folder with an spm.model trained on a column of triplets."""
    folder = tmp_path_factory.mktemp("graph_vocabulary")
    (folder / "triplets.tsv").write_text(TRIPLETS)
    train_sentencepiece(folder / "triplets.tsv", [0], folder, 500)
    return folder


@pytest.fixture(scope="session")
def tree_vocabulary(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Give a folder with an spm.model trained on a column of trees."""
    folder = tmp_path_factory.mktemp("tree_vocabulary")
    (folder / "trees.tsv").write_text("".join(f"{tree}\n" for tree in TREES))
    train_sentencepiece(folder / "trees.tsv", [0], folder, 500)
    return folder


@pytest.fixture(scope="session")
def codec(vocabulary: Path) -> TextCodec:
    """Give the codec of that vocabulary, with ten bins."""
    return load_codec(vocabulary, num_bins=10)


@pytest.fixture(scope="session")
def gpt2_codec(bpe_dir: Path) -> TextCodec:
    """Give the codec of the published checkpoints."""
    return load_codec(bpe_dir)


@pytest.fixture
def device() -> Iterator[DeviceWaits]:
    """Give a pretended device that counts what a GPU would be waited for (see device_waits.py)."""
    with DeviceWaits() as waits:
        yield waits


@pytest.fixture
def quiet() -> Iterator[None]:
    """Give fairseq's programs the root logger's handlers back to us."""
    handlers = logging.getLogger().handlers[:]
    yield
    logging.getLogger().handlers[:] = handlers


@pytest.fixture
def run_train(quiet: None) -> Callable[..., None]:
    """Give a function that runs fairseq-train in this process, as if no other run had left its best score there.

    It reads rows in this process, too, unless told otherwise: a worker of each epoch would copy all that is in memory.
    """

    def run(*arguments: object) -> None:
        vars(checkpoint_utils.save_checkpoint).pop("best", None)
        parsed = options.parse_args_and_arch(options.get_training_parser(), ["--num-workers=0", *map(str, arguments)])
        train.main(convert_namespace_to_omegaconf(parsed))

    return run


@pytest.fixture
def run_generate(quiet: None) -> Callable[..., None]:
    """Give a function that runs fairseq-generate in this process, which reads rows, too, unless told otherwise."""

    def run(*arguments: object) -> None:
        parsed = options.parse_args_and_arch(options.get_generation_parser(), ["--num-workers=0", *map(str, arguments)])
        generate.main(parsed)

    return run


@pytest.fixture
def make_model(
    write_tsv: Callable[..., Path],
    caption_rows: list[list[str]],
    vocabulary: Path,
    tmp_path: Path,
    run_train: Callable[..., None],
) -> Callable[..., Path]:
    """Give a function that trains a tiny model of captions on train.tsv for a few updates; returns its checkpoint."""
    data = f"{write_tsv('train.tsv', caption_rows)},{write_tsv('valid.tsv', caption_rows)}"

    def make(arch: str, *criterion: object, updates: int = 1) -> Path:
        run_train(
            *(data, "--task", "caption", "--bpe-dir", vocabulary, "--num-bins", 10, "--patch-image-size", 32),
            *("--arch", arch, "--criterion", *criterion, "--save-dir", tmp_path / arch, "--disable-validation"),
            *("--encoder-embed-dim", 16, "--encoder-ffn-embed-dim", 32, "--encoder-attention-heads", 2),
            *("--encoder-layers", 1, "--decoder-layers", 1, "--vision-trunk", "test_resnet", "--freeze-resnet"),
            *("--optimizer", "adam", "--lr", 1e-2, "--batch-size", 6, "--max-update", updates, "--cpu"),
            *("--max-epoch", updates, "--save-interval", updates, "--no-epoch-checkpoints", "--no-progress-bar"),
        )
        return tmp_path / arch / "checkpoint_last.pt"

    return make


@pytest.fixture(scope="session")
def save_checkpoint() -> Callable[..., Path]:
    """Give a function that writes the checkpoint of a small random model, `narvl` or `ofa`, for a task's options."""

    def save(file: Path, family: str, task: str, **task_options: Any) -> Path:
        task_cfg = OmegaConf.structured(TASK_DATACLASS_REGISTRY[task](_name=task, data="none", **task_options))
        small = {"encoder_embed_dim": 16, "encoder_ffn_embed_dim": 32, "encoder_attention_heads": 2}
        layers = {"encoder_layers": 1, "decoder_layers": 1, "vision_trunk": "test_resnet", "freeze_resnet": True}
        model_cfg = OmegaConf.structured(FAMILIES[family][0](_name=family, **small, **layers))
        torch.manual_seed(5)
        model = setup_task(task_cfg).build_model(model_cfg)
        cfg = {"model": model_cfg, "task": task_cfg, "criterion": {"_name": "label_smoothed_cross_entropy"}}
        plain = OmegaConf.to_container(OmegaConf.create(cfg), enum_to_str=True)
        torch.save(whole_checkpoint(model.state_dict(), plain), file)
        return file

    return save


@pytest.fixture
def write_checkpoint(tmp_path: Path, save_checkpoint: Callable[..., Path]) -> Callable[..., Path]:
    """Give a function that writes such a checkpoint to a file in the test's folder."""

    def write(name: str, family: str, task: str, **task_options: Any) -> Path:
        return save_checkpoint(tmp_path / name, family, task, **task_options)

    return write


SETS = {"patch_image_size": 32, "max_image_size": 32, "num_bins": 10}
"""Options of the tasks of the models below."""


@pytest.fixture
def write_regions(write_checkpoint: Callable[..., Path], vocabulary: Path) -> Callable[[str], Path]:
    """Give a function that writes the checkpoint of a small random model of all regions, `narvl` or `ofa`."""
    return lambda family: write_checkpoint("regions.pt", family, "regions", bpe_dir=str(vocabulary), **SETS)


@pytest.fixture
def write_graphs(
    write_checkpoint: Callable[..., Path], graph_vocabulary: Path, names_file: Path
) -> Callable[[str], Path]:
    """Give a function that writes the checkpoint of a small random model of scene graphs, `narvl` or `ofa`."""
    options = {"bpe_dir": str(graph_vocabulary), "names_file": str(names_file), **SETS}
    return lambda family: write_checkpoint("graphs.pt", family, "scene_graph", **options)


@pytest.fixture(scope="session")
def several_tasks(tmp_path_factory: pytest.TempPathFactory, answer_vocabulary: Path) -> Path:
    """Give the checkpoint of a small random student of all four tasks, as `--task multitask` writes it."""
    queries = {"caption": 8, "vqa_gen": 6, "refcoco": 7, "snli_ve": 6}
    shared = {"bpe_dir": str(answer_vocabulary), "num_bins": 16, "data": "none", "patch_image_size": 32}
    own: dict[str, dict[str, Any]] = {
        "vqa_gen": {"val_inference_type": "beamsearch"},
        "refcoco": {"max_image_size": 32},
        "caption": {"eval_args": '{"beam": 1, "max_len_b": 8}'},
    }
    members = {
        name: OmegaConf.to_container(
            OmegaConf.structured(TASK_DATACLASS_REGISTRY[name](_name=name, **shared, **own.get(name, {}))),
            enum_to_str=True,
        )
        for name in queries
    }
    small = {"encoder_embed_dim": 16, "encoder_ffn_embed_dim": 32, "encoder_attention_heads": 2}
    layers = {"encoder_layers": 1, "decoder_layers": 1, "vision_trunk": "test_resnet", "freeze_resnet": True}
    config_class, model_class = FAMILIES["narvl"]
    layout = ",".join(f"{name}:{number}" for name, number in queries.items())
    config = config_class(_name="narvl", **small, **layers, num_queries=sum(queries.values()), member_queries=layout)
    config.vocabulary = load_codec(answer_vocabulary, 16).checksum
    torch.manual_seed(5)
    labels = len(load_codec(answer_vocabulary, 16).dictionary) + 1
    model = model_class(config, labels)
    for weight in model.parameters():  # at birth outputs hardly depend on the image
        if weight.dim() == 2:
            torch.nn.init.normal_(weight)
    cfg = {"model": OmegaConf.to_container(OmegaConf.structured(config)), "task": {"_name": "multitask", **shared}}
    file = tmp_path_factory.mktemp("several_tasks") / "student.pt"
    torch.save(whole_checkpoint(model.state_dict(), cfg) | {"task_state": {"members": members}}, file)
    return file
