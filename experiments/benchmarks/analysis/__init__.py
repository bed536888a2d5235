"""How fast and in how much memory telemetry of long runs is read and reduced, and many runs compared; see
``__main__``."""
