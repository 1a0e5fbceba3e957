"""The update rules, on flat NumPy arrays over the protocols of ``lentando.comm``. Knows no framework."""

if __name__ == "optimizers":
    raise ImportError(
        "import lentando.optimizers, not optimizers: a second copy of this package would not share its state"
    )
