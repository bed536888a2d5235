"""The parts of `dtr-lab probe`: what is measured, on which data, for how long, and what becomes of it."""
