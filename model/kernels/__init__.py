"""Kernels of other packages behind the mixers: what each takes, whether it is here, and how it is called."""
