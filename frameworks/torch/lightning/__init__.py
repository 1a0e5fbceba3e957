"""Lightning on the ranks of a job: ``Trainer(strategy=LentandoStrategy())``. Needs ``pip install lightning``.

It is no part of ``lentando.torch`` until ``lentando.torch.lightning`` is imported, which loads Lightning.
"""

from lentando.torch.lightning.run_log_callback import RunLogCallback
from lentando.torch.lightning.strategy import LentandoStrategy

__all__ = ["LentandoStrategy", "RunLogCallback"]
