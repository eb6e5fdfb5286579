"""The compiled step: what it refuses, and how its library is built, kept and trusted."""

import ctypes
import os
import shutil
import stat
from pathlib import Path

import pytest
import torch

from flowback import compiled
from flowback.sampling import native
from flowback.sampling.decoder import Engine
from sampling.flows import noise_of, tame_flow

COMPILER = shutil.which("g++") or shutil.which("clang++")
pytestmark = pytest.mark.skipif(COMPILER is None, reason="no C++ compiler")


@pytest.fixture(scope="module")
def step():
    """A step of three rows with room for two new tokens, in float32."""
    flow = tame_flow(torch.float32)
    context = flow.blocks[0].context(torch.tensor([0, 1, 2]))
    return Engine(flow).decoder(1, 3, context, new=2)._step.step


def weights_of(block, dtype=torch.float64):
    return native.NativeWeights(native.Parts.of_block(block), dtype)


ROWS = torch.arange(3)


@pytest.mark.parametrize(
    ("tokens", "start", "which", "message"),
    [
        (torch.zeros(3, 1, 4), 16, ROWS, "tokens 16 ... 16: there are 16"),
        (torch.zeros(3, 2, 4), 15, ROWS, "tokens 15 ... 16"),
        (torch.zeros(3, 1, 4), 2**40, ROWS, "there are 16"),
        (torch.zeros(3, 1, 4), -1, ROWS, "tokens -1"),
        (torch.zeros(3, 1, 4), 0, torch.tensor([0, 1, 3]), "there are 3"),
        (torch.zeros(3, 1, 4), 0, torch.tensor([0, 1, 2**40]), "there are 3"),
        (torch.zeros(2, 1, 4), 0, torch.tensor([-1, 0]), "there are 3"),
        (torch.zeros(3, 1, 4), 0, ROWS.int(), "int64"),
        (torch.zeros(2, 1, 4), 0, torch.arange(4)[::2], "contiguous"),
        (torch.zeros(3, 1, 4).double(), 0, ROWS, "float64: it takes 4 in torch.float32"),
        (torch.zeros(3, 1, 2), 0, ROWS, "2 dimensions"),
        (torch.zeros(3, 3, 4), 0, ROWS, "room for 6"),
        (torch.zeros(1, 1, 4), 0, ROWS, "1 images for 3 rows"),
    ],
)
def test_what_would_leave_the_buffers_is_refused(step, tokens, start, which, message):
    with pytest.raises(ValueError, match=message):
        step(tokens, start, which)
    step(torch.zeros(3, 2, 4), 14, ROWS)  # the last two


@pytest.mark.parametrize(
    ("context", "scale"),
    [
        (torch.zeros(2, 32), torch.ones(3)),
        (torch.zeros(3, 16), torch.ones(3)),
        (torch.zeros(3, 32).double(), torch.ones(3)),
        (None, torch.ones(3).double()),
        (None, torch.ones(4)),
    ],
)
def test_rows_that_do_not_fit_each_other_are_refused(context, scale):
    weights = weights_of(tame_flow(torch.float32).blocks[0], torch.float32)
    contexts = {} if context is None else {0: context}
    with pytest.raises(Exception, match=r"do not fit|Type-check"):  # shapes are checked in tests alone
        native.NativeStep(weights, native.NativeCache.empty(weights, 3, 1), contexts, scale)


def test_a_cache_of_fewer_layers_is_refused():
    shallow, deep = (weights_of(block) for block in tame_flow(layers=(1, 2)).blocks)
    scale = torch.ones(1, dtype=torch.float64)
    with pytest.raises(ValueError, match="do not fit"):
        native.NativeStep(deep, native.NativeCache.empty(shallow, 1, 1), {}, scale)
    native.NativeStep(deep, native.NativeCache.empty(shallow, 1, 1, layers=2), {}, scale)
    with pytest.raises(ValueError, match="do not fit"):  # a context before a layer that is not there
        native.NativeStep(
            shallow,
            native.NativeCache.empty(shallow, 1, 1),
            {1: torch.zeros(1, shallow.width).double()},
            scale,
        )


