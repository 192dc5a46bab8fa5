"""Copies what the tests compare with out of a folder of reference results.

    python tests/make_golden.py GOLDEN_DIR

The folder was made by running the original code (CompVis/latent-diffusion a506df5,
taming-transformers 3ba01b2, lpips 0.1.4). Kept: float64 results, their inputs and the weights
(float16, exact). Left out: the float32 twins and what this package does not do.
"""

import json
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
from safetensors.numpy import load_file

HERE = Path(__file__).parent / "golden"
PAIRS = ("sq", "rect", "flat", "small")
RUNS = ("i.active", "i.cross", "i.active.biglr", "ii.active", "ii.cross", "ii.active.biglr")
DECODER_GRADIENTS = ("decoder.conv_out.weight", "decoder.conv_in.weight", "post_quant_conv.weight")
DISCRIMINATOR_GRADIENTS = ("main.0.weight", "main.11.bias")
BUFFERS = ("main.3.running_mean", "main.9.running_var")
KINDS = ("weight", "bias")


def main() -> None:
    source = Path(sys.argv[1])
    facts = {path.stem: json.loads(path.read_text()) for path in source.glob("*.json")}
    cases = {name: case for name, case in facts["loss"]["cases"].items() if expressible(case)}
    arrays, tolerances = {}, {}
    for name in [*wanted(), *wanted_of_loss(cases), *wanted_of_train()]:
        file, key = name.split("/", 1)
        tensors = load_file(source / f"{file}.safetensors")
        stored = f"{key}.f64" if f"{key}.f64" in tensors else key
        stored = stored if stored in tensors else f"{key}.f32"
        if stored not in tensors:
            continue  # train keeps the large weights of some steps only
        arrays[name] = tensors[stored]
        tolerance = facts["index"]["entries"][f"{file}:{stored}"]["tolerance"]
        if isinstance(tolerance.get("atol"), float):
            tolerances[name] = tolerance["atol"]
    HERE.mkdir(exist_ok=True)
    np.savez_compressed(HERE / "tensors.npz", **arrays)
    np.savez_compressed(
        HERE / "weights.npz",
        **{
            f"autoencoder/{k}": v
            for k, v in load_file(source / "ae_weights_fp16.safetensors").items()
        },
        **load_file(source / "disc_weights_fp16.safetensors"),
    )
    lines = [
        f"{json.dumps(key)}: {json.dumps(value)}"
        for key, value in {"tolerances": tolerances, **scalars(facts, cases)}.items()
    ]
    (HERE / "facts.json").write_text("{\n" + ",\n".join(lines) + "\n}\n")


def expressible(case: dict[str, Any]) -> bool:
    """Without per-sample weights, the vanilla loss and the validation pass: see test_losses.py."""
    return not case["weights"] and case["disc_loss"] == "hinge" and case["split"] == "train"


def wanted() -> Iterator[str]:
    names = "x eps encoder_out moments mean logvar z post_quant dec dec_mode kl"
    yield from (f"ae/{name}" for name in names.split())
    yield from (f"ae/posterior_edge.{name}" for name in ("params", "mean", "logvar", "std", "kl"))
    yield from ("disc/x", "disc/gan.logits_real", "disc/gan.logits_fake")
    yield "disc/ndf16.grad_input_of_minus_mean"
    for ndf in ("ndf16", "ndf64"):
        for name in ("eval_before", "train", "eval_after"):
            yield f"disc/{ndf}.logits_{name}"
        yield f"disc/{ndf}.grad_conv0_weight_of_minus_mean"
        for layer in (3, 6, 9):
            yield f"disc/{ndf}.after_train.main.{layer}.running_mean"
            yield f"disc/{ndf}.after_train.main.{layer}.running_var"
    for pair in PAIRS:
        yield from (f"lpips/{pair}.{name}" for name in ("x", "y", "lpips_taming", "pnet"))
    yield "lpips/small.grad_y_of_sum_lpips"
    for net in ("standin", "vgg"):
        for name in ("decoder.conv_out.weight", "post_quant_conv.weight"):
            yield f"variant_b/{net}.A.lavinal_sum.grad.{name}"


def wanted_of_loss(cases: dict[str, Any]) -> Iterator[str]:
    for layer in range(3):
        yield from (f"loss/standin.{layer}.weight", f"loss/standin.{layer}.bias")
    for name, case in cases.items():
        yield from (f"loss/{name}.bn_after.{buffer}" for buffer in BUFFERS)
        if case["idx"] == 0:
            yield f"loss/{name}.p_loss_per_sample"
            yield from (f"loss/{name}.grad.{key}" for key in (*DECODER_GRADIENTS, "loss.logvar"))
        else:
            for key in DISCRIMINATOR_GRADIENTS:
                yield f"loss/{name}.grad.loss.discriminator.{key}"


def wanted_of_train() -> Iterator[str]:
    yield from ("train/batches", "train/noise_a", "train/noise_b")
    decoder = [
        f"{part}.{kind}" for part in ("decoder.conv_out", "post_quant_conv") for kind in KINDS
    ]
    discriminator = ("main.0.weight", "main.0.bias", "main.11.bias")
    for run in RUNS:
        for step in range(1, 6):
            prefix = f"train/{run}.step{step}"
            yield from (f"{prefix}.{kind}.{key}" for kind in ("param", "ema") for key in decoder)
            yield from (f"{prefix}.param.loss.discriminator.{key}" for key in discriminator)
            yield from (f"{prefix}.bn.{buffer}" for buffer in BUFFERS)
        yield f"train/{run}.step5.param.loss.discriminator.main.11.weight"


def scalars(facts: dict[str, Any], cases: dict[str, Any]) -> dict[str, Any]:
    """Scalars, shapes and checksums, float64 where there are two."""

    def float64(values: dict[str, Any]) -> dict[str, float]:
        return {key: value["f64"] for key, value in values.items()}

    groups = facts["facts_keys"]["compvis"]["groups"]
    parts = ("encoder", "decoder", "quant_conv", "post_quant_conv")
    prefix = "loss.discriminator."
    variants = ("standin.A.lavinal_sum", "vgg.A.lavinal_sum")
    return {
        "autoencoder_shapes": {k: v for part in parts for k, v in groups[part]["keys"].items()},
        "parameters": {part: groups[part]["n_parameters"] for part in parts},
        "discriminator_shapes": {
            key.removeprefix(prefix): shape
            for key, shape in groups["loss.discriminator"]["keys"].items()
        },
        "discriminator_parameters": groups["loss.discriminator"]["n_parameters"],
        "discriminator_init": facts["disc"]["weights_init"],
        "gan": float64(facts["disc"]["scalars"]["gan"]),
        "adopt_weight": facts["disc"]["adopt_weight"],
        "vgg_shapes": facts["lpips"]["vgg16_features_spec"],
        "vgg_sha256": facts["lpips"]["vgg16_features_sha256_float32"],
        "loss_cases": {
            name: {**case, "values": float64(facts["loss"]["scalars"][name])}
            for name, case in cases.items()
        },
        "variant_b": {name: float64(facts["variant_b"]["scalars"][name]) for name in variants},
        "train": {
            name: {
                "variant": run["variant"],
                "start": run["gs0"],
                "learning_rate": run["lr"],
                "disc_start": run["disc_start"],
                "steps": [
                    {**step["log_f64"], "num_batches_tracked": step["nbt"]} for step in run["steps"]
                ],
            }
            for name, run in facts["train"]["runs"].items()
            if name in RUNS
        },
    }


if __name__ == "__main__":
    main()
