"""The kernels for gradients compile for a Hopper GPU, to its own matrix products and without much spilt."""

from __future__ import annotations

import json

from tests.programs import run_python


def test_matrix_products_of_the_main_loop_need_no_local_memory() -> None:
    code = json.loads(run_python("-m", "tests.backward_sass", "64", "128", without="TRITON_INTERPRET"))
    assert code.keys() == {"dq", "dkdv"}
    for of_kernel in code.values():
        lines = of_kernel.splitlines()
        products = [n for n, line in enumerate(lines) if "HGMMA" in line]
        assert not any("HMMA" in line for line in lines), "no products of the generation before"
        # The loop without masks comes first, and has as many products as the one with masks.
        main_loop = lines[products[0] : products[len(products) // 2 - 1]]
        assert len([line for line in main_loop if "LDL" in line or "STL" in line]) < 8
