"""The plans that the real cuDNN builds for a GPU that is only described to it: `make cudnn-plans`.

For every convolution of ResNet-9, by batch size and precision: how many plans cuDNN offers, how many
of those that are tried build, the engine and workspace of the first, the largest workspace. For another
network that ships, or other images: python tests/cudnn_plans.py resnet20 32x32x3.
Prints a table in Markdown; exit code 1 if an operation has no plan. Nothing runs: the fastest, a GPU tells.
"""

from __future__ import annotations

import json
import sys
from importlib import import_module, metadata

from nn.cuda.plans import KINDS, NoPlan, Operation, Planner
from nn.cuda.stem import Stem
from nn.layers import Conv
from nn.models import MODELS

H100 = {
    "deviceName": "NVIDIA H100 80GB HBM3",
    "deviceVer": 900,
    "major": 9,
    "minor": 0,
    "multiProcessorCount": 132,
    "warpSize": 32,
    "regsPerBlock": 65536,
    "maxRegistersPerSM": 65536,
    "maxCtasPerSM": 32,
    "maxThreadsPerBlock": 1024,
    "maxThreadsPerSM": 2048,
    "maxBlockSize": [1024, 1024, 64],
    "maxGridSize": [2147483647, 65535, 65535],
    "maxSharedMemoryPerBlock": 49152,
    "maxSharedMemoryPerBlockOptin": 232448,
    "reservedSharedMemoryPerBlock": 1024,
    "supportCoopLaunch": 1,
    "smClockRateKHz": 1980000,
    "memClockRateKHz": 2619000,
    "l2CacheSize": 52428800,
    "totalGlobalMem": 85000000000,
    "driverVer": 13000,
    "cudaDeviceId": 0,
    "pciDeviceId": 0,
    "isTccDriver": 0,
}
"""What cuDNN asks of a device, as CUDA gives it for an H100."""

BATCHES, PRECISIONS = (8, 64, 512, 2048), ("tf32", "float32", "bf16")


def found(planner: Planner, operation: Operation) -> tuple[int, list[tuple[str, int]]]:
    """(plans offered, (name, bytes of workspace) of those that a GPU would time)."""
    graph, names = planner.candidates(operation)
    return planner.graph(operation).get_execution_plan_count(), [
        (name, graph.get_workspace_size()) for name in names
    ]


def operations(n: int, model: str = "resnet9", shape: tuple[int, ...] = (28, 28, 1)) -> list[Operation]:
    """Each different operation of a network's batch of n, without those that a kernel of our own does."""
    layers = MODELS[model](shape, 10)
    layers.build("", shape, need_dx=False)
    found = {}
    for conv in (layer for layer in layers.walk() if isinstance(layer, Conv)):
        x, w = (n, *conv.in_shape), (conv.kernel, conv.kernel, conv.c_in, conv.out)
        if not Stem.supports(x, w, conv.geometry, conv.need_dx):
            kinds = [kind for kind in KINDS if conv.need_dx or kind != "input gradient"]
            found |= dict.fromkeys(Operation(kind, x, w, conv.geometry) for kind in kinds)
    return list(found)


def main(model: str = "resnet9", images: str = "28x28x1") -> int:
    shape = tuple(map(int, images.split("x")))
    import_module("cuda.pathfinder").load_nvidia_dynamic_lib("cudart")
    cudnn = import_module("cudnn")
    frontend = metadata.version("nvidia-cudnn-frontend")
    print(f"cuDNN {cudnn.backend_version_string()}, frontend {frontend}, {H100['deviceName']} as described\n")
    print("| batch | precision | operation | offered | built | first | its MiB | most MiB |")
    print("| --- | --- | --- | --- | --- | --- | --- | --- |")
    missing, target = 0, {"device_property": cudnn.create_device_properties(json.dumps(H100))}
    for precision in PRECISIONS:
        planner = Planner(cudnn, precision, lambda: target)
        for n in BATCHES:
            for operation in operations(n, model, shape):
                try:
                    offered, built = found(planner, operation)
                except NoPlan as error:
                    offered, built = 0, []
                    print(error, file=sys.stderr)
                missing += not built
                (first, size), most = (
                    built[0] if built else ("none", 0),
                    max((b for _, b in built), default=0),
                )
                row = n, precision, str(operation), offered, len(built), first.split("_")[0]
                print(
                    "|", " | ".join(map(str, row)), f"| {size / 2**20:.1f} | {most / 2**20:.0f} |", flush=True
                )
    return int(missing > 0)


if __name__ == "__main__":
    sys.exit(main(*sys.argv[1:]))
