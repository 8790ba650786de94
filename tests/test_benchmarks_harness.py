"""The benchmarks' harness, on an op of its own whose competitors can be wrong, slow or absent; timing and reports."""

import json
import sys
import time
from dataclasses import replace
from pathlib import Path

import pytest
import torch

sys.path.insert(0, str(Path(__file__).parents[1]))

from benchmarks import __main__ as command_line
from benchmarks import machine, registry, report, threads, timing
from benchmarks.harness import Bound, Expected, Settings, WrongResult, run_case
from benchmarks.registry import Benchmark, Case, Competitor, arguments, providers
from benchmarks.timing import Timed, measure, quantiles, speedup
from evkernels import backends


@pytest.fixture(autouse=True)
def _one_thread_and_ordinary_memory(same_threads_after):
    """The suite fills uninitialised memory, which costs time that no user spends."""
    torch.set_num_threads(1)
    torch.use_deterministic_algorithms(False)


def double(x):
    return x * 2


def toy(function=double, *competitors: Competitor, **changes) -> Benchmark:
    fields = {
        "op": "toy",
        "function": function,
        "eager": double,
        "inputs": lambda shape, dtype: (torch.arange(1, 1 + shape[0]).to(dtype),),
        "shapes": ((64,), (256,)),
        "gate_shapes": ((64,),),
        "tiny_shape": (3,),
        "floor_bytes": lambda shape, itemsize, mode: 2 * itemsize * shape[0],
        "dtypes": (torch.float32,),
        "modes": ("inference",),
        "layouts": ("contiguous",),
        "competitors": competitors,
        "compiles": False,
    }
    return Benchmark(**(fields | changes))


def run_toy(benchmark: Benchmark, mode: str = "inference"):
    case = Case(benchmark, mode, benchmark.shapes[0], benchmark.dtypes[0])
    return run_case(case, *providers(case, "cpu"), Settings(min_time=0.002, rounds=4))


def sleepy(x):
    deadline = time.process_time() + 0.002
    while time.process_time() < deadline:
        pass
    return x * 2


