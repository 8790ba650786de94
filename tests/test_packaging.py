"""Building and installing: a wheel that runs in a clean environment, a pure-Python install, set-up steps, bad builds.

The wheel test takes the compiled modules of the installed package instead of compiling them once more; the build
backend itself runs in the pure-Python case.
"""

import ast
import importlib.util
import os
import re
import shutil
import subprocess
import sys
import sysconfig
import time
import zipfile
from pathlib import Path

import pytest

import evkernels
from evkernels import backends

ROOT = Path(__file__).parents[1]
PACKAGE = Path(evkernels.__file__).parent
needs_compiled = pytest.mark.skipif(bool(backends.compiled_error), reason=str(backends.compiled_error))

REQUIRED = re.compile(r'require\("([\w.]+)", "(\w+)"')

SMOKE = """
import sys, warnings
import torch
with warnings.catch_warnings(record=True) as caught:
    warnings.simplefilter("always", RuntimeWarning)
    import evkernels
gates, c = torch.randn(2, 12, 5, 7), torch.randn(2, 3, 5, 7)
torch.testing.assert_close(evkernels.ops.lstm_gates(gates, c), evkernels.reference.lstm_gates(gates, c))
print(evkernels.__file__, evkernels.backends.serving("lstm_gates", "cpu")[0], len(caught))
"""

SMOKE_OF_TRITON = """
import os
os.environ["TRITON_INTERPRET"] = "1"
import evkernels.triton_kernels
"""


def run(*command, cwd=None, **environment) -> subprocess.CompletedProcess:
    """`environment` is added to this process's, of which None takes a variable away."""
    environment = {**os.environ, "EVKERNELS_BACKEND": None, "TRITON_INTERPRET": None, **environment}
    environment = {name: value for name, value in environment.items() if value is not None}
    command = list(map(str, command))
    return subprocess.run(command, cwd=cwd, env=environment, capture_output=True, text=True, timeout=600)


def succeed(*command, **options) -> str:
    done = run(*command, **options)
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


@pytest.fixture
def sources(tmp_path) -> Path:
    """A copy of what a source distribution holds, without anything built."""
    copy = tmp_path / "sources"
    copy.mkdir()
    for name in ("setup.py", "pyproject.toml", "README.md", "LICENSE"):
        shutil.copy(ROOT / name, copy)
    for name in ("evkernels", "triton_kernels", "csrc"):
        shutil.copytree(ROOT / name, copy / name, ignore=shutil.ignore_patterns("*.so", "__pycache__"))
    return copy


def install(wheel: Path, folder: Path) -> Path:
    """The interpreter of a new environment with `wheel` in it, and beside it torch as this process sees it."""
    succeed(sys.executable, "-m", "venv", "--without-pip", folder)
    python = folder / "bin" / "python"
    succeed(sys.executable, "-m", "pip", "--python", python, "install", "--no-index", "--no-deps", wheel)
    version = f"python{sys.version_info[0]}.{sys.version_info[1]}"
    paths = [path for path in sys.path if path.endswith("site-packages")]
    (folder / "lib" / version / "site-packages" / "torch.pth").write_text("\n".join(paths))
    return python


@needs_compiled
@pytest.mark.slow
def test_wheel_runs_in_a_clean_environment(sources, tmp_path):
    # Setuptools reads this file last: the build step is skipped, and its result is what stands in build_lib.
    (tmp_path / "setup.cfg").write_text(f"[build]\nbuild_lib = {tmp_path / 'lib'}\n[bdist_wheel]\nskip_build = 1\n")
    compiled = [*PACKAGE.glob("_C*.so"), *PACKAGE.glob("_host*.so")]
    assert len(compiled) == 2
    (tmp_path / "lib" / "evkernels").mkdir(parents=True)
    for module in compiled:
        shutil.copy(module, tmp_path / "lib" / "evkernels")
    wheel_command = (sys.executable, "setup.py", "build_py", "bdist_wheel", "--dist-dir", tmp_path)
    succeed(*wheel_command, cwd=sources, DIST_EXTRA_CONFIG=str(tmp_path / "setup.cfg"))
    (wheel,) = tmp_path.glob("*.whl")

    # _host is built for one Python version, so the wheel must not claim to serve others.
    cpython = f"cp{sys.version_info[0]}{sys.version_info[1]}"
    platform = sysconfig.get_platform().replace("-", "_")
    assert wheel.name == f"evkernels-{evkernels.__version__}-{cpython}-{cpython}-{platform}.whl"
    names = set(zipfile.ZipFile(wheel).namelist())
    modules = {str(path.relative_to(ROOT)) for path in (ROOT / "evkernels").rglob("*.py")}
    modules |= {f"evkernels/triton_kernels/{path.name}" for path in (ROOT / "triton_kernels").glob("*.py")}
    outside = {name for name in names if not name.startswith("evkernels/")}
    assert {name for name in names - outside if name.endswith(".py")} == modules
    assert {name for name in outside if ".dist-info/" not in name} == set()
    assert any(name.endswith("LICENSE") for name in outside)

    python = install(wheel, tmp_path / "venv")
    where, backend, warnings = succeed(python, "-I", "-c", SMOKE + SMOKE_OF_TRITON).split()
    assert Path(where).is_relative_to(tmp_path / "venv")
    assert (backend, warnings) == ("cpu", "0")
    assert "evkernels._C loaded" in succeed(tmp_path / "venv" / "bin" / "evkernels", "status")


