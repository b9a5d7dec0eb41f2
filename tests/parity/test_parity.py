"""Our models compute what the reference models compute: to 1e-4 relative, and the same tokens."""

from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from fairseq.criterions.label_smoothed_cross_entropy import LabelSmoothedCrossEntropyCriterion
from fairseq.sequence_generator import SequenceGenerator

from criterions import QueryCtcCriterion
from narvl_plugin.errors import SkipBudget
from narvl_plugin.generation.parallel_generator import ParallelGenerator
from narvl_plugin.models.interop import RECOMPUTED_TABLES, tables_of
from narvl_plugin.models.positions import code_position_ids, image_buckets, token_buckets
from narvl_plugin.models.registered import build

pytestmark = pytest.mark.integration

GOLDENS = Path(__file__).parent / "goldens"
ARCHS = pytest.mark.parametrize("arch", ["ofa_tiny", "narvl_tiny"])
CASES = pytest.mark.parametrize("case", ["square64", "pad_rect_mask", "text_only"])


class Vocabulary:
    """As much of a dictionary as generators and criterions ask for."""

    def __init__(self, size):
        self.size = size

    def __len__(self):
        return self.size

    def bos(self):
        return 0

    def pad(self):
        return 1

    def eos(self):
        return 2

    def unk(self):
        return 3


@pytest.mark.parametrize("arch", ["ofa_tiny", "narvl_tiny", "ofa_base", "narvl_base"])
def test_names_and_shapes(arch, goldens, shared):
    golden = goldens["narvl_tiny" if arch.startswith("narvl") else "ofa_tiny"]
    file = (GOLDENS if arch.endswith("tiny") else shared / "parity") / f"{arch}_state_dict.txt"
    if not file.exists():
        pytest.skip(f"{file} is not at hand")
    reference = dict(line.split("\t")[:2] for line in file.read_text().splitlines() if not line.startswith("#"))
    recomputed = {name for name in reference if name.endswith(RECOMPUTED_TABLES)}
    with torch.device("meta"):
        model = build(arch, vocab_size=golden.meta["dict_len"])
    ours = {name: str(list(tensor.shape)) for name, tensor in model.state_dict().items()}
    assert ours == {name: shape for name, shape in reference.items() if name not in recomputed}
    tables = {name: str(list(table.shape)) for name, table in tables_of(model.cfg).items()}
    assert tables == {name: reference[name] for name in recomputed}


def test_tables():
    tables = np.load(GOLDENS / "buffers.npz")
    buckets = token_buckets(1024, bucket_size=256, max_positions=1024)
    by_relation = torch.cat([buckets[0].flip(0), buckets[1:, 0]])
    recorded = torch.from_numpy(tables["token_bucket_by_rel"])
    assert torch.equal(by_relation, recorded) or torch.equal(by_relation, recorded.flip(0))
    assert code_position_ids(16, 1026, bucket_size=42).tolist() == tables["image_position_idx"].tolist()
    image = image_buckets(torch.arange(42 * 42 + 1), bucket_size=42)
    assert image[0].tolist() == tables["image_bucket_row0"].tolist()
    assert image[:, 0].tolist() == tables["image_bucket_col0"].tolist()
    assert image[100].tolist() == tables["image_bucket_row100"].tolist()


@ARCHS
@CASES
@torch.no_grad()
def test_forward(arch, case, goldens, evaluated, close):
    golden = goldens[arch].arrays
    inputs, _ = goldens[arch].inputs(case)
    logits, extra = evaluated[arch](**inputs)
    close(extra["encoder_out"], golden[f"{case}/encoder_out"], "encoder_out")
    close(extra["inner_states"][-1], golden[f"{case}/inner_states_last"], "inner_states_last")
    close(logits[:, :, golden[f"{case}/logits/cols"]], golden[f"{case}/logits/vals"], "logits")
    close(logits.logsumexp(2), golden[f"{case}/logits/lse"], "log-sum-exp")
    values, ids = logits.topk(5)
    close(values, golden[f"{case}/logits/top5_vals"], "top 5")
    assert ids.tolist() == golden[f"{case}/logits/top5_ids"].tolist()
    if f"{case}/blank_logit" in golden.files:
        close(logits[:, :, evaluated[arch].blank], golden[f"{case}/blank_logit"], "blank")


@pytest.mark.parametrize(("name", "code_masks"), [("all", [True, True]), ("mixed", [False, True])])
@torch.no_grad()
def test_image_tokens_in_the_decoder(name, code_masks, goldens, evaluated, close):
    golden = goldens["ofa_tiny"].arrays
    inputs, _ = goldens["ofa_tiny"].inputs("square64")
    logits, _ = evaluated["ofa_tiny"](**inputs, code_masks=torch.tensor(code_masks))
    close(logits[:, :, golden["square64/logits/cols"]], golden[f"code_masks_{name}/vals"], "logits")
    close(logits.logsumexp(2), golden[f"code_masks_{name}/lse"], "log-sum-exp")


