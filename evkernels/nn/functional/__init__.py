"""Event representations as functions, like torch.nn.functional beside torch.nn: the modules are thin over them.

All take events as the ops do, as columns x, y, t, p with offsets, or whole: `evkernels.events.Events`, `EventBatch` or
a structured NumPy array. Histograms, voxel grids and time surfaces have kernels and are ops: `evkernels.ops`;
`evkernels.nn.event_normalization` normalises what any of them returns.
"""

from evkernels.nn.functional.event_images import bina_rep, event_count_image, event_image, mixed_density_event_stack
from evkernels.nn.functional.event_memories import averaged_time_surface, time_ordered_recent_events
from evkernels.nn.functional.event_spike_tensor import event_spike_tensor

__all__ = [
    "averaged_time_surface",
    "bina_rep",
    "event_count_image",
    "event_image",
    "event_spike_tensor",
    "mixed_density_event_stack",
    "time_ordered_recent_events",
]
