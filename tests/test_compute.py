"""Every switch of `compute.*` against the plain path, and torch.compile's own books."""

import copy
import re
import shutil
import sysconfig
from contextlib import nullcontext
from functools import partial

import pytest
import runs
import torch
from torch import nn
from torch._dynamo.utils import counters

from kl_f8_train.check import benchmark, cost
from kl_f8_train.core import machine, model, perceptual, updates
from kl_f8_train.core.batch import Batch
from kl_f8_train.core.discriminator import Discriminator
from kl_f8_train.core.hashes import frozen_sha256
from kl_f8_train.core.model import AutoencoderKL, NormSwish, UpLevel, Upsample
from kl_f8_train.core.step import Finetuner
from kl_f8_train.core.updates import build_adam, parameters_of
from kl_f8_train.errors import RunFailedError, UsageError
from kl_f8_train.run.train import train
from kl_f8_train.weights import checkpoint, pretrained, weight_file

PLAIN = (
    *("compute.channels_last=false", "compute.subpixel_upsample=false"),
    *("compute.lean_norm=false", "compute.perceptual_parts=1"),
    *("compute.compile=false", "adversarial.start_iteration=0"),
)


@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float64, 1e-13), (torch.float32, 2e-6)])
def test_subpixel_upsampling_is_doubling_and_convolving(dtype, tolerance):
    torch.manual_seed(0)
    layer = Upsample(16).to(dtype)
    x = torch.randn(2, 16, 5, 7, dtype=dtype, requires_grad=True)
    results = []
    for layer.subpixel in (False, True):
        y = layer(x)
        gradients = torch.autograd.grad(y.cos().sum(), (x, *layer.parameters()))
        results.append([y, *gradients])
    for plain, fast in zip(*results, strict=True):
        assert plain.shape == fast.shape
        assert (plain - fast).norm() < tolerance * plain.norm()


@pytest.mark.parametrize("compiling", [False, True])
@pytest.mark.parametrize(
    ("dtype", "center", "tolerance"),
    [(torch.float64, 0, 1e-12), (torch.float32, 0, 2e-6), (torch.float32, 300, 2e-4)],
)
def test_lean_norm_is_norm_and_swish(monkeypatch, compiling, dtype, center, tolerance):
    """Also where the mean is large beside the deviation: float32 itself is 3e-5 off at 300."""
    torch.manual_seed(0)
    layer = NormSwish(4, 16).to(dtype)
    nn.init.normal_(layer.weight)
    nn.init.normal_(layer.bias)
    x = (center + torch.randn(2, 16, 6, 5, dtype=dtype)).requires_grad_()
    added = torch.randn(16, dtype=dtype, requires_grad=True)
    monkeypatch.setattr(torch.compiler, "is_compiling", lambda: compiling)
    results = []
    for layer.lean in (False, True):
        y = layer(x, added) + layer(x)
        gradients = torch.autograd.grad(y.cos().sum(), (x, added, layer.weight, layer.bias))
        results.append([y, *gradients])
    for plain, lean in zip(*results, strict=True):
        assert plain.dtype == lean.dtype
        assert (plain - lean).norm() < tolerance * plain.norm()


@pytest.mark.parametrize(("height", "width"), [(1, 1), (6, 5), (8, 8), (192, 2), (256, 1)])
@pytest.mark.parametrize("biased", [False, True])
def test_group_statistics_are_those_of_the_group(height, width, biased):
    """With channels far from each other, in a group with a first pixel far from its mean."""
    torch.manual_seed(0)
    x = torch.randn(2, 12, height, width, dtype=torch.float64)
    x += 100 * torch.arange(12).view(1, -1, 1, 1)
    x[:, :, 0, 0] += 50
    added = torch.randn(12, dtype=torch.float64) if biased else None
    mean, rstd = model.group_statistics(x, added, 3, 1e-6)
    grouped = (x if added is None else x + added.view(1, -1, 1, 1)).view(2, 3, -1)
    torch.testing.assert_close(mean, grouped.mean(2), rtol=1e-12, atol=0)
    expected = (grouped.var(2, correction=0) + 1e-6).rsqrt()
    torch.testing.assert_close(rstd, expected, rtol=1e-10, atol=0)


