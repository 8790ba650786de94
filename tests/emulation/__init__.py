"""Placeholder until the emulation branch is merged."""

SEED = 0


def why_not():
    return "not merged yet"


def load():
    raise RuntimeError
