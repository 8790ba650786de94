"""One name, one file in every layer: what the repository's layout promises is there for every public op."""

import ast
import inspect
import re
from pathlib import Path

import pytest
from setuptools import find_packages

from evkernels import ops, reference
from evkernels.ops.registration import schemas

ROOT = Path(__file__).parents[1]
OPS = {name: getattr(ops, name) for name in ops.__all__}
STEM_OF = {name: function.__module__.rpartition(".")[2] for name, function in OPS.items()}
STEMS = sorted(set(STEM_OF.values()))
LAYERS = [
    "evkernels/reference/{}.py",
    "evkernels/ops/{}.py",
    "csrc/{}/cpu.cpp",
    "csrc/{}/cuda.cu",
    "csrc/{}/kernels.cuh",
    "triton_kernels/{}.py",
    "tests/test_{}.py",
    *["benchmarks/bench_{}.py"] * (ROOT / "benchmarks").is_dir(),
]
# Stem -> layers that it goes without, and why.
WITHOUT = {
    # In CUDA a step is a library's product and lstm_gates: ops/conv_lstm_1x1_composed.py. Triton has kernels.
    "conv_lstm_1x1": {"csrc/{}/cuda.cu", "csrc/{}/kernels.cuh"},
    # On a device a step is a library's convolution and the gates: ops/conv_lstm_3x3_composed.py and its neighbour.
    "conv_lstm_3x3": {"csrc/{}/cuda.cu", "csrc/{}/kernels.cuh", "triton_kernels/{}.py"},
    "conv_gru_3x3": {"csrc/{}/cuda.cu", "csrc/{}/kernels.cuh", "triton_kernels/{}.py"},
    # On a device products are a library's, and what is done between them is Triton's.
    "contrastive_loss": {"csrc/{}/cuda.cu", "csrc/{}/kernels.cuh"},
    # Reductions of rows, and counts between a library's products: on GPUs Triton serves.
    "normalized_mse_cosine": {"csrc/{}/cuda.cu", "csrc/{}/kernels.cuh"},
    "retrieval_recall": {"csrc/{}/cuda.cu", "csrc/{}/kernels.cuh"},
    # Products of features that are computed on the way: on GPUs Triton serves.
    "learnable_time_embedding": {"csrc/{}/cuda.cu", "csrc/{}/kernels.cuh"},
    # Pointwise work and sums of open gates alone: on GPUs Triton serves.
    "time_basis": {"csrc/{}/cuda.cu", "csrc/{}/kernels.cuh"},
    # Small products, which a library does well: on GPUs the reference serves.
    "expert_router": {"csrc/{}/cuda.cu", "csrc/{}/kernels.cuh", "triton_kernels/{}.py"},
    # On GPUs PyTorch's own fused attention serves.
    "window_attention": {"csrc/{}/cuda.cu", "csrc/{}/kernels.cuh", "triton_kernels/{}.py"},
    # A library's products, which are large, and pointwise work: on GPUs the reference serves.
    "residual_mlp": {"csrc/{}/cuda.cu", "csrc/{}/kernels.cuh", "triton_kernels/{}.py"},
    # Norms of a batch are sums over all of it: on GPUs the reference, made of PyTorch's own operators, serves.
    "batch_norm_activation": {"csrc/{}/cuda.cu", "csrc/{}/kernels.cuh", "triton_kernels/{}.py"},
    # Means and pointwise work: on GPUs the reference serves.
    "channel_attention": {"csrc/{}/cuda.cu", "csrc/{}/kernels.cuh", "triton_kernels/{}.py"},
    # Pointwise work on small planes: on GPUs the reference serves.
    "blur_soft_pool2d": {"csrc/{}/cuda.cu", "csrc/{}/kernels.cuh", "triton_kernels/{}.py"},
    # Pointwise work behind a short sum, in GPUs' favourite layout or not: the reference serves, compiled.
    "channel_rms_norm": {"csrc/{}/cuda.cu", "csrc/{}/kernels.cuh", "triton_kernels/{}.py"},
    "separable_norm_conv2d": {"csrc/{}/cuda.cu", "csrc/{}/kernels.cuh", "triton_kernels/{}.py"},
}
FOLDERS = ("evkernels", "csrc", "triton_kernels", "tests", "benchmarks", "tools")
SUFFIXES = (".py", ".cpp", ".h", ".inl", ".cuh", ".cu")
FILES = (path for folder in FOLDERS for path in (ROOT / folder).rglob("*"))
SOURCES = [ROOT / "setup.py", *sorted(path for path in FILES if path.suffix in SUFFIXES)]


