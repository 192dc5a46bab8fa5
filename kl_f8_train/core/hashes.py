"""SHA-256 of tensors."""

import hashlib
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from kl_f8_train.core.model import FROZEN


def tensor_bytes(tensor: Tensor) -> Any:
    """The elements of a tensor in order, as bytes; copied only if they do not lie in order."""
    plain = tensor.detach().cpu().contiguous()
    return plain.flatten().view(torch.uint8).numpy()


def tensors_sha256(tensors: Mapping[str, Tensor]) -> str:
    """SHA-256 over names, shapes, types and bytes, in the order of the names."""
    digest = hashlib.sha256()
    for name in sorted(tensors):
        tensor = tensors[name]
        # With the shape: a reshape keeps the bytes.
        digest.update(f"{name} {tuple(tensor.shape)} {tensor.dtype}\n".encode())
        digest.update(tensor_bytes(tensor))
    return digest.hexdigest()


def data_sha256(tensors: Mapping[str, Tensor]) -> str:
    """SHA-256 of a safetensors file's data, after its header, if all tensors have one type.

    As modelspec defines `hash_sha256`. Tensors of one type lie in the order of their names.
    """
    digest = hashlib.sha256()
    for name in sorted(tensors):
        digest.update(tensor_bytes(tensors[name]))
    return digest.hexdigest()


def frozen_sha256(state: Mapping[str, Tensor]) -> str:
    """SHA-256 of encoder and quant_conv in a state dict with CompVis keys."""
    prefixes = tuple(f"{name}." for name in FROZEN)
    return tensors_sha256({k: v for k, v in state.items() if k.startswith(prefixes)})