@pytest.mark.skipif(backends.compiled_error is not None, reason=str(backends.compiled_error))
class TestHarness:
    @pytest.mark.parametrize("wrong", [lambda x: x * 2.001, lambda x: (x * 2)[:-1], lambda x: (x * 2).double()])
    def test_wrong_result_gets_no_time(self, wrong):
        result = run_toy(toy(wrong))
        assert list(result.failures) == ["cpu"]
        assert not result.ours
        assert "WRONG: cpu" in report.markdown([result], {})
        assert "faster" not in report.row(result)

    def test_wrong_integers_are_found(self):
        result = run_toy(toy(lambda x: x * 2 + (x == 7), dtypes=(torch.int32,)))
        assert result.failures == {"cpu": "result 0: 1 of 64 values differ"}

    def test_wrong_gradient_is_found(self):
        class Wrong(torch.autograd.Function):
            @staticmethod
            def forward(ctx, x):
                return x * 2

            @staticmethod
            def backward(ctx, grad):
                return grad * 2.01

        benchmark = toy(Wrong.apply, modes=registry.MODES)
        assert not run_toy(benchmark, "forward").failures
        assert "result 1: error" in run_toy(benchmark, "forward+backward").failures["cpu"]

    def test_wrong_results_raise(self):
        case = Case(toy(lambda x: x), "inference", (3,), torch.float32)
        (ours,) = (provider for provider in providers(case, "cpu")[0] if provider.backend)
        bound = Bound(case, ours, arguments(case, "contiguous", "cpu"), "cpu")
        with pytest.raises(WrongResult, match="result 0: error 3, eager PyTorch's allows"):
            Expected(case).verify(bound)

    def test_raising_provider_does_not_end_the_run(self):
        def raises(x):
            raise RuntimeError("no such luck\nsecond line")

        result = run_toy(toy(raises, Competitor("broken", lambda: raises)))
        assert result.failures == {"cpu": "RuntimeError: no such luck"}
        assert result.absent == {"broken": "RuntimeError: no such luck"}
        assert [m.label for m in result.measurements] == ["eager"]

    def test_competitor_with_another_result_is_timed_and_marked(self):
        result = run_toy(
            toy(double, Competitor("half", lambda: lambda x: x / 2), Competitor("known", lambda: double, differs="why"))
        )
        differs = {m.label: m.differs for m in result.competitors}
        assert differs["half"].startswith("result 0: error")
        assert differs["known"] == "why"
        assert any("known: why" in line for line in report.conclusion([result]))

    def test_absent_competitor_says_why(self):
        def load():
            import surely_no_such_package  # noqa: F401

        result = run_toy(toy(double, Competitor("peer", load)))
        assert result.absent == {"peer": "No module named 'surely_no_such_package'"}
        assert "Not measured: peer: No module named 'surely_no_such_package'" in report.conclusion([result])

    def test_says_where_we_are_slower(self):
        result = run_toy(toy(sleepy))
        assert result.measurements[1].speedup["eager"] < 0.5
        assert "SLOWER" in " ".join(report.row(result))
        lines = "\n".join(report.conclusion([result]))
        assert "Slower than the best competitor in 1 of 1 cases" in lines
        assert "toy inference float32 64: cpu" in lines

    def test_says_where_we_are_faster(self):
        result = run_toy(toy(double, Competitor("sleepy", lambda: sleepy), eager=sleepy))
        assert report.against_best(result).speedup > 2
        assert not report.losses(result)
        assert "In none of the 1 cases slower" in report.conclusion([result])[-1]

    def test_numbers_fit_together(self):
        result = run_toy(toy(floor_flops=lambda shape, mode: shape[0]))
        assert result.bytes == 2 * 4 * 64
        assert result.gflop_per_s > 0
        for m in result.measurements:
            assert m.ms_20 <= m.ms <= m.ms_80
            assert m.gb_per_s == pytest.approx(result.bytes / m.ms / 1e6)
            assert m.share_of_limit == pytest.approx(result.limit_ms / m.ms)

    def test_writes_everything(self, tmp_path, monkeypatch, capsys):
        monkeypatch.setattr(registry, "benchmarks", lambda: {"toy": toy()})
        readme = tmp_path / "README.md"
        readme.write_text("before\n" + "\nold\n".join(report.README_MARKS) + "\nafter\n")
        choice = ["toy", "--min-time", "0.002", "--out", str(tmp_path / "out")]
        assert command_line.main([*choice, "--update-readme", "--readme", str(readme)]) == 0
        content = json.loads((tmp_path / "out/results.json").read_text())
        assert content["machine"].keys() >= {"processor", "torch", "compiler", "commit", "instruction set", "threads"}
        assert [result["shape"] for result in content["results"]] == ["64", "256"]
        text = readme.read_text()
        assert text.startswith("before\n")
        assert text.endswith("\nafter\n")
        assert "| toy | inference | float32 | 256 |" in text
        assert "old" not in text
        assert "toy" in capsys.readouterr().out
        pytest.importorskip("matplotlib", reason="plots need matplotlib")
        assert {p.name for p in (tmp_path / "out").glob("*.png")} == {
            f"toy-{name}.png" for name in ("speedup", "time", "bandwidth")
        }

    def test_exit_code_of_a_wrong_result(self, tmp_path, monkeypatch):
        monkeypatch.setattr(registry, "benchmarks", lambda: {"toy": toy(lambda x: x)})
        assert command_line.main(["--quick", "--out", str(tmp_path)]) == 1

    @pytest.mark.parametrize(
        ("argv", "message"),
        [
            (["nonsense"], "no such op: nonsense; there are"),
            (["--providers", "nonsense"], "no such provider: nonsense; there are "),
            (["--threads", "0"], "--threads must be at least 1, got 0"),
            (["--min-time", "0"], "--min-time must be more than 0 seconds, got 0.0"),
            (["--update-readme", "--readme", "missing.md"], "missing.md must contain the lines"),
        ],
    )
    def test_bad_arguments(self, argv, message, capsys):
        assert command_line.main(argv) == 2
        assert message in capsys.readouterr().err


def test_samples_are_interleaved_and_every_other_round_reversed():
    order = []
    functions = [Timed(lambda name=name: order.append(name)) for name in "abc"]
    measure(functions, device="cpu", min_time=4e-7, rounds=4)
    del order[: len(order) - sum(timed.repetitions for timed in functions) * 4]
    changes = "".join(name for k, name in enumerate(order) if k == 0 or order[k - 1] != name)
    assert changes == "abcba" + "bcba"


def test_samples_grow_until_they_are_long_enough():
    timed = Timed(lambda: None)
    measure([timed], device="cpu", min_time=0.02, rounds=4)
    assert timed.repetitions > 1000
    assert timed.repetitions * quantiles(timed, "wall").median > 0.002


