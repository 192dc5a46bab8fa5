"""The launch scripts on one machine: signals, exit codes, the chain, Kubernetes' fields."""

import os
import shutil
import signal
import subprocess
import time
from pathlib import Path

import pytest
import runs
import yaml
from launched import FEW, ROOT, Running, environment, wait_for

from kl_f8_train import config
from kl_f8_train.launch import launched
from kl_f8_train.rules import micro_batch

ALLOCATION = {
    **{"SLURM_NTASKS": "16", "SLURM_NNODES": "2", "SLURM_NTASKS_PER_NODE": "8"},
    **{"SLURM_PROCID": "9", "SLURM_LOCALID": "1", "SLURM_NODEID": "1"},
    "SLURM_JOB_NAME": "kl-f8-train",
}
TORCHRUN = {
    **{"WORLD_SIZE": "12", "RANK": "5", "LOCAL_WORLD_SIZE": "4", "LOCAL_RANK": "1"},
    **{"MASTER_ADDR": "node1", "MASTER_PORT": "29500"},
}
SCRIPTS = sorted((ROOT / "launch").glob("*.s*"))


@pytest.mark.parametrize("script", SCRIPTS, ids=lambda path: path.name)
def test_scripts_parse(script):
    subprocess.run(["bash", "-n", str(script)], check=True)
    if shutil.which("shellcheck"):
        subprocess.run(["shellcheck", str(script)], check=True)


def test_multi_node_defaults_are_16_gpus_times_12():
    header = dict(
        line.removeprefix("#SBATCH --").split("=")
        for line in (ROOT / "launch/slurm.sbatch").read_text().splitlines()
        if line.startswith("#SBATCH --") and "=" in line
    )
    assert int(header["nodes"]) * int(header["ntasks-per-node"]) == 16
    assert header["ntasks-per-node"] == header["gpus-per-node"]
    for name in ("ft_ema", "ft_mse"):
        recipe = config.load(
            config.find_recipe(name), ["run_dir=x", "init.weights=x", "data.sources=x"]
        )
        assert micro_batch(recipe, 16) == 12
        assert recipe.global_batch == 16 * 12


@pytest.mark.parametrize(
    ("more", "found"),
    [
        ({"SLURM_STEP_ID": "0"}, ("srun", 8, 2)),
        ({}, ("", 0, 0)),  # the batch script itself: not one of 16 tasks to wait for
        ({"SLURM_STEP_ID": "0", "SLURM_JOB_NAME": "bash"}, ("", 0, 0)),  # srun --pty bash
        ({"SLURM_STEP_ID": "0", **TORCHRUN}, ("torchrun", 4, 3)),
    ],
)
def test_who_started_the_processes(monkeypatch, more, found):
    for key, value in {**ALLOCATION, **more}.items():
        monkeypatch.setenv(key, value)
    assert launched() == found


def job() -> dict:
    return yaml.safe_load((ROOT / "launch/kubernetes.yaml").read_text())


def test_kubernetes_job_has_what_the_operator_reads():
    spec = job()["spec"]
    assert (job()["apiVersion"], job()["kind"]) == ("kubeflow.org/v1", "PyTorchJob")
    replicas = spec["pytorchReplicaSpecs"]
    assert set(replicas) == {"Master", "Worker"}
    variables = {}
    for replica in replicas.values():
        pod = replica["template"]["spec"]
        (container,) = pod["containers"]
        variables = {entry["name"]: entry["value"] for entry in container["env"]}
        assert all(isinstance(value, str) for value in variables.values())
        assert container["name"] == "pytorch"
        assert replica["restartPolicy"] == "OnFailure"
        assert pod["terminationGracePeriodSeconds"] >= 60
        assert str(container["resources"]["limits"]["nvidia.com/gpu"]) == variables["GPUS_PER_NODE"]
        mounts = {mount["name"]: mount["mountPath"] for mount in container["volumeMounts"]}
        volumes = {volume["name"]: volume for volume in pod["volumes"]}
        assert mounts.keys() == volumes.keys()
        assert mounts["shm"] == "/dev/shm"
        assert volumes["shm"]["emptyDir"]["medium"] == "Memory"
    nodes = sum(replica["replicas"] for replica in replicas.values())
    assert int(variables["NNODES"]) == nodes
    assert nodes * int(variables["GPUS_PER_NODE"]) * 12 == 192