@pytest.mark.parametrize("nhwc", [False, True])
def test_interleaving_has_autograds_gradient(monkeypatch, nhwc):
    layout = torch.channels_last if nhwc else torch.contiguous_format
    parts = torch.randn(2, 8, 5, 7, dtype=torch.float64).contiguous(memory_format=layout)
    parts.requires_grad_()
    assert torch.autograd.gradcheck(model.interleave, parts)
    whole = model.interleave(parts)
    seed = torch.randn_like(whole)
    (gradient,) = torch.autograd.grad(whole, parts, seed)
    assert gradient.is_contiguous(memory_format=layout)
    monkeypatch.setattr(torch.compiler, "is_compiling", lambda: True)
    compiled = model.interleave(parts)
    assert torch.equal(compiled, whole)
    assert torch.equal(torch.autograd.grad(compiled, parts, seed)[0], gradient)


@pytest.mark.parametrize("recompute", [False, True])
@pytest.mark.parametrize("subpixel", [False, True])
@pytest.mark.parametrize("lean", [False, True])
def test_biases_that_wait_for_the_next_norm_change_nothing(monkeypatch, lean, subpixel, recompute):
    """Through a doubling, a block whose widths differ, one whose do not, and a norm."""
    torch.manual_seed(0)
    below, norm = UpLevel(8, 16, 1, 4, upsample=True), NormSwish(4, 12)
    level = UpLevel(16, 12, 2, 4, upsample=False)
    level.recompute, below.upsample.subpixel = recompute, subpixel
    network = nn.ModuleList((below, level, norm)).double()
    for parameter in network.parameters():
        nn.init.normal_(parameter, std=0.3)
    for part in network.modules():
        if isinstance(part, NormSwish):
            part.lean = lean
    x = torch.randn(2, 8, 4, 6, dtype=torch.float64, requires_grad=True)
    results = []
    for compiling in (False, True):
        monkeypatch.setattr(torch.compiler, "is_compiling", partial(bool, compiling))
        y = level(below(x), below.upsample, norm)
        gradients = torch.autograd.grad(y.cos().sum(), (x, *network.parameters()))
        results.append([y, *gradients])
    assert results[0][0].shape == (2, 12, 8, 12)
    for plain, compiled in zip(*results, strict=True):
        assert (plain - compiled).norm() < 1e-12 * max(1.0, float(plain.norm()))


def test_lean_norm_keeps_its_input_alone_and_hands_on_autocasts_type():
    layer, x = NormSwish(4, 16), torch.randn(2, 16, 6, 5, dtype=torch.bfloat16, requires_grad=True)
    kept = []
    with (
        torch.autocast("cpu", torch.bfloat16),
        torch.autograd.graph.saved_tensors_hooks(lambda t: kept.append(t) or t, lambda t: t),
    ):
        y = layer(x)
    assert y.dtype == torch.bfloat16
    images = [t for t in kept if t.ndim == 4]
    assert [t.data_ptr() for t in images] == [x.data_ptr()]
    assert sum(t.numel() for t in kept if t.ndim < 4) == 2 * 16 + 2 * 2 * 4


def gradients_of_an_iteration(tuner, batch):
    """Of decoder and discriminator, from the same start."""
    tuner.run_iteration(batch)
    return {key: p.grad.clone() for key, p in tuner.named_parameters() if p.grad is not None}


@pytest.fixture
def plain_gradients(finetuner, autoencoder, discriminator, batch):
    """As they are with every switch off; the networks are put back."""
    states = [copy.deepcopy(module.state_dict()) for module in (autoencoder, discriminator)]
    gradients = gradients_of_an_iteration(finetuner("ft_ema", *PLAIN), batch(side=32))
    for module, before in zip((autoencoder, discriminator), states, strict=True):
        module.load_state_dict(before)
    return gradients


def assert_equal_gradients(plain, fast, tolerance=1e-10):
    assert plain.keys() == fast.keys()
    assert len(plain) > 100
    for key, expected in plain.items():  # the key's bias has no gradient: softmax is blind to it
        scale = max(float(expected.norm()), 1.0)
        assert float((fast[key] - expected).norm()) < tolerance * scale, key


