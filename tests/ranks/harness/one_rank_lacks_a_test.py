import os

if os.environ.get("OMPI_COMM_WORLD_RANK", os.environ.get("PMI_RANK")) == "1":
    raise ImportError("this rank cannot import the file")


def test_of_the_others() -> None:
    pass
