"""Horovod's elastic states for PyTorch: ``lt.elastic.TorchState``, ``ElasticSampler`` and ``run``.

Example of a program, under ``mpirun --with-ft ulfm``, whose ranks may die::

    lt.init(elastic=True)
    sampler = lt.elastic.ElasticSampler(dataset)
    loader = torch.utils.data.DataLoader(dataset, batch_size=32, sampler=sampler)
    state = lt.elastic.TorchState(model=model, optimizer=optimizer, sampler=sampler, epoch=0)

    @lt.elastic.run
    def train(state):
        while state.epoch < epochs:
            for number, (x, y) in enumerate(loader):
                ...  # a step
                sampler.record_batch(number, len(x))
                if number % 100 == 99:
                    state.commit()
            state.epoch += 1
            sampler.set_epoch(state.epoch)
            state.commit()

    train(state)
"""

from lentando.optimizers.elastic_state import ObjectState, State
from lentando.optimizers.elastic_state import run_fn as run
from lentando.torch.elastic.sampler import ElasticSampler
from lentando.torch.elastic.state import TorchState

__all__ = ["ElasticSampler", "ObjectState", "State", "TorchState", "run"]