@pytest.mark.parametrize(
    "switch",
    [
        "compute.channels_last=true",
        "compute.subpixel_upsample=true",
        "compute.lean_norm=true",
        "compute.perceptual_parts=2",
        "compute.checkpoint_levels=1",
        "compute.checkpoint_levels=4",
    ],
)
def test_switch_is_exact(finetuner, batch, plain_gradients, switch):
    fast = gradients_of_an_iteration(finetuner("ft_ema", *PLAIN, switch), batch(side=32))
    assert_equal_gradients(plain_gradients, fast)


def test_perceptual_precision_reaches_the_loss_alone(finetuner, batch, monkeypatch):
    """Off in the recipes."""
    network = pretrained.build("st_lpips_alex")
    asked = []
    forward = type(network).forward

    def noted(self, x, y, precision="float32"):
        asked.append(precision)
        return forward(self, x, y, precision)

    monkeypatch.setattr(type(network), "forward", noted)
    bfloat16 = "loss.perceptual_precision=bfloat16"
    for recipe, switches, expected in (
        ("ft_ema", (), "float32"),
        ("ft_mse", (), "float32"),
        ("ft_mse", (bfloat16,), "bfloat16"),
    ):
        tuner = finetuner(recipe, *switches, perceptual=network)
        asked.clear()
        tuner.run_iteration(batch(side=32))
        assert set(asked) == {expected}


def test_kernels_are_set_by_precision_and_put_back():
    products, cudnn = torch.backends.cuda.matmul, torch.backends.cudnn
    before = products.allow_tf32, cudnn.allow_tf32, cudnn.benchmark
    for precision, in_products, in_convolutions in (
        ("float32", False, False),
        ("tf32", True, True),
        ("bfloat16", False, True),
    ):
        with model.Kernels(precision):
            assert (products.allow_tf32, cudnn.allow_tf32) == (in_products, in_convolutions)
            assert not torch.are_deterministic_algorithms_enabled()
    with model.Kernels("float32", deterministic=True):
        assert torch.are_deterministic_algorithms_enabled()
        assert (cudnn.deterministic, cudnn.benchmark) == (True, False)
    assert not torch.are_deterministic_algorithms_enabled()
    assert (products.allow_tf32, cudnn.allow_tf32, cudnn.benchmark) == before


def test_what_prevents_determinism_is_named():
    with pytest.raises(RunFailedError, match="this operation prevents it"), machine.with_remedy():
        raise RuntimeError(
            "reflection_pad2d_backward_cuda does not have a deterministic implementation"
        )


def test_channels_last_reaches_networks_and_images(finetuner, batch, standin):
    tuner = finetuner("ft_ema", "compute.compile=false", "compute.channels_last=true")
    seen = []
    tuner.autoencoder.decoder.up[0].register_forward_hook(lambda m, i, out: seen.append(out))
    tuner.run_iteration(batch(side=32))
    weights = [tuner.autoencoder.last_layer, tuner.ema["decoder"].conv_out.weight, *seen]
    weights.append(tuner.autoencoder.last_layer.grad)
    assert all(value.is_contiguous(memory_format=torch.channels_last) for value in weights)


def test_gradients_of_that_layout_are_averaged_over_ranks(monkeypatch):
    for name, value in (("is_initialized", True), ("get_world_size", 2)):
        monkeypatch.setattr(updates.dist, name, lambda value=value: value)
    monkeypatch.setattr(updates.dist, "all_reduce", lambda flat: flat.mul_(4))
    gradients = torch.randn(4, 3, 2, 2).to(memory_format=torch.channels_last), torch.randn(3)
    expected = [2 * gradient for gradient in gradients]
    updates.average_over_ranks([*gradients])
    assert all(map(torch.equal, gradients, expected))


