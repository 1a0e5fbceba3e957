"""``horovod.common``: what its tests import."""
