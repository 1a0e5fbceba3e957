"""``lentando timeline``: the traces of all ranks, merged into one, and who waited for whom."""
