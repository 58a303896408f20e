"""Ranks, devices, recomputation and compilation: the only package that touches torch.distributed."""
