"""All-reduce of one buffer. Each method is a file; ``plan`` builds them, ``tuning`` measures which is the fastest."""
