"""The framework packages of Lentando, and the framework that each is for."""

FRAMEWORKS = {"lentando.torch": "torch", "lentando.tensorflow": "tensorflow", "lentando.keras": "tensorflow"}

WITH_METHODS = ["lentando.torch", "lentando.tensorflow"]
"""Those that export optimizers."""
