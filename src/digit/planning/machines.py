"""Machines that run a plan: peaks published for GPUs or measured here, and the share of them that each work reaches.

From NVIDIA's datasheets (H100, H200 and A100 Tensor Core GPU), dense, SXM: TF32 matrix multiplication at half the bf16
peak of `digit.training.peak`, FP32 at 67, 67 and 19.5 TFLOP/s; bandwidth 3.35, 4.8 and 2.039 TB/s. Cards of 24 GB from
the Ada whitepaper (GeForce RTX 4090) and the L4's datasheet: FP32 82.6 and 30.3 TFLOP/s, bandwidth 1.008 and 0.3 TB/s.
"""

from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Literal

from digit.errors import DigitError
from digit.runtime.hardware import cpu_speed, describe_machine, multiplies_bf16
from digit.training.peak import PUBLISHED, peak_flops

if TYPE_CHECKING:
    import torch

Kind = Literal["training", "vqgan training", "transformer", "mobile net", "convolutions", "k-means", "nearest code"]
Peak = Literal["bf16", "tf32", "fp32"]

# The peak that limits each kind of work on a GPU, and the share of it that the work reaches: assumed, not measured.
# Encoders and the nearest-code search run in float32 (no TF32), VQGANs in TF32.
GPU_SHARES: dict[Kind, tuple[Peak, float]] = {
    "training": ("bf16", 0.40),
    "vqgan training": ("bf16", 0.20),
    "transformer": ("fp32", 0.60),
    "mobile net": ("fp32", 0.10),
    "convolutions": ("tf32", 0.20),
    "k-means": ("bf16", 0.10),
    "nearest code": ("fp32", 0.50),
}
# Shares of the bf16 rate that `cpu_speed` measures. Mobile net, convolutions and VQGAN training: images per second
# of 64 px pipelines on two CPU cores (350, 370 and 57) times FLOPs per image, over 4e11. The others are assumed.
CPU_SHARES: dict[Kind, tuple[Peak, float]] = {
    "training": ("bf16", 0.50),
    "vqgan training": ("bf16", 0.60),
    "transformer": ("bf16", 0.40),
    "mobile net": ("bf16", 0.18),
    "convolutions": ("bf16", 0.27),
    "k-means": ("bf16", 0.40),
    "nearest code": ("bf16", 0.20),
}
GPU_SAMPLING, CPU_SAMPLING = 0.50, 0.35  # of bandwidth and of matrix multiplication while sampling tokens; assumed
KERNEL_SECONDS = 3e-6  # the least that one kernel of a CUDA graph takes; assumed
KERNELS_PER_BLOCK = 12  # that one transformer block launches for one token
# JPEGs decoded and resized to 256 px per second and core: 320 to 370 measured on an AMD EPYC (Pillow, 12 photographs of
# 500 px, 60 kB each). ImageNet's files are nearly twice as large, so its rate may be lower.
JPEG_PER_CORE = 340.0
CORES_PER_GPU = 14.0  # a typical server has 112 cores for 8 GPUs
GPU_RESERVE, CPU_RESERVE = 0.08, 0.08  # of the memory: CUDA context, workspaces, fragmentation; operating system
BUSY = 0.75  # of the speed; with less of it left, the person is told
CPU_BANDWIDTH = 30e9  # bytes/s, two memory channels; assumed