def printed(
    folder: Path, script: str, starter: str, text: str, *settings: str, **given: str
) -> str:
    """The last line of a script whose starter is replaced by one that prints `text`."""
    stand_in = folder / starter
    stand_in.write_text(f'#!/usr/bin/env bash\necho "{text}"\n')
    stand_in.chmod(0o755)
    variables = {
        "PATH": f"{folder}:{os.environ['PATH']}",
        **{"GPUS_PER_NODE": "1", "RUN_DIR": "/shared/runs/mine", **given},
    }
    command = ["bash", f"launch/{script}", *settings]
    done = subprocess.run(
        command, cwd=ROOT, env=variables, capture_output=True, text=True, check=True
    )
    return done.stdout.splitlines()[-1]


STARTERS = pytest.mark.parametrize(
    ("script", "starter"), [("torchrun.sh", "torchrun"), ("slurm.sbatch", "srun")]
)


@pytest.mark.parametrize(
    ("given", "expected"),
    [({}, "/shared/runs/compiled"), ({"TORCHINDUCTOR_CACHE_DIR": "/elsewhere"}, "/elsewhere")],
)
@STARTERS
def test_compiled_kernels_are_kept_beside_the_runs(tmp_path, script, starter, given, expected):
    text = "cache: $TORCHINDUCTOR_CACHE_DIR"
    run_dir = "run_dir=/shared/runs/mine"
    assert printed(tmp_path, script, starter, text, run_dir, **given) == f"cache: {expected}"


@pytest.mark.parametrize(
    ("given", "expected"),
    [
        (["compute.compile=false"], ["data.sources.aesthetics", "data.sources.humans"]),
        (["data.sources.photos=/mine/{0..9}.tar"], ["data.sources.photos"]),
        (["seed=1", "data.sources=/with a space"], ["data.sources"]),
        (["--data.sources.a=/a", "data.sources.b=/b"], ["--data.sources.a", "data.sources.b"]),
    ],
)
@STARTERS
def test_sources_that_are_given_replace_those_of_the_script(
    tmp_path, script, starter, given, expected
):
    line = printed(tmp_path, script, starter, "$(printf '%s|' \"$@\")", *given)
    arguments = line.split("|")
    assert [a.split("=")[0] for a in arguments if "data.sources" in a] == expected
    assert [a for a in arguments if a in given] == given


@STARTERS
def test_the_recipe_and_its_directory_are_variables_of_both(tmp_path, script, starter):
    given = {"RECIPE": "ft_mse", "RUN_DIR": "runs/b"}
    line = printed(tmp_path, script, starter, "$*", **given)
    assert "train ft_mse " in line
    assert "run_dir=runs/b" in line.split()


def test_a_pod_keeps_compiled_kernels_on_a_volume_that_lasts():
    spec = job()["spec"]["pytorchReplicaSpecs"]["Master"]["template"]["spec"]
    (container,) = spec["containers"]
    folders = {entry["name"]: entry["value"] for entry in container["env"]}
    claims = {v["name"] for v in spec["volumes"] if "persistentVolumeClaim" in v}
    lasting = [m["mountPath"] for m in container["volumeMounts"] if m["name"] in claims]
    assert str(Path(folders["TORCHINDUCTOR_CACHE_DIR"]).parent) in lasting