def criterion_of(golden):
    """Make the criterion that the reference's loss was recorded with."""
    vocabulary = Vocabulary(golden.meta["dict_len"])
    task = SimpleNamespace(target_dictionary=vocabulary, source_dictionary=vocabulary, skip_budget=SkipBudget(0))
    if golden.arch.startswith("ofa"):
        return LabelSmoothedCrossEntropyCriterion(task, False, 0.1)
    return QueryCtcCriterion(task, False, False, 0.1, reference_loss=True)


def loss_of(golden, case, model):
    """Return the loss divided by the sample size as fairseq's trainer does, the sample size, and the log."""
    inputs, target = golden.inputs(case)
    sample = {
        "net_input": inputs,
        "target": target,
        "ntokens": int(target.ne(1).sum()),
        "where": [f"golden:{row}" for row in range(len(target))],
    }
    return criterion_of(golden)(model, sample)


@ARCHS
@CASES
@torch.no_grad()
def test_loss_in_evaluation(arch, case, goldens, evaluated, close):
    recorded, size, _ = goldens[arch].meta["cases"][case]["loss_eval"]
    loss, own_size, _ = loss_of(goldens[arch], case, evaluated[arch])
    close(loss / own_size, recorded / size, "loss")


@pytest.mark.usefixtures("two_threads")
@ARCHS
@CASES
def test_loss_and_gradients_in_training(arch, case, goldens, trained, close):
    golden = goldens[arch]
    model = trained(arch)
    recorded = golden.meta["cases"][case]
    loss, size, _ = loss_of(golden, case, model)
    close(loss.detach() / size, recorded["loss_train"][0] / recorded["loss_train"][1], "loss")
    (loss / size).backward()
    gradients = {name: p.grad.norm().item() for name, p in model.named_parameters() if p.grad is not None}
    norms = {name: norm or 0.0 for name, norm in recorded["grad_norm_train_mode"].items()}
    # Through batch norm over two or three small images rounding shows: norms agree to 3e-5 with two threads and
    # AVX-512, to 4e-4 with one, and to 4.7e-3 on a processor that has AVX2 alone.
    tolerance = 1e-4 if case == "text_only" else 1e-2
    negligible = 1e-5 * max(norms.values())  # zero but for rounding, such as those of key biases
    for name, norm in norms.items():
        if max(norm, gradients.get(name, 0.0)) > negligible:
            close(gradients.get(name, 0.0), norm, "gradient norms", tolerance)


@pytest.mark.usefixtures("two_threads")
def test_six_adam_steps(goldens, trained, close):
    # Adam divides each gradient by its size, so that rounding decides the direction wherever a gradient is nearly
    # zero, and the paths part: our own losses at steps 2 and 3 are 31.47 and 14.14 with one thread, 31.49 and 14.91
    # with two, 31.51 and 16.02 without oneDNN, 31.52 and 16.68 in double precision; recorded are 31.49 and 14.81. A
    # processor that has AVX2 alone is 2.4e-3 off at step 2.
    golden = goldens["narvl_tiny"]
    model = trained("narvl_tiny")
    optimizer = torch.optim.Adam(model.parameters(), lr=1e-4)
    for step, recorded in enumerate(golden.meta["adam_losses_square64"], start=1):
        loss, size, _ = loss_of(golden, "square64", model)
        tolerance = {1: 1e-4, 2: 5e-3}.get(step, 0.2)
        close(loss.detach() / size, recorded, f"loss at Adam's step {step}", tolerance)
        optimizer.zero_grad()
        (loss / size).backward()
        optimizer.step()


@CASES
def test_beam_search(case, goldens, evaluated, close):
    golden = goldens["ofa_tiny"]
    inputs, _ = golden.inputs(case)
    inputs.pop("prev_output_tokens")
    names = {"beam": "beam_size", "unnormalized": "normalize_scores"}
    for name, run in golden.meta["cases"][case]["gen"].items():
        options = {names.get(key, key): value for key, value in run["args"].items()}
        if "normalize_scores" in options:
            options["normalize_scores"] = not options["normalize_scores"]
        generator = SequenceGenerator([evaluated["ofa_tiny"]], Vocabulary(golden.meta["dict_len"]), **options)
        found = generator.generate([evaluated["ofa_tiny"]], {"net_input": inputs}, bos_token=0)
        for ours, theirs in zip(found, run["hypos"], strict=True):
            for hypothesis, recorded in zip(ours, theirs, strict=False):
                assert hypothesis["tokens"].tolist() == recorded["tokens"], name
                close(hypothesis["score"], recorded["score"], name)


@CASES
def test_one_pass(case, goldens, evaluated):
    golden, model = goldens["narvl_tiny"], evaluated["narvl_tiny"]
    inputs, _ = golden.inputs(case)
    generator = ParallelGenerator([model], Vocabulary(golden.meta["dict_len"] - 1))
    found = generator.generate([model], {"net_input": inputs})
    for ours, recorded in zip(found, golden.meta["cases"][case]["gen"]["one_pass"], strict=True):
        tokens = [token for token in recorded["tokens"] if token != 2]
        assert ours[0]["tokens"].tolist() == [*tokens, 2]