def test_adams_state_comes_back_in_the_parameters_layout(tmp_path, finetuner, batch):
    """The fused Adam walks all its tensors by one tensor's strides, and does not check."""
    tuner = finetuner("ft_mse", "compute.compile=false", "compute.channels_last=true")
    optimizers = tuner.adams
    tuner.run_iteration(batch(side=32))
    frozen = frozen_sha256(tuner.autoencoder.state_dict())
    path = runs.save(tuner, optimizers, tmp_path, frozen)
    restored = [build_adam(parameters_of(optimizers[0]), tuner.config.optimizer)]
    checkpoint.restore(tuner, restored, weight_file.read(path))
    weight = tuner.autoencoder.last_layer
    for entry in ("exp_avg", "exp_avg_sq"):
        before, after = (o[0].state[weight][entry] for o in (optimizers, restored))
        assert after.stride() == weight.stride() == before.stride()
        assert torch.equal(after, before)


@pytest.mark.slow
@pytest.mark.parametrize("lean", [False, True])
def test_compiled_is_exact_without_breaks_or_recompiles(finetuner, tiny, batch, monkeypatch, lean):
    """Traced and differentiated as for inductor, but run by torch's own kernels: quicker."""
    torch._dynamo.reset()
    counters.clear()
    network = pretrained.build("st_lpips_alex").double()
    plain_tuner = finetuner("ft_ema", *PLAIN, perceptual=network)
    compile_networks = partial(machine.compile_networks, backend="aot_eager")
    monkeypatch.setattr(machine, "compile_networks", compile_networks)
    parts = copy.deepcopy(
        (plain_tuner.autoencoder, plain_tuner.discriminator, plain_tuner.perceptual)
    )
    switches = f"compute.lean_norm={str(lean).lower()}", "compute.compile=true"
    settings = tiny("ft_ema", *PLAIN, *switches)
    tuner = Finetuner(settings, *parts).double()
    plain = gradients_of_an_iteration(plain_tuner, batch(side=32))
    assert_equal_gradients(plain, gradients_of_an_iteration(tuner, batch(side=32)))
    for name, value in plain_tuner.metrics.items():
        assert float(tuner.metrics[name]) == pytest.approx(float(value), rel=1e-9, abs=1e-12), name
    tuner.run_iteration(batch(1, side=32))
    graphs = machine.compiled_graphs()
    # encoder, middle, four levels, discriminator, perceptual, and functions
    assert graphs >= 14
    for step in (2, 3):
        tuner.run_iteration(batch(step, side=32))
    assert machine.compiled_graphs() == graphs
    assert benchmark.graph_breaks() == 0
    torch._dynamo.reset()


def test_levels_stay_compiled_with_and_without_gradients_and_for_other_batches():
    """All have one `forward`, for which torch would compile eight graphs in all."""
    torch._dynamo.reset()
    levels = [UpLevel(width, 32, 1, 32, upsample=False) for width in (32, 64, 96, 128)]
    machine.compile_each(levels, backend="eager")
    before = machine.compiled_graphs()
    for batch, gradients in ((1, False), (2, False), (2, True)):
        with torch.set_grad_enabled(gradients):
            for level in levels:
                level(torch.zeros(batch, level.block[0].conv1.in_channels, 4, 4))
    assert machine.compiled_graphs() - before == 12
    torch._dynamo.reset()


def test_training_compiles_for_its_micro_batches_alone_and_sets_its_kernels(
    folder, monkeypatch, capsys
):
    """Validation, one photograph at a time and before the first iteration, runs eagerly."""
    cudnn = torch.backends.cudnn
    seen = set()

    def record(graph, inputs):
        shapes = [value.shape for value in inputs if isinstance(value, torch.Tensor)]
        batches = [shape[0] for shape in shapes if shape[1:] == (3, 32, 32)]
        seen.update((batch, cudnn.allow_tf32, cudnn.benchmark) for batch in batches)
        return graph.forward

    torch._dynamo.reset()
    compile_networks = partial(machine.compile_networks, backend=record)
    monkeypatch.setattr(machine, "compile_networks", compile_networks)
    switches = "compute.compile=true", "log.pictures_every=1", "stop_iteration=101"
    assert train(runs.recipe(folder, "compiled", *switches, *runs.NO_ADVERSARIAL)) == 0
    assert seen == {(4, False, True), (2, False, True)}  # the perceptual network takes two parts
    lines = capsys.readouterr().out.splitlines()
    assert "networks: compiled by torch.compile (compute.compile=true); NCHW in memory" in lines
    (began,) = [i for i, line in enumerate(lines) if line.startswith("compiling the networks:")]
    (ended,) = [i for i, line in enumerate(lines) if re.match(r"compiled \d+ graphs; ", line)]
    assert began < ended