@dataclass(frozen=True, kw_only=True)
class Machine:
    """A number of devices of one kind."""

    name: str
    """Name shown in the plan."""
    memory: float
    """Memory of one device in bytes."""
    peaks: dict[Peak, float]
    """Floating-point operations per second of one device, by precision."""
    bandwidth: float
    """Memory bandwidth of one device in bytes per second."""
    price: float
    """Dollars per hour of one device."""
    cores: float
    """CPU cores per device, which decode images."""
    count: int = 1
    """Number of devices."""
    gpu: bool = True
    """Whether the device is a GPU; else it is a CPU."""
    bf16: bool = True
    """Whether it multiplies bf16 in hardware; else sampling takes fp32."""
    free: float = 1.0
    """Share of this speed that other programs leave at the moment; plans are for a machine that nothing else uses."""

    @property
    def busy(self) -> str:
        """A sentence where other programs take much of the machine now; nothing else."""
        if self.free >= BUSY:
            return ""
        return (
            f"other programs take {1 - self.free:.0%} of its cores now: while they do, everything takes about "
            f"{1 / self.free:.1f} times as long"
        )

    @property
    def usable(self) -> float:
        """Bytes of one device that a plan may use."""
        return self.memory * (1 - (GPU_RESERVE if self.gpu else CPU_RESERVE))

    def rate(self, kind: Kind) -> float:
        """Floating-point operations per second of all devices together at one kind of work."""
        peak, share = (GPU_SHARES if self.gpu else CPU_SHARES)[kind]
        return self.peaks[peak] * share * self.count

    @property
    def decoded(self) -> float:
        """JPEGs per second that all cores decode and resize."""
        return JPEG_PER_CORE * self.cores * self.count


def _gpu(key: str, name: str, memory_gib: float, fp32: float, bandwidth: float, price: float) -> Machine:
    """fp32 in TFLOP/s, bandwidth in TB/s."""
    bf16 = PUBLISHED[key]
    return Machine(
        name=name,
        memory=memory_gib * 2**30,
        peaks={"bf16": bf16, "tf32": bf16 / 2, "fp32": fp32 * 1e12},
        bandwidth=bandwidth * 1e12,
        price=price,
        cores=CORES_PER_GPU,
    )


GPUS: dict[str, Machine] = {  # round prices of rented GPUs: set your own with --price
    "h100": _gpu("H100", "H100 80GB SXM", 79, 67, 3.35, 2.50),
    "h200": _gpu("H200", "H200 141GB SXM", 140, 67, 4.8, 3.00),
    "a100": _gpu("A100", "A100 80GB SXM", 79, 19.5, 2.039, 1.50),
    "rtx4090": _gpu("RTX 4090", "GeForce RTX 4090 24GB", 23.5, 82.6, 1.008, 0.40),
    "l4": _gpu("L4", "L4 24GB", 22.2, 30.3, 0.300, 0.50),
}


def get_gpu(name: str) -> Machine:
    """Returns a GPU by name. Raises DigitError that lists the names."""
    if name not in GPUS:
        raise DigitError(f"no GPU named {name}: choose one of {', '.join(GPUS)}")
    return GPUS[name]


def this_machine(device: "torch.device") -> Machine:
    """Describes this machine: a GPU of GPUS by its name, else by its measured matrix multiplication rate.

    A CPU's rate is that of its cores without the other programs that run now (`Machine.free`).
    """
    about = describe_machine()
    if device.type == "cpu":
        speed = cpu_speed()
        peaks: dict[Peak, float] = {"bf16": speed.flops}
        used = "" if speed.cores == about["cores"] else f"{speed.cores:g} of "
        return Machine(
            name=f"{about['processor']}, {used}{about['cores']} cores", memory=about["memory_gib"] * 2**30, peaks=peaks,
            bandwidth=CPU_BANDWIDTH, price=0.0, cores=about["cores"] or 1, gpu=False, bf16=multiplies_bf16(device),
            free=speed.free,
        )  # fmt: skip
    import torch

    properties = torch.cuda.get_device_properties(device)
    known = next((gpu for key, gpu in GPUS.items() if key in properties.name.lower().replace(" ", "")), None)
    like = known or GPUS["a100"]
    scale = 1.0 if known else peak_flops(device) / like.peaks["bf16"]  # a GPU that GPUS lacks
    return replace(
        like,
        name=properties.name,
        memory=properties.total_memory,
        peaks={name: peak * scale for name, peak in like.peaks.items()},
        bandwidth=like.bandwidth * scale,
        cores=(about["cores"] or 1) / torch.cuda.device_count(),
        bf16=multiplies_bf16(device),
    )
