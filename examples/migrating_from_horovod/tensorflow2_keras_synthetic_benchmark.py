"""Images per second of a Keras model that ``fit`` trains on random images, on all ranks together."""

import argparse
import statistics
from timeit import default_timer

import horovod.tensorflow.keras as hvd
import tensorflow as tf

parser = argparse.ArgumentParser()
parser.add_argument("--fp16-allreduce", action="store_true")
parser.add_argument("--model", default="small", help="or the name of one of keras.applications, such as ResNet50")
parser.add_argument("--batch-size", type=int, default=8)
parser.add_argument("--image-size", type=int, default=32)
parser.add_argument("--num-warmup-batches", type=int, default=2)
parser.add_argument("--num-batches-per-iter", type=int, default=2)
parser.add_argument("--num-iters", type=int, default=3)
args = parser.parse_args()

hvd.init()
gpus = tf.config.list_physical_devices("GPU")
for gpu in gpus:
    tf.config.experimental.set_memory_growth(gpu, True)
if gpus:
    tf.config.set_visible_devices(gpus[hvd.local_rank()], "GPU")


def small_network():
    layers = tf.keras.layers
    body = [layers.Conv2D(channels, 3, strides=2, activation="relu") for channels in (16, 32, 64)]
    head = [layers.GlobalAveragePooling2D(), layers.Dense(1000, activation="softmax")]
    return tf.keras.Sequential([tf.keras.Input((args.image_size, args.image_size, 3)), *body, *head])


model = small_network() if args.model == "small" else getattr(tf.keras.applications, args.model)(weights=None)
compression = hvd.Compression.fp16 if args.fp16_allreduce else hvd.Compression.none
opt = hvd.DistributedOptimizer(tf.keras.optimizers.SGD(0.01), compression=compression)
model.compile(loss="sparse_categorical_crossentropy", optimizer=opt, jit_compile=False)

data = tf.random.uniform([args.batch_size, *model.input_shape[1:]])
target = tf.random.uniform([args.batch_size, 1], maxval=999, dtype=tf.int64)
dataset = tf.data.Dataset.from_tensor_slices((data, target)).cache().repeat().batch(args.batch_size)


class TimingCallback(tf.keras.callbacks.Callback):
    """The speed of each epoch of ``fit``, which is an iteration of the benchmark."""

    def __init__(self):
        super().__init__()
        self.speeds = []

    def on_epoch_begin(self, epoch, logs=None):
        self.started = default_timer()

    def on_epoch_end(self, epoch, logs=None):
        speed = args.batch_size * args.num_batches_per_iter / (default_timer() - self.started)
        self.speeds.append(speed)
        if hvd.rank() == 0:
            print(f"iteration {epoch}: {speed:.1f} images/s per rank", flush=True)


# The weights are those of rank 0 on all ranks, as at the start of any training.
model.fit(
    dataset,
    steps_per_epoch=args.num_warmup_batches,
    callbacks=[hvd.callbacks.BroadcastGlobalVariablesCallback(0)],
    epochs=1,
    verbose=0,
)
timing = TimingCallback()
model.fit(dataset, steps_per_epoch=args.num_batches_per_iter, callbacks=[timing], epochs=args.num_iters, verbose=0)
if hvd.rank() == 0:
    mean = statistics.mean(timing.speeds)
    print(f"images/s per rank: {mean:.1f} +- {1.96 * statistics.pstdev(timing.speeds):.1f}", flush=True)
    print(f"total images/s on {hvd.size()} ranks: {hvd.size() * mean:.1f}", flush=True)