def test_an_interrupted_sample_does_not_end_their_growth():
    def sample(timed, repetitions):
        is_first = repetitions == 1
        return (1.0 if is_first else 1e-5 * repetitions), 1e-5 * repetitions, int(is_first)

    assert timing._repetitions(Timed(lambda: None), sample, seconds=5e-3) >= 450


def test_speedup_is_the_median_of_paired_ratios():
    """A drift that both suffer cancels: the second round is ten times slower for everybody."""
    ours, other = Timed(double), Timed(double)
    ours.cpu, other.cpu = [1.0, 10.0, 1.0, 1.0], [2.0, 20.0, 2.0, 3.0]
    assert speedup(ours, other, "cpu") == 2


def test_disturbed_samples_are_left_out_of_wall_times():
    timed = Timed(double, wall=[1.0, 9.0, 1.0, 9.0, 1.0, 1.0], cpu=[1.0] * 6, switches=[0, 3, 0, 1, 0, 0])
    assert quantiles(timed, "wall").high == 1
    timed.switches = [1] * 6
    assert quantiles(timed, "wall").high > 1


def test_machine_names_what_a_number_depends_on():
    facts = machine.describe("cpu", 3)
    assert facts["threads"] == "3"
    assert facts["torch"] == torch.__version__
    assert all(facts.values())


def test_update_readme_wants_both_marks_once(tmp_path):
    readme = tmp_path / "README.md"
    for content in (
        "none",
        report.README_MARKS[0],
        "".join(report.README_MARKS[::-1]),
        "".join(report.README_MARKS * 2),
    ):
        readme.write_text(content)
        with pytest.raises(ValueError, match="once each"):
            report.update_readme(readme, "text")
        assert readme.read_text() == content


def test_losses_within_a_layout_count():
    """Our best may win while one of our layouts loses to eager in that layout."""
    result = result_of_times({"eager": 2.0, "eager channels_last": 1.0, "cpu": 0.5, "cpu channels_last": 1.5})
    (loss,) = report.losses(result)
    assert (loss.ours.label, loss.other.label) == ("cpu channels_last", "eager channels_last")


def result_of_times(times: dict[str, float]):
    case = Case(toy(), "inference", (64,), torch.float32)
    here, absent = providers(case, "cpu")
    result = run_case(case, [p for p in here if not p.backend], absent, Settings(min_time=1e-4, rounds=2))
    (template,) = result.measurements
    result.measurements = [
        replace(
            template,
            name=label.partition(" ")[0],
            label=label,
            layout="channels_last" if "channels_last" in label else "contiguous",
            ours=label.startswith("cpu"),
            ms=ms,
            speedup={other: other_ms / ms for other, other_ms in times.items() if not other.startswith("cpu")},
        )
        for label, ms in times.items()
    ]
    return result


class TestThreads:
    """Ours on one thread and on more."""

    @pytest.fixture
    def known(self, monkeypatch):
        def shared(x):
            """Takes half as long on two threads."""
            time.sleep(0.02 / torch.get_num_threads())
            return x * 2

        known = {"shared": toy(shared), "other_bits": toy(lambda x: x * torch.get_num_threads())}
        monkeypatch.setattr(threads, "benchmarks", lambda: known)

    def test_ratio_is_that_of_the_times(self, known, tmp_path, capsys):
        argv = ["shared", "--threads", "2", "--quick", "--rounds", "6", "--out", str(tmp_path / "threads.md")]
        assert threads.main(argv) == 0
        text = capsys.readouterr().out
        assert text == (tmp_path / "threads.md").read_text()
        cells = text.splitlines()[-1].strip("| ").split(" | ")
        assert cells[:4] == ["toy", "inference", "float32", "64"]
        one, two = map(float, cells[4:6])
        assert float(cells[6].rstrip("x")) == pytest.approx(one / two, abs=0.02)
        assert one > 1.3 * two
        assert torch.get_num_threads() == 1

    def test_other_bits_get_no_time(self, known, tmp_path, capsys):
        assert threads.main(["other_bits", "--quick", "--rounds", "1", "--out", str(tmp_path / "threads.md")]) == 1
        assert "WRONG: other bits on other numbers of threads |" in capsys.readouterr().out

    @pytest.mark.parametrize(
        ("argv", "message"),
        [
            (["nonsense"], "no such op: nonsense"),
            (["--threads", "0"], "must be at least 1"),
            (["--rounds", "0"], "must be at least 1"),
        ],
    )
    def test_bad_arguments(self, known, argv, message, capsys):
        assert threads.main(argv) == 2
        assert message in capsys.readouterr().err
