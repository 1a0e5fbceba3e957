"""The update rules of the papers, on flat arrays over the protocols of ``lentando.comm``."""
