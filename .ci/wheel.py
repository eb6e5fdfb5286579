"""Build both distributions, check them, and try the wheel in an empty environment; ``make wheel`` runs it.

Usage: python .ci/wheel.py [newest | lowest]

``newest`` takes the newest dependencies there are, ``lowest`` the lowest that pyproject.toml allows, each of
them at its lowest. The environment is made in a temporary folder, and holds nothing but the wheel and what it
needs; the smoke test runs outside the source tree.
"""

from __future__ import annotations

import argparse
import os
import shutil
import subprocess
import sys
import tempfile
import zipfile
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
MOST = 2**20
"""Bytes of the wheel without the weights that come along."""
SMOKE = """
import flowback, importlib.metadata as m
names = ("torch", "torchvision", "timm", "numpy", "pillow", "accelerate", "huggingface-hub", "tyro")
print(*(f"{name} {m.version(name)}" for name in names), sep=", ")
flow = flowback.Flow.from_pretrained("fashion")
print(flow.about)
assert "site-packages" in flowback.__file__, flowback.__file__
drawn = flow.sample(labels=[0, 9], seeds=[0, 1], guidance=1.0)
assert drawn.shape == (2, 1, 28, 28) and drawn.isfinite().all()
assert flowback.classify(flow, drawn.clamp(-1, 1)).shape == (2, 10)
"""


def main() -> None:
    """Build, check, install, try."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("dependencies", choices=("newest", "lowest"), nargs="?", default="newest")
    dependencies = parser.parse_args().dependencies
    shutil.rmtree(ROOT / "dist", ignore_errors=True)
    run(sys.executable, "-m", "build", "--no-isolation", "--outdir", ROOT / "dist", ROOT)
    run(sys.executable, "-m", "twine", "check", "--strict", *sorted((ROOT / "dist").iterdir()))
    (wheel,) = (ROOT / "dist").glob("*.whl")
    check_contents(wheel)
    with tempfile.TemporaryDirectory() as folder:
        try_out(wheel, dependencies, Path(folder))
    print(f"{wheel.relative_to(ROOT)}: installs and runs with the {dependencies} dependencies.")


def check_contents(wheel: Path) -> None:
    """The wheel has the package, its weights and their cards, no pickles, and is small without them."""
    with zipfile.ZipFile(wheel) as archive:
        files = {item.filename: item.compress_size for item in archive.infolist()}
    weights = {name: size for name, size in files.items() if name.startswith("flowback/weights/")}
    rest = sum(files.values()) - sum(weights.values())
    print(f"{wheel.name}: {rest / 1e6:.2f} MB, and {sum(weights.values()) / 1e6:.2f} MB of weights.")
    assert rest <= MOST, f"the wheel without weights has {rest} bytes, more than {MOST}"
    flows = {name.split("/")[2] for name in weights}
    parts = ("config.json", "model.safetensors", "README.md", "evaluation.json", "samples.png")
    missing = [
        f"{flow}/{part}" for flow in flows for part in parts if f"flowback/weights/{flow}/{part}" not in files
    ]
    assert flows, "no weights come along"
    assert not missing, f"weights are incomplete: {missing}"
    assert "flowback/py.typed" in files
    assert not [name for name in files if name.endswith((".pt", ".pth", ".pkl", ".pyc"))]


def try_out(wheel: Path, dependencies: str, folder: Path) -> None:
    """Install the wheel into an empty environment, and draw and train with it."""
    run(sys.executable, "-m", "uv", "venv", "--quiet", "--python", sys.executable, folder / "env")
    scripts = folder / "env" / ("Scripts" if os.name == "nt" else "bin")
    install = (sys.executable, "-m", "uv", "pip", "install", "--quiet", "--python", scripts / "python")
    if dependencies == "lowest":
        run(*install, "--resolution", "lowest-direct", "--requirements", ROOT / "pyproject.toml")
        run(*install, "--no-deps", wheel)
    else:
        run(*install, wheel)
    quiet = {**os.environ, "PYTHONPATH": "", "FLOWBACK_CACHE": str(folder / "cache"), "HF_HUB_OFFLINE": "1"}
    run(scripts / "python", "-c", SMOKE, cwd=folder, env=quiet)
    run(scripts / "flowback", "sample", "fashion", "--count", 4, cwd=folder, env=quiet)
    small = ("--train.steps", 3, "--train.warmup-steps", 1, "--out", "run")
    run(scripts / "flowback", "train", "digits-mini", *small, cwd=folder, env=quiet)
    assert (folder / "samples" / "fashion.png").is_file()


def run(*command: object, **options: object) -> None:
    """Run a command; end here if it fails."""
    words = [str(word) for word in command]
    done = subprocess.run(words, check=False, **options)  # type: ignore[call-overload]
    if done.returncode:
        sys.exit(f"failed: {' '.join(words[:6])} ...")


if __name__ == "__main__":
    main()
