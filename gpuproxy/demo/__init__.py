"""`gpuproxy demo`: a whole gateway with a small inference server behind it, and a guided first call."""
