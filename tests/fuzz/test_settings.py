"""Spoiled settings, records and checkpoints."""

import io
import json

import pytest
import torch
import yaml
from hypothesis import strategies as st
from safetensors.torch import save

from flowback import Flow, RunConfig, checkpoint
from flowback.alignment.encoders import _read_weights
from flowback.checked import to_dict
from flowback.cli.train import _from_yaml
from flowback.config import ModelConfig
from flowback.evaluation.report import Report
from flowback.sampling.block_plan import load_plan
from flowback.tables import done
from flowback.tarflow_weights import read_tarflow
from flowback.training import run_folder
from flowback.training.run_folder import RunFolder
from fuzzing import fuzz, odd_json, outcome, spoiled

MODEL = ModelConfig(
    image_size=4, channels=1, patch_size=2, width=64, blocks=2, layers=1, head_dim=64, num_classes=2
)
CONFIG = RunConfig(model=MODEL, classes=("a", "b"))
VALUES = {"format": 1, **to_dict(CONFIG), "sha256": {"training.pt": "0" * 64, "config.json": {"model": "1"}}}
TRAINING = {"step": 3, "weights": {"a": torch.arange(6.0).view(2, 3)}, "lists": [1, [2.0, None]]}
REPORT = {"kind": "evaluate", "figures": {"fid": 1.5}, "settings": {}, "environment": {}, "warnings": ["few"]}


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return tmp_path_factory.mktemp("fuzz")


@pytest.fixture(scope="module")
def weights():
    torch.manual_seed(0)
    return {name: value.clone() for name, value in Flow(MODEL).state_dict().items()}


def is_config(value):
    return value is None or isinstance(value, RunConfig)


@fuzz(odd_json(VALUES))
def test_values_of_a_config(folder, values):
    (folder / "config.json").write_text(json.dumps(values))
    assert is_config(outcome(checkpoint.read_config, folder))


@fuzz(spoiled([json.dumps(VALUES).encode(), json.dumps(VALUES, indent=2).encode("utf-16")]))
def test_bytes_of_a_config(folder, content):
    (folder / "config.json").write_bytes(content)
    assert is_config(outcome(checkpoint.read_config, folder))


YAML = yaml.safe_dump({**to_dict(CONFIG), "classes": ["a", "b"]}).encode()
TAGS = b"""
model: &a {image_size: 8, width: !!int "64", blocks: 0x2}
train: {lr: 1e-3, betas: [.9, 0.95], seed: !!python/name:os.system , steps: 190:20:30}
data: !!binary aGVsbG8=
classes: [*a, 2001-12-14, !!set {a, b}, ~, .inf]
? [complex, key]
: !!omap [a: 1]
"""
LAUGHS = b"a0: &a0 [x, x]\n"
for i in range(1, 60):
    LAUGHS += b"a%d: &a%d [*a%d, *a%d]\n" % (i, i, i - 1, i - 1)


MERGED = b"model: &m {width: 64, blocks: 2}\ntrain: &t {<<: *m, lr: 1.0}\ndata: {<<: [*m, *t]}\n"


@fuzz(
    spoiled(
        [YAML, TAGS, MERGED, LAUGHS + b"classes: *a59\n", LAUGHS + b"train: *a59\n", b"classes: &a [*a]\n"]
    )
)
def test_yaml(folder, content):
    (folder / "settings.yaml").write_bytes(content)
    assert is_config(outcome(_from_yaml, folder / "settings.yaml", CONFIG))


@fuzz(odd_json(VALUES))
def test_values_in_yaml(folder, values):
    """YAML reads JSON, and more: numbers of any length, infinity."""
    (folder / "settings.yaml").write_text(json.dumps(values), encoding="utf-8")
    assert is_config(outcome(_from_yaml, folder / "settings.yaml", CONFIG))


@fuzz(odd_json(VALUES))
def test_a_model_is_never_larger_than_its_weights(folder, weights, values):
    values.pop("sha256", None)
    (folder / "config.json").write_text(json.dumps(values))
    (folder / "model.safetensors").write_bytes(save(weights))
    flow = outcome(Flow.from_pretrained, folder)
    if flow is not None:
        assert all(torch.equal(value, weights[name]) for name, value in flow.state_dict().items())


def torch_file(content, legacy=False):
    """The bytes that torch.save writes."""
    stream = io.BytesIO()
    torch.save(content, stream, _use_new_zipfile_serialization=not legacy)
    return stream.getvalue()


@fuzz(spoiled([save({"a": torch.ones(2, 3), "b": torch.zeros(3, dtype=torch.int64)})]))
def test_bytes_of_weights(folder, content):
    (folder / "config.json").write_text(json.dumps({"format": 1, **to_dict(CONFIG)}))
    (folder / "model.safetensors").write_bytes(content)
    loaded = outcome(checkpoint.load_weights, folder)
    assert loaded is None or all(value.is_floating_point() for value in loaded[1].values())


@fuzz(spoiled([torch_file(TRAINING), torch_file(TRAINING, legacy=True)]))
def test_bytes_of_a_training_state(folder, content):
    (folder / "config.json").write_text(json.dumps({"format": 1, **to_dict(CONFIG)}))
    (folder / "training.pt").write_bytes(content)
    training = outcome(checkpoint.load_training_state, folder)
    assert training is None or isinstance(training, dict)


