"""gpuproxy: the gateway that GPU inference runs through."""

__version__ = "1.0.0"
