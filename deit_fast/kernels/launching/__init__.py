"""How kernels are launched: settings, hardware facts, the launcher, its replay, and what was measured."""
