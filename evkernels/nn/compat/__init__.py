"""Published layers under their own names, signatures and state-dict keys, one module per project.

They are here and not in `evkernels.nn` because their names mean something else there, or because of faults that a
drop-in replacement must share with the original.
"""

from evkernels.nn.compat import eseg, etram, raft, visioncore

__all__ = ["eseg", "etram", "raft", "visioncore"]