@pytest.mark.parametrize(
    ("shape", "rows", "guidance", "message"),
    [
        ((3, 15, 4), 3, None, "15 tokens of 3 images"),
        ((3, 16, 4), 3, torch.zeros(3, 16), "images for 3 rows"),
        ((2, 16, 4), 3, None, "2 images for 3 rows"),
        ((3, 16, 2), 3, None, "2 dimensions"),
        ((3, 16, 4), 4, None, "3 images for 4 rows"),
    ],
)
def test_noise_that_does_not_fit_is_not_decoded(step, shape, rows, guidance, message):
    with pytest.raises(ValueError, match=message):
        step.decode(torch.zeros(shape), torch.arange(rows), None, guidance)
    assert step.decode(torch.zeros(3, 16, 4), ROWS, None).shape == (3, 16, 4)


def test_what_lies_behind_the_known_tokens_plays_no_part():
    """Vectors of keys reach beyond them: nothing that is there may be seen, nor be slow, as denormals are."""
    flow = tame_flow(image_size=6)  # 9 tokens
    block, z = flow.blocks[0], noise_of(flow, 2)
    context = block.context(torch.tensor([0, 1]))
    engine = Engine(flow)
    torch.use_deterministic_algorithms(True)  # fills what is not initialised with NaN
    try:
        engine.decoder(1, 2, context)
    finally:
        torch.use_deterministic_algorithms(False)
    assert not engine._native_cache.keys.count_nonzero()
    assert engine._native_cache.values.isnan().all()
    engine._native_cache.keys.fill_(torch.nan)
    found = engine.decoder(1, 2, context).decode(z)
    torch.testing.assert_close(found, block.inverse(z, context), atol=1e-12, rtol=1e-12)


def test_a_larger_cache_serves_smaller_batches():
    """One cache for all batches; what others left in it plays no part."""
    flow = tame_flow()
    engine, block = Engine(flow), flow.blocks[0]
    caches = set()
    for batch, new in ((5, 3), (2, 1), (4, 3)):
        x, context = noise_of(flow, batch), block.context(None)
        decoder = engine.decoder(1, batch, context, new=new)
        found = [decoder.step(x[:, k : k + new], k)[0].clone() for k in range(0, 15, new)]
        expected = block.predict(x, context).shift[:, 1:16]
        torch.testing.assert_close(torch.cat(found, 1), expected, atol=1e-12, rtol=1e-12)
        caches.add(id(engine._native_cache))
    assert len(caches) == 1


# --- the library ---


@pytest.fixture
def build(monkeypatch, tmp_path, caplog):
    """Forget the library and ask for it again, with a compiler of the test: (library, what was logged)."""
    monkeypatch.setenv("FLOWBACK_CACHE", str(tmp_path / "cache"))

    def again(script=f'exec {COMPILER} "$@" -O0'):  # the last level counts: a second in place of many
        compiler = tmp_path / "compiler"
        compiler.write_text(f"#!/bin/sh\n{script}\n")
        compiler.chmod(0o755)
        monkeypatch.setenv("CXX", f"env {compiler}")  # as people write "ccache g++"
        native.library.cache_clear()
        caplog.clear()
        return native.library(), caplog.text

    yield again
    native.library.cache_clear()


@pytest.fixture
def kept(tmp_path):
    """The libraries in the cache."""
    return lambda: sorted((tmp_path / "cache" / "native").glob("*"))


def test_is_built_once_for_the_user_alone(build, kept, tmp_path):
    loaded, logged = build()
    assert loaded is not None
    assert logged == ""
    assert stat.S_IMODE((tmp_path / "cache" / "native").stat().st_mode) == 0o700
    (file,) = kept()
    assert build(f'case "$*" in --version) exec {COMPILER} "$@" ;; esac; exit 1')[0] is not None  # not built
    assert kept() == [file]


