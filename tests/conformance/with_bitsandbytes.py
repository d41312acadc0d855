"""bitsandbytes beside the vectors: four bits, there and back, on the CPU.

python with_bitsandbytes.py VECTORS RESULTS

A matrix is given as it stands; its own table of NF4 and map of 8 bits are used, which are the cases'.
"""

import sys
from pathlib import Path

import torch
from bitsandbytes import functional
from on_torch import run


def quantise_nf4(t, c):
    codes, state = functional.quantize_4bit(
        t["W"].detach(), blocksize=c["block"], compress_statistics="map" in t, quant_type="nf4"
    )
    found = {"codes": codes.flatten().long(), "absmax": state.absmax}
    if "map" in t:
        found |= {"absmax": state.absmax.long(), "outer": state.state2.absmax, "offset": state.offset}
    return found


def dequantise_nf4(t, c):
    inner, offset, absmax = None, None, t["absmax"]
    if "map" in t:
        inner = functional.QuantState(t["outer"].detach(), code=t["map"].detach(), blocksize=256, dtype=torch.float32)
        absmax, offset = absmax.to(torch.uint8), t["offset"].detach()
    state = functional.QuantState(
        absmax.detach(), shape=torch.Size((c["out"], c["in"])), code=t["levels"].detach(), blocksize=c["block"],
        quant_type="nf4", dtype=torch.float32, offset=offset, state2=inner,
    )  # fmt: skip
    return {"W": functional.dequantize_4bit(t["codes"].to(torch.uint8)[:, None], state)}


if __name__ == "__main__":
    run({"quantise_nf4": quantise_nf4, "dequantise_nf4": dequantise_nf4}, Path(sys.argv[1]), Path(sys.argv[2]))
