"""Configuration of a run: what may be given, and what is saved in run_dir."""
