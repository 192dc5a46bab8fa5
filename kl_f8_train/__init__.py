"""Finetunes the decoder of Stable Diffusion's kl-f8 autoencoder."""

__version__ = "0.2.0"
