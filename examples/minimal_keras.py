"""Train a Keras model on handwritten digits: the shortest complete program.

On one rank, or on several:

    python examples/minimal_keras.py
    mpirun -np 4 python examples/minimal_keras.py
"""

import keras
from sklearn.datasets import load_digits

import lentando.tensorflow as lt

lt.init()  # joins the job that the launcher started; a single rank otherwise
keras.utils.set_random_seed(lt.rank())
images, labels = load_digits(return_X_y=True)
images, labels = images[lt.rank() :: lt.size()] / 16, labels[lt.rank() :: lt.size()]  # this rank's shard

model = keras.Sequential([keras.layers.Dense(64, "relu"), keras.layers.Dense(10)])
model.build((None, 64))
sgd = keras.optimizers.SGD(0.05, momentum=0.9, nesterov=True)
model.compile(
    optimizer=lt.SlowMo(sgd, model=model, period=12, slow_momentum=0.5),
    loss=keras.losses.SparseCategoricalCrossentropy(from_logits=True),
    metrics=["accuracy"],
)
with lt.join(model.optimizer):  # the shards may differ by a batch
    model.fit(images, labels, batch_size=16, epochs=10, verbose=2 if lt.rank() == 0 else 0)
with model.optimizer.averaged():  # the mean of all replicas
    loss, accuracy = model.evaluate(images, labels, verbose=0)
print(f"rank {lt.rank()} of {lt.size()}: accuracy {accuracy:.3f} on its shard")
