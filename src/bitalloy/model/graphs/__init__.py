"""Several graphs wired together: an encoder whose embeddings a decoder reads, a projector before a language model.

`join` makes one graph of them, so that everything that works on a graph works on the whole: ranges, units, the
reverse pass (cotangents cross the wires like any other edge), plans. `divide` cuts a rewritten joined model back into
one model per graph, each with the inputs and outputs that it came with.

On disk a program is a folder with the graphs and a `program.json`:

    {
      "graphs": {"encoder": "encoder.onnx", "decoder": "decoder.onnx"},
      "wires": ["encoder:embeddings -> decoder:image_embeddings"]
    }
"""
