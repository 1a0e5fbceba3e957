"""``horovod.runner.util``: what its tests import."""
