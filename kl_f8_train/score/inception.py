"""Inception's features for rFID: torch-fidelity's network and its TensorFlow-like resize to 299."""

import contextlib
import io
from pathlib import Path

import torch
from torch import Tensor, nn

from kl_f8_train.core.hashes import tensors_sha256
from kl_f8_train.errors import MissingInputError
from kl_f8_train.weights import weight_file

FEATURES = 2048  # values of an image: the width of the last pooled layer


class Inception(nn.Module):
    """uint8 (B, 3, H, W) -> (B, 2048) float32: the average pool before the classifier; frozen."""

    def __init__(self, path: Path) -> None:
        """Raises MissingInputError without torch-fidelity or with another network's weights."""
        super().__init__()
        state = weight_file.read(path).tensors
        self.sha256 = tensors_sha256(state)
        self.network = _network(state, path)

    def forward(self, images: Tensor) -> Tensor:
        (features,) = self.network(images)
        return features


def _network(state: dict[str, Tensor], path: Path) -> nn.Module:
    try:
        from torch_fidelity.feature_extractor_inceptionv3 import FeatureExtractorInceptionV3
    except ImportError as error:
        raise MissingInputError(
            "rFID needs the torch-fidelity package: pip install torch-fidelity"
        ) from error
    cleaned = io.BytesIO()  # tensors that we read safely: torch-fidelity would unpickle the file
    torch.save(state, cleaned)
    cleaned.seek(0)
    try:
        with contextlib.redirect_stdout(io.StringIO()):
            return FeatureExtractorInceptionV3(
                "inception-v3-compat", ["2048"], feature_extractor_weights_path=cleaned
            )
    except RuntimeError as error:  # load_state_dict's list of what does not fit
        reason = str(error).splitlines()[1].strip() if "\n" in str(error) else str(error)
        raise MissingInputError(
            f"{path} does not hold torch-fidelity's Inception of 2015-12-05: {reason:.200}...; "
            "`kl-f8-train fetch inception` gets it"
        ) from error
