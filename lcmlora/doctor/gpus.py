"""GPUs by name: their memory, and what their data sheets promise."""

from __future__ import annotations

from dataclasses import dataclass

from lcmlora.errors import UserError

# The share of a data sheet's operations a second that work reaches: from eager code on a busy host to a little above
# 0.31, the best that was published for Stable Diffusion on an H200 (MLPerf Training 4.0, 129 pictures/s). Assumed, not
# measured: `lcmlora doctor` on the GPU itself measures.
LEAST_SHARE, MOST_SHARE = 0.10, 0.35


@dataclass(frozen=True)
class Gpu:
    """A GPU.

    memory: 1e9 bytes, by its name; what torch can use of it is about as much.
    teraflops: 1e12 multiplications and additions a second of dense products in half precision, summed in fp32, by the
        maker's data sheet; None where it is not known.
    bf16: it computes in bf16; else training is in fp16.
    """

    name: str
    memory: float
    teraflops: float | None
    bf16: bool = True

    def hours(self, operations: float) -> tuple[float, float] | None:
        """Returns the least and the most hours that so many operations take; None where the rate is not known."""
        if self.teraflops is None:
            return None
        least, most = (operations / (share * self.teraflops * 1e12) / 3600 for share in (MOST_SHARE, LEAST_SHARE))
        return least, most


# NVIDIA's data sheets and architecture white papers. GeForce sums products in fp32 at half the rate of those in fp16.
KNOWN = (
    Gpu("T4", 16, 65.0, bf16=False),
    Gpu("V100", 16, 125.0, bf16=False),
    Gpu("RTX 4070 Ti", 12, 80.2),
    Gpu("RTX 4080", 16, 97.5),
    Gpu("RTX 3090", 24, 71.0),
    Gpu("RTX 4090", 24, 165.2),
    Gpu("L4", 24, 121.0),
    Gpu("A10", 24, 125.0),
    Gpu("RTX 5090", 32, 209.5),
    Gpu("RTX A6000", 48, 154.8),
    Gpu("L40S", 48, 362.0),
    Gpu("A100 40GB", 40, 312.0),
    Gpu("A100", 80, 312.0),
    Gpu("H100", 80, 989.4),
    Gpu("H200", 141, 989.4),
)


def named(name: str) -> Gpu:
    """Returns the GPU of this name; upper and lower case, spaces and the maker's name do not count.

    Raises:
        UserError: it is none of the known ones.
    """
    wanted = _plain(name)
    for gpu in KNOWN:
        if _plain(gpu.name) == wanted:
            return gpu
    known = ", ".join(gpu.name for gpu in KNOWN)
    raise UserError(f"--gpu: {name}: expected one of {known}; or give --gpu-gb and --tflops")


def of_memory(gigabytes: float) -> list[Gpu]:
    """Returns the known GPUs that have so much memory."""
    return [gpu for gpu in KNOWN if gpu.memory == gigabytes]


def here() -> tuple[list[Gpu], float | None]:
    """Returns this machine's first GPU, and its memory in 1e9 bytes; nothing where there is none."""
    import torch

    if not torch.cuda.is_available():
        return [], None
    name, memory = torch.cuda.get_device_name(0), torch.cuda.get_device_properties(0).total_memory / 1e9
    known = next((gpu for gpu in KNOWN if _plain(gpu.name) in _plain(name)), None)
    bf16 = torch.cuda.is_bf16_supported(including_emulation=False)
    return [Gpu(name, memory, known.teraflops if known else None, bf16)], memory


def _plain(name: str) -> str:
    words = name.lower().replace("nvidia", "").replace("geforce", "")
    return "".join(character for character in words if character.isalnum())
