"""The smallest complete framework adapter: what a new framework needs, with a NumPy "framework" as the example.

In the product it would be the folder ``frameworks/toy``, with a link ``src/lentando/toy``.
"""

from lentando.toy.library import SGD as SGD
from lentando.toy.methods import *
from lentando.toy.optimizer import *

from lentando.optimizers.exports import *
