"""``horovod.runner``: what its tests import."""