def test_each_kind_of_iteration_says_that_it_compiles_and_a_surprise_is_said(
    folder, monkeypatch, capsys
):
    """Warm-up, without the adversarial term, with it; then for another reason."""
    torch._dynamo.reset()
    compile_networks = partial(machine.compile_networks, backend="eager")
    monkeypatch.setattr(machine, "compile_networks", compile_networks)
    switches = (
        *("compute.compile=true", "stop_iteration=105", "init.discriminator=new"),
        *("adversarial.warmup_iterations=2", "adversarial.start_iteration=102"),
    )
    step = Finetuner.training_step

    def surprised(self, batch, index):
        if self.iteration == 104:
            torch._dynamo.reset()
        return step(self, batch, index)

    monkeypatch.setattr(Finetuner, "training_step", surprised)
    assert train(runs.recipe(folder, "kinds", *switches)) == 0
    out = capsys.readouterr().out
    assert out.count("compiling the networks: ") == 3
    assert len(re.findall(r"compiled \d+ graphs; the iteration took", out)) == 3
    assert len(re.findall(r"compiled [1-9]\d* graphs once more; the iteration took", out)) == 1
    torch._dynamo.reset()


def test_float32_is_no_tf32_and_all_is_put_back():
    cudnn = torch.backends.cudnn
    before = cudnn.enabled, cudnn.benchmark, cudnn.deterministic, cudnn.allow_tf32
    for precision, tf32 in (("float32", False), ("bfloat16", True)):
        with model.Kernels(precision):
            inside = cudnn.enabled, cudnn.benchmark, cudnn.deterministic, cudnn.allow_tf32
        assert inside == (before[0], True, before[2], tf32)
        assert before == (cudnn.enabled, cudnn.benchmark, cudnn.deterministic, cudnn.allow_tf32)


@pytest.mark.parametrize(
    ("message", "known"),
    [
        ("GET was unable to find an engine to execute this computation", True),
        ("cuDNN error: CUDNN_STATUS_ALLOC_FAILED", True),
        ("CUDA error: out of memory", True),
        ("CUDA error: an illegal memory access was encountered", False),
    ],
)
def test_the_end_of_memory_is_known_by_its_words(message, known):
    assert machine.is_out_of_memory(RuntimeError(message)) is known
    expected, text = (RunFailedError, "per_device_batch") if known else (RuntimeError, "illegal")
    with pytest.raises(expected, match=text), machine.with_remedy():
        raise RuntimeError(message)


@pytest.fixture
def gpu_machine(monkeypatch, tmp_path):
    """gpu_machine(cuda, compiler, header, version): what a machine with that would find."""

    def build(cuda=True, compiler="/usr/bin/gcc", header=True, version="2.15.0+cu132"):
        monkeypatch.delenv("CC", raising=False)
        monkeypatch.setattr(torch.cuda, "is_available", lambda: cuda)
        monkeypatch.setattr(torch, "__version__", version)
        monkeypatch.setattr(shutil, "which", lambda name: compiler)
        monkeypatch.setattr(sysconfig, "get_path", lambda name: str(tmp_path))
        (tmp_path / "Python.h").unlink(missing_ok=True)
        if header:
            (tmp_path / "Python.h").touch()

    return build


