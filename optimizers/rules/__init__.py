"""The update rules of the papers, on flat arrays and the protocols of ``lentando.comm``."""
