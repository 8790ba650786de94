"""VisionCore's published configurations, and modules away from their initial values."""

import torch

STAGE = {"kernel_size": [3, 5, 5], "padding": [1, 3, 3]}
DEPTHWISE = {"conv_params": {"type": "depthwise", **STAGE}, "norm_type": "rms", "act_type": "silu"}


def configuration(kind="depthwise", weight_norm=False, **gru):
    """The published configurations: what of them says something about the network."""
    rms = {"norm_type": "rms", "norm_params": {"affine": True}, "act_type": "silu"}
    blocks = [
        {"conv_params": {"type": kind, **STAGE, "stride": 2}, "use_weight_norm": weight_norm, "pool_params": None},
        {
            "conv_params": {"type": kind, **STAGE, "stride": 1},
            "dropout": 0.1,
            "pool_params": {"type": "aablur", "stride": 2, "r": 8, "use_soft": True},
        },
        {
            "conv_params": {"type": kind, "kernel_size": [3, 3, 3], "padding": [2, 2, 2], "dilation": 2, "stride": 1},
            "dropout": 0.2,
            "pool_params": {"type": "aablur", "stride": 2, "r": 16, "use_soft": True},
        },
    ]
    network = {"final_activation": "none", "channels": [64, 128, 256], "dim": 3, "checkpointing": False}
    modulator = {"behavior_dim": 42, "feature_dim": 256, "hidden_dim": 256, "beh_emb_dim": 32, "kernel_size": 3, **gru}
    filters = {"kernel_size": 16, "num_channels": 4, "init_type": "gaussian_derivatives", "anti_aliasing": False}
    return {
        "model_type": "v1multi",
        "sampling_rate": 240,
        "initial_input_channels": 1,
        "adapter": {"type": "adapter", "params": {"grid_size": 51, "init_sigma": 1, "transform": "scale"}},
        "frontend": {"type": "learnable_temporal", "params": {**filters, "causal": True, "bias": False}},
        "convnet": {"type": "resnet", "params": {**network, "block_configs": [{**rms, **block} for block in blocks]}},
        "modulator": {"type": "convgru", "params": modulator},
        "recurrent": {"type": "none", "params": {}},
        "readout": {"type": "gaussian", "params": {"n_units": 8}},
        "output_activation": "none",
        "regularization": [{"name": "readout_sparsity", "type": "l1", "lambda": 1e-7}],
    }


GRU = {
    "use_layer_norm": True,
    "learnable_h0": True,
    "use_depthwise": False,
    "use_grouped": False,
    "num_groups": 1,
    "use_residual": False,
    "grad_clip_val": None,
}
CONFIGURATIONS = {
    "learned_res_optimized_gru": configuration(),
    "learned_res_optimized_standard_gru": configuration("standard", weight_norm=True),
    "learned_res_optimized_gru_v2": configuration(**GRU),
}


def filled(module):
    """Away from initial values that hide what they multiply."""
    with torch.no_grad():
        for parameter in module.parameters():
            parameter.add_(torch.rand(parameter.shape, dtype=parameter.dtype), alpha=0.3)
    return module
