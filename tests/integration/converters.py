"""From a module to `torch.export` and to ONNX Runtime, for batches of any size."""

from collections.abc import Callable

import torch
from torch import Tensor, nn

from .networks import plain

Run = Callable[[Tensor], Tensor]
Convert = Callable[[nn.Module, Tensor], Run]

ANY_BATCH_SIZE = ({0: torch.export.Dim.DYNAMIC},)


def exported(model: nn.Module, example: Tensor) -> Run:
    """Through `torch.export`."""
    program = torch.export.export(model, (example,), dynamic_shapes=ANY_BATCH_SIZE).module()
    return lambda images: plain(program(images))


def onnx_runtime(model: nn.Module, example: Tensor) -> Run:
    """Through torch's ONNX exporter."""
    program = torch.onnx.export(model, (example,), dynamo=True, dynamic_shapes=ANY_BATCH_SIZE, verbose=False)
    return onnx_session(program.model_proto.SerializeToString())


def onnx_session(model: bytes | str) -> Run:
    """ONNX Runtime on the CPU, of a file or of its contents."""
    import onnxruntime

    options = onnxruntime.SessionOptions()
    options.log_severity_level = 3  # errors
    # What the file says, not what integer kernels of this machine make of it: those of older processors saturate.
    options.graph_optimization_level = onnxruntime.GraphOptimizationLevel.ORT_DISABLE_ALL
    session = onnxruntime.InferenceSession(model, options, providers=["CPUExecutionProvider"])
    name = session.get_inputs()[0].name
    return lambda images: torch.from_numpy(session.run(None, {name: images.numpy()})[0])
