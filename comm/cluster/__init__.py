"""Descriptions of a cluster, read by the simulator and by the delay model: how long steps take, how fast links are."""
