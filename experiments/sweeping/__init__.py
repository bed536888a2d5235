"""What `dtr-lab sweep` is made of."""
