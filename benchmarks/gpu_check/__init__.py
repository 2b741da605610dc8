"""Whether this machine's GPU computes, publishes and remembers as the project expects: `make gpu-check`."""
