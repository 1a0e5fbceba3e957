"""What crosses the wire: transports, collectives, flat buffers. Knows NumPy arrays and ranks, never a framework."""

if __name__ == "comm":
    raise ImportError("import lentando.comm, not comm: a second copy of this package would not share its state")
