"""A pretended GPU for the CUDA path where there is none.

    python tests/gpu/pretended.py COMMAND ...     # a command that sees it
    python tests/gpu/pretended.py python -m kl_f8_train train RECIPE ... compute.channels_last=false

torch's dispatcher, allocator and autograd, inductor, Triton and ptxas are the real ones, so
kernels, memory, host waits and graph breaks are true. Kernels do nothing, so values and times are
not; memory lacks the workspaces of cuDNN and cuBLAS.
"""

import ctypes
import importlib.util
import os
import re
import shutil
import subprocess
import sys
import tempfile
from collections import Counter
from pathlib import Path

import torch

SOURCE = Path(__file__).with_name("pretended.c")
LIBRARY = "libcuda.so.1"  # the driver's name, by which Triton finds it
KINDS = ("torch", "triton", "convolutions", "library calls")  # of kernels
COUNTS = (*KINDS, "copies to the card", "copies to the host", "waits")
# For real runs. Without torch's cache all memory is new, and zero: no NaN by chance. Kernels that
# change the layout of weights do nothing, so saving would find the frozen part changed.
NEW_MEMORY = {"PYTORCH_NO_CUDA_MEMORY_CACHING": "1"}
SETTINGS = ("compute.channels_last=false",)
CACHES = ("TORCHINDUCTOR_CACHE_DIR", "TRITON_CACHE_DIR")
CALL = re.compile(r"cublas.*([Gg]emm|LtMatmul$|gemv)|cudnnBatchNormalization(For|Back)ward")
REAL = re.compile(r"cudnnGet(Version|CudartVersion|ErrorString|Property)")


# --- in the process that has no GPU -----------------------------------------------------------


def missing() -> str | None:
    """What this machine lacks to pretend; None if nothing."""
    if not torch.version.cuda:
        return f"torch {torch.__version__} is a build for CPUs, without the CUDA path"
    if _headers() is None:
        return "CUDA's headers, which Triton brings, are not installed"
    absent = [name for name in ("gcc", "nm") if shutil.which(name) is None]
    return f"not installed: {', '.join(absent)}" if absent else None


def build(folder: Path) -> None:
    """Compiles the library into `folder`."""
    (folder / "rest.c").write_text(_functions_that_return_0(SOURCE.read_text()))
    library = folder / LIBRARY
    command = ["gcc", "-O1", "-w", "-shared", "-fPIC", f"-Wl,-soname,{LIBRARY}"]
    command += [
        f"-I{_headers()}",
        "-o",
        str(library),
        str(SOURCE),
        str(folder / "rest.c"),
        "-ldl",
        "-lpthread",
    ]
    subprocess.run(command, check=True)


def environment(folder: Path) -> dict[str, str]:
    """What a process needs in its environment to see the GPU of `folder`."""
    return {
        "LD_PRELOAD": str(folder / LIBRARY),
        "TRITON_LIBCUDA_PATH": str(folder),
        "TRITON_CACHE_DIR": str(folder / "triton"),
        "TORCHINDUCTOR_CACHE_DIR": str(folder / "inductor"),
        "TORCHINDUCTOR_COMPILE_THREADS": "1",
        "TORCHINDUCTOR_BENCHMARK_KERNEL": "1",  # kernels know the bytes that they move
        "PYTORCH_NVML_BASED_CUDA_CHECK": "0",
        "CUDA_VISIBLE_DEVICES": "0",
        "OMP_NUM_THREADS": "1",
    }


def _headers() -> Path | None:
    found = importlib.util.find_spec("triton")
    folders = list(found.submodule_search_locations or []) if found else []
    paths = [Path(folder) / "backends/nvidia/include" for folder in folders]
    return next((path for path in paths if (path / "cuda_runtime_api.h").is_file()), None)


def _functions_that_return_0(source: str) -> str:
    """Whatever else torch wants of cudart, cuBLAS and cuDNN, and Triton may want of the driver."""
    libraries = sorted(Path(torch.__file__).parent.glob("lib/lib*.so"))
    command = ["nm", "--dynamic", "--undefined-only", "--format=just-symbols"]
    listed = subprocess.run([*command, *libraries], capture_output=True, text=True, check=True)
    wanted = {name.split("@")[0] for name in listed.stdout.split()}
    names = {name for name in wanted if re.match(r"cuda[A-Z]|cublas|cudnn", name)}
    names = {name for name in names if not REAL.match(name)}
    headers = _headers()
    assert headers is not None
    driver = re.findall(r"CUDAAPI (cu\w+)\(", (headers / "cuda.h").read_text())
    names |= {f"{name}{version}" for name in driver for version in ("", "_v2")}
    lines = ["#define REST(name, value) __attribute__((weak)) int name(void) { return value; }"]
    lines.append("int pretended_call(void);")
    for name in sorted(names):
        if not re.search(rf"\b{name}\(", source):
            lines.append(f"REST({name}, {'pretended_call()' if CALL.match(name) else 0})")
    return "\n".join(lines) + "\n"


# --- in the process that has the pretended one ------------------------------------------------


def is_here() -> bool:
    """Whether this process sees it."""
    return LIBRARY in os.environ.get("LD_PRELOAD", "")


def counts() -> Counter[str]:
    """What has happened so far in this process."""
    found = (ctypes.c_ulong * len(COUNTS))()
    ctypes.CDLL(os.environ["LD_PRELOAD"]).pretended_counts(found)
    return Counter(dict(zip(COUNTS, found, strict=True)))


def kernels(counted: Counter[str]) -> int:
    """Of all kinds."""
    return sum(counted[kind] for kind in KINDS)


def main() -> int:
    """Runs a command; compiled kernels are kept where the environment names a folder for them."""
    if not sys.argv[1:] or sys.argv[1] in ("-h", "--help"):
        print(__doc__, end="")
        return 0 if sys.argv[1:] else 2
    if lacking := missing():
        sys.exit(lacking)
    if shutil.which(sys.argv[1]) is None:
        sys.exit(f"{sys.argv[1]}: no such command; expected one as: python -m kl_f8_train ...")
    with tempfile.TemporaryDirectory() as folder:
        build(Path(folder))
        kept = {name: os.environ[name] for name in CACHES if name in os.environ}
        given = os.environ | environment(Path(folder)) | kept
        return subprocess.run(sys.argv[1:], env=given).returncode


if __name__ == "__main__":
    sys.exit(main())
