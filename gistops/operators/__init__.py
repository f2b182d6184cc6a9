"""Ops as the dispatcher knows them: schemas, fake kernels, autograd formulas and autocast rules. No kernels."""