def relative(path: Path) -> str:
    return str(path.relative_to(ROOT))


def test_there_are_ops_and_sources():
    assert "lstm_gates" in STEMS
    assert len(SOURCES) > 40


@pytest.mark.parametrize("stem", STEMS)
def test_stem_has_a_file_in_every_layer(stem):
    absent = {layer for layer in LAYERS if not (ROOT / layer.format(stem)).exists()}
    assert absent == WITHOUT.get(stem, set())


def test_no_folder_or_file_belongs_to_nothing():
    folders = {path.name for path in (ROOT / "csrc").iterdir() if path.is_dir()}
    assert folders - {"common", "host"} == set(STEMS)
    benchmarks = {path.stem.removeprefix("bench_") for path in (ROOT / "benchmarks").glob("bench_*.py")}
    others = {path.stem for folder in ("events", "models", "nn") for path in (ROOT / "evkernels" / folder).iterdir()}
    assert benchmarks <= set(STEMS) | others


@pytest.mark.parametrize("name", OPS)
def test_op_has_a_schema_and_a_reference_of_the_same_signature(name):
    assert name in schemas
    assert name in reference.__all__
    parameters = [list(inspect.signature(function).parameters) for function in (OPS[name], getattr(reference, name))]
    assert parameters[0] == parameters[1]


@pytest.mark.parametrize("name", OPS)
def test_op_is_in_the_readme(name):
    rows = re.findall(rf"^\| `{name}\(.*\|$", (ROOT / "README.md").read_text(), re.MULTILINE)
    assert len(rows) == 1
    _, fuses, equivalent, *kernels = [cell.strip() for cell in rows[0].strip("|").split(" | ")]
    assert fuses
    ast.parse(equivalent.strip("`"))
    assert len(kernels) == 3


@pytest.mark.parametrize("name", OPS)
def test_docstring_has_its_sections_in_order(name):
    text = inspect.getdoc(OPS[name])
    assert text.partition("\n\n")[0].endswith(".")
    # Not every op has a paper as its source.
    sections = ["Equivalent to::", "Args:", "Returns:", "Raises:", "eterministic", *["Source:"] * ("Source:" in text)]
    positions = [text.find(section) for section in sections]
    assert -1 not in positions, sections[positions.index(-1)]
    assert positions == sorted(positions)
    assert re.search(r"[Dd]ifferentiable", text)
    equivalent = [line[4:] for line in text[positions[0] : positions[1]].splitlines() if line.startswith("    ")]
    assert equivalent
    ast.parse("\n".join(equivalent))
    described = re.findall(r"^    (\w[\w, ]*):", text[positions[1] : positions[2]], re.MULTILINE)
    assert [word for names in described for word in names.split(", ")] == list(inspect.signature(OPS[name]).parameters)


@pytest.mark.parametrize("path", SOURCES, ids=relative)
def test_source_file_is_short_and_says_what_it_is(path):
    text = path.read_text()
    longest = 600 if path.parent == ROOT / "tests" else 400
    assert text.count("\n") <= longest
    if path.suffix == ".py":
        # The oldest Python that the package supports must be able to read it.
        assert ast.get_docstring(ast.parse(text, feature_version=(3, 10)))
    else:
        assert text.startswith("//")
    # Written so that this file does not hold the words itself.
    forbidden = ["march=" + "native", "TO" + "DO", "FIX" + "ME", "X" * 3, "except" + ":", "except Exception" + ": pass"]
    assert [word for word in forbidden if word in text] == []


def test_every_package_is_installed():
    listed = re.search(r"^packages = \[(.*?)\]", (ROOT / "pyproject.toml").read_text(), re.MULTILINE | re.DOTALL)
    found = {"evkernels", *(f"evkernels.{name}" for name in find_packages(ROOT / "evkernels"))}
    assert set(ast.literal_eval(f"[{listed[1]}]")) == found | {"evkernels.triton_kernels"}


def test_setup_is_small():
    assert (ROOT / "setup.py").read_text().count("\n") < 100
