"""What must hold of any probe's scores, measured on a loaded model: readings, no verdicts.

:mod:`.fit` is about the probe and this model, :mod:`.scored` about one text's activations and
scores, :mod:`.ways` about the same text scored in other ways. One full forward
(:mod:`..observe`) is shared; the others leave early or are short.
"""
