"""Programs that tests start import the frameworks sooner: Python runs this file when it starts.

An import makes some hundred thousand objects that stay. At Python's own threshold of 700 the collector looks at them
again and again, which is a quarter of the time that TensorFlow takes to be imported, and a sixth of PyTorch's.
"""

import gc

gc.set_threshold(10_000, 10, 10)
