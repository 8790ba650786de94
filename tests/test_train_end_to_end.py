"""From simulated recordings to a detector that finds the shapes in recordings that it has not seen."""

import pytest

pytest.importorskip("h5py", reason="h5py is not installed")
pytest.importorskip("hdf5plugin", reason="hdf5plugin is not installed")
pytest.importorskip("omegaconf", reason="omegaconf is not installed")
pytest.importorskip("pycocotools", reason="pycocotools is not installed")
pytest.importorskip("rich", reason="rich is not installed")

from moving_shapes import save_recordings
from test_train import rows

from evkernels.__main__ import main


# 70 s on a quiet core: with as few steps as the suite has time for, shapes are not yet found.
@pytest.mark.timeout(3600)
@pytest.mark.training
def test_detector_of_moving_shapes(tmp_path):
    for name, count, seed in (("train", 32, 1), ("val", 3, 2)):
        save_recordings(tmp_path / "raw" / name, count, 12, seed)
        assert main(["preprocess", str(tmp_path / "raw" / name), str(tmp_path / name), "--bins", "2"]) == 0
    (tmp_path / "shapes.yaml").write_text(
        f"""
train: {tmp_path}/train
validate: {tmp_path}/val
num_classes: 2
model: {{size: tiny, embed_dim: 16, attention: {{dim_head: 16}}, partition_split_32: 1}}
sampling: random
steps: 400
batch_size: 4
length: 3
learning_rate: 0.002
workers: 0
"""
    )
    assert main(["train", "rvt", str(tmp_path / "shapes.yaml"), "--out", str(tmp_path / "run")]) == 0
    (validation,) = rows(tmp_path / "run" / "validation.csv")
    assert float(validation["AP50"]) > 0.4
