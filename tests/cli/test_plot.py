"""`flowback plot`: which panels a picture of runs has, and what is refused."""

import json

import pytest

from flowback.training import curves


@pytest.fixture
def drawn(monkeypatch):
    """Lines of the picture that was saved last: (panel, label, x, y)."""
    lines = []

    class Seen(curves.Figure):
        def savefig(self, file, **options):
            lines[:] = [
                (axes.get_ylabel(), line.get_label(), list(line.get_xdata()), list(line.get_ydata()))
                for axes in self.axes
                for line in axes.get_lines()
            ]
            super().savefig(file, **options)

    monkeypatch.setattr(curves, "Figure", Seen)
    return lines


def run(folder, *rows):
    folder.mkdir(parents=True)
    text = "".join(json.dumps({"step": i + 1, **row}) + "\n" for i, row in enumerate(rows))
    (folder / "metrics.jsonl").write_text(text)
    return folder


def test_two_runs_in_one_picture(flowback, tmp_path, drawn):
    none = run(tmp_path / "none", {"images": 8, "seconds": 1.0, "nll": 0.5}, {"images": 16, "seconds": 3.0})
    aligned = run(tmp_path / "aligned", {"images": 8, "seconds": 2.0, "nll": 0.4, "alignment": -0.25})
    code, *_ = flowback("plot", none, aligned, "--against", "seconds")
    assert code == 0
    assert (none / "curves.png").read_bytes()[:4] == b"\x89PNG"
    assert drawn == [
        ("nll (nats/dim)", "none, nll", [1.0], [0.5]),
        ("nll (nats/dim)", "aligned, nll", [2.0], [0.4]),
        ("cosine with the encoder's features", "aligned", [2.0], [0.25]),
    ]
    assert flowback("plot", none, "--out", tmp_path / "c.svg")[0] == 0
    assert drawn[0][2] == [8]
    assert (tmp_path / "c.svg").read_bytes()[:5] == b"<?xml"


def test_runs_of_one_name_are_told_apart(flowback, tmp_path, drawn):
    runs = [run(tmp_path / where / "run", {"images": 8, "grad_norm": 2.0}) for where in "ab"]
    assert flowback("plot", *runs)[0] == 0
    assert [label for _, label, *_ in drawn] == list(map(str, runs))


def test_what_cannot_be_drawn(flowback, tmp_path):
    empty = run(tmp_path / "empty")
    full = run(tmp_path / "full", {"images": 8, "nll": 1.0})
    for words, said in (
        ((tmp_path,), f"{tmp_path} is not the folder of a run: it has no metrics.jsonl."),
        ((empty,), "There is nothing to draw yet: empty has no row in metrics.jsonl."),
        ((full, "--out", tmp_path / "c.xyz"), "pictures of the kind .xyz are not known"),
        ((), "needs the folder of a run"),
    ):
        code, out, err = flowback("plot", *words)
        assert (code, out) == (2, "")
        assert said in err
    assert sorted(file.name for file in full.iterdir()) == ["metrics.jsonl"]