@pytest.mark.slow
def test_without_a_compiler_the_install_is_pure_python(sources, tmp_path):
    (tmp_path / "bin").mkdir()
    wheel_command = (sys.executable, "-m", "pip", "wheel", "--no-build-isolation", "--no-deps", "-w", tmp_path, sources)
    succeed(*wheel_command, PATH=str(tmp_path / "bin"), CXX="", EVKERNELS_CUDA="0")
    (wheel,) = tmp_path.glob("*.whl")
    assert wheel.name.endswith("-py3-none-any.whl")
    where, backend, warnings = succeed(install(wheel, tmp_path / "venv"), "-I", "-c", SMOKE).split()
    assert Path(where).is_relative_to(tmp_path / "venv")
    assert (backend, warnings) == ("reference", "1")


@needs_compiled
@pytest.mark.skipif(not shutil.which("nm") or not shutil.which("readelf"), reason="no nm and readelf (binutils)")
def test_compiled_ops_need_nothing_but_the_stable_abi():
    (module,) = PACKAGE.glob("_C*.so")
    assert ".abi3." in module.name
    libraries = re.findall(r"NEEDED.*\[(.+?)\]", succeed("readelf", "--dynamic", module))
    system = re.compile(r"(libstdc\+\+|libm|libgcc_s|libc|libpthread|libdl|librt|ld-linux.*)\.so\.\d")
    assert {name for name in libraries if not system.fullmatch(name)} == {"libtorch_cpu.so", "libc10.so"}

    undefined = {line.split()[-1] for line in succeed("nm", "--dynamic", "--undefined-only", module).splitlines()}
    shims = {name for name in undefined if re.match(r"(aoti_)?torch_", name)}
    assert shims
    # Versioned names are the system's; _ZNSt and the like are the C++ standard library's.
    standard = re.compile(r".+@(GLIBC|GLIBCXX|CXXABI|GCC)_|_Z(T[ISV])?N?[KRO]*S[a-z]|__gmon_start__|_ITM_|_?_cxa")
    python = {name for name in undefined if re.match("_?Py", name)}
    assert {name for name in undefined - shims - python if not standard.match(name)} == set()
    assert python <= {"PyModule_Create2"}
    defined = succeed("nm", "--dynamic", "--defined-only", module).split()
    assert [name for name in defined if "evkernels" in name] == [], "kernels must not be visible to other libraries"


@pytest.mark.parametrize(
    ("environment", "message"),
    [
        ({"EVKERNELS_CUDA": "0"}, "no nvcc with include/cuda_runtime.h (set CUDA_HOME), or EVKERNELS_CUDA=0 is set"),
        ({"CUDA_HOME": "{toolkit}", "PATH": ""}, "no C++ compiler (set CXX)"),
    ],
)
def test_forced_cuda_build_fails_with_one_line(sources, tmp_path, environment, message):
    for file in ("bin/nvcc", "include/cuda_runtime.h"):
        (tmp_path / file).parent.mkdir()
        (tmp_path / file).touch()
    environment = {name: value.format(toolkit=tmp_path) for name, value in environment.items()}
    environment = {"EVKERNELS_CUDA": None, "FORCE_CUDA": "1", **environment}
    done = run(sys.executable, sources / "setup.py", "--version", **environment)
    assert done.returncode == 1
    assert len(done.stderr.strip().splitlines()) == 1
    assert message in done.stderr


COMPILER = """#!{bash}
echo "$0 $*" >> {log}
case "$*" in
  *--list-gpu-arch*) echo compute_80 compute_90 compute_100 compute_120 ;;
  *-dump*version*) echo 12.2.0 ;;
esac
while [ $# -gt 0 ]; do [ "$1" = -o ] && : > "$2"; shift; done
"""