def test_a_library_of_other_content_is_built_anew(build, kept):
    """Cut short, or put there by somebody: the name says what its content must be."""
    build()
    (file,) = kept()
    content = file.read_bytes()
    for planted in (b"", content + b"planted"):
        file.unlink()  # it is mapped into this process, which would die of a change
        file.write_bytes(planted)
        loaded, logged = build()
        assert loaded is not None
        assert logged == ""
        assert [other.read_bytes() != planted for other in kept()] == [True]


@pytest.mark.parametrize("why", ["writable", "another's", "a link"])
def test_a_folder_of_others_is_not_trusted(build, kept, tmp_path, monkeypatch, why):
    folder = tmp_path / "cache" / "native"
    folder.mkdir(parents=True)
    if why == "writable":
        folder.chmod(0o777)
    elif why == "another's":
        monkeypatch.setattr(os, "getuid", lambda: 12345)
    else:
        folder.rmdir()
        (tmp_path / "elsewhere").mkdir()
        folder.symlink_to(tmp_path / "elsewhere")
    loaded, logged = build()
    assert loaded is not None
    assert logged.count("compiled for this process alone") == 1
    assert kept() == []


def test_a_folder_that_others_can_read_is_closed(build, tmp_path):
    folder = tmp_path / "cache" / "native"
    folder.mkdir(parents=True)
    folder.chmod(0o755)
    assert build()[0] is not None
    assert stat.S_IMODE(folder.stat().st_mode) == 0o700


@pytest.mark.parametrize("why", ["no home", "no folder"])
def test_without_a_cache_folder(build, tmp_path, monkeypatch, why):
    """HOME unset for a user that the system does not know; and a folder that cannot be made."""

    def nobody():
        raise RuntimeError("Could not determine home directory.")

    if why == "no home":
        monkeypatch.setattr(Path, "home", nobody)
        monkeypatch.delenv("FLOWBACK_CACHE")
    else:
        (tmp_path / "cache").write_text("a file")
    loaded, logged = build()
    assert loaded is not None
    assert "compiled for this process alone" in logged
    assert loaded.lanes_f32() > 0


VERSION = f'case "$*" in --version) exec {COMPILER} "$@" ;; esac\n'


def test_a_compiler_without_openmp(build):
    """As Apple's clang."""
    refuses = 'case "$*" in *-fopenmp*) echo "error: unsupported option -fopenmp" >&2; exit 1 ;; esac\n'
    loaded, logged = build(f'{VERSION}{refuses}exec {COMPILER} "$@" -O0')
    assert loaded is not None
    assert logged == ""
    assert Engine(tame_flow()).native


def test_the_compilers_own_message_is_shown(build):
    says = 'echo "In file included from x:" >&2; echo "decode.cpp:9:1: error: no such thing" >&2; exit 1'
    loaded, logged = build(VERSION + says)
    assert loaded is None
    assert "PyTorch works instead: decode.cpp:9:1: error: no such thing" in logged
    assert not Engine(tame_flow()).native


def test_a_compiler_that_hangs_is_given_up(build, monkeypatch, kept):
    monkeypatch.setattr(compiled, "_LIMIT", 2)
    loaded, logged = build('case "$*" in --version) exit 0 ;; esac\nexec sleep 60')
    assert loaded is None
    assert "timed out after 2 seconds" in logged
    assert kept() == []


def test_no_such_compiler(build, monkeypatch, caplog):
    build()
    monkeypatch.setenv("CXX", "/no/such/compiler")
    native.library.cache_clear()
    assert native.library() is None
    assert "/no/such/compiler" in caplog.text


def test_structures_of_another_size_are_not_used(build, monkeypatch):
    class Larger(ctypes.Structure):
        _fields_ = [*native._Layer._fields_, ("more", ctypes.c_void_p)]

    monkeypatch.setattr(native, "_Layer", Larger)
    loaded, logged = build()
    assert loaded is None
    assert "structures of other sizes" in logged
