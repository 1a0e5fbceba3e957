"""All-reduce of one buffer in two halves, each way to do it in a file of its own; ``collectives`` chooses."""
