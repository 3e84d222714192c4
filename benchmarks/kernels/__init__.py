"""The attention kernels on one GPU, against their peers in the same run.

cases            what is run: operation, geometry, batch, sequence length
inputs           random tensors and paged caches of a case
implementations  how each implementation is called on them
check            whether what it returned is right
timing           how long it took
work             FLOP and bytes, which turn times into rates
run              one case, from its inputs to its records
report           tables
"""
