"""Images per second of a network that trains on random images in a loop of TensorFlow's, on all ranks together."""

import argparse
import statistics
import timeit

import horovod.tensorflow as hvd
import tensorflow as tf

parser = argparse.ArgumentParser()
parser.add_argument("--fp16-allreduce", action="store_true")
parser.add_argument("--model", default="small", help="or the name of one of keras.applications, such as ResNet50")
parser.add_argument("--batch-size", type=int, default=8)
parser.add_argument("--image-size", type=int, default=32)
parser.add_argument("--num-warmup-batches", type=int, default=2)
parser.add_argument("--num-batches-per-iter", type=int, default=2)
parser.add_argument("--num-iters", type=int, default=3)
parser.add_argument("--no-cuda", action="store_true")
args = parser.parse_args()

hvd.init()
gpus = [] if args.no_cuda else tf.config.list_physical_devices("GPU")
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
opt = tf.keras.optimizers.SGD(0.01)
loss_function = tf.keras.losses.SparseCategoricalCrossentropy()
compression = hvd.Compression.fp16 if args.fp16_allreduce else hvd.Compression.none

data = tf.random.uniform([args.batch_size, *model.input_shape[1:]])
target = tf.random.uniform([args.batch_size, 1], maxval=999, dtype=tf.int64)


@tf.function
def benchmark_step(first_batch):
    with tf.GradientTape() as tape:
        loss = loss_function(target, model(data, training=True))
    tape = hvd.DistributedGradientTape(tape, compression=compression)
    gradients = tape.gradient(loss, model.trainable_variables)
    opt.apply_gradients(zip(gradients, model.trainable_variables, strict=True))
    # After the first step, which makes the optimizer's variables.
    if first_batch:
        hvd.broadcast_variables(model.variables, root_rank=0)
        hvd.broadcast_variables(opt.variables, root_rank=0)


def log(text):
    if hvd.rank() == 0:
        print(text, flush=True)


log(f"model {args.model}, batches of {args.batch_size} on {hvd.size()} ranks")
opt.build(model.trainable_variables)
benchmark_step(first_batch=True)
timeit.timeit(lambda: benchmark_step(first_batch=False), number=args.num_warmup_batches)
speeds = []
for iteration in range(args.num_iters):
    seconds = timeit.timeit(lambda: benchmark_step(first_batch=False), number=args.num_batches_per_iter)
    speeds.append(args.batch_size * args.num_batches_per_iter / seconds)
    log(f"iteration {iteration}: {speeds[-1]:.1f} images/s per rank")
log(f"images/s per rank: {statistics.mean(speeds):.1f} +- {1.96 * statistics.pstdev(speeds):.1f}")
log(f"total images/s on {hvd.size()} ranks: {hvd.size() * statistics.mean(speeds):.1f}")
