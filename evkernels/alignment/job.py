"""The actions of `python -m evkernels align`."""

from __future__ import annotations

import argparse
import ast
from contextlib import nullcontext
from pathlib import Path

import torch

from evkernels import arguments
from evkernels.alignment import report, windows
from evkernels.alignment.base import BaseAlignmentModule
from evkernels.alignment.checkpoints import build, load_checkpoint
from evkernels.alignment.config import CONFIGS, config_from_dict
from evkernels.alignment.data import KINDS, AlignmentDataset
from evkernels.alignment.diagnosis import diagnose_misalignment
from evkernels.alignment.encoders import load_image_encoder
from evkernels.alignment.metrics import diagnose_alignment_quality, evaluate_alignment_comprehensive
from evkernels.alignment.selection import auto_select_alignment_strategy, print_strategy_recommendation
from evkernels.alignment.trainer import TRAINERS
from evkernels.arguments import InputError
from evkernels.demo.terminal import Terminal
from evkernels.reconstruct.weights import load_network
from evkernels.train import processes

CHECKPOINT = "alignment.safetensors"
# Of a duration that is not given, where recordings have to be cut.
_DURATION = ("50ms", 50_000)

Split = tuple[AlignmentDataset, AlignmentDataset]


def train(args: argparse.Namespace) -> int:
    """Trains one module per duration."""
    with processes.group(arguments.device(args.device)) as device:
        _train_each(args, device)
    return 0


def _train_each(args: argparse.Namespace, device: torch.device) -> None:
    terminal, rank = Terminal(), processes.rank()
    say = terminal.line if rank == 0 else lambda text: None
    for name, folder in _targets(args):
        if folder.exists() and (folder / "alignment.state").exists() and not args.resume:
            raise InputError(f"--out {folder}: holds an earlier run; --resume goes on with it")
        pairs = _pairs(args, name)
        held_in, held_out = _split(pairs, args.held_out, args.seed)
        alignment = _module(args, held_in, rank)
        if rank == 0:
            arguments.output_folder(args.out)
        if args.resume and not (folder / "alignment.state").exists():
            say(f"--resume: {folder} holds no alignment.state, training begins at epoch 1")
        say(f"{len(held_in):,} pairs to train on, {len(held_out):,} held out; results in {folder}")
        kind = next(key for key, config in CONFIGS.items() if type(alignment.config) is config)
        trainer = TRAINERS[kind](
            alignment,
            held_in,
            held_out,
            learning_rate=args.learning_rate,
            batch_size=args.batch_size,
            patience=args.patience,
            device=device,
            seed=args.seed,
        )
        title = f"training, {args.num_epochs} epochs"
        with terminal.step(title, args.num_epochs) if rank == 0 else nullcontext(lambda: None) as advance:
            history = trainer.train(
                args.num_epochs, folder / "alignment.pt", args.resume, lambda row, advance=advance: advance()
            )
        if rank == 0:
            report.draw_training(folder / "training.png", history)
            best = history[trainer.best_epoch]
            say(f"best epoch {best['epoch']}: " + report.in_words(best))


def evaluate(args: argparse.Namespace) -> int:
    """Writes what a checkpoint makes of pairs; of recordings and N-MNIST, those that a training holds out."""
    terminal, alignment = Terminal(), load_checkpoint(args.checkpoint)
    for name, folder in _targets(args):
        held_out = _split(_pairs(args, name), 0.2, 0)[1]
        event, target, aligned = _aligned(alignment, held_out)
        embeddings = alignment.embed(event, target)
        metrics = evaluate_alignment_comprehensive(aligned, target, *(x.detach() for x in embeddings))
        folder.mkdir(parents=True, exist_ok=True)
        report.write(
            folder,
            str(args.checkpoint),
            metrics,
            *embeddings,
            diagnose_alignment_quality(aligned, target),
        )
        terminal.line(f"{len(held_out):,} pairs: {report.in_words(metrics)}")
        terminal.line(f"report: {folder / 'report.md'}")
    return 0


def diagnose(args: argparse.Namespace) -> int:
    """Says how far apart features are."""
    terminal = Terminal()
    for name in _durations(args):
        pairs = _split(_pairs(args, name), 0.2, 0)[1] if args.checkpoint else _whole(_pairs(args, name))
        if args.checkpoint:
            _, target, event = _aligned(load_checkpoint(args.checkpoint), pairs)
        else:
            batch = pairs.batch(torch.arange(len(pairs)))
            event, target = batch["event_features"].float().flatten(1), batch["target_features"].float().flatten(1)
        if event.shape != target.shape:
            raise InputError(
                f"event features are {event.shape[1]} long and target features {target.shape[1]}: only features of one "
                "space can be compared; align them first and give --checkpoint"
            )
        found = diagnose_alignment_quality(event, target)
        evidence = diagnose_misalignment(acceptance_rate=found["estimated_acceptance_rate"])
        for key, value in {**found, "misalignment": evidence["severity"]}.items():
            terminal.line(f"{key.replace('_', ' ')}: {value if isinstance(value, str) else format(value, '.3f')}")
    return 0


