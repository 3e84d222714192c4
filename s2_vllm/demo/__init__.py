"""A small S2 checkpoint with random weights, and prompts served from it: `python -m s2_vllm.demo`."""
