# Spack: the package file of a release. Copy it to packages/py_lentando/package.py of a repository; add a version.

from spack_repo.builtin.build_systems.python import PythonPackage

from spack.package import *


class PyLentando(PythonPackage):
    """Trains one model on many workers with less communication (SlowMo, AdaComm, gossip), in PyTorch and in Keras."""

    pypi = "lentando/lentando-0.1.0.tar.gz"

    license("Apache-2.0")

    # At a release, the line that `spack checksum py-lentando 0.1.0` prints goes here.

    variant("mpi", default=True, description="Start jobs by mpirun and srun")
    variant("torch", default=False, description="Install PyTorch")
    variant("tensorflow", default=False, description="Install TensorFlow")

    depends_on("python@3.10:", type=("build", "run"))
    depends_on("py-setuptools@77:", type="build")
    depends_on("py-numpy@1.26:", type=("build", "run"))
    depends_on("py-ml-dtypes@0.5:", type=("build", "run"))
    depends_on("py-safetensors@0.5:", type=("build", "run"))
    depends_on("py-typer@0.15:", type=("build", "run"))
    depends_on("py-mpi4py@4:", when="+mpi", type=("build", "run"))
    depends_on("py-torch@2.4:", when="+torch", type=("build", "run"))
    depends_on("py-tensorflow@2.20:", when="+tensorflow", type=("build", "run"))