def _durations(args) -> list[tuple[str, int] | None]:
    return args.durations or [None]


def _targets(args) -> list[tuple[tuple[str, int] | None, Path]]:
    named = [(name, "alignment" if name is None else f"alignment_{name[0]}") for name in _durations(args)]
    return [(name, args.out / folder) for name, folder in named]


def _pairs(args, name: tuple[str, int] | None) -> AlignmentDataset | Split | dict[str, torch.Tensor]:
    """Features as they lie in a folder, perhaps split already, or those of windows or digits."""
    source = args.source if name is None else args.source / name[0]
    for folder in (source, source / "features"):
        if (folder / "train").is_dir() and (folder / "val").is_dir():
            return tuple(AlignmentDataset.from_directory(folder / part) for part in ("train", "val"))
        if any(folder.glob("event_features.*")):
            return AlignmentDataset.from_directory(folder)
    if not args.source.exists():
        raise InputError(f"{args.source}: expected features or recordings, got nothing")
    if args.weights is None and args.source.is_dir() and name is None:
        return windows.digit_pairs(args.source)
    if args.weights is None:
        raise InputError("recordings need --weights of a reconstruction network, whose frames are the targets")
    encoder = None
    if args.encoder:
        if args.encoder_weights is None:
            raise InputError("--encoder needs --encoder_weights: weights are never downloaded")
        encoder = load_image_encoder(args.encoder, args.encoder_weights)
    network = load_network(args.weights)[1]
    return windows.recording_pairs(
        windows.read_recordings(args.source), network, (name or _DURATION)[1], encoder=encoder
    )


def _split(pairs, share: float, seed: int) -> Split:
    if isinstance(pairs, tuple):
        return pairs
    if isinstance(pairs, AlignmentDataset):
        return pairs.split(1 - share, seed=42 + seed)
    whole = _whole(pairs)
    if "recording" not in pairs:
        return whole.split(1 - share, seed=42 + seed)
    parts = windows.held_out_blocks(pairs["recording"], share)
    if not all(len(rows) for rows in parts):
        raise InputError(f"expected windows to train on and to hold out, got {len(whole)} in all: shorten --durations")
    return tuple(whole.subset(rows) for rows in parts)


def _whole(pairs) -> AlignmentDataset:
    if isinstance(pairs, tuple):
        return pairs[1]
    if isinstance(pairs, AlignmentDataset):
        return pairs
    return AlignmentDataset(**{name: pairs[name] for name in KINDS if name in pairs})


def _module(args, pairs: AlignmentDataset, rank: int) -> BaseAlignmentModule:
    strategy = args.strategy
    if strategy == "auto":
        recommended = auto_select_alignment_strategy(True, len(pairs))
        if rank == 0:
            print_strategy_recommendation(recommended)
        strategy = recommended.strategy
    dims = pairs.dims()
    if any(len(shape) != 1 for shape in dims.values()):
        raise InputError(f"features must be [N, D], got rows of {dims}")
    fields: dict = {"event_dim": dims["event_features"][0], "target_dim": dims["target_features"][0]}
    if strategy == "triple_modal" and "text_features" in dims:
        fields["text_dim"] = dims["text_features"][0]
    elif strategy == "triple_modal":
        fields["use_text_alignment"] = False
    for text in args.set:
        key, equals, value = text.partition("=")
        if not equals:
            raise InputError(f"--set must be KEY=VALUE, got {text!r}")
        try:
            fields[key] = ast.literal_eval(value)
        except (SyntaxError, ValueError):
            fields[key] = value
    torch.manual_seed(args.seed)
    return build(config_from_dict(strategy, fields))


@torch.no_grad()
def _aligned(alignment: BaseAlignmentModule, pairs: AlignmentDataset):
    batch = pairs.batch(torch.arange(len(pairs)))
    event, target = batch["event_features"].float(), batch["target_features"].float()
    if event.shape[1:] != (alignment.config.event_dim,) or target.shape[1:] != (alignment.config.target_dim,):
        raise InputError(
            f"the checkpoint takes event features of {alignment.config.event_dim} and target features of "
            f"{alignment.config.target_dim}, got {tuple(event.shape[1:])} and {tuple(target.shape[1:])}"
        )
    return event, target, alignment(event)
