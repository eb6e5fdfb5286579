"""`flowback cache`: what is there, and that only what was named goes."""

import pytest


@pytest.fixture
def kept(tmp_path, monkeypatch):
    monkeypatch.setattr("flowback.cli.cache.cache_folder", lambda: tmp_path / "cache")
    for name, size in (("features/a.npy", 3_000_000), ("features/deep/b.json", 500), ("statistics/c", 1000)):
        file = tmp_path / "cache" / name
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_bytes(bytes(size))
    return tmp_path / "cache"


def test_the_parts_are_listed_with_their_sizes(flowback, kept):
    code, out, _ = flowback("cache")
    assert code == 0
    assert "features\t2\t3.001\n" in out
    assert "statistics\t1\t0.001\n" in out


def test_only_what_is_named_is_removed(flowback, kept):
    code, out, _ = flowback("cache", "--clear", "features")
    assert code == 0
    assert "Removed features: 2 files, 3 MB" in out
    assert [part.name for part in kept.iterdir()] == ["statistics"]
    assert flowback("cache", "--clear", "all")[0] == 0
    assert list(kept.iterdir()) == []
    assert f"{kept} is empty." in flowback("cache")[1]


def test_what_is_not_flowbacks_is_never_touched(flowback, kept):
    (kept / "MNIST").mkdir()
    (kept / "thesis.tex").write_text("x")
    code, out, _ = flowback("cache", "--clear", "all")
    assert code == 0
    assert "MNIST" not in out
    assert sorted(part.name for part in kept.iterdir()) == ["MNIST", "thesis.tex"]


@pytest.mark.parametrize("name", ["feature", "../cache", ".", "MNIST"])
def test_other_names_are_refused_and_nothing_goes(flowback, kept, name):
    code, out, err = flowback("cache", "--clear", "statistics", name)
    assert (code, out) == (2, "")
    assert f"--clear {name}: the cache has no such part" in err
    assert len(list(kept.iterdir())) == 2
