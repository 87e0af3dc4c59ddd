"""Adam, in as few passes over its tensors as the device has it."""

import torch


def adam(groups: list[dict[str, object]], *, on_device: bool = False) -> torch.optim.Adam:
    """Adam on groups of parameters; `on_device` keeps all that it counts on their device, so that steps can be
    recorded."""
    try:
        return torch.optim.Adam(groups, fused=True, capturable=on_device)
    except RuntimeError:  # a device that has no fused version
        return torch.optim.Adam(groups, capturable=on_device)