THEIRS = {"var": torch.ones(4, 4)}
for t in range(2):
    shapes = {"pos_embed": (4, 64), "attn_mask": (4, 4), "proj_in.weight": (64, 4), "proj_in.bias": (64,)}
    for layer, rows, columns in (
        *(("attention.qkv", 192, 64), ("attention.proj", 64, 64)),
        *(("mlp.main.0", 256, 64), ("mlp.main.2", 64, 256)),
    ):
        shapes |= {f"attn_blocks.0.{layer}.weight": (rows, columns), f"attn_blocks.0.{layer}.bias": (rows,)}
    for norm in ("attention.norm", "mlp.norm"):
        shapes |= {f"attn_blocks.0.{norm}.weight": (64,), f"attn_blocks.0.{norm}.bias": (64,)}
    shapes |= {"proj_out.weight": (8, 64), "proj_out.bias": (8,)}
    THEIRS |= {f"blocks.{t}.{name}": torch.ones(shape).tril() if name == "attn_mask" else torch.zeros(shape)
               for name, shape in shapes.items()}  # fmt: skip


NAMES = [
    "blocks.200000000.x",
    "blocks.1.attn_blocks.999999999.x",
    f"blocks.{'9' * 5000}.x",
    "var",
    "\ud800",
    3,
]
TENSORS = [
    *(torch.zeros(1).expand(10**6, 10**6), torch.zeros(2**40, 0), torch.zeros(3, 4).to_sparse(), 1.5, None),
    *(torch.empty(10**9, device="meta"), torch.zeros(4, 4, dtype=torch.int64), torch.zeros(()), [1]),
]


@pytest.fixture(scope="module")
def theirs(folder):
    """A good file; the first one read takes seconds, in which PyTorch imports what the meta device needs."""
    torch.save(THEIRS, folder / "theirs.pth")
    return read_tarflow(folder / "theirs.pth", 4, 2)


@fuzz(
    st.dictionaries(st.sampled_from(8 * NAMES + sorted(THEIRS)), st.integers(0, len(TENSORS) - 1), max_size=3)
)
def test_odd_tensors_of_tarflow(folder, theirs, changes):
    odd = {name: TENSORS[number] for name, number in changes.items()}
    torch.save({**THEIRS, **odd}, folder / "theirs.pth")
    read = outcome(read_tarflow, folder / "theirs.pth", 4, 2)
    assert (read is None) == bool(odd)


@fuzz(spoiled([torch_file(THEIRS), torch_file({"a": torch.ones(3)}, legacy=True)]))
def test_bytes_of_tarflow(folder, theirs, content):
    (folder / "theirs.pth").write_bytes(content)
    read = outcome(read_tarflow, folder / "theirs.pth", 4, 2)
    assert read is None or read[0] == theirs[0]


ENCODER = {"conv.weight": torch.ones(2, 3), "conv.bias": torch.zeros(2)}


@fuzz(
    spoiled(
        [torch_file({"state_dict": ENCODER, "epoch": 3}), torch_file(ENCODER, legacy=True), save(ENCODER)]
    ),
    st.sampled_from([".pth", ".safetensors"]),
)
def test_bytes_of_encoder_weights(folder, content, ending):
    file = (folder / "encoder").with_suffix(ending)
    file.write_bytes(content)
    read = outcome(_read_weights, file)
    assert read is None or all(value.layout == torch.strided for value in read.values())


PLAN = {
    **{
        "checkpoint": "0",
        "device": "cpu",
        "batch_size": 4,
        "precision": "fp32",
        "guidance": 1.0,
        "ramp": False,
    },
    **{"formula": "tarflow", "attention_temperature": 1.0, "guided_blocks": None, "tolerance": 1e-3},
    "blocks": [{"tolerance": 1e-3}] * 2,
}
ROWS = {"id": "a", "versions": {"torch": "2"}, "resumed": [{"step": 3, "versions": {"torch": "2"}}]}


@fuzz(odd_json({"plan": PLAN, "report": REPORT, "run": ROWS, "step": 2}))
def test_records(folder, values):
    file = folder / "record.json"
    file.write_text(json.dumps(values))
    plan = outcome(load_plan, file)
    assert plan is None or plan.misfit(plan) is None
    assert isinstance(done.read(file), dict | None)
    file.write_text(json.dumps(values.get("report")))
    report = outcome(Report.load, file)
    assert report is None or isinstance(report.save(folder / "again.json"), type(None))
    run = RunFolder(folder, CONFIG)
    (folder / "environment.json").write_text(json.dumps(values.get("run")))
    (folder / "metrics.jsonl").write_text(json.dumps(values) + '\n{"step": 1}\n{"st')
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(run_folder, "environment", lambda device: {"versions": {"torch": "3"}})  # asks git
        assert run.goes_on(1, torch.device("cpu"), 1) == {"step": 1}
    assert json.loads((folder / "environment.json").read_text())["resumed"][-1]["step"] == 1
