"""The files of a run's telemetry -> arrays; `runs.load_runs` is the way in."""
