"""Training data from preprocessed recordings: sequences of windows with boxes, at random or as streams.

What `python -m evkernels preprocess` writes is read, and trees that RVT's own scripts made. Needs the extra
`preprocess`.
"""

from .batch import SequenceBatch, collate
from .datasets import RandomSequences, StreamingSequences
from .recording import PreprocessedRecording, find

__all__ = ["PreprocessedRecording", "RandomSequences", "SequenceBatch", "StreamingSequences", "collate", "find"]
