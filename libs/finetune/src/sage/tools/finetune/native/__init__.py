"""What lies between the matrix products of a step on a CPU, in C: attention, norms, rotations, gates.

torch computes the same in many small operations with all of memory between them (see step_kernels.py).
"""