@pytest.mark.parametrize(
    ("there", "setting", "expected", "line"),
    [
        ({}, "null", True, "compiled by torch.compile (the default on a GPU); NHWC"),
        ({}, "false", False, "not compiled (compute.compile=false); NHWC"),
        ({"compiler": None}, "null", False, "not compiled (no C compiler found: install gcc"),
        ({"header": False}, "null", False, "Python.h is missing: install"),
        ({"compiler": None}, "true", True, "compiled by torch.compile (compute.compile=true)"),
        ({"cuda": False}, "null", False, "not compiled (on a CPU, unless compute.compile=true)"),
        ({"cuda": False}, "true", True, "compiled by torch.compile (compute.compile=true); NCHW"),
        ({"cuda": False}, "false", False, "not compiled (compute.compile=false); NCHW"),
    ],
)
def test_whether_networks_compile_is_said_with_its_reason(
    tiny, gpu_machine, there, setting, expected, line
):
    gpu_machine(**there)
    settings = tiny("ft_ema", f"compute.compile={setting}").compute
    assert machine.compiles(settings) is expected
    assert line in machine.describe(settings)


@pytest.mark.parametrize(
    ("version", "settings", "expected"),
    [
        ("2.15.0", (), True),
        ("2.15.0", ("compute.compile=false",), True),
        ("3.0.1", ("compute.compile=false",), True),
        ("2.9.1", (), True),  # compiled, with our own norm
        ("2.9.1", ("compute.compile=false",), False),
        ("2.9.1", ("compute.lean_norm=false",), False),
        ("2.14.0a0+git1", ("compute.compile=false",), False),
        ("2.9.1", ("compute.compile=false", "compute.channels_last=true"), True),
        ("2.15.0", ("compute.channels_last=false",), False),
        ("2.15.0", ("compute.accelerator=cpu",), False),
    ],
)
def test_nhwc_is_for_cuda_with_a_norm_that_keeps_it(tiny, gpu_machine, version, settings, expected):
    gpu_machine(version=version)
    compute = tiny("ft_ema", *settings).compute
    assert machine.channels_last(compute) is expected
    if not expected and compute.channels_last is None and compute.accelerator != "cpu":
        assert f"NCHW, as GroupNorm of torch {version} does not keep NHWC" in machine.describe(
            compute
        )


def test_a_cache_of_compiled_kernels_that_cannot_be_written_is_refused(
    tiny, monkeypatch, tmp_path, folder
):
    (tmp_path / "file").touch()
    monkeypatch.setenv(machine.COMPILE_CACHE, str(tmp_path / "file/inside"))
    machine.check_compile_cache(tiny("ft_ema", "compute.compile=false").compute)
    with pytest.raises(UsageError, match=r"TORCHINDUCTOR_CACHE_DIR: cannot write in .*unset it"):
        train(runs.recipe(folder, "unwritable", "compute.compile=true"))
    monkeypatch.setenv(machine.COMPILE_CACHE, str(tmp_path / "folder"))
    machine.check_compile_cache(tiny("ft_ema", "compute.compile=true").compute)
    assert str(tmp_path / "folder") in machine.compile_cache()
    monkeypatch.delenv(machine.COMPILE_CACHE)
    assert "temporary files" in machine.compile_cache()


# --- arithmetic -------------------------------------------------------------------------------


def count(config, network):
    """Operations of one iteration for one image, on tensors without contents."""
    critic = Discriminator(config.adversarial.ndf) if config.adversarial else None
    tuner = Finetuner(config, AutoencoderKL(config.model.ch), critic, network)
    meta, side = torch.device("meta"), config.data.crop
    images, noise = torch.zeros(1, 3, side, side), torch.zeros(1, 1, 4, side // 8, side // 8)
    batch = Batch(images, noise, ["a"], []).to(meta)
    return benchmark.count_flops(benchmark.iteration_of(tuner, meta), batch)


@pytest.mark.parametrize(("recipe", "limit"), [("ft_ema", 2437e9), ("ft_mse", 2260e9)])
def test_full_size_iteration_takes_the_floor(tiny, monkeypatch, recipe, limit):
    monkeypatch.setattr(torch, "autocast", lambda *_, **__: nullcontext())  # knows no meta device
    monkeypatch.setattr(torch.optim.Adam, "step", lambda self: None)  # nor does the fused Adam
    config = tiny(recipe, *PLAIN[2:3], "global_batch=1", "model.ch=128", "data.crop=256")
    counted = count(config, perceptual.lpips_vgg({}))
    assert counted <= 1.02 * cost.flops_per_image(config)
    assert counted <= limit
