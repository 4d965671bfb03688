"""Latent Dataset Distillation with Diffusion Models."""

__version__ = "0.1.0"
