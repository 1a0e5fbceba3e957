"""Checkpoints from which any framework can resume: safetensors and JSON, complete or absent.

A checkpoint is a folder. Each rank writes a file of its own; what is equal on all ranks is written once; the manifest,
``checkpoint.json``, comes last. Tensors are stored under the names of the parameters that they belong to, in the shapes
of those parameters.

Versions of the manifest: 3 for one optimizer, 4 for several by name. They hold the settings as data
(``lentando.optimizers.rules.settings.Settings.method``), with a version of its own. Versions 1 and 2, the same with the
settings as text, are read too.
"""
