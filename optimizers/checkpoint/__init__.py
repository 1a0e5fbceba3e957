"""Checkpoints that any framework can continue from: safetensors and JSON, complete or not there at all.

A checkpoint is a folder. Each rank writes a part of its own; what is equal on all ranks is written once; the manifest
comes last. Tensors are stored under the names of the parameters that they belong to, in those parameters' shapes.
"""
