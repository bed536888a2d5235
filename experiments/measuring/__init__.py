"""What `dtr-lab affinity` is made of."""
