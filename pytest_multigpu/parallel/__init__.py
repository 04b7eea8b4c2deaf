"""Under pytest-xdist: workers that own GPUs, and the controller that hears of their runs.

``grouping`` tells which tests go together, ``scheduling`` sends them, ``worker`` locks the GPUs,
``wire`` packs what a worker knows, ``controller`` puts it together. Part of the top layer.
"""
