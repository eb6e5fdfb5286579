"""`flowback info`: what it tells of a run, of a lone checkpoint and of the machine."""

import json

import pytest

from flowback import Flow, create_flow


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    """A checkpoint of two classes in a folder with two rows of figures, as a run has."""
    folder = tmp_path_factory.mktemp("run")
    flow = create_flow("digits-mini", classes=("cat", "Hund\u00fc"), width=16, head_dim=8)
    flow.save_pretrained(folder / "checkpoints/step-00000007")
    rows = [{"step": 3, "nll": 0.5, "test_nll": 0.75}, {"step": 7, "nll": 0.25, "grad_norm": 9.0}]
    (folder / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows) + '{"step": 8')
    return folder


def test_a_run(flowback, run, tmp_path):
    code, out, err = flowback("info", run, "--json", tmp_path / "info.json")
    assert (code, err) == (0, "")
    found = json.loads((tmp_path / "info.json").read_text())
    flow = Flow.from_pretrained(run)
    assert found["parameters"] == sum(value.numel() for value in flow.parameters())
    assert found["classes"] == ["cat", "Hund\u00fc"]
    assert found["figures"] == {"step": 7, "nll": 0.25, "test_nll": 0.75}  # the last that there is of each
    assert found["settings"]["model"]["width"] == 16
    assert "1\tHund\u00fc" in out
    assert "--model.width\t16" in out
    assert "--train.lr" not in out  # a default
    assert f"{found['parameters']:,} parameters" in out


def test_a_lone_checkpoint_has_no_figures(flowback, run):
    code, out, _ = flowback("info", run / "checkpoints/step-00000007")
    assert code == 0
    assert "figures" not in out


def test_this_machine(flowback, tmp_path):
    code, out, _ = flowback("info", "--json", tmp_path / "info.json")
    assert code == 0
    assert "cpu_cores\t" in out
    assert "cpu" in json.loads((tmp_path / "info.json").read_text())["devices"]


def test_what_is_no_checkpoint(flowback, tmp_path):
    code, out, err = flowback("info", tmp_path)
    assert (code, out) == (2, "")
    assert str(tmp_path) in err
