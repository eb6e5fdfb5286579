"""``flowback push``: publish a flow on the Hugging Face Hub, or write what would be published."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import tyro

from flowback.cli.console import say
from flowback.cli.options import parse
from flowback.errors import InputError
from flowback.files import check_folder

__all__ = ["Options", "run"]


@dataclass(frozen=True)
class Options:
    """Upload a flow with its model card to the Hugging Face Hub: averaged weights, settings, picture, record.

    The training state is not uploaded, and of paths on this machine only the last part. Log in first with
    `hf auth login`. With --out, the folder is written and nothing is uploaded.
    """

    checkpoint: tyro.conf.Positional[Path]
    """A run's folder (its newest checkpoint), or a checkpoint folder."""
    name: tyro.conf.Positional[str]
    """The repository, as `owner/name`; made if there is none."""
    record: Path | None = None
    """JSON of `flowback evaluate`, for the card's figures; by default the one beside the checkpoint."""
    licence: str | None = None
    """Licence of the weights, by its SPDX name: `apache-2.0`, say."""
    guidance: float = 0.0
    """Guidance of the card's picture."""
    half: bool = False
    """Store the weights in fp16, half the size; they are read as fp32 again."""
    private: bool = False
    """Whether a new repository is private."""
    revision: str | None = None
    """An existing branch; the main one if left out."""
    out: Path | None = None
    """Write the folder here, and upload nothing."""


def run(argv: list[str]) -> None:
    """Write or upload."""
    options = parse(Options, argv, "push")
    import torch

    from flowback import checkpoint as checkpoints
    from flowback.model import Flow
    from flowback.model_card import Card

    if options.out is not None:
        check_folder(options.out, "--out")
    folder = checkpoints.resolve(options.checkpoint)
    flow = Flow.from_pretrained(folder)
    record = options.record
    if record is None and (folder / "evaluation" / "evaluate.json").is_file():
        record = folder / "evaluation" / "evaluate.json"
    card = Card(options.name, record, options.licence, options.guidance)
    dtype = torch.float16 if options.half else None
    if options.out is not None:
        if options.out.resolve() == folder.resolve():
            raise InputError(f"--out {options.out} is the checkpoint itself; choose another folder.")
        flow.save_pretrained(options.out, card, dtype)
        say(f"{options.out}: what would be uploaded as {options.name}. Read its README.md.")
    else:
        address = flow.push_to_hub(
            options.name, card, dtype, private=options.private, revision=options.revision
        )
        say(f"{address}   (flowback sample {options.name} --count 64)")
    if record is None:
        say("The card has no figures: run `flowback evaluate` first, or give --record.")
