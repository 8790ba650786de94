"""Sequences from preprocessed recordings: frames, boxes, resets, padding as in the files; workers; a layer on them."""

import numpy as np
import pytest
import torch
from torch.utils.data import DataLoader

pytest.importorskip("h5py", reason="h5py is not installed")
pytest.importorskip("hdf5plugin", reason="hdf5plugin is not installed")
pytest.importorskip("rich", reason="rich is not installed")

import h5py
from preprocess_files import random_events, save_h5
from test_preprocess_labels import boxes

from evkernels.__main__ import main
from evkernels.data import PreprocessedRecording, RandomSequences, SequenceBatch, StreamingSequences, collate, find
from evkernels.nn import ConvLSTM

HEIGHT, WIDTH = 6, 8
# Frames of 50 ms, and those with boxes: two boxes each.
LENGTHS = {"a": 7, "b": 3, "c": 5, "d": 12}
LABELLED = {"a": [1, 3, 6], "c": [0, 4], "d": [2, 3]}


@pytest.fixture(scope="module")
def tree(tmp_path_factory):
    folder = tmp_path_factory.mktemp("tree")
    for name, length in LENGTHS.items():
        e = random_events(100 * length, 50_000 * length - 20, start=0, width=WIDTH, height=HEIGHT)
        e.t[0], e.t[-1] = 0, 50_000 * length - 20
        save_h5(folder / "in" / f"{name}_td.h5", e)
        if name in LABELLED:
            table = boxes(np.repeat([50_000 * (index + 1) for index in LABELLED[name]], 2))
            table["x"], table["class_id"] = np.arange(len(table)) % 5, np.arange(len(table)) % 2
            np.save(folder / "in" / f"{name}_bbox.npy", table)
    run = ["preprocess", str(folder / "in"), str(folder / "out"), "--bins", "2"]
    assert main(run) == 0
    return folder / "out"


def whole(tree, name):
    with h5py.File(next((tree / name).rglob("*.h5"))) as file:
        return torch.from_numpy(file["data"][:])


def frames_until(name):
    """Windows end with the last label; without labels they cover the recording."""
    return LABELLED[name][-1] + 1 if name in LABELLED else LENGTHS[name]


def test_a_recording(tree):
    names = [recording.folder.name for recording in find(tree)]
    assert names == ["a", "b", "c", "d"]
    a = PreprocessedRecording(tree / "a")
    assert (len(a), a.shape, a.dtype) == (7, (4, HEIGHT, WIDTH), np.uint8)
    assert a.times.tolist() == [50_000 * k for k in range(1, 8)]
    assert np.flatnonzero(a.labelled).tolist() == LABELLED["a"]
    assert a.boxes.dtype == np.float32
    assert a.boxes.tolist() == [[k % 5, 1, min(3, 7 - k % 5), 2, k % 2, 0] for k in range(6)]
    assert a.first_box.tolist() == [0, 0, 2, 2, 4, 4, 4, 6]
    out = np.zeros((3, 4, HEIGHT, WIDTH), np.uint8)
    a.read(2, out)
    assert np.array_equal(out, whole(tree, "a")[2:5])
    assert not PreprocessedRecording(tree / "b").labelled.any()


def test_random_sequences_end_with_labels(tree):
    data = RandomSequences(tree, length=3)
    # d has its first label in the third frame; those of a and c in the second and first have too few before them.
    expected = [("a", 1), ("a", 4), ("c", 2), ("d", 0), ("d", 1)]
    assert len(data) == len(expected)
    for sample, (name, begin) in zip(data, expected, strict=True):
        assert torch.equal(sample.frames[:, 0], whole(tree, name)[begin : begin + 3])
        assert sample.reset.ravel().tolist() == [True, False, False]
        assert not sample.padding.any()
        assert sample.labelled[-1].all()
        steps = [step for step in range(3) if begin + step in LABELLED[name] for _ in range(2)]
        assert sample.box_frames.tolist() == [[step, 0] for step in steps]
        assert len(sample.boxes_of(2, 0)) == 2
        assert sample.times.ravel().tolist() == [50_000 * (begin + k + 1) for k in range(3)]
    assert torch.equal(data[-1].frames, data[4].frames)
    with pytest.raises(IndexError):
        data[5]


