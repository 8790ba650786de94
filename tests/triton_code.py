"""What Triton and NVIDIA's assembler made of a kernel, and a driver to compile with where there is no GPU."""

import re
import subprocess
import tempfile

import triton
from triton.backends.compiler import GPUTarget
from triton.backends.nvidia.driver import CudaDriver


class NoDevice(CudaDriver):
    """The CUDA driver without a device: enough of it to compile."""

    def __init__(self, architecture: int):
        self.target = GPUTarget("cuda", architecture, 32)

    def get_current_target(self):
        return self.target

    def get_current_device(self):
        return 0

    def get_current_stream(self, device):
        return 0

    def get_device_capability(self, device=0):
        return divmod(self.target.arch, 10)


def resources(cubin: bytes) -> dict[str, int]:
    """Registers and bytes of local memory per thread, as the machine code states them."""
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(cubin)
        file.flush()
        command = [triton.knobs.nvidia.cuobjdump.path, "-res-usage", file.name]
        report = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    (registers, stack), *others = re.findall(r"REG:(\d+) STACK:(\d+)", report)
    assert not others, "a Triton kernel is one function"
    return {"registers": int(registers), "local": int(stack)}


def widest_access(ptx: str) -> int:
    """Bytes of the widest load or store of global memory."""
    accesses = re.findall(r"\b(?:ld|st)\.global[.\w:]*?(?:\.v(\d))?\.[bfsu](\d+)\b", ptx)
    copies = re.findall(r"cp\.async\.c[ag]\.shared\.global \[[^]]*\], \[[^]]*\], (0x[0-9a-f]+|\d+)", ptx)
    return max([int(n or 1) * int(bits) // 8 for n, bits in accesses] + [int(size, 0) for size in copies])


def matrix_instruction(ptx: str) -> str:
    names = ("tcgen05.mma", "wgmma.mma_async", "mma.sync")
    return next((name for name in names if name in ptx), "")


def narrow_products(ttir: str) -> list[str]:
    """32-bit products that an address is computed from, which images and batches of 2^31 elements would overflow.

    Constants, loop counters, ranges and what is made of them count channels and taps: their products with each other
    and with an argument are none, nor is a remainder times a constant, the number of a block times its size.
    """
    found = re.findall(r"^ *(%[\w#]+)(?::\d+)? = (.*?)(?: loc\(.*)?$", ttir, re.MULTILINE)
    # Names begin anew inside the bodies of reductions, which come after the names they hide.
    operations = {name: operation for name, operation in reversed(found) if not operation.startswith("scf.")}
    arguments = set(re.findall(r"(%\w+): ", ttir[: ttir.index("{\n", ttir.index("tt.func"))]))
    counters = set(re.findall(r"scf\.for (%\w+) =", ttir))

    def operands(name: str) -> list[str]:
        return re.findall(r"%[\w#]+", operations[name])

    def is_small(name: str) -> bool:
        if name in counters:
            return True
        kinds = ("arith.constant", "arith.addi", "arith.muli", "tt.make_range", "tt.splat", "tt.expand", "tt.broadcast")
        return operations.get(name, "").startswith(kinds) and all(map(is_small, operands(name)))

    def of_argument(name: str) -> bool:
        return name in arguments or (operations.get(name, "").startswith("tt.splat") and operands(name)[0] in arguments)

    def is_narrow(name: str) -> bool:
        if not re.match(r"arith\.muli .*: (tensor<[\dx]+x)?i32", operations[name]):
            return False
        first, second = operands(name)[:2] * (1 if len(operands(name)) > 1 else 2)
        if is_small(first) or is_small(second):
            other = second if is_small(first) else first
            is_constant = any(operations.get(factor, "").startswith("arith.constant") for factor in (first, second))
            in_block = is_constant and operations.get(other, "").startswith("arith.remsi")
            return not (is_small(other) or of_argument(other) or in_block)
        return True

    def reached(name: str, seen: set[str]):
        if name not in operations or name in seen or operations[name].startswith(("tt.load", "arith.cmpi")):
            return
        seen.add(name)
        if is_narrow(name):
            yield f"{name} = {operations[name]}"
        for operand in operands(name):
            yield from reached(operand, seen)

    offsets = re.findall(r"tt\.addptr %[\w#]+, (%[\w#]+)", ttir)
    return sorted({product for offset in offsets for product in reached(offset, set())})
