"""sdseg: medical image segmentation with latent diffusion in a single reverse step."""

__version__ = "0.1.0"
