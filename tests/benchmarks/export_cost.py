"""Cost of exporting and injecting the full-size network: python tests/benchmarks/export_cost.py

A training checkpoint of kl-f8's size with Adam's moments (1.1 GB) and random weights is exported in
every layout, and its VAE is injected into a Stable Diffusion checkpoint of 2.1 GB, the size of 1.5
in half precision, with random numbers; each in a process of its own. Memory: the largest resident
size beyond that of a process that only imports, over the size of the network in float32, 335 MB.
"""

import json
import subprocess
import sys
import tempfile
from pathlib import Path

import torch
from safetensors.torch import save_file

from kl_f8_train import config
from kl_f8_train.core.hashes import frozen_sha256
from kl_f8_train.core.model import AutoencoderKL
from kl_f8_train.run_dir import checkpoint_path
from kl_f8_train.settings import to_dict
from kl_f8_train.weights import checkpoint, weight_file

NETWORK = 83_653_863 * 4
SETTINGS = (
    "name=full",
    "model.ch=128",
    "model.ch_mult=[1,2,4,4]",
    "model.num_res_blocks=2",
    "data.crop=256",
)
MEASURE = """
import json, sys, time
from pathlib import Path
import torch
from kl_f8_train.check.benchmark import peak_memory
from kl_f8_train.publish.export import export
from kl_f8_train.publish.inject import inject
here = torch.device("cpu")
before, wall, cpu = peak_memory(here), time.perf_counter(), time.process_time()
job, *paths = sys.argv[1:]
if job == "export":
    export(*map(Path, paths))
else:
    inject(*map(Path, paths))
wall, cpu = time.perf_counter() - wall, time.process_time() - cpu
print(json.dumps([wall, cpu, peak_memory(here) - before]))
"""


def write_checkpoint(run_dir: Path) -> None:
    """A training checkpoint of the full size."""
    torch.manual_seed(0)
    weights = {key: value.detach() for key, value in AutoencoderKL().state_dict().items()}
    trained = {k: v for k, v in weights.items() if k.startswith(("decoder.", "post_quant_conv."))}
    tensors = {f"autoencoder.{key}": value for key, value in weights.items()}
    for part in ("ema.", "optimizer.decoder.exp_avg.", "optimizer.decoder.exp_avg_sq."):
        tensors |= {f"{part}{key}": value.clone() for key, value in trained.items()}
    overrides = [*SETTINGS, "data.sources=x", "init.weights=x", f"run_dir={run_dir}"]
    settings = config.load(config.find_recipe("demo"), overrides)
    metadata = {
        "kl_f8_train.format": checkpoint.FORMAT,
        "iteration": "5",
        "frozen_sha256": frozen_sha256(weights),
        "config": json.dumps(to_dict(settings)),
    }
    weight_file.write_safetensors(checkpoint_path(run_dir, 5), tensors, metadata)


def write_full_checkpoint(path: Path) -> None:
    """A Stable Diffusion checkpoint in half precision: 860 + 123 million numbers beside the VAE."""
    weights = AutoencoderKL().state_dict()
    full = {f"first_stage_model.{key}": value.half() for key, value in weights.items()}
    for part, count in (("model.diffusion_model", 860), ("cond_stage_model.transformer", 123)):
        names = (f"{part}.blocks.{number}.weight" for number in range(count))
        full |= {name: torch.randn(1000, 1000).half() for name in names}
    if path.suffix == ".ckpt":
        torch.save({"state_dict": full}, path)
    else:
        save_file(full, path)


def measure(job: str, *paths: Path) -> None:
    """Prints a row of the table."""
    command = [sys.executable, "-c", MEASURE, job, *map(str, paths)]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    wall, cpu, grown = json.loads(done.stdout.splitlines()[-1])
    kind = paths[-1].suffix if job == "inject" else ""
    print(f"| {job} {kind} | {wall:.1f} | {cpu:.1f} | {grown / NETWORK:.2f} |", flush=True)


def main(folder: Path) -> None:
    """Prints a table."""
    write_checkpoint(folder / "run")
    print("| job | seconds | of CPU | memory / network |\n|---|---|---|---|", flush=True)
    measure("export", folder / "run")
    vae = folder / "run" / "export" / "full-ema-pruned.safetensors"
    for suffix in ("safetensors", "ckpt"):
        into, out = folder / f"sd.{suffix}", folder / f"new.{suffix}"
        write_full_checkpoint(into)
        measure("inject", vae, into, out)
        into.unlink()
        out.unlink()


if __name__ == "__main__":
    with tempfile.TemporaryDirectory() as temporary:
        main(Path(temporary))