@pytest.mark.slow
def test_the_pod_s_command_trains(folder):
    (container,) = job()["spec"]["pytorchReplicaSpecs"]["Master"]["template"]["spec"]["containers"]
    arguments = runs.overrides(folder, "pod", "stop_iteration=102")
    variables = {entry["name"]: entry["value"] for entry in container["env"]}
    ours = {"RECIPE": "demo", "NNODES": "1:1", "GPUS_PER_NODE": "1", "MASTER_ADDR": "localhost"}
    running = Running(
        [*container["command"], *arguments], folder / "pod.log", **{**variables, **ours}
    )
    assert running.wait() == 0, running.log.read_text()
    assert runs.final_state(folder, "pod").iteration == 102


@pytest.mark.slow
def test_torchrun_stops_on_each_signal_within_30_seconds_and_goes_on(folder, undisturbed):
    command = ["bash", "launch/torchrun.sh", *runs.overrides(folder, "signals", *FEW)]
    log = folder / "signals.log"
    sent = (
        (104, lambda pid: (os.kill(pid, signal.SIGTERM), os.kill(pid, signal.SIGTERM)), 143),
        (114, lambda pid: os.killpg(pid, signal.SIGINT), 130),  # as Ctrl-C in a terminal does
        (124, lambda pid: os.kill(pid, signal.SIGUSR1), 138),
    )
    for iteration, send, code in sent:
        running = Running(command, log, GPUS_PER_NODE=2)
        wait_for(log, f"iteration {iteration} of")
        began = time.monotonic()
        send(running.process.pid)
        assert running.wait() == code, log.read_text()
        assert time.monotonic() - began < 30
        stopped = runs.final_state(folder, "signals").iteration
        assert stopped is not None
        assert iteration <= stopped < 140
    assert Running(command, log, GPUS_PER_NODE=2).wait() == 0, log.read_text()
    runs.assert_same_state(runs.final_state(folder, "signals"), undisturbed)
    assert Running(command, log, GPUS_PER_NODE=1).wait() == 0
    assert "its end; nothing to do" in log.read_text()


@pytest.mark.slow
def test_the_chain_goes_on_where_it_stopped_and_skips_what_is_done(folder):
    here = folder / "chain"
    here.mkdir()
    tiny = runs.overrides(folder, "chain/unused", "init.iteration=null")
    for name, more in (
        ("ft_ema", ("name=ft_ema", "stop_iteration=103")),
        ("ft_mse", ("name=ft_mse", "stop_iteration=106", *runs.NO_ADVERSARIAL)),
    ):
        recipe = config.load(config.find_recipe("demo"), [*tiny, *more])
        (here / f"{name}.yaml").write_text(config.to_yaml(recipe))
    variables = {
        "KL_F8": str(folder / "model.ckpt"),
        "RUNS": str(here / "runs"),
        "IMAGES": str(folder / "tiles"),
        "FT_EMA": str(here / "ft_ema.yaml"),
        "FT_MSE": str(here / "ft_mse.yaml"),
        "MAX_RESTARTS": "0",
        "EVALUATE": "--size 32 --perceptual st_lpips_alex --device cpu",
        "GPUS_PER_NODE": "1",
    }
    sources = f"data.sources={folder / 'shards'}"
    command = ["bash", "launch/chain.sh", sources]
    broken = Running(command, here / "log", **{**variables, "FT_MSE": "no-such-recipe"})
    assert broken.wait() != 0
    assert (here / "runs/ft_ema/export/ft_ema-ema-pruned.safetensors").is_file()
    assert not (here / "runs/evaluation").exists()
    assert Running(command, here / "log", **variables).wait() == 0, (here / "log").read_text()
    assert runs.final_state(here / "runs", "ft_mse").iteration == 106
    table = (here / "runs/evaluation/table.md").read_text()
    assert all(name in table for name in ("kl-f8", "ft-EMA", "ft-MSE"))
    before = {path: path.stat().st_mtime_ns for path in sorted((here / "runs").rglob("*"))}
    done = subprocess.run(
        command, cwd=ROOT, env=environment(**variables), capture_output=True, text=True, check=True
    )
    assert done.stdout.count("is there") == 3
    after = {path: path.stat().st_mtime_ns for path in sorted(Path(here / "runs").rglob("*"))}
    assert after == before
