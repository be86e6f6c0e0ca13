"""Triton device code and its launchers: tensors in, tensors out.

The launchers trust their callers (`deit_fast.ops`) to have checked shapes, dtypes and devices.
"""
