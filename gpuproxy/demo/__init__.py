"""`gpuproxy demo`: a whole gateway with a small inference server behind it, and a guided first call."""

from gpuproxy.demo.tour import DemoError, run

__all__ = ["DemoError", "run"]
