"""The GEMMs of the head in Triton: logits that stay in registers (``kernels``), what happens to a block of them (``epilogue``),
the sums of all blocks (``combine``), products of a filtered gradient (``filtered``), and their launches (``launch``)."""
