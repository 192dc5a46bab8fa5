"""Cost of reading full-size weights: python tests/benchmarks/checkpoint_cost.py [DIR].

Random kl-f8 weights as a pruned .safetensors, a .ckpt, a kl-f8.zip whose model.ckpt holds optimizer
states, and within a Stable Diffusion checkpoint of 2 GB. Each is read in a process of its own.
Memory: the largest resident size beyond that of a process that only imports, over the size of the
network in float32, 335 MB.
"""

import json
import subprocess
import sys
import tempfile
import zipfile
from pathlib import Path

import torch
from safetensors.torch import save_file

from kl_f8_train.core.model import AutoencoderKL

READ = """
import json, sys, time
import torch
from kl_f8_train.check.benchmark import peak_memory
from kl_f8_train.weights import weight_file
here = torch.device("cpu")
before, wall, cpu = peak_memory(here), time.perf_counter(), time.process_time()
model = weight_file.load_autoencoder(sys.argv[1])
wall, cpu = time.perf_counter() - wall, time.process_time() - cpu
assert sum(p.numel() for p in model.parameters()) == 83_653_863
print(json.dumps([wall, cpu, peak_memory(here) - before]))
"""


def write_files(folder: Path) -> list[Path]:
    """The files to read."""
    torch.manual_seed(0)
    state = {key: value.detach() for key, value in AutoencoderKL().state_dict().items()}
    files = [folder / name for name in ("vae.safetensors", "vae.ckpt", "kl-f8.zip")]
    save_file(state, files[0])
    torch.save({"state_dict": state, "global_step": 246803}, files[1])
    moments = {number: {"exp_avg": v, "exp_avg_sq": v} for number, v in enumerate(state.values())}
    moments = {k: {name: v.clone() for name, v in m.items()} for k, m in moments.items()}
    content = {"state_dict": state, "optimizer_states": [{"state": moments}], "global_step": 1}
    torch.save(content, folder / "model.ckpt")
    with zipfile.ZipFile(files[2], "w", zipfile.ZIP_DEFLATED, compresslevel=1) as archive:
        archive.write(folder / "model.ckpt", "model.ckpt")
    (folder / "model.ckpt").unlink()
    full = {f"first_stage_model.{key}": value for key, value in state.items()}
    full |= {f"model.diffusion_model.{n}.weight": torch.rand(10_000_000) for n in range(42)}
    files += [folder / "sd.safetensors", folder / "sd.ckpt"]
    save_file(full, files[3])
    torch.save({"state_dict": full}, files[4])
    return files


def main(folder: Path) -> None:
    """Prints a table."""
    network = 83_653_863 * 4
    print("| file | GB | seconds | of CPU | memory / network |\n|---|---|---|---|---|")
    for file in write_files(folder):
        done = subprocess.run(
            [sys.executable, "-c", READ, str(file)], capture_output=True, text=True, check=True
        )
        wall, cpu, grown = json.loads(done.stdout)
        size = file.stat().st_size / 1e9
        row = f"{file.name} | {size:.2f} | {wall:.1f} | {cpu:.1f} | {grown / network:.2f}"
        print(f"| {row} |", flush=True)


if __name__ == "__main__":
    if len(sys.argv) > 1:
        main(Path(sys.argv[1]))
    else:
        with tempfile.TemporaryDirectory() as temporary:
            main(Path(temporary))