def test_random_sequences_at_equal_distances(tree):
    data = RandomSequences(tree, length=3, every=2)
    assert len(data) == sum(max(0, (frames_until(name) - 3) // 2 + 1) for name in LENGTHS)
    assert torch.equal(data[1].frames[:, 0], whole(tree, "a")[2:5])


def test_collate_orders_boxes_by_step_and_sample(tree):
    data = RandomSequences(tree, length=3)
    batch = collate([data[0], data[1], data[3]])
    assert isinstance(batch, SequenceBatch)
    assert (len(batch), batch.frames.shape) == (3, (3, 3, 4, HEIGHT, WIDTH))
    assert batch.box_frames.tolist() == sorted(batch.box_frames.tolist())
    for index, sample in enumerate([data[0], data[1], data[3]]):
        assert torch.equal(batch.frames[:, index], sample.frames[:, 0])
        for step in range(3):
            assert torch.equal(batch.boxes_of(step, index), sample.boxes_of(step, 0))
    with pytest.raises(ValueError, match="of one shape"):
        collate([data[0], RandomSequences(tree, length=2)[0]])
    with pytest.raises(ValueError, match="no sequences"):
        collate([])


def replayed(batches, size):
    """Each recording's frames as the streams deliver them, in order, by the values of its first frame."""
    streams, done = [[] for _ in range(size)], []
    for batch in batches:
        for n in range(size):
            for t in range(len(batch.frames)):
                if batch.reset[t, n]:
                    done.append(streams[n])
                    streams[n] = []
                if batch.padding[t, n]:
                    assert not batch.frames[t, n].any()
                    assert not batch.labelled[t, n]
                else:
                    streams[n].append((batch.frames[t, n], batch.labelled[t, n].item(), batch.boxes_of(t, n)))
    return [stream for stream in done + streams if stream]


@pytest.mark.parametrize("length", [1, 2, 5, 20])
@pytest.mark.parametrize("size", [1, 2, 3, 7])
@pytest.mark.parametrize("shuffle", [False, True])
def test_streams_deliver_every_frame_once_and_in_order(tree, length, size, shuffle):
    data = StreamingSequences(tree, length, size, shuffle=shuffle)
    batches = [data[index] for index in range(len(data))]
    assert all(batch.frames.shape[:2] == (length, size) for batch in batches)
    streams = replayed(batches, size)
    assert len(streams) == len(LENGTHS)
    for name in LENGTHS:
        expected = whole(tree, name)
        stream = next(s for s in streams if len(s) == len(expected) and torch.equal(s[0][0], expected[0]))
        assert torch.equal(torch.stack([frame for frame, _, _ in stream]), expected)
        assert [k for k, (_, labelled, _) in enumerate(stream) if labelled] == LABELLED.get(name, [])
        assert all(len(found) == 2 * labelled for _, labelled, found in stream)
    # Padding is at the end of a sequence, so that its length says where.
    for batch in batches:
        steps = torch.arange(length)[:, None]
        assert torch.equal(batch.padding, steps >= batch.lengths)


def test_epochs_and_shards(tree):
    data = StreamingSequences(tree, 2, 2, shuffle=True, seed=3)
    orders = set()
    for epoch in range(6):
        data.set_epoch(epoch)
        orders.add(tuple(int(time) for index in range(len(data)) for time in data[index].times.ravel()))
    assert len(orders) > 1
    halves = [StreamingSequences(tree, 2, 1, shuffle=True, seed=3, shard=(k, 2)) for k in range(2)]
    data.set_epoch(0)
    assert len(halves[0]) == len(halves[1]) == len(data)
    for index in range(len(data)):
        assert torch.equal(torch.cat([half[index].frames for half in halves], dim=1), data[index].frames)


@pytest.mark.parametrize("context", ["fork", "spawn"])
def test_workers_deliver_the_same_in_order(tree, context):
    data = StreamingSequences(tree, 2, 2, shuffle=True)
    more = {"multiprocessing_context": context, "persistent_workers": True}
    loader = DataLoader(data, batch_size=None, num_workers=2 if context == "fork" else 1, **more)
    for epoch in (1, 2):
        data.set_epoch(epoch)
        seen = list(loader)
        assert len(seen) == len(data)
        for batch, expected in zip(seen, (data[index] for index in range(len(data))), strict=True):
            assert torch.equal(batch.frames, expected.frames)
            assert torch.equal(batch.boxes, expected.boxes)
    sequences = RandomSequences(tree, 2)
    loader = DataLoader(sequences, 2, collate_fn=collate, num_workers=1, multiprocessing_context=context)
    for batch, first in zip(loader, range(0, len(sequences), 2), strict=True):
        pair = [sequences[index] for index in range(first, min(first + 2, len(sequences)))]
        assert torch.equal(batch.frames, collate(pair).frames)


@pytest.mark.skipif(not torch.cuda.is_available(), reason="pinning memory needs a GPU")
def test_pinned_batches(tree):
    loader = DataLoader(StreamingSequences(tree, 2, 2), batch_size=None, pin_memory=True)
    batch = next(iter(loader))
    assert batch.frames.is_pinned()
    assert batch.to("cuda", non_blocking=True).boxes.is_cuda


def test_torch_pins_batches(tree, monkeypatch):
    """Without a GPU: the loader's function that pins calls the batch's, and that each tensor's."""
    from torch.utils.data._utils.pin_memory import pin_memory

    pinned = []
    monkeypatch.setattr(torch.Tensor, "pin_memory", lambda self: pinned.append(self) or self)
    assert isinstance(pin_memory(RandomSequences(tree, 2)[0]), SequenceBatch)
    assert len(pinned) == 7


def test_a_layer_over_streams_is_a_layer_over_recordings(tree):
    torch.manual_seed(0)
    layer = ConvLSTM(4, 3, kernel_size=3)
    expected = {}
    for recording in find(tree):
        output, _ = layer(whole(tree, recording.folder.name)[:, None].float())
        expected[recording.folder.name] = output[:, 0]
    state, streams = None, [[] for _ in range(2)]
    for batch in DataLoader(StreamingSequences(tree, 2, 2), batch_size=None):
        output, state = layer(batch.frames.float(), state, reset=batch.reset)
        for n in range(2):
            streams[n] += output[: batch.lengths[n], n].unbind()
    seen = torch.stack([output for stream in streams for output in stream])
    for name, outputs in expected.items():
        gaps = [(seen[k : k + len(outputs)] - outputs).abs().max() for k in range(len(seen) - len(outputs) + 1)]
        assert min(gaps) < 1e-5, name


def test_downsampled_frames_have_smaller_boxes(tmp_path):
    e = random_events(500, 200_000, start=0, width=16, height=12)
    save_h5(tmp_path / "in" / "a_td.h5", e)
    np.save(tmp_path / "in" / "a_bbox.npy", boxes([100_000, 150_000]))
    assert main(["preprocess", str(tmp_path / "in"), str(tmp_path / "out"), "--downsample", "2"]) == 0
    recording = PreprocessedRecording(tmp_path / "out" / "a", downsample=2)
    assert recording.shape == (20, 6, 8)
    assert recording.boxes[:, :4].tolist() == [[0.5, 0.5, 1.5, 1.0]] * 2
    with pytest.raises(ValueError, match=r"event_representations\.h5: expected frames, got .*_ds2_nearest\.h5"):
        find(tmp_path / "out")
    assert main(["preprocess", str(tmp_path / "in"), str(tmp_path / "out"), "--stride", "100ms"]) == 0
    with pytest.raises(ValueError, match=r"expected the representation \(the only one\), got .*step=100"):
        find(tmp_path / "out")
    # Labels of the second run lie over those of the first.
    with pytest.raises(ValueError, match="got those of other windows"):
        find(tmp_path / "out", "stacked_histogram_dt=50_nbins=10", downsample=2)


def test_damaged_trees_are_told(tree, tmp_path):
    for name, message in (("nowhere", "got no folder event_representations_v2"), ("a/labels_v2", "got no folder")):
        with pytest.raises(ValueError, match=message):
            find(tree / name)
    with pytest.raises(ValueError, match="expected the representation none, got stacked_histogram_dt=50_nbins=2"):
        find(tree, "none")
    place = tmp_path / "x" / "event_representations_v2" / "r"
    place.mkdir(parents=True)
    (place / "event_representations.h5.partial").write_bytes(b"half")
    with pytest.raises(ValueError, match="is the recording finished"):
        find(tmp_path)
    (place / "event_representations.h5").write_bytes(b"half")
    with pytest.raises(ValueError, match="expected an HDF5 file"):
        find(tmp_path)
    with h5py.File(place / "event_representations.h5", "w") as file:
        file["data"] = np.zeros((3, 1, 2, 2), np.uint8)
    with pytest.raises(ValueError, match=r"timestamps_us\.npy: expected an array"):
        find(tmp_path)
    np.save(place / "timestamps_us.npy", np.arange(2))
    with pytest.raises(ValueError, match=r"a time for each of 3 frames, got \[2\]"):
        find(tmp_path)
    np.save(place / "timestamps_us.npy", np.arange(3))
    assert len(find(tmp_path)) == 1
    with pytest.raises(ValueError, match="none with boxes"):
        RandomSequences(tmp_path, 2)
    with pytest.raises(ValueError, match="shorter ones"):
        RandomSequences(tmp_path, 4, every=1)


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda tree: RandomSequences(tree, 0), "length must be a positive integer, got 0"),
        (lambda tree: RandomSequences(tree, 2, every=0), "every must be a positive integer"),
        (lambda tree: StreamingSequences(tree, 2, -1), "batch_size must be a positive integer"),
        (lambda tree: StreamingSequences(tree, 2, 1, shard=(2, 2)), "shard must be"),
    ],
)
def test_bad_arguments(tree, make, message):
    with pytest.raises(ValueError, match=message):
        make(tree)


def test_from_real_recordings_to_a_training_step(recordings, tmp_path):
    """What a user does first: preprocess, load, train."""
    run = ["preprocess", str(recordings / "npz"), str(tmp_path), "--pattern", "dsec_0000[67]9.npz", "--window", "10ms"]
    assert main([*run, "--bins", "2", "--downsample", "8"]) == 0
    data = StreamingSequences(tmp_path, length=3, batch_size=2, downsample=8)
    assert [len(recording) for recording in data.recordings] == [5, 5]
    torch.manual_seed(0)
    layer = ConvLSTM(4, 4, kernel_size=3)
    optimizer = torch.optim.Adam(layer.parameters(), lr=0.01)
    losses = []
    for _ in range(5):
        state = None
        for batch in DataLoader(data, batch_size=None):
            assert batch.frames.shape == (3, 2, 4, 60, 80)
            x = batch.frames.float()
            output, state = layer(x, state, reset=batch.reset)
            state = tuple(part.detach() for part in state)
            # Predict the following frame.
            wanted = ~batch.padding[1:]
            loss = torch.nn.functional.mse_loss(output[:-1][wanted], x[1:][wanted])
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < losses[0]
