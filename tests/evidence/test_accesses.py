"""Which accesses of global memory a compiled kernel's text names, and how wide they are."""

from types import SimpleNamespace

import pytest

from evidence.accesses import wide

LOCATIONS = '#loc1 = loc("kernel.py":10:5)\n#loc2 = loc("kernel.py":11:5)\n#loc3 = loc("x"(#loc1))\n'
STORE = "    tt.store %p, %y, %mask : tensor<64x64x!tt.ptr<bf16>, #blocked> loc(#loc2)\n"
LOADS = {
    "tt.load": "    %x = tt.load %p, %mask, %other : tensor<64x64x!tt.ptr<bf16>, #blocked> loc(#loc3)\n",
    "async copy": (
        "    %x = ttg.async_copy_global_to_local %p, %buffer mask %mask : tensor<64x64x!tt.ptr<bf16>, #blocked> "
        "-> <64x64xbf16, #shared, #smem, mutable> loc(#loc3)\n"
    ),
    "to shared memory": (
        "    %x = amdg.buffer_load_to_local %p[%offsets] mask = %mask into %buffer {contiguity = 8 : i32} : "
        "<bf16>[tensor<64x64xi32, #linear>]  -> <64x64xbf16, #shared, #smem, mutable> loc(#loc3)\n"
    ),
}
AMD = """
\t.file\t1 "/home" "kernel.py"
\t.loc\t1 10 5
\tbuffer_load_dwordx4 v1, s[4:7], 0 offen lds
\t.loc\t1 11 5
\tbuffer_store_dwordx2 v[0:1], v2, s[4:7], 0 offen
"""


@pytest.mark.parametrize("load", LOADS.values(), ids=LOADS)
def test_every_form_of_load_is_counted(load):
    found = wide(SimpleNamespace(asm={"ttgir": load + STORE + LOCATIONS, "amdgcn": AMD}))
    assert found == (1.0, 0.0, 8)
