"""Builds the CPU kernels. They take memory addresses instead of tensors, so a wheel works with any PyTorch version."""

import platform
import sys
from pathlib import Path

from pybind11.setup_helpers import Pybind11Extension, build_ext
from setuptools import setup

if sys.platform == "win32":
    sys.exit("swamp_fast builds with GCC or Clang, on Linux and macOS; on Windows install it in WSL")

CPU = Path("csrc/cpu")
X86 = platform.machine().lower() in ("x86_64", "amd64")
COMMON = ["-O3", "-fno-math-errno", "-fvisibility=hidden"]
OPENMP = [] if sys.platform == "darwin" else ["-fopenmp"]

# These sources are compiled once per instruction set, and module.cpp chooses one at run time. Kernels that must match
# PyTorch bit for bit are compiled without contracting products and sums to fused multiply-adds.
PER_INSTRUCTION_SET = {
    CPU / "kernels.cpp": ["-ffp-contract=off"],
    CPU / "fused" / "fused.cpp": ["-ffp-contract=fast", "-Wno-psabi"],
}
INSTRUCTION_SETS = {"generic": []}
if X86:
    INSTRUCTION_SETS["avx2"] = ["-mavx2", "-mfma"]
    INSTRUCTION_SETS["avx512"] = [f"-mavx512{feature}" for feature in ("f", "bw", "dq", "vl")]
    INSTRUCTION_SETS["avx512"] += ["-mfma", "-mprefer-vector-width=512"]


class BuildKernels(build_ext):
    """Compile the kernels for every instruction set, then the module that chooses among them."""

    def build_extension(self, ext):
        """Build one extension module, including the objects of every instruction set."""
        for name, flags in INSTRUCTION_SETS.items():
            for source, rounding in PER_INSTRUCTION_SET.items():
                ext.extra_objects += self.compiler.compile(
                    [str(source)],
                    output_dir=str(Path(self.build_temp) / name),
                    macros=[("SWAMP_ISA", name)],
                    extra_postargs=["-std=c++17", *COMMON, *OPENMP, *rounding, *flags],
                    depends=ext.depends,
                )
        super().build_extension(ext)


setup(
    ext_modules=[
        Pybind11Extension(
            "swamp_fast._C",
            [str(CPU / "module.cpp"), str(CPU / "fused" / "bind.cpp")],
            depends=[str(path) for path in CPU.rglob("*.*")],
            define_macros=[("SWAMP_X86", "1")] if X86 else [],
            extra_compile_args=[*COMMON, *OPENMP],
            extra_link_args=OPENMP,
            cxx_std=17,
        )
    ],
    cmdclass={"build_ext": BuildKernels},
)