@pytest.mark.skipif(not shutil.which("bash"), reason="the compilers of this test are scripts for bash")
def test_commands_of_a_cuda_build(sources, tmp_path):
    """With compilers that write down how they were called: what nvcc really makes is tests/test_cuda_build.py's."""
    log, toolkit = tmp_path / "log", tmp_path / "toolkit"
    (toolkit / "include").mkdir(parents=True)
    (toolkit / "include" / "cuda_runtime.h").touch()
    for compiler in (tmp_path / "c++", toolkit / "bin" / "nvcc"):
        compiler.parent.mkdir(exist_ok=True)
        compiler.write_text(COMPILER.format(bash=shutil.which("bash"), log=log))
        compiler.chmod(0o755)
    unset = dict.fromkeys(("TORCH_CUDA_ARCH_LIST", "EVKERNELS_CUDA", "PYTORCH_NVCC", "DEBUG"))
    built = (sys.executable, "setup.py", "build_ext", "--build-lib", tmp_path, "--build-temp", tmp_path / "objects")
    succeed(*built, cwd=sources, CXX=str(tmp_path / "c++"), CUDA_HOME=str(toolkit), CCACHE_DISABLE="1", **unset)
    calls = log.read_text().splitlines()
    compiled = [call for call in calls if call.startswith(str(toolkit)) and " -c " in call]
    assert len(compiled) == len(list((ROOT / "csrc").glob("*/cuda.cu")))
    for call in compiled:
        codes = set(re.findall(r"-gencode=arch=(\S+)", call))
        names = ("compute_80,code=sm_80", "compute_90,code=sm_90", "compute_100,code=sm_100")
        assert codes == {*names, "compute_100,code=compute_100"}
        assert "-DTORCH_STABLE_ONLY" in call
    (link,) = (call for call in calls if re.search(r"-o \S*/_C\.abi3\.so", call))
    assert link.count("/cuda.o") == len(compiled)
    assert link.count("/cpu.o") == len(list((ROOT / "csrc").glob("*/cpu.cpp")))
    assert "-lcudart_static" in link.split()
    assert "-lcudart" not in link.split()


def test_building_without_torch_says_what_to_install(sources):
    hide = "import runpy, sys; sys.modules['torch'] = None; runpy.run_path('setup.py')"
    done = run(sys.executable, "-c", hide, cwd=sources)
    assert done.returncode == 1
    assert "install torch >= 2.13" in done.stderr.strip().splitlines()[-1]


@pytest.fixture
def environment(tmp_path, monkeypatch):
    """tools/environment.py with its stamps and logs in a temporary folder."""
    spec = importlib.util.spec_from_file_location("environment", ROOT / "tools" / "environment.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    monkeypatch.setattr(module, "STAMPS", tmp_path / "stamps")
    monkeypatch.setattr(module, "LOGS", tmp_path / "log")
    return module


def test_set_up_step_runs_again_only_when_its_inputs_change(environment, tmp_path, capsys):
    count = [sys.executable, "-c", f"open({str(tmp_path / 'count')!r}, 'a').write('x')"]

    def times() -> int:
        return len((tmp_path / "count").read_text())

    environment.step("build [a,b]", [1], count)
    assert re.fullmatch(r"  build \[a,b\] +\d+\.\d s\n", capsys.readouterr().out)
    environment.step("build [a,b]", [1], count)
    assert capsys.readouterr().out.split()[-3:] == ["up", "to", "date"]
    assert times() == 1
    environment.step("build [a,b]", [2], count)
    environment.step("build [a,b]", [2], count, is_done=lambda: False)
    assert times() == 3


def test_set_up_step_that_fails_shows_its_log_and_is_not_stamped(environment, capsys):
    for _ in range(2):
        with pytest.raises(SystemExit) as ended:
            environment.step("build", [1], [sys.executable, "-c", "print('the reason'); raise SystemExit(3)"])
        assert ended.value.code == 1
        assert "the reason" in capsys.readouterr().out


def test_sources_decide_on_a_rebuild(environment, sources, monkeypatch):
    monkeypatch.setattr(environment, "ROOT", sources)
    before = environment.hash_of_sources()
    time.sleep(0.01)
    for path in sources.rglob("*"):
        path.touch()
    (sources / "evkernels" / "new.py").write_text("x = 1\n")
    assert environment.hash_of_sources() == before
    header = sources / "csrc" / "common" / "isa.h"
    header.write_text(header.read_text() + "\n")
    changed = environment.hash_of_sources()
    assert changed != before
    header.rename(header.with_name("renamed.h"))
    assert environment.hash_of_sources() not in (before, changed)


def test_set_up_installs_what_the_build_requires(environment):
    requires = re.search(r"^requires = (\[.*?\])", (ROOT / "pyproject.toml").read_text(), re.MULTILINE | re.DOTALL)
    assert set(ast.literal_eval(requires[1])) <= set(environment.TOOLS)


def test_the_runs_of_the_commands_ask_for_extras_that_exist():
    extras = re.findall(
        r"^(\w+) = \[", (ROOT / "pyproject.toml").read_text().partition("optional-dependencies]")[2], re.M
    )
    asked = re.findall(r"environment\.py (.*)$", (ROOT / "Makefile").read_text(), re.MULTILINE)
    assert asked
    assert {name for names in asked for name in names.split()} <= set(extras)


def test_every_optional_library_is_in_the_extra_its_error_names():
    extras = dict(
        re.findall(
            r"^(\w+) = (\[.*\])", (ROOT / "pyproject.toml").read_text().partition("optional-dependencies]")[2], re.M
        )
    )
    distributions = {"PIL": "pillow", "skimage": "scikit-image"}
    calls = [call for path in sorted(PACKAGE.rglob("*.py")) for call in REQUIRED.findall(path.read_text())]
    assert ("eventcv", "io") in calls
    for module, extra in calls:
        name = distributions.get(module.partition(".")[0], module.partition(".")[0])
        assert f'"{name}>=' in extras[extra], f"require({module!r}, {extra!r}) is not met by {extras[extra]}"
